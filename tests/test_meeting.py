"""Three parties that find one another, whoever else comes to the door.

They are given more time than any machine needs. Where a test is about the end of their
patience, it moves the clock of `meeting` once everything has happened that is to happen
before.
"""

from contextlib import ExitStack, closing, contextmanager, suppress
import errno
from functools import partial
from itertools import permutations
import logging
import select
import socket
import struct
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pins
import pytest

from dipy_ppir.mpc import meeting, relay, tls
from dipy_ppir.mpc.errors import (
    CertificateError,
    OutOfStepError,
    ParameterMismatchError,
    PeerError,
    PeerTimeoutError,
    ProtocolError,
    SessionFileError,
)
from dipy_ppir.mpc.frame import ABORT, DATA, REPLACED, operation_code
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.meeting import Meeting
from dipy_ppir.mpc.pair import PairSession
from dipy_ppir.mpc.record import common_digest
from dipy_ppir.mpc.session import Session
from dipy_ppir.mpc.sessionfile import SessionFile

ALL = (MOVING, STATIC, HELPER)
WAYS = {
    "static listens": (HELPER, STATIC),
    "moving listens": (HELPER, MOVING),
    "all listen": (HELPER, MOVING, STATIC),
    "relayed": (HELPER,),
}


LONG = 300.0  # seconds; only a test that hangs waits so long
together = partial(pins.together, seconds=2 * LONG)


@pytest.fixture(autouse=True)
def prompt(monkeypatch):
    """No handshake is cut short by a busy machine, and nobody dawdles."""
    pins.meet_promptly(monkeypatch, LONG)
    monkeypatch.setattr(tls, "_LINGER", LONG)


@pytest.fixture
def clock(monkeypatch):
    return pins.clock_of_meetings(monkeypatch)


def running(*names):
    """The threads of these names that have not ended."""
    return [thread for thread in threading.enumerate() if thread.name in names]


@pytest.fixture(autouse=True)
def nothing_left_behind(prompt):
    yield
    leave(*_begun)
    _begun.clear()
    until(lambda: not running("meeting", "relay"))


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


_begun = []


def begin(plan, pid, **options):
    """A party's meeting, still to be held; what it opens is closed after the test."""
    here = Meeting(plan, pins.identity(pid), **options)
    _begun.append(here)
    return here


def hold(plan, pid, **options):
    """A party's meeting, held."""
    here = begin(plan, pid, **options)
    here.hold()
    return here


def meet(plan):
    """Hold a meeting of all; what each holds or raised."""
    return together(*(lambda p=p: hold(plan, p) for p in ALL))


def leave(*meetings):
    for here in meetings:
        for link in here.links.values():
            link.sock.close()
        for pump in here.relays:
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
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# -- sessions in a row -------------------------------------------------------


def row(way, places, **options):
    """Session files that differ in their place of a row at the same addresses."""
    one = pins.contents(WAYS[way], **options)
    return [SessionFile.parse({**one, "place": place}) for place in places]


def without_moving(plan, identity):
    """A session file that has another moving owner."""
    parties = {**plan.contents["parties"]}
    parties["moving"] = {"name": "Fourth", "fingerprint": identity.fingerprint}
    return SessionFile.parse({**plan.contents, "parties": parties})


@pytest.mark.parametrize("way", ["static listens", "relayed"])
def test_who_is_early_waits_for_those_at_an_earlier_session(way, caplog):
    """Also where its own certificate is not known; nobody is warned of anything."""
    early, late = row(way, [1, 4])
    fourth = create_identity("Fourth Site")
    early = without_moving(early, fourth)
    waits = begin(late, MOVING)
    # Whoever is done with a session has heard from all that they have met.
    met = threading.Barrier(3)

    def held_here():
        waits.hold()
        return waits

    def only_before():
        until(lambda: "at an earlier session" in waits._refused.get(HELPER, ""))
        here = Meeting(early, fourth)
        _begun.append(here)
        here.hold()
        met.wait(LONG)
        return here

    def both(pid):
        before = hold(early, pid)
        met.wait(LONG)
        return before, hold(late, pid)

    with caplog.at_level(logging.DEBUG, "dipy_ppir"):
        moving, before, static, helper = together(
            held_here,
            only_before,
            lambda: both(STATIC),
            lambda: both(HELPER),
        )
    linked([before, static[0], helper[0]])
    linked([moving, static[1], helper[1]])
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


@pytest.mark.parametrize("late", ALL)
@pytest.mark.parametrize("way", ["all listen", "relayed"])
def test_a_session_that_others_have_left_behind_is_given_up(way, late):
    """At once, by who dials and by who is dialled."""
    behind, ahead = row(way, [2, 3])

    def party(pid):
        if pid == late:
            with pytest.raises(OutOfStepError, match="--resume at all"):
                hold(behind, pid)
        return hold(ahead, pid)

    linked(together(*(lambda p=p: party(p) for p in ALL)))


