"""Window statistics, filters and splines of one image, against plain twins and DIPY.

The twins look at one window after the other, with Python's integers and fractions.
"""

from fractions import Fraction
from itertools import product
import math
from threading import Thread
import warnings

from dipy.align import crosscorr as dipys
from dipy.align.metrics import CCMetric
from dipy.data import get_fnames
from examples import quick
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import ndimage
from scipy.interpolate import CubicSpline

from dipy_ppir._kernels import ring128, windows
from dipy_ppir.align.metrics import (
    check_size,
    image_half,
    interpolation_matrix,
    mend,
    window_statistics,
    window_sums,
)
from dipy_ppir.mpc.crosscorr import (
    LEAST_DEVIATION,
    WEIGHT_BITS,
    LocalCrossCorrelation,
    gaussian_filter_matrix,
)
from dipy_ppir.mpc.fields import R128

THREADS = [1, 2, 5]
#: Roundings of 2**-53 each: at most five in `inverse`, seven in `residual`, two more
#: in what they are compared with.
CLOSE = 2.0**-49

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Unless a test asks for more: threads wait for each other on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def guarded(array):
    """Copy an array into a longer one; return the copy and a check of the rest."""
    memory = np.full(array.nbytes + 272, 0xAD, np.uint8)
    inner = memory[136 : 136 + array.nbytes].view(array.dtype).reshape(array.shape)
    inner[...] = array

    def check():
        assert (memory[:136] == 0xAD).all() and (memory[-136:] == 0xAD).all()

    return inner, check


def everything(shape):
    return tuple(slice(0, n) for n in shape)


def window(image, at, radius):
    """The part of a window that lies in the image."""
    return image[tuple(slice(max(i - radius, 0), i + radius + 1) for i in at)]


def places(shape, centers):
    """Indices of the centres, one after the other."""
    axes = [range(*c.indices(n)) for c, n in zip(centers, shape, strict=True)]
    return list(product(*axes))


# -- window sums ----------------------------------------------------------------


def run_box(x, radius, first, count, threads=1):
    """Window sums by the kernel, in guarded memory."""
    inputs, untouched = guarded(x)
    out = np.full((x.shape[0], count, x.shape[2]), -77, np.int64)
    out, check = guarded(out)
    windows.box(inputs, radius, first, out, threads)
    check()
    untouched()
    assert np.array_equal(inputs, x), "an input was changed"
    return out


def plain_box(x, radius, first, count):
    x = x.astype(object)
    out = np.empty((x.shape[0], count, x.shape[2]), object)
    for i in range(count):
        low, high = max(first + i - radius, 0), first + i + radius + 1
        out[:, i] = x[:, low:high].sum(axis=1)
    return out


@quick(150)
@given(st.data())
def test_box(data):
    rng = np.random.default_rng(data.draw(SEEDS))
    outer, inner = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 9))
    n = data.draw(st.integers(0, 12))
    radius = data.draw(
        st.one_of(st.integers(0, 14), st.sampled_from([1 << 31, 1 << 40, 1 << 62]))
    )
    first = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - first))
    x = rng.integers(-(2**58), 2**58, (outer, n, inner))
    found = run_box(x, radius, first, count, data.draw(st.integers(1, 3)))
    assert found.tolist() == plain_box(x, radius, first, count).tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_box_of_every_radius(n):
    rng = np.random.default_rng(n)
    x = rng.integers(-99, 99, (2, n, 3))
    for radius in [*range(n + 3), 1000]:
        for first in range(n):
            for count in range(n - first + 1):
                found = run_box(x, radius, first, count)
                expected = plain_box(x, radius, first, count)
                assert np.array_equal(found, expected), (radius, first, count)
    assert np.array_equal(run_box(x, 0, 0, n), x)


def test_box_known():
    x = np.array([1, 10, 100, 1000, -10000]).reshape(1, 5, 1)
    for radius, expected in (
        (0, [1, 10, 100, 1000, -10000]),
        (1, [11, 111, 1110, -8900, -9000]),
        (2, [111, 1111, -8889, -8890, -8900]),
        (4, [-8889] * 5),
    ):
        assert run_box(x, radius, 0, 5).reshape(-1).tolist() == expected
        assert run_box(x, radius, 2, 2).reshape(-1).tolist() == expected[2:4]


