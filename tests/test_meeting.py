"""Three parties that find one another, whoever else comes to the door."""

from contextlib import ExitStack, suppress
from itertools import permutations
import logging
import socket
import threading
import time

import numpy as np
import pins
import pytest

from dipy_ppir.mpc import meeting, relay, tls
from dipy_ppir.mpc.errors import (
    CertificateError,
    ParameterMismatchError,
    PeerError,
    PeerTimeoutError,
    ProtocolError,
    SessionFileError,
)
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.meeting import Meeting
from dipy_ppir.mpc.session import Session

ALL = (MOVING, STATIC, HELPER)
WAYS = {
    "static listens": (HELPER, STATIC),
    "moving listens": (HELPER, MOVING),
    "all listen": (HELPER, MOVING, STATIC),
    "relayed": (HELPER,),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(meeting, "REDIAL", 0.05)
    monkeypatch.setattr(tls, "_LINGER", 0.1)


@pytest.fixture(autouse=True)
def no_thread_left_behind():
    yield
    end = time.monotonic() + 10
    while names := [t.name for t in threading.enumerate() if t.name in OURS]:
        assert time.monotonic() < end, f"still running: {names}"
        time.sleep(0.01)


OURS = ("meeting", "relay")


def toml(contents):
    """A session file's text."""
    lines = [f"{k} = {v!r}" for k, v in contents.items() if not isinstance(v, dict)]
    for name, table in contents.items():
        if isinstance(table, dict):
            for key, value in table.items():
                if isinstance(value, dict):
                    lines.append(f"[{name}.{key}]")
                    lines += [f"{k} = {v!r}" for k, v in value.items()]
            if not any(isinstance(v, dict) for v in table.values()):
                lines.append(f"[{name}]")
                lines += [f"{k} = {v!r}" for k, v in table.items()]
    return "\n".join(lines).replace("'", '"')


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Folders of the parties' keys."""
    return {pid: pins.identity(pid).save(tmp_path_factory.mktemp("key")) for pid in ALL}


def hold(plan, pid, **options):
    """A party's meeting, held."""
    here = Meeting(plan, pins.identity(pid), **options)
    here.hold()
    return here


def meet(plan, pids=ALL, seconds=60):
    """Hold a meeting of these parties; what each holds or raised."""
    return pins.together(*(lambda p=p: hold(plan, p) for p in pids), seconds=seconds)


def leave(*meetings):
    for here in meetings:
        for link in getattr(here, "links", {}).values():
            link.sock.close()
        for pump in getattr(here, "relays", []):
            pump.stop()


def linked(meetings):
    """Check that three parties are connected, each pair by a secret of its own."""
    for here in meetings:
        assert isinstance(here, Meeting), here
        assert sorted(here.links) == sorted(set(ALL) - {here.party.pid})
    moving, static, helper = meetings
    assert moving.seeds[STATIC] == static.seeds[MOVING]
    assert moving.seeds[HELPER] == helper.seeds[MOVING]
    assert static.seeds[HELPER] == helper.seeds[STATIC]
    assert len({moving.seeds[STATIC], moving.seeds[HELPER], static.seeds[HELPER]}) == 3


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# -- whole sessions ----------------------------------------------------------


@pytest.mark.parametrize("order", list(permutations(ALL)))
@pytest.mark.parametrize("way", WAYS)
def test_any_order(tmp_path, keys, way, order):
    """Each waits for those who come later."""
    path = tmp_path / "session.toml"
    path.write_text(toml(pins.contents(WAYS[way], title="any order")))
    waits = {pid: threading.Event() for pid in ALL}

    def party(pid):
        before = order[: order.index(pid)]
        for earlier in before:
            assert waits[earlier].wait(20)
        session = Session.load(
            path, identity=keys[pid], on_wait=lambda *_: waits[pid].set()
        )
        with session:
            assert session.pid == pid
            assert session.plan.title == "any order"
            seen = session.exchange("hello", pid)
            sent = np.full(1000, pid, dtype=np.uint64)
            for peer in session.peers:
                session.network.send(peer, "step", sent)
            got = {p: np.empty_like(sent) for p in session.peers}
            session.network.receive_all(got, "step")
            assert all((got[p] == p).all() for p in got)
            return seen

    results = pins.together(*(lambda p=p: party(p) for p in ALL))
    assert results == [{p: p for p in ALL}] * 3


def test_session_files_that_differ(tmp_path, keys):
    one = pins.contents((HELPER, STATIC), parameters={"alpha": 1, "seed": 3})
    paths = {}
    for pid in ALL:
        one["parameters"]["seed"] = 4 if pid == HELPER else 3
        paths[pid] = tmp_path / f"{pid}.toml"
        paths[pid].write_text(toml(one))
    errors = pins.together(
        *(lambda p=p: Session.load(paths[p], identity=keys[p]) for p in ALL)
    )
    assert ParameterMismatchError in {type(error) for error in errors}
    for error in errors:
        assert isinstance(error, (ParameterMismatchError, PeerError)), error
        if isinstance(error, ParameterMismatchError):
            assert "'parameters.seed'" in str(error)
            assert "4 (hash" in str(error)


# -- waiting -----------------------------------------------------------------


@pytest.mark.parametrize("way", ["static listens", "relayed"])
def test_who_is_connected_stays_connected(way, caplog):
    """Nobody dials again what was not lost."""
    caplog.set_level(logging.INFO, "dipy_ppir")
    plan = pins.plan(WAYS[way])
    waited = []

    def waiting(missing, left):
        waited.append([party.pid for party in missing])

    def late():
        until(lambda: waited.count([STATIC]) > 10)
        return hold(plan, STATIC)

    meetings = pins.together(
        lambda: hold(plan, MOVING, on_wait=waiting), late, lambda: hold(plan, HELPER)
    )
    linked(meetings)
    assert not [r.message for r in caplog.records if "Lost" in r.message]
    assert sum("Connected to" in r.message for r in caplog.records) == 6
    leave(*meetings)


@pytest.mark.parametrize("present", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
@pytest.mark.parametrize("way", ["static listens", "relayed"])
def test_who_did_not_come_is_named(way, present):
    """And nobody else."""
    errors = meet(pins.plan(WAYS[way], connect=1.0), present)
    absent = sorted(set(ALL) - set(present))
    for error in errors:
        assert type(error) is PeerTimeoutError, error
        for pid in ALL:
            unreached = way == "relayed" and HELPER in absent
            named = f"({pins.NAMES[pid]})" in str(error).partition(" did not")[0]
            assert named == (pid in absent) or unreached
        assert error.culprit in absent or unreached
        assert "did not come within 1 s" in str(error)
    if HELPER in absent:
        assert "could not be reached at 127.0.0.1:" in str(errors[0])


def test_who_came_but_reached_nobody_else_is_not_called_absent():
    plan = pins.plan((HELPER, STATIC), connect=1.5)
    here = Meeting(plan, pins.identity(HELPER))

    def half(pid):
        """Connects to the helper, says nothing and stays."""
        until(lambda: here._listener is not None)
        connection = dial(plan, pid)
        while HELPER not in ended:
            time.sleep(0.01)
        connection.close()

    ended = []

    def helper():
        try:
            here.hold()
        finally:
            ended.append(HELPER)

    error = pins.together(helper, lambda: half(MOVING), lambda: half(STATIC))[0]
    assert type(error) is PeerTimeoutError
    assert "came, but did not reach the other parties within 1.5 s" in str(error)


def dial(plan, pid, *, identity=None, purpose=tls.LINK, to=HELPER):
    """Connect as one party to another."""
    party = plan.parties[to]
    sock = socket.create_connection(party.address, 10)
    return tls.connect(sock, identity or pins.identity(pid), party, purpose=purpose)


def test_who_came_and_went_is_not_called_absent():
    plan = pins.plan((HELPER,), connect=1.0)

    def visit():
        until(lambda: reachable(plan))
        for pid in (MOVING, STATIC):
            dial(plan, pid).close()

    error, _ = pins.together(lambda: hold(plan, HELPER), visit)
    assert type(error) is PeerTimeoutError
    assert "came and went away again, and did not come back within 1 s" in str(error)


class Gone(Exception):
    """The process of a party was killed."""


@pytest.mark.parametrize("pid", ALL)
@pytest.mark.parametrize("way", ["static listens", "relayed"])
def test_a_party_that_goes_and_comes_again(way, pid):
    """Before all have met, nobody minds; the last comes when one has gone."""
    plan = pins.plan(WAYS[way])
    last = {MOVING: STATIC, STATIC: HELPER, HELPER: MOVING}[pid]
    gone = threading.Event()

    def restless():
        for _ in range(2):
            first = time.monotonic()

            def leaves(missing, left, first=first):
                there = {party.pid for party in missing} <= {last}
                if there or time.monotonic() > first + 0.3:
                    raise Gone

            with pytest.raises(Gone):
                hold(plan, pid, on_wait=leaves)
        gone.set()
        return hold(plan, pid)

    def late():
        assert gone.wait(20)
        return hold(plan, last)

    parties = {p: lambda p=p: hold(plan, p) for p in ALL}
    parties[pid], parties[last] = restless, late
    meetings = pins.together(*(parties[p] for p in ALL))
    linked(meetings)
    leave(*meetings)


def test_who_runs_twice_is_told(caplog):
    """The one that came first ends; otherwise the two would take turns for ever."""
    plan = pins.plan((HELPER, STATIC), connect=15)
    over = threading.Event()
    came = threading.Event()
    caplog.set_level(logging.INFO, logger="dipy_ppir")

    def first():
        def seen(*_):
            if over.is_set():
                raise KeyError("the test is over")
            came.set()

        hold(plan, MOVING, on_wait=seen)

    def helper():
        hold(plan, HELPER, on_wait=lambda *_: over.is_set() and 1 / 0)

    def second():
        assert came.wait(10)
        until(lambda: "Connected to the moving owner" in caplog.text)
        try:
            hold(plan, MOVING, on_wait=lambda *_: over.is_set() and 1 / 0)
        finally:
            over.set()

    def end():
        until(lambda: "connects again" in caplog.text)
        until(lambda: outcomes_seen(caplog) or over.is_set())
        over.set()

    def outcomes_seen(log):
        return time.monotonic() > start + 3

    start = time.monotonic()
    one, _, _, _ = pins.together(first, helper, second, end)
    assert isinstance(one, ProtocolError), one
    assert "another program with this party's key took its place" in str(one)


def test_a_dead_end_of_the_relay_is_cut_when_its_owner_comes_again():
    """A machine that lost its power says no farewell: the helper cannot see that the
    path is dead, and the other owner waits at its end."""
    plan = pins.plan((HELPER,))
    frozen = []

    def moving():
        until(lambda: reachable(plan))
        outer = dial(plan, MOVING, purpose=tls.RELAY)
        inner, pump = relay.tunnel(outer)
        frozen.append(
            tls.handshake(
                inner,
                pins.identity(MOVING),
                {plan.parties[STATIC].fingerprint: plan.parties[STATIC]},
                purposes=(tls.LINK,),
                server=False,
            )
        )
        return hold(plan, MOVING)

    meetings = pins.together(
        moving, lambda: hold(plan, STATIC), lambda: hold(plan, HELPER)
    )
    linked(meetings)
    frozen[0].close()
    leave(*meetings)


def reachable(plan, to=HELPER):
    with suppress(OSError):
        socket.create_connection(plan.parties[to].address, 1).close()
        return True
    return False


# -- strangers at the door ---------------------------------------------------


def in_time(plan, *visits):
    """Hold a meeting at which the visits take place before the static owner comes."""
    over = threading.Event()

    def visit():
        until(lambda: reachable(plan))
        try:
            for function in visits:
                function()
        finally:
            over.set()

    def late():
        assert over.wait(20)
        return hold(plan, STATIC)

    *meetings, visited = pins.together(
        lambda: hold(plan, MOVING), late, lambda: hold(plan, HELPER), visit
    )
    assert visited is None, visited
    linked(meetings)
    leave(*meetings)


def test_strangers_are_turned_away(caplog):
    plan = pins.plan((HELPER,))

    def with_certificate():
        connection = dial(plan, MOVING, identity=create_identity("Mallory"))
        with pytest.raises(CertificateError, match="refused this party's certificate"):
            while True:
                with suppress(BlockingIOError):
                    connection.recv_into(memoryview(bytearray(9)))
                time.sleep(0.002)
        connection.close()

    def scanner():
        for raw in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(3000), b"\x16\x03\x01"):
            with socket.create_connection(plan.parties[HELPER].address) as sock:
                sock.sendall(raw)

    in_time(plan, with_certificate, scanner)
    (warning,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert "Refused a connection from 127.0.0.1: a certificate" in warning
    assert "'Mallory'" in warning


def test_a_party_dialling_the_wrong_one_is_turned_away(caplog):
    """The helper has no business at the static owner's door."""
    plan = pins.plan((HELPER, STATIC))

    def visit():
        until(lambda: reachable(plan, STATIC))
        connection = dial(plan, HELPER, to=STATIC)
        connection.close()
        stop.set()

    stop = threading.Event()

    def impatient(missing, left):
        if stop.is_set():
            raise Gone

    error, _ = pins.together(lambda: hold(plan, STATIC, on_wait=impatient), visit)
    assert type(error) is Gone
    until(lambda: caplog.records)
    assert "swapped" in caplog.text


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "half a handshake"])
def test_idle_strangers_do_not_keep_the_parties_out(monkeypatch, busy):
    """They may stay for 20 s each, and come back as soon as they are sent away."""
    monkeypatch.setattr(meeting, "MAX_GREETINGS", 8)
    plan = pins.plan((HELPER,), connect=15.0)
    over = threading.Event()

    def crowd():
        until(lambda: reachable(plan))
        with ExitStack() as stack:
            while not over.wait(0.02):
                sock = stack.enter_context(
                    socket.create_connection(plan.parties[HELPER].address)
                )
                if busy:
                    sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")

    def late(pid):
        time.sleep(0.5)
        return hold(plan, pid)

    here = Meeting(
        plan,
        pins.identity(HELPER),
        on_wait=lambda *_: most.append(len(here._greetings)),
    )
    most = []

    def helper():
        try:
            here.hold()
        finally:
            over.set()
        return here

    *meetings, _ = pins.together(
        lambda: late(MOVING), lambda: late(STATIC), helper, crowd
    )
    assert max(most) == 8, "nobody had to give way, or too many were let in"
    linked(meetings)
    leave(*meetings)


