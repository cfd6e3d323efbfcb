"""Free-form registration by cubic B-splines of two images that two parties hold.

The sum of squared differences decides, as in the paper's section 3.1: `splinelevels`
has the optimizer. There is no such registration in DIPY: arguments and results are
those of `imwarp`. The moving owner conducts; it learns the steps, rounded, and with
them the map. The static owner learns control points of the map, if it gets the result.

Every party calls the same functions: the image it does not hold is a `RemoteImage`.
Called with both images, the other two parties are started as processes on this machine
and run the same protocol.
"""

from collections import Counter

from dipy.align.imwarp import (
    DiffeomorphicMap,
    RegistrationStages,
    get_direction_and_spacings,
)
from dipy.align.scalespace import IsotropicScaleSpace
from dipy.align.vector_fields import (
    invert_vector_field_fixed_point_2d,
    invert_vector_field_fixed_point_3d,
)
from dipy.testing.decorators import warning_for_keywords
import numpy as np
from scipy import ndimage

from dipy_ppir.align import plausibility
from dipy_ppir.align.arguments import check_run
from dipy_ppir.align.checkpoint import (
    CheckpointError,
    agree_on_state,
    begin_or_resume,
    journal,
    journal_ahead,
)
from dipy_ppir.align.deformable import (
    RESULT_TO,
    DeformableRegistration,
    received_prealign,
    register_party,
)
from dipy_ppir.align.facts import grid_facts, map_facts, own_arrays
from dipy_ppir.align.imwarp import REPEATS
from dipy_ppir.align.intensities import TAIL
from dipy_ppir.align.parameters import FREEFORM, FreeFormParameters
from dipy_ppir.align.remote import (
    grid2world_of,
    is_remote,
)
from dipy_ppir.align.splinelevels import MovingLevel, SplineLevels
from dipy_ppir.align.validation import (
    check_pyramid,
    check_slices,
)
from dipy_ppir.mpc.arrays import OwnedArray
from dipy_ppir.mpc.freeform import IMAGE_BITS, MEAN_BITS, ClearSteps
from dipy_ppir.mpc.ledger import MOVING, STATIC, declare
from dipy_ppir.mpc.worlds import splines

#: The resulting control points are multiples of this part of a voxel.
RESULT_UNIT = 2.0**-6

declare(
    "control_points",
    receivers=(STATIC,),
    shape="dim numbers for every control point of the static image, once",
    meaning="the resulting map, as the control points of its spline",
    bits=16,
)


