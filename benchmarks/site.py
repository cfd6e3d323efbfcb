"""One party of a timed registration between hosts: run as a program.

``site.py FILE IDENTITY [IMAGE]`` meets the others by the session file, registers, and
prints as JSON how long that took and what it sent.
"""

import json
import sys
import time

import nibabel as nib

from dipy_ppir.align import affine_registration, syn_registration
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.session import Session

FUNCTIONS = {"affine": affine_registration, "syn": syn_registration}


def main(file, identity, image=None):
    """Take part, and print the figures."""
    evaluations = []
    with Session.load(file, identity=identity) as session:
        arguments = {"static": "remote", "moving": "remote"}
        if image is not None:
            name = "moving" if session.pid == MOVING else "static"
            read = nib.load(image)
            arguments[name] = read.get_fdata()
            arguments[f"{name}_affine"] = read.affine
        start = time.perf_counter()
        *_, receipt = FUNCTIONS[session.plan.operation](
            session=session,
            callback=lambda *_: evaluations.append(1),
            ret_receipt=True,
            **arguments,
            **session.parameters,
        )
        seconds = time.perf_counter() - start
    figures = {"seconds": seconds, "bytes": receipt["bytes_total"]}
    figures["evaluations"] = len(evaluations)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
