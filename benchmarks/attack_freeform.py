"""Rebuild the static image from what a free-form registration opens.

An attack on ``freeform_registration`` by the moving owner, which follows the protocol
and afterwards makes the most of what it saw. Every step that it is shown is a linear
function of the static image with coefficients that it knows, up to rounding: so it
solves a least squares problem, started from its own image warped by the finished map,
with penalties on what differs from that. Where it is given more than an attacker has,
that is in its favour: the best of all penalties and iterations is reported, as if
somebody had told it when to stop.

To run it::

    python attack_freeform.py static.png moving.png --precisions 0.125 0.25 0.5

Images are PNG or .npy, of one shape, in 2D or 3D. It prints, for each precision, the
*detail* of the rebuilt image: its local correlation with the true one after everything
is taken out of both that the attacker's own image explains within a window. 0 is the
attacker's own image, 1 the truth. Beside it stand the detail of the attacker's own
image lightly smoothed, which takes no attack; how many numbers were opened, and bits;
and the mean squared difference at which the registration ended.
"""

import argparse
import time

import numpy as np
from scipy import ndimage
from scipy.sparse.linalg import LinearOperator, cg

from dipy_ppir.align import freeform
from dipy_ppir.mpc.freeform import ClearSteps, places, scattered

#: Windows of the measure have this radius.
RADIUS = 4
#: Weights of the penalties on differences from the own image, and on their slopes.
PENALTIES = [(a, b) for a in (0.01, 0.3) for b in (0.01, 0.1, 1.0, 10.0, 100.0)]


class Recorded(ClearSteps):
    """Steps as they are opened, with noise as wide as the precision; kept."""

    def __init__(self):
        self.seen, self._rng = [], np.random.default_rng(3)

    def steps(self, bits, own, samples=None):
        """See `SharedSteps.steps`."""
        x = scattered(own.x, samples, self.lattice)
        image = scattered(own.image, samples, self.lattice)
        mine = self.lattice.integer_sums(x * image)
        sums = self.lattice.integer_sums(x * self.static)
        steps = own.weights * (mine - sums) * 2.0 ** -places(bits)
        steps += self._rng.uniform(-0.5, 0.5, steps.shape)
        some = own.weights > 0
        width = np.where(some, 2.0 ** places(bits) / np.maximum(own.weights, 1), np.inf)
        known = np.where(some, mine - steps * width, 0.0)
        self.seen.append((self.lattice, x, known, np.sqrt(12) / width, bits))
        return steps


class Recording(freeform.ClearFreeFormRegistration):
    """A registration that keeps what the moving owner sees."""

    def register(self, static, moving):
        """Register; returns what was seen and the warped image."""
        freeform.ClearSteps, self.world = self._world, None
        try:
            mapping = self.optimize(static, moving)
        finally:
            freeform.ClearSteps = ClearSteps
        return self.world.seen, mapping.transform(self._moving)

    def _world(self):
        self.world = Recorded()
        return self.world


def cov(x, y):
    """Local covariance."""
    x, y, xy = (ndimage.uniform_filter(v, 2 * RADIUS + 1) for v in (x, y, x * y))
    return xy - x * y


class Detail:
    """How much of the true image is rebuilt that the attacker's own does not show."""

    def __init__(self, truth, own):
        self.truth, self.own = truth, own
        self.object = ndimage.binary_opening(truth > 0.1 * np.quantile(truth, 0.99))
        self.object &= np.sqrt(np.maximum(cov(truth, truth), 0)) > 0.02

    def __call__(self, image):
        """Mean over the object."""
        own = cov(self.own, self.own) + 1e-9

        def partly(x, y):
            return cov(x, y) - cov(x, self.own) * cov(y, self.own) / own

        xx, yy = partly(image, image), partly(self.truth, self.truth)
        bad = (xx < 1e-9) | (yy < 1e-9)
        roots = np.sqrt(np.where(bad, 1, xx * yy))
        each = np.where(bad, 0, partly(image, self.truth) / roots)
        return float(each[self.object].mean())


