"""Affine registration of two images that two parties hold.

Mirrors ``dipy.align.imaffine``: `SecureMutualInformationMetric` and
`SecureAffineRegistration` subclass their namesakes there and take the same
arguments. The moving owner runs the optimizer and keeps the transform
parameters; the static owner and the helper take part in every evaluation of
the metric. Each owner builds the scale space of its own image.

Every party calls the same functions: the image it does not hold is a
`RemoteImage`. Called with both images, the other two parties are started as
processes on this machine and run the same protocol.
"""

from collections import deque
import hashlib
from warnings import warn

from dipy.align import vector_fields as vf
from dipy.align.imaffine import (
    AffineInvalidValuesError,
    AffineInversionError,
    AffineMap,
    AffineRegistration,
    MutualInformationMetric,
    transform_geometric_centers,
    transform_origins,
)
from dipy.align.imwarp import ScaleSpace, get_direction_and_spacings
from dipy.align.parzenhist import sample_domain_regular
from dipy.align.scalespace import IsotropicScaleSpace
from dipy.align.transforms import regtransforms
from dipy.core.interpolation import interpolate_scalar_2d, interpolate_scalar_3d
from dipy.core.optimize import Optimizer
from dipy.testing.decorators import warning_for_keywords
import numpy as np
import numpy.linalg as npl
from scipy import ndimage

from dipy_ppir._kernels import sampling
from dipy_ppir.align.checkpoint import (
    CheckpointError,
    begin_or_resume,
    digest,
    journal,
)
from dipy_ppir.align.parzenhist import SecureParzenJointHistogram, check_reveal
from dipy_ppir.align.remote import RemoteImage, grid2world_of, is_remote
from dipy_ppir.align.validation import check_image, check_mask
from dipy_ppir.mpc import local
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.fields import P127
from dipy_ppir.mpc.ledger import MOVING, STATIC, declare
from dipy_ppir.mpc.protocols import share

__all__ = [
    "AffineInvalidValuesError",
    "AffineInversionError",
    "AffineMap",
    "SecureAffineRegistration",
    "SecureMutualInformationMetric",
    "transform_centers_of_mass",
    "transform_geometric_centers",
    "transform_origins",
]

declare(
    "center_of_mass",
    receivers=(MOVING,),
    shape="2 or 3, once",
    meaning="the shift between the centres of mass of the two images to 0.001 mm, and "
    "so the static image's centre",
)
declare(
    "affine",
    receivers=(STATIC,),
    shape="(dim + 1) x (dim + 1), once",
    meaning="the resulting transform",
)

#: Fraction bits of a centre of mass in mm.
CENTER_BITS = 10

_TRANSFORM_NAMES = {type(t): key for key, t in regtransforms.items()}


