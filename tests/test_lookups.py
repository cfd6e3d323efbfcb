"""Words that the moving owner looks up in the static owner's columns."""

import re

import numpy as np
from numpy.testing import assert_array_equal
from oblivious import use_known_products
from parties import run_trio
import pytest

from dipy_ppir.mpc import lookups as module
from dipy_ppir.mpc.frame import operation_code
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.lookups import WINDOW, Lookups

LOW = np.uint64((1 << 48) - 1)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    use_known_products(monkeypatch)


class Case:
    """Columns of one owner, and first rows of the other."""

    def __init__(self, n=300, rows=12, seed=0):
        rng = np.random.default_rng(seed)
        self.n, self.rows = n, rows
        self.columns = rng.integers(0, 1 << 64, (rows, n), np.uint64)
        self.first = rng.integers(0, rows - WINDOW + 1, n).astype(np.int32)

    def run(self, session, times=1):
        """Masks of each time, or words that were found."""
        looked = Lookups(session, rows=self.rows, length=self.n, bits=48)
        out = []
        for _ in range(times):
            if session.pid == MOVING:
                begun = looked.begin(lambda i, j: self.first[i:j])
                out.append(looked.look_up(begun))
            else:
                masks = looked.draw()
                begun = looked.begin(masks=masks)
                looked.look_up(begun, lambda i, j: self.columns[:, i:j])
                out.append(masks)
        return out

    def wanted(self):
        """The words, by their class."""
        at = self.first[:, None] + np.arange(WINDOW)
        by_class = np.empty((self.n, WINDOW), np.uint64)
        words = self.columns[at, np.arange(self.n)[:, None]] & LOW
        np.put_along_axis(by_class, at % WINDOW, words, axis=1)
        return by_class


@pytest.mark.parametrize("rows", [5, 6, 8, 12, 16, 30, 33])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_words_are_found_less_their_masks(two, rows, n):
    case = Case(n, rows)
    (found,), (masks,) = two(case.run)
    assert_array_equal((found + masks.T) & LOW, case.wanted())
    assert found.max() <= LOW and masks.max() <= LOW


def test_every_window(two):
    """All first rows there are, and more columns than are worked on at a time."""
    case = Case(2 * module._BLOCK + 5, 32)
    case.first[:29] = np.arange(29)
    (found,), (masks,) = two(case.run)
    assert_array_equal((found + masks.T) & LOW, case.wanted())


def test_nothing_serves_twice(two, duo, tap):
    """The same columns look different each time, and so does what is asked for."""
    case = Case(1000)
    frames = tap(duo)
    found, masks = run_trio(duo, lambda s: case.run(s, times=2))
    assert (masks[0] != masks[1]).mean() > 0.999
    assert (found[0] != found[1]).mean() > 0.999
    asked = [f[4] for f in frames if f[3] == operation_code("lookups")]
    sums = [np.unpackbits(np.frombuffer(a, np.uint8)) for a in asked]
    assert len(sums) == 2
    for bits in (*sums, sums[0] ^ sums[1]):
        assert abs(bits.mean() - 0.5) < 7 * 0.5 / np.sqrt(bits.size)


def test_other_words_stay_hidden(duo, tap):
    """Where all columns are alike, words that were not picked look like any."""
    case = Case(4000, 16)
    case.columns[...], case.first[...] = 0, 5
    frames = tap(duo)
    found, masks = run_trio(duo, case.run)
    sent = [f[4] for f in frames if f[3] == operation_code("words")]
    words = np.frombuffer(b"".join(sent), np.uint8).reshape(4, -1, 6)
    for some in (words, found[0].view(np.uint8).reshape(-1, 8)[:, :6], masks[0]):
        bits = np.unpackbits(np.ascontiguousarray(some).view(np.uint8))
        if some is masks[0]:
            bits = bits.reshape(-1, 64)[:, :48]
        assert abs(bits.mean() - 0.5) < 7 * 0.5 / np.sqrt(bits.size)
    # Pads of one column are independent.
    for i in range(4):
        for j in range(i):
            bits = np.unpackbits(words[i] ^ words[j])
            assert abs(bits.mean() - 0.5) < 7 * 0.5 / np.sqrt(bits.size)


def test_the_moving_owner_makes_one_pad(two):
    """Of the pads of a class it has the one of the number that it has the keys of."""
    case, size = Case(500, 16), 4

    def run(session):
        looked = Lookups(session, rows=case.rows, length=case.n, bits=48)
        if session.pid == MOVING:
            return looked.begin(lambda i, j: case.first[i:j])[0]
        return looked.begin(masks=np.zeros((WINDOW, case.n), np.uint64))[0]

    (wanted, pad), pads = two(run)
    pads = pads.reshape(size, -1)
    same = pads == pad
    assert_array_equal(same.argmax(axis=0), wanted)
    assert_array_equal(same.sum(axis=0), 1)
    assert len(np.unique(pads)) == pads.size


# -- cost ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [12, 32])
def test_rounds_and_bytes_are_as_stated(duo, tap, depth, payload_bytes, rows):
    case = Case(1000, rows)
    run_trio(duo, lambda s: s.transfers.reserve(1 << 14, STATIC))
    left = duo[0].transfers.left(STATIC)
    frames, count = tap(duo), depth(duo)
    run_trio(duo, case.run)
    looked = Lookups(duo[0], rows=rows, length=1000, bits=48)
    size, digits = {12: (3, 2), 32: (8, 3)}[rows]
    assert count() == 2
    assert looked.payload_bytes == 1000 * 4 * (digits + size * 48) // 8
    assert payload_bytes(frames) == looked.payload_bytes
    assert left - duo[0].transfers.left(STATIC) == looked.transfers == 4000 * digits
    stated = " ".join(module.__doc__.split())
    for words in (r"`begin` 1 ``WINDOW \* l / 8``", r"`look_up` 1 ``WINDOW \* k \* bi"):
        assert re.search(words, stated)
