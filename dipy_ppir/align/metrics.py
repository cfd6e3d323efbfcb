"""Metrics of two images that two parties hold, for SyN.

Mirrors ``dipy.align.metrics``: `SecureCCMetric` takes the place of ``CCMetric``,
`SecureSSDMetric` of ``SSDMetric``; `SecureMINDMetric` has no namesake. With
``reveal="map"`` a metric says what is carried along on shares, and what exerts the
forces (`dipy_ppir.mpc.carried`, `differences`). With the others, which only local
cross-correlation has, each owner computes the window statistics and the gradient of its
own image; what needs both images is in `dipy_ppir.mpc.crosscorr`.
"""

from functools import lru_cache
from warnings import warn

from dipy.align.metrics import CCMetric, SimilarityMetric, SSDMetric
from dipy.testing.decorators import warning_for_keywords
import numpy as np
from scipy import ndimage
from scipy.interpolate import make_interp_spline

from dipy_ppir._kernels import windows
from dipy_ppir.align.agreed import keep_to
from dipy_ppir.align.descriptors import pairs, self_similarities
from dipy_ppir.align.intensities import Prepared, prepared, winsorized
from dipy_ppir.align.parameters import SYN, SynParameters
from dipy_ppir.align.remote import RemoteImage, check_roles, is_remote
from dipy_ppir.mpc import local
from dipy_ppir.mpc.carried import GUARD, CarriedCorrelation
from dipy_ppir.mpc.crosscorr import (
    LEAST_DEVIATION,
    MOST_FORCE,
    MOST_STEP,
    Half,
    LocalCrossCorrelation,
)
from dipy_ppir.mpc.differences import CarriedDifferences
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.linear import along, points
from dipy_ppir.mpc.literalcc import LiteralCrossCorrelation
from dipy_ppir.mpc.threads import threads

__all__ = [
    "GuardedCCMetric",
    "SecureCCMetric",
    "SecureMINDMetric",
    "SecureSSDMetric",
]

#: Parameters of a metric, out of `SynParameters`.
METRIC_PARAMETERS = (
    "metric",
    "dim",
    "sigma_diff",
    "smooth",
    "radius",
    "reveal",
    "map_spacing",
    "opens",
    "map_precision",
    "update_spacing",
    "stride",
    "backend",
)
#: Least voxels along an axis at a level, without windows: three points of the grid on
#: which steps are computed, of which the middle one moves.
LEAST_SIZE = 5
#: In 3D descriptors are carried of every so many voxels, but along thinner axes: for
#: an eighth of the work maps that are nearly as good.
THINNING, THIN = 2, 20
#: With a stride of 2, where the grid of forces begins, iteration by iteration.
OFFSETS = {
    2: [(0, 0), (1, 1), (1, 0), (0, 1)],
    3: [
        (0, 0, 0),
        (1, 1, 1),
        (1, 0, 0),
        (0, 1, 1),
        (0, 1, 0),
        (1, 0, 1),
        (0, 0, 1),
        (1, 1, 0),
    ],
}


class GuardedCCMetric(CCMetric):
    """DIPY's metric, in the clear, without force where a window is flat.

    DIPY divides by the variance of every window that is not exactly zero. Where an
    image is constant that is a rounding error, and so is the force, which can be
    larger than all others. This is what `SecureCCMetric` is compared with.
    """

    def initialize_iteration(self):
        """Prepare one iteration; see ``dipy.align.metrics.CCMetric``."""
        super().initialize_iteration()
        window = (2 * self.radius + 1) ** self.dim
        for factor, image in ((3, self.static_image), (4, self.moving_image)):
            squares = self.factors[..., factor]
            deviation = np.sqrt(np.maximum(squares, 0) / window)
            squares[deviation < LEAST_DEVIATION * (image.max() - image.min())] = 0


