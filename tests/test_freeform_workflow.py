"""The command for free-form registrations, on one machine and between sites."""

import json
from pathlib import Path
import sys

from dipy.align.imaffine import AffineMap
import nibabel as nib
import numpy as np
from numpy.testing import assert_allclose
import pytest
from sites import ROLES, Launcher, Sites
from test_freeform import bumps

from dipy_ppir.align import read_mapping
from dipy_ppir.workflows import cli

ALIGN, APPLY = "dipy_ppir_align_freeform", "dipy_ppir_apply_transform"
FAST = ["--level_iters", "3", "2", "--spacing", "4"]
FIELD = "displacement_field.nii.gz"
GRID = np.diag([2.0, 1.5, 1.8, 1.0])


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Files of a static and a moving image, in the folder of the test."""
    monkeypatch.chdir(tmp_path)
    names = []
    for name, image in zip(("static", "moving"), bumps(3), strict=True):
        nib.save(nib.Nifti1Image(image.astype(np.float32), GRID), f"{name}.nii.gz")
        names.append(f"{name}.nii.gz")
    return names


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command; returns its status, and what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        status = cli.run(name)
        return status, *capsys.readouterr()

    return run


def test_writes_what_the_other_command_writes(command, pair):
    """And dipy_ppir_apply_transform makes the same of the map."""
    status, out, err = command(ALIGN, *pair, *FAST, "--inv_static", "--out_dir", "res")
    assert (status, err) == (0, "")
    names = {"warped_moved.nii.gz", "inc_static.nii.gz", FIELD, "receipt.json"}
    pictures = {"checkerboard.png", "contours.png", "warped_grid.png", "jacobian.png"}
    assert {p.name for p in Path("res").iterdir()} == names | pictures | {"report.html"}
    assert "deformation, level 2 of 2 done: iteration 2" in out
    receipt = json.loads(Path("res/receipt.json").read_text())
    assert receipt["operation"] == "freeform"
    static, moving = (nib.load(name).get_fdata() for name in pair)
    mapping = read_mapping(f"res/{FIELD}", pair[1], pair[0])
    warped = nib.load("res/warped_moved.nii.gz").get_fdata()
    assert_allclose(mapping.transform(moving), warped, atol=1e-4)
    before = AffineMap(
        np.eye(4),
        domain_grid_shape=static.shape,
        domain_grid2world=GRID,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=GRID,
    ).transform(moving)
    assert ((warped - static) ** 2).mean() < ((before - static) ** 2).mean() / 3
    arguments = ["--transform_type", "diffeomorphic", "--out_dir", "applied"]
    assert command(APPLY, *pair, f"res/{FIELD}", *arguments)[0] == 0
    (applied,) = Path("applied").glob("*.nii.gz")
    assert_allclose(nib.load(applied).get_fdata(), warped, atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--spacing", "40"], "--spacing must be an integer from 2 to 32"),
        (["--spacing", "25"], "give a smaller spacing"),
        (["--sampling", "gms"], "needs --sampling_prop"),
        (["--sampling_prop", "0.1"], "a percentage of the voxels from 1 to 100"),
        (["--level_iters", "3", "--factors", "2"], "--factors must end in 1"),
    ],
)
def test_mistakes_are_told_in_a_line(command, pair, flags, words):
    status, _, err = command(ALIGN, *pair, *flags, "--out_dir", "res")
    assert status == 1 and words in err and err.count("\n") == 1
    assert not Path("res").exists()


@pytest.mark.parametrize("sampling", ["urs", "gms"])
def test_three_sites(tmp_path, sampling):
    """Over TLS: both owners have the same map, and each its own image only."""
    static, moving = bumps(3)
    parameters = {
        "level_iters": [3, 2],
        "spacing": 4,
        "sampling": sampling,
        "sampling_proportion": 0.5,
        "ret_metric": True,
    }
    with Launcher():
        sites = Sites(
            tmp_path / "sites",
            "freeform",
            (static, moving, GRID, GRID),
            parameters=parameters,
        )
        sites.run()
    fields, receipts = [], {}
    for site in ROLES:
        out = sites.folder / f"out_{site}"
        receipts[site] = json.loads((out / "receipt.json").read_text())
        if site != "helper":
            fields.append(nib.load(out / FIELD).get_fdata())
    assert_allclose(*fields, atol=1e-6)
    assert np.abs(fields[0]).max() > 0.5
    assert not (sites.folder / "out_static" / "warped_moved.nii.gz").exists()
    assert "metric" not in receipts["static"]
    learned = {e["label"] for e in receipts["moving"]["learned"]["static owner"]}
    hidden = {"edge_samples"} if sampling == "gms" else set()
    assert learned == {"control_points", "prealign", "mismatch"} | hidden
    # It was 0.0002, with a deviation of a tenth, in ten runs; 0.015 to begin with.
    assert 0 < receipts["moving"]["metric"]["value"] < 0.001
