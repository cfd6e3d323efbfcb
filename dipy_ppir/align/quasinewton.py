r"""Damped BFGS that takes one evaluation a step and few decisions: made for shares.

An optimizer that runs on secret numbers cannot search along lines or stop when it
likes: every decision that shows is an opening. This one takes a fixed number of steps,
evaluates the metric once for each, and shows of a step only its direction and size,
rounded to a few bits, and whether the metric got better. Nocedal and Wright, Numerical
Optimization (2006), section 6.1 for the update of the inverse Hessian, procedure 18.2
for the damping (here in the inverse form).

What is secret on shares goes through the operations of `ClearNumbers`, so that the
functions say what those of numbers on shares must be. Steps are in coordinates in which
their Euclidean norm is the root mean square displacement of the object in the moving
image, in 64ths of its size (`orthonormal_steps`), so one trust radius serves
translations, rotations and shears alike, and images of brains of mice and men.
"""

from itertools import chain, repeat
from typing import NamedTuple

from dipy.align import vector_fields as vf
import numpy as np
from scipy.optimize import OptimizeResult

from dipy_ppir.align.parzenhist import EPSILON, linear_jacobian

#: Bits of an opened component of a step, without sign, of the step's own size.
STEP_BITS = 3
#: Steps are measured in this part of the object's size: about 1 mm of a human brain,
#: whose points are 65 mm from its centre (root mean square).
SIZE_PART = 1 / 64
#: Least and largest exponent of a step's size: 16 values.
EXPONENTS = -9, 6
#: Metric and gradient are multiplied by this, and no elements of the inverse Hessian
#: are begun with, or added, that are larger than that: so its digits are worth keeping.
SCALE, LARGEST_INVERSE = 2.0**7, 256
#: Least part of the expected curvature along a step that is believed.
DAMPING = 0.2
#: Of the mean diagonal, added to a first curvature.
RIDGE = 0.02
#: Least length of the first step, of the cap.
FIRST = 0.25


class ClearNumbers:
    """Fixed-point numbers in the clear, rounded where numbers on shares are.

    Parameters
    ----------
    frac_bits : int, optional
        fraction bits that are kept.
    """

    def __init__(self, frac_bits=24):
        self.unit = 2.0**-frac_bits

    def fix(self, x):
        """Round to nearest."""
        return np.rint(np.asarray(x) / self.unit) * self.unit

    def product(self, a, b):
        """Elementwise product."""
        return self.fix(a * b)

    def dot(self, a, b):
        """Matrix or inner product."""
        return self.fix(a @ b)

    def quotient(self, a, b):
        """Elementwise quotient by a number that is positive, or else zero."""
        return self.fix(a / np.maximum(b, self.unit))

    def largest(self, *numbers):
        """The largest of several numbers."""
        return np.max(numbers)

    def less(self, a, b):
        """Whether a < b."""
        return a < b

    def select(self, condition, a, b):
        """a where the condition holds, else b."""
        return np.where(condition, a, b)

    def mantissas(self, u, squares):
        """A step's exponent and its rounded components; see `Proposal`.

        A step that is larger than the largest exponent says keeps its direction.
        """
        low, high = EXPONENTS
        exponent = int(np.ceil(np.log2(max(squares, 2.0 ** (2 * low))) / 2))
        k = np.rint(u * 2.0 ** (STEP_BITS - exponent))
        return min(exponent, high), k.astype(int)

    def open(self, bit):
        """Show a bit to the moving owner."""
        return bool(bit)


class State(NamedTuple):
    """What is kept of a minimisation; secret.

    Attributes
    ----------
    value : float
        the metric at the best point so far, times `SCALE`.
    gradient : array, shape (p,)
        there, in the coordinates of steps, times `SCALE`.
    inverse : array, shape (p, p)
        estimate of the inverse Hessian.
    """

    value: float
    gradient: np.ndarray
    inverse: np.ndarray


