"""Carrying the owners' traffic where neither owner can be dialled.

Each owner dials the helper once more, and the helper passes on what arrives, byte by
byte. What the owners send is TLS between the two of them: the helper has neither of
their keys and sees lengths and times only, as anybody on the network does.
"""

import contextlib
import select
import socket
import threading
import time

from dipy_ppir.mpc.errors import PeerError

_BUFFER = 1 << 18
#: Seconds to deliver what is still on its way when one end has closed.
_LINGER = 5.0


class _Flow:
    """Bytes on their way from one end to the other; never more than a buffer."""

    def __init__(self, source, sink):
        self.source, self.sink = source, sink
        self.buffer = memoryview(bytearray(_BUFFER))
        self.start = self.stop = 0
        self.ended = False

    @property
    def empty(self):
        return self.start == self.stop

    def move(self):
        """Read if there is nothing to write, write if there is; whether any moved."""
        moved = False
        with contextlib.suppress(BlockingIOError):
            if self.empty and not self.ended:
                n = self.source.recv_into(self.buffer)
                self.start, self.stop, self.ended = 0, n, n == 0
                moved = n > 0
        with contextlib.suppress(BlockingIOError):
            while not self.empty:
                self.start += self.sink.sendmsg([self.buffer[self.start : self.stop]])
                moved = True
        return moved


class Pump(threading.Thread):
    """Passes bytes between two non-blocking connections until one of them ends.

    Parameters
    ----------
    one, other : socket or TLSSocket
        both are closed in the end.
    """

    def __init__(self, one, other):
        super().__init__(daemon=True, name="relay")
        self._ends = one, other
        one.setblocking(False)
        other.setblocking(False)

    def stop(self):
        """Cut both connections; the thread ends soon after."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def run(self):
        """Pass on; see the class."""
        one, other = self._ends
        flows = _Flow(one, other), _Flow(other, one)
        deadline = None
        try:
            while True:
                moved = [flow.move() for flow in flows]
                ended = [flow for flow in flows if flow.ended]
                if ended and deadline is None:
                    deadline = time.monotonic() + _LINGER
                if ended and (
                    any(flow.empty for flow in ended) or time.monotonic() > deadline
                ):
                    return
                if not any(moved):
                    self._wait(flows)
        except (OSError, PeerError):
            pass
        finally:
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_WR)
            self._drain()
            for end in self._ends:
                end.close()

    def _drain(self):
        """Throw away what still arrives, until the ends close as well.

        Unread it would make the system tell them that the connection is broken, and
        they would lose the last word that was delivered.
        """
        scratch, left = memoryview(bytearray(1 << 16)), list(self._ends)
        deadline = time.monotonic() + _LINGER
        while left and time.monotonic() < deadline:
            poller = select.poll()
            for end in list(left):
                try:
                    if not end.recv_into(scratch):
                        left.remove(end)
                        continue
                except BlockingIOError:
                    poller.register(end.fileno(), select.POLLIN)
                    continue
                except (OSError, PeerError):
                    left.remove(end)
                    continue
                break  # there may be more
            else:
                if left:
                    poller.poll(100)

    def _wait(self, flows):
        interest = dict.fromkeys(self._ends, 0)
        for flow in flows:
            if flow.empty and not flow.ended:
                interest[flow.source] |= select.POLLIN
            elif not flow.empty:
                interest[flow.sink] |= select.POLLOUT
        poller = select.poll()
        for end, events in interest.items():
            # An end that nothing is asked of would report again and again that it
            # was hung up.
            if events:
                poller.register(end.fileno(), events)
        poller.poll(1000)


def tunnel(outer):
    """A local socket whose bytes travel through a connection to the relay.

    Returns
    -------
    sock : socket
    pump : Pump
        carries the bytes; it ends by itself.
    """
    inner, far = socket.socketpair()
    pump = Pump(far, outer)
    pump.start()
    return inner, pump
