"""A session: one party's identity, connections, randomness and ledger.

The parties are two image owners and a helper (see `ROLES`). All three run the
same program in step; what a party does depends on its number.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
import hashlib
from importlib.metadata import version
import json
import logging
import os
from os import PathLike
import re
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from dipy_ppir.mpc import protocols, record
from dipy_ppir.mpc.agreedfile import AgreedFile
from dipy_ppir.mpc.arrays import OwnedArray, SharedArray
from dipy_ppir.mpc.errors import (
    AfterTheEnd,
    AuthenticationError,
    InsecureSetupError,
    ParameterMismatchError,
    PeerAbortedError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
    SessionFileError,
)
from dipy_ppir.mpc.fields import Field
from dipy_ppir.mpc.frame import (
    ENDED,
    ERROR,
    INTERRUPTED,
    LOST,
    MISMATCH,
    VIOLATION,
)
from dipy_ppir.mpc.identity import Identity
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC, Ledger
from dipy_ppir.mpc.link import MAX_BACKLOG, Link
from dipy_ppir.mpc.meeting import Meeting
from dipy_ppir.mpc.network import Network
from dipy_ppir.mpc.prg import Pairwise
from dipy_ppir.mpc.receipt import make_receipt, run_facts
from dipy_ppir.mpc.sessionfile import LIMITS, Party, SessionFile, parse_address

logger = logging.getLogger("dipy_ppir")

PARTIES, THRESHOLD = 3, 1
INSECURE_WARNING = (
    "INSECURE: this run has threshold 0, so every share is the secret itself and "
    "every party can read both images. Use it on public data only."
)
DEFAULT_TIMEOUT = 300.0
#: What the parties' installed files are compared as; named after their versions.
SOURCE = "source code of dipy_ppir"


def check_setup(parties, threshold, insecure=False):
    """Refuse set-ups that keep no secret or that are not supported.

    Raises
    ------
    InsecureSetupError
        with the reason.
    """
    if parties != PARTIES:
        detail = (
            "; with two parties the threshold is 0 and every share is the secret itself"
            if parties == 2
            else ""
        )
        raise InsecureSetupError(
            f"{parties} parties are not supported{detail}: use two image owners and "
            "one helper, or two owners alone, who encrypt (PairSession)"
        )
    if threshold == 0 and not insecure:
        raise InsecureSetupError(
            "with threshold 0 every share is the secret itself: use threshold 1, or "
            "pass insecure=True to run on public data without any protection"
        )
    if threshold not in (0, THRESHOLD):
        raise InsecureSetupError(
            f"threshold {threshold} needs more than {PARTIES} parties; use 1"
        )


class Session:
    """One party's end of a secure computation.

    Parameters
    ----------
    pid : int
        this party: 0 moving owner, 1 static owner, 2 helper.
    links : dict
        maps the other parties' numbers to connected `Link` objects. Who is at
        the other end must have been established before.
    seeds : dict
        maps the other parties' numbers to the 32-byte secret shared with each.
    timeout : float, optional
        longest silence of a peer, in seconds.
    threshold : int, optional
        number of curious parties tolerated; 1.
    insecure : bool, optional
        allow threshold 0, which protects nothing.

    Raises
    ------
    InsecureSetupError
        if the set-up is not supported.
    """

    #: Party numbers to what they are called, and the kind of file that names them.
    roles: dict[int, str] = ROLES
    #: Whether the helper deals before the owners meet, see `dealt`.
    ahead = False
    plan_type: type[AgreedFile] = SessionFile

    def __init__(
        self,
        pid: int,
        links: Mapping[int, Link],
        seeds: Mapping[int, bytes],
        *,
        timeout: float = DEFAULT_TIMEOUT,
        threshold: int = THRESHOLD,
        insecure: bool = False,
    ) -> None:
        self._check_setup(len(links) + 1, threshold, insecure)
        self.pid = pid
        self.threshold = threshold
        self.network = Network(links, timeout, lambda: self.ledger, self.roles)
        self._random = Pairwise(seeds)
        self.new_run()
        #: The runtime of computations with MPyC; see `mpyc_bridge.run`.
        self.mpyc: Any = None
        self._process = os.getpid()
        #: The session file, if the session was opened by one.
        self.plan: SessionFile | None = None
        self._identity: Identity | None = None
        self._relays: Sequence[Any] = ()
        #: Called with the shapes that the owners told each other, where they did:
        #: see ``dipy_ppir.align.remote.exchange_grids``.
        self.on_shapes: Callable[..., object] | None = None
        if threshold == 0:
            logger.warning(INSECURE_WARNING)

    _check_setup: Callable[..., None] = staticmethod(check_setup)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        identity: str | PathLike[str] | None = None,
        listen: tuple[str, int] | str | None = None,
        on_wait: Callable[[list[Party], float], object] | None = None,
        deal: str | PathLike[str] | None = None,
    ) -> Self:
        """Meet the parties of a session file, wherever they are.

        Which party this is follows from its certificate. Commands and scripts of the
        three parties may be started in any order: each waits for the others.

        Parameters
        ----------
        path : str or Path
            the session file, alike at all parties; see ``doc/deployment.md``.
        identity : str or Path, optional
            folder of this party's key, see `Identity.load`.
        listen : tuple of (str, int) or str, optional
            address to listen on, as text ``host:port``; by default all of this machine,
            at the port that others dial.
        on_wait : callable, optional
            called with the parties still missing (list of `Party`) and the seconds
            left, several times a second.
        deal : str or Path, optional
            what the helper dealt for this owner, where it deals ahead; by default the
            file beside the session file, see `deal_path`.

        Returns
        -------
        session : Session
            of two owners alone a `PairSession`, of two for whom a helper dealt a
            `DealtSession`; every connection is TLS 1.3 between
            the pinned certificates; the secrets shared with the other parties are
            derived inside TLS and never sent.

        Raises
        ------
        SessionFileError, IdentityError
            before any connection is opened.
        CertificateError
            if somebody else is where a party should be.
        PeerTimeoutError
            naming who did not come.
        ParameterMismatchError
            naming the entry in which the session files differ.

        Examples
        --------
        >>> session = Session.load("session.toml")  # doctest: +SKIP
        >>> moved, matrix = affine_registration(  # doctest: +SKIP
        ...     "t1.nii.gz", "remote", session=session, **session.parameters)
        """
        plan = cls.plan_type.read(path)
        if isinstance(listen, str):
            text, listen = listen, parse_address(listen)
            if listen is None:
                raise SessionFileError(
                    f"listen={text!r} must be host:port, for example '0.0.0.0:7433'"
                )
        own = Identity.load(identity)
        with ExitStack() as stack:
            opened = cls._deal_of(plan, own, path, identity, deal)
            for file in opened.values():
                stack.enter_context(closing(file))
            meeting = Meeting(plan, own, listen=listen, on_wait=on_wait)
            meeting.hold()
            session = cls.of_meeting(meeting, **opened)
            stack.pop_all()
        return session

    @classmethod
    def of_meeting(cls, meeting: Meeting, **options: Any) -> Self:
        """The session of parties that have met.

        Parameters
        ----------
        meeting : Meeting
        **options
            what it is made with besides: of a `DealtSession` ``deal``.
        """
        plan = meeting.plan
        session = cls._kind(plan)(
            meeting.party.pid,
            meeting.links,
            meeting.seeds,
            timeout=plan.timeouts["silence"],
            **cls._of_plan(plan),
            **options,
        )
        session.plan, session._relays = plan, meeting.relays
        session._identity = meeting.identity
        try:
            session.agree(plan.kind, {**plan.agreement(), **software()})
        except BaseException as exc:
            session.fail(exc)
            raise
        return session

    @classmethod
    def _kind(cls, plan):
        """The class of sessions by such a plan."""
        if isinstance(plan, SessionFile) and plan.alone:
            from dipy_ppir.mpc.pair import PairSession  # which is made of this class

            return PairSession
        if isinstance(plan, SessionFile) and plan.helper == "ahead":
            from dipy_ppir.mpc.dealt import DealtSession

            return DealtSession
        return cls

    @classmethod
    def _deal_of(cls, plan, own, path, identity, deal):
        """What the helper dealt, opened and checked, if it does so ahead."""
        if not isinstance(plan, SessionFile) or plan.helper != "ahead":
            if deal is not None:
                raise SessionFileError(
                    "in this session no helper deals ahead; leave deal out, or write "
                    'helper = "ahead" into the session file, at all parties'
                )
            return {}
        from dipy_ppir.mpc.dealt import open_deal

        return {"deal": open_deal(plan, own, path, identity, deal)}

    @classmethod
    def _of_plan(cls, plan):
        """What a session is made with besides."""
        return {}

    @property
    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of the registration that the session file names."""
        if self.plan is None:
            raise ValueError("the session was not opened by a session file")
        return self.plan.arguments

    @property
    def limits(self) -> dict[str, float]:
        """What a party may be asked for, by the session file or by default."""
        return LIMITS if self.plan is None else self.plan.limits

    @property
    def role(self) -> str:
        """Name of this party's role."""
        return self.roles[self.pid]

    def name_of(self, pid: int) -> str:
        """What messages call a party: its role and, if it is known, its name."""
        if self.plan is not None:
            return self.plan.parties[pid].title
        return f"the {self.roles[pid]}"

    @property
    def peers(self) -> list[int]:
        """Numbers of the other parties."""
        return sorted(self.network.links)

    @contextmanager
    def phase(self, name: str) -> Iterator[Self]:
        """Count traffic under `name` while inside."""
        before, self.ledger.phase = self.ledger.phase, name
        try:
            yield self
        finally:
            self.ledger.phase = before

    # -- the helper's part -----------------------------------------------

    def section(self, name: str) -> None:
        """Begin a section of the computation, of a name that is used once.

        Where the helper dealt everything before the owners met, it could not know how
        many steps they would take: what it dealt for the rest of a section is passed
        over, see `dealt`. Otherwise nothing.

        Parameters
        ----------
        name : str
        """

    def pace(self) -> None:
        """Let the helper wait until the static owner has come as far as this."""
        word = np.zeros(1, dtype=np.uint64)
        if self.pid == HELPER:
            self.network.receive(STATIC, "pace", word)
        elif self.pid == STATIC:
            self.network.send(HELPER, "pace", word)

    # -- randomness ------------------------------------------------------

    def _elements(self, peer, purpose, field, shape, out=None):
        self.check_process()
        if self.threshold == 0:
            out = field.empty(shape) if out is None else out
            out[...] = 0
            return out
        return self._random.stream(peer, purpose).elements(field, shape, out)

    def random_elements(
        self,
        peer: int,
        owner: int,
        field: Field,
        shape: tuple[int, ...],
        out: npt.NDArray[np.unsignedinteger[Any]] | None = None,
    ) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Uniform elements that `owner` and its seed party both draw."""
        purpose = b"input-%d-%d" % (owner, field.bits)
        return self._elements(peer, purpose, field, shape, out)

    def zero_elements(
        self, peer: int, field: Field, shape: tuple[int, ...]
    ) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Uniform elements shared with `peer`, for sharings of zero."""
        return self._elements(peer, b"zero-%d" % field.bits, field, shape)

    def check_process(self) -> None:
        """Raise InsecureSetupError in a copy of the process that opened the session."""
        if os.getpid() != self._process:
            raise InsecureSetupError(
                "this session belongs to the process that opened it: a copy in a "
                "forked process would use the same random numbers again"
            )

    def stream(self, peer: int, purpose: bytes) -> Any:
        """The key stream shared with `peer` for `purpose`."""
        self.check_process()
        return self._random.stream(peer, purpose)

    def seed_for(self, peer: int, purpose: bytes) -> bytes:
        """A key shared with `peer` for `purpose`, for code with streams of its own."""
        self.check_process()
        return self._random.key(peer, purpose)

    def receive_elements(
        self,
        peer: int,
        field: Field,
        shape: tuple[int, ...],
        name: str,
        out: npt.NDArray[np.unsignedinteger[Any]] | None = None,
    ) -> npt.NDArray[np.unsignedinteger[Any]]:
        """Receive field elements and refuse anything that is none."""
        out = field.empty(shape) if out is None else out
        self.network.receive(peer, name, out)
        protocols.check_elements(field, out, self.network.name_of(peer), peer)
        return out

    # -- the one function that opens values ------------------------------

    def open(
        self,
        array: SharedArray | OwnedArray,
        label: str,
        receivers: Sequence[int],
        *,
        raw: bool = False,
    ) -> npt.NDArray[Any] | None:
        """Open a shared array to the named receivers and to nobody else.

        This is the one function that opens values. The ledger must know
        `label`, and the declaration must name every receiver.

        A degree-2 array is first hidden by a sharing of zero of degree 2, so
        that only its value can be learned. Rounds: 1. Elements: per value and
        receiver 2 for degree 2, 1 for degree 1.

        Parameters
        ----------
        array : SharedArray or OwnedArray
            this party's share; or a party's own numbers, which it sends as they are
            (1 message per receiver).
        label : str
            a label declared with `ledger.declare`.
        receivers : sequence of int
            party numbers.
        raw : bool, optional
            return packed field elements instead of real numbers.

        Returns
        -------
        values : array of float (or packed uint64), or None
            the values at a receiver, None elsewhere.

        Raises
        ------
        UndeclaredOpeningError
            before anything is sent.
        """
        return self.open_all([(array, label, receivers)], raw=raw)[0]

    def open_all(
        self,
        openings: Sequence[tuple[SharedArray | OwnedArray, str, Sequence[int]]],
        *,
        raw: bool = False,
    ) -> list[npt.NDArray[Any] | None]:
        """Open several arrays, small ones in one round; see `open`.

        Parameters
        ----------
        openings : sequence of (array, label, receivers)

        Returns
        -------
        values : list
        """
        for array, label, receivers in openings:
            size = int(np.prod(array.shape))
            self.ledger.record_opening(label, receivers, size, array.open_bits)
        return self._open_recorded(openings, raw)

    def _open_recorded(self, openings, raw):
        """Open what the ledger has entered."""
        shared = [a.share for a, _, _ in openings if isinstance(a, SharedArray)]
        if sum(share.nbytes for share in shared) > MAX_BACKLOG // 4:
            return self._open_in_pieces(openings, raw)
        sent = [self._send_opening(*opening) for opening in openings]
        return [
            self._receive_opening(array, share, label, receivers, raw)
            for (array, label, receivers), share in zip(openings, sent, strict=True)
        ]

    def _open_in_pieces(self, openings, raw):
        """Open large arrays a piece at a time.

        Sent at once, they would pile up at parties that are sending as well.
        """
        flat = [array.reshape(-1) for array, _, _ in openings]
        pieces = [[] for _ in openings]
        size = MAX_BACKLOG // 1024
        for start in range(0, max(len(a.share) for a in flat), size):
            for array, into, (_, label, receivers) in zip(
                flat, pieces, openings, strict=True
            ):
                part = array[start : start + size]
                if len(part.share):
                    share = self._send_opening(part, label, receivers)
                    into.append(
                        self._receive_opening(part, share, label, receivers, raw)
                    )
        return [
            np.concatenate(into).reshape(array.shape if not raw else array.share.shape)
            if self.pid in receivers
            else None
            for into, (array, _, receivers) in zip(pieces, openings, strict=True)
        ]

    def _send_opening(self, array, label, receivers):
        """Send what this party contributes; returns its share as sent."""
        share, degree = array.share, array.degree
        if degree == 2:
            zero = protocols.zero_share(self, array.field, array.shape)
            share = array.field.add(share, zero)
        for receiver in receivers:
            if self.pid in _senders(array, receiver):
                self.network.send(receiver, "open-" + label, share)
        return share

    def _receive_opening(self, array, share, label, receivers, raw):
        if self.pid not in receivers:
            return None
        shares = {p: array.empty() for p in _senders(array, self.pid)}
        self.network.receive_all(shares, "open-" + label)
        if isinstance(array, OwnedArray):
            return shares[array.owner]
        field = array.field
        for p, values in shares.items():
            protocols.check_elements(field, values, self.network.name_of(p), p)
        shares[self.pid] = share
        value = _recombine(field, array.degree, shares)
        return value if raw else field.decode(value, array.frac_bits)

    # -- public metadata -------------------------------------------------

    def tell(self, code: int) -> None:
        """Send a small public command word to every other party."""
        word = np.array([code], dtype=np.uint64)
        for peer in self.peers:
            self.network.send(peer, "command", word)

    def hear(self, conductor: int = MOVING) -> int:
        """Wait for the command word of the party that conducts."""
        word = np.empty(1, dtype=np.uint64)
        self.network.receive(conductor, "command", word)
        return int(word[0])

    def exchange(self, name: str, obj: Any) -> dict[int, Any]:
        """Exchange public metadata with all parties.

        Returns
        -------
        objects : dict
            maps each party number, this one included, to what it sent.
        """
        for peer in self.peers:
            self.network.send_json(peer, name, obj)
        received = {p: self.network.receive_json(p, name) for p in self.peers}
        return {**received, self.pid: obj}

    def agree(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Make sure that all parties run with the same public parameters.

        The first agreement of a run gives it its number, see `record`. Rounds: 1.

        Parameters
        ----------
        name : str
            what the parameters are for.
        parameters : dict
            public parameters, JSON-able; every party names the same ones.

        Raises
        ------
        ParameterMismatchError
            naming the parameter, this party's value and the other's. It is
            raised at every party, before any share is sent.
        """
        parameters = self._completed(parameters)
        views = self._views(name, {**parameters, "greeting": record.greeting()})
        for pid, view in views.items():
            if not _is_dict(view) or not all(isinstance(k, str) for k in view):
                raise ProtocolError(
                    f"{self.name_of(pid)} sent malformed parameters of the {name}; "
                    "check that all parties run the same version",
                    pid,
                )
        greetings = {pid: view.pop("greeting", None) for pid, view in views.items()}
        for key in sorted(set().union(*views.values())):
            seen = {pid: views[pid].get(key, "nothing") for pid in sorted(views)}
            values = list(seen.values())
            if any(v != values[0] for v in values):
                # Whoever ended now would keep the others from seeing why.
                with suppress(PeerError):
                    self.exchange("disagreement", None)
                detail = ", ".join(
                    f"{v!r:.200} (hash {_hash(v)}) at {self.name_of(p)}"
                    for p, v in seen.items()
                )
                of = "" if _of_software(key) else f" of the {name}"
                raise ParameterMismatchError(
                    f"the parties do not agree on {key!r}{of}: {detail}; "
                    + _remedy(key, name),
                    key,
                )
        if self.ledger.run is None:
            plan = None if self.plan is None else self.plan.digest
            self.ledger.run = record.begin(greetings, self.pid, plan, self.roles)

    def _completed(self, parameters):
        """What else the parties must agree on, as it arrives."""
        parameters = {
            **parameters,
            "dipy_ppir version": _own_version(),
            "threshold": self.threshold,
        }
        return json.loads(json.dumps(parameters))

    def _views(self, name, parameters):
        """What each party says that the parameters are."""
        return self.exchange("agree-" + name, parameters)

    # -- life cycle ------------------------------------------------------

    def new_run(self) -> None:
        """Start a new ledger; the next receipt counts from here."""
        self.ledger = Ledger(roles=self.roles)

    def receipt(self, **facts: Any) -> dict[str, Any]:
        """Receipt of the run so far; all parties must call this together.

        They tell each other what they sent, and the digest of what their receipts have
        in common, signed between sites. Rounds: 1.

        Parameters
        ----------
        **facts
            what else belongs on it; see `make_receipt`.

        Returns
        -------
        receipt : dict
        """
        plan = self.plan
        own = run_facts(self.threshold, len(self.roles))
        facts = {**own, "role": self.role, **facts}
        if plan is not None:
            facts |= {
                "title": plan.title,
                "session_file": plan.digest,
                "parties": {
                    p.role: {"name": p.name, "fingerprint": p.fingerprint}
                    for pid, p in plan.present.items()
                },
            }
        digest = record.common_digest(make_receipt(self.ledger, {}, **facts))
        mine = {"sent": self.ledger.sent_by_phase(), "common": digest}
        if self._identity is not None:
            said = record.statement(self.pid, digest, self.roles)
            mine |= self._identity.sign(said)
        views = self.exchange("receipt", mine)
        by_party = {}
        for pid in sorted(views):
            phases = views[pid].get("sent") if _is_dict(views[pid]) else {}
            phases = phases if _is_dict(phases) else {}
            by_party[self.roles[pid]] = {
                k: v for k, v in phases.items() if _is_phase(k) and _is_count(v)
            }
        parties = None if plan is None else plan.parties
        tied = record.tie(views, self.pid, self.ledger.run, parties, self.roles)
        tied["warnings"] = [*facts.pop("warnings", []), *tied["warnings"]]
        return make_receipt(self.ledger, by_party, **facts, **tied)

    def fail(self, exc: BaseException) -> None:
        """Tell the other parties that this one stops because of `exc`."""
        reason, culprit = ERROR if isinstance(exc, Exception) else INTERRUPTED, None
        for kinds, code in (
            ((PeerLostError, PeerTimeoutError), LOST),
            (PeerAbortedError, ENDED),
            ((ProtocolError, AuthenticationError), VIOLATION),
        ):
            if isinstance(exc, kinds) and exc.culprit is not None:
                reason, culprit = code, exc.culprit
        if isinstance(exc, ProtocolError | PeerAbortedError) and exc.culprit is None:
            reason = MISMATCH
        self.network.abort(reason, culprit)
        self._close_mpyc()
        for relay in self._relays:
            relay.stop()

    def close(self) -> None:
        """Close all connections; the helper's relay ends with its owners'."""
        self.network.close()
        self._close_mpyc()
        for relay in self._relays:
            relay.join(self.network.timeout)

    def _close_mpyc(self):
        if self.mpyc is not None:
            self.mpyc.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if exc is not None and not isinstance(exc, AfterTheEnd):
            self.fail(exc)
            return
        if self.plan is not None:
            # Nobody goes on before all have written what they were given: a party that
            # cannot finds the others ready to resume.
            try:
                self.exchange("written", None)
            except BaseException as error:
                self.fail(error)
                raise
        self.close()


def software() -> dict[str, str]:
    """What must be installed alike at all parties, and what is here."""
    packages = ("dipy", "mpyc", "numpy")
    here = {f"{name} version": version(name) for name in packages}
    return {**here, SOURCE: record.source_digest()}


@cache
def _own_version():
    return version("dipy-ppir")


def _of_software(key):
    return key == SOURCE or key.endswith(" version")


def _remedy(key, name):
    if key == SOURCE:
        return (
            "install dipy_ppir from the same files everywhere: the versions are the "
            "same, but the program was changed at a party, or built from other files"
        )
    if key == "deal":
        return "give both owners the files that one run of dipy_ppir_helper --deal made"
    if key.endswith((" version", " of encryption")):
        return "install the same versions everywhere"
    if key == "resume":
        return "say --resume at all parties, or at none"
    if key == "checkpoint":
        return (
            "commands keep one: from Python pass checkpoint=Checkpoint(name of a "
            "folder), or leave it out at all parties"
        )
    what = name if name in ("session file", "plan") else "parameters"
    return f"give every party the same {what}"


def _hash(value):
    """First digits of the SHA-256 of a public parameter, to compare by telephone."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _is_phase(name):
    return isinstance(name, str) and re.fullmatch("[a-z ]{1,30}", name) is not None


def _is_count(number):
    return type(number) is int and 0 <= number < 1 << 63


def _is_dict(obj):
    return isinstance(obj, dict)


def _senders(array, receiver):
    """The parties that must send something to open an array to `receiver`."""
    if array.degree == 0:
        return [array.owner]
    if array.degree == 1:
        return [(receiver + 1) % 3]
    return [p for p in ROLES if p != receiver]


def _recombine(field, degree, shares):
    """Secrets from all three shares of degree 2, or from two of degree 1."""
    points = {p + 1: s for p, s in shares.items()}
    total = None
    for x, share in points.items():
        weight = field.weights[x - 1]
        if degree == 1:
            (y,) = set(points) - {x}
            weight = y * field.inverse(y - x)
        term = field.scale(share, weight)
        total = term if total is None else field.add(total, term)
    return total
