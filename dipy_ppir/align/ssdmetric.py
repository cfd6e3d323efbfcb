"""Sum of squared differences of two images, for affine registration.

`SquaredDifferencesMetric` is the metric in the clear, for DIPY's own
``AffineRegistration``, which has none; `SecureSquaredDifferencesMetric` that of two
parties' images. `GaussNewton` takes the same steps for both.
"""

from dipy.testing.decorators import warning_for_keywords
import numpy as np
from scipy.optimize import OptimizeResult

from dipy_ppir.align import plan
from dipy_ppir.align.affinemetric import PlacedImages
from dipy_ppir.align.agreed import keep_to
from dipy_ppir.align.gaussnewton import (
    Positions,
    linearized,
    minimise,
    static_numbers,
    step_bits,
)
from dipy_ppir.align.gradientsampling import (
    magnitude_samples,
    sample_count,
    uniform_samples,
)
from dipy_ppir.align.parameters import AffineParameters
from dipy_ppir.align.parzenhist import linear_jacobian
from dipy_ppir.align.quasinewton import object_moments, orthonormal_steps
from dipy_ppir.align.remote import is_remote
from dipy_ppir.align.secretmetric import secret_numbers
from dipy_ppir.mpc.edgesamples import secret_draws, show_samples
from dipy_ppir.mpc.leastsquares import VALUE_BITS, ClearSteps, mismatch, show_difference
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.worlds import least_squares, mean_products

#: Of images that match, the mean squared difference is no larger part of the variance
#: of the static image, and has not grown by the second part.
MOST_DIFFERENCE, MOST_GROWTH = 0.8, 0.05
#: The final value is shown times this: to a part in 8000.
SHOWN = 8


