"""What the programs say of results that a look at both images would show wrong."""

import warnings

from dipy.align.transforms import RigidTransform2D
import numpy as np
import pytest
from scipy import ndimage

from dipy_ppir.align import (
    RemoteImage,
    affine_registration,
    plausibility,
    syn_registration,
)
from dipy_ppir.align.carried import (
    CarriedLevels,
    ClearSymmetricDiffeomorphicRegistration,
)
from dipy_ppir.align.imaffine import (
    Found,
    SecureAffineRegistration,
    SecureMutualInformationMetric,
)
from dipy_ppir.align.imwarp import SecureSymmetricDiffeomorphicRegistration
from dipy_ppir.align.intensities import flat_part, prepared
from dipy_ppir.align.metrics import SecureCCMetric
from dipy_ppir.align.plausibility import ImplausibleError, ImplausibleWarning
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC


def body(shape, seed=0):
    """A smooth textured body on an empty background."""
    at = np.indices(shape) - (np.array(shape).reshape(-1, *[1] * len(shape)) - 1) / 2
    size = np.array(shape).reshape(-1, *[1] * len(shape))
    inside = ((at / (0.38 * size)) ** 2).sum(axis=0) < 1
    texture = ndimage.gaussian_filter(
        np.random.default_rng(seed).standard_normal(shape), 2.5
    )
    texture *= 0.3 / texture.std()
    return ndimage.gaussian_filter(inside * (1.5 + texture), 0.7)


def noise(shape, seed=5):
    return np.random.default_rng(seed).standard_normal(shape)


LEVELS = {"level_iters": [20, 10], "sigmas": [1.0, 0.0], "factors": [2, 1]}


# -- what is seen of a transform -------------------------------------------------


def placed(linear, shift=(0, 0, 0)):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, shift
    return affine


def turned(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    "linear, words",
    [
        (turned(20), None),
        (turned(60), "turns by 60 degrees"),
        (np.diag([-1, 1, 1]), "mirrors"),
        (np.diag([1.2, 1.1, 0.9]), None),
        (np.diag([2.0, 2.0, 2.0]), "scales by 2.00 to 2.00"),
        (np.diag([1.0, 1.0, 0.5]), "scales by 0.50 to 1.00"),
        (np.diag([1.3, 1.0, 0.8]), "shears"),
        (np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 1]]), "shears"),
    ],
)
def test_turns_scales_and_shears_that_nobody_makes(linear, words):
    found = plausibility.of_transform(placed(linear), (20, 20, 20), np.eye(4))
    assert (words is None and not found) or words in found[0]


def test_a_turn_is_about_the_image_wherever_it_lies():
    """The numbers are those of the image, not of a far origin."""
    far = placed(np.eye(3), (5000, -3000, 8000))
    assert not plausibility.of_transform(placed(turned(5)), (20, 20, 20), far)


@pytest.mark.parametrize(
    "shift, size, expected",
    [(0, 20, 1.0), (10, 20, 0.5), (15, 20, 0.25), (30, 20, 0.0), (0, 10, 1.0)],
)
def test_overlap_of_fields_of_view(shift, size, expected):
    affine = placed(np.eye(3), (shift, 0, 0))
    args = affine, (20, 20, 20), np.eye(4), (20, size, 20), np.eye(4)
    part = plausibility.overlap(*args)
    assert part == pytest.approx(expected, abs=0.05)
    assert bool(plausibility.of_overlap(part)) is (expected < 1 / 3)


def test_a_small_field_of_view_inside_a_large_one_overlaps():
    moving_grid = placed(np.eye(3) / 2, (5, 5, 5))
    args = np.eye(4), (40, 40, 40), np.eye(4), (20, 20, 20), moving_grid
    assert plausibility.overlap(*args) == pytest.approx(1, abs=0.1)


# -- what is seen of an image ----------------------------------------------------


def test_air_below_zero_has_a_centre_of_mass_of_its_own():
    image = np.zeros((20, 20, 20))
    image[1:8, 2:9, 3:10] = 40 * (1 + body((7, 7, 7)))
    assert not plausibility.of_center(image, "static")
    air = np.where(image > 20, image, -30)
    assert "below zero" in plausibility.of_center(air, "static")[0]
    # Where that does not move it, nobody minds: z-scores of an object in the middle.
    middle = body((20, 20, 20))
    scores = (middle - middle.mean()) / middle.std() + 0.3
    assert (scores < 0).mean() > 0.2
    assert not plausibility.of_center(scores, "static")


def test_a_mask_that_cuts_the_object_moves_its_centre_of_mass():
    image = body((24, 24, 24))
    half = np.zeros(image.shape)
    half[:12] = 1
    (said,) = plausibility.of_mask(image, half, np.diag([2, 2, 2, 1.0]), "static")
    assert "moves the centre of mass" in said
    around = image > 0.5
    for mask in (None, np.ones(image.shape), np.zeros(image.shape), around):
        assert not plausibility.of_mask(image, mask, np.eye(4), "static")


