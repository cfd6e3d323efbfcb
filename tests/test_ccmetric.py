"""Local correlation as a metric of affine registration."""

from dipy.align import crosscorr
from dipy.align.imaffine import AffineMap
from dipy.align.transforms import regtransforms
import noise
import numpy as np
from parties import run_trio
import pytest
from scipy import ndimage

from dipy_ppir.align import RemoteImage, affine_registration, ccmetric
from dipy_ppir.align.ccmetric import (
    LevelCorrelation,
    MovingSide,
    SecureCrossCorrelationMetric,
    known_of,
    possible,
    scaled,
    spacing_of,
)
from dipy_ppir.align.memory import peaks
from dipy_ppir.align.parameters import AffineParameters, ParameterError
from dipy_ppir.align.parzenhist import linear_jacobian
from dipy_ppir.align.plausibility import ImplausibleWarning
from dipy_ppir.align.quasinewton import DIGITS, SCALE, ClearNumbers, minimise
from dipy_ppir.align.secretmetric import secret_numbers
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.localcc import GUARD, ClearCorrelation, Windows
from dipy_ppir.workflows.operations import OPERATIONS

RADIUS = 3


def in_the_clear(pair, ttype, start=None, masks=(None, None), spacing=None):
    """The metric of both images in the clear, and its windows."""
    static, moving, static_grid2world, moving_grid2world = pair
    spacing = spacing or spacing_of(static.shape, RADIUS)
    windows = Windows(static.shape, RADIUS, spacing)
    evaluations = ClearCorrelation(windows, DIGITS)
    evaluations.share_static(known_of(scaled(static, RADIUS), windows, masks[0]))
    side = MovingSide(
        scaled(moving, RADIUS), moving_grid2world, masks[1], windows, static_grid2world
    )
    metric = LevelCorrelation(evaluations, regtransforms[ttype], side, start)
    return metric, windows


def on_shares(session, pair, ttype, start=None, masks=(None, None)):
    """The metric at a party."""
    static, moving, static_grid2world, moving_grid2world = pair
    metric = SecureCrossCorrelationMetric(radius=RADIUS, session=session)
    has = session.pid == STATIC, session.pid == MOVING
    metric.setup(
        regtransforms[ttype],
        static if has[0] else RemoteImage(static.shape, static_grid2world),
        moving if has[1] else RemoteImage(moving.shape, moving_grid2world),
        static_grid2world=static_grid2world,
        moving_grid2world=moving_grid2world,
        starting_affine=start if has[1] else None,
        static_mask=masks[0] if has[0] else None,
        moving_mask=masks[1] if has[1] else None,
    )
    return metric


def textured(dim, seed=4):
    """Two images with detail everywhere, the second moved by less than a voxel."""
    shape = (48, 44) if dim == 2 else (30, 28, 26)
    rng = np.random.default_rng(seed)
    static = ndimage.gaussian_filter(rng.standard_normal(shape), 2.0)
    moving = np.exp(ndimage.shift(static, 0.6, mode="nearest") * 3)
    grids = np.diag([1.5, 1.2, 2.0][:dim] + [1.0]), np.diag([1.4, 1.3, 1.9][:dim] + [1])
    moving = AffineMap(
        np.eye(dim + 1),
        domain_grid_shape=shape,
        domain_grid2world=grids[1],
        codomain_grid_shape=shape,
        codomain_grid2world=grids[0],
    ).transform(moving)
    return static, np.asarray(moving), *grids


def start_of(dim):
    start = np.eye(dim + 1)
    start[:dim, :dim] += 0.03 * np.random.default_rng(1).standard_normal((dim, dim))
    start[:dim, dim] = [0.4, -0.7, 0.5][:dim]
    return start


