"""The field kernels against Python integers.

Every test runs on both fields and on every instruction set this processor has,
because each of them is compiled separately.
"""

from contextlib import contextmanager
from fractions import Fraction
import math
from threading import Thread

from examples import quick
from hypothesis import example, given
from hypothesis import strategies as st
import numpy as np
import pytest

from dipy_ppir._kernels import field61, field127

WORD = (1 << 64) - 1
KERNELS = {61: field61, 127: field127}


def levels(kernels):
    """Return the instruction sets present here, the best one last."""
    best = kernels._use_level(2)
    return list(range(best + 1))


class Field:
    """A kernel module with packing of Python integers."""

    def __init__(self, bits, level):
        self.k = KERNELS[bits]
        self.bits = bits
        self.level = level
        self.p = (1 << bits) - 1

    @contextmanager
    def on(self):
        """Run on this instruction set, then go back to the best one."""
        assert self.k._use_level(self.level) == self.level
        try:
            yield self.k
        finally:
            self.k._use_level(2)

    def pack(self, values, shape=None):
        values = list(values)
        shape = (len(values),) if shape is None else shape
        if self.bits == 61:
            return np.array(values, dtype=np.uint64).reshape(shape)
        words = np.array([[v & WORD, v >> 64] for v in values], dtype=np.uint64)
        return words.reshape(*shape, 2)

    def unpack(self, array):
        """Return a flat list of integers, having checked that all are canonical."""
        if self.bits == 61:
            values = [int(v) for v in array.reshape(-1)]
        else:
            values = [int(lo) | int(hi) << 64 for lo, hi in array.reshape(-1, 2)]
        assert all(0 <= v < self.p for v in values)
        return values

    def empty(self, *shape):
        """Return an array whose every word would be noticed if left unwritten."""
        return np.full(shape + (2,) * (self.bits == 127), WORD, dtype=np.uint64)

    def edges(self):
        p = self.p
        values = [0, 1, 2, p - 1, p - 2, (p - 1) // 2, (p + 1) // 2]
        # limb boundaries, from both sides, and single limbs full of ones
        for s in (16, 20, 21, 22, 24, 30, 31, 32, 42, 52, 60, 63, 64, 65, 126):
            if s < self.bits:
                values += [1 << s, (1 << s) - 1, p - (1 << s)]
        for low in range(0, self.bits, 21):
            values.append((((1 << 21) - 1) << low) % p)
        return values

    def elements(self):
        return st.one_of(st.sampled_from(self.edges()), st.integers(0, self.p - 1))

    def random(self, rng, *shape, edges=0.2):
        """Draw uniform elements as an object array, some replaced by edge values."""
        n = math.prod(shape)
        raw = rng.bytes(16 * n)
        edge = self.edges()
        values = [
            int.from_bytes(raw[16 * i : 16 * i + 16], "little") % self.p
            for i in range(n)
        ]
        where = np.flatnonzero(rng.random(n) < edges)
        for i in where:
            values[i] = edge[rng.integers(len(edge))]
        out = np.empty(n, dtype=object)
        out[:] = values
        return out.reshape(shape)

    def pack_object(self, array):
        return self.pack(array.reshape(-1).tolist(), array.shape)


ALL = [
    Field(bits, level) for bits, kernels in KERNELS.items() for level in levels(kernels)
]
EVERY = pytest.mark.parametrize("field", ALL, ids=lambda f: f"p{f.bits}-level{f.level}")
SEEDS = st.integers(0, 2**32 - 1)

BINARY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
}

