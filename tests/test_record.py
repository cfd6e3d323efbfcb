"""What ties the receipts of a run together: its number, common parts, signatures."""

from copy import deepcopy
from datetime import datetime, timezone
import hashlib
import json

import numpy as np
import pytest
from records import IDENTITIES, plan_of_sites, run, run_of_sites

from dipy_ppir.align.facts import OwnFiles, transform_facts
from dipy_ppir.mpc import record
from dipy_ppir.mpc.errors import ParameterMismatchError, ProtocolError
from dipy_ppir.mpc.identity import signed_by
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.receipt import receipt_text
from dipy_ppir.mpc.session import SOURCE

# -- the number of a run -----------------------------------------------------


def test_a_run_has_a_number_of_its_own(three):
    def party(session):
        first = run(session)
        again = session.receipt()["run"]
        session.new_run()
        return first["run"], again, run(session)["run"]

    results = three(party)
    assert len(set(results)) == 1
    first, again, second = results[0]
    assert first == again != second
    assert record.is_hex(first, 64)


def test_the_number_is_of_the_session_file_and_of_each_partys_own():
    greetings = {pid: record.greeting() for pid in ROLES}

    def number(session_file=None):
        return record.begin(greetings, MOVING, session_file).number

    nonces = b"".join(bytes.fromhex(greetings[pid]["nonce"]) for pid in sorted(ROLES))
    assert number() == hashlib.sha256(nonces).hexdigest()
    numbers = {number(), number("ab" * 32)}
    for pid in ROLES:
        greetings[pid] = record.greeting()
        numbers.add(number())
    assert len(numbers) == 5


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "x",
        {},
        {"nonce": "ab" * 16},
        {"nonce": "ab" * 15, "date": "2026-01-02T03:04:05Z"},
        {"nonce": "AB" * 16, "date": "2026-01-02T03:04:05Z"},
        {"nonce": 7, "date": "2026-01-02T03:04:05Z"},
        {"nonce": "ab" * 16, "date": "2026-13-02T03:04:05Z"},
        {"nonce": "ab" * 16, "date": "\x1b[2J" + "x" * 16},
    ],
    ids=repr,
)
def test_who_does_not_greet_is_named(sent):
    greetings = {pid: record.greeting() for pid in ROLES}
    greetings[STATIC] = sent
    with pytest.raises(ProtocolError, match="the static owner did not begin") as caught:
        record.begin(greetings, MOVING)
    assert caught.value.culprit == STATIC


def test_the_date_is_the_moving_owners(three):
    """A clock that is wrong is told."""
    clock = {MOVING: 0, STATIC: 300, HELPER: 3600}

    def party(session):
        now = datetime.now(timezone.utc).timestamp() + clock[session.pid]
        greet = {"nonce": "00" * 16, "date": _date(now)}
        session.ledger.run = record.begin(session.exchange("greet", greet), session.pid)
        return session.receipt()

    receipts = three(party)
    assert len({r["date"] for r in receipts}) == 1
    assert [len(r["warnings"]) for r in receipts] == [0, 0, 1]
    assert "set the clock" in receipts[HELPER]["warnings"][0]
    assert receipts[HELPER]["common"] == receipts[MOVING]["common"]


def _date(timestamp):
    return datetime.fromtimestamp(timestamp, timezone.utc).strftime(
        "%Y-%m-%dT%H:%M:%SZ"
    )


# -- the common part ---------------------------------------------------------


def test_all_parties_state_the_same(three):
    receipts = three(lambda s: run(s, warnings=["look at this"]))
    digests = {record.common_digest(r) for r in receipts}
    for pid, receipt in enumerate(receipts):
        assert {*receipt["common"].values()} == digests
        assert len(digests) == 1
        assert (receipt["role"], receipt["parties"]) == (ROLES[pid], None)
        assert receipt["signatures"] == {}
        assert receipt["warnings"] == ["look at this"]
        assert receipt["duration"] >= 0
        # As it is read from a file.
        assert record.common_digest(json.loads(json.dumps(receipt))) in digests
        text = receipt_text(receipt)
        assert text.startswith(f"Receipt of the {ROLES[pid]}\n")
        assert "Warnings\n--------\nlook at this\n" in text


