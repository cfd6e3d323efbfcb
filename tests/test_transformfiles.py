"""Transforms in files of other programs: SimpleITK makes of them what DIPY does."""

import warnings

from dipy.align.imaffine import AffineMap
from dipy.align.imwarp import DiffeomorphicMap
from dipy.align.vector_fields import (
    invert_vector_field_fixed_point_2d,
    invert_vector_field_fixed_point_3d,
)
import h5py
import nibabel as nib
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest
from scipy.io import savemat
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
import SimpleITK as sitk

from dipy_ppir.align import (
    RemoteImage,
    read_mapping,
    read_transform,
    write_mapping,
    write_transform,
)
from dipy_ppir.align.itkfiles import Displacements, read_itk, write_itk
from dipy_ppir.align.mappings import points_of

#: Oblique, of other voxels, one of them with its first axis to the left.
STATIC = RemoteImage(
    (20, 23, 18),
    from_matvec(
        Rotation.from_euler("xyz", (0.2, -0.3, 0.4)).as_matrix() * (2.0, 1.5, 2.5),
        (-12, -19, -25),
    ),
)
MOVING = RemoteImage(
    (26, 21, 24),
    from_matvec(
        Rotation.from_euler("xyz", (-0.1, 0.2, 0.15)).as_matrix() * (-1.8, 2.2, 2.0),
        (24, -26, -22),
    ),
)
#: From static to moving space.
MATRIX = np.array(
    [[1.05, 0.1, -0.05, 2], [-0.08, 0.97, 0.06, -1.5], [0, 0.05, 1.1, 1], [0, 0, 0, 1]]
)
PLANES = {
    "static": RemoteImage((30, 26), [[1.2, -0.3, -17], [0.4, 0.9, -18], [0, 0, 1]]),
    "moving": RemoteImage((28, 33), [[-1.1, 0.2, 13], [0.2, 1.1, -19], [0, 0, 1]]),
}
PLANE_MATRIX = np.array([[1.04, 0.1, 1], [-0.12, 0.95, -2], [0, 0, 1]])


def noise(grid, seed=0):
    """A smooth image between 0 and 1, with margins of 0."""
    image = np.random.default_rng(seed).normal(size=grid.shape)
    image = gaussian_filter(image, 2)
    return (image - image.min()) / np.ptp(image)


def affine_map(matrix, static=STATIC, moving=MOVING):
    return AffineMap(
        matrix,
        domain_grid_shape=static.shape,
        domain_grid2world=static.grid2world,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=moving.grid2world,
    )


def deformation(static=STATIC, moving=MOVING, matrix=MATRIX):
    """A map that bends by up to 1.2 voxels, after which comes a matrix, as from SyN."""
    dim = static.dim
    field = np.random.default_rng(5).normal(size=(*static.shape, dim))
    field = gaussian_filter(field, [4] * dim + [0])
    edges = np.zeros((*static.shape, 1))
    edges[(slice(3, -3),) * dim] = 1
    # As from SyN, nothing moves at the edges of the grid.
    field *= gaussian_filter(edges, [1] * dim + [0])
    most = 1.2 * voxel_sizes(static.grid2world).mean()
    field = (most * field / np.abs(field).max()).astype(np.float32)
    invert = invert_vector_field_fixed_point_2d
    if dim == 3:
        invert = invert_vector_field_fixed_point_3d
    world2grid, zooms = np.linalg.inv(static.grid2world), voxel_sizes(static.grid2world)
    mapping = DiffeomorphicMap(
        dim,
        static.shape,
        disp_grid2world=static.grid2world,
        domain_shape=moving.shape,
        domain_grid2world=moving.grid2world,
        codomain_shape=static.shape,
        codomain_grid2world=static.grid2world,
        prealign=None if matrix is None else np.linalg.inv(matrix),
    )
    mapping.forward = np.asarray(invert(field, world2grid, zooms, 100, 1e-4))
    mapping.backward = field
    mapping.is_inverse = True
    return mapping


