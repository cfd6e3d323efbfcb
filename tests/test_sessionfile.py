"""Session files: what is read, what is refused, and with which words."""

from copy import deepcopy
import math
import re
import string

from examples import MORE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
import pins
import pytest

from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.sessionfile import (
    MAX_BYTES,
    TIMEOUTS,
    SessionFile,
    flatten,
    parse_address,
)
from dipy_ppir.workflows.operations import explain

TEXT = """
# A comment.
title = "Trial 7"
operation = "affine"
reveal = "gradient"
result_to = "moving"

[parties.moving]
name = "North Hospital"
fingerprint = "{moving}"

[parties.static]
name = "South Clinic"
address = "south.example.org:7433"
fingerprint = "{static}"

[parties.helper]
name = "East University"
address = "[2001:db8::1]:7433"
fingerprint = "{helper}"

[parameters]
transform = "affine"
level_iters = [100, 10]
seed = 3
pad = false

[timeouts]
connect = 60
"""


def text():
    fingerprints = {
        name: pins.identity(pid).fingerprint
        for name, pid in (("moving", MOVING), ("static", STATIC), ("helper", HELPER))
    }
    return TEXT.format(**fingerprints)


def write(tmp_path, raw):
    path = tmp_path / "session.toml"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return path


def test_a_session_file(tmp_path):
    plan = SessionFile.read(write(tmp_path, text()))
    assert plan.title == "Trial 7"
    assert (plan.operation, plan.reveal, plan.result_to) == (
        "affine",
        "gradient",
        "moving",
    )
    assert plan.parties[MOVING].address is None
    assert plan.parties[STATIC].address == ("south.example.org", 7433)
    assert plan.parties[HELPER].address == ("2001:db8::1", 7433)
    assert plan.parties[STATIC].title == "the static owner (South Clinic)"
    assert plan.parameters == {
        "transform": "affine",
        "level_iters": [100, 10],
        "seed": 3,
        "pad": False,
    }
    assert plan.timeouts == {**TIMEOUTS, "connect": 60.0}


def test_a_party_is_known_by_its_certificate_alone(tmp_path):
    plan = SessionFile.read(write(tmp_path, text()))
    for pid in pins.NAMES:
        assert plan.party_of(pins.identity(pid).fingerprint).pid == pid
    namesake = create_identity(pins.NAMES[MOVING])
    with pytest.raises(SessionFileError, match=namesake.fingerprint):
        plan.party_of(namesake.fingerprint)


@pytest.mark.parametrize(
    ("listeners", "moving", "static", "relayed"),
    [
        ((HELPER,), [HELPER], [HELPER], True),
        ((HELPER, STATIC), [HELPER, STATIC], [HELPER], False),
        ((HELPER, MOVING), [HELPER], [HELPER, MOVING], False),
        ((HELPER, MOVING, STATIC), [HELPER, STATIC], [HELPER], False),
    ],
)
def test_who_dials_whom(listeners, moving, static, relayed):
    plan = pins.plan(listeners)
    assert plan.dials(MOVING) == moving
    assert plan.dials(STATIC) == static
    assert plan.dials(HELPER) == []
    assert plan.relayed is relayed


@pytest.mark.parametrize(
    ("listeners", "moving", "static"),
    [
        ((STATIC,), [STATIC], []),
        ((MOVING,), [], [MOVING]),
        ((MOVING, STATIC), [STATIC], []),
    ],
)
def test_two_owners_alone(listeners, moving, static):
    plan = pins.plan(listeners, helper="none")
    assert plan.alone and not plan.relayed
    assert set(plan.parties) == {MOVING, STATIC}
    assert plan.dials(MOVING) == moving
    assert plan.dials(STATIC) == static
    assert set(plan.contents["parties"]) == {"moving", "static"}
    assert plan.agreement()["helper"] == "none"


def test_a_helper_that_is_named_is_as_one_that_is_not():
    plan = pins.plan(helper="online")
    assert not plan.alone and set(plan.parties) == {MOVING, STATIC, HELPER}
    assert not pins.plan().alone


