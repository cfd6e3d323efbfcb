r"""Local cross-correlation as a metric of affine registration, on shares.

The counterpart of ``CrossCorrelationMetric`` of DIPY's development version: the mean of
the squared local correlations, whose gradient is projected onto the parameters of a
transform. What is computed of both images is `dipy_ppir.mpc.localcc`; here is what an
owner does with its own, and what the optimizer wants
(`dipy_ppir.align.quasinewton.minimise`).

The first curvature is that of Gauss and Newton: where two images match, along
directions k and l the second derivative of minus the squared correlation of a window is
twice

.. math:: M_{c, kl} = f_c^2 \big( D_c(\partial_k m, \partial_l m)
          - f_c^2 \, D_c(m, \partial_k m) \, D_c(m, \partial_l m) \big),

which the moving owner knows, and where they match less it is smaller by the squared
correlation. So the curvature is :math:`2 \phi \bar M`, with :math:`\phi` the mean of
the squared correlations, weighed by the traces of M: one number on shares.
"""

import math
from typing import NamedTuple

from dipy.align.imaffine import AffineMap
from dipy.testing.decorators import warning_for_keywords
import numpy as np

from dipy_ppir.align import quasinewton
from dipy_ppir.align.affinemetric import StepsOnShares
from dipy_ppir.align.agreed import keep_to
from dipy_ppir.align.intensities import prepared, span
from dipy_ppir.align.parameters import AffineParameters
from dipy_ppir.align.parzenhist import linear_jacobian
from dipy_ppir.align.quasinewton import (
    LARGEST_WEIGHT,
    SCALE,
    object_moments,
    orthonormal_steps,
    regular_inverse,
)
from dipy_ppir.align.remote import grid2world_of, is_remote
from dipy_ppir.align.secretmetric import Positions
from dipy_ppir.mpc.algebra import Shares
from dipy_ppir.mpc.localcc import (
    GUARD,
    IMAGE,
    Known,
    SecretCorrelation,
    Slopes,
    Windows,
)

#: Grids of no more voxels have windows twice as close to each other.
SMALL = 20_000
#: Of images that match, the metric is no smaller part of what is possible, in small
#: grids and in others, and no smaller part of what it was at the beginning. Of brains
#: it is half or more, and a third; of a brain and noise at most a third, and a fifth.
LEAST_SMALL, LEAST_CORRELATION, KEPT_CORRELATION = 0.38, 0.22, 0.95


