"""Key derivation and key streams against published vectors and a plain twin."""

import hashlib
import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
import numpy as np
import pytest

from dipy_ppir.mpc.fields import P61, P127
from dipy_ppir.mpc.prg import Pairwise, Stream, derive_key

BOTH = pytest.mark.parametrize("field", [P61, P127], ids=repr)
KEY = bytes(range(32))


def hkdf(key, salt, info, length):
    """HKDF-SHA256 as RFC 5869 writes it down."""
    prk = hmac.new(salt, key, hashlib.sha256).digest()
    out = block = b""
    while len(out) < length:
        block = hmac.new(prk, block + info + bytes([len(out) // 32 + 1]), hashlib.sha256).digest()
        out += block
    return out[:length]


def key_stream(key, nbytes):
    """AES-256 of 0, 1, 2, ... as big-endian blocks, one block at a time."""
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = (nbytes + 15) // 16
    return b"".join(ecb.update(i.to_bytes(16, "big")) for i in range(blocks))[:nbytes]


def test_twin_of_hkdf_gives_rfc_5869_case_1():
    okm = hkdf(
        bytes([0x0B] * 22), bytes(range(13)), bytes(range(0xF0, 0xFA)), 42
    )
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        "34007208d5b887185865"
    )


def test_derive_key():
    assert derive_key(KEY, b"input-0-61") == hkdf(KEY, b"dipy_ppir/prg", b"input-0-61", 32)
    assert derive_key(KEY, b"a") != derive_key(KEY, b"b")
    # A change of this value makes a version that cannot talk to earlier ones.
    assert derive_key(KEY, b"input-0-61").hex() == (
        "6637923fe8549991014e751f6ef3fe7bec99289367442fa0664fae58ca5fb848"
    )


def test_stream_is_aes_256_counting_from_zero():
    # E(0, 0), E(0, 1), E(0, 2): cases 13 and 14 of the GCM specification, whose
    # hash key, tag and first ciphertext block they are.
    known = (
        "dc95c078a2408989ad48a21492842087"
        "530f8afbc74536b9a963b4f1c4cb738b"
        "cea7403d4d606b6e074ec5d3baf39d18"
    )
    out = bytearray(48)
    Stream(bytes(32)).fill(out)
    assert out.hex() == known


def test_stream_is_read_forward_across_chunks():
    n = (1 << 18) + 1000
    whole = bytearray(2 * n)
    Stream(KEY).fill(whole)
    assert bytes(whole) == key_stream(KEY, 2 * n)
    pieces, stream = b"", Stream(KEY)
    for size in (1, 15, 16, 17, n - 49, n):
        part = bytearray(size)
        stream.fill(part)
        pieces += part
    assert pieces == bytes(whole)


@BOTH
def test_elements_are_the_masked_words_of_the_stream(field):
    drawn = field.to_ints(Stream(KEY).elements(field, (50, 2)))
    raw = key_stream(KEY, 100 * field.nbytes)
    ints = [
        int.from_bytes(raw[i : i + field.nbytes], "little") & field.modulus
        for i in range(0, len(raw), field.nbytes)
    ]
    assert drawn.reshape(-1).tolist() == ints


VECTORS = {
    61: [0x109F492AB60090F2, 0x772EDD6A9AF3A9, 0x59FB94AAE765DF0],
    127: [0x772EDD6A9AF3A9D09F492AB60090F2, 0x3D36C248319BF6A6E59FB94AAE765DF0],
}


@BOTH
def test_fixed_vectors(field):
    """Values printed once: all versions must agree on them."""
    known = VECTORS[field.bits]
    assert Stream(KEY).elements(field, (len(known),)).tolist() == field.from_ints(known).tolist()


class Scripted(Stream):
    """A stream whose bytes the test chooses."""

    def __init__(self, elements, field):
        self.words = np.concatenate([field.flat(e) for e in elements]).reshape(-1)
        self.at = 0

    def fill(self, buffer):
        n = buffer.size
        buffer.reshape(-1)[:] = self.words[self.at : self.at + n]
        self.at += n


@BOTH
def test_the_modulus_is_rejected_and_drawn_again(field):
    p = field.modulus
    bad = np.full(field.storage((1,)), 2**64 - 1, dtype=np.uint64)
    good = [field.from_ints([v]) for v in (5, 6, 7, 8)]
    # five wanted: three of them rejected, then one of the three spares as well
    script = [bad, good[0], bad, good[1], bad, good[2], bad, good[3], field.from_ints([p - 1])]
    stream = Scripted(script, field)
    drawn = field.to_ints(stream.elements(field, (5,))).tolist()
    assert sorted(drawn) == [5, 6, 7, 8, p - 1]
    assert drawn[1] == 5
    assert drawn[3] == 6
    assert stream.at == len(stream.words), "an element was thrown away or used twice"


@BOTH
def test_elements_into_a_given_array(field):
    out = field.empty((7,))
    assert Stream(KEY).elements(field, (7,), out=out) is out
    assert (out == Stream(KEY).elements(field, (7,))).all()


def test_both_ends_hold_the_same_streams_and_others_do_not():
    a, b = Pairwise({1: KEY, 2: KEY[::-1]}), Pairwise({0: KEY})
    x = a.stream(1, b"input-0").words((4,))
    assert (x == b.stream(0, b"input-0").words((4,))).all()
    assert (a.stream(1, b"input-0").words((4,)) != x).all(), "read twice"
    assert (a.stream(1, b"input-1").words((4,)) != x).all()
    assert (a.stream(2, b"input-0").words((4,)) != x).all()
    keys = [a.key(1, b"mpyc") for _ in range(3)]
    assert len(set(keys)) == 3
    assert keys == [b.key(0, b"mpyc") for _ in range(3)]
