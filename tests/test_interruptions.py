"""Sites that are killed, and runs that go on afterwards."""

from contextlib import nullcontext
from copy import copy
import json
import os
import random
import shutil
import signal
import stat
from types import SimpleNamespace

import nibabel as nib
import numpy as np
from parties import local_pair, run_trio
import pytest
from sites import NOISELESS, ROLES, Launcher, Sites

from dipy_ppir.align import RemoteImage, affine_registration
from dipy_ppir.align.checkpoint import Checkpoint, CheckpointError
from dipy_ppir.align.resumption import Resumption
from dipy_ppir.mpc.errors import PeerError, ProtocolError
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.record import is_hex
from dipy_ppir.workflows.receiptfile import load
from dipy_ppir.workflows.receipts import check

SYN = {"level_iters": [4, 4], "radius": 2, "opt_tol": -1e9}
AFFINE = {
    "pipeline": ["center_of_mass", "translation", "rigid"],
    "level_iters": [6, 4],
    "sigmas": [2.0, 0.0],
    "factors": [2, 1],
    "nbins": 16,
}
#: Frames that a party sends in a SyN run, about.
FRAMES = 80
#: What is opened in every step.
LABELS = {"syn": "update_moving", "affine": "joint_histogram"}

# Sites kill themselves, so that it happens at the same place however busy the machine
# is. At the earliest when all have met: who dies before is waited for.

#: When so many steps are written down.
DIES_AT_STEP = """
import os, signal
from dipy_ppir.align.checkpoint import Checkpoint
append, steps = Checkpoint.append, 0
def count_and_append(self, record):
    global steps
    append(self, record)
    steps += "level" in record or "place" in record
    if steps == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.append = count_and_append
"""
#: When it is about to be shown whether the images match.
DIES_OPENING = """
import os, signal
from dipy_ppir.align.checkpoint import Checkpoint
append = Checkpoint.append
def append_and_die(self, record):
    append(self, record)
    if "mismatch" in record.get("opens", ()):
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.append = append_and_die
"""
#: When so many frames are sent; not when all have written, and others may be done.
DIES_SENDING = """
import os, signal
from dipy_ppir.mpc.frame import operation_code
from dipy_ppir.mpc.network import Network
send, sent, written = Network._send_frame, 0, False
early = [operation_code(name) for name in ("ready", "agree-session file")]
def count_and_send(self, peer, kind, op, payload):
    global sent, written
    sent += op not in early
    written = written or op == operation_code("written")
    if sent == {at} and not written:
        os.kill(os.getpid(), signal.SIGKILL)
    send(self, peer, kind, op, payload)
Network._send_frame = count_and_send
"""
#: When it is about to make its checkpoint, and all others have made theirs: those that
#: have not heard from all yet would make none.
DIES_AT_FIRST = """
import os, signal, time
from dipy_ppir.align.checkpoint import Checkpoint
def wait_and_die(self, *_, **__):
    while not all(map(os.path.exists, {others})):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.begin = wait_and_die
"""
#: As on a full disk: the receipt, the last file, gets no content.
CANNOT_WRITE = """
import resource, signal
from dipy_ppir.workflows import remote
write = remote.write_receipt
def limited(*arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10**9))
    try:
        write(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, 10**9))
remote.write_receipt = limited
"""


@pytest.fixture(scope="module", autouse=True)
def launcher():
    with Launcher():
        yield


def sites_for(folder, operation, bodies, **options):
    static, _, matrix, _ = bodies(3)
    moving = np.roll(static, 1, axis=1) ** 0.8
    return Sites(
        folder,
        operation,
        (static, moving, matrix, matrix),
        parameters=SYN if operation == "syn" else AFFINE,
        **{
            "timeouts": {"checkpoint": 0},
            # There are most states, and most to count, where every iteration opens.
            "reveal": "update" if operation == "syn" else None,
            **options,
        },
    )


