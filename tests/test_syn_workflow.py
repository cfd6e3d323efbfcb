"""The commands for smooth deformations: files, agreement, a line for each mistake."""

import json
import logging
import os
from pathlib import Path
import shutil
import signal
import sys
import warnings

from commands import HALT, changed, finish, interrupted, script, started
from dipy.align.imaffine import AffineMap
from dipy.align.imwarp import DiffeomorphicMap
import nibabel as nib
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest
from scipy import ndimage

from dipy_ppir.align import mappings, syn_registration
from dipy_ppir.mpc import local
from dipy_ppir.mpc.carried import CarriedCorrelation
from dipy_ppir.mpc.ledger import HELPER, ROLES, STATIC
from dipy_ppir.workflows import cli, figures, inputs, registration, remote
from dipy_ppir.workflows.syn import SecureSynRegistrationFlow
from dipy_ppir.workflows.transform import ApplyTransformFlow

ALIGN, APPLY = "dipy_ppir_align_syn", "dipy_ppir_apply_transform"
FAST = "--level_iters 3 2".split()
NO_PICTURES = ["--no_pictures"]
FIELD = "displacement_field.nii.gz"
PICTURES = {"checkerboard.png", "contours.png", "warped_grid.png", "jacobian.png"}
SHOWN = PICTURES | {"report.html"}
DIFFEOMORPHIC = ["--transform_type", "diffeomorphic"]
STATIC_SHAPE, MOVING_SHAPE = (24, 22, 20), (20, 24, 21)
STATIC_GRID = np.diag([2.0, 2.0, 2.0, 1.0])
STATIC_GRID[:3, 3] = -23, -21, -19
# Turned by 0.15 rad, with other voxels, and the first axis towards the left.
MOVING_GRID = np.array(
    [
        [-2.0764, -0.2839, 0, 19],
        [-0.3138, 1.8787, 0, -24],
        [0, 0, 2.2, -21],
        [0, 0, 0, 1],
    ]
)
#: From static to moving world coordinates, mm; with FAR the scene is 30 mm away.
PREALIGN = np.array(
    [[1, 0.06, 0, 2], [-0.06, 1, 0.02, -1], [0, 0, 1.02, 1], [0, 0, 0, 1]]
)
FAR = PREALIGN.copy()
FAR[0, 3] += 30


def scene(shape, grid2world):
    """Three balls around the origin of the world, as a grid sees them."""
    points = np.moveaxis(np.indices(shape, dtype=float), 0, -1)
    points = points @ grid2world[:3, :3].T + grid2world[:3, 3]
    image = np.zeros(shape)
    for centre, width, height in (
        ((0, 0, 0), 9, 1.0),
        ((8, -6, 4), 5, 0.6),
        ((-6, 7, -5), 4, -0.4),
    ):
        apart = ((points - np.array(centre)) ** 2).sum(axis=-1)
        image += height * np.exp(-apart / (2 * width**2))
    return np.maximum(image - 0.05, 0).astype(np.float32)


def warped_scene(grid2world=MOVING_GRID):
    """The scene sheared and stretched."""
    change = np.array(
        [[1.1, 0.12, 0, 1.5], [-0.05, 0.95, 0, -1], [0, 0, 1, 0.8], [0, 0, 0, 1]]
    )
    return scene(MOVING_SHAPE, change @ grid2world)


def save(path, data, grid2world=STATIC_GRID):
    nib.save(nib.Nifti1Image(data, grid2world, dtype=data.dtype), path)
    return str(path)


def load(path):
    return np.asarray(nib.load(path).dataobj)


def points_of(shape, grid2world):
    points = np.moveaxis(np.indices(shape, dtype=float), 0, -1)
    return points @ grid2world[:3, :3].T + grid2world[:3, 3]


def look_up(image, grid2world, points):
    """Values of an image at points of the world, linearly; 0 outside."""
    world2grid = np.linalg.inv(grid2world)
    voxels = points @ world2grid[:3, :3].T + world2grid[:3, 3]
    return ndimage.map_coordinates(
        image.astype(float), np.moveaxis(voxels, -1, 0), order=1, mode="grid-constant"
    )


def displacements(path, points, direction):
    """From a field's file: 1 is the way from static to moving space, 0 the way back.

    The file says where its grid lies; it need not be the static image's.
    """
    image = nib.load(path)
    field, grid2world = np.asarray(image.dataobj), np.linalg.inv(image.affine)
    return np.stack(
        [look_up(field[..., i, direction], grid2world, points) for i in range(3)],
        axis=-1,
    )


