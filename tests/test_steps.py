"""Comparisons of masked numbers with public ones, on shares."""

from examples import quick
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from parties import run_trio
import pytest
from scipy import stats

from dipy_ppir.mpc import protocols, steps
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.frame import operation_code
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC

WORD = 1 << 64
DEPTH = steps.BITS - 1
numbers = st.integers(0, (1 << DEPTH) - 1)


def seeds(n, seed=0):
    return np.random.default_rng(seed).integers(0, WORD, (2, n, 2), dtype=np.uint64)


def both(keys, x):
    parts = [steps.less(owner, keys[owner], x) for owner in (0, 1)]
    return R128.to_ints(R128.add(*parts)).tolist()


@quick(30)
@given(numbers, numbers, st.integers(0, (1 << 128) - 1), st.integers(0, 1000))
def test_less(number, x, value, seed):
    near = [number + d for d in (-1, 0, 1) if 0 <= number + d < 1 << DEPTH]
    xs = [x, 0, (1 << DEPTH) - 1, *near]
    keys = steps.make_keys(
        R128.from_ints([number] * len(xs)),
        R128.from_ints([value] * len(xs)),
        seeds(len(xs), seed),
    )
    assert both(keys, R128.from_ints(xs)) == [value if k < number else 0 for k in xs]


def test_bits_above_do_not_count():
    above = 5 << DEPTH
    numbers = R128.from_ints([above + 9, 9, above + 9])
    keys = steps.make_keys(numbers, R128.from_ints([1, 2, 3]), seeds(3))
    assert both(keys, R128.from_ints([above + 8, above + 8, 9])) == [1, 2, 0]


def test_one_key_says_nothing_of_number_and_value():
    """The same seeds, other numbers: an owner's keys share no correction."""
    n = 2000
    made = []
    for number, value in ((0, 0), ((1 << DEPTH) - 1, (1 << 128) - 1)):
        keys = steps.make_keys(
            R128.from_ints([number] * n), R128.from_ints([value] * n), seeds(n, 6)
        )
        for key in keys:
            for words in (key.seeds, key.values, key.last):
                octets = np.ascontiguousarray(words).view(np.uint8)
                # The lowest bit of a seed is not random, and never used.
                low = octets.reshape(-1, 16)[:, 1:].ravel()
                assert stats.chisquare(np.bincount(low, minlength=256)).pvalue > 1e-9
            bits = key.bits & 1, key.bits >> 1
            for bit in bits:
                assert abs(bit.mean() - 0.5) < 6 / np.sqrt(4 * bit.size)
        made.append(keys)
    # The first owner's seed is given; all corrections beneath it differ.
    assert np.array_equal(made[0][0].seed, made[1][0].seed)
    assert not (made[0][0].seeds[0] == made[1][0].seeds[0]).all(axis=1).any()


def step_function(session, values, thresholds, jumps, bits=steps.BITS):
    """What is dealt for a step function of numbers."""
    mask = protocols.pad(session, "test", (len(values), 2), plus=R128.add)
    given = R128.from_ints(thresholds), R128.from_ints(jumps)
    dealt = steps.deal(session, mask, *given, bits)
    if session.pid == HELPER:
        return mask
    return mask, dealt


@pytest.mark.parametrize("bits", [90, steps.BITS, steps.MOST_BITS])
@pytest.mark.parametrize("seed", range(2))
def test_a_step_function(trio, seed, bits):
    top = (1 << bits - 2) - 1
    thresholds = [0, 1, 1000, 1 << 70, top]
    jumps = [5, -7, 1 << 100, 12, 1]
    rng = np.random.default_rng(seed)
    values = [0, 1, 999, 1000, 1001, (1 << 70) - 1, 1 << 70, top - 1, top]
    values += [int(v) for v in rng.integers(0, 1 << 62, 4)]
    values += [-1, -(1 << 60), -top]
    dealt = run_trio(trio, step_function, values, thresholds, jumps, bits)
    masked = R128.add(R128.from_ints(values), dealt[HELPER])
    parts = [
        steps.look_up(trio[p], masked, dealt[p][1], R128.from_ints(jumps))
        for p in (MOVING, STATIC)
    ]
    found = R128.to_ints(R128.add(*parts)).tolist()
    for v, total in zip(values, found, strict=True):
        expected = sum(j for t, j in zip(thresholds, jumps, strict=True) if v >= t)
        assert total == expected % (1 << 128), v


def test_bytes(trio, tap):
    frames = tap(trio)
    n, count = 2, 3
    run_trio(trio, step_function, [5] * n, [1, 2, 3], [1, 1, 1])
    sent = {}
    for sender, peer, _, op, payload in frames:
        assert sender == HELPER
        key = peer, op == operation_code("comparison")
        sent[key] = sent.get(key, 0) + len(payload)
    each = DEPTH * 33 + 16
    assert sent == {
        (MOVING, True): n * count * each,
        (STATIC, True): n * count * each,
        (STATIC, False): n * count * 16,
    }
