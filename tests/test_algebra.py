"""The language of protocols: on shares what it is in the clear."""

import math
import time

import numpy as np
from parties import run_trio
import pytest
from scipy import stats
from shares import decoded

from dipy_ppir.mpc import algebra, protocols
from dipy_ppir.mpc.algebra import (
    PRODUCT,
    Clear,
    Digits,
    Opening,
    Shares,
    Total,
    dropped,
    expression,
    product,
)
from dipy_ppir.mpc.errors import (
    FixedPointOverflowError,
    RoundingError,
    UndeclaredOpeningError,
)
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.frame import operation_code
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC, declare
from dipy_ppir.mpc.linear import AxisMap, Linear

UNIT = 2.0**-16
KEPT = Digits(UNIT, 64.0)

declare("test-number", (MOVING, STATIC), "any", "what a test opens", 24)
ALL = (MOVING, STATIC, HELPER)
declare("test-bit", (0, 1, 2), "any", "a bit that a test opens", 1)


def owned(seed, shape, scale=2.0):
    """Numbers of each owner, multiples of the unit."""
    rng = np.random.default_rng(seed)
    x = {p: rng.uniform(-scale, scale, shape) for p in (MOVING, STATIC)}
    return {p: np.rint(v / UNIT) * UNIT for p, v in x.items()}


def shared(world, numbers, digits=KEPT):
    """Masked numbers of both owners."""
    pid = world.session.pid if isinstance(world, Shares) else None
    given = [
        world.own(x if pid in (None, owner) else None, owner, x.shape, digits)
        for owner, x in numbers.items()
    ]
    return world.masked(*given)


def given(world, numbers):
    """Numbers of each owner, whose masks are its own."""
    pid = world.session.pid if isinstance(world, Shares) else None
    out = []
    for owner, x in numbers.items():
        own = world.own(x if pid in (None, owner) else None, owner, x.shape, KEPT)
        out += world.given(owner, own)
    return out


def value(masked):
    """Masked numbers of three parties put together; units of the first."""
    m, s = masked[MOVING], masked[STATIC]
    whole = R128.add(m.part, s.part)
    # The factors lie on both sides of the number, as far as the helper knows.
    assert np.array_equal(R128.sub(m.factor, whole), masked[HELPER].factor)
    assert np.array_equal(R128.sub(whole, s.factor), masked[HELPER].factor)
    assert masked[HELPER].part is None
    return decoded(whole) * m.unit


def everything(world):
    """All verbs that make masked numbers; a list of them."""
    x, y = shared(world, owned(1, (4, 5)))
    (z,) = shared(world, {STATIC: owned(2, (4, 5))[STATIC]})
    c = shared(world, {MOVING: owned(3, (1,))[MOVING]})[0]
    g, h = given(world, owned(8, (4, 5)))
    rows = Linear([None, AxisMap(np.arange(10).reshape(2, 5) / 4, 0.25)])
    mixed = (x * y).times(3) - y * z + z * z
    fresh = world.fresh(
        (x * y, KEPT),
        (mixed, KEPT),
        (c * x, Digits(2.0**-20, 64.0)),
        (product(Total(), (x,), (z,)), KEPT),
        (x * x, Digits(0.0, 64.0)),
        ((x * z).over(3), KEPT),
        (x * y, KEPT, (z, x)),
        (expression(world.map(rows, z)), KEPT),
    )
    squares = world.fresh((fresh[0] * fresh[1], KEPT))
    plus = world.plus(x, 1.5)
    return [
        x,
        world.map(rows, x),
        plus,
        *fresh,
        *squares,
        *world.fresh((plus * y, KEPT)),
        g,
        h,
        *world.fresh(
            (g * h - g * x, KEPT),
            (expression(world.map(rows, g)) + world.map(rows, h), KEPT),
        ),
    ]


