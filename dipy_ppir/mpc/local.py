"""The other parties as processes on this machine.

When a caller holds both images, a secure class starts the static owner and the
helper as processes of their own, joined by TCP on the loopback interface, and
plays the moving owner itself; of two owners alone, only the static one. The
protocol is the deployed one. The processes are kept for the next call and end
with the caller, however it ends.
"""

import atexit
from collections import Counter
import contextlib
import os
import secrets
import select
import socket
import subprocess
import sys
import threading

from dipy_ppir.mpc import errors
from dipy_ppir.mpc.descriptors import fill_standard_descriptors
from dipy_ppir.mpc.errors import (
    MPCError,
    PeerError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC, Ledger
from dipy_ppir.mpc.party import meet
from dipy_ppir.mpc.pipes import read_message, write_message
from dipy_ppir.mpc.receipt import make_receipt, run_facts
from dipy_ppir.mpc.session import PARTIES, THRESHOLD

START_TIMEOUT = 60.0
#: Seconds to wait for a party's own account of a failure; one that has ended has none.
REPLY_PATIENCE = 30.0
#: Silence, in seconds, that the other parties bear: this process conducts and ends
#: them itself, and whoever uses it may look at a picture in between for a week.
UNLIMITED = 1e6


class LocalParties:
    """Child processes and this process's own session with them.

    Parameters
    ----------
    parties : int, optional
        3, or 2 for two owners alone.
    timeout : float, optional
        longest silence of a party during a run, in seconds.

    Attributes
    ----------
    session : Session
        this process's end: the moving owner.
    """

    def __init__(self, parties=PARTIES, timeout=300.0):
        self._children, self._count = {}, parties
        self._ended = False
        self._owner = os.getpid()
        fill_standard_descriptors()
        token = secrets.token_bytes(32)
        listeners = {p: _listener() for p in (MOVING, STATIC)}
        addresses = {p: list(s.getsockname()[:2]) for p, s in listeners.items()}
        try:
            for pid in (STATIC, HELPER)[: parties - 1]:
                listener = listeners[pid] if pid == STATIC else None
                self._start(pid, token, addresses, listener)
            listeners[STATIC].close()
            self.session = meet(
                MOVING,
                token,
                addresses,
                listeners[MOVING],
                START_TIMEOUT,
                check=self._check_alive,
                parties=parties,
            )
            for pid in self._children:
                self._reply(pid)
        except BaseException:
            self.close()
            raise
        finally:
            for listener in listeners.values():
                listener.close()
        self.session.network.timeout = timeout

    def _start(self, pid, token, addresses, listener):
        fds = () if listener is None else (listener.fileno(),)
        env = dict(os.environ)
        # One core's worth of threads per party: they share this machine.
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            env.setdefault(name, "1")
        # Keep freed blocks of the size of a message instead of returning them to the
        # system, which would hand them back page by page.
        env.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 28))
        env.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 28))
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        child = subprocess.Popen(
            # -P: never from a folder of that name in the working directory.
            [sys.executable, "-P", "-m", "dipy_ppir.mpc.party"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            env=env,
        )
        self._children[pid] = child
        setup = {
            "pid": pid,
            "parties": self._count,
            "token": token.hex(),
            "addresses": addresses,
            "listen_fd": fds[0] if fds else None,
            "timeout": START_TIMEOUT,
            "silence": UNLIMITED,
        }
        # One that has ended already does not come to the meeting, which says so.
        with contextlib.suppress(BrokenPipeError):
            write_message(child.stdin, setup)

    def _check_alive(self):
        for pid, child in self._children.items():
            if child.poll() is not None:
                raise errors.PeerLostError(
                    f"the process of party {pid} ({ROLES[pid]}) ended as it started; "
                    "see the messages it printed",
                    pid,
                )

    def _reply(self, pid, patience=None):
        pipe = self._children[pid].stdout
        if patience is not None:
            poller = select.poll()
            poller.register(pipe, select.POLLIN)
            if not poller.poll(patience * 1000):
                return None
        try:
            return read_message(pipe)
        except (EOFError, ValueError):
            return None

    @property
    def usable(self):
        """Whether all parties still run and belong to this process."""
        return (
            self._owner == os.getpid()
            and not self.session.network.closed
            and all(c.poll() is None for c in self._children.values())
        )

    def run(self, function, call, *, moving, static, helper, account=None):
        """Run one task at all three parties.

        Parameters
        ----------
        function : callable
            ``function(session, **moving)`` runs here, as the moving owner.
        call : str
            ``package.module:function`` that the other parties run.
        moving, static, helper : dict
            keyword arguments of the task, by party; the helper's are left where there
            is none.
        account : Account, optional
            counts this task's openings and traffic with those of others.

        Returns
        -------
        results : dict
            result of each party, by number.

        Raises
        ------
        MPCError
            or whatever the party at fault raised. The processes are then gone
            and the next call starts new ones.
        """
        try:
            tasks = {STATIC: static, HELPER: helper}
            self.start(call, {pid: tasks[pid] for pid in self._children})
            self.session.new_run()
            if account is not None:
                self.session.ledger = account.ledger
            results = {MOVING: function(self.session, **moving)}
            replies = self.finish()
            if account is not None:
                account.add(replies)
            return {**results, **{p: r["result"] for p, r in replies.items()}}
        except BaseException as exc:
            better = self.explain(exc)
            if better is exc:
                raise
            raise better from exc

    def start(self, call, tasks):
        """Send a task to the other parties; `finish` waits for its end.

        Parameters
        ----------
        call : str
            ``package.module:function``.
        tasks : dict
            maps party numbers to keyword arguments.
        """
        for pid, arguments in tasks.items():
            task = {"call": call, "arguments": arguments}
            try:
                write_message(self._children[pid].stdin, task)
            except BrokenPipeError:
                # Not the caller's own pipe, as who catches it would think.
                raise self._error(pid, None) from None

    def finish(self):
        """Wait for the other parties' results.

        Returns
        -------
        replies : dict
            maps party numbers to ``{"result": ..., "sent": bytes by phase}``.
        """
        replies = {}
        for pid in self._children:
            reply = self._reply(pid)
            if reply is None or not reply["ok"]:
                raise self._error(pid, reply)
            replies[pid] = reply
        return replies

    def explain(self, exc):
        """The best account of a failure: a child's own, if it has one."""
        if self._ended:
            return exc
        self.session.fail(exc)
        if isinstance(exc, PeerError):
            silent = exc.culprit if isinstance(exc, PeerTimeoutError) else None
            for pid in self._children:
                # One that stands still would never answer.
                patience = 0 if pid == silent else REPLY_PATIENCE
                reply = self._reply(pid, patience)
                if reply and not reply["ok"]:
                    error = self._error(pid, reply)
                    if isinstance(error, ProtocolError) or not isinstance(
                        error, PeerError
                    ):
                        exc = error
                        break
        self.close()
        return exc

    def _error(self, pid, reply):
        if reply is None:
            return errors.PeerLostError(
                f"party {pid} ({ROLES[pid]}) died; see the messages it printed", pid
            )
        kind = getattr(errors, reply["error"], None)
        if kind is None and reply["module"] == "builtins":
            import builtins

            kind = getattr(builtins, reply["error"], None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = MPCError
        try:
            error = kind(reply["message"])
        except TypeError:
            error = MPCError(reply["message"])
        error.add_note(f"raised at party {pid} ({ROLES[pid]}):\n{reply['traceback']}")
        return error

    def close(self):
        """End the child processes."""
        if self._owner != os.getpid():
            return
        self._ended = True
        if hasattr(self, "session"):
            self.session.close()
        for child in self._children.values():
            for pipe in (child.stdin, child.stdout):
                try:
                    pipe.close()
                except OSError:
                    pass
        for child in self._children.values():
            try:
                child.wait(timeout=5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _listener():
    sock = socket.create_server(("127.0.0.1", 0), backlog=4)
    sock.set_inheritable(False)
    return sock


#: Parties kept between calls, by how many they are.
_kept = {}
_current = None
_lock = threading.RLock()


def _parties(count=PARTIES):
    """So many parties kept between calls, started if need be, and idle."""
    if _current is not None:
        # Its parties may have failed since; whoever comes next has no part in that.
        with contextlib.suppress(MPCError, OSError):
            _current.end()
    kept = _kept.get(count)
    if kept is None or not kept.usable:
        if kept is not None:
            kept.close()
        _kept[count] = LocalParties(count)
    return _kept[count]


def run_locally(function, call, *, parties=None, **arguments):
    """`LocalParties.run` with parties that are kept between calls.

    One task runs at a time; calls from several threads take turns.

    Parameters
    ----------
    parties : int, optional
        3 by default, or 2 for two owners alone.
    """
    with _lock:
        return _parties(parties or PARTIES).run(function, call, **arguments)


class Account:
    """Openings and traffic of several tasks.

    Attributes
    ----------
    ledger : Ledger
        what this process opened and sent.
    sent : dict
        payload bytes that the other parties sent, by role and phase.
    """

    def __init__(self):
        self.ledger = Ledger()
        self.sent = {STATIC: Counter(), HELPER: Counter()}

    def add(self, replies):
        """Enter what the other parties sent; see `LocalParties.finish`."""
        for pid, reply in replies.items():
            self.sent[pid].update(reply["sent"])

    def receipt(self, **facts):
        """Receipt of all tasks so far."""
        by_party = {ROLES[MOVING]: self.ledger.sent_by_phase()}
        for pid, sent in self.sent.items():
            by_party[ROLES[pid]] = dict(sent)
        facts = {**run_facts(THRESHOLD, PARTIES), "role": ROLES[MOVING], **facts}
        return make_receipt(self.ledger, by_party, **facts)


class Conversation(Account):
    """A task of the other parties that lasts over several calls made here.

    The other parties wait for command words until they are told 0. Whatever
    else needs them ends the conversation first; its owner then starts it anew.
    As a context manager it guards one exchange: an error inside ends the
    parties, so that nobody is left in the middle of a protocol.
    """

    def __init__(self):
        super().__init__()
        self._parties = None

    @property
    def active(self):
        """Whether the other parties are waiting for this conversation."""
        return _current is self and self._parties.usable

    def start(self, call, *, common, static):
        """Start the task; returns this process's session."""
        global _current
        with _lock:
            self._parties = _parties()
            with self:
                tasks = {STATIC: {**common, **static}, HELPER: common}
                self._parties.start(call, tasks)
            self._parties.session.ledger = self.ledger
            _current = self
            return self._parties.session

    def end(self):
        """Let the other parties go."""
        global _current
        with _lock:
            if _current is not self:
                return
            _current = None
            if not self._parties.usable:
                return
            with self:
                self._parties.session.tell(0)
                self.add(self._parties.finish())

    def receipt(self, **facts):
        """Receipt of all exchanges so far; ends the conversation."""
        self.end()
        return super().receipt(**facts)

    def __enter__(self):
        _lock.acquire()
        return self

    def __exit__(self, kind, exc, trace):
        global _current
        try:
            if exc is not None and self._parties is not None:
                _current = None
                better = self._parties.explain(exc)
                if better is not exc:
                    raise better from exc
        finally:
            _lock.release()


@atexit.register
def close_local_parties():
    """End the parties kept by `run_locally`; done at exit by itself."""
    global _current
    if _current is not None:
        with contextlib.suppress(Exception):
            _current.end()
    _current = None
    while _kept:
        _kept.popitem()[1].close()
