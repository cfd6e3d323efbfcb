"""Local cross-correlation on shares, against numpy on the clear."""

import numpy as np
from parties import local_trio, run_trio
import pytest
from scipy import ndimage, stats

from dipy_ppir.align.metrics import image_half
from dipy_ppir.mpc import crosscorr
from dipy_ppir.mpc import session as session_module
from dipy_ppir.mpc.crosscorr import (
    LEAST_DEVIATION,
    MOST_FORCE,
    MOST_STEP,
    LocalCrossCorrelation,
    gaussian_filter_matrix,
)
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.frame import DATA, operation_code
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC

#: What is opened is rounded to this; rho, the residuals and e to finer steps.
FORCE_ERROR = 2.0 ** -crosscorr.OPEN_BITS["force"]
STEP_ERROR = 2.0 ** -crosscorr.OPEN_BITS["update"]
#: What opens something at every iteration.
OPENING = ["update", "force", "paper"]


def pair(shape, seed=0):
    """Two smooth images of different range, similar, and flat in one corner."""
    rng = np.random.default_rng(seed)
    static = ndimage.gaussian_filter(rng.standard_normal(shape), 2.0)
    moving = 100 + 900 * ndimage.gaussian_filter(
        static + 0.1 * rng.standard_normal(shape), 1.0
    )
    corner = tuple(slice(0, n // 3) for n in shape)
    static[corner] = static.min()
    return static.astype(np.float32), moving.astype(np.float32)


class Clear:
    """The same in the clear, straight from the definitions."""

    def __init__(self, static, moving, radius, centers):
        size, dim = 2 * radius + 1, static.ndim

        def window_sum(x):
            return ndimage.uniform_filter(x, size, mode="constant") * size**dim

        self.centers = centers
        n = size**dim
        images, flat = [], np.zeros(static.shape, dtype=bool)
        for image in (static, moving):
            image = image.astype(np.float64)
            image = (image - image.min()) / (image.max() - image.min())
            mean = window_sum(image) / n
            variance = window_sum(image**2) - n * mean**2
            flat |= np.sqrt(np.maximum(variance, 0) / n) < LEAST_DEVIATION
            images.append((image, mean, variance))
        (s, s_mean, e), (m, m_mean, f) = images
        d = window_sum(s * m) - n * s_mean * m_mean
        e, f = (1 / np.sqrt(np.where(flat, np.inf, v)) for v in (e, f))
        rho = d * e * f
        a, b = (s - s_mean) * e, (m - m_mean) * f
        self.energy = float((rho[centers] ** 2).sum())
        self.force = {STATIC: rho * (b - rho * a), MOVING: rho * (a - rho * b)}
        self.gradient = {
            STATIC: [g * e for g in np.gradient(s)],
            MOVING: [g * f for g in np.gradient(m)],
        }

    def step(self, owner, sigma, positions):
        out = []
        for g in self.gradient[owner]:
            x = np.zeros_like(g)
            x[self.centers] = (self.force[owner] * g)[self.centers]
            if sigma:
                x = ndimage.gaussian_filter(x, sigma)
            out.append(x[np.ix_(*positions)])
        return np.array(out)


def run(images, radius, offset=None, repeat=1, sessions=None, **options):
    """One iteration at three parties; what each returned, and its session."""
    offset = offset or (0,) * images[0].ndim
    sessions = sessions or local_trio(timeout=300)

    def party(session):
        correlation = LocalCrossCorrelation(session, images[0].shape, radius, **options)
        half = None
        if session.pid != HELPER:
            image = images[0] if session.pid == STATIC else images[1]
            half = image_half(image, correlation, offset)
        for _ in range(repeat):
            result = correlation.step(half, offset)
        return correlation, half, result

    try:
        return run_trio(sessions, party), sessions
    finally:
        for session in sessions:
            session.close()


CASES = [
    ((30, 26), 4, 1, None),
    ((23, 40), 2, 1, None),
    ((14, 15, 16), 2, 1, None),
    ((13, 11, 12), 4, 1, None),
    ((9, 9), 4, 1, None),
    ((26, 27), 4, 2, (0, 1)),
    ((14, 15, 13), 2, 2, (1, 0, 1)),
    ((9, 14), 4, 2, (1, 1)),
]
IDS = ["x".join(map(str, c[0])) + f"-r{c[1]}-stride{c[2]}" for c in CASES]


@pytest.mark.parametrize("reveal", ["force", "paper"])
@pytest.mark.parametrize(("shape", "radius", "stride", "offset"), CASES, ids=IDS)
def test_forces(shape, radius, stride, offset, reveal):
    images = pair(shape)
    results, _ = run(images, radius, offset, reveal=reveal, stride=stride)
    correlation = results[HELPER][0]
    centers = correlation.centers(offset or (0,) * len(shape))
    clear = Clear(*images, radius, centers)
    for owner in (STATIC, MOVING):
        _, half, (force, energy) = results[owner]
        expected = clear.force[owner][centers].reshape(-1)
        # Half a unit of blur and at most 0.4 for rho are up to chance; images rounded
        # to integers make 2.1. "paper" is rounded nowhere else, but divides by e, and
        # by f of windows as flat as the guard allows.
        error = 3 * FORCE_ERROR if reveal == "force" else 1e-5
        assert np.abs(force - expected).max() <= error
        # A voxel whose deviation is at the guard counts in one and not in the other.
        assert abs(energy - clear.energy) <= 1e-5 * expected.size + 1e-9
        slopes = [g[centers].reshape(-1) for g in clear.gradient[owner]]
        exerts = expected != 0
        assert np.abs(half.gradient - slopes)[:, exerts].max() < 1e-3
    assert results[HELPER][2] == (None, None)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("spacing", [1, 2, 3])
@pytest.mark.parametrize(("shape", "radius", "stride", "offset"), CASES, ids=IDS)
def test_updates(shape, radius, stride, offset, spacing, sigma):
    if spacing == 3 and sigma != 2.0:
        pytest.skip("one sigma will do")
    images = pair(shape)
    results, _ = run(
        images,
        radius,
        offset,
        reveal="update",
        stride=stride,
        spacing=spacing,
        sigma=sigma,
    )
    correlation = results[HELPER][0]
    centers = correlation.centers(offset or (0,) * len(shape))
    clear = Clear(*images, radius, centers)
    for owner in (STATIC, MOVING):
        step, energy = results[owner][2]
        expected = clear.step(owner, sigma, correlation.positions())
        assert step.shape == expected.shape
        # Weights are rounded to 2**-16, of which each sum has 17**dim or so.
        assert np.abs(step - expected).max() <= 2 * STEP_ERROR + 1e-4 * MOST_STEP
        assert abs(energy - clear.energy) <= 1e-5 * expected.size + 1e-9


def test_bounds_of_forces_and_steps():
    """What decides whether an opened number can be right."""
    rng = np.random.default_rng(5)
    for shape, radius in (((40, 40), 1), ((40, 40), 4), ((20, 20, 20), 1)):
        static = rng.random(shape).astype(np.float32)
        moving = (static + 0.5 * rng.random(shape)).astype(np.float32)
        centers = tuple(slice(radius, n - radius) for n in shape)
        clear = Clear(static, moving, radius, centers)
        for owner in (STATIC, MOVING):
            assert np.abs(clear.force[owner][centers]).max() <= MOST_FORCE
            for g in clear.gradient[owner]:
                assert np.abs(g[centers]).max() <= 0.5**0.5 + 1e-9
    assert MOST_STEP == MOST_FORCE * 0.5**0.5


def expected_bytes(reveal, correlation, n):
    """The table in the docstring of `crosscorr`."""
    dim, voxels = correlation.dim, int(np.prod(correlation.shape))
    # N D, rho
    elements = 2 * voxels + n + 4 * n + n
    energy = 2 * 2
    if reveal == "force":
        return 16 * elements + 8 * (8 * n + 4 * n + energy)
    elements += (8 + 2 * dim) * n + 4 * n
    opened = int(np.prod([len(p) for p in correlation.positions()]))
    return 16 * (elements + 4 * dim * opened + energy)


@pytest.mark.parametrize("reveal", ["force", "update"])
@pytest.mark.parametrize(("shape", "radius", "stride", "offset"), CASES, ids=IDS)
def test_bytes(shape, radius, stride, offset, reveal):
    results, sessions = run(
        pair(shape), radius, offset, reveal=reveal, stride=stride, spacing=2 * stride
    )
    correlation = results[HELPER][0]
    centers = correlation.centers(offset or (0,) * len(shape))
    n = np.empty(shape)[centers].size
    sent = sum(sum(s.ledger.sent.values()) for s in sessions)
    assert sent == expected_bytes(reveal, correlation, n)


@pytest.mark.parametrize(
    ("reveal", "stride", "most"),
    [("force", 1, 224), ("update", 1, 440), ("update", 2, 85)],
)
def test_bytes_a_voxel_at_full_size(reveal, stride, most):
    """What the documentation promises, at the size that the paper uses."""
    correlation = LocalCrossCorrelation(
        None, (192, 160, 192), 4, reveal=reveal, stride=stride, spacing=2 * stride
    )
    voxels = np.prod(correlation.shape)
    # As if every voxel were a centre: an upper bound.
    n = voxels // stride**3
    assert expected_bytes(reveal, correlation, n) / voxels <= 1.005 * most


@pytest.mark.parametrize(("reveal", "rounds"), [("force", 5), ("update", 6)])
def test_rounds_do_not_grow_with_the_size(reveal, rounds, depth, monkeypatch):
    seen = []
    for shape in ((14, 14), (60, 60)):
        # Blocks are sent ahead, so small ones give the same depth as one.
        monkeypatch.setattr(crosscorr, "BLOCK", 1 << 12)
        sessions = local_trio(timeout=300)
        count = depth(sessions)
        run(pair(shape), 2, sessions=sessions, reveal=reveal)
        seen.append(count())
    assert seen[0] == seen[1] <= rounds


@pytest.mark.parametrize("reveal", ["force", "update", "paper"])
def test_many_blocks_give_the_same(reveal, monkeypatch):
    """Blocks of all sizes, with the helper waiting for the owners now and then."""
    images = pair((33, 41))
    whole, _ = run(images, 3, reveal=reveal, repeat=2)
    monkeypatch.setattr(crosscorr, "BLOCK", 10)
    monkeypatch.setattr(crosscorr, "PACE", 4)
    parts, sessions = run(images, 3, reveal=reveal, repeat=2)
    for owner in (STATIC, MOVING):
        a, b = whole[owner][2], parts[owner][2]
        assert np.abs(a[0] - b[0]).max() <= 3 * FORCE_ERROR
        # Each of 2 * 945 rho is rounded by chance, by 2**-19 at most, and its square
        # is off by less than 2**-18 either way: beyond 2e-3 the sum is with
        # probability 2 exp(-2 * 2e-3**2 / (1890 * 2**-34)) = 1e-31 (Hoeffding).
        assert abs(a[1] - b[1]) <= 2e-3
        paces = sessions[owner].ledger.sent["cross correlation", HELPER]
        assert paces > 0 and paces % 8 == 0


def test_the_helper_is_told_nothing(tap):
    sessions = local_trio(timeout=300)
    frames = tap(sessions)
    run(pair((40, 40)), 4, sessions=sessions)
    assert not [f for f in frames if f[1] == HELPER and f[2] == DATA]


def messages(reveal, tap, images, radius=1):
    """Everything that an owner receives before an opening, as columns of words."""
    sessions = local_trio(timeout=300)
    frames = tap(sessions)
    run(images, radius, sessions=sessions, reveal=reveal)
    opening = {operation_code("open-" + label) for label in crosscorr_labels()}
    views = {MOVING: [], STATIC: []}
    for sender, receiver, kind, op, payload in frames:
        if kind == DATA and receiver != HELPER and op not in opening:
            views[receiver].append((sender, op, np.frombuffer(payload, np.uint64)))
    return views


def crosscorr_labels():
    names = [
        f"{kind}_{name}"
        for kind in ("update", "force", "bracket")
        for name in ("static", "moving")
    ]
    return [*names, "paper_factor", "correlation"]


def uniform(words):
    """Whether the top and the bottom byte of words look uniform.

    These tests ask 1120 times, for two bytes each: one in 4e9 runs would fail.
    """
    for shift in (56, 0):
        counts = np.bincount(
            (words >> np.uint64(shift) & np.uint64(255)).astype(int), minlength=256
        )
        if stats.chisquare(counts).pvalue < 1e-13:
            return False
    return True


@pytest.mark.parametrize("reveal", ["force", "update", "paper"])
@pytest.mark.parametrize("constant", [False, True])
def test_what_an_owner_sees_is_uniform(reveal, constant, tap):
    """Each message, and each sum and difference of two: a mask used twice would show.

    A constant image makes most secrets zero, so that nothing but masks is sent.
    """
    images = pair((74, 66))
    if constant:
        images = tuple(np.full_like(i, 3) for i in images)
    views = messages(reveal, tap, images)
    for pid, view in views.items():
        # One column for each secret number: an array of k numbers has k columns.
        columns = []
        for _, _, words in view:
            n = 72 * 64
            elements = len(words)
            for width in (2, 1):
                if elements % (n * width) == 0 and elements // (n * width) <= 8:
                    columns += list(words.reshape(-1, n * width)[:, ::width])
                    break
            else:
                columns.append(words[: 74 * 66 * 2 : 2][:n])
        assert len(columns) >= 6
        for i, x in enumerate(columns):
            assert uniform(x), (ROLES[pid], i)
            for y in columns[:i]:
                assert uniform(x + y) and uniform(x - y), (ROLES[pid], i)


def test_a_mask_used_twice_would_be_noticed(tap, monkeypatch):
    """The test above can fail."""
    draw = LocalCrossCorrelation._masks

    def lazy(self, owner, ring, shape, out=None):
        masks = draw(self, owner, ring, shape, out)
        if len(shape) > 1 and shape[0] > 1:
            masks[1] = masks[0]
        return masks

    monkeypatch.setattr(LocalCrossCorrelation, "_masks", lazy)
    with pytest.raises(AssertionError):
        test_what_an_owner_sees_is_uniform("force", True, tap)


@pytest.mark.parametrize("reveal", OPENING)
def test_the_ledger_knows_what_is_opened(reveal):
    results, sessions = run(pair((30, 32)), 4, reveal=reveal, repeat=3)
    n, dim = 22 * 24, 2
    reduced = 16 * 17
    labels = {
        "update": {"update": dim * reduced},
        "force": {"force": n},
        "paper": {"bracket": n, "paper_factor": n},
    }[reveal]
    for session in sessions:
        opened = {
            label: (entry.openings, entry.values)
            for (receiver, label), entry in session.ledger.opened.items()
            if receiver == STATIC
        }
        expected = {
            label if label == "paper_factor" else label + "_static": (3, 3 * values)
            for label, values in labels.items()
        }
        assert opened == {**expected, "correlation": (3, 3)}
        numbers, bits = session.ledger.levels[STATIC, n]
        assert numbers == 3 * sum(labels.values()) + 3
        assert bits == pytest.approx(
            sum(e.bits for (r, _), e in session.ledger.opened.items() if r == STATIC)
        )
        for (_, label), entry in session.ledger.opened.items():
            if label.startswith(("force", "update")):
                assert entry.bits <= (crosscorr.OPEN_BITS[reveal] + 3) * entry.values
    assert results[HELPER][2] == (None, None)


@pytest.mark.parametrize("reveal", ["force", "update"])
def test_low_digits_are_noise(reveal):
    """Two runs agree to the digits that are meant to be opened, and no further.

    Each is blurred by half a unit either way and rounded by at most 0.3 for rho. Of
    the differences a fifth are below 0.1 then, and 1 in 50 at most beyond 1; that half
    of 324 are has a probability below 1e-30 (binomial).
    """
    images = pair((26, 26))
    first, second = (run(images, 4, reveal=reveal)[0][STATIC][2][0] for _ in range(2))
    apart = np.abs(first - second) * 2.0 ** crosscorr.OPEN_BITS[reveal]
    assert 0.1 < np.median(apart) < 1 and apart.max() < 3


def test_constant_images_exert_no_force():
    flat = np.full((20, 20), 7.0, dtype=np.float32)
    for images in ((flat, flat), (flat, pair((20, 20))[1])):
        for reveal in ("force", "update"):
            results, _ = run(images, 4, reveal=reveal)
            for owner in (STATIC, MOVING):
                opened, energy = results[owner][2]
                assert np.abs(opened).max() <= FORCE_ERROR
                assert abs(energy) <= 1e-5


def test_threshold_zero_computes_the_same():
    images = pair((22, 22))
    sessions = local_trio(timeout=300, threshold=0, insecure=True)
    insecure, _ = run(images, 4, reveal="force", sessions=sessions)
    secure, _ = run(images, 4, reveal="force")
    apart = insecure[STATIC][2][0] - secure[STATIC][2][0]
    assert np.abs(apart).max() <= 3 * FORCE_ERROR


def test_too_many_centres_are_refused_before_anything_is_sent():
    with pytest.raises(FixedPointOverflowError, match="update"):
        LocalCrossCorrelation(None, (400, 400, 400), 4, reveal="force")
    LocalCrossCorrelation(None, (400, 400, 400), 4, reveal="update")


@pytest.mark.parametrize("radius", [1, 2, 4, 7, 12, 20])
@pytest.mark.parametrize("dim", [2, 3])
def test_scales_leave_room(dim, radius):
    c = LocalCrossCorrelation(None, (64,) * dim, radius)
    bits = 2 * (c._window_bits + c.image_bits + c.inverse_bits)
    assert crosscorr.RHO_BITS - 2 <= bits <= crosscorr.RHO_BITS
    assert c.image_bits >= 12 and c.inverse_bits >= 10
    # N**2 times the square of an intensity, in `windows.normalize`
    assert 2 * c._window_bits + 2 * c.image_bits <= 62
    # the flattest window's inverse norm fits its encoding
    flattest = c.window**-0.5 / LEAST_DEVIATION * c._inverse_scale
    assert flattest <= 2.0**12
    assert R128.bits - crosscorr.RHO_BITS >= 42


def test_gaussian_filter_is_scipys():
    rng = np.random.default_rng(3)
    for n, sigma in ((9, 2.0), (30, 1.0), (17, 3.0), (5, 2.0)):
        x = np.zeros(n)
        centers = range(2, n - 2)
        x[list(centers)] = rng.standard_normal(len(centers))
        positions = np.unique(np.append(np.arange(0, n, 2), n - 1))
        first, weights = gaussian_filter_matrix(n, centers, positions, sigma)
        inside = x[list(centers)]
        got = [
            (w * inside[f : f + len(w)]).sum()
            for f, w in zip(first, weights, strict=True)
        ]
        expected = ndimage.gaussian_filter(x, sigma)[positions]
        assert (
            np.abs(np.array(got) / 2.0**crosscorr.WEIGHT_BITS - expected).max() < 1e-4
        )


@pytest.mark.parametrize("reveal", OPENING)
def test_large_openings_go_in_pieces(reveal, monkeypatch):
    """Both owners are sent much at once; none is cut off for sending too much."""
    images = pair((90, 90))
    whole, _ = run(images, 1, reveal=reveal, spacing=1)
    monkeypatch.setattr(session_module, "MAX_BACKLOG", 1 << 18)
    seen = []
    inner = session_module.Session._open_in_pieces
    monkeypatch.setattr(
        session_module.Session,
        "_open_in_pieces",
        lambda self, *args: seen.append(self.pid) or inner(self, *args),
    )
    pieces, _ = run(images, 1, reveal=reveal, spacing=1)
    assert {MOVING, STATIC, HELPER} <= set(seen)
    for owner in (STATIC, MOVING):
        a, b = whole[owner][2], pieces[owner][2]
        assert a[0].shape == b[0].shape
        assert np.abs(a[0] - b[0]).max() <= 1e-4
        assert abs(a[1] - b[1]) <= 1e-2
