"""The language of protocols on the parts of two owners alone."""

import math

from noise import check_uniform
import numpy as np
from oblivious import use_known_products
from parties import run_trio
import pytest
from scipy import stats
from shares import value
from test_algebra import KEPT, UNIT, everything, given, owned, shared

from dipy_ppir.mpc import pairalgebra
from dipy_ppir.mpc.algebra import (
    PRODUCT,
    RATE_STEPS,
    Clear,
    Digits,
    Opening,
    Total,
    expression,
)
from dipy_ppir.mpc.carried import Operators, Smooth, Spread, Window
from dipy_ppir.mpc.carrier import Carry, sum_of
from dipy_ppir.mpc.differences import Variance
from dipy_ppir.mpc.errors import (
    FixedPointOverflowError,
    RoundingError,
    UndeclaredOpeningError,
)
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.frame import operation_code
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC, declare
from dipy_ppir.mpc.pairalgebra import PairShares
from dipy_ppir.mpc.rotation import _BY_ROWS, _COLUMNS, _Correlation

ALL = (MOVING, STATIC, HELPER)

declare("test-bits", ALL, "any", "a count that a test opens", 2)


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Products that are made without encryption, which has tests of its own."""
    use_known_products(monkeypatch)


@pytest.mark.parametrize(
    "piece, many", [(pairalgebra.PIECE, pairalgebra.MANY), (7, 100), (64, 1)]
)
def test_parts_are_what_they_are_in_the_clear(duo, monkeypatch, piece, many):
    """Also where the products of a round go in several messages, or as sums."""
    monkeypatch.setattr(pairalgebra, "PIECE", piece)
    monkeypatch.setattr(pairalgebra, "MANY", many)
    clear = everything(Clear())
    found = run_trio(duo, lambda s: everything(PairShares(s)))
    # The one product of products that were rounded themselves.
    factors = 1 + sum(np.abs(clear[k].factor) for k in (3, 4))
    for k, expected in enumerate(clear):
        both = [masked[k] for masked in found]
        for one in both:
            assert one.unit == expected.unit and one.shape == expected.shape
        error = np.abs(value(both) - expected.factor)
        most = 1.51 * max(expected.unit, UNIT) * (factors if k == 11 else 1)
        assert (error <= most).all(), k


def test_sums_of_many_products(duo, monkeypatch):
    """Made ahead by eights, by fours, by twos and one by one."""
    monkeypatch.setattr(pairalgebra, "MANY", 1)
    taken = []
    numbers = [owned(k, (30,), 0.5) for k in range(6)]

    def total(world):
        x = [y for k in numbers for y in shared(world, k)]
        products = [a * b for a, b in zip(x[::2], x[1::2], strict=True)]
        return world.fresh((sum_of([*products, x[0] * x[0]]), KEPT))

    def run(session):
        sums = session.multiplications.sums

        def counted(n, terms):
            if session.pid == MOVING:
                taken.append((n, terms))
            return sums(n, terms)

        session.multiplications.sums = counted
        return total(PairShares(session))

    found = value([x for (x,) in run_trio(duo, run)])
    assert np.abs(found - total(Clear())[0].factor).max() <= 1.51 * UNIT
    assert sorted(taken) == [(30, 1), (30, 4), (30, 8)]


def random_parts(rng, *shape):
    return rng.integers(0, 2**64, (*shape, 2), np.uint64)


GRIDS = [((9, 8), (3, 2)), ((7, 6, 8), (2, 3, 3))]


def forms():
    """Every form, with the shapes of its left, its right and its result."""
    yield PRODUCT, [(4, 5)], [(4, 5)], (4, 5)
    yield PRODUCT, [(1,)], [(4, 5)], (4, 5)
    yield Total(), [(4, 5)], [(4, 5)], (1,)
    yield _BY_ROWS, [(3, 3)], [(3, 3)], (3, 3)
    yield _COLUMNS, [(3, 3)], [(1,)], (3, 2)
    for dim, shape in ((2, (2,)), (3, (3, 3))):
        yield _Correlation(), [(7, dim)], [(7, dim)], shape
    for shape, spacing in GRIDS:
        o = Operators(shape, 2, 1.0, spacing)
        yield Window(o), [shape], [shape], o.coarse
        yield Window(o, 1), [shape], [shape], o.coarse
        yield Spread(o), [o.coarse], [shape], shape
        yield Variance(o), [(2, *shape)], [(2, *shape)], (1,)
        for wide in (False, True):
            moves = [o.coarse] * len(o.keys)
            yield Carry(o, wide), moves, [shape], shape
            yield Carry(o, wide), moves, [(2, *shape)], (2, *shape)
        for axis in range(len(shape)):
            yield Smooth(o, axis), [shape], [shape], o.coarse
            yield Smooth(o, axis), [(2, *shape)], [(2, *shape)], o.coarse


@pytest.mark.parametrize("k", range(len(list(forms()))))
def test_a_form_is_made_of_its_elementary_products(k):
    form, left, right, shape = list(forms())[k]
    rng = np.random.default_rng(k)
    sides = [[random_parts(rng, *s) for s in side] for side in (left, right)]
    whole, collected = R128.zeros(shape), R128.zeros(shape)
    form.ring(*sides, whole, -3)
    factors = [list(form.factors(side, sides[side], shape)) for side in (0, 1)]
    sums = {}
    for (kind, x), (other, y) in zip(*factors, strict=True):
        assert kind == other and x.shape == y.shape
        products = R128.mul(*map(np.ascontiguousarray, (x, y)))
        sums[kind] = R128.add(sums[kind], products) if kind in sums else products
    for kind, products in sums.items():
        form.collect(kind, R128.scale(products, -3), collected)
    assert whole.any() and np.array_equal(whole, collected)
    if form.symmetric:
        turned = R128.zeros(shape)
        form.ring(*reversed(sides), turned, -3)
        assert np.array_equal(whole, turned)


def cost(sessions, depth, function):
    """Rounds and bytes of what both owners do, and products taken."""
    before = sum(sum(s.ledger.sent.values()) for s in sessions)
    rounds = depth(sessions)
    run_trio(sessions, function)
    return rounds(), sum(sum(s.ledger.sent.values()) for s in sessions) - before


def test_rounds_and_bytes_of_products_are_as_stated(duo, depth):
    n, state = 20, {}

    def begin(session):
        world = PairShares(session)
        state[session.pid] = (
            world,
            *shared(world, owned(1, (4, 5))),
            *given(world, owned(8, (4, 5))),
        )

    assert cost(duo, depth, begin) == (0, 0)
    for wanted, count in (
        (lambda x, y, g, h: [(x * y, KEPT)], 2 * n),
        (lambda x, y, g, h: [(x * x, KEPT)], n),
        (lambda x, y, g, h: [(g * h, KEPT)], n),
        (lambda x, y, g, h: [(g * g, KEPT)], 0),
        (lambda x, y, g, h: [(g * x, KEPT), (y * y + x * y, KEPT)], 4 * n),
        (lambda x, y, g, h: [(expression(x), KEPT)], 0),
    ):

        def fresh(session, wanted=wanted):
            world, *numbers = state[session.pid]
            world.fresh(*wanted(*numbers))

        assert cost(duo, depth, fresh) == (int(count > 0), 32 * count)


def test_what_is_sent_is_uniform_whatever_the_numbers(duo, tap):
    frames = tap(duo)

    def run(session):
        world = PairShares(session)
        zeros = {p: np.zeros(20_000) for p in (MOVING, STATIC)}
        x, y = shared(world, zeros)
        world.fresh((x * y, KEPT), (x * x, KEPT))

    run_trio(duo, run)
    for pid in (MOVING, STATIC):
        sent = [np.frombuffer(f[4], np.uint64) for f in frames if f[0] == pid]
        words = np.concatenate(sent)
        assert len(words) == 2 * 60_000
        check_uniform([words >> np.uint64(60), words & np.uint64(15)], "all")
    assert {f[3] for f in frames} == {operation_code("factors")}


def test_an_owner_learns_nothing_from_its_part_of_a_product(two):
    """Parts of the same product in two runs have nothing in common."""

    def run(session):
        world = PairShares(session)
        x, y = shared(world, {p: np.ones(500) for p in (MOVING, STATIC)})
        return world.fresh((x * y, KEPT))[0].part

    first, second = two(run), two(run)
    for pid in (MOVING, STATIC):
        assert not (first[pid] == second[pid]).all(axis=1).any()


def test_rounding_is_up_or_down_by_chance_and_right_on_average(duo):
    n, x, y = 40_000, 0.3, 77 * UNIT

    def half(session):
        world = PairShares(session)
        numbers = shared(world, {MOVING: np.full(n, x), STATIC: np.full(n, y)})
        return world.fresh((numbers[0] * numbers[1], KEPT))[0]

    found = value(run_trio(duo, half)) / UNIT
    exact = round(x / UNIT) * 77 * UNIT
    assert set(np.unique(found)) <= {np.floor(exact), np.ceil(exact)}
    p = exact - np.floor(exact)
    assert abs((found - exact).mean()) < 7 * math.sqrt(p * (1 - p) / n)


def test_numbers_beyond_what_the_ring_has_room_for_are_refused(two):
    def run(session):
        world = PairShares(session)
        x = shared(world, {MOVING: np.ones(1)})[0]
        with pytest.raises(FixedPointOverflowError, match="do not fit"):
            world.fresh((x * x, Digits(UNIT, 2.0**100)))
        y = world.fresh((x * x, Digits(UNIT, 2.0**10)))[0]
        return y.shape, world.failures

    for shape, failures in two(run):
        assert shape == (1,)
        assert failures == pytest.approx(3 * 2 * 2.0**10 / UNIT**2 / 2.0**128, rel=0.4)


# -- opening ---------------------------------------------------------------------


def test_numbers_are_shown_to_their_precision(two, depth):
    n, precision = 20_000, 1 / 8
    numbers = np.rint(np.random.default_rng(8).uniform(-3, 3, n) / UNIT) * UNIT

    def run(session):
        world = PairShares(session)
        # Squares of numbers, so that parts are random.
        x = shared(world, {MOVING: numbers})[0]
        one = shared(world, {STATIC: np.ones(n)})[0]
        x = world.fresh((x * one, KEPT))[0]
        wanted = [
            Opening([expression(x)], precision, 4.0, "test-number", (STATIC,)),
            Opening([x, x], 2 * precision, 4.0, "test-number", (MOVING, STATIC)),
        ]
        return world.shown(*wanted), session.ledger.learned()

    out = two(run)
    assert out[MOVING][0][0] is None
    # What one owner alone is shown is off by half a unit at most,
    noise = ((out[STATIC][0][0] - numbers) / precision).ravel()
    assert np.abs(noise).max() <= 0.5 + 1e-3
    assert stats.kstest(noise + 0.5, "uniform").pvalue > 1e-9
    # and what both are shown one of the two nearest, the same for both.
    both = out[MOVING][0][1]
    assert np.array_equal(both, out[STATIC][0][1])
    steps = both / (2 * precision)
    assert np.array_equal(steps, np.rint(steps))
    error = steps - numbers / (2 * precision)
    assert np.abs(error).max() < 1 + 1e-3
    assert abs(error.mean()) < 7 * math.sqrt(1 / 6 / (2 * n))
    entry = {e["label"]: e for e in out[MOVING][1][ROLES[MOVING]]}["test-number"]
    # Values of 32 precisions either way and the noise, and no room for more.
    assert entry["bits"] / entry["values"] == 7


@pytest.mark.parametrize("receivers", [(MOVING,), (STATIC,), (MOVING, STATIC)])
def test_what_is_sent_to_show_a_number_has_no_finer_digits(duo, tap, receivers):
    frames = tap(duo)
    opening = Opening([], 1 / 8, 4.0, "test-number", receivers)

    def run(session):
        world = PairShares(session)
        x, y = shared(world, owned(3, (50,)))
        x = world.fresh((x * y, KEPT))[0]
        world.shown(opening._replace(numbers=(x,)))

    run_trio(duo, run)
    code = operation_code("open-test-number")
    sent = [f for f in frames if f[3] == code]
    assert {f[1] for f in sent} == set(receivers)
    for frame in sent:
        words = R128.to_ints(np.frombuffer(frame[4], np.uint64).reshape(-1, 2))
        # All alike below the precision.
        low = {int(w) % (1 << opening.noise_bits) for w in words}
        assert low == {1 << opening.noise_bits - 1}


def test_no_more_is_shown_than_the_bound_has_room_for(two):
    def run(session):
        world = PairShares(session)
        digits = Digits(UNIT, 1e6)
        x = shared(world, {MOVING: np.array([1000.0, 3.0])}, digits)[0]
        opening = Opening([x], 1 / 8, 4.0, "test-number", (MOVING, STATIC))
        try:
            return world.shown(opening)
        except RoundingError:
            return "refused"

    for shown in two(run):
        assert shown == "refused" or np.abs(shown[0]).max() < 8

    def bad(session):
        world = PairShares(session)
        x, y = shared(world, owned(1, (3,)))
        with pytest.raises(ValueError, match="no products"):
            world.shown(Opening([x * y], 1 / 8, 4.0, "test-number", (MOVING,)))
        with pytest.raises(UndeclaredOpeningError, match="24 bits"):
            world.shown(Opening([x], 2.0**-30, 4.0, "test-number", (STATIC,)))
        return True

    assert all(two(bad))


# -- comparisons -----------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [[-3.0], [-UNIT], [UNIT], [3.0], [1.0, -UNIT, 1.0], [-1.0, -2.0], [1.0, 2.0]],
)
def test_the_sign_of_sums(two, numbers):
    def run(session):
        world = PairShares(session)
        y = shared(world, {STATIC: np.array([2.0])})[0]
        sums = [
            shared(world, {MOVING: np.array([number])})[0] * y for number in numbers
        ]
        sign = world.any_negative(sums, Digits(UNIT**2, 64.0), "test-bit", ALL)
        learned = session.ledger.learned()[ROLES[MOVING]]
        return sign, [(e["label"], e["values"], e["bits"]) for e in learned]

    assert two(run) == [(min(numbers) < 0, [("test-bit", 1, 1.0)])] * 2


@pytest.mark.parametrize("bits", [None, 60, 100, 117])
def test_a_rounding_that_went_wrong_is_noticed(two, bits):
    """Eight weights are less than 2**11 together: 2**117 times that is not zero."""

    def run(session):
        world = PairShares(session)
        x = shared(world, owned(9, (30,)))
        if bits is not None and session.pid == MOVING:
            off = R128.zeros((30,))
            off[:8] = R128.from_ints(1 << bits)
            x[1].part = R128.add(x[1].part, off)
        try:
            world.check(*((y, KEPT) for y in x))
        except RoundingError as exc:
            return str(exc)

    found = two(run)
    assert len(set(found)) == 1
    assert (found[0] is None) == (bits is None)


def test_rates(duo):
    """A power's root to the middle of two powers of two, the same in the clear."""
    digits, unit = Digits(2.0**-18, 64.0), 2.0**-72
    norms = [0.0, unit, 1e-9, 1e-3, 0.4, 77.0, 2.0**20]
    norms += [unit * 2.0 ** (RATE_STEPS[-1] + 0.9)]
    norms += [unit * (2.0**k + j) for k in (8, 9, 40) for j in (-1, 0)]

    def rates(world):
        given = [
            world.own(x, MOVING, (1,), Digits(unit, 2.0**30))
            for x in np.array(norms)[:, None]
        ]
        return world.rates(given, 0.3, 8, digits)

    def run(session):
        world = PairShares(session)
        if session.pid != MOVING:
            world.own = lambda x, *rest: PairShares.own(world, None, *rest)
        return rates(world)

    clear = [float(x.factor[0]) for x in rates(Clear())]
    found = run_trio(duo, run)
    assert [float(value([r[k] for r in found])[0]) for k in range(len(norms))] == clear


