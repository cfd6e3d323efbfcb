"""Images of the benchmarks: templates that nilearn carries, at any resolution."""

from functools import lru_cache
import warnings

from dipy.align.imaffine import AffineMap
import numpy as np
import pytest


@lru_cache(maxsize=2)
def load_pair(resolution):
    """T1 template and grey-matter map, the latter displaced by a known affine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn.datasets import load_mni152_gm_template, load_mni152_template

        t1 = load_mni152_template(resolution=resolution)
        gm = load_mni152_gm_template(resolution=resolution)
    static, moving = t1.get_fdata(), gm.get_fdata()
    c, s = np.cos(0.1), np.sin(0.1)
    displaced = np.eye(4)
    displaced[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(
        [1.05, 0.97, 1.02]
    )
    displaced[:3, 3] = 5, -7, 4
    moving = AffineMap(
        displaced,
        domain_grid_shape=static.shape,
        domain_grid2world=t1.affine,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=gm.affine,
    ).transform(moving)
    return static, moving, t1.affine


@pytest.fixture
def pair(request):
    """Pair of images at the parametrised resolution in mm."""
    return load_pair(request.param)


def pytest_terminal_summary(terminalreporter, config):
    """Print what the table of times has no columns for."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    terminalreporter.section("secure beside clear")
    for bench in session.benchmarks:
        info = ", ".join(f"{k} {v}" for k, v in bench.extra_info.items())
        terminalreporter.write_line(f"{bench.name}: {info}")
