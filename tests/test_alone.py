"""What two owners can make alone, and that nothing else is begun."""

from dipy.align.transforms import AffineTransform2D
import numpy as np
import pytest
from scipy import ndimage

from dipy_ppir.align import (
    affine_registration,
    freeform_registration,
    point_registration,
    syn_registration,
)
from dipy_ppir.align.alone import ALONE, check_alone, check_parties
from dipy_ppir.align.ccmetric import SecureCrossCorrelationMetric
from dipy_ppir.align.imaffine import SecureAffineRegistration
from dipy_ppir.align.parameters import (
    AffineParameters,
    FreeFormParameters,
    ParameterError,
    PointParameters,
    SynParameters,
)
from dipy_ppir.mpc import local
from dipy_ppir.mpc.receipt import receipt_text

KINDS = {
    "affine": AffineParameters,
    "syn": SynParameters,
    "freeform": FreeFormParameters,
    "points": PointParameters,
}


@pytest.fixture
def nobody(monkeypatch):
    """Fail where a process is started."""
    monkeypatch.setattr(local, "run_locally", lambda *_, **__: pytest.fail("started"))


@pytest.mark.parametrize("operation", KINDS)
def test_every_operation_runs_by_default(operation):
    check_alone(operation, KINDS[operation]())


@pytest.mark.parametrize(
    ("operation", "row"), [(name, row) for name, rows in ALONE.items() for row in rows]
)
def test_the_rows_are_of_parameters_that_there_are(operation, row):
    check_alone(operation, KINDS[operation](**row))


@pytest.mark.parametrize(
    ("operation", "given"),
    [
        ("affine", {"metric": "CC"}),
        ("affine", {"reveal": "gradient"}),
        ("affine", {"reveal": "histogram"}),
        ("affine", {"backend": "mpyc"}),
        ("syn", {"reveal": "update"}),
        ("syn", {"reveal": "force", "backend": "mpyc"}),
    ],
)
def test_what_needs_a_helper_is_refused(operation, given):
    with pytest.raises(ParameterError, match="needs a helper.*or add a helper"):
        check_alone(operation, KINDS[operation](**given))


def test_a_centre_of_mass_needs_no_metric():
    check_alone("affine", AffineParameters(pipeline=["center_of_mass"], metric="CC"))


@pytest.mark.parametrize("parties", [0, 1, 4, -2, "2", 2.5, True, [2]])
def test_other_numbers_are_refused(nobody, parties):
    points = np.random.default_rng(3).normal(size=(5, 2))
    with pytest.raises(ValueError, match="parties must be 3.*or 2.*alone"):
        point_registration(points, points, parties=parties)


def test_a_session_has_its_own_number(duo, trio):
    parameters = PointParameters()
    for sessions, wrong in ((duo, 3), (trio, 2)):
        check_parties(None, sessions[0], "points", parameters)
        check_parties(len(sessions), sessions[0], "points", parameters)
        with pytest.raises(ValueError, match="the session has"):
            check_parties(wrong, sessions[0], "points", parameters)


def test_nothing_is_begun(nobody, images):
    static, moving, static_affine, moving_affine = images(2)
    pair = {"static_affine": static_affine, "moving_affine": moving_affine}
    for function, given in (
        (affine_registration, {"metric": "CC"}),
        (syn_registration, {"reveal": "update", "dim": 2}),
        (freeform_registration, {"dim": 2, "parties": 7}),
    ):
        with pytest.raises(ValueError, match="alone"):
            function(moving, static, **{**pair, "parties": 2, **given})
    registration = SecureAffineRegistration(
        metric=SecureCrossCorrelationMetric(), parties=2
    )
    with pytest.raises(ValueError, match="needs a helper"):
        registration.optimize(static, moving, AffineTransform2D(), None)


def test_a_session_of_two_is_asked_as_well(duo, images):
    static, _, static_affine, _ = images(2)
    with pytest.raises(ValueError, match="needs a helper"):
        affine_registration(
            static, "remote", static_affine=static_affine, metric="CC", session=duo[0]
        )


def test_two_owners_find_centres_of_mass_as_three_parties_do(images):
    static, moving, static_affine, moving_affine = images(2)

    def run(**options):
        return affine_registration(
            moving,
            static,
            static_affine=static_affine,
            moving_affine=moving_affine,
            pipeline=["center_of_mass"],
            ret_receipt=True,
            **options,
        )

    (moved, matrix, receipt), (_, wanted, other) = run(parties=2), run()
    np.testing.assert_array_equal(matrix, wanted)
    assert moved is not None
    assert (receipt["m"], receipt["t"]) == (2, 1)
    assert set(receipt["learned"]) == {"moving owner", "static owner"}
    for role, learned in receipt["learned"].items():
        assert learned == other["learned"][role]
    # What an owner that deviates may learn differs, and is said.
    follows = "as long as both owners followed the program"
    assert follows in receipt_text(receipt) and follows not in receipt_text(other)
    assert "it learns no more of them" not in receipt_text(receipt)


TWO_LEVELS = {"level_iters": [6, 4], "factors": [2, 1], "sigmas": [1.0, 0.0]}
RUNS = {
    "points": (point_registration, {}),
    "SSD": (
        affine_registration,
        {**TWO_LEVELS, "metric": "SSD", "pipeline": ["center_of_mass", "affine"]},
    ),
    "SSD at edges": (
        affine_registration,
        {
            **TWO_LEVELS,
            "metric": "SSD",
            "pipeline": ["translation"],
            "sampling": "GMS",
            "sampling_proportion": 0.5,
            "result_to": "moving",
        },
    ),
    "MI": (
        affine_registration,
        {**TWO_LEVELS, "pipeline": ["translation"], "nbins": 8},
    ),
    "MI, hidden": (
        affine_registration,
        {**TWO_LEVELS, "pipeline": ["rigid"], "nbins": 8, "hide_steps": True},
    ),
    "splines": (
        freeform_registration,
        {"dim": 2, "level_iters": [2, 2], "opt_tol": 0.0, "ret_metric": True},
    ),
    "SyN": (
        syn_registration,
        {"dim": 2, "level_iters": [1, 1], "radius": 1, "opt_tol": -1e9},
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "run",
    [pytest.param(r, marks=[pytest.mark.heavy] * ("hidden" in r)) for r in RUNS],
)
def test_the_same_is_opened_as_with_a_helper(run):
    """As many numbers of as many bits, to the same owners; nothing to anybody else."""
    function, given = RUNS[run]
    rng = np.random.default_rng(4)
    if function is point_registration:
        static = rng.normal(size=(9, 2)) * 30
        pair, moving = {}, static + [3.0, -2.0]
    else:
        static = ndimage.gaussian_filter(rng.random((24, 22)), 3)
        moving = np.roll(static, 1, axis=0)
        pair = dict.fromkeys(("static_affine", "moving_affine"), np.eye(3))
    two, three = (
        function(moving, static, ret_receipt=True, parties=n, **pair, **given)[-1]
        for n in (2, 3)
    )
    for role, learned in two["learned"].items():
        assert learned == three["learned"][role]
        assert two["bits"][role] == three["bits"][role]
    assert set(two["bytes_sent"]) == {"moving owner", "static owner"}
    assert "bfv" in two["fields"] and "bfv" not in three["fields"]