def steepness(image, grid2world):
    """Largest change of intensity between neighbours, per mm."""
    zooms = np.linalg.norm(grid2world[:3, :3], axis=0)
    slopes = [
        np.abs(np.diff(image, axis=a)).max() / zooms[a] for a in range(image.ndim)
    ]
    return np.sqrt(np.sum(np.square(slopes)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    static = save(folder / "static.nii.gz", scene(STATIC_SHAPE, STATIC_GRID))
    moving = save(folder / "moving.nii.gz", warped_scene(), MOVING_GRID)
    return static, moving


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    """Finished registrations: by name (folder, static, moving, receipt).

    In "plain" there is no prealign file; in "turned" and "far" there is, and the
    moving image's space is another than the static image's.
    """
    done = {}
    for name, matrix in (("plain", None), ("turned", PREALIGN), ("far", FAR)):
        folder = tmp_path_factory.mktemp(name)
        static, moving = pair
        prealign = ""
        if matrix is not None:
            grid2world = matrix @ MOVING_GRID
            moving = save(folder / "m.nii.gz", warped_scene(), grid2world)
            prealign = str(folder / "prealign.txt")
            np.savetxt(prealign, matrix)
        flow = SecureSynRegistrationFlow()
        flow.run(
            static,
            moving,
            prealign_file=prealign,
            inv_static=True,
            level_iters=(3, 2),
            no_pictures=name != "plain",
            out_dir=str(folder / "res"),
        )
        done[name] = folder / "res", static, moving, flow.receipts
    return done


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs a command in this process, in an empty folder; returns its result."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    own = logging.getLogger("dipy_ppir")
    on_signal = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        try:
            status = cli.run(name)
        except SystemExit as exc:
            status = exc.code
        finally:
            for number, handler in on_signal.items():
                signal.signal(number, handler)
        return status, *capsys.readouterr()

    yield run
    logging.raiseExceptions = raising
    root.handlers[:] = handlers
    root.setLevel(level)
    own.setLevel(logging.NOTSET)


@pytest.fixture
def no_parties(monkeypatch):
    """Fail when a registration gets as far as asking for the other processes."""

    def refuse(*args, **kwargs):
        raise AssertionError("processes would have been started")

    monkeypatch.setattr(local, "run_locally", refuse)


def assert_refused(result, *words, command=ALIGN, folder="res"):
    """One line with `words`, a status that says so, and nothing written."""
    status, out, err = result
    assert status == 1, err
    assert err.count("\n") == 1 and "Traceback" not in out + err
    assert err.startswith(f"{command}: error: ")
    for word in words:
        assert word in err, err
    assert "--debug" not in err, "it is the user's mistake, not the program's"
    assert not Path(folder).exists()


# -- a good run ------------------------------------------------------------


def test_writes_its_files_and_no_others(command, pair):
    status, out, err = command(
        ALIGN, *pair, *FAST, "--inv_static", "--out_dir", "res", "--receipt", "r.json"
    )
    assert (status, err) == (0, "")
    names = {"warped_moved.nii.gz", "inc_static.nii.gz", FIELD, "r.json"}
    assert {p.name for p in Path("res").iterdir()} == names | SHOWN
    warped, field = (nib.load(Path("res", n)) for n in ("warped_moved.nii.gz", FIELD))
    inverse = nib.load("res/inc_static.nii.gz")
    assert warped.shape == STATIC_SHAPE and inverse.shape == MOVING_SHAPE
    assert_array_equal(warped.affine, STATIC_GRID)
    assert_allclose(inverse.affine, MOVING_GRID, atol=1e-5)
    assert field.shape == (*STATIC_SHAPE, 3, 2)
    assert field.get_data_dtype() == np.float32
    # As DIPY has it.
    assert_allclose(field.affine, np.linalg.inv(STATIC_GRID), atol=1e-6)
    assert np.abs(field.get_fdata()).max() > 1
    # What is said about it: every file, and no control characters.
    for name in names | SHOWN:
        assert f"Saved {Path('res', name)}\n" in out
    assert "\x1b" not in out and "\r" not in out
    assert "What each party learned" in out and "Quality of the map" in out


def test_writes_less_if_told(command, pair):
    assert command(ALIGN, *pair, *FAST, *NO_PICTURES)[0] == 0
    names = {"warped_moved.nii.gz", FIELD, "receipt.json"}
    assert {p.name for p in Path().iterdir()} == names
    for name in names:
        assert os.stat(name).st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_progress_lines(command, pair):
    """How well the images match is not known where nothing is opened on the way."""
    _, out, _ = command(ALIGN, *pair, *FAST, *NO_PICTURES, "--out_dir", "a")
    lines = [line for line in out.splitlines() if "done" in line]
    for level, (line, count) in enumerate(zip(lines, (3, 2), strict=True), 1):
        where, sent = line.rsplit(", ", 1)
        assert where == f"INFO: deformation, level {level} of 2 done: iteration {count}"
        assert sent.endswith("B sent")
    update = [*NO_PICTURES, "--reveal", "update"]
    _, out, _ = command(ALIGN, *pair, *FAST, *update, "--out_dir", "b")
    lines = [line for line in out.splitlines() if "done" in line]
    values = []
    for level, (line, count) in enumerate(zip(lines, (3, 2), strict=True), 1):
        where, value, sent = line.rsplit(", ", 2)
        assert where == f"INFO: deformation, level {level} of 2 done: iteration {count}"
        assert value.startswith("local correlation ") and sent.endswith("B sent")
        values.append(float(value.split()[-1]))
    assert all(0.5 < v <= 1 for v in values)
    quiet = ["--out_dir", "c", "--log_level", "warning"]
    assert "INFO" not in command(ALIGN, *pair, *FAST, *NO_PICTURES, *quiet)[1]


def test_the_result_is_dipys(pair, tmp_path):
    """With "force" but for rounding; "update" interpolates the steps besides."""
    files, warped = pair, {}
    static, moving = map(load, files)
    # DIPY announces what it does on a logger of its own.
    logging.getLogger("dipy").setLevel(logging.WARNING)
    from dipy.align import syn_registration as clear

    expected, _ = clear(
        moving,
        static,
        moving_affine=MOVING_GRID,
        static_affine=STATIC_GRID,
        level_iters=[3, 2],
    )
    before = AffineMap(
        np.eye(4),
        domain_grid_shape=static.shape,
        domain_grid2world=STATIC_GRID,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=MOVING_GRID,
    ).transform(moving)
    moved = np.abs(expected - before).mean()
    for reveal in ("update", "force"):
        SecureSynRegistrationFlow().run(
            *files,
            level_iters=(3, 2),
            reveal=reveal,
            no_pictures=True,
            out_dir=str(tmp_path / reveal),
        )
        warped[reveal] = load(tmp_path / reveal / "warped_moved.nii.gz")
    assert np.abs(warped["update"] - expected).mean() < moved / 10
    assert_allclose(warped["force"], expected, atol=1e-3)


def test_volumes_of_a_series(command, pair, tmp_path):
    static, moving = map(load, pair)
    series = save(
        tmp_path / "series.nii.gz",
        np.stack([moving * 0, moving * 0.5, moving * 1.5], axis=-1),
        MOVING_GRID,
    )
    args = [*FAST, *NO_PICTURES, "--moving_vol_idx", "1-2", "--reveal", "force"]
    assert command(ALIGN, pair[0], series, *args)[0] == 0
    # The mean is the image itself; what is opened is rounded afresh in every run.
    expected, _ = syn_registration(
        moving,
        static,
        moving_affine=MOVING_GRID,
        static_affine=STATIC_GRID,
        level_iters=[3, 2],
        reveal="force",
    )
    assert_allclose(load("warped_moved.nii.gz"), expected, atol=1e-3)


# -- the field, and what applies it ----------------------------------------


def _applied(command, run, *flags):
    folder, static, moving, _ = run
    result = command(APPLY, static, moving, folder / FIELD, *DIFFEOMORPHIC, *flags)
    assert result[0] == 0, result[2]
    return nib.load("transformed.nii.gz")


def test_apply_transform_repeats_the_warping(command, runs):
    """Without prealign the two do the same with the same numbers."""
    folder = runs["plain"][0]
    image = _applied(command, runs["plain"])
    assert_array_equal(image.affine, STATIC_GRID)
    assert_allclose(image.get_fdata(), load(folder / "warped_moved.nii.gz"), atol=1e-6)
    image = _applied(command, runs["plain"], "--inverse", "--force")
    assert_allclose(image.affine, MOVING_GRID, atol=1e-5)
    assert_allclose(image.get_fdata(), load(folder / "inc_static.nii.gz"), atol=1e-6)


@pytest.mark.parametrize("name", ["turned", "far"])
def test_the_field_contains_the_prealign_matrix(command, runs, name):
    """The field is then rounded to float32 once more: by 2e-5 mm at 100 mm."""
    folder, _, moving, _ = runs[name]
    grid2world = nib.load(moving).affine
    assert_allclose(
        _applied(command, runs[name]).get_fdata(),
        load(folder / "warped_moved.nii.gz"),
        atol=2e-5 * steepness(load(moving), grid2world) + 1e-6,
    )


@pytest.mark.parametrize("name", ["turned", "far"])
def test_the_inverse_contains_the_prealign_matrix(command, runs, name):
    """It is interpolated twice, where the map itself is interpolated once.

    A linear interpolation between samples errs by an eighth of the second
    difference along each axis; three of them are involved.
    """
    folder, static, _, _ = runs[name]
    field = load(folder / FIELD)[..., 0].astype(float)
    second = sum(
        np.abs(np.diff(field[3:-3, 3:-3, 3:-3], n=2, axis=a)).max() for a in range(3)
    )
    error = 3 / 8 * second * np.sqrt(3) * steepness(load(static), STATIC_GRID)
    error = min(error, 0.05)
    image = _applied(command, runs[name], "--inverse").get_fdata()
    expected = load(folder / "inc_static.nii.gz")
    assert expected.max() > 0.8
    assert_allclose(image, expected, atol=error)
    # Such places are few.
    assert np.abs(image - expected).mean() < 0.01 * expected.mean()


@pytest.mark.parametrize("name", ["plain", "turned", "far"])
def test_the_field_by_hand(runs, name):
    """Read without any class: displacements in mm, first back and then forth."""
    folder, static, moving, _ = runs[name]
    grid2world = nib.load(moving).affine
    points = points_of(STATIC_SHAPE, STATIC_GRID)
    points = points + displacements(folder / FIELD, points, 1)
    warped = look_up(load(moving), grid2world, points)
    expected = load(folder / "warped_moved.nii.gz")
    inside = ndimage.binary_erosion(expected > 0)
    assert inside.mean() > 0.2
    # float32 there and float64 here.
    assert_allclose(warped[inside], expected[inside], atol=1e-4)


def test_back_and_forth(runs):
    folder = runs["plain"][0]
    points = points_of(STATIC_SHAPE, STATIC_GRID)
    there = points + displacements(folder / FIELD, points, 1)
    back = there + displacements(folder / FIELD, there, 0)
    apart = np.linalg.norm(back - points, axis=-1)[4:-4, 4:-4, 4:-4]
    moved = np.linalg.norm(there - points, axis=-1)[4:-4, 4:-4, 4:-4]
    assert np.median(moved) > 0.5
    # Interpolated between voxels of 2 mm, and inverted to inv_tol; in 60 runs 0.050,
    # 0.187 and 0.27, with deviations of 0.003, 0.021 and 0.03.
    assert apart.mean() < 0.08 and np.quantile(apart, 0.99) < 0.4
    assert apart.max() < 1


@pytest.fixture
def dipys_flow():
    """DIPY's own workflow, whose module warns of optional packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dipy.workflows.align import ApplyTransformFlow as TheirFlow
    return TheirFlow


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("kind", ["affine", "diffeomorphic"])
def test_dipys_workflow_gives_the_same(
    command, pair, tmp_path, dipys_flow, kind, interpolation
):
    """On one grid only: DIPY's flow mixes up the two grids of a deformation.

    It gives a map that it then inverts the static grid as the domain, so that the
    result has the shape of the moving image and the affine of the static one.
    """
    change = np.array(
        [[1.05, 0.1, 0, 1], [-0.05, 0.95, 0, -1], [0, 0, 1, 1], [0, 0, 0, 1]]
    )
    moving = save(tmp_path / "m.nii", scene(STATIC_SHAPE, change @ STATIC_GRID))
    if kind == "affine":
        transform = "change.txt"
        np.savetxt(tmp_path / transform, change)
    else:
        transform = FIELD
        assert command(ALIGN, pair[0], moving, *FAST, *NO_PICTURES)[0] == 0
    flags = ["--transform_type", kind, "--interpolation", interpolation]
    assert command(APPLY, pair[0], moving, transform, *flags)[0] == 0
    dipys_flow().run(
        pair[0],
        moving,
        str(tmp_path / transform),
        transform_type=kind,
        interpolation=interpolation,
        out_dir=str(tmp_path / "theirs"),
    )
    own, theirs = (
        nib.load(tmp_path / folder / "transformed.nii.gz") for folder in (".", "theirs")
    )
    assert_array_equal(own.affine, theirs.affine)
    assert np.ptp(own.get_fdata()) > 0.5
    assert_allclose(own.get_fdata(), theirs.get_fdata(), atol=1e-6)


def test_an_affine_matrix(command, pair):
    static, moving = map(load, pair)
    np.savetxt("a.txt", PREALIGN)
    mapping = AffineMap(
        PREALIGN,
        domain_grid_shape=static.shape,
        domain_grid2world=STATIC_GRID,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=nib.load(pair[1]).affine,
    )
    assert command(APPLY, *pair, "a.txt", "--out_dir", "sub")[0] == 0
    result = load("sub/transformed.nii.gz")
    assert_allclose(result, mapping.transform(moving.astype(float)), atol=1e-9)
    assert command(APPLY, *pair, "a.txt", "--inverse", "--out_file", "i.nii")[0] == 0
    assert_allclose(load("i.nii"), mapping.transform_inverse(static.astype(float)))
    assert nib.load("i.nii").shape == MOVING_SHAPE
    assert_allclose(nib.load("i.nii").affine, MOVING_GRID, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_a_series_volume_by_volume(command, runs, tmp_path, interpolation):
    folder, static, moving, _ = runs["plain"]
    image = load(moving)
    series = np.stack([image, 2 - image, image**2], axis=-1)
    save(tmp_path / "series.nii", series, MOVING_GRID)
    flags = [folder / FIELD, *DIFFEOMORPHIC, "--interpolation", interpolation]
    assert command(APPLY, static, "series.nii", *flags, "--out_file", "s.nii")[0] == 0
    result = load("s.nii")
    assert result.shape == (*STATIC_SHAPE, 3)
    for i in range(3):
        save(tmp_path / "one.nii", series[..., i], MOVING_GRID)
        assert command(APPLY, static, "one.nii", *flags, "--force")[0] == 0
        assert_array_equal(load("transformed.nii.gz"), result[..., i])
    # Of the series as the static image only the grid counts.
    args = "series.nii", static, folder / FIELD, *DIFFEOMORPHIC
    assert command(APPLY, *args, "--out_file", "x.nii")[0] == 0
    assert nib.load("x.nii").shape == MOVING_SHAPE


DTYPES = "uint8 int8 int16 uint16 int32 uint32 int64 float32 float64".split()


@pytest.mark.parametrize("kind", ["affine", "diffeomorphic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_stay_labels(command, runs, tmp_path, kind, dtype):
    folder, static, moving, _ = runs["plain"]
    image = load(moving)
    labels = (3 * (image > 0.3) + 97 * (image > 0.7)).astype(dtype)
    save(tmp_path / "labels.nii.gz", labels, MOVING_GRID)
    np.savetxt("a.txt", PREALIGN)
    transform = "a.txt" if kind == "affine" else folder / FIELD
    flags = ["--transform_type", kind, "--interpolation", "nearest"]
    status, _, err = command(APPLY, static, "labels.nii.gz", transform, *flags)
    assert (status, err) == (0, "")
    result = nib.load("transformed.nii.gz")
    assert result.get_data_dtype() == np.dtype(dtype)
    assert set(np.unique(load("transformed.nii.gz"))) == {0, 3, 100}


# -- the receipt -----------------------------------------------------------


def learned_by(receipt):
    """What was opened to whom, without the numbers."""
    return {
        who: {e["label"] for e in entries}
        for who, entries in receipt["learned"].items()
    }


def test_receipt(runs, pair):
    folder, _, _, (receipt,) = runs["plain"]
    assert json.loads((folder / "receipt.json").read_text()) == receipt
    assert (receipt["m"], receipt["t"]) == (3, 1)
    assert learned_by(receipt) == {
        "moving owner": {"level_moving", "map", "mismatch", "whole"},
        "static owner": {"level_static", "map", "mismatch", "prealign", "whole"},
        "helper": {"whole"},
    }
    parameters = receipt["parameters"]
    assert parameters["level_iters"] == [3, 2]
    metric = parameters["metric"]
    assert (metric["reveal"], metric["opens"]) == ("map", "levels")
    assert (metric["map_spacing"], metric["map_precision"]) == (3, 0.25)
    assert parameters["ss_sigma_factor"] == 0.4
    for name in pair:
        assert Path(name).name not in json.dumps(receipt)


def test_receipt_of_what_opens_every_iteration(pair, tmp_path):
    flow = SecureSynRegistrationFlow()
    flow.run(
        *pair,
        level_iters=(3, 2),
        reveal="update",
        no_pictures=True,
        out_dir=str(tmp_path),
    )
    (receipt,) = flow.receipts
    assert learned_by(receipt) == {
        "moving owner": {"update_moving", "correlation", "static_to_ref"},
        "static owner": {"update_static", "correlation", "moving_to_ref", "prealign"},
        "helper": set(),
    }
    assert receipt["parameters"]["metric"]["reveal"] == "update"
    assert receipt["parameters"]["ss_sigma_factor"] == 0.2


@pytest.mark.parametrize("name", ["ssd", "mind"])
def test_other_metrics(pair, tmp_path, name):
    flow = SecureSynRegistrationFlow()
    flow.run(
        *pair,
        level_iters=(3, 2),
        metric=name,
        no_pictures=True,
        out_dir=str(tmp_path),
    )
    (receipt,) = flow.receipts
    assert learned_by(receipt)["helper"] == {"whole"}
    metric = receipt["parameters"]["metric"]
    assert (metric["metric"], metric["radius"]) == (name.upper(), None)
    static, moved = load(pair[0]), load(tmp_path / "warped_moved.nii.gz")
    points = points_of(STATIC_SHAPE, STATIC_GRID)
    before = look_up(load(pair[1]), MOVING_GRID, points)
    assert np.abs(moved - static).mean() < 0.95 * np.abs(before - static).mean()


def _determinants(field, grid2world):
    """Of the map in voxel coordinates, which is the same: by numpy's det."""
    world2grid = np.linalg.inv(grid2world)[:3, :3]
    position = np.moveaxis(np.indices(field.shape[:3], dtype=float), 0, -1)
    position = position + field @ world2grid.T
    jacobian = np.stack(np.gradient(position, axis=(0, 1, 2)), axis=-1)
    return np.linalg.det(jacobian)


def _assert_quality(quality, field, scale=1.0):
    determinant = _determinants(field.astype(float), STATIC_GRID) / scale
    folded = quality["non_positive_jacobian"]
    # A determinant within rounding of zero may fall on either side.
    least, most = (np.count_nonzero(determinant <= x) for x in (-1e-5, 1e-5))
    assert least <= folded <= most
    assert quality["voxels"] == determinant.size
    assert quality["percent"] == pytest.approx(100 * folded / determinant.size)
    assert quality["smallest_jacobian"] == pytest.approx(determinant.min(), abs=1e-4)
    assert quality["largest_jacobian"] == pytest.approx(determinant.max(), abs=1e-4)
    return folded


@pytest.mark.parametrize("name", ["plain", "turned"])
def test_quality_of_the_map(runs, name):
    folder, _, _, (receipt,) = runs[name]
    # It speaks of the deformation, without the prealign matrix.
    scale = np.linalg.det(PREALIGN) if name == "turned" else 1.0
    field = displacements(folder / FIELD, points_of(STATIC_SHAPE, STATIC_GRID), 1)
    assert _assert_quality(receipt["quality"], field, scale) == 0
    if name == "plain":
        lengths = np.linalg.norm(field, axis=-1)
        assert receipt["displacement"] == pytest.approx(
            {
                "mean": lengths.mean(),
                "percentile_95": np.percentile(lengths, 95),
                "largest": lengths.max(),
            },
            rel=1e-4,
        )
    kept = {"static image", "moving image"}
    kept |= {"prealign"} if name == "turned" else set()
    assert receipt["files"].keys() == kept
    assert "metric" not in receipt  # nothing of it is opened


def test_folds_are_counted(command, tmp_path):
    rng = np.random.default_rng(5)
    for name in "sm":
        noise = ndimage.gaussian_filter(rng.standard_normal((22, 20, 18)), 2.5)
        save(tmp_path / f"{name}.nii", noise.astype(np.float32))
    # Rounded to whole voxels by chance, the map folds at 130 of 7,920, give or take 20.
    rough = "--step_length 0.5 --mopt_radius 2 --inv_iter 1".split()
    rough += "--map_spacing 2 --map_precision 1".split()
    levels = ["--level_iters", "6", "6"]
    status, out, _ = command(ALIGN, "s.nii", "m.nii", *levels, *rough, *NO_PICTURES)
    assert status == 0
    quality = json.loads(Path("receipt.json").read_text())["quality"]
    folded = _assert_quality(quality, load(FIELD)[..., 1])
    assert folded > 0
    assert f"{folded:,} of {quality['voxels']:,} voxels" in out


# -- pictures --------------------------------------------------------------


def test_pictures_show_something(runs):
    from matplotlib.image import imread

    folder = runs["plain"][0]
    assert set(figures.SYN_PICTURES) == PICTURES
    seen = {}
    for name in PICTURES:
        picture = imread(folder / name)[..., :3]
        assert min(picture.shape[:2]) > 300 and max(picture.shape[:2]) < 3000
        assert picture.std() > 0.05
        # The background is black, and the image stands out from it.
        assert picture[0, 0].max() == 0 and (picture.max(axis=-1) > 0.5).mean() > 0.02
        seen[name] = picture
    # Two columns: the moving image before and after.
    for name in ("checkerboard.png", "contours.png"):
        middle = seen[name].shape[1] // 2
        left, right = seen[name][:, :middle], seen[name][:, -middle:]
        assert (np.abs(left - right).max(axis=-1) > 0.1).mean() > 0.005
    # Shrinking and growing regions, the scale beside them left out.
    width = int(0.9 * seen["jacobian.png"].shape[1])
    red, _, blue = np.moveaxis(seen["jacobian.png"][:, :width], -1, 0)
    assert (red - blue > 0.04).mean() > 0.02 and (blue - red > 0.04).mean() > 0.02


def test_the_grid_follows_the_map(runs, tmp_path):
    static = load(runs["plain"][1])
    pictures = {}
    for size in (0, 3):
        mapping = DiffeomorphicMap(3, STATIC_SHAPE, disp_grid2world=STATIC_GRID)
        wave = np.sin(np.arange(STATIC_SHAPE[1]) / 3)[None, :, None, None]
        mapping.forward = (size * wave * np.ones((*STATIC_SHAPE, 3))).astype("f4")
        for kind in ("grid", "jacobian"):
            path = tmp_path / f"{kind}{size}.png"
            figures.save_map(path, kind, static, mapping)
            pictures[kind, size] = path.read_bytes()
    assert len(set(pictures.values())) == 4


def test_no_pictures_without_matplotlib(command, pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = command(ALIGN, *pair, *FAST, "--out_dir", "res")
    assert (status, err) == (0, "") and "matplotlib is not installed" in out
    assert not {p.name for p in Path("res").iterdir()} & SHOWN


# -- mistakes --------------------------------------------------------------


def _text(folder, name="bad.nii.gz"):
    (folder / name).write_text("not an image")
    return str(folder / name)


def _altered(value):
    def make(folder):
        data = scene(STATIC_SHAPE, STATIC_GRID)
        data[3, 4, 5] = value
        return save(folder / "bad.nii.gz", data)

    return make


def _truncated(folder):
    path = Path(save(folder / "bad.nii.gz", warped_scene()))
    path.write_bytes(path.read_bytes()[:2000])
    return str(path)


def _folder(folder):
    (folder / "bad").mkdir()
    return str(folder / "bad")


def _series(folder):
    image = scene(STATIC_SHAPE, STATIC_GRID)
    return save(folder / "bad.nii.gz", np.stack([image] * 2, axis=-1))


def _rgb(folder):
    kind = [("R", "u1"), ("G", "u1"), ("B", "u1")]
    return save(folder / "bad.nii.gz", np.zeros((9, 9, 9), dtype=kind))


def _away(folder):
    grid2world = STATIC_GRID.copy()
    grid2world[0, 3] = 5000
    return save(folder / "bad.nii.gz", scene(STATIC_SHAPE, STATIC_GRID), grid2world)


BAD_IMAGES = {
    "missing": (lambda f: str(f / "no.nii.gz"), "not found", "check the name"),
    "empty name": (lambda f: "", "empty", "give"),
    "empty folder": (_folder, "not found", "check the name"),
    "text": (_text, "cannot be read as NIfTI", "convert"),
    "text.txt": (lambda f: _text(f, "bad.txt"), "cannot be read as NIfTI", "convert"),
    "truncated": (_truncated, "damaged or incomplete", "again"),
    "4D": (_series, "4 dimensions", "_vol_idx"),
    # The function to call is that of this command, not of the affine one.
    "2D": (
        lambda f: save(f / "bad.nii.gz", warped_scene()[9]),
        "2 dimensions",
        "syn_registration",
    ),
    "NaN": (_altered(np.nan), "NaN or infinite", "replace"),
    "infinite": (_altered(np.inf), "NaN or infinite", "replace"),
    "constant": (
        lambda f: save(f / "bad.nii.gz", np.ones(STATIC_SHAPE, "i2")),
        "constant",
        "no structure",
    ),
    "colour": (_rgb, "real numbers", "must hold"),
    "far apart": (_away, "do not overlap", "prealign"),
}


@pytest.mark.parametrize("role", ["static", "moving"])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image(command, no_parties, pair, tmp_path, kind, role):
    make, *words = BAD_IMAGES[kind]
    bad = make(tmp_path)
    files = (bad, pair[1]) if role == "static" else (pair[0], bad)
    result = command(ALIGN, *files, *FAST, "--out_dir", "res")
    if kind not in ("missing", "empty name", "empty folder", "far apart"):
        words.append(role)
    assert_refused(result, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--metric mi", ("--metric must be one of 'CC', 'SSD', 'MIND'", "'mi'")),
        ("--metric ssd --mopt_radius 3", ("--mopt_radius means nothing", "SSD")),
        ("--metric mind --reveal force", ("--reveal 'force' means nothing", "MIND")),
        ("--reveal updat", ("--reveal", "'map', 'update'", "got 'updat'")),
        ("--level_iters 0 0", ("--level_iters", "0 at every level")),
        ("--level_iters -3", ("--level_iters", "from 0", "got [-3]")),
        ("--mopt_radius 0", ("--mopt_radius", "from 1 to 20")),
        ("--mopt_radius 50", ("--mopt_radius", "from 1 to 20")),
        ("--mopt_radius 8", ("too small", "radius (8)")),
        ("--reveal update --mopt_sigma_diff 0", ("sigma_diff", "at least 1")),
        ("--mopt_sigma_diff -1", ("--mopt_sigma_diff", "from 0")),
        ("--mopt_sigma_diff nan", ("--mopt_sigma_diff", "got nan")),
        ("--stride 3", ("stride", "1 or 2")),
        ("--update_spacing 0", ("--update_spacing", "from 1")),
        ("--map_spacing 0", ("--map_spacing", "from 2")),
        ("--map_precision 0", ("--map_precision", "from 2**-10 to 1")),
        ("--map_precision 2", ("--map_precision", "from 2**-10 to 1")),
        ("--map_precision nan", ("--map_precision", "got nan")),
        ("--opens all", ("opens", "levels")),
        ("--step_length 0", ("--step_length", "above 0")),
        # A step that long leaves the range of what is carried along on shares.
        ("--step_length 2", ("step_length",)),
        ("--step_length nan", ("--step_length", "got nan")),
        ("--inv_iter 0", ("--inv_iter", "from 1")),
        ("--inv_tol -1", ("--inv_tol", "above 0")),
        ("--opt_tol nan", ("--opt_tol", "finite")),
        ("--ss_sigma_factor nan", ("--ss_sigma_factor", "got nan")),
        ("--ss_sigma_factor -1", ("--ss_sigma_factor", "from 0")),
        ("--static_vol_idx 0", ("--static_vol_idx", "leave out")),
        ("--out_warped w.txt", ("--out_warped w.txt", ".nii.gz")),
        ("--out_inv_static w.txt", ("--out_inv_static w.txt", ".nii.gz")),
        ("--out_field=", ("--out_field is empty", "give")),
        ("--receipt=", ("--receipt is empty", "give")),
        ("--receipt jacobian.png", ("two outputs", "rename")),
        ("--out_field warped_moved.nii.gz", ("two outputs", "rename")),
        ("--log_level loud", ("--log_level LOUD", "WARNING")),
        ("--level_iters 1 1 1 1", ("too small", "Decrease")),
    ],
)
def test_bad_flag(command, no_parties, pair, flags, words):
    result = command(ALIGN, *pair, *FAST, "--out_dir", "res", *flags.split())
    assert_refused(result, *words)


def test_no_levels(command, no_parties, pair):
    result = command(ALIGN, *pair, "--level_iters", "--out_dir", "res")
    assert_refused(result, "--level_iters")
    # Flags that this command does not have.
    assert "--sigmas" not in result[2] and "--factors" not in result[2]


@pytest.mark.parametrize("flag", ["--level_iters 1.5", "--mopt_radius x", "--bogus 1"])
def test_refused_by_the_parser(command, no_parties, pair, flag):
    status, _, err = command(ALIGN, *pair, "--out_dir", "res", *flag.split())
    assert status == 2 and flag.split()[0] in err.splitlines()[-1]
    assert not Path("res").exists()


@pytest.mark.parametrize("index", ["7", "-1", "x", "1-"])
def test_bad_volume_index(command, no_parties, pair, tmp_path, index):
    files = _series(tmp_path), pair[1]
    result = command(
        ALIGN, *files, *FAST, "--out_dir", "res", f"--static_vol_idx={index}"
    )
    assert_refused(result, "--static_vol_idx", "0 to 1")


def _matrix(values):
    def make(folder):
        np.savetxt(folder / "bad.txt", values)
        return str(folder / "bad.txt")

    return make


def _changed(row, column, value):
    matrix = np.eye(4)
    matrix[row, column] = value
    return _matrix(matrix)


BAD_MATRICES = {
    "missing": (lambda f: str(f / "no.txt"), "check the name"),
    "text": (lambda f: _text(f, "bad.txt"), "cannot be read", "affine.txt"),
    "image": (_series, "cannot be read", "affine.txt"),
    "3 x 3": (_matrix(np.eye(3)), "4 x 4", "affine.txt"),
    "NaN": (_changed(0, 0, np.nan), "4 x 4", "affine.txt"),
    "singular": (_changed(1, 1, 0), "inverted", "no affine"),
    "last row": (_changed(3, 0, 1), "0 0 0 1", "no affine"),
}


@pytest.mark.parametrize("kind", BAD_MATRICES)
def test_bad_matrix(command, no_parties, pair, tmp_path, kind):
    make, *words = BAD_MATRICES[kind]
    bad = make(tmp_path)
    result = command(ALIGN, *pair, *FAST, "--out_dir", "res", "--prealign_file", bad)
    assert_refused(result, "prealign", *words)
    if kind == "image":
        words = ["(X, Y, Z, 3, 2)", "give"]
    result = command(APPLY, *pair, bad, "--out_dir", "res")
    assert_refused(result, *words, command=APPLY)


@pytest.mark.parametrize("gap", [0.0, 500.0])
def test_prealign_to_nowhere(command, no_parties, pair, tmp_path, gap):
    """Of images that overlap, and in the wrong direction of images that do not."""
    shift = np.eye(4)
    shift[0, 3] = gap
    save(tmp_path / "m.nii", warped_scene(), shift @ MOVING_GRID)
    bad = _changed(0, 3, -500.0)(tmp_path)
    args = [pair[0], "m.nii", *FAST, "--out_dir", "res", "--prealign_file", bad]
    assert_refused(command(ALIGN, *args), "prealign", "static to moving")


def test_prealign_bridges_a_gap(command, pair, tmp_path):
    """Images that overlap only by way of the matrix: what it is there for."""
    gap = np.eye(4)
    gap[0, 3] = 500
    np.savetxt("gap.txt", gap)
    save(tmp_path / "m.nii", warped_scene(), gap @ MOVING_GRID)
    args = [pair[0], "m.nii", *FAST, *NO_PICTURES, "--prealign_file", "gap.txt"]
    status, _, err = command(ALIGN, *args)
    assert (status, err) == (0, "")
    assert load("warped_moved.nii.gz").max() > 0.8


def test_an_image_of_zero_mean(command, pair, tmp_path):
    """Nothing here starts from a centre of mass."""
    image = (100 * warped_scene()).astype(np.int32)
    image[np.indices(image.shape).sum(axis=0) % 2 == 0] *= -1
    image[0, 0, 0] -= image.sum()
    assert image.sum() == 0
    save(tmp_path / "m.nii", image, MOVING_GRID)
    status, _, err = command(ALIGN, pair[0], "m.nii", *FAST, *NO_PICTURES)
    assert (status, err) == (0, "")


def test_a_warning_is_one_line(command, pair):
    """A spacing of 1 hides nothing: said to users, not with lines of the source."""
    args = [*pair, *FAST, *NO_PICTURES, "--reveal", "update", "--update_spacing", "1"]
    with warnings.catch_warnings(record=True) as raw:
        warnings.simplefilter("always")
        status, out, err = command(ALIGN, *args)
    assert status == 0
    assert [str(w.message) for w in raw] == []
    lines = (out + err).splitlines()
    for words in ("update_spacing 1 ", 'reveal="update" opens at every iteration'):
        assert len([x for x in lines if words in x]) == 1
    assert "opens at every iteration" not in command(ALIGN, *args[:-4], "--force")[1]


# -- mistakes with what is applied -----------------------------------------


def _field(change=lambda x: x):
    def make(folder):
        field = np.ascontiguousarray(change(np.zeros((6, 7, 8, 3, 2), np.float32)))
        return save(folder / "bad.nii.gz", field, np.eye(4))

    return make


def _nan_field(field):
    field[1, 2, 3, 0, 1] = np.nan
    return field


def _singular_field(folder):
    header = nib.Nifti1Header()
    header.set_sform(np.diag([0.5, 0.5, 0.0, 1.0]), code=1)
    field = np.zeros((6, 7, 8, 3, 2), np.float32)
    nib.save(nib.Nifti1Image(field, None, header), folder / "bad.nii.gz")
    return str(folder / "bad.nii.gz")


BAD_FIELDS = {
    "missing": (lambda f: str(f / "no.nii.gz"), "check the name"),
    "text": (_text, "cannot be read as NIfTI", "convert"),
    "matrix": (_changed(0, 3, 1), "cannot be read as NIfTI", ".nii"),
    "truncated": (_truncated, "damaged or incomplete", "again"),
    "image": (_series, "(X, Y, Z, 3, 2)", "dipy_ppir_align_syn"),
    "one direction": (_field(lambda x: x[..., 0]), "(X, Y, Z, 3, 2)", "give"),
    "axes first": (_field(lambda x: np.moveaxis(x, -1, 0)), "(X, Y, Z, 3, 2)", "give"),
    "NaN": (_field(_nan_field), "NaN", "displacement field"),
    "singular": (_singular_field, "displacement field", "singular"),
    "complex": (_field(lambda x: x.astype(np.complex64)), "displacement", "real"),
}


@pytest.mark.parametrize("kind", BAD_FIELDS)
def test_bad_field(command, pair, tmp_path, kind):
    make, *words = BAD_FIELDS[kind]
    bad = make(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = command(APPLY, *pair, bad, *DIFFEOMORPHIC, "--out_dir", "res")
    assert_refused(result, *words, command=APPLY)


def test_a_field_given_as_affine(command, pair, tmp_path):
    """A NIfTI file is a map, whatever the flag's default; FSL's has to be converted."""
    field = _field()(tmp_path)
    for place, flags in (("res", []), ("same", DIFFEOMORPHIC)):
        assert command(APPLY, *pair, field, *flags, "--out_dir", place)[0] == 0
    files = [f"{place}/transformed.nii.gz" for place in ("res", "same")]
    by_itself, told = (np.asarray(nib.load(file).dataobj) for file in files)
    assert by_itself.any()
    np.testing.assert_array_equal(by_itself, told)
    one_way = _field(lambda x: x[..., 0])(tmp_path)
    result = command(APPLY, *pair, one_way, "--out_dir", "no")
    words = "(X, Y, Z, 3, 2)", "dipy_ppir_convert_transform"
    assert_refused(result, *words, command=APPLY, folder="no")


@pytest.mark.parametrize("role", ["static", "moving"])
@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "2D", "colour"])
def test_bad_image_to_transform(command, pair, tmp_path, kind, role):
    make, *words = BAD_IMAGES[kind]
    bad = make(tmp_path)
    np.savetxt("a.txt", np.eye(4))
    files = (bad, pair[1]) if role == "static" else (pair[0], bad)
    flags = ["--inverse"] if role == "static" else []
    result = command(APPLY, *files, "a.txt", "--out_dir", "res", *flags)
    words = {"2D": ["three dimensions"], "colour": [role]}.get(kind, words)
    assert_refused(result, *words, command=APPLY)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--interpolation cubic", ("--interpolation cubic", "'nearest'")),
        ("--transform_type affin", ("--transform_type affin", "'diffeomorphic'")),
        ("--out_file x.txt", ("--out_file x.txt", ".nii.gz")),
        ("--out_file=", ("--out_file is empty", "give")),
    ],
)
def test_bad_flag_of_apply(command, pair, flags, words):
    np.savetxt("a.txt", np.eye(4))
    result = command(APPLY, *pair, "a.txt", "--out_dir", "res", *flags.split())
    assert_refused(result, *words, command=APPLY)


