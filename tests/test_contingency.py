"""Tables and contractions on shares, against numpy on the clear."""

import numpy as np
import pytest
from scipy import stats

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
from dipy_ppir.mpc.fields import P61
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.protocols import share
from dipy_ppir.mpc.session import run_trio
from dipy_ppir.mpc.transport import DATA

BINS, CATEGORIES = 32, 28


class Case:
    """Random rows of both owners, and the sums they should give."""

    def __init__(self, n, p=4, seed=0, leave_out=True, bins=BINS, categories=CATEGORIES, width=5):
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
        return values, self.first[start:stop], self.moving_keep[start:stop].astype(np.uint8)

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


@pytest.mark.parametrize("n", [1, 37, BLOCK + 1])
def test_contract_shared(three, n):
    case = Case(n)
    p, table_bits = case.p, 10
    table = np.random.default_rng(1).uniform(-3, 3, (BINS, CATEGORIES))
    bound = 5 * 3.0

    def party(session):
        sums = case.start(session)
        shared = share(session, HELPER, table, table.shape, frac_bits=table_bits, bound=3)
        row = 2.0 ** band_bits(n, 4 + table_bits)
        scales = choose_scales(
            n * bound, bound * np.abs(case.columns).sum(axis=0), row * 2.0**table_bits
        )
        scales.row, scales.table = row, 2.0**table_bits
        mine = ()
        if session.pid == MOVING:
            mine = (case.derivative, lambda i, j: case.columns[i:j], scales)
        opened = session.open(sums.contract_shared(shared, p, *mine), "test-any", (MOVING,))
        return None if opened is None else scales.undo(opened)

    rounded = np.rint(table * 2.0**table_bits) / 2.0**table_bits
    z = ((case.dense(case.signed) @ rounded) * case.one_hot).sum(axis=1)
    error = np.abs(three(party)[MOVING] - z @ case.columns)
    assert (error <= 1e-3 * np.abs(case.columns).sum(axis=0)).all()


def test_the_largest_sums_fit(three):
    """Every term at its bound and of one sign: nothing wraps around p."""
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
    assert 2.0 ** (SUM_BITS - 4) < largest < 2.0**SUM_BITS, "bits are wasted, or too few"


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

N, P = 2 * BLOCK + 10, 6
COST = {
    # elements per sample, as the docstrings say
    "categories": CATEGORIES,
    "table": BINS + 1,
    "contract": CATEGORIES + 2 + P,
    "contract_shared": BINS + 3 * CATEGORIES + 2 + P,
}


def test_elements_are_as_stated(trio):
    case = Case(N, P)

    def party(session):
        moving = session.pid == MOVING
        sums = case.start(session)
        with session.phase("table"):
            sums.table(case.band if moving else None)
        scales = Scales(1.0, np.ones(P))
        columns = lambda i, j: case.columns[i:j]  # noqa: E731
        with session.phase("contract"):
            mine = (lambda i, j: case.rows[i:j], columns, scales) if moving else ()
            sums.contract(P, *mine)
        table = share(session, MOVING, np.zeros((BINS, CATEGORIES)), (BINS, CATEGORIES))
        with session.phase("contract_shared"):
            mine = (case.derivative, columns, scales) if moving else ()
            sums.contract_shared(table, P, *mine)
        return session.ledger.sent_by_phase()

    sent = run_trio(trio, party)
    for phase, elements in COST.items():
        total = sum(s.get(phase, 0) for s in sent)
        assert total == 8 * elements * N, phase
    assert "8 * (64 + p)" in evaluation_cost()
    # With a known histogram one more column checks the others.
    assert COST["table"] + COST["contract"] == 63 + P


def evaluation_cost():
    from dipy_ppir.align.imaffine import SecureMutualInformationMetric

    return SecureMutualInformationMetric.__doc__


def test_the_docstring_states_the_same():
    text = contingency.__doc__
    for line in (
        "share_categories   categories (once) ",
        "table              bins + 1 ",
        "contract           categories + 2 + columns ",
        "contract_shared    bins + 3 categories + 2 + columns ",
    ):
        assert line in text


# -- what is seen ------------------------------------------------------------


def test_what_is_sent_is_uniform_whatever_the_images(trio, tap):
    """Constant images of one bin: the hardest case for a mask."""
    n = 3000
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
        table = sums.table(case.band if moving else None)
        session.open(table, "test-moving", (MOVING,))
        scales = Scales(1.0, np.ones(2))
        columns = lambda i, j: case.columns[i:j]  # noqa: E731
        mine = (lambda i, j: case.rows[i:j], columns, scales) if moving else ()
        sums.contract(2, *mine)
        shared = share(session, MOVING, np.zeros((BINS, CATEGORIES)), (BINS, CATEGORIES))
        mine = (case.derivative, columns, scales) if moving else ()
        sums.contract_shared(shared, 2, *mine)

    run_trio(trio, party)
    data = [f for f in frames if f[2] == DATA]
    assert len(data) > 10
    for sender, receiver, _, op, payload in data:
        words = np.frombuffer(payload, dtype=np.uint64)
        if len(words) % n == 0 and len(words) > n:
            # each column by itself: a single bare one must not hide among many
            columns = words.reshape(n, -1).T
        else:
            columns = [words]
        for column in columns:
            for part in (column >> np.uint64(57), column & np.uint64(15)):
                counts = np.bincount(part.astype(np.int64), minlength=16)
                p = stats.chisquare(counts).pvalue
                assert p > 1e-8, (sender, receiver, op)


def test_field_of_the_sums():
    assert Contingency.field is P61
    for n in (0, 1, 2**10, 2**21, 2**31):
        assert n * 2.0 ** table_frac_bits(n) < 2.0**SUM_BITS
