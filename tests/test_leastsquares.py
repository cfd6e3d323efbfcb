"""Gauss-Newton steps on shares."""

import re

from noise import check_uniform
import numpy as np
from parties import run_trio
import pytest

from dipy_ppir.mpc import leastsquares
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import P127
from dipy_ppir.mpc.leastsquares import (
    BLOCK,
    MOST_STEP_BITS,
    SUM_BITS,
    VALUE_BITS,
    ClearSteps,
    Own,
    SecretProducts,
    SecretSteps,
    scale,
)
from dipy_ppir.mpc.ledger import DECLARATIONS, HELPER, MOVING, STATIC

BITS = 12


def numbers(n, dim, p, seed=0):
    """A static owner's numbers and a moving owner's, as they come from images."""
    rng = np.random.default_rng(seed)
    one = 1 << VALUE_BITS
    static = rng.integers(-one, one + 1, (dim + 1, n))
    gradient = rng.standard_normal((dim, n)) * rng.random(n) ** 4
    integers = np.rint(gradient * scale(gradient)).astype(np.int64)
    sums = leastsquares.sums_of_blocks(integers, static).sum(axis=0)
    matrix = rng.standard_normal((p, dim * (dim + 1)))
    # Steps of some hundred units.
    matrix *= 300 / np.abs(matrix @ sums.reshape(-1)).max()
    return static, Own(integers, matrix, rng.uniform(-100, 100, p))


def taken(session, static, own):
    steps = SecretSteps(session, len(own.gradient), BITS)
    steps.share_static(static.shape, static if session.pid == STATIC else None)
    mine = own if session.pid == MOVING else None
    return steps.step(static.shape[1], len(own.constant), mine)


@pytest.mark.parametrize(("n", "dim", "p"), [(10, 2, 1), (2 * BLOCK + 7, 3, 12)])
def test_steps_are_those_of_the_clear_twin_but_for_their_rounding(three, n, dim, p):
    static, own = numbers(n, dim, p)
    twin = ClearSteps()
    twin.share_static(None, static)
    found = three(taken, static, own)
    assert found[STATIC] is None
    assert found[HELPER] is None
    sums = leastsquares.sums_of_blocks(own.gradient, static).sum(axis=0).reshape(-1)
    exact = own.matrix @ sums + own.constant
    assert np.abs(found[MOVING] - exact).max() <= 0.5 + 1e-9
    assert np.array_equal(twin.step(n, p, own), np.rint(exact))


def test_what_is_opened_is_rounded_evenly(three):
    """All but the last digits that count are noise: uniform, whatever they are."""
    static, own = numbers(100, 2, 6)
    own = own._replace(matrix=np.zeros_like(own.matrix), constant=np.full(6, 7.25))

    def many(session):
        return np.array([taken(session, static, own) for _ in range(200)])

    noise = three(many)[MOVING].ravel() - 7.25
    assert np.abs(noise).max() <= 0.5
    check_uniform(np.minimum(np.floor((noise + 0.5) * 16), 15), "noise")


def test_a_step_beyond_its_bound_shows_no_more_bits(three):
    """Whatever the moving owner gives, what is opened lies within the bound."""
    static, own = numbers(100, 2, 6)
    own = own._replace(constant=np.array([0, 1e3, 1e4, 1e5, -1e6, 1e8]))
    units = three(taken, static, own)[MOVING]
    assert np.abs(units).max() <= 2.0 ** (BITS - 1)


def test_no_sum_wraps_at_the_edge():
    """The moving owner's scale keeps the worst block in its words."""
    dim, n, one = 2, BLOCK, 1 << VALUE_BITS
    for gradient in (np.ones((dim, n)), np.eye(dim, n) * 1e-9, np.full((dim, n), 1e6)):
        integers = np.rint(gradient * scale(gradient)).astype(np.int64)
        static = np.full((dim + 1, n), one)
        sums = leastsquares.sums_of_blocks(integers, static)
        assert 1 << SUM_BITS - 2 < np.abs(sums).max() < 1 << SUM_BITS
    assert scale(np.zeros((dim, n))) == 0


def test_rounds_bytes_and_bits_are_as_stated(trio, depth):
    dim, p, n = 3, 12, 2 * BLOCK
    static, own = numbers(n, dim, p)
    everyone = [SecretSteps(session, dim, BITS) for session in trio]

    def share(session):
        values = static if session.pid == STATIC else None
        everyone[session.pid].share_static(static.shape, values)

    def step(session):
        everyone[session.pid].step(n, p, own if session.pid == MOVING else None)

    run_trio(trio, share)
    assert sum(sum(s.ledger.sent.values()) for s in trio) == 4 * (dim + 1) * n
    before = [sum(s.ledger.sent.values()) for s in trio]
    rounds = depth(trio)
    run_trio(trio, step)
    sent = [sum(s.ledger.sent.values()) - b for s, b in zip(trio, before, strict=True)]
    stated = re.search(r"``(\d+) dim \(dim \+ 1\)`` for each", leastsquares.__doc__)
    # The matrix, the static owner's part, what the helper corrects, and the opening.
    blocks, matrix = 2, 16 * p * dim * (dim + 1)
    sums = 16 * dim * (dim + 1) + 16 * p + 2 * 16 * p
    assert sum(sent) == (
        4 * dim * n + int(stated[1]) * dim * (dim + 1) * blocks + matrix + sums
    )
    assert rounds() == int(
        re.search(r"Rounds of a step: (\d+)", leastsquares.__doc__)[1]
    )
    ((key, entry),) = trio[MOVING].ledger.opened.items()
    assert key == (MOVING, "update")
    assert (entry.openings, entry.values) == (1, p)
    assert entry.bits == pytest.approx(p * BITS)
    assert BITS <= DECLARATIONS["update"].bits == MOST_STEP_BITS


def test_mean_products(three):
    rng, one, n = np.random.default_rng(6), 1 << VALUE_BITS, 4321
    m, s = rng.integers(0, one + 1, (2, n))

    def party(session):
        products = SecretProducts(session, 24)
        products.share_static(n, s if session.pid == STATIC else None)
        mean = products.mean(n, m if session.pid == MOVING else None)
        assert isinstance(mean, SharedArray)
        assert mean.field is P127
        return session.open(mean, "test-any", (MOVING,))

    found = three(party)[MOVING]
    assert found == pytest.approx([np.mean(m * s) / one**2], abs=2.0**-22)