class SecureMutualInformationMetric(MutualInformationMetric):
    """Mutual information of two parties' images, computed on secret shares.

    Takes the place of ``dipy.align.imaffine.MutualInformationMetric``, also
    inside DIPY's own ``AffineRegistration`` when both images are here.

    Parameters
    ----------
    nbins : int, optional
        number of bins of the joint histogram, at least 6.
    sampling_proportion : None or float in (0, 1], optional
        share of the voxels to use; None uses all.
    reveal : {"gradient", "histogram"}, optional
        what the moving owner learns at each evaluation: the metric's value and
        gradient only (the default), or the joint histogram and the gradient. The
        latter is up to twice as fast and rounds finer, but the histograms
        of one registration can determine the static image at coarse resolution
        levels: see ``doc/security.md`` before you choose it.
    session : Session, optional
        this party's session; by default the other parties are started on this
        machine when first needed.

    Raises
    ------
    ValueError
        if an argument is out of range.

    Notes
    -----
    Bytes: with 32 bins and p parameters, an evaluation with gradient takes
    ``8 * (64 + p)`` per sample over all links with ``reveal="histogram"`` and
    ``8 * (128 + p)`` plus 3.1 MB with ``reveal="gradient"``; either way
    ``8 * 28`` per sample once per resolution level. Rounds: 5 and 10.
    """

    @warning_for_keywords()
    def __init__(
        self, *, nbins=32, sampling_proportion=None, reveal="gradient", session=None
    ):
        super().__init__(nbins=nbins, sampling_proportion=sampling_proportion)
        if sampling_proportion is not None and not 0 < sampling_proportion <= 1:
            raise ValueError(
                f"sampling_proportion must be in (0, 1] or None, got "
                f"{sampling_proportion}"
            )
        check_reveal(reveal)
        self.reveal = reveal
        self.session = session
        self.histogram = SecureParzenJointHistogram(
            nbins, reveal=reveal, session=session
        )
        #: Number of evaluations so far.
        self.evaluations = 0
        #: Called after every evaluation with a dict; see `SecureAffineRegistration`.
        self.callback = None

    def join(self, session):
        """Make the metric part of `session`, or of none with None."""
        self.session = session
        self.histogram = SecureParzenJointHistogram(
            self.histogram.nbins, reveal=self.reveal, session=session
        )

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
    ):
        """Prepare the metric for a pair of images, at every party.

        In a session the static image is shared now. Rounds: 1. Elements:
        ``nbins - 4`` per sample.

        Parameters
        ----------
        transform : instance of Transform
        static, moving : array or RemoteImage
        static_grid2world, moving_grid2world : array, optional
            voxel-to-space transformations, mm; of a `RemoteImage`, its own.
        starting_affine : array, optional
            pre-aligning matrix, at the moving owner only.
        static_mask, moving_mask : array, optional
            as in DIPY.
        """
        self.dim = len(static.shape)
        self.transform = transform
        self.metric_grad = np.zeros(transform.get_number_of_parameters())
        self.static_grid2world = grid2world_of(static, static_grid2world)
        self.moving_grid2world = grid2world_of(moving, moving_grid2world)
        self.static_world2grid = npl.inv(self.static_grid2world)
        self.moving_world2grid = npl.inv(self.moving_grid2world)
        self.moving_direction, self.moving_spacing = get_direction_and_spacings(
            self.moving_grid2world, self.dim
        )
        self.moving_spacing = np.asarray(self.moving_spacing, dtype=np.float64)
        self.starting_affine = starting_affine
        self.affine_map = AffineMap(
            np.eye(self.dim + 1) if starting_affine is None else starting_affine,
            domain_grid_shape=static.shape,
            domain_grid2world=self.static_grid2world,
            codomain_grid_shape=moving.shape,
            codomain_grid2world=self.moving_grid2world,
        )
        self.static_mask, self.moving_mask = self._masks(static_mask, moving_mask)
        if self.dim == 2:
            self.interp_method = interpolate_scalar_2d
        else:
            self.interp_method = interpolate_scalar_3d
        self.static, self.moving = (
            image if is_remote(image) else np.array(image, dtype=np.float64, order="C")
            for image in (static, moving)
        )
        self.histogram.setup(
            self.static, self.moving, smask=self.static_mask, mmask=self.moving_mask
        )
        self._place_samples()
        values, mask = self._static_values()
        if self.session is not None:
            self.histogram.share_static(self._count, values, mask)
        else:
            self.histogram.end()
            self._local_static = values, mask

    def _masks(self, static_mask, moving_mask):
        # As in DIPY, masks can only be used with dense sampling.
        masks = [static_mask, moving_mask]
        if self.sampling_proportion in (None, 1.0):
            return [
                None if m is None else np.asarray(m).astype(np.int32) for m in masks
            ]
        if any(m is not None for m in masks):
            warn(
                "Masking is not implemented for sampling_proportion < 1, "
                "setting static_mask = None and moving_mask = None",
                UserWarning,
                stacklevel=5,  # past the decorator of `setup`
            )
        return None, None

    def _place_samples(self):
        """Choose the samples: a function of public parameters only."""
        shape = np.array(self.static.shape, dtype=np.int32)
        if self.sampling_proportion is None:
            self.samples = None
            self.ns = 0
            self._count = int(np.prod(shape))
            return
        k = int(np.ceil(1.0 / self.sampling_proportion))
        points = np.array(sample_domain_regular(k, shape, self.static_grid2world))
        self.ns = self._count = len(points)
        self.samples = np.hstack((points, np.ones(self.ns)[:, None]))
        start = self.starting_affine
        self.samples_prealigned = (
            self.samples if start is None else start.dot(self.samples.T).T
        )
        if self.session is not None:
            digest = hashlib.sha256(points.tobytes()).hexdigest()
            self.session.agree("sample points", {"digest": digest})

    def _static_values(self):
        if is_remote(self.static):
            return None, None
        if self.samples is None:
            return self.static.reshape(-1), self.static_mask
        points = self.static_world2grid.dot(self.samples.T).T[..., : self.dim]
        values, _ = self.interp_method(self.static, points)
        self.static_vals = np.array(values, dtype=np.float64)
        return self.static_vals, None

    def serve(self, limit=None, on_evaluation=None):
        """Take part in at most `limit` evaluations, until the moving owner ends."""
        self.histogram.serve(limit, on_evaluation)

    def end(self):
        """End the evaluations, at the moving owner."""
        self.histogram.end()

    def receipt(self, **facts):
        """Receipt of the evaluations so far, for a metric without a session."""
        return self.histogram.receipt(**facts)

    def _update_mutual_information(self, params, *, update_gradient=True):
        # Follows DIPY step by step; only what needs the static image differs.
        current_affine = self.transform.param_to_matrix(params)
        static2prealigned = self.static_grid2world
        if self.starting_affine is not None:
            current_affine = current_affine.dot(self.starting_affine)
            static2prealigned = self.starting_affine.dot(static2prealigned)
        self.affine_map.set_affine(current_affine)

        histogram = self.histogram
        with histogram.undisturbed():
            if self.session is None:
                histogram.talk_locally(self._count, *self._local_static)
            # The others can start while this party interpolates its image.
            histogram.announce()
            moving, gradient = self._sample_moving(current_affine, update_gradient)
            if self.samples is None:
                static = RemoteImage(self.static.shape)
                mask = None
                if self.moving_mask is not None:
                    mask = self.affine_map.transform(
                        self.moving_mask, interpolation="nearest"
                    ).astype(np.int32)
                histogram.update_pdfs_dense(static, moving, mmask=mask)
                if update_gradient:
                    histogram.update_gradient_dense(
                        params,
                        self.transform,
                        static,
                        moving,
                        static2prealigned,
                        gradient,
                        mmask=mask,
                    )
            else:
                static = _RemoteValues(self.ns)
                histogram.update_pdfs_sparse(static, moving)
                if update_gradient:
                    histogram.update_gradient_sparse(
                        params,
                        self.transform,
                        static,
                        moving,
                        self.samples_prealigned[..., : self.dim],
                        gradient,
                    )
        self.metric_val = histogram.metric_value
        if update_gradient:
            # A new array: optimizers keep the gradient they are given.
            self.metric_grad = np.array(histogram.metric_gradient)
        self.evaluations += 1
        if self.callback is not None:
            self.callback(self)

    def _sample_moving(self, affine, with_gradient):
        """Moving image, and its gradient, at the samples moved by `affine`.

        Returns
        -------
        values : array, shape (S, R, C), (R, C) or (n,)
        gradient : array, shape ``values.shape + (dim,)``, or None
            per mm.
        """
        world2grid, spacing = self.moving_world2grid, self.moving_spacing
        dense = self.samples is None
        if self.dim == 2:
            return self._sample_moving_2d(affine, with_gradient)
        shape = self.static.shape if dense else (self.ns,)
        values = np.empty(shape)
        gradient = np.empty((*shape, 3)) if with_gradient else None
        flat = None if gradient is None else gradient.reshape(-1, 3)
        if dense:
            grid2world = affine.dot(self.static_grid2world)
            sampling.sample_grid(
                self.moving,
                world2grid.dot(grid2world),
                grid2world,
                world2grid,
                spacing,
                np.array(shape, dtype=np.int32),
                values.reshape(-1),
                flat,
            )
        else:
            sampling.sample_points(
                self.moving, affine, world2grid, spacing, self.samples, values, flat
            )
        return values, gradient

    def _sample_moving_2d(self, affine, with_gradient):
        gradient = None
        if self.samples is None:
            values = self.affine_map.transform(self.moving)
            if with_gradient:
                gradient, _ = vf.gradient(
                    self.moving,
                    self.moving_world2grid,
                    self.moving_spacing,
                    self.static.shape,
                    affine.dot(self.static_grid2world),
                )
            return values, gradient
        points = affine.dot(self.samples.T).T
        on_grid = self.moving_world2grid.dot(points.T).T[..., : self.dim]
        values, _ = self.interp_method(self.moving, on_grid)
        if with_gradient:
            gradient, _ = vf.sparse_gradient(
                self.moving, self.moving_world2grid, self.moving_spacing, points
            )
        return np.array(values), gradient