# -- files in the way ------------------------------------------------------


def test_existing_files_need_force(command, pair):
    Path("jacobian.png").write_text("mine")
    status, _, err = command(ALIGN, *pair, *FAST)
    assert status == 1 and "--force" in err and "jacobian.png" in err
    assert [p.name for p in Path().iterdir()] == ["jacobian.png"]
    assert Path("jacobian.png").read_text() == "mine"
    assert command(ALIGN, *pair, *FAST, "--force")[0] == 0
    assert Path("jacobian.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in Path().iterdir()} == SHOWN | {
        "warped_moved.nii.gz",
        FIELD,
        "receipt.json",
    }
    args = [*pair, FIELD, *DIFFEOMORPHIC]
    assert command(APPLY, *args)[0] == 0
    status, _, err = command(APPLY, *args)
    assert status == 1 and "transformed.nii.gz" in err and "--force" in err
    assert command(APPLY, *args, "--force")[0] == 0


@pytest.mark.parametrize("name", ["warped_moved.nii.gz", FIELD, "receipt.json"])
def test_inputs_are_not_overwritten(command, no_parties, pair, name):
    np.savetxt("a.txt", np.eye(4))
    if name == "receipt.json":
        mine = shutil.copy("a.txt", name)
        args = [*pair, "--prealign_file", mine]
    else:
        mine = shutil.copy(pair[1], name)
        args = [pair[0], mine]
    before = Path(mine).read_bytes()
    status, _, err = command(ALIGN, *args, *FAST, "--force")
    assert status == 1 and "is also an input" in err and "choose another" in err
    assert Path(mine).read_bytes() == before


