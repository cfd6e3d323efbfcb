"""Sessions of sites that add up, in one process, for tests."""

from itertools import combinations
import secrets
import socket

from dipy_ppir.mpc.ledger import declare
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.sums import EVERYBODY, SumSession

declare("test-sum", EVERYBODY, "any", "what a test adds up", 63)


def local_sites(count, *, timeout=300.0):
    """Sessions of so many sites, joined by socket pairs, to be run in threads."""
    links, seeds = ([{} for _ in range(count)] for _ in range(2))
    for i, j in combinations(range(count), 2):
        a, b = socket.socketpair()
        links[i][j] = Link(a, j, f"the site {j + 1}")
        links[j][i] = Link(b, i, f"the site {i + 1}")
        seeds[i][j] = seeds[j][i] = secrets.token_bytes(32)
    return [SumSession(p, links[p], seeds[p], timeout=timeout) for p in range(count)]
