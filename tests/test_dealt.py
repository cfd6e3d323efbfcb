"""What the helper deals before the owners meet: registrations with it, and files."""

import os
import shutil
import stat

from deals import SOFTWARE, Deals
from deformed import deformed
from dipy.align.imaffine import AffineMap
import numpy as np
from parties import run_trio
import pytest

from dipy_ppir.align import (
    RemoteImage,
    affine_registration,
    carried,
    freeform_registration,
    plausibility,
    point_registration,
    syn_registration,
)
from dipy_ppir.align.checkpoint import Checkpoint
from dipy_ppir.align.estimate import dealt_bytes
from dipy_ppir.align.freeform import (
    ClearFreeFormRegistration,
    SecureFreeFormRegistration,
)
from dipy_ppir.align.imwarp import SecureSymmetricDiffeomorphicRegistration
from dipy_ppir.align.metrics import SecureCCMetric, SecureSSDMetric
from dipy_ppir.align.parameters import (
    AffineParameters,
    FreeFormParameters,
    PointParameters,
    SynParameters,
)
from dipy_ppir.align.points import clear_registration
from dipy_ppir.align.remote import exchange_grids
from dipy_ppir.mpc import protocols
from dipy_ppir.mpc.algebra import Digits, Shares
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.dealfile import PIECE, Deal, DealWriter, remove_unfinished
from dipy_ppir.mpc.dealt import DealingSession, check_dealt
from dipy_ppir.mpc.errors import (
    DealError,
    InsecureSetupError,
    ParameterMismatchError,
    ProtocolError,
)
from dipy_ppir.mpc.fields import P61, R128
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.leastsquares import VALUE_BITS, mismatch, show_difference
from dipy_ppir.mpc.ledger import DECLARATIONS, HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.mpyc_bridge import evaluate

OWNERS = (MOVING, STATIC)
KEPT = Digits(2.0**-16, 64.0)


@pytest.fixture
def deals(tmp_path):
    return Deals(tmp_path)


def images_of(pid, static, moving):
    return (
        static if pid == STATIC else RemoteImage(static.shape),
        moving if pid == MOVING else RemoteImage(moving.shape),
    )


def syn(session, pair, metric=SecureCCMetric, checkpoint=None, **options):
    """One party's part of a registration."""
    of_metric = {k: options.pop(k) for k in ("opens", "map_precision") if k in options}
    of_metric |= {"radius": 3} if metric is SecureCCMetric else {}
    registration = SecureSymmetricDiffeomorphicRegistration(
        metric(2, session=session, **of_metric),
        session=session,
        checkpoint=checkpoint,
        **options,
    )
    with plausibility.untold():
        mapping = registration.optimize(*images_of(session.pid, *pair))
    return registration.receipt, mapping


def product(session, at_owners=None):
    """A small computation: products of the owners' numbers, one section each."""
    world, out = Shares(session), []
    for k, name in enumerate(("first", "second")):
        world.section(name)
        values = {MOVING: np.arange(4.0) + k, STATIC: np.full(4, 3.0)}
        own = [world.own(values[p], p, (4,), KEPT) for p in OWNERS]
        x, y = world.masked(*own)
        (z,) = world.fresh((x * y, KEPT))
        out.append(z.part)
    return out


def shown(parts):
    """Numbers of both owners' parts."""
    return R128.decode(R128.add(*parts), 16)


# -- registrations -------------------------------------------------------------


@pytest.mark.parametrize(
    "metric, options",
    [
        (SecureCCMetric, {"level_iters": [5, 4]}),
        (SecureCCMetric, {"level_iters": [4, 3], "opens": "end"}),
        (SecureCCMetric, {"level_iters": [4, 0]}),
        # The owners end levels before the iterations that the helper dealt for.
        (SecureCCMetric, {"level_iters": [18, 18], "opt_tol": 0.02}),
        (SecureSSDMetric, {"level_iters": [18, 18], "opt_tol": 0.02}),
    ],
)
def test_syn_is_what_it_is_with_the_helper_there(
    deals, three, monkeypatch, metric, options
):
    """But for what is rounded by chance, and steps that are 9 % apart by it."""
    monkeypatch.setattr(carried, "LEVEL_PRECISION", 2.0**-8)
    options = {**options, "metric": metric, "map_precision": 2.0**-8}
    pair = deformed(2)

    def run(session):
        return syn(session, pair, **options)

    deals.make(run)
    dealt, there = deals.run(run), three(run)
    for owner in OWNERS:
        (receipt, one), (other_receipt, other) = dealt[owner], there[owner]
        one, other = (np.asarray(m.get_forward_field()) for m in (one, other))
        assert np.sqrt(((one - other) ** 2).mean()) < 0.1
        assert np.abs(other).max() > 0.3
        # The owners learn as much, and the helper nothing.
        learned = {r: other_receipt["learned"][r] for r in receipt["learned"]}
        assert sorted(learned) == sorted(ROLES[p] for p in OWNERS)
        assert receipt["learned"] == learned
    stops = [e for e in learned[ROLES[MOVING]] if e["label"] == "stop"]
    if "opt_tol" in options:
        assert 2 <= stops[0]["values"] < 2 * 6