def test_the_crowd_of_one_address_gives_way_first():
    here = Meeting(pins.plan((HELPER,)), pins.identity(HELPER))
    pairs = [socket.socketpair() for _ in range(4)]
    hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3"]
    here._greetings = {a: host for (a, _), host in zip(pairs, hosts, strict=True)}
    here._send_one_away()
    assert list(here._greetings.values()) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert pairs[1][1].recv(1) == b"", "the oldest of the crowd was not cut"
    here._send_one_away()
    assert "10.0.0.1" not in here._greetings.values()
    for sock in sum(pairs, ()):
        sock.close()


# -- somebody else where a party should be -----------------------------------


def imposter(plan, identity, *, pid=HELPER):
    """Answers at a party's address with a certificate of its own."""
    with socket.create_server(plan.parties[pid].address) as listener:
        sock, _ = listener.accept()
        return tls.connect(sock, identity, plan.parties[MOVING], server=True)


def test_somebody_else_answers():
    """The owner ends at once, and the imposter is told."""
    plan = pins.plan((HELPER,))
    error, heard = pins.together(
        lambda: hold(plan, MOVING),
        lambda: imposter(plan, create_identity(pins.NAMES[HELPER])),
    )
    assert type(error) is CertificateError
    assert error.culprit == HELPER
    assert "calls itself 'East University' with a certificate of its own" in str(error)
    assert type(heard) is CertificateError


