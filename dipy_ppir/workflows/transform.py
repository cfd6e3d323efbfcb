"""The command ``dipy_ppir_apply_transform``, as a DIPY workflow."""

from functools import partial
import logging
from pathlib import Path

from dipy.align.imaffine import AffineMap
from dipy.io.image import save_nifti
import numpy as np

from dipy_ppir.align.mappings import grid_of, mapping_from
from dipy_ppir.align.transformfiles import format_to_read, read_transform
from dipy_ppir.workflows import inputs
from dipy_ppir.workflows.flow import (
    OutputFilesFlow,
    check_name,
    written_files,
)
from dipy_ppir.workflows.grids import read_grid
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.outputs import OutputFiles, new_folders

logger = logging.getLogger("dipy_ppir")


class ApplyTransformFlow(OutputFilesFlow):
    """Transform an image with what a registration found; nothing is secret here."""

    def run(
        self,
        static_image_files,
        moving_image_files,
        transform_map_file,
        transform_type="affine",
        interpolation="linear",
        inverse=False,
        out_dir="",
        out_file="transformed.nii.gz",
        debug=False,
    ):
        """Apply the result of a registration to an image that one has.

        Flags and files are those of dipy_apply_transform. Of the image that is
        not transformed only the grid is used; who does not have it names the receipt
        (receipt.json) of the registration instead.

        Parameters
        ----------
        static_image_files : string or Path
            Path of the static image file, or of any image of the same grid, or the
            receipt of the registration. With --inverse a 4D image is transformed
            volume by volume.
        moving_image_files : string or Path
            Path of the moving image(s). A 4D image is transformed volume by
            volume. With --inverse any image of the same grid, or the receipt.
        transform_map_file : string or Path
            For the affine case, it should be a text(``*.txt``) file containing
            the affine matrix. For the diffeomorphic case, it should be a nifti
            file containing the mapping displacement field in each voxel with
            this shape (x, y, z, 3, 2). Or a file of another program, see
            dipy_ppir_convert_transform; this says itself which type it is, as
            nifti files do. FSL's are to be converted first.
        transform_type : string, optional
            Select the transformation type to apply between 'affine' or
            'diffeomorphic'.
        interpolation : string, optional
            The type of interpolation to be used, either 'linear' (for k-linear
            interpolation) or 'nearest' for nearest neighbor.
        inverse : boolean, optional
            Bring the static image to the moving image's grid instead.
        out_dir : string or Path, optional
            Directory to save the transformed files.
        out_file : string, optional
            Name of the transformed file. It is recommended to use the flag
            --mix_names to prevent the output files from being overwritten.
        debug : boolean, optional
            On an error also show where in the program it occurred.
        """
        kind, interpolation = transform_type.lower(), interpolation.lower()
        if kind not in ("affine", "diffeomorphic"):
            raise InputError(
                f"--transform_type {transform_type} is not known; choose 'affine' or "
                "'diffeomorphic'"
            )
        if interpolation not in ("linear", "nearest"):
            raise InputError(
                f"--interpolation {interpolation} is not known; choose 'linear' or "
                "'nearest'"
            )
        check_name(out_file, "out_file", (".nii", ".nii.gz"))
        with new_folders([Path(out_dir or ".", out_file)]):
            given = static_image_files, moving_image_files, transform_map_file
            rows = self.rows(given, out_dir, [out_file])
            jobs = [(row[:3], {"out": Path(row[3])}) for row in rows]
            read = [f for job, _ in jobs for f in job]
            written = written_files(jobs)
            with OutputFiles(written, read, force=self._force_overwrite) as out:
                for job, files in jobs:
                    image, grid2world = _apply(*job, kind, interpolation, inverse)
                    # nibabel wants to be told that 64-bit integers are meant.
                    save_nifti(
                        out.temporary(files["out"]),
                        image,
                        grid2world,
                        dtype=image.dtype,
                    )
                out.commit()
            for file in written:
                logger.info("Saved %s", file)


def _apply(static_file, moving_file, transform_file, kind, interpolation, inverse):
    """The transformed image and its grid."""
    files = {"static": static_file, "moving": moving_file}
    grids = {name: read_grid(file, name) for name, file in files.items()}
    name = "static" if inverse else "moving"
    if Path(files[name]).suffix == ".json":
        raise InputError(
            f"a receipt stands for the grid of an image; give the {name} image itself, "
            "which is transformed"
        )
    image = inputs.read_nifti(files[name], f"the {name} image")[0]
    if image.ndim not in (3, 4):
        raise InputError(
            f"the images {static_file} and {moving_file} need three dimensions, or "
            "four for a series"
        )
    mapping = _mapping(transform_file, kind, **grids)
    transform = mapping.transform_inverse if inverse else mapping.transform
    # DIPY warps some kinds of numbers only; these hold every label exactly.
    volumes = image.astype(np.float64)
    volumes = volumes[..., None] if image.ndim == 3 else volumes
    volumes = np.stack(
        [
            np.asarray(
                transform(
                    np.ascontiguousarray(volumes[..., i]), interpolation=interpolation
                )
            )
            for i in range(volumes.shape[3])
        ],
        axis=-1,
    )
    result = volumes[..., 0] if image.ndim == 3 else volumes
    if interpolation == "nearest":
        result = result.astype(image.dtype)
    return result, grids["moving" if inverse else "static"].grid2world


def _mapping(file, kind, static, moving):
    """What brings the moving image onto the static one's grid, and back."""
    if _of_others(file):
        found = inputs.explain(
            partial(read_transform, static=static, moving=moving), file
        )
    elif kind == "affine" and not str(file).endswith((".nii", ".nii.gz")):
        found = inputs.load_matrix(file, "the affine matrix")
    else:
        data, affine = inputs.read_nifti(file, "the displacement field")
        grids = {"static": grid_of(static), "moving": grid_of(moving)}
        read = partial(mapping_from, what=f"the displacement field {file}", **grids)
        found = inputs.explain(read, data, affine)
    if not isinstance(found, np.ndarray):
        return found
    return AffineMap(
        found,
        domain_grid_shape=static.shape,
        domain_grid2world=static.grid2world,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=moving.grid2world,
    )


def _of_others(file):
    """Whether a transform is in a file that another program wrote.

    A field of one direction may as well be a mistake as FSL's.
    """
    try:
        return format_to_read(file) in ("itk", "x5", "lta")
    except (ValueError, OSError):
        return False  # who reads it says so
