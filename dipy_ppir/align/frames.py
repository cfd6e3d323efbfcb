r"""Frames that move at every evaluation, so that a transform shows blurred only.

A metric compares the static image at x with the moving image at T x. With any R it may
as well compare them at R x and T R x. So the static owner draws a small random R for
every evaluation and looks its own image up at R x; the moving owner, which has to know
where to look its image up, is shown T R and nothing else.

Both are measured alike: in *normal coordinates*, in which the middle of an image's grid
is the origin and the size of the smaller of the two grids the unit. They are public.
"""

import os

from dipy.align.transforms import regtransforms
import numpy as np
from scipy.linalg import expm
from scipy.optimize import least_squares
from scipy.special import ndtri

from dipy_ppir.align.parzenhist import linear_jacobian
from dipy_ppir.align.quasinewton import orthonormal_steps

#: Jitter of position, and of shape: root mean square displacement in the units of
#: steps; about mm of a human brain.
MOVE, STRAIN = 10.0, 8.0
#: Transforms that are groups: one after another is of the same kind.
GROUPS = ("TRANSLATION", "ROTATION", "SCALING", "RIGID", "RIGIDISOSCALING", "AFFINE")
_RIGID = "TRANSLATION", "ROTATION", "RIGID"


class Frame:
    """Normal coordinates of a pair of grids.

    Parameters
    ----------
    static_shape, moving_shape : tuple of int
    static_grid2world, moving_grid2world : array, shape (dim + 1, dim + 1)
        mm.

    Attributes
    ----------
    dim : int
    covariance : array, shape (dim, dim)
        of the ball that a step's size is measured by, in normal coordinates.
    static_to_normal, moving_to_normal : array, shape (dim + 1, dim + 1)
        from each image's space, mm.
    """

    def __init__(
        self, static_shape, static_grid2world, moving_shape, moving_grid2world
    ):
        self.dim = dim = len(static_shape)
        grids = (static_shape, static_grid2world), (moving_shape, moving_grid2world)
        # Root mean square distance from the middle, in the ellipsoid within a grid.
        self.size = min(
            np.linalg.norm(matrix[:dim, :dim] * np.array(shape)) / np.sqrt(4 * dim + 8)
            for shape, matrix in grids
        )
        self.covariance = np.eye(dim) / dim
        self.static_to_normal, self.moving_to_normal = (
            self._to_normal(shape, matrix) for shape, matrix in grids
        )

    def _to_normal(self, shape, grid2world):
        middle = grid2world @ np.append((np.array(shape) - 1) / 2, 1)
        matrix = np.eye(self.dim + 1) / self.size
        matrix[:, -1] = -middle / self.size
        matrix[-1, -1] = 1
        return matrix

    def normal(self, affine):
        """A transform from the static to the moving space, in normal coordinates."""
        return self.moving_to_normal @ affine @ np.linalg.inv(self.static_to_normal)

    def world(self, matrix):
        """Inverse of `normal`."""
        return np.linalg.inv(self.moving_to_normal) @ matrix @ self.static_to_normal

    def static_world(self, matrix):
        """A change of the static space in normal coordinates as one in mm."""
        return np.linalg.inv(self.static_to_normal) @ matrix @ self.static_to_normal

    def moving_world(self, matrix):
        """A change of the moving space in normal coordinates as one in mm."""
        return np.linalg.inv(self.moving_to_normal) @ matrix @ self.moving_to_normal

    def moving_normal(self, matrix):
        """Inverse of `moving_world`."""
        return self.moving_to_normal @ matrix @ np.linalg.inv(self.moving_to_normal)

    def generators(self, transform):
        """Steps of a transform in the moving space, orthonormal; see `quasinewton`.

        Parameters
        ----------
        transform : instance of Transform

        Returns
        -------
        generators : array, shape (p, dim, dim + 1)
            in normal coordinates.
        """
        jacobian = linear_jacobian(transform, transform.get_identity_parameters())
        back = np.linalg.inv(self.moving_to_normal)
        jacobian = jacobian @ back / self.size
        basis = orthonormal_steps(jacobian, np.zeros(self.dim), self.covariance)
        return np.einsum("kl,kde->lde", basis, jacobian)

    def moving_directions(self, generators):
        """What `generators` do to a point of the moving space, mm."""
        return self.size * generators @ self.moving_to_normal

    def draw(self):
        """A random small change of the static space, in normal coordinates.

        Returns
        -------
        matrix : array, shape (dim + 1, dim + 1)
        """
        rigid, linear = _directions(self.dim)
        words = np.frombuffer(
            os.urandom(8 * (len(rigid) + len(linear))), dtype=np.uint64
        )
        normal = ndtri((words.astype(np.float64) + 0.5) / 2.0**64)
        movement = normal[: len(rigid)] * MOVE / np.sqrt(len(rigid))
        strain = normal[len(rigid) :] * STRAIN / np.sqrt(len(linear))
        strained = np.eye(self.dim + 1) + np.tensordot(strain, linear, 1)
        return expm(np.tensordot(movement, rigid, 1)) @ strained


