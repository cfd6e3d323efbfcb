r"""Logarithms and mutual information of a shared table, on shares.

A shared count v is opened to the owners behind a mask, and scaled to
:math:`v 2^{63-k}` between 2**62 and 2**64 (see `normalize`). With that as
:math:`2^{62} x`, x between 1 and 4,

.. math:: \ln v = (k - 1) \ln 2 + \ln x.

which is a polynomial of x (see `smooth`). Absolute error below 4e-11 for words of 64
bits, 1e-6 for words of 32.

The former is far more than a registration needs. But the error depends on the count and
on masks of which the owners know a part: whoever is opened a sum of logarithms, again
and again, learns of the counts what the error shows. So the error must be far below the
blur of what is opened; and where rounding cannot be that fine, in the weights, nobody
who sees a result may know how it was rounded (`protocols.truncate_unseen`). Where
nothing is opened but a few bits, neither matters.

================  ======  ======================================================
step              rounds  bytes per number, on all links, words of 64 and 32 bits
================  ======  ======================================================
`normalize`       3       1687 + 32 + 128 = 1847; 491 + 16 + 64 = 571
`logarithm`       1       19 * 4 * 16 = 1216 dealt, 2 * 8; 13 * 4 * 16 = 832, 2 * 4
weighted sum      1       4 * 16 dealt, 2 * 16; for the cells of a table
weights           2       16 + 8; for the cells of a table; local where the caller
                          opens none of what they weigh
================  ======  ======================================================

3.2 kB in all, 1687 + 1216 + 64 of them dealt by the helper, which runs ahead, and 5
rounds to the sum, 6 to the weights; 1.5 kB with words of 32 bits. Everything received
before an opening is uniform: what is dealt is hidden by numbers that the moving owner
draws too, what the owners send each other by the sender's part of a mask (see
`protocols.deal` and `protocols.pad`).
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc import normalize as normal
from dipy_ppir.mpc import reciprocal as reciprocals
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import R32, R64, R128
from dipy_ppir.mpc.ledger import HELPER, MOVING
from dipy_ppir.mpc.protocols import (
    check_truncation,
    constant,
    deal,
    dither,
    pad,
    swap,
    truncate_part,
    truncate_unseen,
)
from dipy_ppir.mpc.smooth import (
    FINE_BITS,
    Opened,
    deal_coefficients,
    evaluate,
    open_normalized,
    polynomials,
)

#: Degree of the polynomials by ring of the counts.
DEGREES = {R64: 18, R32: 12}
#: Fraction bits of what weighs the counts.
LOG_BITS = 44
_LN_2 = round(np.log(2.0) * 2.0**FINE_BITS)
#: No logarithm of a number below 2**64 is larger.
LARGEST = 45

_POLYNOMIALS = {ring: polynomials(np.log, d) for ring, d in DEGREES.items()}


class Masks(NamedTuple):
    """What is dealt for n numbers, the first of which are weighed by logarithms.

    Attributes
    ----------
    normal : normalize.Masks
    fraction : array of words, shape (n,)
        the mask of x, in the ring of the numbers.
    coefficients : array of uint64, shape (degree + 1, 4, n, 2)
        of the logarithm.
    inverse : reciprocal.Masks
        of those numbers of which the reciprocal is asked, or None.
    weight : array of uint64, shape (size, 2)
        masks of what is weighed.
    products : array of uint64, shape (2, 2, size, 2)
        the mask of the count as an integer, and that times the mask of what is
        weighed; each for a masked count without and with its highest bit.
    """

    normal: normal.Masks
    fraction: np.ndarray
    coefficients: np.ndarray
    inverse: reciprocals.Masks
    weight: np.ndarray
    products: np.ndarray


def deal_masks(session, n, size, ring=R64, inverses=()):
    """Deal what the logarithms of n numbers need and a weighted sum of `size`.

    Rounds: 1. Bytes: 1687 + 1216 per number and 64 for each of the sum, 491 + 832 with
    words of 32 bits; see `reciprocal` for those. It depends on nothing secret: the
    helper runs ahead.

    Parameters
    ----------
    session : Session
    n, size : int
    ring : WordRing, optional
        of the numbers.
    inverses : sequence of int, optional
        numbers of which the reciprocal is wanted.

    Returns
    -------
    masks : Masks
    """
    first = normal.deal_masks(session, n, ring)
    fraction = pad(session, "fraction", (n,), ring.dtype)
    weight = pad(session, "weight", (size, 2), plus=R128.add)
    coefficients = deal_coefficients(session, fraction, _POLYNOMIALS[ring], n)
    inverse = None
    if len(inverses):
        some = fraction[inverses], first.position[inverses]
        inverse = reciprocals.deal_masks(session, *some, ring)
    products = None
    if session.pid == HELPER:
        products = _masked_products(first.number[:size], weight)
    products = deal(session, "products", products, (2, 2, size, 2), minus=R128.sub)
    return Masks(first, fraction, coefficients, inverse, weight, products)


def _masked_products(mask, weight):
    """Mask of a count as an integer, and its product with the mask of a weight.

    The count is ``masked - mask`` in its ring of words, and below half of it. Without
    its highest bit `masked` has wrapped around just where the mask has it.
    """
    bits = 8 * mask.dtype.itemsize
    top = (mask >> mask.dtype.type(bits - 1)).astype(np.uint64)
    low, zero = mask.astype(np.uint64), np.zeros(mask.shape, np.uint64)
    whole = np.stack([low, zero], axis=-1)
    # The mask less the size of its ring.
    wrap = [zero, -top] if bits == 64 else [-(top << np.uint64(bits)), -top]
    integer = np.stack([R128.add(whole, np.stack(wrap, axis=-1)), whole])
    weights = np.ascontiguousarray(np.broadcast_to(weight, integer.shape))
    return np.stack([integer, R128.mul(integer, weights)])


def logarithm(session, opened, n, masks):
    """Natural logarithms of numbers that `open_normalized` opened; local.

    Returns
    -------
    logarithms : SharedArray, shape (n,), field R128, FINE_BITS fraction bits
        the helper's part is zero.
    """
    if session.pid == HELPER:
        total = R128.zeros((n,))
    else:
        exponent = normal.exponent_of(session, opened.position, masks.normal)
        if session.pid == MOVING:
            exponent = R128.sub(exponent, R128.encode_int(np.ones(n)))
        total = R128.scale(exponent, _LN_2)
        log = evaluate(opened.fraction, masks.coefficients, LARGEST)
        total = R128.add(total, log.share)
    return SharedArray(R128, total, 2, FINE_BITS, LARGEST << FINE_BITS)


def drop(session, array, bits, target):
    """Drop low bits of what the owners hold; local.

    Right to one unit in the last place, but for a probability below 2**-40.
    """
    check_truncation(array.field, array.bound, bits)
    part = target.zeros(array.shape)
    if session.pid != HELPER:
        part = truncate_part(
            session.pid, array.field, array.share, array.bound, bits, target
        )
    bound = (array.bound >> bits) + 1
    return SharedArray(target, part, 2, array.frac_bits - bits, bound)


class MutualInformation(NamedTuple):
    """What `mutual_information` returns.

    Attributes
    ----------
    log_ratio : callable
        returns ``log(table / its sum over categories)``, a SharedArray of shape
        (bins, categories), WEIGHT_BITS fraction bits, in the ring; the helper's part
        is zero. The static owner may have to wait for it.
    open : callable
        opens and returns, at the receivers, the mutual information in nats and the
        number of samples that count; elsewhere (None, None). Rounds: 2.
    """

    log_ratio: Callable
    open: Callable


#: Bits of the value, in nats, and of the number of samples, that are opened. What is
#: below is drowned in noise, and the errors of the logarithms with it.
VALUE_DIGITS = 26
#: Fraction bits of the logarithms that weigh the gradient.
WEIGHT_BITS = 14


def deal_table(session, bins, categories, ring=R64, masked=False, marginal=False):
    """`deal_masks` for the information of a table of that shape; see `_terms`."""
    size = bins * categories + masked
    n = size + bins + categories + masked
    inverses = _inverses(bins, categories, masked, marginal)
    return deal_masks(session, n, size, ring, inverses)


def _inverses(bins, categories, masked, marginal):
    """Which numbers of `_terms` have their reciprocals dealt."""
    size = bins * categories + masked
    rows = [*range(size, size + bins)] if marginal else []
    return rows + ([size + bins + categories] if masked else [])


class _Terms(NamedTuple):
    """What mutual information is made of; see `_terms`."""

    masks: Masks
    opened: Opened
    counts: np.ndarray
    ratio: SharedArray
    sum_up: Callable
    shift: int


def _terms(session, table, masks, *, masked=False, marginal=False):
    r"""Logarithms of a table, its row sums and its counts, and their weighted sum.

    The numbers are the cells; T if `masked`; the row sums; the counts; V if `masked`.

    Rounds: 4, and 1 until the sum is there.

    Parameters
    ----------
    session, table, masks
        see `mutual_information`.
    masked : bool, optional
        whether samples may be left out; then T weighs ln V.
    marginal : bool, optional
        whether reciprocals of the row sums are dealt.
    """
    bins, categories = table.shape[0] - 1, table.shape[1]
    ring, counted = table.field, table.share[-1]
    # Sums are local. One unit in the last place is added to every number, so that
    # none is zero.
    row_sums = table.share[:-1].sum(axis=1, dtype=ring.dtype)
    mass, samples = (
        a.sum(dtype=ring.dtype, keepdims=True) for a in (row_sums, counted)
    )
    cells = table.share[:-1].reshape(-1)
    size, weighed = cells.size, cells.size + masked
    if masked:
        every = np.concatenate([cells, mass, row_sums, counted, samples])
    else:
        every = np.concatenate([cells, row_sums, counted])
    if session.pid == MOVING:
        every += ring.dtype(1)
    numbers = table._with(every, bound=table.bound + 1)
    receive_masked = normal.open_masked(session, numbers)
    if session.pid != HELPER:
        masks = deal_table(session, bins, categories, ring, masked, marginal)
    opened = open_normalized(session, receive_masked(), masks.normal, masks.fraction)
    logs = logarithm(session, opened, every.size, masks)
    rows, columns = logs[weighed : weighed + bins], logs[weighed + bins :]
    shape = bins, categories
    ratio = logs[:size].reshape(shape) - _broadcast(rows, shape, axis=1)
    inner = ratio - _broadcast(columns[:categories], shape, axis=0)
    # Near zero where T and V are as large as they can be, so that noise in T is
    # harmless.
    shift = round(np.log(table.bound) * 2**LOG_BITS) << FINE_BITS - LOG_BITS
    weights = _plus(session, inner.reshape(size), shift)
    if masked:
        log_samples = _plus(session, columns[categories:], -shift)
        both = np.concatenate([weights.share, log_samples.share])
        weights = weights._with(both)
    sum_up = _weigh(session, opened, weights, masks)
    return _Terms(masks, opened, np.concatenate([mass, samples]), ratio, sum_up, shift)


def _plus(session, array, integer):
    """Add a constant to numbers of the ring of 128 bits; one owner does it."""
    if session.pid != MOVING:
        return array
    shift = constant(R128, integer, array.share)
    return array._with(R128.add(array.share, shift))


def _total(table, terms):
    # |sum v (...)| <= (sum v) * 4 * LARGEST.
    bound = table.bound * 4 * LARGEST << LOG_BITS
    frac_bits = table.frac_bits + LOG_BITS
    return SharedArray(R128, terms.sum_up(), 2, frac_bits, bound)


def mutual_information(
    session, table, value_label, count_label, receivers, by_count=False, masks=None
):
    r"""Mutual information of a shared contingency table; only the value is opened.

    .. math:: \frac{1}{D} \left( \sum_{r,t} v_{rt} (\ln v_{rt} - \ln v_{r\cdot}
              - \ln s_t) + T \ln V \right)

    with the table v, its sum T and row sums, the counts s of the static categories,
    the number V of samples, and the divisor D = V or T that DIPY uses. T and V are
    the same unless intensities lie outside the histogram's range.

    Rounds: 4. The value takes 2 more, which a receiver may put off: every party
    calls `open` of the result, but a receiver, which only receives, may send for what
    comes next before. The logarithms take 2 more as well, beside these.

    Parameters
    ----------
    session : Session
    table : SharedArray, shape (bins + 1, categories), degree 2
        as made by `Contingency.table`: the last row counts the samples.
    value_label, count_label : str
        declared labels under which the value and the pair (T, V) will be opened.
    receivers : sequence of int
    by_count : bool, optional
        divide by V instead of T.
    masks : Masks, at the helper only
        what `deal_table` returned; the owners wait for it here.

    Returns
    -------
    result : MutualInformation
    """
    terms = _terms(session, table, masks)
    totals, shift = terms.counts, terms.shift
    weights = truncate_unseen(
        session, terms.ratio, FINE_BITS - WEIGHT_BITS, field=R64, name="weights"
    )

    @functools.cache
    def log_ratio():
        array = weights()
        return array._with(array.share, bound=LARGEST << WEIGHT_BITS)

    def open_value():
        total = _total(table, terms)
        # An error of 2**-26 in the value, if all samples count.
        blur = table.bound << LOG_BITS >> VALUE_DIGITS
        count = table._with(totals)
        # V is a whole number. T differs from it by samples that are out of range; its
        # low bits would tell of many of them whether they are valid (doc/security.md).
        mass = dither(session, count[:1], table.bound >> VALUE_DIGITS)
        # V by itself has no fraction.
        noise_bits = (mass.noise_bits + table.frac_bits) / 2
        energy, count = session.open_all(
            [
                (dither(session, total, blur), value_label, receivers),
                (
                    count._with(
                        np.concatenate([mass.share, count.share[1:]]),
                        noise_bits=noise_bits,
                    ),
                    count_label,
                    receivers,
                ),
            ]
        )
        if energy is None:
            return None, None
        mass, samples = count
        divisor = samples if by_count else mass
        if divisor < 1 + table.bound / 2.0 ** (table.frac_bits + VALUE_DIGITS - 1):
            return 0.0, float(samples)
        # The counts s carry the table's fraction bits into their logarithms.
        log_samples = np.log(samples) + table.frac_bits * np.log(2.0)
        log_samples -= shift / 2.0**FINE_BITS
        return float((energy[0] + mass * log_samples) / divisor), float(samples)

    return MutualInformation(log_ratio, open_value)


class SecretInformation(NamedTuple):
    """What `secret_information` returns; nothing of it is opened.

    Attributes
    ----------
    ratio : SharedArray, shape (bins, categories), FINE_BITS fraction bits
        ``log(table / its sum over categories)``, in the ring of 128 bits; the helper's
        part is zero.
    counts : SharedArray, shape (bins, categories)
        the table's integers in the ring of 128 bits; the helper's part is zero.
    total : callable
        returns V times the mutual information, the owners' parts, shape (1,), in the
        ring of 128 bits. The static owner may have to wait for it.
    inverse : reciprocal.Reciprocal
        of the row sums, if asked for, and V, if samples may be left out, as integers;
        None without either.
    """

    ratio: SharedArray
    counts: SharedArray
    total: Callable
    inverse: reciprocals.Reciprocal


def secret_information(session, table, masks=None, *, masked=False, marginal=False):
    """Mutual information of a shared contingency table, left on shares.

    Rounds: 4, and 1 for `total`. As `mutual_information`, with V for D.

    Parameters
    ----------
    session, table, masks
        see `mutual_information`.
    masked, marginal
        see `_terms`.

    Returns
    -------
    result : SecretInformation
    """
    terms = _terms(session, table, masks, masked=masked, marginal=marginal)
    bins, categories = terms.ratio.shape
    chosen = _inverses(bins, categories, masked, marginal)
    inverse = None
    if chosen:
        opened = terms.opened and terms.opened.some(chosen)
        inverse = reciprocals.reciprocal(
            session, opened, terms.masks.inverse, len(chosen), table.field
        )

    return SecretInformation(
        terms.ratio,
        _counts(session, table, terms),
        lambda: _total(table, terms),
        inverse,
    )


def _counts(session, table, terms):
    """The cells of a table, from what the owners see of them and dealt masks; local."""
    bins, categories = terms.ratio.shape
    part = R128.zeros((bins * categories,))
    if session.pid != HELPER:
        masked = terms.opened.masked[: len(part)]
        part = R128.neg(_integer_mask(masked, terms.masks)[0])
        if session.pid == MOVING:
            part = R128.add(part, _as_integers(masked))
    share = part.reshape(bins, categories, 2)
    return SharedArray(R128, share, 2, table.frac_bits, table.bound + 1)


def _as_integers(words):
    """Words as elements of the ring of 128 bits."""
    words = words.astype(np.uint64)
    return np.stack([words, np.zeros_like(words)], axis=-1)


def _integer_mask(masked, masks):
    """Parts of the masks of masked counts as integers, and of `Masks.products`."""
    top = masked >> masked.dtype.type(8 * masked.dtype.itemsize - 1)
    at = masks.products[:, top.astype(np.intp), np.arange(len(top))]
    return np.ascontiguousarray(at)


def _weigh(session, opened, array, masks):
    r"""Sum masked counts, less one each, times shared numbers.

    With the count :math:`c - r` and a mask w, the owners open :math:`d = y + w` to
    each other, and :math:`(c - r) y = c y - d r + r w`. Rounds: 1.

    Returns
    -------
    sum_up : callable
        returns this party's part of the sum, shape (1, 2). What the other owner needs
        is on its way before.
    """
    if session.pid == HELPER:
        return lambda: R128.zeros((1,))
    y = drop(session, array, array.frac_bits - LOG_BITS, R128).share
    mine = R128.add(y, masks.weight)
    swapped = swap(session, "weighted", mine)

    def sum_up():
        theirs = R128.add(mine, swapped())
        masked = opened.masked[: len(mine)]
        mask, product = _integer_mask(masked, masks)
        ones = R128.encode_int(np.ones(len(masked)))
        total = R128.dot(R128.sub(_as_integers(masked), ones), y)
        total = R128.sub(total, R128.dot(theirs, mask))
        return R128.add(total, R128.dot(ones, product))

    return sum_up


def _broadcast(array, shape, axis):
    share = np.expand_dims(array.share, axis)
    full = np.broadcast_to(share, array.field.storage(shape))
    return array._with(np.ascontiguousarray(full))
