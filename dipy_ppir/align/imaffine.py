"""Affine registration of two images that two parties hold.

Mirrors ``dipy.align.imaffine``: `SecureMutualInformationMetric` and
`SecureAffineRegistration` subclass their namesakes there and take the same
arguments. The moving owner keeps the transform's parameters. By default the optimizer
runs on shares at all three parties (`quasinewton.minimise`), and what the moving owner
is shown are the steps that it takes; with the other choices of ``reveal`` one of
DIPY's runs at the moving owner, and the others take part in every evaluation of the
metric. Each owner builds the scale space of its own image.

Every party calls the same functions: the image it does not hold is a
`RemoteImage`. Called with both images, the other two parties are started as
processes on this machine and run the same protocol.
"""

from typing import NamedTuple

from dipy.align.imaffine import (
    AffineInvalidValuesError,
    AffineInversionError,
    AffineMap,
    AffineRegistration,
    transform_geometric_centers,
    transform_origins,
)
from dipy.align.imwarp import ScaleSpace, get_direction_and_spacings
from dipy.align.scalespace import IsotropicScaleSpace
from dipy.align.transforms import regtransforms
from dipy.core.optimize import Optimizer
from dipy.testing.decorators import warning_for_keywords
import numpy as np

from dipy_ppir.align import plausibility
from dipy_ppir.align.agreed import keep_to
from dipy_ppir.align.alone import check_parties
from dipy_ppir.align.arguments import (
    check_instance,
    check_run,
    check_transform,
    image_array,
    mask_array,
    matrix_array,
    parameters_array,
)
from dipy_ppir.align.ccmetric import SecureCrossCorrelationMetric
from dipy_ppir.align.centers import (
    START_PART,
    precision_for,
    transform_centers_of_mass,
    world_center_of_mass,
)
from dipy_ppir.align.checkpoint import (
    digest,
    journal,
    journal_ahead,
)
from dipy_ppir.align.facts import grid_facts, own_arrays, transform_facts
from dipy_ppir.align.frames import GROUPS, Frame
from dipy_ppir.align.hidden import (
    RESULT_PLACES,
    FramedMutualInformation,
    Hidden,
    check_path,
    check_start,
    hide,
    longest_step,
    minimise_hidden,
    reach,
    show,
)
from dipy_ppir.align.memory import check_session
from dipy_ppir.align.mimetric import SecureMutualInformationMetric
from dipy_ppir.align.parameters import (
    AFFINE,
    AFFINE_CLASS_ITERS,
    PIPELINE_STEPS,
    AffineParameters,
    ParameterError,
    shown,
)
from dipy_ppir.align.quasinewton import SCALE
from dipy_ppir.align.remote import RemoteImage, grid2world_of, is_remote, split, unite
from dipy_ppir.align.resumption import Resumption
from dipy_ppir.align.secretmetric import secret_numbers
from dipy_ppir.align.ssdmetric import SecureSquaredDifferencesMetric
from dipy_ppir.align.validation import (
    check_image,
    check_mask,
    check_pyramid,
    check_slices,
    check_starting_affine,
    is_named,
    masked,
    usable_mask,
)
from dipy_ppir.mpc import local
from dipy_ppir.mpc.fields import P127
from dipy_ppir.mpc.ledger import MOVING, STATIC, declare
from dipy_ppir.mpc.numbers import VALUE_BITS
from dipy_ppir.mpc.protocols import share

__all__ = [
    "AffineInvalidValuesError",
    "AffineInversionError",
    "AffineMap",
    "SecureAffineRegistration",
    "SecureCrossCorrelationMetric",
    "SecureMutualInformationMetric",
    "SecureSquaredDifferencesMetric",
    "transform_centers_of_mass",
    "transform_geometric_centers",
    "transform_origins",
]

declare(
    "affine",
    receivers=(STATIC,),
    shape="(dim + 1) x (dim + 1), once",
    meaning="the resulting transform",
    bits=121.1,
)


class Found(NamedTuple):
    """What a step of a pipeline found; see `SecureAffineRegistration.run`.

    Attributes
    ----------
    affine : array, shape (dim + 1, dim + 1), or Hidden
        at the moving owner; elsewhere the identity. With hidden steps `Hidden` but
        after the last step.
    xopt, fopt
        of `optimize`, at the moving owner.
    origin : array, shape (dim + 1, dim + 1), or None
        where the pipeline began, at the moving owner.
    """

    affine: np.ndarray
    xopt: np.ndarray
    fopt: float
    origin: np.ndarray


#: Metrics by their names.
METRICS = {
    kind.name: kind
    for kind in (
        SecureMutualInformationMetric,
        SecureSquaredDifferencesMetric,
        SecureCrossCorrelationMetric,
    )
}
_TRANSFORM_NAMES = {type(t): key for key, t in regtransforms.items()}
_STEP_NAMES = {kind: step for step, kind in PIPELINE_STEPS.items()}


