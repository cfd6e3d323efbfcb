"""Interfaces of the commands that register."""

from nipype.interfaces.base import File, TraitedSpec, traits

from dipy_ppir.interfaces.command import (
    OwnFile,
    RegistrationCommand,
    SessionInputSpec,
    levels,
    own_or_remote,
    session_without,
)
from dipy_ppir.workflows.align import SecureImageRegistrationFlow
from dipy_ppir.workflows.freeform import SecureFreeFormRegistrationFlow
from dipy_ppir.workflows.points import SETTLED
from dipy_ppir.workflows.syn import SecureSynRegistrationFlow

_VOLUMES = "volumes of a 4D image, counted from 0 and averaged: 0, 3,4,5 or 3-5"


class ImagesInputSpec(SessionInputSpec):
    """Inputs of the commands that register two images."""

    static_image_files = own_or_remote(0, desc="the static image (NIfTI)")
    moving_image_files = own_or_remote(1, desc="the moving image (NIfTI)")
    static_vol_idx = traits.Str(argstr="--static_vol_idx %s", desc=_VOLUMES)
    moving_vol_idx = traits.Str(argstr="--moving_vol_idx %s", desc=_VOLUMES)
    inv_static = traits.Bool(
        False,
        argstr="--inv_static",
        desc="write the static image on the moving one's grid as well",
    )


class AlignAffineInputSpec(ImagesInputSpec):
    """Inputs of `AlignAffine`."""

    transform = traits.Enum(
        "affine",
        "com",
        "trans",
        "rigid",
        "rigid_isoscaling",
        "rigid_scaling",
        argstr="--transform %s",
        xor=["session"],
        desc="what is looked for: from the centre of mass to a full affine transform",
    )
    metric = traits.Enum(
        "mi",
        "ssd",
        "cc",
        argstr="--metric %s",
        xor=["session"],
        desc="mutual information, squared differences, or local cross-correlation",
    )
    nbins = traits.Range(
        low=6,
        high=512,
        value=32,
        argstr="--nbins %d",
        xor=["session"],
        desc="with mi, bins of the histograms",
    )
    sampling_prop = traits.Range(
        low=1.0,
        high=100.0,
        argstr="--sampling_prop %s",
        xor=["session", "static_mask", "moving_mask"],
        desc="percentage of the voxels that are used, by default all",
    )
    level_iters = levels(
        traits.Range(low=0),
        "level_iters",
        [1000, 500, 100],
        xor=["session"],
        desc="iterations at each level, coarsest first",
    )
    sigmas = levels(
        traits.Range(low=0.0, high=1024.0),
        "sigmas",
        [3.0, 1.0, 0.0],
        xor=["session"],
        desc="smoothing at each level, voxels",
    )
    factors = levels(
        traits.Range(low=1, high=1024),
        "factors",
        [4, 2, 1],
        xor=["session"],
        desc="how many times larger the voxels of each level are",
    )
    progressive = traits.Bool(
        False,
        argstr="--progressive",
        desc="go through translation and rigid steps before the last one",
    )
    save_metric = traits.Bool(
        False,
        argstr="--save_metric",
        xor=["session"],
        desc="write the metric's value at the end (out_quality)",
    )
    static_mask = OwnFile(
        argstr="--static_mask %s",
        xor=["sampling_prop"],
        desc="mask of the static image",
    )
    moving_mask = OwnFile(
        argstr="--moving_mask %s",
        xor=["sampling_prop"],
        desc="mask of the moving image",
    )
    sampling = traits.Enum(
        "urs",
        "gms",
        argstr="--sampling %s",
        xor=["session"],
        requires=["sampling_prop"],
        desc="with ssd, which voxels; gms shows where the moving image has edges",
    )
    seed = traits.Range(
        low=0,
        high=2**63,
        exclude_high=True,
        argstr="--seed %d",
        xor=["session"],
        requires=["sampling_prop"],
        desc="with ssd, of the random voxels",
    )
    precision = traits.Range(
        low=2.0**-10,
        high=1.0,
        argstr="--precision %s",
        xor=["session"],
        desc="with ssd, part of a voxel to which steps are rounded",
    )
    radius = traits.Range(
        low=1,
        high=20,
        argstr="--radius %d",
        xor=["session"],
        desc="with cc, radius of the windows, voxels",
    )
    reveal = traits.Enum(
        "transform",
        "gradient",
        "histogram",
        argstr="--reveal %s",
        xor=["session"],
        desc="what the moving owner learns beside the result; all but the first give "
        "far more away",
    )
    hide_steps = traits.Bool(
        False,
        argstr="--hide_steps",
        xor=["session"],
        desc="show no step but the result, for half more traffic",
    )
    far_apart = traits.Bool(
        False,
        argstr="--far_apart",
        xor=["session"],
        desc="accept images that do not overlap in space",
    )
    limit_bits = traits.Range(
        low=0.0,
        value=20_000.0,
        argstr="--limit_bits %s",
        requires=["session"],
        desc="at the static owner, most bits opened about its image in all sessions",
    )
    out_moved = traits.Str(
        "moved.nii.gz", argstr="--out_moved %s", desc="name of the moved image"
    )
    out_affine = traits.Str(
        "affine.txt", argstr="--out_affine %s", desc="name of the matrix"
    )
    out_quality = traits.Str(
        "quality_metric.txt",
        argstr="--out_quality %s",
        xor=["session"],
        desc="name of the metric's file",
    )
    out_inv_static = traits.Str(
        "inv_static.nii.gz",
        argstr="--out_inv_static %s",
        desc="name of the static image on the moving one's grid",
    )
    out_itk = traits.Str(
        argstr="--out_itk %s",
        desc="name of the matrix as ITK has it: .txt, .tfm, .mat or .h5",
    )
    session = session_without(*SecureImageRegistrationFlow.settled)


