"""What arguments the commands take: for programs that call them, see `boutiques`.

The parsers say what flags there are and of which kind, and the parameters of the
registrations (`dipy_ppir.align.parameters`) what values these may have.
"""

import argparse
from dataclasses import dataclass, field
from importlib import import_module
import inspect
from pathlib import Path

from dipy.workflows.base import IntrospectiveArgumentParser

from dipy_ppir.align.parameters import (
    AffineParameters,
    FreeFormParameters,
    PointParameters,
    SynParameters,
)
from dipy_ppir.align.transformfiles import FORMATS
from dipy_ppir.workflows.align import PIPELINES
from dipy_ppir.workflows.cli import CLI_FLOWS
from dipy_ppir.workflows.flow import Heeded
from dipy_ppir.workflows.streams import QUIET

#: Parameters of the commands that register.
PARAMETERS = {
    "dipy_ppir_align_affine": AffineParameters,
    "dipy_ppir_align_syn": SynParameters,
    "dipy_ppir_align_freeform": FreeFormParameters,
    "dipy_ppir_align_points": PointParameters,
}
#: Commands that are no workflows but process files, to what makes their parsers.
PARSERS = {
    "dipy_ppir_helper": ("dipy_ppir.workflows.sites", "helper_parser"),
    "dipy_ppir_receipt": ("dipy_ppir.workflows.receipts", "receipt_parser"),
    "dipy_ppir_template": ("dipy_ppir.workflows.template", "template_parser"),
    "dipy_ppir_cohort": ("dipy_ppir.workflows.cohort", "cohort_parser"),
    "dipy_ppir_report": ("dipy_ppir.workflows.reportfile", "report_parser"),
    "dipy_ppir_bids": ("dipy_ppir.workflows.bids", "bids_parser"),
}
#: Limits of flags that are no parameters, or that have other units.
LIMITS = {
    "transform": {"choices": tuple(PIPELINES)},
    "transform_type": {"choices": ("affine", "diffeomorphic")},
    "interpolation": {"choices": ("linear", "nearest")},
    "from_format": {"choices": tuple(FORMATS)},
    "to_format": {"choices": tuple(FORMATS)},
    "sampling_prop": {"minimum": 1, "maximum": 100},
    "limit_bits": {"minimum": 0},
    "jobs": {"minimum": 1},
    "analysis_level": {"choices": ("participant",)},
    "out_strat": {"choices": ("absolute", "append", "prepend")},
    "log_level": {
        "choices": ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG", "NOTSET")
    },
}
#: Flags that need others, those of any command that has them.
NEEDS = {
    "identity": ("session",),
    "listen": ("session",),
    "resume": ("session",),
    "limit_bits": ("session",),
    "seed": ("sampling_prop",),
    "sampling": ("sampling_prop",),
}
#: Flags that the commands refuse together.
APART = (("sampling_prop", "static_mask"), ("sampling_prop", "moving_mask"))
#: Arguments that name the folder of what is written.
FOLDERS = ("out_dir", "output_dir")
_TYPES = {int: "integer", float: "float", Path: "file"}


@dataclass(frozen=True)
class Argument:
    """One argument of a command.

    Attributes
    ----------
    name : str
    flag : str or None
        how it is spelled; None for one that stands by its place.
    kind : str
        "flag" (without a value), "integer", "float", "file" or "string".
    many : bool
        whether it takes any number of values.
    required : bool
    default : object
        what the command does without it; None where that depends on the others.
    text : str
        what it is for.
    written : bool
        whether it names a file that is written.
    choices : tuple or None
        the only values that it may have.
    limits : dict
        "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum" of each value,
        "minItems" and "maxItems", where there are any.
    """

    name: str
    flag: str | None
    kind: str
    many: bool
    required: bool
    default: object
    text: str
    written: bool = False
    choices: tuple | None = None
    limits: dict = field(default_factory=dict)


def described():
    """Names of the commands that process files, which `arguments` knows."""
    return (*CLI_FLOWS, *PARSERS)


