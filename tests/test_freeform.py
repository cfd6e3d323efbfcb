"""Free-form registration of two parties, against the same in the clear."""

import warnings

from noise import check_uniform
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
from parties import local_trio, run_trio
import pytest
from scipy import ndimage

from dipy_ppir.align import RemoteImage, freeform_registration
from dipy_ppir.align import splinelevels as levels_of
from dipy_ppir.align.checkpoint import Checkpoint, CheckpointError
from dipy_ppir.align.freeform import (
    RESULT_UNIT,
    ClearFreeFormRegistration,
    SecureFreeFormRegistration,
)
from dipy_ppir.align.plausibility import MISMATCH, ImplausibleError
from dipy_ppir.align.splinelevels import opened_bits, shortened
from dipy_ppir.mpc.bsplines import Lattice
from dipy_ppir.mpc.errors import ParameterMismatchError, PeerError, ProtocolError
from dipy_ppir.mpc.freeform import (
    ClearSteps,
    OwnSteps,
    Samples,
    SharedSteps,
    largest,
    limited,
)
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.receipt import receipt_text

#: Steps to the last digits.
FINE = 2.0**-20
SHORT = {"level_iters": [4, 3], "factors": [2, 1]}


def bumps(dim, shape=None, size=2.0, seed=3):
    """A smooth image and the same deformed by so many voxels, with another grid."""
    shape = shape or ((44, 40) if dim == 2 else (22, 20, 24))
    rng = np.random.default_rng(seed)
    at = np.indices(shape).astype(np.float64)
    centre = np.reshape(np.array(shape) / 2, (-1,) + (1,) * dim)
    reach = np.reshape(np.array(shape) / 2.6, (-1,) + (1,) * dim)
    body = np.clip(1.3 - 1.3 * (((at - centre) / reach) ** 2).sum(axis=0), 0, 1)
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), 2.0)
    static = body * (0.6 + 0.4 * noise / np.abs(noise).max())
    for axis in range(dim):
        bump = ndimage.gaussian_filter(rng.standard_normal(shape), min(shape) / 6)
        at[axis] += size * bump / np.abs(bump).max()
    moving = ndimage.map_coordinates(static, at, order=3, mode="nearest")
    return static, np.clip(moving, 0, None)[tuple(slice(1, None) for _ in shape)]


def grids(dim):
    static = np.diag([1.5, 1.2, 2.0][:dim] + [1.0])
    static[:dim, dim] = [-4.0, 3.0, 1.0][:dim]
    moving = static.copy()
    moving[:dim, dim] += [1.5, 1.2, 2.0][:dim]
    prealign = np.eye(dim + 1)
    prealign[0, 1], prealign[:dim, dim] = 0.02, 0.5
    return {
        "static_grid2world": static,
        "moving_grid2world": moving,
        "prealign": prealign,
    }


def as_parties(session, static, moving, matrices, run):
    """Run with each party's own image."""
    matrices = dict(matrices)
    if session.pid != STATIC:
        static = RemoteImage(static.shape, matrices["static_grid2world"])
    if session.pid != MOVING:
        moving = RemoteImage(moving.shape, matrices["moving_grid2world"])
        matrices.pop("prealign", None)
    return run(static, moving, **matrices)


def registered(session, static, moving, matrices, **options):
    """The registration of a party, and its map."""
    registration = SecureFreeFormRegistration(
        len(static.shape), session=session, **options
    )
    mapping = as_parties(session, static, moving, matrices, registration.optimize)
    return registration, mapping


@pytest.fixture
def ended(outcomes):
    """What each of three fresh parties returned or raised."""

    def run(party):
        sessions = local_trio()
        try:
            return outcomes(sessions, party)
        finally:
            for session in sessions:
                session.close()

    return run


# -- the protocol --------------------------------------------------------------------


def operands(lattice, seed=2, count=None):
    rng = np.random.default_rng(seed)
    shape = lattice.shape if count is None else (count,)
    x = rng.integers(-4096, 4097, (len(lattice.shape), *shape))
    image, static = (rng.integers(0, 1025, s) for s in (shape, lattice.shape))
    return x, image, static


