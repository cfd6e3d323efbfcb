"""Registration of points: here, in sessions, and as a command."""

import json

from commands import script
import numpy as np
from parties import run_trio
import pytest
from sites import Launcher, PointSites

from dipy_ppir.align import RemotePoints, point_registration
from dipy_ppir.align.parameters import PointParameters
from dipy_ppir.align.plausibility import ImplausibleError, ImplausibleWarning
from dipy_ppir.align.points import (
    MISMATCH,
    UndeterminedError,
    centred,
    clear_registration,
    planned_bits,
    unit_of,
)
from dipy_ppir.mpc import local
from dipy_ppir.mpc.errors import (
    ParameterMismatchError,
    PeerError,
    ProtocolError,
    SessionFileError,
)
from dipy_ppir.mpc.ledger import DECLARATIONS, HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.sessionfile import SessionFile
from dipy_ppir.workflows import cli
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.operations import explain, template
from dipy_ppir.workflows.points import load_points
from dipy_ppir.workflows.receipts import receipt as check_receipts

PRECISION = 0.005


def pair(seed=1, dim=2, n=60, scale=1.0, noise=1.0, shift=40.0, size=20.0):
    """Moving and static points."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    turn[:, 0] *= np.sign(np.linalg.det(turn))
    moving = rng.standard_normal((n, dim)) * size * np.array([1, 0.5, 0.3])[:dim]
    static = scale * moving @ turn.T + shift * np.arange(1, dim + 1)
    return moving - shift, static + noise * rng.standard_normal(static.shape)


def apart(matrix, moving, other):
    """Root mean square of the distances of points that two transforms move."""
    difference = moving @ (matrix - other)[:-1, :-1].T + (matrix - other)[:-1, -1]
    return np.sqrt((difference**2).sum(axis=1).mean())


CASES = {
    "plane": {},
    "space": {"dim": 3},
    "scaled": {"scale": 1.3},
    "scaled in space": {"scale": 0.7, "dim": 3},
    "far from the origin": {"dim": 3, "shift": 3e6},
    "a point of each corner": {"n": 3, "dim": 3, "noise": 0.1},
    "two points": {"n": 2, "noise": 0.1},
    "many": {"n": 50_000, "dim": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_as_in_the_clear(case):
    moving, static = pair(**CASES[case])
    scaling = "scale" in CASES[case]
    moved, matrix, receipt = point_registration(
        moving, static, scaling=scaling, ret_receipt=True
    )
    clear = clear_registration(moving, static, scaling=scaling)
    assert apart(matrix, moving, clear) < PRECISION
    assert np.allclose(moved, moving @ matrix[:-1, :-1].T + matrix[:-1, -1])
    linear = matrix[:-1, :-1]
    scale = np.sqrt((linear**2).sum(axis=0))
    assert np.allclose(linear.T @ linear, scale[0] ** 2 * np.eye(len(linear)))
    assert np.linalg.det(linear) > 0 and (scaling or np.allclose(scale, 1))
    assert receipt["operation"] == "points" and not receipt["warnings"]
    assert receipt["parameters"]["points"] == len(moving)


def test_a_tiny_cloud_with_repeated_points():
    moving, static = pair(dim=3, size=1e-6, noise=1e-8, shift=1e-4)
    moving, static = (np.concatenate([x, x[:9], x[:1]]) for x in (moving, static))
    with pytest.raises(ValueError, match=r"too near.*precision = [\d.e-]+ at all"):
        point_registration(moving, static)
    _, matrix = point_registration(moving, static, precision=1e-9)
    clear = clear_registration(moving, static)
    assert apart(matrix, moving, clear) < 1e-9


def test_the_clear_twin_is_the_best_of_all():
    """No small turn, shift or scale is better."""
    moving, static = pair(dim=3, scale=1.2, noise=4.0)
    for scaling in (False, True):
        matrix = clear_registration(moving, static, scaling=scaling)

        def residual(matrix):
            moved = moving @ matrix[:-1, :-1].T + matrix[:-1, -1]
            return ((static - moved) ** 2).sum()

        rng, least = np.random.default_rng(2), residual(matrix)
        for _ in range(50):
            skew = rng.standard_normal((3, 3)) * 1e-3
            change = np.eye(4)
            change[:3, :3] += skew - skew.T
            change[:3, :3] = np.linalg.qr(change[:3, :3])[0]
            change[:3, :3] *= np.sign(np.diag(change[:3, :3]))
            change[:3, 3] = rng.standard_normal(3) * 0.01
            centre = np.eye(4)
            centre[:3, 3] = static.mean(axis=0)
            near = centre @ change @ np.linalg.inv(centre) @ matrix
            assert residual(near) > least
    sizes = [np.linalg.norm(x - x.mean(axis=0)) for x in (moving, static)]
    assert np.linalg.det(matrix[:3, :3]) == pytest.approx((sizes[1] / sizes[0]) ** 3)


def test_mirrored_points_are_not_mirrored_back():
    moving, static = pair(dim=3, noise=0.0)
    flat = moving * [1, 1, 0.02]
    matrix = clear_registration(flat, flat * [-1, 1, 1])
    assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1)
    _, found = point_registration(flat, flat * [-1, 1, 1])
    assert apart(found, flat, matrix) < PRECISION
    with pytest.raises(UndeterminedError, match="mirrored"):
        point_registration(moving, np.random.default_rng(1).permutation(static))


# -- what is refused before anything is sent -----------------------------------

LINE = np.outer(np.arange(9.0), [1, 2, 3])
REFUSED = {
    "one point": (np.ones((1, 2)), {}, "are 1, and a rotation in 2D needs 2"),
    "two in space": (np.eye(3)[:2] * 9, {}, "are 2, and a rotation in 3D needs 3"),
    "a line": (LINE, {}, "lie on a line"),
    "one place": (np.full((5, 3), 7.3), {}, "all lie in one place"),
    "NaN": (np.vstack([LINE, [0, np.nan, 1]]), {}, "NaN or infinity, first at point 9"),
    "infinity": (np.vstack([[np.inf, 1, 0], LINE]), {}, "first at point 0"),
    "too far": (pair(dim=3)[0] + 1e13, {}, "too far for precision"),
    "too large": (pair(dim=3)[0] * 1e5, {}, "too far for precision = 0.005; give"),
    "too small": (pair(dim=3)[0] * 1e-3, {}, "too near for precision = 0.005; give"),
    "four coordinates": (np.eye(4), {}, r"shape \(4, 4\); give one point a row"),
    "a row": (np.arange(4.0), {}, "give one point a row"),
    "complex": (pair()[0] * 1j, {}, "must be real numbers"),
    "a file": ("points.txt", {}, "read a text file with numpy.loadtxt"),
    "precision": (pair()[0], {"precision": 0.0}, "precision must be a length in mm"),
    "result_to": (pair()[0], {"result_to": "all"}, "result_to must be one of"),
    "scaling": (pair()[0], {"scaling": 1}, "scaling must be True or False"),
}


@pytest.mark.parametrize("which", ["moving", "static"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_owner_before_anything_is_sent(monkeypatch, case, which):
    points, options, words = REFUSED[case]
    monkeypatch.setattr(local, "run_locally", lambda *_, **__: pytest.fail("started"))
    dim = np.shape(points)[-1] if np.shape(points) in ((9, 3),) else 3
    given = {"moving": pair(dim=dim)[0], "static": pair(dim=dim)[1], which: points}
    with pytest.raises(ValueError, match=words) as caught:
        point_registration(**given, **options)
    assert options or f"the {which} points" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", ["least", "most"])
def test_the_precision_that_is_advised_is_accepted(factor):
    points = pair(dim=3)[0] * {"least": 1e-4, "most": 1e6}[factor]
    with pytest.raises(ValueError, match="give precision") as caught:
        centred(points, PRECISION, "moving")
    advised = float(str(caught.value).split("give precision = ")[1].split()[0])
    assert centred(points, advised, "moving").size > 0
    assert unit_of(advised, 3) * np.sqrt(3) <= advised


def test_different_numbers_are_refused(monkeypatch):
    moving, static = pair(dim=3)
    monkeypatch.setattr(local, "run_locally", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ValueError, match="60 moving points and 59 static ones"):
        point_registration(moving, static[:-1])
    with pytest.raises(ValueError, match="have 3 coordinates and the static ones 2"):
        point_registration(moving, static[:, :2])
    for remote in ("remote", RemotePoints(60, 3)):
        with pytest.raises(ValueError, match="need a session"):
            point_registration(moving, remote)


# -- in a session --------------------------------------------------------------


def party(session, moving, static, remote="remote", **options):
    points = {"moving": remote, "static": remote}
    points |= {MOVING: {"moving": moving}, STATIC: {"static": static}}.get(
        session.pid, {}
    )
    return point_registration(**points, session=session, ret_receipt=True, **options)


@pytest.mark.parametrize("scaling", [False, True])
@pytest.mark.parametrize("result_to", ["both", "moving", "static"])
def test_who_gets_what(trio, result_to, scaling):
    moving, static = pair(dim=3, scale=1.1)
    results = run_trio(
        trio, lambda s: party(s, moving, static, result_to=result_to, scaling=scaling)
    )
    gets = {"both": {MOVING, STATIC}, "moving": {MOVING}, "static": {STATIC}}[result_to]
    clear = clear_registration(moving, static, scaling=scaling)
    for pid, (moved, matrix, receipt) in enumerate(results):
        assert (matrix is not None) == (pid in gets)
        assert (moved is not None) == (pid in gets and pid == MOVING)
        assert ("transform" in receipt) == (pid in gets)
        if matrix is not None:
            assert apart(matrix, moving, clear) < PRECISION
            assert np.array_equal(matrix, results[min(gets)][1])
        labels = {"rotation", "centroid"} | ({"size_ratio"} if scaling else set())
        for role in (MOVING, STATIC, HELPER):
            learned = {e["label"]: e for e in receipt["learned"][ROLES[role]]}
            shown = labels if role in gets else set()
            assert set(learned) == {"alike", "steady"} | shown
            for label, entry in learned.items():
                most = DECLARATIONS[label].bits
                assert entry["bits"] == pytest.approx(
                    most * entry["values"], abs=0.2 * entry["values"]
                )
        assert (
            set(receipt["arrays"])
            == {
                MOVING: {"moving points"},
                STATIC: {"static points"},
                HELPER: set(),
            }[pid]
        )


def test_remote_points_must_be_as_many_as_there_are(trio, outcomes):
    moving, static = pair(dim=3)
    results = run_trio(
        trio, lambda s: party(s, moving, static, remote=RemotePoints(60, 3))
    )
    assert results[MOVING][1] is not None
    wrong = RemotePoints(61, 3)
    for outcome in outcomes(trio, lambda s: party(s, moving, static, remote=wrong)):
        assert isinstance(outcome, (ValueError, PeerError))
    with pytest.raises(TypeError, match="belong to another party"):
        np.asarray(wrong)
    with pytest.raises(ValueError, match="remote points are 1 or more"):
        RemotePoints(5, 4)


def test_unequal_numbers_are_refused_by_all_before_a_share_is_sent(trio, outcomes, tap):
    moving, static = pair(dim=3)
    frames = tap(trio)
    all_of_them = outcomes(trio, lambda s: party(s, moving, static[:-1]), stop=False)
    for outcome in all_of_them:
        assert "60 moving points and 59 static ones" in str(outcome)
    # Only what the parties tell each other of their numbers.
    assert len(frames) == 6 and all(len(f[4]) < 100 for f in frames)


@pytest.mark.parametrize(
    "lie", [[0, 2], [60, 4], ["60", 3], [2**40, 3], "many", None, [60], [2, 3]]
)
def test_a_party_that_describes_impossible_points_is_named(
    trio, outcomes, monkeypatch, lie
):
    moving, static = pair(dim=3)
    tell = trio[MOVING].exchange

    def lying(name, obj):
        views = tell(name, {"moving": lie} if name == "points" else obj)
        return {**views, MOVING: obj}

    monkeypatch.setattr(trio[MOVING], "exchange", lying)
    results = outcomes(trio, lambda s: party(s, moving, static))
    # Who sees it second may have been told by the first.
    assert all(isinstance(results[pid], PeerError) for pid in (STATIC, HELPER))
    seen = [r for r in results if isinstance(r, ProtocolError)]
    assert seen and all(r.culprit == MOVING for r in seen)


def test_a_party_in_another_role(trio, outcomes):
    moving, static = pair()
    swapped = outcomes(
        trio,
        lambda s: point_registration(
            "remote" if s.pid == MOVING else moving,
            static if s.pid == MOVING else "remote",
            session=s,
        ),
    )
    assert "must be an array" in str(swapped[MOVING])


def test_too_many_points_for_the_session(trio, outcomes, monkeypatch):
    moving, static = pair()
    limits = {"memory": 1.0, "voxels": 59}
    monkeypatch.setattr(type(trio[0]), "limits", limits)
    results = outcomes(trio, lambda s: party(s, moving, static))
    assert "60, more than the 59" in str(results[MOVING])
    assert not any(s.ledger.opened for s in trio)


def test_more_memory_than_was_agreed(trio, outcomes, monkeypatch):
    """Said by all three, who know how many points there are."""
    moving, static = pair()
    limits = {"memory": 7e-6, "voxels": 60}
    monkeypatch.setattr(type(trio[0]), "limits", limits)
    for result in outcomes(trio, lambda s: party(s, moving, static), stop=False):
        assert "60 points needs about" in str(result)
    assert not any(s.ledger.opened for s in trio)


# -- results that are not plausible ----------------------------------------------


def test_points_that_hardly_match():
    moving, static = pair(noise=9.0)
    with pytest.warns(ImplausibleWarning, match="half a set's radius"):
        _, matrix, receipt = point_registration(moving, static, ret_receipt=True)
    assert receipt["warnings"] == [MISMATCH] and matrix is not None
    with pytest.raises(ImplausibleError, match="half a set's radius"):
        point_registration(moving, static, strict=True)
    # Of another size, where sizes count.
    moving, static = pair(scale=1.7, noise=0.1)
    with pytest.warns(ImplausibleWarning, match="same units"):
        point_registration(moving, static)
    with pytest.warns(ImplausibleWarning, match="scales by 1.7"):
        point_registration(moving, static, scaling=True)


@pytest.mark.parametrize(
    ("dim", "points", "words"),
    [
        (2, {}, "no rotation brings"),
        (3, {}, "no rotation brings"),
        (3, {"noise": 0.0}, "another rotation fits"),
    ],
)
def test_what_has_no_rotation_opens_nothing_else(trio, dim, points, words):
    moving, static = pair(dim=dim, **points)
    if points:
        # A rod, of which the owners' own sets show as much thickness as they must.
        moving = np.outer(np.linspace(-50, 50, 60), [1, 0, 0])
        rng = np.random.default_rng(1)
        static, moving = (moving + rng.normal(0, 1.1, (60, 3)) for _ in range(2))
    else:
        static = np.random.default_rng(1).permutation(static)

    def run(session):
        try:
            return party(session, moving, static)[-1]
        except UndeterminedError as exc:
            assert words in str(exc)
            return exc.receipt

    receipts = run_trio(trio, run)
    for pid, receipt in enumerate(receipts):
        labels = {e["label"] for v in receipt["learned"].values() for e in v}
        assert labels == {"alike", "steady"} if dim == 3 else {"alike"}
        assert any(words in w for w in receipt["warnings"]) == (pid != HELPER)
    assert all(not s.network.closed for s in trio)


# -- files -------------------------------------------------------------------------

TEXTS = {
    "blanks": "# a comment\n1 2\n\n3 4.5 # here too\n-5\t6e0\n",
    "commas": "1,2\n3, 4.5\n-5 ,6\n",
    "a mark at the beginning": "\ufeff1 2\n3 4.5\n-5 6\n",
    "Windows": "1 2\r\n3 4.5\r\n-5 6\r\n",
}


@pytest.mark.parametrize("text", TEXTS)
def test_text_files(tmp_path, text):
    file = tmp_path / "points.txt"
    file.write_bytes(TEXTS[text].encode())
    wanted = [[1, 2], [3, 4.5], [-5, 6]]
    assert load_points(file, "moving", PRECISION).tolist() == wanted
    np.save(tmp_path / "points.npy", wanted)
    found = load_points(tmp_path / "points.npy", "moving", PRECISION)
    assert found.tolist() == wanted


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"x y\n1 2\n", "line 1: 'x' is no number"),
        (b"1 2\n# no\n3 4 5\n", "line 3: 3 coordinates, but 2 in the lines before"),
        (b"1 2\n3 4;\n", "line 2: '4;' is no number"),
        (b"# nothing\n", "are empty"),
        (b"\xff\xfe1\x00", "are no text"),
        (b"1 2 3\n2 4 6\n3 6 9\n", "lie on a line"),
        (b"1 2\nnan 3\n", "NaN or infinity, first at point 1"),
        (b"1 2\n", "needs 2"),
        (b"1 2 3 4\n5 6 7 8\n", "2 or 3 coordinates"),
        (None, "do not exist"),
    ],
)
def test_mistakes_in_files_name_file_and_line(tmp_path, content, words):
    file = tmp_path / "points.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_points(file, "static", PRECISION)
    text = str(caught.value)
    assert str(file) in text and "the static points" in text and "\n" not in text


def test_arrays_that_are_none(tmp_path):
    for name, content in (("a.npy", b"1 2\n3 4\n"), ("b.npy", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="numpy.save"):
            load_points(tmp_path / name, "moving", PRECISION)
    with pytest.raises(InputError, match="are a folder"):
        load_points(tmp_path, "moving", PRECISION)


# -- the command -------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    moving, static = pair(dim=3)
    np.savetxt(tmp_path / "moving.txt", moving)
    np.savetxt(tmp_path / "static.csv", static, delimiter=",")
    return tmp_path, moving, static


def command(monkeypatch, *words):
    """Run the command in this process; its exit status."""
    name = "dipy_ppir_align_points"
    monkeypatch.setattr("sys.argv", [name, *map(str, words)])
    return cli.run(name)


def test_the_command_is_installed():
    assert script("dipy_ppir_align_points") != "dipy_ppir_align_points"
    assert callable(cli.align_points)


def test_the_command_writes_both_matrices_and_the_moved_points(monkeypatch, files):
    folder, moving, static = files
    pair = folder / "static.csv", folder / "moving.txt"
    out = folder / "out"
    assert command(monkeypatch, *pair, "--out_dir", out) == 0
    matrix = np.loadtxt(out / "moving_to_static.txt")
    assert "moving points to static" in (out / "moving_to_static.txt").read_text()
    assert np.allclose(np.loadtxt(out / "affine.txt") @ matrix, np.eye(4))
    assert apart(matrix, moving, clear_registration(moving, static)) < PRECISION
    moved = np.loadtxt(out / "moved_points.txt")
    assert np.allclose(moved, moving @ matrix[:3, :3].T + matrix[:3, 3], atol=1e-9)
    receipt = json.loads((out / "receipt.json").read_text())
    assert set(receipt["files"]) == {"static points", "moving points"}
    # Not without --force.
    assert command(monkeypatch, *pair, "--out_dir", out) == 1
    more = "--scaling", "--out_moved", "moved.npy", "--precision", "0.1"
    assert command(monkeypatch, *pair, "--out_dir", folder / "more", *more) == 0
    assert np.load(folder / "more" / "moved.npy").shape == moving.shape


def test_what_the_command_refuses(monkeypatch, files, capsys):
    folder, moving, static = files
    static_file, moving_file = folder / "static.csv", folder / "moving.txt"
    np.savetxt(folder / "fewer.txt", moving[:-1])
    np.savetxt(folder / "far.txt", np.random.default_rng(1).permutation(moving))
    np.savetxt(
        folder / "noisy.txt",
        moving + np.random.default_rng(1).normal(0, 9, moving.shape),
    )
    for words, text in (
        ((static_file, folder / "none.txt"), "do not exist"),
        ((static_file, folder / "fewer.txt"), "59 moving points and 60 static"),
        ((static_file, "remote"), "give the session file with --session"),
        ((static_file, moving_file, "--resume"), "leave it out"),
        ((static_file, moving_file, "--precision", "-1"), "--precision must be"),
        ((static_file, moving_file, "--out_matrix", ""), "--out_matrix is empty"),
        (
            (static_file, moving_file, "--limit_bits", "9"),
            "is for an owner in a session",
        ),
    ):
        out = folder / "refused"
        assert command(monkeypatch, *words, "--out_dir", out) == 1
        assert text in capsys.readouterr().err
        assert not out.exists()
    # What was learned stays on record.
    for name, words, text in (
        ("far.txt", (), "no rotation brings"),
        ("noisy.txt", ("--strict",), "not plausible, and strict"),
    ):
        out = folder / f"out_{name}"
        pair = static_file, folder / name
        assert command(monkeypatch, *pair, "--out_dir", out, *words) == 1
        assert text in capsys.readouterr().err
        assert [f.name for f in out.iterdir()] == ["receipt.json"]


# -- between sites -------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def launcher():
    with Launcher():
        yield


def test_three_sites(tmp_path):
    """Real processes over TLS: what one machine would find, and its receipts."""
    moving, static = pair(dim=3)
    sites = PointSites(tmp_path, moving, static, parameters={"precision": 0.01})
    sites.run()
    results = ["affine.txt", "moving_to_static.txt", "receipt.json"]
    assert sites.outputs("static") == results
    assert sites.outputs("moving") == sorted([*results, "moved_points.txt"])
    assert sites.outputs("helper") == ["receipt.json"]
    texts = [
        (tmp_path / f"out_{site}" / "moving_to_static.txt").read_text()
        for site in ("moving", "static")
    ]
    assert texts[0] == texts[1]
    matrix = np.loadtxt(texts[0].splitlines())
    assert apart(matrix, moving, clear_registration(moving, static)) < 0.01
    receipts = [
        json.loads((tmp_path / f"out_{site}" / "receipt.json").read_text())
        for site in ("moving", "static", "helper")
    ]
    assert len({r["run"] for r in receipts}) == 1
    assert not any(r["warnings"] for r in receipts)
    files = [str(f) for f in sorted(tmp_path.glob("out_*/receipt.json"))]
    assert len(files) == 3 and not check_receipts(files)


def test_each_owner_counts_what_is_opened_about_its_points(tmp_path):
    """In all sessions; what has no rotation counts for less, as does no result."""
    moving, static = pair(dim=3)
    sites = PointSites(tmp_path, moving, static)
    keys = {n: tmp_path / "keys" / n / "opened.json" for n in ("moving", "static")}

    def counted():
        return {n: sum(json.loads(f.read_text()).values()) for n, f in keys.items()}

    sites.run()
    receipt = json.loads((tmp_path / "out_static" / "receipt.json").read_text())
    first = counted()
    assert first["static"] == pytest.approx(receipt["bits"]["moving owner"], abs=0.2)
    planned = planned_bits(PointParameters(), 3, "static")
    assert first["moving"] == pytest.approx(planned, abs=1)
    limit = "--force", "--limit_bits", str(round(1.5 * planned))
    for site in keys:
        assert sites.wait(sites.start(*limit, sites=[site])) == {site: 1}
        assert "over the limit" in sites.last_line(site)
    sites.file = sites.write("less.toml", result_to="moving")
    sites.run("--force")
    more = {n: counted()[n] - first[n] for n in keys}
    assert more["static"] == pytest.approx(first["static"], abs=0.2)
    assert more["moving"] == pytest.approx(2.6, abs=0.2)
    few = planned_bits(PointParameters(result_to="moving"), 3, "static")
    assert few == pytest.approx(2.6, abs=0.1)


def test_three_sites_without_a_rotation(tmp_path):
    moving, static = pair(dim=3)
    static = np.random.default_rng(1).permutation(static)
    sites = PointSites(tmp_path, moving, static)
    statuses = sites.wait(sites.start())
    assert statuses == {"moving": 1, "static": 1, "helper": 0}
    for site in ("moving", "static", "helper"):
        assert sites.outputs(site) == ["receipt.json"]
    assert "no rotation brings" in sites.last_line("moving")


def test_what_a_site_refuses_before_it_connects(tmp_path):
    moving, static = pair(dim=3)
    sites = PointSites(tmp_path, moving, static)
    for site, extra, text in (
        ("moving", ["--resume"], "nothing is kept that could be resumed"),
        ("helper", ["--resume"], "nothing is kept that could be resumed"),
        ("static", ["--scaling"], "--scaling is settled by the session file"),
    ):
        statuses = sites.wait(sites.start(*extra, sites=[site]))
        assert statuses == {site: 1} and text in sites.last_line(site)
        assert sites.outputs(site) == []
    np.savetxt(tmp_path / "static.txt", LINE)
    assert sites.wait(sites.start(sites=["static"])) == {"static": 1}
    assert "lie on a line" in sites.last_line("static")


def test_a_session_file_is_explained_and_kept_to(tmp_path, trio):
    moving, static = pair(dim=3)
    sites = PointSites(tmp_path, moving, static, parameters={"scaling": True})
    plan = SessionFile.read(sites.file)
    text = explain(plan)
    for words in ("a rigid registration of corresponding points", "(size_ratio)"):
        assert words in text
    assert "scaling = True" in text and "precision = 0.005 (by default)" in text
    assert "image" not in text
    sites.parameters = {}
    assert "size_ratio" not in explain(SessionFile.read(sites.write("plain.toml")))
    sites.parameters = {"radius": 4}
    with pytest.raises(SessionFileError, match="no entry 'radius'.*scaling, precision"):
        explain(SessionFile.read(sites.write("other.toml")))
    assert 'operation = "points"' in template("points")
    trio[MOVING].plan = plan
    with pytest.raises(ParameterMismatchError, match="scaling is True by the session"):
        point_registration(moving, "remote", session=trio[MOVING])
