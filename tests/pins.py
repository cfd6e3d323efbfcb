"""Three parties with keys, certificates and a session file, for tests."""

from functools import cache
import queue
import threading
import time
from types import SimpleNamespace

from ports import free_port

from dipy_ppir.mpc import meeting, network, tls
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.sessionfile import TABLES, SessionFile

NAMES = {MOVING: "North Hospital", STATIC: "South Clinic", HELPER: "East University"}


@cache
def identity(pid):
    """The identity of a party, the same in every test."""
    return create_identity(NAMES[pid])


def contents(listeners=(HELPER,), *, connect=300.0, silence=300.0, **entries):
    """Contents of a session file in which `listeners` have an address."""
    tables, alone = {}, entries.get("helper") == "none"
    for name, pid in TABLES.items():
        if alone and pid == HELPER:
            continue
        tables[name] = {"name": NAMES[pid], "fingerprint": identity(pid).fingerprint}
        if pid in listeners:
            tables[name]["address"] = f"127.0.0.1:{free_port()}"
    return {
        "operation": "affine",
        "parties": tables,
        "timeouts": {"connect": connect, "silence": silence},
        **entries,
    }


def plan(*args, **options):
    """A checked session file; see `contents`."""
    return SessionFile.parse(contents(*args, **options))


def connect(sock, identity, party, *, purpose=tls.LINK, server=False, deadline=None):
    """Handshake with one party; see `tls.handshake`."""
    parties = {party.fingerprint: party}
    return tls.handshake(
        sock, identity, parties, purposes=(purpose,), server=server, deadline=deadline
    )


def together(*functions, seconds=300):
    """Run functions in threads; what each returned or raised.

    Fails if one of them does not end.
    """
    results = [None] * len(functions)

    def run(i):
        try:
            results[i] = functions[i]()
        except Exception as exc:
            results[i] = exc

    threads = [
        threading.Thread(target=run, args=(i,), daemon=True)
        for i in range(len(functions))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "waits for ever"
    return results


class _QuickQueue(queue.Queue):
    """Parties that meet look at their connections more often."""

    def get(self, block=True, timeout=None):
        return super().get(block, timeout and min(timeout, 0.005))


def clock_of_meetings(monkeypatch):
    """The time by which parties at a meeting wait: the real one, until a test adds to
    its ``ahead``."""
    clock = SimpleNamespace(ahead=0.0)
    clock.monotonic = lambda: time.monotonic() + clock.ahead
    monkeypatch.setattr(meeting, "time", clock)
    return clock


def meet_promptly(monkeypatch, seconds=300.0):
    """Let nobody wait between two attempts to meet, and no handshake or last word be
    cut short within so many seconds, however busy the machine."""
    quick = SimpleNamespace(Queue=_QuickQueue, Empty=queue.Empty)
    monkeypatch.setattr(meeting, "queue", quick)
    monkeypatch.setattr(meeting, "REDIAL", 0.02)
    monkeypatch.setattr(meeting, "DIAL_TIMEOUT", seconds)
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT", seconds)
    monkeypatch.setattr(network, "LAST_WORD", seconds)
