"""Mutual information for two owners alone, against the formulas in the clear."""

import re

import noise
import numpy as np
from numpy.testing import assert_array_equal
from oblivious import use_known_products
from parties import run_trio
import pytest
from samples import DIGITS, Samples

from dipy_ppir.mpc import bfv, worlds
from dipy_ppir.mpc import pairinformation as module
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.frame import operation_code
from dipy_ppir.mpc.information import DIFFERENCE_BITS, Information
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.pair import OWNERS
from dipy_ppir.mpc.pairinformation import ROUNDED_BITS, PairInformation
from dipy_ppir.mpc.transfers import COLUMNS

UNIT = 2.0**-DIGITS


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Products that are dealt, and rounding that is the same in every run."""
    noise.fix_randomness(monkeypatch)
    use_known_products(monkeypatch)


def opened(two, samples, **options):
    def party(session):
        found = samples.evaluate(session, **options)
        return [
            None if a is None else session.open(a, "test-any", (MOVING,)) for a in found
        ]

    return two(party)[MOVING]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("n", [7, 400, 5000])
def test_value_and_gradient(two, n, dim, masked):
    samples = Samples(n, dim, masked=masked, seed=n)
    value, gradient, _ = opened(two, samples)
    expected, slope, _ = samples.clear()
    # Sums of logarithms that are off by 2e-6, of three numbers; a masked one is
    # divided by a number that is right to 1e-6, and counts a unit too much.
    counted = (samples.keep_static & samples.keep_moving).sum()
    off = 6e-6 + masked * 2.0**-samples.frac_bits / counted
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
def test_slopes(two, masked):
    samples = Samples(3000, masked=masked)
    _, _, slopes = opened(two, samples, slopes=True)
    _, _, expected = samples.clear()
    # Logarithms are off by a unit: slopes by as much.
    bound = 2.5 * 2.0**-DIFFERENCE_BITS * np.sqrt(expected) + 1e-5
    assert np.all(np.abs(slopes - expected) < bound)
    assert expected.max() > 0.01


def test_many_evaluations_of_one_image(two):
    """What is encrypted once serves every evaluation."""
    samples = Samples(900, masked=True)

    def party(session):
        information, moving = samples.begin(session)
        return [
            session.open(
                information.evaluate(128.0, samples.p, moving).value,
                "test-any",
                (MOVING,),
            )
            for _ in range(3)
        ]

    expected, _, _ = samples.clear()
    for value in two(party)[MOVING]:
        assert abs(value[0] / 128 - expected) < 1e-5


def test_what_was_sent_is_not_sent_again(duo, tap, monkeypatch):
    """Another one for the same samples computes with the categories of the first."""
    samples, others = (Samples(900, masked=True, seed=seed) for seed in (0, 1))
    sent = [information.sent for information, _ in run_trio(duo, samples.begin)]
    rows, frames = sent[MOVING].rows, tap(duo)
    expected, _, _ = samples.clear()

    def begun():
        return run_trio(duo, lambda s: samples.begin(s, sent[s.pid]))

    def check(both):
        def party(session):
            information, moving = both[session.pid]
            value = information.evaluate(128.0, samples.p, moving).value
            return session.open(value, "test-any", (MOVING,))

        assert abs(run_trio(duo, party)[MOVING][0] / 128 - expected) < 1e-5

    both = begun()
    assert not frames
    check(both)
    # The static owner sees to it that they are the same.
    frames.clear()
    for name in ("index", "keep_static"):
        changed = Samples(900, masked=True)
        setattr(changed, name, getattr(others, name))
        with pytest.raises(ValueError, match="changed during a registration"):
            changed.begin(duo[STATIC], sent[STATIC])
    assert not frames
    # They are sent again when a key is due, after much was opened.
    for session in duo:
        monkeypatch.setattr(session.ledger, "shown", lambda _: float(bfv.KEY_BITS))
    check(begun())
    again = [f for f in frames if f[3] == operation_code("categories")]
    assert len(again) == rows.ciphertexts


@pytest.mark.parametrize("again", [False, True])
def test_an_answer_made_of_masks_is_no_table(two, monkeypatch, again):
    """Masks of an evaluation have a key that nothing read before they are used has.

    Else the moving owner could choose the static owner's part of the table to be a
    function of the masks, and with it words that these do not hide.
    """
    samples, keys = Samples(300), []

    def party(session):
        information, moving = samples.begin(session)
        encryption, inner = session.encryption, session.encryption.read

        def read(name, count, t, key, wanted):
            keys[-1][name].add(key)
            return inner(name, count, t, key, wanted)

        monkeypatch.setattr(encryption, "read", read)
        for _ in range(3):
            if session.pid == STATIC:
                keys.append({"categories-back": set(), "masks-back": set()})
            if again:
                mine = (samples.index, None) if session.pid == STATIC else ()
                information.share_categories(*mine)
            information.evaluate(1.0, samples.p, moving)

    two(party)
    before = set()
    for of_categories, of_masks in map(dict.values, keys):
        before |= of_categories
        assert len(of_masks) == 1 and not of_masks & before
        before |= of_masks
    assert len(before) == 4


def test_images_without_structure(two):
    """One category, one bin, no gradient: nothing overflows, and nothing is known."""
    samples = Samples(300, seed=1)
    samples.index[...], samples.first[...] = 3, 2
    samples.weights[...] = [0, 1, 0, 0]
    samples.gradient[...] = 0
    value, gradient, slopes = opened(two, samples, slopes=True)
    assert abs(value[0]) < 128 * 6e-6
    assert_array_equal(np.abs(gradient) <= UNIT, True)
    assert np.isfinite(slopes).all()


def test_no_sample_counts(two):
    """The masks have nothing in common: what comes of it is a number, of no use."""
    samples = Samples(300, masked=True)
    samples.keep_static[...] = False
    value, gradient, _ = opened(two, samples)
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


def test_the_largest_gradient(two):
    """All samples pull the same way, where the logarithms differ most."""
    samples = Samples(2000, seed=5)
    samples.index[...] = samples.first[...] = np.arange(2000) < 1000
    samples.weights[...] = [1, 0, 0, 0]
    samples.gradient[...] = 0.5
    samples.y[...] = np.where(samples.index, -30, 30)[:, None]
    _, gradient, _ = opened(two, samples)
    _, slope, _ = samples.clear()
    np.testing.assert_allclose(gradient / 128, slope, rtol=1e-3, atol=1e-5)
    assert np.abs(slope).max() > 1


@pytest.mark.parametrize("wide", [False, True], ids=["4", "5"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_moments_are_exact(two, masked, wide):
    """Integers, to the last bit, of tables that wrap around in every way.

    Bands of five have a zero at either end.
    """
    samples = Samples(3000, masked=masked, seed=6)
    if wide:
        late = samples.first % 3 > 0
        samples.first -= late
        places = late[:, None] + np.arange(4)
        weights, samples.weights = samples.weights, np.zeros((samples.n, 5))
        np.put_along_axis(samples.weights, places, weights, axis=1)
    rng = np.random.default_rng(8)
    shape = samples.bins, samples.categories
    table = rng.integers(-(1 << 15), 1 << 15, shape)
    mask = rng.integers(0, 1 << 64, shape, np.uint64)
    words = {MOVING: table.view(np.uint64) - mask, STATIC: mask}

    def party(session):
        information, moving = samples.begin(session)
        band, gradient, _ = moving or (None,) * 3
        begun = information._begin_lookups(band)
        sums = information._moments(words[session.pid], begun, band, gradient)
        return session.open(sums, "test-any", (MOVING,), raw=True)

    moving, unit = samples.moving(), 1 << ROUNDED_BITS
    values = samples.integers(2.0**samples.frac_bits)
    at = samples.first[:, None] + np.arange(values.shape[1])
    chosen = table[at, samples.index[:, None]] * samples.keep_static[:, None]
    expected = [
        int(((values * (g * y)[:, None] + unit // 2) // unit * chosen).sum())
        for g in moving.gradient(0, samples.n).T
        for y in samples.y.T
    ]
    opened = R128.to_ints(two(party)[MOVING])
    assert [int(v) - (int(v) >> 127 << 128) for v in opened] == expected
    assert max(map(abs, expected)) > 1 << 30


def test_which_protocol_a_session_has(duo, trio):
    arguments = 10, 8, 12, None, 3
    options = {"masked": False, "digits": DIGITS}
    assert isinstance(worlds.information(trio[0], *arguments, **options), Information)
    for session in duo:
        made = worlds.information(session, *arguments, **options)
        assert isinstance(made, PairInformation)
        with pytest.raises(ValueError, match="needs a helper"):
            worlds.information(session, *arguments, **options, backend="mpyc")


# -- cost ----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dim", [2, 3])
def test_rounds_and_bytes_are_as_stated(duo, tap, depth, payload_bytes, dim, masked):
    """What is encrypted to the byte, the rest for each number; with and without slopes.

    What is made ahead is there.
    """
    samples = Samples(400, dim, masked=masked)
    numbers = samples.bins * samples.categories + samples.bins + samples.categories
    numbers += 2 * masked
    begun = {}

    def begin(session):
        begun[session.pid] = samples.begin(session)
        for owner in OWNERS:
            session.transfers.reserve(1 << 15, owner)

    frames, count = tap(duo), depth(duo)
    run_trio(duo, begin)
    rows = begun[MOVING][0]._categories
    sent = [f[4] for f in frames if f[3] == operation_code("categories")]
    assert sum(map(len, sent)) == rows.ciphertexts * bfv.CIPHERTEXT
    spent = []
    for slopes in (False, True):
        frames.clear()
        before = count()
        run_trio(
            duo,
            lambda s, slopes=slopes: begun[s.pid][0].evaluate(
                1.0, samples.p, begun[s.pid][1], slopes=slopes
            ),
        )
        spent.append((count() - before, payload_bytes(frames)))
    masks, sums = begun[MOVING][0]._masks, dim * (dim + 1)
    back = rows.response_bytes(samples.bins + masked)
    back += sum(r.response_bytes(sums, contracted=True) for r in (rows, masks))
    # With a key.
    encrypted = (masks.ciphertexts + 1) * bfv.CIPHERTEXT + 2 * bfv.SEED_BYTES
    encrypted += begun[MOVING][0]._lookups.payload_bytes
    encrypted += back
    for (rounds, size), most in zip(spent, (22, 28), strict=True):
        # One may be under way when the other owner begins.
        assert rounds - most - 3 * masked in (-1, 0)
        assert 800 * numbers < size - encrypted < 1100 * numbers
    stated = " ".join(module.__doc__.split())
    for words in (
        "Rounds of an evaluation: 22 with counts of 18 to 32 bits",
        "3 more where samples may be left out",
        "and 6 for the slopes",
        "at most 1.1 kB for each number",
    ):
        assert words in stated


def test_what_is_made_ahead_is_as_stated(duo):
    samples, taken = Samples(100), []
    transfers = {owner: [] for owner in OWNERS}

    def run(session):
        information, moving = samples.begin(session)
        if session.pid == MOVING:
            take, products = session.multiplications.take, session.multiplications
            products.take = lambda n: taken.append(n) or take(n)
            pads, made = session.transfers.pads, session.transfers
            made.pads = lambda n, owner: transfers[owner].append(n) or pads(n, owner)
        information.evaluate(1.0, samples.p, moving)
        return information

    information = run_trio(duo, run)[MOVING]
    cells = samples.bins * samples.categories
    numbers = cells + samples.bins + samples.categories
    sums = samples.dim * (samples.dim + 1)
    few = (1 + samples.p) * sums
    assert information.products(samples.p) == 13 * numbers + 3 * cells + few
    assert sum(taken) == 2 * COLUMNS + information.products(samples.p)
    looked_up = information._lookups.transfers
    # 3 words of a class, so 2 digits.
    assert looked_up == samples.n * 4 * 2
    assert sum(map(sum, transfers.values())) - looked_up < 200 * numbers


def test_what_a_registration_sends_is_as_stated(duo):
    """An evaluation of 45,000 samples, as far as it follows from public numbers."""
    information = PairInformation(
        duo[0], 45_000, 28, 32, None, 3, masked=False, digits=DIGITS
    )
    rows, masks = information._categories, information._masks
    lookups, back = information._lookups, rows.response_bytes(32)
    back += sum(r.response_bytes(12, contracted=True) for r in (rows, masks))
    cells, others = 32 * 28, 32 + 28
    products = 420 * (16 * cells + 13 * others)
    each = (masks.ciphertexts + 1) * bfv.CIPHERTEXT + products
    each += 1100 * (cells + others)
    each += lookups.payload_bytes + 31 / 8 * lookups.transfers
    each += back
    stated = " ".join(module.__doc__.split())
    once, evaluation, ahead = re.search(
        r"(\d+) MB once and (\d+) MB an evaluation, of which (\d+)", stated
    ).groups()
    assert round(rows.ciphertexts * bfv.CIPHERTEXT / 1e6) == int(once)
    assert abs(each / 1e6 - int(evaluation)) < 1
    assert round(products / 1e6) == int(ahead)
