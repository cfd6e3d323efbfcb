"""What a user would see by laying the two images over each other.

Nobody can here, so the programs judge what may be known: the own image, the result, and
of what is on shares one bit, whether the two images match at all.

Every function returns sentences, each with a remedy; none are good news. They are in
the receipt under ``warnings`` and become `ImplausibleWarning`, or an
`ImplausibleError` where that was asked for (``strict``).
"""

from contextlib import contextmanager
import warnings

import numpy as np

from dipy_ppir.align.centers import center_of_mass
from dipy_ppir.align.decomposition import about_center
from dipy_ppir.mpc.errors import AfterTheEnd
from dipy_ppir.mpc.ledger import MOVING, STATIC, declare

declare(
    "mismatch",
    receivers=(MOVING, STATIC),
    shape="1, once",
    meaning="whether the two images hardly match in the end, or less than before",
    bits=1,
)

declare(
    "stuck",
    receivers=(STATIC,),
    shape="1, once",
    meaning="whether no step was taken",
    bits=1,
)

#: Largest turn, degrees, scale and ratio of scales, that people and scanners make.
MOST_TURN, MOST_SCALE, MOST_SHEAR = 45.0, 1.5, 1.5
#: Least part of the smaller field of view that lies in the other one in the end.
LEAST_OVERLAP = 1 / 3
#: Of the intensities that are not zero, largest part that is below.
MOST_NEGATIVE = 0.1
#: Part of a face of the grid that a mask covers which reaches the border, and part of
#: the field of view by which it may move the centre of mass.
LEAST_FACE, MOST_MOVED = 0.1, 0.08
#: Whole windows that a level has room for, at least, and flat part of an object's
#: windows, at most.
LEAST_WINDOWS, MOST_FLAT = 8, 0.25
#: Part of a map's voxels that may fold.
MOST_FOLDS = 0.01
#: Points along each axis for which it is asked whether they lie in the other image.
_POINTS = 32

MISMATCH = (
    "in the end the two images hardly match, or less than where the registration "
    "began: check that both show the same part of the same body, that their headers "
    "place it alike, and that no mask cuts off what they have in common"
)

STUCK = (
    "no step was taken, the result is where the registration began: if the images were "
    "not aligned before, begin nearer (center_of_mass, starting_affine), or allow more "
    "iterations"
)


class ImplausibleWarning(UserWarning):
    """A result that nobody should use without a look at it."""


class ImplausibleError(ValueError, AfterTheEnd):
    """The same where it was asked to be an error (``strict``)."""


def tell(concerns, *, strict=False, stacklevel=2):
    """Warn of each concern.

    Parameters
    ----------
    concerns : sequence of str
    strict : bool, optional
        raise an error with all of them instead.
    stacklevel : int, optional
        as in `warnings.warn`.

    Raises
    ------
    ImplausibleError
    """
    if strict and concerns:
        raise ImplausibleError(
            f"not plausible, and strict: {'; '.join(concerns)}. Without strict the "
            "result would have been written with a warning"
        )
    for concern in concerns:
        warnings.warn(concern, ImplausibleWarning, stacklevel=stacklevel + 1)


