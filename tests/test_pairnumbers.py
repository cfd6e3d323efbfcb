"""Numbers on shares of two owners alone; what they share with others: test_numbers."""

from math import ceil
import re

from dipy.align.imaffine import MutualInformationMetric
from dipy.align.transforms import regtransforms
import numpy as np
from oblivious import use_known_products
from parties import run_trio
import pytest

from dipy_ppir.align.hidden import longest_step, minimise_hidden
from dipy_ppir.align.quasinewton import (
    EXPONENTS,
    STEP_BITS,
    ClearNumbers,
    _ClearMetric,
    minimise,
    parts_by_size,
)
from dipy_ppir.align.secretmetric import secret_numbers
from dipy_ppir.mpc import pairnumbers as module
from dipy_ppir.mpc import pairproducts
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R64, R128
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.numbers import SecretNumbers
from dipy_ppir.mpc.pairnumbers import PairNumbers

P = 12


@pytest.fixture(autouse=True)
def known_products(monkeypatch):
    use_known_products(monkeypatch)


def give(numbers, x, owner=MOVING, **options):
    x = np.asarray(x, dtype=float)
    own = x if numbers.session.pid == owner else None
    return numbers.own(own, x.shape, owner=owner, **options)


def spread(session, integers, seed=4):
    """This owner's parts of integers, both of them uniform."""
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 1 << 64, (len(integers), 2), np.uint64)
    if session.pid == STATIC:
        return mask
    return R128.sub(R128.from_ints(list(integers)), mask)


def signed(integer, ring=R128):
    """The same modulo the ring's size, nearest to zero."""
    half = ring.modulus // 2
    return (int(integer) + half) % ring.modulus - half


def opened(parts, ring=R128):
    """Signed integers of both owners' parts."""
    return [signed(v, ring) for v in ring.to_ints(ring.add(*parts))]


def test_a_session_chooses_its_numbers(two, three):
    assert {type(n) for n in two(secret_numbers)} == {PairNumbers}
    assert {type(n) for n in three(secret_numbers)} == {SecretNumbers}


# -- products -----------------------------------------------------------------------

INTEGERS = [0, 1, -1, 12345, -(1 << 40), 1 << 70, -(1 << 88), (1 << 127) - 1]


def test_products_of_parts(two):
    other = INTEGERS[::-1]

    def run(session):
        x, y = spread(session, INTEGERS), spread(session, other, 5)
        mine = R128.from_ints(INTEGERS if session.pid == MOVING else other)
        return (
            pairproducts.crossed(session, mine),
            pairproducts.multiplied(session, x, y),
            pairproducts.squared(session, x),
        )

    crossed, product, square = map(opened, zip(*two(run), strict=True))
    assert (
        crossed
        == product
        == [signed(a * b) for a, b in zip(INTEGERS, other, strict=True)]
    )
    assert square == [signed(a * a) for a in INTEGERS]


@pytest.mark.parametrize("bits", [0, 1, 24, 64, 100])
@pytest.mark.parametrize("ring", [R64, R128])
def test_low_bits_are_dropped(two, bits, ring):
    """To a unit, for numbers of either sign, whatever the parts are."""
    numbers = [v for v in INTEGERS if abs(v) < 1 << 80]
    numbers = [v for v in numbers if abs(v) >> bits < 1 << 62] * 50

    def run(session):
        return pairproducts.shifted(session, spread(session, numbers), bits, ring)

    found = opened(two(run), ring)
    off = {f - (v >> bits) for f, v in zip(found, numbers, strict=True)}
    assert off <= ({0, 1} if bits else {0})
    assert bits == 0 or len(off) == 2


def test_what_is_sent_is_uniform_and_new_each_time(duo, tap):
    """The same numbers are hidden by others every time, at both owners."""
    frames = tap(duo)

    def run(session):
        for _ in range(20):
            numbers = secret_numbers(session)
            numbers.times((give(numbers, np.ones(P)), give(numbers, np.ones(P))))

    run_trio(duo, run)
    assert len(frames) == 40
    words = {p: [f[4] for f in frames if f[0] == p] for p in (MOVING, STATIC)}
    for sent in words.values():
        sent = np.stack([np.frombuffer(w, np.uint8) for w in sent])
        assert len(np.unique(sent.reshape(-1, 16), axis=0)) == 20 * 2 * P
        assert abs(np.unpackbits(sent).mean() - 0.5) < 0.02


