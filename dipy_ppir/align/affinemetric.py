"""What an affine registration of two parties' images asks of its metric."""

from dipy.align import vector_fields as vf
from dipy.align.imaffine import AffineMap
from dipy.align.imwarp import get_direction_and_spacings
from dipy.core.interpolation import interpolate_scalar_2d, interpolate_scalar_3d
import numpy as np
import numpy.linalg as npl

from dipy_ppir._kernels import sampling
from dipy_ppir.align import plan
from dipy_ppir.align.quasinewton import SCALE, minimise, opened_bits
from dipy_ppir.align.remote import grid2world_of, is_remote
from dipy_ppir.align.secretmetric import secret_numbers
from dipy_ppir.mpc.ledger import STATIC


class PlacedImages:
    """Two images and where they are, as DIPY's metrics are set up with them."""

    def place(
        self,
        transform,
        static,
        moving,
        static_grid2world,
        moving_grid2world,
        starting_affine,
    ):
        """Take a pair of images; see ``dipy.align.imaffine``."""
        self.dim = len(static.shape)
        self.transform = transform
        self.metric_grad = np.zeros(transform.get_number_of_parameters())
        self.static_grid2world = grid2world_of(static, static_grid2world)
        self.moving_grid2world = grid2world_of(moving, moving_grid2world)
        self.static_world2grid = npl.inv(self.static_grid2world)
        self.moving_world2grid = npl.inv(self.moving_grid2world)
        self.moving_direction, self.moving_spacing = get_direction_and_spacings(
            self.moving_grid2world, self.dim
        )
        self.moving_spacing = np.asarray(self.moving_spacing, dtype=np.float64)
        self.starting_affine = starting_affine
        self.affine_map = AffineMap(
            np.eye(self.dim + 1) if starting_affine is None else starting_affine,
            domain_grid_shape=static.shape,
            domain_grid2world=self.static_grid2world,
            codomain_grid_shape=moving.shape,
            codomain_grid2world=self.moving_grid2world,
        )
        if self.dim == 2:
            self.interp_method = interpolate_scalar_2d
        else:
            self.interp_method = interpolate_scalar_3d
        self.static, self.moving = (
            image if is_remote(image) else np.array(image, dtype=np.float64, order="C")
            for image in (static, moving)
        )

    def sample(self, affine, samples=None, *, with_gradient=True):
        """Moving image, and its gradient, at the samples moved by `affine`.

        Parameters
        ----------
        affine : array, shape (dim + 1, dim + 1)
            from the static to the moving image's space, mm.
        samples : array, shape (n, dim + 1), optional
            points of the static image's space, mm, homogeneous; all voxels by default.
        with_gradient : bool, optional

        Returns
        -------
        values : array, shape (S, R, C), (R, C) or (n,)
        gradient : array, shape ``values.shape + (dim,)``, or None
            per mm.
        """
        world2grid, spacing = self.moving_world2grid, self.moving_spacing
        dense = samples is None
        if self.dim == 2:
            return self._sample_2d(affine, samples, with_gradient)
        shape = self.static.shape if dense else (len(samples),)
        values = np.empty(shape)
        gradient = np.empty((*shape, 3)) if with_gradient else None
        flat = None if gradient is None else gradient.reshape(-1, 3)
        if dense:
            grid2world = affine.dot(self.static_grid2world)
            sampling.sample_grid(
                self.moving,
                world2grid.dot(grid2world),
                grid2world,
                world2grid,
                spacing,
                np.array(shape, dtype=np.int32),
                values.reshape(-1),
                flat,
            )
        else:
            sampling.sample_points(
                self.moving, affine, world2grid, spacing, samples, values, flat
            )
        return values, gradient

    def _sample_2d(self, affine, samples, with_gradient):
        gradient = None
        if samples is None:
            self.affine_map.set_affine(affine)
            values = self.affine_map.transform(self.moving)
            if with_gradient:
                gradient, _ = vf.gradient(
                    self.moving,
                    self.moving_world2grid,
                    self.moving_spacing,
                    self.static.shape,
                    affine.dot(self.static_grid2world),
                )
            return values, gradient
        points = affine.dot(samples.T).T
        on_grid = self.moving_world2grid.dot(points.T).T[..., : self.dim]
        values, _ = self.interp_method(self.moving, on_grid)
        if with_gradient:
            gradient, _ = vf.sparse_gradient(
                self.moving, self.moving_world2grid, self.moving_spacing, points
            )
        return np.array(values), gradient


class StepsOnShares:
    """What a registration asks of a metric that the optimizer on shares minimises.

    It is `quasinewton.minimise`, with the metric's attribute ``shared``. Its values are
    minus what is to be large.

    Attributes
    ----------
    kept : float
        of images that match, no smaller part of what there was at the beginning, to a
        20th.
    """

    method = "damped BFGS on shares"
    hide_steps = False

    def planned(self, kind, levels, level_iters, *, scale, before, last):
        """Evaluations at each level, coarsest first; see `plan.evaluations`.

        Parameters
        ----------
        before : str or None
            step of the pipeline before this one.
        """
        return plan.evaluations(
            kind,
            levels,
            level_iters,
            scale=scale,
            rigid_before=before is not None and before.startswith("rigid"),
            last=last,
            hidden=self.hide_steps,
        )

    def steps_of(self, evaluations):
        """How many steps so many evaluations take."""
        return evaluations - (not self.hide_steps)

    def check_masks(self, *masks):
        """Raise ValueError for masks that cannot be used."""

    def planned_bits(self, counts, parameters):
        """Most bits that so many evaluations open, where steps are not hidden."""
        return sum(n - 1 for n in counts if n) * opened_bits(parameters)

    def minimise(self, params, evaluations, level, on_step):
        """Minimise at a level, 0 being the coarsest; see `quasinewton.minimise`."""
        self.shared.begin(params)
        return minimise(
            secret_numbers(self.session),
            self.shared,
            params,
            evaluations,
            plan.cap(level),
            on_step,
        )

    def final_value(self, affine, value):
        """Show the moving owner the value that the last level came to."""
        return secret_numbers(self.session).show_value(value, 1 / SCALE)

    def forget(self):
        """Keep nothing for another step of a registration."""

    def least_value(self):
        """What is the least there is of images that match; None where it is not known.

        It follows from the static image.
        """
        raise NotImplementedError

    def mismatched(self, before, after):
        """Whether the images hardly match at a transform, or less than at another.

        Rounds: those of two values, of `SecretNumbers.less` and 2.

        Parameters
        ----------
        before, after : array, shape (dim + 1, dim + 1), at the moving owner only
            the other transform, and the one that is judged.

        Returns
        -------
        bit : SharedArray, shape (1,)
        """
        shared, numbers = self.shared, secret_numbers(self.session)
        least = self.least_value()
        least = None if least is None else np.array([SCALE * least])
        least = numbers.own(least, (1,), owner=STATIC)
        before, after = shared.value(before), shared.value(after)
        kept = round(20 * self.kept)
        little, less = numbers.less(
            (-least, after), (before.times(kept), after.times(20))
        )
        return numbers.either(little, less)
