"""Interfaces of nipype: as the commands' parsers are, and run in its nodes."""

import json
import os
from pathlib import Path
import subprocess
import sys

from commands import script
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from sites import Sites

from dipy_ppir.align.transformfiles import read_transform
from dipy_ppir.workflows.commands import APART, NEEDS, arguments, flow_of

pytest.importorskip("nipype")

from nipype import MapNode, Node, Workflow
from nipype.interfaces.base import isdefined, traits

from dipy_ppir import interfaces

INTERFACES = {
    interface._cmd: interface
    for interface in (getattr(interfaces, name) for name in interfaces.__all__)
}
REGISTER = [command for command in INTERFACES if "align" in command]
#: Flags that are no inputs.
LEFT_OUT = {
    "mix_names": "a node registers one pair; a MapNode gives each a folder",
    "out_strat": "the same",
    "log_file": "nipype keeps what is printed: terminal_output",
}
#: What the commands do not have.
OWN = {"args", "environ"}
QUICK = {
    "transform": "rigid",
    "level_iters": [10, 5],
    "factors": [2, 1],
    "sigmas": [1.0, 0.0],
}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(script("bosh")).parent), prepend=os.pathsep)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A static image, and two that are the same elsewhere; a blank in the name."""
    folder = tmp_path_factory.mktemp("some images")
    grid = np.indices((20, 20, 20)) - 9.5
    ball = np.exp(-(grid**2).sum(axis=0) / 30)
    ball += 0.6 * np.exp(-((grid - [[[[4]]], [[[-3]]], [[[2]]]]) ** 2).sum(axis=0) / 12)
    shifts = {"static": (0, 0, 0), "one": (1.2, -0.8, 0.5), "two": (-1, 0.6, 0.4)}
    paths = {}
    for name, shift in shifts.items():
        image = ndimage.shift(ball, shift, mode="nearest").astype(np.float32)
        paths[name] = str(folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(image, np.diag([2.0, 2, 2, 1])), paths[name])
    return paths


# -- the same as the commands ------------------------------------------------


def limits(kind):
    """Limits of a trait, as a schema has them."""
    found = {}
    for end, name in (("low", "inimum"), ("high", "aximum")):
        value = getattr(kind, f"_{end}", None)
        if value is not None:
            exclusive = getattr(kind, f"_exclude_{end}")
            prefix = "exclusiveM" if exclusive else "m"
            found[prefix + name] = value
    return found


@pytest.mark.parametrize("command", INTERFACES)
def test_inputs_are_the_flags_of_the_command(command):
    spec = INTERFACES[command].input_spec()
    names = set(spec.copyable_trait_names())
    known = arguments(command)
    assert names - OWN == set(known) - set(LEFT_OUT)
    for name in names - OWN:
        trait, argument = spec.trait(name), known[name]
        kind = trait.trait_type
        words = (trait.argstr or "").split()
        if argument.flag is None:
            assert (words, bool(trait.mandatory)) == (["%s"], True), name
            assert trait.position == list(known).index(name)
        else:
            assert words[0] == argument.flag and not trait.mandatory, name
            assert len(words) == 1 + (argument.kind != "flag"), name
        assert trait.desc, name
        assert not isdefined(getattr(spec, name)), name
        if argument.default is not None and argument.flag is not None:
            default = trait.default
            assert default == argument.default, name
        if argument.many:
            assert isinstance(kind, traits.List), name
            given = dict(argument.limits)
            assert kind.minlen == given.pop("minItems"), name
            assert kind.maxlen == given.pop("maxItems"), name
            (inner,) = trait.inner_traits
            assert limits(inner.trait_type) == given, name
        elif argument.choices is not None:
            assert set(kind.values) == set(argument.choices), name
        elif argument.kind == "flag":
            assert isinstance(kind, traits.Bool), name
        elif argument.kind == "file" and name != "identity":
            with pytest.raises(traits.TraitError, match="existing file"):
                setattr(spec, name, "there is no such file")
        else:
            assert limits(kind) == argument.limits, name
            if argument.limits:
                value = argument.limits.get("maximum", argument.limits.get("minimum"))
                value = 1 if value is None else value
                is_whole = isinstance(kind.validate(spec, name, value), int)
                assert is_whole == (argument.kind == "integer"), name


@pytest.mark.parametrize("command", INTERFACES)
def test_inputs_refuse_what_the_command_refuses(command):
    spec = INTERFACES[command].input_spec()
    names = set(spec.copyable_trait_names()) - OWN
    settled = set(getattr(flow_of(command), "settled", ()))
    if command == "dipy_ppir_align_points":
        settled = {"scaling", "precision", "parties"}
    expected = {name: set() for name in names}
    pairs = [("session", name) for name in settled]
    pairs += [pair for pair in APART if set(pair) <= names]
    for one, other in pairs:
        expected[one].add(other)
        expected[other].add(one)
    assert {n: set(spec.trait(n).xor or ()) for n in names} == expected
    for name in names:
        needs = spec.trait(name).requires or []
        assert tuple(needs) == NEEDS.get(name, ()), name


@pytest.mark.parametrize("command", INTERFACES)
def test_outputs_are_the_files_of_the_command(command):
    interface, flow = INTERFACES[command], flow_of(command)
    names = set(interface.output_spec().copyable_trait_names())
    named = {n: a for n, a in arguments(command).items() if a.written}
    assert ({"receipt", "report"} <= set(named)) == (command in REGISTER)
    pictures = set()
    for kind in ("pictures", "own_pictures"):
        found = {Path(p).stem: p for p in getattr(flow, kind, ())}
        assert getattr(interface, f"_{kind}", {}) == found
        pictures |= set(found)
    assert names == set(named) | pictures
    kinds = getattr(flow, "outputs", {})
    optional = getattr(flow, "optional", {})
    expected = {
        name: optional[kind] for name, kind in kinds.items() if kind in optional
    }
    # What has no name by default is written where it is given one.
    without = [n for n, a in named.items() if a.default is None and a.flag is not None]
    assert interface._optional == expected | {name: name for name in without}


def test_the_command_line(images):
    align = interfaces.AlignAffine(
        static_image_files=images["static"],
        moving_image_files=images["one"],
        sampling_prop=10,
        out_moved="$HOME; touch moved.nii",
        progressive=True,
        save_metric=False,
        **QUICK,
    )
    static, moving = (f"'{images[name]}'" for name in ("static", "one"))
    assert align.cmdline == (
        f"dipy_ppir_align_affine {static} {moving} --factors 2 1 --level_iters 10 5 "
        "--out_moved '$HOME; touch moved.nii' --progressive --sampling_prop 10.0 "
        "--sigmas 1.0 0.0 --transform rigid"
    )
    for name, value in (("nbins", 5), ("metric", "xy"), ("level_iters", [])):
        with pytest.raises(traits.TraitError):
            setattr(align.inputs, name, value)
    with pytest.raises(OSError, match="mutually exclusive"):
        align.inputs.static_mask = images["static"]
    align.inputs.identity = "keys"
    with pytest.raises(ValueError, match="requires a value for input 'session'"):
        _ = align.cmdline


def test_a_path_is_that_of_where_it_was_given(images, monkeypatch):
    monkeypatch.chdir(Path(images["one"]).parent)
    align = interfaces.AlignSyn(
        static_image_files="static.nii.gz", moving_image_files="remote"
    )
    assert align.inputs.static_image_files == images["static"]
    assert align.inputs.moving_image_files == "remote"


# -- what is written where ---------------------------------------------------

#: Outputs, by command, of each owner that gets the result, and of one that does not.
IN_SESSIONS = {
    "affine": {
        ("moving", True): {"out_moved", "out_affine", "out_itk", "warped_grid"},
        ("static", True): {"out_affine", "out_itk", "out_inv_static", "warped_grid"},
        ("static", False): set(),
    },
    "syn": {
        ("moving", True): {
            *("out_warped", "out_field", "out_itk"),
            *("warped_grid", "jacobian"),
        },
        ("moving", False): set(),
        ("static", True): {
            *("out_field", "out_itk", "out_inv_static"),
            *("warped_grid", "jacobian"),
        },
        ("static", False): set(),
    },
    "points": {
        ("moving", True): {"out_moved", "out_matrix", "out_affine", "out_itk"},
        ("moving", False): set(),
        ("static", True): {"out_matrix", "out_affine", "out_itk"},
        ("static", False): set(),
    },
}
PICTURES = {"checkerboard", "contours", "warped_grid", "jacobian"}


@pytest.fixture
def sites(tmp_path, images):
    def make(operation, **options):
        ball = nib.load(images["static"]).get_fdata()
        data = (ball, np.roll(ball, 1, axis=0), np.eye(4), np.eye(4))
        reveal = "transform" if operation in ("affine", "points") else None
        return Sites(tmp_path / "sites", operation, data, reveal=reveal, **options)

    return make


@pytest.mark.parametrize("operation", IN_SESSIONS)
def test_only_outputs_of_this_owner(sites, images, operation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in PICTURES:
        Path(f"{name}.png").touch()
    Path("report.html").touch()
    interface = INTERFACES[f"dipy_ppir_align_{operation}"]
    made = sites(operation)
    for (owner, gets), expected in IN_SESSIONS[operation].items():
        result_to = owner if gets else {"moving": "static", "static": "moving"}[owner]
        if operation == "affine":
            result_to = "both" if gets else "moving"
        file = made.write(f"{owner}{gets}.toml", result_to=result_to)
        data = dict.fromkeys(interface._data, "remote")
        data[next(n for n in data if n.startswith(owner))] = images["static"]
        inputs = {"session": str(file), **data}
        inputs |= {"out_itk": "itk.h5"} if gets else {}
        inputs |= {"inv_static": True} if "out_inv_static" in expected else {}

        def written(inputs=inputs, **more):
            outputs = interface(**inputs, **more)._list_outputs()
            return {name for name, path in outputs.items() if isdefined(path)}

        # Without the extra there is neither a report nor a picture.
        assert written(out_dir="empty") == (expected | {"receipt"}) - PICTURES
        assert written() == expected | {"receipt", "report"}
        assert written(no_pictures=True) == written(out_dir="empty")


def test_optional_outputs(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = {"static_image_files": images["static"], "moving_image_files": images["one"]}

    def written(interface, **inputs):
        outputs = interface(**pair, **inputs)._list_outputs()
        return {name: path for name, path in outputs.items() if isdefined(path)}

    found = written(interfaces.AlignAffine, out_dir="out", out_moved="m.nii")
    folder = tmp_path / "out"
    assert found == {
        "out_moved": str(folder / "m.nii"),
        "out_affine": str(folder / "affine.txt"),
        "receipt": str(folder / "receipt.json"),
    }
    metric = {"save_metric": True}
    assert "out_quality" in written(interfaces.AlignAffine, **metric)
    assert "out_quality" not in written(
        interfaces.AlignAffine, transform="com", **metric
    )
    for interface in (interfaces.AlignAffine, interfaces.AlignFreeForm):
        assert "out_inv_static" in written(interface, inv_static=True)
        assert written(interface, out_itk="i.h5")["out_itk"] == str(tmp_path / "i.h5")
    drawn = {"checkerboard.png", "warped_grid.png", "report.html"}
    for name in drawn:
        Path(name).touch()
    made = {"checkerboard", "warped_grid", "report"}
    assert made < set(written(interfaces.AlignSyn))
    assert not made & set(written(interfaces.AlignSyn, no_pictures=True))
    # Of an affine transform that picture is made at sites of sessions only.
    found = set(written(interfaces.AlignAffine))
    assert found & made == {"checkerboard", "report"}
    Path("r.html").touch()
    found = written(interfaces.AlignAffine, report="r.html")
    assert found["report"] == str(tmp_path / "r.html")


OWNER = """
import json, sys
from nipype import Node
from nipype.interfaces.base import isdefined
from dipy_ppir.interfaces import AlignAffine