def itk_image(grid, voxels=None):
    """An image in ITK's coordinates."""
    voxels = np.zeros(grid.shape) if voxels is None else voxels
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    signs = np.array([-1, -1, 1])[: grid.dim]
    lps, origin = signs[:, None] * grid.grid2world[:-1, :-1], grid.grid2world[:-1, -1]
    zooms = np.linalg.norm(lps, axis=0)
    image.SetSpacing(zooms.tolist())
    image.SetOrigin((signs * origin).tolist())
    image.SetDirection((lps / zooms).ravel().tolist())
    return image


def itk_transform(path):
    """What ITK reads."""
    if path.name.endswith((".nii", ".nii.gz")):
        field = sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkVectorFloat64)
        return sitk.DisplacementFieldTransform(field)
    return sitk.ReadTransform(str(path))


def resampled(voxels, of, on, path):
    """ITK's image of `voxels`, which are of one grid, on another."""
    found = sitk.Resample(
        itk_image(of, voxels), itk_image(on), itk_transform(path), sitk.sitkLinear
    )
    return sitk.GetArrayFromImage(found).T


def assert_same_image(path, transform, of, on, *, atol=1e-3):
    """Where the file leads well inside of the image, ITK's image is DIPY's."""
    voxels = noise(of)
    inside = np.zeros(of.shape)
    inside[(slice(2, -2),) * of.dim] = 1
    inside = resampled(inside, of, on, path) > 0.999
    assert inside.mean() > 0.2
    ours, theirs = np.asarray(transform(voxels)), resampled(voxels, of, on, path)
    assert_allclose(ours[inside], theirs[inside], atol=atol)


def moved(path, points):
    """Where ITK takes points in the coordinates of DIPY."""
    transform, signs = itk_transform(path), np.array([-1, -1, 1])[: points.shape[-1]]
    there = [transform.TransformPoint((signs * p).tolist()) for p in points]
    return signs * np.array(there)


def some_points(grid, count=40):
    """Points inside of a grid."""
    ends = np.array(grid.shape) - 1
    share = np.random.default_rng(1).uniform(0.3, 0.7, (count, grid.dim))
    return apply_affine(grid.grid2world, share * ends)


# -- what ITK makes of a file -------------------------------------------------


@pytest.mark.parametrize("ending", [".txt", ".tfm", ".mat", ".h5"])
@pytest.mark.parametrize("inverse", [False, True])
def test_itk_applies_a_matrix(tmp_path, ending, inverse):
    path = tmp_path / f"a{ending}"
    write_transform(path, MATRIX, inverse=inverse, fmt="itk")
    mapping = affine_map(MATRIX)
    if inverse:
        assert_same_image(path, mapping.transform_inverse, STATIC, MOVING)
    else:
        assert_same_image(path, mapping.transform, MOVING, STATIC)
        points = some_points(STATIC)
        assert_allclose(moved(path, points), apply_affine(MATRIX, points), atol=1e-10)


