"""The published protocols on CKKS, and how version 2 gives the static image away."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from dipy_ppir.mpc.ledger import MOVING, STATIC

pytest.importorskip("tenseal", reason="TenSEAL is the extra dipy-ppir[fhe]")

PAPER = Path(__file__).resolve().parents[1] / "benchmarks" / "paper"


@pytest.fixture
def ckks(monkeypatch):
    """The module of the benchmarks."""
    monkeypatch.syspath_prepend(str(PAPER))
    import leaking_ckks

    return leaking_ckks


def smooth(rng, shape):
    image = ndimage.gaussian_filter(rng.random(shape), 2)
    return (image - image.min()) / np.ptp(image)


def affine_rows(image):
    """Gradient times positions: S of an affine transform, shape (6, n)."""
    y = np.meshgrid(*[np.linspace(-1, 1, n) for n in image.shape], indexing="ij")
    y = np.stack([*y, np.ones_like(y[0])])
    gradient = np.stack(np.gradient(image))
    rows = (gradient[:, None] * y).reshape(6, -1)
    return rows / np.abs(rows).max()


@pytest.mark.parametrize("version", ["DotProducts", "LeakingProducts"])
def test_products(ckks, version):
    """R is right to what TenSEAL's scale is, 2**24 in place of a prime near it."""
    rng = np.random.default_rng(1)
    static = rng.random(100)
    protocol = getattr(ckks, version)(length=16)
    protocol.share_static(static, 6)
    for matrix in rng.uniform(-1, 1, (2, 6, 100)):
        matrix[:, 16:50] = 0
        exact = matrix @ static
        apart = np.abs(protocol.product(matrix) - exact).max()
        assert apart < 0.003 * np.abs(exact).max()
    assert min(protocol.cost.seconds) > 0
    # Seven parts of 16; of 2 x 4 parts half are sent by each, and two sums.
    counts = [2, 7] if version == "DotProducts" else [2 * (4 + 1), 4 + 2]
    for sent, count in zip(protocol.cost.sent, counts, strict=True):
        assert 60_000 * count < sent < 100_000 * count


def test_many_parameters(ckks):
    """More than fit in a ciphertext: version 2 takes several, version 1 refuses."""
    rng = np.random.default_rng(5)
    static, matrix = rng.random(64), rng.uniform(-1, 1, (2049, 64))
    protocol = ckks.LeakingProducts(length=32)
    protocol.share_static(static, len(matrix))
    exact = matrix @ static
    apart = np.abs(protocol.product(matrix) - exact).max()
    assert apart < 0.003 * np.abs(exact).max()
    protocol = ckks.DotProducts(length=32)
    protocol.share_static(static, len(matrix))
    with pytest.raises(ValueError, match="2048 parameters at most, got 2049"):
        protocol.product(matrix)


def test_the_partial_sums_are_read(ckks):
    """Who holds a key reads D numbers for each of R, which add up to it."""
    rng = np.random.default_rng(2)
    static, matrix = rng.random(128), rng.uniform(-1, 1, (6, 128))
    protocol = ckks.LeakingProducts(length=16)
    protocol.share_static(static, 6)
    protocol.product(matrix)
    products = (matrix * static).reshape(6, 2, 4, 16).sum(axis=2)
    np.testing.assert_allclose(protocol.read[STATIC], products[:, 0], atol=5e-3)
    np.testing.assert_allclose(protocol.read[MOVING], products[:, 1], atol=5e-3)


def test_half_of_the_static_image_is_solved(ckks):
    """The moving owner needs no more than what version 2 hands it in 6 iterations."""
    rng = np.random.default_rng(3)
    static, moving = smooth(rng, (64, 64)), smooth(rng, (64, 64))
    protocol = ckks.LeakingProducts()
    protocol.share_static(static.reshape(-1), 6)
    matrices, sums = [], []
    for k in range(6):
        matrices.append(affine_rows(ndimage.shift(moving, (k, 2 * k), mode="wrap")))
        protocol.product(matrices[-1])
        sums.append(protocol.read[MOVING])
    found = ckks.solved(matrices, sums, protocol.length)
    truth = static.reshape(2, -1)[1]
    assert np.corrcoef(found, truth)[0, 1] > 0.99


def test_points(ckks):
    """A matrix of sums of products, of ciphertexts of one coordinate each."""
    rng = np.random.default_rng(4)
    static, moving = rng.standard_normal((2, 2, 9))
    products, cost = ckks.encrypted_points(static, moving)
    np.testing.assert_allclose(products, static @ moving.T, rtol=3e-3, atol=3e-3)
    assert cost.sent[STATIC] > 18 * 90_000


def test_costs_of_iterations_that_were_not_made(ckks):
    """Some at each resolution stand for more; J counts once, or in each."""
    products = ckks.EncryptedProducts(ckks.LeakingProducts, 16)
    image, result = np.zeros((2, 3, 2))
    image[2, STATIC], result[2, MOVING] = 8e6, 2e6
    nothing = np.zeros((3, 2))
    products.taken = [np.array([image, result]), np.array([nothing, result])]
    products.taken.append(np.array([image, 3 * result]))
    once = products.costs([2, 1, 0], [2, 4, 0], resent=False)
    assert once["mb_moving"] == pytest.approx((2 * 2 + 4 * 6) / 6)
    assert once["mb_static"] == pytest.approx(2 * 8 / 6)
    each = products.costs([2, 1, 0], [2, 4, 0])
    assert each["mb_static"] == pytest.approx((8 + 4 * 8) / 6)
