"""Positions, logarithms and mutual information of shared numbers."""

import inspect
import math
import re

from noise import check_uniform, fix_randomness
import numpy as np
from parties import run_trio
import pytest

import dipy_ppir.align.parzenhist  # noqa: F401, declares what is opened
from dipy_ppir.mpc import logarithm as module
from dipy_ppir.mpc import normalize as normal
from dipy_ppir.mpc import numbers, protocols, reciprocal, smooth
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R32, R64, R128
from dipy_ppir.mpc.frame import DATA, operation_code
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.logarithm import (
    DEGREES,
    VALUE_DIGITS,
    WEIGHT_BITS,
    deal_masks,
    deal_table,
    logarithm,
    mutual_information,
)
from dipy_ppir.mpc.normalize import number_bits, open_masked
from dipy_ppir.mpc.protocols import truncate_unseen
from dipy_ppir.mpc.smooth import FINE_BITS, open_normalized

ALL = (MOVING, STATIC, HELPER)
RINGS = {"words of 32 bits": R32, "words of 64 bits": R64}
LARGEST = (1 << number_bits(R64)) - 1


@pytest.fixture(params=RINGS)
def ring(request):
    return RINGS[request.param]


def edges(ring=R64):
    bits = number_bits(ring)
    values = [1, 2, 3, (1 << bits) - 2, (1 << bits) - 1]
    values += [v for k in range(2, bits) for v in (2**k - 1, 2**k, 2**k + 1)]
    return values + [3 << k for k in range(bits - 1)]


def random_ints(n, seed=0, ring=R64):
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, number_bits(ring) + 1, n)
    return [int(rng.integers(1 << (b - 1), 1 << b)) for b in map(int, bits)]


def array_of(session, values, ring):
    """One party's part of numbers in a ring."""
    parts = np.random.default_rng(3).integers(
        0, 1 << ring.bits, (3, len(values)), np.uint64
    )
    parts = parts.astype(ring.dtype)
    parts[MOVING] = ring.from_ints(values) - parts[STATIC] - parts[HELPER]
    return SharedArray(ring, parts[session.pid], 2, 0, (1 << number_bits(ring)) - 1)


# -- positions ---------------------------------------------------------------


