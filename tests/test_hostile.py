"""Whatever a peer or a stranger sends: an error that names it, or the right answer.

Genuine streams of frames and of TLS handshakes are changed: bits flipped, pieces cut
out, repeated, exchanged, put in, headers edited. What then comes out may be what was
sent, or a `PeerError`; nothing else, and no time-out ends it. A few of each in
`make test`, more than ten thousand in `make test-full`.
"""

import contextlib
from importlib.metadata import version
import itertools
import json
from pathlib import Path
import random
import re
import socket
import threading
import time

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
from OpenSSL import SSL
from OpenSSL.crypto import X509, Error
import pins
import pytest

from dipy_ppir.mpc import tls
from dipy_ppir.mpc.errors import (
    ParameterMismatchError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.frame import ABORT, BYE, DATA, HEADER, JSON, MPYC, operation_code
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, Ledger
from dipy_ppir.mpc.link import MAX_BACKLOG, Link
from dipy_ppir.mpc.network import Network
from dipy_ppir.mpc.record import greeting
from dipy_ppir.mpc.session import Session
from dipy_ppir.mpc.sessionfile import Party

NUMBERS = np.arange(6, dtype=np.uint64)
METADATA = b'{"nbins": 32, "level_iters": [10, 5]}'
MOST_MEMORY = 1 << 28
#: Seconds after which a test that hangs is ended; time-outs are longer.
HANGS, PATIENCE = 120.0, 300.0


def examples(few, many):
    """So many examples in `make test`, and so many in `make test-full`."""
    return pytest.mark.parametrize(
        "examples", [few, pytest.param(many, marks=pytest.mark.heavy)]
    )


def tried(function, number, *strategies):
    """Call a function with so many examples."""
    calls = 0

    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def each(example):
        nonlocal calls
        calls += 1
        function(*example)

    each()
    assert calls >= number, "there were no more"


def genuine():
    """Frames as a peer sends them, in order: what `drive` asks for."""
    plan = [
        (DATA, NUMBERS.tobytes()),
        (JSON, METADATA),
        (DATA, NUMBERS[::-1].tobytes()),
        (BYE, b""),
    ]
    return [
        HEADER.pack(b"PP", 1, kind, operation_code("step"), i, len(body)) + body
        for i, (kind, body) in enumerate(plan)
    ]


GENUINE = genuine()

header_edit = st.tuples(
    st.just("header"),
    st.integers(0, len(GENUINE) - 1),
    st.sampled_from([DATA, JSON, MPYC, BYE, ABORT, 0, 77]),
    st.sampled_from([0, 1, operation_code("step"), operation_code("other")]),
    st.sampled_from([0, 1, 2, 3, 1 << 63]),
    st.sampled_from([0, 1, 2, 47, 48, 49, 1 << 20, 1 << 24, 1 << 40, (1 << 64) - 1]),
)
bytes_edit = st.tuples(
    st.sampled_from(["flip", "cut", "put", "repeat"]),
    st.integers(0, 4000),
    st.integers(1, 400),
    st.binary(max_size=40),
)
order_edit = st.tuples(
    st.sampled_from(["swap", "again", "drop"]),
    st.integers(0, len(GENUINE) - 1),
    st.integers(0, len(GENUINE) - 1),
)


def change_bytes(raw, kind, at, length, extra):
    """One of the edits of `bytes_edit`."""
    raw = bytearray(raw)
    at %= len(raw) + 1
    if kind == "flip" and raw:
        raw[at % len(raw)] ^= 1 << length % 8
    elif kind == "cut":
        del raw[at : at + length]
    elif kind == "put":
        raw[at:at] = extra
    elif kind == "repeat":
        raw[at:at] = raw[at : at + length]
    return bytes(raw)


def changed(edits):
    """The genuine stream after a list of edits."""
    frames, raw = list(GENUINE), None
    for kind, *rest in edits:
        if kind in ("flip", "cut", "put", "repeat"):
            raw = b"".join(frames) if raw is None else raw
            raw = change_bytes(raw, kind, *rest)
        elif raw is None and kind == "header":
            i, frame_kind, op, sequence, length = rest
            i %= len(frames) or 1
            body = frames[i][HEADER.size :] if frames else b""
            frames[i : i + 1] = [
                HEADER.pack(b"PP", 1, frame_kind, op, sequence, length) + body
            ]
        elif raw is None and frames:
            i, j = (k % len(frames) for k in rest)
            if kind == "swap":
                frames[i], frames[j] = frames[j], frames[i]
            elif kind == "again":
                frames.insert(j, frames[i])
            else:
                del frames[i]
    return b"".join(frames) if raw is None else raw


def drive(raw):
    """Give a stream to a party that expects the genuine one."""
    ours, peer = socket.socketpair()
    ledger = Ledger()
    link = Link(ours, STATIC)
    network = Network({STATIC: link}, PATIENCE, lambda: ledger)
    try:
        peer.sendall(raw)
        peer.shutdown(socket.SHUT_WR)
        first, last = np.empty_like(NUMBERS), np.empty_like(NUMBERS)
        network.receive(STATIC, "step", first)
        metadata = network.receive_json(STATIC, "step")
        network.receive_all({STATIC: last}, "step")
        assert link.backlog <= MAX_BACKLOG
        return first, metadata, last
    finally:
        network.close()
        peer.close()


def test_the_genuine_stream_is_accepted():
    first, metadata, last = drive(b"".join(GENUINE))
    np.testing.assert_array_equal(first, NUMBERS)
    np.testing.assert_array_equal(last, NUMBERS[::-1])
    assert metadata == {"nbins": 32, "level_iters": [10, 5]}


def check_frames(edits):
    try:
        first, metadata, last = drive(changed(edits))
    except PeerError as exc:
        assert not isinstance(exc, PeerTimeoutError)
        # A peer may also say that another one is at fault.
        assert exc.culprit == STATIC or "says party 1 (" in str(exc)
        return
    # Payloads may be changed: they are numbers, and TLS is what protects them.
    assert first.shape == last.shape == NUMBERS.shape
    assert metadata is None or type(metadata) in (dict, list, str, int, float, bool)
    if all(edit[0] in ("swap", "again", "drop") for edit in edits):
        # Nothing that was repeated or came in another order is taken for genuine.
        np.testing.assert_array_equal(first, NUMBERS)
        np.testing.assert_array_equal(last, NUMBERS[::-1])


FRAME_EDITS = st.lists(
    st.one_of(bytes_edit, header_edit, order_edit), min_size=1, max_size=4
)


@examples(1000, 9000)
def test_changed_frames(examples):
    tried(check_frames, examples, FRAME_EDITS)


# -- handshakes ----------------------------------------------------------

IDENTITIES = [create_identity(name) for name in ("one", "two")]
PARTIES = [
    Party(pid, identity.name, identity.fingerprint, None)
    for pid, identity in enumerate(IDENTITIES)
]


def context(identity):
    def accept(*_):
        return True

    context = SSL.Context(SSL.TLS_METHOD)
    context.use_certificate(identity.certificate)
    context.use_privatekey(identity.key)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, accept)
    context.set_alpn_protos([tls.LINK])
    return context


