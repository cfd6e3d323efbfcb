"""Bits, logarithms and mutual information of shared numbers."""

import math

import numpy as np
import pytest
from scipy import stats

import dipy_ppir.align.parzenhist  # noqa: F401, declares what is opened
from dipy_ppir.mpc import boolean, logarithm as module
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.boolean import Words, add_modulo, and_all, normalize
from dipy_ppir.mpc.fields import P61, P127
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
from dipy_ppir.mpc.protocols import share_elements
from dipy_ppir.mpc.session import run_trio
from dipy_ppir.mpc.transport import DATA

ALL = (MOVING, STATIC, HELPER)
P = P61.modulus

EDGES = [1, 2, 3, P - 1, P - 2, P // 2, P // 2 + 1]
EDGES += [v for k in range(2, 61) for v in (2**k - 1, 2**k, 2**k + 1) if v < P]
EDGES += [2**24 - 1, 2**24 + 1, 2**25 - 1, (2**24 - 1) << 30, ((2**25 - 1) << 30) + 1]


def share_ints(session, values):
    x = P61.from_ints(values) if session.pid == STATIC else None
    part = share_elements(session, STATIC, x, (len(values),), P61, "numbers")
    return SharedArray(P61, part, 1, 0, P // 2)


def random_ints(n, seed=0):
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, 61, n)
    return [int(rng.integers(1 << (b - 1), 1 << b)) for b in bits]


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
    expected = [a & b, a | b, a ^ b, a << np.uint64(5), a >> np.uint64(7), a ^ np.uint64(255)]
    expected += [third, np.uint64(0) - third, parity, a & b, b]
    for i, value in enumerate(expected):
        assert together([r[i] for r in results]) == value.tolist(), i


def test_addition_modulo_p(three):
    pairs = [(0, 0), (P - 1, 1), (P - 1, P - 1), (1, P - 1), (0, P - 1), (5, 7)]
    pairs += [(2**60, 2**60), (2**60 - 1, 2**60), (2**60 - 1, 2**60 + 1)]
    pairs += list(zip(random_ints(200, 1), random_ints(200, 2), strict=True))
    first = np.array([a for a, _ in pairs], dtype=np.uint64)
    second = np.array([b for _, b in pairs], dtype=np.uint64)

    def party(session):
        zero = np.zeros_like(first)
        a = first if session.pid == MOVING else zero
        b = second if session.pid == STATIC else zero
        total, wrapped = add_modulo(session, a, b)
        return total.bits, wrapped.bits

    results = three(party)
    assert together([r[0] for r in results]) == [(a + b) % P for a, b in pairs]
    assert together([r[1] for r in results]) == [int(a + b >= P) for a, b in pairs]


def test_normalize(three):
    values = EDGES + random_ints(100) + [2**63, 2**64 - 1]

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


def test_ands_cost_five_words(trio):
    n = 100

    def party(session):
        with session.phase("and"):
            halves(session, [1] * n) & halves(session, [3] * n)
        return session.ledger.sent_by_phase()["and"]

    assert sum(run_trio(trio, party)) == 5 * 8 * n
    assert "5 words per 64 gates" in boolean.__doc__


# -- taking numbers apart ----------------------------------------------------


def test_take_apart_is_exact(three):
    values = EDGES + random_ints(200)

    def party(session):
        bits = take_apart(session, share_ints(session, values))
        return [
            P127.to_ints(session.open(a, "test-any", ALL, raw=True)).tolist()
            for a in (bits.integer, bits.exponent, bits.mantissa)
        ]

    for integer, exponent, mantissa in three(party):
        for i, v in enumerate(values):
            top = v.bit_length() - 1
            assert integer[i] == v
            assert exponent[i] == top
            assert mantissa[i] == ((v << 63 - top) >> (63 - MANTISSA_BITS)) - (1 << MANTISSA_BITS)


def test_taken_apart_again_with_other_masks(three):
    """The same numbers many times: every split into two parts is right."""
    values = [1, P - 1, P // 2] * 300

    def party(session):
        bits = take_apart(session, share_ints(session, values))
        return P127.to_ints(session.open(bits.integer, "test-any", ALL, raw=True)).tolist()

    assert three(party)[MOVING] == values


# -- logarithms --------------------------------------------------------------


def test_polynomial():
    u = np.linspace(0, 1, 100_001)
    powers = u[:, None] ** np.arange(1, len(COEFFICIENTS) + 1)
    error = np.abs(powers @ (COEFFICIENTS / 2.0**COEFFICIENT_BITS) - np.log1p(u))
    assert error.max() < 4e-7
    assert error[0] == 0
    assert np.abs(COEFFICIENTS).max() < 2.0 ** (COEFFICIENT_BITS + 1), "rounding would grow"


#: What the module's docstring promises.
ERROR_BOUND = 2e-7 + 2.0**-22


def test_logarithm(three):
    values = EDGES + random_ints(2000)

    def party(session):
        logs = logarithm(session, take_apart(session, share_ints(session, values)))
        assert logs.field is P127
        assert logs.frac_bits == LOG_BITS
        return session.open(logs, "test-any", (MOVING,))

    error = np.abs(three(party)[MOVING] - np.array([math.log(v) for v in values]))
    assert error.max() < ERROR_BOUND
    assert "2e-7 plus 2**-22" in " ".join(module.__doc__.split())


def test_bytes_and_rounds_are_as_stated(trio):
    n = 500

    def party(session):
        array = share_ints(session, random_ints(n))
        with session.phase("bits"):
            bits = take_apart(session, array)
        with session.phase("log"):
            logarithm(session, bits)
        ledger = session.ledger
        return ledger.sent_by_phase(), ledger.rounds["bits"], ledger.rounds["log"]

    results = run_trio(trio, party)
    in_all = [sum(r[0].get(phase, 0) for r in results) / n for phase in ("bits", "log")]
    # 8 to hide the helper's part, 26 ANDs of 40, 31 bits of 2 elements and 3 sums
    # of 3, 16 bytes each, and 2 elements for the number itself
    assert in_all[0] == 8 + 26 * 40 + 16 * (31 * 2 + 3 * 3 + 2)
    assert in_all[1] == 24 * 16, "24 elements: 8 truncations of 3"
    stated = " ".join(module.__doc__.split())
    assert "26 words of AND (1,040 bytes)" in stated
    assert "31 bits brought to arithmetic shares (992 bytes)" in stated
    assert "2.6 kB" in stated
    assert abs(sum(in_all) - 2600) < 50


def test_what_is_sent_is_uniform(trio, tap):
    n = 4000
    frames = tap(trio)

    def party(session):
        logarithm(session, take_apart(session, share_ints(session, [1] * n)))

    run_trio(trio, party)
    data = [f for f in frames if f[2] == DATA]
    assert len(data) > 60
    for i, (*_, payload) in enumerate(data):
        words = np.frombuffer(payload, dtype=np.uint64)
        low = words[::2] if len(words) % (2 * n) == 0 else words
        counts = np.bincount((low & np.uint64(15)).astype(np.int64), minlength=16)
        assert stats.chisquare(counts).pvalue > 1e-8, i


# -- mutual information ------------------------------------------------------


def clear_mi(table):
    joint = table[:-1] / table[:-1].sum()
    product = joint.sum(axis=1)[:, None] * (table[-1] / table[-1].sum())
    known = joint > 0
    return (joint[known] * np.log(joint[known] / product[known])).sum()


@pytest.mark.parametrize("kind", ["random", "sparse", "one cell"])
def test_mutual_information(three, kind):
    bins, categories, frac_bits, n = 12, 8, 30, 3000
    rng = np.random.default_rng(2)
    cells = rng.random((bins, categories)) ** 4
    if kind == "sparse":
        cells *= rng.random(cells.shape) < 0.3
    if kind == "one cell":
        cells[...] = 0
        cells[3, 3] = 1
    counts = rng.multinomial(n, cells.reshape(-1) / cells.sum()).reshape(cells.shape)
    table = np.vstack([counts, counts.sum(axis=0)]).astype(float)

    def party(session):
        x = P61.encode(table, frac_bits, n) if session.pid == STATIC else None
        part = share_elements(session, STATIC, x, table.shape, P61, "table")
        shared = SharedArray(P61, part, 2, frac_bits, n << frac_bits)
        result = mutual_information(
            session, shared, "metric_value", "sample_count", (MOVING,)
        )
        ratio = session.open(result.log_ratio, "test-any", (MOVING,))
        return result.value, result.count, ratio

    results = three(party)
    value, count, ratio = results[MOVING]
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


def test_an_empty_table_has_no_information(three):
    def party(session):
        x = P61.zeros((4, 3)) if session.pid == STATIC else None
        part = share_elements(session, STATIC, x, (4, 3), P61, "table")
        shared = SharedArray(P61, part, 2, 20, 100 << 20)
        return mutual_information(
            session, shared, "metric_value", "sample_count", (MOVING,)
        )[:2]

    assert three(party)[MOVING] == (0.0, 0.0)
