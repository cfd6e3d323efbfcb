"""Bits, logarithms and mutual information of shared numbers."""

import math

import numpy as np
import pytest
from scipy import stats

import dipy_ppir.align.parzenhist  # noqa: F401, declares what is opened
from dipy_ppir.mpc import boolean
from dipy_ppir.mpc import logarithm as module
from dipy_ppir.mpc.boolean import Words, add_words, and_all, normalize
from dipy_ppir.mpc.fields import P127, R64
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.logarithm import (
    COEFFICIENT_BITS,
    COEFFICIENTS,
    LOG_BITS,
    MANTISSA_BITS,
    WEIGHT_BITS,
    logarithm,
    mutual_information,
    take_apart,
)
from dipy_ppir.mpc.session import run_trio
from dipy_ppir.mpc.transport import DATA

ALL = (MOVING, STATIC, HELPER)
Q = R64.modulus

EDGES = [1, 2, 3, Q - 1, Q - 2, Q // 2 - 1, Q // 2, Q // 2 + 1]
EDGES += [v for k in range(2, 63) for v in (2**k - 1, 2**k, 2**k + 1)]
EDGES += [2**24 - 1, 2**24 + 1, 2**25 - 1, (2**24 - 1) << 30, ((2**25 - 1) << 30) + 1]


def random_ints(n, seed=0):
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, 64, n)
    return [int(rng.integers(1 << (b - 1), 1 << b)) for b in map(int, bits)]


def halves(session, words):
    """Words that both owners know, shared as x = random ^ rest."""
    words = np.array(words, dtype=np.uint64)
    mask = np.random.default_rng(5).integers(0, 2**64, len(words), dtype=np.uint64)
    own = {MOVING: mask, STATIC: words ^ mask, HELPER: np.zeros_like(words)}
    return Words(session, own[session.pid])


def together(results):
    return [int(a ^ b) for a, b in zip(results[MOVING], results[STATIC], strict=True)]


# -- words of bits -----------------------------------------------------------


def test_bit_operations(three):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(0, 2**64, 200, dtype=np.uint64) for _ in range(2))

    def party(session):
        x, y = halves(session, a), halves(session, b)
        results = [x & y, x | y, x ^ y, x << 5, x >> 7, x.flip(255), x.bit(3)]
        results += [x.bit(3).spread(), x.parity(0xF0F0)]
        results += and_all([(x, y), (y, y)])
        return [r.bits for r in results]

    results = three(party)
    one = np.uint64(1)
    third = a >> np.uint64(3) & one
    parity = np.array([bin(int(v) & 0xF0F0).count("1") % 2 for v in a], dtype=np.uint64)
    expected = [
        a & b,
        a | b,
        a ^ b,
        a << np.uint64(5),
        a >> np.uint64(7),
        a ^ np.uint64(255),
    ]
    expected += [third, np.uint64(0) - third, parity, a & b, b]
    for i, value in enumerate(expected):
        assert together([r[i] for r in results]) == value.tolist(), i


def test_sum_of_two_words(three):
    pairs = [(0, 0), (Q - 1, 1), (Q - 1, Q - 1), (1, Q - 1), (0, Q - 1), (5, 7)]
    pairs += [(2**63, 2**63), (2**63 - 1, 2**63), (2**63 - 1, 2**63 + 1)]
    pairs += [(Q - 2**k, 2**k) for k in range(64)]  # a carry through all the rest
    pairs += [(Q - 2**k, 2**k - 1) for k in range(64)]
    pairs += list(zip(random_ints(200, 1), random_ints(200, 2), strict=True))
    first = np.array([a for a, _ in pairs], dtype=np.uint64)
    second = np.array([b for _, b in pairs], dtype=np.uint64)

    def party(session):
        noise = np.full_like(first, session.pid + 3)
        a = first if session.pid == MOVING else noise
        b = second if session.pid == STATIC else noise
        total, wrapped = add_words(session, a, b)
        return total.bits, wrapped.bits

    results = three(party)
    assert together([r[0] for r in results]) == [(a + b) % Q for a, b in pairs]
    assert together([r[1] for r in results]) == [int(a + b >= Q) for a, b in pairs]


