"""Products of random numbers of two owners, made ahead."""

import math

import numpy as np
import pytest

from dipy_ppir.mpc import bfv, multiplications
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.lattice import SMALL_PRIMES
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.multiplications import BATCH, MOST_TERMS


def test_parts_add_up_to_the_products(two):
    def run(session):
        first = session.multiplications.take(3)
        second = session.multiplications.take(BATCH)
        return [np.concatenate(pair) for pair in zip(first, second, strict=True)]

    (a, p), (b, q) = two(run)
    assert (R128.add(p, q) == R128.mul(a, b)).all()
    for column in (a, b, p, q):
        assert len(np.unique(column[:, 1])) == len(column)


@pytest.mark.parametrize("terms", [2, MOST_TERMS])
def test_parts_add_up_to_sums_of_products(two, terms):
    def run(session):
        first = session.multiplications.sums(3, terms)
        second = session.multiplications.sums(2 * BATCH, terms)
        return np.concatenate([first[0], second[0]], 1), np.concatenate(
            [first[1], second[1]]
        )

    (a, p), (b, q) = two(run)
    total = R128.zeros((len(p),))
    for x, y in zip(a, b, strict=True):
        R128.addmul(total, x, y)
    assert (R128.add(p, q) == total).all()
    for column in (*a, *b, p, q):
        assert len(np.unique(column[:, 1])) == len(column)


def test_sums_of_none_or_of_too_many(two):
    def run(session):
        for terms in (0, MOST_TERMS + 1):
            with pytest.raises(ValueError, match="1 to 8 products"):
                session.multiplications.sums(3, terms)
        return True

    assert all(two(run))


def test_extreme_factors(two, monkeypatch):
    """The largest magnitudes: nothing wraps around."""
    extremes = [0, 1, -1, (1 << 127) - 1, -(1 << 127), 1 << 126]
    grid = [(x, y) for x in extremes for y in extremes]

    def run(session):
        pool = session.multiplications
        mine = [pair[0 if session.pid == MOVING else 1] for pair in grid]
        draw = pool._stream.words

        def words(shape):
            out = draw(shape)
            if shape == (BATCH, 2):
                out[: len(mine)] = R128.from_ints(mine)
            return out

        monkeypatch.setattr(pool._stream, "words", words)
        return pool.take(len(mine))

    (a, p), (b, q) = two(run)
    assert R128.to_ints(a).tolist() == [x % (1 << 128) for x, _ in grid]
    expected = [x * y % (1 << 128) for x, y in grid]
    assert R128.to_ints(R128.add(p, q)).tolist() == expected
    assert (R128.mul(a, b) == R128.from_ints(expected)).all()


def test_what_hides_a_product_is_wide_enough():
    whole = math.prod(SMALL_PRIMES)
    # From M / 4 on, over at most M / 4, and a product of 254 bits either way.
    largest = MOST_TERMS << 254
    most = whole // 4 + (1 << multiplications._MASK_BITS) + largest
    assert most < whole * 3 // 4
    assert largest / 2.0**multiplications._MASK_BITS <= 2.0**-multiplications.HIDDEN
    # Of 2**58 sums.
    assert multiplications.HIDDEN >= 98


def test_masks_are_far_from_where_the_moduli_wrap_around(two):
    """Else a product could come out wrong, which no run would show."""
    whole = math.prod(SMALL_PRIMES)

    def run(session):
        return session.multiplications._mask()

    for masks in two(run):
        numbers = sum(
            column.astype(object) << 64 * k for k, column in enumerate(masks.T)
        )
        top = whole // 4 + (1 << multiplications._MASK_BITS)
        assert whole // 4 <= min(numbers) and max(numbers) < top
        assert len(set(numbers)) == BATCH


def test_bytes_are_those_that_are_said(duo, tap, payload_bytes, outcomes):
    outcomes(duo, lambda session: session.encryption and None)
    frames = tap(duo)
    outcomes(duo, lambda session: session.multiplications.reserve(1))
    each = bfv.CIPHERTEXT + bfv.SEED_BYTES + bfv.response_bytes(1)
    assert payload_bytes(frames) == len(SMALL_PRIMES) * each
    assert round(payload_bytes(frames) / BATCH) == 378
    frames.clear()
    outcomes(duo, lambda session: session.multiplications.reserve(BATCH))
    assert not frames
    for terms, stated in ((2, 315), (8, 268)):
        outcomes(
            duo, lambda session, k=terms: session.multiplications.reserve(BATCH, k)
        )
        assert round(payload_bytes(frames) / BATCH / terms) == stated
        frames.clear()


def test_numbers_of_several_words_are_added():
    numbers = np.array([[2**64 - 1, 2**64 - 1, 5], [0, 0, 0]], np.uint64)
    constant = (7 << 64) + 1
    out = multiplications._plus(numbers, constant)
    for before, after in zip(numbers.tolist(), out.tolist(), strict=True):
        total = sum(w << 64 * k for k, w in enumerate(before)) + constant
        assert sum(w << 64 * k for k, w in enumerate(after)) == total
