"""Squared differences on shares, of one channel or more: formulas, rounds, bytes."""

import numpy as np
from parties import run_trio
import pytest
from scipy import ndimage
from shares import Counting, decoded, value

from dipy_ppir.mpc.algebra import RATE_STEPS, Clear, Digits, Masked, Secret, Shares
from dipy_ppir.mpc.carried import Operators, Smooth, Start
from dipy_ppir.mpc.carrier import DISPLACEMENT, Carry
from dipy_ppir.mpc.differences import CarriedDifferences, Variance
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import MOVING, STATIC

#: Shape, spacing of the coarse grid, thinning and channels.
GRIDS = {
    "2d": ((29, 34), (3, 3), None, ()),
    "3d": ((21, 19, 23), (3, 3, 3), None, ()),
    "channels": ((18, 17, 16), (2, 2, 2), None, (3,)),
    "thinned": ((36, 41), (3, 3), (2, 2), (4,)),
    "slab": ((33, 30, 9), (3, 3, 2), (2, 2, 1), (2,)),
}


def grid(name):
    shape, spacing, thinning, channels = GRIDS[name]
    o = Operators(shape, 0, 2.0, spacing, thinning=thinning)
    return o, channels


def starts(o, channels, pid=None, seed=0):
    """What owners know at the start of a level; of party `pid` only if it is given."""
    rng, found = np.random.default_rng(seed), {}
    smooth = (0,) * len(channels) + (2.0,) * o.dim
    static = ndimage.gaussian_filter(rng.standard_normal((*channels, *o.shape)), smooth)
    moved = (0,) * len(channels) + (0.7,) * o.dim
    moving = ndimage.shift(static, moved, order=1, mode="nearest")
    for owner, x in ((STATIC, static), (MOVING, moving)):
        start = Start((x - static.min()) / np.ptp(static), np.zeros((o.dim, *o.coarse)))
        found[owner] = start if pid in (None, owner) else None
    return found


# -- forms -----------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_forms_are_the_same_on_elements_and_on_real_numbers(name):
    (o, channels), rng = grid(name), np.random.default_rng(1)
    whole = (*channels, *o.shape)
    forms = [(Smooth(o, axis), [whole], [whole]) for axis in range(o.dim)]
    forms.append((Carry(o), [o.coarse] * len(o.keys), [whole]))
    forms.append((Variance(o), [whole], [whole]))
    for form, left, right in forms:
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


def test_variance_is_that_of_numpy():
    o, channels = grid("channels")
    x, y = (starts(o, channels)[k].image for k in (STATIC, MOVING))
    expected = sum(
        ((c - c.mean()) * (d - d.mean())).sum() for c, d in zip(x, y, strict=True)
    )
    assert Variance(o).clear([x], [y])[0] == pytest.approx(expected)


@pytest.mark.parametrize("name", GRIDS)
def test_forces_are_differences_times_gradients(name):
    o, channels = grid(name)
    differences = CarriedDifferences(Clear(), o, 0.25, channels)
    halves = differences.begin(starts(o, channels))
    speeds, score = differences.speeds(halves[STATIC], halves[MOVING])
    s, m = (halves[k].image.factor.reshape(-1, *o.shape) for k in (STATIC, MOVING))
    assert score.part[0] == pytest.approx(((m - s) ** 2).sum(), rel=1e-6)
    for axis in range(o.dim):
        for k, (x, y) in enumerate(((s, m), (m, s))):
            product = ((y - x) * np.gradient(x, axis=axis + 1)).sum(axis=0)
            np.moveaxis(product, axis, 0)[[0, -1]] = 0
            smooth = ndimage.gaussian_filter(product, o.sigmas)
            # Coarse points lie between voxels where the grid is thinned.
            at = np.meshgrid(*o.points, indexing="ij")
            smooth = ndimage.map_coordinates(smooth, at, order=1, mode="nearest")
            inner = (slice(1, -1),) * o.dim
            found = speeds[k * o.dim + axis].factor[inner] / differences.scale
            error = np.abs(found - smooth[inner]).max()
            # Weights of the Gaussian have twelve digits.
            assert error < 0.02 * np.abs(smooth).max()


