"""Bits of numbers, row by row."""

import numpy as np
import pytest

from dipy_ppir.mpc import bitslices
from dipy_ppir.mpc.fields import R32, R64, R128


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000, 70001])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_transposed_bits_are_numpys(n, size):
    rows = np.random.default_rng(n).integers(0, 256, (n, size), np.uint8)
    bits = bitslices.sliced(rows)
    plain = np.unpackbits(rows, axis=1, bitorder="little").T
    assert (bits == np.packbits(plain, axis=1, bitorder="little")).all()
    assert (bitslices.gathered(bits, n) == rows).all()


@pytest.mark.parametrize(
    ("ring", "bits"), [(R32, 32), (R32, 5), (R64, 48), (R128, 128), (R128, 104)]
)
def test_bits_of_words(ring, bits):
    values = [0, 1, (1 << ring.bits) - 1, 0x0123456789ABCDEF, 5 << 60, 1 << bits - 1]
    got = bitslices.words_sliced(ring.from_ints(values), ring, bits)
    flags = bitslices.spread(got, len(values))
    for i, value in enumerate(values):
        number = sum(int(bit) << k for k, bit in enumerate(flags[:, i]))
        assert number == value % (1 << bits)


def test_bits_one_by_one():
    flags = np.random.default_rng(2).random((3, 21)) < 0.5
    assert (bitslices.spread(bitslices.packed(flags), 21) == flags).all()
