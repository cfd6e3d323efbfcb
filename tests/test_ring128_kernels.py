"""The kernels modulo 2**128, and the rings' arrays, against Python's integers.

Every test of a kernel runs on every instruction set this processor has, because some
loops are written separately for each of them.
"""

from fractions import Fraction
from functools import partial
from itertools import product
import math
from threading import Thread

from examples import quick
from hypothesis import example, given
from hypothesis import strategies as st
import numpy as np
import pytest

from dipy_ppir._kernels import ring128
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R64, R128

ALL = 1 << 128
WORD = (1 << 64) - 1
WORD_EDGES = [0, 1, 2, WORD, WORD - 1, 1 << 63, (1 << 63) - 1, 1 << 32, (1 << 32) - 1]
EDGES = [0, 1, 2, WORD, WORD + 1, WORD + 2, ALL - 1, ALL - 2, ALL - WORD]
EDGES += [ALL // 2, ALL // 2 - 1, ALL // 2 + 1, 1 << 96, (1 << 96) - 1, WORD << 32]
LIMIT = math.nextafter(2.0**127, 0)  # the largest real that can be encoded
MOST_WEIGHT = 1 << 31  # magnitudes of a row of weights add up to less
THREADS = [1, 2, 5]

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.one_of(st.integers(0, 20), st.sampled_from([63, 64, 65, 257]))
CONSTANTS = st.one_of(
    st.integers(-(2**140), 2**140), st.sampled_from(EDGES), st.integers(-3, 3)
)


@pytest.fixture(scope="module", params=range(ring128._use_level(2) + 1), autouse=True)
def level(request):
    """Run the module on each instruction set, then go back to the best one."""
    assert ring128._use_level(request.param) == request.param
    yield request.param
    ring128._use_level(2)


def elements(rng, *shape):
    """Draw uniform elements; every fourth word is an edge value."""
    out = rng.integers(0, WORD, (*shape, 2), dtype=np.uint64, endpoint=True)
    edge = rng.random(out.shape) < 0.25
    out[edge] = rng.choice(np.array(WORD_EDGES, np.uint64), np.count_nonzero(edge))
    return out


def lines(rng, outer, n, inner):
    """Draw what `box` and `filter_axis` take: elements side by side on one axis."""
    return elements(rng, outer, n, inner).reshape(outer, n, 2 * inner)


def pack(values):
    """Put Python integers of any size into words, low word first."""
    values = np.asarray(values, dtype=object)
    out = np.empty((*values.shape, 2), np.uint64)
    for at, v in np.ndenumerate(values):
        out[at] = v & WORD, v >> 64 & WORD
    return out


def ints(a):
    """Python integers of elements, which lie side by side on the last axis."""
    a = a.astype(object)
    return a[..., 0::2] + (a[..., 1::2] << 64)


def guarded(array):
    """Copy an array into a longer one; return the copy and a check of the rest.

    The copy begins 8 bytes off a multiple of 16, where wide loads are not aligned.
    """
    memory = np.full(array.nbytes + 272, 0xAD, np.uint8)
    inner = memory[136 : 136 + array.nbytes].view(array.dtype).reshape(array.shape)
    inner[...] = array

    def check():
        assert (memory[:136] == 0xAD).all() and (memory[-136:] == 0xAD).all()

    return inner, check


def run(name, *args, **options):
    """Call a kernel on copies of its arguments; return the last, its output."""
    copies = [guarded(a) if isinstance(a, np.ndarray) else (a, None) for a in args]
    getattr(ring128, name)(*(copy for copy, _ in copies), **options)
    for before, (after, check) in zip(args[:-1], copies[:-1], strict=True):
        assert np.array_equal(before, after), "an input was changed"
        assert check is None or check() is None
    out, check = copies[-1]
    check()
    return out


def same_ints(out, expected):
    """Whether elements are those of Python integers, of any size, in any shape."""
    found = ints(out).reshape(-1).tolist()
    return found == [int(v) % ALL for v in np.asarray(expected, object).reshape(-1)]


# -- slow plain twins -----------------------------------------------------------


def plain_box(x, radius, first, count):
    """Window sums along the middle axis of Python integers."""
    out = np.empty((x.shape[0], count, x.shape[2]), object)
    for i in range(count):
        low, high = max(first + i - radius, 0), first + i + radius + 1
        out[:, i] = x[:, low:high].sum(axis=1)
    return out


def plain_windows(image, radius):
    """Sums of Python integers over whole windows, cut off at the borders."""
    out = np.empty(image.shape, object)
    for at in np.ndindex(image.shape):
        out[at] = image[tuple(slice(max(i - radius, 0), i + radius + 1) for i in at)]
        out[at] = out[at].sum()
    return out


def plain_filter(x, first, weights):
    """Weighted sums along the middle axis of Python integers."""
    out = np.empty((x.shape[0], len(first), x.shape[2]), object)
    for i, (f, row) in enumerate(zip(first, weights.astype(object), strict=True)):
        out[:, i] = (row[:, None] * x[:, f : f + len(row)]).sum(axis=1)
    return out


# -- constants and known answers ------------------------------------------------


def test_names():
    assert (ring128.BITS, ring128.WORDS, ring128.MOST_WEIGHT) == (128, 2, 1 << 31)
    public = {n for n in dir(ring128) if callable(getattr(ring128, n)) and n[0] != "_"}
    assert public == {*matching(), "encode", "decode"}


def test_levels(level):
    best = ring128._use_level(99)
    assert best >= level
    assert ring128._use_level(-1) == 0
    assert ring128._use_level(level) == level


def test_known_answers():
    a = np.array([[WORD, 0], [0, 1], [WORD, WORD], [3, 1 << 63]], np.uint64)
    b = np.array([[1, 0], [WORD, 0], [1, 0], [2, 1 << 63]], np.uint64)
    zero = np.zeros_like(a)
    expected = [[0, 1], [WORD, 1], [0, 0], [5, 0]]
    assert run("add", a, b, zero).tolist() == expected
    # -1 + 2^64, 1, -2 and 1
    expected = [[WORD - 1, 0], [1, 0], [WORD - 1, WORD], [1, 0]]
    assert run("sub", a, b, zero).tolist() == expected
    expected = [[1, WORD], [0, WORD], [1, 0], [WORD - 2, (1 << 63) - 1]]
    assert run("neg", a, zero).tolist() == expected
    # (3 + 2^127) (2 + 2^127) = 6 + 5 2^127 = 6 + 2^127
    expected = [[WORD, 0], [0, WORD], [WORD, WORD], [6, 1 << 63]]
    assert run("mul", a, b, zero).tolist() == expected
    # -3 (2^64 - 1), -3 2^64, 3, -9 - 3 2^127
    expected = [[3, WORD - 2], [0, WORD - 2], [3, 0], [WORD - 8, (1 << 63) - 1]]
    assert run("scale", a, -3, zero).tolist() == expected
    # 5 + 2 (2^64 - 1), 5 - 2 2^64, 5 - 2, 5 + 12
    expected = [[3, 2], [5, WORD - 1], [3, 0], [17, 0]]
    five = np.tile(np.array([5, 0], np.uint64), (4, 1))
    assert run("addmul", a, b, 2, five).tolist() == expected
    # 2^64 - 1 - 2^64 - 1 + 6 + 2^127
    assert run("dot", a, b, zero[:1]).tolist() == [[4, 1 << 63]]

    x = pack([[1], [-1], [1 << 64], [1 << 127], [1 << 127]]).reshape(1, 5, 2)
    expected = [[0, 0], [0, 1], [WORD, (1 << 63)], [0, 1], [0, 0]]
    assert run("box", x, 1, 0, np.zeros_like(x)).tolist() == [expected]
    expected = [[WORD, 0], [0, 1]]
    assert run("box", x, 2, 3, np.zeros_like(x[:, :2])).tolist() == [expected]
    first = np.array([3, 0, 1])
    weights = np.array([[2, 1], [1, 2], [65535, 3]], np.int32)
    # 3 2^127, 1 - 2 and 3 2^64 - 65535
    expected = [[0, 1 << 63], [WORD, WORD], [WORD - 65534, 2]]
    out = run("filter_axis", x, first, weights, np.zeros((1, 3, 2), np.uint64))
    assert out.tolist() == [expected]
    weights[:, 1] = -3, -2, -(2**31) + 65536
    # -2^127, 1 + 2 and -65535 - 2^64 (2^31 - 65536)
    expected = [[0, 1 << 63], [3, 0], [WORD - 65534, WORD - 2**31 + 65536]]
    out = run("filter_axis", x, first, weights, np.zeros((1, 3, 2), np.uint64))
    assert out.tolist() == [expected]

    a = pack([5, -5, 7 << 100, (7 << 100) + 1])
    # Without an offset, numbers of 128 bits; with one of 2^127, signed ones.
    expected = [[2, 0], [WORD - 2, WORD >> 1], [0, 7 << 35], [0, 7 << 35]]
    assert run("shift", a, 0, 1, False, zero).tolist() == expected
    expected = [[2, 0], [WORD - 2, WORD], [0, 7 << 35], [0, 7 << 35]]
    assert run("shift", a, 1 << 127, 1, False, zero).tolist() == expected
    expected = pack([-((ALL - 5) >> 1), -2, -((ALL - (7 << 100)) >> 1)]).tolist()
    assert run("shift", a[:3], 0, 1, True, zero[:3]).tolist() == expected


# -- element by element ---------------------------------------------------------


@quick(60)
@given(SEEDS, SIZES, CONSTANTS)
@example(1, 0, 1)
@example(2, 1, -1)
@example(3, 257, ALL - 1)
def test_elementwise(seed, n, c):
    rng = np.random.default_rng(seed)
    a, b, out = (elements(rng, n) for _ in range(3))
    x, y, z = (ints(v)[:, 0] for v in (a, b, out))
    assert same_ints(run("add", a, b, out), x + y)
    assert same_ints(run("sub", a, b, out), x - y)
    assert same_ints(run("neg", a, out), -x)
    assert same_ints(run("mul", a, b, out), x * y)
    assert same_ints(run("scale", a, c, out), c * x)
    assert same_ints(run("addmul", a, b, c, out), z + c * x * y)
    assert same_ints(run("dot", a, b, out[:1] if n else pack([7])), (x * y).sum())


def test_edges_of_both_operands():
    x, y = (np.array(v, object) for v in zip(*product(EDGES, EDGES), strict=True))
    a, b = pack(x), pack(y)
    assert same_ints(run("add", a, b, a), x + y)
    assert same_ints(run("sub", a, b, a), x - y)
    assert same_ints(run("neg", a, a), -x)
    assert same_ints(run("mul", a, b, a), x * y)
    for c in [*EDGES, -1, -ALL, -ALL - 5, 7 * ALL + 3, np.int64(-2), np.uint8(255)]:
        assert same_ints(run("scale", a, c, a), int(c) * x), c
        assert same_ints(run("addmul", a, b, c, a), x + int(c) * x * y), c


def test_in_place():
    rng = np.random.default_rng(4)
    a, b = elements(rng, 33), elements(rng, 33)
    x, y = ints(a)[:, 0], ints(b)[:, 0]
    for name, args, expected in (
        ("add", "ab", x + y),
        ("add", "ba", x + y),
        ("add", "aa", 2 * x),
        ("sub", "ab", x - y),
        ("sub", "ba", y - x),
        ("sub", "aa", 0 * x),
        ("mul", "ab", x * y),
        ("mul", "aa", x * x),
        ("neg", "a", -x),
    ):
        out, check = guarded(a)
        getattr(ring128, name)(*(out if k == "a" else b for k in args), out)
        assert same_ints(out, expected), (name, args)
        check()
    out = a.copy()
    ring128.scale(out, -5, out)
    assert same_ints(out, -5 * x)
    out = a.copy()
    ring128.addmul(out, out, -5, out)
    assert same_ints(out, x - 5 * x * x)


def plain_shift(x, offset, bits, minus):
    """One owner's part of a sum of Python integers without its low bits."""
    if minus:
        return [-((-v % ALL) >> bits) for v in x]
    offset %= ALL
    return [((v + offset) % ALL >> bits) - (offset >> bits) for v in x]


@quick(80)
@given(SEEDS, SIZES, CONSTANTS, st.integers(0, 127), st.booleans())
@example(1, 0, 1, 5, False)
@example(2, 1, 0, 0, True)
@example(3, 257, ALL - 1, 127, False)
def test_shift(seed, n, offset, bits, minus):
    rng = np.random.default_rng(seed)
    a = elements(rng, n)
    expected = plain_shift(ints(a)[:, 0], int(offset), bits, minus)
    assert same_ints(run("shift", a, offset, bits, minus, elements(rng, n)), expected)
    out, check = guarded(a)
    ring128.shift(out, offset, bits, minus, out)
    assert same_ints(out, expected)
    check()


@pytest.mark.parametrize("bits", range(128))
def test_shift_of_edges(bits):
    """By every number of bits; sums with the offset wrap."""
    a = pack(EDGES)
    for offset in [*EDGES, 1 << bits, (1 << bits) - 1, -1, -(1 << bits), ALL + 3]:
        out = run("shift", a, offset, bits, False, a)
        assert same_ints(out, plain_shift(EDGES, offset, bits, False)), offset
        # Of the other part no offset is taken.
        out = run("shift", a, offset, bits, True, a)
        assert same_ints(out, plain_shift(EDGES, 0, bits, True)), offset


def test_two_parts_shifted_are_the_sum_shifted():
    """But for one unit, as long as no part wraps: of 3000 one does once in 2**53."""
    rng = np.random.default_rng(6)
    values = np.array([-5, -1, 0, 2**60 - 1, -(2**60), 12345 << 40] * 500, object)
    one = rng.integers(0, WORD, (len(values), 2), dtype=np.uint64, endpoint=True)
    other = pack(values - ints(one)[:, 0])
    for bits in (1, 20, 40):
        parts = (
            run("shift", one, 1 << 61, bits, False, one),
            run("shift", other, 1 << 61, bits, True, other),
        )
        found = sum(ints(p)[:, 0] for p in parts)
        assert set((found - (values >> bits)) % ALL) <= {0, 1}


@pytest.mark.parametrize("bits", [-1, 128, 129, 2**31 - 1, -(2**31)])
def test_bits_that_are_not_there_are_refused(bits):
    a, out = pack([1, 2]), pack([7, 7])
    for minus in (False, True):
        with pytest.raises(ValueError, match="no .* bits to drop"):
            ring128.shift(a, 1, bits, minus, out)
    assert same_ints(out, [7, 7])


@pytest.mark.parametrize("n", [0, 1, 2, 2049])
def test_dot_of_extreme_words(n):
    for x in EDGES:
        for y in (1, ALL - 1, WORD, ALL // 2):
            a, b = np.tile(pack(x), (n, 1)), np.tile(pack(y), (n, 1))
            assert same_ints(run("dot", a, b, pack([9])), [n * x * y])


@quick(60)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
@example([-(2**63), 2**63 - 1, -1, 0, 1, -(2**32)])
def test_encode_int(values):
    a = np.array(values, np.int64)
    assert same_ints(run("encode_int", a, pack([3] * len(values))), values)


# -- reals ----------------------------------------------------------------------

REALS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=64),
    st.floats(-1e9, 1e9),
    st.floats(-(2.0**127), 2.0**127),
    st.integers(-(2**20), 2**20).map(lambda v: v / 2),
    st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 0.5, -0.5, 1.5, 2.5, -1.5, -2.5]),
    st.sampled_from([LIMIT, -LIMIT, 2.0**63, -(2.0**64), 2.0**52 + 1, 2.0**51 + 0.5]),
)
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


