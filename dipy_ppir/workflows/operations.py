"""What a session file may ask for, and what that means in plain words."""

from dataclasses import dataclass, field
import math
from pathlib import Path

import numpy as np

from dipy_ppir.align import (
    affine_registration,
    freeform_registration,
    point_registration,
    syn_registration,
)
from dipy_ppir.align._public import check_steps, planned_bits, registration_of
from dipy_ppir.align.agreed import entries, parameters_of
from dipy_ppir.align.estimate import USUAL, dealt_bytes, estimate
from dipy_ppir.align.memory import peaks
from dipy_ppir.align.parameters import AffineParameters, PointParameters
from dipy_ppir.align.points import planned_bits as point_bits
from dipy_ppir.mpc.errors import NoiseBudgetError, SessionFileError
from dipy_ppir.mpc.ledger import (
    DECLARATIONS,
    HELPER,
    MAPS,
    MOVING,
    REBUILDS,
    ROLES,
    STATIC,
)
from dipy_ppir.mpc.receipt import ALONE
from dipy_ppir.mpc.sessionfile import SessionFile
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.openings import LIMIT
from dipy_ppir.workflows.progress import estimate_text, size_text


@dataclass(frozen=True)
class Operation:
    """One kind of registration.

    Attributes
    ----------
    function : callable
        of `dipy_ppir.align`.
    command : str
        what the owners run.
    title : str
        for people.
    by : dict
        maps metrics to what they are called there.
    opens : dict
        maps each value of ``reveal`` to the labels that are opened.
    opened : callable
        the labels that are opened with such parameters, before the result.
    result : dict
        maps party numbers to labels opened to them at the end, if they get the result.
    hidden : tuple
        labels that are opened where steps are hidden.
    of_metrics : dict
        maps metrics to the labels that are opened with them, if it is not `opens`.
    results : dict
        maps values of ``reveal`` to what takes the place of `result`.
    data : str
        what an owner has.
    example : str
        name of a file with it.
    """

    function: object
    command: str
    title: str
    opens: dict
    opened: object
    result: dict
    hidden: tuple = ()
    of_metrics: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)
    data: str = "image"
    example: str = "your_image.nii.gz"
    by: dict = field(default_factory=dict)

    def titled(self, metric):
        """The title, with the metric if it is one of several: without any the first."""
        metric = metric if isinstance(metric, str) else next(iter(self.by), None)
        by = self.by.get(metric)
        return self.title if by is None else f"{self.title} by {by}"

    def shown(self, reveal, pid):
        """Labels opened to a party at the end, if it gets the result."""
        return self.results.get(reveal, self.result).get(pid, ())


def _opened_by_affine(parameters):
    affine = OPERATIONS["affine"]
    labels = affine.hidden if parameters.hide_steps else affine.opens[parameters.reveal]
    labels = affine.of_metrics.get(parameters.metric, labels)
    centers = "center_of_mass"
    starts = centers in parameters.pipeline or parameters.starting_affine == "mass"
    if set(parameters.pipeline) == {centers}:
        return [centers]
    unopened = set() if starts else {centers}
    if parameters.sampling != "GMS":
        unopened.add("edge_samples")
    if parameters.pipeline[-1] == centers:
        unopened |= {"mismatch", "stuck"}
    if parameters.result_to != "both":
        unopened.add("stuck")
    # With the others of `reveal` it is known anyway.
    asked = parameters.ret_metric and parameters.reveal == "transform"
    value = ["final_value"] if asked else []
    return [label for label in labels if label not in unopened] + value


def _opened_by_syn(parameters):
    labels = OPERATIONS["syn"].opens[parameters.reveal]
    # A half is shown for a finer level that makes use of it.
    levels = sum(n > 0 for n in parameters.level_iters)
    at_levels = parameters.opens == "levels" and levels > 1
    return [x for x in labels if at_levels or not x.startswith("level_")]


def _opened_by_freeform(parameters):
    hidden = parameters.sampling == "GMS"
    return [
        "control_point_steps",
        "mismatch",
        *(["edge_samples"] if hidden else []),
        *(["mean_square"] if parameters.ret_metric else []),
    ]


def check_plan(parameters):
    """Raise ValueError if steps that are planned ahead cannot be taken.

    Parameters
    ----------
    parameters : Parameters
    """
    if isinstance(parameters, AffineParameters):
        check_steps(registration_of(parameters), parameters.pipeline, 3)


