"""Sites that are killed, and runs that go on afterwards."""

import json
import os
import random
import shutil
import signal
import stat
import time

import nibabel as nib
import numpy as np
import pytest
from sites import ROLES, Sites

from dipy_ppir.align.checkpoint import Checkpoint, CheckpointError

SYN = {"level_iters": [12, 12], "radius": 2, "opt_tol": -1e9}
AFFINE = {
    "pipeline": ["center_of_mass", "translation", "rigid"],
    "level_iters": [100, 50],
    "sigmas": [2.0, 0.0],
    "factors": [2, 1],
    "nbins": 16,
}
TIMEOUTS = {"silence": 20, "connect": 8, "checkpoint": 0}


def sites_for(folder, operation, bodies):
    static, _, matrix, _ = bodies(3)
    moving = np.roll(static, 1, axis=1) ** 0.8
    return Sites(
        folder,
        operation,
        (static, moving, matrix, matrix),
        parameters=SYN if operation == "syn" else AFFINE,
        timeouts=TIMEOUTS,
    )


def progress(sites, site):
    """How many steps a site has written down."""
    path = sites.folder / f"out_{site}" / f"session.{ROLES[site]}.checkpoint"
    try:
        lines = (path / "journal.jsonl").read_bytes().splitlines()
        return sum(b'"level"' in line or b'"place"' in line for line in lines)
    except FileNotFoundError:
        return 0


def kill_at(sites, victim, steps, *extra):
    """Run until `victim` has done so many steps, kill it, and wait for the others.

    Returns the exit statuses; None if the run was over before.
    """
    for site in ROLES:
        if not extra:
            shutil.rmtree(sites.folder / f"out_{site}", ignore_errors=True)
    processes = sites.start(*extra)
    while progress(sites, victim) < steps:
        if all(p.poll() is not None for p in processes.values()):
            break
        time.sleep(0.005)
    processes[victim].send_signal(signal.SIGKILL)
    return sites.wait(processes, timeout=60)


def result(sites):
    """What the moving owner got."""
    folder = sites.folder / "out_moving"
    if sites.operation == "affine":
        return np.loadtxt(folder / "affine.txt")
    return np.asarray(nib.load(folder / "displacement_field.nii.gz").dataobj)


def results_written(sites):
    return [f for s in ROLES for f in sites.outputs(s) if "checkpoint" not in f]


# DIPY's inversion of a step stops by a tolerance of 0.001 voxel, so that rounding of
# what is opened (24 bits) can move a map by that much and more; affine evaluations
# agree to 1e-8.
TOLERANCE = {"syn": 0.02, "affine": 1e-3}


@pytest.mark.parametrize("operation", ["syn", "affine"])
def test_resuming_ends_where_an_uninterrupted_run_ends(tmp_path, bodies, operation):
    sites = sites_for(tmp_path / "sites", operation, bodies)
    sites.run()
    uninterrupted = result(sites)
    statuses = kill_at(sites, "helper", 10)
    assert statuses["helper"] == -signal.SIGKILL
    assert statuses["moving"] == statuses["static"] == 1
    for site in ("moving", "static"):
        assert "party 2 (helper)" in sites.last_line(site), sites.log(site)
    assert results_written(sites) == []
    before = {site: progress(sites, site) for site in ROLES}
    sites.run("--resume")
    np.testing.assert_allclose(
        result(sites), uninterrupted, atol=TOLERANCE[operation], rtol=0
    )
    path = sites.folder / "out_moving" / "receipt.json"
    receipt = json.loads(path.read_text())
    assert receipt["resumed"] == 1
    opened = {e["label"]: e["openings"] for e in receipt["learned"]["moving owner"]}
    label = "update_moving" if operation == "syn" else "joint_histogram"
    assert opened[label] >= before["moving"], "the receipt forgot the first run"
    # Finished: nothing is kept, nothing is left over.
    assert not any("checkpoint" in f for s in ROLES for f in sites.outputs(s))


def test_resuming_repeats_little(tmp_path, bodies):
    """What was done is not done again, but for the iteration under way."""
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    kill_at(sites, "static", 15)
    done = min(progress(sites, s) for s in ROLES)
    sites.run("--resume")
    receipt = json.loads((sites.folder / "out_moving" / "receipt.json").read_text())
    opened = {e["label"]: e["openings"] for e in receipt["learned"]["moving owner"]}
    total = sum(SYN["level_iters"])
    assert 15 <= done < total
    assert total <= opened["update_moving"] <= total + 2


