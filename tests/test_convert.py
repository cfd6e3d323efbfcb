"""Transforms between programs by commands, and receipts that stand for grids."""

import json
import sys

import nibabel as nib
from nibabel.affines import from_matvec
import numpy as np
from numpy.testing import assert_allclose
import pytest
from test_transformfiles import (
    MATRIX,
    MOVING,
    STATIC,
    affine_map,
    assert_same_image,
    deformation,
    noise,
    resampled,
)

from dipy_ppir.align import (
    affine_registration,
    read_mapping,
    read_transform,
    write_mapping,
    write_transform,
)
from dipy_ppir.align.facts import grid_facts
from dipy_ppir.workflows import cli
from dipy_ppir.workflows.align import SecureImageRegistrationFlow
from dipy_ppir.workflows.points import SecurePointRegistrationFlow

CONVERT, APPLY = "dipy_ppir_convert_transform", "dipy_ppir_apply_transform"
GRIDS = ["--static", "static.nii.gz", "--moving", "moving.nii.gz"]
FIELD = "displacement_field.nii.gz"
SHORT = {"pipeline": ["translation"], "level_iters": [2], "factors": [1], "sigmas": [0]}


@pytest.fixture(scope="module")
def receipt():
    """Of a short registration of other images, with these images' grids."""
    tiny = noise(STATIC)[:8, :8, :8]
    grid = {"static_affine": np.eye(4), "moving_affine": np.eye(4)}
    *_, found = affine_registration(tiny, tiny, ret_receipt=True, **grid, **SHORT)
    place = {"static_grid2world": STATIC.grid2world}
    place |= {"moving_grid2world": MOVING.grid2world}
    return {**found, **grid_facts({"static": STATIC, "moving": MOVING, **place})}


@pytest.fixture
def folder(tmp_path, monkeypatch, receipt):
    """Images, transforms as DIPY writes them and a receipt, in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    for name, grid, seed in (("static", STATIC, 1), ("moving", MOVING, 0)):
        nib.save(nib.Nifti1Image(noise(grid, seed), grid.grid2world), f"{name}.nii.gz")
    np.savetxt("affine.txt", MATRIX)
    write_mapping(deformation(), FIELD)
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process; returns its status and what it said."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            status = cli.run(name)
        except SystemExit as exc:
            status = exc.code
        return status, *capsys.readouterr()

    return run


def load(path):
    return np.asarray(nib.load(path).dataobj)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("a.tfm", []),
        ("a.h5", []),
        ("a.txt", ["--to_format", "itk"]),
        ("a.mat", ["--to", "ITK"]),
        ("a.x5", GRIDS),
        ("a.mat", ["--to", "fsl", *GRIDS]),
        ("a.lta", GRIDS),
        ("a.lta", ["--static", "receipt.json", "--moving", "receipt.json"]),
    ],
)
def test_matrices_there_and_back(folder, command, name, flags):
    assert command(CONVERT, "affine.txt", name, *flags)[0] == 0
    back = [name, "again.txt", "--to_format", "dipy", *GRIDS]
    assert command(CONVERT, *back)[0] == 0
    assert_allclose(np.loadtxt("again.txt"), MATRIX, atol=1e-4)


def test_maps_there_and_back(folder, command):
    """Also those of which one has one image only."""
    grids = ["--static", "receipt.json", "--moving", "moving.nii.gz"]
    assert command(CONVERT, FIELD, "map.h5", *grids)[0] == 0
    back = ["map.h5", "again.nii.gz", "--to_format", "dipy", *grids]
    assert command(CONVERT, *back)[0] == 0
    images = "moving.nii.gz", "static.nii.gz"
    before, after = (read_mapping(f, *images) for f in (FIELD, "again.nii.gz"))
    voxels = load("moving.nii.gz")
    assert_allclose(after.transform(voxels), before.transform(voxels), atol=2e-3)


@pytest.mark.parametrize("given", ["affine.txt", FIELD])
def test_inverse(folder, command, given):
    """Of ITK's file it is as of `write_transform`."""
    assert command(CONVERT, given, "inv.h5", *GRIDS, "--inverse")[0] == 0
    mapping = affine_map(MATRIX)
    if given == FIELD:
        mapping = read_mapping(FIELD, MOVING, STATIC)
    voxels = load("static.nii.gz")
    inside = np.zeros(STATIC.shape)
    inside[2:-2, 2:-2, 2:-2] = 1
    inside = resampled(inside, STATIC, MOVING, folder / "inv.h5") > 0.999
    theirs = resampled(voxels, STATIC, MOVING, folder / "inv.h5")
    ours = np.asarray(mapping.transform_inverse(voxels))
    assert inside.mean() > 0.2
    assert_allclose(ours[inside], theirs[inside], atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["affine.txt", "a.txt"], "does not say which format"),
        (["affine.txt", "a.txt"], "--to_format"),
        (["affine.txt", "a.tfm", "--to_format", "spm"], "choose one of dipy"),
        (["affine.txt", "a.tfm", "--from_format", "spm"], "--from_format spm"),
        (["nothing.txt", "a.tfm"], "does not exist"),
        ([FIELD, "a.tfm", *GRIDS], "displacement field"),
        ([FIELD, "a.h5"], "the static image is needed"),
        ([FIELD, "a.lta", *GRIDS], "holds a matrix"),
        (["affine.txt", "a.lta"], "the static image is needed"),
        (["affine.txt", "affine.txt", "--to", "itk"], "is also an input"),
        (["receipt.json", "a.tfm"], "4 x 4"),
        (["affine.txt", "a.lta", "--static", "affine.txt"], "as NIfTI"),
        ([".", "a.tfm"], "is a folder"),
        ([FIELD, "a.tfm", *GRIDS], "error: a.tfm: a"),
    ],
)
def test_mistakes(folder, command, arguments, words):
    before = sorted(folder.iterdir())
    status, out, err = command(CONVERT, *arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert words in err and "Error" not in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["a.tfm", "a.h5", "a.mat", "a.x5", "a.lta"])
