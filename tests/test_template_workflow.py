"""The command that builds templates: three sites, three programs, real TLS."""

from concurrent.futures import ThreadPoolExecutor
import json
import stat
import sys

from deformed import deformed
from dipy.align.imwarp import DiffeomorphicMap
import nibabel as nib
import numpy as np
from ports import free_port
import pytest
from sites import LIMIT, Launcher

from dipy_ppir.align import build_template
from dipy_ppir.align.template import Template, TemplateParameters
from dipy_ppir.mpc.errors import PeerLostError, SessionFileError
from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.receipt import receipt_text
from dipy_ppir.mpc.record import is_hex
from dipy_ppir.workflows import cli, streams
from dipy_ppir.workflows import template as command
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.outputs import OutputFiles
from dipy_ppir.workflows.receipts import receipt as read_receipts

SHAPE = (20, 18, 18)
PARAMETERS = {
    "iterations": 2,
    "affine_iters": [5],
    "sigmas": [0.0],
    "factors": [1],
    "level_iters": [5],
    "radius": 2,
}
GRID = {"shape": [20, 18, 18], "voxel_size": 1.1}
CODE = """
import sys
from dipy_ppir.workflows import cli
sys.argv[0] = "dipy_ppir_template"
sys.exit(cli.template())
"""