@pytest.mark.parametrize("ending", [".h5", ".nii.gz"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("matrix", [None, MATRIX], ids=["plain", "prealigned"])
def test_itk_applies_a_map(tmp_path, ending, inverse, matrix):
    path = tmp_path / f"w{ending}"
    mapping = deformation(matrix=matrix)
    write_transform(path, mapping, inverse=inverse, fmt="itk")
    # What was prealigned is sampled anew on the way back, linearly.
    if inverse:
        atol = 1e-3 if matrix is None else 2e-2
        turned = mapping.transform_inverse
        assert_same_image(path, turned, STATIC, MOVING, atol=atol)
    else:
        assert_same_image(path, mapping.transform, MOVING, STATIC)


@pytest.mark.parametrize("inverse", [False, True])
def test_itk_applies_what_the_command_wrote(tmp_path, inverse):
    """From the file of displacements, which has a grid of its own."""
    write_mapping(deformation(), tmp_path / "map.nii.gz")
    mapping = read_mapping(tmp_path / "map.nii.gz", MOVING, STATIC)
    assert tuple(mapping.disp_shape) != STATIC.shape
    path = tmp_path / "w.h5"
    write_transform(path, mapping, inverse=inverse)
    if inverse:
        assert_same_image(path, mapping.transform_inverse, STATIC, MOVING)
    else:
        assert_same_image(path, mapping.transform, MOVING, STATIC)


@pytest.mark.parametrize("ending", [".txt", ".mat", ".h5"])
def test_itk_applies_a_matrix_in_2d(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    write_transform(path, PLANE_MATRIX, fmt="itk")
    mapping = affine_map(PLANE_MATRIX, **PLANES)
    assert_same_image(path, mapping.transform, PLANES["moving"], PLANES["static"])
    assert_allclose(read_transform(path, fmt="itk"), PLANE_MATRIX, atol=1e-12)


@pytest.mark.parametrize("ending", [".h5", ".nii.gz"])
@pytest.mark.parametrize("inverse", [False, True])
def test_itk_applies_a_map_in_2d(tmp_path, ending, inverse):
    mapping = deformation(**PLANES, matrix=PLANE_MATRIX)
    path = tmp_path / f"w{ending}"
    write_transform(path, mapping, inverse=inverse, fmt="itk")
    if inverse:
        both, turned = [PLANES["static"], PLANES["moving"]], mapping.transform_inverse
        assert_same_image(path, turned, *both, atol=2e-2)
        return
    assert_same_image(path, mapping.transform, PLANES["moving"], PLANES["static"])
    again = read_transform(path, fmt="itk", **PLANES)
    voxels = noise(PLANES["moving"])
    assert_allclose(again.transform(voxels), mapping.transform(voxels), atol=2e-3)


# -- what is made of ITK's files ---------------------------------------------


def _affine(kind=sitk.AffineTransform):
    transform = kind(3)
    transform.SetMatrix(MATRIX[:3, :3].ravel())
    transform.SetTranslation(MATRIX[:3, 3])
    transform.SetCenter((3, -5, 7))
    return transform


def _zyx():
    transform = sitk.Euler3DTransform((4, 5, -6), 0.3, -0.2, 0.4, (1, 2, 3))
    transform.SetComputeZYX(True)
    return transform


def _displacements(size=3):
    """A field on the static image's grid, of ITK."""
    rng = np.random.default_rng(7)
    field = gaussian_filter(rng.normal(size=(*STATIC.shape[::-1], 3)), (4, 4, 4, 0))
    image = sitk.GetImageFromArray(size * field / np.abs(field).max(), isVector=True)
    image.CopyInformation(itk_image(STATIC))
    return sitk.DisplacementFieldTransform(image)


KINDS = {
    "affine about a centre": _affine,
    "rotation": lambda: sitk.Euler3DTransform((4, 5, -6), 0.3, -0.2, 0.4, (1, 2, 3)),
    "rotation, the other order": _zyx,
    "versor": lambda: sitk.VersorRigid3DTransform((0, 0.6, 0.8), 0.4, (1, 2, 3)),
    "similarity": lambda: sitk.Similarity3DTransform(
        1.1, (0, 0.6, 0.8), 0.4, (1, 2, 3), (7, 8, 9)
    ),
    "shift": lambda: sitk.TranslationTransform(3, (1, 2, -3)),
    "identity": lambda: sitk.TranslationTransform(3),
    "two matrices": lambda: sitk.CompositeTransform([_affine(), _zyx()]),
}


@pytest.mark.parametrize("ending", [".txt", ".mat", ".h5"])
@pytest.mark.parametrize("kind", KINDS)
def test_linear_transforms_of_itk(tmp_path, kind, ending):
    if ending == ".mat" and kind == "two matrices":
        pytest.skip("a .mat holds one")
    path = tmp_path / f"a{ending}"
    sitk.WriteTransform(KINDS[kind](), str(path))
    matrix, points = read_transform(path), some_points(STATIC)
    assert_allclose(apply_affine(matrix, points), moved(path, points), atol=1e-9)


def test_planar_rotation_of_itk(tmp_path):
    path, points = tmp_path / "a.txt", some_points(PLANES["static"])
    sitk.WriteTransform(sitk.Euler2DTransform((3, 4), 0.4, (1, 2)), str(path))
    matrix = read_transform(path)
    assert_allclose(apply_affine(matrix, points), moved(path, points), atol=1e-9)


@pytest.mark.parametrize("order", ["field first", "matrix first"])
def test_composites_of_itk(tmp_path, order):
    """As antsRegistration writes them; the last is applied first."""
    parts = [_affine(), _displacements()]
    parts = parts if order == "field first" else parts[::-1]
    path = tmp_path / "composite.h5"
    sitk.WriteTransform(sitk.CompositeTransform(parts), str(path))
    # The matrix about another centre takes the images apart.
    place = from_matvec(np.eye(3), (2, 0, 1)) @ MOVING.grid2world
    moving = RemoteImage(MOVING.shape, place)
    mapping = read_transform(path, static=STATIC, moving=moving)
    assert_same_image(path, mapping.transform, moving, STATIC)
    points = some_points(STATIC)
    there = moved(path, points)
    assert_allclose(mapping.transform_points_inverse(there), points, atol=0.05)


def test_old_spelling_of_itk(tmp_path):
    """ITK before 5.0 wrote TranformParameters."""
    path = tmp_path / "a.h5"
    write_transform(path, MATRIX)
    with h5py.File(path, "a") as file:
        group = file["TransformGroup/0"]
        for kind in ("Parameters", "FixedParameters"):
            group.move(f"Transform{kind}", f"Tranform{kind}")
    assert_allclose(read_transform(path), MATRIX, atol=1e-12)


def test_field_of_itk(tmp_path):
    """A displacement field as an image, as ANTs writes it."""
    path = tmp_path / "1Warp.nii.gz"
    sitk.WriteImage(_displacements().GetDisplacementField(), str(path))
    mapping = read_transform(path, static=STATIC, moving=MOVING)
    assert_same_image(path, mapping.transform, MOVING, STATIC)


# -- there and back ------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("fmt", "ending", "atol"),
    [
        ("dipy", ".txt", 1e-12),
        ("itk", ".txt", 1e-12),
        ("x5", ".x5", 1e-12),
        ("fsl", ".mat", 1e-5),
        ("lta", ".lta", 1e-4),
    ],
)
def test_matrices_come_back(tmp_path, fmt, ending, atol, inverse):
    path, grids = tmp_path / f"a{ending}", {"static": STATIC, "moving": MOVING}
    write_transform(path, MATRIX, fmt=fmt, inverse=inverse, **grids)
    if inverse:
        grids = {"static": MOVING, "moving": STATIC}
    found = read_transform(path, **grids)
    expected = np.linalg.inv(MATRIX) if inverse else MATRIX
    assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    ("fmt", "ending"),
    [
        ("dipy", ".nii.gz"),
        ("itk", ".h5"),
        ("itk", ".nii.gz"),
        ("x5", ".x5"),
        ("fsl", ".nii.gz"),
    ],
)
def test_maps_come_back(tmp_path, fmt, ending, inverse):
    path, mapping = tmp_path / f"w{ending}", deformation()
    write_transform(path, mapping, fmt=fmt, inverse=inverse)
    grids = {"static": STATIC, "moving": MOVING}
    points = some_points(STATIC)
    there = mapping.transform_points(points)
    if inverse:
        # The field of the other way is sampled linearly on another grid.
        grids = {"static": MOVING, "moving": STATIC}
        found = read_transform(path, **grids)
        assert_allclose(found.transform_points(there), points, atol=0.1)
        assert_allclose(found.transform_points_inverse(points), there, atol=0.15)
        return
    found = read_transform(path, **grids)
    assert_allclose(found.transform_points(points), there, atol=2e-3)
    assert_allclose(found.transform_points_inverse(there), points, atol=0.05)
    voxels = noise(MOVING)
    assert_allclose(found.transform(voxels), mapping.transform(voxels), atol=2e-3)


# -- formats that no other program checks here, by their definitions --------------


def fsl_points(grid, voxels):
    """FSL's coordinates of voxels: mm, mirrored unless the grid is."""
    voxels = np.array(voxels, dtype=float)
    if np.linalg.det(grid.grid2world) > 0:
        voxels[..., 0] = grid.shape[0] - 1 - voxels[..., 0]
    return voxels * voxel_sizes(grid.grid2world)


def test_matrix_of_fsl(tmp_path):
    """It takes FSL's points of the moving image to those of the static one."""
    path = tmp_path / "flirt.mat"
    write_transform(path, MATRIX, fmt="fsl", static=STATIC, moving=MOVING)
    points = some_points(STATIC)
    there = apply_affine(MATRIX, points)
    static, moving = (
        fsl_points(grid, apply_affine(np.linalg.inv(grid.grid2world), world))
        for grid, world in ((STATIC, points), (MOVING, there))
    )
    assert_allclose(apply_affine(np.loadtxt(path), moving), static, atol=1e-4)


def test_displacements_of_fsl(tmp_path):
    """On the static image's grid, between FSL's points of both images."""
    path, mapping = tmp_path / "warp.nii.gz", deformation()
    write_transform(path, mapping, fmt="fsl")
    image = nib.load(path)
    assert_allclose(image.affine, STATIC.grid2world, atol=1e-5)
    assert image.header["intent_code"] == 2006
    there = mapping.transform_points(points_of(*grid(STATIC)).reshape(-1, 3))
    voxels = apply_affine(np.linalg.inv(MOVING.grid2world), there)
    static = fsl_points(STATIC, np.moveaxis(np.indices(STATIC.shape), 0, -1))
    moving = fsl_points(MOVING, voxels).reshape(*STATIC.shape, 3)
    inside = (slice(1, -1),) * 3
    assert_allclose((static + image.get_fdata())[inside], moving[inside], atol=2e-3)


def grid(image):
    return image.shape, image.grid2world


def test_lta(tmp_path):
    """From the source, which is the moving image, to the static one."""
    path = tmp_path / "a.lta"
    write_transform(path, MATRIX, static=STATIC, moving=MOVING)
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("1 4 4"))
    matrix = np.loadtxt(lines[start + 1 : start + 5])
    assert_allclose(matrix, np.linalg.inv(MATRIX), atol=1e-9)
    volumes = {}
    for line in lines[start + 5 :]:
        if line.endswith("volume info"):
            name = line.split()[0]
        elif line.startswith("volume ="):
            volumes[name] = tuple(map(int, line.split("=")[1].split()))
    assert volumes == {"src": MOVING.shape, "dst": STATIC.shape}


