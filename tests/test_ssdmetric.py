"""Affine registration by the sum of squared differences."""

from dipy.align.imaffine import AffineMap, AffineRegistration
from dipy.align.transforms import regtransforms
import numpy as np
import pytest
from scipy import ndimage, stats
from scipy.optimize import approx_fprime

from dipy_ppir.align import RemoteImage, affine_registration
from dipy_ppir.align.gaussnewton import step_bits
from dipy_ppir.align.imaffine import SecureAffineRegistration
from dipy_ppir.align.parameters import AffineParameters, ParameterError
from dipy_ppir.align.plausibility import MISMATCH
from dipy_ppir.align.ssdmetric import (
    GaussNewton,
    SecureSquaredDifferencesMetric,
    SquaredDifferencesMetric,
)
from dipy_ppir.mpc import pairsquares
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC

LEVELS = {"level_iters": [12, 6, 3], "sigmas": [3.0, 1.0, 0.0], "factors": [4, 2, 1]}
SHAPES = {2: (72, 60), 3: (32, 28, 24)}
SAMPLINGS = {
    "all": {},
    "URS": {"sampling_proportion": 0.4},
    "GMS": {"sampling": "GMS", "sampling_proportion": 0.4},
}


def blobs(dim, seed=1):
    """An object of a few blobs on nothing."""
    rng, shape = np.random.default_rng(seed), SHAPES[dim]
    image = np.zeros(shape)
    for _ in range(12):
        at = [rng.uniform(0.3, 0.7) * n for n in shape]
        image[tuple(int(a) for a in at)] += rng.uniform(0.5, 1.0)
    image = ndimage.gaussian_filter(image, 2.5 if dim == 2 else 2.0)
    return image / image.max()


def truth(dim):
    """A transform of some voxels."""
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] += 0.04 * np.random.default_rng(2).standard_normal((dim, dim))
    matrix[:dim, dim] = np.array([2.0, -1.5, 1.0])[:dim]
    return matrix


def pair(dim):
    static, matrix, grid = blobs(dim), truth(dim), np.eye(dim + 1)
    place = {
        "domain_grid_shape": static.shape,
        "domain_grid2world": grid,
        "codomain_grid_shape": static.shape,
        "codomain_grid2world": grid,
    }
    return static, AffineMap(np.linalg.inv(matrix), **place).transform(static), matrix


def displacement(a, b, image):
    """Root mean square displacement between two transforms of an object, voxels."""
    points = np.argwhere(image > 0.1)
    points = np.hstack([points, np.ones((len(points), 1))])
    return np.sqrt((((points @ (a - b).T)[:, :-1]) ** 2).sum(axis=1).mean())


def registered(registration, static, moving):
    dim = static.ndim
    return registration.optimize(
        static,
        moving,
        regtransforms["AFFINE", dim],
        None,
        static_grid2world=np.eye(dim + 1),
        moving_grid2world=np.eye(dim + 1),
    ).affine


def clear(static, moving, **options):
    metric = SquaredDifferencesMetric(**options)
    registration = AffineRegistration(
        metric=metric, method=GaussNewton(metric), verbosity=0, **LEVELS
    )
    return registered(registration, static, moving)


def secure(static, moving, parties=3, **options):
    metric = SecureSquaredDifferencesMetric(**options)
    registration = SecureAffineRegistration(metric=metric, parties=parties, **LEVELS)
    return registered(registration, static, moving), registration.receipt


def learned(receipt, role, label):
    (entry,) = (e for e in receipt["learned"][role] if e["label"] == label)
    return entry


@pytest.mark.parametrize("parties", [3, 2])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("dim", [2, 3])
def test_secure_is_the_clear_twin(dim, sampling, parties, monkeypatch):
    """The same samples and iterations, and the same transform but for rounding.

    To 2**-10 voxel a step is off by half as much in each coordinate, and what is left
    in the end is the rounding of the last one. Two owners alone round the static image
    once, where the others round it times each position.
    """
    secret = SecureSquaredDifferencesMetric
    monkeypatch.setattr(secret, "_draws", SquaredDifferencesMetric._draws)
    static, moving, matrix = pair(dim)
    options = {**SAMPLINGS[sampling], "precision": 2.0**-10}
    expected = clear(static, moving, **options)
    found, receipt = secure(static, moving, parties, **options)
    assert displacement(expected, found, static) < 0.01
    assert displacement(found, matrix, static) < 0.15
    update = learned(receipt, "moving owner", "update")
    p = dim * (dim + 1)
    assert update["openings"] == sum(LEVELS["level_iters"])
    assert update["bits"] == update["openings"] * p * step_bits(2.0**-10)
    labels = [e["label"] for e in receipt["learned"]["static owner"]]
    # Of small images two owners alone tell each other no samples.
    small = static.size <= pairsquares.MOST_WHOLE
    assert ("edge_samples" in labels) == (
        sampling == "GMS" and (parties == 3 or not small)
    )
    assert receipt["learned"].get("helper", []) == []
    assert len(receipt["learned"]) == parties
    assert receipt["warnings"] == []