@pytest.mark.parametrize("radius", [1, 2, 7])
def test_box_of_the_largest_sums(radius):
    """Sums that just fit; running sums pass beyond them and come back."""
    length = 2 * radius + 1
    for value in ((2**63 - 1) // length, -(2**63) // length + 1):
        x = np.full((2, 4 * length, 5), value)
        found = run_box(x, radius, radius, 3 * length)
        assert (found == length * value).all()


@pytest.mark.parametrize("outer", [1, 2, 3, 7, 16])
def test_box_with_any_number_of_threads(outer):
    rng = np.random.default_rng(outer)
    x = rng.integers(-(2**40), 2**40, (outer, 23, 5))
    results = [run_box(x, 4, 2, 20, threads) for threads in THREADS]
    assert np.array_equal(results[0], plain_box(x, 4, 2, 20))
    assert all(np.array_equal(results[0], r) for r in results[1:])


def test_box_from_threads():
    """The kernel keeps no state: concurrent calls do not disturb each other."""
    x = np.random.default_rng(9).integers(-99, 99, (4, 50, 33))
    results = [np.zeros_like(x) for _ in range(8)]
    threads = [Thread(target=windows.box, args=(x, 3, 0, r, 2)) for r in results]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    expected = plain_box(x, 3, 0, 50)
    assert all(np.array_equal(out, expected) for out in results)


@pytest.mark.parametrize("bad", [(1, 6, 4), (3, 6, 4), (2, 6, 3), (2, 6, 5), (0, 6, 4)])
def test_mismatched_boxes_are_refused(bad):
    x, out = np.ones((2, 6, 4), np.int64), np.full(bad, 7)
    with pytest.raises(ValueError, match="match"):
        windows.box(x, 1, 0, out)
    assert (out == 7).all()


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
def test_boxes_outside_are_refused(radius, first, count):
    x, out = np.ones((2, 6, 4), np.int64), np.full((2, count, 4), 7)
    with pytest.raises(ValueError, match="outside"):
        windows.box(x, radius, first, out)
    assert (out == 7).all()


def test_the_largest_radius():
    x = np.ones((1, 3, 2), np.int64)
    for radius in (2**62, 2**63 - 4, 2**63 - 3, 2**63 - 2, 2**63 - 1):
        assert (run_box(x, radius, 0, 3) == 3).all(), radius


def test_other_layouts_and_types_of_boxes_are_refused():
    x, out = np.ones((2, 6, 4), np.int64), np.ones((2, 6, 4), np.int64)
    for bad in (x[:, :, ::-1], x.astype(float), x.astype(np.int32), x[0]):
        with pytest.raises(ValueError, match="contiguous|dtype|dimensions"):
            windows.box(bad, 1, 0, out)
        with pytest.raises(ValueError, match="contiguous|dtype|dimensions"):
            windows.box(x, 1, 0, bad)
    x.setflags(write=False)
    windows.box(x, 1, 0, out)
    assert out[0, :, 0].tolist() == [2, 3, 3, 3, 3, 2]
    with pytest.raises(ValueError, match="read-only"):
        windows.box(out, 1, 0, x)


#: Slices of one axis: whole, inner, with steps, of one centre, of none.
SLICES = [
    slice(0, None),
    slice(2, -1),
    slice(1, None, 2),
    slice(0, None, 3),
    slice(-1, None),
    slice(3, 3),
]


@pytest.mark.parametrize("radius", [0, 1, 3, 20])
@pytest.mark.parametrize("shape", [(9,), (7, 6), (6, 4, 5), (1, 8), (5, 1, 1)])
def test_window_sums(shape, radius):
    rng = np.random.default_rng(radius)
    image = rng.integers(-(2**50), 2**50, shape)
    exact = image.astype(object)
    for c in product(SLICES, repeat=min(len(shape), 2)):
        centers = (*c, slice(1, None, 2))[: len(shape)]
        found = window_sums(image, radius, centers)
        expected = [
            int(window(exact, at, radius).sum()) for at in places(shape, centers)
        ]
        assert found.dtype == np.int64
        assert found.shape == image[centers].shape
        assert found.reshape(-1).tolist() == expected, centers


def test_window_sums_of_other_layouts():
    image = np.random.default_rng(0).integers(-99, 99, (6, 5, 7))
    centers = (slice(1, 5), slice(0, 5), slice(0, 7, 2))
    expected = window_sums(image, 2, centers)
    for other in (np.asfortranarray(image), np.repeat(image, 2, axis=1)[:, ::2]):
        assert np.array_equal(window_sums(other, 2, centers), expected)
    turned = window_sums(image.T, 2, centers[::-1])
    assert np.array_equal(turned, expected.T)


# -- inverse norms and residuals ------------------------------------------------


def exact_statistics(value, total, square, count, least):
    """The two numbers of one window, correctly rounded but for a unit or two."""
    variance = count * square - total * total
    if variance <= 0 or variance < (Fraction(least) * count) ** 2:
        return 0.0, 0.0
    offset = count * value - total
    residual = math.sqrt(Fraction(offset * offset, variance * count))
    return math.sqrt(Fraction(count, variance)), math.copysign(residual, offset)


def run_normalize(values, sums, squares, counts, least, threads=1):
    arrays = [guarded(np.array(a, np.int64)) for a in (values, sums, squares, counts)]
    outs = [guarded(np.full(len(values), np.nan)) for _ in range(2)]
    inputs = [array for array, _ in arrays]
    windows.normalize(*inputs, least, *(out for out, _ in outs), threads)
    for _, check in (*arrays, *outs):
        check()
    for before, after in zip((values, sums, squares, counts), inputs, strict=True):
        assert list(before) == after.tolist(), "an input was changed"
    return [out for out, _ in outs]


def assert_close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected, float)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= CLOSE * np.abs(expected)).all()