class Study:
    """Three sites with keys, a plan, and images: two at the first, one elsewhere."""

    def __init__(self, folder, **parameters):
        self.folder, self.sites = folder, "abc"
        lines = ['title = "a test"', 'operation = "template"']
        for site in self.sites:
            identity = create_identity(f"Site {site}")
            identity.save(folder / "keys" / site)
            lines += ["[[sites]]", f'name = "Site {site}"']
            lines.append(f'fingerprint = "{identity.fingerprint}"')
            if site != "b":
                lines.append(f'address = "127.0.0.1:{free_port()}"')
        lines.append("[parameters]")
        lines += [f"{k} = {v}" for k, v in {**PARAMETERS, **parameters}.items()]
        self.plan = folder / "plan.toml"
        self.plan.write_text("\n".join(lines))
        self.images, self.affine = {}, np.diag([1.25, 1.125, 1.0, 1.0])
        for n, name in enumerate(["a1", "a2", "b1", "c1"]):
            self.images[name] = deformed(3, SHAPE, seed=n % 2)[n // 2]
            self.save(name, 100 * self.images[name])

    def save(self, name, image):
        image = nib.Nifti1Image(image.astype(np.float32), self.affine)
        nib.save(image, self.folder / f"{name}_T1w.nii.gz")

    def argv(self, site, *extra):
        return [
            *(sys.executable, "-c", CODE, str(self.plan)),
            *("--images", str(self.folder / f"{site}*_T1w.nii.gz")),
            *("--identity", str(self.folder / "keys" / site)),
            *("--out_dir", str(self.folder / f"out_{site}"), *extra),
        ]

    def run(self, *extra):
        """Exit statuses and logs of all sites' commands."""
        started = {
            site: Launcher.running.popen(
                self.argv(site, *extra), self.folder / f"{site}.log"
            )
            for site in self.sites
        }
        status = [process.wait(LIMIT) for process in started.values()]
        logs = [(self.folder / f"{site}.log").read_text() for site in self.sites]
        return status, logs

    def outputs(self, site):
        return sorted(p.name for p in (self.folder / f"out_{site}").iterdir())


@pytest.fixture(scope="module", autouse=True)
def launcher():
    with Launcher():
        if Launcher.running is None:
            pytest.skip("commands are started by copies of one process, on Linux")
        yield


def test_three_sites_build_a_template(tmp_path):
    study = Study(tmp_path, **GRID)
    status, logs = study.run()
    assert status == [0, 0, 0], "\n".join(logs)
    files = [tmp_path / f"{name}_T1w.nii.gz" for name in study.images]
    images, affines = zip(*map(command.load, files), strict=True)
    clear = build_template(images, affines, **PARAMETERS, **GRID)
    for site in study.sites:
        found = nib.load(tmp_path / f"out_{site}" / "template.nii.gz")
        np.testing.assert_array_equal(found.get_fdata(), clear.image.astype("f4"))
        np.testing.assert_allclose(found.affine, clear.grid2world)
        check_maps(study, site, found)
    check_receipts(study)
    assert f"Image 2 is {tmp_path / 'a2_T1w.nii.gz'}" in logs[0]
    assert "Iteration 1 of 2: 2 of 2 images" in logs[0]
    assert "Nothing but these sums over all sites" in logs[1]
    assert "3 sites, of which at least two" in logs[2]


def check_maps(study, site, found):
    """Each image has its maps, and lies over the template by them."""
    names = [name for name in study.images if name.startswith(site)]
    wanted = ["receipt.json", "template.nii.gz"]
    for name in names:
        wanted += [
            f"{name}_T1w_affine.txt",
            f"{name}_T1w_displacement_field.nii.gz",
        ]
    assert study.outputs(site) == sorted(wanted)
    for name in names:
        folder = study.folder / f"out_{site}"
        field = nib.load(folder / f"{name}_T1w_displacement_field.nii.gz")
        assert np.loadtxt(folder / f"{name}_T1w_affine.txt").shape == (4, 4)
        mapping = DiffeomorphicMap(
            3,
            field.shape[:3],
            disp_grid2world=np.linalg.inv(field.affine),
            domain_shape=SHAPE,
            domain_grid2world=study.affine,
            codomain_shape=found.shape,
            codomain_grid2world=found.affine,
        )
        mapping.forward = np.ascontiguousarray(field.get_fdata()[..., 0], np.float32)
        mapping.backward = np.ascontiguousarray(field.get_fdata()[..., 1], np.float32)
        mapping.is_inverse = True
        image = study.images[name].astype(np.float32)
        # "static to moving" of the file is from the template to the image.
        warped = mapping.transform(image)
        alike = np.corrcoef(warped.ravel(), found.get_fdata().ravel())[0, 1]
        assert alike > 0.95, name


def check_receipts(study):
    receipts = [
        json.loads((study.folder / f"out_{site}" / "receipt.json").read_text())
        for site in study.sites
    ]
    first = receipts[0]
    for receipt, site in zip(receipts, study.sites, strict=True):
        assert receipt["role"] == f"site Site {site}"
        assert receipt["learned"] == first["learned"]
        assert len(receipt["signatures"]) == 3
        assert not receipt["warnings"]
        for sent in receipt["bytes_sent"].values():
            assert list(sent) == ["setup", "agreement", "sums"]
            assert sent["sums"] > sent["setup"] > 0
        words = receipt_text(receipt)
        assert f"Hash of the plan: {receipt['session_file']}" in words
        assert f"The site Site {site} took part.\n    certificate" in words
        assert "session file" not in words
        count = sum(name.startswith(site) for name in study.images)
        assert list(receipt["files"]) == [f"image {n + 1}" for n in range(count)]
        text = json.dumps(receipt)
        assert "T1w" not in text
        learned = {e["label"]: e for e in receipt["learned"]["site Site b"]}
        assert learned["sum_of_images"]["openings"] == 3
        assert learned["sum_of_displacements"]["openings"] == 2
    names = [str(study.folder / f"out_{s}" / "receipt.json") for s in study.sites]
    own = str(study.folder / "a2_T1w.nii.gz")
    assert read_receipts([*names, "--files", own]) == 0


def test_a_later_run_says_what_it_shows(tmp_path):
    """It begins with the template of an earlier one, and warns of the difference."""
    study = Study(tmp_path, iterations=1)
    study.save("initial", study.images["c1"])
    (tmp_path / "initial_T1w.nii.gz").rename(tmp_path / "initial.nii.gz")
    initial = "--initial", str(tmp_path / "initial.nii.gz"), "--no_maps"
    status, logs = study.run(*initial)
    assert status == [0, 0, 0], "\n".join(logs)
    assert study.outputs("a") == ["receipt.json", "template.nii.gz"]
    (tmp_path / "a2_T1w.nii.gz").unlink()
    status, logs = study.run(*initial, "--force")
    assert status == [0, 0, 0], "\n".join(logs)
    receipt = json.loads((tmp_path / "out_a" / "receipt.json").read_text())
    assert list(receipt["files"]) == ["image 1", "initial template"]
    other = json.loads((tmp_path / "out_b" / "receipt.json").read_text())
    begin = receipt["parameters"]["initial template"]
    assert is_hex(begin, 64) and other["parameters"]["initial template"] == begin
    (warning,) = receipt["warnings"]
    assert "some of these images, but not with the same" in warning
    assert "can subtract the sums" in warning and "WARNING" in logs[0]
    (warning,) = other["warnings"]
    assert "A template was built with the same images before" in warning
    runs = json.loads((tmp_path / "keys" / "a" / command.FILE).read_text())
    assert [len(run["images"]) for run in runs] == [2, 1]


def test_sites_with_other_beginnings_stop(tmp_path):
    study = Study(tmp_path, iterations=1)
    started = []
    for n, site in enumerate(study.sites):
        study.save("initial", study.images["a1"] + 0.1 * n * study.images["b1"])
        initial = tmp_path / f"initial_{site}.nii.gz"
        (tmp_path / "initial_T1w.nii.gz").rename(initial)
        argv = study.argv(site, "--initial", str(initial))
        log = tmp_path / f"{site}.log"
        started.append(Launcher.running.popen(argv, log))
    assert [process.wait(LIMIT) for process in started] == [1, 1, 1]
    for site in study.sites:
        last = (tmp_path / f"{site}.log").read_text().splitlines()[-1]
        assert last.endswith(
            "the initial templates differ, in values or in position: give the same "
            "--initial file at all sites (from Python, initial and initial_affine)"
        )
        assert not (tmp_path / f"out_{site}").exists()


# -- before anybody connects -------------------------------------------------


def test_a_plan_is_written_and_explained(tmp_path, capsys):
    command.template(["new"])
    text = capsys.readouterr().out
    for n in range(3):
        text = text.replace('"..."', f'"{create_identity(str(n)).fingerprint}"', 1)
    plan = tmp_path / "plan.toml"
    plan.write_text(text)
    command.template(["check", str(plan)])
    said = capsys.readouterr().out
    assert "The site Hospital A, at template.hospital-a.example:7433" in said
    assert "5 times, with 10 bits for each voxel" in said
    assert "2 that pool what they hold know what the last one added" in said
    assert "CAUTION: a site or an image that is in one run" in said
    assert "shows about how many images it has" in said
    assert "One that does not can choose part of the template" in said
    assert command.read(plan)[0].digest in said
    try:
        command.template(["check", str(plan), "--quiet"])
    finally:
        streams.be_quiet(False)
    assert capsys.readouterr().out == ""
    plan.write_text(text.replace("iterations = 4", "iterations = 400"))
    with pytest.raises(SessionFileError, match="iterations must be an integer"):
        command.read(plan)
    plan.write_text(text.replace("iterations = 4", "dim = 2\niterations = 4"))
    with pytest.raises(SessionFileError, match="dim = 2|must have 2"):
        command.read(plan)
    plan.write_text(text.replace('"template"', '"affine"'))
    with pytest.raises(SessionFileError, match="not known to dipy_ppir_template"):
        command.read(plan)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give this site's images with --images"),
        (["--images", "nothing*.nii"], "nothing.*names no file"),
        (["--images", "a1_T1w.nii.gz", "sub/a1_T1w.nii.gz"], "the same files"),
        (["--images", "a1_T1w.nii.gz", "copy.nii.gz"], "are the same image"),
        (["--images", "series.nii.gz"], "has 4 dimensions"),
        (
            ["--images", "slice.nii.gz"],
            "image slice.nii.gz has 1 voxel along axis 2.*at least 3 voxels",
        ),
        (
            ["--images", "slice_of_series.nii.gz"],
            "slice_of_series.nii.gz has 1 voxel along axis 2",
        ),
        (
            ["--images", "a1_T1w.nii.gz", "--initial", "slice.nii.gz"],
            "initial template slice.nii.gz has 1 voxel along axis 2",
        ),
        (["--images", "hole.nii.gz"], "hole.nii.gz image contains NaN"),
        (["--images", "a1_T1w.nii.gz", "--jobs", "0"], "must be 1 or more"),
        (["--images", "a1_T1w.nii.gz", "--listen", "here"], "must be host:port"),
        (["--images", "a1_T1w.nii.gz", "--initial", "a2_T1w.nii.gz"], "not both"),
        (["a1_T1w.nii.gz"], "one file too many"),
        (["--images", "a1_T1w.nii.gz"], "unfinished.nii.gz is there already; add"),
    ],
)
def test_what_a_user_may_get_wrong(tmp_path, monkeypatch, arguments, message):
    study = Study(tmp_path, **({} if "slice.nii.gz" in arguments[2:] else GRID))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    study.save("sub/a1", study.images["b1"])
    (tmp_path / "copy.nii.gz").write_bytes((tmp_path / "a1_T1w.nii.gz").read_bytes())
    (tmp_path / command.UNFINISHED).write_bytes(b"of another run")
    for name, data in {
        "series": np.zeros((4, 4, 4, 2)),
        "slice": np.ones((23, 26, 1)),
        "slice_of_series": np.ones((23, 26, 1, 1)),
        "hole": np.full(SHAPE, np.nan),
    }.items():
        nib.save(nib.Nifti1Image(data, study.affine), tmp_path / f"{name}.nii.gz")
    with pytest.raises(InputError, match=message):
        command.template(["plan.toml", *arguments, "--identity", "keys/a"])


