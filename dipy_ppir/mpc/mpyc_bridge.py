"""MPyC inside a session: its secure types, over this package's connections.

MPyC, imported plainly, reads ``sys.argv``, configures logging, may replace the
event loop policy, keeps one global runtime and unpickles what peers send. Here
a private copy of the package is loaded with all of that switched off; the
caller's own MPyC, if there is one, is not touched. A runtime of the private copy
sends and receives through the session's typed frames, derives its PRSS keys from
the session's seeds, encodes every message as field elements, and cannot reach
``pickle``.

MPyC opens products of two sharings, inside its comparisons for example, by their
parabola, which is the product of two lines through the factors: who knows a point of
each line can tell the factors from it, but for one other solution. Here a sharing of
zero hides such a parabola before it is opened.

Shares are the same on both sides (party i holds f(i + 1)), so `to_mpyc` and
`from_mpyc` move arrays across without communication.
"""

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
import contextlib
import functools
import importlib
import logging
import os
import selectors
import struct
import sys
import threading
import types
import warnings

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import InsecureSetupError, ProtocolError
from dipy_ppir.mpc.link import MAX_BACKLOG
from dipy_ppir.mpc.prg import derive_key

#: Label and length of a message; number of the round and state of the sender.
_LABEL, _ROUND = struct.Struct("<qI"), struct.Struct("<QB")
#: The sender has messages for somebody in this round; it has come to the end.
BUSY, DONE = 1, 2
#: Most rounds in a row that bring a party nothing, and of one run.
MAX_IDLE, MAX_ROUNDS = 64, 100_000
#: Most messages of a peer, and most bytes, that nobody has asked for yet.
MAX_EARLY, MAX_EARLY_BYTES = 1 << 12, 1 << 26
#: Largest batch that a party sends.
MAX_BATCH = MAX_BACKLOG // 4

_loading = threading.Lock()
_here = threading.local()

#: Statistical security of MPyC's own protocols, in bits (its default is 30). Its masks
#: may be up to a factor of four narrower than it asks for.
SECURITY_BITS = 42


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


class _Messages:
    """What all peers have in common: the order and the length of a run's messages."""

    def __init__(self, loop):
        self.loop = loop
        #: By label: length of what this party sent; place among those asked for.
        self.lengths, self.order = {}, {}

    def clear(self):
        self.lengths.clear()
        self.order.clear()


class _Peer:
    """MPyC's view of the connection to one party: its messages of one run."""

    def __init__(self, messages, link):
        self.messages, self.link = messages, link
        self.outbox = []
        #: By label: futures of messages that are waited for; early messages.
        self.waiting, self.early = {}, {}

    def send(self, label, payload):
        self.outbox += _LABEL.pack(label, len(payload)), payload
        self.messages.lengths[label] = len(payload)

    def receive(self, label):
        order = self.messages.order
        order.setdefault(label, len(order))
        if label in self.early:
            payload = self.early.pop(label)
            self._check(label, payload)
            return payload
        future = self.waiting[label] = self.messages.loop.create_future()
        return future

    def read(self, batch):
        """Take in a batch.

        Returns
        -------
        served : dict
            maps labels to the messages that were waited for.
        """
        served, start = {}, 0
        while start < len(batch):
            begin = start + _LABEL.size
            label, length = (
                _LABEL.unpack_from(batch, start) if begin <= len(batch) else (0, 0)
            )
            start = begin + length
            if start > len(batch):
                self.refuse("sent a truncated message")
            if label in served or label in self.early:
                self.refuse("sent a message twice")
            payload = bytes(batch[begin:start])
            if label in self.waiting:
                self._check(label, payload)
                served[label] = payload
                continue
            self.early[label] = payload
            if (
                len(self.early) > MAX_EARLY
                or sum(map(len, self.early.values())) > MAX_EARLY_BYTES
            ):
                self.refuse("sends more than it was asked for")
        return served

    def _check(self, label, payload):
        # At one place of a computation all parties send messages of one length.
        due = self.messages.lengths.get(label, len(payload))
        if due != len(payload):
            self.refuse(f"sent {len(payload)} bytes where {due} were due")

    def refuse(self, deed):
        raise ProtocolError(f"{self.link.name} {deed}", self.link.peer)