def parser_of(command):
    """The parser of a command, as the command makes it.

    Parameters
    ----------
    command : str
        out of `described`.

    Returns
    -------
    parser : argparse.ArgumentParser
    """
    if command in PARSERS:
        module, name = PARSERS[command]
        return getattr(import_module(module), name)()
    parser = IntrospectiveArgumentParser(prog=command)
    parser.add_workflow(flow_of(command)())
    # Those that DIPY's run_flow adds to those of every workflow.
    for flag in ("force", "mix_names"):
        parser.add_argument(f"--{flag}", action="store_true")
    for flag, default in (
        ("out_strat", "absolute"),
        ("log_level", "INFO"),
        ("log_file", ""),
    ):
        parser.add_argument(f"--{flag}", default=default)
    # Those that `cli` has run_flow add.
    parser.add_argument("--quiet", action=Heeded, nargs=0, help=QUIET)
    return parser


def flow_of(command):
    """The workflow of a command, a class; None for commands that have none."""
    if command not in CLI_FLOWS:
        return None
    module, name = CLI_FLOWS[command]
    return getattr(import_module(module), name)


_COMMON = {
    "force": "Replace output files that are there already.",
    "mix_names": "Prepend the names of inputs to those of outputs.",
    "out_strat": "How the names of outputs are made, for several pairs.",
    "log_level": "The least important messages that are shown.",
    "log_file": "File for the messages.",
}


def arguments(command):
    """The arguments of a command, in its order.

    Parameters
    ----------
    command : str
        out of `described`.

    Returns
    -------
    arguments : dict
        names to `Argument`.
    """
    parser, flow = parser_of(command), flow_of(command)
    documented, signature = {}, {}
    if flow is not None:
        documented = {name: kind for name, kind, _ in parser.doc}
        signature = inspect.signature(flow.run).parameters
    limits = _limits(command, flow)
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._VersionAction):
            continue
        if action.help == argparse.SUPPRESS:
            continue
        flag = action.option_strings[-1] if action.option_strings else None
        name = action.dest
        if isinstance(action, Heeded):
            name = flag.removeprefix("--")
        default = action.default
        if name in signature and action.nargs != 0:
            default = signature[name].default
        if default in ("", (), [], inspect.Parameter.empty, argparse.SUPPRESS):
            default = None
        given = dict(limits.get(name, {}))
        known = given.pop("choices", None)
        choices = action.choices or known
        required = action.required and action.nargs not in ("?", "*")
        found[name] = Argument(
            name=name,
            flag=flag,
            kind=_kind(action, documented.get(name)),
            many=action.nargs in ("+", "*"),
            required=required,
            default=list(default) if isinstance(default, tuple) else default,
            text=" ".join((action.help or _COMMON[name]).split()),
            written=_is_written(action),
            choices=choices and tuple(choices),
            limits=given,
        )
    return found


def _is_written(action):
    """Whether an argument names a file that the command writes."""
    name = action.dest
    if name == "receipt":
        # Without a flag it is one to read.
        return bool(action.option_strings)
    is_output = name.startswith("out") and name not in (*FOLDERS, "out_strat")
    return is_output or name in ("report", "result_file", "to_send")


def _kind(action, documented):
    if action.nargs == 0:
        return "flag"
    # What is written is named, and need not be there.
    if _is_written(action) or action.dest in FOLDERS:
        return "string"
    if documented is None:
        as_file = action.metavar in ("FILE", "PLAN")
        return "file" if as_file else _TYPES.get(action.type, "string")
    for word, kind in (("Path", "file"), ("int", "integer"), ("float", "float")):
        if word in documented:
            return kind
    return "string"


def _limits(command, flow):
    """Choices and limits of the flags of a command."""
    found = dict(LIMITS)
    if command not in PARAMETERS:
        return found
    spelling = getattr(flow, "spelling", {})
    for name, schema in PARAMETERS[command].model_json_schema()["properties"].items():
        flag = spelling.get(name, name)
        if flag in found:
            continue
        options = [schema, *schema.get("anyOf", ())]
        options += [option["items"] for option in options if "items" in option]
        limits = {}
        for option in options:
            limits |= {
                key: value
                for key, value in option.items()
                if key.lower().startswith(("min", "max", "exclusive"))
            }
            if "enum" in option:
                # Small letters are accepted, and usual on a command line.
                limits["choices"] = tuple(map(str.lower, option["enum"]))
        found[flag] = limits
    return found
