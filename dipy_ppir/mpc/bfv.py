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
and a polynomial Z that is uniform modulo q,

.. math::

    c_0 = \sum c_0 w + b u + Z, \qquad c_1 = \sum c_1 w + a' u + e'',

with new digits u and an error e''. To the key's owner :math:`c_0` is uniform, and
:math:`c_1` an instance of ring learning with errors, with a' from a stream: **whatever
it had sent** in place of its key and of its ciphertexts. Then q is divided by some of
its primes, and of :math:`c_0` the coefficients are left out that are not wanted, each
of which decrypts by itself: anybody could do that.

Of :math:`Z = \tfrac q t r + f` with the nearest r the first part is the mask, of which
the other owner takes r off again, and the second *floods* the noise. What is decrypted
is the sum plus r exactly, unless f and the noise together exceed :math:`q / 2 t`. So f
keeps off from that, by `margin`; it is uniform but for that part, of which whoever
sends what is no ciphertext may see something once in 2**29 answers.

**Security.** 128 bits for n = 8192 and q of 200 bits, by the homomorphic encryption
standard (Albrecht et al. 2018), where q may have 218; errors are differences of coins,
not Gaussian, and a is drawn by AES under a key that both know, which is taken for an
ideal cipher. It is for owners that keep to the protocol. Decrypted numbers are not
looked at, so that no error tells of a key. But an owner that answers with what is no
answer gets a function of the other's key, and of what it encrypted, decrypted; if
results are opened to it, some ten thousand bits of them are the key. Therefore keys are
renewed (`Encryption.renew`). What they encrypt may then depend on what the other owner
made of them, for which there is no proof.

