"""The command ``dipy_ppir``, and what every command says of its version."""

from importlib.metadata import distribution, version
from pathlib import Path
import re
import sys

import pytest

import dipy_ppir
from dipy_ppir.mpc.record import source_digest
from dipy_ppir.workflows import about, cli

SCRIPTS = {e.name for e in distribution("dipy-ppir").entry_points}


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process, standard streams and signals left alone."""
    monkeypatch.setattr(cli, "take_standard_streams", lambda: None)
    monkeypatch.setattr(cli, "output_problem", lambda: None)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)
    monkeypatch.setattr(cli.logging, "raiseExceptions", True)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        assert cli.run(name) == 0
        return capsys.readouterr().out

    return run


def test_lists_the_commands(command):
    lines = command("dipy_ppir").splitlines()
    told = dict(line.split(maxsplit=1) for line in lines)
    assert set(told) == SCRIPTS - {"dipy_ppir"}
    assert len(set(told.values())) == len(told)
    for name, text in told.items():
        assert text[0].isupper() and text.endswith(".") and "`" not in text, name
        assert len(text) < 88
    assert told["dipy_ppir_keygen"] == "Make this site's key and certificate."


def test_versions_of_all_that_is_needed(command):
    lines = command("dipy_ppir", "--version").splitlines()
    told = dict(line.split(maxsplit=1) for line in lines)
    for name in ("dipy", "numpy", "scipy", "nibabel", "mpyc", "pydantic", "rich"):
        assert told[name] == version(name)
    assert told["dipy_ppir"] == version("dipy-ppir")
    assert {"cryptography", "pyopenssl", "gmpy2", "Python", "platform"} < set(told)
    assert told["OpenSSL"][0].isdigit()
    assert "OpenMP" in told["kernels"]
    assert told["sources"] == source_digest()
    assert "pytest" not in told


def test_what_is_not_installed(command, monkeypatch):
    def missing(name):
        if name == "gmpy2":
            raise about.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(about, "version", missing)
    assert about.versions()["gmpy2"] == "not installed"


@pytest.mark.parametrize(
    "name", sorted({*cli.CLI_FLOWS, *cli.CLI_SITES} - {"dipy_ppir"})
)
def test_every_command_says_its_version(command, name):
    line = f"dipy_ppir {version('dipy-ppir')}, DIPY {version('dipy')}\n"
    assert command(name, "--version") == line


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("pyproject.toml", r'^version = "(.*)"$'),
        ("CITATION.cff", r"^version: (.*)$"),
    ],
)
def test_the_version_is_one(name, pattern):
    text = Path(__file__).parents[1].joinpath(name).read_text()
    assert re.findall(pattern, text, re.MULTILINE) == [dipy_ppir.__version__]
    assert version("dipy-ppir") == dipy_ppir.__version__
