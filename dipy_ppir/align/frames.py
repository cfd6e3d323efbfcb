r"""Frames that move at every evaluation, so that a transform shows blurred only.

A metric compares the static image at x with the moving image at T x. With any R it may
as well compare them at R x and T R x. So the static owner draws a small random R for
every evaluation and looks its own image up at R x; the moving owner, which has to know
where to look its image up, is shown T R and nothing else. A step goes from T to
T (1 + D): what it changes and what hides it are both small changes of the static space,
whatever T is.
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
#: By this factor, at most, jitter hides less than its size says: changes that come one
#: after the other do not quite add up. Measured, by the Fisher information.
SECOND_ORDER = 1.05
#: Transforms that are groups, and stay of their kind wherever a start turns and moves
#: them to.
GROUPS = "TRANSLATION", "RIGID", "RIGIDISOSCALING", "AFFINE"
_RIGID = "TRANSLATION", "RIGID"


class Frame:
    """Normal coordinates of the static space, and small changes of it.

    In *normal coordinates* the middle of the image's grid is the origin, and the size
    of the smaller of the two images' grids the unit. They are public.

    Parameters
    ----------
    static_shape, moving_shape : tuple of int
    static_grid2world, moving_grid2world : array, shape (dim + 1, dim + 1)
        mm.

    Attributes
    ----------
    dim : int
    size : float
        the unit, mm.
    covariance : array, shape (dim, dim)
        of the ball that a step's size is measured by, in normal coordinates.
    to_normal : array, shape (dim + 1, dim + 1)
        from mm.
    affine : array, shape (dim * (dim + 1), dim, dim + 1)
        `generators` of every affine change.
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
        middle = static_grid2world @ np.append((np.array(static_shape) - 1) / 2, 1)
        self.to_normal = np.eye(dim + 1) / self.size
        self.to_normal[:, -1] = -middle / self.size
        self.to_normal[-1, -1] = 1
        self.affine = self.generators(regtransforms["AFFINE", dim])

    def world(self, matrix):
        """A change of the static space in normal coordinates as one in mm."""
        return np.linalg.inv(self.to_normal) @ matrix @ self.to_normal

    def generators(self, transform):
        """Small steps of a transform, orthonormal as `quasinewton` measures them.

        Parameters
        ----------
        transform : instance of Transform

        Returns
        -------
        generators : array, shape (p, dim, dim + 1)
            in normal coordinates.
        """
        jacobian = linear_jacobian(transform, transform.get_identity_parameters())
        jacobian = jacobian @ np.linalg.inv(self.to_normal) / self.size
        basis = orthonormal_steps(jacobian, np.zeros(self.dim), self.covariance)
        return np.einsum("kl,kde->lde", basis, jacobian)

    def directions(self, generators):
        """How `generators` move a point of the static space, mm."""
        return self.size * generators @ self.to_normal

    def turned(self, change, generators):
        """Components of ``change^-1 G change`` along `affine`, of generators G.

        Parameters
        ----------
        change : array, shape (dim + 1, dim + 1)
        generators : array, shape (p, dim, dim + 1)

        Returns
        -------
        components : array, shape (p, dim * (dim + 1))
        """
        turned = np.linalg.inv(change[:-1, :-1]) @ generators @ change
        count = len(self.affine)
        basis = self.affine.reshape(count, count)
        return np.linalg.solve(basis.T, turned.reshape(-1, count).T).T

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

    An evaluation shows :math:`A = T R`. Whatever is thought of T, say :math:`T_0`, it
    shows :math:`T_0^{-1} A = (1 + \epsilon) R`: to first order what T is besides, and
    Gaussian noise, of variance N at least along every one of the D directions that T
    may have been changed in. Let S be the sum over them of the variance of what is not
    known of T before it, divided by N. Then it shows at most

    .. math:: \frac12 \log_2 \det (1 + P / N) \le \frac D2 \log_2 (1 + S / D)

    bits, with the covariance P, because no distribution of a covariance has a larger
    entropy than the Gaussian one, and by the concavity of the logarithm. Of S is left
    at most :math:`S / (1 + S / D)`, what a linear estimate leaves. Whatever a step
    depends on, it is no longer than L, so before the next look

    .. math:: S' \le \left(\sqrt{S / (1 + S / D)} + L / \sqrt N\right)^2

    (Minkowski). The mean of a transforms is known no worse than so: each but the last
    has been looked at, of which :math:`\sqrt S` is left in the mean, and
    :math:`L / (a \sqrt N)` of the last. That holds for whatever images the moving
    owner registers and wherever it starts, but not if its program differs from this
    one: see doc/security.md.

    Parameters
    ----------
    dim : int
    """

    def __init__(self, dim):
        move, strain = MOVE**2 / (dim * (dim + 1) // 2), STRAIN**2 / dim**2
        # Beyond the first order the noise is smaller, for stretches by up to 1/20.
        rigid, least = move / SECOND_ORDER, min(move, strain) / SECOND_ORDER
        self._hiding = {
            kind: (
                regtransforms[kind, dim].get_number_of_parameters(),
                rigid if kind in _RIGID else least,
            )
            for kind in GROUPS
        }
        #: Sum of variances of what is not known, in the square of a step's unit; what
        #: a step since the last evaluation was no longer than, if there was one; and
        #: in how many directions, with what noise.
        self._unknown, self._last, self._hidden_by = 0.0, None, (0, 0.0)

    def show(self, kind, longest):
        """Most bits that the next evaluation shows.

        Parameters
        ----------
        kind : str
            the transform.
        longest : float
            no step after it is longer.

        Returns
        -------
        bits : float
        """
        # As many directions as it may have been changed in before.
        directions, noise = max(self._hidden_by, self._hiding[kind])
        last, self._last, self._hidden_by = self._last, longest, (directions, noise)
        if last is None:
            return 0.0
        before = (np.sqrt(self._unknown / noise) + last / np.sqrt(noise)) ** 2
        more = 1 + before / directions
        self._unknown = before / more * noise
        return float(directions / 2 * np.log2(more))


def nearest_parameters(transform, change, start, frame):
    """Parameters of the transform after a start that is nearest to a change before it.

    Parameters
    ----------
    transform : instance of Transform
    change : array, shape (dim, dim + 1)
        of the static space, in normal coordinates.
    start : array, shape (dim + 1, dim + 1)
        from the static to the moving space, mm.
    frame : Frame

    Returns
    -------
    params : array, shape (p,)
        of the transform T, so that ``T @ start`` is nearest to ``start @ change``.
    """
    weight = np.append(np.sqrt(np.diag(frame.covariance)), 1)
    # Into normal coordinates, before and after.
    before = start @ np.linalg.inv(frame.to_normal)
    after = np.linalg.inv(before)

    def differences(params):
        found = after @ transform.param_to_matrix(params) @ before
        return ((found[:-1] - change) * weight).ravel()

    first = transform.get_identity_parameters()
    scales = np.linalg.norm(least_squares(differences, first, max_nfev=1).jac, axis=0)
    found = least_squares(differences, first, x_scale=1 / scales, xtol=1e-14)
    return found.x