_MATCH = ("correlation",)
OPERATIONS = {
    "affine": Operation(
        function=affine_registration,
        command="dipy_ppir_align_affine",
        title="an affine registration",
        by={
            "MI": "mutual information",
            "CC": "local cross-correlation",
            "SSD": "the sum of squared differences",
        },
        opens={
            "transform": (
                "center_of_mass",
                "step",
                "step_size",
                "better",
                "mismatch",
                "stuck",
            ),
            "gradient": (
                "center_of_mass",
                "sample_count",
                "metric_value",
                "metric_gradient",
                "repetition",
                "mismatch",
                "stuck",
            ),
            "histogram": (
                "center_of_mass",
                "sample_count",
                "joint_histogram",
                "metric_gradient",
                "repetition",
                "mismatch",
                "stuck",
            ),
        },
        opened=_opened_by_affine,
        result={STATIC: ("affine",)},
        hidden=("center_of_mass", "moved_frame", "transform", "mismatch", "stuck"),
        of_metrics={
            "SSD": ("center_of_mass", "update", "edge_samples", "mismatch", "stuck")
        },
    ),
    "syn": Operation(
        function=syn_registration,
        command="dipy_ppir_align_syn",
        title="a diffeomorphic registration (SyN)",
        by={
            "CC": "local cross-correlation",
            "SSD": "squared differences (SSD)",
            "MIND": "squared differences of descriptors of self-similarity (MIND-SSC)",
        },
        opens={
            "map": ("level_moving", "level_static", "whole", "stop", "mismatch"),
            "update": ("update_moving", "update_static", *_MATCH),
            "force": ("force_moving", "force_static", *_MATCH),
            "paper": ("paper_factor", "bracket_moving", "bracket_static", *_MATCH),
        },
        opened=_opened_by_syn,
        result={MOVING: ("static_to_ref",), STATIC: ("moving_to_ref", "prealign")},
        results={
            "map": {
                MOVING: ("map",),
                STATIC: ("map", "prealign"),
            }
        },
    ),
    "points": Operation(
        function=point_registration,
        command="dipy_ppir_align_points",
        title="a rigid registration of corresponding points",
        opens={"transform": ("alike", "steady")},
        opened=lambda parameters: ["alike", "steady"],
        result=dict.fromkeys((MOVING, STATIC), ("rotation", "centroid", "size_ratio")),
        data="points",
        example="your_points.txt",
    ),
    "freeform": Operation(
        function=freeform_registration,
        command="dipy_ppir_align_freeform",
        title="a free-form registration (cubic B-splines) by squared differences",
        opens={
            "steps": (
                "control_point_steps",
                "mismatch",
                "edge_samples",
                "mean_square",
            )
        },
        opened=_opened_by_freeform,
        result={STATIC: ("control_points", "prealign")},
    ),
}


def operation_of(plan):
    """The operation of a session file, and its parameters, checked.

    Parameters
    ----------
    plan : SessionFile

    Returns
    -------
    operation : Operation
    parameters : AffineParameters or SynParameters

    Raises
    ------
    SessionFileError
        if the file asks for something impossible.
    """
    parameters = parameters_of(plan)
    operation = OPERATIONS[plan.operation]
    try:
        check_plan(parameters)
    except ValueError as exc:
        raise SessionFileError(f"the parameters cannot be used: {exc}") from None
    _check_told(plan, parameters)
    return operation, parameters


def read(path):
    """A session file, its operation and its parameters, checked.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    plan : SessionFile
    operation : Operation
    parameters : AffineParameters or SynParameters

    Raises
    ------
    SessionFileError
        naming the file, the entry and the remedy.
    """
    plan = SessionFile.read(path)
    try:
        return plan, *operation_of(plan)
    except SessionFileError as exc:
        raise SessionFileError(f"session file {Path(path).name}: {exc}") from None