@pytest.mark.parametrize("sampling", ["URS", "GMS"])
def test_samples_of_large_images_are_sent_in_each_step(two, sampling, monkeypatch):
    monkeypatch.setattr(pairsquares, "MOST_WHOLE", 0)
    static, moving, matrix = pair(2)

    def party(session):
        metric = SecureSquaredDifferencesMetric(**SAMPLINGS[sampling])
        registration = SecureAffineRegistration(metric=metric, **LEVELS)
        registration.join(session)
        images = [static, moving]
        images[session.pid == STATIC] = RemoteImage(static.shape)
        return registered(registration, *images), registration.receipt

    (found, receipt), _ = two(party)
    assert displacement(found, matrix, static) < 0.15 + np.sqrt(6) / 32
    labels = [e["label"] for e in receipt["learned"]["static owner"]]
    assert ("edge_samples" in labels) == (sampling == "GMS")


def test_the_default_precision_is_kept():
    static, moving, matrix = pair(2)
    found, receipt = secure(static, moving)
    # Uniform in each of six coordinates; see `gaussnewton`.
    assert displacement(found, matrix, static) < 0.15 + np.sqrt(6) / 32
    assert learned(receipt, "moving owner", "update")["bits"] == 21 * 6 * 12


def test_the_gradient_is_that_of_the_metric():
    static, moving, _ = pair(2)
    static, moving = (ndimage.gaussian_filter(x, 2) for x in (static, moving))
    metric, transform = SquaredDifferencesMetric(), regtransforms["AFFINE", 2]
    metric.setup(transform, static, moving)
    at = transform.get_identity_parameters()
    value, gradient = metric.distance_and_gradient(at)
    assert value == pytest.approx(np.mean((static - moving) ** 2), rel=1e-6)
    numeric = approx_fprime(at, metric.distance, 1e-4)
    # Differences over two voxels, as DIPY takes them, of an image of blobs.
    cosine = gradient @ numeric / np.linalg.norm(gradient) / np.linalg.norm(numeric)
    assert cosine > 0.98
    assert np.array_equal(metric.gradient(at), gradient)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_step_is_the_least_squares_solution(dim):
    """Equations 2 to 6, by another program: what makes the linearized sum least."""
    static, moving, _ = pair(dim)
    metric = SquaredDifferencesMetric(precision=2.0**-10)
    transform = regtransforms["AFFINE", dim]
    metric.setup(transform, static, moving)
    at = transform.get_identity_parameters()
    metric.begin(at)
    count, own = metric.linearized(at)
    found = metric.steps.step(count, len(at), own) * metric.precision
    values, gradient = metric.sample(np.eye(dim + 1))
    points = np.argwhere(np.ones(static.shape)).astype(float)
    columns = [transform.jacobian(at, point) @ metric.basis for point in points]
    slopes = np.einsum("nd,ndk->nk", gradient.reshape(-1, dim), np.array(columns))
    wanted = np.linalg.lstsq(slopes, (static - values).ravel(), rcond=None)[0]
    assert np.abs(wanted).max() > 0.5
    # Half a unit, and what the ridge and the rounded image make of it.
    assert np.abs(found - wanted).max() < 2.0**-11 + 0.002


@pytest.mark.parametrize("parties", [3, 2])
def test_all_steps_of_a_pipeline_and_the_final_value(parties):
    static, moving, matrix = pair(3)
    grid = np.eye(4)
    moved, found, xopt, fopt, receipt = affine_registration(
        moving,
        static,
        moving_affine=grid,
        static_affine=grid,
        metric="ssd",
        parties=parties,
        ret_metric=True,
        ret_receipt=True,
    )
    assert displacement(found, matrix, static) < 0.3
    low, high = moving.min(), moving.max()
    exact = np.mean(((moved - low) / (high - low) - static / static.max()) ** 2)
    assert fopt == pytest.approx(exact, abs=2 / 8000)
    assert receipt["metric"] == {"name": "mean squared difference", "value": fopt}
    assert len(xopt) == 12
    assert receipt["parameters"]["metric"] == "SSD"


