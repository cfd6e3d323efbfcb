r"""Affine registration whose steps are hidden: the transform itself stays on shares.

The optimizer is that of `quasinewton`, and takes every step of a fixed number, each
damped, so that there is nothing to decide. The moving owner is shown the transform in a
frame that moves at every evaluation (`frames`), and the transform once it is found.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.align.frames import Blur, Frame, nearest_parameters
from dipy_ppir.align.quasinewton import State, Taken, parts_by_size, update
from dipy_ppir.align.secretmetric import SecretMutualInformation, secret_numbers
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
    bits=15,
)

#: Part of a quasi-Newton step that is taken: noise is averaged over several.
PART = 0.4
#: So many of the last transforms are averaged, at most.
AVERAGED = 8
#: Fraction bits, and largest magnitude, of transforms that are shown blurred, and of
#: the result: in normal coordinates, relative to the start.
FRAME_DIGITS, LARGEST_FRAME = 20, 64
RESULT_DIGITS, LARGEST_RESULT = 12, 4
RESULT_PLACES = RESULT_DIGITS + LARGEST_RESULT.bit_length()
#: No image starts further from the other one, in the same.
FARTHEST = 32
_BLOCK = 1 << 16


def result_bits(dim):
    """Bits of the result that is shown."""
    return dim * (dim + 1) * RESULT_PLACES


class Hidden(NamedTuple):
    """A transform on shares, between the steps of a pipeline.

    Attributes
    ----------
    matrix : SharedArray, shape (dim, dim + 1)
        in normal coordinates.
    frame : Frame
    blur : Blur
        what has been shown of it.
    start : array, shape (dim + 1, dim + 1)
        what it was, mm; at the moving owner.
    kinds : tuple of Transform
        what it has been changed by.
    """

    matrix: SharedArray
    frame: Frame
    blur: Blur
    start: np.ndarray
    kinds: tuple


def hide(session, static, static_grid2world, moving, moving_grid2world, start):
    """Share where a registration starts.

    Parameters
    ----------
    session : Session
    static, moving : array or RemoteImage
    static_grid2world, moving_grid2world : array, shape (dim + 1, dim + 1)
        mm.
    start : array, shape (dim + 1, dim + 1)
        mm; at the moving owner.

    Returns
    -------
    hidden : Hidden

    Raises
    ------
    ValueError
        at the moving owner, if the images are too far apart.
    """
    dim = len(static.shape)
    frame = Frame(static.shape, static_grid2world, moving.shape, moving_grid2world)
    normal = None
    if session.pid == MOVING:
        normal = frame.normal(start)[:dim]
        if np.abs(normal).max() > FARTHEST:
            raise ValueError(
                "the two images are too far apart to start from; align their centres "
                "of mass first, or give a starting_affine"
            )
    matrix = secret_numbers(session).own(normal, (dim, dim + 1))
    return Hidden(matrix, frame, Blur(dim), start, ())


def show(session, hidden):
    """Show the moving owner the transform.

    Rounds: 2. Bytes: 48 for each number.

    Returns
    -------
    transform, params
        the largest kind that it has been changed by, and its parameters relative to
        the start; None elsewhere.
    """
    frame, dim, relative = hidden.frame, hidden.frame.dim, None
    if session.pid == MOVING:
        relative = np.linalg.inv(frame.normal(hidden.start))
    shown = secret_numbers(session).show_matrix(
        hidden.matrix,
        relative,
        MOVING,
        label="transform",
        digits=RESULT_DIGITS,
        bits=RESULT_PLACES,
        most=LARGEST_RESULT,
    )
    if shown is None:
        return None, None
    matrix = frame.moving_world(np.vstack([shown, np.eye(dim + 1)[-1]]))
    transform = max(hidden.kinds, key=lambda t: t.get_number_of_parameters())
    return transform, nearest_parameters(transform, matrix, frame)


class FramedMutualInformation(SecretMutualInformation):
    """One level's metric on shares, in a frame that moves at every evaluation.

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
        no step is longer.
    """

    def __init__(self, metric, numbers, hidden, kind, longest):
        super().__init__(metric, masked=True)
        self.numbers, self.frame, self.blur = numbers, hidden.frame, hidden.blur
        self.kind, self.longest = kind, longest
        #: What the components of a step do, in normal coordinates.
        self.generators = hidden.frame.generators(metric.transform)

    def evaluate(self, matrix):
        """Value and gradient by the components of a step, times `SCALE`, on shares.

        Besides what an evaluation costs where samples may be left out, rounds: 3.
        Bytes: 48 for each number of the matrix, and ``4 categories`` a sample.

        Parameters
        ----------
        matrix : SharedArray, shape (dim, dim + 1)
            in normal coordinates.
        """
        frame, change, placed = self.frame, None, (None, None)
        if self.session.pid == STATIC:
            change = frame.draw()
        shown = self.numbers.show_matrix(
            matrix,
            change,
            STATIC,
            label="moved_frame",
            digits=FRAME_DIGITS,
            bits=self.blur.show(self.kind, self.longest) / np.prod(matrix.shape),
            most=LARGEST_FRAME,
        )
        if change is not None:
            placed = self._static_at(frame.static_world(change))
        self.share_static(*placed)
        if shown is None:
            return self._evaluate()
        affine = frame.world(np.vstack([shown, np.eye(frame.dim + 1)[-1]]))
        return self._evaluate(affine, frame.moving_directions(self.generators) @ affine)

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
        after an evaluation; ``generators`` what the components do, in the moving
        space.
    matrix : array, shape (dim, dim + 1)
        where to start, in normal coordinates; secret.
    evaluations : int
        as many as steps.
    longest : float
        step before it is damped.
    on_step : callable, optional
        called after each.

    Returns
    -------
    matrix : array, shape (dim, dim + 1)
        secret.
    """
    parts, recent = parts_by_size(longest, PART), []
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
        matrix = numbers.moved(motion, matrix)
        recent.append(matrix)
        if on_step is not None:
            on_step()
    return numbers.mean(recent[-averaged(evaluations) :])