class _Rendezvous(selectors.SelectSelector):
    """An event loop's selector that waits for the other parties' messages.

    The loop asks it when nothing is left to compute. Then every party sends every
    other one what has gathered for it, and waits for the same: a round.
    """

    #: Called when nothing is left to compute.
    meet = None

    def select(self, timeout=None):
        if timeout is None:
            if self.meet is None:
                raise RuntimeError("this MPyC computation has ended")
            self.meet()
        elif timeout > 0:
            raise RuntimeError(
                "a timer or thread is waited for inside an MPyC computation; wait for "
                "MPyC's values only"
            )
        return []


#: What callers get of MPyC's runtime beside its functions of arrays. The rest would
#: open or send values behind the ledger, or take as many rounds as the values want.
_ALLOWED = {
    *("SecFld", "SecFxp", "SecInt", "SecureArray", "coroutine", "gather", "returnType"),
    *("random_bit", "random_bits", "from_bits", "to_bits", "if_else", "if_swap", "add"),
    *("sub", "mul", "neg", "lt", "ge", "eq", "sgn", "abs", "is_zero", "min", "max"),
    *("argmin", "argmax", "sum", "prod", "all", "any", "in_prod", "matrix_prod"),
    *("scalar_mul", "schur_prod", "trunc", "mod", "vector_add", "vector_sub"),
    *("matrix_add", "matrix_sub", "lsb"),
}
#: Functions of arrays that are left out as well: they tell whether a number is zero, or
#: hide a number by a mask whose width is somebody's promise.
_REFUSED = {"np_reciprocal", "np_divide", "np_det", "np_unit_vector", "np_convert"}


def _facade(rt):
    """What callers get of the runtime: nothing that goes around the ledger."""

    class Facade:
        __slots__ = ()

        def __getattr__(self, name):
            of_arrays = name.startswith("np_") and not (
                name.endswith("_public") or name in _REFUSED
            )
            if name not in _ALLOWED and not of_arrays:
                raise AttributeError(
                    f"mpc.{name} is not available: it could go around the session's "
                    "ledger; bring the array back with from_mpyc and open it with "
                    "Session.open"
                )
            return getattr(rt, name)

    return Facade()


def _no_division(self, a, *_):
    raise ValueError(
        "division in a field would tell which divisors are zero; it is not available"
    )


def _make_runtime(session, messages):
    """MPyC's runtime on a session's connections; to be called inside the loop."""
    mpyc = load()
    base, counted = mpyc.runtime.Runtime, mpyc.asyncoro.mpc_coro

    class Runtime(base):
        # These two begin protocols, but have no program counter of their own.
        mod = counted(base.mod.__wrapped__)
        np_roll = counted(base.np_roll.__wrapped__)
        reciprocal = np_reciprocal = np_det = _no_division

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
            parties = [mpyc.runtime.Party(i) for i in range(3)]
            super().__init__(session.pid, parties, options)
            for peer in session.peers:
                parties[peer].protocol = _Peer(messages, session.network.links[peer])
            # MPyC's own keys were drawn at random; take the session's instead.
            self._prss_keys = {
                tuple(sorted((session.pid, peer))): derive_key(
                    session.seed_for(peer, b"mpyc"), b"prss"
                )
                for peer in session.peers
            }
            self.prfs.cache_clear()

        def output(self, x, receivers=None, threshold=None, raw=False):
            """Open, for MPyC's own protocols; a product behind a sharing of zero."""
            if threshold == 2 * self.threshold:
                x = self._hidden(x)
            return super().output(x, receivers, threshold, raw)

        def _hidden(self, x):
            thresha, m = mpyc.thresha, len(self.parties)
            if isinstance(x, mpyc.finfields.FiniteFieldArray):
                zero = thresha.np_pseudorandom_share_0(
                    x.field, m, self.pid, *self._own_numbers(x.field), x.size
                )
                return x + zero.reshape(x.shape)
            values = x if isinstance(x, list) else [x]
            field = type(values[0])
            zeros = thresha.pseudorandom_share_zero(
                field, m, self.pid, *self._own_numbers(field), len(values)
            )
            values = [a + z for a, z in zip(values, zeros, strict=True)]
            return values if isinstance(x, list) else values[0]

        def _own_numbers(self, field):
            return self.prfs(field.order), self._prss_uci()

    return Runtime()


