"""What two owners alone take for the steps of squared differences."""

import numpy as np
import pytest
from yardsticks import pair_steps

from dipy_ppir.mpc import local
from dipy_ppir.mpc.ledger import MOVING, STATIC


@pytest.mark.parametrize(
    ("n", "dim"), [(1000, 2), (100_000, 2), (100_000, 3), (1_000_000, 3)]
)
def test_steps(benchmark, n, dim):
    """A product of the paper's S transposed and J, to the opened step.

    Both owners' seconds of the processor together are what one core takes.
    """
    repeats = 20 if n <= 10**5 else 3
    given = {"n": n, "dim": dim, "repeats": repeats}

    def once():
        arguments = {"moving": given, "static": given, "helper": {}}
        return local.run_locally(
            pair_steps, "yardsticks:pair_steps", parties=2, **arguments
        )

    found = benchmark.pedantic(once, rounds=3, iterations=1, warmup_rounds=1)
    owners = [found[p] for p in (MOVING, STATIC)]
    cpu = np.sum([o["cpu"] for o in owners], axis=0)
    benchmark.extra_info.update(
        median_ms=round(1000 * float(np.median(owners[0]["seconds"])), 1),
        cpu_ms=round(1000 * float(np.median(cpu)), 1),
        megabytes=[round(o["bytes"] / 1e6, 3) for o in owners],
        before_megabytes=[round(o["before"] / 1e6, 3) for o in owners],
    )
