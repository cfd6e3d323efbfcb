"""Slots of ciphertexts, and the sums over control points that are made in them."""

import numpy as np
import pytest

from dipy_ppir.mpc.bsplines import Lattice
from dipy_ppir.mpc.splineslots import Slots

PRIME = 65537


def summed(slots, x, weights, values):
    """The sums, as they are made of ciphertexts of numbers modulo a prime."""
    total = np.zeros(slots.lattice.control_shape, np.uint64)
    for group in range(len(slots.groups)):
        rows = list(slots.copied(slots.placed(values, group)))
        placed = slots.placed(x, group)
        for some in range(slots.sums):
            sums = np.zeros(slots.slots, np.int64)
            factors = slots.factors(placed, weights, group, some)
            for row, by in zip(rows, factors, strict=True):
                sums += by.astype(np.int64) * row
            sums = (sums % PRIME).astype(np.uint64)
            slots.gathered(sums, total, group, some, PRIME)
    return total


@pytest.mark.parametrize("part", [1, 0.3])
@pytest.mark.parametrize("slots", [8, 64, 256, 4096, 1 << 14])
@pytest.mark.parametrize("shape", [(19, 17), (9, 8, 10)])
def test_sums_are_those_of_the_lattice(shape, slots, part):
    """However many slots there are for the cells, and of which voxels."""
    rng = np.random.default_rng(1)
    lattice, at = Lattice(shape, (4, 3, 5)[: len(shape)]), None
    voxels = int(np.prod(shape))
    if part < 1:
        at = rng.choice(voxels, int(part * voxels), replace=False)
    count = voxels if at is None else len(at)
    x, values = rng.integers(-9, 10, count), rng.integers(0, 10, count)
    weights = rng.integers(0, 9, lattice.control_shape)
    whole = np.zeros(voxels, np.int64)
    whole[slice(None) if at is None else at] = x * values
    wanted = weights * lattice.integer_sums(whole.reshape(shape)) % PRIME
    found = summed(Slots(lattice, at, slots), x, weights.astype(float), values)
    assert np.array_equal(found, wanted)


def test_few_slots_stay_empty():
    """Where there are fewer cells than slots, and where samples are scattered."""
    lattice = Lattice((121, 121), (5, 5))
    slots = Slots(lattice, None, 1 << 13)
    # 625 cells: 13 copies, two ciphertexts of sums.
    assert (slots.sums, len(slots.groups)) == (2, 1)
    assert slots.copies * 625 <= 1 << 13
    small = Slots(Lattice((40, 40), (5, 5)), None, 1 << 13)
    assert (small.sums, small.parts, small.ciphertexts) == (1, 8, 4)
    rng = np.random.default_rng(2)
    shape = (1260, 1090)
    at = rng.choice(1260 * 1090, 137_340, replace=False)
    scattered = Slots(Lattice(shape, (4, 4)), at, 1 << 13)
    assert scattered.ciphertexts < 2 * 137_340 / (1 << 13)
