"""Templates: which way the shape goes, and what sites build together."""

from functools import cache
import subprocess
import sys

from deformed import deformed
import numpy as np
from parties import run_trio
import pytest
from scipy import ndimage
from summing import local_sites

from dipy_ppir.align import build_template
from dipy_ppir.align import template as of
from dipy_ppir.align.parameters import ParameterError
from dipy_ppir.align.template import Template, TemplateParameters
from dipy_ppir.mpc.errors import (
    FixedPointOverflowError,
    ParameterMismatchError,
    ProtocolError,
)
from dipy_ppir.mpc.ledger import MOST_PARTIES

FAST = {
    "dim": 2,
    "affine_iters": [30, 10],
    "sigmas": [1.0, 0.0],
    "factors": [2, 1],
    "level_iters": [20, 10],
    "radius": 3,
}
#: For what does not depend on how well images lie.
QUICK = {
    **FAST,
    "affine_iters": [0],
    "sigmas": [0.0],
    "factors": [1],
    "level_iters": [1],
    "iterations": 1,
}
SHAPE = (48, 44)
EYE = np.eye(3)


def smooth_field(seed, largest, shape=SHAPE, sigma=8):
    """A smooth displacement field, voxels; components first."""
    rng = np.random.default_rng(seed)
    size = (0,) + (sigma,) * len(shape)
    field = ndimage.gaussian_filter(rng.standard_normal((len(shape), *shape)), size)
    return field * largest / np.abs(field).max()


def pushed(image, field):
    """The image that shows at x + field(x) what this one shows at x."""
    at = np.indices(image.shape, dtype=float)
    x = at.copy()
    for _ in range(50):
        x = at - np.stack([ndimage.map_coordinates(c, x, order=1) for c in field])
    return ndimage.map_coordinates(image, x, order=3)


def rms(a, b):
    return float(np.sqrt(np.mean((a - b) ** 2)))


@cache
def population():
    """One image deformed by fields whose mean is not zero, and by that mean."""
    base = of.scaled(deformed(2, SHAPE)[0])
    mean = smooth_field(1, 2.5)
    others = [smooth_field(seed, 2.0) for seed in (2, 3, 4)]
    others = [field - sum(others) / 3 for field in others]
    return base, mean, [pushed(base, mean + field) for field in others]


# -- the shape ---------------------------------------------------------------


def test_the_template_moves_to_the_mean_shape():
    """Not away from it, and all the way in four quarters."""
    base, mean, _ = population()
    wanted = pushed(base, mean)
    there = of.moved_to_mean(base, np.moveaxis(mean, 0, -1), 0.25)
    half = of.moved_to_mean(base, np.moveaxis(mean, 0, -1), 0.125)
    away = of.moved_to_mean(base, np.moveaxis(mean, 0, -1), -0.25)
    before = rms(base, wanted)
    assert rms(there, wanted) < 0.15 * before
    assert rms(half, wanted) < 0.75 * before
    assert rms(away, wanted) > 1.3 * before


def test_what_is_found_is_where_the_template_lies_in_the_image():
    base, mean, _ = population()
    image = pushed(base, mean).astype(np.float32)
    template, parameters = Template(base, EYE), TemplateParameters(**FAST)
    affine, mapping = of.registered(image, EYE, template, parameters)
    center = ndimage.center_of_mass(base)
    found = of.shape_displacement(affine, mapping, template, np.array(center))
    inside = base > 0.3
    true = np.moveaxis(mean, 0, -1)[inside]
    # But for the turn and the shift, which do not count.
    true = true - rigid_part(np.indices(SHAPE).reshape(2, -1).T[inside.ravel()], true)
    rest = found[inside]
    rest = rest - rigid_part(np.indices(SHAPE).reshape(2, -1).T[inside.ravel()], rest)
    assert np.corrcoef(true.ravel(), rest.ravel())[0, 1] > 0.8


def rigid_part(points, field):
    """The turn and shift nearest to a displacement field, as a field."""
    points = points - points.mean(axis=0)
    turned = np.stack([-points[:, 1], points[:, 0]], axis=1)
    turn = (turned * field).sum() / (turned**2).sum()
    return field.mean(axis=0) + turn * turned