def test_lta_between_voxels(tmp_path):
    """As FreeSurfer's programs write, with what they add at the end."""
    path = tmp_path / "a.lta"
    write_transform(path, MATRIX, static=STATIC, moving=MOVING)
    between = np.linalg.inv(STATIC.grid2world) @ np.linalg.inv(MATRIX)
    between = between @ MOVING.grid2world
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("1 4 4"))
    lines[start + 1 : start + 5] = [" ".join(map(str, row)) for row in between]
    lines = ["type      = 0 # LINEAR_VOX_TO_VOX" if "type" in x else x for x in lines]
    path.write_text("\n".join([*lines, "subject fsaverage", "fscale 0.15", ""]))
    assert_allclose(read_transform(path), MATRIX, atol=2e-4)


def test_nitransforms_reads_x5(tmp_path):
    from nitransforms.linear import Affine
    from nitransforms.nonlinear import DenseFieldTransform

    points = some_points(STATIC)
    write_transform(tmp_path / "a.x5", MATRIX, static=STATIC, moving=MOVING)
    found = Affine.from_filename(tmp_path / "a.x5", fmt="X5")
    assert_allclose(found.map(points), apply_affine(MATRIX, points), atol=1e-3)
    mapping = deformation()
    write_transform(tmp_path / "w.x5", mapping)
    field = DenseFieldTransform.from_filename(tmp_path / "w.x5", fmt="X5")
    # It interpolates by cubic splines, of which nothing shows at the grid's points.
    voxels = np.array([[4, 5, 6], [11, 12, 9]])
    points = apply_affine(STATIC.grid2world, voxels)
    assert_allclose(field.map(points), mapping.transform_points(points), atol=1e-3)


