"""The hosts of the tests: what reaches whom, how fast, and what is left of them."""

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

from hosts import Hosts, _Link, _reassemble, unavailable
import numpy as np
import pytest

KINDS = pytest.mark.parametrize(
    "line", [{}, {"delay": 0.002}], ids=["bridge", "emulator"]
)

#: Seconds: for what hangs, not for what is slow.
LIMIT = 300

# Sends back what it receives, on one connection after another.
ECHO = """
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("up", flush=True)
    while True:
        with server.accept()[0] as peer:
            while data := peer.recv(2**16):
                peer.sendall(data)
"""

# Connects; for each line of its input, a number, sends and gets back that many bytes.
CALL = """
import socket, sys, threading
try:
    peer = socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[2]))
except TimeoutError:
    sys.exit("no answer")
peer.settimeout(None)
print(peer.getsockname()[0], flush=True)
for line in sys.stdin:
    data = b"".join(b"%07d," % i for i in range(int(line) // 8))
    threading.Thread(target=peer.sendall, args=[data]).start()
    while data:
        data = data[len(peer.recv(2**20)) :]
    print("back", flush=True)
"""


@pytest.fixture(scope="session")
def allowed():
    """Skip where hosts cannot be made."""
    if reason := unavailable():
        pytest.skip(reason)


