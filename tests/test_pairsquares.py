"""Gauss-Newton steps of two owners alone."""

import re

from noise import check_uniform
import numpy as np
from parties import run_trio
import pytest

from dipy_ppir.mpc import bfv, pairsquares
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.leastsquares import VALUE_BITS, Own
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.pairsquares import PairProducts, PairSteps

BITS = 12


def numbers(n, dim, p, seed=0):
    """A static owner's numbers and a moving owner's, as they come from images."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, (1 << VALUE_BITS) + 1, n)
    y = np.vstack([rng.uniform(-1, 1, (dim, n)), np.ones(n)])
    gradient = np.rint(rng.standard_normal((dim, n)) * 1e4 * rng.random(n) ** 4)
    sums = (gradient[:, None] * y * image).sum(axis=2)
    matrix = rng.standard_normal((p, dim * (dim + 1)))
    # Steps of some hundred units.
    matrix *= 300 / np.abs(matrix @ sums.reshape(-1)).max()
    own = Own(gradient.astype(np.int64), matrix, rng.uniform(-100, 100, p), y)
    return np.rint(y * image).astype(np.int64), own


def taken(session, static, own):
    n = static.shape[1]
    steps = PairSteps(session, len(own.gradient), BITS, len(own.constant), n, n)
    steps.share_static(static.shape, static if session.pid == STATIC else None)
    mine = own if session.pid == MOVING else None
    return steps.step(n, len(own.constant), mine)


def exact(static, own):
    """The step of the static image itself, its last row."""
    sums = (own.gradient[:, None] * own.positions * static[-1]).sum(axis=2)
    return own.matrix @ sums.reshape(-1) + own.constant


@pytest.mark.parametrize(("n", "dim", "p"), [(10, 2, 1), (20_007, 3, 12), (900, 2, 6)])
def test_steps_are_those_in_the_clear_but_for_their_rounding(two, n, dim, p):
    static, own = numbers(n, dim, p)
    found = two(taken, static, own)
    assert found[STATIC] is None
    assert np.abs(found[MOVING] - exact(static, own)).max() <= 0.5 + 1e-3


def test_samples_of_a_small_image_need_not_be_told(two):
    """It is sent as a whole, and what is no sample is multiplied by zero."""
    static, own = numbers(900, 2, 6)
    index = np.random.default_rng(5).choice(900, 300, replace=False)
    some = own._replace(
        gradient=own.gradient[:, index], positions=own.positions[:, index], index=index
    )

    def party(session):
        steps = PairSteps(session, 2, BITS, 6, 900, 300)
        assert steps.whole
        steps.share_static(static.shape, static if session.pid == STATIC else None)
        return steps.step(300, 6, some if session.pid == MOVING else None)

    found, wanted = two(party)[MOVING], exact(static[:, index], some)
    assert np.abs(found - wanted).max() <= 0.5 + 1e-3


def test_what_is_opened_is_rounded_evenly(two):
    """All but the last digits that count are noise: uniform, whatever they are."""
    static, own = numbers(100, 2, 6)
    own = own._replace(matrix=np.zeros_like(own.matrix), constant=np.full(6, 7.25))

    def many(session):
        steps = PairSteps(session, 2, BITS, 6, 100, 100)
        steps.share_static(static.shape, static if session.pid == STATIC else None)
        mine = own if session.pid == MOVING else None
        return np.array([steps.step(100, 6, mine) for _ in range(100)])

    noise = two(many)[MOVING].ravel() - 7.25
    assert np.abs(noise).max() <= 0.5
    check_uniform(np.minimum(np.floor((noise + 0.5) * 16), 15), "noise")


def test_a_step_beyond_its_bound_shows_no_more_bits(two):
    """Whatever the moving owner gives, what is opened lies within the bound."""
    static, own = numbers(100, 2, 6)
    own = own._replace(constant=np.array([0, 1e3, 1e4, 1e5, -1e6, 1e8]))
    units = two(taken, static, own)[MOVING]
    assert np.abs(units).max() <= 2.0 ** (BITS - 1)


def test_mean_products(two):
    rng, one, n = np.random.default_rng(6), 1 << VALUE_BITS, 4321
    m, s = rng.integers(0, one + 1, (2, n))

    def party(session):
        products = PairProducts(session, 24)
        products.share_static(n, s if session.pid == STATIC else None)
        mean = products.mean(n, m if session.pid == MOVING else None)
        assert isinstance(mean, SharedArray)
        assert mean.field is R128
        return session.open(mean, "test-any", (MOVING,))

    found = two(party)[MOVING]
    assert found == pytest.approx([np.mean(m * s) / one**2], abs=2.0**-22)


def test_rounds_bytes_and_bits_are_as_stated(duo, depth):
    n, dim, p = 20_000, 3, 12
    static, own = numbers(n, dim, p)
    steps = [PairSteps(session, dim, BITS, p, n, n) for session in duo]

    def keys(session):
        assert session.encryption.responses == 0

    def share(session):
        values = static if session.pid == STATIC else None
        steps[session.pid].share_static(static.shape, values)

    def step(session):
        steps[session.pid].step(n, p, own if session.pid == MOVING else None)

    run_trio(duo, keys)
    stated = dict(
        re.findall(r"^`(\w+)` +(\d)  ", pairsquares.__doc__, flags=re.MULTILINE)
    )
    again = re.search(r"with a new key +(\d)  ", pairsquares.__doc__)[1]
    for verb, function in (("share_static", share), ("step", step)):
        before = [sum(s.ledger.sent.values()) for s in duo]
        rounds = depth(duo)
        run_trio(duo, function)
        assert rounds() == int(stated[verb])
        rows = steps[0]._rows
        sent = {
            "share_static": [0, bfv.SEED_BYTES + rows.ciphertexts * bfv.CIPHERTEXT],
            "step": [rows.response_bytes(p), 8 * p],
        }
        for s, start, wanted in zip(duo, before, sent[verb], strict=True):
            assert sum(s.ledger.sent.values()) - start == wanted
    ((key, entry),) = duo[MOVING].ledger.opened.items()
    assert key == (MOVING, "update")
    assert (entry.openings, entry.values) == (1, p)
    assert entry.bits == pytest.approx(p * BITS)
    assert duo[STATIC].ledger.opened == duo[MOVING].ledger.opened
    # As many bits as there are steps for one key.
    for s in duo:
        s.ledger.shown = lambda _: bfv.KEY_BITS
    before, rounds = sum(duo[STATIC].ledger.sent.values()), depth(duo)
    run_trio(duo, step)
    assert rounds() == int(again)
    wanted = 2 * bfv.SEED_BYTES + (1 + rows.ciphertexts) * bfv.CIPHERTEXT + 8 * p
    assert sum(duo[STATIC].ledger.sent.values()) - before == wanted


def test_what_the_static_owner_sends_in_a_step_is_uniform(duo, tap):
    """Numbers of an image of zeros: masks, and noise as wide as the precision."""
    frames = tap(duo)
    zeros = np.zeros((3, 100), np.int64)
    own = Own(zeros[:2], np.zeros((6, 6)), np.zeros(6), np.ones((3, 100)))

    def party(session):
        steps = PairSteps(session, 2, BITS, 6, 100, 100)
        steps.share_static(zeros.shape, zeros if session.pid == STATIC else None)
        for _ in range(60):
            steps.step(100, 6, own if session.pid == MOVING else None)

    run_trio(duo, party)
    words = [f[4] for f in frames if f[0] == STATIC and len(f[4]) == 48]
    words = np.frombuffer(b"".join(words), np.uint64)
    assert len(words) == 360
    check_uniform([words >> np.uint64(60), words & np.uint64(15)], "words")
    assert len(set(words)) == len(words)


def test_a_key_is_renewed_before_it_could_be_read_from_the_steps(two):
    """By a moving owner that answers so that steps are digits of the key."""
    static, own = numbers(100, 2, 6)
    at = []

    def many(session):
        steps = PairSteps(session, 2, BITS, 6, 100, 100)
        steps.share_static(static.shape, static if session.pid == STATIC else None)
        found = []
        for _ in range(40):
            found.append(steps.step(100, 6, own if session.pid == MOVING else None))
            if session.pid == MOVING:
                key = session.encryption.key(STATIC)
                at.append((key, session.ledger.shown(MOVING)))
        return np.array(found)

    units = two(many)[MOVING]
    assert np.abs(units - exact(static, own)).max() <= 0.5 + 1e-3
    keys = list(dict.fromkeys(key for key, _ in at))
    assert len(keys) == len({key.b.tobytes() for key in keys}) == 3
    assert at[-1][1] == 40 * 6 * BITS
    before = 0
    for key in keys:
        shown = max(bits for k, bits in at if k is key)
        assert shown - before <= bfv.KEY_BITS
        # Nor is one renewed too early.
        assert shown - before > bfv.KEY_BITS - 6 * BITS or key is keys[-1]
        before = shown


def test_what_was_encrypted_with_a_key_is_read_with_it(two):
    """Mean products that were begun before a key is renewed."""
    static, own = numbers(100, 2, 6)
    m = np.arange(100)

    def party(session):
        mine = session.pid == STATIC
        products = PairProducts(session, 24)
        products.share_static(100, static[-1] if mine else None)
        keys = {session.encryption.key(STATIC)}
        steps = PairSteps(session, 2, BITS, 6, 100, 100)
        steps.share_static(static.shape, static if mine else None)
        for _ in range(15):
            steps.step(100, 6, None if mine else own)
        keys.add(session.encryption.key(STATIC))
        assert len(keys) == 2
        mean = products.mean(100, None if mine else m)
        return session.open(mean, "test-any", (MOVING,))

    wanted = np.mean(m * static[-1]) / 4.0**VALUE_BITS
    assert two(party)[MOVING] == pytest.approx([wanted], abs=2.0**-22)
