"""Registrations between three sites: three programs, real sockets, real TLS."""

import json

from dipy.align import affine_registration
from dipy.align.imaffine import AffineMap
import nibabel as nib
import numpy as np
from ports import free_port
import pytest
from sites import ROLES, SEEDED, Launcher, Sites

from dipy_ppir.align import affine_registration as secure_registration
from dipy_ppir.align import read_transform
from dipy_ppir.align.checkpoint import Checkpoint
from dipy_ppir.mpc.record import array_hash
from dipy_ppir.mpc.session import Session
from dipy_ppir.workflows.receipts import receipt as check_receipts
from dipy_ppir.workflows.transform import ApplyTransformFlow

# Affine transforms of bodies that are nearly round are too sensitive to compare.
AFFINE = {
    "pipeline": ["center_of_mass", "translation"],
    "level_iters": [100, 50],
    "sigmas": [2.0, 0.0],
    "factors": [2, 1],
    "nbins": 20,
}
SYN = {"level_iters": [6, 4], "radius": 2}
LAYOUTS = {
    "direct": ("static", "helper"),
    "other owner listens": ("moving", "helper"),
    "both owners listen": ("moving", "static", "helper"),
    "relayed": ("helper",),
}


@pytest.fixture(scope="module", autouse=True)
def launcher():
    with Launcher():
        yield


@pytest.fixture
def affine_sites(tmp_path, bodies):
    def make(**options):
        options = {"parameters": AFFINE, **options}
        return Sites(tmp_path / "sites", "affine", bodies(3), **options)

    return make


@pytest.fixture
def syn_sites(tmp_path, bodies):
    def make(**options):
        static, _, matrix, _ = bodies(3)
        moving = np.roll(static, 1, axis=1) ** 0.8
        options = {"parameters": SYN, **options}
        return Sites(
            tmp_path / "sites", "syn", (static, moving, matrix, matrix), **options
        )

    return make


def loopback(layout):
    return {site: f"127.0.0.1:{free_port()}" for site in LAYOUTS[layout]}


def matrix_of(sites, site):
    return np.loadtxt(sites.folder / f"out_{site}" / "affine.txt")


def corners(shape, grid2world, matrix):
    """Where a matrix sends the corners of a grid, mm."""
    at = np.array(np.meshgrid(*[(0, n - 1) for n in shape])).reshape(3, -1)
    at = grid2world @ np.vstack([at, np.ones(8)])
    return (matrix @ at)[:3]


@pytest.fixture(scope="module")
def clear_affine(bodies):
    """The transform that DIPY finds."""
    static, moving, static_grid2world, moving_grid2world = bodies(3)
    _, clear = affine_registration(
        moving.astype(np.float32),
        static.astype(np.float32),
        moving_affine=moving_grid2world,
        static_affine=static_grid2world,
        **AFFINE,
    )
    return clear


@pytest.mark.parametrize(
    "layout",
    # Who listens at a meeting is test_meeting.py's.
    [
        pytest.param(x, marks=[pytest.mark.heavy] * (x == "other owner listens"))
        for x in LAYOUTS
    ],
)
def test_affine(affine_sites, bodies, clear_affine, layout):
    """All sites write what is theirs, and the transform is DIPY's.

    The first as their users start them. The noise is always the same.
    """
    fresh = layout == "direct"
    sites = affine_sites(addresses=loopback(layout), before=SEEDED, fresh=fresh)
    sites.run()
    assert sites.outputs("moving") == ["affine.txt", "moved.nii.gz", "receipt.json"]
    assert sites.outputs("static") == ["affine.txt", "receipt.json"]
    assert sites.outputs("helper") == ["receipt.json"]
    found = matrix_of(sites, "moving")
    np.testing.assert_allclose(matrix_of(sites, "static"), found, atol=1e-9)
    static, _, static_grid2world, _ = bodies(3)
    apart = corners(static.shape, static_grid2world, found) - corners(
        static.shape, static_grid2world, clear_affine
    )
    # Voxels are 1 mm; the gradients agree to 1e-8, and L-BFGS stops when they are 1e-4.
    assert np.abs(apart).max() < 0.01
    moved = nib.load(sites.folder / "out_moving" / "moved.nii.gz")
    assert moved.shape == static.shape
    np.testing.assert_allclose(moved.affine, static_grid2world)