# a, b and what comes of them, computed once with an independent program
KNOWN = {
    61: {
        "a": 0x107F6E5D4C3B299C,
        "b": 0x0091A2B3C4D5E6FB,
        "add": 0x1111111111111097,
        "sub": 0x0FEDCBA9876542A1,
        "mul": 0x1B70A66DD7F5D71D,
        "neg": 0x0F8091A2B3C4D663,
        "scale": 0x080A7A488644948F,
        "axpby": 0x10C83FB72EA61B1D,
        "square": 0x02BAE38BA2161261,
        "inverse": 0x0DC74607E5194B00,
    },
    127: {
        "a": 0x123456789ABCDEF0FEDCBA9876543210,
        "b": 0x0FEDCBA9876543210123456789ABCDEF,
        "add": 0x2222222222222211FFFFFFFFFFFFFFFF,
        "sub": 0x02468ACF13579BCFFDB97530ECA86421,
        "mul": 0x1BB2D55891D67BE686854E9E2FBF07C5,
        "neg": 0x6DCBA9876543210F0123456789ABCDEF,
        "scale": 0x56F219C56C868AFAE4EF6718D15D8A21,
        "axpby": 0x2B3C4D5E6F809151F6E5D4C3B2A19083,
        "square": 0x472CA04CDCFB5286732EFE24E78A538A,
        "inverse": 0x62CFEFE6EB41053969967BD711C5169F,
    },
}


# -- constants and known answers ------------------------------------------------


def test_names():
    assert (field61.BITS, field61.WORDS) == (61, 1)
    assert (field127.BITS, field127.WORDS) == (127, 2)
    public = [
        {n for n in dir(k) if not n.startswith("_") and callable(getattr(k, n))}
        for k in KERNELS.values()
    ]
    assert public[0] == public[1]


def test_word_order():
    out = np.zeros((1, 2), dtype=np.uint64)
    field127.add(np.array([[WORD, 0]], np.uint64), np.array([[1, 0]], np.uint64), out)
    assert out.tolist() == [[0, 1]]


@EVERY
def test_known_answers(field):
    known = KNOWN[field.bits]
    a, b, out = (
        field.pack([known["a"]] * 19),
        field.pack([known["b"]] * 19),
        field.empty(19),
    )
    with field.on() as k:
        for name in BINARY:
            getattr(k, name)(a, b, out)
            assert field.unpack(out) == [known[name]] * 19, name
        k.neg(a, out)
        assert field.unpack(out) == [known["neg"]] * 19
        k.scale(a, 0x1122334455667788, out)
        assert field.unpack(out) == [known["scale"]] * 19
        k.axpby(5, a, -3, b, out)
        assert field.unpack(out) == [known["axpby"]] * 19
        k.mul(a, a, out)
        assert field.unpack(out) == [known["square"]] * 19
        k.mul(a, field.pack([known["inverse"]] * 19), out)
        assert field.unpack(out) == [1] * 19


@EVERY
def test_known_matrix_product(field):
    p = field.p
    with field.on() as k:
        out = field.empty(2, 2)
        k.matmul(
            field.pack([1, p - 1, 2, 3], (2, 2)), field.pack([5, 6, 7, 8], (2, 2)), out
        )
        assert field.unpack(out) == [p - 2, p - 2, 31, 36]


# -- elementwise ----------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("name", BINARY)
def test_binary_on_all_edge_pairs(field, name):
    edges = field.edges()
    x = [u for u in edges for _ in edges]
    y = [v for _ in edges for v in edges]
    out = field.empty(len(x))
    with field.on() as k:
        getattr(k, name)(field.pack(x), field.pack(y), out)
    assert field.unpack(out) == [
        BINARY[name](u, v) % field.p for u, v in zip(x, y, strict=True)
    ]


@EVERY
@pytest.mark.parametrize("name", BINARY)
def test_binary_and_aliasing(field, name):
    pairs = st.lists(st.tuples(field.elements(), field.elements()), max_size=40)

    @quick(40)
    @given(pairs)
    def check(pairs):
        x, y = [u for u, _ in pairs], [v for _, v in pairs]
        expected = [BINARY[name](u, v) % field.p for u, v in pairs]
        same = [BINARY[name](u, u) % field.p for u in x]
        a, b, out = (
            field.pack(x, (len(x),)),
            field.pack(y, (len(y),)),
            field.empty(len(x)),
        )
        run = getattr(field.k, name)
        run(a, b, out)
        assert field.unpack(out) == expected
        assert field.unpack(a) == x
        assert field.unpack(b) == y
        left = a.copy()
        run(left, b, left)
        assert field.unpack(left) == expected
        right = b.copy()
        run(a, right, right)
        assert field.unpack(right) == expected
        both = a.copy()
        run(both, both, both)
        assert field.unpack(both) == same

    with field.on():
        check()


