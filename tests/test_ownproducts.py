"""Sums of products of the owners' own numbers."""

from noise import check_uniform
import numpy as np
from parties import run_trio
import pytest

from dipy_ppir.mpc.fields import R32, R64
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.ownproducts import OwnProducts

N = 3000


def total(x, y):
    return x.T @ y


def each(x, y):
    return x[:, 0] * y[:, 1]


def operands(ring):
    rng = np.random.default_rng(4)
    x, y = rng.integers(-1000, 1000, (N, 2)), rng.integers(-40, 40, (N, 3))
    return ring.encode_int(x), ring.encode_int(y)


def mine(session, owner, numbers):
    return numbers if session.pid == owner else None


@pytest.mark.parametrize("ring", [R32, R64])
def test_products_are_exact_whatever_is_multiplied(three, ring):
    x, y = operands(ring)

    def party(session):
        products, opened = OwnProducts(session, ring, "test"), []
        products.share_static(y.shape, mine(session, STATIC, y))
        for form, shape in ((total, (2, 3)), (each, (N,)), (total, (2, 3))):
            own = mine(session, MOVING, x)
            sums = products.sums(form, x.shape, shape, own, bound=1 << 30)
            assert session.pid != HELPER or not sums.share.any()
            opened.append(session.open(sums, "test-any", (MOVING,)))
        return opened

    opened = three(party)[MOVING]
    x, y = x.view(ring.signed), y.view(ring.signed)
    for values, form in zip(opened, (total, each, total), strict=True):
        assert values.tolist() == form(x, y).tolist()


def test_rounds_and_bytes_are_as_stated(trio, depth):
    x, y = operands(R32)
    all_products = [OwnProducts(session, R32, "test") for session in trio]

    def share(session):
        all_products[session.pid].share_static(y.shape, mine(session, STATIC, y))

    def multiply(session):
        own = mine(session, MOVING, x)
        products = all_products[session.pid]
        products.sums(total, x.shape, (2, 3), own, bound=1 << 30)

    words = {share: {STATIC: y.size}, multiply: {MOVING: x.size, HELPER: 6}}
    for step, sent in words.items():
        before = [sum(s.ledger.sent.values()) for s in trio]
        rounds = depth(trio)
        run_trio(trio, step)
        assert rounds() == 1
        for s in trio:
            gone = sum(s.ledger.sent.values()) - before[s.pid]
            assert gone == 4 * sent.get(s.pid, 0)


def test_what_is_sent_is_uniform_whatever_the_images(trio, tap):
    frames = tap(trio)
    x, y = np.zeros((N, 2), np.uint32), np.zeros((N, 3), np.uint32)

    def party(session):
        products = OwnProducts(session, R32, "test")
        for _ in range(2):
            products.share_static(y.shape, mine(session, STATIC, y))
            for _ in range(2):
                own = mine(session, MOVING, x)
                products.sums(each, x.shape, (N,), own, bound=1)

    run_trio(trio, party)
    # Zeros show masks as they are: none comes twice.
    sent = np.concatenate([np.frombuffer(f[4], np.uint32) for f in frames])
    assert len(sent) == 2 * (3 * N + 2 * (2 * N + N))
    check_uniform([sent >> np.uint32(28), sent & np.uint32(15)], "all")
    for k, first in enumerate(frames):
        for second in frames[k + 1 :]:
            a, b = (np.frombuffer(f[4], np.uint32)[:N] for f in (first, second))
            assert not np.array_equal(a, b)
