"""Sessions of three parties or two in one process, for tests."""

from concurrent.futures import ThreadPoolExecutor
import secrets
import socket
import threading

from dipy_ppir.mpc.errors import PeerError
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.pair import OWNERS, PairSession
from dipy_ppir.mpc.session import (
    DEFAULT_TIMEOUT,
    PARTIES,
    THRESHOLD,
    Session,
    check_setup,
)

#: Its `owner` is the number of one of two owners alone, in the thread of that one.
here = threading.local()


def local_trio(*, timeout=DEFAULT_TIMEOUT, threshold=THRESHOLD, insecure=False):
    """Three sessions joined by socket pairs inside one process.

    Run each in its own thread. The protocol is the deployed one, but one process
    holds all three shares.

    Returns
    -------
    sessions : list of Session
        moving owner, static owner, helper.
    """
    check_setup(PARTIES, threshold, insecure)
    links = {p: {} for p in ROLES}
    seeds = {p: {} for p in ROLES}
    for i, j in ((MOVING, STATIC), (MOVING, HELPER), (STATIC, HELPER)):
        a, b = socket.socketpair()
        links[i][j], links[j][i] = Link(a, j), Link(b, i)
        seeds[i][j] = seeds[j][i] = secrets.token_bytes(32)
    return [
        Session(
            p,
            links[p],
            seeds[p],
            timeout=timeout,
            threshold=threshold,
            insecure=insecure,
        )
        for p in sorted(ROLES)
    ]


def local_pair(*, timeout=DEFAULT_TIMEOUT):
    """Two sessions of owners alone, joined by a socket pair inside one process.

    Returns
    -------
    sessions : list of PairSession
        moving owner, static owner.
    """
    seed, ends = secrets.token_bytes(32), socket.socketpair()
    return [
        PairSession(
            p,
            {q: Link(end, q)},
            {q: seed},
            timeout=timeout,
        )
        for p, q, end in zip(OWNERS, reversed(OWNERS), ends, strict=True)
    ]


def run_trio(sessions, function, *args):
    """Run ``function(session, *args)`` at each session in its own thread.

    Returns
    -------
    results : list
        one per party. The first error of any party is raised, after all ended.
    """

    def one(session):
        here.owner = session.pid if len(sessions) == len(OWNERS) else None
        try:
            return function(session, *args)
        except BaseException as exc:
            session.fail(exc)
            raise

    with ThreadPoolExecutor(len(sessions)) as pool:
        futures = [pool.submit(one, s) for s in sessions]
        errors = [f.exception() for f in futures]
    root = [e for e in errors if e is not None and not isinstance(e, PeerError)]
    for error in root + [e for e in errors if e is not None]:
        raise error
    return [f.result() for f in futures]
