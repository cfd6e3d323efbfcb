"""Tasks and helpers of the benchmarks; importable in the other parties' processes."""

import os
import time

import numpy as np

from dipy_ppir.align import point_registration
from dipy_ppir.align.quasinewton import minimise
from dipy_ppir.align.secretmetric import secret_numbers
from dipy_ppir.mpc import local, mpyc_bridge
from dipy_ppir.mpc.fields import P127
from dipy_ppir.mpc.leastsquares import VALUE_BITS, Own
from dipy_ppir.mpc.ledger import MOVING, ROLES, STATIC
from dipy_ppir.mpc.pairsquares import PairSteps
from dipy_ppir.mpc.protocols import share


class _Bowl:
    """A function of 12 numbers that the moving owner knows, as a metric on shares."""

    basis = np.eye(12)

    def __init__(self, numbers):
        self.numbers, self.mine = numbers, numbers.session.pid == MOVING

    def evaluate(self, x):
        value = np.array([x @ x / 2]) if self.mine else None
        return self.numbers.own(value, (1,)), self.numbers.own(x, (12,))

    def first_inverse(self, numbers):
        return numbers.own(self.basis if self.mine else None, (12, 12))


def optimizer_steps(session, steps):
    """Steps of the optimizer on shares, without a metric: seconds, waits, bytes."""
    numbers, ledger = secret_numbers(session), session.ledger
    start, seconds = np.full(12, 3.0) if session.pid == MOVING else None, []
    last = time.perf_counter()

    def note(*_):
        nonlocal last
        now = time.perf_counter()
        seconds.append(now - last)
        last = now

    with session.phase("steps"):
        minimise(numbers, _Bowl(numbers), start, steps + 1, 4.0, note)
    sent = ledger.sent_by_phase()["steps"]
    return seconds, ledger.rounds["steps"] // steps, sent // steps


#: Small computations by MPyC: kind of numbers, shapes of two arrays, function.
SMALL = {
    "nothing": ("field", (1,), (1,), lambda x, y: x),
    "12 x 12 by 12": ("field", (12, 12), (12,), lambda x, y: x @ y),
    "12 x 12 by 12 x 12": ("field", (12, 12), (12, 12), lambda x, y: x @ y),
    "12 products in a row": ("field", (12,), (12,), lambda x, y: _powers(x, y)),
    "a comparison": ("integer", (1,), (1,), lambda x, y: x < y),
    "12 comparisons": ("integer", (12,), (12,), lambda x, y: x < y),
}


def _powers(x, y):
    for _ in range(12):
        x = x * y
    return x


def small(session, what, repeats):
    """Compute by MPyC on shared integers; seconds, rounds and bytes sent of a run."""
    kind, *shapes, function = SMALL[what]
    shared = [
        share(
            session,
            MOVING,
            np.ones(shape) if session.pid == MOVING else None,
            shape,
            bound=2**40,
            field=P127,
        )
        for shape in shapes
    ]

    async def compute(mpc):
        x, y = (mpyc_bridge.to_mpyc(array, kind) for array in shared)
        return await mpyc_bridge.from_mpyc(mpc, function(x, y), P127, bound=1)

    seconds, ledger = [], session.ledger
    with session.phase("small"):
        for _ in range(repeats):
            start = time.perf_counter()
            mpyc_bridge.run(session, compute)
            seconds.append(time.perf_counter() - start)
    sent = ledger.sent_by_phase()["small"]
    return seconds, ledger.rounds["small"] // repeats, sent // repeats


def point_pair(n, dim):
    """Corresponding points of two owners, as of an outline: moving and static, mm."""
    rng = np.random.default_rng(n)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    turn[:, 0] *= np.sign(np.linalg.det(turn))
    moving = rng.standard_normal((n, dim)) * np.array([30.0, 12.0, 20.0])[:dim]
    return moving, moving @ turn.T + rng.standard_normal((n, dim)) + 40.0


