"""Numbers on shares, with a helper and without, against the same in the clear."""

import re

import noise
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
from oblivious import use_known_products
from parties import run_trio
import pytest
from scipy.linalg import expm as special_expm

from dipy_ppir.align import quasinewton
from dipy_ppir.align.quasinewton import (
    DIGITS,
    EXPONENTS,
    FINE_DIGITS,
    FLOOR,
    STEP_BITS,
    ClearNumbers,
    minimise,
)
from dipy_ppir.align.secretmetric import secret_numbers
from dipy_ppir.mpc import numbers as module
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import P127
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.protocols import share_elements

UNIT = 2.0**-DIGITS


def give(numbers, x, **options):
    """Numbers of the moving owner's, on shares."""
    x = np.asarray(x, dtype=float)
    own = x if numbers.session.pid == MOVING else None
    return numbers.own(own, x.shape, **options)


def look(numbers, *arrays):
    """What is on shares, opened to the moving owner."""
    return [numbers.session.open(a, "test-any", (MOVING,)) for a in arrays]


@pytest.fixture(autouse=True)
def same_randomness(monkeypatch):
    """Rounding is by chance in part."""
    noise.fix_randomness(monkeypatch)


@pytest.fixture(params=["three", "two"])
def parties(request, monkeypatch):
    """Run a function at the parties of a session with a helper, or of owners alone."""
    use_known_products(monkeypatch)
    return request.getfixturevalue(request.param)


@pytest.fixture
def computed(parties):
    """Compute on shares; what the moving owner is opened."""

    def compute(function, *given, **options):
        def party(session):
            numbers = secret_numbers(session)
            shared = [give(numbers, x, **options) for x in given]
            return look(numbers, *function(numbers, *shared))

        return parties(party)[MOVING]

    return compute


@pytest.mark.parametrize("p", [1, 6, 12])
def test_products(computed, p):
    """All are right to a unit of the last place, or two."""
    rng = np.random.default_rng(p)
    clear = ClearNumbers()
    h, u, v = (clear.fix(rng.uniform(-50, 50, s)) for s in ((p, p), p, p))
    c = clear.fix([rng.uniform(-5, 5)])

    def products(n, h, u, v, c):
        digits = {"digits": (DIGITS, FINE_DIGITS)}
        return [
            *n.dots((h, u), (u, v), **digits),
            *n.times((u, v), (c, h), bounds=(1 << 12, 1 << 9)),
            n.outer(u, v),
            n.complement(u),
            n.raised(u),
            5 * u,
        ]

    got = computed(products, h, u, v, c)
    expected = [
        h @ u,
        [u @ v],
        u * v,
        c * h,
        (np.outer(u, v) + np.outer(v, u)) / 2,
        1 - u,
        1 + u,
        5 * u,
    ]
    units = [1, 2.0 ** (DIGITS - FINE_DIGITS), 1, 1, 2, 0, 0, 0]
    for a, b, unit in zip(got, expected, units, strict=True):
        assert a.shape == np.shape(b)
        assert np.abs(a - b).max() <= unit * UNIT


def test_bits_choose_exactly(computed):
    x, y = np.array([3.25, -1.0, 0.0]), np.array([0.5])

    def choose(n, x, y):
        smaller, larger, same = n.less((y, 2 * y), (2 * y, y), (y, y))
        return smaller, larger, same, *n.gates((smaller, x), (larger, x), (smaller, y))

    smaller, larger, same, kept, dropped, scalar = computed(choose, x, y)
    assert (smaller, larger, same) == (1, 0, 0)
    assert_array_equal(kept, x)
    assert_array_equal(dropped, 0)
    assert_array_equal(scalar, y)


def test_comparisons_near_and_far(computed):
    gaps = np.array([UNIT, -UNIT, 0, 2.0**12, -(2.0**12), 8191, -8191])

    def compare(n, x):
        return n.less((x, 0 * x))

    (less,) = computed(compare, gaps, bound=1 << 14)
    assert_array_equal(less, gaps < 0)


