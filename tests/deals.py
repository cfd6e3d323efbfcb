"""Deals of a helper, and sessions of two owners that have them, in one process."""

from contextlib import suppress
import secrets
import socket
from types import SimpleNamespace

from parties import run_trio

from dipy_ppir.mpc.agreedfile import Party
from dipy_ppir.mpc.dealfile import Deal, DealWriter
from dipy_ppir.mpc.dealt import OWNERS, DealingSession, DealtSession
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import HELPER, ROLES
from dipy_ppir.mpc.link import Link

SOFTWARE = {"numpy version": "any"}


class Deals:
    """Three parties' keys, and deals of the helper in a folder.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder):
        self.folder = folder
        self.identities = {p: create_identity(name) for p, name in ROLES.items()}
        parties = {
            p: Party(p, ROLES[p], identity.fingerprint, None)
            for p, identity in self.identities.items()
        }
        self.plan = SimpleNamespace(parties=parties, digest=secrets.token_hex(32))

    def path(self, owner):
        """Where the deal of an owner is."""
        return self.folder / f"{owner}.deal"

    def home(self, owner):
        """Folder of an owner's key."""
        return self.folder / f"home-{owner}"

    def make(self, function, told=None, software=SOFTWARE):
        """Deal for ``function(session)``; returns what it returned."""
        header = {
            "deal": secrets.token_hex(16),
            "session_file": self.plan.digest,
            "software": software,
        }
        writers = {
            p: DealWriter(
                self.path(p),
                header,
                p,
                self.identities[p].sealing,
                self.identities[HELPER],
            )
            for p in OWNERS
        }
        session = DealingSession(writers, told)
        try:
            found = function(session)
            session.finish()
        except BaseException as exc:
            session.fail(exc)
            raise
        return found

    def open(self, owner, software=SOFTWARE, **options):
        """An owner's deal."""
        options = {"folder": self.home(owner), **options}
        identity = self.identities[owner]
        return Deal(self.path(owner), owner, self.plan, software, identity, **options)

    def sessions(self, timeout=300):
        """Sessions of both owners, joined by a socket pair."""
        deals = [self.open(p) for p in OWNERS]
        seed, ends = secrets.token_bytes(32), socket.socketpair()
        return [
            DealtSession(p, {q: Link(end, q)}, {q: seed}, deal, timeout=timeout)
            for p, q, end, deal in zip(
                OWNERS, reversed(OWNERS), ends, deals, strict=True
            )
        ]

    def run(self, function, *args):
        """Run ``function(session, *args)`` at both owners; their results."""
        sessions = self.sessions()
        try:
            return run_trio(sessions, function, *args)
        finally:
            for session in sessions:
                with suppress(Exception):
                    session.close()
