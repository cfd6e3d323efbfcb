"""Frames from a peer that is broken, hostile, silent or gone.

The test plays the peer: it holds the other end of a socket and writes bytes.
"""

import ast
import json
import os
from pathlib import Path
import re
import socket
import subprocess
import sys
import threading
import time

from dipy.align.transforms import regtransforms
import numpy as np
import pytest

import dipy_ppir
from dipy_ppir.align import RemoteImage
from dipy_ppir.align.imaffine import SecureMutualInformationMetric
from dipy_ppir.mpc import local, mpyc_bridge, transport
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


class Wire:
    """A network with one peer, the static owner, played by the test."""

    def __init__(self, timeout=5.0):
        ours, self.peer = socket.socketpair()
        self.ledger = Ledger()
        self.network = Network(
            {STATIC: Link(ours, STATIC)}, timeout, lambda: self.ledger
        )

    def close(self):
        self.network.close()
        self.peer.close()

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


def test_frames_arrive_byte_by_byte(wire):
    def drip():
        for byte in frame(TWO):
            wire.peer.sendall(bytes([byte]))
            time.sleep(0.002)

    thread = threading.Thread(target=drip)
    thread.start()
    assert wire.receive() == [1, 2]
    thread.join()


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
def test_bad_frames(wire, name, early):
    raw, error, text = BAD_FRAMES[name]
    if early:
        wire.peer.sendall(raw)
        wire.peer.shutdown(socket.SHUT_WR)
    else:
        timer = threading.Timer(
            0.05, lambda: (wire.peer.sendall(raw), wire.peer.shutdown(socket.SHUT_WR))
        )
        timer.start()
    start = time.monotonic()
    with pytest.raises(error, match=text) as caught:
        wire.receive()
    if not early:
        timer.join()
    assert time.monotonic() - start < 2
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
        try:
            for raw in frames:
                wire.peer.sendall(raw)
        except OSError:
            pass  # the connection was closed on it, rightly

    thread = threading.Thread(target=write)
    thread.start()
    try:
        wire.network.send(STATIC, "step", np.zeros(1 << 20, dtype=np.uint64))
    finally:
        wire.network.close()
        wire.peer.close()
        thread.join()


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
    other = Network({MOVING: Link(wire.peer.dup(), MOVING)}, 5.0, Ledger)
    x, y = np.arange(n, dtype=np.uint64), np.arange(n, dtype=np.uint64)[::-1].copy()
    got = np.empty_like(x)

    def far():
        other.send(MOVING, "step", x)
        other.receive(MOVING, "step", got)

    thread = threading.Thread(target=far)
    thread.start()
    wire.network.send(STATIC, "step", y)
    back = np.empty_like(x)
    wire.network.receive(STATIC, "step", back)
    thread.join()
    other.close()
    assert (back == x).all()
    assert (got == y).all()
    assert wire.network.links[STATIC].backlog == 0


# -- silence and death -------------------------------------------------------


@pytest.mark.parametrize("silent", [MOVING, STATIC, HELPER])
def test_time_out_names_the_silent_party(trio, outcomes, silent):
    for session in trio:
        session.network.timeout = 0.3
    done = threading.Event()

    def party(session):
        if session.pid == silent:
            done.wait(5)
            return None
        try:
            session.network.receive(silent, "step", np.empty(1, dtype=np.uint64))
        except PeerError as exc:
            return exc
        finally:
            time.sleep(0.3)  # long enough for the other to time out by itself
            done.set()

    start = time.monotonic()
    errors = outcomes(trio, party, stop=False)
    assert time.monotonic() - start < 3
    for pid, error in enumerate(errors):
        if pid != silent:
            assert type(error) is PeerTimeoutError
            assert isinstance(error, TimeoutError)
            assert error.culprit == silent
            assert f"party {silent} (" in str(error)
            assert "0.3 s" in str(error)


@pytest.mark.parametrize("silent", [MOVING, STATIC, HELPER])
@pytest.mark.parametrize("hears", ["receiver", "sender"])
def test_who_waits_in_turn_is_not_blamed(trio, outcomes, silent, hears):
    """One waits for the silent party, another for the one that waits.

    The first has more patience, so the second times out before it can be told.
    """
    first, second = sorted({MOVING, STATIC, HELPER} - {silent})
    done = threading.Event()
    trio[first].network.timeout, trio[second].network.timeout = 1.5, 0.8

    def party(session):
        if session.pid == silent:
            done.wait(5)
            return None
        network = session.network
        try:
            if session.pid == second:
                network.receive(first, "step", np.empty(1, dtype=np.uint64))
            elif hears == "receiver":
                network.receive(silent, "step", np.empty(1, dtype=np.uint64))
            else:
                network.send(silent, "step", np.empty(1 << 22, dtype=np.uint64))
        finally:
            if session.pid == first:
                done.set()

    errors = outcomes(trio, party)
    assert errors[silent] is None
    for pid in (first, second):
        assert isinstance(errors[pid], PeerError), errors[pid]
        assert errors[pid].culprit == silent, errors[pid]
    assert type(errors[second]) is PeerTimeoutError
    assert f"party {first} (" in str(errors[second])