def test_whatever_is_compared_is_as_small_as_mpyc_expects(three):
    """MPyC's masks are longer than a number by 42 bits: a large one would show."""
    rng = np.random.default_rng(3)
    values = [int(v) << k for k, v in enumerate(rng.integers(1, 1 << 40, 60))]
    values += [-v for v in values] + [P127.modulus // 2, 1, -1, 0]

    def party(session):
        numbers = secret_numbers(session)
        own = P127.from_ints(values) if session.pid == MOVING else None
        part = share_elements(session, MOVING, own, (len(values),), P127, "any")
        huge = SharedArray(P127, part, 1, 0, 1 << 60)
        compared = module._in_range(session, huge)
        (bits,) = numbers.less((huge, huge - huge))
        return [
            session.open(a, "test-any", (MOVING,), raw=raw)
            for a, raw in ((bits, False), (compared, True))
        ] + [compared.bound]

    opened, compared, bound = three(party)[MOVING]
    assert set(opened) <= {0.0, 1.0}
    small = np.array([abs(v) < 1 << module.COMPARABLE_BITS for v in values])
    negative = np.array([v < 0 for v in values])
    assert (opened[small] == negative[small]).all()
    assert 20 < small.sum() < 100
    half = P127.modulus // 2
    for value in P127.to_ints(compared):
        assert abs(int(value) - (P127.modulus if value > half else 0)) <= bound
    assert bound.bit_length() + 1 + 42 < 127


@pytest.mark.parametrize("digits", [DIGITS, FINE_DIGITS, 36])
def test_reciprocals(computed, digits):
    rng = np.random.default_rng(digits)
    x = rng.uniform(1, 2, 60) * 2.0 ** rng.integers(-24, 20, 60)
    x[:3] = 0.0, 2.0**-FINE_DIGITS, 2.0**20

    def invert(n, x, y):
        return n.inverses(x, y, digits=digits)

    first, second = computed(invert, x, [0.25], digits=FINE_DIGITS, bound=1 << 21)
    x = ClearNumbers().fix(x, FINE_DIGITS) + FLOOR + 2.0**-FINE_DIGITS
    # The polynomial's error and a unit of the fraction's; those of the result.
    assert np.all(np.abs(first - 1 / x) <= 1e-6 / x + 2 * 2.0**-digits)
    assert second.shape == (1,)
    assert_allclose(second, 4, rtol=1e-6)


def test_steps_are_shown_to_a_few_bits(parties):
    """Nearest, but for a sixteenth of a unit; the exponent may be one too large."""
    rng = np.random.default_rng(1)
    steps = [rng.standard_normal(12) * 2.0 ** rng.uniform(-12, 5) for _ in range(40)]
    steps += [np.zeros(12), np.eye(12)[3] * 64, np.eye(12)[0] * -(2.0**13)]

    def party(session):
        numbers = secret_numbers(session)
        return [numbers.show_step(give(numbers, u)) for u in steps]

    shown, *others = parties(party)
    assert all(o == [(None, None)] * len(steps) for o in others)
    larger = 0
    for u, (exponent, mantissas) in zip(steps, shown, strict=True):
        size = np.linalg.norm(u)
        true = int(np.ceil(np.log2(max(size, 2.0 ** EXPONENTS[0]))))
        assert np.abs(mantissas).max() <= 2**STEP_BITS
        if true >= EXPONENTS[1]:
            assert exponent == EXPONENTS[1]
            continue
        assert exponent - true in (0, 1)
        larger += exponent - true
        lost = np.abs(mantissas - u * 2.0 ** (STEP_BITS - exponent)).max()
        assert lost <= 0.5 + 2.0**-module.ROUNDED_DIGITS + 2.0**-8
    assert 0 < larger < len(steps)


def test_what_is_shown_is_counted(parties):
    """Bits by the number of values that each number can have."""

    def party(session):
        numbers = secret_numbers(session)
        u = give(numbers, np.ones(6))
        numbers.show_step(u)
        (bit,) = numbers.less((u[:1], 2 * u[:1]))
        better = numbers.show_better(bit)
        value = numbers.show_value(give(numbers, [-0.8125 * 128]), 1 / 128)
        return session.ledger.opened, better, value

    opened, better, value = parties(party)[MOVING]
    assert better is True
    assert abs(value + 0.8125) <= 1e-3
    assert {key: (e.values, e.bits) for key, e in opened.items()} == {
        (MOVING, "step"): (6, pytest.approx(6 * np.log2(17))),
        (MOVING, "step_size"): (1, 4),
        (MOVING, "better"): (1, 1),
        (MOVING, "final_value"): (1, pytest.approx(np.log2(16383), abs=1e-4)),
    }
    del opened[MOVING, "final_value"]
    bits = sum(e.bits for e in opened.values())
    assert bits == pytest.approx(quasinewton.opened_bits(6))


def test_others_are_shown_nothing(parties):
    def party(session):
        numbers = secret_numbers(session)
        u = give(numbers, np.ones(3))
        (bit,) = numbers.less((u[:1], 2 * u[:1]))
        return (
            numbers.show_better(bit),
            numbers.show_value(u[:1], 1 / 128),
            numbers.show_step(u),
        )

    _, *others = parties(party)
    assert all(o == (None, None, (None, None)) for o in others)


# -- the optimizer, against its clear twin ----------------------------------------


class Following(ClearNumbers):
    """The clear twin, which takes the steps that were shown on shares.

    It checks that each is the step that it would have taken, to what rounding may do.
    """

    def __init__(self, shown):
        super().__init__()
        self.shown = iter(shown)
        self.worst, self.doubtful = 0.0, 0

    def show_step(self, u):
        (exponent, mantissas), self.better = next(self.shown)
        low, high = EXPONENTS
        true = int(np.ceil(np.log2(max(np.linalg.norm(u), 2.0**low)) - 1e-6))
        if true < high:
            assert exponent - true in (0, 1)
            lost = np.abs(mantissas - u * 2.0 ** (STEP_BITS - exponent)).max()
            self.worst = max(self.worst, lost)
        return exponent, mantissas

    def show_better(self, bit):
        self.doubtful += bool(bit) != self.better
        return self.better


class Function:
    """A function as `minimise` wants a metric."""

    def __init__(self, numbers, function, p):
        self.numbers, self.function, self.p = numbers, function, p
        self.basis = np.eye(p)
        self.secret = not isinstance(numbers, ClearNumbers)

    def evaluate(self, x):
        value, gradient = (None, None) if x is None else self.function(x)
        if self.secret:
            value = None if x is None else np.array([value])
            return (
                self.numbers.own(value, (1,)),
                self.numbers.own(gradient, (self.p,)),
            )
        return self.numbers.fix(value), self.numbers.fix(gradient)

    def first_inverse(self, numbers):
        own = not self.secret or numbers.session.pid == MOVING
        return numbers.own(np.eye(self.p) if own else None, (self.p, self.p))


def quadratic(p):
    rng = np.random.default_rng(p)
    q, _ = np.linalg.qr(rng.standard_normal((p, p)))
    hessian = q * np.geomspace(0.1, 10, p) @ q.T
    best = rng.uniform(-3, 3, p)
    return lambda x: ((x - best) @ hessian @ (x - best) / 2, hessian @ (x - best))


def valley(x):
    a, b = x[0] / 2, x[1] / 2
    slope = [-2 * (1 - a) - 40 * a * (b - a * a), 20 * (b - a * a)]
    return (1 - a) ** 2 + 10 * (b - a * a) ** 2, np.array(slope) / 2


@pytest.mark.parametrize("p", [2, 6, 12, "valley"])
def test_minimises_as_its_clear_twin(parties, p):
    """Step by step: what is shown is what the twin would show there."""
    function, p = (valley, 2) if p == "valley" else (quadratic(p), p)
    start = np.array([-2.0, 2.0]) if function is valley else np.zeros(p)
    evaluations = 26

    def run(numbers, x):
        shown = []

        def note(proposal, better, value):
            shown.append((tuple(proposal), better))

        metric = Function(numbers, function, p)
        x, value = minimise(numbers, metric, x, evaluations, 4.0, note)
        return x, value, shown

    def party(session):
        numbers = secret_numbers(session)
        x, value, shown = run(numbers, start if session.pid == MOVING else None)
        return x, look(numbers, value)[0], shown

    (x, value, shown), *others = parties(party)
    assert all((o[0], o[1]) == (None, None) for o in others)
    assert all(s == ((None, None), None) for o in others for s in o[2])
    twin = Following(shown)
    twin_x, twin_value, _ = run(twin, start)
    assert_allclose(x, twin_x, atol=1e-12)
    assert_allclose(value, twin_value, atol=4 * UNIT)
    # Half a unit, a sixteenth, and what errors of the last digits make of a step.
    assert twin.worst < 0.75
    # Where two values are equal to a unit or two.
    assert twin.doubtful <= 2
    assert value[0] < 0.02 * function(start)[0]


# -- cost -------------------------------------------------------------------------

STATED = {
    name: (rounds, formula)
    for name, rounds, formula in re.findall(
        r"^`(\w+)` +(\d+) +([^\n]*(?:\n {26,}\S[^\n]*)*)", module.__doc__, re.MULTILINE
    )
}


@pytest.mark.parametrize("verb", ["dots", "times", "gates", "outer", "own"])
def test_rounds_and_bytes(trio, tap, depth, payload_bytes, verb):
    n = 5

    def party(session):
        numbers = secret_numbers(session)
        u, h = give(numbers, np.ones(n)), give(numbers, np.ones((n, n)))
        bit = give(numbers, np.ones(1), digits=0)
        yield
        if verb == "dots":
            numbers.dots((h, u))
        elif verb == "times":
            numbers.times((u, u))
        elif verb == "gates":
            numbers.gates((bit, u))
        elif verb == "outer":
            numbers.outer(u, u)
        else:
            give(numbers, np.ones(n))

    steps = {s.pid: party(s) for s in trio}
    run_trio(trio, lambda s: next(steps[s.pid]))
    frames, count = tap(trio), depth(trio)
    run_trio(trio, lambda s: next(steps[s.pid], None))
    rounds, formula = STATED[verb]
    per_value = int(re.match(r"(\d+) n", formula)[1])
    assert count() == int(rounds)
    assert payload_bytes(frames) == per_value * (n * n if verb == "outer" else n)


@pytest.mark.parametrize("verb", ["limited", "moved", "mean", "show"])
def test_rounds_and_bytes_of_steps_that_are_not_shown(
    trio, tap, depth, payload_bytes, verb
):
    p, n = 5, 12

    def party(session):
        numbers = secret_numbers(session)
        u, matrix = give(numbers, np.ones(p)), give(numbers, np.ones((3, 4)))
        yield
        if verb == "limited":
            numbers.limited(u, parts(), np.zeros((p, 3, 4)))
        elif verb == "moved":
            numbers.moved(matrix, matrix)
        elif verb == "mean":
            numbers.mean([matrix, matrix])
        else:
            shown = {"label": "test-any", "digits": 16, "bits": 1, "most": 16}
            numbers.show_matrix(matrix, **shown)

    steps = {s.pid: party(s) for s in trio}
    run_trio(trio, lambda s: next(steps[s.pid]))
    frames, count = tap(trio), depth(trio)
    run_trio(trio, lambda s: next(steps[s.pid], None))
    rounds, formula = STATED[verb]
    terms = [int(t) for t in re.findall(r"\d+", formula)]
    if verb == "limited":
        expected = sum(terms[:-2]) + p * terms[-2] + n * terms[-1]
    else:
        expected = terms[0] * n
    if verb == "show":
        expected += 2 * 8 * n  # what is opened
    assert count() == int(rounds)
    assert payload_bytes(frames) == expected


@pytest.mark.parametrize("verb", ["inverses", "show_step"])
def test_rounds_and_bytes_of_what_is_not_linear(trio, tap, depth, payload_bytes, verb):
    n = 5

    def party(session):
        numbers = secret_numbers(session)
        u = give(numbers, np.ones(n))
        yield
        if verb == "inverses":
            numbers.inverses(u)
        else:
            numbers.show_step(u)

    steps = {s.pid: party(s) for s in trio}
    run_trio(trio, lambda s: next(steps[s.pid]))
    frames, count = tap(trio), depth(trio)
    run_trio(trio, lambda s: next(steps[s.pid], None))
    rounds, formula = STATED[verb]
    formula = formula.partition(", and what")[0]
    terms = [sum(map(int, re.findall(r"\d+", part))) for part in formula.split("and")]
    expected = terms[0] * n if verb == "inverses" else terms[0] + n * terms[1]
    if verb == "show_step":
        expected += 2 * 4 * n + 2 * 16  # what is opened
    assert count() == int(rounds)
    assert payload_bytes(frames) == expected


def test_field():
    assert P127.bits - 40 > (module.MAGNITUDE.bit_length() + FINE_DIGITS + DIGITS)


# -- steps that are not shown ------------------------------------------------------


def parts():
    return quasinewton.parts_by_size(4.0, 0.4)


@pytest.mark.parametrize("size", [2.0**-20, 0.3, 5.0, 900.0])
def test_a_step_that_is_not_shown(computed, size):
    """Of the right direction, the limited length, and what that does."""
    rng = np.random.default_rng(4)
    clear = ClearNumbers()
    ascent = rng.standard_normal(12)
    ascent = clear.fix(ascent / np.linalg.norm(ascent) * size)
    directions = rng.uniform(-0.05, 0.05, (12, 3, 4))
    *found, motion = computed(
        lambda n, u: n.limited(u, parts(), directions), ascent, bound=1 << 30
    )
    # The size may be taken to be larger by a binary place of its square.
    choices = [
        clear.limited(ascent, table, directions)
        for table in (parts(), [*parts()[1:], 0.0])
    ]
    expected = min(choices, key=lambda c: np.abs(c[0] - found[0]).max())
    # The public factors of the last two have few digits.
    sizes = 2.0 ** -(module.DIRECTION_DIGITS + 1) * np.abs(expected[0])
    rounded = 0, 0, 0, sizes.max(), sizes.sum()
    for a, b, more in zip((*found, motion), expected, rounded, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 3 * UNIT + more
    assert np.linalg.norm(found[0]) <= 0.4 * 4.0 + 12 * UNIT
    assert_allclose(found[2], 0.4, atol=UNIT)
    if size < 1:
        assert_allclose(found[0], -0.4 * ascent, atol=3 * UNIT)


@pytest.mark.parametrize("size", [2.0**13, 2.0**18, 2.0**22.3, 2.0**26, 2.0**29])
def test_no_step_is_longer_whatever_is_given(computed, size):
    """A quasi-Newton step out of range is another one, and is cut as short."""
    rng = np.random.default_rng(5)
    directions = rng.uniform(-0.05, 0.05, (12, 3, 4))
    for _ in range(4):
        ascent = rng.standard_normal(12)
        ascent *= size / np.abs(ascent).max()
        vector, *_, motion = computed(
            lambda n, u: n.limited(u, parts(), directions), ascent, bound=1 << 30
        )
        assert np.linalg.norm(vector) <= 0.4 * 4.0 + 12 * UNIT
        expected = np.tensordot(vector, directions, 1)
        assert np.abs(motion - expected).max() < 1e-5


@pytest.mark.parametrize("dim", [2, 3])
def test_a_matrix_that_moves(computed, dim):
    """To second order, as a matrix exponential."""
    rng = np.random.default_rng(dim)
    clear = ClearNumbers()
    motion = clear.fix(rng.uniform(-0.1, 0.1, (dim, dim + 1)))
    matrix = clear.fix(rng.uniform(-3, 3, (dim, dim + 1)))

    def move(n, motion, matrix):
        moved = n.moved(matrix, motion)
        return moved, n.mean([matrix, moved])

    moved, mean = computed(move, motion, matrix)
    assert np.abs(moved - clear.moved(matrix, motion)).max() <= 4 * UNIT
    assert np.abs(mean - clear.mean([matrix, moved])).max() <= UNIT
    square = np.zeros((dim + 1, dim + 1))
    square[:dim] = motion
    whole = np.vstack([matrix, np.eye(dim + 1)[-1]])
    exact = (whole @ special_expm(square))[:dim]
    assert np.abs(moved - exact).max() < 6 * np.abs(motion).max() ** 3


@pytest.mark.parametrize("owner", [None, MOVING, STATIC])
def test_a_matrix_is_shown(parties, owner):
    """By itself, and after one of an owner's."""
    rng = np.random.default_rng(owner)
    matrix = ClearNumbers().fix(rng.uniform(-3, 3, (3, 4)))
    right = np.eye(4)
    if owner is not None:
        right[:3] = rng.uniform(-1, 1, (3, 4))

    def party(session):
        numbers = secret_numbers(session)
        shared = give(numbers, matrix)
        if owner is not None:
            own = right[:3] if session.pid == owner else None
            shared = numbers.product(shared, numbers.own(own, (3, 4), owner=owner))
        shown = numbers.show_matrix(
            shared, label="test-any", digits=16, bits=1.5, most=16
        )
        return shown, session.ledger.opened

    (shown, opened), *others = parties(party)
    assert all(o[0] is None for o in others)
    expected = matrix @ right
    assert np.abs(shown - expected).max() <= 2.0**-16
    (entry,) = opened.values()
    assert entry.values == 12
    assert entry.bits == pytest.approx(18)


def test_nothing_above_what_may_be_shown_is_shown(parties):
    """Two numbers that differ above the largest one look alike."""

    def party(session):
        numbers = secret_numbers(session)
        shared = give(numbers, np.full((3, 4), 40.25))
        return numbers.show_matrix(
            shared, label="test-any", digits=16, bits=21, most=16
        )

    shown = parties(party)[MOVING]
    assert np.abs(shown - (40.25 - 32)).max() <= 2.0**-16
