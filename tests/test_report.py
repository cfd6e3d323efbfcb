"""The page about a registration: what it shows, of whom, and that it is by itself."""

import base64
import hashlib
from html.parser import HTMLParser
import inspect
from io import BytesIO
import json
import logging
from pathlib import Path
import re
import sys

from dipy.align.imwarp import DiffeomorphicMap
import nibabel as nib
import numpy as np
from PIL import Image
import pytest
from records import run, run_of_sites
from sites import Launcher, Sites

from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.workflows import charts, cli, figures, report, slices
from dipy_ppir.workflows.course import MOST, Course
from dipy_ppir.workflows.receiptfile import load

SHAPE = (20, 26, 18)
GRID = np.array([[2, 0, 0, -20], [0, 2, 0, -25], [0, 0, 3, -28], [0, 0, 0, 1.0]])
#: Rows down, then towards the right: the array is not upright.
TURNED = np.array([[0, 0, 3, 5], [-1, 0, 0, 7], [0, 2, 0, 1], [0, 0, 0, 1.0]])
FACTS = {
    "operation": "affine",
    "parameters": {"metric": "MI", "nbins": 32, "level_iters": [10, 5]},
    "images": {n: {"shape": [20, 26, 18], "voxel_size": [2, 2, 3]} for n in "ab"},
    "transform": {
        "shift": [3.0, 4.0, 0.0],
        "turn": 7.25,
        "axis": [0.0, 0.0, 1.0],
        "scales": [0.9, 1.0, 1.2],
        "mirrored": False,
    },
}
VOID = {"meta", "img", "br", "input", "link", "hr"}
DRAWN = {"path", "rect", "circle", "line", "polyline"}


