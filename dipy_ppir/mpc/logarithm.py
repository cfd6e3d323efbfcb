r"""Logarithms and mutual information of a shared table, on shares.

A shared count v is first written as bits that the two owners share
(`boolean.add_words`), its highest one is shifted to a fixed place
(`boolean.normalize`), and position e and mantissa 1 + u return to arithmetic
shares in the 127-bit field, where

.. math:: \ln v = e \ln 2 + \ln(1 + u), \qquad 0 \le u < 1,

with a polynomial of degree 8 for :math:`\ln(1 + u)` in powers of u (around
u = 0; expanded elsewhere the coefficients would amplify rounding). Absolute
error below 2e-7 plus 2**-22.

Cost per number: 19 ANDs deep and 24 words of AND (960 bytes), 31 bits brought
to arithmetic shares (992 bytes), 7 truncations of powers, some 2.5 kB in all and
31 rounds. Everything received before an opening is uniform (see `protocols` and
`boolean`).
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.boolean import add_words, normalize
from dipy_ppir.mpc.fields import P127, R64
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.protocols import (
    between_owners,
    dither,
    reduce,
    share_elements,
    truncate,
    truncate_between_owners,
)

#: Bits of the mantissa that are used, and fraction bits of its powers.
MANTISSA_BITS, POWER_BITS = 24, 30
#: Fraction bits of the polynomial's coefficients and of the result.
COEFFICIENT_BITS, LOG_BITS = 24, 24
DEGREE = 8


def _coefficients():
    """Power-basis coefficients of ln(1 + u) on [0, 1], constant term 0.

    Least squares at Chebyshev points of ln(1 + u) / u, which keeps the value at
    u = 0 exact; the error is below 2e-7 everywhere.
    """
    nodes = 0.5 + 0.5 * np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    powers = nodes[:, None] ** np.arange(DEGREE)
    solution, *_ = np.linalg.lstsq(powers, np.log1p(nodes) / nodes, rcond=None)
    return np.rint(solution * 2.0**COEFFICIENT_BITS).astype(np.int64)


COEFFICIENTS = _coefficients()


class Bits(NamedTuple):
    """A shared number taken apart.

    Attributes
    ----------
    integer : SharedArray
        the number itself in the 127-bit field.
    exponent : SharedArray
        position of its highest one.
    mantissa : SharedArray
        what follows the highest one, MANTISSA_BITS fraction bits, in [0, 1).
    """

    integer: SharedArray
    exponent: SharedArray
    mantissa: SharedArray


def take_apart(session, array):
    """Bits of positive shared integers of the ring.

    Rounds: 23. Exact, for every value in (0, 2**64).

    Parameters
    ----------
    session : Session
    array : SharedArray, shape (n,), field R64
        positive integers.

    Returns
    -------
    bits : Bits
    """
    part = between_owners(session, array, "bits")
    total, wrapped = add_words(session, part, part)
    shifted, exponent = normalize(total)
    mantissa = [shifted.bit(62 - i) for i in range(MANTISSA_BITS)]
    words = [*mantissa, *exponent, wrapped]
    bits = np.stack([w.bits for w in words]).astype(np.int64)
    weights = np.zeros((3, len(words)), dtype=np.int64)
    weights[0, :MANTISSA_BITS] = 1 << np.arange(MANTISSA_BITS)[::-1]
    weights[1, MANTISSA_BITS:-1] = 1 << np.arange(6)
    weights[2, -1] = 1
    sums = _to_arithmetic(session, bits, weights)
    # As integers, first + second - 2**64 * wrapped is the number itself.
    lifted = _lift(session, part, array.shape)
    integer = lifted - sums[2].times(R64.modulus)
    return Bits(
        integer._with(integer.share, frac_bits=array.frac_bits, bound=array.bound),
        sums[1]._with(sums[1].share, bound=63),
        sums[0]._with(sums[0].share, frac_bits=MANTISSA_BITS, bound=1 << MANTISSA_BITS),
    )


def _to_arithmetic(session, bits, weights):
    """Weighted sums of XOR-shared bits as arithmetic shares.

    Each owner shares its halves; ``a xor b = a + b - 2 a b``. Rounds: 2.
    Elements: 2 per bit and 3 per sum, of 16 bytes.

    Parameters
    ----------
    bits : array of int64, shape (k, n)
        this owner's halves, 0 or 1.
    weights : array of int64, shape (s, k)
        public weights.
    """
    field, shape = P127, bits.shape
    halves = []
    mine = field.encode_int(bits)
    order = (session.pid, STATIC + MOVING - session.pid)
    owners = order if session.pid in (MOVING, STATIC) else (MOVING, STATIC)
    for owner in owners:
        x = mine if owner == session.pid else None
        share = share_elements(session, owner, x, shape, field, f"halves-{owner}")
        halves.append(SharedArray(field, share, 1, 0, 1))
    a, b = halves
    either = a + b - (a * b).times(2)
    return reduce(session, either.combine(weights), "bits-sums")


def _lift(session, part, shape):
    """Sum of one integer of each owner, in the 127-bit field. Rounds: 1."""
    total = None
    for owner in (MOVING, STATIC) if session.pid != STATIC else (STATIC, MOVING):
        x = None
        if owner == session.pid:
            x = np.stack([part, np.zeros_like(part)], axis=-1)
        share = share_elements(session, owner, x, shape, P127, f"lift-{owner}")
        total = share if total is None else P127.add(total, share)
    return SharedArray(P127, total, 1, 0, 2 * R64.modulus)


def logarithm(session, bits):
    """Natural logarithms of the integers that were taken apart.

    Rounds: 8. Elements: 24 per number, of 16 bytes.

    Returns
    -------
    logarithms : SharedArray, field P127, LOG_BITS fraction bits
    """
    up = POWER_BITS - MANTISSA_BITS
    u = bits.mantissa.times(1 << up)
    u = u._with(u.share, frac_bits=POWER_BITS)
    powers = {1: u}
    for known in ((1,), (1, 2), (1, 2, 3, 4)):
        top = known[-1]
        products = [powers[top] * powers[k] for k in known]
        dropped = truncate(session, _stack(products), POWER_BITS, name=f"power-{top}")
        for i, k in enumerate(known):
            powers[top + k] = dropped[i]
    scale = POWER_BITS + COEFFICIENT_BITS
    total = bits.exponent.times(int(np.rint(np.log(2.0) * 2.0**scale)))
    total = total._with(total.share, frac_bits=scale)
    for k, coefficient in enumerate(COEFFICIENTS, start=1):
        term = powers[k].times(int(coefficient))
        total = total + term._with(term.share, frac_bits=scale)
    # ln v < 64 ln 2: a tighter bound than the sum of the terms' magnitudes.
    total = total._with(total.share, bound=45 << scale)
    return truncate(session, total, scale - LOG_BITS, name="log")


def _stack(arrays):
    share = np.stack([a.share for a in arrays])
    return arrays[0]._with(share, bound=max(a.bound for a in arrays))


class MutualInformation(NamedTuple):
    """What `mutual_information` returns.

    Attributes
    ----------
    value : float or None
        mutual information in nats, at the receivers.
    count : float or None
        number of samples that count, at the receivers.
    log_ratio : SharedArray, shape (bins, categories)
        ``log(table / its sum over categories)``, WEIGHT_BITS fraction bits, in
        the ring; the helper's part is zero.
    """

    value: float
    count: float
    log_ratio: SharedArray


#: Bits of the value, in nats, that are worth opening.
VALUE_DIGITS = 30
#: Fraction bits of the logarithms that weigh the gradient.
WEIGHT_BITS = 14


def mutual_information(
    session, table, value_label, count_label, receivers, by_count=False
):
    r"""Mutual information of a shared contingency table; opens the value only.

    .. math:: \frac{1}{D} \left( \sum_{r,t} v_{rt} (\ln v_{rt} - \ln v_{r\cdot}
              - \ln s_t) + T \ln V \right)

    with the table v, its sum T and row sums, the counts s of the static categories,
    the number V of samples, and the divisor D = V or T that DIPY uses. T and V are
    the same unless intensities lie outside the histogram's range.

    Parameters
    ----------
    session : Session
    table : SharedArray, shape (bins + 1, categories), degree 2
        as made by `Contingency.table`: the last row counts the samples.
    value_label, count_label : str
        declared labels under which the value and the pair (T, V) are opened.
    receivers : sequence of int
    by_count : bool, optional
        divide by V instead of T.

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
    count = session.open(table._with(totals), count_label, receivers)
    bits = take_apart(session, numbers)
    logs = logarithm(session, bits)
    cells = logs[:size].reshape(bins, categories)
    rows, columns = logs[size : size + bins], logs[size + bins :]
    ratio = cells - _broadcast(rows, (bins, categories), axis=1)
    inner = ratio - _broadcast(columns, (bins, categories), axis=0)
    # The counts themselves, without the added unit.
    weights = bits.integer[:size].add_public(-1).reshape(bins, categories)
    products = weights * inner
    total = P127.matmul(
        products.share.reshape(1, size, 2).copy(),
        P127.encode_int(np.ones((size, 1), dtype=np.int64)),
    )[0]
    # |sum v (...)| <= (sum v) * 3 * 45.
    total = SharedArray(
        P127, total, 2, products.frac_bits, table.bound * 135 << LOG_BITS
    )
    # Blurred by 2**-30 at most, an error of 1e-9 in the value.
    blur = table.bound << LOG_BITS >> VALUE_DIGITS
    energy = session.open(dither(session, total, blur), value_label, receivers)
    bound = 45 << LOG_BITS
    log_ratio = truncate_between_owners(
        session,
        ratio._with(ratio.share, bound=bound),
        LOG_BITS - WEIGHT_BITS,
        field=R64,
        name="weights",
    )
    log_ratio = SharedArray(R64, log_ratio, 2, WEIGHT_BITS, 45 << WEIGHT_BITS)
    if energy is None:
        return MutualInformation(None, None, log_ratio)
    mass, samples = count
    divisor = samples if by_count else mass
    if divisor <= 0:
        return MutualInformation(0.0, float(samples), log_ratio)
    # The counts s carry the table's fraction bits into their logarithms.
    log_samples = np.log(samples) + table.frac_bits * np.log(2.0)
    value = (energy[0] + mass * log_samples) / divisor
    return MutualInformation(float(value), float(samples), log_ratio)


def _broadcast(array, shape, axis):
    share = np.expand_dims(array.share, axis)
    full = np.broadcast_to(share, array.field.storage(shape))
    return array._with(np.ascontiguousarray(full))