def test_who_was_given_up_names_the_one_it_waits_for(trio, outcomes):
    """The helper has too little patience, and says that the moving owner is lost."""
    trio[HELPER].network.timeout = 0.3
    over = threading.Event()

    def party(session):
        if session.pid == STATIC:
            over.wait(5)
            return None
        peer = {MOVING: STATIC, HELPER: MOVING}[session.pid]
        try:
            session.network.receive(peer, "step", np.empty(1, dtype=np.uint64))
        finally:
            over.set()

    trio[MOVING].network._tell = lambda *_: None  # the notice comes too late
    errors = outcomes(trio, party)
    assert errors[HELPER].culprit == MOVING
    assert errors[MOVING].culprit == STATIC
    assert "until party 2 (helper) gave up" in str(errors[MOVING])


def test_a_wait_that_is_over_is_no_excuse(trio, outcomes):
    """Who waited, and got what it waited for, is to blame for its own silence."""
    for session in trio:
        session.network.timeout = 1.0
    one = np.empty(1, dtype=np.uint64)
    over = threading.Event()

    def party(session):
        if session.pid == HELPER:
            try:
                session.network.receive(MOVING, "step", one)
            finally:
                over.set()
        elif session.pid == MOVING:
            session.network.receive(STATIC, "step", one.copy())
            over.wait(5)
        else:
            time.sleep(0.4)
            session.network.send(MOVING, "step", one)
            over.wait(5)

    errors = outcomes(trio, party, stop=False)
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


def test_saying_that_one_waits_is_not_progress(wire):
    """Otherwise two parties that wait for each other would do so for ever."""
    wire.network.timeout = 0.3
    over = threading.Event()

    def chatter():
        for i in range(1 << 16):
            if over.is_set():
                return
            try:
                wire.peer.sendall(frame(b"\1", kind=WAITING, sequence=i))
            except OSError:
                return

    thread = threading.Thread(target=chatter)
    thread.start()
    start = time.monotonic()
    with pytest.raises(PeerTimeoutError):
        wire.receive()
    assert time.monotonic() - start < 3
    assert wire.network.links[STATIC].backlog == 0
    over.set()
    wire.network.close()
    thread.join()


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
    one = Network({STATIC: Link(Interrupted(), STATIC)}, 5, lambda: ledger)
    other = Network({MOVING: Link(theirs, MOVING)}, 5, lambda: ledger)
    with pytest.raises(KeyboardInterrupt):
        one.send(STATIC, "step", np.zeros(size, dtype=np.uint64))
    one.abort(3)
    out = np.empty(size, dtype=np.uint64)
    with pytest.raises(PeerLostError) as caught:
        other.receive(MOVING, "step", out)
        other.receive(MOVING, "next", out)
    assert caught.value.culprit == MOVING
    other.close()


def test_time_out_while_sending(wire):
    """A peer that takes nothing is silent too."""
    wire.network.timeout = 0.2
    with pytest.raises(PeerTimeoutError, match="static owner"):
        wire.network.send(STATIC, "step", np.zeros(1 << 22, dtype=np.uint64))


def test_slow_is_not_silent(wire):
    """A long frame may take many time-outs, as long as it comes along."""
    wire.network.timeout = 0.25
    payload = np.arange(1 << 18, dtype=np.uint64)

    def slowly():
        raw = frame(payload.tobytes())
        for i in range(0, len(raw), 2 * transport.LEAST_PROGRESS):
            time.sleep(0.12)
            wire.peer.sendall(raw[i : i + 2 * transport.LEAST_PROGRESS])

    thread = threading.Thread(target=slowly)
    thread.start()
    received = np.empty_like(payload)
    wire.network.receive(STATIC, "step", received)
    thread.join()
    np.testing.assert_array_equal(received, payload)


