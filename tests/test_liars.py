"""Parties whose certificates are pinned, and who lie once all have met.

A whole registration over TLS, of which one party sends something else than it should:
the two others end soon, each with an error that names it.
"""

import os
import random
import time

import numpy as np
import pins
import pytest

from dipy_ppir.align import affine_registration
from dipy_ppir.mpc import meeting, tls, transport
from dipy_ppir.mpc.errors import PeerError, PeerTimeoutError
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.meeting import Meeting
from dipy_ppir.mpc.session import Session

ALL = (MOVING, STATIC, HELPER)
WAYS = {"direct": (HELPER, STATIC), "relayed": (HELPER,)}
SILENCE = 1.5
PARAMETERS = {
    "pipeline": ["translation"],
    "level_iters": [50],
    "sigmas": [0.0],
    "factors": [1],
    "nbins": 12,
}
HEADER = transport._HEADER


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(meeting, "REDIAL", 0.05)
    monkeypatch.setattr(tls, "_LINGER", 0.1)


class Stalled(Exception):
    """The liar has said its last word, and stays."""


class Lying:
    """A socket that sends frames as they are, but for one."""

    def __init__(self, sock, how, at):
        self._sock, self._how, self._left = sock, how, at
        self._before = b""

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def sendmsg(self, parts):
        self._left -= 1
        frame = b"".join(parts)
        if self._left > 0:
            self._before = frame
            return self._sock.sendmsg(parts)
        if self._left == 0:
            for lie in getattr(self, self._how)(frame):
                while lie:
                    try:
                        lie = lie[self._sock.sendmsg([memoryview(lie)]) :]
                    except BlockingIOError:
                        time.sleep(0.01)
        return len(frame)

    def header(self, frame, **changed):
        names = ("magic", "version", "kind", "op", "sequence", "length")
        fields = dict(zip(names, HEADER.unpack(frame[: HEADER.size]), strict=True))
        return HEADER.pack(*{**fields, **changed}.values())

    def garbage(self, frame):
        yield os.urandom(len(frame))

    def truncated(self, frame):
        yield frame[: len(frame) // 2]
        raise ConnectionResetError

    def oversized(self, frame):
        yield self.header(frame, length=1 << 40)

    def longer(self, frame):
        (length,) = HEADER.unpack(frame[: HEADER.size])[-1:]
        yield self.header(frame, length=length + 8) + frame[HEADER.size :] + bytes(8)

    def replayed(self, frame):
        yield self._before
        yield frame

    def dropped(self, frame):
        # The next frame is out of order; here the same one with the next number.
        (*_, sequence, _) = HEADER.unpack(frame[: HEADER.size])
        yield self.header(frame, sequence=sequence + 1) + frame[HEADER.size :]

    def another_step(self, frame):
        yield self.header(frame, op=transport.operation_code("another")) + frame[24:]

    def unknown_kind(self, frame):
        yield self.header(frame, kind=99) + frame[HEADER.size :]

    def silent(self, frame):
        yield b""
        raise Stalled


HOW = [
    n for n, f in vars(Lying).items() if n[0] != "_" and n not in ("sendmsg", "header")
]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("liar", ALL, ids=ROLES.get)
@pytest.mark.parametrize("way", WAYS)
def test_a_liar_is_named(way, liar, how):
    plan = pins.plan(WAYS[way], silence=SILENCE)
    rng = np.random.default_rng(1)
    image = np.add.outer(np.arange(20.0), np.arange(20.0)) + rng.uniform(0, 1, (20, 20))
    at = random.Random(f"{way} {liar} {how}").randint(3, 40)

    def party(pid):
        here = Meeting(plan, pins.identity(pid))
        here.hold()
        arguments = {"static": "remote", "moving": "remote"}
        if pid != HELPER:
            name = "moving" if pid == MOVING else "static"
            arguments[name], arguments[f"{name}_affine"] = image, np.eye(3)
        session = Session.of_meeting(here)
        if pid != liar:
            with session:
                return affine_registration(session=session, **arguments, **PARAMETERS)
        links = session.network.links.values()
        for link in links:
            link.sock = Lying(link.sock, how, at)
        try:
            affine_registration(session=session, **arguments, **PARAMETERS)
        except Stalled:
            time.sleep(2 * SILENCE)
        finally:
            for link in links:  # without a word, which would be another lie
                link.sock.close()

    start = time.monotonic()
    outcomes = pins.together(*(lambda p=p: party(p) for p in ALL))
    assert time.monotonic() - start < 5 * SILENCE + 5
    for pid in set(ALL) - {liar}:
        error = outcomes[pid]
        assert isinstance(error, PeerError), error
        assert error.culprit == liar, error
        assert f"party {liar} (" in str(error)
    if how == "silent":
        assert PeerTimeoutError in {type(outcomes[pid]) for pid in set(ALL) - {liar}}