def test_something_else_answers():
    plan = pins.plan((HELPER,))

    def web_server():
        with socket.create_server(plan.parties[HELPER].address) as listener:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                sock.recv(10_000)

    error, _ = pins.together(lambda: hold(plan, MOVING), web_server)
    assert type(error) is ProtocolError
    assert error.culprit == HELPER


def test_a_party_that_the_helper_does_not_pin():
    """It is told so; the helper goes on waiting, and says whom it refused."""
    plan = pins.plan((HELPER,), connect=1.5)
    contents = {**plan.contents, "parties": dict(plan.contents["parties"])}
    contents["parties"]["moving"] = {
        "name": pins.NAMES[MOVING],
        "fingerprint": create_identity("another").fingerprint,
    }
    other = type(plan).parse(contents)
    refused, waiting = pins.together(
        lambda: hold(plan, MOVING), lambda: hold(other, HELPER)
    )
    assert type(refused) is CertificateError
    assert refused.culprit == HELPER
    assert "refused this party's certificate" in str(refused)
    assert type(waiting) is PeerTimeoutError
    assert "Last refused: 127.0.0.1: somebody calls itself" in str(waiting)


def test_own_certificate_is_not_in_the_file():
    with pytest.raises(SessionFileError, match="does not name this party's"):
        Meeting(pins.plan(), create_identity("stranger"))


