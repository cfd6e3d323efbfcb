"""The secure metric and registration against DIPY's, on small images.

Tolerances: with ``reveal="histogram"`` the histogram is exact to 2**-40 of a
sample, so the value agrees to 1e-9; the gradient is rounded to some 1e-7 of its
largest element and held to the 1e-5 asked for. With ``reveal="gradient"`` the
logarithms are good to 2e-7, and the gradient to 1e-3 at these few samples.
"""

from dipy.align import affine_registration as clear_registration
from dipy.align.imaffine import AffineMap, AffineRegistration, MutualInformationMetric
from dipy.align.transforms import regtransforms
import numpy as np
import pytest

from dipy_ppir.align import RemoteImage, affine_registration
from dipy_ppir.align.imaffine import (
    SecureAffineRegistration,
    SecureMutualInformationMetric,
)
from dipy_ppir.mpc.errors import ParameterMismatchError
from dipy_ppir.mpc.ledger import DECLARATIONS, ROLES

TOLERANCE = {"histogram": (1e-9, 1e-5), "gradient": (1e-5, 2e-3)}


def blobs(shape, seed, shift=0.0):
    """Smooth image of random blobs inside a dark border."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) - shift
    image = np.zeros(shape)
    for _ in range(40):
        center = rng.uniform(0.2, 0.8, len(shape)) * shape
        width = rng.uniform(1.2, 4)
        distance = ((grid - center) ** 2).sum(-1)
        image += rng.uniform(0.3, 1) * np.exp(-distance / (2 * width**2))
    return image


def pair(dim):
    shape = (20, 24, 18)[:dim] if dim == 3 else (40, 44)
    static = blobs(shape, 1)
    moving = np.sqrt(blobs(shape, 1, shift=0.8)) + 0.1 * blobs(shape, 2)
    grid = np.diag([1.0, 1.2, 1.5][:dim] + [1.0])
    return static, moving, grid


def both(transform, static, moving, grid, masks=None, start=None, **settings):
    """DIPY's and the secure metric, set up with the same pair."""
    reveal = settings.pop("reveal")
    clear = MutualInformationMetric(**settings)
    secure = SecureMutualInformationMetric(reveal=reveal, **settings)
    for metric in (clear, secure):
        metric.setup(
            transform,
            static,
            moving,
            static_grid2world=grid,
            moving_grid2world=grid,
            starting_affine=start,
            **(masks or {}),
        )
    return clear, secure


def theta_of(transform, seed=0):
    """Parameters a little off the identity."""
    rng = np.random.default_rng(seed)
    n = transform.get_number_of_parameters()
    return transform.get_identity_parameters() + 0.02 * rng.standard_normal(n)


def assert_agree(clear, secure, theta, reveal):
    value, gradient = TOLERANCE[reveal]
    f, g = clear.distance_and_gradient(theta)
    sf, sg = secure.distance_and_gradient(theta)
    assert abs(sf - f) <= value * abs(f)
    np.testing.assert_allclose(sg, g, rtol=0, atol=gradient * np.abs(g).max())


@pytest.mark.parametrize("reveal", ["histogram", "gradient"])
@pytest.mark.parametrize("key", sorted(regtransforms), ids="{0[0]}{0[1]}".format)
def test_every_transform(key, reveal):
    transform = regtransforms[key]
    static, moving, grid = pair(key[1])
    clear, secure = both(transform, static, moving, grid, reveal=reveal)
    assert_agree(clear, secure, theta_of(transform), reveal)