def test_patience_begins_anew_while_the_other_is_busy(clock):
    """With a session before; it ends when nobody is there any more."""
    busy, waiting = row("static listens", [1, 2], connect=LONG)
    busy = without_moving(busy, create_identity("Fourth Site"))
    stopped = threading.Event()

    def stop(*_):
        if stopped.is_set():
            raise RuntimeError("stopped")

    helper, owner = begin(busy, HELPER, on_wait=stop), begin(waiting, MOVING)
    ended = {}

    def run(here):
        ended[here] = together(here.hold)[0]

    threads = [threading.Thread(target=run, args=(m,)) for m in (helper, owner)]
    for thread in threads:
        thread.start()
    until(lambda: HELPER in owner._refused)
    before = owner._deadline
    until(lambda: owner._deadline > before)
    stopped.set()
    threads[0].join(LONG)
    assert str(ended[helper]) == "stopped"
    # What was answered before would let patience begin anew after it has ended.
    until(lambda: "could not be reached" in owner._refused[HELPER])
    clock.ahead = 2 * LONG
    threads[1].join(LONG)
    assert type(ended[owner]) is PeerTimeoutError


@pytest.mark.parametrize(("place", "days"), [(2, 1), (3, 2), (9, 2)])
def test_who_stays_at_an_earlier_session_is_not_waited_for_without_end(
    clock, monkeypatch, place, days
):
    monkeypatch.setattr(meeting, "DAY", 2 * LONG)
    monkeypatch.setattr(meeting, "MOST_DAYS", 2)
    (plan,) = row("relayed", [place], connect=LONG)
    here, attempts = begin(plan, MOVING), []

    def still_busy(party, *purpose):
        if not purpose:
            attempts.append(party.pid)
            clock.ahead += LONG / 2
            assert len(attempts) < 50, "waits for ever"
        raise OutOfStepError("still at an earlier session", HELPER, ahead=False)

    monkeypatch.setattr(here, "_connect_to", still_busy)
    with pytest.raises(PeerTimeoutError) as caught:
        here.hold()
    assert f"did not come within {days} day" in str(caught.value)
    assert "earlier session of the row" in str(caught.value)
    assert caught.value.culprit == HELPER
    assert len(attempts) in (4 * days, 4 * days + 1)


def test_what_dialled_for_another_session_is_said_in_the_end(clock, caplog):
    """Its certificate is of nobody whom this session knows."""
    plan, other = row("all listen", [2, 7], connect=LONG)
    here, fourth = begin(plan, HELPER), create_identity("Fourth Site")

    def visit():
        party = plan.parties[HELPER]
        with pytest.raises(OutOfStepError):
            tls.handshake(
                knock(party),
                fourth,
                {party.fingerprint: party},
                purposes=(tls.LINK,),
                server=False,
                place=other.place,
            )
        until(lambda: "another session" in here._refused.get(None, ""))
        come_and_go(here)
        clock.ahead = 2 * LONG

    with caplog.at_level(logging.WARNING, "dipy_ppir"):
        error, visited = together(here.hold, visit)
    assert visited is None, visited
    assert type(error) is PeerTimeoutError
    assert "another session of the row: a certificate that the session" in str(error)
    assert "'Fourth Site'" in str(error)
    assert not caplog.records


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
            assert waits[earlier].wait(LONG)
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

    results = together(*(lambda p=p: party(p) for p in ALL))
    assert results == [{p: p for p in ALL}] * 3


@pytest.mark.parametrize("order", [(MOVING, STATIC), (STATIC, MOVING)])
@pytest.mark.parametrize("listeners", [(STATIC,), (MOVING,), (MOVING, STATIC)])
def test_two_owners_meet_alone(tmp_path, keys, listeners, order):
    path = tmp_path / "session.toml"
    path.write_text(toml(pins.contents(listeners, helper="none")))
    first = threading.Event()

    def party(pid):
        if pid == order[1]:
            assert first.wait(LONG)
        session = Session.load(path, identity=keys[pid], on_wait=lambda *_: first.set())
        with session:
            assert type(session) is PairSession and session.pid == pid
            assert session.peers == [session.other] == [MOVING + STATIC - pid]
            common = session.stream(session.other, b"test").words(9)
            return session.exchange("hello", pid), common, session.receipt()

    (seen, mine, receipt), (_, theirs, other) = together(
        *(lambda p=p: party(p) for p in (MOVING, STATIC))
    )
    assert seen == {MOVING: MOVING, STATIC: STATIC}
    np.testing.assert_array_equal(mine, theirs)
    assert receipt["m"] == 2 and not receipt["warnings"]
    assert set(receipt["signatures"]) == {"moving owner", "static owner"}
    assert common_digest(receipt) == common_digest(other)


def test_two_and_three_do_not_meet():
    """An owner whose file has a helper waits for it, and the other owner for that."""
    alone = pins.plan((STATIC,), helper="none", connect=1.0)
    tables = {**alone.contents["parties"]}
    tables["helper"] = pins.contents()["parties"]["helper"]
    plan = SessionFile.parse({**alone.contents, "parties": tables, "helper": "online"})
    errors = together(lambda: hold(plan, MOVING), lambda: hold(alone, STATIC))
    assert all(isinstance(error, PeerTimeoutError) for error in errors), errors
    assert "the helper (East University)" in str(errors[0])


