"""Encryption of polynomials: what can be read, and what must not be."""

import math

import numpy as np
import pytest

from dipy_ppir.mpc import bfv, lattice
from dipy_ppir.mpc.bfv import Mask, PublicKey, SecretKey, Weights
from dipy_ppir.mpc.errors import (
    NoiseBudgetError,
    ParameterMismatchError,
    ProtocolError,
)
from dipy_ppir.mpc.lattice import DEGREE, PRIMES, SMALL_PRIMES
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.prg import Stream

T = 1 << 40


def exchange(weights, message, t=T):
    """The key's owner's key, the ciphertext, and the product before it goes back."""
    key = SecretKey()
    ciphertext = key.encrypt(message[None], t, Stream(bytes(32)))
    (pair,) = bfv.received(ciphertext, Stream(bytes(32)), "the other", 1)
    total = np.zeros_like(pair)
    for half in range(2):
        lattice.multiplied(pair[half], bfv.plain(weights), out=total[half])
    seed, b = key.public()
    return key, pair, PublicKey(seed, b), total


def read(key, response, t=T):
    return key.decrypt(response[None], t, "the other", 1)[0]


@pytest.fixture
def rng():
    """Random numbers, the same each time."""
    return np.random.default_rng(16)


def shifted(message, weights, t):
    """The product with weights at two places, in plain integers."""
    out = np.zeros(DEGREE, object)
    for place in np.flatnonzero(weights):
        turned = np.roll(message.astype(object), place)
        turned[:place] *= -1
        out += turned * int(weights[place])
    return out % t


@pytest.mark.parametrize("t", [1 << 8, 1 << 32, 1 << 40, 1 << 48, SMALL_PRIMES[3]])
def test_a_product_comes_back_masked(rng, t):
    message = rng.integers(0, t, DEGREE).astype(np.uint64)
    weights = np.zeros(DEGREE, np.int64)
    weights[[0, 17, DEGREE - 1]] = -3, t // 2 - 1, 5
    key, _, public, total = exchange(weights, message, t)
    stream = Stream(bytes(range(32)))
    mask = bfv.draw_mask(stream, t)
    weighted = Weights(t / 2, 3)
    bfv.check_budget(t, weighted)
    response = public.response(total, mask, t, stream)
    assert response.nbytes == bfv.response_bytes(bfv.kept_primes(t))
    product = read(key, response, t).astype(object) - mask.numbers.astype(object)
    assert (product % t == shifted(message, weights, t)).all()


def test_parameters_are_secure_by_the_standard():
    # Albrecht et al. 2018, table 1: ternary secrets, 128 bits, classical attacks.
    table = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
    assert bfv.MOST_BITS == table
    assert math.prod(PRIMES).bit_length() <= table[DEGREE]
    # Their errors' standard deviation, and ours.
    assert math.sqrt(lattice.TOSSES / 2) >= 8 / math.sqrt(2 * math.pi)


def test_noise_is_hidden_by_forty_bits_over_a_registration():
    """Also where there is the least room that is accepted."""
    coefficients = DEGREE * bfv.MOST_RESPONSES
    for t, largest in ((T, 2.0**39), (1 << 48, 2.0**47)):
        counts = [1 << k for k in range(60)]
        accepted = []
        for count in counts:
            try:
                bfv.check_budget(t, Weights(largest, count))
            except NoiseBudgetError:
                break
            accepted.append(Weights(largest, count))
        assert 20 < len(accepted) < len(counts)
        room = math.prod(PRIMES) / t
        assert coefficients * accepted[-1].noise / room <= 2.0**-40


def test_noise_and_rounding_stay_within_the_margin():
    """So what is decrypted is right, of whatever is drawn."""
    for t in (1 << 8, T, 1 << 48, SMALL_PRIMES[0]):
        kept = bfv.kept_primes(t)
        rounding = 10 * math.sqrt(DEGREE / 18 + 1 / 12)
        noise = 2.0**-73
        # Two sums of doubles besides.
        most = t * rounding / math.prod(PRIMES[:kept]) + noise + 2.0**-50
        assert most < bfv.margin(t, kept) < bfv.MOST_MARGIN


