"""A command that ends with the program that started it.

``python -m dipy_ppir.workflows.watched COMMAND ARGUMENTS...``, with a pipe as standard
input to which nothing is ever written. Its end, whatever became of the program that
held it, ends the command as SIGTERM does.
"""

import os
import signal
import sys
import threading
import time

from dipy_ppir.workflows import cli

#: Seconds that a command may take to end.
GRACE = 20.0


def main():
    """Run the command; returns its exit status."""
    sys.argv[:] = sys.argv[1:]
    threading.Thread(target=_watch, daemon=True).start()
    return cli.run(sys.argv[0])


def _watch():
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
