"""Affine registration by the sum of squared differences, secure beside clear."""

from dipy.align.imaffine import AffineMap, AffineRegistration
from dipy.align.transforms import AffineTransform3D
import numpy as np
import pytest
from yardsticks import beside, peak_memory

from dipy_ppir.align.imaffine import (
    SecureAffineRegistration,
    SecureSquaredDifferencesMetric,
)
from dipy_ppir.align.ssdmetric import GaussNewton, SquaredDifferencesMetric

LEVELS = {"level_iters": [12, 6, 3], "sigmas": [3.0, 1.0, 0.0], "factors": [4, 2, 1]}
SAMPLINGS = {
    "all": {},
    "URS": {"sampling": "URS", "sampling_proportion": 0.1},
    "GMS": {"sampling": "GMS", "sampling_proportion": 0.1},
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("pair", [2], indirect=True, ids="{}mm".format)
def test_squared_differences(benchmark, pair, sampling):
    """The T1 template to itself, displaced; 21 steps."""
    static, _, grid2world = pair
    displaced = np.eye(4)
    displaced[:3, :3] += 0.04 * np.random.default_rng(1).standard_normal((3, 3))
    displaced[:3, 3] = 5, -7, 4
    place = {"grid_shape": static.shape, "grid2world": grid2world}
    place = {f"{s}_{k}": v for s in ("domain", "codomain") for k, v in place.items()}
    moving = AffineMap(np.linalg.inv(displaced), **place).transform(static)
    options, results = SAMPLINGS[sampling], {}

    def optimized(registration):
        return registration.optimize(
            static,
            moving,
            AffineTransform3D(),
            None,
            static_grid2world=grid2world,
            moving_grid2world=grid2world,
        ).affine

    def secure():
        metric = SecureSquaredDifferencesMetric(**options)
        registration = SecureAffineRegistration(metric=metric, **LEVELS)
        results["secure"] = optimized(registration)
        results["receipt"] = registration.receipt

    def clear():
        metric = SquaredDifferencesMetric(**options)
        registration = AffineRegistration(
            metric=metric, method=GaussNewton(metric), verbosity=0, **LEVELS
        )
        results["clear"] = optimized(registration)

    beside(benchmark, secure, clear, 3, warm=False)
    brain = np.argwhere(static > 0.2 * static.max())
    world = np.c_[brain, np.ones(len(brain))] @ grid2world.T
    receipt = results["receipt"]

    def rmse(a, b):
        apart = (world @ (a - b).T)[:, :3]
        return round(float(np.sqrt((apart**2).sum(axis=1).mean())), 4)

    benchmark.extra_info.update(
        rmse_mm=rmse(results["secure"], results["clear"]),
        error_mm=rmse(results["secure"], displaced),
        bits=receipt["bits"]["moving owner"],
        megabytes=round(receipt["bytes_total"] / 1e6, 1),
        peak_mib=peak_memory(),
    )
