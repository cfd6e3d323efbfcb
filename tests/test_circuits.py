"""Boolean circuits on secret bits of two owners."""

import numpy as np
from oblivious import use_known_products
from parties import run_trio
import pytest

from dipy_ppir.mpc import bitslices, circuits
from dipy_ppir.mpc.fields import P61, R32, R64, R128
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.pair import PairSession

ENCRYPTED = PairSession.multiplications


@pytest.fixture(autouse=True)
def known_products(monkeypatch):
    use_known_products(monkeypatch)


def halves(session, bits, seed=0):
    """This owner's part of bits."""
    mask = np.random.default_rng(seed + 99).integers(0, 256, bits.shape, np.uint8)
    return mask if session.pid == STATIC else bits ^ mask


def parts(session, words, ring):
    """This owner's part of words."""
    mask = np.empty(words.shape, ring.dtype)
    mask[...] = np.random.default_rng(8).integers(
        0, np.iinfo(ring.dtype).max, words.shape, ring.dtype, endpoint=True
    )
    return mask if session.pid == STATIC else ring.sub(words, mask)


def some_bits(*shape, seed=1):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def together(results):
    return results[MOVING] ^ results[STATIC]


def measured(duo, depth, tap, function):
    """What both got, the rounds, the bytes and transfers in each direction."""

    def prepare(session):
        for sender in (MOVING, STATIC):
            session.transfers.reserve(1 << 16, sender)

    run_trio(duo, prepare)
    rounds, frames = depth(duo), tap(duo)
    results = run_trio(duo, function)
    used = sum((1 << 16) - duo[0].transfers.left(p) for p in (MOVING, STATIC))
    return results, rounds(), sum(len(f[4]) for f in frames), used


def test_products_of_own_bits(duo, depth, tap):
    bits = some_bits(2, 5, 6)
    results, rounds, size, used = measured(
        duo, depth, tap, lambda s: circuits.own_and(s, bits[s.pid])
    )
    assert (together(results) == (bits[0] & bits[1])).all()
    assert (rounds, size, used) == (1, 2 * 30, 8 * 30)


def test_products_of_secret_bits(duo, depth, tap):
    x, y = some_bits(4, 6), some_bits(4, 6, seed=2)
    results, rounds, size, used = measured(
        duo, depth, tap, lambda s: circuits.and_(s, halves(s, x), halves(s, y, 1))
    )
    assert (together(results) == (x & y)).all()
    assert (rounds, size, used) == (1, 4 * 24, 16 * 24)


@pytest.mark.parametrize("k", [1, 7, 8, 9, 128])
def test_strings_that_bits_select(duo, depth, tap, k):
    x, y = some_bits(3, 4), some_bits(k, 3, 4, seed=2)
    results, rounds, size, used = measured(
        duo, depth, tap, lambda s: circuits.select(s, halves(s, x), halves(s, y, 1))
    )
    assert (together(results) == (x & y)).all()
    assert (rounds, size, used) == (1, 2 * (k + 1) * 12, 2 * 96)


def test_strings_that_are_too_long(duo):
    with pytest.raises(ValueError, match="1 to 128 bits, not 129"):
        circuits.select(duo[0], some_bits(1), some_bits(129, 1))


def test_what_does_not_fit_is_refused_before_anything_is_sent(duo, tap):
    frames = tap(duo)
    with pytest.raises(ValueError, match=r"\(2,\) select no strings of shape \(3,\)"):
        circuits.select(duo[0], some_bits(2), some_bits(4, 3))
    with pytest.raises(ValueError, match=r"no factors of words of shape \(8,\)"):
        circuits.times(duo[0], some_bits(2, 1), np.zeros(8, np.uint64), R64)
    with pytest.raises(ValueError, match="3 weights are not those of 2 bits"):
        circuits.weighted(duo[0], some_bits(2, 1), [1, 2, 3], R64, 8)
    assert not frames


EDGES = {
    32: [0, 1, -1, (1 << 31) - 1, -(1 << 31), 5, -77, 0x12345678],
    64: [0, 1, -1, (1 << 63) - 1, -(1 << 63), 1 << 32, -(1 << 32), 3],
    128: [0, 1, -1, (1 << 127) - 1, -(1 << 127), 1 << 64, -(1 << 64), 9],
}