class AlignAffineOutputSpec(TraitedSpec):
    """Outputs of `AlignAffine`."""

    out_moved = File(exists=True, desc="the moving image on the static one's grid")
    out_affine = File(
        exists=True, desc="the matrix from static to moving coordinates, mm"
    )
    out_quality = File(exists=True, desc="the metric's value, with save_metric")
    out_inv_static = File(
        exists=True, desc="the static image on the moving one's grid, with inv_static"
    )
    out_itk = File(exists=True, desc="the matrix for ITK and ANTs, where named")
    receipt = File(exists=True, desc="what each party learned")
    report = File(exists=True, desc="page with the result and the receipt")
    checkerboard = File(exists=True, desc="picture of both images")
    contours = File(exists=True, desc="outlines of the one on the other")
    warped_grid = File(
        exists=True, desc="in a session, picture of what the matrix does to this image"
    )


class AlignAffine(RegistrationCommand):
    """Affine registration of two images that two parties hold.

    Runs ``dipy_ppir_align_affine``: three processes of this machine, or with `session`
    the one party that has the image.

    Examples
    --------
    >>> from dipy_ppir.interfaces import AlignAffine
    >>> align = AlignAffine(transform="rigid", sampling_prop=10)
    >>> align.inputs.static_image_files = "static.nii.gz"  # doctest: +SKIP
    >>> align.inputs.moving_image_files = "moving.nii.gz"  # doctest: +SKIP
    >>> align.cmdline  # doctest: +SKIP
    'dipy_ppir_align_affine static.nii.gz moving.nii.gz --sampling_prop 10.0 \
--transform rigid'
    """

    _cmd = "dipy_ppir_align_affine"
    input_spec = AlignAffineInputSpec
    output_spec = AlignAffineOutputSpec
    _optional = {
        "out_quality": "save_metric",
        "out_inv_static": "inv_static",
        "out_itk": "out_itk",
    }
    _of_moving = ("out_moved", "out_quality")
    _pictures = {"checkerboard": "checkerboard.png", "contours": "contours.png"}
    _own_pictures = {"warped_grid": "warped_grid.png"}

    def _written(self):
        names = super()._written()
        # A session file says in place of save_metric whether the value is opened,
        # and its owner has it whoever gets the transform.
        owner = self._is_set("session") and self._image() == "moving"
        if owner and self._plan().parameters.get("ret_metric"):
            names.append("out_quality")
        com = self._is_set("transform") and self.inputs.transform == "com"
        return [n for n in names if not (com and n == "out_quality")]