class _OnShares:
    """What SyN asks of a metric that carries images along on shares.

    Attributes
    ----------
    phase : str
        what its traffic is counted as.
    matching : sequence of tuple of float
        weights of the score in the end, of that at the beginning of the last level and
        of `Carried.reference`. If images match, no such sum is below zero.
    window : int
        radius in voxels of what is compared around a voxel.
    """

    window = 0

    def _take(self, parameters, session):
        """Take over parameters and session, both checked."""
        for name in METRIC_PARAMETERS:
            setattr(self, name, getattr(parameters, name))
        keep_to(session, "syn", self.config())
        self.session = session

    def config(self):
        """Public parameters of the metric, JSON-able."""
        return {name: getattr(self, name) for name in METRIC_PARAMETERS}

    def join(self, session):
        """Make the metric part of `session`, or of none with None."""
        keep_to(session, "syn", self.config())
        self.session = session

    @property
    def smoothing(self):
        """Standard deviation of the Gaussian that smooths each step, voxels."""
        return self.sigma_diff

    def check_level(self, shape, name):
        """Raise ValueError if an image of such a shape is too small for a level."""
        if any(n < LEAST_SIZE for n in shape):
            raise ValueError(
                f"the {name} image is too small at a level of shape "
                f"{tuple(map(int, shape))}: each dimension must be at least "
                f"{LEAST_SIZE} voxels; leave the level out (a 0 in level_iters), or "
                "take a larger image"
            )

    def prepared(self, image):
        """An owner's image as it is registered: `Prepared`."""
        return Prepared(*winsorized(np.asarray(image, dtype=np.float64)), False, 0.0)

    def thinning(self, shape):
        """Every how many voxels of a level's grid are carried, along each axis."""
        return np.ones(len(shape), dtype=int)

    def features(self, image):
        """What is carried of an owner's image, whose range is 0 to 1."""
        return image

    def carried(self, world, operators, step):
        """`Carried` of a level; see there for the parameters."""
        raise NotImplementedError

    def initialize_iteration(self):
        """Refuse to compute an iteration's steps, which nobody is shown."""
        raise ValueError(
            'reveal="map" opens no step of an iteration: register with '
            "SecureSymmetricDiffeomorphicRegistration, or give a SecureCCMetric "
            'reveal="update"'
        )

    def _no_step(self):
        self.initialize_iteration()

    compute_forward = compute_backward = free_iteration = _no_step