def numbers(ring, more=16):
    rng = np.random.default_rng(3)
    words = ring.from_ints(EDGES[ring.bits])
    rest = rng.integers(0, 256, (more, ring.nbytes), np.uint8).view(ring.dtype)
    return np.concatenate([words, rest.reshape(ring.storage((more,)))])


@pytest.mark.parametrize(
    ("ring", "bits", "rounds", "transfers", "size"),
    [
        (R32, 32, 6, 113, 49.75),
        (R64, 64, 7, 239, 117.5),
        (R128, 128, 8, 493, 269.25),
        (R128, 104, 8, 397, 214.25),
        (R32, 13, 5, 38, 13.75),
        (R64, 3, 2, 4, 1.25),
        (R64, 2, 1, 1, 0.25),
        (R32, 1, 0, 0, 0),
    ],
)
def test_bits_of_sums_of_words(duo, depth, tap, ring, bits, rounds, transfers, size):
    words = numbers(ring)
    results, depth, sent, used = measured(
        duo,
        depth,
        tap,
        lambda s: circuits.bits_of(s, parts(s, words, ring), ring, bits),
    )
    assert (together(results) == bitslices.words_sliced(words, ring, bits)).all()
    assert (depth, used, sent) == (rounds, *np.array([transfers, size]) * len(words))


@pytest.mark.parametrize(
    ("ring", "bits", "rounds"),
    [
        (R32, 32, 6),
        (R64, 64, 7),
        (R128, 128, 8),
        (R128, 97, 8),
        (R64, 2, 1),
        (R64, 7, 4),
    ],
)
def test_signs(duo, depth, tap, ring, bits, rounds):
    words = numbers(ring)
    results, depth, size, used = measured(
        duo,
        depth,
        tap,
        lambda s: circuits.negative(s, parts(s, words, ring), ring, bits),
    )
    assert (together(results) == bitslices.words_sliced(words, ring, bits)[-1]).all()
    assert (depth, used) == (rounds, (3 * bits - 5) * len(words))
    assert 8 * size == (2 * (bits - 1) + 2 * 3 * (bits - 2)) * len(words)


def plain_highest(bits, n):
    flags = bitslices.spread(bits, n)
    onehot = np.zeros_like(flags)
    for i in range(n):
        if flags[:, i].any():
            onehot[np.flatnonzero(flags[:, i])[-1], i] = True
    return onehot


@pytest.mark.parametrize(
    ("k", "transfers", "size"),
    [(1, 0, 0), (2, 2, 0.5), (5, 8, 2.25), (32, 62, 27.75), (64, 126, 63.75)],
)
def test_the_highest_bit(duo, depth, tap, k, transfers, size):
    flags = np.random.default_rng(4).random((k, 64)) < 0.2
    flags[:, 0], flags[:, 1], flags[:, 2] = False, True, np.arange(k) == 0
    bits = bitslices.packed(flags)
    results, rounds, sent, used = measured(
        duo, depth, tap, lambda s: circuits.highest(s, halves(s, bits))
    )
    assert (bitslices.spread(together(results), 64) == plain_highest(bits, 64)).all()
    assert rounds == int(np.ceil(np.log2(k)))
    assert (used, sent) == (64 * transfers, 64 * size)


@pytest.mark.parametrize("k", [1, 2, 9])
def test_whether_any_bit_is_set(duo, depth, tap, k):
    bits = some_bits(k, 8)
    bits &= some_bits(k, 8, seed=2) & some_bits(k, 8, seed=3)
    results, rounds, sent, used = measured(
        duo, depth, tap, lambda s: circuits.any_set(s, halves(s, bits))
    )
    assert (together(results) == np.bitwise_or.reduce(bits)).all()
    assert rounds == int(np.ceil(np.log2(k)))
    assert (used, sent) == (2 * (k - 1) * 64, (k - 1) / 2 * 64)


def number_of(bits, n):
    """Numbers by their bits."""
    flags = bitslices.spread(bits, n).astype(np.int64)
    return (flags << np.arange(len(flags))[:, None]).sum(axis=0)


