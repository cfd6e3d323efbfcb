"""Parameters of registrations: what they may be, and that a session file holds."""

from functools import partial
import re
import tomllib

from dipy.align.transforms import regtransforms
import numpy as np
import pins
import pytest

from dipy_ppir.align import affine_registration, rigid, syn_registration
from dipy_ppir.align.agreed import entries, parameters_of
from dipy_ppir.align.imaffine import (
    SecureAffineRegistration,
    SecureMutualInformationMetric,
)
from dipy_ppir.align.imwarp import SecureSymmetricDiffeomorphicRegistration
from dipy_ppir.align.memory import check_memory, peaks
from dipy_ppir.align.metrics import SecureCCMetric
from dipy_ppir.align.parameters import (
    AFFINE,
    SYN,
    AffineParameters,
    FreeFormParameters,
    ParameterError,
    PointParameters,
    SynParameters,
    UnknownParameterError,
)
from dipy_ppir.align.remote import RemoteImage
from dipy_ppir.mpc.errors import ParameterMismatchError, SessionFileError
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.session import Session
from dipy_ppir.mpc.sessionfile import LIMITS, SessionFile
from dipy_ppir.workflows.operations import OPERATIONS, explain, template

SCHEMAS = {
    "affine": AffineParameters,
    "syn": SynParameters,
    "freeform": FreeFormParameters,
}
BRIEF = {"level_iters": [5, 3], "sigmas": [1.0, 0.0], "factors": [2, 1], "nbins": 16}


def test_numpy_and_python_are_the_same():
    given = AffineParameters(
        nbins=np.int16(32),
        factors=np.array([4, 2, 1]),
        sigmas=np.array([3, 1, 0], dtype=np.float32),
        level_iters=(np.int64(1000), 500, 100),
        hide_steps=np.bool_(False),
        pipeline=list(AFFINE.pipeline),
        sampling_proportion=None,
    )
    assert given == AFFINE
    assert SynParameters(dim=2, stride=2).map_precision == 0.5
    assert SynParameters(reveal="force").ss_sigma_factor == 0.2
    assert AffineParameters(ss_sigma_factor=1, level_iters=[5]).factors is None


