r"""Local cross-correlation computed literally, with MPyC's secure arrays.

A slow and independent twin of `crosscorr.LocalCrossCorrelation` with ``"force"``, for
images of a few thousand voxels: what a reviewer may read first, and what tests compare
the fast one with. Both owners share their numbers as integers modulo 2**127 - 1, and

.. math:: N D = N \Sigma s m - \Sigma s\, \Sigma m, \quad \rho = N D\, e f, \quad
    t_s = \rho (b - \rho a), \quad t_m = \rho (a - \rho b)

are MPyC's sums and products, with no use of who knows what; window sums are products
with public matrices of ones. Only :math:`\rho` is rounded, by `protocols.truncate`.

Rounds: 1 for the inputs, then MPyC's, 2 for each rounding and 1 for what is opened.
Bytes: those of MPyC's arrays, 16 for each number shared and 96 for each product.

What each party sees is what it sees of `protocols.share` and of MPyC's products: points
of random lines; at the end the force on its own image.
"""

import numpy as np

from dipy_ppir.mpc import mpyc_bridge
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.crosscorr import (
    ENERGY_BITS,
    MOST_FORCE,
    OPEN_BITS,
    OWNERS,
    UNIT_BITS,
    LocalCrossCorrelation,
)
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import P127
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.protocols import dither, share, truncate

#: No more voxels: MPyC's arrays hold Python's integers.
MOST_VOXELS = 20_000
#: rho times a power of two stays below 2**RHO_BITS before it is rounded.
RHO_BITS = 84


class LiteralCrossCorrelation(LocalCrossCorrelation):
    """As `LocalCrossCorrelation` with ``reveal="force"``; its arguments and results.

    Raises
    ------
    FixedPointOverflowError
        if there are more voxels than `MOST_VOXELS`.
    """

    def __init__(self, session, shape, radius, **options):
        voxels = int(np.prod(shape))
        if voxels > MOST_VOXELS:
            raise FixedPointOverflowError(
                f"{voxels:,} voxels would take MPyC hours: at most {MOST_VOXELS:,}; "
                'leave backend="mpyc" out'
            )
        super().__init__(session, shape, radius, **options)

    @property
    def inverse_bits(self):
        """Fraction bits of the inverse norms; those of images are the fast one's."""
        return RHO_BITS // 2 - self._window_bits - self.image_bits

    def step(self, half=None, offset=None):
        """One iteration's forces; see `LocalCrossCorrelation.step`."""
        s, centers = self.session, self.centers(offset or (0,) * self.dim)
        counts = [
            len(range(*c.indices(n))) for c, n in zip(centers, self.shape, strict=True)
        ]
        n = int(np.prod(counts))
        s.ledger.about(int(np.prod([k - 2 * self.radius for k in self.shape])))
        with s.phase("cross correlation"):
            images, inverses, residuals = (
                [self._share(owner, half, what, shape) for owner in (STATIC, MOVING)]
                for what, shape in (
                    ("image", self.shape),
                    ("inverse", (n,)),
                    ("residual", (n,)),
                )
            )
            rho = self._correlation(images, inverses, centers, n)
            bits = 3 * UNIT_BITS
            bound = int(2 * MOST_FORCE * (1 << bits))

            def forces(mpc, rho, a, b):
                one = 1 << UNIT_BITS
                square = mpc.np_multiply(rho, rho)
                static = mpc.np_multiply(rho, b) * one - mpc.np_multiply(square, a)
                moving = mpc.np_multiply(rho, a) * one - mpc.np_multiply(square, b)
                energy = mpc.np_sum(mpc.np_reshape(square, (1, n)), axis=1)
                return energy, static, moving

            bounds = n << 2 * UNIT_BITS, bound, bound
            found = mpyc_bridge.evaluate(s, forces, (rho, *residuals), bounds)
            energy = found[0]
            energy = SharedArray(P127, energy.share, 2, 2 * UNIT_BITS, energy.bound)
            energy = dither(s, energy, n << 2 * UNIT_BITS - ENERGY_BITS, by=HELPER)
            openings = [(energy, "correlation", (MOVING, STATIC))]
            for owner, force in zip((STATIC, MOVING), found[1:], strict=True):
                force.frac_bits = bits
                force = truncate(s, force, bits - OPEN_BITS["force"], name="force")
                openings.append((force, f"force_{OWNERS[owner]}", (owner,)))
            return self._opened(openings)

    def _share(self, owner, half, what, shape):
        """Numbers of an owner, as integers of a field."""
        scale, bound, values = 0, float(1 << self.image_bits), None
        if what == "inverse":
            scale, bound = self.inverse_bits, 2.0**12
        elif what == "residual":
            scale, bound = UNIT_BITS, 1.0
        if self.session.pid == owner:
            values = np.asarray(getattr(half, what), dtype=np.float64)
            if what == "inverse":
                values = values * self._inverse_scale
        array = share(
            self.session,
            owner,
            values,
            shape,
            frac_bits=scale,
            bound=bound,
            field=P127,
            name=what,
        )
        return SharedArray(P127, array.share, 1, 0, array.bound)

    def _correlation(self, images, inverses, centers, n):
        """rho with `UNIT_BITS` fraction bits, of degree 1."""
        boxes = []
        for size, center in zip(self.shape, centers, strict=True):
            i = np.arange(size)
            boxes.append((np.abs(i[:, None] - i) <= self.radius).astype(int)[center])

        def correlation(mpc, s, m, e, f):
            def window(x):
                for axis, box in enumerate(boxes):
                    x = mpc.np_swapaxes(x, axis, -1)
                    x = mpc.np_matmul(x, box.T)
                    x = mpc.np_swapaxes(x, axis, -1)
                return mpc.np_reshape(x, (n,))

            covariance = window(mpc.np_multiply(s, m)) * self.window
            covariance = covariance - mpc.np_multiply(window(s), window(m))
            return (mpc.np_multiply(covariance, mpc.np_multiply(e, f)),)

        bound = (1 << RHO_BITS) + (1 << RHO_BITS - 6)
        (product,) = mpyc_bridge.evaluate(
            self.session, correlation, (*images, *inverses), (bound,)
        )
        product.frac_bits = RHO_BITS
        return truncate(self.session, product, RHO_BITS - UNIT_BITS, name="rho")
