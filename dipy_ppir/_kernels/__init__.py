"""Compiled kernels, private to the package.

The sources are in ``cython_kernels/``. Python callers validate, the kernels
trust: each is reached through the modules named here, and from nowhere else.

::

    align.parzenhist ──> _kernels.parzen      Parzen weights, bin indices
    align.mimetric   ──> _kernels.sampling    interpolation of an owner's image
    mpc.fields       ──> _kernels.field61     GF(2^61 - 1), 8 bytes an element
                     ──> _kernels.field127    GF(2^127 - 1), 16 bytes
                     ──> _kernels.ring32      integers modulo 2^32, sums of products
                     ──> _kernels.ring64      the same modulo 2^64
                     ──> _kernels.ring128     integers modulo 2^128, filters
    mpc.carried      ──> _kernels.carry       products of coarse and fine arrays
    align.metrics    ──> _kernels.windows     window statistics of an owner's image
    mpc.lattice      ──> _kernels.lattice     polynomials of encrypted numbers
"""

from importlib import import_module
from pathlib import Path


def _check():
    """Refuse kernels that are missing, or that a source tree has since changed."""
    tree = Path(__file__).parents[2]
    in_tree = (tree / "setup.py").exists() and (tree / "cython_kernels").is_dir()
    remedy = "run `pip install --force-reinstall --no-deps dipy-ppir`"
    if in_tree:
        remedy = f"run `make build` or `pip install -e .` in {tree}"
    try:
        built_from = import_module("dipy_ppir._kernels.sources").DIGEST
        import_module("dipy_ppir._kernels.field61")
    except ImportError as exc:
        raise ImportError(
            f"the compiled kernels of dipy_ppir are missing, or are for another Python "
            f"({exc}); {remedy}"
        ) from exc
    if in_tree:
        from dipy_ppir._kernels.digest import digest

        if digest(tree) != built_from:
            raise ImportError(
                "the compiled kernels of dipy_ppir were built from other sources than "
                f"those in cython_kernels/; {remedy}"
            )


_check()
