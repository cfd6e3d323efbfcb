"""SyN by squared differences and by self-similarity: against clear twins and DIPY."""

from deformed import deformed
from dipy.align.imwarp import SymmetricDiffeomorphicRegistration
from dipy.align.metrics import SSDMetric
import numpy as np
import pins
import pytest
from shares import decoded

from dipy_ppir.align import RemoteImage, carried, plausibility, syn_registration
from dipy_ppir.align.carried import (
    CarriedLevels,
    ClearSymmetricDiffeomorphicRegistration,
)
from dipy_ppir.align.imwarp import SecureSymmetricDiffeomorphicRegistration
from dipy_ppir.align.memory import peaks
from dipy_ppir.align.metrics import SecureMINDMetric, SecureSSDMetric, metric_from
from dipy_ppir.align.parameters import ParameterError, SynParameters
from dipy_ppir.mpc.algebra import Clear, Shares
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.workflows.operations import OPERATIONS, explain

KINDS = {"SSD": SecureSSDMetric, "MIND": SecureMINDMetric}


def register(session, pair, kind, metric=None, **options):
    """One party's part of a registration."""
    dim = pair[0].ndim
    registration = SecureSymmetricDiffeomorphicRegistration(
        KINDS[kind](dim, session=session, **(metric or {})), session=session, **options
    )
    static, moving = pair
    mapping = registration.optimize(
        static if session.pid == STATIC else RemoteImage(static.shape),
        moving if session.pid == MOVING else RemoteImage(moving.shape),
    )
    return registration, mapping


def twin(pair, kind, metric=None, **options):
    """The same in the clear, and its map."""
    registration = ClearSymmetricDiffeomorphicRegistration(
        KINDS[kind](pair[0].ndim, **(metric or {})), **options
    )
    return registration, registration.optimize(*pair)


def other_modality(image):
    """An image in which dark is bright, and contrast another."""
    return np.sqrt(1.2 - image / image.max())


@pytest.mark.parametrize(
    "kind, dim, options, metric",
    [
        ("SSD", 2, {"level_iters": [5, 5, 3]}, {}),
        ("SSD", 3, {"level_iters": [4, 3]}, {"map_spacing": 2}),
        ("SSD", 2, {"level_iters": [5, 3]}, {"opens": "end"}),
        ("MIND", 2, {"level_iters": [5, 5, 3]}, {}),
        ("MIND", 3, {"level_iters": [4, 3]}, {}),
        ("MIND", 2, {"level_iters": [5, 3]}, {"opens": "end", "map_spacing": 2}),
    ],
)
def test_on_shares_it_is_what_it_is_in_the_clear(
    three, monkeypatch, kind, dim, options, metric
):
    """Displacements before they are rounded; level ends to so many digits, and steps
    of such a length, that chance does not part the two."""

    def given(world, norms, longest, power, digits):
        pid = world.session.pid if isinstance(world, Shares) else MOVING
        rates = np.array([0.1]) if pid == MOVING else None
        return world.masked(*(world.own(rates, MOVING, (1,), digits) for _ in norms))

    for world in (Clear, Shares):
        monkeypatch.setattr(world, "rates", given)
    monkeypatch.setattr(carried, "LEVEL_PRECISION", 2.0**-10)
    pair, kept = deformed(dim), {}
    if kind == "MIND":
        pair = pair[0], other_modality(pair[1])
    show = CarriedLevels.show_map

    def keep(levels, displacements, receivers):
        if isinstance(levels.world, Shares):
            kept[levels.world.session.pid] = displacements
        return show(levels, displacements, receivers)

    monkeypatch.setattr(CarriedLevels, "show_map", keep)
    clear, _ = twin(pair, kind, metric, **options)
    out = three(lambda s: register(s, pair, kind, metric, **options))
    errors, sizes = [], []
    for owner in (STATIC, MOVING):
        for axis in range(dim):
            m, s = (kept[p][owner][axis] for p in (MOVING, STATIC))
            found = decoded(R128.add(m.part, s.part)) * m.unit
            expected = clear.displacements[owner][axis].factor
            errors.append((found - expected).ravel())
            sizes.append(np.abs(expected).max())
    errors = np.abs(np.concatenate(errors))
    assert max(sizes) > 0.2
    assert np.sqrt((errors**2).mean()) < 0.004 and errors.max() < 0.05
    # What was opened, and as what it is counted.
    receipt = out[MOVING][0].receipt
    assert receipt["parameters"]["metric"]["metric"] == kind
    phase = "squared differences" if kind == "SSD" else "self similarity"
    assert all(sent[phase] > 0 for sent in receipt["bytes_sent"].values())
    for pid, role in ROLES.items():
        labels = {e["label"] for e in receipt["learned"][role]}
        expected = {"whole"}
        if pid != HELPER:
            expected |= {"map", "mismatch"} | ({"prealign"} & labels)
            half = "level_static" if pid == STATIC else "level_moving"
            expected |= set() if metric.get("opens") == "end" else {half}
        assert labels == expected


