"""SyN of two owners alone that opens the map only: against its clear twin."""

import math

from deformed import deformed
import numpy as np
from oblivious import KnownProducts, use_known_products
from parties import run_trio
import pytest
from shares import decoded
from test_carried import GRIDS, grid, starts
from test_map_only import metric, register
import test_ssd_mind
from test_ssd_mind import other_modality

from dipy_ppir.align import carried
from dipy_ppir.align.carried import (
    CarriedLevels,
    ClearSymmetricDiffeomorphicRegistration,
)
from dipy_ppir.mpc import pairalgebra
from dipy_ppir.mpc.algebra import Clear
from dipy_ppir.mpc.carried import CarriedCorrelation
from dipy_ppir.mpc.differences import CarriedDifferences
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import MOVING, ROLES, STATIC
from dipy_ppir.mpc.pairalgebra import PairShares


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Products that are made without encryption, which has tests of its own."""
    use_known_products(monkeypatch)


@pytest.mark.parametrize(
    "kind, dim, options, of_metric",
    [
        ("CC", 2, {"level_iters": [4, 3]}, {}),
        ("CC", 3, {"level_iters": [3, 2]}, {}),
        ("CC", 2, {"level_iters": [4, 3]}, {"opens": "end"}),
        ("SSD", 2, {"level_iters": [4, 3]}, {"map_spacing": 2}),
        ("SSD", 3, {"level_iters": [3, 2]}, {}),
        ("MIND", 2, {"level_iters": [4, 3]}, {}),
        ("MIND", 3, {"level_iters": [3, 2]}, {}),
    ],
)
def test_of_two_owners_it_is_what_it_is_in_the_clear(
    two, monkeypatch, kind, dim, options, of_metric
):
    """Steps of the last two metrics are of a given length, so that chance does not part
    the two where a norm lies on a limit of `rates`; with the first it hardly does."""

    def given(world, norms, longest, power, digits):
        pid = world.session.pid if isinstance(world, PairShares) else MOVING
        rates = np.array([0.1]) if pid == MOVING else None
        return world.masked(*(world.own(rates, MOVING, (1,), digits) for _ in norms))

    if kind != "CC":
        for world in (Clear, PairShares):
            monkeypatch.setattr(world, "rates", given)
    monkeypatch.setattr(carried, "LEVEL_PRECISION", 2.0**-10)
    pair, kept = deformed(dim), {}
    if kind == "MIND":
        pair = pair[0], other_modality(pair[1])
    show = CarriedLevels.show_map

    def keep(levels, displacements, receivers):
        if isinstance(levels.world, PairShares):
            kept[levels.world.session.pid] = displacements
        return show(levels, displacements, receivers)

    monkeypatch.setattr(CarriedLevels, "show_map", keep)
    if kind == "CC":
        clear = ClearSymmetricDiffeomorphicRegistration(
            metric(dim, **of_metric), **options
        )
        clear.optimize(*pair)
        two(lambda s: register(s, pair, dim, **options, **of_metric))
    else:
        clear, _ = test_ssd_mind.twin(pair, kind, of_metric, **options)
        two(lambda s: test_ssd_mind.register(s, pair, kind, of_metric, **options))
    errors, sizes = [], []
    for owner in (STATIC, MOVING):
        for axis in range(dim):
            m, s = (kept[p][owner][axis] for p in (MOVING, STATIC))
            found = decoded(R128.add(m.part, s.part)) * m.unit
            expected = clear.displacements[owner][axis].factor
            errors.append((found - expected).ravel())
            sizes.append(np.abs(expected).max())
    errors = np.abs(np.concatenate(errors))
    assert max(sizes) > 0.15
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


def correlation_products(o, refine, last):
    """Elementary products of an iteration; see `dipy_ppir.mpc.carried`."""
    fine, coarse = math.prod(o.shape), math.prod(o.coarse)
    of_voxels, of_points = {2: (38, 78), 3: (58, 162)}[o.dim]
    total = of_voxels * fine + of_points * coarse
    if refine:
        total += 4 * fine + 58 * coarse
    return total - last * 4 * len(o.keys) * fine


def difference_products(o, refine, last):
    """The same; see `dipy_ppir.mpc.differences`."""
    fine, coarse = math.prod(o.shape), math.prod(o.coarse)
    of_voxels, of_points = {2: (29, 64), 3: (49, 148)}[o.dim]
    total = of_voxels * fine + of_points * coarse
    return total - last * 4 * len(o.keys) * fine


@pytest.mark.parametrize("refine, last", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ["CC", "SSD"])
def test_products_and_rounds_of_an_iteration_are_as_stated(
    duo, monkeypatch, depth, kind, name, refine, last
):
    monkeypatch.setattr(pairalgebra, "PIECE", 1 << 30)
    o, taken, made = grid(name), [], {}
    stated = correlation_products if kind == "CC" else difference_products
    sums = KnownProducts.sums

    def counted(products, n, terms):
        if products._session.pid == MOVING:
            taken.append(n * terms)
        return sums(products, n, terms)

    def begin(session):
        for owner in (MOVING, STATIC):
            session.transfers.reserve(20_000, owner)
        of = CarriedCorrelation if kind == "CC" else CarriedDifferences
        iterations = of(PairShares(session), o, 0.25)
        made[session.pid] = iterations, iterations.begin(starts(o, session.pid))

    def run(session):
        iterations, halves = made[session.pid]
        iterations.iterate(halves[STATIC], halves[MOVING], refine=refine, last=last)

    run_trio(duo, begin)
    monkeypatch.setattr(KnownProducts, "sums", counted)
    rounds = depth(duo)
    run_trio(duo, run)
    assert sum(taken) == stated(o, refine, last)
    # And 16 of the norms' highest bits.
    assert rounds() == 16 + (13 if kind == "CC" else 9)


def test_with_encrypted_products(two, monkeypatch):
    """As with those of other tests; a level is enough."""
    monkeypatch.undo()
    pair = deformed(2, (30, 28))
    options = {"level_iters": [2], "map_precision": 1 / 64}
    clear = ClearSymmetricDiffeomorphicRegistration(
        metric(2, map_precision=1 / 64), level_iters=[2]
    )
    expected = clear.optimize(*pair).get_forward_field()
    fields = [
        np.asarray(mapping.get_forward_field())
        for _, mapping in two(lambda s: register(s, pair, 2, **options))
    ]
    assert np.array_equal(*fields)
    assert np.abs(expected).max() > 0.1
    assert np.abs(fields[0] - expected).max() < 0.06
