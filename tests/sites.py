"""Sites with keys, a session file and images, as their users set them up.

Run as a program, this file is what a `Launcher` starts.
"""

import ctypes
import importlib
import json
import os
from pathlib import Path
import runpy
import select
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np

from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC

ROLES = {"moving": MOVING, "static": STATIC, "helper": HELPER}
REVEAL = {"affine": "histogram", "syn": "map", "freeform": "steps"}
#: Seconds that a command may take: for those that hang, not for those that are slow.
LIMIT = 300

# What follows runs in the process of a command, before the command does.

#: Makes everything random a function of the party's number.
SEEDED = f"""
import sys
sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})
import seeded_site
seeded_site.choose_randomness({{pid}})
"""
#: Without masks, and with the same noise in all that is opened: a run ends with the
#: same bits, however often it was interrupted.
NOISELESS = """
from types import SimpleNamespace
from dipy_ppir.mpc import protocols, session
session.Session.__init__.__kwdefaults__.update(threshold=0, insecure=True)
protocols.secrets = SimpleNamespace(token_bytes=bytes, randbelow=lambda n: n // 2)
"""


def _environment():
    """Variables of the commands: libraries with threads would wait for one another.

    Three parties, each with as many threads as there are processors, spend most of
    their time in waiting for threads that have none; and threads cannot be copied.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Sites:
    """Keys, session file and images of three sites, or of two, in one folder.

    Parameters
    ----------
    folder : Path
    operation : str
    images : tuple
        static, moving, and their affines.
    parameters, timeouts : dict, optional
        entries of the session file.
    addresses : dict, optional
        maps sites to "host:port"; by default the helper's and the static owner's are
        on the loopback interface.
    reveal : str, optional
    hosts : Hosts, optional
        where the sites' programs run; by default on this machine.
    before : str, optional
        Python code that each site's program runs first; ``{pid}`` is the site's number.
    fresh : bool, optional
        whether each program is a new process of Python, as for users, also where a
        `Launcher` runs.
    pictures : bool, optional
        whether owners make pictures and reports, which takes seconds.
    alone : bool, optional
        whether two owners are alone; the static one has an address then.
    ahead : bool, optional
        whether the helper deals before the owners meet, beside the session file.
    """

    def __init__(
        self,
        folder,
        operation,
        images,
        *,
        parameters=None,
        timeouts=None,
        addresses=None,
        reveal=None,
        hosts=None,
        before="",
        fresh=False,
        pictures=False,
        alone=False,
        ahead=False,
    ):
        self.pictures, self.ahead = pictures, ahead
        self.alone, self.names = alone, [n for n in ROLES if not alone or n != "helper"]
        self.folder, self.operation = Path(folder), operation
        self._hosts, self._before, self._fresh = hosts, before, fresh
        self.folder.mkdir(parents=True, exist_ok=True)
        static, moving, static_grid2world, moving_grid2world = images
        for name, data, matrix in (
            ("static", static, static_grid2world),
            ("moving", moving, moving_grid2world),
        ):
            nib.save(
                nib.Nifti1Image(np.asarray(data, dtype=np.float32), matrix),
                self.folder / f"{name}.nii.gz",
            )
        if addresses is None:
            from ports import free_port

            addresses = {n: f"127.0.0.1:{free_port()}" for n in self.names[1:]}
            if ahead:
                del addresses["helper"]
        self.addresses = addresses
        self.identities = {n: create_identity(f"Site {n}") for n in self.names}
        for name, identity in self.identities.items():
            identity.save(self.folder / "keys" / name)
        self.parameters, self.timeouts = parameters or {}, timeouts or {}
        self.limits = {}
        self.reveal = reveal or REVEAL[operation]
        self.file = self.write("session.toml")

    def write(self, name, **changed):
        """Write a session file; entries of `changed` replace those of the sites."""
        entries = {
            "title": "a test",
            "operation": self.operation,
            "reveal": self.reveal,
            **({"helper": "none"} if self.alone else {}),
            **({"helper": "ahead"} if self.ahead else {}),
            **changed,
        }
        lines = [f"{k} = {_toml(v)}" for k, v in entries.items()]
        for site, identity in self.identities.items():
            lines += [f"[parties.{site}]", f'name = "Site {site}"']
            lines.append(f'fingerprint = "{identity.fingerprint}"')
            if site in self.addresses:
                lines.append(f'address = "{self.addresses[site]}"')
        for site in ("moving", "static") if self.ahead else ():
            image = nib.load(self.folder / f"{site}.nii.gz")
            lines += [f"[deal.{site}]", f"shape = {_toml(image.shape)}"]
            lines.append(f"grid2world = {_toml(image.affine.tolist())}")
            lines.append(f'sealing = "{self.identities[site].sealing}"')
        for table in ("parameters", "timeouts", "limits"):
            lines.append(f"[{table}]")
            lines += [f"{k} = {_toml(v)}" for k, v in getattr(self, table).items()]
        path = self.folder / name
        path.write_text("\n".join(lines) + "\n")
        return path

    def argv(self, site, *extra, before=""):
        """The command that a site's user types, and code to run before it."""
        if site == "helper":
            words = ["helper", str(self.file), *(["--deal"] if self.ahead else [])]
        else:
            pair = dict.fromkeys(("static", "moving"), "remote")
            pair[site] = str(self.folder / f"{site}.nii.gz")
            words = [f"align_{self.operation}", pair["static"], pair["moving"]]
            words += ["--session", str(self.file)]
            words += [] if self.pictures else ["--no_pictures"]
        code = (
            "import sys; from dipy_ppir.workflows import cli; "
            f"sys.argv[0] = 'dipy_ppir_{words[0]}'; sys.exit(cli.{words[0]}())"
        )
        before = self._before.format(pid=ROLES[site]) + before
        out = self.folder / f"out_{site}"
        if site == "helper" and self.ahead:
            out = self.file.parent
        return [
            *(sys.executable, "-c", before + "\n" + code, *words[1:]),
            *("--identity", str(self.folder / "keys" / site)),
            *("--out_dir", str(out), *extra),
        ]

    def start(self, *extra, sites=None, before=None):
        """Start the commands of all sites, or some; returns the processes by site.

        `before` maps sites to code that their programs run first.
        """
        processes = {}
        for site in sites or self.names:
            argv = self.argv(site, *extra, before=(before or {}).get(site, ""))
            log = self.folder / f"{site}.log"
            if Launcher.running and not self._fresh:
                space = self._hosts and self._hosts.namespace(site)
                processes[site] = Launcher.running.popen(argv, log, space)
                continue
            with open(log, "w") as stream:
                options = {"stdout": stream, "stderr": subprocess.STDOUT}
                options["env"] = _environment()
                if self._hosts is None:
                    processes[site] = subprocess.Popen(argv, **options)
                else:
                    processes[site] = self._hosts.popen(site, argv, **options)
        return processes

    def log(self, site):
        """What a site's command printed."""
        return (self.folder / f"{site}.log").read_text()

    def last_line(self, site):
        """The last line that a site's command printed."""
        return self.log(site).strip().splitlines()[-1]

    def wait(self, processes, timeout=LIMIT):
        """Wait for all commands; returns their exit statuses by site.

        A command that does not end in time is killed, and the test fails.
        """
        deadline = time.monotonic() + timeout
        try:
            return {
                site: process.wait(max(deadline - time.monotonic(), 0.1))
                for site, process in processes.items()
            }
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def run(self, *extra, timeout=LIMIT, **options):
        """Run the commands of all sites; they must succeed. Options: see `start`."""
        if self.ahead and "sites" not in options:
            self.run(sites=["helper"], timeout=timeout)
            options = {**options, "sites": self.names[:2]}
        statuses = self.wait(self.start(*extra, **options), timeout)
        logs = "\n".join(f"--- {s}\n{self.log(s)}" for s in statuses)
        assert set(statuses.values()) == {0}, logs

    def outputs(self, site):
        """Names of the files in a site's output folder."""
        folder = self.folder / f"out_{site}"
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


