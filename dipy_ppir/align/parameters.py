"""What a registration is asked for: its parameters, their defaults, what they may be.

One description serves keyword arguments, flags of the commands and session files, which
name a parameter each in its own way: see `ParameterError.spelled`.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

#: Steps of a pipeline to the type of their transform.
PIPELINE_STEPS = {
    "center_of_mass": None,
    "translation": "TRANSLATION",
    "rigid": "RIGID",
    "rigid_isoscaling": "RIGIDISOSCALING",
    "rigid_scaling": "RIGIDSCALING",
    "affine": "AFFINE",
}
#: Names of starts that the images determine.
STARTS = ("mass", "voxel-origin", "centers")
#: Iterations of the classes if none are given, as in DIPY, whose functions have others.
AFFINE_CLASS_ITERS, SYN_CLASS_ITERS = (10000, 1000, 100), (100, 100, 25)
#: Longest step of SyN where images are carried along on shares, in voxels: longer ones
#: do not come out right.
MOST_STEP = 0.5
#: More levels than any image has.
MOST_LEVELS = 16

#: Of the scale space of SyN: what DIPY has, and what carried images need.
_SIGMA_FACTORS = {False: 0.2, True: 0.4}
#: To how much of a voxel the map is opened by default, by dimension.
_PRECISION = {2: 0.5, 3: 0.25}
#: Defaults of what metrics do not have in common, by metric: of SyN, and affine ones.
_OF_SYN = {
    "radius": {"CC": 4},
    "sigma_diff": {"CC": 2.0, "MIND": 2.0},
    "smooth": {"SSD": 2.0},
}
_OF_AFFINE = {
    "nbins": {"MI": 32},
    "sampling_proportion": {"MI": None, "SSD": None},
    "sampling": {"SSD": "URS"},
    "seed": {"SSD": 0},
    "precision": {"SSD": 1 / 16},
    "radius": {"CC": 4},
}
#: What has a meaning only with the first metric, and what it is with the others.
_OF_CC = {"reveal": "map", "stride": 1, "update_spacing": 2, "backend": "packed"}
_OF_MI = {
    "reveal": "transform",
    "hide_steps": False,
    "method": "L-BFGS-B",
    "backend": "packed",
}


class ParameterError(ValueError):
    """A parameter that cannot be used.

    Parameters
    ----------
    text : str
        what is wrong and how to mend it, with names of parameters in braces.
    """

    def spelled(self, spell):
        """The message, with every parameter called what `spell` makes of its name."""
        return self.args[0].format_map(_Spelled(spell))

    def __str__(self):
        return self.spelled(str)


class UnknownParameterError(ParameterError, TypeError):
    """A parameter that there is not, as of any function."""


class _Spelled(dict):
    def __init__(self, spell):
        super().__init__()
        self._spell = spell

    def __missing__(self, name):
        return self._spell(name)


def shown(value):
    """A value for a message in which names of parameters are in braces."""
    text = repr(_plain(value))
    text = text if len(text) <= 100 else text[:97] + "..."
    return text.replace("{", "{{").replace("}", "}}")


def _plain(value):
    """The same out of Python's numbers and lists, whatever kind of array it is."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple | range):
        return [_plain(v) for v in value]
    return value


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _is(wanted, **limits):
    return Field(description=wanted, **limits)


def _one_of(*values):
    wanted = f"one of {', '.join(map(repr, values))}"
    return Annotated[Literal[values], _is(wanted)]


def _upper(value):
    return value.upper() if isinstance(value, str) else value


def _name_of(*names):
    """One of some names that may be written in small letters, as on command lines."""
    return Annotated[_one_of(*names), BeforeValidator(_upper)]


def _levels(kind):
    return Annotated[tuple[kind, ...], Field(min_length=1, max_length=MOST_LEVELS)]


def _of_levels(wanted):
    levels = f"1 to {MOST_LEVELS} levels, coarsest first"
    return f"a list of {wanted}, one for each of {levels}"


def _unless_scaled(data, default):
    """Of the other scale space, which sigma_factor does not describe."""
    return default if data.get("ss_sigma_factor") is None else None


