"""Affine registration with hidden steps: what it finds, and what it shows."""

from pathlib import Path
import re
import threading

from dipy.align import vector_fields as vf
from dipy.align.imaffine import AffineRegistration, MutualInformationMetric
from dipy.align.parzenhist import ParzenJointHistogram
from dipy.align.transforms import regtransforms
from dipy.core.interpolation import interpolate_scalar_2d, interpolate_scalar_3d
import noise
import numpy as np
from parties import local_trio, run_trio
import pytest
from test_on_shares import (
    LEVELS,
    WHICH,
    ball,
    clear,
    distance,
    heavy_unless,
    labels,
    mutual_information,
    register,
    with_own_images,
)

from dipy_ppir.align import affine_registration, hidden, plan, quasinewton
from dipy_ppir.align._public import planned_bits
from dipy_ppir.align.checkpoint import Checkpoint
from dipy_ppir.align.frames import GROUPS, Frame
from dipy_ppir.align.hidden import (
    FRAME_DIGITS,
    LARGEST_FRAME,
    FramedMutualInformation,
    averaged,
    minimise_hidden,
    result_bits,
)
from dipy_ppir.align.imaffine import (
    SecureAffineRegistration,
    SecureMutualInformationMetric,
)
from dipy_ppir.align.parameters import AffineParameters
from dipy_ppir.align.quasinewton import SCALE, UNIT, ClearNumbers
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.receipt import receipt_text
from dipy_ppir.mpc.session import Session

KINDS = [(kind, dim) for dim in (2, 3) for kind in GROUPS]
HIDDEN = {"hide_steps": True}
ONE_LEVEL = {"level_iters": [16], "sigmas": [0.0], "factors": [1], "options": None}


@pytest.fixture(autouse=True)
def same_randomness(monkeypatch):
    """Rounding is by chance in part, and frames move at random."""
    noise.fix_randomness(monkeypatch)
    noise.fix_frames(monkeypatch)


# -- what is found -----------------------------------------------------------------


@pytest.mark.parametrize(
    "ttype",
    heavy_unless([k for k in KINDS if k[1] == 2 or k[0] in ("RIGID", "AFFINE")], KINDS),
    ids=lambda t: f"{t[0]}{t[1]}",
)
def test_every_group_is_found_as_well_as_by_dipy(bodies, ttype):
    pair = bodies(ttype[1])
    found, _ = register(pair, ttype, metric=HIDDEN, settings={"level_iters": [30, 30]})
    expected = clear(pair, ttype)
    assert mutual_information(pair, found.affine) > (
        mutual_information(pair, expected.affine) - 0.03
    )


