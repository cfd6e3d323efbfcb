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
from unittest import mock

from common import add_rows_argument, gray, picture, row, show
from dipy.align.imwarp import RegistrationStages
import leaking_ckks
from leaking_ckks import DotProducts, EncryptedProducts, LeakingProducts
import numpy as np
from scipy import ndimage

from dipy_ppir.align import freeform
from dipy_ppir.align.freeform import (
    ClearFreeFormRegistration,
    SecureFreeFormRegistration,
)
from dipy_ppir.mpc.freeform import (
    IMAGE_BITS,
    ClearSteps,
    SharedSteps,
    places,
    scattered,
)

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
#: D of PPIR(FHE), iterations that are made at each level, and for how many they stand.
#: Finer levels of samples have too many control points: at resolution 5 the moving
#: owner would send 1 GB in each iteration.
ENCRYPTED = {
    ("", DotProducts): (121, [1, 1], [30, 30]),
    ("", LeakingProducts): (256, [30, 5], [30, 30]),
    ("samples", DotProducts): (128, [1, 1, 0, 0, 0, 0], [20, 20, 0, 0, 0, 0]),
    ("samples", LeakingProducts): (128, [20, 20, 20, 0, 0, 0], None),
}
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
    ["paper: PPIR(FHE)-v1 (D = 121)", "0.64 ± 0.0", "224.7 ± 79.15", "9.50 ± 4.34"]
    + ["3.41 / 0.00", "0.06", "0.01"],
    ["paper: PPIR(FHE)-v2 (D = 256)", "0.64 ± 0.0", "379.2 ± 75.82", "11.02 ± 4.93"]
    + ["0.98 / 0.43", "40.45", "3.56"],
    ["paper: Clear + URS", "0.02 ± 0.0", "101 ± 0.0", "-", "0.0", "-", "-"],
    ["paper: PPIR(MPC) + URS", "0.02 ± 0.00", "79.3 ± 1.88", "5.59 ± 0.39"]
    + ["0.41", "8.00", "8.00"],
    ["paper: PPIR(FHE)-v1 (D = 128) + URS", "0.02 ± 0.00", "105.40 ± 1.71"]
    + ["7.63 ± 0.01", "12.23 / 0.0", "0.06", "0.01"],
    ["paper: PPIR(FHE)-v2 (D = 128) + URS", "0.02 ± 0.00", "105.20 ± 2.54"]
    + ["8.74 ± 1.90", "0.62 / 0.26", "24.74", "3.37"],
    ["paper: Clear + GMS", "0.02 ± 0.0", "103.00 ± 0.0", "-", "0.0", "-", "-"],
    ["paper: PPIR(MPC) + GMS", "0.02 ± 0.04", "80.20 ± 1.62", "6.17 ± 0.37"]
    + ["0.41", "8.00", "8.00"],
    ["paper: PPIR(FHE)-v1 (D = 128) + GMS", "0.02 ± 0.00", "105.70 ± 2.40"]
    + ["5.60 ± 2.22", "11.95 / 0.0", "0.06", "0.01"],
    ["paper: PPIR(FHE)-v2 (D = 128) + GMS", "0.02 ± 0.00", "106.32 ± 1.30"]
    + ["9.11 ± 2.34", "0.62 / 0.26", "24.91", "3.35"],
]
#: To how much of a voxel steps are shown, by row, the default and next to nothing; and
#: how many parties there are.
OURS = {
    "PPIR": (None, 3),
    "PPIR, 2^-20 pixel": (2.0**-20, 3),
    "PPIR, two owners alone": (None, 2),
}