def _check_told(plan, parameters):
    """Refuse images, told to a helper that deals ahead, that cannot be registered."""
    of_points = isinstance(parameters, PointParameters)
    for owner, table in plan.deal.items():
        where, shape = f"[deal.{ROLES[owner].split()[0]}]", table["shape"]
        size = shape[0] if of_points else math.prod(shape)
        if size > plan.limits["voxels"]:
            raise SessionFileError(
                f"shape in {where} has {size:,} {'points' if of_points else 'voxels'}, "
                f"more than the {plan.limits['voxels']:,} that [limits] allow"
            )
        matrix = table.get("grid2world")
        if matrix is not None and abs(np.linalg.det(np.array(matrix, float))) < 1e-12:
            raise SessionFileError(
                f"grid2world in {where} has no inverse; dipy_ppir_session describe "
                "prints that of the image"
            )


def check_described(plan, owners, shape, grid2world=None):
    """Raise InputError for an image or points that a helper was told of otherwise.

    Parameters
    ----------
    plan : SessionFile
    owners : sequence of int
        whose it can be.
    shape : sequence of int
    grid2world : array, optional
    """
    shape, told = list(map(int, shape)), [plan.deal[o] for o in owners if plan.deal]
    for table in told:
        matrix = table.get("grid2world")
        same = matrix is None or grid2world is None
        if shape == table["shape"] and (same or np.array_equal(grid2world, matrix)):
            return
    if told:
        shapes = [table["shape"] for table in told]
        what = f"has the shape {shape}, and the helper was told of "
        what += " or ".join(map(str, shapes))
        if shape in shapes:
            what = "has another grid2world in its header than the helper was told of"
        raise InputError(
            f"this {what} in [deal] of the session file; give what was described, or "
            "have the file and the deal made anew"
        )


#: Shapes of usual images by dimension: brains at 2 and at 1 mm, and slices of them.
USUAL_SHAPES = {
    2: ((109, 91), (218, 182)),
    3: ((91, 109, 91), (182, 218, 182)),
}
USUAL_POINTS = (100, 3), (10_000, 3)


def usual_pairs(parameters):
    """Pairs of images or points as are usual, as `takes` has them."""
    if isinstance(parameters, PointParameters):
        shapes = USUAL_POINTS
    else:
        shapes = USUAL_SHAPES[getattr(parameters, "dim", 3)]
    return [(shape, shape, None) for shape in shapes]


def sizes_text(parameters, static, moving):
    """How large the images or sets of points of these shapes are, in words."""
    if isinstance(parameters, PointParameters):
        return f"{static[0]:,} points"
    sizes = dict.fromkeys((static, moving))
    return " and ".join(" x ".join(map(str, size)) for size in sizes) + " voxels"


def takes(parameters, pairs, line, alone=False):
    """What registrations take, in words.

    Parameters
    ----------
    parameters : Parameters
    pairs : sequence of (static_shape, moving_shape, static_grid2world)
        None for the matrix of cubic voxels.
    line : Line
    alone : bool, optional
        whether two owners are alone, without a helper.

    Returns
    -------
    lines : list of str
    """
    lines = []
    for static, moving, grid2world in pairs:
        lines.append(f"{sizes_text(parameters, static, moving)}:")
        try:
            ahead = estimate(
                parameters, static, moving, static_grid2world=grid2world, alone=alone
            )
        except NoiseBudgetError as exc:
            lines.append(f"    Not for two owners alone: {exc}.")
        else:
            lines.append(f"    {estimate_text(ahead, line)}.")
    return [*lines, "Time is within a factor of two, if lines are as stated."]


def explain(plan, pairs=None, line=USUAL):
    """A session file in plain words: who takes part, who will learn what, at what cost.

    Parameters
    ----------
    plan : SessionFile
    pairs : sequence, optional
        see `takes`; by default of images or points as are usual.
    line : Line, optional

    Returns
    -------
    text : str
    """
    lines = [plan.title, "=" * len(plan.title), "", "Who takes part", "-" * 14]
    for party in plan.parties.values():
        lines.append(f"The {ROLES[party.pid]} is {party.name}.")
        lines.append(f"    certificate SHA-256 {party.fingerprint}")
    lines += ["Compare every fingerprint with its owner by telephone.", ""]
    lines += ["Who connects to whom", "-" * 20]
    for pid in (MOVING, STATIC):
        party = plan.parties[pid]
        for peer in plan.dials(pid):
            other = plan.parties[peer]
            lines.append(f"{party.name} dials {other.name} at {other.endpoint} (TCP).")
    if plan.helper == "ahead":
        lines.append(
            f"{plan.parties[HELPER].name} (helper) connects to nobody: before the "
            "owners meet it makes a file for each of them (dipy_ppir_helper --deal), "
            "sealed to that owner's key and used once."
        )
    if plan.relayed:
        lines.append(
            "The two owners cannot be dialled: their traffic goes through the helper, "
            "which passes it on but cannot read it (TLS between the owners)."
        )
    if plan.place is not None:
        lines.append(
            f"This is session {plan.place} of a row at the same addresses, where each "
            "party holds those that it takes part in one after the other."
        )
    lines += ["", *explain_work(plan, pairs, line)]
    lines.append(f"Hash of this session file: {plan.digest}; the same everywhere.")
    return "\n".join(lines)


