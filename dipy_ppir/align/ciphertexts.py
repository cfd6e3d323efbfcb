"""What encryption takes in registrations of two owners alone; from public numbers.

Rows are packed as `encrypted` packs them, so that ciphertexts are counted exactly. What
something takes is an array of three numbers: bytes, rounds and seconds.
"""

import math

import numpy as np

from dipy_ppir.align.gaussnewton import step_bits
from dipy_ppir.align.gradientsampling import sample_count
from dipy_ppir.mpc import bfv, pairinformation, pairsplines, pairsquares, transfers
from dipy_ppir.mpc.bsplines import Lattice
from dipy_ppir.mpc.encrypted import COSTS, EncryptedRows
from dipy_ppir.mpc.encryptedslots import PRIME, SLOTS
from dipy_ppir.mpc.ledger import STATIC
from dipy_ppir.mpc.lookups import WINDOW, Lookups
from dipy_ppir.mpc.splineslots import REACH

#: Seconds to prepare a polynomial, to multiply one, to send one back, and to encrypt.
_PREPARE, _MULTIPLY, _ANSWER, _ENCRYPT = (0.33e-3 * x for x in COSTS)
#: Bytes and seconds of a number whose logarithm is taken, with products made ahead.
_NUMBER = 8_000, 4e-5
#: Seconds of a word that is looked up, or could have been, and of the transfers.
_LOOKUP = 3e-7
#: Rounds of an evaluation of mutual information.
_INFORMATION_WAITS = 27
#: Of a step of the optimizer, and for each parameter; of the same where steps are
#: hidden; and of keys, and the first products and transfers.
STEP, STEP_EACH = np.array([150_000, 62, 0.05]), np.array([43_000, 0, 0])
BEGIN = np.array([3_600_000, 25, 0.6])
#: A new key of an owner.
KEY = np.array([bfv.CIPHERTEXT, 1, 0.002])


def _rows(rows, length, bits, others, **options):
    """Rows that nobody has, to see how they would be packed."""
    sizes = {"rows": rows, "length": max(int(length), 1), "bits": bits}
    return EncryptedRows(None, "", STATIC, others=others, **sizes, **options)


def of_information(p, bins, samples):
    """The static owner's categories, and the masks of what is looked up.

    Parameters
    ----------
    p : AffineParameters
    bins, samples : int

    Returns
    -------
    categories, masks : EncryptedRows

    Raises
    ------
    NoiseBudgetError
        if there are too many samples.
    """
    masked = p.hide_steps or p.sampling_proportion in (None, 1)
    uses = 1 if p.hide_steps else pairinformation.USES
    bits = pairinformation.WORD_BITS
    return (
        _rows(bins - 4, samples, bits, bins + masked, uses=uses),
        _rows(WINDOW, samples, bits, 1, uses=1),
    )


def of_squares(p, voxels, parameters):
    """The static owner's samples for steps, and its voxels for a mean product.

    Parameters
    ----------
    p : AffineParameters
    voxels, parameters : int

    Returns
    -------
    steps, value : EncryptedRows
    """
    n = sample_count(voxels, p.sampling_proportion)
    # Small images are sent as a whole, once.
    n = n if voxels > pairsquares.MOST_WHOLE else voxels
    uses = 1 if n < voxels else pairsquares.STEPS
    return (
        _rows(1, n, pairsquares.WORD_BITS, parameters, uses=uses),
        _rows(1, voxels, pairsquares.SUM_BITS, 1, uses=2),
    )


