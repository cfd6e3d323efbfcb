"""Frames from a peer that is broken, hostile, silent or gone.

The test plays the peer: it holds the other end of a socket and writes bytes. Where
something depends on time, the test plays the clock as well; see `Clock`.
"""

import ast
import contextlib
import json
import math
import os
from pathlib import Path
import re
import select
import socket
import subprocess
import sys
import threading
import time

from dipy.align.transforms import regtransforms
import numpy as np
from pins import together
import pytest

import dipy_ppir
from dipy_ppir.align import RemoteImage
from dipy_ppir.align.imaffine import SecureMutualInformationMetric
from dipy_ppir.mpc import local, transport
from dipy_ppir.mpc.errors import (
    AuthenticationError,
    MPCError,
    PeerAbortedError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.fields import P61, P127
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC, Ledger
from dipy_ppir.mpc.party import meet
from dipy_ppir.mpc.protocols import share
from dipy_ppir.mpc.session import authenticate, local_trio, run_trio
from dipy_ppir.mpc.transport import (
    ABORT,
    DATA,
    JSON,
    MPYC,
    WAITING,
    Link,
    Network,
    operation_code,
)

HEADER = transport._HEADER


def frame(
    payload=b"",
    *,
    name="step",
    kind=DATA,
    sequence=0,
    magic=b"PP",
    version=1,
    length=None,
):
    length = len(payload) if length is None else length
    return (
        HEADER.pack(magic, version, kind, operation_code(name), sequence, length)
        + payload
    )


#: Seconds after which a test that hangs is ended.
HANGS = 120.0


class Clock:
    """Time that passes when the test says so, in the module `transport`.

    It takes the place of the modules `time` and `select` there: a wait ends by what
    arrives, or because the test lets time pass. Without a test that does so nobody
    ever times out.
    """

    def __init__(self):
        self.now = 0.0
        #: Called in place of every wait; it may send something and set `now`.
        self.at_each_wait = None
        self._lock = threading.Lock()
        self._waits = {}
        self._in_vain = 0

    def monotonic(self):
        return self.now

    def poll(self):
        return Poller(self)

    def __getattr__(self, name):
        return getattr(select, name)

    def wait(self, poller, seconds):
        """Events of a real poller, or none after so much time of this clock."""
        if self.at_each_wait is not None:
            self.at_each_wait()
            return poller.poll(0)  # also none at all: then it waits again
        until, limit = self.now + seconds, time.monotonic() + HANGS
        with self._lock:
            self._waits[poller] = until
        while True:
            with self._lock:
                events = poller.poll(0)
                if events or self.now >= until:
                    del self._waits[poller]
                    self._in_vain += not events
                    assert self._in_vain < 1000, "no time-out ends it"
                    return events
            assert time.monotonic() < limit, "waits for ever"
            time.sleep(0.001)

    def idle(self, parties):
        """Return when so many parties wait, and have read all that they were sent."""
        limit = time.monotonic() + HANGS
        while True:
            with self._lock:
                waits = self._waits.items()
                if len(waits) == parties and not any(
                    self.now >= until or poller.poll(0) for poller, until in waits
                ):
                    return
            assert time.monotonic() < limit, f"{len(waits)} wait, not {parties}"
            time.sleep(0.001)

    def pass_by(self, seconds, parties):
        """Let time pass while so many parties wait; each wakes when it wants to."""
        end = self.now + seconds
        while self.now < end:
            self.idle(parties)
            with self._lock:
                self.now = min(end, *self._waits.values())


class Poller:
    """What `Clock.poll` returns: like `select.poll()`, in the time of the clock."""

    def __init__(self, clock):
        self._clock, self._poller = clock, select.poll()

    def __getattr__(self, name):
        return getattr(self._poller, name)

    def poll(self, milliseconds):
        return self._clock.wait(self._poller, math.ceil(milliseconds) / 1000)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(transport, "time", clock)
    monkeypatch.setattr(transport, "select", clock)
    return clock


@contextlib.contextmanager
def beside(function, stop):
    """Run a function in a thread meanwhile; `stop()` makes it end."""
    thread = threading.Thread(target=function)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(HANGS)
        assert not thread.is_alive(), "waits for ever"


class Wire:
    """A network with one peer, the static owner, played by the test."""

    def __init__(self, timeout=300.0, wrap=lambda sock: sock):
        ours, self.peer = socket.socketpair()
        self.ledger = Ledger()
        self.network = Network(
            {STATIC: Link(wrap(ours), STATIC)}, timeout, lambda: self.ledger
        )

    def close(self):
        # The peer first: nobody has to wait for it to take what was not sent.
        self.peer.close()
        self.network.close()

    def receive(self, n=2):
        out = np.zeros(n, dtype=np.uint64)
        self.network.receive(STATIC, "step", out)
        return out.tolist()


@pytest.fixture
def wire():
    wire = Wire()
    yield wire
    wire.close()


TWO = np.array([1, 2], dtype=np.uint64).tobytes()


def test_frames_arrive(wire):
    wire.peer.sendall(frame(TWO) + frame(TWO[::-1], sequence=1))
    assert wire.receive() == [1, 2]
    assert wire.receive() == list(np.frombuffer(TWO[::-1], dtype=np.uint64))


class Drip:
    """A socket from which one byte can be read at a time, and then none."""

    def __init__(self, sock):
        self._sock, self._dry, self.reads = sock, False, 0

    def __getattr__(self, name):
        return getattr(self._sock, name)

    def recv_into(self, view):
        self._dry = not self._dry
        if not self._dry:
            raise BlockingIOError
        self.reads += 1
        return self._sock.recv_into(view[:1])


def test_frames_arrive_byte_by_byte():
    wire = Wire(wrap=Drip)
    try:
        wire.peer.sendall(frame(TWO))
        assert wire.receive() == [1, 2]
        assert wire.network.links[STATIC].sock.reads == len(frame(TWO))
    finally:
        wire.close()


def test_what_is_sent(wire):
    wire.network.send(STATIC, "step", np.array([1, 2], dtype=np.uint64))
    wire.network.send(STATIC, "step", np.array([], dtype=np.uint64))
    assert wire.peer.recv(1000) == frame(TWO) + frame(sequence=1)
    assert wire.ledger.sent == {("setup", STATIC): 16}
    assert wire.ledger.framing == 48


def test_large_arrays_travel_in_several_frames(wire, monkeypatch):
    monkeypatch.setitem(transport.MAX_PAYLOAD, DATA, 16)
    x = np.arange(7, dtype=np.uint64)
    wire.network.send(STATIC, "step", x)
    sent = wire.peer.recv(1000)
    assert len(sent) == 7 * 8 + 4 * 24
    wire.peer.sendall(sent)
    assert wire.receive(7) == x.tolist()


BAD_FRAMES = {
    # name: (bytes, what is raised, what it says)
    "magic": (frame(TWO, magic=b"XX"), ProtocolError, "does not speak this protocol"),
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", ProtocolError, "does not speak"),
    "version": (frame(TWO, version=2), ProtocolError, "same version"),
    "kind 0": (frame(TWO, kind=0), ProtocolError, "unknown kind or size"),
    "kind 9": (frame(TWO, kind=9), ProtocolError, "unknown kind or size"),
    "oversized": (frame(length=(1 << 24) + 1), ProtocolError, "unknown kind or size"),
    "huge": (frame(length=(1 << 64) - 1), ProtocolError, "unknown kind or size"),
    "huge JSON": (
        frame(kind=JSON, length=1 << 21),
        ProtocolError,
        "unknown kind or size",
    ),
    "huge abort": (
        frame(kind=ABORT, length=1 << 11),
        ProtocolError,
        "unknown kind or size",
    ),
    "too short": (frame(TWO[:8]), ProtocolError, "8 bytes where 16 were due"),
    "too long": (frame(TWO + TWO), ProtocolError, "32 bytes where 16 were due"),
    "empty": (frame(), ProtocolError, "0 bytes where 16 were due"),
    "another step": (frame(TWO, name="other"), ProtocolError, "another step"),
    "another kind": (frame(TWO, kind=MPYC), ProtocolError, "another step"),
    "JSON for data": (frame(b"{}", kind=JSON), ProtocolError, "another step"),
    "sequence ahead": (frame(TWO, sequence=1), ProtocolError, "out of order or twice"),
    "truncated header": (
        frame(TWO)[:10],
        PeerLostError,
        "closed the connection or died",
    ),
    "truncated payload": (
        frame(TWO)[:-1],
        PeerLostError,
        "closed the connection or died",
    ),
    "nothing": (b"", PeerLostError, "closed the connection or died"),
    "abort": (frame(b"\x01\xff", kind=ABORT), PeerAbortedError, "error on its side"),
    "interrupt": (frame(b"\x03\xff", kind=ABORT), PeerAbortedError, "interrupted"),
    "lost the helper": (
        frame(b"\x02\x02", kind=ABORT),
        PeerLostError,
        "helper.* is gone, says",
    ),
    "the helper ended it": (
        frame(b"\x04\x02", kind=ABORT),
        PeerAbortedError,
        "helper.* ended the computation, says",
    ),
    "strange abort": (
        frame(b"\xee\xee", kind=ABORT),
        PeerAbortedError,
        "error on its side",
    ),
    "empty abort": (frame(b"", kind=ABORT), PeerAbortedError, "error on its side"),
}


@pytest.mark.parametrize("early", [False, True], ids=["waited for", "already there"])
@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_frames(wire, clock, name, early):
    """The clock stands still: no time-out ends it."""
    raw, error, text = BAD_FRAMES[name]

    def speak():
        clock.at_each_wait = None
        wire.peer.sendall(raw)
        wire.peer.shutdown(socket.SHUT_WR)

    if early:
        speak()
    else:
        clock.at_each_wait = speak
    with pytest.raises(error, match=text) as caught:
        wire.receive()
    assert clock.at_each_wait is None, "the peer was not waited for"
    assert type(caught.value) is error
    culprit = HELPER if "the helper" in name else STATIC
    assert caught.value.culprit == culprit
    assert isinstance(caught.value, (MPCError, ConnectionError))
    assert "static owner" in str(caught.value)


@pytest.mark.parametrize("sequences", [(0, 0), (0, 2), (0, 1, 1), (0, 1, 0)])
def test_replayed_and_dropped_frames(wire, sequences):
    for s in sequences:
        wire.peer.sendall(frame(TWO, sequence=s))
    for _ in sequences[:-1]:
        wire.receive()
    with pytest.raises(ProtocolError, match="out of order or twice"):
        wire.receive()


def test_step_that_ran_ahead_is_noticed(wire):
    wire.peer.sendall(frame(TWO, name="later") + frame(TWO, sequence=1))
    with pytest.raises(ProtocolError, match="another step"):
        wire.receive()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nul",
        b"\xff\xfe",
        b"[" * 200_000,
        b"9" * 10_000,
        b"{'a': 1}",
        b'{"a": 1} {"b": 2}',
        b"\x80\x04\x95",
    ],
    ids=[
        "empty",
        "open",
        "word",
        "no utf-8",
        "deep",
        "long number",
        "python",
        "two",
        "pickle",
    ],
)
def test_malformed_metadata(wire, raw):
    wire.peer.sendall(frame(raw, name="meta", kind=JSON))
    with pytest.raises(ProtocolError, match="malformed metadata"):
        wire.network.receive_json(STATIC, "meta")