def explain_work(plan, pairs=None, line=USUAL):
    """What a session file computes, who will learn what, at what cost, in plain words.

    Parameters
    ----------
    plan : SessionFile
    pairs, line
        see `explain`.

    Returns
    -------
    lines : list of str
    """
    operation, parameters = operation_of(plan)
    metric = getattr(parameters, "metric", None)
    lines = ["What is computed", "-" * 16, f"It is {operation.titled(metric)}."]
    for name, value in parameters.plain(*entries(plan.operation)).items():
        if name in plan.parameters:
            lines.append(f"    {name} = {value}")
        elif value is not None:
            lines.append(f"    {name} = {value} (by default)")
    masked = plan.operation == "affine" and parameters.metric == "MI"
    if masked and parameters.sampling_proportion not in (None, 1):
        lines.append(
            "No owner can give a mask: masks need all voxels, and sampling_proportion "
            "takes a part of them."
        )
    lines += ["", "Who will learn what", "-" * 19]
    labels = operation.opened(parameters)
    learned = {pid: [] for pid in plan.present}
    for label in labels:
        for receiver in learned.keys() & set(DECLARATIONS[label].receivers):
            learned[receiver].append(DECLARATIONS[label])
    gets = {"both": (MOVING, STATIC), "moving": (MOVING,), "static": (STATIC,)}
    of_images = plan.operation != "points"
    for pid in gets[plan.result_to]:
        shown = operation.shown(plan.reveal, pid)
        if not of_images and not parameters.scaling:
            shown = [label for label in shown if label != "size_ratio"]
        learned[pid] += [DECLARATIONS[label] for label in shown]
    for pid, declarations in learned.items():
        name = plan.parties[pid].name
        if pid == HELPER:
            known = (
                "their shapes and positions, the parameters, and the number of steps"
            )
            lines.append(
                f"{name} (helper) learns nothing about either image but what is listed "
                f"here: {known}."
                if of_images
                else f"{name} (helper) learns how many points there are, no point, and:"
            )
            for d in declarations:
                lines.append(f"  It sees {d.meaning} ({d.label}).")
            continue
        lines.append(f"{name} ({ROLES[pid]}) learns")
        for d in declarations:
            lines.append(f"  - {d.meaning}: {d.shape} ({d.label}).")
        shown = operation.shown(plan.reveal, pid) or "transform" in labels
        if pid in gets[plan.result_to] and not shown:
            lines.append("  - the resulting transform.")
        if not declarations:
            lines.append("  - nothing but shapes, positions and the number of steps.")
    if not of_images:
        most = max(point_bits(parameters, 3, name) for name in ("moving", "static"))
        lines.append(f"All of it is at most {most:,.0f} bits for each owner.")
    if plan.operation == "affine" and plan.reveal == "transform":
        most = planned_bits(parameters, 3)
        lines.append(
            f"All of it is at most {most:,.0f} bits about the static image; "
            "evaluations are planned, level_iters are limits."
        )
        if most > LIMIT:
            lines.append(
                f"That is over the {LIMIT:,} bits about an image that the static "
                "owner's command accepts unless it is given --limit_bits."
            )
        if parameters.hide_steps:
            lines.append(
                "That is so where the moving owner follows the program; one that does "
                "not can be shown more (doc/security.md)."
            )
    lines += [
        "Both owners learn the other image's shape and position in space."
        if of_images
        else "Both owners learn how many points the other has, and in how many "
        "dimensions.",
        "",
        "What this rests on",
        "-" * 18,
        *_trust(plan, "images" if of_images else "sets of points"),
    ]
    if set(labels) & MAPS or plan.reveal == "map":
        lines.append(
            "What can be made of a map to so few digits is in doc/security.md."
        )
    if set(labels) & REBUILDS:
        lines.append(
            "CAUTION: no image is sent, but an owner who sets out to can rebuild most "
            "of the other image from what is opened (doc/security.md)."
        )
    if "joint_histogram" in labels:
        lines.append(
            "CAUTION: many histograms can determine the static image at coarse "
            'resolution; reveal = "transform" opens none.'
        )
    if "edge_samples" in labels:
        lines.append(
            "CAUTION: the static owner is shown at every iteration where the moving "
            'image has edges (doc/security.md); sampling = "URS" shows nothing of it.'
        )
    if "control_point_steps" in labels:
        lines.append(
            "CAUTION: what the moving owner is shown of the steps are equations in the "
            "static image, of which it can rebuild much (doc/security.md); a coarser "
            "precision, a larger spacing and 0 iterations at the last level show less."
        )
    if "metric_gradient" in labels:
        lines.append(
            "CAUTION: the moving owner chooses where the metric is evaluated, some "
            "hundreds of times, and can read single voxels of the static image by it; "
            'reveal = "transform" shows it the steps only.'
        )
    lines += ["", "What it takes", "-" * 13]
    if plan.helper == "ahead":
        pair = described_pair(plan)
        size = size_text(dealt_bytes(parameters, *pair))
        lines += takes(parameters, [pair], line)
        lines.append(f"The helper deals about {size} of this ahead, in files.")
    else:
        lines += takes(parameters, pairs or usual_pairs(parameters), line, plan.alone)
    size, most = (256,) * getattr(parameters, "dim", 3), plan.limits
    if of_images:
        needed = max(peaks(parameters, size, size, plan.alone).values()) / 1e9
        lines += [
            "",
            f"Each party may be asked for {most['memory']:g} GB of memory, and images "
            f"have at most {most['voxels']:,} voxels.",
            f"Images of {' x '.join(map(str, size))} take about {needed:.1f} GB at one "
            "of the parties.",
        ]
    else:
        lines += ["", f"There may be at most {most['voxels']:,} points ([limits])."]
    times = plan.timeouts
    keeps = f", and keeps its own state every {times['checkpoint']:g} s"
    lines += [
        "",
        f"Each party waits {times['connect']:g} s for the others to come, gives up on "
        f"one that is silent for {times['silence']:g} s{keeps if of_images else ''}.",
    ]
    return lines


