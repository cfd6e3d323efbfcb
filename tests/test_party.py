"""Local parties that meet, and make sure who is at the other end."""

import os
import socket
import subprocess
import sys
import threading
import time

from pins import together
import pytest
from wire import beside, frame

from dipy_ppir.mpc import local
from dipy_ppir.mpc.authentication import authenticate
from dipy_ppir.mpc.errors import (
    AuthenticationError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.party import meet


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

        monkeypatch.setattr("dipy_ppir.mpc.authentication.authenticate", watched)
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


def test_somebody_listens_no_more(monkeypatch):
    """It had not taken the connection yet."""
    listener, dial = socket.create_server(("127.0.0.1", 0)), socket.create_connection

    def late(*arguments):
        sock = dial(*arguments)
        listener.close()
        return sock

    monkeypatch.setattr(socket, "create_connection", late)
    with pytest.raises(PeerLostError, match="party 0 .* cannot be reached"):
        meet(HELPER, b"t" * 32, {MOVING: listener.getsockname()}, None, 300)


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