def test_metadata(wire):
    sent = {"a": [1, 2.5, None, "ä"], "b": {}}
    wire.network.send_json(STATIC, "meta", sent)
    raw = wire.peer.recv(1000)
    assert json.loads(raw[24:]) == sent
    wire.peer.sendall(raw)
    assert wire.network.receive_json(STATIC, "meta") == sent


@pytest.mark.parametrize("field", [P61, P127], ids=repr)
@pytest.mark.parametrize("excess", [0, 1])
def test_numbers_outside_the_field_are_refused(trio, outcomes, field, excess):
    """p and p + 1 stand for 0 and 1 as well: two spellings of one element."""
    bad = field.empty((4,))
    field.flat(bad)[:] = field.from_ints([1, 2, 3, 4])
    words = [
        (field.modulus + excess) >> 64 * w & (1 << 64) - 1 for w in range(field.words)
    ]
    field.flat(bad)[2] = words if field.words == 2 else words[0]

    def party(session):
        if session.pid == MOVING:
            # in place of an input: the point that goes to the helper
            session.network.send(HELPER, "share", bad)
        else:
            share(session, MOVING, None, (4,), field=field)

    errors = outcomes(trio, party, stop=False)
    assert type(errors[HELPER]) is ProtocolError
    assert "party 0 (moving owner) sent a number outside GF(2^" in str(errors[HELPER])
    assert errors[STATIC] is None