NUMBERS = st.one_of(
    st.lists(st.integers(-(2**14), 2**14), min_size=1, max_size=30),
    st.lists(st.sampled_from([0, 1, 5000, 5001]), min_size=1, max_size=30),
    st.integers(-(2**14), 2**14).map(lambda v: [v] * 7),
)


@quick(150)
@given(st.lists(NUMBERS, max_size=6), st.sampled_from([0.0, 0.3, 17.1, 3000.7, 1e9]))
def test_normalize(samples, least):
    stats = [
        (s[0], sum(s), sum(v * v for v in s), len(s)) for s in samples
    ]  # value, sum, sum of squares and size of each window
    columns = list(zip(*stats, strict=True)) or [()] * 4
    inverse, residual = run_normalize(*columns, least)
    expected = [exact_statistics(*row, least) for row in stats]
    assert_close(inverse, [e for e, _ in expected])
    assert_close(residual, [r for _, r in expected])


def test_normalize_known():
    # of 0, 0, 2, 2 the mean is 1 and E = 4; of 3, 3, 9 they are 5 and 24
    inverse, residual = run_normalize(
        [0, 2, 9, 5, 7], [4, 4, 15, 15, 21], [8, 8, 99, 99, 147], [4, 4, 3, 3, 3], 0
    )
    assert inverse[:2].tolist() == [0.5, 0.5] and residual[:2].tolist() == [-0.5, 0.5]
    assert_close(inverse[2:], [24**-0.5, 24**-0.5, 0])
    assert_close(residual[2:], [4 * 24**-0.5, 0, 0])


def test_the_guard_of_flat_windows():
    """A window is flat if its standard deviation is below the guard, not at it."""
    samples = [[0, 0, 2, 2], [0] * 8 + [4] * 8, [5, 5, 5], [9]]
    deviations = [1.0, 2.0, 0.0, 0.0]
    stats = [(s[-1], sum(s), sum(v * v for v in s), len(s)) for s in samples]
    columns = list(zip(*stats, strict=True))
    for least in (
        0.0,
        0.5,
        1.0,
        math.nextafter(1, 2),
        2.0,
        math.nextafter(2, 3),
        1e300,
    ):
        inverse, residual = run_normalize(*columns, least)
        used = [d > 0 and d >= least for d in deviations]
        assert (inverse > 0).tolist() == used == (residual != 0).tolist()


def test_sums_that_no_window_has_are_flat():
    """The variance is negative or zero: no root is taken, nothing divided."""
    inverse, residual = run_normalize([1, 1, 0], [5, 3, 0], [5, 3, 0], [3, 3, 1], 0.0)
    assert inverse.tolist() == residual.tolist() == [0, 0, 0]


