"""Whole registrations, secure beside clear DIPY, with the distance between them."""

from dipy.align import affine_registration as clear_registration
import numpy as np
import pytest
from yardsticks import beside, peak_memory

from dipy_ppir.align import affine_registration

OPTIONS = {"gtol": 1e-4}


def run(benchmark, pair, rounds, **settings):
    static, moving, grid2world = pair
    reveal = settings.pop("reveal", "transform")
    hidden = {"hide_steps": True} if settings.pop("hide_steps", False) else {}
    options = {} if reveal == "transform" else {"optimizer_options": OPTIONS}
    options["parties"] = settings.pop("parties", None)
    images = {"moving_affine": grid2world, "static_affine": grid2world, **settings}
    results = {}
    counter = []

    def secure():
        counter.clear()
        _, results["secure"], results["receipt"] = affine_registration(
            moving,
            static,
            reveal=reveal,
            ret_receipt=True,
            callback=counter.append,
            **images,
            **options,
            **hidden,
        )

    def clear():
        _, results["clear"] = clear_registration(
            moving, static, optimizer_options=OPTIONS, **images
        )

    beside(benchmark, secure, clear, rounds, warm=False)
    brain = np.argwhere(static > 0.2 * static.max())
    world = np.c_[brain, np.ones(len(brain))] @ grid2world.T
    apart = world @ results["secure"].T - world @ results["clear"].T
    receipt = results["receipt"]
    benchmark.extra_info.update(
        rmse_mm=round(float(np.sqrt((apart[:, :3] ** 2).sum(axis=1).mean())), 4),
        steps=len(counter),
        bits=receipt["bits"]["moving owner"],
        peak_mib=peak_memory(),
        gigabytes=round(receipt["bytes_total"] / 1e9, 2),
        bytes_by_party={
            role: sum(sent.values()) for role, sent in receipt["bytes_sent"].items()
        },
    )


@pytest.mark.parametrize("reveal", ["transform", "histogram", "gradient"])
@pytest.mark.parametrize("pair", [2], indirect=True, ids="{}mm".format)
def test_sparse(benchmark, pair, reveal):
    """A tenth of the voxels of a 2 mm volume."""
    run(
        benchmark,
        pair,
        3 if reveal == "transform" else 1,
        sampling_proportion=0.1,
        reveal=reveal,
    )


@pytest.mark.parametrize("pair", [2], indirect=True, ids="{}mm".format)
def test_hidden_steps(benchmark, pair):
    """The same where no step is shown."""
    run(benchmark, pair, 3, sampling_proportion=0.1, hide_steps=True)


@pytest.mark.parametrize("pair", [2], indirect=True, ids="{}mm".format)
def test_two_owners(benchmark, pair):
    """A twentieth of the voxels, by two owners alone."""
    run(benchmark, pair, 1, sampling_proportion=0.05, parties=2)


@pytest.mark.heavy
@pytest.mark.parametrize("reveal", ["transform", "histogram"])
@pytest.mark.parametrize("pair", [2], indirect=True, ids="{}mm".format)
def test_dense(benchmark, pair, reveal):
    """Every voxel of a 2 mm volume."""
    run(benchmark, pair, 1, reveal=reveal)


@pytest.mark.heavy
@pytest.mark.parametrize("pair", [1], indirect=True, ids="{}mm".format)
def test_full_size(benchmark, pair):
    """Every voxel of a 1 mm volume, few steps: for the memory."""
    run(benchmark, pair, 1, pipeline=["center_of_mass", "rigid"], level_iters=[4, 3, 3])
