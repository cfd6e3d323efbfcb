"""SyN of two owners alone that opens the map only: against its clear twin."""

from deformed import deformed
import numpy as np
from oblivious import use_known_products
import pytest
from shares import decoded
from test_map_only import metric, register

from dipy_ppir.align import carried
from dipy_ppir.align.carried import (
    CarriedLevels,
    ClearSymmetricDiffeomorphicRegistration,
)
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import MOVING, ROLES, STATIC
from dipy_ppir.mpc.pairalgebra import PairShares


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Products that are made without encryption, which has tests of its own."""
    use_known_products(monkeypatch)


@pytest.mark.parametrize(
    "dim, options",
    [
        (2, {"level_iters": [4, 3]}),
        (3, {"level_iters": [3, 2]}),
        (2, {"level_iters": [4, 3], "opens": "end"}),
    ],
)
def test_of_two_owners_it_is_what_it_is_in_the_clear(two, monkeypatch, dim, options):
    monkeypatch.setattr(carried, "LEVEL_PRECISION", 2.0**-8)
    pair, kept = deformed(dim), {}
    show = CarriedLevels.show_map

    def keep(levels, displacements, receivers):
        if isinstance(levels.world, PairShares):
            kept[levels.world.session.pid] = displacements
        return show(levels, displacements, receivers)

    monkeypatch.setattr(CarriedLevels, "show_map", keep)
    of_metric = {k: v for k, v in options.items() if k not in ("level_iters",)}
    clear = ClearSymmetricDiffeomorphicRegistration(
        metric(dim, **of_metric), level_iters=options["level_iters"]
    )
    clear.optimize(*pair)
    two(lambda s: register(s, pair, dim, **options))
    errors, sizes = [], []
    for owner in (STATIC, MOVING):
        for axis in range(dim):
            m, s = (kept[p][owner][axis] for p in (MOVING, STATIC))
            found = decoded(R128.add(m.part, s.part)) * m.unit
            expected = clear.displacements[owner][axis].factor
            errors.append((found - expected).ravel())
            sizes.append(np.abs(expected).max())
    errors = np.abs(np.concatenate(errors))
    assert max(sizes) > 0.3
    assert np.sqrt((errors**2).mean()) < 0.02
    assert np.quantile(errors, 0.999) < 0.08


@pytest.mark.parametrize("result_to", ["both", "moving", "static"])
def test_what_each_owner_learns(two, result_to):
    out = two(lambda s: register(s, deformed(2), 2, result_to=result_to))
    receipt = out[MOVING][0].receipt
    learned = {
        role: {e["label"]: (e["openings"], e["values"], e["bits"]) for e in entries}
        for role, entries in receipt["learned"].items()
    }
    # Two levels of 24 x 22 and 48 x 44.
    level, points = 2 * 7 * 7, 2 * 17 * 16
    for pid in (MOVING, STATIC):
        name = "static" if pid == STATIC else "moving"
        expected = {"whole", "mismatch", f"level_{name}"}
        if result_to in ("both", name):
            expected.add("map")
            assert out[pid][1] is not None
            expected |= {"prealign"} if pid == STATIC else set()
        else:
            assert out[pid][1] is None
        found = learned[ROLES[pid]]
        assert found.keys() == expected
        for label, (_, values, bits) in found.items():
            if label.startswith("level"):
                assert values == level and bits / values < 9
            if label == "map":
                assert values == points and bits / values < 10
    if result_to == "both":
        first, second = (np.asarray(m.get_forward_field()) for _, m in out)
        assert np.array_equal(first, second)
