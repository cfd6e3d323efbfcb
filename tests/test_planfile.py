"""Plans of sites that add up: what is in them, what is refused, who dials whom."""

from functools import cache, partial

import numpy as np
import pins
from ports import free_port
import pytest
import summing  # noqa: F401  declares what is opened here

from dipy_ppir.mpc.errors import (
    ParameterMismatchError,
    PeerTimeoutError,
    SessionFileError,
)
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.meeting import Meeting
from dipy_ppir.mpc.planfile import PlanFile
from dipy_ppir.mpc.sums import SumSession

together = partial(pins.together, seconds=600)


@cache
def identity(number):
    return create_identity(f"Clinic {number}")


def contents(count=3, hidden=(), **entries):
    """A plan's contents, with addresses but for the sites of these numbers."""
    sites = []
    for n in range(count):
        site = {"name": f"Clinic {n}", "fingerprint": identity(n).fingerprint}
        if n not in hidden:
            site["address"] = f"127.0.0.1:{free_port()}"
        sites.append(site)
    timeouts = {"connect": 300.0, "silence": 300.0}
    return {"operation": "template", "sites": sites, "timeouts": timeouts, **entries}


def test_what_is_in_a_plan():
    plan = PlanFile.parse(contents(parameters={"iterations": 3}))
    assert [p.title for p in plan.parties.values()] == [
        f"the site Clinic {n}" for n in range(3)
    ]
    assert plan.arguments == plan.parameters == {"iterations": 3}
    assert plan.title == "untitled"
    assert PlanFile.parse({**contents(), "timeouts": {}}).timeouts["silence"] == 86400


@pytest.mark.parametrize(
    "change, message",
    {
        "two sites": (lambda c: c["sites"].pop(), "2 sites are too few"),
        "no sites": (lambda c: c.pop("sites"), "0 sites are too few"),
        "no list": (lambda c: c.update(sites={"a": 1}), r"begins with \[\[sites\]\]"),
        "too many": (lambda c: c["sites"].extend(c["sites"] * 10), "33 .* too many"),
        "two hidden": (
            lambda c: [c["sites"][n].pop("address") for n in (0, 2)],
            "Clinic 0 and Clinic 2 have no address",
        ),
        "one key twice": (
            lambda c: c["sites"][1].update(c["sites"][0], name="other"),
            "same fingerprint.*hides the others",
        ),
        "one name twice": (
            lambda c: c["sites"][1].update(name="Clinic 0"),
            "same name",
        ),
        "no fingerprint": (
            lambda c: c["sites"][1].update(fingerprint="12"),
            r"fingerprint in \[\[sites\]\] number 2 is not",
        ),
        "stranger": (lambda c: c["sites"][1].update(role="x"), "no entry 'role'"),
        "reveal": (lambda c: c.update(reveal="map"), "no entry 'reveal'"),
        "checkpoint": (
            lambda c: c["timeouts"].update(checkpoint=3.0),
            "no entry 'checkpoint'",
        ),
        "no operation": (lambda c: c.pop("operation"), "lacks operation"),
        "table": (lambda c: c.update(parameters=3), r"\[parameters\] must be a table"),
    }.values(),
)
def test_plans_that_are_refused(change, message):
    given = contents()
    change(given)
    with pytest.raises(SessionFileError, match=message):
        PlanFile.parse(given)


@pytest.mark.parametrize("hidden", [(), (0,), (1,), (3,)])
def test_every_pair_is_connected_once(hidden):
    plan = PlanFile.parse(contents(4, hidden))
    dialled = [{pid, other} for pid in range(4) for other in plan.dials(pid)]
    assert len(dialled) == 6 and len({frozenset(pair) for pair in dialled}) == 6
    for pid in range(4):
        assert all(plan.parties[other].address for other in plan.dials(pid))


def test_a_file(tmp_path):
    path = tmp_path / "plan.toml"
    lines = ['operation = "template"']
    for site in contents()["sites"]:
        lines += ["[[sites]]", *(f'{key} = "{value}"' for key, value in site.items())]
    path.write_text("\n".join(lines))
    assert len(PlanFile.read(path).parties) == 3
    path.write_text("sites")
    with pytest.raises(SessionFileError, match="not a TOML.*dipy_ppir_template new"):
        PlanFile.read(path)
    with pytest.raises(SessionFileError, match="cannot read the plan"):
        PlanFile.read(tmp_path / "nowhere.toml")


# -- sites that meet ---------------------------------------------------------


@pytest.fixture(autouse=True)
def prompt(monkeypatch):
    pins.meet_promptly(monkeypatch)


def come(plan, number, numbers):
    """A site that comes, adds up, and tells what it got, or what went wrong."""
    meeting = Meeting(plan, identity(number))
    meeting.hold()
    with SumSession.of_meeting(meeting) as session:
        total = session.total(numbers, "test-sum", 10**6)
        return total, session.receipt(operation="template")


@pytest.mark.parametrize("count, hidden", [(3, ()), (3, (2,)), (4, (0,))])
def test_sites_meet_and_add_up(count, hidden):
    plan = PlanFile.parse(contents(count, hidden))
    own = np.random.default_rng(1).integers(0, 1000, (count, 20))
    results = together(*(partial(come, plan, n, own[n]) for n in range(count)))
    for total, receipt in results:
        np.testing.assert_array_equal(total, own.sum(axis=0))
        assert not receipt["warnings"]
        roles = [f"site Clinic {n}" for n in range(count)]
        assert list(receipt["signatures"]) == list(receipt["parties"]) == roles
        assert receipt["session_file"] == plan.digest
    assert len({receipt["run"] for _, receipt in results}) == 1


def test_plans_that_differ_are_named():
    given = contents(parameters={"iterations": 3})
    plans = [PlanFile.parse(given)] * 2
    plans.append(PlanFile.parse({**given, "parameters": {"iterations": 4}}))
    results = together(
        *(partial(come, plan, n, np.arange(9)) for n, plan in enumerate(plans))
    )
    for error in results:
        assert isinstance(error, ParameterMismatchError)
        assert "'parameters.iterations' of the plan" in str(error)
        assert "4 (hash" in str(error) and "at the site Clinic 2" in str(error)


@pytest.mark.parametrize(
    "present, said",
    [
        (
            [0],
            "the site Clinic 1 and the site Clinic 2 did not come within 300 s; check "
            "that they were started with the same plan and that the firewalls let them "
            "through",
        ),
        (
            [0, 1],
            "the site Clinic 2 did not come within 300 s; check that it was started "
            "with the same plan and that the firewalls let it through",
        ),
    ],
)
def test_who_did_not_come_is_named(monkeypatch, present, said):
    """As soon as those who are there have met, time is over."""
    clock = pins.clock_of_meetings(monkeypatch)
    plan = PlanFile.parse(contents(timeouts={"connect": 300.0}))

    def waiting(*_):
        if all(len(here.links) == len(present) - 1 for here in meetings):
            clock.ahead = 600.0

    meetings = [Meeting(plan, identity(n), on_wait=waiting) for n in present]
    errors = together(*(here.hold for here in meetings))
    # Who gives up first leaves the other without either, and came all the same.
    assert all(str(error).startswith(said) for error in errors), errors
    assert all(isinstance(error, PeerTimeoutError) for error in errors)


def test_a_stranger_is_not_in_the_plan():
    with pytest.raises(SessionFileError, match="the plan does not name"):
        Meeting(PlanFile.parse(contents()), identity(7))
