"""Steps of control points, of two owners alone."""

import re

from noise import check_uniform
import numpy as np
from numpy.testing import assert_allclose
from parties import run_trio
import pytest

from dipy_ppir.mpc import bfv, pairsplines
from dipy_ppir.mpc.bsplines import Lattice
from dipy_ppir.mpc.encryptedslots import PRIME, SLOTS, EncryptedSlots
from dipy_ppir.mpc.freeform import ClearSteps, OwnSteps, Samples, largest, limited
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.pairsplines import PairSteps
from dipy_ppir.mpc.splineslots import Slots


def operands(lattice, seed=2, count=None):
    rng = np.random.default_rng(seed)
    shape = lattice.shape if count is None else (count,)
    x = rng.integers(-4096, 4097, (len(lattice.shape), *shape))
    image, static = (rng.integers(0, 1025, s) for s in (shape, lattice.shape))
    return x, image, static


@pytest.mark.parametrize("kind", ["all", "known", "hidden"])
@pytest.mark.parametrize(
    "lattice", [Lattice((19, 17), (4, 4)), Lattice((9, 8, 10), (5, 3, 4))]
)
def test_steps_are_those_of_the_clear_to_their_precision(two, lattice, kind):
    count, samples = None, None
    voxels = int(np.prod(lattice.shape))
    if kind != "all":
        count = voxels // 3
        at = np.random.default_rng(1).choice(voxels, count, replace=False)
        samples = Samples(count, at, kind == "hidden")
    x, image, static = operands(lattice, count=count)
    bits = 20
    weights = np.random.default_rng(4).uniform(
        0, 1e-7, (len(x), *lattice.control_shape)
    )
    weights = limited(weights, x, image, lattice, samples, bits)
    own = OwnSteps(x, image, weights)
    clear = ClearSteps()
    clear.begin(lattice, static)
    wanted = clear.steps(bits, own, samples)
    assert 0 < np.abs(wanted).max() <= largest(bits)

    def party(session):
        steps = PairSteps(session)
        steps.begin(lattice, static if session.pid == STATIC else None)
        mine = own if session.pid == MOVING else None
        out = []
        for _ in range(2):
            known = samples
            if kind == "hidden":
                known = samples if session.pid == MOVING else Samples(count, None, True)
                known = steps.samples(known)
                assert known.at is not None
            out.append(steps.steps(bits, mine, known))
        return out

    first, second = two(party)[MOVING]
    assert_allclose(first, wanted, atol=1.0)
    assert_allclose(second, wanted, atol=1.0)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("sign", [-1, 1])
def test_steps_as_large_as_their_range_do_not_come_round(two, sign):
    """The pair of images that makes steps along an axis largest fills the range."""
    lattice, bits = Lattice((12, 11), (3, 4)), 7
    x, *_ = operands(lattice)
    image = np.where(sign * x[0] > 0, 1024, 0)
    huge = np.full((2, *lattice.control_shape), 1e3)
    own = OwnSteps(x, image, limited(huge, x, image, lattice, None, bits))

    def party(session):
        steps = PairSteps(session)
        steps.begin(lattice, 1024 - image if session.pid == STATIC else None)
        return steps.steps(bits, own if session.pid == MOVING else None)

    found = two(party)[MOVING]
    assert (sign * found[0]).max() >= largest(bits) - 1
    assert np.abs(found).max() <= largest(bits) + 1
    clear = ClearSteps()
    clear.begin(lattice, 1024 - image)
    assert_allclose(found, clear.steps(bits, own), atol=1.0)


