"""How much a cubic B-spline bends, as a quadratic form of its control points."""

from itertools import combinations_with_replacement
from math import prod

import numpy as np
from scipy.sparse import csr_array


class BendingEnergy:
    r"""Half the squared second derivatives of a spline, summed over all voxels.

    .. math::

        \tfrac{1}{2} \sum_x \sum_{a, b}
            \Big( \frac{\partial^2 u}{\partial x_a \partial x_b} \Big)^2

    for each component u by itself, in voxels (Rueckert et al. 1999, eq. 9). It is a sum
    of products of matrices along the axes.

    Parameters
    ----------
    lattice : Lattice
    """

    def __init__(self, lattice):
        dim = len(lattice.shape)
        squares = []
        for axis in range(dim):
            parts = (csr_array(lattice.matrix(axis, order)) for order in range(3))
            squares.append([(part.T @ part).tocsr() for part in parts])
        self._terms = []
        for axes in combinations_with_replacement(range(dim), 2):
            orders = [axes.count(axis) for axis in range(dim)]
            factors = [squares[axis][order] for axis, order in enumerate(orders)]
            self._terms.append((1.0 if axes[0] == axes[1] else 2.0, factors))

    def gradient(self, controls):
        """The gradient at control points, which is linear in them.

        Parameters
        ----------
        controls : array, shape (..., *control_shape)
        """
        total, dim = np.zeros_like(controls), len(self._terms[0][1])
        for weight, factors in self._terms:
            x = controls
            for axis, matrix in enumerate(factors):
                first = np.moveaxis(x, axis - dim, 0)
                x = (matrix @ first.reshape(len(first), -1)).reshape(first.shape)
                x = np.moveaxis(x, 0, axis - dim)
            total += weight * x
        return total

    @property
    def diagonal(self):
        """Diagonal of that map, shape `control_shape`."""
        each = (
            weight * prod(np.ix_(*(m.diagonal() for m in factors)))
            for weight, factors in self._terms
        )
        return sum(each)
