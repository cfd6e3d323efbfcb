"""Functions of positive integers on shares of two owners, against NumPy's."""

from noise import check_uniform
import numpy as np
from numpy.testing import assert_array_equal
from oblivious import use_known_products
from parties import run_trio
import pytest

from dipy_ppir.mpc import circuits
from dipy_ppir.mpc.fields import R64, R128
from dipy_ppir.mpc.frame import operation_code
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.pairfunctions import (
    FINE_BITS,
    LOGARITHM,
    RECIPROCAL,
    evaluated,
    lifted,
    normalized,
    split,
)


@pytest.fixture(autouse=True)
def products(monkeypatch):
    use_known_products(monkeypatch)


def words_of(session, values, seed=2):
    """This owner's word of each of some numbers, modulo 2**64."""
    mask = np.random.default_rng(seed).integers(0, 1 << 64, len(values), np.uint64)
    values = np.asarray(values, dtype=np.int64).view(np.uint64)
    return values - mask if session.pid == MOVING else mask


def total(results, n):
    """Signed numbers of both owners' parts modulo 2**128."""
    whole = R128.to_ints(R128.add(*(part[n] for part in results)))
    return np.array([int(v) - (int(v) >> 127 << 128) for v in whole])


def numbers(bits, n=400, seed=3):
    """Integers from 1 of every size, and those beside powers of two."""
    rng = np.random.default_rng(seed)
    powers = 1 << np.arange(bits)
    some = np.exp(rng.uniform(0, bits * np.log(2), n)).astype(np.int64)
    every = np.concatenate([powers, powers - 1, powers + 1, some])
    return every[(every > 0) & (every < 1 << bits)]


@pytest.mark.parametrize("bits", [5, 20, 30])
def test_numbers_are_taken_apart(two, bits):
    v = numbers(bits)
    low = np.uint64((1 << bits) - 1)

    def run(session):
        found = normalized(session, words_of(session, v) & low, bits)
        return R128.flat(found.places), found.power, found.fraction

    results = two(run)
    place = np.floor(np.log2(v)).astype(int)
    places = total(results, 0).reshape(bits, len(v))
    assert_array_equal(places, np.arange(bits)[:, None] == place)
    assert_array_equal(total(results, 1), 1 << (bits - 1 - place))
    fraction = results[MOVING][2] + results[STATIC][2] & low
    assert_array_equal(fraction, v << (bits - 1 - place))


@pytest.mark.parametrize("bits", [12, 30])
def test_functions_of_place(two, bits):
    v, values = numbers(bits), [k * k - 3 for k in range(bits)]
    low = np.uint64((1 << bits) - 1)

    def run(session):
        found = normalized(session, words_of(session, v) & low, bits)
        return (found.of_place(values),)

    place = np.floor(np.log2(v)).astype(int)
    assert_array_equal(total(two(run), 0), np.array(values)[place])


@pytest.mark.parametrize("bits", [12, 30])
def test_polynomials_of_what_is_normalized(two, bits):
    """The owners' highest bits come in all four ways, at both ends of the range."""
    rng = np.random.default_rng(1)
    half = 1 << bits - 1
    x = rng.integers(half, 2 * half, 3000)
    x[:200], x[200:400] = half, 2 * half - 1
    low = np.uint64((1 << bits) - 1)

    def run(session):
        some = words_of(session, x) & low
        first, second = evaluated(
            session, bits, (some, LOGARITHM), (some[:50], RECIPROCAL)
        )
        return first, second, some

    results = two(run)
    tops = [split(part[2], bits)[0] for part in results]
    assert len({*zip(*tops, strict=True)}) == 4
    unit = 2.0**-FINE_BITS
    assert np.abs(total(results, 0) * unit - np.log(x / half)).max() < 2e-6
    assert np.abs(total(results, 1) * unit - half / x[:50]).max() < 1e-6


@pytest.mark.parametrize("bits", [8, 48, 63])
def test_lifting_is_exact(two, bits):
    edge = (1 << bits - 2) - 1
    values = [0, 1, -1, edge, -edge, edge // 2, -(edge // 2)] * 300

    def run(session):
        words = words_of(session, values) & np.uint64((1 << bits) - 1)
        return (lifted(session, words, bits),)

    assert total(two(run), 0).tolist() == values


# -- cost and what crosses the wire ------------------------------------------------


def test_rounds_and_products_are_as_stated(duo, depth):
    n, bits = 64, 20
    v = numbers(bits)[:n]
    low = np.uint64((1 << bits) - 1)
    count, spent, taken = depth(duo), {}, []
    products = duo[0].multiplications
    take = products.take
    products.take = lambda n: taken.append(n) or take(n)

    def prepare(session):
        for sender in (MOVING, STATIC):
            session.transfers.reserve(1 << 16, sender)

    def circuit(session):
        words = words_of(session, v) & low
        circuits.highest(session, circuits.bits_of(session, words, R64, bits))

    def measure(name, function):
        before, made = count(), sum(taken)
        results = run_trio(duo, function)
        spent[name] = count() - before, sum(taken) - made
        return results

    run_trio(duo, prepare)
    measure("circuits", circuit)
    found = measure(
        "normalized", lambda s: normalized(s, words_of(s, v) & low, bits).fraction
    )
    for name, function in (("log", LOGARITHM), ("inverse", RECIPROCAL)):
        measure(name, lambda s, f=function: evaluated(s, bits, (found[s.pid], f)))
    measure("lifted", lambda s: lifted(s, words_of(s, v), 48))
    assert spent["normalized"] == (2 + spent["circuits"][0], 2 * n)
    assert spent["log"] == (1, (2 * 6 - 1) * n)
    assert spent["inverse"] == (1, (2 * 8 - 1) * n)
    assert spent["lifted"] == (1, n)


def test_what_is_sent_is_uniform(duo, tap):
    """Of numbers that are all alike."""
    n, bits = 4000, 20
    v = np.full(n, 777)
    low = np.uint64((1 << bits) - 1)
    frames = tap(duo)

    def run(session):
        words = words_of(session, v) & low
        found = normalized(session, words, bits)
        evaluated(session, bits, (found.fraction, LOGARITHM))
        lifted(session, words, bits)

    run_trio(duo, run)
    sent = [f for f in frames if f[3] == operation_code("factors")]
    assert {f[0] for f in sent} == {MOVING, STATIC}
    for f in sent:
        words = np.frombuffer(f[4], np.uint64)
        check_uniform([words >> np.uint64(60), words & np.uint64(15)])
