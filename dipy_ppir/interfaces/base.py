"""What the interfaces do alike, and what keeps nipype from calling home."""

from contextlib import contextmanager
import os

#: Nipype asks a server which version is the newest, unless this is in the environment.
_VARIABLE = "NIPYPE_NO_ET"


@contextmanager
def nipype_that_calls_nobody():
    """Keep nipype from asking for its newest version, and leave no trace of that.

    It would ask as it is imported, in a notebook, and as an interface is made.
    """
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before
