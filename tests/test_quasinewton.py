"""The optimizer that is made for shares, in the clear."""

from dipy.align.imaffine import (
    AffineRegistration,
    MutualInformationMetric,
    transform_centers_of_mass,
)
from dipy.align.transforms import regtransforms
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from dipy_ppir.align import quasinewton as module
from dipy_ppir.align.parzenhist import linear_jacobian
from dipy_ppir.align.quasinewton import (
    EXPONENTS,
    STEP_BITS,
    ClearNumbers,
    DampedBFGS,
    State,
    Step,
    Trust,
    bin_moments,
    bin_weights,
    first_inverse,
    given_step,
    limit,
    mean_slopes,
    minimise,
    moving_samples,
    object_moments,
    opened_bits,
    orthonormal_steps,
    propose,
    regular_inverse,
    trust_after,
    update,
)

FINE = ClearNumbers(48)
UNIT = 2.0**-module.DIGITS


def state(gradient, inverse=None, value=0.0):
    gradient = np.asarray(gradient, dtype=float)
    return State(value, gradient, np.eye(len(gradient)) if inverse is None else inverse)


# -- steps -------------------------------------------------------------------


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    st.integers(EXPONENTS[0] - 3, EXPONENTS[1] + 3),
)
def test_a_step_is_shown_to_a_few_bits_of_its_size(direction, exponent):
    u = np.array(direction) * 2.0**exponent
    (exponent, mantissas), ascent = propose(FINE, state(-u))
    assert_array_equal(ascent, -FINE.fix(u))
    assert EXPONENTS[0] <= exponent <= EXPONENTS[1]
    assert np.abs(mantissas).max() <= 2**STEP_BITS
    size = np.linalg.norm(u)
    if 2.0 ** EXPONENTS[0] < size <= 2.0 ** EXPONENTS[1]:
        # Its size lies between half of the power of two and that; half a unit is lost.
        assert 2.0**exponent / 2 < size * (1 + 1e-9)
        assert size <= 2.0**exponent * (1 + 1e-9)
        lost = np.abs(mantissas * 2.0 ** (exponent - STEP_BITS) - u).max()
        assert lost <= 2.0 ** (exponent - STEP_BITS) * (0.5 + 1e-9)


def test_no_gradient_is_no_step():
    zeros = np.zeros(6)
    proposal, ascent = propose(ClearNumbers(), state(zeros))
    assert_array_equal(proposal.mantissas, 0)
    step = limit(proposal, Trust(8.0, 8.0))
    assert_array_equal(step.vector, 0)
    assert step.part == 1
    after, better = update(
        ClearNumbers(),
        state(zeros),
        given_step(ClearNumbers(), step, 6),
        ascent,
        0.0,
        zeros,
    )
    assert np.isfinite(after.inverse).all()
    assert not better


@pytest.mark.parametrize(
    ("size", "first", "length", "was_cut"),
    [(4, False, 4, False), (32, False, 8, True), (0.5, True, 2, False)],
)
def test_steps_keep_within_the_trust_radius(size, first, length, was_cut):
    """The first one is not too short either, to learn of the curvature."""
    exponent = int(np.log2(size))
    proposal = module.Proposal(exponent, np.array([0, 2**STEP_BITS, 0]))
    step = limit(proposal, Trust(8.0, 8.0, first))
    assert_allclose(step.vector, [0, length, 0])
    assert step.part == length / size
    assert (step.part < 1) == was_cut


def test_the_trust_radius_follows_the_steps():
    trust, whole = Trust(2.0, 8.0), Step(np.array([2.0, 0]), 1.0)
    cut = whole._replace(part=0.5)
    assert trust_after(trust, cut, True) == Trust(4.0, 8.0, False)
    assert trust_after(Trust(6.0, 8.0), cut, True).radius == 8.0
    assert trust_after(trust, whole, True).radius == 2.0
    assert trust_after(trust, whole, False).radius == 1.0


def test_bits_of_a_step():
    """12 numbers of 17 values, one of 16, and a bit."""
    assert opened_bits(12) == pytest.approx(12 * np.log2(17) + 5)
    plan = {3: 3, 6: 9 + 5 + 3, 12: 9 + 9}
    assert sum(n * opened_bits(p) for p, n in plan.items()) < 1600