def test_normalize_with_the_largest_numbers():
    """As large as images may be (`image_bits`), and sums of 62 bits."""
    stats = []
    for count, levels in ((9, 2**21), (343, 2**18), (41**3, 2**14), (2**17, 2**14)):
        for ones in (1, count // 3, count // 2, count - 1):
            for low in (0, levels - 1):  # the others; E is a small difference then
                total = ones * levels + (count - ones) * low
                square = ones * levels**2 + (count - ones) * low**2
                stats += [(value, total, square, count) for value in (low, levels)]
    columns = list(zip(*stats, strict=True))
    inverse, residual = run_normalize(*columns, 0.0)
    expected = [exact_statistics(*row, 0.0) for row in stats]
    assert_close(inverse, [e for e, _ in expected])
    assert_close(residual, [r for _, r in expected])
    assert (inverse > 0).all() and (np.abs(residual) <= 1).all()


def test_normalize_with_any_number_of_threads():
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 7, 1001):
        values = rng.integers(0, 2**14, n)
        counts = rng.integers(1, 730, n)
        sums = counts * rng.integers(0, 2**14, n)
        squares = sums * sums // counts + counts * rng.integers(0, 99, n)
        args = (values, sums, squares, counts, 4.0)
        results = [run_normalize(*args, threads) for threads in THREADS]
        assert n < 7 or 0 < np.count_nonzero(results[0][0]) < n
        for other in results[1:]:
            assert np.array_equal(results[0], other)


def test_mismatched_arrays_are_refused():
    ints, reals = [np.ones(3, np.int64)] * 4, [np.full(3, 7.0), np.full(3, 7.0)]
    for k in range(6):
        for n in (0, 2, 4):
            args = [*ints, 0.0, *reals]
            at = k if k < 4 else k + 1
            args[at] = np.resize(args[at], n)
            with pytest.raises(ValueError, match="match"):
                windows.normalize(*args)
        for bad in (np.ones(6)[::2], np.ones(3, np.float32), np.ones((1, 3))):
            args[at] = bad
            with pytest.raises(ValueError, match="contiguous|dtype|dimensions"):
                windows.normalize(*args)
    assert all((r == 7).all() for r in reals)
    reals[0].setflags(write=False)
    with pytest.raises(ValueError, match="read-only"):
        windows.normalize(*ints, 0.0, *reals)


def plain_statistics(image, radius, least, centers):
    image = image.astype(object)
    found = []
    for at in places(image.shape, centers):
        w = window(image, at, radius)
        found.append(exact_statistics(image[at], w.sum(), (w * w).sum(), w.size, least))
    return np.array(found, float).reshape(-1, 2).T


@pytest.mark.parametrize("radius", [0, 1, 2, 4, 30])
@pytest.mark.parametrize("shape", [(9, 8), (7, 5, 6), (1, 6), (4, 1, 7), (1, 1)])
def test_window_statistics(shape, radius):
    rng = np.random.default_rng(radius)
    image = rng.integers(-(2**13), 2**13, shape)
    image[: shape[0] // 2] //= 1000  # half of it is nearly flat
    for centers in (None, tuple(slice(1, None, 2) for _ in shape)):
        for least in (0.0, 3.01, 700.3):
            found = window_statistics(image, radius, least, centers)
            expected = plain_statistics(
                image, radius, least, centers or everything(shape)
            )
            for f, e in zip(found, expected, strict=True):
                assert_close(f, e)
            assert radius > 0 or not np.any(found)


@pytest.mark.parametrize("shape", [(6, 7), (4, 5, 6)])
@pytest.mark.parametrize("value", [0, 1, -(2**20), 2**20])
@pytest.mark.parametrize("least", [0.0, 1.0])
def test_constant_images_are_flat(shape, value, least):
    for radius in (0, 1, 9):
        found = window_statistics(np.full(shape, value), radius, least)
        assert not np.any(found) and np.shape(found) == (2, math.prod(shape))


def test_one_bright_voxel():
    """Of N voxels: E = (N - 1) / N, and the residual is as large as it can be."""
    image = np.zeros((9, 9, 9), np.int64)
    image[4, 4, 4] = 1
    inverse, residual = window_statistics(image, 1, 0.0)
    inside = np.zeros(image.shape, bool)
    inside[3:6, 3:6, 3:6] = True
    assert np.array_equal(inverse.reshape(image.shape) > 0, inside)
    assert_close(inverse[inverse > 0], [math.sqrt(27 / 26)] * 27)
    assert_close(residual.max(), math.sqrt(26 / 27))
    assert_close(np.sort(residual)[:26], [-math.sqrt(1 / 27 / 26)] * 26)
    # its standard deviation is sqrt(26) / 27
    for least, count in ((26**0.5 / 27 - 1e-9, 27), (26**0.5 / 27 + 1e-9, 0)):
        assert np.count_nonzero(window_statistics(image, 1, least)[0]) == count


def test_statistics_of_the_largest_windows():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 2, (41, 41, 41)) << 14
    centers = (slice(20, 21),) * 3
    found = window_statistics(image, 20, LEAST_DEVIATION * 2**14, centers)
    expected = plain_statistics(image, 20, LEAST_DEVIATION * 2**14, centers)
    assert found[0][0] > 0
    assert_close(np.array(found), expected)