def test_a_chain_in_x5_is_refused(tmp_path):
    from nitransforms.io import x5

    path = tmp_path / "a.x5"
    write_transform(path, MATRIX, static=STATIC, moving=MOVING)
    x5.to_filename(path, x5.from_filename(path) * 2)
    with pytest.raises(ValueError, match="one matrix"):
        read_transform(path)


# -- mistakes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.txt", {}, "does not say"),
        ("a.nii.gz", {"fmt": "itk"}, "matrix .* ends in"),
        ("a.tfm", {"fmt": "spm"}, "choose one of"),
        ("a.mat", {"fmt": "fsl"}, "static image is needed"),
        ("a.lta", {"static": STATIC}, "moving image is needed"),
        ("a.x5", {"static": np.eye(4)}, "RemoteImage"),
    ],
)
def test_matrices_that_cannot_be_written(tmp_path, name, options, words):
    with pytest.raises(ValueError, match=words):
        write_transform(tmp_path / name, MATRIX, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        (np.full((4, 4), np.nan), "finite numbers .* give"),
        (np.eye(4)[:3], "4 x 4 .* give"),
        (np.eye(4) * 1j, "finite numbers"),
        (np.diag([1.0, 0, 1, 1]), "cannot be inverted, .* give"),
        (np.ones((3, 3)) + np.eye(3), "last row is not 0 0 1; give"),
        ("affine.txt", "not a str; read the file first"),
        ([[1.0]], "not a list"),
    ],
)
@pytest.mark.parametrize("name", ["a.tfm", "a.txt"])
def test_what_is_no_transform_is_not_written(tmp_path, name, transform, words):
    fmt = "dipy" if name == "a.txt" else None
    for inverse in (False, True):
        with pytest.raises(ValueError, match=words) as caught:
            write_transform(tmp_path / name, transform, fmt=fmt, inverse=inverse)
        assert type(caught.value) is ValueError
    assert not list(tmp_path.iterdir())


