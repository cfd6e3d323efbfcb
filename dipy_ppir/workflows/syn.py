"""The command ``dipy_ppir_align_syn``, as a DIPY workflow."""

import warnings

import numpy as np

from dipy_ppir.align import syn_registration
from dipy_ppir.align.imwarp import registration_from
from dipy_ppir.align.parameters import SYN, SynParameters
from dipy_ppir.mpc.session import PARTIES
from dipy_ppir.workflows import figures, inputs
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.progress import deformation_callback
from dipy_ppir.workflows.registration import RegistrationFlow, load_images
from dipy_ppir.workflows.results import grids_of, save_inverse, save_transform


class SecureSynRegistrationFlow(RegistrationFlow):
    """Diffeomorphic registration of two images that two parties hold.

    Takes the flags of ``dipy_align_syn`` and writes the same files, besides a receipt
    of what each party learned and pictures.
    """

    operation = "syn"
    outputs = {
        "out_warped": "image",
        "out_inv_static": "inverse",
        "out_field": "transform",
        "out_itk": "itk",
    }
    optional = {"inverse": "inv_static", "itk": "out_itk"}
    belongs = {
        "static_vol_idx": "static",
        "moving_vol_idx": "moving",
        "prealign_file": "moving",
        "inv_static": "static",
    }
    also_read = ("prealign_file",)
    settled = (
        "metric",
        "level_iters",
        "mopt_sigma_diff",
        "mopt_radius",
        "mopt_smooth",
        "step_length",
        "ss_sigma_factor",
        "opt_tol",
        "inv_iter",
        "inv_tol",
        "reveal",
        "map_spacing",
        "opens",
        "map_precision",
        "update_spacing",
        "stride",
        "parties",
    )
    spelling = {
        "sigma_diff": "mopt_sigma_diff",
        "radius": "mopt_radius",
        "smooth": "mopt_smooth",
    }
    pictures = figures.SYN_PICTURES
    own_pictures = figures.MAP_PICTURES

    def run(
        self,
        static_image_files,
        moving_image_files,
        prealign_file="",
        inv_static=False,
        level_iters=SYN.level_iters,
        metric="cc",
        mopt_sigma_diff=None,
        mopt_radius=None,
        mopt_smooth=None,
        step_length=SYN.step_length,
        ss_sigma_factor=None,
        opt_tol=SYN.opt_tol,
        inv_iter=SYN.inv_iter,
        inv_tol=SYN.inv_tol,
        static_vol_idx=None,
        moving_vol_idx=None,
        out_dir="",
        out_warped="warped_moved.nii.gz",
        out_inv_static="inc_static.nii.gz",
        out_field="displacement_field.nii.gz",
        out_itk="",
        reveal=SYN.reveal,
        map_spacing=SYN.map_spacing,
        opens=SYN.opens,
        map_precision=None,
        update_spacing=None,
        stride=SYN.stride,
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
        """Register two images by a smooth deformation, without showing either.

        With two images, processes on this machine play the image owners and
        a helper, and run the protocol that separate sites run. With --session and
        the word remote in place of the image that another site has, this is one
        party of a session between sites. Flags and output
        files are those of dipy_align_syn. The pre-aligning matrix is part of
        the displacement field, so that it is all that dipy_ppir_apply_transform
        and dipy_apply_transform need.

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
            The number of iterations at each level of the gaussian pyramid,
            coarsest first.
        metric : string, optional
            The metric to be used: cc (Cross Correlation), ssd (Sum of Squared
            Differences, for intensities that mean the same), or mind (squared
            differences of descriptors of self-similarity, for images of two
            modalities). All but cc know reveal 'map' only.
        mopt_sigma_diff : float, optional
            With cc and mind, the standard deviation of the Gaussian smoothing
            kernel to be applied to the update field at each iteration, in
            voxels. None (the default) is 2.
        mopt_radius : int, optional
            With cc, the radius of the squared (cubic) neighborhood at each
            voxel to be considered to compute the cross correlation. None (the
            default) is 4.
        mopt_smooth : float, optional
            With ssd, what mopt_sigma_diff is with the others. None (the
            default) is 2.
        step_length : float, optional
            The length of the maximum displacement vector of the update
            displacement field at each iteration, in voxels.
        ss_sigma_factor : float, optional
            Parameter of the scale-space smoothing kernel. For example, the
            std. dev. of the kernel will be factor*(2^i) in the isotropic case
            where i = 0, 1, ..., n_scales is the scale. None (the default) is
            0.4 with reveal 'map', else 0.2.
        opt_tol : float, optional
            The optimization will stop when the estimated derivative of the
            energy profile w.r.t. time falls below this threshold.
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
            Name of the file to save the diffeomorphic map: displacements, mm, RAS+,
            from moving to static space and back.
        out_itk : string, optional
            Name of a file for the map in the form of ITK and ANTs, from static to
            moving space, which ends in .h5, .nii.gz or .nii. Not written without a
            name.
        reveal : string, optional
            What the owners learn. ``'map'``: the resulting map, and rounded
            copies of its own half at the ends of levels. The others are for
            comparisons, and give away most of the other image: at every
            iteration, ``'update'`` shows the smoothed step of an owner's half,
            ``'force'`` the force on every voxel of its image, ``'paper'`` the
            terms of the published method.
        map_spacing : int, optional
            With 'map', spacing in voxels of the grid on which the map is
            computed and opened; 2 at most along axes of fewer than 20 voxels.
        opens : string, optional
            With 'map', when owners are shown their half, rounded: at the ends
            of 'levels', or at the 'end' nothing but the map, for three times the
            traffic.
        map_precision : float, optional
            With 'map', to how much of a voxel the map is opened. None (the
            default) is a quarter, half of one for images of two dimensions.
        update_spacing : int, optional
            With 'update', the step is opened at every so many voxels along each
            axis: more hide more, and change the result more. None (the
            default) is twice the stride.
        stride : int, optional
            1, or 2 to compute forces at every second voxel along each axis:
            a fifth of the traffic, and a result that is not DIPY's any more.
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

    def at_site(self, site, flags):
        """See `RegistrationFlow`."""
        return {"start": flags["prealign_file"]}

    def parameters(self, flags):
        """See `RegistrationFlow`."""
        given = {
            name: flags[self.spelling.get(name, name)]
            for name in SynParameters.model_fields
            if self.spelling.get(name, name) in flags
        }
        for name in ("reveal", "opens"):
            given[name] = given[name].lower()
        return self.checked(SynParameters, **given)

    def steps(self, parameters):
        """See `RegistrationFlow`."""
        return ["deformation"]

    def load(self, paths, flags, parameters):
        """See `RegistrationFlow`."""
        prealign = None
        if str(flags["prealign_file"]).strip():
            prealign = inputs.load_matrix(flags["prealign_file"], "the prealign file")
        images = load_images(paths, flags, "syn_registration")
        with warnings.catch_warnings():
            # The one that registers warns as well.
            warnings.simplefilter("ignore")
            check = registration_from(parameters.plain()).check
        inputs.explain(check, images, prealign)
        return {**images, "prealign": prealign}

    def compute(self, images, parameters, progress, wanted, **options):
        """See `RegistrationFlow`."""
        result = syn_registration(
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
        if result[0].min() == result[0].max():
            raise InputError(
                "nothing of the moving image was brought onto the static one; check "
                "the prealign file, which must map static to moving coordinates, mm"
            )
        return result

    def save(self, out, files, images, mapping):
        """See `RegistrationFlow`."""
        save_transform(out.temporary(files["transform"]), mapping)
        if "inverse" in files:
            inverse = out.temporary(files["inverse"])
            save_inverse(inverse, mapping, images["static"], grids_of(images))

    def start(self, images):
        """See `RegistrationFlow`."""
        return np.eye(4) if images["prealign"] is None else images["prealign"]
