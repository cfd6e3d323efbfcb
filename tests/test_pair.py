"""Sessions of two owners alone."""

import numpy as np
import pytest

from dipy_ppir.align.checkpoint import Checkpoint, journal_ahead
from dipy_ppir.mpc.arrays import OwnedArray, SharedArray
from dipy_ppir.mpc.errors import InsecureSetupError, UndeclaredOpeningError
from dipy_ppir.mpc.fields import P61, P127, R64
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, declare
from dipy_ppir.mpc.pair import check_pair
from dipy_ppir.mpc.protocols import share

declare("test_pair_all", (MOVING, STATIC, HELPER), "any", "a test", 128)
declare("test_pair_moving", (MOVING,), "any", "a test", 64)


def parts(session, values):
    """This owner's words of numbers."""
    mask = np.random.default_rng(5).integers(0, 2**63, len(values), np.uint64)
    words = R64.encode_int(values) - mask if session.pid == MOVING else mask
    return SharedArray(R64, words, 2, 0, (1 << 63) - 1)


@pytest.mark.parametrize(
    ("label", "receivers", "seen"),
    [
        ("test_pair_all", (MOVING, STATIC, HELPER), (True, True)),
        ("test_pair_moving", (MOVING,), (True, False)),
    ],
)
def test_what_is_opened_is_the_sum(two, label, receivers, seen):
    values = np.array([3, -4, 1 << 40])

    def run(session):
        opened = session.open(parts(session, values), label, receivers)
        return opened, session.ledger.opened

    for (opened, ledger), sees in zip(two(run), seen, strict=True):
        assert (opened is not None) == sees
        assert opened is None or (opened == values).all()
        # What goes to nobody is not on the receipt either.
        assert {receiver for receiver, _ in ledger} == set(
            [MOVING, STATIC] if all(seen) else [MOVING]
        )


def test_numbers_of_an_owner_are_told(two):
    def run(session):
        own = np.arange(3.0) if session.pid == STATIC else None
        return session.open(
            OwnedArray(STATIC, own, (3,), np.float64), "test_pair_all", (MOVING, STATIC)
        )

    for opened in two(run):
        assert (opened == np.arange(3)).all()


@pytest.mark.parametrize("field", [P61, P127], ids=repr)
@pytest.mark.parametrize("owner", [MOVING, STATIC])
def test_numbers_of_an_owner_are_shared_without_a_message(two, field, owner):
    """As three parties share them, in a ring as large."""
    numbers = np.array([-1.5, 0.25, 900.0])

    def run(session):
        own = numbers if session.pid == owner else None
        shared = share(session, owner, own, (3,), frac_bits=8, bound=1000, field=field)
        sent = sum(session.ledger.sent.values())
        assert shared.field.bits >= field.bits and shared.degree == 2
        return sent, session.open(shared, "test_pair_all", (MOVING, STATIC))

    for sent, opened in two(run):
        assert sent == 0
        assert (opened == numbers).all()


def test_what_is_about_to_be_opened_is_counted_for_those_who_are_there(duo, tmp_path):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.begin({})
    ahead = {"test_pair_all": ((MOVING, STATIC, HELPER), 3, 2.0)}
    journal_ahead(duo[0], checkpoint, ahead)
    (record,) = checkpoint.records()
    opened = record["ledger"]["opened"]
    assert opened == [[p, "test_pair_all", 1, 3, 6.0] for p in (MOVING, STATIC)]
    duo[0].ledger.add(record["ledger"])
    assert set(duo[0].ledger.learned()) == {"moving owner", "static owner"}


def test_nothing_undeclared_is_opened(two):
    def run(session):
        return session.open(parts(session, [1]), "test_pair_moving", (STATIC,))

    with pytest.raises(UndeclaredOpeningError, match="static owner"):
        two(run)


def test_points_of_lines_are_not_opened(two):
    def run(session):
        array = SharedArray(P61, np.zeros(2, np.uint64), 1, 0, 1)
        return session.open(array, "test_pair_all", (MOVING,))

    with pytest.raises(ValueError, match="no points of lines"):
        two(run)


@pytest.mark.parametrize("setup", [(3, 1, False), (2, 0, True), (2, 0, False)])
def test_threshold_zero_stays_refused(setup):
    with pytest.raises(InsecureSetupError):
        check_pair(*setup)