@pytest.mark.parametrize(("k", "kept"), [(32, 12), (32, 40), (5, 4), (1, 3), (47, 46)])
def test_the_bits_below_the_highest(duo, depth, tap, k, kept):
    flags = np.random.default_rng(5).random((k, 64)) < 0.3
    flags[:, 0], flags[:, 1], flags[:, 2] = False, True, np.arange(k) == 0
    flags[:, 3] = np.arange(k) == k - 1
    bits, onehot = (
        bitslices.packed(flags),
        bitslices.packed(plain_highest(bitslices.packed(flags), 64)),
    )

    def run(session):
        some = halves(session, bits), halves(session, onehot, 1)
        return circuits.normalized(session, *some, kept)

    results, rounds, sent, used = measured(duo, depth, tap, run)
    got = together(results)
    assert got.shape == (kept, 8)
    steps = (k - 1).bit_length()
    assert (rounds, used) == (steps, 2 * steps * 64)
    assert sent == (k + 1) / 4 * steps * 64
    for i, below in enumerate(number_of(got, 64)):
        number = sum(1 << int(b) for b in np.flatnonzero(flags[:, i]))
        if number:
            shift = kept - (number.bit_length() - 1)
            whole = number << shift if shift > 0 else number >> -shift
            assert below == whole & ((1 << kept) - 1)
        else:
            assert below == 0


def test_where_the_highest_bit_is():
    flags = plain_highest(some_bits(9, 8), 64)
    flags[:, 5] = False
    places = number_of(circuits.position(bitslices.packed(flags)), 64)
    assert (places == (flags * np.arange(9)[:, None]).sum(axis=0)).all()
    values = [5, 0, 3, 1000, 7, 2, 2, 1, 4]
    got = number_of(circuits.position(bitslices.packed(flags), values), 64)
    assert (got == (flags * np.array(values)[:, None]).sum(axis=0)).all()
    with pytest.raises(ValueError, match="9 numbers from 0"):
        circuits.position(bitslices.packed(flags), values[1:])


@pytest.mark.parametrize(
    ("k", "rounds", "transfers", "size"),
    [
        (1, 0, 0, 0),
        (2, 1, 2, 0.5),
        (3, 2, 4, 1.5),
        (4, 2, 10, 4),
        (5, 3, 12, 8),
        (6, 3, 18, 16.5),
    ],
)
def test_public_functions_of_a_few_bits(duo, depth, tap, k, rounds, transfers, size):
    bits = some_bits(k, 8)
    values = np.random.default_rng(6).integers(0, 1 << 20, 1 << k)
    results, depth, sent, used = measured(
        duo, depth, tap, lambda s: circuits.table(s, halves(s, bits), values)
    )
    argument = number_of(bits, 64)
    assert (number_of(together(results), 64) == values[argument]).all()
    assert (depth, used, sent) == (rounds, transfers * 64, size * 64)


def test_which_number_a_few_bits_are(two):
    bits = some_bits(4, 8)
    got = together(two(lambda s: circuits.minterms(s, halves(s, bits))))
    rows = bitslices.spread(got, 64)
    assert (rows == (np.arange(16)[:, None] == number_of(bits, 64))).all()


def test_functions_of_too_many_values(duo):
    with pytest.raises(ValueError, match="8 values from 0"):
        circuits.table(duo[0], some_bits(3, 1), range(7))