def described_pair(plan):
    """The pair that a helper that deals ahead is told of, as `takes` has them."""
    static, moving = (plan.deal[owner] for owner in (STATIC, MOVING))
    place = static.get("grid2world")
    place = None if place is None else np.array(place, dtype=np.float64)
    return tuple(static["shape"]), tuple(moving["shape"]), place


def _trust(plan, data):
    """What it rests on that nobody learns more."""
    if plan.alone:
        return ALONE
    dealt = ()
    if plan.helper == "ahead":
        dealt = (
            f"{plan.parties[HELPER].name} (helper) learns nothing: it deals before the "
            "owners meet, from the shapes and positions in this file, and has to keep "
            "no copy of what it dealt.",
        )
    return (
        *dealt,
        f"Two of the three parties that pool what they hold can rebuild both {data}.",
        "Every party follows the program (semi-honest). The code is not audited.",
    )


def title_of(receipt):
    """What a receipt is of, for people; "a registration" if it does not say."""
    if not receipt["operation"]:
        return "a registration"
    if receipt["operation"] == "template":
        return "a template of several sites' images"
    metric = (receipt["parameters"] or {}).get("metric")
    if isinstance(metric, dict):
        metric = metric.get("metric")
    return OPERATIONS[receipt["operation"]].titled(metric)


TEMPLATE = """\
# Session file of dipy_ppir: the same at {everybody}.
title = "{title}"
{operation} # affine, syn, freeform or points
# What the owners learn beside the result, of which dipy_ppir_session check FILE says
# more: {reveals}.
reveal = "{reveal}"
result_to = "both"            # or {one}: who gets it
{helper}
# One table for each party. The fingerprint comes from dipy_ppir_keygen at that site;
# compare it by telephone. {addresses}
[parties.moving]              # has what is moved
name = "Hospital A"
fingerprint = "..."

[parties.static]              # has what it is moved to
name = "Hospital B"
fingerprint = "..."
{address} = "registration.hospital-b.example:7433"
{table}
[parameters]
{parameters}

[limits]                      # of what a party may be asked for
memory = 16                   # GB at each party; images that need more are refused
voxels = 268_435_456          # of the larger image; or points

[timeouts]                    # seconds
connect = 900                 # to wait for the others
silence = 300                 # of a party that is waited for
checkpoint = 30               # between two states kept for --resume
"""