def _of_metric(table, name, wanted, needs="metric"):
    """A parameter that not all metrics have, by default None if another one is."""
    return Field(
        default_factory=lambda d: (
            None if d.get(needs) is None else table[name].get(d.get("metric"))
        ),
        description=wanted,
    )


_Flag = Annotated[bool, _is("True or False")]
_Iterations = Annotated[
    _levels(Annotated[int, Field(ge=0)]), _is(_of_levels("integers from 0"))
]


class Parameters(BaseModel):
    """Public parameters of a registration, checked.

    Numbers and sequences may be numpy's; otherwise types are taken as they are: True is
    no number, and 4.0 is no whole one. None, which means the default, may be given for
    any of them.

    Raises
    ------
    ParameterError
        naming the parameter, its value and what it may be.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False
    )

    def __init__(self, **given):
        given = {name: _plain(v) for name, v in given.items() if v is not None}
        try:
            super().__init__(**{name: _tuples(v) for name, v in given.items()})
        except ValidationError as exc:
            raise self._explained(exc.errors()[0], given) from None

    @classmethod
    def _explained(cls, error, given):
        problem = error.get("ctx", {}).get("error")
        if isinstance(problem, ParameterError):
            return problem
        name = error["loc"][0]
        if name not in cls.model_fields:
            return UnknownParameterError(
                f"there is no parameter {shown(name)}; there are: "
                f"{', '.join(cls.model_fields)}"
            )
        wanted = cls.model_fields[name].description
        return ParameterError(f"{{{name}}} must be {wanted}; got {shown(given[name])}")

    @model_validator(mode="after")
    def _fit_together(self):
        if not any(getattr(self, "level_iters", [1])):
            raise ParameterError(
                "{level_iters} must not be 0 at every level, which leaves nothing to "
                f"do; got {shown(self.level_iters)}"
            )
        self._check()
        return self

    def _check(self):
        """Raise `ParameterError` if parameters contradict each other."""
        raise NotImplementedError

    def _check_metric(self, table, of_first, first):
        """Refuse what means nothing to the metric."""
        for name, defaults in table.items():
            if self.metric not in defaults and getattr(self, name) is not None:
                raise ParameterError(
                    f"{{{name}}} means nothing to {{metric}} {self.metric}; leave it "
                    f"out, or choose {{metric}} {' or '.join(defaults)}"
                )
        for name, only in of_first.items():
            if self.metric != first and getattr(self, name) != only:
                raise ParameterError(
                    f"{{{name}}} {shown(getattr(self, name))} means nothing to "
                    f"{{metric}} {self.metric}; leave it out, or choose {{metric}} "
                    f"{first}"
                )

    def _check_samples(self):
        """Refuse a seed or a kind of samples where there are none."""
        if self.sampling == "GMS" and self.seed:
            raise ParameterError(
                "{seed} is that of {sampling} URS; with GMS the moving owner draws "
                "samples that nobody else can work out: leave it out"
            )
        if self.sampling is not None and self.sampling_proportion is None:
            raise ParameterError(
                f"{{sampling}} {self.sampling} needs {{sampling_proportion}}, the part "
                "of the voxels that are samples"
            )
        if self.seed is not None and self.sampling is None:
            raise ParameterError(
                "{seed} is that of random samples, but all voxels are used; leave it "
                "out, or give {sampling_proportion}"
            )

    def plain(self, *names):
        """Those of these names, or all, as JSON has them."""
        return self.model_dump(mode="json", include=set(names) if names else None)


class AffineParameters(Parameters):
    """Parameters of `affine_registration`.

    Parameters
    ----------
    pipeline : sequence of str
        steps out of `PIPELINE_STEPS`.
    starting_affine : str, optional
        out of `STARTS`, if it is not a matrix, which is the moving owner's.
    level_iters, sigmas, factors, method, ss_sigma_factor
        see `SecureAffineRegistration`.
    evaluations : float
        how many times the planned evaluations are made, with ``reveal="transform"``.
    metric : {"MI", "SSD", "CC"}
        mutual information, the sum of squared differences, or local cross-correlation.
    nbins, sampling_proportion, reveal, hide_steps, backend
        see `SecureMutualInformationMetric`.
    sampling, seed, precision
        see `SecureSquaredDifferencesMetric`.
    radius
        see `SecureCrossCorrelationMetric`.
    result_to : str
        which image owners get the transform.
    ret_metric : bool
        whether the metric's value at the end is asked for.
    """

    pipeline: Annotated[
        tuple[Literal[tuple(PIPELINE_STEPS)], ...],
        _is(
            f"a list of one or more steps out of {', '.join(PIPELINE_STEPS)}",
            min_length=1,
            max_length=16,
        ),
    ] = ("center_of_mass", "translation", "rigid", "affine")
    starting_affine: _one_of(*STARTS) | None = Field(
        None,
        description=f"a matrix or one of {list(STARTS)} (numpy.loadtxt reads a file)",
    )
    level_iters: _Iterations = (1000, 500, 100)
    ss_sigma_factor: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="a number from 0 to 100"
    )
    sigmas: _levels(Annotated[float, Field(ge=0, le=1024)]) | None = Field(
        default_factory=lambda d: _unless_scaled(d, (3.0, 1.0, 0.0)),
        description=_of_levels("numbers from 0 to 1024"),
    )
    factors: _levels(Annotated[int, Field(ge=1, le=1024)]) | None = Field(
        default_factory=lambda d: _unless_scaled(d, (4, 2, 1)),
        description=_of_levels("integers from 1 to 1024"),
    )
    metric: _name_of("MI", "SSD", "CC") = "MI"
    nbins: Annotated[int, Field(ge=6, le=512)] | None = _of_metric(
        _OF_AFFINE,
        "nbins",
        "an integer from 6 to 512, of which 4 are padding (32 is usual)",
    )
    sampling_proportion: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="a number above 0 and at most 1; leave it out to use every voxel",
    )
    sampling: _name_of("URS", "GMS") | None = _of_metric(
        _OF_AFFINE, "sampling", "one of 'URS', 'GMS'", "sampling_proportion"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = _of_metric(
        _OF_AFFINE, "seed", "an integer from 0 to 2**63 - 1", "sampling"
    )
    precision: Annotated[float, Field(ge=2.0**-10, le=1)] | None = _of_metric(
        _OF_AFFINE, "precision", "a number from 2**-10 to 1"
    )
    radius: Annotated[int, Field(ge=1, le=20)] | None = _of_metric(
        _OF_AFFINE, "radius", "an integer from 1 to 20"
    )
    reveal: _one_of("transform", "gradient", "histogram") = "transform"
    hide_steps: _Flag = False
    evaluations: Annotated[
        float, _is("a number above 0 and at most 100", gt=0, le=100)
    ] = 1.0
    method: Annotated[str, _is("a method of scipy.optimize.minimize")] = "L-BFGS-B"
    backend: _one_of("packed", "mpyc") = "packed"
    result_to: _one_of("both", "moving") = "both"
    ret_metric: _Flag = False

    def _check(self):
        if self.ss_sigma_factor is None:
            counts = len(self.level_iters), len(self.sigmas), len(self.factors)
            if len(set(counts)) > 1:
                raise ParameterError(
                    "{level_iters}, {sigmas} and {factors} must have one entry per "
                    "level; got %d, %d and %d" % counts
                )
            if self.factors[-1] != 1:
                raise ParameterError(
                    "{factors} must end in 1, because the last level is the whole "
                    f"image whatever it says; got {shown(self.factors)}"
                )
        elif self.sigmas is not None or self.factors is not None:
            raise ParameterError(
                "{ss_sigma_factor} takes the place of {sigmas} and {factors}; give "
                "either the one or the others"
            )
        if self.ret_metric and set(self.pipeline) == {"center_of_mass"}:
            raise ParameterError(
                "{pipeline} ['center_of_mass'] cannot return any quality metric; leave "
                "{ret_metric} out"
            )
        if self.hide_steps and "rigid_scaling" in self.pipeline:
            raise ParameterError(
                "the steps of {pipeline} rigid_scaling cannot be hidden, because it "
                "depends on the axes of the moving image; use rigid, rigid_isoscaling "
                "or affine, or leave {hide_steps} out"
            )
        self._check_metric(_OF_AFFINE, _OF_MI, "MI")
        self._check_samples()
        if self.reveal == "transform":
            if self.method != "L-BFGS-B":
                raise ParameterError(
                    f"{{method}} {shown(self.method)} sees the value of the metric at "
                    'every step; with {reveal}="transform" leave it out, or choose '
                    '"gradient" and read in doc/security.md what that gives away'
                )
            return
        for name, default in (("hide_steps", False), ("evaluations", 1.0)):
            if getattr(self, name) != default:
                raise ParameterError(
                    f'{{{name}}} needs {{reveal}}="transform"; with '
                    f"{shown(self.reveal)} an optimizer at the moving owner chooses "
                    "the steps"
                )
        if self.backend == "mpyc":
            raise ParameterError('{backend}="mpyc" needs {reveal}="transform"')


class SynParameters(Parameters):
    """Parameters of `syn_registration`.

    Parameters
    ----------
    dim : {2, 3}
        of the images.
    metric : {"CC", "SSD", "MIND"}
        `SecureCCMetric`, `SecureSSDMetric` or `SecureMINDMetric`.
    level_iters, step_length, ss_sigma_factor, opt_tol, inv_iter, inv_tol, result_to
        see `SecureSymmetricDiffeomorphicRegistration`.
    sigma_diff, radius, reveal, map_spacing, opens, map_precision, update_spacing, \
