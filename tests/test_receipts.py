"""The command that reads receipts: of one run or not, changed or not, from anybody."""

from copy import deepcopy
import json
import sys

import numpy as np
import pytest
from records import receipts_of_templates, run, run_of_sites

from dipy_ppir.align import plausibility
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.record import common_digest, file_hash
from dipy_ppir.workflows import cli
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.receiptfile import MAX_BYTES, load
from dipy_ppir.workflows.receipts import check, receipt, report

FACTS = {
    "operation": "affine",
    "parameters": {"nbins": 32, "level_iters": [10, 5]},
    "images": {
        name: {"shape": [91, 109, 91], "voxel_size": [2.0, 2.0, 2.5]}
        for name in ("static", "moving")
    },
    "static_grid2world": np.eye(4).tolist(),
    "warnings": ["the turn is large"],
}


@pytest.fixture
def written(three, tmp_path):
    """Write the receipts of a run; returns them, and the names of their files."""

    def write(party=lambda s: run_of_sites(s, **FACTS), folder=""):
        receipts, files = three(party), []
        for pid, found in enumerate(receipts):
            file = tmp_path / folder / f"{pid}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(found, indent=2))
            files.append(str(file))
        return [json.loads(json.dumps(found)) for found in receipts], files

    return write


def answer(capsys, *arguments):
    """Status, last line and all that the command prints."""
    status = receipt([str(a) for a in arguments])
    text = capsys.readouterr().out
    assert all(c.isprintable() for c in text.replace("\n", ""))
    return status, text.splitlines()[-1], text


# -- what is as it should be -------------------------------------------------


def test_all_three(written, capsys):
    receipts, files = written()
    status, verdict, text = answer(capsys, *files)
    assert status == 0
    assert verdict.startswith("Consistent: all three") and "signed" in verdict
    for said in (
        "a test\n",
        receipts[0]["run"],
        receipts[0]["date"][:10],
        receipts[0]["session_file"],
        "The static owner was Site 1.\n    certificate SHA-256 ",
        "The moving image has 91 x 109 x 91 voxels of 2 x 2 x 2.5 mm.",
        "It was an affine registration by mutual information.\n    nbins = 32\n",
        "level_iters = [10, 5]",
        "what a test opens to the moving owner: 10 numbers, 28 bits",
        "The moving owner sent ",
        "Helper: the turn is large",
    ):
        assert said in text, said
    assert "What is wrong" not in text


@pytest.mark.parametrize("given", [[MOVING], [HELPER], [STATIC, MOVING]])
def test_some_of_them(written, capsys, given):
    _, files = written()
    status, verdict, _ = answer(capsys, *(files[pid] for pid in given))
    assert status == 0
    assert verdict.startswith("Consistent, signed with the three keys")
    for pid, role in ROLES.items():
        assert (role in verdict.split(";")[1]) == (pid not in given)


def test_a_run_on_one_machine(written, capsys):
    _, files = written(lambda s: run(s, **FACTS))
    status, verdict, text = answer(capsys, *files)
    assert status == 0
    assert "not signed" in verdict
    assert "certificate" not in text
    # Where both images are on one disk, there is one only.
    status, verdict, _ = answer(capsys, files[MOVING])
    assert status == 0 and verdict.startswith("Consistent in itself, not signed")


def test_a_copy_for_others_has_nothing_of_its_own(written, capsys, tmp_path):
    own = {
        "transform": {
            "shift": [1.0, 2.0, 3.0],
            "turn": 4.0,
            "axis": None,
            "scales": [1.0, 1.0, 1.0],
            "mirrored": False,
        },
        "arrays": {"static image": "0" * 64},
        "equalized": True,
    }
    _, files = written(lambda s: run_of_sites(s, **FACTS, **own))
    copy = tmp_path / "shared.json"
    status, _, text = answer(capsys, files[STATIC], "--to_send", copy)
    assert status == 0 and "takes the centre of the static image" in text
    sent = json.loads(copy.read_text())
    assert not sent.keys() & own.keys() and sent["warnings"] == []
    status, verdict, text = answer(capsys, files[MOVING], copy, files[HELPER])
    assert status == 0 and verdict.startswith("Consistent: all three")
    with pytest.raises(InputError, match="there already; name another"):
        receipt([files[STATIC], "--to_send", str(copy)])
    with pytest.raises(InputError, match="a copy of one receipt"):
        receipt([*files[:2], "--to_send", str(tmp_path / "other.json")])


