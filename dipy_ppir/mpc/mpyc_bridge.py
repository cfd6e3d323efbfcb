"""MPyC inside a session: its secure types, over this package's connections.

MPyC, imported plainly, reads ``sys.argv``, configures logging, may replace the
event loop policy, keeps one global runtime and unpickles what peers send. Here
a private copy of the package is loaded with all of that switched off; the
caller's own MPyC, if there is one, is not touched. A runtime of the private copy
sends and receives through the session's typed frames, derives its PRSS keys from
the session's seeds, encodes every message as field elements, and cannot reach
``pickle``.

Shares are the same on both sides (party i holds f(i + 1)), so `to_mpyc` and
`from_mpyc` move arrays across without communication.
"""

import argparse
import asyncio
import functools
import importlib
import logging
import os
import struct
import sys
import threading
import types
import warnings

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import PeerLostError, PeerTimeoutError, ProtocolError
from dipy_ppir.mpc.prg import derive_key
from dipy_ppir.mpc.transport import ABORT, MAX_BACKLOG, MPYC

_LABEL = struct.Struct("<q")
_loading = threading.Lock()
_here = threading.local()

#: Statistical security of MPyC's own protocols, in bits (its default is 30).
SECURITY_BITS = 40


#: Most messages of a peer that may wait for somebody to ask for them.
MAX_WAITING = 1 << 16


class _CurrentRuntime:
    """Stands for MPyC's global runtime: the runtime of the calling thread."""

    def __getattr__(self, name):
        return getattr(_here.runtime, name)

    def __setattr__(self, name, value):
        setattr(_here.runtime, name, value)


class _NoPickle:
    """Takes the place of the pickle module inside MPyC."""

    @staticmethod
    def _refuse(*args, **kwargs):
        raise ProtocolError(
            "this MPyC operation would unpickle what peers send; it is not available"
        )

    dumps = loads = _refuse


def load():
    """The private copy of MPyC, loaded when first asked for.

    Returns
    -------
    mpyc : namespace
        with the modules ``runtime``, ``sectypes``, ``finfields``, ``thresha`` and
        ``asyncoro``.
    """
    with _loading:
        return _load()


@functools.cache
def _load():
    mine = [m for m in sys.modules if m == "mpyc" or m.startswith("mpyc.")]
    saved = {name: sys.modules.pop(name) for name in mine}
    # MPyC skips its whole set-up when its documentation is being built.
    before = os.environ.get("READTHEDOCS")
    os.environ["READTHEDOCS"] = "True"
    # logging.debug() on a root logger without handlers would configure logging.
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = ("runtime", "sectypes", "finfields", "thresha", "asyncoro")
            copy = {n: importlib.import_module(f"mpyc.{n}") for n in names}
        modules = [m for n, m in sys.modules.items() if n.startswith("mpyc.")]
    finally:
        root.removeHandler(silent)
        for name in [m for m in sys.modules if m.split(".")[0] == "mpyc"]:
            del sys.modules[name]
        sys.modules.update(saved)
        if before is None:
            del os.environ["READTHEDOCS"]
        else:
            os.environ["READTHEDOCS"] = before
    current = _CurrentRuntime()
    for module in modules:
        if hasattr(module, "logging"):
            module.logging = logging.getLogger("dipy_ppir.mpyc")
        if hasattr(module, "pickle"):
            module.pickle = _NoPickle
        if getattr(module, "runtime", 0) is None:
            module.runtime = current
    # It asks the environment for a number of worker threads; none are wanted.
    copy["finfields"].os = types.SimpleNamespace(getenv=lambda *_: "0")
    return types.SimpleNamespace(**copy)