def test_session_files_that_differ(tmp_path, keys):
    one = pins.contents((HELPER, STATIC), parameters={"alpha": 1, "seed": 3})
    paths = {}
    for pid in ALL:
        one["parameters"]["seed"] = 4 if pid == HELPER else 3
        paths[pid] = tmp_path / f"{pid}.toml"
        paths[pid].write_text(toml(one))
    errors = together(
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
        until(lambda: waited.count([STATIC]) > 20)  # five times as long as REDIAL
        return hold(plan, STATIC)

    meetings = together(
        lambda: hold(plan, MOVING, on_wait=waiting), late, lambda: hold(plan, HELPER)
    )
    linked(meetings)
    assert not [r.message for r in caplog.records if "Lost" in r.message]
    assert sum("Connected to" in r.message for r in caplog.records) == 6


@pytest.mark.parametrize("present", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1)])
@pytest.mark.parametrize("way", ["static listens", "relayed"])
def test_who_did_not_come_is_named(way, present, clock):
    """And nobody else."""
    plan = pins.plan(WAYS[way])
    absent = sorted(set(ALL) - set(present))
    apart = way == "relayed" and HELPER in absent

    def settled(here):
        """Whether a party has reached whom it can, and tried to reach the helper."""
        tried = {here.party.pid, *present, *here._refused}
        return HELPER in tried and (apart or len(here.links) == len(present) - 1)

    def waiting(*_):
        if all(settled(here) for here in meetings):
            clock.ahead = 2 * LONG

    meetings = [begin(plan, p, on_wait=waiting) for p in present]
    errors = together(*(here.hold for here in meetings))
    for error in errors:
        assert type(error) is PeerTimeoutError, error
        for pid in ALL:
            named = f"({pins.NAMES[pid]})" in str(error).partition(" did not")[0]
            assert named == (pid in absent) or apart
        assert error.culprit in absent or apart
        assert "did not come within 300 s" in str(error)
    if HELPER in absent:
        assert "could not be reached at 127.0.0.1:" in str(errors[0])


def test_who_came_but_reached_nobody_else_is_not_called_absent(clock):
    plan = pins.plan((HELPER, STATIC))
    here = begin(plan, HELPER)

    def halves():
        """Connect to the helper, say nothing and stay."""
        with closing(dial(plan, MOVING)), closing(dial(plan, STATIC)):
            until(lambda: len(here.links) == 2)
            clock.ahead = 2 * LONG
            assert over.wait(LONG)

    def helper():
        try:
            here.hold()
        finally:
            over.set()

    over = threading.Event()
    error, visited = together(helper, halves)
    assert visited is None, visited
    assert type(error) is PeerTimeoutError
    assert "came, but did not reach the other parties within 300 s" in str(error)
    assert "that they have the same session file" in str(error)


def knock(party):
    """A connection to a party as soon as it listens, before which it sees nothing."""
    connected = []

    def connect():
        with suppress(ConnectionRefusedError):
            connected.append(socket.create_connection(party.address, LONG))
        return connected

    until(connect)
    return connected[0]


def come_and_go(here):
    """Be a scanner, who has nothing to say, until a meeting has done with it."""
    with knock(here.party) as scanner:
        scanner.shutdown(socket.SHUT_WR)
        while scanner.recv(9):
            pass
    until(lambda: not here._greetings)


def dial(plan, pid, *, identity=None, purpose=tls.LINK, to=HELPER):
    """Connect as one party to another, as soon as that one listens."""
    party, identity = plan.parties[to], identity or pins.identity(pid)
    return pins.connect(knock(party), identity, party, purpose=purpose)


def test_who_came_and_went_is_not_called_absent(clock):
    plan = pins.plan((HELPER,))
    here = begin(plan, HELPER)

    def visit():
        for pid in (MOVING, STATIC):
            dial(plan, pid).close()
        until(lambda: here._seen == {MOVING, STATIC} and not here.links)
        clock.ahead = 2 * LONG

    error, visited = together(here.hold, visit)
    assert visited is None, visited
    assert type(error) is PeerTimeoutError
    assert "came and went away again, and did not come back within 300 s" in str(error)


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
            here = begin(plan, pid)

            def leaves(missing, left, here=here):
                there = {party.pid for party in missing} <= {last}
                # Without the helper the owners cannot reach each other through it.
                alone = way == "relayed" and last == HELPER and here._refused
                if there or alone:
                    raise Gone

            here.on_wait = leaves
            with pytest.raises(Gone):
                here.hold()
        gone.set()
        return hold(plan, pid)

    def late():
        assert gone.wait(LONG)
        return hold(plan, last)

    parties = {p: lambda p=p: hold(plan, p) for p in ALL}
    parties[pid], parties[last] = restless, late
    meetings = together(*(parties[p] for p in ALL))
    linked(meetings)


