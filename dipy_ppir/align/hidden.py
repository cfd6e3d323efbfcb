r"""Affine registration whose steps are hidden: the transform itself stays on shares.

The optimizer is that of `quasinewton`, and takes every step of a fixed number, each
damped, so that there is nothing to decide. The moving owner is shown the transform in a
frame that moves at every evaluation (`frames`), and the transform once it is found.
"""

from typing import NamedTuple
from warnings import warn

import numpy as np

from dipy_ppir.align import plan
from dipy_ppir.align.frames import Blur, Frame, nearest_parameters
from dipy_ppir.align.quasinewton import (
    SIZE_PART,
    State,
    Taken,
    parts_by_size,
    update,
)
from dipy_ppir.align.secretmetric import SecretMutualInformation, secret_numbers
from dipy_ppir.align.validation import check_starting_affine
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.ledger import MOVING, STATIC, declare

declare(
    "moved_frame",
    receivers=(MOVING,),
    shape="dim x (dim + 1), each step",
    meaning="where to look up the moving image: the transform of this step, blurred by "
    "a random movement of several mm",
    bits=2,
)
declare(
    "transform",
    receivers=(MOVING,),
    shape="dim x (dim + 1), once",
    meaning="the resulting transform, to some hundredths of a mm",
    bits=16,
)

#: Part of a quasi-Newton step that is taken: noise is averaged over several.
PART = 0.4
#: So many of the last transforms are averaged, at most.
AVERAGED = 8
#: Fraction bits, and largest magnitude, of transforms that are shown blurred, and of
#: the result: in normal coordinates, relative to the start.
FRAME_DIGITS, LARGEST_FRAME = 14, 8
RESULT_DIGITS, LARGEST_RESULT = 12, 8
RESULT_PLACES = RESULT_DIGITS + LARGEST_RESULT.bit_length()
#: Steps of a pipeline are not longer than this together: even if each went the same
#: way, the transform would stay in the range that it is computed with.
LONGEST_PATH = 330.0
#: A result that is further than this part of the steps may be on its way still.
FAR = 1 / 3
#: Of a start, largest part by which distances along its axes differ: as small a part
#: of what moves a rigid transform is off.
_SIMILAR = 1e-3
_BLOCK = 1 << 16


def result_bits(dim):
    """Bits of the result that is shown."""
    return dim * (dim + 1) * RESULT_PLACES


class Hidden(NamedTuple):
    """A transform on shares, between the steps of a pipeline.

    Attributes
    ----------
    matrix : SharedArray, shape (dim, dim + 1)
        of the static space, in normal coordinates; the start comes after it.
    frame : Frame
    blur : Blur
        what has been shown of it.
    start : array, shape (dim + 1, dim + 1)
        from the static to the moving space, mm; at the moving owner.
    kinds : tuple of Transform
        what it has been changed by.
    reach : float
        no further than this it has been moved, in the unit of steps.
    """

    matrix: SharedArray
    frame: Frame
    blur: Blur
    start: np.ndarray
    kinds: tuple = ()
    reach: float = 0.0


def hide(session, frame, start):
    """Begin with the identity on shares, after which comes a start.

    Parameters
    ----------
    session : Session
    frame : Frame
    start : array, shape (dim + 1, dim + 1)
        mm; at the moving owner.

    Returns
    -------
    hidden : Hidden
    """
    identity = np.eye(frame.dim + 1)[:-1]
    matrix = secret_numbers(session).public(identity)
    return Hidden(matrix, frame, Blur(frame.dim), start)


def check_start(start, kind):
    """Refuse a start that a transform of this kind cannot be had after.

    In the static space, where steps are taken, a rigid transform that comes after a
    start is one only if the start leaves shapes as they are.

    Parameters
    ----------
    start : array, shape (dim + 1, dim + 1)
        at the moving owner.
    kind : str
        of the transform.

    Raises
    ------
    ValueError
        if it is not invertible, or shears or stretches.
    """
    check_starting_affine(start, len(start) - 1)
    scales = np.linalg.svd(start[:-1, :-1], compute_uv=False)
    if kind.startswith("RIGID") and scales[0] > scales[-1] * (1 + _SIMILAR):
        raise ValueError(
            "starting_affine shears or stretches, after which the steps of a "
            f"{kind.lower()} transform cannot be hidden; give one that does not, or "
            "use transform affine"
        )


