"""Plans of cohorts: what is read, what is refused, and the sessions they become."""

from copy import deepcopy
from dataclasses import replace
import string
import tomllib

from examples import quick
from hypothesis import given
from hypothesis import strategies as st
import nibabel as nib
import numpy as np
import pytest

from dipy_ppir.align._public import planned_bits
from dipy_ppir.align.estimate import USUAL, estimate
from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.sessionfile import SessionFile
from dipy_ppir.workflows import cohort
from dipy_ppir.workflows.cohortbits import check_bits, explain_cohort
from dipy_ppir.workflows.cohortimages import check_images, read_images
from dipy_ppir.workflows.cohortplan import (
    MAX_BYTES,
    CohortPlan,
    same_work,
    toml_text,
)
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.operations import USUAL_SHAPES, explain, operation_of
from dipy_ppir.workflows.progress import duration_text, size_text

PINS = {name: create_identity(name).fingerprint for name in "ABCH"}


def contents(**entries):
    """A plan of three sites."""
    return {
        "title": "Trial 7",
        "operation": "affine",
        "reveal": "transform",
        "concurrent": 2,
        "pairs": [
            ["A/sub-01", "B/sub-01"],
            ["A/sub-02", "C/sub-01"],
            ["B/sub-02", "C/sub-01"],
            {"moving": "C/sub-01", "static": "A/sub-01"},
        ],
        "sites": {
            "A": {"name": "Hospital A", "fingerprint": PINS["A"]},
            "B": {"name": "B", "fingerprint": PINS["B"], "address": "b.org:8000"},
            "C": {"name": "C", "fingerprint": PINS["C"], "address": "[::1]:8000"},
        },
        "helper": {"name": "H", "fingerprint": PINS["H"], "address": "h.org:7433"},
        "parameters": {"level_iters": [10, 5], "sigmas": [1.0, 0.0], "factors": [2, 1]},
        **entries,
    }


def test_each_pair_becomes_a_session_file():
    plan = CohortPlan.parse(contents())
    sessions = [plan.session(pair) for pair in plan.pairs]
    assert [s.place for s in sessions] == [1, 2, 3, 4]
    assert len({s.digest for s in sessions}) == 4
    assert sessions[1].title == "Trial 7: A/sub-02 to C/sub-01"
    # Pairs take turns at the ports, and every site those of its own address.
    ports = [[p.address and p.address[1] for p in s.parties.values()] for s in sessions]
    assert ports == [
        [None, 8000, 7433],
        [None, 8001, 7434],
        [8000, 8000, 7433],
        [8001, None, 7434],
    ]
    assert sessions[3].parties[0].address[0] == "::1"
    assert [s.timeouts["connect"] for s in sessions] == [3600] * 4
    assert [p.name for p in plan.pairs_of("B")] == [
        "A.sub-01_to_B.sub-01",
        "B.sub-02_to_C.sub-01",
    ]
    assert len(plan.pairs_of("helper")) == 4
    assert {plan.site_of(pin) for pin in PINS.values()} == {"A", "B", "C", "helper"}
    with pytest.raises(SessionFileError, match="does not name this site's certificate"):
        plan.site_of(create_identity("D").fingerprint)


def test_what_is_written_is_what_was_meant(tmp_path):
    """Also by those who read session files only."""
    plan = CohortPlan.parse(contents(timeouts={"connect": 60.5}, limits={"memory": 2}))
    for pair in plan.pairs:
        path = tmp_path / "session.toml"
        path.write_text(toml_text(plan.contents(pair)))
        read = SessionFile.read(path)
        assert read == plan.session(pair)
        assert f"session {pair.place} of a row" in explain(read)


@quick(60)
@given(
    st.recursive(
        st.dictionaries(
            st.text(max_size=5),
            st.one_of(
                st.text(max_size=20).filter(lambda x: x.isprintable() or x == "\x7f"),
                st.integers(-(1 << 63), (1 << 63) - 1),
                st.floats(allow_nan=False, allow_infinity=False),
                st.booleans(),
                st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=3),
            ),
            max_size=4,
        ),
        lambda inner: st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
)
def test_any_tables_as_toml(tables):
    assert tomllib.loads(toml_text(tables)) == tables


