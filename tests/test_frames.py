"""Frames that move at random: coordinates, jitter, and what shows through it."""

from dipy.align.transforms import regtransforms
import numpy as np
from numpy.testing import assert_allclose
import pytest

from dipy_ppir.align import frames as module
from dipy_ppir.align import hidden, plan
from dipy_ppir.align.frames import GROUPS, Blur, Frame, nearest_parameters
from dipy_ppir.align.quasinewton import SIZE_PART

KINDS = [(kind, dim) for dim in (2, 3) for kind in GROUPS]


def grid2world(dim, seed):
    """Oblique, anisotropic, far from the origin."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = rotation * rng.uniform(0.8, 3, dim)
    matrix[:dim, dim] = rng.uniform(-900, 900, dim)
    return matrix


def frame(dim, seed=0):
    return Frame(
        (60, 50, 40)[:dim],
        grid2world(dim, seed),
        (40, 70, 50)[:dim],
        grid2world(dim, seed + 1),
    )


def in_ball(dim, count=20_000):
    """Points whose root mean square distance is the unit of normal coordinates."""
    rng = np.random.default_rng(5)
    points = rng.standard_normal((count, dim))
    points *= np.sqrt(dim) / np.linalg.norm(points, axis=1).mean() / np.sqrt(dim)
    points -= points.mean(axis=0)
    root = np.linalg.cholesky(np.cov(points.T, bias=True) * dim)
    return np.hstack([points @ np.linalg.inv(root).T, np.ones((count, 1))])


def start(dim, seed=9):
    """It turns and moves, and magnifies a little."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    matrix = np.eye(dim + 1)
    matrix[:dim, :dim] = 1.2 * rotation
    matrix[:dim, dim] = rng.uniform(-300, 300, dim)
    return matrix


@pytest.mark.parametrize("dim", [2, 3])
def test_normal_coordinates(dim):
    f, shape, matrix = frame(dim), (60, 50, 40)[:dim], grid2world(dim, 0)
    middle = matrix @ np.append((np.array(shape) - 1) / 2, 1)
    assert_allclose(f.to_normal @ middle, np.eye(dim + 1)[-1], atol=1e-9)
    distances = np.linalg.svd(f.to_normal[:dim, :dim], compute_uv=False)
    assert_allclose(distances * f.size, 1)
    # The unit is the smaller grid's, whichever of the two it is.
    shapes = {"a": (60, 50, 40)[:dim], "b": (12, 20, 10)[:dim]}
    sizes = {
        Frame(shapes[a], np.eye(dim + 1), shapes[b], np.eye(dim + 1)).size
        for a, b in ("ab", "ba", "bb")
    }
    assert len(sizes) == 1
    change = grid2world(dim, 7)
    to_normal, back = f.to_normal, np.linalg.inv(f.to_normal)
    assert_allclose(to_normal @ f.world(change) @ back, change, atol=1e-9)


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_directions(kind, dim):
    """What a generator does to a point, mm."""
    f = frame(dim)
    generators = f.generators(regtransforms[kind, dim])
    points = np.vstack([np.random.default_rng(1).uniform(-99, 99, (dim, 20)), [1] * 20])
    for generator, direction in zip(generators, f.directions(generators), strict=True):
        change = np.eye(dim + 1)
        change[:dim] += generator
        expected = (f.world(change) @ points - points)[:dim]
        assert_allclose(direction @ points, expected, atol=1e-8)


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_a_change_turns_steps(kind, dim):
    f = frame(dim)
    generators, change = f.generators(regtransforms[kind, dim]), f.draw()
    components = f.turned(change, generators)
    square = np.zeros((len(generators), dim + 1, dim + 1))
    square[:, :dim] = generators
    expected = (np.linalg.inv(change) @ square @ change)[:, :dim]
    assert_allclose(np.tensordot(components, f.affine, 1), expected, atol=1e-12)
    if kind == "AFFINE":
        nothing = f.turned(np.eye(dim + 1), generators)
        assert_allclose(nothing, np.eye(len(nothing)), atol=1e-9)


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_a_step_moves_every_object_alike(kind, dim):
    """Root mean square displacement, by each component alone and by all together."""
    directions = frame(dim).generators(regtransforms[kind, dim])
    points = in_ball(dim)
    steps = np.vstack([np.eye(len(directions)), np.ones(len(directions)) * 0.7])
    for step in steps:
        moved = points @ np.tensordot(step, directions, 1).T
        size = np.sqrt((moved**2).sum(axis=1).mean())
        assert_allclose(size, SIZE_PART * np.linalg.norm(step), rtol=1e-5)


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_steps_are_of_their_kind(kind, dim):
    """To first order, after a start a transform of that kind comes of one before it."""
    f, transform, first = frame(dim), regtransforms[kind, dim], start(dim)
    directions = f.generators(transform)
    step = np.random.default_rng(1).standard_normal(len(directions)) * 1e-3
    change = np.eye(dim + 1)
    change[:dim] += np.tensordot(step, directions, 1)
    params = nearest_parameters(transform, change[:dim], first, f)
    found = np.linalg.solve(first, transform.param_to_matrix(params) @ first)
    assert np.abs(found - f.world(change)).max() < 1e-5 * f.size
    assert np.abs(change - np.eye(dim + 1)).max() > 1e-6


