"""Registration API: mirrors DIPY's ``affine_registration``, ``syn_registration``."""

from functools import partial
from warnings import warn

from dipy.align.imaffine import AffineMap
from dipy.align.transforms import regtransforms
from dipy.testing.decorators import warning_for_keywords
import numpy as np

from dipy_ppir.align import plausibility
from dipy_ppir.align.alone import check_parties
from dipy_ppir.align.arguments import check_run, mask_array, matrix_array, read_image
from dipy_ppir.align.facts import OwnFiles
from dipy_ppir.align.frames import Blur
from dipy_ppir.align.freeform import SecureFreeFormRegistration
from dipy_ppir.align.hidden import (
    check_path,
    check_start,
    longest_step,
    result_bits,
)
from dipy_ppir.align.imaffine import (
    Found,
    check_centers,
    registration_from,
    split_options,
)
from dipy_ppir.align.imwarp import registration_from as syn_registration_from
from dipy_ppir.align.parameters import (
    AFFINE,
    FREEFORM,
    PIPELINE_STEPS,
    SYN,
    AffineParameters,
    SynParameters,
)
from dipy_ppir.align.remote import exchange_grids, is_remote, is_word, split, unite
from dipy_ppir.align.validation import (
    check_image,
    check_mask,
    check_overlap,
    check_pyramid,
    check_slices,
    check_starting_affine,
    is_named,
    masked,
    usable_mask,
)
from dipy_ppir.mpc import local
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.numbers import VALUE_BITS

__all__ = [
    "affine",
    "affine_registration",
    "center_of_mass",
    "freeform_registration",
    "rigid",
    "rigid_isoscaling",
    "rigid_scaling",
    "syn_registration",
    "translation",
]

#: Parameters of a pipeline that are none of a registration by itself.
_OF_PIPELINES = ("pipeline", "starting_affine", "ret_metric")
#: Most bits of a shift between centres of mass.
_CENTER_BITS = 3 * 52


def planned_bits(parameters, dim):
    """Most bits that ``reveal="transform"`` opens about the static image.

    Parameters
    ----------
    parameters : AffineParameters
    dim : int

    Returns
    -------
    bits : float
        those of the result included, and of its value if it is asked for.
    """
    steps, hide_steps = parameters.pipeline, parameters.hide_steps
    levels, blur, total = len(parameters.level_iters), Blur(dim), 0.0
    metric = registration_of(parameters).metric
    if parameters.starting_affine == "mass":
        total += _CENTER_BITS
    for i, step in enumerate(steps):
        if step == "center_of_mass":
            total, blur = total + _CENTER_BITS, Blur(dim)
            continue
        kind = PIPELINE_STEPS[step]
        counts = metric.planned(
            kind,
            levels,
            parameters.level_iters,
            scale=parameters.evaluations,
            before=steps[i - 1] if i else None,
            last=i == len(steps) - 1,
        )
        if hide_steps:
            for level, count in enumerate(counts):
                longest = longest_step(level)
                total += sum(blur.show(kind, longest) for _ in range(count))
            total += result_bits(dim) if i == len(steps) - 1 else 0
        else:
            p = regtransforms[kind, dim].get_number_of_parameters()
            total += metric.planned_bits(counts, p)
    # Of the bits that are opened, one says whether the images match.
    judged = steps[-1] != "center_of_mass"
    return total + VALUE_BITS * parameters.ret_metric + judged


def registration_of(parameters, **others):
    """The registration that takes the steps of a pipeline.

    Parameters
    ----------
    parameters : AffineParameters
    **others
        see `registration_from`.

    Returns
    -------
    registration : SecureAffineRegistration
    """
    config = {name: v for name, v in parameters if name not in _OF_PIPELINES}
    return registration_from(config, **others)


def check_steps(registration, steps, dim, starting_affine=None):
    """Raise ValueError if a pipeline's steps cannot be taken as they are planned."""
    if registration.metric.reveal != "transform":
        return
    counts = [
        registration.planned(
            regtransforms[PIPELINE_STEPS[step], dim],
            before=steps[i - 1] if i else None,
            last=i == len(steps) - 1,
        )
        for i, step in enumerate(steps)
        if step != "center_of_mass"
    ]
    if registration.metric.hide_steps:
        check_path(counts)
        if isinstance(starting_affine, np.ndarray) and "center_of_mass" not in steps:
            for step in steps:
                check_start(starting_affine, PIPELINE_STEPS[step])