@pytest.mark.parametrize("piece", [algebra.PIECE, 7])
def test_shares_are_what_they_are_in_the_clear(trio, monkeypatch, piece):
    """Also where arrays go in pieces, and the helper waits for the owners."""
    monkeypatch.setattr(algebra, "PIECE", piece)
    clear = everything(Clear())
    shares = run_trio(trio, lambda s: everything(Shares(s)))
    # The one product of products that were rounded themselves.
    factors = 1 + sum(np.abs(clear[k].factor) for k in (3, 4))
    for k, expected in enumerate(clear):
        found = [masked[k] for masked in shares]
        for one in found:
            assert one.unit == expected.unit and one.shape == expected.shape
        # Each of two roundings is up or down by chance, here to nearest.
        error = np.abs(value(found) - expected.factor)
        most = 1.51 * max(expected.unit, UNIT) * (factors if k == 11 else 1)
        assert (error <= most).all(), k


def test_rounding_is_up_or_down_by_chance_and_right_on_average(trio):
    n = 40_000
    x, y = 0.3, 77 * UNIT

    def half(session):
        world = Shares(session)
        numbers = shared(world, {MOVING: np.full(n, x), STATIC: np.full(n, y)})
        return world.fresh((numbers[0] * numbers[1], KEPT))[0]

    found = value(run_trio(trio, half)) / UNIT
    exact = round(x / UNIT) * 77 * UNIT
    low = np.floor(exact)
    assert set(found) == {low, low + 1}
    deviation = np.sqrt((exact - low) * (low + 1 - exact) / n)
    assert abs(found.mean() - exact) < 6 * deviation


def test_rounds_and_elements(trio, depth, tap, payload_bytes):
    so_far, frames = depth(trio), tap(trio)

    def count(function):
        before, bytes_before = so_far(), payload_bytes(frames)
        out = run_trio(trio, function)
        return so_far() - before, (payload_bytes(frames) - bytes_before) // 16, out

    worlds = {s.pid: Shares(s) for s in trio}
    numbers = owned(4, (10,))
    rounds, elements, x = count(lambda s: shared(worlds[s.pid], numbers))
    assert (rounds, elements) == (1, 2 * 2 * 10)
    rounds, elements, _ = count(
        lambda s: worlds[s.pid].fresh((x[s.pid][0] * x[s.pid][1], KEPT))
    )
    # The helper's correction does not wait for anything.
    assert (rounds, elements) == (1, 3 * 10)
    waits = trio[MOVING].ledger.rounds["setup"]
    assert waits == 2  # the moving owner's: none for corrections
    rounds, elements, _ = count(
        lambda s: worlds[s.pid].secret(x[s.pid][0] * x[s.pid][1], KEPT)
    )
    assert (rounds, elements) == (0, 10)
    rounds, elements, _ = count(
        lambda s: worlds[s.pid].fresh((expression(x[s.pid][0]), KEPT))
    )
    assert (rounds, elements) == (1, 2 * 10)
    for owner, mine in numbers.items():
        rounds, elements, _ = count(
            lambda s, one={owner: mine}: given(worlds[s.pid], one)
        )
        assert (rounds, elements) == (1, 10)


def test_the_helper_receives_nothing_but_that_the_owners_are_there(
    trio, tap, monkeypatch
):
    frames = tap(trio)
    run_trio(trio, lambda s: everything(Shares(s)))
    assert frames and {f[1] for f in frames} == {MOVING, STATIC}
    monkeypatch.setattr(algebra, "PIECE", 16)
    run_trio(trio, lambda s: everything(Shares(s)))
    words = [f for f in frames if f[1] == HELPER]
    assert words and {(f[3], f[4]) for f in words} == {
        (operation_code("pace"), bytes(8))
    }


def test_large_arrays_do_not_keep_parties_waiting_for_each_other(three, monkeypatch):
    """More than connections hold, in pieces: nobody waits for who waits for it."""
    monkeypatch.setattr(algebra, "PIECE", 1 << 17)
    numbers = owned(7, (300_000,))

    def run(session):
        send = session.network.send

        def slowly(*args):
            time.sleep(0.2)
            send(*args)

        if session.pid == MOVING:
            session.network.send = slowly
        world = Shares(session)
        x, y = shared(world, numbers)
        for _ in range(2):
            x, y = world.fresh((x * y, KEPT), (y * y, KEPT))
        return True

    assert all(three(run))


