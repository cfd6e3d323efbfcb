"""The best rotation on the parts of two owners alone."""

from noise import check_uniform
import numpy as np
from oblivious import use_known_products
from parties import local_pair, run_trio
import pytest
from test_rotation import (
    BOTH,
    CASES,
    best,
    in_the_clear,
    opened_of,
    own,
    sets,
)

from dipy_ppir.mpc import rotation
from dipy_ppir.mpc.frame import operation_code
from dipy_ppir.mpc.ledger import DECLARATIONS, MOVING, STATIC
from dipy_ppir.mpc.rotation import PRECISION
from dipy_ppir.mpc.worlds import shares


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Products that are made without encryption, which has tests of its own."""
    use_known_products(monkeypatch)


def party(session, x, y, sized=True, receivers=BOTH):
    mine = {MOVING: own(x), STATIC: own(y)}[session.pid]
    correlation = rotation.correlate(session, *x.shape, mine.points)
    sizes = None
    if sized:
        sizes = tuple(mine.size if p == session.pid else None for p in BOTH)
    return rotation.find(shares(session), correlation, sizes, receivers)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_of_two_owners_as_in_the_clear(two, case, dim, sized):
    x, y = sets(3, dim, **CASES[case])
    wanted = in_the_clear(x, y, sized)
    found = two(party, x, y, sized)
    turn = opened_of(best(x, y)[0])
    for result in found:
        assert (result.grade, result.steady) == (wanted.grade, wanted.steady)
        if wanted.numbers is None:
            assert result.numbers is None
            continue
        # Up or down to a whole unit, and what the computation is off by.
        assert np.abs(result.numbers - turn).max() < 1.1 * PRECISION
        assert np.array_equal(result.numbers, found[MOVING].numbers)


@pytest.mark.parametrize("dim", [2, 3])
def test_of_sets_without_rotation_nothing_else_is_opened(duo, dim):
    x, y = sets(5, dim)
    y = np.random.default_rng(1).permutation(y)
    for session, found in zip(duo, run_trio(duo, party, x, y), strict=True):
        assert found.grade == 0 and found.numbers is None
        labels = {label for _, label in session.ledger.opened}
        assert labels == {"alike", "steady"} - ({"steady"} if dim == 2 else set())


@pytest.mark.parametrize("receivers", [(MOVING,), (STATIC,), BOTH])
@pytest.mark.parametrize("dim", [2, 3])
def test_only_receivers_are_shown_the_rotation_and_as_many_bits(duo, dim, receivers):
    results = run_trio(duo, party, *sets(6, dim), True, receivers)
    assert [f.numbers is not None for f in results] == [p in receivers for p in BOTH]
    opened = duo[receivers[0]].ledger.opened
    assert {r for r, label in opened if label == "rotation"} == set(receivers)
    for (_, label), entry in opened.items():
        assert entry.bits <= entry.values * DECLARATIONS[label].bits + 1e-9
    assert opened[receivers[0], "rotation"].values == {2: 2, 3: 6}[dim]


@pytest.mark.parametrize("dim", [2, 3])
def test_rounds_and_bytes_of_the_correlation_are_as_stated(duo, dim, depth):
    x, y = sets(7, dim)

    def correlate(session):
        mine = {MOVING: own(x), STATIC: own(y)}[session.pid]
        rotation.correlate(session, *x.shape, mine.points)

    rounds = depth(duo)
    run_trio(duo, correlate)
    sent = sum(sum(s.ledger.sent.values()) for s in duo)
    assert (rounds(), sent) == (1, 32 * {2: 3, 3: 9}[dim] * len(x))


def test_what_is_sent_is_uniform_and_the_same_for_any_points(tap):
    x = np.zeros((3000, 3))
    x[:4] = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]]
    shapes = []
    for both in ((x, x), sets(9, 3, n=3000)):
        sessions = local_pair()
        frames = tap(sessions)
        run_trio(sessions, party, *both)
        shapes.append(sorted((*f[:4], len(f[4])) for f in frames))
        code = operation_code("factors")
        words = [np.frombuffer(f[4], np.uint64) for f in frames if f[3] == code]
        words = np.concatenate(words)
        assert len(words) > 4 * 9 * len(x)
        check_uniform([words >> np.uint64(60), words & np.uint64(15)], "all")
        for session in sessions:
            session.close()
    assert shapes[0] == shapes[1]