class Proposal(NamedTuple):
    """A step as it is shown: ``mantissas * 2**(exponent - STEP_BITS)``.

    Attributes
    ----------
    exponent : int
        of 16 values.
    mantissas : array of int, shape (p,)
        each of ``2**(STEP_BITS + 1) + 1`` values.
    """

    exponent: int
    mantissas: np.ndarray


class Trust(NamedTuple):
    """How far a step may go; the moving owner knows it from what it was shown.

    Attributes
    ----------
    radius, cap : float
        now, and ever.
    first : bool
        whether no step has been taken.
    """

    radius: float
    cap: float
    first: bool = True


def opened_bits(p):
    """Bits that a step of p numbers shows, and whether it was better."""
    values = 2 ** (STEP_BITS + 1) + 1
    return p * np.log2(values) + np.log2(EXPONENTS[1] - EXPONENTS[0] + 1) + 1


def propose(numbers, state):
    """The quasi-Newton step, rounded to a few bits of its size, and opened."""
    u = -numbers.dot(state.inverse, state.gradient)
    return Proposal(*numbers.mantissas(u, numbers.dot(u, u)))


def limit(proposal, trust):
    """The step that is taken: within the trust radius, and the first not too short.

    Parameters
    ----------
    proposal : Proposal
    trust : Trust

    Returns
    -------
    step : array, shape (p,)
    cut : bool
        whether it was too long.
    """
    step = proposal.mantissas * 2.0 ** (proposal.exponent - STEP_BITS)
    norm = np.linalg.norm(step)
    least = FIRST * trust.cap if trust.first else 0.0
    if norm > trust.radius:
        return step * (trust.radius / norm), True
    if 0 < norm < least:
        return step * (least / norm), False
    return step, False


def update(numbers, state, step, value, gradient):
    """Take note of the evaluation after a step.

    The curvature along the step goes into the inverse Hessian whether the step is kept
    or not: one that was no good bends the next.

    Parameters
    ----------
    numbers : ClearNumbers
    state : State
        before the step.
    step : array, shape (p,)
        as it was taken.
    value, gradient : float, array
        the metric after it, times `SCALE`.

    Returns
    -------
    state : State
    better : bool
        whether the step is kept; opened.
    """
    n, h = numbers, state.inverse
    y = gradient - state.gradient
    hy = n.dot(h, y)
    expected, found = n.dot(y, hy), n.dot(step, y)
    # Damped: the step is moved towards H y until the curvature along it is at least
    # `DAMPING` of what H expects.
    least = n.product(DAMPING, expected)
    damped = n.less(found, least)
    excess = n.select(damped, expected - found, 1.0)
    theta = n.quotient(n.product(1 - DAMPING, expected), excess)
    theta = n.select(damped, theta, 1.0)
    s = n.product(theta, step) + n.product(1 - theta, hy)
    # Where the gradient hardly changes, no more is added to H than `LARGEST_INVERSE`.
    flat = n.product(1 / LARGEST_INVERSE, n.dot(s, s))
    curvature = n.largest(n.select(damped, least, found), flat)
    # H + v w' + w v' with v = s / s'y, w = (1 + y'Hy / s'y) s / 2 - H y. The curvature
    # by itself has no bounded range; these quotients have.
    v = n.quotient(s, curvature)
    factor = (1 + n.quotient(expected, curvature)) / 2
    w = n.product(factor, s) - hy
    outer = n.product(v[:, None], w[None])
    inverse = h + outer + outer.T
    better = n.open(n.less(value, state.value))
    if better:
        return State(value, gradient, inverse), True
    return state._replace(inverse=inverse), False


def trust_after(trust, step, cut, better):
    """The trust region for the next step.

    Parameters
    ----------
    trust : Trust
        for the last one.
    step : array, shape (p,)
        the last one, as it was taken.
    cut, better : bool
        whether it was too long, and whether it was kept.
    """
    radius = trust.radius
    if not better:
        radius = max(np.linalg.norm(step) / 2, 2.0 ** EXPONENTS[0])
    elif cut:
        radius = min(2 * radius, trust.cap)
    return Trust(radius, trust.cap, first=False)