class ClearFramed:
    """What `FramedMutualInformation` computes, in the clear by DIPY's functions."""

    def __init__(self, pair, kind, start=None, nbins=32):
        static, moving, self.static_grid2world, self.moving_grid2world = pair
        self.dim = static.ndim
        self.start = np.eye(self.dim + 1) if start is None else start
        self.static, self.moving = (
            (image - image.min()) / (image.max() - image.min())
            for image in (static, moving)
        )
        self.histogram = ParzenJointHistogram(nbins)
        self.histogram.setup(self.static, self.moving)
        self.frame = Frame(
            static.shape, self.static_grid2world, moving.shape, self.moving_grid2world
        )
        self.generators = self.frame.generators(regtransforms[kind, self.dim])
        self.numbers = ClearNumbers()

    def evaluate(self, matrix):
        dim, frame = self.dim, self.frame
        change = frame.draw()
        whole = np.vstack([matrix, np.eye(dim + 1)[-1]])
        affine = self.start @ frame.world(whole @ change)
        grid = np.indices(self.static.shape).reshape(dim, -1)
        points = np.vstack([grid, np.ones(grid.shape[1])])
        points = (self.static_grid2world @ points).T
        look_up = interpolate_scalar_2d if dim == 2 else interpolate_scalar_3d
        to_voxels = np.linalg.inv(self.static_grid2world)
        voxels = (points @ (to_voxels @ frame.world(change)).T)[:, :dim]
        last = np.array(self.static.shape) - 1
        inside = np.clip(voxels, 0, last)
        keep = (np.abs(inside - voxels) < 1e-6).all(axis=1)
        static, _ = look_up(self.static, np.ascontiguousarray(inside[keep]))
        moved = points @ affine.T
        to_voxels = np.linalg.inv(self.moving_grid2world)
        voxels = np.ascontiguousarray((moved @ to_voxels.T)[:, :dim])
        moving = np.asarray(look_up(self.moving, voxels)[0])
        spacing = np.linalg.norm(self.moving_grid2world[:dim, :dim], axis=0)
        gradient, _ = vf.sparse_gradient(
            self.moving, to_voxels, spacing, np.ascontiguousarray(moved[:, :dim])
        )
        histogram = self.histogram
        histogram.update_pdfs_sparse(np.asarray(static), moving[keep])
        turned = frame.turned(change, self.generators)
        along, self.columns = (
            np.einsum(
                "nd,kde,ne->nk",
                np.asarray(gradient, float),
                affine[:dim, :dim] @ frame.directions(generators),
                points,
            )
            for generators in (frame.affine, self.generators)
        )
        # The moving owner does not know which samples are left out.
        self.values, self.count = moving, keep.sum()
        twin = quasinewton._ClearMetric.__new__(quasinewton._ClearMetric)
        twin.metric = type("Metric", (), {"histogram": histogram})
        bins = np.asarray(static) / histogram.sdelta - histogram.smin
        most = histogram.nbins - histogram.padding - 1
        twin._static_bins = np.clip(bins.astype(int), histogram.padding, most)
        joint = histogram.joint
        product = joint.sum(axis=1)[:, None] * joint.sum(axis=0)
        some = joint > 0
        value = -(joint[some] * np.log(joint[some] / product[some])).sum()
        fix = self.numbers.fix
        slope = fix(twin._scores(moving[keep]) @ along[keep] * SCALE)
        return fix(value * SCALE), fix(turned @ slope)

    def first_inverse(self, numbers):
        moments = quasinewton.bin_moments(self.columns, self.values, self.histogram)
        mine = quasinewton.regular_inverse(moments, self.histogram.mdelta)
        slopes = quasinewton.mean_slopes(self.histogram.joint, UNIT / self.count)
        return quasinewton.first_inverse(numbers, *mine, slopes, self.columns.shape[1])