@pytest.mark.parametrize("which", [0, 1, 2])
def test_inputs_of_apply_are_not_overwritten(command, runs, which):
    folder, static, moving, _ = runs["plain"]
    args = [static, moving, str(folder / FIELD)]
    # Also by another name.
    Path("transformed.nii.gz").symlink_to(args[which])
    before = Path(args[which]).read_bytes()
    status, _, err = command(APPLY, *args, *DIFFEOMORPHIC, "--force")
    assert status == 1 and "is also an input" in err and "choose another" in err
    assert Path(args[which]).read_bytes() == before


def test_folders_in_the_way(command, no_parties, pair):
    Path("warped_grid.png").mkdir()
    status, _, err = command(ALIGN, *pair, *FAST, "--force")
    assert status == 1 and "warped_grid.png is a folder" in err
    Path("file").write_text("")
    result = command(ALIGN, *pair, *FAST, "--out_dir", "file/res")
    assert_refused(result, "file/res", "choose another", folder="file/res")


def test_output_folder_not_writable(command, no_parties, pair, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    result = command(ALIGN, *pair, *FAST, "--out_dir", "res")
    assert_refused(result, "cannot write", "Permission denied", "--out_dir")


# -- many pairs ------------------------------------------------------------


@pytest.fixture
def many(pair, tmp_path):
    """A pattern for two moving images, each called m*."""
    (tmp_path / "in").mkdir()
    for name in ("m1.nii.gz", "m2.nii.gz"):
        shutil.copy(pair[1], tmp_path / "in" / name)
    return str(tmp_path / "in" / "m*.nii.gz")


def test_many_pairs(command, pair, many):
    args = [pair[0], many, *FAST, "--inv_static", "--out_dir", "res"]
    assert_refused(command(ALIGN, *args), "2 pairs", "--mix_names")
    assert command(ALIGN, *args, "--mix_names")[0] == 0
    names = {p.name for p in Path("res").iterdir()}
    kinds = SHOWN | {"warped_moved.nii.gz", "inc_static.nii.gz", FIELD}
    assert names == {
        f"static_{m}__{kind}" for m in ("m1", "m2") for kind in kinds | {"receipt.json"}
    }


def test_many_images_to_transform(command, runs, many):
    folder, static, _, _ = runs["plain"]
    args = [static, many, folder / FIELD, *DIFFEOMORPHIC, "--out_dir", "new"]
    result = command(APPLY, *args)
    assert_refused(result, "2 pairs", "--mix_names", command=APPLY, folder="new")
    assert command(APPLY, *args, "--mix_names")[0] == 0
    results = [load(p) for p in Path("new").iterdir()]
    assert len(results) == 2
    assert_array_equal(*results)


def test_numbers_of_files_that_do_not_go_together(command, no_parties, pair, many):
    three = [Path("in", f"a{i}.txt") for i in range(3)]
    for path in three:
        np.savetxt(path, np.eye(4))
        shutil.copy(pair[0], path.with_suffix(".nii.gz"))
    result = command(ALIGN, "in/a*.nii.gz", many, *FAST, "--out_dir", "res")
    assert_refused(result, "different numbers", "give one")
    for static in (pair[0], "in/a*.nii.gz"):
        result = command(APPLY, static, many, "in/a*.txt", "--out_dir", "res")
        assert_refused(result, "different numbers", "give one", command=APPLY)


def test_nothing_is_called_saved_that_is_not(command, runs, many):
    """One image of three is none: then no file is written, and none announced."""
    _text(Path("in"), "m3.nii.gz")
    folder, static, _, _ = runs["plain"]
    flags = [*DIFFEOMORPHIC, "--out_dir", "new", "--mix_names"]
    result = command(APPLY, static, many, folder / FIELD, *flags)
    assert_refused(result, "m3.nii.gz", "convert", command=APPLY, folder="new")
    assert "Saved" not in result[1]


def test_a_bad_pair_is_found_first(command, no_parties, pair, many):
    """Before the others, which take their time, are registered."""
    _text(Path("in"), "m3.nii.gz")
    result = command(ALIGN, pair[0], many, *FAST, "--mix_names", "--out_dir", "res")
    assert_refused(result, "m3.nii.gz", "convert")


# -- failures on the way ---------------------------------------------------


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def _full(path, *args, **kwargs):
    Path(path).write_bytes(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name"),
    [(registration, "save_nifti"), (mappings, "save_nifti")],
)
def test_a_full_disk_leaves_nothing(command, pair, monkeypatch, module, name):
    monkeypatch.setattr(module, name, _full)
    result = command(ALIGN, *pair, *FAST, "--out_dir", "res")
    assert_refused(result, "No space left", "check")
    assert list(Path().iterdir()) == []


def test_interrupted_while_drawing(command, pair, monkeypatch):
    monkeypatch.setattr(figures, "save_map", _interrupt)
    status, _, err = command(ALIGN, *pair, *FAST, "--out_dir", "res")
    assert status == 130
    assert err == f"{ALIGN}: error: interrupted; no output was written\n"
    assert list(Path().iterdir()) == []


def test_interrupted_after_writing(command, pair, monkeypatch):
    """The files are there: it may not be said that there are none."""
    monkeypatch.setattr(remote, "receipt_text", _interrupt)
    status, _, err = command(ALIGN, *pair, *FAST, *NO_PICTURES)
    assert status == 130 and err.count("\n") == 1
    assert Path("warped_moved.nii.gz").exists()
    assert "no output was written" not in err


def test_unexpected_failure_is_one_line(command, pair, monkeypatch):
    def fail(*args):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(inputs, "read_nifti", fail)
    status, _, err = command(ALIGN, *pair, *FAST, "--out_dir", "res")
    assert status == 1 and err.count("\n") == 1
    assert "RuntimeError: first second" in err and "--debug" in err
    with pytest.raises(RuntimeError):
        command(ALIGN, *pair, *FAST, "--out_dir", "res", "--debug")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("pid", [pytest.param(STATIC, marks=pytest.mark.heavy), HELPER])
def test_a_party_killed_on_the_way(command, pair, monkeypatch, pid):
    inner = CarriedCorrelation.iterate
    children, calls = {}, []

    def killing(*args, **options):
        calls.append(0)
        if len(calls) == 3:
            children.update(local._kept[3]._children)
            children[pid].kill()
        return inner(*args, **options)

    monkeypatch.setattr(CarriedCorrelation, "iterate", killing)
    result = command(ALIGN, *pair, *FAST, "--out_dir", "res")
    assert_refused(result, f"party {pid} ({ROLES[pid]})")
    assert all(c.returncode is not None for c in children.values()), "one outlived it"
    assert list(Path().iterdir()) == []
    assert command(ALIGN, *pair, *FAST, *NO_PICTURES)[0] == 0


HALTING = HALT.format(module="metrics", name="CarriedCorrelation", method="iterate")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (signal.SIGINT, 130),
        # As with the other command, whose tests send all three.
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.heavy),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.heavy),
    ],
)
def test_interrupted(pair, tmp_path, sent, status):
    """In the middle of a registration, which would go on for ever."""
    argv = [*changed(ALIGN, HALTING), *pair, *FAST, "--out_dir", "res"]
    returned, _, err = interrupted(argv, tmp_path, sent)
    assert returned == status
    if sent == signal.SIGINT:
        assert err == f"{ALIGN}: error: interrupted; no output was written\n"
    if sent != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert left == [], "a partial file"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        pytest.param(ALIGN, ["--stride", "3"], marks=pytest.mark.heavy),
        (APPLY, ["no.txt"]),
    ],
)
def test_a_mistake_as_users_see_it(pair, tmp_path, name, args):
    with started([script(name), *pair, *args], tmp_path) as process:
        status, out, err = finish(process)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith(f"{name}: error: ")
    assert list(tmp_path.iterdir()) == []


# -- from Python -----------------------------------------------------------


def test_from_python(runs, tmp_path):
    folder, static, moving, _ = runs["plain"]
    ApplyTransformFlow().run(
        static,
        moving,
        str(folder / FIELD),
        transform_type="diffeomorphic",
        out_dir=str(tmp_path / "a" / "b"),
    )
    assert_allclose(
        load(tmp_path / "a" / "b" / "transformed.nii.gz"),
        load(folder / "warped_moved.nii.gz"),
        atol=1e-6,
    )