def test_a_run_that_was_resumed(written, capsys):
    """What came before is counted by each party as far as it came."""

    def party(session):
        run(session)
        state = session.ledger.state()
        session.new_run()
        for _ in range(1 + (session.pid == STATIC)):
            session.ledger.add(state)
        return run_of_sites(session)

    _, files = written(party)
    status, _, text = answer(capsys, *files)
    assert status == 0
    assert "The run was interrupted once." in text
    assert "It went on with the interrupted run " in text


def test_totals_that_were_changed(written):
    """The digest does not cover what came before an interruption."""
    found = written()[0][MOVING]
    found |= {"resumed": 1, "last_attempt": deepcopy(found["learned"])}
    assert problems_of([found]) == []
    less = changed([found], 0, "learned", "moving owner", 0, "values", value=9)
    for edited in (less[0], {**found, "resumed": 0}):
        assert problems_of([edited]) == [
            "In 0.json what was opened since an interruption is not part of the whole."
        ]


def test_files(written, capsys, tmp_path):
    receipts, files = written()
    for name in ("image", "mask", "other"):
        (tmp_path / name).write_text(name)
    receipts[MOVING]["files"] = {
        f"moving {name}": file_hash(receipts[0]["run"], tmp_path / name)
        for name in ("image", "mask")
    }
    (tmp_path / "0.json").write_text(json.dumps(receipts[MOVING]))
    own = [tmp_path / name for name in ("image", "mask", "other")]
    status, _, text = answer(capsys, *files, "--files", *own[:2])
    assert status == 0
    assert f"{own[0]} is the moving image of {files[0]}.\n{own[1]} is the mov" in text
    status, verdict, text = answer(capsys, *files, "--files", *own)
    assert (status, verdict) == (1, "NOT CONSISTENT: see the 1 point above.")
    assert f"{own[2]} is none of the files" in text
    with pytest.raises(InputError, match="cannot read .*nowhere.* check its name"):
        receipt([*files, "--files", str(tmp_path / "nowhere")])


def test_the_command(written, capsys, monkeypatch, tmp_path):
    receipts, files = written()
    monkeypatch.setattr(sys, "argv", ["dipy_ppir_receipt", *files])
    assert cli.receipt() == 0
    monkeypatch.setattr(sys, "argv", ["dipy_ppir_receipt", files[0], files[0]])
    assert cli.receipt() == 1
    assert "error: the same receipt was given twice" in capsys.readouterr().err
    (tmp_path / "more.json").write_text(json.dumps(receipts[0]))
    with pytest.raises(InputError, match="4 receipts were given.* its three parties"):
        receipt([*files, str(tmp_path / "more.json")])


# -- templates ---------------------------------------------------------------

TEMPLATE = {
    "parameters": {"iterations": 4, "initial template": "0" * 64},
    "images": {"template": {"shape": [96, 114, 96], "voxel_size": [2.0, 2.0, 2.0]}},
}


@pytest.fixture(scope="module")
def of_templates():
    """Receipts of four sites that built a template."""
    receipts = receipts_of_templates(4, **TEMPLATE)
    return [json.loads(json.dumps(found)) for found in receipts]


