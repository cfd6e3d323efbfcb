r"""Damped BFGS that takes one evaluation a step and few decisions: made for shares.

An optimizer that runs on secret numbers cannot search along lines or stop when it
likes: every decision that shows is an opening. This one takes a fixed number of steps,
evaluates the metric once for each, and shows of a step only its direction and size,
rounded to a few bits, and whether the metric got better. Nocedal and Wright, Numerical
Optimization (2006), section 6.1 for the update of the inverse Hessian, procedure 18.2
for the damping.

What is secret on shares goes through the operations of `ClearNumbers`, so that the
functions say what those of numbers on shares must be. Steps are in coordinates in which
their Euclidean norm is the root mean square displacement of the object in the moving
image, in 64ths of its size (`orthonormal_steps`), so one trust radius serves
translations, rotations and shears alike, and images of brains of mice and men.
"""

from itertools import chain, repeat, zip_longest
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
#: Metric and gradient are multiplied by this, so that their digits are worth keeping.
SCALE = 2.0**7
#: Where it starts, no element of the inverse Hessian is larger than this, and along no
#: step is the curvature taken to be smaller than its reciprocal.
LARGEST_INVERSE = 2048
#: Least part of the expected curvature along a step that is believed: 1/5.
DAMPING = 0.2
#: Of the mean diagonal, added to a first curvature.
RIDGE = 0.02
#: No step is taken that is longer than so many quasi-Newton steps.
LARGEST_PART = 2**13
#: Least length of the first step, of the cap.
FIRST = 0.25
#: Fraction bits that are kept: of numbers, of inner products, of an information.
DIGITS, FINE_DIGITS, INFORMATION_DIGITS = 24, 28, 28
#: No weight of an information is larger.
LARGEST_WEIGHT = 2.0**30
#: Least weight of a bin, of one sample.
UNIT = 2.0**-12
#: Added to what is divided by.
FLOOR = 2.0**-26
#: Fraction bits of the square of a step's size.
SQUARE_DIGITS = 20
#: Numbers whose highest bit is looked up have no more.
LARGEST_BIT = 64


class ClearNumbers:
    """Fixed-point numbers in the clear, rounded where numbers on shares are.

    Every verb takes several operands, because on shares they cost the rounds of one.

    Parameters
    ----------
    frac_bits : int, optional
        fraction bits that are kept.
    """

    def __init__(self, frac_bits=DIGITS):
        self.lost = DIGITS - frac_bits

    def fix(self, x, digits=DIGITS):
        """Round to nearest."""
        unit = 2.0 ** (self.lost - digits)
        return np.rint(np.asarray(x) / unit) * unit

    def own(self, x, shape, digits=DIGITS, bound=None, owner=None):
        """Numbers that an owner knows."""
        return self.fix(x, digits)

    def dots(self, *pairs, digits=()):
        """Matrix and inner products; digits each has if not `DIGITS`."""
        return [
            self.fix(a @ b, d)
            for (a, b), d in zip_longest(pairs, digits, fillvalue=DIGITS)
        ]

    def times(self, *pairs, bounds=None):
        """Elementwise products, and a public bound on each."""
        return [self.fix(a * b) for a, b in pairs]

    def outer(self, a, b):
        """Half of the outer products, ``(a b' + b a') / 2``."""
        product = self.fix(a[:, None] * b[None] / 2)
        return product + product.T

    def gates(self, *pairs):
        """Products with bits, exact."""
        return [bit * x for bit, x in pairs]

    def complement(self, x):
        """1 - x."""
        return 1 - x

    def raised(self, x):
        """1 + x."""
        return 1 + x

    def inverses(self, *numbers, digits=DIGITS):
        """Reciprocals of numbers that are positive, or nearly zero."""
        return [self.fix(1 / np.maximum(x + FLOOR, FLOOR), digits) for x in numbers]

    def less(self, *pairs):
        """For each pair whether the first is less."""
        return [np.asarray(a < b).astype(float) for a, b in pairs]

    def show_step(self, u):
        """Show the moving owner a step's exponent and its rounded components.

        A step that is larger than the largest exponent says keeps its direction. The
        exponent may be larger by one than it had to be.
        """
        low, high = EXPONENTS
        exponent = int(np.ceil(np.log2(max(u @ u, 2.0 ** (2 * low))) / 2))
        k = np.rint(u * 2.0 ** (STEP_BITS - exponent))
        return min(exponent, high), k.astype(int)

    def show_better(self, bit):
        """Show the moving owner a bit."""
        return bool(bit)

    def limited(self, ascent, parts, directions):
        """A part of the quasi-Newton step, by its size; nothing is shown.

        Where a step is cut shorter, it is taken for the usual part of a quasi-Newton
        step that is as short: so much larger the curvature is expected to be along it.
        Otherwise one that stays short would multiply the inverse Hessian, time after
        time, where the metric is not convex.

        Parameters
        ----------
        ascent : array, shape (p,)
            the step is against it.
        parts : list of float
            public; see `parts_by_size`; the first is that of a step that is not cut.
        directions : array, shape (p, ...)
            public; what a step does.

        Returns
        -------
        vector, tilt, part, back : array
            see `Taken`.
        motion : array, shape (...)
            the sum of `directions`, times the step's components.
        """
        square = int((ascent @ ascent) * 2.0**SQUARE_DIGITS) + 1
        c = parts[square.bit_length() - 1]
        vector = -c * ascent
        whole = vector, vector / LARGEST_INVERSE, parts[:1], -parts[0] * vector
        motion = np.tensordot(vector, directions, 1)
        return *(self.fix(x) for x in whole), self.fix(motion)

    def moved(self, matrix, motion):
        """A matrix and a small motion before it: ``matrix @ exp(motion)``.

        To second order. Both have a row less than what they stand for: the last one is
        that of the identity, and of zeros.
        """
        first = self.fix(matrix[:, :-1] @ motion)
        return matrix + first + self.fix(first[:, :-1] @ motion / 2)

    def mean(self, arrays):
        """Of a power of two of them."""
        return self.fix(sum(arrays) / len(arrays))


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