@pytest.mark.parametrize("kind", ["all", "known", "hidden"])
@pytest.mark.parametrize(
    "lattice", [Lattice((19, 17), (4, 4)), Lattice((9, 8, 10), (5, 3, 4))]
)
def test_steps_are_those_of_the_clear_to_their_precision(three, lattice, kind):
    count, samples = None, None
    voxels = int(np.prod(lattice.shape))
    if kind != "all":
        count = voxels // 3
        at = np.random.default_rng(1).choice(voxels, count, replace=False)
        samples = Samples(count, at, kind == "hidden")
    x, image, static = operands(lattice, count=count)
    bits = 24
    weights = np.random.default_rng(4).uniform(
        0, 1e-6, (len(x), *lattice.control_shape)
    )
    weights = limited(weights, x, image, lattice, samples, bits)
    own = OwnSteps(x, image, weights)
    clear = ClearSteps()
    clear.begin(lattice, static)
    wanted = clear.steps(bits, own, samples)
    assert 0 < np.abs(wanted).max() <= largest(bits)

    def party(session):
        steps = SharedSteps(session)
        steps.begin(lattice, static if session.pid == STATIC else None)
        mine = own if session.pid == MOVING else None
        out = []
        for _ in range(2):
            known = samples
            if kind == "hidden":
                known = samples if session.pid == MOVING else Samples(count, None, True)
                known = steps.samples(known)
                assert (known.at is None) == (session.pid == HELPER)
            out.append(steps.steps(bits, mine, known))
        return out

    first, second = three(party)[MOVING]
    assert_allclose(first, wanted, atol=1.0)
    assert_allclose(second, wanted, atol=1.0)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_weights_keep_to_the_range_at_the_worst_image(axis, sign):
    """The pair of images that makes steps along an axis largest fills the range."""
    lattice, bits = Lattice((12, 11), (3, 4)), 7
    x, *_ = operands(lattice)
    image = np.where(sign * x[axis] > 0, 1024, 0)
    huge = np.full((2, *lattice.control_shape), 1e3)
    weights = limited(huge, x, image, lattice, None, bits)
    clear = ClearSteps()
    clear.begin(lattice, 1024 - image)
    steps = clear.steps(bits, OwnSteps(x, image, weights))
    assert np.abs(steps).max() <= largest(bits)
    assert (sign * steps[axis]).max() == largest(bits)


@pytest.mark.parametrize("kind", ["all", "known", "hidden"])
def test_rounds_and_bytes_are_as_stated(trio, depth, kind):
    lattice = Lattice((15, 14), (4, 4))
    n, voxels = 2 * lattice.size, 15 * 14
    count = voxels if kind == "all" else 60
    samples = None
    if kind != "all":
        samples = Samples(count, np.arange(count), kind == "hidden")
    shape = None if kind == "all" else count
    x, image, static = operands(lattice, count=shape)
    weights = limited(
        np.ones((2, *lattice.control_shape)), x, image, lattice, samples, 9
    )
    steps = [SharedSteps(s) for s in trio]

    def begin(session):
        steps[session.pid].begin(lattice, static if session.pid == STATIC else None)

    def step(session):
        own = OwnSteps(x, image, weights) if session.pid == MOVING else None
        known = samples
        if kind == "hidden":
            at = samples.at if session.pid == MOVING else None
            known = steps[session.pid].samples(Samples(count, at, True))
        steps[session.pid].steps(9, own, known)

    sent = {
        "all": {MOVING: 2 * count + n, STATIC: 2 * n, HELPER: 3 * n},
        "hidden": {
            MOVING: 2.5 * count + n,
            STATIC: count + 2 * n,
            HELPER: 2 * count + 2 * n,
        },
    }
    expected = [
        (begin, 1, {STATIC: voxels}),
        (step, 4 if kind == "hidden" else 2, sent.get(kind, sent["all"])),
    ]
    for function, deep, words in expected:
        before = [sum(s.ledger.sent.values()) for s in trio]
        rounds = depth(trio)
        run_trio(trio, function)
        assert rounds() == deep
        for s in trio:
            gone = sum(s.ledger.sent.values()) - before[s.pid]
            assert gone == 8 * words.get(s.pid, 0)
    opened = trio[MOVING].ledger.learned()["moving owner"]
    assert [e["bits"] for e in opened] == [9 * n]


