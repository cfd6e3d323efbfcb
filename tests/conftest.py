"""Fixtures: three parties in threads, what crosses their wires, small images."""

from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
import subprocess
import sys
import time

from copies import Copies
from hypothesis import HealthCheck, settings
import noise
import numpy as np
from parties import local_pair, local_trio, run_trio
import pytest
from scipy import ndimage
from wire import Clock, Wire, set_clock

from dipy_ppir.mpc import local
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import R32, R64
from dipy_ppir.mpc.frame import DATA, MPYC
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, declare

# The same examples in every run, so that a change is what breaks a test; new ones with
# `make test-full`. How long an example takes says something of the machine only.
_patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, **_patient)
settings.register_profile("new", derandomize=False, **_patient)
settings.load_profile("fixed")

#: Seconds of silence that end a test; no machine is that busy.
PATIENCE = 300

declare("test-any", (0, 1, 2), "any", "what a test opens to whom it likes", 128)
declare("test-moving", (0,), "any", "what a test opens to the moving owner", 128)


def _descendants(pid):
    """Numbers of all living processes below `pid`."""
    found, folder = [], f"/proc/{pid}/task"
    try:
        tasks = os.listdir(folder)
    except OSError:  # it has ended
        return found
    for task in tasks:
        try:
            direct = Path(folder, task, "children").read_text().split()
        except OSError:
            continue
        for child in map(int, direct):
            found += [child, *_descendants(child)]
    return found


@pytest.fixture(scope="session")
def descendants():
    """Living processes below a process."""
    return _descendants


@pytest.fixture(scope="session", autouse=True)
def no_child_left_behind():
    """Fail the run if a process that it started outlives it.

    Parties are copies of one of them, where there is a system whose libraries can be
    copied along; how they are started else is tested by commands, and in test_local.
    """
    before, copies = set(_descendants(os.getpid())), Copies()
    if sys.platform == "linux":
        local.subprocess = copies
    yield
    local.close_local_parties()
    local.subprocess = subprocess
    copies.close()
    deadline = time.monotonic() + 120
    while left := set(_descendants(os.getpid())) - before:
        assert time.monotonic() < deadline, f"processes left behind: {left}"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def same_checks(monkeypatch):
    """Without this, chance decides whether a sum that wraps is noticed."""
    noise.fix_checks(monkeypatch)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    clock = Clock()
    set_clock(monkeypatch, clock)
    return clock


@pytest.fixture
def wire():
    """A network whose one peer the test plays."""
    wire = Wire()
    yield wire
    wire.close()


@pytest.fixture
def trio():
    """Three sessions, to be run in threads."""
    sessions = local_trio(timeout=PATIENCE)
    yield sessions
    for session in sessions:
        session.close()


@pytest.fixture(scope="session")
def three():
    """Run ``function(session, *args)`` at three fresh parties; their results."""

    def run(function, *args, **options):
        sessions = local_trio(**{"timeout": PATIENCE, **options})
        try:
            return run_trio(sessions, function, *args)
        finally:
            for session in sessions:
                session.close()

    return run


@pytest.fixture
def duo():
    """Two sessions of owners alone, to be run in threads."""
    sessions = local_pair(timeout=PATIENCE)
    yield sessions
    for session in sessions:
        session.close()


@pytest.fixture(scope="session")
def two():
    """Run ``function(session, *args)`` at two owners alone; their results."""

    def run(function, *args, **options):
        sessions = local_pair(**{"timeout": PATIENCE, **options})
        try:
            return run_trio(sessions, function, *args)
        finally:
            for session in sessions:
                session.close()

    return run


@pytest.fixture(scope="session")
def outcomes():
    """Like `run_trio`, but return what each party returned or raised."""

    def run(sessions, function, *args, stop=True):
        def one(session):
            try:
                return function(session, *args)
            except BaseException as exc:
                if stop:
                    session.fail(exc)
                return exc

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(one, sessions))

    return run


@pytest.fixture(scope="session")
def tap():
    """Record every frame that sessions send: (from, to, kind, op, payload)."""

    def listen(sessions):
        frames = []
        for session in sessions:
            inner = session.network._send_frame

            def send(peer, kind, op, payload, *, pid=session.pid, inner=inner):
                frames.append((pid, peer, kind, op, bytes(payload)))
                inner(peer, kind, op, payload)

            session.network._send_frame = send
        return frames

    return listen


@pytest.fixture(scope="session")
def payload_bytes():
    """Payload bytes of recorded frames, metadata left out."""
    return lambda frames: sum(len(f[4]) for f in frames if f[2] in (DATA, MPYC))


