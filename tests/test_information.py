"""Mutual information and its gradient on shares, against the formulas in the clear."""

import re

import noise
from noise import check_uniform
import numpy as np
from numpy.testing import assert_array_equal
from parties import run_trio
import pytest
from samples import DIGITS, Samples

from dipy_ppir.mpc import contingency
from dipy_ppir.mpc import information as module
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.contingency import BLOCK, Contingency, table_frac_bits
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R32, R64, R128
from dipy_ppir.mpc.frame import DATA, operation_code
from dipy_ppir.mpc.information import (
    DIFFERENCE_BITS,
    Information,
)
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.literal import LiteralContingency
from dipy_ppir.mpc.protocols import lift

UNIT = 2.0**-DIGITS


@pytest.fixture(autouse=True)
def same_randomness(monkeypatch):
    """Rounding is by chance in part."""
    noise.fix_randomness(monkeypatch)


def opened(three, samples, **options):
    def party(session):
        found = samples.evaluate(session, **options)
        return [
            None if a is None else session.open(a, "test-any", (MOVING,)) for a in found
        ]

    return three(party)[MOVING]


# -- evaluations -------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("n", [7, 400, BLOCK + 5])
def test_value_and_gradient(three, n, dim, masked):
    samples = Samples(n, dim, masked=masked, seed=n)
    value, gradient, _ = opened(three, samples)
    expected, slope, _ = samples.clear()
    # Sums of logarithms that are off by 1e-6, and digits that are dropped; a masked
    # one is divided by a number that is right to 1e-6, and counts a unit too much.
    counted = (samples.keep_static & samples.keep_moving).sum()
    off = 4e-6 + masked * 2.0**-samples.frac_bits / counted
    assert abs(value[0] / 128 - expected) < off
    # Each difference of logarithms is off by two units at most; they are rounded by
    # chance, and so is the moving owner's gradient.
    size = (
        np.abs(samples.matrix)
        @ np.abs(np.einsum("nd,ne->nde", samples.gradient, samples.y)).reshape(n, -1).T
    )
    bound = 2.5 * 2.0**-DIFFERENCE_BITS * size.sum(axis=1)
    assert np.all(np.abs(gradient / 128 - slope) < bound / counted + off)
    # It is not only zero.
    assert np.abs(slope).max() > 1e-4


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_slopes(three, masked):
    samples = Samples(3000, masked=masked)
    _, _, slopes = opened(three, samples, slopes=True)
    _, _, expected = samples.clear()
    # Logarithms are off by a unit: slopes by as much.
    bound = 2.5 * 2.0**-DIFFERENCE_BITS * np.sqrt(expected) + 1e-5
    assert np.all(np.abs(slopes - expected) < bound)
    assert expected.max() > 0.01


def test_images_without_structure(three):
    """One category, one bin, no gradient: nothing overflows, and nothing is known."""
    samples = Samples(300, seed=1)
    samples.index[...], samples.first[...] = 3, 2
    samples.weights[...] = [0, 1, 0, 0]
    samples.gradient[...] = 0
    value, gradient, slopes = opened(three, samples, slopes=True)
    assert abs(value[0]) < 128 * 4e-6
    assert_array_equal(np.abs(gradient) <= UNIT, True)
    assert np.isfinite(slopes).all()


def test_no_sample_counts(three):
    """The masks have nothing in common."""
    samples = Samples(300, masked=True)
    samples.keep_static[...] = False
    value, gradient, _ = opened(three, samples)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


# -- sums --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_moments_are_exact(three, seed):
    """In the ring of 64 bits, though what is selected is in one of 32.

    So many samples have masks that wrap around in every way.
    """
    n, dim, bins, categories = 3000, 3, 6, 4
    rng = np.random.default_rng(seed)
    index = rng.integers(0, categories, n).astype(np.int32)
    first = rng.integers(0, bins - 3, n).astype(np.int32)
    weights = rng.integers(-(1 << 9), 1 << 9, (n, 4))
    table = rng.integers(-(1 << 17), 1 << 17, (bins, categories))
    gradient = rng.integers(-(1 << 20), 1 << 20, (n, dim))
    y = rng.integers(-200, 200, (n, dim + 1))

    def party(session):
        sums = Contingency(session, n, categories, bins, R32)
        sums.share_categories(*((index,) if session.pid == STATIC else ()))

        def band(start, stop, scale):
            return weights[start:stop], first[start:stop], np.ones(stop - start, "u1")

        moving = session.pid == MOVING
        sums.table(band if moving else None, counted=False, kept=True)
        parts = rng_parts(table.shape)
        parts[MOVING] = R32.encode_int(table) - parts[STATIC]
        parts[HELPER] = 0
        shared = SharedArray(R32, parts[session.pid], 2, 0, 1 << 20)
        mine = (band, lambda i, j: gradient[i:j]) if moving else ()
        moments = sums.moments(shared, lambda i, j: y[i:j], dim, *mine)
        assert moments.field is R64
        return session.open(moments, "test-any", (MOVING,), raw=True)

    dense = np.zeros((n, bins), dtype=object)
    for i in range(n):
        dense[i, first[i] : first[i] + 4] = [int(w) for w in weights[i]]
    z = (dense * table.astype(object).T[index]).sum(axis=1)
    assert max(abs(z)) < 1 << 29
    expected = [
        int((z * gradient[:, d].astype(object) * y[:, e].astype(object)).sum())
        for d in range(dim)
        for e in range(dim + 1)
    ]
    assert three(party)[MOVING].view(np.int64).tolist() == expected


