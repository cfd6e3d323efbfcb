"""Parties of loopback sessions as copies of a process that has imported the package.

What takes each party a second or two is done once for all that a process of tests
starts. Run as a program, this file is the process that is copied.
"""

import fcntl
import json
import os
from pathlib import Path
import runpy
import select
import socket
import subprocess
import sys
import threading
import time
import traceback

from dipy_ppir.mpc import party

#: Bytes of a message, and seconds for which one is waited for at a time.
_LARGEST, _PATIENCE = 1 << 17, 0.02


class Copies:
    """Stands in for the module `subprocess` where `dipy_ppir.mpc.local` uses it.

    Nothing is started before a party is.
    """

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __init__(self):
        self._owner, self._process, self._lock = os.getpid(), None, threading.RLock()
        self._ends = {}

    def Popen(self, argv, **options):
        """A party; whatever else is asked for, or by whom, is started as ever."""
        usual = argv == [sys.executable, "-P", "-m", "dipy_ppir.mpc.party"]
        if not usual or os.getpid() != self._owner:
            return subprocess.Popen(argv, **options)
        return _Copy(self, argv, options["pass_fds"], options["env"])

    def start(self, environment, descriptors, inherited):
        """Number of a new process that has these descriptors: 0, 1, 2 and more."""
        with self._lock:
            if self._process is None:
                self._begin(environment)
            order = {"environment": environment, "folder": os.getcwd()}
            order["numbers"] = [0, 1, 2, *inherited]
            socket.send_fds(self._control, [json.dumps(order).encode()], descriptors)
            while "started" not in self._ends:
                self._hear(None)
            return self._ends.pop("started")

    def _begin(self, environment):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )

    def end_of(self, pid, timeout):
        """Exit status of a process when it has ended; None if not within seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            # Others may start or end processes meanwhile.
            with self._lock:
                self._hear(0 if timeout == 0 else _PATIENCE)
                if pid in self._ends:
                    return self._ends.pop(pid)
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def signal(self, pid, number):
        """Send a signal to a process, unless it has ended."""
        with self._lock:
            order = {"kill": pid, "signal": int(number)}
            self._control.send(json.dumps(order).encode())

    def _hear(self, timeout):
        poller = select.poll()  # descriptors may have numbers too large for others
        poller.register(self._control, select.POLLIN)
        while poller.poll(timeout and 1000 * timeout):
            data = self._control.recv(_LARGEST)
            if not data:
                raise RuntimeError("the process that is copied has ended")
            key, value = json.loads(data)
            if key == "started":
                self._ends.pop(value, None)  # of another one of that number
            self._ends[key] = value
            timeout = 0

    def close(self):
        """End the process that is copied, and all that are left of its copies."""
        if self._process is not None and os.getpid() == self._owner:
            # Whoever was forked meanwhile may hold it as well.
            self._control.shutdown(socket.SHUT_RDWR)
            self._control.close()
            self._process.wait()
            self._process = None


class _Copy(subprocess.Popen):
    """A party, with what `subprocess.Popen` has."""

    def __init__(self, copies, argv, inherited, environment):
        self._child_created, self.returncode, self.args = False, None, argv
        self._waitpid_lock, self._copies = threading.Lock(), copies
        (theirs, ours), (mine, its) = os.pipe(), os.pipe()
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(ours, "wb"),
            os.fdopen(mine, "rb"),
            None,
        )
        try:
            descriptors = [theirs, its, 2, *inherited]
            self.pid = copies.start(environment, descriptors, inherited)
        finally:
            os.close(theirs)
            os.close(its)

    def _internal_poll(self, *args, **options):
        return self._ended(0)

    def _wait(self, timeout):
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _ended(self, timeout):
        if self.returncode is None:
            self.returncode = self._copies.end_of(self.pid, timeout)
        return self.returncode

    def send_signal(self, sig):
        if self.poll() is None:
            self._copies.signal(self.pid, sig)


def _serve(control):
    """Obey `Copies`; returns in the new processes only, each with its order."""
    import dipy_ppir.align  # noqa: F401

    # What a party imports does not come from this folder.
    forking = runpy.run_path(str(Path(__file__).with_name("forking.py")))

    def receive():
        data, descriptors, *_ = socket.recv_fds(control, _LARGEST, 8)
        return [json.loads(data) | {"descriptors": descriptors}] if data else None

    def say(key, value):
        control.send(json.dumps([key, value]).encode())

    def forked(order):
        for descriptor in order["descriptors"]:
            os.close(descriptor)

    return forking["fork_on_orders"](control.fileno(), receive, say, forked)


def _become(order):
    """Be a process of ``python -m dipy_ppir.mpc.party``."""
    numbers, descriptors = order["numbers"], order["descriptors"]
    beyond = max(*numbers, *descriptors) + 1
    kept = [fcntl.fcntl(d, fcntl.F_DUPFD, beyond) for d in descriptors]
    os.closerange(3, beyond)
    for descriptor, number in zip(kept, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [p for p in path if p and p not in sys.path]
    party.main()


if __name__ == "__main__":
    _control = socket.socket(fileno=int(sys.argv[1]))
    _order = _serve(_control)
    _control.detach()  # closed with all others
    try:
        _become(_order)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