def test_a_session_of_the_same_work():
    """Wherever it is held, but not of other images or parameters."""
    plan = CohortPlan.parse(contents())
    pair = plan.pairs[1]
    same = CohortPlan.parse(
        contents(concurrent=1, pairs=contents()["pairs"][1:], timeouts={"connect": 9})
    )
    assert same_work(plan.session(pair), same.session(same.pairs[0]))
    assert plan.session(pair).digest != same.session(same.pairs[0]).digest
    other = CohortPlan.parse(contents(result_to="moving"))
    assert not same_work(plan.session(pair), other.session(other.pairs[1]))
    assert not same_work(plan.session(pair), plan.session(plan.pairs[0]))


def test_all_pairs():
    entries = contents(
        all_pairs={"moving": ["A/1", "A/2"], "static": ["B/1", "C/1", "C/2"]}
    )
    del entries["pairs"]
    plan = CohortPlan.parse(entries)
    assert len(plan.pairs) == 6
    assert plan.pairs[2].name == "A.1_to_C.2"


def test_without_sites():
    """An image is not registered to itself."""
    entries = contents(all_pairs={"moving": ["1", "2"], "static": ["1", "2"]})
    for name in ("pairs", "sites", "helper"):
        del entries[name]
    plan = CohortPlan.parse(entries)
    assert [pair.name for pair in plan.pairs] == ["1_to_2", "2_to_1"]
    assert plan.pairs_of("") == plan.pairs
    assert operation_of(plan.session(plan.pairs[0]))[1].level_iters == (10, 5)


def put(value, *path):
    def change(entries):
        for key in path[:-1]:
            entries = entries[key]
        entries[path[-1]] = value

    return change