@pytest.fixture(scope="session")
def depth():
    """Count rounds: the longest chain of messages, each sent after the one before.

    ``depth(sessions)`` returns a function that says how long it is so far. Only
    for arrays that fit one frame.
    """

    def watch(sessions):
        clocks = defaultdict(int)
        under_way = defaultdict(deque)

        def follow(network, pid):
            send, receive_all = network._send_frame, network.receive_all
            receive_json = network.receive_json

            def heard(peer):
                clocks[pid] = max(clocks[pid], under_way[peer, pid].popleft())

            def sending(peer, *frame):
                under_way[pid, peer].append(clocks[pid] + 1)
                send(peer, *frame)

            def receiving(arrays, name):
                receive_all(arrays, name)
                for peer, given in arrays.items():
                    for _ in given if isinstance(given, list) else [given]:
                        heard(peer)

            def receiving_json(peer, name):
                received = receive_json(peer, name)
                heard(peer)
                return received

            network._send_frame, network.receive_all = sending, receiving
            network.receive_json = receiving_json

        for session in sessions:
            follow(session.network, session.pid)
        return lambda: max(clocks.values(), default=0)

    return watch


@pytest.fixture(scope="session")
def ring_array():
    """One party's part of an array in a ring whose integers the test knows.

    With `owners` the helper's part is zero, as the owners hold what
    `truncate_between_owners` returns.
    """

    def make(session, values, *, frac_bits=0, bound=None, owners=False, ring=R64):
        total = ring.encode_int(values) if ring is R32 else ring.from_ints(values)
        parts = np.random.default_rng(3).integers(
            0, ring.modulus, (3, *total.shape), dtype=ring.dtype
        )
        if owners:
            parts[HELPER] = 0
        parts[MOVING] = total - parts[STATIC] - parts[HELPER]
        bound = ring.modulus // 2 - 1 if bound is None else bound
        return SharedArray(ring, parts[session.pid], 2, frac_bits, bound)

    return make


def smooth(seed, shape, sigma):
    """A random smooth image within [0, 1]."""
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
    image -= image.min()
    return image / image.max()


@pytest.fixture(scope="session")
def images():
    """Related pairs of small images, by dimension: static, moving, affines.

    The moving image is larger than 0 everywhere, so that what is interpolated
    outside it lies outside its range.
    """

    def make(dim):
        shape = (40, 36) if dim == 2 else (22, 20, 18)
        static = smooth(1, shape, 4.0 if dim == 2 else 2.5)
        moving = 0.1 + np.sqrt(ndimage.shift(static, 0.7, order=1, mode="nearest"))
        moving = moving[tuple(slice(0, n - 1) for n in shape)]
        static_grid2world = np.diag([1.5, 1.0, 1.2][:dim] + [1.0])
        static_grid2world[:dim, dim] = -3.0
        moving_grid2world = np.diag([1.4, 1.1, 1.0][:dim] + [1.0])
        moving_grid2world[:dim, dim] = -2.0
        moving_grid2world[0, 1] = 0.1
        return static, moving, static_grid2world, moving_grid2world

    return make


@pytest.fixture(scope="session")
def bodies():
    """Pairs for whole registrations: a body on a background of zero, which two
    grids see from slightly different places, with different contrast."""

    def make(dim):
        shape = (44, 40) if dim == 2 else (26, 24, 22)
        rng = np.random.default_rng(7)
        centre = (np.array(shape) - 1) / 2
        blobs = [(centre, np.array(shape) / 6.5, 1.0)]
        for _ in range(6):
            where = centre + rng.uniform(-0.2, 0.2, dim) * shape
            blobs.append(
                (where, rng.uniform(0.06, 0.1, dim) * shape, rng.uniform(-0.6, 0.8))
            )

        def see(shape, matrix):
            at = np.indices(shape).reshape(dim, -1)
            at = (matrix @ np.vstack([at, np.ones(at.shape[1])]))[:dim].T
            body = sum(
                h * np.exp(-(((at - c) / w) ** 2).sum(axis=1) / 2) for c, w, h in blobs
            )
            return np.maximum(body - 0.05, 0).reshape(shape)

        static_grid2world = np.eye(dim + 1)
        moving_grid2world = np.diag([1.1, 0.95, 1.05][:dim] + [1.0])
        moving_grid2world[:dim, dim] = [-1.0, 0.5, -0.5][:dim]
        truth = np.eye(dim + 1)
        truth[0, 1], truth[1, 0] = 0.05, -0.04
        truth[:dim, dim] = [0.9, -0.7, 0.5][:dim]
        static = see(shape, static_grid2world)
        moving = np.sqrt(see(shape, truth @ moving_grid2world))
        return static, moving, static_grid2world, moving_grid2world

    return make
