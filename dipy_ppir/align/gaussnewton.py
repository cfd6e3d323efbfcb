r"""Gauss-Newton steps of an affine transform for the sum of squared differences.

Equations 2 to 6 of Taiello et al. 2024. Every transform of DIPY's moves a point by a
linear function of its position, so that with the gradient g of the moving image and
positions y

.. math:: S_k(x) = \sum_{d, e} C_{k,de} \, g_d(x) \, y_e(x),

and :math:`H = \sum_x S S^T = C (\sum_x z z^T) C^T` with :math:`z = g \otimes y`. All of
this is the moving owner's. What it does not know, the sums of :math:`z_{de}` times the
static image, comes in with `dipy_ppir.mpc.leastsquares`, which opens the step only.

Steps are in coordinates in which their norm is the root mean square displacement of the
object in the moving image, in voxels of the level (`orthonormal_steps`).
"""

import numpy as np

from dipy_ppir.mpc.leastsquares import VALUE_BITS, Own, scale

#: No step is larger in any coordinate, voxels of the level: beyond it, it would be
#: opened as another one, so that the matrix is made smaller.
REACH = 64
#: Longest step that is taken, voxels of the level.
CAP = 4.0
#: Of the mean diagonal of H, added to it.
RIDGE = 1e-6
_BLOCK = 1 << 16


def step_bits(precision):
    """Bits of an opened number of a step: see `dipy_ppir.mpc.leastsquares`."""
    return 1 + int(np.ceil(np.log2(REACH / precision + 2)))


class Positions:
    """Where voxels of a grid are, as numbers from -1 to 1 and a one.

    Parameters
    ----------
    shape : tuple of int
    grid2world : array, shape (dim + 1, dim + 1)
        mm.

    Attributes
    ----------
    to_world : array, shape (dim + 1, dim + 1)
        positions to mm.
    """

    def __init__(self, shape, grid2world):
        self.shape, self.dim = tuple(map(int, shape)), len(shape)
        self._center = (np.array(self.shape) - 1) / 2
        self._half = max(max(self._center), 0.5)
        from_center = np.eye(self.dim + 1)
        from_center[: self.dim, : self.dim] *= self._half
        from_center[: self.dim, self.dim] = self._center
        self.to_world = grid2world @ from_center

    @property
    def count(self):
        """Number of voxels."""
        return int(np.prod(self.shape))

    def __call__(self, index=None):
        """Positions of some voxels, or all, by their place in the flat image.

        Returns
        -------
        y : array, shape (dim + 1, n)
        """
        if index is None:
            index = np.arange(self.count)
        y = np.ones((self.dim + 1, len(index)))
        for axis, places in enumerate(np.unravel_index(index, self.shape)):
            y[axis] = (places - self._center[axis]) / self._half
        return y


def static_numbers(values, y):
    """The static image times its positions, as integers.

    Parameters
    ----------
    values : array, shape (n,)
        from 0 to 1.
    y : array, shape (dim + 1, n)

    Returns
    -------
    numbers : array of int64, shape (dim + 1, n)
    """
    return np.rint(y * values * 2.0**VALUE_BITS).astype(np.int64)


def linearized(values, gradient, y, steps, precision):
    """What the moving owner brings to a step.

    Parameters
    ----------
    values : array, shape (n,)
        of the moving image, from 0 to 1.
    gradient : array, shape (n, dim)
        per mm.
    y : array, shape (dim + 1, n)
    steps : array, shape (p, dim, dim + 1)
        how the transform moves a point at position y, mm, for each coordinate of the
        step.
    precision : float
        of the step, voxels.

    Returns
    -------
    own : Own
    """
    p, n = len(steps), len(values)
    c = steps.reshape(p, -1)
    gradient = np.ascontiguousarray(gradient.T)
    factor = scale(gradient)
    integers = np.rint(gradient * factor).astype(np.int64)
    moments, sums, used = np.zeros((c.shape[1],) * 2), np.zeros(c.shape[1]), 0
    for start in range(0, n, _BLOCK):
        part = slice(start, start + _BLOCK)
        g = integers[:, part].astype(np.float64)
        z = (g[:, None] * y[None, :, part]).reshape(c.shape[1], -1)
        moments += z @ z.T
        sums += z @ values[part]
        used += np.count_nonzero(g.any(axis=0))
    hessian = c @ moments @ c.T
    trace = np.trace(hessian)
    if not trace > 0:
        # Nothing depends on the transform: no step.
        return Own(integers, np.zeros_like(c), np.zeros(p), y)
    inverse = np.linalg.inv(hessian + RIDGE * trace / p * np.eye(p))
    # As integers are, C is in their units: the step is the same. By the inequality of
    # Cauchy and Schwarz no step is larger than this, as no difference is than 1.
    inverse *= factor
    most = np.sqrt(used * np.diag(inverse).max() * factor)
    part = min(1.0, REACH / most) / precision
    matrix = part * inverse @ c
    return Own(integers, matrix / 2.0**VALUE_BITS, -(matrix @ sums), y)


def minimise(steps, metric, params, iterations, precision, on_step=None):
    """Minimise the sum of squared differences at one level.

    Every party runs this. The number of iterations is fixed, so that it tells nothing.

    Parameters
    ----------
    steps : ClearSteps or SecretSteps
    metric : object
        ``linearized(params)`` returns the count of samples and, at the moving owner,
        `Own`; ``basis`` are the steps, there.
    params : array, shape (p,), or None
        where to start; only the moving owner knows it.
    iterations : int
    precision : float
        voxels.
    on_step : callable, optional
        called after each iteration.

    Returns
    -------
    params : array, shape (p,), or None
    """
    for _ in range(iterations):
        count, own = metric.linearized(params)
        units = steps.step(count, metric.parameters, own)
        # Where nothing depends on the transform, all that is seen is noise.
        if params is not None and own.matrix.any():
            step = precision * units
            step *= min(1.0, CAP / max(np.linalg.norm(step), CAP))
            params = params + metric.basis @ step
        if on_step is not None:
            on_step()
    return params
