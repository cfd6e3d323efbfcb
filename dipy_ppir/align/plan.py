"""How many evaluations the optimizer on shares makes: fixed, so that they tell nothing.

44 for an affine registration of three levels: 4 at the coarsest for the translation;
10, 6 and 4 for the rigid transform; 10 and 10 at the two finer ones for what it lacks
to an affine one. They do what takes L-BFGS-B some 400. Hidden steps are 52, because
none is left out and noise is averaged.
"""

#: Evaluations at the coarsest, the middle and the finest levels; of a transform with
#: others after it, and of the last.
BEFORE = {"TRANSLATION": (4, 0, 0), "RIGID": (10, 6, 4)}
LAST = {"TRANSLATION": (6, 4, 4), "RIGID": (10, 6, 4)}
FULL = (10, 10, 10)
#: The same where steps are hidden: all are taken, and are damped.
HIDDEN_BEFORE = {"TRANSLATION": (4, 0, 0), "RIGID": (12, 6, 0)}
HIDDEN_LAST = {"TRANSLATION": (8, 4, 8), "RIGID": (12, 8, 16)}
HIDDEN_FULL = (12, 14, 16)
#: Longest step at the coarsest, the middle and the finest levels, in 64ths of the
#: object's size; about mm of a human brain.
CAPS, HIDDEN_CAPS = (8.0, 4.0, 2.0), (12.0, 4.0, 1.0)
#: Bins of the joint histogram at all levels but the finest, at most: as good as 32.
COARSE_BINS = 16
#: Levels of no more voxels are sampled at every one, on shares.
EVERY_VOXEL = 60_000
#: A single level makes up for the others.
MOST_ALONE = 20
#: Gauss-Newton iterations: of a translation and of others with more after them, and of
#: the last transform.
STEPS_BEFORE, STEPS_LAST = {"TRANSLATION": (6, 0, 0)}, (12, 6, 3)
STEPS_BETWEEN = (8, 0, 0)


def _of_level(three, level, levels):
    """Which of three numbers is that of a level, 0 being the coarsest."""
    if level == 0:
        return three[0]
    return three[2] if level == levels - 1 and levels > 2 else three[1]


def evaluations(
    kind,
    levels,
    level_iters,
    *,
    scale=1.0,
    rigid_before=False,
    last=True,
    hidden=False,
):
    """Evaluations at each level, coarsest first.

    Parameters
    ----------
    kind : str
        the transform: "TRANSLATION", "RIGID", ... "AFFINE".
    levels : int
    level_iters : sequence of int
        no level has more evaluations than this, coarsest first. What 0 leaves out is
        done by the other levels.
    scale : float, optional
        how many times as many as planned.
    rigid_before : bool, optional
        whether a rigid transform was found before; then the coarsest level, which has
        nothing to add, is left out.
    last : bool, optional
        whether this is the last transform of a pipeline.
    hidden : bool, optional
        whether the steps are hidden.

    Returns
    -------
    evaluations : list of int
        0 for a level that is left out.
    """
    used = [level for level in range(levels) if level_iters[level]]
    if hidden:
        plan = (HIDDEN_LAST if last else HIDDEN_BEFORE).get(kind, HIDDEN_FULL)
    else:
        plan = (LAST if last else BEFORE).get(kind, FULL)
    if len(used) == 1:
        plan = (min(sum(plan), MOST_ALONE),)
    elif rigid_before and kind not in LAST:
        plan = (0, *plan[1:])
    counts = [0] * levels
    for place, level in enumerate(used):
        planned = plan[0] if len(used) == 1 else _of_level(plan, place, len(used))
        count = min(-int(-planned * scale // 1), int(level_iters[level]))
        # An evaluation alone moves nothing, but where a step follows the last one too.
        counts[level] = count if count > 1 or hidden else 0
    if last and not hidden and used and not counts[used[-1]]:
        counts[used[-1]] = 1
    return counts


def iterations(kind, levels, level_iters, *, scale=1.0, last=True):
    """Gauss-Newton iterations at each level, coarsest first; see `evaluations`."""
    planned = STEPS_LAST if last else STEPS_BEFORE.get(kind, STEPS_BETWEEN)
    used = [level for level in range(levels) if level_iters[level]]
    counts = [0] * levels
    for place, level in enumerate(used):
        most = _of_level(planned, place, len(used))
        counts[level] = min(-int(-most * scale // 1), int(level_iters[level]))
    return counts


def cap(level, *, hidden=False):
    """Longest step at a level, 0 being the coarsest."""
    caps = HIDDEN_CAPS if hidden else CAPS
    return caps[min(level, len(caps) - 1)]
