r"""Homomorphic encryption of polynomials, to multiply one owner's by the other's.

The scheme of Brakerski, Fan and Vercauteren (Fan and Vercauteren 2012), of which only
this is used: the key's owner encrypts m; the other owner multiplies by plaintexts w,
adds up, adds a mask and sends the sum back. Nothing is rotated, no two ciphertexts are
multiplied, nobody is given evaluation keys. With :math:`R_q = Z_q[X] / (X^n + 1)`, a
secret s of uniform digits -1, 0, 1 and small errors e (`lattice.errors`),

.. math::

    c_1 = a, \qquad c_0 = -a s + e + \lfloor q m / t \rceil, \qquad
    c_0 + c_1 s = \tfrac q t m + \text{noise},

with a uniform, drawn from a seed that is sent in its place. A product with w has
:math:`q m w / t` and the noise e w.

**What goes back.** The key's owner knows a and s. A sum :math:`\sum c_1 w` would show
it w, whatever were done to :math:`c_0`; and so would the noise. So the other owner adds
an encryption of zero under the key's public part :math:`(b, a') = (-a' s + e', a')`,

.. math::

    c_0 = \sum c_0 w + b u + f + \tfrac q t r, \qquad c_1 = \sum c_1 w + a' u + e'',

with new digits u, an error e'', a mask r that is uniform modulo t, and f uniform and so
wide that the rest of the noise drowns in it (*flooding*): by 40 bits at least, over a
registration, see `least_flood_bits`. To the key's owner :math:`c_1` is an instance of
ring learning with errors, and :math:`c_0` follows from it, from the masked result and
from f. Then q is divided by most of its primes, which anybody could do.

**Security.** 128 bits for n = 8192 and q of 200 bits, by the homomorphic encryption
standard (Albrecht et al. 2018), where q may have 218; errors are differences of coins,
not Gaussian, and a is drawn by AES under a key that both know, which is taken for an
ideal cipher. It holds as long as both keep to the protocol. A key's owner that sends
what is no ciphertext can read digits of the other's numbers. An owner that answers with
what is no answer gets a function of the other's key decrypted; if results are opened to
it, some ten thousand bits of them are the key, and with it all that was encrypted.

Bytes: `CIPHERTEXT` from the key's owner, `response_bytes` back.
"""

import math
import secrets
from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc import lattice
from dipy_ppir.mpc.errors import NoiseBudgetError, ProtocolError
from dipy_ppir.mpc.lattice import DEGREE, PRIMES, TOSSES, moduli
from dipy_ppir.mpc.prg import Stream

#: Bits of q that are secure at 128 bits, by degree: table 1 of the standard, ternary
#: secrets, classical attacks.
MOST_BITS = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
#: Name of the scheme, to be changed with whatever is sent.
VERSION = "bfv 1"
#: Bytes of a residue as it is sent, and of a seed.
RESIDUE_BYTES, SEED_BYTES = 7, 32
#: Bytes of a ciphertext but for its seed, which many have in common.
CIPHERTEXT = len(PRIMES) * DEGREE * RESIDUE_BYTES
#: What a noise that is flooded is hidden by, in bits, over a registration.
FLOODED = 40
#: No session sends more polynomials back: see `flood_bits`.
MOST_RESPONSES = 1 << 20
#: An error is so many standard deviations at most, but for a probability of 2**-71.
DEVIATIONS = 10
#: Part of its room that noise may take; what is more is an error.
ROOM = 1 / 4


def parameters():
    """What owners must have in common before they encrypt."""
    return {
        "scheme of encryption": VERSION,
        "degree of encryption": DEGREE,
        "primes of encryption": list(PRIMES),
    }


def response_bytes(kept):
    """Bytes of a polynomial that goes back with so many primes."""
    return 2 * kept * DEGREE * RESIDUE_BYTES


class Weights(NamedTuple):
    """What is known beforehand, and to all, of what a sum is multiplied by.

    Attributes
    ----------
    largest : float
        bound on the magnitude of the coefficients.
    count : int
        how many there are, of all terms of the sum.
    """

    largest: float
    count: int

    @property
    def noise(self):
        """Largest noise of the sum, but for a probability of 2**-71.

        What it is larger by then counts for less than that probability: the distance is
        the noise's mean.
        Errors add up like independent numbers. What rounding q m / t leaves is the same
        for the same m, and may add up as it is. Besides there is an encryption of zero.
        """
        norm = self.largest * math.sqrt(self.count)
        errors = math.sqrt(TOSSES / 2) * math.hypot(norm, 2 * math.sqrt(DEGREE))
        return DEVIATIONS * errors + self.largest * self.count / 2