def test_masks_are_uniform_and_known_to_a_fraction(monkeypatch):
    """A mask is the number nearest to its residues, and not near a half."""
    stream, q = Stream(bytes(32)), math.prod(PRIMES)
    for t in (1 << 3, T, SMALL_PRIMES[0]):
        mask = bfv.draw_mask(stream, t)
        z = _joined(mask.residues)
        assert (
            mask.numbers.astype(object) == [round_to(t * x, q) % t for x in z]
        ).all()
        for numbers, whole in ((z, q), (mask.numbers, t)):
            part = np.array([int(x) / whole for x in numbers])
            counts = np.histogram(part, 8, (0, 1))[0]
            # Six standard deviations of a count.
            assert np.abs(counts - DEGREE / 8).max() < 6 * math.sqrt(DEGREE * 7) / 8
    # What lies within the margin is drawn again.
    t = 1 << 8
    drawn = []
    uniform = lattice.uniform

    def few(stream, shape):
        """Uniform in one coefficient, and with numbers that are whole elsewhere."""
        out = uniform(stream, shape)
        out[:, 1:] = 0
        drawn.append(_joined(out)[0])
        return out

    monkeypatch.setattr(lattice, "uniform", few)
    monkeypatch.setattr(bfv, "kept_primes", lambda t: 2)
    monkeypatch.setattr(bfv, "margin", lambda t, kept: 0.4)
    bfv.draw_mask(stream, t)
    rest = [abs(t * x / q - round_to(t * x, q)) for x in drawn]
    assert rest[-1] < 0.1
    assert all(r >= 0.1 for r in rest[:-1])


def _joined(residues):
    """Numbers in [0, q) of their residues."""
    q, numbers = math.prod(PRIMES), np.zeros(DEGREE, object)
    for modulus, part in zip(lattice.moduli(), residues, strict=True):
        rest = q // modulus.prime
        factor = rest * pow(rest, -1, modulus.prime)
        part = modulus.integers(np.ascontiguousarray(part))
        numbers = numbers + part.astype(object) * factor
    return numbers % q


def test_the_bound_is_ten_deviations_and_all_roundings():
    count, largest = 10**6, 3.0
    deviation = math.sqrt(10.5 * count) * largest
    assert Weights(largest, count).noise >= 10 * deviation + largest * count / 2


