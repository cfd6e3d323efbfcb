"""Products of random numbers of two owners, made ahead."""

import math

import numpy as np
import pytest

from dipy_ppir.mpc import bfv, lattice, multiplications
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
    whole, largest = math.prod(SMALL_PRIMES), MOST_TERMS << 254
    # What is drawn again keeps products from wrapping around, and is found by doubles.
    assert largest / whole < 2.0**-30 * multiplications.MARGIN
    assert multiplications.MARGIN > 2.0**-48
    # Of all numbers of a session.
    numbers = bfv.MOST_RESPONSES // len(SMALL_PRIMES) * BATCH
    assert largest / whole * numbers <= 2.0**-40


def test_numbers_near_where_the_moduli_wrap_around_are_drawn_again(two, monkeypatch):
    """Else a product could come out wrong, which no run would show."""
    whole = math.prod(SMALL_PRIMES)

    def run(session):
        encryption, drawn = session.encryption, []

        def mask(t):
            """Numbers that are 0 or M - 1 everywhere at first."""
            found = bfv.draw_mask(encryption.stream, t)
            k, n = len(drawn) // len(SMALL_PRIMES), np.zeros(BATCH, np.uint64)
            drawn.append(found.numbers)
            n[0] = t - 1
            return found._replace(numbers=[n, 0 * n][k]) if k < 2 else found

        monkeypatch.setattr(encryption, "mask", mask)
        masks, numbers = session.multiplications._masks()
        return len(drawn), [m.numbers for m in masks], numbers

    for times, polynomials, numbers in two(run):
        assert times == 3 * len(SMALL_PRIMES)
        joined = np.zeros(BATCH, object)
        for modulus, coefficients in zip(
            lattice.moduli(SMALL_PRIMES), polynomials, strict=True
        ):
            values = modulus.residues(coefficients)
            modulus.transform(values)
            rest = whole // modulus.prime
            factor = rest * pow(rest, -1, modulus.prime)
            joined += modulus.integers(values).astype(object) * factor
        joined %= whole
        assert R128.to_ints(numbers).tolist() == [x % (1 << 128) for x in joined]
        assert min(joined) > whole >> 41
        assert max(joined) < whole - (whole >> 41)


def test_each_batch_has_a_key_of_its_own(two, monkeypatch):
    """An answer made of another batch's ciphertexts decrypts to nothing."""

    def run(session):
        encryption, keys = session.encryption, [session.encryption.key(MOVING)]
        make = encryption.make_key

        def made(holder):
            make(holder)
            keys.append(encryption.key(holder))

        monkeypatch.setattr(encryption, "make_key", made)
        used = []
        for verb, place in (("answer", -1), ("read", -1)):
            inner = getattr(encryption, verb)

            def noted(*args, inner=inner, place=place, **options):
                key = args[place] if isinstance(args[place], bfv.SecretKey) else None
                used.append(key or encryption.key(MOVING))
                return inner(*args, **options)

            monkeypatch.setattr(encryption, verb, noted)
        factors, parts = session.multiplications.take(3 * BATCH)
        assert len(set(keys)) == 4
        primes = len(SMALL_PRIMES)
        assert used == [key for key in keys[1:] for _ in range(primes)]
        return factors, parts

    (a, p), (b, q) = two(run)
    assert (R128.add(p, q) == R128.mul(a, b)).all()


def test_keys_of_batches_are_forgotten(two):
    def run(session):
        session.multiplications.reserve(2 * BATCH)
        return len(session.encryption._before)

    assert two(run) == [2, 2]


def test_bytes_are_those_that_are_said(duo, tap, payload_bytes, outcomes):
    outcomes(duo, lambda session: session.encryption and None)
    frames = tap(duo)
    outcomes(duo, lambda session: session.multiplications.reserve(1))
    each = bfv.CIPHERTEXT + bfv.SEED_BYTES + bfv.response_bytes(2)
    key = bfv.CIPHERTEXT + bfv.SEED_BYTES
    assert payload_bytes(frames) == len(SMALL_PRIMES) * each + key
    assert round(payload_bytes(frames) / BATCH) == 420
    frames.clear()
    outcomes(duo, lambda session: session.multiplications.reserve(BATCH))
    assert not frames
    for terms, stated in ((2, 308), (8, 224)):
        outcomes(
            duo, lambda session, k=terms: session.multiplications.reserve(BATCH, k)
        )
        assert round(payload_bytes(frames) / BATCH / terms) == stated
        frames.clear()