def received(trio, tap, numbers):
    """What each owner receives, as bytes."""
    frames = tap(trio)

    def run(session):
        world = Shares(session)
        x, y = shared(world, numbers)
        u, v = world.fresh((x * y, KEPT), (x * x, KEPT))
        g, h, again, _ = given(world, numbers) + given(world, numbers)
        world.fresh((u * v, KEPT), (x * v, KEPT), (g * h, KEPT), (again * u, KEPT))

    run_trio(trio, run)
    return {
        p: np.frombuffer(b"".join(f[4] for f in frames if f[1] == p), np.uint8)
        for p in (MOVING, STATIC)
    }


@pytest.mark.parametrize("kind", ["zeros", "noise"])
def test_what_is_received_is_uniform(trio, tap, kind):
    numbers = owned(5, (3000,))
    if kind == "zeros":
        numbers = {p: np.zeros(3000) for p in numbers}
    for octets in received(trio, tap, numbers).values():
        assert stats.chisquare(np.bincount(octets, minlength=256)).pvalue > 1e-9
        words = octets.view(np.uint64).reshape(-1, 3000, 2)
        # No mask serves twice: neither words nor their differences or sums repeat.
        for a in range(len(words)):
            for b in range(a):
                for both in (words[a] - words[b], words[a] + words[b]):
                    bits = np.unpackbits(both.view(np.uint8)).reshape(-1, 64)
                    share = bits.mean(axis=0)
                    # Of 4e4 such shares one is that far off in 2e10 runs.
                    assert np.abs(share - 0.5).max() < 8 / np.sqrt(4 * len(bits))


@pytest.mark.parametrize("broken", ["no mask", "one mask twice", "no part taken off"])
def test_a_mask_left_out_or_used_twice_is_noticed(trio, tap, monkeypatch, broken):
    """That the test above would fail: each is put in on purpose."""
    pad, deal, kept = protocols.pad, protocols.deal, {}

    def bad_pad(session, name, shape, **options):
        found = pad(session, name, shape, **options)
        if broken == "no mask":
            return np.zeros_like(found)
        if broken == "one mask twice":
            return kept.setdefault((session.pid, shape), found)
        return found

    def bad_deal(session, name, numbers, shape, **options):
        if broken != "no part taken off":
            return deal(session, name, numbers, shape, **options)
        if session.pid == HELPER:
            session.network.send(STATIC, name, numbers)
            return None
        if session.pid == MOVING:
            return np.zeros(shape, dtype=np.uint64)
        part = np.empty(shape, dtype=np.uint64)
        session.network.receive(HELPER, name, part)
        return part

    monkeypatch.setattr(algebra.protocols, "pad", bad_pad)
    monkeypatch.setattr(algebra.protocols, "deal", bad_deal)
    with pytest.raises(AssertionError):
        if broken == "no part taken off":
            # Products of masks, whose last bits are even three times of four.
            octets = received(trio, tap, owned(5, (3000,)))[STATIC]
            assert stats.chisquare(np.bincount(octets, minlength=256)).pvalue > 1e-9
        else:
            monkeypatch.setattr(algebra.protocols, "deal", deal)
            test_what_is_received_is_uniform(trio, tap, "zeros")


def test_masks_of_the_parties_are_independent_of_what_the_helper_sends(trio):
    """A correction is no function of what the static owner knows: two runs of the same
    numbers show it other corrections and other masked numbers."""

    def run(session):
        world = Shares(session)
        x, y = shared(world, {MOVING: np.ones(50), STATIC: np.ones(50)})
        return world.fresh((x * y, KEPT))[0].factor

    first, second = run_trio(trio, run), run_trio(trio, run)
    assert not (first[MOVING] == second[MOVING]).all(axis=1).any()


def test_numbers_beyond_their_bound_are_refused(three):
    def too_large(session):
        world = Shares(session)
        mine = np.array([65.0]) if session.pid == MOVING else None
        try:
            world.own(mine, MOVING, (1,), KEPT)
        except FixedPointOverflowError as exc:
            return str(exc)

    found = three(too_large)
    assert "bound" in found[MOVING] and found[STATIC] is found[HELPER] is None

    def no_room(session):
        world = Shares(session)
        x = shared(world, {MOVING: np.ones(1)})[0]
        with pytest.raises(FixedPointOverflowError, match="do not fit"):
            world.fresh((x * x, Digits(UNIT, 2.0**100)))
        return True

    assert all(three(no_room))


