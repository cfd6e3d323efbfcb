r"""The helper deals before the owners meet, and is gone when they do.

In many registrations the helper sends and receives nothing: it deals numbers, and hides
what is opened by noise. Then it can run by itself, ahead: what it sends goes to two
files (`dealfile`), one for each owner, who reads there what it would have received.
Protocols are those of three parties, with the same messages between the owners.

- `DealingSession` is the helper's end. It has no peers that could answer: a protocol in
  which the helper receives ends with an error.
- `DealtSession` is an owner's end, with one connection, to the other owner.

**Sections.** The helper does not know how many steps the owners will take, and deals
for as many as there may be. Where they go on after fewer, `Session.section` takes them
to what is dealt for there: each section has streams of its own, from keys of its own,
and a place in the file where its messages begin. A section is begun once.

**Who learns what.** Of what is opened to all parties, the owners learn it and the
helper does not, which learns nothing at all. An owner has of the helper exactly what it
would have been sent, if all of it before the first step: it is uniform and independent
of what the owners put in, so that a simulator draws it at random, then as well as step
by step. Who has both owners' deals, and what they sent each other, can open everything,
as who has both seeds of a helper that is there. So each file is sealed to its owner,
and the helper has to forget its secrets, which it never writes down elsewhere.

**Rounds and bytes.** Those of the protocols, less the messages of the helper: what it
sends is read, and no round is waited for. Numbers that a section takes over from the
one before and multiplies are masked once more (`Shares.renewed`): 2 elements each, and
a round, in the end of each level of SyN.

**For what was dealt.** All that the parties must agree on (`Session.agree`) is in the
deals, as the helper had it, and compared as if the helper said so now.
"""

from collections import Counter
import secrets

from dipy_ppir.mpc import record
from dipy_ppir.mpc.dealfile import Deal, DealWriter, deal_path
from dipy_ppir.mpc.errors import (
    DealError,
    InsecureSetupError,
    ParameterMismatchError,
    ProtocolError,
    SessionFileError,
)
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.network import Network
from dipy_ppir.mpc.prg import Pairwise, derive_key
from dipy_ppir.mpc.session import DEFAULT_TIMEOUT, Session, software

OWNERS = {pid: ROLES[pid] for pid in (MOVING, STATIC)}
#: What owners agree on without the helper: states and going on with them, and that
#: their deals belong together.
BETWEEN_OWNERS = ("checkpoint", "resume", "deal")


class _Sectioned(Pairwise):
    """Streams of which some begin anew, with keys of their own, at each section.

    Parameters
    ----------
    seeds : dict
        see `Pairwise`.
    sectioned : sequence of int
        the parties with which they do.
    before : callable
        called before anything is drawn with one of these.
    """

    def __init__(self, seeds, sectioned, before=lambda: None):
        super().__init__(seeds)
        self._before = before
        self._whole = {p: seeds[p] for p in sectioned}
        self.begin("")

    def begin(self, name):
        """Begin a section."""
        for peer, seed in self._whole.items():
            self._seeds[peer] = derive_key(seed, b"section " + name.encode())
        for kept in (self._streams, self._keys):
            for key in [key for key in kept if key[0] in self._whole]:
                del kept[key]

    def key(self, peer, purpose):
        """See `Pairwise`."""
        if peer in self._whole:
            self._before()
        return super().key(peer, purpose)

    def stream(self, peer, purpose):
        """See `Pairwise`."""
        if peer in self._whole:
            self._before()
        return super().stream(peer, purpose)


# -- the helper ----------------------------------------------------------------


class _Files(Network):
    """Sends to two files, and receives nothing."""

    def send(self, peer, name, array):
        """See `Network`."""
        self.links[peer].send(name, array)

    def receive_all(self, arrays, name):
        """Refuse: nobody is there."""
        raise ProtocolError(
            f"the helper cannot deal this ahead: it would wait for {name!r} of "
            "somebody; use a session in which the helper takes part"
        )

    def receive_json(self, peer, name):
        """Refuse: nobody is there."""
        self.receive_all({}, name)

    def send_json(self, peer, name, obj):
        """Refuse: nobody would answer."""
        self.receive_all({}, name)

    def send_mpyc(self, peer, batch):
        """Refuse: nobody would answer."""
        self.receive_all({}, "MPyC")

    def receive_mpyc(self, peers):
        """Refuse: nobody is there."""
        self.receive_all({}, "MPyC")

    def abort(self, *_):
        """Throw away what was written."""
        for writer in self.links.values():
            writer.discard()

    close = abort


