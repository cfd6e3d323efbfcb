"""The commands of the package; DIPY's own table of commands is closed."""

import contextlib
import logging
import os
import select
import signal
import sys
import warnings

#: Commands to their workflows.
CLI_FLOWS = {
    "dipy_ppir_align_affine": (
        "dipy_ppir.workflows.align",
        "SecureImageRegistrationFlow",
    ),
    "dipy_ppir_align_syn": ("dipy_ppir.workflows.syn", "SecureSynRegistrationFlow"),
    "dipy_ppir_apply_transform": (
        "dipy_ppir.workflows.transform",
        "ApplyTransformFlow",
    ),
}

#: Commands that are no workflows on images, to functions of `workflows.sites`.
CLI_SITES = {
    "dipy_ppir_keygen": "keygen",
    "dipy_ppir_session": "session",
    "dipy_ppir_helper": "helper",
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


def _said(before):
    if _files_written() > before:
        return "what was finished is written"
    return "no output was written"


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
    try:
        signal.signal(signal.SIGTERM, _terminate)
        # A reader that goes away ends a log line, not the registration.
        logging.raiseExceptions = False
        status = _run(command)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _say(command, f"interrupted; {_said(before)}")
        return 130
    except SystemExit as exc:
        if exc.code == 128 + signal.SIGTERM:
            _say(command, f"ended from outside (SIGTERM); {_said(before)}")
        raise
    except Exception as exc:
        if isinstance(exc, BrokenPipeError) and _readers_left():
            # The results are written before anything long is printed.
            return 0
        if "--debug" in sys.argv:
            raise
        _say(command, _one_line(exc))
        return 1


def _run(command):
    import argparse
    from importlib import import_module
    from importlib.metadata import version

    from dipy.workflows.flow_runner import run_flow

    from dipy_ppir.workflows.inputs import InputError

    warnings.showwarning = _warn
    if command in CLI_SITES:
        getattr(import_module("dipy_ppir.workflows.sites"), CLI_SITES[command])()
        return 0
    module, name = CLI_FLOWS[command]
    flow = getattr(import_module(module), name)()
    # DIPY's run_flow takes --log_level and then always uses INFO.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--log_level", nargs="?", default="INFO")
    name = str(early.parse_known_args()[0].log_level).upper()
    levels = logging.getLevelNamesMapping()
    if name not in levels:
        raise InputError(f"--log_level {name} is not one of {', '.join(levels)}")
    logging.getLogger("dipy_ppir").setLevel(levels[name])
    text = f"dipy_ppir {version('dipy-ppir')}, DIPY {version('dipy')}"
    run_flow(flow, extra_args={"version": {"action": "version", "version": text}})
    return 0


def _readers_left():
    """Whether nobody is left to read what is printed; then it goes nowhere from now.

    Otherwise Python would stumble over what is left when it ends.
    """
    poller, left = select.poll(), False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            poller.register(stream.fileno(), 0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number, event in poller.poll(0):
        if event & select.POLLERR:
            os.dup2(nowhere, number)
            left = True
    os.close(nowhere)
    return left


def _one_line(exc):
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


def _say(command, text):
    print(f"{command}: error: {text}", file=sys.stderr)


def align_affine():
    """Entry point of ``dipy_ppir_align_affine``."""
    return run("dipy_ppir_align_affine")


def align_syn():
    """Entry point of ``dipy_ppir_align_syn``."""
    return run("dipy_ppir_align_syn")


def apply_transform():
    """Entry point of ``dipy_ppir_apply_transform``."""
    return run("dipy_ppir_apply_transform")


def keygen():
    """Entry point of ``dipy_ppir_keygen``."""
    return run("dipy_ppir_keygen")


def session():
    """Entry point of ``dipy_ppir_session``."""
    return run("dipy_ppir_session")


def helper():
    """Entry point of ``dipy_ppir_helper``."""
    return run("dipy_ppir_helper")
