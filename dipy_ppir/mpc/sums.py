r"""Sums over three or more sites, of which nothing but the sums is opened.

Site i has a vector x_i of integers. Shares here are additive: what a site has is its
share of the sum, and nothing needs to be sent to share it. To open it, each pair of
sites i < j draws a vector r_ij from the key that only the two have, and site i sends of

.. math:: y_i = x_i + \sum_{j > i} r_{ij} - \sum_{j < i} r_{ji}

in the ring of integers modulo 2^32 (2^64 if not all possible sums fit), in which the r
cancel in the sum. The vector is cut into as many pieces as there are sites. Piece k of
every y_i goes to site k, which adds up and tells all others (a reduction by scattering,
then gathering). A vector shorter than that is sent to everybody instead.

=================  ======  ==========================================================
step               rounds  bytes on all links, K sites, n numbers of w = 4 or 8 bytes
=================  ======  ==========================================================
scatter, gather    2       2 (K - 1) n w; to send y_i to everybody K (K - 1) n w
n < K: publish     1       K (K - 1) n w
comparison         1       66 K (K - 1)
=================  ======  ==========================================================

What is longer than `PIECE` bytes a piece takes scatter and gather once for each.

What each party sees. Let C be the sites that pool what they hold, at most K - 2 of
them, and H the two or more others. C knows its own x_i and the r that it draws with
others; it is sent pieces of y_i of i in H, and sums that follow from them and its own.
Of y_i it can take away its own r; what is left, x_i plus or minus the r_ij of pairs in
H, is uniform among all vectors with the sum of x_i over H: the pairs of H connect all
of H, and each of them has a key of its own. A simulator that has the sum of all, and
the x_i of C, takes away the latter, draws the vectors of all but one of H at random,
and makes the last fit. So C learns the sum of the others' vectors, which follows from
the sum and its own anyway, and nothing else. K - 1 sites together learn the last one's
vector: no protocol that opens the sum can prevent it. For the same reason there are no
sums of two.

A stream of random numbers is read forward only, by both ends alike (`prg`), so no mask
serves twice.

All this holds for sites that follow the program. One that does not can add to the sum
what it likes, and no other learns more of its vector than the sum: nothing proves that
a vector is an image's. It gets to know no more than the sum of the others. In its
piece, site k can tell what sum it likes, even after seeing the sum, and others to
others. So all sites compare a digest of what they were told before anything is made of
it: where they differ, all stop, and nobody is named, because nobody can tell from a
digest who lied. A sum outside of what the sites can have added up to is refused too.

Whether a site stops must not depend on what it holds: one that could choose the bound
would see by who stops whose numbers pass it. So a site's own numbers are held against
``most`` only, which is written in the program or agreed before the run. A bound that
follows from earlier sums any site can steer: it is for the opened sum only, which all
have, and all stop. The ring has room for K times ``most``, so that no sum wraps around,
and a number of the sum is entered in the ledger with all the bits of that range: no
site can make them fewer.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from dipy_ppir.mpc import record
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import (
    FixedPointOverflowError,
    InsecureSetupError,
    PeerError,
    ProtocolError,
)
from dipy_ppir.mpc.fields import R32, R64
from dipy_ppir.mpc.ledger import MOST_PARTIES
from dipy_ppir.mpc.link import MAX_BACKLOG, Link
from dipy_ppir.mpc.planfile import LEAST_SITES, PlanFile
from dipy_ppir.mpc.session import DEFAULT_TIMEOUT, Session

#: Receivers of what is opened to all sites, however many there are.
EVERYBODY = tuple(range(MOST_PARTIES))
#: Most bytes that one site sends another at once.
PIECE = MAX_BACKLOG // 16


def check_sites(sites, threshold, insecure=False):
    """Refuse set-ups in which a sum keeps nothing secret.

    Raises
    ------
    InsecureSetupError
        with the reason.
    """
    if sites < LEAST_SITES:
        raise InsecureSetupError(
            f"{sites} sites cannot add up in secret: of two, each could subtract its "
            f"own part from the sum; {LEAST_SITES} or more are needed"
        )
    if sites > MOST_PARTIES:
        raise InsecureSetupError(f"at most {MOST_PARTIES} sites can add up together")
    if insecure or threshold != sites - 2:
        raise InsecureSetupError(
            "what sites add up is hidden from all but the last two of them together; "
            "no other threshold can be chosen"
        )


class SumSession(Session):
    """One site's end of a session in which sites add up what they have.

    Parameters
    ----------
    pid : int
        this site.
    links, seeds : dict
        see `Session`.
    timeout : float, optional
        longest silence of a site, in seconds.
    roles : dict, optional
        maps the numbers of all sites to what they are called.

    Raises
    ------
    InsecureSetupError
        if there are fewer than three sites.

    Examples
    --------
    >>> session = SumSession.load("plan.toml")  # doctest: +SKIP
    >>> with session:  # doctest: +SKIP
    ...     total = session.total(counts, "number_of_images", 100)  # at most, a site
    """

    plan_type = PlanFile
    _check_setup: Callable[..., None] = staticmethod(check_sites)

    def __init__(
        self,
        pid: int,
        links: Mapping[int, Link],
        seeds: Mapping[int, bytes],
        *,
        timeout: float = DEFAULT_TIMEOUT,
        roles: dict[int, str] | None = None,
    ) -> None:
        count = len(links) + 1
        self.roles = roles or {p: f"site {p + 1}" for p in range(count)}
        super().__init__(pid, links, seeds, timeout=timeout, threshold=count - 2)
        self.network.again = "begin anew at all sites"

    @classmethod
    def _of_plan(cls, plan):
        return {"roles": {p: party.role for p, party in plan.parties.items()}}

    # -- adding up -------------------------------------------------------

    def total(
        self,
        own: npt.ArrayLike,
        label: str,
        most: int,
        *,
        signed: bool = False,
        within: tuple[int, int] | None = None,
    ) -> npt.NDArray[np.int64]:
        """The sum of all sites' integers, opened to all of them.

        Rounds and bytes: see the module. All sites call it together.

        Parameters
        ----------
        own : array of int
            this site's, of a shape that all have.
        label : str
            declared with `ledger.declare`.
        most : int
            bound on the magnitude of one site's numbers: written in the program or
            agreed before the run, and nothing that another site can steer.
        signed : bool, optional
            whether the numbers may be negative.
        within : (int, int), optional
            what all sums must be between, as far as is known more than from `most`:
            public, but may follow from earlier sums.

        Returns
        -------
        total : array of int64

        Raises
        ------
        FixedPointOverflowError
            before anything is sent, if a number of this site is larger than `most`, as
            none of a program that is right can be.
        ProtocolError
            at all sites, if the sum is not one that they can have added up to, or not
            the same at all of them.
        """
        own, most = np.ascontiguousarray(own, dtype=np.int64), int(most)
        if own.size and (own.min() < (-most if signed else 0) or own.max() > most):
            raise FixedPointOverflowError(
                f"this site's numbers for {label!r} are not between "
                f"{-most if signed else 0} and {most}"
            )
        largest = len(self.roles) * most
        ring = R32 if 2 * largest < R32.modulus else R64
        array = SharedArray(
            ring,
            ring.encode_int(own),
            2,
            0,
            largest,
            choices=(1 + signed) * largest + 1,
        )
        if within is None:
            within = (-largest if signed else 0, largest)
        with self.phase("sums"):
            words = self.open(array, label, list(self.roles), raw=True)
            assert words is not None  # a receiver, as all are
            total = words.view(ring.signed).astype(np.int64)
            self._compare(label, total)
        if total.size and not within[0] <= total.min() <= total.max() <= within[1]:
            self._stop(
                f"the sites' sum for {label!r} is not between {within[0]} and "
                f"{within[1]}: one of them did not add what it should, and none can "
                "tell which; check that all run the same version, and start again"
            )
        return total

    def _compare(self, label, total):
        """Stop unless all sites were told the same sum."""
        run = self.ledger.run
        mine = record.array_hash(f"{run and run.number} {label}", total)
        views = self.exchange("compare-" + label, mine)
        if len(set(map(str, views.values()))) > 1:
            self._stop(
                f"the sites were not told the same sum for {label!r}: one of them did "
                "not send the same to all, and none can tell which; check that all run "
                "the same version, and start again"
            )

    def _stop(self, reason):
        """Stop because of what all sites see."""
        # Whoever ended now would keep the others from seeing why.
        with suppress(PeerError):
            self.exchange("disagreement", None)
        raise ProtocolError(reason)

    # -- opening ---------------------------------------------------------

    def _open_recorded(self, openings, raw):
        opened = []
        for array, label, receivers in openings:
            if array.degree != 2 or set(receivers) != set(self.roles):
                raise ValueError("sites open sums, and to all of them")
            words = array.share.reshape(-1)
            step = len(self.roles) * (PIECE // array.field.nbytes)
            if words.size < len(self.roles):
                total = self._published(array.field, words, label)
            else:
                parts = [
                    self._gathered(array.field, part, label)
                    for part in np.array_split(words, -(-words.size // step))
                ]
                total = parts[0] if len(parts) == 1 else np.concatenate(parts)
            total = total.reshape(array.shape)
            opened.append(total if raw else array.field.decode(total, array.frac_bits))
        return opened

    def _masked(self, ring, words):
        """This site's words plus its part of a sharing of zero; no messages."""
        masked = words.copy()
        for peer in self.peers:
            drawn = self.zero_elements(peer, ring, words.shape)
            if self.pid < peer:
                masked += drawn
            else:
                masked -= drawn
        return masked

    def _published(self, ring, words, label):
        masked = self._masked(ring, words)
        for peer in self.peers:
            self.network.send(peer, "open-" + label, masked)
        others = {peer: ring.empty(words.shape) for peer in self.peers}
        self.network.receive_all(others, "open-" + label)
        return sum(others.values(), start=masked)

    def _gathered(self, ring, words, label):
        masked = self._masked(ring, words)
        pieces = dict(
            zip(self.roles, np.array_split(masked, len(self.roles)), strict=True)
        )
        for peer in self.peers:
            self.network.send(peer, "open-" + label, pieces[peer])
        mine = pieces[self.pid]
        others = {peer: ring.empty(mine.shape) for peer in self.peers}
        self.network.receive_all(others, "open-" + label)
        for part in others.values():
            mine += part
        for peer in self.peers:
            self.network.send(peer, "total-" + label, mine)
        # The pieces are parts of `masked`, which so becomes the total.
        told = {peer: pieces[peer] for peer in self.peers}
        self.network.receive_all(told, "total-" + label)
        return masked

    def receipt(self, **facts: Any) -> dict[str, Any]:
        """Receipt of the run so far; see `Session.receipt`."""
        numbers = {"m": len(self.roles), "fields": f"{R32!r}, {R64!r}"}
        return super().receipt(**{**numbers, **facts})
