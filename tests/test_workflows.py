"""The command: its files, its display, and one line for every mistake."""

import gzip
import json
import logging
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import warnings

from commands import HALT, KILL, changed, finish, interrupted, script, started
from dipy.align import affine_registration
import nibabel as nib
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest
from scipy import ndimage

from dipy_ppir.align.imaffine import SecureMutualInformationMetric
from dipy_ppir.mpc import local
from dipy_ppir.mpc.ledger import HELPER, ROLES, STATIC
from dipy_ppir.mpc.record import file_hash
from dipy_ppir.workflows import cli, figures, inputs, progress
from dipy_ppir.workflows.align import SecureImageRegistrationFlow
from dipy_ppir.workflows.outputs import OutputFiles

GRID2WORLD = np.diag([2.0, 2.0, 2.0, 1.0])
FAST = "--transform rigid --level_iters 10 5 --factors 2 1 --sigmas 1 0".split()
SHORT = "--transform trans --level_iters 2 --factors 1 --sigmas 0".split()
NO_PICTURES = ["--no_pictures"]
COMMAND = "dipy_ppir_align_affine"


def blobs(shift=(0, 0, 0), n=24):
    """A ball with a smaller one beside it."""
    grid = np.indices((n, n, n)) - (n - 1) / 2
    image = np.exp(-(grid**2).sum(axis=0) / 40)
    apart = grid - np.array([4, -3, 2]).reshape(3, 1, 1, 1)
    image += 0.6 * np.exp(-(apart**2).sum(axis=0) / 15)
    return ndimage.shift(image, shift, order=3, mode="nearest").astype(np.float32)


def save(path, data, grid2world=GRID2WORLD):
    nib.save(nib.Nifti1Image(data, grid2world), path)
    return str(path)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    static = save(folder / "static.nii.gz", blobs())
    moving = save(folder / "moving.nii.gz", blobs((1.5, -1.0, 0.7)))
    return static, moving


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command in this process, in an empty folder; returns its result."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    own = logging.getLogger("dipy_ppir")
    on_term = signal.getsignal(signal.SIGTERM)

    def run(*args):
        monkeypatch.setattr(sys, "argv", [COMMAND, *map(str, args)])
        try:
            status = cli.align_affine()
        except SystemExit as exc:
            status = exc.code
        return status, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, on_term)
    logging.raiseExceptions = raising
    root.handlers[:] = handlers
    root.setLevel(level)
    own.setLevel(logging.NOTSET)


# -- a good run ------------------------------------------------------------


def test_writes_what_dipy_writes(command, pair, tmp_path):
    status, out, err = command(*pair, *FAST, "--save_metric", "--out_dir", "res")
    assert (status, err) == (0, "")
    assert {p.name for p in (tmp_path / "res").iterdir()} == {
        "moved.nii.gz",
        "affine.txt",
        "quality_metric.txt",
        "receipt.json",
        "checkerboard.png",
        "contours.png",
        "report.html",
    }
    static, moving = (nib.load(p).get_fdata(dtype=np.float32) for p in pair)
    clear, expected, _, fopt = affine_registration(
        moving,
        static,
        moving_affine=GRID2WORLD,
        static_affine=GRID2WORLD,
        pipeline=["center_of_mass", "rigid"],
        level_iters=[10, 5],
        sigmas=[1.0, 0.0],
        factors=[2, 1],
        ret_metric=True,
    )
    # Where DIPY ends; steps are rounded, in part by chance.
    grid = np.indices(static.shape).reshape(3, -1)
    points = GRID2WORLD @ np.vstack([grid, np.ones(grid.shape[1])])
    apart = (np.loadtxt("res/affine.txt") - expected) @ points
    assert np.sqrt((apart**2).sum(axis=0).mean()) < 1
    moved = nib.load("res/moved.nii.gz")
    assert np.corrcoef(moved.get_fdata().ravel(), clear.ravel())[0, 1] > 0.99
    assert_array_equal(moved.affine, GRID2WORLD)
    # Of the finest level, with fewer digits; DIPY ends a little later.
    value = float(Path("res/quality_metric.txt").read_text().splitlines()[-1])
    assert value == pytest.approx(fopt, abs=0.05)
    # Plain log lines: one per level, no control characters.
    assert "rigid, level 1 of 2 done: evaluation" in out
    assert "rigid, level 2 of 2 done: evaluation" in out
    assert "\x1b" not in out and "\r" not in out
    # The receipt, in words and as a file.
    assert "What each party learned" in out
    receipt = json.loads(Path("res/receipt.json").read_text())
    assert (receipt["m"], receipt["t"]) == (3, 1)
    assert {e["label"] for e in receipt["learned"]["moving owner"]} == {
        "center_of_mass",
        "step",
        "step_size",
        "better",
        "mismatch",
        "final_value",
    }
    labels = [e["label"] for e in receipt["learned"]["static owner"]]
    assert labels == ["mismatch", "stuck", "affine"]
    assert receipt["learned"]["helper"] == []
    for name in pair:
        assert Path(name).name not in json.dumps(receipt)
    for name in figures.PICTURES:
        assert Path("res", name).read_bytes().startswith(b"\x89PNG")