stride, backend
        see `SecureCCMetric`.
    smooth
        see `SecureSSDMetric`.
    """

    dim: Annotated[int, _is("2 or 3", ge=2, le=3)] = 3
    metric: _name_of("CC", "SSD", "MIND") = "CC"
    level_iters: _Iterations = (10, 10, 5)
    step_length: Annotated[float, _is("a number above 0", gt=0)] = 0.25
    reveal: _one_of("map", "update", "force", "paper") = "map"
    ss_sigma_factor: Annotated[float, _is("a number from 0 to 100", ge=0, le=100)] = (
        Field(default_factory=lambda d: _SIGMA_FACTORS[d.get("reveal") == "map"])
    )
    opt_tol: Annotated[float, _is("a finite number")] = 1e-5
    inv_iter: Annotated[int, _is("an integer from 1", ge=1)] = 20
    inv_tol: Annotated[float, _is("a number above 0", gt=0)] = 1e-3
    sigma_diff: Annotated[float, Field(ge=0, le=100)] | None = _of_metric(
        _OF_SYN, "sigma_diff", "a number from 0 to 100"
    )
    smooth: Annotated[float, Field(ge=1, le=100)] | None = _of_metric(
        _OF_SYN, "smooth", "a number from 1 to 100"
    )
    # Beyond 20, exact window sums might not fit a word.
    radius: Annotated[int, Field(ge=1, le=20)] | None = _of_metric(
        _OF_SYN, "radius", "an integer from 1 to 20"
    )
    map_spacing: Annotated[int, _is("an integer from 2", ge=2)] = 3
    opens: _one_of("levels", "end") = "levels"
    map_precision: Annotated[
        float, _is("a number from 2**-10 to 1", ge=2.0**-10, le=1)
    ] = Field(default_factory=lambda d: _PRECISION.get(d.get("dim"), 1))
    stride: Annotated[int, _is("1 or 2", ge=1, le=2)] = 1
    update_spacing: Annotated[int, _is("an integer from 1", ge=1)] = Field(
        default_factory=lambda d: 2 * d.get("stride", 1)
    )
    backend: _one_of("packed", "mpyc") = "packed"
    result_to: _one_of("both", "moving", "static") = "both"

    def _check(self):
        self._check_metric(_OF_SYN, _OF_CC, "CC")
        if self.reveal == "map" and self.step_length > MOST_STEP:
            raise ParameterError(
                f"{{step_length}} must be at most {MOST_STEP} voxel where images are "
                f"carried along, got {shown(self.step_length)}: longer steps do not "
                "come out right"
            )
        smooths = self.sigma_diff is None or self.sigma_diff >= 1
        if self.reveal in ("map", "update") and not smooths:
            raise ParameterError(
                f"{{sigma_diff}} {shown(self.sigma_diff)} smooths so little that a "
                'step shows the force; give at least 1, or {reveal}="force"'
            )
        if self.backend == "mpyc" and self.reveal != "force":
            raise ParameterError('{backend}="mpyc" needs {reveal}="force"')


class PointParameters(Parameters):
    """Parameters of `point_registration`.

    Parameters
    ----------
    scaling, precision, result_to
        see there.
    reveal : str
        "transform", of which there is no other.
    """

    scaling: _Flag = False
    precision: Annotated[
        float, _is("a length in mm from 1e-9 to 1000", ge=1e-9, le=1000)
    ] = 0.005
    reveal: _one_of("transform") = "transform"
    result_to: _one_of("both", "moving", "static") = "both"

    def _check(self):
        """They cannot contradict each other."""


class FreeFormParameters(Parameters):
    """Parameters of `freeform_registration`.

    Parameters
    ----------
    dim : {2, 3}
        of the images.
    level_iters, factors, sigmas, spacing, bending, precision, opt_tol, max_step, \
