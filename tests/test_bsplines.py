"""Cubic B-splines on a grid, against SciPy's and their own adjoint."""

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest
from scipy.interpolate import BSpline

from dipy_ppir.align.bending import BendingEnergy
from dipy_ppir.mpc.bsplines import Lattice, segments

GRIDS = [((23,), (5,)), ((17, 20), (4, 7)), ((9, 11, 8), (3, 5, 2))]


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def dense(lattice):
    """What `values` does, as a matrix."""
    eye = np.eye(lattice.size).reshape(-1, *lattice.control_shape)
    return lattice.values(eye).reshape(lattice.size, -1).T


@pytest.mark.parametrize("spacing", [2, 5, 32])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_segments_are_those_of_scipy(spacing, order):
    basis = BSpline.basis_element(np.arange(5)).derivative(order) if order else None
    basis = basis or BSpline.basis_element(np.arange(5))
    t = np.arange(spacing) / spacing
    wanted = [basis(3 - j + t) / float(spacing) ** order for j in range(4)]
    assert_allclose(segments(spacing, order), np.stack(wanted, 1), atol=1e-12)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_sums_are_the_adjoint(rng, shape, spacing):
    lattice = Lattice(shape, spacing)
    matrix = dense(lattice)
    x = rng.standard_normal((2, *shape))
    flat = x.reshape(2, -1)
    for power in (1, 2):
        wanted = flat @ matrix**power
        assert_allclose(lattice.sums(x, power=power).reshape(2, -1), wanted, atol=1e-12)
    integers = rng.integers(-(1 << 20), 1 << 20, shape)
    sums = lattice.integer_sums(integers)
    assert_allclose(sums * lattice.unit, lattice.sums(1.0 * integers), atol=1e-3)
    words = lattice.integer_sums(integers.view(np.uint64))
    assert_array_equal(words.view(np.int64), sums)
    assert lattice.integer_sums(np.ones(shape, dtype=np.int64)).max() <= (
        lattice.most_weight
    )


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_a_spline_of_ones_is_one(shape, spacing):
    lattice = Lattice(shape, spacing)
    assert_allclose(lattice.values(np.ones(lattice.control_shape)), 1, atol=1e-12)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_the_map_to_any_position(rng, shape, spacing):
    lattice = Lattice(shape, spacing)
    for axis, n in enumerate(shape):
        matrix = lattice.matrix(axis)
        assert_allclose(lattice.at(axis, np.arange(n)), matrix, atol=1e-12)
        assert_allclose(lattice.at(axis, [n + 3.0])[0], matrix[-1], atol=1e-12)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_bending_energy(rng, shape, spacing):
    """By derivatives written out; of straight lines there is none."""
    lattice, dim = Lattice(shape, spacing), len(shape)
    energy = BendingEnergy(lattice)
    controls = rng.standard_normal(lattice.control_shape)
    total = 0.0
    for a in range(dim):
        for b in range(dim):
            x = controls
            for axis in range(dim):
                order = (axis == a) + (axis == b)
                matrix = lattice.matrix(axis, order)
                x = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)
            total += (x**2).sum()
    gradient = energy.gradient(controls)
    assert np.vdot(controls, gradient) == pytest.approx(total, rel=1e-9)
    lines = sum(np.meshgrid(*map(np.arange, lattice.control_shape), indexing="ij"))
    assert_allclose(energy.gradient(lines.astype(float)), 0, atol=1e-9)
    eye = np.eye(lattice.size).reshape(-1, *lattice.control_shape)
    diagonal = np.diagonal(energy.gradient(eye).reshape(lattice.size, -1))
    assert_allclose(energy.diagonal.reshape(-1), diagonal, atol=1e-12)