def test_no_centres():
    for shape in ((5, 6), (5, 6, 7)):
        centers = (slice(2, 2), *everything(shape[1:]))
        found = window_statistics(np.ones(shape, np.int64), 1, 0.0, centers)
        assert [f.shape for f in found] == [(0,), (0,)]


# -- real images ----------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    """A slice and a volume of heads, each with another of other contrast."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn import datasets

        template = datasets.load_mni152_template(resolution=8).get_fdata()
    coronal = np.load(get_fnames(name="t1_coronal_slice"))
    return {
        len(image.shape): (image, np.sqrt(image)[::-1].copy())
        for image in (coronal, template)
    }


def digitise(image, radius):
    """Integers of as many bits as the metric uses, and its guard."""
    bits = LocalCrossCorrelation(None, image.shape, radius).image_bits
    low, high = image.min(), image.max()
    integers = np.rint((image - low) / (high - low) * 2.0**bits).astype(np.int64)
    return integers, LEAST_DEVIATION * 2**bits


@pytest.mark.parametrize("radius", [1, 2, 4, 12])
@pytest.mark.parametrize("dim", [2, 3])
def test_windows_are_dipys(pictures, dim, radius):
    """At the borders, too. (DIPY takes no images smaller than a window.)

    Of N voxels with integers up to L, DIPY's sums up to N L^2 < 2^53 are exact; its E
    has a few errors of 2^-53 N L^2, together below 2^-50 N L^2, and is N L^2 2^-20 or
    more where the window is not flat. So E is known to 2^-30, its root to 2^-31. The
    mean is known to 2^-52 L, and sqrt(E) >= 2^-10 L: another 2^-42 for the residual.
    """
    both = [digitise(image, radius) for image in pictures[dim]]
    factors = {2: dipys.precompute_cc_factors_2d, 3: dipys.precompute_cc_factors_3d}
    factors = np.asarray(factors[dim](*(i.astype(float) for i, _ in both), radius))
    for k, (image, least) in enumerate(both):
        assert (2 * radius + 1) ** dim * int(image.max()) ** 2 < 2**53
        inverse, residual = (
            f.reshape(image.shape) for f in window_statistics(image, radius, least)
        )
        offset, square = factors[..., k], factors[..., 3 + k]
        sizes = window_sums(np.ones_like(image), radius, everything(image.shape))
        used = inverse > 0
        assert used.any() and used.all() == ((dim, radius) == (3, 12))
        # Both know which windows are flat.
        assert np.array_equal(used, square >= sizes * least**2 * (1 + 2.0**-30))
        root = np.sqrt(square[used])
        assert np.abs(inverse[used] * root - 1).max() <= 2.0**-30
        assert np.abs(residual[used] - offset[used] / root).max() <= 2.0**-30
        assert not residual[~used].any()


