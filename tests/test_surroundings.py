"""Commands and calls where standard streams, descriptors and names are unusual."""

import gzip
import os
from pathlib import Path
import subprocess
import sys
import tracemalloc

from commands import script
from examples import quick
from hypothesis import given
from hypothesis import strategies as st
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dipy_ppir.workflows import sites
from dipy_ppir.workflows.flow import OutputFilesFlow, short_name
from dipy_ppir.workflows.inputs import InputError, load_volume
from dipy_ppir.workflows.streams import _Output

RESULTS = {"affine.txt", "moved.nii.gz", "receipt.json"}


needs_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="there is no device that is always full"
)


def images(folder, static, moving):
    """A pair of small files; the second is a voxel away."""
    image = ndimage.gaussian_filter(np.random.default_rng(0).random((16,) * 3), 1)
    for n, name in enumerate((static, moving)):
        moved = nib.Nifti1Image(np.roll(image, n, axis=0), np.eye(4))
        nib.save(moved, Path(folder, name))
    return static, moving


def run(arguments, folder, redirections, **variables):
    """Status of a command that a shell starts with these redirections."""
    command = 'exec "$0" "$@" ' + redirections
    argv = ["sh", "-c", command, *map(str, arguments)]
    return subprocess.run(argv, cwd=folder, env={**os.environ, **variables}).returncode


def align(folder, names, redirections, **variables):
    """Status of the shortest registration, and the names of its files."""
    options = ["--transform", "com", "--no_pictures", "--out_dir", "out"]
    command = [script("dipy_ppir_align_affine"), *names, *options]
    status = run(command, folder, redirections, **variables)
    return status, {path.name for path in (folder / "out").glob("*")}


# -- standard streams --------------------------------------------------------


def test_all_standard_streams_are_closed(tmp_path):
    """What is opened instead is not taken for them, in no process."""
    names = images(tmp_path, "s.nii.gz", "m.nii.gz")
    assert align(tmp_path, names, "<&- >&- 2>&-") == (0, RESULTS)


@needs_full
def test_no_place_to_print_and_letters_that_cannot_be(tmp_path):
    """The results are there, and a line says what is lost; names are found."""
    names = images(tmp_path, "scan [1], né.nii.gz", "m*.nii.gz")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    full = ">/dev/full 2>err"
    assert align(tmp_path, names, full, **ascii_only) == (0, RESULTS)
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert "warning: standard output could not be written (No space left" in line
    assert "the files are written" in line


