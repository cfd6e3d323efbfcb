r"""Descriptors of self-similarity, which look alike in images of different modalities.

MIND-SSC of :footcite:t:`Heinrich2013`: how similar the neighbours of a voxel are to
each other, not what they are. Of two neighbours y and z of a voxel x, with patches P,

.. math::

    D_{yz}(x) = \sum_{p \in P} (I(x + y + p) - I(x + z + p))^2, \quad
    S_{yz}(x) = \exp(-(D_{yz}(x) - \min D(x)) / V(x)), \quad
    V(x) = \mathrm{mean} (D(x) - \min D(x)).

The neighbours lie at a distance along the axes, two in each direction; the pairs are
those that lie at a right angle seen from x: 12 in three dimensions, the edges of an
octahedron, and 4 in two, the edges of a square.

References
----------
.. footbibliography::
"""

from itertools import combinations

import numpy as np
from scipy import ndimage

#: How far neighbours are from a voxel, and the radius of patches, in voxels.
DISTANCE, PATCH = 1, 1
#: V is no less than this part of its mean: what is flat looks like nothing.
LEAST_VARIANCE, MOST_VARIANCE = 1e-3, 1e3


def pairs(dim):
    """Pairs of neighbours at a right angle, as vectors.

    Parameters
    ----------
    dim : {2, 3}

    Returns
    -------
    pairs : list of (array, array)
        12 in three dimensions, 4 in two.
    """
    near = [sign * row for row in np.eye(dim, dtype=int) for sign in (1, -1)]
    return [(y, z) for y, z in combinations(near, 2) if y @ z == 0]


def self_similarities(image):
    """MIND-SSC of an image.

    Parameters
    ----------
    image : array, shape (R, C) or (S, R, C)

    Returns
    -------
    descriptors : array, shape (4, R, C) or (12, S, R, C)
        above 0 and at most 1; 1 everywhere in a flat image.
    """
    image = np.asarray(image, dtype=np.float64)
    reach, found = DISTANCE, []
    padded = np.pad(image, reach, mode="edge")

    def moved(y):
        at = [slice(reach + k * reach, reach + k * reach + n)
              for k, n in zip(y, image.shape, strict=True)]
        return padded[tuple(at)]

    for y, z in pairs(image.ndim):
        squares = (moved(y) - moved(z)) ** 2
        found.append(ndimage.uniform_filter(squares, 2 * PATCH + 1, mode="nearest"))
    found = np.stack(found)
    found -= found.min(axis=0)
    variance = found.mean(axis=0)
    mean = variance.mean()
    if not mean > 0:
        return np.ones_like(found)
    found /= np.clip(variance, LEAST_VARIANCE * mean, MOST_VARIANCE * mean)
    return np.exp(-found)
