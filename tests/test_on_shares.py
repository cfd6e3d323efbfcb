"""Affine registration by the optimizer on shares: what it finds, and what it shows."""

from itertools import product
from pathlib import Path
import re

from dipy.align.imaffine import (
    AffineMap,
    AffineRegistration,
    MutualInformationMetric,
)
from dipy.align.transforms import regtransforms
import noise
import numpy as np
from parties import local_trio, run_trio
import pytest

from dipy_ppir.align import RemoteImage, affine_registration, imaffine, plan
from dipy_ppir.align.imaffine import (
    SecureAffineRegistration,
    SecureMutualInformationMetric,
)
from dipy_ppir.align.quasinewton import DampedBFGS, opened_bits
from dipy_ppir.align.secretmetric import Positions
from dipy_ppir.mpc.ledger import DECLARATIONS, MOVING, STATIC
from dipy_ppir.workflows.operations import OPERATIONS

LEVELS = {"sigmas": [1.0, 0.0], "factors": [2, 1]}
WHICH = ["static", "moving", "both"]
STARTS = ["mass", "voxel-origin", "centers", None, "matrix"]


def distance(first, second, image, grid2world):
    """Root mean square distance, mm, of where two matrices move an object."""
    dim = image.ndim
    points = np.argwhere(image > image.max() / 10)
    points = grid2world @ np.vstack([points.T, np.ones(len(points))])
    return np.sqrt((((first - second) @ points)[:dim] ** 2).sum(axis=0).mean())


def mutual_information(pair, matrix, nbins=32):
    """DIPY's, of every voxel."""
    static, moving, static_grid2world, moving_grid2world = pair
    metric = MutualInformationMetric(nbins=nbins)
    dim = static.ndim
    metric.setup(
        regtransforms["TRANSLATION", dim],
        static,
        moving,
        static_grid2world=static_grid2world,
        moving_grid2world=moving_grid2world,
        starting_affine=matrix,
    )
    return -metric.distance(np.zeros(dim))


@pytest.fixture(autouse=True)
def same_randomness(monkeypatch):
    """Rounding is by chance in part, and what is found with it."""
    noise.fix_randomness(monkeypatch)


def register(pair, ttype, *, metric=None, start="mass", ret_metric=False, **options):
    """By the optimizer on shares: what the moving owner gets, and the receipt."""
    static, moving, static_grid2world, moving_grid2world = pair
    settings = {
        "level_iters": [12, 12],
        "options": {"evaluations": 2},
        **LEVELS,
        **options.pop("settings", {}),
    }

    def party(session):
        here = {STATIC: "static", MOVING: "moving"}.get(session.pid)
        images = {
            "static": RemoteImage(static.shape, static_grid2world),
            "moving": RemoteImage(moving.shape, moving_grid2world),
            **{k: v for k, v in (("static", static), ("moving", moving)) if k == here},
        }
        masks = {k: v for k, v in options.items() if k == f"{here}_mask"}
        mine = start if isinstance(start, str) or session.pid == MOVING else None
        registration = SecureAffineRegistration(
            metric=SecureMutualInformationMetric(session=session, **(metric or {})),
            session=session,
            **settings,
        )
        result = registration.optimize(
            images["static"],
            images["moving"],
            regtransforms[ttype],
            None,
            static_grid2world=static_grid2world,
            moving_grid2world=moving_grid2world,
            starting_affine=mine,
            ret_metric=ret_metric,
            **masks,
        )
        return result, registration.receipt

    sessions = local_trio(timeout=300)
    try:
        return run_trio(sessions, party)[MOVING]
    finally:
        for session in sessions:
            session.close()


def clear(pair, ttype, *, start="mass", sampling=None, method="L-BFGS-B", **options):
    """By DIPY."""
    static, moving, static_grid2world, moving_grid2world = pair
    metric = MutualInformationMetric(nbins=32, sampling_proportion=sampling)
    iterations = [200, 100]
    if method == "twin":
        method, iterations = DampedBFGS(metric), [12, 12]
    return AffineRegistration(
        metric=metric, level_iters=iterations, method=method, verbosity=0, **LEVELS
    ).optimize(
        static,
        moving,
        regtransforms[ttype],
        None,
        static_grid2world=static_grid2world,
        moving_grid2world=moving_grid2world,
        starting_affine=start,
        **options,
    )


# -- what is found -----------------------------------------------------------------


