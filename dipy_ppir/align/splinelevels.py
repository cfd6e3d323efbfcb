r"""The levels of a free-form registration, at whatever party.

The sum of squared differences of two images is made small by Gauss-Newton steps (paper,
sections 3.1 and 5.1) in the control points :math:`\theta` of a cubic B-spline
:math:`u`, on the static grid of the level and in its voxels:

.. math::

    E(\theta) = \tfrac{1}{2} \sum_x \big(m(x) - J(x)\big)^2 + \lambda\, b(\theta),
    \qquad m(x) = I(x + u(x)),

with the bending energy b (`bending`). The moving owner knows m and its gradient g with
respect to u, hence all of this but :math:`\sum_x B_c g_d J`. It is shown

.. math::

    s_{cd} = \frac{\sum_x B_c g_d (m - J)}{\sum_x B_c g_d^2 + \mu},

rounded: by how far a control point would move if its neighbours moved along. From this
it takes the step

.. math::

    \delta = -(S^T S + \lambda \nabla^2 b + \mu)^{-1}
        (\sum_x B_c g_d (m - J) + \lambda \nabla b),

S as in eq. 5, by conjugate gradients. All sums are over voxels that are sampled.
"""

from dipy.core.interpolation import (
    interpolate_scalar_2d,
    interpolate_scalar_3d,
    interpolate_vector_2d,
    interpolate_vector_3d,
)
import numpy as np
from scipy.sparse.linalg import LinearOperator, cg

from dipy_ppir.align.bending import BendingEnergy
from dipy_ppir.align.gradientsampling import (
    magnitude_samples,
    sample_count,
    uniform_samples,
)
from dipy_ppir.align.quality import jacobian_determinant
from dipy_ppir.mpc.bsplines import Lattice
from dipy_ppir.mpc.freeform import (
    GRADIENT_BITS,
    IMAGE_BITS,
    OwnSteps,
    Samples,
    limited,
    scattered,
)

#: A step that is shown lies within so many voxels.
RANGE = 8.0
#: Of the squares of gradients that a control point sees, this part is added: what was
#: rounded would else grow where neighbours move in turns. Of their average, the other,
#: so that flat parts neither move nor show much.
DAMPING, FLAT = 0.2, 0.05
#: Relative residual of the linear system, and most iterations for it.
SOLVED, MOST_SOLVING = 0.05, 20
#: Steps are halved where a voxel would be left with less than this part of its volume,
#: so many times at most.
LEAST_VOLUME, MOST_SHORTENING = 0.1, 6
#: Added to the diagonal where a spline is fitted to another.
RIDGE = 1e-4
#: Each time the steps' squares grow, steps are shortened by this, and lengthened again.
SHORTER, LONGER = 0.5, 1.25


def opened_bits(precision):
    """Bits of a step that is shown."""
    return int(np.ceil(np.log2(RANGE / precision))) + 1