@pytest.mark.parametrize("dim", [2, 3])
def test_statistics_with_any_number_of_threads(pictures, dim, monkeypatch):
    image, least = digitise(pictures[dim][0], 3)
    centers = tuple(slice(3, n - 3, 2) for n in image.shape)
    results = []
    for threads in THREADS:
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        results.append(
            [
                *window_statistics(image, 3, least),
                *window_statistics(image, 3, least, centers),
            ]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.array_equal(a, b)
    # and the windows that are left out do not matter
    whole, part = np.array(results[0][:2]), np.array(results[0][2:])
    whole = whole.reshape(2, *image.shape)[:, *centers]
    assert np.array_equal(whole.reshape(2, -1), part)


# -- what an owner contributes --------------------------------------------------


def fading(seed, shape, dtype=np.float64):
    """An image whose contrast falls from voxel to voxel, until it is flat."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.standard_normal(shape), 1.0)
    image = (image.T * np.logspace(0, -5, shape[0])).T
    return (7 + 30 * image).astype(dtype)


HALVES = pytest.mark.parametrize(
    "shape, radius, stride, offset",
    [
        ((17, 13), 1, 1, (0, 0)),
        ((17, 13), 2, 2, (1, 0)),
        ((5, 16), 2, 2, (1, 1)),  # a single row of centres
        ((11, 8, 9), 1, 1, (0, 0, 0)),
        ((11, 8, 9), 2, 2, (0, 1, 1)),
        ((5, 5, 5), 2, 1, (0, 0, 0)),
    ],
)


@HALVES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_image_half(shape, radius, stride, offset, dtype):
    image = fading(sum(shape), shape, dtype)
    kept = image.copy()
    correlation = LocalCrossCorrelation(None, shape, radius, stride=stride)
    half = image_half(image, correlation, offset)
    assert np.array_equal(image, kept), "the image was changed"

    levels = 2**correlation.image_bits
    low, high = float(image.min()), float(image.max())
    exact = (image.astype(float) - low) / (high - low) * levels
    assert half.image.dtype == np.int64 and half.image.shape == shape
    assert (half.image.min(), half.image.max()) == (0, levels)
    assert np.abs(half.image - exact).max() <= 0.5 + levels * 1e-15

    centers = correlation.centers(offset)
    least = LEAST_DEVIATION * levels
    inverse, residual = plain_statistics(half.image, radius, least, centers)
    assert_close(half.inverse, inverse * levels)
    assert_close(half.residual, residual)
    assert np.abs(half.residual).max() <= 1
    assert inverse.size < 10 or 0 < np.count_nonzero(inverse) < inverse.size

    # central differences, which lie in the window, of an image within [0, 1]
    assert half.gradient.shape == (len(shape), half.inverse.size)
    precision = np.finfo(dtype).eps * np.abs(image).max() / (high - low)
    for at, e, slopes in zip(
        places(shape, centers), half.inverse, half.gradient.T, strict=True
    ):
        for axis, slope in enumerate(slopes):
            step = np.eye(len(shape), dtype=int)[axis]
            ends = [float(image[tuple(np.add(at, s * step))]) for s in (1, -1)]
            expected = e * (ends[0] - ends[1]) / 2 / (high - low)
            assert abs(slope - expected) <= 4 * precision * e
            # |e grad s| <= sqrt(1/2) but for the rounding of the image
            assert abs(slope) <= 0.5**0.5 * (1 + e / levels) + 4 * precision * e


@pytest.mark.parametrize("shape", [(17, 13), (11, 8, 9)])
def test_rounding_of_the_image_is_small(shape):
    """A norm changes by less than that of the roundings: half a level each."""
    image = fading(3, shape)
    correlation = LocalCrossCorrelation(None, shape, 2)
    half = image_half(image, correlation, (0,) * len(shape))
    unit = (image - image.min()) / (image.max() - image.min())
    step = 2.0**-correlation.image_bits
    used = 0
    for at, e in zip(
        places(shape, correlation.centers((0,) * len(shape))), half.inverse, strict=True
    ):
        w = window(unit, at, 2)
        norm = np.linalg.norm(w - w.mean())
        most = 0.5 * step * w.size**0.5
        if e > 0:
            assert abs(1 / e - norm) <= most * (1 + 1e-9)
            used += 1
        else:
            assert norm <= LEAST_DEVIATION * w.size**0.5 + most
    assert used > 10


def test_scaled_images_give_the_same():
    image = fading(4, (12, 11))
    correlation = LocalCrossCorrelation(None, image.shape, 2)
    half = image_half(image, correlation, (0, 0))
    for factor in (2.0**-40, 0.5, 1024.0):
        other = image_half(image * factor, correlation, (0, 0))
        for name in ("image", "inverse", "residual", "gradient"):
            assert np.array_equal(getattr(other, name), getattr(half, name)), name


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30])
@pytest.mark.parametrize("shape", [(7, 6), (6, 5, 7)])
def test_a_constant_image_contributes_nothing(shape, value):
    correlation = LocalCrossCorrelation(None, shape, 2)
    half = image_half(np.full(shape, value), correlation, (0,) * len(shape))
    count = math.prod(n - 4 for n in shape)
    assert half.inverse.shape == half.residual.shape == (count,)
    assert half.gradient.shape == (len(shape), count)
    for array in (half.image, half.inverse, half.residual, half.gradient):
        assert not array.any()


def test_nearly_constant_images_are_not_flat_everywhere():
    """The guard is a part of the image's range, however small that is."""
    image = np.full((15, 15), 1e6)
    image[7, 7] += 1e-3
    half = image_half(image, LocalCrossCorrelation(None, (15, 15), 2), (0, 0))
    assert np.count_nonzero(half.inverse) == 25


# -- sizes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, radius", [((8, 20), 4), ((20, 8), 4), ((9, 9, 4), 2), ((1, 1, 1), 1)]
)
def test_small_images_are_refused_in_dipys_words(shape, radius):
    for name in ("static", "moving"):
        metric = CCMetric(len(shape), radius=radius)
        metric.static_image = metric.moving_image = np.zeros((50,) * len(shape))
        setattr(metric, f"{name}_image", np.zeros(shape))
        with pytest.raises(ValueError, match="too small") as theirs:
            metric.initialize_iteration()
        for given_shape in (shape, list(shape)):
            with pytest.raises(ValueError, match="too small") as ours:
                check_size(given_shape, radius, name)
            assert str(ours.value) == str(theirs.value)