sampling, sampling_proportion, seed, intensities, inv_iter, inv_tol, result_to, \
ret_metric
        see `SecureFreeFormRegistration`.
    reveal : str
        what the moving owner learns on the way: "steps".
    """

    dim: Annotated[int, _is("2 or 3", ge=2, le=3)] = 3
    level_iters: _Iterations = (10, 10, 10, 10)
    factors: _levels(Annotated[int, Field(ge=1, le=1024)]) = Field(
        default_factory=lambda d: _halves(len(d.get("level_iters", ()))),
        description=_of_levels("integers from 1 to 1024"),
    )
    sigmas: _levels(Annotated[float, Field(ge=0, le=1024)]) = Field(
        default_factory=lambda d: tuple(
            f / 2 if f > 1 else 0.0 for f in d.get("factors", ())
        ),
        description=_of_levels("numbers from 0 to 1024"),
    )
    # Beyond 32, sums in 3D might not fit a word.
    spacing: Annotated[int, _is("an integer from 2 to 32, voxels", ge=2, le=32)] = 5
    bending: Annotated[float, _is("a number from 0 to 1000", ge=0, le=1000)] = 0.03
    precision: Annotated[
        float, _is("a number from 2**-20 to 1, voxels", ge=2.0**-20, le=1)
    ] = 0.5
    opt_tol: Annotated[float, _is("a number from 0 to 1, voxels", ge=0, le=1)] = 0.125
    max_step: Annotated[
        float, _is("a number above 0 and at most 16, voxels", gt=0, le=16)
    ] = 2.0
    sampling_proportion: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="a number above 0 and at most 1; leave it out to use every voxel",
    )
    sampling: _name_of("URS", "GMS") | None = Field(
        default_factory=lambda d: (
            None if d.get("sampling_proportion") is None else "URS"
        ),
        description="one of 'URS', 'GMS'",
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(
        default_factory=lambda d: None if d.get("sampling") is None else 0,
        description="an integer from 0 to 2**63 - 1",
    )
    intensities: (
        Annotated[tuple[float, ...], Field(min_length=2, max_length=2)] | None
    ) = Field(None, description="two numbers, the lower one first")
    inv_iter: Annotated[int, _is("an integer from 1", ge=1)] = 20
    inv_tol: Annotated[float, _is("a number above 0", gt=0)] = 1e-3
    reveal: _one_of("steps") = "steps"
    result_to: _one_of("both", "moving", "static") = "both"
    ret_metric: _Flag = False

    def _check(self):
        counts = len(self.level_iters), len(self.factors), len(self.sigmas)
        if len(set(counts)) > 1:
            raise ParameterError(
                "{level_iters}, {factors} and {sigmas} must have one entry per level; "
                "got %d, %d and %d" % counts
            )
        if self.factors[-1] != 1:
            raise ParameterError(
                "{factors} must end in 1, because the last level is the whole image "
                f"whatever it says; got {shown(self.factors)}"
            )
        if self.intensities is not None and not (
            self.intensities[0] < self.intensities[1]
        ):
            raise ParameterError(
                "{intensities} must be two numbers, the lower one first; got "
                f"{shown(self.intensities)}"
            )
        self._check_samples()


def _halves(levels):
    """Powers of two down to 1."""
    return tuple(1 << k for k in reversed(range(levels)))


#: All defaults, for signatures.
AFFINE, SYN = AffineParameters(), SynParameters()
POINTS, FREEFORM = PointParameters(), FreeFormParameters()
