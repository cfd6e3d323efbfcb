"""One page of HTML about a registration: the result, and what each party learned.

The page is a single file that refers to nothing outside of itself. Whatever others
wrote, names of organisations and receipts, is text in it: the template escapes all that
it is given, and the page forbids scripts but the one that it came with.

Who has both images gets pictures of both. At a site of a session the functions here
are given what the site has: its own image and the result.
"""

import base64
from dataclasses import dataclass
from datetime import timedelta
import hashlib
from importlib.resources import files as resources
from importlib.util import find_spec
import itertools
import logging
import math

import numpy as np

from dipy_ppir.mpc.receipt import (
    INSECURE,
    level_lines,
    quality_lines,
    remark_lines,
    result_lines,
    trust_lines,
)
from dipy_ppir.mpc.record import parse_date
from dipy_ppir.workflows import charts, slices
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.operations import title_of
from dipy_ppir.workflows.progress import size_text
from dipy_ppir.workflows.receiptfile import printable

logger = logging.getLogger("dipy_ppir")

#: The report of a registration, if it is not named otherwise, and endings of others.
REPORT, HTML = "report.html", (".html", ".htm")
#: What the extra ``report`` installs and this needs.
NEEDED = ("jinja2", "matplotlib")

_CAUTION = "CAUTION: "


def missing():
    """Packages of the extra ``report`` that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def wanted(name):
    """The report to make, by what it is: none where what it needs is missing.

    Parameters
    ----------
    name : str
        its file.

    Raises
    ------
    InputError
        if it is missing and the user named the file.
    """
    lacking = missing()
    if not lacking:
        return {"report": name}
    text = f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} missing"
    how = "pip install 'dipy-ppir[report]'"
    if name != REPORT:
        raise InputError(f"--report {name} cannot be made, {text}: {how}")
    logger.info("No report, because %s (%s)", text, how)
    return {}


def pictures_of(draw, *images):
    """What a function of this module draws; None where it cannot, which is logged."""
    try:
        return draw(*images)
    except Exception as exc:
        logger.warning(
            "The report has no pictures, which could not be made (%s: %s)",
            type(exc).__name__,
            exc,
        )
        return None


@dataclass(frozen=True)
class Pictures:
    """What a page shows beside the receipt.

    Attributes
    ----------
    of : str
        whose images or points these are, for the note on whom to give the page to.
    layers : dict
        names of the viewer's images to what they are, the one beneath first.
    viewer : dict or None
        see `slices.viewer`.
    planes : list or None
        see `slices.deformation`.
    under : str
        what is beneath the grid.
    points : dict or None
        see `charts.of_points`.
    sets : dict
        names of sets of points to what they are.
    apart : tuple of float or None
        root mean square distance of paired points before and after, mm.
    origin : str
        what is known of whether these are the images of the run, if somebody named
        them afterwards.
    """

    of: str
    layers: dict | None = None
    viewer: dict | None = None
    planes: list | None = None
    under: str = ""
    points: dict | None = None
    sets: dict | None = None
    apart: tuple | None = None
    origin: str = ""


def of_both_images(static, before, after, grid2world, transform):
    """Pictures for who has both images.

    Parameters
    ----------
    static, before, after : array, shape (S, R, C)
        the static image, and the moving one on its grid before and after; `before` may
        be None.
    grid2world : array, shape (4, 4)
    transform : DiffeomorphicMap, array, shape (4, 4), or None
        of which a map is drawn.
    """
    images = {"static": static, "before": before, "after": after}
    images = {name: image for name, image in images.items() if image is not None}
    layers = {"static": "static image", "before": "moving image before"}
    layers["after"] = "moving image after"
    planes = None
    if transform is not None and not isinstance(transform, np.ndarray):
        planes = slices.deformation(static, grid2world, transform)
    outlined = [name for name in images if name != "static"]
    return Pictures(
        of="both images",
        layers={name: layers[name] for name in images},
        viewer=slices.viewer(images, grid2world, outlined=outlined),
        planes=planes,
        under="the static image",
    )


def of_moving_image(before, after, grid2world, transform):
    """Pictures for the owner of the moving image.

    Parameters
    ----------
    before, after : array, shape (S, R, C)
        its image on the static grid, before and after.
    grid2world : array, shape (4, 4)
        of the static grid.
    transform : DiffeomorphicMap or array, shape (4, 4)
    """
    return Pictures(
        of="the moving image",
        layers={"before": "moving image before", "after": "moving image after"},
        viewer=slices.viewer(
            {"before": before, "after": after}, grid2world, outlined=("after",)
        ),
        planes=slices.deformation(after, grid2world, transform),
        under="the moving image, moved",
    )


def of_static_image(static, grid2world, transform):
    """Pictures for the owner of the static image.

    Parameters
    ----------
    static : array, shape (S, R, C)
    grid2world : array, shape (4, 4)
    transform : DiffeomorphicMap or array, shape (4, 4)
    """
    return Pictures(
        of="the static image",
        planes=slices.deformation(static, grid2world, transform),
        under="the static image",
    )


def of_point_sets(points, matrix):
    """Pictures of the points that somebody has, and where the transform takes them.

    Parameters
    ----------
    points : dict
        "static", "moving" or both to arrays of shape (n, dim).
    matrix : array, shape (dim + 1, dim + 1)
        takes moving points to static ones.
    """
    sets, names, apart = {}, {}, None

    def taken(matrix, points):
        return points @ matrix[:-1, :-1].T + matrix[:-1, -1]

    if "static" in points:
        sets["static"], names["static"] = points["static"], "static points"
    if "moving" in points:
        sets["before"], names["before"] = points["moving"], "moving points before"
        sets["after"] = taken(matrix, points["moving"])
        names["after"] = "moving points after"
    else:
        sets["after"] = taken(np.linalg.inv(matrix), points["static"])
        names["after"] = "static points, taken to the moving ones' space"
    if len(points) == 2:
        apart = tuple(
            math.sqrt(np.mean(np.sum((sets[name] - sets["static"]) ** 2, axis=1)))
            for name in ("before", "after")
        )
    of = "both sets of points" if apart else f"the {next(iter(points))} points"
    return Pictures(of=of, points=charts.of_points(sets), sets=names, apart=apart)


def save_report(path, receipt, *, names=None, pictures=None):
    """Write the page.

    Parameters
    ----------
    path : str or Path
    receipt : dict
        of a run.
    names : dict, optional
        "static" and "moving" to the names of their files.
    pictures : Pictures, optional
    """
    text = page(receipt, names=names, pictures=pictures)
    with open(path, "w", encoding="utf-8", errors="replace") as stream:
        stream.write(text)


def page(receipt, *, names=None, pictures=None):
    """The page as text, see `save_report`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dipy_ppir.workflows", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources("dipy_ppir.workflows") / "templates"
    style, script = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        style=style,
        script=script,
        script_hash=f"sha256-{digest}",
        size=size_text,
        pictures=pictures,
        colors=slices.jacobian_scale() if pictures and pictures.planes else None,
        ticks=slices.JACOBIAN_TICKS,
        **_facts(receipt, names or {}),
    )