class SecureCCMetric(_OnShares, CCMetric):
    r"""Local normalised cross-correlation of two parties' images.

    Takes the place of ``dipy.align.metrics.CCMetric``, also inside DIPY's own
    ``SymmetricDiffeomorphicRegistration`` when both images are here.

    Parameters
    ----------
    dim : int (either 2 or 3)
        the dimension of the image domain
    sigma_diff : float, optional
        standard deviation in voxels of the Gaussian that smooths each step.
    radius : int, optional
        radius in voxels of the windows.
    reveal : {"map", "update", "force", "paper"}, optional
        "map", the default, opens nothing within a level: the images, what is known of
        their windows and both halves of the map are carried along on shares. The others
        are for comparisons with DIPY and with the published method, and open at every
        iteration what gives away most of the other image: the smoothed step of an
        owner's half of the map, the force on every voxel of its image, or the terms
        that the published method opens. See ``doc/security.md``.
    map_spacing : int, optional
        with "map": spacing in voxels of the grid on which the map is computed and in
        the end opened; 2 at most along axes of fewer than 20 voxels.
    opens : {"levels", "end"}, optional
        with "map": at the end of a level each owner is shown its half of the map, at
        every 4th voxel to a quarter of a voxel, and warps its next image by it. With
        "end" nothing is opened before the result: the next images are carried along on
        shares as well, for three times the traffic.
    map_precision : float, optional
        with "map": to how much of a voxel the result is opened. By default a quarter in
        3D and half of one in 2D, where more numbers are opened for each voxel.
    update_spacing : int, optional
        with "update": the step is opened at every so many voxels along each axis, and
        interpolated between them. By default twice the stride; less hides little.
    stride : {1, 2}, optional
        forces are computed at every so many voxels along each axis; the grid moves
        from iteration to iteration. 2 takes a fifth of the traffic, and is not DIPY's
        answer any more.
    backend : {"packed", "mpyc"}, optional
        what computes the forces. ``"mpyc"`` does so literally, with MPyC's secure
        arrays: an independent and very slow twin, for images of some thousand voxels
        with ``reveal="force"``.
    session : Session, optional
        this party's session; by default the other parties are started on this
        machine when first needed.

    Raises
    ------
    ValueError
        if an argument is out of range.

    Notes
    -----
    With "map" a 64th of the image's range is added to the deviation of every window, a
    32nd with a radius of 2 or 1. What is opened is the composed map. With the others,
    windows whose standard deviation is below 2**-10 of the range exert no force. DIPY
    divides by their variance, down to rounding errors.

    Bytes per voxel and iteration over all links, in large 3D grids: 279 with "map", 485
    with a spacing of 2, 13 rounds; with ``opens="end"`` besides for each voxel of a
    level but the coarsest 96 for each of 32 steps, or 16; at most 224 with "force", 440
    with "update" and its spacing of 2, 85 with a stride of 2, 6 rounds.
    """

    phase = "cross correlation"
    # Of two people's brains there is half of the squared correlation that is possible,
    # of a brain and noise less than a quarter.
    matching = (1.0, 0.0, -0.25), (1.0, -0.95, 0.0)

    @warning_for_keywords()
    def __init__(
        self,
        dim,
        *,
        sigma_diff=SYN.sigma_diff,
        radius=SYN.radius,
        reveal=SYN.reveal,
        map_spacing=SYN.map_spacing,
        opens=SYN.opens,
        map_precision=None,
        update_spacing=None,
        stride=SYN.stride,
        backend=SYN.backend,
        session=None,
    ):
        checked = SynParameters(
            dim=dim,
            sigma_diff=sigma_diff,
            radius=radius,
            reveal=reveal,
            map_spacing=map_spacing,
            opens=opens,
            map_precision=map_precision,
            update_spacing=update_spacing,
            stride=stride,
            backend=backend,
        )
        if reveal != "map":
            warn(
                f'reveal="{reveal}" opens at every iteration what gives away most of '
                "the other image (doc/security.md): use it to compare with other "
                'software; reveal="map" opens the map only',
                UserWarning,
                stacklevel=3,
            )
        stride, update_spacing = checked.stride, checked.update_spacing
        if reveal == "update" and update_spacing < 2 * stride:
            warn(
                f"update_spacing {update_spacing} opens as many numbers as there "
                "are forces, so that they can be worked out: this is as revealing "
                f'as reveal="force"; {2 * stride} hides more',
                UserWarning,
                stacklevel=3,
            )
        super().__init__(
            checked.dim, sigma_diff=checked.sigma_diff, radius=checked.radius
        )
        self._take(checked, session)
        self.energy = None
        #: Number of iterations so far.
        self.iterations = 0
        self._steps = {}
        self._correlation = self._previous = None
        self._account = local.Account()

    def join(self, session):
        """Make the metric part of `session`, or of none with None."""
        super().join(session)
        self.iterations = 0
        self.energy, self._steps = None, {}
        self._correlation = self._previous = None

    @property
    def window(self):
        """See `_OnShares`."""
        return self.radius

    def check_level(self, shape, name):
        """Raise DIPY's ValueError if an image is smaller than a window."""
        check_size(shape, self.radius, name)

    def prepared(self, image):
        """An owner's image as it is registered: `Prepared`."""
        return prepared(image, self.radius, GUARD)

    def carried(self, world, operators, step):
        """See `_OnShares`."""
        return CarriedCorrelation(world, operators, step)

    def receipt(self, **facts):
        """Receipt of the iterations so far, for a metric without a session."""
        return self._account.receipt(**facts)

    def initialize_iteration(self):
        """Compute one iteration's steps, at every party together.

        Raises
        ------
        ValueError
            if an image is smaller than a window.
        """
        self._check_sizes()
        if self.reveal == "map":
            super().initialize_iteration()
        offset = (0,) * self.dim
        if self.stride > 1:
            offset = OFFSETS[self.dim][self.iterations % len(OFFSETS[self.dim])]
        self.iterations += 1
        if self.session is not None:
            if self.iterations == 1:
                with self.session.phase("agreement"):
                    shape = [int(n) for n in self.static_image.shape]
                    self.session.agree("metric", {**self.config(), "grid": shape})
            own = self._step(self.session, offset)
            for name, image in self._images():
                if not is_remote(image):
                    self._steps = {name: own}
            return
        for name, image in self._images():
            if is_remote(image):
                raise ValueError(
                    f"the {name} image belongs to another party: pass a session"
                )
        self._steps = self._step_locally(offset)

    def free_iteration(self):
        """Release what belongs to one iteration."""
        self._steps = {}

    def compute_forward(self):
        """Step of the static image's half of the map, mm; at its owner.

        Returns
        -------
        displacement : array, shape (R, C, 2) or (S, R, C, 3)
        """
        return self._steps["static"]

    def compute_backward(self):
        """Step of the moving image's half of the map, mm; at its owner.

        Returns
        -------
        displacement : array, shape (R, C, 2) or (S, R, C, 3)
        """
        return self._steps["moving"]

    # -- one iteration ---------------------------------------------------

    def _images(self):
        return (("static", self.static_image), ("moving", self.moving_image))

    def _check_sizes(self):
        for name, image in self._images():
            check_size(image.shape, self.radius, name)
            if tuple(image.shape) != tuple(self.static_image.shape):
                raise ValueError(
                    "the metric compares images on one grid, but the static image has "
                    f"shape {tuple(self.static_image.shape)} and the moving image "
                    f"{tuple(image.shape)}"
                )

    def _step(self, session, offset):
        """This owner's displacement; None at the helper."""
        check_roles(session.pid, self.static_image, self.moving_image)
        shape = tuple(self.static_image.shape)
        correlation = self._correlation
        if correlation is None or correlation.shape != shape:
            kind = LocalCrossCorrelation
            if self.backend == "mpyc":
                kind = LiteralCrossCorrelation
            correlation = self._correlation = kind(
                session,
                shape,
                self.radius,
                reveal=self.reveal,
                sigma=self.sigma_diff,
                spacing=self.update_spacing,
                stride=self.stride,
            )
        correlation.session = session
        half = None
        for name, image in self._images():
            if not is_remote(image):
                own, half = name, image_half(np.asarray(image), correlation, offset)
        opened, total = correlation.step(half, offset)
        if opened is None:
            return None
        # A truncation that went wrong would spoil the sum; the one before is closer.
        if -1e-3 <= total / half.residual.size <= 1 + 1e-3 or self.energy is None:
            # As many voxels as DIPY sums over.
            self.energy = -total * self.stride**self.dim
        if self.reveal == "update":
            step = self._interpolate(opened)
        else:
            step = self._smooth(opened, half.gradient, correlation.centers(offset))
        if own == "static":
            spacing, direction = self.static_spacing, self.static_direction
        else:
            spacing, direction = self.moving_spacing, self.moving_direction
        if spacing is not None:
            step /= np.asarray(spacing, dtype=np.float32)
        if direction is not None:
            self.reorient_vector_field(step, np.asarray(direction, dtype=np.float64))
        return step

    def _interpolate(self, opened):
        """The step on the whole grid, per voxel, from the values opened."""
        shape = tuple(self.static_image.shape)
        valid = (np.abs(opened) <= 1.01 * MOST_STEP).all(axis=0)
        step = np.empty((*shape, self.dim), dtype=np.float32)
        if not valid.all():
            opened = self._mend(opened, ndimage.binary_erosion(valid, border_value=1))
        self._previous = opened
        for g, values in enumerate(opened):
            values = interpolate(values, shape, self.update_spacing)
            np.multiply(values, -2.0, out=step[..., g], casting="same_kind")
        return step

    def _mend(self, opened, valid):
        """Replace what a truncation that went wrong has spoilt.

        By the step before, which differs little, or the nearest right values.
        """
        before = self._previous
        if before is not None and before.shape == opened.shape:
            return np.where(valid, opened, before)
        return np.stack([mend(values, valid) for values in opened])

    def _smooth(self, force, gradient, centers):
        """The step on the whole grid, per voxel, from the force at the centres."""
        shape = tuple(self.static_image.shape)
        # A truncation that went wrong is off by far more than a force can be.
        force = np.where(np.abs(force) <= 1.01 * MOST_FORCE, force, 0.0)
        step = np.zeros((*shape, self.dim), dtype=np.float32)
        for g in range(self.dim):
            inner = step[..., g][centers]
            inner[...] = (-2.0 * force * gradient[g]).reshape(inner.shape)
            step[..., g] = ndimage.gaussian_filter(step[..., g], self.sigma_diff)
        return step

    def _step_locally(self, offset):
        grids = {}
        for name, image, spacing, direction in (
            ("static", self.static_image, self.static_spacing, self.static_direction),
            ("moving", self.moving_image, self.moving_spacing, self.moving_direction),
        ):
            grids[name] = {
                "image": np.asarray(image),
                "spacing": None if spacing is None else np.asarray(spacing),
                "direction": None if direction is None else np.asarray(direction),
            }
        common = {
            "config": self.config(),
            "offset": list(offset),
            "shape": list(self.static_image.shape),
        }
        results = local.run_locally(
            self._step_here,
            "dipy_ppir.align.metrics:_step_party",
            moving={"offset": offset},
            static={**common, **grids["static"]},
            helper=common,
            account=self._account,
        )
        return {"static": results[STATIC], "moving": results[MOVING]}

    def _step_here(self, session, offset):
        static = self.static_image
        self.static_image = RemoteImage(static.shape)
        try:
            return self._step(session, offset)
        finally:
            self.static_image = static


