"""Sums over sites: what comes out, what is sent, what a site sees, and who lies."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from parties import run_trio
import pytest
from scipy import stats
from summing import local_sites

from dipy_ppir.mpc import mpyc_bridge, sums
from dipy_ppir.mpc.errors import (
    FixedPointOverflowError,
    InsecureSetupError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
    UndeclaredOpeningError,
)
from dipy_ppir.mpc.fields import P127
from dipy_ppir.mpc.frame import DATA, JSON, WAITING
from dipy_ppir.mpc.planfile import LEAST_SITES
from dipy_ppir.mpc.protocols import share
from dipy_ppir.mpc.session import Session

LEAST = 1e-9  # p-values below say that numbers are not uniform; 22 are computed


@pytest.fixture
def sites():
    """A function that makes sessions of so many sites."""
    made = []

    def make(count):
        sessions = local_sites(count)
        made.extend(sessions)
        return sessions

    yield make
    for session in made:
        session.close()


def vectors(count, shape, least=0, most=1000, seed=0):
    return np.random.default_rng(seed).integers(least, most, (count, *shape))


def add_up(session, own, most=10**6, **options):
    return session.total(own[session.pid], "test-sum", most, **options)


@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("shape", [(1,), (2,), (6, 5), (3, 4, 5)])
def test_every_site_gets_the_sum(sites, count, shape):
    own = vectors(count, shape)
    for total in run_trio(sites(count), add_up, own):
        assert total.dtype == np.int64
        np.testing.assert_array_equal(total, own.sum(axis=0))


@pytest.mark.parametrize("largest", [2**31 - 1, 2**40, 2**62])
def test_signed_numbers_up_to_the_bound(sites, largest):
    """In the ring of 32 bits as long as all sums fit, else in that of 64."""
    most = largest // 3
    own = vectors(3, (50,), -most, most)
    own[:, 0], own[:, 1] = most, -most
    sessions = sites(3)
    totals = run_trio(sessions, lambda s: add_up(s, own, most, signed=True))
    for total in totals:
        np.testing.assert_array_equal(total, own.sum(axis=0))
    word = 4 if largest < 2**31 else 8
    payload = sum(s.ledger.sent["sums", p] for s in sessions for p in s.peers)
    assert payload == 2 * 2 * 50 * word + 66 * 6


def test_the_same_as_by_mpyc(sites, three):
    """MPyC's secure integers, as Shamir shares among three parties, add up alike."""
    own = vectors(3, (12,), -5000, 5000)

    def by_mpyc(session):
        shared = [
            share(session, o, own[o].astype(float), (12,), bound=5000, field=P127)
            for o in range(3)
        ]
        (total,) = mpyc_bridge.evaluate(
            session, lambda mpc, *x: [sum(x)], shared, [15000], kind="integer"
        )
        return session.open(total, "test-any", (0, 1, 2))

    theirs = three(by_mpyc)
    ours = run_trio(sites(3), lambda s: add_up(s, own, 5000, signed=True))
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(np.rint(a).astype(int), b)


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("size", [2, 40])
def test_rounds_and_bytes(sites, depth, count, size):
    """As the module's table says."""
    sessions = sites(count)
    rounds = depth(sessions)
    run_trio(sessions, add_up, vectors(count, (size,)))
    sent = sum(sum(s.ledger.sent.values()) for s in sessions)
    words = 2 * (count - 1) if size >= count else count * (count - 1)
    assert sent == 4 * size * words + 66 * count * (count - 1)
    assert rounds() == (3 if size >= count else 2)


def test_long_vectors_go_in_pieces(sites, monkeypatch):
    monkeypatch.setattr(sums, "PIECE", 64)
    own = vectors(3, (10, 11))
    for total in run_trio(sites(3), add_up, own):
        np.testing.assert_array_equal(total, own.sum(axis=0))


def test_the_ledger_knows_every_opening(sites):
    sessions = sites(4)
    run_trio(sessions, lambda s: add_up(s, vectors(4, (30,)), 1023, within=(0, 4000)))
    for session in sessions:
        learned = session.ledger.learned()
        assert list(learned) == [f"site {i}" for i in range(1, 5)]
        for (entry,) in learned.values():
            assert (entry["label"], entry["values"]) == ("test-sum", 30)
            assert entry["bits"] == pytest.approx(30 * np.log2(4 * 1023 + 1), abs=0.1)


