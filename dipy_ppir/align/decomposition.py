"""An affine transform in words that people judge: shift, turn, scales and shear."""

from typing import NamedTuple

import numpy as np
from scipy.linalg import polar


class Decomposition(NamedTuple):
    """What an affine transform does; see `decompose`.

    Attributes
    ----------
    shift : array, shape (dim,)
        of a point, mm.
    angle : float
        by which it turns, degrees from 0 to 180.
    axis : array, shape (3,), or None
        about which it turns, a unit vector; None in 2D and without a turn.
    scales : array, shape (dim,)
        along three directions at right angles, smallest first; the largest of two
        over the smallest is what shears.
    mirrored : bool
        whether left becomes right.
    """

    shift: np.ndarray
    angle: float
    axis: np.ndarray
    scales: np.ndarray
    mirrored: bool


def about_center(affine, shape, grid2world):
    """`decompose` with the shift of the centre of a grid.

    Parameters
    ----------
    affine : array, shape (dim + 1, dim + 1)
        mm.
    shape : sequence of int
        of the static image.
    grid2world : array, shape (dim + 1, dim + 1)
    """
    middle = np.append((np.array(shape) - 1) / 2, 1)
    return decompose(affine, (np.asarray(grid2world) @ middle)[:-1])


def decompose(affine, point=None):
    """Polar decomposition of an affine transform: a turn after a stretch.

    Parameters
    ----------
    affine : array, shape (dim + 1, dim + 1)
        mm.
    point : array, shape (dim,), optional
        whose shift is meant, mm, as the centre of the static image; by default the
        origin, which may be anywhere.

    Returns
    -------
    decomposition : Decomposition

    Examples
    --------
    >>> import numpy as np
    >>> turn = np.array([[0.0, -2.0, 3.0], [2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> found = decompose(turn)
    >>> float(round(found.angle)), found.scales.round(3).tolist()
    (90.0, [2.0, 2.0])
    """
    affine = np.asarray(affine, dtype=np.float64)
    dim = len(affine) - 1
    point = np.zeros(dim) if point is None else np.asarray(point, dtype=np.float64)
    turn, stretch = polar(affine[:dim, :dim])
    mirrored = bool(np.linalg.det(turn) < 0)
    if mirrored:
        turn = -turn if dim == 3 else turn @ np.diag([1.0, -1.0])
    if dim == 2:
        angle, axis = abs(np.arctan2(turn[1, 0], turn[0, 0])), None
    else:
        # By its sine as well, because the cosine of small angles has few digits.
        skew = np.array(
            [turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]
        )
        sine = np.linalg.norm(skew)
        angle = np.arctan2(sine, np.trace(turn) - 1)
        axis = skew / sine if sine > 1e-12 else None
    return Decomposition(
        affine[:dim, :dim] @ point + affine[:dim, dim] - point,
        float(np.degrees(angle)),
        axis,
        np.sort(np.linalg.eigvalsh(stretch)),
        mirrored,
    )
