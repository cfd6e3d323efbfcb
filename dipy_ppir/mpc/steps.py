r"""Step functions of a masked number, on shares: what needs comparisons, in one round.

The owners know :math:`C = v + r` modulo 2**n, the helper the mask r, and they want
parts of :math:`\sum_j \beta_j [v \ge \theta_j]`, :math:`|v| < 2^{n-2}`. With
:math:`a_j = r + \theta_j`, v is at least :math:`\theta_j` just where the highest bit of
:math:`C - a_j` is 0, and that bit is the highest of C, the highest of :math:`a_j`, and
whether the rest of C is less than the rest of :math:`a_j`, added up modulo 2.

Whether a number that both owners know is less than one that only the helper knows is a
distributed comparison function (Boyle, Chandran, Gilboa, Gupta, Ishai, Kumar and Rathee
2021, figure 1): the helper deals each owner a key, and either evaluates its own, which
is a walk down a binary tree of pseudorandom numbers. The keys of one owner are
indistinguishable from random, whatever the number and the value; the generator is AES
with fixed keys, s to AES(s) + s, as is usual (correlation robustness is assumed of it).

=========  ======  ==================================================================
step       rounds  bytes per number, on all links
=========  ======  ==================================================================
`deal`     1       2 * ((n - 1) * (16 + 16 + 1) + 16) + 16 per step of the function
`look_up`  0       0
=========  ======  ==================================================================
"""

import threading
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
import numpy as np

from dipy_ppir.mpc import protocols
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC

#: Bits of a masked number, at most and where not all are needed.
MOST_BITS, BITS = 128, 104
_OTHERS = ~np.uint64(1)
#: Contexts of a cipher serve one thread at a time.
_here = threading.local()


def _ciphers():
    """AES with four fixed keys: left and right, seeds and values."""
    if not hasattr(_here, "ciphers"):
        keys = [bytes([k + 1]) * 16 for k in range(4)]
        _here.ciphers = [
            Cipher(algorithms.AES(k), modes.ECB()).encryptor() for k in keys
        ]
    return _here.ciphers


def _expand(seeds):
    """What a seed becomes: seeds, bits and values, left and right.

    Parameters
    ----------
    seeds : array of uint64, shape (..., 2)

    Returns
    -------
    seeds : array of uint64, shape (2, ..., 2)
    bits : array of bool, shape (2, ...)
    values : array of uint64, shape (2, ..., 2)
    """
    plain = np.ascontiguousarray(seeds)
    out = np.empty((4, *plain.shape), dtype=np.uint64)
    for cipher, made in zip(_ciphers(), out, strict=True):
        made[...] = np.frombuffer(
            cipher.update(plain.tobytes()), dtype=np.uint64
        ).reshape(plain.shape)
    out ^= plain
    seeds = out[:2]
    bits = (seeds[..., 0] & np.uint64(1)).astype(bool)
    seeds[..., 0] &= _OTHERS
    return seeds, bits, out[2:]


class Keys(NamedTuple):
    """An owner's keys of n comparisons.

    Attributes
    ----------
    seed : array of uint64, shape (n, 2)
    seeds, values : array of uint64, shape (levels, n, 2)
        corrections of each level of the tree: of each bit of a number but the highest.
    bits : array of uint8, shape (levels, n)
        corrections of the left bit, and twice those of the right one.
    last : array of uint64, shape (n, 2)
    """

    seed: np.ndarray
    seeds: np.ndarray
    values: np.ndarray
    bits: np.ndarray
    last: np.ndarray


def _bit(numbers, place):
    """A bit of numbers of two words, low word first; 0 or 1."""
    word, shift = divmod(place, 64)
    return (numbers[..., word] >> np.uint64(shift) & np.uint64(1)).astype(np.intp)


def _signed(x, minus):
    """Elements, or where `minus` what is their negative."""
    return np.where(minus[..., None], R128.neg(x), x)


def make_keys(numbers, values, seeds, bits=BITS):
    """Keys of both owners that say of public x: values where x < numbers, else 0.

    Parameters
    ----------
    numbers : array of uint64, shape (n, 2)
        their highest bit does not count.
    values : array of uint64, shape (n, 2)
    seeds : array of uint64, shape (2, n, 2)
        random.
    bits : int, optional
        of the numbers.

    Returns
    -------
    keys : list of Keys
    """
    n, levels = len(numbers), bits - 1
    seeds = seeds.copy()
    seeds[..., 0] &= _OTHERS
    first = seeds.copy()
    on = np.stack([np.zeros(n, bool), np.ones(n, bool)])
    total = R128.zeros((n,))
    rows = np.arange(n)
    out_seeds = np.empty((levels, n, 2), dtype=np.uint64)
    out_values = np.empty_like(out_seeds)
    out_bits = np.empty((levels, n), dtype=np.uint8)
    for level in range(levels):
        keep = _bit(numbers, levels - 1 - level)
        s, t, v = _expand(seeds)  # (side, owner, n, ...)
        lose = 1 - keep
        correction = s[lose, 0, rows] ^ s[lose, 1, rows]
        value = R128.sub(R128.sub(v[lose, 1, rows], v[lose, 0, rows]), total)
        value = R128.add(value, np.where((lose == 0)[:, None], values, np.uint64(0)))
        value = _signed(value, on[1])
        total = R128.add(R128.sub(total, v[keep, 1, rows]), v[keep, 0, rows])
        total = R128.add(total, _signed(value, on[1]))
        flips = t[:, 0] ^ t[:, 1]
        flips[0] ^= keep == 0
        flips[1] ^= keep == 1
        out_seeds[level], out_values[level] = correction, value
        out_bits[level] = flips[0] | flips[1].astype(np.uint8) << 1
        for owner in range(2):
            mine = on[owner]
            seeds[owner] = s[keep, owner, rows]
            seeds[owner] ^= np.where(mine[:, None], correction, np.uint64(0))
            on[owner] = t[keep, owner, rows] ^ (mine & flips[keep, rows])
    last = R128.sub(R128.sub(seeds[1], seeds[0]), total)
    last = _signed(last, on[1])
    return [Keys(s, out_seeds, out_values, out_bits, last) for s in first]


