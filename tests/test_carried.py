"""Images carried along on shares: forms, iterations, what they cost."""

import numpy as np
from parties import run_trio
import pytest
from scipy import ndimage
from shares import Counting, decoded, value

from dipy_ppir.mpc import carried
from dipy_ppir.mpc.algebra import RATE_STEPS, Clear, Masked, Secret, Shares
from dipy_ppir.mpc.carried import (
    DISPLACEMENT,
    CarriedCorrelation,
    Operators,
    Start,
)
from dipy_ppir.mpc.carrier import Carry
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC

#: Shape, radius, spacing of the coarse grid and what a step counts along each axis.
GRIDS = {
    "2d": ((29, 34), 4, (3, 3), None),
    "3d": ((21, 19, 23), 2, (3, 3, 3), None),
    "slab": ((23, 21, 9), 2, (3, 3, 2), (1.0, 1.0, 0.25)),
    "fine": ((17, 19, 18), 3, (2, 2, 2), None),
}


def grid(name):
    shape, radius, spacing, relative = GRIDS[name]
    return Operators(shape, radius, 2.0, spacing, relative)


def pair(shape, seed=0):
    """Two images between 0 and 1, one moved against the other."""
    rng = np.random.default_rng(seed)
    static = ndimage.gaussian_filter(rng.standard_normal(shape), 2.0)
    moving = ndimage.shift(static, 0.7, order=1, mode="nearest")
    moving += 0.02 * ndimage.gaussian_filter(rng.standard_normal(shape), 1.0)
    return {
        owner: (x - x.min()) / (x.max() - x.min())
        for owner, x in ((STATIC, static), (MOVING, moving))
    }


def starts(o, pid=None, moved=0.0):
    """What owners know at the start of a level; of party `pid` only if it is given."""
    rng = np.random.default_rng(3)
    found = {}
    for owner, image in pair(o.shape).items():
        known = moved * rng.uniform(-1, 1, (o.dim, *o.coarse))
        known = ndimage.gaussian_filter(known, (0,) + (1,) * o.dim)
        start = Start(image, known)
        found[owner] = start if pid in (None, owner) else None
    return found


def exact_norm(image, o):
    """Root of a window's mean squared deviation and the guard's square."""
    near, around = (
        carried.Window(o, k).clear([image], [image]) for k in (0, carried.REACH)
    )
    part = carried.AROUND
    return np.sqrt(np.maximum((1 - part) * near + part * around, 0) + o.guard**2)


# -- forms -----------------------------------------------------------------------


def forms(o):
    """Each form with shapes of what is on its left and right."""
    fine, coarse = o.shape, o.coarse
    yield carried.Window(o), [fine], [fine]
    yield carried.Spread(o), [coarse], [fine]
    for axis in range(o.dim):
        yield carried.Smooth(o, axis), [fine], [fine]
    yield Carry(o), [coarse] * len(o.keys), [fine]


@pytest.mark.parametrize("name", GRIDS)
def test_forms_are_the_same_on_elements_and_on_real_numbers(name):
    o, rng = grid(name), np.random.default_rng(1)
    for form, left, right in forms(o):
        sides = [
            [rng.integers(-(1 << 17), 1 << 17, shape) for shape in side]
            for side in (left, right)
        ]
        numbers = [[Masked(None, None, 1.0, x.shape) for x in side] for side in sides]
        unit, shape = form.result(*numbers)
        clear = form.clear(*([x.astype(float) for x in side] for side in sides))
        assert clear.shape == tuple(shape)
        packed = [[R128.encode_int(x) for x in side] for side in sides]
        for factors in ((1,), (-3, -2)):
            out = R128.zeros(shape)
            for factor in factors:
                form.ring(*packed, out, factor)
            found = decoded(out) * unit / sum(factors)
            error = np.abs(found - clear).max()
            assert error < 1e-12 * np.abs(clear).max(), type(form).__name__


@pytest.mark.parametrize("name", GRIDS)
def test_linear_maps_are_the_same_on_elements_and_on_real_numbers(name):
    o, rng = grid(name), np.random.default_rng(2)
    coarse = carried.Window(o, 1).box
    maps = [(m, o.shape) for m in (o.box, coarse, o.residual, *o.smooth)]
    for m in (o.cubic, o.straight, *o.bend, *o.slopes.values()):
        maps.append((m, o.coarse))
    for m, shape in maps:
        x = rng.integers(-(1 << 20), 1 << 20, shape)
        clear = m.clear(x.astype(float))
        found = decoded(m.ring(R128.encode_int(x))) * m.unit
        assert np.abs(found - clear).max() <= 1e-12 * np.abs(clear).max()