def test_files_have_the_usual_permissions(command, pair):
    command(*pair, *SHORT, *NO_PICTURES)
    umask = os.umask(0)
    os.umask(umask)
    assert os.stat("affine.txt").st_mode & 0o777 == 0o666 & ~umask
    assert os.stat("moved.nii.gz").st_mode & 0o777 == 0o666 & ~umask


def test_gradient_reveals_no_histogram(command, pair):
    flags = "--reveal gradient --receipt sub/r.json --log_level warning".split()
    status, out, _ = command(*pair, *SHORT, *NO_PICTURES, *flags)
    assert status == 0 and "INFO" not in out
    learned = json.loads(Path("sub/r.json").read_text())["learned"]["moving owner"]
    labels = {e["label"] for e in learned}
    assert {"center_of_mass", "metric_value", "metric_gradient"} <= labels
    assert "joint_histogram" not in labels


def test_masks_volumes_and_sampling(command, pair, tmp_path):
    series = np.stack([np.zeros((24,) * 3, np.float32), blobs(), blobs()], axis=-1)
    series = save(tmp_path / "series.nii.gz", series)
    mask = save(tmp_path / "mask.nii", (blobs() > 0.01).astype(np.uint8) * 7)
    base = [*FAST, *NO_PICTURES, "--force"]
    status, _, err = command(
        series, pair[1], *base, "--static_vol_idx", "1-2", "--static_mask", mask
    )
    assert (status, err) == (0, "")
    masked = np.loadtxt("affine.txt")
    receipt = json.loads(Path("receipt.json").read_text())
    assert receipt["files"] == {
        name: file_hash(receipt["run"], path)
        for name, path in (
            ("static image", series),
            ("moving image", pair[1]),
            ("static mask", mask),
        )
    }
    # So few voxels and evaluations: it is the mask and the volumes that matter.
    assert_allclose(masked[:3, 3], [3, -2, 1.4], atol=1.5)
    assert command(*pair, *base, "--sampling_prop", "50")[0] == 0
    receipt = json.loads(Path("receipt.json").read_text())
    assert receipt["parameters"]["sampling_proportion"] == 0.5
    assert command(*pair, *base, "--transform", "com", "--save_metric")[0] == 0
    assert not Path("quality_metric.txt").exists()


def test_from_python(pair, tmp_path):
    flow = SecureImageRegistrationFlow()
    flow.run(
        *pair,
        transform="trans",
        level_iters=(5,),
        sigmas=(0.0,),
        factors=(1,),
        no_pictures=True,
        out_dir=str(tmp_path / "a" / "b"),
    )
    assert len(flow.receipts) == 1
    assert (tmp_path / "a" / "b" / "moved.nii.gz").exists()


