"""The secure histogram, and the gradient of its metric, against DIPY's."""

from dipy.align.parzenhist import ParzenJointHistogram, compute_parzen_mi
from dipy.align.transforms import regtransforms
import numpy as np
import pytest
from scipy import stats

from dipy_ppir.align import RemoteImage
from dipy_ppir.align.parzenhist import (
    CONTRACT,
    END,
    MAX_PARAMETERS,
    TABLE,
    SecureParzenJointHistogram,
    linear_jacobian,
)
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.ledger import DECLARATIONS, MOVING, STATIC
from dipy_ppir.mpc.session import run_trio
from dipy_ppir.mpc.transport import DATA

TRANSFORMS = sorted(regtransforms)
EVERY_TRANSFORM = pytest.mark.parametrize("ttype", TRANSFORMS, ids=lambda t: f"{t[0]}{t[1]}")
EVERY_REVEAL = pytest.mark.parametrize("reveal", ["histogram", "gradient"])
EVERY_MASK = pytest.mark.parametrize("masks", ["none", "static", "moving", "both"])

#: Stated tolerances, relative: of the value and of the gradient's largest part.
TOLERANCE = {"histogram": (1e-6, 1e-5), "gradient": (1e-5, 1e-3)}


def pair(shape, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    static = rng.random(shape) * 50 + offset
    moving = np.sqrt(static) + 0.3 * rng.random(shape)
    return static, moving


def masks_of(kind, shape, seed=9):
    rng = np.random.default_rng(seed)
    static = (rng.random(shape) < 0.7).astype(np.int32) if kind in ("static", "both") else None
    moving = (rng.random(shape) < 0.8).astype(np.int32) if kind in ("moving", "both") else None
    return {"smask": static, "mmask": moving}


def off_identity(transform):
    n = transform.get_number_of_parameters()
    return transform.get_identity_parameters() + 0.05 * np.arange(1, n + 1) / n


def clear(nbins, static, moving, *, masks=None, gradient=None):
    """DIPY's histogram, metric and gradient."""
    masks = masks or {"smask": None, "mmask": None}
    h = ParzenJointHistogram(nbins)
    h.setup(static, moving, **masks)
    h.update_pdfs_dense(static, moving, **masks)
    if gradient is None:
        return h, compute_parzen_mi(h.joint, h.joint_grad, h.smarginal, h.mmarginal, None), None
    theta, transform, grid2world, field = gradient
    h.update_gradient_dense(theta, transform, static, moving, grid2world, field, **masks)
    out = np.empty(len(theta))
    value = compute_parzen_mi(h.joint, h.joint_grad, h.smarginal, h.mmarginal, out)
    return h, value, out


def assert_close(actual, expected, relative):
    scale = np.abs(expected).max()
    assert np.abs(actual - expected).max() <= relative * scale, (actual, expected)


@pytest.mark.parametrize("nbins", [6, 7, 16, 32])
@pytest.mark.parametrize("shape", [(17, 15), (9, 8, 7)], ids=["2D", "3D"])
@EVERY_MASK
def test_densities(nbins, shape, masks):
    static, moving = pair(shape)
    masks = masks_of(masks, shape)
    expected, value, _ = clear(nbins, static, moving, masks=masks)
    h = SecureParzenJointHistogram(nbins)
    h.setup(static, moving, **masks)
    h.update_pdfs_dense(static, moving, **masks)
    for name in ("joint", "smarginal", "mmarginal"):
        assert np.abs(getattr(h, name) - getattr(expected, name)).max() < 1e-9, name
    assert h.metric_value == pytest.approx(value, rel=1e-6)
    h.end()


def test_sparse_densities():
    static, moving = pair((400,))
    expected = ParzenJointHistogram(20)
    expected.setup(static, moving)
    expected.update_pdfs_sparse(static, moving)
    h = SecureParzenJointHistogram(20)
    h.setup(static, moving)
    h.update_pdfs_sparse(static, moving)
    assert np.abs(h.joint - expected.joint).max() < 1e-9
    h.end()


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
    _, value, expected = clear(16, static, moving, gradient=gradient)
    h = SecureParzenJointHistogram(16, reveal=reveal)
    h.setup(static, moving)
    h.update_pdfs_dense(static, moving)
    theta, *rest = gradient
    h.update_gradient_dense(theta, rest[0], static, moving, rest[1], field)
    h.end()
    assert h.metric_value == pytest.approx(value, rel=TOLERANCE[reveal][0])
    assert_close(h.metric_gradient, expected, TOLERANCE[reveal][1])
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
    theta = off_identity(transform)
    gradient = theta, transform, np.eye(dim + 1), field
    _, value, expected = clear(16, static, moving, masks=masks, gradient=gradient)
    h = SecureParzenJointHistogram(16, reveal=reveal)
    h.setup(static, moving, **masks)
    h.update_pdfs_dense(static, moving, **masks)
    h.update_gradient_dense(
        theta, transform, static, moving, np.eye(dim + 1), field, **masks
    )
    h.end()
    assert h.metric_value == pytest.approx(value, rel=TOLERANCE[reveal][0], abs=1e-6)
    assert_close(h.metric_gradient, expected, TOLERANCE[reveal][1])


@EVERY_TRANSFORM
@EVERY_REVEAL
def test_sparse_gradient(ttype, reveal):
    transform, dim = regtransforms[ttype], ttype[1]
    n = 500
    static, moving = pair((n,))
    rng = np.random.default_rng(5)
    points, field = rng.uniform(-20, 20, (n, dim)), rng.normal(size=(n, dim))
    theta = off_identity(transform)
    expected = ParzenJointHistogram(16)
    expected.setup(static, moving)
    expected.update_pdfs_sparse(static, moving)
    expected.update_gradient_sparse(theta, transform, static, moving, points, field)
    gradient = np.empty(len(theta))
    value = compute_parzen_mi(
        expected.joint, expected.joint_grad, expected.smarginal, expected.mmarginal, gradient
    )
    h = SecureParzenJointHistogram(16, reveal=reveal)
    h.setup(static, moving)
    h.update_pdfs_sparse(static, moving)
    h.update_gradient_sparse(theta, transform, static, moving, points, field)
    h.end()
    assert h.metric_value == pytest.approx(value, rel=TOLERANCE[reveal][0])
    assert_close(h.metric_gradient, gradient, TOLERANCE[reveal][1])


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
    theta = off_identity(transform)
    field = steep * np.random.default_rng(4).normal(size=(9, 8, 7, 3))
    field[2, 2, 2] *= 100
    gradient = theta, transform, np.eye(4), field
    _, value, expected = clear(16, static, moving, gradient=gradient)
    h = SecureParzenJointHistogram(16, reveal=reveal)
    h.setup(static, moving)
    h.update_pdfs_dense(static, moving)
    h.update_gradient_dense(theta, transform, static, moving, np.eye(4), field)
    h.end()
    assert h.metric_value == pytest.approx(value, rel=1e-4, abs=2e-6)
    # where the terms nearly cancel, what is lost is relative to the terms
    terms = np.abs(field).sum() / (static.size * h.mdelta) * 10
    error = np.abs(h.metric_gradient - expected).max()
    assert error <= max(1e-5 * np.abs(expected).max(), 2e-5 * terms)


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
    theta, field = np.zeros(dim), np.random.default_rng(4).normal(size=(*shape, dim))
    expected = ParzenJointHistogram(16)
    expected.setup(static, moving)
    expected.update_pdfs_dense(static, sampled)
    expected.update_gradient_dense(theta, transform, static, sampled, np.eye(dim + 1), field)
    gradient = np.empty(dim)
    value = compute_parzen_mi(
        expected.joint, expected.joint_grad, expected.smarginal, expected.mmarginal, gradient
    )
    h = SecureParzenJointHistogram(16, reveal=reveal)
    h.setup(static, moving)
    h.update_pdfs_dense(static, sampled)
    h.update_gradient_dense(theta, transform, static, sampled, np.eye(dim + 1), field)
    h.end()
    assert_close(h.metric_gradient, gradient, TOLERANCE[reveal][1])
    assert h.metric_value == pytest.approx(value, rel=1e-5)
    if reveal == "histogram":
        assert np.abs(h.joint - expected.joint).max() < 1e-9


def test_nothing_in_both_masks():
    static, moving = pair((9, 8, 7))
    left = np.zeros(static.shape, dtype=np.int32)
    left[:4] = 1
    for reveal in ("histogram", "gradient"):
        h = SecureParzenJointHistogram(16, reveal=reveal)
        h.setup(static, moving)
        h.update_pdfs_dense(static, moving, smask=left, mmask=1 - left)
        h.update_gradient_dense(
            np.zeros(3), regtransforms["TRANSLATION", 3], static, moving, np.eye(4),
            np.ones((9, 8, 7, 3)), smask=left, mmask=1 - left,
        )
        h.end()
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


def evaluate(session, reveal, static, moving, *, mask=None, times=2, nbins=16):
    """One party's program: the static image at its owner, the moving at its own."""
    h = SecureParzenJointHistogram(nbins, reveal=reveal, session=session)
    remote = RemoteImage(static.shape)
    here = {
        MOVING: (remote, moving),
        STATIC: (static, remote),
    }.get(session.pid, (remote, remote))
    h.setup(*here)
    mine = (static, mask) if session.pid == STATIC else (None, None)
    h.share_static(static.size, *mine)
    if session.pid != MOVING:
        h.serve()
        return None
    transform = regtransforms["TRANSLATION", 3]
    field = np.random.default_rng(4).normal(size=(*moving.shape, 3))
    results = []
    for _ in range(times):
        h.update_pdfs_dense(remote, moving)
        h.update_gradient_dense(np.zeros(3), transform, remote, moving, np.eye(4), field)
        results.append((h.metric_value, np.array(h.metric_gradient)))
    h.end()
    return results


@EVERY_REVEAL
def test_parties_in_a_session(trio, reveal):
    static, moving = pair((9, 8, 7))
    results = run_trio(trio, evaluate, reveal, static, moving)
    field = np.random.default_rng(4).normal(size=(9, 8, 7, 3))
    transform = regtransforms["TRANSLATION", 3]
    _, value, gradient = clear(16, static, moving, gradient=(np.zeros(3), transform, np.eye(4), field))
    assert results[1:] == [None, None]
    for got in results[MOVING]:
        assert got[0] == pytest.approx(value, rel=TOLERANCE[reveal][0])
        assert_close(got[1], gradient, TOLERANCE[reveal][1])


OPENED = {
    "histogram": {"joint_histogram", "metric_gradient"},
    "gradient": {"metric_value", "metric_gradient", "sample_count"},
}


@EVERY_REVEAL
def test_what_is_opened_is_what_is_declared(trio, reveal):
    static, moving = pair((9, 8, 7))

    def party(session):
        evaluate(session, reveal, static, moving, times=3)
        return session.receipt()

    for receipt in run_trio(trio, party):
        learned = receipt["learned"]
        assert learned["static owner"] == learned["helper"] == []
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
                # With a known histogram one more sum checks the others.
                "metric_gradient": 3 + (reveal == "histogram"),
                "metric_value": 1,
                "sample_count": 2,
            }
            assert entry["values"] == 3 * counts[label], label


