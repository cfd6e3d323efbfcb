"""SyN of two people's images of two modalities: who is nearer to SyN of one modality?

    python benchmarks/multimodal_syn.py MOVING STATIC MOVING_SAME STATIC_SAME

The first two files are registered, T1 of one person to T2 of another, say. The last two
are of one modality, say both T1, on the grids of the first two, and tell how good a map
is: the moving one is carried along by it, and its mean local correlation with the
static one is taken over the brain. For comparison these two are registered to each
other by clear DIPY with cross-correlation, and the other maps' RMS distance from that
map is given. All start from the affine transform that DIPY finds between the last two.
"""

import argparse
import time
import warnings

from dipy.align import affine_registration
from dipy.align.imaffine import AffineMap
from dipy.align.imwarp import SymmetricDiffeomorphicRegistration
from dipy.align.metrics import CCMetric, EMMetric
import nibabel as nib
import numpy as np
from scipy import ndimage

from dipy_ppir.align.imwarp import SecureSymmetricDiffeomorphicRegistration
from dipy_ppir.align.metrics import SecureCCMetric, SecureMINDMetric, SecureSSDMetric

#: Radius of the windows of the correlation that judges, and what is brain.
RADIUS, BRAIN = 3, 0.05

CLEAR = {"DIPY CC": CCMetric, "DIPY EM": EMMetric}
SECURE = {"CC": SecureCCMetric, "SSD": SecureSSDMetric, "MIND": SecureMINDMetric}


def load(name, factor):
    """An image averaged over blocks of `factor` voxels along each axis, its affine."""
    image = nib.load(name)
    x = image.get_fdata()
    x = x[tuple(slice(n // factor * factor) for n in x.shape)]
    blocks = [k for n in x.shape for k in (n // factor, factor)]
    x = x.reshape(blocks).mean(axis=(1, 3, 5))
    thinned = np.diag([factor] * 3 + [1.0])
    thinned[:3, 3] = (factor - 1) / 2
    return x, image.affine @ thinned


def local_correlation(x, y, mask):
    """Mean correlation within windows whose centre lies in a mask."""
    size = 2 * RADIUS + 1
    means = [ndimage.uniform_filter(z, size) for z in (x, y, x * x, y * y, x * y)]
    a, b, aa, bb, ab = means
    guards = [(1e-3 * np.ptp(z)) ** 2 for z in (x, y)]
    norms = np.sqrt((aa - a * a + guards[0]) * (bb - b * b + guards[1]))
    return float(((ab - a * b) / norms)[mask].mean())


def main():
    """Register, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs=4, metavar="FILE")
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--level_iters", type=int, nargs="+", default=[10, 10, 5])
    options = parser.parse_args()
    (moving, moving_grid), (static, static_grid), (judge, _), (truth, _) = (
        load(name, options.factor) for name in options.files
    )
    grids = {"static_grid2world": static_grid, "moving_grid2world": moving_grid}
    brain = ndimage.binary_erosion(truth > BRAIN * truth.max())
    affines = {"moving_affine": moving_grid, "static_affine": static_grid}
    _, prealign = affine_registration(judge, truth, **affines)
    begun = AffineMap(
        prealign,
        domain_grid_shape=truth.shape,
        domain_grid2world=static_grid,
        codomain_grid_shape=judge.shape,
        codomain_grid2world=moving_grid,
    ).transform(judge)

    def register(kind, metric, x, y):
        registration = kind(metric, level_iters=options.level_iters)
        registration.verbosity = 0
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapping = registration.optimize(y, x, prealign=prealign, **grids)
        return mapping, time.perf_counter() - begin, registration

    dipy = SymmetricDiffeomorphicRegistration
    best, seconds, _ = register(dipy, CCMetric(3), judge, truth)
    reference = np.asarray(best.get_forward_field())

    def line(name, mapping, seconds, gigabytes=""):
        apart = np.asarray(mapping.get_forward_field()) - reference
        rms = np.sqrt((apart**2).sum(axis=-1)[brain].mean())
        found = local_correlation(mapping.transform(judge), truth, brain)
        print(f"{name:<28}{found:>8.3f}{rms:>8.2f}{seconds:>8.1f}{gigabytes:>8}")

    print(f"{'':<28}{'corr.':>8}{'RMS, mm':>8}{'s':>8}{'GB':>8}")
    still = np.sqrt((reference**2).sum(axis=-1)[brain].mean())
    print(f"{'affine':<28}{local_correlation(begun, truth, brain):>8.3f}{still:>8.2f}")
    line("DIPY CC, one modality", best, seconds)
    for name, metric in CLEAR.items():
        mapping, seconds, _ = register(dipy, metric(3), moving, static)
        line(name, mapping, seconds)
    for name, metric in SECURE.items():
        kind = SecureSymmetricDiffeomorphicRegistration
        mapping, seconds, done = register(kind, metric(3), moving, static)
        line(name, mapping, seconds, f"{done.receipt['bytes_total'] / 1e9:.2f}")


if __name__ == "__main__":
    main()
