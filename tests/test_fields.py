"""Packed arrays as `dipy_ppir.mpc.fields` gives them out."""

from examples import quick
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import P61, P127, R64

BOTH = pytest.mark.parametrize("field", [P61, P127], ids=repr)
EVERY = pytest.mark.parametrize("field", [P61, P127, R64], ids=repr)


def elements(field, n=5):
    p = field.modulus
    one = st.one_of(
        st.sampled_from([0, 1, p - 1, p // 2, p // 2 + 1]), st.integers(0, p - 1)
    )
    return st.lists(one, min_size=n, max_size=n)


def test_the_fields_and_the_ring():
    moduli = {P61: 2**61 - 1, P127: 2**127 - 1, R64: 2**64}
    for field, modulus in moduli.items():
        assert field.modulus == modulus
        assert field.nbytes == field.zeros((1,)).nbytes
    assert [repr(f) for f in moduli] == ["GF(2^61 - 1)", "GF(2^127 - 1)", "Z/2^64"]


@BOTH
def test_weights_of_shares_of_degree_2(field):
    p = field.modulus
    secret, slope, bend = p - 5, p // 3, p - 1
    shares = [secret + slope * x + bend * x * x for x in (1, 2, 3)]
    total = sum(w * s for w, s in zip(field.weights, shares, strict=True))
    assert total % p == secret


def test_weights_of_parts():
    parts = [2**64 - 5, 2**63, 2**63 + 12]
    assert sum(w * s for w, s in zip(R64.weights, parts, strict=True)) % 2**64 == 7


@EVERY
def test_storage(field):
    for shape in [(), (3,), (2, 3), (0,), (4, 1, 2)]:
        assert field.zeros(shape).shape == field.storage(shape)
        assert field.empty(shape).dtype == np.uint64
        values = np.arange(int(np.prod(shape)), dtype=object).reshape(shape)
        assert field.to_ints(field.from_ints(values)).shape == shape


@EVERY
@given(data=st.data())
@quick(40)
def test_integers_there_and_back(field, data):
    values = data.draw(elements(field))
    packed = field.from_ints(values)
    assert list(field.to_ints(packed)) == values
    assert field.is_canonical(packed)
    shifted = [v - 3 * field.modulus for v in values]
    assert list(field.to_ints(field.from_ints(shifted))) == values


@EVERY
@given(data=st.data())
@quick(40)
def test_arithmetic_against_integers(field, data):
    p = field.modulus
    a, b = data.draw(elements(field)), data.draw(elements(field))
    alpha = data.draw(st.integers(-(2**130), 2**130))
    beta = data.draw(st.integers(-5, 5))
    x, y = field.from_ints(a), field.from_ints(b)
    expected = {
        "add": [(u + v) % p for u, v in zip(a, b, strict=True)],
        "sub": [(u - v) % p for u, v in zip(a, b, strict=True)],
        "mul": [u * v % p for u, v in zip(a, b, strict=True)],
    }
    for name, values in expected.items():
        assert list(field.to_ints(getattr(field, name)(x, y))) == values
    assert list(field.to_ints(field.neg(x))) == [-u % p for u in a]
    assert list(field.to_ints(field.scale(x, alpha))) == [u * alpha % p for u in a]
    both = field.axpby(alpha, x, beta, y)
    assert list(field.to_ints(both)) == [
        (alpha * u + beta * v) % p for u, v in zip(a, b, strict=True)
    ]
    assert list(field.to_ints(x)) == a, "an operand was changed"


@EVERY
def test_matmul_and_inverse(field):
    rng = np.random.default_rng(0)
    raw = [int.from_bytes(rng.bytes(16), "little") % field.modulus for _ in range(28)]
    a = np.array(raw, dtype=object).reshape(4, 7)
    b = a.T
    product = field.matmul(field.from_ints(a), field.from_ints(b).copy())
    assert (field.to_ints(product) == a @ b % field.modulus).all()
    assert field.inverse(7) * 7 % field.modulus == 1


@EVERY
@given(
    x=st.lists(st.floats(-1000, 1000), min_size=1, max_size=6),
    frac_bits=st.integers(0, 30),
)
@quick(40)
def test_reals_are_rounded_to_nearest(field, x, frac_bits):
    back = field.decode(field.encode(np.array(x), frac_bits, 1000.0), frac_bits)
    assert np.abs(back - x).max() <= 2.0 ** -(frac_bits + 1)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 4.1, -4.1])
