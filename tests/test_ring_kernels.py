"""The ring kernels against NumPy's words and Python's integers.

Every test runs on every instruction set this processor has, because each of them is
compiled separately.
"""

from fractions import Fraction
import math
from threading import Thread

from examples import quick
from hypothesis import example, given
from hypothesis import strategies as st
import numpy as np
import pytest

from dipy_ppir._kernels import ring64

WORD = (1 << 64) - 1
EDGES = [0, 1, 2, WORD, WORD - 1, 1 << 63, (1 << 63) - 1, (1 << 63) + 1]
EDGES += [1 << 32, (1 << 32) - 1, WORD << 32 & WORD]
LIMIT = math.nextafter(2.0**63, 0)  # the largest real that can be encoded

SEEDS = st.integers(0, 2**32 - 1)
# around what is summed at once, and what `contingency` passes at once
ROWS = st.one_of(
    st.integers(0, 40), st.sampled_from([255, 256, 257, 511, 513, 2047, 2048, 2049])
)
COLUMNS = st.integers(0, 70)
WIDTHS = st.integers(0, 9)


@pytest.fixture(scope="module", params=range(ring64._use_level(2) + 1), autouse=True)
def level(request):
    """Run the module on each instruction set, then go back to the best one."""
    assert ring64._use_level(request.param) == request.param
    yield request.param
    ring64._use_level(2)


def words(rng, *shape):
    """Draw uniform words, every fifth of them an edge value."""
    out = rng.integers(0, WORD, shape, dtype=np.uint64, endpoint=True)
    edge = rng.random(shape) < 0.2
    out[edge] = rng.choice(np.array(EDGES, np.uint64), np.count_nonzero(edge))
    return out


def banded(rng, n, w, ncols):
    """Draw a banded matrix: its values, its starts, and the same thing dense."""
    values = words(rng, n, w).view(np.int64)
    start = rng.integers(0, ncols - w + 1, n).astype(rng.choice([np.int32, np.int64]))
    dense = np.zeros((n, ncols), np.uint64)
    for i in range(n):
        dense[i, start[i] : start[i] + w] = values[i].view(np.uint64)
    return values, start, dense


def guarded(array):
    """Copy an array into a longer one; return the copy and a check of the rest."""
    memory = np.full(array.size + 32, 0xDEAD, np.uint64)
    inner = memory[16 : 16 + array.size].reshape(array.shape)
    inner[...] = array

    def check():
        assert (memory[:16] == 0xDEAD).all() and (memory[-16:] == 0xDEAD).all()

    return inner, check


def run(name, *args):
    """Call a kernel on a copy of its last argument; return the copy."""
    inputs = [np.copy(a) for a in args[:-1]]
    out, check = guarded(args[-1])
    getattr(ring64, name)(*args[:-1], out)
    check()
    for before, after in zip(inputs, args[:-1], strict=True):
        assert np.array_equal(before, after), "an input was changed"
    return out


# -- constants and known answers ------------------------------------------------


def test_names():
    assert (ring64.BITS, ring64.WORDS) == (64, 1)
    public = {n for n in dir(ring64) if callable(getattr(ring64, n)) and n[0] != "_"}
    assert public == {*matching(), "encode"}


def test_levels(level):
    best = ring64._use_level(99)
    assert best >= level
    assert ring64._use_level(-1) == 0
    assert ring64._use_level(level) == level