class SecureSSDMetric(_OnShares, SSDMetric):
    r"""Sum of squared differences of two parties' images.

    Takes the place of ``dipy.align.metrics.SSDMetric``, for images of one modality
    whose intensities mean the same.

    Parameters
    ----------
    dim : int (either 2 or 3)
        the dimension of the image domain
    smooth : float, optional
        standard deviation in voxels of the Gaussian that smooths each step; 2 by
        default.
    map_spacing, opens, map_precision, session : optional
        see `SecureCCMetric`.
    **others
        of `SynParameters`: only what ``reveal="map"`` has by default.

    Raises
    ------
    ValueError
        if an argument is out of range.

    Notes
    -----
    A step is along the gradient of the squared differences. DIPY divides by that of the
    image and by the difference (``step_type="demons"``), and smooths by 4 voxels. Each
    owner brings the range of its image, without outliers, to 0 to 1, at each level;
    DIPY compares intensities as they are.

    Bytes per voxel and iteration over all links, in large 3D grids: 156, 300 with a
    spacing of 2, 8 rounds; with ``opens="end"`` besides what it takes `SecureCCMetric`.
    """

    phase = "squared differences"
    # Of two people's brains, of slices and of a breathing thorax 0.004 to 0.15 of the
    # variances are left, of a brain and noise 0.89 and more.
    matching = (-1.0, 0.0, 0.5), (-1.0, 1.0, 0.05)

    @warning_for_keywords()
    def __init__(
        self,
        dim,
        *,
        smooth=None,
        map_spacing=SYN.map_spacing,
        opens=SYN.opens,
        map_precision=None,
        session=None,
        **others,
    ):
        checked = SynParameters(
            metric="SSD",
            dim=dim,
            smooth=smooth,
            map_spacing=map_spacing,
            opens=opens,
            map_precision=map_precision,
            **others,
        )
        super().__init__(checked.dim, smooth=checked.smooth)
        self._take(checked, session)

    @property
    def smoothing(self):
        """See `_OnShares`."""
        return self.smooth

    def carried(self, world, operators, step):
        """See `_OnShares`."""
        return CarriedDifferences(world, operators, step)