def object_moments(image, grid2world):
    """Centre and covariance of the object in an image.

    It is where the image is at or above a tenth of its range, of which the 1 % lowest
    and highest intensities are left out.

    Parameters
    ----------
    image : array, shape (S, R, C) or (R, C)
    grid2world : array, shape (dim + 1, dim + 1)
        voxel-to-space transformation, mm.

    Returns
    -------
    center : array, shape (dim,)
        mm.
    covariance : array, shape (dim, dim)
        mm^2.
    """
    low, high = np.percentile(image, [1, 99])
    voxels = np.argwhere(image >= low + 0.1 * (high - low))
    linear, dim = grid2world[:-1, :-1], image.ndim
    center = linear @ voxels.mean(axis=0) + grid2world[:dim, dim]
    # A voxel's own extent, so that an image one voxel thick has some.
    covariance = np.cov(voxels.T, bias=True) + np.eye(dim) / 12
    return center, linear @ covariance @ linear.T


def orthonormal_steps(jacobian, center, covariance):
    r"""Changes of parameters that move an object by `SIZE_PART` of its size.

    Every parameter moves a point by a linear function of its position, so the mean
    square displacement of an object is a quadratic form G of the change, which its
    centre and covariance determine; the columns of the result B are orthogonal in it,
    and each moves the object alike.

    Parameters
    ----------
    jacobian : array, shape (p, dim, dim + 1)
        as made by `linear_jacobian`.
    center, covariance : array
        of the object, as made by `object_moments`.

    Returns
    -------
    basis : array, shape (p, p)
        ``parameters + basis @ step``.
    """
    dim = len(center)
    moments = np.empty((dim + 1, dim + 1))
    moments[:dim, :dim] = covariance + np.outer(center, center)
    moments[dim, :dim] = moments[:dim, dim] = center
    moments[dim, dim] = 1
    form = np.einsum("kde,ef,ldf->kl", jacobian, moments, jacobian)
    # A root that depends on the units of the parameters as they do.
    root = np.linalg.cholesky(form + 1e-12 * np.diag(np.diag(form)))
    return SIZE_PART * np.sqrt(np.trace(covariance)) * np.linalg.inv(root).T


def information_weights(moments_by_bin, marginal, bin_width):
    """What the moving owner knows of the first curvature; see `first_inverse`.

    Parameters
    ----------
    moments_by_bin : array, shape (nbins, p, p)
        sum over the samples whose nearest moving bin it is of the outer products of
        the columns of the gradient, divided by the number of samples.
    marginal : array, shape (nbins,)
        of the moving image.
    bin_width : float

    Returns
    -------
    weights : array, shape (nbins,)
    """
    total = np.trace(moments_by_bin.sum(axis=0))
    traces = np.trace(moments_by_bin, axis1=1, axis2=2)
    return np.divide(
        traces,
        total * marginal * bin_width**2,
        out=np.zeros(len(marginal)),
        where=(marginal > 1e-7) & (total > 0),
    )


def information(numbers, joint, log_ratio, weights):
    r"""Fisher information of the joint histogram, as one number.

    .. math:: \phi = \sum_r a_r \sum_t P(t, r) d(t, r)^2, \quad
              d(t, r) = (w(t, r + 1) - w(t, r - 1)) / 2

    with the logarithms w of P(t, r) / P(r): the mean square of the derivative of
    log P(t | i) by the moving intensity. It needs no sum over samples.

    Parameters
    ----------
    joint, log_ratio : array, shape (nbins, nbins)
        static bins by moving bins.
    weights : array, shape (nbins,)
        as made by `information_weights`.

    Returns
    -------
    phi : float
    """
    slope = np.zeros_like(log_ratio)
    slope[:, 1:-1] = (log_ratio[:, 2:] - log_ratio[:, :-2]) / 2
    by_bin = numbers.product(joint, numbers.product(slope, slope)).sum(axis=0)
    return numbers.dot(by_bin, weights)