def test_an_older_connection_does_not_replace_a_newer(monkeypatch):
    """Its greeting ends after that of the connection of the program started anew."""
    plan = pins.plan((HELPER, STATIC))
    here = begin(plan, HELPER)
    put, arrivals = here._put, []
    second, taken, over = threading.Event(), threading.Event(), threading.Event()

    def late(event):
        if isinstance(event, tls.TLSSocket) and event.party.pid == MOVING:
            arrivals.append(event)
            if len(arrivals) == 1:
                assert second.wait(300)
                put(event)
                taken.set()
                return
            put(event)
            second.set()
            return
        put(event)

    take, asked = here._take_event, []

    def taking():
        asked.append(1)
        take()

    monkeypatch.setattr(here, "_put", late)
    monkeypatch.setattr(here, "_take_event", taking)

    def owner():
        dial(plan, MOVING).close()
        until(lambda: arrivals)

        def stay(*_):
            if over.is_set():
                raise Gone

        hold(plan, MOVING, on_wait=stay)

    def helper():
        here.on_wait = lambda *_: over.is_set() and 1 / 0
        here.hold()

    def end():
        assert taken.wait(300)
        # The late one is taken, and dealt with when the next is asked for.
        until(here._events.empty)
        before = len(asked)
        until(lambda: len(asked) > before + 1)
        kept = here.links.get(MOVING)
        over.set()
        return kept

    one, _, kept = together(owner, helper, end)
    assert type(one) is Gone, one
    assert kept is not None
    assert kept.sock is arrivals[1]


def test_who_runs_twice_is_told(caplog):
    """The one that came first ends; otherwise the two would take turns for ever."""
    plan = pins.plan((HELPER, STATIC))
    over, ended = threading.Event(), threading.Event()
    caplog.set_level(logging.INFO, logger="dipy_ppir")

    def stay(*_):
        if over.is_set():
            raise Gone

    def first():
        try:
            hold(plan, MOVING, on_wait=stay)
        finally:
            ended.set()

    def second():
        until(lambda: "Connected to the moving owner" in caplog.text)
        hold(plan, MOVING, on_wait=stay)

    def end():
        try:
            assert ended.wait(LONG), "the first goes on"
        finally:
            over.set()

    one, two, _, waited = together(
        first, second, lambda: hold(plan, HELPER, on_wait=stay), end
    )
    assert waited is None, waited
    assert type(one) is ProtocolError, one
    assert "another program with this party's key took its place" in str(one)
    assert type(two) is Gone, two


def test_who_is_replaced_hears_of_it_when_it_says_that_it_is_ready(monkeypatch):
    """Before it has looked at what came."""
    plan = pins.plan((STATIC,), helper="none")
    here = begin(plan, MOVING)
    say = here._say_ready

    def late(pid):
        until(here.links[pid].sock.ended)
        say(pid)

    monkeypatch.setattr(here, "_look_at", lambda pid: None)
    monkeypatch.setattr(here, "_say_ready", late)

    def replaces():
        with socket.create_server(plan.parties[STATIC].address) as server:
            sock, _ = server.accept()
        party = plan.parties[MOVING]
        link = Link(
            pins.connect(sock, pins.identity(STATIC), party, server=True), MOVING
        )
        link.say_last(ABORT, bytes([REPLACED, 255]))
        assert link.flush()
        return link.sock

    error, connection = together(here.hold, replaces)
    connection.close()
    assert type(error) is ProtocolError, error
    assert "took its place" in str(error)


def test_a_dead_end_of_the_relay_is_cut_when_its_owner_comes_again():
    """A machine that lost its power says no farewell: the helper cannot see that the
    path is dead, and the other owner waits at its end."""
    plan = pins.plan((HELPER,))
    frozen = []

    def moving():
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

    meetings = together(moving, lambda: hold(plan, STATIC), lambda: hold(plan, HELPER))
    linked(meetings)
    frozen[0].close()


# -- strangers at the door ---------------------------------------------------


def in_time(plan, *visits):
    """Hold a meeting at which the visits take place before the static owner comes."""
    over = threading.Event()

    def visit():
        try:
            for function in visits:
                function()
        finally:
            over.set()

    def late():
        assert over.wait(LONG)
        return hold(plan, STATIC)

    *meetings, visited = together(
        lambda: hold(plan, MOVING), late, lambda: hold(plan, HELPER), visit
    )
    assert visited is None, visited
    linked(meetings)


