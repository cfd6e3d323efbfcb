"""Short runs that end with a receipt, as between sites or as on one machine."""

import numpy as np
from parties import run_trio
from summing import local_sites

from dipy_ppir.mpc.identity import create_identity
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.planfile import PlanFile
from dipy_ppir.mpc.protocols import share
from dipy_ppir.mpc.sessionfile import SessionFile

IDENTITIES = {pid: create_identity(f"Site {pid}") for pid in ROLES}


def plan_of_sites():
    """A session file of three sites."""
    parties = {
        name: {"name": f"Site {pid}", "fingerprint": IDENTITIES[pid].fingerprint}
        for name, pid in (("moving", MOVING), ("static", STATIC), ("helper", HELPER))
    }
    parties["helper"]["address"] = "127.0.0.1:7433"
    return SessionFile.parse(
        {"title": "a test", "operation": "affine", "parties": parties}
    )


def run(session, **facts):
    """Open something; returns the receipt."""
    session.agree("test", {"a": 1})
    with session.phase("first"):
        a = share(session, MOVING, np.ones(10), (10,), bound=3)
        session.open(a, "test-moving", (MOVING,))
    return session.receipt(**facts)


def run_of_sites(session, **facts):
    """The same between sites, whose connections do not matter here."""
    session.plan, session._identity = plan_of_sites(), IDENTITIES[session.pid]
    return run(session, **facts)


def receipts_of_templates(count, **facts):
    """Receipts of so many sites that add something up, as between sites."""
    identities = {pid: create_identity(f"Clinic {pid}") for pid in range(count)}
    sites = [
        {
            "name": f"Clinic {pid}",
            "fingerprint": identity.fingerprint,
            "address": f"clinic{pid}.example:7433",
        }
        for pid, identity in identities.items()
    ]
    plan = PlanFile.parse({"title": "a test", "operation": "template", "sites": sites})
    sessions = local_sites(count)

    def site(session):
        session.plan, session._identity = plan, identities[session.pid]
        session.roles = {pid: party.role for pid, party in plan.parties.items()}
        session.new_run()
        session.agree("template", {"a": 1})
        session.total(np.full(9, session.pid), "test-sum", 100)
        return session.receipt(operation="template", **facts)

    try:
        return run_trio(sessions, site)
    finally:
        for session in sessions:
            session.close()
