"""Checks of images, masks and matrices, before any connection is opened.

Messages name the argument, what is wrong with it and how to mend it. They are
shown to the owner of the image only.
"""

import math
from warnings import warn

import numpy as np

from dipy_ppir.align.parameters import STARTS
from dipy_ppir.align.remote import is_remote
from dipy_ppir.mpc.sessionfile import LIMITS


def check_grid2world(matrix, dim, name):
    """Raise ValueError unless `matrix` is an invertible voxel-to-space transform."""
    if matrix is None:
        return
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.shape != (dim + 1, dim + 1):
        raise ValueError(
            f"the {name} image's affine has shape {matrix.shape}, but a {dim}D image "
            f"needs ({dim + 1}, {dim + 1})"
        )
    if not np.isfinite(matrix).all():
        raise ValueError(
            f"the {name} image's affine contains NaN or infinity; correct the image's "
            "header (sform or qform)"
        )
    linear = matrix[:dim, :dim]
    volume = np.prod(np.linalg.norm(linear, axis=0))
    if not abs(np.linalg.det(linear)) > 1e-9 * volume:
        raise ValueError(
            f"the {name} image's affine is singular: voxels have no volume; correct "
            "the image's header (sform or qform)"
        )


def is_named(start, name):
    """Whether a start is the one of this name; it may be a matrix."""
    return isinstance(start, str) and start == name


def check_starting_affine(start, dim):
    """Where a registration starts, or ValueError.

    Parameters
    ----------
    start : str, array or None
    dim : int

    Returns
    -------
    start : str, array of float or None
    """
    if start is None or (isinstance(start, str) and start in STARTS):
        return start
    if isinstance(start, str):
        raise ValueError(
            f"starting_affine must be a matrix or one of {list(STARTS)}, got "
            f"{start!r:.200}; read a file with numpy.loadtxt first"
        )
    try:
        if np.iscomplexobj(start):
            raise ValueError
        matrix = np.array(start, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"starting_affine must be a matrix or one of {list(STARTS)}, got an object "
            f"of type {type(start).__name__}; read a file with numpy.loadtxt first, "
            "and of an AffineMap take its affine"
        ) from None
    if matrix.shape != (dim + 1, dim + 1):
        raise ValueError(
            f"starting_affine has shape {matrix.shape}, but {dim}D images need "
            f"({dim + 1}, {dim + 1})"
        )
    if not np.isfinite(matrix).all():
        raise ValueError("starting_affine contains NaN or infinity")
    if not np.allclose(matrix[-1], np.eye(dim + 1)[-1], rtol=0, atol=1e-9):
        raise ValueError(
            f"the last row of starting_affine must be 0 but for a 1 at its end, got "
            f"{matrix[-1].tolist()}"
        )
    scales = np.linalg.svd(matrix[:-1, :-1], compute_uv=False)
    if not scales[-1] > 1e-9 * scales[0]:
        raise ValueError(
            "starting_affine is not invertible: it maps the image into a plane; give "
            "another one"
        )
    return matrix


def check_dimensions(image, name):
    """Raise ValueError unless an image has two or three dimensions."""
    if image.ndim not in (2, 3):
        raise ValueError(
            f"the {name} image has {image.ndim} dimensions; 2 or 3 are needed (of a "
            "4D series choose one volume)"
        )


def check_size(shape, what):
    """Raise ValueError if an image has more voxels than another party would believe."""
    voxels = math.prod(map(int, shape))
    if voxels > LIMITS["voxels"]:
        raise ValueError(
            f"{what} has {voxels:,} voxels, and {LIMITS['voxels']:,} are the most that "
            "can be registered; resample it to larger voxels, or cut it to the part "
            "that matters"
        )


def check_image(image, grid2world, name):
    """Raise ValueError unless `image` can be registered.

    Parameters
    ----------
    image : array or RemoteImage
    grid2world : array or None
    name : str
        "static" or "moving", for the message.
    """
    check_size(image.shape, f"the {name} image")
    if is_remote(image):
        check_grid2world(image.grid2world, image.dim, name)
        return
    image = np.asarray(image)
    check_dimensions(image, name)
    if image.dtype.kind not in "biuf":
        raise ValueError(
            f"the {name} image must hold real numbers, not {image.dtype}; convert it"
        )
    if not np.isfinite(image).all():
        raise ValueError(
            f"the {name} image contains NaN or infinite voxels; replace them first, "
            "for example with numpy.nan_to_num"
        )
    if image.size and not np.isfinite(float(image.max()) - float(image.min())):
        raise ValueError(
            f"the values of the {name} image, from {float(image.min()):g} to "
            f"{float(image.max()):g}, are too far apart for floating point numbers; "
            "rescale it"
        )
    if image.size == 0 or image.min() == image.max():
        raise ValueError(
            f"the {name} image is constant: it has no structure to register; check "
            "that it is the right one"
        )
    check_grid2world(grid2world, image.ndim, name)


