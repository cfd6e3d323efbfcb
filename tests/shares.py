"""Numbers on shares of 128 bits, put together."""

import numpy as np

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
