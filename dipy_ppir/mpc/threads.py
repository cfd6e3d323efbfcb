"""How many threads a kernel may use."""

import os


def threads():
    """Threads of a kernel: what OMP_NUM_THREADS says, or all processors."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else os.cpu_count() or 1