# -- value and gradient ------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_the_value_is_the_mean_of_the_squared_correlations(dim):
    pair, start = textured(dim), start_of(dim)
    metric, windows = in_the_clear(pair, ("AFFINE", dim), start)
    static = scaled(pair[0], RADIUS)
    warped = AffineMap(
        start,
        domain_grid_shape=static.shape,
        domain_grid2world=pair[2],
        codomain_grid_shape=pair[1].shape,
        codomain_grid2world=pair[3],
    ).transform(scaled(pair[1], RADIUS))
    squares = []
    for center in np.stack(np.meshgrid(*windows.points, indexing="ij"), -1).reshape(
        -1, dim
    ):
        at = tuple(slice(c - RADIUS, c + RADIUS + 1) for c in center)
        s, m = (x[at].ravel() for x in (static, warped))
        covariance = np.cov(s, m, bias=True)
        norms = (covariance[0, 0] + GUARD**2) * (covariance[1, 1] + GUARD**2)
        squares.append(covariance[0, 1] ** 2 / norms)
    found = metric.value(start)
    # Images are rounded to 2**-14.
    assert found[0] / SCALE == pytest.approx(-np.mean(squares), abs=2e-4)
    assert np.mean(squares) > 0.1


@pytest.mark.parametrize("ttype", ["TRANSLATION", "RIGID", "SCALING", "AFFINE"])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_gradient_is_the_derivative(dim, ttype):
    """But for central differences, which are those of a slightly smoother image."""
    pair, start = textured(dim), start_of(dim)
    metric, _ = in_the_clear(pair, (ttype, dim), start, spacing=2)
    params = metric.transform.get_identity_parameters()
    metric.begin(params)
    _, gradient = metric.evaluate(params)
    expected = np.empty(len(params))
    for k, direction in enumerate(metric.basis.T):
        more, less = (
            metric.value(metric.transform.param_to_matrix(params + d) @ start)[0]
            for d in (0.1 * direction, -0.1 * direction)
        )
        expected[k] = (more - less) / 0.2
    cosine = gradient @ expected / np.linalg.norm(gradient) / np.linalg.norm(expected)
    assert cosine > 0.98
    assert 0.75 < np.linalg.norm(gradient) / np.linalg.norm(expected) < 1.1


def test_the_gradient_points_where_that_of_dipy_does():
    """DIPY's force on every voxel, projected by the Jacobian of the transform."""
    static, moving, grid2world, moving_grid2world = pair = textured(3)
    start = start_of(3)
    metric, windows = in_the_clear(pair, ("AFFINE", 3), start, spacing=2)
    params = metric.transform.get_identity_parameters()
    metric.begin(params)
    _, gradient = metric.evaluate(params)
    warped = AffineMap(
        start,
        domain_grid_shape=static.shape,
        domain_grid2world=grid2world,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=moving_grid2world,
    ).transform(scaled(moving, RADIUS))
    images = (np.asarray(x, dtype=np.float32) for x in (scaled(static, RADIUS), warped))
    factors = np.asarray(crosscorr.precompute_cc_factors_3d(*images, RADIUS))
    slopes = np.stack(np.gradient(warped), -1).astype(np.float32)
    # Of minus the sum of the squared correlations, by the moving image's displacement.
    force, _ = crosscorr.compute_cc_backward_step_3d(slopes, factors, RADIUS)
    force = np.asarray(force, dtype=np.float64).reshape(-1, 3)
    at = np.indices(static.shape).reshape(3, -1)
    at = grid2world @ np.vstack([at, np.ones(at.shape[1])])
    linear = (start @ grid2world)[:3, :3]
    jacobian = linear_jacobian(metric.transform, params) @ start
    moved = np.linalg.solve(linear, np.einsum("kde,ex->kdx", jacobian, at))
    expected = metric.basis.T @ np.einsum("kdx,xd->k", moved, force)
    cosine = gradient @ expected / np.linalg.norm(gradient) / np.linalg.norm(expected)
    assert cosine > 0.96