# -- iterations ------------------------------------------------------------------


def iterations(world, name, n=3):
    """Some iterations of a level."""
    o, channels = grid(name)
    pid = world.session.pid if isinstance(world, Shares) else None
    differences = CarriedDifferences(world, o, 0.25, channels)
    halves = differences.begin(starts(o, channels, pid))
    static, moving = before = halves[STATIC], halves[MOVING]
    found = []
    for k in range(n):
        before = static, moving
        (static, moving), score = differences.iterate(*before, last=k == n - 1)
        found += [*static.displacement, *moving.displacement]
        found += [] if k == n - 1 else [static.image, moving.image]
        found += world.masked(score)
    differences.check(before, (static, moving))
    reference = world.secret(differences.reference(before), Digits(0.0, 1e6))
    return found + world.masked(reference)


@pytest.mark.parametrize("name", GRIDS)
def test_iterations_on_shares_are_those_in_the_clear(trio, monkeypatch, name):
    """With rates that are given: where a norm lies on a limit of `rates` chance decides
    between two that are 9 % apart."""

    def given(world, norms, longest, power, digits):
        pid = world.session.pid if isinstance(world, Shares) else MOVING
        rates = np.array([0.6]) if pid == MOVING else None
        return world.masked(*(world.own(rates, MOVING, (1,), digits) for _ in norms))

    for world in (Clear, Shares):
        monkeypatch.setattr(world, "rates", given)
    clear = iterations(Clear(), name)
    shares = run_trio(trio, lambda s: iterations(Shares(s), name))
    largest = 0
    for k, expected in enumerate(clear):
        found = value([party[k] for party in shares])
        size = np.abs(expected.factor).max()
        assert np.abs(found - expected.factor).max() < 1e-3 * max(size, 1.0), k
        largest = max(largest, size if len(expected.shape) > 1 else 0)
    assert largest > 0.3


@pytest.mark.parametrize("name", GRIDS)
def test_the_images_come_closer(name):
    o, channels = grid(name)
    differences = CarriedDifferences(Clear(), o, 0.25, channels)
    halves = differences.begin(starts(o, channels))
    static, moving = halves[STATIC], halves[MOVING]
    scores = []
    for _ in range(8):
        (static, moving), score = differences.iterate(static, moving)
        scores.append(score.part[0])
        step = np.sqrt(sum(u.factor**2 for u in static.displacement)).max()
        if len(scores) == 1:
            assert 0.12 < step < 0.36
    assert scores[-1] < 0.7 * scores[0]


# -- what it costs ---------------------------------------------------------------


def elements(o, channels, last=False):
    """Elements of 16 bytes that an iteration takes; see the module."""
    fine = int(np.prod(channels + o.shape))
    coarse, dim, keys = int(np.prod(o.coarse)), o.dim, len(o.keys)
    inner = 3 * 2 * 3 * dim + 2 * 2 * 3 + 2 * 3 * (keys - dim)
    # Two sums for the factors of steps and two numbers, and the score.
    return coarse * inner + 2 + 2 * 2 + 1 + (0 if last else 6 * fine)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_bytes_and_rounds_of_an_iteration(trio, tap, depth, payload_bytes, name, last):
    o, channels = grid(name)
    worlds = {s.pid: Shares(s) for s in trio}
    made = run_trio(
        trio,
        lambda s: (
            c := CarriedDifferences(worlds[s.pid], o, 0.25, channels),
            c.begin(starts(o, channels, s.pid)),
        ),
    )
    frames, so_far = tap(trio), depth(trio)

    def run(session):
        differences, halves = made[session.pid]
        differences.iterate(halves[STATIC], halves[MOVING], last=last)

    run_trio(trio, run)
    assert {f[1] for f in frames} == {MOVING, STATIC}
    steps = len(RATE_STEPS) - 1
    keys = 2 * 2 * steps * (103 * 33 + 16) + 2 * steps * 16
    # Two masked norms are opened by three parties to each of two.
    opened = 2 * 4 * 16
    assert payload_bytes(frames) == 16 * elements(o, channels, last) + keys + opened
    # 8 between the owners, and the helper's first message.
    assert so_far() == 9