def heavy_unless(usual, values):
    """Parameters of tests, of which those that are not usual are marked heavy."""
    marks = {True: (), False: pytest.mark.heavy}
    return [pytest.param(v, marks=marks[v in usual]) for v in values]


USUAL = [t for t in sorted(regtransforms) if t[1] == 2 or t[0] in ("RIGID", "AFFINE")]


@pytest.mark.parametrize(
    "ttype", heavy_unless(USUAL, sorted(regtransforms)), ids=lambda t: f"{t[0]}{t[1]}"
)
def test_every_transform_is_found_as_well_as_by_dipy(bodies, ttype):
    pair = bodies(ttype[1])
    found, _ = register(pair, ttype)
    expected = clear(pair, ttype)
    assert mutual_information(pair, found.affine) > (
        mutual_information(pair, expected.affine) - 0.03
    )


@pytest.mark.parametrize("dim", [2, 3])
def test_as_its_clear_twin(bodies, dim):
    """The same steps in the clear: what is rounded differs, not what is found."""
    pair = bodies(dim)
    found, _ = register(pair, ("RIGID", dim), start=None)
    twin = clear(pair, ("RIGID", dim), method="twin", start=None)
    assert distance(found.affine, twin.affine, pair[0], pair[2]) < 0.02


@pytest.mark.parametrize(
    "case",
    heavy_unless(
        [*product([None], STARTS), (0.4, "mass"), (0.4, None)],
        product([None, 0.4], STARTS),
    ),
    ids=str,
)
def test_wherever_it_starts(bodies, monkeypatch, case):
    """By samples too, which small levels are not registered by otherwise."""
    sampling, start = case
    monkeypatch.setattr("dipy_ppir.align.plan.EVERY_VOXEL", 0)
    pair = bodies(3)
    if start == "matrix":
        start = np.eye(4)
        start[:3, 3] = 0.5
    metric = {"sampling_proportion": sampling}
    found, _ = register(pair, ("RIGID", 3), start=start, metric=metric)
    expected = clear(pair, ("RIGID", 3))
    # Which of several optima as good as each other is chance, in DIPY too.
    assert distance(found.affine, expected.affine, pair[0], pair[2]) < 0.3


@pytest.mark.parametrize("start", ["mass", "voxel-origin", "centers", "list"])
def test_the_function_starts_there_too(bodies, start):
    static, moving, *grids = pair = bodies(3)
    if start == "list":
        start = np.eye(4).tolist()
    _, found = affine_registration(
        moving,
        static,
        static_affine=grids[0],
        moving_affine=grids[1],
        pipeline=["rigid"],
        starting_affine=start,
        level_iters=[12, 12],
        **LEVELS,
    )
    expected = clear(pair, ("RIGID", 3))
    assert distance(found, expected.affine, static, grids[0]) < 0.5


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("middle", "must be a matrix or one of .*'mass', 'voxel-origin', 'centers'"),
        ([[1, 0], [0]], "must be a matrix or one of"),
        (np.eye(4), "has shape .4, 4., but 2D images need .3, 3."),
        (np.diag([1, np.nan, 1]), "contains NaN"),
        (np.diag([1.0, 1, 2]), "last row of starting_affine must be 0 but for a 1"),
        (np.diag([1.0, 0, 1]), "starting_affine is not invertible"),
    ],
)
def test_starts_that_are_none(bodies, start, message):
    """Before any process is started."""
    static, moving, static_affine, moving_affine = pair = bodies(2)
    with pytest.raises(ValueError, match=message):
        affine_registration(
            moving,
            static,
            static_affine=static_affine,
            moving_affine=moving_affine,
            pipeline=["rigid"],
            starting_affine=start,
        )
    with pytest.raises(ValueError, match=message):
        register(pair, ("RIGID", 2), start=start)


def ball(image, part):
    grid = np.indices(image.shape)
    centre = np.array(image.shape).reshape(-1, *[1] * image.ndim) / 2
    size = centre.min() * part
    return ((grid - centre) ** 2).sum(axis=0) < size**2


