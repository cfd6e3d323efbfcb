"""Commands that are to be quiet print nothing, and write what they always write."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from sites import Sites

from dipy_ppir.align import affine_registration
from dipy_ppir.workflows import cli, sites, streams

SHORT = "--level_iters 2 2 --factors 2 1 --sigmas 1 0".split()
FLAGS = {
    "align_affine": ["--transform", "rigid", *SHORT],
    "align_syn": ["--level_iters", "2", "1", "--mopt_radius", "2"],
    "align_freeform": ["--level_iters", "2", "1"],
}


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Runs a command in this process, in a folder of its own; status and output."""
    monkeypatch.chdir(tmp_path)
    root, own = logging.getLogger(), logging.getLogger("dipy_ppir")
    before = root.handlers[:], root.level, own.level, logging.raiseExceptions
    on_term = signal.getsignal(signal.SIGTERM)

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [f"dipy_ppir_{name}", *map(str, args)])
        capfd.readouterr()
        try:
            status = getattr(cli, name)()
        except SystemExit as exc:
            status = exc.code
        return status, *capfd.readouterr()

    yield run
    for handler in set(root.handlers) - set(before[0]):
        handler.close()
    root.handlers[:], root.level, own.level, logging.raiseExceptions = before
    signal.signal(signal.SIGTERM, on_term)
    streams.be_quiet(False)


@pytest.fixture
def pair(tmp_path, bodies):
    static, moving, *matrices = bodies(3)
    for name, data, matrix in zip(
        ("static", "moving"), (static, moving), matrices, strict=True
    ):
        image = nib.Nifti1Image(data.astype(np.float32), matrix)
        nib.save(image, tmp_path / f"{name}.nii.gz")
    return "static.nii.gz", "moving.nii.gz"


@pytest.mark.parametrize("name", FLAGS)
def test_registrations(command, pair, tmp_path, name):
    flags = [*pair, *FLAGS[name], "--no_pictures", "--force", "--out_dir"]
    status, out, _ = command(name, *flags, "loud")
    assert status == 0 and "INFO" in out and "What each party learned" in out
    assert command(name, *flags, "quiet", "--quiet") == (0, "", "")
    loud, quiet = (
        sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("loud", "quiet")
    )
    assert loud == quiet and "receipt.json" in quiet


def test_points_and_transforms(command, pair, tmp_path):
    points = np.random.default_rng(2).normal(size=(20, 3)) * [30, 20, 10]
    np.savetxt("points.txt", points)
    flags = ["points.txt", "points.txt", "--quiet", "--out_dir", "p"]
    assert command("align_points", *flags) == (0, "", "")
    assert {p.name for p in (tmp_path / "p").iterdir()} == {
        *("moved_points.txt", "moving_to_static.txt", "affine.txt"),
        *("receipt.json", "report.html"),
    }
    np.savetxt("eye.txt", np.eye(4))
    flags = [*pair, "eye.txt", "--transform_type", "affine", "--out_dir", "t"]
    assert command("apply_transform", *flags, "--quiet") == (0, "", "")
    assert list((tmp_path / "t").iterdir())


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_a_first_picture(pair, tmp_path, slow):
    """Where matplotlib has not looked for fonts yet, of which it tells; and warns where
    that takes seconds, as here at once."""
    program = (
        "import sys, threading; from dipy_ppir.workflows import cli\n"
        f"if {slow}: threading.Timer.start = lambda timer: timer.function()\n"
        "sys.exit(cli.align_affine())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *pair, "--transform", "com", "--quiet"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLCONFIGDIR": str(tmp_path / "fonts")},
        timeout=300,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "contours.png").exists()
    assert list((tmp_path / "fonts").iterdir())


@pytest.mark.filterwarnings("always::dipy_ppir.align.plausibility.ImplausibleWarning")
def test_warnings_and_errors_are_printed(command, pair):
    status, out, err = command("align_affine", *pair, "--quiet", "--nbins", "3")
    assert (status, out) == (1, "") and "--nbins" in err
    image = nib.load("moving.nii.gz")
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, "placeless.nii.gz")
    flags = ["--transform", "com", "--no_pictures", "--quiet"]
    status, out, err = command("align_affine", pair[0], "placeless.nii.gz", *flags)
    assert status == 0 and "does not say its orientation" in out + err
    assert "INFO" not in out + err and "Receipt" not in out + err


