"""The other parties' processes, kept from one call to the next."""

import subprocess

import pytest

from dipy_ppir.mpc import local
from dipy_ppir.mpc.errors import PeerLostError, PeerTimeoutError
from dipy_ppir.mpc.ledger import HELPER, STATIC
from dipy_ppir.mpc.pair import PairSession

TASK = "test_local:silence"


def silence(session):
    """Seconds for which a party waits for another one."""
    return session.network.timeout


def wait(session):
    """Wait for a command word of the moving owner."""
    return session.hear()


def ask(parties=None):
    none = dict.fromkeys(("moving", "static", "helper"), {})
    return local.run_locally(silence, TASK, parties=parties, **none)


@pytest.fixture(scope="module", autouse=True)
def no_copies():
    """Parties are started as users start them; see `copies`."""
    local.close_local_parties()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "subprocess", subprocess)
        yield
        local.close_local_parties()


@pytest.fixture
def conversation():
    """An exchange that somebody has begun and left, as a metric that is kept."""
    conversation = local.Conversation()
    conversation.start("test_local:wait", common={}, static={})
    yield conversation
    local.close_local_parties()


def test_a_user_may_take_any_time_between_two_calls():
    """The other parties wait for the caller longer than anybody looks at a picture."""
    seconds = ask()
    assert seconds[STATIC] == seconds[HELPER] > 7 * 24 * 3600
    # poll() takes milliseconds as a C int.
    assert seconds[STATIC] * 1000 < 2**31


def test_two_owners_need_one_process_more():
    assert set(ask(2)) == {0, 1}
    pair = local._kept[2]
    assert set(pair._children) == {STATIC}
    assert isinstance(pair.session, PairSession)
    assert set(ask()) == {0, 1, 2}
    # Neither call ends what the other one keeps.
    assert set(ask(2)) == {0, 1}
    assert local._kept[2] is pair and pair.usable


def test_a_failure_of_two_owners_is_told(monkeypatch):
    ask(2)
    pair = local._kept[2]
    pair._children[STATIC].kill()
    pair._children[STATIC].wait()
    assert set(ask(2)) == {0, 1}
    assert local._kept[2] is not pair
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        local.run_locally(
            silence, "no_such:task", parties=2, moving={}, static={}, helper={}
        )


def test_a_call_ends_what_another_one_left(conversation):
    assert conversation.active
    assert set(ask()) == {0, 1, 2}
    assert not conversation.active


def test_failures_of_a_conversation_are_its_own(conversation, monkeypatch):
    """The next call starts new parties and knows nothing of it."""
    before = conversation._parties

    def fail():
        raise PeerTimeoutError("party 0 (moving owner) said nothing", 0)

    monkeypatch.setattr(before, "finish", fail)
    assert set(ask()) == {0, 1, 2}
    assert local._kept[3] is not before
    assert not before.usable


def test_parties_that_died_meanwhile_are_replaced(conversation):
    before = conversation._parties
    for child in before._children.values():
        child.kill()
    assert set(ask()) == {0, 1, 2}
    assert local._kept[3] is not before


def test_a_party_that_died_unnoticed():
    """An error of its own; a broken pipe would be taken for the caller's."""
    ask()
    parties = local._kept[3]
    for child in parties._children.values():
        child.kill()
        child.wait()
    with pytest.raises(PeerLostError, match="party 1 .static owner. died"):
        parties.start(TASK, {STATIC: {}, HELPER: {}})


def test_parties_that_die_as_a_conversation_begins(monkeypatch):
    ask()
    parties = local._kept[3]
    for child in parties._children.values():
        child.kill()
        child.wait()
    monkeypatch.setattr(local, "_parties", lambda: parties)
    with pytest.raises(PeerLostError, match="party 1 .static owner. died"):
        local.Conversation().start("test_local:wait", common={}, static={})
    assert parties._ended, "what is left of them goes on"