# -- floods ------------------------------------------------------------------


def flood(wire, frames):
    """Let the peer send while this party is sending itself and not receiving."""

    def write():
        with contextlib.suppress(OSError):  # the connection is closed on it, rightly
            for raw in frames:
                wire.peer.sendall(raw)
            wire.peer.shutdown(socket.SHUT_RDWR)  # it was not cut off

    def stop():
        with contextlib.suppress(OSError):
            wire.peer.shutdown(socket.SHUT_RDWR)

    with beside(write, stop):
        wire.network.send(STATIC, "step", np.zeros(1 << 20, dtype=np.uint64))


def test_a_flood_of_data_is_cut_off(wire, monkeypatch):
    monkeypatch.setattr(transport, "MAX_BACKLOG", 1 << 20)
    body = bytes(1 << 16)
    with pytest.raises(ProtocolError, match="more than it was asked for"):
        flood(wire, (frame(body, sequence=i) for i in range(1000)))


def test_a_flood_of_empty_frames_is_cut_off(wire, monkeypatch):
    """Headers alone fill memory as well."""
    monkeypatch.setattr(transport, "MAX_BACKLOG", 1 << 20)
    with pytest.raises(ProtocolError, match="more than it was asked for"):
        flood(wire, (frame(sequence=i) for i in range(200_000)))