@pytest.mark.parametrize("hidden", [False, True])
def test_what_is_sent_is_uniform_whatever_the_images(trio, tap, hidden):
    """But for where samples are, and what is opened: images of zeros show masks."""
    frames, lattice = tap(trio), Lattice((40, 30), (3, 3))
    samples = Samples(900, np.arange(900), True) if hidden else None
    shape = (900,) if hidden else lattice.shape
    zeros = np.zeros((2, *shape), np.int64)
    own = OwnSteps(zeros, zeros[0], np.zeros((2, *lattice.control_shape), np.int64))

    def party(session):
        steps = SharedSteps(session)
        known = np.zeros(lattice.shape, np.int64) if session.pid == STATIC else None
        steps.begin(lattice, known)
        for _ in range(3):
            at = samples
            if hidden:
                where = None if session.pid == HELPER else samples.at
                at = Samples(900, where, True)
            steps.steps(12, own if session.pid == MOVING else None, at)

    run_trio(trio, party)
    arrays = [np.frombuffer(f[4], np.uint64) for f in frames]
    sent = np.concatenate(arrays)
    check_uniform([sent >> np.uint64(60), sent & np.uint64(15)], "all")
    for k, first in enumerate(arrays):
        for second in arrays[k + 1 :]:
            assert len(first) != len(second) or not np.array_equal(first, second)


def test_a_static_owner_takes_no_samples_that_are_none(ended):
    lattice = Lattice((8, 8), (4, 4))

    def party(session):
        steps = SharedSteps(session)
        steps.begin(lattice, np.zeros((8, 8), np.int64) if session.pid == 1 else None)
        at = np.array([3, 64]) if session.pid == MOVING else None
        return steps.samples(Samples(2, at, True))

    raised = ended(party)[STATIC]
    assert isinstance(raised, ProtocolError) and "voxels that there are not" in str(
        raised
    )


# -- the optimizer -------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_it_finds_a_deformation(dim):
    """Half of the difference that noise and interpolation leave, and no fold."""
    static, moving = bumps(dim)
    matrices = grids(dim)
    registration = ClearFreeFormRegistration(dim=dim, ret_metric=True, spacing=4)
    mapping = registration.optimize(static, moving, **matrices)
    before = ClearFreeFormRegistration(
        dim=dim, ret_metric=True, spacing=4, level_iters=[1, 0, 0, 0], max_step=1e-9
    )
    before.optimize(static, moving, **matrices)
    assert registration.value < before.value / 10
    assert not registration.mismatched
    warped = mapping.transform(moving)
    inner = tuple(slice(3, -3) for _ in range(dim))
    assert np.corrcoef(static[inner].ravel(), warped[inner].ravel())[0, 1] > 0.98
    back = mapping.transform_inverse(warped)
    inner = tuple(slice(5, -5) for _ in range(dim))
    assert np.corrcoef(moving[inner].ravel(), back[inner].ravel())[0, 1] > 0.97


def test_a_level_goes_on_where_the_one_above_ended():
    """A spline fitted to a smooth one is the same at the voxels, in smaller ones."""
    registration = ClearFreeFormRegistration(dim=2, factors=[2, 1], level_iters=[1, 1])
    registration._set_up(
        {
            "static": np.random.default_rng(1).random((41, 36)),
            "moving": np.random.default_rng(2).random((41, 36)),
            "static_grid2world": np.eye(3),
            "moving_grid2world": np.eye(3),
        },
        None,
    )
    levels = levels_of.SplineLevels(registration, ClearSteps())
    above, now = levels.lattice(1), levels.lattice(0)
    controls = np.random.default_rng(3).standard_normal((2, *above.control_shape))
    controls = ndimage.gaussian_filter(controls, (0, 1.5, 1.5))
    fitted = now.values(levels.first(0, controls))[:, ::2, ::2][:, :20, :18]
    wanted = 2 * above.values(controls)
    assert np.abs(fitted - wanted).max() < 0.1 * np.abs(wanted).max()