def longest_step(level):
    """No step at a level, 0 being the coarsest, is longer."""
    return PART * plan.cap(level, hidden=True)


def reach(counts):
    """What the steps of a transform add up to, by evaluations at each level."""
    return sum(n * longest_step(level) for level, n in enumerate(counts))


def check_path(counts):
    """Refuse steps that could take a transform out of its range.

    Parameters
    ----------
    counts : list of list of int
        evaluations of every transform of a pipeline at each level, coarsest first.

    Raises
    ------
    ValueError
    """
    if sum(map(reach, counts)) > LONGEST_PATH:
        raise ValueError(
            f"{sum(map(sum, counts))} steps are too many to hide; lower the option "
            '"evaluations", give level_iters that are smaller, or take fewer steps in '
            "the pipeline"
        )


def show(session, hidden):
    """Show the moving owner the transform.

    Rounds: 1. Bytes: 16 for each number, and what is opened.

    Returns
    -------
    transform, params
        the largest kind that it has been changed by, and its parameters relative to
        the start; None elsewhere.
    """
    shown = secret_numbers(session).show_matrix(
        hidden.matrix,
        label="transform",
        digits=RESULT_DIGITS,
        bits=RESULT_PLACES,
        most=LARGEST_RESULT,
    )
    if shown is None:
        return None, None
    _check_reach(shown, hidden)
    transform = max(hidden.kinds, key=lambda t: t.get_number_of_parameters())
    return transform, nearest_parameters(transform, shown, hidden.start, hidden.frame)


def _check_reach(shown, hidden):
    """Warn where so short steps may not have been enough."""
    frame, dim = hidden.frame, hidden.frame.dim
    moved = shown - np.eye(dim + 1)[:dim]
    linear = moved[:, :dim] @ np.linalg.cholesky(frame.covariance)
    far = np.hypot(np.linalg.norm(linear), np.linalg.norm(moved[:, dim])) * frame.size
    most = hidden.reach * SIZE_PART * frame.size
    if far > FAR * most:
        warn(
            f"the image was moved by {far:.0f} mm, and hidden steps add up to "
            f"{most:.0f} mm if all go the same way: they may have ended on their way. "
            "Look at the result; start nearer (center_of_mass, starting_affine), take "
            'more steps (optimizer_options={"evaluations": 2}), or do not hide them',
            UserWarning,
            stacklevel=2,
        )