@pytest.mark.parametrize(
    "spacing, thinning, channels, most, of_five",
    [
        (3, 1, (), 156, 137),
        (2, 1, (), 300, 281),
        (3, 2, (12,), 204, 176),
        (2, 2, (12,), 348, 319),
    ],
)
def test_bytes_a_voxel(spacing, thinning, channels, most, of_five):
    """In 3D, of a grid so large that its border does not count; see the module."""
    shape = (90001,) * 3
    o = Operators(shape, 0, 2.0, (spacing,) * 3, thinning=(thinning,) * 3)
    each, last = elements(o, channels), elements(o, channels, last=True)
    assert round(16 * each / 90001**3) == most
    assert round(16 * (4 * each + last) / 5 / 90001**3) == of_five


def count_failures(thinning, channels, spacing, steps):
    """Odds that a rounding of [10, 10, 5] iterations of 192 x 160 x 192 goes wrong."""
    world, before = Counting(), None
    for level, n in ((2, 10), (1, 10), (0, 5)):
        shape = [-(-k // 2**level) for k in (192, 160, 192)]
        o = Operators(shape, 0, 2.0, (spacing,) * 3, thinning=(thinning,) * 3)
        differences = CarriedDifferences(world, o, 0.25, channels)
        if before is not None:
            zero = Secret(None, DISPLACEMENT.unit, o.coarse)
            before = {k: world.masked(*[zero] * 3) for k in (STATIC, MOVING)}
        unknown = dict.fromkeys((STATIC, MOVING))
        before = differences.begin(unknown, before, steps if before else None)
        so_far = world.failures
        differences.iterate(before[STATIC], before[MOVING])
        world.failures += (world.failures - so_far) * (n - 1)
    back, away = (before[k].displacement for k in (STATIC, MOVING))
    differences.carrier.composed(back, away, 4)
    return world.failures


@pytest.mark.parametrize("steps", [None, (4, 8)])
@pytest.mark.parametrize("spacing", [3, 2])
@pytest.mark.parametrize("thinning, channels", [(1, ()), (2, (12,))])
def test_roundings_fail_less_than_once_in_a_million_registrations(
    thinning, channels, spacing, steps
):
    """Steps are of opens="end"."""
    failures = count_failures(thinning, channels, spacing, steps)
    assert 0 < failures < (2.0**-21 if steps else 2.0**-26)


def test_failures_are_counted_as_they_are_on_shares(trio):
    o, channels = grid("channels")

    def iteration(world, pid=None):
        differences = CarriedDifferences(world, o, 0.25, channels)
        halves = differences.begin(starts(o, channels, pid))
        differences.iterate(halves[STATIC], halves[MOVING])
        return world.failures

    expected = iteration(Counting())
    for failures in run_trio(trio, lambda s: iteration(Shares(s), s.pid)):
        # The sums of all steps, one number each, are left out.
        assert failures == pytest.approx(expected, rel=1e-6)


def test_what_is_sent_does_not_depend_on_the_images(trio, tap):
    (o, channels), seen = grid("2d"), []
    for seed in range(2):
        frames = tap(trio)

        def run(session, seed=seed):
            differences = CarriedDifferences(Shares(session), o, 0.25, channels)
            halves = differences.begin(starts(o, channels, session.pid, seed))
            differences.iterate(halves[STATIC], halves[MOVING])

        run_trio(trio, run)
        for pid in range(3):
            seen.append(sorted((*f[:4], len(f[4])) for f in frames if f[0] == pid))
    assert seen[:3] == seen[3:]