def test_expressions_that_cannot_be_added_or_rounded():
    world = Clear()
    x, y = world.masked(
        world.own(np.ones(3), MOVING, (3,), KEPT),
        world.own(np.ones(3), MOVING, (3,), Digits(2.0**-8, 2.0)),
    )
    (short,) = world.masked(world.own(np.ones(1), MOVING, (1,), KEPT))
    for other in (y * y, expression(y), expression(short)):
        with pytest.raises(ValueError, match="cannot add"):
            x * x + other
    with pytest.raises(ValueError, match="cannot get the unit"):
        world.fresh((expression(y), KEPT))
    with pytest.raises(ValueError, match="cannot get the unit"):
        world.fresh((x * x, Digits(2.0**-14, 2.0), (x,)))
    assert dropped(x * x, Digits(0.0, 1.0)) == (0, UNIT**2 / 2)
    assert dropped(expression(x), Digits(0.0, 1.0)) == (0, UNIT)
    # 3/4 of a power of two is nearest
    assert dropped((x * x).over(4 / 3), KEPT) == (17, 0.75 * UNIT)
    assert product(PRODUCT, (x,), (short,)).shape == (3,)


def test_failures_are_counted(three):
    def run(session):
        world = Shares(session)
        x, y = shared(world, owned(6, (100,)))
        world.fresh((x * y, Digits(UNIT, 2.0**10)))
        return world.failures

    bound = 2.0**10 / UNIT**2
    for failures in three(run):
        assert failures == pytest.approx(100 * 2 * bound / 2.0**128, rel=0.01)


# -- opening ---------------------------------------------------------------------


def test_numbers_are_shown_to_their_precision(three):
    n, precision = 20_000, 1 / 8
    rng = np.random.default_rng(8)
    numbers = rng.uniform(-3, 3, n)

    def run(session):
        world = Shares(session)
        x = shared(world, {MOVING: numbers if session.pid == MOVING else numbers})[0]
        wanted = [
            Opening([expression(x)], precision, 4.0, "test-number", (STATIC,)),
            Opening([x, x], 2 * precision, 4.0, "test-number", (MOVING, STATIC)),
        ]
        shown = world.shown(*wanted)
        return shown, session.ledger.learned()

    out = three(run)
    assert out[HELPER][0] == [None, None] and out[MOVING][0][0] is None
    for (shown, _), k, width in (
        (out[STATIC], 0, precision),
        (out[STATIC], 1, 2 * precision),
        (out[MOVING], 1, 2 * precision),
    ):
        noise = ((shown[k] - numbers) / width).ravel()
        assert np.abs(noise).max() <= 0.5 + 1e-4
        assert stats.kstest(noise + 0.5, "uniform").pvalue > 1e-9
    # Two receivers see the same.
    assert np.array_equal(out[MOVING][0][1], out[STATIC][0][1])
    entry = {e["label"]: e for e in out[MOVING][1][ROLES[MOVING]]}["test-number"]
    # Values of 32 precisions either way and the noise, and no room for more.
    assert entry["bits"] / entry["values"] == 7


def test_no_more_is_shown_than_the_bound_has_room_for(three):
    """A number beyond its bound is not opened with the digits above it."""

    def run(session):
        world = Shares(session)
        digits = Digits(UNIT, 1e6)
        x = shared(world, {MOVING: np.array([1000.0, 3.0])}, digits)[0]
        try:
            shown = world.shown(
                Opening([x], 1 / 8, 4.0, "test-number", (MOVING, STATIC))
            )
        except RoundingError:
            return "refused"
        return shown

    found = three(run)
    assert found[HELPER] == [None]
    for shown in found[:2]:
        # Modulo the ring, 16 here, it may be in range by chance; no more is known.
        assert shown == "refused" or np.abs(shown[0]).max() < 8

    def bad(session):
        world = Shares(session)
        x, y = shared(world, owned(1, (3,)))
        with pytest.raises(ValueError, match="no products"):
            world.shown(Opening([x * y], 1 / 8, 4.0, "test-number", (MOVING,)))
        return True

    assert all(three(bad))


