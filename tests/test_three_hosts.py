"""Registrations between three hosts, each in a network namespace of its own."""

import json
from pathlib import Path
import sys
import time

from hosts import Hosts, unavailable
import nibabel as nib
import numpy as np
from ports import free_port
import pytest
from seeded_site import seed
from sites import LIMIT, ROLES, Launcher, Sites

AFFINE = {
    "level_iters": [4, 3],
    "sigmas": [1.61803398875, 0.0],
    "factors": [2, 1],
    "nbins": 16,
}
SYN = {"level_iters": [5, 3], "radius": 2}
PARAMETERS = {"affine": AFFINE, "syn": SYN}
REVEAL = {"affine": "gradient", "syn": "update"}
PORT = 7433
TITLE = "words that only the parties may read"
#: Runs the program that its first argument names.
RUN = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], {}, '__main__')"
#: Waits as long as it takes; but when there is a file, no longer for the static owner
#: (who waits for nobody): as if the time-out were over.
IMPATIENT = """
import os
from dipy_ppir.mpc import network
class Briefly:
    def __init__(self, poller):
        self.poller = poller
    def poll(self, milliseconds):
        return self.poller.poll(min(milliseconds, 100))
whole = network._Wait.poll
def poll(wait, poller):
    events = whole(wait, Briefly(poller))
    over = not events and os.path.exists({file!r})
    if over and ({pid} == 1 or any(link.peer == 1 for link in wait.links)):
        wait._deadline = 0
    return events
network._Wait.poll = poll
"""


@pytest.fixture(scope="module", autouse=True)
def allowed():
    if reason := unavailable():
        pytest.skip(reason)
    with Launcher():
        yield


@pytest.fixture(scope="module")
def pair(bodies):
    static, _, matrix, _ = bodies(3)
    return static, np.roll(static, 1, axis=1) ** 0.8, matrix, matrix


def three_sites(folder, operation, pair, hosts, listening=("static", "helper"), **more):
    addresses = {name: f"{hosts.address(name)}:{PORT}" for name in listening}
    options = {"parameters": PARAMETERS[operation], "reveal": REVEAL[operation]}
    options = {**options, "addresses": addresses, "hosts": hosts, **more}
    return Sites(folder, operation, pair, **options)


