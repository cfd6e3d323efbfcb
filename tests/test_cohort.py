"""Cohorts: what each site runs, in which order, and what becomes of it."""

from collections import Counter
from contextlib import ExitStack
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from urllib.error import HTTPError
from urllib.request import urlopen

from cohorts import PAIRS, QUICK, Cohort
from commands import changed, script, started
import nibabel as nib
import numpy as np
from ports import free_port
import pytest

from dipy_ppir.align._public import planned_bits
from dipy_ppir.align.parameters import AffineParameters
from dipy_ppir.mpc.errors import MPCError
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.sessionfile import SessionFile
from dipy_ppir.workflows import cohort, pairs, streams
from dipy_ppir.workflows.engine import dask_client
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.outcomes import COLUMNS, Outcome, summary, table_text

#: Seconds: what hangs takes longer.
PATIENCE = 300
NAMES = [f"{m}_to_{s}".replace("/", ".") for m, s in PAIRS]


@pytest.fixture(autouse=True)
def log_level():
    """A command sets the level of the package's log."""
    before = logging.getLogger("dipy_ppir").level
    yield
    logging.getLogger("dipy_ppir").setLevel(before)


@pytest.fixture
def sites(tmp_path):
    made = Cohort(tmp_path)
    made.images("A", "1", "2").images("B", "1", "2").images("C", "1")
    return made


@pytest.fixture
def commands(monkeypatch):
    """Commands that are not run: those of the tasks that were to be, and their ends.

    ``commands.ends`` maps names of pairs to a status and what the command prints.
    """

    class Commands(list):
        ends = {}
        most = running = 0
        lock = threading.Lock()

    commands = Commands()

    def run(task, log):
        with commands.lock:
            commands.append(task)
            commands.running += 1
            commands.most = max(commands.most, commands.running)
        time.sleep(0.05)
        with commands.lock:
            commands.running -= 1
        status, text = commands.ends.get(task.name, (0, ""))
        with open(log, "a") as stream:
            stream.write(text)
        if status == 0:
            folder = log.parent
            (folder / "affine.txt").write_text("")
            digest = None
            if not task.here:
                digest = SessionFile.read(folder / "session.toml").digest
            (folder / "receipt.json").write_text(
                json.dumps(
                    {
                        "session_file": digest,
                        "bytes_total": 10,
                        "warnings": [],
                        "bits": {"moving owner": 1.5, "static owner": 2},
                    }
                )
            )
        return status

    def load(path):
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError("no receipt") from None

    monkeypatch.setattr(pairs, "_command", run)
    monkeypatch.setattr(pairs, "load", load)
    return commands


# -- what is run, and in which order -------------------------------------------


@pytest.mark.parametrize("site", ["A", "B", "C", "H"])
def test_every_site_runs_its_pairs_in_the_order_of_each_lane(sites, commands, site):
    assert sites.run(site) == 0
    mine = [n for n in NAMES if site == "H" or f"{site}." in n]
    assert list(sites.table(site)) == mine
    assert sorted(task.name for task in commands) == sorted(mine)
    for lane in (NAMES[::2], NAMES[1::2]):
        ran = [task.name for task in commands if task.name in lane]
        assert ran == [name for name in lane if name in mine]
    assert commands.most <= 2
    row = sites.table(site)[mine[0]]
    assert tuple(row) == COLUMNS
    assert row["status"] == "done" and row["bits_moving_owner"] == "1.5"
    assert row["receipt"].endswith(f"{mine[0]}/receipt.json")


def test_the_commands(sites, commands):
    """Those that one would type for a session."""
    folder = sites.folder
    (folder / "A.tsv").write_text(
        "participant_id\tfile\tmask\n1\tA1.nii.gz\tA2.nii.gz\n2\tA2.nii.gz\tn/a"
    )
    assert sites.run("A", "--limit_bits", "0", "--strict") == 0
    assert sites.run("B", "--listen", "127.0.0.1") == 0
    assert sites.run("H") == 0
    ran = {(task.folder.split("/")[-2], task.name): task for task in commands}
    moving = ran["out_A", NAMES[0]]
    out = str(folder / "out_A" / NAMES[0])
    assert moving.command == "dipy_ppir_align_affine"
    assert moving.arguments == [
        *("--out_dir", out, "remote", str(folder / "A1.nii.gz")),
        *("--session", f"{out}/session.toml"),
        *("--moving_mask", str(folder / "A2.nii.gz")),
        *("--identity", str(folder / "keys" / "A"), "--resume", "--strict"),
        *("--log_level", "INFO"),
    ]
    static = ran["out_A", NAMES[3]].arguments
    assert static[2:4] == [str(folder / "A1.nii.gz"), "remote"]
    assert static[static.index("--limit_bits") + 1] == "0"
    helper = ran["out_H", NAMES[0]]
    assert helper.command == "dipy_ppir_helper"
    assert helper.arguments[2] == str(folder / "out_H" / NAMES[0] / "session.toml")
    # In the second lane it is the next port.
    port = int(sites.contents["sites"]["B"]["address"].split(":")[1])
    for name, lane in ((NAMES[0], 0), (NAMES[2], 0), (NAMES[4], 0)):
        given = ran["out_B", name].arguments
        assert given[given.index("--listen") + 1] == f"127.0.0.1:{port + lane}"