class DealingSession(Session):
    """The helper's end, before the owners meet; see the module.

    Parameters
    ----------
    writers : dict
        maps owners to `DealWriter`.
    told : dict, optional
        maps what the parties tell each other (`Session.exchange`) to what owners will
        say there, by number.
    number : str, optional
        of the deal.
    """

    ahead = True

    def __init__(self, writers, told=None, number=None):
        self.number = number
        seeds = {owner: writer.seed for owner, writer in writers.items()}
        super().__init__(HELPER, writers, seeds)
        self.network = _Files(writers, DEFAULT_TIMEOUT, lambda: self.ledger)
        self._random = _Sectioned(seeds, OWNERS)
        self._told, self._agreed = told or {}, {}

    def section(self, name):
        """See `Session.section`."""
        for writer in self.network.links.values():
            writer.begin(name)
        self._random.begin(name)

    def pace(self):
        """Nobody is waited for."""

    def exchange(self, name, obj):
        """What the owners will say, as far as it is known."""
        return {**self._told.get(name, {}), self.pid: obj}

    def agree(self, name, parameters):
        """Write down what the owners must agree on."""
        parameters = self._completed(parameters)
        for key in BETWEEN_OWNERS:
            parameters.pop(key, None)
        self._agreed.setdefault(name, []).append(parameters)
        if self.ledger.run is None:
            alone = {HELPER: ROLES[HELPER]}
            greetings = {HELPER: record.greeting()}
            self.ledger.run = record.begin(greetings, HELPER, None, alone)

    def open_all(self, openings, *, raw=False):
        """See `Session.open_all`; nothing is opened to the helper."""
        return super().open_all(_to_owners(openings), raw=raw)

    def receipt(self, **facts):
        """There is none: nobody has done anything yet."""
        return {"warnings": [], **facts}

    def finish(self):
        """Finish both files."""
        told = {
            name: {ROLES[pid]: said for pid, said in views.items()}
            for name, views in self._told.items()
        }
        for writer in self.network.links.values():
            writer.finish({"agreed": self._agreed, "told": told})


def open_deal(plan, identity, path, folder=None, deal=None):
    """An owner's deal, checked before anybody is met.

    Parameters
    ----------
    plan : SessionFile
    identity : Identity
    path : str or Path
        the session file.
    folder : str or Path, optional
        of this party's key.
    deal : str or Path, optional
        the file; by default see `deal_path`.

    Returns
    -------
    deal : Deal

    Raises
    ------
    DealError
        see `Deal`.
    SessionFileError
        if the session file does not name this party, or it is the helper.
    """
    owner = plan.party_of(identity.fingerprint).pid
    if owner == HELPER:
        raise SessionFileError(
            "the helper of this session deals before the owners meet, and does not "
            "meet them; run dipy_ppir_helper --deal"
        )
    path = deal_path(None, path, owner) if deal is None else deal
    return Deal(path, owner, plan, software(), identity, folder)


def deal_for(plan, identity, paths, told):
    """The helper's end of a session file, to be dealt.

    Parameters
    ----------
    plan : SessionFile
    identity : Identity
        the helper's.
    paths : sequence of Path
        where the deals of the moving and of the static owner are written.
    told : dict
        see `DealingSession`.

    Returns
    -------
    session : DealingSession
    """
    header = {
        "deal": secrets.token_hex(16),
        "session_file": plan.digest,
        "software": software(),
    }
    writers = {
        owner: DealWriter(path, header, owner, plan.deal[owner]["sealing"], identity)
        for owner, path in zip(OWNERS, paths, strict=True)
    }
    session = DealingSession(writers, told, header["deal"])
    session.plan = plan
    session.agree(plan.kind, {**plan.agreement(), **software()})
    return session


def _to_owners(openings):
    return [
        (array, label, [r for r in receivers if r in OWNERS])
        for array, label, receivers in openings
    ]


# -- the owners ----------------------------------------------------------------


def check_dealt(parties, threshold, insecure=False):
    """Refuse set-ups that keep no secret.

    Raises
    ------
    InsecureSetupError
        with the reason.
    """
    if parties != 2 or threshold != 1 or insecure:
        raise InsecureSetupError(
            "what the helper dealt is for two owners, and hides their numbers: use it "
            "with threshold 1 and without insecure=True"
        )