@EVERY
def test_constants(field):
    element = field.elements()
    constants = st.one_of(
        element, st.integers(-(1 << 130), 1 << 130), st.integers(-5, 5)
    )

    @quick(60)
    @given(
        st.lists(st.tuples(element, element), min_size=1, max_size=30),
        constants,
        constants,
    )
    @example([(field.p - 1, field.p - 1)] * 17, field.p - 1, field.p - 1)
    def check(pairs, alpha, beta):
        k, p = field.k, field.p
        x, y = [u for u, _ in pairs], [v for _, v in pairs]
        a, b, out = field.pack(x), field.pack(y), field.empty(len(x))
        k.scale(a, alpha, out)
        assert field.unpack(out) == [alpha * u % p for u in x]
        k.axpby(alpha, a, beta, b, out)
        expected = [(alpha * u + beta * v) % p for u, v in pairs]
        assert field.unpack(out) == expected
        k.axpby(alpha, a, beta, b, b)
        assert field.unpack(b) == expected
        k.neg(a, out)
        assert field.unpack(out) == [-u % p for u in x]
        k.scale(a, alpha, a)
        assert field.unpack(a) == [alpha * u % p for u in x]
        k.neg(a, a)
        assert field.unpack(a) == [-alpha * u % p for u in x]

    with field.on():
        check()


# -- randomness and trust -------------------------------------------------------


@EVERY
def test_reduce_random(field):
    p = field.p
    word = st.one_of(
        st.integers(0, (1 << 64 * field.k.WORDS) - 1),
        st.sampled_from([p, p + 1, p - 1, 2 * p + 1, (1 << 64 * field.k.WORDS) - 1, 0]),
    )

    @quick(80)
    @given(st.lists(word, max_size=50))
    def check(words):
        a = field.pack(words, (len(words),))
        masked = [w & p for w in words]
        assert field.k.reduce_random(a) == masked.count(p)
        assert a.tobytes() == field.pack(masked, (len(words),)).tobytes()

    with field.on():
        check()


@EVERY
def test_low_word_alone_does_not_reject(field):
    if field.bits == 61:
        pytest.skip("one word")
    a = np.array(
        [[WORD, 0], [0, WORD], [WORD, WORD], [WORD, WORD >> 1]], dtype=np.uint64
    )
    with field.on() as k:
        assert k.reduce_random(a) == 2
    assert a.tolist() == [
        [WORD, 0],
        [0, WORD >> 1],
        [WORD, WORD >> 1],
        [WORD, WORD >> 1],
    ]


@EVERY
def test_replace_rejected(field):
    p, high = field.p, 1 << (64 * field.k.WORDS - 1)
    with field.on() as k:
        a = field.pack([p, 3, p, p - 1, p])
        assert k.replace_rejected(a, field.pack([high | 7, p, high | p, 8, 9, 10])) == 5
        assert field.unpack(a) == [7, 3, 8, p - 1, 9]
        a = field.pack([p, p])
        assert k.replace_rejected(a, field.pack([1, p])) == -1
        a = field.pack([p])
        assert k.replace_rejected(a, field.pack([], (0,))) == -1
        a = field.pack([1, 2])
        assert k.replace_rejected(a, field.pack([], (0,))) == 0
        assert k.replace_rejected(field.pack([], (0,)), field.pack([1])) == 0