def of_splines(p, shape):
    """The static owner's samples for steps of control points; see `splineslots`.

    Parameters
    ----------
    p : FreeFormParameters
    shape : tuple of int

    Returns
    -------
    samples : int
        ciphertexts of them.
    sums : int
        how many are made of each.
    results : int
        ciphertexts that come back, for each axis.
    """
    lattice = Lattice(shape, (p.spacing,) * p.dim)
    voxels = math.prod(lattice.shape)
    part = sample_count(voxels, p.sampling_proportion) / voxels
    cells = math.prod(-(-size // p.spacing) for size in lattice.shape)
    reach, inside = REACH**p.dim, p.spacing**p.dim * part
    sums = -(-reach // min(reach, max(SLOTS // cells, 1)))
    copies = -(-reach // sums)
    parts = max(SLOTS // (cells * copies), 1) if sums == 1 else 1
    groups = -(-cells // SLOTS)
    return groups * math.ceil(inside / min(parts, inside)), sums, groups * sums


def _sent(rows):
    """Of encrypting rows."""
    count = rows.ciphertexts
    return np.array([count * bfv.CIPHERTEXT, 1, count * _ENCRYPT])


def _multiplied(rows, count, *, contracted=False):
    """Of products of rows with so many others, or of sums over all rows."""
    p, ciphertexts = rows.packing, rows.ciphertexts
    responses = rows.responses(count, contracted=contracted)
    plain = ciphertexts if contracted else len(p.blocks(rows.length))
    work = -(-count // p.others) * (_PREPARE * plain + _MULTIPLY * ciphertexts)
    back = rows.response_bytes(count, contracted=contracted)
    return np.array([back, 1, work + _ANSWER * responses])


def squares(p, shape, parameters, count):
    """What squared differences take; see `pairsquares`.

    Parameters
    ----------
    p : AffineParameters
    shape : tuple of int
    parameters, count : int
        of each step, and steps.

    Returns
    -------
    once, each, value : array
        before the first step, for each, and for a value by itself.
    """
    voxels = math.prod(shape)
    steps, value = of_squares(p, voxels, parameters)
    once, each = _sent(steps), _multiplied(steps, parameters)
    each += [8 * parameters, 1, 0.002]
    # Steps that a key of the static owner serves.
    served = max(bfv.KEY_BITS // (parameters * step_bits(p.precision)), 1)
    if steps.length < voxels:
        once, each = KEY, once + each + KEY / served
    else:
        once = (once + KEY) * -(-count // served)
    # The mean products of both values, for which the image is sent once.
    value = _sent(value) / 2 + _multiplied(value, 1) + [10_000, 10, 0.02]
    return once, each, value


def information(p, bins, samples, dim):
    """What evaluations of mutual information take; see `pairinformation`.

    Parameters
    ----------
    p : AffineParameters
    bins, samples, dim : int

    Returns
    -------
    once, each, value : array
        see `squares`.
    """
    moments = dim * (dim + 1)
    masked = p.hide_steps or p.sampling_proportion in (None, 1)
    hot, masks = of_information(p, bins, samples)
    numbers = bins * hot.rows + bins + hot.rows
    each = _multiplied(hot, bins + masked) + _multiplied(hot, moments, contracted=True)
    # With a key, which goes the same way.
    each += _sent(masks) + KEY * [1, 0, 1]
    each += _multiplied(masks, moments, contracted=True)
    bits = pairinformation.WORD_BITS
    looked_up = Lookups(None, rows=bins, length=masks.length, bits=bits)
    sent = looked_up.payload_bytes + transfers.BYTES * looked_up.transfers
    each += [sent, 0, _LOOKUP * masks.length * bins]
    each += [numbers * _NUMBER[0], _INFORMATION_WAITS, numbers * _NUMBER[1]]
    return _sent(hot), each, each


def splines(p, shape, controls):
    """What steps of control points take at a level; see `pairsplines`.

    Parameters
    ----------
    p : FreeFormParameters
    shape : tuple of int
    controls : int

    Returns
    -------
    once, each : array
        of the samples, which may be sent for every step, and of a step.
    """
    voxels, dim = math.prod(shape), p.dim
    n = sample_count(voxels, p.sampling_proportion)
    samples, sums, results = of_splines(p, shape)
    once = np.array([samples * bfv.CIPHERTEXT, 1, samples * _ENCRYPT])
    back = bfv.response_bytes(bfv.kept_primes(PRIME))
    sent = dim * (results * back + 8 * controls)
    sent += 4 * n * (n < voxels and p.sampling == "GMS")
    work = dim * (sums * samples * (_PREPARE + _MULTIPLY) + results * _ANSWER)
    return once, np.array([sent, 2, work + 5e-7 * voxels])


def match(voxels):
    """What it takes to judge the match of splines."""
    rows = _rows(1, voxels, pairsplines.SUM_BITS, 2, uses=1)
    return _sent(rows) + _multiplied(rows, 2) + [40_000, 30, 0]