# With a static mask alone: also the next test.
@pytest.mark.parametrize("which", heavy_unless(["moving", "both"], WHICH))
def test_masks(bodies, which):
    """Against DIPY with the same masks; their type and values do not matter."""
    pair = bodies(3)
    masks = {}
    for name, image in zip(("static", "moving"), pair[:2], strict=True):
        if which in (name, "both"):
            masks[name + "_mask"] = ball(image, 0.8)
    found, _ = register(pair, ("RIGID", 3), start="centers", **masks)
    best = clear(pair, ("RIGID", 3)).affine
    expected = clear(
        pair,
        ("RIGID", 3),
        start="centers",
        **{name: mask.astype(np.int32) for name, mask in masks.items()},
    )
    # With moving masks DIPY is itself up to 2 mm from where it is without.
    off, as_dipys = (
        distance(a.affine, best, pair[0], pair[2]) for a in (found, expected)
    )
    assert off < as_dipys + 0.25
    other = {name: mask * 0.25 for name, mask in masks.items()}
    again, _ = register(pair, ("RIGID", 3), start="centers", **other)
    assert distance(found.affine, again.affine, pair[0], pair[2]) < 0.1


def test_a_mask_matters(bodies):
    """What is outside it is not looked at: there the images contradict each other."""
    static, moving, *grids = bodies(3)
    mask = ball(static, 0.85)
    spoilt = np.where(mask, static, np.roll(static, 6, axis=0)[::-1] * 3)
    pair = (static, moving, *grids)
    best = register(pair, ("RIGID", 3), start="centers", static_mask=mask)[0]
    found, _ = register(
        (spoilt, moving, *grids), ("RIGID", 3), start="centers", static_mask=mask
    )
    assert distance(found.affine, best.affine, static, grids[0]) < 0.3


def test_where_the_origin_lies_does_not_matter(bodies):
    """Rotations are about the object: 1,200 mm of offset change nothing."""
    static, moving, *grids = bodies(3)
    near, _ = register((static, moving, *grids), ("AFFINE", 3))
    shift = np.eye(4)
    shift[:3, 3] = 1200, -900, 400
    far, _ = register((static, moving, *(shift @ g for g in grids)), ("AFFINE", 3))
    back = np.linalg.inv(shift) @ far.affine @ shift
    assert distance(back, near.affine, static, grids[0]) < 0.15


def test_the_size_of_voxels_does_not_matter(bodies):
    static, moving, *grids = bodies(3)
    found, _ = register((static, moving, *grids), ("RIGID", 3))
    for zoom in (1e-5, 1e4):
        scale = np.diag([zoom] * 3 + [1])
        other, _ = register((static, moving, *(scale @ g for g in grids)), ("RIGID", 3))
        back = np.linalg.inv(scale) @ other.affine @ scale
        assert distance(back, found.affine, static, grids[0]) < 0.05, zoom


@pytest.mark.parametrize("slices", [1, 2])
def test_volumes_of_a_slice_or_two_are_refused(bodies, slices):
    """Their gradient is zero everywhere: DIPY returns the start as the result."""
    static, moving, *_ = bodies(3)
    thin = moving[..., 10 : 10 + slices]
    with pytest.raises(ValueError, match=rf"{slices} voxels? along axis 2: .* 2D"):
        register((static, thin, np.eye(4), np.eye(4)), ("RIGID", 3))


def test_by_mpyc_literally(bodies):
    """The same result from a few hundred voxels, whatever computes the sums."""
    pair = bodies(2)
    settings = {"level_iters": [4], "sigmas": [1.0], "factors": [1], "options": None}
    found = [
        register(
            pair,
            ("TRANSLATION", 2),
            start=None,
            metric={"nbins": 12, "backend": backend},
            settings=settings,
        )[0].affine
        for backend in ("packed", "mpyc")
    ]
    assert distance(*found, pair[0], pair[2]) < 0.05
    assert np.abs(found[1] - np.eye(3)).max() > 0.3


# -- what is shown -----------------------------------------------------------------


def labels(receipt, role):
    return {e["label"]: e for e in receipt["learned"][role]}