Bytes: `CIPHERTEXT` from the key's owner, `response_bytes` back.
"""

from itertools import product
import math
import secrets
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from dipy_ppir.mpc import lattice
from dipy_ppir.mpc.errors import NoiseBudgetError, ProtocolError
from dipy_ppir.mpc.lattice import DEGREE, PRIMES, TOSSES, moduli
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.prg import Stream

#: Bits of q that are secure at 128 bits, by degree: table 1 of the standard, ternary
#: secrets, classical attacks.
MOST_BITS = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
#: Name of the scheme, to be changed with whatever is sent.
VERSION = "bfv 2"
#: Bytes of a residue as it is sent, and of a seed.
RESIDUE_BYTES, SEED_BYTES = lattice.kernels.SENT_BYTES, 32
#: Bytes of a ciphertext but for its seed, which many have in common.
CIPHERTEXT = len(PRIMES) * DEGREE * RESIDUE_BYTES
#: What noise is hidden by, in bits, over a registration.
FLOODED = 40
#: No session sends more polynomials back: see `check_budget`.
MOST_RESPONSES = 1 << 20
#: An error is so many standard deviations at most, but for a probability of 2**-71.
DEVIATIONS = 10
#: A key is renewed before so many bits have been opened that it could be read from, by
#: an owner that answers with what is no answer: if they are digits of it, with the rest
#: ring learning with errors is as hard as the standard asks.
KEY_BITS = 1024
#: What f leaves to noise, in units of q / t, at most: see `margin`.
MOST_MARGIN = 2.0**-40
#: Errors of fractions that are computed in doubles.
_ROUNDED = 2.0**-49


def parameters():
    """What owners must have in common before they encrypt."""
    return {
        "scheme of encryption": VERSION,
        "degree of encryption": DEGREE,
        "primes of encryption": list(PRIMES),
    }


def response_bytes(kept, wanted=DEGREE):
    """Bytes of a polynomial that goes back with so many primes.

    Parameters
    ----------
    kept : int
    wanted : int, optional
        how many of its coefficients.
    """
    return kept * (DEGREE + wanted) * RESIDUE_BYTES


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


def margin(t, kept):
    """What f leaves to noise, in units of q / t, where numbers are modulo t.

    What dropping primes rounds is all of it but next to nothing, see `check_budget`.
    """
    rounding = DEVIATIONS * math.sqrt(DEGREE / 18 + 1 / 12)
    return 2 * t * rounding / math.prod(PRIMES[:kept]) + _ROUNDED


def kept_primes(t):
    """How many primes of q are left to what goes back modulo t."""
    for kept in range(1, len(PRIMES)):
        if margin(t, kept) < MOST_MARGIN:
            return kept
    raise NoiseBudgetError(f"numbers of {t.bit_length()} bits are too large to go back")


def check_budget(t, weights):
    r"""Raise NoiseBudgetError if noise could show, for numbers modulo t.

    A number that is uniform on an interval of length :math:`q / t` hides one of
    magnitude B but for a statistical distance of :math:`B t / q`. Over all coefficients
    of `MOST_RESPONSES` polynomials it must be below 2**-`FLOODED`.
    """
    coefficients = DEGREE * MOST_RESPONSES
    if coefficients * weights.noise * t * 2**FLOODED > math.prod(PRIMES):
        raise NoiseBudgetError(
            f"sums of {weights.count:,} products of {t.bit_length() - 1} bits leave no "
            "room for the noise that must hide what was multiplied by; use fewer "
            "digits or fewer samples"
        )


class Mask(NamedTuple):
    """What a sum is hidden by.

    Attributes
    ----------
    residues : array, shape (primes, n)
        Z, uniform modulo q.
    numbers : array of uint64, shape (n,)
        r, which it adds to the sum, modulo t.
    """

    residues: np.ndarray
    numbers: np.ndarray


def draw_mask(stream, t):
    """A new `Mask` for numbers modulo t."""
    most = 1 / 2 - margin(t, kept_primes(t))
    while True:
        residues = lattice.uniform(stream, (DEGREE,))
        numbers, rest = _nearest(residues, t)
        if np.abs(rest).max() < most:
            return Mask(residues, numbers)


def _nearest(residues, t):
    """Numbers modulo q, or its first primes, times t / q.

    Parameters
    ----------
    residues : array, shape (primes, n)
    t : int

    Returns
    -------
    numbers : array of uint64, shape (n,)
        the nearest integers, modulo t.
    rest : array, shape (n,)
        what they are too small by.
    """
    whole, fractions = np.zeros((2, residues.shape[1]))
    q = math.prod(PRIMES[: len(residues)])
    for part, modulus in zip(residues, moduli(), strict=False):
        rest = pow(q // modulus.prime, -1, modulus.prime)
        part = modulus.scaled_difference(part, np.zeros_like(part), rest)
        lattice.kernels.lowered(part, whole, fractions, t, modulus.prime)
    nearest = np.rint(fractions)
    numbers = np.empty(len(whole), np.uint64)
    lattice.kernels.integers(whole + nearest, numbers, t)
    return numbers, fractions - nearest


def packed(residues):
    """Residues, shape (..., primes, n), as the bytes that are sent."""
    out = np.empty((*residues.shape, RESIDUE_BYTES), np.uint8)
    for at, modulus in _rows(residues):
        lattice.kernels.packed(residues[at], out[at], modulus.prime)
    return out


def unpacked(data, sender, peer, out=None):
    """Inverse of `packed`, of what a peer sent.

    Raises
    ------
    ProtocolError
        if a number is no residue.
    """
    residues = np.empty(data.shape[:-1]) if out is None else out
    for at, modulus in _rows(residues):
        if lattice.kernels.unpacked(data[at], residues[at], modulus.prime):
            raise ProtocolError(f"{sender} sent a ciphertext that is none", peer)
    return residues


def _rows(residues):
    """Where each polynomial modulo a prime is, shape (..., primes, n), and its modulus.

    Each of them is contiguous.
    """
    *outer, primes, n = residues.shape
    of_primes = moduli(PRIMES[:primes], n)
    for first in product(*map(range, outer)):
        for k, modulus in enumerate(of_primes):
            yield (*first, k), modulus


def _transformed(residues):
    """Polynomials of shape (..., primes, n), transformed in their place."""
    for at, modulus in _rows(residues):
        modulus.transform(residues[at])
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
    lattice.multiplied(pair, polynomial, out=total)


def _raised(m, t, out):
    """Add q m / t to residues, not transformed."""
    q = math.prod(PRIMES)
    for part, modulus in zip(out, moduli(), strict=True):
        inverse = pow(t, -1, modulus.prime)
        lattice.kernels.raised(m, part, t, q % t, modulus.prime, inverse)
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
        """Mask and shorten a sum of products.

        Parameters
        ----------
        total : array, shape (2, primes, n)
            transformed; changed in its place.
        mask : Mask
            drawn for this one only.
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
        for at, modulus in _rows(total):
            modulus.untransform(total[at])
        total[0] += mask.residues
        total[1] += lattice.errors(stream, (DEGREE,))
        return packed(_shortened(total, kept_primes(t)))