inputs = json.loads(sys.argv[1])
node = Node(AlignAffine(**inputs), name="align", base_dir=sys.argv[2])
outputs = node.run().outputs.get()
there = {name: path for name, path in outputs.items() if isdefined(path)}
with open(sys.argv[2] + "/outputs.json", "w") as stream:
    json.dump(there, stream)
"""


def test_one_party_of_a_session(sites):
    """Both owners are nodes; the helper is a command, as at a site of its own."""
    parameters = {"pipeline": ["center_of_mass", "translation"], "level_iters": [2]}
    parameters |= {"sigmas": [0.0], "factors": [1], "ret_metric": True}
    made = sites("affine", parameters=parameters)
    processes = made.start(sites=["helper"])
    for name in ("moving", "static"):
        inputs = {
            "session": str(made.file),
            "identity": str(made.folder / "keys" / name),
            "environ": {"OMP_NUM_THREADS": "1"},
            **dict.fromkeys(interfaces.AlignAffine._data, "remote"),
            f"{name}_image_files": str(made.folder / f"{name}.nii.gz"),
            "out_itk": "affine.tfm",
            "inv_static": name == "static",
        }
        folder = made.folder / f"nodes of {name}"
        folder.mkdir()
        words = [sys.executable, "-c", OWNER, json.dumps(inputs), str(folder)]
        with open(made.folder / f"{name}.log", "w") as log:
            processes[name] = subprocess.Popen(words, stdout=log, stderr=log)
    statuses = made.wait(processes)
    assert set(statuses.values()) == {0}, "\n".join(map(made.log, statuses))
    found = {
        name: json.loads((made.folder / f"nodes of {name}/outputs.json").read_text())
        for name in ("moving", "static")
    }
    both = {"out_itk", "receipt", "report", "warped_grid"}
    assert {name: set(outputs) for name, outputs in found.items()} == {
        "moving": {"out_moved", "out_affine", "out_quality", *both},
        "static": {"out_affine", "out_inv_static", *both},
    }
    matrices = [np.loadtxt(outputs["out_affine"]) for outputs in found.values()]
    np.testing.assert_allclose(*matrices, atol=1e-9)


# -- in nipype's workflows -----------------------------------------------------


def test_a_workflow_of_two_nodes(images, tmp_path):
    """What is found is applied and converted; and is not looked for again."""
    workflow = Workflow("two", base_dir=str(tmp_path))
    # Otherwise what no other node takes is deleted, receipts as well.
    workflow.config["execution"] = {"remove_unnecessary_outputs": "false"}
    pair = {"static_image_files": images["static"], "moving_image_files": images["one"]}
    align = Node(interfaces.AlignAffine(**pair, **QUICK), name="align")
    align.interface.terminal_output = "file"
    apply = Node(interfaces.ApplyTransform(**pair), name="apply")
    convert = interfaces.ConvertTransform(result_file="a b.tfm", quiet=True)
    convert = Node(convert, name="convert")
    workflow.connect(align, "out_affine", apply, "transform_map_file")
    workflow.connect(align, "out_affine", convert, "transform_file")
    nodes = {node.name: node for node in workflow.run().nodes()}
    outputs = nodes["align"].result.outputs
    moved = nib.load(outputs.out_moved)
    again = nib.load(nodes["apply"].result.outputs.out_file)
    np.testing.assert_allclose(again.get_fdata(), moved.get_fdata(), atol=1e-5)
    file = nodes["convert"].result.outputs.result_file
    assert file == str(tmp_path / "two" / "convert" / "a b.tfm")
    np.testing.assert_allclose(
        read_transform(file), np.loadtxt(outputs.out_affine), atol=1e-6
    )
    static = nib.load(images["static"]).get_fdata()
    assert np.corrcoef(static.ravel(), moved.get_fdata().ravel())[0, 1] > 0.98
    assert Path(outputs.receipt).parent == tmp_path / "two" / "align"
    assert json.loads(Path(outputs.receipt).read_text())["operation"] == "affine"
    assert not isdefined(outputs.out_quality) and not isdefined(outputs.out_itk)
    assert Path(outputs.report).read_text().startswith("<!DOCTYPE html>")
    assert (
        "What each party learned" in (tmp_path / "two/align/output.nipype").read_text()
    )
    before = os.stat(outputs.receipt).st_mtime_ns
    workflow.run()
    assert os.stat(outputs.receipt).st_mtime_ns == before


@pytest.mark.heavy
def test_many_at_a_time(images, tmp_path):
    """A MapNode, whose nodes are started by other processes."""
    align = MapNode(
        interfaces.AlignAffine(
            static_image_files=images["static"], no_pictures=True, **QUICK
        ),
        iterfield=["moving_image_files"],
        name="align",
    )
    align.inputs.moving_image_files = [images["one"], images["two"]]
    workflow = Workflow("many", base_dir=str(tmp_path))
    workflow.add_nodes([align])
    (node,) = workflow.run(plugin="MultiProc", plugin_args={"n_procs": 2}).nodes()
    shifts = [np.loadtxt(path)[:3, 3] for path in node.result.outputs.out_affine]
    np.testing.assert_allclose(shifts[0], [2.4, -1.6, 1.0], atol=0.7)
    np.testing.assert_allclose(shifts[1], [-2.0, 1.2, 0.8], atol=0.7)


def test_a_failure_says_what_the_command_said(images, tmp_path):
    bad = tmp_path / "bad.nii.gz"
    bad.write_text("no image")
    node = Node(
        interfaces.AlignAffine(
            static_image_files=images["static"], moving_image_files=str(bad)
        ),
        name="align",
        base_dir=str(tmp_path),
    )
    with pytest.raises(Exception, match="cannot be read as NIfTI"):
        node.run()


# -- what importing them does --------------------------------------------------

PROBE = """
import os, sys, types