def test_normalize(three):
    values = EDGES + random_ints(100)

    def party(session):
        shifted, exponent = normalize(halves(session, values))
        return [shifted.bits, *(e.bits for e in exponent)]

    results = three(party)
    shifted = together([r[0] for r in results])
    bits = [together([r[1 + j] for r in results]) for j in range(6)]
    for i, v in enumerate(values):
        top = v.bit_length() - 1
        assert shifted[i] == v << (63 - top)
        assert sum(bits[j][i] << j for j in range(6)) == top


CIRCUITS = {
    # words of AND per number, and how deep
    "and": (1, 1, lambda s, x: x & x),
    "add_words": (12, 7, lambda s, x: add_words(s, x.bits, x.bits)),
    "normalize": (12, 12, lambda s, x: normalize(x)),
}


@pytest.mark.parametrize("name", CIRCUITS)
def test_ands_are_as_many_as_stated(trio, depth, name):
    n = 100
    words, deep, circuit = CIRCUITS[name]
    rounds = depth(trio)
    run_trio(trio, lambda s: circuit(s, halves(s, [5] * n)))
    assert sum(sum(s.ledger.sent.values()) for s in trio) == words * 5 * 8 * n
    assert rounds() == 1 + deep, "the helper's first words, then a round an AND"
    assert "AND: 1 round, 5 words per 64 gates" in boolean.__doc__
    if name != "and":
        stated = f"{deep} ANDs deep, {words} words of AND per number"
        assert stated in getattr(boolean, name).__doc__


# -- taking numbers apart ----------------------------------------------------


def test_take_apart_is_exact(three, ring_array):
    values = EDGES + random_ints(200)

    def party(session):
        bits = take_apart(session, ring_array(session, values))
        return [
            P127.to_ints(session.open(a, "test-any", ALL, raw=True)).tolist()
            for a in (bits.integer, bits.exponent, bits.mantissa)
        ]

    for integer, exponent, mantissa in three(party):
        for i, v in enumerate(values):
            top = v.bit_length() - 1
            assert integer[i] == v
            assert exponent[i] == top
            after = ((v << 63 - top) >> (63 - MANTISSA_BITS)) - (1 << MANTISSA_BITS)
            assert mantissa[i] == after


