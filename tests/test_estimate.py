"""What a registration takes, ahead of time: against what is counted."""

import math

from dipy.align.imwarp import RegistrationStages
import numpy as np
import pytest
from scipy import ndimage

from dipy_ppir.align import (
    affine_registration,
    freeform_registration,
    point_registration,
    syn_registration,
)
from dipy_ppir.align.estimate import USUAL, Estimate, Line, estimate, speed
from dipy_ppir.align.memory import peaks
from dipy_ppir.align.parameters import (
    AffineParameters,
    FreeFormParameters,
    PointParameters,
    SynParameters,
)
from dipy_ppir.mpc import local
from dipy_ppir.mpc.errors import NoiseBudgetError

SHAPES = {2: (40, 44), 3: (26, 24, 28)}
TWO = {"level_iters": (6, 4), "factors": (2, 1), "sigmas": (1.0, 0.0)}
CENTER = "center_of_mass"
#: Operation, dimension, parameters.
CASES = {
    "dense": ("affine", 3, {**TWO, "pipeline": (CENTER, "affine"), "nbins": 24}),
    "sampled": (
        "affine",
        3,
        {**TWO, "pipeline": ("rigid",), "sampling_proportion": 0.3, "ret_metric": True},
    ),
    "hidden": ("affine", 2, {**TWO, "pipeline": ("affine",), "hide_steps": True}),
    "several steps": (
        "affine",
        2,
        {"level_iters": (30, 5, 2), "nbins": 12, "evaluations": 1.2},
    ),
    "gradient": (
        "affine",
        2,
        {**TWO, "pipeline": (CENTER, "translation"), "reveal": "gradient"},
    ),
    "affine CC": (
        "affine",
        3,
        {**TWO, "pipeline": ("rigid",), "metric": "CC", "radius": 2},
    ),
    "affine SSD": ("affine", 3, {**TWO, "metric": "SSD"}),
    "affine GMS": (
        "affine",
        3,
        {**TWO, "metric": "SSD", "sampling": "GMS", "sampling_proportion": 0.3},
    ),
    "SyN": ("syn", 3, {"level_iters": (3, 2), "radius": 2}),
    "SyN in the plane": ("syn", 2, {"level_iters": (3, 6), "radius": 2}),
    "SyN to the end": (
        "syn",
        2,
        {"level_iters": (8, 6), "opens": "end", "metric": "SSD", "map_spacing": 2},
    ),
    "SyN MIND": ("syn", 3, {"level_iters": (2, 3), "metric": "MIND"}),
    "SyN update": (
        "syn",
        3,
        {"level_iters": (3, 2), "radius": 2, "reveal": "update", "stride": 2},
    ),
    "SyN force": ("syn", 2, {"level_iters": (3, 2), "radius": 2, "reveal": "force"}),
    "SyN paper": ("syn", 2, {"level_iters": (3, 2), "radius": 2, "reveal": "paper"}),
    "free-form": ("freeform", 3, {"level_iters": (3, 2), "opt_tol": 0.0}),
    "free-form GMS": (
        "freeform",
        2,
        {
            "level_iters": (4, 3),
            "opt_tol": 0.0,
            "sampling": "GMS",
            "sampling_proportion": 0.7,
            "ret_metric": True,
        },
    ),
}
PARAMETERS = {
    "affine": AffineParameters,
    "syn": SynParameters,
    "freeform": FreeFormParameters,
}


def pair(dim):
    """A body, and the same a little elsewhere."""
    at = np.indices(SHAPES[dim])
    middle = np.array(SHAPES[dim]).reshape(-1, *[1] * dim) / 2
    body = np.hypot.reduce((at - middle) / (middle * 0.75)) < 1
    rng = np.random.default_rng(5)
    texture = 1 + 0.4 * ndimage.gaussian_filter(rng.standard_normal(body.shape), 2)
    static = ndimage.gaussian_filter(body * texture, 1)
    return static, ndimage.shift(static, 0.8, order=1)


