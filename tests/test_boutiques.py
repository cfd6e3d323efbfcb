"""Boutiques descriptors: as the parsers are, and as Boutiques wants them."""

import argparse
from importlib.metadata import distribution
import json
import logging
from pathlib import Path
import random
import shlex
import signal
import subprocess
import sys

from commands import script
from dipy.workflows import flow_runner
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dipy_ppir.workflows import cli, streams
from dipy_ppir.workflows.boutiques import boutiques as write_descriptors
from dipy_ppir.workflows.boutiques import descriptor
from dipy_ppir.workflows.commands import (
    LIMITS,
    NEEDS,
    arguments,
    described,
    parser_of,
)
from dipy_ppir.workflows.convert import ConvertTransformFlow
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.transform import ApplyTransformFlow

bosh = pytest.importorskip("boutiques")
COMMANDS = described()
SCRIPTS = {e.name for e in distribution("dipy-ppir").entry_points}
#: Commands without a descriptor.
LEFT_OUT = {
    "dipy_ppir": "it prints what is installed",
    "dipy_ppir_boutiques": "it writes the descriptors",
    "dipy_ppir_demo": "it takes no data",
    "dipy_ppir_keygen": "keys are made at a site, by hand, once",
    "dipy_ppir_session": "it prints, for people who agree on something",
}


def test_every_command_that_processes_files():
    assert set(COMMANDS) == SCRIPTS - set(LEFT_OUT)


class Seen(Exception):
    """Ends a command that has made its parser."""


def facts(parser):
    """What a parser knows of its arguments."""
    return {
        action.dest: (action.option_strings, action.nargs, action.default)
        for action in parser._actions
        if action.dest != "version"
    }


