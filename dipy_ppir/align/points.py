"""Rigid registration of two sets of corresponding points that two parties hold.

Each owner centres its own points and scales them to one size; what both know together
is the best rotation only (`dipy_ppir.mpc.rotation`). The transform then takes one
centroid to the other: who gets it can work out the other's centroid anyway, so that
this is what is opened, to a public precision, and of the sizes their ratio where points
are scaled. Both owners make the same matrix of the same rounded numbers.
"""

import math
from typing import NamedTuple

from dipy.testing.decorators import warning_for_keywords
import numpy as np

from dipy_ppir.align import plausibility
from dipy_ppir.align.agreed import keep_to
from dipy_ppir.align.alone import check_parties
from dipy_ppir.align.arguments import check_numbers, check_run
from dipy_ppir.align.decomposition import decompose
from dipy_ppir.align.facts import own_arrays
from dipy_ppir.align.memory import coordinate
from dipy_ppir.align.parameters import POINTS, PointParameters
from dipy_ppir.align.remote import OWNERS, WORD, is_word
from dipy_ppir.mpc import local, rotation
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.ledger import DECLARATIONS, MOVING, STATIC, declare
from dipy_ppir.mpc.protocols import in_parts
from dipy_ppir.mpc.worlds import alone, shares

#: Coordinates of a centroid are below this, in units to which they are rounded.
MOST_SHIFT = 1 << 40
#: The logarithm of a size, base 2, is rounded to a part of this.
SIZE_PLACES = 1 << 18
_SIZE_RANGE = round(math.log2(rotation.SIZES[1] / rotation.SIZES[0]) * SIZE_PLACES)
#: Part of a set's spread, at least, that lies beside the line that it is nearest to.
LEAST_SPREAD = 2.0**-10

declare(
    "centroid",
    receivers=(MOVING, STATIC),
    shape="2 or 3, once",
    meaning="the centroid of the other set of points, which follows from the transform",
    bits=41.1,
)
declare(
    "size_ratio",
    receivers=(MOVING, STATIC),
    shape="1, once, if points are scaled",
    meaning="the ratio of the sizes of the two sets of points",
    bits=23.5,
)

MISMATCH = (
    "in the end paired points lie more than half a set's radius apart (root mean "
    "square): check that both files name the same points in the same order, in the "
    "same units, and that neither is mirrored"
)
NO_MATCH = (
    "no rotation brings the two sets of points near each other: check that both files "
    "name the same points in the same order, and that neither is mirrored"
)
UNSTEADY = (
    "another rotation fits the points nearly as well: they lie on a line or in a ball, "
    "or are paired badly; add points that lie apart, in the same order in both files"
)


class UndeterminedError(plausibility.ImplausibleError):
    """There is no rotation that stands out; nothing was opened but that.

    Attributes
    ----------
    receipt : dict
    """

    def __init__(self, text, receipt):
        super().__init__(text)
        self.receipt = receipt


class RemotePoints:
    """Points that another party holds: their number is public.

    Parameters
    ----------
    n : int
    dim : {2, 3}

    Examples
    --------
    >>> from dipy_ppir.align import RemotePoints
    >>> RemotePoints(193, 2)
    RemotePoints(193, 2)
    """

    def __init__(self, n, dim):
        if not (isinstance(n, int) and n >= 1 and dim in (2, 3)):
            raise ValueError(
                f"remote points are 1 or more in 2 or 3 dimensions, got {n!r} and "
                f"{dim!r}; give their number and their dimension"
            )
        self.shape = n, dim

    def __repr__(self):
        return "RemotePoints(%d, %d)" % self.shape

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "these points belong to another party: their coordinates are not here"
        )


class _Centred(NamedTuple):
    """What an owner knows of its own points.

    Attributes
    ----------
    points : array of int, shape (n, dim)
        see `rotation.Own`.
    centroid : array of int, shape (dim,)
        in units.
    size : float
        in units, see `rotation.Own`.
    """

    points: np.ndarray
    centroid: np.ndarray
    size: float


def unit_of(precision, dim):
    """To what centroids are rounded: a power of two, mm.

    Both of them together then move a point by no more than `precision`.
    """
    return 2.0 ** math.floor(math.log2(precision / math.sqrt(dim)))


