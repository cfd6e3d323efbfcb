"""Standard streams of a command: whatever becomes of them, the command goes on.

They may be closed, on a full disk, or the pipe to a reader that went away, and their
encoding may lack the letters of a name.
"""

import errno
import io
import select
import sys

from dipy_ppir.mpc.descriptors import fill_standard_descriptors

#: What the flag ``--quiet`` does, at all commands.
QUIET = "Print nothing but warnings and errors; files are written as always."

_quiet = False


def be_quiet(quiet=True):
    """Print nothing from here on but warnings and errors: see `say`."""
    global _quiet
    _quiet = bool(quiet)


def is_quiet():
    """Whether nothing is to be printed but warnings and errors."""
    return _quiet


def say(text, end="\n"):
    """Print what a command has to say, unless it is to be quiet."""
    if not _quiet:
        print(text, end=end)


class _Output(io.FileIO):
    """A descriptor that takes everything: what cannot be written is left out.

    Attributes
    ----------
    problem : OSError or None
        why something was left out.
    """

    problem = None

    def write(self, data):
        """Write, or do as if; returns how many bytes."""
        try:
            while (written := super().write(data)) is None:
                # Somebody else made the terminal non-blocking.
                poller = select.poll()
                poller.register(self.fileno(), select.POLLOUT)
                poller.poll()
            return written
        except OSError as exc:
            # A reader that goes away has seen enough.
            if exc.errno != errno.EPIPE:
                self.problem = self.problem or exc
            return len(data)


def _output(stream, number):
    raw = _Output(number, "w", closefd=False)
    unbuffered = getattr(stream, "write_through", False)
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None),
        errors="backslashreplace",
        line_buffering=number == 2 or getattr(stream, "line_buffering", False),
        write_through=unbuffered,
    )


def take_standard_streams():
    """Make standard output and error such that writing never fails.

    Streams that a caller has put in their place are left alone.
    """
    fill_standard_descriptors()
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _output(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _output(sys.stderr, 2)


def output_problem():
    """Why some of what was printed is lost; None if nothing is."""
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return getattr(raw, "problem", None)