def register_points(session, n, dim, scaling, repeats):
    """Registrations of made-up points: seconds, waits, bytes of the last one."""
    pair = dict(zip((MOVING, STATIC), point_pair(n, dim), strict=True))
    found = register_given(session, (n, dim), repeats, pair.get(session.pid), scaling)
    return found["seconds"], found["waits"], found["bytes"]


def register_given(session, shape, repeats, points=None, scaling=False):
    """Registrations of points inside a session.

    Parameters
    ----------
    session : Session
    shape : tuple of int
    repeats : int
    points : array, at an owner only

    Returns
    -------
    found : dict
        ``seconds`` of each, ``waits`` and ``bytes`` of the last, and its ``matrix``.
    """
    pair, seconds = {"moving": "remote", "static": "remote"}, []
    if points is not None:
        pair[{MOVING: "moving", STATIC: "static"}[session.pid]] = points
    for _ in range(repeats):
        session.new_run()
        start = time.perf_counter()
        found = point_registration(**pair, session=session, scaling=scaling)
        seconds.append(time.perf_counter() - start)
    ledger = session.ledger
    return {
        "seconds": seconds,
        "waits": sum(ledger.rounds.values()),
        "bytes": sum(ledger.sent.values()),
        "matrix": found[1],
    }


def pair_steps(session, n, dim, repeats):
    """Gauss-Newton steps of two owners alone, of made-up samples.

    Returns
    -------
    found : dict
        ``seconds`` and ``cpu`` of each step, of this party; ``bytes`` that it sent for
        a step, and ``before``, for the samples.
    """
    rng, p = np.random.default_rng(n), dim * (dim + 1)
    y = np.vstack([rng.uniform(-1, 1, (dim, n)), np.ones(n)])
    values, own = None, None
    if session.pid == STATIC:
        values = np.rint(y * rng.random(n) * 2.0**VALUE_BITS).astype(np.int64)
    else:
        gradient = np.rint(rng.standard_normal((dim, n)) * 1000).astype(np.int64)
        matrix = rng.standard_normal((p, p)) / n
        own = Own(gradient, matrix, np.zeros(p), y)
    steps, seconds, cpu, sent = PairSteps(session, dim, 12, p, n, n), [], [], []
    session.new_run()
    steps.share_static((dim + 1, n), values)
    for _ in range(repeats + 1):
        sent.append(sum(session.ledger.sent.values()))
        start = time.perf_counter(), time.process_time()
        steps.step(n, p, own)
        seconds.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    each = sent[1] - sent[0]
    return {"seconds": seconds[1:], "cpu": cpu[1:], "bytes": each, "before": sent[0]}


def peak_memory():
    """Largest resident size so far of each party's process, in MiB."""
    pids = {MOVING: os.getpid()}
    for parties in local._kept.values():
        pids.update({p: c.pid for p, c in parties._children.items()})
    peaks = {}
    for party, pid in sorted(pids.items()):
        with open(f"/proc/{pid}/status") as status:
            line = next(s for s in status if s.startswith("VmHWM"))
        peaks[ROLES[party]] = round(int(line.split()[1]) / 1024)
    return peaks


def beside(benchmark, secure, clear, rounds, warm=True):
    """Time `secure` and `clear` in turn; put the clear time and the ratio on record.

    Parameters
    ----------
    benchmark : fixture of pytest-benchmark
    secure, clear : callable
        without arguments.
    rounds : int
        pairs to time.
    warm : bool, optional
        run each once before, uncounted.
    """
    if warm:
        secure()
        clear()
    times = []

    def before():
        start = time.perf_counter()
        clear()
        times.append(time.perf_counter() - start)

    benchmark.pedantic(secure, setup=before, rounds=rounds, iterations=1)
    measured = benchmark.stats.stats.data if benchmark.stats else []
    pairs = [s / c for s, c in zip(measured, times, strict=False)]
    benchmark.extra_info.update(
        clear_median_s=round(float(np.median(times)), 4),
        secure_to_clear=round(float(np.median(pairs)), 2),
        peak_mib=peak_memory(),
    )
