r"""Which voxels of an image are encrypted together, for sums over control points.

A ciphertext has slots, and its products are elementwise. The voxels of a *cell*, of
:math:`k^d` voxels between control points, all go to the same slot, one after the other
in as many ciphertexts: products of them with plaintexts are then added up where they
are. A cell contributes to :math:`4^d` control points, each with weights of its own; so
many sums are made of it, and `gathered` adds those of a control point up.

Where there are fewer cells than slots, a cell has several: first one for each of some
of its control points (*copies*, of the same voxels), so that there are fewer sums to be
sent, then also one for each part of its voxels. Cells of as many samples are encrypted
together, so that few slots stay empty.
"""

from functools import cached_property
from math import prod

import numpy as np

#: Control points that a voxel depends on, along an axis.
REACH = 4


class Slots:
    """Places of the samples of an image; public.

    Parameters
    ----------
    lattice : Lattice
    at : array of int64, shape (count,), or None
        flat indices of the samples; all voxels by default.
    slots : int
        of a ciphertext.

    Attributes
    ----------
    groups : list of array, shape (rows, parts, cells)
        for each group of cells that share slots, which samples are where: a ciphertext
        for each row. -1 stands for none.
    sums : int
        how many ciphertexts of sums there are, for each group and axis.
    """

    def __init__(self, lattice, at, slots):
        self.lattice, self.slots = lattice, slots
        at = np.arange(prod(lattice.shape)) if at is None else at
        places = np.unravel_index(at, lattice.shape)
        spacing, reach = lattice.spacing, REACH ** len(lattice.shape)
        pairs = [divmod(x, k) for x, k in zip(places, spacing, strict=True)]
        cell, inside = zip(*pairs, strict=True)
        cell = np.ravel_multi_index(cell, lattice.control_shape)
        # Where in its cell a sample is.
        self._inside = np.ravel_multi_index(inside, spacing)
        counts = np.bincount(cell)
        used = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        copies = min(reach, max(slots // len(used), 1))
        self.sums = -(-reach // copies)
        self.copies = -(-reach // self.sums)
        parts = max(slots // (len(used) * self.copies), 1) if self.sums == 1 else 1
        self.parts = min(parts, counts.max())
        order = np.argsort(cell, kind="stable")
        first = np.cumsum(counts) - counts
        self.groups, self._cells = [], []
        for start in range(0, len(used), slots):
            cells = used[start : start + slots]
            rows = -(-counts[cells[0]] // self.parts)
            rank = np.arange(rows * self.parts)[:, None]
            index = np.minimum(first[cells] + rank, len(order) - 1)
            index = np.where(rank < counts[cells], order[index], -1)
            self.groups.append(index.reshape(rows, self.parts, len(cells)))
            self._cells.append(cells)

    @cached_property
    def _shifts(self):
        """How far each of a cell's control points is from its first one."""
        corners = np.indices((REACH,) * len(self.lattice.shape))
        corners = corners.reshape(len(corners), -1)
        return np.ravel_multi_index(corners, self.lattice.control_shape)

    @cached_property
    def _weights(self):
        """For each of a cell's control points the weights of the places in a cell."""
        return np.ascontiguousarray(self.lattice.cell_weights().T.astype(np.float64))

    @cached_property
    def _insides(self):
        """For each group where in their cells samples are; anything for none."""
        return [self._inside[index] for index in self.groups]

    @property
    def ciphertexts(self):
        """How many ciphertexts the samples fill."""
        return sum(len(index) for index in self.groups)

    @property
    def results(self):
        """How many ciphertexts of sums there are, for each axis."""
        return len(self.groups) * self.sums

    def _points(self, some):
        """Which of a cell's control points a ciphertext of sums has."""
        return np.arange(some * self.copies, (some + 1) * self.copies)

    def _filled(self, values):
        """Slots of values, zeros in those that are left."""
        if values.size == self.slots:
            return values.reshape(-1)
        out = np.zeros(self.slots, dtype=values.dtype)
        out[: values.size] = values.reshape(-1)
        return out

    def placed(self, values, group):
        """Values of the samples of a group, in their places, and zeros.

        Parameters
        ----------
        values : array, shape (count,)
        group : int

        Returns
        -------
        placed : array, shape (rows, parts, cells)
        """
        index = self.groups[group]
        return np.where(index < 0, 0, values[index])

    def copied(self, placed):
        """Slots of the ciphertexts of a group's samples.

        Parameters
        ----------
        placed : array, shape (rows, parts, cells)

        Yields
        ------
        slots : array, shape (slots,)
            for each row.
        """
        for here in placed:
            shape = self.parts, self.copies, here.shape[1]
            yield self._filled(np.broadcast_to(here[:, None], shape))

    def factors(self, placed, weights, group, some):
        """What the ciphertexts of a group are multiplied by for one of its sums.

        Parameters
        ----------
        placed : array of float, shape (rows, parts, cells)
        weights : array of float, shape ``control_shape``
        group, some : int

        Yields
        ------
        slots : array of float, shape (slots,)
            for each row.
        """
        cells, flat = self._cells[group], weights.reshape(-1)
        points = [k for k in self._points(some) if k < len(self._shifts)]
        heights = [flat[cells + self._shifts[point]] for point in points]
        for here, inside in zip(placed, self._insides[group], strict=True):
            out = np.zeros((self.parts, self.copies, len(cells)))
            for copy, point in enumerate(points):
                by = self._weights[point].take(inside)
                by *= here
                np.multiply(by, heights[copy], out=out[:, copy])
            yield self._filled(out)

    def gathered(self, sums, total, group, some, modulus):
        """Add sums to those of the control points that they belong to, in their place.

        Parameters
        ----------
        sums : array of uint64, shape (slots,)
        total : array of uint64, shape ``control_shape``
        group, some : int
        modulus : int
            below 2**63.
        """
        cells, modulus = self._cells[group], np.uint64(modulus)
        flat = total.reshape(-1)
        shape = self.parts, self.copies, len(cells)
        sums = sums[: prod(shape)].reshape(shape)
        for copy, point in enumerate(self._points(some)):
            if point == len(self._shifts):
                break
            at = cells + self._shifts[point]
            for part in sums[:, copy]:
                flat[at] = (flat[at] + part) % modulus