def test_what_was_not_declared_is_not_opened(sites, tap):
    sessions = sites(3)
    frames = tap(sessions)
    with pytest.raises(UndeclaredOpeningError, match="never declared"):
        sessions[0].total(np.arange(5), "not declared", 100)
    with pytest.raises(ValueError, match="to all of them"):
        array = sums.SharedArray(sums.R32, np.zeros(4, np.uint32), 2, 0, 10)
        sessions[0].open(array, "test-sum", [1])
    with pytest.raises(FixedPointOverflowError, match="not between 0 and 100"):
        sessions[0].total(np.array([101]), "test-sum", 100)
    assert not frames


# -- what a site sees --------------------------------------------------------


def seen(frames, pid):
    """Words that a site was sent before it could know the sum, by sender."""
    found = {}
    for sender, receiver, kind, _, payload in frames:
        if receiver == pid and kind == DATA:
            found.setdefault(sender, np.frombuffer(payload, np.uint32))
    return found


def test_what_a_site_is_sent_is_uniform(sites, tap):
    """Each other site's words by themselves, whatever it has: here all zeros."""
    sessions = sites(3)
    frames = tap(sessions)
    own = np.zeros((3, 60_000), dtype=int)
    run_trio(sessions, add_up, own)
    for pid in range(3):
        for words in seen(frames, pid).values():
            assert len(words) == 20_000
            for shift in (0, 14, 28):
                counts = np.bincount(words >> shift & 15, minlength=16)
                assert stats.chisquare(counts).pvalue > LEAST


def test_what_a_coalition_is_sent_shows_the_sum_of_the_others_only(sites, tap):
    """Two of four sites take their own random numbers away; what is left of the other
    two is uniform, and adds up to the sum that they know anyway."""
    sessions = sites(4)
    frames = tap(sessions)
    inputs = vectors(4, (40_000,))
    streams = {}

    def watched(session):
        draw = session.zero_elements

        def drawing(peer, ring, shape):
            drawn = draw(peer, ring, shape)
            streams[session.pid, peer] = drawn.copy()
            return drawn

        session.zero_elements = drawing
        return add_up(session, inputs)

    run_trio(sessions, watched)
    coalition = (0, 1)
    for pid in coalition:
        piece = np.array_split(np.arange(40_000), 4)[pid]
        left = {}
        for sender, words in seen(frames, pid).items():
            if sender in coalition:
                continue
            for mate in coalition:
                drawn = streams[mate, sender][piece]
                words = words + drawn if mate < sender else words - drawn
            left[sender] = words
            counts = np.bincount(words >> 28, minlength=16)
            assert stats.chisquare(counts).pvalue > LEAST
            assert (words != inputs[sender][piece]).mean() > 0.999
        known = (inputs[2] + inputs[3])[piece].astype(np.uint32)
        np.testing.assert_array_equal(left[2] + left[3], known)


def test_no_mask_serves_twice(sites, tap):
    sessions = sites(3)
    frames = tap(sessions)
    own = vectors(3, (90,))
    for _ in range(2):
        run_trio(sessions, add_up, own)
    sent = [f[4] for f in frames if f[2] == DATA and f[:2] == (1, 0)]
    first, _, second, _ = (np.frombuffer(p, np.uint32) for p in sent)
    assert len(first) == 30
    assert (first != second).all()


@pytest.mark.parametrize("count", [1, 2, 33])
def test_too_few_sites_are_refused(count):
    links = dict.fromkeys(range(1, count))
    with pytest.raises(InsecureSetupError, match="cannot add up|at most 32"):
        sums.SumSession(0, links, links)
    assert LEAST_SITES == 3


def test_a_threshold_cannot_be_chosen():
    with pytest.raises(InsecureSetupError, match="no other threshold"):
        sums.check_sites(4, 1)
    with pytest.raises(InsecureSetupError, match="no other threshold"):
        sums.check_sites(3, 1, insecure=True)


# -- sites that do not follow the program ------------------------------------


def all_fail(sessions, lie):
    """What each site raises when `lie` changes what the first one does."""
    lie(sessions[0])

    def one(session):
        try:
            return add_up(session, own, 1000)
        except Exception as exc:
            session.fail(exc)
            return exc

    own = vectors(len(sessions), (30,))
    with ThreadPoolExecutor(len(sessions)) as pool:
        return list(pool.map(one, sessions))


def test_a_site_that_tells_others_another_sum(sites, monkeypatch):
    """It is noticed, and none is blamed: the one told something else least of all."""

    def lie(session):
        send = session.network.send

        def sending(peer, name, array):
            if name == "total-test-sum" and peer == 2:
                array = array + np.uint32(1)
            send(peer, name, array)

        session.network.send = sending

    results = all_fail(sites(4), lie)
    for result in results:
        assert isinstance(result, ProtocolError)
        assert result.culprit is None
        assert "not told the same sum" in str(result)
        assert "none can tell which" in str(result)


