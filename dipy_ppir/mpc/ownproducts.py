r"""Sums of products of numbers of one owner with numbers of the other.

The moving owner knows x, the static owner y. Of any public bilinear map f(x, y), a
matrix product say, or products and sums over windows, the owners get additive parts:

.. math::

    f(x, y) = \underbrace{f(x, y - b) + r}_{\text{moving owner}}
        + \underbrace{f(x - a, b) + f(a, b) - r}_{\text{static owner}}.

The helper knows the masks a and b, deals f(a, b) - r, and sends nothing else. y is
shared once, however many x it is multiplied with.

=================  ======  ====================================================
verb               rounds  words of the ring, on all links
=================  ======  ====================================================
`share_static`     1       1 per number, from the static owner
`sums`             1       1 per number, from the moving owner; 1 per result, from
                           the helper
=================  ======  ====================================================

What each party sees: the helper nothing. An owner sees numbers of the other less a mask
that the other and the helper draw; the static owner besides numbers of the helper less
r, which the moving owner and the helper draw. No mask of x serves twice, and that of y
hides one y only: all is uniform, and a simulator draws it at random.
"""

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.protocols import deal, drawn


class OwnProducts:
    """Products of the owners' own numbers; see the module.

    Parameters
    ----------
    session : Session
    ring : Ring
        R32, R64 or R128, whichever the results fit. Shapes are those of the packed
        words: in R128 numbers have two each.
    name : str
        the protocol step.
    """

    def __init__(self, session, ring, name):
        self.session, self.ring, self.name = session, ring, name
        self._static, self._due = None, False

    def share_static(self, shape, y=None, *, wait=True):
        """Share the static owner's numbers; those before are forgotten. Rounds: 1.

        Parameters
        ----------
        shape : tuple of int
        y : array of the ring's words, at the static owner only
        wait : bool, optional
            False to receive them with the first `sums`, whose round is then the same.
        """
        s, name = self.session, f"own-{self.name}-static"
        if s.pid == MOVING:
            self._static, self._due = np.empty(shape, self.ring.dtype), True
            if wait:
                self._receive()
            return
        peer = HELPER if s.pid == STATIC else STATIC
        self._static = drawn(s, peer, name, shape, self.ring.dtype)
        if s.pid == STATIC:
            hidden = self.ring.sub(np.ascontiguousarray(y), self._static)
            s.network.send(MOVING, name, hidden)

    def _receive(self):
        if self._due:
            self.session.network.receive(
                STATIC, f"own-{self.name}-static", self._static
            )
        self._due = False

    def sums(self, form, shape, results, x=None, *, bound):
        """A bilinear map of both owners' numbers. Rounds: 1.

        Parameters
        ----------
        form : callable
            takes x and y, words of the ring, and returns those of the results.
        shape, results : tuple of int
            of x, and of what comes of it.
        x : array of the ring's words, at the moving owner only
        bound : int
            promised to be no smaller than any result.

        Returns
        -------
        sums : SharedArray, shape `results`
            whose parts the owners hold; the helper's is zero.
        """
        s, ring, name = self.session, self.ring, f"own-{self.name}-moving"
        if s.pid == STATIC:
            hidden = np.empty(shape, ring.dtype)
            s.network.receive(MOVING, name, hidden)
            part = form(hidden, self._static)
        else:
            peer = HELPER if s.pid == MOVING else MOVING
            mask = drawn(s, peer, name, shape, ring.dtype)
            if s.pid == MOVING:
                x = np.ascontiguousarray(x)
                s.network.send(STATIC, name, ring.sub(x, mask))
                self._receive()
                part = form(x, self._static)
            else:
                part = form(mask, self._static)
        name, part = f"{self.name}-correction", np.ascontiguousarray(part)
        dealt = deal(s, name, part, results, ring.dtype, minus=ring.sub)
        if s.pid == HELPER:
            part = np.zeros(results, ring.dtype)
        else:
            part = ring.add(part, dealt)
        return SharedArray(ring, part, 2, 0, bound)
