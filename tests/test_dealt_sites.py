"""A helper that deals before two sites meet: real programs, sockets and TLS."""

import json
import shutil
import signal
import tomllib

import nibabel as nib
import numpy as np
from ports import free_port
import pytest
from sites import Launcher, Sites

from dipy_ppir.align import syn_registration
from dipy_ppir.align.checkpoint import Checkpoint
from dipy_ppir.align.estimate import dealt_bytes
from dipy_ppir.align.parameters import SynParameters
from dipy_ppir.mpc.dealfile import MARKS
from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.session import Session
from dipy_ppir.mpc.sessionfile import SessionFile
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.operations import explain, template
from dipy_ppir.workflows.receipts import receipt as check_receipts
from dipy_ppir.workflows.remote import Site
from dipy_ppir.workflows.sites import helper as helper_command
from dipy_ppir.workflows.sites import session as session_command

OWNERS = "moving", "static"
SYN = {"level_iters": [3, 2], "radius": 3}
#: Ends a program when it has kept its state at the end of a level.
DIES = """
import os, signal
from dipy_ppir.align.checkpoint import Checkpoint
save = Checkpoint.save
def save_and_die(self, *args):
    save(self, *args)
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save_and_die
"""
#: Ends a helper that has begun its files; it hears SIGINT wherever tests run.
ENDS = """
import os, signal
from dipy_ppir.mpc.dealfile import DealWriter
signal.signal(signal.SIGINT, signal.default_int_handler)
DealWriter.begin = lambda *_: os.kill(os.getpid(), {number})
"""


@pytest.fixture(scope="module", autouse=True)
def launcher():
    with Launcher():
        yield


def pair_of(bodies):
    """Two images, of which the moving one begins earlier and ends later."""
    static, _, matrix, _ = bodies(3)
    moving, place = np.roll(static, 1, axis=1) ** 0.8, matrix.copy()
    place[0, 3] = -2
    return static, np.pad(moving, ((2, 0), (0, 1), (0, 0))), matrix, place


@pytest.fixture
def sites(tmp_path, bodies):
    options = {"ahead": True, "parameters": SYN}
    return Sites(tmp_path / "sites", "syn", pair_of(bodies), **options)


def deal_of(sites, site):
    return sites.folder / f"session.{site}.deal"


def receipts_of(sites):
    return [sites.folder / f"out_{site}" / "receipt.json" for site in OWNERS]


def test_the_helper_deals_and_the_owners_meet(sites, capsys):
    sites.pictures = True
    sites.run()
    log = sites.log("helper")
    number = log.split("Deal ")[1].split(",")[0]
    assert "The two files will take about" in log and "Receipt" not in log
    outputs = sites.outputs("moving"), sites.outputs("static")
    results = {"displacement_field.nii.gz", "receipt.json", "report.html"}
    assert set(outputs[0]) >= results | {"warped_moved.nii.gz"}
    assert set(outputs[1]) >= results
    page = (sites.folder / "out_static" / "report.html").read_text()
    assert "The helper, Site helper, dealt before the owners met" in page
    fields = [
        nib.load(sites.folder / f"out_{site}" / "displacement_field.nii.gz").get_fdata()
        for site in OWNERS
    ]
    np.testing.assert_array_equal(*fields)
    assert np.abs(fields[0]).max() > 0.5
    static, moving, warped = (
        nib.load(sites.folder / name).get_fdata()
        for name in ("static.nii.gz", "moving.nii.gz", "out_moving/warped_moved.nii.gz")
    )
    moving = moving[2:, :-1]  # where the static image is
    before, after = (np.corrcoef(x.flat, static.flat)[0, 1] for x in (moving, warped))
    assert after > before + 0.02
    receipts = [json.loads(file.read_text()) for file in receipts_of(sites)]
    for site, receipt in zip(OWNERS, receipts, strict=True):
        assert receipt["deal"]["number"] == number
        assert receipt["deal"]["helper"] == "Site helper"
        assert receipt["deal_bytes"] == deal_of(sites, site).stat().st_size
        assert sorted(receipt["learned"]) == ["moving owner", "static owner"]
        assert (sites.folder / "keys" / site / MARKS / number).exists()
    assert check_receipts([str(file) for file in receipts_of(sites)]) == 0
    said = capsys.readouterr().out
    assert "both receipts are of one run" in said and f"made deal {number}" in said
    assert "dealt before the owners met and received nothing" in sites.log("moving")
    assert "that the helper had dealt" in sites.log("static")
    # The same files again are refused before anybody is met.
    statuses = sites.wait(sites.start("--force", sites=["static"]))
    assert statuses == {"static": 1}
    assert "was used already" in sites.last_line("static")
    assert "Listening" not in sites.log("static")