@pytest.mark.parametrize("reveal", ["histogram", "gradient"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("proportion", [0.3, 1.0])
def test_sparse(dim, proportion, reveal):
    transform = regtransforms["AFFINE", dim]
    static, moving, grid = pair(dim)
    start = np.eye(dim + 1)
    start[:dim, dim] = 0.7
    clear, secure = both(
        transform,
        static,
        moving,
        grid,
        start=start,
        reveal=reveal,
        sampling_proportion=proportion,
    )
    assert_agree(clear, secure, theta_of(transform), reveal)


@pytest.mark.parametrize("reveal", ["histogram", "gradient"])
@pytest.mark.parametrize("which", ["static", "moving", "both"])
def test_masks(which, reveal):
    transform = regtransforms["RIGID", 3]
    static, moving, grid = pair(3)
    masks = {
        name + "_mask": (image > 0.15 * image.max()).astype(np.int32)
        for name, image in (("static", static), ("moving", moving))
        if which in (name, "both")
    }
    clear, secure = both(transform, static, moving, grid, masks, reveal=reveal)
    assert_agree(clear, secure, theta_of(transform), reveal)


def test_two_metrics_in_turn():
    """Each takes the other parties over from the other without mixing up images."""
    transform = regtransforms["TRANSLATION", 3]
    static, moving, grid = pair(3)
    first = both(transform, static, moving, grid, reveal="histogram")
    second = both(transform, moving, static, grid, reveal="histogram", nbins=16)
    for _ in range(2):
        for clear, secure in (first, second):
            assert_agree(clear, secure, theta_of(transform), "histogram")


def test_masks_are_fresh(three):
    """Two evaluations of the same numbers put different bytes on every link."""
    static, moving, grid = pair(3)
    transform = regtransforms["TRANSLATION", 3]
    seen = []

    def party(session):
        if session.pid == 0:
            send = session.network.send

            def tap(peer, name, array):
                if name in ("band", "rows", "columns"):
                    seen.append((name, np.array(array).tobytes()))
                send(peer, name, array)

            session.network.send = tap
        metric = SecureMutualInformationMetric(reveal="histogram", session=session)
        metric.setup(
            transform,
            static if session.pid == 1 else RemoteImage(static.shape, grid),
            moving if session.pid == 0 else RemoteImage(moving.shape, grid),
            static_grid2world=grid,
            moving_grid2world=grid,
        )
        if session.pid != 0:
            metric.serve()
            return None
        results = [metric.distance_and_gradient(theta_of(transform)) for _ in range(2)]
        metric.end()
        return results

    (f, g), (f2, g2) = three(party)[0]
    assert f == f2
    np.testing.assert_array_equal(g, g2)
    assert len(seen) > 5
    assert len(set(seen)) == len(seen)


SETTINGS = {"level_iters": [20, 10], "sigmas": [1.0, 0.0], "factors": [2, 1]}


def rmse(a, b, shape, grid):
    """Displacement between two affines over a grid, mm."""
    index = np.argwhere(np.ones(shape))
    world = np.c_[index, np.ones(len(index))] @ grid.T
    apart = (world @ a.T - world @ b.T)[:, :-1]
    return np.sqrt((apart**2).sum(axis=1).mean())


@pytest.mark.parametrize("reveal", ["histogram", "gradient"])
def test_registration(reveal):
    """A whole pipeline: where DIPY's ends to within 0.05 mm."""
    static, moving, grid = pair(3)
    images = {"moving_affine": grid, "static_affine": grid, **SETTINGS}
    images["level_iters"] = [200, 200]  # enough to converge
    options = {"optimizer_options": {"gtol": 1e-4}}
    pipeline = ["center_of_mass", "translation", "rigid"]
    _, clear = clear_registration(
        moving, static, pipeline=pipeline, **options, **images
    )
    moved, secure, xopt, fopt, receipt = affine_registration(
        moving,
        static,
        pipeline=pipeline,
        reveal=reveal,
        ret_metric=True,
        ret_receipt=True,
        **options,
        **images,
    )
    assert rmse(clear, secure, static.shape, grid) < 0.05
    expected = AffineMap(
        secure,
        domain_grid_shape=static.shape,
        domain_grid2world=grid,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=grid,
    ).transform(moving)
    np.testing.assert_array_equal(moved, expected)
    assert len(xopt) == 6
    assert fopt < 0
    opened = {
        "histogram": {"joint_histogram", "metric_gradient", "center_of_mass"},
        "gradient": {
            "metric_value",
            "sample_count",
            "metric_gradient",
            "center_of_mass",
        },
    }[reveal]
    assert {e["label"] for e in receipt["learned"]["moving owner"]} == opened
    assert [e["label"] for e in receipt["learned"]["static owner"]] == ["affine"]
    assert receipt["learned"]["helper"] == []
    for entries in receipt["learned"].values():
        for entry in entries:
            assert entry["meaning"] == DECLARATIONS[entry["label"]].meaning
    assert set(receipt["bytes_sent"]) == set(ROLES.values())
    assert (receipt["m"], receipt["t"], receipt["insecure"]) == (3, 1, False)


@pytest.mark.parametrize("start", ["mass", "voxel-origin", "centers", None, "matrix"])
def test_starting_affine(start):
    """The same start, and from there the same first step, as DIPY's."""
    static, moving, grid = pair(3)
    moved_grid = grid.copy()
    moved_grid[:3, 3] = 1.0, -0.5, 0.3
    if start == "matrix":
        start = np.eye(4)
        start[:3, 3] = 0.2
    results = []
    for registration in (
        AffineRegistration(
            metric=MutualInformationMetric(),
            level_iters=[2],
            sigmas=[0.0],
            factors=[1],
            verbosity=0,
        ),
        SecureAffineRegistration(
            metric=SecureMutualInformationMetric(reveal="histogram"),
            level_iters=[2],
            sigmas=[0.0],
            factors=[1],
        ),
    ):
        result = registration.optimize(
            static,
            moving,
            regtransforms["TRANSLATION", 3],
            None,
            static_grid2world=grid,
            moving_grid2world=moved_grid,
            starting_affine=start,
        )
        results.append(result.affine)
    # A centre of mass is opened to 0.001 mm.
    np.testing.assert_allclose(results[1], results[0], atol=0.02)


def test_in_dipys_own_registration():
    """DIPY's driver with the secure metric, unchanged."""
    static, moving, grid = pair(3)
    results = []
    for metric in (
        MutualInformationMetric(),
        SecureMutualInformationMetric(reveal="histogram"),
    ):
        registration = AffineRegistration(metric=metric, verbosity=0, **SETTINGS)
        affine_map = registration.optimize(
            static,
            moving,
            regtransforms["TRANSLATION", 3],
            None,
            static_grid2world=grid,
            moving_grid2world=grid,
            starting_affine=None,
        )
        results.append(affine_map.affine)
    assert rmse(*results, static.shape, grid) < 0.05


def party_call(session, result_to="both", other_nbins=32):
    """What each of the three parties runs in a session."""
    static, moving, grid = pair(3)
    return affine_registration(
        moving if session.pid == 0 else RemoteImage(moving.shape, grid),
        static if session.pid == 1 else RemoteImage(static.shape, grid),
        moving_affine=grid if session.pid == 0 else None,
        static_affine=grid if session.pid == 1 else None,
        pipeline=["center_of_mass", "translation"],
        nbins=other_nbins if session.pid == 1 else 32,
        result_to=result_to,
        session=session,
        ret_receipt=True,
        **SETTINGS,
    )


def test_three_parties(three):
    """Each party holds what it owns, and both owners end with the transform."""
    results = three(party_call)
    moved, matrix, _ = results[0]
    assert moved.shape == pair(3)[0].shape
    assert results[1][0] is None
    np.testing.assert_allclose(results[1][1], matrix, atol=1e-12)
    assert results[2][:2] == (None, None)
    learned = [r[2]["learned"] for r in results]
    assert learned[0] == learned[1] == learned[2]


def test_result_to_the_moving_owner_only(three):
    results = three(party_call, "moving")
    assert results[0][1] is not None
    assert results[1][1] is None
    assert results[0][2]["learned"]["static owner"] == []


def test_different_parameters_are_named(three):
    with pytest.raises(ParameterMismatchError, match="'nbins'.*32.*24"):
        three(party_call, "both", 24)


NAN = np.full((20, 24, 18), np.nan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"static": NAN}, "static image contains NaN"),
        ({"moving": np.ones((9, 9, 9))}, "moving image is constant"),
        ({"static": np.ones((9, 9, 9, 2))}, "4 dimensions"),
        ({"static_mask": np.ones((3, 3, 3))}, "resample the mask"),
        ({"static_affine": np.diag([1.0, 0, 1, 1])}, "singular"),
        ({"nbins": 5}, "at least 6"),
        ({"nbins": 7.5}, "integer"),
        ({"sampling_proportion": 0}, "sampling_proportion"),
        ({"factors": [2]}, "one entry per level"),
        ({"factors": [64, 1]}, "smaller factors"),
        ({"reveal": "all"}, "reveal must be one of"),
        ({"metric": "CC"}, "metric must be 'MI'"),
        ({"pipeline": ["warp"]}, "must be one of"),
        ({"static": RemoteImage((20, 24, 18))}, "needs a session"),
        ({"result_to": "helper"}, "result_to"),
        (
            {
                "moving_affine": np.array(
                    [[1, 0, 0, 900.0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
                ),
                "pipeline": ["rigid"],
            },
            "do not overlap",
        ),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_bad_input(change, message, monkeypatch):
    """One error that names the cause, before anybody is called."""

    def nobody(*args, **kwargs):
        raise AssertionError("other parties were started")

    monkeypatch.setattr("dipy_ppir.mpc.local.run_locally", nobody)
    static, moving, grid = pair(3)
    arguments = {
        "moving": moving,
        "static": static,
        "moving_affine": grid,
        "static_affine": grid,
        **SETTINGS,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        affine_registration(
            arguments.pop("moving"), arguments.pop("static"), **arguments
        )