class SecureMINDMetric(_OnShares, SimilarityMetric):
    r"""Squared differences of two parties' descriptors of self-similarity.

    For images of different modalities. DIPY has no such metric.

    Parameters
    ----------
    dim : int (either 2 or 3)
        the dimension of the image domain
    sigma_diff : float, optional
        standard deviation in voxels of the Gaussian that smooths each step; 2 by
        default.
    map_spacing, opens, map_precision, session : optional
        see `SecureCCMetric`.
    **others
        of `SynParameters`: only what ``reveal="map"`` has by default.

    Raises
    ------
    ValueError
        if an argument is out of range.

    Notes
    -----
    At the start of a level each owner computes the 12 descriptors of its own image (4
    in 2D, see `descriptors`), which are carried along from there on: in 3D of every
    second voxel, along axes of 20 voxels or more. Steps count such voxels: of a
    step_length of 0.25 the longest are half a voxel of the level.

    Bytes per voxel and iteration over all links, in large 3D grids: 204, 348 with a
    spacing of 2, 8 rounds; with ``opens="end"`` besides for each voxel of a level but
    the coarsest 144 for each of 32 steps, or 16.
    """

    phase = "self similarity"
    # Of two people's brains of any two modalities 0.19 to 0.26 of the variances are
    # left, of a breathing thorax 0.62, of a head and a thorax or noise 0.85 and more.
    matching = (-1.0, 0.0, 0.75), (-1.0, 1.0, 0.05)

    @warning_for_keywords()
    def __init__(
        self,
        dim,
        *,
        sigma_diff=None,
        map_spacing=SYN.map_spacing,
        opens=SYN.opens,
        map_precision=None,
        session=None,
        **others,
    ):
        checked = SynParameters(
            metric="MIND",
            dim=dim,
            sigma_diff=sigma_diff,
            map_spacing=map_spacing,
            opens=opens,
            map_precision=map_precision,
            **others,
        )
        super().__init__(checked.dim)
        self._take(checked, session)

    def thinning(self, shape):
        """See `_OnShares`: in 3D every second voxel, along axes of enough voxels."""
        thinned = self.dim == 3
        return np.array([THINNING if thinned and n >= THIN else 1 for n in shape])

    def features(self, image):
        """See `_OnShares`."""
        return self_similarities(image)

    def carried(self, world, operators, step):
        """See `_OnShares`."""
        return CarriedDifferences(world, operators, step, (len(pairs(self.dim)),))


