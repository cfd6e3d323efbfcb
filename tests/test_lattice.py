"""Polynomials modulo primes, against plain arithmetic and another implementation."""

import hashlib

import knownanswers
import numpy as np
import pytest

from dipy_ppir._kernels import lattice as kernels
from dipy_ppir.mpc import lattice
from dipy_ppir.mpc.lattice import DEGREE, PRIMES, SMALL_PRIMES, Modulus
from dipy_ppir.mpc.prg import Stream

#: A prime below 2**50 for short polynomials: 1 modulo 64.
SHORT, SHORT_PRIME = 32, 1125899906842177


def is_prime(n):
    """Miller and Rabin's test, certain for n below 3e24."""
    d, s = n - 1, 0
    while d % 2 == 0:
        d, s = d // 2, s + 1
    for a in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):
        x = pow(a, d, n)
        if x in (1, n - 1):
            continue
        if all((x := x * x % n) != n - 1 for _ in range(s - 1)):
            return False
    return True


@pytest.fixture(params=[0, 1, 2])
def level(request):
    """Each instruction set that this processor has."""
    before = kernels._built_with()[0]
    if kernels._use_level(request.param) != request.param:
        pytest.skip("not on this processor")
    yield request.param
    kernels._use_level(before)


@pytest.fixture
def stream():
    """A key stream that is the same each time."""
    return Stream(bytes(32))


@pytest.mark.parametrize(
    ("primes", "limit"), [(PRIMES, 1 << 50), (SMALL_PRIMES, 1 << 48)]
)
def test_primes_have_roots_and_room(primes, limit):
    assert len(set(primes)) == len(primes)
    for q in primes:
        assert is_prime(q)
        assert q < limit
        assert q % (2 * DEGREE) == 1


def schoolbook(a, b, q):
    """Product modulo X^n + 1."""
    n, out = len(a), [0] * len(a)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            sign = -1 if i + j >= n else 1
            out[(i + j) % n] += sign * int(x) * int(y)
    return [c % q for c in out]


@pytest.mark.parametrize("largest", [True, False])
def test_products_are_those_of_polynomials(level, stream, largest):
    q = next(q for q in range(SHORT_PRIME, 0, -2 * SHORT) if is_prime(q))
    modulus = Modulus(q, SHORT)
    a, b = (lattice.below(stream, (SHORT,), q) for _ in range(2))
    if largest:
        a[:], b[:] = q // 2, q // 2 + 1
    x, y = modulus.residues(a), modulus.residues(b)
    modulus.transform(x)
    modulus.transform(y)
    total = np.zeros(SHORT)
    modulus.multiply_add(total, x, y)
    modulus.multiply_add(total, x, y)
    modulus.untransform(total)
    assert modulus.integers(total).tolist() == [2 * c % q for c in schoolbook(a, b, q)]


@pytest.mark.parametrize("q", [PRIMES[0], PRIMES[-1], SMALL_PRIMES[-1]])
def test_transform_is_undone(level, stream, q):
    modulus = Modulus(q)
    integers = lattice.below(stream, (3, DEGREE), q)
    integers[0], integers[1, ::2], integers[1, 1::2] = q - 1, q // 2, q // 2 + 1
    values = modulus.residues(integers)
    modulus.transform(values)
    assert np.abs(values).max() <= q // 2 + 1
    modulus.untransform(values)
    assert (modulus.integers(values) == integers).all()


def test_transform_is_that_of_another_implementation(level):
    secret = lattice.small(knownanswers.digits(DEGREE))
    for k, modulus in enumerate(lattice.moduli()):
        modulus.transform(secret[k])
    integers = np.stack(
        [m.integers(x) for m, x in zip(lattice.moduli(), secret, strict=True)]
    )
    assert tuple(integers[:, 0]) == knownanswers.FIRST
    assert tuple(integers[:, -1]) == knownanswers.LAST
    digest = hashlib.sha256(integers.astype("<u8").tobytes()).hexdigest()
    assert digest == knownanswers.SHA256


@pytest.mark.parametrize("q", [*PRIMES, *SMALL_PRIMES])
def test_roots_are_powers_of_the_least(q):
    root = lattice._root(q, SHORT)
    odd = [pow(root, k, q) for k in range(1, 2 * SHORT, 2)]
    assert root == min(odd)
    assert all(pow(x, SHORT, q) == q - 1 for x in odd)
    powers = lattice._powers(root, q, SHORT)
    assert (powers % q).tolist() == [pow(root, k, q) for k in range(SHORT)]
    assert np.abs(powers).max() <= q // 2


