"""Table A1: rigid registration of points, 2D.

    python benchmarks/paper/tableA1_points.py STATIC.txt MOVING.txt [--out FOLDER]

The paper takes outlines of the corpus callosum of 193 points (Vachet et al. 2012),
which are not public. The points of a boundary do here, in any order, one a line and a
millimetre from each other: 193 points are placed on their outline at equal distances,
beginning where it is foremost, and correspond in their order. The moving one is turned
and shifted at random in every repetition.
"""

import argparse
from pathlib import Path
import sys

from common import add_rows_argument, show, text
from contourpy import contour_generator
import leaking_ckks
import numpy as np
from scipy import ndimage

from dipy_ppir.align.points import clear_registration
from dipy_ppir.mpc import local
from dipy_ppir.mpc.ledger import MOVING, STATIC

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from yardsticks import register_given

POINTS = 193
HEADINGS = (
    "solution",
    "displacement RMSE (mm)",
    "time moving (s)",
    "time static (s)",
    "comm. moving (MB)",
    "comm. static (MB)",
)
PAPER = [
    ["paper: PPIR(MPC)", "1.11 ± 0.31", "0.02", "0.02", "0.03", "0.03"],
    ["paper: PPIR(FHE)", "1.26 ± 0.37", "1.10", "0.18", "1.42", "35.93"],
]


def outline(path):
    """The outline of points, at equal distances from the foremost one on."""
    points = np.loadtxt(path)
    low = points.min(axis=0) - 2
    cells = np.rint(points - low).astype(int)
    inside = np.zeros(cells.max(axis=0) + 3)
    inside[tuple(cells.T)] = 1
    inside = ndimage.binary_fill_holes(ndimage.binary_closing(inside))
    smooth = ndimage.gaussian_filter(inside.astype(float), 0.7)
    # Contours have columns first.
    lines = contour_generator(z=smooth).lines(0.5)
    points = max(lines, key=len)[:-1, ::-1] + low
    points = np.roll(points, -int(points[:, 0].argmax()), axis=0)
    points = np.vstack([points, points[:1]])
    length = np.r_[0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    at = np.linspace(0, length[-1], POINTS, endpoint=False)
    return np.stack([np.interp(at, length, x) for x in points.T], 1)


def turned(points, rng):
    """Points turned and shifted at random."""
    angle, middle = rng.uniform(-np.pi / 3, np.pi / 3), points.mean(axis=0)
    c, s = np.cos(angle), np.sin(angle)
    shift = rng.uniform(-20, 20, 2)
    return (points - middle) @ np.array([[c, s], [-s, c]]) + middle + shift


def moved(matrix, points):
    """Points where a matrix takes them."""
    return points @ matrix[:-1, :-1].T + matrix[:-1, -1]


def apart(a, b, points):
    """Root mean square distance between where two matrices take points, mm."""
    away = moved(a, points) - moved(b, points)
    return np.sqrt((away**2).sum(axis=1).mean())


def encrypted(moving, static):
    """By the paper's PPIR(FHE)-v1: matrix, and costs."""
    means = moving.mean(axis=0), static.mean(axis=0)
    products, cost = leaking_ckks.encrypted_points(
        (static - means[1]).T, (moving - means[0]).T
    )
    u, _, vt = np.linalg.svd(products)
    signs = np.ones(len(u))
    signs[-1] = np.sign(np.linalg.det(u @ vt))
    matrix = np.eye(len(u) + 1)
    matrix[:-1, :-1] = u * signs @ vt
    matrix[:-1, -1] = means[1] - matrix[:-1, :-1] @ means[0]
    return matrix, cost


def encrypted_rows(static, template, repetitions):
    """The row of the paper's PPIR(FHE)."""
    if leaking_ckks.tenseal is None:
        print(leaking_ckks.MISSING)
        return []
    rmse, costs = [], []
    for seed in range(repetitions):
        moving = turned(template, np.random.default_rng(seed))
        matrix, cost = encrypted(moving, static)
        rmse.append(apart(matrix, clear_registration(moving, static), moving))
        costs.append(cost.table())
    seconds, _, sent = np.moveaxis(costs, 0, -1)
    cells = [text(x, "{:.3g}") for x in (*seconds, *sent / 1e6)]
    name = "reproduced: PPIR(FHE), against clear"
    return [[name, text(rmse, "{:.2g}"), *cells]]


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("static")
    parser.add_argument("moving")
    parser.add_argument("--repetitions", type=int, default=10)
    add_rows_argument(parser)
    parser.add_argument("--out", default="paper_tables")
    given = parser.parse_args()
    static, template = outline(given.static), outline(given.moving)
    rows = []
    if given.rows != "ours":
        rows += encrypted_rows(static, template, given.repetitions)
    if given.rows != "fhe":
        rows += our_rows(static, template, given)
    notes = [
        f"Points: {given.static}, {given.moving}, {POINTS} on each outline; not those "
        "of the paper, which are not public.",
        "What is opened is the rotation and the other set's centre, rounded; without "
        "that clear and secure are alike. Time and bytes are those of a registration "
        "inside a running session of three processes, agreement and receipt included.",
        "Of PPIR(FHE) time is each owner's process time, without serialization; keys "
        "are not in the bytes.",
    ]
    show("Table A1: rigid points", HEADINGS, [*PAPER, *rows], notes)


def our_rows(static, template, given):
    """Rows of this package, and the picture."""
    rows, fit = [], []
    for parties in (3, 2):
        rmse, seconds, sent = [], [], []
        for seed in range(given.repetitions):
            moving = turned(template, np.random.default_rng(seed))
            parts = {"shape": static.shape, "repeats": 5}
            results = local.run_locally(
                register_given,
                "yardsticks:register_given",
                parties=parties,
                moving={**parts, "points": moving},
                static={**parts, "points": static},
                helper=parts,
            )
            exact = clear_registration(moving, static)
            matrix = results[MOVING]["matrix"]
            rmse.append(apart(matrix, exact, moving))
            left = moved(exact, moving) - static
            fit.append(np.sqrt((left**2).sum(axis=1).mean()))
            seconds.append([np.median(results[p]["seconds"]) for p in (MOVING, STATIC)])
            sent.append([results[p]["bytes"] / 1e6 for p in (MOVING, STATIC)])
        if parties == 3:
            pictured(
                Path(given.out),
                static,
                moving,
                moved(exact, moving),
                moved(matrix, moving),
            )
        seconds, sent = np.array(seconds).T, np.array(sent).T
        name = "PPIR" if parties == 3 else "PPIR, two owners alone"
        ours = [f"ours: {name}, against clear", text(rmse, "{:.2g}")]
        rows.append(ours + [text(x, "{:.3g}") for x in (*seconds, *sent)])
    clear = ["ours: clear, to the static points", text(fit, "{:.4g}"), *["-"] * 4]
    return [clear, *rows]


def pictured(folder, static, moving, exact, secure):
    """Both sets, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"moving": moving, "Clear": exact, "PPIR": secure}
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        axis.plot(*static.T, ".", color="0.6", markersize=3, label="static")
        color = {"moving": "black", "Clear": "red", "PPIR": "green"}[title]
        axis.plot(*points.T, ".", color=color, markersize=3, label=title)
        axis.set_aspect("equal")
        axis.legend(fontsize=8)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "points.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
