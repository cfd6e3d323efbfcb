"""What the network costs: bytes through a link, and registrations over a long line."""

import json
from multiprocessing import get_context
from pathlib import Path
import socket
import subprocess
import sys

from hosts import Hosts, unavailable
import numpy as np
import pins
import pytest
from sites import ROLES, Sites
from yardsticks import beside

from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import Ledger
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.network import Network
from dipy_ppir.mpc.sessionfile import Party

#: Bytes of an array that is sent back and forth.
SIZE = 64 << 20
PORT = 7433


class End:
    """One end of a connection on the loopback interface, of a kind."""

    def __init__(self, kind, me, sock, identities):
        self.array = np.full(SIZE // 8, 7, dtype=np.uint64)
        self.view, self.sock = memoryview(self.array).cast("B"), sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.network = None
        if kind != "socket":
            peer, ledger = 1 - me, Ledger()
            if kind == "tls":
                other = identities[peer]
                party = Party(peer, other.name, other.fingerprint, None)
                sock = pins.connect(sock, identities[me], party, server=me == 0)
            self.peer = peer
            self.network = Network({peer: Link(sock, peer)}, 30, lambda: ledger)

    def send(self):
        if self.network is None:
            self.sock.sendall(self.view)
        else:
            self.network.send(self.peer, "array", self.array)

    def close(self):
        if self.network is not None:
            self.network.close()
        self.sock.close()

    def receive(self):
        if self.network is not None:
            self.network.receive(self.peer, "array", self.array)
            return
        left = self.view
        while left:
            left = left[self.sock.recv_into(left) :]


def echo(kind, address, identities):
    """The other process: send back what comes, until the connection ends."""
    end = End(kind, 1, socket.create_connection(address), identities)
    try:
        while True:
            end.receive()
            end.send()
    except (OSError, ValueError):
        pass


@pytest.fixture
def there_and_back():
    """A function that sends an array to another process and back, by kind."""
    identities = [create_identity(name) for name in "ab"]
    processes, ends = [], []

    def start(kind):
        with socket.create_server(("127.0.0.1", 0)) as server:
            arguments = kind, server.getsockname(), identities
            process = get_context("fork").Process(target=echo, args=arguments)
            process.start()
            processes.append(process)
            sock, _ = server.accept()
        end = End(kind, 0, sock, identities)
        ends.append(end)

        def once():
            end.send()
            end.receive()

        return once

    yield start
    for end in ends:
        end.close()
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_throughput(benchmark, there_and_back, kind):
    """64 MB arrays between two processes, beside a bare socket in the same run."""
    link, bare = there_and_back(kind), there_and_back("socket")
    beside(benchmark, link, bare, 15)
    ours, bares = benchmark.stats.stats.median, benchmark.extra_info["clear_median_s"]
    benchmark.extra_info.update(
        gigabytes_per_s=round(2 * SIZE / 1e9 / ours, 2),
        bare_socket=round(2 * SIZE / 1e9 / bares, 2),
    )


#: Round trip in seconds and rate in bits per second; the first is the machine itself.
LINES = [(0, None), (0.02, 1e9), (0.02, 1e8), (0.1, 1e9), (0.1, 1e8)]
PARAMETERS = {
    "affine": {"sampling_proportion": 0.1},
    "syn": {"level_iters": [10, 10, 5]},
    # Affine, without a helper.
    "alone": {"sampling_proportion": 0.05},
}
REVEAL = {"affine": "transform", "syn": "map"}


@pytest.mark.heavy
@pytest.mark.parametrize("delay, rate", LINES)
@pytest.mark.parametrize("operation", PARAMETERS)
@pytest.mark.parametrize("pair", [2], indirect=True, ids="{}mm".format)
def test_long_line(benchmark, tmp_path, pair, operation, delay, rate):
    """A registration between hosts, and the time that its bytes alone need."""
    if reason := unavailable():
        pytest.skip(reason)
    static, moving, grid2world = pair
    parameters, alone = PARAMETERS[operation], operation == "alone"
    operation = "affine" if alone else operation
    names = [n for n in ROLES if not alone or n != "helper"]
    figures = {}

    def register():
        with Hosts(delay=delay, rate=rate) as hosts:
            addresses = {n: f"{hosts.address(n)}:{PORT}" for n in names[1:]}
            sites = Sites(
                tmp_path,
                operation,
                (static, moving, grid2world, grid2world),
                parameters=parameters,
                reveal=REVEAL[operation],
                addresses=addresses,
                hosts=hosts,
                alone=alone,
            )
            processes = []
            for name in names:
                image = [] if name == "helper" else [str(tmp_path / f"{name}.nii.gz")]
                argv = [
                    *(sys.executable, str(Path(__file__).with_name("site.py"))),
                    *(str(sites.file), str(tmp_path / "keys" / name), *image),
                ]
                processes.append(
                    hosts.popen(name, argv, stdout=subprocess.PIPE, text=True)
                )
            said = [process.communicate()[0] for process in processes]
            assert [process.returncode for process in processes] == [0] * len(names)
            figures.update(json.loads(said[0]))
            figures["traffic"] = [hosts.traffic(name) for name in names]

    benchmark.pedantic(register, rounds=1, iterations=1)
    most = max(max(pair) for pair in figures["traffic"])
    benchmark.extra_info.update(
        registration_s=round(figures["seconds"], 1),
        megabytes=round(figures["bytes"] / 1e6),
        evaluations=figures["evaluations"],
        most_megabytes_of_one_link=round(most / 1e6),
        bytes_alone_s=round(8 * most / rate, 1) if rate else 0,
    )