def test_receipts_of_a_template(of_templates, capsys, tmp_path):
    (tmp_path / "image").write_text("an image")
    own = {
        "files": {"image 1": file_hash(of_templates[0]["run"], tmp_path / "image")},
        "warnings": ["a template was built before"],
    }
    files = []
    for pid, found in enumerate(of_templates):
        files.append(str(tmp_path / f"{pid}.json"))
        (tmp_path / f"{pid}.json").write_text(json.dumps({**found, **own}))
    status, verdict, text = answer(capsys, *files)
    assert status == 0
    assert verdict.startswith("Consistent: all 4 receipts are of one run")
    assert "signed with the 4 keys" in verdict
    for said in (
        "The site Clinic 3 took part.\n    certificate SHA-256 ",
        "The template image has 96 x 114 x 96 voxels of 2 x 2 x 2 mm.",
        "It was a template of several sites' images.\n    iterations = 4\n",
        f"initial template = {'0' * 64}",
        "The site Clinic 2 learned, once, what a test adds up: 9 numbers, ",
        f"{files[0]} is the site Clinic 0's, written with",
        "Site Clinic 1: a template was built before",
    ):
        assert said in text, said
    copy, image = tmp_path / "copy.json", tmp_path / "image"
    status, verdict, text = answer(
        capsys, files[0], "--to_send", copy, "--files", image
    )
    assert status == 0
    assert verdict.endswith(
        "the site Clinic 1's and the site Clinic 2's and the site Clinic 3's receipt "
        "was not given."
    )
    assert f"{image} is the image 1 of {files[0]}." in text
    sent = json.loads(copy.read_text())
    assert "files" not in sent and sent["warnings"] == []
    status, _, text = answer(capsys, copy, *files[1:])
    assert status == 0 and "Clinic 0: a template was built" not in text
    with pytest.raises(InputError, match="5 receipts were given.* its 4 parties"):
        receipt([*files, str(copy)])


@pytest.mark.parametrize(
    "keys, value",
    [
        (("parameters", "initial template"), "1" * 64),
        (("learned", "site Clinic 1", 0, "bits"), 1.0),
        (("parties", "site Clinic 3", "name"), "Clinic 5"),
    ],
)
def test_a_change_of_a_templates_receipt_is_found(of_templates, keys, value):
    edited = changed(of_templates, 2, *keys, value=value)
    problems = problems_of(edited)
    assert problems[0].startswith("2.json was changed after the run")
    assert any(p.startswith(keys[0]) and " differs: " in p for p in problems)
    digest = common_digest(edited[2])
    edited[2]["common"] = dict.fromkeys(edited[2]["common"], digest)
    problems = problems_of(edited[2:3])
    assert sum("the signature of the site Clinic" in p for p in problems) == 4


def test_a_site_left_out_of_a_receipt(of_templates, tmp_path):
    """Those that are left did not sign what it says then."""
    edited, file = deepcopy(of_templates[0]), tmp_path / "0.json"
    del edited["parties"]["site Clinic 3"]
    file.write_text(json.dumps(edited))
    with pytest.raises(InputError, match="its entry 'learned' is missing, or not"):
        load(file, templates=True)
    for entry in ("learned", "bits", "bytes_sent", "common", "signatures"):
        del edited[entry]["site Clinic 3"]
    file.write_text(json.dumps(edited))
    problems = problems_of([load(file, templates=True)])
    assert problems[0].startswith("0.json was changed after the run")
    for parties in (
        None,
        {},
        {"a": {}, "b": {}},
        [1, 2, 3],
        {"\x07": 1, "b": 2, "c": 3},
    ):
        file.write_text(json.dumps({**edited, "parties": parties}))
        with pytest.raises(InputError, match="does not name the sites"):
            load(file, templates=True)


def test_other_commands_read_no_template(of_templates, tmp_path):
    (tmp_path / "0.json").write_text(json.dumps(of_templates[0]))
    with pytest.raises(InputError, match="the receipt of a template, which"):
        load(tmp_path / "0.json")


# -- what is not -------------------------------------------------------------


def changed(receipts, pid, *keys, value):
    """Copies of receipts, with one entry of party `pid` changed."""
    receipts = deepcopy(receipts)
    entry = receipts[pid]
    for key in keys[:-1]:
        entry = entry[key]
    entry[keys[-1]] = value
    return receipts


