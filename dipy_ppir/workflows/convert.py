"""The command ``dipy_ppir_convert_transform``, as a DIPY workflow."""

from functools import partial
import logging
from pathlib import Path

from dipy_ppir.align.transformfiles import (
    FORMATS,
    format_to_read,
    format_to_write,
    read_transform,
    write_transform,
)
from dipy_ppir.workflows import inputs
from dipy_ppir.workflows.flow import OutputFilesFlow, check_name
from dipy_ppir.workflows.grids import read_grid
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.outputs import OutputFiles, new_folders

logger = logging.getLogger("dipy_ppir")


class ConvertTransformFlow(OutputFilesFlow):
    """Write a transform in the form of another program; nothing is secret here."""

    def run(
        self,
        transform_file,
        result_file,
        static="",
        moving="",
        inverse=False,
        from_format="",
        to_format="",
        out_dir="",
        debug=False,
    ):
        """Write a transform in the form that another program reads.

        Transforms take points of the static image to points of the moving one, which
        is what brings the moving image onto the static image's grid. Formats are
        'dipy' (affine.txt, displacement_field.nii.gz), 'itk' (ANTs, 3D Slicer,
        SimpleITK), 'x5', 'fsl' (flirt, fnirt) and 'lta' (FreeSurfer, matrices only).

        Parameters
        ----------
        transform_file : string or Path
            The transform: affine.txt or displacement_field.nii.gz of a registration,
            or a file of ITK (.txt, .tfm, .mat, .h5, .nii.gz with vectors), X5 (.x5),
            FSL (matrix as .mat, displacements as .nii.gz) or FreeSurfer (.lta).
        result_file : string or Path
            What to write. The ending says the format: .tfm and .h5 (ITK), .x5, .lta;
            for .txt, .mat and .nii.gz give --to_format.
        static : string or Path, optional
            The static image, of which only the grid is used, or the receipt
            (receipt.json) of the registration. Needed for maps, and for 'fsl', 'lta'
            and 'x5'.
        moving : string or Path, optional
            The moving image, likewise.
        inverse : boolean, optional
            Write the inverse, which brings the static image onto the moving image's
            grid.
        from_format : string, optional
            Format of the transform, by default what the file is. Needed for matrices
            of FSL's in files that do not end in .mat.
        to_format : string, optional
            Format to write: 'dipy', 'itk', 'x5', 'fsl' or 'lta'.
        out_dir : string or Path, optional
            Directory to save the result in.
        debug : boolean, optional
            On an error also show where in the program it occurred.
        """
        check_name(result_file, "result_file")
        before = _format(format_to_read, transform_file, from_format, "from")
        after = _format(format_to_write, result_file, to_format, "to")
        images = {"static": static, "moving": moving}
        grids = {n: read_grid(f, n) for n, f in images.items() if str(f).strip()}
        found = inputs.explain(
            partial(read_transform, fmt=before, **grids), transform_file
        )
        file = Path(out_dir or ".", result_file)
        read = [transform_file, *(f for f in images.values() if str(f).strip())]
        with (
            new_folders([file]),
            OutputFiles([file], read, force=self._force_overwrite) as out,
        ):
            write = partial(write_transform, inverse=inverse, fmt=after, **grids)
            temporary = out.temporary(file)
            try:
                write(temporary, found)
            except ValueError as exc:
                raise InputError(str(exc).replace(str(temporary), str(file))) from None
            out.commit()
        logger.info("Saved %s (%s, from %s)", file, after, before)


def _format(find, file, given, which):
    """The format that a flag or the file says."""
    given = str(given).lower() or None
    if given is not None and given not in FORMATS:
        raise InputError(
            f"--{which}_format {given} is not known; choose one of {', '.join(FORMATS)}"
        )
    try:
        return find(file, given)
    except ValueError as exc:
        hint = f" with --{which}_format" if "does not say" in str(exc) else ""
        raise InputError(f"{exc}{hint}") from None
