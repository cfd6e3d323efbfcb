"""Transforms in the files of ITK, which ANTs, 3D Slicer and SimpleITK read and write.

ITK's coordinates point to the left and to the back (LPS) where DIPY's point to the
right and to the front (RAS): both change the sign of the first two axes, mm. In either
a transform takes points of the fixed (static) image to points of the moving one.

A file holds transforms, each with a name, parameters and fixed parameters:

- a text file (.txt, .tfm) line by line, with all digits;
- a MATLAB file of version 4 (.mat), one transform, as ANTs writes;
- an HDF5 file (.h5), where a composite comes before its parts, of which the *last* is
  applied first;
- an image of vectors (.nii.gz), a displacement field in LPS.

Written here rather than by nitransforms, which (25.1) writes six digits into text,
reads them in single precision, writes no HDF5, reads composites of it only, and reads
no rotations and no fields of one slice.
"""

from dataclasses import dataclass
from pathlib import Path
import re

import h5py
import nibabel as nib
from nibabel.affines import from_matvec, voxel_sizes
import numpy as np
from scipy.io import loadmat, savemat
from scipy.spatial.transform import Rotation

from dipy_ppir.align.containers import BROKEN, check_hdf5, check_mat

#: Endings of files for matrices and for displacement fields.
MATRIX_FILES = (".txt", ".tfm", ".mat", ".h5")
FIELD_FILES = (".h5", ".nii.gz", ".nii")
#: How text files begin.
BANNER = "#Insight Transform File V1.0"
_GROUP = "TransformGroup"
#: ITK before 5.0 left out a letter.
_SPELLINGS = ("Transform", "Tranform")


@dataclass
class Displacements:
    """A displacement field, of points x + field(x), in RAS world coordinates.

    Parameters
    ----------
    field : array, shape (S, R, C, 3) or (R, C, 2)
        mm.
    grid2world : array, shape (dim + 1, dim + 1)
        voxel-to-space transformation of the field.
    """

    field: np.ndarray
    grid2world: np.ndarray


def flip(dim):
    """The matrix between LPS and RAS, its own inverse, shape (dim + 1, dim + 1)."""
    return np.diag([-1.0, -1.0, *np.ones(dim - 1)])


def write_itk(path, step):
    """Write one transform in the form that the name's ending says.

    Parameters
    ----------
    path : str or Path
        ends in one of `MATRIX_FILES` or `FIELD_FILES`.
    step : array, shape (dim + 1, dim + 1), or Displacements
        from static to moving world coordinates, RAS, mm.

    Raises
    ------
    ValueError
        if the ending does not fit, or ITK has no such grid.
    """
    path, field = Path(path), isinstance(step, Displacements)
    check_ending(path, field=field)
    if field and path.name.endswith((".nii", ".nii.gz")):
        _write_image(path, step)
    elif path.suffix == ".h5":
        _write_hdf5(path, *(_field_record(step) if field else _record(step)))
    elif path.suffix == ".mat":
        name, parameters, fixed = _record(step)
        columns = {name: parameters[:, None], "fixed": fixed[:, None]}
        savemat(path, columns, format="4")
    else:
        path.write_text(_text(*_record(step)))


def check_ending(path, *, field):
    """Refuse a name of a file that ITK would not read as what is in it."""
    endings = FIELD_FILES if field else MATRIX_FILES
    if not str(path).endswith(endings):
        what = "displacement field" if field else "matrix"
        raise ValueError(
            f"{path}: a {what} of ITK's needs a name that ends in "
            f"{' or '.join(endings)}"
        )


def read_itk(path):
    """Read the transforms of a file.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    steps : list of array or Displacements
        in the order in which they are applied, see `write_itk`.

    Raises
    ------
    ValueError
        if there are none, of a kind that is not known here, or in a file that must not
        be read (`containers`).
    """
    path = Path(path)
    if path.name.endswith((".nii", ".nii.gz")):
        return [_read_image(path)]
    read = {".h5": _read_hdf5, ".mat": _read_mat}.get(path.suffix, _read_text)
    check = {".h5": check_hdf5, ".mat": check_mat}.get(path.suffix)
    if check:
        check(path)
    try:
        records = read(path)
    except (FileNotFoundError, PermissionError):
        raise
    except BROKEN as exc:
        raise ValueError(
            f"{path} cannot be read as a transform of ITK's; write it again, as .h5 or "
            "as text"
        ) from exc
    if records and records[0][0].startswith("CompositeTransform"):
        records = records[:0:-1]
    elif len(records) > 1:
        raise ValueError(
            f"{path} holds {len(records)} transforms that are no composite, and so no "
            "order; write them as a composite, or one by one"
        )
    if not records:
        raise ValueError(f"{path} holds no transform; write it again")
    return [_step(path, *record) for record in records]


