"""Interfaces that apply what a registration found, or write it for other programs."""

from nipype.interfaces.base import File, TraitedSpec, traits

from dipy_ppir.interfaces.command import CommandInputSpec, OwnFile, PpirCommand


class ApplyTransformInputSpec(CommandInputSpec):
    """Inputs of `ApplyTransform`."""

    static_image_files = OwnFile(
        argstr="%s",
        position=0,
        mandatory=True,
        desc="the static image, or any image of the same grid",
    )
    moving_image_files = OwnFile(
        argstr="%s", position=1, mandatory=True, desc="the moving image"
    )
    transform_map_file = OwnFile(
        argstr="%s",
        position=2,
        mandatory=True,
        desc="out_affine or out_field of a registration",
    )
    transform_type = traits.Enum(
        "affine",
        "diffeomorphic",
        argstr="--transform_type %s",
        desc="which of them it is",
    )
    interpolation = traits.Enum(
        "linear", "nearest", argstr="--interpolation %s", desc="nearest is for labels"
    )
    inverse = traits.Bool(
        False,
        argstr="--inverse",
        desc="bring the static image to the moving one's grid instead",
    )
    out_file = traits.Str(
        "transformed.nii.gz",
        argstr="--out_file %s",
        desc="name of the transformed image",
    )


class ApplyTransformOutputSpec(TraitedSpec):
    """Outputs of `ApplyTransform`."""

    out_file = File(exists=True, desc="the transformed image")


class ApplyTransform(PpirCommand):
    """Transform an image that one has with the result of a registration.

    Runs ``dipy_ppir_apply_transform``. Nothing is secret here.
    """

    _cmd = "dipy_ppir_apply_transform"
    input_spec = ApplyTransformInputSpec
    output_spec = ApplyTransformOutputSpec


_FORMATS = ("dipy", "itk", "x5", "fsl", "lta")


class ConvertTransformInputSpec(CommandInputSpec):
    """Inputs of `ConvertTransform`."""

    transform_file = OwnFile(
        argstr="%s",
        position=0,
        mandatory=True,
        desc="out_affine or out_field of a registration, or another program's file",
    )
    result_file = traits.Str(
        argstr="%s",
        position=1,
        mandatory=True,
        desc="name of the file to write; .tfm, .h5, .x5 and .lta say its format",
    )
    static = OwnFile(
        argstr="--static %s",
        desc="the static image, of which only the grid is used, or the receipt",
    )
    moving = OwnFile(argstr="--moving %s", desc="the moving image, likewise")
    inverse = traits.Bool(False, argstr="--inverse", desc="write the inverse")
    from_format = traits.Enum(
        *_FORMATS,
        argstr="--from_format %s",
        desc="format of the transform, where the file does not say it",
    )
    to_format = traits.Enum(
        *_FORMATS,
        argstr="--to_format %s",
        desc="format to write, where the name does not say it",
    )


class ConvertTransformOutputSpec(TraitedSpec):
    """Outputs of `ConvertTransform`."""

    result_file = File(exists=True, desc="the transform in the other format")


class ConvertTransform(PpirCommand):
    """Write a transform in the form of another program.

    Runs ``dipy_ppir_convert_transform``. Nothing is secret here.
    """

    _cmd = "dipy_ppir_convert_transform"
    input_spec = ConvertTransformInputSpec
    output_spec = ConvertTransformOutputSpec