def _facts(receipt, names):
    """What the template says of a receipt."""
    parties = receipt["parties"] or {}
    roles = receipt["learned"]
    who = {role: parties[role]["name"] if parties else "" for role in roles}
    levels = level_lines(receipt)
    remarks = [line for line in remark_lines(receipt) if line not in levels]
    cautions = [line for line in remarks if line.startswith(_CAUTION)]
    # Of a level in the same sentence as what it is about.
    of_levels = [
        f"{about.rstrip('.')}: {line.strip().removeprefix(_CAUTION)}"
        for about, line in itertools.pairwise(levels)
        if line.strip().startswith(_CAUTION)
    ]
    course = [level for level in receipt.get("course") or () if level["values"]]
    return {
        "receipt": receipt,
        "heading": _heading(receipt, names),
        "what": title_of(receipt),
        "named": len(names) == 2 or bool(receipt["title"]),
        "who": who,
        "date": f"{parse_date(receipt['date']):%d %B %Y, %H:%M} UTC".lstrip("0"),
        "duration": _duration(receipt["duration"]),
        "insecure": INSECURE if receipt["insecure"] else None,
        "tiles": _tiles(receipt),
        "results": result_lines(receipt) + quality_lines(receipt),
        "cautions": of_levels + [line.removeprefix(_CAUTION) for line in cautions],
        "remarks": [line for line in remarks if line not in cautions],
        "bits": charts.of_bits(receipt),
        "voxel_bits": charts.VOXEL_BITS,
        "traffic": charts.of_traffic(receipt["bytes_sent"]),
        "course": charts.of_course(course) if course else None,
        "parameters": {
            printable(name): printable(value, 300)
            for name, value in (receipt["parameters"] or {}).items()
        },
        "trust": trust_lines(receipt),
        "points": receipt["operation"] == "points",
    }


def _heading(receipt, names):
    """What was registered, in a line."""
    if len(names) == 2:
        return f"{names['moving']} on {names['static']}"
    if receipt["title"]:
        return receipt["title"]
    what = title_of(receipt).split(" ", 1)[-1]
    return what[0].upper() + what[1:]


def _duration(seconds):
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return str(timedelta(seconds=round(seconds))) + " h"


def _tiles(receipt):
    """The result in a few numbers: what they are, and their values."""
    tiles = []
    found = receipt.get("transform")
    if found:
        low, high = found["scales"][0], found["scales"][-1]
        ends = dict.fromkeys((f"{low:.3f}", f"{high:.3f}"))
        tiles += [
            ("shift", f"{math.hypot(*found['shift']):.2f} mm"),
            ("turn", f"{found['turn']:.2f}°"),
            ("scale", " to ".join(ends)),
        ]
    moved = receipt.get("displacement")
    if moved:
        tiles += [
            ("displacement, mean", f"{moved['mean']:.2f} mm"),
            ("displacement, largest", f"{moved['largest']:.2f} mm"),
        ]
    quality = receipt.get("quality")
    if quality:
        tiles.append(("voxels that fold", f"{quality['percent']:.3g} %"))
    metric = receipt.get("metric")
    if metric:
        tiles.append((metric["name"], f"{metric['value']:.4g}"))
    return tiles
