"""Symmetric diffeomorphic registration that opens the map only.

Both images and both halves of the map are carried along by `dipy_ppir.mpc.carried`, on
shares or, for `ClearSymmetricDiffeomorphicRegistration`, in the clear. Here is what an
owner does with its own image: warp it at the start of a level by a rounded copy of its
half, which it was shown at the end of the level before.
"""

import math
from typing import NamedTuple

from dipy.align.imwarp import (
    DiffeomorphicMap,
    RegistrationStages,
    SymmetricDiffeomorphicRegistration,
    VerbosityLevels,
)
from dipy.testing.decorators import warning_for_keywords
import numpy as np
from scipy import ndimage
from scipy.interpolate import make_interp_spline

from dipy_ppir.align.intensities import span
from dipy_ppir.align.parameters import MOST_STEP
from dipy_ppir.mpc.algebra import Clear, Digits, Opening, expression
from dipy_ppir.mpc.carried import Operators, Start
from dipy_ppir.mpc.carrier import DISPLACEMENT, Carrier, sum_of
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, declare
from dipy_ppir.mpc.linear import AxisMap, Linear, along, points

#: Which owner has which image.
IMAGES = {STATIC: "static", MOVING: "moving"}
#: At the end of a level but the last, every so many voxels along each axis are opened,
#: to this part of a voxel of that level.
LEVEL_SPACING, LEVEL_PRECISION = 4, 0.25
#: Along axes of fewer voxels, the coarse grid has at most every second one.
THIN = 20
#: Unit of the weights that bring displacements from one grid to another.
GRID_UNIT = 2.0**-14
#: A step moves a voxel by no more than this many times the step length.
LONGEST_STEP = 2.0
#: Inverse norms of windows are computed anew after steps of so many voxels.
REFINED_AFTER = 1.25
#: Lengths in voxels of the steps in which maps are composed and images carried by
#: whole halves, if all steps of the registration went the same way (they hardly ever
#: go half as far). Polynomials of more than half a voxel make an image's finest detail
#: grow, of more than a quarter hardly.
COMPOSED_STEP, TRANSPORTED_STEP = 5.0, 0.5
#: Unit of weights of sums of correlations.
SUM_UNIT = 2.0**-20
#: Standard deviation in voxels by which images are smoothed that are not warped, since
#: linear interpolation smooths those that are: on average by the root of 1/6.
SOFTENING = 6**-0.5

for _owner, _name in IMAGES.items():
    declare(
        f"level_{_name}",
        receivers=(_owner,),
        shape=f"dim numbers for every {LEVEL_SPACING}th voxel along each axis of a "
        "level's grid, at the end of each level but the last",
        meaning="its half of the map so far, rounded to a quarter of a voxel of that "
        "level",
        bits=16,
    )
declare(
    "map",
    receivers=(MOVING, STATIC),
    shape="dim numbers for every map_spacing-th voxel along each axis of the static "
    "image, once",
    meaning="the resulting map from the static to the moving image, rounded to "
    "map_precision",
    bits=24,
)
declare(
    "stop",
    receivers=(MOVING, STATIC, 2),
    shape="1 for each iteration of a level from the 13th on",
    meaning="whether the match has stopped to get better",
    bits=1,
)


def spacings(shape, spacing):
    """Spacing of the coarse grid along each axis of a level's grid."""
    return [spacing if n >= THIN else min(spacing, 2) for n in shape]


def power_of_two(x):
    """The smallest power of two, from 2 on, that is no less than a number."""
    return 2 ** max(math.ceil(math.log2(x)), 1)


def spline(p, positions):
    """Cubic spline through points p at some positions, as a matrix."""
    spline = make_interp_spline(p, np.eye(len(p)), k=min(3, len(p) - 1))
    return spline(np.clip(positions, 0, p[-1]))


class Level(NamedTuple):
    """A level's grid.

    Attributes
    ----------
    shape : tuple of int
    operators : Operators
        of the voxels that are carried.
    thinning : array of int, shape (dim,)
        every how many voxels are. Steps and displacements count those.
    directions : array, shape (dim, dim)
        takes displacements to mm.
    """

    shape: tuple
    operators: Operators
    thinning: np.ndarray
    directions: np.ndarray


