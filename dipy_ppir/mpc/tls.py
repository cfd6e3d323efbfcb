"""TLS 1.3 between parties that pinned each other's certificates.

`TLSSocket` behaves like a non-blocking socket, so that `link.Link` need not know
which of the two it has. Python's own ``ssl`` module cannot ask a client for a
certificate that no authority signed, so pyOpenSSL is used, which can. The only thing
checked is the one that was pinned: no authority, no host name, no second chance.
"""

import contextlib
import re
import select
import socket
import time

from OpenSSL import SSL

from dipy_ppir.mpc.errors import (
    CertificateError,
    OutOfStepError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.identity import certificate_name, fingerprint, validity_problem
from dipy_ppir.mpc.link import RDHUP

#: What a connection is for, as TLS negotiates it (ALPN); the number is the version.
LINK, RELAY = b"dipy-ppir/1", b"dipy-ppir-relay/1"
#: Who dials at another place of a row of sessions is told by these where this end is:
#: past the dialler's place, or not there yet. Both ends say it before certificates are
#: seen, to strangers as well: who dials at another place is often of a session whose
#: parties this end does not know, so that nothing could be said to it afterwards.
PAST, SOON = b"dipy-ppir-past/1", b"dipy-ppir-soon/1"
_PLACED = re.compile(rb"dipy-ppir(?:-relay)?/1 (\d{1,9})")
#: Seconds that a stranger may take to show a certificate.
HANDSHAKE_TIMEOUT = 20.0
#: Largest piece that is handed to TLS at once; a record holds 16 KiB.
_PIECE = 1 << 16
#: Seconds to let the other end read why it is refused.
_LINGER = 1.0
#: Seconds of silence, between questions, and how many may stay unanswered.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
_SEED_LABEL = b"EXPORTER-dipy_ppir-pairwise-seed"
_AGAIN = (SSL.WantReadError, SSL.WantWriteError)
#: Alerts by which the other end says that it does not accept this certificate.
_REFUSALS = ("certificate", "unknown ca")


class TLSSocket:
    """A connection to a party whose certificate was checked.

    Parameters
    ----------
    connection : OpenSSL.SSL.Connection
        after its handshake.
    sock : socket
        the socket under it.
    party : Party
        who is at the other end.
    """

    family = None  # whatever it is, nothing is left to set

    def __init__(self, connection, sock, party):
        self._connection, self._sock, self.party = connection, sock, party
        negotiated = connection.get_alpn_proto_negotiated()
        #: What the connection is for, without its place.
        self.purpose = negotiated.partition(b" ")[0]
        #: In which order connections were accepted; 0 for those that were dialled.
        self.accepted = 0
        #: Called after the connection was closed.
        self.on_close = None

    def seed(self, context=b""):
        """32 bytes known to both ends and to nobody else (RFC 8446, 7.5).

        Another `context` gives others: what both ends must have in common.
        """
        return self._connection.export_keying_material(_SEED_LABEL, 32, context)

    def setblocking(self, flag):
        """Accept what sockets are told; this one never blocks."""

    def fileno(self):
        """Descriptor to wait on."""
        return self._sock.fileno()

    def pending(self):
        """Bytes that are decrypted already, which waiting would not show."""
        return self._connection.pending()

    def ended(self):
        """Whether the other end has closed the connection, or died.

        Nothing should be written then: where that fails, TLS does not read what has
        arrived before, either, and that may be the other end's last word.
        """
        if self._sock.fileno() < 0:
            return True
        poller = select.poll()
        poller.register(self._sock.fileno(), RDHUP)
        return bool(poller.poll(0))

    def recv_into(self, view):
        """Read what is there; 0 at the end.

        Raises
        ------
        BlockingIOError
            if nothing is there.
        PeerError
            if the other end refuses this party's certificate, or what arrived was
            tampered with.
        """
        try:
            return self._connection.recv_into(view, min(len(view), _PIECE))
        except _AGAIN:
            raise BlockingIOError from None
        except SSL.ZeroReturnError:
            return 0
        except SSL.SysCallError:
            return 0
        except SSL.Error as exc:
            raise _broken(exc, self.party) from None

    def sendmsg(self, parts, ancillary=(), flags=0):
        """Send the first bytes of a list of buffers; returns how many.

        Raises
        ------
        BlockingIOError
            if nothing could be sent.
        """
        first = parts[0]
        if len(parts) > 1 and sum(map(len, parts)) <= _PIECE:
            # A small frame in one record instead of two.
            first = memoryview(b"".join(parts))
        try:
            return self._connection.send(first[:_PIECE])
        except _AGAIN:
            raise BlockingIOError from None
        except (SSL.SysCallError, SSL.ZeroReturnError):
            raise ConnectionResetError from None
        except SSL.Error as exc:
            raise _broken(exc, self.party) from None

    def shutdown(self, how):
        """Say that nothing more will be sent.

        With ``SHUT_RDWR`` it is cut without a word, which any thread may do.
        """
        if how == socket.SHUT_WR:
            with contextlib.suppress(SSL.Error):
                self._connection.shutdown()
        self._sock.shutdown(how)

    def close(self):
        """Close the connection."""
        self._sock.close()
        if self.on_close is not None:
            callback, self.on_close = self.on_close, None
            callback()


def handshake(
    sock,
    identity,
    parties,
    *,
    purposes,
    server,
    deadline=None,
    others=(),
    check=None,
    place=None,
):
    """Shake hands over a connected socket and establish who is at the other end.

    Parameters
    ----------
    sock : socket
        it becomes non-blocking, and is closed on failure.
    identity : Identity
        of this party.
    parties : dict
        maps the fingerprints accepted here to their `Party`.
    purposes : sequence of bytes
        `LINK` and `RELAY`: those offered, or accepted.
    server : bool
        whether this end was dialled.
    deadline : float, optional
        when to give up, by ``time.monotonic``.
    others : sequence of Party, optional
        the other parties of the session, for messages.
    check : callable, optional
        called now and then; may raise to give up early.
    place : int, optional
        of this session among those that are held one after the other at the same
        addresses: see `SessionFile`. Both ends learn where the other is.

    Returns
    -------
    connection : TLSSocket

    Raises
    ------
    CertificateError
        if the other end has another certificate, or refuses this party's.
    OutOfStepError
        if it is at another place.
    PeerLostError, PeerTimeoutError, ProtocolError
        if it goes away, says nothing, or speaks something else.
    """
    verdict = []

    def verify(connection, certificate, error, depth, ok):
        problem = _problem(certificate, depth, parties, others)
        if problem:
            verdict[:] = [problem, _claimed(certificate, parties)]
        return not problem

    culprit = next(iter(parties.values())) if len(parties) == 1 else None
    pid = culprit.pid if culprit else None
    title = culprit.title if culprit else "whoever dialled this party"
    if deadline is None:
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT
    try:
        context = _context(identity, verify, purposes, server, place)
        connection = SSL.Connection(context, sock)
        _return_often(connection)
        sock.setblocking(False)
        connection.set_accept_state() if server else connection.set_connect_state()
        _shake(connection, sock, deadline, check)
    except TimeoutError:
        sock.close()
        raise PeerTimeoutError(
            f"{title} did not complete the TLS handshake in time", pid
        ) from None
    except (EOFError, OSError):
        sock.close()
        raise PeerLostError(
            f"{title} closed the connection during the TLS handshake; see its own log",
            pid,
        ) from None
    except SSL.Error as exc:
        _dismiss(sock)
        if not verdict:
            raise _broken(exc, culprit) from None
        problem, claimed = verdict
        elsewhere = server and connection.get_alpn_proto_negotiated() in (PAST, SOON)
        if elsewhere and claimed is None:
            # Other sessions of the row have parties of their own.
            raise OutOfStepError(
                f"somebody dialled for another session of the row: {problem}",
                ahead=False,
            ) from None
        raise CertificateError(problem, claimed if pid is None else pid) from None
    except BaseException:
        sock.close()
        raise
    shown = connection.get_peer_certificate(as_cryptography=True)
    party = parties.get(fingerprint(shown)) if shown is not None else None
    if party is None:  # `verify` has been asked, so this is never reached
        sock.close()
        raise CertificateError(f"{title} showed no certificate that is pinned", pid)
    tls = TLSSocket(connection, sock, party)
    if tls.purpose in (PAST, SOON) and place is not None:
        tls.close()
        # PAST says that the dialler is behind.
        raise _out_of_step(party, ahead=(tls.purpose == PAST) != server)
    if tls.purpose not in purposes:
        tls.close()
        raise ProtocolError(
            f"{party.title} does not speak this protocol; check that every party runs "
            "the same version of dipy_ppir",
            party.pid,
        )
    if isinstance(sock, socket.socket) and sock.family != socket.AF_UNIX:
        _set_options(sock)
    return tls


def _out_of_step(party, *, ahead):
    if ahead:
        text = (
            f"{party.title} is at a later session of the row already, and does not "
            "come to this one any more; when the others are done, go on with --resume "
            "at all parties"
        )
    else:
        text = f"{party.title} is still at an earlier session of the row"
    return OutOfStepError(text, party.pid, ahead=ahead)


def _problem(certificate, depth, parties, others):
    """Why the certificate of a chain at `depth` is refused; None if it is accepted."""
    # An exception must not leave: it would hide that a stranger caused it.
    try:
        shown = certificate.to_cryptography()
        if depth:
            return _authority_problem(shown, parties)
        return certificate_problem(shown, parties, others)
    except Exception:
        return (
            "a malformed certificate was shown where that of "
            f"{_titles(parties)} was due; check the address"
        )


def certificate_problem(certificate, parties, others=()):
    """Why a certificate is refused, in words; None if it is accepted.

    Parameters
    ----------
    certificate : cryptography.x509.Certificate
    parties : dict
        maps the fingerprints accepted here to their `Party`.
    others : sequence of Party, optional
        other parties of the session.
    """
    shown, name = fingerprint(certificate), certificate_name(certificate)
    due = _titles(parties)
    party = parties.get(shown)
    if party is not None:
        problem = validity_problem(certificate)
        if problem is None:
            return None
        return (
            f"the certificate of {party.title} {problem}; it must make a new one with "
            "dipy_ppir_keygen, and everybody pin the new fingerprint"
        )
    for party in others:
        if party.fingerprint == shown:
            return (
                f"the certificate of {party.title} was shown where that of {due} was "
                "due: swapped; check the addresses and the tables of the session file"
            )
    for party in parties.values():
        if party.name == name:
            return (
                f"somebody calls itself {name!r} with a certificate of its own making: "
                f"its fingerprint is {shown}, but the session file pins "
                f"{party.fingerprint}. Anybody can write a name: telephone before you "
                "pin another fingerprint"
            )
    return (
        f"a certificate that the session file does not name was shown where that of "
        f"{due} was due: {name!r}, fingerprint {shown}; check the address, and the "
        "fingerprint by telephone"
    )


def _claimed(certificate, parties):
    """Number of the party that a certificate says to be, true or not; or None."""
    try:
        shown = certificate.to_cryptography()
        pin, name = fingerprint(shown), certificate_name(shown)
    except Exception:
        return None
    for party in parties.values():
        if pin == party.fingerprint or name == party.name:
            return party.pid
    return None


def _authority_problem(certificate, parties):
    return (
        f"a certificate issued by {certificate_name(certificate)!r} was shown where "
        f"that of {_titles(parties)} was due: no authority is trusted here, only the "
        "certificates that the session file pins; check the address"
    )


def _titles(parties):
    return " or ".join(party.title for party in parties.values()) or "nobody"


def _dismiss(sock):
    """Close after an alert, which unread bytes would make the other end lose."""
    deadline = time.monotonic() + _LINGER
    poller = select.poll()
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        poller.register(sock.fileno(), select.POLLIN)
        while (left := deadline - time.monotonic()) > 0:
            if poller.poll(left * 1000) and not sock.recv(_PIECE):
                break
    sock.close()


def _set_options(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that lost its power is noticed, and firewalls see that the line is used.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _context(identity, verify, purposes, server, place):
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.use_certificate(identity.certificate)
    context.use_privatekey(identity.key)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, verify)
    # Every connection shows its certificate: nothing is resumed.
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_options(SSL.OP_NO_TICKET)
    names, elsewhere = list(purposes), []
    if place is not None:
        names, elsewhere = [b"%s %d" % (p, place) for p in purposes], [PAST, SOON]
    if server:

        def choose(connection, offered):
            wanted = [name for name in names if name in offered]
            if not wanted and place is not None:
                wanted = _direction(offered, place)
            return wanted[0] if wanted else SSL.NO_OVERLAPPING_PROTOCOLS

        context.set_alpn_select_callback(choose)
    else:
        context.set_alpn_protos([*names, *elsewhere])
    return context


def _direction(offered, place):
    """What to tell who dials at another place of the row; nothing to others."""
    places = [int(m[1]) for m in map(_PLACED.fullmatch, offered) if m]
    if not places or places[0] == place:
        return []
    told = PAST if places[0] < place else SOON
    return [told] if told in offered else []


def _return_often(connection):
    """Let reading return after every record, even one without content.

    Otherwise it does not return while such records arrive, and a peer that sends
    nothing else (changes of keys, for example) holds this party for ever. pyOpenSSL
    asks for the contrary and has no function to undo it.
    """
    SSL._lib.SSL_clear_mode(connection._ssl, SSL._lib.SSL_MODE_AUTO_RETRY)


def _shake(connection, sock, deadline, check):
    poller = select.poll()
    poller.register(sock.fileno(), 0)
    while True:
        try:
            return connection.do_handshake()
        except SSL.WantReadError:
            poller.modify(sock.fileno(), select.POLLIN)
        except SSL.WantWriteError:
            poller.modify(sock.fileno(), select.POLLOUT)
        except (SSL.SysCallError, SSL.ZeroReturnError):
            raise EOFError from None
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if check is not None:
                check()
            if poller.poll(min(left, 0.2) * 1000):
                break


def _broken(exc, party):
    """What an error of TLS means, as an exception."""
    title = party.title if party else "whoever dialled this party"
    pid = party.pid if party else None
    reasons = [str(part[-1]).lower() for part in exc.args[0]] if exc.args else []
    text = "; ".join(reasons) or "no reason given"
    if any("alert" in r and any(word in r for word in _REFUSALS) for r in reasons):
        return CertificateError(
            f"{title} refused this party's certificate ({text}): its session file pins "
            "another one, or it has expired; compare fingerprints by telephone "
            "(dipy_ppir_keygen --show)",
            pid,
        )
    if any("bad signature" in r for r in reasons):
        return CertificateError(
            f"{title} showed a pinned certificate without having its key: somebody "
            "pretends to be another; check the address",
            pid,
        )
    if any("did not return a certificate" in r for r in reasons):
        return CertificateError(
            f"{title} showed no certificate, as other programs do; check what connects "
            "to this port",
            pid,
        )
    if any("alert no application protocol" in r for r in reasons):
        return ProtocolError(
            f"{title} does not speak this version of the protocol; install the same "
            "version of dipy_ppir everywhere",
            pid,
        )
    return ProtocolError(
        f"the connection to {title} was broken, tampered with, or is not TLS 1.3 "
        f"({text})",
        pid,
    )