class FramedMutualInformation(SecretMutualInformation):
    """One level's metric on shares, in a frame that moves at every evaluation.

    With the start S and the hidden transform E, the moving image is looked up at
    S E R x. To a step from E to E exp(G) corresponds one of what the moving owner is
    shown, A = E R, to A exp(R^-1 G R): it gives the gradient along every small affine
    change of the static space, from which the static owner, who knows R, can have those
    taken that are meant.

    Samples that a frame moves out of the static image's grid are left out, which shows
    nowhere.

    Parameters
    ----------
    metric : SecureMutualInformationMetric
        set up with the images of the level that are here.
    numbers : SecretNumbers
    hidden : Hidden
    kind : str
        the transform.
    longest : float
        no step is longer; see `longest_step`.
    """

    def __init__(self, metric, numbers, hidden, kind, longest):
        super().__init__(metric, masked=True, anew=True)
        self.numbers, self.frame, self.blur = numbers, hidden.frame, hidden.blur
        self.kind, self.longest, self.start = kind, longest, hidden.start
        #: What the components of a step do, in normal coordinates.
        self.generators = self.frame.generators(metric.transform)
        self.columns = len(self.frame.affine)

    def evaluate(self, matrix):
        """Value and gradient by the components of a step, times `SCALE`, on shares.

        Besides what an evaluation costs where samples may be left out, rounds: 4.
        Bytes: 48 for each number of the matrix, 16 for each of the gradient and each
        of its columns, 48 for each of the gradient, and ``4 categories`` a sample.

        Parameters
        ----------
        matrix : SharedArray, shape (dim, dim + 1)
            in normal coordinates.
        """
        frame, n, dim = self.frame, self.numbers, self.frame.dim
        change, turn, right, placed = None, None, None, (None, None)
        if self.session.pid == STATIC:
            change = frame.draw()
            turn, right = frame.turned(change, self.generators), change[:dim]
            placed = self._static_at(frame.world(change))
        right = n.own(right, (dim, dim + 1), owner=STATIC)
        turn = n.own(turn, (self.parameters, self.columns), owner=STATIC)
        shown = n.show_matrix(
            n.product(matrix, right),
            label="moved_frame",
            digits=FRAME_DIGITS,
            bits=self.blur.show(self.kind, self.longest) / (dim * (dim + 1)),
            most=LARGEST_FRAME,
        )
        self.share_static(*placed)
        value, gradient = self._evaluate(*self._looked_up(shown))
        (gradient,) = n.dots((turn, gradient))
        return value, gradient

    def _looked_up(self, shown):
        """Where the moving image is, and how that changes; at the moving owner."""
        if shown is None:
            return ()
        frame = self.frame
        affine = self.start @ frame.world(np.vstack([shown, np.eye(frame.dim + 1)[-1]]))
        ways = (
            affine[:-1, :-1] @ frame.directions(generators)
            for generators in (frame.affine, self.generators)
        )
        return affine, *ways

    def _static_at(self, change):
        """The static image at changed positions, and whether they count."""
        metric, dim = self.metric, self.frame.dim
        to_voxels = metric.static_world2grid @ change
        last = np.array(metric.static.shape) - 1
        values = np.empty(self.positions.count)
        keep = np.empty(self.positions.count, dtype=bool)
        for start in range(0, len(values), _BLOCK):
            stop = min(start + _BLOCK, len(values))
            if metric.samples is None:
                points = self.positions(start, stop) @ self.positions.to_world.T
            else:
                points = metric.samples[start:stop]
            voxels = (points @ to_voxels.T)[:, :dim]
            inside = np.clip(voxels, 0, last)
            # Where nothing is moved, rounding does not count.
            keep[start:stop] = (np.abs(inside - voxels) < 1e-6).all(axis=1)
            values[start:stop], _ = metric.interp_method(metric.static, inside)
            if metric.static_mask is not None:
                nearest = tuple(np.rint(inside).astype(np.intp).T)
                keep[start:stop] &= metric.static_mask[nearest] != 0
        return values, keep


def averaged(steps):
    """How many of the last transforms of so many steps are averaged."""
    return min(AVERAGED, 1 << max(steps.bit_length() - 2, 0))


def minimise_hidden(numbers, metric, matrix, evaluations, longest, on_step=None):
    """Minimise a metric by a fixed number of steps, none of which is shown.

    Parameters
    ----------
    numbers : ClearNumbers
    metric : object
        ``evaluate(matrix)`` returns value and gradient by the components of a step,
        times ``quasinewton.SCALE``; ``first_inverse(numbers)`` what to begin with,
        after an evaluation; ``generators`` what the components do, in normal
        coordinates.
    matrix : array, shape (dim, dim + 1)
        where to start, in normal coordinates; secret.
    evaluations : int
        as many as steps.
    longest : float
        no step is longer; see `longest_step`.
    on_step : callable, optional
        called after each.

    Returns
    -------
    matrix : array, shape (dim, dim + 1)
        secret.
    """
    parts, recent = parts_by_size(longest / PART, PART), []
    state = step = None
    for _ in range(evaluations):
        value, gradient = metric.evaluate(matrix)
        if state is None:
            state = State(value, gradient, metric.first_inverse(numbers))
        else:
            found = value, gradient
            state, _ = update(numbers, state, *step, *found, choose=False)
        (ascent,) = numbers.dots((state.inverse, state.gradient))
        *taken, motion = numbers.limited(ascent, parts, metric.generators)
        step = Taken(*taken), ascent
        matrix = numbers.moved(matrix, motion)
        recent.append(matrix)
        if on_step is not None:
            on_step()
    return numbers.mean(recent[-averaged(evaluations) :])