def test_images_of_one_window_are_accepted():
    for radius in (1, 4, 20):
        n = 2 * radius + 1
        check_size((n, n), radius, "static")
        check_size((n, n + 1, n), radius, "moving")
        for axis in range(3):
            shape = [n, n, n]
            shape[axis] -= 1
            with pytest.raises(ValueError, match=f"{n}.*{radius}"):
                check_size(shape, radius, "static")


# -- splines --------------------------------------------------------------------


@pytest.mark.parametrize("spacing", [1, 2, 3, 4, 7])
def test_interpolation(spacing):
    for n in range(1, 40):
        points = sorted({*range(0, n, spacing), n - 1})
        matrix = interpolation_matrix(n, spacing)
        assert matrix.shape == (n, len(points))
        # at the points it is what is given
        assert np.abs(matrix[points] - np.eye(len(points))).max() <= 1e-12
        # and polynomials as far as the points determine them, up to cubic
        x = np.arange(n) / n
        for degree in range(min(4, len(points))):
            assert np.abs(matrix @ x[points] ** degree - x**degree).max() <= 1e-11
        if len(points) > 1:
            values = np.random.default_rng(n).standard_normal(len(points))
            spline = CubicSpline(points, values, bc_type="not-a-knot")
            assert np.abs(matrix @ values - spline(np.arange(n))).max() <= 1e-11


# -- holes ----------------------------------------------------------------------


@quick(60)
@given(SEEDS, st.lists(st.integers(1, 6), min_size=1, max_size=3), st.floats(0, 1))
def test_mend(seed, shape, share):
    rng = np.random.default_rng(seed)
    values = rng.permutation(np.arange(1.0, 1 + math.prod(shape))).reshape(shape)
    valid = rng.random(shape) < share
    kept = values.copy(), valid.copy()
    mended = mend(values, valid)
    assert np.array_equal(values, kept[0]) and np.array_equal(valid, kept[1])
    assert mended.shape == values.shape
    good = np.argwhere(valid)
    for at in np.ndindex(*shape):
        if not len(good):
            assert mended[at] == 0
            continue
        far = ((good - at) ** 2).sum(axis=1)
        nearest = [values[tuple(g)] for g in good[far == far.min()]]
        assert mended[at] in nearest
        assert not valid[at] or mended[at] == values[at]


def test_mend_keeps_what_is_not_a_number_out():
    values = np.array([[1.0, np.nan, 3.0, np.inf]])
    assert mend(values, np.isfinite(values)).tolist()[0][:3] in ([1, 1, 3], [1, 3, 3])
    assert mend(values, np.isfinite(values))[0, 3] == 3
    assert mend(values, np.zeros((1, 4), bool)).tolist() == [[0, 0, 0, 0]]


# -- Gaussian filters -----------------------------------------------------------