class Page(HTMLParser):
    """A page as a browser sees it; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in DRAWN, tag
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        (self.scripts if inside == "script" else self.words).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag, **attributes):
        return [
            a
            for t, a in self.tags
            if t == tag
            and all(v in (a.get(n) or "").split() for n, v in attributes.items())
        ]

    def pictures(self):
        found = []
        for attributes in self.all("img"):
            assert attributes["alt"].strip()
            kind, data = attributes["src"].split(",", 1)
            assert re.fullmatch("data:image/(webp|png);base64", kind)
            found.append(np.array(Image.open(BytesIO(base64.b64decode(data)))))
        return found


def read(text):
    """The page, which must not refer to anything outside."""
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/")), value
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in (attributes.get("style") or "")
    assert not {"link", "iframe", "object", "embed", "base"} & {t for t, _ in page.tags}
    assert not re.search(r"https?://|url\(|@import", text)
    # One script, and no other may run.
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [
        a["content"]
        for a in page.all("meta")
        if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    (language,) = page.all("html")
    assert language["lang"] == "en"
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert set(named) <= set(ids)
    return page


def ball(shape=SHAPE, grid2world=GRID, center=(0, 0, 0), radius=14):
    """A ball, mm, brighter towards its right."""
    at = np.moveaxis(np.indices(shape), 0, -1) @ grid2world[:3, :3].T
    at = at + grid2world[:3, 3] - center
    inside = np.linalg.norm(at, axis=-1) < radius
    return np.where(inside, 100 + at[..., 0], 0).astype(np.float32)


@pytest.fixture(scope="module")
def launcher():
    with Launcher():
        yield


@pytest.fixture
def receipts(three):
    """The receipts of a run between sites, by party number."""
    found = three(lambda s: run_of_sites(s, **FACTS))
    return [json.loads(json.dumps(one)) for one in found]


# -- what it says ------------------------------------------------------------


def test_a_receipt_alone(receipts):
    page = read(report.page(receipts[HELPER]))
    assert "report of the helper" in page.text
    for words in (
        receipts[HELPER]["run"],
        "An affine registration by mutual information",
        "5.00 mm",
        "7.25°",
        "0.900 to 1.200",
        "No warning",
        "nothing",
        "nbins",
        "This page contains no picture of an image",
    ):
        assert words in page.text, words
    for party in receipts[HELPER]["parties"].values():
        assert party["name"] in page.text and party["fingerprint"] in page.text
    assert not page.all("img")
    (entry,) = receipts[HELPER]["learned"]["moving owner"]
    assert entry["meaning"] in page.text
    assert f"{entry['bits']:,.0f}" in page.text
    assert "It was not opened to this party" in page.text


def test_on_one_machine_and_with_warnings(three):
    found = three(lambda s: run(s, **FACTS, warnings=["the turn is large"]))[MOVING]
    found |= {"insecure": True, "date": "2026-03-05T07:08:09Z", "duration": 3725.2}
    page = read(report.page(found, names={"static": "b.nii", "moving": "a.nii"}))
    assert "a.nii on b.nii" in page.text and "on one machine" in page.text
    assert "1 warning What to check" in page.text and "No warning" not in page.text
    assert "the turn is large" in page.text and "INSECURE RUN" in page.text
    assert "5 March 2026, 07:08 UTC · 1:02:05 h" in page.text
    # Before everything that is found.
    assert page.text.index("the turn is large") < page.text.index("What was found")


def test_who_got_no_result(receipts):
    found = {n: v for n, v in receipts[STATIC].items() if n != "transform"}
    page = read(report.page(found))
    assert "No result here" in page.text
    assert "No result was opened to this party" in page.text


def test_cautions_and_the_size_of_the_image(receipts):
    found = receipts[MOVING]
    found["voxels"] = {"moving owner": 10**6}
    found["bits"]["moving owner"] = 500.0
    found["learned"]["moving owner"][0]["label"] = "force_static"
    page = read(report.page(found))
    assert "an owner who sets out to can rebuild most" in page.text
    assert "CAUTION" not in page.text
    assert "500 bits about 1,000,000 voxels, 0.0005 for each" in page.text
    chart = charts.of_bits(found)
    (row,) = chart["rows"]
    assert row["at"] == pytest.approx(100 * np.log10(500) / 7, abs=0.01)
    assert row["image_at"] == pytest.approx(100 * np.log10(8e6) / 7, abs=0.01)


def test_what_others_wrote_is_text(receipts):
    evil = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
    found = receipts[MOVING]
    for party in found["parties"].values():
        party["name"] = evil
    found |= {"title": evil, "warnings": [evil]}
    found["parameters"] = {evil: evil, "metric": evil}
    found["versions"][evil] = evil
    found["files"] = {evil: "0" * 64}
    found["learned"]["helper"] = [dict(found["learned"]["moving owner"][0])]
    found["learned"]["helper"][0]["meaning"] = evil
    found["bytes_sent"]["helper"] = {evil: 1000}
    found["metric"] = {"name": evil, "value": 1.0}
    found["course"] = [
        {"step": evil, "level": 0, "measure": evil, "evaluations": 2, "values": [1, 2]}
    ]
    for names in ({}, {"static": evil, "moving": evil}):
        page = read(report.page(found, names=names))
        assert not page.all("img") and len(page.all("script")) == 1
        assert page.text.count(evil) > 12


def test_what_is_no_text(receipts, tmp_path):
    """Names that are no UTF-8 are written all the same."""
    report.save_report(
        tmp_path / "page.html",
        receipts[MOVING],
        names={"static": "b\udcff.nii", "moving": "ä.nii"},
    )
    assert "ä.nii on b?.nii" in read((tmp_path / "page.html").read_text("utf-8")).text


def test_traffic_adds_up(receipts):
    sent = {
        "moving owner": {f"phase {i}": 10**i for i in range(9)},
        "static owner": {"phase 0": 5 * 10**8, "idle": 0},
        "helper": {},
    }
    chart = charts.of_traffic(sent)
    first, second, third = chart["rows"]
    assert chart["legend"][-1] == "everything else" and len(chart["legend"]) == 7
    for row, phases in zip(chart["rows"], sent.values(), strict=True):
        assert sum(p["bytes"] for p in row["parts"]) == sum(phases.values())
        ends = np.cumsum([p["width"] for p in row["parts"]])
        starts = [p["x"] for p in row["parts"]]
        np.testing.assert_allclose(starts, [0, *ends[:-1]], atol=0.01)
    assert second["parts"][0]["bytes"] == 5 * 10**8 == second["total"]
    assert sum(p["width"] for p in second["parts"]) == pytest.approx(100)
    read(report.page({**receipts[MOVING], "bytes_sent": sent}))


# -- the metric on the way ---------------------------------------------------


def test_the_course_of_the_metric(receipts, tmp_path):
    shown = []
    course = Course(shown.append)
    for level, n in ((1, 3), (0, 1000)):
        for i in range(n):
            course({"step": "rigid", "level": level, "value": 0.123456789 + i})
    course({"step": "affine", "level": 1, "iteration": 4})
    assert len(shown) == 1004
    found = receipts[MOVING]
    course.enter(found)
    first, second = found["course"]
    assert first["values"] == [0.123457, 1.12346, 2.12346]
    assert second["evaluations"] == 1000 and len(second["values"]) == MOST
    assert second["values"][0] == 0.123457 and second["values"][-1] == 999.123
    (tmp_path / "r.json").write_text(json.dumps(found))
    assert load(tmp_path / "r.json")["course"] == found["course"]
    page = read(report.page(found))
    assert "Mutual information at each evaluation" in page.text
    assert "rigid, level 2: 1,000 evaluations, 0.1235 to 999.1" in page.text
    lines = [a["points"].split() for a in page.all("polyline")]
    assert [len(points) for points in lines] == [3, MOST]
    assert lines[0][0] == "0.0,200.0" and lines[1][-1] == "720.0,0.0"


def test_no_course_where_nothing_is_opened(receipts):
    course = Course(lambda info: None)
    course({"step": "rigid", "level": 1, "iteration": 4})
    course.enter(receipts[MOVING])
    assert "course" not in receipts[MOVING]


# -- pictures ----------------------------------------------------------------


def test_both_images(receipts):
    static, after = ball(), ball(center=(1, 0, 0))
    before = ball(center=(0, 6, 0))
    shown = report.of_both_images(static, before, after, GRID, np.eye(4))
    page = read(report.page(receipts[MOVING], pictures=shown))
    count = sum(len(plane["slices"]) for plane in shown.viewer["planes"])
    assert len(shown.viewer["planes"]) == 3 and count > 15
    assert len(page.pictures()) == 3 * count
    assert len(page.all("div", **{"class": "middle"})) == 3
    assert {a["name"] for a in page.all("input")} == {"wipe", "slice", "top", "outline"}
    assert "contains pictures of both images" in page.text
    assert "the course of the metric and hashes of this party's files" in page.text


def test_a_slice_is_where_it_should_be():
    """Upright whatever the array: right is right, up is up, and mm are mm."""
    size = (40, 30, 24)
    image = ball(size, TURNED, center=(41, -13, 31), radius=9)
    shown = slices.viewer({"image": image}, TURNED, outlined=("image",))
    sagittal, coronal, axial = shown["planes"]
    # The array's axes are posterior, superior and right, of 1, 2 and 3 mm.
    assert (axial["width"], axial["height"]) == (72, 40)
    assert (coronal["width"], coronal["height"]) == (72, 60)
    assert (sagittal["width"], sagittal["height"]) == (40, 60)
    assert (axial["left"], axial["right"], axial["high"]) == ("L", "R", "A")
    middle = axial["slices"][len(axial["slices"]) // 2]
    picture = np.array(
        Image.open(BytesIO(base64.b64decode(middle["pictures"]["image"].split(",")[1])))
    )
    picture = picture.reshape(*picture.shape[:2], -1)[..., 0]
    assert picture.shape == (40, 24)
    # From the left edge, where the array begins, and from the front.
    rows, columns = np.nonzero(picture > 30)
    assert columns.mean() * 3 + 5 == pytest.approx(41, abs=2)
    assert 7 - rows.mean() == pytest.approx(-13, abs=1)
    assert picture[:, columns.max() - 1].max() > picture[:, columns.min() + 1].max()
    outline = points_of(middle["outlines"]["image"]) / 10 - (41 - 5 + 1.5, 20 + 0.5)
    assert np.abs(np.linalg.norm(outline, axis=1) - 9).max() < 2.5


def points_of(path):
    """Points of a path, in its units."""
    points = []
    for part in path.split("M")[1:]:
        start, steps = (
            np.array(re.findall(r"-?\d+", text), dtype=float).reshape(-1, 2)
            for text in part.split("l")
        )
        points.append(start + np.vstack([[0, 0], np.cumsum(steps, axis=0)]))
    return np.vstack(points)


@pytest.mark.parametrize("grid2world", [GRID, TURNED])
def test_the_grid_follows_an_affine_transform(grid2world):
    image = ball(grid2world=grid2world, center=(15, 0, 10))
    still, moved = (
        slices.deformation(image, grid2world, matrix)
        for matrix in (np.eye(4), np.eye(4) + np.eye(4, k=3) * 4)
    )
    # 4 mm to the right, across the first plane and along the others.
    for plane, other, shift in zip(still, moved, (0, 40, 40), strict=True):
        apart = points_of(other["grid"]) - points_of(plane["grid"])
        np.testing.assert_allclose(apart, np.tile([shift, 0], (len(apart), 1)), atol=1)
        assert "jacobian" not in plane
    turn = np.eye(4)
    turn[:2, :2] = [[0, -1], [1, 0]]
    at = np.linalg.inv(np.diag([1, 1, 1, 1.0])) @ grid2world
    lines = points_of(slices.deformation(image, grid2world, turn)[2]["grid"]) / 10
    flat = points_of(still[2]["grid"]) / 10
    corners = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in SHAPE])).reshape(3, -1)
    world = at[:3, :3] @ corners + at[:3, 3:]
    left, front = world[0].min(), world[1].max()
    x, y = left + flat[:, 0], front - flat[:, 1]
    np.testing.assert_allclose(left + lines[:, 0], -y, atol=0.3)
    np.testing.assert_allclose(front - lines[:, 1], x, atol=0.3)


def test_a_map_is_the_affine_transform_that_it_is():
    matrix = np.eye(4)
    matrix[0] = [1.1, 0.1, 0, 3]
    mapping = DiffeomorphicMap(3, SHAPE, disp_grid2world=GRID)
    world = np.moveaxis(np.indices(SHAPE), 0, -1) @ GRID[:3, :3].T + GRID[:3, 3]
    mapping.forward = (world @ (matrix - np.eye(4))[:3, :3].T + matrix[:3, 3]).astype(
        np.float32
    )
    affine, of_map = (
        slices.deformation(ball(), GRID, transform) for transform in (matrix, mapping)
    )
    for one, other in zip(affine, of_map, strict=True):
        apart = points_of(one["grid"]) - points_of(other["grid"])
        assert np.abs(apart).max() <= 1
        assert other["jacobian"].startswith("data:image/") and other["folds"] == ""


def test_an_owner_gives_what_it_has():
    """The functions for one owner know of no other image."""
    parameters = {
        function: list(inspect.signature(function).parameters)
        for function in (report.of_static_image, report.of_moving_image)
    }
    assert parameters == {
        report.of_static_image: ["static", "grid2world", "transform"],
        report.of_moving_image: ["before", "after", "grid2world", "transform"],
    }


FLAT = np.diag([2.0, 2, 2, 1])


@pytest.mark.parametrize(
    "images",
    [
        (ball(), np.zeros(SHAPE), np.zeros(SHAPE)),
        (np.full(SHAPE, 3.0), ball(), ball() - 1000),
        (ball()[:, :, 9:10], ball()[:, :, 9:10], ball()[:, :, 9:10]),
        (ball()[:, 12:13, 9:10],) * 3,
        (ball().astype(bool),) * 3,
    ],
)
def test_difficult_images(receipts, images):
    static, before, after = images
    for grid2world in (GRID, TURNED):
        for pictures in (
            report.of_both_images(static, before, after, grid2world, np.eye(4)),
            report.of_moving_image(before, after, grid2world, np.eye(4)),
            report.of_static_image(static, grid2world, np.eye(4)),
        ):
            read(report.page(receipts[MOVING], pictures=pictures))


def test_a_page_stays_small(monkeypatch):
    noise = np.random.default_rng(1).random((60, 60, 60), dtype=np.float32)
    monkeypatch.setattr(slices, "BUDGET", 20_000)
    shown = slices.viewer({"noise": noise}, FLAT)
    each = [one["pictures"]["noise"] for p in shown["planes"] for one in p["slices"]]
    size = sum(map(len, each))
    assert shown["count"] < slices.COUNTS[0] and 0 < size < 20_000
    large = slices.data_uri(np.zeros((4000, 1000), dtype=np.uint8))
    picture = Image.open(BytesIO(base64.b64decode(large.split(",")[1])))
    assert picture.size == (80, 320)


def test_points():
    rng = np.random.default_rng(1)
    moving = rng.normal(size=(3000, 3))
    matrix = np.diag([-1.0, -1, 1, 1])
    matrix[0, 3] = 5
    static = moving @ matrix[:3, :3].T + matrix[:3, 3]
    static[0] += (0, 0, 3)
    both = report.of_point_sets({"static": static, "moving": moving}, matrix)
    assert both.apart[1] == pytest.approx(3 / np.sqrt(3000))
    apart = np.linalg.norm(moving - static, axis=1)
    assert both.apart[0] == pytest.approx(np.sqrt(np.mean(apart**2)))
    assert len(both.points["planes"]) == 3 and both.points["left_out"] == 1500
    marks = both.points["planes"][0]["marks"]
    assert [path.count("M") for path in marks.values()] == [1500] * 3
    for name, sets in (("static", 2), ("moving", 2)):
        points = {"static": static, "moving": moving}[name]
        own = report.of_point_sets({name: points}, matrix)
        assert len(own.sets) == sets and own.apart is None
        assert own.of == f"the {name} points"
    flat = report.of_point_sets({"moving": moving[:, :2]}, np.eye(3))
    assert len(flat.points["planes"]) == 1


# -- where it is written -----------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two images and two sets of points."""
    monkeypatch.chdir(tmp_path)
    for name, center in (("static", (0, 0, 0)), ("<script>", (2, 1, 0))):
        nib.save(nib.Nifti1Image(ball(center=center), GRID), f"{name}.nii.gz")
    points = np.random.default_rng(2).normal(0, 20, (30, 3))
    np.savetxt("points.txt", points)
    np.savetxt("shifted.txt", points + (1, 2, 3))
    root, own = logging.getLogger(), logging.getLogger("dipy_ppir")
    handlers, level = root.handlers[:], root.level
    yield tmp_path
    root.handlers[:] = handlers
    root.setLevel(level)
    own.setLevel(logging.NOTSET)


