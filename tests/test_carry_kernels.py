"""Kernels of products of coarse and fine arrays, against Python integers."""

from examples import quick
from hypothesis import example, given
from hypothesis import strategies as st
import numpy as np
import pytest

from dipy_ppir._kernels import carry

RING = 1 << 128
SEEDS = st.integers(0, 2**32 - 1)
FIRST = [1, -8, 0, 8, -1]
WIDE = [-3, 29, -145, 0, 145, -29, 3]
SECOND = [-1, 16, -30, 16, -1]
KEYS = {code: key for key, code in carry.CODES.items()}


def elements(rng, *shape):
    return rng.integers(0, 1 << 64, (*shape, 2), dtype=np.uint64)


def ints(x):
    x = x.astype(object)
    return x[..., 0] + (x[..., 1] << 64)


def bands(rng, coarse, fine, most=4):
    """Random weights along three axes, and the matrices that they are."""
    each, matrices = [], []
    for c, n in zip(coarse, fine, strict=True):
        taps = int(rng.integers(1, min(most, c) + 1))
        first = rng.integers(0, c - taps + 1, n)
        weights = rng.integers(-(1 << 12), 1 << 12, (n, taps), dtype=np.int32)
        weights[rng.random(weights.shape) < 0.3] = 0
        matrix = np.zeros((n, c), dtype=object)
        for i in range(n):
            matrix[i, first[i] : first[i] + taps] = weights[i].tolist()
        each.append((first, weights))
        matrices.append(matrix)
    return carry.Bands(each, coarse), matrices


def interpolated(field, matrices):
    x = ints(field)
    for axis, matrix in enumerate(matrices):
        x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
    return x


