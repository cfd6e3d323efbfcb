"""Symmetric diffeomorphic registration of two images that two parties hold.

Mirrors ``dipy.align.imwarp``: `SecureSymmetricDiffeomorphicRegistration` subclasses
its namesake there and takes the same arguments. SyN moves both images towards a common
reference. With ``reveal="map"`` images and halves of the map stay on shares, see
`carried`. With the others each owner warps its own image, keeps its own half of the
map, and updates and inverts it as DIPY does; only the metric needs both images, and
only the finished halves are exchanged, for the composition.

Every party calls the same functions: the image it does not hold is a `RemoteImage`.
Called with both images, the other two parties are started as processes on this machine
and run the same protocol.
"""

from collections import Counter

from dipy.align.imwarp import (
    DiffeomorphicMap,
    RegistrationStages,
    ScaleSpace,
    SymmetricDiffeomorphicRegistration,
    VerbosityLevels,
    get_direction_and_spacings,
)
from dipy.testing.decorators import warning_for_keywords
import numpy as np
import numpy.linalg as npl

from dipy_ppir.align import plausibility
from dipy_ppir.align.arguments import (
    check_instance,
    check_run,
)
from dipy_ppir.align.carried import (
    CarriedLevels,
    mapping,
)
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
    check_received,
    received_prealign,
    register_party,
)
from dipy_ppir.align.facts import grid_facts, map_facts, own_arrays
from dipy_ppir.align.intensities import flat_part
from dipy_ppir.align.metrics import METRIC_PARAMETERS, METRICS, metric_from
from dipy_ppir.align.parameters import SYN, SYN_CLASS_ITERS, SynParameters
from dipy_ppir.align.remote import (
    OWNERS,
    RemoteImage,
    is_remote,
)
from dipy_ppir.align.validation import (
    check_single_precision,
)
from dipy_ppir.mpc.algebra import Secret
from dipy_ppir.mpc.arrays import OwnedArray
from dipy_ppir.mpc.crosscorr import LEAST_DEVIATION, check_grid
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC, declare
from dipy_ppir.mpc.worlds import shares

__all__ = [
    "DiffeomorphicMap",
    "RegistrationStages",
    "SecureSymmetricDiffeomorphicRegistration",
]

for _owner, _receiver, _name in (
    (MOVING, STATIC, "moving"),
    (STATIC, MOVING, "static"),
):
    declare(
        f"{_name}_to_ref",
        receivers=(_receiver,),
        shape="grid of the static image x dim x 2, once",
        meaning=f"the {ROLES[_owner]}'s half of the resulting map, to compose it with "
        "its own",
        bits=64,
    )
declare(
    "prealign",
    receivers=(STATIC,),
    shape="(dim + 1) x (dim + 1), once",
    meaning="the affine transform from which the registration started",
    bits=64,
)

# Command words of the moving owner, which conducts.
END_LEVEL, ITERATE, SAVE_AND_ITERATE = 0, 1, 2

#: How many times the agreed iterations a level may take with interruptions.
REPEATS = 2
# What a checkpoint keeps of the registration, and of this party's half of the map.
_STATE = (
    "current_level",
    "niter",
    "energy_list",
    "full_energy_profile",
    "_derivative",
)
_HALF = ("forward", "backward", "disp_shape", "disp_grid2world", "disp_world2grid")