def first_inverse(numbers, moments, phi):
    """Inverse of the first estimate of the Hessian, ``SCALE * phi * moments``.

    The moments are made regular by `RIDGE`; phi is no smaller than what keeps the
    inverse within `LARGEST_INVERSE`.

    Parameters
    ----------
    moments : array, shape (p, p)
        sum over the samples of the outer products of the columns of the gradient,
        divided by the number of samples; the moving owner's.
    phi : float
        as made by `information`.

    Returns
    -------
    inverse : array, shape (p, p)
        zero, so that no step is taken, where nothing depends on the parameters.
    """
    p = len(moments)
    ridge = RIDGE * np.trace(moments) / p * np.eye(p)
    if not ridge.any():
        return np.zeros((p, p))
    inverse = np.linalg.inv(moments + ridge) / SCALE
    least = np.abs(inverse).max() / LARGEST_INVERSE
    return numbers.quotient(inverse, numbers.largest(phi, least))


# -- in the clear --------------------------------------------------------------


class DampedBFGS:
    """The optimizer in the clear, for DIPY's own ``AffineRegistration``.

    What it does to numbers in the clear, with the same roundings, is what is to be done
    on shares: the number of evaluations is fixed, and only what `shown` lists would be
    opened.

    Parameters
    ----------
    metric : MutualInformationMetric
        DIPY's, the one that the registration uses; without masks.
    radius : sequence of float, optional
        longest step at each level, coarsest first, in 64ths of the object's size;
        about mm of a human brain. The last one holds for what follows.
    numbers : ClearNumbers, optional

    Raises
    ------
    ValueError
        if the radii cannot be used; in use, if the metric has masks, is not the
        registration's, or finds no number.

    Attributes
    ----------
    shown : list of dict
        for every step its ``exponent``, ``mantissas`` and whether it was ``better``,
        and the ``value`` after it, which would not be shown.

    Notes
    -----
    An object serves one registration. ``level_iters`` are evaluations of the metric. 4
    at the coarsest level for a translation, then 10, 6 and 4 for a rigid transform,
    then 10 and 10 at the two finer levels for an affine one, 44 in all, do what takes
    DIPY's L-BFGS-B some 400.

    Examples
    --------
    >>> from dipy.align.imaffine import AffineRegistration, MutualInformationMetric
    >>> metric = MutualInformationMetric(nbins=32, sampling_proportion=0.1)
    >>> registration = AffineRegistration(
    ...     metric=metric, method=DampedBFGS(metric), level_iters=[10, 6, 4])
    """

    def __init__(self, metric, *, radius=(8.0, 4.0, 2.0), numbers=None):
        radius = np.ravel(radius)
        if not len(radius) or not np.all(np.isfinite(radius) & (radius > 0)):
            raise ValueError(f"radius must be positive numbers, got {radius.tolist()}")
        self.metric = metric
        self.numbers = ClearNumbers() if numbers is None else numbers
        self.shown = []
        self._caps = chain(radius.tolist(), repeat(float(radius[-1])))

    def __call__(self, fun, x0, args=(), *, jac, maxiter, **_):
        """Minimise, as a custom method of ``scipy.optimize.minimize``.

        Parameters
        ----------
        fun, jac : callable
            the metric and its gradient.
        x0 : array, shape (p,)
        args : tuple, optional
        maxiter : int
            evaluations.

        Returns
        -------
        result : OptimizeResult
        """
        metric = self.metric
        if getattr(getattr(fun, "fun", fun), "__self__", metric) is not metric:
            raise ValueError("the registration has another metric than this optimizer")
        if metric.static_mask is not None or metric.moving_mask is not None:
            raise ValueError("this optimizer takes no masks; leave them out")
        n, params = self.numbers, np.asarray(x0, dtype=np.float64)
        cap = next(self._caps)
        trust = Trust(cap, cap)
        jacobian = linear_jacobian(self.metric.transform, params)
        moving = self.metric.moving, self.metric.moving_grid2world
        basis = orthonormal_steps(jacobian, *object_moments(*moving))

        def evaluate(params):
            value = fun(params, *args)
            gradient = basis.T @ jac(params, *args)
            if not (np.isfinite(value) and np.isfinite(gradient).all()):
                raise ValueError(
                    "the metric or its gradient is no finite number; check that the "
                    "images overlap and hold finite numbers that differ"
                )
            return n.fix(value * SCALE), n.fix(gradient * SCALE)

        value, gradient = evaluate(params)
        state = None
        for _ in range(maxiter - 1):
            if state is None:
                inverse = self._first_inverse(params, jacobian, basis)
                state = State(value, gradient, inverse)
            proposal = propose(n, state)
            step, cut = limit(proposal, trust)
            step = n.fix(step)
            trial = params + basis @ step
            value, gradient = evaluate(trial)
            state, better = update(n, state, step, value, gradient)
            trust = trust_after(trust, step, cut, better)
            params = trial if better else params
            shown = {"better": better, "value": float(value) / SCALE}
            self.shown.append({**proposal._asdict(), **shown})
        best = (value if state is None else state.value) / SCALE
        steps = max(maxiter - 1, 0)
        return OptimizeResult(
            x=params,
            fun=best,
            nit=steps,
            nfev=steps + 1,
            njev=steps + 1,
            success=True,
            status=0,
            message="all evaluations were made",
        )

    def _first_inverse(self, params, jacobian, basis):
        histogram = self.metric.histogram
        joint, marginal = histogram.joint, histogram.mmarginal
        known = (joint > EPSILON) & (marginal > EPSILON)
        ratio = np.divide(joint, marginal, out=np.ones_like(joint), where=known)
        moments = self._moments_by_bin(params, jacobian, basis)
        weights = information_weights(moments, marginal, histogram.mdelta)
        phi = information(self.numbers, joint, np.log(ratio), weights)
        return first_inverse(self.numbers, moments.sum(axis=0), phi)

    def _moments_by_bin(self, params, jacobian, basis):
        """Outer products of the gradient's columns, summed by moving bin."""
        values, gradient, points = moving_samples(self.metric, params)
        columns = np.einsum("nd,kde,ne->nk", gradient, jacobian, points, optimize=True)
        columns = columns @ basis
        histogram = self.metric.histogram
        bins = np.rint(values / histogram.mdelta - histogram.mmin).astype(int)
        bins = np.clip(bins, 0, histogram.nbins - 1)
        p = len(params)
        moments = np.zeros((histogram.nbins, p, p))
        for k in range(p):
            for m in range(k + 1):
                product = columns[:, k] * columns[:, m]
                sums = np.bincount(bins, product, histogram.nbins) / len(bins)
                moments[:, k, m] = moments[:, m, k] = sums
        return moments


