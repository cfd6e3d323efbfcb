"""A session of two owners alone, without a helper.

Secrets are sums of one word of each owner, in the rings (`SharedArray`, degree 2). What
the helper deals in a session of three the owners make themselves, by homomorphic
encryption (`bfv`): nobody else takes part, and each owner learns nothing that cannot be
simulated from what is opened to it, if it keeps to the protocol and ring learning with
errors is hard.

Opening a number costs one round and one word, from the owner that does not receive it.
What that sends is the number less a word that the receiver has: a simulator computes
it.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from dipy_ppir.mpc.arrays import OwnedArray, SharedArray
from dipy_ppir.mpc.errors import InsecureSetupError
from dipy_ppir.mpc.fields import R32, R64, R128, Ring
from dipy_ppir.mpc.ledger import MOVING, ROLES, STATIC
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.session import DEFAULT_TIMEOUT, Session

if TYPE_CHECKING:
    from dipy_ppir.mpc.bfv import Encryption
    from dipy_ppir.mpc.multiplications import Multiplications
    from dipy_ppir.mpc.transfers import Transfers

#: Party numbers of a session of two, and what they are called.
OWNERS = {pid: ROLES[pid] for pid in (MOVING, STATIC)}


def check_pair(parties, threshold, insecure=False):
    """Refuse set-ups in which two owners keep no secret.

    Raises
    ------
    InsecureSetupError
        with the reason.
    """
    if parties != 2:
        raise InsecureSetupError(
            f"a session without a helper has two owners, not {parties} parties"
        )
    if insecure or threshold != 1:
        raise InsecureSetupError(
            "two owners compute on encrypted numbers, each hidden from the other; "
            "sharing with threshold 0, where every share is the secret itself, is "
            "refused"
        )


class PairSession(Session):
    """One owner's end of a session of two.

    Parameters
    ----------
    pid : int
        this party: 0 moving owner, 1 static owner.
    links, seeds : dict
        see `Session`; of the other owner.
    timeout : float, optional
        longest silence of the other owner, in seconds.

    Raises
    ------
    InsecureSetupError
        if there are not two parties.
    """

    roles = OWNERS
    _check_setup: Callable[..., None] = staticmethod(check_pair)

    def __init__(
        self,
        pid: int,
        links: Mapping[int, Link],
        seeds: Mapping[int, bytes],
        *,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        super().__init__(pid, links, seeds, timeout=timeout)
        self._encryption: Encryption | None = None
        self._multiplications: Multiplications | None = None
        self._transfers: Transfers | None = None

    @property
    def other(self) -> int:
        """Number of the other owner."""
        return MOVING + STATIC - self.pid

    @property
    def encryption(self) -> "Encryption":
        """The keys of both owners, made when they are first needed. Rounds: 2."""
        from dipy_ppir.mpc.bfv import Encryption

        # No cached property: Python 3.11 holds one lock for all objects while one is
        # computed, and here one owner waits for the other.
        if self._encryption is None:
            self.check_process()
            self._encryption = Encryption(self)
        return self._encryption

    @property
    def multiplications(self) -> "Multiplications":
        """Products of random numbers, made ahead."""
        from dipy_ppir.mpc.multiplications import Multiplications

        if self._multiplications is None:
            self._multiplications = Multiplications(self)
        return self._multiplications

    @property
    def transfers(self) -> "Transfers":
        """Random oblivious transfers, made ahead."""
        from dipy_ppir.mpc.transfers import Transfers

        if self._transfers is None:
            self._transfers = Transfers(self)
        return self._transfers

    # -- opening ---------------------------------------------------------

    def open_all(
        self,
        openings: Sequence[tuple[SharedArray | OwnedArray, str, Sequence[int]]],
        *,
        raw: bool = False,
    ) -> list[npt.NDArray[Any] | None]:
        """See `Session.open_all`; of the receivers those that take part."""
        openings = [
            (array, label, [r for r in receivers if r in self.roles])
            for array, label, receivers in openings
        ]
        return super().open_all(openings, raw=raw)

    def _send_opening(self, array, label, receivers):
        owned = isinstance(array, OwnedArray)
        if not owned and (array.degree != 2 or not isinstance(array.field, Ring)):
            raise ValueError("two owners have sums of words, no points of lines")
        if self.other in receivers and (not owned or array.owner == self.pid):
            self.network.send(self.other, "open-" + label, array.share)
        return array.share

    def _receive_opening(self, array, share, label, receivers, raw):
        if self.pid not in receivers:
            return None
        if isinstance(array, OwnedArray) and array.owner == self.pid:
            return share
        theirs = array.empty()
        self.network.receive(self.other, "open-" + label, theirs)
        if isinstance(array, OwnedArray):
            return theirs
        value = array.field.add(share, theirs)
        return value if raw else array.field.decode(value, array.frac_bits)

    # -- life cycle ------------------------------------------------------

    def receipt(self, **facts: Any) -> dict[str, Any]:
        """See `Session.receipt`."""
        fields = f"{R32!r}, {R64!r}, {R128!r}"
        if self._encryption is not None:
            from dipy_ppir.mpc import bfv

            size = math.prod(bfv.PRIMES).bit_length()
            fields += f", {bfv.VERSION} of degree {bfv.DEGREE} and {size} bits"
        return super().receipt(**{"fields": fields, **facts})