def test_where_no_transform_is_written(tmp_path):
    with pytest.raises(ValueError, match="write a matrix with write_transform"):
        write_mapping(MATRIX, tmp_path / "w.nii.gz")
    with pytest.raises(ValueError, match="read the file first"):
        write_mapping("w.h5", tmp_path / "w.nii.gz")
    for write in (
        lambda path: write_transform(path / "a.tfm", MATRIX),
        lambda path: write_transform(path / "w.h5", deformation()),
        lambda path: write_mapping(deformation(), path / "w.nii.gz"),
    ):
        with pytest.raises(ValueError, match="no/.* does not exist; make it first"):
            write(tmp_path / "no")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "fmt", "words"),
    [
        ("w.txt", "itk", "field .* ends in"),
        ("w.lta", None, "holds a matrix"),
        ("w.x5", None, "three dimensions"),
        ("w.nii.gz", "fsl", "three dimensions"),
        ("w.nii.gz", "dipy", "three"),
    ],
)
def test_maps_that_cannot_be_written(tmp_path, name, fmt, words):
    mapping = deformation(matrix=None)
    if "three" in words:
        mapping = deformation(**PLANES, matrix=PLANE_MATRIX)
    with pytest.raises(ValueError, match=words):
        write_transform(tmp_path / name, mapping, fmt=fmt)
    assert not list(tmp_path.iterdir())


def test_itk_reads_no_sheared_images(tmp_path):
    """But fields in .h5, which the message says."""
    shear = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    static = RemoteImage(STATIC.shape, shear @ STATIC.grid2world)
    mapping = deformation(static, matrix=None)
    with pytest.raises(ValueError, match="sheared.*[.]h5"):
        write_transform(tmp_path / "w.nii.gz", mapping, fmt="itk")
    write_transform(tmp_path / "w.h5", mapping)
    assert_same_image(tmp_path / "w.h5", mapping.transform, MOVING, static)


def _with(name, data, **header):
    def make(folder):
        image = nib.Nifti1Image(data, np.eye(4))
        for key, value in header.items():
            image.header[key] = value
        nib.save(image, folder / name)
        return folder / name

    return make


def _text(name, text):
    def make(folder):
        (folder / name).write_text(text)
        return folder / name

    return make


def _number_too_few(folder):
    write_transform(folder / "a.tfm", MATRIX)
    text = (folder / "a.tfm").read_text().replace("Parameters: 1.05", "Parameters:")
    (folder / "a.tfm").write_text(text)
    return folder / "a.tfm"


def _of_spline(folder):
    spline = sitk.BSplineTransform(3)
    spline.SetTransformDomainMeshSize((2, 2, 2))
    sitk.WriteTransform(spline, str(folder / "a.h5"))
    return folder / "a.h5"