@pytest.mark.parametrize("ttype", [("RIGID", 2), ("AFFINE", 2), ("AFFINE", 3)])
def test_as_its_clear_twin(bodies, ttype, monkeypatch):
    """The same frames in the clear lead to the same steps.

    The gradient is on shares to some parts of a thousand, of which the differences of
    gradients in the update make more. A length is known to a factor of a root of two,
    by chance; so that both take the same steps, the part of one is the same here for
    lengths from 1 to 8 units.
    """

    def parts(longest, part):
        one = quasinewton.SQUARE_DIGITS
        return [part / 8 ** max((k - one) // 6, 0) for k in range(64)]

    monkeypatch.setattr(hidden, "parts_by_size", parts)
    kind, dim = ttype
    pair = bodies(dim)
    start = clear(pair, ttype).affine
    start[:dim, dim] += [0.5, -0.4, 0.3][:dim]
    draws, draw = [], Frame.draw

    def drawn(frame):
        draws.append(draw(frame))
        return draws[-1]

    monkeypatch.setattr(Frame, "draw", drawn)
    settings = {**ONE_LEVEL, "level_iters": [4]}
    found, _ = register(pair, ttype, metric=HIDDEN, start=start, settings=settings)
    assert len(draws) == 4
    again = iter(draws)
    monkeypatch.setattr(Frame, "draw", lambda frame: next(again))
    metric = ClearFramed(pair, kind, start)
    change = minimise_hidden(ClearNumbers(), metric, np.eye(dim + 1)[:dim], 4, 3.2)
    change = metric.frame.world(np.vstack([change, np.eye(dim + 1)[-1]]))
    moved = distance(found.affine, start, pair[0], pair[2])
    assert moved > 0.15
    assert distance(found.affine, start @ change, pair[0], pair[2]) < 0.1 * moved


# With a static mask alone: also the next test.
@pytest.mark.parametrize("which", heavy_unless(["moving", "both"], WHICH))
def test_masks(bodies, which):
    pair = bodies(3)
    masks = {}
    for name, image in zip(("static", "moving"), pair[:2], strict=True):
        if which in (name, "both"):
            masks[name + "_mask"] = ball(image, 0.8)
    found, _ = register(pair, ("RIGID", 3), metric=HIDDEN, start="centers", **masks)
    expected = clear(pair, ("RIGID", 3)).affine
    assert distance(found.affine, expected, pair[0], pair[2]) < 0.7


def test_a_mask_matters(bodies):
    """What is outside it is not looked at: there the images contradict each other."""
    static, moving, *grids = bodies(3)
    mask = ball(static, 0.85)
    spoilt = np.where(mask, static, np.roll(static, 6, axis=0)[::-1] * 3)
    options = {"metric": HIDDEN, "start": "centers", "static_mask": mask}
    found = [
        register((image, moving, *grids), ("RIGID", 3), **options)[0].affine
        for image in (static, spoilt)
    ]
    assert distance(*found, static, grids[0]) < 0.4


def test_by_samples_of_a_large_level(bodies, monkeypatch):
    monkeypatch.setattr("dipy_ppir.align.plan.EVERY_VOXEL", 0)
    pair = bodies(3)
    metric = {"sampling_proportion": 0.4, **HIDDEN}
    found, _ = register(pair, ("RIGID", 3), metric=metric)
    expected = clear(pair, ("RIGID", 3))
    assert distance(found.affine, expected.affine, pair[0], pair[2]) < 0.5


def test_a_far_origin_and_a_start_that_turns(bodies):
    """A matrix of the moving owner's; the result is relative to it."""
    static, moving, *grids = bodies(3)
    shift = np.eye(4)
    shift[:3, 3] = 1200, -900, 400
    far = [shift @ grid for grid in grids]
    start = np.eye(4)
    start[:2, :2] = [np.cos(0.1), np.sin(0.1)], [-np.sin(0.1), np.cos(0.1)]
    start[2, 3] = 0.5
    start = shift @ start @ np.linalg.inv(shift)
    settings = {"level_iters": [30, 30]}
    found, _ = register(
        (static, moving, *far),
        ("RIGID", 3),
        metric=HIDDEN,
        start=start,
        settings=settings,
    )
    expected = clear((static, moving, *grids), ("RIGID", 3))
    back = np.linalg.inv(shift) @ found.affine @ shift
    assert distance(back, expected.affine, static, grids[0]) < 0.5
    linear = found.affine[:3, :3] @ np.linalg.inv(start[:3, :3])
    assert np.abs(linear @ linear.T - np.eye(3)).max() < 1e-9


# -- what is shown -----------------------------------------------------------------


def whole(pair, **options):
    static, moving, static_affine, moving_affine = pair
    return affine_registration(
        moving,
        static,
        static_affine=static_affine,
        moving_affine=moving_affine,
        ret_receipt=True,
        hide_steps=True,
        **options,
    )


@pytest.mark.parametrize("ret_metric", heavy_unless([True], [False, True]))
def test_receipt(bodies, ret_metric):
    """A pipeline shows its result once, and before it what was planned."""
    pair = bodies(3)
    *result, receipt = whole(pair, ret_metric=ret_metric)
    learned = labels(receipt, "moving owner")
    value = {"final_value"} if ret_metric else set()
    shown = {"center_of_mass", "moved_frame", "transform", "mismatch"}
    assert set(learned) == shown | value
    # Evaluations of the translation, the rigid and the affine transform.
    assert learned["moved_frame"]["values"] == 12 * (4 + 18 + 30)
    assert learned["transform"]["values"] == 12
    assert learned["transform"]["openings"] == 1
    assert learned["moved_frame"]["bits"] + learned["center_of_mass"]["bits"] < 200
    planned = planned_bits(AffineParameters(hide_steps=True), 3)
    found = sum(learned[name]["bits"] for name in ("moved_frame", "transform"))
    assert found == pytest.approx(planned - 3 * 52 - 1, abs=0.2)
    end = {"affine", "mismatch", "stuck"}
    assert set(labels(receipt, "static owner")) == end
    assert receipt["bits"]["helper"] == 0
    if ret_metric:
        _, affine, xopt, fopt = result
        assert xopt.shape == (12,)
        assert abs(fopt + mutual_information(pair, affine)) < 5e-3


def test_all_parties_get_the_result(bodies, trio):
    pair = bodies(3)
    moving, static, helper = run_trio(
        trio, lambda s: with_own_images(s, pair, hide_steps=True)
    )
    assert np.abs(static[1] - moving[1]).max() <= 2.0**-60
    assert helper[:2] == (None, None)
    linear = moving[1][:3, :3]
    assert np.abs(linear @ linear.T - np.eye(3)).max() < 1e-9
    learned = [r[-1]["learned"] for r in (moving, static, helper)]
    assert learned[0] == learned[1] == learned[2]


@pytest.mark.parametrize("scale", heavy_unless([1.0, 1e-6], [1.0, 1e-3, 1e-6]))
def test_what_is_shown_moves_at_random(bodies, monkeypatch, scale):
    """Frames of two runs that take the same steps are apart as jitter is.

    With no step at all: the transform stays where it was, and what is shown is the
    identity in frames whose movement has the size that the receipt's bits rest on,
    wherever the moving owner starts.
    """
    monkeypatch.setattr(hidden, "parts_by_size", lambda longest, part: [0.0] * 64)
    shown, open_all = [], Session.open_all

    def seen(session, openings, **options):
        opened = open_all(session, openings, **options)
        if session.pid == MOVING and openings[0][1] == "moved_frame":
            shown.append(opened[0])
        return opened

    monkeypatch.setattr(Session, "open_all", seen)
    pair = bodies(2)
    settings = {**ONE_LEVEL, "level_iters": [16], "options": {"evaluations": 2}}
    start = np.diag([scale, scale, 1])
    monkeypatch.setattr("dipy_ppir.align.imaffine.check_start", lambda *_: None)
    monkeypatch.setattr(hidden, "nearest_parameters", lambda *_: np.zeros(3))
    for _ in range(4):
        register(pair, ("RIGID", 2), metric=HIDDEN, start=start, settings=settings)
    moved = np.array(shown) - np.eye(3)[:2]
    assert len(moved) == 64
    points = np.random.default_rng(1).standard_normal((3, 4000)) / np.sqrt(2)
    points[2] = 1
    sizes = np.sqrt(((moved @ points) ** 2).sum(axis=1).mean(axis=1))
    unit = quasinewton.SIZE_PART
    # 10 and 8 units, root mean square; each run's sizes are a few units apart.
    assert 9 * unit < np.sqrt((sizes**2).mean()) < 17 * unit
    assert len({s.tobytes() for s in shown}) == 64


def test_where_steps_may_have_ended_on_their_way(bodies, trio):
    """Few of them, without the centres of mass: a warning says so."""
    pair, few = bodies(2), {"pipeline": ["rigid"], "level_iters": [3, 3]}
    with pytest.warns(UserWarning, match="moved by .* mm, and hidden steps add up to"):
        run_trio(trio, lambda s: with_own_images(s, pair, hide_steps=True, **few))


@pytest.mark.filterwarnings("ignore:the image was moved")
def test_a_result_that_was_shown_before_an_interruption_counts(
    bodies, monkeypatch, tmp_path
):
    """Whoever takes it, stops and goes on is shown another one: both count."""
    pair, show, shown = bodies(2), hidden.show, []

    def stopped(session, found):
        result = show(session, found)
        if session.pid == MOVING:
            shown.append(result)
            raise RuntimeError("stopped")
        return result

    def party(session, resume):
        checkpoint = Checkpoint(tmp_path / str(session.pid), resume=resume)
        return with_own_images(
            session,
            pair,
            pipeline=["rigid"],
            checkpoint=checkpoint,
            ret_metric=True,
            hide_steps=True,
        )

    def run(resume):
        sessions = local_trio()
        try:
            return run_trio(sessions, lambda s: party(s, resume))
        finally:
            for session in sessions:
                session.close()

    monkeypatch.setattr("dipy_ppir.align.imaffine.show", stopped)
    with pytest.raises(RuntimeError, match="stopped"):
        run(resume=False)
    assert len(shown) == 1
    monkeypatch.setattr("dipy_ppir.align.imaffine.show", show)
    for *_, receipt in run(resume=True):
        transform = labels(receipt, "moving owner")["transform"]
        assert transform["openings"] == 2
        assert labels(receipt, "moving owner")["final_value"]["openings"] == 2
        assert transform["bits"] == 2 * result_bits(2)
        assert receipt["resumed"] == 1


def test_what_may_be_shown_at_most_and_what_receipts_say(bodies):
    """The bound on bits is for programs that are followed; words hold some more."""
    places = FRAME_DIGITS + LARGEST_FRAME.bit_length()
    security = (Path(__file__).parents[1] / "doc" / "security.md").read_text()
    assert f"{places} bits" in security
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        open_all = Session.open_all

        def seen(session, openings, **options):
            sent.extend(a.frac_bits for a, label, _ in openings if "frame" in label)
            return open_all(session, openings, **options)

        patch.setattr(Session, "open_all", seen)
        *_, receipt = whole(bodies(2), pipeline=["rigid"])
    assert "an owner that does not can be shown more" in receipt_text(receipt)
    assert "final_value" not in labels(receipt, "moving owner")
    # Of a word of 64 bits all that are below are zero.
    assert set(sent) == {FRAME_DIGITS + 64 - places}


def test_progress_is_without_values(bodies):
    steps = []
    whole(bodies(2), callback=steps.append)
    assert len(steps) == 52
    assert not any("value" in step for step in steps)


@pytest.mark.parametrize("ttype", [("RIGID", 2), ("AFFINE", 3)])
def test_rounds_of_an_evaluation(bodies, trio, depth, monkeypatch, ttype):
    """What its docstring adds to those of an evaluation that is not in a frame."""
    kind, dim = ttype
    pair, together, counted = bodies(dim), threading.Barrier(3), {}

    def measured(session, name, function):
        together.wait()
        if session.pid == MOVING:
            count = depth(trio)
        together.wait()
        function()
        together.wait()
        if session.pid == MOVING:
            counted[name] = count()

    def evaluations(numbers, metric, matrix, *_):
        pid, square = numbers.session.pid, np.eye(dim + 1)
        jacobian = np.zeros((metric.columns, dim, dim + 1))
        looked_up = (square, jacobian) if pid == MOVING else ()
        metric.evaluate(matrix)  # the first one finds a curvature as well
        for name, function in {
            "framed": lambda: metric.evaluate(matrix),
            "plain": lambda: metric._evaluate(*looked_up),
        }.items():
            measured(numbers.session, name, function)
        return matrix

    monkeypatch.setattr("dipy_ppir.align.imaffine.minimise_hidden", evaluations)
    monkeypatch.setattr("test_on_shares.local_trio", lambda **_: trio)
    register(pair, ttype, metric=HIDDEN, settings=ONE_LEVEL)
    text = FramedMutualInformation.evaluate.__doc__
    stated = int(re.search(r"rounds: (\d+)", text)[1])
    assert counted["framed"] - counted["plain"] == stated


# -- the plan, and what is refused ---------------------------------------------------


def test_the_plan():
    most = [1000, 500, 100]
    counts = [
        plan.evaluations("TRANSLATION", 3, most, last=False, hidden=True),
        plan.evaluations("RIGID", 3, most, last=False, hidden=True),
        plan.evaluations("AFFINE", 3, most, rigid_before=True, hidden=True),
    ]
    assert counts == [[4, 0, 0], [12, 6, 0], [0, 14, 16]]
    assert plan.evaluations("RIGID", 2, [1, 0], hidden=True) == [1, 0]
    assert [averaged(n) for n in (1, 2, 3, 4, 8, 14, 16, 40)] == [
        1,
        1,
        1,
        2,
        4,
        4,
        8,
        8,
    ]


@pytest.mark.parametrize("reveal", ["gradient", "histogram"])
def test_where_another_party_takes_the_steps_none_can_be_hidden(reveal):
    with pytest.raises(ValueError, match='hide_steps needs reveal="transform"'):
        SecureMutualInformationMetric(reveal=reveal, hide_steps=True)
    with pytest.raises(ValueError, match="must be True or False"):
        SecureMutualInformationMetric(hide_steps="yes")


@pytest.mark.parametrize("dim", [2, 3])
def test_transforms_by_the_axes_of_the_moving_image_are_refused(bodies, dim):
    for kind in ("ROTATION", "SCALING", "RIGIDSCALING"):
        with pytest.raises(ValueError, match=f"{kind.lower()} .* cannot be hidden"):
            register(bodies(dim), (kind, dim), metric=HIDDEN)
    with pytest.raises(ValueError, match="use rigid, rigid_isoscaling or affine"):
        whole(bodies(dim), pipeline=["rigid_scaling"])


def test_more_steps_than_numbers_have_room_for(bodies):
    """Even if all went the same way; of a pipeline, together."""
    more = {"optimizer_options": {"evaluations": 4}}
    for options in (more, {"pipeline": ["affine"] * 9}):
        with pytest.raises(ValueError, match="steps are too many to hide; lower"):
            whole(bodies(2), level_iters=[1000, 500, 100], **options)
    settings = {"level_iters": [1000, 500], "options": {"evaluations": 20}}
    with pytest.raises(ValueError, match="too many to hide"):
        register(bodies(2), ("AFFINE", 2), metric=HIDDEN, settings=settings)


def test_starts_after_which_there_is_no_transform_of_its_kind(bodies):
    pair, stretched, flat = bodies(2), np.diag([1.0, 1.2, 1]), np.diag([1.0, 0, 1])
    for kind, start, message in (
        ("RIGID", stretched, "shears or stretches.* use transform affine"),
        ("RIGIDISOSCALING", stretched, "shears or stretches"),
        ("AFFINE", flat, "not invertible"),
    ):
        with pytest.raises(ValueError, match=message):
            register(pair, (kind, 2), metric=HIDDEN, start=start)


def test_the_classes_by_themselves(bodies):
    """With both images here, as in DIPY."""
    static, moving, static_grid2world, moving_grid2world = bodies(2)
    registration = SecureAffineRegistration(
        metric=SecureMutualInformationMetric(hide_steps=True),
        level_iters=[30, 30],
        **LEVELS,
    )
    arguments = {
        "static_grid2world": static_grid2world,
        "moving_grid2world": moving_grid2world,
        "starting_affine": "mass",
    }
    found = registration.optimize(
        static, moving, regtransforms["AFFINE", 2], None, **arguments
    )
    clear_one = AffineRegistration(
        metric=MutualInformationMetric(nbins=32),
        level_iters=[200, 100],
        verbosity=0,
        **LEVELS,
    ).optimize(static, moving, regtransforms["AFFINE", 2], None, **arguments)
    pair = static, moving, static_grid2world, moving_grid2world
    # Frames move at random: 0.01 less at most in 12 runs. It begins with 0.15 less.
    assert mutual_information(pair, found.affine) > (
        mutual_information(pair, clear_one.affine) - 0.06
    )
    assert registration.receipt["bits"]["helper"] == 0
