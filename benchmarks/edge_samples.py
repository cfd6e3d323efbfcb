"""What sampling = "GMS" shows the static owner of the moving image: a picture.

    python benchmarks/edge_samples.py [PICTURE.png]

A slice of the T1 template that nilearn carries, displaced, is registered to another
slice of it. The samples of every iteration are what a secure registration opens.
"""

import sys
import warnings

from dipy.align.imaffine import AffineMap, AffineRegistration
from dipy.align.transforms import AffineTransform2D
import numpy as np
from scipy import ndimage, stats

from dipy_ppir.align.ssdmetric import GaussNewton, SquaredDifferencesMetric

LEVELS = {"level_iters": [12, 6, 3], "sigmas": [3.0, 1.0, 0.0], "factors": [4, 2, 1]}


class Watched(SquaredDifferencesMetric):
    """The metric in the clear, with the samples that a secure one would open."""

    def __init__(self, **options):
        super().__init__(**options)
        self.shown = []

    def _share_edges(self, index, count):
        self.shown.append((self.static.shape, index))
        super()._share_edges(index, count)


def slices():
    """Two slices of a T1 template, one of them displaced; 1 mm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nilearn.datasets import load_mni152_template

        template = load_mni152_template(resolution=1).get_fdata()
    static, moving = template[:, :, 80], template[:, :, 84]
    turn = np.array([[0.98, -0.12, 14.0], [0.11, 1.02, -9.0], [0, 0, 1]])
    place = AffineMap(
        turn,
        domain_grid_shape=moving.shape,
        domain_grid2world=np.eye(3),
        codomain_grid_shape=moving.shape,
        codomain_grid2world=np.eye(3),
    )
    return static, place.transform(moving), place


def main(path):
    """Write the picture, and print how well the samples give the edges away."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    static, moving, _ = slices()
    metric = Watched(sampling="GMS", sampling_proportion=0.1)
    registration = AffineRegistration(
        metric=metric, method=GaussNewton(metric), verbosity=0, **LEVELS
    )
    found = registration.optimize(
        static,
        moving,
        AffineTransform2D(),
        None,
        static_grid2world=np.eye(3),
        moving_grid2world=np.eye(3),
    )
    aligned = found.transform(moving)
    rebuilt, last = np.zeros(static.shape), None
    for shape, index in metric.shown:
        seen = np.zeros(shape)
        seen.flat[index] = 1
        zoom = np.array(static.shape) / shape
        rebuilt += ndimage.zoom(seen, zoom, order=0, grid_mode=True, mode="nearest")
        last = seen if shape == static.shape else last
    smooth = ndimage.gaussian_filter(rebuilt, 1)
    edges = np.hypot(*np.gradient(ndimage.gaussian_filter(aligned, 1)))
    own = np.hypot(*np.gradient(ndimage.gaussian_filter(static, 1)))
    for name, x in (("samples", smooth), ("the static image's own edges", own)):
        print(
            f"rank correlation of {name} with the moving image's edges: "
            f"{stats.spearmanr(x.ravel(), edges.ravel())[0]:.2f}"
        )
    panels = {
        "moving image, aligned": aligned,
        "its edges": edges,
        "samples of one iteration": last,
        f"of all {len(metric.shown)}": smooth,
    }
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.8))
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        axis.imshow(panel.T[::-1], cmap="gray")
        axis.set_title(title)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "edge_samples.png")
