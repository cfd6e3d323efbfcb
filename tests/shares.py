"""Numbers on shares of 128 bits, put together; and what they cost, counted."""

import numpy as np

from dipy_ppir.mpc.algebra import Masked, Secret, dropped, expression
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import MOVING, STATIC


def decoded(x):
    """Elements of the ring as signed numbers."""
    ints = R128.to_ints(x)
    return np.where(ints >= 1 << 127, ints - (1 << 128), ints).astype(float)


def value(masked):
    """Masked numbers of the parties, each at its own index."""
    m, s = masked[MOVING], masked[STATIC]
    return decoded(R128.add(m.part, s.part)) * m.unit


class Counting:
    """Computes nothing; counts the odds of roundings as `Shares` does."""

    def __init__(self):
        self.failures = 0.0

    def own(self, values, owner, shape, digits):
        return Secret(None, digits.unit, tuple(shape))

    def masked(self, *numbers):
        return [Masked(None, None, x.unit, x.shape) for x in numbers]

    def map(self, linear, x):
        return Masked(None, None, x.unit * linear.unit, linear.shape(x.shape))

    def plus(self, x, constant):
        return x

    def minus(self, x, y):
        return x

    def secret(self, x, digits, plus=()):
        x = expression(x)
        bits, unit = dropped(x, digits, plus)
        bound = int(digits.bound / unit * 2.0**bits) + 1
        assert 2 * bound < R128.modulus
        if bits:
            self.failures += 3 * bound / R128.modulus * np.prod(x.shape)
        return Secret(None, unit, x.shape)

    def settled(self, x, digits):
        return x

    def fresh(self, *wanted):
        return self.masked(*(self.secret(*w) for w in wanted))

    def rates(self, norms, longest, power, digits):
        return self.masked(*(Secret(None, digits.unit, (1,)) for _ in norms))
