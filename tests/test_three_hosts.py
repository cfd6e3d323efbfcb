"""Registrations between three hosts, each in a network namespace of its own."""

import json
from pathlib import Path
import subprocess
import sys
import time

from hosts import Hosts, unavailable
import nibabel as nib
import numpy as np
import pytest
from sites import ROLES, Sites, free_port

AFFINE = {"level_iters": [20, 10], "sigmas": [2.0, 0.0], "factors": [2, 1], "nbins": 16}
SYN = {"level_iters": [5, 3], "radius": 2}
PARAMETERS = {"affine": AFFINE, "syn": SYN}
REVEAL = {"affine": "gradient", "syn": "update"}
PORT = 7433


@pytest.fixture(scope="module", autouse=True)
def allowed():
    if reason := unavailable():
        pytest.skip(reason)


@pytest.fixture
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
        path = sites.folder / f"{name}.json"
        path.write_text(json.dumps(config))
        argv = [
            sys.executable,
            str(Path(__file__).with_name("seeded_site.py")),
            str(path),
        ]
        start = (
            subprocess.Popen if hosts is None else lambda a, n=name: hosts.popen(n, a)
        )
        processes.append(start(argv))
        if hosts is None:
            time.sleep(1.5)  # whoever is dialled there must listen already
    try:
        assert [p.wait(100) for p in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return dict(np.load(out))


@pytest.mark.parametrize(
    "operation, listening", [("affine", ("helper",)), ("syn", ("static", "helper"))]
)
def test_the_same_bits_as_on_loopback(tmp_path, pair, operation, listening):
    """Certificates, TLS and the relay change nothing of the result."""
    closed = {"moving", "static"} - set(listening)
    with Hosts(firewalled=closed) as hosts:
        sites = three_sites(tmp_path / "s", operation, pair, hosts, listening)
        apart = run_seeded(sites, hosts)
    here = run_seeded(sites)
    assert apart.keys() == here.keys()
    for name in apart:
        np.testing.assert_array_equal(apart[name], here[name])
        assert np.abs(apart[name]).max() > 0.1


def test_fresh_randomness_within_tolerance(tmp_path, pair):
    """Without chosen seeds the maps of two runs differ by rounding only."""
    with Hosts() as hosts:
        sites = three_sites(tmp_path / "s", "syn", pair, hosts)
        sites.run()
    seeded = run_seeded(sites)
    path = sites.folder / "out_moving" / "displacement_field.nii.gz"
    field = np.asarray(nib.load(path).dataobj)
    # 24 bits are opened of steps of a quarter of a voxel; DIPY's inversion stops by a
    # tolerance of 0.001 voxel.
    np.testing.assert_allclose(field[..., 1], seeded["backward"], atol=0.02)
    np.testing.assert_allclose(field[..., 0], seeded["forward"], atol=0.02)


def test_a_capture_shows_nothing(tmp_path, bodies):
    """Neither images nor parameters nor seeds cross the network in the clear.

    The test knows the seeds, because they are chosen, and plants words in names and
    numbers in images and affines.
    """
    static, moving, grid2world, _ = bodies(3)
    rng = np.random.default_rng(5)
    static, moving = (x + rng.uniform(0, 0.01, x.shape) for x in (static, moving))
    grid2world = grid2world.copy()
    grid2world[:3, 3] = [-31.41592653, 27.18281828, -14.14213562]
    parameters = {**AFFINE, "sigmas": [1.61803398875, 0.0]}
    with Hosts() as hosts:
        sites = three_sites(
            tmp_path / "s",
            "affine",
            (static, moving, grid2world, grid2world),
            hosts,
            parameters=parameters,
        )
        with hosts.capture() as packets:
            result = run_seeded(sites, hosts)
    from seeded_site import seed

    secret = [seed(i, j) for i in range(3) for j in range(i)]
    for name in ("static", "moving"):
        image = np.asarray(nib.load(sites.folder / f"{name}.nii.gz").dataobj)
        at = tuple(n // 2 for n in image.shape)
        row = image[at[0], at[1], at[2] : at[2] + 2]
        secret += [row.astype(kind).tobytes() for kind in (np.float32, np.float64)]
        secret += [np.ascontiguousarray(row).tobytes()]
    secret += [result["matrix"][0].tobytes(), result["matrix"][:1, :2].tobytes()]
    secret += [b"31.4159", b"1.618033", b"level_iters", b"a test", b"session file"]
    payload = packets.payload()
    assert len(payload) > 1e6, "the capture missed the run"
    assert b"\x16\x03\x01" in payload, "no TLS handshake was captured"
    for needle in secret:
        assert needle not in payload
    # What must be visible to whom looks for it: the test can see plain text.
    assert b"dipy-ppir/1" in payload


def test_an_unplugged_site_is_named(tmp_path, pair):
    """The others end within the time-out, and no result appears."""
    timeouts = {"silence": 4, "connect": 60}
    with Hosts() as hosts:
        parameters = {"level_iters": [2000, 2000], "radius": 2, "opt_tol": -1e9}
        sites = three_sites(
            tmp_path / "s",
            "syn",
            pair,
            hosts,
            timeouts=timeouts,
            parameters=parameters,
        )
        processes = sites.start()
        wait_for_checkpoint(sites, processes)
        hosts.unplug("static")
        start = time.monotonic()
        statuses = sites.wait(processes, timeout=60)
        assert time.monotonic() - start < 25
    assert set(statuses.values()) == {1}
    for site in ("moving", "helper"):
        assert "party 1 (static owner)" in sites.last_line(site)
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
        time.sleep(0.05)
