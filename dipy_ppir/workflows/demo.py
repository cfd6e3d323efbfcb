"""A demonstration on real images: ``make demo``, or ``dipy_ppir_demo [OUT]``.

Registers the grey-matter template that nilearn carries, displaced by a known
affine, to its T1 template; then a T1 template that was deformed. Compares the results
with the truth and with what DIPY finds when it sees both images.
"""

from pathlib import Path
import sys
import time

from dipy.align import affine_registration
from dipy.align.imaffine import AffineMap
from dipy.align.imwarp import SymmetricDiffeomorphicRegistration
from dipy.io.image import load_nifti, save_nifti
import numpy as np
from scipy import ndimage

from dipy_ppir.align.mappings import read_mapping
from dipy_ppir.align.metrics import GuardedCCMetric
from dipy_ppir.workflows.align import SecureImageRegistrationFlow
from dipy_ppir.workflows.progress import size_text
from dipy_ppir.workflows.syn import SecureSynRegistrationFlow

#: Moves a point of the static image to the moving image: 12 mm, 8 to 14 degrees,
#: up to 6 % of scaling, a little shear.
SHIFT = (12.0, -9.0, 7.0)
ANGLES = (8.0, -5.0, 14.0)
SCALES = (1.06, 0.95, 1.03)
SHEAR = 0.03

OPTIONS = {
    "level_iters": (1000, 500, 100),
    "sigmas": (3.0, 1.0, 0.0),
    "factors": (4, 2, 1),
    "nbins": 32,
}
PERCENT = 10


def true_affine():
    """The displacement that registration has to find, as a 4 x 4 matrix."""
    matrix = np.eye(4)
    for axis, angle in enumerate(np.deg2rad(ANGLES)):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(4)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    stretch = np.diag((*SCALES, 1.0))
    stretch[0, 1] = SHEAR
    matrix = matrix @ stretch
    matrix[:3, 3] = SHIFT
    return matrix


def write_pair(folder):
    """Write the pair to register as NIfTI files.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    static, moving : Path
    brain : array, shape (n, 4)
        world coordinates (homogeneous, mm) of the brain in the static image.
    """
    from nilearn.datasets import (
        load_mni152_brain_mask,
        load_mni152_gm_template,
        load_mni152_template,
    )

    t1 = load_mni152_template(resolution=2)
    gm = load_mni152_gm_template(resolution=2)
    static, moving = folder / "static_T1.nii.gz", folder / "moving_GM.nii.gz"
    save_nifti(static, np.asarray(t1.dataobj, dtype=np.float32), t1.affine)
    # A grid of its own, large enough for the displaced brain, so that nothing in
    # the header tells where the brain went.
    shape, grid2world = (112, 124, 104), np.diag((2.0, 2.0, 2.0, 1.0))
    grid2world[:3, 3] = (-100.0, -142.0, -74.0)
    displaced = AffineMap(
        np.linalg.inv(true_affine()),
        domain_grid_shape=shape,
        domain_grid2world=grid2world,
        codomain_grid_shape=gm.shape,
        codomain_grid2world=gm.affine,
    ).transform(np.asarray(gm.dataobj, dtype=np.float64))
    save_nifti(moving, displaced.astype(np.float32), grid2world)
    mask = load_mni152_brain_mask(resolution=2)
    voxels = np.argwhere(np.asarray(mask.dataobj) > 0)
    brain = np.c_[voxels, np.ones(len(voxels))] @ mask.affine.T
    return static, moving, brain


def distances(matrix, other, points):
    """Distance between where two matrices put each point, mm."""
    return np.linalg.norm((points @ (matrix - other).T)[:, :3], axis=1)


def clear_dipy(static, moving):
    """DIPY's own answer, from both images."""
    static, static_affine = load_nifti(static)
    moving, moving_affine = load_nifti(moving)
    return affine_registration(
        moving,
        static,
        moving_affine=moving_affine,
        static_affine=static_affine,
        pipeline=["center_of_mass", "translation", "rigid", "affine"],
        sampling_proportion=PERCENT / 100,
        optimizer_options={"gtol": 1e-4},
        **OPTIONS,
    )[1]


def _matrix_text(matrix):
    return "\n".join("   " + "".join(f"{x:10.4f}" for x in row) for row in matrix)


def _errors(label, values):
    return f"  {label:<44}{values.mean():8.3f}{values.max():10.3f}"


def write_deformed(static, folder):
    """Write the static image, deformed by up to 6 mm and with another contrast."""
    image, grid2world = load_nifti(static)
    rng = np.random.default_rng(4)
    at = np.indices(image.shape).astype(np.float64)
    for axis in range(3):
        bump = ndimage.gaussian_filter(rng.standard_normal(image.shape), 6)
        at[axis] += 3.0 * bump / np.abs(bump).max()
    deformed = ndimage.map_coordinates(image, at, order=1, mode="nearest")
    path = folder / "moving_deformed.nii.gz"
    save_nifti(path, np.sqrt(np.maximum(deformed, 0)), grid2world)
    return path


