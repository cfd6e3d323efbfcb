"""The secure histogram, and the gradient of its metric, against DIPY's."""

from contextlib import nullcontext
from types import SimpleNamespace

from dipy.align.parzenhist import (
    ParzenJointHistogram,
    compute_parzen_mi,
    cubic_spline_derivative,
)
from dipy.align.transforms import regtransforms
import noise
import numpy as np
from parties import run_trio
import pytest

from dipy_ppir.align import RemoteImage
from dipy_ppir.align import parzenhist as module
from dipy_ppir.align.imaffine import SecureMutualInformationMetric
from dipy_ppir.align.parzenhist import (
    CONTRACT,
    END,
    EXTRA_BITS,
    MAX_PARAMETERS,
    TABLE,
    SecureParzenJointHistogram,
    linear_jacobian,
)
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.frame import DATA
from dipy_ppir.mpc.ledger import DECLARATIONS, MOVING, STATIC

TRANSFORMS = sorted(regtransforms)
TRANSLATION = regtransforms["TRANSLATION", 3]
EVERY_TRANSFORM = pytest.mark.parametrize(
    "ttype", TRANSFORMS, ids=lambda t: f"{t[0]}{t[1]}"
)
EVERY_REVEAL = pytest.mark.parametrize("reveal", ["histogram", "gradient"])
EVERY_MASK = pytest.mark.parametrize("masks", ["none", "static", "moving", "both"])

#: Stated tolerances, relative: of the value and of the gradient's largest part. With
#: "histogram" there is no chance in them.
TOLERANCE = {"histogram": (1e-6, 1e-5), "gradient": (1e-5, 1e-3)}


