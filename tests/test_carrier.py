"""What displacements carry along: maps composed, and images moved by whole halves."""

import numpy as np
from parties import run_trio
import pytest
from scipy import ndimage
from shares import decoded, value

from dipy_ppir.mpc.algebra import Clear, Shares
from dipy_ppir.mpc.carried import CarriedCorrelation, Operators, Start
from dipy_ppir.mpc.carrier import DISPLACEMENT, FIRST, SECOND, STEP, WIDE, Carrier
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import MOVING, STATIC

SHAPES = {"2d": (40, 37), "3d": (25, 22, 24)}


def grid(name, spacing=2):
    shape = SHAPES[name]
    return Operators(shape, 3, 2.0, (spacing,) * len(shape))


def smooth(shape, size, seed):
    """A displacement as smooth as those of SyN, zero at the border, voxels."""
    rng = np.random.default_rng(seed)
    dim = len(shape)
    field = ndimage.gaussian_filter(
        rng.standard_normal((dim, *shape)), (0,) + (6,) * dim
    )
    for axis, n in enumerate(shape):
        edge = np.minimum(np.arange(n), np.arange(n)[::-1]) / 6
        field *= np.clip(edge, 0, 1).reshape((-1,) + (1,) * (dim - 1 - axis))
    return field * size / np.abs(field).max()


def at(field, points):
    """Values of a field at voxel coordinates, by cubic interpolation."""
    return np.stack(
        [ndimage.map_coordinates(x, points, order=3, mode="nearest") for x in field]
    )


def inverse(field):
    """Displacement of the inverse map, by fixed-point iteration."""
    there = np.indices(field.shape[1:])
    found = -field
    for _ in range(60):
        found = -at(field, there + found)
    return found


def owned(world, o, field, owner=STATIC):
    """A field at the coarse points, masked."""
    pid = world.session.pid if isinstance(world, Shares) else owner
    coarse = field[(slice(None), *np.ix_(*o.points))]
    return world.masked(
        *(
            world.own(x if pid == owner else None, owner, o.coarse, DISPLACEMENT)
            for x in coarse
        )
    )


# -- composed maps -----------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_composed_maps(name):
    """Against cubic interpolation at the inverse map's displacements."""
    o, world = grid(name), Clear()
    u, v = (smooth(o.shape, 2.0, seed) for seed in (1, 2))
    back = inverse(u)
    expected = back + at(v, np.indices(o.shape) + back)
    expected = expected[(slice(None), *np.ix_(*o.points))]
    found = Carrier(world, o).composed(owned(world, o, u), owned(world, o, v), 4)
    found = np.stack([world._value(x) for x in found])
    error = np.sqrt(((found - expected) ** 2).mean())
    assert error < 0.04 < 0.2 < np.sqrt((expected**2).mean())
    # A map composed with itself is the identity.
    none = Carrier(world, o).composed(owned(world, o, u), owned(world, o, u), 4)
    assert max(np.abs(world._value(x)).max() for x in none) < 1e-3


def test_a_composed_map_on_shares_is_that_in_the_clear(trio, tap, payload_bytes):
    o, times = grid("3d", 3), 2
    u, v = (smooth(o.shape, 1.5, seed) for seed in (3, 4))

    def composed(world):
        both = owned(world, o, u), owned(world, o, v, MOVING)
        return Carrier(world, o).composed(*both, times)

    clear = composed(Clear())
    shares = {s.pid: Shares(s) for s in trio}
    both = run_trio(
        trio,
        lambda s: (
            owned(shares[s.pid], o, u),
            owned(shares[s.pid], o, v, MOVING),
        ),
    )
    frames = tap(trio)
    found = run_trio(
        trio, lambda s: Carrier(shares[s.pid], o).composed(*both[s.pid], times)
    )
    assert payload_bytes(frames) == 16 * 45 * int(np.prod(o.coarse)) * times
    for axis in range(3):
        parts = [shares[pid]._part(found[pid][axis]) for pid in (MOVING, STATIC)]
        ours = decoded(R128.add(*parts)) * found[MOVING][axis].unit
        assert np.abs(ours - Clear()._value(clear[axis])).max() < 20 * STEP.unit


# -- images moved by whole halves ----------------------------------------------------