def test_apply_reads_matrices_of_others(folder, command, name):
    write_transform(
        name,
        MATRIX,
        fmt=None if name != "a.mat" else "itk",
        static=STATIC,
        moving=MOVING,
    )
    images = "static.nii.gz", "moving.nii.gz"
    assert command(APPLY, *images, name, "--out_file", "t.nii.gz")[0] == 0
    expected = affine_map(MATRIX).transform(load("moving.nii.gz"))
    assert_allclose(load("t.nii.gz"), expected, atol=1e-4)


def test_rounding_errors_in_the_last_row(folder, command):
    """Of a product of matrices; DIPY refuses them."""
    rounded = np.array(MATRIX, dtype=float)
    rounded[3, 0] = 1e-9
    np.savetxt("rounded.txt", rounded)
    images = "static.nii.gz", "moving.nii.gz"
    assert command(APPLY, *images, "rounded.txt", "--out_file", "t.nii.gz")[0] == 0
    expected = affine_map(MATRIX).transform(load("moving.nii.gz"))
    assert_allclose(load("t.nii.gz"), expected, atol=1e-5)
    assert_allclose(read_transform("rounded.txt"), MATRIX, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["flirt.mat", "flirt.MAT"])
def test_matrices_of_fsl_are_to_be_converted(folder, command, name):
    """They are not between world coordinates, which their numbers do not show."""
    write_transform(name, MATRIX, fmt="fsl", static=STATIC, moving=MOVING)
    images = "static.nii.gz", "moving.nii.gz"
    syn = ["--prealign_file", name, "--out_dir", "out"]
    for words in (
        [APPLY, *images, name],
        ["dipy_ppir_align_syn", *images, *syn],
        ["dipy_ppir_align_freeform", *images, *syn],
    ):
        status, _, err = command(*words)
        assert (status, err.count("\n")) == (1, 1)
        assert f"{CONVERT} {name} affine.txt --from_format fsl --to_format dipy" in err
    flags = ["--from_format", "fsl", "--to_format", "dipy", *GRIDS]
    assert command(CONVERT, name, "again.txt", *flags)[0] == 0
    assert command(APPLY, *images, "again.txt", "--out_file", "t.nii.gz")[0] == 0
    expected = affine_map(MATRIX).transform(load("moving.nii.gz"))
    assert_allclose(load("t.nii.gz"), expected, atol=1e-3)
    status, _, err = command(
        "dipy_ppir_align_syn", *images, "--prealign_file", ".", *syn[2:]
    )
    assert status == 1 and "is a folder" in err