def scaled(session, numbers):
    """Opened positions and scaled numbers of a shared array."""
    ring, n = numbers.field, len(numbers.share)
    masks = normal.deal_masks(session, n, ring)
    masked = open_masked(session, numbers)()
    exponent, product = R128.zeros((n,)), ring.zeros((n,))
    if session.pid != HELPER:
        position = normal.position_of(session, masked, masks)
        exponent = normal.exponent_of(session, position, masks)
        product = normal.scaled_by(masked, position, masks)
    exponent = SharedArray(R128, exponent, 2, 0, 64)
    product = SharedArray(ring, product, 2, 0, ring.modulus // 2 - 1)
    position = session.open(exponent, "test-any", (MOVING,))
    return position, session.open(product, "test-any", (MOVING,), raw=True)


def check_scaled(values, positions, products, ring=R64):
    for v, k, product in zip(values, positions, products, strict=True):
        assert int(k) in (v.bit_length() - 1, v.bit_length())
        assert int(product) == v << ring.bits - 1 - int(k)


def test_normalize(three, ring):
    values = edges(ring) + random_ints(500, ring=ring)

    def party(session):
        return scaled(session, array_of(session, values, ring))

    check_scaled(values, *three(party)[MOVING], ring)


def test_normalize_with_many_masks(three, ring):
    bits = number_bits(ring)
    values = [1, 2, (1 << bits) - 1, 1 << bits - 1, (1 << bits // 2) - 1] * 1000

    def party(session):
        return scaled(session, array_of(session, values, ring))

    check_scaled(values, *three(party)[MOVING], ring)


def test_functions_of_the_position_are_looked_up(three, ring):
    """For every position that a number can have."""
    values = edges(ring)
    function = [(-1) ** k * (1 << k) for k in range(ring.bits)]

    def party(session):
        n = len(values)
        masks = normal.deal_masks(session, n, ring)
        table = normal.deal_function(session, masks.position, ring, function)
        masked = open_masked(session, array_of(session, values, ring))()
        found = exponent = R128.zeros((n,))
        if session.pid != HELPER:
            position = normal.position_of(session, masked, masks)
            found = normal.look_up(position, table)
            exponent = normal.exponent_of(session, position, masks)
        return [
            session.open(SharedArray(R128, a, 2, 0, 1 << 64), "test-any", (MOVING,))
            for a in (found, exponent)
        ]

    found, positions = three(party)[MOVING]
    assert [int(f) for f in found] == [function[int(k)] for k in positions]


@pytest.mark.parametrize("number", [0, (1 << 64) - 1, 1 << 63, 5, (1 << 40) - 1])
def test_normalize_with_chosen_masks(three, ring_array, monkeypatch, number):
    """Masks that a run would never draw, as 0: long runs of carries."""
    values = edges()

    def pad(session, name, shape, *args):
        drawn = inner(session, name, shape, *args)
        if name == "number":
            drawn[...] = number if session.pid != STATIC else 0
        return drawn

    inner = normal.pad
    monkeypatch.setattr(normal, "pad", pad)

    def party(session):
        return scaled(session, ring_array(session, values, bound=LARGEST))

    check_scaled(values, *three(party)[MOVING])


def test_numbers_that_could_be_too_large_are_refused(trio, outcomes, tap, ring_array):
    frames = tap(trio)

    def party(session):
        array = ring_array(session, [1], bound=LARGEST + 1)
        open_masked(session, array)

    for error in outcomes(trio, party):
        assert isinstance(error, FixedPointOverflowError)
    assert not [f for f in frames if f[2] == DATA]


# -- logarithms --------------------------------------------------------------


FUNCTIONS = {
    "ln, 18": (np.log, DEGREES[R64], 5e-12, 1e-14),
    "ln, 12": (np.log, DEGREES[R32], 1e-7, 1e-9),
    "reciprocal, 12": (np.reciprocal, reciprocal.DEGREE, 3e-7, 1e-8),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_polynomials(name):
    function, degree, worst, others = FUNCTIONS[name]
    table = smooth.polynomials(function, degree)
    powers = np.arange(degree + 1)
    for column, h in enumerate((4, 1, 2, 3)):
        x = np.linspace(max(h - 1, 1), min(h + 1, 4), 100_001)
        approximate = (x - h)[:, None] ** powers @ table[:, column]
        error = np.abs(approximate - function(x)).max()
        assert error < (worst if h == 2 else others), h


def logarithms(session, values, ring=R64):
    n = len(values)
    masks = deal_masks(session, n, 1, ring)
    masked = open_masked(session, array_of(session, values, ring))()
    opened = open_normalized(session, masked, masks.normal, masks.fraction)
    return logarithm(session, opened, n, masks)


#: What the module's docstring promises. The masks decide how large an error can be:
#: with fresh ones an error is larger once in 1e8 numbers.
ERROR_BOUND = {R64: 4e-11, R32: 1e-6}


@pytest.fixture
def fixed(monkeypatch):
    """The same masks in every run."""
    fix_randomness(monkeypatch)


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("name", RINGS)
@pytest.mark.parametrize("kind", ["all", "many masks"])
def test_logarithm(three, name, kind):
    ring = RINGS[name]
    if kind == "all":
        values = edges(ring) + random_ints(3000, ring=ring)
    else:
        values = [1, 3, (1 << number_bits(ring)) - 1, 1 << ring.bits // 2] * 1000

    def party(session):
        logs = logarithms(session, values, ring)
        assert logs.field is R128
        assert logs.frac_bits == FINE_BITS
        return session.open(logs, "test-any", (MOVING,))

    error = np.abs(three(party)[MOVING] - np.array([math.log(v) for v in values]))
    assert error.max() < ERROR_BOUND[ring]
    stated = " ".join(module.__doc__.split())
    assert "below 4e-11 for words of 64 bits, 1e-6 for words of 32." in stated


@pytest.mark.parametrize("name", RINGS)
def test_reciprocals(three, name):
    ring = RINGS[name]
    values = edges(ring) + random_ints(500, ring=ring)

    def party(session):
        n = len(values)
        chosen = [*range(0, n, 2)]
        masks = deal_masks(session, n, 1, ring, chosen)
        masked = open_masked(session, array_of(session, values, ring))()
        opened = open_normalized(session, masked, masks.normal, masks.fraction)
        some = opened and opened.some(chosen)
        inverse = reciprocal.reciprocal(session, some, masks.inverse, len(chosen), ring)
        return [session.open(a, "test-any", (MOVING,)) for a in inverse]

    fraction, power = three(party)[MOVING]
    assert ((fraction > 0.2499) & (fraction < 1.0001)).all()
    product = fraction * power / 2.0 ** (ring.bits - 2) * np.array(values[::2], float)
    assert np.abs(product - 1).max() < 1e-6


def total_sent(trio):
    return sum(sum(s.ledger.sent.values()) for s in trio)


@pytest.mark.parametrize("name", RINGS)
def test_bytes_and_rounds_are_as_stated(trio, depth, name):
    ring = RINGS[name]
    n, size, word = 500, 300, ring.bits // 8
    rounds = depth(trio)
    spent, deep = [], []

    def step(function):
        before = total_sent(trio)
        results = run_trio(trio, function)
        spent.append(total_sent(trio) - before)
        deep.append(rounds() - sum(deep))
        return results

    arrays = [array_of(s, random_ints(n, ring=ring), ring) for s in trio]
    dealt = step(lambda s: deal_masks(s, n, size, ring))
    masked = step(lambda s: open_masked(s, arrays[s.pid])())
    opened = step(
        lambda s: open_normalized(
            s, masked[s.pid], dealt[s.pid].normal, dealt[s.pid].fraction
        )
    )
    logs = step(lambda s: logarithm(s, opened[s.pid], n, dealt[s.pid]))
    step(lambda s: module._weigh(s, opened[s.pid], logs[s.pid][:size], dealt[s.pid])())
    bits = FINE_BITS - WEIGHT_BITS
    step(lambda s: truncate_unseen(s, logs[s.pid][:size], bits, field=R64)())
    tested, places = ring.bits - 1, ring.bits.bit_length() - 1
    position = tested + tested * word + 2 * ring.bits * word + places * 16
    coefficients, products = (DEGREES[ring] + 1) * 4 * 16, 4 * 16
    assert spent[0] == n * (position + coefficients) + size * products
    normalized = 2 * tested + 2 + 2 * word
    assert spent[1:] == [n * 4 * word, n * normalized, 0, size * 32, size * 24]
    assert deep == [1, 1, 3, 0, 1, 2]
    for function, count in zip(
        (
            deal_masks,
            open_masked,
            open_normalized,
            None,
            module._weigh,
            truncate_unseen,
        ),
        deep,
        strict=True,
    ):
        assert not count or re.search(rf"Rounds: {count}[.;]", function.__doc__)
    stated = " ".join(normal.__doc__.split())
    if ring is R64:
        assert f"63 + 63 * 8 + 2 * 64 * 8 + 6 * 16 = {position}" in stated
    else:
        assert f"31 + 31 * 4 + 2 * 32 * 4 + 5 * 16 = {position}" in stated
    stated = " ".join(module.__doc__.split())
    rest = 4 * word + normalized - 2 * word
    sums = f"{position} + {4 * word} + {2 * tested + 2} = {position + rest}"
    assert sums in stated
    each = position + rest + coefficients + 2 * word + products + 32
    if ring is R64:
        assert f"{position} + {coefficients} + {products} of them dealt" in stated
        assert f"{(each + 24) / 1000:.1f} kB in all" in stated
        assert "and 5 rounds to the sum, 6 to the weights" in stated
    else:
        assert f"{each / 1000:.1f} kB with words of 32 bits" in stated


# -- what crosses the wire ----------------------------------------------------


def watch(trio, tap, n, ring=R64):
    """Frames of the logarithms and the sum of one number, n times."""
    frames = tap(trio)

    def party(session):
        masks = deal_masks(session, n, n, ring, range(n))
        masked = open_masked(session, array_of(session, [1] * n, ring))()
        opened = open_normalized(session, masked, masks.normal, masks.fraction)
        logs = logarithm(session, opened, n, masks)
        module._weigh(session, opened, logs, masks)()

    run_trio(trio, party)
    return [f for f in frames if f[2] == DATA]


def check_digits(columns, what):
    """Both digits of every byte of rows of bytes."""
    check_uniform(columns & 15, what)
    check_uniform(columns >> 4, what)


@pytest.mark.parametrize("name", RINGS)
def test_what_is_sent_is_uniform(trio, tap, name):
    n = 4000
    frames = watch(trio, tap, n, RINGS[name])
    assert len(frames) > 15
    for sender, receiver, _, op, payload in frames:
        assert receiver != HELPER
        # n bytes at a time, both ways: a bare array must not hide among several.
        for columns in (
            np.frombuffer(payload, dtype=np.uint8).reshape(n, -1).T,
            np.frombuffer(payload, dtype=np.uint8).reshape(-1, n),
        ):
            check_digits(columns, (sender, receiver, op))


@pytest.mark.parametrize("name", RINGS)
def test_what_the_owners_open_to_each_other_is_uniform(trio, tap, name):
    """Both parts of it together: the mask hides the sum, not a part alone."""
    n, ring = 4000, RINGS[name]
    frames = watch(trio, tap, n, ring)
    plus = {
        "counts": (np.uint8, np.add),
        "position": (np.uint8, np.bitwise_xor),
        "fraction": (ring.dtype, np.add),
        "weighted": (np.uint64, lambda *parts: R128.add(*parts)),
    }
    for name, (dtype, add) in plus.items():
        parts = [
            np.frombuffer(f[4], dtype=dtype).reshape(n, -1)
            for f in frames
            if f[3] == operation_code(name) and f[0] != HELPER
        ][-2:]
        opened = add(*parts)
        columns = np.ascontiguousarray(opened).view(np.uint8).reshape(n, -1).T
        check_digits(columns, name)


def test_the_number_opened_is_uniform_though_every_part_is_constant(trio, tap):
    n = 4000
    frames = tap(trio)

    def party(session):
        part = np.full(n, session.pid, dtype=np.uint64)
        return open_masked(session, SharedArray(R64, part, 2, 0, 3))()

    results = run_trio(trio, party)
    assert (results[MOVING] == results[STATIC]).all()
    assert not results[HELPER].any()
    sent = [np.frombuffer(f[4]) for f in frames if f[3] == operation_code("masked")]
    assert len(sent) == 4
    for words in (results[MOVING], *sent):
        check_digits(words.view(np.uint8).reshape(n, -1).T, "masked")


def test_steps_have_names_of_their_own():
    """What is dealt for one purpose is never taken for what is dealt for another."""
    names = []
    for m in (normal, smooth, reciprocal, module, protocols, numbers):
        names += re.findall(
            r'(?:pad|deal)\(\s*(?:session|s), "([a-z-]+)"', inspect.getsource(m)
        )
    assert len(names) == 17
    # The mask of x is the same thing wherever a number is normalized.
    assert len(set(names)) == len(names) - 1


# -- mutual information ------------------------------------------------------


def information(session, table):
    """`mutual_information` of a table, for the moving owner."""
    bins, categories = table.shape[0] - 1, table.shape[1]
    masks = deal_table(session, bins, categories) if session.pid == HELPER else None
    return mutual_information(
        session, table, "metric_value", "sample_count", (MOVING,), masks=masks
    )


def clear_mi(table):
    joint = table[:-1] / table[:-1].sum()
    product = joint.sum(axis=1)[:, None] * (table[-1] / table[-1].sum())
    known = joint > 0
    return (joint[known] * np.log(joint[known] / product[known])).sum()


# With 50 fraction bits a count of all samples is as large as any can be, and a masked
# one wraps every fourth time.
@pytest.mark.parametrize("frac_bits", [30, 50])
@pytest.mark.parametrize("kind", ["random", "sparse", "one cell"])
def test_mutual_information(three, ring_array, kind, frac_bits):
    bins, categories, n = 12, 8, 3000
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
        result = information(session, shared)
        value = result.open()
        ratio = result.log_ratio()
        assert (ratio.field, ratio.degree) == (R64, 2)
        opened = session.open(ratio, "test-any", (MOVING,))
        return *value, opened, ratio.share

    results = three(party)
    value, count, ratio, _ = results[MOVING]
    assert count == n
    # The sum and what it is divided by are blurred, relative to all samples.
    expected = clear_mi(table)
    assert abs(value - expected) < 2.0**-VALUE_DIGITS * (1.1 + expected)
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


def values_of(session, ring_array, table, times):
    """What the moving owner is opened of one table, several times."""
    bound = int(table[-1].sum()) << 40
    values = []
    for _ in range(times):
        shared = ring_array(session, table << 40, frac_bits=40, bound=bound)
        result = information(session, shared)
        values.append(result.open())
        result.log_ratio()
    return values


def test_errors_drown_in_the_blur(three, ring_array, monkeypatch):
    """What remains without the blur is too little to be seen in a thousand openings.

    The owners know masks on which the error of a logarithm depends, so that what
    stood out from the blur would say something about the counts.
    """
    n = 3000
    rng = np.random.default_rng(4)
    counts = rng.multinomial(n, rng.dirichlet(np.full(96, 0.3))).reshape(12, 8)
    table = np.vstack([counts, counts.sum(axis=0)])
    inner = module.dither
    monkeypatch.setattr(
        module,
        "dither",
        lambda session, array, magnitude: array._with(
            array.share, noise_bits=inner(session, array, magnitude).noise_bits
        ),
    )

    values, _ = np.array(three(values_of, ring_array, table, 20)[MOVING]).T
    assert np.abs(values - clear_mi(table)).max() < 2.0**-VALUE_DIGITS / 1000


def test_values_are_blurred(three, ring_array):
    """As widely as stated, both ways; the number of samples is exact.

    All of 40 uniform numbers lie within half of their bounds once in 1e12 runs, and
    within 0.8 of each other once in 1e13.
    """
    n = 3000
    counts = np.random.default_rng(4).multinomial(n, np.full(96, 1 / 96))
    counts = counts.reshape(12, 8)
    table = np.vstack([counts, counts.sum(axis=0)])

    values, samples = np.array(three(values_of, ring_array, table, 40)[MOVING]).T
    assert set(samples) == {n}
    off = (values - clear_mi(table)) * 2.0**VALUE_DIGITS
    assert 0.5 < np.abs(off).max() < 1.3
    assert np.ptp(off) > 0.8


def test_an_empty_table_has_no_information(three, ring_array):
    def party(session):
        zeros = np.zeros((4, 3), dtype=np.int64)
        shared = ring_array(session, zeros, frac_bits=20, bound=100 << 20)
        return information(session, shared).open()

    assert three(party)[MOVING] == (0.0, 0.0)