def test_an_owner_goes_on_with_another_deal(deals, tmp_path):
    """As after an interruption: each level is in a section of its own."""
    pair, options = deformed(2), {"level_iters": [4, 3, 2]}
    deals.make(lambda s: syn(s, pair, **options))

    def begun(session, resume):
        folder = tmp_path / f"state-{session.pid}"
        checkpoint = Checkpoint(folder, resume=resume, interval=0)
        if not resume:
            ended = checkpoint.save

            def save(*args):
                ended(*args)
                raise KeyboardInterrupt

            checkpoint.save = save
        return syn(session, pair, checkpoint=checkpoint, **options)

    with pytest.raises(KeyboardInterrupt):
        deals.run(begun, False)
    with pytest.raises(DealError, match="was used already"):
        deals.run(begun, True)
    deals.make(lambda s: syn(s, pair, **options))
    receipts = [receipt for receipt, _ in deals.run(begun, True)]
    for receipt in receipts:
        assert receipt["resumed"] == 1
        by_label = {e["label"]: e for e in receipt["learned"][ROLES[MOVING]]}
        # The coarsest level was not done again.
        assert by_label["level_moving"]["openings"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {"level_iters": [6, 4]},
        {"level_iters": [12, 0], "opt_tol": 0.4, "ret_metric": True},
        {"level_iters": [5, 5], "sampling_proportion": 0.8, "sampling": "GMS"},
    ],
)
def test_freeform(deals, options):
    pair = deformed(2)
    options = {"factors": [2, 1], "precision": 2.0**-10, **options}

    def run(session):
        registration = SecureFreeFormRegistration(2, session=session, **options)
        with plausibility.untold():
            mapping = registration.optimize(*images_of(session.pid, *pair))
        return mapping, registration.receipt

    deals.make(run)
    found = deals.run(run)
    clear = ClearFreeFormRegistration(dim=2, **options)
    exact = np.asarray(clear.optimize(*pair).get_forward_field())
    for mapping, receipt in found:
        error = np.asarray(mapping.get_forward_field()) - exact
        most = 0.5 if "sampling" in options else 0.1
        assert np.sqrt((error**2).mean()) < most and np.abs(exact).max() > 0.3
        warned = plausibility.MISMATCH in receipt["warnings"]
        assert warned == clear.mismatched


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline": ["center_of_mass", "translation", "affine"]},
        {
            "pipeline": ["rigid"],
            "sampling": "GMS",
            "sampling_proportion": 0.9,
            "result_to": "moving",
            "ret_metric": True,
        },
    ],
)
def test_affine_by_squares(deals, bodies, options):
    static, moving, *grids = bodies(2)
    moving = moving**2  # of the same contrast
    options = {"level_iters": [12, 8], "factors": [2, 1], "sigmas": [1, 0], **options}

    def run(session):
        own = {
            STATIC: {"static_affine": grids[0]},
            MOVING: {"moving_affine": grids[1]},
        }
        images = [
            image if session.pid == owner else RemoteImage(image.shape, grid)
            for owner, image, grid in zip(
                (STATIC, MOVING), (static, moving), grids, strict=True
            )
        ]
        return affine_registration(
            *images[::-1],
            metric="SSD",
            session=session,
            ret_receipt=True,
            **own.get(session.pid, {}),
            **options,
        )

    deals.make(run)
    found = deals.run(run)
    moved, matrix, *shown, receipt = found[MOVING]
    if shown:
        low, high = moving.min(), moving.max()
        exact = np.mean(((moved - low) / (high - low) - static / static.max()) ** 2)
        assert shown[1] == pytest.approx(exact, abs=1 / 2000)
    before = AffineMap(
        np.eye(3),
        domain_grid_shape=static.shape,
        domain_grid2world=grids[0],
        codomain_grid_shape=moving.shape,
        codomain_grid2world=grids[1],
    )
    before = np.abs(before.transform(moving) - static).mean()
    assert np.abs(moved - static).mean() < 0.25 * before
    assert not receipt["warnings"]
    if "result_to" in options:
        assert found[STATIC][1] is None
    else:
        np.testing.assert_array_equal(found[STATIC][1], matrix)