def planned_bits(parameters, dim, receiver):
    """Most bits that are opened to an owner.

    Parameters
    ----------
    parameters : PointParameters
    dim : int
    receiver : {"moving", "static"}
    """
    counts = {"alike": 1, "steady": dim - 2}
    if parameters.result_to in ("both", receiver):
        counts |= {"rotation": 2 if dim == 2 else 6, "centroid": dim}
        counts["size_ratio"] = int(parameters.scaling)
    return sum(DECLARATIONS[label].bits * n for label, n in counts.items())


def point_array(points, name):
    """Points as an array of float, or ValueError.

    Parameters
    ----------
    points : array, shape (n, dim)
    name : str
        "static" or "moving", for messages.
    """
    what = f"the {name} points"
    points = check_numbers(points, what, "read a text file with numpy.loadtxt first")
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise ValueError(
            f"{what} have shape {points.shape}; give one point a row, with 2 or 3 "
            "coordinates each"
        )
    if points.dtype.kind not in "biuf":
        raise ValueError(f"{what} must be real numbers, not {points.dtype}")
    n, dim = points.shape
    if n > rotation.MOST_POINTS:
        raise ValueError(
            f"{what} are {n:,}, and {rotation.MOST_POINTS:,} are the most that can be "
            "registered; leave some out, the same in both sets"
        )
    if n < dim:
        raise ValueError(
            f"{what} are {n}, and a rotation in {dim}D needs {dim}; give more points"
        )
    bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{what} contain NaN or infinity, first at point {bad[0]} (counted from "
            "0); leave such points out of both sets"
        )
    return points.astype(np.float64)


def centred(points, precision, name):
    """An owner's points about their centroid, scaled; or ValueError.

    Parameters
    ----------
    points : array, shape (n, dim)
    precision : float
        mm.
    name : str

    Returns
    -------
    own : _Centred

    Raises
    ------
    ValueError
        if they do not determine a rotation, or the precision does not fit them.
    """
    n, dim = points.shape
    what, unit = f"the {name} points", unit_of(precision, dim)
    farthest = np.abs(points).max()
    if not farthest < MOST_SHIFT * unit:
        raise ValueError(
            f"{what} lie up to {farthest:g} mm from the origin, too far for precision "
            f"= {precision:g}; take a common offset off both sets, or give a larger "
            "precision at all parties"
        )
    # About one of them first: what is far from the origin has few digits left.
    offsets = points - points[0]
    mean = offsets.mean(axis=0)
    offsets -= mean
    radius = math.sqrt(np.einsum("ij,ij->", offsets, offsets) / n)
    # Of coordinates that far away the last digits are rounding.
    if radius <= 8 * np.spacing(farthest):
        raise ValueError(
            f"{what} all lie in one place, which determines no rotation; check that "
            "they are the right ones"
        )
    size = radius / unit
    least, most = rotation.SIZES
    if not least <= size <= most:
        small = size < least
        better = radius / (2 * least if small else most / 2) * math.sqrt(dim)
        raise ValueError(
            f"{what} lie {radius:.3g} mm from their centroid (root mean square), too "
            f"{'near' if small else 'far'} for precision = {precision:g}; give "
            f"precision = {better:.2g} at all parties, or check that coordinates are "
            "in mm"
        )
    scaled = offsets / (radius * math.sqrt(n))
    spread = np.linalg.eigvalsh(scaled.T @ scaled)
    if dim == 3 and spread[:-1].sum() < LEAST_SPREAD:
        raise ValueError(
            f"{what} lie on a line, about which any rotation fits them; add points "
            "beside it, the same in both sets"
        )
    return _Centred(
        np.rint(scaled * 2.0**rotation.COORDINATE_BITS).astype(np.int64),
        np.rint((points[0] + mean) / unit),
        size,
    )