@pytest.mark.parametrize("sampling", [None, "GMS"])
def test_squared_differences(affine_sites, bodies, sampling):
    """Between sites, of whose steps the owners learn what is said ahead."""
    static, moving, *grids = bodies(3)
    parameters = {name: v for name, v in AFFINE.items() if name != "nbins"}
    parameters |= {"metric": "SSD", "ret_metric": True}
    if sampling:
        parameters |= {"sampling": sampling, "sampling_proportion": 0.3}
    sites = affine_sites(
        reveal="transform", addresses=loopback("direct"), parameters=parameters
    )
    sites.run()
    assert "quality_metric.txt" in sites.outputs("moving")
    found = matrix_of(sites, "moving")
    np.testing.assert_allclose(matrix_of(sites, "static"), found, atol=1e-9)
    _, here = secure_registration(
        moving, static, static_affine=grids[0], moving_affine=grids[1], **parameters
    )[:2]
    apart = corners(static.shape, grids[0], found) - corners(
        static.shape, grids[0], here
    )
    # Each coordinate of the last step is rounded to a 16th of a voxel, by chance.
    assert np.abs(apart).max() < 0.5
    receipt = json.loads((sites.folder / "out_static" / "receipt.json").read_text())
    learned = {
        role: {e["label"]: e["values"] for e in entries}
        for role, entries in receipt["learned"].items()
    }
    # 12 steps at the coarse level and 6 at the fine one.
    assert learned["moving owner"]["update"] == 3 * 18
    assert ("edge_samples" in learned["static owner"]) == (sampling == "GMS")
    assert learned["helper"] == {}


def test_cross_correlation(affine_sites):
    """Between sites nothing is opened but what is with mutual information."""
    parameters = {name: v for name, v in AFFINE.items() if name != "nbins"}
    sites = affine_sites(
        reveal="transform",
        addresses=loopback("direct"),
        parameters=parameters | {"metric": "CC", "radius": 3},
    )
    sites.run()
    found = matrix_of(sites, "moving")
    np.testing.assert_allclose(matrix_of(sites, "static"), found, atol=1e-9)
    receipt = json.loads((sites.folder / "out_static" / "receipt.json").read_text())
    assert receipt["parameters"]["metric"] == "CC"
    learned = {
        role: {e["label"] for e in entries}
        for role, entries in receipt["learned"].items()
    }
    assert learned["moving owner"] == {
        "center_of_mass",
        "step",
        "step_size",
        "better",
        "mismatch",
    }
    assert learned["static owner"] == {"affine", "mismatch", "stuck"}
    assert learned["helper"] == set()


RIGID = {**AFFINE, "pipeline": ["center_of_mass", "translation", "rigid"]}