def test_taken_apart_again_with_other_masks(three, ring_array):
    """The same numbers many times: every split into two parts is right."""
    values = [1, Q - 1, Q // 2] * 300

    def party(session):
        integer = take_apart(session, ring_array(session, values)).integer
        return P127.to_ints(session.open(integer, "test-any", ALL, raw=True)).tolist()

    assert three(party)[MOVING] == values


# -- logarithms --------------------------------------------------------------


def test_polynomial():
    u = np.linspace(0, 1, 100_001)
    powers = u[:, None] ** np.arange(1, len(COEFFICIENTS) + 1)
    error = np.abs(powers @ (COEFFICIENTS / 2.0**COEFFICIENT_BITS) - np.log1p(u))
    assert error.max() < 4e-7
    assert error[0] == 0
    assert np.abs(COEFFICIENTS).max() < 2.0 ** (COEFFICIENT_BITS + 1), (
        "rounding would grow"
    )


#: What the module's docstring promises.
ERROR_BOUND = 2e-7 + 2.0**-22


def test_logarithm(three, ring_array):
    values = EDGES + random_ints(2000)

    def party(session):
        logs = logarithm(session, take_apart(session, ring_array(session, values)))
        assert logs.field is P127
        assert logs.frac_bits == LOG_BITS
        return session.open(logs, "test-any", (MOVING,))

    error = np.abs(three(party)[MOVING] - np.array([math.log(v) for v in values]))
    assert error.max() < ERROR_BOUND
    assert "2e-7 plus 2**-22" in " ".join(module.__doc__.split())


def test_bytes_and_rounds_are_as_stated(trio, depth, ring_array):
    n = 500
    rounds = depth(trio)
    arrays = [ring_array(s, random_ints(n)) for s in trio]
    bits = run_trio(trio, lambda s: take_apart(s, arrays[s.pid]))
    apart, deep = sum(sum(s.ledger.sent.values()) for s in trio), rounds()
    run_trio(trio, lambda s: logarithm(s, bits[s.pid]))
    taken = sum(sum(s.ledger.sent.values()) for s in trio) - apart
    # One part to the moving owner, the ANDs, 31 bits of which each owner shares its
    # half, the parts shared by the owners, 3 sums reduced; then 8 truncations.
    assert apart == n * (8 + 24 * 40 + (2 * 31 + 2 + 3 * 3) * 16)
    assert taken == n * 8 * 3 * 16
    assert "Rounds: %d. " % deep in take_apart.__doc__
    assert "Rounds: %d. " % (rounds() - deep) in logarithm.__doc__
    stated = " ".join(module.__doc__.split())
    assert "24 words of AND (960 bytes)" in stated
    assert "31 bits brought to arithmetic shares (992 bytes)" in stated
    assert "some 2.5 kB in all and %d rounds" % rounds() in stated
    assert abs(apart + taken - 2500 * n) < 50 * n


def test_what_is_sent_is_uniform(trio, tap, ring_array):
    n = 4000
    frames = tap(trio)

    def party(session):
        logarithm(session, take_apart(session, ring_array(session, [1] * n)))

    run_trio(trio, party)
    data = [f for f in frames if f[2] == DATA]
    assert len(data) > 60
    for i, (*_, payload) in enumerate(data):
        # n words at a time: a single bare array must not hide among several
        for words in np.frombuffer(payload, dtype=np.uint64).reshape(-1, n):
            for part in (words >> np.uint64(56) & np.uint64(15), words & np.uint64(15)):
                counts = np.bincount(part.astype(np.int64), minlength=16)
                assert stats.chisquare(counts).pvalue > 1e-8, i


# -- mutual information ------------------------------------------------------


def clear_mi(table):
    joint = table[:-1] / table[:-1].sum()
    product = joint.sum(axis=1)[:, None] * (table[-1] / table[-1].sum())
    known = joint > 0
    return (joint[known] * np.log(joint[known] / product[known])).sum()


@pytest.mark.parametrize("kind", ["random", "sparse", "one cell"])
def test_mutual_information(three, ring_array, kind):
    bins, categories, frac_bits, n = 12, 8, 30, 3000
    rng = np.random.default_rng(2)
    cells = rng.random((bins, categories)) ** 4
    if kind == "sparse":
        cells *= rng.random(cells.shape) < 0.3
    if kind == "one cell":
        cells[...] = 0
        cells[3, 3] = 1
    counts = rng.multinomial(n, cells.reshape(-1) / cells.sum()).reshape(cells.shape)
    table = np.vstack([counts, counts.sum(axis=0)])

    def party(session):
        shared = ring_array(
            session, table << frac_bits, frac_bits=frac_bits, bound=n << frac_bits
        )
        result = mutual_information(
            session, shared, "metric_value", "sample_count", (MOVING,)
        )
        ratio = result.log_ratio
        assert (ratio.field, ratio.degree) == (R64, 2)
        opened = session.open(ratio, "test-any", (MOVING,))
        return result.value, result.count, opened, ratio.share

    results = three(party)
    value, count, ratio, _ = results[MOVING]
    assert count == n
    assert abs(value - clear_mi(table)) < 2e-6
    rows = counts.sum(axis=1, keepdims=True)
    with np.errstate(all="ignore"):
        expected = np.log(counts / rows)
    known = counts > 0
    assert np.abs(ratio - expected)[known].max() < 2.0 ** (1 - WEIGHT_BITS)
    assert np.abs(ratio).max() < 45
    for pid in (STATIC, HELPER):
        assert results[pid][:2] == (None, None)
    # The logarithms stay with the owners.
    assert not results[HELPER][3].any()
    assert results[MOVING][3].all()
    assert results[STATIC][3].all()


def test_an_empty_table_has_no_information(three, ring_array):
    def party(session):
        zeros = np.zeros((4, 3), dtype=np.int64)
        shared = ring_array(session, zeros, frac_bits=20, bound=100 << 20)
        return mutual_information(
            session, shared, "metric_value", "sample_count", (MOVING,)
        )[:2]

    assert three(party)[MOVING] == (0.0, 0.0)