def test_images_that_do_not_match(deals):
    """The bit that is opened about an affine registration by squares."""
    static, moving = (np.random.default_rng(k).uniform(size=(2, 40)) for k in (1, 2))
    both = {STATIC: static[0], MOVING: np.stack([moving[0], static[0]])}
    both = {p: np.rint(x * (1 << VALUE_BITS)).astype(np.int64) for p, x in both.items()}

    def run(session, turned=False, limits=(0.8, 0.05)):
        session.section("turned" if turned else "as it is")
        static = both[STATIC] if session.pid == STATIC else None
        moving = None
        if session.pid == MOVING:
            moving = both[MOVING][::-1] if turned else both[MOVING]
        bit = mismatch(session, 40, limits, static, moving)
        return session.open(bit, "test-any", OWNERS)

    def both_ways(session):
        return run(session), run(session, turned=True)

    deals.make(both_ways)
    for found in deals.run(both_ways):
        assert [round(x[0]) for x in found] == [0, 1]


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_the_final_value(deals, value):
    """To a 4000th, whatever it is, in the bits that are declared."""
    one, n = 1 << VALUE_BITS, 50
    images = {MOVING: np.full((1, n), one), STATIC: np.full(n, one)}
    images[STATIC] = np.rint(images[STATIC] * (1 - value**0.5)).astype(np.int64)

    def run(session):
        session.section("all")
        names = {MOVING: "moving", STATIC: "static"}
        own = {names[p]: x for p, x in images.items() if p == session.pid}
        return show_difference(session, n, **own), session.ledger.opened

    deals.make(run)
    (found, opened), (nothing, _) = deals.run(run)
    assert nothing is None and found == pytest.approx(value, abs=1 / 2000)
    ((key, entry),) = opened.items()
    assert key == (MOVING, "final_value") and entry.values == 1
    assert entry.bits == DECLARATIONS["final_value"].bits == 14


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("scaling", [False, True])
def test_points(deals, dim, scaling):
    rng = np.random.default_rng(dim)
    moving = rng.normal(size=(30, dim)) * [20, 30, 25][:dim]
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    turn[:, 0] *= np.linalg.det(turn)
    static = moving @ turn.T * (1.2 if scaling else 1) + 4
    told = {"points": {p: {n: [30, dim]} for p, n in ((0, "moving"), (1, "static"))}}

    def run(session):
        own = {STATIC: ("remote", static), MOVING: (moving, "remote")}
        pair = own.get(session.pid, ("remote", "remote"))
        return point_registration(
            *pair, session=session, ret_receipt=True, scaling=scaling
        )

    deals.make(run, told)
    expected = clear_registration(moving, static, scaling=scaling)
    for _, matrix, receipt in deals.run(run):
        assert np.abs(matrix - expected).max() < 0.01
        assert not receipt["warnings"]
    # Points that do not belong together: what is dealt for the rest is left.
    moving = rng.normal(size=(30, dim)) * [20, 30, 25][:dim]
    deals.make(run, told)
    with pytest.raises(plausibility.ImplausibleError, match="no rotation"):
        deals.run(run)