class DeformableInputSpec(ImagesInputSpec):
    """Inputs of `AlignSyn` and `AlignFreeForm`."""

    prealign_file = OwnFile(
        argstr="--prealign_file %s",
        desc="matrix to start from, as AlignAffine writes it (out_affine)",
    )
    inv_iter = traits.Range(
        low=1,
        value=20,
        argstr="--inv_iter %d",
        xor=["session"],
        desc="most iterations of the inversion of displacements",
    )
    inv_tol = traits.Range(
        low=0.0,
        value=1e-3,
        exclude_low=True,
        argstr="--inv_tol %s",
        xor=["session"],
        desc="error at which the inversion stops",
    )
    out_warped = traits.Str(
        "warped_moved.nii.gz",
        argstr="--out_warped %s",
        desc="name of the warped image",
    )
    out_inv_static = traits.Str(
        "inc_static.nii.gz",
        argstr="--out_inv_static %s",
        desc="name of the static image on the moving one's grid",
    )
    out_field = traits.Str(
        "displacement_field.nii.gz", argstr="--out_field %s", desc="name of the map"
    )
    out_itk = traits.Str(
        argstr="--out_itk %s",
        desc="name of the map as ITK has it: .h5, .nii.gz or .nii",
    )


class DeformableOutputSpec(TraitedSpec):
    """Outputs of `AlignSyn` and `AlignFreeForm`."""

    out_warped = File(exists=True, desc="the moving image on the static one's grid")
    out_inv_static = File(
        exists=True, desc="the static image on the moving one's grid, with inv_static"
    )
    out_field = File(
        exists=True, desc="displacements in both directions, shape (X, Y, Z, 3, 2)"
    )
    out_itk = File(exists=True, desc="the map for ITK and ANTs, where named")
    receipt = File(exists=True, desc="what each party learned")
    report = File(exists=True, desc="page with the result and the receipt")
    checkerboard = File(exists=True, desc="picture of both images")
    contours = File(exists=True, desc="outlines of the one on the other")
    warped_grid = File(exists=True, desc="picture of the deformation")
    jacobian = File(exists=True, desc="picture of its Jacobian")


class _Deformable(RegistrationCommand):
    output_spec = DeformableOutputSpec
    _optional = {"out_inv_static": "inv_static", "out_itk": "out_itk"}
    _of_moving = ("out_warped",)
    _own_pictures = {"warped_grid": "warped_grid.png", "jacobian": "jacobian.png"}
    _pictures = {
        "checkerboard": "checkerboard.png",
        "contours": "contours.png",
        **_own_pictures,
    }