@pytest.mark.parametrize("layout", ["direct", "relayed"])
def test_on_shares(affine_sites, bodies, layout):
    """What the owners learn is the transform; the static owner counts the bits."""
    options = {"addresses": loopback(layout), "fresh": layout == "direct"}
    # How well the images match may be asked for besides.
    asked = layout == "relayed"
    options["parameters"] = {**RIGID, "ret_metric": asked}
    sites = affine_sites(reveal="transform", before=SEEDED, **options)
    sites.run()
    assert ("quality_metric.txt" in sites.outputs("moving")) == asked
    assert "quality_metric.txt" not in sites.outputs("static")
    found = matrix_of(sites, "moving")
    np.testing.assert_allclose(matrix_of(sites, "static"), found, atol=1e-9)
    static, moving, *grids = bodies(3)
    _, clear = affine_registration(
        moving, static, static_affine=grids[0], moving_affine=grids[1], **RIGID
    )
    apart = corners(static.shape, grids[0], found) - corners(
        static.shape, grids[0], clear
    )
    assert np.abs(apart).max() < 1
    receipt = json.loads((sites.folder / "out_static" / "receipt.json").read_text())
    labels = {e["label"] for e in receipt["learned"]["moving owner"]}
    value = {"final_value"} if asked else set()
    shown = {"center_of_mass", "step", "step_size", "better", "mismatch"}
    assert labels == shown | value
    counts = json.loads((sites.folder / "keys" / "static" / "opened.json").read_text())
    assert [*counts.values()] == [receipt["bits"]["moving owner"]]
    assert not (sites.folder / "keys" / "moving" / "opened.json").exists()
    # Once more about the same image would be too much: before anybody is met.
    limit = ["--limit_bits", str(receipt["bits"]["moving owner"] + 100)]
    statuses = sites.wait(sites.start("--force", *limit, sites=("static",)))
    assert statuses == {"static": 1}
    assert "bits were opened about this image" in sites.last_line("static")
    assert "--limit_bits" in sites.last_line("static")
    assert "Traceback" not in sites.log("static")


@pytest.mark.parametrize("role", ["moving", "helper"])
def test_some_parties_by_their_commands_and_others_from_python(
    affine_sites, bodies, role
):
    """All get their results, and nobody's checkpoint is left."""
    sites = affine_sites(reveal="transform", parameters=RIGID)
    others = [name for name in ROLES if name != role]
    processes = sites.start(sites=others)
    checkpoint = Checkpoint(sites.folder / "checkpoint")
    images = {"moving": "remote", "static": "remote"}
    if role == "moving":
        images["moving"], images["moving_affine"] = bodies(3)[1::2]
    with Session.load(sites.file, identity=sites.folder / "keys" / role) as session:
        _, found = secure_registration(
            session=session, checkpoint=checkpoint, **images, **session.parameters
        )
    checkpoint.discard()
    assert sites.wait(processes) == dict.fromkeys(others, 0)
    assert not [*sites.folder.rglob("*.checkpoint")]
    if role == "moving":
        assert np.abs(matrix_of(sites, "static") - found).max() < 1e-9
    else:
        assert found is None


@pytest.mark.parametrize(
    ("layout", "reveal"),
    [("direct", "map"), ("relayed", "map"), ("direct", "update")],
)
def test_syn(syn_sites, layout, reveal):
    """The second as its users start it."""
    options = {"addresses": loopback(layout), "fresh": layout == "relayed"}
    sites = syn_sites(reveal=reveal, before=SEEDED, **options)
    sites.run("--force")
    assert sites.outputs("moving") == [
        "displacement_field.nii.gz",
        "receipt.json",
        "warped_moved.nii.gz",
    ]
    assert sites.outputs("static") == ["displacement_field.nii.gz", "receipt.json"]
    fields = [
        np.asarray(
            nib.load(sites.folder / f"out_{s}" / "displacement_field.nii.gz").dataobj
        )
        for s in ("moving", "static")
    ]
    np.testing.assert_array_equal(*fields)
    assert np.abs(fields[0]).max() > 0.5
    static, moving, warped = (
        np.asarray(nib.load(sites.folder / name).dataobj)
        for name in ("static.nii.gz", "moving.nii.gz", "out_moving/warped_moved.nii.gz")
    )
    assert np.corrcoef(warped.ravel(), static.ravel())[0, 1] > (
        np.corrcoef(moving.ravel(), static.ravel())[0, 1] + 0.02
    )