def test_a_trickle_is_silence(wire):
    """Nobody can hold the others for ever by a byte now and then."""
    wire.network.timeout = 0.25
    over = threading.Event()

    def trickle():
        for byte in frame(TWO):
            if over.wait(0.05):
                return
            wire.peer.sendall(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(PeerTimeoutError, match="hardly anything"):
        wire.receive()
    over.set()
    thread.join()


@pytest.mark.parametrize("dead", [MOVING, STATIC, HELPER])
@pytest.mark.parametrize("wait_for", ["the dead", "the living"])
def test_death_ends_every_wait_at_once(trio, outcomes, dead, wait_for):
    """Also the wait for somebody else, who is alive and has nothing to say."""

    def party(session):
        if session.pid == dead:
            time.sleep(0.1)
            # as the kernel does it when a process is killed: no farewell
            for link in session.network.links.values():
                link.sock.shutdown(socket.SHUT_RDWR)
                link.sock.close()
            return None
        (living,) = {0, 1, 2} - {dead, session.pid}
        peer = dead if wait_for == "the dead" else living
        session.network.receive(peer, "step", np.empty(1, dtype=np.uint64))

    start = time.monotonic()
    errors = outcomes(trio, party)
    assert time.monotonic() - start < 2, "the time-out is 30 s"
    for pid, error in enumerate(errors):
        if pid != dead:
            assert isinstance(error, PeerError), error
            assert error.culprit == dead
            assert f"party {dead} (" in str(error)


def test_death_ends_sending(trio, outcomes):
    def party(session):
        if session.pid == HELPER:
            session.network.close()
            return
        time.sleep(0.1)
        for _ in range(3):
            session.network.send(HELPER, "step", np.zeros(1 << 20, dtype=np.uint64))

    errors = outcomes(trio, party)
    assert [type(e) for e in errors[:2]] == [PeerLostError, PeerLostError]
    assert errors[MOVING].culprit == HELPER


def test_an_error_at_one_party_ends_all(trio, outcomes):
    secret = "voxel 17.25"

    def party(session):
        if session.pid == STATIC:
            raise ValueError(secret)
        session.network.receive(
            HELPER if session.pid == MOVING else MOVING, "x", bytearray(8)
        )

    start = time.monotonic()
    errors = outcomes(trio, party)
    assert time.monotonic() - start < 2
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
    with pytest.raises(ValueError), trio[1]:
        raise ValueError
    assert trio[1].network.closed
    with pytest.raises(PeerError):
        trio[2].network.receive(1, "x", bytearray(8))


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


def die(session):
    """As the kernel does it when a process is killed: no farewell."""
    for link in session.network.links.values():
        link.sock.shutdown(socket.SHUT_RDWR)
        link.sock.close()
    session.network.closed = True
    raise ConnectionAbortedError


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
        sessions = local_trio(timeout=20)

        def party(session, pid=pid, step=step):
            send = session.network.send

            def cheating(peer, name, array):
                if name != step:
                    send(peer, name, array)
                elif how == "death":
                    die(session)
                else:
                    raw, name = CHEATS[how][0](bytes(memoryview(array).cast("B")), name)
                    send(peer, name, raw)

            if session.pid == pid:
                session.network.send = cheating
            evaluate(session, reveal)

        start = time.monotonic()
        errors = outcomes(sessions, party)
        assert time.monotonic() - start < 10, "the time-out is 20 s"
        others = [errors[p] for p in ROLES if p != pid]
        at = f"{step} of party {pid}"
        for error in others:
            assert isinstance(error, PeerError), (at, error)
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
        for session in sessions:
            session.close()


# -- meeting -----------------------------------------------------------------


def meeting(present, timeout=0.5, accepts=True):
    """What each party that comes to a meeting returns or raises."""
    listeners = {p: socket.create_server(("127.0.0.1", 0)) for p in (MOVING, STATIC)}
    addresses = {p: s.getsockname()[:2] for p, s in listeners.items()}
    results = {}

    def come(pid):
        try:
            results[pid] = meet(pid, b"t" * 32, addresses, listeners.get(pid), timeout)
        except Exception as exc:
            results[pid] = exc

    threads = [threading.Thread(target=come, args=(pid,)) for pid in present]
    if not accepts:
        for listener in listeners.values():
            listener.close()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), "waits for ever"
    for listener in listeners.values():
        listener.close()
    for result in results.values():
        if not isinstance(result, Exception):
            result.close()
    return results


def test_a_meeting():
    results = meeting(ROLES, timeout=10)
    assert [results[p].pid for p in sorted(results)] == [0, 1, 2]
    assert all(results[p].peers == sorted(set(ROLES) - {p}) for p in results)


@pytest.mark.parametrize("absent", [[STATIC], [HELPER], [STATIC, HELPER], [MOVING]])
def test_a_party_that_never_comes_is_named(absent):
    present = [p for p in ROLES if p not in absent]
    results = meeting(present)
    for pid in present:
        error = results[pid]
        assert isinstance(error, PeerTimeoutError), error
        assert error.culprit == absent[0]
        assert "did not connect within 0.5 s" in str(error)
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


@pytest.fixture
def own_parties(monkeypatch):
    """Local parties of this test's own, and a short time to start them."""
    local.close_local_parties()
    monkeypatch.setattr(local, "START_TIMEOUT", 1.0)
    yield
    local.close_local_parties()