def test_a_peer_may_run_ahead(wire):
    """Both send more than the sockets hold before either receives: no deadlock."""
    n = 1 << 18
    other = Network({MOVING: Link(wire.peer.dup(), MOVING)}, 300.0, Ledger)
    x, y = np.arange(n, dtype=np.uint64), np.arange(n, dtype=np.uint64)[::-1].copy()

    def party(network, peer, mine):
        theirs = np.empty_like(mine)
        network.send(peer, "step", mine)
        network.receive(peer, "step", theirs)
        return theirs

    try:
        back, got = together(
            lambda: party(wire.network, STATIC, y), lambda: party(other, MOVING, x)
        )
    finally:
        other.close()
    assert (back == x).all()
    assert (got == y).all()
    assert wire.network.links[STATIC].backlog == 0


# -- silence and death -------------------------------------------------------


@pytest.mark.parametrize("silent", [MOVING, STATIC, HELPER])
def test_time_out_names_the_silent_party(trio, outcomes, clock, silent):
    for session in trio:
        session.network.timeout = 40

    def party(session):
        if session.pid == silent:
            clock.pass_by(40, parties=2)
        else:
            session.network.receive(silent, "step", np.empty(1, dtype=np.uint64))

    errors = outcomes(trio, party, stop=False)
    assert errors[silent] is None
    for pid, error in enumerate(errors):
        if pid != silent:
            assert type(error) is PeerTimeoutError
            assert isinstance(error, TimeoutError)
            assert error.culprit == silent
            assert f"party {silent} (" in str(error)
            assert "40 s" in str(error)


@pytest.mark.parametrize("silent", [MOVING, STATIC, HELPER])
@pytest.mark.parametrize("hears", ["receiver", "sender"])
def test_who_waits_in_turn_is_not_blamed(trio, outcomes, clock, silent, hears):
    """One waits for the silent party, another for the one that waits.

    The first has more patience, so the second times out before it can be told.
    """
    first, second = sorted({MOVING, STATIC, HELPER} - {silent})
    done = threading.Event()
    trio[first].network.timeout, trio[second].network.timeout = 120, 60

    def party(session):
        network = session.network
        if session.pid == silent:
            clock.pass_by(60, parties=2)
            assert done.wait(HANGS)
            session.close()
        elif session.pid == second:
            network.receive(first, "step", np.empty(1, dtype=np.uint64))
        else:
            try:
                if hears == "receiver":
                    network.receive(silent, "step", np.empty(1, dtype=np.uint64))
                else:
                    network.send(silent, "step", np.empty(1 << 18, dtype=np.uint64))
            finally:
                done.set()

    errors = outcomes(trio, party)
    assert errors[silent] is None
    for pid in (first, second):
        assert isinstance(errors[pid], PeerError), errors[pid]
        assert errors[pid].culprit == silent, errors[pid]
    assert type(errors[second]) is PeerTimeoutError
    assert f"party {first} (" in str(errors[second])


def test_who_was_given_up_names_the_one_it_waits_for(trio, outcomes, clock):
    """The helper has too little patience, and says that the moving owner is lost."""
    trio[MOVING].network.timeout, trio[HELPER].network.timeout = 120, 40
    over = threading.Event()

    def party(session):
        one = np.empty(1, dtype=np.uint64)
        if session.pid == STATIC:
            clock.pass_by(40, parties=2)
            assert over.wait(HANGS)
            session.close()
        elif session.pid == HELPER:
            session.network.receive(MOVING, "step", one)
        else:
            try:
                session.network.receive(STATIC, "step", one)
            finally:
                over.set()

    trio[MOVING].network._tell = lambda *_: None  # the notice comes too late
    errors = outcomes(trio, party)
    assert errors[STATIC] is None
    assert type(errors[HELPER]) is PeerTimeoutError
    assert errors[HELPER].culprit == MOVING
    assert errors[MOVING].culprit == STATIC
    assert "until party 2 (helper) gave up" in str(errors[MOVING])