def first_flights():
    """What a client says first, and what a server answers."""
    client = SSL.Connection(context(IDENTITIES[1]), None)
    server = SSL.Connection(context(IDENTITIES[1]), None)
    client.set_connect_state()
    server.set_accept_state()
    flights = []
    for sender, receiver in ((client, server), (server, client)):
        with pytest.raises(SSL.WantReadError):
            sender.do_handshake()
        flights.append(sender.bio_read(1 << 16))
        receiver.bio_write(flights[-1])
    return flights


HELLO, ANSWER = first_flights()


def shake(raw, server):
    """Shake hands with somebody who says `raw` and hangs up."""
    ours, peer = socket.socketpair()
    try:
        peer.sendall(raw)
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerError) as caught:
            tls.handshake(
                ours,
                IDENTITIES[0],
                {PARTIES[1].fingerprint: PARTIES[1]},
                purposes=[tls.LINK],
                server=server,
                deadline=time.monotonic() + PATIENCE,
            )
        assert not isinstance(caught.value, PeerTimeoutError)
    finally:
        ours.close()
        peer.close()


HANDSHAKE_EDITS = st.lists(bytes_edit, min_size=0, max_size=4)


def edited(raw, edits):
    for edit in edits:
        raw = change_bytes(raw, *edit)
    return raw


@examples(200, 800)
def test_changed_handshakes_at_who_is_dialled(examples):
    tried(lambda e: shake(edited(HELLO, e), server=True), examples, HANDSHAKE_EDITS)


@examples(100, 400)
def test_changed_handshakes_at_who_dials(examples):
    """The answer to another hello, changed or not, is a replay."""
    tried(lambda e: shake(edited(ANSWER, e), server=False), examples, HANDSHAKE_EDITS)