def first_beyond(reals, shift, limit):
    """Index of the first number that does not fit, or -1; exact."""
    for i, v in enumerate(reals):
        if not math.isfinite(v) or abs(round(Fraction(v) * Fraction(2) ** shift)) > (
            limit
        ):
            return i
    return -1


def encode(reals, shift, limit):
    out, check = guarded(np.full((len(reals), 2), WORD, np.uint64))
    bad = ring128.encode(np.array(reals, dtype=float), 2.0**shift, limit, out)
    check()
    return bad, out


@quick(150)
@given(
    st.lists(REALS, max_size=12),
    st.sampled_from([-20, 0, 1, 16, 43, 64, 100]),
    st.sampled_from([LIMIT, 2.0**64, 2.0**40 + 0.5, 1e6, 0.0]),
)
def test_encode(reals, shift, limit):
    bad, out = encode(reals, shift, limit)
    assert bad == first_beyond(reals, shift, limit)
    if bad < 0:
        exact = [round(Fraction(v) * Fraction(2) ** shift) for v in reals]
        assert same_ints(out, exact)


@quick(60)
@given(st.lists(st.one_of(REALS, NOT_FINITE), min_size=1, max_size=12))
def test_encode_finds_the_first_that_does_not_fit(reals):
    assert encode(reals, 3, 1e9)[0] == first_beyond(reals, 3, 1e9)