# -- nothing else is shown ------------------------------------------------------------


def test_no_more_of_a_step_is_shown_whatever_it_is(duo, tap):
    """Of components and exponent few values, and no more bits than those of them."""
    rng = np.random.default_rng(2)
    huge = [
        int(v) << int(k) for v, k in zip(*rng.integers(1, 60, (2, 40)), strict=True)
    ]
    huge += [-v << 60 for v in huge]
    frames = tap(duo)

    def run(session):
        numbers = secret_numbers(session)
        parts = spread(session, huge)
        return [
            numbers.show_step(SharedArray(R128, parts[i : i + 8], 2, 24, 1 << 40))
            for i in range(0, len(huge), 8)
        ]

    shown = run_trio(duo, run)[MOVING]
    for exponent, mantissas in shown:
        assert EXPONENTS[0] <= exponent <= EXPONENTS[1]
        assert np.abs(mantissas).max() <= 2**STEP_BITS
    step, size = (
        np.frombuffer(frame[4], dtype)
        for frame, dtype in zip(frames[-2:], (np.uint32, np.uint64), strict=True)
    )
    assert not (step & np.uint32((1 << 27) - 1)).any()
    assert not size[0]
    assert not size[1] & np.uint64((1 << 60) - 1)


def test_one_bit_is_sent_of_a_bit(two):
    """Of what is no bit the lowest one is shown."""

    def run(session):
        numbers = secret_numbers(session)
        return [
            numbers.show_better(SharedArray(R128, spread(session, [v]), 2, 0, 1))
            for v in (0, 1, 6 << 90, 7, -1)
        ]

    assert two(run) == [[False, True, False, True, True], [None] * 5]


def test_a_value_is_blurred_by_its_last_digit(two):
    """What is below it is noise of the static owner's; above it there is no room."""
    value = -0.8125

    def run(session):
        numbers = secret_numbers(session)
        return [
            numbers.show_value(give(numbers, [v * 128]), 1 / 128)
            for v in [value] * 40 + [value + 2 * 8.192]
        ]

    *found, beyond = two(run)[MOVING]
    assert set(found) == {-0.812, -0.813}
    assert beyond in found


# -- steps ----------------------------------------------------------------------------


def test_numbers_out_of_range_come_into_it(two):
    bits = 37
    numbers = [0, 1, -1, (1 << bits) - 1, -(1 << bits), 1 << bits, 3 << 60, -(5 << 99)]

    def run(session):
        own = secret_numbers(session)
        array = SharedArray(R128, spread(session, numbers), 2, 0, 1 << 100)
        return own._in_range(array, bits).share

    half = 1 << bits
    expected = [(v + half) % (2 * half) - half for v in numbers]
    assert opened(two(run)) == expected
    assert expected[:5] == numbers[:5]


class Curved:
    """A quadratic function on shares, as `minimise` wants a metric."""

    basis = np.eye(P)

    def __init__(self, numbers):
        self.numbers = numbers
        self.hessian = np.geomspace(0.2, 5, P)

    def evaluate(self, x):
        value, gradient = None, None
        if x is not None:
            rest = x - np.linspace(-3, 3, P)
            value, gradient = [rest @ (self.hessian * rest) / 2], self.hessian * rest
        return (
            self.numbers.own(None if x is None else np.array(value), (1,)),
            self.numbers.own(gradient, (P,)),
        )

    def first_inverse(self, numbers):
        own = np.eye(P) if numbers.session.pid == MOVING else None
        return numbers.own(own, (P, P))


def test_a_registration_is_right_but_for_one_in_a_trillion(two):
    """44 evaluations of 12 parameters, where each number is as large as promised."""

    def run(session):
        numbers = secret_numbers(session)
        x = np.zeros(P) if session.pid == MOVING else None
        x, _ = minimise(numbers, Curved(numbers), x, 44, 4.0)
        return x, numbers.failures

    (x, odds), (_, others) = two(run)
    assert np.abs(x - np.linspace(-3, 3, P)).max() < 0.05
    assert 0 < odds == others < 2.0**-42