def test_known_answers():
    a = np.array([[1, 2], [3, WORD], [1 << 63, 5]], np.uint64)
    b = np.array([[7, WORD], [1 << 32, 10], [2, 1 << 63]], np.uint64)
    one = np.ones((2, 2), np.uint64)
    # 7 + 3 2^32 + 2^64 and -1 + 30 + 2^126; 14 - 2^32 + 10 and -2 - 10 + 5 2^63
    gram = [[8 + (3 << 32), 30], [25 - (1 << 32) & WORD, (1 << 63) - 11]]
    assert run("gram", a, b, one).tolist() == gram
    # 7 - 2, 3 2^32 - 10, 2^64 + 5 2^63
    dots = [6, (3 << 32) - 9, (1 << 63) + 1]
    assert run("dot_rows", a, b, np.ones(3, np.uint64)).tolist() == dots
    z = np.array([WORD, 2, 3], np.uint64)
    # -7 + 2 2^32 + 6 and 1 + 20 + 3 2^63
    sums = [2 << 32, (1 << 63) + 22]
    assert run("weighted_sums", z, b, one[0]).tolist() == sums

    # the banded matrix [[-2, 3, 0], [0, -2^63, 1]]
    values, start = np.array([[-2, 3], [-(1 << 63), 1]]), np.array([0, 1])
    c = np.array([[5, 1], [3, 2]], np.uint64)
    expected = [[-9 & WORD, WORD], [(1 << 63) + 16, 4], [4, 3]]
    assert run("gram_banded", values, start, c, one[[0, 0, 0]]).tolist() == expected
    table = np.array([[1, 2], [3, WORD], [5, 6]], np.uint64)
    expected = [[7, -7 & WORD], [(1 << 63) + 5, (1 << 63) + 6]]
    assert run("band_rows", values, start, table, one).tolist() == expected
    r = np.array([[1, 2, 3], [0, 1, WORD]], np.uint64)
    expected = [[-3 & WORD, 1, -3 & WORD], [0, (1 << 63) - 1, 2]]
    assert run("hide_banded", r, values, start, r).tolist() == expected
    expected = [5, 1 << 63]
    assert run("dot_banded", values, start, r, one[0]).tolist() == expected


# -- sums of products -----------------------------------------------------------


@quick(60)
@given(SEEDS, ROWS, st.integers(0, 33), COLUMNS)
@example(1, 0, 3, 5)
@example(2, 300, 0, 5)
@example(3, 300, 3, 0)
@example(4, 1, 1, 1)
@example(5, 257, 7, 33)
@example(6, 2048, 32, 39)
def test_gram(seed, n, p, q):
    rng = np.random.default_rng(seed)
    a, b, acc = words(rng, n, p), words(rng, n, q), words(rng, p, q)
    assert np.array_equal(run("gram", a, b, acc), acc + a.T @ b)


@pytest.mark.parametrize("p", [1, 3, 4, 5, 10])
def test_gram_of_any_width(p):
    rng = np.random.default_rng(p)
    for q in range(1, 71):
        a, b, acc = words(rng, 19, p), words(rng, 19, q), words(rng, p, q)
        assert np.array_equal(run("gram", a, b, acc), acc + a.T @ b), q


@pytest.mark.parametrize("n", [1, 256, 2049])
def test_sums_of_extreme_words(n):
    for x in EDGES:
        for y in EDGES:
            a, b = np.full((n, 5), x, np.uint64), np.full((n, 9), y, np.uint64)
            acc = np.full((5, 9), WORD, np.uint64)
            total = (n * x * y - 1) % 2**64
            assert (run("gram", a, b, acc) == total).all()
            assert (run("weighted_sums", a[:, 0].copy(), b, acc[0]) == total).all()
            a, b = a.T[:2].copy(), b.T[:2].copy()
            assert (run("dot_rows", a, b, acc[0, :2]) == total).all()


@quick(40)
@given(SEEDS, ROWS, COLUMNS)
@example(1, 3, 0)
@example(2, 0, 4)
@example(3, 3, 2049)
def test_dot_rows(seed, n, k):
    rng = np.random.default_rng(seed)
    a, b, out = words(rng, n, k), words(rng, n, k), words(rng, n)
    assert np.array_equal(run("dot_rows", a, b, out), out + (a * b).sum(axis=1))


@quick(40)
@given(SEEDS, ROWS, COLUMNS)
@example(1, 3, 0)
@example(2, 0, 4)
def test_weighted_sums(seed, n, d):
    rng = np.random.default_rng(seed)
    z, g, acc = words(rng, n), words(rng, n, d), words(rng, d)
    assert np.array_equal(run("weighted_sums", z, g, acc), acc + z @ g)


