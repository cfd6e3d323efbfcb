"""Pseudorandom field elements known to exactly two parties.

Every pair of parties shares a 32-byte seed, agreed when they connect. From it
each *purpose* (a label such as ``b"input-0"``) gets a key of its own by HKDF,
and one AES-256-CTR key stream that is only ever read forward. Both ends read
the same number of elements for the same purpose in the same order, so they
hold the same elements, and no part of a stream is used twice.
"""

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
import numpy as np

_ZEROS = memoryview(bytes(1 << 18))


def derive_key(seed, info):
    """Derive a 32-byte key for one purpose (HKDF-SHA256, RFC 5869).

    Parameters
    ----------
    seed : bytes
        uniformly random input key, 32 bytes.
    info : bytes
        what the key is for.

    Returns
    -------
    key : bytes, 32 bytes
    """
    return HKDF(
        algorithm=hashes.SHA256(), length=32, salt=b"dipy_ppir/prg", info=info
    ).derive(seed)


class Stream:
    """One key stream, read forward only.

    Parameters
    ----------
    key : bytes
        AES key, of 32 bytes or 16, used for nothing else.
    """

    def __init__(self, key):
        cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16)))
        self._encryptor = cipher.encryptor()

    def fill(self, buffer):
        """Overwrite a contiguous array with the next bytes of the stream."""
        view = memoryview(buffer).cast("B")
        for start in range(0, len(view), len(_ZEROS)):
            part = view[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(part)], part)

    def words(self, shape):
        """Next uniformly random 64-bit words as an array of `shape`."""
        out = np.empty(shape, dtype=np.uint64)
        self.fill(out)
        return out

    def elements(self, field, shape, out=None):
        """Next uniformly random elements of `field`.

        The low bits of the stream are masked to the size of the Mersenne prime
        p; the one masked value outside [0, p), p itself, is rejected and drawn
        again, so that the elements are exactly uniform.

        Parameters
        ----------
        field : Field
            the field to draw from.
        shape : tuple of int
            shape of the array of elements.
        out : array, shape field.storage(shape), optional
            where to put them.

        Returns
        -------
        elements : array of uint64, shape field.storage(shape)
        """
        if out is None:
            out = field.empty(shape)
        self.fill(out)
        rejected = field.reduce_random(out)
        while rejected:
            spare = field.empty((rejected,))
            self.fill(spare)
            rejected -= field.replace_rejected(out, spare)
        return out


class Pairwise:
    """The streams that this party shares with each other party.

    A key is derived from a whole name. Those of streams are words joined by hyphens;
    those of keys begin with "key" and a space.

    Parameters
    ----------
    seeds : dict
        maps the other party's number to the 32-byte seed shared with it.
    """

    def __init__(self, seeds):
        self._seeds = dict(seeds)
        self._streams = {}
        self._keys = {}

    def key(self, peer, purpose):
        """A fresh key shared with `peer`; different at every call."""
        count = self._keys[peer, purpose] = self._keys.get((peer, purpose), 0) + 1
        return derive_key(self._seeds[peer], b"key %d " % count + purpose)

    def stream(self, peer, purpose):
        """The stream shared with `peer` for `purpose` (bytes)."""
        key = (peer, purpose)
        if key not in self._streams:
            self._streams[key] = Stream(derive_key(self._seeds[peer], purpose))
        return self._streams[key]