class Drawn:
    """Draws a matrix to another one, as `minimise_hidden` wants a metric."""

    generators = np.eye(P).reshape(P, 3, 4) / 64

    def __init__(self, numbers, goal):
        self.numbers, self.goal = numbers, goal

    def evaluate(self, matrix):
        rest = (matrix - self.goal).reshape(-1)
        return rest[:1], rest

    def first_inverse(self, numbers):
        mine = getattr(numbers, "session", None) is None or (
            numbers.session.pid == MOVING
        )
        return numbers.own(40 * np.eye(P) if mine else None, (P, P))


def test_hidden_steps_are_right_but_for_one_in_a_trillion(two):
    """They go where those in the clear go, and nobody sees them."""
    rng = np.random.default_rng(3)
    goal = ClearNumbers().fix(np.eye(4)[:3] + rng.uniform(-0.3, 0.3, (3, 4)))
    start, evaluations, longest = np.eye(4)[:3], 48, longest_step(1)

    def run(session):
        numbers = secret_numbers(session)
        metric = Drawn(numbers, give(numbers, goal))
        matrix = numbers.public(start)
        matrix = minimise_hidden(numbers, metric, matrix, evaluations, longest)
        right = numbers.own(
            start if session.pid == STATIC else None, (3, 4), owner=STATIC
        )
        shown = numbers.show_matrix(
            numbers.product(matrix, right), label="test-any", digits=14, bits=1, most=8
        )
        return shown, numbers.failures, set(session.ledger.opened)

    (shown, odds, labels), (other, *_) = two(run)
    clear = ClearNumbers()
    twin = minimise_hidden(clear, Drawn(clear, goal), start, evaluations, longest)
    assert other is None
    assert labels == {(MOVING, "test-any")}
    assert np.abs(shown - twin).max() <= 2.0**-14 + 2.0**-18
    assert np.abs(shown - goal).max() < 0.02
    assert 0 < odds < 2.0**-41


class Registered:
    """A metric of DIPY's whose numbers the moving owner puts on shares."""

    def __init__(self, numbers, metric, p):
        self.numbers, self.metric, self.p = numbers, metric, p
        self.basis = metric.basis if metric else None

    def evaluate(self, x):
        value, gradient = (None, None) if x is None else self.metric.evaluate(x)
        value = None if x is None else np.array([value])
        return self.numbers.own(value, (1,)), self.numbers.own(gradient, (self.p,))

    def first_inverse(self, numbers):
        inverse = self.metric and self.metric.first_inverse(ClearNumbers())
        return numbers.own(inverse, (self.p, self.p))


def test_registers_as_its_clear_twin(two, bodies):
    """By mutual information of two small images, step by step."""
    static, moving, static_grid2world, moving_grid2world = bodies(2)
    transform = regtransforms["AFFINE", 2]
    start = transform.get_identity_parameters()

    def measured():
        metric = MutualInformationMetric(nbins=24)
        metric.setup(
            transform,
            static,
            moving,
            static_grid2world=static_grid2world,
            moving_grid2world=moving_grid2world,
            starting_affine=np.eye(3),
        )
        return _ClearMetric(metric, ClearNumbers(), start, metric.distance)

    def minimised(numbers, metric, x):
        shown = []

        def note(proposal, better, value):
            shown.append((proposal.exponent, better))

        return minimise(numbers, metric, x, 20, 8.0, note)[0], shown

    def run(session):
        numbers = secret_numbers(session)
        own = session.pid == MOVING
        metric = Registered(numbers, measured() if own else None, len(start))
        return minimised(numbers, metric, start if own else None)

    (x, shown), (other, _) = two(run)
    twin = measured()
    y, steps = minimised(ClearNumbers(), twin, start)
    assert other is None
    values = [twin.evaluate(p)[0] for p in (start, x, y)]
    gained, twins = (values[0] - v for v in values[1:])
    assert twins > 0.2 * abs(values[0])
    assert abs(gained - twins) < 0.02 * twins
    assert shown[:3] == steps[:3]


def test_numbers_that_are_too_large_to_be_rounded(duo):
    numbers = secret_numbers(duo[MOVING])
    large = SharedArray(R128, R128.zeros((2,)), 2, 60, 1 << 90)
    with pytest.raises(FixedPointOverflowError, match="91 bits.*fewer fraction bits"):
        numbers._truncated([large], ())