@warning_for_keywords()
def affine_registration(
    moving,
    static,
    *,
    moving_affine=None,
    static_affine=None,
    pipeline=None,
    starting_affine=None,
    metric="MI",
    level_iters=None,
    sigmas=None,
    factors=None,
    ret_metric=False,
    moving_mask=None,
    static_mask=None,
    optimizer_options=None,
    session=None,
    parties=None,
    callback=None,
    result_to=AFFINE.result_to,
    ret_receipt=False,
    checkpoint=None,
    strict=False,
    **metric_kwargs,
):
    """Find the affine transformation between two images that two parties hold.

    Takes the arguments of ``dipy.align.affine_registration`` and returns what
    that returns; neither party sees the other's image.

    Parameters
    ----------
    moving, static : array, nifti image, str or RemoteImage
        the image that another party holds is a `RemoteImage`; at the helper both
        are. In a session opened by `Session.load` the word "remote" does, because
        the owners tell each other the shapes and affines.
    moving_affine, static_affine : array, shape (dim + 1, dim + 1), optional
        voxel-to-space transformations, mm; required for arrays.
    pipeline : list of str, optional
        steps out of center_of_mass, translation, rigid, rigid_isoscaling,
        rigid_scaling and affine. By default ``["center_of_mass", "translation",
        "rigid", "affine"]``.
    starting_affine : {"mass", "voxel-origin", "centers"} or array, optional
        initial guess, shape (dim + 1, dim + 1), at the moving owner; or what it is
        determined by, the same at all parties.
    metric : {"MI", "SSD", "CC"}, optional
        mutual information; the sum of squared differences, for images of the same
        contrast; or local cross-correlation, whatever shade lies over them.
    level_iters, sigmas, factors : sequence, optional
        as in DIPY: [1000, 500, 100], [3, 1, 0.0] and [4, 2, 1].
    ret_metric : bool, optional
        also return the optimal parameters and the metric value.
    moving_mask, static_mask : array, optional
        each at its image's owner.
    optimizer_options : dict, optional
        see ``scipy.optimize.minimize``; used at the moving owner.
    session : Session, optional
        this party's session. With both images here and no session, the other
        parties are started as processes on this machine.
    parties : {3, 2}, optional
        how many there are then: two owners and a helper, by default, or two owners
        alone.
    callback : callable, optional
        see `SecureAffineRegistration`.
    result_to : {"both", "moving"}, optional
        which image owners get the transform.
    ret_receipt : bool, optional
        also return, last, what each party learned and what it cost.
    checkpoint : Checkpoint, optional
        where this party keeps its state in a session, to go on after an interruption.
    strict : bool, optional
        make a result that is not plausible an error; by default it is a warning, and in
        the receipt. See `plausibility`.
    nbins, sampling_proportion, reveal, backend, hide_steps : optional
        see `SecureMutualInformationMetric`.
    sampling, seed, precision : optional
        see `SecureSquaredDifferencesMetric`.
    radius : int, optional
        see `SecureCrossCorrelationMetric`.
    evaluations : float, optional
        with ``reveal="transform"``, how many times the planned evaluations are made.
    ss_sigma_factor : float, optional
        see `SecureAffineRegistration`.

    Returns
    -------
    resampled : array or None
        the moving image resampled to the static image's grid, at its owner.
    final_affine : array or None
        the transformation, at the owners that get it.
    xopt, fopt
        with `ret_metric`, at the moving owner.
    receipt : dict
        with `ret_receipt`.

    Raises
    ------
    ValueError
        if an image or a parameter cannot be used, before any connection is
        opened.
    ImplausibleError
        with `strict`, when the result is there.
    """
    check_run(session, checkpoint, callback)
    static_mask = mask_array(static_mask, "static")
    moving_mask = mask_array(moving_mask, "moving")
    files = OwnFiles({"static image": static, "moving image": moving})
    evaluations, options = split_options(optimizer_options)
    scaled = {} if evaluations is None else {"evaluations": evaluations}
    if scaled and "evaluations" in metric_kwargs:
        raise ValueError(
            "evaluations is given twice, by itself and in optimizer_options; give one"
        )
    named = isinstance(starting_affine, str)
    parameters = AffineParameters(
        metric=metric,
        pipeline=_named(pipeline),
        starting_affine=starting_affine if named else None,
        level_iters=level_iters,
        sigmas=sigmas,
        factors=factors,
        ret_metric=bool(ret_metric),
        result_to=result_to,
        **scaled,
        **metric_kwargs,
    )
    steps, ret_metric = list(parameters.pipeline), parameters.ret_metric
    check_parties(parties, session, "affine", parameters)
    registration = registration_of(
        parameters,
        options=options,
        callback=callback,
        checkpoint=checkpoint,
        parties=parties,
    )
    if session is not None:
        registration.keep_to_file(session, steps, starting_affine, ret_metric)
    static, static_affine, moving, moving_affine = _read_pair(
        static, static_affine, moving, moving_affine, session
    )
    check_image(static, static_affine, "static")
    check_image(moving, moving_affine, "moving")
    if len(static.shape) != len(moving.shape):
        raise ValueError("static and moving images must have the same dimension")
    check_slices(moving)
    check_mask(static_mask, static, "static")
    check_mask(moving_mask, moving, "moving")
    registration.metric.check_masks(static_mask, moving_mask)
    starting_affine = check_starting_affine(starting_affine, len(static.shape))
    # Only the moving owner knows where a registration starts.
    starts_here = session is None or session.pid == MOVING
    if starts_here and starting_affine is None and "center_of_mass" not in steps:
        check_overlap(static.shape, static_affine, moving.shape, moving_affine)
    concerns = []
    if "center_of_mass" in steps or is_named(starting_affine, "mass"):
        check_centers(
            static=(static, static_affine, static_mask),
            moving=(moving, moving_affine, moving_mask),
        )
        for name, image, mask, matrix in (
            ("static", static, static_mask, static_affine),
            ("moving", moving, moving_mask, moving_affine),
        ):
            if not is_remote(image):
                concerns += plausibility.of_center(image, name)
                concerns += plausibility.of_mask(image, mask, matrix, name)
    if starting_affine is not None and "center_of_mass" in steps:
        warn(
            "starting_affine overwritten by center_of_mass transform",
            UserWarning,
            stacklevel=4,  # past the decorator
        )
    if registration.use_isotropic:
        check_pyramid(static.shape, static_affine, registration.factors)
    check_steps(registration, steps, len(static.shape), starting_affine)
    images = {
        "static": static,
        "moving": moving,
        "static_grid2world": static_affine,
        "moving_grid2world": moving_affine,
        "static_mask": static_mask,
        "moving_mask": moving_mask,
    }
    if session is not None:
        registration.join(session)
        results = run_pipeline(
            registration,
            steps,
            starting_affine,
            images,
            ret_metric=ret_metric,
            concerns=concerns,
        )
    elif is_remote(static) or is_remote(moving):
        raise ValueError(
            "a RemoteImage needs a session with the party that holds the image"
        )
    elif checkpoint is not None:
        raise ValueError("a checkpoint needs a session; leave it out")
    else:
        here, there, helper = split(images)
        common = {
            "config": registration.config(),
            "steps": steps,
            "ret_metric": ret_metric,
            "starting_affine": starting_affine
            if isinstance(starting_affine, str)
            else None,
        }

        def run_here(own_session):
            registration.join(own_session)
            return run_pipeline(
                registration,
                steps,
                starting_affine,
                here,
                ret_metric=ret_metric,
                concerns=concerns,
            )

        results = local.run_locally(
            run_here,
            "dipy_ppir.align._public:_pipeline_party",
            parties=parties,
            moving={},
            static={**common, **there},
            helper={**common, **helper},
        )[MOVING]
    matrix, xopt, fopt, receipt = results
    files.enter(receipt)
    plausibility.tell(receipt["warnings"], strict=strict, stacklevel=4)
    resampled = None
    if matrix is not None and not is_remote(moving):
        resampled = AffineMap(
            matrix,
            domain_grid_shape=static.shape,
            domain_grid2world=static_affine,
            codomain_grid_shape=moving.shape,
            codomain_grid2world=moving_affine,
        ).transform(moving)
    out = (resampled, matrix)
    if ret_metric:
        out += (xopt, fopt)
    return out + (receipt,) if ret_receipt else out


