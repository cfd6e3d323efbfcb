"""
Affine registration of two templates
====================================

A grey-matter template is registered to a T1-weighted one by mutual information, as two
hospitals would: the owner of each image is a process of its own, a helper without an
image is the third, and nobody sends an image to anybody.

Here both images are in one program, which starts the other two parties by itself. What
runs between them is what runs between sites; see
:ref:`sphx_glr_auto_tutorials_plot_3_sites.py` for three that are.
"""

# %%
# Two images
# ----------
# Both templates are carried by nilearn. The grey matter is brought into another place,
# on a grid of its own, so that there is something to find, and a truth to compare with.

from dipy.align.imaffine import AffineMap
import matplotlib.pyplot as plt
import nibabel as nib
from nilearn.datasets import (
    load_mni152_brain_mask,
    load_mni152_gm_template,
    load_mni152_template,
)
from nilearn.plotting import plot_anat
import numpy as np
from scipy.spatial.transform import Rotation

t1 = load_mni152_template(resolution=2)
grey_matter = load_mni152_gm_template(resolution=2)

truth = np.eye(4)  # from the static to the moving image, mm
truth[:3, :3] = Rotation.from_euler("xyz", [8, -5, 14], degrees=True).as_matrix()
truth[:3, :3] *= [1.06, 0.95, 1.03]
truth[:3, 3] = 12, -9, 7

shape = 112, 124, 104
grid2world = nib.affines.from_matvec(2 * np.eye(3), [-100, -142, -74])
displacement = AffineMap(
    np.linalg.inv(truth),
    domain_grid_shape=shape,
    domain_grid2world=grid2world,
    codomain_grid_shape=grey_matter.shape,
    codomain_grid2world=grey_matter.affine,
)
moving = displacement.transform(grey_matter.get_fdata())
static = t1.get_fdata()


def show(image, affine, title):
    """The moving image's outline on the static image."""
    display = plot_anat(t1, title=title, cut_coords=(0, -18, 12), draw_cross=False)
    outline = nib.Nifti1Image(image.astype(np.float32), affine)
    display.add_contours(outline, levels=[0.4 * image.max()], colors="tab:orange")
    plt.show()


show(moving, grid2world, "before")

# %%
# Registration
# ------------
# The arguments are those of :func:`dipy.align.affine_registration`, and so is what it
# returns. ``ret_receipt`` asks for the receipt as well.

from dipy_ppir.align import affine_registration

moved, matrix, receipt = affine_registration(
    moving,
    static,
    moving_affine=grid2world,
    static_affine=t1.affine,
    nbins=32,
    sampling_proportion=0.1,
    ret_receipt=True,
)
show(moved, t1.affine, "after")

# %%
# How good it is
# --------------
# Where the matrix takes the voxels of the brain, and where the truth does, in mm; and
# what DIPY finds that sees both images.

from dipy.align import affine_registration as clear_registration

_, clear_matrix = clear_registration(
    moving,
    static,
    moving_affine=grid2world,
    static_affine=t1.affine,
    nbins=32,
    sampling_proportion=0.1,
)

mask = load_mni152_brain_mask(resolution=2)
brain = nib.affines.apply_affine(mask.affine, np.argwhere(mask.get_fdata() > 0))


def error(found):
    """Root mean square distance from the truth over the brain, mm."""
    away = nib.affines.apply_affine(found, brain) - nib.affines.apply_affine(
        truth, brain
    )
    return np.sqrt((away**2).sum(axis=1).mean())


print(f"before         {error(np.eye(4)):6.2f} mm")
print(f"secure         {error(matrix):6.2f} mm")
print(f"DIPY, in clear {error(clear_matrix):6.2f} mm")

# %%
# What the receipt says
# ---------------------
# The receipt counts what was opened to whom. The moving owner, whose program runs the
# optimizer on secret shares, was shown the steps that lead to the result and nothing
# else; the static owner the result; the helper nothing.

from dipy_ppir.mpc.receipt import receipt_text

print(receipt_text(receipt))

# %%
# It is a dict that can be written as JSON. In bits, beside the size of the image that
# they are about:

for role, bits in receipt["bits"].items():
    print(f"{role:<14}{bits:>8,.0f} bits of {receipt['voxels'].get(role, 0):,} voxels")

# %%
# ``hide_steps=True`` opens still less. What can be made of what is opened is in
# :doc:`/security`.