# -- banded operands ------------------------------------------------------------


@quick(60)
@given(SEEDS, ROWS, WIDTHS, st.integers(0, 30), COLUMNS)
@example(1, 0, 2, 3, 4)
@example(2, 5, 0, 3, 4)
@example(3, 5, 2, 0, 1)
@example(4, 5, 2, 3, 0)
@example(5, 5, 0, 0, 4)
@example(6, 2048, 5, 27, 33)
def test_banded(seed, n, w, more, q):
    rng = np.random.default_rng(seed)
    ncols = w + more
    values, start, dense = banded(rng, n, w, ncols)
    b, acc = words(rng, n, q), words(rng, ncols, q)
    out = run("gram_banded", values, start, b, acc)
    assert np.array_equal(out, acc + dense.T @ b)

    table, old = words(rng, ncols, q), words(rng, n, q)
    assert np.array_equal(run("band_rows", values, start, table, old), dense @ table)

    r, old = words(rng, n, ncols), words(rng, n, ncols)
    assert np.array_equal(run("hide_banded", r, values, start, old), dense - r)

    out = words(rng, n)
    expected = out + (dense * r).sum(axis=1)
    assert np.array_equal(run("dot_banded", values, start, r, out), expected)


@pytest.mark.parametrize("value", [-(2**63), 2**63 - 1, -1])
@pytest.mark.parametrize("n", [1, 256, 2049])
def test_banded_extreme_words(value, n):
    values, start = np.full((n, 2), value), np.ones(n, np.int32)
    dense = np.array([0, value, value, 0]).view(np.uint64)
    for x in EDGES:
        b = np.full((n, 4), x, np.uint64)
        acc = np.full((4, 4), WORD, np.uint64)
        out = run("gram_banded", values, start, b, acc)
        total = (n * value * x - 1) % 2**64
        assert out.T.tolist() == [[WORD, total, total, WORD]] * 4
        out = run("band_rows", values, start, np.full((4, 4), x, np.uint64), b)
        assert (out == 2 * value * x % 2**64).all()
        assert (run("hide_banded", b, values, start, b) == dense - b).all()
        out = run("dot_banded", values, start, b, b[:, 0])
        assert (out == (2 * value + 1) * x % 2**64).all()


@quick(20)
@given(SEEDS, ROWS, WIDTHS, st.integers(0, 30))
def test_hide_banded_in_place(seed, n, w, more):
    rng = np.random.default_rng(seed)
    values, start, dense = banded(rng, n, w, w + more)
    r, check = guarded(words(rng, n, w + more))
    expected = dense - r
    ring64.hide_banded(r, values, start, r)
    assert np.array_equal(r, expected)
    check()


def test_a_hidden_matrix_gives_the_same_sums():
    rng = np.random.default_rng(0)
    values, start, _ = banded(rng, 700, 4, 36)
    b, r = words(rng, 700, 33), words(rng, 700, 36)
    expected = run("gram_banded", values, start, b, np.zeros((36, 33), np.uint64))
    acc = np.zeros((36, 33), np.uint64)
    ring64.gram(r, b, acc)
    ring64.hide_banded(r, values, start, r)
    ring64.gram(r, b, acc)
    assert np.array_equal(acc, expected)


# -- reals ----------------------------------------------------------------------

REALS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=64),
    st.floats(-1e9, 1e9),
    st.integers(-(2**20), 2**20).map(lambda v: v / 2),
    st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 0.5, -0.5, 1.5, 2.5, -1.5, -2.5]),
    st.sampled_from([LIMIT, -LIMIT, 2.0**63, -(2.0**63), 2.0**52 + 1, 2.0**51 + 0.5]),
)