def _read_pair(static, static_affine, moving, moving_affine, session):
    """Both images, read or described by their owners."""
    static, static_affine = read_image(static, static_affine, "static")
    moving, moving_affine = read_image(moving, moving_affine, "moving")
    if session is not None and session.plan is not None:
        pair = {"static": (static, static_affine), "moving": (moving, moving_affine)}
        pair = exchange_grids(session, pair)
        (static, static_affine), (moving, moving_affine) = pair.values()
    elif is_word(static) or is_word(moving):
        raise ValueError(
            'the word "remote" needs a session opened by Session.load; pass it, or a '
            "RemoteImage"
        )
    return static, static_affine, moving, moving_affine


def _named(pipeline):
    """A pipeline whose steps are named, in which functions of this module may stand."""
    if not isinstance(pipeline, list | tuple):
        return pipeline
    functions = {
        center_of_mass: "center_of_mass",
        translation: "translation",
        rigid: "rigid",
        rigid_isoscaling: "rigid_isoscaling",
        rigid_scaling: "rigid_scaling",
        affine: "affine",
    }
    return [functions.get(s, s) if callable(s) else s for s in pipeline]


def run_pipeline(
    registration, steps, starting_affine, images, *, ret_metric, concerns=()
):
    """Run the steps of a pipeline at every party of a session.

    Parameters
    ----------
    registration : SecureAffineRegistration
    steps : list of str
    starting_affine : str, array or None
    images : dict
        see `SecureAffineRegistration.optimize`.
    ret_metric : bool
    concerns : sequence of str, optional
        what is odd about the images, for the receipt; see `plausibility`.

    Returns
    -------
    affine : array or None
        the transformation, at the owners that get it.
    xopt, fopt
        of the last step, at the moving owner.
    receipt : dict
    """
    session = registration.session
    dim = len(images["static"].shape)
    registration.dim = dim
    registration.agree(None, starting_affine, ret_metric=ret_metric, **images)
    with session.phase("agreement"):
        session.agree("registration", {"pipeline": steps})
    registration.begin_checkpoint(
        steps, starting_affine, ret_metric=ret_metric, **images
    )
    affine = np.eye(dim + 1) if starting_affine is None else starting_affine
    found = Found(affine, None, None, None)
    for registration.step_number, registration.step in enumerate(steps):
        step = registration.step
        if step == "center_of_mass":
            center = registration.start_at_center(
                masked(images["static"], usable_mask(images["static_mask"], "static")),
                images["static_grid2world"],
                masked(images["moving"], usable_mask(images["moving_mask"], "moving")),
                images["moving_grid2world"],
                last=registration.step_number == len(steps) - 1,
            )
            found = Found(center.affine, None, None, None)
            continue
        if session.pid != MOVING and registration.finished_before:
            continue
        last = registration.step_number == len(steps) - 1
        found = registration.run(
            regtransforms[PIPELINE_STEPS[step], dim],
            None,
            starting_affine=found.affine,
            origin=found.origin,
            ret_metric=ret_metric and last,
            before=steps[registration.step_number - 1]
            if registration.step_number
            else None,
            last=last,
            **images,
        )
    judged = steps[-1] != "center_of_mass"
    affine, odd = registration.end(found, images, judged=judged)
    registration.make_receipt(
        images,
        starting_affine,
        affine,
        found.fopt,
        warnings=[*concerns, *odd],
        pipeline=steps,
    )
    affine = affine if registration.gets_result(images) else None
    return affine, found.xopt, found.fopt, registration.receipt