class SquaredDifferencesMetric(PlacedImages):
    """Mean of squared differences of two images, in the clear.

    For ``dipy.align.imaffine.AffineRegistration`` with ``method=GaussNewton(metric)``.

    Parameters
    ----------
    sampling : {"URS", "GMS"}, optional
        which voxels are samples, fresh at every iteration: a uniformly random
        selection, or one that prefers the edges of the moving image. All voxels by
        default; with `sampling_proportion` "URS".
    sampling_proportion : float in (0, 1], optional
        part of the voxels of a level that are samples, at least 1000 of them.
    seed : int, optional
        of the samples of "URS".
    precision : float, optional
        part of a voxel of the level to which steps are rounded.

    Raises
    ------
    ValueError
        if an argument is out of range.
    """

    names = "sampling", "sampling_proportion", "seed", "precision"

    @warning_for_keywords()
    def __init__(
        self, *, sampling=None, sampling_proportion=None, seed=None, precision=None
    ):
        checked = AffineParameters(
            metric="SSD",
            sampling=sampling,
            sampling_proportion=sampling_proportion,
            seed=seed,
            precision=precision,
        )
        for name in self.names:
            setattr(self, name, getattr(checked, name))
        self.static_mask = self.moving_mask = None
        #: Numbers of iterations and of evaluations so far.
        self.iterations = self.evaluations = 0

    @warning_for_keywords()
    def setup(
        self,
        transform,
        static,
        moving,
        *,
        static_grid2world=None,
        moving_grid2world=None,
        starting_affine=None,
        static_mask=None,
        moving_mask=None,
        level=None,
    ):
        """Prepare the metric for a pair of images; see ``dipy.align.imaffine``.

        Raises
        ------
        ValueError
            if a mask is given.
        """
        self.check_masks(static_mask, moving_mask)
        self.place(
            transform,
            static,
            moving,
            static_grid2world,
            moving_grid2world,
            starting_affine,
        )
        self.parameters = transform.get_number_of_parameters()
        self.positions = Positions(self.static.shape, self.static_grid2world)
        self.basis = self._edges = None
        self._share_static()

    def check_masks(self, *masks):
        """Raise ValueError if there is a mask."""
        if any(mask is not None for mask in masks):
            raise ValueError(
                "the sum of squared differences takes no masks; leave them out, or set "
                "what is outside of them to zero in both images"
            )

    def distance(self, params):
        """Mean squared difference at parameters of the transform."""
        self.evaluations += 1
        values, _ = self.sample(self._affine(params), with_gradient=False)
        return float(np.mean((np.asarray(values) - self.static) ** 2))

    def gradient(self, params):
        """Gradient of the mean squared difference."""
        return self.distance_and_gradient(params)[1]

    def distance_and_gradient(self, params):
        """Mean squared difference and its gradient."""
        self.evaluations += 1
        values, gradient = self._sampled(params)
        y, c = self.positions(), self._motion(params)
        difference = values - self.static.reshape(-1)
        sums = np.einsum("n,nd,en->de", difference, gradient, y, optimize=True)
        slope = 2 * np.tensordot(c, sums, 2) / len(values)
        return float(np.mean(difference**2)), slope

    # -- steps --------------------------------------------------------------

    def begin(self, params):
        """Choose coordinates of steps around parameters, at the moving owner."""
        self.basis = None
        if params is None:
            return
        jacobian = linear_jacobian(self.transform, params)
        moments = object_moments(self.moving, self.moving_grid2world)
        voxel = np.linalg.norm(self.static_grid2world[:-1, :-1], axis=0).mean()
        self.basis = orthonormal_steps(jacobian, *moments, voxel)
        if self._resampled and self.sampling == "GMS":
            slopes = np.gradient(self.moving, *self.moving_spacing)
            self._edges = np.sqrt(sum(slope**2 for slope in slopes))

    @property
    def _count(self):
        """How many samples there are."""
        return sample_count(self.positions.count, self.sampling_proportion)

    @property
    def _resampled(self):
        """Whether there are other samples in every iteration."""
        return self._count < self.positions.count

    def linearized(self, params):
        """What the next step is made of, the static owner's samples included.

        Returns
        -------
        count : int
            number of samples.
        own : Own, or None
            what the moving owner brings; there only.
        """
        n, count = self.positions.count, self._count
        self.iterations += 1
        if not self._resampled:
            return n, self._own(params)
        if self.sampling == "URS":
            index, share = (
                uniform_samples(self._generator(), n, count),
                self._share_samples,
            )
        else:
            index, share = None, self._share_edges
            if params is not None:
                index = magnitude_samples(
                    self._draws(n), self._magnitude(params), count
                )
        if not self.steps.whole:
            share(index, count)
        return count, self._own(params, index)

    def _generator(self):
        """A random generator for this iteration, alike at all parties."""
        return np.random.default_rng([self.seed or 0, self.iterations])

    def _draws(self, n):
        """Uniform numbers between 0 and 1, by which edges become samples."""
        return self._generator().random(n)

    def _magnitude(self, params):
        """Magnitude of the moving image's gradient at all voxels, flat."""
        self.affine_map.set_affine(self._affine(params))
        edges = self.affine_map.transform(self._edges, interpolation="nearest")
        return np.asarray(edges, dtype=np.float64).reshape(-1)

    def _own(self, params, index=None):
        if params is None:
            return None
        values, gradient = self._sampled(params, index)
        steps = np.einsum("lde,lk->kde", self._motion(params), self.basis)
        y = self.positions(index)
        own = linearized(values, gradient, y, steps, self.precision)
        return own._replace(index=index)

    def _affine(self, params):
        affine = self.transform.param_to_matrix(params)
        return affine if self.starting_affine is None else affine @ self.starting_affine

    def _motion(self, params):
        """How the transform moves a point, mm, by its position; (p, dim, dim + 1)."""
        start = np.eye(self.dim + 1)
        if self.starting_affine is not None:
            start = self.starting_affine
        jacobian = linear_jacobian(self.transform, params)
        return jacobian @ start @ self.positions.to_world

    def _sampled(self, params, index=None):
        """Values and gradient, flat, of the moving image at some voxels."""
        points = None
        if index is not None:
            points = (self.positions.to_world @ self.positions(index)).T
            points = np.ascontiguousarray(points)
        values, gradient = self.sample(self._affine(params), points)
        return np.ravel(values), np.reshape(gradient, (-1, self.dim))

    def _static_values(self, index=None):
        if is_remote(self.static):
            return None
        values = self.static.reshape(-1)
        values = values if index is None else values[index]
        return static_numbers(values, self.positions(index))

    # -- in the clear ---------------------------------------------------------

    def _share_static(self):
        self.steps = ClearSteps()
        if not self._resampled:
            self.steps.share_static(None, self._static_values())

    def _share_samples(self, index, count):
        self.steps.share_static(None, self._static_values(index))

    _share_edges = _share_samples


