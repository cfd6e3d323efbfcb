"""How far a registration has come: live on a terminal, log lines elsewhere.

A display is a context manager and is called with the dicts that `Stage` describes.
"""

import logging
import sys
import time

from dipy.align.imwarp import RegistrationStages
import numpy as np

from dipy_ppir.align.estimate import Line, speed
from dipy_ppir.mpc.meeting import missing_text
from dipy_ppir.workflows.streams import is_quiet

logger = logging.getLogger("dipy_ppir")


def size_text(n):
    """A number of bytes for people: ``12.3 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def duration_text(seconds):
    """A time for people, as exact as an estimate of it: ``20 s``, ``3 min``."""
    if seconds < 0.95:
        return f"{max(seconds, 0.1):.1f} s"
    if seconds < 9.5:
        return f"{seconds:.0f} s"
    if seconds < 57.5:
        return f"{5 * round(seconds / 5)} s"
    minutes = max(round(seconds / 60), 1)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes / 60:.1f} h"


def estimate_text(ahead, line=None):
    """What a registration takes, in words.

    Parameters
    ----------
    ahead : Estimate
    line : Line, optional
        by default all parties are on this machine.
    """
    about = "At most about" if ahead.at_most else "About"
    over = ""
    if line is not None:
        mbits = f"{line.bandwidth / 1e6:g} Mbit/s"
        over = f" over lines of {1000 * line.rtt:g} ms and {mbits}"
        computing = ahead.seconds(Line(0.0, float("inf")))
        over += f" ({duration_text(computing)} of it computing)"
    return (
        f"{about} {duration_text(ahead.seconds(line))}{over}, {size_text(ahead.sent)} "
        f"of traffic in all, up to {ahead.memory / 2**30:.1f} GiB of memory at the "
        "largest party"
    )


class Remaining:
    """How long a run will go on, from how long it took so far.

    Each iteration has its share of what was estimated. On one machine it takes so many
    times what was. Over a line that nobody has measured it takes so many times the
    computation and a time for each message that is waited for: by least squares, which
    begin with the computation as it was estimated. The last iterations count most.

    Parameters
    ----------
    ahead : Estimate
    line : bool, optional
        whether there is a network between the parties.
    clock : callable, optional
        returns seconds.
    """

    #: By how much iterations count less after each other one, how much the estimate
    #: does, and how many and how long they must be before anything is said.
    FADING, TRUST, FIRST, SHORTEST = 0.9, 0.1, 4, 2.0

    def __init__(self, ahead, *, line=False, clock=time.monotonic):
        self._clock, self._line, self._at_most = clock, line, ahead.at_most
        self._stages, self._speed = ahead.stages, speed()
        # Sums of products of estimated work, messages and seconds of iterations.
        self._sums = np.zeros((3, 3))
        self._seen, self._begun, self._last, self._end = 0, None, None, None

    def update(self, info):
        """Take over a callback's dict."""
        now, key = self._clock(), (info["step"], info["level"])
        before, self._last = self._last, now
        at = [k for k, s in enumerate(self._stages) if (s.step, s.level) == key]
        if not at or not self._stages[at[0]].iterations:
            return
        here, *later = self._stages[at[0] :]
        each = self._of(here) / here.iterations
        if before is None:
            self._begun = now
            return
        found = np.array([*each, now - before])
        self._sums = self.FADING * self._sums + np.outer(found, found)
        self._seen += 1
        if self._seen < self.FIRST or now - self._begun < self.SHORTEST:
            return
        left = each * max(here.iterations - info["iteration"], 0)
        factors = self._factors(each[0])
        end = now + float(factors @ sum(map(self._of, later), left))
        # What was said is not taken back at once.
        self._end = end if self._end is None else (self._end + end) / 2

    def _of(self, stage):
        """Seconds of work and number of messages."""
        return np.array([stage.work / self._speed, stage.waits])

    def _factors(self, work):
        """Seconds for each of estimated work, and for each message."""
        matrix, right = self._sums[:2, :2].copy(), self._sums[:2, 2].copy()
        if self._line and matrix[1, 1] > 0:
            # As if a part of an iteration had taken what was estimated.
            matrix[0, 0] += self.TRUST * work**2
            right[0] += self.TRUST * work**2
            factors = np.linalg.solve(matrix, right)
            if factors.min() >= 0:
                return factors
        return np.array([right[0] / matrix[0, 0], 0.0])

    @property
    def left(self):
        """Seconds; None while nothing is known."""
        return None if self._end is None else self._end - self._clock()

    @property
    def text(self):
        """For example ``about 20 s left``; nothing while nothing is known."""
        if self.left is None or self.left < 1:
            return ""
        about = "at most" if self._at_most else "about"
        return f"{about} {duration_text(self.left)} left"


