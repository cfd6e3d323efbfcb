"""What two owners can make alone, and that nothing else is begun."""

from dipy.align.transforms import AffineTransform2D
import numpy as np
import pytest

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
        ("affine", {"hide_steps": True}),
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