def test_interpolation_and_derivatives_of_polynomials():
    o = Operators((25, 22), 2, 2.0, (3, 2))
    fine = np.indices(o.shape).astype(float)
    coarse = fine[(slice(None), *np.ix_(*o.points))]

    def cubic(x, y):
        return (x - 9) * (y - 4) ** 2 / 100 - (x / 9) ** 3 + y / 3

    error = np.abs(o.cubic.clear(cubic(*coarse)) - cubic(*fine))
    assert error.max() < 0.05  # weights of 8 bits, values up to 40
    rows = o.straight.clear(np.ones(o.coarse))
    assert np.array_equal(rows, np.ones(o.shape))
    x = cubic(*coarse)
    inner = (slice(1, -1),) * 2
    for key, exact in (
        ((0,), (coarse[1] - 4) ** 2 / 100 - coarse[0] ** 2 / 243),
        ((1,), (coarse[0] - 9) * (coarse[1] - 4) / 50 + 1 / 3),
        ((0, 1), (coarse[1] - 4) / 50),
        ((1, 1), (coarse[0] - 9) / 50),
    ):
        error = np.abs(o.slopes[key].clear(x) - exact)[inner]
        # Next to the border of three points: the third derivative is left out.
        assert error.max() < (0.08 if key == (0,) else 2e-3), key


def test_no_correlation_is_larger_than_one():
    for name in GRIDS:
        o = grid(name)
        images = pair(o.shape)
        e = {p: 1 / exact_norm(x, o) for p, x in images.items()}
        covariance = carried.Window(o).clear([images[STATIC]], [images[MOVING]])
        most = 1 / (1 - carried.AROUND)
        assert np.abs(covariance * e[STATIC] * e[MOVING]).max() <= most


# -- iterations ------------------------------------------------------------------


def iterations(world, o, n=3, moved=0.0):
    """Some iterations of a level, with everything that an iteration may do."""
    pid = world.session.pid if isinstance(world, Shares) else None
    correlation = CarriedCorrelation(world, o, 0.25)
    displacements = None
    if moved:
        rng = np.random.default_rng(4)
        given = []
        for owner in (STATIC, MOVING):
            for _ in range(o.dim):
                u = ndimage.gaussian_filter(rng.uniform(-1, 1, o.coarse), 1) * moved
                here = u if pid in (None, owner) else None
                given.append(world.own(here, owner, o.coarse, DISPLACEMENT))
        given = world.masked(*given)
        displacements = {STATIC: given[: o.dim], MOVING: given[o.dim :]}
    halves = correlation.begin(starts(o, pid, moved), displacements)
    static, moving = halves[STATIC], halves[MOVING]
    found = []
    for k in range(n):
        (static, moving), total = correlation.iterate(
            static, moving, refine=k == 1, last=k == n - 1
        )
        found += [*static.displacement, *moving.displacement]
        if k < n - 1:
            found += [static.image, static.inverse, moving.image, moving.inverse]
        found.append(world.fresh((total, carried.SQUARE))[0])
    return found


@pytest.mark.parametrize("moved", [0.0, 0.4])
@pytest.mark.parametrize("name", GRIDS)
def test_iterations_on_shares_are_those_in_the_clear(trio, monkeypatch, name, moved):
    """With rates that are given: where a norm lies on a limit of `rates` chance decides
    between two that are 9 % apart."""

    def given(world, norms, longest, power, digits):
        pid = world.session.pid if isinstance(world, Shares) else MOVING
        rates = np.array([3.0]) if pid == MOVING else None
        return world.masked(*(world.own(rates, MOVING, (1,), digits) for _ in norms))

    for world in (Clear, Shares):
        monkeypatch.setattr(world, "rates", given)
    o = grid(name)
    clear = iterations(Clear(), o, moved=moved)
    shares = run_trio(trio, lambda s: iterations(Shares(s), o, moved=moved))
    largest = 0
    for k, expected in enumerate(clear):
        found = value([party[k] for party in shares])
        error, size = (
            np.abs(found - expected.factor).max(),
            np.abs(expected.factor).max(),
        )
        # Roundings are of 2**-16 and finer: displacements agree to a thousandth of a
        # voxel (0.0011 in 400 runs, one in ten beyond 0.0007), what is in units of its
        # own to as much of its size.
        assert error < 3e-3 * max(size, 1.0), k
        largest = max(largest, size)
    assert largest > 0.3


def test_the_longest_step_is_near_the_step_length():
    for name in GRIDS:
        o, world = grid(name), Clear()
        correlation = CarriedCorrelation(world, o, 0.25)
        halves = correlation.begin(starts(o))
        (static, moving), _ = correlation.iterate(halves[STATIC], halves[MOVING])
        for half in (static, moving):
            step = np.sqrt(sum(u.factor**2 for u in half.displacement)).max()
            assert 0.15 < step < 0.36, name