def called(*args):
    raise SystemExit("asked for the newest version")

fake = types.ModuleType("etelemetry")
fake.check_available_version = fake.get_project = called
sys.modules["etelemetry"] = fake
before = dict(os.environ)
import dipy_ppir.align
assert "nipype" not in sys.modules
from dipy_ppir.interfaces import AlignAffine
AlignAffine()
assert dict(os.environ) == before
{more}
print("fine")
"""


def probe(more="", **environ):
    """Run as in a notebook, without a file that is the program."""
    env = {k: v for k, v in os.environ.items() if k != "NIPYPE_NO_ET"} | environ
    return subprocess.run(
        [sys.executable, "-c", PROBE.replace("{more}", more)],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
    )


def test_nobody_is_called_and_nothing_is_set():
    for environ in ({}, {"NIPYPE_NO_ET": "mine"}):
        done = probe(**environ)
        assert done.stdout == "fine\n", done.stderr
    # The probe would notice.
    asking = "from nipype.interfaces.base import CommandLine; CommandLine('ls')"
    assert "asked for the newest version" in probe(asking).stderr


def test_without_nipype():
    code = "import sys; sys.modules['nipype'] = None; import dipy_ppir.interfaces"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the interfaces need nipype")
    assert "pip install 'dipy-ppir[nipype]'" in last