class _Peer:
    """MPyC's view of the connection to one party."""

    def __init__(self, rt, peer):
        self.rt, self.peer = rt, peer
        self.buffers = {}
        self.nbytes_sent = self.nbytes_waiting = 0

    def send(self, label, payload):
        self.rt.session.network.send_mpyc(self.peer, _LABEL.pack(label) + payload)
        self.nbytes_sent += len(payload)
        # While it sent, frames may have come in that no event will announce.
        self.rt._loop.call_soon(self.rt.look_around)

    def receive(self, label):
        payload = self.buffers.pop(label, None)
        if payload is None:
            payload = self.buffers[label] = asyncio.Future(loop=self.rt._loop)
        else:
            self.nbytes_waiting -= len(payload)
        return payload

    def deliver(self, message):
        if len(message) < _LABEL.size:
            raise ProtocolError(
                f"party {self.peer} sent a truncated message", self.peer
            )
        (label,) = _LABEL.unpack_from(message)
        payload = bytes(message[_LABEL.size :])
        waiting = self.buffers.get(label)
        if isinstance(waiting, asyncio.Future):
            del self.buffers[label]
            waiting.set_result(payload)
        elif waiting is None:
            self.nbytes_waiting += len(payload)
            too_many = len(self.buffers) >= MAX_WAITING
            if too_many or self.nbytes_waiting > MAX_BACKLOG:
                raise ProtocolError(
                    f"party {self.peer} sends more than it was asked for", self.peer
                )
            self.buffers[label] = payload
        else:
            raise ProtocolError(f"party {self.peer} sent a message twice", self.peer)


#: Parts of MPyC's runtime that would open or send values behind the ledger.
_CLOSED = {"output", "peek", "transfer", "start", "shutdown", "run", "parties"}


def _facade(rt):
    """What callers get of the runtime: everything but ways around the ledger."""

    class Facade:
        __slots__ = ()

        def __getattr__(self, name):
            if name in _CLOSED or name.startswith("_") or name.endswith("_public"):
                raise ProtocolError(
                    f"mpc.{name} would go around the session's ledger; bring the "
                    "array back with from_mpyc and open it with Session.open"
                )
            return getattr(rt, name)

    return Facade()


def _make_runtime(session, loop):
    mpyc = load()

    class Runtime(mpyc.runtime.Runtime):
        """MPyC's runtime on a session's connections."""

        def __init__(self):
            options = argparse.Namespace(
                no_log=True,
                no_prss=False,
                no_async=False,
                no_barrier=True,
                ssl=False,
                mix32_64bit=True,  # arrays travel as bytes, never as pickles
                threshold=session.threshold,
                sec_param=SECURITY_BITS,
                bit_length=32,
                workers=0,
            )
            self.session = session
            parties = [mpyc.runtime.Party(i) for i in range(3)]
            super().__init__(session.pid, parties, options)
            for peer in session.peers:
                parties[peer].protocol = _Peer(self, peer)
            # MPyC's own keys were drawn at random; take the session's instead.
            self._prss_keys = {
                tuple(sorted((session.pid, peer))): derive_key(
                    session.seed_for(peer, b"mpyc"), b"prss"
                )
                for peer in session.peers
            }
            self.prfs.cache_clear()

    return Runtime()


def run(session, function):
    """Run MPyC code at every party of a session.

    Parameters
    ----------
    session : Session
        all parties call this at the same point.
    function : callable
        ``async function(mpc)`` gets MPyC's runtime without its ways to open
        values: bring results back with `from_mpyc` and open them with
        `Session.open`.

    Returns
    -------
    result
        what the function returned here.

    Raises
    ------
    PeerError
        if a party is lost or stays silent.
    """
    box = {}

    def work():
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            box["result"] = _run_in_loop(session, function, loop)
        except BaseException as exc:
            box["error"] = exc
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    # A thread of its own: the caller may have a running event loop (notebooks).
    thread = threading.Thread(target=work, name="mpyc")
    thread.start()
    thread.join()
    if "error" in box:
        raise box["error"]
    return box["result"]


