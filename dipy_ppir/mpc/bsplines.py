r"""Tensor products of uniform cubic B-splines on a grid, alike on numbers and on words.

Along an axis of n voxels there is a control point every k-th voxel, one before the
grid and two after it. A voxel r voxels after control point q depends on four of them:

.. math::

    v(k q + r) = \sum_{j=0}^{3} B_j(r / k)\, c_{q+j},

with the segments :math:`B_j` of the uniform cubic B-spline. The weights are public, and
rounded to multiples of a public unit so that they add up to 1: on words of a ring the
maps are those of the integers, and exact.
"""

from math import prod

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

#: Bits of the integers that stand for the products of weights of all axes.
WEIGHT_BITS = 24
#: Largest spacing of control points, voxels.
MOST_SPACING = 32


def segments(spacing, order=0):
    """The segments of the uniform cubic B-spline at the voxels between control points.

    Parameters
    ----------
    spacing : int
        voxels from one control point to the next.
    order : int, optional
        of the derivative, per voxel.

    Returns
    -------
    weights : array, shape (spacing, 4)
    """
    cubics = [(-1, 3, -3, 1), (3, -6, 0, 4), (-3, 3, 3, 1), (1, 0, 0, 0)]
    t = np.arange(spacing) / spacing
    each = [np.polyval(np.polyder(np.poly1d(c), order), t) for c in cubics]
    return np.stack(each, axis=1) / 6 / float(spacing) ** order


class Lattice:
    """Control points of a grid; see the module.

    Parameters
    ----------
    shape : sequence of int
        of the grid.
    spacing : sequence of int
        of the control points, voxels, along each axis.

    Attributes
    ----------
    control_shape : tuple of int
    unit : float
        the integers that stand for products of weights count multiples of it.
    """

    def __init__(self, shape, spacing):
        self.shape = tuple(int(n) for n in shape)
        self.spacing = tuple(int(k) for k in spacing)
        self.control_shape = tuple(
            (n - 1) // k + 4 for n, k in zip(self.shape, self.spacing, strict=True)
        )
        bits = WEIGHT_BITS // len(self.shape)
        self.unit = 2.0 ** (-bits * len(self.shape))
        self._integers = [_rounded(segments(k), 1 << bits) for k in self.spacing]
        self._weights = [w * 2.0**-bits for w in self._integers]

    @property
    def size(self):
        """How many control points there are."""
        return prod(self.control_shape)

    @property
    def most_weight(self):
        """No control point's integer weights add up to more."""
        return prod(int(w.sum()) for w in self._integers)

    def values(self, controls):
        """The spline at all voxels.

        Parameters
        ----------
        controls : array of float, shape (..., *control_shape)

        Returns
        -------
        values : array, shape (..., *shape)
        """
        for axis, (w, n) in enumerate(zip(self._weights, self.shape, strict=True)):
            controls = _spread(controls, w, n, axis - len(self.shape))
        return controls

    def sums(self, x, *, power=1):
        """Sums over the voxels, weighted by the splines: the adjoint of `values`.

        Parameters
        ----------
        x : array of float, shape (..., *shape)
        power : int, optional
            of the weights.

        Returns
        -------
        sums : array, shape (..., *control_shape)
        """
        for axis in reversed(range(len(self.shape))):
            weights = self._weights[axis] ** power
            x = _gather(x, weights, axis - len(self.shape))
        return x

    def integer_sums(self, x):
        """`sums` of integers, or of words of a ring, in units of `unit`."""
        for axis in reversed(range(len(self.shape))):
            weights = self._integers[axis].astype(x.dtype)
            x = _gather(x, weights, axis - len(self.shape))
        return x

    def cell_weights(self):
        """Integer weights of the voxels of a cell for the control points around it.

        Returns
        -------
        weights : array of int64, shape (voxels, 4**dim)
        """
        whole = np.ones((1, 1), dtype=np.int64)
        for w in self._integers:
            whole = np.kron(whole, w)
        return whole

    def matrix(self, axis, order=0):
        """The map of one axis, or its derivative per voxel, as a matrix."""
        k, n = self.spacing[axis], self.shape[axis]
        return _spread(np.eye(self.control_shape[axis]), segments(k, order), n, -1).T

    def at(self, axis, positions):
        """The map to any positions along an axis, in voxels, as a matrix.

        Beyond the grid the spline is that of its border.
        """
        k, n = self.spacing[axis], self.shape[axis]
        x = np.clip(positions, 0, n - 1) / k
        q = np.floor(x).astype(int)
        fine = np.zeros((len(x), self.control_shape[axis]))
        t = x - q
        each = (
            (1 - t) ** 3,
            3 * t**3 - 6 * t**2 + 4,
            -3 * t**3 + 3 * t**2 + 3 * t + 1,
            t**3,
        )
        for j, weights in enumerate(each):
            fine[np.arange(len(x)), q + j] = weights / 6
        return fine


def _rounded(weights, scale):
    """Weights as integers whose rows add up to the scale."""
    integers = np.rint(weights * scale).astype(np.int64)
    rows = np.arange(len(integers))
    integers[rows, integers.argmax(axis=1)] += scale - integers.sum(axis=1)
    return integers


def _spread(controls, weights, n, axis):
    """From control points to voxels, along one axis."""
    controls = np.moveaxis(controls, axis, -1)
    windows = sliding_window_view(controls, 4, axis=-1)
    values = np.matmul(windows, weights.T)
    values = values.reshape(*values.shape[:-2], -1)[..., :n]
    return np.moveaxis(values, -1, axis)


def _gather(x, weights, axis):
    """From voxels to control points, along one axis; the adjoint of `_spread`."""
    x, k = np.moveaxis(x, axis, -1), len(weights)
    *outer, n = x.shape
    q = (n - 1) // k + 1
    whole = np.zeros((*outer, q * k), dtype=x.dtype)
    whole[..., :n] = x
    parts = np.matmul(whole.reshape(*outer, q, k), weights)
    sums = np.zeros((*outer, q + 3), dtype=x.dtype)
    for j in range(4):
        sums[..., j : j + q] += parts[..., j]
    return np.moveaxis(sums, -1, axis)