def test_strangers_are_turned_away(caplog):
    plan = pins.plan((HELPER,))

    def with_certificate():
        with closing(dial(plan, MOVING, identity=create_identity("Mallory"))) as mine:
            poller = select.poll()
            poller.register(mine.fileno(), select.POLLIN)
            poller.poll(1000 * LONG)
            with pytest.raises(CertificateError, match="refused this party's certif"):
                mine.recv_into(memoryview(bytearray(9)))

    def scanner():
        for raw in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(3000), b"\x16\x03\x01"):
            with knock(plan.parties[HELPER]) as sock:
                sock.sendall(raw)

    in_time(
        plan, with_certificate, scanner, lambda: until(lambda: "Refused" in caplog.text)
    )
    until(lambda: not running("meeting"))  # those who greeted have had their say
    (warning,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert "Refused a connection from 127.0.0.1: a certificate" in warning
    assert "'Mallory'" in warning


def test_a_party_dialling_the_wrong_one_is_turned_away(caplog):
    """The helper has no business at the static owner's door."""
    plan = pins.plan((HELPER, STATIC))

    def visit():
        dial(plan, HELPER, to=STATIC).close()
        try:
            until(lambda: "swapped" in caplog.text)
        finally:
            stop.set()

    stop = threading.Event()

    def impatient(missing, left):
        if stop.is_set():
            raise Gone

    error, visited = together(lambda: hold(plan, STATIC, on_wait=impatient), visit)
    assert visited is None, visited
    assert type(error) is Gone


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "half a handshake"])
def test_idle_strangers_do_not_keep_the_parties_out(monkeypatch, busy):
    """They stay as long as they may, and come back when they are sent away."""
    monkeypatch.setattr(meeting, "MAX_GREETINGS", 8)
    plan = pins.plan((HELPER,))
    here = begin(plan, HELPER)
    crowded, over = threading.Event(), threading.Event()

    def gone(sock):
        poller = select.poll()
        poller.register(sock, select.POLLIN)
        return bool(poller.poll(0))

    def crowd():
        until(lambda: here._listener is not None)
        with ExitStack() as stack:
            strangers = []

            def another():
                address = plan.parties[HELPER].address
                strangers.append(stack.enter_context(socket.create_connection(address)))
                if busy:
                    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
                    strangers[-1].sendall(hello)

            def sent_away():
                return sum(map(gone, strangers))

            for n in range(1, 12):
                another()
                until(lambda n=n: len(here._greetings) + sent_away() == n)
            assert sent_away() == 3, "nobody had to give way, or too many were let in"
            crowded.set()
            # The owners connect twice each: who comes after any of these connections
            # are 3 + 4, and it takes eight to send it away before it is looked at.
            with suppress(OSError):  # when it is over nobody listens
                for n in range(3, 7):
                    until(lambda n=n: over.is_set() or sent_away() > n)
                    another()
            over.wait(LONG)

    def late(pid):
        assert crowded.wait(LONG)
        return hold(plan, pid)

    def helper():
        try:
            here.hold()
        finally:
            over.set()
        return here

    *meetings, visited = together(
        lambda: late(MOVING), lambda: late(STATIC), helper, crowd
    )
    assert visited is None, visited
    linked(meetings)


@pytest.fixture
def closed_after():
    """Close sockets after the test; they wait for as long as tests do."""
    with ExitStack() as stack:

        def register(*socks):
            for sock in socks:
                sock.settimeout(LONG)
                stack.enter_context(sock)
            return socks

        yield register


def test_the_crowd_of_one_address_gives_way_first(closed_after):
    here = Meeting(pins.plan((HELPER,)), pins.identity(HELPER))
    pairs = [closed_after(*socket.socketpair()) for _ in range(4)]
    hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.3"]
    here._greetings = {a: host for (a, _), host in zip(pairs, hosts, strict=True)}
    here._send_one_away()
    assert list(here._greetings.values()) == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert pairs[1][1].recv(1) == b"", "the oldest of the crowd was not cut"
    here._send_one_away()
    assert "10.0.0.1" not in here._greetings.values()


def test_who_was_let_in_gives_way_to_nobody(monkeypatch):
    """A connection that is in use is not cut for one more stranger."""
    plan = pins.plan((HELPER,))
    here, crowds = begin(plan, HELPER), []
    put = here._put

    def look(event):
        crowds.append(list(here._greetings))
        put(event)

    monkeypatch.setattr(here, "_put", look)

    def owner():
        with closing(dial(plan, MOVING)):
            until(lambda: MOVING in here.links)
            over.set()

    def helper():
        here.on_wait = lambda *_: over.is_set() and 1 / 0
        here.hold()

    over = threading.Event()
    error, dialled = together(helper, owner)
    assert type(error) is ZeroDivisionError and dialled is None, (error, dialled)
    assert crowds == [[]]


# -- somebody else where a party should be -----------------------------------


def imposter(plan, identity, *, pid=HELPER):
    """Answers at a party's address with a certificate of its own, whatever the
    connection is for."""
    moving = plan.parties[MOVING]
    with socket.create_server(plan.parties[pid].address) as listener:
        sock, _ = listener.accept()
        return tls.handshake(
            sock,
            identity,
            {moving.fingerprint: moving},
            purposes=(tls.LINK, tls.RELAY),
            server=True,
        )