def test_a_wait_that_is_over_is_no_excuse(trio, outcomes, clock):
    """Who waited, and got what it waited for, is to blame for its own silence."""
    for session in trio:
        session.network.timeout = 40
    one = np.empty(1, dtype=np.uint64)
    got = threading.Event()

    def party(session):
        if session.pid == HELPER:
            session.network.receive(MOVING, "step", one)
        elif session.pid == MOVING:
            session.network.receive(STATIC, "step", one.copy())
            got.set()
        else:
            clock.pass_by(16, parties=2)
            clock.idle(2)
            excuse = trio[HELPER].network.links[MOVING].waits_for
            session.network.send(MOVING, "step", one)
            assert got.wait(HANGS)
            clock.pass_by(24, parties=1)
            return excuse

    errors = outcomes(trio, party, stop=False)
    assert errors[STATIC] == {STATIC}, "the helper was told for whom it waits"
    assert errors[MOVING] is None
    assert type(errors[HELPER]) is PeerTimeoutError
    assert errors[HELPER].culprit == MOVING


def test_what_follows_a_notice_is_heard(wire):
    """Also when the connection is closed already, as a busy party finds it."""
    last = frame(bytes([2, HELPER]), kind=ABORT, sequence=2)
    notices = [frame(b"\1", kind=WAITING, sequence=i) for i in range(2)]
    wire.peer.sendall(b"".join(notices) + last)
    wire.peer.close()
    with pytest.raises(PeerLostError, match="helper.* is gone, says party 1") as caught:
        wire.network._lost(wire.network.links[STATIC])
    assert caught.value.culprit == HELPER


def test_saying_that_one_waits_is_not_progress(wire, clock):
    """Otherwise two parties that wait for each other would do so for ever."""
    said = 0

    def chatter():
        nonlocal said
        clock.now += 1
        assert clock.now <= 300, "the time was extended"
        for _ in range(transport.MAX_NOTICES):
            wire.peer.sendall(frame(b"\1", kind=WAITING, sequence=said))
            said += 1

    clock.at_each_wait = chatter
    with pytest.raises(PeerTimeoutError):
        wire.receive()
    assert clock.now == 300
    link = wire.network.links[STATIC]
    assert link._received == said
    assert said * len(frame(b"\1")) > transport.LEAST_PROGRESS
    assert link.backlog == 0


@pytest.mark.parametrize("size", [4, 1 << 20])
def test_an_interrupt_while_sending_is_no_repetition(size):
    """What the operating system took before the interrupt is not sent twice."""
    ours, theirs = socket.socketpair()

    class Interrupted:
        family = None

        def __getattr__(self, name):
            return getattr(ours, name)

        def sendmsg(self, parts):
            ours.sendmsg(parts)
            raise KeyboardInterrupt

    ledger = Ledger()
    one = Network({STATIC: Link(Interrupted(), STATIC)}, 300, lambda: ledger)
    other = Network({MOVING: Link(theirs, MOVING)}, 300, lambda: ledger)

    def far():
        out = np.empty(size, dtype=np.uint64)
        try:
            other.receive(MOVING, "step", out)
            other.receive(MOVING, "next", out)
        finally:
            other.close()

    with pytest.raises(KeyboardInterrupt):
        one.send(STATIC, "step", np.zeros(size, dtype=np.uint64))
    _, error = together(lambda: one.abort(3), far)
    assert type(error) is PeerLostError
    assert error.culprit == MOVING


def test_time_out_while_sending(wire, clock):
    """A peer that takes nothing is silent too."""

    def nothing():
        clock.now += 50
        assert clock.now <= 300

    clock.at_each_wait = nothing
    with pytest.raises(PeerTimeoutError, match="static owner"):
        wire.network.send(STATIC, "step", np.zeros(1 << 18, dtype=np.uint64))
    assert clock.now == 300


def test_what_a_peer_sends_does_not_extend_the_time_to_take(wire, clock):
    """It takes nothing, but sends on and on, now and then."""
    said = 0

    def chatter():
        nonlocal said
        clock.now += 10
        assert clock.now <= 300, "the time was extended"
        wire.peer.sendall(frame(bytes(1 << 14), sequence=said))
        said += 1

    clock.at_each_wait = chatter
    with pytest.raises(PeerTimeoutError) as caught:
        wire.network.send(STATIC, "step", np.zeros(1 << 18, dtype=np.uint64))
    assert caught.value.culprit == STATIC
    assert clock.now == 300
    assert wire.network.links[STATIC].bytes_in > transport.LEAST_PROGRESS


def test_slow_is_not_silent(wire, clock, monkeypatch):
    """A long frame may take many time-outs, as long as it comes along."""
    monkeypatch.setattr(transport, "LEAST_PROGRESS", 1 << 12)
    payload = np.arange(1 << 12, dtype=np.uint64)
    raw = frame(payload.tobytes())
    pieces = iter([raw[i : i + (1 << 12)] for i in range(0, len(raw), 1 << 12)])

    def slowly():
        clock.now += 250
        wire.peer.sendall(next(pieces))

    clock.at_each_wait = slowly
    received = np.empty_like(payload)
    wire.network.receive(STATIC, "step", received)
    assert clock.now == 9 * 250
    np.testing.assert_array_equal(received, payload)