class Step(NamedTuple):
    """A step as it is taken; the moving owner's.

    Attributes
    ----------
    vector : array, shape (p,)
    part : float
        of the quasi-Newton step: less than 1 where that was too long.
    """

    vector: np.ndarray
    part: float


class Taken(NamedTuple):
    """A step as the update of the inverse Hessian wants it; secret.

    Attributes
    ----------
    vector : array, shape (p,)
    tilt : array, shape (p,)
        the same divided by `LARGEST_INVERSE`.
    part : array, shape (1,)
        of the quasi-Newton step.
    back : array, shape (p,)
        minus `part` times `vector`.
    """

    vector: np.ndarray
    tilt: np.ndarray
    part: np.ndarray
    back: np.ndarray


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
    """The quasi-Newton step, rounded to a few bits of its size, and opened.

    Returns
    -------
    proposal : Proposal
    ascent : array, shape (p,)
        the inverse Hessian times the gradient; secret.
    """
    (ascent,) = numbers.dots((state.inverse, state.gradient))
    return Proposal(*numbers.show_step(-ascent)), ascent


def limit(proposal, trust):
    """The step that is taken: within the trust radius, and the first not too short.

    Parameters
    ----------
    proposal : Proposal
    trust : Trust

    Returns
    -------
    step : Step
    """
    vector = proposal.mantissas * 2.0 ** (proposal.exponent - STEP_BITS)
    norm = np.linalg.norm(vector)
    least = FIRST * trust.cap if trust.first else 0.0
    part = 1.0
    if norm > trust.radius:
        part = trust.radius / norm
    elif 0 < norm < least:
        part = least / norm
    return Step(part * vector, part)


def given_step(numbers, step, p):
    """A step that the moving owner knows, on shares.

    Parameters
    ----------
    numbers : ClearNumbers
    step : Step, at the moving owner only
    p : int

    Returns
    -------
    taken : Taken
    """
    vector, part = step or (None, None)
    known = step is not None
    return Taken(
        numbers.own(vector, (p,)),
        numbers.own(vector / LARGEST_INVERSE if known else None, (p,)),
        numbers.own(np.array([part]) if known else None, (1,), bound=LARGEST_PART),
        numbers.own(-part * vector if known else None, (p,)),
    )