def test_what_the_digest_is_of(three):
    receipt = three(lambda s: run(s, parameters={"sigmas": [3, 1.5]}))[MOVING]
    digest = record.common_digest(receipt)
    alike = {**receipt, "parameters": {"sigmas": [3.0, 1.5]}, "role": "helper"}
    assert record.common_digest(alike) == digest
    for name in record.COMMON:
        assert record.common_digest({**receipt, name: "other"}) != digest, name
    for edit in ("learned", "versions"):
        edited = deepcopy(receipt)
        entry = edited[edit]
        if edit == "learned":
            entry["moving owner"][0]["bits"] += 1
        else:
            entry["numpy"] = "0"
        assert record.common_digest(edited) != digest


def test_a_partys_difference_is_a_warning_and_not_the_end(three):
    def party(session):
        return run(session, parameters={"n": session.pid == HELPER})

    receipts = three(party)
    for pid in (MOVING, STATIC):
        (warning,) = receipts[pid]["warnings"]
        assert "the helper has on record" in warning and "dipy_ppir_receipt" in warning
        assert len({*receipts[pid]["common"].values()}) == 2
    assert len(receipts[HELPER]["warnings"]) == 2


@pytest.mark.parametrize("sent", [None, [], {"common": 5}, {"common": "0" * 63}])
def test_a_party_that_records_nothing(trio, outcomes, sent):
    def party(session):
        if session.pid == STATIC:
            return session.exchange("receipt", sent)
        return session.receipt()

    receipts = outcomes(trio, party, stop=False)
    assert receipts[MOVING]["common"]["static owner"] is None
    assert "the static owner has on record" in receipts[MOVING]["warnings"][0]


def test_what_is_counted_in_common_after_an_interruption(three):
    """Not what came before, which one party may have counted and another not."""

    def party(session):
        before = run(session)
        state = session.ledger.state()
        session.new_run()
        for _ in range(1 + (session.pid == STATIC)):
            session.ledger.add(state)
        return before["run"], run(session)

    results = three(party)
    for pid, (before, receipt) in enumerate(results):
        times = 1 + (pid == STATIC)
        assert receipt["earlier_runs"] == [before] * times
        assert receipt["resumed"] == times
        assert receipt["learned"]["moving owner"][0]["openings"] == 1 + times
        assert receipt["last_attempt"]["moving owner"][0]["openings"] == 1
        assert receipt["warnings"] == []
    assert len({r["common"]["helper"] for _, r in results}) == 1


# -- signatures --------------------------------------------------------------


def test_sites_sign(three):
    receipts = three(run_of_sites)
    plan = plan_of_sites()
    for receipt in receipts:
        assert receipt["warnings"] == []
        assert receipt["title"] == "a test"
        assert receipt["session_file"] == plan.digest
        assert set(receipt["signatures"]) == set(ROLES.values())
        assert "The helper was Site 2." in receipt_text(receipt)
    for pid, role in ROLES.items():
        signed = receipts[MOVING]["signatures"][role]
        pin = receipts[MOVING]["parties"][role]["fingerprint"]
        said = record.statement(pid, receipts[MOVING]["common"][role])
        assert signed_by(pin, said, signed)
        assert not signed_by(pin, said + b" ", signed)


@pytest.mark.parametrize(
    "how", ["none", "another key", "another statement", "nonsense"]
)
def test_a_party_that_does_not_sign_is_named(three, how):
    signs = {
        "none": lambda said: {},
        "another key": IDENTITIES[MOVING].sign,
        "another statement": lambda said: IDENTITIES[STATIC].sign(said + b"."),
        "nonsense": lambda said: {"signature": [1], "certificate": "\x1b"},
    }[how]

    class Liar:
        sign = staticmethod(signs)

    def party(session):
        session.plan, session._identity = plan_of_sites(), IDENTITIES[session.pid]
        if session.pid == STATIC:
            session._identity = Liar
        return run(session)

    receipts = three(party)
    for pid in (MOVING, HELPER):
        (warning,) = receipts[pid]["warnings"]
        assert "The static owner did not sign" in warning
        assert "static owner" not in receipts[pid]["signatures"]


