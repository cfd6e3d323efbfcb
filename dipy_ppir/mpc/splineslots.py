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
        #: Where in its cell a sample is.
        self.inside = np.ravel_multi_index(inside, spacing)
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
        """Weight of each place in a cell for each of its control points, and a zero."""
        table = self.lattice.cell_weights().astype(np.float64)
        return np.vstack([table, np.zeros(table.shape[1])])

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
        out = np.zeros(self.slots, dtype=values.dtype)
        out[: values.size] = values.reshape(-1)
        return out

    def spread(self, values, group, row):
        """Slots of a ciphertext of samples.

        Parameters
        ----------
        values : array, shape (count,)
        group, row : int

        Returns
        -------
        slots : array, shape (slots,)
        """
        index = self.groups[group][row]
        here = np.where(index < 0, 0, values[index])
        shape = self.parts, self.copies, index.shape[1]
        return self._filled(np.broadcast_to(here[:, None], shape))

    def factors(self, x, weights, group, some):
        """What the ciphertexts of a group are multiplied by for one of its sums.

        Parameters
        ----------
        x : array of float, shape (count,)
        weights : array of float, shape ``control_shape``
        group, some : int

        Yields
        ------
        slots : array of float, shape (slots,)
            for each row.
        """
        points, cells = self._points(some), self._cells[group]
        there = points < len(self._shifts)
        columns = np.where(there, points, 0)[:, None]
        heights = weights.reshape(-1)[cells + self._shifts[columns]]
        heights = heights * there[:, None]
        for index in self.groups[group]:
            inside = np.where(index < 0, -1, self.inside[index])
            by = self._weights[inside[:, None], columns]
            here = np.where(index < 0, 0.0, x[index])[:, None]
            yield self._filled(here * by * heights)

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