def update(numbers, state, taken, ascent, value, gradient, *, choose=True):
    """Take note of the evaluation after a step.

    The curvature along the step goes into the inverse Hessian whether the step is kept
    or not: one that was no good bends the next.

    Parameters
    ----------
    numbers : ClearNumbers
    state : State
        before the step.
    taken : Taken
        the step as it was taken.
    ascent : array, shape (p,)
        the inverse Hessian times the gradient.
    value, gradient : float, array
        the metric after it, times `SCALE`.
    choose : bool, optional
        whether the step is kept only if it was better, which is opened.

    Returns
    -------
    state : State
    better : bool, or None without `choose`
        whether the step is kept; opened.
    """
    n, before = numbers, state.gradient
    s, tilt, c, back = taken
    # The least curvature, along every step.
    y = gradient - before + tilt
    # B s, with the Hessian B: s is a part c of the step -B^-1 g, but for rounding; or
    # what B s would be if it were.
    found, expected, hy, cg, ch = n.dots(
        (s, y),
        (back, before),
        (state.inverse, y),
        (before.reshape(-1, 1), c),
        (ascent.reshape(-1, 1), c),
        digits=(FINE_DIGITS,) * 2,
    )
    pairs, changes, shown = [(5 * found, expected)], [], None
    if choose:
        pairs.append((value, state.value))
    damped, *better = n.less(*pairs)
    if choose:
        shown = n.show_better(*better)
        changes = [(*better, value - state.value), (*better, gradient - before)]
    y_back, hy_back, less, missing, *changes = n.gates(
        (damped, -cg - y),
        (damped, -ch - hy),
        (damped, 5 * found),
        (damped, expected - 5 * found),
        *changes,
    )
    if choose:
        value, gradient = state.value + changes[0], before + changes[1]
    # Damped: y is moved towards B s until the curvature along the step is a fifth of
    # what B expects, by 1 - theta with theta = 4/5 expected / (expected - found).
    excess, curvature = n.inverses(5 * expected - less, 5 * found + missing)
    (theta,) = n.times((4 * expected, excess), bounds=(1,))
    rest = n.complement(theta)
    y_back, hy_back = n.times((rest, y_back), (rest, hy_back))
    y, hy = y + y_back, hy + hy_back
    (whole,) = n.dots((y, hy), digits=(FINE_DIGITS,))
    (ratio,) = n.times((5 * whole, curvature))
    # H + v w' + w v' with v = s / s'y, w = (1 + y'Hy / s'y) s / 2 - H y.
    v, w = n.times((s, 5 * curvature), (n.raised(ratio), s))
    inverse = state.inverse + n.outer(v, w - 2 * hy)
    return State(value, gradient, inverse), shown


def keep_better(numbers, state, value):
    """Of the last evaluation, the value only, and whether its step is kept.

    Returns
    -------
    value : float
        the smaller one; secret.
    better : bool
        opened.
    """
    (better,) = numbers.less((value, state.value))
    (gained,) = numbers.gates((better, value - state.value))
    return state.value + gained, numbers.show_better(better)


def trust_after(trust, step, better):
    """The trust region for the next step.

    Parameters
    ----------
    trust : Trust
        for the last one.
    step : Step
        the last one.
    better : bool
        whether it was kept.
    """
    radius = trust.radius
    if not better:
        radius = max(np.linalg.norm(step.vector) / 2, 2.0 ** EXPONENTS[0])
    elif step.part < 1:
        radius = min(2 * radius, trust.cap)
    return Trust(radius, trust.cap, first=False)


def parts_by_size(longest, part):
    """What part of a step is taken, by the highest bit of its size's square.

    Parameters
    ----------
    longest : float
        what it is cut to, with a size that is known to a factor of a root of two.
    part : float
        of what is left.

    Returns
    -------
    parts : list of float
        for the square in units of ``2**-SQUARE_DIGITS``.
    """
    squares = (2.0 ** (k + 1 - SQUARE_DIGITS) for k in range(LARGEST_BIT))
    return [part * min(1.0, longest / np.sqrt(square)) for square in squares]


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


def orthonormal_steps(jacobian, center, covariance, length=None):
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
    length : float, optional
        by how much instead, mm; root mean square.

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
    if length is None:
        length = SIZE_PART * np.sqrt(np.trace(covariance))
    return length * np.linalg.inv(root).T


def bin_weights(moments_by_bin, bin_width):
    """What the moving owner knows of the first curvature; see `information`.

    Parameters
    ----------
    moments_by_bin : array, shape (nbins, p, p)
        sum over the samples whose nearest moving bin it is of the outer products of
        the columns of the gradient, divided by the number of samples.
    bin_width : float

    Returns
    -------
    weights : array, shape (nbins,)
    """
    traces = np.trace(moments_by_bin, axis1=1, axis2=2)
    total = traces.sum()
    return traces / (total * bin_width**2) if total > 0 else np.zeros(len(traces))


def mean_slopes(joint, unit=0.0):
    r"""Mean square derivative of the log-likelihood, for every moving bin.

    .. math:: c_r = \frac{1}{P(r)} \sum_t P(t, r) d(t, r)^2, \quad
              d(t, r) = (w(t, r + 1) - w(t, r - 1)) / 2

    with the logarithms w of P(t, r) / P(r). It needs no sum over samples.

    Parameters
    ----------
    joint : array, shape (nbins, nbins)
        static bins by moving bins.
    unit : float, optional
        added to every probability, so that none is zero.

    Returns
    -------
    slopes : array, shape (nbins,)
    """
    joint = joint + max(unit, EPSILON)
    marginal = joint.sum(axis=0)
    w, slope = np.log(joint / marginal), np.zeros_like(joint)
    slope[:, 1:-1] = (w[:, 2:] - w[:, :-2]) / 2
    return (joint * slope**2).sum(axis=0) / marginal