@pytest.mark.parametrize("raw", [b"x" * 24, b"PP\x01\x02" + bytes(20)])
def test_a_pinned_party_that_does_not_begin_as_it_should(raw):
    plan = pins.plan((HELPER,))

    def rude():
        until(lambda: reachable(plan))
        connection = dial(plan, MOVING)
        connection.sendmsg([raw])
        return connection

    error, connection = pins.together(lambda: hold(plan, HELPER), rude)
    assert type(error) is ProtocolError
    assert error.culprit == MOVING
    connection.close()


# -- listening ---------------------------------------------------------------


def test_the_port_is_in_use():
    plan = pins.plan((HELPER,))
    with socket.create_server(plan.parties[HELPER].address):
        with pytest.raises(SessionFileError, match="another program uses this port"):
            hold(plan, HELPER)


def test_an_address_of_somebody_else():
    contents = pins.contents((HELPER,))
    contents["parties"]["helper"]["address"] = "192.0.2.7:7433"
    plan = type(pins.plan()).parse(contents)
    with pytest.raises(SessionFileError, match="--listen 0.0.0.0:7433"):
        hold(plan, HELPER)


def test_listening_elsewhere_than_where_others_dial():
    """Behind a port forwarding, for example."""
    plan = pins.plan((HELPER,))
    inside = "127.0.0.1", pins.free_port()
    listener = socket.create_server(plan.parties[HELPER].address)
    pumps = []

    def forward():
        for _ in range(4):
            sock, _ = listener.accept()
            until(lambda: not inside or can_dial(inside))
            pumps.append(relay.Pump(sock, socket.create_connection(inside)))
            pumps[-1].start()

    *meetings, forwarded = pins.together(
        lambda: hold(plan, MOVING),
        lambda: hold(plan, STATIC),
        lambda: hold(plan, HELPER, listen=inside),
        forward,
    )
    assert forwarded is None
    linked(meetings)
    leave(*meetings)
    listener.close()


