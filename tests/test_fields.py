"""Packed arrays as `dipy_ppir.mpc.fields` gives them out."""

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import FIELDS, P61, P127

BOTH = pytest.mark.parametrize("field", [P61, P127], ids=repr)
quick = settings(max_examples=40, deadline=None)


def elements(field, n=5):
    p = field.modulus
    one = st.one_of(st.sampled_from([0, 1, p - 1, p // 2, p // 2 + 1]), st.integers(0, p - 1))
    return st.lists(one, min_size=n, max_size=n)


def test_the_two_fields():
    assert FIELDS == {61: P61, 127: P127}
    for bits, field in FIELDS.items():
        assert field.modulus == 2**bits - 1
        assert field.nbytes == field.zeros((1,)).nbytes


@BOTH
def test_storage(field):
    for shape in [(), (3,), (2, 3), (0,), (4, 1, 2)]:
        assert field.zeros(shape).shape == field.storage(shape)
        assert field.empty(shape).dtype == np.uint64
        values = np.arange(int(np.prod(shape)), dtype=object).reshape(shape)
        assert field.to_ints(field.from_ints(values)).shape == shape


@BOTH
@given(data=st.data())
@quick
def test_integers_there_and_back(field, data):
    values = data.draw(elements(field))
    packed = field.from_ints(values)
    assert list(field.to_ints(packed)) == values
    assert field.is_canonical(packed)
    shifted = [v - 3 * field.modulus for v in values]
    assert list(field.to_ints(field.from_ints(shifted))) == values


@BOTH
@given(data=st.data())
@quick
def test_arithmetic_against_integers(field, data):
    p = field.modulus
    a, b = data.draw(elements(field)), data.draw(elements(field))
    alpha, beta = data.draw(st.integers(-(2**130), 2**130)), data.draw(st.integers(-5, 5))
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


@BOTH
def test_matmul_and_inverse(field):
    rng = np.random.default_rng(0)
    raw = [[int.from_bytes(rng.bytes(16), "little") % field.modulus for _ in range(7)] for _ in range(4)]
    a, b = np.array(raw, dtype=object), np.array(raw, dtype=object).T
    product = field.matmul(field.from_ints(a), field.from_ints(b).copy())
    assert (field.to_ints(product) == a @ b % field.modulus).all()
    assert field.inverse(6) * 6 % field.modulus == 1


@BOTH
@given(
    x=st.lists(st.floats(-1000, 1000), min_size=1, max_size=6),
    frac_bits=st.integers(0, 30),
)
@quick
def test_reals_are_rounded_to_nearest(field, x, frac_bits):
    back = field.decode(field.encode(np.array(x), frac_bits, 1000.0), frac_bits)
    assert np.abs(back - x).max() <= 2.0 ** -(frac_bits + 1)


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 4.1, -4.1])
def test_reals_beyond_their_bound_are_refused(field, bad):
    assert field.encode(np.array([4.0, -4.0]), 3, 4.0).size
    with pytest.raises(FixedPointOverflowError, match="not finite or exceeds"):
        field.encode(np.array([0.0, bad]), 3, 4.0)


@BOTH
def test_signed_integers(field):
    x = np.array([[0, 1, -1], [2**59, -(2**59), 12345]])
    assert (field.to_ints(field.encode_int(x)) == x.astype(object) % field.modulus).all()


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