def test_a_trickle_is_silence(wire, clock):
    """Nobody can hold the others for ever by a byte now and then."""
    raw = iter(frame(TWO))

    def trickle():
        clock.now += 10
        wire.peer.sendall(bytes([next(raw)]))

    clock.at_each_wait = trickle
    with pytest.raises(PeerTimeoutError, match="hardly anything"):
        wire.receive()
    assert clock.now == 300


def die(session):
    """As the kernel does it when a process is killed: no farewell."""
    for link in session.network.links.values():
        link.sock.shutdown(socket.SHUT_RDWR)
        link.sock.close()
    session.network.closed = True


@pytest.mark.parametrize("dead", [MOVING, STATIC, HELPER])
@pytest.mark.parametrize("wait_for", ["the dead", "the living"])
def test_death_ends_every_wait_at_once(trio, outcomes, clock, dead, wait_for):
    """Also the wait for somebody else, who is alive and has nothing to say.

    At once: the clock stands still.
    """

    def party(session):
        if session.pid == dead:
            clock.idle(2)
            die(session)
            return
        (living,) = {0, 1, 2} - {dead, session.pid}
        peer = dead if wait_for == "the dead" else living
        session.network.receive(peer, "step", np.empty(1, dtype=np.uint64))

    errors = outcomes(trio, party)
    assert errors[dead] is None
    for pid, error in enumerate(errors):
        if pid != dead:
            assert type(error) is PeerLostError, error
            assert error.culprit == dead
            assert f"party {dead} (" in str(error)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_death_ends_sending(trio, outcomes, clock, when):
    closed = threading.Event()

    def party(session):
        if session.pid == HELPER:
            if when == "meanwhile":
                clock.idle(2)
            session.network.close()
            closed.set()
            return
        if when == "before":
            assert closed.wait(HANGS)
        for _ in range(3):
            session.network.send(HELPER, "step", np.zeros(1 << 18, dtype=np.uint64))

    errors = outcomes(trio, party)
    assert [type(e) for e in errors[:2]] == [PeerLostError, PeerLostError]
    assert errors[MOVING].culprit == errors[STATIC].culprit == HELPER


def test_an_error_at_one_party_ends_all(trio, outcomes, clock):
    secret = "voxel 17.25"

    def party(session):
        if session.pid == STATIC:
            raise ValueError(secret)
        session.network.receive(
            HELPER if session.pid == MOVING else MOVING, "x", bytearray(8)
        )

    errors = outcomes(trio, party)
    assert str(errors[STATIC]) == secret
    assert isinstance(errors[MOVING], PeerAbortedError)
    assert errors[MOVING].culprit == STATIC
    assert "error on its side" in str(errors[MOVING])
    # the helper may hear of it from either
    assert isinstance(errors[HELPER], PeerError)
    for pid in (MOVING, HELPER):
        assert secret not in str(errors[pid]), "text made from data crossed the network"


def test_run_trio_raises_the_cause_not_its_consequences(trio):
    def party(session):
        if session.pid == HELPER:
            raise KeyError("cause")
        session.network.receive(HELPER, "x", bytearray(8))

    with pytest.raises(KeyError, match="cause"):
        run_trio(trio, party)


def test_a_session_that_is_left_closes(trio):
    with trio[0]:
        pass
    assert trio[0].network.closed

    def left():
        with trio[1]:
            raise ValueError

    def waiting():
        with trio[2]:
            trio[2].network.receive(1, "x", bytearray(8))

    errors = together(left, waiting)
    assert type(errors[0]) is ValueError
    assert type(errors[1]) is PeerAbortedError
    assert trio[1].network.closed
    assert trio[2].network.closed


# -- in the middle of an evaluation -------------------------------------------


def small_pair():
    rng = np.random.default_rng(5)
    static = rng.random((7, 6, 5))
    return static, np.sqrt(static) + 0.1 * rng.random(static.shape)


def evaluate(session, reveal):
    """One party's part of one evaluation of the metric and its gradient."""
    static, moving = small_pair()
    metric = SecureMutualInformationMetric(nbins=8, reveal=reveal, session=session)
    metric.setup(
        regtransforms["TRANSLATION", 3],
        static if session.pid == STATIC else RemoteImage(static.shape),
        moving if session.pid == MOVING else RemoteImage(moving.shape),
    )
    if session.pid == MOVING:
        metric.distance_and_gradient(np.array([0.2, -0.1, 0.3]))
        metric.end()
    else:
        metric.serve()