#: What `reveal` may be: the first as in the template, the others with a helper only.
_REVEALS = {
    "affine": (
        '"transform" (the steps that lead to it)',
        '"gradient" or "histogram" (far more)',
    ),
    "syn": (
        '"map" (rounded copies of it)',
        '"update" or "force" (nearly the images)',
    ),
    "points": ('"transform" (two grades of how well they match)',),
    "freeform": ('"steps" (rounded)',),
}

_PARAMETERS = {
    "affine": """\
pipeline = ["center_of_mass", "translation", "rigid", "affine"]
level_iters = [1000, 500, 100]
sigmas = [3.0, 1.0, 0.0]
factors = [4, 2, 1]
metric = "MI"                 # or "SSD" for images of one contrast, without nbins
nbins = 32
sampling_proportion = 0.1     # leave out to use every voxel
hide_steps = false            # true: show the moving owner little but the result""",
    "syn": """\
level_iters = [10, 10, 5]
metric = "CC"                 # or "SSD", or "MIND" for two modalities
radius = 4                    # leave out with these""",
    "points": """\
scaling = false               # true: find a scale as well
precision = 0.005             # mm, by which rounding may move a point""",
    "freeform": """\
level_iters = [10, 10, 10, 10]
factors = [8, 4, 2, 1]
spacing = 5                   # voxels from one control point to the next""",
}

#: Where a helper deals ahead, an affine registration is by this metric.
_AFFINE_AHEAD = """\
pipeline = ["center_of_mass", "translation", "rigid", "affine"]
metric = "SSD"                # of images of one contrast
level_iters = [1000, 500, 100]
sigmas = [3.0, 1.0, 0.0]
factors = [4, 2, 1]
sampling_proportion = 0.1     # leave out to use every voxel"""


#: What is in a session file with a helper, and in one of two owners alone.
_WITH_HELPER = {
    "everybody": "all three parties",
    "helper": "",
    "addresses": "An owner that can only dial out has no address.",
    "address": "# address",
    "table": """
[parties.helper]              # has neither; independent of both
name = "University C"
fingerprint = "..."
address = "helper.university-c.example:7433"
""",
}
_AHEAD = {
    "everybody": "all three parties",
    "helper": 'helper = "ahead"              # it deals before the owners meet\n',
    "addresses": "At least one owner has an address.",
    "address": "address",
    "table": """
[parties.helper]              # has neither; independent of both
name = "University C"
fingerprint = "..."

# What the helper has to know of each owner, whose command prints it:
# dipy_ppir_session describe moving IMAGE, and the same with static
[deal.moving]
shape = []
grid2world = []               # not of points
sealing = "..."

[deal.static]
shape = []
grid2world = []
sealing = "..."
""",
}
_ALONE = {
    "everybody": "both owners",
    "helper": 'helper = "none"               # two owners alone, who encrypt\n',
    "addresses": "At least one owner has an address.",
    "address": "address",
    "table": "",
}


def template(operation, helper="online"):
    """A session file to start from.

    Parameters
    ----------
    operation : str
    helper : {"online", "ahead", "none"}, optional
    """
    return TEMPLATE.format(
        **{"online": _WITH_HELPER, "ahead": _AHEAD, "none": _ALONE}[helper],
        title="Registration of points, study 1"
        if operation == "points"
        else "Registration of T1 images, study 1",
        operation=f'operation = "{operation}"'.ljust(29),
        reveals=", ".join(_REVEALS[operation][: None if helper == "online" else 1]),
        reveal=next(iter(OPERATIONS[operation].opens)),
        one="moving" if operation == "affine" else "moving, or static",
        parameters=parameter_lines(operation, helper),
    )


def parameter_lines(operation, helper="online"):
    """Parameters to start from, as a session file has them."""
    if operation == "affine" and helper == "ahead":
        return _AFFINE_AHEAD
    return _PARAMETERS[operation]