# -- digests -----------------------------------------------------------------


def test_the_digest_of_the_sources(tmp_path, monkeypatch):
    def digest(**files):
        for name in tmp_path.rglob("*.py"):
            name.unlink()
        for name, text in files.items():
            path = tmp_path / f"{name.replace('_', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return record.source_digest.__wrapped__()

    assert record.is_hex(record.source_digest(), 64)
    monkeypatch.setattr(record.dipy_ppir, "__file__", str(tmp_path / "__init__.py"))
    first = digest(a="x", b_c="y")
    assert first == digest(b_c="y", a="x")
    others = [digest(a="x", b_c="z"), digest(a="x", b_d="y"), digest(a="xy", b_c="")]
    assert len({first, *others}) == 4


def test_sources_that_differ_are_refused(trio, outcomes):
    def party(session):
        digest = "0" if session.pid == HELPER else "1"
        session.agree("session file", {SOURCE: digest})

    for error in outcomes(trio, party, stop=False):
        assert isinstance(error, ParameterMismatchError)
        assert "install dipy_ppir from the same files everywhere" in str(error)


def test_the_hash_of_a_file_is_the_runs_own(tmp_path):
    file = tmp_path / "image.nii"
    file.write_bytes(b"voxels" * 300_000)
    runs = "ab" * 32, "cd" * 32
    expected = [hashlib.sha256(r.encode() + file.read_bytes()) for r in runs]
    hashes = [record.file_hash(r, file) for r in runs]
    assert hashes == [h.hexdigest() for h in expected]


def test_the_hash_of_an_array():
    array = np.arange(24.0).reshape(4, 6)
    one = record.array_hash("ab" * 32, array)
    assert one == record.array_hash("ab" * 32, np.asfortranarray(array))
    others = array.astype(np.float32), array.reshape(6, 4), array + 1, array[:0]
    hashes = {record.array_hash("ab" * 32, a) for a in others}
    assert len({one, record.array_hash("cd" * 32, array), *hashes}) == 6


def test_a_file_that_is_changed_while_it_is_registered(tmp_path):
    names = [tmp_path / n for n in ("same", "changed", "gone")]
    for file in names:
        file.write_text("voxels")
    given = {f"{file.name} image": file for file in names}
    files = OwnFiles({**given, "mask": None, "start": "", "other image": "remote"})
    names[1].write_text("other voxels")
    names[2].unlink()
    receipt = {"run": "ab" * 32, "warnings": []}
    files.enter(receipt)
    assert receipt["files"] == {"same image": record.file_hash("ab" * 32, names[0])}
    assert [w.split(" was ")[0] for w in receipt["warnings"]] == [
        "The file of the changed image",
        "The file of the gone image",
    ]


# -- results in words --------------------------------------------------------


def test_a_transform_in_words(three):
    grid2world = np.diag([2.0, 2, 2, 1])
    grid2world[:3, 3] = -10
    affine = np.array([[0, -1.1, 0, 3], [1.1, 0, 0, 4], [0, 0, 1.1, 0], [0, 0, 0, 1.0]])
    static = {"shape": [11, 11, 11], "grid2world": grid2world.tolist()}
    found = transform_facts(affine, static)
    # The middle of the static image is the origin.
    assert found["shift"] == pytest.approx([3, 4, 0])
    text = receipt_text(three(run)[MOVING] | {"transform": found})
    assert "centre of the static image 5.00 mm away (3.00, 4.00, 0.00)" in text
    assert "turns by 90.00 degrees about (0.00, 0.00, 1.00)" in text
    assert "scales by 1.100, 1.100, 1.100." in text
    found = transform_facts(affine @ np.diag([-1.0, 1, 1, 1]), static)
    text = receipt_text(three(run)[MOVING] | {"transform": found})
    assert "takes left for right" in text
