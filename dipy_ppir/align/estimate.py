"""How long a registration takes and how much it sends, roughly and ahead of time.

All of it follows from public numbers, so that every party comes to the same. Bytes and
rounds are those that the docstrings of the protocols state, added up over what is
planned: bytes come out to a tenth. Where a stopping rule may end a level early its
limit counts, and an optimizer of DIPY's is taken to make as many evaluations as it
commonly does, which may be half or twice as many.

Time is that of the computation: some for each iteration, and the rest in proportion to
what is sent and to the voxels that an owner resamples. It was fitted to runs on two
cores, of 40 x 48 x 38 to 192 x 160 x 192 voxels (``benchmarks/test_estimate.py``), most
of which it is within a quarter of, and all within a factor of two; `speed` makes up for
another machine. On a `Line` there come waiting and sending.
"""

from functools import lru_cache
import math
import os
import time
from typing import NamedTuple

from dipy.align.imwarp import ScaleSpace, get_direction_and_spacings
from dipy.align.scalespace import IsotropicScaleSpace
from dipy.align.transforms import regtransforms
import numpy as np

from dipy_ppir.align import ciphertexts, pairestimate, plan
from dipy_ppir.align.carried import (
    COMPOSED_STEP,
    REFINED_AFTER,
    THIN,
    TRANSPORTED_STEP,
    power_of_two,
    spacings,
)
from dipy_ppir.align.ccmetric import spacing_of
from dipy_ppir.align.descriptors import pairs
from dipy_ppir.align.gradientsampling import sample_count
from dipy_ppir.align.memory import peaks
from dipy_ppir.align.metrics import THINNING
from dipy_ppir.align.parameters import (
    PIPELINE_STEPS,
    AffineParameters,
    FreeFormParameters,
    PointParameters,
    SynParameters,
)
from dipy_ppir.align.quasinewton import opened_bits
from dipy_ppir.mpc import bfv, leastsquares
from dipy_ppir.mpc.algebra import RATE_STEPS
from dipy_ppir.mpc.bsplines import Lattice
from dipy_ppir.mpc.carried import Operators
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.localcc import Windows
from dipy_ppir.mpc.prg import Stream
from dipy_ppir.mpc.steps import BITS

#: Bytes of an element of most protocols, see `algebra`.
_ELEMENT = 16
#: Bytes of a logarithm in words of 32 and of 64 bits, see `logarithm`.
_LOGARITHM, _FINE_LOGARITHM = 1_540, 3_200
#: Bytes that a step of the optimizer on shares takes for p parameters, by powers of p:
#: see `numbers`; most of it is MPyC's comparisons and the rounding of components.
_STEP, _STEP_EACH, _STEP_SQUARE = 32_400, 2_530, 52
#: The same where steps are hidden.
_HIDDEN_STEP, _HIDDEN_STEP_EACH = 23_600, 1_650
#: Rounds of one of those: what MPyC's comparisons take at all parties together.
_STEP_WAITS, _HIDDEN_WAITS = 45, 48
#: Evaluations of DIPY's optimizer at each level, as is usual.
_EVALUATIONS = 35
#: What a registration takes besides: to agree, to judge the match, to sign.
_ENDS, _END_WAITS, _POINTS_END = 30_000, 8, 2_200
#: Of a deal: of both files that are for nothing, and to judge the match.
_FILES, _JUDGED = 4_000, 6_500


#: Of the bytes of SyN each owner sends a third and is sent a third, by both others.
_BUSIEST = {SynParameters: 2 / 3}


class Line(NamedTuple):
    """A network between the parties.

    Attributes
    ----------
    rtt : float
        seconds of a round trip.
    bandwidth : float
        bits a second of each party's line.
    """

    rtt: float
    bandwidth: float


#: What is taken for a network that nobody described.
USUAL = Line(0.02, 1e9)


class Stage(NamedTuple):
    """One level of one step, with what comes before its first iteration.

    Attributes
    ----------
    step : str
        of the pipeline, or "deformation"; "result" for what comes after all levels.
    level : int
        0 is the finest.
    iterations : int
        that are told to a callback.
    sent : float
        bytes over all links.
    waits : float
        rounds: messages that wait for one another, at whatever party.
    work : float
        seconds of computation, on two cores of the machine that it was fitted to.
    """

    step: str
    level: int
    iterations: int
    sent: float
    waits: float
    work: float