def test_a_deformation_starts_from_a_cohort_before(sites, commands):
    sites.write(operation="syn", reveal="map", parameters={"level_iters": [4, 2]})
    with pytest.raises(InputError, match="the prealign file .* does not exist"):
        sites.run("A", "--prealign_dir", str(sites.folder / "before"))
    for name in NAMES:
        path = sites.folder / "before" / name / "affine.txt"
        path.parent.mkdir(parents=True)
        np.savetxt(path, np.eye(4))
    sites.run("A", "--prealign_dir", str(sites.folder / "before"))
    given = {task.name: "--prealign_file" in task.arguments for task in commands}
    assert given == {NAMES[0]: True, NAMES[1]: True, NAMES[3]: False, NAMES[4]: True}


def absent(site, role="static owner"):
    return 1, (
        f"INFO: and so on\ndipy_ppir_helper: error: the {role} (Site {site}) did not "
        "come within 3600 s; check that it was started\n"
    )


def test_who_did_not_come_is_not_waited_for_again(sites, commands):
    commands.ends[NAMES[1]] = absent("C")
    assert sites.run("H") == 1
    table = sites.table("H")
    assert table[NAMES[1]]["status"] == "failed"
    assert table[NAMES[3]]["status"] == "skipped"
    assert "C did not come to A.2_to_C.1" in table[NAMES[3]]["error"]
    assert table[NAMES[0]]["status"] == table[NAMES[4]]["status"] == "done"


def test_an_error_is_one_line_and_the_others_go_on(sites, commands):
    """Of this site's own command, not of what it logs of others."""
    commands.ends[NAMES[0]] = (
        1,
        "dipy_ppir_helper: error: first\nINFO: dipy_ppir_helper: error: forged\n"
        "dipy_ppir_helper: error: a\tb\x1b[2J\x00 the end" + "x" * 1000 + "\nmore\n",
    )
    commands.ends[NAMES[2]] = -9, "INFO: nothing said\n"
    assert sites.run("H") == 1
    table = sites.table("H")
    assert table[NAMES[0]]["error"].startswith("a?b?[2J? the end")
    assert len(table[NAMES[0]]["error"]) == 500
    assert "signal 9 and without a word" in table[NAMES[2]]["error"]
    assert [row["status"] for row in table.values()] == [
        *("failed", "done", "failed", "done", "done")
    ]
    # What an earlier attempt said is not taken for what this one said.
    commands.ends[NAMES[0]] = -9, ""
    sites.run("H", "--resume")
    assert "without a word" in sites.table("H")[NAMES[0]]["error"]


def test_quiet(sites, commands, capsys, caplog):
    """Nothing is printed but what went wrong."""
    try:
        assert sites.run("H", "--check", "--quiet") == 0
        commands.ends[NAMES[0]] = 1, "dipy_ppir_helper: error: a line was cut\n"
        assert sites.run("H", "--quiet") == 1
    finally:
        streams.be_quiet(False)
    assert capsys.readouterr().out == ""
    (record,) = [r for r in caplog.records if r.name == "dipy_ppir"]
    assert "a line was cut" in record.message and record.levelname == "WARNING"


# -- going on -------------------------------------------------------------------


