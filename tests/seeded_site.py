"""One party of a registration with randomness that a test chose: run as a program.

``seeded_site.py CONFIG`` reads a JSON file. The parties meet either by a session file,
as sites do, or as processes of one machine do; everything else is the same, down to
the last random bit. For comparisons only: who knows the seeds knows the images.
"""

import hashlib
import json
from pathlib import Path
import secrets
import sys
import time

import nibabel as nib
import numpy as np

from dipy_ppir.align import RemoteImage, affine_registration, syn_registration
from dipy_ppir.mpc import authentication, party, session, tls
from dipy_ppir.mpc.prg import Stream

FUNCTIONS = {"affine": affine_registration, "syn": syn_registration}


def seed(one, other):
    """What two parties share."""
    return hashlib.sha256(b"test" + bytes(sorted((one, other)))).digest()


def choose_randomness(pid):
    """Make everything random here a function of the party's number."""
    stream = Stream(hashlib.sha256(b"own %d" % pid).digest())

    def token_bytes(n=32):
        out = bytearray(n)
        stream.fill(out)
        return bytes(out)

    def randbelow(n):
        return int.from_bytes(token_bytes(32)) % n

    fixed = np.random.Generator(np.random.PCG64(pid))
    secrets.token_bytes, secrets.randbelow = token_bytes, randbelow
    np.random.default_rng = lambda *_: fixed
    tls.TLSSocket.seed = lambda self, _: seed(pid, self.party.pid)
    authentication.authenticate = lambda link, pid, token, timeout: seed(pid, link.peer)


def main(config):
    """Take part, and save what this party gets."""
    pid, images = config["pid"], config["images"]
    choose_randomness(pid)
    arguments = {}
    for owner, name in enumerate(("moving", "static")):
        image = nib.load(images[name])
        data = np.asarray(image.dataobj, dtype=np.float64)
        if pid == owner:
            arguments[name], arguments[f"{name}_affine"] = data, image.affine
        elif "session" in config:
            arguments[name] = "remote"
        else:
            arguments[name] = RemoteImage(data.shape, image.affine)
    if "session" in config:
        own = session.Session.load(config["session"], identity=config["identity"])
    else:
        listener = None
        if pid < 2:
            import socket

            listener = socket.create_server(tuple(config["addresses"][pid]))
            Path(config["listens"][pid]).touch()
        # Whoever is dialled must listen already; the test ends whoever waits in vain.
        while not all(Path(file).exists() for file in config["listens"][:pid]):
            time.sleep(0.01)
        own = party.meet(
            pid, bytes(32), [tuple(a) for a in config["addresses"]], listener, 300.0
        )
    function = FUNCTIONS[config["operation"]]
    with own:
        *_, result = function(session=own, **arguments, **config["parameters"])
    if pid == 0:
        arrays = {"matrix": result}
        if config["operation"] == "syn":
            arrays = {"forward": result.forward, "backward": result.backward}
        np.savez(config["out"], **arrays)


if __name__ == "__main__":
    main(json.loads(open(sys.argv[1]).read()))
