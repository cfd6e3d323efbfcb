"""
Diffeomorphic registration of two modalities
============================================

Where bright in one image is dark in the other, and a third thing elsewhere, intensities
cannot be compared. ``metric="MIND"`` compares descriptors of self-similarity instead:
how much the surroundings of a voxel look like each other, which both images say alike.
Each owner computes those of its own image; everything else is as with
cross-correlation.
"""

# %%
# Two images that look different
# ------------------------------
# The T1-weighted template, and a map of grey matter that was deformed by at most 8 mm
# along each axis.

import matplotlib.pyplot as plt
from nilearn.datasets import (
    load_mni152_brain_mask,
    load_mni152_gm_template,
    load_mni152_template,
)
import numpy as np
from scipy import ndimage

template = load_mni152_template(resolution=2)
static = template.get_fdata()
grey_matter = load_mni152_gm_template(resolution=2).get_fdata()
brain = load_mni152_brain_mask(resolution=2).get_fdata() > 0

rng = np.random.default_rng(7)
noise = rng.standard_normal((3, *static.shape))
truth = np.stack([ndimage.gaussian_filter(one, 8) for one in noise])
truth *= 4 / np.abs(truth).max()  # voxels
where = np.indices(static.shape) + truth
moving = ndimage.map_coordinates(grey_matter, where, order=1)

# %%
# Registration
# ------------
# By descriptors, and for comparison by local cross-correlation, which is the default
# and meant for images of one modality.

from dipy_ppir.align import syn_registration

grids = {"moving_affine": template.affine, "static_affine": template.affine}
levels = {"level_iters": [10, 10, 5]}
by_correlation, _ = syn_registration(moving, static, metric="CC", **levels, **grids)
by_descriptors, mapping = syn_registration(
    moving, static, metric="MIND", **levels, **grids
)

# %%
# How good it is
# --------------
# Here the grey matter before it was deformed is known: the correlation with it over the
# brain, which nobody could compute who has one image only.

results = {
    "before": moving,
    "cross-correlation": by_correlation,
    "descriptors": by_descriptors,
}
figure, axes = plt.subplots(1, 3, figsize=(11, 4.8), layout="constrained")
for ax, (name, image) in zip(axes, results.items(), strict=True):
    r = np.corrcoef(image[brain], grey_matter[brain])[0, 1]
    print(f"{name:<20}{r:.3f}")
    ax.imshow(static[:, :, 42].T, origin="lower", cmap="gray")
    ax.contour(image[:, :, 42].T, levels=[0.4], colors="tab:orange", linewidths=1)
    ax.set_title(f"{name}: {r:.3f}")
    ax.axis("off")
plt.show()

# %%
# Cross-correlation squares its correlations, so that it takes dark for bright, but grey
# matter lies between two tissues: it pulls the map apart. Descriptors do not. Between
# T1 and T2 of patients it is the same; see :doc:`/measurements`.