def along(x, taps, axis):
    """Correlation with an odd number of taps, edges repeated."""
    n = x.shape[axis]
    return sum(
        w * np.take(x, np.clip(np.arange(n) + k - len(taps) // 2, 0, n - 1), axis)
        for k, w in enumerate(taps)
    )


def derivative(x, key, wide):
    """144 times the derivative of integers; 144 * 256 times with seven taps."""
    first, more = (WIDE, 16) if wide else (FIRST, 1)
    if len(key) == 1:
        return 12 * more * along(x, first, key[0])
    if key[0] == key[1]:
        return 12 * more**2 * along(x, SECOND, key[0])
    return along(along(x, first, key[0]), first, key[1])


@quick(40)
@given(SEEDS, st.integers(1, 3))
def test_spread(seed, threads):
    rng = np.random.default_rng(seed)
    coarse = tuple(int(k) for k in rng.integers(1, 5, 3))
    fine = tuple(int(k) for k in rng.integers(1, 8, 3))
    band, matrices = bands(rng, coarse, fine)
    field, y, out = elements(rng, *coarse), elements(rng, *fine), elements(rng, *fine)
    factor = int(rng.choice([1, -1, 12, -3]))
    expected = ints(out) + factor * interpolated(field, matrices) * ints(y)
    carry.spread(field, band, y, factor, out, threads)
    assert (ints(out) == expected % RING).all()


@quick(40)
@given(SEEDS, st.integers(1, 3))
def test_slope_products(seed, threads):
    rng = np.random.default_rng(seed)
    shape = tuple(int(k) for k in rng.integers(1, 7, 3))
    t, x = elements(rng, *shape), elements(rng, *shape)
    begin = int(rng.integers(0, shape[0]))
    planes = int(rng.integers(1, shape[0] - begin + 1))
    for axis in range(3):
        slope = np.zeros(shape, dtype=object)
        inner = [slice(None)] * 3
        inner[axis] = slice(1, -1)
        whole, n = ints(x), shape[axis]
        if n > 2:
            after = np.take(whole, range(2, n), axis)
            slope[tuple(inner)] = after - np.take(whole, range(n - 2), axis)
        out = elements(rng, planes, *shape[1:])
        expected = ints(out) + (ints(t) * slope)[begin : begin + planes]
        carry.slope_products(t, x, axis, begin, out, threads)
        assert (ints(out) == expected % RING).all(), axis


@quick(60)
@given(SEEDS, st.sampled_from([2, 3]), st.integers(1, 3))
@example(25, 3, 1)  # one plane of a volume: its derivative across planes is zero
@example(31, 3, 1)
def test_carry(seed, dim, threads):
    rng = np.random.default_rng(seed)
    flat = (1,) * (3 - dim)
    coarse = flat + tuple(int(k) for k in rng.integers(1, 5, dim))
    fine = flat + tuple(int(k) for k in rng.integers(1, 8, dim))
    first = [k for k in (0, 1, 2) if k >= 3 - dim]
    codes = first + [
        code
        for code, key in KEYS.items()
        if len(key) == 2 and min(key) >= 3 - dim and rng.random() < 0.8
    ]
    curved, curved_matrices = bands(rng, coarse, fine)
    straight, straight_matrices = bands(rng, coarse, fine, 2)
    fields = [elements(rng, *coarse) for _ in codes]
    x, out = elements(rng, *fine), elements(rng, *fine)
    factor, wide = int(rng.choice([1, -1, 5])), bool(rng.integers(2))
    expected = ints(out)
    for code, field in zip(codes, fields, strict=True):
        matrices = curved_matrices if code < 3 else straight_matrices
        product = interpolated(field, matrices) * derivative(ints(x), KEYS[code], wide)
        expected = expected + factor * product
    carry.carry(fields, codes, curved, straight, x, factor, wide, out, threads)
    assert (ints(out) == expected % RING).all()


def test_every_instruction_set():
    rng = np.random.default_rng(3)
    band, _ = bands(rng, (4, 9, 11), (5, 20, 30))
    fields = [elements(rng, 4, 9, 11) for _ in range(9)]
    x = elements(rng, 5, 20, 30)
    found = []
    try:
        for level in range(3):
            carry._use_level(level)
            out = np.zeros_like(x)
            carry.carry(fields, list(range(9)), band, band, x, 1, True, out, 2)
            found.append(out)
    finally:
        carry._use_level(2)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_arguments_that_do_not_match_are_refused():
    rng = np.random.default_rng(4)
    band, _ = bands(rng, (2, 3, 4), (3, 4, 5))
    other, _ = bands(rng, (2, 3, 4), (3, 4, 6))
    field, x = elements(rng, 2, 3, 4), elements(rng, 3, 4, 5)
    out, small = np.zeros_like(x), elements(rng, 3, 4, 4)
    for args in (
        (small, band, x, 1, out),
        (field, band, small, 1, out),
        (field, band, x, 1, small.copy()),
        (field, other, x, 1, out),
    ):
        with pytest.raises(ValueError, match="do not match"):
            carry.spread(*args)
    for fields, codes, message in (
        ([field], [0, 1], "polynomial"),
        ([field] * 10, list(range(10)), "polynomial"),
        ([field], [8], "polynomial"),
        ([field], [9], "no such derivative"),
        ([field], [-1], "no such derivative"),
        ([small], [0], "do not match"),
    ):
        with pytest.raises(ValueError, match=message):
            carry.carry(fields, codes, band, band, x, 1, False, out)
    with pytest.raises(ValueError, match="do not match"):
        carry.carry([field], [0], band, other, x, 1, False, out)
    for begin in (-1, 3):
        with pytest.raises(ValueError, match="outside"):
            carry.slope_products(x, x, 0, begin, out[:1])
    with pytest.raises(ValueError, match="outside"):
        carry.slope_products(x, x, 3, 0, out)
    assert not out.any()


@pytest.mark.parametrize("bad", [-1, 2, 2**62])
def test_weights_outside_are_refused(bad):
    good = (np.zeros(2, np.int64), np.ones((2, 2), np.int32))
    wrong = (np.array([0, bad]), np.ones((2, 2), np.int32))
    for axis in range(3):
        each = [good] * 3
        each[axis] = wrong
        with pytest.raises(ValueError, match="outside"):
            carry.Bands(each, (3, 3, 3))
    with pytest.raises(ValueError, match="four"):
        five = (np.zeros(2, np.int64), np.ones((2, 5), np.int32))
        carry.Bands([five, good, good], (5, 3, 3))
