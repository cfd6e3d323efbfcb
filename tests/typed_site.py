"""A site's program that uses what is public of sessions, for `make types` to check."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dipy_ppir.mpc.arrays import OwnedArray
from dipy_ppir.mpc.errors import PeerError
from dipy_ppir.mpc.identity import Identity, create_identity, signed_by
from dipy_ppir.mpc.ledger import MOVING, ROLES, STATIC, Declaration, declare
from dipy_ppir.mpc.receipt import receipt_text
from dipy_ppir.mpc.record import array_hash, common_digest
from dipy_ppir.mpc.session import Session
from dipy_ppir.mpc.sessionfile import Party, SessionFile

#: What the static owner tells the moving one.
VOLUME: Declaration = declare("site-volume", [MOVING], "1", "the brain's volume", 64)


def make_key(folder: Path, name: str) -> str:
    """Write a key; its fingerprint, that the others pin."""
    identity: Identity = create_identity(name, days=365)
    identity.save(folder)
    signed = identity.sign(b"hello")
    if not signed_by(identity.fingerprint, b"hello", signed):
        raise ValueError("the key does not sign")
    return identity.fingerprint


def who_dials(path: Path) -> dict[str, list[str]]:
    """The parties that each of a session file's dials, by role."""
    plan = SessionFile.read(path)
    parties: dict[int, Party] = plan.parties
    return {
        ROLES[pid]: [parties[peer].endpoint for peer in plan.dials(pid)]
        for pid in parties
    }


def tell_volume(session: Session, volume: float | None) -> float | None:
    """Open a number of the static owner's to the moving owner."""
    values = None if volume is None else np.array([volume])
    with session.phase("volume"):
        opened: npt.NDArray[Any] | None = session.open(
            OwnedArray(STATIC, values, (1,), np.float64), VOLUME.label, [MOVING]
        )
    return None if opened is None else float(opened[0])


def run(path: Path, folder: Path, volume: float | None) -> str:
    """Take part in a session; its receipt in words."""

    def show(missing: list[Party], left: float) -> None:
        print(", ".join(party.title for party in missing), f"{left:.0f} s left")

    try:
        with Session.load(path, identity=folder, on_wait=show) as session:
            session.agree("volume", {"unit": "ml"})
            tell_volume(session, volume)
            receipt = session.receipt(operation="volume")
    except PeerError as exc:
        raise SystemExit(f"party {exc.culprit}: {exc}") from exc
    if volume is not None:
        receipt["arrays"] = array_hash(receipt["run"], np.array([volume]))
    return f"{receipt_text(receipt)}\n{common_digest(receipt)}"