def checkpoint_of(sites, site):
    return sites.folder / f"out_{site}" / f"session.{ROLES[site]}.checkpoint"


def progress(sites, site):
    """How many steps a site has written down."""
    lines = (checkpoint_of(sites, site) / "journal.jsonl").read_bytes().splitlines()
    return sum(b'"level"' in line or b'"place"' in line for line in lines)


def kill(sites, victim, code, *extra):
    """Run while `victim` runs `code` that kills it; whether it did.

    The others end, and name it.
    """
    statuses = sites.wait(sites.start(*extra, before={victim: code}))
    if statuses[victim] == 0:
        assert set(statuses.values()) == {0}
        return False
    assert statuses[victim] == -signal.SIGKILL, sites.log(victim)
    for site in set(ROLES) - {victim}:
        assert statuses[site] == 1, sites.log(site)
        assert f"(Site {victim})" in sites.last_line(site), sites.log(site)
        assert "Traceback" not in sites.log(site)
    assert results_written(sites) == []
    return True


def kill_at(sites, victim, steps):
    """Start anew and kill `victim` when it has written down so many steps."""
    remove_outputs(sites)
    assert kill(sites, victim, DIES_AT_STEP.format(at=steps))


def remove_outputs(sites):
    for site in ROLES:
        shutil.rmtree(sites.folder / f"out_{site}", ignore_errors=True)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, bodies):
    """Sites of a SyN run that was killed in its first level; not to be changed."""
    sites = sites_for(tmp_path_factory.mktemp("syn") / "sites", "syn", bodies)
    kill_at(sites, "moving", 3)
    return sites


@pytest.fixture
def sites(interrupted, tmp_path):
    """A copy of `interrupted`."""
    sites = copy(interrupted)
    sites.folder = shutil.copytree(interrupted.folder, tmp_path / "sites")
    sites.file = sites.folder / "session.toml"
    return sites


def result(sites):
    """What the moving owner got."""
    folder = sites.folder / "out_moving"
    if sites.operation == "affine":
        return np.loadtxt(folder / "affine.txt")
    return np.asarray(nib.load(folder / "displacement_field.nii.gz").dataobj)


def results_written(sites):
    return [f for s in ROLES for f in sites.outputs(s) if "checkpoint" not in f]


def openings(sites):
    """How often what a step opens was opened, by the moving owner's receipt."""
    receipt = json.loads((sites.folder / "out_moving" / "receipt.json").read_text())
    opened = {e["label"]: e["openings"] for e in receipt["learned"]["moving owner"]}
    return opened[LABELS[sites.operation]], receipt["resumed"]


@pytest.mark.parametrize(
    ("operation", "victim"), [("syn", "static"), ("affine", "helper")]
)
def test_resuming_ends_where_an_uninterrupted_run_ends(
    tmp_path, bodies, operation, victim
):
    """What was done is not done again, but for the step under way."""
    sites = sites_for(tmp_path / "sites", operation, bodies, before=NOISELESS)
    sites.run()
    uninterrupted = result(sites)
    total, resumed = openings(sites)
    assert resumed == 0
    steps = 3 * total // 4
    kill_at(sites, victim, steps)
    for site in ROLES:  # parties are never further apart than one
        assert steps - 1 <= progress(sites, site) <= steps
    sites.run("--resume")
    np.testing.assert_array_equal(result(sites), uninterrupted)
    opened, resumed = openings(sites)
    assert resumed == 1
    # Less, and the receipt forgot the first run.
    assert total <= opened <= total + 2
    # Finished: nothing is kept, nothing is left over.
    assert not any("checkpoint" in f for s in ROLES for f in sites.outputs(s))