def test_numbers_that_are_not_as_promised_are_not_shared(duo):
    numbers = secret_numbers(duo[MOVING])
    with pytest.raises(ValueError, match="expected an array of shape"):
        numbers.own(np.ones(3), (2,))
    with pytest.raises(FixedPointOverflowError, match="exceeds its declared bound"):
        numbers.own(np.array([1e9, 0]), (2,))
    with pytest.raises(FixedPointOverflowError, match="not finite"):
        numbers.own(np.array([np.nan, 0]), (2,))


# -- cost ---------------------------------------------------------------------------

ROW = re.compile(r"^`(\w+)` +(\d+) +(\S.*?)  +(\S.*?)  +(\S.*?)$", re.MULTILINE)
STATED = {name: columns for name, *columns in ROW.findall(module.__doc__)}
AHEAD = 1 << 14


def value_of(formula, **names):
    """Of a sum of products, such as ``64 n k + 3 m``."""
    terms = (term.split() for term in formula.split(" + "))
    return sum(
        np.prod([int(f) if f.isdigit() else names[f] for f in term], dtype=int)
        for term in terms
    )


VERBS = {
    "own": lambda n, u, h: give(n, np.ones(u.shape)),
    "dots": lambda n, u, h: n.dots((h, u)),
    "times": lambda n, u, h: n.times((u, u)),
    "outer": lambda n, u, h: n.outer(u, u),
    "gates": lambda n, u, h: n.gates((u, u)),
    "either": lambda n, u, h: n.either(*[give(n, u.share[:, 0] > 1, digits=0)] * 2),
    "product": lambda n, u, h: n.product(h[:3, :4], h[:3, :4]),
    "moved": lambda n, u, h: n.moved(h[:3, :4], h[:3, :4]),
    "mean": lambda n, u, h: n.mean([u, u]),
    "less": lambda n, u, h: n.less((u, u)),
    "inverses": lambda n, u, h: n.inverses(u),
    "limited": lambda n, u, h: n.limited(
        u, parts_by_size(4, 0.4), np.zeros((*u.shape, 3, 4))
    ),
    "show_step": lambda n, u, h: n.show_step(u),
}


def test_every_verb_is_measured():
    assert set(STATED) == set(VERBS)


@pytest.mark.parametrize("size", [5, 12])
@pytest.mark.parametrize("verb", list(VERBS))
def test_rounds_bytes_and_what_is_made_ahead(
    duo, tap, depth, payload_bytes, verb, size
):
    taken = []

    def party(session):
        numbers = secret_numbers(session)
        u, h = give(numbers, np.ones(size)), give(numbers, np.ones((size, size)))
        for sender in (MOVING, STATIC):
            session.transfers.reserve(AHEAD, sender)
        take = session.multiplications.take
        session.multiplications.take = lambda n: taken.append(n) or take(n)
        yield
        VERBS[verb](numbers, u, h)

    steps = {s.pid: party(s) for s in duo}
    run_trio(duo, lambda s: next(steps[s.pid]))
    frames, count = tap(duo), depth(duo)
    run_trio(duo, lambda s: next(steps[s.pid], None))
    transfers = sum(AHEAD - duo[MOVING].transfers.left(p) for p in (MOVING, STATIC))
    matrix = verb in ("moved", "product")
    n = {"outer": size**2}.get(verb, 12 if matrix else size)
    names = {"n": n, "m": ceil(n / 8), "k": 3 if matrix else size}
    rounds, sent, products, moved = STATED[verb]
    assert count() == int(rounds)
    # Bits are sent in whole bytes.
    assert 0 <= value_of(sent, **names) - payload_bytes(frames) < n + 1
    assert sum(taken) == 2 * value_of(products, **names)
    assert transfers == value_of(moved, **names)


@pytest.mark.parametrize(("what", "size"), [("bit", 16), ("value", 16), ("matrix", 96)])
def test_what_is_opened_is_sent_by_the_other_owner(duo, tap, what, size):
    frames = tap(duo)

    def run(session):
        numbers = secret_numbers(session)
        if what == "bit":
            numbers.show_better(give(numbers, [1], digits=0))
        elif what == "value":
            numbers.show_value(give(numbers, [1]), 1)
        else:
            numbers.show_matrix(
                give(numbers, np.ones((3, 4))),
                label="test-any",
                digits=14,
                bits=1,
                most=8,
            )

    run_trio(duo, run)
    assert [(f[0], len(f[4])) for f in frames] == [(STATIC, size)]
