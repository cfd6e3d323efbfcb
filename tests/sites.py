"""Three sites with keys, a session file and images, as their users set them up."""

from pathlib import Path
import socket
import subprocess
import sys
import time

import nibabel as nib
import numpy as np

from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC

ROLES = {"moving": MOVING, "static": STATIC, "helper": HELPER}
REVEAL = {"affine": "histogram", "syn": "update"}


def free_port():
    """A port of the loopback interface that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Sites:
    """Keys, session file and images of three sites in one folder.

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
    ):
        self.folder, self.operation = Path(folder), operation
        self._hosts = hosts
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
            addresses = {n: f"127.0.0.1:{free_port()}" for n in ("static", "helper")}
        self.addresses = addresses
        self.identities = {n: create_identity(f"Site {n}") for n in ROLES}
        for name, identity in self.identities.items():
            identity.save(self.folder / "keys" / name)
        self.parameters, self.timeouts = parameters or {}, timeouts or {}
        self.reveal = reveal or REVEAL[operation]
        self.file = self.write("session.toml")

    def write(self, name, **changed):
        """Write a session file; entries of `changed` replace those of the sites."""
        entries = {
            "title": "a test",
            "operation": self.operation,
            "reveal": self.reveal,
            **changed,
        }
        lines = [f"{k} = {_toml(v)}" for k, v in entries.items()]
        for site, identity in self.identities.items():
            lines += [f"[parties.{site}]", f'name = "Site {site}"']
            lines.append(f'fingerprint = "{identity.fingerprint}"')
            if site in self.addresses:
                lines.append(f'address = "{self.addresses[site]}"')
        for table in ("parameters", "timeouts"):
            lines.append(f"[{table}]")
            lines += [f"{k} = {_toml(v)}" for k, v in getattr(self, table).items()]
        path = self.folder / name
        path.write_text("\n".join(lines) + "\n")
        return path

    def argv(self, site, *extra):
        """The command that a site's user types."""
        if site == "helper":
            words = ["helper", str(self.file)]
        else:
            pair = {n: "remote" for n in ("static", "moving")}
            pair[site] = str(self.folder / f"{site}.nii.gz")
            words = [f"align_{self.operation}", pair["static"], pair["moving"]]
            words += ["--session", str(self.file)]
        code = (
            "import sys; from dipy_ppir.workflows import cli; "
            f"sys.argv[0] = 'dipy_ppir_{words[0]}'; sys.exit(cli.{words[0]}())"
        )
        return [
            *(sys.executable, "-c", code, *words[1:]),
            *("--identity", str(self.folder / "keys" / site)),
            *("--out_dir", str(self.folder / f"out_{site}"), *extra),
        ]

    def start(self, *extra, sites=tuple(ROLES)):
        """Start the commands of all sites; returns the processes by site."""
        processes = {}
        for site in sites:
            with open(self.folder / f"{site}.log", "w") as log:
                options = {"stdout": log, "stderr": subprocess.STDOUT}
                argv = self.argv(site, *extra)
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

    def wait(self, processes, timeout=120):
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

    def run(self, *extra, timeout=120):
        """Run the commands of all sites; they must succeed."""
        statuses = self.wait(self.start(*extra), timeout)
        logs = "\n".join(f"--- {s}\n{self.log(s)}" for s in statuses)
        assert set(statuses.values()) == {0}, logs

    def outputs(self, site):
        """Names of the files in a site's output folder."""
        folder = self.folder / f"out_{site}"
        return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _toml(value):
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value)) if isinstance(value, (list, tuple)) else repr(value)
