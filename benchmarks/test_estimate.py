"""What is estimated ahead, as parts of what is measured: time, traffic, memory.

    pytest benchmarks/test_estimate.py --override-ini addopts= --benchmark-only

Memory is the largest of the parties' peaks so far, so that it tells something where a
case needs more than those before it. On a busy machine look at processor time: half of
it, for two cores.
"""

import os
import time

from conftest import load_pair
import numpy as np
import pytest
from scipy import ndimage
from yardsticks import peak_memory

from dipy_ppir.align import (
    affine_registration,
    freeform_registration,
    syn_registration,
)
from dipy_ppir.align.estimate import estimate, speed
from dipy_ppir.align.parameters import (
    AffineParameters,
    FreeFormParameters,
    SynParameters,
)
from dipy_ppir.mpc import local

TENTH = {"sampling_proportion": 0.1}
#: By memory, the least first.
CASES = {
    "affine SSD": ("affine", {"metric": "SSD"}),
    "affine, a tenth": ("affine", TENTH),
    "affine, hidden": ("affine", {**TENTH, "hide_steps": True}),
    "affine CC": ("affine", {"metric": "CC"}),
    "affine": ("affine", {}),
    "affine, gradient": ("affine", {**TENTH, "reveal": "gradient"}),
    "freeform": ("freeform", {}),
    "SyN force": ("syn", {"reveal": "force"}),
    "SyN update": ("syn", {"reveal": "update"}),
    "SyN SSD": ("syn", {"metric": "SSD"}),
    "SyN": ("syn", {}),
    "SyN MIND": ("syn", {"metric": "MIND"}),
    "SyN to the end": ("syn", {"opens": "end"}),
}
OPERATIONS = {
    "affine": (affine_registration, AffineParameters),
    "syn": (syn_registration, SynParameters),
    "freeform": (freeform_registration, FreeFormParameters),
}


def processor_seconds():
    """Of all parties so far."""
    total = sum(os.times()[:2])
    for child in local._shared._children.values() if local._shared else ():
        with open(f"/proc/{child.pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def deformed(image):
    """An image, deformed by some voxels."""
    rng = np.random.default_rng(3)
    at = np.indices(image.shape).astype(float)
    for x in at:
        bumps = ndimage.zoom(
            rng.normal(size=(5, 5, 5)), [n / 5 for n in image.shape], order=3
        )
        x += 1.5 * bumps
    return ndimage.map_coordinates(image, at, order=1, mode="nearest")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_estimate(benchmark, case):
    """The MNI template at 2 mm, and grey matter or itself, deformed."""
    operation, given = CASES[case]
    static, moving, grid2world = load_pair(2)
    register, parameters = OPERATIONS[operation]
    if operation != "affine":
        moving = deformed(static)
    images = {"moving_affine": grid2world, "static_affine": grid2world}
    found = estimate(
        parameters(**given), static.shape, moving.shape, static_grid2world=grid2world
    )
    # So that the parties run, and have read what they need.
    affine_registration(
        moving[::4, ::4, ::4],
        static[::4, ::4, ::4],
        moving_affine=grid2world,
        static_affine=grid2world,
        pipeline=["translation"],
        level_iters=[2],
        factors=[1],
        sigmas=[0.0],
    )
    before, receipts = processor_seconds(), []

    def run():
        *_, receipt = register(moving, static, ret_receipt=True, **images, **given)
        receipts.append(receipt)

    start = time.perf_counter()
    benchmark.pedantic(run, rounds=1, iterations=1)
    seconds, processor = time.perf_counter() - start, processor_seconds() - before
    expected = found.work / speed()
    memory = max(peak_memory().values()) * 2**20
    benchmark.extra_info.update(
        seconds=f"{expected:.1f} / {seconds:.1f} = {expected / seconds:.2f}",
        processor=f"{expected:.1f} / {processor / 2:.1f} = "
        f"{2 * expected / processor:.2f}",
        bytes=f"{found.sent / receipts[0]['bytes_total']:.3f}",
        memory=f"{found.memory / 2**30:.2f} / {memory / 2**30:.2f} GiB = "
        f"{found.memory / memory:.2f}",
        speed=round(speed(), 2),
    )
