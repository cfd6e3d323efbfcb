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
    meaning="the shift between the centres of mass of the two images to 0.001 mm, and "
    "so the static image's centre",
)
#: Fraction bits of a centre of mass in mm.
CENTER_BITS = 10


def _world_center_of_mass(image, grid2world):
    center = ndimage.center_of_mass(np.asarray(image))
    return grid2world.dot(np.array(center + (1,)))[:-1]


def transform_centers_of_mass(
    static, static_grid2world, moving, moving_grid2world, *, session=None
):
    """Translation between the centres of mass of two parties' images.

    The static owner shares its centre, in mm; only the difference of the two
    centres is opened, to the moving owner. Rounds: 2. Elements: 2 per coordinate
    of 8 bytes.

    Parameters
    ----------
    static, moving : array or RemoteImage
    static_grid2world, moving_grid2world : array, shape (dim + 1, dim + 1)
        voxel-to-space transformations, mm; None for the identity.
    session : Session, optional
        by default the other parties are started on this machine.

    Returns
    -------
    affine_map : AffineMap
        at the moving owner; the identity elsewhere.
    """
    if session is None:
        arguments = {
            "static_grid2world": static_grid2world,
            "moving_grid2world": moving_grid2world,
        }
        shapes = {"static_shape": static.shape, "moving_shape": moving.shape}
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
    centers = {}
    session.ledger.about(None)
    with session.phase("centre of mass"):
        for pid, image, grid2world in (
            (STATIC, static, static_grid2world),
            (MOVING, moving, moving_grid2world),
        ):
            own = session.pid == pid
            centers[pid] = share(
                session,
                pid,
                _world_center_of_mass(image, grid2world) if own else None,
                (dim,),
                # No finer: the exact centre is a fraction whose denominator, the
                # total intensity, could be told from its digits.
                frac_bits=CENTER_BITS,
                bound=2.0**40,
                name="center",
            )
        shift = session.open(
            centers[MOVING] - centers[STATIC], "center_of_mass", (MOVING,)
        )
    transform = np.eye(dim + 1)
    if shift is not None:
        transform[:dim, dim] = shift
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
    static=None,
    moving=None,
):
    static = RemoteImage(static_shape, static_grid2world) if static is None else static
    moving = RemoteImage(moving_shape, moving_grid2world) if moving is None else moving
    return transform_centers_of_mass(
        static, static_grid2world, moving, moving_grid2world, session=session
    )


def _centers_reply(session, **arguments):
    _centers_party(session, **arguments)