class CarriedLevels:
    """The levels of one registration.

    Parameters
    ----------
    registration : SymmetricDiffeomorphicRegistration
        with its scale spaces and halves of the map; of images that are elsewhere, None.
    world : Clear or Shares
    here : sequence of int
        owners whose images are here.
    """

    def __init__(self, registration, world, here):
        self.r, self.world, self.here = registration, world, tuple(here)
        self.dim = registration.dim

    def run(self, level=None, displacements=None):
        """Carry both images through all levels.

        Parameters
        ----------
        level : int, optional
            the first one; the coarsest by default.
        displacements : dict, optional
            maps each owner to its half of the map at the end of the level above.
            Where halves are opened at the ends of levels, its own half, rounded, is in
            the registration.

        Returns
        -------
        displacements : dict or None
            the same at the end of the finest level; None if nothing was done.
        """
        r = self.r
        for at in range(r.levels - 1 if level is None else level, -1, -1):
            r.current_level, r.niter, r.energy_list = at, 0, []
            self.world.section(f"level {at}")
            limit, last = (
                r.level_iters[-1 - at],
                not any(r.level_iters[r.levels - at :]),
            )
            if at < r.levels - 1:
                self.expand(at)
                displacements = self.first(at, displacements)
            r._tell(RegistrationStages.SCALE_START)
            if limit:
                r._before_level(at)
                displacements = self._iterate(at, limit, displacements, last)
            r._tell(RegistrationStages.SCALE_END)
            if limit and at:
                # Where no finer level follows, nobody needs its half.
                if r.metric.opens == "levels" and not last:
                    self.show_level(at, displacements)
                r._level_ended(at, displacements)
        return displacements

    def _iterate(self, level, limit, displacements, is_last):
        r, scores, stops = self.r, [], False
        carried, halves = self.begin(level, displacements)
        static, moving = halves[STATIC], halves[MOVING]
        every = self.refinement()
        while r.niter < limit and not stops:
            r._tell(RegistrationStages.ITER_START)
            before, last = (static, moving), r.niter == limit - 1
            (static, moving), score = carried.iterate(
                *before,
                refine=r.niter % every == every - 1 and not last,
                last=last,
            )
            if r.niter < limit - 1:
                stops = self.stops(carried, scores)
            scores.append(score)
            r._tell(RegistrationStages.ITER_END)
            r.niter += 1
        self.world.section(f"end of level {level}")
        carried.check(before, (static, moving))
        if is_last:
            r._before_judging()
            r._judged(self.mismatched(carried, before, scores))
        return {STATIC: static.displacement, MOVING: moving.displacement}

    def refinement(self):
        """At every how many iterations inverse norms are computed anew."""
        return max(math.floor(REFINED_AFTER / self.r.step_length + 0.1), 1)

    def level(self, level):
        """See `Level`."""
        r, metric = self.r, self.r.metric
        shape = tuple(int(n) for n in r.static_ss.get_domain_shape(level))
        spacing = np.asarray(r.static_ss.get_spacing(level), dtype=np.float64)
        thinning = metric.thinning(shape)
        spacing = spacing * thinning
        operators = Operators(
            shape,
            metric.window,
            metric.smoothing,
            spacings(shape, metric.map_spacing),
            # A step is along the gradient per mm, and counts in voxels.
            (spacing.min() / spacing) ** 2,
            thinning,
        )
        directions = r.static_ss.get_affine(level)[: self.dim, : self.dim]
        return Level(shape, operators, thinning, np.asarray(directions) * thinning)

    def first(self, level, displacements):
        """`displacements` at a level, brought there from the level above."""
        if displacements is None:
            return None
        axes, factors = self.from_above(level)
        w, wanted = self.world, []
        for fields in displacements.values():
            for a, field in enumerate(fields):
                maps = [
                    AxisMap(m / factors[a] if b == a else m, GRID_UNIT)
                    for b, m in enumerate(axes)
                ]
                moved = w.map(Linear(maps), field)
                wanted.append((expression(moved), DISPLACEMENT))
        fresh = w.fresh(*wanted)
        return {
            owner: fresh[k * self.dim : (k + 1) * self.dim]
            for k, owner in enumerate(displacements)
        }

    def from_above(self, level):
        """What brings fields to a level from the one above.

        Returns
        -------
        axes : list of array, shape (coarse points, coarse points of the level above)
        factors : array, shape (dim,)
            sizes of its voxels, in those of the level above.
        """
        before, now = self.level(level + 1), self.level(level)
        factors = np.asarray(self.r.static_ss.get_expand_factors(level + 1, level))
        factors = factors * now.thinning / before.thinning
        each = zip(before.operators.points, now.operators.points, factors, strict=True)
        return [spline(p, q * f) for p, q, f in each], factors

    def begin(self, level, displacements=None):
        """The halves at the start of a level, and its `Carried`."""
        at = self.level(level)
        starts = {owner: self._start(owner, level, at) for owner in IMAGES}
        step = float(self.r.step_length)
        carried = self.r.metric.carried(self.world, at.operators, step)
        steps = None
        if displacements is not None and self.r.metric.opens == "end":
            times = self.flow_steps(level, level + 1)
            longest = self.longest(level, level + 1)
            steps = times, power_of_two(longest / TRANSPORTED_STEP / times)
        return carried, carried.begin(starts, displacements, steps)

    def longest(self, level, end):
        """How far steps of level `end` and those above may move a voxel of a level.

        If all went the same way: hardly ever more than half as far.
        """
        iters = self.r.level_iters[::-1]
        return self.r.step_length * sum(
            n * 2.0 ** (k - level) for k, n in enumerate(iters) if k >= end
        )

    def flow_steps(self, level, end):
        """In how many steps halves become flows, see `Carrier.receding`; `longest`."""
        return power_of_two(self.longest(level, end) / COMPOSED_STEP)

    def _start(self, owner, level, at):
        if owner not in self.here:
            return None
        half, scales = self._own(owner)
        image = half.transform_inverse(
            scales.get_image(level),
            interpolation="linear",
            image_world2grid=None,
            out_shape=np.array(at.shape, dtype=np.int32),
            out_grid2world=self.r.static_ss.get_affine(level),
        )
        image = np.asarray(image, dtype=np.float64)
        if self.r.metric.opens == "end" and level < self.r.levels - 1:
            image = ndimage.gaussian_filter(image, SOFTENING)
        low, high, least, most = span(image)
        image = np.clip(image, least, most) - low
        image = image / (high - low) if high > low else np.zeros_like(image)
        backward = np.asarray(half.backward, dtype=np.float64)
        backward = backward @ np.linalg.inv(at.directions).T
        coarse = [
            np.rint(p * t).astype(int)
            for p, t in zip(at.operators.points, at.thinning, strict=True)
        ]
        known = np.moveaxis(backward[np.ix_(*coarse)], -1, 0)
        carried = (..., *(slice(None, None, t) for t in at.thinning))
        return Start(self.r.metric.features(image)[carried], known)

    def _own(self, owner):
        r = self.r
        if owner == STATIC:
            return r.static_to_ref, r.static_ss
        return r.moving_to_ref, r.moving_ss

    def show_level(self, level, displacements):
        """Show each owner its half at the end of a level, rounded."""
        at = self.level(level)
        coarse = [
            points(n, LEVEL_SPACING if n >= THIN else 2) / t
            for n, t in zip(at.shape, at.thinning, strict=True)
        ]
        each = zip(at.operators.points, coarse, strict=True)
        maps = Linear([AxisMap(spline(p, q), GRID_UNIT) for p, q in each])
        wanted = [
            Opening(
                [self.world.map(maps, field) for field in fields],
                LEVEL_PRECISION / at.thinning.min(),
                self.farthest(level),
                f"level_{IMAGES[owner]}",
                (owner,),
            )
            for owner, fields in displacements.items()
        ]
        self.r._before_opening(level, wanted)
        for owner, shown in zip(displacements, self.world.shown(*wanted), strict=True):
            if owner in self.here:
                self.take(owner, level, coarse, shown)

    def take(self, owner, level, coarse, fields):
        """Take displacements at some points for a half of the map."""
        at = self.level(level)
        half = self.r.static_to_ref if owner == STATIC else self.r.moving_to_ref
        half.disp_shape = np.array(at.shape, dtype=np.int32)
        half.disp_grid2world = self.r.static_ss.get_affine(level)
        half.disp_world2grid = self.r.static_ss.get_affine_inv(level)
        half.backward = self._whole(at, coarse, fields)
        half.forward = np.zeros_like(half.backward)

    def _whole(self, at, coarse, fields):
        """Displacements at some points as a field at all voxels of a level, in mm."""
        each = zip(coarse, at.shape, at.thinning, strict=True)
        axes, whole = [spline(p, np.arange(n) / t) for p, n, t in each], []
        for x in fields:
            for axis, matrix in enumerate(axes):
                x = along(x, matrix, axis)
            whole.append(x)
        whole = np.stack(whole, -1) @ at.directions.T
        return np.ascontiguousarray(whole, dtype=np.float32)

    def farthest(self, level):
        """No displacement at the end of a level is larger, in voxels carried."""
        r, total = self.r, 1.0
        for k in range(r.levels - 1, level - 1, -1):
            total = 2 * total + LONGEST_STEP * r.step_length * r.level_iters[-1 - k]
        return min(total, DISPLACEMENT.bound)

    def composed(self, displacements):
        """The map from the static to the moving image, at the coarse points."""
        carrier = Carrier(self.world, self.level(0).operators)
        both = self.world.renewed(*displacements[STATIC], *displacements[MOVING])
        static, moving = both[: self.dim], both[self.dim :]
        return carrier.composed(static, moving, self.flow_steps(0, 0))

    def show_map(self, displacements, receivers):
        """Show the receivers the map, rounded, at the end of the finest level.

        Parameters
        ----------
        displacements : dict or None
            None for a map that moves nothing, which needs not be shown.
        receivers : sequence of int

        Returns
        -------
        field : array, shape (*static, dim), or None
            displacements, mm; None where the map is not shown.
        """
        at = self.level(0)
        if displacements is None:
            shown = np.zeros((self.dim, *at.operators.coarse))
        else:
            opening = Opening(
                self.composed(displacements),
                self.r.metric.map_precision / at.thinning.min(),
                2 * self.farthest(0),
                "map",
                receivers,
            )
            self.r._before_opening(0, [opening])
            (shown,) = self.world.shown(opening)
        if shown is None:
            return None
        return self._whole(at, at.operators.points, shown)

    def expand(self, level):
        """Bring the halves that are here from the level above to a level's grid."""
        factors = self.r.static_ss.get_expand_factors(level + 1, level)
        shape = self.r.static_ss.get_domain_shape(level)
        for owner in self.here:
            self._own(owner)[0].expand_fields(factors, shape)

    def stops(self, carried, scores):
        """Whether DIPY's rule ends a level, after these scores.

        It fits a parabola to the last energies and asks whether the slope in the
        middle, relative to their sum, is at most `opt_tol`: the sign of a weighted sum.
        """
        n = self.r.energy_window
        if len(scores) < n:
            return False
        x = np.arange(n)
        powers = np.vstack((x**2, x, np.ones(n)))
        fit = np.linalg.solve(powers @ powers.T, powers)
        slope = 2 * fit[0] * (0.5 * n) + fit[1]
        sums = [(scores[-n:], carried.better * slope - self.r.opt_tol)]
        return self._any_negative(carried, sums, "stop", (*IMAGES, HELPER))

    def _any_negative(self, carried, sums, label, receivers):
        """Whether any of some weighted sums of scores is below zero.

        Parameters
        ----------
        carried : Carried
        sums : sequence of (scores, weights)
        label : str
        receivers : sequence of int
        """
        unit, wanted = SUM_UNIT * min(x.unit for xs, _ in sums for x in xs), []
        for scores, weights in sums:
            each = zip(scores, weights, strict=True)
            wanted.append(sum_of(expression(x).weighted(c, unit) for x, c in each))
        # 50 bits are compared.
        most = 4 * carried.terms * max(np.abs(weights).sum() for _, weights in sums)
        digits = Digits(most * 2.0**-48, most)
        return self.world.any_negative(wanted, digits, label, receivers)

    def mismatched(self, carried, halves, scores):
        """Whether two images hardly match, or less than when a level began.

        Rounds: 1, and those of `any_negative`.

        Parameters
        ----------
        carried : Carried
        halves : sequence of Half
            as they were given to the last iteration.
        scores : list of Expression or Secret
            of the level, one for each iteration.

        Returns
        -------
        mismatched : bool or None
            None at the helper.
        """
        numbers, sums = (scores[-1], scores[0], carried.reference(halves)), []
        for weights in self.r.metric.matching:
            used = [k for k, weight in enumerate(weights) if weight]
            sums.append(([numbers[k] for k in used], [weights[k] for k in used]))
        return self._any_negative(carried, sums, "mismatch", tuple(IMAGES))