@pytest.mark.parametrize("parties", [3, 2])
def test_images_that_do_not_match_are_told(parties):
    static, moving, _ = pair(2)
    noise = np.random.default_rng(3).random(static.shape)
    with pytest.warns(UserWarning, match="hardly match"):
        _, receipt = secure(static, noise, parties)
    assert MISMATCH in receipt["warnings"]


def test_images_that_matched_before_are_no_cause_for_a_warning():
    static, *_ = pair(2)
    found, receipt = secure(static, static)
    # Rounding of the last step, in six coordinates.
    assert displacement(found, np.eye(3), static) < np.sqrt(6) / 16
    assert receipt["warnings"] == []


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_moving_image_without_edges_takes_no_step(value):
    """What is opened then is noise, and moves nothing."""
    static, moving, _ = pair(2)
    moving = np.full(static.shape, value)
    moving[0, 0] = value + 1
    with pytest.warns(UserWarning):
        found, _ = secure(static, ndimage.gaussian_filter(moving, 0))
    assert np.isfinite(found).all()


def test_the_static_owner_refuses_samples_outside_the_image(trio, outcomes):
    def party(session):
        metric = SecureSquaredDifferencesMetric(
            sampling="GMS", sampling_proportion=0.5, session=session
        )
        static, moving, _ = pair(2)
        images = [static, moving]
        images[session.pid == STATIC] = RemoteImage(static.shape)
        if session.pid == HELPER:
            images = [RemoteImage(static.shape)] * 2
        metric.setup(regtransforms["AFFINE", 2], *images)
        index = None
        if session.pid == MOVING:
            index = np.arange(1000) + static.size - 500
        metric._share_edges(index, 1000)

    found = outcomes(trio, party)
    assert isinstance(found[STATIC], ProtocolError)
    assert "that there are not" in str(found[STATIC])


def test_edges_are_drawn_with_numbers_that_nobody_knows():
    """The public seed says nothing of which voxels are samples."""
    drawn = []
    for _ in range(2):
        metric = SecureSquaredDifferencesMetric(sampling="GMS", sampling_proportion=0.4)
        drawn.append(metric._draws(1000))
    assert not np.array_equal(*drawn)
    assert stats.kstest(np.concatenate(drawn), "uniform").pvalue > 1e-9


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {
                "metric": "SSD",
                "sampling": "GMS",
                "sampling_proportion": 0.1,
                "seed": 4,
            },
            "seed is that of sampling URS",
        ),
        ({"metric": "SSD", "nbins": 32}, "nbins means nothing to metric SSD"),
        ({"metric": "SSD", "reveal": "gradient"}, "reveal 'gradient' means nothing"),
        ({"metric": "SSD", "hide_steps": True}, "hide_steps True means nothing"),
        ({"sampling": "URS", "sampling_proportion": 0.1}, "choose metric SSD"),
        ({"metric": "SSD", "sampling": "GMS"}, "needs sampling_proportion"),
        ({"metric": "SSD", "seed": 3}, "random samples"),
        ({"metric": "SSD", "sampling_proportion": 0}, "above 0 and at most 1"),
        ({"metric": "SSD", "sampling_proportion": 1.5}, "above 0 and at most 1"),
        ({"metric": "SSD", "precision": 2}, "precision must be"),
        ({"metric": "NMI"}, "metric must be one of"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(given, words):
    with pytest.raises(ParameterError, match=words):
        AffineParameters(**given)


def test_masks_are_refused():
    static, moving, _ = pair(2)
    grid = {"moving_affine": np.eye(3), "static_affine": np.eye(3)}
    with pytest.raises(ValueError, match="takes no masks"):
        affine_registration(
            moving, static, metric="SSD", static_mask=static > 0.5, **grid
        )
    metric = SquaredDifferencesMetric()
    with pytest.raises(ValueError, match="takes no masks"):
        metric.setup(
            regtransforms["AFFINE", 2], static, moving, moving_mask=static > 0.5
        )


def test_a_metric_serves_two_registrations():
    """Its samples begin anew, as they do at parties that are new."""
    static, moving, matrix = pair(2)
    metric = SecureSquaredDifferencesMetric(sampling_proportion=0.4)
    registration = SecureAffineRegistration(metric=metric, **LEVELS)
    for _ in range(2):
        found = registered(registration, static, moving)
        assert displacement(found, matrix, static) < 0.3
