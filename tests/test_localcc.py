"""Local correlations on shares: forms, evaluations, what they cost and show."""

from noise import check_uniform
import numpy as np
from parties import run_trio
import pytest
from scipy import ndimage
from shares import decoded

from dipy_ppir.mpc import localcc
from dipy_ppir.mpc.algebra import Masked, Shares
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.localcc import (
    ClearCorrelation,
    Covariance,
    Known,
    Rows,
    SecretCorrelation,
    Slopes,
    Windows,
)

#: Shape of the grid, radius of the windows, and how far apart they are.
GRIDS = {
    "2d": ((29, 34), 4, 5),
    "3d": ((17, 19, 16), 2, 3),
    "slab": ((18, 16, 5), 4, 2),
    "line": ((19, 1, 2), 3, 2),
    "wide": ((19, 15, 14), 4, 5),
}
DIGITS, SCALE = 24, 2.0**7


def images(shape):
    """Two images between 0 and 1 that are alike."""
    rng = np.random.default_rng(2)
    static = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    moving = static + 0.2 * ndimage.gaussian_filter(rng.standard_normal(shape), 1.0)
    return [(x - x.min()) / (x.max() - x.min()) for x in (static, moving)]


def inverse(image, windows):
    variance = np.maximum(windows.covariance(image, image), 0)
    return 1 / np.sqrt(variance + localcc.GUARD**2)


def known(name, parameters=6):
    """Windows, what the owners know, and the matrix of the moving owner."""
    windows, rng = Windows(*GRIDS[name]), np.random.default_rng(3)
    static, moving = images(windows.shape)
    columns = rng.uniform(-9, 9, (parameters, *windows.coarse))
    owners = {
        STATIC: Known(static, inverse(static, windows)),
        MOVING: Known(moving, inverse(moving, windows), columns),
    }
    matrix = rng.uniform(-2, 2, (parameters - 1, windows.dim * (windows.dim + 1)))
    return windows, owners, matrix


def secret(session, name, *, open_them=True):
    """A value and gradient, and a value alone, on shares."""
    windows, owners, matrix = known(name)
    mine = owners.get(session.pid)
    world = Shares(session)
    found = SecretCorrelation(session, world, windows, DIGITS)
    moving = mine if session.pid == MOVING else None
    found.share_static(mine if session.pid == STATIC else None)
    whole = found.evaluate(
        SCALE,
        len(matrix),
        moving,
        matrix if session.pid == MOVING else None,
        part=True,
    )
    alone = found.evaluate(SCALE, 0, moving and moving._replace(columns=None))
    if not open_them:
        return None
    each = (*whole, alone.value)
    return [session.open(x, "test-any", (MOVING,)) for x in each], world.failures


def clear(name):
    """The same in the clear."""
    windows, owners, matrix = known(name)
    twin = ClearCorrelation(windows, DIGITS)
    twin.share_static(owners[STATIC])
    whole = twin.evaluate(SCALE, len(matrix), owners[MOVING], matrix, part=True)
    alone = twin.evaluate(SCALE, 0, owners[MOVING]._replace(columns=None))
    return *whole, alone.value


# -- windows and forms -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 9), (40, 23), (3, 50), (1, 8), (31, 22, 5)])
@pytest.mark.parametrize("radius, spacing", [(4, 5), (4, 2), (1, 2), (2, 3)])
def test_every_window_lies_within_the_grid(shape, radius, spacing):
    windows = Windows(shape, radius, spacing)
    sums = windows.summed(np.ones(shape), localcc.AxisMap.clear)
    assert sums.shape == windows.coarse and windows.count == sums.size > 0
    assert (sums == windows.size).all()
    # And hardly any voxel in none.
    for points, reach, n in zip(
        windows.points, windows.reach, windows.shape, strict=True
    ):
        assert points[0] - reach < spacing and n - points[-1] - reach <= spacing


def test_sums_weighed_by_the_position():
    windows = Windows((12, 9, 7), 2, 3)
    x = np.random.default_rng(5).standard_normal(windows.shape)
    *moments, sums = windows.weighed(x, localcc.AxisMap.clear)
    positions = np.indices(windows.shape) - np.array([6, 4, 3])[:, None, None, None]
    for moment, position in zip(moments, positions, strict=True):
        expected = windows.summed(x * position, localcc.AxisMap.clear)
        assert np.allclose(moment, expected, atol=1e-12)
    assert np.allclose(sums, windows.summed(x, localcc.AxisMap.clear), atol=1e-12)


def test_covariances_are_those_of_each_window():
    windows = Windows((14, 11), 2, 3)
    x, y = images(windows.shape)
    found = windows.covariance(x, y)
    slopes = Slopes(windows).clear((x,), (y,))
    slope = np.gradient(x)
    position = np.indices(x.shape) - np.array(x.shape)[:, None, None] // 2
    for i, p in enumerate(windows.points[0]):
        for j, q in enumerate(windows.points[1]):
            at = slice(p - 2, p + 3), slice(q - 2, q + 3)
            both = np.cov(x[at].ravel(), y[at].ravel(), bias=True)
            assert found[i, j] == pytest.approx(both[0, 1], abs=1e-12)
            if min(p, q) == 2 or p == 11 or q == 8:
                continue  # at the border slopes are taken to be zero
            for k in range(6):
                d, e = divmod(k, 3)
                weight = position[e] if e < 2 else 1
                one = (slope[d] * weight)[at].ravel()
                both = np.cov(one, y[at].ravel(), bias=True)
                assert slopes[k, i, j] == pytest.approx(both[0, 1], abs=1e-12)