@contextmanager
def untold():
    """Where another process tells."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImplausibleWarning)
        yield


def of_transform(affine, static_shape, static_grid2world):
    """Concerns about an affine transform.

    Parameters
    ----------
    affine : array, shape (dim + 1, dim + 1)
        from the static to the moving image's space, mm.
    static_shape : tuple of int
    static_grid2world : array, shape (dim + 1, dim + 1)

    Returns
    -------
    concerns : list of str
    """
    found, concerns = about_center(affine, static_shape, static_grid2world), []
    low, high = found.scales[0], found.scales[-1]
    remedy = "look at the images' orientations, and give a starting_affine if it is so"
    if found.mirrored:
        concerns.append(
            f"the transform mirrors the image (left becomes right): {remedy}"
        )
    elif found.angle > MOST_TURN:
        concerns.append(f"the transform turns by {found.angle:.0f} degrees: {remedy}")
    if high > MOST_SCALE or low < 1 / MOST_SCALE:
        concerns.append(
            f"the transform scales by {low:.2f} to {high:.2f} along its axes: check "
            "the voxel sizes in both headers, and that the images show the same part"
        )
    elif high / low > MOST_SHEAR:
        concerns.append(
            f"the transform stretches by {low:.2f} along one axis and {high:.2f} along "
            "another, which shears: if that is not so, take a rigid transform"
        )
    return concerns


def overlap(affine, static_shape, static_grid2world, moving_shape, moving_grid2world):
    """Part of the smaller field of view that lies in the other one.

    Parameters
    ----------
    affine : array, shape (dim + 1, dim + 1)
        from the static to the moving image's space, mm.
    static_shape, moving_shape : tuple of int
    static_grid2world, moving_grid2world : array, shape (dim + 1, dim + 1)

    Returns
    -------
    overlap : float
    """
    there = np.linalg.inv(moving_grid2world) @ affine @ static_grid2world
    # Middles of equal boxes, so that the part of the points is one of the volume.
    axes = [(np.arange(_POINTS) + 0.5) / _POINTS * n - 0.5 for n in static_shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    points = points @ there[:-1, :-1].T + there[:-1, -1]
    inside = ((points >= -0.5) & (points <= np.array(moving_shape) - 0.5)).all(-1)
    smaller = min(
        1.0,
        np.prod(np.array(moving_shape, dtype=float))
        / np.prod(np.array(static_shape, dtype=float))
        / abs(np.linalg.det(there[:-1, :-1])),
    )
    return float(inside.mean() / smaller)


def of_overlap(part):
    """Concerns about an `overlap`."""
    if part >= LEAST_OVERLAP:
        return []
    return [
        f"in the end the two fields of view share {100 * part:.0f} % of the smaller "
        "one: check where the headers place the images, or start with their centres "
        "aligned (center_of_mass, or starting_affine='centers')"
    ]


def of_center(image, name):
    """Concerns about an image whose centre of mass a registration starts from.

    Intensities below zero, as of air in a CT, weigh against the others: the centre may
    be anywhere, and not where that with the least intensity as zero would be.

    Parameters
    ----------
    image : array
    name : str
        "static" or "moving".
    """
    image = np.asarray(image, dtype=np.float64)
    below = -image[image < 0].sum()
    total = np.abs(image).sum()
    if not below > MOST_NEGATIVE * total:
        return []
    moved = np.abs(center_of_mass(image) - center_of_mass(image - image.min()))
    if (moved <= MOST_MOVED * np.array(image.shape)).all():
        return []
    return [
        f"{100 * below / total:.0f} % of the intensities of the {name} image are below "
        f"zero, which moves its centre of mass by {moved.max():.0f} voxels: add a "
        "constant that makes the background zero, or start without center_of_mass"
    ]


def of_mask(image, mask, grid2world, name):
    """Concerns about a mask that cuts an object in two.

    Parameters
    ----------
    image : array
    mask : array or None
    grid2world : array, shape (dim + 1, dim + 1)
    name : str
    """
    inside = None if mask is None else np.asarray(mask) != 0
    if inside is None or inside.all() or not inside.any():
        return []
    faces = [inside.take(at, axis=k) for k in range(inside.ndim) for at in (0, -1)]
    if max(face.mean() for face in faces) < LEAST_FACE:
        return []
    centers = [center_of_mass(x) for x in (image, np.where(inside, image, 0))]
    moved = grid2world[:-1, :-1] @ (centers[1] - centers[0])
    extent = np.abs(grid2world[:-1, :-1]) @ np.array(inside.shape)
    if not (np.abs(moved) > MOST_MOVED * extent).any():
        return []
    return [
        f"the {name} mask reaches the border of its image, and moves the centre of "
        f"mass, where the registration begins, by {np.linalg.norm(moved):.0f} mm: if "
        "the other mask does not leave out the same part, leave the masks out or start "
        "without center_of_mass"
    ]


def of_windows(part, equalized, name):
    """Concerns about an image whose windows are flat.

    Parameters
    ----------
    part : float
        of the object's windows that are, see `intensities.flat_part`.
    equalized : bool
    name : str
    """
    if part <= MOST_FLAT:
        return []
    after = "even after its intensities were equalized, " if equalized else ""
    return [
        f"{after}{100 * part:.0f} % of the windows inside the object of the {name} "
        "image are flat, and exert hardly any force: clip its intensities to those of "
        "what is to be registered (as 0 to 80 HU of a brain), or take a larger radius"
    ]


def of_level(level, shape, radius):
    """Concerns about a level into which few windows fit.

    Parameters
    ----------
    level : int
        0 is the finest.
    shape : sequence of int
    radius : int
    """
    whole = int(np.prod([n - 2 * radius for n in shape]))
    if whole >= LEAST_WINDOWS:
        return []
    size = "x".join(str(int(n)) for n in shape)
    return [
        f"level {level}, of {size} voxels, has room for {whole} whole "
        f"window{'s' * (whole != 1)} of radius {radius}, which decide all of it: leave "
        "it out (a 0 in level_iters), or take a smaller radius"
    ]


def of_map(quality):
    """Concerns about a map, by its `quality.map_quality`."""
    if quality["percent"] <= 100 * MOST_FOLDS:
        return []
    return [
        f"the map folds at {quality['percent']:.1f} % of its voxels: begin with an "
        "affine registration (prealign), or take fewer iterations"
    ]