@pytest.mark.parametrize("most", [3, pytest.param(20, marks=pytest.mark.heavy)])
def test_killed_at_random(tmp_path, bodies, descendants, most):
    """No hang, no orphan, no result of half a run; and it ends all the same."""
    sites = sites_for(tmp_path / "sites", "syn", bodies, before=NOISELESS)
    sites.run()
    uninterrupted = result(sites)
    rng = random.Random(8)
    kills, before = 0, set(descendants(os.getpid()))
    while kills < most:
        remove_outputs(sites)
        extra = ()
        for _ in range(rng.randint(1, 5)):
            code = DIES_SENDING.format(at=rng.randint(1, FRAMES))
            killed = kill(sites, rng.choice(list(ROLES)), code, *extra)
            assert set(descendants(os.getpid())) <= before
            if not killed:
                break  # it was over before
            kills += 1
            extra = ("--resume",)
        else:
            sites.run("--resume")
        np.testing.assert_array_equal(result(sites), uninterrupted)


def test_who_cannot_write_its_result_may_try_again(tmp_path, bodies):
    """The others wait until all have written, and keep what is needed to go on."""
    timeouts = {"checkpoint": 1000}
    sites = sites_for(tmp_path / "sites", "syn", bodies, timeouts=timeouts)
    processes = sites.start(before={"moving": CANNOT_WRITE})
    assert set(sites.wait(processes).values()) == {1}
    assert "File too large" in sites.last_line("moving")
    for site in ("static", "helper"):
        assert "moving owner (Site moving)" in sites.last_line(site), sites.log(site)
    assert results_written(sites) == []
    sites.run("--resume")
    assert "displacement_field.nii.gz" in sites.outputs("moving")


def test_starting_anew_sets_aside(sites):
    sites.run()
    for site, pid in ROLES.items():
        assert f"session.{pid}.checkpoint.old" in sites.outputs(site)
        assert "is set aside as" in sites.log(site)


def test_only_some_want_to_resume(sites):
    processes = sites.start("--resume", sites=("moving", "helper"))
    processes |= sites.start(sites=("static",))
    assert set(sites.wait(processes).values()) == {1}
    for site in ROLES:
        assert "do not agree on 'resume'" in sites.last_line(site)


def test_another_image_does_not_resume(sites):
    path = sites.folder / "moving.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata() + 1, image.affine), path)
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    assert "belongs to another registration (moving image" in sites.last_line("moving")


def test_iterations_are_not_repeated_for_ever(sites):
    """Every repetition opens a little more; an owner counts them."""
    folder = sites.folder / "out_static" / "session.1.checkpoint"
    with open(folder / "journal.jsonl", "a") as journal:
        for _ in range(2 * SYN["level_iters"][0]):
            journal.write(json.dumps({"level": 1, "iteration": 2}) + "\n")
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    assert "opens too much; start anew" in sites.last_line("static")
    for site in ("moving", "helper"):
        assert "the static owner (Site static) ended" in sites.last_line(site)
    assert results_written(sites) == []


def lose_checkpoint(sites):
    """What was opened before would be missing on the receipt, and from the limits."""
    shutil.rmtree(sites.folder / "out_static" / "session.1.checkpoint")
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    assert "There is no checkpoint" in sites.log("static")
    for site in ROLES:
        assert "owner (Site static) did not find the checkp" in sites.last_line(site)


def test_a_lost_checkpoint_is_missed(sites):
    lose_checkpoint(sites)


@pytest.mark.heavy
def test_a_lost_checkpoint_of_an_affine_run_is_missed(tmp_path, bodies):
    sites = sites_for(tmp_path / "sites", "affine", bodies)
    kill_at(sites, "moving", 5)
    lose_checkpoint(sites)


def test_a_checkpoint_of_another_run_is_refused(sites, tmp_path):
    folder = sites.folder / "out_helper" / "session.2.checkpoint"
    old = shutil.copytree(folder, tmp_path / "old")
    kill_at(sites, "moving", 3)
    shutil.rmtree(folder)
    shutil.move(old, folder)
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    for site in ROLES:
        assert "parties do not have the checkpoint" in sites.last_line(site)


