"""Tables and contractions on shares, against numpy on the clear."""

import re

from noise import check_uniform
import numpy as np
from parties import run_trio
import pytest

from dipy_ppir.mpc import contingency
from dipy_ppir.mpc.contingency import (
    BLOCK,
    SUM_BITS,
    Contingency,
    Scales,
    band_bits,
    choose_scales,
    table_frac_bits,
)
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R64
from dipy_ppir.mpc.frame import DATA, operation_code
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC

BINS, CATEGORIES = 32, 28


class Case:
    """Random rows of both owners, and the sums they should give."""

    def __init__(
        self, n, p=4, seed=0, leave_out=True, bins=BINS, categories=CATEGORIES, width=5
    ):
        rng = np.random.default_rng(seed)
        self.n, self.p, self.bins, self.categories = n, p, bins, categories
        self.index = rng.integers(0, categories, n).astype(np.int32)
        self.static_keep = rng.random(n) < (0.8 if leave_out else 2)
        self.moving_keep = rng.random(n) < (0.7 if leave_out else 2)
        self.first = rng.integers(0, bins - width + 1, n).astype(np.int32)
        self.weights = rng.random((n, width)) * self.moving_keep[:, None]
        self.signed = rng.uniform(-1, 1, (n, width)) * self.moving_keep[:, None]
        self.rows = rng.uniform(-8, 8, (n, categories))
        self.columns = rng.normal(size=(n, p)) * 10.0 ** np.arange(-3, p - 3)
        self.one_hot = np.eye(categories)[self.index] * self.static_keep[:, None]

    def dense(self, banded):
        out = np.zeros((self.n, self.bins))
        at = self.first[:, None] + np.arange(banded.shape[1])
        np.put_along_axis(out, at, banded, axis=1)
        return out

    def start(self, session):
        sums = Contingency(session, self.n, self.categories, self.bins)
        mine = (self.index, self.static_keep) if session.pid == STATIC else ()
        with session.phase("categories"):
            sums.share_categories(*mine)
        return sums

    def band(self, start, stop, scale):
        values = np.rint(self.weights[start:stop] * scale).astype(np.int64)
        return (
            values,
            self.first[start:stop],
            self.moving_keep[start:stop].astype(np.uint8),
        )

    def derivative(self, start, stop, scale):
        values = np.rint(self.signed[start:stop] * scale).astype(np.int64)
        return values, self.first[start:stop]


SIZES = [1, 2, 37, BLOCK - 1, BLOCK, BLOCK + 1]