def test_what_it_begins_with_is_not_written_over(tmp_path, monkeypatch):
    """The template of an interrupted run is the beginning of the next."""
    study = Study(tmp_path)
    monkeypatch.chdir(tmp_path)
    study.save("initial", study.images["a1"])
    begin = tmp_path / command.UNFINISHED
    (tmp_path / "initial_T1w.nii.gz").rename(begin)
    before = begin.read_bytes()
    with pytest.raises(InputError, match="unfinished.nii.gz is also an input"):
        command.template(
            [
                *("plan.toml", "--images", "a1_T1w.nii.gz", "--identity", "keys/a"),
                *("--initial", command.UNFINISHED, "--force"),
            ]
        )
    assert begin.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["{}", "[1]", '[{"images": 3}]', '[{"images": [[]]}]', "["]
)
def test_a_count_that_cannot_be_read(tmp_path, text):
    (tmp_path / command.FILE).write_text(text)
    with pytest.raises(InputError, match="mend it"):
        command.Runs(tmp_path, {}).warnings()


def test_runs_at_the_same_time_know_of_each_other(tmp_path):
    """All are counted, and each that begins is told of those that began before."""
    images = {f"{n}": np.full((2, 2, 2), n) for n in range(24)}
    runs = [
        command.Runs(tmp_path, {n: images[n] for n in names})
        for names in [*(("0", f"{n}") for n in range(1, 24)), ("0", "1")]
    ]
    assert not any(run.warnings() for run in runs)
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda run: run.enter("a plan"), runs))
    # Before each there were those with another image, or a twin of its own.
    assert sorted(map(len, said)) == list(range(24))
    file = tmp_path / command.FILE
    assert len(json.loads(file.read_text())) == 24
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_check_needs_a_plan(capsys):
    with pytest.raises(SystemExit) as caught:
        command.template(["check"])
    assert caught.value.code == 2
    assert "check lacks the plan that it is to explain" in capsys.readouterr().err


def test_a_lost_site_and_what_there_is_to_go_on_from(tmp_path):
    """Nothing at first, then the template of the last iteration."""
    unfinished = tmp_path / command.UNFINISHED
    parameters = TemplateParameters(iterations=3)
    out = OutputFiles([unfinished], [])
    tell = command._Teller(parameters, out, unfinished)

    def lose():
        with pytest.raises(PeerLostError) as caught, tell.saying_how_to_go_on():
            raise PeerLostError("the site B is gone", 1)
        assert caught.value.culprit == 1
        return str(caught.value)

    assert lose() == "the site B is gone"
    made = Template(np.zeros(SHAPE), np.eye(4))
    tell({"iteration": 1, "template": made})
    said = lose()
    assert said.startswith("the site B is gone; to go on from iteration 2 of 3, move")
    assert str(unfinished) in said and "start with --initial" in said
    assert unfinished.exists()


def test_it_is_a_command():
    assert callable(cli.template)
    assert cli.CLI_SITES["dipy_ppir_template"][1] == "template"