# -- curvature ---------------------------------------------------------------


def textbook(h, s, y):
    """Nocedal and Wright, equation 6.17."""
    rho, one = 1 / (s @ y), np.eye(len(s))
    left = one - rho * np.outer(s, y)
    return left @ h @ left.T + rho * np.outer(s, s)


def curved(seed, p):
    """A positive definite matrix, a step, and two gradients."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((p, p))
    return a @ a.T / p + np.eye(p), *rng.standard_normal((3, p))


def updated(h, s, g, change, *, value=0.0, part=1.0, numbers=FINE):
    """After a step that is a part of the quasi-Newton step, as h and g are given."""
    step = Step(s, part)
    taken = given_step(numbers, step, len(g))
    return update(numbers, state(g, h), taken, h @ g, value, g + change)


def damped(h, s, g, change, part=1.0):
    """The change of the gradient by Nocedal and Wright, procedure 18.2."""
    change = change + s / module.LARGEST_INVERSE
    expected = -part * s @ g
    if s @ change < module.DAMPING * expected:
        theta = (1 - module.DAMPING) * expected / (expected - s @ change)
        change = theta * change - (1 - theta) * part * g
    return change


@pytest.mark.parametrize("p", [1, 3, 6, 12])
def test_update_is_the_textbooks(p):
    h, _, g, _ = curved(p, p)
    s, hessian = -h @ g, 1.5 * np.linalg.inv(h)  # not damped
    after, better = updated(h, s, g, hessian @ s, value=-1.0)
    assert better
    y = hessian @ s + s / module.LARGEST_INVERSE
    assert_allclose(damped(h, s, g, hessian @ s), y)
    assert_allclose(after.inverse, textbook(h, s, y), rtol=1e-6, atol=1e-7)
    assert_allclose(after.inverse @ y, s, rtol=1e-6, atol=1e-7)


@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 3, 6, 12]),
    st.floats(0.1, 4),
    st.booleans(),
)
def test_the_estimate_stays_positive_definite(seed, p, part, rounded):
    """Also along steps of negative curvature, which are damped."""
    h, _, g, change = curved(seed, p)
    u = -h @ g
    s = part * u
    if rounded:
        s = part * np.rint(u * 8 / np.abs(u).max()) / 8 * np.abs(u).max()
    after, _ = updated(h, s, g, change, part=part)
    assert_allclose(after.inverse, after.inverse.T, atol=1e-9)
    y = damped(h, s, g, change, part)
    # Rounded steps go down as well, but where all of a step is lost.
    if -s @ g > 0.1 * part * (g @ h @ g):
        assert np.linalg.eigvalsh(after.inverse).min() > 0
        # What is divided by has a floor added.
        rtol = 1e-4 + 2 * module.FLOOR / (s @ y)
        assert_allclose(after.inverse, textbook(h, s, y), rtol=rtol, atol=1e-4)


def test_where_the_metric_curves_downwards_steps_get_longer():
    """Far from the optimum; at most five times."""
    h, g = np.eye(1), np.array([1.0])
    s = -h @ g
    for change in (0.5, 0.0, -0.1):
        after, _ = updated(h, s, g, np.array([change]))
        assert after.inverse[0, 0] == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize("change", [0.0, 2.0**-20, -(2.0**-10), 2.0**-10])
def test_a_flat_metric_does_not_blow_up_the_estimate(change):
    h, g = np.eye(6), np.zeros(6)
    step, y = np.full(6, 4.0), np.full(6, change)
    after, _ = updated(h, step, g, y, numbers=ClearNumbers())
    assert np.abs(after.inverse).max() <= 1.1 * module.LARGEST_INVERSE
    assert np.linalg.eigvalsh(after.inverse).min() > 0 or change < 0


def test_a_step_beyond_all_exponents_keeps_its_direction():
    """Where the inverse is large in one direction, each component by itself is not
    what goes down."""
    inverse = 100 * np.array([[100.0, 9.0], [9.0, 1.0]])
    gradient = np.array([1.0, -5.0])
    (exponent, mantissas), _ = propose(FINE, state(gradient, inverse))
    assert exponent == EXPONENTS[1]
    assert gradient @ mantissas < 0


def test_a_step_that_was_no_good_bends_the_next():
    h, _, g, change = curved(1, 6)
    after, better = updated(h, -h @ g, g, change, value=1.0)
    assert not better
    assert after.value == 0
    assert_array_equal(after.gradient, g)
    assert np.abs(after.inverse - h).max() > 1e-3


class Function:
    """A function that returns value and gradient, as `minimise` wants a metric."""

    def __init__(self, function, p):
        self.evaluate, self.basis = function, np.eye(p)

    def first_inverse(self, numbers):
        return np.eye(len(self.basis))


def found(function, x, evaluations):
    """Minimum, its value, and how often a step was better."""
    good = []
    x, value = minimise(
        ClearNumbers(),
        Function(function, len(x)),
        x,
        evaluations,
        4.0,
        lambda proposal, better, value: good.append(better),
    )
    assert len(good) == evaluations - 1
    return x, value, sum(good)


@pytest.mark.parametrize("p", [2, 6, 12])
def test_a_quadratic_function(p):
    rng = np.random.default_rng(p)
    q, _ = np.linalg.qr(rng.standard_normal((p, p)))
    hessian = q * np.geomspace(0.1, 10, p) @ q.T
    best = rng.uniform(-3, 3, p)

    def function(x):
        return (x - best) @ hessian @ (x - best) / 2, hessian @ (x - best)

    start = function(np.zeros(p))[0]
    x, value, _ = found(function, np.zeros(p), 4 * p + 20)
    assert value < 1e-3 * start
    assert_allclose(x, best, atol=0.3)


def test_a_curved_valley():
    """Rosenbrock's function, the two coordinates scaled to be alike."""

    def function(x):
        a, b = x[0] / 2, x[1] / 2
        value = (1 - a) ** 2 + 10 * (b - a * a) ** 2
        slope = [-2 * (1 - a) - 40 * a * (b - a * a), 20 * (b - a * a)]
        return value, np.array(slope) / 2

    x, value, good = found(function, np.array([-2.0, 2.0]), 60)
    assert value < 1e-2
    assert_allclose(x, [2, 2], atol=0.3)
    assert good < 59, "no step was ever refused: the test shows too little"


