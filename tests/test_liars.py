"""Parties whose certificates are pinned, and who lie once all have met.

A whole registration over TLS, of which one party sends something else than it should:
the two others end, each with an error that names it. They would wait for 300 s, so
that they end because of the lie; who waits for a party that falls silent waits by a
clock that the test moves.
"""

from itertools import product
import random
import select
import threading
import time

import numpy as np
import pins
import pytest
from wire import set_clock

from dipy_ppir.align import affine_registration
from dipy_ppir.mpc import network
from dipy_ppir.mpc.errors import PeerError, PeerTimeoutError
from dipy_ppir.mpc.frame import DATA, HEADER, JSON, operation_code
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.meeting import Meeting
from dipy_ppir.mpc.session import Session

ALL = (MOVING, STATIC, HELPER)
WAYS = {"direct": (HELPER, STATIC), "relayed": (HELPER,)}
LONG = 300.0  # seconds; only a test that hangs waits so long
SILENCE = 604800.0  # the longest that a session file may name
PARAMETERS = {
    "pipeline": ["translation"],
    "level_iters": [50],
    "sigmas": [0.0],
    "factors": [1],
    "nbins": 12,
}


@pytest.fixture(autouse=True)
def prompt(monkeypatch):
    """Nothing that a party waits for out of politeness is cut short by a busy machine,
    and nobody waits between two attempts."""
    pins.meet_promptly(monkeypatch, LONG)


@pytest.fixture(autouse=True)
def no_thread_left_behind(prompt):
    yield
    end = time.monotonic() + LONG
    while any(t.name in ("meeting", "relay") for t in threading.enumerate()):
        assert time.monotonic() < end, "still running"
        time.sleep(0.005)


class Stalled(Exception):
    """The liar has said its last word, and stays."""


def a_lie(method):
    method.lie = True
    return method