NO_TRANSFORMS = {
    "missing": (lambda folder: folder / "a.tfm", "does not exist"),
    "nothing in .tfm": (_text("a.tfm", ""), "cannot be read"),
    "words in .lta": (_text("a.lta", "type = words"), "LTA"),
    "words in .h5": (_text("a.h5", "words"), "cannot be read"),
    "words in .x5": (_text("a.x5", "words"), "HDF5"),
    "words in .txt": (_text("a.txt", "words"), "4 x 4"),
    "words in .nii": (_text("a.nii", "words"), "NIfTI"),
    "singular": (_text("a.txt", "0 0 0 0\n" * 3 + "0 0 0 1"), "inverted"),
    "too few numbers": (_number_too_few, "do not fit"),
    "spline": (_of_spline, "BSplineTransform.*displacement field"),
    "image": (_with("a.nii", np.zeros((4, 4, 4))), "shape"),
    "NaN": (_with("a.nii", np.full((4, 4, 4, 1, 3), np.nan)), "finite"),
    "coefficients": (
        _with("a.nii", np.zeros((4, 4, 4, 3)), intent_code=2009),
        "fnirtfileutils",
    ),
}


@pytest.mark.parametrize("kind", NO_TRANSFORMS)
def test_files_that_hold_no_transform(tmp_path, kind):
    make, words = NO_TRANSFORMS[kind]
    with pytest.raises(ValueError, match=words):
        read_transform(make(tmp_path), static=STATIC, moving=MOVING)


def _numbers_of(name, folder, replace):
    """A file whose numbers `replace` writes anew, given a group and their names."""
    path = folder / name
    write_transform(path, MATRIX, static=STATIC, moving=MOVING)
    entry = {".h5": "TransformParameters", ".x5": "Transform"}[path.suffix]
    with h5py.File(path, "a") as file:
        group = file["TransformGroup/0"]
        del group[entry]
        replace(group, entry, folder)
    return path


def _never_written(group, entry, _):
    group.create_dataset(entry, (10**12,), "f8", chunks=(10**6,), compression="gzip")


def _hardly_written(group, entry, _):
    options = {"chunks": (10**6,), "compression": "gzip"}
    group.create_dataset(entry, (10**9,), "u1", **options)[0] = 1


def _in_another_file(group, entry, folder):
    with h5py.File(folder / "other.h5", "w") as file:
        file["own"] = np.r_[np.eye(3).ravel(), 7.0, 8, 9]
    group[entry] = h5py.ExternalLink(str(folder / "other.h5"), "own")


def _external(group, entry, folder):
    np.r_[np.eye(3).ravel(), 7.0, 8, 9].tofile(folder / "raw")
    group.create_dataset(entry, (12,), "f8", external=[(str(folder / "raw"), 0, 96)])


def _virtual(group, entry, folder):
    with h5py.File(folder / "other.h5", "w") as file:
        file["own"] = np.r_[np.eye(3).ravel(), 7.0, 8, 9]
    layout = h5py.VirtualLayout((12,), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "own", (12,))
    group.create_virtual_dataset(entry, layout)


def _soft(group, entry, _):
    group[entry] = h5py.SoftLink("/elsewhere")


def _pairs(group, entry, _):
    group[entry] = np.zeros(12, [("a", "f8"), ("b", "f8")])


def _long_texts(group, entry, _):
    group.create_dataset(entry, (10**9,), h5py.string_dtype(), chunks=(10**6,))


def _inside_itself(group, entry, _):
    group[entry] = np.zeros(12)
    group["again"] = group