def test_encode_known():
    x = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0, -0.0, 3.25, -3.25]
    bad, out = encode(x, 0, 3.0)
    assert bad == -1 and same_ints(out, [0, 2, 2, 0, -2, -2, 0, 0, 3, -3])
    bad, out = encode(x, 2, 13.0)
    assert bad == -1 and same_ints(out, [2, 6, 10, -2, -6, -10, 0, 0, 13, -13])
    bad, out = encode([LIMIT, -LIMIT, 2.0**64, -(2.0**100)], 0, LIMIT)
    assert bad == -1
    assert same_ints(out, [2**127 - 2**74, 2**74 - 2**127, 2**64, -(2**100)])


def test_encode_at_its_limit():
    def fits(x, limit=8.0, shift=0):
        bad = [encode([0.0, sign * x], shift, limit)[0] for sign in (1, -1)]
        assert bad in ([-1, -1], [1, 1])
        return bad == [-1, -1]

    # 8.5 rounds to 8
    assert fits(8.0) and fits(8.5) and not fits(math.nextafter(8.5, 9))
    assert fits(4.0, shift=1) and not fits(4.5, shift=1)
    assert fits(0.5, limit=0.0) and not fits(0.6, limit=0.0)
    assert fits(LIMIT, LIMIT) and not fits(2.0**127, LIMIT)
    assert fits(LIMIT / 2, LIMIT, 1) and not fits(1e308, LIMIT, 4)
    for limit in (math.nan, -1.0):
        assert encode([0.0, 1.0], 0, limit)[0] == 0