@EVERY
def test_is_canonical(field):
    p, top = field.p, (1 << 64 * field.k.WORDS) - 1
    with field.on() as k:
        assert k.is_canonical(field.pack([], (0,))) is True
        assert k.is_canonical(field.pack(field.edges())) is True
        for bad in (p, p + 1, top, 1 << (64 * field.k.WORDS - 1)):
            for n in (1, 7, 8, 33):
                for where in {0, n // 2, n - 1}:
                    values = [p - 1] * n
                    values[where] = bad
                    assert k.is_canonical(field.pack(values)) is False


# -- reals and integers -----------------------------------------------------------


def limit(field):
    return math.nextafter(2.0 ** (field.bits - 1), 0)


@EVERY
def test_encode_decode_reals(field):
    reals = st.one_of(
        st.floats(allow_nan=False, allow_infinity=False, width=64),
        st.floats(-1e9, 1e9),
        st.integers(-(2**20), 2**20).map(lambda v: v / 2),
        st.sampled_from([0.0, -0.0, 5e-324, -5e-324, 0.5, -0.5, 1.5, 2.5, -1.5, -2.5]),
    )

    @quick(150)
    @given(st.lists(reals, max_size=20), st.sampled_from([0, 1, 8, 16, 30, 100]))
    def check(reals, shift):
        scale, out = 2.0**shift, field.empty(len(reals))
        bound = limit(field)
        exact = [round(Fraction(v) * 2**shift) for v in reals]
        bad = [i for i, v in enumerate(exact) if abs(v) > bound]
        where = field.k.encode(np.array(reals, dtype=float), scale, bound, out)
        if bad:
            assert where == bad[0]
            exact, out = exact[:where], np.ascontiguousarray(out[:where])
        else:
            assert where == -1
        assert field.unpack(out) == [v % field.p for v in exact]
        back = np.empty(len(exact))
        field.k.decode(out, scale, back)
        assert back.tolist() == [v / 2**shift for v in exact]

    with field.on():
        check()


@EVERY
def test_encode_known(field):
    p = field.p
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0, -0.0, 3.25, -3.25])
    out = field.empty(len(x))
    with field.on() as k:
        assert k.encode(x, 1.0, 100.0, out) == -1
        assert field.unpack(out) == [0, 2, 2, 0, p - 2, p - 2, 0, 0, 3, p - 3]
        assert k.encode(x, 4.0, 100.0, out) == -1
        assert field.unpack(out) == [2, 6, 10, p - 2, p - 6, p - 10, 0, 0, 13, p - 13]
        back = np.empty(len(x))
        k.decode(out, 4.0, back)
    assert back.tolist() == x.tolist()


@EVERY
@pytest.mark.parametrize(
    "bad", [np.nan, np.inf, -np.inf, 1e300, -1e300, 8.5000001, -8.5000001]
)
def test_encode_refuses(field, bad):
    out = field.empty(9)
    with field.on() as k:
        for where in (0, 4, 8):
            x = np.full(9, -8.0)
            x[where] = bad
            x[where + 1 :] = np.nan
            assert k.encode(x, 1.0, 8.0, out) == where
        # 8.5 rounds to 8, and a bound that is not a number allows what the field does
        assert k.encode(np.full(9, 8.5), 1.0, 8.0, out) == -1
        assert k.encode(np.full(9, 1e308), 16.0, np.inf, out) == 0
        assert k.encode(np.full(9, 1e300), 1.0, np.nan, out) == 0


@EVERY
@pytest.mark.parametrize("bits", [10, 50, 51, 52, 53, 62])
def test_encode_around_the_bounds_of_its_shortcuts(field, bits):
    """Small bounds are rounded by another method; nothing may depend on which."""
    near = st.integers(-6, 6).flatmap(
        lambda d: st.sampled_from([d / 2 + s * 2.0**bits for s in (-1, 0, 1)])
    )
    large = st.floats(2.0**40, 2.0**60).flatmap(lambda v: st.sampled_from([v, -v]))
    reals = st.one_of(
        near,
        large,
        st.floats(-1e3, 1e3),
        st.sampled_from([0.5, -0.5, 1.5, -0.0, 1e-320]),
    )

    @quick(80)
    @given(
        st.lists(reals, max_size=30), st.integers(-4, 4), st.sampled_from([0, 3, 20])
    )
    def check(reals, off, shift):
        bound = min(2.0**bits + off / 2, limit(field))
        x, out = np.array(reals, dtype=float) / 2.0**shift, field.empty(len(reals))
        exact = [round(Fraction(v) * 2**shift) for v in x.tolist()]
        bad = [i for i, v in enumerate(exact) if abs(v) > bound]
        where = field.k.encode(x, 2.0**shift, bound, out)
        assert where == (bad[0] if bad else -1)
        good = len(exact) if where < 0 else where
        assert field.unpack(np.ascontiguousarray(out[:good])) == [
            v % field.p for v in exact[:good]
        ]

    with field.on():
        check()