def test_bytes_of_an_evaluation_are_as_stated(trio):
    """8 (64 + p) bytes a sample with 32 bins, 8 * 28 once a level."""
    static, moving = pair((9, 8, 7))

    def party(session):
        evaluate(session, "histogram", static, moving, times=1, nbins=32)
        return session.ledger.sent_by_phase(), session.ledger.rounds

    results = run_trio(trio, party)
    sent = {}
    for phases, _ in results:
        for phase, count in phases.items():
            sent[phase] = sent.get(phase, 0) + count
    n, p, opening = static.size, 3, 2 * 8
    assert sent["static image"] == 8 * 28 * n
    assert sent["histogram"] == 8 * 33 * n + opening * 33 * 28
    assert sent["gradient"] == 8 * (28 + 2 + p + 1) * n + opening * (p + 1)
    assert 33 + 28 + 2 + 12 + 1 <= 80


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
        for part in (words & np.uint64(15), words >> np.uint64(5) & np.uint64(15)):
            counts = np.bincount(part.astype(np.int64), minlength=16)
            assert stats.chisquare(counts).pvalue > 1e-8, (sender, receiver, op)


def test_a_static_image_cannot_be_passed_in_a_session(trio):
    static, moving = pair((9, 8, 7))
    h = SecureParzenJointHistogram(16, session=trio[MOVING])
    h.setup(static, moving)
    with pytest.raises(ValueError, match="pass a RemoteImage in its place"):
        h.update_pdfs_dense(static, moving)


@pytest.mark.parametrize("command", [3, 7, 255, CONTRACT, CONTRACT | (MAX_PARAMETERS + 1) << 8,
                                     CONTRACT | 1 << 40, TABLE | 1 << 8])
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