@pytest.mark.heavy
def test_killed_at_random_twenty_times(tmp_path, bodies, descendants):
    """No hang, no orphan, no result of half a run; and it ends all the same."""
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    sites.run()
    uninterrupted = result(sites)
    rng = random.Random(8)
    kills, before = 0, set(descendants(os.getpid()))
    while kills < 20:
        extra = ()
        for _ in range(rng.randint(1, 5)):
            victim = rng.choice(list(ROLES))
            at = progress(sites, victim) if extra else 0
            statuses = kill_at(sites, victim, at + rng.randint(0, 8), *extra)
            kills += 1
            assert set(descendants(os.getpid())) <= before
            if statuses[victim] == 0:
                break  # it was over before
            assert statuses[victim] == -signal.SIGKILL
            for site in set(ROLES) - {victim}:
                assert statuses[site] == 1, sites.log(site)
                assert f"party {ROLES[victim]} " in sites.last_line(site) or (
                    "did not come" in sites.last_line(site)
                )
                assert "Traceback" not in sites.log(site)
            assert results_written(sites) == []
            extra = ("--resume",)
        else:
            sites.run("--resume")
        np.testing.assert_allclose(
            result(sites), uninterrupted, atol=TOLERANCE["syn"], rtol=0
        )


def test_who_cannot_write_its_result_may_try_again(tmp_path, bodies):
    """The others wait until all have written, and keep what is needed to go on."""
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    argv = sites.argv

    def limited(site, *extra):
        if site != "moving":
            return argv(site, *extra)
        # As on a full disk: from the last file on, none may have any content.
        limit = (
            "import resource, signal\n"
            "from dipy_ppir.workflows import remote\n"
            "write = remote.write_receipt\n"
            "def limited(*arguments):\n"
            "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10**9))\n"
            "    try:\n"
            "        write(*arguments)\n"
            "    finally:\n"
            "        resource.setrlimit(resource.RLIMIT_FSIZE, (10**9, 10**9))\n"
            "remote.write_receipt = limited\n"
        )
        python, flag, code, *rest = argv(site, *extra)
        return [python, flag, limit + code, *rest]

    sites.timeouts["checkpoint"] = 1000
    sites.file = sites.write("session.toml")
    sites.argv = limited
    assert set(sites.wait(sites.start()).values()) == {1}
    assert "File too large" in sites.last_line("moving")
    for site in ("static", "helper"):
        assert "party 0 (moving owner)" in sites.last_line(site), sites.log(site)
    assert results_written(sites) == []
    sites.argv = argv
    sites.run("--resume")
    assert "displacement_field.nii.gz" in sites.outputs("moving")


def test_starting_anew_sets_aside(tmp_path, bodies):
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    kill_at(sites, "helper", 3)
    sites.run()
    for site, pid in ROLES.items():
        assert f"session.{pid}.checkpoint.old" in sites.outputs(site)
        assert "is set aside as" in sites.log(site)


def test_only_some_want_to_resume(tmp_path, bodies):
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    kill_at(sites, "static", 3)
    processes = sites.start("--resume", sites=("moving", "helper"))
    processes |= sites.start(sites=("static",))
    assert set(sites.wait(processes).values()) == {1}
    for site in ROLES:
        assert "do not agree on 'resume'" in sites.last_line(site)


def test_another_image_does_not_resume(tmp_path, bodies):
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    kill_at(sites, "helper", 3)
    path = sites.folder / "moving.nii.gz"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata() + 1, image.affine), path)
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    assert "belongs to another registration (moving image" in sites.last_line("moving")


def test_iterations_are_not_repeated_for_ever(tmp_path, bodies):
    """Every repetition opens a little more; an owner counts them."""
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    kill_at(sites, "moving", 5)
    folder = sites.folder / "out_static" / "session.1.checkpoint"
    with open(folder / "journal.jsonl", "a") as journal:
        for _ in range(2 * SYN["level_iters"][0]):
            journal.write(json.dumps({"level": 1, "iteration": 4}) + "\n")
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    assert "opens too much; start anew" in sites.last_line("static")
    for site in ("moving", "helper"):
        assert "party 1 (static owner) ended" in sites.last_line(site)
    assert results_written(sites) == []


@pytest.mark.parametrize("operation", ["syn", "affine"])
def test_a_lost_checkpoint_is_missed(tmp_path, bodies, operation):
    """What was opened before would be missing on the receipt, and from the limits."""
    sites = sites_for(tmp_path / "sites", operation, bodies)
    kill_at(sites, "moving", 5)
    shutil.rmtree(sites.folder / "out_static" / "session.1.checkpoint")
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    assert "There is no checkpoint" in sites.log("static")
    for site in ROLES:
        assert "static owner did not find the checkpoint" in sites.last_line(site)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, bodies):
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    kill_at(sites, "moving", 3)
    folder = sites.folder / "out_helper" / "session.2.checkpoint"
    old = shutil.copytree(folder, tmp_path / "old")
    kill_at(sites, "moving", 3)
    shutil.rmtree(folder)
    shutil.move(old, folder)
    assert set(sites.wait(sites.start("--resume")).values()) == {1}
    for site in ROLES:
        assert "parties do not have the checkpoint" in sites.last_line(site)


def test_resuming_what_had_not_begun(tmp_path, bodies):
    sites = sites_for(tmp_path / "sites", "syn", bodies)
    kill_at(sites, "moving", 0)
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