def can_dial(address):
    with suppress(OSError):
        socket.create_connection(address, 1).close()
        return True
    return False


def test_the_port_is_free_when_the_meeting_is_over():
    """Also while the session goes on, and for the next session."""
    plan = pins.plan((HELPER, STATIC))
    for _ in range(3):
        meetings = meet(plan)
        linked(meetings)
        for pid in (HELPER, STATIC):
            socket.create_server(plan.parties[pid].address).close()
        leave(*meetings)


# -- the relay ---------------------------------------------------------------


@pytest.fixture
def overheard(monkeypatch):
    """All that a helper's relay moves; not what the owners' own tunnels move."""
    seen = bytearray()
    inner = relay._Flow.move

    def move(flow):
        before = flow.start
        held = bytes(flow.buffer[flow.start : flow.stop])
        moved = inner(flow)
        if isinstance(flow.source, tls.TLSSocket) and isinstance(
            flow.sink, tls.TLSSocket
        ):
            sent = held or bytes(flow.buffer[: flow.stop])
            seen.extend(sent[: flow.start - (before if held else 0)])
        return moved

    monkeypatch.setattr(relay._Flow, "move", move)
    return seen


def test_the_helper_relays_what_it_cannot_read(overheard, tmp_path, keys):
    path = tmp_path / "session.toml"
    path.write_text(toml(pins.contents((HELPER,))))
    planted = np.frombuffer(b"a planted secret" * 40_000, dtype=np.uint64)
    marks = []

    def party(pid):
        with Session.load(path, identity=keys[pid]) as session:
            if pid != HELPER:
                other = STATIC + MOVING - pid
                session.network.send(other, "step", planted)
                got = np.empty_like(planted)
                session.network.receive(other, "step", got)
                assert (got == planted).all()
                session.network.send(HELPER, "step", planted)
            else:
                got = np.empty_like(planted)
                for peer in session.peers:
                    session.network.receive(peer, "step", got)
                marks.append(got.tobytes())
            return session.seed_for((pid + 1) % 3, b"test")

    results = pins.together(*(lambda p=p: party(p) for p in ALL))
    assert all(isinstance(r, bytes) for r in results), results
    assert len(overheard) > 2 * planted.nbytes, "it did not go through the relay"
    for text in (b"planted", b"a plant", b"PP\x01\x01", b"Hospital", b"Clinic"):
        assert text not in overheard
    assert b"planted" in marks[0], "the search could not have found anything"


