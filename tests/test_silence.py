"""Peers that are silent, slow or gone.

Where something depends on time, the test plays the clock; see `wire.Clock`.
"""

import re
import socket
import threading

from dipy.align.transforms import regtransforms
import numpy as np
from parties import local_trio, run_trio
from pins import together
import pytest
from wire import HANGS, TWO, frame

from dipy_ppir.align import RemoteImage
from dipy_ppir.align.imaffine import SecureMutualInformationMetric
from dipy_ppir.mpc import network
from dipy_ppir.mpc.errors import (
    PeerAbortedError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.frame import ABORT, WAITING
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC, Ledger
from dipy_ppir.mpc.link import MAX_NOTICES, Link
from dipy_ppir.mpc.network import Network


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
        for _ in range(MAX_NOTICES):
            wire.peer.sendall(frame(b"\1", kind=WAITING, sequence=said))
            said += 1

    clock.at_each_wait = chatter
    with pytest.raises(PeerTimeoutError):
        wire.receive()
    assert clock.now == 300
    link = wire.network.links[STATIC]
    assert link._received == said
    assert said * len(frame(b"\1")) > network.LEAST_PROGRESS
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
    assert wire.network.links[STATIC].bytes_in > network.LEAST_PROGRESS


def test_slow_is_not_silent(wire, clock, monkeypatch):
    """A long frame may take many time-outs, as long as it comes along."""
    monkeypatch.setattr(network, "LEAST_PROGRESS", 1 << 12)
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