class Stage:
    """Where a run is: one level of one step, and the best metric value in it.

    The callback's dict has ``step``, ``level``, ``iteration``, ``value`` and
    ``bytes_sent``, and may name the ``unit`` of iteration and the ``measure`` of value;
    a party that does not learn the value leaves it out.

    Parameters
    ----------
    steps : sequence of str
        steps of the pipeline that are optimized.
    levels : int
        resolution levels of each.
    """

    def __init__(self, steps, levels):
        self.steps = list(steps)
        self.levels = levels
        self.key = None

    @property
    def total(self):
        """Number of stages in the run."""
        return len(self.steps) * self.levels

    def update(self, info):
        """Take over a callback's dict; returns whether a new stage begins."""
        key = info["step"], info["level"]
        new = key != self.key
        if new:
            self.key, self.best = key, None
        self.info = info
        if "value" in info:
            value = info["value"]
            self.best = value if self.best is None else max(self.best, value)
        return new

    @property
    def number(self):
        """Number of this stage, from 1."""
        step, level = self.key
        return self.steps.index(step) * self.levels + self.levels - level

    @property
    def name(self):
        """For example ``rigid, level 1 of 3``; level 1 is the coarsest."""
        step, level = self.key
        step = step.replace("_", " ")
        return f"{step}, level {self.levels - level} of {self.levels}"

    @property
    def state(self):
        """Evaluations, metric and bytes, in words."""
        info = self.info
        measure = ""
        if self.best is not None:
            measure = f"{info.get('measure', 'mutual information')} {self.best:.4f}, "
        return (
            f"{info.get('unit', 'evaluation')} {info['iteration']}, {measure}"
            f"{size_text(info['bytes_sent'])} sent"
        )


class LogProgress:
    """A log line at the end of every level and about every `interval` seconds.

    Parameters
    ----------
    steps, levels
        see `Stage`.
    interval : float, optional
        seconds.
    clock : callable, optional
        returns seconds.
    """

    def __init__(self, steps, levels, *, interval=10.0, clock=time.monotonic):
        self._stage = Stage(steps, levels)
        self._interval = interval
        self._clock = clock
        self._remaining = None

    def expect(self, ahead, *, line=False):
        """Tell from here on how long it will take; see `Remaining`."""
        self._remaining = Remaining(ahead, line=line, clock=self._clock)

    def __enter__(self):
        self._last = self._clock()
        return self

    def __call__(self, info):
        """Take note of an evaluation."""
        stage = self._stage
        if stage.key is not None and (info["step"], info["level"]) != stage.key:
            self._end_stage(self._left)
        stage.update(info)
        if self._remaining is not None:
            self._remaining.update(info)
        if self._clock() - self._last >= self._interval:
            self._last = self._clock()
            logger.info("%s: %s%s ...", stage.name, stage.state, self._left)

    @property
    def _left(self):
        text = "" if self._remaining is None else self._remaining.text
        return f", {text}" if text else ""

    def _end_stage(self, left=""):
        self._last = self._clock()
        logger.info("%s done: %s%s", self._stage.name, self._stage.state, left)

    def __exit__(self, kind, exc, trace):
        if exc is None and self._stage.key is not None:
            self._end_stage()