def test_existing_files_need_force(command, pair):
    assert command(*pair, *SHORT, *NO_PICTURES)[0] == 0
    before = np.loadtxt("affine.txt")
    Path("affine.txt").write_text("mine")
    status, _, err = command(*pair, *SHORT, *NO_PICTURES)
    assert status == 1 and "--force" in err and "affine.txt" in err
    assert Path("affine.txt").read_text() == "mine"
    assert command(*pair, *SHORT, *NO_PICTURES, "--force")[0] == 0
    # What is opened is rounded afresh in every run.
    assert_allclose(np.loadtxt("affine.txt"), before, atol=0.5)


def test_many_pairs(command, pair, tmp_path):
    for name in ("m1.nii.gz", "m2.nii.gz"):
        shutil.copy(pair[1], tmp_path / name)
    args = [pair[0], str(tmp_path / "m?.nii.gz"), *SHORT, *NO_PICTURES]
    status, _, err = command(*args, "--out_dir", "res")
    assert status == 1 and "--mix_names" in err and not Path("res").exists()
    assert command(*args, "--out_dir", "res", "--mix_names")[0] == 0
    assert len(list(Path("res").glob("*m1*receipt.json"))) == 1
    assert len(list(Path("res").iterdir())) == 6


def test_a_bad_pair_is_found_first(command, pair, tmp_path, monkeypatch):
    """Before the others, which take their time, are registered."""
    shutil.copy(pair[1], tmp_path / "m1.nii.gz")
    _text(tmp_path, "m2.nii.gz")
    monkeypatch.setattr(local, "run_locally", pytest.fail)
    args = [pair[0], str(tmp_path / "m?.nii.gz"), *SHORT, *NO_PICTURES]
    result = command(*args, "--out_dir", "res", "--mix_names")
    assert_refused(result, "m2.nii.gz", "convert")


# -- mistakes --------------------------------------------------------------


def _nan(folder, value):
    data = blobs()
    data[3, 4, 5] = value
    return save(folder / "bad.nii.gz", data)


def _text(folder, name="bad.nii.gz"):
    (folder / name).write_text("not an image")
    return str(folder / name)