@pytest.mark.parametrize(
    ("program", "error", "text"),
    [
        ("raise SystemExit(3)", PeerLostError, "ended as it started"),
        ("import time; time.sleep(3)", PeerTimeoutError, "did not connect within 1 s"),
    ],
    ids=["ends", "sleeps"],
)
def test_a_local_party_that_does_not_start(
    own_parties, monkeypatch, descendants, program, error, text
):
    before = set(descendants(os.getpid()))
    popen = subprocess.Popen

    def other(command, **options):
        return popen([sys.executable, "-c", program], **options)

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
    results = [None, None]

    def one(i):
        try:
            results[i] = authenticate(links[i], pids[i], tokens[i], timeout=2)
        except Exception as exc:
            results[i] = exc

    threads = [threading.Thread(target=one, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    a.close()
    b.close()
    return results


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
            b.sendall(frame(b"\x01" + bytes(32), name="hello"))
            b.sendall(frame(bytes(32), name="proof", sequence=1))
        elif how == "garbage":
            b.sendall(bytes(200))

    thread = threading.Thread(target=stranger)
    thread.start()
    with pytest.raises(PeerError) as caught:
        authenticate(Link(a, 1), 0, b"t" * 32, timeout=0.5)
    thread.join()
    a.close()
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


def test_pickle_is_inert_in_the_bridge():
    mpyc = mpyc_bridge.load()
    found = 0
    for module in vars(mpyc).values():
        if hasattr(module, "pickle"):
            found += 1
            for function in (module.pickle.loads, module.pickle.dumps):
                with pytest.raises(ProtocolError, match="would unpickle"):
                    function(b"\x80\x04N.")
    assert found, "MPyC no longer imports pickle under that name: look again"
    import pickle

    assert pickle.loads(pickle.dumps(1)) == 1, "everybody else's must still work"


def test_a_pickle_from_a_peer_is_not_loaded_by_mpyc(trio, outcomes, tmp_path):
    """The static owner answers MPyC with a pickle that would touch a file."""
    import pickle

    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    def party(session):
        if session.pid == STATIC:
            inner = session.network.send_mpyc
            session.network.send_mpyc = lambda peer, payload: inner(
                peer, payload[:8] + pickle.dumps(Bomb())
            )
        array = share(session, MOVING, np.ones(3), (3,), bound=2)

        async def square(mpc):
            x = mpyc_bridge.to_mpyc(array)
            return await mpyc_bridge.from_mpyc(mpc, x * x, P61, bound=1)

        return mpyc_bridge.run(session, square)

    for session in trio:
        session.network.timeout = 3
    outcomes(trio, party)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb())).close()
    assert mark.exists(), "the test could not have failed"


@pytest.mark.parametrize("payload", [b"", b"\x00" * 7])
def test_truncated_mpyc_messages(trio, outcomes, payload):
    def party(session):
        array = share(session, MOVING, np.ones(3), (3,), bound=2)
        if session.pid == STATIC:
            session.network.send_mpyc(MOVING, payload)
            session.network.send_mpyc(HELPER, payload)
            return None

        async def square(mpc):
            x = mpyc_bridge.to_mpyc(array)
            return await mpyc_bridge.from_mpyc(mpc, x * x, P61, bound=1)

        return mpyc_bridge.run(session, square)

    for session in trio:
        session.network.timeout = 3
    results = outcomes(trio, party)
    assert isinstance(results[MOVING], ProtocolError)
    assert "truncated" in str(results[MOVING])


def test_silence_in_mpyc_times_out(trio, outcomes):
    def party(session):
        array = share(session, MOVING, np.ones(3), (3,), bound=2)
        if session.pid == STATIC:
            time.sleep(1.5)
            return None

        async def square(mpc):
            x = mpyc_bridge.to_mpyc(array)
            return await mpyc_bridge.from_mpyc(mpc, x * x, P61, bound=1)

        return mpyc_bridge.run(session, square)

    for session in trio:
        session.network.timeout = 0.4
    errors = outcomes(trio, party)
    assert isinstance(errors[MOVING], PeerError)
    assert any(isinstance(errors[p], PeerTimeoutError) for p in (MOVING, HELPER))


def test_death_in_mpyc_is_noticed_at_once(trio, outcomes):
    def party(session):
        array = share(session, MOVING, np.ones(3), (3,), bound=2)
        if session.pid == STATIC:
            session.close()
            return None

        async def square(mpc):
            x = mpyc_bridge.to_mpyc(array)
            return await mpyc_bridge.from_mpyc(mpc, x * x, P61, bound=1)

        return mpyc_bridge.run(session, square)

    start = time.monotonic()
    errors = outcomes(trio, party)
    assert time.monotonic() - start < 3
    for pid in (MOVING, HELPER):
        assert isinstance(errors[pid], PeerError), errors[pid]
        assert errors[pid].culprit == STATIC