class PointSites(Sites):
    """Sites that have points: arrays of shape (n, dim)."""

    def __init__(self, folder, moving, static, **options):
        one = np.zeros((1, 1, 1)), np.zeros((1, 1, 1)), np.eye(4), np.eye(4)
        super().__init__(folder, "points", one, reveal="transform", **options)
        np.savetxt(self.folder / "moving.txt", moving)
        np.savetxt(self.folder / "static.txt", static)

    def argv(self, site, *extra, before=""):
        words = super().argv(site, *extra, before=before)
        return [w.replace(".nii.gz", ".txt") for w in words]


def _toml(value):
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value)) if isinstance(value, (list, tuple)) else repr(value)


class Launcher:
    """Starts Python code in processes that have imported the package already.

    What takes a command a second or two, and three of them more, is done once: a
    process imports what the commands need and is copied for each of them. Inside a
    ``with`` block `Sites` starts its commands so. Does nothing where not on Linux,
    whose libraries can be copied along.
    """

    running = None
    _modules = (
        "dipy.workflows.flow_runner",
        "dipy_ppir.workflows.align",
        "dipy_ppir.workflows.syn",
        "dipy_ppir.workflows.sites",
        "OpenSSL.SSL",
    )

    def __enter__(self):
        if sys.platform != "linux":
            return self
        self._heard, self._ends = b"", {}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=_environment(),
        )
        Launcher.running = self
        return self

    def __exit__(self, *exception):
        if Launcher.running is self:
            Launcher.running = None
            self._process.stdin.close()  # ends it, and all that it started
            self._process.wait()
            self._process.stdout.close()

    def popen(self, argv, log=None, namespace=None):
        """Start Python code; a process with some methods of `subprocess.Popen`.

        Parameters
        ----------
        argv : sequence of str
            [sys.executable, "-c", code, ...]
        log : Path, optional
            file for all output.
        namespace : str, optional
            network namespace, a file.
        """
        _, flag, code, *arguments = argv
        assert flag == "-c"
        self._say(
            code=code, arguments=arguments, log=log and str(log), namespace=namespace
        )
        while "started" not in self._ends:
            self._hear(None)
        return _Launched(self, self._ends.pop("started"))

    def _say(self, **order):
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    def _hear(self, timeout):
        """Take note of what has ended, and of one thing more within `timeout`."""
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        if not data:
            raise RuntimeError("the launcher has ended")
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            key, value = json.loads(line)
            if key == "started":
                self._ends.pop(value, None)  # of another one of that number
            self._ends[key] = value


