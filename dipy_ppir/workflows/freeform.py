"""The command ``dipy_ppir_align_freeform``, as a DIPY workflow."""

from dipy_ppir.align import freeform_registration
from dipy_ppir.align.freeform import SecureFreeFormRegistration
from dipy_ppir.align.parameters import FREEFORM, FreeFormParameters
from dipy_ppir.mpc.session import PARTIES
from dipy_ppir.workflows import inputs
from dipy_ppir.workflows.progress import deformation_callback
from dipy_ppir.workflows.registration import load_images
from dipy_ppir.workflows.syn import SecureSynRegistrationFlow


class SecureFreeFormRegistrationFlow(SecureSynRegistrationFlow):
    """Free-form registration of two images that two parties hold.

    Writes the files of ``dipy_ppir_align_syn``.
    """

    operation = "freeform"
    settled = (
        "level_iters",
        "factors",
        "sigmas",
        "spacing",
        "bending",
        "precision",
        "opt_tol",
        "max_step",
        "sampling",
        "sampling_prop",
        "seed",
        "intensities",
        "inv_iter",
        "inv_tol",
        "parties",
    )
    spelling = {"sampling_proportion": "sampling_prop"}

    def run(
        self,
        static_image_files,
        moving_image_files,
        prealign_file="",
        inv_static=False,
        level_iters=FREEFORM.level_iters,
        factors=None,
        sigmas=None,
        spacing=FREEFORM.spacing,
        bending=FREEFORM.bending,
        precision=FREEFORM.precision,
        opt_tol=FREEFORM.opt_tol,
        max_step=FREEFORM.max_step,
        sampling=FREEFORM.sampling,
        sampling_prop=None,
        seed=FREEFORM.seed,
        intensities=None,
        inv_iter=FREEFORM.inv_iter,
        inv_tol=FREEFORM.inv_tol,
        static_vol_idx=None,
        moving_vol_idx=None,
        out_dir="",
        out_warped="warped_moved.nii.gz",
        out_inv_static="inc_static.nii.gz",
        out_field="displacement_field.nii.gz",
        out_itk="",
        receipt="receipt.json",
        report="report.html",
        no_pictures=False,
        parties=PARTIES,
        session="",
        identity="",
        listen="",
        resume=False,
        strict=False,
        debug=False,
    ):
        """Register two images by a cubic B-spline, without showing either.

        The sum of squared differences decides: for images of the same contrast. With
        two images, processes on this machine play the image owners and
        a helper, and run the protocol that separate sites run. With --session and
        the word remote in place of the image that another site has, this is one
        party of a session between sites. Output files are those of
        dipy_align_syn. The pre-aligning matrix is part of the displacement field, so
        that it is all that dipy_ppir_apply_transform and dipy_apply_transform need.

        Parameters
        ----------
        static_image_files : string or Path
            Path of the static image file (NIfTI).
        moving_image_files : string or Path
            Path to the moving image file (NIfTI).
        prealign_file : string or Path, optional
            The text file containing pre alignment information via an affine
            matrix, as dipy_ppir_align_affine writes it.
        inv_static : boolean, optional
            Apply the inverse mapping to the static image, and save it on the
            moving image's grid.
        level_iters : variable int, optional
            Most iterations at each level, coarsest first.
        factors : variable int, optional
            How many times larger the voxels of each level are than those of the
            static image; the last must be 1. None (the default) halves them from
            level to level.
        sigmas : variable float, optional
            Standard deviations of the Gaussian that smooths both images at each
            level, in voxels of the static image. None (the default) is half the
            factors, and 0 at the last level.
        spacing : int, optional
            A control point every so many voxels of a level's grid.
        bending : float, optional
            Weight of the bending energy.
        precision : float, optional
            To how much of a voxel of the static image the moving owner is shown
            the steps of the control points. Coarser ones hide more.
        opt_tol : float, optional
            A level ends when no control point moves by more, in voxels of the
            level.
        max_step : float, optional
            Longest step of a control point, in voxels of the level.
        sampling : string, optional
            Which voxels are sampled: 'urs', uniformly random, or 'gms', with
            probabilities as the gradient of the moving image. The latter shows the
            static owner where the moving image has edges.
        sampling_prop : float, optional
            Percentage of the voxels that are used, from 1 to 100, others at each
            iteration. None (the default) or 100 uses all.
        seed : int, optional
            Of the samples.
        intensities : variable float, optional
            The range of both images that counts, the lower end first. None (the
            default) lets each owner take its own, without the smallest and the
            largest half percent.
        inv_iter : int, optional
            The number of iterations to be performed by the displacement field
            inversion algorithm.
        inv_tol : float, optional
            The displacement field inversion algorithm will stop iterating
            when the inversion error falls below this threshold.
        static_vol_idx : str, optional
            Volumes of a 4D `static` input, counted from 0 and averaged:
            `0`, `3,4,5` or `3-5`. This input is required for 4D volumes.
        moving_vol_idx : str, optional
            Volumes of a 4D `moving` input, counted from 0 and averaged:
            `0`, `3,4,5` or `3-5`. This input is required for 4D volumes.
        out_dir : string or Path, optional
            Directory to save the transformed files.
        out_warped : string, optional
            Name of the warped file.
        out_inv_static : string, optional
            Name of the file to save the static image after applying the
            inverse mapping.
        out_field : string, optional
            Name of the file to save the map: displacements, mm, RAS+, from moving to
            static space and back.
        out_itk : string, optional
            Name of a file for the map in the form of ITK and ANTs, from static to
            moving space, which ends in .h5, .nii.gz or .nii. Not written without a
            name.
        receipt : string, optional
            Name of the JSON file that states what each party learned.
        report : string, optional
            Name of the page (HTML) that shows the result and what each party learned;
            made with the pictures, if jinja2 and matplotlib are installed.
        no_pictures : boolean, optional
            Write neither the report nor the pictures checkerboard.png, contours.png,
            warped_grid.png and jacobian.png (made if matplotlib is installed; at a
            site of a session the latter two, on its own image).
        parties : int, optional
            With both images here, how many parties there are: 3, for two owners
            and a helper, or 2, for two owners alone, who compute on encrypted numbers.
        session : string or Path, optional
            Session file (TOML) of a registration between sites; write "remote" in
            place of the image that this site does not have.
        identity : string or Path, optional
            Folder of this site's key, by default ~/.dipy_ppir.
        listen : string, optional
            Address to listen on, host:port; by default all of this machine, at the
            port in the session file.
        resume : boolean, optional
            Go on with a session that was interrupted; all parties must say so.
        strict : boolean, optional
            End with an error, and write no result, where it is not plausible; without
            it a warning is given and is in the receipt.
        debug : boolean, optional
            On an error also show where in the program it occurred.
        """
        self.register(locals())

    def parameters(self, flags):
        """See `RegistrationFlow`."""
        given = {
            name: flags[self.spelling.get(name, name)]
            for name in FreeFormParameters.model_fields
            if self.spelling.get(name, name) in flags
        }
        given["sampling_proportion"] = inputs.proportion_of(flags["sampling_prop"])
        return self.checked(FreeFormParameters, **given)

    def load(self, paths, flags, parameters):
        """See `RegistrationFlow`."""
        prealign = None
        if str(flags["prealign_file"]).strip():
            prealign = inputs.load_matrix(flags["prealign_file"], "the prealign file")
        images = load_images(paths, flags, "freeform_registration")
        check = SecureFreeFormRegistration(**parameters.plain()).check
        inputs.explain(check, images, prealign)
        return {**images, "prealign": prealign}

    def compute(self, images, parameters, progress, wanted, **options):
        """See `RegistrationFlow`."""
        return freeform_registration(
            images["moving"],
            images["static"],
            moving_affine=images["moving_grid2world"],
            static_affine=images["static_grid2world"],
            prealign=images["prealign"],
            callback=deformation_callback(progress),
            ret_receipt=True,
            **parameters.plain(),
            **options,
        )
