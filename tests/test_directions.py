"""Which way transforms lead: what doc/transforms.md says of DIPY on them."""

from dipy.align import read_mapping as dipy_read_mapping
from dipy.align import write_mapping as dipy_write_mapping
from dipy.core.gradients import gradient_table, reorient_bvecs
from dipy.io.image import save_nifti
from dipy.tracking.streamline import Streamlines, transform_streamlines
import nibabel as nib
from nibabel.affines import apply_affine, voxel_sizes
import numpy as np
from numpy.testing import assert_allclose
import pytest
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation
from test_transformfiles import (
    MATRIX,
    MOVING,
    STATIC,
    affine_map,
    deformation,
    noise,
    some_points,
)

from dipy_ppir.align import RemoteImage, read_mapping, write_mapping
from dipy_ppir.align.mappings import points_of


def at(image, grid, points):
    """Values of an image at points of the world, linearly."""
    voxels = apply_affine(np.linalg.inv(grid.grid2world), points)
    return map_coordinates(image, voxels.T, order=1)


# -- images and points ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["affine", "map"])
def test_static_points_correspond_to_moving_ones(kind):
    """At x the moved image is what the moving one is at A x, or at the map's point."""
    # Of a plane, which interpolation does not change.
    moving = np.indices(MOVING.shape).sum(axis=0).astype(float)
    middle = (slice(7, -7),) * 3
    points = points_of(STATIC.shape, STATIC.grid2world)[middle].reshape(-1, 3)
    mapping, there = affine_map(MATRIX), apply_affine(MATRIX, points)
    if kind == "map":
        mapping = deformation()
        there = mapping.transform_points(points)
    found = np.asarray(mapping.transform(moving))[middle].ravel()
    assert_allclose(found, at(moving, MOVING, there), atol=1e-3)


def test_streamlines_by_the_inverse_of_the_matrix():
    """From moving to static space; what is at a point of it comes along."""
    ends = np.array(MOVING.shape) - 1
    line = np.linspace(0.35, 0.65, 20)[:, None] * ends
    lines = Streamlines([apply_affine(MOVING.grid2world, line)])
    moved = transform_streamlines(lines, np.linalg.inv(MATRIX))
    image = np.indices(MOVING.shape).sum(axis=0).astype(float)
    resampled = np.asarray(affine_map(MATRIX).transform(image))
    values = at(resampled, STATIC, moved[0])
    assert_allclose(values, at(image, MOVING, lines[0]), atol=1e-3)
    # Not by the matrix itself.
    wrong = transform_streamlines(lines, MATRIX)
    off = at(resampled, STATIC, wrong[0]) - at(image, MOVING, lines[0])
    assert np.abs(off).max() > 1


def test_streamlines_by_the_inverse_of_the_map(tmp_path):
    """From moving to static space it is `transform_points_inverse`."""
    write_mapping(deformation(), tmp_path / "map.nii.gz")
    mapping = read_mapping(tmp_path / "map.nii.gz", MOVING, STATIC)
    line = some_points(STATIC, 15)
    there = deformation().transform_points(line)
    moved = mapping.transform_points_inverse(Streamlines([there]))
    # Voxels are 2 mm, and the way back is sampled twice.
    assert_allclose(moved[0], line, atol=0.1)
    assert np.abs(mapping.transform_points(there) - line).max() > 1