OF_TWO = {
    "no address": ((), lambda c: None, "neither owner has an address.*ssh -R"),
    "a helper": (
        (STATIC,),
        lambda c: put(c["parties"]["moving"], "parties", "helper")(c),
        r'\[parties.helper\] is there, and helper = "none"',
    ),
    "one owner": ((STATIC,), lambda c: put(None, "parties", "moving")(c), "is missing"),
    "same key": (
        (STATIC,),
        lambda c: put(
            c["parties"]["moving"]["fingerprint"], "parties", "static", "fingerprint"
        )(c),
        "two separate owners are needed",
    ),
    "a number": ((STATIC,), lambda c: put(0, "helper")(c), "must be a short text"),
    "unknown": (
        (STATIC,),
        lambda c: put("nobody", "helper")(c),
        "helper = 'nobody' is not known; choose one of 'online', 'ahead', 'none'",
    ),
    "parties a number": (
        (STATIC,),
        lambda c: put(2, "parties")(c),
        r'\[parties\] must be a table; of two .* helper = "none"',
    ),
    "another helper": (
        (STATIC,),
        lambda c: put(None, "helper")(c),
        r'\[parties.helper\] is missing.*write helper = "none"',
    ),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_bad_files_of_two(name):
    listeners, change, words = OF_TWO[name]
    contents = pins.contents(listeners, helper="none")
    change(contents)
    with pytest.raises(SessionFileError, match=words):
        SessionFile.parse(contents)


def test_comments_and_layout_do_not_count(tmp_path):
    plan = SessionFile.read(write(tmp_path, text()))
    other = SessionFile.read(
        write(tmp_path, text().replace("# A comment.", "").replace("\n", "\r\n"))
    )
    assert plan.digest == other.digest
    assert plan.agreement() == other.agreement()


@pytest.mark.parametrize(
    ("old", "new", "entry"),
    [
        ('"Trial 7"', '"Trial 8"', "title"),
        ("seed = 3", "seed = 4", "parameters.seed"),
        ("seed = 3", "seed = 3\nzebra = 1", "parameters.zebra"),
        ("seed = 3", "", "parameters.seed"),
        ("connect = 60", "connect = 61", "timeouts.connect"),
        ('"gradient"', '"histogram"', "reveal"),
        ("south.example.org", "north.example.org", "parties.static.address"),
        ("[100, 10]", "[100, 11]", "parameters.level_iters"),
        ("pad = false", "pad = 0", "whole session file"),  # 0 equals false
    ],
)
def test_the_first_difference_names_the_entry(tmp_path, old, new, entry):
    """The parties compare entries in alphabetical order."""
    one = SessionFile.read(write(tmp_path, text())).agreement()
    two = SessionFile.read(write(tmp_path, text().replace(old, new))).agreement()
    different = [k for k in sorted({**one, **two}) if one.get(k) != two.get(k)]
    assert different[0] == entry
    assert different[-1] == "whole session file"


BAD_TEXTS = {
    "no TOML": ("x = = 1", "is not a TOML file"),
    "Latin-1": ("title = 'é'".encode("latin-1"), "not UTF-8 .*Latin-1.*save it"),
    "UTF-16": ("title = 'é'".encode("utf-16"), "not UTF-8 .*UTF-16.*save it"),
    "no mark": ("title = 'é'".encode("utf-16-le"), "not UTF-8 .*UTF-16.*save it"),
    "big-endian": ("title = 'é'".encode("utf-16-be"), "not UTF-8 .*UTF-16.*save it"),
    "binary": (b"title\0\0", "is not a TOML file"),
    "a key": ("-----BEGIN PRIVATE KEY-----", "is not a TOML file"),
    "twice": ("title = 'a'\ntitle = 'b'", "is not a TOML file: .*is there twice"),
    "two parties": ("parties = 2\n[parties.moving]", "as a value and as a table"),
    "deep": ("x = " + "[" * 20_000, "is not a TOML file"),
    "long number": ("x = " + "9" * 20_000, "is not a TOML file"),
    "too large": ("#" * (MAX_BYTES + 1), "too large"),
    "empty": ("", "is missing"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_files_that_are_none(tmp_path, name):
    raw, words = BAD_TEXTS[name]
    with pytest.raises(SessionFileError, match=words):
        SessionFile.read(write(tmp_path, raw))


@pytest.mark.parametrize("where", [".", "nowhere.toml"])
def test_files_that_cannot_be_read(tmp_path, where):
    with pytest.raises(SessionFileError, match="cannot read the session file"):
        SessionFile.read(tmp_path / where)


def test_the_message_names_the_file(tmp_path):
    with pytest.raises(SessionFileError, match="session file session.toml: .*colour"):
        SessionFile.read(write(tmp_path, "colour = 1\n" + text()))


def put(value, *path):
    def change(contents):
        for key in path[:-1]:
            contents = contents.setdefault(key, {})
        if value is None:
            del contents[path[-1]]
        else:
            contents[path[-1]] = value

    return change


PARTY = "parties", "static"
BAD_ENTRIES = {
    "unknown": (put(1, "colour"), "no entry 'colour'.*operation"),
    "no operation": (put(None, "operation"), "lacks operation"),
    "operation a number": (put(7, "operation"), "operation in the file must be a"),
    "empty operation": (put(" ", "operation"), "operation in the file is empty"),
    "two lines": (put("a\nb", "title"), "short text on one line"),
    "long": (put("a" * 201, "title"), "short text on one line"),
    "place 0": (put(0, "place"), "place must be an integer from 1 to 999,999"),
    "place true": (put(True, "place"), "place must be an integer"),
    "result_to": (put("helper", "result_to"), "'helper' is not known.*'both'"),
    "parties no table": (put(3, "parties"), r"\[parties\] must be a table"),
    "parameters no table": (put([], "parameters"), r"\[parameters\] must be a table"),
    "a fourth party": (put({}, "parties", "fourth"), "no entry 'fourth'"),
    "two parties": (put(None, "parties", "moving"), r"\[parties.moving\] is missing"),
    "party no table": (put("x", *PARTY), r"\[parties.static\] is missing"),
    "a claimed number": (put(0, *PARTY, "pid"), "no entry 'pid'"),
    "no name": (put(None, *PARTY, "name"), "lacks name"),
    "same name": (put(pins.NAMES[HELPER], *PARTY, "name"), "same name"),
    "no fingerprint": (put(None, *PARTY, "fingerprint"), "lacks fingerprint"),
    "short fingerprint": (put("AA:BB", *PARTY, "fingerprint"), "not a SHA-256"),
    "SHA-1": (put("ab" * 20, *PARTY, "fingerprint"), "not a SHA-256"),
    "same fingerprint": (
        lambda c: put(
            c["parties"]["helper"]["fingerprint"].lower(), *PARTY, "fingerprint"
        )(c),
        "same fingerprint.*rebuild both images",
    ),
    "no helper address": (put(None, "parties", "helper", "address"), "owners dial"),
    "no port": (put("south.example.org", *PARTY, "address"), "must be host:port"),
    "same address": (
        lambda c: put(c["parties"]["helper"]["address"], *PARTY, "address")(c),
        "same address",
    ),
    "unknown time-out": (put(1, "timeouts", "lunch"), "no entry 'lunch'"),
    "time-out 0": (put(0, "timeouts", "silence"), "silence in .timeouts. must be"),
    "endless time-out": (put(math.inf, "timeouts", "silence"), "must be seconds"),
    "no time-out": (put(math.nan, "timeouts", "silence"), "must be seconds"),
    "true time-out": (put(True, "timeouts", "silence"), "must be seconds"),
    "table in parameters": (put({"a": 1}, "parameters", "x"), "parameter 'x' must be"),
    "not a number": (put(math.nan, "parameters", "x"), "parameter 'x' must be"),
    "infinite": (put([1, -math.inf], "parameters", "x"), "parameter 'x' must be"),
    "huge": (put(1 << 64, "parameters", "x"), "parameter 'x' must be"),
    "huge beyond text": (put(1 << 20_000, "parameters", "x"), "parameter 'x' must be"),
    "long list": (put([0] * 65, "parameters", "x"), "parameter 'x' must be"),
    "deep list": (put([[[[0]]]], "parameters", "x"), "parameter 'x' must be"),
    "nasty key": (put({}, "parameters", "a\n\x1b[2J"), r"parameter 'a\\n\\x1b"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_bad_entries(name):
    change, words = BAD_ENTRIES[name]
    contents = pins.contents()
    change(contents)
    with pytest.raises(SessionFileError, match=words) as caught:
        SessionFile.parse(contents)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_good_entries_at_the_limits():
    contents = pins.contents()
    put([[[0]], -(1 << 63), 1e300, "x", True], "parameters", "x")(contents)
    put(0, "timeouts", "checkpoint")(contents)
    put(604800, "timeouts", "silence")(contents)
    put("a" * 200, "title")(contents)
    plan = SessionFile.parse(contents)
    assert plan.timeouts["checkpoint"] == 0.0
    assert plan.contents == contents


@pytest.mark.parametrize(
    ("given_text", "address"),
    [
        ("host:1", ("host", 1)),
        ("a-b.example.org:65535", ("a-b.example.org", 65535)),
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("[::1]:80", ("::1", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
        ("klinik-köln.de:80", ("klinik-köln.de", 80)),
    ],
)
def test_addresses(given_text, address):
    assert parse_address(given_text) == address


@pytest.mark.parametrize(
    "bad",
    [
        "host",
        "host:",
        ":80",
        "host:0",
        "host:65536",
        "host:080808",
        "host:-1",
        "::1:80",
        "[::1]",
        "[host]:80",
        "[:::]:80",
        "http://host:80",
        "user@host:80",
        "a b:80",
        "a..b:80",  # asking for it raises UnicodeError, which is no OSError
        "x" * 64 + ".org:80",
        "ü" * 60 + ":80",
        "host:80\n",
    ],
)
def test_what_is_no_address(bad):
    assert parse_address(bad) is None


def test_flatten():
    nested = {"a": 1, "b": {"c": {"d": [2]}, "e": 3}, "f": {}}
    assert flatten(nested) == {"a": 1, "b.c.d": [2], "b.e": 3}


# -- anything at all ---------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.builds(lambda: 1 << 20_000)
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.sampled_from(["127.0.0.1:80", "both", "moving", "AB:" * 31 + "AB"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def fuzz(few, many):
    """How many examples: few in most runs, many new ones with `make test-full`. How
    long an example takes to make up does not matter."""
    return settings(
        max_examples=many if MORE else few,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def places(contents, path=()):
    """The paths to all entries."""
    for key, value in contents.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def parses_or_is_refused(contents):
    try:
        plan = SessionFile.parse(contents)
    except SessionFileError as exc:
        assert str(exc).isprintable()
        return
    assert SessionFile.parse(plan.contents) == plan
    assert re.fullmatch("[0-9a-f]{64}", plan.digest)


VALID = pins.contents(
    (HELPER, STATIC),
    title="x",
    reveal="gradient",
    result_to="both",
    parameters={"seed": 1, "iterations": [1, 2]},
)


@fuzz(150, 1000)
@given(st.data())
def test_one_entry_replaced_by_anything(data):
    contents = deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(places(contents))))
        put(data.draw(VALUES.filter(lambda v: v is not None)), *path)(contents)
    parses_or_is_refused(contents)


@fuzz(100, 500)
@given(st.dictionaries(st.sampled_from(sorted(VALID)) | st.text(max_size=9), VALUES))
@example({"parties": {"moving": {"name": []}}})
def test_anything_for_a_session_file(contents):
    parses_or_is_refused(contents)


@fuzz(200, 1000)
@given(st.binary(max_size=60), st.integers(0, 2000), st.integers(0, 60))
def test_any_bytes_for_a_session_file(tmp_path_factory, new, start, length):
    raw = text().encode()
    raw = raw[:start] + new + raw[start + length :]
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(raw)
    try:
        SessionFile.read(path)
    except SessionFileError:
        pass


@fuzz(200, 1000)
@given(
    st.text(max_size=80)
    | st.text(string.ascii_letters + "[]:%.@-ü1", max_size=20).map(lambda t: t + ":80")
)
def test_any_text_for_an_address(given_text):
    address = parse_address(given_text)
    if address is not None:
        host, port = address
        assert 0 < port < 65536
        host.encode("idna")


@pytest.mark.parametrize("opens", ["levels", "end"])
def test_what_syn_opens_is_what_the_file_says_in_words(tmp_path, opens):
    """To who gets the result the map, and no half of it; at ends of levels if so."""
    raw = text()
    for old, new in (
        ('operation = "affine"', 'operation = "syn"'),
        ('reveal = "gradient"', 'reveal = "map"'),
        ('result_to = "moving"', 'result_to = "both"'),
        ('transform = "affine"\n', f'opens = "{opens}"\n'),
        ("seed = 3\npad = false\n", ""),
    ):
        assert old in raw
        raw = raw.replace(old, new)
    words = explain(SessionFile.read(write(tmp_path, raw)))
    learned = words.split("Who will learn what")[1]
    assert learned.count("(map)") == 2 and "_to_ref" not in learned
    assert ("(level_moving)" in learned) == (opens == "levels")
    assert "What can be made of a map" in words
