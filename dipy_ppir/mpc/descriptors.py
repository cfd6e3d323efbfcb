"""File descriptors 0, 1 and 2, which every program expects to be its standard streams.

A program may be started without one of them. The next file or socket that it opens gets
the number, and what a library prints ends up in there.
"""

import os


def fill_standard_descriptors():
    """Open the null device wherever a standard stream is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The system gives the lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