def least_flood_bits(weights):
    r"""Bits of the numbers that noise must be flooded by.

    Uniform on :math:`[-2^k, 2^k)` hides a number of magnitude B but for a statistical
    distance of :math:`B / 2^{k+1}`; the bits k are such that over all coefficients of
    `MOST_RESPONSES` polynomials it is below 2**-`FLOODED`.
    """
    coefficients = math.log2(DEGREE) + math.log2(MOST_RESPONSES)
    return math.ceil(math.log2(weights.noise) + FLOODED + coefficients) - 1


def flood_bits(t):
    """Bits of the numbers that noise is flooded by: all that there is room for."""
    return math.floor(math.log2(math.prod(PRIMES)) - math.log2(t)) - 6


def _flood(stream, t):
    """Residues of what noise is flooded by, shape (primes, n)."""
    bits = flood_bits(t)
    words = stream.words((DEGREE, bits // 64 + 1))
    words[:, -1] &= np.uint64((2 << bits % 64) - 1)
    out = np.empty((len(PRIMES), DEGREE))
    for part, modulus in zip(out, moduli(), strict=True):
        modulus.reduced(words, part)
        part -= float(pow(2, bits, modulus.prime))
    return out


def kept_primes(t):
    """How many primes of q are left to what goes back modulo t."""
    rounding = DEVIATIONS * math.sqrt(DEGREE / 18 + 1 / 12)
    for kept in range(1, len(PRIMES)):
        if t * rounding < (ROOM - 1 / 32) * math.prod(PRIMES[:kept]):
            return kept
    raise NoiseBudgetError(f"numbers of {t.bit_length()} bits are too large to go back")


def check_budget(t, weights):
    """Raise NoiseBudgetError if noise could leave no room for numbers modulo t."""
    if least_flood_bits(weights) > flood_bits(t):
        raise NoiseBudgetError(
            f"sums of {weights.count:,} products of {t.bit_length() - 1} bits leave no "
            "room for the noise that must hide what was multiplied by; use fewer "
            "digits or fewer samples"
        )


def packed(residues):
    """Residues, shape (..., primes, n), as the bytes that are sent."""
    *outer, primes, n = residues.shape
    out = np.empty((*outer, primes, n), np.uint64)
    for k, modulus in enumerate(moduli(PRIMES[:primes], n)):
        out[..., k, :] = modulus.integers(np.ascontiguousarray(residues[..., k, :]))
    out = out.astype("<u8", copy=False).view(np.uint8)
    out = out.reshape(*outer, primes, n, 8)
    return np.ascontiguousarray(out[..., :RESIDUE_BYTES])


def unpacked(data, sender, peer):
    """Inverse of `packed`, of what a peer sent.

    Raises
    ------
    ProtocolError
        if a number is no residue.
    """
    *outer, primes, n, _ = data.shape
    words = np.zeros((*outer, primes, n, 8), np.uint8)
    words[..., :RESIDUE_BYTES] = data
    words = words.view("<u8").astype(np.uint64, copy=False)[..., 0]
    residues = np.empty((*outer, primes, n))
    for k, modulus in enumerate(moduli(PRIMES[:primes], n)):
        numbers = np.ascontiguousarray(words[..., k, :])
        if numbers.max(initial=0) >= modulus.prime:
            raise ProtocolError(f"{sender} sent a ciphertext that is none", peer)
        residues[..., k, :] = modulus.residues(numbers)
    return residues


def _transformed(residues):
    """Polynomials of shape (..., primes, n), transformed."""
    for k, modulus in enumerate(moduli()):
        part = np.ascontiguousarray(residues[..., k, :])
        modulus.transform(part)
        residues[..., k, :] = part
    return residues


def plain(integers):
    """Small signed integers, shape (n,), as a polynomial to multiply by.

    Their magnitude is below 2**49.

    Returns
    -------
    polynomial : array, shape (primes, n)
    """
    return _transformed(lattice.small(np.asarray(integers)))


def add_product(total, pair, polynomial):
    """Add a ciphertext times a polynomial, as `plain` makes it, to a sum in its place.

    Parameters
    ----------
    total, pair : array, shape (2, primes, n)
    polynomial : array, shape (primes, n)
    """
    for sum_of_halves, half in zip(total, pair, strict=True):
        lattice.multiplied(half, polynomial, out=sum_of_halves)


def _raised(m, t, out):
    """Add q m / t to residues, not transformed."""
    q, part = math.prod(PRIMES), np.empty(m.shape)
    for k, modulus in enumerate(moduli()):
        inverse = pow(t, -1, modulus.prime)
        lattice.kernels.raised(m, part, t, q % t, modulus.prime, inverse)
        out[k] += part
    return out


class PublicKey:
    """What the other owner needs of a key: an encryption of zero.

    Parameters
    ----------
    seed : bytes
    b : array, shape (primes, n)
    """

    def __init__(self, seed, b):
        self.b = b
        self.a = lattice.uniform(Stream(seed), (DEGREE,))

    def response(self, total, mask, t, stream):
        """Mask, flood and shorten a sum of products.

        Parameters
        ----------
        total : array, shape (2, primes, n)
            transformed; changed in its place.
        mask : array of uint64, shape (n,)
            uniform modulo t.
        t : int
        stream : Stream
            of this owner's own random numbers.

        Returns
        -------
        response : array of uint8, shape (2, kept, n, `RESIDUE_BYTES`)
        """
        u = plain(lattice.ternary(stream, DEGREE))
        lattice.multiplied(self.b, u, out=total[0])
        lattice.multiplied(self.a, u, out=total[1])
        flood, error = _flood(stream, t), lattice.errors(stream, (DEGREE,))
        for k, modulus in enumerate(moduli()):
            for part in total[:, k]:
                modulus.untransform(part)
            total[0, k] += flood[k]
            total[1, k] += error
        _raised(mask, t, total[0])
        return packed(_shortened(total, kept_primes(t)))


def _shortened(pair, kept):
    """A ciphertext with fewer primes: each is divided by, to the nearest integer."""
    primes = list(moduli())
    while len(primes) > kept:
        last = primes.pop()
        rest = np.ascontiguousarray(pair[:, len(primes)])
        rest = last.residues(last.integers(rest))
        pair = np.stack(
            [
                modulus.scaled_difference(
                    np.ascontiguousarray(pair[:, k]),
                    rest,
                    pow(last.prime, -1, modulus.prime),
                )
                for k, modulus in enumerate(primes)
            ],
            axis=1,
        )
    return pair


class SecretKey:
    """A key of an owner, for one session; it is written nowhere."""

    def __init__(self):
        self._stream = Stream(secrets.token_bytes(32))
        self._secret = plain(lattice.ternary(self._stream, DEGREE))

    def public(self):
        """Seed and polynomial of the public key; see `PublicKey`."""
        seed = secrets.token_bytes(SEED_BYTES)
        return seed, self._zeros(Stream(seed), 1)[0]

    def _zeros(self, stream, count):
        """Encryptions of zero whose other halves a stream gives: ``-a s + e``."""
        a = lattice.uniform(stream, (count, DEGREE))
        out = _transformed(lattice.small(lattice.errors(self._stream, (count, DEGREE))))
        for masked, half in zip(out, a, strict=True):
            lattice.multiplied(-half, self._secret, out=masked)
        return out

    def encrypt(self, messages, t, seeded):
        """Encrypt polynomials modulo t.

        Parameters
        ----------
        messages : array of uint64, shape (count, n)
            below t.
        t : int
            below 2**49.
        seeded : Stream
            of a seed that the other owner has too, read in the same order.

        Returns
        -------
        ciphertexts : array of uint8, shape (count, primes, n, `RESIDUE_BYTES`)
        """
        out = self._zeros(seeded, len(messages))
        for message, ciphertext in zip(messages, out, strict=True):
            whole = _raised(
                np.ascontiguousarray(message), t, np.zeros((len(PRIMES), DEGREE))
            )
            ciphertext += _transformed(whole)
        return packed(out)

    def decrypt(self, responses, t, sender, peer):
        """Decrypt what came back.

        Parameters
        ----------
        responses : array of uint8, shape (count, 2, kept, n, `RESIDUE_BYTES`)
        t : int
        sender : str
            what the other owner is called.
        peer : int

        Returns
        -------
        messages : array of uint64, shape (count, n)

        Raises
        ------
        ProtocolError
            if a response is none, or has more noise than the protocol makes.
        """
        pairs = unpacked(responses, sender, peer)
        count, _, kept, n = pairs.shape
        modulus_of_all = math.prod(PRIMES[:kept])
        words = np.zeros((count, n), np.uint64)
        fractions = np.zeros((count, n))
        for k, modulus in enumerate(moduli(PRIMES[:kept])):
            phase = np.ascontiguousarray(pairs[:, 1, k])
            modulus.transform(phase)
            product = np.zeros_like(phase)
            for x, y in zip(phase, product, strict=True):
                modulus.multiply_add(y, x, self._secret[k])
            modulus.untransform(product)
            product += pairs[:, 0, k]
            rest = pow(modulus_of_all // modulus.prime, -1, modulus.prime)
            product = modulus.scaled_difference(product, np.zeros_like(product), rest)
            lattice.kernels.lowered(
                modulus.integers(product).reshape(-1),
                words.reshape(-1),
                fractions.reshape(-1),
                t,
                modulus.prime,
            )
        nearest = np.rint(fractions)
        if np.abs(fractions - nearest).max(initial=0) > ROOM:
            raise NoiseBudgetError(
                f"what {sender} sent back has too much noise to be read; check that "
                "all parties run the same version"
            )
        return (words + nearest.astype(np.uint64)) % np.uint64(t)


def received(ciphertexts, seeded, sender, peer):
    """Ciphertexts as they came from the key's owner.

    Parameters
    ----------
    ciphertexts : array of uint8
        see `SecretKey.encrypt`.
    seeded : Stream
    sender : str
    peer : int

    Returns
    -------
    pairs : array, shape (count, 2, primes, n)
        transformed.
    """
    first = unpacked(ciphertexts, sender, peer)
    second = lattice.uniform(seeded, (len(first), DEGREE))
    return np.stack([first, second], axis=1)


class Encryption:
    """The keys of a session of two: this owner's own and the other's public one.

    Rounds: 2. Bytes: `CIPHERTEXT` and a seed each way.

    Parameters
    ----------
    session : PairSession

    Raises
    ------
    ParameterMismatchError
        if the owners' schemes or their parameters differ, before anything is encrypted.
    """

    def __init__(self, session):
        self.session = session
        self.name = session.name_of(session.other)
        session.agree("encryption", parameters())
        self.key, self.stream = SecretKey(), Stream(secrets.token_bytes(32))
        self.responses = 0
        seed, b = self.key.public()
        self._send_seed("key", seed)
        session.network.send(session.other, "public-key", packed(b))
        theirs = self._receive_seed("key")
        room = np.empty((len(PRIMES), DEGREE, RESIDUE_BYTES), np.uint8)
        session.network.receive(session.other, "public-key", room)
        self._public = PublicKey(theirs, unpacked(room, self.name, session.other))

    def _send_seed(self, name, seed):
        words = np.frombuffer(seed, np.uint8)
        self.session.network.send(self.session.other, "seed-of-" + name, words)

    def _receive_seed(self, name):
        seed = np.empty(SEED_BYTES, np.uint8)
        self.session.network.receive(self.session.other, "seed-of-" + name, seed)
        return seed.tobytes()

    def send(self, name, messages, t):
        """Encrypt polynomials for the other owner, who calls `receive`. Rounds: 1.

        Parameters
        ----------
        name : str
            the protocol step.
        messages : iterable of array of uint64, shape (n,)
            below t; taken one after the other.
        t : int
        """
        self.session.check_process()
        seed = secrets.token_bytes(SEED_BYTES)
        self._send_seed(name, seed)
        stream = Stream(seed)
        for message in messages:
            ciphertext = self.key.encrypt(message[None], t, stream)
            self.session.network.send(self.session.other, name, ciphertext)

    def receive(self, name, count):
        """Receive ciphertexts.

        Returns
        -------
        pairs : array, shape (count, 2, primes, n)
        """
        stream = Stream(self._receive_seed(name))
        out = np.empty((count, 2, len(PRIMES), DEGREE))
        room = np.empty((1, len(PRIMES), DEGREE, RESIDUE_BYTES), np.uint8)
        for k in range(count):
            self.session.network.receive(self.session.other, name, room)
            out[k] = received(room, stream, self.name, self.session.other)[0]
        return out

    def answer(self, name, total, mask, t, weights):
        """Send a sum of products back, masked; the key's owner calls `read`.

        Parameters
        ----------
        name : str
        total : array, shape (2, primes, n)
            changed in its place.
        mask : array of uint64, shape (n,)
            uniform modulo t.
        t : int
        weights : Weights
        """
        self.session.check_process()
        check_budget(t, weights)
        self.responses += 1
        if self.responses > MOST_RESPONSES:
            raise NoiseBudgetError(
                f"more than {MOST_RESPONSES:,} encrypted numbers went back in one "
                "session: begin a new one"
            )
        response = self._public.response(total, mask, t, self.stream)
        self.session.network.send(self.session.other, name, response)

    def read(self, name, count, t):
        """Decrypt what the other owner sent back. Rounds: 1.

        Returns
        -------
        messages : array of uint64, shape (count, n)
        """
        shape = (2, kept_primes(t), DEGREE, RESIDUE_BYTES)
        room = np.empty((1, *shape), np.uint8)
        out = np.empty((count, DEGREE), np.uint64)
        for k in range(count):
            self.session.network.receive(self.session.other, name, room)
            out[k] = self.key.decrypt(room, t, self.name, self.session.other)[0]
        return out

    def mask(self, t):
        """A mask, uniform modulo t, shape (n,)."""
        self.session.check_process()
        return lattice.below(self.stream, (DEGREE,), t)