@pytest.fixture
def start(allowed):
    """Start Python code on a host, and close its pipes after the test."""
    processes = []

    def start(hosts, name, code, *arguments):
        command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(hosts.popen(name, command, bufsize=0, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        for pipe in process.stdin, process.stdout, process.stderr:
            pipe.close()


@pytest.fixture
def call(start):
    """Connect a host to another, where the echo is started; the caller's process."""

    def call(hosts, caller, called, timeout=LIMIT):
        assert start(hosts, called, ECHO).stdout.readline() == b"up\n"
        return start(hosts, caller, CALL, hosts.address(called), timeout)

    return call


def send(process, number):
    """Let a caller send a number of bytes and wait until they are back."""
    process.stdin.write(b"%d\n" % number)
    assert process.stdout.readline() == b"back\n"


def settle(process):
    """Wait until what was sent again of earlier bytes has arrived, or was dropped.

    It comes before what is sent later; of that, nothing matters that is sent again.
    """
    send(process, 8)


def sent_again(hosts):
    """Bytes that hosts have sent more than once, and the answers to them, at most."""
    segments = 0
    for name in hosts.names:
        shown = hosts.run(name, "cat", "/proc/net/snmp")
        names, values = (x.split() for x in shown.splitlines() if x[:4] == "Tcp:")
        segments += int(dict(zip(names, values, strict=True))["RetransSegs"])
    return 2000 * segments


def namespaces():
    return subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout


@KINDS
def test_hosts_reach_each_other(start, line):
    with Hosts(**line) as hosts:
        assert len({hosts.address(name) for name in hosts.names}) == 3
        for name in hosts.names:
            assert start(hosts, name, ECHO).stdout.readline() == b"up\n"
        for caller in hosts.names:
            own = hosts.address(caller)
            for called in hosts.names:
                process = start(hosts, caller, CALL, hosts.address(called), LIMIT)
                assert process.stdout.readline().decode().strip() == own
                process.stdin.close()  # the echo takes one caller after another


@pytest.mark.parametrize(
    "line, number, least",
    [({"delay": 0.05}, 8, 0.05), ({"rate": 2e7}, 10**6, 8e6 / 2e7)],
    ids=["delay", "rate"],
)
def test_the_line_takes_its_time(call, line, number, least):
    with Hosts(**line) as hosts:
        process = call(hosts, "moving", "static")
        process.stdout.readline()
        begin = time.monotonic()
        send(process, number)
        assert time.monotonic() - begin >= least


@KINDS
def test_traffic_is_counted(call, line):
    with Hosts(**line) as hosts:
        process = call(hosts, "moving", "static")
        process.stdout.readline()
        before = {name: hosts.traffic(name) for name in hosts.names}
        send(process, 10**6)
        for name in hosts.names:
            grown = np.subtract(hosts.traffic(name), before[name])
            least, most = (0, 10**4) if name == "helper" else (10**6, 1.2e6)
            most += sent_again(hosts)
            assert (grown >= least).all() and (grown <= most).all(), (name, grown)


def test_links_drop_what_would_wait_too_long():
    link = _Link(8e6)
    assert link.cross(5, 100_000) == pytest.approx(5.1)
    assert link.cross(5, 200_000) == pytest.approx(5.3)
    assert link.cross(5, 1) is None
    assert link.cross(5.2, 100_000) == pytest.approx(5.4)


def test_firewalled_hosts_can_only_call(call):
    with Hosts(firewalled=["moving", "helper"]) as hosts:
        process = call(hosts, "static", "moving", timeout=0.5)
        assert process.communicate() == (b"", b"no answer\n")
        process = call(hosts, "static", "helper", timeout=0.5)
        assert process.communicate() == (b"", b"no answer\n")
        process = call(hosts, "moving", "static")
        assert process.stdout.readline()
        send(process, 8)


@KINDS
def test_capture_has_what_was_sent_then(call, line):
    sent = b"".join(b"%07d," % i for i in range(10**5))
    with Hosts(**line) as hosts:
        process = call(hosts, "moving", "static")
        process.stdout.readline()
        send(process, 8 * 9)  # up to 0000008
        with hosts.capture() as packets:
            send(process, len(sent))
        settle(process)
        with hosts.capture() as later:
            send(process, 8)
    assert packets.payload().count(sent) == 2
    assert packets.contains(sent) and not packets.contains(b"0000009;")
    assert later.contains(b"0000000,") and not later.contains(b"0000001,")


def test_capture_says_if_it_is_incomplete(allowed):
    with pytest.raises(RuntimeError, match="not every packet was recorded"):
        with Hosts() as hosts, hosts.capture():
            hosts.__exit__()


@KINDS
def test_unplugged_hosts_hear_nothing(call, line):
    with Hosts(**line) as hosts:
        process = call(hosts, "moving", "static")
        process.stdout.readline()
        for name in "moving", "static":
            settle(process)
            hosts.unplug(name)
            with hosts.capture() as packets:
                process.stdin.write(b"800\n")
                time.sleep(0.3)  # it sends again meanwhile
            assert not packets.contains(b"0000001,")
            with hosts.capture() as packets:
                hosts.plug(name)
                assert process.stdout.readline() == b"back\n"
            assert packets.payload().count(b"0000001,") == 2


@KINDS
def test_nothing_is_left(start, line):
    code = "import os, time; os.fork() or os.setsid(); print('up', flush=True)"
    with pytest.raises(KeyError, match="the test's own"):
        with Hosts(**line) as hosts:
            process = start(hosts, "moving", code + "; time.sleep(99)")
            assert [process.stdout.readline() for _ in range(2)] == [b"up\n"] * 2
            assert f"pp{os.getpid()}-" in namespaces()
            raise KeyError("the test's own")
    assert process.returncode == -signal.SIGKILL
    assert process.stdout.read() == b""  # its child has closed the pipe as well
    assert f"pp{os.getpid()}-" not in namespaces()


def test_failure_on_the_way_leaves_nothing(allowed):
    with pytest.raises(OSError, match="netns add"):
        with Hosts(("one", "one")):
            pass
    assert f"pp{os.getpid()}-" not in namespaces()


def test_what_a_killed_process_left_is_removed(allowed):
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    code += "from hosts import Hosts\n"
    code += "with Hosts(delay=0.1): print('up', flush=True); input()\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        assert f"pp{process.pid}-" in namespaces()
        process.kill()
    with Hosts():
        # Whoever makes hosts removes them: it may be another test, not done yet.
        deadline = time.monotonic() + LIMIT
        while f"pp{process.pid}-" in namespaces():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_reasons_to_have_no_hosts(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert "Linux" in unavailable()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "linux")
        patch.setattr(shutil, "which", lambda name: None)
        assert "iproute2" in unavailable()
        patch.setattr(shutil, "which", lambda name: name)
        patch.setattr(os, "geteuid", lambda: 1000)
        assert "root" in unavailable()


def test_refusal_of_the_kernel_is_a_reason(allowed, monkeypatch, tmp_path):
    tmp_path.joinpath("ip").write_text("#!/bin/sh\necho not permitted >&2\nexit 1\n")
    tmp_path.joinpath("ip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert re.search("not allowed: .*not permitted", unavailable())


def recorded(body, *, sequence=0, flags=0x10, port=5000, protocol=6):
    """One recorded packet, with IPv4 and TCP headers."""
    ends = bytes((10, 77, 1, 1, 10, 77, 2, 1))
    packet = struct.pack("!BBHIBBH", 0x45, 0, 40 + len(body), 0, 64, protocol, 0)
    packet += ends + struct.pack("!HHII", 1000, port, sequence % 2**32, 0)
    packet += struct.pack("!BBHI", 0x50, flags, 0, 0) + body
    return struct.pack("=I", len(packet)) + packet


def test_segments_are_put_in_order():
    start = 2**32 - 4  # the numbers wrap after three bytes
    packets = [
        recorded(b"", sequence=start, flags=0x02),
        recorded(b"defg", sequence=start + 4),
        recorded(b"other", port=5001),
        recorded(b"abc", sequence=start + 1),
        recorded(b"fghi", sequence=start + 6),
        recorded(b"ef", sequence=start + 5),
        recorded(b"", sequence=7, flags=0x02),  # the same ports once more
        recorded(b"again", sequence=8),
        recorded(b"datagram", protocol=17),
    ]
    payload = _reassemble(b"".join(packets))
    assert payload.startswith(b"abcdefghi" + b"other" + b"again")
    assert payload.endswith(b"datagram")