def test_somebody_else_answers():
    """The owner ends at once, and the imposter is told."""
    plan = pins.plan((HELPER,))
    error, heard = together(
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

    error, _ = together(lambda: hold(plan, MOVING), web_server)
    assert type(error) is ProtocolError
    assert error.culprit == HELPER


def test_a_party_that_the_helper_does_not_pin(clock, caplog):
    """It is told so; the helper goes on waiting, and says whom it refused."""
    plan = pins.plan((HELPER, STATIC))
    contents = {**plan.contents, "parties": dict(plan.contents["parties"])}
    contents["parties"]["moving"] = {
        "name": pins.NAMES[MOVING],
        "fingerprint": create_identity("another").fingerprint,
    }
    other = type(plan).parse(contents)

    def moving():
        try:
            hold(plan, MOVING)
        finally:
            until(lambda: "Refused a connection" in caplog.text)
            clock.ahead = 2 * LONG

    refused, waiting = together(moving, lambda: hold(other, HELPER))
    assert type(refused) is CertificateError
    assert refused.culprit == HELPER
    assert "refused this party's certificate" in str(refused)
    assert type(waiting) is PeerTimeoutError
    assert "Last refused: 127.0.0.1: somebody calls itself" in str(waiting)


def test_who_went_away_again_does_not_hide_who_was_refused(clock):
    """Also where one party alone dials, and anybody who does could be that one."""
    plan = pins.plan((STATIC,), helper="none")
    here = begin(plan, STATIC)

    def visits():
        imitation = create_identity(pins.NAMES[MOVING])
        dial(plan, MOVING, identity=imitation, to=STATIC).close()
        until(lambda: MOVING in here._refused)
        come_and_go(here)
        clock.ahead = 2 * LONG

    error, visited = together(here.hold, visits)
    assert visited is None, visited
    assert type(error) is PeerTimeoutError
    assert "Last refused: 127.0.0.1: somebody calls itself" in str(error)


def test_the_party_itself_replaces_who_called_itself_so(clock):
    """It was refused as well, for another reason."""
    plan = pins.plan((STATIC,), helper="none")
    here = begin(plan, STATIC)

    def visits():
        party, other = plan.parties[STATIC], b"dipy-ppir/another"
        dial(plan, MOVING, identity=create_identity("Mallory"), to=STATIC).close()
        until(lambda: "Mallory" in here._refused.get(MOVING, ""))
        with pytest.raises(ProtocolError):
            pins.connect(knock(party), pins.identity(MOVING), party, purpose=other)
        until(lambda: "same version" in here._refused[MOVING])
        clock.ahead = 2 * LONG

    error, visited = together(here.hold, visits)
    assert visited is None, visited
    assert "Mallory" not in str(error) and "same version" in str(error)


def test_only_what_befell_the_missing_is_told(clock):
    """Who was refused, and came at last, is not the one to look for."""
    plan = pins.plan((HELPER, STATIC))
    here = begin(plan, HELPER)

    def visits():
        imitation = create_identity(pins.NAMES[MOVING])
        dial(plan, MOVING, identity=imitation).close()
        until(lambda: MOVING in here._refused)
        with closing(dial(plan, MOVING)):
            until(lambda: MOVING in here.links)
            clock.ahead = 2 * LONG
            assert over.wait(LONG)

    def helper():
        try:
            here.hold()
        finally:
            over.set()

    over = threading.Event()
    error, visited = together(helper, visits)
    assert visited is None, visited
    assert type(error) is PeerTimeoutError
    assert error.culprit == STATIC
    assert "Last refused" not in str(error)


def test_who_could_not_be_reached_at_first_is_not_told_of_later(clock):
    """The helper came after the moving owner had dialled it in vain."""
    plan = pins.plan((HELPER, STATIC))
    here = begin(plan, MOVING)

    over = threading.Event()

    def moving():
        try:
            here.hold()
        finally:
            over.set()

    def stay(*_):
        if here.links.keys() == {HELPER}:
            clock.ahead = 2 * LONG
        if over.is_set():
            raise Gone

    def late():
        until(lambda: {HELPER, STATIC} <= here._refused.keys())
        hold(plan, HELPER, on_wait=stay)

    error, _ = together(moving, late)
    assert type(error) is PeerTimeoutError
    reasons = str(error).partition("Last refused: ")[2]
    assert f"({pins.NAMES[STATIC]}) could not be reached" in reasons
    assert pins.NAMES[HELPER] not in reasons


def test_own_certificate_is_not_in_the_file():
    with pytest.raises(SessionFileError, match="does not name this party's"):
        Meeting(pins.plan(), create_identity("stranger"))


@pytest.mark.parametrize("raw", [b"x" * 24, b"PP\x01\x02" + bytes(20)])
def test_a_pinned_party_that_does_not_begin_as_it_should(raw):
    plan = pins.plan((HELPER,))

    def helper():
        try:
            hold(plan, HELPER)
        finally:
            over.set()

    def rude():
        with closing(dial(plan, MOVING)) as connection:
            connection.sendmsg([raw])
            assert over.wait(LONG)

    over = threading.Event()
    error, visited = together(helper, rude)
    assert visited is None, visited
    assert type(error) is ProtocolError
    assert error.culprit == MOVING


# -- listening ---------------------------------------------------------------


def test_the_port_is_in_use():
    plan = pins.plan((HELPER,))
    with socket.create_server(plan.parties[HELPER].address):
        with pytest.raises(SessionFileError, match="another program uses this port"):
            hold(plan, HELPER)


def test_an_address_of_somebody_else():
    with pytest.raises(SessionFileError, match="192.0.2.7:7433 .*--listen takes an ad"):
        hold(pins.plan((HELPER,)), HELPER, listen=("192.0.2.7", 7433))


def test_where_to_listen_as_text(tmp_path, keys):
    path = tmp_path / "session.toml"
    path.write_text(toml(pins.contents((HELPER,))))
    options = {"identity": keys[HELPER]}
    with pytest.raises(SessionFileError, match="192.0.2.7:7433 .*--listen takes an ad"):
        Session.load(path, listen="192.0.2.7:7433", **options)
    with pytest.raises(SessionFileError, match="listen='7433' must be host:port"):
        Session.load(path, listen="7433", **options)


def at_a_name(name="helper.test"):
    """A plan whose helper is dialled by name, and its port."""
    contents = pins.contents((HELPER,))
    address = contents["parties"]["helper"]["address"]
    port = int(address.rpartition(":")[2])
    contents["parties"]["helper"]["address"] = f"{name}:{port}"
    return type(pins.plan()).parse(contents), port


def resolve(monkeypatch, *addresses):
    """Let every name that is dialled have these addresses."""

    def getaddrinfo(*args, **options):
        kind = socket.SOCK_STREAM
        return [(socket.AF_INET, kind, 0, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_the_own_name_means_another_address(monkeypatch, caplog):
    """As on Debian, where it is a loopback address in the machine's hosts file."""
    caplog.set_level(logging.INFO, "dipy_ppir")
    plan, port = at_a_name()
    inner = socket.getaddrinfo

    def getaddrinfo(host, *args, flags=0, **options):
        if host == "helper.test":
            host = "192.0.2.7" if flags & socket.AI_PASSIVE else "127.0.0.1"
        return inner(host, *args, flags=flags, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    linked(meet(plan))
    assert f"Listening on port {port} of all addresses" in caplog.text


@pytest.mark.parametrize("dual", [True, False], ids=["IPv6 too", "IPv4 only"])
def test_who_listens_can_be_dialled_at_all_addresses(monkeypatch, dual):
    """With IPv6, without it, and where the system knows of it but has no address."""
    if dual and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    if not dual:
        inner = socket.create_server

        def create_server(address, *, family, **options):
            if family == socket.AF_INET6:
                raise OSError(errno.EADDRNOTAVAIL, "no such address")
            return inner(address, family=family, **options)

        monkeypatch.setattr(socket, "create_server", create_server)
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: True)
    here = begin(pins.plan((HELPER,)), HELPER)
    _, port = here.party.address
    with closing(here._open_listener()) as listener:
        hosts = ["127.0.0.1", "127.0.0.2"] if sys.platform == "linux" else ["127.0.0.1"]
        for host in [*hosts, "::1"] if dual else hosts:
            with suppress_absent(host), socket.create_connection((host, port), LONG):
                sock, _ = listener.accept()
                with sock:
                    assert meeting._host(sock.getsockname()) == host


@contextmanager
def suppress_absent(host):
    """Skip the IPv6 loopback address where the machine has none."""
    try:
        yield
    except OSError as exc:
        if host != "::1" or exc.errno != errno.EADDRNOTAVAIL:
            raise


def test_strangers_with_many_ipv6_addresses_are_one_crowd():
    """A site has 2^64 of them, and could be a new host with every connection."""
    same = {meeting._network(f"2001:db8::{n:x}%eth0") for n in range(9)}
    assert len(same) == 1
    assert meeting._network("2001:db8:0:1::1") not in same
    assert meeting._network("10.0.0.1") != meeting._network("10.0.0.2")


# -- names with several addresses --------------------------------------------


def test_all_addresses_of_a_name_are_dialled(monkeypatch):
    plan, port = at_a_name()
    nobody = "127.0.0.1", pins.free_port()
    resolve(monkeypatch, nobody, ("127.0.0.1", port))
    linked(meet(plan))


def test_an_address_where_something_else_answers(monkeypatch):
    """It hangs up, as a load balancer does; the next attempt begins with the next."""
    plan, port = at_a_name()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        resolve(monkeypatch, listener.getsockname(), ("127.0.0.1", port))

        def hang_up():
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        linked(meet(plan))
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(LONG)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse at once")
def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    monkeypatch, closed_after
):
    monkeypatch.setattr(meeting, "DIAL_TIMEOUT", 1.0)
    monkeypatch.setattr(meeting, "ADDRESS_TIMEOUT", 0.05)
    here = begin(at_a_name()[0], MOVING)
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    there = socket.create_server(("127.0.0.1", 0))
    closed_after(full, there, socket.create_connection(full.getsockname()))
    resolve(monkeypatch, full.getsockname(), there.getsockname())
    with here._dial(here.plan.parties[HELPER]) as sock:
        assert sock.getpeername() == there.getsockname()
    there.close()
    with pytest.raises(OSError, match="helper.test.*127.0.0.1: timed out") as caught:
        here._dial(here.plan.parties[HELPER])
    assert "127.0.0.1: Connection refused" in str(caught.value)


def test_a_name_that_has_no_address(monkeypatch):
    def getaddrinfo(*args, **options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    plan, _ = at_a_name()
    here = begin(plan, MOVING)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match=r"helper.test:\d+ \(Name or service not known\)"):
        here._dial(plan.parties[HELPER])


def test_listening_elsewhere_than_where_others_dial():
    """Behind a port forwarding, for example."""
    plan = pins.plan((HELPER,))
    inside = "127.0.0.1", pins.free_port()

    def forward(listener):
        until(lambda: can_dial(inside))
        with suppress(OSError):  # it is shut down in the end
            while True:
                sock, _ = listener.accept()
                relay.Pump(sock, socket.create_connection(inside)).start()

    with socket.create_server(plan.parties[HELPER].address) as listener:
        thread = threading.Thread(target=forward, args=(listener,), name="relay")
        thread.start()
        try:
            meetings = together(
                lambda: hold(plan, MOVING),
                lambda: hold(plan, STATIC),
                lambda: hold(plan, HELPER, listen=inside),
            )
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(LONG)
    linked(meetings)


def can_dial(address):
    with suppress(OSError):
        socket.create_connection(address, LONG).close()
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

    results = together(*(lambda p=p: party(p) for p in ALL))
    assert all(isinstance(r, bytes) for r in results), results
    assert len(overheard) > 2 * planted.nbytes, "it did not go through the relay"
    # Six bytes are among a million random ones by chance once in 2e8 runs, the eight of
    # the header of a frame (kind and operation) never.
    header = struct.pack("<2sBBI", b"PP", 1, DATA, operation_code("step"))
    for text in (b"planted", header, b"Hospital", b"Clinic"):
        assert text not in overheard
    assert b"planted" in marks[0], "the search could not have found anything"


def test_what_is_overheard_is_what_was_moved(overheard, closed_after):
    """The recorder of the test above sees bytes that pass in the clear."""
    plan = pins.plan((HELPER,))
    ends = []
    for pid in (MOVING, STATIC):
        one, other = closed_after(*socket.socketpair())
        ends += together(
            lambda one=one, pid=pid: pins.connect(
                one, pins.identity(pid), plan.parties[HELPER]
            ),
            lambda other=other, pid=pid: pins.connect(
                other, pins.identity(HELPER), plan.parties[pid], server=True
            ),
        )
    pump = relay.Pump(ends[1], ends[3])
    pump.start()
    ends[0].sendmsg([b"in the clear"])
    until(lambda: b"in the clear" in overheard)
    ends[0].close()
    ends[2].close()
    pump.join(LONG)
    assert not pump.is_alive()


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
        stack.callback(pump.join, LONG)
        stack.enter_context(inner)
        return pins.connect(inner, inner_identity, plan.parties[MOVING], server=True)


@pytest.mark.parametrize("name", ["own", "made up"])
def test_the_helper_cannot_play_the_other_owner(name):
    plan = pins.plan((HELPER,))
    identity = pins.identity(HELPER)
    if name == "made up":
        identity = create_identity(pins.NAMES[STATIC])
    error, heard = together(
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
    plan = pins.plan((HELPER,))
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

    errors = together(*(lambda h=h: party(h) for h in meetings))
    assert changed
    assert all(isinstance(error, PeerError) for error in errors), errors


class Polls:
    """In place of the module ``select`` of the relay: what each poll of it saw."""

    POLLIN, POLLOUT = select.POLLIN, select.POLLOUT

    def __init__(self):
        self.seen = []

    def poll(self):
        inner = select.poll()

        def poll(milliseconds):
            self.seen.append(inner.poll(min(milliseconds, 5)))

        return SimpleNamespace(register=inner.register, poll=poll)


def test_a_relay_does_not_spin(monkeypatch, closed_after):
    """One end is gone, the other takes nothing: there is nothing to do but wait."""
    a, near = closed_after(*socket.socketpair())
    far, b = closed_after(*socket.socketpair())
    polls = Polls()
    monkeypatch.setattr(relay, "select", polls)
    pump = relay.Pump(near, far)
    pump.start()
    a.setblocking(False)

    def watch(polled):
        """What the relay's next polls see."""
        before = len(polls.seen)
        until(lambda: len(polls.seen) >= before + polled)
        return polls.seen[before:]

    full = False
    while not full:  # until it has passed on what it can, and no more goes in
        with suppress(BlockingIOError):
            while True:
                a.send(bytes(1 << 16))
        idle = not any(watch(5))
        try:
            a.send(b"x")
        except BlockingIOError:
            full = idle
    a.close()
    assert not any(watch(20)), "it was woken, with nothing to do"
    assert pump.is_alive()
    b.close()
    pump.join(LONG)
    assert not pump.is_alive()


def test_a_relay_delivers_the_last_word(monkeypatch, closed_after):
    monkeypatch.setattr(relay, "_LINGER", LONG)
    a, near = closed_after(*socket.socketpair())
    far, b = closed_after(*socket.socketpair())
    pump = relay.Pump(near, far)
    pump.start()
    a.sendall(bytes(1 << 15) + b"farewell")
    a.close()
    got = b""
    while part := b.recv(1 << 16):
        got += part
    assert got.endswith(b"farewell")
    b.close()
    pump.join(LONG)
    assert not pump.is_alive()