def is_itk_text(path):
    """Whether a text file begins as those of ITK do."""
    with open(path, "rb") as stream:
        return stream.read(len(BANNER)) == BANNER.encode()


# -- matrices ---------------------------------------------------------------


def _record(matrix):
    """Name, parameters and fixed parameters of a matrix."""
    dim = len(matrix) - 1
    lps = flip(dim) @ matrix @ flip(dim)
    name = f"AffineTransform_double_{dim}_{dim}"
    return name, np.r_[lps[:dim, :dim].ravel(), lps[:dim, dim]], np.zeros(dim)


def _text(name, parameters, fixed):
    lines = [
        BANNER,
        "#Transform 0",
        f"Transform: {name}",
        "Parameters: " + " ".join(f"{x:.17g}" for x in parameters),
        "FixedParameters: " + " ".join(f"{x:.17g}" for x in fixed),
    ]
    return "\n".join(lines) + "\n"


def _step(path, name, parameters, fixed):
    """The step that a name and its numbers stand for."""
    found = re.fullmatch(r"(\w+?)_(?:double|float)_([23])_\2", name)
    known = found and found[1] in (*_MATRICES, "DisplacementFieldTransform")
    if not known:
        raise ValueError(
            f"{path} holds a {name[:60]!r}, which cannot be converted; make a "
            "displacement field of it, for example by SimpleITK's "
            "TransformToDisplacementField"
        )
    dim = int(found[2])
    try:
        if {parameters.dtype.kind, fixed.dtype.kind} - set("iuf"):
            raise ValueError("not numbers")
        parameters = np.asarray(parameters, dtype=np.float64)
        fixed = np.asarray(fixed, dtype=np.float64)
        if found[1] == "DisplacementFieldTransform":
            return _field_of(dim, parameters, fixed)
        linear, shift = _MATRICES[found[1]](dim, parameters, fixed)
        center = np.zeros(dim)
        if fixed.size >= dim:
            center = fixed[:dim]
        lps = from_matvec(linear, shift + center - linear @ center)
    except (ValueError, IndexError, MemoryError):
        raise ValueError(
            f"the numbers of the {name} in {path} do not fit it; write it again"
        ) from None
    if not np.isfinite(lps).all() or abs(np.linalg.det(linear)) < 1e-12:
        raise ValueError(f"the matrix in {path} cannot be inverted; write it again")
    return flip(dim) @ lps @ flip(dim)


def _affine(dim, p, fixed):
    return p[:-dim].reshape(dim, dim), p[-dim:]


def _translation(dim, p, fixed):
    return np.eye(dim), p.reshape(dim)


def _identity(dim, p, fixed):
    return np.eye(dim), np.zeros(dim)


def _euler_2d(dim, p, fixed):
    angle, *shift = p
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin], [sin, cos]]), np.reshape(shift, 2)


def _euler_3d(dim, p, fixed):
    x, y, z = (Rotation.from_euler(axis, p["xyz".index(axis)]) for axis in "xyz")
    turn = z * y * x if fixed[dim:].any() else z * x * y
    return turn.as_matrix(), p[3:6].reshape(3)


def _versor(dim, p, fixed):
    scale = p[6] if p.size > 6 else 1.0
    real = np.sqrt(max(1 - p[:3] @ p[:3], 0))
    return scale * Rotation.from_quat([*p[:3], real]).as_matrix(), p[3:6].reshape(3)


#: Names of linear transforms to functions of dimension and parameters, which return
#: the linear part and the shift; both are about a centre, the fixed parameters.
_MATRICES = {
    "AffineTransform": _affine,
    "MatrixOffsetTransformBase": _affine,
    "TranslationTransform": _translation,
    "IdentityTransform": _identity,
    "Euler2DTransform": _euler_2d,
    "Euler3DTransform": _euler_3d,
    "VersorRigid3DTransform": _versor,
    "Similarity3DTransform": _versor,
}


# -- displacement fields ----------------------------------------------------


def _lps_grid(step):
    """Origin, spacing and directions of a field's grid, LPS."""
    dim = len(step.grid2world) - 1
    lps = flip(dim) @ step.grid2world
    spacing = voxel_sizes(lps)
    return lps[:dim, dim], spacing, lps[:dim, :dim] / spacing


def _in_lps(field):
    """Displacements in the other of the two systems; a copy."""
    return field * np.diag(flip(field.shape[-1]))[:-1].astype(field.dtype)