def test_what_is_overheard_is_what_was_moved(overheard):
    """The recorder of the test above sees bytes that pass in the clear."""
    plan = pins.plan((HELPER,))
    ends = []
    for pid in (MOVING, STATIC):
        one, other = socket.socketpair()
        ends += pins.together(
            lambda one=one, pid=pid: tls.connect(
                one, pins.identity(pid), plan.parties[HELPER]
            ),
            lambda other=other, pid=pid: tls.connect(
                other, pins.identity(HELPER), plan.parties[pid], server=True
            ),
        )
    pump = relay.Pump(ends[1], ends[3])
    pump.start()
    ends[0].sendmsg([b"in the clear"])
    until(lambda: b"in the clear" in overheard)
    ends[0].close()
    ends[2].close()
    pump.join(5)


def malicious_helper(plan, inner_identity):
    """Takes an owner's connection to the relay and answers in the other's place."""
    with ExitStack() as stack:
        listener = socket.create_server(plan.parties[HELPER].address)
        stack.enter_context(listener)
        while True:
            sock, _ = listener.accept()
            stack.enter_context(sock)
            outer = tls.handshake(
                sock,
                pins.identity(HELPER),
                {plan.parties[MOVING].fingerprint: plan.parties[MOVING]},
                purposes=(tls.LINK, tls.RELAY),
                server=True,
            )
            if outer.purpose == tls.RELAY:
                break
        inner, pump = relay.tunnel(outer)
        stack.callback(pump.join, 5)
        stack.enter_context(inner)
        return tls.connect(inner, inner_identity, plan.parties[MOVING], server=True)


@pytest.mark.parametrize("name", ["own", "made up"])
def test_the_helper_cannot_play_the_other_owner(name):
    plan = pins.plan((HELPER,))
    identity = pins.identity(HELPER)
    if name == "made up":
        identity = create_identity(pins.NAMES[STATIC])
    error, heard = pins.together(
        lambda: hold(plan, MOVING), lambda: malicious_helper(plan, identity)
    )
    assert type(error) is CertificateError
    assert error.culprit == STATIC
    text = "swapped" if name == "own" else "calls itself 'South Clinic'"
    assert text in str(error)
    assert isinstance(heard, PeerError)


@pytest.mark.parametrize("at", [0, 4, 20, -1])
def test_the_helper_cannot_change_what_it_relays(monkeypatch, at):
    """Both owners end, and nothing changed is taken for the other's word."""
    plan = pins.plan((HELPER,), silence=3.0)
    meetings = meet(plan)
    linked(meetings)
    inner = relay._Flow.move
    changed = []

    def move(flow):
        before = flow.start, flow.stop
        if isinstance(flow.source, tls.TLSSocket) and isinstance(
            flow.sink, tls.TLSSocket
        ):
            with suppress(BlockingIOError):
                if flow.empty and not changed:
                    n = flow.source.recv_into(flow.buffer)
                    flow.start, flow.stop, flow.ended = 0, n, n == 0
                    if n:
                        flow.buffer[at % n] ^= 1
                        changed.append(before)
        return inner(flow)

    monkeypatch.setattr(relay._Flow, "move", move)

    def party(here):
        with Session.of_meeting(here) as session:
            return session.exchange("more", 1)

    errors = pins.together(*(lambda h=h: party(h) for h in meetings))
    assert changed
    assert all(isinstance(error, PeerError) for error in errors), errors
    leave(*meetings)


def test_a_relay_does_not_spin(monkeypatch):
    """One end is gone, the other takes nothing: there is nothing to do but wait."""
    (a, near), (far, b) = socket.socketpair(), socket.socketpair()
    near.setblocking(False)
    moves = []
    inner = relay._Flow.move
    monkeypatch.setattr(
        relay._Flow, "move", lambda flow: moves.append(1) or inner(flow)
    )
    pump = relay.Pump(near, far)
    pump.start()
    a.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            a.send(bytes(1 << 16))
            time.sleep(0.001)
    a.close()
    before = len(moves)
    time.sleep(0.3)
    assert len(moves) - before < 50
    b.close()
    pump.join(5)
    assert not pump.is_alive()


def test_a_relay_delivers_the_last_word():
    (a, near), (far, b) = socket.socketpair(), socket.socketpair()
    relay.Pump(near, far).start()
    a.sendall(bytes(1 << 15) + b"farewell")
    a.close()
    b.settimeout(5)
    got = b""
    while part := b.recv(1 << 16):
        got += part
    assert got.endswith(b"farewell")
    b.close()
