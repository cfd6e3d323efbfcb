"""Compiled kernels that are missing or stale are refused with the remedy."""

from pathlib import Path
import shutil
import subprocess
import sys

import pytest

import dipy_ppir
from dipy_ppir._kernels import sources
from dipy_ppir._kernels.digest import digest

TREE = Path(__file__).parents[1]
INSTALLED = Path(dipy_ppir.__file__).parent


@pytest.fixture
def tree(tmp_path):
    """A source tree in which no kernels were built."""
    shutil.copytree(TREE / "cython_kernels", tmp_path / "cython_kernels")
    (tmp_path / "setup.py").touch()
    package = tmp_path / "dipy_ppir"
    (package / "_kernels").mkdir(parents=True)
    shutil.copy(INSTALLED / "__init__.py", package)
    for name in ("__init__.py", "digest.py"):
        shutil.copy(INSTALLED / "_kernels" / name, package / "_kernels")
    return tmp_path


def build(tree):
    """Bring the installed package's kernels into a source tree."""
    for file in (INSTALLED / "_kernels").iterdir():
        if file.suffix == ".so" or file.name == "sources.py":
            shutil.copy(file, tree / "dipy_ppir" / "_kernels")


def imported(tree):
    """Import a kernel in the source tree: the last line on standard error."""
    code = "import sys; sys.path.insert(0, ''); from dipy_ppir._kernels import ring64"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True
    )
    return result.returncode, result.stderr.strip().rpartition("\n")[2]


def test_the_kernels_are_those_of_this_tree():
    assert digest(TREE) == sources.DIGEST


def test_missing(tree):
    status, said = imported(tree)
    assert status == 1
    assert said.startswith("ImportError: the compiled kernels of dipy_ppir are missing")
    assert said.endswith(f"run `make build` or `pip install -e .` in {tree}")
    # Outside of a source tree: how to install again.
    (tree / "setup.py").unlink()
    status, said = imported(tree)
    assert status == 1
    assert said.endswith("pip install --force-reinstall --no-deps dipy-ppir`")


def test_stale(tree):
    build(tree)
    assert imported(tree) == (0, "")
    with open(tree / "cython_kernels" / "carry.h", "a") as header:
        header.write("\n")
    status, said = imported(tree)
    assert status == 1
    assert "built from other sources" in said and "`make build`" in said
    # An installed package has nothing to compare with.
    (tree / "setup.py").unlink()
    assert imported(tree) == (0, "")


def test_for_another_python(tree):
    build(tree)
    for file in (tree / "dipy_ppir" / "_kernels").glob("field61.*"):
        file.rename(file.with_name("field61.cpython-27.so"))
    status, said = imported(tree)
    assert status == 1
    assert "for another Python (No module named 'dipy_ppir._kernels.field61')" in said