@pytest.mark.parametrize("ret_metric", [False, True])
def test_receipt(bodies, ret_metric):
    pair = bodies(3)
    static, moving, static_affine, moving_affine = pair
    *_, receipt = affine_registration(
        moving,
        static,
        static_affine=static_affine,
        moving_affine=moving_affine,
        ret_metric=ret_metric,
        ret_receipt=True,
    )
    learned = labels(receipt, "moving owner")
    value = {"final_value"} if ret_metric else set()
    shown = {"center_of_mass", "step", "step_size", "better", "mismatch"}
    assert set(learned) == shown | value
    # 44 evaluations, of which the first of each step and level shows nothing.
    steps = {3: 3, 6: 9 + 5 + 3, 12: 9 + 9}
    assert learned["better"]["values"] == sum(steps.values())
    assert learned["step"]["values"] == sum(p * n for p, n in steps.items())
    bits = sum(learned[name]["bits"] for name in ("step", "step_size", "better"))
    assert bits == pytest.approx(
        sum(n * opened_bits(p) for p, n in steps.items()), abs=1
    )
    assert receipt["bits"]["moving owner"] < 1600
    end = {"affine", "mismatch", "stuck"}
    assert set(labels(receipt, "static owner")) == end
    assert receipt["learned"]["helper"] == []
    assert receipt["bits"]["helper"] == 0
    assert receipt["voxels"] == {
        "moving owner": static.size,
        "static owner": moving.size,
    }


