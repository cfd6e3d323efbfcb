"""Hosts on a network of their own, all on one machine: Linux network namespaces.

Each host is a namespace with one interface, ``eth0``, and all of them are on one
network. It is a bridge, as fast as the machine goes, or, where a delay, a rate or a
firewall is asked for, an emulator: a process that reads packets from one TUN device
per host and writes each to the host it is for when it is due there. The hosts give
it what they would give a network card, segments of up to 64 kB that it would cut to
packets of usual size, so it keeps up while TCP behaves as on a real line.

Needs root and iproute2's ``ip``. Run as a program, this file is the emulator or
records packets; it imports nothing but the standard library.
"""

from contextlib import ExitStack, contextmanager, suppress
import fcntl
import heapq
import itertools
import mmap
import os
from pathlib import Path
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

QUEUE = 0.25  # seconds that a packet may wait for a link before it is dropped
TCP_WINDOW = "4096 131072 67108864"  # least, first and largest, in bytes
VNET_HEADER = 10  # bytes before each packet of a TUN device: how it is to be cut
SYN, ACK = 0x02, 0x10

_numbers = itertools.count()


def _ip(*arguments):
    """Output of the command ``ip``; OSError says what it complained about."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _widen_windows(namespace):
    """Let TCP connections have windows of up to 64 MiB."""
    command = "cd /proc/sys/net/ipv4; for limits in tcp_rmem tcp_wmem"
    command += f"; do echo {TCP_WINDOW} > $limits || exit; done"
    _ip("netns", "exec", namespace, "sh", "-c", command)


def _remove(namespace):
    """Kill what runs in a namespace and remove it."""
    deadline = time.monotonic() + 120
    while pids := _ip("netns", "pids", namespace).split():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            raise OSError(f"processes {pids} in {namespace} cannot be killed")
        time.sleep(0.01)
    _ip("netns", "delete", namespace)


def _remove_orphans():
    """Remove the namespaces of processes that were killed before they could."""
    for name, pid in re.findall(r"^(pp(\d+)-\S+)", _ip("netns"), re.MULTILINE):
        if not Path("/proc", pid).exists():
            with suppress(OSError):  # another process may be removing it as well
                _remove(name)


def unavailable():
    """Why hosts cannot be made here.

    Returns
    -------
    str or None
        The reason; None if they can, which is found out by trying.
    """
    if not sys.platform.startswith("linux"):
        return "network namespaces are a feature of Linux"
    if not shutil.which("ip"):
        return "no command ip (package iproute2)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    namespace = f"pp{os.getpid()}-{next(_numbers)}-trial"
    inside = "-n", namespace
    try:
        _ip("netns", "add", namespace)
        try:
            _ip(*inside, "link", "add", "name", "bridge", "type", "bridge")
            _ip(*inside, "link", "add", "name", "one", "type", "veth")
            _ip(*inside, "tuntap", "add", "dev", "tun", "mode", "tun")
            _widen_windows(namespace)
        finally:
            _remove(namespace)
    except OSError as error:
        return f"network namespaces are not allowed: {error}"
    return None


class Hosts:
    """Hosts on one network, there inside a ``with`` block and removed after it.

    Parameters
    ----------
    names : sequence of str
        Names of the hosts.
    delay : float
        Round-trip time between any two hosts, in seconds.
    rate : float, optional
        Bits per second of each host's link, in each direction.
    firewalled : sequence of str
        Hosts that no TCP connection reaches: what asks for one is dropped without
        an answer. They can connect to others.

    Notes
    -----
    A TCP connection carries one window per round trip at most. The hosts allow
    windows of up to 64 MiB (``net.ipv4.tcp_rmem`` and ``tcp_wmem``), more than most
    systems do, so that the line is the limit; all else is as the kernel has it. A
    packet that would have to wait for a link longer than `QUEUE` is dropped.
    """

    def __init__(
        self,
        names=("moving", "static", "helper"),
        *,
        delay=0.0,
        rate=None,
        firewalled=(),
    ):
        self.names = tuple(names)
        self._prefix = f"pp{os.getpid()}-{next(_numbers)}-"
        self._closed = [self.names.index(name) for name in firewalled]
        self._line = float(delay), float(rate or "inf")
        self._emulated = bool(delay or rate or firewalled)
        self._emulator = None
        self._processes = []
        self._undo = ExitStack()

    def __enter__(self):
        _remove_orphans()
        with ExitStack() as undo:
            for name in (*self.names, "network"):
                _ip("netns", "add", self._prefix + name)
                undo.callback(_remove, self._prefix + name)
            undo.callback(self._kill)
            if self._emulated:
                self._start_emulator()
            else:
                self._start_bridge()
            for name in self.names:
                self._set_up(name)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception):
        self._undo.close()

    def _kill(self):
        for process in self._processes:
            process.kill()
            process.wait()
        if self._emulator:
            self._emulator.stdin.close()
            self._emulator.stdout.close()

    def _start_bridge(self):
        network = self._prefix + "network"
        _ip("-n", network, "link", "add", "name", "bridge", "type", "bridge")
        _ip("-n", network, "link", "set", "bridge", "up")
        for i, name in enumerate(self.names):
            peer = "peer", "name", "eth0", "netns", self._prefix + name
            _ip("-n", network, "link", "add", f"port{i}", "type", "veth", *peer)
            _ip("-n", network, "link", "set", f"port{i}", "master", "bridge", "up")

    def _start_emulator(self):
        options = [*self._line, len(self.names), *self._closed]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._emulator = self._popen_self("network", "emulate", *options, **pipes)
        self._emulator.stdout.readline()
        for i, name in enumerate(self.names):
            place = "netns", self._prefix + name, "name", "eth0"
            _ip("-n", self._prefix + "network", "link", "set", f"port{i}", *place)

    def _set_up(self, name):
        namespace = self._prefix + name
        address = f"{self.address(name)}/16"
        _ip("-n", namespace, "address", "add", address, "dev", "eth0")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "link", "set", "eth0", "txqueuelen", "10000", "up")
        _widen_windows(namespace)

    def address(self, name):
        """IPv4 address of a host.

        Parameters
        ----------
        name : str
            Name of the host.

        Returns
        -------
        str
            The address.
        """
        return f"10.77.{self.names.index(name) + 1}.1"

    def namespace(self, name):
        """File of the network namespace that is a host.

        Parameters
        ----------
        name : str
            Name of the host.

        Returns
        -------
        str
            The file, for ``setns``.
        """
        return f"/run/netns/{self._prefix}{name}"

    def popen(self, name, argv, **options):
        """Start a program on a host; it is killed when the hosts are removed.

        Parameters
        ----------
        name : str
            Name of the host.
        argv : sequence of str
            The program and its arguments.
        **options
            For `subprocess.Popen`.

        Returns
        -------
        subprocess.Popen
            The process of the program itself.
        """
        command = [shutil.which("ip"), "netns", "exec", self._prefix + name, *argv]
        process = subprocess.Popen(command, **options)
        self._processes.append(process)
        return process

    def _popen_self(self, name, *arguments, **options):
        command = [sys.executable, "-I", __file__, *map(str, arguments)]
        return self.popen(name, command, **options)

    def traffic(self, name):
        """How much a host has sent and received.

        Parameters
        ----------
        name : str
            Name of the host.

        Returns
        -------
        sent, received : int
            Bytes, with what TCP and IP add.
        """
        files = "tx_bytes", "rx_bytes"
        files = [f"/sys/class/net/eth0/statistics/{file}" for file in files]
        return tuple(map(int, self.run(name, "cat", *files).split()))

    def run(self, name, *argv):
        """Run a program on a host until it ends.

        Parameters
        ----------
        name : str
            Name of the host.
        *argv : str
            The program and its arguments.

        Returns
        -------
        str
            What it printed.
        """
        return _ip("netns", "exec", self._prefix + name, *argv)

    def unplug(self, name):
        """Pull the cable of a host: packets are lost, and it is told of none.

        Parameters
        ----------
        name : str
            Name of the host.
        """
        self._plug(name, False)

    def plug(self, name):
        """Put the cable of a host back.

        Parameters
        ----------
        name : str
            Name of the host.
        """
        self._plug(name, True)

    def _plug(self, name, plugged):
        i = self.names.index(name)
        if self._emulated:
            self._emulator.stdin.write(b"%d %d\n" % (i, plugged))
            self._emulator.stdin.flush()
            self._emulator.stdout.readline()
        else:
            state = "up" if plugged else "down"
            _ip("-n", self._prefix + "network", "link", "set", f"port{i}", state)

    @contextmanager
    def capture(self):
        """Record all packets, each where it reaches a host.

        Yields
        ------
        Packets
            What was recorded; to be used after the block.

        Raises
        ------
        RuntimeError
            If not every packet could be recorded.
        """
        packets = Packets()
        files, recorders = [], []
        try:
            for name in self.names:
                file = tempfile.TemporaryFile()
                files.append(file)
                pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
                recorder = self._popen_self(name, "record", stdout=file, **pipes)
                recorders.append(recorder)
            for recorder in recorders:
                recorder.stderr.readline()
            yield packets
        finally:
            notes = [recorder.communicate()[1] for recorder in recorders]
            packets._read(files)
        if notes != [b"0 lost\n"] * len(notes):
            raise RuntimeError(f"not every packet was recorded: {notes}")


class Packets:
    """Packets that were recorded."""

    def __init__(self):
        self._content = None  # until they have all been read

    def payload(self):
        """What the packets carry.

        Returns
        -------
        bytes
            The bytes of every TCP connection and direction, in their order and
            without repetitions, one after another; then all other packets, whole.
        """
        return self._content

    def contains(self, needle):
        """Whether the packets carry something.

        Parameters
        ----------
        needle : bytes
            What to look for.

        Returns
        -------
        bool
            True if it is in one of them or goes over the bounds of several.
        """
        return needle in self._content

    def _read(self, files):
        """Take the payload from the files of the recorders, and close them."""
        content = bytearray()
        for file in files:
            with file:
                if os.fstat(file.fileno()).st_size:
                    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                        content += _reassemble(data)
        self._content = bytes(content)


def _reassemble(data):
    """Payload of recorded packets."""
    flows, current, others = [], {}, bytearray()
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("=I", data, place)
        start, place = place + 4, place + 4 + length
        if not _is_tcp(data, start):
            others += data[start:place]
            continue
        tcp = start + 4 * (data[start] & 15)
        end = start + int.from_bytes(data[start + 2 : start + 4])
        ends, sequence = struct.unpack_from("!4sI", data, tcp)
        key = data[start + 12 : start + 20] + ends
        begins = data[tcp + 13] & SYN
        if begins or key not in current:
            current[key] = []
            flows.append(current[key])
        flow = current[key]
        if flow:  # sequence numbers start anywhere and wrap
            last = flow[-1][0]
            sequence = last + (sequence - last + 2**31) % 2**32 - 2**31
        body = tcp + 4 * (data[tcp + 12] >> 4)
        flow.append((sequence + bool(begins), body, end))
    content = bytearray()
    for flow in flows:
        reached = min(flow)[0]
        for sequence, body, end in sorted(flow):
            known = max(0, reached - sequence)
            content += data[body + known : max(end, body + known)]
            reached = max(reached, sequence + end - body)
    return content + others


def _is_tcp(packet, start):
    return packet[start] >> 4 == 4 and packet[start + 9] == socket.IPPROTO_TCP


def _record():
    """Write the packets that come in to standard output, until the input ends."""
    level, statistics, ignore_outgoing, force_buffer, everything = 263, 6, 23, 33, 3
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    tap.setsockopt(level, ignore_outgoing, 1)
    tap.setsockopt(socket.SOL_SOCKET, force_buffer, 2**29)
    tap.bind(("eth0", everything))
    tap.setblocking(False)
    print("ready", file=sys.stderr, flush=True)
    packet = memoryview(bytearray(2**17))
    running = True
    while running:
        running = sys.stdin not in select.select([sys.stdin, tap], [], [])[0]
        with suppress(BlockingIOError):
            while True:
                length, (_, _, addressee, *_) = tap.recvfrom_into(packet)
                if addressee != socket.PACKET_OTHERHOST:  # a bridge may send to all
                    sys.stdout.buffer.write(struct.pack("=I", length))
                    sys.stdout.buffer.write(packet[:length])
    sys.stdout.flush()
    _, lost = struct.unpack("=II", tap.getsockopt(level, statistics, 8))
    print(f"{lost} lost", file=sys.stderr)


class _Link:
    """One direction of a host's cable."""

    def __init__(self, rate):
        self.pace = 8 / rate  # seconds per byte
        self.free = 0.0  # when it has sent all that waits for it

    def cross(self, due, length):
        """When a packet that comes to the link has crossed it; None if dropped."""
        if self.free > due + QUEUE:
            return None
        self.free = max(due, self.free) + length * self.pace
        return self.free