SMALL = {"level_iters": (2, 1), "factors": (2, 1), "sigmas": (1.0, 0.0)}
SIZES = {
    "points": (PointParameters(), (9, 3)),
    "many points": (PointParameters(), (2000, 2)),
    "affine": (AffineParameters(metric="SSD", **SMALL), (26, 24, 22)),
    "affine in the plane": (
        AffineParameters(metric="SSD", pipeline=("rigid",), **SMALL),
        (44, 40),
    ),
    "affine of many blocks": (AffineParameters(metric="SSD", **SMALL), (80, 80, 70)),
    "affine of samples": (
        AffineParameters(
            metric="SSD", sampling="GMS", sampling_proportion=0.1, **SMALL
        ),
        (80, 80, 70),
    ),
    "centres of mass": (
        AffineParameters(metric="SSD", pipeline=("center_of_mass",)),
        (26, 24, 22),
    ),
    "free-form": (FreeFormParameters(**SMALL), (26, 24, 22)),
    "free-form of samples": (
        FreeFormParameters(dim=2, sampling="GMS", sampling_proportion=0.3, **SMALL),
        (44, 40),
    ),
    "SyN": (SynParameters(level_iters=(1, 0), dim=2), (40, 44)),
    "SyN MIND": (SynParameters(level_iters=(1, 2), metric="MIND"), (40, 44, 42)),
}
FUNCTIONS = {
    PointParameters: point_registration,
    AffineParameters: affine_registration,
    FreeFormParameters: freeform_registration,
    SynParameters: syn_registration,
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_are_known_ahead(deals, case):
    parameters, shape = SIZES[case]
    images, told = [RemoteImage(shape)] * 2, None
    if isinstance(parameters, PointParameters):
        images = ["remote"] * 2
        told = {
            "points": {p: {n: list(shape)} for n, p in (("moving", 0), ("static", 1))}
        }

    def run(session):
        function = FUNCTIONS[type(parameters)]
        return function(*images, session=session, **parameters.plain())

    deals.make(run, told)
    found = sum(deals.path(p).stat().st_size for p in OWNERS)
    assert 0.85 < found / dealt_bytes(parameters, shape, shape) < 1.15


# -- what is agreed on -----------------------------------------------------------


def test_what_the_helper_did_not_deal_for_is_refused_and_uses_nothing_up(deals):
    pair = deformed(2)
    deals.make(lambda s: syn(s, pair, level_iters=[2, 2]))
    with pytest.raises(ParameterMismatchError, match=r"'level_iters'.* at the helper"):
        deals.run(lambda s: syn(s, pair, level_iters=[2, 3]))
    small = [x[:-2] for x in pair]
    with pytest.raises(ParameterMismatchError, match=r"_shape'.* at the helper"):
        deals.run(lambda s: syn(s, small, level_iters=[2, 2]))
    assert deals.run(lambda s: syn(s, pair, level_iters=[2, 2]))[STATIC][1] is not None


def test_owners_are_as_the_helper_was_told(deals):
    grids = {"shape": [20, 20], "grid2world": np.eye(3).tolist()}
    told = {"images": {MOVING: {"moving": grids}, STATIC: {"static": grids}}}

    def run(session, shape=(20, 20)):
        images = {"static": ("remote", None), "moving": ("remote", None)}
        for owner, name in ((MOVING, "moving"), (STATIC, "static")):
            if session.pid == owner:
                images[name] = np.zeros(shape if owner else (20, 20)), np.eye(3)
        return {k: v.shape for k, (v, _) in exchange_grids(session, images).items()}

    assert deals.make(run, told) == {"static": (20, 20), "moving": (20, 20)}
    assert deals.run(run)[MOVING] == {"static": (20, 20), "moving": (20, 20)}
    with pytest.raises(ParameterMismatchError, match="dealt for another static owner"):
        deals.run(run, (20, 22))


def test_a_computation_of_another_kind_does_not_fit(deals):
    deals.make(product)

    def other(session):
        world = Shares(session)
        world.section("first")
        x = world.masked(world.own(np.ones(5), MOVING, (5,), KEPT))[0]
        return world.fresh((x * x, KEPT))

    with pytest.raises(DealError, match="made for another computation"):
        deals.run(other)
    deals.make(product)
    with pytest.raises(DealError, match="nothing for 'third'"):
        deals.run(lambda s: s.section("third"))


def test_what_needs_the_helper_cannot_be_dealt(deals):
    def receives(session):
        protocols.share_elements(session, MOVING, None, (3,), P61, "numbers")

    def compares(session):
        x = SharedArray(P61, P61.zeros((1,)), 1, 0, 8)
        evaluate(session, lambda mpc, y: (y < 0,), (x,), (1,), kind="integer")

    for function, what in ((receives, "numbers"), (compares, "MPyC")):
        with pytest.raises(ProtocolError, match=f"ahead: it would wait for '{what}'"):
            deals.make(function)
    assert not list(deals.folder.glob("*.deal"))


def test_sessions_of_what_was_dealt_keep_their_numbers_secret():
    check_dealt(2, 1)
    for given in ((3, 1), (2, 0), (2, 1, True)):
        with pytest.raises(InsecureSetupError):
            check_dealt(*given)


# -- sections and streams ----------------------------------------------------------


def test_sections_have_streams_of_their_own(deals):
    deals.make(product)
    parts = deals.run(product)
    for k in range(2):
        found = shown([parts[p][k] for p in OWNERS])
        assert np.allclose(found, 3 * (np.arange(4.0) + k), atol=2.0**-14)

    deals.make(product)

    def masks(session):
        out = []
        for name in ("first", "second"):
            session.section(name)
            out.append(session.stream(HELPER, b"pad-masked").words((8,)))
        return out

    drawn = np.concatenate(deals.run(masks))
    assert len(np.unique(drawn)) == drawn.size


def test_a_section_is_begun_once(deals):
    def twice(session):
        session.section("first")
        session.section("first")

    with pytest.raises(ValueError, match="dealt already"):
        deals.make(twice)
    deals.make(product)
    with pytest.raises(DealError, match="nothing for 'first', or it was used"):
        deals.run(twice)


def test_what_owners_send_is_uniform(deals, tap):
    """Of images of zeros they send masks, as they do with the helper there."""
    n = 4000

    def zeros(session):
        world = Shares(session)
        world.section("all")
        x, y = world.masked(*(world.own(np.zeros(n), p, (n,), KEPT) for p in OWNERS))
        return world.fresh((x * y, KEPT))

    deals.make(zeros)
    sessions = deals.sessions()
    frames = tap(sessions)
    run_trio(sessions, zeros)
    for session in sessions:
        session.close()
    words = [np.frombuffer(f[4], np.uint8) for f in frames if len(f[4]) >= 16 * n]
    assert len(words) == 6
    for sent in words:
        assert abs(np.unpackbits(sent).mean() - 0.5) < 0.01
    assert len({w.tobytes() for w in words}) == len(words)


def test_a_deal_larger_than_a_piece(deals):
    n = PIECE // 8

    def large(session):
        world = Shares(session)
        world.section("all")
        rng = np.random.default_rng(3)
        values = {p: rng.uniform(-1, 1, n) for p in OWNERS}
        x, y = world.masked(*(world.own(values[p], p, (n,), KEPT) for p in OWNERS))
        (z,) = world.fresh((x * y, KEPT))
        return z.part, values[MOVING] * values[STATIC]

    deals.make(large)
    assert deals.path(STATIC).stat().st_size > 2 * PIECE
    (a, exact), (b, _) = deals.run(large)
    assert np.abs(shown([a, b]) - exact).max() < 2.0**-14


# -- files ---------------------------------------------------------------------


def test_files_are_for_their_owner_alone(deals):
    deals.make(product)
    for owner in OWNERS:
        path = deals.path(owner)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        data = path.read_bytes()
        deal = deals.open(owner)
        deal.close()
        assert deal.seed not in data and deal.seed.hex().encode() not in data
        assert deal.number.encode() in data


def test_a_deal_is_used_once(deals):
    deals.make(product)
    copies = {p: deals.folder / f"copy-{p}" for p in OWNERS}
    for owner, copy in copies.items():
        shutil.copy(deals.path(owner), copy)
    # Opened, or met in vain, it is not used yet.
    for session in deals.sessions():
        session.close()
    deals.run(product)
    for owner, copy in copies.items():
        shutil.copy(copy, deals.path(owner))
        with pytest.raises(DealError, match="was used already"):
            deals.open(owner)


def test_two_programs_at_once_do_not_both_use_it(deals):
    deals.make(product)
    one, other = deals.open(MOVING), deals.open(MOVING)
    one.use()
    one.use()
    with pytest.raises(DealError, match="was used already"):
        other.use()
    one.close(), other.close()


def test_a_mark_that_cannot_be_left(deals):
    deals.make(product)
    deals.home(MOVING).write_text("no folder")
    deal = deals.open(MOVING)
    with pytest.raises(DealError, match="cannot mark the deal as used"):
        deal.use()
    deal.close()


@pytest.mark.parametrize("part", [0, 5, 32, 200, 0.5, 1])
def test_files_that_are_cut_off(deals, part):
    deals.make(product)
    path = deals.path(MOVING)
    data = path.read_bytes()
    size = int(part * len(data)) if isinstance(part, float) else part
    path.write_bytes(data[:size] if part != 1 else data[:-1])
    with pytest.raises(DealError, match="copy it again"):
        deals.open(MOVING)


def test_files_that_are_none(deals):
    with pytest.raises(DealError, match="cannot read the helper's deal"):
        deals.open(MOVING)
    deals.path(MOVING).write_bytes(os.urandom(5000))
    with pytest.raises(DealError, match="no deal of a helper"):
        deals.open(MOVING)
    deals.path(MOVING).write_bytes(b"PPIRDEAL" + b"\xff" * 100)
    with pytest.raises(DealError, match="should have"):
        deals.open(MOVING)


def test_each_byte_counts(deals):
    """Wherever one is changed, it is found before anybody is met."""
    deals.make(product)
    path = deals.path(STATIC)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    places = rng.choice(len(data), 60, replace=False)
    for at in places:
        changed = bytearray(data)
        changed[at] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with pytest.raises(DealError):
            deals.open(STATIC)


def test_a_used_file_is_good_for_nothing_elsewhere(deals):
    """Without a mark, as in a key folder of before: the file has lost its end."""
    deals.make(product)
    deal = deals.open(MOVING)
    deal.use()
    deal.close()
    with pytest.raises(DealError, match="was used already"):
        deals.open(MOVING, folder=deals.folder / "key of before")


def test_a_file_that_cannot_be_used_up(deals, monkeypatch):
    deals.make(product)
    deal = deals.open(MOVING)

    def refused(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "pwrite", refused)
    with pytest.raises(DealError, match="put it where this account may write"):
        deal.use()
    deal.close()


def test_what_is_being_written_is_not_removed(deals):
    path = deals.path(MOVING)
    sealing, helper = deals.identities[MOVING].sealing, deals.identities[HELPER]
    writer = DealWriter(path, {}, MOVING, sealing, helper)
    assert remove_unfinished([path, deals.path(STATIC)]) == [] and path.exists()
    writer._stream.close()  # as where its program is killed
    assert remove_unfinished([path]) == [path] and not path.exists()


def test_a_file_that_may_not_be_written(deals, monkeypatch):
    """Is refused before anything is used up."""
    deals.make(product)
    as_it_is = open

    def read_only(path, mode="r", *args):
        if "+" in mode:
            raise PermissionError(13, "Permission denied")
        return as_it_is(path, mode, *args)

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(DealError, match="where this account may write"):
        deals.open(MOVING)


def test_a_deal_that_takes_the_name_of_one_in_use(deals):
    """It is not the one that is used up."""
    deals.make(product)
    deal = deals.open(MOVING)
    deals.path(MOVING).unlink()
    deals.make(product)
    deal.use()
    deal.close()
    deals.open(MOVING).close()


def test_a_sealing_key_that_is_none(deals):
    with pytest.raises(DealError, match="sealing key of the moving owner .* is none"):
        DealWriter(deals.path(MOVING), {}, MOVING, "00" * 32, None)


def test_deals_of_others(deals, tmp_path):
    deals.make(product)
    shutil.copy(deals.path(STATIC), tmp_path / "kept")
    deals.path(MOVING).rename(deals.path(STATIC))
    with pytest.raises(DealError, match="is the deal of the moving owner"):
        deals.open(STATIC)
    shutil.copy(tmp_path / "kept", deals.path(STATIC))
    with pytest.raises(DealError, match="sealed for another key"):
        Deal(
            deals.path(STATIC), STATIC, deals.plan, SOFTWARE, create_identity("another")
        )
    with pytest.raises(DealError, match="another numpy version"):
        deals.open(STATIC, software={"numpy version": "1"})
    deals.plan.digest = "0" * 64
    with pytest.raises(DealError, match="made for another session file"):
        deals.open(STATIC)


def test_a_helper_that_is_not_the_sessions(deals):
    """Whoever has the owners' sealing keys can write such a file."""
    helper, deals.identities[HELPER] = deals.identities[HELPER], create_identity("evil")
    deals.make(product)
    with pytest.raises(DealError, match="was not made by the helper"):
        deals.open(MOVING)
    deals.identities[HELPER] = helper
    deals.make(product)
    deals.open(MOVING).close()


@pytest.mark.parametrize(
    "facts",
    [{}, {"agreed": {"all": [3]}, "told": {}}, {"agreed": {}, "told": {"a": 1}}],
)
def test_a_helper_that_writes_something_else(deals, monkeypatch, facts):
    def finish(session):
        for writer in session.network.links.values():
            writer.finish(facts)

    monkeypatch.setattr(DealingSession, "finish", finish)
    deals.make(product)
    with pytest.raises(DealError, match="damaged"):
        deals.open(MOVING)


def test_sealing_keys_follow_from_identities():
    one, other = create_identity("A"), create_identity("A")
    assert len(bytes.fromhex(one.sealing)) == 32
    assert one.sealing == type(one)(one.key, one.certificate).sealing != other.sealing
    assert bytes.fromhex(one.sealing) != one.key.public_key().public_bytes_raw()