MISTAKES = {
    "a flag for a number": ("affine", {"nbins": True}, "{nbins}.*got True"),
    "a fraction": ("affine", {"nbins": 32.0}, r"{nbins}.*integer.*got 32\.0"),
    "many bins": ("affine", {"nbins": 5000}, "{nbins}.*from 6 to 512.*got 5000"),
    "a number for a flag": ("affine", {"hide_steps": 1}, "{hide_steps}.*True or False"),
    "a text for a flag": ("affine", {"ret_metric": "yes"}, "{ret_metric}.*True or"),
    "no steps": ("affine", {"pipeline": []}, r"{pipeline}.*one or more.*got \[\]"),
    "no list": ("affine", {"pipeline": "rigid"}, "{pipeline}.*list.*got 'rigid'"),
    "an unknown step": ("affine", {"pipeline": ["warp"]}, r"{pipeline}.*\['warp'\]"),
    "factors with points": ("affine", {"factors": [4.0, 2.0, 1.0]}, "{factors}.*integ"),
    "a small last level": ("affine", {"factors": [4, 2, 2]}, "{factors} must end in 1"),
    "no iterations": (
        "affine",
        {"level_iters": [0, 0, 0]},
        "{level_iters}.*every",
    ),
    "true iterations": ("affine", {"level_iters": [True, 5, 5]}, "{level_iters}.*True"),
    "lists of other lengths": (
        "affine",
        {"level_iters": [10, 5]},
        "{level_iters}, {sigmas} and {factors} must have one entry per level; got 2, 3",
    ),
    "two scale spaces": (
        "affine",
        {"ss_sigma_factor": 0.5, "factors": [4, 2, 1]},
        "{ss_sigma_factor} takes the place of {sigmas} and {factors}",
    ),
    "many levels": ("syn", {"level_iters": [1] * 17}, "{level_iters}.*1 to 16 levels"),
    "braces": ("affine", {"pipeline": ["{x}"]}, r"{pipeline}.*got \['\{x\}'\]"),
    "not finite": ("syn", {"opt_tol": float("inf")}, "{opt_tol}.*finite.*got inf"),
    "no dimension": ("syn", {"dim": 3.0}, r"{dim} must be 2 or 3; got 3\.0"),
    "long steps": ("syn", {"step_length": 0.6}, "{step_length}.*at most 0.5"),
    "rough": ("syn", {"sigma_diff": 0.5}, '{sigma_diff} 0.5.*{reveal}="force"'),
    "nobody's": ("syn", {"result_to": "helper"}, "{result_to}.*'static'"),
    "too sparse": ("freeform", {"spacing": 33}, "{spacing}.*2 to 32, voxels; got 33"),
    "nothing to sample": (
        "freeform",
        {"sampling": "GMS"},
        "{sampling} GMS needs {sampling_proportion}",
    ),
    "levels of two kinds": (
        "freeform",
        {"factors": [2, 1]},
        "{level_iters}, {factors} and {sigmas} must have one entry per level",
    ),
    "no whole image": (
        "freeform",
        {"level_iters": [1], "factors": [2]},
        "{factors} must end in 1",
    ),
    "no range": (
        "freeform",
        {"intensities": [1, 0.5]},
        "{intensities} must be two numbers, the lower one first",
    ),
    "not the static owner's": (
        "affine",
        {"result_to": "static"},
        "{result_to}.*'both'",
    ),
    "a value of nothing": (
        "affine",
        {"pipeline": ["center_of_mass"], "ret_metric": True},
        "{pipeline}.*cannot return.*{ret_metric}",
    ),
    "a transform by axes": (
        "affine",
        {"hide_steps": True, "pipeline": ["rigid_scaling"]},
        "{pipeline} rigid_scaling cannot be hidden",
    ),
    "more of what is not planned": (
        "affine",
        {"reveal": "gradient", "evaluations": 2},
        '{evaluations} needs {reveal}="transform"',
    ),
}


def called(words, operation, spell=str):
    """An expression with names of parameters in braces, spelled."""
    for name in SCHEMAS[operation].model_fields:
        words = words.replace(f"{{{name}}}", spell(name))
    return words


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_the_parameter_as_it_is_called(mistake):
    """By its name, and by its flag, in one line."""
    operation, given, words = MISTAKES[mistake]
    for spell in (str, "--my_{}".format):
        with pytest.raises(ParameterError) as caught:
            SCHEMAS[operation](**given)
        text = caught.value.spelled(spell)
        assert re.search(called(words, operation, spell), text), text
        assert "\n" not in text and len(text) < 350
    assert str(caught.value) == caught.value.spelled(str)


def test_a_parameter_that_there_is_not():
    """A TypeError, as of any function, that says what there is."""
    with pytest.raises(TypeError, match="no parameter 'bins'.*nbins"):
        affine_registration(None, None, bins=32)
    twice = {"evaluations": 1, "optimizer_options": {"evaluations": 2}}
    with pytest.raises(ValueError, match="given twice"):
        affine_registration(None, None, **twice)
    with pytest.raises(UnknownParameterError, match="no parameter 'radios'.*radius"):
        SynParameters(radios=3)


def test_steps_may_be_functions(images):
    static, moving, *_ = images(3)
    with pytest.raises(ValueError, match=r"pipeline.*got \['rigid', 'warp'\]"):
        affine_registration(moving, static, pipeline=[rigid, "warp"])


# -- session files ---------------------------------------------------------------


def plan_of(operation, *, limits=None, **parameters):
    given = {"reveal": SCHEMAS[operation]().reveal if operation in SCHEMAS else "map"}
    for name in ("reveal", "result_to"):
        if name in parameters:
            given[name] = parameters.pop(name)
    given = {name: value for name, value in given.items() if value is not None}
    if limits:
        given["limits"] = limits
    return pins.plan(operation=operation, parameters=parameters, **given)


