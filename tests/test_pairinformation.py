"""Mutual information for two owners alone, against the formulas in the clear."""

import noise
import numpy as np
from numpy.testing import assert_array_equal
from oblivious import use_known_products
import pytest
from samples import DIGITS, Samples

from dipy_ppir.mpc import worlds
from dipy_ppir.mpc.information import DIFFERENCE_BITS, Information
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.pairinformation import PairInformation

UNIT = 2.0**-DIGITS


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Products that are dealt, and rounding that is the same in every run."""
    noise.fix_randomness(monkeypatch)
    use_known_products(monkeypatch)


def opened(two, samples, **options):
    def party(session):
        found = samples.evaluate(session, **options)
        return [
            None if a is None else session.open(a, "test-any", (MOVING,)) for a in found
        ]

    return two(party)[MOVING]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("n", [7, 400, 5000])
def test_value_and_gradient(two, n, dim, masked):
    samples = Samples(n, dim, masked=masked, seed=n)
    value, gradient, _ = opened(two, samples)
    expected, slope, _ = samples.clear()
    # Sums of logarithms that are off by 2e-6, of three numbers; a masked one is
    # divided by a number that is right to 1e-6, and counts a unit too much.
    counted = (samples.keep_static & samples.keep_moving).sum()
    off = 6e-6 + masked * 2.0**-samples.frac_bits / counted
    assert abs(value[0] / 128 - expected) < off
    # Each difference of logarithms is off by two units at most; they are rounded by
    # chance, and so is the moving owner's gradient.
    size = (
        np.abs(samples.matrix)
        @ np.abs(np.einsum("nd,ne->nde", samples.gradient, samples.y)).reshape(n, -1).T
    )
    bound = 2.5 * 2.0**-DIFFERENCE_BITS * size.sum(axis=1)
    assert np.all(np.abs(gradient / 128 - slope) < bound / counted + off)
    # It is not only zero.
    assert np.abs(slope).max() > 1e-4


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_slopes(two, masked):
    samples = Samples(3000, masked=masked)
    _, _, slopes = opened(two, samples, slopes=True)
    _, _, expected = samples.clear()
    # Logarithms are off by a unit: slopes by as much.
    bound = 2.5 * 2.0**-DIFFERENCE_BITS * np.sqrt(expected) + 1e-5
    assert np.all(np.abs(slopes - expected) < bound)
    assert expected.max() > 0.01


def test_many_evaluations_of_one_image(two):
    """What is encrypted once serves every evaluation."""
    samples = Samples(900, masked=True)

    def party(session):
        information, moving = samples.begin(session)
        return [
            session.open(
                information.evaluate(128.0, samples.p, moving).value,
                "test-any",
                (MOVING,),
            )
            for _ in range(3)
        ]

    expected, _, _ = samples.clear()
    for value in two(party)[MOVING]:
        assert abs(value[0] / 128 - expected) < 1e-5


def test_images_without_structure(two):
    """One category, one bin, no gradient: nothing overflows, and nothing is known."""
    samples = Samples(300, seed=1)
    samples.index[...], samples.first[...] = 3, 2
    samples.weights[...] = [0, 1, 0, 0]
    samples.gradient[...] = 0
    value, gradient, slopes = opened(two, samples, slopes=True)
    assert abs(value[0]) < 128 * 6e-6
    assert_array_equal(np.abs(gradient) <= UNIT, True)
    assert np.isfinite(slopes).all()


def test_no_sample_counts(two):
    """The masks have nothing in common: what comes of it is a number, of no use."""
    samples = Samples(300, masked=True)
    samples.keep_static[...] = False
    value, gradient, _ = opened(two, samples)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


def test_the_largest_gradient(two):
    """All samples pull the same way, where the logarithms differ most."""
    samples = Samples(2000, seed=5)
    samples.index[...] = samples.first[...] = np.arange(2000) < 1000
    samples.weights[...] = [1, 0, 0, 0]
    samples.gradient[...] = 0.5
    samples.y[...] = np.where(samples.index, -30, 30)[:, None]
    _, gradient, _ = opened(two, samples)
    _, slope, _ = samples.clear()
    np.testing.assert_allclose(gradient / 128, slope, rtol=1e-3, atol=1e-5)
    assert np.abs(slope).max() > 1


def test_which_protocol_a_session_has(duo, trio):
    arguments = 10, 8, 12, None, 3
    options = {"masked": False, "digits": DIGITS}
    assert isinstance(worlds.information(trio[0], *arguments, **options), Information)
    for session in duo:
        made = worlds.information(session, *arguments, **options)
        assert isinstance(made, PairInformation)
        with pytest.raises(ValueError, match="needs a helper"):
            worlds.information(session, *arguments, **options, backend="mpyc")