@pytest.mark.parametrize("begun", [False, True])
def test_resuming_what_had_not_begun(tmp_path, bodies, begun):
    """Not started at all, or the others had an empty checkpoint already."""
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    if begun:
        others = [
            str(checkpoint_of(sites, site) / "registration.json")
            for site in ("static", "helper")
        ]
        assert kill(sites, "moving", DIES_AT_FIRST.format(others=others))
        assert progress(sites, "static") == progress(sites, "helper") == 0
    sites.run("--resume")
    receipt = json.loads((sites.folder / "out_static" / "receipt.json").read_text())
    assert receipt["resumed"] == 0


# -- the folder ----------------------------------------------------------


def test_checkpoints_are_private(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.begin({"a": 1})
    checkpoint.append({"x": 1.5})
    checkpoint.save(3, {"n": 3}, {"field": np.arange(6.0)})
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700
    for path in (tmp_path / "c").iterdir():
        if path.suffix == ".npz" or path.name == "registration.json":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    checkpoint.discard()
    assert not (tmp_path / "c").exists()


def test_states_come_back_as_they_were(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.begin({"a": 1})
    field = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    for number in (4, 5, 7):
        facts = {"value": 0.1 + number, "none": None, "inf": np.inf}
        checkpoint.save(number, facts, {"field": field + number})
    again = Checkpoint(tmp_path / "c", resume=True)
    again.check({"a": 1})
    assert again.run is None
    assert again.numbers() == [5, 7]
    facts, arrays = again.load(7)
    assert facts == {"value": 7.1, "none": None, "inf": np.inf}
    np.testing.assert_array_equal(arrays["field"], field + 7)
    assert arrays["field"].dtype == np.float32
    again.forget_after(5)
    assert again.numbers() == [5]


def test_a_torn_record_is_left_out(tmp_path):
    """As a power cut leaves it; what is added later is not torn with it."""
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.begin({})
    checkpoint.append({"n": 1})
    checkpoint.append({"n": 2})
    path = tmp_path / "c" / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    again = Checkpoint(tmp_path / "c", resume=True)
    again.begin({})
    assert again.records() == [{"n": 1}]
    again.append({"n": 3})
    assert again.records() == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize("damage", ["cut", "pickle", "text"])
def test_a_damaged_state_is_refused(tmp_path, damage):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.begin({})
    checkpoint.save(1, {}, {"field": np.arange(1000.0)})
    path = tmp_path / "c" / "state-1.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "text":
        path.write_bytes(b"not a state")
    else:
        np.savez(path, facts=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="start anew"):
        checkpoint.load(1)


def test_a_fresh_start_removes_the_old_state(tmp_path):
    old = Checkpoint(tmp_path / "c")
    old.begin({"a": 1})
    old.append({"n": 1})
    old.save(1, {}, {})
    new = Checkpoint(tmp_path / "c")
    new.begin({"a": 2})
    assert new.numbers() == [] and new.records() == []
    with pytest.raises(CheckpointError, match="a differs"):
        Checkpoint(tmp_path / "c", resume=True).check({"a": 1})


@pytest.fixture(scope="module")
def run_on_shares(tmp_path_factory, bodies):
    """Sites after a run on shares, and what it found."""
    folder = tmp_path_factory.mktemp("shares") / "sites"
    sites = sites_for(folder, "affine", bodies, reveal="transform")
    sites.run()
    return sites, result(sites)


@pytest.mark.parametrize(
    "victim", ["moving", pytest.param("static", marks=pytest.mark.heavy), "helper"]
)
def test_a_run_on_shares_goes_on_at_the_level_that_was_cut_off(
    run_on_shares, bodies, victim
):
    """What is secret is on no disk: that level is begun anew, and counted again."""
    sites, whole = run_on_shares
    # A record at each level's beginning, each step, and each result: see `plan`.
    at = 9 if victim == "moving" else 8
    kill_at(sites, victim, at)
    sites.run("--resume")
    receipt = json.loads((sites.folder / "out_moving" / "receipt.json").read_text())
    learned = {e["label"]: e for e in receipt["learned"]["moving owner"]}
    planned = 3 + 5 + 3
    again = learned["better"]["values"] - planned
    assert 1 <= again <= 3
    assert learned["center_of_mass"]["openings"] == 1
    assert receipt["resumed"] == 1
    (before,) = receipt["earlier_runs"]
    assert is_hex(before, 64) and before != receipt["run"]
    # Each counts what came before as far as it came; what they sign is the same.
    files = [sites.folder / f"out_{site}" / "receipt.json" for site in ROLES]
    assert check({str(file): load(file) for file in files}) == []
    static, _, matrix, _ = bodies(3)
    points = np.indices(static.shape).reshape(3, -1)
    points = matrix @ np.vstack([points, np.ones(points.shape[1])])
    apart = (result(sites) - whole) @ points
    # It is one voxel that they find; what is rounded afresh moves where they end.
    assert np.sqrt((apart**2).sum(axis=0).mean()) < 1


def learned(sites, site):
    """By a site's receipt: what was opened to it, by label; and how often resumed."""
    receipt = json.loads((sites.folder / f"out_{site}" / "receipt.json").read_text())
    entries = receipt["learned"][f"{site} owner"]
    return {e["label"]: e["values"] for e in entries}, receipt["resumed"]


#: Of a run that opens the map only; a record for the end of each level.
LEVELS = {"level_iters": [3, 2, 2], "radius": 1, "opt_tol": -1e9}


def map_sites(tmp_path, bodies, **parameters):
    sites = sites_for(tmp_path / "sites", "syn", bodies, reveal="map")
    given = {**LEVELS, **parameters}
    sites.parameters = {k: v for k, v in given.items() if v is not None}
    sites.file = sites.write("session.toml")
    return sites


@pytest.fixture(scope="module")
def run_of_map(tmp_path_factory, bodies):
    """Sites after a run that opens the map, the map, and what was opened."""
    sites = map_sites(tmp_path_factory.mktemp("map"), bodies)
    sites.run()
    return sites, result(sites), learned(sites, "moving")


@pytest.fixture(scope="module")
def run_to_the_end(tmp_path_factory, bodies):
    """The same of a run that opens nothing before its end."""
    sites = map_sites(tmp_path_factory.mktemp("end"), bodies, opens="end")
    sites.run()
    return sites, result(sites), learned(sites, "moving")


@pytest.mark.parametrize(
    ("victim", "at"),
    [
        pytest.param("moving", 3, marks=pytest.mark.heavy),
        ("static", 2),
        ("helper", 3),
        ("moving", 1),
    ],
)
def test_a_run_that_opens_the_map_goes_on_after_the_last_level(run_of_map, victim, at):
    """What a level opens is opened again only if its end had been reached."""
    sites, whole, (once, resumed) = run_of_map
    assert resumed == 0 and once["level_moving"] > 0
    kill_at(sites, victim, at)
    sites.run("--resume")
    opened, resumed = learned(sites, "moving")
    assert resumed == 1
    assert opened.keys() == once.keys()
    assert once["map"] <= opened["map"] <= 2 * once["map"]
    if at == 3 and victim != "helper":
        # Killed right before the map was opened: it might have been right after.
        assert learned(sites, victim)[0]["map"] == 2 * once["map"]
    # Once more at most what one level opened, and less than both.
    assert once["level_moving"] <= opened["level_moving"] < 2 * once["level_moving"]
    # Rounded by chance to half a voxel of 1 mm.
    apart = np.linalg.norm(result(sites) - whole, axis=3)
    assert np.sqrt((apart**2).mean()) < 0.6
    assert not any("checkpoint" in f for s in ROLES for f in sites.outputs(s))


@pytest.mark.parametrize(
    "victim", ["moving", pytest.param("static", marks=pytest.mark.heavy)]
)
def test_a_run_that_opens_nothing_before_the_end_goes_on(run_to_the_end, victim):
    """From shares at the end of a level, of which nothing had been opened.

    Killed right before the map is: it might have been right after, and is counted.
    """
    sites, whole, (once, _) = run_to_the_end
    assert once.keys() == {"map", "mismatch", "whole"}
    kill_at(sites, victim, 1)
    sites.run("--resume")
    opened, resumed = learned(sites, "moving")
    assert resumed == 1
    assert once["map"] <= opened["map"] <= 2 * once["map"]
    assert learned(sites, victim)[0]["map"] == 2 * once["map"]
    apart = np.linalg.norm(result(sites) - whole, axis=3)
    assert np.sqrt((apart**2).mean()) < 0.6


@pytest.mark.parametrize(
    "metric", ["ssd", pytest.param("mind", marks=pytest.mark.heavy)]
)
def test_runs_with_other_metrics_go_on(tmp_path, bodies, metric):
    """The session file names the metric; a state holds halves only, of any metric."""
    sites = map_sites(tmp_path, bodies, metric=metric, radius=None)
    sites.run()
    whole = result(sites)
    kill_at(sites, "static", 2)
    sites.run("--resume")
    opened, resumed = learned(sites, "moving")
    assert resumed == 1 and {"map", "level_moving", "mismatch"} <= opened.keys()
    apart = np.linalg.norm(result(sites) - whole, axis=3)
    assert np.sqrt((apart**2).mean()) < 0.6
    receipt = json.loads((sites.folder / "out_moving" / "receipt.json").read_text())
    assert receipt["parameters"]["metric"]["metric"] == metric.upper()


def test_a_run_that_opens_the_map_killed_at_random(run_of_map, descendants):
    """No hang, no orphan, no result of half a run; and it ends all the same."""
    sites, whole, _ = run_of_map
    rng, before = random.Random(3), set(descendants(os.getpid()))
    for _ in range(3):
        remove_outputs(sites)
        code = DIES_SENDING.format(at=rng.randint(1, 3 * FRAMES))
        if kill(sites, rng.choice(list(ROLES)), code):
            sites.run("--resume")
        assert set(descendants(os.getpid())) <= before
        apart = np.linalg.norm(result(sites) - whole, axis=3)
        assert np.sqrt((apart**2).mean()) < 0.6


def test_the_end_of_a_level_is_not_opened_for_ever(run_of_map):
    sites, *_ = run_of_map
    kill_at(sites, "moving", 2)
    folder = sites.folder / "out_static" / "session.1.checkpoint"
    with open(folder / "journal.jsonl", "a") as journal:
        for _ in range(2):
            journal.write(json.dumps({"level": 1}) + "\n")
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    assert "shows more than was agreed; start anew" in sites.last_line("static")
    for site in ("moving", "helper"):
        assert "the static owner (Site static) ended" in sites.last_line(site)
    assert results_written(sites) == []


def test_a_level_is_not_begun_anew_for_ever():
    """Neither more steps than twice a level's, nor the first one again and again."""
    place, others = (0, 0), [{"place": [0, 0]}] * 20 + [{"place": [0, 1], "step": 1}]
    for shown, refused in (
        ([], False),
        ([1, 1], False),
        ([1, 1, 1], True),
        ([1, 2, 3], False),
        ([1, 2, 3, 1], True),
    ):
        records = [{"place": [0, 0], "step": k} for k in shown] + others
        resumption = Resumption(SimpleNamespace(records=lambda r=records: r))
        if refused:
            words = f"interrupted after {len(shown)} steps"
            with pytest.raises(CheckpointError, match=words):
                resumption.refuse_repeats(place, 3)
        else:
            resumption.refuse_repeats(place, 3)


def test_an_image_that_its_header_moves_does_not_resume(images, tmp_path):
    """The same voxels elsewhere are another image: nothing goes on with both."""
    static, moving, static_affine, moving_affine = images(2)
    affines = {"static_affine": static_affine, "moving_affine": moving_affine}

    def stop(facts):
        raise KeyboardInterrupt

    def party(session, resume, affines):
        own = static, moving
        remote = [
            RemoteImage(image.shape, affine)
            for image, affine in zip(own, affines.values(), strict=True)
        ]
        return affine_registration(
            moving if session.pid == MOVING else remote[1],
            static if session.pid == STATIC else remote[0],
            session=session,
            metric="SSD",
            pipeline=["translation"],
            callback=None if resume or session.pid != MOVING else stop,
            checkpoint=Checkpoint(tmp_path / str(session.pid), resume=resume),
            ret_receipt=True,
            **affines,
        )

    def run(resume, affines):
        sessions = local_pair()
        try:
            return run_trio(sessions, party, resume, affines)
        finally:
            for session in sessions:
                session.close()

    with pytest.raises((KeyboardInterrupt, PeerError)):
        run(False, affines)
    for name in "static", "moving":
        moved = affines[f"{name}_affine"].copy()
        moved[0, 2] += 2
        with pytest.raises(CheckpointError, match=f"{name} image differs"):
            run(True, {**affines, f"{name}_affine": moved})
    for *_, receipt in run(True, affines):
        assert receipt["resumed"] == 1


def test_what_the_end_shows_is_not_shown_for_ever():
    """Otherwise an owner that asks to go on could ask as often as it likes."""
    for times, refused in ((0, False), (1, False), (2, True)):
        records = [{"opens": ["mismatch"]}] * times + [{"place": [0, 0]}] * 9
        resumption = Resumption(SimpleNamespace(records=lambda r=records: r))
        resumption.refuse_again({"stuck": None})
        if refused:
            with pytest.raises(CheckpointError, match="mismatch.* 2 times already"):
                resumption.refuse_again({"stuck": None, "mismatch": None})
        else:
            resumption.refuse_again({"mismatch": None})
    Resumption().refuse_again({"mismatch": None})


@pytest.mark.parametrize(
    "said, at", [([0, 1], (0, 1)), ([1, 2], (1, 0)), ([2, 0], (1, 0)), ([1, 3], None)]
)
def test_no_party_goes_on_where_another_has_not_been(monkeypatch, said, at):
    """A moving owner that says so would leave out levels and choose a result."""
    monkeypatch.setattr("dipy_ppir.align.resumption.begin_or_resume", lambda *_: True)
    session = SimpleNamespace(
        phase=lambda name: nullcontext(),
        exchange=lambda name, mine: {0: said, 1: mine, 2: [1, 1]},
    )
    records = [{"place": [0, 2]}, {"place": [1, 0]}, {"opens": ["affine"]}]
    resumption = Resumption(SimpleNamespace(records=lambda: records))
    if at is None:
        with pytest.raises(ProtocolError, match="moving owner resumes at no possible"):
            resumption.begin(session, {}, (3, 3), anew=False)
    else:
        resumption.begin(session, {}, (3, 3), anew=False)
        assert resumption.at == at


def test_a_bit_at_the_end_is_written_down_before_it_is_opened(tmp_path, bodies):
    """Whoever breaks off as soon as it is about to have it, has it counted."""
    sites = sites_for(tmp_path / "sites", "affine", bodies, reveal="transform")
    assert kill(sites, "moving", DIES_OPENING)
    assert kill(sites, "moving", DIES_OPENING, "--resume")
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    # The last level is refused first: it would be a third time as well. Whoever is
    # first to find so ends the others.
    refusal = "interrupted after 6 steps"
    assert any(refusal in sites.last_line(site) for site in ROLES)
    folder = sites.folder / "out_static" / "session.1.checkpoint"
    records = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    assert sum("mismatch" in r.get("opens", ()) for r in records) == 2
    assert results_written(sites) == []
