"""Random oblivious transfers between two owners."""

import numpy as np
from oblivious import use_known_products
from parties import run_trio
import pytest

from dipy_ppir.mpc import bitslices, transfers
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.ledger import MOVING, STATIC


@pytest.fixture(autouse=True)
def known_products(monkeypatch):
    use_known_products(monkeypatch)


@pytest.mark.parametrize("sender", [MOVING, STATIC])
def test_the_pad_chosen_is_had_and_no_other(two, sender):
    def run(session):
        return [session.transfers.pads(n, sender) for n in (1, 5000, 3)]

    given = two(run)
    for sent, chosen in zip(
        given[sender], given[MOVING + STATIC - sender], strict=True
    ):
        pads = np.stack([sent.first, sent.second])
        picked = chosen.choices.astype(int), np.arange(len(chosen.choices))
        assert (pads[picked] == chosen.pad).all()
        assert not (pads[1 - picked[0], picked[1]] == chosen.pad).all(axis=1).any()
    # Random choices, and pads of which none comes twice.
    choices, pads = given[MOVING + STATIC - sender][1]
    assert 2200 < choices.sum() < 2800
    every = np.concatenate([*given[sender][1], *given[sender][0], *given[sender][2]])
    assert len(np.unique(every, axis=0)) == len(every)
    bits = np.unpackbits(pads.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.005


def test_products_of_random_bits(two):
    (a, u), (b, v) = two(lambda session: session.transfers.products(1000))
    assert ((a & b) == (u ^ v)).all()
    for bits in (a, b, u, v):
        # Seven standard deviations.
        assert abs(bitslices.spread(bits, 8000).mean() - 0.5) < 7 * 0.5 / np.sqrt(8000)


def test_batches_that_are_made_ahead(duo, depth, tap):
    rounds, frames = depth(duo), tap(duo)
    run_trio(duo, lambda session: session.transfers.reserve(1))
    smallest = transfers.SMALLEST
    assert rounds() == 2
    assert [(f[0], len(f[4])) for f in frames] == [
        (MOVING, 128 * 16),
        (STATIC, 3 * 32 * 32),
        (STATIC, 31 * (smallest + transfers.CHECKED) // 8),
        (STATIC, 129 * 16),
    ]
    assert 31 * transfers.CHECKED // 8 + 129 * 16 == 2560
    run_trio(duo, lambda session: session.transfers.pads(smallest, MOVING))
    assert len(frames) == 4
    for session in duo:
        assert session.transfers.left() == 0
    run_trio(duo, lambda session: session.transfers.reserve(transfers.LARGEST + 9))
    sent = sum(len(f[4]) for f in frames[4:])
    assert sent == 31 * (transfers.LARGEST // 8 + 2) + 2 * 2560
    # As many as all before, by default.
    count = len(frames)
    run_trio(
        duo, lambda session: session.transfers.pads(transfers.LARGEST + 17, MOVING)
    )
    sent = sum(len(f[4]) for f in frames[count:])
    assert sent == 31 * transfers.LARGEST // 8 + 2560


def test_what_is_sent_is_uniform(duo, tap):
    frames = tap(duo)
    run_trio(duo, lambda session: session.transfers.reserve(1 << 12, STATIC))
    for frame in frames:
        bits = np.unpackbits(np.frombuffer(frame[4], np.uint8))
        assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(len(bits))
    # Of no two columns do their differences say anything.
    columns = np.frombuffer(frames[2][4], np.uint8).reshape(31, -1)
    for other in columns[1:]:
        assert abs(bitslices.spread(columns[0] ^ other, 4096).mean() - 0.5) < 0.05


def test_one_leaf_of_each_tree_is_missing(two):
    """The sender has the columns of all others, and nothing of that one."""

    def run(session):
        session.transfers.reserve(1)
        direction = session.transfers._directions[MOVING]
        leaves = np.empty((32, 16, 8), np.uint64)
        for streams, tree in zip(direction._streams, leaves, strict=True):
            for stream, leaf in zip(streams, tree, strict=True):
                stream.fill(leaf)
        return leaves, direction._secret

    (known, secret), (leaves, _) = two(run)
    bits = bitslices.spread(secret, 128).reshape(32, 4)
    missing = (bits << np.arange(4)).sum(axis=1)
    for tree in range(32):
        same = (known[tree] == leaves[tree][np.arange(16) ^ missing[tree]]).all(axis=1)
        assert same.tolist() == [False] + 15 * [True]


def test_hashes_of_columns_are_linear_and_those_of_what_was_sent():
    rng = np.random.default_rng(3)
    columns = rng.integers(0, 256, (3, 1000), np.uint8)
    columns[2] = columns[0] ^ columns[1]
    key, sent = bytes(16), rng.integers(0, 256, 100, np.uint8)
    first, second, both = transfers._checked(key, sent, columns)
    assert (first ^ second == both).all()
    assert (first != second).any()
    assert not transfers._checked(key, sent, np.zeros_like(columns)).any()
    other = sent.copy()
    other[50] ^= 1
    for again in ((key, other), (bytes([1]) * 16, sent)):
        assert (transfers._checked(*again, columns) != [first, second, both]).any()


@pytest.mark.parametrize("trees", [slice(1, 32), slice(1, 2)])
def test_a_chooser_whose_trees_do_not_agree_is_found_out(
    outcomes, duo, monkeypatch, trees
):
    """It would read bits of s: of a tree, unless all four of them are zero."""
    inner = duo[STATIC].network.send

    def send(peer, name, array):
        if getattr(array, "shape", ())[:1] == (31,):
            # In its place, so that the hashes are of what is sent.
            array[trees.start - 1 : trees.stop - 1, 77] ^= 4
        inner(peer, name, array)

    monkeypatch.setattr(duo[STATIC].network, "send", send)
    secret = []

    def run(session):
        direction = session.transfers._directions[MOVING]
        try:
            session.transfers.reserve(1)
        finally:
            if session.pid == MOVING:
                bits = bitslices.spread(direction._secret, 128).reshape(32, 4)
                secret.append(bits[trees].any())
        return True

    found, _ = outcomes(duo, run)
    if secret[0]:
        assert isinstance(found, ProtocolError)
        assert found.culprit == STATIC
        assert "static owner made transfers that do not belong together" in str(found)
    else:
        assert found is True