def test_a_step_does_not_fold():
    lattice = Lattice((30, 30), (5, 5))
    controls = np.zeros((2, *lattice.control_shape))
    step = np.random.default_rng(1).standard_normal(controls.shape) * 20
    moved = lattice.values(shortened(controls, step, lattice))
    rows = [np.stack(np.gradient(u), -1) for u in moved]
    assert np.linalg.det(np.stack(rows, -2) + np.eye(2)).min() > 0
    small = step / 1000
    assert_array_equal(shortened(controls, small, lattice), small)


# -- two parties ---------------------------------------------------------------------


@pytest.mark.parametrize("parties", ["three", "two"])
@pytest.mark.parametrize(
    ("dim", "options"),
    [
        (2, {}),
        (3, {}),
        (2, {"sampling_proportion": 0.4}),
        (2, {"sampling_proportion": 0.4, "sampling": "GMS"}),
    ],
)
def test_shares_agree_with_the_clear(request, monkeypatch, dim, options, parties):
    monkeypatch.setattr(SharedSteps, "draws", ClearSteps.draws)
    static, moving = bumps(dim)
    options = {**SHORT, "spacing": 4, "precision": FINE, "ret_metric": True, **options}
    clear = ClearFreeFormRegistration(dim=dim, **options)
    wanted = clear.optimize(static, moving, **grids(dim))
    counts = {}

    def party(session):
        stages = counts[session.pid] = []
        return registered(
            session,
            static,
            moving,
            grids(dim),
            callback=lambda r, stage: stages.append(stage),
            **options,
        )

    results = request.getfixturevalue(parties)(party)
    moving_side, static_side = results[MOVING][1], results[STATIC][1]
    assert all(mapping is None for _, mapping in results[HELPER:])
    spacing = np.diagonal(grids(dim)["static_grid2world"])[:dim]
    apart = moving_side.get_forward_field() - wanted.get_forward_field()
    assert np.sqrt(((apart / spacing) ** 2).sum(axis=-1).mean()) < 0.01 + RESULT_UNIT
    assert_array_equal(moving_side.get_forward_field(), static_side.get_forward_field())
    assert_array_equal(
        moving_side.get_backward_field(), static_side.get_backward_field()
    )
    assert_allclose(moving_side.transform(moving), static_side.transform(moving))
    assert len(counts) == len(results)
    assert all(stages == counts[MOVING] for stages in counts.values())
    registration = results[MOVING][0]
    assert registration.value == pytest.approx(clear.value, abs=2.0**-15)
    assert results[STATIC][0].value is None
    assert not any(r.receipt["warnings"] for r, _ in results)


def test_rounded_steps_lead_near(three):
    """Half a voxel on average over the object, whose deviation is a sixth of that."""
    static, moving = bumps(2)
    options = {**SHORT, "spacing": 4}
    wanted = ClearFreeFormRegistration(dim=2, precision=FINE, **options).optimize(
        static, moving, **grids(2)
    )
    got = three(lambda s: registered(s, static, moving, grids(2), **options))[MOVING]
    apart = got[1].get_forward_field() - wanted.get_forward_field()
    spacing = np.diagonal(grids(2)["static_grid2world"])[:2]
    squares = ((apart / spacing) ** 2).sum(axis=-1)[static > 0.1]
    assert np.sqrt(squares.mean()) < 1.0