def test_the_images_come_closer():
    for name in GRIDS:
        o, world = grid(name), Clear()
        correlation = CarriedCorrelation(world, o, 0.25)
        halves = correlation.begin(starts(o))
        static, moving = halves[STATIC], halves[MOVING]
        before = static.image.factor - moving.image.factor
        for k in range(8):
            (static, moving), _ = correlation.iterate(static, moving, refine=k % 3 == 2)
        inner = tuple(slice(o.radius, -o.radius) for _ in o.shape)
        after = static.image.factor - moving.image.factor
        assert np.abs(after[inner]).mean() < 0.8 * np.abs(before[inner]).mean(), name


def test_inverse_norms_of_any_windows():
    """Of flat windows next to edges from black to white, and of the image's noise."""
    rng = np.random.default_rng(9)
    for shape, radius in (((40, 44), 4), ((40, 44), 2), ((20, 18, 22), 3)):
        o = Operators(shape, radius, 2.0, (2,) * len(shape))
        image = np.zeros(shape)
        image[10:] = rng.uniform(0, 1, image[10:].shape)
        image[14:, 9:12] = 1.0
        image[:10] = np.linspace(0, 0.1, shape[1]).reshape((-1,) + (1,) * (o.dim - 2))
        image[10:, :5] = rng.integers(0, 2, image[10:, :5].shape)
        correlation = CarriedCorrelation(Clear(), o, 0.25)
        halves = correlation.begin(dict.fromkeys((STATIC, MOVING), Start(image, None)))
        product = halves[STATIC].inverse.factor * exact_norm(image, o)
        assert 0.92 < product.min() and product.max() < 1.08


def test_polynomials_of_the_inverse_root():
    """They are as near as they say, and on the way not too large for their digits."""
    x = np.geomspace(2.0**-6, 1.25, 10_001)
    t, widths = carried.NEAR[0] * x + carried.NEAR[1] * x**3, []
    for a, b, c in [*carried.NEARER, (1, 0, 0)]:
        widths.append(np.abs(t - 1).max())
        y = t / x
        assert y.max() < carried.INVERSE.bound
        assert (y**2).max() < carried.RECIPROCAL.bound
        assert (y * x**2).max() < carried.NORM.bound
        assert (t**2).max() < carried.RATIO.bound
        t = a * t + b * t**3 + c * t**5
    assert widths == pytest.approx([0.94, 0.77, 0.36, 0.03], abs=0.01)


@pytest.mark.parametrize("step", [0.25, 0.5])
@pytest.mark.parametrize("radius, spacing", [(4, 3), (4, 4), (3, 3), (2, 2), (1, 2)])
def test_a_window_that_was_flat_does_not_spoil_an_image(radius, spacing, step):
    """A bright body on black moves into windows that were black."""
    shape = (48, 44)
    at = np.indices(shape)
    bodies = {
        owner: 1.0 * (np.hypot(at[0] - 24 - d, at[1] - 22) < 12)
        for owner, d in ((STATIC, 3), (MOVING, -3))
    }
    o = Operators(shape, radius, 2.0, (spacing,) * 2)
    correlation = CarriedCorrelation(Clear(), o, step)
    starts = {owner: Start(image, None) for owner, image in bodies.items()}
    halves = correlation.begin(starts)
    static, moving = halves[STATIC], halves[MOVING]
    every = int(1.25 / step)
    for k in range(30):
        (static, moving), _ = correlation.iterate(
            static, moving, refine=k % every == every - 1
        )
    for half in (static, moving):
        assert np.abs(half.image.factor).max() < 2.5
        assert 0 < half.inverse.factor.min() < half.inverse.factor.max() < 66
    before = np.abs(bodies[STATIC] - bodies[MOVING]).mean()
    after = np.abs(static.image.factor - moving.image.factor).mean()
    assert after < 0.75 * before


# -- what it costs ---------------------------------------------------------------


def elements(o, refine=False, last=False):
    """Elements of 16 bytes that an iteration takes; see the module."""
    fine, coarse = int(np.prod(o.shape)), int(np.prod(o.coarse))
    dim, keys = o.dim, len(o.keys)
    inner = 2 * 3 + 3 + 3 * 3 + 2 * 3 + 2 * 3 * dim + 2 * 3 * dim
    inner += 2 * 3 * (keys - dim) + 2 * 3 * dim + (100 if refine else 0)
    # The factors of steps: two sums and two numbers.
    total = coarse * (inner + 12) + fine * 6 + 2 + 2 * 2
    return total + (0 if last else fine * 6)