def steps_of(three, reveal):
    """The protocol steps of an evaluation, by sender, in order, each once."""
    steps = {pid: [] for pid in ROLES}

    def party(session):
        send = session.network.send

        def watched(peer, name, array):
            if name not in steps[session.pid]:
                steps[session.pid].append(name)
            send(peer, name, array)

        session.network.send = watched
        evaluate(session, reveal)

    three(party)
    return [(pid, name) for pid in steps for name in steps[pid]]


CHEATS = {
    # name: (what is sent instead, what the receiver says)
    "short": (lambda raw, name: (raw[:-8], name), "bytes where .* were due"),
    "long": (lambda raw, name: (raw + bytes(8), name), "bytes where .* were due"),
    "another step": (lambda raw, name: (raw, name + "?"), "another step"),
}


@pytest.mark.parametrize("how", [*CHEATS, "death"])
@pytest.mark.parametrize("reveal", ["histogram", "gradient"])
def test_a_party_that_breaks_off_in_an_evaluation(three, outcomes, how, reveal):
    """At every step of every party: both others learn of it at once."""
    steps = steps_of(three, reveal)
    assert len(steps) > 9
    for pid, step in steps:
        sessions = local_trio(timeout=300)

        def party(session, pid=pid, step=step):
            send = session.network.send

            def cheating(peer, name, array):
                if name != step:
                    send(peer, name, array)
                elif how == "death":
                    die(session)
                    raise ConnectionAbortedError
                else:
                    raw, name = CHEATS[how][0](bytes(memoryview(array).cast("B")), name)
                    send(peer, name, raw)

            if session.pid == pid:
                session.network.send = cheating
            evaluate(session, reveal)

        try:
            errors = outcomes(sessions, party)
        finally:
            for session in sessions:
                session.close()
        others = [errors[p] for p in ROLES if p != pid]
        at = f"{step} of party {pid}"
        for error in others:
            assert isinstance(error, PeerError), (at, error)
            assert not isinstance(error, PeerTimeoutError), (at, error)
            assert "\n" not in str(error)
        if how == "death":
            assert {type(error) for error in others} == {PeerLostError}, at
            assert {error.culprit for error in others} == {pid}, at
        else:
            refusals = [e for e in others if type(e) is ProtocolError]
            assert refusals, (at, others)
            for refusal in refusals:
                assert refusal.culprit == pid, at
                assert f"party {pid} ({ROLES[pid]})" in str(refusal)
                assert re.search(CHEATS[how][1], str(refusal)), at


# -- meeting -----------------------------------------------------------------


def meeting(present, accepts=True):
    """What each party that comes to a meeting returns or raises."""
    listeners = {p: socket.socket() for p in (MOVING, STATIC)}
    for listener in listeners.values():
        listener.bind(("127.0.0.1", 0))
        if accepts:
            listener.listen()
    addresses = {p: s.getsockname() for p, s in listeners.items()}
    try:
        results = together(
            *(
                lambda p=p: meet(p, b"t" * 32, addresses, listeners.get(p), 300)
                for p in present
            )
        )
    finally:
        for listener in listeners.values():
            listener.close()
    for result in results:
        if not isinstance(result, Exception):
            result.close()
    return dict(zip(present, results, strict=True))


def test_a_meeting():
    results = meeting(list(ROLES))
    assert [results[p].pid for p in sorted(results)] == [0, 1, 2]
    assert all(results[p].peers == sorted(set(ROLES) - {p}) for p in results)


@pytest.fixture
def time_flies(monkeypatch):
    """``time_flies(present)``: as soon as all who come have met, time flies.

    So that nobody times out before, however long it takes.
    """

    def arrange(present):
        now = time.monotonic
        left = len(present) * (len(present) - 1)  # ends of connections
        since = now() if left == 0 else None
        lock = threading.Lock()

        def monotonic():
            return now() if since is None else since + 10_000 * (now() - since)

        def watched(link, pid, token, *, timeout):
            nonlocal left, since
            if link.peer not in present:
                # It never answers, so this wait may as well be short.
                return authenticate(link, pid, token, timeout=0.1)
            seed = authenticate(link, pid, token, timeout=timeout)
            with lock:
                left -= 1
                if left == 0:
                    since = now()
            return seed

        monkeypatch.setattr("dipy_ppir.mpc.session.authenticate", watched)
        monkeypatch.setattr(time, "monotonic", monotonic)

    return arrange


@pytest.mark.parametrize("absent", [[STATIC], [HELPER], [STATIC, HELPER], [MOVING]])
def test_a_party_that_never_comes_is_named(time_flies, absent):
    present = [p for p in ROLES if p not in absent]
    time_flies(present)
    results = meeting(present)
    for pid in present:
        error = results[pid]
        assert isinstance(error, PeerTimeoutError), error
        assert error.culprit == absent[0]
        assert "did not connect within 300 s" in str(error)
        assert "\n" not in str(error)
    for pid in absent:
        named = [e for e in results.values() if f"party {pid} ({ROLES[pid]})" in str(e)]
        assert named, f"nobody names party {pid}"