class AlignSynInputSpec(DeformableInputSpec):
    """Inputs of `AlignSyn`."""

    level_iters = levels(
        traits.Range(low=0),
        "level_iters",
        [10, 10, 5],
        xor=["session"],
        desc="iterations at each level, coarsest first",
    )
    metric = traits.Enum(
        "cc",
        "ssd",
        "mind",
        argstr="--metric %s",
        xor=["session"],
        desc="local cross-correlation, squared differences, or those of descriptors "
        "of self-similarity, for images of two modalities",
    )
    mopt_sigma_diff = traits.Range(
        low=0.0,
        high=100.0,
        argstr="--mopt_sigma_diff %s",
        xor=["session"],
        desc="with cc and mind, smoothing of each update, voxels",
    )
    mopt_radius = traits.Range(
        low=1,
        high=20,
        argstr="--mopt_radius %d",
        xor=["session"],
        desc="with cc, radius of the windows, voxels",
    )
    mopt_smooth = traits.Range(
        low=1.0,
        high=100.0,
        argstr="--mopt_smooth %s",
        xor=["session"],
        desc="with ssd, smoothing of each update, voxels",
    )
    step_length = traits.Range(
        low=0.0,
        value=0.25,
        exclude_low=True,
        argstr="--step_length %s",
        xor=["session"],
        desc="longest displacement of an iteration, voxels",
    )
    ss_sigma_factor = traits.Range(
        low=0.0,
        high=100.0,
        argstr="--ss_sigma_factor %s",
        xor=["session"],
        desc="smoothing of the levels",
    )
    opt_tol = traits.Float(
        1e-5,
        argstr="--opt_tol %s",
        xor=["session"],
        desc="slope of the energy at which a level ends",
    )
    reveal = traits.Enum(
        "map",
        "update",
        "force",
        "paper",
        argstr="--reveal %s",
        xor=["session"],
        desc="what the owners learn; all but the first give the images away",
    )
    map_spacing = traits.Range(
        low=2,
        value=3,
        argstr="--map_spacing %d",
        xor=["session"],
        desc="spacing of the grid on which the map is opened, voxels",
    )
    opens = traits.Enum(
        "levels",
        "end",
        argstr="--opens %s",
        xor=["session"],
        desc="when owners are shown their half",
    )
    map_precision = traits.Range(
        low=2.0**-10,
        high=1.0,
        argstr="--map_precision %s",
        xor=["session"],
        desc="to how much of a voxel the map is opened",
    )
    update_spacing = traits.Range(
        low=1,
        argstr="--update_spacing %d",
        xor=["session"],
        desc="with update, spacing of the steps that are opened",
    )
    stride = traits.Range(
        low=1,
        high=2,
        value=1,
        argstr="--stride %d",
        xor=["session"],
        desc="2 computes forces at every second voxel along each axis",
    )
    session = session_without(*SecureSynRegistrationFlow.settled)


class AlignSyn(_Deformable):
    """Diffeomorphic registration (SyN) of two images that two parties hold.

    Runs ``dipy_ppir_align_syn``, see `AlignAffine`.
    """

    _cmd = "dipy_ppir_align_syn"
    input_spec = AlignSynInputSpec


class AlignFreeFormInputSpec(DeformableInputSpec):
    """Inputs of `AlignFreeForm`."""

    level_iters = levels(
        traits.Range(low=0),
        "level_iters",
        [10, 10, 10, 10],
        xor=["session"],
        desc="most iterations at each level, coarsest first",
    )
    factors = levels(
        traits.Range(low=1, high=1024),
        "factors",
        xor=["session"],
        desc="how many times larger the voxels of each level are",
    )
    sigmas = levels(
        traits.Range(low=0.0, high=1024.0),
        "sigmas",
        xor=["session"],
        desc="smoothing at each level, voxels",
    )
    spacing = traits.Range(
        low=2,
        high=32,
        value=5,
        argstr="--spacing %d",
        xor=["session"],
        desc="a control point every so many voxels of a level's grid",
    )
    bending = traits.Range(
        low=0.0,
        high=1000.0,
        value=0.03,
        argstr="--bending %s",
        xor=["session"],
        desc="weight of the bending energy",
    )
    precision = traits.Range(
        low=2.0**-20,
        high=1.0,
        value=0.5,
        argstr="--precision %s",
        xor=["session"],
        desc="to how much of a voxel steps are opened",
    )
    opt_tol = traits.Range(
        low=0.0,
        high=1.0,
        value=0.125,
        argstr="--opt_tol %s",
        xor=["session"],
        desc="a level ends when no control point moves by more, voxels",
    )
    max_step = traits.Range(
        low=0.0,
        high=16.0,
        value=2.0,
        exclude_low=True,
        argstr="--max_step %s",
        xor=["session"],
        desc="longest step of a control point, voxels",
    )
    sampling = traits.Enum(
        "urs",
        "gms",
        argstr="--sampling %s",
        xor=["session"],
        requires=["sampling_prop"],
        desc="which voxels; gms shows where the moving image has edges",
    )
    sampling_prop = traits.Range(
        low=1.0,
        high=100.0,
        argstr="--sampling_prop %s",
        xor=["session"],
        desc="percentage of the voxels that are used, by default all",
    )
    seed = traits.Range(
        low=0,
        high=2**63,
        exclude_high=True,
        argstr="--seed %d",
        xor=["session"],
        requires=["sampling_prop"],
        desc="of the random voxels",
    )
    intensities = traits.List(
        traits.Float,
        minlen=2,
        maxlen=2,
        argstr="--intensities %s",
        xor=["session"],
        desc="the range of both images that counts, the lower end first",
    )
    session = session_without(*SecureFreeFormRegistrationFlow.settled)