def clear_registration(moving, static, *, scaling=False):
    """The same in the clear: by singular value decomposition.

    Arun, Huang and Blostein (1987), with the sign of Umeyama (1991), and the scale of
    Horn (1987): the ratio of the sizes, which is the same whichever set is moved.

    Parameters
    ----------
    moving, static : array, shape (n, dim)
    scaling : bool, optional

    Returns
    -------
    matrix : array, shape (dim + 1, dim + 1)
        takes moving points to static ones.
    """
    moving, static = np.asarray(moving, float), np.asarray(static, float)
    means = moving.mean(axis=0), static.mean(axis=0)
    x, y = moving - means[0], static - means[1]
    u, _, vt = np.linalg.svd(y.T @ x)
    signs = np.ones(len(u))
    signs[-1] = np.sign(np.linalg.det(u @ vt))
    scale = np.linalg.norm(y) / np.linalg.norm(x) if scaling else 1.0
    return _matrix(u * signs @ vt, scale, *means)


def _matrix(turn, scale, moving_centroid, static_centroid):
    """Takes one centroid to the other, and turns and scales about it."""
    dim = len(turn)
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = scale * turn
    matrix[:dim, dim] = static_centroid - matrix[:dim, :dim] @ moving_centroid
    return matrix


def _turn(numbers):
    """The rotation that is nearest to opened numbers, see `rotation.Found`."""
    if numbers.shape == (2,):
        c, s = numbers / np.hypot(*numbers)
        return np.array([[c, -s], [s, c]])
    first = numbers[:, 0] / np.linalg.norm(numbers[:, 0])
    second = numbers[:, 1] - (numbers[:, 1] @ first) * first
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)], axis=1)


@warning_for_keywords()
def point_registration(
    moving,
    static,
    *,
    scaling=POINTS.scaling,
    precision=POINTS.precision,
    session=None,
    parties=None,
    reveal=POINTS.reveal,
    result_to=POINTS.result_to,
    ret_receipt=False,
    strict=False,
):
    """Find the rigid transform between two sets of points that two parties hold.

    The points correspond: the first of the one set belongs to the first of the other,
    and so on. The rotation and the shift are those with the least sum of squared
    distances, never a reflection; neither party sees the other's points.

    Parameters
    ----------
    moving, static : array, shape (n, dim), str or RemotePoints
        2D or 3D points, mm. Those that another party holds are `RemotePoints`; at the
        helper both are. In a session opened by `Session.load` the word "remote" does,
        because the owners tell each other how many they have.
    scaling : bool, optional
        also find a scale: the ratio of the two sets' sizes (Horn 1987), which is the
        same whichever set is moved.
    precision : float, optional
        mm: by so much may the rounding of the centroids move a point; that of the
        rotation moves it by up to 6e-6 times its distance from the centroid besides,
        that of a scale by up to 3e-6.
    session : Session, optional
        this party's session. With both sets here and no session, the other parties are
        started as processes on this machine.
    parties : {3, 2}, optional
        how many there are then: two owners and a helper, by default, or two owners
        alone.
    reveal : {"transform"}, optional
        what the owners learn, of which there is no choice.
    result_to : {"both", "moving", "static"}, optional
        which owners get the transform.
    ret_receipt : bool, optional
        also return, last, what each party learned and what it cost.
    strict : bool, optional
        raise an `ImplausibleError` where a result that is not plausible otherwise is
        an `ImplausibleWarning`; see `plausibility`.

    Returns
    -------
    moved : array, shape (n, dim), or None
        the moving points in the static ones' space, at their owner if it gets the
        transform.
    matrix : array, shape (dim + 1, dim + 1), or None
        takes moving points to static ones, at the owners that get it. What DIPY takes
        for images is its inverse, from static to moving space.
    receipt : dict
        with `ret_receipt`.

    Raises
    ------
    ValueError
        if points or a parameter cannot be used, before anything is sent; if the sets
        do not have as many points, when the parties agree.
    UndeterminedError
        if no rotation stands out; nothing else was opened then.
    ImplausibleError
        with `strict`, when the result is there.
    """
    check_run(session, None, None)
    parameters = PointParameters(
        scaling=scaling, precision=precision, reveal=reveal, result_to=result_to
    )
    check_parties(parties, session, "points", parameters)
    pair = {"moving": moving, "static": static}
    own = {}
    for name, points in pair.items():
        if not (is_word(points) or isinstance(points, RemotePoints)):
            pair[name] = point_array(points, name)
            own[name] = centred(pair[name], parameters.precision, name)
    if session is not None:
        keep_to(session, "points", parameters.plain())
        results = _run(session, parameters, pair, own)
    else:
        results = _run_locally(parameters, pair, own, parties)
    matrix, warnings, undetermined, receipt = results
    if undetermined is not None:
        raise UndeterminedError(undetermined, receipt)
    plausibility.tell(warnings, strict=strict, stacklevel=4)
    moved = None
    if matrix is not None and "moving" in own:
        moved = pair["moving"] @ matrix[:-1, :-1].T + matrix[:-1, -1]
    out = moved, matrix
    return out + (receipt,) if ret_receipt else out