def run_seeded(sites, hosts=None):
    """The result of a run whose randomness is chosen; on `hosts`, or loopback."""
    addresses = [["127.0.0.1", free_port()] for _ in range(2)]
    processes = []
    out = sites.folder / ("hosts.npz" if hosts else "loopback.npz")
    for name, pid in ROLES.items():
        config = {
            "pid": pid,
            "images": {
                n: str(sites.folder / f"{n}.nii.gz") for n in ROLES if n[0] > "h"
            },
            "operation": sites.operation,
            "parameters": {**sites.parameters, "reveal": sites.reveal},
            "out": str(out),
        }
        if hosts:
            config["session"] = str(sites.file)
            config["identity"] = str(sites.folder / "keys" / name)
        else:
            config["addresses"] = addresses
            config["listens"] = [str(sites.folder / f"listens{i}") for i in range(2)]
        path = sites.folder / f"{name}.json"
        path.write_text(json.dumps(config))
        program = str(Path(__file__).with_name("seeded_site.py"))
        argv = [sys.executable, "-c", RUN, program, str(path)]
        namespace = hosts and hosts.namespace(name)
        processes.append(Launcher.running.popen(argv, namespace=namespace))
    try:
        assert [p.wait(LIMIT) for p in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return dict(np.load(out))


@pytest.fixture(scope="module")
def affine_runs(tmp_path_factory, bodies):
    """A run on hosts, one on loopback: sites and results; and the former's packets.

    The images and affines have numbers that can be told from others.
    """
    static, moving, grid2world, _ = bodies(3)
    rng = np.random.default_rng(5)
    static, moving = (x + rng.uniform(0, 0.01, x.shape) for x in (static, moving))
    grid2world = grid2world.copy()
    grid2world[:3, 3] = [-31.41592653, 27.18281828, -14.14213562]
    pair = static, moving, grid2world, grid2world
    folder = tmp_path_factory.mktemp("affine") / "s"
    with Hosts() as hosts:
        sites = three_sites(folder, "affine", pair, hosts)
        sites.file = sites.write("session.toml", title=TITLE)
        with hosts.capture() as packets:
            apart = run_seeded(sites, hosts)
    return sites, apart, run_seeded(sites), packets


@pytest.fixture(scope="module")
def syn_runs(tmp_path_factory, pair):
    """A run by the relay and one on loopback: sites and results."""
    folder = tmp_path_factory.mktemp("syn") / "s"
    with Hosts(firewalled=["moving", "static"]) as hosts:
        sites = three_sites(folder, "syn", pair, hosts, ["helper"])
        apart = run_seeded(sites, hosts)
    return sites, apart, run_seeded(sites)


@pytest.mark.parametrize("operation", ["affine", "syn"])
def test_the_same_bits_as_on_loopback(request, operation):
    """Certificates, TLS and the relay change nothing of the result."""
    _, apart, here, *_ = request.getfixturevalue(f"{operation}_runs")
    assert apart.keys() == here.keys()
    for name in apart:
        np.testing.assert_array_equal(apart[name], here[name])
        assert np.abs(apart[name]).max() > 0.1


def test_fresh_randomness_within_tolerance(tmp_path, pair, syn_runs):
    """Without chosen seeds the maps of two runs differ by rounding only.

    The sites run what their users run.
    """
    with Hosts() as hosts:
        sites = three_sites(tmp_path / "s", "syn", pair, hosts, fresh=True)
        sites.run()
    *_, seeded = syn_runs
    path = sites.folder / "out_moving" / "displacement_field.nii.gz"
    field = np.asarray(nib.load(path).dataobj)
    # 24 bits are opened of steps of a quarter of a voxel; DIPY's inversion stops by a
    # tolerance of 0.001 voxel. In 50 runs no standard deviation of a voxel was above
    # 1.6e-4 and no deviation above 4.3 of these, or 4.8e-4: between two runs this is
    # 88 standard deviations.
    np.testing.assert_allclose(field[..., 1], seeded["backward"], atol=0.02)
    np.testing.assert_allclose(field[..., 0], seeded["forward"], atol=0.02)


def test_a_capture_shows_nothing(affine_runs):
    """Neither images nor parameters nor seeds cross the network in the clear.

    The test knows the seeds, because they are chosen, and plants words in names and
    numbers in images and affines.
    """
    sites, result, _, packets = affine_runs
    secret = [seed(i, j) for i in range(3) for j in range(i)]
    for name in ("static", "moving"):
        image = np.asarray(nib.load(sites.folder / f"{name}.nii.gz").dataobj)
        at = tuple(n // 2 for n in image.shape)
        row = image[at[0], at[1], at[2] : at[2] + 2]
        secret += [row.astype(kind).tobytes() for kind in (np.float32, np.float64)]
        secret += [np.ascontiguousarray(row).tobytes()]
    secret += [result["matrix"][0].tobytes(), result["matrix"][:1, :2].tobytes()]
    secret += [b"31.41592", b"1.618033", b"level_iters", TITLE.encode()]
    secret += [b"session file"]
    # Of eight bytes and more: within 1e9 random bytes by a chance of 5e-11 each.
    assert min(map(len, secret)) >= 8
    payload = packets.payload()
    assert len(payload) > 1e6, "the capture missed the run"
    assert b"\x16\x03\x01" in payload, "no TLS handshake was captured"
    for needle in secret:
        assert needle not in payload
    # What must be visible to whom looks for it: the test can see plain text.
    assert b"dipy-ppir/1" in payload


def test_an_unplugged_site_is_named(tmp_path, pair):
    """The others end when the time-out is over, and no result appears."""
    file = tmp_path / "unplugged"
    with Hosts() as hosts:
        parameters = {"level_iters": [2000, 2000], "radius": 2, "opt_tol": -1e9}
        sites = three_sites(
            tmp_path / "s",
            "syn",
            pair,
            hosts,
            parameters=parameters,
            before=IMPATIENT.replace("{file!r}", repr(str(file))),
        )
        processes = sites.start()
        wait_for_checkpoint(sites, processes)
        hosts.unplug("static")
        file.touch()
        statuses = sites.wait(processes)
    assert set(statuses.values()) == {1}
    for site in ("moving", "helper"):
        assert "static owner (Site static)" in sites.last_line(site), sites.log(site)
    # It was told nothing either.
    assert "said nothing" in sites.last_line("static"), sites.log("static")
    for site in ROLES:
        assert [
            n for n in sites.outputs(site) if "." in n and "checkpoint" not in n
        ] == []


def wait_for_checkpoint(sites, processes):
    """Until the registration is under way."""
    while True:
        folder = sites.folder / "out_static" / "session.1.checkpoint"
        if (folder / "journal.jsonl").exists():
            return
        assert all(p.poll() is None for p in processes.values()), sites.log("static")
        time.sleep(0.01)
