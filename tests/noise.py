"""How far secure numbers may lie from DIPY's by chance; and chance made repeatable.

With ``reveal="gradient"`` an opened gradient is DIPY's and

- the blur: uniform, at most `gradient_blur` units of the opened sum either way;
- the rounding of the logarithms: each cell of the table is off by a number with mean
  zero, independent of the others, that lies in an interval of one unit,
  2**-WEIGHT_BITS (`protocols.truncate_unseen`), times what the cell weighs in the
  gradient: DIPY's ``joint_grad``;
- the rounding of the moving owner's numbers, a function of the images and the
  transform alone.

An opened value is DIPY's and noise that has bounds (`mutual_information`).
"""

import random
import secrets

import numpy as np
from parties import here
from scipy import special, stats

from dipy_ppir.align import frames
from dipy_ppir.align.parzenhist import gradient_blur
from dipy_ppir.mpc.logarithm import VALUE_DIGITS, WEIGHT_BITS
from dipy_ppir.mpc.pair import OWNERS


def blur_of(histogram):
    """How far the blur moved the last gradient of a secure histogram, at most."""
    scales, _ = histogram._scales_shared()
    unit = 1 / (scales.row * scales.table * scales.columns[:-1])
    norm = histogram._valid * histogram.mdelta
    if not norm > 0:
        return np.zeros_like(unit)
    return gradient_blur(histogram._sums.samples) * unit / norm


def gradient_bound(blur, joint_grad):
    """How far each element of a secure gradient may be from DIPY's.

    With R the root of the sum of the squares of an element's `joint_grad`, in units of
    the logarithms, their rounding exceeds c R with a probability of at most
    2 exp(-2 c**2) (Hoeffding). A bound of blur + 5 R is thus exceeded once in 2e21
    elements; a run compares 1e4. The rest, twice the blur, is for what the moving owner
    rounds. The largest error in 1e4 elements was a third of the bound.
    """
    rounding = np.sqrt((np.asarray(joint_grad) ** 2).sum(axis=(0, 1)))
    return 3 * blur + 5 * 2.0**-WEIGHT_BITS * rounding


def value_bound(histogram, value):
    """How far the last value of a secure histogram may be from DIPY's; never more.

    A sum and the mass it is divided by are each blurred by 2**-VALUE_DIGITS of the
    number of all samples; where none counts, there is no value. A factor of two is for
    samples out of range, which have no mass.
    """
    part = histogram._valid / histogram._sums.samples
    if not part > 0:
        return 0.0
    return 2 * 2.0**-VALUE_DIGITS / part * (1.1 + abs(value) + abs(np.log(part)))


def fix_checks(monkeypatch, seed=1):
    """Let the moving owner, if it is in this process, always draw the same check.

    With ``reveal="histogram"`` this is all the chance there is in a gradient. On small
    images most evaluations wrap, and about one in 1e6 of these checks misses it.
    """
    generator = np.random.default_rng
    monkeypatch.setattr(
        np.random, "default_rng", lambda *args: generator(*(args or (seed,)))
    )


def fix_randomness(monkeypatch, seed=1):
    """Make what sessions in this process and their parties draw a function of `seed`.

    Of three parties only one draws from each source, but for shares of MPyC's, on which
    no rounding depends; each of two owners alone has a source of its own. So it does
    not matter how their threads take turns.
    """
    keys, below = random.Random(seed), random.Random(seed + 1)
    sources = {owner: random.Random(f"{seed} {owner}") for owner in OWNERS}

    def token_bytes(n=32):
        return sources.get(getattr(here, "owner", None), keys).randbytes(n)

    monkeypatch.setattr(secrets, "token_bytes", token_bytes)
    monkeypatch.setattr(secrets, "randbelow", below.randrange)
    fix_checks(monkeypatch, seed)


def fix_frames(monkeypatch):
    """Let frames, in which steps are hidden, always move the same way."""
    drawn = iter(range(10**6))

    def words(size):
        return np.random.default_rng(next(drawn)).bytes(size)

    monkeypatch.setattr(frames.os, "urandom", words)


#: Of 1.4e4 tests in a run one fails by chance in 7e8 runs.
RARE = 1e-13


def check_uniform(digits, what=None):
    """Fail if rows of hexadecimal digits are not uniform.

    By the likelihood ratio: far out, where such a limit must be, its distribution is
    that of chi square, which Pearson's statistic leaves by factors of hundreds.
    """
    digits = np.atleast_2d(digits).astype(np.int64)
    rows, n = digits.shape
    places = digits + 16 * np.arange(rows)[:, None]
    counts = np.bincount(places.reshape(-1), minlength=16 * rows).reshape(rows, 16)
    ratio = 2 * special.xlogy(counts, counts * 16 / n).sum(axis=1)
    assert ratio.max() < stats.chi2.isf(RARE, 15), what
