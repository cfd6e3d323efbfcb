"""Rigid points of two owners alone, from one end to the other, encrypted."""

import numpy as np
import pytest
from test_rotation import turned

from dipy_ppir.align.points import (
    RemotePoints,
    UndeterminedError,
    clear_registration,
    point_registration,
)
from dipy_ppir.mpc.ledger import DECLARATIONS, MOVING, ROLES, STATIC


def sets(dim, n=60, scale=1.0):
    """Two sets of points of one shape, mm."""
    rng = np.random.default_rng(dim)
    x = rng.normal(size=(n, dim)) * [40.0, 30.0, 20.0][:dim] + 100
    y = scale * x @ turned(rng, dim).T + rng.normal(size=(n, dim)) - 20
    return x, y


def register(session, x, y, **options):
    """An owner's part."""
    here = {MOVING: x, STATIC: y}
    moving, static = (
        points if session.pid == p else RemotePoints(*points.shape)
        for p, points in here.items()
    )
    return point_registration(
        moving, static, session=session, ret_receipt=True, **options
    )


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_both_owners_find_the_rigid_transform(two, dim, scaling):
    x, y = sets(dim, scale=1.3 if scaling else 1.0)
    (moved, matrix, receipt), (nothing, other, _) = two(
        lambda s: register(s, x, y, scaling=scaling)
    )
    wanted = clear_registration(x, y, scaling=scaling)
    assert np.array_equal(matrix, other) and nothing is None
    # Six numbers of the rotation are off by 2**-18, those of its last column, which
    # follows from them, by 2.83 times as much at most, and the ratio of the sizes by a
    # part of 2**-18 besides; centroids are off by a part of a mm.
    far = np.abs(np.vstack([x, y])).max()
    assert np.abs(matrix[:dim, :dim] - wanted[:dim, :dim]).max() < 4 * 2.0**-18 * 1.3
    assert np.abs(moved - (x @ wanted[:dim, :dim].T + wanted[:dim, dim])).max() < (
        0.01 + 2.0**-17 * far
    )
    for role in (ROLES[MOVING], ROLES[STATIC]):
        learned = {e["label"]: e for e in receipt["learned"][role]}
        expected = {"alike", "rotation", "centroid"}
        expected |= {"steady"} if dim == 3 else set()
        assert learned.keys() == expected | ({"size_ratio"} if scaling else set())
        for label, entry in learned.items():
            assert entry["bits"] <= entry["values"] * DECLARATIONS[label].bits + 0.1


@pytest.mark.parametrize("receiver", [MOVING, STATIC])
def test_only_a_receiver_finds_it(two, receiver):
    x, y = sets(2)
    name = ["moving", "static"][receiver]
    out = two(lambda s: register(s, x, y, result_to=name))
    assert [matrix is not None for _, matrix, _ in out] == [
        p == receiver for p in (MOVING, STATIC)
    ]
    learned = out[0][2]["learned"][ROLES[MOVING + STATIC - receiver]]
    assert {e["label"] for e in learned} == {"alike"}


def test_sets_without_a_rotation(two):
    x, y = sets(3)
    y = np.random.default_rng(0).permutation(y)

    def run(session):
        with pytest.raises(UndeterminedError) as caught:
            register(session, x, y)
        return {e["label"] for e in caught.value.receipt["learned"][session.role]}

    assert two(run) == [{"alike", "steady"}] * 2
