"""What the scripts of the paper's tables have in common.

Taiello et al., Privacy Preserving Image Registration, Medical Image Analysis 2024. Each
script prints its rows beside those of the paper. Figures of the paper are its own, of
its data and machine (i7-7800X); ours are of the data that is given.
"""

from pathlib import Path
import time

import numpy as np

#: Headings, and how numbers are written.
COLUMNS = (
    ("error", "{:.4g}"),
    ("iterations", "{:.4g}"),
    ("rmse", "{:.4g}"),
    ("seconds", "{:.3g}"),
    ("mb_moving", "{:.3g}"),
    ("mb_static", "{:.3g}"),
)


class Iterations:
    """Callback of a registration that measures how long its iterations take."""

    def __init__(self):
        self.seconds, self.count = [], 0
        self._last = self._place = None

    def __call__(self, facts, *_):
        now, place = time.perf_counter(), (facts.get("step"), facts.get("level"))
        # The first one of a level has the level's preparation in it: counted too.
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last, self._place = now, place
        self.count += 1


def megabytes(receipt, iterations):
    """Sent by each owner for an iteration, everything included; (moving, static)."""
    sent = receipt["bytes_sent"]
    return [
        sum(sent[role].values()) / 1e6 / iterations
        for role in ("moving owner", "static owner")
    ]


def text(values, form):
    """Mean and standard deviation of repetitions."""
    values = [v for v in np.ravel(values) if v is not None and np.isfinite(v)]
    if not values:
        return "-"
    mean = form.format(np.mean(values))
    spread = 0.0 if np.ptp(values) < 1e-9 else np.std(values)
    return mean if len(values) == 1 else f"{mean} ± {spread:.2g}"


def row(name, repetitions):
    """A row of ours: mean and standard deviation of every column.

    Parameters
    ----------
    name : str
    repetitions : list of dict
        out of `COLUMNS`; where owners need different times ``seconds`` is the moving
        owner's, and ``seconds_static`` is given too.
    """
    cells = {
        key: text([r.get(key) for r in repetitions], form) for key, form in COLUMNS
    }
    static = [r["seconds_static"] for r in repetitions if "seconds_static" in r]
    if static:
        cells["seconds"] += " / " + text(static, dict(COLUMNS)["seconds"])
    return [name, *cells.values()]


def add_rows_argument(parser):
    """Let the user choose between our rows and those of the paper's PPIR(FHE)."""
    parser.add_argument(
        "--rows",
        choices=("all", "ours", "fhe"),
        default="all",
        help="ours, or PPIR(FHE) as the paper has it (needs TenSEAL), or both",
    )


def show(title, headings, rows, notes=()):
    """Print a table in Markdown.

    Parameters
    ----------
    title : str
    headings : sequence of str
    rows : list of list of str
    notes : sequence of str
        where our data differ from the paper's, and what is counted how.
    """
    print(f"\n## {title}\n")
    print("| " + " | ".join(headings) + " |")
    print("| " + " | ".join("---" for _ in headings) + " |")
    for cells in rows:
        print("| " + " | ".join(map(str, cells)) + " |")
    if notes:
        print()
    for note in notes:
        print(f"- {note}")


def picture(path, panels, frames=None):
    """Write panels beside each other, as the paper's figures have them.

    Parameters
    ----------
    path : str or Path
    panels : dict
        titles to 2D arrays.
    frames : dict, optional
        titles to colours of a frame.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.2))
    for axis, (title, panel) in zip(np.ravel(axes), panels.items(), strict=True):
        axis.imshow(panel, cmap="gray")
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
        color = (frames or {}).get(title)
        for spine in axis.spines.values():
            spine.set_color(color or "none")
            spine.set_linewidth(3)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def gray(path):
    """An image file as numbers from 0 to 1."""
    from PIL import Image

    return np.asarray(Image.open(path).convert("L"), dtype=np.float64) / 255