def test_about_as_large_as_it_was_said(sites):
    sites.run(sites=["helper"])
    shapes = [nib.load(sites.folder / f"{n}.nii.gz").shape for n in OWNERS]
    parameters = SynParameters(reveal="map", **SYN)
    expected = dealt_bytes(parameters, *shapes[::-1])
    found = sum(deal_of(sites, site).stat().st_size for site in OWNERS)
    assert 0.8 < found / expected < 1.25


def test_an_owner_dies_and_both_go_on_with_another_deal(tmp_path, bodies):
    sites = Sites(
        tmp_path / "sites",
        "syn",
        pair_of(bodies),
        ahead=True,
        parameters=SYN,
        timeouts={"checkpoint": 0},
    )
    sites.run(sites=["helper"])
    statuses = sites.wait(sites.start(sites=OWNERS, before={"static": DIES}))
    assert statuses == {"static": -signal.SIGKILL, "moving": 1}
    statuses = sites.wait(sites.start("--resume", sites=OWNERS))
    assert set(statuses.values()) == {1}
    assert "make a new deal" in sites.last_line("moving")
    statuses = sites.wait(sites.start("--resume", "--force", sites=["helper"]))
    assert statuses == {"helper": 1} and "leave them out" in sites.last_line("helper")
    sites.run("--force", sites=["helper"])
    sites.run("--resume", sites=OWNERS)
    for file in receipts_of(sites):
        assert json.loads(file.read_text())["resumed"] == 1


def test_deals_that_do_not_belong_together(sites, tmp_path):
    sites.run(sites=["helper"])
    shutil.copy(deal_of(sites, "moving"), tmp_path / "kept")
    sites.run("--force", sites=["helper"])
    shutil.copy(tmp_path / "kept", deal_of(sites, "moving"))
    statuses = sites.wait(sites.start(sites=OWNERS))
    assert set(statuses.values()) == {1}
    for site in OWNERS:
        assert "one run of dipy_ppir_helper --deal" in sites.log(site)
        # Nothing was used up.
        assert not (sites.folder / "keys" / site / MARKS).exists()


def test_an_image_that_the_helper_was_not_told_of(sites):
    sites.run(sites=["helper"])
    other = np.random.default_rng(1).normal(size=(26, 24, 20)).astype(np.float32)
    other = nib.Nifti1Image(other, np.eye(4))
    nib.save(other, sites.folder / "static.nii.gz")
    assert sites.wait(sites.start(sites=["static"])) == {"static": 1}
    assert "the helper was told of [26, 24, 22]" in sites.log("static")
    assert "Listening" not in sites.log("static")
    assert not (sites.folder / "keys" / "static" / MARKS).exists()


def test_images_that_lie_apart(tmp_path, bodies):
    """Which nobody knows before they meet: of a prealign matrix the helper is not told.

    It uses nothing up.
    """
    static, moving, *places = pair_of(bodies)
    places[1][0, 3] = 500
    images = static, moving, *places
    sites = Sites(tmp_path / "sites", "syn", images, ahead=True, parameters=SYN)
    sites.run(sites=["helper"])
    statuses = sites.wait(sites.start(sites=OWNERS))
    assert set(statuses.values()) == {1}
    last = sites.last_line("moving")
    assert last.startswith("dipy_ppir_align_syn: error: the two images do not overlap")
    assert "--debug" not in last
    assert not (sites.folder / "keys" / "moving" / MARKS).exists()


def test_a_deal_that_is_cut_off_is_found_before_anybody_is_met(sites):
    sites.run(sites=["helper"])
    data = deal_of(sites, "static").read_bytes()
    deal_of(sites, "static").write_bytes(data[:-100])
    statuses = sites.wait(sites.start(sites=["static"]))
    assert statuses == {"static": 1}
    assert "copy it again" in sites.last_line("static")
    assert "Listening" not in sites.log("static")