def test_step_functions_and_counts(two):
    thresholds, values = [-1.0, 0.5, 2.0], [5.0, -1.0, 0.25, 7.0]
    numbers = np.array([-2.0, -1.0, -1.0 - UNIT, 0.0, 0.5, 1.9, 2.0, 60.0])

    def run(session):
        world = PairShares(session)
        out = []
        for x in numbers:
            x = shared(world, {STATIC: np.array([x])})[0]
            out.append(
                world.stepped(expression(x), thresholds, values, KEPT, UNIT).part
            )
        both = shared(world, {STATIC: np.array([3.0]), MOVING: np.array([0.5])})
        groups = [
            ([(both[0] * both[1], 1.25), (expression(both[1]), 0.5)], "test-bits", ALL),
            ([(expression(both[0]), 3.5)], "test-bit", (MOVING,)),
        ]
        return np.concatenate(out), world.reached(groups, KEPT)

    (first, opened), (second, other) = two(run)
    found = R128.decode(R128.add(first, second), 0) * UNIT
    expected = np.array(values)[np.searchsorted(thresholds, numbers, "right")]
    assert np.array_equal(found, expected)
    assert opened == [2, 0] and other == [2, None]


def rounds_of(bits):
    """Rounds of `circuits.negative` and of `circuits.bits_of`."""
    return 1 + math.ceil(math.log2(bits - 1))


