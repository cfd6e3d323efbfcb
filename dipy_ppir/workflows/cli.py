"""The commands of the package; DIPY's own table of commands is closed."""

import logging
import signal
import sys
import warnings

from dipy_ppir.workflows.streams import (
    QUIET,
    be_quiet,
    output_problem,
    take_standard_streams,
)

#: Commands to their workflows.
CLI_FLOWS = {
    "dipy_ppir_align_affine": (
        "dipy_ppir.workflows.align",
        "SecureImageRegistrationFlow",
    ),
    "dipy_ppir_align_syn": ("dipy_ppir.workflows.syn", "SecureSynRegistrationFlow"),
    "dipy_ppir_align_points": (
        "dipy_ppir.workflows.points",
        "SecurePointRegistrationFlow",
    ),
    "dipy_ppir_align_freeform": (
        "dipy_ppir.workflows.freeform",
        "SecureFreeFormRegistrationFlow",
    ),
    "dipy_ppir_apply_transform": (
        "dipy_ppir.workflows.transform",
        "ApplyTransformFlow",
    ),
    "dipy_ppir_convert_transform": (
        "dipy_ppir.workflows.convert",
        "ConvertTransformFlow",
    ),
}

#: Commands that are no workflows on images, to functions that may return a status.
CLI_SITES = {
    "dipy_ppir": ("dipy_ppir.workflows.about", "about"),
    "dipy_ppir_keygen": ("dipy_ppir.workflows.sites", "keygen"),
    "dipy_ppir_session": ("dipy_ppir.workflows.sites", "session"),
    "dipy_ppir_helper": ("dipy_ppir.workflows.sites", "helper"),
    "dipy_ppir_receipt": ("dipy_ppir.workflows.receipts", "receipt"),
    "dipy_ppir_template": ("dipy_ppir.workflows.template", "template"),
    "dipy_ppir_cohort": ("dipy_ppir.workflows.cohort", "cohort"),
    "dipy_ppir_report": ("dipy_ppir.workflows.reportfile", "report_of"),
    "dipy_ppir_bids": ("dipy_ppir.workflows.bids", "bids"),
    "dipy_ppir_boutiques": ("dipy_ppir.workflows.boutiques", "boutiques"),
}


def _warn(message, category, filename, lineno, file=None, line=None):
    """Show a warning as a user wants it: one line, without the program's."""
    logging.getLogger("dipy_ppir").warning("%s", message)


def _terminate(signum, frame):
    # Leave by the front door, so that temporary files and processes go too.
    raise SystemExit(128 + signum)


def _files_written():
    # Importing the module takes too long to be done before signals are handled.
    outputs = sys.modules.get("dipy_ppir.workflows.outputs")
    return outputs.OutputFiles.written if outputs else 0


def _said(before, exc=None):
    said = "no output was written"
    if _files_written() > before:
        said = "what was finished is written"
    return "; ".join([said, *getattr(exc, "__notes__", [])])


def run(command):
    """Run one command with the arguments of this process.

    A failure is one line on standard error, with ``--debug`` the traceback too.

    Parameters
    ----------
    command : str
        a key of `CLI_FLOWS` or `CLI_SITES`.

    Returns
    -------
    status : int
        exit status: 0, 1 for an error, 130 if interrupted.
    """
    before = _files_written()
    be_quiet(False)
    try:
        signal.signal(signal.SIGTERM, _terminate)
        take_standard_streams()
        # A log file on a full disk ends a log line, not the registration.
        logging.raiseExceptions = False
        status = _run(command)
    except KeyboardInterrupt as exc:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _say(command, f"interrupted; {_said(before, exc)}")
        return 130
    except SystemExit as exc:
        if exc.code == 128 + signal.SIGTERM:
            _say(command, f"ended from outside (SIGTERM); {_said(before, exc)}")
        if exc.code:
            raise
        status = 0
    except Exception as exc:
        if "--debug" in sys.argv:
            raise
        _say(command, one_line(exc))
        return 1
    problem = output_problem()
    if problem is not None:
        # What was computed is there; of a command that only prints, nothing is.
        written = _files_written() > before
        status = status if written else 1
        reason = problem.strerror or problem
        lost = f"standard output could not be written ({reason}), and what was printed "
        lost += "is lost; " + (
            "the files are written" if written else "print elsewhere"
        )
        _say(command, lost, "error" if status else "warning")
    return status


