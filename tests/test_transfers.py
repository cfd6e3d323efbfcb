"""Random oblivious transfers between two owners."""

import numpy as np
from oblivious import use_known_products
from parties import run_trio
import pytest

from dipy_ppir.mpc import bitslices, transfers
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
        assert abs(bitslices.spread(bits, 8000).mean() - 0.5) < 0.03


def test_batches_that_are_made_ahead(duo, depth, tap):
    rounds, frames = depth(duo), tap(duo)
    run_trio(duo, lambda session: session.transfers.reserve(1))
    smallest = transfers.SMALLEST
    assert rounds() == 2
    assert [(f[0], len(f[4])) for f in frames] == [
        (MOVING, 128 * 16),
        (STATIC, 3 * 32 * 32),
        (STATIC, 31 * smallest // 8),
    ]
    run_trio(duo, lambda session: session.transfers.pads(smallest, MOVING))
    assert len(frames) == 3
    for session in duo:
        assert session.transfers.left() == 0
    run_trio(duo, lambda session: session.transfers.reserve(transfers.LARGEST + 9))
    assert sum(len(f[4]) for f in frames[3:]) == 31 * (transfers.LARGEST // 8 + 2)
    # As many as all before, by default.
    count = len(frames)
    run_trio(
        duo, lambda session: session.transfers.pads(transfers.LARGEST + 17, MOVING)
    )
    assert sum(len(f[4]) for f in frames[count:]) == 31 * transfers.LARGEST // 8


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
