"""How separate processes find one another, in whatever order they are started.

Owners dial the helper, and one owner the other (see `SessionFile.dials`); of sites that
add up, each dials those before it (`PlanFile.dials`). Every connection is TLS between
pinned certificates. A party that goes away before all have
met may come back. Once everybody is connected to everybody, and has said so, the
meeting is over.

Sessions may be held in a row at the same addresses (see `SessionFile`): each party
holds those that it takes part in one after the other, in the same order, and may be
late or leave one out. Of a party that is dialled and busy with an earlier session of
the row it is known that it is alive: the time to wait for it begins anew, for a day at
most for each session before this one, and for a week at most in all. One that is at a
later session is not waited for.
"""

from collections import Counter
import contextlib
import errno
import ipaddress
import itertools
import logging
import os
import queue
import socket
import threading
import time

from dipy_ppir.mpc import tls
from dipy_ppir.mpc.errors import (
    CertificateError,
    OutOfStepError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
    SessionFileError,
)
from dipy_ppir.mpc.frame import ABORT, JSON, REPLACED, operation_code
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, Ledger
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.network import Network
from dipy_ppir.mpc.relay import Pump, tunnel

logger = logging.getLogger("dipy_ppir")

#: Connections of strangers that are looked at, at the same time; one more, and the
#: oldest of the address that has most of them must go.
MAX_GREETINGS = 64
#: Seconds between two attempts to dial, for one of them, and least for one address.
REDIAL, DIAL_TIMEOUT, ADDRESS_TIMEOUT = 0.5, 5.0, 1.0
#: Seconds that any one session of a row is allowed, and for how many of them at most a
#: party is waited for that says it is at an earlier one.
DAY, MOST_DAYS = 24 * 3600.0, 7


class _Stopped(Exception):
    """The meeting is over."""


