"""Jacobian determinants of displacement fields, against formulas."""

from dipy.align.imwarp import DiffeomorphicMap
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from dipy_ppir.align.quality import jacobian_determinant, map_quality

SHAPES = {2: (9, 8), 3: (8, 7, 9)}


def rotation(dim):
    """A rotation about no axis of the grid."""
    c, s = np.cos(0.4), np.sin(0.4)
    turn = np.eye(dim)
    turn[:2, :2] = [[c, -s], [s, c]]
    if dim == 3:
        c, s = np.cos(-0.7), np.sin(-0.7)
        turn = turn @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    return turn


def grid(kind, dim):
    """Voxel-to-space transformations of all kinds that occur."""
    zooms = np.diag([0.7, 2.5, 1.3][:dim])
    linear = {
        "unit": np.eye(dim),
        "anisotropic": zooms,
        "rotated": rotation(dim) @ zooms,
        "flipped": rotation(dim) @ zooms @ np.diag([-1, 1, 1][:dim]),
        "axes exchanged": zooms[::-1],
        "sheared": zooms + np.triu(np.full((dim, dim), 0.2), 1),
    }[kind]
    grid2world = np.eye(dim + 1)
    grid2world[:dim, :dim] = linear
    grid2world[:dim, dim] = [-13.0, 40.0, 5.0][:dim]
    return grid2world


GRIDS = ["unit", "anisotropic", "rotated", "flipped", "axes exchanged", "sheared"]


def points(shape, grid2world):
    """World coordinates of the voxels, mm."""
    dim = len(shape)
    at = np.moveaxis(np.indices(shape, dtype=float), 0, -1)
    return at @ grid2world[:dim, :dim].T + grid2world[:dim, dim]


def inner(array):
    """Without the outermost voxels, where differences are one-sided."""
    return array[(slice(1, -1),) * array.ndim]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("name", ["zero", "shift", "scaling", "rotation", "general"])
def test_affine_fields(dim, kind, name):
    """The determinant of the matrix, at every voxel, whatever the grid."""
    matrix = {
        "zero": np.eye(dim),
        "shift": np.eye(dim),
        "scaling": np.diag([1.5, 0.8, 1.1][:dim]),
        "rotation": rotation(dim),
        "general": np.array([[1.1, 0.3, -0.2], [-0.1, 0.9, 0.2], [0.4, 0, 1.2]])[
            :dim, :dim
        ],
    }[name]
    shift = 0.0 if name == "zero" else np.array([3.0, -20.0, 7.0])[:dim]
    grid2world = grid(kind, dim)
    field = points(SHAPES[dim], grid2world) @ (matrix - np.eye(dim)).T + shift
    determinant = jacobian_determinant(field, grid2world)
    assert determinant.shape == SHAPES[dim]
    # The inverse of the grid's matrix is rounded to float32.
    assert_allclose(determinant, np.linalg.det(matrix), rtol=1e-5)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", GRIDS)
def test_quadratic_fields(dim, kind):
    """Central differences are exact: det(I + Q x) with Q_i symmetric."""
    rng = np.random.default_rng(dim)
    quadratic = rng.uniform(-0.02, 0.02, (dim, dim, dim))
    quadratic += quadratic.transpose(0, 2, 1)
    grid2world = grid(kind, dim)
    x = points(SHAPES[dim], grid2world)
    field = np.einsum("...j,ijk,...k->...i", x, quadratic, x) / 2
    expected = np.linalg.det(np.eye(dim) + np.einsum("ijk,...k->...ij", quadratic, x))
    assert np.ptp(expected) > 0.5
    determinant = jacobian_determinant(field, grid2world)
    assert_allclose(inner(determinant), inner(expected), atol=1e-4)


@pytest.mark.parametrize("dim", [2, 3])
def test_rows_and_columns_are_not_exchanged(dim):
    """A shear of one component along one axis changes no volume; of two, it does."""
    grid2world = grid("anisotropic", dim)
    x = points(SHAPES[dim], grid2world)
    field = np.zeros_like(x)
    field[..., 0] = 0.5 * x[..., 1]
    assert_allclose(jacobian_determinant(field, grid2world), 1, atol=1e-5)
    field[..., 1] = 0.5 * x[..., 0]
    assert_allclose(jacobian_determinant(field, grid2world), 0.75, atol=1e-5)
    field[..., 1] *= -1
    assert_allclose(jacobian_determinant(field, grid2world), 1.25, atol=1e-5)