def run_deformable(static, folder):
    """The second half of the demonstration: SyN."""
    moving = write_deformed(static, folder)
    out = folder / "syn"
    flow = SecureSynRegistrationFlow(force=True)
    start = time.perf_counter()
    flow.run(str(static), str(moving), out_dir=str(out))
    secure_seconds = time.perf_counter() - start
    print("The same with DIPY alone, which sees both images ...\n")
    image, grid2world = load_nifti(static)
    moved, moving_grid2world = load_nifti(moving)
    start = time.perf_counter()
    registration = SymmetricDiffeomorphicRegistration(
        GuardedCCMetric(3), level_iters=[10, 10, 5]
    )
    clear = registration.optimize(
        image,
        moved,
        static_grid2world=grid2world,
        moving_grid2world=moving_grid2world,
    )
    clear_seconds = time.perf_counter() - start
    secure = read_mapping(out / "displacement_field.nii.gz", moving, static)
    inside = image > 0.1 * image.max()
    field = np.asarray(clear.get_forward_field())
    apart = np.linalg.norm(secure.get_forward_field() - field, axis=-1)[inside]
    size = np.linalg.norm(field, axis=-1)[inside]
    print(
        f"Over {inside.sum():,} voxels of the brain, in mm             mean   largest"
    )
    print(_errors("deformation found by clear DIPY", size))
    print(_errors("secure against clear DIPY", apart))
    print(
        f"\nTime: secure {secure_seconds:.1f} s (with files and pictures), clear DIPY "
        f"{clear_seconds:.1f} s. Traffic: "
        f"{size_text(flow.receipts[0]['bytes_total'])}."
    )


def run(folder):
    """Run the demonstration and write everything to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    print("Writing the pair: MNI152 T1 (static), grey matter, displaced (moving) ...")
    static, moving, brain = write_pair(folder)
    truth = true_affine()

    print("Registering: two image owners and a helper, three processes ...\n")
    flow = SecureImageRegistrationFlow(force=True)
    start = time.perf_counter()
    flow.run(
        str(static),
        str(moving),
        sampling_prop=PERCENT,
        out_dir=str(folder),
        save_metric=True,
        **OPTIONS,
    )
    secure_seconds = time.perf_counter() - start
    secure = np.loadtxt(folder / "affine.txt")
    receipt = flow.receipts[0]

    print("The same with DIPY alone, which sees both images ...\n")
    start = time.perf_counter()
    clear = clear_dipy(static, moving)
    clear_seconds = time.perf_counter() - start
    np.savetxt(folder / "true_affine.txt", truth)
    np.savetxt(folder / "clear_dipy_affine.txt", clear)

    print("Transform found (static to moving, mm)\n" + _matrix_text(secure))
    print("Transform to find\n" + _matrix_text(truth) + "\n")
    print(f"Over the {len(brain):,} voxels of the brain, in mm        mean   largest")
    print(_errors("displacement to undo", distances(truth, np.eye(4), brain)))
    print(_errors("secure against the truth", distances(secure, truth, brain)))
    print(_errors("clear DIPY against the truth", distances(clear, truth, brain)))
    print(_errors("secure against clear DIPY", distances(secure, clear, brain)))
    print(
        f"\nTime: secure {secure_seconds:.1f} s (with files and pictures), clear DIPY "
        f"{clear_seconds:.1f} s. Traffic: {size_text(receipt['bytes_total'])}."
    )
    print("\nNow a deformation: the T1 image again, deformed by up to 6 mm ...\n")
    run_deformable(static, folder)
    print(f"\nEverything is in {folder.resolve()}")
    for name, what in (
        ("checkerboard.png", "before and after, squares of both images in turn"),
        ("contours.png", "before and after, outline of the moving on the static image"),
        ("moved.nii.gz", "the moving image on the static image's grid"),
        ("affine.txt", "the transform (dipy_apply_transform reads it)"),
        ("receipt.json", "what each party learned, as printed above"),
        ("report.html", "all of it on one page, to look at in a browser"),
        (static.name, "the static image"),
        (moving.name, "the moving image"),
        ("true_affine.txt", "the transform to find"),
        ("clear_dipy_affine.txt", "what DIPY finds from both images"),
        ("moving_deformed.nii.gz", "the image of the second registration"),
        ("syn/contours.png", "the same before and after its deformation"),
        ("syn/warped_grid.png", "what the deformation does to a grid"),
        ("syn/jacobian.png", "where it shrinks and where it grows"),
        ("syn/displacement_field.nii.gz", "the map (dipy_apply_transform reads it)"),
        ("syn/receipt.json", "what each party learned in the second registration"),
        ("syn/report.html", "all of the second registration on one page"),
    ):
        if (folder / name).exists():
            print(f"  {name:<31}{what}")


def main():
    """``dipy_ppir_demo``: register real images, and compare with the truth and DIPY."""
    import logging

    arguments = sys.argv[1:]
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        print("usage: dipy_ppir_demo [OUTPUT_FOLDER]   (default: demo_output)")
        return 0 if arguments in (["-h"], ["--help"]) else 2
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("dipy").setLevel(logging.WARNING)
    try:
        run(Path(arguments[0] if arguments else "demo_output"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as exc:
        print(f"error: {exc.name} is missing; install dipy-ppir[demo]", file=sys.stderr)
        return 1
    except (OSError, ValueError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