def test_the_first_curvature_is_that_of_images_that_match():
    """Of an image and itself: the second differences of the metric."""
    static, _, grid2world, _ = textured(3)
    metric, _ = in_the_clear((static, static, grid2world, grid2world), ("RIGID", 3))
    params = metric.transform.get_identity_parameters()
    metric.begin(params)
    value, _ = metric.evaluate(params)
    inverse = metric.first_inverse(ClearNumbers())
    # Steps of a voxel, for which it matters little that interpolation smooths.
    size, rng = 5.0, np.random.default_rng(2)
    for _ in range(6):
        step = rng.standard_normal(6)
        step *= size / np.linalg.norm(step)
        around = [
            metric.value(metric.transform.param_to_matrix(metric.basis @ d))[0]
            for d in (step, -step)
        ]
        second = sum(around) - 2 * value[0]
        expected = step @ np.linalg.solve(inverse, step)
        assert 0.6 < second / expected < 1.7


# -- what does not count -----------------------------------------------------------


def test_a_flat_background_counts_for_nothing(bodies):
    static, moving, *grids = bodies(3)
    static, moving = (np.pad(x, 10) for x in (static, moving))
    grids = [
        g @ np.array(np.eye(4) + np.outer([1, 1, 1, 0], [0, 0, 0, -10])) for g in grids
    ]
    metric, windows = in_the_clear((static, moving, *grids), ("AFFINE", 3))
    params = metric.transform.get_identity_parameters()
    metric.begin(params)
    _, gradient = metric.evaluate(params)
    known = known_of(scaled(static, RADIUS), windows)
    flat = np.isclose(known.inverse, 1 / GUARD)
    assert 0.2 < flat.mean() < 0.9
    # With only those the metric is zero.
    mask = np.zeros(static.shape)
    mask[np.ix_(*windows.points)] = flat
    metric, _ = in_the_clear(
        (static, moving, *grids), ("AFFINE", 3), masks=(mask, None)
    )
    metric.begin(params)
    value, nothing = metric.evaluate(params)
    assert abs(value[0]) < 1e-3 * SCALE
    assert np.linalg.norm(nothing) < 1e-2 * np.linalg.norm(gradient)
    assert possible(known_of(scaled(static, RADIUS), windows, mask)) < 1e-6


@pytest.mark.parametrize("owner", [STATIC, MOVING])
def test_windows_count_whose_centres_are_in_the_mask(owner):
    """What lies outside may be anything."""
    pair = textured(3)
    other = [x.copy() for x in pair[:2]]
    which = 0 if owner == STATIC else 1
    mask = np.zeros(pair[which].shape)
    mask[:14] = 1
    other[which][14 + RADIUS + 3 :] = other[which][14 + RADIUS + 3 :][..., ::-1]
    masks = (mask, None) if owner == STATIC else (None, mask)
    values = []
    for images in (pair[:2], other):
        metric, _ = in_the_clear((*images, *pair[2:]), ("RIGID", 3), masks=masks)
        values.append(metric.value(np.eye(4))[0])
        whole, _ = in_the_clear((*images, *pair[2:]), ("RIGID", 3))
        values.append(whole.value(np.eye(4))[0])
    masked, all_of_it, masked_other, all_other = values
    assert masked == pytest.approx(masked_other, abs=1e-6) and masked < -0.05 * SCALE
    assert abs(all_of_it - all_other) > 0.02 * SCALE


