r"""Steps of control points of a cubic B-spline, from products of the owners' numbers.

The moving owner knows numbers x_d of every voxel (the gradient of its warped image
along axis d) and its warped image m, the static owner its image J. For a control point
c

.. math::

    u_{cd} = w_{cd} \Big(\sum_x B_c(x) x_d(x) m(x) - \sum_x B_c(x) x_d(x) J(x)\Big),

with public weights B_c (`bsplines`) and the moving owner's own w. Only the second sum
needs both owners; in two products of own numbers (`ownproducts`):

1. the owners get parts p', p'' of the sums over x_d J, whose linear map is part of the
   form, so that the helper deals one word for each control point and axis;
2. w p' is the moving owner's to compute; of w p'' the owners get parts.

The result is opened to the moving owner alone, rounded: the helper adds a number that
is uniform and as wide as the precision, so that of 64 bits only `bits` are left.

**Nothing wraps.** Numbers are integers: J and m of `IMAGE_BITS` bits, x_d of magnitude
at most 2**`GRADIENT_BITS`, and the weights of a control point add up to
`Lattice.most_weight`, at most 2**24 for each voxel of a cell of k**dim. With k at most
32 in 3D the first sums stay below 2**(10 + 12 + 24 + 15) = 2**61. What w makes of them
is bounded by numbers of the moving owner alone, because J lies between 0 and 1: it
takes

.. math::

    w_{cd} \le R \Big/ \sum_x B_c(x)\, |x_d(x)| \max(m(x), 1 - m(x)),

where R is the range that is opened (`limited`). An owner that does not keep to it is
shown another word of as few bits: the ring has no room for more.

**Samples.** x and J may be had at some voxels only. Where all parties know which, what
was said above holds. Where the helper must not know (`hidden`) the static owner shares
its samples anew, the helper deals a word for each sample and axis, and the owners apply
the weights to what they have.

===============  ======  ======================================================
verb             rounds  words of 8 bytes, on all links
===============  ======  ======================================================
`begin`          1       1 per voxel, from the static owner
`steps`          2       dim per sample, from the moving owner; 6 per control
                         point and axis: 1 from the moving owner, 2 from the
                         static one, 3 from the helper
`samples`        1       1/2 per hidden sample, from the moving owner
`steps` of       3       2 dim + 1 per sample: dim each from the moving owner and
hidden samples           the helper, 1 from the static owner; 5 per control point
                         and axis: as above, but 2 from the helper
`judged`         2, see  2 per voxel, from the moving owner; 2 from the helper, and
                 there   what `lift` and `Shares.any_negative` of two sums cost
===============  ======  ======================================================

What each party sees: the helper nothing. The static owner sees x and w less masks that
the moving owner and the helper draw, and what the helper deals less words that those
two draw; of hidden samples besides where they are. The moving owner sees J and p'' less
masks that the static owner and the helper draw, and the steps. No mask serves twice,
so that all but the openings is uniform: a simulator draws it at random.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc.algebra import Digits, Opening, Secret, Shares, expression
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.edgesamples import secret_draws, show_samples
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.fields import R64
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, declare
from dipy_ppir.mpc.ownproducts import OwnProducts
from dipy_ppir.mpc.protocols import blur, lift

#: Bits of an image's intensities, and of a gradient without its sign.
IMAGE_BITS, GRADIENT_BITS = 10, 12
#: Most bits of an opened step.
MOST_BITS = 32
#: Of images that match, the squared difference is at most 3/4 of the static image's
#: spread, and at most 21/20 of what it was in the beginning.
LEFT, KEPT = (3, 4), (21, 20)
#: Bits of the mean square that is opened, and what it is a multiple of.
MEAN_BITS, MEAN_UNIT = 20, 2.0**-16

declare(
    "control_point_steps",
    receivers=(MOVING,),
    shape="dim numbers for every control point, each iteration",
    meaning="which way each control point would move to make the images more alike, "
    "rounded",
    bits=MOST_BITS,
)
declare(
    "mean_square",
    receivers=(MOVING,),
    shape="1, once, if it is asked for",
    meaning="the mean squared difference of the two images in the end, in parts of "
    "their ranges",
    bits=MEAN_BITS,
)


class Samples(NamedTuple):
    """Where numbers are had, if not at every voxel.

    Attributes
    ----------
    count : int
    at : array of int64, shape (count,), or None
        flat indices of voxels; None where they are not known yet.
    hidden : bool
        whether the helper must not know them.
    """

    count: int
    at: np.ndarray
    hidden: bool


class OwnSteps(NamedTuple):
    """What the moving owner brings to the steps of an iteration.

    Attributes
    ----------
    x : array of int64, shape (dim, *shape) or (dim, count)
    image : array of int64, shape (*shape) or (count,)
        its warped image, in units of 2**-IMAGE_BITS.
    weights : array of int64, shape (dim, *control_shape)
        see `limited`.
    """

    x: np.ndarray
    image: np.ndarray
    weights: np.ndarray


def places(bits):
    """Low bits of a word that are noise, of an opening of so many bits."""
    return 64 - bits


def largest(bits):
    """No step is larger, in units of its precision."""
    return (1 << bits - 1) - 1


def scattered(x, samples, lattice):
    """Numbers of samples at their voxels, zeros elsewhere."""
    if samples is None:
        return x
    whole = np.zeros((*x.shape[:-1], int(np.prod(lattice.shape))), dtype=x.dtype)
    whole[..., samples.at] = x
    return whole.reshape(*x.shape[:-1], *lattice.shape)


def limited(weights, x, image, lattice, samples, bits):
    """Weights as integers, so that no step leaves the range that is opened.

    Parameters
    ----------
    weights : array of float, shape (dim, *control_shape)
        times a sum of integers they give a step in units of its precision.
    x, image : array of int64
        see `OwnSteps`.
    lattice : Lattice
    samples : Samples or None
    bits : int

    Returns
    -------
    weights : array of int64
        in units of 2**-`places`.
    """
    most = np.maximum(image, (1 << IMAGE_BITS) - image)
    most = lattice.integer_sums(scattered(np.abs(x) * most, samples, lattice))
    # Less by what doubles cannot tell apart.
    room = largest(bits) * 2.0 ** places(bits) * (1 - 2.0**-48)
    limit = room / np.maximum(most, 1)
    whole = np.floor(np.minimum(weights * 2.0 ** places(bits), limit))
    return np.where(most > 0, whole, 0).astype(np.int64)


def products(lattice, samples, sums):
    """The bilinear form of x and J: weighted sums of the products over all voxels."""

    def form(x, y):
        if samples is not None:
            y = y.reshape(-1)[samples.at]
        return sums(scattered(x * y, samples, lattice))

    return form


def elementwise(x, y):
    """The form of a product of numbers."""
    return x * y


def cross_sums(x, y):
    """The form of the products of some images with one, added up."""
    return (x * y).reshape(len(x), -1).sum(axis=1, dtype=x.dtype)


def spread(static):
    """Sum of the squares of an image less its mean, and of its squares."""
    total, squares = int(static.sum()), int((static**2).sum())
    return squares - total**2 / static.size, float(squares)


class ClearSteps:
    """The same in the clear, with the same integers, rounded to nearest."""

    def draws(self, rng, n):
        """Uniform numbers between 0 and 1, by which edges become samples."""
        return rng.random(n)

    def section(self, name):
        """See `SharedSteps.section`."""

    def begin(self, lattice, static):
        """Take the static image, in units of 2**-IMAGE_BITS, for a level."""
        self.lattice, self.static = lattice, static

    def steps(self, bits, own, samples=None):
        """See `SharedSteps.steps`."""
        form = products(self.lattice, samples, self.lattice.integer_sums)
        sums = form(own.x, self.static)
        mine = self.lattice.integer_sums(
            scattered(own.x * own.image, samples, self.lattice)
        )
        return np.rint((own.weights * (mine - sums)) * 2.0 ** -places(bits))

    def samples(self, samples):
        """See `SharedSteps.samples`."""
        return samples

    def goes_on(self, choice, refuse):
        """See `SharedSteps.goes_on`."""
        return choice

    def judged(self, images, *, value=False):
        """See `SharedSteps.judged`."""
        most, squares = spread(self.static)
        own = (images**2).reshape(2, -1).sum(axis=1)
        before, after = own - 2 * cross_sums(images, self.static) + squares
        bad = KEPT[0] * before < KEPT[1] * after or LEFT[0] * most < LEFT[1] * after
        mean = after / self.static.size / 2.0 ** (2 * IMAGE_BITS)
        return bool(bad), round(mean / MEAN_UNIT) * MEAN_UNIT if value else None


class SharedSteps:
    """Steps on the shares of a session's three parties; see the module.

    Parameters
    ----------
    session : Session
    """

    def __init__(self, session):
        self.session = session
        self._images = OwnProducts(session, R64, "freeform")
        self._samples = OwnProducts(session, R64, "freeform-samples")
        self._weighted = OwnProducts(session, R64, "freeform-weights")
        self._static = None

    def section(self, name):
        """Begin a section of the computation; see `Session.section`."""
        self.session.section(name)

    def begin(self, lattice, static=None):
        """Share the static image for a level. Rounds: 1.

        Parameters
        ----------
        lattice : Lattice
        static : array of int64, shape ``lattice.shape``, at the static owner only
            in units of 2**-IMAGE_BITS, from 0 to 1.
        """
        self.lattice = lattice
        if self.session.pid == STATIC:
            self._static = R64.encode_int(static)
        self._images.share_static(lattice.shape, self._static)

    def steps(self, bits, own=None, samples=None):
        """The steps of all control points, opened to the moving owner.

        Rounds: 2, or 3 of hidden samples.

        Parameters
        ----------
        bits : int
            of an opened step.
        own : OwnSteps, at the moving owner only
        samples : Samples, optional
            all voxels by default.

        Returns
        -------
        steps : array, shape (dim, *control_shape), or None
            in units of their precision, at the moving owner only.
        """
        s, lattice = self.session, self.lattice
        dim = len(lattice.shape)
        results = dim, *lattice.control_shape
        x = None if own is None else R64.encode_int(own.x)
        sums = self._sums(x, samples, results)
        weights = offset = None
        if s.pid == MOVING:
            weights = R64.encode_int(own.weights)
            mine = scattered(x * R64.encode_int(own.image), samples, lattice)
            offset = lattice.integer_sums(mine) - sums
        # The moving owner's part of the sums it multiplies itself.
        self._weighted.share_static(
            results, sums if s.pid == STATIC else None, wait=False
        )
        whole = (1 << 63) - 1
        steps = self._weighted.sums(elementwise, results, results, weights, bound=whole)
        part = R64.neg(steps.share)
        if s.pid == MOVING:
            part = part + weights * offset
        noise = places(bits)
        array = SharedArray(R64, part, 2, noise, whole)
        array = blur(s, array, noise, HELPER)
        opened = s.open(array, "control_point_steps", (MOVING,))
        # What is no larger than the noise may be nothing, and then is nothing: else
        # images that match would be moved apart.
        return None if opened is None else np.rint(opened)

    def _sums(self, x, samples, results):
        """This owner's part of the sums over products with the static image."""
        s, lattice = self.session, self.lattice
        bound = lattice.most_weight << IMAGE_BITS + GRADIENT_BITS
        if samples is None or not samples.hidden:
            form = products(lattice, samples, lattice.integer_sums)
            shape = results[:1] + (
                lattice.shape if samples is None else (samples.count,)
            )
            return self._images.sums(form, shape, results, x, bound=bound).share
        own = None
        if s.pid == STATIC:
            own = self._static.reshape(-1)[samples.at]
        self._samples.share_static((samples.count,), own, wait=False)
        shape = results[0], samples.count
        parts = self._samples.sums(elementwise, shape, shape, x, bound=bound).share
        if s.pid == HELPER:
            return None
        return lattice.integer_sums(scattered(parts, samples, lattice))

    def draws(self, rng, n):
        """Uniform numbers between 0 and 1 that nobody else can work out."""
        return secret_draws(n)

    def samples(self, samples):
        """Hidden samples as each party knows them: told to the static owner.

        Rounds: 1. Bytes: 4 for each, from the moving owner.

        Parameters
        ----------
        samples : Samples
            with the indices at the moving owner.
        """
        voxels = int(np.prod(self.lattice.shape))
        at = show_samples(self.session, samples.at, samples.count, voxels)
        return samples if at is None else samples._replace(at=at)

    def judged(self, images=None, *, value=False):
        """Whether the images hardly match in the end, or less than in the beginning.

        They do not if the sum of squared differences is more than 3/4 of that of the
        static image less its mean, or 21/20 of what it was (`LEFT`, `KEPT`). Rounds: 2,
        those of `Shares.any_negative`, and 1 for the value.

        Parameters
        ----------
        images : array of int64, shape (2, *shape), at the moving owner only
            its image warped as in the beginning and as in the end.
        value : bool, optional
            whether the mean square in the end is opened to the moving owner.

        Returns
        -------
        mismatched : bool or None
            None at the helper.
        value : float or None
        """
        s, world, shape = self.session, self._world(), self.lattice.shape
        size = float(np.prod(shape))
        whole = Digits(1.0, size * 2.0 ** (2 * IMAGE_BITS) + 1)
        squares = known = None
        if s.pid == MOVING:
            squares = (images**2).reshape(2, -1).sum(axis=1).astype(np.float64)
        elif s.pid == STATIC:
            known = np.array(spread(self._static.view(np.int64)))
        cross = self._cross_sums(images, int(whole.bound))
        own = world.own(squares, MOVING, (2,), whole).part
        static = world.own(known, STATIC, (2,), whole).part

        def number(part, k):
            part = None if s.pid == HELPER else part[k : k + 1]
            return expression(Secret(part, 1.0, (1,)))

        before, after = (
            number(own, k) - number(cross, k).times(2) + number(static, 1)
            for k in range(2)
        )
        most = number(static, 0)
        tests = [
            before.times(KEPT[0]) - after.times(KEPT[1]),
            most.times(LEFT[0]) - after.times(LEFT[1]),
        ]
        bound = 2 * max(*KEPT, *LEFT) * whole.bound
        digits = Digits(max(bound * 2.0**-48, 1.0), bound)
        bit = world.any_negative(tests, digits, "mismatch", (MOVING, STATIC))
        if not value:
            return bit, None
        unit = whole.bound * MEAN_UNIT
        (mean,) = world.shown(
            Opening([after], unit, whole.bound, "mean_square", (MOVING,))
        )
        return bit, None if mean is None else float(mean[0, 0]) / (whole.bound - 1)

    def _world(self):
        return Shares(self.session)

    def _cross_sums(self, images, bound):
        """Parts, in the ring of 128 bits, of the sums of the images times the other.

        Rounds: 2.

        Parameters
        ----------
        images : array of int64, shape (2, *shape), at the moving owner only
        bound : int
            promised to be no smaller than the sums.
        """
        x = None if images is None else R64.encode_int(images)
        sums = self._images.sums(
            cross_sums, (2, *self.lattice.shape), (2,), x, bound=bound
        )
        return lift(self.session, sums).share

    def goes_on(self, choice, refuse):
        """Whether there is another iteration: the moving owner says so.

        Parameters
        ----------
        choice : bool
            at the moving owner, and at a helper that deals ahead, for as many as there
            may be.
        refuse : bool
            whether there may be none.
        """
        if self.session.pid == MOVING:
            self.session.tell(int(choice))
            return choice
        if self.session.pid == HELPER and self.session.ahead:
            return choice
        command = self.session.hear()
        if command not in (0, 1):
            raise ProtocolError("the moving owner sent an unknown command", MOVING)
        if command and refuse:
            raise ProtocolError(
                "the moving owner asked for more iterations than were agreed", MOVING
            )
        return bool(command)
