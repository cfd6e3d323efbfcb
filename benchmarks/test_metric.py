"""One evaluation of the metric and its gradient, secure beside clear DIPY."""

from dipy.align.imaffine import MutualInformationMetric
from dipy.align.transforms import regtransforms
import numpy as np
import pytest
from yardsticks import beside

from dipy_ppir.align.imaffine import SecureMutualInformationMetric

AFFINE = regtransforms["AFFINE", 3]


def run(benchmark, pair, sampling_proportion, reveal, rounds):
    static, moving, grid2world = pair
    clear = MutualInformationMetric(sampling_proportion=sampling_proportion)
    secure = SecureMutualInformationMetric(
        sampling_proportion=sampling_proportion, reveal=reveal
    )
    for metric in (clear, secure):
        metric.setup(
            AFFINE,
            static,
            moving,
            static_grid2world=grid2world,
            moving_grid2world=grid2world,
            starting_affine=np.eye(4),
        )
    theta = AFFINE.get_identity_parameters()
    beside(
        benchmark,
        lambda: secure.distance_and_gradient(theta),
        lambda: clear.distance_and_gradient(theta),
        rounds,
    )
    count = secure._count
    receipt = secure.receipt()
    once = 8 * 28 * count
    each = (receipt["bytes_total"] - once) / secure.evaluations
    waits = sum(receipt["waits"].values()) / secure.evaluations
    benchmark.extra_info.update(
        samples=count,
        elements_per_sample=round(each / 8 / count, 2),
        bytes_by_party={
            role: sum(sent.values()) for role, sent in receipt["bytes_sent"].items()
        },
        waits_of_moving_owner=round(waits, 1),
    )


@pytest.mark.parametrize("reveal", ["histogram", "gradient"])
@pytest.mark.parametrize("pair", [8, 4, 2], indirect=True, ids="{}mm".format)
def test_sparse(benchmark, pair, reveal):
    """A tenth of the voxels."""
    run(benchmark, pair, 0.1, reveal, rounds=9)


@pytest.mark.parametrize("pair", [8, 4, 2], indirect=True, ids="{}mm".format)
def test_dense(benchmark, pair):
    """Every voxel."""
    run(benchmark, pair, None, "histogram", rounds=5)


@pytest.mark.heavy
@pytest.mark.parametrize("pair", [1], indirect=True, ids="{}mm".format)
@pytest.mark.parametrize("sampling_proportion", [0.1, None])
def test_full_size(benchmark, pair, sampling_proportion):
    """197 x 233 x 189 voxels."""
    run(benchmark, pair, sampling_proportion, "histogram", rounds=2)