PAIR = "pairs", 0
BAD = {
    "unknown": (put(1, "colour"), "no entry 'colour'"),
    "no list": (put("A/1", "pairs"), "pairs must be a list"),
    "no pair": (put([], "pairs"), "not empty"),
    "three": (put(["A/1", "B/1", "C/1"], *PAIR), "pair 1 must be"),
    "one": (put({"moving": "A/1"}, *PAIR), "pair 1 has None"),
    "up": (put("A/../../etc", *PAIR, 0), "pair 1 has .*not SITE/PSEUDONYM"),
    "dots": (put("A/..", *PAIR, 0), "not SITE/PSEUDONYM"),
    "root": (put("/etc/passwd", *PAIR, 0), "not SITE/PSEUDONYM|has no table"),
    "flag": (put("A/--force", *PAIR, 0), "not SITE/PSEUDONYM"),
    "backslash": (put("A/a\\b", *PAIR, 0), "not SITE/PSEUDONYM"),
    "line": (put("A/a\nb", *PAIR, 0), "not SITE/PSEUDONYM"),
    "escape": (put("A/a\x1b[2J", *PAIR, 0), "not SITE/PSEUDONYM"),
    "no site": (put("sub-01", *PAIR, 0), "not SITE/PSEUDONYM"),
    "long": (put("A/" + "a" * 41, *PAIR, 0), "not SITE/PSEUDONYM"),
    "number": (put(7, *PAIR, 0), "not SITE/PSEUDONYM"),
    "stranger": (put("D/sub-01", *PAIR, 0), "names a site 'D' that has no table"),
    "helper's image": (put("helper/1", *PAIR, 0), "has no table"),
    "twice": (put(["A/sub-02", "C/sub-01"], *PAIR), "pairs 1 and 2 would both"),
    "case": (put(["A/SUB-02", "C/sub-01"], *PAIR), "pairs 1 and 2 would both"),
    "itself": (put(["A/1", "A/1"], *PAIR), "same image twice"),
    "one site": (put(["A/1", "A/2"], *PAIR), "two images of A"),
    "both lists": (put({}, "all_pairs"), "either pairs"),
    "many": (put([["A/1", "B/1"]] * 10_001, "pairs"), "at most 10,000 pairs"),
    "no site table": (put(3, "sites"), r"\[sites\] must be a table"),
    "site no table": (put(3, "sites", "A"), r"\[sites.A\] must be a table"),
    "site's name": (put({}, "sites", "../x"), "name of a site, '../x'"),
    "helper a site": (put({}, "sites", "helper"), r"must be \[helper\]"),
    "no helper": (lambda c: c.pop("helper"), "needs two tables"),
    "one site only": (lambda c: put({"A": c["sites"]["A"]}, "sites")(c), "needs two"),
    "same key": (
        lambda c: put(PINS["A"].lower(), "sites", "B", "fingerprint")(c),
        "two sites have the same fingerprint",
    ),
    "same name": (put("Hospital A", "sites", "B", "name"), "have the same name"),
    "no key": (put("AA", "sites", "B", "fingerprint"), "not a SHA-256"),
    "ports": (put("h.org:7434", "sites", "A", "address"), "would both listen at h.org"),
    "last port": (put("h.org:65535", "sites", "A", "address"), "room for 2 ports"),
    "no port": (put("h.org", "sites", "A", "address"), "must be host:port"),
    "concurrent": (put(0, "concurrent"), "integer from 1 to 64"),
    "concurrent true": (put(True, "concurrent"), "integer from 1 to 64"),
    "title": (put("a" * 61, "title"), "title has 61 letters"),
    "title's lines": (put("a\nb", "title"), "short text on one line"),
    "operation": (put("guess", "operation"), "operation = 'guess' is not known"),
    "no reveal": (lambda c: c.pop("reveal"), "say what may be revealed"),
    "parameter": (put(1, "parameters", "colour"), "no entry 'colour'"),
    "date": (put(tomllib.loads("x = 2026-01-01")["x"], "parameters", "x"), "must be"),
    "timeouts": (put({"connect": 0}, "timeouts"), "connect in .timeouts. must be"),
    "place": (put(3, "place"), "no entry 'place'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_plans(name):
    change, words = BAD[name]
    entries = deepcopy(contents())
    change(entries)
    with pytest.raises(SessionFileError, match=words) as caught:
        CohortPlan.parse(entries)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_file_names_itself(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text("colour = 1")
    with pytest.raises(SessionFileError, match="plan plan.toml: .*colour"):
        CohortPlan.read(path)
    path.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(SessionFileError, match="too large for a plan"):
        CohortPlan.read(path)


# -- in words ----------------------------------------------------------------


def test_in_words():
    plan = CohortPlan.parse(contents())
    text = explain_cohort(plan)
    bits = planned_bits(operation_of(plan.session(plan.pairs[0]))[1], 3)
    for words in (
        "Hospital A is A, in 3 pairs.",
        "H is the helper, in 4 pairs.",
        PINS["C"],
        "Hospital A dials out only.",
        "H listens at h.org, ports 7433 to 7434 (TCP).",
        "    A/sub-02 to C/sub-01",
        "It is an affine registration by mutual information.",
        f"C/sub-01, moving image of 1 and static image of 2: at most {2 * bits:,.0f} "
        "bits in all, to A, B",
        plan.digest,
    ):
        assert words in text
    assert "CAUTION: over" not in text


def many_to_one(count):
    pairs = [[f"A/{n}", "B/atlas"] for n in range(count)]
    return CohortPlan.parse(contents(pairs=pairs))


def test_more_bits_than_an_owner_accepts():
    """Are refused there before anybody is met, and everybody can read of them."""
    few, many = many_to_one(10), many_to_one(30)
    check_bits(few, "B")
    assert "CAUTION: over the 20,000 bits about B/atlas" in explain_cohort(many)
    with pytest.raises(
        InputError, match="bits about B/atlas, over the limit of 20,000"
    ):
        check_bits(many, "B")
    check_bits(many, "A")
    check_bits(many, "B", 0)
    with pytest.raises(InputError, match="over the limit of 100"):
        check_bits(few, "B", 100)


def test_bits_that_depend_on_sizes():
    plan = CohortPlan.parse(
        contents(operation="syn", reveal="map", parameters={"level_iters": [10, 5]})
    )
    assert "depends on the size of the images" in explain_cohort(plan)
    check_bits(plan, "C", 1)
    points = CohortPlan.parse(contents(operation="points", parameters={}))
    with pytest.raises(InputError, match="bits about A/sub-01, over the limit of 10"):
        check_bits(points, "A", 10)


@pytest.mark.parametrize("concurrent", [1, 2])
def test_what_a_cohort_takes_is_said_of_one_pair_and_of_all(concurrent):
    plan = CohortPlan.parse(contents(concurrent=concurrent))
    parameters = operation_of(plan.session(plan.pairs[0]))[1]
    text = explain_cohort(plan)
    one, _, whole = text.partition("What the whole cohort takes")
    for shape in USUAL_SHAPES[3]:
        ahead = estimate(parameters, shape, shape)
        assert f"{size_text(ahead.sent)} of traffic" in one
        assert f"{size_text(4 * ahead.sent)} of traffic" in whole
        longest = duration_text(4 * ahead.seconds(USUAL))
        shortest = duration_text(4 / concurrent * ahead.seconds(USUAL))
        times = longest if concurrent == 1 else f"{shortest} to {longest}"
        assert f"about {times}, " in whole
    assert ("2 pairs at a time" in whole) == (concurrent == 2)


def test_a_long_plan_is_cut():
    text = explain_cohort(many_to_one(500))
    assert "and 400 more" in text
    assert len(text.splitlines()) < 350


@pytest.mark.parametrize("operation", ["affine", "syn", "points", "freeform"])
def test_a_plan_to_fill_in(tmp_path, capsys, operation):
    assert cohort.cohort(["--new", operation]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(SessionFileError, match="fingerprint in .*A.* is not"):
        CohortPlan.read(path)
    for pin in PINS.values():
        text = text.replace('"..."', f'"{pin}"', 1)
    path.write_text(text)
    assert cohort.cohort([str(path), "--check"]) == 0
    assert "2 pairs, 2 at a time" in capsys.readouterr().out


# -- tables of images ---------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    nib.save(
        nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), tmp_path / "a.nii"
    )

    def write(*rows, head="participant_id\tfile\tmask"):
        path = tmp_path / "images.tsv"
        path.write_text("\n".join([head, *rows]))
        return path

    return write


def check(images, *wanted, operation="affine", **parameters):
    plan = CohortPlan.parse(contents())
    found = operation_of(plan.session(plan.pairs[0]))[1]
    found = replace_parameters(found, **parameters)
    check_images(images, dict.fromkeys(wanted, "moving"), operation, found)


def replace_parameters(parameters, **changed):
    return parameters.model_copy(update=changed)


def test_images_are_found_beside_their_table(table, tmp_path):
    images = read_images(table("sub-01\ta.nii\tn/a", "", "sub-02\ta.nii\ta.nii"))
    assert images["sub-01"].file == tmp_path / "a.nii"
    assert images["sub-01"].mask is None
    assert images["sub-02"].mask == tmp_path / "a.nii"
    check(images, "sub-01", "sub-02")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["1\ta.nii"], "line 2: 2 entries, but 3 columns"),
        (["1\ta.nii\t", "1\tb.nii\t"], "line 3: '1' is in the table twice"),
        (["\ta.nii\t"], "line 2: participant_id or file is empty"),
        (["1\tn/a\t"], "line 2: participant_id or file is empty"),
    ],
)
def test_bad_tables(table, rows, words):
    with pytest.raises(InputError, match=words):
        read_images(table(*rows))