def _pipeline_party(session, config, steps, ret_metric, starting_affine, **images):
    registration = registration_from(config, session=session)
    images = unite(**images)
    run_pipeline(registration, steps, starting_affine, images, ret_metric=ret_metric)


@warning_for_keywords()
def syn_registration(
    moving,
    static,
    *,
    moving_affine=None,
    static_affine=None,
    step_length=SYN.step_length,
    metric=SYN.metric,
    dim=SYN.dim,
    level_iters=None,
    prealign=None,
    ss_sigma_factor=None,
    opt_tol=SYN.opt_tol,
    inv_iter=SYN.inv_iter,
    inv_tol=SYN.inv_tol,
    session=None,
    parties=None,
    callback=None,
    result_to=SYN.result_to,
    ret_receipt=False,
    checkpoint=None,
    strict=False,
    **metric_kwargs,
):
    """Find the diffeomorphic map between two images that two parties hold.

    Takes the arguments of ``dipy.align.syn_registration`` and returns what that
    returns; neither party sees the other's image.

    Parameters
    ----------
    moving, static : array, nifti image, str or RemoteImage
        the image that another party holds is a `RemoteImage`; at the helper both
        are. In a session opened by `Session.load` the word "remote" does, because
        the owners tell each other the shapes and affines.
    moving_affine, static_affine : array, shape (dim + 1, dim + 1), optional
        voxel-to-space transformations, mm; required for arrays.
    step_length : float, optional
        longest step of an iteration, voxels.
    metric : {"CC", "SSD", "MIND"}, optional
        local cross-correlation, squared differences, or squared differences of
        descriptors of self-similarity, for images of two modalities.
    dim : int (either 2 or 3), optional
        the dimension of the image domain.
    level_iters : list of int, optional
        iterations at each level, from the coarsest; [10, 10, 5] by default.
    prealign : array, shape (dim + 1, dim + 1), optional
        affine transform from the static to the moving image's space (see
        `affine_registration`), at the moving owner.
    session : Session, optional
        this party's session. With both images here and no session, the other
        parties are started as processes on this machine.
    parties : {3, 2}, optional
        how many there are then: two owners and a helper, by default, or two owners
        alone.
    ss_sigma_factor, opt_tol, inv_iter, inv_tol, callback, result_to, strict : optional
        see `SecureSymmetricDiffeomorphicRegistration`.
    ret_receipt : bool, optional
        also return, last, what each party learned and what it cost.
    checkpoint : Checkpoint, optional
        where this party keeps its state in a session, to go on after an interruption.
    sigma_diff, radius, reveal, map_spacing, opens, map_precision : optional
        see `SecureCCMetric`; those that the metric has.
    smooth : optional
        see `SecureSSDMetric`.
    update_spacing, stride, backend : optional
        see `SecureCCMetric`.

    Returns
    -------
    warped_moving : array or None
        the moving image warped to the static image's grid, at its owner.
    mapping : DiffeomorphicMap or None
        the map, at the owners that get it.
    receipt : dict
        with `ret_receipt`.

    Raises
    ------
    ValueError
        if an image or a parameter cannot be used, before any connection is
        opened.
    ImplausibleError
        with `strict`, when the result is there.
    """
    check_run(session, checkpoint, callback)
    prealign = matrix_array(prealign, "prealign")
    parameters = SynParameters(
        metric=metric,
        dim=dim,
        level_iters=level_iters,
        step_length=step_length,
        ss_sigma_factor=ss_sigma_factor,
        opt_tol=opt_tol,
        inv_iter=inv_iter,
        inv_tol=inv_tol,
        result_to=result_to,
        **metric_kwargs,
    )
    registration = syn_registration_from(
        parameters.plain(),
        parties=parties,
        callback=callback,
        checkpoint=checkpoint,
        strict=strict,
    )
    images = static, static_affine, moving, moving_affine
    out = _deformed(registration, images, session, prealign)
    return out + (registration.receipt,) if ret_receipt else out


