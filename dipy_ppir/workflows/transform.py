"""The command ``dipy_ppir_apply_transform``, as a DIPY workflow."""

import logging
from pathlib import Path

from dipy.align.imaffine import AffineMap
from dipy.io.image import save_nifti
import numpy as np

from dipy_ppir.workflows import inputs
from dipy_ppir.workflows.flow import (
    OutputFilesFlow,
    check_name,
    written_files,
)
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.mapping import load_mapping
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
        not transformed only the grid is used.

        Parameters
        ----------
        static_image_files : string or Path
            Path of the static image file, or of any image of the same grid.
        moving_image_files : string or Path
            Path of the moving image(s). A 4D image is transformed volume by
            volume.
        transform_map_file : string or Path
            For the affine case, it should be a text(``*.txt``) file containing
            the affine matrix. For the diffeomorphic case, it should be a nifti
            file containing the mapping displacement field in each voxel with
            this shape (x, y, z, 3, 2).
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
    static, static_grid2world = inputs.read_nifti(static_file, "the static image")
    moving, moving_grid2world = inputs.read_nifti(moving_file, "the moving image")
    for name, data in (("static", static), ("moving", moving)):
        if data.dtype.kind not in "biuf":
            raise InputError(
                f"the {name} image must hold real numbers, not {data.dtype}; convert it"
            )
    image = static if inverse else moving
    if image.ndim not in (3, 4) or static.ndim < 3 or moving.ndim < 3:
        raise InputError(
            f"the images {static_file} and {moving_file} need three dimensions, or "
            "four for a series"
        )
    grids = (
        static.shape[:3],
        static_grid2world,
        moving.shape[:3],
        moving_grid2world,
    )
    if kind == "affine":
        mapping = AffineMap(
            inputs.load_matrix(transform_file, "the affine matrix"),
            domain_grid_shape=grids[0],
            domain_grid2world=grids[1],
            codomain_grid_shape=grids[2],
            codomain_grid2world=grids[3],
        )
    else:
        mapping = load_mapping(transform_file, *grids)
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
    return result, moving_grid2world if inverse else static_grid2world
