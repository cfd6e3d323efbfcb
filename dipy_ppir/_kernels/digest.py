"""What the compiled kernels were made from: for the build, and for who imports them."""

import hashlib
from pathlib import Path


def digest(tree):
    """SHA-256 of the sources of the kernels in a source tree, names included.

    Parameters
    ----------
    tree : str or Path
        the folder that holds ``cython_kernels/``.

    Returns
    -------
    digest : str
        64 hexadecimal digits.
    """
    total = hashlib.sha256()
    for file in sorted(Path(tree, "cython_kernels").iterdir()):
        if file.suffix in (".h", ".pxi", ".pyx"):
            total.update(f"cython_kernels/{file.name}\0".encode() + file.read_bytes())
    return total.hexdigest()