def test_going_on(sites, commands):
    """What is finished here is left alone, whatever the ports and their number."""
    commands.ends[NAMES[1]] = 1, "dipy_ppir_align_affine: error: no luck\n"
    assert sites.run("A") == 1
    with pytest.raises(InputError, match="of an earlier run; add --resume"):
        sites.run("A")
    commands.ends.clear()
    commands.clear()
    sites.write(concurrent=1)
    assert sites.run("A", "--resume") == 0
    assert [task.name for task in commands] == [NAMES[1]]
    assert sites.statuses("A") == ["done"] * 4
    commands.clear()
    assert sites.run("A", "--resume") == 0
    assert not commands
    # A receipt that is lost, or of another session, or a result that is lost.
    (sites.folder / "out_A" / NAMES[0] / "receipt.json").unlink()
    (sites.folder / "out_A" / NAMES[1] / "affine.txt").unlink()
    receipt = sites.folder / "out_A" / NAMES[3] / "receipt.json"
    receipt.write_text(
        json.dumps({**json.loads(receipt.read_text()), "session_file": 1})
    )
    sites.run("A", "--resume")
    assert [task.name for task in commands] == [NAMES[0], NAMES[1], NAMES[3]]


def test_again(sites, commands):
    """Others are left alone, and nothing is gone on with."""
    assert sites.run("A") == 0
    commands.clear()
    with pytest.raises(InputError, match="--again 3 is no pair of this site"):
        sites.run("A", "--again", "3")
    assert sites.run("A", "--again", NAMES[1], "4") == 0
    assert sorted(task.name for task in commands) == sorted([NAMES[1], NAMES[3]])
    for task in commands:
        assert "--force" in task.arguments and "--resume" not in task.arguments


def test_results_of_another_plan(sites, commands):
    assert sites.run("A") == 0
    sites.write(result_to="moving")
    with pytest.raises(InputError, match="is of another plan"):
        sites.run("A", "--resume")
    assert sites.run("A", "--again", *(n for n in NAMES if "A." in n)) == 0


def test_a_plan_may_grow(sites, commands):
    assert sites.run("H") == 0
    commands.clear()
    sites.write(pairs=[["C/2", "A/2"], *PAIRS])
    assert sites.run("H", "--resume") == 0
    assert [task.name for task in commands] == ["C.2_to_A.2"]


def contents_of(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--again", NAMES[0])])
def test_a_folder_of_another_site(sites, commands, flags):
    """The sessions are the same, and so are the names of the results."""
    assert sites.run("A") == 0
    before = contents_of(sites.folder / "out_A")
    commands.clear()
    for other, called in (("B", "site B"), ("H", "the helper")):
        argv = sites.argv(other, *flags)
        argv[argv.index("--out_dir") + 1] = str(sites.folder / "out_A")
        with pytest.raises(InputError, match=f"is of site A, and this is {called}; ch"):
            cohort.cohort(argv)
    assert not commands
    assert contents_of(sites.folder / "out_A") == before


@pytest.mark.parametrize("flags", [(), ("--resume",)])
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"title": "another", "pairs": [["A/2", "B/2"]]}, r"plan \('a test'\)"),
        ({"pairs": [["A/2", "B/2"]]}, "taken out since .* and 3 more.*put them back"),
        ({"pairs": PAIRS[1:]}, r"taken out since \(A.1_to_B.1\)"),
    ],
)
def test_a_folder_of_another_plan(sites, commands, flags, entries, words):
    """None of its pairs has a folder here, or one of the folder's is none of its."""
    assert sites.run("A") == 0
    before = contents_of(sites.folder / "out_A")
    commands.clear()
    sites.write(**entries)
    with pytest.raises(InputError, match=words):
        sites.run("A", *flags)
    assert not commands
    assert contents_of(sites.folder / "out_A") == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no cohort.json that says of which"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"site": "A"}', "is damaged"),
    ],
)
def test_a_folder_that_does_not_say_whose_it_is(sites, commands, text, words):
    assert sites.run("A") == 0
    file = sites.folder / "out_A" / "cohort.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(InputError, match=f"{words}.*choose another --out_dir"):
        sites.run("A", "--resume")


# -- what is refused before anybody is met ----------------------------------------


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda v: np.stack([v, v], -1), "2 volumes.; choose a volume and save it as"),
        (lambda v: v[:, :1], "1 voxel along axis 1.*at least 3 slices"),
        (lambda v: v[..., 5], "2 dimensions, 3 are needed"),
    ],
)
def test_images_that_are_not_one_volume(sites, commands, cut, words):
    """Image 1 of A is the moving one of a pair, and the static one of a later."""
    sites.write(pairs=PAIRS[:4])
    file = sites.folder / "A1.nii.gz"
    image = nib.load(file)
    nib.save(nib.Nifti1Image(cut(image.get_fdata()), image.affine), file)
    with pytest.raises(InputError, match=f"the image of 1 .*A1.nii.gz has .*{words}"):
        sites.run("A")
    assert not commands and not (sites.folder / "out_A").exists()


