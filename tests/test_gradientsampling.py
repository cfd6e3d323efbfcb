"""Random samples at which a gradient is estimated."""

import numpy as np
import pytest
from scipy import stats

from dipy_ppir.align.gradientsampling import (
    LEAST,
    magnitude_samples,
    sample_count,
    uniform_samples,
)


@pytest.mark.parametrize(
    ("n", "fraction", "count"),
    [(500, None, 500), (10**6, 0.1, 10**5), (5000, 0.1, LEAST), (500, 0.1, 500)],
)
def test_how_many(n, fraction, count):
    assert sample_count(n, fraction) == count


@pytest.mark.parametrize("kind", ["uniform", "magnitude"])
def test_samples_are_different_and_in_order(kind):
    rng = np.random.default_rng(1)
    weights = rng.random(4000)
    for count in (1, 1000, 4000):
        if kind == "uniform":
            index = uniform_samples(rng, 4000, count)
        else:
            index = magnitude_samples(rng.random(len(weights)), weights, count)
        assert len(index) == count
        assert (np.diff(index) > 0).all()
        assert index[0] >= 0
        assert index[-1] < 4000


def test_uniform_samples_are_uniform():
    rng = np.random.default_rng(2)
    counts = sum(
        np.bincount(uniform_samples(rng, 50, 10), minlength=50) for _ in range(4000)
    )
    assert stats.chisquare(counts).pvalue > 1e-6


def test_edges_are_preferred_as_their_weights_say():
    # Of two voxels one is drawn: by the odds of their weights.
    rng, weights, n = np.random.default_rng(3), np.array([3.0, 1.0]), 4000
    first = sum(magnitude_samples(rng.random(2), weights, 1)[0] == 0 for _ in range(n))
    assert stats.binomtest(int(first), n, 0.75).pvalue > 1e-6


def test_voxels_without_weight_come_last():
    rng, weights = np.random.default_rng(4), np.zeros(100)
    weights[:20] = 1e-3
    assert magnitude_samples(rng.random(100), weights, 20).tolist() == list(range(20))
    assert set(range(20)) < set(
        magnitude_samples(rng.random(100), weights, 30).tolist()
    )
    assert len(magnitude_samples(rng.random(100), np.zeros(100), 30)) == 30
