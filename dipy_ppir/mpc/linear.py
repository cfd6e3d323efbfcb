"""Public linear maps, alike on real numbers and on packed elements of a ring.

A map is a matrix for each axis, applied one after the other. Weights are multiples of a
public unit, so that on shares the map is one of integers, and exact; on real numbers it
is the same map.
"""

from functools import cached_property

import numpy as np

from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.threads import threads

#: Magnitude of the integers that stand for weights stays below this.
MOST_WEIGHT = 1 << 31


def points(n, spacing):
    """Every `spacing`-th of n voxels, and the last."""
    return np.unique(np.append(np.arange(0, n, spacing), n - 1))


def banded(integers):
    """A matrix by its band, as filters of the ring take it.

    Parameters
    ----------
    integers : array of int, shape (outputs, inputs)

    Returns
    -------
    first : array of int64, shape (outputs,)
        index of each row's first weight.
    weights : array of int32, shape (outputs, taps)
    """
    used = integers != 0
    width = used.shape[1]
    first = np.where(used.any(axis=1), used.argmax(axis=1), 0)
    last = np.where(used.any(axis=1), width - used[:, ::-1].argmax(axis=1), 1)
    taps = max(int((last - first).max()), 1)
    first = np.minimum(first, width - taps)
    weights = np.take_along_axis(integers, first[:, None] + np.arange(taps), axis=1)
    return first.astype(np.int64), np.ascontiguousarray(weights, dtype=np.int32)


class AxisMap:
    """A matrix along one axis, of multiples of a unit.

    Parameters
    ----------
    matrix : array of float, shape (outputs, inputs)
    unit : float
        weights are rounded to multiples of it.
    sums : bool, optional
        keep the sums of rows: what is lost by rounding is added to the largest weight.
    """

    def __init__(self, matrix, unit, *, sums=False):
        matrix = np.asarray(matrix, dtype=np.float64)
        self.unit = float(unit)
        self.integers = np.rint(matrix / unit).astype(np.int64)
        if sums:
            lost = np.rint(matrix.sum(axis=1) / unit).astype(np.int64)
            lost -= self.integers.sum(axis=1)
            rows = np.arange(len(matrix))
            self.integers[rows, np.abs(self.integers).argmax(axis=1)] += lost
        if np.abs(self.integers).max(initial=0) >= MOST_WEIGHT:
            raise ValueError("a filter's weights are too large for its unit")

    @property
    def shape(self):
        """Numbers of outputs and of inputs."""
        return self.integers.shape

    @cached_property
    def matrix(self):
        """The weights as they are applied."""
        return self.integers * self.unit

    @cached_property
    def band(self):
        """Where each row begins, and its weights as integers, of one length."""
        return banded(self.integers)

    def clear(self, x, axis):
        """Apply it along an axis of real numbers."""
        return along(x, self.matrix, axis)

    def ring(self, x, axis):
        """Apply it along an axis of packed elements."""
        shape = list(x.shape[:-1])
        outer, inner = int(np.prod(shape[:axis])), 2 * int(np.prod(shape[axis + 1 :]))
        first, weights = self.band
        out = np.empty((outer, len(first), inner), dtype=np.uint64)
        flat = np.ascontiguousarray(x).reshape(outer, shape[axis], inner)
        R128.kernels.filter_axis(flat, first, weights, out, threads())
        shape[axis] = len(first)
        return out.reshape(*shape, 2)


class Linear:
    """A map along every axis, see `AxisMap`, and a mask of outputs that are not zero.

    Parameters
    ----------
    axes : sequence of AxisMap or None
        None along an axis that stays as it is.
    mask : array of bool, optional
        shape of the output.
    """

    def __init__(self, axes, mask=None):
        self.axes, self.mask = list(axes), mask

    @property
    def unit(self):
        """An output on shares counts multiples of this times the input's unit."""
        return float(np.prod([1.0] + [a.unit for a in self.axes if a is not None]))

    def shape(self, shape):
        """Shape of the output."""
        return tuple(
            n if a is None else a.shape[0]
            for a, n in zip(self.axes, shape, strict=True)
        )

    def _order(self):
        given = [k for k, a in enumerate(self.axes) if a is not None]
        return sorted(
            given, key=lambda k: self.axes[k].shape[0] / self.axes[k].shape[1]
        )

    def clear(self, x):
        """Apply it to real numbers."""
        for k in self._order():
            x = self.axes[k].clear(x, k)
        return x if self.mask is None else x * self.mask

    def ring(self, x):
        """Apply it to packed elements."""
        for k in self._order():
            x = self.axes[k].ring(x, k)
        if self.mask is not None:
            x = np.where(self.mask[..., None], x, np.uint64(0))
        return x


def along(x, matrix, axis):
    """Apply a matrix along one axis of real numbers."""
    shape = x.shape
    after = int(np.prod(shape[axis + 1 :]))
    if after == 1:
        y = x.reshape(-1, shape[axis]) @ matrix.T
    else:
        y = np.matmul(matrix, x.reshape(-1, shape[axis], after))
    return y.reshape(*shape[:axis], len(matrix), *shape[axis + 1 :])
