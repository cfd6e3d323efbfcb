"""Compiled kernels, private to the package.

The sources are in ``cython_kernels/``. Python callers validate, the kernels
trust: they are reached through `dipy_ppir.mpc.fields` (`field61`, `field127`)
and `dipy_ppir.align.parzenhist` (`parzen`), and from nowhere else.

::

    align.parzenhist ──> _kernels.parzen      Parzen weights, bin indices
    mpc.fields       ──> _kernels.field61     GF(2^61 - 1), 8 bytes an element
                     ──> _kernels.field127    GF(2^127 - 1), 16 bytes
"""