class _Launched:
    """A process that a `Launcher` started."""

    def __init__(self, launcher, pid):
        self._launcher, self.pid, self.returncode = launcher, pid, None

    def poll(self):
        """Exit status as that of `subprocess.Popen`; None while it runs."""
        if self.returncode is None:
            self._launcher._hear(0)
            self.returncode = self._launcher._ends.pop(self.pid, None)
        return self.returncode

    def wait(self, timeout=LIMIT):
        """Exit status, when it has ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self._launcher._hear(left)
        return self.returncode

    def send_signal(self, number):
        """Send a signal, unless it has ended."""
        self._launcher._say(kill=self.pid, signal=int(number))

    def kill(self):
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def _launch():
    """Obey a `Launcher`; returns in the new processes only, each with its order."""
    replies = os.dup(1)
    os.dup2(2, 1)
    for module in Launcher._modules:
        importlib.import_module(module)
    heard = b""

    def receive():
        nonlocal heard
        data = os.read(0, 1 << 16)
        if not data:
            return None
        *lines, heard = (heard + data).split(b"\n")
        return map(json.loads, lines)

    def say(key, value):
        os.write(replies, json.dumps([key, value]).encode() + b"\n")

    # This folder is not where this process looks for modules.
    forking = runpy.run_path(str(Path(__file__).with_name("forking.py")))
    order = forking["fork_on_orders"](0, receive, say)
    os.close(replies)
    return order


def _become(code, arguments, log, namespace):
    """Be a process of ``python -c code arguments``."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if log:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.close(stream)
    if namespace:
        network = 0x40000000
        with open(namespace) as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), network):
                raise OSError(ctypes.get_errno(), "setns", namespace)
    sys.argv[:] = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    _become(**_launch())
