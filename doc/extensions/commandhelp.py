"""A directive that documents the commands by their own parsers."""

from argparse import SUPPRESS, ArgumentParser
import os
import re
import sys
from unittest import mock
import warnings

from sphinx.util.docutils import SphinxDirective

from dipy_ppir.workflows import cli

#: Columns of usage lines.
WIDTH = "78"


class _Caught(BaseException):
    """A parser that was about to read arguments."""


def parser_of(command):
    """The parser of a command, caught when it is made and nothing is read yet."""

    def catch(parser, *args, **kwargs):
        raise _Caught(parser)

    with (
        mock.patch.object(ArgumentParser, "parse_args", catch),
        mock.patch.object(sys, "argv", [command]),
        mock.patch.dict(os.environ, COLUMNS=WIDTH),
        warnings.catch_warnings(),
    ):
        try:
            cli._run(command)
        except _Caught as caught:
            return caught.args[0]
    raise RuntimeError(f"{command} reads no arguments")


def _entries(parser):
    """Pairs of how an argument is written and what it does, in reStructuredText."""
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.help == SUPPRESS or action.choices and not action.help:
                continue
            names = ", ".join(action.option_strings)
            value = action.metavar or (action.dest if action.nargs != 0 else "")
            if isinstance(action.choices, list | tuple):
                value = "{" + ",".join(map(str, action.choices)) + "}"
            elif getattr(action.type, "__name__", "") in ("int", "float", "str"):
                value = action.type.__name__ if names else value
            written = f"{names} {value}".strip() if names else value
            text = formatter._expand_help(action) if action.help else ""
            # Patterns of files are no emphasis.
            text = re.sub(r"(?<![*`])[*](?![*])", r"\\*", text)
            yield written, " ".join(text.split())


def _section(command, parser, underline="-"):
    """Lines of reStructuredText about one command."""
    yield from (command, underline * len(command), "")
    yield from ((parser.description or "").strip(), "")
    yield from (".. code-block:: text", "")
    with mock.patch.dict(os.environ, COLUMNS=WIDTH):
        usage = parser.format_usage().removeprefix("usage: ")
    yield from (f"    {line}" for line in usage.rstrip().splitlines())
    yield ""
    for written, text in _entries(parser):
        yield from (f"``{written}``", f"    {text or 'as in the usage.'}", "")
    for action in parser._actions:
        if isinstance(action.choices, dict):  # subcommands
            for name, inner in action.choices.items():
                inner.description = inner.description or next(
                    (a.help for a in action._choices_actions if a.dest == name), ""
                )
                yield from _section(f"{command} {name}", inner, "~")


class CommandHelp(SphinxDirective):
    """``.. commandhelp::`` documents every command of `cli`."""

    def run(self):
        lines = []
        for command in [*cli.CLI_FLOWS, *cli.CLI_SITES]:
            lines += _section(command, parser_of(command))
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app):
    """Register the directive."""
    app.add_directive("commandhelp", CommandHelp)
    return {"parallel_read_safe": True}
