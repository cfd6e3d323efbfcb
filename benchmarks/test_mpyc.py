"""Small computations between three processes: time, rounds and bytes."""

import numpy as np
import pytest
from yardsticks import SMALL, optimizer_steps, small

from dipy_ppir.mpc import local
from dipy_ppir.mpc.ledger import MOVING, ROLES


@pytest.mark.parametrize("what", SMALL)
def test_small(benchmark, what):
    """On arrays of field elements and of integers modulo 2**127 - 1; input left out."""
    repeats = 20

    def once():
        arguments = dict.fromkeys(
            ("moving", "static", "helper"), {"what": what, "repeats": repeats}
        )
        return local.run_locally(small, "yardsticks:small", **arguments)

    results = benchmark.pedantic(once, rounds=3, iterations=1, warmup_rounds=1)
    seconds, rounds, _ = results[0]
    sent = sum(results[pid][2] for pid in ROLES)
    benchmark.extra_info.update(
        median_ms=round(1000 * float(np.median(seconds)), 2),
        rounds=rounds,
        bytes_all_links=sent,
    )


def test_optimizer_steps(benchmark):
    """Steps of 12 numbers, two comparisons by MPyC in each; no metric."""

    def once():
        arguments = dict.fromkeys(("moving", "static", "helper"), {"steps": 20})
        return local.run_locally(
            optimizer_steps, "yardsticks:optimizer_steps", **arguments
        )

    results = benchmark.pedantic(once, rounds=3, iterations=1, warmup_rounds=1)
    seconds, rounds, _ = results[MOVING]
    benchmark.extra_info.update(
        median_ms=round(1000 * float(np.median(seconds)), 2),
        waits=rounds,
        bytes_all_links=sum(results[pid][2] for pid in ROLES),
    )