def rng_parts(shape):
    return np.random.default_rng(9).integers(0, 1 << 32, (3, *shape), dtype=np.uint32)


@pytest.mark.parametrize(("ring", "edge"), [(R32, (1 << 29) - 1), (R64, (1 << 61) - 1)])
def test_lifting_is_exact(three, ring_array, ring, edge):
    values = [0, 1, -1, edge, -edge, edge // 2, -(edge // 2), 12345] * 500

    def party(session):
        array = ring_array(session, values, frac_bits=3, bound=edge, ring=ring)
        lifted = lift(session, array)
        assert (lifted.field, lifted.frac_bits) == (R128, 3)
        if session.pid == HELPER:
            assert not lifted.share.any()
        with pytest.raises(FixedPointOverflowError, match="too large to be lifted"):
            lift(session, ring_array(session, [1], bound=edge + 1, ring=ring))
        return session.open(lifted, "test-any", (MOVING,), raw=True)

    opened = R128.to_ints(three(party)[MOVING])
    signed = [int(v) - (int(v) >> 127 << 128) for v in opened]
    assert signed == values


@pytest.mark.parametrize(
    ("samples", "bits"), [(1, 12), (1 << 17, 12), (8_700_000, 6), ((1 << 26) - 1, 4)]
)
def test_weights_have_bits_that_fit(samples, bits):
    assert table_frac_bits(samples, R32) == bits
    assert samples << bits < 1 << 30


def test_too_many_samples_are_refused():
    with pytest.raises(FixedPointOverflowError, match="smaller sampling_proportion"):
        table_frac_bits(1 << 26, R32)


# -- cost and what crosses the wire ------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dim", [2, 3])
def test_rounds_and_bytes_are_as_stated(trio, tap, depth, payload_bytes, dim, masked):
    """What a sample adds; and the chain of messages, of a table small enough."""
    spent = []
    for n in (100, 400):
        samples = Samples(n, dim, masked=masked)
        steps = {}

        def begin(session, samples=samples, steps=steps):
            steps[session.pid] = information = Information(
                session,
                samples.n,
                samples.categories,
                samples.bins,
                samples.positions,
                samples.dim,
                masked=samples.masked,
                digits=DIGITS,
            )
            mine = (samples.index,) if session.pid == STATIC else ()
            information.share_categories(*mine)

        def evaluate(session, samples=samples, steps=steps):
            moving = samples.moving() if session.pid == MOVING else None
            steps[session.pid].evaluate(1.0, samples.p, moving)

        frames, count = tap(trio), depth(trio)
        run_trio(trio, begin)
        assert payload_bytes(frames) == 4 * samples.categories * n
        frames.clear()
        before = count()
        run_trio(trio, evaluate)
        rounds = count() - before
        spent.append(payload_bytes(frames))
    bins, categories = samples.bins, samples.categories
    each = 4 * bins + 4 * masked + 4 * (bins + categories + 2) + 12 * dim
    assert (spent[1] - spent[0]) / 300 == each
    stated = " ".join(module.__doc__.split())
    most = 13 + 4 * masked
    assert f"Rounds of an evaluation: {13}, and {4} where samples may be left" in stated
    assert rounds <= most
    assert "``4 bins`` for the table, 4 more where samples may be left out" in stated
    assert "``4 (bins + categories + 2) + 12 d`` for S" in stated
    for b, total in re.findall(r"(\d+) with (\d+)", stated):
        if int(total) in (16, 32):
            b, total = int(total), int(b)
            assert 4 * b + 4 * (2 * b - 4 + 2) + 36 == total


def columns_of(frames, rows):
    """Words of recorded frames as columns of so many rows."""
    for sender, receiver, _, op, payload in frames:
        if len(payload) % (4 * rows) == 0:
            words = np.frombuffer(payload, dtype=np.uint32)
            for column in words.reshape(rows, -1).T:
                yield (sender, receiver, op), column


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_what_is_sent_is_uniform(trio, tap, masked):
    """Every column of every array that has a row for each sample."""
    n = 2000
    samples = Samples(n, masked=masked)
    samples.index[...], samples.first[...] = 3, 2
    samples.weights[...], samples.gradient[...], samples.y[...] = 0.25, 0.5, 1
    frames = tap(trio)
    run_trio(trio, samples.evaluate)
    seen = {}
    for where, column in columns_of([f for f in frames if f[2] == DATA], n):
        seen[where] = seen.get(where, 0) + 1
        check_uniform([column >> np.uint32(28), column & np.uint32(15)], where)
    names = {
        (STATIC, HELPER): ["categories", "columns-of-table"],
        (MOVING, HELPER): ["band", "rows", "gradient", "wraps"],
        (STATIC, MOVING): ["hidden"],
        (HELPER, MOVING): ["hidden"],
    }
    for (sender, receiver), each in names.items():
        for name in each:
            assert (sender, receiver, operation_code(name)) in seen, name


def test_what_the_moving_owner_sees_of_a_sample_is_uniform(trio, tap):
    """Both parts together too: the sum is what is hidden, not each part alone."""
    n = 2000
    samples = Samples(n)
    frames = tap(trio)
    run_trio(trio, samples.evaluate)
    parts = [
        np.frombuffer(f[4], dtype=np.uint32)
        for f in frames
        if f[1] == MOVING and f[3] == operation_code("hidden")
    ]
    assert len(parts) == 2
    total = parts[0] + parts[1]
    check_uniform([total >> np.uint32(28), total & np.uint32(15)])


def test_what_hides_a_sample_is_known_to_the_others_and_fresh(trio, monkeypatch):
    """The parts of z look random anyway; but the moving owner knows what from."""
    n, drawn = 2000, {}
    inner = contingency.hidden_mask

    def recorded(session, peer, party, shape):
        mask = inner(session, peer, party, shape)
        drawn.setdefault((session.pid, party), []).append(mask.copy())
        return mask

    monkeypatch.setattr(contingency, "hidden_mask", recorded)
    samples = Samples(n)
    for _ in range(2):
        run_trio(trio, samples.evaluate)
    assert set(drawn) == {(p, q) for p in (STATIC, HELPER) for q in (STATIC, HELPER)}
    every = []
    for party in (STATIC, HELPER):
        both = drawn[STATIC, party], drawn[HELPER, party]
        assert_array_equal(*both)
        every += both[0]
    for words in (*every, every[0] + every[2], every[0] - every[1]):
        check_uniform([words >> np.uint32(28), words & np.uint32(15)])


def test_the_helpers_part_of_what_is_lifted_is_hidden(trio, tap):
    """It is another for each owner, who could compare them."""
    frames = tap(trio)
    run_trio(trio, Samples(500).evaluate)
    sent = [f[4] for f in frames if f[3] == operation_code("lifted") and f[0] == HELPER]
    assert len(sent) == 2
    assert sent[0] != sent[1]


# -- literally, by MPyC --------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_sums_are_those_of_mpyc_to_the_last_bit(three, masked):
    """The packed kernels against products of MPyC's arrays, of the same integers."""
    samples = Samples(150, masked=masked)
    rng = np.random.default_rng(4)
    table = rng.integers(-(1 << 15), 1 << 15, (samples.bins, samples.categories))

    def party(session):
        moving = samples.moving() if session.pid == MOVING else None
        parts = rng_parts(table.shape)
        parts[MOVING] = R32.encode_int(table) - parts[STATIC]
        parts[HELPER] = 0
        opened = []
        for kind in (Contingency, LiteralContingency):
            ring = (R32,) if kind is Contingency else ()
            sums = kind(session, samples.n, samples.categories, samples.bins, *ring)
            mine = samples.index, samples.keep_static if masked else None
            sums.share_categories(*(mine if session.pid == STATIC else ()))
            shared = SharedArray(R32, parts[session.pid], 2, 0, 1 << 20)
            band = moving and moving.band
            first = sums.table(band, counted=masked, kept=True)
            second = sums.moments(
                shared, samples.positions, samples.dim, band, moving and moving.gradient
            )
            opened += [
                session.open(a, "test-any", (MOVING,), raw=True)
                for a in (first, second)
            ]
        return opened

    table_a, moments_a, table_b, moments_b = three(party)[MOVING]
    assert_array_equal(table_a, table_b)
    assert_array_equal(moments_a, moments_b)
    assert table_a.any() and moments_a.any()


def test_too_many_samples_for_mpyc_are_refused():
    with pytest.raises(FixedPointOverflowError, match='leave backend="mpyc" out'):
        LiteralContingency(None, 20_001, 8, 12)
