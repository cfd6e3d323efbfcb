"""Descriptors of self-similarity, beside a slow twin."""

from itertools import product

import numpy as np
import pytest

from dipy_ppir.align.descriptors import pairs, self_similarities


def slow(image):
    """MIND-SSC voxel by voxel, as it is written."""
    dim, shape = image.ndim, np.array(image.shape)

    def at(*vectors):
        return image[tuple(np.clip(sum(vectors), 0, shape - 1))]

    def neighbour(x, y):
        return np.clip(x + y, 0, shape - 1)

    patch = [np.array(p) for p in product((-1, 0, 1), repeat=dim)]
    distances = np.empty((len(pairs(dim)), *image.shape))
    for index in np.ndindex(image.shape):
        for k, (y, z) in enumerate(pairs(dim)):
            total = 0.0
            for p in patch:
                q = np.clip(np.array(index) + p, 0, shape - 1)
                total += (at(neighbour(q, y)) - at(neighbour(q, z))) ** 2
            distances[(k, *index)] = total / len(patch)
    distances -= distances.min(axis=0)
    variance = distances.mean(axis=0)
    mean = variance.mean()
    return np.exp(-distances / np.clip(variance, 1e-3 * mean, 1e3 * mean))


@pytest.mark.parametrize("shape", [(7, 9), (5, 6, 4)])
def test_descriptors_are_those_of_the_slow_twin(shape):
    image = np.random.default_rng(1).uniform(size=shape)
    assert np.allclose(self_similarities(image), slow(image), atol=1e-12)


def test_pairs_are_the_edges_of_a_square_and_of_an_octahedron():
    for dim, count in ((2, 4), (3, 12)):
        found = pairs(dim)
        assert len({frozenset((tuple(y), tuple(z))) for y, z in found}) == count
        for y, z in found:
            assert np.abs(y).sum() == np.abs(z).sum() == 1
            assert ((y - z) ** 2).sum() == 2


@pytest.mark.parametrize("shape", [(20, 22), (10, 11, 12)])
def test_brightness_and_contrast_do_not_count(shape):
    image = np.random.default_rng(2).uniform(size=shape)
    found = self_similarities(image)
    assert found.min() >= 0 and np.all(found.max(axis=0) == 1)
    assert np.allclose(self_similarities(3 - 70 * image), found)


def test_a_flat_image_and_a_flat_part():
    assert np.all(self_similarities(np.full((8, 9), 3.0)) == 1)
    image = np.random.default_rng(3).uniform(size=(30, 30))
    image[:15] = 0
    assert np.all(self_similarities(image)[:, :12] == 1)