def printing(text):
    """A command that prints a text and does nothing else."""
    code = f"cli._run = lambda command: print({text!a}) or 0"
    code = f"import sys; from dipy_ppir.workflows import cli; {code}"
    return [sys.executable, "-c", code + "; sys.exit(cli.run('dipy_ppir_session'))"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_are_printed_if_need_be_in_another_way(tmp_path, encoding, unbuffered):
    variables = {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": unbuffered}
    text = "caf\u00e9 \u20ac \udcff"  # the last, of a name that is no text
    assert run(printing(text), tmp_path, ">out", **variables) == 0
    printed = (tmp_path / "out").read_bytes()
    assert printed == (text + "\n").encode(encoding, "backslashreplace")


def test_a_name_in_letters_that_the_locale_lacks(tmp_path, capsys):
    """A program started with LC_ALL=C is given them as bytes in disguise."""
    name = "Hôpital".encode().decode("ascii", "surrogateescape")
    sites.keygen([name, "--identity", str(tmp_path)])
    assert "Hôpital, valid until" in capsys.readouterr().out


@needs_full
def test_what_is_only_printed_must_be(tmp_path):
    assert run(printing("a file"), tmp_path, ">/dev/full 2>err") == 1
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert "error: standard output could not be written (No space left" in line
    assert run(printing("a file"), tmp_path, ">/dev/full 2>/dev/full") == 1
    assert run(printing("a file"), tmp_path, ">&- 2>&-") == 0


def test_an_output_that_is_slow_or_full_takes_everything():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    filled = 0
    while True:
        try:
            filled += os.write(writer, bytes(1 << 12))
        except BlockingIOError:
            break
    with _Output(writer, "w") as output:
        # It waits until there is room again.
        code = f"import os; os.read(0, {filled}); os.read(0, 1 << 16)"
        with subprocess.Popen([sys.executable, "-c", code], stdin=reader):
            assert output.write(b"at last") == 7
        os.close(reader)
        assert output.write(b"nobody reads it") == 15
        assert output.problem is None


@pytest.mark.parametrize("begun", [False, True])
def test_an_interruption_says_how_to_go_on(tmp_path, begun):
    """If there is a checkpoint to go on with."""
    code = """
import sys
from dipy_ppir.align.checkpoint import Checkpoint
from dipy_ppir.workflows import cli

def interrupted(command):
    checkpoint = Checkpoint(sys.argv[1])
    with checkpoint.hint():
        if sys.argv[2] == "True":
            checkpoint.begin({}, run="a" * 32)
        raise KeyboardInterrupt

cli._run = interrupted
sys.exit(cli.run("dipy_ppir_helper"))
"""
    argv = [sys.executable, "-c", code, tmp_path / "checkpoint", begun]
    assert run(argv, tmp_path, "2>err") == 130
    (line,) = (tmp_path / "err").read_text().splitlines()
    assert "interrupted; no output was written" in line
    assert ("add --resume, at all parties, to go on" in line) == begun


# -- descriptors -------------------------------------------------------------

CALL = """
import os, resource, sys
import numpy as np
from dipy_ppir.align import translation
from dipy_ppir.mpc import local

report = open(sys.argv[1], "w")
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if hard != resource.RLIM_INFINITY and hard < 2048:
    print("too few", file=report)
    sys.exit()
resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
for number in range(3):
    os.close(number)

image = np.load(sys.argv[2])
grid = {"static_affine": np.eye(4), "moving_affine": np.eye(4)}
options = {"level_iters": [8], "sigmas": [0.0], "factors": [1]}
_, found = translation(np.roll(image, 1, axis=0), image, **grid, **options)
# The last step is rounded to a 16th of a voxel, by chance.
assert np.allclose(found[:3, 3], (1, 0, 0), atol=0.4), found
try:
    local.run_locally(print, "no.such:thing", moving={}, static={}, helper={})
except Exception as exc:
    print(type(exc).__name__, file=report)
report.flush()
"""


def test_a_call_with_many_files_open_and_no_standard_streams(tmp_path):
    """Sockets and pipes have numbers from 1,100 on: `select.select` takes none."""
    image = ndimage.gaussian_filter(np.random.default_rng(0).random((16,) * 3), 1)
    np.save(tmp_path / "image.npy", image)
    argv = [sys.executable, "-c", CALL, tmp_path / "report", tmp_path / "image.npy"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "report").read_text().strip()
    if said == "too few":
        pytest.skip("this machine does not allow as many open files")
    assert said == "ModuleNotFoundError"


# -- names -------------------------------------------------------------------


class Flow(OutputFilesFlow):
    def run(self, first, second, out_dir="", strength=3, out_file="a.txt"):
        self.jobs = [
            tuple(map(str, row))
            for row in self.rows([first, second], out_dir, [out_file])
        ]


@pytest.fixture
def named(tmp_path, monkeypatch):
    """What a flow makes of names in a folder with these files."""
    monkeypatch.chdir(tmp_path)

    def make(*files):
        for file in files:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_bytes(b"")

        def jobs(first, second):
            one = Flow()
            one.run(first, second)
            return one.jobs

        return jobs

    return make


@pytest.mark.parametrize("name", ["a [1].n", "[ab].n", "what?.n", "*.n", "-a b,ü].n"])
def test_a_file_that_exists_is_meant_whatever_its_name(named, name):
    jobs = named(name, "a.n", "b.n", "c.m")
    assert jobs(name, "c.m") == [(name, "c.m", "a.txt")]
    assert jobs(Path("c.m"), Path(name)) == [("c.m", name, "a.txt")]


def test_patterns_and_folders_are_still_such(named):
    jobs = named("a.n", "b.n", "c.m", "in [1]/x", "in [1]/y")
    assert jobs("[ab].n", "c.m") == [("a.n", "c.m", "a.txt"), ("b.n", "c.m", "a.txt")]
    many = jobs("in [1]", "c.m")
    assert [row[0] for row in many] == ["in [1]/x", "in [1]/y"]
    with pytest.raises(InputError, match="File not found: no"):
        jobs("no[1]", "c.m")


def test_names_in_titles_are_text():
    """Matplotlib takes nothing else."""
    assert short_name("folder/né.nii") == "né.nii"
    assert short_name(os.fsdecode(b"m\xff.nii")) == "m\ufffd.nii"


def test_dicom_is_refused_with_the_remedy(named):
    jobs = named("c.m", "series/1.IMA", "other/I001")
    Path("other/I001").write_bytes(bytes(128) + b"DICM")
    for name in ("series", "series/1.IMA", "other", "other/I001"):
        with pytest.raises(InputError, match=f"{name} is DICOM.*dcm2niix") as caught:
            jobs(name, "c.m")
        assert caught.value.args[0].endswith(name.partition("/")[0])


# -- files that are no images ------------------------------------------------


def header(*, gz=False, **entries):
    """Bytes of a small NIfTI file whose header says something else."""
    noise = np.random.default_rng(0).random((9, 8, 7))
    image = nib.Nifti1Image(noise.astype(np.float32), np.eye(4))
    raw = bytearray(image.to_bytes())
    for name, value in entries.items():
        kind, offset = image.header.template_dtype.fields[name]
        data = (
            value if isinstance(value, bytes) else np.array(value, kind.base).tobytes()
        )
        raw[offset : offset + len(data)] = data
    return gzip.compress(bytes(raw)) if gz else bytes(raw)


def dim(*sizes):
    return [len(sizes), *sizes, *[1] * (7 - len(sizes))]


DAMAGED = {
    "no voxels": ({"dim": dim(9, 0, 7)}, "9 x 0 x 7 voxels", "copy or convert"),
    "fewer than none": ({"dim": dim(9, -8, 7)}, "9 x -8 x 7 voxels", "copy or convert"),
    "too many": ({"dim": dim(999, 999, 999)}, "997,002,999 voxels", "resample"),
    "terabytes": ({"dim": dim(99, 99, 99, 32767, 99)}, "cannot hold", "copy or conv"),
    "more than there": (
        {"dim": dim(9, 8, 8)},
        "damaged or incomplete",
        "copy or convert",
    ),
    "type": ({"datatype": 77}, "cannot be read as NIfTI", "convert"),
    "magic": ({"magic": b"xx"}, "cannot be read as NIfTI", "convert"),
    "dimensions": ({"dim": [-1] * 8}, "cannot be read as NIfTI", "convert"),
    "offset": ({"vox_offset": np.nan}, "cannot be read as NIfTI", "convert"),
    "elsewhere": ({"vox_offset": 1e9}, "damaged or incomplete", "copy or convert"),
    "affine": ({"srow_x": [np.nan] * 4}, "NaN or infinity", "correct the image's head"),
    "place": (
        {"srow_x": [np.inf] * 4},
        "NaN or infinity",
        "correct the image's header",
    ),
}


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_headers(tmp_path, damage, gz):
    """Said in one line that names the file, and before memory is set aside."""
    entries, *words = DAMAGED[damage]
    path = tmp_path / ("bad.nii.gz" if gz else "bad.nii")
    path.write_bytes(header(gz=gz, **entries))
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            load_volume(path, "static")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    for word in ["static image", str(path), *words]:
        assert word in str(caught.value)


@quick(300)
@given(data=st.data())
def test_any_damage_to_a_file_is_explained(tmp_path_factory, data):
    """Or does no harm; it is never an error of another kind."""
    raw = bytearray(header())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, 351))
        new = data.draw(st.binary(min_size=1, max_size=8))
        raw[start : start + len(new)] = new
    raw = bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) - 9, 350, 99]))])
    path = tmp_path_factory.getbasetemp() / "any.nii"
    path.write_bytes(raw)
    try:
        load_volume(path, "moving")
    except InputError as exc:
        assert str(path) in str(exc) and "\n" not in str(exc)