@EVERY
@pytest.mark.parametrize("bound", [2.0**20, 2.0**55])
def test_encode_finds_the_first_offender(field, bound):
    n = 3000
    x = np.linspace(-1000, 1000, n)
    expected = [round(v) % field.p for v in x.tolist()]
    out = field.empty(n)
    with field.on() as k:
        assert k.encode(x, 1.0, bound, out) == -1
        assert field.unpack(out) == expected
        for bad in (np.nan, np.inf, -np.inf, 2 * bound, -2 * bound):
            for where in (0, 5, 1023, 1024, 1025, 2047, 2048, n - 1):
                y, out = x.copy(), field.empty(n)
                y[where] = y[-1] = bad
                assert k.encode(y, 1.0, bound, out) == where
                assert (
                    field.unpack(np.ascontiguousarray(out[:where])) == expected[:where]
                )


@EVERY
def test_encode_keeps_the_sign_recoverable(field):
    top = limit(field)
    out, back = field.empty(2), np.empty(2)
    with field.on() as k:
        assert k.encode(np.array([top, -top]), 1.0, np.inf, out) == -1
        assert field.unpack(out) == [int(top), field.p - int(top)]
        k.decode(out, 1.0, back)
        assert back.tolist() == [top, -top]
        assert k.encode(np.array([0.0, 2.0 ** (field.bits - 1)]), 1.0, np.inf, out) == 1
        assert (
            k.encode(np.array([-(2.0 ** (field.bits - 1)), 0.0]), 1.0, np.inf, out) == 0
        )


@EVERY
def test_decode_rounds_to_nearest(field):
    @quick(100)
    @given(st.lists(field.elements(), max_size=20), st.sampled_from([0, 1, 20, 60]))
    def check(values, shift):
        out = np.empty(len(values))
        field.k.decode(field.pack(values, (len(values),)), 2.0**shift, out)
        centred = [v - field.p if v > field.p // 2 else v for v in values]
        assert out.tolist() == [float(v) / 2.0**shift for v in centred]

    with field.on():
        check()


@EVERY
def test_encode_int(field):
    edges = [
        0,
        1,
        -1,
        2**63 - 1,
        -(2**63),
        2**61 - 1,
        1 - 2**61,
        2**61,
        -(2**61),
        2**62,
    ]

    @quick(60)
    @given(
        st.lists(
            st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from(edges)),
            max_size=40,
        )
    )
    @example(edges)
    def check(values):
        out = field.empty(len(values))
        field.k.encode_int(np.array(values, dtype=np.int64), out)
        assert field.unpack(out) == [v % field.p for v in values]

    with field.on():
        check()


# -- matrix products --------------------------------------------------------------


@EVERY
def test_matmul(field):
    @quick(40)
    @given(SEEDS, st.integers(0, 37), st.integers(0, 70), st.integers(0, 35))
    @example(1, 17, 65, 9)
    @example(2, 16, 8, 4)
    @example(3, 33, 32, 28)
    @example(4, 18, 130, 33)
    def check(seed, n, k, m):
        rng = np.random.default_rng(seed)
        a, b, out = field.random(rng, n, k), field.random(rng, k, m), field.empty(n, m)
        field.k.matmul(field.pack_object(a), field.pack_object(b), out)
        expected = [
            [sum(a[i, t] * b[t, j] for t in range(k)) % field.p for j in range(m)]
            for i in range(n)
        ]
        assert field.unpack(out) == [v for row in expected for v in row]

    with field.on():
        check()


@EVERY
@pytest.mark.parametrize(
    ("n", "k", "m"), [(16, 4, 8), (19, 63, 5), (17, 64, 28), (16, 65, 33), (20, 200, 9)]
)
def test_matmul_worst_case(field, n, k, m):
    for x in worst(field):
        for y in (x, field.p - 1):
            a, b, out = (
                field.pack([x] * (n * k), (n, k)),
                field.pack([y] * (k * m), (k, m)),
                field.empty(n, m),
            )
            with field.on() as kernels:
                kernels.matmul(a, b, out)
            assert field.unpack(out) == [k * x * y % field.p] * (n * m)


