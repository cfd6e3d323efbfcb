"""Alignment of the centres of mass of two parties' images."""

from dipy.align.imaffine import AffineMap
import numpy as np
from scipy import ndimage

from dipy_ppir.align.remote import RemoteImage, grid2world_of
from dipy_ppir.mpc import local
from dipy_ppir.mpc.ledger import MOVING, STATIC, declare
from dipy_ppir.mpc.protocols import share

declare(
    "center_of_mass",
    receivers=(MOVING,),
    shape="2 or 3, once",
    meaning="the shift between the centres of mass of the two images, and so the "
    "static image's centre, rounded to what the next step needs",
    bits=52,
)

#: Part of a voxel, at most, to which a shift is rounded that is the result, and one
#: that another step starts from.
RESULT_PART, START_PART = 1 / 64, 1 / 4
#: No shift has more digits.
_LARGEST = 1 << 50


def precision_for(grid2world, factor=1.0, part=RESULT_PART):
    """To what the shift is rounded: a power of two, mm.

    Parameters
    ----------
    grid2world : array, shape (dim + 1, dim + 1)
        of the static image, mm.
    factor : float, optional
        of the level that starts from it.
    part : float, optional
        of that level's smallest voxel.
    """
    voxel = np.linalg.norm(np.asarray(grid2world)[:-1, :-1], axis=0).min()
    return 2.0 ** np.floor(np.log2(voxel * factor * part))


def center_of_mass(image):
    """Centre of mass of an image, voxels; not finite where there is none."""
    image = np.asarray(image)
    if image.dtype.itemsize < 8:  # float16 overflows, and small integers do
        image = image.astype(np.float64)
    with np.errstate(all="ignore"):
        return np.array(ndimage.center_of_mass(image))


def world_center_of_mass(image, grid2world, name="an"):
    """Centre of mass of an image, mm; `name` is for messages.

    Raises
    ------
    ValueError
        if it lies outside the image's grid, as of an image whose background is
        negative.
    """
    center, size = center_of_mass(image), np.array(np.shape(image))
    if not (np.isfinite(center) & (center >= -0.5) & (center <= size - 0.5)).all():
        raise ValueError(
            f"the centre of mass of {name} image lies outside its grid, because "
            "intensities below zero outweigh the others; add a constant that makes the "
            "background zero, or start without the centres of mass"
        )
    return grid2world[:-1, :-1] @ center + grid2world[:-1, -1]


def _largest_shift(static_shape, static_grid2world, moving_shape, moving_grid2world):
    """Largest shift along an axis of two points inside two grids, mm."""
    boxes = []
    for shape, matrix in (
        (static_shape, static_grid2world),
        (moving_shape, moving_grid2world),
    ):
        corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in shape]))
        boxes.append(
            matrix[:-1, :-1] @ corners.reshape(len(shape), -1) + matrix[:-1, -1:]
        )
    return max(np.ptp(np.concatenate(axes)) for axes in zip(*boxes, strict=True))


def transform_centers_of_mass(
    static,
    static_grid2world,
    moving,
    moving_grid2world,
    *,
    session=None,
    precision=None,
):
    """Translation between the centres of mass of two parties' images.

    The static owner shares its centre, rounded; only the difference of the two
    centres is opened, to the moving owner. Rounds: 2. Elements: 2 per coordinate
    of 8 bytes.

    Parameters
    ----------
    static, moving : array or RemoteImage
    static_grid2world, moving_grid2world : array, shape (dim + 1, dim + 1)
        voxel-to-space transformations, mm; None for the identity.
    session : Session, optional
        by default the other parties are started on this machine.
    precision : float, optional
        to what the static owner's centre is rounded, mm; by default a power of two
        below a 64th of its smallest voxel.

    Returns
    -------
    affine_map : AffineMap
        at the moving owner; the identity elsewhere.

    Raises
    ------
    ValueError
        if a centre of mass lies outside its image.
    """
    if session is None:
        arguments = {
            "static_grid2world": static_grid2world,
            "moving_grid2world": moving_grid2world,
            "precision": precision,
        }
        shapes = {"static_shape": static.shape, "moving_shape": moving.shape}
        for image, matrix in ((static, static_grid2world), (moving, moving_grid2world)):
            world_center_of_mass(image, grid2world_of(image, matrix))
        return local.run_locally(
            _centers_party,
            "dipy_ppir.align.centers:_centers_reply",
            moving={**arguments, **shapes, "moving": np.asarray(moving)},
            static={**arguments, **shapes, "static": np.asarray(static)},
            helper={**arguments, **shapes},
        )[MOVING]
    dim = len(static.shape)
    static_grid2world = grid2world_of(static, static_grid2world)
    moving_grid2world = grid2world_of(moving, moving_grid2world)
    if precision is None:
        precision = precision_for(static_grid2world)
    grids = static.shape, static_grid2world, moving.shape, moving_grid2world
    steps = int(np.ceil(_largest_shift(*grids) / precision)) + 1
    if steps > _LARGEST:
        raise ValueError(
            "the two images are too far apart for their voxels; check their headers"
        )
    session.ledger.about(None)
    with session.phase("centre of mass"):
        centers, own = {}, {}
        for pid, image, grid2world in (
            (STATIC, static, static_grid2world),
            (MOVING, moving, moving_grid2world),
        ):
            if session.pid == pid:
                name = "the moving" if pid == MOVING else "the static"
                own[pid] = world_center_of_mass(image, grid2world, name)
            # Both from the middle of the static grid, so that far origins cost nothing.
            middle = static_grid2world @ np.append((np.array(static.shape) - 1) / 2, 1)
            mine = own.get(pid)
            if mine is not None:
                mine = np.rint((mine - middle[:-1]) / precision)
            centers[pid] = share(
                session, pid, mine, (dim,), bound=float(2 * steps), name="center"
            )
        difference = centers[MOVING] - centers[STATIC]
        difference.bound = steps
        shift = session.open(difference, "center_of_mass", (MOVING,))
    transform = np.eye(dim + 1)
    if shift is not None:
        # What was rounded off here is known here.
        rounded = np.rint((own[MOVING] - middle[:-1]) / precision) * precision
        transform[:dim, dim] = shift * precision + own[MOVING] - middle[:-1] - rounded
    return AffineMap(
        transform,
        domain_grid_shape=static.shape,
        domain_grid2world=static_grid2world,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=moving_grid2world,
    )


def _centers_party(
    session,
    static_shape,
    moving_shape,
    static_grid2world,
    moving_grid2world,
    precision,
    static=None,
    moving=None,
):
    static = RemoteImage(static_shape, static_grid2world) if static is None else static
    moving = RemoteImage(moving_shape, moving_grid2world) if moving is None else moving
    return transform_centers_of_mass(
        static,
        static_grid2world,
        moving,
        moving_grid2world,
        session=session,
        precision=precision,
    )


def _centers_reply(session, **arguments):
    _centers_party(session, **arguments)