def test_the_type_is_that_of_maps():
    field = np.zeros((6, 7, 8, 3), dtype=np.float32)
    determinant = jacobian_determinant(field, grid("rotated", 3))
    assert determinant.dtype == np.float32
    assert_array_equal(determinant, 1)


def test_without_a_grid_voxels_are_the_unit():
    field = np.random.default_rng(0).standard_normal((6, 7, 8, 3)) / 10
    assert_array_equal(
        jacobian_determinant(field, None), jacobian_determinant(field, np.eye(4))
    )


def test_the_field_is_left_alone():
    field = np.random.default_rng(0).standard_normal((6, 7, 2)).astype(np.float32)
    before = field.copy()
    jacobian_determinant(field, grid("flipped", 2))
    assert_array_equal(field, before)


# -- folds -----------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", GRIDS)
def test_folds(dim, kind):
    """A sine along a direction of the world, as large as to fold a third of it."""
    shape = {2: (24, 20), 3: (16, 14, 12)}[dim]
    grid2world = grid(kind, dim)
    # One step along the first axis of the grid is 0.6 rad, along the others none.
    wave = 0.6 * np.linalg.inv(grid2world[:dim, :dim])[0]
    along = np.array([2.0, 1.0, 0.5])[:dim]
    along *= 2 / (along @ wave)
    phase = (points(shape, grid2world) - grid2world[:dim, dim]) @ wave
    # The derivative as central differences see it; one-sided ones at the ends.
    slope = (2 * np.cos(phase) * np.sin(0.6) / 0.6)[1:-1]
    determinant = jacobian_determinant(np.sin(phase)[..., None] * along, grid2world)
    assert_allclose(determinant[1:-1], 1 + slope, atol=1e-4)
    folded = 1 + slope <= 0
    assert 0.2 < folded.mean() < 0.45 and np.abs(1 + slope).min() > 1e-3
    assert_array_equal(determinant[1:-1] <= 0, folded)


def test_a_mirror_folds_everywhere():
    grid2world = grid("rotated", 3)
    x = points(SHAPES[3], grid2world)
    field = x @ (np.diag([-1.0, 1, 1]) - np.eye(3))
    assert_allclose(jacobian_determinant(field, grid2world), -1, atol=1e-4)


def _map(field, grid2world, *, inverse=False, prealign=None):
    mapping = DiffeomorphicMap(
        field.shape[-1],
        field.shape[:-1],
        disp_grid2world=grid2world,
        prealign=prealign,
    )
    mapping.forward = field.astype(np.float32)
    mapping.backward = np.zeros_like(mapping.forward)
    if inverse:
        mapping.forward, mapping.backward = mapping.backward, mapping.forward
        mapping.is_inverse = True
    return mapping


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("inverse", [False, True])
def test_quality_counts_folds(dim, inverse):
    """One voxel's displacement, so large that its neighbours change places."""
    shape = SHAPES[dim]
    grid2world = grid("flipped", dim)
    field = np.zeros((*shape, dim))
    # Along the first axis of the grid, by three voxels.
    field[(4,) * dim] = 3 * grid2world[:dim, 0]
    # The neighbour before sees 1 + 3 / 2, the one behind 1 - 3 / 2.
    quality = map_quality(_map(field, grid2world, inverse=inverse))
    assert quality == {
        "voxels": np.prod(shape),
        "non_positive_jacobian": 1,
        "percent": pytest.approx(100 / np.prod(shape)),
        "smallest_jacobian": pytest.approx(-0.5, abs=1e-5),
        "largest_jacobian": pytest.approx(2.5, abs=1e-5),
    }


def test_zero_is_no_positive_determinant():
    """Where a direction collapses, space folds onto a plane."""
    x = points(SHAPES[3], np.eye(4))
    field = np.zeros_like(x)
    field[..., 2] = -x[..., 2]
    quality = map_quality(_map(field, np.eye(4)))
    assert quality["non_positive_jacobian"] == quality["voxels"]
    assert quality["percent"] == 100
    assert quality["smallest_jacobian"] == quality["largest_jacobian"] == 0


def test_quality_is_of_the_deformation_alone():
    """The affine transform from which it started is not part of it."""
    mapping = _map(np.zeros((6, 7, 8, 3)), np.eye(4), prealign=np.diag([2, 2, 2, 1.0]))
    assert map_quality(mapping)["largest_jacobian"] == 1


def test_quality_can_be_written_as_json():
    import json

    quality = map_quality(_map(np.zeros((5, 6, 2)), None))
    assert json.loads(json.dumps(quality)) == quality
    assert (quality["voxels"], quality["non_positive_jacobian"]) == (30, 0)
