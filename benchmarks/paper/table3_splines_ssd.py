r"""Table 3: cubic B-splines by the sum of squared differences, 2D.

    python benchmarks/paper/table3_splines_ssd.py GM_STATIC GM_MOVING \
        PET_STATIC PET_MOVING

The paper's first rows are grey matter density of mid-coronal slices of ADNI, 121 x 121
pixels, a control point every 5 pixels, resolutions 2 and 1, all pixels; the others
whole-body PET projections, 1260 x 1090 pixels, a control point every 4, resolutions 30,
20, 10, 5, 2 and 1, a part of the pixels. Neither is public. Two slices of brains stand
for the first pair (for example of OASIS, as mermaid's test data have them), any two
aligned images for the second, brought to these sizes by linear interpolation.
"""

import argparse
import time

from common import gray, picture, row, show
from dipy.align.imwarp import RegistrationStages
import numpy as np
from scipy import ndimage

from dipy_ppir.align.freeform import (
    ClearFreeFormRegistration,
    SecureFreeFormRegistration,
)
from dipy_ppir.mpc.freeform import ClearSteps, SharedSteps

CASES = {
    "": (
        (121, 121),
        {"spacing": 5, "factors": [2, 1], "level_iters": [30, 30]},
    ),
    " + URS": (
        (1260, 1090),
        {
            "spacing": 4,
            "factors": [30, 20, 10, 5, 2, 1],
            "level_iters": [20, 20, 20, 20, 10, 5],
            "sampling_proportion": 0.1,
        },
    ),
}
CASES[" + GMS"] = (CASES[" + URS"][0], {**CASES[" + URS"][1], "sampling": "GMS"})
HEADINGS = (
    "solution",
    "intensity error (SSD)",
    "iterations",
    "displacement RMSE (paper: mm; ours: pixels)",
    "time of a party (s)",
    "comm. moving (MB)",
    "comm. static (MB)",
)
PAPER = [
    ["paper: Clear", "0.65 ± 0.0", "413 ± 0.0", "-", "0.0", "-", "-"],
    ["paper: PPIR(MPC)", "0.65 ± 0.0", "345.70 ± 91.22", "7.31 ± 1.86"]
    + ["0.63", "21.47", "28.98"],
    ["paper: Clear + URS", "0.02 ± 0.0", "101 ± 0.0", "-", "0.0", "-", "-"],
    ["paper: PPIR(MPC) + URS", "0.02 ± 0.00", "79.3 ± 1.88", "5.59 ± 0.39"]
    + ["0.41", "8.00", "8.00"],
    ["paper: Clear + GMS", "0.02 ± 0.0", "103.00 ± 0.0", "-", "0.0", "-", "-"],
    ["paper: PPIR(MPC) + GMS", "0.02 ± 0.04", "80.20 ± 1.62", "6.17 ± 0.37"]
    + ["0.41", "8.00", "8.00"],
]
#: To how much of a voxel steps are shown, by row; the default, and next to nothing.
PRECISIONS = {"PPIR": None, "PPIR, 2^-20 pixel": 2.0**-20}


class Watch:
    """Callback of a registration: how long its iterations take, and how many."""

    def __init__(self):
        self.seconds, self.count, self._last = [], 0, None

    def __call__(self, _, stage):
        now = time.perf_counter()
        if stage == RegistrationStages.ITER_END:
            self.count += 1
            if self._last is not None:
                self.seconds.append(now - self._last)
        if stage in (RegistrationStages.ITER_END, RegistrationStages.SCALE_START):
            self._last = now


def resized(path, shape):
    """An image file at another size, by linear interpolation."""
    image = gray(path)
    return ndimage.zoom(image, np.array(shape) / image.shape, order=1)


def main():
    """Print the table."""
    # The moving owner's draws, in this process: to compare, and for nothing else.
    SharedSteps.draws = ClearSteps.draws
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("gm_static", "gm_moving", "pet_static", "pet_moving"):
        parser.add_argument(name)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--out", default="paper_tables")
    given = parser.parse_args()
    rows = []
    for sampling, (shape, options) in CASES.items():
        pair = (given.pet_static, given.pet_moving)
        if not sampling:
            pair = (given.gm_static, given.gm_moving)
        static, moving = (resized(path, shape) for path in pair)
        found = {name: [] for name in ("Clear", *PRECISIONS)}
        for seed in range(given.repetitions):
            drawn = {"seed": seed} if "URS" in sampling else {}
            clear = ClearFreeFormRegistration(
                dim=2, **options, **drawn, precision=2.0**-20
            )
            exact = clear.optimize(static, moving)
            found["Clear"].append(
                {
                    "error": error(exact, static, moving),
                    "iterations": sum(clear.iterations),
                }
            )
            panels = {"moving": moving, "static": static}
            panels[f"Clear{sampling}"] = exact.transform(moving)
            for name, precision in PRECISIONS.items():
                watch = Watch()
                registration = SecureFreeFormRegistration(
                    2, **options, **drawn, precision=precision, callback=watch
                )
                mapping = registration.optimize(static, moving)
                sent = registration.receipt["bytes_sent"]
                apart = mapping.get_forward_field() - exact.get_forward_field()
                inside = static > 0.05
                rmse = np.sqrt((apart**2).sum(axis=-1)[inside].mean())
                found[name].append(
                    {
                        "error": error(mapping, static, moving),
                        "iterations": watch.count,
                        "rmse": rmse,
                        "seconds": np.mean(watch.seconds),
                        "mb_moving": per(sent, "moving owner", watch.count),
                        "mb_static": per(sent, "static owner", watch.count),
                    }
                )
                if name == "PPIR":
                    panels[f"PPIR{sampling}"] = mapping.transform(moving)
            if not seed:
                frames = {f"Clear{sampling}": "red", f"PPIR{sampling}": "green"}
                name = "splines_ssd" + sampling.replace(" + ", "_").lower()
                picture(f"{given.out}/{name}.png", panels, frames)
        rows += [row(f"ours: {name}{sampling}", r) for name, r in found.items()]
    notes = [
        f"First rows: {given.gm_static}, {given.gm_moving} at 121 x 121 pixels; the "
        f"others: {given.pet_static}, {given.pet_moving} at 1260 x 1090; not those of "
        "the paper, which are not public.",
        "Our SSD is the mean squared difference of intensities from 0 to 1, times "
        "1000; the paper's unit is not said.",
        "Samples are 10 % of the pixels of each resolution, at least 1000, the same in "
        "clear and secure: those of GMS, which the moving owner draws alone, by a "
        "change of the program for this table.",
        "PPIR shows the steps of control points to the default precision; the same to "
        "2^-20 shows what else there is between clear and secure.",
        "Communication is all that a party sends in the whole registration, over its "
        "iterations.",
    ]
    show("Table 3: cubic B-splines", HEADINGS, [*PAPER, *rows], notes)


def error(mapping, static, moving):
    """Mean squared difference, times 1000."""
    return 1e3 * float(np.mean((mapping.transform(moving) - static) ** 2))


def per(sent, role, iterations):
    """Megabytes that a party sent, over the iterations."""
    return sum(sent[role].values()) / 1e6 / iterations


if __name__ == "__main__":
    main()