class Estimate(NamedTuple):
    """What a registration takes.

    Attributes
    ----------
    stages : tuple of Stage
    sent, waits, work : float
        see `Stage`; of all, with what comes before and after.
    memory : float
        bytes at the party that needs most; see `memory.peaks`.
    at_most : bool
        whether levels may end before their last iteration.
    busiest : float, optional
        part of the bytes that the busiest party's line carries.
    """

    stages: tuple
    sent: float
    waits: float
    work: float
    memory: float
    at_most: bool
    busiest: float = 1.0

    def seconds(self, line=None):
        """How long it takes on this machine.

        Parameters
        ----------
        line : Line, optional
            by default all parties are on this machine.
        """
        seconds = self.work / speed()
        if line is None:
            seconds += _START / speed()
        else:
            seconds += self.waits * line.rtt / 2
            seconds += 8 * self.busiest * self.sent / line.bandwidth
        return seconds


def estimate(
    parameters, static_shape, moving_shape, *, static_grid2world=None, alone=False
):
    """What a registration takes.

    Parameters
    ----------
    parameters : AffineParameters, SynParameters, FreeFormParameters or PointParameters
    static_shape, moving_shape : sequence of int
        of images, or of arrays of points.
    static_grid2world : array, shape (dim + 1, dim + 1), optional
        mm; voxels are cubes by default.
    alone : bool, optional
        whether two owners are alone, without a helper.

    Returns
    -------
    estimate : Estimate

    Raises
    ------
    NoiseBudgetError
        if two owners alone cannot register images of this size.
    """
    if isinstance(parameters, PointParameters):
        return _points(parameters, *static_shape, alone)
    shape, spacing = _grid(static_shape, static_grid2world)
    if isinstance(parameters, AffineParameters):
        of = _affine_alone if alone else _affine
        stages, at_most = of(parameters, shape, spacing), False
    elif isinstance(parameters, FreeFormParameters):
        of = _freeform_alone if alone else _freeform
        stages, at_most = of(parameters, shape, spacing), True
    else:
        stages = _syn(parameters, shape, spacing, alone)
        # The first iteration after which a level may end, see `CarriedLevels.stops`.
        at_most = max(parameters.level_iters) > 12
    stages = tuple(stages)
    voxels = math.prod(shape) + math.prod(int(n) for n in moving_shape)
    memory = peaks(parameters, shape, moving_shape, alone)
    busiest = 1.0 if alone else _BUSIEST.get(type(parameters), 1.0)
    return Estimate(
        stages,
        sum(s.sent for s in stages) + _ENDS,
        sum(s.waits for s in stages) + _END_WAITS,
        sum(s.work for s in stages) + _PREPARED * voxels,
        max(memory.values()),
        at_most,
        busiest,
    )


def dealt_bytes(parameters, static_shape, moving_shape, static_grid2world=None):
    """About how many bytes a helper sends; those that it deals ahead.

    Parameters
    ----------
    parameters, static_shape, moving_shape, static_grid2world
        see `estimate`.
    """
    if isinstance(parameters, PointParameters):
        # Points are not dealt for, but what their centres and products need.
        return estimate(parameters, (0, static_shape[1]), moving_shape).sent
    if isinstance(parameters, SynParameters):
        place = {"static_grid2world": static_grid2world}
        sent = estimate(parameters, static_shape, moving_shape, **place).sent
        # Of what is masked the helper corrects a third; all comparisons are its.
        count = sum(parameters.level_iters)
        compared = 2 * (len(RATE_STEPS) - 1) * _comparison(BITS) * count
        return compared + (sent - compared) / 3
    free = isinstance(parameters, FreeFormParameters)
    dealt = _freeform_dealt if free else _squares_dealt
    grid = _grid(static_shape, static_grid2world)
    return _FILES + sum(dealt(parameters, *grid))


def _grid(shape, grid2world):
    """Shape and spacing of a grid, mm; voxels are cubes without a matrix."""
    shape = tuple(int(n) for n in shape)
    if grid2world is None:
        return shape, np.ones(len(shape))
    return shape, get_direction_and_spacings(grid2world, len(shape))[1]