@pytest.mark.parametrize(("kind", "dim"), KINDS)
def test_nearest_parameters(kind, dim):
    """Those of a change of that kind; of another one the nearest of some around."""
    f, transform, first = frame(dim), regtransforms[kind, dim], start(dim)
    rng = np.random.default_rng(2)
    params = transform.get_identity_parameters()
    params = params + rng.uniform(-0.2, 0.2, 12)[: len(params)]
    back = np.linalg.inv(f.to_normal)

    def before(params):
        matrix = transform.param_to_matrix(params)
        return (f.to_normal @ np.linalg.solve(first, matrix @ first) @ back)[:dim]

    change = before(params)
    found = nearest_parameters(transform, change, first, f)
    assert_allclose(before(found), change, atol=1e-6)
    other = change + rng.uniform(-0.05, 0.05, (dim, dim + 1))
    found = nearest_parameters(transform, other, first, f)

    def apart(params):
        points = in_ball(dim, 500) @ (before(params) - other).T
        return (points**2).sum()

    least = apart(found)
    for k in range(len(found)):
        for change in (1e-3, -1e-3):
            near = found.copy()
            near[k] += change
            assert apart(near) >= least * (1 - 1e-9)


@pytest.mark.parametrize("dim", [2, 3])
def test_jitter(dim):
    """It moves every direction of a step by as much as `Blur` says, in any order.

    Variances of 4,000 Gaussian numbers are within 20 % of theirs (9 sigma).
    """
    f = frame(dim)
    directions = f.affine.reshape(-1, dim * (dim + 1))
    drawn = np.array([(f.draw() - np.eye(dim + 1))[:dim].ravel() for _ in range(4000)])
    components = drawn @ np.linalg.pinv(directions)
    rigid_noise, noise = (Blur(dim)._hiding[k][1] for k in ("RIGID", "AFFINE"))
    rigid = f.generators(regtransforms["RIGID", dim]).reshape(-1, dim * (dim + 1))
    rigid, _ = np.linalg.qr((rigid @ np.linalg.pinv(directions)).T)
    strain = np.linalg.svd(rigid.T)[2][rigid.shape[1] :]
    for basis, least in ((rigid.T, rigid_noise), (strain, noise)):
        covariance = np.cov((components @ basis.T).T)
        eigenvalues = np.linalg.eigvalsh(covariance)
        assert eigenvalues.min() > 0.8 * least
    assert np.abs(components.mean(axis=0)).max() < 1.0


def test_no_frame_is_drawn_twice():
    f = frame(3)
    drawn = {f.draw().tobytes() for _ in range(100)}
    assert len(drawn) == 100


# -- what shows through ------------------------------------------------------------


def test_the_start_is_known():
    blur = Blur(3)
    assert blur.show("RIGID", 3.2) == 0
    assert blur.show("RIGID", 3.2) > 0


def test_a_step_is_as_long_as_its_level_lets_it_be():
    """Also the last one of a level, which the first look of the next one shows."""
    short, long = Blur(3), Blur(3)
    short.show("RIGID", 1.0)
    long.show("RIGID", 3.0)
    assert long.show("RIGID", 1.0) > 2 * short.show("RIGID", 1.0)


def test_what_was_affine_shows_as_such():
    """Rigid steps after it, too."""
    both, rigid = Blur(3), Blur(3)
    both.show("AFFINE", 1.0)
    rigid.show("RIGID", 1.0)
    assert both.show("RIGID", 1.0) > 1.2 * rigid.show("RIGID", 1.0)


def test_a_step_of_no_length_shows_only_what_is_left():
    """What is not known of a transform gets less with each look at it."""
    blur = Blur(3)
    blur.show("AFFINE", 3.0)
    blur.show("AFFINE", 0.0)
    shown = [blur.show("AFFINE", 0.0) for _ in range(5)]
    assert all(a > b for a, b in zip(shown, shown[1:], strict=False))


@pytest.mark.parametrize("kinds", [["RIGID", "AFFINE"], ["AFFINE", "RIGID"]])
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [0.3, 1, 3])
def test_a_mean_is_known_no_worse_than_a_step_says(kinds, levels, scale):
    """Of the root mean square of what is not known before the next look."""
    blur = Blur(3)
    for kind in kinds:
        most = [10**4] * levels
        counts = plan.evaluations(kind, levels, most, scale=scale, hidden=True)
        for level, count in enumerate(counts):
            longest, left = hidden.longest_step(level), []
            for _ in range(count):
                blur.show(kind, longest)
                left.append(np.sqrt(blur._unknown))
            if count:
                n = hidden.averaged(count)
                mean = (sum(left[-n:]) - left[-n] + longest) / n
                assert mean <= left[-1] + longest


@pytest.mark.parametrize("kind", ["TRANSLATION", "RIGID", "AFFINE"])
def test_the_bound_is_one(kind):
    """Against the information of steps of known covariance, step by step.

    Steps are Gaussian, all as long as may be and in whatever directions, correlated
    with what is not known or not: a Kalman filter's information is exact for them.
    """
    rng = np.random.default_rng(3)
    noise = np.repeat([module.MOVE**2 / 6, module.STRAIN**2 / 9], [6, 6])
    for _ in range(30):
        blur, longest = Blur(3), rng.uniform(0.5, 4)
        blur.show(kind, longest)
        left = np.zeros((12, 12))
        for _ in range(12):
            energy = rng.exponential(1, 12) ** rng.integers(1, 8)
            energy[{"TRANSLATION": 3, "RIGID": 6, "AFFINE": 12}[kind] :] = 0
            energy *= longest**2 / energy.sum()
            before = left + np.diag(energy)
            if rng.random() < 0.5:  # as far as what is not known goes the same way
                grown = np.sqrt(np.diag(left)) + np.sqrt(energy)
                before = np.diag(grown**2)
            whole = before + np.diag(noise)
            bits = (np.linalg.slogdet(whole)[1] - np.log(noise).sum()) / np.log(4)
            assert bits <= blur.show(kind, longest) * (1 + 1e-9)
            left = before - before @ np.linalg.solve(whole, before)
