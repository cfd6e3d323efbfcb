"""Products of one owner's rows with the other's, under encryption."""

import numpy as np
import pytest

from dipy_ppir.mpc import bfv
from dipy_ppir.mpc.encrypted import EncryptedRows, choose_packing
from dipy_ppir.mpc.errors import NoiseBudgetError, ProtocolError
from dipy_ppir.mpc.lattice import DEGREE
from dipy_ppir.mpc.ledger import MOVING, STATIC


@pytest.fixture
def rng():
    """Random numbers, the same each time."""
    return np.random.default_rng(16)


def words(rng, shape, bits):
    half = 1 << bits - 1
    return rng.integers(-half, half, shape)


def remainder(integers, bits):
    return np.array(integers % (1 << bits), np.uint64)


@pytest.mark.parametrize(
    ("holder", "rows", "length", "count", "bits"),
    [
        (STATIC, 1, 1, 1, 1),
        (STATIC, 1, 9000, 6, 40),
        (MOVING, 3, 5001, 5, 32),
        (STATIC, 32, 300, 32, 48),
        (MOVING, 7, 100, 1, 33),
        (STATIC, 2, DEGREE, 3, 8),
    ],
)
def test_parts_add_up_to_the_products(two, rng, holder, rows, length, count, bits):
    y = words(rng, (rows, length), bits)
    x, z = words(rng, (count, length), bits), words(rng, (count, rows, length), bits)

    def run(session):
        encrypted = EncryptedRows(
            session, "t", holder, rows=rows, length=length, bits=bits, others=count
        )
        mine = session.pid == holder
        encrypted.encrypt(y if mine else None)
        products = encrypted.products(count, None if mine else x)
        blocks = encrypted.contractions(
            count, None if mine else lambda start, stop: z[..., start:stop]
        )
        # Twice, and more rows than were foreseen.
        more = encrypted.products(count + 1, None if mine else np.vstack([x, x[:1]]))
        return products, blocks, more

    (p, c, m), (p2, c2, m2) = two(run)
    last = np.uint64((1 << bits) - 1)
    wide = x.astype(object) @ y.T.astype(object)
    assert (p + p2 & last == remainder(wide, bits)).all()
    assert (m + m2 & last == remainder(np.vstack([wide, wide[:1]]), bits)).all()
    sums = (z.astype(object) * y.astype(object)).sum(axis=(1, 2))
    assert (c + c2 & last == remainder(sums, bits)).all()
    # Parts of zero would be the products themselves.
    assert bits < 32 or (p != m[:count]).all()


def test_rows_take_the_place_of_those_before(two, rng):
    y, x = words(rng, (2, 3, 5000), 40), words(rng, (1, 5000), 40)

    def run(session):
        encrypted = EncryptedRows(session, "t", STATIC, rows=3, length=5000, bits=40)
        parts = []
        for each in y:
            encrypted.encrypt(each if session.pid == STATIC else None)
            parts.append(encrypted.products(1, x if session.pid == MOVING else None))
        return np.concatenate(parts)

    parts = two(run)
    last = np.uint64((1 << 40) - 1)
    wide = (y.astype(object) * x.astype(object)).sum(axis=2)
    assert (parts[0] + parts[1] & last == remainder(wide, 40)).all()


def test_bytes_and_rounds_are_those_that_are_said(
    duo, tap, depth, payload_bytes, outcomes
):
    rows, length, count, bits = 5, 3000, 4, 40
    made = {}

    def prepare(session):
        made[session.pid] = EncryptedRows(
            session, "t", STATIC, rows=rows, length=length, bits=bits, others=count
        )
        assert session.encryption

    outcomes(duo, prepare)
    frames = tap(duo)
    y, x = np.ones((rows, length), int), np.ones((count, length), int)
    encrypted = made[MOVING]

    def send(session):
        made[session.pid].encrypt(y if session.pid == STATIC else None)

    outcomes(duo, send)
    expected = encrypted.ciphertexts * bfv.CIPHERTEXT + bfv.SEED_BYTES
    assert payload_bytes(frames) == expected
    frames.clear()

    def multiply(session):
        return made[session.pid].products(count, x if session.pid == MOVING else None)

    rounds = depth(duo)
    outcomes(duo, multiply)
    kept, wanted = bfv.kept_primes(1 << bits), rows * count
    back = encrypted.responses(count) * bfv.response_bytes(kept, 0)
    back += wanted * kept * bfv.RESIDUE_BYTES
    assert payload_bytes(frames) == encrypted.response_bytes(count) == back
    # All are sent before one is waited for; frames are pieces of them.
    assert {f[0] for f in frames} == {MOVING}
    assert rounds() >= 1


