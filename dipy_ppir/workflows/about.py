"""``dipy_ppir``: which commands there are, and what they run with."""

import argparse
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version
import platform
import re

from dipy_ppir.workflows.cli import CLI_FLOWS, CLI_SITES

#: Instruction sets, as the kernels count them.
_INSTRUCTIONS = ("baseline", "AVX2", "AVX-512")


def about(arguments=None):
    """``dipy_ppir``: list the commands, or print versions for a report."""
    parser = argparse.ArgumentParser(
        prog="dipy_ppir", description="List the commands of dipy_ppir."
    )
    parser.add_argument(
        "--version",
        action="store_true",
        help="print the versions of everything that registrations run with",
    )
    parser.add_argument(
        "--debug", action="store_true", help="on an error show where it occurred"
    )
    rows = versions() if parser.parse_args(arguments).version else commands()
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:{width}}  {text}")


def commands():
    """The commands of the package, in order of their names, each with a line of text.

    Returns
    -------
    commands : dict
    """
    found = {}
    for entry in distribution("dipy-ppir").entry_points:
        if entry.name == "dipy_ppir":
            continue
        if entry.name in CLI_FLOWS:
            module, name = CLI_FLOWS[entry.name]
            told = getattr(import_module(module), name).run
        elif entry.name in CLI_SITES:
            module, name = CLI_SITES[entry.name]
            told = getattr(import_module(module), name)
        else:
            told = entry.load()
        line = told.__doc__.strip().partition("\n")[0]
        line = line.removeprefix(f"``{entry.name}``: ")
        found[entry.name] = line[0].upper() + line[1:]
    return dict(sorted(found.items()))


def versions():
    """What registrations on this machine run with, by name.

    Returns
    -------
    versions : dict
        versions of the package and of what it and its extras for users need; then of
        Python, OpenSSL and the platform, what the kernels were built for, and the
        digest of the package's sources, which receipts state too.
    """
    from cryptography.hazmat.backends.openssl import backend

    from dipy_ppir._kernels import ring64
    from dipy_ppir.mpc.record import source_digest
    from dipy_ppir.mpc.threads import threads

    found = {"dipy_ppir": version("dipy-ppir")}
    for needed in distribution("dipy-ppir").requires:
        name, extra = re.match(r"([\w.-]+)[^;]*(.*)", needed).groups()
        # An extra may name others, of the package itself.
        if name == "dipy-ppir" or (extra and re.search("test|dev|doc", extra)):
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    level, openmp = ring64._built_with()
    return {
        **found,
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "OpenSSL": backend.openssl_version_text().removeprefix("OpenSSL "),
        "platform": platform.platform(),
        "kernels": f"{_INSTRUCTIONS[level]}, "
        + (f"OpenMP, {threads()} threads" if openmp else "without OpenMP"),
        "sources": source_digest(),
    }