def test_from_python(sites, tmp_path):
    """An owner loads the session as any other; its deal may lie elsewhere."""
    sites.run(sites=["helper"])
    deal_of(sites, "static").rename(sites.folder / "elsewhere")
    with pytest.raises(ValueError, match="cannot read the helper's deal"):
        Session.load(sites.file, identity=sites.folder / "keys" / "static")
    (process,) = sites.start(sites=["moving"]).values()
    image = nib.load(sites.folder / "static.nii.gz")
    with Session.load(
        sites.file,
        identity=sites.folder / "keys" / "static",
        deal=sites.folder / "elsewhere",
    ) as session:
        moved, mapping = syn_registration(
            "remote",
            image.get_fdata(),
            static_affine=image.affine,
            session=session,
            checkpoint=Checkpoint(tmp_path / "state"),
            **session.parameters,
        )
    assert process.wait() == 0 and moved is None and mapping is not None
    with pytest.raises(SessionFileError, match="--deal"):
        Session.load(sites.file, identity=sites.folder / "keys" / "helper")


# -- the session file -------------------------------------------------------------


def test_what_a_session_file_says(sites, capsys):
    text = explain(SessionFile.read(sites.file))
    for words in (
        "Site helper (helper) connects to nobody",
        "Site moving dials Site static",
        "Site helper (helper) learns nothing",
        "has to keep no copy",
        "26 x 24 x 22 and 28 x 25 x 22 voxels:",
        "The helper deals about 11.5 MB of this ahead",
    ):
        assert words in text
    keys = sites.folder / "keys"
    described = []
    for name in OWNERS:
        image = str(sites.folder / f"{name}.nii.gz")
        session_command(["describe", name, image, "--identity", str(keys / name)])
        described.append(tomllib.loads(capsys.readouterr().out)["deal"][name])
    plan = SessionFile.read(sites.file)
    assert described == [plan.deal[p] for p in range(2)]
    np.savetxt(sites.folder / "p.txt", np.random.default_rng(1).normal(size=(9, 3)) * 9)
    points = str(sites.folder / "p.txt")
    session_command(["describe", "static", points, "--identity", str(keys / "static")])
    assert "shape = [9, 3]\nsealing" in capsys.readouterr().out
    session_command(["new", "syn", "--ahead"])
    assert capsys.readouterr().out == template("syn", "ahead")
    assert tomllib.loads(template("syn", "ahead"))["helper"] == "ahead"
    affine = tomllib.loads(template("affine", "ahead"))["parameters"]
    assert affine["metric"] == "SSD" and "hide_steps" not in affine
    with pytest.raises(InputError, match="--ahead needs a helper"):
        session_command(["new", "syn", "--ahead", "--parties", "2"])


def table(contents, name):
    return contents["deal"][name]