def first_inverse(numbers, inverse, weights, slopes, p):
    r"""Inverse of the first estimate of the Hessian, ``SCALE * phi * moments``.

    .. math:: \phi = \sum_r a_r c_r

    is the Fisher information of the joint histogram as one number.

    Parameters
    ----------
    numbers : ClearNumbers
    inverse, weights : array, shape (p, p) and (nbins,)
        as made by `regular_inverse`; the moving owner's.
    slopes : array, shape (nbins,)
        c_r, as made by `mean_slopes`; secret.
    p : int

    Returns
    -------
    inverse : array, shape (p, p)
    """
    weights = numbers.own(
        weights, slopes.shape, INFORMATION_DIGITS // 2, LARGEST_WEIGHT
    )
    inverse = numbers.own(inverse, (p, p))
    (phi,) = numbers.dots((weights, slopes), digits=(INFORMATION_DIGITS,))
    (part,) = numbers.inverses(numbers.raised(phi), digits=FINE_DIGITS)
    return numbers.times((inverse, part))[0]


def regular_inverse(moments_by_bin, bin_width):
    """What the moving owner knows of the first estimate; see `first_inverse`.

    The moments are made regular by `RIDGE`. Both results are scaled by one number such
    that the inverse within `LARGEST_INVERSE` is what an information of zero gives.

    Parameters
    ----------
    moments_by_bin : array, shape (nbins, p, p)
        as made by `bin_moments`.
    bin_width : float

    Returns
    -------
    inverse : array, shape (p, p)
        zero, so that no step is taken, where nothing depends on the parameters.
    weights : array, shape (nbins,)
    """
    nbins, p, _ = moments_by_bin.shape
    weights = bin_weights(moments_by_bin, bin_width)
    moments = moments_by_bin.sum(axis=0)
    ridge = RIDGE * np.trace(moments) / p * np.eye(p)
    if not ridge.any():
        return np.zeros((p, p)), np.zeros(nbins)
    inverse = np.linalg.inv(moments + ridge) / SCALE
    least = np.abs(inverse).max() / LARGEST_INVERSE
    return inverse / least, np.minimum(weights / least, LARGEST_WEIGHT)


def bin_moments(columns, values, histogram):
    """Outer products of the gradient's columns, summed by moving bin.

    Parameters
    ----------
    columns : array, shape (n, p)
    values : array, shape (n,)
        moving intensities.
    histogram : ParzenJointHistogram

    Returns
    -------
    moments : array, shape (nbins, p, p)
        divided by n.
    """
    nbins, p = histogram.nbins, columns.shape[1]
    bins = np.rint(values / histogram.mdelta - histogram.mmin).astype(int)
    bins = np.clip(bins, 0, nbins - 1)
    moments = np.empty((nbins, p, p))
    for k in range(p):
        for m in range(k + 1):
            sums = np.bincount(bins, columns[:, k] * columns[:, m], nbins)
            moments[:, k, m] = moments[:, m, k] = sums / len(bins)
    return moments


