"""MPyC inside a session: its shares, its rounds, many runs, and who misbehaves."""

import asyncio
import contextlib
import select
import socket
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from parties import local_trio, run_trio
import pins
import pytest
from scipy import stats

from dipy_ppir.mpc import link, mpyc_bridge, network
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import (
    InsecureSetupError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.fields import P61, P127
from dipy_ppir.mpc.frame import DATA, MAX_PAYLOAD, MPYC
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.meeting import Meeting
from dipy_ppir.mpc.protocols import reduce, share, share_elements
from dipy_ppir.mpc.session import Session

ALL = (MOVING, STATIC, HELPER)
BOTH = pytest.mark.parametrize("field", [P61, P127], ids=repr)
WAYS = {"direct": (HELPER, STATIC), "relayed": (HELPER,)}
#: What a round takes on a link beside the messages: run, round, end; and a message.
ROUND, MESSAGE = 9, 12
few = settings(max_examples=15)
HANGS = 300  # seconds; only a test that hangs waits so long


def secret(session, values, bound=2**20, **options):
    """The moving owner's numbers, shared."""
    values = np.asarray(values, dtype=float)
    return share(session, MOVING, values, values.shape, bound=bound, **options)


def squared(session, array, bound=2**50):
    """Squares, by MPyC."""

    async def square(mpc):
        x = mpyc_bridge.to_mpyc(array)
        return await mpyc_bridge.from_mpyc(mpc, x * x, array.field, bound=bound)

    return mpyc_bridge.run(session, square)


# -- the same shares ---------------------------------------------------------


def ints(field, n=3):
    p = field.modulus
    one = st.one_of(st.sampled_from([0, 1, 2, p - 1, p // 2]), st.integers(0, p - 1))
    return st.lists(one, min_size=n, max_size=n)


@BOTH
@given(data=st.data())
@few
def test_mpyc_recombines_our_shares(three, field, data):
    values = data.draw(ints(field))
    owner = data.draw(st.sampled_from(ALL))
    mpyc = mpyc_bridge.load()
    gf = mpyc.finfields.GF(field.modulus)

    def party(session):
        x = field.from_ints(values) if session.pid == owner else None
        part = share_elements(session, owner, x, (len(values),), field, "share")
        return field.to_ints(part).tolist()

    shares = three(party)
    for pair in [(0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        points = [(p + 1, shares[p]) for p in pair]
        assert [
            int(v) % field.modulus for v in mpyc.thresha.recombine(gf, points)
        ] == values


@BOTH
@given(data=st.data())
@few
def test_we_open_mpyc_shares(three, field, data):
    values = data.draw(ints(field))
    mpyc = mpyc_bridge.load()
    gf = mpyc.finfields.GF(field.modulus)
    rows = mpyc.thresha.random_split(gf, [gf(v) for v in values], 1, 3)

    def party(session):
        part = field.from_ints([int(v) for v in rows[session.pid]])
        array = SharedArray(field, part, 1, 0, field.modulus // 2)
        raw = session.open(array, "test-any", ALL, raw=True)
        return field.to_ints(raw).tolist()

    assert three(party) == [values] * 3


@BOTH
@pytest.mark.parametrize("kind", ["field", "integer", "fixed"])
def test_to_mpyc_and_back_sends_nothing(trio, tap, field, kind):
    x = np.array([[1.5, -2.25], [0.0, 3.0]])
    frames = tap(trio)

    def party(session):
        bits = 0 if kind == "integer" else 4
        a = secret(session, x if bits else x * 4, frac_bits=bits, bound=16, field=field)

        async def there_and_back(mpc):
            secure = mpyc_bridge.to_mpyc(a, kind)
            return await mpyc_bridge.from_mpyc(
                mpc, secure, field, frac_bits=bits, bound=16
            )

        back = mpyc_bridge.run(session, there_and_back)
        assert (back.share == a.share).all()
        assert back.frac_bits == bits

    run_trio(trio, party)
    assert [f[2] for f in frames if f[2] != MPYC] == [DATA], "the input itself"
    assert {len(f[4]) for f in frames if f[2] == MPYC} == {ROUND}, "the end"


def test_products_and_comparisons(three):
    x, y = np.array([3, -4, 0, 100]), np.array([5, 2, 0, -100])

    def party(session):
        a = share(session, MOVING, x, (4,), bound=128, field=P127)
        b = share(session, STATIC, y, (4,), bound=128, field=P127)

        async def compute(mpc):
            u, v = mpyc_bridge.to_mpyc(a, "integer"), mpyc_bridge.to_mpyc(b, "integer")
            product = await mpyc_bridge.from_mpyc(mpc, u * v, P127, bound=2**14)
            less = await mpyc_bridge.from_mpyc(mpc, u < v, P127, bound=1)
            return product, less

        product, less = mpyc_bridge.run(session, compute)
        return (
            session.open(product, "test-any", ALL),
            session.open(less, "test-any", ALL),
            # our own step afterwards: both sides left the wires in order
            session.open(reduce(session, a * b), "test-any", ALL),
        )

    for product, less, own in three(party):
        assert (product == x * y).all()
        assert (less == (x < y)).all()
        assert (own == x * y).all()


def test_fixed_point_products(three):
    x, y = np.array([0.5, -1.25, 3.0]), np.array([2.5, 1.5, -0.125])

    def party(session):
        a = share(session, MOVING, x, (3,), frac_bits=16, bound=8, field=P127)
        b = share(session, STATIC, y, (3,), frac_bits=16, bound=8, field=P127)

        async def compute(mpc):
            u, v = mpyc_bridge.to_mpyc(a, "fixed"), mpyc_bridge.to_mpyc(b, "fixed")
            return await mpyc_bridge.from_mpyc(mpc, u * v, P127, frac_bits=16, bound=64)

        return session.open(mpyc_bridge.run(session, compute), "test-any", ALL)

    for product in three(party):
        assert np.abs(product - x * y).max() <= 2.0**-15


def test_degree_one_and_a_known_kind_are_needed():
    array = SharedArray(P61, P61.zeros((1,)), 2, 0, 1)
    with pytest.raises(ValueError, match="reduce the degree"):
        mpyc_bridge.to_mpyc(array)
    array.degree = 1
    with pytest.raises(ValueError, match="'field', 'integer' or 'fixed'"):
        mpyc_bridge.to_mpyc(array, "float")


# -- what crosses the wire ---------------------------------------------------


def test_messages_are_uniform(trio, tap):
    frames = tap(trio)
    run_trio(trio, lambda session: squared(session, secret(session, np.ones(1500))))
    sent = [f for f in frames if f[2] == MPYC and len(f[4]) > ROUND]
    assert len(sent) == 6, "one message on each link and way"
    for *_, payload in sent:
        raw = np.frombuffer(payload[-1500 * 8 :], dtype=np.uint8).reshape(1500, 8)
        middle = raw[:, 3] >> 4
        # Six tests: by chance one of them fails in 2e9 runs.
        assert stats.chisquare(np.bincount(middle, minlength=16)).pvalue > 1e-10


def is_square(a, p):
    return pow(a, (p - 1) // 2, p) == 1


@BOTH
@pytest.mark.parametrize("arrays", [True, False], ids=["arrays", "numbers"])
def test_an_opened_product_does_not_show_its_factors(trio, tap, field, arrays):
    """Its parabola would be the product of two lines, and its discriminant a square."""
    n, p = 200, field.modulus
    frames = tap(trio)

    def party(session):
        a = secret(session, np.arange(1.0, n + 1), field=field)

        async def compute(mpc):
            rt = mpyc_bridge._here.runtime
            x = await mpc.gather(mpyc_bridge.to_mpyc(a))
            if arrays:
                product = x * rt._np_randoms(type(x[0]), n)
            else:
                randoms = rt._randoms(type(x[0]), n)
                product = [u * v for u, v in zip(x, randoms, strict=True)]
            await rt.output(product, threshold=2)

        mpyc_bridge.run(session, compute)

    run_trio(trio, party)
    size = field.words * 8 * n
    sent = {f[0]: f[4] for f in frames if f[2] == MPYC and len(f[4]) > size}
    points = []
    for pid in ALL:
        raw = sent[pid][-size:]
        step = size // n
        points.append(
            [int.from_bytes(raw[i : i + step], "little") for i in range(0, size, step)]
        )
    squares = 0
    for h1, h2, h3 in zip(*points, strict=True):
        # h = c0 + c1 x + c2 x^2 through (1, h1), (2, h2), (3, h3).
        c2 = (h1 - 2 * h2 + h3) * pow(2, -1, p)
        c1 = h2 - h1 - 3 * c2
        squares += is_square((c1 * c1 - 4 * (h1 - c1 - c2) * c2) % p, p)
    # By chance half of them: so far off in one of 1e12 runs.
    assert n / 4 < squares < 3 * n / 4


def test_no_two_runs_use_the_same_random_numbers(trio, tap):
    """The same computation of the same shares looks different each time."""
    frames = tap(trio)

    def party(session):
        array = secret(session, np.ones(50))
        for _ in range(5):
            squared(session, array)

    run_trio(trio, party)
    messages = [f[4][ROUND + MESSAGE :] for f in frames if f[2] == MPYC]
    messages = [m for m in messages if m]
    assert len(messages) == len(set(messages)) == 5 * 6


def test_rounds_and_bytes_are_in_the_ledger(trio):
    """A product takes one round, and one that ends the run."""

    def party(session):
        array = secret(session, np.ones(10))
        with session.phase("squares"):
            squared(session, array)
            squared(session, array)
        ledger = session.ledger
        return ledger.rounds["squares"], ledger.sent_by_phase()["squares"]

    # Each party sends to both others: 10 elements of 61 bits, as 8 bytes each.
    each = 2 * (ROUND + MESSAGE + 10 * 8) + 2 * ROUND
    assert run_trio(trio, party) == [(4, 2 * each)] * 3


def test_batches_larger_than_a_frame(trio, monkeypatch):
    monkeypatch.setitem(MAX_PAYLOAD, MPYC, ROUND + MESSAGE + 40)

    def party(session):
        # Also one that fills its last frame.
        for n in (5, 100, 8):
            array = squared(session, secret(session, np.full(n, 7.0)))
            assert session.open(array, "test-any", ALL).tolist() == [49] * n
        return True

    assert run_trio(trio, party) == [True] * 3


def test_the_number_of_rounds_does_not_depend_on_the_numbers(three):
    def party(session, values):
        a = share(session, MOVING, values, (3,), bound=2**20, field=P127)

        async def compare(mpc):
            x = mpyc_bridge.to_mpyc(a, "integer")
            return await mpyc_bridge.from_mpyc(mpc, x < 5, P127, bound=1)

        with session.phase("comparison"):
            mpyc_bridge.run(session, compare)
        return session.ledger.rounds["comparison"]

    counts = {
        n
        for values in ([0, 0, 0], [5, -5, 1], [2**20, -(2**20), 12345])
        for n in three(party, np.array(values))
    }
    assert len(counts) == 1


# -- many runs ---------------------------------------------------------------


def many_runs(session, count, pause=lambda run: None):
    """Alternate MPyC and our own steps; what a run leaves unawaited included."""
    total = secret(session, np.arange(4.0), field=P127, bound=2**30)
    for run in range(count):
        pause(run)

        async def step(mpc, total=total, run=run):
            x = mpyc_bridge.to_mpyc(total, "integer")
            x * x * x  # begun, and not waited for
            y = x * (x - x + 1) + run
            if run % 3:
                y = y + (x < x)
            return await mpyc_bridge.from_mpyc(mpc, y, P127, bound=2**30)

        total = mpyc_bridge.run(session, step)
        if run % 2:
            one = share(session, STATIC, np.ones(4), (4,), field=P127)
            total = reduce(session, total * one)
            total.bound = 2**30
    return session.open(total, "test-any", ALL).tolist()


def test_many_runs(trio):
    expected = (np.arange(4) + sum(range(12))).tolist()
    assert run_trio(trio, many_runs, 12) == [expected] * 3


@pytest.mark.parametrize("slow", ALL)
def test_a_party_that_comes_late_to_every_run(trio, slow):
    """The others are far ahead by then, and their messages wait."""

    def party(session):
        def pause(run):
            if session.pid == slow:
                time.sleep(0.01)

        return many_runs(session, 12, pause)

    expected = (np.arange(4) + sum(range(12))).tolist()
    assert run_trio(trio, party) == [expected] * 3


@pytest.mark.parametrize(
    "way", [pytest.param("direct", marks=pytest.mark.heavy), "relayed"]
)
def test_a_hundred_runs_over_tls_with_a_slow_party(way):
    plan = pins.plan(WAYS[way])

    def party(pid):
        meeting = Meeting(plan, pins.identity(pid))
        meeting.hold()
        with Session.of_meeting(meeting) as session:

            def pause(run):
                # Now one is late, now another.
                if session.pid == run // 7 % 3:
                    time.sleep(0.005)

            return many_runs(session, 100, pause)

    results = pins.together(*(lambda p=p: party(p) for p in ALL), seconds=1200)
    assert results == [(np.arange(4) + sum(range(100))).tolist()] * 3


def test_what_is_not_waited_for_ends_with_the_run(trio):
    """Also where one party needs a result and another one does not."""

    def party(session):
        array = secret(session, np.full(3, 3.0))
        left = []

        async def begin(mpc):
            x = mpyc_bridge.to_mpyc(array)
            left.append(mpc.gather(x * x * x))

        mpyc_bridge.run(session, begin)
        (cubes,) = left
        assert cubes.done()
        share = P61.from_ints(np.asarray(cubes.result().value, dtype=object))
        return session.open(SharedArray(P61, share, 1, 0, 30), "test-any", ALL).tolist()

    assert run_trio(trio, party) == [[27] * 3] * 3


# -- who misbehaves ----------------------------------------------------------


def messing(session, change):
    """Let this party send something else than its batches."""
    send = session.network.send_mpyc
    session.network.send_mpyc = lambda peer, batch: send(peer, change(bytes(batch)))


def stray(label, size=3):
    """A message that nobody waits for."""
    return mpyc_bridge._LABEL.pack(label, size) + bytes(size)


BATCHES = {
    # name: (what becomes of the static owner's batches, what the others say)
    "nothing": (lambda raw: b"", "truncated"),
    "less than a header": (lambda raw: raw[: ROUND - 1], "truncated"),
    "less than a label": (lambda raw: raw[: ROUND + 5], "truncated"),
    "less than its length": (lambda raw: raw[: len(raw) - 1], "truncated"),
    "twice": (lambda raw: raw + raw[ROUND:], "sent a message twice"),
    "another round": (lambda raw: b"\7" + raw[1:], "at another step"),
    "undelivered": (
        lambda raw: raw + stray(3) if len(raw) > ROUND else raw,
        "what nobody had asked for",
    ),
    "a shorter message": (
        lambda raw: (
            raw[:ROUND] + raw[ROUND : ROUND + 8] + b"\x08\0\0\0" + bytes(8)
            if len(raw) > ROUND
            else raw
        ),
        "8 bytes where 24 were due",
    ),
    "many nobody asked for": (
        lambda raw: raw + b"".join(map(stray, range(5000))),
        "more than it was asked for",
    ),
    "large ones nobody asked for": (
        lambda raw: raw + b"".join(stray(i, 1 << 24) for i in range(5)),
        "more than it was asked for",
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_are_refused(trio, outcomes, name):
    change, text = BATCHES[name]

    def party(session):
        array = secret(session, np.ones(3))
        if session.pid == STATIC:
            messing(session, change)
        return squared(session, array)

    errors = outcomes(trio, party)
    refused = [errors[p] for p in (MOVING, HELPER) if type(errors[p]) is ProtocolError]
    assert refused
    for error in refused:
        assert error.culprit == STATIC
        assert "party 1 (static owner)" in str(error)
        assert text in str(error)
    for pid in (MOVING, HELPER):
        assert isinstance(errors[pid], PeerError)


def test_a_flood_is_cut_off(trio, outcomes, monkeypatch):
    monkeypatch.setitem(MAX_PAYLOAD, MPYC, 1 << 10)
    for module in (link, network):
        monkeypatch.setattr(module, "MAX_BACKLOG", 1 << 14)

    def party(session):
        array = secret(session, np.ones(3))
        if session.pid == STATIC:
            messing(session, lambda raw: raw + stray(1, 1 << 20))
        return squared(session, array)

    errors = outcomes(trio, party)
    for pid in (MOVING, HELPER):
        assert isinstance(errors[pid], PeerError)
    refused = [e for e in errors if type(e) is ProtocolError]
    assert refused
    for error in refused:
        assert error.culprit == STATIC
        assert "more than it was asked for" in str(error)


def test_parties_at_different_computations(trio, outcomes):
    """Who waits for what nobody sends is told so, at once."""

    def party(session):
        array = secret(session, np.ones(3))

        async def compute(mpc):
            x = mpyc_bridge.to_mpyc(array)
            if session.pid == STATIC:
                x = x + 1  # no message
            else:
                x = x * x
            return await mpyc_bridge.from_mpyc(mpc, x, P61, bound=4)

        return mpyc_bridge.run(session, compute)

    errors = outcomes(trio, party)
    for error in errors:
        assert isinstance(error, PeerError | ProtocolError), error
        assert not isinstance(error, PeerTimeoutError)
    assert any(
        "what no party sends" in str(e) or "nobody had asked for" in str(e)
        for e in errors
    )


def test_a_party_that_is_never_done(trio, outcomes, monkeypatch):
    """It says in every round that it sends something to somebody else."""
    monkeypatch.setattr(mpyc_bridge, "MAX_IDLE", 20)

    def party(session):
        array = secret(session, np.ones(3))
        if session.pid != STATIC:
            return squared(session, array)
        for step in range(10_000):
            batch = mpyc_bridge._ROUND.pack(step, mpyc_bridge.BUSY)
            for peer in session.peers:
                session.network.send_mpyc(peer, batch)
            session.network.receive_mpyc(session.peers)

    errors = outcomes(trio, party)
    assert any("what no party sends" in str(e) for e in errors)
    for error in errors:
        assert isinstance(error, PeerError | ProtocolError), error


def test_a_message_a_round_does_not_hold_the_others_for_ever(trio, outcomes):
    """One that nobody asked for is no progress."""

    def party(session):
        array = secret(session, np.ones(3))
        if session.pid != STATIC:
            return squared(session, array)
        for step in range(100_000):
            batch = mpyc_bridge._ROUND.pack(step, mpyc_bridge.BUSY) + stray(step, 0)
            for peer in session.peers:
                session.network.send_mpyc(peer, batch)
            session.network.receive_mpyc(session.peers)

    for error in outcomes(trio, party):
        assert isinstance(error, PeerError), error


def test_who_says_different_things_to_the_others(trio, outcomes):
    """Done to one, not done to the other: neither of those blames the other alone."""

    def party(session):
        array = secret(session, np.ones(3))
        if session.pid == STATIC:
            send = session.network.send_mpyc

            def lie(peer, batch):
                if peer == HELPER and batch[ROUND - 1] & mpyc_bridge.DONE:
                    batch = batch[: ROUND - 1] + bytes([mpyc_bridge.BUSY])
                send(peer, batch)

            session.network.send_mpyc = lie
        for _ in range(3):
            array = squared(session, array)
        return session.open(array, "test-any", ALL)

    errors = outcomes(trio, party)
    assert errors[HELPER].culprit is None
    assert "did not say the same to all" in str(errors[HELPER])
    assert errors[MOVING].culprit is None
    assert "what the parties compute differs" in str(errors[MOVING])


def test_tasks_of_the_callers_own(three):
    """Each counts on its own: in whatever order they go on, labels are the same."""

    def party(session):
        a = secret(session, np.arange(3.0), field=P127)

        async def cubes(mpc, x, turns):
            for _ in range(turns):
                await asyncio.sleep(0)
            y = x * x * x
            return await mpyc_bridge.from_mpyc(mpc, y, P127, bound=2**30)

        async def compute(mpc):
            x = mpyc_bridge.to_mpyc(a, "integer")
            # More turns at one party than at another.
            first, second = session.pid, 2 - session.pid
            return await asyncio.gather(cubes(mpc, x, first), cubes(mpc, x + 1, second))

        both = mpyc_bridge.run(session, compute)
        return [session.open(one, "test-any", ALL).tolist() for one in both]

    assert three(party) == [[[0, 1, 8], [1, 8, 27]]] * 3


def test_errors_get_to_a_callers_own_tasks(three):
    """As in any program: what fails can be caught, and what is open is closed."""

    def party(session):
        a, closed = secret(session, np.arange(3.0)), []

        async def failing(mpc, x):
            await mpc.gather(x * x)
            raise KeyError("mine")

        async def compute(mpc):
            x = mpyc_bridge.to_mpyc(a)
            try:
                await asyncio.ensure_future(failing(mpc, x))
            except KeyError:
                closed.append(1)
            return await mpyc_bridge.from_mpyc(mpc, x * x, P61, bound=9)

        square = mpyc_bridge.run(session, compute)
        return closed, session.open(square, "test-any", ALL).tolist()

    assert three(party) == [([1], [0, 1, 4])] * 3


def test_division_in_a_field_is_refused(trio, outcomes):
    def party(session):
        array = secret(session, np.ones(3))

        async def compute(mpc):
            x = mpyc_bridge.to_mpyc(array)
            return await mpyc_bridge.from_mpyc(mpc, x / x, P61, bound=2)

        return mpyc_bridge.run(session, compute)

    for error in outcomes(trio, party, stop=False):
        assert type(error) is ValueError
        assert "which divisors are zero" in str(error)


def test_what_is_too_large_for_one_batch_is_not_begun(trio, outcomes, monkeypatch):
    monkeypatch.setattr(mpyc_bridge, "MAX_BATCH", 1000)

    def party(session):
        return squared(session, secret(session, np.ones(500)))

    for error in outcomes(trio, party, stop=False):
        assert type(error) is ValueError
        assert "compute in pieces" in str(error)


def test_timers_are_refused(trio, outcomes):
    def party(session):
        async def compute(mpc):
            await asyncio.sleep(5)

        return mpyc_bridge.run(session, compute)

    for error in outcomes(trio, party, stop=False):
        assert type(error) is RuntimeError
        assert "MPyC's values only" in str(error)


def test_a_session_closed_within_a_computation(trio, outcomes):
    """The loop that runs is left to its end; the error is the caller's."""

    def party(session):
        async def compute(mpc):
            session.fail(KeyError("mine"))
            raise KeyError("mine")

        try:
            mpyc_bridge.run(session, compute)
        finally:
            session.close()

    for error in outcomes(trio, party):
        assert type(error) is KeyError


def test_an_interrupt(trio, outcomes):
    """What was under way is given up; nothing is left behind."""

    class Interrupt(BaseException):
        pass

    def party(session):
        array = secret(session, np.ones(3))
        if session.pid == MOVING:

            def interrupted(peers):
                raise Interrupt

            session.network.receive_mpyc = interrupted
        return squared(session, array)

    errors = outcomes(trio, party)
    assert type(errors[MOVING]) is Interrupt
    for pid in (STATIC, HELPER):
        assert isinstance(errors[pid], PeerError)
        assert errors[pid].culprit == MOVING
        assert not isinstance(errors[pid], PeerTimeoutError)


def test_a_copy_of_the_process_is_refused(trio, monkeypatch):
    """It would use the same random numbers."""
    run_trio(trio, lambda session: squared(session, secret(session, np.ones(2))))
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(InsecureSetupError, match="forked process"):
        mpyc_bridge.run(trio[MOVING], None)


def test_threshold_zero_is_refused():
    sessions = local_trio(threshold=0, insecure=True)
    with pytest.raises(InsecureSetupError, match="threshold 1"):
        mpyc_bridge.run(sessions[MOVING], None)
    for session in sessions:
        session.close()


def test_a_closed_session(trio):
    run_trio(trio, lambda session: squared(session, secret(session, np.ones(2))))
    trio[MOVING].close()
    with pytest.raises(ValueError, match="have ended"):
        mpyc_bridge.run(trio[MOVING], None)


@pytest.fixture
def against_static(trio, outcomes):
    """Let the static owner misbehave while the other two square an array.

    ``against_static(misbehave, seconds)``: what became of moving owner and helper.
    The static owner calls ``misbehave(session, array)`` and stays until both have
    ended.
    """

    def run(misbehave, seconds=300):
        ready, ended = threading.Barrier(3), threading.Semaphore(0)

        def party(session):
            array = secret(session, np.ones(40))
            session.network.timeout = seconds
            ready.wait(HANGS)
            if session.pid == STATIC:
                misbehave(session, array)
                for _ in range(2):
                    assert ended.acquire(timeout=HANGS)
                session.close()
                return None
            try:
                result = squared(session, array)
                session.close()
                return result
            finally:
                ended.release()

        results = outcomes(trio, party)
        assert results[STATIC] is None, results[STATIC]
        return results[MOVING], results[HELPER]

    return run


def test_silence_times_out(against_static, clock):
    """Whoever times out first tells the other, if that has not timed out as well.

    The clock stands still until both have said what they have to.
    """
    results = against_static(lambda *_: clock.pass_by(40, parties=2), seconds=40)
    for error in results:
        assert isinstance(error, PeerError), error
        assert error.culprit == STATIC
    assert any(type(error) is PeerTimeoutError for error in results)


@pytest.mark.parametrize("when", ["before", "meanwhile", "with a farewell"])
def test_death_is_noticed_at_once(against_static, when):
    """Before the others have sent anything, or when both wait for an answer."""

    def misbehave(session, array):
        links = session.network.links.values()
        if when == "with a farewell":
            return session.network.close()
        if when == "meanwhile":
            for link in links:
                assert select.select([link.sock], [], [], HANGS)[0]
        # As the kernel does it when a process is killed.
        for link in links:
            link.sock.shutdown(socket.SHUT_RDWR)
            link.sock.close()
        session.network.closed = True

    for error in against_static(misbehave):
        assert isinstance(error, PeerError), error
        assert type(error) is not PeerTimeoutError
        assert error.culprit == STATIC


def test_an_error_in_a_computation_ends_it_everywhere(trio, outcomes):
    def party(session):
        array = secret(session, np.ones(3))

        async def compute(mpc):
            x = mpyc_bridge.to_mpyc(array)
            y = x * x
            if session.pid == HELPER:
                raise KeyError("mine")
            return await mpyc_bridge.from_mpyc(mpc, y * y, P61, bound=4)

        try:
            mpyc_bridge.run(session, compute)
        finally:
            if session.pid == HELPER:
                # Not even by whoever catches the error can it be gone on with.
                with pytest.raises(ValueError, match="have ended"):
                    mpyc_bridge.run(session, compute)

    errors = outcomes(trio, party)
    assert type(errors[HELPER]) is KeyError
    for pid in (MOVING, STATIC):
        assert isinstance(errors[pid], PeerError | PeerLostError)


def test_an_error_inside_mpyc_is_raised(trio, outcomes):
    """MPyC's own tasks raise in the loop, where nobody would see it."""

    def party(session):
        array = secret(session, np.ones(3))

        async def compute(mpc):
            x = mpyc_bridge.to_mpyc(array)

            @mpc.coroutine
            async def broken(y):
                await mpc.returnType((type(x), (3,)))
                await mpc.gather(y)
                raise ArithmeticError("inside")

            return await mpyc_bridge.from_mpyc(mpc, broken(x * x), P61, bound=4)

        return mpyc_bridge.run(session, compute)

    for error in outcomes(trio, party, stop=False):
        assert type(error) is ArithmeticError


CLOSED = [
    "output",
    "peek",
    "transfer",
    "shutdown",
    "start",
    "run",
    "parties",
    "_reshare",
]
CLOSED += ["is_zero_public", "np_is_zero_public", "_rt", "_recv_message"]
CLOSED += ["statistics", "seclist", "SecGrp", "reciprocal", "np_reciprocal"]


@pytest.mark.parametrize("name", CLOSED)
def test_mpyc_cannot_open_behind_the_ledger(trio, outcomes, name):
    def party(session):
        async def peek(mpc):
            return getattr(mpc, name)

        return mpyc_bridge.run(session, peek)

    for error in outcomes(trio, party, stop=False):
        assert type(error) is AttributeError
        assert "could go around the session's ledger" in str(error)


def test_pickle_is_inert():
    mpyc = mpyc_bridge.load()
    found = 0
    for module in vars(mpyc).values():
        if hasattr(module, "pickle"):
            found += 1
            for function in (module.pickle.loads, module.pickle.dumps):
                with pytest.raises(ProtocolError, match="would unpickle"):
                    function(b"\x80\x04N.")
    assert found, "MPyC no longer imports pickle under that name: look again"
    import pickle

    assert pickle.loads(pickle.dumps(1)) == 1, "everybody else's must still work"


def test_a_pickle_from_a_peer_is_not_loaded(against_static, tmp_path):
    """The static owner answers MPyC with a pickle that would touch a file."""
    import pickle

    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    bomb, sent = pickle.dumps(Bomb()), []

    def misbehave(session, array):
        def put(raw):
            if len(raw) == ROUND:
                return raw
            sent.append(raw)
            # Of the length that is due: others are refused before.
            return raw[: ROUND + MESSAGE] + bomb.ljust(40 * 8, b".")

        messing(session, put)
        with contextlib.suppress(PeerError):
            squared(session, array)

    against_static(misbehave)
    assert len(sent) == 2
    assert not mark.exists()
    pickle.loads(bomb).close()
    assert mark.exists(), "the test could not have failed"
