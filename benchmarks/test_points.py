"""Registration of points inside a running session, secure beside clear."""

import time

import numpy as np
import pytest
from yardsticks import point_pair, register_points

from dipy_ppir.align.points import clear_registration
from dipy_ppir.mpc import local
from dipy_ppir.mpc.ledger import MOVING, ROLES


@pytest.mark.parametrize(
    ("n", "dim", "scaling"),
    [(193, 2, False), (193, 2, True), (193, 3, False), (1200, 3, False), (10**6, 3, 0)],
)
def test_points(benchmark, n, dim, scaling):
    """What a party waits for is what counts: processes are there, points are read."""
    repeats = 20 if n < 10**5 else 2
    given = {"n": n, "dim": dim, "scaling": bool(scaling), "repeats": repeats}
    moving, static = point_pair(n, dim)

    def once():
        arguments = dict.fromkeys(("moving", "static", "helper"), given)
        return local.run_locally(
            register_points, "yardsticks:register_points", **arguments
        )

    results = benchmark.pedantic(once, rounds=3, iterations=1, warmup_rounds=1)
    seconds, waits, _ = results[MOVING]
    clear = []
    for _ in range(repeats):
        start = time.perf_counter()
        clear_registration(moving, static, scaling=bool(scaling))
        clear.append(time.perf_counter() - start)
    benchmark.extra_info.update(
        median_ms=round(1000 * float(np.median(seconds)), 2),
        least_ms=round(1000 * min(seconds), 2),
        clear_ms=round(1000 * float(np.median(clear)), 3),
        waits_of_moving_owner=waits,
        bytes_by_party={ROLES[p]: results[p][2] for p in ROLES},
    )