def test_the_receipt_is_the_same_everywhere(affine_sites, bodies, capsys):
    sites = affine_sites(reveal="gradient")
    sites.run()
    files = {
        site: sites.folder / f"out_{site}" / "receipt.json"
        for site in ("moving", "static", "helper")
    }
    receipts = {site: json.loads(file.read_text()) for site, file in files.items()}
    learned = receipts["moving"]["learned"]
    assert {e["label"] for e in learned["moving owner"]} == {
        "center_of_mass",
        "sample_count",
        "metric_value",
        "metric_gradient",
        "mismatch",
    }
    labels = [e["label"] for e in learned["static owner"]]
    assert labels == ["repetition", "mismatch", "stuck", "affine"]
    assert [e["label"] for e in learned["helper"]] == ["repetition"]
    for receipt in receipts.values():
        assert receipt["bytes_sent"] == receipts["moving"]["bytes_sent"]
        assert receipt["resumed"] == 0
        assert receipt["warnings"] == []
        assert receipt["images"]["static"]["shape"] == list(bodies(3)[0].shape)
    # What is an owner's own is on its own receipt only.
    own = {"moving": {"transform", "metric"}, "static": {"transform"}, "helper": set()}
    for site, receipt in receipts.items():
        assert own[site] == receipt.keys() & {"transform", "metric"}
        kept = [f"{site} image"] if site != "helper" else []
        assert [*receipt["arrays"]] == [*receipt["files"]] == kept
    run, image = receipts["static"]["run"], bodies(3)[0].astype(np.float32)
    assert receipts["static"]["arrays"]["static image"] == array_hash(run, image)
    images = [str(sites.folder / f"{name}.nii.gz") for name in ("static", "moving")]
    assert check_receipts([*map(str, files.values()), "--files", *images]) == 0
    text = capsys.readouterr().out
    assert "Site static." in text and f"{images[0]} is the static image of" in text


def test_only_the_moving_owner_gets_the_transform(affine_sites):
    sites = affine_sites()
    sites.file = sites.write("session.toml", result_to="moving")
    for flags in (["--inv_static"], ["--out_itk", "a.tfm"]):
        assert sites.wait(sites.start(*flags, sites=("static",))) == {"static": 1}
        assert f"{flags[0]} needs the transform" in sites.last_line("static")
    sites.run()
    assert "affine.txt" in sites.outputs("moving")
    assert sites.outputs("static") == ["receipt.json"]


def test_the_static_image_on_the_moving_grid(affine_sites, bodies):
    """The static owner has no moving image, but knows its grid, and so does ITK."""
    sites = affine_sites(reveal="transform", parameters=RIGID)
    processes = sites.start(sites=("moving", "helper"))
    flags = ["--inv_static", "--out_itk", "a.tfm"]
    processes |= sites.start(*flags, sites=("static",))
    assert set(sites.wait(processes).values()) == {0}
    out, (static, moving, *grids) = sites.folder / "out_static", bodies(3)
    there = nib.load(out / "inv_static.nii.gz")
    np.testing.assert_allclose(there.affine, grids[1], atol=1e-5)
    matrix = matrix_of(sites, "static")
    expected = AffineMap(
        matrix,
        domain_grid_shape=static.shape,
        domain_grid2world=grids[0],
        codomain_grid_shape=moving.shape,
        codomain_grid2world=grids[1],
    ).transform_inverse(static.astype(np.float32))
    np.testing.assert_allclose(there.get_fdata(), expected, atol=1e-4)
    np.testing.assert_allclose(read_transform(out / "a.tfm"), matrix, atol=1e-12)