def _run_locally(parameters, pair, own, parties):
    """All parties on this machine."""
    if len(own) < 2:
        raise ValueError(
            f'RemotePoints, or the word "{WORD}", need a session with the party that '
            "holds the points"
        )
    shapes = {name: points.shape for name, points in pair.items()}
    check_shapes(shapes)
    common = {"parameters": parameters.plain(), **shapes}
    here = {**pair, "static": RemotePoints(*shapes["static"])}

    def run_here(session):
        return _run(session, parameters, here, {"moving": own["moving"]})

    return local.run_locally(
        run_here,
        "dipy_ppir.align.points:_point_party",
        parties=parties,
        moving={},
        static={**common, "points": pair["static"]},
        helper=common,
    )[MOVING]


def _point_party(session, parameters, moving, static, points=None):
    parameters = PointParameters(**parameters)
    pair = {"moving": RemotePoints(*moving), "static": RemotePoints(*static)}
    own = {}
    if points is not None:
        pair["static"] = points
        own["static"] = centred(points, parameters.precision, "static")
    _run(session, parameters, pair, own)


def check_shapes(shapes):
    """Raise ValueError unless both sets have as many points, in as many dimensions."""
    (n, dim), (m, other) = shapes["moving"], shapes["static"]
    if dim != other:
        raise ValueError(
            f"the moving points have {dim} coordinates and the static ones {other}; "
            "give both in the same space"
        )
    if n != m:
        raise ValueError(
            f"there are {n} moving points and {m} static ones, but each must belong to "
            "one of the other set; give the same points in the same order"
        )


def _exchanged(session, pair):
    """Shapes of both sets, as their owners tell them. Rounds: 1.

    Raises
    ------
    ValueError
        if a set is not where the session has it.
    ProtocolError
        if a party describes impossible points.
    """
    mine = {}
    for name, owner in OWNERS.items():
        here = isinstance(pair[name], np.ndarray)
        if here != (session.pid == owner):
            raise ValueError(
                f"this party is the {session.role}, so the {name} points must be "
                + (f'the word "{WORD}"' if here else "an array")
            )
        if here:
            mine[name] = list(pair[name].shape)
    most = min(session.limits["voxels"], rotation.MOST_POINTS)
    for name, (n, _) in mine.items():
        if n > most:
            raise ValueError(
                f"the {name} points are {n:,}, more than the {most:,} (voxels) of "
                "[limits] in the session file; leave some out, the same in both sets"
            )
    with session.phase("agreement"):
        views = session.exchange("points", mine)
    shapes = {}
    for name, owner in OWNERS.items():
        view = views[owner].get(name) if isinstance(views[owner], dict) else None
        try:
            n, dim = view
            if (
                not type(n) is type(dim) is int
                or dim not in (2, 3)
                or not dim <= n <= most
            ):
                raise ValueError
        except (TypeError, ValueError):
            raise ProtocolError(
                f"{session.name_of(owner)} does not describe its points as it should: "
                f"they must be at most {most:,}, in 2 or 3 dimensions",
                owner,
            ) from None
        given = pair[name]
        if isinstance(given, RemotePoints) and given.shape != (n, dim):
            raise ValueError(
                f"{session.name_of(owner)} has {n} points in {dim}D, and not "
                f"{given!r}; give what it has"
            )
        shapes[name] = n, dim
    if session.on_shapes is not None:
        session.on_shapes(shapes["static"], shapes["moving"], None)
    return shapes