class LiveProgress:
    """A display that updates itself in place.

    Parameters
    ----------
    steps, levels
        see `Stage`.
    console : rich.console.Console
    """

    def __init__(self, steps, levels, console):
        from rich.progress import (
            BarColumn,
            Progress,
            RenderableColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self._stage = Stage(steps, levels)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            # Counts down between two iterations.
            RenderableColumn(self),
            console=console,
            refresh_per_second=5,
        )
        self._task = self._progress.add_task(
            "starting the parties", total=self._stage.total, state=""
        )
        self._remaining = None

    def expect(self, ahead, *, line=False):
        """Tell from here on how long it will take; see `Remaining`."""
        self._remaining = Remaining(ahead, line=line)

    def __enter__(self):
        self._progress.start()
        return self

    def __call__(self, info):
        """Show an evaluation."""
        stage = self._stage
        stage.update(info)
        if self._remaining is not None:
            self._remaining.update(info)
        self._progress.update(
            self._task,
            description=stage.name,
            completed=stage.number - 1,
            state=stage.state,
        )

    def __rich__(self):
        """What is left, as `rich` shows it."""
        return "" if self._remaining is None else self._remaining.text

    def __exit__(self, kind, exc, trace):
        self._remaining = None
        if exc is None:
            self._progress.update(
                self._task, description="registered", completed=self._stage.total
            )
        self._progress.stop()


def deformation_callback(progress):
    """A callback for diffeomorphic registrations that shows each iteration.

    Parameters
    ----------
    progress : callable
        takes the dicts that `Stage` describes.

    Returns
    -------
    callback : callable
    """

    def report(registration, stage):
        if stage != RegistrationStages.ITER_END:
            return
        level = registration.current_level
        info = {
            "step": "deformation",
            "level": level,
            "iteration": registration.niter + 1,
            "unit": "iteration",
            "measure": "local correlation",
            "bytes_sent": sum(registration.session.ledger.sent.values()),
        }
        if registration.energy_list:
            shape = registration.static_ss.get_domain_shape(level)
            radius = registration.metric.radius
            voxels = np.prod([max(n - 2 * radius, 1) for n in shape])
            energy = max(-registration.energy_list[-1], 0)
            info["value"] = float(np.sqrt(energy / 2 / voxels))
        progress(info)

    return report


class Countdown:
    """Who is waited for and how long: live on a terminal, log lines elsewhere.

    A context manager that `Session.load` may call while it waits.

    Parameters
    ----------
    interval : float, optional
        seconds between two log lines.
    """

    def __init__(self, *, interval=30.0):
        self._interval, self._last, self._missing = interval, -np.inf, None
        self._status = None

    def __enter__(self):
        console = terminal()
        if console is not None:
            self._status = console.status("Connecting")
            self._status.start()
        return self

    def __call__(self, missing, left):
        """Take note of the missing parties and the seconds left."""
        if self._status is not None:
            self._status.update(missing_text(missing, left))
            return
        now = time.monotonic()
        if missing != self._missing or now - self._last >= self._interval:
            self._missing, self._last = list(missing), now
            logger.info("%s", missing_text(missing, left))

    def __exit__(self, kind, exc, trace):
        if self._status is not None:
            self._status.stop()


def terminal():
    """The terminal that standard output is, as rich knows it.

    None if it is none, or nothing is to be printed.
    """
    if sys.stdout.isatty() and not is_quiet():
        from rich.console import Console

        console = Console(file=sys.stdout)
        if console.is_terminal and not console.is_dumb_terminal:
            return console
    return None


def display(steps, levels):
    """The display that fits standard output."""
    console = terminal()
    if console is not None:
        return LiveProgress(steps, levels, console)
    return LogProgress(steps, levels)