@quick(60)
@given(
    SEEDS,
    st.integers(0, 30),
    st.sampled_from([1.0, 2.0, 2.0**19, 2.0**61, 2.0**127, 2.0**-30, 3.0, 1e-3]),
)
def test_decode(seed, n, scale):
    rng = np.random.default_rng(seed)
    values = ints(elements(rng, n))[:, 0]
    # also sums of few bits, half of them on the edge between two doubles
    values[::2] >>= rng.integers(0, 128)
    values = np.append(values, [*EDGES, (1 << 53) + 1, (1 << 53) + 3, 3 - (1 << 54)])
    signed = [int(v) % ALL - (ALL if int(v) % ALL >= ALL // 2 else 0) for v in values]
    out = run("decode", pack(values), scale, np.full(len(values), np.nan))
    # Python rounds large integers to the nearest double, too.
    assert out.tolist() == [float(v) / scale for v in signed]


# -- window sums ----------------------------------------------------------------


@quick(120)
@given(st.data())
def test_box(data):
    rng = np.random.default_rng(data.draw(SEEDS))
    outer, inner = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    n = data.draw(st.integers(0, 12))
    radius = data.draw(
        st.one_of(st.integers(0, 14), st.sampled_from([1 << 31, 1 << 40, 1 << 62]))
    )
    first = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - first))
    x, out = lines(rng, outer, n, inner), lines(rng, outer, count, inner)
    found = run("box", x, radius, first, out, threads=data.draw(st.integers(1, 3)))
    assert same_ints(found, plain_box(ints(x), radius, first, count))


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_box_of_every_radius(n):
    rng = np.random.default_rng(n)
    x = lines(rng, 2, n, 3)
    for radius in [*range(n + 3), 1000]:
        for first in range(n):
            for count in range(n - first + 1):
                found = run("box", x, radius, first, lines(rng, 2, count, 3))
                expected = plain_box(ints(x), radius, first, count)
                assert same_ints(found, expected), (radius, first, count)
    assert np.array_equal(run("box", x, 0, 0, 0 * x), x)


@pytest.mark.parametrize("radius", [0, 1, 2, 4, 9])
@pytest.mark.parametrize("shape", [(7, 5), (1, 6), (4, 5, 6), (3, 1, 7), (9, 2, 1)])
def test_box_along_every_axis(shape, radius):
    """One axis after the other gives the sums over squares and cubes."""
    rng = np.random.default_rng(radius)
    image = elements(rng, *shape)
    x = image
    for axis, n in enumerate(shape):
        flat = x.reshape(int(np.prod(shape[:axis])), n, -1)
        x = run("box", flat, radius, 0, np.zeros_like(flat))
    assert same_ints(x, plain_windows(ints(image)[..., 0], radius))


@pytest.mark.parametrize("value", EDGES)
def test_box_of_extreme_values(value):
    """Sums wrap, and running sums recover."""
    n = 40
    x = np.tile(pack(value), (2, n, 3))
    for radius in (0, 1, 4, 19, 20, 60):
        length = [
            min(i + radius, n - 1) - max(i - radius, 0) + 1 for i in range(5, n - 2)
        ]
        out = run("box", x, radius, 5, np.zeros((2, n - 7, 6), np.uint64))
        assert same_ints(out[0, :, :2], [value * k for k in length])
        assert (out == np.tile(out[0, :, :2], (2, 1, 3))).all()


@pytest.mark.parametrize("outer", [1, 2, 3, 7, 16])
def test_box_with_any_number_of_threads(outer):
    rng = np.random.default_rng(outer)
    x = lines(rng, outer, 23, 5)
    results = [
        run("box", x, 4, 2, np.zeros((outer, 20, 10), np.uint64), threads=t)
        for t in THREADS
    ]
    assert same_ints(results[0], plain_box(ints(x), 4, 2, 20))
    assert all(np.array_equal(results[0], r) for r in results[1:])


# -- filters --------------------------------------------------------------------

#: Widths in words around what is summed at once, on any instruction set.
WIDTHS = [2, 4, 14, 16, 18, 30, 32, 34, 46, 48, 50, 64, 66, 126, 128, 130, 162, 258]


def weighting(rng, n, taps, count):
    """Draw starts and weights of a filter, of both signs.

    A fifth of the weights are extreme, and in some rows one weight takes all that the
    others leave.
    """
    first = rng.integers(0, n - taps + 1, count)
    weights = some_weights(rng, count, taps)
    for row in weights:
        if rng.random() < 0.5:
            continue
        if rng.random() < 0.3:
            row[...] = 0
        at = rng.integers(taps)
        row[at] = 0
        rest = MOST_WEIGHT - 1 - int(np.abs(row.astype(np.int64)).sum())
        row[at] = rng.choice([rest, -rest])
    return first, weights


def some_weights(rng, *shape):
    """Draw weights of which each may be as large as all can."""
    most = (MOST_WEIGHT - 1) // shape[-1]
    weights = rng.integers(-most, most, shape, dtype=np.int32, endpoint=True)
    edge = rng.random(weights.shape) < 0.2
    edges = np.array([0, 1, -1, most, -most], np.int32)
    weights[edge] = rng.choice(edges, np.count_nonzero(edge))
    return weights


@quick(120)
@given(st.data())
def test_filter(data):
    rng = np.random.default_rng(data.draw(SEEDS))
    outer, inner = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 20))
    n, count = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 5))
    taps = data.draw(st.integers(1, n))
    x, out = lines(rng, outer, n, inner), lines(rng, outer, count, inner)
    first, weights = weighting(rng, n, taps, count)
    threads = data.draw(st.integers(1, 3))
    found = run("filter_axis", x, first, weights, out, threads=threads)
    assert same_ints(found, plain_filter(ints(x), first, weights))