def test_everything_sent_back_is_masked(duo, tap, outcomes):
    """What goes back is uniform: alike for products of zeros and of large numbers."""
    made = {}

    def prepare(session):
        made[session.pid] = EncryptedRows(
            session, "t", STATIC, rows=1, length=8, bits=40
        )
        y = np.ones((1, 8), int) if session.pid == STATIC else None
        made[session.pid].encrypt(y)

    outcomes(duo, prepare)
    frames = tap(duo)
    x = np.zeros((1, 8), int)
    outcomes(duo, lambda s: made[s.pid].products(1, x if s.pid == MOVING else None))
    sent = b"".join(f[4] for f in frames)
    data = np.frombuffer(sent, np.uint8).reshape(-1, bfv.RESIDUE_BYTES)
    # Of seven bytes the lowest six are uniform; six standard deviations.
    for column in data[:, :6].T:
        mean = column.mean()
        assert abs(mean - 127.5) < 6 * 73.9 / np.sqrt(len(column))


def test_packing_fits_and_is_for_one_row_what_it_must_be():
    for rows, length, others in [(1, 1, 1), (32, 45000, 32), (1, 10**6, 12), (3, 7, 2)]:
        packing = choose_packing(rows, length, others)
        assert packing.block * packing.together * packing.others <= DEGREE
        assert min(packing) >= 1
        (*_, (_, last)) = packing.blocks(length)
        assert last == length


def test_numbers_without_room_are_refused_before_anything_is_sent(two):
    def run(session):
        with pytest.raises(ValueError, match="bits must be from 1 to 48"):
            EncryptedRows(session, "t", STATIC, rows=1, length=1, bits=49)
        with pytest.raises(NoiseBudgetError, match="use fewer digits"):
            EncryptedRows(session, "t", STATIC, rows=1, length=1 << 45, bits=48)
        return dict(session.ledger.sent)

    assert two(run) == [{}, {}]


@pytest.mark.parametrize(
    "sent",
    [
        np.full((1, bfv.CIPHERTEXT), 255, np.uint8),
        np.zeros((1, bfv.CIPHERTEXT + 1), np.uint8),
        np.zeros((1, bfv.CIPHERTEXT // 2), np.uint8),
        np.zeros((64, bfv.CIPHERTEXT), np.uint8),
    ],
    ids=["no residues", "longer", "of other parameters", "much too large"],
)
def test_what_is_no_ciphertext_is_refused(outcomes, duo, sent):
    def run(session):
        encrypted = EncryptedRows(session, "t", STATIC, rows=1, length=8, bits=40)
        assert session.encryption
        if session.pid == MOVING:
            return encrypted.encrypt()
        session.encryption._send_seed("t", bytes(bfv.SEED_BYTES))
        session.network.send(MOVING, "t", sent)
        return session.network.receive(MOVING, "t", np.empty(1, np.uint8))

    moving, _ = outcomes(duo, run)
    assert isinstance(moving, ProtocolError)
    assert "static owner" in str(moving)
    assert moving.culprit == STATIC


@pytest.mark.parametrize("wrong", [(3, 7), (1, 8), (3, 8, 1), float])
def test_what_are_no_rows_is_refused_before_anything_is_sent(two, wrong):
    rows = np.ones((3, 8)) if wrong is float else np.ones(wrong, int)

    def run(session):
        encrypted = EncryptedRows(session, "t", STATIC, rows=3, length=8, bits=40)
        if session.pid == STATIC:
            with pytest.raises(ValueError, match=r"integers of shape \(3, 8\)"):
                encrypted.encrypt(rows)
            return dict(session.ledger.sent)
        with pytest.raises(ValueError, match=r"integers of shape \(3, 8\)"):
            encrypted.products(3, rows)
        with pytest.raises(ValueError, match=r"integers of shape \(1, 3, 8\)"):
            encrypted.contractions(1, rows)
        return dict(session.ledger.sent)

    assert two(run) == [{}, {}]