def problems_of(receipts):
    return check({f"{pid}.json": found for pid, found in enumerate(receipts)})


CHANGES = {
    "number opened": ("learned", "moving owner", 0, "values", 9),
    "bits opened": ("learned", "moving owner", 0, "bits", 27.9),
    "nothing opened": ("learned", "moving owner", []),
    "date": ("date", "2026-01-01T00:00:00Z"),
    "organisation": ("parties", "static owner", "name", "Site 7"),
    "parameter": ("parameters", "nbins", 33),
    "new parameter": ("parameters", "more", None),
    "image": ("images", "static", "shape", [91, 109, 92]),
    "place": ("static_grid2world", 0, 0, 2.0),
    "version": ("versions", "numpy", "1.0"),
    "sources": ("source", "0" * 64),
    "title": ("title", None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_found(written, what):
    """In a receipt by itself; and beside the others in what it differs from them."""
    *keys, value = CHANGES[what]
    edited = changed(written()[0], STATIC, *keys, value=value)
    problems = problems_of([edited[STATIC]])
    assert problems[0].startswith("0.json was changed after the run")
    problems = problems_of(edited)
    assert problems[0].startswith("1.json was changed after the run")
    named = next(p for p in problems if " differs: " in p)
    assert named.startswith(keys[0]) and "in 0.json" in named
    # With the digest put right, the signatures are still of what was.
    digest = common_digest(edited[STATIC])
    edited[STATIC]["common"] = dict.fromkeys(ROLES.values(), digest)
    problems = problems_of([edited[STATIC]])
    assert sum("the signature of the" in p for p in problems) == 3


def test_changes_outside_of_what_is_signed(written):
    """What every party counts by itself is compared."""
    receipts, _ = written()
    edited = changed(receipts, HELPER, "bytes_sent", "moving owner", "first", value=3)
    assert problems_of(edited) == [
        "bytes_sent.moving owner.first differs: "
        "80 in 0.json, 80 in 1.json, 3 in 2.json."
    ]
    edited = changed(receipts, HELPER, "bits", "moving owner", value=3.0)
    assert "The bits of the moving owner do not add up in 0.json." in problems_of(
        edited[2:]
    )


def test_receipts_of_different_runs(written):
    (first, second, _), _ = written()
    (other, *_), _ = written(folder="other")
    problems = problems_of([other, second])
    assert len(problems) == 1 and problems[0].startswith("They are of different runs")
    problems = problems_of([first, first, second])
    assert problems == [
        "0.json and 1.json are both the moving owner's: give one of each party."
    ]


def test_parties_that_parted_during_the_run(written):
    def party(session):
        return run_of_sites(session, parameters={"n": session.pid == HELPER})

    receipts, _ = written(party)
    problems = problems_of(receipts)
    assert (
        "By 0.json the helper recorded something else when the run ended"
        in (problems[0])
    )
    assert problems[-1] == (
        "parameters.n differs: false in 0.json, false in 1.json, true in 2.json."
    )


def test_a_signature_of_another_role_is_none(written):
    receipts, _ = written()
    signatures = receipts[MOVING]["signatures"]
    signatures["helper"] = signatures["static owner"]
    (problem,) = problems_of(receipts[:1])
    assert "the signature of the helper is missing, or not of what is" in problem
    del signatures["helper"]
    assert problems_of(receipts[:1]) == [problem]


def test_many_differences_are_cut_off(written):
    receipts, _ = written()
    more = {f"more{i}": i for i in range(100)}
    edited = changed(receipts, STATIC, "parameters", value=more)
    problems = problems_of(edited)
    assert len(problems) < 30
    assert problems[-1] == "And 83 entries more differ."


# -- what somebody else wrote ------------------------------------------------

ODD = (
    *(None, True, -1, 1e300, 10**30, "\x1b[2J", "x" * 5000),
    *([], {}, [[]], 200 * [1.0], {"\x07": 1}),
)


def entries(value, path=()):
    """Paths of all entries of a receipt."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from entries(item, (*path, key))


def test_anything_in_place_of_any_entry(written, tmp_path):
    """An error with a reason, or a text fit to be shown."""
    (found, *_), _ = written()
    found["transform"] = {
        "shift": [1.0, 2.0, 3.0],
        "turn": 1.0,
        "axis": None,
        "scales": [1.0, 1.0, 1.0],
        "mirrored": False,
    }
    refused, shown = read_with_anything(found, tmp_path / "odd.json")
    assert refused > 500 and shown > 100


def test_anything_in_place_of_any_entry_of_a_templates(of_templates, tmp_path):
    refused, shown = read_with_anything(of_templates[0], tmp_path / "odd.json")
    assert refused > 500 and shown > 50


def read_with_anything(found, file):
    """How often it was refused, and shown."""
    refused = shown = 0
    for path in entries(found):
        for odd in ODD:
            edited = changed([found], 0, *path, value=odd)[0] if path else odd
            file.write_text(json.dumps(edited))
            try:
                receipts = {"odd.json": load(file, templates=True)}
            except InputError as exc:
                assert str(exc).isprintable() and len(str(exc)) < 500
                refused += 1
                continue
            text = report(receipts, [], check(receipts))
            assert text.replace("\n", "").isprintable()
            shown += 1
    return refused, shown


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "is not a receipt"),
        (b"[1]", "is not a receipt"),
        (b"{" * 100_000, "is not a receipt"),
        (b"[" * 900 + b"]" * 900, "is not a receipt"),
        (b'{"run": NaN}', "is not a receipt"),
        (b'{"run": 1e999}', "is not a receipt"),
        (b"\xff\xfe", "is not a receipt"),
        (b"{}", "its entry 'run' is missing"),
        (b'{"run": null}', "of a metric by itself"),
        (b" " * (MAX_BYTES + 1), "too large for a receipt"),
    ],
    ids=lambda x: repr(x)[:20],
)
def test_files_that_are_no_receipts(tmp_path, data, said):
    file = tmp_path / "some\x1b[2J.json"
    file.write_bytes(data)
    with pytest.raises(InputError, match=said) as caught:
        load(file)
    assert str(caught.value).isprintable()


def test_a_receipt_of_another_version(written, tmp_path):
    (found, *_), (file, *_) = written()
    found["learned"]["helper"] = [
        {**found["learned"]["moving owner"][0], "label": "future"}
    ]
    (tmp_path / "0.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match="'future' that this program does not know"):
        load(file)
    with pytest.raises(InputError, match="cannot read the receipt"):
        load(tmp_path / "nowhere.json")


def test_what_nobody_signed_is_compared_all_the_same(written, capsys, tmp_path):
    """An owner that hides what was opened before an interruption, or a warning."""
    own = {"warnings": ["in the end something"]}
    receipts, files = written(lambda s: run_of_sites(s, **{**FACTS, **own}))
    assert answer(capsys, *files)[1].startswith("Consistent: all three")

    def changed(**entries):
        changed = tmp_path / "changed.json"
        changed.write_text(json.dumps({**receipts[MOVING], **entries}))
        return changed

    for entries, said in (
        (
            {
                "resumed": 1,
                "last_attempt": receipts[MOVING]["learned"],
            },
            "resumed is not the same",
        ),
        ({"earlier_runs": ["0" * 64]}, "earlier_runs is not the same"),
        ({"warnings": [plausibility.MISMATCH]}, "only one warns"),
        ({"bytes_total": 7}, "do not add up in"),
    ):
        one = changed(**entries)
        status, verdict, text = answer(capsys, one, *files[1:])
        assert status == 0 and "what differs of what nobody signed" in verdict
        assert said in text


@pytest.mark.parametrize("duration", [-3, 10**400])
def test_numbers_that_are_none(written, duration):
    receipts, files = written()
    with open(files[0], "w") as stream:
        json.dump({**receipts[0], "duration": duration}, stream)
    with pytest.raises(InputError, match="duration"):
        load(files[0])