def _open_tun(name):
    set_interface, set_offloads = 0x400454CA, 0x400454D0
    tun, no_information, vnet_header, checksums, tcp4 = 0x1, 0x1000, 0x4000, 0x1, 0x2
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = tun | no_information | vnet_header
    fcntl.ioctl(device, set_interface, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, set_offloads, checksums | tcp4)
    return device


def _emulate(delay, rate, hosts, *closed):
    """Carry packets between hosts; lines of input plug and unplug them.

    A packet waits for the sender's link and crosses it, then the network, then
    waits for the receiver's, which it enters as soon as its first byte is there.
    """
    tuns = [_open_tun(f"port{i}") for i in range(hosts)]
    plugged = [True] * hosts
    sending = [_Link(rate) for _ in tuns]
    receiving = [_Link(rate) for _ in tuns]
    order = itertools.count()
    events = []  # (when, order, whether it has arrived, target, packet)
    with suppress(PermissionError):
        os.nice(-10)  # a network does not slow down when the hosts compute
    print("ready", flush=True)
    while True:
        while events and events[0][0] <= time.monotonic():
            now, _, arrived, target, packet = heapq.heappop(events)
            length = len(packet) - VNET_HEADER
            if not arrived:
                first = now - length * sending[target].pace
                if due := receiving[target].cross(first, length):
                    event = due + delay / 2, next(order), True, target, packet
                    heapq.heappush(events, event)
            elif plugged[target]:
                with suppress(OSError):
                    os.write(tuns[target], packet)
        wait = max(0, events[0][0] - time.monotonic()) if events else None
        for ready in select.select([0, *tuns], [], [], wait)[0]:
            if ready == 0:
                orders = os.read(0, 2**16)
                if not orders:  # whoever started this is gone
                    return
                for line in orders.splitlines():
                    host, state = map(int, line.split())
                    plugged[host] = bool(state)
                    print("done", flush=True)
                continue
            source = tuns.index(ready)
            for packet in _waiting(ready):
                target = _target(packet, hosts)
                refused = target in closed and _asks_to_connect(packet)
                if target is None or refused or not plugged[source]:
                    continue
                length = len(packet) - VNET_HEADER
                if due := sending[source].cross(time.monotonic(), length):
                    event = due, next(order), False, target, packet
                    heapq.heappush(events, event)


def _waiting(tun):
    """Packets that wait in a TUN device, but not more than a few."""
    with suppress(BlockingIOError):
        for _ in range(32):
            yield os.read(tun, 2**17)


def _target(packet, hosts):
    """Index of the host that an IPv4 packet is for; None if it is for none."""
    version, host = packet[VNET_HEADER] >> 4, packet[VNET_HEADER + 18] - 1
    known = packet[VNET_HEADER + 16 : VNET_HEADER + 18] == b"\x0a\x4d"
    return host if version == 4 and known and 0 <= host < hosts else None


def _asks_to_connect(packet):
    if not _is_tcp(packet, VNET_HEADER):
        return False
    flags = packet[VNET_HEADER + 4 * (packet[VNET_HEADER] & 15) + 13]
    return flags & (SYN | ACK) == SYN


if __name__ == "__main__":
    if sys.argv[1] == "record":
        _record()
    else:
        line, indices = map(float, sys.argv[2:4]), map(int, sys.argv[4:])
        _emulate(*line, *indices)
