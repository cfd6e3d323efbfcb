"""Oblivious products without encryption, for tests of what is built on them.

Both owners draw both factors from their common seed, so nothing is hidden: for tests
only.
"""

from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.pair import PairSession


class KnownProducts:
    """What `session.multiplications` does, of numbers that both owners know."""

    def __init__(self, session):
        self._session = session
        self._stream = session.stream(session.other, b"known-products")

    def reserve(self, n):
        """Nothing is made ahead."""

    def take(self, n):
        """A random factor of this owner, and its part of the products."""
        factors, part = self.sums(n, 1)
        return factors[0], part

    def sums(self, n, terms):
        """Random factors of this owner, and its part of sums of products."""
        a, b = (self._stream.words((terms, n, 2)) for _ in range(2))
        part = self._stream.words((n, 2))
        if self._session.pid == MOVING:
            return a, part
        total = R128.zeros((n,))
        for x, y in zip(a, b, strict=True):
            R128.addmul(total, x, y)
        return b, R128.sub(total, part)


def use_known_products(monkeypatch):
    """Give sessions of two such products in place of encrypted ones."""

    def multiplications(session):
        if not hasattr(session, "known_products"):
            session.known_products = KnownProducts(session)
        return session.known_products

    monkeypatch.setattr(
        PairSession, "multiplications", property(multiplications), raising=False
    )
