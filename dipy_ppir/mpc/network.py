"""The network: one party's links to all others.

Arrays, public metadata and MPyC's messages are sent and received in step with the
protocol, without threads, and counted in the ledger.

The receiver knows how long a payload must be; a frame of any other length ends the
session. While a party waits for one peer it also watches the others, so the death of
any party ends every wait at once. Whoever waits for long tells the others for whom,
so that they do not take its silence for its fault.
"""

from collections import deque
import contextlib
import json
import select
import socket
import time

from dipy_ppir.mpc.errors import (
    PeerAbortedError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.frame import (
    ABORT,
    BYE,
    DATA,
    ENDED,
    ERROR,
    HEADER,
    JSON,
    LOST,
    MAX_PAYLOAD,
    MISMATCH,
    MPYC,
    REASONS,
    VIOLATION,
    WAITING,
    operation_code,
    parse_metadata,
)
from dipy_ppir.mpc.ledger import ROLES
from dipy_ppir.mpc.link import MAX_BACKLOG, RDHUP

#: Seconds that the last word to a peer may take.
LAST_WORD = 2.0
#: Seconds, and part of the time-out, after which a party says that it waits.
PATIENCE, PATIENCE_PART = 5.0, 1 / 8
#: Bytes of an unfinished frame that must arrive within the time-out: who sends less
#: stalls.
LEAST_PROGRESS = 1 << 18

_HANGUP = select.POLLHUP | select.POLLERR | select.POLLNVAL


def _said(link, kind):
    """The first frame of a kind in a link's inbox, or None."""
    return next((frame for frame in link.inbox if frame.kind == kind), None)


def _reason(frame):
    """Reason of an `ABORT`, and the number of who is to blame, or of nobody."""
    if len(frame.body) == 2:
        return frame.body[0], frame.body[1]
    return ERROR, None


class _Wait:
    """A wait for peers: it has an end, and the others get to know of it."""

    def __init__(self, network, links):
        self._network, self.links, self._told = network, links, False
        self.renew()

    def renew(self):
        """Start again: there was progress."""
        timeout = self._network.timeout
        now = time.monotonic()
        self._deadline = now + timeout
        self._tell_at = now + min(PATIENCE, PATIENCE_PART * timeout)

    def poll(self, poller):
        """Wait for events; there may be none for a while yet."""
        now = time.monotonic()
        if not self._told and now >= self._tell_at:
            self._told = True
            self._network._tell(self.links, {link.peer for link in self.links})
        until = self._deadline if self._told else self._tell_at
        return poller.poll(max(until - now, 0) * 1000)

    def check(self):
        """Raise PeerTimeoutError if the time is over."""
        if time.monotonic() >= self._deadline:
            self._network._timed_out(self.links)

    def end(self):
        """What was waited for has come."""
        if self._told:
            self._network._tell(self.links, set())


class Network:
    """This party's links to all others.

    Parameters
    ----------
    links : dict
        maps party numbers to `Link`.
    timeout : float
        longest silence, in seconds, of a party that is waited for.
    ledger : callable
        returns the `Ledger` that counts the traffic.
    roles : dict, optional
        maps the numbers of all parties, this one's as well, to what they are called.
    """

    #: What all parties are to do once a lost one is there again.
    again = "rerun or resume the session"

    def __init__(self, links, timeout, ledger, roles=ROLES):
        self.links = links
        self.timeout = timeout
        self.ledger = ledger
        self.closed = False
        # This party: the one without a link, once there is one to all others.
        own = set(roles) - set(links)
        self._own = own if len(own) == 1 else set()
        self._waiting_for = ()
        self._roles = roles

    def name_of(self, peer):
        """What messages call a party."""
        if peer in self.links:
            return self.links[peer].name
        return f"party {peer} ({self._roles[peer]})"

    # -- sending ---------------------------------------------------------

    def send(self, peer, name, array):
        """Send a contiguous array for the protocol step `name`.

        Returns when the operating system has taken all of it, so the array may
        be reused. What peers send meanwhile is kept, up to `MAX_BACKLOG`.
        """
        view = memoryview(array).cast("B")
        op = operation_code(name)
        limit = MAX_PAYLOAD[DATA]
        for start in range(0, max(len(view), 1), limit):
            self._send_frame(peer, DATA, op, view[start : start + limit])

    def send_json(self, peer, name, obj):
        """Send public metadata as JSON."""
        payload = json.dumps(obj).encode()
        self._send_frame(peer, JSON, operation_code(name), memoryview(payload))

    def send_mpyc(self, peer, batch):
        """Send a batch of MPyC's messages (bytes), of any length."""
        limit = MAX_PAYLOAD[MPYC]
        # A frame that is not full is the last one.
        for start in range(0, len(batch) + 1, limit):
            part = memoryview(batch)[start : start + limit]
            self._send_frame(peer, MPYC, 0, part)

    def _send_frame(self, peer, kind, op, payload):
        link = self.links[peer]
        link.begin_frame(kind, op, payload)
        wait, taken = None, 0
        while link.unsent:
            try:
                taken += link.send_some()
            except BlockingIOError:
                if wait is None:
                    wait = self._begin_wait([link])
                # What peers send meanwhile does not extend the time.
                elif taken >= LEAST_PROGRESS:
                    wait.renew()
                    taken = 0
                self._wait_writable(link, wait)
            except PeerError:
                raise
            except OSError:
                self._lost(link)
        if wait is not None:
            self._end_wait(wait)
        self.ledger().record_sent(peer, len(payload), HEADER.size)

    def _wait_writable(self, link, wait):
        poller = select.poll()
        by_fd = {
            other.sock.fileno(): other
            for other in self.links.values()
            if other is link or not other.finished
        }
        for fd, other in by_fd.items():
            poller.register(
                fd, select.POLLIN | (select.POLLOUT if other is link else 0)
            )
        for fd, event in wait.poll(poller):
            if event & (select.POLLIN | _HANGUP):
                self._pump(by_fd[fd])
        wait.check()

    def _begin_wait(self, links):
        self._waiting_for = links
        return _Wait(self, links)

    def _end_wait(self, wait):
        self._waiting_for = ()
        wait.end()

    def _tell(self, links, awaited):
        """Tell all but `links` for whom this party waits. Not in the ledger."""
        mask = sum(1 << peer for peer in awaited)
        mask = mask.to_bytes(max(self._roles) // 8 + 1)
        for link in self.links.values():
            if link in links or link.finished or link.unsent:
                continue
            link.begin_frame(WAITING, 0, mask)
            # What does not go now goes with the next frame; who is gone is noticed.
            with contextlib.suppress(OSError):
                link.send_some()

    # -- receiving -------------------------------------------------------

    def receive(self, peer, name, out):
        """Receive the array for step `name` straight into `out`."""
        self.receive_all({peer: out}, name)

    def receive_all(self, arrays, name):
        """Receive from several peers at once.

        Parameters
        ----------
        arrays : dict
            maps party numbers to the contiguous array to fill, or to a list of arrays
            that were sent one after the other.
        name : str
            the protocol step.
        """
        op = operation_code(name)
        limit = MAX_PAYLOAD[DATA]
        pending = {}
        for peer, given in arrays.items():
            pending[peer] = deque()
            for array in given if isinstance(given, list) else [given]:
                view = memoryview(array).cast("B")
                for start in range(0, max(len(view), 1), limit):
                    pending[peer].append(view[start : start + limit])
        self.ledger().record_round()
        while True:
            for peer, parts in list(pending.items()):
                link = self.links[peer]
                while parts and link.inbox:
                    frame = self._take(link, DATA, op)
                    if len(frame.body) != len(parts[0]):
                        raise ProtocolError(
                            f"{link.name} sent {len(frame.body)} bytes where "
                            f"{len(parts[0])} were due",
                            peer,
                        )
                    parts.popleft()[:] = frame.body
                if not parts:
                    del pending[peer]
            if not pending:
                return
            for peer, parts in pending.items():
                self.links[peer].posted = (op, parts[0])
            for link, frame in self._wait_frames([self.links[p] for p in pending]):
                if frame.posted:
                    pending[link.peer].popleft()
            for peer in pending:
                self.links[peer].posted = None

    def receive_json(self, peer, name):
        """Receive public metadata; the caller checks what it means."""
        link = self.links[peer]
        self.ledger().record_round()
        while not link.inbox:
            self._wait_frames([link])
        frame = self._take(link, JSON, operation_code(name))
        try:
            return parse_metadata(bytes(frame.body))
        except (ValueError, RecursionError):
            raise ProtocolError(f"{link.name} sent malformed metadata", peer) from None

    def receive_mpyc(self, peers):
        """Receive a batch of MPyC's messages from each of several peers.

        Returns
        -------
        batches : dict
            maps party numbers to bytes.
        """
        self.ledger().record_round()
        batches = {}
        for peer in peers:
            link, batch = self.links[peer], bytearray()
            while True:
                while not link.inbox:
                    self._wait_frames([link])
                body = self._take(link, MPYC, 0).body
                batch += body
                if len(batch) > MAX_BACKLOG:
                    raise ProtocolError(
                        f"{link.name} sends more than it was asked for", peer
                    )
                if len(body) < MAX_PAYLOAD[MPYC]:
                    break
            batches[peer] = memoryview(batch)
        return batches

    def _take(self, link, kind, op):
        frame = link.inbox[0]
        if frame.kind == ABORT:
            self._aborted(link, frame)
        if frame.kind != kind or frame.op != op:
            raise ProtocolError(
                f"{link.name} is at another step of the protocol; check that all "
                "parties run the same operation with the same version",
                link.peer,
            )
        return link.pop()

    def _wait_frames(self, links):
        """Wait until a frame from one of `links` is complete."""
        poller = select.poll()
        by_fd = {}
        for other in self.links.values():
            if other.finished and other not in links:
                continue
            fd = other.sock.fileno()
            by_fd[fd] = other
            poller.register(fd, (select.POLLIN if other in links else 0) | RDHUP)
        for link in self.links.values():
            link.awaited = link in links
        wait = self._begin_wait(links)
        seen = sum(link.bytes_in for link in links)
        done = []
        for link in links:
            if link.ready:
                frame = self._pump(link)
                if frame is not None:
                    done.append((link, frame))
        while not done:
            for fd, event in wait.poll(poller):
                link = by_fd[fd]
                if link in links:
                    frame = self._pump(link)
                    if frame is not None:
                        done.append((link, frame))
                elif event & (_HANGUP | RDHUP):
                    # Gone: what it sent before says whether it was done.
                    while not link.finished:
                        self._pump(link)
                    poller.unregister(fd)
            if not done:
                now = sum(link.bytes_in for link in links)
                if now - seen >= LEAST_PROGRESS:
                    seen = now
                    wait.renew()
                wait.check()
        for link in links:
            link.awaited = False
        self._end_wait(wait)
        return done

    def _pump(self, link):
        try:
            return link.pump()
        except EOFError:
            if link.inbox and link.inbox[-1].kind == BYE and not link.awaited:
                link.finished = True
                return None
            self._lost(link)

    # -- failing ---------------------------------------------------------

    def _aborted(self, link, frame):
        reason, culprit = _reason(frame)
        words = REASONS.get(reason, REASONS[ERROR])
        if reason == LOST and culprit in self._own:
            awaited = [other for other in self._waiting_for if other is not link]
            if awaited:
                self._timed_out(awaited, f"until {link.name} gave up")
            raise PeerLostError(
                f"{link.name} lost the connection to this party, or heard nothing from "
                "it for too long; check the network, or raise the time-out, and "
                f"{self.again}",
                link.peer,
            )
        if culprit in self._roles and culprit != link.peer:
            name = self.name_of(culprit)
            if reason == LOST:
                raise PeerLostError(
                    f"{name} is gone, says {link.name}; start it again and "
                    f"{self.again}",
                    culprit,
                )
            if reason == VIOLATION:
                raise PeerAbortedError(
                    f"{name} sent what the protocol does not allow, says {link.name}; "
                    "see the logs of both, and check that all parties run the same "
                    "version",
                    culprit,
                )
            if reason == ENDED:
                raise PeerAbortedError(
                    f"{name} ended the computation, says {link.name}; see its own log "
                    "for the cause",
                    culprit,
                )
        raise PeerAbortedError(
            f"{link.name} ended the computation: {words}; see its own log for the "
            "cause",
            None if reason == MISMATCH else link.peer,
        )

    def _lost(self, link):
        """Raise the best explanation of why `link` is closed."""
        carrier = link.carrier
        if carrier is not None and carrier.ended() and not _said(carrier, BYE):
            link = carrier
        if not _said(link, ABORT):
            link.read_to_end()
        if frame := _said(link, ABORT):
            self._aborted(link, frame)
        # Who dies takes the others along; which was first cannot be told from here,
        # unless one of them said that it ended for a reason of its own.
        others = [other for other in self.links.values() if other is not link]
        gone = [other for other in others if self._gone(other)]
        said = {other: frame for other in others if (frame := _said(other, ABORT))}
        explained = {link.peer, *self._own, *(other.peer for other in said)}
        for other, frame in said.items():
            reason, culprit = _reason(frame)
            if reason != LOST or culprit not in explained:
                self._aborted(other, frame)
        also = "".join(
            f", and so did {other.name}" for other in gone if other.carrier is not link
        )
        raise PeerLostError(
            f"{link.name} closed the connection or died{also}; see its own log, start "
            f"it again and {self.again}",
            link.peer,
        ) from None

    def _gone(self, link):
        """Whether a party has ended as well, and without a word."""
        return (
            not link.finished
            and link.ended(0)
            and not _said(link, ABORT)
            and not _said(link, BYE)
        )

    def _timed_out(self, links, until=None):
        until = until or f"for {self.timeout:g} s"
        # Who waits for somebody else has told so, and is not to blame.
        others = set(self._roles) - self._own
        blamed = {link.peer for link in links if not link.waits_for & others}
        if not blamed:
            blamed = set().union(*(link.waits_for for link in links)) & others
            others = " and ".join(link.name for link in links)
            until += f", and {others} waits for it"
        names = " and ".join(map(self.name_of, sorted(blamed)))
        raise PeerTimeoutError(
            f"{names} said nothing, or hardly anything, {until}; check that it still "
            "runs and can be reached, or raise the time-out",
            min(blamed),
        )

    def abort(self, reason=ERROR, culprit=None):
        """Tell every peer that this party stops, then close. Never raises."""
        if self.closed:
            return
        self.closed = True
        payload = bytes([reason, 255 if culprit is None else culprit])
        for link in self.links.values():
            link.say_last(ABORT, payload)
        self._linger(time.monotonic() + LAST_WORD)
        for link in self.links.values():
            link.sock.close()

    def _linger(self, deadline):
        """Send the last words, and read until the others close as well.

        What arrives is thrown away; but unread it would make the system tell the other
        end that the connection is broken, and that end lose the last word.
        """
        poller = select.poll()
        by_fd = {link.sock.fileno(): link for link in self.links.values()}
        by_fd.pop(-1, None)
        for fd in by_fd:
            poller.register(fd, select.POLLIN | select.POLLOUT)
        while by_fd and (left := deadline - time.monotonic()) > 0:
            for fd, event in poller.poll(left * 1000):
                link = by_fd[fd]
                try:
                    if event & select.POLLOUT and link.flush():
                        poller.modify(fd, select.POLLIN)
                    if event & ~select.POLLOUT and link.discard():
                        raise EOFError
                except (OSError, EOFError):
                    poller.unregister(fd)
                    del by_fd[fd]

    def close(self):
        """Tell every peer that this party is done, and close the connections."""
        if self.closed:
            return
        self.closed = True
        deadline = time.monotonic() + LAST_WORD
        for link in self.links.values():
            link.say_last(BYE, b"")
            link.finish_frame(deadline)
            with contextlib.suppress(OSError):
                link.sock.shutdown(socket.SHUT_WR)
            link.sock.close()