def test_files_that_are_no_tables(table, tmp_path):
    with pytest.raises(InputError, match="cannot read the table of images"):
        read_images(tmp_path / "none.tsv")
    for head in ("", "participant_id,file", "subject\tfile"):
        with pytest.raises(InputError, match="must name the columns"):
            read_images(table("1\ta.nii", head=head))
    (tmp_path / "latin.tsv").write_bytes(b"\xe9\t")
    with pytest.raises(InputError, match="not UTF-8"):
        read_images(tmp_path / "latin.tsv")


def test_images_that_cannot_be_used(table, tmp_path):
    (tmp_path / "text.nii").write_text("no image")
    images = read_images(table("1\tnone.nii\t", "2\ttext.nii\t", "3\ta.nii\ttext.nii"))
    with pytest.raises(InputError, match="pairs with 4, 5, of which the table"):
        check(images, "5", "4", "1")
    with pytest.raises(InputError, match="the image of 1 .*none.nii does not exist"):
        check(images, "1")
    with pytest.raises(InputError, match="the image of 2 .*cannot be read as NIfTI"):
        check(images, "2")
    with pytest.raises(InputError, match="the mask of 3 .*cannot be read as NIfTI"):
        check(images, "3")
    with pytest.raises(InputError, match="masks need all voxels"):
        check(images, "3", sampling_proportion=0.1)
    with pytest.raises(InputError, match="only affine registration knows"):
        check(images, "3", operation="syn")


def test_pseudonyms_of_all_kinds():
    letters = string.ascii_letters + string.digits
    plan = CohortPlan.parse(contents(pairs=[["A/" + letters[:40], "B/1_2.3-4"]]))
    assert replace(plan.pairs[0], place=2).name == plan.pairs[0].name