#: The same of two owners alone.
ALONE = {
    "affine SSD": CASES["affine SSD"],
    "free-form GMS": CASES["free-form GMS"],
}
HEAVY = {
    "affine GMS": CASES["affine GMS"],
    "affine MI": ("affine", 2, {**TWO, "pipeline": (CENTER, "rigid"), "nbins": 12}),
    "free-form": CASES["free-form"],
    "affine MI in space": CASES["sampled"],
    "affine MI hidden": CASES["hidden"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [*ALONE, *(pytest.param(c, marks=pytest.mark.heavy) for c in HEAVY)]
)
def test_traffic_of_two_owners_alone(case):
    operation, dim, given = {**ALONE, **HEAVY}[case]
    register, options = affine_registration, {}
    if operation == "freeform":
        register, options = freeform_registration, {"dim": dim}
    static, moving = pair(dim)
    place = np.diag([2.0, 2.5, 2.0][:dim] + [1.0])
    # Others may have left products that were made ahead.
    local.close_local_parties()
    *_, receipt = register(
        moving,
        static,
        moving_affine=place,
        static_affine=place,
        ret_receipt=True,
        parties=2,
        **options,
        **given,
    )
    parameters = PARAMETERS[operation](**options, **given)
    found = estimate(
        parameters,
        static.shape,
        moving.shape,
        static_grid2world=place,
        alone=True,
    )
    assert 1 / 1.25 < found.sent / receipt["bytes_total"] < 1.25
    assert found.sent >= sum(s.sent for s in found.stages)
    assert found.work > 0 and found.waits > 0
    needed = peaks(parameters, static.shape, moving.shape, alone=True)
    assert found.memory == max(needed.values())


def test_what_two_owners_alone_cannot_compute_is_said_ahead():
    parameters = AffineParameters()
    with pytest.raises(NoiseBudgetError, match="fewer samples"):
        estimate(parameters, (1024,) * 3, (1024,) * 3, alone=True)
    parameters = AffineParameters(sampling_proportion=0.1)
    sizes = [(n,) * 3 for n in (64, 128)]
    small, large = (estimate(parameters, size, size, alone=True) for size in sizes)
    assert small.sent < large.sent and small.memory < large.memory


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_traffic_is_as_estimated(case):
    """And a callback hears of as many iterations as are planned."""
    operation, dim, given = CASES[case]
    heard = []
    if operation == "affine":
        register, options = affine_registration, {}

        def note(info):
            heard.append((info["step"], info["level"]))
    else:
        register = syn_registration if operation == "syn" else freeform_registration
        options = {"dim": dim}

        def note(registration, stage):
            if stage == RegistrationStages.ITER_END:
                heard.append(("deformation", registration.current_level))

    static, moving = pair(dim)
    place = np.diag([2.0, 2.5, 2.0][:dim] + [1.0])
    *_, receipt = register(
        moving,
        static,
        moving_affine=place,
        static_affine=place,
        callback=note,
        ret_receipt=True,
        **options,
        **given,
    )
    parameters = PARAMETERS[operation](**options, **given)
    found = estimate(parameters, static.shape, moving.shape, static_grid2world=place)
    most = 1.6 if case == "gradient" else 1.1
    assert 1 / most < found.sent / receipt["bytes_total"] < most
    assert found.sent >= sum(s.sent for s in found.stages)
    if case != "gradient":
        planned = {(s.step, s.level): s.iterations for s in found.stages}
        planned = {key: n for key, n in planned.items() if key[0] != "result"}
        assert {key: heard.count(key) for key in planned} == planned
        assert len(heard) == sum(planned.values())
    # What one party waits for: fewer than there are rounds, where others wait as well,
    # and more where messages come in pieces.
    waits = sum(receipt["waits"].values())
    if case not in ("SyN update", "SyN force", "SyN paper"):
        assert waits / 1.7 < found.waits < 2.2 * waits


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("n", [12, 1500])
def test_traffic_of_points(n, dim, scaling):
    points = np.random.default_rng(n).normal(size=(n, dim)) * [40, 25, 10][:dim]
    *_, receipt = point_registration(
        points, points + 0.1, scaling=scaling, ret_receipt=True
    )
    found = estimate(PointParameters(scaling=scaling), (n, dim), (n, dim))
    assert 1 / 1.2 < found.sent / receipt["bytes_total"] < 1.2
    waits = sum(receipt["waits"].values())
    assert waits / 1.3 < found.waits < 1.3 * waits
    assert found.memory == max(peaks(PointParameters(), (n, dim), (n, dim)).values())


@pytest.mark.parametrize(
    "shape", [(182, 217, 18), (3, 3, 3), (9, 200, 64), (256, 256, 256)]
)
@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][1] == 3])
def test_of_any_size(case, shape):
    """Nothing that can be registered, or is refused elsewhere, stops an estimate."""
    operation, _, given = CASES[case]
    parameters = PARAMETERS[operation](**given)
    thick = np.diag([0.7, 0.7, 4.0, 1.0])
    found = estimate(parameters, shape, shape, static_grid2world=thick)
    for x in (*found[1:5], *(x for s in found.stages for x in s[2:])):
        assert 0 <= x < math.inf
    assert found.seconds() > 0 and found.memory > 0


def test_larger_images_take_more():
    for parameters in (AffineParameters(), SynParameters(), FreeFormParameters()):
        small, large = (estimate(parameters, (n,) * 3, (n,) * 3) for n in (64, 128))
        assert 6 < large.sent / small.sent < 9
        assert large.work > 4 * small.work
        assert large.memory > small.memory


def test_a_line_takes_its_time():
    found = Estimate((), 1e9, 400, 3.0, 1e9, False)
    here = found.work / speed()
    # The other parties are started first.
    assert found.seconds() > here
    far, near = Line(0.1, 1e8), Line(0.02, 1e9)
    assert found.seconds(far) == pytest.approx(here + 20 + 80)
    assert found.seconds(near) == pytest.approx(here + 4 + 8)
    assert found.seconds(USUAL) == found.seconds(near)
    shared = found._replace(busiest=0.5)
    assert shared.seconds(far) == pytest.approx(here + 20 + 40)


@pytest.mark.parametrize(
    "parameters, measured",
    [
        (AffineParameters(sampling_proportion=0.1), (36, 93, 139, 196)),
        (SynParameters(), (23, 137, 40, 152)),
    ],
)
def test_times_over_lines_that_were_measured(parameters, measured):
    """Those of doc/deployment.md, of a machine like that times were fitted to."""
    found = estimate(parameters, (99, 117, 95), (99, 117, 95))
    lines = [Line(rtt, rate) for rtt in (0.02, 0.1) for rate in (1e9, 1e8)]
    for line, seconds in zip(lines, measured, strict=True):
        expected = found.work + found.seconds(line) - found.work / speed()
        assert seconds / 1.25 < expected < 1.25 * seconds