def test_a_site_that_adds_too_much(sites):
    def lie(session):
        masked = session._masked

        def adding(ring, words):
            return masked(ring, words + ring.dtype(1 << 20))

        session._masked = adding

    for result in all_fail(sites(3), lie):
        assert isinstance(result, ProtocolError)
        assert result.culprit is None
        assert "not between 0 and 3000" in str(result)


@pytest.mark.parametrize("largest", [[100, 0, 0], [0, 100, 0], [100, 100, 100]])
def test_where_all_stop_says_nothing_of_what_a_site_has(sites, largest):
    """A bound that a site could steer stops all at the same step, or nobody."""
    sessions = sites(3)

    def one(session):
        own = [[largest[session.pid]] * 30]
        try:
            return add_up(session, own * 3, 1000, within=(0, 10)).tolist()
        except Exception as exc:
            session.fail(exc)
            return type(exc), str(exc), dict(session.ledger.opened)

    first, *others = run_trio(sessions, one)
    assert first[0] is ProtocolError and "not between 0 and 10" in first[1]
    assert first[2]
    assert others == [first] * 2


def test_a_site_that_sends_too_little(sites):
    def lie(session):
        send = session.network.send

        def sending(peer, name, array):
            send(peer, name, array[:-1] if name == "open-test-sum" else array)

        session.network.send = sending

    _, *others = all_fail(sites(3), lie)
    assert any(
        isinstance(e, ProtocolError) and "36 bytes where 40 were due" in str(e)
        for e in others
    )


# -- receipts ----------------------------------------------------------------


def test_receipts_are_alike(sites):
    """Every site's says who learned what, and what each sent."""

    def party(session):
        session.agree("parameters", {"a": 1})
        add_up(session, vectors(4, (30,)))
        return session.receipt(operation="template")

    receipts = run_trio(sites(4), party)
    roles = [f"site {i}" for i in range(1, 5)]
    for receipt in receipts:
        assert (receipt["m"], receipt["t"]) == (4, 2)
        assert list(receipt["learned"]) == list(receipt["common"]) == roles
        assert receipt["learned"] == receipts[0]["learned"]
        assert receipt["bytes_sent"] == receipts[0]["bytes_sent"]
        assert len(set(receipt["common"].values())) == 1
        assert not receipt["warnings"]
    assert [r["role"] for r in receipts] == roles
    assert len({r["run"] for r in receipts}) == 1


def test_who_loses_a_site_is_not_told_to_resume(sites):
    """Of sums there is nothing to resume."""

    def party(session):
        if session.pid == 2:
            for link in session.network.links.values():
                link.sock.close()
            return None
        with pytest.raises(PeerLostError) as caught:
            add_up(session, vectors(3, (30,)))
        session.fail(caught.value)
        return str(caught.value)

    for said in run_trio(sites(3), party)[:2]:
        assert said.endswith("start it again and begin anew at all sites")


def test_sites_are_not_owners(sites):
    """A session of sites has no party of a registration."""
    for session in sites(3):
        assert isinstance(session, Session)
        assert session.name_of(2) == "the site 3"
        assert session.role == f"site {session.pid + 1}"


def test_metadata_counts(sites, tap):
    """Nothing but masked words, sums and digests crosses the network."""
    sessions = sites(3)
    frames = tap(sessions)
    run_trio(sessions, add_up, vectors(3, (30,)))
    kinds = [f[2] for f in frames]
    assert kinds.count(DATA) == 12 and kinds.count(JSON) == 6
    assert len(frames) == 18


@pytest.mark.parametrize("count, waited_for", [(3, {2}), (10, {2, 9}), (32, {31})])
def test_who_waits_says_for_whom(sites, count, waited_for):
    """So that it is not blamed for being silent, however many sites there are."""
    sessions = sites(count)
    sessions[0].network._tell([], waited_for)
    link = sessions[1].network.links[0]
    assert link.pump() is None
    assert link.waits_for == waited_for


def test_a_site_cannot_blame_one_that_there_is_not(sites):
    """Of three sites, one that says that it waits for the tenth."""
    sessions = sites(3)
    sessions[0].network.links[1].begin_frame(WAITING, 0, (1 << 9).to_bytes(2))
    sessions[0].network.links[1].send_some()
    link = sessions[1].network.links[0]
    link.pump()
    with pytest.raises(PeerTimeoutError, match="the site 1 said nothing") as caught:
        sessions[1].network._timed_out([link])
    assert caught.value.culprit == 0