@pytest.mark.parametrize(
    ("site", "extra", "words"),
    [
        ("A", ["--again", "x"], "--again x is no pair"),
        ("A", ["--scheduler", "tcp://127.0.0.1:1", "--slurm"], "not both"),
        ("A", ["--prealign_dir", "x"], "--prealign_dir is not for operation 'affine'"),
        ("A", ["--limit_bits", "100"], "bits about A/1, over the limit of 100"),
        ("B", ["--slurm"], "leave its address out of the plan"),
        ("H", ["--slurm"], "run the helper without --slurm"),
        ("H", ["--strict"], "leave out --strict"),
        ("H", ["--images", "x"], "leave out --images"),
        ("A", ["--listen", "127.0.0.1"], "has no address"),
        ("H", ["--log_level", "LOUD"], "LOUD is not one of"),
    ],
)
def test_flags_that_do_not_fit(sites, commands, site, extra, words):
    with pytest.raises((InputError, MPCError), match=words):
        sites.run(site, *extra)
    assert not commands
    assert not (sites.folder / f"out_{site}").exists()


def test_a_plan_without_this_site(sites):
    other = create_identity("Site D").save(sites.folder / "keys" / "D")
    with pytest.raises(MPCError, match="does not name this site's certificate"):
        cohort.cohort([str(sites.plan), "--identity", str(other)])
    sites.write(pairs=PAIRS[1:2])
    with pytest.raises(InputError, match="no pair of the plan names B"):
        sites.run("B")
    with pytest.raises(InputError, match="--images"):
        cohort.cohort(
            [*sites.argv("H")[:3], "--identity", str(sites.folder / "keys/A")]
        )
    with pytest.raises(InputError, match="give the plan"):
        cohort.cohort([])


def test_a_scheduler_that_is_not_there(sites, commands, monkeypatch):
    monkeypatch.setattr("dipy_ppir.workflows.engine._PATIENCE", 0.2)
    with pytest.raises(InputError, match="of --scheduler cannot be reached"):
        sites.run("A", "--scheduler", f"tcp://127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("tcp://127.0.0.1:{}", True),
        ("tcp://localhost:{}", True),
        ("tls://127.0.0.1:{}", False),
    ],
)
def test_who_else_reaches_a_scheduler_is_said(
    sites, commands, monkeypatch, caplog, address, warned
):
    """Other users of this machine do."""
    monkeypatch.setattr("dipy_ppir.workflows.engine._PATIENCE", 0.2)
    with pytest.raises(InputError, match="cannot be reached"):
        sites.run("A", "--scheduler", address.format(free_port()))
    assert ("other users of this machine" in caplog.text) == warned


def test_dask_listens_to_nobody_but_this_machine(tmp_path):
    """And takes no work there, nor shows anything."""
    with dask_client(1, tmp_path) as client:
        scheduler = client.cluster.scheduler
        assert scheduler.address.startswith("inproc://")
        servers = [scheduler, *client.cluster.workers.values()]
        for server in servers:
            for sock in server.http_server._sockets.values():
                assert sock.getsockname()[0] == "127.0.0.1"
        (sock,) = scheduler.http_server._sockets.values()
        with pytest.raises(HTTPError, match="404"):
            urlopen("http://127.0.0.1:%d/status" % sock.getsockname()[1])