def _run_in_loop(session, function, loop):
    _here.runtime = rt = _make_runtime(session, loop)
    errors = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    failed = asyncio.Future(loop=loop)
    links = session.network.links
    heard = dict.fromkeys(session.peers, loop.time())

    def on_readable(peer):
        link = links[peer]
        try:
            while True:
                while link.inbox and link.inbox[0].kind == MPYC:
                    heard[peer] = loop.time()
                    frame = link.pop()
                    rt.parties[peer].protocol.deliver(frame.body)
                if link.inbox:
                    # This peer is done with MPyC; the rest is for later.
                    loop.remove_reader(link.sock)
                    if link.inbox[0].kind == ABORT:
                        session.network._aborted(link, link.inbox[0])
                    return
                if session.network._pump(link) is None:
                    return
        except Exception as exc:
            loop.remove_reader(link.sock)
            if not failed.done():
                failed.set_exception(exc)

    def look_around():
        for peer in session.peers:
            if links[peer].inbox and not failed.done():
                on_readable(peer)

    rt.look_around = look_around

    async def main():
        task = asyncio.ensure_future(function(_facade(rt)))
        for peer in session.peers:
            loop.add_reader(links[peer].sock, on_readable, peer)
            on_readable(peer)
        try:
            while not task.done():
                await asyncio.wait(
                    {task, failed},
                    timeout=session.network.timeout,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if failed.done():
                    failed.result()
                last = max(heard.values())
                if not task.done() and loop.time() - last >= session.network.timeout:
                    # Parties that wait for one another fall silent together, after
                    # the one that they wait for.
                    peer = min(heard, key=heard.get)
                    raise PeerTimeoutError(
                        f"no party sent anything for {session.network.timeout:g} s "
                        f"during an MPyC computation, {links[peer].name} for longest; "
                        "check that it still runs and can be reached",
                        peer,
                    )
            return task.result()
        finally:
            if not task.done():
                task.cancel()
            for peer in session.peers:
                loop.remove_reader(links[peer].sock)

    try:
        return loop.run_until_complete(main())
    except RuntimeError as exc:
        # MPyC stops the loop when one of its tasks fails; that error is the cause.
        causes = [c["exception"] for c in errors if c.get("exception")]
        raise causes[0] if causes else exc from None
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        # Run once more to let the cancelled tasks finish.
        loop.call_soon(loop.stop)
        loop.run_forever()


def _secure_type(array, kind, bits):
    sectypes = load().sectypes
    modulus = array.field.modulus
    if kind == "field":
        return sectypes.SecFld(modulus=modulus)
    if kind == "integer":
        return sectypes.SecInt(bits, p=modulus)
    if kind == "fixed":
        return sectypes.SecFxp(bits, array.frac_bits, p=modulus)
    raise ValueError(f"kind must be 'field', 'integer' or 'fixed', got {kind!r}")


def to_mpyc(array, kind="field"):
    """A shared array as MPyC's array of secure numbers; no communication.

    Call it inside `run`.

    Parameters
    ----------
    array : SharedArray
        of degree 1.
    kind : {"field", "integer", "fixed"}, optional
        secure type: SecFld, SecInt or SecFxp of the same modulus.

    Returns
    -------
    secure : MPyC secure array
    """
    if array.degree != 1:
        raise ValueError("reduce the degree first: MPyC's shares have degree 1")
    bits = max(array.bound.bit_length() + 1, array.frac_bits + 2)
    secure = _secure_type(array, kind, bits)
    ints = array.field.to_ints(array.share)
    value = secure.field.array(ints, check=False)
    if kind == "fixed":
        return secure.array(value, integral=False)
    return secure.array(value)


async def from_mpyc(mpc, secure, field, *, frac_bits=0, bound):
    """A secure array of MPyC's as a `SharedArray`; no communication.

    Parameters
    ----------
    mpc : MPyC runtime
    secure : MPyC secure array
    field : Field
        of the same modulus.
    frac_bits : int, optional
        fraction bits of the secure type.
    bound : float
        bound on the magnitude of the secret numbers.
    """
    value = await mpc.gather(secure)
    if value.field.modulus != field.modulus:
        raise ValueError("the secure array lives in another field")
    share = field.from_ints(np.asarray(value.value, dtype=object))
    return SharedArray(field, share, 1, frac_bits, int(bound * 2**frac_bits))


__all__ = ["PeerLostError", "from_mpyc", "load", "run", "to_mpyc"]