@pytest.mark.parametrize(
    ("operation", "entries", "words"),
    [
        *(
            (operation, given, called(words, operation))
            for name, (operation, given, words) in MISTAKES.items()
            if name not in ("not finite", "nobody's")  # refused in any file
        ),
        ("affine", {"method": "BFGS"}, "no entry 'method'"),
        ("affine", {"sigma_diff": 2.0}, "no entry 'sigma_diff'"),
        ("affine", {"reveal": "map"}, "reveal must be one of 'transform'"),
        ("affine", {"hide_steps": True, "evaluations": 9.0}, "too many to hide"),
        ("affine", {"level_iters": [1, 1, 1]}, "leave no step"),
        ("affine", {"reveal": None}, "must say what may be revealed.*'transform'"),
        ("warp", {}, "operation = 'warp' is not known"),
    ],
)
def test_a_file_that_would_not_run_as_written_is_refused(operation, entries, words):
    with pytest.raises(SessionFileError, match=words):
        explain(plan_of(operation, **entries))


@pytest.mark.parametrize("operation", SCHEMAS)
def test_what_is_explained_is_what_runs(operation):
    """With every default; the template is of use and has them."""
    explained = explain(plan_of(operation))
    resolved = parameters_of(plan_of(operation)).plain(*entries(operation))
    for name, value in resolved.items():
        assert (f"    {name} = {value} (by default)" in explained) == (
            value is not None
        )
    assert "16 GB of memory" in explained and "268,435,456 voxels" in explained
    text = template(operation).replace('"..."', '"%s"')
    contents = tomllib.loads(text % tuple(i * 64 for i in "abc"))
    plan = SessionFile.parse(contents)
    assert plan.limits == LIMITS and explain(plan)
    assert list(OPERATIONS[operation].opens) == list(
        SCHEMAS[operation].model_fields["reveal"].annotation.__args__
    )


def test_what_is_asked_for_besides_is_explained():
    plain = explain(plan_of("affine", pipeline=["rigid"]))
    assert "center_of_mass" not in plain and "final_value" not in plain
    more = {"starting_affine": "mass", "ret_metric": True}
    more = explain(plan_of("affine", pipeline=["rigid"], **more))
    assert "(center_of_mass)" in more and "(final_value)" in more
    drawn = {"sampling": "GMS", "sampling_proportion": 0.1, "ret_metric": True}
    drawn, plain = explain(plan_of("freeform", **drawn)), explain(plan_of("freeform"))
    for words in ("(edge_samples)", "(mean_square)", "where the moving image has"):
        assert words in drawn and words not in plain
    assert "can rebuild much" in plain
    sampled = explain(plan_of("affine", sampling_proportion=0.1))
    assert "masks" in sampled and "masks" not in plain
    correlated = explain(plan_of("affine", metric="CC", radius=3))
    assert "an affine registration by local cross-correlation" in correlated
    assert "    radius = 3\n" in correlated and "nbins" not in correlated
    assert "(step)" in correlated and "at most 1," in correlated


# -- calls in a session ----------------------------------------------------------