def test_what_is_masked_need_not_lie_in_one_piece(three):
    """What is sent is masked whatever the memory's order."""

    def run(session):
        world = Shares(session)
        x = world.own(
            np.arange(12.0).reshape(3, 4) if session.pid == MOVING else None,
            MOVING,
            (3, 4),
            KEPT,
        )
        if x.part is not None:
            x.part = x.part.transpose(1, 0, 2)
        x.shape = (4, 3)
        return world.masked(x)[0]

    assert np.array_equal(value(three(run)), np.arange(12.0).reshape(3, 4).T)


def test_more_bits_than_declared_are_not_shown(three):
    def run(session):
        world = Shares(session)
        x = shared(world, {MOVING: np.ones(1)})[0]
        wanted = Opening([x], 2.0**-30, 4.0, "test-number", (STATIC,))
        with pytest.raises(UndeclaredOpeningError, match="24 bits"):
            world.shown(wanted)
        return True

    assert all(three(run))


@pytest.mark.parametrize(
    "numbers", [[-3.0], [-UNIT], [UNIT], [3.0], [1.0, -UNIT], [-1.0, -2.0], [1.0, 2.0]]
)
def test_the_sign_of_sums(three, numbers):
    def run(session):
        world = Shares(session)
        y = shared(world, {STATIC: np.array([2.0])})[0]
        sums = [
            shared(world, {MOVING: np.array([number])})[0] * y for number in numbers
        ]
        sign = world.any_negative(sums, Digits(UNIT**2, 64.0), "test-bit", ALL)
        learned = session.ledger.learned()[ROLES[HELPER]]
        return sign, [(e["label"], e["values"], e["bits"]) for e in learned]

    expected = min(numbers) < 0
    assert three(run) == [(expected, [("test-bit", 1, 1.0)])] * 3
    clear = [Clear().own(np.array([x]), 0, (1,), KEPT) for x in numbers]
    assert Clear().any_negative(clear, KEPT, "test-bit", ALL) is expected


@pytest.mark.parametrize("n", [1, 3])
def test_rounds_and_bytes_of_a_sign(trio, depth, tap, payload_bytes, n):
    worlds = {s.pid: Shares(s) for s in trio}
    one = {MOVING: np.ones(1)}
    x = run_trio(trio, lambda s: shared(worlds[s.pid], one)[0])
    so_far, frames = depth(trio), tap(trio)

    def run(session):
        world, y = worlds[session.pid], x[session.pid]
        return world.any_negative([y * y] * n, KEPT, "test-bit", (MOVING, STATIC))

    assert run_trio(trio, run) == [False, False, None]
    # One of them the helper's first message.
    assert so_far() == 2 + (n > 1) + 1
    # 2 digits more than those kept, a sign, and room for sums of two.
    bits = math.ceil(math.log2(KEPT.bound / KEPT.unit)) + 6

    def keys(bits):
        return 2 * ((bits - 1) * 33 + 16) + 16

    expected = n * (16 + 64 + keys(bits)) + 64
    if n > 1:
        expected += 64 + keys(n.bit_length() + 3)
    assert payload_bytes(frames) == expected


@pytest.mark.parametrize("number", [2.0**40, -(2.0**90), 2.0**97])
def test_of_a_sum_beyond_what_was_promised_a_bit_is_opened(three, number):
    """As where an owner puts in what it may not."""

    def run(session):
        world, opened = Shares(session), []
        one = shared(world, {MOVING: np.ones(1)})[0]
        x = expression(one).times(round(number))
        inner = session.open

        def watched(*args, **options):
            opened.append(inner(*args, **options))
            return opened[-1]

        session.open = watched
        world.any_negative([x, x], Digits(UNIT, 8.0), "test-bit", (STATIC,))
        session.open = inner
        return opened[-1]

    found = three(run)
    assert found[MOVING] is None and found[HELPER] is None
    assert found[STATIC] in ([0.0], [1.0])


def test_a_coefficient_that_would_be_lost_is_refused():
    x = expression(Clear().own(np.ones(1), 0, (1,), KEPT))
    assert x.weighted(0.0, UNIT / 4).shape == (1,)
    with pytest.raises(ValueError, match="is nothing"):
        x.weighted(2.0**-8, UNIT / 4)