@pytest.mark.parametrize("dim", [2, 3])
def test_squared_differences_are_as_good_as_dipys(dim):
    static, moving = deformed(dim)
    options = {"level_iters": [10, 10] if dim == 2 else [8, 5]}
    dipy = SymmetricDiffeomorphicRegistration(SSDMetric(dim, smooth=2), **options)
    dipy.verbosity = 0
    exact = dipy.optimize(static, moving)
    _, mapping = twin((static, moving), "SSD", {"map_precision": 1 / 8}, **options)
    inner = (slice(4, -4),) * dim
    before = np.abs(moving - static)[inner].mean()
    ours, clear = (
        np.abs(m.transform(moving) - static)[inner].mean() for m in (mapping, exact)
    )
    assert ours < 0.6 * before and ours < clear + 0.1 * before


@pytest.mark.parametrize("dim", [2, 3])
def test_self_similarity_registers_two_modalities(dim):
    """Judged by an image of one modality that is carried along; squared differences
    of the two images make it worse."""
    static, moving = deformed(dim, (72, 66) if dim == 2 else (44, 42, 40))
    left = {}
    for kind in KINDS:
        _, mapping = twin((static, other_modality(moving)), kind, level_iters=[15, 15])
        inner = (slice(4, -4),) * dim
        left[kind] = np.abs(mapping.transform(moving) - static)[inner].mean()
    before = np.abs(moving - static)[inner].mean()
    assert left["MIND"] < 0.75 * before < 0.75 * left["SSD"]


@pytest.mark.parametrize("thickness", [9, 24])
def test_slabs_are_thinned_along_their_long_axes(thickness):
    static, moving = deformed(3, (40, 38, thickness))
    grids = {}

    class Seen(SecureMINDMetric):
        def carried(self, world, operators, step):
            grids[operators.shape] = [p.tolist() for p in operators.points]
            return super().carried(world, operators, step)

    registration = ClearSymmetricDiffeomorphicRegistration(Seen(3), level_iters=[6])
    mapping = registration.optimize(static, other_modality(moving))
    (shape,) = grids
    assert shape == (20, 19, 9 if thickness == 9 else 12)
    # The map is opened at every third voxel of the image, whatever is carried.
    assert grids[shape][0][:3] == [0.0, 1.5, 3.0]
    before, after = (
        np.abs(x - static).mean() for x in (moving, mapping.transform(moving))
    )
    assert after < 0.9 * before