class SecureSymmetricDiffeomorphicRegistration(
    DeformableRegistration, SymmetricDiffeomorphicRegistration
):
    """Symmetric diffeomorphic registration (SyN) of two parties' images.

    Takes the place of ``dipy.align.imwarp.SymmetricDiffeomorphicRegistration``.

    Parameters
    ----------
    metric : SecureCCMetric, SecureSSDMetric or SecureMINDMetric
    level_iters : list of int, optional
        iterations at each level, from the coarsest to the finest.
    step_length, opt_tol, inv_iter, inv_tol
        as in DIPY.
    ss_sigma_factor : float, optional
        as in DIPY; by default 0.4 where the metric opens the map only, else DIPY's 0.2,
        which leaves coarse levels undersampled.
    callback : callable, optional
        called with this object and a `RegistrationStages`, as in DIPY; at the helper
        only at the ends of levels and iterations.
    session : Session, optional
        this party's session. By default the other parties are started as processes on
        this machine.
    parties : {3, 2}, optional
        how many there are then: two owners and a helper, by default, or two owners
        alone.
    result_to : {"both", "moving", "static"}, optional
        which image owners get the resulting map.
    checkpoint : Checkpoint, optional
        where this party keeps its state, to go on after an interruption; needs a
        session.
    strict : bool, optional
        raise an `ImplausibleError` where a result that is not plausible otherwise is
        an `ImplausibleWarning`; see `plausibility`.

    Attributes
    ----------
    static_to_ref, moving_to_ref : DiffeomorphicMap or None
        the two halves; each at its owner, at the end also at who gets the result. With
        ``reveal="map"`` None at the end: the composed map is opened, and no half.
    receipt : dict or None
        what each party learned, and what it cost, since the session began its run.

    Raises
    ------
    ValueError
        if an argument is out of range.
    """

    operation, party = "syn", "dipy_ppir.align.imwarp:_register_party"

    @warning_for_keywords()
    def __init__(
        self,
        metric,
        *,
        level_iters=None,
        step_length=SYN.step_length,
        ss_sigma_factor=None,
        opt_tol=SYN.opt_tol,
        inv_iter=SYN.inv_iter,
        inv_tol=SYN.inv_tol,
        callback=None,
        session=None,
        parties=None,
        result_to=SYN.result_to,
        checkpoint=None,
        strict=False,
    ):
        check_instance(
            metric,
            tuple(METRICS.values()),
            "metric",
            "make one with SecureCCMetric(3), or 2 for 2D images; metrics of DIPY read "
            "both images",
        )
        check_run(session, checkpoint, callback)
        #: What was asked for, checked.
        self.parameters = SynParameters(
            level_iters=SYN_CLASS_ITERS if level_iters is None else level_iters,
            step_length=step_length,
            ss_sigma_factor=ss_sigma_factor,
            opt_tol=opt_tol,
            inv_iter=inv_iter,
            inv_tol=inv_tol,
            result_to=result_to,
            **({} if metric is None else metric.config()),
        )
        super().__init__(
            metric,
            level_iters=list(self.parameters.level_iters),
            step_length=self.parameters.step_length,
            ss_sigma_factor=self.parameters.ss_sigma_factor,
            opt_tol=self.parameters.opt_tol,
            inv_iter=self.parameters.inv_iter,
            inv_tol=self.parameters.inv_tol,
            callback=callback,
        )
        self.verbosity = VerbosityLevels.NONE
        self.session, self.parties = session, parties
        self.result_to = self.parameters.result_to
        self.checkpoint = checkpoint
        self.strict = bool(strict)
        self.receipt = None

    def config(self):
        """Public parameters of the registration, JSON-able."""
        return {
            "metric": self.metric.config(),
            "level_iters": [int(n) for n in self.level_iters],
            "step_length": float(self.step_length),
            "ss_sigma_factor": float(self.ss_sigma_factor),
            "opt_tol": float(self.opt_tol),
            "inv_iter": int(self.inv_iter),
            "inv_tol": float(self.inv_tol),
            "result_to": self.result_to,
        }

    def flat_config(self):
        """Those of `config`, of `SynParameters`."""
        config = self.config()
        return {**config.pop("metric"), **config}

    def join(self, session):
        """Make the registration part of `session`, or of none with None."""
        super().join(session)
        self.metric.join(session)

    def check_here(self, images):
        """See `DeformableRegistration`."""
        for name in ("static", "moving"):
            check_single_precision(images[name], name)
        shape, grid2world = images["static"].shape, images["static_grid2world"]
        scales = self._scale_space(RemoteImage(shape), grid2world)
        for level in range(self.levels):
            if self.level_iters[self.levels - 1 - level]:
                at_level = scales.get_domain_shape(level)
                self.metric.check_level(at_level, "static")
                if self.metric.reveal != "map":
                    check_grid(at_level, self.metric.reveal)

    # -- the same program at every party ---------------------------------

    def register(self, images, prealign):
        """One registration inside a session; see `optimize`."""
        self.join(self.session)
        self.agree(images)
        self._goes_on = self.checkpoint is not None and begin_or_resume(
            self.session, self.checkpoint, self.checkpoint_facts(images, prealign)
        )
        records = self.checkpoint.records() if self._goes_on else []
        self._done = Counter(r["level"] for r in records if "level" in r)
        self._begun = Counter(r["begun"] for r in records if "begun" in r)
        arrays = {f"{name} image": images[name] for name in ("static", "moving")}
        images, facts, concerns = self._prepared(images)
        self._mismatched = False
        self._init_optimizer(prealign=prealign, **images)
        concerns += self._of_levels()
        self._optimize()
        self._end_optimizer()
        facts |= {"operation": "syn", "parameters": self.config()}
        facts |= grid_facts(images)
        facts |= own_arrays(self.session, **arrays, prealign=prealign)
        if self._mismatched:
            concerns.append(plausibility.MISMATCH)
        if self.static_to_moving is not None:
            facts |= map_facts(self.static_to_moving)
            concerns += plausibility.of_map(facts["quality"])
            concerns += self.of_overlap(images, self.static_to_moving.prealign)
        if self.full_energy_profile:
            energy = float(self.full_energy_profile[-1])
            facts["metric"] = {"name": "energy", "value": energy}
        self.receipt = self.session.receipt(warnings=concerns, **facts)
        return self.static_to_moving

    def _prepared(self, images):
        """Images as they are registered, facts for the receipt, and what is odd.

        Returns
        -------
        images, facts : dict
        concerns : list of str
        """
        facts, concerns = {}, []
        for name in OWNERS:
            image = images[name]
            if is_remote(image):
                continue
            if self.metric.reveal == "map":
                image, outliers, equal, flat = self.metric.prepared(image)
                if outliers:
                    facts["winsorized_voxels"] = outliers
                if equal:
                    facts["equalized"] = True
                images = {**images, name: image}
            else:
                radius = self.metric.radius
                equal, flat = False, flat_part(image, radius, LEAST_DEVIATION)
            concerns += plausibility.of_windows(flat, equal, name)
        return images, facts, concerns

    def _of_levels(self):
        """Concerns about the levels that are used."""
        return [
            concern
            for level in range(self.levels)
            if self.level_iters[-1 - level]
            for concern in plausibility.of_level(
                level, self.static_ss.get_domain_shape(level), self.metric.window
            )
        ]

    def _before_judging(self):
        """Count what is opened about the match, before it is."""
        ahead = {"mismatch": ((MOVING, STATIC), 1, 1)}
        journal_ahead(self.session, self.checkpoint, ahead)

    def _judged(self, mismatched):
        """What was opened about the match in the end."""
        self._mismatched = mismatched

    def _scale_space(self, image, grid2world):
        _, spacing = get_direction_and_spacings(grid2world, self.dim)
        remote = is_remote(image)
        if remote:
            # Only the grids are needed; without smoothing they cost little.
            image = np.zeros(image.shape, dtype=np.float32)
        with np.errstate(all="ignore" if remote else None):
            return ScaleSpace(
                np.asarray(image).astype(np.float32),
                self.levels,
                image_grid2world=grid2world,
                input_spacing=spacing,
                sigma_factor=0.0 if remote else self.ss_sigma_factor,
                mask0=self.mask0,
            )

    def _init_optimizer(
        self, static, moving, static_grid2world, moving_grid2world, prealign
    ):
        # Follows DIPY step by step, each owner with its own image.
        self._connect_functions()
        direction, _ = get_direction_and_spacings(static_grid2world, self.dim)
        self.static_direction = np.eye(self.dim + 1)
        self.static_direction[: self.dim, : self.dim] = direction
        self._static, self._moving = static, moving
        self.static_ss = self._scale_space(static, static_grid2world)
        self.moving_ss = None
        if not is_remote(moving):
            self.moving_ss = self._scale_space(moving, moving_grid2world)
        reference = {
            "dim": self.dim,
            "disp_shape": self.static_ss.get_domain_shape(self.levels - 1),
            "disp_grid2world": self.static_ss.get_affine(self.levels - 1),
            "codomain_shape": static.shape,
            "codomain_grid2world": static_grid2world,
        }
        self.static_to_ref = DiffeomorphicMap(
            domain_shape=static.shape,
            domain_grid2world=static_grid2world,
            prealign=None,
            **reference,
        )
        self.moving_to_ref = DiffeomorphicMap(
            domain_shape=moving.shape,
            domain_grid2world=moving_grid2world,
            prealign=None if prealign is None else npl.inv(prealign),
            **reference,
        )
        self.static_to_moving = None
        for half in self._own_halves():
            half.allocate()

    def _own_halves(self):
        """The maps of the images that are here."""
        halves = []
        if not is_remote(self._static):
            halves.append(self.static_to_ref)
        if not is_remote(self._moving):
            halves.append(self.moving_to_ref)
        return halves

    def _end_optimizer(self):
        super()._end_optimizer()
        del self._static, self._moving

    def _tell(self, stage):
        if self.callback is not None:
            self.callback(self, stage)

    def _optimize(self):
        if self.metric.reveal == "map":
            self._carry()
            return
        self.full_energy_profile = []
        self._tell(RegistrationStages.OPT_START)
        first, resumed = self.levels - 1, self._restore()
        if resumed:
            first = self.current_level
        for level in range(first, -1, -1):
            self.current_level = level
            self.metric.set_levels_below(self.levels - level)
            self.metric.set_levels_above(level)
            if not resumed:
                if level < self.levels - 1:
                    factors = self.static_ss.get_expand_factors(level + 1, level)
                    shape = self.static_ss.get_domain_shape(level)
                    for half in self._own_halves():
                        half.expand_fields(factors, shape)
                self.niter = 0
                self.energy_list = []
                self._derivative = np.inf
            resumed = False
            self._tell(RegistrationStages.SCALE_START)
            while self._continues():
                self._derivative = self._iterate()
                self.niter += 1
            self.full_energy_profile.extend(self.energy_list)
            self._tell(RegistrationStages.SCALE_END)
        self._compose()
        self._tell(RegistrationStages.OPT_END)

    def _continues(self):
        """Whether there is another iteration: the moving owner says so."""
        session, limit = self.session, self.level_iters[-1 - self.current_level]
        if session.pid == MOVING:
            command = END_LEVEL
            if self.niter < limit and self.opt_tol < self._derivative:
                due = self.checkpoint is not None and self.checkpoint.due
                command = SAVE_AND_ITERATE if due else ITERATE
            session.tell(command)
        else:
            command = session.hear()
        if command not in (ITERATE, SAVE_AND_ITERATE, END_LEVEL):
            raise ProtocolError("the moving owner sent an unknown command", MOVING)
        if command != END_LEVEL and self.niter >= limit:
            raise ProtocolError(
                f"the moving owner asked for more than the {limit} iterations that "
                "were agreed",
                MOVING,
            )
        if command != END_LEVEL:
            self._done[self.current_level] += 1
            if self._done[self.current_level] > REPEATS * limit:
                raise CheckpointError(
                    f"after interruptions this level was iterated {REPEATS} times as "
                    "often as was agreed, which opens too much; start anew at all "
                    "parties, without --resume, and with a smaller checkpoint time-out"
                )
        if command == SAVE_AND_ITERATE:
            self._save()
        return command != END_LEVEL

    # -- nothing opened within a level -----------------------------------

    def _carry(self):
        """Register by images carried along on shares; see `carried`."""
        session = self.session
        self.full_energy_profile = []  # no energy is opened
        images = {"static": self._static, "moving": self._moving}
        here = [OWNERS[name] for name, image in images.items() if not is_remote(image)]
        world = shares(session)
        levels = CarriedLevels(self, world, here)
        receivers = RESULT_TO[self.result_to]
        self._tell(RegistrationStages.OPT_START)
        session.ledger.about(None)
        with session.phase(self.metric.phase):
            displacements = levels.run(*self._go_on(world))
        with session.phase("result"):
            field = levels.show_map(displacements, receivers)
            if displacements is not None:
                journal(session, self.checkpoint)
            self._share_prealign()
        if session.pid in receivers:
            self.static_to_moving = mapping(self, field)
        self.static_to_ref = self.moving_to_ref = None
        self._tell(RegistrationStages.OPT_END)

    def _before_level(self, level):
        """Count how often a level is begun: each time a few bits are opened."""
        self._begun[level] += 1
        if self._begun[level] > REPEATS + 1:
            raise CheckpointError(
                f"after interruptions this level was begun {REPEATS + 1} times "
                "already; start anew at all parties, without --resume"
            )
        journal(self.session, self.checkpoint, begun=level)

    def _before_opening(self, level, openings):
        """Count what is opened at the end of a level, before it is.

        Each time it is rounded anew, so that many times would show more digits.

        Parameters
        ----------
        level : int
        openings : sequence of Opening
        """
        self._done[level] += 1
        if self._done[level] > REPEATS:
            raise CheckpointError(
                f"after interruptions the end of this level was opened {REPEATS} times "
                "already, which shows more than was agreed; start anew at all parties, "
                "without --resume"
            )
        ahead = {x.label: (x.receivers, x.size, x.bits) for x in openings}
        journal_ahead(self.session, self.checkpoint, ahead, level=level)

    def _level_ended(self, level, displacements):
        """Write down this party's own state at the end of a level."""
        journal(self.session, self.checkpoint)
        if self.checkpoint is None:
            return
        world, arrays = shares(self.session), {}
        facts = {"current_level": level, "units": {}, "mismatched": self._mismatched}
        for owner, fields in displacements.items():
            for axis, field in enumerate(fields):
                name = f"part-{owner}-{axis}"
                facts["units"][name] = field.unit
                if self.session.pid != HELPER:
                    arrays[name] = world.kept(field)
        for half in self._own_halves():
            arrays |= {name: getattr(half, name) for name in _HALF}
        self.checkpoint.save(self.levels - level, facts, arrays)

    def _go_on(self, world):
        """The level to go on with, and the halves so far; see `_level_ended`."""
        state = self._newest()
        if state is None:
            return None, None
        facts, arrays = state
        self._mismatched = facts["mismatched"]
        for half in self._own_halves():
            for name in _HALF:
                setattr(half, name, arrays[name])
        parts = []
        shape = CarriedLevels(self, world, ()).level(facts["current_level"])
        for name, unit in facts["units"].items():
            parts.append(Secret(arrays.get(name), unit, shape.operators.coarse))
        parts = world.masked(*parts)
        owners = (STATIC, MOVING)
        displacements = {
            owner: parts[k * self.dim : (k + 1) * self.dim]
            for k, owner in enumerate(owners)
        }
        return facts["current_level"] - 1, displacements

    # -- checkpoints -----------------------------------------------------

    def _save(self):
        """Write down this party's own state; the others do so at the same iteration."""
        if self.checkpoint is None:
            return
        facts = {name: getattr(self, name) for name in _STATE}
        facts["iterations"] = self.metric.iterations
        facts["energy"] = None if self.metric.energy is None else self.metric.energy
        arrays = {}
        for half in self._own_halves():
            arrays = {name: getattr(half, name) for name in _HALF}
        self.checkpoint.save(self.metric.iterations, facts, arrays)

    def _restore(self):
        """Go back to the newest state that all parties have; False without any."""
        state = self._newest()
        if state is None:
            return False
        facts, arrays = state
        for name in _STATE:
            setattr(self, name, facts[name])
        self.metric.iterations = facts["iterations"]
        self.metric.energy = facts["energy"]
        for half in self._own_halves():
            for name in _HALF:
                setattr(half, name, arrays[name])
        return True

    def _newest(self):
        """The newest state that all parties have, None without any."""
        if not self._goes_on:
            return None
        number = agree_on_state(self.session, self.checkpoint)
        self.checkpoint.forget_after(number)
        return None if number is None else self.checkpoint.load(number)

    def _iterate(self):
        """One iteration at this party; see ``dipy.align.imwarp``."""
        level = self.current_level
        shape = self.static_ss.get_domain_shape(level)
        grid2world = self.static_ss.get_affine(level)
        world2grid = self.static_ss.get_affine_inv(level)
        spacing = self.static_ss.get_spacing(level)
        metric, own = self.metric, None
        remote = RemoteImage(shape)
        place = (grid2world, spacing, self.static_direction)
        metric.set_static_image(remote, *place)
        metric.set_moving_image(remote, *place)
        if not is_remote(self._static):
            own, image = self.static_to_ref, self.static_ss.get_image(level)
            metric.set_static_image(self._warp(own, image, shape, grid2world), *place)
        elif not is_remote(self._moving):
            own, image = self.moving_to_ref, self.moving_ss.get_image(level)
            metric.set_moving_image(self._warp(own, image, shape, grid2world), *place)
        # Before anything is opened, so that no repetition goes uncounted; and after.
        journal(self.session, self.checkpoint, level=level, iteration=self.niter)
        metric.initialize_iteration()
        journal(self.session, self.checkpoint)
        if own is None:
            self._tell(RegistrationStages.ITER_END)
            metric.free_iteration()
            return np.inf
        self._tell(RegistrationStages.ITER_START)
        if own is self.static_to_ref:
            step = metric.compute_forward()
        else:
            step = metric.compute_backward()
        self._advance(own, step, world2grid, spacing)
        derivative = np.inf
        if len(self.energy_list) >= self.energy_window:
            derivative = self._get_energy_derivative()
        # DIPY adds up the energies of the two steps, which are equal.
        self.energy_list.append(2 * metric.get_energy())
        self._tell(RegistrationStages.ITER_END)
        metric.free_iteration()
        return derivative

    def _warp(self, half, image, shape, grid2world):
        return half.transform_inverse(
            image,
            interpolation="linear",
            image_world2grid=None,
            out_shape=shape,
            out_grid2world=grid2world,
        )

    def _advance(self, half, step, world2grid, spacing):
        """Move one half of the map along a step, and invert it, as DIPY does."""
        for axis in range(self.dim):
            edge = [slice(None)] * self.dim
            for at in (0, -1):
                edge[axis] = at
                step[tuple(edge)] = 0
        longest = np.sqrt(np.sum((step / spacing) ** 2, -1)).max()
        if longest > 0:
            step /= longest
        half.forward, _ = self.update(half.forward, step, world2grid, self.step_length)
        options = world2grid, spacing, self.inv_iter, self.inv_tol
        half.backward = np.array(
            self.invert_vector_field(half.forward, *options, start=half.backward)
        )
        half.forward = np.array(
            self.invert_vector_field(half.backward, *options, start=half.forward)
        )

    def _compose(self):
        """Exchange the finished halves and compose them, where the result goes."""
        session = self.session
        session.ledger.about(None)
        shape = (*map(int, self.static_ss.get_domain_shape(0)), self.dim, 2)
        with session.phase("result"):
            if STATIC in RESULT_TO[self.result_to]:
                self._hand_over(MOVING, STATIC, "moving_to_ref", shape)
                self._share_prealign()
            if MOVING in RESULT_TO[self.result_to]:
                self._hand_over(STATIC, MOVING, "static_to_ref", shape)
        if session.pid not in RESULT_TO[self.result_to]:
            return
        composed = self.moving_to_ref.warp_endomorphism(self.static_to_ref.inverse())
        self.static_to_moving = composed.inverse()
        for name in ("forward", "backward"):
            whole = np.array(getattr(self.static_to_moving, name))
            setattr(self.static_to_moving, name, whole)

    def _share_prealign(self):
        """Show the static owner where it started, if it gets the result."""
        if STATIC not in RESULT_TO[self.result_to]:
            return
        inverse = self.moving_to_ref.prealign
        matrix = np.eye(self.dim + 1) if inverse is None else npl.inv(inverse)
        matrix = OwnedArray(MOVING, matrix, (self.dim + 1, self.dim + 1), np.float64)
        matrix = self.session.open(matrix, "prealign", (STATIC,))
        if matrix is None:
            return
        matrix = received_prealign(matrix)
        if matrix is None:
            return
        self.moving_to_ref.prealign = npl.inv(matrix)
        self.moving_to_ref.prealign_inv = matrix

    def _hand_over(self, owner, receiver, name, shape):
        half = getattr(self, name)
        fields = None
        if self.session.pid == owner:
            fields = np.stack([half.forward, half.backward], axis=-1)
        fields = self.session.open(
            OwnedArray(owner, fields, shape, np.float32), name, (receiver,)
        )
        if fields is not None:
            check_received(fields, owner)
            half.disp_shape = np.array(shape[: self.dim], dtype=np.int32)
            half.disp_grid2world = self.static_ss.get_affine(0)
            half.disp_world2grid = self.static_ss.get_affine_inv(0)
            half.forward = np.ascontiguousarray(fields[..., 0])
            half.backward = np.ascontiguousarray(fields[..., 1])


def registration_from(parameters, *, session=None, **others):
    """The registration that parameters describe.

    Parameters
    ----------
    parameters : dict
        of `SynParameters`.
    session : Session, optional
    **others
        of `SecureSymmetricDiffeomorphicRegistration`.

    Returns
    -------
    registration : SecureSymmetricDiffeomorphicRegistration
    """
    parameters = dict(parameters)
    metric = {name: parameters.pop(name) for name in METRIC_PARAMETERS}
    metric = metric_from(metric, session)
    return SecureSymmetricDiffeomorphicRegistration(
        metric, session=session, **parameters, **others
    )


def _register_party(session, parameters, **images):
    return register_party(registration_from(parameters, session=session), images)