def worst(field):
    """Return elements that make some partial sum as large as it can be."""
    values = [field.p - 1, field.p - 2, 0x5555555555555555 % field.p]
    if field.bits == 127:
        values += [WORD, WORD >> 1 << 64, (WORD >> 1 << 64) | (WORD - 1)]
    return values


@EVERY
def test_matmul_from_threads(field):
    """The kernels keep no state: concurrent calls do not disturb each other."""
    rng = np.random.default_rng(9)
    a, b = field.random(rng, 5, 300), field.random(rng, 300, 6)
    expected = (a @ b % field.p).reshape(-1).tolist()
    packed = field.pack_object(a), field.pack_object(b)
    results = [field.empty(5, 6) for _ in range(8)]
    with field.on() as k:
        threads = [Thread(target=k.matmul, args=(*packed, out)) for out in results]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(field.unpack(out) == expected for out in results)


@EVERY
def test_very_many_terms(field):
    """Enough terms to overflow 64-bit and 128-bit sums that were never folded."""
    n, words = 300_000, (1,) * (field.bits == 127)
    top, out = field.pack([field.p - 1], (1, 1)), field.empty(4, 8)
    with field.on() as k:
        k.matmul(np.tile(top, (4, n, *words)), np.tile(top, (n, 8, *words)), out)
    assert field.unpack(out) == [n] * 32


# -- arguments ----------------------------------------------------------------------


@EVERY
def test_mismatched_arrays_are_refused(field):
    k = field.k
    a, b = field.pack([1, 2, 3]), field.pack([1, 2])
    for name in BINARY:
        for args in ((a, b, a), (b, a, a), (a, a, b)):
            with pytest.raises(ValueError, match="match"):
                getattr(k, name)(*args)
    for call in (
        lambda: k.neg(a, b),
        lambda: k.scale(a, 3, b),
        lambda: k.axpby(1, a, 1, b, a),
        lambda: k.encode(np.zeros(2), 1.0, 1.0, a),
        lambda: k.decode(a, 1.0, np.zeros(2)),
        lambda: k.encode_int(np.zeros(2, np.int64), a),
        lambda: k.matmul(field.empty(2, 3), field.empty(4, 2), field.empty(2, 2)),
        lambda: k.matmul(field.empty(2, 3), field.empty(3, 2), field.empty(3, 2)),
        lambda: k.matmul(field.empty(2, 3), field.empty(3, 2), field.empty(2, 3)),
    ):
        with pytest.raises(ValueError, match="match"):
            call()


def test_two_words_are_required():
    bad, good = np.zeros((4, 3), np.uint64), np.zeros((4, 2), np.uint64)
    for args in ((bad, good, good), (good, bad, good), (good, good, bad)):
        with pytest.raises(ValueError, match="match"):
            field127.mul(*args)
    with pytest.raises(ValueError, match="match"):
        field127.reduce_random(bad)


@EVERY
def test_inputs_may_be_read_only(field):
    a = field.pack([1, 2, 3])
    a.setflags(write=False)
    out = field.empty(3)
    with field.on() as k:
        k.add(a, a, out)
        assert field.unpack(out) == [2, 4, 6]
        with pytest.raises(ValueError, match="read-only"):
            k.add(a, a, a)


@EVERY
def test_empty_arrays(field):
    none, e = field.pack([], (0,)), np.zeros(0)
    with field.on() as k:
        for name in BINARY:
            getattr(k, name)(none, none, none)
        k.neg(none, none)
        k.scale(none, 2, none)
        k.axpby(1, none, 2, none, none)
        assert k.encode(e, 1.0, 1.0, none) == -1
        k.decode(none, 1.0, e)
        k.encode_int(np.zeros(0, np.int64), none)
        assert k.reduce_random(none) == 0
        out = field.empty(2, 3)
        k.matmul(field.empty(2, 0), field.empty(0, 3), out)
        assert field.unpack(out) == [0] * 6