def _many(group, entry, _):
    group[entry] = np.zeros(12)
    group.create_dataset("a", ((3 << 28) // 500,), "u1", compression="gzip")[:] = 0
    for n in range(501):
        group[f"again {n}"] = group["a"]


CONTAINERS = {
    "never written": (_never_written, "are in"),
    "hardly written": (_hardly_written, "are in"),
    "external link": (_in_another_file, "link"),
    "external": (_external, "other files"),
    "virtual": (_virtual, "other files"),
    "soft link": (_soft, "link"),
    "records": (_pairs, "something else"),
    "long texts": (_long_texts, "longer texts"),
    "inside itself": (_inside_itself, "groups and datasets"),
    "the same numbers many times": (_many, "numbers, over"),
}


@pytest.mark.parametrize("name", ["a.h5", "a.x5"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_files_that_must_not_be_read(tmp_path, name, kind):
    replace, words = CONTAINERS[kind]
    path = _numbers_of(name, tmp_path, replace)
    with pytest.raises(ValueError, match=f"is refused.*{words}"):
        read_transform(path)


def test_a_field_of_zeros_is_read(tmp_path):
    """In one piece, as deflate packs it best."""
    field = Displacements(np.zeros((60, 60, 60, 3)), np.eye(4))
    path = tmp_path / "a.h5"
    write_itk(path, field)
    numbers = field.field.ravel()
    with h5py.File(path, "a") as file:
        group = file["TransformGroup/0"]
        del group["TransformParameters"]
        found = group.create_dataset(
            "TransformParameters",
            data=numbers,
            chunks=numbers.shape,
            compression="gzip",
            compression_opts=9,
        )
        assert numbers.nbytes > 950 * found.id.get_storage_size()
    (found,) = read_itk(path)
    assert_array_equal(found.field, field.field)


@pytest.mark.parametrize("name", ["a.h5", "a.x5", "a.mat"])
def test_damaged_files_are_called_so(tmp_path, name):
    """Wherever they are cut."""
    fmt = "itk" if name == "a.mat" else None
    write_transform(tmp_path / name, MATRIX, static=STATIC, moving=MOVING, fmt=fmt)
    whole = (tmp_path / name).read_bytes()
    for length in range(0, len(whole), max(len(whole) // 40, 1)):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read|do not fit"):
            read_transform(tmp_path / name, fmt=fmt)


@pytest.mark.parametrize("packed", [False, True])
def test_other_versions_of_matlab(tmp_path, packed):
    columns = {"AffineTransform_double_3_3": np.eye(12)[:, :1], "fixed": np.zeros(3)}
    path = tmp_path / "a.mat"
    savemat(path, columns, format="5", do_compression=packed)
    with pytest.raises(ValueError, match="version .*-v4"):
        read_transform(path, fmt="itk")


def test_newest_version_of_matlab(tmp_path):
    head = b"MATLAB 7.3 MAT-file".ljust(116) + bytes(8) + b"\0\2IM"
    (tmp_path / "a.mat").write_bytes(head.ljust(512, b"\0"))
    with pytest.raises(ValueError, match="version .*-v4"):
        read_transform(tmp_path / "a.mat", fmt="itk")


def test_more_numbers_than_a_file_of_matlab_is_long(tmp_path):
    head = np.array([0, 2**31 - 1, 2**31 - 1, 0, 2], "<i4").tobytes()
    (tmp_path / "a.mat").write_bytes(head + b"A\0" + bytes(10))
    with pytest.raises(ValueError, match="more numbers|cannot be read"):
        read_transform(tmp_path / "a.mat", fmt="itk")


def test_letters_are_no_parameters(tmp_path):
    path = tmp_path / "a.mat"
    columns = {"AffineTransform_double_3_3": "abcdefghijkl", "fixed": [0.0]}
    savemat(path, columns, format="4")
    with pytest.raises(ValueError, match="do not fit"):
        read_transform(path, fmt="itk")


def test_a_list_is_no_composite(tmp_path):
    path = tmp_path / "a.txt"
    sitk.WriteTransform(sitk.CompositeTransform([_affine(), _zyx()]), str(path))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[3:]]))
    with pytest.raises(ValueError, match="no composite"):
        read_itk(path)


def test_maps_need_both_grids(tmp_path):
    write_transform(tmp_path / "w.h5", deformation())
    with pytest.raises(ValueError, match="moving image is needed"):
        read_transform(tmp_path / "w.h5", static=STATIC)
    with pytest.raises(ValueError, match="2 dimensions"):
        read_transform(tmp_path / "w.h5", **PLANES)


def test_a_way_back_that_is_none_warns(tmp_path):
    """A field that folds has no inverse."""
    path = tmp_path / "w.nii.gz"
    sitk.WriteImage(_displacements(40).GetDisplacementField(), str(path))
    with pytest.warns(UserWarning, match="folds"):
        read_transform(path, static=STATIC, moving=MOVING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sitk.WriteImage(_displacements().GetDisplacementField(), str(path))
        read_transform(path, static=STATIC, moving=MOVING)


def test_exact_digits_of_text(tmp_path):
    path = tmp_path / "a.tfm"
    matrix = MATRIX + np.pad(np.full((3, 4), np.pi / 1e4), [(0, 1), (0, 0)])
    write_transform(path, matrix)
    assert_array_equal(read_transform(path), matrix)
