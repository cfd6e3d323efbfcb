"""Registrations between two owners alone: two programs, real sockets, real TLS."""

from contextlib import contextmanager, suppress
import json
import signal
import socket
import threading

import nibabel as nib
import numpy as np
from ports import free_port
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation
from sites import Launcher, PointSites, Sites

from dipy_ppir.align import affine_registration
from dipy_ppir.align.checkpoint import Checkpoint
from dipy_ppir.mpc.bfv import VERSION
from dipy_ppir.mpc.errors import ParameterMismatchError
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.session import Session
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.receipts import receipt as check_receipts
from dipy_ppir.workflows.sites import session as session_command

OWNERS = {"moving": MOVING, "static": STATIC}
#: Nothing but the session is in it: no protocol for two but that of opening.
CENTERS = {"pipeline": ["center_of_mass"]}
#: Ends a program when it has written down the shift of the centres.
DIES = """
import os, signal
from dipy_ppir.align.checkpoint import Checkpoint
append = Checkpoint.append
def append_and_die(self, record):
    append(self, record)
    if "center" in record:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.append = append_and_die
"""


#: Takes the keys of the encryption, as protocols do that multiply.
ENCRYPTS = """
from dipy_ppir.mpc import bfv, pair
inner = pair.PairSession.receipt
def encrypting(self, **facts):
    self.encryption
    return inner(self, **facts)
pair.PairSession.receipt = encrypting
"""


@pytest.fixture(scope="module", autouse=True)
def launcher():
    with Launcher():
        yield


@pytest.fixture
def owners(tmp_path, bodies):
    def make(**options):
        options = {
            "parameters": CENTERS,
            "reveal": "transform",
            "timeouts": {"checkpoint": 0},
            **options,
        }
        return Sites(tmp_path / "sites", "affine", bodies(3), alone=True, **options)

    return make


def matrix_of(sites, site):
    return np.loadtxt(sites.folder / f"out_{site}" / "affine.txt")


def receipt_of(sites, site):
    return json.loads((sites.folder / f"out_{site}" / "receipt.json").read_text())


@pytest.mark.parametrize("listeners", [["static"], ["moving"], ["moving", "static"]])
def test_two_owners_register_alone(owners, bodies, listeners):
    """The first as their users start them; the result is that of one machine."""
    addresses = {site: f"127.0.0.1:{free_port()}" for site in listeners}
    sites = owners(addresses=addresses, fresh=listeners == ["static"])
    sites.run()
    assert sites.outputs("moving") == ["affine.txt", "moved.nii.gz", "receipt.json"]
    assert sites.outputs("static") == ["affine.txt", "receipt.json"]
    images = [nib.load(sites.folder / f"{name}.nii.gz") for name in OWNERS]
    _, matrix = affine_registration(*images, **CENTERS, parties=2)
    np.testing.assert_array_equal(matrix_of(sites, "moving"), matrix)
    np.testing.assert_allclose(matrix_of(sites, "static"), matrix, atol=1e-12)


