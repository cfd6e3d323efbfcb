r"""Gauss-Newton steps between the images of two owners alone; see `leastsquares`.

Of the step

.. math:: \Delta = \sum_x W(x) s(x) + c, \quad
          W_k(x) = \sum_{d,e} M_{k,de} \, g_d(x) \, y_e(x),

all but the static image s is the moving owner's, so that it is one product of a matrix
of one owner with a vector of the other (`encrypted`): the static owner sends s
encrypted, once for each set of samples, the moving owner multiplies and sends back what
only the static owner can decrypt, behind masks that it draws itself.

Numbers of the static owner have `VALUE_BITS`. W is rounded to integers in units of
2**-F of what the step has, F being what `WORD_BITS` leave to the bits of the step: for
n samples that changes a step by some ``300 sqrt(n) 2**-F`` units of its precision,
where F is 20 at least. Words modulo 2**`WORD_BITS` have no room for a larger step, and
what wraps on the way is of no consequence.

**Samples** that are others in every step are sent in every step, but for small images:
these are sent as a whole, once, and the moving owner multiplies what is no sample by
zero. Then the static owner need not know which voxels are samples.

====================  ======  ======================================================
verb                  rounds  bytes, on both links
====================  ======  ======================================================
`share_static`        1       what `EncryptedRows.encrypt` sends, from the static
                              owner
`step`                2       what `EncryptedRows.products` sends, from the moving
                              owner; 8 for each parameter, from the static one
... with a new key    3       the same, and what `share_static` sends
`mean`                2       the same, and 64
====================  ======  ======================================================

What each party sees: the static owner what encrypts uniform numbers, which the moving
owner draws; see `encrypted`. The moving owner sees encrypted numbers, and its step with
noise of the static owner's that is uniform and as wide as the precision, which is as
good as rounded: a simulator that is given it subtracts the moving owner's own part.
No more bits can be opened than are counted, whatever weights the moving owner has: a
step that is larger than promised comes round the ring and is another number.

A moving owner that does not multiply as it should chooses what these bits are about,
and can make them digits of the key (`bfv`). Before it could have `bfv.KEY_BITS` of
them, the static owner draws a new key and sends what is still needed again.
"""

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.circuits import lifted
from dipy_ppir.mpc.encrypted import EncryptedRows
from dipy_ppir.mpc.fields import R64, R128
from dipy_ppir.mpc.leastsquares import COUNT_DIGITS, VALUE_BITS
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.pairproducts import shifted
from dipy_ppir.mpc.protocols import blur

#: Bits of the words that steps and sums of products are made in.
WORD_BITS, SUM_BITS = 40, 48
#: Images of no more voxels are sent as a whole, whichever of them are samples: to
#: multiply by zeros costs less than to encrypt others for each step. About how many
#: steps an image serves.
MOST_WHOLE, STEPS = 1 << 14, 10


def columns(own, parameters, digits):
    """What the static owner's samples are multiplied by, as integers.

    Parameters
    ----------
    own : Own
    parameters : int
    digits : int
        fraction bits of the step, in units of its precision.

    Returns
    -------
    columns : callable
        ``columns(start, stop)`` returns those of some samples, array of int64, shape
        (parameters, stop - start).
    """
    dim = len(own.gradient)
    matrix = own.matrix.reshape(parameters, dim, dim + 1) * 2.0**digits

    def some(start, stop):
        y, total = own.positions[:, start:stop], 0.0
        for d, slope in enumerate(own.gradient[:, start:stop]):
            total = total + matrix[:, d] @ y * slope
        return np.rint(total).astype(np.int64)

    return some


class PairSteps:
    """Steps of a session of two; see the module, and `leastsquares.SecretSteps`.

    Parameters
    ----------
    session : PairSession
    dim : int
    bits : int
        of each number of a step, which must be smaller than 2**(bits - 1) - 1 units of
        its precision.
    parameters : int
        how many numbers a step has.
    voxels, samples : int
        of the image, and how many of them each step takes.

    Attributes
    ----------
    whole : bool
        whether the image is sent as a whole and once, if its samples change.
    """

    def __init__(self, session, dim, bits, parameters, voxels, samples):
        self.session, self.dim, self.bits = session, dim, bits
        self.parameters = parameters
        self.whole = samples < voxels <= MOST_WHOLE
        self._uses = STEPS if self.whole or samples == voxels else 1
        self._rows = None

    def share_static(self, shape, values=None):
        """Send the static image encrypted. Rounds: 1.

        Parameters
        ----------
        shape : tuple of int
            (dim + 1, n).
        values : array of int64, at the static owner only
            see `SecretSteps.share_static`; the last row, whose positions are ones, is
            the image.
        """
        self._rows = EncryptedRows(
            self.session,
            "least-squares",
            STATIC,
            rows=1,
            length=shape[1],
            bits=WORD_BITS,
            others=self.parameters,
            uses=self._uses,
        )
        self.session.encryption.renew(STATIC, self._uses * self.bits * self.parameters)
        self._rows.encrypt(None if values is None else values[-1:])

    def step(self, count, parameters, own):
        """The next step, opened to the moving owner; see `SecretSteps.step`. Rounds: 2.

        Parameters
        ----------
        count, parameters : int
        own : Own, at the moving owner only
            with positions, and if samples are of the whole image their index.
        """
        s, digits = self.session, WORD_BITS - self.bits
        x = None if own is None else columns(own, parameters, digits)
        if own is not None and own.index is not None and self.whole:
            sampled = x(0, len(own.index))
            x = np.zeros((parameters, self._rows.length), np.int64)
            x[:, own.index] = sampled
        self._rows.renew(self.bits * parameters)
        step = self._rows.products(parameters, x)[:, 0]
        if own is not None:
            step = step + np.rint(own.constant * 2.0**digits).astype(np.int64).astype(
                np.uint64
            )
        # The word's highest bits are the step's: there is no room for more.
        step = step << np.uint64(64 - WORD_BITS)
        noise = 64 - self.bits
        step = SharedArray(R64, step, 2, noise, (1 << 63) - 1)
        return s.open(blur(s, step, noise, STATIC), "update", (MOVING,))


class PairProducts:
    """Mean products of numbers of two owners alone; see `leastsquares.SecretProducts`.

    Parameters
    ----------
    session : PairSession
    digits : int
        fraction bits of what is returned.
    """

    def __init__(self, session, digits):
        self.session, self.digits = session, digits
        self._rows = None

    def share_static(self, count, values=None):
        """Send the static owner's numbers encrypted. Rounds: 1."""
        self._rows = EncryptedRows(
            self.session,
            "mean-product",
            STATIC,
            rows=1,
            length=count,
            bits=SUM_BITS,
            others=1,
            uses=2,
        )
        self._rows.encrypt(None if values is None else values[None])

    def mean(self, count, values=None):
        """The mean product. Rounds: 2.

        Parameters
        ----------
        count : int
        values : array of int64, shape (count,), at the moving owner only

        Returns
        -------
        mean : SharedArray, shape (1,), field R128
        """
        x = None if values is None else values[None]
        total = lifted(
            self.session, self._rows.products(1, x)[:, 0], R64, SUM_BITS, R128
        )
        mean = R128.scale(total, round(2.0**COUNT_DIGITS / count))
        digits = COUNT_DIGITS + 2 * VALUE_BITS
        mean = shifted(self.session, mean, digits - self.digits)
        return SharedArray(R128, mean, 2, self.digits, 2 << self.digits)