def test_intensities_of_any_unit_are_the_same():
    static, moving, *grids = textured(2)
    values = [
        in_the_clear((a * static + b, c * moving + d, *grids), ("RIGID", 2))[0].value(
            np.eye(3)
        )[0]
        for a, b, c, d in ((1, 0, 1, 0), (1e4, -3e5, 1e-6, 0))
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    metric, _ = in_the_clear((static, 0 * moving, *grids), ("RIGID", 2))
    assert metric.value(np.eye(3))[0] == 0


# -- registrations -----------------------------------------------------------------


@pytest.mark.parametrize("ttype", [("RIGID", 2), ("AFFINE", 2), ("RIGID", 3)])
def test_on_shares_what_is_found_in_the_clear(three, bodies, ttype, monkeypatch):
    noise.fix_randomness(monkeypatch)
    pair, transform = bodies(ttype[1]), regtransforms[ttype]
    params = transform.get_identity_parameters()
    metric, _ = in_the_clear(pair, ttype)
    metric.begin(params)
    expected, value = minimise(ClearNumbers(), metric, params, 12, 4.0)

    def party(session):
        shared = on_shares(session, pair, ttype).shared
        mine = params if session.pid == MOVING else None
        shared.begin(mine)
        found, value = minimise(secret_numbers(session), shared, mine, 12, 4.0)
        return found, session.open(value, "test-any", (MOVING,))

    found, best = three(party)[MOVING]
    start = metric.value(np.eye(ttype[1] + 1))[0]
    assert value[0] < 1.1 * start
    # The same steps but where a rounding decides.
    assert best[0] == pytest.approx(value[0], rel=0.01)
    step = np.linalg.solve(metric.basis, found - expected)
    assert np.linalg.norm(step) < 0.5


@pytest.mark.parametrize("dim", [2, 3])
def test_evaluations_are_those_in_the_clear_to_the_last_rounding(three, bodies, dim):
    """With masks, from a start, by all that the optimizer is given."""
    pair, ttype, start = bodies(dim), ("AFFINE", dim), start_of(dim)
    masks = tuple(x > 0.05 for x in pair[:2])
    params = regtransforms[ttype].get_identity_parameters()

    def party(session):
        shared = on_shares(session, pair, ttype, start, masks).shared
        mine = params if session.pid == MOVING else None
        shared.begin(mine)
        numbers = [*shared.evaluate(mine)]
        inverse = shared.first_inverse(secret_numbers(session))
        numbers.append(inverse.reshape(-1))
        numbers.append(shared.value(start if session.pid == MOVING else None))
        return [session.open(x, "test-any", (MOVING,)) for x in numbers]

    metric, _ = in_the_clear(pair, ttype, start, masks)
    metric.begin(params)
    expected = [*metric.evaluate(params)]
    expected.append(metric.first_inverse(ClearNumbers()).reshape(-1))
    expected.append(metric.value(start))
    for found, twin in zip(three(party)[MOVING], expected, strict=True):
        assert np.abs(found - twin).max() < 5e-5 * max(np.abs(twin).max(), 1)


# -- judging -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "what, mismatched",
    [("match", False), ("less than before", True), ("noise", True), ("flat", True)],
)
def test_what_hardly_matches(trio, bodies, what, mismatched):
    static, moving, *grids = bodies(3)
    away = np.eye(4)
    away[:3, 3] = 6.0
    before, after = away, np.eye(4)
    if what == "less than before":
        before, after = after, before
    if what == "noise":
        rng = np.random.default_rng(5)
        moving = ndimage.gaussian_filter(rng.standard_normal(moving.shape), 1.0)
    if what == "flat":
        moving = np.ones(moving.shape)

    def party(session):
        metric = on_shares(session, (static, moving, *grids), ("RIGID", 3))
        mine = (before, after) if session.pid == MOVING else (None, None)
        bit = metric.mismatched(*mine)
        assert bit.shape == (1,)
        return session.open(bit, "test-any", (MOVING,))

    assert run_trio(trio, party)[MOVING] == [float(mismatched)]


def test_large_grids_have_windows_further_apart():
    assert spacing_of((24, 24, 24), 4) == 2 and spacing_of((200, 200, 200), 4) == 5
    assert spacing_of((30, 30), 1) == spacing_of((800, 800), 1) == 2
    assert ccmetric.is_small((24, 24, 24)) and not ccmetric.is_small((800, 800))


@pytest.mark.parametrize("radius", [0, 21, 2.5, "4"])
def test_radii_that_cannot_be_used(radius):
    with pytest.raises(ValueError, match="radius must be an integer from 1 to 20"):
        SecureCrossCorrelationMetric(radius=radius)


# -- through the door --------------------------------------------------------------