def _truncated(folder):
    whole = gzip.compress(
        nib.Nifti1Image(np.random.default_rng(0).random((24,) * 3), None).to_bytes()
    )
    (folder / "bad.nii.gz").write_bytes(whole[: len(whole) // 2])
    return str(folder / "bad.nii.gz")


def _mgh(folder):
    nib.save(nib.MGHImage(blobs(), np.eye(4)), folder / "bad.mgz")
    return str(folder / "bad.mgz")


def _singular(folder):
    header = nib.Nifti1Header()
    header.set_sform(np.diag([2.0, 2.0, 0.0, 1.0]), code=1)
    nib.save(nib.Nifti1Image(blobs(), None, header), folder / "bad.nii.gz")
    return str(folder / "bad.nii.gz")


def _rgb(folder):
    kind = [("R", "u1"), ("G", "u1"), ("B", "u1")]
    return save(folder / "bad.nii.gz", np.zeros((8, 8, 8), dtype=kind))


def _far(folder):
    moved = GRID2WORLD.copy()
    moved[0, 3] = 5000
    return save(folder / "bad.nii.gz", blobs(), moved)


BAD_IMAGES = {
    "missing": (lambda f: str(f / "no.nii.gz"), "not found", "check the name"),
    "text": (_text, "cannot be read as NIfTI", "convert"),
    "text.txt": (lambda f: _text(f, "bad.txt"), "cannot be read as NIfTI", "convert"),
    "truncated": (_truncated, "damaged or incomplete", "again"),
    "not nifti": (_mgh, "is not NIfTI but MGHImage", "convert"),
    "4D": (
        lambda f: save(f / "bad.nii.gz", np.stack([blobs()] * 2, axis=-1)),
        "4 dimensions",
        "_vol_idx",
    ),
    "2D": (lambda f: save(f / "bad.nii.gz", blobs()[12]), "2 dimensions", "Python"),
    "NaN": (lambda f: _nan(f, np.nan), "NaN or infinite", "replace"),
    "infinite": (lambda f: _nan(f, np.inf), "NaN or infinite", "replace"),
    "constant": (
        lambda f: save(f / "bad.nii.gz", np.ones((9, 9, 9), np.int16)),
        "constant",
        "no structure",
    ),
    "colour": (_rgb, "real numbers", "must hold"),
    "singular": (_singular, "singular", "header"),
    "zero sum": (
        lambda f: save(f / "bad.nii.gz", (np.indices((9, 9, 9))[0] - 4).astype("i2")),
        "add up to zero",
        "add a constant",
    ),
    "far apart": (_far, "do not overlap", "--far_apart"),
}


def assert_refused(result, *words, folder=None):
    """One line with `words`, a status that says so, and nothing written."""
    status, out, err = result
    assert status == 1
    assert err.count("\n") == 1 and "Traceback" not in out + err
    assert err.startswith(f"{COMMAND}: error: ")
    for word in words:
        assert word in err, err
    assert not Path(folder or "res").exists()


@pytest.mark.parametrize("role", ["static", "moving"])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image(command, pair, tmp_path, kind, role):
    make, *words = BAD_IMAGES[kind]
    bad = make(tmp_path)
    files = (bad, pair[1]) if role == "static" else (pair[0], bad)
    if kind not in ("missing", "far apart"):
        words.append(role)
    result = command(*files, *FAST, "--out_dir", "res")
    assert_refused(result, *words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda f: save(f / "k.nii", np.zeros((24,) * 3, "u1")),
            ("empty", "leave out"),
        ),
        (lambda f: save(f / "k.nii", np.ones((9, 9, 9), "u1")), ("shape", "resample")),
        (lambda f: str(f / "no.nii"), ("does not exist", "check the name")),
        (_text, ("mask", "NIfTI")),
        (
            lambda f: save(f / "k.nii", np.ones((24,) * 3, "u1"), np.eye(4)),
            ("elsewhere", "resample"),
        ),
        (
            lambda f: save(f / "k.nii", np.pad(np.ones((1, 1, 1), "u1"), (0, 23))),
            ("constant inside", "larger"),
        ),
    ],
)
@pytest.mark.parametrize("role", ["static", "moving"])
def test_bad_mask(command, pair, tmp_path, make, words, role):
    result = command(*pair, *FAST, "--out_dir", "res", f"--{role}_mask", make(tmp_path))
    assert_refused(result, role, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--nbins 5", ("--nbins", "from 6", "got 5")),
        ("--nbins -32", ("--nbins", "from 6")),
        ("--nbins 100000", ("--nbins", "512")),
        ("--sampling_prop 0", ("--sampling_prop 0", "1 to 100")),
        ("--sampling_prop 101", ("--sampling_prop 101", "1 to 100")),
        ("--sampling_prop 0.2", ("20% of the voxels: 20",)),
        ("--sampling_prop nan", ("--sampling_prop nan", "1 to 100")),
        ("--level_iters 10", ("--level_iters, --sigmas", "got 1, 2 and 2")),
        ("--level_iters 10 -1", ("--level_iters", "from 0", "got [10, -1]")),
        ("--level_iters --sigmas --factors", ("--level_iters", "got []")),
        ("--factors 0 1", ("--factors", "from 1", "got [0, 1]")),
        ("--factors 4 2", ("--factors must end in 1", "got [4, 2]")),
        ("--factors 100 1", ("factor 100", "smaller")),
        ("--sigmas -1 0", ("--sigmas", "from 0", "got [-1.0, 0.0]")),
        ("--sigmas nan 0", ("--sigmas", "from 0", "got [nan, 0.0]")),
        ("--sigmas 1000 0", ("--sigmas 1000", "smaller")),
        ("--transform warp", ("--transform warp", "rigid_isoscaling")),
        ("--listen localhost:1", ("--listen is for a site of a session", "--session")),
        ("--resume", ("--resume is for a site of a session", "--session")),
        ("--identity keys", ("--identity is for a site of a session", "--session")),
        ("--metric nmi", ("--metric must be one of", "SSD", "nmi")),
        ("--metric ssd --nbins 20", ("--nbins means nothing", "SSD")),
        ("--radius 3", ("--radius means nothing", "MI", "CC")),
        ("--metric cc --sampling_prop 9", ("--sampling_prop means nothing", "CC")),
        ("--metric ssd --sampling gms", ("--sampling GMS needs", "sampling_prop")),
        ("--reveal all", ("--reveal", "'histogram'", "got 'all'")),
        ("--static_vol_idx 0", ("--static_vol_idx", "leave out")),
        ("--out_moved moved.txt", ("--out_moved", ".nii.gz")),
        ("--receipt=", ("--receipt is empty", "give")),
        ("--log_level loud", ("--log_level LOUD", "WARNING")),
        ("--out_affine moved.nii.gz", ("two outputs", "rename")),
        ("--sampling_prop 10 --static_mask m.nii", ("masks", "leave out")),
    ],
)
def test_bad_flag(command, pair, flags, words):
    result = command(*pair, *FAST, "--out_dir", "res", *flags.split())
    assert_refused(result, *words)