class SecureAffineRegistration(AffineRegistration):
    """Multi-resolution affine registration of two parties' images.

    Takes the place of ``dipy.align.imaffine.AffineRegistration``.

    Parameters
    ----------
    metric : SecureMutualInformationMetric, SecureSquaredDifferencesMetric or \
SecureCrossCorrelationMetric, optional
        by default the first with default settings.
    level_iters, sigmas, factors, method, ss_sigma_factor, options, verbosity
        as in DIPY. With ``reveal="transform"`` no level has more evaluations than
        `level_iters`, and few have as many: their number is planned (`plan`);
        ``options={"evaluations": 2}`` makes twice as many, and `method` cannot be
        chosen.
    session : Session, optional
        this party's session. By default the other parties are started as
        processes on this machine.
    parties : {3, 2}, optional
        how many there are then: two owners and a helper, by default, or two owners
        alone.
    callback : callable, optional
        called with every evaluation with a dict of ``step``, ``level``,
        ``iteration``, ``bytes_sent`` and, at the moving owner, ``value``.
    result_to : {"both", "moving"}, optional
        which image owners get the resulting transform.
    checkpoint : Checkpoint, optional
        where this party keeps its state, to go on after an interruption; needs a
        session.
    strict : bool, optional
        raise an `ImplausibleError` where a result that is not plausible otherwise is
        an `ImplausibleWarning`; see `plausibility`.

    Attributes
    ----------
    receipt : dict or None
        what each party learned in the last registration and what it cost.

    Raises
    ------
    ValueError
        if parameters contradict each other.
    """

    @warning_for_keywords()
    def __init__(
        self,
        *,
        metric=None,
        level_iters=None,
        sigmas=None,
        factors=None,
        method=AFFINE.method,
        ss_sigma_factor=None,
        options=None,
        verbosity=0,
        session=None,
        parties=None,
        callback=None,
        result_to=AFFINE.result_to,
        checkpoint=None,
        strict=False,
    ):
        if metric is None:
            metric = SecureMutualInformationMetric()
        check_instance(
            metric,
            tuple(METRICS.values()),
            "metric",
            "make one with SecureMutualInformationMetric(), for example; any other "
            "metric reads both images",
        )
        check_run(session, checkpoint, callback)
        evaluations, options = split_options(options)
        #: What was asked for, checked.
        self.parameters = AffineParameters(
            level_iters=AFFINE_CLASS_ITERS if level_iters is None else level_iters,
            sigmas=sigmas,
            factors=factors,
            method=method,
            ss_sigma_factor=ss_sigma_factor,
            evaluations=evaluations,
            result_to=result_to,
            **metric.config(),
        )
        if options and metric.reveal == "transform":
            raise ParameterError(
                'with {reveal}="transform" the one option is "evaluations", how many '
                f"times the planned evaluations are made; got {shown(options)}"
            )
        super().__init__(
            metric=metric,
            level_iters=list(self.parameters.level_iters),
            sigmas=_listed(self.parameters.sigmas),
            factors=_listed(self.parameters.factors),
            method=self.parameters.method,
            ss_sigma_factor=self.parameters.ss_sigma_factor,
            options=options,
            verbosity=verbosity,
        )
        self.scale = self.parameters.evaluations
        self.session, self.parties = session, parties
        self.callback = callback
        self.result_to = self.parameters.result_to
        self.strict = bool(strict)
        self.receipt = None
        self.step = None
        self.checkpoint = checkpoint
        #: Which step of a pipeline this is, and where an interrupted run goes on.
        self.step_number, self._resumption = 0, Resumption(checkpoint)

    # -- the same program at every party ---------------------------------

    @warning_for_keywords()
    def optimize(
        self,
        static,
        moving,
        transform,
        params0,
        *,
        static_grid2world=None,
        moving_grid2world=None,
        starting_affine=None,
        ret_metric=False,
        static_mask=None,
        moving_mask=None,
    ):
        """Register, as DIPY does, without showing either image.

        Parameters
        ----------
        static, moving : array or RemoteImage
            the image that another party holds is a `RemoteImage`.
        transform : instance of Transform
        params0 : array or None
            parameters to start from, at the moving owner.
        static_grid2world, moving_grid2world : array, optional
            voxel-to-space transformations, mm.
        starting_affine : {"mass", "voxel-origin", "centers"}, array or None
            as in DIPY; a matrix is the moving owner's.
        ret_metric : bool, optional
            also return the parameters and the metric value.
        static_mask, moving_mask : array, optional
            masks of the images that are here.

        Returns
        -------
        affine_map : AffineMap
            the result, at the owners that get it.
        xopt, fopt
            with `ret_metric`: optimal parameters of the last level and the value
            of the metric there, at the moving owner; None elsewhere.

        Raises
        ------
        ValueError
            if an image, mask or parameter cannot be used; before any connection
            is opened.
        ParameterMismatchError
            if the parties do not use the same parameters.
        ImplausibleError
            with `strict`, if the result is not plausible.
        """
        check_parties(self.parties, self.session, "affine", self.parameters)
        static, moving = image_array(static, "static"), image_array(moving, "moving")
        static_grid2world = matrix_array(static_grid2world, "static_grid2world")
        moving_grid2world = matrix_array(moving_grid2world, "moving_grid2world")
        static_mask = mask_array(static_mask, "static")
        moving_mask = mask_array(moving_mask, "moving")
        check_image(static, static_grid2world, "static")
        check_image(moving, moving_grid2world, "moving")
        if len(static.shape) != len(moving.shape):
            raise ValueError("static and moving images must have the same dimension")
        check_transform(transform, len(static.shape))
        params0 = parameters_array(params0, transform)
        check_slices(moving)
        check_mask(static_mask, static, "static")
        check_mask(moving_mask, moving, "moving")
        self.metric.check_masks(static_mask, moving_mask)
        starting_affine = check_starting_affine(starting_affine, len(static.shape))
        if self.metric.reveal == "transform":
            self.planned(transform)
        if self.metric.hide_steps and isinstance(starting_affine, np.ndarray):
            check_start(starting_affine, _TRANSFORM_NAMES[type(transform)][0])
        if is_named(starting_affine, "mass"):
            check_centers(
                static=(static, static_grid2world, static_mask),
                moving=(moving, moving_grid2world, moving_mask),
            )
        if self.use_isotropic:
            check_pyramid(
                static.shape, grid2world_of(static, static_grid2world), self.factors
            )
        arguments = {
            "static": static,
            "moving": moving,
            "static_grid2world": static_grid2world,
            "moving_grid2world": moving_grid2world,
            "static_mask": static_mask,
            "moving_mask": moving_mask,
        }
        if self.session is not None:
            name = list(_TRANSFORM_NAMES[type(transform)])
            step = _STEP_NAMES.get(name[0], name[0].lower())
            self.keep_to_file(self.session, [step], starting_affine, ret_metric)
            self.agree(transform, starting_affine, ret_metric=ret_metric, **arguments)
            self.begin_checkpoint(
                [name], starting_affine, ret_metric=ret_metric, **arguments
            )
            found = self.run(
                transform,
                params0,
                starting_affine=starting_affine,
                ret_metric=ret_metric,
                **arguments,
            )
            affine, concerns = self.end(found, arguments)
            affine_map = AffineMap(
                affine,
                domain_grid_shape=static.shape,
                domain_grid2world=grid2world_of(static, static_grid2world),
                codomain_grid_shape=moving.shape,
                codomain_grid2world=grid2world_of(moving, moving_grid2world),
            )
            self.make_receipt(
                arguments,
                starting_affine,
                affine_map.affine,
                found.fopt,
                warnings=concerns,
                transform=name,
            )
            plausibility.tell(concerns, strict=self.strict)
            return (affine_map, *found[1:3]) if ret_metric else affine_map
        if is_remote(static) or is_remote(moving):
            raise ValueError(
                "a RemoteImage needs a session with the party that holds the image"
            )
        if self.checkpoint is not None:
            raise ValueError("a checkpoint needs a session; leave it out")
        here, there, helper = split(arguments)
        common = {
            "config": self.config(),
            "ret_metric": ret_metric,
            "transform": list(_TRANSFORM_NAMES[type(transform)]),
            "starting_affine": starting_affine
            if isinstance(starting_affine, str)
            else None,
        }
        result = local.run_locally(
            lambda session: self._run_here(
                session, transform, params0, starting_affine, ret_metric, here
            ),
            "dipy_ppir.align.imaffine:_optimize_party",
            parties=self.parties,
            moving={},
            static={**common, **there},
            helper={**common, **helper},
        )[MOVING]
        return result if ret_metric else result[0]

    def _run_here(
        self, session, transform, params0, starting_affine, ret_metric, images
    ):
        self.join(session)
        try:
            result = self.optimize(
                transform=transform,
                params0=params0,
                starting_affine=starting_affine,
                ret_metric=ret_metric,
                **images,
            )
            return result if ret_metric else (result,)
        finally:
            self.join(None)

    def join(self, session):
        """Make the registration part of `session`, or of none with None."""
        self.session = session
        self.metric.join(session)

    def config(self):
        """Public parameters of the registration, JSON-able."""
        return {
            **self.metric.config(),
            "method": self.method,
            "evaluations": self.scale,
            "level_iters": [int(n) for n in self.level_iters],
            "factors": list(self.factors) if self.use_isotropic else None,
            "sigmas": list(self.sigmas) if self.use_isotropic else None,
            "ss_sigma_factor": None if self.use_isotropic else self.ss_sigma_factor,
            "result_to": self.result_to,
        }

    def keep_to_file(self, session, pipeline, starting_affine, ret_metric):
        """Refuse what the session file, if there is one, does not say.

        Parameters
        ----------
        session : Session
        pipeline : sequence of str
            the steps that will be taken.
        starting_affine, ret_metric
            see `optimize`.

        Raises
        ------
        ParameterMismatchError
            before anything is sent.
        """
        named = starting_affine is None or isinstance(starting_affine, str)
        call = {
            **self.config(),
            "pipeline": list(pipeline),
            "starting_affine": starting_affine if named else None,
            "ret_metric": bool(ret_metric),
            "optimizer_options": dict(self.options or {}),
        }
        keep_to(session, "affine", call)

    def agree(self, transform, starting_affine, *, ret_metric=False, **images):
        """Compare all public parameters with the other parties'."""
        pair = images["static"], images["moving"]
        check_session(self.session, self.parameters, *pair)
        parameters = self.config()
        # On shares it is one opening more.
        on_shares = self.metric.reveal == "transform"
        parameters["ret_metric"] = on_shares and bool(ret_metric)
        for name in ("static", "moving"):
            image = images[name]
            parameters[name + "_shape"] = list(image.shape)
            matrix = grid2world_of(image, images[name + "_grid2world"])
            parameters[name + "_grid2world"] = matrix.tolist()
        voxels = {n: int(np.prod(images[n].shape)) for n in ("static", "moving")}
        self.session.ledger.about_images(
            {MOVING: voxels["static"], STATIC: voxels["moving"]}
        )
        if transform is not None:
            parameters["transform"] = list(_TRANSFORM_NAMES[type(transform)])
        parameters["checkpoint"] = self.checkpoint is not None
        parameters["resume"] = self.checkpoint is not None and self.checkpoint.resume
        parameters["starts_at_mass"] = is_named(starting_affine, "mass")
        with self.session.phase("agreement"):
            self.session.agree("registration", parameters)

    def share_result(self, affine):
        """Give the transform to the static owner, if the session says so.

        Returns
        -------
        affine : array, shape (dim + 1, dim + 1)
            what this party knows of it; the identity is nothing.
        """
        session, dim = self.session, self.dim
        if self.result_to != "both":
            return affine
        session.ledger.about(None)
        with session.phase("result"):
            shared = share(
                session,
                MOVING,
                affine if session.pid == MOVING else None,
                (dim + 1, dim + 1),
                frac_bits=72,
                bound=2.0**48,
                field=P127,
                name="affine",
            )
            # A run that goes on may end at another one.
            ahead = {"affine": ((STATIC,), (dim + 1) ** 2, shared.open_bits)}
            journal_ahead(session, self.checkpoint, ahead)
            matrix = session.open(shared, "affine", (STATIC,))
        if matrix is None:
            return affine
        matrix[-1] = np.eye(dim + 1)[-1]
        return matrix

    def end(self, found, images, *, judged=True):
        """Judge what the last step found, and share it.

        Parameters
        ----------
        found : Found
        images : dict
            see `optimize`.
        judged : bool, optional
            whether there was a metric, by which the match can be judged.

        Returns
        -------
        affine : array
            see `share_result`.
        concerns : list of str
            what is not plausible about the result; see `plausibility`.
        """
        concerns = []
        self.session.section("end")
        if judged and self._mismatched(found, images):
            concerns.append(plausibility.MISMATCH)
        if judged and self._stuck(found):
            concerns.append(plausibility.STUCK)
        self.metric.forget()
        affine = self.share_result(found.affine)
        if self.gets_result(images):
            concerns += plausibility.of_transform(affine, *grid(images, "static"))
            part = plausibility.overlap(
                affine, *grid(images, "static"), *grid(images, "moving")
            )
            concerns += plausibility.of_overlap(part)
        return affine, concerns

    def _mismatched(self, found, images):
        """Whether the images hardly match in the end, or less than at the beginning.

        On shares it is judged at the coarsest level, by two evaluations, of which a bit
        is opened to both owners. Where an optimizer at the moving owner has seen the
        metric's values, that owner judges the last one.

        Returns
        -------
        mismatched : bool or None
            None at the helper.
        """
        session = self.session
        with session.phase("result"):
            if self.metric.reveal == "transform":
                bit = self._mismatch_on_shares(found, images)
            else:
                known = None
                if session.pid == MOVING:
                    known = np.array([float(self.metric.hardly_matches(found.fopt))])
                bit = secret_numbers(session).own(known, (1,), 0, 1)
            session.ledger.about(None)
            receivers = MOVING, STATIC
            self._count_ahead({"mismatch": (receivers, 1, 1)})
            return secret_numbers(session).show_bit(bit, "mismatch", receivers)

    def _mismatch_on_shares(self, found, images):
        level = max(k for k, n in enumerate(self.level_iters[::-1]) if n)
        self.current_level, self.starting_affine = level, found.origin
        grid2world = grid(images, "moving")[1]
        self._set_up(level, {**images, "moving_grid2world": grid2world})
        if self.metric.hide_steps:
            self.metric.share_static()
        conducts = self.session.pid == MOVING
        return self.metric.mismatched(found.origin, found.affine if conducts else None)

    def _stuck(self, found):
        """Whether no step was taken, which the static owner is told with the result."""
        session = self.session
        stuck = session.pid == MOVING and np.array_equal(found.affine, found.origin)
        if self.result_to != "both":
            return stuck
        session.ledger.about(None)
        numbers = secret_numbers(session)
        with session.phase("result"):
            own = np.array([float(stuck)]) if session.pid == MOVING else None
            self._count_ahead({"stuck": ((STATIC,), 1, 1)})
            told = numbers.show_bit(numbers.own(own, (1,), 0, 1), "stuck", (STATIC,))
        return stuck if told is None else told

    def gets_result(self, images):
        """Whether the transform is this party's to know."""
        return self.session.pid == MOVING or (
            self.result_to == "both" and not is_remote(images["static"])
        )

    def make_receipt(
        self, images, starting_affine, affine, value, *, warnings, **parameters
    ):
        """Make the receipt of a registration that has ended; all parties together.

        Parameters
        ----------
        images : dict
            see `optimize`.
        starting_affine : str, array or None
        affine : array, shape (dim + 1, dim + 1)
            the result, at the owners that get it.
        value : float or None
            of the metric there, if it was opened to this party.
        warnings : list of str
            what is not plausible.
        **parameters
            what it did beside its `config`.
        """
        described = {**self.config(), **parameters}
        if self.metric.reveal == "transform":
            described["method"] = self.metric.method
        facts = grid_facts(images)
        static = {**facts["images"]["static"], "grid2world": facts["static_grid2world"]}
        if self.gets_result(images):
            facts["transform"] = transform_facts(affine, static)
        if value is not None:
            facts["metric"] = {"name": self.metric.title, "value": float(value)}
        arrays = {
            f"{name} {what}": images[f"{name}{key}"]
            for name in ("static", "moving")
            for what, key in (("image", ""), ("mask", "_mask"))
        }
        arrays["start"] = starting_affine
        facts |= own_arrays(self.session, **arrays)
        self.receipt = self.session.receipt(
            operation="affine", parameters=described, warnings=warnings, **facts
        )

    def run(
        self,
        transform,
        params0,
        *,
        static,
        moving,
        static_grid2world,
        moving_grid2world,
        starting_affine,
        static_mask,
        moving_mask,
        ret_metric=False,
        before=None,
        last=True,
        origin=None,
    ):
        """One registration inside a session; see `optimize`.

        Parameters
        ----------
        starting_affine : str, array, Hidden or None
            what the step before this one returned.
        before : str, optional
            step of the pipeline before this one.
        last : bool, optional
            whether no step comes after it.
        origin : array, optional
            where the first step of the pipeline began, at the moving owner; by default
            where this one does.

        Returns
        -------
        found : Found
        """
        hidden = starting_affine if isinstance(starting_affine, Hidden) else None
        self._init_optimizer(
            static,
            moving,
            transform,
            params0,
            static_grid2world,
            moving_grid2world,
            None if hidden else starting_affine,
            static_mask,
            moving_mask,
        )
        static_grid2world = grid2world_of(static, static_grid2world)
        moving_grid2world = grid2world_of(moving, moving_grid2world)
        images = {
            "static": static,
            "moving": moving,
            "moving_grid2world": moving_grid2world,
        }
        if origin is None and hidden is None:
            origin = self._own_start()
        if self.metric.hide_steps:
            counts = self.planned(transform, before, last)
            if hidden is None:
                frame = Frame(
                    static.shape, static_grid2world, moving.shape, moving_grid2world
                )
                hidden = hide(self.session, frame, origin)
            hidden = self._hidden(images, counts, hidden)
            if not last:
                return Found(hidden, None, None, origin)
            xopt, fopt = self._shown(images, hidden, ret_metric)
        elif self.metric.reveal == "transform":
            counts = self.planned(transform, before, last)
            xopt, fopt = self._on_shares(images, counts, ret_metric)
        else:
            xopt, fopt = self._at_moving_owner(images)
        if self.session.pid != MOVING:
            return Found(np.eye(self.dim + 1), None, None, None)
        return Found(self.starting_affine, xopt, fopt, origin)

    def _own_start(self):
        """Where the moving owner starts; None elsewhere."""
        if self.session.pid != MOVING:
            return None
        return self.transform.param_to_matrix(self.params0) @ self.starting_affine

    def planned(self, transform, before=None, last=True):
        """Evaluations at each level, coarsest first, with ``reveal="transform"``.

        Parameters
        ----------
        transform : instance of Transform
        before, last : optional
            see `run`.

        Raises
        ------
        ValueError
            if they leave no step to take.
        """
        kind, _ = _TRANSFORM_NAMES[type(transform)]
        counts = self.metric.planned(
            kind,
            self.levels,
            self.level_iters,
            scale=self.scale,
            before=before,
            last=last,
        )
        if self.metric.hide_steps and kind not in GROUPS:
            raise ValueError(
                f"the steps of the {kind.lower()} transform cannot be hidden, because "
                "it depends on the axes of the moving image; use rigid, "
                "rigid_isoscaling or affine"
            )
        if self.metric.hide_steps:
            check_path([counts])
        if not any(self.metric.steps_of(n) for n in counts if n):
            raise ValueError(
                f"level_iters = {[int(n) for n in self.level_iters]} leave no step for "
                f"the {kind.lower()} transform, which has evaluations at levels "
                "of its own; allow 2 or more at each level"
            )
        return counts

    def _set_up(self, level, images):
        """Set the metric up for a level."""
        conducts = self.session.pid == MOVING
        self.metric.setup(
            self.transform,
            *self._level_images(level, images["static"], images["moving"]),
            static_grid2world=self.static_ss.get_affine(level),
            moving_grid2world=images["moving_grid2world"],
            starting_affine=self.starting_affine if conducts else None,
            static_mask=self._level_mask(level),
            moving_mask=self.moving_mask,
            level=level,
        )

    def _take(self, parameters):
        """Make a level's result the start of the next, at the moving owner."""
        matrix = self.transform.param_to_matrix(parameters)
        self.starting_affine = matrix.dot(self.starting_affine)
        self.params0 = self.transform.get_identity_parameters()

    def _on_shares(self, images, counts, ret_metric):
        """All levels by the optimizer on shares.

        Returns
        -------
        xopt, fopt
            parameters of the last level, and the metric there if it is asked for;
            None but for the moving owner.
        """
        session = self.session
        conducts = session.pid == MOVING
        xopt = self.params0 if conducts else None
        value, live = None, False
        for level in range(self.levels - 1, -1, -1):
            self.current_level = level
            if not counts[-1 - level]:
                continue
            if self._place < self._resumption.at:
                if conducts:
                    xopt = self._resumption.result(self._place)
                    self._take(xopt)
                continue
            count, live = counts[-1 - level], True
            steps = self.metric.steps_of(count)
            self._resumption.refuse_repeats(self._place, steps)
            journal(session, self.checkpoint, place=list(self._place))
            session.section(f"step {self.step_number}, level {level}")
            self._set_up(level, images)
            with session.phase("optimizer"):
                xopt, value = self.metric.minimise(
                    self.params0 if conducts else None,
                    count,
                    self.levels - 1 - level,
                    self._counting(steps),
                )
            if conducts:
                result = np.asarray(xopt).tolist()
                journal(
                    session, self.checkpoint, place=list(self._place), result=result
                )
                self._take(xopt)
        if not (ret_metric and live):
            return xopt, None
        self._count_ahead({"final_value": ((MOVING,), 1, VALUE_BITS)})
        with session.phase("result"):
            end = self.starting_affine if conducts else None
            return xopt, self.metric.final_value(end, value)

    def _count_ahead(self, openings):
        """Count what is opened at the end, before it is; see `journal_ahead`."""
        self._resumption.refuse_again(openings)
        opens = {"opens": sorted(openings)}
        journal_ahead(self.session, self.checkpoint, openings, **opens)

    def _hidden(self, images, counts, hidden):
        """All levels by the optimizer on shares, none of whose steps is shown.

        Returns
        -------
        hidden : Hidden
        """
        session, numbers = self.session, secret_numbers(self.session)
        kind, _ = _TRANSFORM_NAMES[type(self.transform)]
        if session.pid == MOVING:
            check_start(hidden.start, kind)
        for level in range(self.levels - 1, -1, -1):
            self.current_level, count = level, counts[-1 - level]
            if not count:
                continue
            self._set_up(level, images)
            longest = longest_step(self.levels - 1 - level)
            metric = FramedMutualInformation(
                self.metric, numbers, hidden, kind, longest
            )
            on_step = self._counting(count)
            with session.phase("optimizer"):
                matrix = minimise_hidden(
                    numbers, metric, hidden.matrix, count, longest, on_step
                )
            hidden = hidden._replace(matrix=matrix)
        return hidden._replace(
            kinds=(*hidden.kinds, self.transform), reach=hidden.reach + reach(counts)
        )

    def _shown(self, images, hidden, ret_metric):
        """Show the moving owner what was found, and how well it matches if asked."""
        session, conducts = self.session, self.session.pid == MOVING
        session.ledger.about(None)
        numbers = self.dim * (self.dim + 1)
        ahead = {"transform": ((MOVING,), numbers, RESULT_PLACES)}
        if ret_metric:
            ahead["final_value"] = (MOVING,), 1, VALUE_BITS
        place = list(self._place)
        journal_ahead(session, self.checkpoint, ahead, place=place)
        with session.phase("result"):
            transform, xopt = show(session, hidden)
        value = None
        if conducts:
            self.starting_affine = transform.param_to_matrix(xopt) @ hidden.start
        if ret_metric:
            self.current_level = 0
            self._set_up(0, images)
            self.metric.share_static()
            identity = self.transform.get_identity_parameters() if conducts else None
            self.metric.shared.begin(identity)
            value, _ = self.metric.shared.evaluate(identity)
            value = secret_numbers(session).show_value(value, 1 / SCALE)
        return xopt, value

    def _counting(self, steps):
        """What writes down every step, and tells the callback of it."""
        numbers, place = iter(range(1, steps + 1)), list(self._place)

        def on_step(*_):
            step = next(numbers)
            journal(self.session, self.checkpoint, place=place, step=step)
            if self.callback is not None:
                facts = self._progress_facts(step)
                self.callback({**facts, "max_iterations": steps})

        return on_step

    def _at_moving_owner(self, images):
        """All levels by an optimizer of DIPY's that runs at the moving owner.

        Returns
        -------
        xopt, fopt
            parameters and metric of the last level, at the moving owner.
        """
        conducts, optimum = self.session.pid == MOVING, None
        options = dict(self.options or {"gtol": 1e-4})
        for level in range(self.levels - 1, -1, -1):
            self.current_level = level
            if not self.level_iters[-1 - level]:
                continue
            live = self._place >= self._resumption.at
            if live:
                self._set_up(level, images)
            if not conducts:
                if live:
                    self._serve()
                continue
            key = "maxfun" if self.method == "L-BFGS-B" else "maxiter"
            options[key] = self.level_iters[-1 - level]
            self.metric.callback = self._progress if self.callback else None
            self._iteration = 0
            optimum = Optimizer(
                self._resumption.evaluations(
                    self.session, self.metric.distance_and_gradient, self._place
                ),
                self.params0,
                method=self.method,
                jac=True,
                options=options,
            )
            if live:
                self.metric.end()
            self._take(optimum.xopt)
        return (optimum.xopt, optimum.fopt) if conducts else (None, None)

    # -- checkpoints -----------------------------------------------------

    @property
    def _place(self):
        """Step and level, in the order of the run."""
        return self.step_number, self.levels - 1 - self.current_level

    @property
    def finished_before(self):
        """Whether an interrupted run had finished this step."""
        return self.step_number < self._resumption.at[0]

    def begin_checkpoint(self, steps, starting_affine, *, ret_metric=False, **images):
        """Find out where an interrupted run goes on; all parties together.

        The moving owner's journal holds what was opened to it. Its optimizer is fed
        with that again, and nothing is computed a second time but the evaluation that
        was under way; the other parties only need to know the step and level.

        Parameters
        ----------
        steps : list of str
            of the pipeline.
        starting_affine, ret_metric, **images
            see `optimize`; a checkpoint belongs to them.
        """
        if self.checkpoint is None:
            return
        here = {
            name: None if is_remote(images[name]) else images[name]
            for name in ("static", "moving", "static_mask", "moving_mask")
        }
        facts = {
            **self.config(),
            **{
                f"{name} image": digest(
                    here[name], here[name + "_mask"], grid(images, name)[1]
                )
                for name in ("static", "moving")
            },
            "start": digest(
                starting_affine if isinstance(starting_affine, np.ndarray) else None
            ),
            "steps": steps,
            "ret_metric": bool(ret_metric),
        }
        # Where no step is shown, nobody knows how far a run was.
        self._resumption.begin(
            self.session, facts, (len(steps), self.levels), anew=self.metric.hide_steps
        )

    def _serve(self):
        """Take part in the evaluations of a level, as many as were agreed."""
        limit, place = self._most_evaluations(self.current_level), list(self._place)
        if limit is not None:
            limit -= len(self._resumption.recorded(self._place))

        count = 0

        def note():
            nonlocal count
            count += 1
            journal(self.session, self.checkpoint, place=place)
            if self.callback is not None:
                self.callback(self._progress_facts(count))

        self.metric.serve(limit, note)

    def _precision(self, static_grid2world, last=False):
        """To what a shift of centres is rounded; finer where nothing corrects it."""
        kind, _ = _TRANSFORM_NAMES.get(
            type(getattr(self, "transform", None)), (None, None)
        )
        if last or kind in ("ROTATION", "SCALING"):
            return precision_for(static_grid2world)
        factor = self.factors[0] if self.use_isotropic else 2 ** (self.levels - 1)
        return precision_for(static_grid2world, factor, START_PART)

    def start_at_center(self, *images, last=False):
        """`transform_centers_of_mass`, or what an interrupted run found.

        Parameters
        ----------
        *images
            see there.
        last : bool, optional
            whether no step comes after it.

        Returns
        -------
        affine_map : AffineMap
        """
        self.current_level = self.levels - 1
        if not self.finished_before:
            self.session.section("centers of mass")
            affine_map = transform_centers_of_mass(
                *images,
                session=self.session,
                precision=self._precision(images[1], last),
            )
            matrix = affine_map.affine.tolist()
            place = [self.step_number, 0]
            journal(self.session, self.checkpoint, place=place, center=matrix)
            return affine_map
        found = self._resumption.recorded(self._place, "center")
        center = found[-1]["center"] if found else np.eye(self.dim + 1)
        return AffineMap(np.array(center))

    def _most_evaluations(self, level):
        """What the static owner agrees to; None where `method` sets no bound."""
        if self.method != "L-BFGS-B":
            return None
        # A line search may begin at the limit, take 20 steps, fail, and be tried once
        # more along the gradient.
        return self.level_iters[-1 - level] + 2 * 21

    def _progress(self, metric):
        self._iteration += 1
        facts = self._progress_facts(self._iteration)
        self.callback({**facts, "value": float(metric.metric_val)})

    def _progress_facts(self, iteration):
        return {
            "step": self.step,
            "level": self.current_level,
            "iteration": iteration,
            "max_iterations": self.level_iters[-1 - self.current_level],
            "bytes_sent": sum(self.session.ledger.sent.values()),
        }

    def _level_images(self, level, static, moving):
        shape = self.static_ss.get_domain_shape(level)
        grid2world = self.static_ss.get_affine(level)
        if is_remote(static):
            static = RemoteImage(shape, grid2world)
        else:
            to_level = self._to_level(level)
            static = to_level.transform(self.static_ss.get_image(level))
        if not is_remote(moving):
            moving = self.moving_ss.get_image(level)
        return static, moving

    def _to_level(self, level):
        return AffineMap(
            None,
            domain_grid_shape=self.static_ss.get_domain_shape(level),
            domain_grid2world=self.static_ss.get_affine(level),
            codomain_grid_shape=self.static_ss.get_domain_shape(0),
            codomain_grid2world=self.static_ss.get_affine(0),
        )

    def _level_mask(self, level):
        if self.static_mask is None:
            return None
        to_level = self._to_level(level)
        mask = to_level.transform(self.static_mask, interpolation="nearest")
        if not mask.any():
            raise ValueError(
                f"no voxel of the static mask is left where the image is reduced to "
                f"{'x'.join(map(str, mask.shape))} voxels; use a larger mask or "
                "smaller factors"
            )
        return mask.astype(np.int32)

    def _init_optimizer(
        self,
        static,
        moving,
        transform,
        params0,
        static_grid2world,
        moving_grid2world,
        starting_affine,
        static_mask,
        moving_mask,
    ):
        # Follows DIPY step by step, each owner with its own image.
        self.dim = len(static.shape)
        self.transform = transform
        self.nparams = transform.get_number_of_parameters()
        self.static_mask = usable_mask(static_mask, "static")
        self.moving_mask = usable_mask(moving_mask, "moving")
        static_grid2world = grid2world_of(static, static_grid2world)
        moving_grid2world = grid2world_of(moving, moving_grid2world)
        self.params0 = (
            transform.get_identity_parameters() if params0 is None else params0
        )
        self.starting_affine = self._start(
            starting_affine, static, static_grid2world, moving, moving_grid2world
        )
        self.static_ss = self._scale_space(static, self.static_mask, static_grid2world)
        self.moving_ss = self._scale_space(moving, self.moving_mask, moving_grid2world)

    def _start(self, start, static, static_grid2world, moving, moving_grid2world):
        images = static, static_grid2world, moving, moving_grid2world
        if start is None:
            return np.eye(self.dim + 1)
        if isinstance(start, np.ndarray):
            return start
        if start == "mass":
            return transform_centers_of_mass(
                masked(static, self.static_mask),
                static_grid2world,
                masked(moving, self.moving_mask),
                moving_grid2world,
                session=self.session,
                precision=self._precision(static_grid2world),
            ).affine
        if start == "voxel-origin":
            return transform_origins(*images).affine
        return transform_geometric_centers(*images).affine

    def _scale_space(self, image, mask, grid2world):
        _, spacing = get_direction_and_spacings(grid2world, self.dim)
        shape, remote = image.shape, is_remote(image)
        if remote:
            # Only the grids are needed, whatever a peer says how large they are.
            image = np.zeros((1,) * self.dim)
        else:
            inside = image if mask is None else image[mask != 0]
            # As float: the range of integers may not fit their type.
            low, high = float(np.min(inside)), float(np.max(inside))
            image = (image.astype(np.float64) - low) / (high - low)
        with np.errstate(all="ignore" if remote else None):
            if self.use_isotropic:
                space = IsotropicScaleSpace(
                    image,
                    self.factors,
                    [0.0] * self.levels if remote else self.sigmas,
                    image_grid2world=grid2world,
                    input_spacing=spacing,
                    mask0=False,
                )
            else:
                space = ScaleSpace(
                    image,
                    self.levels,
                    image_grid2world=grid2world,
                    input_spacing=spacing,
                    sigma_factor=0.0 if remote else self.ss_sigma_factor,
                    mask0=False,
                )
        if remote:
            # Sizes are the only thing that followed from the image's; as in DIPY.
            rounding = 0.0 if self.use_isotropic else 0.5
            space.domain_shapes = [
                (np.array(shape) / scaling + rounding).astype(np.int32)
                for scaling in space.scalings
            ]
        return space