def test_position_and_turn_are_no_shape_and_size_is():
    base, *_ = population()
    # As many iterations as it takes to find the turn of a body that is nearly round.
    patient = {**FAST, "affine_iters": [1000, 200]}
    template, parameters = Template(base, EYE), TemplateParameters(**patient)
    center = np.array(ndimage.center_of_mass(base))
    found = {}
    for name, matrix in {
        "turned": np.array([[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]),
        "larger": 1.1 * np.eye(2),
    }.items():
        # The same voxels, elsewhere in space.
        place = np.eye(3)
        place[:2, :2] = matrix
        place[:2, 2] = center - matrix @ center + [30.0, -20.0]
        affine, mapping = of.registered(base, place, template, parameters)
        field = of.shape_displacement(affine, mapping, template, center)
        found[name] = field[base > 0.3]
        if name == "larger":
            points = np.moveaxis(np.indices(SHAPE), 0, -1)[base > 0.3]
            assert rms(found[name], 0.1 * (points - center)) < 0.2
    assert np.abs(found["turned"]).max() < 0.5


def test_stretch():
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    matrix = np.eye(3)
    matrix[:2, :2] = turn @ np.array([[1.2, 0.1], [0.1, 0.9]])
    matrix[:2, 2] = 100.0
    np.testing.assert_allclose(of.stretch(matrix), [[1.2, 0.1], [0.1, 0.9]])


def test_displacements_between_points():
    """A field that is linear comes back exactly; the last voxels are the nearest."""
    at = np.moveaxis(np.indices((10, 8), dtype=float), 0, -1)
    field = of.mean_displacement(at[::3, ::3] * 2, (10, 8), 3)
    np.testing.assert_allclose(field[:, :7], 2 * at[:, :7])
    np.testing.assert_allclose(field[:, 7], field[:, 6])


def test_a_population_has_its_mean_shape():
    """The template of images that are one image deformed, whose own shape it was at
    first, ends nearer to the mean than where it was, and sharper than a plain mean."""
    base, mean, images = population()
    template = build_template(
        images, [EYE] * 3, initial=base, initial_affine=EYE, iterations=3, **FAST
    )
    wanted = of.scaled(pushed(base, mean))
    assert rms(template.image, wanted) < 0.6 * rms(base, wanted)
    plain = sum(of.scaled(image) for image in images) / 3
    assert rms(template.image, wanted) < rms(plain, wanted)


# -- intensities -------------------------------------------------------------


def test_intensities_do_not_depend_on_the_scanner():
    image = deformed(2, SHAPE)[0]
    found = of.scaled(image)
    assert (found.min(), found.max()) == (0.0, 1.0)
    np.testing.assert_allclose(of.scaled(300 * image + 70), found, atol=1e-5)
    spoilt = image.copy()
    spoilt[5, 5] = 50 * image.max()
    assert rms(of.scaled(spoilt), found) < 0.05
    with pytest.raises(ValueError, match="the same everywhere"):
        of.scaled(np.ones((9, 9)))
    rare = np.zeros((50, 50))
    rare[3, 4] = 2.0
    assert of.scaled(rare)[3, 4] == 1


# -- sites -------------------------------------------------------------------


def split(images, counts):
    """Images by site."""
    images = iter(images)
    return [[next(images) for _ in range(n)] for n in counts]


def together(counts, images, **options):
    """What sites build; each its template and its receipt."""
    sessions = local_sites(len(counts))
    own = split(images, counts)

    def site(session):
        mine = own[session.pid]
        return build_template(
            mine, [EYE] * len(mine), session=session, ret_receipt=True, **options
        )

    try:
        return run_trio(sessions, site)
    finally:
        for session in sessions:
            session.close()


@pytest.mark.parametrize("start", ["initial", "blank"])
def test_sites_build_the_template_of_all_images_in_the_clear(start):
    """The sums are of whole numbers: to the last bit."""
    base, _, images = population()
    images = [*images, base]
    begin = {"initial": base, "initial_affine": EYE}
    if start == "blank":
        begin = {"shape": [44, 42], "voxel_size": 1.1}
    options = {**FAST, **begin, "iterations": 2}
    clear = build_template(images, [EYE] * 4, **options)
    for template, receipt in together([2, 1, 1], images, **options):
        np.testing.assert_array_equal(template.image, clear.image)
        np.testing.assert_array_equal(template.grid2world, clear.grid2world)
        check_receipt(receipt, clear.image.shape, 2 + (start == "blank"))


def check_receipt(receipt, shape, sums):
    """What was opened, in bits that no count of images makes fewer: of three sites."""
    coarse = 2 * np.prod([-(-n // 3) for n in shape])
    most = 3 * of.MOST_IMAGES
    wanted = {
        "number_of_images": (1, 1, np.log2(most + 1)),
        "sum_of_images": (sums, np.prod(shape), np.log2(most * 1023 + 1)),
        "sum_of_displacements": (2, coarse, np.log2(2 * most * 1024 + 1)),
    }
    for learned in receipt["learned"].values():
        assert {e["label"] for e in learned} == set(wanted)
        for entry in learned:
            openings, values, bits = wanted[entry["label"]]
            assert entry["openings"] == openings
            assert entry["values"] == openings * values
            assert entry["bits"] == pytest.approx(openings * values * bits, abs=0.06)
    assert receipt["operation"] == "template"
    assert receipt["images"]["template"]["shape"] == list(shape)
    assert not receipt["warnings"]


def test_sites_that_begin_differently_stop_before_anything_is_added_up():
    base, _, images = population()
    sessions = local_sites(3)

    def site(session):
        initial = base + 0.01 * (session.pid == 2) * np.indices(SHAPE)[0]
        with pytest.raises(ParameterMismatchError, match="give the same --initial"):
            build_template(
                images[:1],
                [EYE],
                session=session,
                initial=initial,
                initial_affine=EYE,
                **FAST,
            )
        return session.ledger.opened

    assert run_trio(sessions, site) == [{}] * 3
    for session in sessions:
        session.close()


def beside_a_rushing_site(counts, told, end):
    """How three sites fare beside a fourth that first waits for what they send.

    It so knows how many images they have, and sends what makes of the count `told`.
    """
    base, _, images = population()
    sessions = local_sites(4)
    rushing, own = sessions[3], split(3 * images, counts)

    def rush(ring, words, label):
        masked = rushing._masked(ring, words)
        others = {peer: ring.empty(words.shape) for peer in rushing.peers}
        rushing.network.receive_all(others, "open-" + label)
        total = sum(others.values(), start=masked)
        masked = masked + (ring.dtype(told) - total)
        for peer in rushing.peers:
            rushing.network.send(peer, "open-" + label, masked)
        return sum(others.values(), start=masked)

    rushing._published = rush

    def site(session):
        mine = [images[0]] if session is rushing else own[session.pid]
        try:
            build_template(
                mine,
                [EYE] * len(mine),
                session=session,
                initial=base,
                initial_affine=EYE,
                **QUICK,
            )
        except ProtocolError as exc:
            session.fail(exc)
            opened = {label for _, label in session.ledger.opened}
            assert end in str(exc)
            return str(exc), sorted(opened)

    try:
        return run_trio(sessions, site)[:3]
    finally:
        for session in sessions:
            session.close()


@pytest.mark.parametrize(
    "told, end", [(2, "not between 4 and 40000"), (4, "sum_of_images")]
)
def test_a_rushing_site_does_not_see_who_has_many_images(told, end):
    """It chooses the count, and all stop at the same step whoever has them: a site's
    own numbers are not held against what another has chosen."""
    found = [
        beside_a_rushing_site(counts, told, end)
        for counts in ([6, 1, 1], [1, 6, 1], [2, 2, 2])
    ]
    first = found[0][0]
    assert first is not None
    assert found == [[first] * 3] * 3


#: As a program, because a pool of processes leaves one behind until its parent ends.
POOL = """
import sys
import numpy as np
from dipy_ppir.align.template import Template, maps_to_template
given = np.load(sys.argv[1])
template = Template(given["base"], np.eye(3))
options = eval(sys.argv[2])
maps = maps_to_template(given["images"], [np.eye(3)] * 2, template, jobs=2, **options)
fields = [mapping.forward for _, mapping in maps]
np.save(sys.argv[3], fields)
"""


def test_several_processes_find_the_same(tmp_path):
    base, _, images = population()
    np.savez(tmp_path / "given.npz", base=base, images=images[:2])
    files = [str(tmp_path / name) for name in ("given.npz", "found.npy")]
    arguments = [files[0], repr(FAST), files[1]]
    subprocess.run([sys.executable, "-c", POOL, *arguments], check=True, timeout=300)
    one = of.maps_to_template(images[:2], [EYE] * 2, Template(base, EYE), **FAST)
    for (_, mapping), field in zip(one, np.load(files[1]), strict=True):
        np.testing.assert_array_equal(mapping.forward, field)


def test_a_far_image_is_cut_off_with_a_word(monkeypatch):
    base, _, images = population()
    monkeypatch.setattr(of, "FARTHEST", 0.5)
    parameters = TemplateParameters(**FAST)
    with pytest.warns(UserWarning, match="cut off"):
        _, digits = of.contribution(
            images[0].astype(np.float32),
            EYE,
            Template(base, EYE),
            np.array(ndimage.center_of_mass(base)),
            parameters,
        )
    assert np.abs(digits).max() == 8


# -- what is refused ---------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give an initial template, or shape"),
        ({"shape": [40, 40]}, "give both"),
        ({"shape": [40, 40, 40], "voxel_size": 1.0}, "must have 2 numbers"),
        ({"shape": [4, 40], "voxel_size": 1.0}, "shape must be"),
        ({"iterations": 0}, "iterations must be an integer from 1 to 50"),
        ({"step": 0.6}, "step must be"),
        ({"sigmas": [1.0]}, "as many numbers"),
        ({"level_iters": [0, 0]}, "must not be 0 at every level"),
        ({"intensity_bits": 20}, "intensity_bits must be"),
        ({"initial": np.ones((9, 9)), "initial_affine": EYE}, "constant"),
        (
            {
                "initial": np.eye(9),
                "initial_affine": EYE,
                "shape": [9, 9],
                "voxel_size": 1.0,
            },
            "leave them out",
        ),
        ({"dim": 3}, "image 1 has 2 dimensions, 3 are needed.* or give dim = 2"),
        (
            {"initial": np.ones((9, 1)), "initial_affine": EYE},
            "the initial template has 1 voxel along axis 1",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    _, _, images = population()
    with pytest.raises((ValueError, ParameterError), match=message):
        build_template(images, [EYE] * 3, **{**FAST, **options})


def test_images_that_cannot_be_used():
    with pytest.raises(ValueError, match="give 1 to 10000 images, not 0"):
        build_template([], [], **FAST)
    with pytest.raises(ValueError, match="image 1 has 2 voxels along axis 0"):
        build_template([np.eye(9)[:2]], [EYE], **FAST)
    with pytest.raises(ValueError, match="has 4 dimensions.*one volume of a series"):
        build_template([np.ones((9, 9, 9, 2))], [np.eye(4)])
    with pytest.raises(ValueError, match="no. 1 image contains NaN"):
        build_template([np.full(SHAPE, np.nan)], [EYE], **FAST)
    with pytest.raises(ValueError, match="no receipt"):
        base = population()[0]
        build_template(
            [base],
            [EYE],
            initial=base,
            initial_affine=EYE,
            iterations=1,
            ret_receipt=True,
            **FAST,
        )


def test_the_largest_sums_fit_their_declarations():
    """Of as many images as can be, with as many digits as can be asked for."""
    parameters = TemplateParameters(intensity_bits=16, precision=1 / 64)
    most = of.MOST_IMAGES * MOST_PARTIES
    assert np.log2(most * parameters.brightest + 1) < 35
    assert np.log2(2 * most * parameters.farthest + 1) < 32
    assert np.log2(most + 1) < 19
    # The defaults fit the ring of 32 bits, however many sites there are.
    assert most * TemplateParameters().brightest < 2**31
    assert most * TemplateParameters().farthest < 2**31


def test_sums_in_the_clear_keep_to_the_bound():
    """As those between sites do, which find it before anything is sent."""
    with pytest.raises(ValueError, match="not between 0 and 10"):
        of.ClearSums().total([11], "number_of_images", 10)
    sessions = local_sites(3)
    with pytest.raises(FixedPointOverflowError, match="between 0 and 10"):
        sessions[0].total([11], "number_of_images", 10)
    for session in sessions:
        session.close()