def compared(digits, unit):
    return (2 * int(digits.bound / unit)).bit_length() + 2


#: What a verb is asked for, and its rounds; those of transfers ahead do not count.
VERBS = {
    "rates": (
        lambda w, x, y: w.rates([w.secret(x, KEPT)] * 2, 0.25, 8, KEPT),
        1 + rounds_of(pairalgebra.RATE_BITS) + 7,
    ),
    "stepped": (
        lambda w, x, y: w.stepped(expression(x), [0.0], [1.0, 2.0], KEPT, UNIT),
        1 + rounds_of(compared(KEPT, UNIT)),
    ),
    "reached": (
        lambda w, x, y: w.reached([([(expression(x), 1.0)], "test-bits", ALL)], KEPT),
        2 + rounds_of(compared(KEPT, UNIT)),
    ),
    "reached by a product": (
        lambda w, x, y: w.reached([([(x * y, 1.0)], "test-bits", ALL)], KEPT),
        3 + rounds_of(compared(KEPT, UNIT)),
    ),
    "any_negative": (
        lambda w, x, y: w.any_negative([x, y, x], KEPT, "test-bit", ALL),
        1 + rounds_of(25) + 2,
    ),
    "any_negative of products": (
        lambda w, x, y: w.any_negative([x * y], KEPT, "test-bit", ALL),
        2 + rounds_of(25),
    ),
    "check": (lambda w, x, y: w.check((x, KEPT)), 2 + rounds_of(128)),
}


@pytest.mark.parametrize("verb", VERBS)
def test_rounds_of_comparisons_are_as_stated(duo, depth, verb):
    ask, stated = VERBS[verb]
    state = {}

    def begin(session):
        for owner in (MOVING, STATIC):
            session.transfers.reserve(20_000, owner)
        world = PairShares(session)
        state[session.pid] = world, *shared(world, owned(1, (1,)))

    run_trio(duo, begin)
    assert cost(duo, depth, lambda s: ask(*state[s.pid]))[0] == stated


def test_bytes_of_what_is_shown_are_as_stated(duo, depth):
    def show(session):
        world = PairShares(session)
        x, _ = shared(world, owned(1, (3,)))
        of = [((MOVING, STATIC), 1 / 8), ((STATIC,), 1 / 4)]
        world.shown(*(Opening([x], p, 4.0, "test-number", r) for r, p in of))

    assert cost(duo, depth, show) == (1, 3 * 3 * 16)
