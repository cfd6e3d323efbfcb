"""Affine transforms in words."""

import numpy as np
from numpy.testing import assert_allclose
import pytest
from scipy.spatial.transform import Rotation

from dipy_ppir.align.decomposition import decompose


@pytest.mark.parametrize("degrees", [0.001, 12, 90, 179])
def test_turn_and_scales_of_3d_transforms(degrees):
    axis = np.array([1.0, -2.0, 0.5]) / np.linalg.norm([1.0, -2.0, 0.5])
    turn = Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.2, 0.9, 1.0])
    affine[:3, 3] = 1, 2, 3
    found = decompose(affine)
    assert_allclose(found.angle, degrees, rtol=1e-6)
    assert_allclose(found.axis, axis, atol=1e-6)
    assert_allclose(found.scales, [0.9, 1.0, 1.2])
    assert_allclose(found.shift, [1, 2, 3])
    assert not found.mirrored


def test_shift_is_that_of_the_point_asked_for():
    far = np.array([1000.0, -2000.0])
    affine = np.eye(3)
    affine[:2, :2] = [[0, -1], [1, 0]]
    affine[:2, 2] = far - affine[:2, :2] @ far + [3, 4]
    assert_allclose(decompose(affine, far).shift, [3, 4])


@pytest.mark.parametrize("dim", [2, 3])
def test_mirror_images(dim):
    affine = np.eye(dim + 1)
    affine[0, 0] = -1
    found = decompose(affine)
    assert found.mirrored
    assert_allclose(found.scales, 1)