def pair(shape, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    static = rng.random(shape) * 50 + offset
    moving = np.sqrt(static) + 0.3 * rng.random(shape)
    return static, moving


def masks_of(kind, shape):
    rng = np.random.default_rng(9)
    masks = {"smask": None, "mmask": None}
    for name, owner, share in (("smask", "static", 0.7), ("mmask", "moving", 0.8)):
        if kind in (owner, "both"):
            masks[name] = (rng.random(shape) < share).astype(np.int32)
    return masks


def off_identity(transform):
    n = transform.get_number_of_parameters()
    return transform.get_identity_parameters() + 0.05 * np.arange(1, n + 1) / n


def update(h, static, moving, gradient, *, masks=None, sampled=None):
    """Use a histogram, DIPY's or the secure one, on images or (1D) on samples."""
    masks = masks or {}
    h.setup(static, moving, **masks)
    moving = moving if sampled is None else sampled
    if static.ndim == 1:
        h.update_pdfs_sparse(static, moving)
    else:
        h.update_pdfs_dense(static, moving, **masks)
    if gradient is not None:
        theta, transform, where, field = gradient
        arguments = theta, transform, static, moving, where, field
        if static.ndim == 1:
            h.update_gradient_sparse(*arguments)
        else:
            h.update_gradient_dense(*arguments, **masks)


def clear(nbins, static, moving, gradient=None, **how):
    """DIPY's histogram, metric and gradient."""
    h = ParzenJointHistogram(nbins)
    update(h, static, moving, gradient, **how)
    out = None if gradient is None else np.empty(len(gradient[0]))
    value = compute_parzen_mi(h.joint, h.joint_grad, h.smarginal, h.mmarginal, out)
    return h, value, out


def secure(nbins, static, moving, gradient=None, *, reveal="histogram", **how):
    """The secure histogram after the same."""
    h = SecureParzenJointHistogram(nbins, reveal=reveal)
    update(h, static, moving, gradient, **how)
    h.end()
    return h


def assert_close(actual, expected, relative):
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() <= relative * scale, (actual, expected)


def assert_same(h, expected, value, gradient):
    """The metric of a secure histogram and of DIPY's, and their gradients.

    With "gradient" as far apart as chance allows, see `noise`.
    """
    tolerance = TOLERANCE[h.reveal]
    bounds = [tolerance[0] * value, tolerance[1] * np.abs(gradient).max()]
    if h.reveal == "gradient":
        finer = (
            noise.value_bound(h, value),
            noise.gradient_bound(noise.blur_of(h), expected.joint_grad),
        )
        # Both bounds are functions of the images, not of chance; except that noise may
        # look like a wrap, and the gradient be opened a second time, with fewer bits.
        # What is usual is a quarter of what is possible, or less.
        bounds[1] *= 4 * 2 ** (EXTRA_BITS - h._columns.extra)
        assert finer[0] <= max(bounds[0], 1e-6) and finer[1].max() <= bounds[1]
        bounds = finer
    assert abs(h.metric_value - value) <= bounds[0]
    assert (np.abs(h.metric_gradient - gradient) <= bounds[1]).all()


@pytest.fixture
def fixed(monkeypatch):
    """The same noise in every run."""
    noise.fix_randomness(monkeypatch)


@pytest.mark.parametrize("nbins", [6, 7, 16, 32])
@pytest.mark.parametrize("shape", [(17, 15), (9, 8, 7)], ids=["2D", "3D"])
@EVERY_MASK
def test_densities(nbins, shape, masks):
    static, moving = pair(shape)
    masks = masks_of(masks, shape)
    expected, value, _ = clear(nbins, static, moving, masks=masks)
    h = secure(nbins, static, moving, masks=masks)
    for name in ("joint", "smarginal", "mmarginal"):
        assert np.abs(getattr(h, name) - getattr(expected, name)).max() < 1e-9, name
    assert h.metric_value == pytest.approx(value, rel=1e-6)


def test_sparse_densities():
    static, moving = pair((400,))
    expected, value, _ = clear(20, static, moving)
    h = secure(20, static, moving)
    assert np.abs(h.joint - expected.joint).max() < 1e-9
    assert h.metric_value == pytest.approx(value, rel=1e-6)


@EVERY_TRANSFORM
@EVERY_REVEAL
def test_dense_gradient(ttype, reveal):
    transform, dim = regtransforms[ttype], ttype[1]
    shape = (17, 15) if dim == 2 else (9, 8, 7)
    static, moving = pair(shape)
    field = np.random.default_rng(4).normal(size=(*shape, dim))
    grid2world = np.diag([1.5, 0.8, 1.1][:dim] + [1.0])
    grid2world[:dim, dim] = -7
    gradient = off_identity(transform), transform, grid2world, field
    expected = clear(16, static, moving, gradient)
    h = secure(16, static, moving, gradient, reveal=reveal)
    assert_same(h, *expected)
    assert h.joint_grad is None
    if reveal == "gradient":
        assert not h.joint.any(), "the histogram stays closed"


@EVERY_REVEAL
@EVERY_MASK
@pytest.mark.parametrize("dim", [2, 3])
def test_dense_gradient_with_masks(reveal, masks, dim):
    transform = regtransforms["AFFINE", dim]
    shape = (17, 15) if dim == 2 else (9, 8, 7)
    static, moving = pair(shape, seed=3, offset=20)
    masks = masks_of(masks, shape)
    field = np.random.default_rng(4).normal(size=(*shape, dim)).astype(np.float32)
    gradient = off_identity(transform), transform, np.eye(dim + 1), field
    expected = clear(16, static, moving, gradient, masks=masks)
    h = secure(16, static, moving, gradient, masks=masks, reveal=reveal)
    assert_same(h, *expected)


@EVERY_TRANSFORM
@EVERY_REVEAL
def test_sparse_gradient(ttype, reveal):
    transform, dim = regtransforms[ttype], ttype[1]
    n = 500
    static, moving = pair((n,))
    rng = np.random.default_rng(5)
    points, field = rng.uniform(-20, 20, (n, dim)), rng.normal(size=(n, dim))
    gradient = off_identity(transform), transform, points, field
    expected = clear(16, static, moving, gradient)
    h = secure(16, static, moving, gradient, reveal=reveal)
    assert_same(h, *expected)


STRANGE = {
    # images that strain the bounds on sums, or leave the histogram's range
    "binary": lambda s, m: ((s > 25) * 1.0, (m > 4) * 1.0),
    "one bright voxel": lambda s, m: (_spike(s), _spike(m)),
    "equal": lambda s, m: (s, s.copy()),
    "opposite": lambda s, m: (s, -s),
    "tiny range": lambda s, m: (s * 1e-9 + 5, m * 1e-9 - 3),
    "huge range": lambda s, m: (s * 1e12, m * 1e12),
    "independent": lambda s, m: (s, np.random.default_rng(8).random(m.shape)),
}


def _spike(image):
    out = np.ones_like(image)
    out.reshape(-1)[::37] += 0.001
    out.reshape(-1)[11] = 1000.0
    return out


@pytest.mark.parametrize("name", STRANGE)
@EVERY_REVEAL
@pytest.mark.parametrize("steep", [1e-6, 1.0, 1e6])
def test_strange_images(name, reveal, steep):
    static, moving = (np.ascontiguousarray(x) for x in STRANGE[name](*pair((9, 8, 7))))
    transform = regtransforms["RIGID", 3]
    field = steep * np.random.default_rng(4).normal(size=(9, 8, 7, 3))
    field[2, 2, 2] *= 100
    gradient = off_identity(transform), transform, np.eye(4), field
    parzen, value, expected = clear(16, static, moving, gradient)
    h = secure(16, static, moving, gradient, reveal=reveal)
    assert h.metric_value == pytest.approx(value, rel=1e-4, abs=2e-6)
    # where the terms nearly cancel, what is lost is relative to the terms
    terms = np.abs(field).sum() / (static.size * h.mdelta) * 10
    bound = max(1e-5 * np.abs(expected).max(), 2e-5 * terms)
    if reveal == "gradient":
        finer = noise.gradient_bound(noise.blur_of(h), parzen.joint_grad)
        assert finer.max() <= bound * 2 ** (EXTRA_BITS - h._columns.extra)
        bound = finer
    assert (np.abs(h.metric_gradient - expected) <= bound).all()


@EVERY_REVEAL
@pytest.mark.parametrize("dim", [2, 3])
def test_moving_values_below_the_range_it_was_set_up_for(reveal, dim):
    """Outside the moving image's field of view the interpolated value is 0, which
    may lie below the smallest intensity. Such a sample counts, but weighs nothing."""
    shape = (17, 15) if dim == 2 else (9, 8, 7)
    static, moving = pair(shape, offset=100)
    moving = moving + 50
    sampled = moving.copy()
    sampled[:3] = 0
    transform = regtransforms["TRANSLATION", dim]
    field = np.random.default_rng(4).normal(size=(*shape, dim))
    how = {"gradient": (np.zeros(dim), transform, np.eye(dim + 1), field)}
    how["sampled"] = sampled
    expected, value, gradient = clear(16, static, moving, **how)
    h = secure(16, static, moving, reveal=reveal, **how)
    assert_same(h, expected, value, gradient)
    if reveal == "histogram":
        assert np.abs(h.joint - expected.joint).max() < 1e-9


@EVERY_REVEAL
def test_nothing_in_both_masks(reveal):
    static, moving = pair((9, 8, 7))
    left = np.zeros(static.shape, dtype=np.int32)
    left[:4] = 1
    gradient = np.zeros(3), TRANSLATION, np.eye(4), np.ones((9, 8, 7, 3))
    masks = {"smask": left, "mmask": 1 - left}
    h = secure(16, static, moving, gradient, masks=masks, reveal=reveal)
    assert h.metric_value == 0
    assert not h.metric_gradient.any()


@EVERY_TRANSFORM
def test_jacobian_is_linear_in_position(ttype):
    transform, dim = regtransforms[ttype], ttype[1]
    theta = off_identity(transform)
    jacobian = linear_jacobian(transform, theta)
    for point in np.random.default_rng(0).uniform(-100, 100, (10, dim)):
        expected = np.asarray(transform.jacobian(theta, point)).T
        assert np.allclose(jacobian @ np.append(point, 1.0), expected, atol=1e-10)


@pytest.mark.parametrize("nbins", [5, 0, -3, 6.5])
def test_number_of_bins(nbins):
    with pytest.raises(ValueError, match="nbins must be an integer of at least 6"):
        SecureParzenJointHistogram(nbins)


def test_reveal():
    with pytest.raises(ValueError, match="reveal must be one of"):
        SecureParzenJointHistogram(16, reveal="everything")


# -- each owner with its own image -------------------------------------------


def field_of(shape):
    return np.random.default_rng(4).normal(size=(*shape, 3))


def evaluate(
    session, reveal, static, moving, *, field=None, times=2, nbins=16, together=True
):
    """One party's program: the static image at its owner, the moving at its own."""
    h = SecureParzenJointHistogram(nbins, reveal=reveal, session=session)
    remote = RemoteImage(static.shape)
    here = {
        MOVING: (remote, moving),
        STATIC: (static, remote),
    }.get(session.pid, (remote, remote))
    h.setup(*here)
    h.share_static(static.size, static if session.pid == STATIC else None)
    if session.pid != MOVING:
        h.serve()
        return None
    field = field_of(moving.shape) if field is None else field
    arguments = np.zeros(3), TRANSLATION, remote, moving, np.eye(4), field
    results = []
    for _ in range(times):
        with h.undisturbed() if together else nullcontext():
            h.update_pdfs_dense(remote, moving)
            h.update_gradient_dense(*arguments)
        results.append((h.metric_value, np.array(h.metric_gradient)))
    h.end()
    return results


@pytest.mark.usefixtures("fixed")
@EVERY_REVEAL
def test_parties_in_a_session(trio, tap, reveal):
    static, moving = pair((9, 8, 7))
    frames = tap(trio)
    results = run_trio(trio, evaluate, reveal, static, moving)
    gradient = np.zeros(3), TRANSLATION, np.eye(4), field_of(static.shape)
    _, value, gradient = clear(16, static, moving, gradient)
    assert results[1:] == [None, None]
    for got in results[MOVING]:
        assert got[0] == pytest.approx(value, rel=TOLERANCE[reveal][0])
        assert_close(got[1], gradient, TOLERANCE[reveal][1])
    if reveal == "histogram":  # else the static owner blurs what is opened
        first, second = results[MOVING]
        assert first[0] == second[0]
        assert (first[1] == second[1]).all()
    # The same numbers twice, and yet nothing is sent again.
    sent = [f[4] for f in frames if f[2] == DATA and len(f[4]) > 8]
    assert len(set(sent)) == len(sent) > 15


def test_a_value_put_off_is_there_when_it_is_read(trio):
    static, moving = pair((9, 8, 7))
    _, value, _ = clear(16, static, moving)
    close = pytest.approx(value, rel=TOLERANCE["gradient"][0])

    def conduct(h, remote, moving):
        with h.undisturbed():
            h.update_pdfs_dense(remote, moving)
            assert h.metric_value == close
        with h.undisturbed():
            h.update_pdfs_dense(remote, np.zeros_like(moving))
        assert h.metric_value == pytest.approx(0, abs=1e-6)
        with pytest.raises(ValueError, match="must have the same shape"):
            with h.undisturbed():
                h.update_pdfs_dense(remote, moving)
                h.update_pdfs_dense(remote, moving[1:])
        with h.undisturbed():
            h.update_pdfs_dense(remote, moving)
        assert h.metric_value == close

    def party(session):
        h = SecureParzenJointHistogram(16, reveal="gradient", session=session)
        remote = RemoteImage(static.shape)
        h.setup(
            *{MOVING: (remote, moving), STATIC: (static, remote)}.get(
                session.pid, (remote, remote)
            )
        )
        h.share_static(static.size, static if session.pid == STATIC else None)
        if session.pid == MOVING:
            conduct(h, remote, moving)
            h.update_pdfs_dense(remote, moving)
            h.end()
        else:
            h.serve()
        session.exchange("test", None)

    run_trio(trio, party)


def test_a_value_put_off_in_a_session_that_failed_is_forgotten(three):
    static, moving = pair((9, 8, 7))
    kept = [SecureParzenJointHistogram(16, reveal="gradient") for _ in range(3)]
    remote = RemoteImage(static.shape)

    def party(session):
        h = kept[session.pid]
        h._conversation, h.session = None, session
        here = {MOVING: (remote, moving), STATIC: (static, remote)}
        h.setup(*here.get(session.pid, (remote, remote)))
        h.share_static(static.size, static if session.pid == STATIC else None)
        if session.pid != MOVING:
            return h.serve()
        with h.undisturbed():
            h.update_pdfs_dense(remote, moving)
            if h.metric_gradient is None:
                h.metric_gradient = np.zeros(3)
                raise ZeroDivisionError
        return h.end()

    with pytest.raises(ZeroDivisionError):
        three(party)
    three(party)
    _, value, _ = clear(16, static, moving)
    assert kept[MOVING].metric_value == pytest.approx(
        value, rel=TOLERANCE["gradient"][0]
    )


def test_a_value_put_off_disturbs_nobody_else():
    static, moving = pair((9, 8, 7))
    _, value, _ = clear(16, static, moving)
    one, other = (SecureParzenJointHistogram(16, reveal="gradient") for _ in range(2))
    close = pytest.approx(value, rel=TOLERANCE["gradient"][0])
    for h in (one, other, one):
        h.setup(static, moving)
        with h.undisturbed():
            h.update_pdfs_dense(static, moving)
    assert one.metric_value == close
    assert other.metric_value == close
    with pytest.raises(KeyError):
        with one.undisturbed():
            one.update_pdfs_dense(static, moving)
            raise KeyError
    assert one.metric_value == close, "the last one that was there"
    one.update_pdfs_dense(static, moving)
    assert one.metric_value == close


GRADIENT = CONTRACT | 4 << 8
EXCESSES = {
    "an evaluation too many": ([TABLE] * 3, "more than the 2 evaluations"),
    "a gradient first": ([GRADIENT], "out of turn"),
    "a third gradient": ([TABLE, *[GRADIENT] * 3], "out of turn"),
    "allowances saved up": ([TABLE] * 2 + [GRADIENT] * 3, "out of turn"),
    "too many columns": ([CONTRACT | 99 << 8], "unknown command"),
    "nonsense": ([77], "unknown command"),
}


@pytest.mark.parametrize("excess", EXCESSES)
def test_a_moving_owner_that_asks_for_more_is_refused(monkeypatch, excess):
    """The commands alone: what they ask for is not computed."""
    commands, message = EXCESSES[excess]
    heard = iter(commands)
    done = []
    session = SimpleNamespace(hear=lambda: next(heard), pid=STATIC)
    h = SecureParzenJointHistogram(16, session=session)
    monkeypatch.setattr(h, "_table", lambda: done.append(TABLE))
    monkeypatch.setattr(h, "_contract", lambda columns: done.append(GRADIENT))
    with pytest.raises(ProtocolError, match=message) as raised:
        h.serve(limit=2)
    assert raised.value.culprit == MOVING
    assert done == commands[: len(done)] and len(done) == len(commands) - 1


OPENED = {
    "histogram": {"joint_histogram", "metric_gradient"},
    "gradient": {"metric_value", "metric_gradient", "sample_count"},
}


@pytest.mark.usefixtures("fixed")  # noise may look like a wrap: one more opening
@EVERY_REVEAL
def test_what_is_opened_is_what_is_declared(trio, reveal):
    static, moving = pair((9, 8, 7))

    def party(session):
        evaluate(session, reveal, static, moving, times=3)
        return session.receipt()

    for receipt in run_trio(trio, party):
        learned = receipt["learned"]
        for role in ("static owner", "helper"):
            assert [e["label"] for e in learned[role]] == ["repetition"]
        entries = {e["label"]: e for e in learned["moving owner"]}
        assert set(entries) == OPENED[reveal]
        for label, entry in entries.items():
            declared = DECLARATIONS[label]
            assert MOVING in declared.receivers
            assert len(declared.receivers) == 1
            assert entry["openings"] == 3
            assert entry["meaning"] == declared.meaning
            counts = {
                "joint_histogram": (16 + 1) * (16 - 4),
                "metric_gradient": 3 + 1,  # one more sum checks the others
                "metric_value": 1,
                "sample_count": 2,
            }
            assert entry["values"] == 3 * counts[label], label


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
@pytest.mark.parametrize("shape", [(9, 8, 7), (20, 17, 13)], ids=["1 block", "3"])
@EVERY_REVEAL
def test_bytes_and_rounds_of_an_evaluation_are_as_stated(
    trio, depth, reveal, shape, together
):
    static, moving = pair(shape)
    n, p = static.size, 3

    def rounds_and_bytes(times):
        rounds = depth(trio)
        for session in trio:
            session.new_run()
        run_trio(
            trio,
            lambda s: evaluate(
                s, reveal, static, moving, times=times, nbins=32, together=together
            ),
        )
        sent = {}
        for session in trio:
            for phase, count in session.ledger.sent_by_phase().items():
                sent[phase] = sent.get(phase, 0) + count
        return rounds(), sent

    before, _ = rounds_and_bytes(1)
    after, sent = rounds_and_bytes(3)
    opening = 2 * 8
    selected = 28 if reveal == "histogram" else 28 + 2 * 32
    assert sent["static image"] == 8 * 28 * n
    assert sent["gradient"] == 3 * (8 * (selected + 2 + p + 1) * n + opening * (p + 1))
    table, numbers = 8 * 33 * n, 32 * 28 + 32 + 28
    if reveal == "histogram":
        assert sent["histogram"] == 3 * (table + opening * 33 * 28)
        assert after - before == 2 * 5
    else:
        logarithms = numbers * (1687 + 32 + 128 + 1216 + 16)
        logarithms += 32 * 28 * (64 + 32)  # the weighted sum of the logarithms
        logarithms += 32 * 28 * 24  # their roundings
        logarithms += 2 * opening + 2 * 16  # two counts, the value
        assert sent["histogram"] == 3 * (table + logarithms)
        assert after - before == 2 * (10 if together else 11)
        assert f"{logarithms / 1e6:.1f} MB" == "3.1 MB"
    known, secret = 33 + 28 + 2 + 1, 33 + 2 * 32 + 28 + 2 + 1
    stated = " ".join(SecureMutualInformationMetric.__doc__.split())
    assert f"``8 * ({known} + p)`` per sample" in stated
    assert f"``8 * ({secret} + p)`` plus 3.1 MB" in stated
    assert 'with ``"histogram"``, in 5' in stated
    assert 'with ``"gradient"``, in 10.' in stated
    stated = " ".join(SecureParzenJointHistogram.__doc__.split())
    assert f"at most {known + 12}, in 5 rounds" in stated
    assert f"and {numbers} logarithms" in stated
    assert "in 10 rounds inside `undisturbed`, else 11" in stated


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("contributing", [8000, 100, 8])
def test_noise_of_a_gradient_is_mostly_blur(trio, contributing):
    """However few samples contribute: rounding alone would show what they are."""
    shape, rng = (20, 20, 20), np.random.default_rng(0)
    static, moving = rng.random(shape), rng.random(shape)
    field = np.zeros((static.size, 3))
    at = rng.choice(static.size, contributing, replace=False)
    field[at] = rng.normal(size=(contributing, 3))
    remote, times, scales = RemoteImage(shape), 40, []

    def party(session):
        h = SecureParzenJointHistogram(16, reveal="gradient", session=session)
        mine = {MOVING: (remote, moving), STATIC: (static, remote)}
        h.setup(*mine.get(session.pid, (remote, remote)))
        h.share_static(static.size, static if session.pid == STATIC else None)
        if session.pid != MOVING:
            return h.serve()
        inner = h._scales_shared

        def shared():
            scales.append(inner())
            return scales[-1]

        h._scales_shared = shared
        opened = []
        for _ in range(times):
            with h.undisturbed():
                h.update_pdfs_dense(remote, moving)
                arguments = remote, moving, np.eye(4), field.reshape(*shape, 3)
                h.update_gradient_dense(np.zeros(3), TRANSLATION, *arguments)
            opened.append(h.metric_gradient * h._valid * h.mdelta)
        h.end()
        return np.array(opened)

    off = run_trio(trio, party)[MOVING].std(axis=0)
    assert len(scales) == times
    last, _ = scales[-1]
    unit = 1 / (last.row * last.table * last.columns[:-1])
    blur = module.gradient_blur(static.size) * unit / np.sqrt(3)
    assert (off > 0.7 * blur).all() and (off < 2.5 * blur).all()


# -- sums that wrap ------------------------------------------------------------


def selection(static, moving):
    """What multiplies each sample's image gradient in the gradient of the metric."""
    h, *_ = clear(16, static, moving)
    with np.errstate(all="ignore"):
        ratio = np.log(h.joint / h.mmarginal)
    ratio[~np.isfinite(ratio)] = 0
    z = np.empty(static.size)
    for i, (s, m) in enumerate(zip(static.flat, moving.flat, strict=True)):
        row = ratio[h.bin_index(h.bin_normalize_static(s))]
        at = np.arange(16) - h.bin_normalize_moving(m)
        z[i] = cubic_spline_derivative(at) @ row
    return z.reshape(static.shape)


#: Bits beyond the proof with which the sums below wrap. With a histogram those that
#: are in use; with only a gradient the proven bound is too wide for a wrap.
WRAPPING = {"histogram": EXTRA_BITS, "gradient": 11}


@pytest.mark.usefixtures("fixed")
@pytest.mark.parametrize("columns", [(1, 0), (1, -1)], ids=["one", "opposite"])
@EVERY_REVEAL
def test_a_sum_that_wraps_is_noticed_and_repeated(trio, monkeypatch, reveal, columns):
    """Image gradients with which all samples pull the same way, or two ways."""
    monkeypatch.setattr(module, "EXTRA_BITS", WRAPPING[reveal])
    static, moving = pair((9, 8, 7))
    field = field_of(static.shape)
    sign = np.sign(selection(static, moving))
    field[..., :2] = sign[..., None] * columns
    arguments = np.zeros(3), TRANSLATION, np.eye(4), field
    *_, expected = clear(16, static, moving, arguments)

    def party(session):
        results = evaluate(session, reveal, static, moving, field=field, times=1)
        return results and results[0][1]

    # With more bits the blur is larger beside the sum that does not wrap.
    tolerance = TOLERANCE[reveal][1] * 2 ** (WRAPPING[reveal] - EXTRA_BITS)
    assert_close(run_trio(trio, party)[MOVING], expected, tolerance)
    opened = trio[MOVING].ledger.opened[MOVING, "metric_gradient"]
    assert opened.openings == 2

    def unchecked(histogram, sums):
        norm = histogram._valid * histogram.mdelta
        histogram.metric_gradient = -sums[:-1] / norm

    monkeypatch.setattr(SecureParzenJointHistogram, "_set_gradient", unchecked)
    wrong = run_trio(trio, party)[MOVING]
    assert np.abs(wrong - expected).max() > 0.1 * np.abs(expected).max()


@EVERY_REVEAL
def test_nothing_but_uniform_numbers_for_constant_like_images(trio, tap, reveal):
    """Two-valued images: every frame of many words still looks uniform."""
    static = np.zeros((20, 20, 10))
    static[0, 0, 0] = 1
    frames = tap(trio)
    run_trio(trio, lambda s: evaluate(s, reveal, static, static.copy(), times=1))
    big = [f for f in frames if f[2] == DATA and len(f[4]) >= 16000]
    assert big
    for sender, receiver, _, op, payload in big:
        words = np.frombuffer(payload, dtype=np.uint64)
        for shift in (0, 5):
            digits = words >> np.uint64(shift) & np.uint64(15)
            noise.check_uniform(digits, (sender, receiver, op))


def test_a_static_image_cannot_be_passed_in_a_session(trio):
    static, moving = pair((9, 8, 7))
    h = SecureParzenJointHistogram(16, session=trio[MOVING])
    h.setup(static, moving)
    with pytest.raises(ValueError, match="pass a RemoteImage in its place"):
        h.update_pdfs_dense(static, moving)


@pytest.mark.parametrize(
    "command",
    [
        3,
        7,
        255,
        CONTRACT,
        CONTRACT | (MAX_PARAMETERS + 1) << 8,
        CONTRACT | 1 << 40,
        TABLE | 1 << 8,
    ],
)
def test_unknown_commands_are_refused(trio, outcomes, command):
    static, moving = pair((9, 8, 7))

    def party(session):
        if session.pid == MOVING:
            h = SecureParzenJointHistogram(16, session=session)
            h.share_static(static.size)
            session.tell(command)
            return
        evaluate(session, "histogram", static, moving)

    errors = outcomes(trio, party, stop=False)
    for pid in (1, 2):
        assert isinstance(errors[pid], ProtocolError)
        assert errors[pid].culprit == MOVING


def test_command_words():
    assert len({END, TABLE, CONTRACT}) == 3
    largest = max(t.get_number_of_parameters() for t in regtransforms.values())
    assert largest <= MAX_PARAMETERS
