r"""Logarithms and mutual information of a shared table, on shares.

A shared count v is opened to the owners behind a mask, and scaled to
:math:`v 2^{63-k}` between 2**62 and 2**64 (see `normalize`). With that as
:math:`2^{62} x`, x between 1 and 4,

.. math:: \ln v = (k - 1) \ln 2 + \ln x.

x is opened in its turn as :math:`c' = x + m` modulo 4, m dealt. Let C and M be the
integer parts of c' and m, and f and g what follows; then :math:`x = h + f - g`
with :math:`h = C - M` modulo 4. For each of the 4 values that C may have, the helper
deals the coefficients of the polynomial in f - 1/2 that is close to
:math:`\ln(h + f - g)` where that is between 1 and 4: the one that C turns out to be
is a sum over known powers. Absolute error below 2e-11.

That is far more than a registration needs. But the error depends on the count and on
masks of which the owners know a part: whoever is opened a sum of logarithms, again and
again, learns of the counts what the error shows. So the error must be far below the
blur of what is opened; and where rounding cannot be that fine, in the weights, nobody
who sees a result may know how it was rounded (`protocols.truncate_unseen`).

================  ======  ======================================================
step              rounds  bytes per number, on all links
================  ======  ======================================================
`normalize`       3       1687 + 32 + 128 = 1847
`logarithm`       1       19 * 4 * 16 = 1216 dealt, 2 * 8 for c'
weighted sum      1       4 * 16 dealt, 2 * 16; for the cells of a table
weights           2       16 + 8; for the cells of a table
================  ======  ======================================================

3.2 kB in all, 1687 + 1216 + 64 of them dealt by the helper, which runs ahead, and 5
rounds to the sum, 6 to the weights. Everything received before an opening is uniform:
what is dealt is hidden by numbers that the moving owner draws too, what the owners send
each other by the sender's part of a mask (see `protocols.deal` and `protocols.pad`).
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc import normalize as normal
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import R64, R128
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

DEGREE = 18
#: Fraction bits of the polynomials' coefficients, and of the powers.
COEFFICIENT_BITS, POWER_BITS = 38, 40
#: Fraction bits of what `logarithm` returns, and of what weighs the counts.
FINE_BITS, LOG_BITS = COEFFICIENT_BITS + POWER_BITS, 44
_LN_2 = round(np.log(2.0) * 2.0**FINE_BITS)
#: No logarithm of a number below 2**64 is larger.
LARGEST = 45


def _polynomials():
    """Power-basis coefficients in l of ln(h + l), for h = 4, 1, 2 and 3.

    Close for all l in (-1, 1) where h + l lies between 1 and 4: the error is below
    5e-12 for h = 2 and below 1e-14 for the others.

    Returns
    -------
    coefficients : array of float, shape (DEGREE + 1, 4)
    """
    nodes = np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    columns = []
    for h in (4, 1, 2, 3):
        low, high = max(h - 1, 1), min(h + 1, 4)
        x = (low + high) / 2 + (high - low) / 2 * nodes
        fit = np.polynomial.Chebyshev.fit(
            x - h, np.log(x), DEGREE, domain=[low - h, high - h]
        )
        columns.append(fit.convert(kind=np.polynomial.Polynomial).coef)
    return np.stack(columns, axis=1)


POLYNOMIALS = _polynomials()


class Masks(NamedTuple):
    """What is dealt for n numbers, size of which are weighed by their logarithms.

    Attributes
    ----------
    normal : normalize.Masks
    fraction : array of uint64, shape (n,)
        the mask m of x, in the ring of 64 bits; 62 fraction bits.
    coefficients : array of uint64, shape (DEGREE + 1, 4, n, 2)
        of the powers of f - 1/2, for every C, in the ring of 128 bits.
    weight : array of uint64, shape (size, 2)
        masks of what is weighed.
    products : array of uint64, shape (2, 2, size, 2)
        the mask of the count as an integer, and that times the mask of what is
        weighed; each for a masked count without and with its highest bit.
    """

    normal: normal.Masks
    fraction: np.ndarray
    coefficients: np.ndarray
    weight: np.ndarray
    products: np.ndarray


def deal_masks(session, n, size):
    """Deal what the logarithms of n numbers need and a weighted sum of `size`.

    Rounds: 1. Bytes: 1687 + 1216 per number and 64 for each of the sum. It depends on
    nothing secret: the helper runs ahead.

    Returns
    -------
    masks : Masks
    """
    first = normal.deal_masks(session, n)
    fraction = pad(session, "fraction", (n,))
    weight = pad(session, "weight", (size, 2), plus=R128.add)
    coefficients = products = None
    if session.pid == HELPER:
        coefficients = _masked_polynomials(fraction)
        products = _masked_products(first.number[:size], weight)
    shape = (DEGREE + 1, 4, n, 2)
    coefficients = deal(session, "coefficients", coefficients, shape, minus=R128.sub)
    products = deal(session, "products", products, (2, 2, size, 2), minus=R128.sub)
    return Masks(first, fraction, coefficients, weight, products)


def _masked_polynomials(mask):
    """Coefficients of the powers of f - 1/2, for every C and these masks of x."""
    whole = (mask >> np.uint64(62)).astype(np.intp)
    rest = (mask & np.uint64((1 << 62) - 1)) / 2.0**62 - 0.5
    q = np.stack([POLYNOMIALS[:, (c - whole) % 4] for c in range(4)], axis=1)
    # The polynomials in l = (f - 1/2) - rest as polynomials in f - 1/2.
    for i in range(DEGREE):
        for k in range(DEGREE - 1, i - 1, -1):
            q[k] -= rest * q[k + 1]
    return R128.encode_int(np.rint(q * 2.0**COEFFICIENT_BITS))


def _masked_products(mask, weight):
    """Mask of a count as an integer, and its product with the mask of a weight.

    The count is ``masked - mask`` in the ring of 64 bits, and below 2**63. Without
    its highest bit `masked` has wrapped around 2**64 just where the mask has it.
    """
    wrapped = np.stack([-(mask >> np.uint64(63)), np.zeros_like(mask)])
    integer = np.stack([np.broadcast_to(mask, wrapped.shape), wrapped], axis=-1)
    weights = np.ascontiguousarray(np.broadcast_to(weight, integer.shape))
    return np.stack([integer, R128.mul(integer, weights)])


def logarithm(session, masked, masks):
    """Natural logarithms of masked positive integers.

    Rounds: 3. Bytes: 128 + 16 per number.

    Parameters
    ----------
    session : Session
    masked : array of uint64, shape (n,)
        what `normalize.open_masked` opened.
    masks : Masks

    Returns
    -------
    logarithms : SharedArray, field R128, FINE_BITS fraction bits
        the helper's part is zero.
    """
    exponent, scaled = normal.normalize(session, masked, masks.normal)
    if session.pid == MOVING:
        exponent = R128.sub(exponent, R128.encode_int(np.ones(len(masked))))
    total = R128.scale(exponent, _LN_2)
    if session.pid != HELPER:
        opened = scaled + masks.fraction
        opened += swap(session, "fraction", opened)()
        whole = opened >> np.uint64(62)
        coefficients = _looked_up(masks.coefficients, whole)
        for part, power in zip(coefficients, _powers(opened), strict=True):
            R128.addmul(total, part, R128.encode_int(power))
    return SharedArray(R128, total, 2, FINE_BITS, LARGEST << FINE_BITS)


def _looked_up(tables, index):
    """What n tables of ring elements, shape (k, entries, n, 2), have at n places."""
    at = tables[:, index.astype(np.intp), np.arange(len(index))]
    return np.ascontiguousarray(at)


def _powers(opened):
    """Powers of f - 1/2, POWER_BITS fraction bits; the same at both owners.

    Products of floating-point numbers are the same everywhere (IEEE 754).
    """
    fraction = (opened >> np.uint64(10) & np.uint64((1 << 52) - 1)) / 2.0**52 - 0.5
    powers = [np.ones_like(fraction)]
    for _ in range(DEGREE):
        powers.append(powers[-1] * fraction)
    return [np.rint(power * 2.0**POWER_BITS) for power in powers]


def _drop(session, array, bits, target):
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


def deal_table(session, bins, categories):
    """`deal_masks` for `mutual_information` of a table of that shape."""
    size = bins * categories
    return deal_masks(session, size + bins + categories, size)


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
    bins, categories = table.shape[0] - 1, table.shape[1]
    counted = table.share[-1]
    # Sums are local. One unit in the last place is added to every number, so that
    # none is zero.
    row_sums = table.share[:-1].sum(axis=1)
    totals = np.array([row_sums.sum(), counted.sum()])
    size = bins * categories
    every = np.concatenate([table.share[:-1].reshape(-1), row_sums, counted])
    if session.pid == MOVING:
        every += np.uint64(1)
    numbers = table._with(every, bound=table.bound + 1)
    receive_masked = normal.open_masked(session, numbers)
    if session.pid != HELPER:
        masks = deal_table(session, bins, categories)
    masked = receive_masked()
    logs = logarithm(session, masked, masks)
    cells = logs[:size].reshape(bins, categories)
    rows, columns = logs[size : size + bins], logs[size + bins :]
    ratio = cells - _broadcast(rows, (bins, categories), axis=1)
    inner = ratio - _broadcast(columns, (bins, categories), axis=0)
    # Near zero where T and V are as large as they can be, so that noise in T is
    # harmless.
    shift = round(np.log(table.bound) * 2**LOG_BITS) << FINE_BITS - LOG_BITS
    if session.pid == MOVING:
        inner = inner._with(R128.add(inner.share, constant(R128, shift, inner.share)))
    sum_up = _weigh(session, masked[:size], inner.reshape(size), masks)
    weights = truncate_unseen(
        session, ratio, FINE_BITS - WEIGHT_BITS, field=R64, name="weights"
    )

    @functools.cache
    def log_ratio():
        array = weights()
        return array._with(array.share, bound=LARGEST << WEIGHT_BITS)

    def open_value():
        # |sum v (...)| <= (sum v) * 3 * LARGEST.
        bound = table.bound * 3 * LARGEST << LOG_BITS
        total = SharedArray(R128, sum_up(), 2, table.frac_bits + LOG_BITS, bound)
        # An error of 2**-26 in the value, if all samples count.
        blur = table.bound << LOG_BITS >> VALUE_DIGITS
        count = table._with(totals)
        # V is a whole number. T differs from it by samples that are out of range; its
        # low bits would tell of many of them whether they are valid (doc/security.md).
        mass = dither(session, count[:1], table.bound >> VALUE_DIGITS)
        energy, count = session.open_all(
            [
                (dither(session, total, blur), value_label, receivers),
                (
                    count._with(np.concatenate([mass.share, count.share[1:]])),
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


def _weigh(session, masked, array, masks):
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
    y = _drop(session, array, array.frac_bits - LOG_BITS, R128).share
    mine = R128.add(y, masks.weight)
    swapped = swap(session, "weighted", mine)

    def sum_up():
        opened = R128.add(mine, swapped())
        mask, product = _looked_up(masks.products, masked >> np.uint64(63))
        zero, ones = np.zeros_like(masked), R128.encode_int(np.ones(len(masked)))
        count = R128.sub(np.stack([masked, zero], axis=-1), ones)
        total = R128.sub(R128.dot(count, y), R128.dot(opened, mask))
        return R128.add(total, R128.dot(ones, product))

    return sum_up


def _broadcast(array, shape, axis):
    share = np.expand_dims(array.share, axis)
    full = np.broadcast_to(share, array.field.storage(shape))
    return array._with(np.ascontiguousarray(full))