def test_the_documentation_lists_what_may_be_opened_and_its_bits():
    """doc/security.md against the declarations of the package, and these all."""
    text = Path(__file__).parent.parent.joinpath("doc", "security.md").read_text()
    listed = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`") and cells[3][:1].isdigit():
            for label in re.findall("`([a-z_]+)`", cells[0]):
                listed[label] = float(re.match(r"[\d.]+", cells[3])[0])
    opened = {"final_value", "mismatch", "whole", "stop"}
    for operation in OPERATIONS.values():
        opened.update(operation.hidden)
        results = [r for x in operation.results.values() for r in x.values()]
        for names in (
            *operation.opens.values(),
            *operation.of_metrics.values(),
            *operation.result.values(),
            *results,
        ):
            opened.update(names)
    declared = {label: DECLARATIONS[label].bits for label in opened}
    assert listed.keys() == declared.keys()
    for label, bits in declared.items():
        assert listed[label] == pytest.approx(bits, abs=0.2), label


# Where images of noise end is by chance.
@pytest.mark.filterwarnings("ignore:the image was moved")
@pytest.mark.parametrize("hide_steps", [False, True])
def test_what_is_sent_does_not_depend_on_the_images(bodies, trio, tap, hide_steps):
    """Shapes of messages and numbers of rounds: the same for any images."""

    def program(frames):
        return [(f[0], f[1], f[2], f[3], len(f[4])) for f in frames]

    seen = []
    for seed in (1, 2):
        pair = bodies(2)
        if seed == 2:
            rng = np.random.default_rng(seed)
            pair = (
                rng.random(pair[0].shape),
                rng.random(pair[1].shape) ** 3,
                *pair[2:],
            )
        frames = tap(trio)
        run_trio(
            trio, lambda s, pair=pair: with_own_images(s, pair, hide_steps=hide_steps)
        )
        by_link = {}
        for sender, receiver, *rest in program(frames):
            by_link.setdefault((sender, receiver), []).append(rest)
        seen.append(by_link)
    assert seen[0].keys() == seen[1].keys()
    for link, frames in seen[0].items():
        # Receipts hold the bytes of a phase: their digits may be more or fewer.
        same = [a == b for a, b in zip(frames, seen[1][link], strict=True)]
        assert same.count(False) <= 4, link


def with_own_images(session, pair, **options):
    static, moving, static_affine, moving_affine = pair
    if session.pid != STATIC:
        static = RemoteImage(static.shape, static_affine)
    if session.pid != MOVING:
        moving = RemoteImage(moving.shape, moving_affine)
    arguments = {
        "static_affine": static_affine,
        "moving_affine": moving_affine,
        "pipeline": ["center_of_mass", "rigid"],
        "level_iters": [5, 4],
        "ret_receipt": True,
        **LEVELS,
        **options,
    }
    return affine_registration(moving, static, session=session, **arguments)


def test_session(bodies, trio):
    pair = bodies(3)
    moving, static, helper = run_trio(
        trio, lambda s: with_own_images(s, pair, ret_metric=True)
    )
    assert np.abs(static[1] - moving[1]).max() <= 2.0**-60
    assert helper[:2] == (None, None)
    assert static[2:4] == helper[2:4] == (None, None)
    assert moving[2].shape == (6,)
    value = mutual_information(pair, moving[1])
    # Coarse as the registration is: the value to 3 digits, of 32 bins.
    assert abs(moving[3] + value) < 2e-3
    receipts = [r[-1]["learned"] for r in (moving, static, helper)]
    assert receipts[0] == receipts[1] == receipts[2]


def test_no_value_without_asking(bodies):
    """The parameters come with it, as in DIPY; alone nothing is opened for it."""
    (result, xopt, fopt), receipt = register(bodies(2), ("RIGID", 2), ret_metric=True)
    assert isinstance(result, AffineMap)
    assert xopt.shape == (3,)
    assert -3 < fopt < 0
    assert labels(receipt, "moving owner")["final_value"]["values"] == 1
    _, receipt = register(bodies(2), ("RIGID", 2))
    assert "final_value" not in labels(receipt, "moving owner")


def test_progress_is_without_values(bodies):
    steps = []
    static, moving, static_affine, moving_affine = bodies(3)
    affine_registration(
        moving,
        static,
        static_affine=static_affine,
        moving_affine=moving_affine,
        callback=steps.append,
    )
    assert len(steps) == 38
    assert not any("value" in step for step in steps)
    for step, level in product(("translation", "rigid", "affine"), range(3)):
        numbers = [
            (s["iteration"], s["max_iterations"])
            for s in steps
            if (s["step"], s["level"]) == (step, level)
        ]
        assert [n for n, _ in numbers] == list(range(1, len(numbers) + 1))
        assert {most for _, most in numbers} <= {len(numbers)}


# -- the plan ----------------------------------------------------------------------


def test_the_plan_of_a_whole_registration():
    most = [1000, 500, 100]
    translation = plan.evaluations("TRANSLATION", 3, most, last=False)
    rigid = plan.evaluations("RIGID", 3, most, last=False)
    affine = plan.evaluations("AFFINE", 3, most, rigid_before=True)
    assert (translation, rigid, affine) == ([4, 0, 0], [10, 6, 4], [0, 10, 10])
    assert plan.evaluations("AFFINE", 3, most) == [10, 10, 10]
    assert plan.evaluations("RIGID", 3, most) == [10, 6, 4]
    assert sum(plan.evaluations("TRANSLATION", 3, most)) == 14


@pytest.mark.parametrize("levels", [1, 2, 4, 5])
def test_plans_for_other_numbers_of_levels(levels):
    for kind in ("TRANSLATION", "RIGID", "RIGIDSCALING", "AFFINE"):
        counts = plan.evaluations(kind, levels, [100] * levels)
        assert len(counts) == levels
        assert all(c > 1 for c in counts)
        assert plan.cap(0) >= plan.cap(levels - 1)


def test_level_iters_are_a_limit_and_the_option_scales():
    assert plan.evaluations("AFFINE", 3, [3, 100, 5]) == [3, 10, 5]
    assert plan.evaluations("AFFINE", 3, [100] * 3, scale=2) == [20, 20, 20]
    assert plan.evaluations("RIGID", 3, [100] * 3, scale=0.5) == [5, 3, 2]
    # An evaluation alone moves nothing; but the last one has a value.
    assert plan.evaluations("RIGID", 3, [1, 100, 1]) == [0, 6, 1]


# -- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "CG"}, "sees the value of the metric"),
        ({"options": {"gtol": 1e-4}}, 'the one option is "evaluations"'),
        ({"options": {"evaluations": 0}}, "evaluations must be a number above 0"),
        ({"options": {"evaluations": 1000}}, "evaluations must be a number above 0"),
        ({"options": {"evaluations": "a"}}, "evaluations must be a number above 0"),
    ],
)
def test_what_cannot_be_chosen(options, text):
    with pytest.raises(ValueError, match=text):
        SecureAffineRegistration(**options)


def test_no_step_is_an_error(bodies):
    """DIPY would take one; here the start would be the result."""
    static, moving, static_affine, moving_affine = bodies(3)
    with pytest.raises(ValueError, match="leave no step for the affine transform"):
        register(bodies(3), ("AFFINE", 3), settings={"level_iters": [1, 1]})
    with pytest.raises(ValueError, match="leave no step for the affine transform"):
        affine_registration(
            moving,
            static,
            static_affine=static_affine,
            moving_affine=moving_affine,
            pipeline=["rigid", "affine"],
            level_iters=[100, 1],
            **LEVELS,
        )


def test_many_evaluations(bodies):
    """Numbers are added up for as long as one likes."""
    settings = {"level_iters": [70], "sigmas": [1], "factors": [1]}
    settings["options"] = {"evaluations": 5}
    found, receipt = register(bodies(2), ("TRANSLATION", 2), settings=settings)
    assert labels(receipt, "moving owner")["better"]["values"] == 69
    expected = clear(bodies(2), ("TRANSLATION", 2))
    assert np.abs(found.affine - expected.affine).max() < 0.1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nbins": 513}, "nbins must be an integer from 6 to 512"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"backend": "mpyc", "reveal": "gradient"}, 'needs reveal="transform"'),
    ],
)
def test_backends_that_are_not_there(options, text):
    with pytest.raises(ValueError, match=text):
        SecureMutualInformationMetric(**options)


def test_dipys_own_registration_is_told_what_to_use(bodies):
    static, moving, *_ = bodies(2)
    registration = AffineRegistration(
        metric=SecureMutualInformationMetric(), level_iters=[3], sigmas=[0], factors=[1]
    )
    with pytest.raises(ValueError, match=r"use SecureAffineRegistration, or choose"):
        registration.optimize(static, moving, regtransforms["TRANSLATION", 2], None)


@pytest.mark.parametrize("name", ["static", "moving"])
def test_a_centre_of_mass_outside_the_grid_is_refused(bodies, name):
    """Zero-mean images: before anything is started."""
    images = dict(zip(("static", "moving"), bodies(3)[:2], strict=True))
    images[name] = images[name] - 0.999 * images[name].mean()
    for start in ("mass", None):
        with pytest.raises(
            ValueError, match=f"centre of mass of the {name} image lies"
        ):
            if start:
                SecureAffineRegistration().optimize(
                    images["static"],
                    images["moving"],
                    regtransforms["RIGID", 3],
                    None,
                    starting_affine=start,
                )
            affine_registration(
                images["moving"],
                images["static"],
                static_affine=np.eye(4),
                moving_affine=np.eye(4),
            )


@pytest.mark.parametrize("dtype", [np.float16, np.int16, np.uint8])
def test_types_that_overflow_have_a_centre_of_mass(dtype):
    image = np.zeros((60, 60, 60))
    image[20:50, 10:40, 5:55] = 100
    center = imaffine.world_center_of_mass(image.astype(dtype), np.eye(4))
    np.testing.assert_allclose(center, [34.5, 24.5, 29.5])


def test_a_peer_that_describes_a_huge_image_costs_nothing(bodies):
    """Grids of all levels without an image."""
    for settings in (LEVELS, {"sigmas": None, "factors": None, "ss_sigma_factor": 0.5}):
        registration = SecureAffineRegistration(level_iters=[5, 5], **settings)
        registration.dim = 3
        shape = (1 << 9, 1 << 9, (1 << 10) + 1)
        space = registration._scale_space(RemoteImage(shape), None, np.eye(4))
        small = tuple(n // 16 for n in shape)
        image = np.random.default_rng(0).random(small)
        same = registration._scale_space(image, None, np.eye(4))
        alike = registration._scale_space(RemoteImage(small), None, np.eye(4))
        for level in range(2):
            np.testing.assert_array_equal(
                alike.get_domain_shape(level), same.get_domain_shape(level)
            )
            np.testing.assert_array_equal(
                alike.get_affine(level), same.get_affine(level)
            )
        assert tuple(space.get_domain_shape(0)) == shape
        assert sum(image.nbytes for image in space.images) < 100


# -- positions ---------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_positions_of_voxels(dim):
    shape = (4, 5, 6)[:dim]
    grid2world = np.diag([1.0, 2.0, 3.0][:dim] + [1.0])
    grid2world[0, dim] = 7
    positions = Positions(shape, grid2world)
    y = positions(0, positions.count)
    world = y @ positions.to_world.T
    voxels = np.indices(shape).reshape(dim, -1)
    expected = grid2world @ np.vstack([voxels, np.ones(voxels.shape[1])])
    np.testing.assert_allclose(world, expected.T)
    np.testing.assert_array_equal(positions(3, 9), y[3:9])


def test_positions_of_points():
    points = np.column_stack(
        [np.random.default_rng(0).uniform(0, 20, (50, 3)), np.ones(50)]
    )
    grid2world = np.diag([2.0, 1.0, 0.5, 1.0])
    positions = Positions((10, 20, 40), grid2world, points)
    y = positions(0, 50)
    assert y.dtype == np.int64
    off = np.abs(y @ positions.to_world.T - points)[:, :3]
    # Half of a quarter voxel.
    assert (off <= np.array([2.0, 1.0, 0.5]) / 8 + 1e-9).all()