def test_the_receipt_says_what_was_opened(three):
    static, moving = bumps(2)
    results = three(
        lambda s: registered(s, static, moving, grids(2), opt_tol=0, **SHORT)
    )
    for registration, _ in results:
        learned = registration.receipt["learned"]
        labels = {e["label"]: e for e in learned["moving owner"]}
        assert set(labels) == {"control_point_steps", "mismatch"}
        sizes = [
            2 * Lattice([n // f for n in static.shape], (5, 5)).size for f in (2, 1)
        ]
        wanted = [4 * sizes[0], 3 * sizes[1]]
        assert labels["control_point_steps"]["values"] == sum(wanted)
        bits = [wanted[k] * opened_bits(0.5 / f) for k, f in enumerate((2, 1))]
        assert labels["control_point_steps"]["bits"] == sum(bits)
        assert {e["label"] for e in learned["static owner"]} == {
            "control_points",
            "prealign",
            "mismatch",
        }
        assert learned["helper"] == []
        assert registration.receipt["operation"] == "freeform"
    text = receipt_text(results[MOVING][0].receipt)
    assert "can rebuild much of the static image" in text
    assert "No voxel of an image was shown" not in text


@pytest.mark.parametrize("to", ["moving", "static"])
def test_only_who_gets_the_result_has_it(three, to):
    static, moving = bumps(2)
    results = three(
        lambda s: registered(s, static, moving, grids(2), result_to=to, **SHORT)
    )
    owner = MOVING if to == "moving" else STATIC
    assert [m is not None for _, m in results] == [p == owner for p in range(3)]
    labels = {e["label"] for e in results[0][0].receipt["learned"]["static owner"]}
    assert ("control_points" in labels) == (to == "static")


@pytest.mark.parametrize("parties", ["three", "two"])
def test_images_that_do_not_match_are_told(request, parties):
    run, (static, _) = request.getfixturevalue(parties), bumps(2)
    other = np.random.default_rng(1).random(static.shape)
    matrices = {**grids(2), "moving_grid2world": grids(2)["static_grid2world"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = run(lambda s: registered(s, static, other, matrices, **SHORT))
    assert MISMATCH in results[MOVING][0].receipt["warnings"]
    assert MISMATCH in results[STATIC][0].receipt["warnings"]
    with pytest.raises(ImplausibleError, match="hardly match"):
        run(lambda s: registered(s, static, other, matrices, strict=True, **SHORT))


def test_a_moving_owner_that_asks_for_more_iterations_is_refused(ended, monkeypatch):
    static, moving = bumps(2)
    goes_on = SharedSteps.goes_on

    def greedy(self, choice, refuse):
        return goes_on(self, choice or self.session.pid == MOVING, refuse)

    monkeypatch.setattr(SharedSteps, "goes_on", greedy)
    raised = ended(lambda s: registered(s, static, moving, grids(2), **SHORT))
    # Whichever of the others finds it first: then all have ended.
    refused = [e for e in raised[1:] if isinstance(e, ProtocolError)]
    assert refused
    assert all("more iterations than were agreed" in str(e) for e in refused)
    assert all(isinstance(e, PeerError) for e in raised)


def test_parties_must_agree(ended):
    static, moving = bumps(2)
    raised = ended(
        lambda s: registered(
            s, static, moving, grids(2), precision=0.5 / (1 + s.pid), **SHORT
        ),
    )
    assert all(isinstance(e, ParameterMismatchError) for e in raised)
    assert "'precision'" in str(raised[0])


# -- going on after an interruption --------------------------------------------------


@pytest.mark.parametrize("victim", [MOVING, STATIC])
def test_it_goes_on_at_the_level_where_it_was(tmp_path, ended, victim):
    static, moving = bumps(2)
    options = {**SHORT, "precision": FINE, "opt_tol": 0}
    wanted = ClearFreeFormRegistration(dim=2, **options).optimize(
        static, moving, **grids(2)
    )

    def party(session, resume, dies):
        def callback(registration, stage):
            if dies and (registration.current_level, registration.niter) == (0, 1):
                raise KeyboardInterrupt

        checkpoint = Checkpoint(tmp_path / str(session.pid), resume=resume)
        return registered(
            session,
            static,
            moving,
            grids(2),
            checkpoint=checkpoint,
            callback=callback if session.pid == victim else None,
            **options,
        )

    ended(lambda s: party(s, False, True))
    results = ended(lambda s: party(s, True, False))
    receipt, mapping = results[MOVING][0].receipt, results[MOVING][1]
    assert receipt["resumed"] == 1
    apart = mapping.get_forward_field() - wanted.get_forward_field()
    assert np.abs(apart).max() < 0.2
    (steps,) = (
        e
        for e in receipt["learned"]["moving owner"]
        if e["label"] == "control_point_steps"
    )
    # All of the first level once, and what of the second had begun again.
    sizes = [2 * Lattice([n // f for n in static.shape], (5, 5)).size for f in (2, 1)]
    again = steps["values"] - 4 * sizes[0] - 3 * sizes[1]
    assert 0 < again <= 3 * sizes[1]
    for _ in range(2):
        ended(lambda s: party(s, True, True))
    raised = ended(lambda s: party(s, True, False))
    assert any(isinstance(e, CheckpointError) for e in raised)


# -- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": 1}, "spacing must be an integer from 2 to 32"),
        ({"spacing": 33}, "spacing must be an integer from 2 to 32"),
        ({"sampling_proportion": 0.0}, "sampling_proportion must be a number above 0"),
        ({"sampling_proportion": 1.5}, "sampling_proportion must be a number above 0"),
        ({"sampling": "GMS"}, "needs sampling_proportion"),
        ({"static_mask": np.ones((44, 40))}, "there is no parameter 'static_mask'"),
        ({"factors": [8, 4, 2]}, "one entry per level"),
        ({"factors": [8, 4, 2, 2]}, "must end in 1"),
        ({"factors": [64, 4, 2, 1]}, "factor 64 leaves 0"),
        ({"intensities": [1.0, 1.0]}, "the lower one first"),
        ({"precision": 0.0}, "precision must be a number"),
        ({"dim": 3}, "give the right dim"),
    ],
)
def test_parameters_that_cannot_be_used(options, message):
    static, moving = bumps(2)
    with pytest.raises((ValueError, TypeError), match=message):
        freeform_registration(
            moving,
            static,
            moving_affine=np.eye(3),
            static_affine=np.eye(3),
            **{"dim": 2, **options},
        )


def test_images_that_cannot_be_used():
    static, moving = bumps(2)
    far = np.eye(3)
    far[0, 2] = 1000

    def register(static, moving, affine=None, **options):
        freeform_registration(
            moving,
            static,
            moving_affine=np.eye(3) if affine is None else affine,
            static_affine=np.eye(3),
            dim=2,
            **options,
        )

    with pytest.raises(ValueError, match="the moving image is constant"):
        register(static, np.ones_like(moving))
    with pytest.raises(ValueError, match="leaves no room.*give a smaller spacing"):
        register(static[:, :30], moving, spacing=30)
    with pytest.raises(ValueError, match="do not overlap"):
        register(static, moving, far)
    with pytest.raises(ValueError, match="maps the static image outside"):
        register(static, moving, prealign=far)
    with pytest.raises(ValueError, match="NaN or infinite"):
        register(static, np.full_like(moving, np.nan))


# -- as users have it ----------------------------------------------------------------


def test_processes_of_this_machine():
    static, moving = bumps(2)
    grid = grids(2)
    arguments = {
        "moving_affine": grid["moving_grid2world"],
        "static_affine": grid["static_grid2world"],
        "prealign": grid["prealign"],
    }
    warped, mapping, value, receipt = freeform_registration(
        moving, static, dim=2, ret_metric=True, ret_receipt=True, **SHORT, **arguments
    )
    assert warped.shape == static.shape and mapping is not None
    assert 0 < value < 0.05
    assert receipt["metric"]["value"] == value
    assert receipt["bits"]["helper"] == 0


def test_images_that_match_stay_where_they_are():
    """What is shown of no step is noise, and none of it is taken for a step."""
    static, _ = bumps(2)
    registration = SecureFreeFormRegistration(2, spacing=4, **SHORT)
    mapping = registration.optimize(static, static.copy())
    assert not mapping.get_forward_field().any()
    assert registration.receipt["warnings"] == []