@contextmanager
def forwarder(to):
    """A port of somebody else's machine, of which every byte is passed on."""
    listener = socket.create_server(("127.0.0.1", 0))
    ends, seen = [listener], []

    def pump(source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                seen.append(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve():
        with suppress(OSError):
            while True:
                outer, _ = listener.accept()
                try:
                    inner = socket.create_connection(("127.0.0.1", to))
                except ConnectionError:  # nobody listens yet
                    outer.close()
                    continue
                ends.extend((outer, inner))
                for pair in (outer, inner), (inner, outer):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1], seen
    finally:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def test_a_forwarded_port_takes_the_place_of_a_relay(owners):
    """Of the owners nobody can be dialled but through it, and it reads nothing."""
    inner = free_port()
    with forwarder(inner) as (outer, seen):
        sites = owners(addresses={"static": f"127.0.0.1:{outer}"})
        listen = ["--listen", f"127.0.0.1:{inner}"]
        processes = sites.start(sites=["moving"])
        processes |= sites.start(*listen, sites=["static"])
        assert set(sites.wait(processes).values()) == {0}, sites.log("moving")
        passed = b"".join(seen)
    sent = receipt_of(sites, "moving")["bytes_total"]
    assert len(passed) > sent and b"nonce" not in passed and b"shape" not in passed


def test_one_owner_calls_from_python(owners):
    sites = owners()
    (process,) = sites.start(sites=["static"]).values()
    image = nib.load(sites.folder / "moving.nii.gz")
    with Session.load(sites.file, identity=sites.folder / "keys" / "moving") as session:
        with pytest.raises(ValueError, match="parties is 3, but the session has 2"):
            affine_registration(
                image, "remote", session=session, parties=3, **session.parameters
            )
        with pytest.raises(ParameterMismatchError, match="by the session file"):
            affine_registration(image, "remote", session=session)
        # The static owner's command keeps a checkpoint.
        _, matrix = affine_registration(
            image,
            "remote",
            session=session,
            checkpoint=Checkpoint(sites.folder / "checkpoint"),
            **session.parameters,
        )
    assert process.wait() == 0, sites.log("static")
    np.testing.assert_allclose(matrix_of(sites, "static"), matrix, atol=1e-12)


def test_both_sign_receipts_that_say_the_same(owners, capsys):
    sites = owners(pictures=True)
    sites.run()
    files = [sites.folder / f"out_{site}" / "receipt.json" for site in OWNERS]
    receipts = [json.loads(file.read_text()) for file in files]
    for receipt in receipts:
        assert (receipt["m"], receipt["t"]) == (2, 1)
        roles = {"moving owner", "static owner"}
        for entry in "parties", "learned", "bits", "bytes_sent", "common", "signatures":
            assert set(receipt[entry]) == roles, entry
        assert receipt["warnings"] == []
        assert receipt["learned"] == receipts[0]["learned"]
    capsys.readouterr()
    assert check_receipts([*map(str, files)]) == 0
    text = capsys.readouterr().out
    assert "Consistent: both receipts are of one run and state the same" in text
    assert "signed with the two keys" in text and "helper" not in text
    assert "Everything made from an image was encrypted, or masked" in text
    assert check_receipts([str(files[0])]) == 0
    text = capsys.readouterr().out
    assert "the static owner's receipt was not given" in text
    for site in OWNERS:
        page = (sites.folder / f"out_{site}" / "report.html").read_text()
        assert "no third party takes part" in page
        assert "What is made from an image is encrypted, or masked" in page
        assert "as long as both owners followed the program" in page
        assert "compares the receipts of both" in page
        assert "helper, no image" not in page
    log = sites.log("static")
    assert "Two owners alone" in log and "ring learning with errors" in log


def test_a_receipt_of_two_that_was_changed_is_noticed(owners, capsys):
    sites = owners()
    sites.run()
    file = sites.folder / "out_static" / "receipt.json"
    receipt = json.loads(file.read_text())
    receipt["m"] = 3
    file.write_text(json.dumps(receipt))
    with pytest.raises(InputError, match="not what a receipt has there"):
        check_receipts([str(file)])
    receipt["m"] = 2
    receipt["bits"]["static owner"] -= 100
    file.write_text(json.dumps(receipt))
    assert check_receipts([str(file)]) == 1


@pytest.mark.parametrize("victim", OWNERS)
def test_a_run_goes_on_after_an_owner_was_killed(owners, victim):
    sites = owners()
    sites.run()
    wanted = matrix_of(sites, "moving")
    statuses = sites.wait(sites.start("--force", before={victim: DIES}))
    (other,) = set(OWNERS) - {victim}
    assert statuses == {victim: -signal.SIGKILL, other: 1}
    assert f"(Site {victim})" in sites.last_line(other)
    sites.run("--force", "--resume")
    np.testing.assert_array_equal(matrix_of(sites, "moving"), wanted)
    for site in OWNERS:
        receipt = receipt_of(sites, site)
        assert receipt["resumed"] == 1
        # What was opened before the interruption is counted.
        labels = [e["label"] for e in receipt["learned"]["moving owner"]]
        assert labels == ["center_of_mass"]
        assert not any("checkpoint" in name for name in sites.outputs(site))


def test_session_files_that_differ(owners):
    sites = owners()
    processes = sites.start(sites=["moving"])
    sites.file = sites.write("other.toml", result_to="moving")
    processes |= sites.start(sites=["static"])
    assert set(sites.wait(processes).values()) == {1}
    for site in OWNERS:
        assert "do not agree on 'result_to'" in sites.last_line(site)
        assert sites.outputs(site) == []


def test_what_numbers_are_encrypted_by_is_on_the_receipts(owners, capsys):
    sites = owners(before=ENCRYPTS)
    sites.run()
    for site in OWNERS:
        fields = receipt_of(sites, site)["fields"]
        assert fields.endswith(f"{VERSION} of degree 8192 and 200 bits"), fields
    files = [str(sites.folder / f"out_{site}" / "receipt.json") for site in OWNERS]
    assert check_receipts(files) == 0


def test_encryptions_that_differ_are_named_before_anything_is_encrypted(owners):
    sites = owners(before=ENCRYPTS)
    other = "\nbfv.VERSION = 'bfv 0'\n"
    statuses = sites.wait(sites.start(before={"static": other}))
    assert set(statuses.values()) == {1}
    for site in OWNERS:
        line = sites.last_line(site)
        assert "do not agree on 'scheme of encryption' of the encryption" in line
        assert "'bfv 0'" in line and "install the same versions everywhere" in line
        assert sites.outputs(site) == [f"session.{OWNERS[site]}.checkpoint"]


def test_what_needs_a_helper_ends_before_anybody_is_met(owners):
    sites = owners(parameters={"pipeline": ["rigid"], "metric": "CC"})
    statuses = sites.wait(sites.start())
    assert set(statuses.values()) == {1}
    for site in OWNERS:
        assert "needs a helper" in sites.last_line(site)
        assert "Waiting" not in sites.log(site)
    with pytest.raises(ValueError, match="needs a helper; two owners alone can"):
        session_command(["check", str(sites.file)])


def test_there_is_no_helper_to_start(owners):
    sites = owners()
    for key in "static", "moving":
        argv = sites.argv("helper")
        argv[argv.index("--identity") + 1] = str(sites.folder / "keys" / key)
        log = sites.folder / "helper.log"
        process = Launcher.running.popen(argv, log)
        assert process.wait() == 1
        assert "two owners alone, who need no helper" in sites.last_line("helper")


def test_number_of_parties_is_settled_by_the_session_file(owners):
    sites = owners()
    sites.alone = False  # what follows does not look at the file
    statuses = sites.wait(sites.start("--parties", "2", sites=["static"]))
    assert statuses == {"static": 1}
    assert "--parties is settled by the session file" in sites.last_line("static")


@pytest.mark.parametrize("operation", ["affine", "syn", "freeform", "points"])
def test_a_session_file_to_start_from(tmp_path, capsys, operation):
    session_command(["new", operation, "--parties", "2"])
    text = capsys.readouterr().out
    for digit in "ab":
        text = text.replace('"..."', f'"{digit * 64}"', 1)
    assert '"..."' not in text and "parties.helper" not in text
    file = tmp_path / "session.toml"
    file.write_text(text)
    session_command(["check", str(file)])
    said = capsys.readouterr().out
    assert "Two owners alone: no third party takes part" in said
    assert "128 bits" in said and "semi-honest" in said
    assert "Hospital A dials Hospital B" in said
    assert "helper" not in said.replace("which with a helper it cannot", "")


# -- with the protocols for two ----------------------------------------------


def test_points_of_two_owners(tmp_path):
    moving = np.random.default_rng(5).normal(size=(12, 3)) * 30
    turn = Rotation.from_rotvec([0.1, -0.3, 0.2]).as_matrix()
    static = moving @ turn.T + [4.0, -7.0, 2.0]
    sites = PointSites(tmp_path, moving, static, alone=True)
    sites.run()
    matrix, other = (
        np.loadtxt(tmp_path / f"out_{site}" / "moving_to_static.txt") for site in OWNERS
    )
    np.testing.assert_array_equal(matrix, other)
    moved = moving @ matrix[:3, :3].T + matrix[:3, 3]
    assert np.abs(moved - static).max() < 0.01
    receipts = [str(tmp_path / f"out_{site}" / "receipt.json") for site in OWNERS]
    assert check_receipts(receipts) == 0


#: Ends a program when it has written down so many steps.
DIES_AT_STEP = """
import os, signal
from dipy_ppir.align.checkpoint import Checkpoint
append, steps = Checkpoint.append, 0
def count_and_append(self, record):
    global steps
    append(self, record)
    steps += "step" in record or "iteration" in record
    if steps == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.append = count_and_append
"""
LEVELS = {"level_iters": [4, 3], "factors": [2, 1], "sigmas": [1.0, 0.0]}
RUNS = {
    "SSD": (
        "affine",
        "transform",
        {**LEVELS, "metric": "SSD", "pipeline": ["translation"]},
        "affine.txt",
    ),
    "MI": (
        "affine",
        "transform",
        {**LEVELS, "pipeline": ["translation"], "nbins": 8},
        "affine.txt",
    ),
    "splines": (
        "freeform",
        "steps",
        {**LEVELS, "opt_tol": 0.0},
        "displacement_field.nii.gz",
    ),
}


@pytest.mark.parametrize(
    "run",
    [pytest.param(r, marks=[pytest.mark.heavy] * (r != "splines")) for r in RUNS],
)
def test_owners_go_on_where_they_were_interrupted(tmp_path, run):
    operation, reveal, parameters, result = RUNS[run]
    static = ndimage.gaussian_filter(np.random.default_rng(1).random((13, 12, 14)), 2)
    moving, matrix = np.roll(static, 1, axis=1), np.eye(4)
    sites = Sites(
        tmp_path / "sites",
        operation,
        (static, moving, matrix, matrix),
        parameters=parameters,
        reveal=reveal,
        timeouts={"checkpoint": 0},
        alone=True,
    )
    code = DIES_AT_STEP.format(at=5)
    statuses = sites.wait(sites.start(before={"moving": code}))
    assert statuses == {"moving": -signal.SIGKILL, "static": 1}, sites.log("static")
    sites.run("--resume")
    receipts = []
    for site in OWNERS:
        assert result in sites.outputs(site)
        assert receipt_of(sites, site)["resumed"] == 1
        receipts.append(str(sites.folder / f"out_{site}" / "receipt.json"))
    assert check_receipts(receipts) == 0


SYN = {"level_iters": [1, 1], "radius": 1, "opt_tol": -1e9, "map_spacing": 4}
#: Ends a program when a level of SyN is over, and its state is kept.
DIES_AFTER_LEVEL = """
import os, signal
from dipy_ppir.align.checkpoint import Checkpoint
save = Checkpoint.save
def save_and_die(self, *arguments):
    save(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save_and_die
"""


@pytest.mark.parametrize(
    "opens", ["levels", pytest.param("end", marks=pytest.mark.heavy)]
)
def test_syn_of_two_owners_goes_on_after_an_interruption(tmp_path, opens):
    """From the ends of levels, of which each owner keeps a part that says nothing."""
    static = ndimage.gaussian_filter(np.random.default_rng(1).random((13, 12, 14)), 2)
    moving, matrix = np.roll(static, 1, axis=1), np.eye(4)
    sites = Sites(
        tmp_path / "sites",
        "syn",
        (static, moving, matrix, matrix),
        parameters={**SYN, "opens": opens},
        timeouts={"checkpoint": 0},
        alone=True,
    )
    statuses = sites.wait(sites.start(before={"static": DIES_AFTER_LEVEL}))
    assert statuses == {"static": -signal.SIGKILL, "moving": 1}, sites.log("static")
    sites.run("--resume")
    maps = [
        np.asarray(
            nib.load(sites.folder / f"out_{site}" / "displacement_field.nii.gz").dataobj
        )
        for site in OWNERS
    ]
    np.testing.assert_allclose(*maps, atol=1e-9)
    assert np.abs(maps[0]).max() > 0.1
    receipts = [str(sites.folder / f"out_{site}" / "receipt.json") for site in OWNERS]
    assert check_receipts(receipts) == 0
    for site in OWNERS:
        assert receipt_of(sites, site)["resumed"] == 1


#: Ends a program in the middle of the optimizer's steps.
DIES_IN_STEPS = DIES.replace('"center" in record', 'record.get("step") == 2')
#: One coarse level and few bins, so that a registration takes seconds.
INFORMATION = {
    "pipeline": ["center_of_mass", "translation"],
    "level_iters": [4, 0],
    "sigmas": [0.0, 0.0],
    "factors": [2, 1],
    "nbins": 12,
}


@pytest.mark.parametrize(
    "victim", ["moving", pytest.param("static", marks=pytest.mark.heavy)]
)
def test_mutual_information_of_two_owners_goes_on(owners, victim):
    """The level is begun anew, with new keys; what was shown before is counted."""
    sites = owners(parameters=INFORMATION)
    statuses = sites.wait(sites.start(before={victim: DIES_IN_STEPS}))
    (other,) = set(OWNERS) - {victim}
    assert statuses == {victim: -signal.SIGKILL, other: 1}
    assert f"(Site {victim})" in sites.last_line(other)
    sites.run("--force", "--resume")
    images = [nib.load(sites.folder / f"{name}.nii.gz") for name in OWNERS]
    _, matrix, receipt = affine_registration(
        *images, **INFORMATION, parties=2, ret_receipt=True
    )
    np.testing.assert_allclose(matrix_of(sites, "moving"), matrix, atol=0.3)
    for site in OWNERS:
        resumed = receipt_of(sites, site)
        assert resumed["resumed"] == 1
        assert resumed["bits"]["moving owner"] > receipt["bits"]["moving owner"]
