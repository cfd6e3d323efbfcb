"""The pages: links lead somewhere, and examples run as they are written."""

import argparse
import ast
from collections import Counter
from importlib.metadata import distribution
import os
from pathlib import Path
import re
import sys

from dipy.align.imwarp import DiffeomorphicMap
from dipy.io.stateful_tractogram import Space, StatefulTractogram
from dipy.io.streamline import save_tractogram
import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from dipy_ppir.align import affine_registration, syn_registration, write_mapping
from dipy_ppir.workflows import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "doc").glob("*.md")])
#: Before an example that one program alone cannot run.
NOT_RUN = "<!-- not run: needs other parties -->"


def without_code(text):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What headings are called in links, as forges and MyST do it."""
    text, seen, found = without_code(page.read_text(encoding="utf-8")), Counter(), set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        heading = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_command_is_described():
    page = (ROOT / "doc" / "usage.md").read_text(encoding="utf-8")
    for entry in distribution("dipy-ppir").entry_points:
        assert f"`{entry.name}`" in page, entry.name


class Caught(Exception):
    """A parser that was about to read arguments."""


@pytest.mark.parametrize("command", [*cli.CLI_FLOWS, *cli.CLI_SITES])
def test_every_flag_is_described(command, monkeypatch):
    """On a page that names the command."""

    def catch(parser, *args, **kwargs):
        raise Caught(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", catch)
    monkeypatch.setattr(sys, "argv", [command])
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)
    with pytest.raises(Caught) as caught:
        cli._run(command)
    parsers = [caught.value.args[0]]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    text = "\n".join(page for page in pages if re.search(rf"{command}\b", page))
    for action in (action for parser in parsers for action in parser._actions):
        if action.help == argparse.SUPPRESS or not action.option_strings:
            continue
        spelled = "|".join(map(re.escape, action.option_strings))
        found = re.search(rf"(?<![\w-])({spelled})(?![\w-])", text)
        assert found, action.option_strings


def examples(run_only=False):
    """Every Python example of the pages, or those that are run: code, line, page."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
            before = text[: block.start()]
            line = before.count("\n") + 2
            if not (run_only and before.rstrip().endswith(NOT_RUN)):
                yield pytest.param(block[1], line, page, id=f"{page.name}-{line}")


@pytest.fixture(scope="module")
def example_names(tmp_path_factory):
    """What examples take for granted: a small pair of images, as arrays and files."""
    rng = np.random.default_rng(5)
    shape = (48, 44, 40)  # with three levels, as many as windows of 9 voxels need
    at = np.indices(shape) - np.reshape([23.5, 21.5, 19.5], (3, 1, 1, 1))
    body = np.exp(
        -(((at / np.reshape([13, 11, 10], (3, 1, 1, 1))) ** 2).sum(axis=0) ** 2)
    )
    body *= 1 + 0.6 * ndimage.gaussian_filter(rng.standard_normal(shape), 4) / 0.03
    static = np.where(body > 0.05, body, 0)
    moving = ndimage.shift(static, (1.6, -1.2, 0.8), order=1)
    affine = np.eye(4)
    folder = tmp_path_factory.mktemp("examples")
    for name, image in (
        ("t1_hospital_a", moving),
        ("t1_hospital_b", static),
        ("moving", moving),
        ("static", static),
        ("moving_labels", moving > 1),
        ("dwi", np.stack([moving] * 7, axis=-1)),
    ):
        nib.save(
            nib.Nifti1Image(image.astype(np.float32), affine), folder / f"{name}.nii.gz"
        )
    np.savetxt(folder / "dwi.bval", [[0] + [1000] * 6])
    directions = rng.standard_normal((3, 7))
    np.savetxt(folder / "dwi.bvec", directions / np.linalg.norm(directions, axis=0))
    lines = [rng.uniform(10, 30, (5, 3)).astype(np.float32) for _ in range(3)]
    bundle = StatefulTractogram(lines, str(folder / "moving.nii.gz"), Space.RASMM)
    save_tractogram(bundle, str(folder / "bundle.trk"))
    moved, matrix, receipt = affine_registration(
        moving,
        static,
        moving_affine=affine,
        static_affine=affine,
        pipeline=["translation"],
        level_iters=[4],
        factors=[1],
        sigmas=[1.0],
        ret_receipt=True,
    )
    np.savetxt(folder / "affine.txt", matrix)
    mapping = DiffeomorphicMap(3, shape, affine, shape, affine, shape, affine)
    mapping.allocate()
    write_mapping(mapping, folder / "displacement_field.nii.gz")
    names = {
        "moving": moving,
        "static": static,
        "np": np,
        "moving_t1": moving,
        "static_t2": static,
        "moving_affine": affine,
        "static_affine": affine,
        "matrix": affine,
        "moved": moved,
        "receipt": receipt,
        "affine": affine,
        "affine_registration": affine_registration,
        "syn_registration": syn_registration,
    }
    return folder, names


@pytest.mark.parametrize("code, line, page", list(examples()))
def test_examples_import_what_there_is(code, line, page):
    tree = ast.parse("\n" * (line - 1) + code, str(page))
    tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    exec(compile(tree, str(page), "exec"), {})


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("code, line, page", list(examples(run_only=True)))
def test_examples_run(code, line, page, example_names, monkeypatch):
    folder, names = example_names
    monkeypatch.chdir(folder)
    # Where the commands are that examples run.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), dict(names))