class ClearSymmetricDiffeomorphicRegistration(SymmetricDiffeomorphicRegistration):
    """What `SecureSymmetricDiffeomorphicRegistration` does, without parties.

    Of both images in the clear, the same formulas and roundings: to see what the
    algorithm does, and to compare with.

    Parameters
    ----------
    metric : SecureCCMetric
        with ``reveal="map"``.
    level_iters, step_length, ss_sigma_factor, opt_tol, inv_iter, inv_tol, callback
        as in DIPY.

    Raises
    ------
    ValueError
        if the metric opens steps.
    """

    @warning_for_keywords()
    def __init__(
        self,
        metric,
        *,
        level_iters=None,
        step_length=0.25,
        ss_sigma_factor=0.4,
        opt_tol=1e-5,
        inv_iter=20,
        inv_tol=1e-3,
        callback=None,
    ):
        if getattr(metric, "reveal", None) != "map":
            raise ValueError('this needs a SecureCCMetric with reveal="map"')
        if not 0 < step_length <= MOST_STEP:
            raise ValueError(
                f"step_length must be above 0 and at most {MOST_STEP} voxel, got "
                f"{step_length}"
            )
        super().__init__(
            metric,
            level_iters=level_iters,
            step_length=step_length,
            ss_sigma_factor=ss_sigma_factor,
            opt_tol=opt_tol,
            inv_iter=inv_iter,
            inv_tol=inv_tol,
            callback=callback,
        )
        self.verbosity = VerbosityLevels.NONE
        #: Displacements at the coarse points of the finest grid, before rounding.
        self.displacements = None

    @warning_for_keywords()
    def optimize(
        self,
        static,
        moving,
        *,
        static_grid2world=None,
        moving_grid2world=None,
        prealign=None,
    ):
        """Register; see ``dipy.align.imwarp``."""
        whole = np.eye(self.dim + 1)
        result = super().optimize(
            *(self.metric.prepared(x).image for x in (static, moving)),
            static_grid2world=whole if static_grid2world is None else static_grid2world,
            moving_grid2world=whole if moving_grid2world is None else moving_grid2world,
            prealign=prealign,
        )
        self.static_to_ref = self.moving_to_ref = None
        return result

    def _optimize(self):
        levels = CarriedLevels(self, Clear(), tuple(IMAGES))
        self._tell(RegistrationStages.OPT_START)
        self.displacements = levels.run()
        self.static_to_moving = mapping(
            self, levels.show_map(self.displacements, tuple(IMAGES))
        )
        self._tell(RegistrationStages.OPT_END)

    def _tell(self, stage):
        if self.callback is not None:
            self.callback(self, stage)

    def _before_level(self, level):
        pass

    def _before_opening(self, level, openings):
        pass

    def _level_ended(self, level, displacements):
        pass

    def _before_judging(self):
        pass

    def _judged(self, mismatched):
        pass


def mapping(registration, field):
    """The map from the static to the moving image, of its displacements.

    Parameters
    ----------
    registration : SymmetricDiffeomorphicRegistration
    field : array, shape (*static, dim)
        mm.

    Returns
    -------
    mapping : DiffeomorphicMap
    """
    r, half, scales = registration, registration.moving_to_ref, registration.static_ss
    backward = DiffeomorphicMap(
        r.dim,
        np.array(field.shape[:-1], dtype=np.int32),
        disp_grid2world=scales.get_affine(0),
        domain_shape=half.domain_shape,
        domain_grid2world=half.domain_grid2world,
        codomain_shape=half.codomain_shape,
        codomain_grid2world=half.codomain_grid2world,
        prealign=half.prealign,
    )
    backward.backward = field
    inverse = r.invert_vector_field(
        field,
        scales.get_affine_inv(0),
        scales.get_spacing(0),
        r.inv_iter,
        r.inv_tol,
        start=-field,
    )
    backward.forward = np.array(inverse)
    return backward.inverse()