@pytest.mark.parametrize(
    "shape, whole", [((9, 9, 9), "1 whole window"), ((20,) * 3, 0)]
)
def test_levels_without_room_for_windows(shape, whole):
    found = plausibility.of_level(2, shape, 4)
    assert (not found and not whole) or whole in found[0] and "level_iters" in found[0]


def soft_tissue(shape=(48, 48)):
    """A disc of 20 to 38 in a ring of 900, on -1000: as of a head in a CT."""
    radius = np.hypot(*(np.indices(shape) - (np.array(shape).reshape(2, 1, 1) - 1) / 2))
    texture = ndimage.gaussian_filter(noise(shape, 1), 2.5)
    brain = 29 + 9 * texture / np.abs(texture).max()
    image = np.where(radius < 16, brain, np.where(radius < 19, 900.0, -1000.0))
    return ndimage.gaussian_filter(image, 0.4), radius < 13


def test_soft_tissue_between_bone_and_air_gets_digits():
    image, inside = soft_tissue()
    before = flat_part(image, 4, 2.0**-6)
    found = prepared(image, 4, 2.0**-6)
    assert before > 0.2 and found.equalized and found.flat < 0.05
    assert np.ptp(found.image[inside]) > 0.1 * np.ptp(found.image)
    order = np.argsort(image.ravel(), kind="stable")
    assert (np.diff(found.image.ravel()[order]) >= 0).all()
    ordinary = body((48, 48))
    assert not prepared(ordinary, 4, 2.0**-6).equalized


def test_windows_that_stay_flat_are_told_with_a_remedy():
    binary = (body((40, 40)) > 0.7).astype(float)
    found = prepared(binary, 3, 2.0**-6)
    assert found.flat > 0.25
    (said,) = plausibility.of_windows(found.flat, found.equalized, "moving")
    assert f"{100 * found.flat:.0f} %" in said and "clip its intensities" in said


def test_soft_tissue_of_a_ct_is_registered():
    """The twin, which is what runs on shares."""
    image, inside = soft_tissue()
    at = np.indices(image.shape).astype(float)
    at[0] += 2.5 * np.exp(-(((at - 23.5) ** 2).sum(axis=0)) / 100)
    moving = ndimage.map_coordinates(image, at, order=1)
    registration = ClearSymmetricDiffeomorphicRegistration(
        SecureCCMetric(2), level_iters=[15, 10]
    )
    moved = registration.optimize(image, moving).transform(moving)
    before, after = (np.abs(x - image)[inside].mean() for x in (moving, moved))
    assert after < 0.5 * before


# -- whether two images match, on shares -------------------------------------------


def affine_at(session, static, moving, **options):
    """What a party's registration says of its result."""
    metric = SecureMutualInformationMetric(
        **{k: options.pop(k) for k in ("reveal", "hide_steps") if k in options}
    )
    registration = SecureAffineRegistration(
        metric=metric, session=session, **{**LEVELS, **options}
    )
    registration.join(session)
    images = {
        name: image if session.pid == owner else RemoteImage(image.shape)
        for name, image, owner in (
            ("static", static, STATIC),
            ("moving", moving, MOVING),
        )
    }
    registration.optimize(images["static"], images["moving"], RigidTransform2D(), None)
    return registration.receipt["warnings"]


# Where images of noise end is by chance.
@pytest.mark.filterwarnings("ignore:the image was moved")
@pytest.mark.parametrize(
    "options",
    [{}, {"hide_steps": True}, {"reveal": "gradient"}],
    ids=["steps", "hidden", "gradient"],
)
def test_a_registration_to_noise_is_told_to_both_owners(three, options):
    static = body((32, 36))
    good = three(lambda s: affine_at(s, static, np.roll(static, 2, 0), **options))
    assert good == [[], [], []]
    bad = three(lambda s: affine_at(s, static, noise((32, 36)), **options))
    for pid in (MOVING, STATIC):
        assert plausibility.MISMATCH in bad[pid]
    assert plausibility.MISMATCH not in bad[HELPER]


def syn_at(session, static, moving, **options):
    registration = SecureSymmetricDiffeomorphicRegistration(
        SecureCCMetric(static.ndim, radius=3, session=session),
        level_iters=[5, 3],
        session=session,
        **options,
    )
    registration.optimize(
        static if session.pid == STATIC else RemoteImage(static.shape),
        moving if session.pid == MOVING else RemoteImage(moving.shape),
    )
    return registration.receipt


@pytest.mark.filterwarnings("ignore::dipy_ppir.align.plausibility.ImplausibleWarning")
def test_syn_to_noise_is_told_to_both_owners_by_one_bit(three, monkeypatch):
    static, moving = body((44, 40)), noise((44, 40))
    receipts = three(lambda s: syn_at(s, static, moving))
    for pid, receipt in enumerate(receipts):
        assert (plausibility.MISMATCH in receipt["warnings"]) is (pid != HELPER)
        for owner, role in ROLES.items():
            opened = [
                (e["values"], e["bits"])
                for e in receipt["learned"][role]
                if e["label"] == "mismatch"
            ]
            assert opened == ([] if owner == HELPER else [(1, 1.0)])
    receipts = three(lambda s: syn_at(s, static, np.roll(static, 1, 0)))
    assert all(plausibility.MISMATCH not in r["warnings"] for r in receipts)
    # And the twin finds the same.
    told = []
    monkeypatch.setattr(
        ClearSymmetricDiffeomorphicRegistration,
        "_judged",
        lambda self, mismatched: told.append(mismatched),
    )
    for other in (moving, np.roll(static, 1, 0)):
        ClearSymmetricDiffeomorphicRegistration(
            SecureCCMetric(2, radius=3), level_iters=[5, 3]
        ).optimize(static, other)
    assert told == [True, False]