def test_noise_stays_below_its_bound(rng):
    """Of equal messages, whose roundings add up, and of the largest weights."""
    for value in (0, 1, T // 2 - 1):
        weights = np.full(DEGREE, 1 << 20)
        message = np.full(DEGREE, value, np.uint64)
        key, _, _, total = exchange(weights, message)
        phase = lattice.multiplied(total[1], key._secret, out=total[0].copy())
        noise = _numbers(phase)
        # Less what it stands for.
        product = shifted_all(message, 1 << 20)
        q = math.prod(PRIMES)
        noise = (noise - np.array([round_to(q * int(m), T) for m in product])) % q
        noise = np.where(noise > q // 2, noise - q, noise).astype(float)
        assert np.abs(noise).max() <= Weights(2.0**20, DEGREE).noise


def drawn(stream, t, *, flooded):
    """A mask, as it is or with numbers alone."""
    mask = bfv.draw_mask(stream, t)
    if flooded:
        return mask
    raised = bfv._raised(mask.numbers, t, np.zeros((len(PRIMES), DEGREE)))
    return Mask(raised, mask.numbers)


def shifted_all(message, weight):
    """The product with a polynomial of equal coefficients, in plain integers."""
    n = len(message)
    value = int(message[0]) * weight
    return [value * (2 * (k + 1) - n) % T for k in range(n)]


def round_to(x, t):
    """The nearest integer to x / t."""
    return (2 * x + t) // (2 * t)


def leaks(total, key, pair, public, weights, monkeypatch, *, flooded, zero):
    """What the key's owner makes of a response: weights from its halves.

    It knows its error e and its half a, and that c_1 is a times the weights, and the
    noise e times the weights.
    """
    if not zero:
        monkeypatch.setattr(
            bfv.lattice, "ternary", lambda stream, n: np.zeros(n, np.int64)
        )
        monkeypatch.setattr(
            bfv.lattice, "errors", lambda stream, shape: np.zeros(shape, np.int64)
        )
    # All that the other owner could send: nothing is lost with primes.
    monkeypatch.setattr(bfv, "kept_primes", lambda t: len(PRIMES))
    stream = Stream(bytes(range(32)))
    mask = drawn(stream, T, flooded=flooded)
    response = public.response(total, mask, T, stream)
    halves = bfv.unpacked(response, "the other", 1)
    result = read(key, response)
    halves = bfv._transformed(halves)
    modulus, secret = lattice.moduli()[0], key._secret
    q = modulus.prime

    def values(x):
        return modulus.integers(np.ascontiguousarray(x[0])).astype(object)

    def quotient(x, y):
        """Polynomial of which y times it is x, near zero; None if there is none."""
        if not all(y):
            return None
        found = np.array([a * pow(b, -1, q) % q for a, b in zip(x, y, strict=True)])
        residues = modulus.residues(found.astype(np.uint64))
        modulus.untransform(residues)
        return residues

    a, c_0, c_1, s = (
        values(pair[1]),
        values(halves[0]),
        values(halves[1]),
        values(secret),
    )
    error = (values(pair[0]) + a * s) % q
    raised = bfv._transformed(bfv._raised(result, T, np.zeros((len(PRIMES), DEGREE))))
    noise = (c_0 + c_1 * s - values(raised)) % q
    by_half = quotient(c_1, a)
    by_noise = quotient(noise, error)
    return [
        found is not None and bool((found == weights).all())
        for found in (by_half, by_noise)
    ]


@pytest.mark.parametrize(
    ("flooded", "zero", "seen"),
    [
        (False, False, [True, True]),
        # Flooding alone leaves the second half, which shows everything.
        (True, False, [True, False]),
        (False, True, [False, False]),
        (True, True, [False, False]),
    ],
)
def test_weights_are_hidden_from_the_owner_of_the_key(
    rng, monkeypatch, flooded, zero, seen
):
    weights = rng.integers(-1000, 1000, DEGREE)
    # A message of zeros, so that all noise is the error's.
    message = np.zeros(DEGREE, np.uint64)
    key, pair, public, total = exchange(weights, message)
    found = leaks(
        total, key, pair, public, weights, monkeypatch, flooded=flooded, zero=zero
    )
    assert found == seen


def test_noise_of_an_encryption_of_zero_alone_tells_of_the_weights(monkeypatch):
    """Without flooding noise is wider for larger weights; with it, alike."""
    spreads = {}
    monkeypatch.setattr(bfv, "kept_primes", lambda t: len(PRIMES))
    for flooded in (False, True):
        for size in (0, 1 << 30):
            weights = np.full(DEGREE, size)
            message = np.zeros(DEGREE, np.uint64)
            key, _, public, total = exchange(weights, message)
            stream = Stream(bytes(32))
            mask = drawn(stream, T, flooded=flooded)
            response = public.response(total, mask, T, stream)
            halves = bfv._transformed(bfv.unpacked(response, "the other", 1))
            phase = lattice.multiplied(halves[1], key._secret, out=halves[0].copy())
            # Modulo the primes together the noise is a small number, less the mask.
            raised = drawn(Stream(bytes(32)), T, flooded=False).residues
            phase -= bfv._transformed(raised)
            spreads[flooded, size] = _spread(phase)
    assert spreads[False, 1 << 30] > 2.0**20 * spreads[False, 0]
    ratio = spreads[True, 1 << 30] / spreads[True, 0]
    # Uniform numbers: the spread of 8192 of them is known to a hundredth.
    assert abs(ratio - 1) < 0.05


@pytest.mark.parametrize("exact", [True, False])
def test_digits_of_an_encryption_of_zero_are_hidden_by_an_error(monkeypatch, exact):
    """Whoever has sent a zero would else divide the second half by a'."""
    monkeypatch.setattr(bfv, "kept_primes", lambda t: len(PRIMES))
    if exact:
        monkeypatch.setattr(
            lattice, "errors", lambda stream, shape: np.zeros(shape, np.int64)
        )
    public, stream = (
        PublicKey(bytes(32), np.zeros((len(PRIMES), DEGREE))),
        Stream(bytes(32)),
    )
    total = np.zeros((2, len(PRIMES), DEGREE))
    response = public.response(total, bfv.draw_mask(stream, T), T, stream)
    half = bfv._transformed(bfv.unpacked(response, "the other", 1))[1, 0].copy()
    modulus = lattice.moduli()[0]
    numbers = (modulus.integers(np.ascontiguousarray(x)) for x in (half, public.a[0]))
    quotient = [
        int(x) * pow(int(y), -1, modulus.prime) % modulus.prime
        for x, y in zip(*numbers, strict=True)
    ]
    digits = modulus.residues(np.array(quotient, np.uint64))
    modulus.untransform(digits)
    assert (np.abs(digits).max() <= 1) == exact


@pytest.mark.parametrize(("narrow", "seen"), [(True, True), (False, False)])
def test_what_only_looks_like_a_ciphertext_reads_nothing(rng, narrow, seen):
    """A key's owner sends a large number as a ciphertext, and a key of zeros.

    A flood that leaves a part of its room free shows what it was multiplied by.
    """
    weights, q = rng.integers(0, 64, DEGREE), math.prod(PRIMES)
    large = q // (T << 8)
    pair = np.zeros((2, len(PRIMES), DEGREE))
    for k, modulus in enumerate(lattice.moduli()):
        pair[0, k] = modulus.residues(np.full(DEGREE, large % modulus.prime, np.uint64))
    total = np.zeros_like(pair)
    bfv.add_product(total, pair, bfv.plain(weights))
    public, stream = (
        PublicKey(bytes(32), np.zeros((len(PRIMES), DEGREE))),
        Stream(bytes(32)),
    )
    mask = bfv.draw_mask(stream, T)
    if narrow:
        # Uniform within 1 / 512 of the room.
        z = _joined(mask.residues)
        flood = [(x - q * round_to(T * x, q) // T) // 512 for x in z]
        z = [q * int(r) // T + f for r, f in zip(mask.numbers, flood, strict=True)]
        mask = mask._replace(
            residues=np.array([[float(_near(x, p)) for x in z] for p in PRIMES])
        )
    response = public.response(total, mask, T, stream)
    kept = bfv.unpacked(response, "the other", 1)[0]
    whole, numbers = math.prod(PRIMES[: len(kept)]), np.zeros(DEGREE, object)
    for modulus, part in zip(lattice.moduli(), kept, strict=False):
        rest = whole // modulus.prime
        factor = rest * pow(rest, -1, modulus.prime)
        numbers += modulus.integers(np.ascontiguousarray(part)).astype(object) * factor
    rest = np.array([T * int(x) % whole / whole for x in numbers])
    read = np.rint(rest * 256).astype(int) % 256
    right = (read == weights).mean()
    # By chance one in 64 of those that are possible, and one in four is.
    assert right > 0.99 if seen else right < 0.02


def _near(x, p):
    """The residue near zero."""
    x %= p
    return x - p if x > p // 2 else x


def _spread(phase):
    """Root mean square of a polynomial's coefficients, from its transform."""
    return np.sqrt((_numbers(phase).astype(float) ** 2).mean())


def _numbers(phase):
    """A polynomial's coefficients, near zero, from its transform."""
    phase, q = np.ascontiguousarray(phase), math.prod(PRIMES)
    for modulus, part in zip(lattice.moduli(), phase, strict=True):
        modulus.untransform(part)
    numbers = _joined(phase)
    return np.where(numbers > q // 2, numbers - q, numbers)


def test_noise_without_room_is_refused_beforehand():
    bfv.check_budget(1 << 48, Weights(2.0**47, 1 << 22))
    with pytest.raises(NoiseBudgetError, match="fewer samples"):
        bfv.check_budget(1 << 48, Weights(2.0**47, 1 << 40))
    with pytest.raises(NoiseBudgetError, match="too large"):
        bfv.kept_primes(1 << 145)


def test_what_is_no_ciphertext_is_refused():
    key = SecretKey()
    good = key.encrypt(np.zeros((1, DEGREE), np.uint64), T, Stream(bytes(32)))
    bad = good.copy()
    bad[0, 2, 77] = 255
    with pytest.raises(ProtocolError, match="the other sent a ciphertext that is none"):
        bfv.received(bad, Stream(bytes(32)), "the other", 1)


def test_owners_of_different_schemes_are_named(two, monkeypatch):
    names = []

    def run(session):
        parameters = bfv.parameters()
        if session.pid:
            parameters = {**parameters, "scheme of encryption": "bfv 0"}
        sent = session.ledger.sent
        try:
            with pytest.raises(ParameterMismatchError, match="'bfv 0'") as caught:
                session.agree("encryption", parameters)
            names.append(caught.value.entry)
            return dict(sent)
        finally:
            session.close()

    two(run)
    assert names == ["scheme of encryption"] * 2


def test_a_key_is_worn_by_what_there_was_room_for(two):
    """Whatever was counted; and by a run of which nothing is counted any more."""

    def run(session):
        encryption, ledger = session.encryption, session.ledger
        key = encryption.key(STATIC)
        assert not encryption.worn(STATIC, key, 2.0**20)
        ledger.record_opening("step", (MOVING,), 10, 4.0)
        ledger.record_opening("moved_frame", (MOVING,), 10, 0.1)
        ledger.record_opening("better", (MOVING,), 1, 1.0)
        assert ledger.shown(MOVING) == 10 * 5 + 10 * 18 + 1
        assert ledger.shown(STATIC) == 0
        left = bfv.KEY_BITS - ledger.shown(MOVING)
        assert not encryption.worn(STATIC, key, left)
        assert encryption.worn(STATIC, key, left + 1)
        assert not encryption.worn(MOVING, encryption.key(MOVING), left + 1)
        assert encryption.renew(STATIC, left + 1)
        assert not encryption.worn(STATIC, encryption.key(STATIC), left + 1)
        # The key before may still be in use.
        assert encryption.worn(STATIC, key, left + 1)
        session.new_run()
        assert encryption.worn(STATIC, encryption.key(STATIC), 0)
        return True

    assert all(two(run))


def test_sizes_of_what_owners_tell_each_other(duo, tap, payload_bytes, outcomes):
    frames = tap(duo)
    outcomes(duo, lambda session: session.encryption and None)
    assert payload_bytes(frames) == 2 * (bfv.CIPHERTEXT + bfv.SEED_BYTES)


def test_another_implementation_is_read(rng, tmp_path):
    """A ciphertext of Microsoft SEAL's, of the same primes and with its key."""
    seal = pytest.importorskip("tenseal.sealapi")
    zstandard = pytest.importorskip("zstandard")
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.BFV)
    parameters.set_poly_modulus_degree(DEGREE)
    # It keeps a last prime for itself.
    primes = (*PRIMES, 1125899904679937 - 16384 * 4)
    while not all(pow(a, primes[-1] - 1, primes[-1]) == 1 for a in (2, 3, 5, 7)):
        primes = (*PRIMES, primes[-1] - 16384)
    parameters.set_coeff_modulus([seal.Modulus(q) for q in primes])
    parameters.set_plain_modulus(T)
    context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.NONE)
    secret = seal.KeyGenerator(context).secret_key()
    message = np.zeros(DEGREE, np.uint64)
    message[:64] = rng.integers(1, T, 64)
    text = " + ".join(f"{int(message[k]):X}x^{k}" for k in range(63, 0, -1))
    ciphertext = seal.Ciphertext(context)
    seal.Encryptor(context, secret).encrypt_symmetric(
        seal.Plaintext(f"{text} + {int(message[0]):X}"), ciphertext
    )
    assert not ciphertext.is_ntt_form()
    ciphertext.save(str(tmp_path / "ciphertext"))
    # Behind a header of 16 bytes it is compressed.
    saved = (tmp_path / "ciphertext").read_bytes()[16:]
    saved = zstandard.ZstdDecompressor().decompressobj().decompress(saved)
    words = np.frombuffer(saved[-2 * len(PRIMES) * DEGREE * 8 :], "<u8")
    words = words.reshape(2, len(PRIMES), DEGREE).astype(np.uint64)
    key, data = SecretKey(), secret.data()
    digits = [data.data(k) for k in range(len(PRIMES) * DEGREE)]
    digits = np.array(digits, np.uint64).reshape(len(PRIMES), DEGREE)
    for k, modulus in enumerate(lattice.moduli()):
        key._secret[k] = modulus.residues(digits[k])
    sent = words.view(np.uint8).reshape(2, len(PRIMES), DEGREE, 8)
    sent = np.ascontiguousarray(sent[..., : bfv.RESIDUE_BYTES])
    assert (read(key, sent) == message).all()