SIGMAS = [0.0, 0.1, 0.2, 0.5, 1.0, 1.7, 2.0, 3.6, 10.0, 60.0]


def choices(n):
    """Where the input may be given and the output wanted, on an axis of n."""
    centers = {
        range(n),
        range(n // 3, n - n // 3),
        range(n // 2, n, 2),
        range(n - 1, n),
    }
    positions = [np.arange(n), np.unique([*range(0, n, 2), n - 1]), np.array([n // 2])]
    return [(c, p) for c in centers if len(c) for p in positions]


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 45])
def test_gaussian_weights_are_scipys(n, sigma):
    """Of a one at each centre, and zero elsewhere, to half a unit."""
    answers = ndimage.gaussian_filter(np.eye(n), (sigma, 0))
    for centers, positions in choices(n):
        first, weights = gaussian_filter_matrix(n, centers, positions, sigma)
        assert (first.dtype, weights.dtype) == (np.int64, np.int32)
        assert weights.flags.c_contiguous
        assert len(first) == len(weights) == len(positions)
        dense = np.zeros((len(positions), len(centers)))
        for row, f, w in zip(dense, first, weights, strict=True):
            assert 0 <= f <= len(centers) - len(w)
            row[f : f + len(w)] = w
        expected = answers[np.ix_(positions, list(centers))] * 2.0**WEIGHT_BITS
        assert np.abs(dense - expected).max() <= 0.5 + 1e-7
        # no longer than needed
        support = [np.ptp(np.flatnonzero(r)) + 1 if r.any() else 1 for r in dense]
        assert weights.shape[1] == max(support)


def test_positions_beyond_the_filters_reach():
    """Far from all centres nothing arrives, and nothing is read outside."""
    first, weights = gaussian_filter_matrix(60, range(5, 9), np.array([2, 30, 59]), 1.0)
    assert weights[0].any() and not weights[1:].any()
    assert ((0 <= first) & (first + weights.shape[1] <= 4)).all()


@pytest.mark.parametrize("n", [3, 4, 5, 9, 40])
def test_weights_fit_the_kernel(n):
    """For what the protocol asks: sigma from 1, centres whose windows lie inside."""
    for sigma in (1.0, 1.3, 2.0, 8.0):
        for radius in range(1, (n - 1) // 2 + 1):
            centers = range(radius, n - radius)
            _, weights = gaussian_filter_matrix(n, centers, np.arange(n), sigma)
            assert 0 <= weights.min() and weights.any()
            assert weights.sum(axis=1, dtype=np.int64).max() < ring128.MOST_WEIGHT


@pytest.mark.parametrize("sigma", [1.0, 2.0, 5.3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "shape, radius", [((19, 23), 3), ((3, 30), 1), ((9, 8, 13), 2)]
)
def test_gaussian_filter_of_elements(shape, radius, stride, sigma):
    """Along one axis after the other, of numbers modulo 2**128.

    A weight is off by half a unit, 2**-17; with c centres a sum by c 2**-17 of the
    largest number, along every axis in turn. Numbers of 40 bits are off by 2**-41.
    """
    dim = len(shape)
    correlation = LocalCrossCorrelation(None, shape, radius, stride=stride, spacing=2)
    centers = correlation.centers((1,) + (0,) * (dim - 1))
    positions = correlation.positions()
    rng = np.random.default_rng(radius)
    image = np.zeros(shape)
    image[centers] = rng.uniform(-1, 1, image[centers].shape)
    expected = ndimage.gaussian_filter(image, sigma)[np.ix_(*positions)]

    size = list(image[centers].shape)
    x = R128.encode(image[centers], 40, 1.0)
    error = 1 + 2.0**-40
    for axis, n in enumerate(shape):
        axis_centers = range(*centers[axis].indices(n))
        first, weights = gaussian_filter_matrix(n, axis_centers, positions[axis], sigma)
        x = np.ascontiguousarray(x).reshape(math.prod(size[:axis]), size[axis], -1)
        out = np.empty((len(x), len(first), x.shape[2]), np.uint64)
        ring128.filter_axis(x, first, weights, out)
        x, error = out, error * (1 + size[axis] * 2.0**-17)
        size[axis] = len(first)
    found = R128.decode(x.reshape(*size, 2), 40 + WEIGHT_BITS * dim)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= error - 1