class _RemoteValues(RemoteImage):
    """Sampled intensities of a remote image."""

    def __init__(self, count):
        self.shape = (count,)
        self.dim = self.ndim = 1


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
            "dipy_ppir.align.imaffine:_centers_reply",
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


class SecureAffineRegistration(AffineRegistration):
    """Multi-resolution affine registration of two parties' images.

    Takes the place of ``dipy.align.imaffine.AffineRegistration``.

    Parameters
    ----------
    metric : SecureMutualInformationMetric, optional
        by default one with default settings.
    level_iters, sigmas, factors, method, ss_sigma_factor, options, verbosity
        as in DIPY.
    session : Session, optional
        this party's session. By default the other parties are started as
        processes on this machine.
    callback : callable, optional
        called with every evaluation with a dict of ``step``, ``level``,
        ``iteration``, ``bytes_sent`` and, at the moving owner, ``value``.
    result_to : {"both", "moving"}, optional
        which image owners get the resulting transform.
    checkpoint : Checkpoint, optional
        where this party keeps its state, to go on after an interruption; needs a
        session.

    Attributes
    ----------
    receipt : dict or None
        what each party learned in the last registration and what it cost.

    Raises
    ------
    ValueError
        if parameters contradict each other.
    """

    @warning_for_keywords()
    def __init__(
        self,
        *,
        metric=None,
        level_iters=None,
        sigmas=None,
        factors=None,
        method="L-BFGS-B",
        ss_sigma_factor=None,
        options=None,
        verbosity=0,
        session=None,
        callback=None,
        result_to="both",
        checkpoint=None,
    ):
        if metric is None:
            metric = SecureMutualInformationMetric()
        if not isinstance(metric, SecureMutualInformationMetric):
            raise ValueError(
                "SecureAffineRegistration needs a SecureMutualInformationMetric; any "
                "other metric reads both images"
            )
        super().__init__(
            metric=metric,
            level_iters=level_iters,
            sigmas=sigmas,
            factors=factors,
            method=method,
            ss_sigma_factor=ss_sigma_factor,
            options=options,
            verbosity=verbosity,
        )
        if self.use_isotropic:
            check_levels(self.level_iters, self.factors, self.sigmas)
        if result_to not in ("both", "moving"):
            raise ValueError(f"result_to must be 'both' or 'moving', got {result_to!r}")
        self.session = session
        self.callback = callback
        self.result_to = result_to
        self.receipt = None
        self.step = None
        self.checkpoint = checkpoint
        #: Which step of a pipeline this is, and where an interrupted run goes on.
        self.step_number, self._resume_at = 0, (0, 0)

    # -- the same program at every party ---------------------------------

    @warning_for_keywords()
    def optimize(
        self,
        static,
        moving,
        transform,
        params0,
        *,
        static_grid2world=None,
        moving_grid2world=None,
        starting_affine=None,
        ret_metric=False,
        static_mask=None,
        moving_mask=None,
    ):
        """Register, as DIPY does, without showing either image.

        Parameters
        ----------
        static, moving : array or RemoteImage
            the image that another party holds is a `RemoteImage`.
        transform : instance of Transform
        params0 : array or None
            parameters to start from, at the moving owner.
        static_grid2world, moving_grid2world : array, optional
            voxel-to-space transformations, mm.
        starting_affine : {"mass", "voxel-origin", "centers"}, array or None
            as in DIPY; a matrix is the moving owner's.
        ret_metric : bool, optional
            also return the parameters and the metric value.
        static_mask, moving_mask : array, optional
            masks of the images that are here.

        Returns
        -------
        affine_map : AffineMap
            the result, at the owners that get it.
        xopt, fopt
            with `ret_metric`: optimal parameters of the last level and the value
            of the metric there, at the moving owner; None elsewhere.

        Raises
        ------
        ValueError
            if an image, mask or parameter cannot be used; before any connection
            is opened.
        ParameterMismatchError
            if the parties do not use the same parameters.
        """
        check_image(static, static_grid2world, "static")
        check_image(moving, moving_grid2world, "moving")
        if len(static.shape) != len(moving.shape):
            raise ValueError("static and moving images must have the same dimension")
        check_mask(static_mask, static, "static")
        check_mask(moving_mask, moving, "moving")
        if self.use_isotropic:
            check_pyramid(
                static.shape, grid2world_of(static, static_grid2world), self.factors
            )
        arguments = {
            "static": static,
            "moving": moving,
            "static_grid2world": static_grid2world,
            "moving_grid2world": moving_grid2world,
            "static_mask": static_mask,
            "moving_mask": moving_mask,
        }
        if self.session is not None:
            self.agree(transform, starting_affine, **arguments)
            self.begin_checkpoint(1, starting_affine, **arguments)
            result = self.run(
                transform, params0, starting_affine=starting_affine, **arguments
            )
            self.share_result(result[0])
            self.receipt = self.session.receipt()
            return result if ret_metric else result[0]
        if is_remote(static) or is_remote(moving):
            raise ValueError(
                "a RemoteImage needs a session with the party that holds the image"
            )
        if self.checkpoint is not None:
            raise ValueError("a checkpoint needs a session; leave it out")
        here, there, helper = split(arguments)
        common = {
            "config": self.config(),
            "transform": list(_TRANSFORM_NAMES[type(transform)]),
            "starting_affine": starting_affine
            if isinstance(starting_affine, str)
            else None,
        }
        result = local.run_locally(
            lambda session: self._run_here(
                session, transform, params0, starting_affine, here
            ),
            "dipy_ppir.align.imaffine:_optimize_party",
            moving={},
            static={**common, **there},
            helper={**common, **helper},
        )[MOVING]
        return result if ret_metric else result[0]

    def _run_here(self, session, transform, params0, starting_affine, images):
        self.join(session)
        try:
            return self.optimize(
                transform=transform,
                params0=params0,
                starting_affine=starting_affine,
                ret_metric=True,
                **images,
            )
        finally:
            self.join(None)

    def join(self, session):
        """Make the registration part of `session`, or of none with None."""
        self.session = session
        self.metric.join(session)

    def config(self):
        """Public parameters of the registration, JSON-able."""
        metric = self.metric
        return {
            "nbins": metric.histogram.nbins,
            "sampling_proportion": metric.sampling_proportion,
            "reveal": metric.reveal,
            "method": self.method,
            "level_iters": [int(n) for n in self.level_iters],
            "factors": list(self.factors) if self.use_isotropic else None,
            "sigmas": list(self.sigmas) if self.use_isotropic else None,
            "ss_sigma_factor": None if self.use_isotropic else self.ss_sigma_factor,
            "result_to": self.result_to,
        }

    def agree(self, transform, starting_affine, **images):
        """Compare all public parameters with the other parties'."""
        parameters = self.config()
        for name in ("static", "moving"):
            image = images[name]
            parameters[name + "_shape"] = list(image.shape)
            matrix = grid2world_of(image, images[name + "_grid2world"])
            parameters[name + "_grid2world"] = matrix.tolist()
        if transform is not None:
            parameters["transform"] = list(_TRANSFORM_NAMES[type(transform)])
        parameters["checkpoint"] = self.checkpoint is not None
        parameters["resume"] = self.checkpoint is not None and self.checkpoint.resume
        parameters["starts_at_mass"] = (
            isinstance(starting_affine, str) and starting_affine == "mass"
        )
        with self.session.phase("agreement"):
            self.session.agree("registration", parameters)

    def share_result(self, affine_map):
        """Give the transform to the static owner, if the session says so."""
        if self.result_to != "both":
            return
        session, dim = self.session, self.dim
        mine = affine_map.affine if session.pid == MOVING else None
        session.ledger.about(None)
        with session.phase("result"):
            shared = share(
                session,
                MOVING,
                mine,
                (dim + 1, dim + 1),
                frac_bits=72,
                bound=2.0**48,
                field=P127,
                name="affine",
            )
            matrix = session.open(shared, "affine", (STATIC,))
        if matrix is not None:
            matrix[-1] = np.eye(dim + 1)[-1]
            affine_map.set_affine(matrix)

    def run(
        self,
        transform,
        params0,
        *,
        static,
        moving,
        static_grid2world,
        moving_grid2world,
        starting_affine,
        static_mask,
        moving_mask,
    ):
        """One registration inside a session; see `optimize`.

        Returns
        -------
        affine_map, xopt, fopt
            at the moving owner; elsewhere the map is the identity and the rest
            None.
        """
        self._init_optimizer(
            static,
            moving,
            transform,
            params0,
            static_grid2world,
            moving_grid2world,
            starting_affine,
            static_mask,
            moving_mask,
        )
        static_grid2world = grid2world_of(static, static_grid2world)
        moving_grid2world = grid2world_of(moving, moving_grid2world)
        conducts = self.session.pid == MOVING
        affine_map = AffineMap(
            None if conducts else np.eye(self.dim + 1),
            domain_grid_shape=static.shape,
            domain_grid2world=static_grid2world,
            codomain_grid_shape=moving.shape,
            codomain_grid2world=moving_grid2world,
        )
        optimum = None
        options = dict(self.options or {"gtol": 1e-4})
        for level in range(self.levels - 1, -1, -1):
            self.current_level = level
            live = self._place >= self._resume_at
            if live:
                self.metric.setup(
                    transform,
                    *self._level_images(level, static, moving),
                    static_grid2world=self.static_ss.get_affine(level),
                    moving_grid2world=moving_grid2world,
                    starting_affine=self.starting_affine if conducts else None,
                    static_mask=self._level_mask(level),
                    moving_mask=self.moving_mask,
                )
            if not conducts:
                if live:
                    self._serve()
                continue
            key = "maxfun" if self.method == "L-BFGS-B" else "maxiter"
            options[key] = self.level_iters[-1 - level]
            self.metric.callback = self._progress if self.callback else None
            self._iteration = 0
            optimum = Optimizer(
                self._evaluations(live),
                self.params0,
                method=self.method,
                jac=True,
                options=options,
            )
            if live:
                self.metric.end()
            matrix = transform.param_to_matrix(optimum.xopt)
            self.starting_affine = matrix.dot(self.starting_affine)
            self.params0 = transform.get_identity_parameters()
        if not conducts:
            return affine_map, None, None
        affine_map.set_affine(self.starting_affine)
        return affine_map, optimum.xopt, optimum.fopt

    # -- checkpoints -----------------------------------------------------

    @property
    def _place(self):
        """Step and level, in the order of the run."""
        return self.step_number, self.levels - 1 - self.current_level

    @property
    def finished_before(self):
        """Whether an interrupted run had finished this step."""
        return self.step_number < self._resume_at[0]

    def begin_checkpoint(self, steps, starting_affine, **images):
        """Find out where an interrupted run goes on; all parties together.

        The moving owner's journal holds what was opened to it. Its optimizer is fed
        with that again, and nothing is computed a second time but the evaluation that
        was under way; the other parties only need to know the step and level.

        Parameters
        ----------
        steps : int
            length of the pipeline.
        starting_affine, **images
            see `optimize`; a checkpoint belongs to them.
        """
        checkpoint, self._resume_at = self.checkpoint, (0, 0)
        if checkpoint is None:
            return
        here = {
            name: None if is_remote(images[name]) else images[name]
            for name in ("static", "moving", "static_mask", "moving_mask")
        }
        facts = {
            **self.config(),
            "static image": digest(here["static"], here["static_mask"]),
            "moving image": digest(here["moving"], here["moving_mask"]),
            "start": digest(
                starting_affine if isinstance(starting_affine, np.ndarray) else None
            ),
        }
        if not begin_or_resume(self.session, checkpoint, facts):
            return
        places = [r["place"] for r in checkpoint.records() if "place" in r]
        with self.session.phase("agreement"):
            views = self.session.exchange("resume", places[-1] if places else [0, 0])
        place = views[MOVING]
        limits = steps, self.levels
        if (
            not isinstance(place, list)
            or len(place) != 2
            or not all(
                type(n) is int and 0 <= n < limit
                for n, limit in zip(place, limits, strict=True)
            )
        ):
            raise ProtocolError("the moving owner resumes at no possible place", MOVING)
        self._resume_at = tuple(place)

    def _recorded(self):
        """Records of the interrupted run at this step and level."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return []
        place = list(self._place)
        return [r for r in checkpoint.records() if r.get("place") == place]

    def _evaluations(self, live):
        """The metric as a function of parameters, as the optimizer wants it."""
        evaluate = self.metric.distance_and_gradient
        if self.checkpoint is None:
            return evaluate
        recorded = deque(r for r in self._recorded() if "parameters" in r)
        place = list(self._place)

        def answer(parameters):
            given = np.asarray(parameters).tolist()
            if recorded and recorded[0]["parameters"] == given:
                record = recorded.popleft()
                return record["value"], np.array(record["gradient"])
            recorded.clear()
            if not live:
                raise CheckpointError(
                    "the checkpoint does not fit this program, which takes another "
                    "path; start anew at all parties, without --resume"
                )
            value, gradient = evaluate(parameters)
            record = {"place": place, "parameters": given, "value": float(value)}
            record["gradient"] = np.asarray(gradient).tolist()
            journal(self.session, self.checkpoint, **record)
            return value, gradient

        return answer

    def _serve(self):
        """Take part in the evaluations of a level, as many as were agreed."""
        limit, place = self._most_evaluations(self.current_level), list(self._place)
        if limit is not None:
            limit -= len(self._recorded())

        count = 0

        def note():
            nonlocal count
            count += 1
            journal(self.session, self.checkpoint, place=place)
            if self.callback is not None:
                self.callback(self._progress_facts(count))

        self.metric.serve(limit, note)

    def start_at_center(self, *images):
        """`transform_centers_of_mass`, or what an interrupted run found.

        Returns
        -------
        affine_map : AffineMap
        """
        self.current_level = self.levels - 1
        if not self.finished_before:
            affine_map = transform_centers_of_mass(*images, session=self.session)
            matrix = affine_map.affine.tolist()
            place = [self.step_number, 0]
            journal(self.session, self.checkpoint, place=place, center=matrix)
            return affine_map
        centers = [r["center"] for r in self._recorded() if "center" in r]
        return AffineMap(np.array(centers[-1]) if centers else np.eye(self.dim + 1))

    def _most_evaluations(self, level):
        """What the static owner agrees to; None where `method` sets no bound."""
        if self.method != "L-BFGS-B":
            return None
        # A line search may begin at the limit, take 20 steps, fail, and be tried once
        # more along the gradient.
        return self.level_iters[-1 - level] + 2 * 21

    def _progress(self, metric):
        self._iteration += 1
        facts = self._progress_facts(self._iteration)
        self.callback({**facts, "value": float(metric.metric_val)})

    def _progress_facts(self, iteration):
        return {
            "step": self.step,
            "level": self.current_level,
            "iteration": iteration,
            "max_iterations": self.level_iters[-1 - self.current_level],
            "bytes_sent": sum(self.session.ledger.sent.values()),
        }

    def _level_images(self, level, static, moving):
        shape = self.static_ss.get_domain_shape(level)
        grid2world = self.static_ss.get_affine(level)
        if is_remote(static):
            static = RemoteImage(shape, grid2world)
        else:
            to_level = self._to_level(level)
            static = to_level.transform(self.static_ss.get_image(level))
        if not is_remote(moving):
            moving = self.moving_ss.get_image(level)
        return static, moving

    def _to_level(self, level):
        return AffineMap(
            None,
            domain_grid_shape=self.static_ss.get_domain_shape(level),
            domain_grid2world=self.static_ss.get_affine(level),
            codomain_grid_shape=self.static_ss.get_domain_shape(0),
            codomain_grid2world=self.static_ss.get_affine(0),
        )

    def _level_mask(self, level):
        if self.static_mask is None:
            return None
        to_level = self._to_level(level)
        mask = to_level.transform(self.static_mask, interpolation="nearest")
        if not mask.any():
            raise ValueError(
                f"no voxel of the static mask is left where the image is reduced to "
                f"{'x'.join(map(str, mask.shape))} voxels; use a larger mask or "
                "smaller factors"
            )
        return mask.astype(np.int32)

    def _init_optimizer(
        self,
        static,
        moving,
        transform,
        params0,
        static_grid2world,
        moving_grid2world,
        starting_affine,
        static_mask,
        moving_mask,
    ):
        # Follows DIPY step by step, each owner with its own image.
        self.dim = len(static.shape)
        self.transform = transform
        self.nparams = transform.get_number_of_parameters()
        self.static_mask = usable_mask(static_mask, "static")
        self.moving_mask = usable_mask(moving_mask, "moving")
        static_grid2world = grid2world_of(static, static_grid2world)
        moving_grid2world = grid2world_of(moving, moving_grid2world)
        self.params0 = (
            transform.get_identity_parameters() if params0 is None else params0
        )
        self.starting_affine = self._start(
            starting_affine, static, static_grid2world, moving, moving_grid2world
        )
        self.static_ss = self._scale_space(static, self.static_mask, static_grid2world)
        self.moving_ss = self._scale_space(moving, self.moving_mask, moving_grid2world)

    def _start(self, start, static, static_grid2world, moving, moving_grid2world):
        images = static, static_grid2world, moving, moving_grid2world
        if start is None:
            return np.eye(self.dim + 1)
        if isinstance(start, np.ndarray):
            if start.shape != (self.dim + 1, self.dim + 1):
                raise ValueError("Invalid starting_affine matrix")
            return start
        if start == "mass":
            return transform_centers_of_mass(
                masked(static, self.static_mask),
                static_grid2world,
                masked(moving, self.moving_mask),
                moving_grid2world,
                session=self.session,
            ).affine
        if start == "voxel-origin":
            return transform_origins(*images).affine
        if start == "centers":
            return transform_geometric_centers(*images).affine
        raise ValueError("Invalid starting_affine strategy")

    def _scale_space(self, image, mask, grid2world):
        _, spacing = get_direction_and_spacings(grid2world, self.dim)
        remote = is_remote(image)
        if remote:
            # Only the grids are needed; without smoothing they cost little.
            image = np.zeros(image.shape)
        else:
            inside = image if mask is None else image[mask == 1]
            low, high = np.min(inside), np.max(inside)
            image = (image.astype(np.float64) - low) / (high - low)
        with np.errstate(all="ignore" if remote else None):
            if self.use_isotropic:
                return IsotropicScaleSpace(
                    image,
                    self.factors,
                    [0.0] * self.levels if remote else self.sigmas,
                    image_grid2world=grid2world,
                    input_spacing=spacing,
                    mask0=False,
                )
            return ScaleSpace(
                image,
                self.levels,
                image_grid2world=grid2world,
                input_spacing=spacing,
                sigma_factor=0.0 if remote else self.ss_sigma_factor,
                mask0=False,
            )


def check_levels(level_iters, factors, sigmas):
    """Raise ValueError unless the three describe the same levels sensibly."""
    if not len(level_iters) == len(factors) == len(sigmas):
        raise ValueError(
            f"level_iters, factors and sigmas must have one entry per level; got "
            f"{len(level_iters)}, {len(factors)} and {len(sigmas)}"
        )
    for name, values, least in (
        ("level_iters", level_iters, 1),
        ("factors", factors, 1),
        ("sigmas", sigmas, 0),
    ):
        if any(not np.isfinite(v) or v < least for v in values):
            raise ValueError(f"{name} must be numbers of at least {least}: {values}")


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
    """The mask, or None (with a warning, as in DIPY) if it is all zeros."""
    if mask is not None and not np.any(mask):
        warn(
            f"{name}_mask is all zeros, setting to None (which means the entire "
            "volume will be used)",
            UserWarning,
            stacklevel=2,
        )
        return None
    return mask


def masked(image, mask):
    """The image with everything outside the mask set to zero."""
    return image if mask is None or is_remote(image) else image * mask


def split(arguments):
    """The arguments of a two-image call as each of the three parties has them.

    Parameters
    ----------
    arguments : dict
        with ``static``, ``moving``, their ``_grid2world`` and ``_mask``.

    Returns
    -------
    moving, static, helper : dict
        at the moving owner the missing image is a `RemoteImage`; the other two
        cross a pipe and describe it by its shape.
    """
    grids = {
        name + "_grid2world": grid2world_of(
            arguments[name], arguments[name + "_grid2world"]
        )
        for name in ("static", "moving")
    }
    shapes = {
        name + "_shape": list(arguments[name].shape) for name in ("static", "moving")
    }
    here = {
        **arguments,
        **grids,
        "static": RemoteImage(shapes["static_shape"], grids["static_grid2world"]),
        "static_mask": None,
    }
    there = {
        **shapes,
        **grids,
        "static": np.asarray(arguments["static"]),
        "static_mask": arguments["static_mask"],
    }
    return here, there, {**shapes, **grids}


def unite(static_shape, moving_shape, **arguments):
    """Inverse of `split` at the static owner and the helper."""
    for name, shape in (("static", static_shape), ("moving", moving_shape)):
        arguments.setdefault(name + "_mask", None)
        if arguments.get(name) is None:
            grid2world = arguments[name + "_grid2world"]
            arguments[name] = RemoteImage(shape, grid2world)
    return arguments


def registration_from(session, config):
    """The registration object of another party, from its `config`."""
    config = dict(config)
    metric = SecureMutualInformationMetric(
        nbins=config.pop("nbins"),
        sampling_proportion=config.pop("sampling_proportion"),
        reveal=config.pop("reveal"),
        session=session,
    )
    return SecureAffineRegistration(metric=metric, session=session, **config)


def _optimize_party(session, config, transform, starting_affine, **images):
    images = unite(**images)
    registration_from(session, config).optimize(
        images.pop("static"),
        images.pop("moving"),
        regtransforms[tuple(transform)],
        None,
        starting_affine=starting_affine,
        **images,
    )