def test_mask_and_inverse(syn_sites, monkeypatch):
    """Flags that concern one owner's image only stay that owner's.

    Afterwards its receipt says where the other image is.
    """
    sites = syn_sites()
    processes = sites.start(sites=("moving", "helper"))
    flags = ["--inv_static", "--out_itk", "map.h5"]
    processes |= sites.start(*flags, sites=("static",))
    assert set(sites.wait(processes).values()) == {0}
    out = sites.folder / "out_static"
    files = {"inc_static.nii.gz", "map.h5"}
    assert files <= {*sites.outputs("static")}
    monkeypatch.chdir(out)
    flow = ApplyTransformFlow()
    inverse = {"transform_type": "diffeomorphic", "inverse": True}
    transform = "displacement_field.nii.gz"
    flow.run(str(sites.folder / "static.nii.gz"), "receipt.json", transform, **inverse)
    here, there = (nib.load(f) for f in ("transformed.nii.gz", "inc_static.nii.gz"))
    np.testing.assert_allclose(here.affine, there.affine)
    np.testing.assert_allclose(here.get_fdata(), there.get_fdata(), atol=1e-3)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"reveal": "gradient"}, "reveal"),
        ({"title": "another"}, "title"),
        ({"result_to": "moving"}, "result_to"),
    ],
)
def test_session_files_that_differ(affine_sites, change, named):
    """Everybody is told in what, and nothing is computed."""
    sites = affine_sites()
    processes = sites.start(sites=("moving", "helper"))
    sites.file = sites.write("other.toml", **change)
    processes |= sites.start(sites=("static",))
    statuses = sites.wait(processes)
    assert set(statuses.values()) == {1}
    for site in statuses:
        line = sites.last_line(site)
        assert "do not agree on" in line and named in line, line
        assert line.endswith("; give every party the same session file"), line
        assert "Traceback" not in sites.log(site)
        assert sites.outputs(site) == []


#: The installed files of a site are others than they are.
CHANGED_PROGRAM = """
from dipy_ppir.mpc import record
record.source_digest = lambda: 64 * "0"
"""


def test_programs_that_differ(affine_sites):
    """Versions are the same, files are not: as with another session file."""
    sites = affine_sites()
    statuses = sites.wait(sites.start(before={"helper": CHANGED_PROGRAM}))
    for site, status in statuses.items():
        line = sites.last_line(site)
        assert status == 1 and "'source code of dipy_ppir'" in line
        assert "from the same files everywhere" in line