def test_a_log_file_is_written_all_the_same(command, pair):
    flags = ["--transform", "com", "--no_pictures", "--quiet", "--log_file", "log"]
    assert command("align_affine", *pair, *flags) == (0, "", "")
    with open("log") as log:
        text = log.read()
    assert "INFO: Registering" in text and "INFO: Saved" in text


def test_the_level_of_the_log_counts_where_it_is_higher(command, pair):
    flags = ["--transform", "com", "--no_pictures", "--quiet", "--log_level"]
    for level in ("debug", "error"):
        found = command("align_affine", *pair, *flags, level, "--force")
        assert found == (0, "", "")
    assert logging.getLogger("dipy_ppir").level == logging.ERROR
    # The next command is not quiet.
    assert "Receipt" in command("align_affine", *pair, *flags[:3], "--force")[1]


def test_help_names_it(command):
    commands = {*cli.CLI_FLOWS, *cli.CLI_SITES} - {"dipy_ppir", "dipy_ppir_session"}
    for name in sorted(name.removeprefix("dipy_ppir_") for name in commands):
        status, out, _ = command(name, "--help")
        assert status == 0 and "--quiet" in out


def test_keys_and_session_files(tmp_path, capsys, bodies):
    folder = str(tmp_path / "key")
    sites.keygen(["Site", "--identity", folder, "--quiet"])
    assert capsys.readouterr() == ("", "")
    sites.keygen(["--show", "--identity", folder])
    assert "Site, valid until" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--show prints a fingerprint"):
        sites.keygen(["--show", "--identity", folder, "--quiet"])
    nowhere = {"static": "127.0.0.1:7433", "helper": "127.0.0.1:7434"}
    made = Sites(
        tmp_path / "s", "affine", bodies(3), reveal="transform", addresses=nowhere
    )
    sites.session(["check", str(made.file), "--quiet"])
    assert capsys.readouterr() == ("", "")
    made.file.write_text(made.file.read_text().replace("affine", "unknown"))
    with pytest.raises(ValueError, match="unknown"):
        sites.session(["check", str(made.file), "--quiet"])


def test_receipts(command, pair, tmp_path):
    flags = ["--transform", "com", "--no_pictures", "--quiet"]
    assert command("align_affine", *pair, *flags) == (0, "", "")
    assert command("receipt", "receipt.json", "--quiet") == (0, "", "")
    assert command("report", "receipt.json", "--quiet") == (0, "", "")
    assert (tmp_path / "report.html").exists()
    found = json.loads((tmp_path / "receipt.json").read_text())
    found["bits"]["moving owner"] += 1000
    (tmp_path / "changed.json").write_text(json.dumps(found))
    status, out, err = command("receipt", "changed.json", "--quiet")
    assert (status, out) == (1, "") and "do not add up" in err


@pytest.mark.skipif(shutil.which("script") is None, reason="script is not installed")
def test_on_a_terminal_too(pair, tmp_path):
    """Where others would show a display."""
    program = (
        "import sys; from dipy_ppir.workflows import cli; sys.exit(cli.align_affine())"
    )
    argv = f"{sys.executable} -c '{program}' {' '.join(pair)} --transform trans"
    argv += f" {' '.join(SHORT)} --no_pictures --force"
    for quiet in ("", " --quiet"):
        done = subprocess.run(
            ["script", "-qec", argv + quiet, "/dev/null"],
            cwd=tmp_path,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
        assert done.returncode == 0
        assert (done.stdout == b"") == bool(quiet), done.stdout


def test_calls_from_python_are_silent(bodies, capfd):
    static, moving, static_grid2world, moving_grid2world = bodies(3)
    affine_registration(
        moving,
        static,
        moving_affine=moving_grid2world,
        static_affine=static_grid2world,
        pipeline=["translation"],
        level_iters=[2],
        factors=[1],
        sigmas=[0.0],
    )
    assert capfd.readouterr() == ("", "")
