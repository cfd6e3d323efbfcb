"""Cohorts of small images as they grow: secure beside clear, here and between sites."""

from concurrent.futures import ThreadPoolExecutor
import csv
import subprocess
import time

from cohorts import Cohort
from commands import script
from dipy.align import affine_registration
import nibabel as nib
import pytest

PARAMETERS = {
    "pipeline": ["center_of_mass", "translation", "rigid"],
    "level_iters": [100, 50],
    "sigmas": [1.0, 0.0],
    "factors": [2, 1],
}
CONCURRENT = 2


def register_in_the_clear(made, pairs):
    """DIPY, with as many threads as pairs are registered at a time."""

    def one(pair):
        moving, static = (
            nib.load(made.folder / f"{image.replace('/', '')}.nii.gz") for image in pair
        )
        affine_registration(
            moving.get_fdata(),
            static.get_fdata(),
            moving_affine=moving.affine,
            static_affine=static.affine,
            **PARAMETERS,
        )

    with ThreadPoolExecutor(CONCURRENT) as pool:
        list(pool.map(one, pairs))


@pytest.mark.parametrize("between", ["one machine", "sites"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_growing(benchmark, tmp_path, count, between):
    """Seconds and bytes; commands as users start them, all on this machine."""
    names = [str(n) for n in range(count)]
    if between == "sites":
        pairs = [[f"A/{n}", f"B/{n}"] for n in names]
        made = Cohort(tmp_path, pairs=pairs, parameters=PARAMETERS)
        made.images("A", *names, size=40).images("B", *names, size=40, shift=1)
        sites = "ABH"
    else:
        pairs = [[f"m{n}", f"s{n}"] for n in names]
        made = Cohort(tmp_path, sites={}, pairs=pairs, parameters=PARAMETERS)
        made.images("", *(n for pair in pairs for n in pair), size=40)
        sites = [""]

    def once():
        running = [
            subprocess.Popen([script("dipy_ppir_cohort"), *made.argv(site)])
            for site in sites
        ]
        assert {process.wait() for process in running} == {0}

    benchmark.pedantic(once, rounds=1, iterations=1)
    with open(made.folder / f"out_{sites[-1]}" / "outcomes.tsv") as stream:
        rows = list(csv.DictReader(stream, dialect="excel-tab"))
    start = time.perf_counter()
    register_in_the_clear(made, pairs)
    benchmark.extra_info.update(
        seconds=round(benchmark.stats.stats.mean, 1),
        seconds_a_pair=round(benchmark.stats.stats.mean / count, 1),
        clear_seconds=round(time.perf_counter() - start, 2),
        megabytes=round(sum(int(row["bytes"]) for row in rows) / 1e6, 1),
    )