@pytest.mark.parametrize("name", GRIDS)
def test_forms_are_the_same_on_elements_and_on_real_numbers(name):
    windows, rng = Windows(*GRIDS[name]), np.random.default_rng(1)
    fine, coarse = windows.shape, windows.coarse
    for form, left, right in (
        (Covariance(windows), fine, fine),
        (Slopes(windows), fine, fine),
        (Rows(), coarse, (5, *coarse)),
    ):
        x, y = (rng.integers(-(1 << 15), 1 << 15, shape) for shape in (left, right))
        numbers = [(Masked(None, None, 1.0, a.shape),) for a in (x, y)]
        unit, shape = form.result(*numbers)
        expected = form.clear((x.astype(float),), (y.astype(float),))
        assert expected.shape == tuple(shape)
        packed = [(R128.encode_int(a),) for a in (x, y)]
        for factors in ((1,), (-3, -2)):
            out = R128.zeros(shape)
            for factor in factors:
                form.ring(*packed, out, factor)
            found = decoded(out) * unit / sum(factors)
            error = np.abs(found - expected).max()
            assert error < 1e-11 * np.abs(expected).max(), type(form).__name__


# -- evaluations -------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_on_shares_as_in_the_clear(three, name):
    found, failures = three(secret, name)[MOVING]
    expected = clear(name)
    # Roundings of the factors, 2**-18 of up to 64**2, are those of largest effect.
    for k, (one, twin) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == twin.shape
        assert np.abs(one - twin).max() < 2e-5 * max(np.abs(twin).max(), 1), k
    assert found[0] == pytest.approx(found[3], rel=2e-5)
    assert np.abs(expected[1]).max() > 1
    assert 0 < failures < 2.0**-45


def test_failures_are_as_rare_as_stated(three):
    """All that counts grows with the number of windows of that size."""
    name = "wide"
    windows, failures = Windows(*GRIDS[name]), three(secret, name)[MOVING][1]
    large = Windows((192, 224, 192), 4, 5)
    assert windows.size == large.size
    assert failures / windows.count * large.count * 44 < 2.0**-36


def test_without_contrast_nothing_is_found(three):
    """Flat windows count for nothing, and those whose inverse deviation is zero."""
    windows, owners, matrix = known("3d")
    static = owners[STATIC]
    flat = Known(np.full(windows.shape, 0.5), np.full(windows.coarse, 64.0))
    masked = static._replace(inverse=np.zeros(windows.coarse))
    for one in (flat, masked):

        def party(session, one=one):
            found = SecretCorrelation(session, Shares(session), windows, DIGITS)
            found.share_static(one if session.pid == STATIC else None)
            mine = session.pid == MOVING
            whole = found.evaluate(
                SCALE,
                len(matrix),
                owners[MOVING] if mine else None,
                matrix if mine else None,
                part=True,
            )
            return [session.open(x, "test-any", (MOVING,)) for x in whole]

        for x in three(party)[MOVING]:
            assert np.abs(x).max() < 1e-3


# -- what it costs -----------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_bytes_and_rounds_are_as_stated(trio, tap, depth, payload_bytes, name):
    windows, owners, matrix = known(name)
    frames, so_far = tap(trio), depth(trio)
    voxels, count = int(np.prod(windows.shape)), windows.count
    dim, p = windows.dim, len(matrix)
    all_found = {s.pid: SecretCorrelation(s, Shares(s), windows, DIGITS) for s in trio}

    def share_static(s):
        mine = owners[STATIC] if s.pid == STATIC else None
        all_found[s.pid].share_static(mine)

    def evaluate(s, part=False):
        mine = s.pid == MOVING
        known = owners[MOVING] if mine else None
        if mine and not part:
            known = known._replace(columns=known.columns[:-1])
        all_found[s.pid].evaluate(SCALE, p, known, matrix if mine else None, part=part)

    def value(s):
        mine = owners[MOVING] if s.pid == MOVING else None
        all_found[s.pid].evaluate(SCALE, 0, mine)

    def first(s):
        evaluate(s, part=True)

    columns = dim * (dim + 1)
    # Of the sums: a correction each, two in the field; of results three; the matrix.
    few = {
        evaluate: 3 * (1 + columns + p) + 3 * (1 + p) + columns * p,
        first: 3 * (2 + columns + p) + 3 * (2 + p) + columns * p,
        value: 3 + 3,
    }
    windowed = {
        evaluate: 1 + p + 3 * (columns + 2) + 3 + 6,
        first: 1 + p + 1,
        value: 10,
    }
    windowed[first] += 3 * (columns + 2) + 3 + 6
    if dim == 3:
        assert windowed[evaluate] == 52 + p
    for step, rounds in ((share_static, 1), (evaluate, 7), (first, 7), (value, 6)):
        before, bytes_before = so_far(), payload_bytes(frames)
        run_trio(trio, step)
        elements = voxels + count * windowed.get(step, 1) + few.get(step, 0)
        assert payload_bytes(frames) - bytes_before == 16 * elements, step.__name__
        assert so_far() - before == rounds, step.__name__


def test_what_is_received_is_uniform(trio, tap):
    frames = tap(trio)
    run_trio(trio, lambda s: secret(s, "3d", open_them=False))
    for receiver in (MOVING, STATIC, HELPER):
        # Without the field's elements, whose highest bit is zero.
        octets = np.frombuffer(
            b"".join(f[4] for f in frames if f[1] == receiver and len(f[4]) > 1024),
            np.uint8,
        )
        assert (len(octets) == 0) == (receiver == HELPER)
        if len(octets):
            check_uniform([octets >> 4, octets & 15], receiver)
