"""Rebuild the moving image from what a registration opens to the static owner.

An attack on ``SecureCCMetric(reveal="map", opens="levels")`` by the static owner. It
knows its own image, all parameters and what it was opened, and looks for a moving image
that would have led to the same: L-BFGS on the voxels, through the registration written
once more such that it can be differentiated. Where it is given more than an attacker
has, that is in its favour: it knows how the steps' scale was rounded and which range
the moving image has, and the best of all settings and iterations is reported, as if
somebody had told it when to stop.

This needs jax (``pip install jax``), besides dipy_ppir. To run it::

    python attack_syn.py static.png moving.png --scenarios levels receiver exact

Images are PNG, NIfTI or .npy, of one shape, in 2D or 3D, and roughly aligned. They are
resampled such that the longest side has ``--size`` voxels. It prints, for each scenario
and setting, the *detail* of the rebuilt image: its local correlation with the true one
after everything is taken out of both that the attacker's own image explains within a
window. 0 is the attacker's own image, 1 the truth. Beside it stand the detail of the
attacker's own image lightly smoothed, which takes no attack; the local correlation with
nothing taken out; and the misfit, root mean square of what is predicted less what was
opened, in standard deviations of its blur, which is 1 at the truth.
"""

import argparse
from functools import partial
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
import numpy as np
from scipy import ndimage

from dipy_ppir.align import carried as registration
from dipy_ppir.align.metrics import SecureCCMetric
from dipy_ppir.mpc.algebra import Clear, expression
from dipy_ppir.mpc.carried import AROUND, NEAR, NEARER, NORM_PART, REACH, points
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.linear import AxisMap

jax.config.update("jax_enable_x64", True)

#: Numbers that are not blurred count as known to this many voxels.
EXACT = 1e-3
#: From what the attacker starts; see `Setting`.
STARTS = "finished", "smoothed", "doubled", "own"
#: Windows of the measure have this radius.
RADIUS = 4


class Scenario(NamedTuple):
    """What the attacker is shown.

    Attributes
    ----------
    spacing : int
        of the grid on which the map is computed.
    level_precision : float
        0 for no blur.
    map_precision : float or None
        None if it does not get the result.
    steps : bool
        whether it is shown its step at each iteration, not blurred.
    halves : bool
        whether it is shown both halves of the map, and not the map composed of them.
    """

    spacing: int = 3
    level_precision: float = registration.LEVEL_PRECISION
    map_precision: float = None
    steps: bool = False
    halves: bool = False


SCENARIOS = {
    # An owner that does not get the result, with the defaults.
    "levels": Scenario(),
    # One that gets it, to an eighth, a quarter, half and a whole voxel.
    "receiver": Scenario(map_precision=0.125),
    "quarter": Scenario(map_precision=0.25),
    "half": Scenario(map_precision=0.5),
    "whole": Scenario(map_precision=1.0),
    "coarser": Scenario(spacing=4, map_precision=0.25),
    # Not offered: how strong is the attack if nothing is blurred?
    "exact": Scenario(level_precision=0, map_precision=0),
    "exact2": Scenario(spacing=2, level_precision=0, map_precision=0),
    "exact1": Scenario(spacing=1, level_precision=0, map_precision=0),
    # And if both halves of the map were opened?
    "halves": Scenario(level_precision=0, map_precision=0, halves=True),
    "halves-receiver": Scenario(map_precision=0.125, halves=True),
    "halves-half": Scenario(map_precision=0.5, halves=True),
    # Much like reveal="update".
    "steps": Scenario(
        spacing=2, level_precision=0, map_precision=0, steps=True, halves=True
    ),
}


class Setting(NamedTuple):
    """How the attacker proceeds.

    Attributes
    ----------
    start : {"finished", "smoothed", "doubled", "own"}
        the attacker's own image warped by the finished map, the same lightly smoothed,
        warped by its own half at the end of the last level but one, twice, or as it is.
    smooth : float
        standard deviation, voxels, of the Gaussian by which changes of the image are
        made of the numbers looked for.
    near : float
        weight of these numbers' squares.
    variation : float
        weight of the total variation.
    solver : {"lbfgs", "damped"}
    """

    start: str = "finished"
    smooth: float = 0.0
    near: float = 0.0
    variation: float = 0.0
    solver: str = "lbfgs"