@quick(200)
@given(
    st.lists(REALS, max_size=20),
    st.sampled_from([0, 1, 8, 16, 30, 100]),
    st.sampled_from([math.inf, 2.0**63, 2.0**40 + 0.5, 1e6, 0.0]),
)
def test_encode(reals, shift, bound):
    exact = [round(Fraction(v) * 2**shift) for v in reals]
    out, check = guarded(np.full(len(reals), WORD, np.uint64))
    fits = ring64.encode(np.array(reals, dtype=float), 2.0**shift, bound, out)
    check()
    assert fits is all(abs(v) <= min(bound, LIMIT) for v in exact)
    if fits:
        assert out.tolist() == [v % 2**64 for v in exact]


def test_encode_known():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0, -0.0, 3.25, -3.25])
    out = np.empty(10, np.uint64)
    assert ring64.encode(x, 1.0, 3.0, out) is True
    assert out.view(np.int64).tolist() == [0, 2, 2, 0, -2, -2, 0, 0, 3, -3]
    assert ring64.encode(x, 4.0, 13.0, out) is True
    assert out.view(np.int64).tolist() == [2, 6, 10, -2, -6, -10, 0, 0, 13, -13]
    # near 2^52 every half is still there, and beyond 2^53 nothing is rounded
    x = np.array([2.0**52 - 0.5, 2.0**51 + 0.5, 2.0**52 + 1, 2.0**60 + 2.0**8, LIMIT])
    assert ring64.encode(x, 1.0, math.inf, out[:5]) is True
    exact = [2**52, 2**51, 2**52 + 1, 2**60 + 2**8, 2**63 - 2**10]
    assert out[:5].tolist() == exact


@pytest.mark.parametrize("bound", [8.0, 2.0**55, math.inf])
def test_encode_refuses_one_of_many(bound):
    n = 2051
    out = np.empty(n, np.uint64)
    x = np.linspace(-8, 8, n)
    assert ring64.encode(x, 1.0, bound, out) is True
    beyond = 2 * min(bound, LIMIT)
    for bad in (math.nan, math.inf, -math.inf, 1e300, -1e300, beyond, -beyond):
        for where in (0, 5, 1023, 2047, 2048, n - 1):
            y = x.copy()
            y[where] = bad
            assert ring64.encode(y, 1.0, bound, out) is False


def test_encode_at_its_bounds():
    out = np.empty(17, np.uint64)

    def fits(x, bound=8.0, scale=1.0):
        good = ring64.encode(np.full(17, x), scale, bound, out)
        assert ring64.encode(np.full(17, -x), scale, bound, out) is good
        return good

    # 8.5 rounds to 8
    assert fits(8.0) and fits(8.5) and not fits(math.nextafter(8.5, 9))
    assert fits(4.0, scale=2.0) and not fits(4.5, scale=2.0)
    assert fits(8.5, bound=8.5) and not fits(8.6, bound=8.5)
    assert fits(0.5, bound=0.0) and not fits(0.6, bound=0.0)
    assert fits(LIMIT, math.inf) and not fits(2.0**63, math.inf)
    assert fits(LIMIT / 2, math.inf, 2.0) and not fits(1e308, math.inf, 16.0)
    # bounds that allow nothing
    assert not fits(0.0, math.nan) and not fits(0.0, -1.0)


# -- arguments ------------------------------------------------------------------


def matching():
    """Return each function of arrays with matching arguments, the last the output."""
    rng = np.random.default_rng(7)
    n, w, ncols, q = 3, 2, 5, 4
    values, start, _ = banded(rng, n, w, ncols)
    return {
        "gram": [words(rng, n, 2), words(rng, n, q), words(rng, 2, q)],
        "gram_banded": [values, start, words(rng, n, q), words(rng, ncols, q)],
        "band_rows": [values, start, words(rng, ncols, q), words(rng, n, q)],
        "hide_banded": [words(rng, n, ncols), values, start, words(rng, n, ncols)],
        "dot_rows": [words(rng, n, q), words(rng, n, q), words(rng, n)],
        "dot_banded": [values, start, words(rng, n, ncols), words(rng, n)],
        "weighted_sums": [words(rng, n), words(rng, n, q), words(rng, q)],
    }