@pytest.fixture
def command(monkeypatch, capsys, folder):
    def call(name, *words):
        name = f"dipy_ppir_{name}"
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        return cli.run(name), *capsys.readouterr()

    return call


PAIR = ["static.nii.gz", "<script>.nii.gz"]
QUICK = ["--transform", "com", "--force"]


def test_the_command_for_images(command):
    assert command("align_affine", *PAIR, *QUICK, "--report", "page.htm")[0] == 0
    page = read(Path("page.htm").read_text())
    assert "<script>.nii.gz on static.nii.gz" in page.text
    assert len(page.pictures()) > 9 and len(page.all("script")) == 1
    run = json.loads(Path("receipt.json").read_text())["run"]
    assert run in page.text
    status, _, err = command("align_affine", *PAIR, *QUICK, "--report", "page.pdf")
    assert status == 1 and "--report page.pdf must end in .html" in err
    quiet = [*PAIR, *QUICK, "--no_pictures", "--out_dir", "quiet"]
    assert command("align_affine", *quiet)[0] == 0
    assert not list(Path("quiet").glob("*.html"))


def test_the_command_for_points(command):
    points = "points.txt", "shifted.txt"
    assert command("align_points", *points, "--out_dir", "res")[0] == 0
    page = read(Path("res/report.html").read_text())
    assert "shifted.txt on points.txt" in page.text and "The points" in page.text
    assert "3.74 mm before" in page.text
    assert command("align_points", *points, "--no_pictures", "--out_dir", "q")[0] == 0
    assert not Path("q/report.html").exists()