def grid(images, name):
    """Shape and voxel-to-space transformation of one of the images of `optimize`."""
    image = images[name]
    return image.shape, grid2world_of(image, images[name + "_grid2world"])


def check_centers(**images):
    """Raise ValueError if the centre of mass of an image that is here is of no use.

    Parameters
    ----------
    **images : tuple of (image, grid2world, mask)
        by name.
    """
    for name, (image, grid2world, mask) in images.items():
        if not is_remote(image):
            grid2world = grid2world_of(image, grid2world)
            empty = mask is None or not np.any(mask)
            inside = masked(image, None if empty else mask)
            world_center_of_mass(inside, grid2world, f"the {name}")


def _listed(values):
    return None if values is None else list(values)


def split_options(options):
    """How many times the planned evaluations are made, and the optimizer's options.

    Parameters
    ----------
    options : dict or None

    Returns
    -------
    evaluations : float or None
    options : dict or None
        the others.
    """
    if not isinstance(options, dict | None):
        raise ValueError(
            f"the options of the optimizer must be a dict, got {options!r:.100}; give "
            'for example {"evaluations": 2}'
        )
    options = dict(options or {})
    return options.pop("evaluations", None), options or None


def registration_from(config, *, session=None, options=None, **others):
    """The registration that a `config` describes.

    Parameters
    ----------
    config : dict
    session : Session, optional
    options : dict, optional
        of the optimizer, but for "evaluations".
    **others
        of `SecureAffineRegistration`.

    Returns
    -------
    registration : SecureAffineRegistration
    """
    config = dict(config)
    kind = METRICS[config.pop("metric")]
    # Those of the others mean nothing here.
    given = {n: config.pop(n) for m in METRICS.values() for n in m.names if n in config}
    metric = kind(session=session, **{name: given[name] for name in kind.names})
    options = {**(options or {}), "evaluations": config.pop("evaluations")}
    return SecureAffineRegistration(
        metric=metric, session=session, options=options, **config, **others
    )


def _optimize_party(session, config, transform, starting_affine, ret_metric, **images):
    images = unite(**images)
    with plausibility.untold():
        registration_from(config, session=session).optimize(
            images.pop("static"),
            images.pop("moving"),
            regtransforms[tuple(transform)],
            None,
            starting_affine=starting_affine,
            ret_metric=ret_metric,
            **images,
        )