class FreeFormRegistration:
    """What a registration has in common at whatever party; see `SplineLevels`.

    Parameters
    ----------
    parameters : FreeFormParameters
    callback : callable or None

    Attributes
    ----------
    current_level, niter : int
        where the registration is; level 0 is the finest.
    energy_list : list
        empty: no energy is opened.
    """

    def __init__(self, parameters, callback):
        self.parameters, self.callback = parameters, callback
        self.dim, self.energy_list = parameters.dim, []
        self.current_level, self.niter = None, 0

    # -- images and grids ------------------------------------------------

    def _set_up(self, images, prealign):
        self._images = images
        self._prealign = prealign
        self._static, self._moving = (
            self._scaled(images[name]) for name in ("static", "moving")
        )
        #: Whether the moving image is here.
        self.conducts = self._moving is not None
        self._space = self._scale_space(images["static"], images["static_grid2world"])

    def _scaled(self, image):
        """An image that is here, its intensities from 0 to 1."""
        if is_remote(image):
            return None
        image, given = np.asarray(image, dtype=np.float64), self.parameters.intensities
        low, high = np.quantile(image, [TAIL, 1 - TAIL]) if given is None else given
        if not high > low:
            low, high = image.min(), image.max()
        return np.clip((image - low) / (high - low), 0.0, 1.0)

    def _scale_space(self, static, grid2world):
        """Grids of the levels, which follow from the static image's."""
        p = self.parameters
        with np.errstate(all="ignore"):
            space = IsotropicScaleSpace(
                np.zeros((1,) * self.dim),
                list(p.factors),
                [0.0] * len(p.factors),
                image_grid2world=grid2world,
                input_spacing=get_direction_and_spacings(grid2world, self.dim)[1],
                mask0=False,
            )
        space.domain_shapes = [
            (np.array(static.shape) / scaling).astype(np.int32)
            for scaling in space.scalings
        ]
        return space

    def level_shape(self, level):
        """Shape of a level's grid."""
        return tuple(int(n) for n in self._space.get_domain_shape(level))

    def level_factors(self, above, level):
        """Sizes of the voxels of a level in those of a finer one."""
        return self._space.get_scaling(above) / self._space.get_scaling(level)

    def _smoothed(self, name, level):
        """An image as a level has it, on its own grid.

        The standard deviation counts voxels of the static image, along its finest axis,
        and is the same in mm along all axes of both images.
        """
        image = self._static if name == "static" else self._moving
        spacings = {
            n: np.linalg.norm(self._images[f"{n}_grid2world"][:-1, :-1], axis=0)
            for n in ("static", "moving")
        }
        sigma = self.parameters.sigmas[-1 - level] * spacings["static"].min()
        return ndimage.gaussian_filter(image, sigma / spacings[name])

    def moving_level(self, level, lattice):
        """A level at the moving owner."""
        to_moving = np.linalg.inv(self._images["moving_grid2world"])
        if self._prealign is not None:
            to_moving = to_moving @ self._prealign
        return MovingLevel(
            self._smoothed("moving", level),
            to_moving @ self._space.get_affine(level),
            lattice,
            self.parameters.bending,
        )

    def static_words(self, level):
        """The static image at a level, in units of 2**-IMAGE_BITS; None elsewhere."""
        if self._static is None:
            return None
        steps = self._space.get_scaling(level).astype(int)
        image = self._smoothed("static", level)[
            tuple(slice(None, None, k) for k in steps)
        ]
        image = image[tuple(slice(n) for n in self.level_shape(level))]
        return np.rint(image * (1 << IMAGE_BITS)).astype(np.int64)

    # -- the same in the clear and on shares -----------------------------

    def _judge(self, levels, controls, world):
        """Whether the images match in the end, and how well, if that is asked for."""
        finest = levels.lattice(0)
        images = None
        world.section("end")
        if not self.parameters.level_iters[-1]:
            world.begin(finest, self.static_words(0))
        if self.conducts:
            at = self.moving_level(0, finest)
            images = np.stack(
                [at.warped(c)[0] for c in (np.zeros_like(controls), controls)]
            )
            images = np.rint(images * (1 << IMAGE_BITS)).astype(np.int64)
        return world.judged(images, value=self.parameters.ret_metric)

    def _map(self, levels, controls):
        """The map of control points that are multiples of `RESULT_UNIT`."""
        images = self._images
        static_grid2world = images["static_grid2world"]
        field = levels.lattice(0).values(controls * RESULT_UNIT)
        field = np.moveaxis(field, 0, -1) @ static_grid2world[:-1, :-1].T
        field = np.ascontiguousarray(field, dtype=np.float32)
        backward = DiffeomorphicMap(
            self.dim,
            np.array(field.shape[:-1], dtype=np.int32),
            disp_grid2world=static_grid2world,
            domain_shape=images["moving"].shape,
            domain_grid2world=images["moving_grid2world"],
            codomain_shape=images["static"].shape,
            codomain_grid2world=static_grid2world,
            prealign=None if self._prealign is None else np.linalg.inv(self._prealign),
        )
        invert = {
            2: invert_vector_field_fixed_point_2d,
            3: invert_vector_field_fixed_point_3d,
        }[self.dim]
        backward.backward = field
        inverse = invert(
            field,
            np.linalg.inv(static_grid2world),
            self._space.get_spacing(0),
            self.parameters.inv_iter,
            self.parameters.inv_tol,
            start=-field,
        )
        backward.forward = np.array(inverse)
        return backward.inverse()

    def _tell(self, stage):
        if self.callback is not None:
            self.callback(self, stage)

    def _level_begins(self):
        self._tell(RegistrationStages.SCALE_START)

    def _iterated(self, steps):
        self._tell(RegistrationStages.ITER_END)