class Views:
    """What was seen, as linear maps of the static image."""

    def __init__(self, registration, seen, shape):
        self.seen, self.shape = seen, shape
        self.maps = {}
        for level in range(len(registration.parameters.factors)):
            sigma = registration.parameters.sigmas[-1 - level]
            steps = registration._space.get_scaling(level).astype(int)
            each = []
            for n, k, m in zip(
                shape, steps, registration.level_shape(level), strict=True
            ):
                smooth = np.eye(n)
                if sigma:
                    smooth = ndimage.gaussian_filter1d(smooth, sigma, axis=0)
                each.append(smooth[::k][:m])
            self.maps[registration.level_shape(level)] = each

    def _along(self, x, matrices):
        for axis, matrix in enumerate(matrices):
            x = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)
        return x

    def squares(self, image):
        """Normal equations: the image through the maps and back."""
        total = np.zeros(self.shape)
        for lattice, x, _, precise, _ in self.seen:
            maps = self.maps[lattice.shape]
            level = self._along(image, maps) * 1024.0
            sums = lattice.sums(x * level) / lattice.unit * precise**2
            back = np.einsum("i...,i...->...", x, lattice.values(sums)) / lattice.unit
            total += self._along(back * 1024.0, [m.T for m in maps])
        return total

    def right(self, start):
        """The right side, for what is missing from an image."""
        total = np.zeros(self.shape)
        for lattice, x, known, precise, _ in self.seen:
            maps = self.maps[lattice.shape]
            level = self._along(start, maps) * 1024.0
            rest = known - lattice.sums(x * level) / lattice.unit
            back = lattice.values(rest * precise**2) / lattice.unit
            back = np.einsum("i...,i...->...", x, back)
            total += self._along(back * 1024.0, [m.T for m in maps])
        return total


def slopes(x):
    """Minus the Laplacian."""
    total = np.zeros(x.shape)
    for axis in range(x.ndim):
        d = np.diff(x, axis=axis)
        ends = [(0, 0)] * x.ndim
        ends[axis] = (1, 1)
        total -= np.diff(np.pad(d, ends), axis=axis)
    return total


def rebuild(views, start, detail, iterations):
    """Best detail over penalties and iterations."""
    best, right, size = 0.0, views.right(start).reshape(-1), start.size
    # Deviations of 0.1 from the own image are usual.
    for own, smooth in PENALTIES:

        def times(flat, own=own, smooth=smooth):
            z = flat.reshape(views.shape)
            penalty = own * z + smooth * slopes(z)
            return (views.squares(z) + 100 * penalty).reshape(-1)

        count = 0

        def watch(flat):
            nonlocal best, count
            count += 1
            if count in (2, 4, 8, 16, 32, 64, 128, 256, 512):
                image = np.clip(start + flat.reshape(views.shape), 0, 1)
                best = max(best, detail(image))

        cg(
            LinearOperator((size, size), times, dtype=np.float64),
            right,
            rtol=1e-6,
            maxiter=iterations,
            callback=watch,
        )
    return best


def smoothed(image, detail):
    """Best detail of an image lightly smoothed, 0 if it is best as it is."""
    widths = 0.5, 0.75, 1.0, 1.25, 1.5
    return max(0.0, *(detail(ndimage.gaussian_filter(image, s)) for s in widths))


def load(name):
    """An image."""
    if name.endswith(".npy"):
        return np.load(name).astype(np.float64)
    from PIL import Image

    return np.asarray(Image.open(name).convert("F"), dtype=np.float64)


def main():
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("static")
    parser.add_argument("moving")
    parser.add_argument("--precisions", nargs="+", type=float, default=[0.25])
    parser.add_argument("--spacing", type=int, default=5)
    parser.add_argument("--factors", nargs="+", type=int, default=[8, 4, 2, 1])
    parser.add_argument("--level_iters", nargs="+", type=int, default=[10, 10, 10, 10])
    parser.add_argument("--sampling_proportion", type=float, default=1.0)
    parser.add_argument("--iterations", type=int, default=256)
    args = parser.parse_args()
    static, moving = load(args.static), load(args.moving)
    for precision in args.precisions:
        start = time.perf_counter()
        registration = Recording(
            dim=static.ndim,
            spacing=args.spacing,
            precision=precision,
            factors=args.factors,
            level_iters=args.level_iters,
            sampling_proportion=args.sampling_proportion,
        )
        seen, own = registration.register(static, moving)
        truth = registration._static
        detail = Detail(truth, own)
        views = Views(registration, seen, truth.shape)
        best = rebuild(views, own, detail, args.iterations)
        bits = sum(known.size * b for _, _, known, _, b in seen)
        print(
            f"precision {precision:g}: detail {best:.2f}, own image smoothed "
            f"{smoothed(own, detail):.2f}; {registration.iterations} iterations, "
            f"{sum(known.size for _, _, known, _, _ in seen):,} numbers, {bits:,} bits "
            f"of {truth.size:,} voxels; mean square {np.mean((own - truth) ** 2):.5f}; "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
