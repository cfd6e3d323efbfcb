"""The command ``dipy_ppir_align_syn``, as a DIPY workflow."""

import json
import logging
from pathlib import Path
import warnings

from dipy.align.imaffine import AffineMap
from dipy.io.image import save_nifti
import numpy as np

from dipy_ppir.align import syn_registration
from dipy_ppir.align.imwarp import SecureSymmetricDiffeomorphicRegistration
from dipy_ppir.align.metrics import SecureCCMetric
from dipy_ppir.mpc.crosscorr import REVEAL
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
from dipy_ppir.workflows.mapping import save_mapping
from dipy_ppir.workflows.operations import METRIC_ARGUMENTS
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.progress import deformation_callback, display
from dipy_ppir.workflows.remote import (
    Site,
    check_flags,
    check_others,
    check_words,
    register,
)

logger = logging.getLogger("dipy_ppir")


class SecureSynRegistrationFlow(OutputFilesFlow):
    """Diffeomorphic registration of two images that two parties hold.

    Takes the flags of ``dipy_align_syn`` and writes the same files, besides a receipt
    of what each party learned and pictures.
    """

    def run(
        self,
        static_image_files,
        moving_image_files,
        prealign_file="",
        inv_static=False,
        level_iters=(10, 10, 5),
        metric="cc",
        mopt_sigma_diff=2.0,
        mopt_radius=4,
        step_length=0.25,
        ss_sigma_factor=None,
        opt_tol=1e-5,
        inv_iter=20,
        inv_tol=1e-3,
        static_vol_idx=None,
        moving_vol_idx=None,
        out_dir="",
        out_warped="warped_moved.nii.gz",
        out_inv_static="inc_static.nii.gz",
        out_field="displacement_field.nii.gz",
        reveal="map",
        map_spacing=3,
        opens="levels",
        map_precision=None,
        update_spacing=None,
        stride=1,
        receipt="receipt.json",
        no_pictures=False,
        session="",
        identity="",
        listen="",
        resume=False,
        debug=False,
    ):
        """Register two images by a smooth deformation, without showing either.

        With two images, three processes on this machine play the image owners and
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
            The metric to be used: cc (Cross Correlation).
        mopt_sigma_diff : float, optional
            The standard deviation of the Gaussian smoothing kernel to be
            applied to the update field at each iteration, in voxels.
        mopt_radius : int, optional
            The radius of the squared (cubic) neighborhood at each voxel to be
            considered to compute the cross correlation.
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
            Name of the file to save the diffeomorphic map.
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
        no_pictures : boolean, optional
            Do not write the pictures checkerboard.png, contours.png,
            warped_grid.png and jacobian.png (made if matplotlib is installed).
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
        debug : boolean, optional
            On an error also show where in the program it occurred.
        """
        self.receipts = []
        files = {"static": static_image_files, "moving": moving_image_files}
        check_words(files, session)
        if session:
            check_flags(
                {
                    "metric": metric,
                    "level_iters": level_iters,
                    "mopt_sigma_diff": mopt_sigma_diff,
                    "mopt_radius": mopt_radius,
                    "step_length": step_length,
                    "ss_sigma_factor": ss_sigma_factor,
                    "opt_tol": opt_tol,
                    "inv_iter": inv_iter,
                    "inv_tol": inv_tol,
                    "reveal": reveal,
                    "map_spacing": map_spacing,
                    "opens": opens,
                    "map_precision": map_precision,
                    "update_spacing": update_spacing,
                    "stride": stride,
                },
                self.run,
            )
            check_name(out_warped, "out_warped", (".nii", ".nii.gz"))
            check_name(out_field, "out_field", (".nii", ".nii.gz"))
            check_name(out_inv_static, "out_inv_static", (".nii", ".nii.gz"))
            check_name(receipt, "receipt")
            site = Site(session, identity, listen)
            site.check_owner("syn", files)
            check_others(
                site,
                {
                    "static_vol_idx": ("static", static_vol_idx),
                    "moving_vol_idx": ("moving", moving_vol_idx),
                    "prealign_file": ("moving", prealign_file),
                    "inv_static": ("static", inv_static),
                },
            )
            if inv_static and not site.gets_result:
                raise InputError(
                    "--inv_static needs the map, which the session file gives to the "
                    "moving owner only; leave it out"
                )
            volumes = {"static": static_vol_idx, "moving": moving_vol_idx}
            names = {"image": out_warped, "transform": out_field, "receipt": receipt}
            if inv_static and site.image == "static":
                names["inverse"] = out_inv_static
            self.receipts = [
                register(
                    site,
                    files[site.image],
                    volumes[site.image],
                    {kind: Path(out_dir or ".", name) for kind, name in names.items()},
                    start=prealign_file,
                    resume=resume,
                    force=self._force_overwrite,
                )
            ]
            return
        if metric.lower() != "cc":
            raise InputError(
                f"--metric {metric} is not available; leave it out to use local "
                "cross-correlation (cc)"
            )
        if reveal.lower() not in REVEAL:
            raise InputError(
                f"--reveal {reveal} is not known; choose one of {', '.join(REVEAL)}"
            )
        inputs.check_level_iters(level_iters)
        inputs.check_sign(
            positive={
                "step_length": step_length,
                "inv_iter": inv_iter,
                "inv_tol": inv_tol,
            },
            not_negative={}
            if ss_sigma_factor is None
            else {"ss_sigma_factor": ss_sigma_factor},
            finite={"opt_tol": opt_tol},
        )
        options = {
            "level_iters": [int(n) for n in level_iters],
            "step_length": float(step_length),
            "ss_sigma_factor": None
            if ss_sigma_factor is None
            else float(ss_sigma_factor),
            "opt_tol": float(opt_tol),
            "inv_iter": int(inv_iter),
            "inv_tol": float(inv_tol),
            "sigma_diff": float(mopt_sigma_diff),
            "radius": int(mopt_radius),
            "reveal": reveal.lower(),
            "map_spacing": int(map_spacing),
            "opens": opens.lower(),
            "map_precision": None if map_precision is None else float(map_precision),
            "update_spacing": None if update_spacing is None else int(update_spacing),
            "stride": int(stride),
        }
        registration = inputs.explain(_registration, options)
        names = {
            "out_warped": out_warped,
            "out_inv_static": out_inv_static,
            "out_field": out_field,
        }
        for flag, name in names.items():
            check_name(name, flag, (".nii", ".nii.gz"))
        check_name(receipt, "receipt")
        for path in (static_image_files, moving_image_files):
            if not str(path).strip():
                raise InputError("the name of an image is empty; give a NIfTI file")
        prealign = None
        if str(prealign_file).strip():
            prealign = inputs.load_matrix(prealign_file, "the prealign file")
        made = {} if no_pictures else pictures(figures.SYN_PICTURES)
        given = [*names.values(), receipt]
        with new_folders([Path(out_dir or ".", name) for name in given]):
            with explained():
                io_it = list(self.get_io_iterator())
            jobs = []
            for static_file, moving_file, warped, inverse, field in io_it:
                files = {
                    "warped": Path(warped),
                    "field": Path(field),
                    "receipt": beside(field, out_field, receipt),
                }
                if inv_static:
                    files["inverse"] = Path(inverse)
                for name in made:
                    files[name] = beside(field, out_field, name)
                jobs.append(({"static": static_file, "moving": moving_file}, files))
            written = written_files(jobs)
            read = [f for job, _ in jobs for f in job.values()]
            read += [prealign_file] if prealign is not None else []
            volumes = {"static": static_vol_idx, "moving": moving_vol_idx}
            with OutputFiles(written, read, force=self._force_overwrite) as out:
                if len(jobs) > 1:
                    # A bad pair is found before others are registered for nothing.
                    for job, _ in jobs:
                        _load(job, volumes, prealign, registration)
                for job, files in jobs:
                    images = _load(job, volumes, prealign, registration)
                    self._register(job, images, prealign, options, files, out)

    def _register(self, paths, images, prealign, options, files, out):
        """Register one pair and write its files."""
        static, moving = images["static"], images["moving"]
        grid2world = {n: images[n + "_grid2world"] for n in ("static", "moving")}
        logger.info("Registering %s to %s", paths["moving"], paths["static"])
        with display(["deformation"], len(options["level_iters"])) as progress:
            warped, mapping, receipt = _run(
                moving, static, grid2world, prealign, options, progress
            )
        if warped.min() == warped.max():
            raise InputError(
                "nothing of the moving image was brought onto the static one; check "
                "the prealign file, which must map static to moving coordinates, mm"
            )
        self.receipts.append(receipt)
        save_nifti(out.temporary(files["warped"]), warped, grid2world["static"])
        save_mapping(out.temporary(files["field"]), mapping)
        if "inverse" in files:
            save_nifti(
                out.temporary(files["inverse"]),
                mapping.transform_inverse(static),
                grid2world["moving"],
            )
        out.temporary(files["receipt"]).write_text(json.dumps(receipt, indent=2) + "\n")
        title = f"{short_name(paths['moving'])} on {short_name(paths['static'])}"
        before = None
        for name, kind in figures.SYN_PICTURES.items():
            if name not in files:
                continue
            if kind in figures.PICTURES.values():
                if before is None:
                    before = AffineMap(
                        np.eye(4) if prealign is None else prealign,
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
                    warped,
                    grid2world["static"],
                    title=title,
                )
            else:
                figures.save_map(
                    out.temporary(files[name]), kind, static, mapping, title=title
                )
        out.commit()
        print("\n" + receipt_text(receipt) + "\n")
        for file in files.values():
            logger.info("Saved %s", file)


def _load(paths, vol_idx, prealign, registration):
    """One pair of images, checked as the registration will."""
    images = {}
    for name in ("static", "moving"):
        images[name], images[name + "_grid2world"] = inputs.load_volume(
            paths[name], name, vol_idx[name], function="syn_registration"
        )
    inputs.explain(registration.check, images, prealign)
    return images


def _registration(options):
    """Let the classes check their own arguments, before any file is read."""
    names = ("sigma_diff", "radius", "reveal", *METRIC_ARGUMENTS)
    metric = {name: options[name] for name in names}
    options = {name: value for name, value in options.items() if name not in metric}
    with warnings.catch_warnings():
        # The one that registers warns as well.
        warnings.simplefilter("ignore")
        metric = SecureCCMetric(3, **metric)
    return SecureSymmetricDiffeomorphicRegistration(metric, **options)


def _run(moving, static, grid2world, prealign, options, progress):
    return syn_registration(
        moving,
        static,
        moving_affine=grid2world["moving"],
        static_affine=grid2world["static"],
        prealign=prealign,
        callback=deformation_callback(progress),
        ret_receipt=True,
        **options,
    )