def rounded(controls):
    """Control points in whole `RESULT_UNIT`, as they are shown."""
    least, most = np.iinfo(np.int16).min, np.iinfo(np.int16).max
    return np.clip(np.rint(controls / RESULT_UNIT), least, most).astype(np.int16)


class ClearFreeFormRegistration(FreeFormRegistration):
    """What `SecureFreeFormRegistration` does, without parties.

    Of both images in the clear, the same formulas and roundings (steps are rounded to
    nearest): to see what the algorithm does, and to compare with.

    Parameters
    ----------
    callback : callable, optional
    **parameters
        of `FreeFormParameters`.

    Attributes
    ----------
    iterations : list of int
        at each level, the coarsest first.
    controls : array, shape (dim, *control_shape)
        control points in voxels of the static image.
    steps : list of (int, array)
        level and steps that are shown, of each iteration.
    mismatched : bool
    value : float or None
    """

    def __init__(self, *, callback=None, **parameters):
        super().__init__(FreeFormParameters(**parameters), callback)

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
        """Register; see `SecureFreeFormRegistration.optimize`."""
        images = {"static": static, "moving": moving}
        for name, given in (
            ("static", static_grid2world),
            ("moving", moving_grid2world),
        ):
            images[f"{name}_grid2world"] = grid2world_of(images[name], given)
        self._set_up(images, prealign)
        self.iterations, self.steps = [], []
        world = ClearSteps()
        levels = SplineLevels(self, world)
        self.controls = levels.run()
        self.mismatched, self.value = self._judge(levels, self.controls, world)
        return self._map(levels, rounded(self.controls))

    def _before_opening(self, lattice, bits):
        pass

    def _iterated(self, steps):
        self.steps.append((self.current_level, steps))
        super()._iterated(steps)

    def _level_ends(self, controls):
        self.iterations.append(self.niter)
        self._tell(RegistrationStages.SCALE_END)


