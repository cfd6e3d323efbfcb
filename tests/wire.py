"""The other end of a connection, played by a test, and its clock."""

import contextlib
import math
import select
import socket
import threading
import time

import numpy as np

from dipy_ppir.mpc import link, network
from dipy_ppir.mpc.frame import DATA, HEADER, operation_code
from dipy_ppir.mpc.ledger import STATIC, Ledger
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.network import Network

#: Seconds after which a test that hangs is ended.
HANGS = 120.0
#: Two numbers, as they are sent.
TWO = np.array([1, 2], dtype=np.uint64).tobytes()


def frame(
    payload=b"",
    *,
    name="step",
    kind=DATA,
    sequence=0,
    magic=b"PP",
    version=1,
    length=None,
):
    length = len(payload) if length is None else length
    return (
        HEADER.pack(magic, version, kind, operation_code(name), sequence, length)
        + payload
    )


class Clock:
    """Time that passes when the test says so, for parties that wait.

    It takes the place of the modules `time` and `select`, see `set_clock`: a wait ends
    by what arrives, or because the test lets time pass. Without a test that does so
    nobody ever times out.
    """

    def __init__(self):
        self.now = 0.0
        #: Called in place of every wait; it may send something and set `now`.
        self.at_each_wait = None
        self._lock = threading.Lock()
        self._waits = {}
        self._in_vain = 0

    def monotonic(self):
        return self.now

    def poll(self):
        return Poller(self)

    def __getattr__(self, name):
        return getattr(select, name)

    def wait(self, poller, seconds):
        """Events of a real poller, or none after so much time of this clock."""
        if self.at_each_wait is not None:
            self.at_each_wait()
            return poller.poll(0)  # also none at all: then it waits again
        until, limit = self.now + seconds, time.monotonic() + HANGS
        with self._lock:
            self._waits[poller] = until
        while True:
            with self._lock:
                events = poller.poll(0)
                if events or self.now >= until:
                    del self._waits[poller]
                    self._in_vain += not events
                    assert self._in_vain < 1000, "no time-out ends it"
                    return events
            assert time.monotonic() < limit, "waits for ever"
            time.sleep(0.001)

    def idle(self, parties):
        """Return when so many parties wait, and have read all that they were sent."""
        limit = time.monotonic() + HANGS
        while True:
            with self._lock:
                waits = self._waits.items()
                if len(waits) == parties and not any(
                    self.now >= until or poller.poll(0) for poller, until in waits
                ):
                    return
            assert time.monotonic() < limit, f"{len(waits)} wait, not {parties}"
            time.sleep(0.001)

    def pass_by(self, seconds, parties):
        """Let time pass while so many parties wait; each wakes when it wants to."""
        end = self.now + seconds
        while self.now < end:
            self.idle(parties)
            with self._lock:
                self.now = min(end, *self._waits.values())


class Poller:
    """What `Clock.poll` returns: like `select.poll()`, in the time of the clock."""

    def __init__(self, clock):
        self._clock, self._poller = clock, select.poll()

    def __getattr__(self, name):
        return getattr(self._poller, name)

    def poll(self, milliseconds):
        return self._clock.wait(self._poller, math.ceil(milliseconds) / 1000)


def set_clock(monkeypatch, clock):
    """Let the parties of this process wait by a clock of the test."""
    for module in (link, network):
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(module, "select", clock)


@contextlib.contextmanager
def beside(function, stop):
    """Run a function in a thread meanwhile; `stop()` makes it end."""
    thread = threading.Thread(target=function)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(HANGS)
        assert not thread.is_alive(), "waits for ever"


class Wire:
    """A network with one peer, the static owner, played by the test."""

    def __init__(self, timeout=300.0, wrap=lambda sock: sock):
        ours, self.peer = socket.socketpair()
        self.ledger = Ledger()
        self.network = Network(
            {STATIC: Link(wrap(ours), STATIC)}, timeout, lambda: self.ledger
        )

    def close(self):
        # The peer first: nobody has to wait for it to take what was not sent.
        self.peer.close()
        self.network.close()

    def receive(self, n=2):
        out = np.zeros(n, dtype=np.uint64)
        self.network.receive(STATIC, "step", out)
        return out.tolist()