def starts(o, image, pid=None):
    coarse = np.zeros((o.dim, *o.coarse))
    return {
        owner: Start(image, coarse) if pid in (None, owner) else None
        for owner in (STATIC, MOVING)
    }


def textured(shape, seed=5):
    texture = ndimage.gaussian_filter(
        np.random.default_rng(seed).standard_normal(shape), 1.2
    )
    return (texture - texture.min()) / np.ptp(texture)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("spacing", [2, 3])
def test_an_image_is_moved_by_many_voxels(name, spacing):
    """As cubic interpolation does."""
    o, world = grid(name, spacing), Clear()
    image, moved = textured(o.shape), {}
    fields = {STATIC: smooth(o.shape, 3.0, 1), MOVING: smooth(o.shape, 2.0, 2)}
    carried = CarriedCorrelation(world, o, 0.25)
    halves = {k: owned(world, o, u, k) for k, u in fields.items()}
    moved = carried.begin(starts(o, image), halves, (2, 8))
    inner = (slice(4, -4),) * o.dim
    for owner in fields:
        whole = np.stack([o.cubic.clear(x.factor) for x in moved[owner].displacement])
        expected = at(image[None], np.indices(o.shape) + whole)[0]
        error = (moved[owner].image.factor - expected)[inner]
        assert np.sqrt((error**2).mean()) < 0.12 * expected[inner].std()
        assert np.abs(whole).max() > 1.5


@pytest.mark.parametrize("name", SHAPES)
def test_moving_images_on_shares(trio, tap, depth, payload_bytes, name):
    o, times, parts = grid(name, 3), 2, 4
    image = textured(o.shape)
    field = smooth(o.shape, 1.0, 7)

    def shared(world):
        halves = {STATIC: owned(world, o, field), MOVING: owned(world, o, -field)}
        return CarriedCorrelation(world, o, 0.25), halves

    def begun(carried, halves, pid=None):
        return carried.begin(starts(o, image, pid), halves, (times, parts))

    clear = begun(*shared(Clear()))
    made = run_trio(trio, lambda s: shared(Shares(s)))
    frames, so_far = tap(trio), depth(trio)
    found = run_trio(trio, lambda s: begun(*made[s.pid], s.pid))
    for owner in (STATIC, MOVING):
        for name in ("image", "inverse"):
            ours = value([getattr(f[owner], name) for f in found])
            expected = getattr(clear[owner], name).factor
            error = np.sqrt(((ours - expected) ** 2).mean())
            assert error < 2e-3 * np.abs(expected).max(), name
    dim, keys = o.dim, len(o.keys)
    fine, coarse = int(np.prod(o.shape)), int(np.prod(o.coarse))
    receding = 2 * 3 * (dim + (keys - dim) + dim)
    moves = 2 * (2 * dim + 3 * (keys - dim))
    each = coarse * (receding + moves) + parts * 6 * fine
    assert payload_bytes(frames) == 16 * (4 * fine + times * each + 100 * coarse)
    assert so_far() == 1 + times * (4 + 2 + parts) + 11


# -- how long a step may be ------------------------------------------------------------


def amplification(displacement, first=FIRST / 12):
    """By what the polynomial makes a wave in an image larger, at most."""
    waves, dim = np.linspace(-np.pi, np.pi, 65), len(displacement)

    def symbol(taps):
        reach = len(taps) // 2
        return np.exp(1j * np.outer(waves, np.arange(-reach, reach + 1))) @ taps

    before, total = 0, 1
    for a, d in enumerate(displacement):
        shape = (-1,) + (1,) * (dim - 1 - a)
        slope, second = (symbol(taps).reshape(shape) for taps in (first, SECOND / 12))
        total = total + d * slope + d**2 / 2 * second + d * slope * before
        before = before + d * slope
    return float(np.abs(total).max())


@pytest.mark.parametrize("dim, most", [(1, 1.002), (2, 1.007), (3, 1.02)])
def test_waves_hardly_grow_by_steps_of_a_quarter(dim, most):
    """By two in a hundred at most; half a voxel along a diagonal makes the finest ones
    a fifth larger each time."""
    diagonal = np.full(dim, dim**-0.5)
    for first in (FIRST / 12, WIDE / 192):
        assert amplification(0.25 * diagonal, first) < most
    if dim == 3:
        assert amplification(0.5 * diagonal) > 1.15