class SecureFreeFormRegistration(DeformableRegistration, FreeFormRegistration):
    """Free-form registration of two parties' images by cubic B-splines.

    The moving owner is shown the steps of the control points, from which it can rebuild
    much of the static image: see ``doc/security.md``.

    Parameters
    ----------
    dim : {2, 3}
        of the images.
    level_iters : list of int, optional
        most iterations at each level, from the coarsest to the finest.
    factors : list of int, optional
        how many times larger the voxels of each level are than those of the static
        image, as in DIPY's affine registration; by default halves.
    sigmas : list of float, optional
        standard deviations of the Gaussian that smooths both images at each level, in
        voxels of the static image; by default half the factors, and 0 at the last.
    spacing : int, optional
        a control point every so many voxels of a level's grid, along each axis.
    bending : float, optional
        weight of the bending energy.
    precision : float, optional
        to how much of a voxel of a level the moving owner is shown each step.
    opt_tol : float, optional
        a level ends when the control points move by no more, in voxels; by default
        `precision`.
    max_step : float, optional
        longest step of a control point, voxels.
    sampling : {"URS", "GMS"}, optional
        which voxels are sampled: drawn alike, or with probabilities as the gradient of
        the moving image, which shows the static owner where that has edges.
    sampling_proportion : float, optional
        which part of them, at each iteration anew; by default all voxels count.
    seed : int, optional
        of the samples.
    intensities : (float, float), optional
        the range of both images that counts; by default each owner takes its own,
        without the smallest and the largest half percent.
    inv_iter, inv_tol
        as in DIPY.
    ret_metric : bool, optional
        whether the moving owner is shown the mean squared difference in the end.
    callback : callable, optional
        called with this object and a `RegistrationStages`, as in DIPY.
    session : Session, optional
        this party's session. By default the other parties are started as processes on
        this machine.
    parties : {3, 2}, optional
        how many there are then: two owners and a helper, by default, or two owners
        alone.
    result_to : {"both", "moving", "static"}, optional
        which image owners get the resulting map. The moving owner could have it anyway.
    checkpoint : Checkpoint, optional
        where this party keeps its state, to go on after an interruption; needs a
        session.
    strict : bool, optional
        raise an `ImplausibleError` where a result that is not plausible otherwise is
        an `ImplausibleWarning`; see `plausibility`.

    Attributes
    ----------
    value : float or None
        with `ret_metric` the mean squared difference, in parts of the range squared, at
        the moving owner.
    receipt : dict or None
        what each party learned, and what it cost.

    Raises
    ------
    ValueError
        if an argument is out of range.
    """

    operation, party = "freeform", "dipy_ppir.align.freeform:_register_party"

    @warning_for_keywords()
    def __init__(
        self,
        dim=FREEFORM.dim,
        *,
        callback=None,
        session=None,
        parties=None,
        checkpoint=None,
        strict=False,
        **parameters,
    ):
        check_run(session, checkpoint, callback)
        super().__init__(FreeFormParameters(dim=dim, **parameters), callback)
        self.session, self.parties = session, parties
        self.checkpoint, self.strict = checkpoint, bool(strict)
        self.receipt = self.value = None

    def config(self):
        """Public parameters of the registration, JSON-able."""
        return self.parameters.plain()

    def check_here(self, images):
        """See `DeformableRegistration`."""
        p, static = self.parameters, images["static"]
        if p.spacing >= min(static.shape):
            raise ValueError(
                f"a control point every {p.spacing} voxels leaves no room for a "
                f"deformation along an axis of {min(static.shape)} voxels of the "
                "static image; give a smaller spacing"
            )
        for name in ("static", "moving"):
            if not is_remote(images[name]) and np.ptp(self._scaled(images[name])) == 0:
                raise ValueError(
                    f"the {name} image has no values between {p.intensities[0]:g} and "
                    f"{p.intensities[1]:g}; give other intensities, or leave them out"
                )
        check_slices(images["moving"])
        check_pyramid(static.shape, images["static_grid2world"], p.factors)

    # -- the same program at every party ---------------------------------

    def register(self, images, prealign):
        """One registration inside a session; see `optimize`."""
        session = self.session
        self.join(session)
        self.agree(images)
        goes_on = self.checkpoint is not None and begin_or_resume(
            session, self.checkpoint, self.checkpoint_facts(images, prealign)
        )
        records = self.checkpoint.records() if goes_on else []
        self._done = Counter(r["level"] for r in records if "iteration" in r)
        self._ends = sum("ends" in r for r in records)
        self._set_up(images, prealign)
        world = splines(session)
        levels = SplineLevels(self, world)
        self._tell(RegistrationStages.OPT_START)
        with session.phase("spline steps"):
            controls = levels.run(*self._newest(goes_on))
        session.ledger.about(None)
        with session.phase("result"):
            self._before_the_end(levels)
            mismatched, self.value = self._judge(levels, controls, world)
            mapping = self._show(levels, controls)
            journal(session, self.checkpoint)
        self._tell(RegistrationStages.OPT_END)
        facts = {"operation": "freeform", "parameters": self.config()}
        facts |= grid_facts(images)
        arrays = {f"{name} image": images[name] for name in ("static", "moving")}
        facts |= own_arrays(session, **arrays, prealign=prealign)
        concerns = [plausibility.MISMATCH] if mismatched else []
        if mapping is not None:
            facts |= map_facts(mapping)
            concerns += plausibility.of_map(facts["quality"])
            concerns += self.of_overlap(images, mapping.prealign)
        if self.value is not None:
            facts["metric"] = {"name": "mean squared difference", "value": self.value}
        self.receipt = session.receipt(warnings=concerns, **facts)
        return mapping

    def _show(self, levels, controls):
        """The map, at the owners that get it: the static one by its control points."""
        session, receivers = self.session, RESULT_TO[self.parameters.result_to]
        dim, here = self.dim, None
        shape = dim, *levels.lattice(0).control_shape
        if self.conducts:
            here = rounded(controls)
        if STATIC in receivers:
            matrix = np.eye(dim + 1) if self._prealign is None else self._prealign
            matrix = matrix if self.conducts else None
            shown, start = session.open_all(
                [
                    (
                        OwnedArray(MOVING, here, shape, np.int16),
                        "control_points",
                        (STATIC,),
                    ),
                    (
                        OwnedArray(MOVING, matrix, (dim + 1, dim + 1), np.float64),
                        "prealign",
                        (STATIC,),
                    ),
                ]
            )
            if shown is not None:
                here, self._prealign = shown, received_prealign(start)
        if session.pid not in receivers:
            return None
        return self._map(levels, here.astype(np.float64))

    # -- what is opened, counted, and kept -------------------------------

    def _before_opening(self, lattice, bits):
        """Count what is opened in an iteration, before it is."""
        session, level = self.session, self.current_level
        limit = self.parameters.level_iters[-1 - level]
        self._done[level] += 1
        if self._done[level] > REPEATS * limit:
            raise CheckpointError(
                f"after interruptions this level was iterated {REPEATS} times as often "
                "as was agreed, which opens too much; start anew at all parties, "
                "without --resume"
            )
        session.ledger.about(int(np.prod(lattice.shape)))
        ahead = {"control_point_steps": ((MOVING,), self.dim * lattice.size, bits)}
        journal_ahead(
            session, self.checkpoint, ahead, level=level, iteration=self.niter
        )

    def _before_the_end(self, levels):
        """Count what is opened in the end, before it is."""
        p, ahead = self.parameters, {"mismatch": ((MOVING, STATIC), 1, 1)}
        if p.ret_metric:
            ahead["mean_square"] = (MOVING,), 1, MEAN_BITS
        if STATIC in RESULT_TO[p.result_to]:
            size = self.dim * levels.lattice(0).size
            ahead["control_points"] = (STATIC,), size, 16
            ahead["prealign"] = (STATIC,), (self.dim + 1) ** 2, 64
        self._ends += 1
        if self._ends > REPEATS:
            raise CheckpointError(
                f"what the registration shows at its end was shown {REPEATS} times "
                "already; start anew at all parties, without --resume"
            )
        journal_ahead(self.session, self.checkpoint, ahead, ends=True)

    def _level_ends(self, controls):
        """Write down this party's own state at the end of a level."""
        self._tell(RegistrationStages.SCALE_END)
        journal(self.session, self.checkpoint)
        if self.checkpoint is None or not self.current_level:
            return
        arrays = {} if controls is None else {"controls": controls}
        number = len(self.parameters.level_iters) - self.current_level
        self.checkpoint.save(number, {"current_level": self.current_level}, arrays)

    def _newest(self, goes_on):
        """Level to go on with and control points so far; see `_level_ends`."""
        if not goes_on:
            return None, None
        number = agree_on_state(self.session, self.checkpoint)
        self.checkpoint.forget_after(number)
        if number is None:
            return None, None
        facts, arrays = self.checkpoint.load(number)
        return facts["current_level"] - 1, arrays.get("controls")


def _register_party(session, parameters, **images):
    registration = SecureFreeFormRegistration(session=session, **parameters)
    return register_party(registration, images)