def minimise(numbers, metric, params, evaluations, cap, on_step=None):
    """Minimise a metric by a fixed number of evaluations.

    Every party runs this; what is secret goes through `numbers`.

    Parameters
    ----------
    numbers : ClearNumbers
    metric : object
        ``evaluate(params)`` returns value and gradient, in the coordinates of steps,
        times `SCALE`; ``first_inverse(numbers)`` what to begin with, after an
        evaluation; ``basis`` are the steps (`orthonormal_steps`), at the moving owner.
    params : array, shape (p,), or None
        where to start; only the moving owner knows it.
    evaluations : int
    cap : float
        longest step.
    on_step : callable, optional
        called after each with the proposal, whether it was better, and the value.

    Returns
    -------
    params : array, shape (p,), or None
        the best found.
    value : float
        there, times `SCALE`; secret.
    """
    value, gradient = metric.evaluate(params)
    state, trust, step = None, Trust(cap, cap), None
    for left in range(evaluations - 2, -1, -1):
        if state is None:
            state = State(value, gradient, metric.first_inverse(numbers))
        proposal, ascent = propose(numbers, state)
        trial = None
        if params is not None:
            step = limit(proposal, trust)
            trial = params + metric.basis @ step.vector
        value, gradient = metric.evaluate(trial)
        if left:
            taken = given_step(numbers, step, *gradient.shape)
            state, better = update(numbers, state, taken, ascent, value, gradient)
        else:
            best, better = keep_better(numbers, state, value)
        if params is not None:
            trust = trust_after(trust, step, better)
            params = trial if better else params
        if on_step is not None:
            on_step(proposal, better, value)
    return params, value if state is None else best


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

    Attributes
    ----------
    shown : list of dict
        for every step its ``exponent``, ``mantissas`` and whether it was ``better``,
        and the ``value`` after it, which would not be shown.

    Raises
    ------
    ValueError
        if the radii cannot be used; in use, if the metric has masks, is not the
        registration's, or finds no number.

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
        params = np.asarray(x0, dtype=np.float64)

        def on_step(proposal, better, value):
            shown = {"better": better, "value": float(value) / SCALE}
            self.shown.append({**proposal._asdict(), **shown})

        on_shares = _ClearMetric(metric, self.numbers, params, lambda x: fun(x, *args))
        params, best = minimise(
            self.numbers, on_shares, params, maxiter, next(self._caps), on_step
        )
        steps = max(maxiter - 1, 0)
        return OptimizeResult(
            x=params,
            fun=float(best) / SCALE,
            nit=steps,
            nfev=steps + 1,
            njev=steps + 1,
            success=True,
            status=0,
            message="all evaluations were made",
        )


class _ClearMetric:
    """A metric of DIPY's as `minimise` wants it, with the gradient that is on shares.

    That takes differences of the logarithms of neighbouring bins, weighed by the Parzen
    weights, for derivatives of the weights, weighed by the logarithms.
    """

    def __init__(self, metric, numbers, params, function):
        self.metric, self.numbers, self.function = metric, numbers, function
        jacobian = linear_jacobian(metric.transform, params)
        moments = object_moments(metric.moving, metric.moving_grid2world)
        self.basis = orthonormal_steps(jacobian, *moments)
        static = metric.static if metric.samples is None else metric.static_vals
        histogram = metric.histogram
        bins = np.ravel(static) / histogram.sdelta - histogram.smin
        last = histogram.nbins - histogram.padding - 1
        self._static_bins = np.clip(bins.astype(int), histogram.padding, last)

    def evaluate(self, params):
        value, self._samples = (
            self.function(params),
            moving_samples(self.metric, params),
        )
        self._jacobian = linear_jacobian(self.metric.transform, params)
        values, gradient, points = self._samples
        scores = self._scores(values)
        sums = np.einsum("n,nd,ne->de", scores, gradient, points, optimize=True)
        gradient = np.einsum("kde,de->k", self._jacobian, sums)
        gradient = self.basis.T @ gradient
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            raise ValueError(
                "the metric or its gradient is no finite number; check that the "
                "images overlap and hold finite numbers that differ"
            )
        fix = self.numbers.fix
        return fix(value * SCALE), fix(gradient * SCALE)

    def _scores(self, values):
        """Derivative of the metric by each sample's moving intensity."""
        histogram = self.metric.histogram
        joint = histogram.joint + UNIT / len(values)
        w, differences = np.log(joint / joint.sum(axis=0)), np.empty_like(joint)
        differences[:, 1:-1] = (w[:, 2:] - w[:, :-2]) / 2
        differences[:, 0] = w[:, 1] - w[:, 0]
        differences[:, -1] = w[:, -1] - w[:, -2]
        places = values / histogram.mdelta - histogram.mmin
        pad, last = histogram.padding, histogram.nbins - histogram.padding - 1
        nearest = np.clip(places.astype(int), pad, last)
        scores = np.zeros(len(values))
        for offset in range(-2, 3):
            at = nearest + offset
            size = np.abs(at - places)
            weight = np.where(
                size < 1,
                2 / 3 - size**2 + size**3 / 2,
                np.maximum(2 - size, 0) ** 3 / 6,
            )
            scores -= weight * differences[self._static_bins, at]
        return scores / (histogram.mdelta * len(values))

    def first_inverse(self, numbers):
        histogram = self.metric.histogram
        values, gradient, points = self._samples
        columns = np.einsum(
            "nd,kde,ne->nk", gradient, self._jacobian, points, optimize=True
        )
        moments = bin_moments(columns @ self.basis, values, histogram)
        mine = regular_inverse(moments, histogram.mdelta)
        slopes = mean_slopes(histogram.joint, UNIT / len(values))
        return first_inverse(numbers, *mine, slopes, columns.shape[1])


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