def spacing_of(shape, radius):
    """How many voxels apart the windows of a level's grid are: half their width."""
    spacing = radius + 1
    return max(spacing // 2, 2) if is_small(shape) else spacing


def is_small(shape):
    """Whether a grid is one of few voxels."""
    return math.prod(shape) <= SMALL


def scaled(image, radius):
    """An image between 0 and 1 but for outliers; see `intensities`."""
    image = prepared(image, radius, GUARD).image
    low, high, least, most = span(image)
    if not high > low:
        return np.zeros(image.shape)
    return (np.clip(image, least, most) - low) / (high - low)


def known_of(image, windows, mask=None):
    """What an owner knows of its image; windows count whose centres are in the mask.

    Parameters
    ----------
    image : array, shape of the windows' grid
    windows : Windows
    mask : array, optional
        of that shape.

    Returns
    -------
    known : Known
    """
    image = np.rint(image / IMAGE.unit) * IMAGE.unit
    variance = np.maximum(windows.covariance(image, image), 0)
    inverse = 1 / np.sqrt(variance + GUARD**2)
    if mask is not None:
        inverse = inverse * (mask[np.ix_(*windows.points)] != 0)
    return Known(image, inverse)


class Moved(NamedTuple):
    """What the moving owner brings to an evaluation.

    Attributes
    ----------
    known : Known
    matrix : array, shape (p, dim * (dim + 1))
        what the components of a step do to a voxel, by its position, in voxels.
    inverse, weight : array
        with the first curvature: see `quasinewton.first_inverse`.
    """

    known: Known
    matrix: np.ndarray
    inverse: np.ndarray = None
    weight: np.ndarray = None


class MovingSide:
    """The moving owner's image on the grid of a level, wherever it is moved.

    Parameters
    ----------
    image : array
        scaled.
    grid2world : array, shape (dim + 1, dim + 1)
    mask : array or None
    windows : Windows
        of the static image's grid.
    static_grid2world : array, shape (dim + 1, dim + 1)
    """

    def __init__(self, image, grid2world, mask, windows, static_grid2world):
        self.image, self.grid2world = image, grid2world
        self.mask = None if mask is None else (np.asarray(mask) != 0).astype(np.int32)
        self.windows = windows
        self.positions = Positions(windows.shape, static_grid2world)
        self._map = AffineMap(
            np.eye(windows.dim + 1),
            domain_grid_shape=windows.shape,
            domain_grid2world=static_grid2world,
            codomain_grid_shape=image.shape,
            codomain_grid2world=grid2world,
        )

    def known(self, affine):
        """What is known at a transform, without columns."""
        self._map.set_affine(affine)
        image, mask = self._map.transform(self.image), None
        if self.mask is not None:
            mask = self._map.transform(self.mask, interpolation="nearest")
        return known_of(np.asarray(image, dtype=np.float64), self.windows, mask)

    def moved(self, affine, jacobian, curvature):
        """What is known, and how it changes.

        Parameters
        ----------
        affine : array, shape (dim + 1, dim + 1)
            from the static to the moving image's space, mm.
        jacobian : array, shape (p, dim, dim + 1)
            how it changes with the components of a step.
        curvature : bool
            whether the first curvature is wanted.

        Returns
        -------
        moved : Moved
        """
        known, w, dim = self.known(affine), self.windows, self.windows.dim
        to_world, p = self.positions.to_world, len(jacobian)
        back = np.linalg.inv(affine[:dim, :dim] @ to_world[:dim, :dim])
        matrix = back @ jacobian @ to_world
        terms = Slopes(w).clear((known.image,), (known.image,)) * known.inverse**2
        columns = np.tensordot(matrix.reshape(p, -1), terms, 1)
        if not curvature:
            known = known._replace(columns=columns)
            return Moved(known, matrix.reshape(p, -1))
        moments, weights = self._curvature(known, matrix, columns)
        largest, part = weights.max(), 0.0
        if largest > 0:
            weights = weights / largest
            part = 1 / weights.mean()
        inverse, weight = regular_inverse(2 * moments[None], 1.0)
        known = known._replace(columns=np.concatenate([columns, weights[None]]))
        weight = np.minimum(part * weight, LARGEST_WEIGHT)
        return Moved(known, matrix.reshape(p, -1), inverse, weight)

    def _curvature(self, known, matrix, columns):
        """Mean of the windows' moments, and their traces.

        A window's voxels are taken to be moved as its centre is.
        """
        w, dim = self.windows, self.windows.dim
        slopes = [
            difference.clear(known.image, axis)
            for axis, difference in enumerate(w.differences)
        ]
        covariances = np.empty((dim, dim, *w.coarse))
        for a in range(dim):
            for b in range(a + 1):
                covariances[a, b] = covariances[b, a] = w.covariance(
                    slopes[a], slopes[b]
                )
        squared = known.inverse**2
        covariances = (covariances * squared).reshape(dim, dim, -1)
        centers = np.meshgrid(
            *(p - n // 2 for p, n in zip(w.points, w.shape, strict=True)),
            indexing="ij",
        )
        centers = np.stack([*centers, np.ones(w.coarse)]).reshape(dim + 1, -1)
        moves = np.tensordot(matrix, centers, 1)
        along = np.einsum("kdc,dec->kec", moves, covariances)
        columns = columns.reshape(len(matrix), -1)
        moments = np.einsum("kec,lec->kl", along, moves) - columns @ columns.T
        traces = np.einsum("kec,kec->c", along, moves) - (columns**2).sum(axis=0)
        return moments / w.count, np.maximum(traces, 0).reshape(w.coarse)


class LevelCorrelation:
    """One level's metric, as `quasinewton.minimise` wants it.

    Parameters
    ----------
    evaluations : SecretCorrelation or ClearCorrelation
    transform : instance of Transform
    moving : MovingSide, at the moving owner only
    starting_affine : array, shape (dim + 1, dim + 1), optional
        at the moving owner.

    Attributes
    ----------
    basis : array, shape (p, p)
        the steps, see `orthonormal_steps`; at the moving owner.
    """

    def __init__(self, evaluations, transform, moving=None, starting_affine=None):
        self._evaluations, self.transform = evaluations, transform
        self.parameters = transform.get_number_of_parameters()
        self.basis = self._part = self._mine = None
        self._moving, self._first = moving, True
        dim = evaluations.windows.dim
        self._start = np.eye(dim + 1) if starting_affine is None else starting_affine

    def begin(self, params):
        """Choose the steps around parameters, at the moving owner."""
        if params is not None:
            jacobian = linear_jacobian(self.transform, params)
            moments = object_moments(self._moving.image, self._moving.grid2world)
            self.basis = orthonormal_steps(jacobian, *moments)
        self._first = True

    def evaluate(self, params):
        """Value and gradient of the metric, times `SCALE`.

        Parameters
        ----------
        params : array, shape (p,), or None
            at the moving owner only.
        """
        known = matrix = None
        if params is not None:
            affine = self.transform.param_to_matrix(params) @ self._start
            jacobian = linear_jacobian(self.transform, params) @ self._start
            jacobian = np.einsum("kde,kl->lde", jacobian, self.basis)
            moved = self._moving.moved(affine, jacobian, self._first)
            known, matrix = moved.known, moved.matrix
            if self._first:
                self._mine = moved.inverse, moved.weight
        found = self._evaluations.evaluate(
            SCALE, self.parameters, known, matrix, part=self._first
        )
        if self._first:
            self._part, self._first = found.part, False
        return found.value, found.gradient

    def value(self, affine=None):
        """Value of the metric, times `SCALE`.

        Parameters
        ----------
        affine : array, shape (dim + 1, dim + 1), at the moving owner only
            from the static to the moving image's space, mm.
        """
        known = None if affine is None else self._moving.known(affine)
        return self._evaluations.evaluate(SCALE, 0, known).value

    def first_inverse(self, numbers):
        """What the optimizer begins with, after the first evaluation."""
        inverse, weight = self._mine or (None, None)
        return quasinewton.first_inverse(
            numbers, inverse, weight, self._part, self.parameters
        )


class SecureCrossCorrelationMetric(StepsOnShares):
    """Local cross-correlation of two parties' images, computed on secret shares.

    Mirrors ``CrossCorrelationMetric`` of ``dipy.align.imaffine`` in DIPY's development
    version. For images of the same modality, or of such whose edges are at the same
    places; a `SecureAffineRegistration` takes it in place of mutual information.

    Parameters
    ----------
    radius : int, optional
        of the windows, voxels of a level's grid; 4 by default.
    session : Session, optional
        this party's session.

    Raises
    ------
    ValueError
        if the radius cannot be used.

    Notes
    -----
    With radius 4 an evaluation takes some 24 bytes per voxel over all links, of small
    grids 144, in 7 rounds and some 40 of the optimizer's; the static image once per
    resolution level 16. Every voxel is used.
    """

    name, title, names = "CC", "minus mean squared local correlation", ("radius",)
    kept = KEPT_CORRELATION
    reveal = "transform"

    @warning_for_keywords()
    def __init__(self, *, radius=None, session=None):
        self.radius = AffineParameters(metric="CC", radius=radius).radius
        self.join(session)
        #: The metric on shares, after `setup`; see `LevelCorrelation`.
        self.shared = None
        self._static = self._moving = None

    def config(self):
        """Public parameters of the metric, JSON-able."""
        return {"metric": self.name, "radius": self.radius}

    def join(self, session):
        """Make the metric part of `session`, or of none with None."""
        keep_to(session, "affine", self.config())
        self.session = session
        self._world = None if session is None else Shares(session)

    @warning_for_keywords()
    def setup(
        self,
        transform,
        static,
        moving,
        *,
        static_grid2world=None,
        moving_grid2world=None,
        starting_affine=None,
        static_mask=None,
        moving_mask=None,
        level=None,
    ):
        """Prepare the metric for a pair of images, at every party.

        The static image is shared now. Rounds: 1. Elements: 1 per voxel and window.

        Parameters
        ----------
        transform : instance of Transform
        static, moving : array or RemoteImage
        static_grid2world, moving_grid2world : array, optional
            voxel-to-space transformations, mm; of a `RemoteImage`, its own.
        starting_affine : array, optional
            pre-aligning matrix, at the moving owner only.
        static_mask, moving_mask : array, optional
            of the images that are here: windows count whose centres are in both.
        level : int, optional
            of the images; there is no difference.
        """
        shape = tuple(int(n) for n in static.shape)
        static_grid2world = grid2world_of(static, static_grid2world)
        moving_grid2world = grid2world_of(moving, moving_grid2world)
        self.windows = Windows(shape, self.radius, spacing_of(shape, self.radius))
        self._static = self._moving = None
        if not is_remote(static):
            self._static = known_of(
                scaled(static, self.radius), self.windows, static_mask
            )
        if not is_remote(moving):
            self._moving = MovingSide(
                scaled(moving, self.radius),
                moving_grid2world,
                moving_mask,
                self.windows,
                static_grid2world,
            )
        self._settings = transform, starting_affine
        self.share_static()

    def share_static(self):
        """Share the static image."""
        transform, starting_affine = self._settings
        evaluations = SecretCorrelation(
            self.session, self._world, self.windows, quasinewton.DIGITS
        )
        self.session.ledger.about(int(np.prod(self.windows.shape)))
        with self.session.phase("static image"):
            evaluations.share_static(self._static)
        self.shared = LevelCorrelation(
            evaluations, transform, self._moving, starting_affine
        )

    def least_value(self):
        """See `StepsOnShares`."""
        if self._static is None:
            return None
        part = LEAST_SMALL if is_small(self.windows.shape) else LEAST_CORRELATION
        return part * possible(self._static)


def possible(known):
    r"""Mean squared correlation of an image with one that has the same pattern.

    :math:`(D_c e_c^2)^2 = (1 - g^2 e^2)^2`: 1, but for flat windows.
    """
    part = 1 - (GUARD * known.inverse) ** 2
    return float(np.mean(np.where(known.inverse > 0, part, 0) ** 2))
