r"""Joint intensity histogram of two images that two parties hold.

`SecureParzenJointHistogram` takes the place of
``dipy.align.parzenhist.ParzenJointHistogram``. The static owner knows the bin
:math:`t(x)` of every sample, the moving owner the cubic B-spline weights
:math:`A(x, r)`; the joint histogram

.. math:: P(t, r) = \frac{1}{N_x} \sum_x B(x, t) A(x, r)

(eq. 8 of Taiello et al. 2024, B one-hot) and the gradient of the mutual
information, which with :math:`w(t, r) = \log(P(t, r) / P(r))` is

.. math:: G_k = \sum_{t, r} w(t, r) \frac{\partial P(t, r)}{\partial \theta_k}
              = \sum_x g_k(x) \sum_t B(x, t) \sum_r A'(x, r) w(t, r),

are computed on secret shares. The right-hand side needs neither the gradient
of the joint histogram (eq. 9) nor its table of nbins**2 numbers per parameter.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

from dipy.align.parzenhist import ParzenJointHistogram
import numpy as np

from dipy_ppir._kernels import parzen
from dipy_ppir.align.remote import RemoteImage, is_remote
from dipy_ppir.mpc import local
from dipy_ppir.mpc.contingency import SUM_BITS, Contingency, band_bits, choose_scales
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, declare
from dipy_ppir.mpc.logarithm import WEIGHT_BITS, deal_table, mutual_information
from dipy_ppir.mpc.protocols import dither

REVEAL = ("histogram", "gradient")
#: Probabilities below this are none, as in dipy.align.parzenhist.compute_parzen_mi.
EPSILON = 2.2204460492503131e-016

declare(
    "joint_histogram",
    receivers=(MOVING,),
    shape="(nbins - 3) x (nbins - 4) each evaluation",
    meaning="how often each pair of intensity bins occurs at one voxel in the two "
    "images; together, the histograms of one registration can determine the static "
    "image at its coarse resolution levels",
    bits=64,
)
declare(
    "metric_gradient",
    receivers=(MOVING,),
    shape="number of parameters of the transform (and one checksum), each evaluation",
    meaning="in which direction each transform parameter improves the match",
    bits=64,
)
declare(
    "metric_value",
    receivers=(MOVING,),
    shape="1 each evaluation",
    meaning="how well the two images match (mutual information)",
    bits=36,
)

declare(
    "sample_count",
    receivers=(MOVING,),
    shape="2 each evaluation",
    meaning="how many samples lie inside both images' masks, with and without those "
    "whose moving intensity is out of range",
    bits=34,
)

declare(
    "repetition",
    receivers=(STATIC, HELPER),
    shape="1 each evaluation with gradient, and 1 more where it is repeated",
    meaning="whether a sum of the gradient came near its bound, so that the evaluation "
    "was repeated at a safer scale",
    bits=1,
)

#: Bits of the gradient's terms that are worth opening with ``reveal="gradient"``, where
#: there are many samples; and how many samples are many.
GRADIENT_DIGITS, MANY_SAMPLES = 31, 300**2

# Intervals of a moving bin in which `_scales_known` bounds what can be selected.
_INTERVALS = 64

# Command words of the moving owner, which conducts.
END, TABLE, CONTRACT = 0, 1, 2
#: No transform of DIPY's has more parameters; one column checks the others.
MAX_PARAMETERS = 12 + 1
#: Bits by which the sums of a gradient may exceed what is proven to fit.
EXTRA_BITS = 6


def check_reveal(reveal):
    """Raise ValueError if `reveal` is not one of `REVEAL`."""
    if reveal not in REVEAL:
        raise ValueError(f"reveal must be one of {REVEAL}, got {reveal!r}")


def gradient_blur(samples):
    """Units by which an opened gradient is blurred, either way.

    What the weights' rounding adds to a gradient is a random sum of the numbers that
    the gradient is made of. Over few samples it is larger beside the sums' bound, as
    one over the root of their number; so is the blur that it must not stand out from.
    Where few of them contribute, see `spread_of`.
    """
    factor = max(1.0, np.sqrt(MANY_SAMPLES / max(samples, 1)))
    return int(factor * 2.0 ** (SUM_BITS + EXTRA_BITS - GRADIENT_DIGITS))


def spread_of(gradient):
    """By what power of two to scale columns down, so that the blur counts for more.

    `gradient_blur` is for samples that contribute alike. Where the moving image is flat
    nearly everywhere the few others set the noise of rounding; only its owner knows.
    """
    magnitude = np.abs(gradient).sum(axis=1)
    squares = magnitude @ magnitude
    if not squares > 0:
        return 1.0
    effective = magnitude.sum() ** 2 / squares
    return 2.0 ** np.clip(np.round(np.log2(len(gradient) / effective) / 2), 0, 6)


def linear_jacobian(transform, theta):
    """Jacobian of a transform as a linear function of position.

    Every transform in ``dipy.align.transforms`` moves a point by a matrix whose
    entries are functions of the parameters, so its Jacobian is linear in the
    point, and its values at the origin and the unit points determine it.

    Parameters
    ----------
    transform : Transform
    theta : array, shape (p,)

    Returns
    -------
    jacobian : array, shape (p, dim, dim + 1)
        ``jacobian[k, d] @ (x, y, z, 1)`` is the derivative of coordinate d with
        respect to parameter k.
    """
    dim = transform.get_dim()
    theta = np.asarray(theta, dtype=np.float64)
    origin = np.asarray(transform.jacobian(theta, np.zeros(dim)))
    out = np.empty((len(theta), dim, dim + 1))
    out[..., dim] = origin.T
    for e in range(dim):
        unit = np.zeros(dim)
        unit[e] = 1.0
        out[..., e] = (np.asarray(transform.jacobian(theta, unit)) - origin).T
    return out


class MovingBands:
    """Parzen weights of moving intensities and their derivatives, as integers.

    Parameters
    ----------
    values : array, shape (n,)
        intensities.
    mask : array of int32, shape (n,), or None
        samples that are 0 here do not count.
    histogram : ParzenJointHistogram
        after its `setup`.
    """

    def __init__(self, values, mask, histogram):
        self.values, self.mask = values, mask
        self._settings = (
            float(histogram.mmin),
            float(histogram.mdelta),
            histogram.nbins,
            histogram.padding,
        )
        # How wide a band is stays here: what is shared has all bins.
        lowest = histogram.bin_normalize_moving(values.min()) if values.size else 0
        self._width = 4 if lowest >= histogram.padding else 5

    def _of(self, start, stop):
        mask = None if self.mask is None else self.mask[start:stop]
        return self.values[start:stop], mask, *self._settings

    def weights(self, start, stop, scale):
        """Weights of some samples, first bin of each, and whether it counts."""
        n = stop - start
        weights = np.empty((n, self._width), dtype=np.int64)
        first, keep = np.empty(n, dtype=np.int32), np.empty(n, dtype=np.uint8)
        parzen.moving_weights(*self._of(start, stop), scale, weights, first, keep)
        return weights, first, keep

    def derivatives(self, start, stop, scale):
        """Derivatives of the weights of some samples, and first bin of each."""
        weights = np.empty((stop - start, self._width), dtype=np.int64)
        first = np.empty(stop - start, dtype=np.int32)
        parzen.derivative_weights(*self._of(start, stop), scale, weights, first)
        return weights, first

    def rows(self, table, start, stop):
        """Sums of the derivatives of some samples times rows of a known table."""
        out = np.empty((stop - start, table.shape[1]))
        parzen.derivative_rows(*self._of(start, stop), table, out)
        return out

    def bounds(self, bounds, otherwise, slack, out):
        """Bounds on what is selected for each sample; their sum."""
        of = self._of(0, len(self.values))
        return parzen.sample_bounds(*of, bounds, otherwise, slack, out)


class SecureParzenJointHistogram(ParzenJointHistogram):
    """Joint histogram of two parties' images, computed on secret shares.

    Parameters
    ----------
    nbins : int
        number of bins of the joint histogram, padding included; at least 6.
    reveal : {"histogram", "gradient"}, optional
        what the moving owner learns. ``"histogram"``: the joint histogram, as
        whoever makes this object by hand wants, and the gradient of the metric.
        ``"gradient"``: the value of the metric and its gradient only; the
        logarithms are taken on shares, which costs about twice the traffic.
    session : Session, optional
        this party's session. By default the other parties are started as
        processes on this machine.

    Attributes
    ----------
    joint, smarginal, mmarginal : array
        as in DIPY, at the moving owner with ``reveal="histogram"``; zeros
        elsewhere.
    joint_grad : None
        never computed; see `metric_gradient`.
    metric_value : float or None
        mutual information, at the moving owner. Inside `undisturbed` it is waited for
        when it is first read.
    metric_gradient : array, shape (p,)
        gradient of the mutual information, at the moving owner.

    Notes
    -----
    With 32 bins and p parameters, an evaluation with gradient sends
    ``33 + 28 + 2 + p + 1`` elements of 8 bytes per sample over all links with
    ``reveal="histogram"``, at most 76, in 5 rounds; with ``reveal="gradient"``
    ``33 + 2 * 32 + 28 + 2 + p + 1`` and 956 logarithms (see
    `dipy_ppir.mpc.logarithm`), in 10 rounds inside `undisturbed`, else 11.
    """

    def __init__(self, nbins, *, reveal="histogram", session=None):
        check_reveal(reveal)
        if nbins != int(nbins) or nbins < 6:
            raise ValueError(
                f"nbins must be an integer of at least 6, got {nbins}: four bins are "
                "padding for the Parzen windows"
            )
        super().__init__(int(nbins))
        self.reveal = reveal
        self.session = session
        self.joint_grad = None
        self.metric_gradient = None
        self._metric_value = None
        self._conversation = local.Conversation() if session is None else None
        self._sums = None
        self._by_count = False
        self._announced = False
        self._together = False
        self._open_value = None

    @property
    def metric_value(self):
        """Mutual information, at the moving owner; None before an evaluation."""
        with self._guard():
            self._finish()
        return self._metric_value

    @property
    def categories(self):
        """Number of bins that a static intensity can fall into."""
        return self.nbins - 2 * self.padding

    def setup(self, static, moving, smask=None, mmask=None):
        """Compute histogram settings of the images that are here.

        Parameters
        ----------
        static, moving : array or RemoteImage
        smask, mmask : array, optional
            as in DIPY.
        """
        here = [
            (im, mask)
            for im, mask in ((static, smask), (moving, mmask))
            if not is_remote(im)
        ]
        if here:
            first, last = here[0], here[-1]
            super().setup(
                np.asarray(first[0]), np.asarray(last[0]), smask=first[1], mmask=last[1]
            )
        else:
            blank = np.zeros(1)
            super().setup(blank, blank)

    # -- sharing the static image ----------------------------------------

    def share_static(self, samples, values=None, mask=None):
        """Share the bins of the static image, once per resolution level.

        Rounds: 1. Elements: ``nbins - 4`` per sample, in all.

        Parameters
        ----------
        samples : int
            number of samples.
        values, mask : array, at the static owner only
            intensity of each sample, and which samples count.
        """
        self._sums = Contingency(self.session, samples, self.categories, self.nbins)
        index = None
        if values is not None:
            index = self.static_bins(values)
            mask = None if mask is None else np.asarray(mask).reshape(-1) != 0
        self.session.ledger.about(samples)
        with self.session.phase("static image"):
            self._sums.share_categories(index, mask)

    def static_bins(self, values):
        """Category of static intensities, in ``[0, categories)``, int32."""
        values = np.ascontiguousarray(values, dtype=np.float64).reshape(-1)
        index = np.empty(values.size, dtype=np.int32)
        parzen.static_bins(
            values, self.smin, self.sdelta, self.nbins, self.padding, index
        )
        return index

    def serve(self, limit=None, on_evaluation=None):
        """Take part in the moving owner's evaluations until it says end.

        Parameters
        ----------
        limit : int, optional
            most evaluations that this party takes part in.
        on_evaluation : callable, optional
            called as each evaluation begins.

        Raises
        ------
        ProtocolError
            if the moving owner asks for more, or for anything unknown.
        """
        tables = gradients = 0
        while True:
            command = self.session.hear()
            if command == END:
                return
            if command == TABLE:
                tables += 1
                if limit is not None and tables > limit:
                    raise ProtocolError(
                        f"the moving owner asked for more than the {limit} "
                        "evaluations that the agreed level_iters allow",
                        MOVING,
                    )
                gradients = 0
                if on_evaluation is not None:
                    on_evaluation()
                self._table()
            elif command & 0xFF == CONTRACT and 0 < command >> 8 <= MAX_PARAMETERS:
                gradients += 1
                # A gradient whose sums wrapped is computed a second time.
                if not tables or gradients > 2:
                    raise ProtocolError(
                        "the moving owner asked for a gradient out of turn",
                        MOVING,
                    )
                self._contract(command >> 8)
            else:
                raise ProtocolError("the moving owner sent an unknown command", MOVING)

    def end(self):
        """Tell the other parties that the evaluations are over."""
        if self._conversation is None:
            self._finish()
            self.session.tell(END)
        else:
            self._conversation.end()

    def receipt(self, **facts):
        """Receipt of all evaluations so far, for a histogram without a session."""
        return self._conversation.receipt(**facts)

    def talk_locally(self, samples, static_values, static_mask=None):
        """Start the other parties' part of an evaluation on this machine.

        Does nothing if they are already at it.
        """
        if self._conversation is None or self._conversation.active:
            return
        self._announced = False  # an interrupted evaluation is not taken up again
        self.session = self._conversation.start(
            "dipy_ppir.align.parzenhist:_serve_locally",
            common={"nbins": self.nbins, "reveal": self.reveal, "samples": samples},
            static={
                "settings": [float(self.smin), float(self.sdelta)],
                "values": np.asarray(static_values, dtype=np.float64),
                "mask": static_mask,
            },
        )
        with self._guard():
            self.share_static(samples)

    # -- the joint histogram ---------------------------------------------

    def update_pdfs_dense(self, static, moving, smask=None, mmask=None):
        """Compute the joint and marginal densities of two images.

        Parameters
        ----------
        static : array or RemoteImage, shape (S, R, C) or (R, C)
        moving : array, shape (S, R, C) or (R, C)
            moving image, sampled on the static image's grid.
        smask, mmask : array, optional
            samples that count.

        Raises
        ------
        ValueError
            if the shapes do not agree.
        """
        if tuple(static.shape) != tuple(moving.shape):
            raise ValueError("Images must have the same shape")
        dim = len(static.shape)
        if dim not in (2, 3):
            raise ValueError(f"Only dimensions 2 and 3 are supported. {dim} received")
        self._update_pdfs(static, moving, smask, mmask, by_count=dim == 2)

    def update_pdfs_sparse(self, sval, mval):
        """Compute the joint and marginal densities of paired samples.

        Parameters
        ----------
        sval : array or RemoteImage, shape (n,)
        mval : array, shape (n,)
        """
        self._update_pdfs(sval, mval, None, None, by_count=False)

    def _update_pdfs(self, static, moving, smask, mmask, *, by_count):
        if not self.setup_called:
            self.setup(static, moving)
        values = np.ascontiguousarray(moving, dtype=np.float64).reshape(-1)
        if not is_remote(static):
            if self._conversation is None:
                raise ValueError(
                    "in a session the static image belongs to another party: pass a "
                    "RemoteImage in its place"
                )
            self._conversation.end()
            self.talk_locally(values.size, np.asarray(static).reshape(-1), smask)
        if mmask is not None:
            mmask = np.ascontiguousarray(mmask, dtype=np.int32).reshape(-1)
        self._moving = MovingBands(values, mmask, self)
        self._by_count = by_count
        self.announce()
        self._announced = False
        with self._guard():
            self._table()

    def announce(self):
        """Let the other parties begin the next evaluation."""
        if not self._announced:
            with self._guard():
                self.session.tell(TABLE)
            self._announced = True

    @contextmanager
    def undisturbed(self):
        """Context in which no other thread takes the local parties over.

        With ``reveal="gradient"`` the metric's value is not waited for before the
        gradient is asked for, which saves 2 rounds.
        """
        with self._guard():
            self._together = True
            try:
                yield
                self._finish()
            finally:
                self._together = False
                if self._conversation is not None:
                    self._open_value = None  # after an error its parties are gone

    def _guard(self):
        return self._conversation or nullcontext()

    def _finish(self):
        """Wait for what was put off: the metric's value, and the weights."""
        if self._open_value is None:
            return
        (session, open_value), self._open_value = self._open_value, None
        if session is not self.session:
            return  # it failed and another one took its place
        with session.phase("histogram"):
            self._metric_value, self._valid = open_value()
            self._weights()

    def _table(self):
        self._finish()
        with self.session.phase("histogram"):
            moving = self.session.pid == MOVING
            masks = None
            if self.reveal == "gradient" and self.session.pid == HELPER:
                # Before it waits for the others: they take what it deals when they
                # need it.
                masks = deal_table(self.session, self.nbins, self.categories)
            table = self._sums.table(self._moving.weights if moving else None)
            if self.reveal == "histogram":
                table = self.session.open(table, "joint_histogram", (MOVING,))
                if moving:
                    self._normalize(table)
            else:
                result = mutual_information(
                    self.session,
                    table,
                    "metric_value",
                    "sample_count",
                    (MOVING,),
                    by_count=self._by_count,
                    masks=masks,
                )
                self._weights = result.log_ratio
                self._open_value = self.session, result.open
        if not (moving and self._together):
            self._finish()

    def _normalize(self, table):
        # Same divisors as DIPY: the 2D dense histogram by the number of samples,
        # the others by their own sum.
        inner = slice(self.padding, self.nbins - self.padding)
        self._counts = table[:-1]
        self.joint[...] = 0
        self.joint[inner] = self._counts.T
        self.smarginal[...] = 0
        self.smarginal[inner] = table[-1]
        self._valid = self.smarginal.sum()
        total = self.joint.sum()
        if total > 0:
            self.joint /= self._valid if self._by_count else total
            self.smarginal /= self._valid
        self.mmarginal = self.joint.sum(axis=0)
        known = (self.joint >= EPSILON) & (self.mmarginal >= EPSILON)
        ratio = np.divide(
            self.joint, self.mmarginal, out=np.ones_like(self.joint), where=known
        )
        self._log_ratio = np.log(ratio)
        counted = self.smarginal > EPSILON
        log_static = np.log(self.smarginal, where=counted, out=np.zeros(self.nbins))
        terms = self.joint * (self._log_ratio - log_static[:, None])
        self._metric_value = float(terms[known & counted[:, None]].sum())

    # -- the gradient of the metric --------------------------------------

    def update_gradient_dense(
        self,
        theta,
        transform,
        static,
        moving,
        grid2world,
        mgradient,
        smask=None,
        mmask=None,
    ):
        """Compute the gradient of the mutual information over a grid.

        `update_pdfs_dense` must have been called with the same images. The
        result is in `metric_gradient`; `joint_grad` is never made.

        Parameters
        ----------
        theta, transform, static, moving, grid2world, mgradient, smask, mmask
            as in DIPY; `static` may be a `RemoteImage`.

        Raises
        ------
        ValueError
            if shapes or types do not agree.
        """
        if tuple(static.shape) != tuple(moving.shape):
            raise ValueError("Images must have the same shape")
        dim = len(static.shape)
        if dim not in (2, 3):
            raise ValueError(f"Only dimensions 2 and 3 are supported. {dim} received")
        if mgradient.shape != tuple(moving.shape) + (dim,):
            raise ValueError("Invalid gradient field dimensions.")
        if mgradient.dtype not in (np.float32, np.float64):
            raise ValueError("Grad. field dtype must be floating point")
        gradient = np.ascontiguousarray(mgradient, dtype=np.float64).reshape(-1, dim)
        # The Jacobian as a function of the voxel index instead of the position.
        jacobian = np.ascontiguousarray(
            linear_jacobian(transform, theta) @ np.asarray(grid2world, dtype=np.float64)
        )
        shape = np.array(static.shape, dtype=np.int32)

        def moments(weight, out):
            parzen.absolute_moments_grid(gradient, shape, weight, out)

        def columns(start, stop, by_column, out):
            parzen.gradient_columns_grid(
                gradient[start:stop], start, shape, by_column, out
            )

        self._update_gradient(jacobian, moments, columns, gradient)

    def update_gradient_sparse(
        self, theta, transform, sval, mval, sample_points, mgradient
    ):
        """Compute the gradient of the mutual information over sample points.

        Parameters
        ----------
        theta, transform, sval, mval, sample_points, mgradient
            as in DIPY; `sval` may be a `RemoteImage`.

        Raises
        ------
        ValueError
            if shapes or types do not agree.
        """
        dim = sample_points.shape[1]
        if mgradient.shape[1] != dim:
            raise ValueError("Dimensions of gradients and points are different")
        counts = {len(mgradient), len(mval), len(sample_points), sval.shape[0]}
        if len(counts) != 1:
            raise ValueError("Number of points and gradients are different.")
        if mgradient.dtype not in (np.float32, np.float64):
            raise ValueError("Gradients dtype must be floating point")
        if dim not in (2, 3):
            raise ValueError(f"Only dimensions 2 and 3 are supported. {dim} received")
        gradient = np.ascontiguousarray(mgradient, dtype=np.float64)
        points = np.ascontiguousarray(sample_points, dtype=np.float64)
        jacobian = linear_jacobian(transform, theta)

        def moments(weight, out):
            parzen.absolute_moments(gradient, points, weight, out)

        def columns(start, stop, by_column, out):
            parzen.gradient_columns(
                gradient[start:stop], points[start:stop], by_column, out
            )

        self._update_gradient(jacobian, moments, columns, gradient)

    def _update_gradient(self, jacobian, moments, fill, gradient):
        spread = spread_of(gradient) if self.reveal == "gradient" else 1.0
        self._columns = _Columns(jacobian, moments, fill, spread)
        p = len(jacobian) + 1
        with self._guard():
            for self._columns.extra in (EXTRA_BITS, 0):
                self.session.tell(CONTRACT | p << 8)
                self._contract(p)
                if self.metric_gradient is not None:
                    return

    def _contract(self, p):
        # The others see what comes next: another gradient, or another table.
        self.session.ledger.record_opening("repetition", (STATIC, HELPER), 1, 1)
        with self.session.phase("gradient"):
            moving = self.session.pid == MOVING
            secret = self.reveal == "gradient"
            mine = ()
            if moving:
                scales, rows = self._scales_shared() if secret else self._scales_known()
                mine = (rows, self._columns.blocks, scales)
            if secret:
                # The moving owner has nothing to receive before the opening.
                sums = self._sums.contract_shared(self._weights(), p, *mine)
                sums = dither(self.session, sums, gradient_blur(self._sums.samples))
            else:
                sums = self._sums.contract(p, *mine)
            self._finish()
            opened = self.session.open(sums, "metric_gradient", (MOVING,))
            if moving:
                self._set_gradient(scales.undo(opened))

    def _set_gradient(self, sums):
        """Keep the gradient, unless the check column says that a sum wrapped."""
        digits = 14 if self.reveal == "histogram" else 8
        norm = self._valid * self.mdelta
        gradient = sums[:-1] * (-1.0 / norm if norm > 0 else 0.0)
        wrapped = self._columns.wrapped(sums, digits)
        self.metric_gradient = None if wrapped else gradient

    def _scales_known(self):
        """Scales of the gradient's sums, and its rows, where the histogram is known."""
        inner = slice(self.padding, self.nbins - self.padding)
        table = np.ascontiguousarray(self._log_ratio[inner].T)
        bounds = np.empty((self.categories, _INTERVALS))
        slack = self.nbins * 2.0**-self._sums.frac_bits
        parzen.selection_bounds(self._counts, table, slack, self.padding, bounds)
        each = np.empty(self._moving.values.size)
        # The magnitudes of the spline derivatives of a sample sum to 3/2 at most.
        otherwise = 1.5 * np.abs(table).max()
        total = self._moving.bounds(bounds, otherwise, 2.0**-10, each)
        scales = self._columns.scales(total, self._columns.sums(each))
        return scales, partial(self._moving.rows, table)

    def _scales_shared(self):
        """Scales of the gradient's sums, and its rows, where nobody knows the table."""
        # Derivatives sum to zero, so z is at most 3/4 of the logarithms' range,
        # which is below 45; outside the histogram's range at most 3/2 of 45.
        columns, bound, samples = self._columns, 1.5 * 45, self._sums.samples
        bits = int(np.ceil(np.log2(bound))) + WEIGHT_BITS
        row = 2.0 ** band_bits(samples, bits, columns.extra)
        weight = 2.0**WEIGHT_BITS
        scales = columns.scales(samples * bound, bound * columns.sums(), row * weight)
        scales.row, scales.table = row, weight
        scales.columns = scales.columns / columns.spread
        return scales, self._moving.derivatives