@pytest.mark.parametrize("ring", [R32, R64, R128])
def test_bits_as_words(duo, depth, tap, ring):
    n = 29
    bits = some_bits(3, 4)
    results, rounds, size, used = measured(
        duo, depth, tap, lambda s: circuits.arithmetic(s, halves(s, bits), ring, n)
    )
    total = ring.to_ints(ring.add(*results))
    assert (total == bitslices.spread(bits, n)).all()
    assert (rounds, used) == (1, 3 * n)
    assert size == 3 * n * ring.nbytes + -(-3 * n // 8)


def test_numbers_by_their_bits(two):
    words = numbers(R64)
    bits = bitslices.words_sliced(words, R64, 64)
    weights = [1 << i for i in range(63)] + [-(1 << 63)]
    results = two(
        lambda s: circuits.weighted(s, halves(s, bits), weights, R128, len(words))
    )
    total = R128.to_ints(R128.add(*results))
    assert (total == [int(w) % R128.modulus for w in words.view(np.int64)]).all()


def test_bits_are_not_made_elements_of_a_field(duo):
    with pytest.raises(ValueError, match="in a ring"):
        circuits.arithmetic(duo[0], some_bits(1), P61, 8)


@pytest.mark.parametrize("ring", [R32, R64, R128])
def test_products_of_bits_and_words(duo, depth, tap, ring):
    words = np.stack([numbers(ring, 13), numbers(ring, 13)[::-1]])
    n = words.shape[1]
    bits = some_bits(2, 3)

    def run(session):
        return circuits.times(
            session, halves(session, bits), parts(session, words, ring), ring
        )

    results, rounds, size, used = measured(duo, depth, tap, run)
    flags = bitslices.spread(bits, n)
    total = ring.to_ints(ring.add(*results))
    assert (total == np.where(flags, ring.to_ints(words), 0)).all()
    assert (rounds, used) == (1, 2 * 2 * n)
    assert size == 2 * (2 * n * ring.nbytes + -(-2 * n // 8))


@pytest.mark.parametrize(
    ("ring", "bits", "target", "rounds"),
    [(R32, 32, R128, 7), (R32, 11, R64, 6), (R64, 48, R128, 8), (R128, 63, R64, 8)],
)
def test_numbers_in_a_larger_ring(duo, depth, tap, ring, bits, target, rounds):
    half = 1 << bits - 1
    values = [0, 1, -1, half - 1, -half, 5 - half, 77, -300]
    words = ring.from_ints(values)

    def run(session):
        return circuits.lifted(session, parts(session, words, ring), ring, bits, target)

    results, depth, sent, used = measured(duo, depth, tap, run)
    want = [value % target.modulus for value in values]
    assert target.to_ints(target.add(*results)).tolist() == want
    assert (depth, used) == (rounds, (3 * bits - 1) * 8)
    assert sent == (bits + target.nbytes - 5 / 8) * 8


@pytest.mark.parametrize(("bits", "target"), [(33, R64), (32, R32), (0, R64)])
def test_rings_that_are_not_larger(duo, bits, target):
    with pytest.raises(ValueError, match="do not become more"):
        circuits.lifted(duo[0], np.zeros(8, np.uint32), R32, bits, target)


def test_step_functions(duo, depth, tap):
    values = [-(1 << 90), -7, -6, -1, 0, 5, 6, 1 << 90]
    words = R128.from_ints(values)
    thresholds, jumps = [-6, 0, 6], [3, -1, 10]

    def run(session):
        part = parts(session, words, R128)
        return circuits.steps(
            session, part, R128, 104, thresholds, jumps, R64, len(values)
        )

    results, rounds, sent, used = measured(duo, depth, tap, run)
    want = [
        sum(j for t, j in zip(thresholds, jumps, strict=True) if v >= t) for v in values
    ]
    assert (R64.add(*results).view(np.int64) == want).all()
    assert (rounds, used) == (2 + 7, (3 * 104 - 4) * 3 * 8)
    assert sent == (104 - 1.625 + 8) * 3 * 8


def test_step_functions_of_few_numbers(two):
    def run(session):
        part = parts(session, R64.encode_int([3, -3, 70]), R64)
        return circuits.steps(session, part, R64, 40, [0, 64], [1, 5], R32, 3)

    assert (R32.add(*two(run)) == [1, 0, 6]).all()


def test_what_is_sent_is_uniform(duo, tap):
    """Whatever the secrets, and anew each time."""
    zeros = np.zeros((16, 64), np.uint8)

    def run(session):
        for _ in range(2):
            circuits.own_and(session, zeros)
            circuits.select(session, zeros[0], zeros)
            circuits.times(session, zeros, np.zeros((16, 512), np.uint64), R64)

    run_trio(duo, lambda s: [s.transfers.reserve(1 << 16, p) for p in (MOVING, STATIC)])
    frames = tap(duo)
    run_trio(duo, run)
    for pid in (MOVING, STATIC):
        sent = [np.frombuffer(f[4], np.uint8) for f in frames if f[0] == pid]
        assert len(sent) == 6
        for first, again in zip(sent[:3], sent[3:], strict=True):
            for message in (first, again, first ^ again):
                bits = np.unpackbits(message)
                assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(len(bits))


def test_circuits_that_stand_on_encryption(two, monkeypatch):
    monkeypatch.setattr(PairSession, "multiplications", ENCRYPTED)
    values = [3, -(1 << 31), (1 << 31) - 1, 0, -1]

    def run(session):
        part = parts(session, R32.encode_int(values), R32)
        return circuits.lifted(session, part, R32, 32, R128)

    assert (R128.decode(R128.add(*two(run)), 0) == values).all()