class MovingLevel:
    """A level at the moving owner.

    Parameters
    ----------
    image : array
        its smoothed image, from 0 to 1.
    to_moving : array, shape (dim + 1, dim + 1)
        from voxels of the level to those of the image.
    lattice : Lattice
    bending : float
    """

    def __init__(self, image, to_moving, lattice, bending):
        self.lattice, self.dim = lattice, image.ndim
        self.image = np.ascontiguousarray(image, dtype=np.float64)
        gradient = np.stack(np.gradient(self.image), axis=-1)
        # From derivatives per voxel of the image to those per voxel of the level.
        self._linear = to_moving[:-1, :-1]
        self._gradient = np.ascontiguousarray(gradient @ self._linear)
        self._start = to_moving[:-1, -1]
        self.bending, self.energy = bending, BendingEnergy(lattice)

    def warped(self, controls, samples=None):
        """The warped image and its gradient with respect to the displacement.

        Returns
        -------
        image : array, shape (*shape) or (count,)
        gradient : array, shape (dim, *shape) or (dim, count)
            0 where the moving image is not.
        """
        points = self._points(self.lattice.values(controls), samples)
        scalars = interpolate_scalar_2d if self.dim == 2 else interpolate_scalar_3d
        vectors = interpolate_vector_2d if self.dim == 2 else interpolate_vector_3d
        image, inside = scalars(self.image, points)
        gradient, _ = vectors(self._gradient, points)
        gradient = np.asarray(gradient).T * np.asarray(inside)
        shape = self.lattice.shape if samples is None else (samples.count,)
        return np.asarray(image).reshape(shape), gradient.reshape(self.dim, *shape)

    def _points(self, displacements, samples):
        """Where voxels of the level come to lie in the image."""
        shape = self.lattice.shape
        if samples is None:
            points = np.indices(shape, dtype=np.float64) + displacements
            points = points.reshape(self.dim, -1)
        else:
            points = displacements.reshape(self.dim, -1)[:, samples.at]
            points += np.unravel_index(samples.at, shape)
        return points.T @ self._linear.T + self._start

    def own(self, image, gradient, samples, precision):
        """What is brought to the protocol, and what its steps are multiplied by.

        Returns
        -------
        own : OwnSteps
        heights : array, shape (dim, *control_shape)
            a gradient of the energy in one unit of a step's precision.
        """
        lattice, bits = self.lattice, opened_bits(precision)
        steepest = np.abs(gradient).max()
        scale = (1 << GRADIENT_BITS) / steepest if steepest > 0 else 1.0
        x = np.rint(gradient * scale).astype(np.int64)
        image = np.rint(image * (1 << IMAGE_BITS)).astype(np.int64)
        unit = lattice.unit / scale / (1 << IMAGE_BITS)
        weights = unit / self.damped(gradient, samples) / precision
        weights = limited(weights, x, image, lattice, samples, bits)
        heights = np.zeros(weights.shape)
        some = weights > 0
        heights[some] = unit * 2.0 ** (64 - bits) / weights[some]
        return OwnSteps(x, image, weights), heights

    def damped(self, gradient, samples):
        """Sums of squares of the gradient, and the damping."""
        squares = self.lattice.sums(scattered(gradient**2, samples, self.lattice))
        return (1 + DAMPING) * squares + FLAT * squares.mean() + 1e-12

    def step(self, controls, gradient, ascent, samples):
        """The Gauss-Newton step; see the module.

        Parameters
        ----------
        controls : array, shape (dim, *control_shape)
        gradient : array
            see `warped`.
        ascent : array, shape (dim, *control_shape)
            the images' part of the energy's gradient.
        samples : Samples or None

        Returns
        -------
        step : array, shape (dim, *control_shape)
        """
        lattice, weight = self.lattice, self.bending
        if samples is not None:
            weight *= samples.count / np.prod(lattice.shape)
        squares = self.damped(gradient, samples)
        damping = squares - lattice.sums(scattered(gradient**2, samples, lattice))
        diagonal = lattice.sums(scattered(gradient**2, samples, lattice), power=2)
        diagonal += damping + weight * self.energy.diagonal
        whole = scattered(gradient, samples, lattice)

        def times(flat):
            v = flat.reshape(controls.shape)
            along = np.einsum("i...,i...->...", whole, lattice.values(v))
            out = lattice.sums(whole * along) + damping * v
            return (out + weight * self.energy.gradient(v)).reshape(-1)

        def scaled(flat):
            return flat / diagonal.reshape(-1)

        n = controls.size
        wanted = ascent + weight * self.energy.gradient(controls)
        step, _ = cg(
            LinearOperator((n, n), times, dtype=np.float64),
            -wanted.reshape(-1),
            rtol=SOLVED,
            maxiter=MOST_SOLVING,
            M=LinearOperator((n, n), scaled, dtype=np.float64),
        )
        return step.reshape(controls.shape)


