r"""Descriptors of self-similarity, which look alike in images of two modalities.

MIND-SSC (Heinrich et al., "Towards realtime multimodal fusion for image-guided
interventions using self-similarities", MICCAI 2013) of a voxel says how similar its
neighbours are to each other, and nothing of how bright they are. Of two neighbours y
and z of a voxel x, and patches P,

.. math::

    D_{yz}(x) = \sum_{p \in P} (I(x + y + p) - I(x + z + p))^2, \quad
    S_{yz}(x) = \exp(-(D_{yz}(x) - \min D(x)) / V(x)), \quad
    V(x) = \mathrm{mean} (D(x) - \min D(x))

over all pairs. The neighbours of a voxel are the two along each axis; pairs are those
at a right angle: in three dimensions the 12 edges of an octahedron, in two the 4 of a
square. Pairs of opposite neighbours say little of where an edge is, and are left out.
"""

from itertools import combinations

import numpy as np
from scipy import ndimage

#: How far neighbours are from a voxel, and the radius of patches, in voxels. With twice
#: as much the T1 and T2 of two people are registered worse.
DISTANCE, PATCH = 1, 1
#: V is at least and at most such parts of its mean: noise where an image is flat, and
#: single bright voxels, count no more than that.
LEAST_VARIANCE, MOST_VARIANCE = 1e-3, 1e3


def pairs(dim):
    """Pairs of neighbours at a right angle.

    Parameters
    ----------
    dim : {2, 3}

    Returns
    -------
    pairs : list of (array, array), shape (dim,)
        12 in three dimensions, 4 in two.
    """
    near = [sign * row for row in np.eye(dim, dtype=int) for sign in (1, -1)]
    return [(y, z) for y, z in combinations(near, 2) if y @ z == 0]


def self_similarities(image):
    """MIND-SSC of an image, whose edges are repeated.

    Parameters
    ----------
    image : array, shape (R, C) or (S, R, C)

    Returns
    -------
    descriptors : array, shape (4, R, C) or (12, S, R, C)
        from 0 to 1, the largest of each voxel 1; all of them where an image is flat.
    """
    image = np.asarray(image, dtype=np.float64)
    padded = np.pad(image, DISTANCE, mode="edge")

    def moved(y):
        begin = DISTANCE * (1 + y)
        ends = zip(begin, image.shape, strict=True)
        return padded[tuple(slice(k, k + n) for k, n in ends)]

    found = np.empty((len(pairs(image.ndim)), *image.shape))
    for (y, z), out in zip(pairs(image.ndim), found, strict=True):
        squares = (moved(y) - moved(z)) ** 2
        ndimage.uniform_filter(squares, 2 * PATCH + 1, output=out, mode="nearest")
    found -= found.min(axis=0)
    variance = found.mean(axis=0)
    mean = variance.mean()
    if not mean > 0:
        return np.ones_like(found)
    found /= np.clip(variance, LEAST_VARIANCE * mean, MOST_VARIANCE * mean)
    return np.exp(-found)
