"""The command ``dipy_ppir_align_affine``, as a DIPY workflow."""

import logging

from dipy.io.image import save_qa_metric
import numpy as np

from dipy_ppir.align import affine_registration
from dipy_ppir.align._public import registration_of
from dipy_ppir.align.parameters import AFFINE, AffineParameters
from dipy_ppir.align.validation import check_slices
from dipy_ppir.mpc.session import PARTIES
from dipy_ppir.workflows import figures, inputs
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.openings import LIMIT
from dipy_ppir.workflows.registration import RegistrationFlow, load_images
from dipy_ppir.workflows.results import grids_of, save_inverse

logger = logging.getLogger("dipy_ppir")

#: Transforms to the steps of their pipelines, progressive and not, as in DIPY.
PIPELINES = {
    "com": (["center_of_mass"],) * 2,
    "trans": (["center_of_mass", "translation"],) * 2,
    "rigid": (
        ["center_of_mass", "translation", "rigid"],
        ["center_of_mass", "rigid"],
    ),
    "rigid_isoscaling": (
        ["center_of_mass", "translation", "rigid_isoscaling"],
        ["center_of_mass", "rigid_isoscaling"],
    ),
    "rigid_scaling": (
        ["center_of_mass", "translation", "rigid_scaling"],
        ["center_of_mass", "rigid_scaling"],
    ),
    "affine": (
        ["center_of_mass", "translation", "rigid", "affine"],
        ["center_of_mass", "affine"],
    ),
}