class SplineLevels:
    """The levels of one registration.

    Parameters
    ----------
    registration : FreeFormRegistration
        with its parameters, grids of levels and images that are here.
    world : ClearSteps or SharedSteps
    """

    def __init__(self, registration, world):
        self.r, self.world = registration, world
        self.parameters = registration.parameters

    def run(self, level=None, controls=None):
        """Register, from a level to the finest.

        Parameters
        ----------
        level : int, optional
            the first one; the coarsest by default.
        controls : array, optional
            control points at the end of the level above, at the moving owner.

        Returns
        -------
        controls : array, shape (dim, *control_shape), or None
            of the finest level, in its voxels; None but for the moving owner.
        """
        r, p = self.r, self.parameters
        levels = len(p.level_iters)
        for at in range(levels - 1 if level is None else level, -1, -1):
            r.current_level, r.niter = at, 0
            controls = self.first(at, controls)
            r._level_begins()
            if p.level_iters[-1 - at]:
                controls = self._iterate(at, controls)
            r._level_ends(controls)
        return controls

    def lattice(self, level):
        """Control points of a level's grid."""
        shape = self.r.level_shape(level)
        return Lattice(shape, [min(self.parameters.spacing, n) for n in shape])

    def first(self, level, controls):
        """Control points at a level, from those of the level above."""
        if not self.r.conducts:
            return None
        now = self.lattice(level)
        if controls is None:
            return np.zeros((len(now.shape), *now.control_shape))
        before = self.lattice(level + 1)
        factors = self.r.level_factors(level + 1, level)
        for axis, factor in enumerate(factors):
            positions = np.arange(now.shape[axis]) / factor
            # The nearest spline at the voxels; control points beyond them stay small.
            values = now.at(axis, np.arange(now.shape[axis]))
            normal = values.T @ values + RIDGE * np.eye(values.shape[1])
            matrix = np.linalg.solve(normal, values.T @ before.at(axis, positions))
            moved = np.moveaxis(controls, axis + 1, -1) @ matrix.T
            controls = np.moveaxis(moved, -1, axis + 1)
        return controls * np.reshape(factors, (-1,) + (1,) * len(factors))

    def _iterate(self, level, controls):
        r, p, world = self.r, self.parameters, self.world
        lattice, limit = self.lattice(level), p.level_iters[-1 - level]
        at = r.moving_level(level, lattice) if r.conducts else None
        world.section(f"level {level}")
        world.begin(lattice, r.static_words(level))
        # As fine at coarse levels, in mm: what is lost there is not made up for, and
        # control points are few.
        precision = p.precision / p.factors[-1 - level]
        bits, length, before, more = opened_bits(precision), 1.0, np.inf, True
        while world.goes_on(more and r.niter < limit, r.niter >= limit):
            samples = self.samples(level, at, controls)
            own = None
            if r.conducts:
                image, gradient = at.warped(controls, samples)
                own, heights = at.own(image, gradient, samples, precision)
            r._before_opening(lattice, bits)
            steps = world.steps(bits, own, samples)
            if r.conducts:
                ascent = steps * heights
                step = at.step(controls, gradient, ascent, samples)
                # Squares that grow say that the last step was too long.
                squares = np.vdot(step, step)
                length *= SHORTER if squares > before else LONGER
                length, before = min(length, 1.0), squares
                longest = np.abs(step).max()
                step *= min(length, p.max_step / max(longest, 1e-9))
                controls = shortened(controls, step, lattice)
                more = longest > p.opt_tol
            r._iterated(steps)
            r.niter += 1
        return controls

    def samples(self, level, at, controls):
        """Voxels that the next iteration samples; None for all.

        Parameters
        ----------
        level : int
        at : MovingLevel or None
        controls : array or None
        """
        p = self.parameters
        if p.sampling_proportion in (None, 1):
            return None
        voxels = int(np.prod(self.r.level_shape(level)))
        count = sample_count(voxels, p.sampling_proportion)
        rng = np.random.default_rng([p.seed or 0, level, self.r.niter])
        if count == voxels:
            return None
        if p.sampling == "URS":
            return Samples(count, uniform_samples(rng, voxels, count), False)
        where = None
        if self.r.conducts:
            gradient = at.warped(controls)[1]
            steepness = np.sqrt((gradient**2).sum(axis=0)).reshape(-1)
            where = magnitude_samples(self.world.draws(rng, voxels), steepness, count)
        return self.world.samples(Samples(count, where, True))


def shortened(controls, step, lattice):
    """Control points after a step, that is shorter where the map would fold.

    Parameters
    ----------
    controls, step : array, shape (dim, *control_shape)
    lattice : Lattice
    """
    part = np.ones(lattice.control_shape)
    for _ in range(MOST_SHORTENING):
        field = np.moveaxis(lattice.values(controls + part * step), 0, -1)
        bad = jacobian_determinant(field, None) < LEAST_VOLUME
        if not bad.any():
            break
        part[lattice.sums(bad.astype(np.float64)) > 0] *= SHORTER
    return controls + part * step