class Meeting:
    """This party's part in a meeting.

    Parameters
    ----------
    plan : SessionFile or PlanFile
    identity : Identity
        of this party; the plan names its certificate.
    listen : tuple of (str, int), optional
        address to listen on; by default all of this machine, at the port that others
        dial.
    on_wait : callable, optional
        called with the missing parties and the seconds left, some times a second.

    Attributes
    ----------
    party : Party
        this party.
    links : dict
        maps party numbers to `Link`, when all have met.
    seeds : dict
        maps party numbers to the secret shared with each.
    relays : list of Pump
        at the helper: what it passes on between the owners.
    on_wait : callable or None
    """

    def __init__(self, plan, identity, *, listen=None, on_wait=None):
        self.plan, self.identity = plan, identity
        self.party = plan.party_of(identity.fingerprint)
        self.links, self.seeds, self.relays = {}, {}, []
        self._listen, self.on_wait = listen, on_wait
        self._others = {p: q for p, q in plan.present.items() if p != self.party.pid}
        self._events = queue.Queue()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._redial = {}
        self._dialled = Counter()
        self._greetings = {}
        self._told, self._heard, self._seen = set(), set(), set()
        self._waiting = {}
        #: Why nothing came of the last connection, by party; None where it is unknown
        #: who tried, and the host that it came from then. Who did not only go away.
        self._refused, self._stranger, self._spoke = {}, None, set()
        self._warned = None
        self._listener = self._porter = None

    # -- the whole -------------------------------------------------------

    def hold(self):
        """Wait until all parties are connected.

        Raises
        ------
        CertificateError, ProtocolError
            if somebody else answers where a party is dialled, or a party refuses this
            one.
        PeerTimeoutError
            naming who did not come.
        SessionFileError
            if this party cannot listen on its address.
        """
        pid, plan = self.party.pid, self.plan
        callers = {p for p in self._others if pid in plan.dials(p)}
        begin, connect = time.monotonic(), plan.timeouts["connect"]
        self._deadline = begin + connect
        self._last_renewal = begin + max(connect, self._days_before() * DAY)
        try:
            if callers:
                self._listener = self._open_listener()
                self._porter = self._start(self._answer, callers)
            attempts = dict.fromkeys(plan.dials(pid), self._connect_to)
            if plan.relayed and pid != HELPER:
                attempts[STATIC + MOVING - pid] = self._connect_through_relay
            self._redial = {peer: threading.Event() for peer in attempts}
            for peer, attempt in attempts.items():
                self._start(self._keep_trying, peer, attempt)
            self._gather()
        except BaseException:
            self._end()
            for link in self.links.values():
                link.sock.close()
            for relay in self.relays:
                relay.stop()
            raise
        self._end()
        self.seeds = {
            p: link.sock.seed(self._pair(p)) for p, link in self.links.items()
        }
        if plan.relayed and pid != HELPER:
            other = self.links[STATIC + MOVING - pid]
            other.carrier = self.links[HELPER]

    def _days_before(self):
        """For how many days the sessions before this one may keep a party."""
        return min((self.plan.place or 1) - 1, MOST_DAYS)

    def _pair(self, peer):
        """What this party and a peer must agree on to have the same random numbers."""
        pair = "%d-%d" % tuple(sorted((self.party.pid, peer)))
        return f"{self.plan.digest} {pair}".encode()

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True, name="meeting")
        thread.start()
        return thread

    def _end(self):
        """Stop listening and dialling; connections that came too late are closed."""
        with self._lock:
            self._over.set()
        for redial in self._redial.values():
            redial.set()
        if self._listener is not None:
            # Closing alone would not wake the thread that accepts, nor free the port.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._porter.join()
            self._listener.close()
        self._clear_events()

    def _gather(self):
        while self._others.keys() - self._heard or self._others.keys() - self._told:
            self._take_event()
            for pid in list(self.links):
                self._look_at(pid)
            if self.links.keys() == self._others.keys():
                for pid in self._others.keys() - self._told:
                    self._say_ready(pid)
            left = self._deadline - time.monotonic()
            missing = self._missing()
            if left <= 0 and missing:
                self._give_up(missing)
            absent = [party for party in missing if party.pid not in self.links]
            if self.on_wait is not None and absent:
                self.on_wait(absent, left)

    def _missing(self):
        """Who is not there; or, if all are, who has not found all the others."""
        absent = self._others.keys() - self.links.keys()
        return [
            self._others[p] for p in sorted(absent or self._others.keys() - self._heard)
        ]

    def _give_up(self, missing):
        # Whoever came and gave up a moment earlier is not the one to look for.
        missing = [p for p in missing if p.pid not in self._seen] or missing
        names = " and ".join(party.title for party in missing)
        reasons = "; ".join(self._refusals(missing))
        hint = f" Last refused: {reasons}" if reasons else ""
        within = f"within {self.plan.timeouts['connect']:g} s"
        if missing[0].pid in self.links:
            what = f"{names} came, but did not reach the other parties {within}; see"
            what += (
                " their own logs, and check their firewalls and that they have"
                if len(missing) > 1
                else " its own log, and check its firewall and that it has"
            )
            what += f" the same {self.plan.kind}"
        elif missing[0].pid in self._seen:
            what = f"{names} came and went away again, and did not come back {within};"
            what += " see the log there"
        else:
            who, it = ("they were", "them") if len(missing) > 1 else ("it was", "it")
            what = f"{names} did not come {within}; check that {who} started with the"
            what += f" same {self.plan.kind} and that the firewalls let {it} through"
        raise PeerTimeoutError(f"{what}.{hint}", missing[0].pid)

    def _refusals(self, missing):
        """Why nothing came of what the missing parties may have tried."""
        pids = {party.pid for party in missing} - self.links.keys()
        if any(self.party.pid in self.plan.dials(p) for p in pids):
            pids.add(None)
        # Other threads add to them.
        return [reason for who, reason in list(self._refused.items()) if who in pids]

    # -- events of the connecting threads --------------------------------

    def _take_event(self):
        try:
            event = self._events.get(timeout=0.1)
        except queue.Empty:
            return
        if isinstance(event, BaseException):
            raise event
        connection = event
        pid = connection.party.pid
        if connection.purpose == tls.RELAY and self.party.pid == HELPER:
            self._relay(pid, connection)
            return
        if pid in self.links and connection.accepted < self.links[pid].sock.accepted:
            connection.close()  # its greeting took longer than that of the next one
            return
        if pid in self.links:
            logger.warning(
                "%s connects again: it was started anew, or runs twice with the same "
                "key, which cannot work",
                connection.party.title,
            )
            link = self.links[pid]
            link.say_last(ABORT, bytes([REPLACED, 255]))
            with contextlib.suppress(OSError):
                link.flush()
            self._drop(pid, lost=False)
        logger.info("Connected to %s", connection.party.title)
        self._forget_refused(pid)
        self.links[pid] = Link(connection, pid, connection.party.title)
        self._seen.add(pid)

    def _clear_events(self):
        # Nothing is put there any more, see `_put`.
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get_nowait()
                if isinstance(event, tls.TLSSocket):
                    event.close()
        for connection in self._waiting.values():
            connection.close()

    def _relay(self, pid, connection):
        old = self._waiting.pop(pid, None)
        if old is not None:
            old.close()
        # It would not dial again if the other owner could still be reached that way.
        for pump in self.relays:
            pump.stop()
        self._waiting[pid] = connection
        if len(self._waiting) == 2:
            pump = Pump(*self._waiting.values())
            self._waiting = {}
            pump.start()
            self.relays = [pump]

    # -- the links so far ------------------------------------------------

    def _drop(self, pid, *, lost=True):
        """Forget a link that was lost, or that its other end replaced."""
        self._told.discard(pid)
        self._heard.discard(pid)
        logger.info("Lost %s again; waiting for it", self._others[pid].title)
        self.links.pop(pid).sock.close()
        if lost and pid in self._redial:
            self._redial[pid].set()

    def _say_ready(self, pid):
        link, ledger = self.links[pid], Ledger()
        try:
            network = Network({pid: link}, DIAL_TIMEOUT, lambda: ledger)
            network.send_json(pid, "ready", {})
            self._told.add(pid)
        except CertificateError:
            raise
        except PeerError:
            for frame in link.inbox:
                self._check_replaced(frame)
            self._drop(pid)

    def _look_at(self, pid):
        link = self.links[pid]
        try:
            if pid not in self._heard:
                frame = link.pump()
                if frame is None:
                    return
                self._check_replaced(frame)
                if frame.kind == ABORT:
                    raise EOFError
                if frame.kind != JSON or frame.op != operation_code("ready"):
                    raise ProtocolError(
                        f"{self._others[pid].title} did not begin as it should; "
                        "install the same version of dipy_ppir everywhere",
                        pid,
                    )
                link.pop()
                self._heard.add(pid)
            else:
                if link.sock.ended():
                    frame = link.pump()
                    if frame is not None:
                        self._check_replaced(frame)
                    raise EOFError
        except EOFError:
            self._drop(pid)

    def _check_replaced(self, frame):
        if frame.kind == ABORT and bytes(frame.body[:1]) == bytes([REPLACED]):
            raise ProtocolError(
                "another program with this party's key took its place; end one of "
                "the two, and start all parties again"
            )

    # -- dialling, in threads --------------------------------------------

    def _keep_trying(self, peer, attempt):
        while not self._over.is_set():
            try:
                connection = attempt(self.plan.parties[peer])
            except OutOfStepError as exc:
                if exc.ahead or exc.culprit is None:
                    self._put(exc)
                    return
                # It is there, and has something else to do first.
                self._refused[peer] = str(exc)
                now = time.monotonic()
                if now > self._last_renewal:
                    self._put(self._too_late(exc))
                    return
                self._deadline = now + self.plan.timeouts["connect"]
                self._over.wait(REDIAL)
                continue
            except (CertificateError, ProtocolError) as exc:
                self._put(exc)
                return
            except _Stopped:
                return
            except OSError as exc:
                # Who only waits inside the relay for the other owner was not refused.
                if attempt != self._connect_through_relay:
                    self._refused[peer] = str(exc)
                logger.debug("%s: %s", self.plan.parties[peer].title, exc)
                self._over.wait(REDIAL)
                continue
            except Exception as exc:
                self._put(exc)
                return
            self._put(connection)
            self._redial[peer].wait()
            self._redial[peer].clear()
            self._over.wait(REDIAL)

    def _too_late(self, exc):
        """The error where a party stays at an earlier session."""
        days = self._days_before()
        within = f"{days} day{'s'[: days != 1]}"
        return PeerTimeoutError(
            f"{self.plan.parties[exc.culprit].title} did not come within {within}: "
            "it is still at an earlier session of the row; see its own log, and go on "
            "with --resume at all parties when it is done with that one",
            exc.culprit,
        )

    def _put(self, event):
        """Hand a connection, or an error, to the thread that holds the meeting."""
        with self._lock:
            if not self._over.is_set():
                self._events.put(event)
                return
        if isinstance(event, tls.TLSSocket):
            event.close()

    def _connect_to(self, party, purpose=tls.LINK):
        sock = self._dial(party)
        return tls.handshake(
            sock,
            self.identity,
            {party.fingerprint: party},
            purposes=(purpose,),
            server=False,
            others=self.plan.parties.values(),
            check=self._check,
            place=self.plan.place,
        )

    def _dial(self, party):
        """A socket connected to one of the addresses that a party's name has.

        Each attempt begins with another of them: one that answers need not be the one
        where the party listens, and one that does not must not take all of the time.
        """
        problems = []
        try:
            found = socket.getaddrinfo(*party.address, type=socket.SOCK_STREAM)
        except OSError as exc:
            found, problems = [], [(party.address[0], exc.strerror or str(exc))]
        first = self._dialled[party.pid] % max(len(found), 1)
        self._dialled[party.pid] += 1
        for family, kind, protocol, _, address in found[first:] + found[:first]:
            sock = None
            try:
                sock = socket.socket(family, kind, protocol)
                sock.settimeout(max(DIAL_TIMEOUT / len(found), ADDRESS_TIMEOUT))
                sock.connect(address)
                return sock
            except OSError as exc:
                problems.append((address[0], exc.strerror or str(exc)))
                if sock is not None:
                    sock.close()
            self._check()
        # One reason, unless they differ from address to address.
        reasons = {problem for _, problem in problems}
        if len(reasons) > 1:
            reasons = [f"{host}: {problem}" for host, problem in problems]
        raise OSError(
            f"{party.title} could not be reached at {party.endpoint} "
            f"({'; '.join(reasons)})"
        )

    def _connect_through_relay(self, party):
        outer = self._connect_to(self.plan.parties[HELPER], tls.RELAY)
        inner, pump = tunnel(outer)
        connection = tls.handshake(
            inner,
            self.identity,
            {party.fingerprint: party},
            purposes=(tls.LINK,),
            server=self.party.pid == STATIC,
            deadline=self._deadline,
            others=self.plan.parties.values(),
            check=self._check,
            place=self.plan.place,
        )
        connection.on_close = lambda: pump.join(10)
        return connection

    def _check(self):
        if self._over.is_set():
            raise _Stopped

    # -- being dialled, in threads ---------------------------------------

    def _open_listener(self):
        """Listen where this party was told to, else on all addresses of this machine.

        What its name means on the machine itself may be an address that nobody else
        can reach, as the loopback address in Debian's hosts file.
        """
        if self._listen:
            host, port = self._listen
            where = "%s:%d" % self._listen
        else:
            host, port = None, self.party.address[1]
            where = f"port {port} of all addresses of this machine"
        try:
            listener = self._bind(host, port)
        except OSError as exc:
            if exc.errno == errno.EADDRINUSE:
                remedy = "another program uses this port: end it, or add --listen"
                remedy += " with another, to which a firewall forwards"
            elif exc.errno == errno.EACCES:
                remedy = "ports below 1024 need privileges: agree on another"
            else:
                remedy = (
                    "--listen takes an address of this machine itself; leave it out to "
                    "listen on all of them"
                )
            reason = exc.strerror or exc
            if (exc.errno or 0) > 0:
                reason = os.strerror(exc.errno)
            raise SessionFileError(
                f"cannot listen on {where} ({reason}); {remedy}"
            ) from None
        logger.info("Listening on %s", where)
        return listener

    def _bind(self, host, port):
        if host is None:
            found = [(socket.AF_INET, ("", port))]
            if socket.has_dualstack_ipv6():
                found.insert(0, (socket.AF_INET6, ("", port)))
        else:
            found = [
                (family, address)
                for family, *_, address in socket.getaddrinfo(
                    host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
                )
            ]
        for n, (family, address) in enumerate(found, 1):
            try:
                return socket.create_server(
                    address,
                    family=family,
                    backlog=MAX_GREETINGS,
                    dualstack_ipv6=host is None and family == socket.AF_INET6,
                )
            except OSError as exc:
                # A machine may know of IPv6 and have no address of the kind.
                absent = exc.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
                if not absent or n == len(found):
                    raise

    def _answer(self, callers):
        numbers = itertools.count(1)
        while not self._over.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                if self._over.wait(0.1):
                    return
                continue
            host = _host(address)
            with self._lock:
                if len(self._greetings) >= MAX_GREETINGS:
                    self._send_one_away()
                self._greetings[sock] = host
            self._start(self._greet, sock, host, callers, next(numbers))

    def _send_one_away(self):
        """Make room: idle strangers must not keep out those who are expected."""
        crowds = {sock: _network(host) for sock, host in self._greetings.items()}
        largest = Counter(crowds.values()).most_common(1)[0][0]
        sock = next(s for s, crowd in crowds.items() if crowd == largest)
        del self._greetings[sock]
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # its own thread closes it

    def _greet(self, sock, host, callers, number):
        parties = self.plan.parties
        purposes = [tls.LINK]
        if self.party.pid == HELPER and self.plan.relayed:
            purposes.append(tls.RELAY)
        try:
            connection = tls.handshake(
                sock,
                self.identity,
                {parties[p].fingerprint: parties[p] for p in callers},
                purposes=purposes,
                server=True,
                others=parties.values(),
                check=self._check,
                place=self.plan.place,
            )
            connection.accepted = number
            with self._lock:
                # From here on it is none of those that give way to others.
                self._greetings.pop(sock, None)
            if host == self._stranger:  # at last it was let in
                self._forget_refused(None)
            self._put(connection)
        except _Stopped:
            pass
        except OutOfStepError as exc:
            if exc.ahead:  # a party of this session, by its certificate
                self._put(exc)
            elif exc.culprit is None:
                self._note_refused(None, host, exc)
            logger.debug("%s: %s", host, exc)
        except Exception as exc:  # whatever a stranger may cause ends here
            reason = self._note_refused(getattr(exc, "culprit", None), host, exc)
            # Scanners of a network connect and go away again: not worth a warning.
            told, self._warned = self._warned, reason
            serious = isinstance(exc, CertificateError) and told != reason
            level = logging.WARNING if serious else logging.DEBUG
            logger.log(level, "Refused a connection from %s", reason)
        finally:
            with self._lock:
                self._greetings.pop(sock, None)

    def _note_refused(self, who, host, exc):
        """Remember why a connection that was accepted came to nothing.

        Those that only went away again, as scanners do, do not replace others: where
        one party alone dials, they pass for it.
        """
        reason = f"{host}: {exc}"
        with self._lock:
            if not isinstance(exc, (PeerLostError, PeerTimeoutError)):
                self._spoke.add(who)
            elif who in self._spoke:
                return reason
            self._refused[who] = reason
            if who is None:
                self._stranger = host
        return reason

    def _forget_refused(self, who):
        with self._lock:
            self._refused.pop(who, None)
            self._spoke.discard(who)


def _host(address):
    """The host of a socket's address; IPv4 as such, even through an IPv6 socket."""
    try:
        host = ipaddress.ip_address(address[0])
    except ValueError:  # with the scope of a link-local address, for example
        return address[0]
    return str(getattr(host, "ipv4_mapped", None) or host)


def _network(host):
    """What one site may have of addresses at will: with IPv6 half of the bits."""
    try:
        host = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return host
    return ipaddress.ip_network((host, 64), strict=False)


def missing_text(missing, left):
    """Who is waited for and how long, for people."""
    names = ", ".join(party.title.removeprefix("the ") for party in missing)
    left = max(int(left), 0)
    return f"Waiting for {names}: {left // 60}:{left % 60:02d} left"