@pytest.mark.parametrize("pid", [STATIC, HELPER])
def test_nobody_listens(pid):
    error = meeting([pid], accepts=False)[pid]
    assert isinstance(error, PeerLostError), error
    assert error.culprit == MOVING
    assert "party 0 (moving owner)" in str(error)


@pytest.mark.parametrize(
    ("program", "seconds", "error", "text"),
    [
        ("read(1); raise SystemExit(3)", 300, PeerLostError, "ended as it started"),
        # until its parent closes the pipe
        ("read()", 0.5, PeerTimeoutError, "did not connect within 0.5 s"),
    ],
    ids=["ends", "sleeps"],
)
def test_a_local_party_that_does_not_start(
    monkeypatch, descendants, program, seconds, error, text
):
    before = set(descendants(os.getpid()))
    popen = subprocess.Popen

    def other(command, **options):
        code = f"import sys; sys.stdin.buffer.{program}"
        return popen([sys.executable, "-c", code], **options)

    monkeypatch.setattr(local, "START_TIMEOUT", seconds)
    monkeypatch.setattr(local.subprocess, "Popen", other)
    with pytest.raises(error, match=text) as caught:
        local.LocalParties()
    assert caught.value.culprit in (STATIC, HELPER)
    assert ROLES[caught.value.culprit] in str(caught.value)
    assert set(descendants(os.getpid())) <= before, "a process is left"


# -- who is at the other end -------------------------------------------------


def handshake(tokens, pids=(0, 1), claims=(0, 1)):
    """Authenticate two ends in threads; what each returned or raised."""
    a, b = socket.socketpair()
    links = Link(a, claims[1]), Link(b, claims[0])

    def one(i):
        try:
            return authenticate(links[i], pids[i], tokens[i], timeout=300)
        finally:
            links[i].sock.shutdown(socket.SHUT_WR)

    try:
        return together(lambda: one(0), lambda: one(1))
    finally:
        a.close()
        b.close()


def test_two_ends_with_the_token_agree_on_a_fresh_seed():
    first, second = handshake([b"t" * 32] * 2), handshake([b"t" * 32] * 2)
    assert len(first[0]) == 32
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]


def test_a_wrong_token_is_refused_at_both_ends():
    for error in handshake([b"t" * 32, b"u" * 32]):
        assert type(error) is AuthenticationError
        assert "did not prove" in str(error)


def test_a_false_number_is_refused():
    errors = handshake([b"t" * 32] * 2, pids=(0, 2))
    assert type(errors[0]) is AuthenticationError
    assert errors[0].culprit == 1


@pytest.mark.parametrize("how", ["echo", "zero point", "garbage", "silence", "close"])
def test_a_stranger_is_refused(how):
    """An echo of what we send, or a low-order point, proves nothing."""
    a, b = socket.socketpair()

    def stranger():
        if how == "close":
            b.close()
        elif how == "echo":
            for sequence in range(2):
                raw = bytearray(b.recv(1000))
                raw[24] = 1 if sequence == 0 else raw[24]
                b.sendall(raw)
        elif how == "zero point":
            b.sendall(
                frame(b"\x01" + bytes(32), name="hello")
                + frame(bytes(32), name="proof", sequence=1)
            )
        elif how == "garbage":
            b.sendall(bytes(200))

    seconds = 0.1 if how == "silence" else 300
    with beside(stranger, a.close), pytest.raises(PeerError) as caught:
        authenticate(Link(a, 1), 0, b"t" * 32, timeout=seconds)
    b.close()
    expected = {
        "echo": AuthenticationError,
        "zero point": AuthenticationError,
        "garbage": ProtocolError,
        "silence": PeerTimeoutError,
        "close": PeerLostError,
    }
    assert type(caught.value) is expected[how]


# -- nothing from a peer is unpickled or evaluated ----------------------------

DANGEROUS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def python_files():
    return sorted(Path(dipy_ppir.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", python_files(), ids=lambda p: p.stem)
def test_the_package_cannot_unpickle_or_evaluate(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not DANGEROUS & {n.split(".")[0] for n in names}
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", None)
            assert called not in ("eval", "exec", "__import__"), f"line {node.lineno}"
            for keyword in node.keywords:
                unsafe = keyword.arg == "allow_pickle" and getattr(
                    keyword.value, "value", 1
                )
                assert not unsafe, f"line {node.lineno}"
