"""Free-form registration by squared differences, secure beside clear."""

from functools import lru_cache

import numpy as np
import pytest
from scipy import ndimage
from yardsticks import beside

from dipy_ppir.align.freeform import (
    ClearFreeFormRegistration,
    SecureFreeFormRegistration,
)

#: The sizes of the paper's section 6.2, with its spacings, levels and samples.
CASES = {
    "121": (
        (121, 121),
        {"spacing": 5, "factors": [2, 1], "level_iters": [20, 20]},
    ),
    "1260": (
        (1260, 1090),
        {
            "spacing": 4,
            "factors": [30, 20, 10, 5, 2, 1],
            "level_iters": [20, 20, 20, 20, 20, 10],
            "sampling_proportion": 0.1,
        },
    ),
}


@lru_cache(maxsize=1)
def deformed(shape):
    """A smooth random image in an ellipse, and a deformed one."""
    rng = np.random.default_rng(1)
    at = np.indices(shape).astype(np.float64)
    size = np.reshape(shape, (-1, 1, 1))
    inside = (((at / size - 0.5) / 0.4) ** 2).sum(axis=0) < 1
    noise = rng.standard_normal([n // 10 for n in shape])
    noise = ndimage.zoom(noise, np.divide(shape, noise.shape), order=3)
    static = inside * (0.6 + 0.4 * noise / np.abs(noise).max())
    static = ndimage.gaussian_filter(static, 1.0)
    for axis in range(2):
        bump = rng.standard_normal((5, 5))
        bump = ndimage.zoom(bump, np.divide(shape, bump.shape), order=3)
        at[axis] += 0.02 * shape[axis] * bump / np.abs(bump).max()
    moving = ndimage.map_coordinates(static, at, order=1, mode="nearest")
    return static, moving


@pytest.mark.parametrize("sampling", ["URS", "GMS"])
@pytest.mark.parametrize("case", CASES)
def test_whole(benchmark, case, sampling):
    """A whole registration; seconds and megabytes of each iteration."""
    shape, options = CASES[case]
    if sampling == "GMS" and "sampling_proportion" not in options:
        pytest.skip("samples are all voxels")
    static, moving = deformed(shape)
    results = {}

    def secure():
        registration = SecureFreeFormRegistration(2, sampling=sampling, **options)
        results["map"] = registration.optimize(static, moving)
        results["receipt"] = registration.receipt

    def clear():
        registration = ClearFreeFormRegistration(dim=2, sampling=sampling, **options)
        results["clear"] = registration.optimize(static, moving)
        results["iterations"] = sum(registration.iterations)

    beside(benchmark, secure, clear, 2, warm=True)
    apart = results["map"].get_forward_field() - results["clear"].get_forward_field()
    squares = (apart**2).sum(axis=-1)[static > 0.1]
    sent = results["receipt"]["bytes_sent"].values()
    benchmark.extra_info.update(
        rmse_voxels=round(float(np.sqrt(squares.mean())), 3),
        iterations=results["iterations"],
        megabytes_per_iteration=[
            round(sum(p.values()) / 1e6 / results["iterations"], 2) for p in sent
        ],
    )
