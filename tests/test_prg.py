"""Key derivation and key streams against published vectors and a plain twin."""

import hashlib
import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
import numpy as np
import pytest

from dipy_ppir.mpc.fields import P61, P127, R64
from dipy_ppir.mpc.prg import Pairwise, Stream, derive_key

PRIMES = pytest.mark.parametrize("field", [P61, P127], ids=repr)
EVERY = pytest.mark.parametrize("field", [P61, P127, R64], ids=repr)
KEY = bytes(range(32))


def hkdf(key, salt, info, length):
    """HKDF-SHA256 as RFC 5869 writes it down."""
    prk = hmac.new(salt, key, hashlib.sha256).digest()
    out = block = b""
    while len(out) < length:
        counted = block + info + bytes([len(out) // 32 + 1])
        block = hmac.new(prk, counted, hashlib.sha256).digest()
        out += block
    return out[:length]


def key_stream(key, nbytes, start=0):
    """AES-256 of start, start + 1, ... as big-endian blocks, one at a time."""
    ecb = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    counters = range(start, start + (nbytes + 15) // 16)
    return b"".join(ecb.update(i.to_bytes(16, "big")) for i in counters)[:nbytes]


def test_twin_of_hkdf_gives_rfc_5869_case_1():
    okm = hkdf(bytes([0x0B] * 22), bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        "34007208d5b887185865"
    )


def test_derive_key():
    key = derive_key(KEY, b"input-0-61")
    assert key == hkdf(KEY, b"dipy_ppir/prg", b"input-0-61", 32)
    assert derive_key(KEY, b"a") != derive_key(KEY, b"b")
    # A change of this value makes a version that cannot talk to earlier ones.
    assert key.hex() == (
        "6637923fe8549991014e751f6ef3fe7bec99289367442fa0664fae58ca5fb848"
    )


def test_twin_of_the_key_stream_gives_nist_sp_800_38a_f_5_5():
    """CTR-AES256.Encrypt: the plaintext XOR the key stream is the ciphertext."""
    key = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
    plaintext = (
        "6bc1bee22e409f96e93d7e117393172a"
        "ae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52ef"
        "f69f2445df4f9b17ad2b417be66c3710"
    )
    ciphertext = (
        "601ec313775789a5b7a7f504bbf3d228"
        "f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988d"
        "dfc9c58db67aada613c2dd08457941a6"
    )
    counter = 0xF0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF
    stream = key_stream(bytes.fromhex(key), 64, counter)
    assert int(plaintext, 16) ^ int.from_bytes(stream, "big") == int(ciphertext, 16)


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


@EVERY
def test_elements_are_the_masked_words_of_the_stream(field):
    drawn = field.to_ints(Stream(KEY).elements(field, (50, 2)))
    raw = key_stream(KEY, 100 * field.nbytes)
    ints = [
        int.from_bytes(raw[i : i + field.nbytes], "little") & (1 << field.bits) - 1
        for i in range(0, len(raw), field.nbytes)
    ]
    assert drawn.reshape(-1).tolist() == ints


VECTORS = {
    # the first elements that both ends of a link draw for an input of party 0
    61: ["148ca9e21cdb4d4a", "14f4971511635ea4", "0eba011b9f838dc0"],
    127: [
        "08a27a53a0ecf56a0f12fdcc6493bee4",
        "12338282b6c79946702a156cba9df5a3",
        "47ba7aec212e2f3cacf5bc4c9618e75a",
    ],
    64: ["5536549a7909caaa", "8d39dae3606d9dd4", "8358ae160381247e"],
}


@EVERY
def test_known_elements(field):
    """Computed with hmac and OpenSSL: parties of all versions agree on them."""
    stream = Pairwise({1: KEY}).stream(1, b"input-0-%d" % field.bits)
    elements = field.to_ints(stream.elements(field, (3,)))
    assert [f"{x:0{2 * field.nbytes}x}" for x in elements] == VECTORS[field.bits]


class Scripted(Stream):
    """A stream whose bytes the test chooses."""

    def __init__(self, elements, field):
        self.words = np.concatenate([field.flat(e) for e in elements]).reshape(-1)
        self.at = 0

    def fill(self, buffer):
        n = buffer.size
        buffer.reshape(-1)[:] = self.words[self.at : self.at + n]
        self.at += n


@PRIMES
def test_the_modulus_is_rejected_and_drawn_again(field):
    p = field.modulus
    bad = np.full(field.storage((1,)), 2**64 - 1, dtype=np.uint64)
    good = [field.from_ints([v]) for v in (5, 6, 7, 8)]
    # five wanted: three of them rejected, then one of the three spares as well
    last = field.from_ints([p - 1])
    script = [bad, good[0], bad, good[1], bad, good[2], bad, good[3], last]
    stream = Scripted(script, field)
    drawn = field.to_ints(stream.elements(field, (5,))).tolist()
    assert sorted(drawn) == [5, 6, 7, 8, p - 1]
    assert drawn[1] == 5
    assert drawn[3] == 6
    assert stream.at == len(stream.words), "an element was thrown away or used twice"


@EVERY
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