def test_gradients_turn_with_the_anatomy():
    """A fibre along a gradient stays along it, on grids of any orientation.

    Gradients are along the axes of the grid, the first mirrored where the grid is
    not, as FSL has them and dcm2niix writes them.
    """
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", (0.3, -0.5, 0.4)).as_matrix()
    turn[:3, 3] = 3, 2, -1
    # In the moving image a fibre leads from one point to another.
    start, end = apply_affine(MOVING.grid2world, [[8, 9, 10], [15, 12, 13]])

    def along(grid, world):
        """A direction of the world as a gradient of FSL's."""
        axes = grid.grid2world[:3, :3] / voxel_sizes(grid.grid2world)
        if np.linalg.det(axes) > 0:
            axes = axes * [-1, 1, 1]
        return axes.T @ world / np.linalg.norm(world)

    before = along(MOVING, end - start)
    start, end = apply_affine(np.linalg.inv(turn), [start, end])
    after = along(STATIC, end - start)

    bvecs = np.array([[0, 0, 0], before])
    gtab = gradient_table(np.array([0, 1000]), bvecs=bvecs)

    # The lines of doc/transforms.md.
    def axes(grid2world):
        axes = grid2world[:3, :3] / voxel_sizes(grid2world)
        return axes * [-1, 1, 1] if np.linalg.det(axes) > 0 else axes

    affine = turn
    moving_affine, static_affine = MOVING.grid2world, STATIC.grid2world
    between = axes(moving_affine).T @ affine[:3, :3] @ axes(static_affine)
    turned = reorient_bvecs(gtab, [between] * int((~gtab.b0s_mask).sum()))
    assert_allclose(turned.bvecs[1], after, atol=1e-6)
    assert np.abs(before - after).max() > 0.1


# -- DIPY's files of maps ----------------------------------------------------------


def save_grid(path, grid):
    nib.save(nib.Nifti1Image(np.zeros(grid.shape, np.uint8), grid.grid2world), path)
    return path


@pytest.mark.parametrize("matrix", [None, MATRIX], ids=["plain", "prealigned"])
def test_dipy_reads_maps(tmp_path, matrix):
    """From files, with the moving image as domain; also where the grids differ."""
    path, mapping = tmp_path / "map.nii.gz", deformation(matrix=matrix)
    write_mapping(mapping, path)
    images = [
        save_grid(tmp_path / f"{n}.nii.gz", g)
        for n, g in (("moving", MOVING), ("static", STATIC))
    ]
    voxels = noise(MOVING)
    expected = np.asarray(mapping.transform(voxels))
    for found in (
        read_mapping(path, *images),
        read_mapping(nib.load(path), *map(nib.load, images)),
        dipy_read_mapping(str(path), *map(str, images)),
    ):
        assert_allclose(found.transform(voxels), expected, atol=2e-3)
        back = np.asarray(found.transform_inverse(noise(STATIC)))
        inside = np.asarray(mapping.transform_inverse(np.ones(STATIC.shape))) > 0.999
        away = back - np.asarray(mapping.transform_inverse(noise(STATIC)))
        assert np.quantile(np.abs(away[inside]), 0.99) < 0.02


def test_maps_that_dipy_wrote(tmp_path):
    """They lack the prealign matrix, which is given, from moving to static space."""
    path, mapping = tmp_path / "map.nii.gz", deformation()
    dipy_write_mapping(mapping, str(path))
    found = read_mapping(path, MOVING, STATIC, prealign=np.linalg.inv(MATRIX))
    voxels = noise(MOVING)
    assert_allclose(found.transform(voxels), mapping.transform(voxels), atol=1e-3)


def test_a_series_has_the_grid_of_its_volumes(tmp_path):
    """Where DIPY's takes the fourth dimension along."""
    path, series = tmp_path / "map.nii.gz", tmp_path / "series.nii.gz"
    write_mapping(deformation(), path)
    save_nifti(series, np.zeros((*STATIC.shape, 2), np.uint8), STATIC.grid2world)
    mapping = read_mapping(path, MOVING, series)
    assert np.asarray(mapping.transform(noise(MOVING))).shape == STATIC.shape


def test_what_is_no_map(tmp_path):
    path = tmp_path / "map.nii.gz"
    save_nifti(path, np.zeros((4, 4, 4, 3), np.float32), np.eye(4))
    with pytest.raises(ValueError, match=r"\(X, Y, Z, 3, 2\)"):
        read_mapping(path, MOVING, STATIC)
    with pytest.raises(ValueError, match="RemoteImage"):
        read_mapping(path, np.zeros((4, 4, 4)), STATIC)
    plane = RemoteImage((20, 20))
    with pytest.raises(ValueError, match="write_transform"):
        write_mapping(deformation(plane, plane, None), path)