def between(sockets, rng):
    """Pass bytes on, with one bit wrong somewhere in the first thousand of one way.

    A wrong length may leave both ends waiting for more. So the line is cut when it
    has been quiet for a moment, which is an error for whoever is not done; that it
    was cut too early is one as well.
    """
    way, at, bit = rng.randrange(2), rng.randrange(1000), rng.randrange(8)

    def carry(source, sink, wrong):
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(4096)):
                if wrong and passed <= at < passed + len(data):
                    data[at - passed] ^= 1 << bit
                passed += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    one, other = sockets
    one.settimeout(0.5)
    other.settimeout(0.5)
    return [
        threading.Thread(target=carry, args=(one, other, way == 0)),
        threading.Thread(target=carry, args=(other, one, way == 1)),
    ]


@pytest.mark.parametrize("block", range(4))
def test_a_bit_changed_on_the_way(block):
    """Both ends notice, before or at the first message."""
    rng = random.Random(block)
    for _ in range(25):
        (a, a_far), (b, b_far) = socket.socketpair(), socket.socketpair()
        outcome = {}

        def party(pid, sock, outcome=outcome):
            other = PARTIES[1 - pid]
            try:
                connection = pins.connect(
                    sock,
                    IDENTITIES[pid],
                    other,
                    server=pid == 0,
                    deadline=time.monotonic() + PATIENCE,
                )
                link, ledger = Link(connection, other.pid), Ledger()
                network = Network({other.pid: link}, PATIENCE, lambda: ledger)
                received = np.empty_like(NUMBERS)
                network.send(other.pid, "step", NUMBERS)
                network.receive(other.pid, "step", received)
                outcome[pid] = bool((received == NUMBERS).all())
                network.close()
            except PeerError as exc:
                late = isinstance(exc, PeerTimeoutError)
                outcome[pid] = "late" if late else "refused"
            finally:
                sock.close()

        threads = between((a_far, b_far), rng)
        threads += [
            threading.Thread(target=party, args=(pid, sock))
            for pid, sock in enumerate((a, b))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS)
            assert not thread.is_alive(), "waits for ever"
        for sock in (a_far, b_far):
            sock.close()
        # A flipped bit may lie behind all that was sent; a wrong number never passes.
        assert set(outcome) == {0, 1}
        assert not {False, "late"} & set(outcome.values())
        assert "refused" in outcome.values() or outcome == {0: True, 1: True}