def _field_record(step):
    """Name, parameters and fixed parameters: components first, then the first axis."""
    dim = step.field.shape[-1]
    origin, spacing, directions = _lps_grid(step)
    shape = step.field.shape[:-1]
    fixed = np.r_[shape, origin, spacing, directions.ravel()]
    values = _in_lps(step.field).transpose([*range(dim)[::-1], dim]).ravel()
    return f"DisplacementFieldTransform_double_{dim}_{dim}", values, fixed


def _field_of(dim, parameters, fixed):
    """Inverse of `_field_record`."""
    shape = fixed[:dim].astype(int)
    origin, spacing = fixed[dim : 2 * dim], fixed[2 * dim : 3 * dim]
    directions = fixed[3 * dim :].reshape(dim, dim)
    field = parameters.reshape(*shape[::-1], dim)
    if not np.isfinite(field).all():
        raise ValueError("not finite")
    field = _in_lps(field.transpose([*range(dim)[::-1], dim]))
    return Displacements(field, flip(dim) @ from_matvec(directions * spacing, origin))


def _write_image(path, step):
    dim = step.field.shape[-1]
    directions = _lps_grid(step)[2]
    if np.abs(directions.T @ directions - np.eye(dim)).max() > 1e-4:
        raise ValueError(
            f"{path}: the grid of the map is sheared, and ITK reads no such images; "
            "use a name that ends in .h5"
        )
    grid2world, axes = np.eye(4), [*range(dim), 3]
    grid2world[np.ix_(axes, axes)] = step.grid2world
    shape = (*step.field.shape[:-1], *[1] * (4 - dim), dim)
    image = nib.Nifti1Image(
        _in_lps(step.field.astype(np.float32)).reshape(shape), grid2world
    )
    # As a vector its numbers are taken as they are, LPS.
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    image.set_qform(grid2world, code=1)
    nib.save(image, path)


def _read_image(path):
    image = nib.load(path)
    shape = image.shape
    if len(shape) != 5 or shape[3] != 1 or shape[4] not in (2, 3):
        raise ValueError(
            f"{path} has shape {shape}, but a displacement field of ITK's has "
            "(X, Y, Z, 1, 3)"
        )
    dim = shape[4]
    if dim == 2 and shape[2] != 1:
        raise ValueError(f"{path} has displacements of two dimensions in three")
    field = np.asarray(image.dataobj).reshape(*shape[:dim], dim)
    if field.dtype.kind not in "iuf" or not np.isfinite(field).all():
        raise ValueError(f"{path} does not hold finite numbers; write it again")
    axes = [*range(dim), 3]
    grid2world = np.asarray(image.affine, dtype=np.float64)[np.ix_(axes, axes)]
    return Displacements(_in_lps(field), grid2world)


# -- containers -------------------------------------------------------------


def _read_text(path):
    text = path.read_text(encoding="utf-8")
    if not text.startswith(BANNER):
        raise ValueError("no banner")
    records = []
    for part in re.split(r"^#Transform \d+$", text, flags=re.MULTILINE)[1:]:
        entries = dict(line.split(":", 1) for line in part.splitlines() if ":" in line)
        numbers = (entries.get(k, "") for k in ("Parameters", "FixedParameters"))
        numbers = (np.array(n.split(), dtype=np.float64) for n in numbers)
        records.append((entries["Transform"].strip(), *numbers))
    return records


def _read_mat(path):
    found = loadmat(path)
    fixed = np.ravel(found.pop("fixed"))
    return [(k, np.ravel(v), fixed) for k, v in found.items() if k[:2] != "__"]


def _write_hdf5(path, name, parameters, fixed):
    with h5py.File(path, "w") as file:
        file["ITKVersion"] = np.array(["5.4.0"], dtype=_TEXT)
        file["HDFVersion"] = np.array([h5py.version.hdf5_version], dtype=_TEXT)
        group = file.create_group(f"{_GROUP}/0")
        group["TransformType"] = np.array([name], dtype=_TEXT)
        group["TransformFixedParameters"] = fixed
        group.create_dataset(
            "TransformParameters", data=parameters, compression=_packed(parameters)
        )


_TEXT = h5py.string_dtype("ascii")


def _packed(parameters):
    return "gzip" if parameters.size > 1000 else None


def _read_hdf5(path):
    records = []
    with h5py.File(path, "r") as file:
        groups = file[_GROUP]
        for number in sorted(groups, key=int):
            group = groups[number]
            name = group["TransformType"][0]
            numbers = [np.zeros(0), np.zeros(0)]
            for i, kind in enumerate(("Parameters", "FixedParameters")):
                for spelling in _SPELLINGS:
                    if spelling + kind in group:
                        numbers[i] = np.asarray(group[spelling + kind])
            records.append((bytes(name).decode(), *numbers))
    return records
