"""How parties of one machine make sure who is at the other end, without certificates.

By a token that only they know, and a key agreement. Between machines TLS does this, see
`tls`.
"""

import hashlib
import hmac

from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)

from dipy_ppir.mpc.errors import AuthenticationError
from dipy_ppir.mpc.ledger import Ledger
from dipy_ppir.mpc.network import Network
from dipy_ppir.mpc.prg import derive_key


def authenticate(link, pid, token, *, timeout):
    """Agree on a fresh secret with the party at the other end of `link`.

    Both ends send an ephemeral X25519 key; the pair's secret is derived from
    the key agreement, the session's `token` and the party numbers, and each
    end proves that it has it. An eavesdropper learns nothing; a stranger
    without the token is refused.

    Parameters
    ----------
    link : Link
        fresh connection.
    pid : int
        this party.
    token : bytes
        32-byte secret known to the parties of this session only.
    timeout : float
        seconds to wait for the peer.

    Returns
    -------
    seed : bytes
        32 bytes, known to the two ends only.

    Raises
    ------
    AuthenticationError
        if the peer does not have the token or claims another number.
    """
    ledger = Ledger()
    network = Network({link.peer: link}, timeout, lambda: ledger)
    private = X25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    network.send(link.peer, "hello", bytes([pid]) + public)
    theirs = bytearray(33)
    network.receive(link.peer, "hello", theirs)
    refused = AuthenticationError(
        f"{link.name} did not prove that it belongs to this session", link.peer
    )
    if theirs[0] != link.peer:
        raise refused
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(bytes(theirs[1:])))
    except ValueError:
        raise refused from None
    hellos = sorted([(pid, public), (link.peer, bytes(theirs[1:]))])
    transcript = b"".join(bytes([p]) + k for p, k in hellos)
    seed = derive_key(shared + token, b"pair" + transcript)

    def proof(party):
        key = derive_key(seed, b"proof")
        return hmac.new(key, bytes([party]) + transcript, hashlib.sha256).digest()

    network.send(link.peer, "proof", proof(pid))
    answer = bytearray(32)
    network.receive(link.peer, "proof", answer)
    if not hmac.compare_digest(bytes(answer), proof(link.peer)):
        raise refused
    return seed