class _Columns:
    """The moving owner's columns of one gradient: the image's gradient by parameter.

    Parameters
    ----------
    jacobian : array, shape (p, dim, dim + 1)
    moments : callable
        ``moments(weight, out)`` adds up weighted magnitudes times positions.
    fill : callable
        ``fill(start, stop, by_column, out)`` writes the columns of some samples.
    spread : float
        see `spread_of`.

    Attributes
    ----------
    extra : int
        bits by which a sum may exceed what is proven to fit.
    check : array, shape (p,)
        what the columns are multiplied with in one more, which checks their sums.
    """

    def __init__(self, jacobian, moments, fill, spread):
        self._jacobian, self._moments, self._fill = jacobian, moments, fill
        self._by_column = jacobian.reshape(len(jacobian), -1).T
        self.spread, self.extra, self.check = spread, 0, None

    def sums(self, weight=None):
        """Bounds on the sums of the columns' magnitudes, times weights."""
        out = np.zeros(self._jacobian.shape[1:])
        self._moments(weight, out)
        return np.einsum("kde,de->k", np.abs(self._jacobian), out)

    def scales(self, total, sums, row_scale=None):
        """`choose_scales` for the columns and a fresh check."""
        # Each column weighs in by its bound, so the check's own bound is their number;
        # by chance a little less, so that wraps of two columns do not cancel.
        weights = np.random.default_rng().uniform(0.5, 1.0, len(sums))
        self.check = np.divide(weights, sums, out=np.zeros_like(sums), where=sums > 0)
        extra = np.append(np.full(len(sums), self.extra), 0)
        return choose_scales(total, np.append(sums, len(sums)), row_scale, extra)

    def blocks(self, start, stop):
        """Columns of some samples, the check last."""
        checked = np.column_stack([self._by_column, self._by_column @ self.check])
        out = np.empty((stop - start, checked.shape[1]))
        self._fill(start, stop, np.ascontiguousarray(checked), out)
        return out

    def wrapped(self, sums, digits):
        """Whether the check says that a sum wrapped; proven ones cannot.

        One wrap moves it by 2**(3 - extra) or more; rounding by less than 2**-24, with
        "gradient" by less than 2**-17. The less is let through, the less likely is it
        that several wraps cancel so far.
        """
        if not self.extra:
            return False
        return abs(sums[:-1] @ self.check - sums[-1]) > 2.0 ** -(digits + self.extra)


def _serve_locally(
    session, nbins, reveal, samples, settings=None, values=None, mask=None
):
    histogram = SecureParzenJointHistogram(nbins, reveal=reveal, session=session)
    if session.pid == STATIC:
        histogram.smin, histogram.sdelta = settings
    histogram.share_static(samples, values, mask)
    histogram.serve()


__all__ = ["REVEAL", "RemoteImage", "SecureParzenJointHistogram", "linear_jacobian"]