@pytest.mark.parametrize("kind", ["all", "known", "hidden"])
def test_rounds_bytes_and_bits_are_as_stated(duo, depth, kind):
    lattice, bits = Lattice((15, 14), (4, 4)), 9
    samples = None
    if kind != "all":
        samples = Samples(60, np.arange(60), kind == "hidden")
    x, image, static = operands(lattice, count=None if samples is None else 60)
    weights = np.ones((2, *lattice.control_shape))
    weights = limited(weights, x, image, lattice, samples, bits)
    own = OwnSteps(x, image, weights)
    parties = [PairSteps(s) for s in duo]
    stated = dict(
        re.findall(r"^(`\w+`|\.\.\. again) +(\d)", pairsplines.__doc__, re.MULTILINE)
    )

    def begin(session):
        assert session.encryption.responses == 0
        parties[session.pid].begin(lattice, static if session.pid == STATIC else None)

    def step(session):
        known = samples
        if kind == "hidden":
            at = samples.at if session.pid == MOVING else None
            known = parties[session.pid].samples(Samples(60, at, True))
        parties[session.pid].steps(bits, own if session.pid == MOVING else None, known)

    run_trio(duo, begin)
    again = "... again" if kind == "all" else "`steps`"
    for place, verb in enumerate(("`steps`", again)):
        before = [sum(s.ledger.sent.values()) for s in duo]
        rounds = depth(duo)
        run_trio(duo, step)
        told = kind == "hidden"
        assert rounds() == int(stated[verb]) + told * int(stated["`samples`"])
        slots = Slots(lattice, None if samples is None else samples.at, SLOTS)
        static_sent = 8 * weights.size
        if verb == "`steps`":
            # The first step's openings could be most of a key.
            assert bits * weights.size > bfv.KEY_BITS * 3 / 4
            static_sent += (1 + place) * bfv.SEED_BYTES
            static_sent += (slots.ciphertexts + place) * bfv.CIPHERTEXT
        moving_sent = 2 * slots.results * bfv.response_bytes(2) + told * 4 * 60
        sent = [
            sum(s.ledger.sent.values()) - b for s, b in zip(duo, before, strict=True)
        ]
        assert sent == [moving_sent, static_sent]
    opened = duo[MOVING].ledger.learned()["moving owner"]
    assert [e["bits"] for e in opened] == [pytest.approx(2 * bits * weights.size)]


def test_what_the_static_owner_sends_in_a_step_is_uniform(duo, tap):
    """Of images of zeros, what is opened is masks, and noise as wide as a step."""
    frames, lattice = tap(duo), Lattice((40, 30), (3, 3))
    zeros = np.zeros((2, *lattice.shape), np.int64)
    own = OwnSteps(zeros, zeros[0], np.zeros((2, *lattice.control_shape), np.int64))

    def party(session):
        steps = PairSteps(session)
        steps.begin(lattice, zeros[0] if session.pid == STATIC else None)
        for _ in range(3):
            steps.steps(12, own if session.pid == MOVING else None)

    run_trio(duo, party)
    size = 8 * 2 * lattice.size
    words = [f[4] for f in frames if f[0] == STATIC and len(f[4]) == size]
    words = np.frombuffer(b"".join(words), np.uint64)
    assert len(words) == 3 * size // 8
    check_uniform([words >> np.uint64(60), words >> np.uint64(44) & np.uint64(15)])
    assert len(set(words)) > len(words) - 3


def test_slots_are_multiplied_one_by_one(two):
    rng = np.random.default_rng(3)
    y = rng.integers(-1000, 1001, (3, SLOTS))
    x = rng.integers(-(PRIME // 2), PRIME // 2, (2, SLOTS))

    def party(session):
        images = EncryptedSlots(session, "test", STATIC)
        mine = session.pid == MOVING
        images.encrypt(3, None if mine else iter(y))
        wanted = [(range(1, 3), iter(x) if mine else None)]
        return next(images.sums(wanted))

    parts = two(party)
    wanted = [
        sum(int(a) * int(b) for a, b in zip(*pair, strict=True)) % PRIME
        for pair in zip(x.T, y[1:].T, strict=True)
    ]
    assert np.array_equal((parts[0] + parts[1]) % np.uint64(PRIME), wanted)
    # The moving owner's part is a mask that it draws.
    check_uniform(parts[0] * 16 // np.uint64(PRIME))