@pytest.mark.parametrize("index", ["7", "-1", "x", "1-"])
def test_bad_volume_index(command, pair, tmp_path, index):
    bad = save(tmp_path / "bad.nii.gz", np.stack([blobs()] * 2, axis=-1))
    result = command(
        bad, pair[1], *FAST, "--out_dir", "res", f"--static_vol_idx={index}"
    )
    assert_refused(result, "--static_vol_idx", "0 to 1")


def test_bad_number_is_refused_by_the_parser(command, pair):
    status, _, err = command(*pair, "--nbins", "many")
    assert status == 2 and "--nbins" in err.splitlines()[-1]


def test_output_folder_cannot_be_made(command, pair, tmp_path):
    (tmp_path / "file").write_text("")
    result = command(*pair, *FAST, "--out_dir", "file/res")
    assert_refused(result, "file/res", "folder", folder="file/res")


def test_output_folder_not_writable(command, pair, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    result = command(*pair, *FAST, "--out_dir", "res")
    assert_refused(result, "cannot write", "Permission denied", "--out_dir")


def test_inputs_are_not_overwritten(command, pair, tmp_path):
    mine = shutil.copy(pair[1], tmp_path / "moved.nii.gz")
    before = Path(mine).read_bytes()
    status, _, err = command(pair[0], mine, *FAST, "--force")
    assert status == 1 and "is also an input" in err
    assert Path(mine).read_bytes() == before


def test_a_folder_in_the_way(command, pair, tmp_path):
    (tmp_path / "affine.txt").mkdir()
    status, _, err = command(*pair, *FAST, "--force")
    assert status == 1 and "affine.txt is a folder" in err


def test_failure_while_writing_leaves_nothing(command, pair, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savetxt", full)
    result = command(*pair, *SHORT, *NO_PICTURES, "--out_dir", "res")
    assert_refused(result, "No space left")


def test_unexpected_failure_is_one_line(command, pair, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(inputs, "load_volume", fail)
    result = command(*pair, *FAST, "--out_dir", "res")
    assert_refused(result, "RuntimeError: first second", "--debug")
    with pytest.raises(RuntimeError):
        command(*pair, *FAST, "--out_dir", "res", "--debug")
    assert not Path("res").exists()


def test_far_apart_can_be_accepted(command, pair, tmp_path):
    status, _, err = command(pair[0], _far(tmp_path), *FAST, "--far_apart")
    assert (status, err) == (0, "")
    assert_allclose(np.loadtxt("affine.txt")[0, 3], 5000, atol=1)


def test_outputs_appear_together(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    with pytest.raises(KeyError), OutputFiles(paths, []) as out:
        out.temporary(paths[0]).write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with OutputFiles(paths, []) as out:
        for path in paths:
            out.temporary(path).write_text("whole")
        assert not any(p.exists() for p in paths)
        out.commit()
    assert sorted(tmp_path.iterdir()) == paths


# -- processes -------------------------------------------------------------


HALTING = HALT.format(
    module="imaffine", name="SecureMutualInformationMetric", method="sample"
)


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        # test_syn_workflow.py interrupts a command in every run.
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.heavy),
        (signal.SIGTERM, 143, "ended from outside (SIGTERM)"),
        # test_imaffine.py kills callers of the function in every run.
        pytest.param(signal.SIGKILL, -9, None, marks=pytest.mark.heavy),
    ],
)
def test_interrupted(pair, tmp_path, sent, status, words):
    """In the middle of a registration, which would go on for ever."""
    argv = [*changed(COMMAND, HALTING), *pair, *FAST, "--out_dir", "res"]
    returned, out, err = interrupted(argv, tmp_path, sent)
    assert returned == status
    assert out == ""
    if words is None:
        assert err == ""
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    else:
        assert err == f"{COMMAND}: error: {words}; no output was written\n"
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pid", [STATIC, pytest.param(HELPER, marks=pytest.mark.heavy)])
def test_a_party_killed_on_the_way(command, pair, monkeypatch, pid):
    inner = SecureMutualInformationMetric.sample
    children = {}

    def killing(metric, *args, **options):
        if metric.evaluations == 2 and not children:
            children.update(local._kept[3]._children)
            children[pid].kill()
        return inner(metric, *args, **options)

    monkeypatch.setattr(SecureMutualInformationMetric, "sample", killing)
    result = command(*pair, *FAST, "--out_dir", "res")
    assert_refused(result, f"party {pid} ({ROLES[pid]})")
    assert "--debug" not in result[2], "it is no error of the program's"
    assert all(c.returncode is not None for c in children.values()), "one outlived it"
    assert command(*pair, *FAST, *NO_PICTURES)[0] == 0


@pytest.mark.parametrize(
    ("when", "victim"),
    [
        ("as it starts", STATIC),
        pytest.param("as it starts", HELPER, marks=pytest.mark.heavy),
        pytest.param("when all have met", STATIC, marks=pytest.mark.heavy),
        ("when all have met", HELPER),
    ],
)
def test_a_party_killed_early_as_users_see_it(pair, tmp_path, when, victim):
    """One line on the terminal, nothing else: not by the other party, either."""
    kill = changed(COMMAND, KILL[when].format(victim=victim))
    with started([*kill, *pair, *FAST, "--out_dir", "res"], tmp_path) as process:
        status, _, err = finish(process)
    assert status == 1
    assert err.count("\n") == 1, err
    assert err.startswith(f"{COMMAND}: error: ")
    assert f"party {victim} ({ROLES[victim]})" in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_as_users_see_it(pair, tmp_path):
    """It leaves no process; and ``dipy_apply_transform`` reads the result."""
    args = [*pair, *FAST, *NO_PICTURES]
    with started([script(COMMAND), *args], tmp_path) as process:
        status, _, err = finish(process)
    assert (status, err) == (0, "")
    with warnings.catch_warnings():
        # Of packages that DIPY would use if they were there.
        warnings.simplefilter("ignore")
        from dipy.workflows.align import ApplyTransformFlow
    ApplyTransformFlow().run(
        *pair, str(tmp_path / "affine.txt"), out_dir=str(tmp_path / "theirs")
    )
    moved = nib.load(tmp_path / "moved.nii.gz").get_fdata()
    transformed = nib.load(tmp_path / "theirs" / "transformed.nii.gz").get_fdata()
    assert_allclose(moved, transformed, atol=1e-9)


@pytest.mark.heavy
def test_a_mistake_as_users_see_it(pair, tmp_path):
    with started([script(COMMAND), *pair, "--nbins", "3"], tmp_path) as process:
        status, out, err = finish(process)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1 and "got 3" in err
    assert list(tmp_path.iterdir()) == []


# -- displays and pictures -------------------------------------------------


def _info(step, level, iteration, value, sent):
    keys = "step", "level", "iteration", "value", "bytes_sent"
    return dict(zip(keys, (step, level, iteration, value, sent), strict=True))


def test_log_lines_are_few(caplog):
    now = [0.0]
    with (
        caplog.at_level(logging.INFO, "dipy_ppir"),
        progress.LogProgress(["rigid", "affine"], 2, clock=lambda: now[0]) as display,
    ):
        for step in ("rigid", "affine"):
            for level in (1, 0):
                for i in range(100):
                    now[0] += 0.15
                    display(_info(step, level, i + 1, i / 100, 10**6 * i))
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 8
    assert lines[0].startswith("rigid, level 1 of 2: evaluation 67")
    assert lines[-1] == (
        "affine, level 2 of 2 done: evaluation 100, mutual information 0.9900, "
        "99.0 MB sent"
    )


def test_terminal_display():
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with progress.LiveProgress(["translation", "rigid"], 3, console) as display:
        display(_info("rigid", 2, 7, 0.5, 1234567))
        display._progress.refresh()
    text = screen.getvalue()
    assert "rigid, level 1 of 3" in text and "evaluation 7" in text
    assert "0.5000" in text and "1.2 MB sent" in text


@pytest.mark.parametrize("kind", figures.PICTURES.values())
def test_pictures_of_difficult_images(tmp_path, kind):
    turned = np.array([[0, 0, 3, 5], [-1, 0, 0, 7], [0, 2, 0, 1], [0, 0, 0, 1.0]])
    image = blobs()[:20, :13]
    for before in (image, np.zeros_like(image), image - 1000):
        figures.save_overlay(
            tmp_path / "p.png", kind, image, before, image, turned, title="$x_"
        )
        assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_error(tmp_path, unbuffered):
    """As `head` does when it has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as stdout:
        result = subprocess.run(
            [script("dipy_ppir_session"), "new", "affine"],
            stdout=stdout,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert (result.returncode, result.stderr) == (0, b"")


def test_any_other_broken_pipe_is_an_error(monkeypatch, command):
    def broken(name):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_run", broken)
    status, _, err = command()
    assert status == 1
    assert err.startswith(f"{COMMAND}: error: Broken pipe")


# -- results that are not plausible ------------------------------------------


@pytest.fixture
def odd(tmp_path):
    """A static image, and noise whose header says nothing of its orientation."""
    static = save(tmp_path / "static.nii.gz", blobs())
    noise = np.random.default_rng(3).random((24, 24, 24), dtype=np.float32)
    image = nib.Nifti1Image(noise, None)
    image.header.set_zooms((2, 2, 2))
    assert not image.header["qform_code"] and not image.header["sform_code"]
    nib.save(image, tmp_path / "noise.nii.gz")
    return static, str(tmp_path / "noise.nii.gz")


@pytest.mark.filterwarnings("always::dipy_ppir.align.plausibility.ImplausibleWarning")
def test_what_is_not_plausible_is_in_the_log_and_the_receipt(command, odd):
    status, out, _ = command(*odd, *SHORT, *NO_PICTURES, "--out_dir", "res")
    assert status == 0 and Path("res/moved.nii.gz").exists()
    warned = json.loads(Path("res/receipt.json").read_text())["warnings"]
    for words in ("codes are 0", "no mask cuts off"):
        assert any(words in said for said in warned)
        # Once in the log and once in the printed receipt.
        assert out.count(words) == 2


@pytest.mark.parametrize(
    "unit, said", [("meter", "in metres"), ("micron", "in micrometres"), ("mm", None)]
)
def test_other_units_of_length_are_told(tmp_path, unit, said):
    image = nib.Nifti1Image(blobs(), np.eye(4))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "image.nii")
    concerns = inputs.of_header(tmp_path / "image.nii", "static")
    assert len(concerns) == (said is not None)
    assert (
        said is None
        or f"static image image.nii says that positions are {said}" in (concerns[0])
    )


def test_strict_writes_nothing_that_is_not_plausible(command, odd):
    options = [*SHORT, *NO_PICTURES, "--out_dir", "res", "--strict"]
    status, _, err = command(*odd, *options)
    assert status == 1 and "codes are 0" in err and err.count("\n") == 1
    assert not Path("res").exists()
    static, noise = odd
    data = nib.load(noise).get_fdata(dtype=np.float32)
    known = save("known.nii.gz", data)
    status, _, err = command(static, known, *options)
    assert status == 1 and "hardly match" in err and err.count("\n") == 1
    assert not Path("res").exists()