class _Counting:
    """Awaits a coroutine on a program counter of its own.

    As MPyC's own wrapper, but errors and cancellations get to the coroutine too.
    """

    def __init__(self, rt, coro):
        self.rt, self.coro = rt, coro
        self.counter = load().asyncoro._ProgramCounterWrapper(rt, coro).pc

    def __await__(self):
        resume, what = self.coro.send, None
        while True:
            before, self.rt._program_counter = self.rt._program_counter, self.counter
            try:
                awaited = resume(what)
            except StopIteration as exc:
                return exc.value
            finally:
                self.counter, self.rt._program_counter = (
                    self.rt._program_counter,
                    before,
                )
            try:
                resume, what = self.coro.send, (yield awaited)
            except GeneratorExit:
                self.coro.close()
                raise
            except BaseException as exc:
                resume, what = self.coro.throw, exc


class _Computer:
    """What a session's computations with MPyC share: a runtime and its loop.

    The runtime's program counter goes on from one run to the next, so no two runs use
    the same pseudorandom numbers.
    """

    def __init__(self, session):
        if not session.threshold:
            raise InsecureSetupError(
                "MPyC's random numbers need threshold 1, this session has 0"
            )
        self.network = session.network
        self.selector = _Rendezvous()
        self.loop = asyncio.SelectorEventLoop(self.selector)
        self.messages = _Messages(self.loop)
        self.usable = False
        try:
            self.rt = self.loop.run_until_complete(self._make(session))
        except BaseException:
            self.loop.close()
            raise
        self.peers = {p: self.rt.parties[p].protocol for p in session.peers}
        self.round = 0
        self.states = {}
        self.errors = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.loop.set_task_factory(self._task)
        self.usable = True

    async def _make(self, session):
        # Inside, so that it takes this loop and leaves the caller's alone.
        return _make_runtime(session, self.messages)

    def _task(self, loop, coro, **options):
        """A task that counts on its own, so that labels do not depend on its turn."""

        async def counted():
            return await _Counting(self.rt, coro)

        return asyncio.Task(counted(), loop=loop, **options)

    def run(self, function):
        if not self.usable:
            raise ValueError(
                "this session's computations with MPyC have ended, or one is under way"
            )
        # Until all three have come to the end: an error before is for good.
        self.usable = False
        self.first, self.idle, self.states = self.round, 0, {}
        self.errors.clear()
        _here.runtime, self.selector.meet = self.rt, self._meet
        try:
            result = self.loop.run_until_complete(self._main(function))
            self._raise_errors()
            self.usable = True
            return result
        except RuntimeError:
            # MPyC stops the loop when one of its tasks fails; that error is the cause.
            self._raise_errors()
            raise
        finally:
            self.selector.meet = None
            if not self.usable:
                self._cancel()
            _here.runtime = None

    async def _main(self, function):
        self.all_done = self.loop.create_future()
        self.task = self.loop.create_task(function(_facade(self.rt)))
        result = await self.task
        # Whatever it has begun without waiting for it ends too, at all parties.
        await self.all_done
        return result

    def _raise_errors(self):
        for context in self.errors:
            if context.get("exception"):
                raise context["exception"]

    def _meet(self):
        """Exchange what has gathered with all other parties; rounds: 1."""
        self._raise_errors()
        # `_main` is a task as well.
        done = self.task.done() and len(asyncio.all_tasks(self.loop)) == 1
        sends = self._send(done)
        before, self.states = self.states, {}
        served = []
        for peer, batch in self.network.receive_mpyc(self.peers).items():
            view = self.peers[peer]
            if len(batch) < _ROUND.size:
                view.refuse("sent a truncated message")
            number, state = _ROUND.unpack_from(batch)
            self.states[peer] = state
            if number != self.round or before.get(peer, 0) & DONE & ~state:
                self._out_of_step(view, before)
            messages = view.read(batch[_ROUND.size :])
            if done and (messages or view.early):
                view.refuse("sent what nobody had asked for")
            served += [(view, *message) for message in messages.items()]
        # In the order in which they were asked for, which is the same at all parties.
        order = self.messages.order
        for view, label, payload in sorted(served, key=lambda s: order[s[1]]):
            view.waiting.pop(label).set_result(payload)
        self.round += 1
        self.idle = 0 if sends or served else self.idle + 1
        self._end_or_go_on(done, sends)

    def _send(self, done):
        sends = any(view.outbox for view in self.peers.values())
        header = _ROUND.pack(self.round, BUSY * sends | DONE * done)
        batches = {p: b"".join([header, *v.outbox]) for p, v in self.peers.items()}
        largest = max(map(len, batches.values()))
        if largest > MAX_BATCH:
            raise ValueError(
                f"{largest} bytes of MPyC's are to be sent at once, at most "
                f"{MAX_BATCH} can be: compute in pieces"
            )
        for peer, batch in batches.items():
            self.peers[peer].outbox.clear()
            self.network.send_mpyc(peer, batch)
        return sends

    def _out_of_step(self, view, before):
        if before.get(view.link.peer, 0) & DONE and self.task.done():
            others = " or ".join(v.link.name for v in self.peers.values())
            raise ProtocolError(
                "an MPyC computation has ended for one party and not for another: "
                f"{others} did not say the same to all"
            )
        view.refuse("is at another step of an MPyC computation")

    def _end_or_go_on(self, done, sends):
        states = [BUSY * sends | DONE * done, *self.states.values()]
        if all(state & DONE for state in states):
            for view in self.peers.values():
                if view.early:
                    view.refuse("sent what nobody had asked for")
            self.messages.clear()
            self.all_done.set_result(None)
        elif (
            self.idle > MAX_IDLE
            or self.round - self.first > MAX_ROUNDS
            or not any(state & BUSY for state in states)
        ):
            raise ProtocolError(
                "an MPyC computation waits for what no party sends; check that all "
                "parties run the same operation with the same version"
            )

    def _cancel(self):
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        # Until nothing is left to do, which ends the loop.
        with contextlib.suppress(RuntimeError):
            self.loop.run_forever()

    def close(self):
        """End for good; a loop that runs is left to whoever runs it."""
        self.usable = False
        self.rt.prfs.cache_clear()
        if not self.loop.is_running():
            self.loop.close()