class GaussNewton:
    """Gauss-Newton steps as a method of DIPY's ``AffineRegistration``.

    Parameters
    ----------
    metric : SquaredDifferencesMetric
        the one that the registration uses.

    Examples
    --------
    >>> from dipy.align.imaffine import AffineRegistration
    >>> metric = SquaredDifferencesMetric()
    >>> registration = AffineRegistration(
    ...     metric=metric, method=GaussNewton(metric), level_iters=[12, 6, 3])
    """

    def __init__(self, metric):
        self.metric = metric

    def __call__(self, fun, x0, args=(), *, jac, maxiter, **_):
        """Minimise, as a custom method of ``scipy.optimize.minimize``."""
        metric, params = self.metric, np.asarray(x0, dtype=np.float64)
        metric.begin(params)
        params = minimise(metric.steps, metric, params, maxiter, metric.precision)
        return OptimizeResult(
            x=params,
            fun=metric.distance(params),
            nit=maxiter,
            nfev=maxiter,
            njev=maxiter,
            success=True,
            status=0,
            message="all iterations were made",
        )


class SecureSquaredDifferencesMetric(SquaredDifferencesMetric):
    """Mean of squared differences of two parties' images.

    For a `SecureAffineRegistration`, which takes Gauss-Newton steps: see
    ``dipy_ppir.mpc.leastsquares``, and ``dipy_ppir.mpc.pairsquares`` for two owners
    alone.

    Parameters
    ----------
    sampling, sampling_proportion, seed, precision : optional
        see `SquaredDifferencesMetric`. "GMS" shows the static owner at every iteration
        where the moving image has edges: see ``doc/security.md``. The moving owner
        draws its samples alone.
    session : Session, optional
        this party's session.

    Raises
    ------
    ValueError
        if an argument is out of range.

    Notes
    -----
    What the moving owner learns is each step, rounded. Images are scaled to [0, 1]
    each by itself, as DIPY does; they should have the same contrast. With a helper,
    bytes over all links: ``4 dim`` a sample and iteration, and ``4 (dim + 1)`` for each
    voxel and level, or for each sample and iteration; 4 more with "GMS". Rounds of an
    iteration: 4, one more where it has samples of its own, and two with "GMS". Of two
    owners alone see ``dipy_ppir.mpc.pairsquares``.
    """

    name, title = "SSD", "mean squared difference"
    method = "Gauss-Newton steps"
    reveal, hide_steps = "transform", False

    @warning_for_keywords()
    def __init__(
        self,
        *,
        sampling=None,
        sampling_proportion=None,
        seed=None,
        precision=None,
        session=None,
    ):
        super().__init__(
            sampling=sampling,
            sampling_proportion=sampling_proportion,
            seed=seed,
            precision=precision,
        )
        self.callback = None
        self.join(session)

    def config(self):
        """Public parameters of the metric, JSON-able."""
        own = {name: getattr(self, name) for name in self.names}
        return {"metric": self.name, **own}

    def join(self, session):
        """Make the metric part of `session`, or of none with None."""
        keep_to(session, "affine", self.config())
        self.session, self.iterations = session, 0

    # -- what a registration asks ---------------------------------------------

    def forget(self):
        """Keep nothing for another step of a registration; see `StepsOnShares`."""

    def planned(self, kind, levels, level_iters, *, scale, last, **_):
        """Iterations at each level, coarsest first; see `plan.iterations`."""
        return plan.iterations(kind, levels, level_iters, scale=scale, last=last)

    def steps_of(self, iterations):
        """How many steps so many iterations take."""
        return iterations

    def planned_bits(self, counts, parameters):
        """Most bits that so many iterations open."""
        return sum(counts) * parameters * step_bits(self.precision)

    def minimise(self, params, iterations, level, on_step):
        """Take the steps of a level; see `gaussnewton.minimise`.

        Returns
        -------
        params : array, shape (p,), or None
        value : None
        """
        self.begin(params)
        found = minimise(self.steps, self, params, iterations, self.precision, on_step)
        return found, None

    def final_value(self, affine, _):
        """Show the moving owner the metric at a transform, at the level set up.

        Parameters
        ----------
        affine : array, shape (dim + 1, dim + 1), at the moving owner only
        """
        if self.session.ahead:
            own = self._numbers_at(affine)
            return show_difference(self.session, self.positions.count, *own)
        numbers = secret_numbers(self.session)
        value = self._value(numbers, self._shared_products(), affine)
        shown = numbers.show_value(value.times(SHOWN), 1)
        return None if shown is None else shown / SHOWN

    def mismatched(self, before, after):
        """Whether the images hardly match at a transform, or less than at another.

        Rounds: those of two values, of `SecretNumbers.less` and 2.

        Parameters
        ----------
        before, after : array, shape (dim + 1, dim + 1), at the moving owner only
            the other transform, and the one that is judged.

        Returns
        -------
        bit : SharedArray, shape (1,)
        """
        if self.session.ahead:
            limits = MOST_DIFFERENCE, MOST_GROWTH
            own = self._numbers_at(before, after)
            return mismatch(self.session, self.positions.count, limits, *own)
        numbers, products = secret_numbers(self.session), self._shared_products()
        limits = None
        if self.session.pid == STATIC:
            limits = np.array([MOST_DIFFERENCE, MOST_GROWTH]) * np.var(self.static)
        limits = numbers.own(limits, (2,), owner=STATIC)
        before, after = (self._value(numbers, products, a) for a in (before, after))
        much, more = numbers.less((limits[:1], after), (before + limits[1:], after))
        return numbers.either(much, more)

    def _numbers_at(self, *affines):
        """The static image as integers, and the moving one at some transforms.

        Each at its owner, None elsewhere.
        """
        static = moving = None
        if self.session.pid == STATIC:
            static = _integers(self.static)
        elif self.session.pid == MOVING:
            warped = (self.sample(a, with_gradient=False)[0] for a in affines)
            moving = np.stack([_integers(x) for x in warped])
        return static, moving

    def _shared_products(self):
        """The static image's numbers on shares, for values."""
        products = mean_products(self.session, secret_numbers(self.session).digits)
        numbers = None
        if self.session.pid == STATIC:
            numbers = _integers(self.static)
        products.share_static(self.positions.count, numbers)
        return products

    def _value(self, numbers, products, affine):
        """Mean squared difference, on shares; of images to `VALUE_BITS`."""
        own = {MOVING: None, STATIC: None}
        moving = None
        if self.session.pid == MOVING:
            moving = _integers(self.sample(affine, with_gradient=False)[0])
            own[MOVING] = _mean_square(moving)
        elif self.session.pid == STATIC:
            own[STATIC] = _mean_square(_integers(self.static))
        m, s = (numbers.own(own[pid], (1,), owner=pid) for pid in (MOVING, STATIC))
        return m + s - products.mean(self.positions.count, moving).times(2)

    # -- on shares --------------------------------------------------------------

    def _draws(self, n):
        return secret_draws(n)

    def _share_static(self):
        self.steps = least_squares(
            self.session,
            self.dim,
            step_bits(self.precision),
            self.parameters,
            voxels=self.positions.count,
            samples=self._count,
        )
        self.session.ledger.about(self.positions.count)
        if self.steps.whole or not self._resampled:
            with self.session.phase("static image"):
                self._share(self._static_values(), self.positions.count)

    def _share_samples(self, index, count):
        with self.session.phase("samples"):
            self._share(self._static_values(index), count)

    def _share_edges(self, index, count):
        with self.session.phase("samples"):
            shown = show_samples(self.session, index, count, self.positions.count)
            values = None if shown is None else self._static_values(shown)
            self._share(values, count)

    def _share(self, values, count):
        self.steps.share_static((self.dim + 1, count), values)


def _integers(image):
    return np.rint(np.ravel(image) * 2.0**VALUE_BITS).astype(np.int64)


def _mean_square(integers):
    return np.array([np.mean(integers.astype(np.float64) ** 2) / 4.0**VALUE_BITS])