# -- coordinates -------------------------------------------------------------


@pytest.mark.parametrize("name", regtransforms, ids=lambda n: f"{n[0]}{n[1]}")
def test_a_unit_step_moves_the_object_by_a_part_of_its_size(name):
    transform, dim = regtransforms[name], name[1]
    rng = np.random.default_rng(5)
    points = rng.standard_normal((500, dim)) @ rng.uniform(-20, 20, (dim, dim)) + 70
    center, covariance = points.mean(axis=0), np.cov(points.T, bias=True)
    params = transform.get_identity_parameters()
    basis = orthonormal_steps(linear_jacobian(transform, params), center, covariance)
    points = np.column_stack([points, np.ones(len(points))])

    def displacements(step):
        moved = transform.param_to_matrix(params + basis @ step) @ points.T
        return ((moved.T - points) * 1e4)[:, :dim].reshape(-1)

    columns = np.array([displacements(1e-4 * e) for e in np.eye(len(params))])
    form = columns @ columns.T / len(points)
    unit = module.SIZE_PART * np.sqrt(np.trace(covariance))
    assert_allclose(form, unit**2 * np.eye(len(params)), atol=2e-3 * unit**2)


@pytest.mark.parametrize("dim", [2, 3])
def test_where_the_object_is(dim):
    shape = (40, 50, 30)[:dim]
    at = np.moveaxis(np.indices(shape), 0, -1) - np.array([20, 30, 15])[:dim]
    axes = np.array([10, 14, 8])[:dim]
    image = ((at / axes) ** 2).sum(axis=-1) <= 1
    image = image * 900.0 - 1000
    image.reshape(-1)[:3] = 30_000  # metal
    grid2world = np.diag([2.0, 1.0, 3.0][:dim] + [1.0])
    grid2world[:dim, dim] = 7
    center, covariance = object_moments(image, grid2world)
    zooms = np.diag(grid2world)[:dim]
    # The metal is taken for a part of it.
    assert_allclose(center, np.array([20, 30, 15])[:dim] * zooms + 7, atol=0.3)
    # Of an ellipsoid the variance along an axis is a (dim + 2)th of its square.
    expected = (axes * zooms) ** 2 / (dim + 2)
    assert_allclose(np.diag(covariance), expected, rtol=0.15)