@pytest.mark.parametrize("radius", [2, 4])
def test_flat_windows_of_images_that_match_are_no_mismatch(three, radius):
    """Of a ball nearly all windows are flat, inside and outside."""
    at = np.indices((48, 48)) - 23.5
    ball = (np.hypot(*at) < 12).astype(float)

    def run(session):
        registration = SecureSymmetricDiffeomorphicRegistration(
            SecureCCMetric(2, radius=radius, session=session),
            level_iters=[3],
            session=session,
        )
        registration.optimize(
            ball if session.pid == STATIC else RemoteImage(ball.shape),
            ball if session.pid == MOVING else RemoteImage(ball.shape),
        )
        return registration.receipt["warnings"]

    assert all(plausibility.MISMATCH not in said for said in three(run))


def test_a_match_that_gets_worse_is_told(monkeypatch):
    """The correlation at the end of a level against that at its beginning."""
    told, judge = [], CarriedLevels.mismatched

    def reversed_in_time(levels, carried, halves, correlations):
        told.append(
            (
                judge(levels, carried, halves, correlations),
                judge(levels, carried, halves, correlations[::-1]),
            )
        )
        return False

    monkeypatch.setattr(CarriedLevels, "mismatched", reversed_in_time)
    static = body((44, 40))
    ClearSymmetricDiffeomorphicRegistration(
        SecureCCMetric(2, radius=3), level_iters=[0, 12]
    ).optimize(static, np.roll(static, 3, 0))
    assert told == [(False, True)]


def test_no_step_is_told_to_the_static_owner(three):
    def run(session):
        registration = SecureAffineRegistration(session=session)
        registration.join(session)
        there = np.eye(3) if session.pid == MOVING else None
        moved = there if there is None else np.diag([1.0, 1.1, 1.0])
        return [
            registration._stuck(Found(affine, None, None, there))
            for affine in (there, moved)
        ]

    found = three(run)
    assert found[MOVING] == found[STATIC] == [True, False]


def test_a_pipeline_that_ends_without_a_metric_is_not_judged():
    static, unit = body((20, 22)), np.eye(3)
    *_, receipt = affine_registration(
        np.roll(static, 1, 0),
        static,
        pipeline=["translation", "center_of_mass"],
        moving_affine=unit,
        static_affine=unit,
        ret_receipt=True,
        **LEVELS,
    )
    labels = {e["label"] for v in receipt["learned"].values() for e in v}
    assert "center_of_mass" in labels and "mismatch" not in labels


# -- from Python and the command line -----------------------------------------------


def test_strict_makes_an_error_of_it():
    static, moving, unit = body((32, 36)), noise((32, 36)), np.eye(3)
    grids = {"moving_affine": unit, "static_affine": unit}
    options = {"pipeline": ["translation"], **LEVELS, **grids}
    with pytest.warns(ImplausibleWarning, match="hardly match"):
        *_, receipt = affine_registration(moving, static, ret_receipt=True, **options)
    assert plausibility.MISMATCH in receipt["warnings"]
    with pytest.raises(ImplausibleError, match="hardly match"):
        affine_registration(moving, static, strict=True, **options)
    options = {"dim": 2, "level_iters": [4, 4], "radius": 3, **grids}
    with pytest.warns(ImplausibleWarning, match="hardly match"):
        syn_registration(moving, static, **options)
    with pytest.raises(ImplausibleError, match="hardly match"):
        syn_registration(moving, static, strict=True, **options)


def test_good_pairs_are_not_warned_of():
    static, unit = body((24, 26, 24)), np.eye(4)
    moving = ndimage.shift(static, (1.2, -0.8, 0.5), order=1)
    grids = {"moving_affine": unit, "static_affine": unit}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ImplausibleWarning)
        _, matrix, receipt = affine_registration(
            moving, static, ret_receipt=True, **LEVELS, **grids
        )
        assert receipt["warnings"] == []
        syn_registration(
            moving, static, prealign=matrix, level_iters=[0, 4], radius=3, **grids
        )


def test_what_is_odd_about_either_image_is_told():
    """In a call with both images each owner speaks of its own."""
    static = body((40, 40))
    binary = (static > 0.7).astype(float)
    unit = {"moving_affine": np.eye(3), "static_affine": np.eye(3)}
    options = {"dim": 2, "level_iters": [3], "radius": 3, **unit}
    for pair, name in (((static, binary), "static"), ((binary, static), "moving")):
        with pytest.warns(ImplausibleWarning, match=f"object of the {name} image"):
            syn_registration(*pair, **options)