def memory(entry):
    """Bytes that this process uses (VmRSS), or has used at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{entry}:\s+(\d+) kB", status, re.M)[1])


def test_memory_stays_bounded():
    """Whatever is sent, and though much of it announces 16 MB and more."""
    try:
        # The most that was used is counted from here on.
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
    except OSError:
        pytest.skip("this system does not tell what a process uses")
    for kind, op, sequence, length in itertools.product(
        [DATA, JSON, MPYC, BYE, ABORT, 77],
        [0, operation_code("step")],
        [0, 1],
        [1, 48, 1 << 20, 1 << 24, 1 << 40],
    ):
        check_frames([("header", 0, kind, op, sequence, length)])
    for bomb in ("deeper list", "long number", "many keys", "many lists"):
        survives("any", BOMBS[bomb])
    assert memory("VmHWM") - before < MOST_MEMORY


def test_no_memory_for_frames_that_are_only_announced():
    """A header that announces the largest frame costs no more than the limit."""
    ours, peer = socket.socketpair()
    ledger = Ledger()
    network = Network({STATIC: Link(ours, STATIC)}, PATIENCE, lambda: ledger)
    peer.sendall(HEADER.pack(b"PP", 1, DATA, 7, 0, 1 << 24))
    peer.shutdown(socket.SHUT_WR)
    try:
        with pytest.raises(PeerLostError):
            network.receive(STATIC, "step", np.empty_like(NUMBERS))
        assert network.links[STATIC].backlog <= MAX_BACKLOG
    finally:
        network.close()
        peer.close()


# -- metadata ------------------------------------------------------------

PARAMETERS = {"nbins": 32, "level_iters": [10, 5], "name": "x"}
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**4000, -(10**300), 1e308, "\ud800", "a\x1b[2J\n"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from([*PARAMETERS, "setup", "threshold"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
BOMBS = {
    "deep list": b"[" * 900 + b"]" * 900,
    "deeper list": b"[" * 100_000 + b"]" * 100_000,
    "deep table": b'{"nbins": ' * 400 + b"1" + b"}" * 400,
    "just too deep": b'{"nbins": ' + b"[" * 16 + b"]" * 16 + b"}",
    "long number": b'{"nbins": ' + b"9" * 5000 + b"}",
    "not a number": b'{"nbins": NaN}',
    "infinite": b'{"nbins": -Infinity}',
    "infinite in digits": b'{"nbins": 1e999}',
    "many keys": json.dumps({str(i): i for i in range(50_000)}).encode(),
    "many lists": b"[" + b"[]," * 300_000 + b"[]]",
    "UTF-16": '{"nbins": 32}'.encode("utf-16"),
    "cut": b'{"nbins": 3',
}


def hear(name, raw, call):
    """What `call` makes of a session whose static owner sends `raw` as metadata."""
    mine = {
        "agree-test": {
            **PARAMETERS,
            "dipy_ppir version": version("dipy-ppir"),
            "threshold": 1,
            "greeting": greeting(),
        },
        "receipt": {"sent": {"setup": 1}, "common": "0" * 64},
        "any": 1,
    }[name]
    sockets, links, threads = [], {}, []
    for peer, payload in ((STATIC, raw), (HELPER, json.dumps(mine).encode())):
        ours, theirs = socket.socketpair()
        links[peer] = Link(ours, peer)
        sockets += [ours, theirs]
        stream = b"".join(
            HEADER.pack(b"PP", 1, JSON, operation_code(step), i, len(body)) + body
            for i, (step, body) in enumerate([(name, payload), ("disagreement", b"0")])
        )
        threads.append(threading.Thread(target=say, args=(theirs, stream)))
        threads[-1].start()
    session = Session(MOVING, links, {p: bytes(32) for p in links}, timeout=PATIENCE)
    try:
        return call(session)
    finally:
        session.network.closed = True
        for sock in sockets:
            sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(HANGS)
            assert not thread.is_alive()
        for sock in sockets:
            sock.close()


def say(sock, raw):
    with contextlib.suppress(OSError):
        sock.sendall(raw)


CALLS = {
    "agree-test": lambda session: session.agree("test", PARAMETERS),
    "receipt": lambda session: session.receipt(),
    "any": lambda session: session.exchange("any", 1),
}


def survives(name, raw):
    """Nothing but an error with a name, or a result fit to be written down."""
    try:
        result = hear(name, raw, CALLS[name])
    except ParameterMismatchError as exc:
        assert name == "agree-test"
        assert len(str(exc)) < 10_000
        assert str(exc).isprintable()
    except PeerError as exc:
        assert exc.culprit == STATIC
        assert not isinstance(exc, PeerTimeoutError)
    else:
        json.dumps(result if name != "any" else result[STATIC])


@pytest.mark.parametrize(
    ("bomb", "name"),
    [
        pytest.param(
            bomb,
            name,
            # What is slow, the parsing, is the same for all names.
            marks=pytest.mark.heavy if bomb == "many lists" and name != "any" else (),
        )
        for bomb in BOMBS
        for name in CALLS
    ],
)
def test_bombs_in_metadata(bomb, name):
    survives(name, BOMBS[bomb])


@pytest.mark.parametrize(
    "bomb",
    ["deep list", "deep table", "just too deep", "long number", "infinite in digits"],
)
def test_metadata_that_no_party_sends_is_malformed(bomb):
    with pytest.raises(ProtocolError, match="malformed metadata") as caught:
        hear("any", BOMBS[bomb], CALLS["any"])
    assert caught.value.culprit == STATIC


@examples(100, 300)
def test_any_metadata(examples):
    names = st.sampled_from(sorted(CALLS))

    def check(name, value):
        survives(name, json.dumps(value).encode())

    tried(check, examples, names, JSON_VALUES)


# -- certificates --------------------------------------------------------

DER = create_identity("stranger").certificate.public_bytes(Encoding.DER)


def check_certificate(edits):
    try:
        shown = X509.from_cryptography(
            x509.load_der_x509_certificate(edited(DER, edits))
        )
    except (ValueError, x509.InvalidVersion, Error):
        return
    problem = tls._problem(shown, 0, {p.fingerprint: p for p in PARTIES}, ())
    assert (problem is not None) and problem.isprintable()


@pytest.mark.filterwarnings("ignore:Parsed a serial number which wasn't positive")
@examples(200, 500)
def test_any_certificate_is_refused_in_words(examples):
    """What is still a certificate for the library is a stranger's for us."""
    edits = st.lists(bytes_edit, min_size=1, max_size=3)
    tried(check_certificate, examples, edits)
