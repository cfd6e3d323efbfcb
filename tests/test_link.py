"""Frames from a peer that is broken or hostile.

The test plays the peer: it holds the other end of a socket and writes bytes.
"""

import ast
import contextlib
import json
from pathlib import Path
import socket

import numpy as np
from pins import together
import pytest
from wire import TWO, Wire, beside, frame

import dipy_ppir
from dipy_ppir.mpc import link
from dipy_ppir.mpc.errors import (
    MPCError,
    PeerAbortedError,
    PeerError,
    PeerLostError,
    ProtocolError,
)
from dipy_ppir.mpc.fields import P61, P127
from dipy_ppir.mpc.frame import ABORT, DATA, JSON, MAX_PAYLOAD, MPYC
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC, Ledger
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.network import Network
from dipy_ppir.mpc.protocols import share


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
    monkeypatch.setitem(MAX_PAYLOAD, DATA, 16)
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


@contextlib.contextmanager
def playing(peers, roles=ROLES):
    """A network with peers that the test plays, and their ends of the connections."""
    with contextlib.ExitStack() as stack:
        links, ends = {}, {}
        for peer in peers:
            ours, ends[peer] = map(stack.enter_context, socket.socketpair())
            links[peer] = Link(ours, peer, f"party {peer} ({roles[peer]})")
        yield Network(links, 300.0, Ledger, roles), ends


@pytest.mark.parametrize(
    "last, culprit, text",
    [
        (b"\x01\xff", HELPER, r"\(helper\) ended the computation: it stopped"),
        (b"\x04\x01", STATIC, r"\(static owner\) ended the computation, says"),
        (b"\x02\x01", STATIC, "closed the connection or died; see"),
        (b"\x02\x00", STATIC, "closed the connection or died; see"),
        (None, STATIC, "closed the connection or died; see"),
    ],
    ids=["for a reason", "because of that", "having lost that", "this one", "none"],
)
def test_who_is_lost_after_another_ended_is_not_to_blame(last, culprit, text):
    """What the one said at last got lost; what the other said explains it."""
    with playing((STATIC, HELPER)) as (network, ends):
        if last is not None:
            ends[HELPER].sendall(frame(last, name="", kind=ABORT))
            ends[HELPER].shutdown(socket.SHUT_WR)
        ends[STATIC].shutdown(socket.SHUT_WR)
        with pytest.raises(PeerError, match=text) as caught:
            network.receive(STATIC, "step", np.zeros(2))
        assert caught.value.culprit == culprit


def test_who_was_lost_first_is_to_blame():
    """Of four parties one dies, another misses it, and the third misses that one."""
    with playing((1, 2, 3), dict.fromkeys(range(4), "site")) as (network, ends):
        for peer, lost in ((2, 1), (3, 2)):
            ends[peer].sendall(frame(bytes([2, lost]), name="", kind=ABORT))
        for end in ends.values():
            end.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerLostError, match="party 1") as caught:
            network.receive(1, "step", np.zeros(2))
        assert caught.value.culprit == 1


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
    monkeypatch.setattr(link, "MAX_BACKLOG", 1 << 20)
    body = bytes(1 << 16)
    with pytest.raises(ProtocolError, match="more than it was asked for"):
        flood(wire, (frame(body, sequence=i) for i in range(1000)))


def test_a_flood_of_empty_frames_is_cut_off(wire, monkeypatch):
    """Headers alone fill memory as well."""
    monkeypatch.setattr(link, "MAX_BACKLOG", 1 << 20)
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