def test_an_image_one_voxel_thick_has_an_extent():
    image = np.zeros((20, 20, 1))
    image[5:15, 6:14] = 1
    _, covariance = object_moments(image, np.eye(4))
    assert np.linalg.eigvalsh(covariance).min() > 0.05


# -- the first estimate ------------------------------------------------------


@pytest.fixture
def evaluated(bodies):
    """A metric of DIPY's after an evaluation with gradient, and where."""

    def make(dim, proportion=None, kind="AFFINE"):
        static, moving, static_grid2world, moving_grid2world = bodies(dim)
        metric = MutualInformationMetric(nbins=24, sampling_proportion=proportion)
        transform = regtransforms[kind, dim]
        start = np.eye(dim + 1)
        start[:dim, dim] = 0.3
        metric.setup(
            transform,
            static,
            moving,
            static_grid2world=static_grid2world,
            moving_grid2world=moving_grid2world,
            starting_affine=start,
        )
        params = transform.get_identity_parameters() + 0.01
        metric.distance_and_gradient(params)
        return metric, params

    return make


@pytest.mark.parametrize("proportion", [None, 0.3])
@pytest.mark.parametrize("dim", [2, 3])
def test_samples_are_dipys(evaluated, dim, proportion):
    """Their histogram of moving bins is the one that the metric found."""
    metric, params = evaluated(dim, proportion)
    values, gradient, points = moving_samples(metric, params)
    assert gradient.shape == (len(values), dim)
    histogram = metric.histogram
    places = values / histogram.mdelta - histogram.mmin
    mean = (histogram.mmarginal * np.arange(histogram.nbins)).sum()
    # A spline's mean is its centre.
    assert_allclose(places.mean(), mean, rtol=1e-6)
    # The metric's gradient is the sum of the columns times the scores (eq. 9).
    jacobian = linear_jacobian(metric.transform, params)
    columns = np.einsum("nd,kde,ne->nk", gradient, jacobian, points)
    static = metric.static.reshape(-1) if proportion is None else metric.static_vals
    normalized = map(histogram.bin_normalize_static, static)
    rows = np.array([histogram.bin_index(v) for v in normalized])
    joint, marginal = histogram.joint, histogram.mmarginal
    known = (joint > 0) & (marginal > 0)
    log_ratio = np.log(np.divide(joint, marginal, out=np.ones_like(joint), where=known))
    scores = np.zeros(len(values))
    for offset in range(-2, 3):
        at = np.clip(places.astype(int), 2, histogram.nbins - 3) + offset
        away = at - places
        size = np.abs(away)
        slope = np.where(size < 1, 1.5 * size**2 - 2 * size, -((2 - size) ** 2) / 2)
        slope = np.where(size < 2, slope, 0) * np.sign(away)
        scores -= slope * log_ratio[rows, at] / histogram.mdelta
    assert_allclose(scores @ columns / len(values), metric.metric_grad, rtol=1e-6)


def test_moments_by_bin(evaluated):
    metric, params = evaluated(3)
    values, gradient, points = moving_samples(metric, params)
    jacobian = linear_jacobian(metric.transform, params)
    columns = np.einsum("nd,kde,ne->nk", gradient, jacobian, points)
    histogram = metric.histogram
    moments = bin_moments(columns, values, histogram)
    bins = np.rint(values / histogram.mdelta - histogram.mmin)
    for r in range(histogram.nbins):
        part = columns[bins == r]
        assert_allclose(moments[r], part.T @ part / len(values), atol=1e-12)


@pytest.mark.parametrize("proportion", [None, 0.3])
def test_gradient_of_the_twin_is_nearly_dipys(evaluated, proportion):
    """Differences of logarithms for derivatives of weights: the same, but smoother."""
    metric, params = evaluated(3, proportion)
    twin = module._ClearMetric(
        metric, FINE, params, lambda x: metric.distance_and_gradient(x)[0]
    )
    value, gradient = twin.evaluate(params)
    exact_value, exact = metric.distance_and_gradient(params)
    exact = twin.basis.T @ exact * module.SCALE
    assert value == pytest.approx(exact_value * module.SCALE)
    assert np.linalg.norm(gradient - exact) < 0.12 * np.linalg.norm(exact)
    assert gradient @ exact > 0.99 * np.linalg.norm(gradient) * np.linalg.norm(exact)