# -- affine --------------------------------------------------------------------


class _Costs(NamedTuple):
    """What a metric takes at one level.

    Attributes
    ----------
    kind : str
        in `_WORK`.
    samples : float
    once, each, value : float
        bytes: before the first evaluation, for each, and for a value by itself.
    once_waits, waits : int
        rounds of the same.
    """

    kind: str
    samples: float
    once: float
    each: float
    value: float
    once_waits: int
    waits: int


def _affine(p, shape, spacing):
    """Stages of an affine registration."""
    levels = len(p.level_iters)
    shapes = _shapes(shape, spacing, levels, p.factors)
    costs_of = {"SSD": _squares, "CC": _correlation}.get(p.metric, _information)
    for step, level, count, parameters in _affine_levels(p, len(shape)):
        costs = costs_of(p, level, shapes[level], parameters)
        yield _level(p, step, level, count, parameters, costs)
    if p.reveal == "transform" and PIPELINE_STEPS[p.pipeline[-1]] is not None:
        # The match is judged at the coarsest level, by two values.
        coarsest = _coarsest(p)
        costs = costs_of(p, coarsest, shapes[coarsest], parameters)
        sent = costs.once + 2 * costs.value
        work = _work(costs.kind, 0, sent, 2 * costs.samples)
        waits = costs.once_waits + 2 * costs.waits
        yield Stage("result", coarsest, 0, sent, waits, work)


def _affine_levels(p, dim):
    """Step, level, evaluations and number of parameters of each level of a step."""
    levels = len(p.level_iters)
    for place, step in enumerate(p.pipeline):
        kind = PIPELINE_STEPS[step]
        if kind is None:
            continue
        last = place == len(p.pipeline) - 1
        before = p.pipeline[place - 1] if place else ""
        counts = _planned(p, kind, levels, before, last)
        parameters = regtransforms[kind, dim].get_number_of_parameters()
        for count, level in zip(counts, range(levels - 1, -1, -1), strict=True):
            if count:
                yield step, level, count, parameters


def _coarsest(p):
    """The coarsest level that is iterated."""
    return len(p.level_iters) - 1 - next(k for k, n in enumerate(p.level_iters) if n)


def _affine_alone(p, shape, spacing):
    """The same of two owners alone; see `ciphertexts`."""
    levels = len(p.level_iters)
    shapes = _shapes(shape, spacing, levels, p.factors)
    # What is sent of a level serves other steps while its key is the last one.
    serves, shown, sent = p.metric != "SSD" and not p.hide_steps, 0.0, set()

    def costs(level, parameters, count):
        if p.metric == "SSD":
            return ciphertexts.squares(p, shapes[level], parameters, count)
        sizes = _information_size(p, level, shapes[level])
        return ciphertexts.information(p, *sizes, len(shape))

    for step, level, count, parameters in _affine_levels(p, len(shape)):
        once, each, _ = costs(level, parameters, count)
        times = count if p.hide_steps else level not in sent
        total, told = once * times + each * count, count
        if p.metric != "SSD":
            # Each step but the first is the outcome of an evaluation.
            told = count if p.hide_steps else count - 1
            total += told * (ciphertexts.STEP + ciphertexts.STEP_EACH * parameters)
        if serves:
            shown += told * opened_bits(parameters)
            sent.add(level)
        if shown > bfv.KEY_BITS - bfv.KEY_BITS // 4:
            shown, sent = 0.0, set()
        yield Stage(step, level, told, *total)
    if PIPELINE_STEPS[p.pipeline[-1]] is not None:
        coarsest = _coarsest(p)
        once, _, value = costs(coarsest, parameters, 0)
        once = 0 if p.metric == "SSD" or coarsest in sent else once
        total = ciphertexts.BEGIN + once + 2 * value
        yield Stage("result", coarsest, 0, *total)


