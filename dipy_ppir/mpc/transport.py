"""Typed, length-capped frames between parties, without threads.

Each pair of parties shares one stream socket. A frame is a 24-byte header and
a payload::

    magic "PP" | version | kind | operation (4) | sequence (8) | length (8)

`kind` says what the payload is; nothing a peer sends is ever unpickled or
evaluated. `operation` is a checksum of the name of the protocol step, so that
parties that have fallen out of step notice at the first frame. `sequence`
counts the frames of one direction.

The receiver knows how long the payload must be and reads it straight into the
destination array; a frame of any other length ends the session. While a party
waits for one peer it also watches the others, so the death of any party ends
every wait at once. Whoever waits for long tells the others for whom, so that they do
not take its silence for its fault.
"""

from collections import deque
import contextlib
import ipaddress
import json
import math
import select
import socket
import struct
import time
import zlib

from dipy_ppir.mpc.errors import (
    CertificateError,
    InsecureSetupError,
    PeerAbortedError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.ledger import ROLES

_HEADER = struct.Struct("<2sBBIQQ")
_MAGIC, _VERSION = b"PP", 1
DATA, JSON, MPYC, ABORT, BYE, WAITING = 1, 2, 3, 4, 5, 6

#: Largest payload of one frame, by kind; larger arrays travel in several.
MAX_PAYLOAD = {
    DATA: 1 << 24,
    JSON: 1 << 20,
    MPYC: 1 << 24,
    ABORT: 1 << 10,
    BYE: 0,
    WAITING: 1,
}
#: Most bytes kept for a peer that runs ahead while this party is sending.
MAX_BACKLOG = 1 << 28
#: Seconds that the last word to a peer may take.
LAST_WORD = 2.0
#: Seconds, and part of the time-out, after which a party says that it waits.
PATIENCE, PATIENCE_PART = 5.0, 1 / 8
#: Most of these that are read at once.
MAX_NOTICES = 64
#: Bytes of an unfinished frame that must arrive within the time-out: who sends less
#: stalls.
LEAST_PROGRESS = 1 << 18
#: Metadata with deeper nesting is refused: code that walks it calls itself.
MAX_NESTING = 16
#: What keeping a frame costs beside its payload.
_FRAME_COST = 512

# Reasons that may cross the network: fixed words, never text made from data.
REASONS = {
    1: "it stopped because of an error on its side",
    2: "it lost another party",
    3: "it was interrupted",
    4: "another party ended it",
    5: "another party did not follow the protocol",
    7: "what the parties compute differs",
}
#: Reason to leave a meeting: another program with the same key came.
REPLACED = 6

_HANGUP = select.POLLHUP | select.POLLERR | select.POLLNVAL
_RDHUP = getattr(select, "POLLRDHUP", 0)


def operation_code(name):
    """Checksum of the name of a protocol step."""
    return zlib.crc32(name.encode())


def _check_loopback(sock):
    try:
        host = sock.getpeername()[0].partition("%")[0]
    except OSError:
        return  # gone already; the first use says so
    address = ipaddress.ip_address(host)
    if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
        raise InsecureSetupError(
            f"an unencrypted connection to {host} would leave this machine; use a "
            "session file, which connects by TLS"
        )


def _ended(link, patience=1.0):
    """Whether the other end closes the link within so many seconds.

    What it sent before is kept in the inbox: unread it would hide the end.
    """
    if link.sock.fileno() < 0:
        return False
    poller = select.poll()
    poller.register(link.sock.fileno(), select.POLLIN | _RDHUP)
    deadline = time.monotonic() + patience
    while True:
        try:
            while link.pump() is not None:
                if link.inbox and link.inbox[-1].kind == ABORT:
                    return True
        except (EOFError, PeerError):
            return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        poller.poll(left * 1000)


def _parse(raw):
    """Public metadata from JSON; ValueError for what no party of ours sends."""
    parsed = json.loads(raw)
    level = [parsed]
    for _ in range(MAX_NESTING):
        below = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, float) and not math.isfinite(value):
                raise ValueError
        if not below:
            return parsed
        level = below
    raise ValueError


class _Frame:
    """A frame being received, or received and not yet asked for."""

    __slots__ = ("kind", "op", "body", "filled", "posted")

    def __init__(self, kind, op, body, posted):
        self.kind, self.op, self.body, self.posted = kind, op, body, posted
        self.filled = 0

    @property
    def complete(self):
        return self.filled == len(self.body)