def less(owner, keys, x):
    """One owner's part of the values where x is less than the numbers.

    Parameters
    ----------
    owner : {0, 1}
    keys : Keys
    x : array of uint64, shape (n, 2)
        their highest bit does not count.
    """
    n, levels = len(x), len(keys.bits)
    seeds = keys.seed
    bits = np.full(n, owner == 1)
    total = R128.zeros((n,))
    rows = np.arange(n)
    for level in range(levels):
        side = _bit(x, levels - 1 - level)
        s, t, v = _expand(seeds)
        total = R128.add(total, v[side, rows])
        total = R128.add(
            total, np.where(bits[:, None], keys.values[level], np.uint64(0))
        )
        flip = (keys.bits[level] >> side.astype(np.uint8) & np.uint8(1)).astype(bool)
        seeds = s[side, rows] ^ np.where(bits[:, None], keys.seeds[level], np.uint64(0))
        bits = t[side, rows] ^ (bits & flip)
    total = R128.add(total, seeds)
    total = R128.add(total, np.where(bits[:, None], keys.last, np.uint64(0)))
    return R128.neg(total) if owner == 1 else total


class Dealt(NamedTuple):
    """What an owner needs to look up a step function of n numbers."""

    keys: Keys
    base: np.ndarray


def elements(n, steps, bits=BITS):
    """Elements of 16 bytes that an owner is sent for a step function of n numbers."""
    return n * steps * ((bits - 1) * 33 + 32) // 16 + 1


def deal(session, mask, thresholds, jumps, bits=BITS):
    """Deal a step function of n masked numbers.

    Rounds: 1. It depends on nothing secret but the masks.

    Parameters
    ----------
    session : Session
    mask : array of uint64, shape (n, 2)
        the masks, at the helper.
    thresholds : array of uint64, shape (steps, 2)
    jumps : array of uint64, shape (steps, 2)
        by how much the function grows at each.
    bits : int, optional
        of the masked numbers.

    Returns
    -------
    dealt : Dealt or None
        at an owner.
    """
    n, steps = len(mask), len(thresholds)
    count = n * steps
    base = keys = None
    if session.pid == HELPER:
        a = R128.add(np.repeat(mask, steps, axis=0), np.tile(thresholds, (n, 1)))
        jumps = np.tile(jumps, (n, 1))
        # What it is where C has no highest bit, and nothing is borrowed.
        above = _bit(a, bits - 1) == 0
        base = np.where(above[:, None], jumps, np.uint64(0))
        values = _signed(jumps, above)
        seeds = np.stack(
            [
                session.stream(p, b"comparison").words((count, 2))
                for p in (MOVING, STATIC)
            ]
        )
        keys = make_keys(a, values, seeds, bits)
        for owner in (MOVING, STATIC):
            for part in keys[owner][1:]:
                session.network.send(owner, "comparison", np.ascontiguousarray(part))
    else:
        seed = session.stream(HELPER, b"comparison").words((count, 2))
        seed[..., 0] &= _OTHERS
        levels = bits - 1
        shapes = [(levels, count, 2), (levels, count, 2), (levels, count), (count, 2)]
        types = [np.uint64, np.uint64, np.uint8, np.uint64]
        parts = []
        for shape, dtype in zip(shapes, types, strict=True):
            part = np.empty(shape, dtype=dtype)
            session.network.receive(HELPER, "comparison", part)
            parts.append(part)
        keys = Keys(seed, *parts)
    base = protocols.deal(session, "base", base, (count, 2), minus=R128.sub)
    return None if session.pid == HELPER else Dealt(keys, base)


def look_up(session, masked, dealt, jumps):
    """This owner's part of the step function of masked numbers; see `deal`.

    Returns
    -------
    part : array of uint64, shape (n, 2)
    """
    n, steps = len(masked), len(jumps)
    x = np.repeat(masked, steps, axis=0)
    part = R128.add(dealt.base, less(session.pid, dealt.keys, x))
    # With C's highest bit it is the other way round.
    flipped = R128.neg(part)
    if session.pid == MOVING:
        flipped = R128.add(flipped, np.tile(jumps, (n, 1)))
    high = _bit(x, len(dealt.keys.bits))[:, None] != 0
    part = np.where(high, flipped, part).reshape(n, steps, 2)
    total = R128.zeros((n,))
    for k in range(steps):
        total = R128.add(total, np.ascontiguousarray(part[:, k]))
    return total
