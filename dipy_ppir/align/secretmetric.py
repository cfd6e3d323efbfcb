r"""Mutual information on shares, as the optimizer on shares wants it.

`SecretMutualInformation` takes part in the evaluations of one resolution level at one
party. What it hands out are numbers on shares (`dipy_ppir.mpc.information`); the
optimizer is `dipy_ppir.align.quasinewton.minimise`, with `secret_numbers`.

The gradient by the parameters :math:`\theta` of a transform is

.. math:: \sum_x z(x) \sum_d g_d(x) \frac{\partial T_d}{\partial \theta_k}(x)
          = \sum_{d, e} \Big( \sum_x z(x) g_d(x) y_e(x) \Big) C_{k, de}

because every transform of DIPY's moves a point by a linear function of its position:
the sums in brackets are of the public positions y, and C is the moving owner's.
"""

import numpy as np

from dipy_ppir.align import quasinewton
from dipy_ppir.align.parzenhist import MovingBands, linear_jacobian
from dipy_ppir.align.quasinewton import (
    SCALE,
    bin_moments,
    object_moments,
    orthonormal_steps,
    regular_inverse,
)
from dipy_ppir.mpc import worlds
from dipy_ppir.mpc.information import SUM_BITS, Moving
from dipy_ppir.mpc.ledger import MOVING, STATIC

#: Positions of sample points are rounded to this part of a voxel.
POINT_UNIT = 1 / 4
#: The sums of a gradient leave a bit for what rounding adds.
ROOM = SUM_BITS - 1
#: The logarithms of two counts below 2**30 differ by no more.
LARGEST_DIFFERENCE = 30 * np.log(2.0)
#: The first curvature is estimated from no more samples than this.
CURVATURE_SAMPLES = 200_000
_BLOCK = 1 << 16


def secret_numbers(session):
    """The numbers of the optimizer on shares, with the digits of its clear twin."""
    return worlds.numbers(
        session,
        digits=quasinewton.DIGITS,
        floor=quasinewton.FLOOR,
        step_bits=quasinewton.STEP_BITS,
        exponents=quasinewton.EXPONENTS,
        square_digits=quasinewton.SQUARE_DIGITS,
        tilt_bits=quasinewton.LARGEST_INVERSE.bit_length() - 1,
    )


class Positions:
    """Where the samples of a level are, in public integers.

    Parameters
    ----------
    shape : tuple of int
        of the static image's grid.
    grid2world : array, shape (dim + 1, dim + 1)
        mm.
    points : array, shape (n, dim + 1), optional
        sample points in the static image's space, mm, homogeneous; every voxel by
        default.
    """

    def __init__(self, shape, grid2world, points=None):
        self.shape = tuple(shape)
        self.dim = len(self.shape)
        unit, center = (1.0 if points is None else POINT_UNIT), np.array(shape) // 2
        from_center = np.eye(self.dim + 1)
        from_center[: self.dim, : self.dim] *= unit
        from_center[: self.dim, self.dim] = center
        #: Positions to mm.
        self.to_world = grid2world @ from_center
        if points is None:
            self.count, self._rounded = int(np.prod(self.shape)), None
        else:
            self.count = len(points)
            voxels = points @ np.linalg.inv(self.to_world).T
            self._rounded = np.rint(voxels).astype(np.int32)

    def __call__(self, start, stop):
        """Positions of some samples and a one, integers, shape (k, dim + 1)."""
        if self._rounded is not None:
            return self._rounded[start:stop].astype(np.int64)
        out = np.ones((stop - start, self.dim + 1), dtype=np.int64)
        index = np.unravel_index(np.arange(start, stop), self.shape)
        for axis, (places, size) in enumerate(zip(index, self.shape, strict=True)):
            out[:, axis] = places - size // 2
        return out