def test_each_modulus_is_made_once():
    both = lattice.moduli(PRIMES[:1]), lattice.moduli(PRIMES, DEGREE)
    assert both[0][0] is both[1][0]


@pytest.mark.parametrize("q", [PRIMES[1], SMALL_PRIMES[-1]])
@pytest.mark.parametrize("words", [1, 3, 6])
def test_numbers_of_several_words_are_reduced(level, stream, words, q):
    modulus = Modulus(q)
    numbers = stream.words((101, words))
    numbers[0], numbers[1] = 0, ~np.uint64(0)
    out = modulus.reduced(numbers)
    for row, x in zip(numbers.tolist(), modulus.integers(out).tolist(), strict=True):
        assert x == sum(w << 64 * k for k, w in enumerate(row)) % q


@pytest.mark.parametrize("t", [1 << 1, 1 << 40, 1 << 48, SMALL_PRIMES[0]])
def test_messages_are_raised_to_the_nearest_integer(level, stream, t):
    q = np.prod([int(p) for p in PRIMES], dtype=object)
    m = lattice.below(stream, (151,), t)
    m[:3] = 0, t - 1, t // 2
    # Quotients about halves.
    by_t = pow(q, -1, t)
    m[3:51] = [(t // 2 + k) * by_t % t for k in range(-24, 24)]
    for modulus in lattice.moduli():
        out = np.full(151, -5.0)
        inverse = pow(t, -1, modulus.prime)
        kernels.raised(m, out, t, q % t, modulus.prime, inverse)
        for x, y in zip(m.tolist(), modulus.integers(out).tolist(), strict=True):
            assert y == ((q * x + t // 2) // t - 5) % modulus.prime


@pytest.mark.parametrize("t", [1 << 1, 1 << 48, SMALL_PRIMES[0]])
def test_what_comes_back_is_lowered_to_the_nearest_integer(level, stream, t):
    q = PRIMES[0]
    y = lattice.below(stream, (101,), q)
    y[:2] = q // 2, q // 2 + 1
    whole, fractions = np.full(101, 7.0), np.zeros(101)
    kernels.lowered(Modulus(q).residues(y), whole, fractions, t, q)
    for x, times, rest in zip(y.tolist(), whole, fractions, strict=True):
        x -= q if x > q // 2 else 0
        left = (t * x - (int(times) - 7) * q) / q
        assert abs(left) <= 0.75
        assert rest == pytest.approx(left, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("q", [PRIMES[0], SMALL_PRIMES[-1]])
@pytest.mark.parametrize("n", [1, 64, 101])
def test_numbers_are_sent_in_seven_bytes(level, stream, n, q):
    modulus = Modulus(q)
    integers = lattice.below(stream, (n,), q)
    integers[-1] = q - 1
    # Residues need not be near zero.
    residues = modulus.residues(integers) + 2.0 * q
    sent = np.zeros((n, 7), np.uint8)
    kernels.packed(residues, sent, q)
    eight = integers.astype("<u8").view(np.uint8).reshape(n, 8)
    assert (sent == eight[:, :7]).all()
    back = np.empty(n)
    assert kernels.unpacked(sent, back, q) == 0
    assert (back == modulus.residues(integers)).all()
    for wrong in (q, (1 << 56) - 1):
        sent[-1] = list(wrong.to_bytes(7, "little"))
        assert kernels.unpacked(sent, back, q) == 1
    with pytest.raises(ValueError, match="do not match"):
        kernels.packed(residues, np.empty((n, 8), np.uint8), q)


def test_what_is_drawn_is_what_it_should_be(stream):
    n = 1 << 18
    digits = lattice.ternary(stream, n)
    # Six standard deviations of a count.
    for digit in (-1, 0, 1):
        assert abs((digits == digit).sum() - n / 3) < 6 * np.sqrt(n * 2 / 9)
    errors = lattice.errors(stream, (n,))
    assert abs(errors.mean()) < 6 * np.sqrt(lattice.TOSSES / 2 / n)
    variance = lattice.TOSSES / 2
    assert abs(errors.var() / variance - 1) < 6 * np.sqrt(2 / n)
    assert np.abs(errors).max() <= lattice.TOSSES
    limit = 3 << 20
    words = lattice.below(stream, (n,), limit)
    assert words.max() < limit
    assert abs(words.mean() / limit - 0.5) < 6 / np.sqrt(12 * n)


def test_primes_without_roots_are_refused():
    with pytest.raises(ValueError, match="no root"):
        Modulus(PRIMES[0], 1 << 20)
