"""Boutiques descriptors of the commands, and the command that writes them.

A descriptor (https://boutiques.github.io, schema 0.5) says in JSON what a command
takes and writes, so that platforms can offer it and ``bosh`` can run it. They are made
from the commands' own parsers when they are asked for, and so belong to the version
that is installed.
"""

import argparse
from importlib.metadata import version
import json
from pathlib import Path
import re

from dipy_ppir.workflows.commands import (
    APART,
    FOLDERS,
    NEEDS,
    arguments,
    described,
    flow_of,
    parser_of,
)
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.outcomes import FILE as OUTCOMES
from dipy_ppir.workflows.outputs import OutputFiles, new_folders
from dipy_ppir.workflows.streams import QUIET, be_quiet, say
from dipy_ppir.workflows.template import IMAGE_FILES, RECEIPT, TEMPLATE

SCHEMA = "0.5"
TAGS = {"domain": ["neuroinformatics", "image registration", "privacy"]}
_TYPES = {
    "flag": "Flag",
    "integer": "Number",
    "float": "Number",
    "file": "File",
    "string": "String",
}
#: Files of fixed names, in the folder of the results: what they are.
_NAMED = {
    "dipy_ppir_template": {
        TEMPLATE: "The template.",
        RECEIPT: "What was opened: the sums, and how many bits.",
        **{f"*_{name}": f"For each image, {w}." for name, w in IMAGE_FILES.items()},
    },
    "dipy_ppir_cohort": {OUTCOMES: "What became of each pair."},
    "dipy_ppir_bids": {
        "dataset_description.json": "What makes the folder a dataset; the rest is in "
        "it."
    },
}
#: Of these and of flags, what every run writes.
_ALWAYS = (
    *("receipt", "result_file", "out"),
    *(TEMPLATE, RECEIPT, "dataset_description.json"),
)
_LIMITS = {
    "minimum": ("minimum", None),
    "maximum": ("maximum", None),
    "exclusiveMinimum": ("minimum", "exclusive-minimum"),
    "exclusiveMaximum": ("maximum", "exclusive-maximum"),
    "minItems": ("min-list-entries", None),
    "maxItems": ("max-list-entries", None),
}


def descriptor(command):
    """The descriptor of a command.

    Parameters
    ----------
    command : str
        out of `commands.described`.

    Returns
    -------
    descriptor : dict
        JSON of schema 0.5.
    """
    known = arguments(command)
    summary, _, more = (parser_of(command).description or "").partition("\n\n")
    # A flag that takes any number of values would take what stands by its place too.
    ordered = sorted(known.values(), key=lambda argument: argument.flag is not None)
    keys = [_key(argument.name) for argument in ordered]
    return {
        "name": command,
        "description": " ".join(f"{summary} {more}".split()),
        "author": "The developers of dipy_ppir",
        "tool-version": version("dipy-ppir"),
        "schema-version": SCHEMA,
        "command-line": " ".join([command, *keys]),
        "inputs": [_input(argument, known) for argument in ordered],
        **_outputs(command, known),
        "error-codes": [
            {"code": 1, "description": "The last line on standard error says why."},
            {"code": 2, "description": "The command line cannot be understood."},
            {"code": 130, "description": "Interrupted."},
        ],
        "tags": TAGS,
    }


def _key(name):
    return f"[{name.upper()}]"


def _input(argument, known):
    found = {
        "id": argument.name,
        "name": argument.name.replace("_", " "),
        "type": _TYPES[argument.kind],
        "description": argument.text,
        "value-key": _key(argument.name),
        "optional": not argument.required,
    }
    if argument.flag is not None:
        found["command-line-flag"] = argument.flag
    if argument.many:
        found |= {"list": True, "list-separator": " "}
    if argument.kind == "integer":
        found["integer"] = True
    if argument.choices is not None:
        found["value-choices"] = list(argument.choices)
    for name, value in argument.limits.items():
        limit, exclusive = _LIMITS[name]
        found[limit] = value
        if exclusive:
            found[exclusive] = True
    if argument.default is not None and argument.kind != "flag":
        default = argument.default
        found["default-value"] = str(default) if isinstance(default, Path) else default
    if argument.name == "out_dir":
        # Names of outputs begin with it.
        found["default-value"] = "."
    needs = [name for name in NEEDS.get(argument.name, ()) if name in known]
    if needs and not argument.required and "default-value" not in found:
        found["requires-inputs"] = needs
    apart = {*sum((pair for pair in APART if argument.name in pair), ())}
    apart = sorted((apart - {argument.name}) & set(known))
    if apart:
        found["disables-inputs"] = apart
    return found


def _outputs(command, known):
    """The files that a command writes: the receipt, and what depends on flags."""
    folder = "".join(f"{_key(name)}/" for name in FOLDERS if name in known)
    found = []
    for name, argument in known.items():
        if not argument.written:
            continue
        found.append(
            {
                "id": f"{name}_file",
                "name": name.removeprefix("out_").replace("_", " "),
                "description": argument.text,
                "path-template": (folder if name != "to_send" else "") + _key(name),
                # Owners in a session have not all of them.
                "optional": name not in _ALWAYS,
            }
        )
    flow = flow_of(command)
    here, at_sites = (getattr(flow, p, {}) for p in ("pictures", "own_pictures"))
    named = dict.fromkeys({**here, **at_sites}, "A picture of the result.")
    for name, text in {**_NAMED.get(command, {}), **named}.items():
        entry = {
            "id": re.sub(r"\W", "_", name).lstrip("_"),
            "name": name,
            "description": text,
            "path-template": folder + name,
            "optional": name not in _ALWAYS,
        }
        found.append(entry | ({"list": True} if "*" in name else {}))
    return {"output-files": found} if found else {}


def boutiques_parser():
    """The arguments of ``dipy_ppir_boutiques``."""
    parser = argparse.ArgumentParser(
        prog="dipy_ppir_boutiques",
        description="Write the Boutiques descriptors of commands, with which bosh and "
        "platforms that know Boutiques run them: COMMAND.json for each.",
    )
    parser.add_argument(
        "commands",
        nargs="*",
        metavar="COMMAND",
        help=f"all unless named: {', '.join(described())}",
    )
    parser.add_argument(
        "--out_dir", type=Path, default=Path("."), help="folder for the files"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace files that are there already"
    )
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    parser.add_argument(
        "--debug", action="store_true", help="on an error show where it occurred"
    )
    return parser


def boutiques(given=None):
    """``dipy_ppir_boutiques``: write descriptors of commands."""
    given = boutiques_parser().parse_args(given)
    be_quiet(given.quiet)
    for command in given.commands:
        if command not in described():
            raise InputError(
                f"{command} is no command that processes files; choose one of "
                f"{', '.join(described())}"
            )
    commands = given.commands or described()
    files = {name: given.out_dir / f"{name}.json" for name in dict.fromkeys(commands)}
    with (
        new_folders(files.values()),
        OutputFiles(files.values(), [], force=given.force) as out,
    ):
        for command, file in files.items():
            text = json.dumps(descriptor(command), indent=2, ensure_ascii=False)
            out.temporary(file).write_text(text + "\n", encoding="utf-8")
        out.commit()
    for file in files.values():
        say(file)