def _shortened(pair, kept):
    """A ciphertext with fewer primes: each is divided by, to the nearest integer."""
    for end in range(len(PRIMES) - 1, kept - 1, -1):
        *primes, last = moduli(PRIMES[: end + 1])
        inverses = [pow(last.prime, -1, modulus.prime) for modulus in primes]
        for half in pair:
            rest = last.residues(last.integers(half[end]))
            for part, modulus, inverse in zip(half, primes, inverses, strict=False):
                modulus.scaled_difference(part, rest, inverse, out=part)
    return pair[:, :kept]


class SecretKey:
    """A key of an owner, for one session at most; it is written nowhere."""

    def __init__(self):
        self._stream = Stream(secrets.token_bytes(32))
        self._secret = plain(lattice.ternary(self._stream, DEGREE))

    def public(self):
        """Seed and polynomial of the public key; see `PublicKey`."""
        seed = secrets.token_bytes(SEED_BYTES)
        zeros = np.zeros((1, len(PRIMES), DEGREE))
        return seed, self._encrypted(zeros, Stream(seed))[0]

    def _encrypted(self, numbers, stream):
        """Ciphertexts of numbers, in their place; a stream gives the other halves."""
        shape = len(numbers), DEGREE
        numbers += lattice.errors(self._stream, shape)[:, None]
        _transformed(numbers)
        halves = lattice.uniform(stream, shape)
        np.negative(halves, out=halves)
        return lattice.multiplied(halves, self._secret, out=numbers)

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
        out = np.zeros((len(messages), len(PRIMES), DEGREE))
        for message, raised in zip(messages, out, strict=True):
            _raised(np.ascontiguousarray(message), t, raised)
        return packed(self._encrypted(out, seeded))

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
            if a response is none.
        """
        pairs = unpacked(responses, sender, peer)
        out = np.empty((len(pairs), DEGREE), np.uint64)
        for pair, message in zip(pairs, out, strict=True):
            phase = np.zeros(pair[1].shape)
            for part, masked, digits, modulus in zip(
                phase, pair[1], self._secret, moduli(), strict=False
            ):
                modulus.transform(masked)
                modulus.multiply_add(part, masked, digits)
                modulus.untransform(part)
            message[...], _ = _nearest(phase + pair[0], t)
        return out


def received(ciphertexts, seeded, sender, peer, out=None):
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
    count, primes, n, _ = ciphertexts.shape
    pairs = np.empty((count, 2, primes, n)) if out is None else out
    unpacked(ciphertexts, sender, peer, pairs[:, 0])
    lattice.uniform(seeded, (count, n), out=pairs[:, 1])
    return pairs


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
        self.stream = Stream(secrets.token_bytes(32))
        self.responses = 0
        #: By owner the key, and by key, as long as it is used, what was opened to the
        #: other one before.
        self._keys, self._before = {}, WeakKeyDictionary()
        self.make_key(session.pid)
        self.make_key(session.other)

    def make_key(self, holder):
        """Make an owner's key and send its public part, or receive that."""
        session, shown = self.session, self._shown(holder)
        session.check_process()
        if session.pid == holder:
            self._keys[holder] = key = SecretKey()
            self._before[key] = session.ledger, shown
            seed, b = key.public()
            self._send_seed("key", seed)
            session.network.send(session.other, "public-key", packed(b))
            return
        theirs = self._receive_seed("key")
        room = np.empty((len(PRIMES), DEGREE, RESIDUE_BYTES), np.uint8)
        session.network.receive(session.other, "public-key", room)
        b = unpacked(room, self.name, session.other)
        self._keys[holder] = key = PublicKey(theirs, b)
        self._before[key] = session.ledger, shown

    def _shown(self, holder):
        """Bits opened so far to the owner that is not the holder."""
        return self.session.ledger.shown(MOVING + STATIC - holder)

    def renew(self, holder, bits=KEY_BITS // 4):
        """Make a new key of an owner if the one that it has may show too much.

        What is encrypted from here on has the new key; who still reads or answers what
        was encrypted before keeps its key, see `key`. Rounds: 1 if it is renewed.

        Parameters
        ----------
        holder : int
        bits : float, optional
            to be opened to the other owner while what is encrypted next is used.

        Returns
        -------
        renewed : bool
            the same at both.
        """
        renewed = self.worn(holder, self._keys[holder], bits)
        if renewed:
            self.make_key(holder)
        return renewed

    def worn(self, holder, key, bits):
        """Whether a key of an owner may show too much if `bits` more are opened."""
        ledger, before = self._before[key]
        if ledger is not self.session.ledger:
            # Of another run, of which nothing is counted here.
            return True
        shown = self._shown(holder) - before
        return shown > 0 and shown + bits > KEY_BITS

    def key(self, holder):
        """The key of what an owner encrypts now: a `SecretKey` or its `PublicKey`."""
        return self._keys[holder]

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
        key, seed = self.key(self.session.pid), secrets.token_bytes(SEED_BYTES)
        self._send_seed(name, seed)
        stream = Stream(seed)
        for message in messages:
            ciphertext = key.encrypt(message[None], t, stream)
            self.session.network.send(self.session.other, name, ciphertext)

    def receive(self, name, count, out=None):
        """Receive ciphertexts, in the place of others that are done with if given.

        Returns
        -------
        pairs : array, shape (count, 2, primes, n)
        """
        stream = Stream(self._receive_seed(name))
        out = np.empty((count, 2, len(PRIMES), DEGREE)) if out is None else out
        room = np.empty((1, len(PRIMES), DEGREE, RESIDUE_BYTES), np.uint8)
        for k in range(count):
            self.session.network.receive(self.session.other, name, room)
            received(room, stream, self.name, self.session.other, out[k : k + 1])
        return out

    def answer(self, name, total, mask, t, weights, key=None, wanted=slice(None)):
        """Send a sum of products back, masked; the key's owner calls `read`.

        Parameters
        ----------
        name : str
        total : array, shape (2, primes, n)
            changed in its place.
        mask : Mask
            of this owner's, drawn for this one only.
        t : int
        weights : Weights
        key : PublicKey, optional
            the one that was theirs when they encrypted, by default the one they have.
        wanted : array of int, optional
            coefficients that the key's owner wants; all by default.
        """
        self.session.check_process()
        check_budget(t, weights)
        self.responses += 1
        if self.responses > MOST_RESPONSES:
            raise NoiseBudgetError(
                f"more than {MOST_RESPONSES:,} encrypted numbers went back in one "
                "session: begin a new one"
            )
        key = self.key(self.session.other) if key is None else key
        first, second = key.response(total, mask, t, self.stream)
        response = np.concatenate([first[:, wanted], second], axis=1)
        self.session.network.send(self.session.other, name, response)

    def read(self, name, count, t, key=None, wanted=slice(None)):
        """Decrypt what the other owner sent back. Rounds: 1.

        Parameters
        ----------
        name : str
        count : int
        t : int
        key : SecretKey, optional
            that it was encrypted with, by default the one this owner has.
        wanted : array of int, optional
            see `answer`.

        Returns
        -------
        messages : array of uint64, shape (count, wanted)
        """
        other, kept = self.session.other, kept_primes(t)
        size = len(np.arange(DEGREE)[wanted])
        room = np.empty((kept, size + DEGREE, RESIDUE_BYTES), np.uint8)
        pair = np.zeros((1, 2, kept, DEGREE, RESIDUE_BYTES), np.uint8)
        out = np.empty((count, size), np.uint64)
        key = self.key(self.session.pid) if key is None else key
        for message in out:
            self.session.network.receive(other, name, room)
            pair[0, 0][:, wanted], pair[0, 1] = room[:, :size], room[:, size:]
            message[...] = key.decrypt(pair, t, self.name, other)[0, wanted]
        return out

    def mask(self, t):
        """A new `Mask` for numbers modulo t."""
        self.session.check_process()
        return draw_mask(self.stream, t)