class Liar:
    """Puts a lie in the place of one frame of a link, and says nothing more.

    Only frames that belong to the protocol are counted: how often a party says that
    it waits depends on the time.
    """

    def __init__(self, link, how, at):
        self._link, self._how, self._left = link, how, at
        self._honest, self._send = link.begin_frame, link.send_some
        self._before, self.told = b"", False
        #: How many frames it has sent, with what it says of its waiting.
        self.sent = link._sent
        link.begin_frame = self.begin_frame
        link.send_some = lambda: self._send() if link.unsent else 0

    def begin_frame(self, kind, op, payload):
        unsent = self._link.unsent
        start = len(unsent)
        self._honest(kind, op, payload)
        if kind in (DATA, JSON):
            self._left -= 1
        if self._left > 0:
            self._before = b"".join(unsent[start:])
            self.sent = self._link._sent
            return
        frame = b"".join(unsent[start:])
        del unsent[start:]
        if not self.told:
            self.told = True
            getattr(self, self._how)(frame)

    def send(self, *parts):
        """For `Network._send_frame`, which sends what a link has not sent yet."""
        self._link.unsent += map(memoryview, parts)

    def header(self, frame, **changed):
        names = ("magic", "version", "kind", "op", "sequence", "length")
        fields = dict(zip(names, HEADER.unpack(frame[: HEADER.size]), strict=True))
        return HEADER.pack(*{**fields, **changed}.values())

    @a_lie
    def garbage(self, frame):
        self.send(random.Random(1).randbytes(len(frame)))

    @a_lie
    def truncated(self, frame):
        self.send(frame[: len(frame) // 2])
        assert self._link.finish_frame(time.monotonic() + LONG)
        raise ConnectionResetError

    @a_lie
    def oversized(self, frame):
        self.send(self.header(frame, length=1 << 40))

    @a_lie
    def longer(self, frame):
        (length,) = HEADER.unpack(frame[: HEADER.size])[-1:]
        self.send(self.header(frame, length=length + 8), frame[HEADER.size :], bytes(8))

    @a_lie
    def replayed(self, frame):
        self.send(self._before, frame)

    @a_lie
    def dropped(self, frame):
        # The next frame is out of order; here the same one with the next number.
        (*_, sequence, _) = HEADER.unpack(frame[: HEADER.size])
        self.send(self.header(frame, sequence=sequence + 1), frame[HEADER.size :])

    @a_lie
    def another_step(self, frame):
        op = operation_code("another")
        self.send(self.header(frame, op=op), frame[HEADER.size :])

    @a_lie
    def unknown_kind(self, frame):
        self.send(self.header(frame, kind=99), frame[HEADER.size :])

    @a_lie
    def silent(self, frame):
        raise Stalled


class Clock:
    """The time of the parties' waits, see `wire.set_clock`: the real one, until the
    test moves it."""

    def __init__(self):
        self.ahead, self.waits, self.lock = 0.0, set(), threading.Lock()

    def monotonic(self):
        return time.monotonic() + self.ahead

    def poll(self):
        return _Poll(self)

    def __getattr__(self, name):
        return getattr(select, name)


class _Poll:
    def __init__(self, clock):
        self._clock, self._poll = clock, select.poll()

    def __getattr__(self, name):
        return getattr(self._poll, name)

    def events(self):
        return self._poll.poll(0)

    def poll(self, milliseconds):
        end = self._clock.monotonic() + milliseconds / 1000
        while True:
            with self._clock.lock:
                events = self.events()
                if events or self._clock.monotonic() >= end:
                    self._clock.waits.discard(self)
                    return events
                self._clock.waits.add(self)
            time.sleep(0.002)


def waits_for(session, liar, sessions, lies):
    """Whether a party has read all of the liar, or of another that waits for the liar,
    as this party knows, and waits for more."""
    network = session.network
    awaited = {link.peer for link in network._waiting_for}
    for peer in awaited:
        sent = lies[session.pid].sent
        if peer != liar:
            other = sessions[peer].network
            sent = other.links[session.pid]._sent
            between = {link.peer for link in other._waiting_for}
            if between != {liar} or network.links[peer].waits_for != {liar}:
                return False
        if network.links[peer]._received != sent:
            return False
    return bool(awaited)


def run_out_of_patience(clock, liar, sessions, lies):
    """Move the clock until nobody can go on, and then beyond the time-out.

    In small steps first, after which parties tell the others for whom they wait.
    """
    end = time.monotonic() + LONG
    honest = [session for pid, session in sessions.items() if pid != liar]
    while True:
        with clock.lock:
            idle = len(clock.waits) == 2 and not any(p.events() for p in clock.waits)
            if idle and all(waits_for(s, liar, sessions, lies) for s in honest):
                clock.ahead += SILENCE
                return
            clock.ahead += network.PATIENCE
        assert time.monotonic() < end, "somebody does not wait for the liar"
        time.sleep(0.01)


LIES = [n for n, f in vars(Liar).items() if getattr(f, "lie", False)]


def cases():
    """All lies of all parties, of which the quick suite has each lie twice: through the
    relay and not, told by different parties."""
    cases = []
    for (i, how), (j, way), (k, liar) in product(
        enumerate(LIES), enumerate(WAYS), enumerate(ALL)
    ):
        marks = [] if (i + j) % 3 == k else [pytest.mark.heavy]
        case = f"{way}-{ROLES[liar]}-{how}"
        cases.append(pytest.param(way, liar, how, marks=marks, id=case))
    return cases


@pytest.mark.parametrize(("way", "liar", "how"), cases())
def test_a_liar_is_named(way, liar, how, monkeypatch):
    silence = SILENCE if how == "silent" else LONG
    options = {"parameters": PARAMETERS, "reveal": "transform"}
    plan = pins.plan(WAYS[way], connect=LONG, silence=silence, **options)
    rng = np.random.default_rng(1)
    image = np.add.outer(np.arange(20.0), np.arange(20.0)) + rng.uniform(0, 1, (20, 20))
    at = random.Random(f"{way} {liar} {how}").randint(3, 40)
    clock, sessions, lies = Clock(), {}, {}
    if how == "silent":
        set_clock(monkeypatch, clock)
    failed = {pid: threading.Event() for pid in ALL}

    def party(pid):
        here = Meeting(plan, pins.identity(pid))
        here.hold()
        arguments = {"static": "remote", "moving": "remote"}
        if pid != HELPER:
            name = "moving" if pid == MOVING else "static"
            arguments[name], arguments[f"{name}_affine"] = image, np.eye(3)
        session = sessions[pid] = Session.of_meeting(here)
        if pid != liar:
            with session:
                try:
                    return affine_registration(
                        session=session, **arguments, **PARAMETERS
                    )
                finally:
                    failed[pid].set()
        links = session.network.links.values()
        lies.update({link.peer: Liar(link, how, at) for link in links})
        try:
            affine_registration(session=session, **arguments, **PARAMETERS)
        except Stalled:
            run_out_of_patience(clock, liar, sessions, lies)
            assert all(failed[other].wait(LONG) for other in set(ALL) - {liar})
        finally:
            for link in links:  # without a word, which would be another lie
                link.sock.close()
            if session.mpyc is not None:
                session.mpyc.close()
            for pump in here.relays:
                pump.join(LONG)

    outcomes = pins.together(*(lambda p=p: party(p) for p in ALL), seconds=2 * LONG)
    assert any(lie.told for lie in lies.values()), "it never came to the lie"
    for pid in set(ALL) - {liar}:
        error = outcomes[pid]
        assert isinstance(error, PeerError), error
        assert error.culprit == liar, outcomes
        assert plan.parties[liar].title in str(error)
    timed_out = PeerTimeoutError in {type(outcome) for outcome in outcomes}
    assert timed_out == (how == "silent"), outcomes