def test_fisher_information_of_a_known_histogram():
    """Two Gaussians in a joint distribution: slope and variance are known."""
    nbins, rho, spread = 200, 0.8, 12.0
    t = (np.arange(nbins) - nbins / 2) / spread
    joint = np.exp(-(t[:, None] ** 2 - 2 * rho * t[:, None] * t + t**2) / 2 / 0.36)
    joint /= joint.sum()
    p = 3
    root = np.random.default_rng(0).standard_normal((p, p))
    moments = joint.sum(axis=0)[:, None, None] * (root @ root.T)
    phi = bin_weights(moments, 1 / spread) @ mean_slopes(joint)
    # d log P(t | i) / di = rho (t - rho i) / (1 - rho^2); its variance given i is
    # rho^2 / (1 - rho^2).
    assert_allclose(phi, rho**2 / (1 - rho**2), rtol=0.01)


def test_no_object_no_step():
    """Nothing depends on the parameters, or nothing is known of how."""
    inverse, weights = regular_inverse(np.zeros((4, 3, 3)), 1.0)
    assert_array_equal(weights, 0)
    assert_array_equal(first_inverse(FINE, inverse, weights, np.ones(4), 3), 0)
    moments = np.zeros((4, 3, 3))
    moments[1] = np.diag([1.0, 2.0, 4.0])
    inverse, weights = regular_inverse(moments, 1.0)
    inverse = first_inverse(FINE, inverse, weights, np.zeros(4), 3)
    assert_allclose(np.abs(inverse).max(), module.LARGEST_INVERSE)


def test_first_inverse():
    root = np.random.default_rng(0).standard_normal((6, 6))
    moments, slopes = np.zeros((5, 6, 6)), np.arange(5.0)
    moments[2], moments[3] = 0.25 * root @ root.T, 0.75 * root @ root.T
    mine, phi = regular_inverse(moments, 0.5), (0.25 * 2 + 0.75 * 3) / 0.5**2
    inverse = first_inverse(FINE, *mine, slopes, 6)
    whole = root @ root.T
    ridge = module.RIDGE * np.trace(whole) / 6 * np.eye(6)
    expected = np.linalg.inv(whole + ridge) / module.SCALE
    # What keeps it within bounds is added.
    phi += np.abs(expected).max() / module.LARGEST_INVERSE
    assert_allclose(inverse, expected / phi, rtol=1e-6, atol=1e-9)


# -- registrations -----------------------------------------------------------

PLAN = [("TRANSLATION", [4]), ("RIGID", [10, 6]), ("AFFINE", [1, 12])]


def register(images, method, dim, scale=1.0, numbers=None):
    """A pipeline of DIPY's; the matrix and what was shown."""
    static, moving, static_grid2world, moving_grid2world = images
    zoom = np.diag([scale] * dim + [1.0])
    grids = {
        "static_grid2world": zoom @ static_grid2world,
        "moving_grid2world": zoom @ moving_grid2world,
    }
    matrix = transform_centers_of_mass(
        static, grids["static_grid2world"], moving, grids["moving_grid2world"]
    ).affine
    shown = []
    for kind, evaluations in PLAN:
        metric = MutualInformationMetric(nbins=32)
        ours = DampedBFGS(metric, numbers=numbers)
        levels = len(evaluations)
        registration = AffineRegistration(
            metric=metric,
            method=ours if method == "ours" else "L-BFGS-B",
            level_iters=evaluations if method == "ours" else [200, 100][:levels],
            sigmas=[1, 0][:levels],
            factors=[2, 1][:levels],
            verbosity=0,
        )
        matrix = registration.optimize(
            static,
            moving,
            regtransforms[kind, dim],
            None,
            starting_affine=matrix,
            **grids,
        ).affine
        shown += ours.shown
    metric.setup(
        regtransforms["TRANSLATION", dim],
        static,
        moving,
        starting_affine=matrix,
        **grids,
    )
    value, _ = metric.distance_and_gradient(np.zeros(dim))
    return matrix, -value, shown