def _level(p, step, level, count, parameters, costs):
    """A level of a step, with `count` evaluations."""
    sent, waits = 0.0, 0.0
    told = count
    if p.hide_steps:
        sent = count * (_HIDDEN_STEP + _HIDDEN_STEP_EACH * parameters)
        waits = count * _HIDDEN_WAITS
    elif p.reveal == "transform" and p.metric != "SSD":
        # Each step but the first is the outcome of an evaluation.
        told = count - 1
        each = _STEP + _STEP_EACH * parameters + _STEP_SQUARE * parameters**2
        sent, waits = told * each, told * _STEP_WAITS
    sent += costs.once * (count if p.hide_steps else 1) + costs.each * count
    waits += costs.once_waits + costs.waits * count
    work = _work(costs.kind, count, sent, costs.samples * count)
    return Stage(step, level, told, sent, waits, work)


def _planned(p, kind, levels, before, last):
    """Evaluations at each level, coarsest first."""
    if p.reveal != "transform":
        return [min(n, _EVALUATIONS) for n in p.level_iters]
    scale = p.evaluations
    if p.metric == "SSD":
        return plan.iterations(kind, levels, p.level_iters, scale=scale, last=last)
    return plan.evaluations(
        kind,
        levels,
        p.level_iters,
        scale=scale,
        rigid_before=before.startswith("rigid"),
        last=last,
        hidden=p.hide_steps,
    )


def _information_size(p, level, shape):
    """Bins and samples of mutual information at a level."""
    bins, n, on_shares = p.nbins, math.prod(shape), p.reveal == "transform"
    if on_shares and level:
        bins = min(bins, plan.COARSE_BINS)
    sampled = p.sampling_proportion is not None
    if sampled and not (on_shares and n <= plan.EVERY_VOXEL):
        n /= math.ceil(1 / p.sampling_proportion)
    return bins, n


def _information(p, level, shape, parameters):
    """Mutual information; see `information` and `parzenhist`."""
    bins, n = _information_size(p, level, shape)
    on_shares = p.reveal == "transform"
    categories = bins - 4
    cells = bins * categories + bins
    if on_shares:
        masked = p.hide_steps or p.sampling_proportion in (None, 1)
        each = 4 * (bins + masked) + 4 * (bins + categories + 2) + 12 * len(shape)
        each, once = n * each + _LOGARITHM * cells, 4 * n * categories
        return _Costs("MI", n, once, each, each, 2, 13)
    each = 8 * n * (bins + categories + 4 + parameters)
    if p.reveal == "gradient":
        each += 16 * n * bins + _FINE_LOGARITHM * cells
    waits = 10 if p.reveal == "gradient" else 5
    return _Costs(p.reveal, n, 8 * n * categories, each, 0.0, 2, waits)


def _correlation(p, level, shape, parameters):
    """Local cross-correlation; see `localcc`."""
    windows = Windows(shape, p.radius, spacing_of(shape, p.radius)).count
    n, dim = math.prod(shape), len(shape)
    value, slopes = n + 10 * windows, parameters + 3 * dim * (dim + 1) + 6
    each, once = value + windows * slopes, n + windows
    once, each, value = (_ELEMENT * x for x in (once, each, value))
    return _Costs("CC", n, once, each, value, 1, 7)


