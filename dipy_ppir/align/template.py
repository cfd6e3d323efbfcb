r"""A template of a population: the mean of its images, in the shape that is their mean.

Every image is registered to the template of the moment, by whoever has it. The mean of
what comes of it, the images as they lie over the template, is the next template, once
it is brought nearer to the mean shape ([1]_, [2]_; ``buildtemplateparallel`` of ANTs).
Nothing but two sums over all images is needed of them, which `SumSession.total` makes
between sites, or `ClearSums` where all images are at hand.

*The sign of the step.* Registration of image i finds where each point x of the template
lies in it: at :math:`x + u_i(x)`, so that image i there looks as the template at x. In
the mean of the images' shapes the point is at :math:`x + \bar u(x)`, the mean over i. A
template of that shape shows there what this one shows at x,

.. math:: T'(x + \bar u(x)) = T(x), \quad\text{so}\quad
   T'(y) = T(y - \bar u(y)) + O(|\bar u|^2):

its values are looked up on the way back, against the mean displacement. As ANTs does,
`moved_to_mean` goes that way in `REPEATS` steps of a part ``step`` each, a quarter by
default, which is all of it. Images that are one image deformed by :math:`u_i` then have
a mean displacement of zero, but for what registration and rounding leave.

*What the shape is.* Where a head lies in its scanner is not part of its shape, and is
not added up. The affine transform of an image to the template is taken apart into
a symmetric stretch S and a rotation, and :math:`u_i(x) = c + S(\varphi_i(x) - c) - x`
with :math:`\varphi_i` the diffeomorphic part and c the template's centre of mass: size
and shear count, position and turn do not.

*How few digits.* Intensities are scaled to 0 to 1 and rounded to ``intensity_bits``
binary digits. Displacements are smoothed, taken at every ``spacing``-th voxel and
rounded to ``precision`` voxels; those beyond `FARTHEST` voxels are cut off.

References
----------
.. [1] Guimond A, Meunier J, Thirion JP. Average brain models: a convergence study.
       Computer Vision and Image Understanding 77, 192-210 (2000).
.. [2] Avants BB, et al. The optimal template effect in hippocampus studies of diseased
       populations. NeuroImage 49, 2457-2466 (2010).
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Annotated, NamedTuple
import warnings

from dipy.align.imaffine import (
    AffineMap,
    AffineRegistration,
    MutualInformationMetric,
    transform_centers_of_mass,
)
from dipy.align.imwarp import SymmetricDiffeomorphicRegistration
from dipy.align.metrics import CCMetric
from dipy.align.transforms import regtransforms
import numpy as np
from pydantic import Field
from scipy import ndimage

from dipy_ppir.align.centers import world_center_of_mass
from dipy_ppir.align.intensities import TAIL
from dipy_ppir.align.parameters import ParameterError, Parameters
from dipy_ppir.align.validation import check_image, check_slices
from dipy_ppir.mpc.errors import ParameterMismatchError
from dipy_ppir.mpc.ledger import declare
from dipy_ppir.mpc.record import array_hash
from dipy_ppir.mpc.sums import EVERYBODY

#: Most images that a site may have.
MOST_IMAGES = 10_000
#: Longest displacement that is added up, voxels along an axis.
FARTHEST = 64
#: Steps of the template towards the mean shape in an iteration, as in ANTs.
REPEATS = 4
#: An object is what is brighter than this part of an image's range; its brightness is 1
#: where all but this part of its voxels are darker.
OBJECT, BRIGHTEST = 0.1, 0.01
#: A template is rounded to multiples of one in so many: sites whose processors round
#: differently go on from the same.
LEVELS = 1 << 16

declare(
    "number_of_images",
    EVERYBODY,
    "(1,)",
    "how many images all sites have together",
    19,
)
declare(
    "sum_of_images",
    EVERYBODY,
    "the template's",
    "the sum of all sites' images, registered to the template of the moment",
    35,
)
declare(
    "sum_of_displacements",
    EVERYBODY,
    "the template's at every few voxels, and its dimension",
    "the sum of the displacements from the template of the moment to all sites' images",
    32,
)


def _axes(kind, **limits):
    return tuple[Annotated[kind, Field(**limits)], ...]


class TemplateParameters(Parameters):
    """Parameters of `build_template`; see there."""

    dim: Annotated[int, Field(description="2 or 3", ge=2, le=3)] = 3
    iterations: Annotated[
        int, Field(description="an integer from 1 to 50", ge=1, le=50)
    ] = 4
    step: Annotated[
        float, Field(description="a number from 0 to 0.5", ge=0, le=0.5)
    ] = 0.25
    shape: _axes(int, ge=8, le=1024) | None = Field(
        None, description="a list of 2 or 3 integers from 8 to 1024"
    )
    voxel_size: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="a number of mm above 0 and at most 100"
    )
    intensity_bits: Annotated[
        int, Field(description="an integer from 4 to 16", ge=4, le=16)
    ] = 10
    spacing: Annotated[
        int, Field(description="an integer from 1 to 16", ge=1, le=16)
    ] = 3
    precision: Annotated[
        float, Field(description="a number of voxels from 1/64 to 1", ge=1 / 64, le=1)
    ] = 1 / 16
    affine_iters: _axes(int, ge=0, le=100_000) = Field(
        (1000, 500, 100), description="a list of integers from 0, coarsest level first"
    )
    sigmas: _axes(float, ge=0, le=1024) = Field(
        (3.0, 1.0, 0.0), description="a list of numbers from 0, one for each level"
    )
    factors: _axes(int, ge=1, le=1024) = Field(
        (4, 2, 1), description="a list of integers from 1, one for each level"
    )
    sampling_proportion: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="a number above 0 and at most 1"
    )
    level_iters: _axes(int, ge=0, le=10_000) = Field(
        (10, 10, 5), description="a list of integers from 0, coarsest level first"
    )
    radius: Annotated[
        int, Field(description="an integer from 1 to 20", ge=1, le=20)
    ] = 4

    def _check(self):
        if (self.shape is None) != (self.voxel_size is None):
            raise ParameterError(
                "{shape} and {voxel_size} are the grid of a template that begins with "
                "nothing: give both, or neither and an initial template"
            )
        if self.shape is not None and len(self.shape) != self.dim:
            raise ParameterError(
                f"{{shape}} must have {self.dim} numbers, as {{dim}} says; got "
                f"{list(self.shape)}"
            )
        if not len(self.affine_iters) == len(self.sigmas) == len(self.factors) > 0:
            raise ParameterError(
                "{affine_iters}, {sigmas} and {factors} must have as many numbers as "
                "there are levels, one or more"
            )

    @property
    def brightest(self):
        """What the intensity 1 is added up as."""
        return (1 << self.intensity_bits) - 1

    @property
    def farthest(self):
        """What a displacement of `FARTHEST` voxels is added up as."""
        return round(FARTHEST / self.precision)


class Template(NamedTuple):
    """A template.

    Attributes
    ----------
    image : array, shape (S, R, C) or (R, C)
        between 0 and 1.
    grid2world : array, shape (dim + 1, dim + 1)
        voxel-to-space transformation.
    """

    image: np.ndarray
    grid2world: np.ndarray


class ClearSums:
    """Sums where everything is at hand: `SumSession.total` in the clear."""

    #: Of one site.
    roles = ("here",)

    def total(self, own, label, most, *, signed=False, within=None):
        """The numbers themselves, which must keep to the bounds."""
        own = np.asarray(own, dtype=np.int64)
        least, largest = within or (-most if signed else 0, most)
        if own.size and not least <= own.min() <= own.max() <= largest:
            raise ValueError(f"{label} is not between {least} and {largest}")
        return own


# -- one image ---------------------------------------------------------------


def scaled(image):
    """An image between 0 and 1, whatever its scanner's scale and its outliers.

    0 is the darkest voxel but for half a percent; 1 is the brightest of the object but
    for one percent of its voxels (see `OBJECT`).

    Parameters
    ----------
    image : array

    Returns
    -------
    image : array of float32

    Raises
    ------
    ValueError
        if there is nothing in it.
    """
    image = np.asarray(image, dtype=np.float64)
    low, high = np.quantile(image, [TAIL, 1 - TAIL])
    if not high > low:
        low, high = image.min(), image.max()
    if not high > low:
        raise ValueError("the image is the same everywhere; choose another file")
    inside = image[image > low + OBJECT * (high - low)]
    high = np.quantile(inside, 1 - BRIGHTEST)
    return np.clip((image - low) / (high - low), 0, 1).astype(np.float32)


def registered(image, grid2world, template, parameters):
    """Register an image to a template, in the clear: DIPY's affine transform, then SyN.

    Parameters
    ----------
    image : array
        as `scaled` returns it.
    grid2world : array
    template : Template
    parameters : TemplateParameters

    Returns
    -------
    affine : array, shape (dim + 1, dim + 1)
        from the template's space to the image's.
    mapping : DiffeomorphicMap
        `affine` included.
    """
    static = template.image, template.grid2world
    affine = transform_centers_of_mass(*static, image, grid2world).affine
    optimizer = AffineRegistration(
        metric=MutualInformationMetric(
            nbins=32, sampling_proportion=parameters.sampling_proportion
        ),
        level_iters=list(parameters.affine_iters),
        sigmas=list(parameters.sigmas),
        factors=list(parameters.factors),
        verbosity=0,
    )
    if any(parameters.affine_iters):
        for step in "TRANSLATION", "RIGID", "AFFINE":
            affine = optimizer.optimize(
                template.image,
                image,
                regtransforms[step, image.ndim],
                None,
                static_grid2world=template.grid2world,
                moving_grid2world=grid2world,
                starting_affine=affine,
            ).affine
    syn = SymmetricDiffeomorphicRegistration(
        CCMetric(image.ndim, radius=parameters.radius),
        level_iters=list(parameters.level_iters),
    )
    syn.verbosity = 0
    mapping = syn.optimize(
        template.image.astype(np.float32),
        image,
        static_grid2world=template.grid2world,
        moving_grid2world=grid2world,
        prealign=affine,
    )
    return affine, mapping


def stretch(matrix):
    """The symmetric part S of the linear part Q S of an affine matrix, Q orthogonal."""
    linear = np.asarray(matrix)[:-1, :-1]
    _, sizes, axes = np.linalg.svd(linear)
    return (axes.T * sizes) @ axes


def shape_displacement(affine, mapping, template, center):
    """How far the points of a template are from where they are in an image's shape.

    Parameters
    ----------
    affine, mapping
        as `registered` returns them.
    template : Template
    center : array, shape (dim,)
        the template's centre of mass, mm.

    Returns
    -------
    displacement : array, shape of the template and (dim,)
        voxels of the template's grid.
    """
    dim = template.image.ndim
    linear, origin = template.grid2world[:dim, :dim], template.grid2world[:dim, dim]
    points = np.moveaxis(np.indices(template.image.shape, dtype=np.float64), 0, -1)
    points = points @ linear.T + origin
    moved = points + mapping.get_forward_field()
    moved = center + (moved - center) @ stretch(affine).T
    return (moved - points) @ np.linalg.inv(linear).T


def contribution(image, grid2world, template, center, parameters):
    """What an image adds to the sums.

    Parameters
    ----------
    image, grid2world, template, parameters
        see `registered`.
    center : array, shape (dim,)

    Returns
    -------
    warped : array of int, shape of the template
        multiples of 1 / `TemplateParameters.brightest`.
    displacement : array of int
        at every ``spacing``-th voxel, multiples of ``precision`` voxels.
    """
    affine, mapping = registered(image, grid2world, template, parameters)
    warped = mapping.transform(image)
    displacement = shape_displacement(affine, mapping, template, center)
    spacing = parameters.spacing
    blurred = ndimage.gaussian_filter(
        displacement, (spacing / 2,) * image.ndim + (0,), mode="nearest"
    )
    coarse = blurred[(slice(None, None, spacing),) * image.ndim]
    if np.abs(coarse).max() > FARTHEST:
        warnings.warn(
            f"an image is more than {FARTHEST} voxels from the template somewhere, "
            "which is cut off: look whether it is an image as the others",
            stacklevel=2,
        )
    digits = np.clip(
        np.rint(coarse / parameters.precision),
        -parameters.farthest,
        parameters.farthest,
    )
    return _digits(warped, parameters), digits.astype(np.int64)


def _digits(image, parameters):
    return np.rint(np.clip(image, 0, 1) * parameters.brightest).astype(np.int64)


def _contribution(arguments):
    return contribution(*arguments)


# -- the template ------------------------------------------------------------


def blank_grid(parameters):
    """The grid of a template that begins with nothing: along the axes of space.

    Returns
    -------
    shape : tuple of int
    grid2world : array
        the middle of the grid is the origin of space.
    """
    shape, size = parameters.shape, parameters.voxel_size
    grid2world = np.diag([size] * len(shape) + [1.0])
    grid2world[:-1, -1] = -size * (np.array(shape) - 1) / 2
    return shape, grid2world


def _placed(image, grid2world, shape, place):
    """An image with its centre of mass in the middle of a grid."""
    matrix = np.eye(image.ndim + 1)
    middle = place @ np.append((np.array(shape) - 1) / 2, 1)
    matrix[:-1, -1] = world_center_of_mass(image, grid2world, "an")
    matrix[:-1, -1] -= middle[:-1]
    mapping = AffineMap(
        matrix,
        domain_grid_shape=shape,
        domain_grid2world=place,
        codomain_grid_shape=image.shape,
        codomain_grid2world=grid2world,
    )
    return mapping.transform(image)


def mean_displacement(coarse, shape, spacing):
    """A displacement field at every voxel from one at every `spacing`-th.

    Parameters
    ----------
    coarse : array, shape (..., dim)
    shape : tuple of int
    spacing : int

    Returns
    -------
    displacement : array, shape (\\*shape, dim)
    """
    at = np.indices(shape, dtype=np.float64) / spacing
    return np.stack(
        [
            ndimage.map_coordinates(coarse[..., i], at, order=1, mode="nearest")
            for i in range(len(shape))
        ],
        axis=-1,
    )


def moved_to_mean(image, displacement, step):
    """A template, moved towards the mean shape; the module says which way that is.

    Parameters
    ----------
    image : array
    displacement : array, shape (\\*image.shape, dim)
        mean displacement from the template to the images, voxels.
    step : float
        part of it of each of `REPEATS` steps.

    Returns
    -------
    image : array
    """
    at = np.indices(image.shape, dtype=np.float64)
    for _ in range(REPEATS):
        at = at - step * np.stack(
            [
                ndimage.map_coordinates(
                    displacement[..., i], at, order=1, mode="nearest"
                )
                for i in range(image.ndim)
            ]
        )
    moved = ndimage.map_coordinates(image, at, order=3, mode="nearest")
    return np.rint(np.clip(moved, 0, 1) * LEVELS) / LEVELS


def build_template(
    images,
    affines,
    *,
    session=None,
    initial=None,
    initial_affine=None,
    jobs=1,
    callback=None,
    ret_receipt=False,
    **parameters,
):
    """Build a template of images that lie at several sites, or all at hand.

    Parameters
    ----------
    images : sequence of array
        of this site, one or more.
    affines : sequence of array, shape (dim + 1, dim + 1)
        their voxel-to-space transformations.
    session : SumSession, optional
        of this site. By default all images are here, and nothing is secret.
    initial : array, optional
        template to start from, which all sites have, between 0 and 1; by default the
        mean of the images with their centres of mass in the middle of a grid, of which
        `shape` and `voxel_size` must be given.
    initial_affine : array, optional
        its voxel-to-space transformation.
    jobs : int, optional
        how many images are registered at the same time.
    callback : callable, optional
        called with a dict: ``iteration``, ``images`` that are done of it, and ``of``
        so many of this site; and after each iteration with ``template``.
    ret_receipt : bool, optional
        return the receipt, too; with a session.
    dim : {2, 3}, optional
        of the images; 3.
    iterations : int, optional
        how many times the images are registered; 4.
    step : float, optional
        of the mean displacement, by which the template is moved four times; 0.25.
    shape : sequence of int, optional
        of a template that begins with nothing.
    voxel_size : float, optional
        of it, mm.
    intensity_bits : int, optional
        binary digits of an intensity; 10.
    spacing, precision : int and float, optional
        displacements are added up at every 3rd voxel, to 1/16 of a voxel.
    affine_iters, sigmas, factors, sampling_proportion : optional
        of DIPY's affine registration.
    level_iters, radius : optional
        of DIPY's SyN with cross-correlation.

    Returns
    -------
    template : Template
    receipt : dict
        if asked for.

    Raises
    ------
    ParameterMismatchError
        if the sites do not ask for the same, or not for what their plan says.
    ValueError
        if an image, or the initial template, cannot be used: before anything is sent.

    Examples
    --------
    >>> with SumSession.load("plan.toml") as session:  # doctest: +SKIP
    ...     template = build_template(
    ...         images, affines, session=session, **session.parameters)
    """
    parameters = TemplateParameters(**parameters)
    images = [
        _checked(image, affine, parameters, n)
        for n, (image, affine) in enumerate(zip(images, affines, strict=True), 1)
    ]
    if not 0 < len(images) <= MOST_IMAGES:
        raise ValueError(f"give 1 to {MOST_IMAGES} images, not {len(images)}")
    begin = _initial(initial, initial_affine, parameters)
    sums = ClearSums() if session is None else session
    if session is not None:
        begins = _agree(session, initial, initial_affine, parameters)
    count = _count(images, sums)
    template = begin or _first(images, sums, count, parameters)
    for iteration in range(parameters.iterations):
        template = _next(
            template, images, sums, count, parameters, jobs, iteration, callback
        )
        if callback is not None:
            callback({"iteration": iteration, "template": template})
    if not ret_receipt:
        return template
    if session is None:
        raise ValueError("without a session there is no receipt")
    return template, session.receipt(
        operation="template",
        parameters={**parameters.plain(), **begins},
        images={"template": _grid(template)},
    )


def check_thickness(image, what):
    """Raise ValueError if an image is too thin to be part of a template."""
    check_slices(image, what, "choose an image with at least 3 voxels along each axis")


def _check_dim(image, parameters, what):
    if image.ndim != parameters.dim:
        other = f"or give dim = {image.ndim} at all sites"
        if image.ndim not in (2, 3):
            other = "one volume of a series"
        raise ValueError(
            f"{what} has {image.ndim} dimensions, {parameters.dim} are needed; choose "
            f"another, {other}"
        )


def _checked(image, affine, parameters, n):
    image, affine = np.asarray(image), np.asarray(affine, dtype=np.float64)
    _check_dim(image, parameters, f"image {n}")
    check_thickness(image, f"image {n}")
    check_image(image, affine, f"no. {n}")
    return scaled(image), affine


def _initial(initial, affine, parameters):
    if initial is None:
        if parameters.shape is None:
            raise ValueError(
                "give an initial template, or shape and voxel_size of a grid to begin "
                "with nothing"
            )
        return None
    if parameters.shape is not None:
        raise ValueError(
            "shape and voxel_size are for a template that begins with nothing; leave "
            "them out at all sites, or leave out the initial template"
        )
    initial = np.asarray(initial, dtype=np.float32)
    affine = np.asarray(affine, dtype=np.float64)
    _check_dim(initial, parameters, "the initial template")
    check_thickness(initial, "the initial template")
    check_image(initial, affine, "initial")
    return Template(scaled(initial), affine)


def _agree(session, initial, affine, parameters):
    """All sites ask for the same, and for what their plan says.

    Returns
    -------
    begins : dict
        hash of the initial template, if there is one.
    """
    if session.plan is not None:
        agreed = TemplateParameters(**session.parameters).plain()
        for name, value in parameters.plain().items():
            if value != agreed[name]:
                raise ParameterMismatchError(
                    f"{name} is {agreed[name]!r} by the plan, but {value!r:.100} in "
                    "this call; pass **session.parameters, or change the plan at all "
                    "sites"
                )
    # The hash of the initial template says that all sites begin alike.
    begins = {}
    if initial is not None:
        voxels = array_hash("", np.asarray(initial, float))
        begins["initial template"] = array_hash(voxels, np.asarray(affine, float))
    try:
        with session.phase("agreement"):
            session.agree("template", {**parameters.plain(), **begins})
    except ParameterMismatchError as exc:
        if exc.entry != "initial template":
            raise
        raise ParameterMismatchError(
            "the initial templates differ, in values or in position: give the same "
            "--initial file at all sites (from Python, initial and initial_affine)",
            exc.entry,
        ) from None
    return begins


def _grid(template):
    linear = template.grid2world[:-1, :-1]
    return {
        "shape": list(template.image.shape),
        "voxel_size": [float(x) for x in np.linalg.norm(linear, axis=0)],
    }


def _count(images, sums):
    """How many images there are in all: one or more of each site."""
    sites = len(sums.roles)
    (count,) = sums.total(
        [len(images)],
        "number_of_images",
        MOST_IMAGES,
        within=(sites, sites * MOST_IMAGES),
    )
    return int(count)


# The bounds on a site's own numbers are of as many images as any may have. `count` any
# site can steer: where a sum passes what follows from it, all stop.


def _mean_image(digits, sums, count, parameters):
    most, largest = MOST_IMAGES * parameters.brightest, count * parameters.brightest
    total = sums.total(digits, "sum_of_images", most, within=(0, largest))
    return total / largest


def _first(images, sums, count, parameters):
    shape, place = blank_grid(parameters)
    own = sum(_digits(_placed(*image, shape, place), parameters) for image in images)
    return Template(_mean_image(own, sums, count, parameters), place)


def _next(template, images, sums, count, parameters, jobs, iteration, callback):
    """The template of the next iteration."""
    center = world_center_of_mass(*template, "the template")
    tasks = [(*image, template, center, parameters) for image in images]
    pictures = displacements = 0
    for done, (warped, displacement) in enumerate(each(_contribution, tasks, jobs), 1):
        pictures, displacements = pictures + warped, displacements + displacement
        if callback is not None:
            callback({"iteration": iteration, "images": done, "of": len(images)})
    mean = _mean_image(pictures, sums, count, parameters)
    largest = count * parameters.farthest
    coarse = sums.total(
        displacements,
        "sum_of_displacements",
        MOST_IMAGES * parameters.farthest,
        signed=True,
        within=(-largest, largest),
    )
    field = mean_displacement(
        coarse * (parameters.precision / count), mean.shape, parameters.spacing
    )
    return Template(moved_to_mean(mean, field, parameters.step), template.grid2world)


def each(function, tasks, jobs):
    """What a function returns for each task, in order; by several processes at once.

    Parameters
    ----------
    function : callable
        of one argument, of a module.
    tasks : list
    jobs : int
    """
    if jobs == 1 or len(tasks) == 1:
        yield from map(function, tasks)
        return
    # Not by copies of this process, which would have the session's keys.
    with ProcessPoolExecutor(
        min(jobs, len(tasks)), mp_context=get_context("spawn")
    ) as pool:
        yield from pool.map(function, tasks)


def _mapped(arguments):
    return registered(*arguments)


def maps_to_template(images, affines, template, *, jobs=1, **parameters):
    """Register images to a finished template; nothing is sent.

    Parameters
    ----------
    images, affines, jobs
        see `build_template`.
    template : Template
    **parameters
        of `build_template`.

    Yields
    ------
    affine : array, shape (dim + 1, dim + 1)
        from the template's space to the image's.
    mapping : DiffeomorphicMap
        from the template to the image, `affine` included: ``mapping.transform(image)``
        is the image over the template.
    """
    parameters = TemplateParameters(**parameters)
    tasks = [
        (*_checked(image, affine, parameters, n), template, parameters)
        for n, (image, affine) in enumerate(zip(images, affines, strict=True), 1)
    ]
    yield from each(_mapped, tasks, jobs)
