"""Whole registrations: where DIPY's end, with the same start and the same driver."""

from dipy.align import affine_registration as clear_registration
from dipy.align.imaffine import AffineMap, AffineRegistration, MutualInformationMetric
from dipy.align.transforms import regtransforms
import noise
import numpy as np
import pytest

from dipy_ppir.align import RemoteImage, affine_registration
from dipy_ppir.align.imaffine import (
    SecureAffineRegistration,
    SecureMutualInformationMetric,
)
from dipy_ppir.mpc.ledger import MOVING, STATIC

SETTINGS = {"level_iters": [20, 10], "sigmas": [1.0, 0.0], "factors": [2, 1]}
GRID = np.diag([1.0, 1.2, 1.5, 1.0])
TRANSLATION = regtransforms["TRANSLATION", 3]


def blobs(seed, shift=0.0):
    """Smooth image of random blobs inside a dark border."""
    rng = np.random.default_rng(seed)
    shape = (20, 24, 18)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) - shift
    image = np.zeros(shape)
    for _ in range(40):
        center = rng.uniform(0.2, 0.8, 3) * shape
        width = rng.uniform(1.2, 4)
        distance = ((grid - center) ** 2).sum(-1)
        image += rng.uniform(0.3, 1) * np.exp(-distance / (2 * width**2))
    return image


@pytest.fixture(scope="module")
def pair():
    """Static and moving image, on one grid."""
    return blobs(1), np.sqrt(blobs(1, shift=0.8)) + 0.1 * blobs(2)


def rmse(a, b, shape):
    """Displacement between two affines over the grid, mm."""
    index = np.argwhere(np.ones(shape))
    world = np.c_[index, np.ones(len(index))] @ GRID.T
    apart = (world @ a.T - world @ b.T)[:, :-1]
    return np.sqrt((apart**2).sum(axis=1).mean())


#: A whole pipeline, with iterations enough to converge.
WHOLE = {
    **SETTINGS,
    "moving_affine": GRID,
    "static_affine": GRID,
    "pipeline": ["center_of_mass", "translation", "rigid"],
    "optimizer_options": {"gtol": 1e-4},
    "level_iters": [200, 200],
}


@pytest.fixture(scope="module")
def clear(pair):
    """What clear DIPY finds for the pair."""
    static, moving = pair
    return clear_registration(moving, static, **WHOLE)[1]


def test_registration(pair, clear):
    """Where DIPY's ends to within 0.05 mm. With the histogram there is no chance."""
    static, moving = pair
    moved, secure, xopt, fopt = affine_registration(
        moving, static, reveal="histogram", ret_metric=True, **WHOLE
    )
    assert rmse(clear, secure, static.shape) < 0.05
    expected = AffineMap(
        secure,
        domain_grid_shape=static.shape,
        domain_grid2world=GRID,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=GRID,
    ).transform(moving)
    np.testing.assert_array_equal(moved, expected)
    assert len(xopt) == 6
    assert fopt < 0


def test_registration_without_the_histogram(pair, clear, three, monkeypatch):
    """The same where numbers are blurred: with noise that is always the same.

    L-BFGS may turn any noise into another path. In 25 runs with fresh noise it ended
    0.003 to 0.018 mm from clear DIPY.
    """
    static, moving = pair
    noise.fix_randomness(monkeypatch)

    def party(session):
        return affine_registration(
            moving if session.pid == MOVING else RemoteImage(moving.shape, GRID),
            static if session.pid == STATIC else RemoteImage(static.shape, GRID),
            session=session,
            reveal="gradient",
            **WHOLE,
        )

    results = three(party)
    assert rmse(clear, results[MOVING][1], static.shape) < 0.05
    assert rmse(clear, results[STATIC][1], static.shape) < 0.05


def in_both_ways(pair, drivers, moving_grid=GRID, start=None):
    """Matrices that two drivers find for the pair's translation."""
    static, moving = pair
    return [
        driver.optimize(
            static,
            moving,
            TRANSLATION,
            None,
            static_grid2world=GRID,
            moving_grid2world=moving_grid,
            starting_affine=start,
        ).affine
        for driver in drivers
    ]


@pytest.mark.parametrize("start", ["mass", "voxel-origin", "centers", None, "matrix"])
def test_starting_affine(pair, start):
    """The same start, and from there the same first step, as DIPY's."""
    moved_grid = GRID.copy()
    moved_grid[:3, 3] = 1.0, -0.5, 0.3
    if start == "matrix":
        start = np.eye(4)
        start[:3, 3] = 0.2
    one_level = {"level_iters": [2], "sigmas": [0.0], "factors": [1]}
    metric = SecureMutualInformationMetric(reveal="histogram")
    drivers = (
        AffineRegistration(metric=MutualInformationMetric(), verbosity=0, **one_level),
        SecureAffineRegistration(metric=metric, **one_level),
    )
    clear, secure = in_both_ways(pair, drivers, moved_grid, start)
    # A centre of mass is opened to 0.001 mm.
    np.testing.assert_allclose(secure, clear, atol=0.02)


def test_in_dipys_own_registration(pair):
    """DIPY's driver with the secure metric, unchanged."""
    drivers = [
        AffineRegistration(metric=metric, verbosity=0, **SETTINGS)
        for metric in (
            MutualInformationMetric(),
            SecureMutualInformationMetric(reveal="histogram"),
        )
    ]
    assert rmse(*in_both_ways(pair, drivers), pair[0].shape) < 0.05


def test_three_parties(three, pair):
    """Each party holds what it owns, and both owners end with the transform."""
    static, moving = pair

    def party(session):
        return affine_registration(
            moving if session.pid == MOVING else RemoteImage(moving.shape, GRID),
            static if session.pid == STATIC else RemoteImage(static.shape, GRID),
            moving_affine=GRID if session.pid == MOVING else None,
            static_affine=GRID if session.pid == STATIC else None,
            pipeline=["center_of_mass", "translation"],
            session=session,
            ret_receipt=True,
            **SETTINGS,
        )

    results = three(party)
    moved, matrix, _ = results[MOVING]
    assert moved.shape == static.shape
    assert results[STATIC][0] is None
    np.testing.assert_allclose(results[STATIC][1], matrix, atol=1e-12)
    assert results[2][:2] == (None, None)
    learned = [r[2]["learned"] for r in results]
    assert learned[0] == learned[1] == learned[2]