def moving_samples(metric, params):
    """The moving image where a metric of DIPY's looks it up.

    Parameters
    ----------
    metric : MutualInformationMetric
    params : array, shape (p,)

    Returns
    -------
    values : array, shape (n,)
    gradient : array, shape (n, dim)
        per mm.
    points : array, shape (n, dim + 1)
        where the transform is applied, mm, homogeneous.
    """
    start = np.eye(metric.dim + 1)
    if metric.starting_affine is not None:
        start = metric.starting_affine
    if metric.samples is None:
        grid = np.indices(metric.static.shape).reshape(metric.dim, -1)
        grid = np.vstack([grid, np.ones(grid.shape[1])])
        points = (start @ metric.static_grid2world @ grid).T
    else:
        points = metric.samples @ start.T
    moved = points @ metric.transform.param_to_matrix(params).T
    voxels = (moved @ metric.moving_world2grid.T)[:, : metric.dim]
    values, _ = metric.interp_method(metric.moving, np.ascontiguousarray(voxels))
    gradient, _ = vf.sparse_gradient(
        metric.moving,
        metric.moving_world2grid,
        metric.moving_spacing,
        np.ascontiguousarray(moved[:, : metric.dim]),
    )
    return np.asarray(values), np.asarray(gradient, dtype=np.float64), points
