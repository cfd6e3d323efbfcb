"""The BIDS-App: what it takes of a dataset, and the dataset that it makes."""

from functools import wraps
import json
import logging
from pathlib import Path
import re
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from sites import Sites

from dipy_ppir.align import read_transform
from dipy_ppir.workflows import bids as app
from dipy_ppir.workflows import streams
from dipy_ppir.workflows.bids import bids
from dipy_ppir.workflows.bidsnames import derived, label, parts
from dipy_ppir.workflows.inputs import InputError

pytest.importorskip("bids")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from bids.layout import BIDSLayout
    from bidsschematools import rules, schema

GRID = np.diag([2.0, 2.0, 2.0, 1.0])
SHIFTS = {
    "sub-01/anat/sub-01_T1w": (1.2, -0.8, 0.5),
    "sub-01/anat/sub-01_FLAIR": (-0.5, 1.0, 0.0),
    "sub-02/ses-a/anat/sub-02_ses-a_run-1_T1w": (-1.0, 0.5, 0.7),
    "sub-02/ses-a/anat/sub-02_ses-a_run-2_T1w": (-1.0, 0.5, 0.2),
    "sub-02/ses-b/anat/sub-02_ses-b_acq-fast_T1w": (0.0, 0.5, 0.2),
}


def image(shift=(0, 0, 0)):
    """A ball with a smaller one beside it."""
    grid = np.indices((20, 20, 20)) - 9.5
    ball = np.exp(-(grid**2).sum(axis=0) / 30)
    ball += 0.6 * np.exp(-((grid - [[[[4]]], [[[-3]]], [[[2]]]]) ** 2).sum(axis=0) / 12)
    return ndimage.shift(ball, shift, mode="nearest").astype(np.float32)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "my_ball.nii.gz"
    nib.save(nib.Nifti1Image(image(), GRID), path)
    return path


@pytest.fixture
def dataset(tmp_path):
    """Two participants, one with two sessions, and a third whose image is damaged."""
    root = tmp_path / "raw"
    for name, shift in SHIFTS.items():
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(image(shift), GRID), path)
    damaged = root / "sub-03/anat/sub-03_T1w.nii.gz"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("no image")
    (root / "sub-01/anat/sub-01_T1w.json").write_text('{"SkullStripped": true}')
    about = {"Name": "tiny", "BIDSVersion": "1.10.0", "DatasetDOI": "doi:10/x"}
    (root / "dataset_description.json").write_text(json.dumps(about))
    return root


@pytest.fixture(autouse=True)
def logs_as_before():
    root, own = logging.getLogger(), logging.getLogger("dipy_ppir")
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    streams.be_quiet(False)
    own.setLevel(logging.NOTSET)


def run(*words):
    return bids([str(word) for word in words])


def files(root):
    """All files below a folder, by their paths in it."""
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def table(text):
    """The table at the end of what is printed."""
    return dict(
        re.split(r" {2,}", line, maxsplit=1)
        for line in text.strip().split("\n\n")[-1].strip().splitlines()
    )


QUICK = ("--transform", "trans")