def test_without_dask(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'dipy-ppir\[cohort\]'"):
        with dask_client(1, tmp_path):
            pass


# -- the table ----------------------------------------------------------------------


def test_a_table_is_one_whatever_is_in_it():
    wild = Outcome("a", "b", "c", "failed", error='x\ty\nz\r\x1b"q" é', warnings="w")
    text = table_text([wild, Outcome("d", "e", "f", "open")])
    lines = text.splitlines()
    assert len(lines) == 3
    assert [len(line.split("\t")) for line in lines] == [len(COLUMNS)] * 3
    assert all(line.replace("\t", "").isprintable() for line in lines)
    assert "x?y?z??'q' é" in lines[1]
    assert lines[2].split("\t")[4] == "n/a"
    said = summary([wild, Outcome("d", "e", "f", "done", bytes=5_000_000)])
    assert said.startswith("2 pairs: 1 done, 1 failed.\n")
    assert "5.0 MB" in said and "a, warning: w" in said


# -- real processes ---------------------------------------------------------------


def launch(made, site, *extra):
    """The command of a site as a process, in a group of its own, which hears SIGINT."""
    command = changed("dipy_ppir_cohort", "")
    return started([*command, *made.argv(site, *extra)], made.folder)


@pytest.fixture
def here(tmp_path):
    made = Cohort(tmp_path, sites={}, pairs=[["1", "2"], ["3", "1"]], concurrent=1)
    return made.images("", "1", "2", "3")


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waits for ever"
        time.sleep(0.02)


def alive(numbers):
    return [n for n in numbers if os.path.exists(f"/proc/{n}")]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.heavy),
        pytest.param(signal.SIGKILL, marks=pytest.mark.heavy),
    ],
)
def test_a_coordinator_that_ends_leaves_nobody_behind(here, descendants, sent):
    """What it says, and that the next one goes on; both with all images here.

    The pair is under way: the parties of its registration are there.
    """
    with launch(here, "") as process:
        until(lambda: process.poll() is not None or len(descendants(process.pid)) >= 3)
        assert process.poll() is None, process.communicate()
        below = descendants(process.pid)
        process.send_signal(sent)
        _, err = process.communicate(timeout=PATIENCE)
    until(lambda: not alive(below))
    assert process.returncode == (-9 if sent == signal.SIGKILL else 128 + sent)
    if sent != signal.SIGKILL:
        assert err.splitlines()[-1].endswith("go on with --resume")
    assert set(here.statuses("")) <= {"open", "done"}
    if sent != signal.SIGTERM:
        return
    with launch(here, "", "--resume") as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "2 pairs: 2 done." in out
    for name in ("1_to_2", "3_to_1"):
        found = sorted(p.name for p in (here.folder / "out_" / name).iterdir())
        assert found == [
            *("affine.txt", "done.toml", "log.txt", "moved.nii.gz", "receipt.json")
        ]
    rows = list(here.table("").values())
    assert all(float(row["bytes"]) > 1e5 for row in rows)


@pytest.mark.heavy
def test_three_sites_and_a_helper(sites):
    """A pair that fails at one site, one site that is killed, and going on.

    Image 2 of A is constant, which shows only when its pair begins: the others do not
    wait for it, but are told.
    """
    # Who is killed need not have met the others, who wait as long for it.
    sites.write(timeouts={"connect": 40})
    good = (sites.folder / "A2.nii.gz").read_bytes()
    image = nib.load(sites.folder / "A2.nii.gz")
    flat = np.ones(image.shape, np.float32)
    nib.save(nib.Nifti1Image(flat, image.affine), sites.folder / "A2.nii.gz")
    everybody = "ABCH"

    def run(*extra, kill=None):
        with ExitStack() as stack:
            running = {
                s: stack.enter_context(launch(sites, s, *extra)) for s in everybody
            }
            if kill:
                session = sites.folder / f"out_{kill}" / NAMES[0] / "session.toml"
                until(session.exists)
                running[kill].kill()
            return {
                s: (*p.communicate(timeout=2 * PATIENCE), p.returncode)
                for s, p in running.items()
            }

    ended = run(kill="B")
    assert ended["B"][2] == -9
    assert ended["H"][2] == ended["A"][2] == 1
    sites.write(timeouts={"connect": PATIENCE})
    ended = run("--resume")
    for site, (_, err, status) in ended.items():
        assert status == (0 if site == "B" else 1), err
    errors = {s: sites.table(s)[NAMES[1]]["error"] for s in "ACH"}
    assert "is constant" in errors["A"]
    assert all("(Site A) ended the computation" in errors[s] for s in "CH"), errors
    (sites.folder / "A2.nii.gz").write_bytes(good)
    ended = run("--resume")
    assert {status for *_, status in ended.values()} == {0}, ended
    for site in everybody:
        assert set(sites.statuses(site)) == {"done"}
    receipts = [sites.folder / f"out_{s}" / NAMES[1] / "receipt.json" for s in "ACH"]
    argv = [script("dipy_ppir_receipt"), *map(str, receipts)]
    assert "Consistent: all three" in subprocess.check_output(argv, text=True)
    # The static owner of two pairs with one image has counted both.
    counts = json.loads((sites.folder / "keys" / "C" / "opened.json").read_text())
    bits = Counter()
    for name in NAMES[1:3]:
        path = sites.folder / "out_C" / name / "receipt.json"
        bits["C"] += json.loads(path.read_text())["bits"]["moving owner"]
    # An attempt that failed when both had met may have opened what was planned.
    planned = planned_bits(AffineParameters(**QUICK), 3)
    (count,) = counts.values()
    assert count in [pytest.approx(bits["C"] + k * planned, abs=0.3) for k in range(3)]