@pytest.mark.parametrize("bits", [None, 60, 100, 117])
def test_a_rounding_that_went_wrong_is_noticed(three, bits):
    """A part that is off by a power of two, as after a wrap.

    Eight weights are less than 2**11 together: 2**117 times that is not zero.
    """

    def run(session):
        world = Shares(session)
        x = shared(world, owned(9, (30,)))
        if bits is not None and session.pid == MOVING:
            off = R128.zeros((30,))
            off[:8] = R128.from_ints(1 << bits)
            x[1].part = R128.add(x[1].part, off)
        try:
            world.check(*((y, KEPT) for y in x))
        except RoundingError as exc:
            return str(exc)

    found = three(run)
    assert len(set(found)) == 1
    if bits is None:
        assert found[0] is None
    else:
        assert "left its range" in found[0]


def test_rates(trio):
    """A power's root to the middle of two powers of four, the same in the clear."""
    norms = [0.0, 1e-9, 1e-3, 0.4, 77.0, 2.0**20]
    digits, unit = Digits(2.0**-18, 64.0), 2.0**-72

    def rates(world):
        pid = world.session.pid if isinstance(world, Shares) else None
        given = [
            world.own(
                np.array([x]) if pid in (None, MOVING) else None,
                MOVING,
                (1,),
                Digits(unit, 2.0**21),
            )
            for x in norms
        ]
        return world.rates(given, 0.3, 8, digits)

    clear = [float(x.factor[0]) for x in rates(Clear())]
    shares = run_trio(trio, lambda s: rates(Shares(s)))
    found = [float(value([r[k] for r in shares])[0]) for k in range(len(norms))]
    assert found == clear
    for x, rate in zip(norms[2:], found[2:], strict=True):
        assert rate == pytest.approx(0.3 / x ** (1 / 8), rel=2 ** (1 / 8) - 0.99)


STEPS = [-1.5, 0.25, 8.0], [3.0, 1.0, -2.0, 7.5]
GROUPS = (("reached-low", [-2.0, 0.25, 1.0]), ("reached-high", [0.5, 5.0]))
for name, numbers in GROUPS:
    declare(name, ALL, "1", "how many numbers a test counts", np.log2(len(numbers) + 1))


def stepped(world, number):
    (x,) = shared(world, {MOVING: np.array([number])})
    return world.stepped(expression(x), *STEPS, KEPT, 2.0**-20)


@pytest.mark.parametrize("number", [-64.0, -1.5 - UNIT, -1.5, 0.0, 0.25, 8.0, 63.0])
def test_a_step_function_is_that_of_the_number(three, number):
    results = three(lambda s: stepped(Shares(s), number))
    whole = R128.add(results[MOVING].part, results[STATIC].part)
    wanted = stepped(Clear(), number)
    assert decoded(whole) * results[MOVING].unit == wanted.part
    assert wanted.part == STEPS[1][sum(number >= t for t in STEPS[0])]
    assert results[HELPER].part is None


@pytest.mark.parametrize("threshold", [-3.0, 0.25, 1.0, 4.0, 60.0])
def test_how_many_reach_a_threshold(trio, threshold):
    def count(world):
        (x,) = shared(world, {STATIC: np.array([1.0])})
        groups = []
        for label, numbers in GROUPS:
            given = [shared(world, {MOVING: np.array([v])})[0] for v in numbers]
            groups.append(([(g * x, threshold) for g in given], label, ALL))
        return world.reached(groups, KEPT)

    wanted = [sum(v >= threshold for v in numbers) for _, numbers in GROUPS]
    assert count(Clear()) == wanted
    results = run_trio(trio, lambda s: count(Shares(s)))
    # A product is rounded up or down by a unit.
    near = [sum(abs(v - threshold) <= UNIT for v in numbers) for _, numbers in GROUPS]
    for counts in results:
        assert all(
            w - n <= c <= w for c, w, n in zip(counts, wanted, near, strict=True)
        )
        assert counts == results[0]
    opened = trio[HELPER].ledger.opened
    for label, numbers in GROUPS:
        entry = opened[HELPER, label]
        assert entry.bits == pytest.approx(np.log2(len(numbers) + 1))