class SecureImageRegistrationFlow(RegistrationFlow):
    """Affine registration of two images that two parties hold.

    Takes the flags of ``dipy_align_affine`` and writes the same files, besides a
    receipt of what each party learned and two pictures.
    """

    operation = "affine"
    outputs = {
        "out_moved": "image",
        "out_affine": "transform",
        "out_quality": "quality",
        "out_inv_static": "inverse",
        "out_itk": "itk",
    }
    optional = {"quality": "save_metric", "inverse": "inv_static", "itk": "out_itk"}
    belongs = {
        "static_mask": "static",
        "moving_mask": "moving",
        "static_vol_idx": "static",
        "moving_vol_idx": "moving",
        "inv_static": "static",
    }
    also_read = ("static_mask", "moving_mask")
    settled = (
        "transform",
        "nbins",
        "sampling_prop",
        "metric",
        "level_iters",
        "sigmas",
        "factors",
        "save_metric",
        "sampling",
        "seed",
        "precision",
        "radius",
        "reveal",
        "hide_steps",
        "far_apart",
        "out_quality",
        "parties",
    )
    spelling = {
        "pipeline": "transform",
        "ret_metric": "save_metric",
        "sampling_proportion": "sampling_prop",
    }
    pictures = figures.PICTURES
    own_pictures = figures.OWN_PICTURES

    def run(
        self,
        static_image_files,
        moving_image_files,
        transform="affine",
        nbins=AFFINE.nbins,
        sampling_prop=None,
        metric="mi",
        level_iters=AFFINE.level_iters,
        sigmas=AFFINE.sigmas,
        factors=AFFINE.factors,
        progressive=True,
        save_metric=False,
        inv_static=False,
        static_vol_idx=None,
        moving_vol_idx=None,
        out_dir="",
        out_moved="moved.nii.gz",
        out_affine="affine.txt",
        out_quality="quality_metric.txt",
        out_inv_static="inv_static.nii.gz",
        out_itk="",
        static_mask=None,
        moving_mask=None,
        sampling="",
        seed=None,
        precision=None,
        radius=None,
        reveal=AFFINE.reveal,
        hide_steps=AFFINE.hide_steps,
        receipt="receipt.json",
        report="report.html",
        far_apart=False,
        no_pictures=False,
        parties=PARTIES,
        session="",
        identity="",
        listen="",
        resume=False,
        strict=False,
        limit_bits=LIMIT,
        debug=False,
    ):
        """Register two images that neither owner shows to the other.

        With two images, processes on this machine play the image owners and
        a helper, and run the protocol that separate sites run. With --session and
        the word remote in place of the image that another site has, this is one
        party of a session between sites. Flags and output
        files are those of dipy_align_affine; dipy_apply_transform reads the
        results.

        Parameters
        ----------
        static_image_files : string or Path
            Path to the static image file (NIfTI).
        moving_image_files : string or Path
            Path to the moving image file (NIfTI).
        transform : string, optional
            ``'com'``: center of mass; ``'trans'``: translation; ``'rigid'``:
            rigid body; ``'rigid_isoscaling'``: rigid body + isotropic scaling,
            ``'rigid_scaling'``: rigid body + scaling; ``'affine'``: full affine
            including translation, rotation, shearing and scaling.
        nbins : int, optional
            Number of bins to discretize the joint and marginal PDF, 6 to 512.
        sampling_prop : float, optional
            Percentage of the voxels that are used, from 1 to 100. None (the default) or
            100 uses all voxels, which masks need.
        metric : string, optional
            ``'mi'``: mutual information; ``'ssd'``: sum of squared differences, by
            Gauss-Newton steps, for two images of the same contrast; ``'cc'``: local
            cross-correlation, of every voxel.
        level_iters : variable int, optional
            The number of iterations at each scale of the scale space.
            `level_iters[0]` corresponds to the coarsest scale,
            `level_iters[-1]` the finest, where n is the length of the
            sequence.
        sigmas : variable float, optional
            Custom smoothing parameter to build the scale space (one parameter
            for each scale).
        factors : variable int, optional
            Custom scale factors to build the scale space (one factor for each scale,
            1 for the last).
        progressive : boolean, optional
            Go through translation and rigid steps before the last one. On the
            command line off unless this flag is given, as in
            dipy_align_affine; called from Python
        save_metric : boolean, optional
            If true, quality assessment metric are saved in
            'quality_metric.txt'.
        inv_static : boolean, optional
            Apply the inverse transform to the static image, and save it on the
            moving image's grid.
        static_vol_idx : str, optional
            Volumes of a 4D `static` input, counted from 0 and averaged:
            `0`, `3,4,5` or `3-5`. This input is required for 4D volumes.
        moving_vol_idx : str, optional
            Volumes of a 4D `moving` input, counted from 0 and averaged:
            `0`, `3,4,5` or `3-5`. This input is required for 4D volumes.
        out_dir : string or Path, optional
            Directory to save the transformed image and the affine matrix
        out_moved : string, optional
            Name for the saved transformed image.
        out_affine : string, optional
            Name for the saved affine matrix. It takes points of the static image to
            points of the moving one: world coordinates, mm, RAS+.
        out_quality : string, optional
            Name of the file containing the saved quality metric.
        out_inv_static : string, optional
            Name of the file to save the static image after applying the
            inverse transform.
        out_itk : string, optional
            Name of a file for the same transform in the form of ITK and ANTs, which
            ends in .txt, .tfm, .mat or .h5. Not written without a name.
        static_mask : string or Path, optional
            Mask of the static image (NIfTI): voxels that are not zero count.
        moving_mask : string or Path, optional
            Mask of the moving image (NIfTI): voxels that are not zero count.
        sampling : string, optional
            With 'ssd' and --sampling_prop, which voxels: ``'urs'``, the default, fresh
            random ones in each iteration; ``'gms'`` prefers the edges of the moving
            image, and shows the owner of the static image where these are.
        seed : int, optional
            With 'ssd' and --sampling_prop, seed of the random voxels, 0 by default.
        precision : float, optional
            With 'ssd', part of a voxel to which steps are rounded, 0.0625 by default.
        radius : int, optional
            With 'cc', radius of the windows, voxels, 4 by default.
        reveal : string, optional
            What the owner of the moving image learns beside the result.
            ``'transform'``: the steps that lead to it, rounded;
            ``'gradient'``: at each of some hundreds of evaluations the metric's
            value and gradient, which give far more away; ``'histogram'``: the
            joint intensity histogram as well. The latter run DIPY's own optimizer.
        hide_steps : boolean, optional
            Show the owner of the moving image no step but the result: an eighth of
            the bits before it, for half more traffic. Not for 'rigid_scaling'.
        receipt : string, optional
            Name of the JSON file that states what each party learned.
        report : string, optional
            Name of the page (HTML) that shows the result and what each party learned;
            made with the pictures, if jinja2 and matplotlib are installed.
        far_apart : boolean, optional
            Accept images that do not overlap in space: their centers of mass
            are aligned first anyway.
        no_pictures : boolean, optional
            Write neither the report nor the overlay pictures checkerboard.png and
            contours.png (made if matplotlib is installed); nor, at a site of a
            session, warped_grid.png.
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
        limit_bits : float, optional
            At the owner of the static image, in a session: most bits that may be
            opened about this image in all sessions with reveal = "transform",
            this one included; 0 for no limit. They are counted in opened.json,
            beside the key.
        debug : boolean, optional
            On an error also show where in the program it occurred.
        """
        self.register(locals())

    def at_site(self, site, flags):
        """See `RegistrationFlow`."""
        if flags["limit_bits"] != LIMIT and site.image != "static":
            raise InputError(
                "--limit_bits belongs to the owner of the static image; leave it out"
            )
        if site.image == "moving":
            flags["save_metric"] = site.parameters.ret_metric
        mask = flags[f"{site.image}_mask"]
        return {"mask": mask, "limit_bits": flags["limit_bits"]}

    def parameters(self, flags):
        """See `RegistrationFlow`."""
        if flags["limit_bits"] != LIMIT:
            raise InputError(
                "--limit_bits is for the owner of the static image in a session; leave "
                "it out"
            )
        transform, reveal = flags["transform"].lower(), flags["reveal"].lower()
        if transform not in PIPELINES:
            raise InputError(
                f"--transform {transform} is not known; choose one of "
                f"{', '.join(PIPELINES)}"
            )
        proportion = inputs.proportion_of(flags["sampling_prop"])
        if (flags["static_mask"] or flags["moving_mask"]) and proportion is not None:
            raise InputError(
                "masks need all voxels; leave out --sampling_prop, or the masks"
            )
        if flags["save_metric"] and transform == "com":
            logger.warning("The center of mass has no metric value to save")
            flags["save_metric"] = False
        # Where it is opened at every evaluation, it may as well be shown.
        asked = flags["save_metric"] or reveal != "transform"
        return self.checked(
            AffineParameters,
            pipeline=PIPELINES[transform][0 if flags["progressive"] else 1],
            level_iters=flags["level_iters"],
            sigmas=flags["sigmas"],
            factors=flags["factors"],
            metric=flags["metric"],
            nbins=_unless_default(flags, "nbins", AFFINE.nbins),
            sampling_proportion=proportion,
            sampling=flags["sampling"] or None,
            seed=flags["seed"],
            precision=flags["precision"],
            radius=flags["radius"],
            reveal=reveal,
            hide_steps=flags["hide_steps"],
            ret_metric=asked and transform != "com",
        )

    def steps(self, parameters):
        """See `RegistrationFlow`."""
        return parameters.pipeline

    def load(self, paths, flags, parameters):
        """See `RegistrationFlow`."""
        images = load_images(paths, flags, "affine_registration")
        for name in ("static", "moving"):
            image, grid2world = images[name], images[f"{name}_grid2world"]
            if "center_of_mass" in parameters.pipeline:
                inputs.check_center(image, name)
            mask = flags[f"{name}_mask"]
            if mask:
                inputs.explain(registration_of(parameters).metric.check_masks, mask)
                images[f"{name}_mask"] = inputs.load_mask(mask, image, grid2world, name)
        static, moving = images["static"], images["moving"]
        inputs.explain(check_slices, moving)
        inputs.check_pyramid(
            static.shape,
            images["static_grid2world"],
            parameters.sigmas,
            parameters.factors,
        )
        if not flags["far_apart"]:
            inputs.check_fields_of_view(
                static,
                images["static_grid2world"],
                moving,
                images["moving_grid2world"],
            )
        return images

    def compute(self, images, parameters, progress, wanted, **options):
        """See `RegistrationFlow`."""
        masks = {name: images[name] for name in self.also_read if name in images}
        return affine_registration(
            images["moving"],
            images["static"],
            moving_affine=images["moving_grid2world"],
            static_affine=images["static_grid2world"],
            ret_receipt=True,
            callback=progress,
            **parameters.plain(),
            **options,
            **masks,
        )

    def save(self, out, files, images, affine, *optimum):
        """See `RegistrationFlow`."""
        # The same calls that write the files of dipy_align_affine.
        np.savetxt(out.temporary(files["transform"]), affine)
        if optimum:
            xopt, fopt = optimum
            logger.info("Optimal parameters: %s", " ".join(f"{x:.6g}" for x in xopt))
            logger.info("Similarity metric: %s", fopt)
            if "quality" in files:
                save_qa_metric(out.temporary(files["quality"]), xopt, fopt)
        if "inverse" in files:
            inverse = out.temporary(files["inverse"])
            save_inverse(inverse, affine, images["static"], grids_of(images))

    def start(self, images):
        """See `RegistrationFlow`."""
        return np.eye(4)


def _unless_default(flags, flag, default):
    """What a flag says; None for what it says by default."""
    return None if flags[flag] == default else flags[flag]