@pytest.mark.parametrize("refine, last", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", GRIDS)
def test_bytes_and_rounds_of_an_iteration(
    trio, tap, depth, payload_bytes, name, refine, last
):
    o = grid(name)
    worlds = {s.pid: Shares(s) for s in trio}
    made = run_trio(
        trio,
        lambda s: (
            c := CarriedCorrelation(worlds[s.pid], o, 0.25),
            c.begin(starts(o, s.pid)),
        ),
    )
    frames, so_far = tap(trio), depth(trio)
    waits = trio[MOVING].ledger.rounds["setup"]

    def run(session):
        correlation, halves = made[session.pid]
        correlation.iterate(halves[STATIC], halves[MOVING], refine=refine, last=last)

    run_trio(trio, run)
    assert {f[1] for f in frames} == {MOVING, STATIC}
    steps = len(RATE_STEPS) - 1
    keys = 2 * 2 * steps * (103 * 33 + 16) + 2 * steps * 16
    # Two masked norms are opened by three parties to each of two.
    opened = 2 * 4 * 16
    assert payload_bytes(frames) == 16 * elements(o, refine, last) + keys + opened
    # 13 between the owners, and the helper's first message.
    assert so_far() == 14
    # Of the moving owner, which is sent keys in four pieces.
    assert trio[MOVING].ledger.rounds["setup"] - waits == 13 + 4


@pytest.mark.parametrize("spacing, most, of_five", [(3, 279, 248), (2, 485, 426)])
def test_bytes_a_voxel(spacing, most, of_five):
    """In 3D, of a grid so large that its border does not count; see the module."""
    o = Operators((901, 901, 901), 4, 2.0, (spacing,) * 3)
    each = (4 * elements(o) + elements(o, True)) / 5
    assert round(16 * each / 901**3) == most
    five = (4 * elements(o) + elements(o, last=True)) / 5
    assert round(16 * five / 901**3) == of_five


def count_failures(shape, iters, spacing, steps):
    """Odds that a rounding of a registration goes wrong, radius 4."""
    world, before = Counting(), None
    for level in range(len(iters) - 1, -1, -1):
        at_level = [-(-n // 2**level) for n in shape]
        o = Operators(at_level, 4, 2.0, (spacing,) * len(shape))
        correlation = CarriedCorrelation(world, o, 0.25)
        if before is not None:
            zero = Secret(None, DISPLACEMENT.unit, o.coarse)
            before = {k: world.masked(*[zero] * o.dim) for k in (STATIC, MOVING)}
        starts = dict.fromkeys((STATIC, MOVING))
        halves = correlation.begin(starts, before, steps if before else None)
        so_far, before = world.failures, halves
        correlation.iterate(halves[STATIC], halves[MOVING], refine=True)
        world.failures += (world.failures - so_far) * (iters[-1 - level] - 1)
    back, away = (halves[k].displacement for k in (STATIC, MOVING))
    correlation.carrier.composed(back, away, 4)
    return world.failures


@pytest.mark.parametrize("spacing", [3, 2])
@pytest.mark.parametrize("steps", [None, (4, 8)])
def test_roundings_fail_less_than_once_in_a_million_registrations(spacing, steps):
    """[10, 10, 5] iterations of 192 x 160 x 192 voxels; steps are of opens="end"."""
    failures = count_failures((192, 160, 192), [10, 10, 5], spacing, steps)
    assert 0 < failures < (2.0**-20 if steps else 2.0**-25)


def test_failures_are_counted_as_they_are_on_shares(trio):
    o = grid("3d")

    def iteration(world, pid=None):
        correlation = CarriedCorrelation(world, o, 0.25)
        halves = correlation.begin(starts(o, pid))
        correlation.iterate(halves[STATIC], halves[MOVING], refine=True)
        return world.failures

    expected = iteration(Counting())
    for failures in run_trio(trio, lambda s: iteration(Shares(s), s.pid)):
        # The sums of all steps, one number each, are left out.
        assert failures == pytest.approx(expected, rel=1e-6)


def test_what_is_sent_does_not_depend_on_the_images(trio, tap):
    o, seen = grid("2d"), []
    for k in range(2):
        frames = tap(trio)

        def run(session, k=k):
            correlation = CarriedCorrelation(Shares(session), o, 0.25)
            given = starts(o, session.pid)
            for owner, start in given.items():
                if start is not None and k:
                    given[owner] = start._replace(image=1 - start.image**3)
            halves = correlation.begin(given)
            correlation.iterate(halves[STATIC], halves[MOVING])

        run_trio(trio, run)
        for pid in (MOVING, STATIC, HELPER):
            seen.append(sorted((*f[:4], len(f[4])) for f in frames if f[0] == pid))
    assert seen[:3] == seen[3:]