class Link:
    """The connection to one peer: framing, in both directions.

    Parameters
    ----------
    sock : socket or TLSSocket
        connected stream socket; it becomes non-blocking. Without TLS it must stay
        on this machine.
    peer : int
        the party at the other end.

    Raises
    ------
    InsecureSetupError
        if the connection would leave this machine unencrypted.
    """

    def __init__(self, sock, peer):
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _check_loopback(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.peer = sock, peer
        #: The link whose other end passes on this one's bytes, if any.
        self.carrier = None
        self.name = f"party {peer} ({ROLES[peer]})"
        self.inbox = deque()
        self.backlog = 0
        self.posted = None
        #: What is left of the frame that is being sent.
        self.unsent = []
        # Whether `unsent` is out of date: an interrupt would leave it so.
        self._torn = False
        #: For whom the peer waits, as it says.
        self.waits_for = frozenset()
        # Whether the peer has said that it is done, and this party its last word.
        self.finished = self.said_last = False
        self.awaited = False
        self._header, self._header_filled = bytearray(_HEADER.size), 0
        self._frame = None
        self._sent = self._received = 0
        #: Bytes received, to notice a peer that stalls.
        self.bytes_in = 0

    def begin_frame(self, kind, op, payload):
        """Put a frame behind what is still unsent."""
        self._torn = True
        head = _HEADER.pack(_MAGIC, _VERSION, kind, op, self._sent, len(payload))
        self._sent += 1
        if len(payload) < 64:
            self.unsent.append(memoryview(head + bytes(payload)))
        else:
            self.unsent += [memoryview(head), payload]
        self._torn = False

    def send_some(self):
        """Send of the unsent bytes what can be sent at once; returns how many.

        Raises
        ------
        BlockingIOError
            if that is nothing.
        """
        parts = self.unsent
        self._torn = True
        try:
            n = left = self.sock.sendmsg(parts)
        except (BlockingIOError, InterruptedError):
            self._torn = False
            raise BlockingIOError from None
        while parts and left >= len(parts[0]):
            left -= len(parts[0])
            del parts[0]
        if left:
            parts[0] = parts[0][left:]
        self._torn = False
        return n

    def say_last(self, kind, payload):
        """Put the last frame behind what is still unsent, unless that is unsure.

        In the middle of a frame it would be taken for a part of it.
        """
        if self._torn:
            self.unsent.clear()
        elif not self.said_last:
            self.begin_frame(kind, 0, payload)
        self.said_last = True

    def flush(self):
        """Send what can be sent at once; if that is all, say that nothing follows."""
        while self.unsent:
            try:
                self.send_some()
            except BlockingIOError:
                return False
        self.sock.shutdown(socket.SHUT_WR)
        return True

    def discard(self):
        """Throw away what has arrived; whether that was all that ever will."""
        scratch = bytearray(1 << 16)
        for _ in range(64):
            try:
                if not self.sock.recv_into(memoryview(scratch)):
                    return True
            except (BlockingIOError, InterruptedError):
                return False
        return False

    def finish_frame(self, deadline):
        """Try to send the rest of a frame until `deadline`; whether all of it is."""
        while self.unsent:
            try:
                self.send_some()
            except BlockingIOError:
                poller = select.poll()
                poller.register(self.sock.fileno(), select.POLLOUT)
                left = deadline - time.monotonic()
                if left <= 0 or not poller.poll(left * 1000):
                    return False
            except OSError:
                return False
        return True

    def _open_frame(self):
        magic, version, kind, op, sequence, length = _HEADER.unpack(self._header)
        self._header_filled = 0
        if magic != _MAGIC or version != _VERSION:
            raise ProtocolError(
                f"{self.name} does not speak this protocol; check that every party "
                "runs the same version of dipy_ppir",
                self.peer,
            )
        if length > MAX_PAYLOAD.get(kind, -1):
            raise ProtocolError(
                f"{self.name} announced a frame of unknown kind or size", self.peer
            )
        if sequence != self._received:
            raise ProtocolError(
                f"{self.name} sent a frame out of order or twice", self.peer
            )
        self._received += 1
        if kind == WAITING:
            # Not progress: it must not extend anybody's time.
            self.bytes_in -= _HEADER.size + length
            self._frame = _Frame(kind, op, memoryview(bytearray(length)), False)
            return
        posted = self.posted
        if posted and kind == DATA and op == posted[0] and not self.inbox:
            if len(posted[1]) != length:
                raise ProtocolError(
                    f"{self.name} sent {length} bytes where {len(posted[1])} were due",
                    self.peer,
                )
            self.posted = None
            self._frame = _Frame(kind, op, posted[1], True)
        else:
            # A frame without payload fills memory as well.
            self.backlog += length + _FRAME_COST
            if self.backlog > MAX_BACKLOG:
                raise ProtocolError(
                    f"{self.name} sends more than it was asked for", self.peer
                )
            self._frame = _Frame(kind, op, memoryview(bytearray(length)), False)

    def pump(self, once=True):
        """Read what has arrived; return the frame completed, if any.

        Raises
        ------
        EOFError
            if the peer closed the connection.
        """
        notices = 0
        try:
            while True:
                if self._frame is None:
                    view = memoryview(self._header)[self._header_filled :]
                    n = self.sock.recv_into(view)
                    if n == 0:
                        raise EOFError
                    self.bytes_in += n
                    self._header_filled += n
                    if self._header_filled < _HEADER.size:
                        continue
                    self._open_frame()
                frame = self._frame
                while not frame.complete:
                    n = self.sock.recv_into(frame.body[frame.filled :])
                    if n == 0:
                        raise EOFError
                    self.bytes_in += n
                    frame.filled += n
                self._frame = None
                if frame.kind == WAITING:
                    mask = int.from_bytes(frame.body)
                    self.waits_for = frozenset(p for p in ROLES if mask >> p & 1)
                    # Go on to what is behind, but not for ever.
                    notices += 1
                    if self.ready or notices < MAX_NOTICES:
                        continue
                    return None
                self.waits_for = frozenset()
                if not frame.posted:
                    self.inbox.append(frame)
                return frame
        except (BlockingIOError, InterruptedError):
            return None
        except PeerError:
            raise  # a ConnectionError too, but one that says more
        except OSError as exc:
            raise EOFError from exc

    @property
    def ready(self):
        """Whether bytes wait inside TLS, where polling does not show them."""
        pending = getattr(self.sock, "pending", None)
        return pending is not None and pending() > 0

    def pop(self):
        """Take the oldest frame out of the inbox."""
        frame = self.inbox.popleft()
        self.backlog -= len(frame.body) + _FRAME_COST
        return frame


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
    """

    def __init__(self, links, timeout, ledger):
        self.links = links
        self.timeout = timeout
        self.ledger = ledger
        self.closed = False
        # This party: the one without a link, once there is one to all others.
        own = set(ROLES) - set(links)
        self._own = own if len(own) == 1 else set()
        self._waiting_for = ()

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
        self.ledger().record_sent(peer, len(payload), _HEADER.size)

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
        mask = bytes([sum(1 << peer for peer in awaited)])
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
            return _parse(bytes(frame.body))
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
            poller.register(fd, (select.POLLIN if other in links else 0) | _RDHUP)
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
                elif event & (_HANGUP | _RDHUP):
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
        reason, culprit = 1, None
        if len(frame.body) == 2:
            reason, culprit = frame.body[0], frame.body[1]
        words = REASONS.get(reason, REASONS[1])
        if reason == 2 and culprit in self._own:
            awaited = [other for other in self._waiting_for if other is not link]
            if awaited:
                self._timed_out(awaited, f"until {link.name} gave up")
            raise PeerLostError(
                f"{link.name} lost the connection to this party, or heard nothing from "
                "it for too long; check the network, or raise the time-out, and rerun "
                "or resume the session",
                link.peer,
            )
        if culprit in ROLES and culprit != link.peer:
            name = f"party {culprit} ({ROLES[culprit]})"
            if reason == 2:
                raise PeerLostError(
                    f"{name} is gone, says {link.name}; start it again and rerun or "
                    "resume the session",
                    culprit,
                )
            if reason == 5:
                raise PeerAbortedError(
                    f"{name} sent what the protocol does not allow, says {link.name}; "
                    "see the logs of both, and check that all parties run the same "
                    "version",
                    culprit,
                )
            if reason == 4:
                raise PeerAbortedError(
                    f"{name} ended the computation, says {link.name}; see its own log "
                    "for the cause",
                    culprit,
                )
        raise PeerAbortedError(
            f"{link.name} ended the computation: {words}; see its own log for the "
            "cause",
            None if reason == 7 else link.peer,
        )

    def _lost(self, link):
        """Raise the best explanation of why `link` is closed."""
        if link.carrier is not None and _ended(link.carrier):
            link = link.carrier
        try:
            while link.pump() is not None:
                if link.inbox and link.inbox[-1].kind == ABORT:
                    self._aborted(link, link.inbox[-1])
        except (EOFError, ProtocolError, CertificateError):
            pass
        for frame in link.inbox:
            if frame.kind == ABORT:
                self._aborted(link, frame)
        # Who dies takes the others along; which was first cannot be told from here.
        also = "".join(
            f", and so did {other.name}"
            for other in self.links.values()
            if other is not link and other.carrier is not link and self._gone(other)
        )
        raise PeerLostError(
            f"{link.name} closed the connection or died{also}; see its own log, start "
            "it again and rerun or resume the session",
            link.peer,
        ) from None

    def _gone(self, link):
        """Whether a party has ended as well, and without a word."""
        if link.finished or not _ended(link, 0):
            return False
        with contextlib.suppress(EOFError, PeerError):
            while link.pump() is not None:
                pass
        return all(frame.kind not in (ABORT, BYE) for frame in link.inbox)

    def _timed_out(self, links, until=None):
        until = until or f"for {self.timeout:g} s"
        # Who waits for somebody else has told so, and is not to blame.
        blamed = {link.peer for link in links if not link.waits_for - self._own}
        if not blamed:
            blamed = set().union(*(link.waits_for for link in links)) - self._own
            others = " and ".join(link.name for link in links)
            until += f", and {others} waits for it"
        names = " and ".join(f"party {p} ({ROLES[p]})" for p in sorted(blamed))
        raise PeerTimeoutError(
            f"{names} said nothing, or hardly anything, {until}; check that it still "
            "runs and can be reached, or raise the time-out",
            min(blamed),
        )

    def abort(self, reason=1, culprit=None):
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