def test_a_derivatives_dataset(dataset, template, tmp_path, capsys):
    """Each image of each participant; a failure does not stop the others."""
    out = dataset / "derivatives" / "ppir"
    words = dataset, out, "participant", "--static", template, *QUICK
    assert run(*words) == 1
    states = table(capsys.readouterr().out)
    assert states.pop("sub-03_T1w.nii.gz").startswith("failed: the moving image ")
    names = [Path(name).name + ".nii.gz" for name in SHIFTS if "FLAIR" not in name]
    assert list(states) == names
    assert all(state.startswith("done") for state in states.values())
    expected = {"dataset_description.json", ".bidsignore"}
    for name in SHIFTS:
        if "FLAIR" in name:
            continue
        name = name.removesuffix("_T1w")
        path = "from-T1w_to-myball_mode-image"
        expected |= {f"{name}_{path}_xfm{end}" for end in (".txt", ".json")}
        expected |= {
            f"{name}_space-myball_desc-preproc_T1w{end}" for end in (".nii.gz", ".json")
        }
        expected.add(f"logs/{Path(name).name}_{path}_receipt.json")
    assert files(out) == expected

    # The transform is where it says, and takes static to moving coordinates.
    matrix = read_transform(
        out / "sub-01/anat/sub-01_from-T1w_to-myball_mode-image_xfm.txt", fmt="itk"
    )
    shift = 2 * np.array(SHIFTS["sub-01/anat/sub-01_T1w"])
    np.testing.assert_allclose(matrix[:3, 3], shift, atol=0.5)
    moved = nib.load(out / "sub-01/anat/sub-01_space-myball_desc-preproc_T1w.nii.gz")
    assert np.corrcoef(moved.get_fdata().ravel(), image().ravel())[0, 1] > 0.99
    np.testing.assert_array_equal(moved.affine, GRID)

    # As pybids reads it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layout = BIDSLayout(dataset, derivatives=out)
    (made,) = layout.derivatives.values()
    assert made.source_pipeline == "dipy_ppir"
    assert made.description["DatasetType"] == "derivative"
    assert made.description["SourceDatasets"] == [{"URL": "../..", "DOI": "doi:10/x"}]
    assert made.description["DatasetLinks"] == {"raw": "../.."}
    found = made.get(suffix="xfm", extension=".txt", subject="02", session="b")
    (xfm,) = found
    entities = xfm.get_entities()
    assert {k: entities[k] for k in ("from", "to", "mode", "acquisition")} == {
        "from": "T1w",
        "to": "myball",
        "mode": "image",
        "acquisition": "fast",
    }
    source, reference = xfm.get_metadata()["Sources"]
    assert source == "bids:raw:sub-02/ses-b/anat/sub-02_ses-b_acq-fast_T1w.nii.gz"
    assert (out / reference).resolve() == template.resolve()
    (preproc,) = made.get(space="myball", subject="01", extension=".nii.gz")
    assert preproc.get_metadata() == {
        "Description": "The image on the grid of myball",
        "Sources": [
            "bids:raw:sub-01/anat/sub-01_T1w.nii.gz",
            "bids::sub-01/anat/sub-01_from-T1w_to-myball_mode-image_xfm.txt",
        ],
        "SkullStripped": True,
        "SpatialReference": reference,
    }

    # Once more: nothing is done again unless it is missing, or forced.
    missing = out / "sub-01/anat/sub-01_space-myball_desc-preproc_T1w.nii.gz"
    missing.unlink()
    stamps = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    labels = "--participant_label", "sub-01", "02"
    assert run(*words, *labels) == 0
    states = table(capsys.readouterr().out)
    assert states.pop("sub-01_T1w.nii.gz").startswith("done")
    assert set(states.values()) == {"there already"}
    assert files(out) == expected
    again = {n for n in stamps if (out / n).stat().st_mtime_ns != stamps[n]}
    assert again == {n for n in expected if "sub-01" in n} - {
        missing.relative_to(out).as_posix()
    }
    assert run(*words, *labels, "--quiet") == 0
    assert capsys.readouterr().out == ""
    assert run(*words, *labels, "--session_label", "b", "--force") == 0
    (state,) = table(capsys.readouterr().out).values()
    assert state.startswith("done")


def test_names_are_those_of_bids():
    """By the specification's own rules for derivatives, which have no transforms."""
    patterns = [
        rule["regex"]
        for rule in rules.regexify_filename_rules(
            schema.load_schema().rules.files.deriv, schema.load_schema(), level=2
        )
    ]

    def valid(path):
        return any(re.fullmatch(pattern, path) for pattern in patterns)

    for name in (*SHIFTS, "sub-1/anat/sub-1_acq-x_run-2_part-mag_chunk-1_T1w"):
        folder, file = name.rsplit("/", 1)
        made = derived(file + ".nii.gz", space="Ball", desc="preproc")
        assert valid(f"{folder}/{made}")
        assert valid(f"{folder}/{derived(made, ending='.json')}")
    assert not valid("sub-1/anat/sub-1_desc-preproc_space-Ball_T1w.nii.gz")
    assert parts("sub-1_run-2_T1w.nii.gz") == (
        {"sub": "1", "run": "2"},
        "T1w",
        ".nii.gz",
    )
    assert label("MNI152 T1, 2 mm/à") == "MNI152T12mm"


@pytest.mark.parametrize("transform", ["syn", "freeform"])
def test_deformations_begin_with_an_affine_one(
    dataset, tmp_path, monkeypatch, transform
):
    """To another image of the same participant; what the flows are asked for."""
    asked = []
    for operation, flow in app.FLOWS.items():

        @wraps(flow.run)
        def quick(self, *pair, operation=operation, flow=flow, **flags):
            asked.append((operation, flags))
            short = {"level_iters": [2], "sigmas": [0.0], "factors": [1]}
            if operation == "syn":
                short = {"level_iters": [2, 1]}
            return flow.run(self, *pair, **short, **flags)

        kept = type(flow.__name__, (flow,), {"run": quick})
        monkeypatch.setitem(app.FLOWS, operation, kept)
    out = tmp_path / "out"
    words = "--to", "FLAIR", "--transform", transform, "--sampling_prop", "50"
    status = run(dataset, out, "participant", *words, "--participant_label", "01")
    assert status == 0
    path = "from-T1w_to-FLAIR_mode-image"
    assert files(out) == {
        "dataset_description.json",
        ".bidsignore",
        f"sub-01/anat/sub-01_{path}_xfm.h5",
        f"sub-01/anat/sub-01_{path}_xfm.json",
        "sub-01/anat/sub-01_space-FLAIR_desc-preproc_T1w.nii.gz",
        "sub-01/anat/sub-01_space-FLAIR_desc-preproc_T1w.json",
        f"logs/sub-01_{path}_receipt.json",
        f"logs/sub-01_desc-affine_{path}_receipt.json",
    }
    (first, affine), (last, flags) = asked
    assert (first, last) == ("affine", transform)
    assert affine["progressive"] and affine["sampling_prop"] == 50
    assert flags["prealign_file"].endswith("affine.txt")
    about = json.loads(
        (out / "sub-01/anat/sub-01_space-FLAIR_desc-preproc_T1w.json").read_text()
    )
    assert about["SpatialReference"] == "bids:raw:sub-01/anat/sub-01_FLAIR.nii.gz"
    receipt = json.loads((out / f"logs/sub-01_{path}_receipt.json").read_text())
    assert receipt["operation"] == transform