BAD = {
    "no tables": (lambda c: c.pop("deal"), r"\[deal.moving\] is missing"),
    "no table": (lambda c: c["deal"].pop("static"), r"\[deal.static\] is missing"),
    "none": (
        lambda c: (c.update(helper="none"), c["parties"].pop("helper")),
        r"\[deal\] is for a helper that deals",
    ),
    "a stranger": (lambda c: table(c, "moving").update(mask=1), "no entry 'mask'"),
    "no key": (lambda c: table(c, "moving").pop("sealing"), "lacks sealing"),
    "bad key": (lambda c: table(c, "moving").update(sealing="ab"), "64 hexadecimal"),
    "no shape": (lambda c: table(c, "static").pop("shape"), "shape in"),
    "shape": (lambda c: table(c, "static").update(shape=[3, 0, 4]), "list of sizes"),
    "slice": (
        lambda c: table(c, "static").update(
            shape=[3, 4], grid2world=np.eye(3).tolist()
        ),
        "must be of 3 dimensions",
    ),
    "matrix": (
        lambda c: table(c, "static").update(grid2world=[[1.0]]),
        "must be a matrix of 4 by 4 numbers",
    ),
    "no inverse": (
        lambda c: table(c, "static").update(grid2world=np.zeros((4, 4)).tolist()),
        r"grid2world in \[deal.static\] has no inverse",
    ),
    "no sealing key": (
        lambda c: table(c, "moving").update(sealing="00" * 32),
        r"sealing in \[deal.moving\] is no key",
    ),
    "too large": (
        lambda c: table(c, "static").update(shape=[91000, 10900, 91000]),
        "more than the 268,435,456 that",
    ),
    "larger than agreed": (
        lambda c: c.setdefault("limits", {}).update(voxels=1000),
        "more than the 1,000 that",
    ),
    "no matrix": (
        lambda c: table(c, "static").pop("grid2world"),
        "must have grid2world and shape",
    ),
    "no address": (
        lambda c: c["parties"]["static"].pop("address"),
        "neither owner has an address",
    ),
    "affine": (
        lambda c: c.update(operation="affine", reveal="transform", parameters={}),
        "cannot deal before the owners meet; it can with metric 'SSD'",
    ),
    "what is opened": (
        lambda c: c.update(reveal="update"),
        "it can with reveal 'map'",
    ),
    "backend": (
        lambda c: c["parameters"].update(backend="mpyc"),
        "backend",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_session_files_that_cannot_be(sites, name):
    from dipy_ppir.workflows.operations import operation_of

    contents = tomllib.loads(sites.file.read_text())
    change, words = BAD[name]
    change(contents)
    with pytest.raises(SessionFileError, match=words):
        operation_of(SessionFile.parse(contents))


def test_an_image_that_was_not_described(sites, capsys):
    other = str(sites.folder / "other.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9)), np.eye(4)), other)
    with pytest.raises(InputError, match=r"has the shape \[9, 9, 9\], and the helper"):
        session_command(["check", str(sites.file), other])
    session_command(["check", str(sites.file), str(sites.folder / "static.nii.gz")])
    assert "deals" in capsys.readouterr().out
    site = Site(sites.file, sites.folder / "keys" / "helper")
    for owner, name in enumerate(OWNERS):
        site.party = site.plan.parties[owner]
        with pytest.raises(InputError, match="the helper was told of"):
            site.run(None, None, **{name: np.zeros((9, 9, 9))})
        shape, place = (site.plan.deal[owner][x] for x in ("shape", "grid2world"))
        own = {name: np.zeros(shape), f"{name}_affine": np.array(place) + 0.01}
        with pytest.raises(InputError, match="has another grid2world in its header"):
            site.run(None, None, **own)


def test_the_helpers_command(sites, tmp_path):
    owner = ["--identity", str(sites.folder / "keys" / "static")]
    with pytest.raises(InputError, match=r"this is the key of .*Site static"):
        helper_command([str(sites.file), "--deal", *owner])
    identity = ["--identity", str(sites.folder / "keys" / "helper")]
    with pytest.raises(InputError, match="dipy_ppir_helper --deal"):
        helper_command([str(sites.file), *identity])
    for flags in (["--resume"], ["--receipt", "a.json"], ["--listen", "0.0.0.0:1"]):
        with pytest.raises(InputError, match="leave them out"):
            helper_command([str(sites.file), "--deal", *flags, *identity])
    sites.ahead, sites.addresses["helper"] = False, f"127.0.0.1:{free_port()}"
    online = sites.write("online.toml")
    with pytest.raises(SessionFileError, match="no helper deals ahead"):
        Session.load(online, identity=sites.folder / "keys" / "static", deal="a.deal")
    with pytest.raises(InputError, match="--deal is for a helper"):
        helper_command([str(online), "--deal", *identity])
    deal_of(sites, "moving").write_text("something")
    with pytest.raises(InputError, match="is there already"):
        helper_command(
            [str(sites.file), "--deal", *identity, "--out_dir", str(sites.folder)]
        )
    assert deal_of(sites, "moving").read_text() == "something"


def test_a_helper_that_is_stopped_or_killed(sites):
    """Killed it leaves what it has written, which the next one removes."""
    for number, status in (
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGKILL, -signal.SIGKILL),
    ):
        processes = sites.start(
            sites=["helper"], before={"helper": ENDS.format(number=int(number))}
        )
        assert sites.wait(processes) == {"helper": status}
        left = [p.name for p in sites.folder.iterdir() if p.name.endswith(".deal")]
        assert len(left) == (2 if number == signal.SIGKILL else 0)
        assert all(name.startswith(".") for name in left)
    sites.run(sites=["helper"])
    assert sites.log("helper").count("of a helper that was killed") == 2
    names = {p.name for p in sites.folder.iterdir() if p.name.endswith(".deal")}
    assert names == {f"session.{owner}.deal" for owner in OWNERS}


def test_a_disk_that_is_full(sites, monkeypatch):
    from types import SimpleNamespace

    from dipy_ppir.workflows import sites as module

    usage = SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(module, "shutil", usage)
    identity = ["--identity", str(sites.folder / "keys" / "helper")]
    with pytest.raises(InputError, match="has room for 1.0 kB"):
        helper_command(
            [str(sites.file), "--deal", *identity, "--out_dir", str(sites.folder)]
        )