def run(session, function):
    """Run MPyC code at every party of a session.

    The parties go through it in rounds: each computes what it can, then sends each
    other one what has gathered for it, until all have come to the end. So the
    ledger's count of rounds is the depth of the computation, plus one for the end.
    While a party computes it says nothing: what takes it longer than the session's
    time-out must be done in pieces.

    Parameters
    ----------
    session : Session
        all parties call this at the same point, any number of times.
    function : callable
        ``async function(mpc)`` gets MPyC's runtime without its ways to open
        values: bring results back with `from_mpyc` and open them with
        `Session.open`. What it begins and does not wait for ends before `run` returns.
        It may wait for MPyC's values only, not for timers or threads. There is no
        division in a field, which would tell what is zero. Where a function of MPyC's
        takes the number of bits of a secret, that is a promise: larger secrets would be
        hidden badly.

    Returns
    -------
    result
        what the function returned here.

    Raises
    ------
    PeerError
        if a party is lost, stays silent or sends what nobody asked for.
    InsecureSetupError
        in a session with threshold 0, or in a copy of the process that opened it.
    """
    session.check_process()
    if session.mpyc is None:
        session.mpyc = _aside(_Computer, session)
    return _aside(session.mpyc.run, function)


def _aside(function, *args):
    """Call a function in a thread that has no running event loop, as a notebook's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function(*args)
    with ThreadPoolExecutor(1, "mpyc") as pool:
        return pool.submit(function, *args).result()


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


def evaluate(session, formula, arrays, bounds, kind="field"):
    """Evaluate a formula of MPyC's secure arrays on shares; see `run`.

    Parameters
    ----------
    session : Session
    formula : callable
        ``formula(mpc, *arrays)`` returns secure arrays.
    arrays : sequence of SharedArray
        of degree 1, in one field.
    bounds : sequence of float
        bounds on the magnitude of the results, as integers.
    kind : {"field", "integer"}, optional
        secure type of the arrays, see `to_mpyc`.

    Returns
    -------
    results : list of SharedArray
    """
    field = arrays[0].field

    async def compute(mpc):
        results = formula(mpc, *(to_mpyc(array, kind) for array in arrays))
        return [
            await from_mpyc(mpc, result, field, bound=bound)
            for result, bound in zip(results, bounds, strict=True)
        ]

    return run(session, compute)


__all__ = ["evaluate", "from_mpyc", "load", "run", "to_mpyc"]