def test_one_without_its_partner(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    words = "--to", "FLAIR", *QUICK, "--participant_label", "01", "02"
    assert run(dataset, out, "participant", *words, "--filter", "run=1") == 1
    (state,) = table(capsys.readouterr().out).values()
    assert "0 images FLAIR of the same participant and session (none)" in state
    assert files(out) == {"dataset_description.json", ".bidsignore"}


def test_images_that_are_not_one_volume(dataset, template, tmp_path, capsys, caplog):
    """They fail before the first of the others begins."""
    for name, shape in (("run-2", (20, 20, 20, 2)), ("run-1", (20, 20, 1))):
        file = dataset / f"sub-02/ses-a/anat/sub-02_ses-a_{name}_T1w.nii.gz"
        nib.save(nib.Nifti1Image(np.ones(shape, np.float32), GRID), file)
    words = "--static", template, *QUICK, "--participant_label", "02"
    assert run(dataset, tmp_path / "out", "participant", *words) == 1
    thin, series, good = table(capsys.readouterr().out).values()
    assert "1 voxel along axis 2" in thin
    assert "(2 volumes); choose a volume and save it as a file of its own" in series
    assert good.startswith("done")
    said = [r.getMessage() for r in caplog.records if r.name == "dipy_ppir"]
    assert [" failed: " in text for text in said[:3]] == [True, True, False]
    # A series for all of them is refused at once.
    words = "--static", file.with_name(file.name.replace("run-1", "run-2")), *QUICK
    with pytest.raises(InputError, match="the static image .*choose a volume and save"):
        run(dataset, tmp_path / "other", "participant", *words)
    assert not (tmp_path / "other").exists()


REFUSED = {
    "group": (["group", "--to", "FLAIR"], "no analysis level 'group': images are"),
    "nothing to register with": (["participant"], "say what the images are registered"),
    "two to register with": (
        ["participant", "--to", "FLAIR", "--static", "x.nii"],
        "say what",
    ),
    "no session": (["participant", "--static", "remote"], "belong together"),
    "a session for nothing": (
        ["participant", "--to", "FLAIR", "--session", "s.toml"],
        "belong together",
    ),
    "settled": (
        ["participant", "--moving", "remote", "--session", "s", "--metric", "mi"],
        "--metric is settled by the session file",
    ),
    "a key": (["participant", "--to", "FLAIR", "--identity", "x"], "--identity is for"),
    "a space": (
        ["participant", "--static", "x", "--static_space", "a_b"],
        "letters and digits only",
    ),
    "a space of nothing": (
        ["participant", "--to", "FLAIR", "--moving_space", "x"],
        "--moving_space is for",
    ),
    "no such file": (["participant", "--static", "x.nii"], "x.nii does not exist"),
    "no such participant": (
        ["participant", "--to", "FLAIR", "--participant_label", "01", "7"],
        "no sub-7; it has sub-01, sub-02, sub-03",
    ),
    "no such session": (
        ["participant", "--to", "FLAIR", "--session_label", "ses-z"],
        "no ses-z; it has ses-a, ses-b",
    ),
    "no such image": (
        ["participant", "--to", "FLAIR", "--suffix", "PDw"],
        "no image of the dataset ends in _PDw",
    ),
    "no filter": (
        ["participant", "--to", "FLAIR", "--filter", "run"],
        "must be ENTITY=VALUE",
    ),
    "no such entity": (
        ["participant", "--to", "FLAIR", "--filter", "colour=red"],
        "--filter: .*colour",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(dataset, tmp_path, case):
    words, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        run(dataset, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_datasets_that_are_none(dataset, tmp_path, template):
    words = "participant", "--static", template, *QUICK
    with pytest.raises(InputError, match="is no folder"):
        run(dataset / "nothing", tmp_path / "out", *words)
    (dataset / "dataset_description.json").unlink()
    with pytest.raises(InputError, match="is no BIDS dataset.*skip_bids_validator"):
        run(dataset, tmp_path / "out", *words)
    other = tmp_path / "other"
    other.mkdir()
    (other / "dataset_description.json").write_text('{"Name": "mine"}')
    skip = "--skip_bids_validator", "--participant_label", "01"
    with pytest.raises(InputError, match="is another dataset"):
        run(dataset, other, *words, *skip)
    assert run(dataset, tmp_path / "out", *words, *skip) == 0


def test_without_pybids(dataset, template, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bids.layout", None)
    words = dataset, tmp_path / "out", "participant", "--static", template
    with pytest.raises(InputError, match=r"pip install 'dipy-ppir\[bids\]'"):
        run(*words)


def test_filters(dataset):
    layout = app.index(dataset)

    def found(*words):
        given = [str(dataset), "out", "participant", *words]
        images = app.find(layout, app.bids_parser().parse_args(given))
        return [image.filename.removesuffix(".nii.gz") for image in images]

    assert found("--filter", "run=2") == ["sub-02_ses-a_run-2_T1w"]
    assert found("--filter", "run=", "session=b") == ["sub-02_ses-b_acq-fast_T1w"]
    assert found("--filter", "acquisition=fast") == ["sub-02_ses-b_acq-fast_T1w"]
    assert found("--suffix", "FLAIR") == ["sub-01_FLAIR"]
    assert len(found("--session_label", "ses-a", "b")) == 3


def test_a_session(dataset, tmp_path, template, capsys):
    """Each owner has a dataset of its own, and one image of it in the session."""
    parameters = {"pipeline": ["center_of_mass"], "level_iters": [2]}
    parameters |= {"sigmas": [0.0], "factors": [1]}
    data = image(), image((1, 0, 0)), GRID, GRID
    sites = Sites(
        tmp_path / "sites", "affine", data, parameters=parameters, reveal="transform"
    )
    words = {
        site: [
            *(str(dataset), str(tmp_path / site), "participant"),
            *("--session", str(sites.file)),
            *("--identity", str(sites.folder / "keys" / site)),
        ]
        for site in ("moving", "static")
    }
    words["moving"] += ["--static", "remote", "--participant_label", "01"]
    words["static"] += ["--moving", "remote", "--participant_label", "02"]
    many = "3 match: sub-02_ses-a_run-1_T1w.*or run dipy_ppir_cohort for many"
    with pytest.raises(InputError, match=many):
        run(*words["static"])
    words["static"] += ["--session_label", "b", "--moving_space", "Other"]
    wrong = [*words["moving"], "--identity", str(sites.folder / "keys" / "static")]
    assert run(*wrong) == 1
    assert "is the static owner's; give --moving remote" in capsys.readouterr().out
    assert files(tmp_path / "moving") == {"dataset_description.json", ".bidsignore"}

    class AsApps(Sites):
        def argv(self, site, *extra, before=""):
            argv = super().argv(site, *extra, before=before)
            if site == "helper":
                return argv
            code = argv[2].replace("align_affine", "bids")
            return [*argv[:2], code, *words[site]]

    sites.__class__ = AsApps
    sites.run()
    path = "from-T1w_to-Sitestatic_mode-image"
    assert files(tmp_path / "moving") == {
        "dataset_description.json",
        ".bidsignore",
        f"sub-01/anat/sub-01_{path}_xfm.txt",
        f"sub-01/anat/sub-01_{path}_xfm.json",
        "sub-01/anat/sub-01_space-Sitestatic_desc-preproc_T1w.nii.gz",
        "sub-01/anat/sub-01_space-Sitestatic_desc-preproc_T1w.json",
        f"logs/sub-01_{path}_receipt.json",
    }
    about = json.loads(
        (tmp_path / "moving/sub-01/anat")
        .joinpath("sub-01_space-Sitestatic_desc-preproc_T1w.json")
        .read_text()
    )
    assert "SpatialReference" not in about
    assert about["Description"] == "The image on the grid of another site's image"
    name = "sub-02_ses-b_acq-fast_from-Other_to-T1w_mode-image"
    assert files(tmp_path / "static") == {
        "dataset_description.json",
        ".bidsignore",
        f"sub-02/ses-b/anat/{name}_xfm.txt",
        f"sub-02/ses-b/anat/{name}_xfm.json",
        f"logs/{name}_receipt.json",
    }
    matrices = [
        read_transform(next((tmp_path / site).rglob("*_xfm.txt")), fmt="itk")
        for site in words
    ]
    np.testing.assert_allclose(*matrices, atol=1e-9)