@pytest.mark.parametrize("leave_out", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("n", SIZES)
def test_table(three, n, leave_out):
    case = Case(n, leave_out=leave_out)

    def party(session):
        sums = case.start(session)
        band = case.band if session.pid == MOVING else None
        table = sums.table(band)
        assert table.degree == 2
        # twice, as at every evaluation: the second has fresh masks
        again = session.open(sums.table(band), "test-any", (MOVING,))
        return session.open(table, "test-any", (MOVING,)), again

    first, second = three(party)[MOVING]
    expected = case.dense(case.weights).T @ case.one_hot
    counts = case.moving_keep.astype(float) @ case.one_hot
    for table in (first, second):
        assert np.abs(table[:-1] - expected).max() <= n * 2.0 ** -table_frac_bits(n)
        assert (table[-1] == counts).all(), "counts are exact"


@pytest.mark.parametrize("group", [1, 2, 3])
def test_the_helper_is_not_sent_too_much_ahead(three, monkeypatch, group):
    """It says when it is done with a group of blocks; two of them may wait."""
    case = Case(5 * BLOCK + 3)
    size = (case.bins + 1) * BLOCK * 8
    monkeypatch.setattr(contingency, "AHEAD", group * size)

    def party(session):
        sums = case.start(session)
        before = session.ledger.rounds.total()
        table = sums.table(case.band if session.pid == MOVING else None)
        waited = session.ledger.rounds.total() - before
        return session.open(table, "test-any", (MOVING,)), waited

    (table, waited), _, _ = three(party)
    expected = case.dense(case.weights).T @ case.one_hot
    assert np.abs(table[:-1] - expected).max() <= case.n * 2.0**-20
    # Of six blocks, the groups but the first two.
    assert waited == {1: 4, 2: 1, 3: 0}[group]


@pytest.mark.parametrize("mixed", ["first", "last"])
def test_blocks_with_and_without_a_mask_together(three, mixed):
    """Full blocks and partly masked ones are counted in different ways."""
    case = Case(2 * BLOCK + 3, leave_out=False)
    case.moving_keep[5 if mixed == "first" else -2] = False
    case.weights *= case.moving_keep[:, None]

    def party(session):
        sums = case.start(session)
        table = sums.table(case.band if session.pid == MOVING else None)
        return session.open(table, "test-any", (MOVING,))

    table = three(party)[MOVING]
    assert (table[-1] == case.moving_keep.astype(float) @ case.one_hot).all()


@pytest.mark.parametrize("shape", [(6, 2), (7, 3), (64, 60)])
def test_other_numbers_of_bins(three, shape):
    case = Case(300, bins=shape[0], categories=shape[1], width=4)

    def party(session):
        sums = case.start(session)
        table = sums.table(case.band if session.pid == MOVING else None)
        return session.open(table, "test-any", (MOVING,))

    expected = case.dense(case.weights).T @ case.one_hot
    assert np.abs(three(party)[MOVING][:-1] - expected).max() < 1e-6


@pytest.mark.parametrize("p", [1, 4, 12])
@pytest.mark.parametrize("n", SIZES)
def test_contract(three, n, p):
    case = Case(n, p)
    terms = 8 * np.abs(case.columns).sum(axis=0)

    def party(session):
        sums = case.start(session)
        scales = choose_scales(8.0 * n, terms)
        mine = ()
        if session.pid == MOVING:
            mine = (lambda i, j: case.rows[i:j], lambda i, j: case.columns[i:j], scales)
        opened = session.open(sums.contract(p, *mine), "test-any", (MOVING,))
        return None if opened is None else scales.undo(opened)

    z = (case.rows * case.one_hot).sum(axis=1)
    expected = z @ case.columns
    error = np.abs(three(party)[MOVING] - expected)
    assert (error <= 1e-6 * np.maximum(terms / 8, 1e-300)).all()


@pytest.mark.parametrize("leave_out", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("n", [1, 37, BLOCK + 1])
def test_contract_shared(three, ring_array, n, leave_out):
    case = Case(n, leave_out=leave_out)
    p, table_bits = case.p, 10
    table = np.random.default_rng(1).uniform(-3, 3, (BINS, CATEGORIES))
    integers = np.rint(table * 2.0**table_bits).astype(np.int64)
    bound = 5 * 3.0

    def party(session):
        sums = case.start(session)
        shared = ring_array(session, integers, frac_bits=table_bits, owners=True)
        row = 2.0 ** band_bits(n, 4 + table_bits)
        scales = choose_scales(
            n * bound,
            bound * np.abs(case.columns).sum(axis=0),
            row * 2.0**table_bits,
        )
        scales.row, scales.table = row, 2.0**table_bits
        mine = ()
        if session.pid == MOVING:
            mine = (case.derivative, lambda i, j: case.columns[i:j], scales)
        result = sums.contract_shared(shared, p, *mine)
        assert (result.field, result.degree) == (R64, 2)
        opened = session.open(result, "test-any", (MOVING,))
        return None if opened is None else scales.undo(opened)

    rounded = integers / 2.0**table_bits
    z = ((case.dense(case.signed) @ rounded) * case.one_hot).sum(axis=1)
    error = np.abs(three(party)[MOVING] - z @ case.columns)
    assert (error <= 1e-4 * np.abs(case.columns).sum(axis=0)).all()


def test_the_largest_sums_fit(three):
    """Every term at its bound and of one sign: nothing wraps around 2**64."""
    n = 1000
    case = Case(n, 2, leave_out=False)
    case.rows[...] = 8.0
    case.columns[...] = np.array([5.0, -3.0])

    def party(session):
        sums = case.start(session)
        scales = choose_scales(8.0 * n, 8 * np.abs(case.columns).sum(axis=0))
        mine = ()
        if session.pid == MOVING:
            mine = (lambda i, j: case.rows[i:j], lambda i, j: case.columns[i:j], scales)
        opened = session.open(sums.contract(2, *mine), "test-any", (MOVING,))
        return None if opened is None else (scales.undo(opened), np.abs(opened).max())

    sums, largest = three(party)[MOVING]
    assert np.allclose(sums, [8 * 5.0 * n, -8 * 3.0 * n], rtol=1e-9)
    assert 2.0 ** (SUM_BITS - 4) < largest < 2.0**SUM_BITS, (
        "bits are wasted, or too few"
    )


@pytest.mark.parametrize("row_sum", [1e-12, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("weighted", [0.0, 1e-300, 1e-9, 1.0, 1e12])
def test_scales_leave_room_for_rounding(row_sum, weighted):
    scales = choose_scales(row_sum, np.array([weighted]))
    assert np.log2(scales.row) % 1 == 0
    assert (np.log2(scales.columns) % 1 == 0).all()
    assert weighted * scales.row * scales.columns[0] <= 2.0 ** (SUM_BITS - 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scales_of_what_is_not_finite(bad):
    for arguments in ((bad, np.ones(2)), (1.0, np.array([1.0, bad]))):
        with pytest.raises(FixedPointOverflowError, match="not finite"):
            choose_scales(*arguments)


def test_rows_beyond_their_scale_are_refused_by_their_owner(trio, outcomes, tap):
    case = Case(10)
    case.rows[3, 3] = 2.0**60
    frames = tap(trio)

    def party(session):
        sums = case.start(session)
        mine = ()
        if session.pid == MOVING:
            one = Scales(1.0, np.ones(4))
            mine = (lambda i, j: case.rows[i:j], lambda i, j: case.columns[i:j], one)
        return sums.contract(4, *mine)

    errors = outcomes(trio, party)
    assert isinstance(errors[MOVING], FixedPointOverflowError)
    assert not [f for f in frames if f[0] == MOVING and f[2] == DATA]


# -- cost --------------------------------------------------------------------

P = 6
#: Elements per sample, in words and in numbers, and rounds before an opening.
COST = {
    "share_categories": ("categories", CATEGORIES, 1),
    "table": ("bins + 1", BINS + 1, 1),
    "contract": ("categories + columns + 2", CATEGORIES + P + 2, 2),
    "contract_shared": (
        "2 bins + categories + columns + 2",
        2 * BINS + CATEGORIES + P + 2,
        2,
    ),
}


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("step", COST)
def test_elements_and_rounds_are_as_stated(trio, depth, ring_array, step, blocks):
    n = (blocks - 1) * BLOCK + 10
    case = Case(n, P)
    zeros = np.zeros((BINS, CATEGORIES), dtype=np.int64)

    def prepare(session):
        return case.start(session)

    def party(session):
        moving = session.pid == MOVING
        own = (lambda i, j: case.columns[i:j], Scales(1.0, np.ones(P)))
        known = (lambda i, j: case.rows[i:j], *own) if moving else ()
        secret = (case.derivative, *own) if moving else ()
        sums = prepared[session.pid]
        with session.phase(step):
            if step == "share_categories":
                case.start(session)
            if step == "table":
                sums.table(case.band if moving else None)
            if step == "contract":
                sums.contract(P, *known)
            if step == "contract_shared":
                table = ring_array(session, zeros, owners=True)
                sums.contract_shared(table, P, *secret)

    prepared = run_trio(trio, prepare)
    rounds = depth(trio)
    before = [sum(s.ledger.sent.values()) for s in trio]
    run_trio(trio, party)
    sent = [sum(s.ledger.sent.values()) for s in trio]
    _, elements, expected = COST[step]
    assert sum(sent) - sum(before) == 8 * elements * n
    assert rounds() == expected, "whatever the number of blocks"


@pytest.mark.parametrize("step", COST)
def test_the_docstrings_state_the_same(step):
    elements, _, rounds = COST[step]
    row = rf"^{step} +{re.escape(elements)}( \(once\))? +{rounds}( \+|$)"
    assert re.search(row, contingency.__doc__, re.MULTILINE)
    method = " ".join(getattr(Contingency, step).__doc__.replace("`", "").split())
    assert f"Rounds: {rounds}. Elements: {elements} per sample" in method


# -- what is seen ------------------------------------------------------------


def columns_of(frames, n):
    """Each column of every array by itself: one bare column must not hide."""
    for sender, receiver, kind, op, payload in frames:
        if kind != DATA:
            continue
        words = np.frombuffer(payload, dtype=np.uint64)
        whole = len(words) % n == 0
        for column in words.reshape(n, -1).T if whole else [words]:
            yield (sender, receiver, op), column


def test_what_is_sent_is_uniform_whatever_the_images(trio, tap, ring_array):
    """Constant images of one bin: the hardest case for a mask."""
    n = BLOCK
    case = Case(n, 2, leave_out=False)
    case.index[...] = 3
    case.first[...] = 7
    case.weights[...] = 0.2
    case.signed[...] = 0.0
    case.rows[...] = 1.0
    case.columns[...] = 0.0
    case.one_hot = np.eye(CATEGORIES)[case.index]
    frames = tap(trio)

    def party(session):
        moving = session.pid == MOVING
        sums = case.start(session)
        for _ in range(2):
            table = sums.table(case.band if moving else None)
            session.open(table, "test-moving", (MOVING,))
        own = (lambda i, j: case.columns[i:j], Scales(1.0, np.ones(2)))
        mine = (lambda i, j: case.rows[i:j], *own) if moving else ()
        sums.contract(2, *mine)
        shared = ring_array(
            session, np.zeros((BINS, CATEGORIES), dtype=np.int64), owners=True
        )
        mine = (case.derivative, *own) if moving else ()
        sums.contract_shared(shared, 2, *mine)

    run_trio(trio, party)
    seen = {}
    for where, column in columns_of(frames, n):
        seen[where] = seen.get(where, 0) + 1
        check_uniform([column >> np.uint64(60), column & np.uint64(15)], where)
    # What was looked at: both evaluations' arrays, column by column.
    opened = operation_code("open-test-moving")
    assert seen == {
        (STATIC, HELPER, operation_code("categories")): CATEGORIES,
        (MOVING, HELPER, operation_code("band")): 2 * (BINS + 1),
        (STATIC, MOVING, opened): 2,
        (HELPER, MOVING, opened): 2,
        (MOVING, HELPER, operation_code("rows")): 2 * CATEGORIES,
        (MOVING, HELPER, operation_code("columns")): 2 * 2,
        (MOVING, HELPER, operation_code("derivative")): BINS,
        (STATIC, HELPER, operation_code("columns-of-table")): BINS,
        (STATIC, HELPER, operation_code("part")): 2,
        (HELPER, STATIC, operation_code("part")): 2,
    }
    # No mask serves twice: under constant images its words would come again. Two of
    # 5e5 random words are the same once in 1e8 runs.
    words = np.concatenate([column for _, column in columns_of(frames, n)])
    assert len(np.unique(words)) == len(words)


def test_field_of_the_sums():
    assert Contingency(None, 1, 2, 3).field is R64
    for n in (0, 1, 2**10, 2**21, 2**31):
        assert n * 2.0 ** table_frac_bits(n) < 2.0**SUM_BITS


def test_parts_of_z_are_hidden_from_those_who_know_the_rows_they_come_from(trio, tap):
    """By itself an unhidden part looks uniform too; beside the other messages not."""
    n, k = 1000, 5
    case = Case(n, 2, leave_out=False)
    case.rows[...] = k
    frames = tap(trio)

    def party(session):
        sums = case.start(session)
        own = (lambda i, j: case.columns[i:j], Scales(1.0, np.ones(2)))
        sums.contract(
            2, *((lambda i, j: case.rows[i:j], *own) if session.pid == MOVING else ())
        )

    run_trio(trio, party)

    def message(sender, receiver, name):
        (payload,) = (
            f[4]
            for f in frames
            if f[:2] == (sender, receiver) and f[2:4] == (DATA, operation_code(name))
        )
        return np.frombuffer(payload, dtype=np.uint64).reshape(n, -1)

    b = message(STATIC, HELPER, "categories")
    selected = (message(MOVING, HELPER, "rows") * b).sum(axis=1)
    # What the receiver would be left with if the part were the bare product.
    left = {
        STATIC: message(HELPER, STATIC, "part")[:, 0] - selected,
        HELPER: message(STATIC, HELPER, "part")[:, 0] + selected - k * b.sum(axis=1),
    }
    for receiver, words in left.items():
        check_uniform([words >> np.uint64(60), words & np.uint64(15)], receiver)