# -- the registration that is attacked ---------------------------------------------


class Recorded(Clear):
    """The protocol in the clear: blurs what is opened, keeps how rates were rounded."""

    def __init__(self, scenario, rng):
        self.scenario, self.rng, self.opened, self.ratios = scenario, rng, {}, []

    def rates(self, norms, longest, power, digits):
        """See `Clear.rates`; keeps how far the rates are from exact ones."""
        rates = super().rates(norms, longest, power, digits)
        exact = [longest / max(x.part[0], 1e-300) ** (1 / power) for x in norms]
        self.ratios.append([r.factor[0] / x for r, x in zip(rates, exact, strict=True)])
        return rates

    def shown(self, *wanted):
        """Numbers with noise as wide as their precision, as receivers see them."""
        out = []
        for w in wanted:
            level = w.label.startswith("level")
            s = self.scenario
            width = s.level_precision if level else s.map_precision or 0
            numbers = [self._value(expression(x)) for x in w.numbers]
            value = np.stack(numbers)
            out.append(value + self.blur(width, value.shape))
            self.opened.setdefault(w.label, []).append((value, out[-1]))
        return out

    def blur(self, width, shape):
        """Noise as wide as a precision."""
        return width * self.rng.uniform(-0.5, 0.5, shape)


class RecordedLevels(registration.CarriedLevels):
    """The levels of a registration, which keep what each started with."""

    def __init__(self, *args):
        super().__init__(*args)
        self.starts, self.ranges = {}, {}

    def _start(self, owner, level, at):
        self.starts[owner, level] = super()._start(owner, level, at)
        half, scales = self._own(owner)
        image = half.transform_inverse(
            scales.get_image(level),
            image_world2grid=None,
            out_shape=np.array(at.shape, dtype=np.int32),
            out_grid2world=self.r.static_ss.get_affine(level),
        )
        self.ranges[owner, level] = registration.span(np.asarray(image, np.float64))
        return self.starts[owner, level]


class Recording(registration.ClearSymmetricDiffeomorphicRegistration):
    """A registration in the clear that keeps what is opened."""

    def __init__(self, metric, scenario, seed, **options):
        super().__init__(metric, **options)
        self.world = Recorded(scenario, np.random.default_rng(seed))
        # The rule that ends a level is not part of the attack.
        self.energy_window = 10**9

    def _optimize(self):
        self.levels_run = RecordedLevels(self, self.world, (STATIC, MOVING))
        self.displacements = self.levels_run.run()
        field = self.levels_run.show_map(self.displacements, (STATIC, MOVING))
        self.static_to_moving = registration.mapping(self, field)
        halves = np.stack([u.factor for x in self.displacements.values() for u in x])
        blur = self.world.blur(self.world.scenario.map_precision or 0, halves.shape)
        self.world.opened["halves"] = [(halves, halves + blur)]

    def _end_optimizer(self):
        """Keep the scale spaces, which DIPY throws away."""


# -- the same to be differentiated ---------------------------------------------------