@pytest.mark.parametrize("kind", KINDS)
def test_a_registration_to_noise_is_told_to_both_owners(three, monkeypatch, kind):
    static, moving = deformed(2, (64, 60))
    noise = np.random.default_rng(5).standard_normal((64, 60))
    options = {"level_iters": [5, 3]}
    if kind == "MIND":
        moving = other_modality(moving)
    receipts = three(lambda s: register(s, (static, noise), kind, **options)[0].receipt)
    for pid, receipt in enumerate(receipts):
        assert (plausibility.MISMATCH in receipt["warnings"]) is (pid != HELPER)
    told = []
    monkeypatch.setattr(
        ClearSymmetricDiffeomorphicRegistration,
        "_judged",
        lambda self, mismatched: told.append(mismatched),
    )
    # The same images match, although what differs of them is noise before and after.
    for other in (noise, moving, static):
        twin((static, other), kind, **options)
    assert told == [True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_match_that_gets_worse_is_told(monkeypatch, kind):
    told, judge = [], CarriedLevels.mismatched

    def reversed_in_time(levels, carried, halves, scores):
        told.append(judge(levels, carried, halves, scores))
        told.append(judge(levels, carried, halves, scores[::-1]))
        return False

    monkeypatch.setattr(CarriedLevels, "mismatched", reversed_in_time)
    static, _ = deformed(2, (64, 60))
    twin((static, np.roll(static, 4, 0)), kind, level_iters=[0, 15])
    assert told == [False, True]


def test_a_level_ends_when_differences_fall_no_more():
    static, moving = deformed(2)
    registration = ClearSymmetricDiffeomorphicRegistration(
        SecureSSDMetric(2),
        level_iters=[200],
        opt_tol=1e-2,
        callback=lambda r, stage: seen.append(getattr(r, "niter", 0)),
    )
    seen = []
    registration.optimize(static, moving)
    assert 12 < max(seen) < 150


# -- arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, words",
    [
        ({"metric": "EM"}, "metric must be one of 'CC', 'SSD', 'MIND'"),
        ({"metric": 3}, "metric must be one of"),
        ({"metric": "SSD", "radius": 4}, "radius means nothing to metric SSD; .* CC"),
        ({"metric": "SSD", "sigma_diff": 2.0}, "sigma_diff means nothing"),
        ({"metric": "MIND", "smooth": 2.0}, "smooth means nothing .* SSD"),
        ({"smooth": 2.0}, "smooth means nothing to metric CC"),
        ({"metric": "MIND", "reveal": "force"}, "reveal 'force' means nothing"),
        ({"metric": "SSD", "stride": 2}, "stride 2 means nothing"),
        ({"metric": "SSD", "smooth": 0.5}, "smooth must be a number from 1"),
        ({"metric": "MIND", "sigma_diff": 0.5}, "sigma_diff 0.5 smooths so little"),
    ],
)
def test_parameters_that_a_metric_does_not_have(given, words):
    with pytest.raises(ParameterError, match=words):
        SynParameters(**given)


@pytest.mark.parametrize("name, kind", [("ssd", "SSD"), ("mind", "MIND")])
def test_parameters_make_the_metric_again(name, kind):
    parameters = SynParameters(metric=name, dim=2, map_spacing=2)
    assert SynParameters(**parameters.plain()) == parameters
    metric = metric_from(parameters.plain(*KINDS[kind](2).config()))
    assert type(metric) is KINDS[kind]
    assert metric.config() == KINDS[kind](2, map_spacing=2).config()


def test_metrics_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match="radius means nothing"):
        SecureSSDMetric(3, radius=4)
    with pytest.raises(ValueError, match="reveal 'update' means nothing"):
        SecureMINDMetric(3, reveal="update")
    with pytest.raises(ValueError, match="dim must be 2 or 3"):
        SecureSSDMetric(4)


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_cannot_be_registered(kind):
    static, moving = deformed(2)

    def optimize(static, moving, **options):
        SecureSymmetricDiffeomorphicRegistration(
            KINDS[kind](2), level_iters=[2, 2], **options
        ).optimize(static, moving)

    with pytest.raises(ValueError, match="for 2D images, but the static image has 3"):
        optimize(*deformed(3))
    with pytest.raises(ValueError, match="too small at a level .*at least 5 voxels"):
        optimize(static[:8], moving[:8])
    with pytest.raises(ValueError, match="opens no step of an iteration"):
        registration = SymmetricDiffeomorphicRegistration(
            KINDS[kind](2), level_iters=[2]
        )
        registration.optimize(static, moving)


def test_the_function_takes_a_metric():
    static, moving = deformed(2)
    grids = {"static_affine": np.eye(3), "moving_affine": np.eye(3)}
    with pytest.raises(ValueError, match="radius means nothing to metric MIND"):
        syn_registration(moving, static, dim=2, metric="mind", radius=2, **grids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_file_says_which_metric(kind):
    given = {"operation": "syn", "reveal": "map"}
    plan = pins.plan(**given, parameters={"metric": kind.lower()})
    words = explain(plan)
    assert OPERATIONS["syn"].by[kind] in words
    assert "whether the two images hardly match" in words
    assert "radius" not in words


def test_memory_of_descriptors_is_counted():
    shape = (112,) * 3
    cc, ssd, mind = (
        peaks(SynParameters(metric=m), shape, shape) for m in ("CC", "SSD", "MIND")
    )
    assert all(ssd[pid] < cc[pid] for pid in ROLES)
    assert all(mind[pid] > ssd[pid] for pid in ROLES)
