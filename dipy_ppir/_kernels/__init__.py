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
"""