MISTAKES = {
    "no session file": (["STATIC", "remote"], "give the session file with --session"),
    "no remote": (["STATIC", "MOVING", "--session", "FILE"], 'other is "remote"'),
    "no image": (["remote", "remote", "--session", "FILE"], "dipy_ppir_helper"),
    "wrong way round": (["remote", "STATIC", "--session", "FILE"], "remote --session"),
    "settled": (
        ["STATIC", "remote", "--session", "FILE", "--nbins", "48"],
        "--nbins is settled by the session file",
    ),
    "no such file": (["STATIC", "remote", "--session", "nowhere.toml"], "nowhere.toml"),
    "listen": (
        ["STATIC", "remote", "--session", "FILE", "--listen", "here"],
        "must be host:port",
    ),
    "no key": (
        ["STATIC", "remote", "--session", "FILE", "--identity", "nowhere"],
        "dipy_ppir_keygen",
    ),
    "stranger": (
        ["STATIC", "remote", "--session", "FILE", "--identity", "STRANGER"],
        "does not name this party's certificate",
    ),
    "constant image": (["CONSTANT", "remote", "--session", "FILE"], "constant"),
    "NaN": (["NAN", "remote", "--session", "FILE"], "NaN"),
    "no ending": (
        ["STATIC", "remote", "--session", "FILE", "--out_moved", "moved.txt"],
        "--out_moved moved.txt must end in .nii",
    ),
    "no receipt": (["STATIC", "remote", "--session", "FILE", "--receipt", ""], "empty"),
    "the other's mask": (
        ["STATIC", "remote", "--session", "FILE", "--moving_mask", "MASK"],
        "--moving_mask belongs to the owner of the moving image",
    ),
    "another key": (
        ["remote", "STATIC", "--session", "FILE"],
        "give the folder of another key with --identity",
    ),
    "empty mask": (
        ["STATIC", "remote", "--session", "FILE", "--static_mask", "EMPTY"],
        "the static mask",
    ),
    "mask and sampling": (
        ["STATIC", "remote", "--session", "SAMPLED", "--static_mask", "MASK"],
        "masks need all voxels",
    ),
    "too many voxels": (
        ["STATIC", "remote", "--session", "SMALL"],
        "more than the 1,000 of [limits]",
    ),
    "too much memory": (
        ["STATIC", "remote", "--session", "LITTLE"],
        "more than the 0.1 GB of [limits]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained_before_connecting(
    affine_sites, monkeypatch, capsys, mistake
):
    from dipy_ppir.mpc import meeting
    from dipy_ppir.mpc.identity import create_identity
    from dipy_ppir.workflows import cli

    sites = affine_sites()
    create_identity("A stranger").save(sites.folder / "stranger")
    image = nib.load(sites.folder / "static.nii.gz")
    for name, value in (("constant", 1.0), ("nan", np.nan)):
        data = image.get_fdata().copy()
        data[...] = value if name == "constant" else data
        data[3, 3, 3] = value
        nib.save(nib.Nifti1Image(data, image.affine), sites.folder / f"{name}.nii.gz")
    for name, value in (("empty", 0), ("mask", 1)):
        data = np.full(image.shape, value, dtype=np.uint8)
        nib.save(nib.Nifti1Image(data, image.affine), sites.folder / f"{name}.nii.gz")
    sites.parameters = {**sites.parameters, "sampling_proportion": 0.5}
    files = {}
    for name, limits in (("SMALL", {"voxels": 1000}), ("LITTLE", {"memory": 0.1})):
        sites.limits = limits
        files[name] = sites.write(f"{name}.toml")
    sites.limits = {}
    words = {
        **files,
        "EMPTY": sites.folder / "empty.nii.gz",
        "MASK": sites.folder / "mask.nii.gz",
        "SAMPLED": sites.write("sampled.toml"),
        "STATIC": sites.folder / "static.nii.gz",
        "MOVING": sites.folder / "moving.nii.gz",
        "CONSTANT": sites.folder / "constant.nii.gz",
        "NAN": sites.folder / "nan.nii.gz",
        "STRANGER": sites.folder / "stranger",
        "FILE": sites.file,
    }
    arguments, said = MISTAKES[mistake]
    argv = ["dipy_ppir_align_affine", *(str(words.get(a, a)) for a in arguments)]
    if "--identity" not in argv:
        argv += ["--identity", str(sites.folder / "keys" / "static")]
    argv += ["--out_dir", str(sites.folder / "out")]
    monkeypatch.setattr("sys.argv", argv)

    def never(self):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(meeting.Meeting, "hold", never)
    assert cli.align_affine() == 1
    printed = capsys.readouterr().err
    assert said in printed
    assert "Traceback" not in printed
    assert not (sites.folder / "out").exists()


def test_an_owner_that_is_strict_ends_alone(tmp_path, bodies):
    """When all have done their part: the others have results, it has its receipt."""
    static, _, matrix, _ = bodies(3)
    noise = np.random.default_rng(3).random(static.shape)
    sites = Sites(
        tmp_path / "sites",
        "affine",
        (static, noise, matrix, matrix),
        parameters={**AFFINE, "pipeline": ["translation"]},
    )
    processes = sites.start(sites=("static", "helper"))
    processes |= sites.start("--strict", sites=("moving",))
    assert sites.wait(processes) == {"static": 0, "helper": 0, "moving": 1}
    assert sites.outputs("static") == ["affine.txt", "receipt.json"]
    assert sites.outputs("moving") == ["receipt.json"]
    assert "not plausible, and strict: " in sites.last_line("moving")
    for site, expected in (("moving", True), ("static", True), ("helper", False)):
        text = (sites.folder / f"out_{site}" / "receipt.json").read_text()
        said = json.loads(text)["warnings"]
        assert any("hardly match" in warning for warning in said) is expected
        assert ("hardly match, or less than where" in sites.log(site)) is expected


def test_a_plausible_result_passes_strict_owners(affine_sites):
    """Who begins at the centres of mass, and looks at its own image before."""
    sites = affine_sites(before=SEEDED)
    processes = sites.start(sites=("helper",))
    processes |= sites.start("--strict", sites=("moving", "static"))
    assert set(sites.wait(processes).values()) == {0}, sites.log("moving")
    receipt = sites.folder / "out_moving" / "receipt.json"
    assert set(json.loads(receipt.read_text())["files"]) == {"moving image"}