@pytest.mark.parametrize("width", WIDTHS)
def test_filter_of_any_width(width):
    rng = np.random.default_rng(width)
    for taps in (1, 2, 9):
        x = lines(rng, 2, 11, width // 2)
        first, weights = weighting(rng, 11, taps, 3)
        out = run("filter_axis", x, first, weights, lines(rng, 2, 3, width // 2))
        assert same_ints(out, plain_filter(ints(x), first, weights)), taps


@pytest.mark.parametrize("width", [2, 4, 16, 34, 64, 66, 130])
@pytest.mark.parametrize("taps", [1, 2, 3, 4096, 5000])
def test_filter_with_the_largest_sums(width, taps):
    """Halves of all-ones words times weights that add up to the most, of both signs."""
    each, left = divmod(MOST_WEIGHT - 1, taps)
    weights = np.full((4, taps), each, np.int64)
    weights[:, -1] += left
    weights[1] *= -1
    weights[2, ::2] *= -1
    weights[3] = 0
    weights[3, 0] = 1 - MOST_WEIGHT
    total = [int(v) for v in weights.sum(axis=1)]
    assert (np.abs(weights).sum(axis=1) == MOST_WEIGHT - 1).all()
    first = np.array([0, 3, 1, 2])
    for value in (ALL - 1, ALL - WORD - 1, WORD, WORD << 32, ALL // 2):
        x = np.tile(pack(value), (1, taps + 3, width // 2))
        out = np.zeros((1, 4, width), np.uint64)
        out = run("filter_axis", x, first, weights.astype(np.int32), out)
        assert same_ints(out, [t * value for t in total for _ in range(width // 2)])


@pytest.mark.parametrize("inner", [1, 9, 33])
def test_filter_where_signs_do_not_cancel(inner):
    """Words of ones where weights are positive, and of zeros where they are not."""
    taps = 6
    weights = np.full((1, taps), (MOST_WEIGHT - 1) // taps, np.int32)
    weights[0, 1::2] *= -1
    for even, odd in ((WORD, 0), (0, WORD)):
        x = np.empty((1, taps, 2 * inner), np.uint64)
        x[:, ::2], x[:, 1::2] = even, odd
        out = np.zeros((1, 1, 2 * inner), np.uint64)
        out = run("filter_axis", x, np.zeros(1, np.int64), weights, out)
        assert same_ints(out, plain_filter(ints(x), [0], weights))


def test_filter_of_many_taps():
    rng = np.random.default_rng(0)
    for inner, taps in ((1, 4097), (9, 4097), (1, 70000)):
        x = lines(rng, 1, taps + 5, inner)
        first, weights = weighting(rng, taps + 5, taps, 2)
        out = run("filter_axis", x, first, weights, np.zeros_like(x[:, :2]))
        assert same_ints(out, plain_filter(ints(x), first, weights))


def test_filter_at_the_ends_of_the_axis():
    rng = np.random.default_rng(1)
    for inner in (1, 8, 17):
        x = lines(rng, 2, 6, inner)
        first = np.array([4, 0, 4, 2, 0])
        weights = some_weights(rng, 5, 2)
        out = run("filter_axis", x, first, weights, lines(rng, 2, 5, inner))
        assert same_ints(out, plain_filter(ints(x), first, weights))
        # a single weight of 1 copies, and one of -1 turns signs
        one, reverse = np.ones((6, 1), np.int32), np.arange(6)[::-1].copy()
        copied = run("filter_axis", x, reverse, one, np.zeros_like(x))
        assert np.array_equal(copied, x[:, ::-1])
        turned = run("filter_axis", x, reverse, -one, np.zeros_like(x))
        assert same_ints(turned, -ints(x[:, ::-1]))


@pytest.mark.parametrize("shape", [(6, 5), (1, 4), (4, 5, 3), (5, 1, 6)])
def test_filter_along_every_axis(shape):
    rng = np.random.default_rng(len(shape))
    image = elements(rng, *shape)
    x, expected, size = image, ints(image)[..., 0], list(shape)
    for axis, n in enumerate(shape):
        dense = some_weights(rng, 3, n)
        x = x.reshape(int(np.prod(size[:axis])), n, -1)
        out = np.zeros((len(x), 3, x.shape[2]), np.uint64)
        x = run("filter_axis", x, np.zeros(3, np.int64), dense, out)
        size[axis] = 3
        expected = np.moveaxis(
            np.tensordot(dense.astype(object), expected, (1, axis)), 0, axis
        )
    assert same_ints(x, expected)


@pytest.mark.parametrize("outer", [1, 2, 3, 7, 16])
def test_filter_with_any_number_of_threads(outer):
    rng = np.random.default_rng(outer)
    x = lines(rng, outer, 15, 9)
    first, weights = weighting(rng, 15, 5, 4)
    out = np.zeros((outer, 4, 18), np.uint64)
    results = [run("filter_axis", x, first, weights, out, threads=t) for t in THREADS]
    assert same_ints(results[0], plain_filter(ints(x), first, weights))
    assert all(np.array_equal(results[0], r) for r in results[1:])


def test_kernels_from_threads():
    """The kernels keep no state: concurrent calls do not disturb each other."""
    rng = np.random.default_rng(9)
    x = lines(rng, 4, 50, 33)
    first, weights = weighting(rng, 50, 9, 50)
    results = [(np.zeros_like(x), np.zeros_like(x)) for _ in range(8)]

    def both(sums, filtered):
        ring128.box(x, 3, 0, sums, 2)
        ring128.filter_axis(x, first, weights, filtered, 2)

    threads = [Thread(target=both, args=out) for out in results]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert same_ints(results[0][0], plain_box(ints(x), 3, 0, 50))
    assert same_ints(results[0][1], plain_filter(ints(x), first, weights))
    for sums, filtered in results[1:]:
        assert np.array_equal(sums, results[0][0])
        assert np.array_equal(filtered, results[0][1])


# -- factors and parts of masked numbers ------------------------------------------


@pytest.mark.parametrize("moving", [True, False])
def test_join(moving):
    rng = np.random.default_rng(3)
    hidden, other, mask = (elements(rng, 5) for _ in range(3))
    x, y, a = (R128.to_ints(v) for v in (hidden, other, mask))
    ring128.join(hidden, other, moving, mask)
    assert same_ints(hidden, x + y + 2 * a)
    assert same_ints(mask, x + y + a if moving else a)


# -- arguments ------------------------------------------------------------------


def matching():
    """Return each function of arrays with matching arguments, the last the output."""
    rng = np.random.default_rng(7)
    first, weights = weighting(rng, 6, 3, 4)
    return {
        "add": [elements(rng, 3) for _ in range(3)],
        "sub": [elements(rng, 3) for _ in range(3)],
        "neg": [elements(rng, 3) for _ in range(2)],
        "mul": [elements(rng, 3) for _ in range(3)],
        "scale": [elements(rng, 3), 5, elements(rng, 3)],
        "addmul": [elements(rng, 3), elements(rng, 3), 5, elements(rng, 3)],
        "join": [elements(rng, 3), elements(rng, 3), True, elements(rng, 3)],
        "shift": [elements(rng, 3), 5, 7, True, elements(rng, 3)],
        "dot": [elements(rng, 3), elements(rng, 3), elements(rng, 1)],
        "encode_int": [np.array([1, -2, 3]), elements(rng, 3)],
        "box": [lines(rng, 2, 6, 2), 1, 2, lines(rng, 2, 4, 2)],
        "filter_axis": [lines(rng, 2, 6, 2), first, weights, lines(rng, 2, 4, 2)],
    }


# axes that match no other: the axis along which is summed may be longer, fewer windows
# may be wanted, and a filter may be shorter
FREE = {("box", 0, 1, 7), ("box", 3, 1, 0), ("box", 3, 1, 3)}
FREE |= {("filter_axis", 0, 1, 7), ("filter_axis", 2, 1, 2)}


def arrays(args):
    return [k for k, a in enumerate(args) if isinstance(a, np.ndarray)]


@pytest.mark.parametrize("name", matching())
def test_mismatched_arrays_are_refused(name):
    args = matching()[name]
    tried = 0
    for k in arrays(args):
        array = args[k]
        for axis in range(array.ndim):
            for length in (0, array.shape[axis] - 1, array.shape[axis] + 1):
                if (name, k, axis, length) in FREE:
                    continue
                if (name, k, axis, length) == ("filter_axis", 2, 1, 4):
                    continue  # starts decide, below
                wrong = list(args)
                shape = [*array.shape[:axis], length, *array.shape[axis + 1 :]]
                wrong[k] = np.resize(array, shape)
                before = wrong[-1].copy()
                with pytest.raises(ValueError, match="match|outside|no weights"):
                    getattr(ring128, name)(*wrong)
                assert np.array_equal(wrong[-1], before)
                tried += 1
    assert tried >= 6


@pytest.mark.parametrize("name", ["box", "filter_axis"])
def test_half_an_element_is_refused(name):
    args = matching()[name]
    for k in (0, len(args) - 1):
        args[k] = np.zeros((*args[k].shape[:2], 3), np.uint64)
    with pytest.raises(ValueError, match="match"):
        getattr(ring128, name)(*args)


def test_reals_and_elements_must_match():
    for n, words in ((0, 2), (2, 2), (4, 2), (3, 1), (3, 3)):
        for size in (3, n):
            if (size, words) == (n, 2):
                continue
            a = np.zeros((n, words), np.uint64)
            with pytest.raises(ValueError, match="match"):
                ring128.encode(np.zeros(size), 1.0, 1.0, a)
            with pytest.raises(ValueError, match="match"):
                ring128.decode(a, 1.0, np.zeros(size))


@pytest.mark.parametrize(
    "radius, first, count",
    [
        (-1, 0, 6),
        (-(2**63), 0, 6),
        (1, -1, 3),
        (1, -(2**63), 3),
        (1, 1, 6),
        (1, 6, 1),
        (1, 7, 0),
        (0, 0, 7),
        (1, 2**31, 1),
        (0, 2**63 - 1, 1),
    ],
)
def test_windows_outside_are_refused(radius, first, count):
    x = np.ones((2, 6, 4), np.uint64)
    out = np.full((2, count, 4), 7, np.uint64)
    with pytest.raises(ValueError, match="outside"):
        ring128.box(x, radius, first, out)
    assert (out == 7).all()


def test_the_largest_radius():
    x = np.ones((1, 3, 2), np.uint64)
    for radius in (2**62, 2**63 - 4, 2**63 - 3, 2**63 - 2, 2**63 - 1):
        out = np.zeros_like(x)
        ring128.box(x, radius, 0, out)
        assert out.tolist() == [[[3, 3]] * 3], radius


@pytest.mark.parametrize("bad", [-1, 4, 5, 2**31, 2**32, 2**63 - 1, -(2**63)])
def test_filters_outside_are_refused(bad):
    x, first, weights, out = matching()["filter_axis"]
    before = out.copy()
    for where in range(4):
        first = np.zeros(4, np.int64)
        first[where] = bad
        with pytest.raises(ValueError, match="outside"):
            ring128.filter_axis(x, first, weights, out)
    assert np.array_equal(out, before)


def test_filters_too_large_are_refused():
    x, first, weights, out = matching()["filter_axis"]
    before = out.copy()
    zero = np.zeros_like(weights)
    for bad in (2**31 - 1, -(2**31) + 1, -(2**31)):
        for where in np.ndindex(weights.shape):
            wrong = zero.copy()
            wrong[where] = bad
            if bad != -(2**31):
                ring128.filter_axis(x, first, wrong, out.copy())
                wrong[where[0], where[1] - 1] = 1
            with pytest.raises(ValueError, match="no weights or too large ones"):
                ring128.filter_axis(x, first, wrong, out)
    # No weight is large, but their magnitudes add up to 2**31; of both signs.
    wrong[...] = 2**30, -(2**29), 2**29
    with pytest.raises(ValueError, match="no weights or too large ones"):
        ring128.filter_axis(x, first, wrong, out)
    # They are added up without wrapping: to 2**32 and a bit.
    for bad in (2**31 - 1, -(2**31)):
        wrong[...] = bad, bad, 3
        with pytest.raises(ValueError, match="no weights or too large ones"):
            ring128.filter_axis(x, first, wrong, out)
    with pytest.raises(ValueError, match="no weights or too large ones"):
        ring128.filter_axis(x, first, np.zeros((4, 0), np.int32), out)
    assert np.array_equal(out, before)
    taps = 1 << 16
    x, out = np.ones((1, taps, 2), np.uint64), np.ones((1, 1, 2), np.uint64)
    weights = np.full((1, taps), 1 << 15, np.int32)
    with pytest.raises(ValueError, match="no weights or too large ones"):
        ring128.filter_axis(x, np.zeros(1, np.int64), weights, out)
    assert (out == 1).all()
    weights[0, 7] -= 1
    ring128.filter_axis(x, np.zeros(1, np.int64), weights, out)
    assert out.tolist() == [[[2**31 - 1, 2**31 - 1]]]


# `join` has two outputs.
@pytest.mark.parametrize("name", sorted(matching().keys() - {"join"}))
def test_inputs_may_be_read_only(name):
    args = matching()[name]
    expected = run(name, *args)
    for k in arrays(args)[:-1]:
        args[k].setflags(write=False)
    out = args[-1].copy()
    getattr(ring128, name)(*args[:-1], out)
    assert np.array_equal(out, expected)
    args[-1].setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        getattr(ring128, name)(*args)


def test_reals_may_be_read_only():
    x = np.array([1.0, -2.0])
    x.setflags(write=False)
    out = np.empty((2, 2), np.uint64)
    assert ring128.encode(x, 2.0, 4.0, out) == -1
    assert same_ints(out, [2, -4])
    out.setflags(write=False)
    back = np.empty(2)
    ring128.decode(out, 2.0, back)
    assert back.tolist() == [1, -2]
    with pytest.raises(ValueError, match="read-only"):
        ring128.encode(x, 2.0, 4.0, out)
    with pytest.raises(ValueError, match="read-only"):
        ring128.decode(out, 2.0, x)


@pytest.mark.parametrize("name", matching())
def test_other_layouts_and_types_are_refused(name):
    args = matching()[name]
    for k in arrays(args):
        strided = np.repeat(args[k], 2, axis=-1)[..., ::2]
        for bad in (strided, args[k].astype(np.float64), args[k][None]):
            with pytest.raises(ValueError, match="contiguous|dtype|dimensions"):
                getattr(ring128, name)(*args[:k], bad, *args[k + 1 :])


# -- the rings' packed arrays ---------------------------------------------------

BOTH = pytest.mark.parametrize("ring", [R64, R128], ids=repr)


def ring_edges(ring):
    top = ring.modulus
    return [0, 1, 2, top - 1, top - 2, top // 2, top // 2 - 1, top // 2 + 1, top >> 32]


def ring_values(ring):
    any_one = st.one_of(
        st.sampled_from(ring_edges(ring)), st.integers(0, ring.modulus - 1)
    )
    return st.lists(st.tuples(any_one, any_one, any_one), max_size=8)


def test_the_rings():
    assert (R128.bits, R128.words, R128.nbytes, R128.modulus) == (128, 2, 16, 2**128)
    assert (R64.bits, R64.words, R64.nbytes, R64.modulus) == (64, 1, 8, 2**64)
    assert (repr(R128), repr(R64)) == ("Z/2^128", "Z/2^64")
    assert R128.weights == R64.weights == (1, 1, 1)
    for shape in [(), (3,), (2, 3), (0,), (4, 1, 2)]:
        assert R128.zeros(shape).shape == R128.empty(shape).shape == (*shape, 2)
        assert not R128.zeros(shape).any()
        values = np.arange(int(np.prod(shape)), dtype=object).reshape(shape)
        assert R128.to_ints(R128.from_ints(values)).shape == shape


def test_order_of_words():
    assert R128.from_ints([1, -2, 1 << 64]).tolist() == [
        [1, 0],
        [WORD - 1, WORD],
        [0, 1],
    ]
    assert R128.from_ints(5).tolist() == [5, 0]


@BOTH
@quick(40)
@given(st.data())
def test_integers_there_and_back(ring, data):
    values = [v for row in data.draw(ring_values(ring)) for v in row]
    packed = ring.from_ints(values)
    assert packed.dtype == np.uint64 and packed.shape == ring.storage((len(values),))
    assert ring.to_ints(packed).tolist() == values
    for turns in (-3, -1, 1, 7):
        shifted = [v + turns * ring.modulus for v in values]
        assert np.array_equal(ring.from_ints(shifted), packed)
    table = ring.from_ints([values, values])
    assert ring.to_ints(table).tolist() == [values, values]


@BOTH
@quick(60)
@given(st.data(), CONSTANTS, CONSTANTS)
def test_ring_against_integers(ring, data, alpha, beta):
    rows = data.draw(ring_values(ring))
    a, b, old = ([row[k] for row in rows] for k in range(3))
    p, x, y = ring.modulus, ring.from_ints(a), ring.from_ints(b)
    kept = x.copy(), y.copy()

    def check(found, expected):
        assert found.dtype == np.uint64
        assert ring.to_ints(found).tolist() == [v % p for v in expected]

    check(ring.add(x, y), [u + v for u, v in zip(a, b, strict=True)])
    check(ring.sub(x, y), [u - v for u, v in zip(a, b, strict=True)])
    check(ring.mul(x, y), [u * v for u, v in zip(a, b, strict=True)])
    check(ring.neg(x), [-u for u in a])
    check(ring.scale(x, alpha), [alpha * u for u in a])
    both = [alpha * u + beta * v for u, v in zip(a, b, strict=True)]
    check(ring.axpby(alpha, x, beta, y), both)
    check(ring.dot(x, y), [sum(u * v for u, v in zip(a, b, strict=True))])

    out = ring.from_ints(old)
    assert ring.addmul(out, x, y, alpha) is None
    sums = [w + alpha * u * v for u, v, w in zip(a, b, old, strict=True)]
    check(out, sums)
    ring.addmul(out, x, y)
    check(out, [s + u * v for s, u, v in zip(sums, a, b, strict=True)])
    assert np.array_equal(x, kept[0]) and np.array_equal(y, kept[1])


@BOTH
@pytest.mark.parametrize(
    "c", [1, -1, 0, -3, 2**63, -(2**64) - 2, 2**64 + 5, 2**128 + 1]
)
def test_addmul_of_edges(ring, c):
    edges = ring_edges(ring)
    a, b, old = zip(*product(edges, edges, edges), strict=True)
    out = ring.from_ints(old)
    ring.addmul(out, ring.from_ints(a), ring.from_ints(b), c)
    expected = [w + c * u * v for u, v, w in zip(a, b, old, strict=True)]
    assert ring.to_ints(out).tolist() == [v % ring.modulus for v in expected]


@BOTH
def test_shapes_of_ring_arrays(ring):
    values = np.array([[1, -2, 3], [-4, 5, 1 << 63]], dtype=object)
    a, b = ring.from_ints(values), ring.from_ints(values[::-1])
    p = ring.modulus
    for found, expected in (
        (ring.add(a, b), values + values[::-1]),
        (ring.mul(a, b), values * values[::-1]),
        (ring.neg(a), -values),
        (ring.scale(a, -7), -7 * values),
        (ring.axpby(2, a, -3, b), 2 * values - 3 * values[::-1]),
    ):
        assert found.shape == ring.storage((2, 3))
        assert (ring.to_ints(found) == expected % p).all()
    dot = ring.dot(a, b)
    assert dot.shape == ring.storage((1,))
    assert ring.to_ints(dot)[0] == (values * values[::-1]).sum() % p
    # into one row of a larger array
    out = ring.zeros((3, 3))
    ring.addmul(out[1], a[0], b[0], -1)
    ring.addmul(out[1:], a, b)
    expected = [values[0] * 0, values[0] * 0, values[1] * values[0]]
    assert (ring.to_ints(out) == np.array(expected) % p).all()


@BOTH
def test_empty_ring_arrays(ring):
    empty = ring.zeros((0,))
    assert ring.to_ints(ring.dot(empty, empty)).tolist() == [0]
    ring.addmul(empty, empty, empty, -1)
    for found in (ring.add(empty, empty), ring.axpby(1, empty, 2, empty)):
        assert found.shape == ring.storage((0,))
    assert ring.from_ints([]).shape == ring.storage((0,))
    assert ring.encode(np.zeros(0), 3, 1.0).shape == ring.storage((0,))
    assert ring.decode(empty, 3).shape == (0,)


def test_arrays_of_other_sizes_are_refused():
    a, b = R128.zeros((3,)), R128.zeros((4,))
    for refused in (
        partial(R128.add, a, b),
        partial(R128.sub, a, b),
        partial(R128.mul, a, b),
        partial(R128.dot, a, b),
        partial(R128.addmul, a, a, b),
        partial(R128.addmul, b, a, a),
        partial(R128.axpby, 1, a, 1, b),
    ):
        with pytest.raises(ValueError, match="match"):
            refused()
    with pytest.raises(ValueError, match="shapes|broadcast|aligned"):
        R64.dot(R64.zeros((3,)), R64.zeros((4,)))
    with pytest.raises(ValueError, match="shapes|broadcast"):
        R64.addmul(R64.zeros((3,)), R64.zeros((4,)), R64.zeros((4,)))


def test_parts_add_up():
    rng = np.random.default_rng(5)
    secret = pack([EDGES])
    one, two = elements(rng, *secret.shape[:-1]), elements(rng, *secret.shape[:-1])
    three = R128.sub(R128.sub(secret, one), two)
    assert np.array_equal(R128.add(R128.add(one, two), three), secret)


def test_every_two_words_are_an_element():
    words = pack(EDGES)
    drawn = words.copy()
    assert R128.reduce_random(drawn) == 0
    assert np.array_equal(drawn, words), "random words were changed"
    assert R128.is_canonical(words)
    assert R128.to_ints(words).tolist() == EDGES


def test_no_element_counts_as_rejected():
    assert R128.count_rejected(pack(EDGES)) == 0


@quick(60)
@given(
    st.lists(st.integers(-(2**52), 2**52), min_size=1, max_size=6), st.integers(0, 70)
)
def test_ring_encoding_is_signed(x, frac_bits):
    reals = np.array(x) / 2.0**frac_bits
    packed = R128.encode(reals, frac_bits, 2.0**52)
    assert R128.to_ints(packed).tolist() == [v % ALL for v in x]
    assert R128.decode(packed, frac_bits).tolist() == reals.tolist()
    assert np.array_equal(R128.encode_int(x), packed)
    assert R128.decode(R128.neg(packed), frac_bits).tolist() == (-reals).tolist()


def test_ring_encoding_at_its_ends():
    packed = R128.encode(np.array([[LIMIT, -LIMIT]]), 0, np.inf)
    ends = [[2**127 - 2**74, 2**127 + 2**74]]
    assert R128.to_ints(packed).tolist() == ends
    assert R128.decode(packed, 0).tolist() == [[LIMIT, -LIMIT]]
    ends = np.array([2**63 - 1, -(2**63)])
    assert R128.to_ints(R128.encode_int(ends)).tolist() == [2**63 - 1, ALL - 2**63]
    assert R128.decode(R128.encode_int(ends), 62).tolist() == [2.0, -2.0]


def test_reals_beyond_the_ends_are_refused():
    for bad in (2.0**127, 2.0**128, -(2.0**128), np.inf, np.nan):
        with pytest.raises(FixedPointOverflowError, match="not finite or exceeds"):
            R128.encode(np.array([0.0, bad]), 0, np.inf)


def test_ring_encoding_within_a_bound():
    # in eighths: 64.5 rounds to 64, and nothing beyond is accepted
    assert R128.to_ints(R128.encode(np.array([8.0, -8.0625]), 3, 8.0)).tolist() == [
        64,
        ALL - 64,
    ]
    for bad in (8.07, -8.07, 9.0, np.nan, np.inf, -np.inf):
        with pytest.raises(FixedPointOverflowError, match="bound of 8;"):
            R128.encode(np.array([0.0, bad, 1.0]), 3, 8.0)
    # a bound between two elements
    assert R128.to_ints(R128.encode(np.array([8.45]), 0, 8.45)).tolist() == [8]
    with pytest.raises(FixedPointOverflowError, match="bound of 8.45;"):
        R128.encode(np.array([8.51]), 0, 8.45)