BANDED = ["gram_banded", "band_rows", "hide_banded", "dot_banded"]
# axes that match no other: the width of a band, and mostly that of its matrix
FREE = {("gram_banded", 0, 1), ("gram_banded", 3, 0), ("band_rows", 0, 1)}
FREE |= {("band_rows", 2, 0), ("hide_banded", 1, 1)}
FREE |= {("dot_banded", 0, 1), ("dot_banded", 2, 1)}


@pytest.mark.parametrize("name", matching())
def test_mismatched_arrays_are_refused(name):
    args = matching()[name]
    for k, array in enumerate(args):
        for axis in range(array.ndim):
            if (name, k, axis) in FREE:
                continue
            for length in (0, array.shape[axis] - 1, array.shape[axis] + 1):
                wrong = list(args)
                shape = [*array.shape[:axis], length, *array.shape[axis + 1 :]]
                wrong[k] = np.resize(array, shape)
                before = wrong[-1].copy()
                with pytest.raises(ValueError, match="match|band"):
                    getattr(ring64, name)(*wrong)
                assert np.array_equal(wrong[-1], before)


def test_encode_refuses_a_mismatch():
    for n in (0, 2, 4):
        with pytest.raises(ValueError, match="match"):
            ring64.encode(np.zeros(n), 1.0, 1.0, np.zeros(3, np.uint64))


@pytest.mark.parametrize("name", BANDED)
def test_a_band_outside_is_refused(name):
    args = matching()[name]
    before = args[-1].copy()
    place = next(k for k, a in enumerate(args) if a.ndim == 1)

    def call(start):
        getattr(ring64, name)(*args[:place], start, *args[place + 1 :])

    for bad in (-1, 4, 5, 2**31, 2**32, 2**63 - 1, -(2**63), -(2**63) + 1):
        for where in range(3):
            start = np.zeros(3, np.int64)
            start[where] = bad
            with pytest.raises(ValueError, match="band"):
                call(start)
    for start in (np.zeros(3), np.zeros(3, np.uint64)):
        with pytest.raises(TypeError):
            call(start)
    assert np.array_equal(args[-1], before)
    call(np.array([3, 0, 3], np.uint8))
    wide = list(args)
    wide[place - 1] = np.ones((3, 6), np.int64)
    wide[place] = np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="band"):
        getattr(ring64, name)(*wide)


@pytest.mark.parametrize("name", matching())
def test_inputs_may_be_read_only(name):
    args = matching()[name]
    expected = run(name, *args)
    for array in args[:-1]:
        array.setflags(write=False)
    assert np.array_equal(run(name, *args), expected)
    args[-1].setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        getattr(ring64, name)(*args)


def test_encode_of_a_read_only_array():
    x, out = np.array([1.0, -2.0]), np.empty(2, np.uint64)
    x.setflags(write=False)
    assert ring64.encode(x, 2.0, 4.0, out)
    assert out.tolist() == [2, -4 & WORD]


@pytest.mark.parametrize("name", matching())
def test_other_layouts_and_types_are_refused(name):
    args = matching()[name]
    for k, array in enumerate(args):
        if name in BANDED and array.ndim == 1 and k < len(args) - 1:
            continue  # starts may be any
        other = np.repeat(array, 2, axis=-1)[..., ::2]
        for bad in (other, array.astype(np.float64)):
            with pytest.raises(ValueError, match="contiguous|dtype"):
                getattr(ring64, name)(*args[:k], bad, *args[k + 1 :])


def test_gram_from_threads():
    """The kernels keep no state: concurrent calls do not disturb each other."""
    rng = np.random.default_rng(9)
    a, b = words(rng, 600, 9), words(rng, 600, 11)
    results = [np.zeros((9, 11), np.uint64) for _ in range(8)]
    threads = [Thread(target=ring64.gram, args=(a, b, out)) for out in results]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(np.array_equal(out, a.T @ b) for out in results)