class EncryptedSteps(ClearSteps):
    """Steps in the clear, but for R, which is a product of encrypted numbers."""

    def __init__(self, products):
        self._products = products

    def begin(self, lattice, static):
        """Take the static image for a level."""
        super().begin(lattice, static)
        self._products.share_static(self._static_values())

    def _static_values(self, samples=None):
        values = self.static.reshape(-1) / 2.0**IMAGE_BITS
        return values if samples is None else values[samples.at]

    def steps(self, bits, own, samples=None):
        """See `ClearSteps.steps`."""
        lattice, dim = self.lattice, len(own.x)
        splines = np.eye(lattice.size).reshape(-1, *lattice.control_shape)
        splines = lattice.values(splines).reshape(lattice.size, -1)
        if samples is not None:
            splines = splines[:, samples.at]
            self._products.share_static(self._static_values(samples))
        rows = splines * own.x.reshape(dim, 1, -1)
        sums = self._products(rows.reshape(dim * lattice.size, -1))
        sums = sums.reshape(own.weights.shape) * (2.0**IMAGE_BITS / lattice.unit)
        mine = lattice.integer_sums(scattered(own.x * own.image, samples, lattice))
        return np.rint(own.weights * (mine - sums) * 2.0 ** -places(bits))


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
    parser.add_argument(
        "--encrypted", type=int, default=1, help="repetitions of PPIR(FHE)"
    )
    add_rows_argument(parser)
    parser.add_argument("--out", default="paper_tables")
    given = parser.parse_args()
    rows = []
    for sampling, (_, options) in CASES.items():
        static, moving = images_of(given, sampling)
        if given.rows != "ours":
            rows += encrypted_rows(sampling, static, moving, given)
        if given.rows == "fhe":
            continue
        found = {name: [] for name in ("Clear", *OURS)}
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
            for name, (precision, parties) in OURS.items():
                watch = Watch()
                registration = SecureFreeFormRegistration(
                    2,
                    **options,
                    **drawn,
                    precision=precision,
                    parties=parties,
                    callback=watch,
                )
                mapping = registration.optimize(static, moving)
                sent = registration.receipt["bytes_sent"]
                found[name].append(
                    {
                        "error": error(mapping, static, moving),
                        "iterations": watch.count,
                        "rmse": apart(mapping, exact, static),
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
        "2^-20 shows what else there is between clear and secure. Two owners alone use "
        "no helper, but encryption, and open the same.",
        "Communication is all that a party sends in the whole registration, over its "
        "iterations.",
        "Of PPIR(FHE) times are the moving and the static owner's process time, "
        "without serialization. v1 is measured in one iteration at each resolution "
        "(of samples at 30 and 20: then the control points' coordinates are more than "
        "a ciphertext has numbers), v2 in 30 at resolution 2 and 5 at 1, both scaled "
        "to 30 and 30; with samples v2 ends at resolution 10, at finer ones a step "
        "would be gigabytes. The clear registrations that it is compared with have "
        "the same iterations.",
    ]
    show("Table 3: cubic B-splines", HEADINGS, [*PAPER, *rows], notes)


def images_of(given, sampling):
    """The static and the moving image of some rows."""
    pair = (given.pet_static, given.pet_moving)
    if not sampling:
        pair = (given.gm_static, given.gm_moving)
    return [resized(path, CASES[sampling][0]) for path in pair]


def encrypted_rows(sampling, static, moving, given):
    """Rows of the paper's PPIR(FHE)."""
    if leaking_ckks.tenseal is None:
        print(leaking_ckks.MISSING)
        return []
    rows = []
    for version in (DotProducts, LeakingProducts):
        length, made, meant = ENCRYPTED["samples" if sampling else "", version]
        found = []
        for seed in range(given.encrypted):
            drawn = {"seed": seed} if "URS" in sampling else {}
            options = {**CASES[sampling][1], **drawn, "level_iters": made}
            products = EncryptedProducts(version, length)
            clear = ClearFreeFormRegistration(dim=2, **options, precision=2.0**-20)
            with mock.patch.object(
                freeform, "ClearSteps", lambda p=products: EncryptedSteps(p)
            ):
                mapping = clear.optimize(static, moving)
            found.append(products.costs(clear.iterations, meant, resent=bool(sampling)))
            if version is LeakingProducts:
                exact = ClearFreeFormRegistration(dim=2, **options, precision=2.0**-20)
                exact = exact.optimize(static, moving)
                found[-1] |= {
                    "error": error(mapping, static, moving),
                    "iterations": sum(clear.iterations),
                    "rmse": apart(mapping, exact, static),
                }
        rows.append(row(f"reproduced: {version.name} (D = {length}){sampling}", found))
    return rows


def apart(mapping, exact, static):
    """Root mean square difference of two maps in the object, pixels."""
    fields = mapping.get_forward_field() - exact.get_forward_field()
    return np.sqrt((fields**2).sum(axis=-1)[static > 0.05].mean())


def error(mapping, static, moving):
    """Mean squared difference, times 1000."""
    return 1e3 * float(np.mean((mapping.transform(moving) - static) ** 2))


def per(sent, role, iterations):
    """Megabytes that a party sent, over the iterations."""
    return sum(sent[role].values()) / 1e6 / iterations


if __name__ == "__main__":
    main()
