"""The mutual information metric of two parties' images."""

import hashlib
from warnings import warn

from dipy.align.imaffine import MutualInformationMetric
from dipy.align.parzenhist import sample_domain_regular
from dipy.testing.decorators import warning_for_keywords
import numpy as np

from dipy_ppir.align import plan
from dipy_ppir.align.affinemetric import PlacedImages, StepsOnShares
from dipy_ppir.align.agreed import keep_to
from dipy_ppir.align.parameters import AFFINE, AffineParameters
from dipy_ppir.align.parzenhist import SecureParzenJointHistogram
from dipy_ppir.align.remote import RemoteImage, is_remote
from dipy_ppir.align.secretmetric import SecretMutualInformation
from dipy_ppir.mpc.ledger import MOVING, STATIC

#: Of images that match, the metric is no smaller part of the entropy of either, and no
#: smaller part of what it was at the beginning. Of two brains it is a third or more, of
#: a brain and noise at most a ninth.
LEAST_INFORMATION, KEPT_INFORMATION = 0.2, 0.9


class SecureMutualInformationMetric(
    StepsOnShares, PlacedImages, MutualInformationMetric
):
    """Mutual information of two parties' images, computed on secret shares.

    Takes the place of ``dipy.align.imaffine.MutualInformationMetric``, also
    inside DIPY's own ``AffineRegistration`` when both images are here.

    Parameters
    ----------
    nbins : int, optional
        number of bins of the joint histogram, 6 to 512.
    sampling_proportion : None or float in (0, 1], optional
        share of the voxels to use; None uses all.
    reveal : {"transform", "gradient", "histogram"}, optional
        what the moving owner learns. ``"transform"``, the default: the steps of the
        transform that a `SecureAffineRegistration` takes, rounded to a few bits, some
        1,500 bits in all; the optimizer itself runs on shares. With the others an
        optimizer of DIPY's runs at the moving owner, which at each of some hundreds of
        evaluations learns the metric's value and gradient, or the joint histogram as
        well: they can determine the static image at coarse resolution levels, see
        ``doc/security.md`` before you choose one.
    session : Session, optional
        this party's session; by default the other parties are started on this
        machine when first needed.
    hide_steps : bool, optional
        with ``reveal="transform"``: show the moving owner no step, but at every
        evaluation the transform blurred by a fresh random movement of the static
        image's frame (`frames`), some 170 bits in all, and the result. For
        translation, rigid, rigid_isoscaling and affine. It takes 52 evaluations for 44
        and half more traffic.
    backend : {"packed", "mpyc"}, optional
        what computes the sums over samples. ``"mpyc"`` does so literally, with MPyC's
        secure arrays, some thousand times slower: for images of a few thousand voxels,
        to read and to compare with.

    Raises
    ------
    ValueError
        if an argument is out of range.

    Notes
    -----
    Bytes over all links, with 32 bins and p parameters, for an evaluation with
    gradient: 540 per sample in 3D (528 in 2D) plus 1.5 MB with ``reveal="transform"``,
    in 13 rounds and some 40 of the optimizer's; ``8 * (64 + p)`` per sample with
    ``"histogram"``, in 5; ``8 * (128 + p)`` plus 3.1 MB with ``"gradient"``, in 10.
    Once per resolution level 112 bytes per sample with the first, 224 with the others.
    Of two owners alone, with the first, some 0.55 kB per sample plus 7 MB in 22 rounds,
    and 1.6 kB per sample once for a level, as long as its key serves.
    """

    name, title = "MI", "minus mutual information"
    kept = KEPT_INFORMATION
    names = "nbins", "sampling_proportion", "reveal", "backend", "hide_steps"

    @warning_for_keywords()
    def __init__(
        self,
        *,
        nbins=AFFINE.nbins,
        sampling_proportion=AFFINE.sampling_proportion,
        reveal=AFFINE.reveal,
        session=None,
        backend=AFFINE.backend,
        hide_steps=AFFINE.hide_steps,
    ):
        checked = AffineParameters(
            nbins=nbins,
            sampling_proportion=sampling_proportion,
            reveal=reveal,
            backend=backend,
            hide_steps=hide_steps,
        )
        super().__init__(
            nbins=checked.nbins, sampling_proportion=checked.sampling_proportion
        )
        self.reveal, self.backend = checked.reveal, checked.backend
        self.hide_steps, self.nbins = checked.hide_steps, checked.nbins
        self.join(session)
        #: The metric on shares, after `setup` with ``reveal="transform"``.
        self.shared = None
        #: What was sent of the static image at each level of a registration.
        self._level, self._sent = None, {}
        #: Number of evaluations so far.
        self.evaluations = 0
        #: Called after every evaluation with a dict; see `SecureAffineRegistration`.
        self.callback = None

    def config(self):
        """Public parameters of the metric, JSON-able."""
        own = {name: getattr(self, name) for name in self.names}
        return {"metric": self.name, **own}

    def join(self, session):
        """Make the metric part of `session`, or of none with None."""
        keep_to(session, "affine", self.config())
        self.session = session
        self.forget()
        self.histogram = self._new_histogram(self.nbins, session)

    def _new_histogram(self, nbins, session):
        # With "transform" for its settings only: it is asked for no histogram.
        reveal = "gradient" if self.reveal == "transform" else self.reveal
        return SecureParzenJointHistogram(nbins, reveal=reveal, session=session)

    @property
    def masked(self):
        """Whether masks are used; as in DIPY only where every voxel is."""
        return self.sampling_proportion in (None, 1.0)

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
        level : int, optional
            of the images, 0 being the finest; on shares others have fewer bins. What
            two owners alone send of a level serves further steps, until `forget`.
        """
        self._level = level
        nbins = self.nbins
        if level and self.reveal == "transform":
            nbins = min(nbins, plan.COARSE_BINS)
        if nbins != self.histogram.nbins:
            self.histogram = self._new_histogram(nbins, self.session)
        self.place(
            transform,
            static,
            moving,
            static_grid2world,
            moving_grid2world,
            starting_affine,
        )
        self.static_mask, self.moving_mask = self._masks(static_mask, moving_mask)
        self.histogram.setup(
            self.static, self.moving, smask=self.static_mask, mmask=self.moving_mask
        )
        self._place_samples()
        if self.reveal == "transform":
            if self.session is not None and not self.hide_steps:
                self.share_static()
            return
        values, mask = self._static_values()
        if self.session is not None:
            self.histogram.share_static(self._count, values, mask)
        else:
            self.histogram.end()
            self._local_static = values, mask

    def share_static(self):
        """Share the static image, for a metric on shares."""
        level = self._level
        self.shared = SecretMutualInformation(self, sent=self._sent.get(level))
        self.shared.share_static(*self._static_values())
        if level is not None:
            self._sent[level] = self.shared.sent

    def forget(self):
        """See `StepsOnShares`."""
        self._sent = {}

    def least_value(self):
        """See `StepsOnShares`."""
        if self.session.pid != STATIC:
            return None
        return LEAST_INFORMATION * self._entropy(STATIC)

    def hardly_matches(self, value):
        """Whether a value that the moving owner knows is near zero."""
        return -value < LEAST_INFORMATION * self._entropy(MOVING)

    def _entropy(self, owner):
        """Of the bins of the own image: no metric is larger."""
        if owner == STATIC:
            values, mask = self._static_values()
        else:
            values, mask = self.moving.reshape(-1), self.moving_mask
        if mask is not None:
            values = np.asarray(values).reshape(-1)[np.asarray(mask).reshape(-1) != 0]
        low, high = float(np.min(values)), float(np.max(values))
        counts = np.histogram(values, self.histogram.nbins - 4, (low, high))[0]
        parts = counts[counts > 0] / counts.sum()
        return float(-(parts * np.log(parts)).sum())

    def _masks(self, static_mask, moving_mask):
        # As in DIPY, masks can only be used with dense sampling.
        masks = [static_mask, moving_mask]
        if self.masked:
            return [
                None if m is None else (np.asarray(m) != 0).astype(np.int32)
                for m in masks
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
        every = self.reveal == "transform" and np.prod(shape) <= plan.EVERY_VOXEL
        if self.sampling_proportion is None or every:
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

    def sample_moving(self, affine):
        """The moving image, its gradient and its mask at the samples.

        Parameters
        ----------
        affine : array, shape (dim + 1, dim + 1)
            from the static to the moving image's space, mm.

        Returns
        -------
        values : array, shape (n,)
        gradient : array, shape (n, dim)
            per mm.
        mask : array of int32, shape (n,), or None
        """
        self.affine_map.set_affine(affine)
        values, gradient = self.sample(affine, self.samples)
        mask = None
        if self.moving_mask is not None:
            mask = self._mask_at_samples().reshape(-1)
        values = np.ascontiguousarray(values, dtype=np.float64).reshape(-1)
        gradient = np.ascontiguousarray(gradient, dtype=np.float64)
        return values, gradient.reshape(-1, self.dim), mask

    def _mask_at_samples(self):
        mask = self.affine_map.transform(self.moving_mask, interpolation="nearest")
        return mask.astype(np.int32)

    def _update_mutual_information(self, params, *, update_gradient=True):
        if self.reveal == "transform":
            raise ValueError(
                'reveal="transform" shows no optimizer the value of the metric: use '
                'SecureAffineRegistration, or choose reveal="gradient" and read in '
                "doc/security.md what that gives away"
            )
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
            moving, gradient = self.sample(
                current_affine, self.samples, with_gradient=update_gradient
            )
            if self.samples is None:
                static = RemoteImage(self.static.shape)
                mask = None
                if self.moving_mask is not None:
                    mask = self._mask_at_samples()
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


class _RemoteValues(RemoteImage):
    """Sampled intensities of a remote image."""

    def __init__(self, count):
        self.shape = (count,)
        self.dim = self.ndim = 1