@pytest.fixture
def in_session(trio, monkeypatch):
    """The moving owner's session by a session file; whatever is sent fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was sent")

    def make(*args, pid=MOVING, **options):
        trio[pid].plan = plan_of(*args, **options)
        return trio[pid]

    monkeypatch.setattr(Session, "exchange", refuse)
    return make


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"reveal": "histogram"}, "reveal is 'transform' .* 'histogram' in this call"),
        ({"level_iters": None}, r"level_iters is \[5, 3\] .* \[1000, 500, 100\]"),
        ({"nbins": 32}, "nbins is 16"),
        ({"pipeline": ["rigid"]}, r"pipeline is \['center_of_mass'"),
        ({"pipeline": [rigid]}, r"pipeline is .*\['rigid'\] in this call"),
        ({"sampling_proportion": 0.5}, "sampling_proportion is None"),
        ({"result_to": "moving"}, "result_to is 'both'"),
        ({"ret_metric": True}, "ret_metric is False"),
        ({"backend": "mpyc"}, "backend is 'packed'"),
        ({"evaluations": 2}, "evaluations is 1.0"),
        ({"optimizer_options": {"evaluations": 2}}, "evaluations is 1.0"),
        ({"starting_affine": "mass"}, "starting_affine is None .* 'mass'"),
        ({"hide_steps": True}, "hide_steps is False"),
    ],
)
@pytest.mark.parametrize("pid", ROLES)
def test_calls_keep_to_the_file(in_session, images, call, words, pid):
    """Before anything is sent, at any party."""
    session = in_session("affine", pid=pid, **BRIEF)
    if "level_iters" in call:
        call = {**call, "sigmas": None, "factors": None}
    static, moving, *grids = images(3)
    pair = {"moving": "remote", "static": "remote"}
    if pid != HELPER:
        name = "moving" if pid == MOVING else "static"
        pair[name] = moving if pid == MOVING else static
        pair[f"{name}_affine"] = grids[0]
    with pytest.raises(ParameterMismatchError, match=words) as caught:
        affine_registration(**pair, session=session, **{**session.parameters, **call})
    assert "**session.parameters" in str(caught.value)


def test_what_no_file_can_say_is_left_out(in_session, images):
    session = in_session("affine", reveal="gradient", **BRIEF)
    call = partial(affine_registration, images(3)[1], "remote", session=session)
    call = partial(call, moving_affine=np.eye(4), **session.parameters)
    with pytest.raises(ParameterMismatchError, match="optimizer_options is {} .*gtol"):
        call(optimizer_options={"gtol": 1e-6})
    with pytest.raises(ParameterMismatchError, match="method is 'L-BFGS-B' .*'BFGS'"):
        call(method="BFGS")
    session = in_session("affine", ss_sigma_factor=1, level_iters=[9, 5])
    call = partial(call.func, *call.args, session=session, moving_affine=np.eye(4))
    call = partial(call, **session.parameters)
    # Where it starts is the moving owner's own, if it is a matrix.
    with pytest.raises(AssertionError, match="something was sent"):
        call(starting_affine=np.eye(4))


def test_another_operation(in_session, images):
    session = in_session("affine", **BRIEF)
    with pytest.raises(ParameterMismatchError, match="'affine', but this call .*'syn'"):
        syn_registration(
            images(3)[1], "remote", moving_affine=np.eye(4), session=session
        )


def test_classes_keep_to_the_file_as_well(in_session, images):
    static, moving, static_grid2world, moving_grid2world = images(3)
    pair = RemoteImage(static.shape, static_grid2world), moving
    session = in_session("affine", pipeline=["rigid"], **BRIEF)
    levels = {name: BRIEF[name] for name in ("level_iters", "sigmas", "factors")}

    scaled = {"ss_sigma_factor": 0.5, "sigmas": None, "factors": None}

    def optimize(kind="RIGID", *, nbins=16, metric_session=None, **options):
        metric = SecureMutualInformationMetric(nbins=nbins, session=metric_session)
        registration = SecureAffineRegistration(
            metric=metric, session=session, **{**levels, **options}
        )
        registration.optimize(
            *pair, regtransforms[kind, 3], None, moving_grid2world=moving_grid2world
        )

    for call, words in (
        (partial(optimize, "AFFINE"), r"pipeline is \['rigid'\] .*\['affine'\]"),
        (partial(optimize, "ROTATION"), r"pipeline is \['rigid'\] .*\['rotation'\]"),
        (partial(optimize, nbins=20), "nbins is 16"),
        (partial(optimize, nbins=20, metric_session=session), "nbins is 16"),
        (partial(optimize, result_to="moving"), "result_to is 'both'"),
        (partial(optimize, options={"evaluations": 2}), "evaluations is 1.0"),
        (partial(optimize, **scaled), "factors is .* None in this call"),
    ):
        with pytest.raises(ParameterMismatchError, match=words):
            call()
    with pytest.raises(AssertionError, match="something was sent"):
        optimize()
    session = in_session("syn", radius=2)
    with pytest.raises(ParameterMismatchError, match="radius is 2 .* 4"):
        SecureCCMetric(3, session=session)
    with pytest.raises(ParameterMismatchError, match="step_length is 0.25 .* 0.2"):
        SecureSymmetricDiffeomorphicRegistration(
            SecureCCMetric(3, radius=2),
            level_iters=[10, 10, 5],
            step_length=0.2,
            session=session,
        ).optimize(*pair, moving_grid2world=moving_grid2world)


# -- limits ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "shape", "measured"),
    [
        # MiB of resident memory at the moving owner, the static owner, the helper.
        (AffineParameters(), (176,) * 3, (1238, 1106, 1502)),
        (AffineParameters(sampling_proportion=0.1), (128,) * 3, (349, 306, 237)),
        (AffineParameters(nbins=64), (128,) * 3, (841, 785, 1196)),
        (AffineParameters(hide_steps=True), (128,) * 3, (587, 715, 882)),
        (AffineParameters(reveal="gradient"), (128,) * 3, (904, 808, 686)),
        (SYN, (64,) * 3, (304, 294, 249)),
        (SYN, (112,) * 3, (887, 890, 582)),
        (SynParameters(map_spacing=2), (112,) * 3, (1130, 1102, 679)),
        (SYN, (192, 160, 192), (2970, 2970, None)),
        (SynParameters(reveal="update"), (112,) * 3, (653, 639, 471)),
        (SynParameters(dim=2), (1000, 1000), (913, 903, 657)),
        (FreeFormParameters(), (110,) * 3, (539, 349, 308)),
        (FreeFormParameters(dim=2), (1200, 1200), (469, 313, 274)),
        (SynParameters(metric="SSD"), (99, 117, 95), (673, 674, 409)),
        (SynParameters(metric="MIND"), (99, 117, 95), (834, 829, 490)),
        (SynParameters(metric="SSD", dim=2), (1000, 1000), (723, 706, 520)),
        (SynParameters(metric="MIND", dim=2), (1000, 1000), (1239, 1225, 833)),
    ],
)
def test_memory_is_estimated_from_above(parameters, shape, measured):
    """Of what was measured when it was fitted; of one party too little is known."""
    found = peaks(parameters, shape, shape)
    for pid, mebibytes in zip(ROLES, measured, strict=True):
        if mebibytes is not None:
            assert 0.97 < found[pid] / (mebibytes * 2**20) < 1.45


@pytest.mark.parametrize(
    "parameters, shape, measured",
    [
        (SynParameters(), (64,) * 3, 633 * 64**3),
        (SynParameters(dim=2), (512,) * 2, 822 * 512**2),
        (PointParameters(), (300_000, 3), 207 * 900_000),
        (PointParameters(), (1_000_000, 2), 193 * 2_000_000),
    ],
)
def test_memory_of_two_owners_is_estimated_from_above(parameters, shape, measured):
    """Of what was measured of an owner besides the program."""
    found, plain = (peaks(parameters, shape, shape, alone) for alone in (True, False))
    for pid in (MOVING, STATIC):
        assert plain[pid] < found[pid]
        assert 1.0 < (found[pid] - 200e6) / measured < 1.45


@pytest.mark.parametrize(
    "parameters, shape, measured",
    [
        (AffineParameters(metric="SSD"), (110,) * 3, (493, 362)),
        (
            AffineParameters(metric="SSD", sampling_proportion=0.1),
            (110,) * 3,
            (308, 251),
        ),
        (FreeFormParameters(dim=2), (1000, 1000), (439, 294)),
    ],
)
def test_memory_of_encrypted_images_is_estimated_from_above(
    parameters, shape, measured
):
    """Of peaks of both owners, the program included."""
    found = peaks(parameters, shape, shape, alone=True)
    for pid, mebibytes in zip((MOVING, STATIC), measured, strict=True):
        assert 0.97 < found[pid] / (mebibytes * 2**20) < 1.45


@pytest.mark.parametrize("proportion, mebibytes", [(0.05, 332), (0.2, 568)])
def test_memory_of_encrypted_categories_is_estimated_from_above(proportion, mebibytes):
    """Of what was measured of the moving owner besides the program and its image."""
    parameters, shape = AffineParameters(sampling_proportion=proportion), (91, 109, 91)
    found = peaks(parameters, shape, shape, alone=True)
    assert 1.0 < (found[MOVING] - 200e6) / (mebibytes * 2**20) < 1.45
    assert found[STATIC] < found[MOVING] / 2
    # Few samples of a fine level: every voxel of a coarse one counts.
    few = AffineParameters(sampling_proportion=0.001)
    assert peaks(few, shape, shape, alone=True)[MOVING] > 400e6


def test_images_beyond_the_limits(trio, outcomes, images):
    """All parties say so alike, before anything is computed."""
    static, moving, *grids = images(3)

    def party(session):
        session.plan = plan_of("affine", limits={"memory": 0.1}, **BRIEF)
        pair = {"static": "remote", "moving": "remote"}
        if session.pid == MOVING:
            pair.update(moving=moving, moving_affine=grids[1])
        if session.pid == STATIC:
            pair.update(static=static, static_affine=grids[0])
        return affine_registration(**pair, session=session, **session.parameters)

    said = {str(error) for error in outcomes(trio, party, stop=False)}
    assert len(said) == 1
    assert "0.1 GB of [limits]" in said.pop()


def test_an_image_of_too_many_voxels(in_session, images):
    session = in_session("affine", limits={"voxels": 1000}, **BRIEF)
    with pytest.raises(ValueError, match="moving image has 21 x 19 x 17 .* 1,000"):
        affine_registration(
            images(3)[1],
            "remote",
            moving_affine=np.eye(4),
            session=session,
            **session.parameters,
        )


def test_a_remedy_is_named_for_each_operation():
    large = (1000, 1000, 1000)
    with pytest.raises(ValueError, match="at the helper.*sampling_proportion"):
        check_memory(LIMITS, AFFINE, large, large)
    with pytest.raises(ValueError, match="owner, more than the 16 GB") as caught:
        check_memory(LIMITS, SYN, large, large)
    assert "sampling" not in str(caught.value)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"memory": 0}, r"memory in \[limits\] must be GB"),
        ({"memory": True}, r"memory in \[limits\] must be GB"),
        ({"memory": float("nan")}, r"memory in \[limits\] must be GB"),
        ({"voxels": 1e6}, r"voxels in \[limits\] must be an integer"),
        ({"time": 3}, r"\[limits\] has no entry 'time'"),
    ],
)
def test_limits_that_are_none(limits, words):
    with pytest.raises(SessionFileError, match=words):
        plan_of("affine", limits=limits)


def test_limits_are_part_of_what_is_agreed():
    contents = pins.contents()
    plain = SessionFile.parse(contents)
    other = SessionFile.parse({**contents, "limits": {"memory": 8.5}})
    assert plain.limits == LIMITS and other.limits["memory"] == 8.5
    assert plain.digest != other.digest
    assert other.agreement()["limits.memory"] == 8.5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"optimizer_options": [1]}, "must be a dict"),
        ({"starting_affine": np.eye(4) + 0.3j}, "starting_affine must be"),
    ],
)
def test_contradictions_and_other_kinds_of_options(options, words):
    image, unit = np.random.default_rng(0).random((12, 12, 12)), np.eye(4)
    grids = {"moving_affine": unit, "static_affine": unit}
    with pytest.raises(ValueError, match=words):
        affine_registration(image, image, pipeline=["rigid"], **grids, **options)


@pytest.mark.parametrize(
    "entries, bits",
    [
        ({}, {"mismatch", "stuck"}),
        ({"result_to": "moving"}, {"mismatch"}),
        ({"parameters": {"pipeline": ["center_of_mass"]}}, set()),
        ({"parameters": {"pipeline": ["rigid", "center_of_mass"]}}, set()),
        ({"parameters": {"hide_steps": True}}, {"mismatch", "stuck"}),
    ],
)
def test_bits_of_the_end_are_announced_where_they_are_opened(entries, bits):
    text = explain(pins.plan(reveal="transform", **entries))
    assert {label for label in ("mismatch", "stuck") if f"({label})" in text} == bits