class SecretMutualInformation:
    """One level's metric on shares, at one party.

    Parameters
    ----------
    metric : SecureMutualInformationMetric
        set up with the images of the level that are here.
    masked : bool, optional
        whether samples may be left out, if not as the metric says.
    anew : bool, optional
        whether the static image is shared for every evaluation.
    sent : object, optional
        see the attribute: of another one for the same level of the same images.

    Attributes
    ----------
    basis : array, shape (p, p)
        the steps, see `orthonormal_steps`; at the moving owner.
    """

    def __init__(self, metric, masked=None, *, anew=False, sent=None):
        self.metric, self.session = metric, metric.session
        self.transform, histogram = metric.transform, metric.histogram
        self.parameters = self.transform.get_number_of_parameters()
        #: Of the gradient.
        self.columns = self.parameters
        self.positions = Positions(
            metric.static.shape, metric.static_grid2world, metric.samples
        )
        self.basis = self._slopes = self._mine = None
        self._first = True
        self._information = worlds.information(
            self.session,
            self.positions.count,
            histogram.categories,
            histogram.nbins,
            self.positions,
            metric.dim,
            masked=metric.masked if masked is None else masked,
            digits=quasinewton.DIGITS,
            backend=metric.backend,
            anew=anew,
            sent=sent,
        )
        self.session.ledger.about(self.positions.count)
        if self.session.pid == MOVING:
            self.start = np.eye(metric.dim + 1)
            if metric.starting_affine is not None:
                self.start = metric.starting_affine

    @property
    def sent(self):
        """What the static owner sent and need not send again, or None."""
        return self._information.sent

    def share_static(self, values=None, mask=None):
        """Share the static image's bins.

        Parameters
        ----------
        values, mask : array, at the static owner only
            static intensity of each sample, and which samples count.
        """
        index = None
        if self.session.pid == STATIC:
            index = self.metric.histogram.static_bins(values)
            mask = None if mask is None else np.asarray(mask).reshape(-1) != 0
        with self.session.phase("static image"):
            self._information.share_categories(index, mask)

    def begin(self, params):
        """Choose the steps around parameters, at the moving owner."""
        if params is not None:
            jacobian = linear_jacobian(self.transform, params)
            image = self.metric.moving, self.metric.moving_grid2world
            self.basis = orthonormal_steps(jacobian, *object_moments(*image))
        self._first = True

    def evaluate(self, params):
        """Value and gradient of the metric, times `SCALE`, on shares.

        Parameters
        ----------
        params : array, shape (p,), or None
            at the moving owner only.
        """
        if params is None:
            return self._evaluate()
        affine = self.transform.param_to_matrix(params) @ self.start
        jacobian = linear_jacobian(self.transform, params) @ self.start
        return self._evaluate(affine, np.einsum("kde,kl->lde", jacobian, self.basis))

    def value(self, affine=None):
        """Value of the metric, times `SCALE`, on shares.

        Parameters
        ----------
        affine : array, shape (dim + 1, dim + 1), at the moving owner only
            from the static to the moving image's space, mm.
        """
        self._first = False
        columns = None
        if affine is not None:
            dim = self.positions.dim
            columns = np.zeros((self.columns, dim, dim + 1))
        return self._evaluate(affine, columns)[0]

    def first_inverse(self, numbers):
        """What the optimizer begins with, after the first evaluation."""
        inverse, weights = self._mine or (None, None)
        return quasinewton.first_inverse(
            numbers, inverse, weights, self._slopes, self.parameters
        )

    def _evaluate(self, affine=None, jacobian=None, steps=None):
        """Value and gradient.

        Parameters
        ----------
        affine : array, shape (dim + 1, dim + 1), at the moving owner only
            where the moving image is looked up.
        jacobian : array, shape (columns, dim, dim + 1)
            how that changes along the columns of the gradient.
        steps : array, shape (p, dim, dim + 1), optional
            how with the components of a step, for the first curvature; as along the
            columns of the gradient by default.
        """
        moving = None
        if affine is not None:
            moving = self._moving(
                affine, jacobian, jacobian if steps is None else steps
            )
        found = self._information.evaluate(
            SCALE, self.columns, moving, slopes=self._first
        )
        self.metric.evaluations += 1
        if self._first:
            self._slopes, self._first = found.slopes, False
        return found.value, found.gradient

    def _moving(self, affine, jacobian, steps):
        histogram = self.metric.histogram
        values, gradient, mask = self.metric.sample_moving(affine)
        # As functions of the positions.
        jacobian, steps = (j @ self.positions.to_world for j in (jacobian, steps))
        bands = MovingBands(values, mask, histogram)
        if self._first:
            self._mine = self._curvature(values, gradient, mask, steps)
        scale = self._scale(gradient)
        units = self.positions.count * histogram.mdelta * scale

        def rounded(start, stop):
            return np.rint(gradient[start:stop] * scale).astype(np.int64)

        matrix = jacobian.reshape(self.columns, -1)
        return Moving(bands.weights, rounded, matrix / units)

    def _scale(self, gradient):
        """Power of two that keeps every sum of the gradient inside the ring."""
        sums = np.zeros((gradient.shape[1], self.positions.dim + 1))
        for start in range(0, len(gradient), _BLOCK):
            y = np.abs(self.positions(start, min(start + _BLOCK, len(gradient))))
            sums += np.abs(gradient[start : start + _BLOCK]).T @ y
        largest = LARGEST_DIFFERENCE * sums.max()
        bits = ROOM - self._information.scale_bits
        with np.errstate(divide="ignore"):
            return 2.0 ** np.clip(np.floor(bits - np.log2(largest)), -1000, 40)

    def _curvature(self, values, gradient, mask, jacobian):
        step = -(-len(values) // CURVATURE_SAMPLES)
        y = np.concatenate(
            [
                self.positions(start, min(start + _BLOCK, len(values)))[
                    -start % step :: step
                ]
                for start in range(0, len(values), _BLOCK)
            ]
        )
        some = gradient[::step]
        if mask is not None:
            some = some * (mask[::step] != 0)[:, None]
        columns = np.einsum("nd,kde,ne->nk", some, jacobian, y, optimize=True)
        histogram = self.metric.histogram
        moments = bin_moments(columns, values[::step], histogram)
        return regular_inverse(moments, histogram.mdelta)