def _run(command):
    import argparse
    from importlib import import_module
    from importlib.metadata import version

    from dipy.workflows.flow_runner import run_flow

    from dipy_ppir.workflows.flow import Heeded
    from dipy_ppir.workflows.inputs import InputError

    warnings.showwarning = _warn
    # Of its fonts, which it looks for when it is used for the first time; that it takes
    # long it says as a warning.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    text = f"dipy_ppir {version('dipy-ppir')}, DIPY {version('dipy')}"
    if command != "dipy_ppir" and sys.argv[1:] == ["--version"]:
        print(text)
        return 0
    if command in CLI_SITES:
        module, name = CLI_SITES[command]
        return getattr(import_module(module), name)() or 0
    module, name = CLI_FLOWS[command]
    flow = getattr(import_module(module), name)()
    # DIPY's run_flow takes --log_level and then always uses INFO.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--log_level", nargs="?", default="INFO")
    early.add_argument("--log_file", nargs="?", default="")
    early.add_argument("--quiet", action="store_true")
    given, _ = early.parse_known_args()
    name = str(given.log_level).upper()
    levels = logging.getLevelNamesMapping()
    if name not in levels:
        raise InputError(f"--log_level {name} is not one of {', '.join(levels)}")
    level = levels[name]
    if given.quiet:
        be_quiet()
        # A log file is written as always: nothing of it is on the screen.
        level = level if given.log_file else max(level, logging.WARNING)
    logging.getLogger("dipy_ppir").setLevel(level)
    quiet = {"action": Heeded, "nargs": 0, "help": QUIET}
    extra = {"version": {"action": "version", "version": text}, "quiet": quiet}
    run_flow(flow, extra_args=extra)
    return 0


def one_line(exc):
    """What to tell the user of an exception, on one line."""
    if type(exc) is ImportError:  # kernels that are missing, without which the rest is
        return " ".join(str(exc).split())
    from dipy_ppir.align.checkpoint import CheckpointError
    from dipy_ppir.align.plausibility import ImplausibleError
    from dipy_ppir.mpc.errors import MPCError
    from dipy_ppir.workflows.inputs import InputError

    text = " ".join(str(exc).split())
    if isinstance(exc, MemoryError):
        return "not enough memory; close other programs, or use smaller images"
    if isinstance(exc, (InputError, MPCError, CheckpointError, ImplausibleError)):
        return text
    if isinstance(exc, OSError):
        place = f" ({exc.filename})" if exc.filename else ""
        return f"{exc.strerror or text}{place}; check the file and the folder"
    return f"{type(exc).__name__}: {text}; add --debug to see where it happened"


def _say(command, text, kind="error"):
    print(f"{command}: {kind}: {text}", file=sys.stderr)


def about():
    """Entry point of ``dipy_ppir``."""
    return run("dipy_ppir")


def align_affine():
    """Entry point of ``dipy_ppir_align_affine``."""
    return run("dipy_ppir_align_affine")


def align_syn():
    """Entry point of ``dipy_ppir_align_syn``."""
    return run("dipy_ppir_align_syn")


def align_points():
    """Entry point of ``dipy_ppir_align_points``."""
    return run("dipy_ppir_align_points")


def align_freeform():
    """Entry point of ``dipy_ppir_align_freeform``."""
    return run("dipy_ppir_align_freeform")


def apply_transform():
    """Entry point of ``dipy_ppir_apply_transform``."""
    return run("dipy_ppir_apply_transform")


def convert_transform():
    """Entry point of ``dipy_ppir_convert_transform``."""
    return run("dipy_ppir_convert_transform")


def keygen():
    """Entry point of ``dipy_ppir_keygen``."""
    return run("dipy_ppir_keygen")


def session():
    """Entry point of ``dipy_ppir_session``."""
    return run("dipy_ppir_session")


def helper():
    """Entry point of ``dipy_ppir_helper``."""
    return run("dipy_ppir_helper")


def cohort():
    """Entry point of ``dipy_ppir_cohort``."""
    return run("dipy_ppir_cohort")


def receipt():
    """Entry point of ``dipy_ppir_receipt``."""
    return run("dipy_ppir_receipt")


def template():
    """Entry point of ``dipy_ppir_template``."""
    return run("dipy_ppir_template")


def report():
    """Entry point of ``dipy_ppir_report``."""
    return run("dipy_ppir_report")


def bids():
    """Entry point of ``dipy_ppir_bids``."""
    return run("dipy_ppir_bids")


def boutiques():
    """Entry point of ``dipy_ppir_boutiques``."""
    return run("dipy_ppir_boutiques")
