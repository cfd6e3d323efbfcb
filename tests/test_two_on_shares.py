"""Affine registration by mutual information of two owners alone, beside three parties'.

What is opened is the same, and what is found as good.
"""

from functools import partial

from dipy.align.imaffine import AffineMap
import noise
import numpy as np
from parties import run_trio
import pytest

from dipy_ppir.align import RemoteImage, affine_registration
from dipy_ppir.mpc.encrypted import EncryptedRows
from dipy_ppir.mpc.frame import operation_code
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.pairinformation import USES, WORD_BITS

#: One level and few bins, so that a registration takes seconds.
FEW = {"sigmas": [0.0], "factors": [1], "nbins": 12}


@pytest.fixture(autouse=True)
def same_randomness(monkeypatch):
    """Rounding is by chance in part, and frames move at random."""
    noise.fix_randomness(monkeypatch)
    noise.fix_frames(monkeypatch)


def register(run, pair, *, masks=None, ret_metric=False, **options):
    """What each owner gets, with its receipt, by the fixture `two` or `three`."""
    static, moving, static_grid2world, moving_grid2world = pair

    def party(session):
        here = session.pid
        return affine_registration(
            moving if here == MOVING else RemoteImage(moving.shape, moving_grid2world),
            static if here == STATIC else RemoteImage(static.shape, static_grid2world),
            moving_affine=moving_grid2world,
            static_affine=static_grid2world,
            static_mask=masks[0] if masks and here == STATIC else None,
            moving_mask=masks[1] if masks and here == MOVING else None,
            session=session,
            ret_metric=ret_metric,
            ret_receipt=True,
            **options,
        )[1:]

    return run(party)


def apart(first, second, image, grid2world):
    """Root mean square distance, mm, of where two matrices move an object."""
    points = np.argwhere(image > image.max() / 10)
    points = grid2world @ np.vstack([points.T, np.ones(len(points))])
    return np.sqrt((((first - second) @ points)[:-1] ** 2).sum(axis=0).mean())


def correlation(pair, matrix):
    """Of what is aligned; of the square of one, which has the other's contrast."""
    static, moving, static_grid2world, moving_grid2world = pair
    moved = AffineMap(
        matrix,
        domain_grid_shape=static.shape,
        domain_grid2world=static_grid2world,
        codomain_grid_shape=moving.shape,
        codomain_grid2world=moving_grid2world,
    ).transform(moving)
    return np.corrcoef(static.ravel(), moved.ravel() ** 2)[0, 1]


def check_alike(pair, found, expected, *, within):
    """Two owners found what three parties did, and were shown as much."""
    (matrix, *_, receipt), (other, *_) = found
    np.testing.assert_array_equal(matrix, other)
    assert apart(matrix, expected[MOVING][0], pair[0], pair[2]) < within
    three = expected[MOVING][-1]
    assert set(receipt["bits"]) == {"moving owner", "static owner"}
    for role, bits in receipt["bits"].items():
        assert bits == three["bits"][role]


def test_two_owners_find_what_three_parties_do(two, three, bodies):
    pair = bodies(2)
    options = {"pipeline": ["translation"], "level_iters": [5], **FEW}
    found = register(two, pair, ret_metric=True, **options)
    expected = register(three, pair, ret_metric=True, **options)
    check_alike(pair, found, expected, within=0.2)
    # The value that is shown.
    assert abs(found[MOVING][2] - expected[MOVING][2]) < 0.01


# How far a few steps lead is by chance.
@pytest.mark.filterwarnings("ignore:the image was moved")
def test_masks_and_hidden_steps(two, three, bodies):
    """Samples may be left out, and the image is encrypted for every evaluation."""
    pair = bodies(2)
    masks = [image > 0.05 * image.max() for image in pair[:2]]
    options = {"pipeline": ["center_of_mass", "translation"], "level_iters": [4], **FEW}
    options |= {"hide_steps": True, "masks": masks}
    found = register(two, pair, **options)
    expected = register(three, pair, **options)
    check_alike(pair, found, expected, within=1.0)


def test_what_is_sent_of_a_level_serves_all_steps(duo, tap, bodies):
    """And the judgement of the match; another registration sends its own."""
    options = {"pipeline": ["translation", "rigid"], "level_iters": [2], **FEW}
    frames, pair = tap(duo), bodies(2)
    rows = EncryptedRows(
        duo[0],
        "",
        STATIC,
        rows=8,
        length=pair[0].size,
        bits=WORD_BITS,
        others=13,
        uses=USES,
    )
    for image in (pair[0], pair[0][::-1].copy()):
        frames.clear()
        register(partial(run_trio, duo), (image, *pair[1:]), **options)
        sent = [f for f in frames if f[3] == operation_code("categories")]
        assert len(sent) == rows.ciphertexts
        assert {f[0] for f in sent} == {STATIC}


@pytest.mark.heavy
@pytest.mark.parametrize("dim, hide_steps", [(2, True), (3, False)])
def test_whole_registrations(two, three, bodies, dim, hide_steps):
    pair = bodies(dim)
    found = register(two, pair, hide_steps=hide_steps)
    expected = register(three, pair, hide_steps=hide_steps)
    check_alike(pair, found, expected, within=1.0 if hide_steps else 0.5)
    reached = correlation(pair, found[MOVING][0])
    assert reached > correlation(pair, expected[MOVING][0]) - 0.02
    assert reached > correlation(pair, np.eye(dim + 1)) + 0.05