@pytest.mark.parametrize("command", cli.CLI_FLOWS)
def test_the_parser_is_that_of_the_command(monkeypatch, command):
    made = []

    class Parser(flow_runner.IntrospectiveArgumentParser):
        def get_flow_args(self, *args):
            made.append(self)
            raise Seen

    monkeypatch.setattr(flow_runner, "IntrospectiveArgumentParser", Parser)
    monkeypatch.setattr(sys, "argv", [command, "--debug"])
    on_term = signal.getsignal(signal.SIGTERM)
    raising = logging.raiseExceptions
    try:
        with pytest.raises(Seen):
            cli.run(command)
    finally:
        signal.signal(signal.SIGTERM, on_term)
        logging.raiseExceptions = raising
        logging.getLogger("dipy_ppir").setLevel(logging.NOTSET)
    assert facts(made[0]) == facts(parser_of(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_valid(command, tmp_path):
    """By the schema, and by what Boutiques checks beyond it."""
    file = tmp_path / "descriptor.json"
    file.write_text(json.dumps(descriptor(command)))
    bosh.validate(str(file), "--format")
    inputs = {i["id"]: i for i in descriptor(command)["inputs"]}
    shown = [a for a in parser_of(command)._actions if a.help != argparse.SUPPRESS]
    # A flag that was heeded already has no name to be passed on by.
    actions = {a.dest.replace(argparse.SUPPRESS, "quiet"): a for a in shown}
    assert len(actions) == len(shown)
    assert set(inputs) == set(actions) - {"help", "version"}
    for name, entry in inputs.items():
        if actions[name].choices:
            assert entry["value-choices"] == list(actions[name].choices)


def invocation(command, seed):
    """Values for a random half of the inputs, as the descriptor allows them."""
    rng = random.Random(seed)
    inputs = {i["id"]: i for i in descriptor(command)["inputs"]}

    def value(entry):
        if "value-choices" in entry:
            return rng.choice(entry["value-choices"])
        if entry["type"] == "Number":
            low, high = entry.get("minimum", 0), entry.get("maximum", 100)
            number = rng.randint(int(np.ceil(low)), int(high))
            number += entry.get("exclusive-minimum", False)
            return number if entry.get("integer") else max(low, number - 0.25)
        return f"a {entry['type']} of {rng.randrange(100)}.nii"

    given = {}
    for name, entry in inputs.items():
        if entry["optional"] and rng.random() < 0.5:
            continue
        if set(entry.get("disables-inputs", ())) & set(given):
            continue
        if entry["type"] == "Flag":
            given[name] = True
        elif entry.get("list"):
            least = entry.get("min-list-entries", 1)
            given[name] = [value(entry) for _ in range(rng.randint(least, least + 2))]
        else:
            given[name] = value(entry)
    for name in [n for n in given if "requires-inputs" in inputs[n]]:
        for needed in inputs[name]["requires-inputs"]:
            if needed in given:
                continue
            if set(inputs[needed].get("disables-inputs", ())) & set(given):
                del given[name]
                break
            given[needed] = value(inputs[needed])
    return given


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("command", COMMANDS)
def test_an_invocation_means_the_same_to_the_parser(command, seed, tmp_path):
    """Boutiques makes the command line, and the command's parser reads it."""
    file, call = tmp_path / "descriptor.json", tmp_path / "invocation.json"
    file.write_text(json.dumps(descriptor(command)))
    given = invocation(command, seed)
    call.write_text(json.dumps(given))
    line = bosh.execute("simulate", "-i", str(call), str(file)).stdout
    program, *words = shlex.split(line.splitlines()[-1])
    assert program == command
    parsed = vars(parser_of(command).parse_args(words))
    for name, argument in arguments(command).items():
        expected = given.get(name, argument.default)
        if argument.kind == "flag":
            expected = bool(expected)
        elif name == "out_dir":
            expected = str(given.get(name, "."))
        if name == "quiet" and command in cli.CLI_FLOWS:
            # Heeded before the parser is made, and passed on to nobody.
            assert ("--quiet" in words) == expected and name not in parsed
            continue
        found = parsed[name]
        if isinstance(found, Path):
            found, expected = str(found), str(expected)
        # What a flag is without a value is told in several ways.
        assert (found or None) == (expected or None), name


def test_words_that_a_command_takes(tmp_path):
    """Tables of words are those that the commands name in their refusals."""
    flow = ApplyTransformFlow()
    for name in ("transform_type", "interpolation"):
        with pytest.raises(InputError, match=f"--{name} other") as caught:
            flow.run("s.nii", "m.nii", "affine.txt", **{name: "other"})
        words = str(caught.value).split("choose ")[1].split(" or ")
        assert tuple(w.strip("'") for w in words) == LIMITS[name]["choices"]
    np.savetxt(tmp_path / "affine.txt", np.eye(4))
    for which in ("from", "to"):
        with pytest.raises(InputError, match="is not known") as caught:
            given = {f"{which}_format": "other"}
            ConvertTransformFlow().run(tmp_path / "affine.txt", "b.tfm", **given)
        words = str(caught.value).split("choose one of ")[1].split(", ")
        assert tuple(words) == LIMITS[f"{which}_format"]["choices"]
    for name in NEEDS:
        assert any(name in arguments(command) for command in COMMANDS)


def test_what_is_known_of_values():
    inputs = {i["id"]: i for i in descriptor("dipy_ppir_align_affine")["inputs"]}
    assert inputs["metric"]["value-choices"] == ["mi", "ssd", "cc"]
    assert (inputs["nbins"]["minimum"], inputs["nbins"]["maximum"]) == (6, 512)
    assert inputs["level_iters"]["default-value"] == [1000, 500, 100]
    assert inputs["static_image_files"]["type"] == "File"
    assert not inputs["static_image_files"]["optional"]
    assert inputs["identity"]["requires-inputs"] == ["session"]
    syn = {i["id"]: i for i in descriptor("dipy_ppir_align_syn")["inputs"]}
    assert syn["mopt_radius"]["maximum"] == 20  # called radius elsewhere
    assert syn["step_length"]["exclusive-minimum"] is True
    report = {i["id"]: i for i in descriptor("dipy_ppir_report")["inputs"]}
    assert report["receipt"]["type"] == "File" and not report["receipt"]["optional"]
    assert report["out"]["type"] == "String"
    cohort = {i["id"]: i for i in descriptor("dipy_ppir_cohort")["inputs"]}
    assert not {"pair", "force", "prealign_file"} & set(cohort)
    built = {i["id"]: i for i in descriptor("dipy_ppir_template")["inputs"]}
    assert (built["images"]["type"], built["images"]["list"]) == ("File", True)
    assert built["plan"]["type"] == "File" and "file" not in built


#: What commands write, to whether that depends on something.
WRITTEN = {
    "align_affine": {
        "[OUT_DIR]/[OUT_MOVED]": True,
        "[OUT_DIR]/[OUT_AFFINE]": True,
        "[OUT_DIR]/[OUT_QUALITY]": True,
        "[OUT_DIR]/[OUT_INV_STATIC]": True,
        "[OUT_DIR]/[OUT_ITK]": True,
        "[OUT_DIR]/[RECEIPT]": False,
        "[OUT_DIR]/[REPORT]": True,
        "[OUT_DIR]/checkerboard.png": True,
        "[OUT_DIR]/contours.png": True,
        "[OUT_DIR]/warped_grid.png": True,
    },
    "align_syn": {
        "[OUT_DIR]/[OUT_WARPED]": True,
        "[OUT_DIR]/[OUT_INV_STATIC]": True,
        "[OUT_DIR]/[OUT_FIELD]": True,
        "[OUT_DIR]/[OUT_ITK]": True,
        "[OUT_DIR]/[RECEIPT]": False,
        "[OUT_DIR]/[REPORT]": True,
        "[OUT_DIR]/checkerboard.png": True,
        "[OUT_DIR]/contours.png": True,
        "[OUT_DIR]/warped_grid.png": True,
        "[OUT_DIR]/jacobian.png": True,
    },
    "align_points": {
        "[OUT_DIR]/[OUT_MOVED]": True,
        "[OUT_DIR]/[OUT_MATRIX]": True,
        "[OUT_DIR]/[OUT_AFFINE]": True,
        "[OUT_DIR]/[OUT_ITK]": True,
        "[OUT_DIR]/[RECEIPT]": False,
        "[OUT_DIR]/[REPORT]": True,
    },
    "convert_transform": {"[OUT_DIR]/[RESULT_FILE]": False},
    "helper": {"[OUT_DIR]/[RECEIPT]": False},
    "receipt": {"[TO_SEND]": True},
    "report": {"[OUT]": False},
    "template": {
        "[OUT_DIR]/template.nii.gz": False,
        "[OUT_DIR]/receipt.json": False,
        "[OUT_DIR]/*_affine.txt": True,
        "[OUT_DIR]/*_displacement_field.nii.gz": True,
    },
    "cohort": {"[OUT_DIR]/outcomes.tsv": True},
    "bids": {"[OUTPUT_DIR]/dataset_description.json": False},
}


@pytest.mark.parametrize("command", WRITTEN)
def test_what_is_written(command):
    files = descriptor(f"dipy_ppir_{command}")["output-files"]
    assert {f["path-template"]: f["optional"] for f in files} == WRITTEN[command]


def test_the_command_writes_them(tmp_path, capsys):
    name = "dipy_ppir_align_points"
    write_descriptors([name, "--out_dir", str(tmp_path / "new")])
    (file,) = (tmp_path / "new").iterdir()
    assert capsys.readouterr().out == f"{file}\n"
    assert json.loads(file.read_text()) == descriptor(name)
    write_descriptors([name, "--out_dir", str(tmp_path / "q"), "--quiet"])
    streams.be_quiet(False)
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="there already; add --force"):
        write_descriptors(["--out_dir", str(tmp_path / "new")])
    assert list((tmp_path / "new").iterdir()) == [file]
    write_descriptors(["--out_dir", str(tmp_path / "new"), "--force"])
    assert {p.stem for p in (tmp_path / "new").iterdir()} == set(COMMANDS)
    with pytest.raises(InputError, match="dipy_ppir_keygen is no command that"):
        write_descriptors(["dipy_ppir_keygen"])


def test_launched(tmp_path, monkeypatch):
    """As a user does it, with the files that Boutiques finds afterwards."""
    image = ndimage.gaussian_filter(np.random.default_rng(0).random((16,) * 3), 1)
    for n, name in enumerate(("static", "moving")):
        moved = nib.Nifti1Image(np.roll(image, n, axis=0), np.eye(4))
        nib.save(moved, tmp_path / f"{name}.nii.gz")
    write_descriptors(["dipy_ppir_align_affine", "--out_dir", str(tmp_path)])
    given = {
        "static_image_files": "static.nii.gz",
        "moving_image_files": "moving.nii.gz",
        "transform": "com",
        "out_itk": "affine.tfm",
        "out_dir": "out",
    }
    (tmp_path / "invocation.json").write_text(json.dumps(given))
    launch = ["bosh", "exec", "launch", "--skip-data-collection"]
    files = ["dipy_ppir_align_affine.json", "invocation.json"]
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    done = subprocess.run(
        [script(launch[0]), *launch[1:], *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    written = done.stdout.split("Output files")[1]
    made = ("moved.nii.gz", "affine.txt", "affine.tfm", "receipt.json", "report.html")
    for name in (*made, "checkerboard.png"):
        assert f"out/{name}" in written
        assert (tmp_path / "out" / name).exists()