def apply(matrices, x, mask=None):
    """A matrix along each axis of an array; None where it stays as it is."""
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            x = jnp.moveaxis(jnp.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return x if mask is None else x * mask


def matrices(linear):
    """The matrices of a `Linear` map."""
    return [None if a is None else a.matrix for a in linear.axes]


class LevelMaps:
    """The public maps of a level, as functions of arrays that can be differentiated."""

    def __init__(self, operators):
        o = self.o = operators
        r = o.radius
        windows = [
            (np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= r) * 1.0
            for n in o.shape
        ]
        self.box = partial(apply, windows)
        self.near, self.around = (self._sums(r + k) for k in (0, REACH))
        self.cubic = partial(apply, matrices(o.cubic))
        self.straight = partial(apply, matrices(o.straight))
        self.bends = [partial(apply, matrices(b), mask=b.mask) for b in o.bend]
        self.slopes = [partial(apply, matrices(o.slopes[k])) for k in o.keys]
        self.derivatives = [
            partial(apply, matrices(linear)) for linear in o.derivatives().values()
        ]
        self.smooths = []
        for axis, linear in enumerate(o.smooth):
            # The gradient has nothing at the border, along its axis.
            n = o.shape[axis]
            slope = np.gradient(np.eye(n), axis=0)
            slope[[0, -1]] = 0
            slopes = [None] * o.dim
            slopes[axis] = slope
            self.smooths.append((slopes, matrices(linear)))

    def _sums(self, radius):
        """Window sums at the coarse points, and how many voxels a window has."""
        sums = [
            (np.abs(np.subtract.outer(p, np.arange(n))) <= radius) * 1.0
            for p, n in zip(self.o.points, self.o.shape, strict=True)
        ]
        return partial(apply, sums), (2 * radius + 1) ** self.o.dim

    def window(self, x, y, sums=None):
        """Covariance within windows."""
        sums, n = sums or self.near
        return sums(x * y) / n - sums(x) * sums(y) / n**2

    def inverse_norm(self, image):
        """See `CarriedCorrelation._normalizing`."""
        near, around = (
            self.window(image, image, sums) for sums in (self.near, self.around)
        )
        r = (1 - AROUND) * near + AROUND * around + self.o.guard**2
        y = NEAR[0] + NEAR[1] * r
        for a, b, c in NEARER:
            z = r * y * y
            y = y * (a + b * z + c * z * z)
        return y

    def moves(self, step):
        """A step and the products of it that a Taylor polynomial needs."""
        o = self.o
        pairs = [k for k in o.keys if len(k) == 2]
        return [*step, *(step[a] * step[b] / (2 if a == b else 1) for a, b in pairs)]

    def carried(self, moves, x):
        """A coarse array carried along, without what is added to it."""
        return x + sum(d(x) * m for d, m in zip(self.slopes, moves, strict=False))

    def composed(self, back, away, times):
        """See `Carrier.composed`."""
        dim = self.o.dim
        for _ in range(times):
            step = back / times
            drift = jnp.stack([self.carried(step, u) - u for u in step])
            moves = [*(drift - step), *self.moves(step)[dim:]]
            back, away = (
                jnp.stack([self.carried(moves, u) for u in x]) for x in (back, away)
            )
        return away - back

    def carried_image(self, moves, x):
        """An image carried along."""
        out = x
        for k, (d, m) in enumerate(zip(self.derivatives, moves, strict=True)):
            out = out + (self.cubic if k < self.o.dim else self.straight)(m) * d(x)
        return out

    def iterate(self, halves, refine, ratios, longest):
        """One iteration: the new halves, and the steps of the static one."""
        n = self.o.window
        (s, e, u), (m, f, v) = halves
        weight = e * f
        rho = self.window(s, m) * weight
        alpha = self.straight(rho * weight)
        beta, gamma = self.straight((rho * e) ** 2), self.straight((rho * f) ** 2)
        cs, cm = s - self.box(s) / n, m - self.box(m) / n
        out, steps = [], None
        for k, (image, inverse, field, force) in enumerate(
            ((s, e, u, alpha * cm - beta * cs), (m, f, v, alpha * cs - gamma * cm))
        ):
            speed = jnp.stack(
                [
                    apply(smooth, force * apply(slopes, image))
                    for slopes, smooth in self.smooths
                ]
            )
            norm = ((speed**2).sum(0) ** 4).sum() + 1e-22
            step = speed * (longest / NORM_PART * norm ** (-1 / 8) * ratios[k])
            if k == 0:
                steps = step
            step = step + jnp.stack([sum(b(x) for b in self.bends) for x in field])
            moves = self.moves(step)
            anew = self.inverse_norm(image)
            out.append(
                (
                    self.carried_image(moves, image),
                    jnp.where(refine, anew, inverse),
                    jnp.stack([self.carried(moves, x) for x in field]) + step,
                )
            )
        return tuple(out), steps


class Prediction:
    """What a moving image leads to, as a function that can be differentiated.

    Parameters
    ----------
    run : Recording
        after it ran; of it is used what the attacker knows, the range of the moving
        image and how the steps' scale was rounded.
    moving : array
        the true moving image: of it only the range is used.
    unknown_scale : bool, optional
        without how the steps' scale was rounded.
    """

    def __init__(self, run, moving, unknown_scale=False):
        self.levels = run.levels
        self.recorded, self.r = run.levels_run, run
        self.iters, self.step = run.level_iters, run.step_length
        ratios = np.array(run.world.ratios)
        if unknown_scale:
            ratios = np.ones_like(ratios)
        self.at, self.maps, self.ratios, self.filters, self.range = {}, {}, {}, {}, {}
        for level in range(self.levels - 1, -1, -1):
            count = self.iters[-1 - level]
            self.ratios[level], ratios = ratios[:count], ratios[count:]
            self.at[level] = self.recorded.level(level)
            self.maps[level] = LevelMaps(self.at[level].operators)
            sigmas = run.moving_ss.get_sigmas(level)
            self.filters[level] = [
                ndimage.gaussian_filter1d(np.eye(n), s, axis=0) if s else np.eye(n)
                for n, s in zip(moving.shape, sigmas, strict=True)
            ]
            # All that is linear between the image and a level's start, in one.
            blurred = np.asarray(apply(self.filters[level], moving)).ravel()
            kept = np.asarray(run.moving_ss.get_image(level), np.float64).ravel()
            fit = np.polyfit(blurred, kept, 1)
            self.range[level] = (*fit, *self.recorded.ranges[MOVING, level])

    def _known(self, level, fields):
        """What an owner warps its image by at a level, of its half at the level above.

        Shown at some voxels, interpolated by splines to all, then linearly to the finer
        grid, where it is taken at the coarse points again. Here without the blur.

        Returns
        -------
        whole, coarse : array
        """
        before, now = self.at[level + 1], self.at[level]
        factors = self.r.static_ss.get_expand_factors(level + 1, level)
        fields, axes = self._shown(level + 1, fields), []
        for n, m, f in zip(before.shape, now.shape, factors, strict=True):
            q = self._thinned(n)
            at = np.arange(m) * f
            # Half of what lies beyond the last voxel is zero.
            linear = np.stack(
                [
                    np.interp(at, np.arange(-1, n + 1), row)
                    for row in np.eye(n, n + 2, 1)
                ]
            ).T
            axes.append(linear @ registration.spline(q, np.arange(n)))
        whole = jnp.stack(
            [apply(axes, x) / f for x, f in zip(fields, factors, strict=True)]
        )
        return whole, whole[(slice(None), *np.ix_(*now.operators.points))]

    def _moving(self, image, level, v):
        """The moving image, warped by its half, at the start of a level.

        Parameters
        ----------
        v : array or None
            its half at the end of the level above, on the grid of that level.
        """
        at, maps = self.at[level], self.maps[level]
        scale, offset, low, high, least, most = self.range[level]
        image = apply(self.filters[level], image) * scale + offset
        spacing = np.diag(at.directions)
        whole = jnp.indices(at.shape) * 1.0
        if v is not None:
            moved, known = self._known(level, v)
            whole = whole + moved
        whole = whole * spacing.reshape(-1, *[1] * len(spacing))
        image = map_coordinates(image, list(whole), order=1, mode="constant")
        image = (jnp.clip(image, least, most) - low) / (high - low)
        if v is None:
            zero = jnp.zeros((len(spacing), *at.operators.coarse))
            return image, maps.inverse_norm(image), zero
        return self._begun(level, image, known, self._first(level, v))

    def _begun(self, level, image, known, field):
        """A half at the start of a level, carried by what its owner was not shown."""
        maps = self.maps[level]
        image = maps.carried_image(maps.moves(field - known), image)
        return image, maps.inverse_norm(image), field

    def _static(self, level, u):
        """The static image at the start of a level; what its owner knows, as it was."""
        start, maps = self.recorded.starts[STATIC, level], self.maps[level]
        image, o = jnp.asarray(start.image), maps.o
        if u is None:
            return image, maps.inverse_norm(image), jnp.zeros((o.dim, *o.coarse))
        return self._begun(level, image, start.displacement, self._first(level, u))

    def _first(self, level, fields):
        """Fields at a level, brought there from the level above."""
        axes, factors = self.recorded.from_above(level)
        axes = [AxisMap(m, registration.GRID_UNIT).matrix for m in axes]
        return jnp.stack(
            [apply(axes, x) / f for x, f in zip(fields, factors, strict=True)]
        )

    @staticmethod
    def _thinned(n):
        thin = n < registration.THIN
        return points(n, 2 if thin else registration.LEVEL_SPACING)

    def _shown(self, level, u):
        """What an owner is shown of its half at the end of a level."""
        at = self.at[level]
        axes = []
        for p, n in zip(at.operators.points, at.shape, strict=True):
            matrix = registration.spline(p, self._thinned(n))
            axes.append(AxisMap(matrix, registration.GRID_UNIT).matrix)
        return jnp.stack([apply(axes, x) for x in u])

    def __call__(self, image):
        """What is opened, by label: level_static, map, halves, steps."""
        out, u, v = {"level_static": [], "steps": []}, None, None
        for level in range(self.levels - 1, -1, -1):
            maps, count = self.maps[level], self.iters[-1 - level]
            halves = self._static(level, u), self._moving(image, level, v)
            every = self.recorded.refinement()
            refine = np.arange(count) % every == every - 1

            def iterate(halves, each, maps=maps):
                return maps.iterate(halves, *each, self.step)

            each = jnp.asarray(refine), jnp.asarray(self.ratios[level])
            (static, moving), steps = jax.lax.scan(iterate, halves, each)
            u, v = static[2], moving[2]
            out["steps"].append(steps)
            if level:
                out["level_static"].append(self._shown(level, u))
        times = self.recorded.flow_steps(0, 0)
        out["map"] = [self.maps[0].composed(u, v, times)]
        out["halves"] = [jnp.concatenate([u, v])]
        return out


# -- the attack --------------------------------------------------------------------


class Detail:
    """How much of the true image is rebuilt that the attacker's own does not show."""

    def __init__(self, truth, own):
        self.truth, self.own = truth, own
        self.object = ndimage.binary_opening(truth > 0.1 * np.quantile(truth, 0.99))
        spread = np.sqrt(np.maximum(self._cov(truth, truth), 0))
        self.object &= spread > 0.02

    @staticmethod
    def _cov(x, y):
        mean = partial(ndimage.uniform_filter, size=2 * RADIUS + 1)
        return mean(x * y) - mean(x) * mean(y)

    def correlation(self, image):
        """Mean local correlation over the object."""
        return self._correlation(image, lambda x, y: self._cov(x, y))

    def __call__(self, image):
        """The same, with what the attacker's own image explains taken out."""
        own = self._cov(self.own, self.own) + 1e-9

        def partly(x, y):
            both = self._cov(x, self.own) * self._cov(y, self.own)
            return self._cov(x, y) - both / own

        return self._correlation(image, partly)

    def _correlation(self, image, cov):
        xx, yy = cov(image, image), cov(self.truth, self.truth)
        xy = cov(image, self.truth)
        bad = (xx < 1e-9) | (yy < 1e-9)
        corr = np.where(bad, 0, xy / np.sqrt(np.where(bad, 1, xx * yy)))
        return float(corr[self.object].mean())


def load(name):
    """An image between 0 and 1."""
    if name.endswith(".npy"):
        image = np.load(name)
    elif ".nii" in name:
        import nibabel

        image = nibabel.load(name).get_fdata()
    else:
        from PIL import Image

        image = np.asarray(Image.open(name).convert("F"))
    image = np.asarray(image, dtype=np.float64)
    return (image - image.min()) / (image.max() - image.min())


def resampled(image, size):
    """An image whose longest side has `size` voxels."""
    factor = size / max(image.shape)
    if factor < 1:
        image = ndimage.gaussian_filter(image, 0.4 * (1 / factor - 1))
    return np.clip(ndimage.zoom(image, factor, order=1), 0, 1)


def register(static, moving, scenario, args):
    """Run the registration that is attacked."""
    metric = SecureCCMetric(
        static.ndim, radius=args.radius, map_spacing=scenario.spacing
    )
    run = Recording(
        metric,
        scenario,
        args.seed,
        level_iters=list(args.iters),
        ss_sigma_factor=args.ss_sigma_factor,
    )
    return run, run.optimize(static, moving)


class Attack:
    """One registration, and what can be made of what it opened.

    Parameters
    ----------
    static, moving : array
    scenario : Scenario
    args : argparse.Namespace
    """

    def __init__(self, static, moving, scenario, args):
        self.scenario, self.args, self.truth = scenario, args, moving
        self.run, mapping = register(static, moving, scenario, args)
        self.predict = Prediction(self.run, moving, args.unknown_scale)
        self.starts = {
            "own": static,
            "finished": mapping.transform_inverse(static).astype(np.float64),
        }
        self.starts["smoothed"] = ndimage.gaussian_filter(self.starts["finished"], 1.0)
        self.starts["doubled"] = self._doubled(static)
        self.labels = ["level_static"]
        if scenario.map_precision is not None:
            self.labels.append("halves" if scenario.halves else "map")
        self._collect()
        self.detail = Detail(moving, self.starts["finished"])
        self.detail_own = Detail(moving, static)

    def _doubled(self, static):
        """The static image by its own half at the end of the last level but one, twice.

        The halves are much alike but for their sign.
        """
        levels = self.run.levels_run
        if self.run.levels == 1:
            return static
        known = levels.starts[STATIC, 0].displacement
        at = levels.level(0)
        axes = [
            registration.spline(p, np.arange(n))
            for p, n in zip(at.operators.points, at.shape, strict=True)
        ]
        whole = np.stack([np.asarray(apply(axes, x)) for x in known])
        return ndimage.map_coordinates(
            static, np.indices(static.shape) + 2 * whole, order=1
        )

    def _collect(self):
        """What was opened, and how well it is known."""
        opened, s = self.run.world.opened, self.scenario
        predicted = jax.jit(self.predict)(self.truth)
        self.opened, self.sigmas, self.mismatch = {}, {}, {}
        for label in self.labels:
            exact, self.opened[label] = zip(*opened[label], strict=True)
            width = s.level_precision if label[:5] == "level" else s.map_precision
            off = np.concatenate(
                [
                    np.ravel(np.asarray(a) - b)
                    for a, b in zip(predicted[label], exact, strict=True)
                ]
            )
            self.mismatch[label] = float(np.sqrt(np.mean(off**2)))
            self.sigmas[label] = np.sqrt(width**2 / 12 + self.mismatch[label] ** 2)
            self.sigmas[label] = max(self.sigmas[label], EXACT)
        if s.steps:
            self.labels.append("steps")
            self.opened["steps"] = [np.asarray(x) for x in predicted["steps"]]
            self.sigmas["steps"], self.mismatch["steps"] = EXACT, 0.0

    def residual(self, image):
        """What is predicted less what was opened, in standard deviations."""
        predicted = self.predict(image)
        return jnp.concatenate(
            [
                ((a - b) / self.sigmas[label]).ravel()
                for label in self.labels
                for a, b in zip(predicted[label], self.opened[label], strict=True)
            ]
        )

    def misfit(self, image):
        """Root mean square of `residual`."""
        return float(jnp.sqrt(jnp.mean(jax.jit(self.residual)(image) ** 2)))

    def rebuild(self, setting, seconds):
        """Look for the moving image.

        Returns
        -------
        best : dict
            by score, see `_Watch`, the best over all iterations.
        """
        start = jnp.asarray(self.starts[setting.start])
        spreads = [None] * start.ndim
        if setting.smooth:
            # Such that the numbers looked for change the image by their own size.
            spreads = [
                ndimage.gaussian_filter1d(np.eye(n), setting.smooth, axis=0)
                for n in start.shape
            ]
            spreads = [s / np.sqrt((s[len(s) // 2] ** 2).sum()) for s in spreads]

        def image_of(z):
            return start + apply(spreads, z.reshape(start.shape))

        def residual(z):
            image = image_of(z)
            parts = [self.residual(image), np.sqrt(setting.near) * z]
            if setting.variation:
                # Squares that add up to the variation, steps below 1 % smoothed.
                for a in range(image.ndim):
                    slope = jnp.diff(image, axis=a).ravel()
                    size = jnp.sqrt(slope**2 + 1e-4)
                    parts.append(jnp.sqrt(setting.variation / size) * slope)
            return jnp.concatenate(parts)

        watch = _Watch(self, image_of, seconds)
        watch.image = start
        try:
            SOLVERS[setting.solver](residual, jnp.zeros(start.size), watch)
        except TimeoutError:
            watch.best["end"] = "out of time"
        image = watch.image
        watch.best["misfit"] = self.misfit(image)
        return watch.best


class _Watch:
    """Keeps the best of all iterations by each score."""

    def __init__(self, attack, image_of, seconds):
        self.attack, self.image_of = attack, jax.jit(image_of)
        self.began, self.seconds, self.iterations = None, seconds, 0
        self.best = {"detail": -1.0, "own": -1.0, "correlation": -1.0, "end": "end"}

    def __call__(self, z):
        attack, best = self.attack, self.best
        # Compiling does not count.
        self.began = self.began or time.perf_counter()
        self.iterations += 1
        self.image = image = np.asarray(self.image_of(z))
        score = attack.detail(image)
        if score > best["detail"]:
            best.update(detail=score, image=image, at=self.iterations)
        best["own"] = max(best["own"], attack.detail_own(image))
        best["correlation"] = max(best["correlation"], attack.detail.correlation(image))
        used = time.perf_counter() - self.began
        best.update(last=score, iterations=self.iterations, seconds=used)
        if used > self.seconds:
            raise TimeoutError


def lbfgs(residual, z, watch, memory=30):
    """Quasi-Newton steps on half the sum of squares.

    Where the images are warped by linear interpolation the derivative jumps: a step is
    taken if it is downhill, and the memory forgotten if none is.
    """
    value = jax.jit(jax.value_and_grad(lambda z: 0.5 * (residual(z) ** 2).sum()))
    now, slope = value(z)
    pairs, failed, progress = [], False, [float(now)]
    while True:
        step, weights = -slope, []
        for s, y in reversed(pairs):
            weights.append((s @ step) / (s @ y))
            step = step - weights[-1] * y
        if pairs:
            s, y = pairs[-1]
            step = step * ((s @ y) / (y @ y))
        else:
            step = step * (0.01 / jnp.abs(step).max())
        for (s, y), weight in zip(pairs, reversed(weights), strict=True):
            step = step + s * (weight - (y @ step) / (s @ y))
        # No voxel by more than a tenth of the range at once.
        length = min(1.0, float(0.1 / jnp.abs(step).max()))
        downhill = float(step @ slope)
        for _ in range(12):
            after, gradient = value(z + length * step)
            if after < now + 1e-4 * length * downhill:
                break
            length /= 3
        else:
            if failed:
                break
            pairs, failed = [], True
            continue
        failed, s, y = False, length * step, gradient - slope
        if s @ y > 1e-8 * jnp.sqrt((s @ s) * (y @ y)):
            pairs = [*pairs[1 - memory :], (s, y)]
        z, now, slope = z + s, after, gradient
        watch(z)
        progress.append(float(now))
        if len(progress) > 100 and progress[-1] > (1 - 1e-4) * progress[-100]:
            break
    watch.best["end"] = "no better step" if failed else "converged"


def damped(residual, z, watch):
    """Levenberg's and Marquardt's steps, each found by conjugate gradients."""

    @jax.jit
    def step(z, damping):
        r, forward = jax.linearize(residual, z)
        backward = jax.linear_transpose(forward, z)
        (slope,) = backward(r)
        return jax.scipy.sparse.linalg.cg(
            lambda d: backward(forward(d))[0] + damping * d,
            -slope,
            maxiter=30,
            tol=1e-3,
        )[0]

    value = jax.jit(lambda z: (residual(z) ** 2).sum())
    damping, now = 10.0 * float(value(z)) / z.size, float(value(z))
    failed = 0
    while failed < 12:
        change = step(z, damping)
        for part in (1.0, 0.3):
            after = float(value(z + part * change))
            if after < now:
                break
        if after < now:
            gained, failed = 1 - after / now, 0
            z, now = z + part * change, after
            damping /= 3 if part == 1 else 1
            watch(z)
            if gained < 1e-5:
                break
        else:
            damping, failed = damping * 5, failed + 1
    watch.best["end"] = "converged" if failed < 12 else "no better step"


SOLVERS = {"lbfgs": lbfgs, "damped": damped}


#: Weights are per voxel of the numbers that an image is made of, in parts of its range.
SETTINGS = {
    "both": Setting(smooth=1.0, near=10.0, variation=2.0),
    "tight": Setting(smooth=1.0, near=200.0, variation=5.0),
    "tighter": Setting(smooth=1.0, near=1000.0, variation=5.0),
    "smooth": Setting(smooth=1.0, near=10.0),
    "variation": Setting(variation=5.0),
    "near": Setting(near=30.0),
    "plain": Setting(),
}
SETTINGS |= {f"{k}-damped": s._replace(solver="damped") for k, s in SETTINGS.items()}


def smoothed(image, detail):
    """Best detail of an image lightly smoothed, 0 if it is best as it is."""
    widths = 0.5, 0.75, 1.0, 1.25, 1.5
    return max(0.0, *(detail(ndimage.gaussian_filter(image, s)) for s in widths))


def main():
    """Attack one pair of images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("static")
    parser.add_argument("moving")
    parser.add_argument(
        "--scenarios", nargs="+", default=["levels", "receiver"], choices=SCENARIOS
    )
    parser.add_argument("--settings", nargs="+", default=["both"], choices=SETTINGS)
    parser.add_argument("--starts", nargs="+", default=["finished"], choices=STARTS)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--iters", type=int, nargs="+", default=[10, 10, 5])
    parser.add_argument("--radius", type=int, default=4)
    parser.add_argument("--ss-sigma-factor", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0, help="of the blur")
    parser.add_argument("--seconds", type=float, default=60, help="for each setting")
    parser.add_argument("--unknown-scale", action="store_true")
    parser.add_argument("--save", help="folder for the best images, as .npy")
    args = parser.parse_args()
    static, moving = (resampled(load(n), args.size) for n in (args.static, args.moving))
    for name in args.scenarios:
        attack = Attack(static, moving, SCENARIOS[name], args)
        finished = attack.starts["finished"]
        print(
            f"{name}: shape {static.shape}, own image: local correlation "
            f"{attack.detail.correlation(finished):.3f}, smoothed: detail "
            f"{smoothed(finished, attack.detail):.3f}; numbers opened "
            f"{len(attack.residual(moving))}, mismatch at the truth "
            f"{attack.mismatch}, misfit at the truth "
            f"{attack.misfit(moving):.2f}, of the own image "
            f"{attack.misfit(finished):.1f}",
            flush=True,
        )
        for start in args.starts:
            for setting in args.settings:
                chosen = SETTINGS[setting]._replace(start=start)
                best = attack.rebuild(chosen, args.seconds)
                print(
                    f"{name} {start} {setting}: detail {best['detail']:.3f} (last "
                    f"{best['last']:.3f}), not warped {best['own']:.3f}, local "
                    f"correlation {best['correlation']:.3f}, misfit "
                    f"{best['misfit']:.2f}, {best['iterations']} iterations, "
                    f"{best['seconds']:.0f} s, {best['end']}",
                    flush=True,
                )
                if args.save:
                    file = f"{args.save}/{name}-{start}-{setting}.npy"
                    np.save(file, best["image"])


if __name__ == "__main__":
    main()