def _squares(p, level, shape, parameters):
    """Squared differences; see `leastsquares`."""
    voxels, dim = math.prod(shape), len(shape)
    n = sample_count(voxels, p.sampling_proportion)
    own = n < voxels
    hidden = own and p.sampling == "GMS"
    blocks = -(-n // leastsquares.BLOCK)
    each = 4 * dim * n + 52 * dim * (dim + 1) * blocks + 380 + 240 * parameters
    once = 4 * (dim + 1) * n
    if own:
        each, once = each + once + 4 * n * hidden, 0
    return _Costs("squares", n, once, each, 12 * voxels, 1, 4 + own + hidden)


def _squares_dealt(p, shape, spacing):
    """What the helper sends for each level of each step; see `leastsquares`."""
    shapes, dim = _shapes(shape, spacing, len(p.level_iters), p.factors), len(shape)
    for _, level, count, parameters in _affine_levels(p, dim):
        n = sample_count(math.prod(shapes[level]), p.sampling_proportion)
        blocks = -(-n // leastsquares.BLOCK)
        # Sums of blocks are corrected, and lifted to more bits; components are rounded.
        yield count * ((4 + 40) * dim * (dim + 1) * blocks + 32 * parameters + 72)
    if PIPELINE_STEPS[p.pipeline[-1]] is not None:
        yield _JUDGED


# -- deformations ----------------------------------------------------------------


def _syn(p, shape, spacing, alone):
    """Stages of SyN."""
    shapes = _shapes(shape, spacing, len(p.level_iters))
    if alone:
        yield from _syn_alone(p, shapes)
        return
    iters, carries = p.level_iters[::-1], p.reveal == "map"
    for level in range(len(iters) - 1, -1, -1):
        if iters[level] and carries:
            yield _carried_level(p, level, shapes, iters)
        elif iters[level]:
            yield _opened_level(p, level, shapes[level], iters[level])
    work = _MAP_WORK * math.prod(shape)
    if not carries:
        halves = 1 + (p.result_to == "both")
        sent = halves * math.prod(shape) * p.dim * 2 * 4
        yield Stage("result", 0, 0, sent, 3, work)
        return
    # The halves are composed.
    o = _operators(p, shapes[0])
    times, coarse = _composition(p), math.prod(o.coarse)
    sent = _ELEMENT * times * coarse * (3 * len(o.keys) + 6 * p.dim)
    sent += 2 * _comparison(BITS) + 32 * p.dim * coarse
    work += _work("syn", 0, sent, 0)
    yield Stage("result", 0, 0, sent, 2 * times + 10, work)


def _syn_alone(p, shapes):
    """Stages of SyN of two owners alone; see `pairestimate`."""
    iters, first = p.level_iters[::-1], True
    for level in range(len(iters) - 1, -1, -1):
        count, of = iters[level], _level_alone(p, shapes[level])
        if not count:
            continue
        times, parts = None, 0
        if p.opens == "end" and not first:
            times, parts = _transport(p, level)
        cost = of.cost(count, (count - 1) // _refinement(p), times, parts, first)
        yield Stage("deformation", level, count, *cost)
        first = False
    cost = _level_alone(p, shapes[0]).composing(_composition(p))
    work = cost.work + _MAP_WORK * math.prod(shapes[0])
    yield Stage("result", 0, 0, *cost._replace(work=work))


def _level_alone(p, shape):
    o = _operators(p, shape)
    channels = len(pairs(p.dim)) if p.metric == "MIND" else 1
    sizes = math.prod(o.shape), math.prod(o.coarse)
    return pairestimate.Level(*sizes, p.dim, channels, p.metric == "CC")


def _refinement(p):
    """At every how many iterations inverse norms are computed anew."""
    return max(math.floor(REFINED_AFTER / p.step_length + 0.1), 1)


def _transport(p, level):
    """In how many steps images are carried by whole halves; see `CarriedLevels`."""
    times = power_of_two(_longest(p, level, level + 1) / COMPOSED_STEP)
    parts = _longest(p, level, level + 1) / TRANSPORTED_STEP / times
    return times, power_of_two(parts)


def _composition(p):
    """In how many steps halves are put together."""
    return power_of_two(_longest(p, 0, 0) / COMPOSED_STEP)


def _carried_level(p, level, shapes, iters):
    """A level of SyN whose images are carried on shares; see `carried`."""
    o, dim, count = _operators(p, shapes[level]), p.dim, iters[level]
    channels = len(pairs(dim)) if p.metric == "MIND" else 1
    fine, coarse = math.prod(o.shape), math.prod(o.coarse)
    keys, correlates = len(o.keys), p.metric == "CC"
    # An image carried along a step, without the products of its components.
    carried, products = 6 * fine * channels, 6 * coarse * (keys - dim)
    each = coarse * (18 * dim + 12) + products
    if correlates:
        each += coarse * 24 + 6 * fine
    elements = count * each + (count - 1) * carried
    normalizing = 100 * coarse * correlates
    elements += normalizing * (1 + (count - 1) // _refinement(p))
    waits = count * (14 if correlates else 9) + 12
    # The images, and halves that are nothing yet.
    elements += 4 * fine * channels
    if not any(iters[level + 1 :]):
        elements += 4 * dim * coarse
    elif p.opens == "levels":
        elements += 12 * dim * coarse + products + carried
        waits += 5
    else:
        times, parts = _transport(p, level)
        elements += times * (coarse * (6 * dim + 12 * keys) + parts * carried)
        elements += 6 * dim * coarse
        waits += times * (4 + parts)
    # The norms of two steps.
    sent = _ELEMENT * elements + 2 * (len(RATE_STEPS) - 1) * _comparison(BITS) * count
    work = _work("syn" if correlates else "differences", count, sent, 0)
    return Stage("deformation", level, count, sent, waits, work)


def _operators(p, shape):
    """The coarse grid of a level; see `CarriedLevels.level`."""
    thinned = p.metric == "MIND" and p.dim == 3
    thinning = [THINNING if thinned and n >= THIN else 1 for n in shape]
    coarse = spacings(shape, p.map_spacing)
    return Operators(shape, p.radius or 0, 0.0, coarse, thinning=thinning)


def _longest(p, level, end):
    """See `CarriedLevels.longest`."""
    iters = p.level_iters[::-1]
    return p.step_length * sum(
        n * 2.0 ** (k - level) for k, n in enumerate(iters) if k >= end
    )


def _opened_level(p, level, shape, count):
    """A level of SyN with what is opened at each iteration; see `crosscorr`."""
    inner = [max(n - 2 * p.radius, 1) for n in shape]
    n = math.prod(-(-k // p.stride) for k in inner)
    voxels, dim = math.prod(shape), p.dim
    elements = 2 * voxels + 6 * n
    if p.reveal == "update":
        opened = math.prod(-(-k // p.update_spacing) + 1 for k in shape)
        elements += (12 + 2 * dim) * n + 4 * dim * opened
    elif p.reveal == "force":
        elements += 6 * n
    else:
        elements += 20 * n
    sent = _ELEMENT * elements * count
    work = _work("opened", count, sent, 2 * voxels * count)
    return Stage("deformation", level, count, sent, 7 * count, work)


def _freeform(p, shape, spacing):
    """Stages of a free-form registration; see `freeform`."""
    shapes, dim = _shapes(shape, spacing, len(p.factors), p.factors), p.dim
    for level, count in zip(range(len(shapes) - 1, -1, -1), p.level_iters, strict=True):
        if not count:
            continue
        voxels = math.prod(shapes[level])
        controls = math.prod(Lattice(shapes[level], (p.spacing,) * dim).control_shape)
        n = sample_count(voxels, p.sampling_proportion)
        hidden = n < voxels and p.sampling == "GMS"
        each = 8 * dim * n + 8 * 6 * dim * controls
        if hidden:
            each += (8 * (dim + 1) + 4) * n - 8 * dim * controls
        sent = count * each + 8 * voxels
        work = _work("freeform", count, sent, voxels * count)
        waits = count * (5 if hidden else 4) + 1
        yield Stage("deformation", level, count, sent, waits, work)
    n = math.prod(shape)
    controls = math.prod(Lattice(shape, (p.spacing,) * dim).control_shape)
    sent = 16 * n + 8 * n * (not p.level_iters[-1]) + 2 * dim * controls
    work = _work("freeform", 2, sent, 2 * n) + _MAP_WORK * n
    yield Stage("result", 0, 0, sent, 10, work)


def _freeform_dealt(p, shape, spacing):
    """What the helper sends for each level; see `freeform`."""
    shapes, dim = _shapes(shape, spacing, len(p.factors), p.factors), p.dim
    for level, count in zip(range(len(shapes) - 1, -1, -1), p.level_iters, strict=True):
        voxels = math.prod(shapes[level])
        controls = math.prod(Lattice(shapes[level], (p.spacing,) * dim).control_shape)
        n = sample_count(voxels, p.sampling_proportion)
        hidden = n < voxels and p.sampling == "GMS"
        words = 2 * controls + n if hidden else 3 * controls
        yield count * 8 * dim * words
    yield _JUDGED


def _freeform_alone(p, shape, spacing):
    """Stages of two owners alone; see `ciphertexts`."""
    shapes, dim = _shapes(shape, spacing, len(p.factors), p.factors), p.dim
    for level, count in zip(range(len(shapes) - 1, -1, -1), p.level_iters, strict=True):
        if not count:
            continue
        voxels = math.prod(shapes[level])
        controls = math.prod(Lattice(shapes[level], (p.spacing,) * dim).control_shape)
        once, each = ciphertexts.splines(p, shapes[level], controls)
        again = sample_count(voxels, p.sampling_proportion) < voxels
        total = (once + ciphertexts.KEY) * (count if again else 1) + each * count
        yield Stage("deformation", level, count, *total)
    n = math.prod(shape)
    total = ciphertexts.BEGIN + ciphertexts.match(n) + [0, 0, _MAP_WORK * n]
    yield Stage("result", 0, 0, *total)


# -- points ----------------------------------------------------------------------


def _points(p, n, dim, alone):
    """Of a registration of points; see `rotation` and `points`."""
    flat = dim == 2
    memory = max(peaks(p, (n, dim), (n, dim), alone).values())
    if alone:
        return Estimate((), *pairestimate.points(n, dim), memory, False)
    if flat:
        sent, waits = 2 * 72 + 656 + 2 * (64 + _comparison(58)), 29
    else:
        sent, waits = 9 * 72 + 6_784 + 3 * (64 + _comparison(58)), 81
        sent += 5 * _comparison(44)
    sent += 16 * dim * n + _POINTS_END
    waits += p.scaling
    work = _POINTS_WORK[flat] + _POINT_WORK * n * dim
    return Estimate((), sent, waits, work, memory, False)


# -- small things ---------------------------------------------------------------


def _comparison(bits):
    """Bytes of a number's step function, for each of its steps; see `steps`."""
    return 2 * ((bits - 1) * 33 + 16) + 16


# -- grids and time -----------------------------------------------------------------


def _shapes(shape, spacing, levels, factors=None):
    """Shapes of the levels' grids, the finest first.

    Parameters
    ----------
    shape : tuple of int
    spacing : array, shape (dim,)
        mm.
    levels : int
    factors : sequence of int, optional
        of an affine or free-form registration without ``ss_sigma_factor``.
    """
    dim = len(shape)
    blank, place = np.zeros((1,) * dim), np.diag([*spacing, 1.0])
    # Only sizes are wanted; see `SecureAffineRegistration`.
    with np.errstate(all="ignore"):
        options = {"image_grid2world": place, "input_spacing": spacing}
        if factors is None:
            space = ScaleSpace(blank, levels, sigma_factor=0.0, **options)
        else:
            factors = list(factors)
            space = IsotropicScaleSpace(blank, factors, [0.0] * levels, **options)
    rounding = 0.5 if factors is None else 0.0
    sizes = [np.array(shape) / scaling + rounding for scaling in space.scalings]
    return [tuple(max(int(n), 1) for n in size) for size in sizes]


#: Seconds to start the other parties here, for each voxel of both images, for each of
#: a map that is inverted; for points in space and in the plane, and each coordinate.
_START, _PREPARED, _MAP_WORK = 1.0, 1e-7, 4e-7
_POINTS_WORK, _POINT_WORK = (0.03, 0.01), 1e-7
#: Seconds for each iteration, byte, and voxel or sample that an owner handles.
_WORK = {
    "MI": (0.036, 5e-10, 4.2e-7),
    "gradient": (0.012, 7e-10, 0.0),
    "histogram": (0.005, 6e-10, 0.0),
    "CC": (0.03, 8.5e-9, 0.0),
    "squares": (0.0045, 2.3e-9, 1.1e-7),
    "syn": (0.02, 3.3e-9, 0.0),
    "differences": (0.02, 4.0e-9, 0.0),
    "opened": (0.003, 1.6e-9, 3.1e-7),
    "freeform": (0.003, 0.0, 4.1e-7),
}


def _work(kind, iterations, sent, voxels):
    """Seconds of computation; see `Stage`."""
    each, byte, voxel = _WORK[kind]
    return each * iterations + byte * sent + voxel * voxels


#: Seconds that `speed` measures on the machine that times were fitted to.
_REFERENCE = 1.83e-4
#: How often it does so, and of how many numbers.
_REPEATS, _NUMBERS = 20, 1 << 15


@lru_cache(maxsize=1)
def speed():
    """How fast this machine is, beside the one that times were fitted to.

    Random numbers of a ring are drawn and multiplied, which is what most of the time
    goes into; the best of several times counts, so that it hardly matters what else
    runs. Three processes on one core take twice as long as on two.
    """
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        R128.mul(*Stream(bytes(32)).words((2, _NUMBERS, 2)))
        times.append(time.perf_counter() - start)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return _REFERENCE / min(times) * min(cores, 2) / 2