#: Metrics by their names.
METRICS = {"CC": SecureCCMetric, "SSD": SecureSSDMetric, "MIND": SecureMINDMetric}


def _step_party(
    session, config, offset, shape, image=None, spacing=None, direction=None
):
    # Kept between iterations, for the sake of its buffers.
    metric = _metric(tuple(sorted(config.items())))
    metric.static_image = RemoteImage(shape) if image is None else image
    metric.moving_image = RemoteImage(shape)
    metric.static_spacing, metric.static_direction = spacing, direction
    return metric._step(session, tuple(offset))


@lru_cache(maxsize=1)
def _metric(config):
    return metric_from(dict(config))


def metric_from(parameters, session=None):
    """The metric that parameters describe.

    Parameters
    ----------
    parameters : dict
        of `METRIC_PARAMETERS`.
    session : Session, optional

    Returns
    -------
    metric : SecureCCMetric, SecureSSDMetric or SecureMINDMetric
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    kind = METRICS[given.pop("metric")]
    return kind(given.pop("dim"), session=session, **given)


def check_size(shape, radius, name):
    """Raise DIPY's ValueError if an image is smaller than a window."""
    least = 2 * radius + 1
    if any(n < least for n in shape):
        raise ValueError(
            f"{name.capitalize()} image size is too small. "
            f"Each image dimension should be larger than 2 * radius + 1 ({least}). "
            f"Decrease CCMetric radius ({radius}) or increase your image size "
            f"(shape={tuple(map(int, shape))})."
        )


def image_half(image, correlation, offset):
    """What an owner contributes to an iteration: `crosscorr.Half` of its image.

    Parameters
    ----------
    image : array, shape of the grid
    correlation : LocalCrossCorrelation
    offset : sequence of int
    """
    low, high = float(image.min()), float(image.max())
    scale = 1.0 / (high - low) if high > low else 0.0
    levels = 1 << correlation.image_bits
    integers = image.astype(np.float64)
    integers -= low
    integers *= scale * levels
    integers = np.rint(integers, out=integers).astype(np.int64)
    centers = correlation.centers(offset)
    inverse, residual = window_statistics(
        integers, correlation.radius, LEAST_DEVIATION * levels, centers
    )
    inverse *= levels
    gradient = np.empty((image.ndim, inverse.size))
    slopes = np.gradient(image)
    for g, slope in enumerate(slopes):
        np.multiply(slope[centers].reshape(-1), scale * inverse, out=gradient[g])
    return Half(integers, inverse, residual, gradient)


