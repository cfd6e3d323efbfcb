"""Diffeomorphic registration, secure beside clear DIPY, at many sizes."""

from functools import lru_cache
import warnings

from dipy.align.imaffine import AffineMap
from dipy.align.imwarp import SymmetricDiffeomorphicRegistration
from dipy.align.metrics import SSDMetric
import numpy as np
import pytest
from scipy import ndimage
from yardsticks import beside

from dipy_ppir.align.imwarp import SecureSymmetricDiffeomorphicRegistration
from dipy_ppir.align.metrics import (
    GuardedCCMetric,
    SecureCCMetric,
    SecureMINDMetric,
    SecureSSDMetric,
)

#: 2 mm of the MNI template, the size in the paper, and the template at 1 mm.
TWO_MM, PAPER, ONE_MM = (99, 117, 95), (192, 160, 192), (197, 233, 189)

MODES = {
    "map": {},
    "map2": {"map_spacing": 2},
    "force": {"reveal": "force"},
    "update": {"reveal": "update"},
    "stride2": {"reveal": "update", "stride": 2},
}
#: Other metrics, and what of DIPY's in the clear they are held against.
OTHERS = {
    "ssd": (SecureSSDMetric, SSDMetric),
    "mind": (SecureMINDMetric, GuardedCCMetric),
}


@lru_cache(maxsize=1)
def deformed(shape):
    """The MNI template on a grid of `shape`, and a deformed one of other contrast."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn.datasets import load_mni152_template

        template = load_mni152_template(resolution=max(1, 200 // max(shape)))
    image = template.get_fdata()
    scale = np.diag([*np.divide(image.shape, shape), 1.0])
    grid2world = template.affine @ scale
    static = AffineMap(
        np.eye(4),
        domain_grid_shape=shape,
        domain_grid2world=grid2world,
        codomain_grid_shape=image.shape,
        codomain_grid2world=template.affine,
    ).transform(image)
    rng = np.random.default_rng(1)
    at = np.indices(shape).astype(np.float64)
    for axis, n in enumerate(shape):
        coarse = rng.standard_normal([max(m // 12, 2) for m in shape])
        factors = np.divide(shape, coarse.shape)
        bump = ndimage.zoom(coarse, factors, grid_mode=True, mode="grid-mirror")
        at[axis] += 0.02 * n * bump / np.abs(bump).max()
    moving = ndimage.map_coordinates(static, at, order=1, mode="nearest")
    return static, np.sqrt(np.maximum(moving, 0)), grid2world


def run(benchmark, shape, mode, level_iters, rounds, warm):
    static, moving, grid2world = deformed(shape)
    grids = {"static_grid2world": grid2world, "moving_grid2world": grid2world}
    results = {}

    def secure():
        kind = OTHERS.get(mode, (SecureCCMetric,))[0]
        registration = SecureSymmetricDiffeomorphicRegistration(
            kind(3, **MODES.get(mode, {})), level_iters=level_iters
        )
        results["secure"] = registration.optimize(static, moving, **grids)
        results["receipt"] = registration.receipt

    def clear():
        kind = OTHERS.get(mode, (None, GuardedCCMetric))[1]
        registration = SymmetricDiffeomorphicRegistration(
            kind(3), level_iters=level_iters
        )
        registration.verbosity = 0
        results["clear"] = registration.optimize(static, moving, **grids)

    beside(benchmark, secure, clear, rounds, warm=warm)
    spacing = np.linalg.norm(grid2world[:3, :3], axis=0)
    apart = results["secure"].get_forward_field() - results["clear"].get_forward_field()
    squares = ((apart / spacing) ** 2).sum(axis=-1)[static > 0.1 * static.max()]
    receipt = results["receipt"]
    iterations = {8 ** (len(level_iters) - 1 - i): n for i, n in enumerate(level_iters)}
    visits = sum(n * np.prod(shape) / part for part, n in iterations.items())
    sent = sum(max(p.values()) for p in receipt["bytes_sent"].values())
    benchmark.extra_info.update(
        rmse_voxels=round(float(np.sqrt(squares.mean())), 4),
        bytes_per_voxel_and_iteration=round(sent / visits),
        gigabytes=round(receipt["bytes_total"] / 1e9, 2),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(32,) * 3, (64,) * 3, TWO_MM], ids="{0[0]}".format)
def test_iterations(benchmark, shape, mode):
    """Three iterations at full resolution, start and end included."""
    run(benchmark, shape, mode, [3], rounds=3, warm=True)


@pytest.mark.parametrize("mode", MODES)
def test_whole(benchmark, mode):
    """A whole registration at 2 mm."""
    run(benchmark, TWO_MM, mode, [10, 10, 5], rounds=2, warm=False)


@pytest.mark.parametrize("mode", OTHERS)
def test_other_metrics(benchmark, mode):
    """A whole registration at 2 mm by another metric."""
    run(benchmark, TWO_MM, mode, [10, 10, 5], rounds=2, warm=False)


@pytest.mark.heavy
@pytest.mark.parametrize("mode", ["force", "update"])
@pytest.mark.parametrize("shape", [PAPER, ONE_MM], ids="{0[0]}".format)
def test_whole_full_size(benchmark, shape, mode):
    """A whole registration at 1 mm: for the memory as well."""
    run(benchmark, shape, mode, [10, 10, 5], rounds=1, warm=False)
