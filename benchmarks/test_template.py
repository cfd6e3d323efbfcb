"""Templates at several sites: what the sums cost beside a plain mean of the images."""

from concurrent.futures import ThreadPoolExecutor
import time

import numpy as np
import pytest
from summing import local_sites
from yardsticks import beside

from dipy_ppir.align.template import MOST_IMAGES, TemplateParameters

#: Voxels of a template of 2 mm.
SHAPE = (96, 114, 96)


def contributions(sites, images):
    """What each site adds to the sums of an iteration, and of how many images."""
    parameters, rng = TemplateParameters(), np.random.default_rng(0)
    coarse = tuple(-(-n // parameters.spacing) for n in SHAPE) + (3,)
    most = parameters.farthest
    return [
        (
            images * rng.integers(0, parameters.brightest, SHAPE, endpoint=True),
            images * rng.integers(-most, most, coarse, endpoint=True),
        )
        for _ in range(sites)
    ]


def add_up(session, own, images):
    """The sums of one iteration."""
    parameters = TemplateParameters()
    count = int(session.total([images], "number_of_images", MOST_IMAGES)[0])
    pictures, displacements = own
    most = MOST_IMAGES * parameters.brightest
    mean = session.total(pictures, "sum_of_images", most)
    session.total(
        displacements,
        "sum_of_displacements",
        MOST_IMAGES * parameters.farthest,
        signed=True,
    )
    return mean / count


@pytest.mark.parametrize("images", [1, 20])
@pytest.mark.parametrize("sites", [3, 5, 10])
def test_sums_of_an_iteration(benchmark, sites, images):
    """By threads of one process, connected by socket pairs, beside a plain sum."""
    own = contributions(sites, images)
    sessions = local_sites(sites)
    seconds = []

    def secure():
        def one(session):
            began = time.perf_counter()
            add_up(session, own[session.pid], images)
            seconds.append(time.perf_counter() - began)

        with ThreadPoolExecutor(sites) as pool:
            list(pool.map(one, sessions))

    def clear():
        return [sum(parts) / (sites * images) for parts in zip(*own, strict=True)]

    beside(benchmark, secure, clear, 3)
    runs = len(seconds) // sites
    sent = sum(sum(s.ledger.sent.values()) for s in sessions) / runs
    benchmark.extra_info.update(
        megabytes_on_all_links=round(sent / 1e6, 1),
        megabytes_of_a_site=round(sent / sites / 1e6, 1),
        bytes_per_voxel=round(sent / np.prod(SHAPE), 2),
    )
    for session in sessions:
        session.close()