def _deformed(registration, images, session, prealign):
    """The moving image warped by the map that a registration finds, and the map."""
    static, static_affine, moving, moving_affine = images
    files = OwnFiles({"static image": static, "moving image": moving})
    if session is not None:
        registration.join(session)
    static, static_affine, moving, moving_affine = _read_pair(*images, session)
    mapping = registration.optimize(
        static,
        moving,
        static_grid2world=static_affine,
        moving_grid2world=moving_affine,
        prealign=prealign,
    )
    files.enter(registration.receipt)
    warped = None
    if mapping is not None and not is_remote(moving):
        warped = mapping.transform(moving)
    return warped, mapping


@warning_for_keywords()
def freeform_registration(
    moving,
    static,
    *,
    moving_affine=None,
    static_affine=None,
    dim=FREEFORM.dim,
    prealign=None,
    session=None,
    parties=None,
    callback=None,
    ret_receipt=False,
    checkpoint=None,
    strict=False,
    **parameters,
):
    """Find the cubic B-spline that deforms one party's image onto another's.

    The sum of squared differences decides: both images must show the same with the same
    contrast. Neither party sees the other's image.

    The moving owner is shown the steps of the control points, from which it can rebuild
    much of the static image: see ``doc/security.md``. `syn_registration` opens less.

    Parameters
    ----------
    moving, static : array, nifti image, str or RemoteImage
        the image that another party holds is a `RemoteImage`; at the helper both
        are. In a session opened by `Session.load` the word "remote" does, because
        the owners tell each other the shapes and affines.
    moving_affine, static_affine : array, shape (dim + 1, dim + 1), optional
        voxel-to-space transformations, mm; required for arrays.
    dim : int (either 2 or 3), optional
        the dimension of the image domain.
    prealign : array, shape (dim + 1, dim + 1), optional
        affine transform from the static to the moving image's space (see
        `affine_registration`), at the moving owner.
    session : Session, optional
        this party's session. With both images here and no session, the other
        parties are started as processes on this machine.
    parties : {3, 2}, optional
        how many there are then: two owners and a helper, by default, or two owners
        alone.
    callback, strict : optional
        see `SecureFreeFormRegistration`.
    ret_receipt : bool, optional
        also return, last, what each party learned and what it cost.
    checkpoint : Checkpoint, optional
        where this party keeps its state in a session, to go on after an interruption.
    level_iters, factors, sigmas, spacing, bending, precision, opt_tol : optional
        see `SecureFreeFormRegistration`.
    max_step, sampling, sampling_proportion, seed, intensities, inv_iter : optional
        see `SecureFreeFormRegistration`.
    inv_tol, result_to, ret_metric : optional
        see `SecureFreeFormRegistration`.

    Returns
    -------
    warped_moving : array or None
        the moving image warped to the static image's grid, at its owner.
    mapping : DiffeomorphicMap or None
        the map, at the owners that get it.
    value : float or None
        with `ret_metric`, the mean squared difference, at the moving owner.
    receipt : dict
        with `ret_receipt`.

    Raises
    ------
    ValueError
        if an image or a parameter cannot be used, before any connection is
        opened.
    ImplausibleError
        with `strict`, when the result is there.
    """
    check_run(session, checkpoint, callback)
    prealign = matrix_array(prealign, "prealign")
    registration = SecureFreeFormRegistration(
        dim,
        parties=parties,
        callback=callback,
        checkpoint=checkpoint,
        strict=strict,
        **parameters,
    )
    images = static, static_affine, moving, moving_affine
    out = _deformed(registration, images, session, prealign)
    if registration.parameters.ret_metric:
        out += (registration.value,)
    return out + (registration.receipt,) if ret_receipt else out


def _partial(step, what):
    function = partial(affine_registration, pipeline=[step])
    function.__doc__ = f"Implements {what} transform. Based on `affine_registration`."
    return function


center_of_mass = _partial("center_of_mass", "a center of mass")
translation = _partial("translation", "a translation")
rigid = _partial("rigid", "a rigid")
rigid_isoscaling = _partial("rigid_isoscaling", "a rigid isoscaling")
rigid_scaling = _partial("rigid_scaling", "a rigid scaling")
affine = _partial("affine", "an affine")
