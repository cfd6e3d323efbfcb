"""Numbers by their bits: row i of a slice is bit i of all numbers.

The bits of n numbers are an array of bytes of shape ``(bits, ceil(n / 8))``, lowest
bits first; number j has bit ``j % 8`` of byte ``j // 8`` of each row. One operation on
whole arrays is then one gate on all numbers. What stands behind the last number of a
row means nothing.

Blocks of 8 x 8 bits are transposed in words of 64 bits by three exchanges (Warren 2012,
*Hacker's Delight*, section 7-3).
"""

import numpy as np

#: Bytes of rows that are transposed at a time, so that they stay in the cache.
_BLOCK = 1 << 17
_EXCHANGES = tuple(
    (np.uint64(shift), np.uint64(mask))
    for shift, mask in (
        (7, 0x00AA00AA00AA00AA),
        (14, 0x0000CCCC0000CCCC),
        (28, 0x00000000F0F0F0F0),
    )
)


def width(n):
    """Bytes of a row of bits of n numbers."""
    return -(-n // 8)


def _exchanged(blocks):
    """Transpose blocks of 8 x 8 bits, in place; one is a word of 64 bits."""
    moved = np.empty_like(blocks)
    back = np.empty_like(blocks)
    for shift, mask in _EXCHANGES:
        np.right_shift(blocks, shift, out=moved)
        moved ^= blocks
        moved &= mask
        np.left_shift(moved, shift, out=back)
        blocks ^= moved
        blocks ^= back


def sliced(rows):
    """Bits of numbers of whole bytes.

    Parameters
    ----------
    rows : array of uint8, shape (n, size)
        lowest byte first.

    Returns
    -------
    bits : array of uint8, shape (8 * size, ceil(n / 8))
    """
    n, size = rows.shape
    out = np.empty((8 * size, width(n)), dtype=np.uint8)
    step = max(_BLOCK // (8 * size), 1) * 8
    for start in range(0, n, step):
        part = rows[start : start + step]
        count = width(len(part))
        blocks = np.zeros((count, size, 8), dtype=np.uint8)
        whole = len(part) // 8
        eights = part[: 8 * whole].reshape(whole, 8, size)
        blocks[:whole] = eights.transpose(0, 2, 1)
        if whole < count:
            rest = part[8 * whole :]
            blocks[whole, :, : len(rest)] = rest.T
        _exchanged(blocks.view(np.uint64))
        at = start // 8
        target = out.reshape(size, 8, -1)[:, :, at : at + count]
        target[...] = blocks.transpose(1, 2, 0)
    return out


def gathered(bits, n):
    """Numbers of whole bytes, of their bits.

    Parameters
    ----------
    bits : array of uint8, shape (8 * size, ceil(n / 8))
    n : int

    Returns
    -------
    rows : array of uint8, shape (n, size)
    """
    size, columns = len(bits) // 8, bits.shape[1]
    out = np.empty((columns, 8, size), dtype=np.uint8)
    step = max(_BLOCK // (8 * size), 1)
    eights = bits.reshape(size, 8, columns)
    for start in range(0, columns, step):
        part = eights[:, :, start : start + step]
        blocks = np.ascontiguousarray(part.transpose(2, 0, 1))
        _exchanged(blocks.view(np.uint64))
        out[start : start + step] = blocks.transpose(0, 2, 1)
    return out.reshape(-1, size)[:n]


def words_sliced(words, ring, bits):
    """The lowest bits of elements of a ring.

    Parameters
    ----------
    words : array, shape ``ring.storage((n,))``
    ring : Ring
    bits : int

    Returns
    -------
    bits : array of uint8, shape (bits, ceil(n / 8))
    """
    flat = np.ascontiguousarray(ring.flat(words))
    rows = flat.view(np.uint8).reshape(len(flat), ring.nbytes)
    return sliced(rows[:, : width(bits)])[:bits]


def spread(bits, n):
    """Bits one by one: array of bool, shape (..., n)."""
    return np.unpackbits(bits, axis=-1, count=n, bitorder="little").view(bool)


def packed(flags):
    """The reverse of `spread`: an array of bool, shape (..., n), eight to a byte."""
    return np.packbits(flags, axis=-1, bitorder="little")