def test_apply_reads_maps_of_others(folder, command):
    mapping = deformation()
    write_transform("w.h5", mapping)
    images = "static.nii.gz", "moving.nii.gz"
    assert command(APPLY, *images, "w.h5", "--out_file", "t.nii.gz")[0] == 0
    expected = mapping.transform(load("moving.nii.gz"))
    assert_allclose(load("t.nii.gz"), expected, atol=2e-3)


@pytest.mark.parametrize("kind", ["affine", "diffeomorphic"])
def test_a_receipt_stands_for_the_grid_of_the_other_image(folder, command, kind):
    """Both ways: each owner has one image."""
    transform, mapping = "affine.txt", affine_map(MATRIX)
    if kind == "diffeomorphic":
        transform, mapping = FIELD, read_mapping(FIELD, MOVING, STATIC)
    files = "static.nii.gz", "receipt.json", transform
    flags = ["--transform_type", kind, "--out_file"]
    assert command(APPLY, *files, *flags, "i.nii.gz", "--inverse")[0] == 0
    expected = mapping.transform_inverse(load("static.nii.gz"))
    assert_allclose(load("i.nii.gz"), expected, atol=1e-5)
    assert_allclose(nib.load("i.nii.gz").affine, MOVING.grid2world, atol=1e-5)
    files = "receipt.json", "moving.nii.gz", transform
    assert command(APPLY, *files, *flags, "t.nii.gz")[0] == 0
    expected = mapping.transform(load("moving.nii.gz"))
    assert_allclose(load("t.nii.gz"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop("moving_grid2world"), "does not say where"),
        (lambda r: r.update(moving_grid2world=[["x"]]), "does not say where"),
        (lambda r: r.update(moving_grid2world=np.zeros((4, 4)).tolist()), "not say"),
        (lambda r: r.update(images=None), "does not say where"),
        (lambda r: r.pop("learned"), "no receipt"),
    ],
)
def test_receipts_that_say_nothing_of_grids(folder, command, receipt, change, words):
    changed = dict(receipt)
    change(changed)
    (folder / "other.json").write_text(json.dumps(changed))
    arguments = ["static.nii.gz", "other.json", "affine.txt", "--inverse"]
    status, _, err = command(APPLY, *arguments)
    assert status == 1 and words in err and "Error" not in err


def test_a_receipt_is_no_image(folder, command):
    status, _, err = command(APPLY, "static.nii.gz", "receipt.json", "affine.txt")
    assert status == 1 and "give the moving image itself" in err


def test_an_affine_registration_writes_all_of_it(folder):
    """ITK's file, and the static image on the moving image's grid."""
    for name in ("affine.txt", "receipt.json"):
        (folder / name).unlink()
    flow = SecureImageRegistrationFlow()
    files = "static.nii.gz", "moving.nii.gz"
    few = {"level_iters": [2], "factors": [1], "sigmas": [0], "transform": "rigid"}
    flow.run(*files, **few, inv_static=True, out_itk="a.tfm", no_pictures=True)
    matrix = np.loadtxt("affine.txt")
    mapping = affine_map(matrix)
    expected = mapping.transform_inverse(load("static.nii.gz"))
    assert_allclose(load("inv_static.nii.gz"), expected, atol=1e-5)
    assert_allclose(nib.load("inv_static.nii.gz").affine, MOVING.grid2world, atol=1e-5)
    assert_same_image(folder / "a.tfm", mapping.transform, MOVING, STATIC)


def test_points_in_a_plane_for_itk(tmp_path):
    rng = np.random.default_rng(0)
    static = rng.normal(0, 20, (6, 2))
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    np.savetxt(tmp_path / "static.txt", static)
    np.savetxt(tmp_path / "moving.txt", static @ turn.T + (3, -4))
    files = [str(tmp_path / f"{name}.txt") for name in ("static", "moving")]
    SecurePointRegistrationFlow().run(*files, out_dir=str(tmp_path), out_itk="a.tfm")
    matrix = np.loadtxt(tmp_path / "affine.txt")
    assert_allclose(matrix, from_matvec(turn, (3, -4)), atol=0.1)
    assert_allclose(read_transform(tmp_path / "a.tfm"), matrix, atol=1e-12)
