"""What commands say ahead of time."""

import itertools
import logging

import nibabel as nib
import numpy as np
import pytest
from sites import Sites

from dipy_ppir.align.estimate import Line, estimate
from dipy_ppir.align.parameters import AffineParameters
from dipy_ppir.workflows import sites
from dipy_ppir.workflows.operations import USUAL_SHAPES
from dipy_ppir.workflows.progress import estimate_text

NOWHERE = {"static": "127.0.0.1:7433", "helper": "127.0.0.1:7434"}
REVEAL = {"points": "transform", "affine": "transform"}


@pytest.fixture
def checked(tmp_path, capsys, bodies):
    """Runs ``dipy_ppir_session check``; what it says of what it takes."""

    folders = (tmp_path / str(k) for k in itertools.count())

    def run(operation, *arguments, **parameters):
        made = Sites(
            next(folders),
            operation,
            bodies(3),
            reveal=REVEAL.get(operation),
            addresses=NOWHERE,
            parameters=parameters,
        )
        words = {"IMAGE": made.folder / "static.nii.gz"}
        arguments = [str(words.get(a, a)) for a in arguments]
        sites.session(["check", str(made.file), *arguments])
        text = capsys.readouterr().out
        return text.split("What it takes\n-------------\n")[1].split("\n\n")[0]

    return run


@pytest.mark.parametrize("operation", ["affine", "syn", "freeform"])
def test_of_usual_images(checked, operation):
    said = checked(operation)
    for shape in USUAL_SHAPES[3]:
        assert f"{' x '.join(map(str, shape))} voxels:\n    " in said
    assert said.count("over lines of 20 ms and 1000 Mbit/s") == 2


def test_of_slices(checked):
    said = checked("syn", dim=2)
    assert "109 x 91 voxels:" in said and "218 x 182 voxels:" in said


def test_of_points(checked, tmp_path):
    assert "100 points:" in checked("points")
    assert "7 points:" in checked("points", "--moving_shape", "7", "2")
    points = np.random.default_rng(1).normal(size=(23, 3)) * [30, 20, 10]
    np.savetxt(tmp_path / "own.txt", points)
    assert "23 points:" in checked("points", tmp_path / "own.txt")


def test_of_an_image(checked, bodies):
    """It is its header that counts: voxels need not be cubes."""
    static, _, matrix, _ = bodies(3)
    said = checked("affine", "IMAGE", "--rtt", "100", "--bandwidth", "50")
    found = estimate(
        AffineParameters(), static.shape, static.shape, static_grid2world=matrix
    )
    assert said.splitlines()[0] == "26 x 24 x 22 voxels:"
    assert said.splitlines()[1].strip() == f"{estimate_text(found, Line(0.1, 5e7))}."


def test_a_series_and_a_damaged_image(checked, tmp_path):
    series = np.zeros((12, 14, 16, 3), dtype=np.int16)
    nib.save(nib.Nifti1Image(series, np.eye(4)), tmp_path / "series.nii")
    said = checked("affine", tmp_path / "series.nii")
    assert "12 x 14 x 16 voxels:" in said
    (tmp_path / "damaged.nii").write_bytes(
        (tmp_path / "series.nii").read_bytes()[:1000]
    )
    with pytest.raises(ValueError, match="damaged or incomplete"):
        checked("affine", tmp_path / "damaged.nii")


def test_of_given_shapes(checked):
    both = ["--static_shape", "50", "60", "70", "--moving_shape", "40", "40", "40"]
    assert "50 x 60 x 70 and 40 x 40 x 40 voxels:" in checked("affine", *both)
    assert "50 x 60 x 70 voxels:" in checked("affine", *both[:4])
    assert "40 x 40 x 40 voxels:" in checked("syn", *both[4:])


@pytest.mark.parametrize(
    "operation, arguments, said",
    [
        ("affine", "IMAGE --static_shape 3 3 3", "leave out --static_shape"),
        ("affine", "--static_shape 30", "--static_shape must be 2 or 3 numbers"),
        ("affine", "--moving_shape 30 0 30", "--moving_shape must be 2 or 3 numbers"),
        ("affine", "--moving_shape 9 9 --static_shape 9 9 9", "differ in dimensions"),
        ("syn", "--moving_shape 9 9", "--moving_shape must be 3 numbers of voxels"),
        ("points", "--moving_shape 9 9", "2 or 3 coordinates"),
        ("points", "nothing.txt", "do not exist"),
        ("affine", "nothing.nii", "does not exist"),
    ],
)
def test_mistakes(checked, operation, arguments, said):
    with pytest.raises(ValueError, match=said):
        checked(operation, *arguments.split())


@pytest.mark.parametrize("flag", ["--rtt", "--bandwidth"])
@pytest.mark.parametrize("value", ["0", "-1", "inf", "nan", "fast"])
def test_lines_that_are_none(checked, capsys, flag, value):
    with pytest.raises(SystemExit):
        checked("affine", f"{flag}={value}")
    assert flag in capsys.readouterr().err


def test_an_image_of_the_wrong_dimension(checked):
    with pytest.raises(ValueError, match="has 3 dimensions"):
        checked("syn", "IMAGE", dim=2)


def test_sites_say_it_when_they_have_met(tmp_path, bodies):
    """Each of them, of the two shapes that there are."""
    made = Sites(
        tmp_path,
        "affine",
        bodies(3),
        reveal="transform",
        parameters={
            "pipeline": ["translation"],
            "level_iters": [3],
            "factors": [1],
            "sigmas": [0.0],
        },
    )
    made.run()
    said = set()
    for site in ("moving", "static", "helper"):
        (line,) = (x for x in made.log(site).splitlines() if "of traffic in all" in x)
        said.add(line)
        assert "over lines of 20 ms and 1000 Mbit/s" in line
        log = made.log(site)
        assert log.index("Connected to") < log.index(line)
    # All but how fast each machine is.
    assert len({line.split("),")[1] for line in said}) == 1


def test_a_run_on_one_machine(tmp_path, bodies, caplog):
    from dipy_ppir.workflows.align import SecureImageRegistrationFlow

    static, moving, static_grid2world, moving_grid2world = bodies(3)
    for name, data, matrix in (
        ("static", static, static_grid2world),
        ("moving", moving, moving_grid2world),
    ):
        image = nib.Nifti1Image(data.astype(np.float32), matrix)
        nib.save(image, tmp_path / f"{name}.nii.gz")
    flow = SecureImageRegistrationFlow()
    with caplog.at_level(logging.INFO, "dipy_ppir"):
        flow.run(
            str(tmp_path / "static.nii.gz"),
            str(tmp_path / "moving.nii.gz"),
            transform="trans",
            level_iters=(5,),
            sigmas=(0.0,),
            factors=(1,),
            no_pictures=True,
            out_dir=str(tmp_path),
        )
    found = estimate(
        AffineParameters(
            pipeline=("center_of_mass", "translation"),
            level_iters=(5,),
            sigmas=(0.0,),
            factors=(1,),
        ),
        static.shape,
        moving.shape,
        static_grid2world=static_grid2world,
    )
    lines = [r.getMessage() for r in caplog.records]
    assert lines[1] == estimate_text(found)
    (receipt,) = flow.receipts
    assert 0.9 < found.sent / receipt["bytes_total"] < 1.1