def window_statistics(image, radius, least, centers=None):
    """Inverse norms and normalised residuals of an image's windows.

    Windows are cut off at the borders, as DIPY's are.

    Parameters
    ----------
    image : array of int64, shape (R, C) or (S, R, C)
    radius : int
    least : float
        windows whose standard deviation is below this are flat.
    centers : tuple of slice, optional
        the windows to look at; all by default.

    Returns
    -------
    inverse : array, flat
        1 / sqrt(E), E the sum of squared deviations from the window's mean; 0 for
        flat windows.
    residual : array, flat
        (image - mean) / sqrt(E); 0 for flat windows.
    """
    if centers is None:
        centers = tuple(slice(0, n) for n in image.shape)
    inner = [np.arange(n)[c] for n, c in zip(image.shape, centers, strict=True)]
    counts = np.ones([len(i) for i in inner], dtype=np.int64)
    for axis, (n, at) in enumerate(zip(image.shape, inner, strict=True)):
        length = np.minimum(at + radius, n - 1) - np.maximum(at - radius, 0) + 1
        counts *= np.expand_dims(
            length, [a for a in range(image.ndim) if a != axis]
        ).astype(np.int64)
    sums, squares = (window_sums(x, radius, centers) for x in (image, image * image))
    values = np.ascontiguousarray(image[centers]).reshape(-1)
    inverse, residual = np.empty(values.size), np.empty(values.size)
    windows.normalize(
        values,
        sums.reshape(-1),
        squares.reshape(-1),
        counts.reshape(-1),
        float(least),
        inverse,
        residual,
        threads(),
    )
    return inverse, residual


def window_sums(image, radius, centers):
    """Sums of an integer image over windows cut off at the borders.

    Parameters
    ----------
    image : array of int64
    radius : int
    centers : tuple of slice

    Returns
    -------
    sums : array of int64
    """
    x = np.ascontiguousarray(image)
    for axis, center in enumerate(centers):
        at = np.arange(image.shape[axis])[center]
        outer = int(np.prod(x.shape[:axis]))
        inner = int(np.prod(x.shape[axis + 1 :]))
        count = at[-1] - at[0] + 1 if len(at) else 0
        out = np.empty((outer, count, inner), dtype=np.int64)
        flat = x.reshape(outer, x.shape[axis], inner)
        windows.box(flat, radius, at[0] if len(at) else 0, out, threads())
        step = at[1] - at[0] if len(at) > 1 else 1
        out = out[:, ::step]
        x = np.ascontiguousarray(out).reshape(
            *x.shape[:axis], len(at), *x.shape[axis + 1 :]
        )
    return x


def interpolate(values, shape, spacing):
    """Cubic spline through values at every `spacing`-th voxel, and the last.

    Parameters
    ----------
    values : array
    shape : tuple of int
        the whole grid.
    spacing : int

    Returns
    -------
    values : array, shape `shape`
    """
    for axis, n in enumerate(shape):
        if values.shape[axis] != n:
            # As products of matrices, the quickest way to touch every voxel.
            values = along(values, interpolation_matrix(n, spacing), axis)
    return values


@lru_cache(maxsize=16)
def interpolation_matrix(n, spacing):
    """Cubic spline through every `spacing`-th of n points, and the last.

    Returns
    -------
    matrix : array, shape (n, points)
    """
    at = points(n, spacing)
    spline = make_interp_spline(at, np.eye(len(at)), k=min(3, len(at) - 1))
    return spline(np.arange(n))


def mend(values, valid):
    """Values with those that are not valid replaced by their nearest neighbours."""
    if not valid.any():
        return np.zeros_like(values)
    nearest = ndimage.distance_transform_edt(
        ~valid, return_distances=False, return_indices=True
    )
    return values[tuple(nearest)]