@pytest.mark.parametrize("dim", [2, 3])
def test_as_good_as_dipys_optimizer(bodies, dim):
    """With 33 evaluations, a tenth of DIPY's."""
    images = bodies(dim)
    _, clear, _ = register(images, "dipy", dim)
    _, ours, shown = register(images, "ours", dim)
    assert ours > clear - 5e-3
    assert len(shown) == sum(sum(n - 1 for n in e) for _, e in PLAN)


@pytest.mark.parametrize("proportion", [None, 0.3])
def test_results_are_what_dipy_wants(bodies, proportion):
    """With samples, and more levels than radii; the metric's value comes back."""
    static, moving, static_grid2world, moving_grid2world = bodies(3)
    metric = MutualInformationMetric(nbins=24, sampling_proportion=proportion)
    optimizer = DampedBFGS(metric, radius=[4.0])
    registration = AffineRegistration(
        metric=metric,
        method=optimizer,
        level_iters=[6, 1, 5],
        sigmas=[1, 0.5, 0],
        factors=[2, 1, 1],
        verbosity=0,
    )
    map_, params, value = registration.optimize(
        static,
        moving,
        regtransforms["RIGID", 3],
        None,
        static_grid2world=static_grid2world,
        moving_grid2world=moving_grid2world,
        ret_metric=True,
    )
    assert len(optimizer.shown) == 5 + 4
    assert len(params) == 6
    assert value == min(s["value"] for s in optimizer.shown[5:] + [{"value": value}])
    best = [s["value"] for s in optimizer.shown[5:] if s["better"]]
    assert value == (best[-1] if best else value)


@pytest.mark.parametrize("radius", [[], 0, [4, -1], [np.nan], [np.inf]])
def test_radii_that_are_refused(radius):
    with pytest.raises(ValueError, match="radius must be positive"):
        DampedBFGS(None, radius=radius)


def optimize(metric, images, **options):
    static, moving, *_ = images
    registration = AffineRegistration(
        metric=metric,
        level_iters=[4],
        sigmas=[0],
        factors=[1],
        verbosity=0,
        **options,
    )
    registration.optimize(static, moving, regtransforms["TRANSLATION", 2], None)


def test_what_is_refused_in_use(bodies):
    metric, other = MutualInformationMetric(), MutualInformationMetric()
    with pytest.raises(ValueError, match="another metric"):
        optimize(metric, bodies(2), method=DampedBFGS(other))
    static, moving, *_ = bodies(2)
    metric.setup(
        regtransforms["TRANSLATION", 2],
        static,
        moving,
        static_mask=np.ones(static.shape, dtype=np.int32),
    )
    with pytest.raises(ValueError, match="no masks"):
        optimizer = DampedBFGS(metric)
        optimizer(metric.distance_and_gradient, np.zeros(2), jac=None, maxiter=2)


def test_no_numbers_are_an_error(bodies, monkeypatch):
    metric = MutualInformationMetric()
    monkeypatch.setattr(
        MutualInformationMetric,
        "distance_and_gradient",
        lambda self, params: (np.inf, np.zeros(2)),
    )
    with pytest.raises(ValueError, match="no finite number"):
        optimize(metric, bodies(2), method=DampedBFGS(metric))


def test_size_does_not_matter(bodies):
    """A brain in micrometres: the same steps are shown."""
    images = bodies(3)
    matrix, _, shown = register(images, "ours", 3)
    other, _, as_shown = register(images, "ours", 3, scale=1 / 256)
    for one, two in zip(shown, as_shown, strict=True):
        assert one["exponent"] == two["exponent"]
        assert_array_equal(one["mantissas"], two["mantissas"])
    assert_allclose(other[:3, 3], matrix[:3, 3] / 256, atol=1e-6)
    assert_allclose(other[:3, :3], matrix[:3, :3], atol=1e-6)


def test_twenty_fraction_bits_do(bodies):
    images = bodies(3)
    _, fine, _ = register(images, "ours", 3, numbers=FINE)
    _, coarse, _ = register(images, "ours", 3, numbers=ClearNumbers(20))
    assert coarse > fine - 2e-3