class AlignFreeForm(_Deformable):
    """Free-form registration, by cubic B-splines, of two images of one contrast.

    Runs ``dipy_ppir_align_freeform``, see `AlignAffine`.
    """

    _cmd = "dipy_ppir_align_freeform"
    input_spec = AlignFreeFormInputSpec


class AlignPointsInputSpec(SessionInputSpec):
    """Inputs of `AlignPoints`."""

    static_points_file = own_or_remote(
        0, desc="static points, mm: text with one a line, or .npy"
    )
    moving_points_file = own_or_remote(
        1, desc="moving points, as many and in the same order"
    )
    scaling = traits.Bool(
        False, argstr="--scaling", xor=["session"], desc="find a scale as well"
    )
    precision = traits.Range(
        low=1e-9,
        high=1000.0,
        value=0.005,
        argstr="--precision %s",
        xor=["session"],
        desc="by how much rounding may move a point, mm",
    )
    limit_bits = traits.Range(
        low=0.0,
        value=2_000.0,
        argstr="--limit_bits %s",
        requires=["session"],
        desc="most bits opened about this site's points in all sessions",
    )
    out_moved = traits.Str(
        "moved_points.txt", argstr="--out_moved %s", desc="name of the moved points"
    )
    out_matrix = traits.Str(
        "moving_to_static.txt",
        argstr="--out_matrix %s",
        desc="name of the matrix from moving to static points",
    )
    out_affine = traits.Str(
        "affine.txt",
        argstr="--out_affine %s",
        desc="name of its inverse, as for images",
    )
    out_itk = traits.Str(
        argstr="--out_itk %s",
        desc="name of this inverse as ITK has it: .txt, .tfm, .mat or .h5",
    )
    session = session_without(*SETTLED)


class AlignPointsOutputSpec(TraitedSpec):
    """Outputs of `AlignPoints`."""

    out_moved = File(exists=True, desc="the moving points in the static ones' space")
    out_matrix = File(exists=True, desc="the matrix from moving to static points, mm")
    out_affine = File(exists=True, desc="its inverse, as AlignAffine writes it")
    out_itk = File(exists=True, desc="this inverse for ITK and ANTs, where named")
    receipt = File(exists=True, desc="what each party learned")
    report = File(exists=True, desc="page with the result and the receipt")


class AlignPoints(RegistrationCommand):
    """Rigid registration of corresponding points that two parties hold.

    Runs ``dipy_ppir_align_points``, see `AlignAffine`.
    """

    _cmd = "dipy_ppir_align_points"
    input_spec = AlignPointsInputSpec
    output_spec = AlignPointsOutputSpec
    _data = ("static_points_file", "moving_points_file")
    _optional = {"out_itk": "out_itk"}
    _of_moving = ("out_moved",)