def check_single_precision(image, name):
    """Raise ValueError if nothing is left of `image` in single precision.

    DIPY's diffeomorphic registration computes with it.
    """
    if is_remote(image):
        return
    least, most = (float(v) for v in (np.min(image), np.max(image)))
    with np.errstate(all="ignore"):
        width = np.float32(most) - np.float32(least)
    if not 0 < width < np.inf:
        raise ValueError(
            f"the values of the {name} image, from {least:g} to {most:g}, do not fit "
            "single precision; subtract the least, and divide by the largest"
        )


def check_slices(
    moving,
    what="the moving image",
    remedy="register it as a 2D image, without that axis, or give it at least 3 slices",
):
    """Raise ValueError if the moving image is too thin to have a gradient."""
    for axis, n in enumerate(moving.shape):
        if n < 3:
            raise ValueError(
                f"{what} has {n} voxel{'s' * (n > 1)} along axis {axis}: it has no "
                f"gradient there, and nothing would move; {remedy}"
            )


def check_mask(mask, image, name):
    """Raise ValueError unless `mask` fits `image`; masks of zeros only warn later."""
    if mask is None:
        return
    if is_remote(image):
        raise ValueError(
            f"the {name} mask belongs to the owner of the {name} image; only that "
            "party may pass it"
        )
    mask = np.asarray(mask)
    if mask.shape != tuple(image.shape):
        raise ValueError(
            f"the {name} mask has shape {mask.shape}, its image {tuple(image.shape)}; "
            "resample the mask to the image's grid"
        )
    inside = np.asarray(image)[mask != 0]
    if inside.size and inside.min() == inside.max():
        raise ValueError(
            f"the {name} image is constant inside its mask; use a larger mask"
        )


def check_overlap(
    static_shape, static_grid2world, moving_shape, moving_grid2world, remedy=""
):
    """Raise ValueError if the two fields of view do not touch in world space.

    Only public geometry is looked at: the boxes around the two grids.
    """
    boxes = []
    for shape, matrix in (
        (static_shape, static_grid2world),
        (moving_shape, moving_grid2world),
    ):
        dim = len(shape)
        corners = np.array(
            np.meshgrid(*[(-0.5, n - 0.5) for n in shape], indexing="ij")
        ).reshape(dim, -1)
        world = matrix[:dim, :dim] @ corners + matrix[:dim, dim:]
        boxes.append((world.min(axis=1), world.max(axis=1)))
    (low_a, high_a), (low_b, high_b) = boxes
    if (low_a > high_b).any() or (low_b > high_a).any():
        remedy = remedy or (
            "check their headers, or start with their centres aligned "
            "(center_of_mass, or starting_affine='centers')"
        )
        raise ValueError(f"the two images do not overlap in world space; {remedy}")


def check_pyramid(shape, grid2world, factors):
    """Raise ValueError if `factors` leave fewer than two voxels along an axis."""
    dim = len(shape)
    spacing = np.linalg.norm(np.asarray(grid2world)[:dim, :dim], axis=0)
    for factor in (int(f) for f in factors[:-1]):
        # As in IsotropicScaleSpace: per axis the factor nearest to isotropic voxels.
        target = spacing.min() * factor
        for axis, (n, step) in enumerate(zip(shape, spacing, strict=True)):
            candidates = [factor, *range(1, factor)]
            shrink = min(candidates, key=lambda f: abs(step * f - target))
            if n // shrink < min(n, 2):
                raise ValueError(
                    f"factor {factor} leaves {n // shrink} of the {n} voxels of the "
                    f"static image along axis {axis}; use smaller factors"
                )


def usable_mask(mask, name):
    """The mask as zeros and ones, or None (with a warning, as in DIPY) if it is empty.

    Whatever is not zero is inside.
    """
    if mask is not None and not np.any(mask):
        warn(
            f"{name}_mask is all zeros, setting to None (which means the entire "
            "volume will be used)",
            UserWarning,
            stacklevel=2,
        )
        return None
    return None if mask is None else (np.asarray(mask) != 0).astype(np.int32)


def masked(image, mask):
    """The image with everything outside the mask set to zero."""
    return (
        image if mask is None or is_remote(image) else image * (np.asarray(mask) != 0)
    )