def test_reals_beyond_their_bound_are_refused(field, bad):
    assert field.encode(np.array([4.0, -4.0]), 3, 4.0).size
    with pytest.raises(FixedPointOverflowError, match="not finite or exceeds"):
        field.encode(np.array([0.0, bad]), 3, 4.0)


@EVERY
def test_signed_integers(field):
    x = np.array([[0, 1, -1], [2**59, -(2**59), 12345]])
    assert (
        field.to_ints(field.encode_int(x)) == x.astype(object) % field.modulus
    ).all()


@BOTH
def test_rejected_words(field):
    ones = np.full(field.storage((5,)), 2**64 - 1, dtype=np.uint64)
    ones[1] = 7
    assert field.reduce_random(ones) == field.count_rejected(ones) == 4
    assert not field.is_canonical(ones)
    # A spare that is itself to be rejected does not count.
    spare = np.concatenate([field.from_ints([3]), ones[:1], field.from_ints([4])])
    assert field.replace_rejected(ones, spare) == 2
    assert field.count_rejected(ones) == 2


# -- the ring -------------------------------------------------------------------


def test_every_word_is_an_element_of_the_ring():
    words = np.array([0, 1, 2**61 - 1, 2**63, 2**64 - 1], dtype=np.uint64)
    drawn = words.copy()
    assert R64.reduce_random(drawn) == R64.count_rejected(drawn) == 0
    assert np.array_equal(drawn, words), "random words were changed"
    assert R64.is_canonical(words)
    assert R64.to_ints(words).tolist() == words.tolist()


@given(
    x=st.lists(st.integers(-(2**52), 2**52), min_size=1, max_size=6),
    frac_bits=st.integers(0, 40),
)
@quick(40)
def test_ring_encoding_is_signed(x, frac_bits):
    reals = np.array(x) / 2.0**frac_bits
    packed = R64.encode(reals, frac_bits, 2.0**52)
    assert R64.to_ints(packed).tolist() == [v % 2**64 for v in x]
    assert R64.decode(packed, frac_bits).tolist() == reals.tolist()
    assert np.array_equal(R64.encode_int(x), packed)
    assert R64.decode(R64.neg(packed), frac_bits).tolist() == (-reals).tolist()


def test_ring_encoding_at_its_ends():
    top = np.nextafter(2.0**63, 0)
    packed = R64.encode(np.array([[top, -top]]), 0, np.inf)
    assert R64.to_ints(packed).tolist() == [[2**63 - 1024, 2**63 + 1024]]
    assert R64.decode(packed, 0).tolist() == [[top, -top]]
    for bad in (2.0**63, -(2.0**63)):
        with pytest.raises(FixedPointOverflowError, match="not finite or exceeds"):
            R64.encode(np.array([bad]), 0, np.inf)
    ends = np.array([2**63 - 1, -(2**63)])
    assert R64.to_ints(R64.encode_int(ends)).tolist() == [2**63 - 1, 2**63]
    assert R64.decode(R64.encode_int(ends), 62).tolist() == [2.0, -2.0]


@pytest.mark.parametrize("constant", [-1, -3, -(2**63), -(2**64) - 2, 2**64 + 5])
def test_ring_products_with_any_integer(constant):
    values = [0, 1, 7, 2**63, 2**64 - 1]
    a, b = R64.from_ints(values), R64.from_ints(values[::-1])
    expected = [constant * v % 2**64 for v in values]
    assert R64.to_ints(R64.scale(a, constant)).tolist() == expected
    expected = [(w - v) % 2**64 for v, w in zip(expected, values[::-1], strict=True)]
    assert R64.to_ints(R64.axpby(-constant, a, 1, b)).tolist() == expected


def test_even_integers_have_no_inverse_in_the_ring():
    with pytest.raises(ValueError, match="not invertible"):
        R64.inverse(6)
