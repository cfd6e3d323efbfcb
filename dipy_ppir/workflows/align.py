"""The command ``dipy_ppir_align_affine``, as a DIPY workflow."""

import json
import logging
from pathlib import Path

from dipy.align.imaffine import AffineMap
from dipy.io.image import save_nifti, save_qa_metric
import numpy as np

from dipy_ppir.align import affine_registration
from dipy_ppir.align.validation import check_slices
from dipy_ppir.mpc.ledger import receipt_text
from dipy_ppir.workflows import figures, inputs
from dipy_ppir.workflows.flow import (
    OutputFilesFlow,
    beside,
    check_name,
    explained,
    pictures,
    short_name,
    written_files,
)
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.openings import LIMIT
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.progress import display
from dipy_ppir.workflows.remote import (
    Site,
    check_flags,
    check_others,
    check_words,
    register,
)

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


class SecureImageRegistrationFlow(OutputFilesFlow):
    """Affine registration of two images that two parties hold.

    Takes the flags of ``dipy_align_affine`` and writes the same files, besides a
    receipt of what each party learned and two pictures.
    """

    def run(
        self,
        static_image_files,
        moving_image_files,
        transform="affine",
        nbins=32,
        sampling_prop=None,
        metric="mi",
        level_iters=(1000, 500, 100),
        sigmas=(3.0, 1.0, 0.0),
        factors=(4, 2, 1),
        progressive=True,
        save_metric=False,
        static_vol_idx=None,
        moving_vol_idx=None,
        out_dir="",
        out_moved="moved.nii.gz",
        out_affine="affine.txt",
        out_quality="quality_metric.txt",
        static_mask=None,
        moving_mask=None,
        reveal="transform",
        hide_steps=False,
        receipt="receipt.json",
        far_apart=False,
        no_pictures=False,
        session="",
        identity="",
        listen="",
        resume=False,
        limit_bits=LIMIT,
        debug=False,
    ):
        """Register two images that neither owner shows to the other.

        With two images, three processes on this machine play the image owners and
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
            Number of bins to discretize the joint and marginal PDF, from 6.
        sampling_prop : float, optional
            Percentage of the voxels for calculating the PDF, from 1 to 100.
            None (the default) or 100 uses all voxels, which masks need.
        metric : string, optional
            Similarity metric for gathering mutual information.
        level_iters : variable int, optional
            The number of iterations at each scale of the scale space.
            `level_iters[0]` corresponds to the coarsest scale,
            `level_iters[-1]` the finest, where n is the length of the
            sequence.
        sigmas : variable float, optional
            Custom smoothing parameter to build the scale space (one parameter
            for each scale).
        factors : variable int, optional
            Custom scale factors to build the scale space (one factor for each scale).
        progressive : boolean, optional
            Go through translation and rigid steps before the last one. On the
            command line off unless this flag is given, as in
            dipy_align_affine; called from Python
        save_metric : boolean, optional
            If true, quality assessment metric are saved in
            'quality_metric.txt'.
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
            Name for the saved affine matrix.
        out_quality : string, optional
            Name of the file containing the saved quality metric.
        static_mask : string or Path, optional
            Mask of the static image (NIfTI): voxels that are not zero count.
        moving_mask : string or Path, optional
            Mask of the moving image (NIfTI): voxels that are not zero count.
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
        far_apart : boolean, optional
            Accept images that do not overlap in space: their centers of mass
            are aligned first anyway.
        no_pictures : boolean, optional
            Do not write the overlay pictures checkerboard.png and contours.png
            (made if matplotlib is installed).
        session : string or Path, optional
            Session file (TOML) of a registration between sites; write "remote" in
            place of the image that this site does not have.
        identity : string or Path, optional
            Folder of this site's key, by default ~/.dipy_ppir.
        listen : string, optional
            Address to listen on, host:port, where it is not the one in the session
            file (behind a firewall that forwards a port: 0.0.0.0:port).
        resume : boolean, optional
            Go on with a session that was interrupted; all parties must say so.
        limit_bits : float, optional
            At the owner of the static image, in a session: most bits that may be
            opened about this image in all sessions with reveal = "transform",
            this one included; 0 for no limit. They are counted in opened.json,
            beside the key.
        debug : boolean, optional
            On an error also show where in the program it occurred.
        """
        self.receipts = []
        files = {"static": static_image_files, "moving": moving_image_files}
        check_words(files, session)
        if session:
            check_flags(
                {
                    "transform": transform,
                    "nbins": nbins,
                    "sampling_prop": sampling_prop,
                    "metric": metric,
                    "level_iters": level_iters,
                    "sigmas": sigmas,
                    "factors": factors,
                    "save_metric": save_metric,
                    "reveal": reveal,
                    "hide_steps": hide_steps,
                    "far_apart": far_apart,
                    "out_quality": out_quality,
                },
                self.run,
            )
            check_name(out_moved, "out_moved", (".nii", ".nii.gz"))
            check_name(out_affine, "out_affine")
            check_name(receipt, "receipt")
            site = Site(session, identity, listen)
            site.check_owner("affine", files)
            if limit_bits != LIMIT and site.image != "static":
                raise InputError(
                    "--limit_bits belongs to the owner of the static image; leave it "
                    "out"
                )
            check_others(
                site,
                {
                    "static_mask": ("static", static_mask),
                    "moving_mask": ("moving", moving_mask),
                    "static_vol_idx": ("static", static_vol_idx),
                    "moving_vol_idx": ("moving", moving_vol_idx),
                },
            )
            volumes = {"static": static_vol_idx, "moving": moving_vol_idx}
            masks = {"static": static_mask, "moving": moving_mask}
            names = {"image": out_moved, "transform": out_affine, "receipt": receipt}
            self.receipts = [
                register(
                    site,
                    files[site.image],
                    volumes[site.image],
                    {kind: Path(out_dir or ".", name) for kind, name in names.items()},
                    mask=masks[site.image],
                    resume=resume,
                    force=self._force_overwrite,
                    limit_bits=limit_bits,
                )
            ]
            return
        if limit_bits != LIMIT:
            raise InputError(
                "--limit_bits is for the owner of the static image in a session; leave "
                "it out"
            )
        transform, metric, reveal = transform.lower(), metric.lower(), reveal.lower()
        inputs.check_parameters(
            transform, PIPELINES, metric, nbins, sampling_prop, reveal
        )
        inputs.check_levels(level_iters, sigmas, factors)
        if (static_mask or moving_mask) and sampling_prop not in (None, 100):
            raise InputError(
                "masks need all voxels; leave out --sampling_prop, or the masks"
            )
        check_name(out_moved, "out_moved", (".nii", ".nii.gz"))
        for path in (static_image_files, moving_image_files):
            if not str(path).strip():
                raise InputError("the name of an image is empty; give a NIfTI file")
        for name, flag in (
            (out_affine, "out_affine"),
            (out_quality, "out_quality"),
            (receipt, "receipt"),
        ):
            check_name(name, flag)
        options = {
            "pipeline": PIPELINES[transform][0 if progressive else 1],
            "level_iters": [int(n) for n in level_iters],
            "sigmas": [float(s) for s in sigmas],
            "factors": [int(f) for f in factors],
            "nbins": int(nbins),
            "sampling_proportion": None
            if sampling_prop in (None, 100)
            else sampling_prop / 100,
            "reveal": reveal,
            "hide_steps": bool(hide_steps),
        }
        inputs.check_hidden(hide_steps, reveal, transform)
        if save_metric and transform == "com":
            logger.warning("The center of mass has no metric value to save")
            save_metric = False
        made = {} if no_pictures else pictures(figures.PICTURES)
        names = out_moved, out_affine, out_quality, receipt
        with new_folders([Path(out_dir or ".", name) for name in names]):
            with explained():
                io_it = list(self.get_io_iterator())
            jobs = []
            for static_file, moving_file, moved, affine, quality in io_it:
                files = {
                    "moved": Path(moved),
                    "affine": Path(affine),
                    "receipt": beside(affine, out_affine, receipt),
                }
                if save_metric:
                    files["quality"] = Path(quality)
                for name in made:
                    files[name] = beside(affine, out_affine, name)
                jobs.append(({"static": static_file, "moving": moving_file}, files))
            written = written_files(jobs)
            masks = {"static": static_mask, "moving": moving_mask}
            read = [f for job, _ in jobs for f in job.values()]
            read += [m for m in masks.values() if m]
            volumes = {"static": static_vol_idx, "moving": moving_vol_idx}
            with OutputFiles(written, read, force=self._force_overwrite) as out:
                for job, files in jobs:
                    self._register(
                        job, volumes, masks, options, files, out, far_apart=far_apart
                    )

    def _register(self, paths, vol_idx, masks, options, files, out, *, far_apart):
        """Register one pair and write its files."""
        data, grid2world, mask = {}, {}, {}
        for name in ("static", "moving"):
            data[name], grid2world[name] = inputs.load_volume(
                paths[name], name, vol_idx[name]
            )
            if "center_of_mass" in options["pipeline"]:
                inputs.check_center(data[name], name)
            if masks[name]:
                mask[f"{name}_mask"] = inputs.load_mask(
                    masks[name], data[name], grid2world[name], name
                )
        static, moving = data["static"], data["moving"]
        inputs.explain(check_slices, moving)
        inputs.check_pyramid(
            static.shape, grid2world["static"], options["sigmas"], options["factors"]
        )
        if not far_apart:
            inputs.check_fields_of_view(
                static, grid2world["static"], moving, grid2world["moving"]
            )
        steps = [s for s in options["pipeline"] if s != "center_of_mass"]
        on_shares = options["reveal"] == "transform"
        logger.info(
            "Registering %s to %s: %s",
            paths["moving"],
            paths["static"],
            ", ".join(s.replace("_", " ") for s in options["pipeline"]),
        )
        with display(steps, len(options["level_iters"])) as progress:
            moved, affine, *optimum, receipt = affine_registration(
                moving,
                static,
                moving_affine=grid2world["moving"],
                static_affine=grid2world["static"],
                ret_metric=bool(steps) and ("quality" in files or not on_shares),
                ret_receipt=True,
                callback=progress,
                **options,
                **mask,
            )
        self.receipts.append(receipt)
        # The same calls that write the files of dipy_align_affine.
        save_nifti(out.temporary(files["moved"]), moved, grid2world["static"])
        np.savetxt(out.temporary(files["affine"]), affine)
        out.temporary(files["receipt"]).write_text(json.dumps(receipt, indent=2) + "\n")
        if optimum:
            xopt, fopt = optimum
            logger.info("Optimal parameters: %s", " ".join(f"{x:.6g}" for x in xopt))
            logger.info("Similarity metric: %s", fopt)
            if "quality" in files:
                save_qa_metric(out.temporary(files["quality"]), xopt, fopt)
        before = None
        for name, kind in figures.PICTURES.items():
            if name not in files:
                continue
            if before is None:
                before = AffineMap(
                    np.eye(4),
                    domain_grid_shape=static.shape,
                    domain_grid2world=grid2world["static"],
                    codomain_grid_shape=moving.shape,
                    codomain_grid2world=grid2world["moving"],
                ).transform(moving)
            figures.save_overlay(
                out.temporary(files[name]),
                kind,
                static,
                before,
                moved,
                grid2world["static"],
                title=f"{short_name(paths['moving'])} on {short_name(paths['static'])}",
            )
        out.commit()
        print("\n" + receipt_text(receipt) + "\n")
        for file in files.values():
            logger.info("Saved %s", file)
