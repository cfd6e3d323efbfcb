"""A link: the connection to one peer, over which frames go in both directions.

The socket never blocks. What is sent waits in `Link.unsent` until the operating
system takes it. What arrives is checked header by header; a payload that is waited
for is read straight into the array it is for, any other is kept, up to
`MAX_BACKLOG`. For which peers a party waits, and how long, is up to `network`.
"""

from collections import deque
import ipaddress
import select
import socket
import time

from dipy_ppir.mpc.errors import InsecureSetupError, PeerError, ProtocolError
from dipy_ppir.mpc.frame import (
    ABORT,
    DATA,
    HEADER,
    MAGIC,
    MAX_PAYLOAD,
    VERSION,
    WAITING,
    Frame,
)
from dipy_ppir.mpc.ledger import MOST_PARTIES, ROLES

#: Most bytes kept for a peer that runs ahead while this party is sending.
MAX_BACKLOG = 1 << 28
#: Most notices of waiting that are read at once.
MAX_NOTICES = 64
#: What keeping a frame costs beside its payload.
_FRAME_COST = 512
#: Event of a poll: the other end sends nothing more; not on every system.
RDHUP = getattr(select, "POLLRDHUP", 0)


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


class Link:
    """The connection to one peer: framing, in both directions.

    Parameters
    ----------
    sock : socket or TLSSocket
        connected stream socket; it becomes non-blocking. Without TLS it must stay
        on this machine.
    peer : int
        the party at the other end.
    name : str, optional
        what messages call it; by default its number and role.

    Raises
    ------
    InsecureSetupError
        if the connection would leave this machine unencrypted.
    """

    def __init__(self, sock, peer, name=None):
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _check_loopback(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.peer = sock, peer
        #: The link whose other end passes on this one's bytes, if any.
        self.carrier = None
        self.name = name or f"party {peer} ({ROLES[peer]})"
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
        self._header, self._header_filled = bytearray(HEADER.size), 0
        self._frame = None
        self._sent = self._received = 0
        #: Bytes received, to notice a peer that stalls.
        self.bytes_in = 0

    def begin_frame(self, kind, op, payload):
        """Put a frame behind what is still unsent."""
        self._torn = True
        head = HEADER.pack(MAGIC, VERSION, kind, op, self._sent, len(payload))
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
        ConnectionResetError
            without trying, if the other end of TLS sends nothing more, or this one is
            closed.
        """
        if self._tls_ended:
            raise ConnectionResetError
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
        magic, version, kind, op, sequence, length = HEADER.unpack(self._header)
        self._header_filled = 0
        if magic != MAGIC or version != VERSION:
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
            self.bytes_in -= HEADER.size + length
            self._frame = Frame(kind, op, memoryview(bytearray(length)), False)
            return
        posted = self.posted
        if posted and kind == DATA and op == posted[0] and not self.inbox:
            if len(posted[1]) != length:
                raise ProtocolError(
                    f"{self.name} sent {length} bytes where {len(posted[1])} were due",
                    self.peer,
                )
            self.posted = None
            self._frame = Frame(kind, op, posted[1], True)
        else:
            # A frame without payload fills memory as well.
            self.backlog += length + _FRAME_COST
            if self.backlog > MAX_BACKLOG:
                raise ProtocolError(
                    f"{self.name} sends more than it was asked for", self.peer
                )
            self._frame = Frame(kind, op, memoryview(bytearray(length)), False)

    def pump(self):
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
                    if self._header_filled < HEADER.size:
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
                    everybody = range(MOST_PARTIES)
                    self.waits_for = frozenset(p for p in everybody if mask >> p & 1)
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

    def read_to_end(self, patience=1.0):
        """Whether the other end closes the link, or says why, within so many seconds.

        What it sent before is kept in the inbox: unread it would hide the end.

        Raises
        ------
        PeerError
            if what it sent is not allowed.
        """
        if self.sock.fileno() < 0:
            return False
        poller = select.poll()
        poller.register(self.sock.fileno(), select.POLLIN | RDHUP)
        deadline, late = time.monotonic() + patience, 0
        while late < MAX_NOTICES:
            try:
                while self.pump() is not None:
                    if self.inbox and self.inbox[-1].kind == ABORT:
                        return True
            except EOFError:
                return True
            left = max(deadline - time.monotonic(), 0)
            if not poller.poll(left * 1000):
                return False
            # TLS has records without content, behind which there is more.
            late += left == 0
        return False

    def ended(self, patience=1.0):
        """The same, whatever it sent; what is not allowed is an end as well."""
        try:
            return self.read_to_end(patience)
        except PeerError:
            return True

    @property
    def _tls_ended(self):
        """Whether what arrives over TLS has come to its end, read or unread."""
        ended = getattr(self.sock, "ended", None)
        return ended is not None and ended()

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
