"""Commands as processes of their own, which do something odd where a test wants it."""

from contextlib import contextmanager, suppress
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

#: Longest that anything here takes, seconds: only what hangs takes longer.
PATIENCE = 300

#: Makes a command halt at its second `{method}`, having said so.
HALT = """
import time
from dipy_ppir.align.{module} import {name}

inner, calls = {name}.{method}, []

def halting(*args, **options):
    calls.append(0)
    if len(calls) == 2:
        print("halted", flush=True)
        while True:
            time.sleep(0.01)
    return inner(*args, **options)

{name}.{method} = halting
"""

#: Kills a party as it starts, or as soon as all have met.
KILL = {
    "as it starts": """
from dipy_ppir.mpc import local

inner = local.LocalParties._start

def killing(self, pid, *args):
    inner(self, pid, *args)
    if pid == {victim}:
        self._children[pid].kill()

local.LocalParties._start = killing
""",
    "when all have met": """
from dipy_ppir.mpc import local

inner = local.LocalParties.__init__

def killing(self, *args, **options):
    inner(self, *args, **options)
    self._children[{victim}].kill()
    self._children[{victim}].wait()

local.LocalParties.__init__ = killing
""",
}


def script(name):
    """Path of an installed command."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or name


def changed(name, change):
    """What to run for a command in whose process `change` is executed first."""
    code = (
        "import signal, sys\n"
        # Background jobs of a shell ignore it, and so would this.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{change}\n"
        "from dipy_ppir.workflows import cli\n"
        f"sys.argv[0] = {name!r}\n"
        f"sys.exit(cli.run({name!r}))\n"
    )
    return [sys.executable, "-c", code]


@contextmanager
def started(argv, cwd):
    """A process in a group of its own, which does not outlive the context."""
    with subprocess.Popen(
        argv,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def finish(process):
    """What a process still prints; all of its group must end with it."""
    out, err = process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while _exists(process.pid):
        assert time.monotonic() < deadline, "a process outlived its command"
        time.sleep(0.01)
    return process.returncode, out, err


def _exists(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def interrupted(argv, cwd, sent):
    """Send a signal to a command that halts; its status and what it printed then.

    SIGINT goes to all of the group, as a terminal sends it.
    """
    with started(argv, cwd) as process:
        for line in process.stdout:
            if line == "halted\n":
                break
        else:
            raise AssertionError(process.stderr.read())
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        return finish(process)
