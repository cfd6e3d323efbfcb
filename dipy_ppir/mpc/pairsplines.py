r"""Steps of control points of a cubic B-spline, of two owners alone; see `freeform`.

Of the step of a control point c along an axis d

.. math::

    u_{cd} = w_{cd} \Big(\sum_x B_c(x) x_d(x) m(x) - \sum_x B_c(x) x_d(x) J(x)\Big),

only the second sum needs both owners. The static owner sends J encrypted, in slots
(`splineslots`); the moving owner multiplies by :math:`w_{cd} B_c(x) x_d(x)`, rounded to
integers, and sends back sums that only the static owner can decrypt, behind masks that
it draws itself (`encryptedslots`). All this is modulo a prime t of 40 bits, of which
the opened range of a step fills the whole: of an opening of b bits a step has the
precision :math:`t / 2^b`, and there is no room for a larger one.

Roundings of the n voxels that a control point depends on add up to numbers of standard
deviation :math:`2^{10} \sqrt{n / 12}` at most: a thirtieth of the precision for n below
2**13 and openings of 20 bits, and half as much for each bit less.

==========  ======  ================================================================
verb        rounds  bytes, on both links
==========  ======  ================================================================
`begin`     0       0
`steps`     3       what `EncryptedSlots.encrypt` sends for `Slots.ciphertexts`, with
                    a new key if steps were opened before, and `EncryptedSlots.sums`
                    for `Slots.results` and each axis; 8 for each control point and
                    axis, from the static owner
... again   2       the same without the ciphertexts, where all voxels count
`samples`   1       4 per hidden sample, from the moving owner
`judged`    2, see  what `EncryptedRows` sends for two products with the image,
            there   `circuits.lifted`, `PairShares.any_negative` and `PairShares.shown`
==========  ======  ================================================================

What each party sees: the static owner what encrypts uniform numbers, which the moving
owner draws; of hidden samples besides where they are. The moving owner sees encrypted
numbers, and its steps with noise of the static owner's that is uniform and as wide as
the precision: a simulator that is given them takes off the moving owner's own part. A
moving owner that does not multiply as it should can make them digits of the key, which
they may have room for, and read what was encrypted with it: see `bfv`.
"""

import secrets

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.circuits import lifted
from dipy_ppir.mpc.encrypted import EncryptedRows
from dipy_ppir.mpc.encryptedslots import PRIME, SLOTS, EncryptedSlots
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R64, R128
from dipy_ppir.mpc.freeform import SharedSteps, places, scattered
from dipy_ppir.mpc.lattice import below
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.pairalgebra import PairShares
from dipy_ppir.mpc.prg import Stream
from dipy_ppir.mpc.splineslots import Slots

#: Bits of the words that sums of products of two images are made in.
SUM_BITS = 48


class PairSteps(SharedSteps):
    """Steps of a session of two; see the module, and `freeform.SharedSteps`.

    Parameters
    ----------
    session : PairSession
    """

    def __init__(self, session):
        self.session = session
        self.lattice = self._static = self._whole = None

    def begin(self, lattice, static=None):
        """Take the static image for a level; nothing is sent.

        Parameters
        ----------
        lattice : Lattice
        static : array of int64, shape ``lattice.shape``, at the static owner only
            in units of 2**-IMAGE_BITS, from 0 to 1.
        """
        self.lattice, self._static, self._whole = lattice, static, None

    def steps(self, bits, own=None, samples=None):
        """The steps of all control points, opened to the moving owner.

        Rounds: 3, or 2 where all voxels count and were sent before.

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
        slots, images = self._encrypted(samples)
        weights = None
        if own is not None:
            # What fills a word of 64 bits is to fill the prime.
            weights = own.weights * (PRIME * 2.0**-64)
        parts = []
        for axis in range(len(lattice.shape)):
            x = weight = None
            if own is not None:
                x, weight = own.x[axis].reshape(-1), weights[axis]
            parts.append(_sums(images, slots, x, weight))
        part = np.stack(parts)
        if s.pid == MOVING:
            mine = scattered(own.x * own.image, samples, lattice)
            mine = weights * lattice.integer_sums(mine)
            part = (np.rint(mine).astype(np.int64) - part.astype(np.int64)) % PRIME
        else:
            part = (_noise(part.shape, bits) - part.astype(np.int64)) % PRIME
        noise = places(bits)
        words = np.ldexp(part.astype(np.float64) / PRIME, 64).astype(np.uint64)
        whole = (1 << 63) - 1
        array = SharedArray(R64, words, 2, noise, whole, noise_bits=noise)
        opened = s.open(array, "control_point_steps", (MOVING,))
        return None if opened is None else np.rint(opened)

    def _encrypted(self, samples):
        """The static image's samples, encrypted, and where they are."""
        if samples is None and self._whole is not None:
            return self._whole
        at = None if samples is None else samples.at
        slots = Slots(self.lattice, at, SLOTS)
        images = EncryptedSlots(self.session, "splines", STATIC)
        rows = None
        if self.session.pid == STATIC:
            values = self._static.reshape(-1)
            values = values if at is None else values[at]
            rows = (
                row
                for group in range(len(slots.groups))
                for row in slots.copied(slots.placed(values, group))
            )
        images.encrypt(slots.ciphertexts, rows)
        if samples is None:
            self._whole = slots, images
        return slots, images

    def _world(self):
        return PairShares(self.session)

    def _cross_sums(self, images, bound):
        """See `SharedSteps`. Rounds: 2, and those of `circuits.lifted`."""
        s, size = self.session, int(np.prod(self.lattice.shape))
        if bound >> SUM_BITS - 1:
            raise FixedPointOverflowError(
                f"an image of {size:,} voxels is too large for two owners to compare; "
                "register smaller ones, or with a helper"
            )
        rows = EncryptedRows(
            s, "images", STATIC, rows=1, length=size, bits=SUM_BITS, others=2, uses=1
        )
        rows.encrypt(None if s.pid == MOVING else self._static.reshape(1, size))
        x = None if images is None else images.reshape(2, size)
        return lifted(s, rows.products(2, x)[:, 0], R64, SUM_BITS, R128)


def _sums(images, slots, x, weights):
    """This owner's part of the sums of an axis, modulo the prime."""
    wanted, places_of, first = [], [], 0
    for group, index in enumerate(slots.groups):
        rows = range(first, first + len(index))
        first = rows.stop
        placed = None if x is None else slots.placed(x, group)
        for some in range(slots.sums):
            factors = None
            if x is not None:
                factors = _rounded(slots.factors(placed, weights, group, some))
            wanted.append((rows, factors))
            places_of.append((group, some))
    total = np.zeros(slots.lattice.control_shape, np.uint64)
    for sums, place in zip(images.sums(wanted), places_of, strict=True):
        slots.gathered(sums, total, *place, PRIME)
    return total


def _rounded(factors):
    """Numbers to the nearest integers."""
    return (np.rint(by).astype(np.int64) for by in factors)


def _noise(shape, bits):
    """Uniform numbers as wide as the precision of an opening, with mean zero."""
    width = -(-PRIME >> bits)
    stream = Stream(secrets.token_bytes(32))
    return below(stream, shape, width).astype(np.int64) - width // 2