def _run(session, parameters, pair, own):
    """The registration, the same at every party.

    Returns
    -------
    matrix : array or None
    warnings : list of str
    undetermined : str or None
        why there is no result, at the owners.
    receipt : dict
    """
    shapes = _exchanged(session, pair)
    check_shapes(shapes)
    n, dim = shapes["moving"]
    needed = coordinate(alone(session)) * n * dim / 1e9
    if needed > session.limits["memory"]:
        raise ValueError(
            f"registering {n:,} points needs about {needed:.1f} GB of memory at each "
            f"owner, more than the {session.limits['memory']:g} GB of [limits] in the "
            "session file; leave some out, the same in both sets, or raise memory there"
        )
    described = {**parameters.plain(), "points": n, "dim": dim}
    with session.phase("agreement"):
        session.agree("registration", described)
    session.ledger.about(None)
    name = {MOVING: "moving", STATIC: "static"}.get(session.pid)
    mine = own.get(name)
    with session.phase("correlation"):
        points = None if mine is None else mine.points
        correlation = rotation.correlate(session, n, dim, points)
    receivers = {"both": (MOVING, STATIC), "moving": (MOVING,), "static": (STATIC,)}
    receivers = receivers[parameters.result_to]
    sizes = None
    if not parameters.scaling:
        sizes = tuple(own[k].size if k in own else None for k in ("moving", "static"))
    with session.phase("rotation"):
        found = rotation.find(shares(session), correlation, sizes, receivers)
    undetermined = None
    if not found.grade or not found.steady:
        undetermined = UNSTEADY if found.grade else NO_MATCH
    facts, matrix, warnings = {}, None, []
    if undetermined is None:
        with session.phase("result"):
            centroids, scale = _opened(session, mine, dim, parameters, receivers)
        if found.numbers is not None:
            unit = unit_of(parameters.precision, dim)
            centroids = [c * unit for c in centroids]
            matrix = _matrix(_turn(found.numbers), scale, *centroids)
            facts["transform"] = _facts(matrix, centroids[0])
            warnings += _of_scale(scale)
        if mine is not None and found.grade == 1:
            warnings.insert(0, MISMATCH)
    elif mine is not None:
        warnings.append(undetermined)
    else:
        undetermined = None
    arrays = {f"{k} points": pair[k] for k in own}
    facts |= own_arrays(session, **arrays)
    receipt = session.receipt(
        operation="points", parameters=described, warnings=warnings, **facts
    )
    return matrix, receipt["warnings"], undetermined, receipt


def _opened(session, mine, dim, parameters, receivers):
    """Both centroids, in units, and the scale, at those who get the transform.

    Rounds: 1. Bytes: 16 for each coordinate of the centroids that are opened, and 16
    for each receiver of the sizes' ratio, if points are scaled. What the helper sends
    is nothing, hidden as what the owners send is.
    """
    others = {MOVING: STATIC, STATIC: MOVING}
    openings = []
    for receiver in receivers:
        own = mine.centroid if session.pid == others[receiver] else np.zeros(dim)
        openings.append((in_parts(own, MOST_SHIFT), "centroid", (receiver,)))
    if parameters.scaling:
        code = np.zeros(1)
        if mine is not None:
            code = np.rint([math.log2(mine.size) * SIZE_PLACES])
        code = -code if session.pid == MOVING else code
        openings.append((in_parts(code, _SIZE_RANGE), "size_ratio", receivers))
    *centroids, last = session.open_all(openings) + [None] * (not parameters.scaling)
    if session.pid not in receivers:
        return None, None
    theirs = centroids[receivers.index(session.pid)]
    both = [mine.centroid, theirs] if session.pid == MOVING else [theirs, mine.centroid]
    return both, 1.0 if last is None else 2.0 ** (last[0] / SIZE_PLACES)


def _facts(matrix, centroid):
    """The transform in words that people judge; the shift is the centroid's."""
    found = decompose(matrix, centroid)
    return {
        "shift": found.shift.tolist(),
        "turn": found.angle,
        "axis": None if found.axis is None else found.axis.tolist(),
        "scales": found.scales.tolist(),
        "mirrored": found.mirrored,
    }


def _of_scale(scale):
    """Concerns about a scale."""
    most = plausibility.MOST_SCALE
    if 1 / most <= scale <= most:
        return []
    return [
        f"the transform scales by {scale:.3g}: check that both files are in the same "
        "units and name the same points"
    ]
