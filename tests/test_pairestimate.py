"""What two owners alone take, estimated and counted."""

from deformed import deformed
import numpy as np
from oblivious import KnownProducts, use_known_products
from parties import run_trio
import pytest
import test_map_only
import test_ssd_mind
from test_two_on_shares import register

from dipy_ppir.align import RemotePoints, pairestimate, point_registration
from dipy_ppir.align.estimate import estimate
from dipy_ppir.align.parameters import (
    AffineParameters,
    PointParameters,
    SynParameters,
)
from dipy_ppir.mpc.ledger import MOVING, STATIC


@pytest.fixture
def taken(monkeypatch):
    """Numbers of products that an owner takes, which are made without encryption."""
    use_known_products(monkeypatch)
    taken, sums = [], KnownProducts.sums

    def counted(products, n, terms):
        if products._session.pid == MOVING:
            taken.append(n * terms)
        return sums(products, n, terms)

    monkeypatch.setattr(KnownProducts, "sums", counted)
    return taken


@pytest.mark.parametrize(
    "kind, shape, iters, opens",
    [
        ("CC", (60, 56), [6, 4], "levels"),
        ("CC", (40, 36), [4, 3], "end"),
        ("CC", (24, 22, 20), [3, 2], "levels"),
        ("SSD", (60, 56), [5, 3], "levels"),
        ("MIND", (24, 22, 20), [3, 2], "levels"),
    ],
)
def test_products_of_syn(duo, taken, kind, shape, iters, opens):
    pair, dim = deformed(len(shape), shape), len(shape)
    if kind == "CC":
        run_trio(
            duo,
            lambda s: test_map_only.register(
                s, pair, dim, level_iters=iters, opens=opens
            ),
        )
    else:
        run_trio(
            duo,
            lambda s: test_ssd_mind.register(
                s, pair, kind, {"opens": opens}, level_iters=iters
            ),
        )
    of_metric = {"radius": 3} if kind == "CC" else {}
    parameters = SynParameters(
        dim=dim, metric=kind, level_iters=iters, opens=opens, **of_metric
    )
    found = estimate(parameters, shape, shape, alone=True)
    sent = sum(s.sent for s in found.stages) - pairestimate._KEYS
    products = sent / pairestimate._BYTES - pairestimate._SPARE
    assert products == pytest.approx(sum(taken), rel=0.05)
    # It says so before it begins, with a helper another number.
    assert found.sent > 10 * estimate(parameters, shape, shape).sent
    assert [s.iterations for s in found.stages] == [*iters, 0]


@pytest.mark.parametrize("dim", [2, 3])
def test_points(duo, dim):
    """Bytes and rounds of what is encrypted."""
    x = np.random.default_rng(0).normal(size=(193, dim))

    def run(session):
        moving, static = (
            x if session.pid == p else RemotePoints(*x.shape) for p in (MOVING, STATIC)
        )
        return point_registration(moving, static, session=session, precision=1e-4)

    run_trio(duo, run)
    found = estimate(PointParameters(), x.shape, x.shape, alone=True)
    sent = sum(sum(s.ledger.sent.values()) for s in duo)
    assert found.sent == pytest.approx(sent, rel=0.15)
    more = estimate(PointParameters(), (10_000, dim), (10_000, dim), alone=True)
    assert more.sent > 3 * found.sent and more.work > 2 * found.work


# How far a few steps lead is by chance.
@pytest.mark.filterwarnings("ignore:the image was moved")
@pytest.mark.parametrize("hide_steps", [False, True], ids=["shown", "hidden"])
def test_mutual_information(two, bodies, hide_steps):
    """Bytes of a registration, all included; and that more samples take more."""
    pair = bodies(2)
    given = {"pipeline": ["center_of_mass", "translation"], "level_iters": [4, 0]}
    given |= {"sigmas": [0.0, 0.0], "factors": [2, 1], "hide_steps": hide_steps}
    found = register(two, pair, **given)
    receipt = found[MOVING][-1]
    parameters, shapes = AffineParameters(**given), [image.shape for image in pair[:2]]
    ahead = estimate(parameters, *shapes, alone=True)
    # Up to a batch of products is left over.
    assert ahead.sent == pytest.approx(receipt["bytes_total"], rel=0.2, abs=4e6)
    assert ahead.sent > 5 * estimate(parameters, *shapes).sent
    large = AffineParameters(sampling_proportion=0.05)
    more = estimate(large, (99, 117, 95), (99, 117, 95), alone=True)
    assert 0.8e9 < more.sent < 1.2e9
    assert 25 < more.work < 70