def _directions(dim):
    """Rigid and linear changes, each of the size of a step's unit."""
    kinds = []
    for kind in ("RIGID", "AFFINE"):
        transform = regtransforms[kind, dim]
        jacobian = linear_jacobian(transform, transform.get_identity_parameters())
        basis = orthonormal_steps(jacobian, np.zeros(dim), np.eye(dim) / dim)
        square = np.zeros((len(jacobian), dim + 1, dim + 1))
        square[:, :dim] = np.einsum("kl,kde->lde", basis, jacobian)
        kinds.append(square)
    rigid, affine = kinds
    # Those of an affine one that move no origin; any orthonormal ones would do.
    return rigid, affine[np.abs(affine[:, :, dim]).max(axis=1) < 1e-9]


class Blur:
    r"""Most bits that shown transforms can show of what is hidden by the jitter.

    An evaluation shows :math:`A = T R`, to first order T and Gaussian noise, of
    variance N at least along every one of D directions. Let S be the sum over them of
    the variance of what is not known of T before it, divided by N. Then it shows at
    most

    .. math:: \frac12 \log_2 \det (1 + P / N) \le \frac D2 \log_2 (1 + S / D)

    bits, with the covariance P, because no distribution of a covariance has a larger
    entropy than the Gaussian one, and by the concavity of the logarithm. Of S is left
    at most :math:`S / (1 + S / D)`, what a linear estimate leaves. Whatever a step
    depends on, it is no longer than L, so before the next look

    .. math:: S' \le \left(\sqrt{S / (1 + S / D)} + L / \sqrt N\right)^2

    (Minkowski). The mean of several transforms is no further from the last than a step.
    That holds for whatever the moving owner sends, and where T turns and moves; one
    that makes things f times as large makes the noise so, too.

    Parameters
    ----------
    dim : int
    """

    def __init__(self, dim):
        rigid = dim * (dim + 1) // 2
        self._rigid = rigid, MOVE**2 / rigid
        self._all = dim * (dim + 1), min(MOVE**2 / rigid, STRAIN**2 / dim**2)
        self._known, self._unknown, self._directions = True, 0.0, 0

    def show(self, kind, longest):
        """Most bits that the next evaluation shows.

        Parameters
        ----------
        kind : str
            the transform.
        longest : float
            no step since the last one is longer.

        Returns
        -------
        bits : float
        """
        if self._known:
            self._known = False
            return 0.0
        directions, noise = self._rigid if kind in _RIGID else self._all
        self._directions = max(directions, self._directions)
        before = (np.sqrt(self._unknown) + longest / np.sqrt(noise)) ** 2
        more = 1 + before / self._directions
        self._unknown = before / more
        return float(self._directions / 2 * np.log2(more))


def nearest_parameters(transform, matrix, frame):
    """Parameters of the transform nearest to a matrix.

    Parameters
    ----------
    transform : instance of Transform
    matrix : array, shape (dim + 1, dim + 1)
        of the moving space, mm.
    frame : Frame

    Returns
    -------
    params : array, shape (p,)
    """
    start = transform.get_identity_parameters()
    wanted = frame.moving_normal(matrix)
    weight = np.append(np.sqrt(np.diag(frame.covariance)), 1)

    def differences(params):
        found = frame.moving_normal(transform.param_to_matrix(params))
        return ((found - wanted) * weight)[:-1].ravel()

    scales = np.linalg.norm(least_squares(differences, start, max_nfev=1).jac, axis=0)
    found = least_squares(differences, start, x_scale=1 / scales, xtol=1e-14)
    return found.x