def test_a_picture_that_fails_is_left_out(command, monkeypatch):
    def fail(*arguments, **named):
        raise ZeroDivisionError("no pixels")

    def half(path, *arguments, **named):
        Path(path).write_bytes(b"half")
        fail()

    monkeypatch.setattr(figures, "save_overlay", half)
    monkeypatch.setattr(report, "of_both_images", fail)
    status, out, err = command("align_affine", *PAIR, *QUICK, "--out_dir", "res")
    assert (status, err) == (0, "")
    names = {p.name for p in Path("res").iterdir()}
    assert names == {"affine.txt", "moved.nii.gz", "receipt.json", "report.html"}
    assert "contours.png could not be made (ZeroDivisionError: no pixels)" in out
    assert "Saved res/contours.png" not in out and "Saved res/report.html" in out
    assert not read(Path("res/report.html").read_text()).all("img")
    monkeypatch.setattr(report, "save_report", fail)
    status, out, _ = command("align_affine", *PAIR, *QUICK, "--out_dir", "res")
    assert status == 0 and "report.html could not be made" in out


def test_without_the_extra(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    status, out, err = command("align_affine", *PAIR, *QUICK, "--out_dir", "res")
    assert (status, err) == (0, "")
    assert "No report, because jinja2 is missing" in out
    assert "pip install 'dipy-ppir[report]'" in out
    assert Path("res/contours.png").exists() and not Path("res/report.html").exists()
    for words in (
        ("align_affine", *PAIR, *QUICK, "--report", "mine.html", "--out_dir", "no"),
        ("align_points", "points.txt", "shifted.txt", "--report", "mine.html"),
        ("report", "res/receipt.json"),
    ):
        status, _, err = command(*words)
        assert status == 1 and "dipy-ppir[report]" in err
    assert not Path("no").exists()


# -- of a receipt that is there already --------------------------------------


def test_the_command_for_receipts(command, receipts):
    receipts[HELPER]["parties"]["moving owner"]["name"] = "<script>A&E"
    receipts[HELPER]["learned"]["moving owner"][0]["meaning"] = "nothing at all"
    Path("r.json").write_text(json.dumps(receipts[HELPER]))
    status, out, err = command("report", "r.json", "-o", "new/page.html")
    assert (status, out, err) == (0, "Saved new/page.html\n", "")
    page = read(Path("new/page.html").read_text())
    assert "<script>A&E" in page.text
    # In this program's words, whatever the writer's.
    assert "nothing at all" not in page.text
    status, _, err = command("report", "r.json", "-o", "new/page.html")
    assert status == 1 and "--force" in err
    Path("no.json").write_text("{}")
    assert "is no receipt" in command("report", "no.json")[2]
    assert command("align_affine", *PAIR, *QUICK, "--no_pictures")[0] == 0
    images = ["--static", PAIR[0], "--moved", "moved.nii.gz"]
    assert command("report", "receipt.json", *images)[0] == 0
    page = read(Path("report.html").read_text())
    assert len(page.pictures()) > 9 and "moved.nii.gz on static.nii.gz" in page.text
    images += ["--moving", PAIR[1]]
    assert command("report", "receipt.json", *images, "--force")[0] == 0
    page = read(Path("report.html").read_text())
    assert "<script>.nii.gz on" in page.text
    assert "hashes of the run: the static and the moving image. Nothing" in page.text
    assert "Nothing vouches for the moved image" in page.text
    assert "give both" in command("report", "r.json", *images[2:], "-o", "x.html")[2]
    nib.save(nib.Nifti1Image(ball()[1:], GRID), "less.nii.gz")
    images[1] = "less.nii.gz"
    assert "has shape" in command("report", "r.json", *images, "-o", "x.html")[2]
    assert not Path("x.html").exists()


def test_pictures_of_other_images_are_refused(command, receipts):
    assert command("align_affine", *PAIR, *QUICK, "--no_pictures")[0] == 0
    nib.save(nib.Nifti1Image(ball(center=(9, 0, 0)), GRID), "wrong.nii.gz")
    moved = ["--moved", "moved.nii.gz", "-o", "x.html"]
    for name, images in (
        ("static", ["--static", "wrong.nii.gz"]),
        ("moving", ["--static", PAIR[0], "--moving", "wrong.nii.gz"]),
    ):
        status, _, err = command("report", "receipt.json", *images, *moved)
        assert (status, err.count("\n")) == (1, 1)
        assert f"wrong.nii.gz is not the {name} image of the run" in err
        assert not Path("x.html").exists()
    # The helper's receipt knows no hash of an image.
    Path("r.json").write_text(json.dumps(receipts[HELPER]))
    assert command("report", "r.json", "--static", "wrong.nii.gz", *moved)[0] == 0
    page = read(Path("x.html").read_text())
    assert "Nothing vouches for the static and the moved image" in page.text
    assert "receipt's hashes" not in page.text


# -- between sites -----------------------------------------------------------


AFFINE = {
    "pipeline": ["center_of_mass", "translation"],
    "level_iters": [20, 10],
    "sigmas": [2.0, 0.0],
    "factors": [2, 1],
    "nbins": 20,
}


def page_of(sites, site):
    text = (sites.folder / f"out_{site}" / "report.html").read_text()
    return read(text)


def test_each_site_sees_its_own_image(tmp_path, launcher):
    """And the owner to whom the metric is opened its course."""
    images = ball(), ball(center=(2, 1, 0)), GRID, GRID
    sites = Sites(
        tmp_path / "sites", "affine", images, parameters=AFFINE, pictures=True
    )
    # Strict, which a plausible result passes.
    processes = sites.start(sites=("helper",))
    processes |= sites.start("--strict", sites=("moving", "static"))
    assert set(sites.wait(processes).values()) == {0}, sites.log("moving")
    results = ["affine.txt", "receipt.json", "report.html", "warped_grid.png"]
    assert sites.outputs("static") == results
    assert sites.outputs("moving") == sorted([*results, "moved.nii.gz"])
    assert sites.outputs("helper") == ["receipt.json"]
    static, moving = (page_of(sites, name) for name in ("static", "moving"))
    assert len(static.pictures()) == 3 and not static.all("div", **{"class": "viewer"})
    assert "contains pictures of the static image" in static.text
    assert "The metric on the way It was not opened" in static.text
    layers = {a["class"] for a in moving.all("figure")}
    assert layers == {"base before", "top after"}
    assert "contains pictures of the moving image" in moving.text
    assert "Mutual information at each evaluation" in moving.text
    assert len(moving.all("polyline")) == 2
    for page in (static, moving):
        assert "a test" in page.text and "Site helper" in page.text
    assert "course" not in json.loads(
        (sites.folder / "out_static" / "receipt.json").read_text()
    )


def test_who_does_not_get_the_map_draws_nothing(tmp_path, launcher):
    static = ball((24, 24, 24), FLAT, (24, 24, 24))
    images = static, np.roll(static, 1, axis=1), FLAT, FLAT
    sites = Sites(
        tmp_path / "sites",
        "syn",
        images,
        parameters={"level_iters": [3, 2], "radius": 2},
        pictures=True,
    )
    sites.file = sites.write("session.toml", result_to="moving")
    sites.run()
    assert sites.outputs("static") == ["receipt.json", "report.html"]
    assert {"warped_grid.png", "jacobian.png", "report.html"} <= set(
        sites.outputs("moving")
    )
    moving, static = (page_of(sites, name) for name in ("moving", "static"))
    assert "No result was opened to this party" in static.text
    assert not static.pictures() and "contains no picture" in static.text
    assert "Jacobian determinant: by how much" in moving.text