def test_as_a_metric_of_affine_registration(bodies):
    """Where mutual information ends, with nothing opened but the same.

    Of the same contrast: where a smooth body has another, local correlation, DIPY's
    too, is largest a little beside the truth.
    """
    static, moving, *grids = bodies(3)
    moving = moving**2
    common = {
        "static_affine": grids[0],
        "moving_affine": grids[1],
        "level_iters": [12, 12],
        "sigmas": [1.0, 0.0],
        "factors": [2, 1],
        "pipeline": ["center_of_mass", "rigid", "affine"],
        "ret_metric": True,
        "ret_receipt": True,
    }
    found = {}
    for name in ("MI", "cc"):
        moved, matrix, xopt, value, receipt = affine_registration(
            moving, static, metric=name, **common
        )
        found[name] = matrix, receipt
        assert receipt["warnings"] == [] and len(xopt) == 12
        inside = static > 0.1
        assert np.corrcoef(moved[inside], static[inside])[0, 1] > 0.95
    assert -1 < value < -0.2
    assert found["cc"][1]["parameters"]["metric"] == "CC"
    assert found["cc"][1]["parameters"]["radius"] == 4
    assert found["cc"][1]["metric"]["name"] == SecureCrossCorrelationMetric.title
    openings = [
        {e["label"]: e["openings"] for e in receipt["learned"]["moving owner"]}
        for _, receipt in found.values()
    ]
    assert openings[0] == openings[1]
    at = np.argwhere(static > 0.1) @ grids[0][:3, :3].T
    apart = found["MI"][0] - found["cc"][0]
    apart = at @ apart[:3, :3].T + apart[:3, 3]
    # Roundings by chance make it 0.33 to 0.41 (14 runs).
    assert np.sqrt((apart**2).sum(axis=1).mean()) < 0.7


def test_masks_and_noise_through_the_door(bodies):
    static, moving, *grids = bodies(2)
    common = {
        "static_affine": grids[0],
        "moving_affine": grids[1],
        "level_iters": [12, 12],
        "sigmas": [1.0, 0.0],
        "factors": [2, 1],
        "pipeline": ["rigid"],
        "metric": "CC",
        "radius": 3,
        "ret_receipt": True,
    }
    mask = {"static_mask": static > 0.02, "moving_mask": moving > 0.02}
    _, _, receipt = affine_registration(moving, static, **mask, **common)
    assert receipt["warnings"] == []
    noise = np.random.default_rng(3).standard_normal(moving.shape)
    with pytest.warns(ImplausibleWarning, match="hardly match"):
        affine_registration(noise, static, **common)


def test_what_a_session_file_says_of_it():
    """In words, and how much memory it takes."""
    parameters = AffineParameters(metric="cc", sampling_proportion=None)
    assert (parameters.metric, parameters.radius) == ("CC", 4)
    by_mutual_information = peaks(AffineParameters(), (200,) * 3, (200,) * 3)
    by_correlation = peaks(parameters, (200,) * 3, (200,) * 3)
    for party, needed in by_correlation.items():
        assert 0.5e9 < needed < 3e9 and needed < by_mutual_information[party]
    title = OPERATIONS["affine"].titled("CC")
    assert "local cross-correlation" in title and "affine" in title


@pytest.mark.parametrize(
    "options, message",
    [
        ({"radius": 3}, "radius means nothing to metric MI; .* metric CC"),
        ({"metric": "CC", "nbins": 32}, "nbins means nothing to metric CC"),
        ({"metric": "CC", "hide_steps": True}, "hide_steps True means nothing"),
        ({"metric": "CC", "reveal": "gradient"}, "reveal 'gradient' means nothing"),
        ({"metric": "CC", "backend": "mpyc"}, "backend 'mpyc' means nothing"),
        ({"metric": "CC", "sampling_proportion": 0.5}, "sampling_proportion means"),
        ({"metric": "CC", "radius": 0}, "radius must be an integer from 1 to 20"),
    ],
)
def test_parameters_that_mean_nothing(options, message):
    with pytest.raises(ParameterError, match=message):
        AffineParameters(**options)