class _WithDeal(Network):
    """The network of two owners, and what the helper dealt."""

    def __init__(self, links, timeout, ledger, roles, deal):
        super().__init__(links, timeout, ledger, roles)
        self._deal = deal

    def name_of(self, peer):
        """See `Network`."""
        return "the helper" if peer == HELPER else super().name_of(peer)

    def _send_frame(self, peer, kind, op, payload):
        if peer == HELPER:
            raise ProtocolError(
                "the helper is gone, and this computation needs it; use a session in "
                "which the helper takes part"
            )
        super()._send_frame(peer, kind, op, payload)

    def receive_all(self, arrays, name):
        """See `Network`; what the helper dealt is read where it would arrive."""
        arrays = dict(arrays)
        dealt = arrays.pop(HELPER, [])
        if arrays:
            super().receive_all(arrays, name)
        for array in dealt if isinstance(dealt, list) else [dealt]:
            self._deal.receive(name, array)


class DealtSession(Session):
    """An owner's end of a session for which the helper dealt ahead; see the module.

    Parameters
    ----------
    pid : int
        this party: 0 moving owner, 1 static owner.
    links, seeds : dict
        see `Session`; of the other owner.
    deal : Deal
        this owner's.
    timeout : float, optional
        longest silence of the other owner, in seconds.
    """

    roles, ahead = OWNERS, True
    _check_setup = staticmethod(check_dealt)

    def __init__(self, pid, links, seeds, deal, *, timeout=DEFAULT_TIMEOUT):
        super().__init__(pid, links, seeds, timeout=timeout)
        self.deal = deal
        self.network = _WithDeal(
            links, timeout, lambda: self.ledger, self.roles, self.deal
        )
        seeds = {**seeds, HELPER: deal.seed}
        self._random = _Sectioned(seeds, [HELPER], deal.use)
        # How often what was agreed on, by name: the helper did so as often.
        self._agreements = Counter()

    def name_of(self, pid):
        """See `Session`."""
        if self.plan is None and pid == HELPER:
            return f"the {ROLES[HELPER]}"
        return super().name_of(pid)

    def section(self, name):
        """See `Session.section`."""
        self.deal.begin(name)
        self._random.begin(name)

    def pace(self):
        """Nobody is waited for."""

    def open_all(self, openings, *, raw=False):
        """See `Session.open_all`; nothing is opened to the helper."""
        return super().open_all(_to_owners(openings), raw=raw)

    def agree(self, name, parameters):
        """See `Session.agree`; and that both deals belong together."""
        super().agree(name, {**parameters, "deal": self.deal.number})

    def receipt(self, **facts):
        """See `Session.receipt`; with the number of the deal and who made it."""
        deal = {"number": self.deal.number}
        if self.plan is not None:
            helper = self.plan.parties[HELPER]
            deal |= {"helper": helper.name, "fingerprint": helper.fingerprint}
        facts = {"m": len(ROLES), **facts}
        return super().receipt(deal=deal, deal_bytes=self.deal.size, **facts)

    def exchange(self, name, obj):
        """See `Session.exchange`; the owners must be as the helper was told."""
        views = super().exchange(name, obj)
        told = self.deal.facts["told"].get(name, {})
        for pid, role in OWNERS.items():
            if role in told and views[pid] != told[role]:
                raise ParameterMismatchError(
                    f"the helper dealt for another {role}: what it was told of the "
                    f"{name} ([deal] in the session file) is {told[role]!r:.300}, and "
                    f"{self.name_of(pid)} has {views[pid]!r:.300}; correct the session "
                    "file at all parties, and make a new deal",
                    name,
                )
        return views

    def _views(self, name, parameters):
        """See `Session.agree`; the helper said its part ahead."""
        views = super()._views(name, parameters)
        said = self.deal.facts["agreed"].get(name, [])
        place = self._agreements[name]
        self._agreements[name] += 1
        if place >= len(said):
            raise DealError(
                f"the helper dealt nothing for the {name}: use a session in which the "
                "helper takes part"
            )
        mine = {k: parameters[k] for k in BETWEEN_OWNERS if k in parameters}
        return {**views, HELPER: {**said[place], **mine}}

    def fail(self, exc):
        """See `Session.fail`."""
        super().fail(exc)
        self.deal.close()

    def close(self):
        """See `Session.close`."""
        super().close()
        self.deal.close()
