"""Handshakes: who is let in, who is not, and what each end is told."""

import contextlib
import datetime
import fcntl
import functools
import re
import select
import socket
import ssl
import sys
import tempfile
import termios
import threading
import time

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
import numpy as np
from OpenSSL import SSL
from OpenSSL.crypto import FILETYPE_ASN1
import pins
import pytest

from dipy_ppir.mpc import tls
from dipy_ppir.mpc.errors import (
    CertificateError,
    OutOfStepError,
    PeerAbortedError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    ProtocolError,
)
from dipy_ppir.mpc.frame import ABORT, DATA, ERROR, operation_code
from dipy_ppir.mpc.identity import Identity, create_identity, fingerprint
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, Ledger
from dipy_ppir.mpc.link import Link
from dipy_ppir.mpc.network import Network
from dipy_ppir.mpc.sessionfile import Party

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)
PLAN = pins.plan()


#: Seconds after which a test that hangs is ended; nothing else waits so long.
HANGS = 120.0
#: Every socket that `pair` made in a test.
sockets = []


@pytest.fixture(autouse=True)
def lingers(monkeypatch):
    """Who refuses waits for the other end to close, however slow that is.

    So a test must let that end close. All sockets are closed in the end.
    """
    monkeypatch.setattr(tls, "_LINGER", HANGS)
    yield
    while sockets:
        sockets.pop().close()


def pinned(pid, identity=None, name=None):
    """A party whose certificate is pinned."""
    identity = identity or pins.identity(pid)
    print_ = fingerprint(identity.certificate)
    return Party(pid, name or pins.NAMES[pid], print_, None)


def pair(family):
    """Two connected sockets."""
    if family == "pair":
        ends = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = socket.create_connection(listener.getsockname())
            ends = one, listener.accept()[0]
    sockets.extend(ends)
    return ends


def shake(sock, identity, *parties, server, seconds=300.0, **options):
    """`tls.handshake` with the parties accepted here."""
    return tls.handshake(
        sock,
        identity,
        {party.fingerprint: party for party in parties},
        **{"purposes": (tls.LINK,), **options},
        server=server,
        deadline=time.monotonic() + seconds,
        others=PLAN.parties.values(),
    )


def handshakes(client, server, accepted=None, dialled=None, family="pair", **options):
    """What the moving owner's end, dialling the helper, and the helper's end become.

    `client` and `server` are identities; `accepted` and `dialled` the parties that
    server and client expect, by default the right ones.
    """
    one, other = pair(family)
    return pins.together(
        lambda: shake(one, client, dialled or pinned(HELPER), server=False, **options),
        lambda: shake(other, server, accepted or pinned(MOVING), server=True),
    )


def next_error(connection):
    """What the next reading of a connection that says something raises."""
    buffer = memoryview(bytearray(100))
    while True:
        try:
            return connection.recv_into(buffer)
        except BlockingIOError:
            ready = select.select([connection.fileno()], [], [], HANGS)[0]
            assert ready, "waits for ever"
        except PeerError as exc:
            return exc


def close(*connections):
    for connection in connections:
        if hasattr(connection, "close"):
            connection.close()


@pytest.fixture
def met():
    """Both ends of an accepted connection."""
    ends = handshakes(pins.identity(MOVING), pins.identity(HELPER))
    yield ends
    close(*ends)


# -- accepted ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["pair", "loopback"])
def test_pinned_parties_are_let_in(family):
    one, other = handshakes(pins.identity(MOVING), pins.identity(HELPER), family=family)
    assert (one.party.pid, other.party.pid) == (HELPER, MOVING)
    assert one.purpose == other.purpose == tls.LINK
    for end in (one, other):
        assert end._connection.get_protocol_version_name() == "TLSv1.3"
    assert one.sendmsg([b"hel", b"lo"]) == 5
    assert next_error(other) == 5
    close(one)
    assert next_error(other) == 0
    close(other)


def test_the_party_follows_from_the_certificate():
    """A server that expects two parties tells them apart by what they show."""
    for pid in (MOVING, STATIC):
        one, other = pair("pair")
        ends = pins.together(
            lambda one=one, pid=pid: shake(
                one, pins.identity(pid), pinned(HELPER), server=False
            ),
            lambda other=other: shake(
                other,
                pins.identity(HELPER),
                pinned(MOVING),
                pinned(STATIC),
                server=True,
            ),
        )
        assert ends[1].party.pid == pid
        close(*ends)


def test_seeds_are_alike_at_both_ends_and_new_each_time():
    seeds = []
    for _ in range(3):
        one, other = handshakes(pins.identity(MOVING), pins.identity(HELPER))
        assert one.seed() == other.seed()
        assert len(one.seed()) == 32
        seeds.append(one.seed())
        close(one, other)
    assert len(set(seeds)) == 3


def test_what_a_connection_is_for():
    identities = pins.identity(MOVING), pins.identity(HELPER)
    one, other = handshakes(*identities, purposes=(tls.RELAY,))
    for end in (one, other):
        assert type(end) is ProtocolError
        assert "same version" in str(end)
    one, other = handshakes(*identities, purposes=(b"dipy-ppir/2", tls.LINK))
    assert one.purpose == other.purpose == tls.LINK
    close(one, other)


@pytest.mark.parametrize(("mine", "theirs"), [(3, 7), (7, 3)])
def test_who_is_at_another_place_of_a_row(mine, theirs):
    """Both ends are told, by parties whose certificates were checked."""
    one, other = pair("pair")
    ends = pins.together(
        lambda: shake(
            one, pins.identity(MOVING), pinned(HELPER), server=False, place=mine
        ),
        lambda: shake(
            other, pins.identity(HELPER), pinned(MOVING), server=True, place=theirs
        ),
    )
    for end, own, peer, pid in zip(
        ends, (mine, theirs), (theirs, mine), (HELPER, MOVING), strict=True
    ):
        assert type(end) is OutOfStepError, end
        assert end.ahead == (peer > own)
        assert end.culprit == pid


def test_strangers_are_not_believed_where_they_are_in_a_row():
    """Who shows no certificate of this session is behind, whatever it says."""
    one, other = pair("pair")
    ends = pins.together(
        lambda: shake(
            one, pins.identity(STATIC), pinned(HELPER), server=False, place=9
        ),
        lambda: shake(
            other, pins.identity(HELPER), pinned(MOVING), server=True, place=2
        ),
    )
    assert [type(end) for end in ends] == [OutOfStepError] * 2
    assert [end.ahead for end in ends] == [False, False]
    assert ends[1].culprit is None
    assert "swapped" in str(ends[1])


IMPOSTERS = {
    "own making": (lambda: create_identity(pins.NAMES[MOVING]), False, "own making"),
    "expired": (lambda: old_identity(), True, "expired on"),
}


@pytest.mark.parametrize("name", IMPOSTERS)
def test_who_pretends_to_be_a_party_at_another_place_is_refused_as_elsewhere(name):
    """A certificate that is wrong whichever session is meant is no matter of places."""
    make, pin, text = IMPOSTERS[name]
    imposter, (one, other) = make(), pair("pair")
    expected = pinned(MOVING, imposter) if pin else pinned(MOVING)
    dialler, dialled = pins.together(
        lambda: shake(one, imposter, pinned(HELPER), server=False, place=9),
        lambda: shake(other, pins.identity(HELPER), expected, server=True, place=2),
    )
    assert type(dialler) is OutOfStepError
    assert type(dialled) is CertificateError
    assert dialled.culprit == MOVING
    assert text in str(dialled)


@pytest.mark.parametrize("theirs", [5, None])
def test_the_same_place_of_a_row(theirs):
    """And a session of a row with one that is of none."""
    one, other = pair("pair")
    ends = pins.together(
        lambda: shake(
            one, pins.identity(MOVING), pinned(HELPER), server=False, place=5
        ),
        lambda: shake(
            other, pins.identity(HELPER), pinned(MOVING), server=True, place=theirs
        ),
    )
    if theirs is None:
        assert [type(end) for end in ends] == [ProtocolError] * 2
    else:
        assert [end.purpose for end in ends] == [tls.LINK] * 2
    close(*ends)


def test_long_frames_in_both_directions_at_once():
    """Both send 24 MB before either receives."""
    ends = handshakes(pins.identity(MOVING), pins.identity(HELPER), family="loopback")
    links = Link(ends[0], HELPER), Link(ends[1], MOVING)
    networks = [Network({link.peer: link}, 300, Ledger) for link in links]
    sent = [np.full(3 << 20, pid, dtype=np.uint64) for pid in (5, 6)]
    sent[0][-1], sent[1][-1] = 7, 8

    def party(network, mine):
        (peer,) = network.links
        theirs = np.empty_like(mine)
        network.send(peer, "step", mine)
        network.receive(peer, "step", theirs)
        network.send_json(peer, "done", {"all": 1})
        assert network.receive_json(peer, "done") == {"all": 1}
        return theirs

    results = pins.together(
        *(lambda n=n, m=m: party(n, m) for n, m in zip(networks, sent, strict=True))
    )
    assert (results[0] == sent[1]).all()
    assert (results[1] == sent[0]).all()
    for network in networks:
        network.close()


def test_many_small_frames_and_what_tls_has_read_ahead(met):
    """Several frames in one record: waiting on the socket would not show them."""
    one = Network({HELPER: Link(met[0], HELPER)}, 300, Ledger)
    other = Network({MOVING: Link(met[1], MOVING)}, 300, Ledger)
    link = one.links[HELPER]
    for i in range(100):
        link.begin_frame(DATA, operation_code("step"), bytes([i]) * 8)
    raw = b"".join(link.unsent)
    link.unsent.clear()
    assert met[0].sendmsg([raw]) == len(raw)
    for i in range(100):
        out = bytearray(8)
        other.receive(MOVING, "step", out)
        assert out == bytes([i]) * 8
    other.close()


@pytest.mark.parametrize("unread", [0, 1])
@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_last_word_is_heard_by_who_still_sends(times, unread):
    """Once TLS could not write, it would not read what had arrived before."""
    ends = handshakes(pins.identity(MOVING), pins.identity(HELPER), family="loopback")
    ending = Link(ends[0], HELPER)
    network = Network({MOVING: Link(ends[1], MOVING)}, 300, Ledger)
    words = np.zeros(1000)
    for _ in range(unread):
        network.send(MOVING, "step", words)
    ending.say_last(ABORT, bytes([ERROR, 255]))
    assert ending.flush()
    ending.sock.close()  # as if this end had not been heard of for too long
    with pytest.raises(PeerAbortedError, match="stopped because of an error"):
        for _ in range(times):
            network.send(MOVING, "step", words)
        network.receive(MOVING, "step", words)
    network.close()


@pytest.mark.parametrize("raw", [b"x" * 24, b"PP\x01\x09" + bytes(20)])
def test_what_is_not_allowed_is_told_by_who_still_sends(raw):
    """Also where the other end has closed after it."""
    ends = handshakes(pins.identity(MOVING), pins.identity(HELPER), family="loopback")
    network = Network({MOVING: Link(ends[1], MOVING)}, 300, Ledger)
    ends[0].sendmsg([raw])
    ends[0].shutdown(socket.SHUT_WR)
    ends[0].close()
    with pytest.raises(ProtocolError, match="not speak|unknown kind") as caught:
        for _ in range(3):
            network.send(MOVING, "step", np.zeros(1000))
    assert caught.value.culprit == MOVING
    network.close()


def test_a_session_is_never_resumed():
    """Every connection shows its certificate anew, whatever the client remembers."""
    context = context_of(
        pins.identity(MOVING).key, der(pins.identity(MOVING).certificate)
    )
    shown = []
    context.set_verify(SSL.VERIFY_PEER, lambda *_: shown.append(1) or True)
    session = None
    for _ in range(2):
        one, other = pair("pair")

        def client(one=one, session=session):
            connection = SSL.Connection(context, one)
            if session is not None:
                connection.set_session(session)
            connection.set_connect_state()
            connection.do_handshake()
            connection.recv(1)  # tickets, if there are any, come before it
            return connection

        def server(other=other):
            end = shake(other, pins.identity(HELPER), pinned(MOVING), server=True)
            end.sendmsg([b"x"])
            return end

        before = len(shown)
        connection, end = pins.together(client, server)
        assert end.party.pid == MOVING
        assert len(shown) > before, "the server did not show its certificate again"
        session = connection.get_session()
        close(end, one)
    assert session is not None


# -- certificates that are refused -------------------------------------------


def certificate(
    key, *, name="Mallory", issuer=None, signer=None, start=NOW - DAY, days=9, ca=False
):
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + days * DAY)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .sign(signer or key, None if isinstance(key, Ed25519PrivateKey) else SHA256())
    )


def old_identity():
    return create_identity(pins.NAMES[MOVING], days=3, now=NOW - 10 * DAY)


def early_identity():
    return create_identity(pins.NAMES[MOVING], now=NOW + 10 * DAY)


STRANGERS = {
    # name: (identity, whether it is the pinned one, what the message says)
    "unknown": (
        lambda: create_identity("Mallory"),
        False,
        "does not name was shown .* of the moving owner.* 'Mallory', fingerprint",
    ),
    "expired": (old_identity, True, "moving owner .* expired on .*keygen"),
    "not yet valid": (early_identity, True, "moving owner .* not valid before .*clock"),
    "swapped": (
        lambda: pins.identity(STATIC),
        False,
        "static owner .* was shown where that of the moving owner .* swapped",
    ),
    "own": (
        lambda: pins.identity(HELPER),
        False,
        "helper .* was shown where that of the moving owner .* swapped",
    ),
    "self-issued": (
        lambda: create_identity(pins.NAMES[MOVING]),
        False,
        "calls itself 'North Hospital' with a certificate of its own making",
    ),
}


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("name", STRANGERS)
def test_refused_certificates(name, side):
    """The end that refuses says why, and the refused end that it was refused."""
    make, pin, text = STRANGERS[name]
    stranger = make()
    expected = pinned(MOVING, stranger) if pin else pinned(MOVING)
    one, other = pair("loopback")

    def present():
        end = shake(other, stranger, pinned(HELPER), server=side == "server")
        # In TLS 1.3 a client is done before the server has seen its certificate.
        assert side == "client"
        try:
            return next_error(end)
        finally:
            close(end)

    refusing, refused = pins.together(
        lambda: shake(one, pins.identity(HELPER), expected, server=side == "client"),
        present,
    )
    assert type(refusing) is CertificateError, refusing
    assert refusing.culprit == MOVING
    assert re.search(text, str(refusing)), refusing
    others = [t for n, (_, _, t) in STRANGERS.items() if n not in (name, "own")]
    if name not in ("own", "swapped"):
        assert not any(re.search(t, str(refusing)) for t in others)
    assert str(refusing).isprintable()
    assert type(refused) is CertificateError, refused
    assert "the helper (East University) refused this party's certificate" in str(
        refused
    )


def context_of(key, *chain):
    """What a party of its own making uses; it believes anybody.

    The certificates are bytes (DER), the key a key or the name of a file.
    """
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_verify(SSL.VERIFY_PEER, lambda *_: True)
    context.set_alpn_protos([tls.LINK])
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("".join(map(ssl.DER_cert_to_PEM_cert, chain)))
        file.flush()
        context.use_certificate_chain_file(file.name)
    if isinstance(key, str):
        context.use_privatekey_file(key, FILETYPE_ASN1)
    else:
        context.use_privatekey(key)
    return context


def der(certificate):
    return certificate.public_bytes(Encoding.DER)


def dial_with(context, *, send=b"", pin=None):
    """A client with this context dials the helper: what it hears, the helper's end."""
    one, other = pair("loopback")

    def client():
        connection = SSL.Connection(context, one)
        connection.set_connect_state()
        try:
            connection.do_handshake()
            if send:
                connection.sendall(send)
            return connection.recv(100)
        finally:
            one.close()

    return pins.together(
        client,
        lambda: shake(other, pins.identity(HELPER), pin or pinned(MOVING), server=True),
    )


DAMAGES = {
    "version 5": (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x05"),
    "no text": (b"\x0c\x07Mallory", b"\x0c\x07\xff\xfe\xfdory"),
    "odd text": (b"\x0c\x07Mallory", b"\x1e\x07Mallory"),
    "control characters": (b"\x0c\x07Mallory", b"\x0c\x07M\x1b[2J\n\0"),
    "no date": (b"\x17\x0d", b"\x17\x0dx"),
    "signature": (b"", b"\1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_malformed_certificates(name):
    """Whatever a stranger shows, it is refused by us and nothing else happens."""
    old, new = DAMAGES[name]
    key = Ed25519PrivateKey.generate()
    whole = der(certificate(key))
    spoilt = whole.replace(old, new) if old else whole[:-1] + bytes([whole[-1] ^ 1])
    spoilt = spoilt[: len(whole)]
    assert spoilt != whole
    try:
        context = context_of(key, spoilt)
    except SSL.Error:
        return  # not even the stranger's TLS takes it, nor would ours
    heard, refusing = dial_with(context)
    assert isinstance(heard, SSL.Error)
    assert type(refusing) in (CertificateError, ProtocolError), refusing
    assert refusing.culprit == MOVING
    assert str(refusing).isprintable()


def test_an_error_over_a_certificate_is_a_refusal(monkeypatch):
    """Libraries raise many kinds of errors over what strangers write."""

    def stumble(*args):
        raise ValueError("odd")

    monkeypatch.setattr(tls, "certificate_problem", stumble)
    key = Ed25519PrivateKey.generate()
    heard, refusing = dial_with(context_of(key, der(certificate(key))))
    assert type(refusing) is CertificateError
    assert "malformed certificate was shown where that of the moving" in str(refusing)
    assert "unknown ca" in str(heard)


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_an_authority_is_worth_nothing(depth):
    """A chain that ends in the system's authorities would be refused alike."""
    keys = [Ed25519PrivateKey.generate() for _ in range(depth + 1)]
    chain = [certificate(keys[-1], name=f"Root {depth}", ca=True)]
    for i in range(depth - 1, -1, -1):
        chain.insert(
            0,
            certificate(
                keys[i],
                name=f"Level {i}" if i else pins.NAMES[MOVING],
                issuer=chain[0].subject,
                signer=keys[i + 1],
                ca=i > 0,
            ),
        )
    heard, refusing = dial_with(context_of(keys[0], *map(der, chain)))
    assert type(refusing) is CertificateError
    assert f"issued by 'Root {depth}'" in str(refusing)
    assert "no authority is trusted" in str(refusing)
    assert "unknown ca" in str(heard)


def test_the_refused_hears_of_it_even_if_it_has_sent_much():
    """Unread bytes would reset the connection, and the alert be lost."""
    key = Ed25519PrivateKey.generate()
    heard, refusing = dial_with(
        context_of(key, der(certificate(key))), send=bytes(1 << 14)
    )
    assert type(refusing) is CertificateError
    assert "unknown ca" in str(heard)


def test_a_pinned_certificate_without_its_key(tmp_path):
    """Somebody copied the certificate, which is public, and signs with another key."""
    victim = generate_private_key(SECP256R1())
    pin = certificate(victim, name=pins.NAMES[MOVING])
    forged = generate_private_key(SECP256R1())
    public = [
        key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        for key in (forged, victim)
    ]
    raw = forged.private_bytes(
        Encoding.DER, PrivateFormat.TraditionalOpenSSL, NoEncryption()
    )
    (tmp_path / "key").write_bytes(raw.replace(*public))
    context = context_of(str(tmp_path / "key"), der(pin))
    heard, refusing = dial_with(context, pin=pinned(MOVING, Identity(None, pin)))
    assert type(refusing) is CertificateError, refusing
    assert "without having its key" in str(refusing)
    assert isinstance(heard, SSL.Error)


# -- who speaks something else -----------------------------------------------


def stdlib_client(sock, **versions):
    """Python's own TLS: it can show no certificate of ours."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([tls.LINK.decode()])
    for name, value in versions.items():
        setattr(context, name, value)
    with context.wrap_socket(sock) as wrapped:
        wrapped.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return wrapped.recv(100)


def test_a_client_without_a_certificate():
    one, other = pair("loopback")
    heard, refusing = pins.together(
        lambda: stdlib_client(one),
        lambda: shake(other, pins.identity(HELPER), pinned(MOVING), server=True),
    )
    assert type(refusing) is CertificateError
    assert "showed no certificate" in str(refusing)
    assert "CERTIFICATE_REQUIRED" in str(heard)


@pytest.mark.filterwarnings("ignore:.*TLS.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_1"])
def test_a_client_of_an_older_tls(version):
    one, other = pair("loopback")

    def client():
        with one:
            stdlib_client(
                one,
                minimum_version=ssl.TLSVersion[version],
                maximum_version=ssl.TLSVersion[version],
            )

    heard, refusing = pins.together(
        client,
        lambda: shake(other, pins.identity(HELPER), pinned(MOVING), server=True),
    )
    assert isinstance(heard, ssl.SSLError)
    assert isinstance(refusing, PeerError)
    if version == "TLSv1_2":
        assert type(refusing) is ProtocolError
        assert "not TLS 1.3" in str(refusing)


def test_a_server_of_an_older_tls():
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_max_proto_version(SSL.TLS1_2_VERSION)
    context.use_certificate(pins.identity(HELPER).certificate)
    context.use_privatekey(pins.identity(HELPER).key)
    one, other = pair("loopback")

    def server():
        connection = SSL.Connection(context, other)
        connection.set_accept_state()
        with other:
            connection.do_handshake()

    error, heard = pins.together(
        lambda: shake(one, pins.identity(MOVING), pinned(HELPER), server=False), server
    )
    assert type(error) is ProtocolError
    assert error.culprit == HELPER
    assert isinstance(heard, SSL.Error)


OTHER_TALK = {
    "http": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.9\r\n",
    "zeros": bytes(600),
    "a frame": b"PP\x01\x01" + bytes(40),
    "an alert": b"\x15\x03\x03\x00\x02\x02\x30",
    "an unknown alert": b"\x15\x03\x03\x00\x02\x02\xee",
    "a long record": b"\x16\x03\x01\xff\xff" + bytes(70_000),
    "an empty record": b"\x16\x03\x01\x00\x00" * 100,
    "a pickle": b"\x80\x04\x95" + bytes(30),
}


@pytest.mark.parametrize("server", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("name", OTHER_TALK)
def test_other_talk(name, server):
    one, other = pair("pair")
    other.sendall(OTHER_TALK[name])
    other.shutdown(socket.SHUT_WR)
    error = None
    try:
        shake(one, pins.identity(HELPER), pinned(MOVING), server=server)
    except PeerError as exc:
        error = exc
    assert type(error) in (ProtocolError, PeerLostError, CertificateError)
    assert error.culprit == MOVING
    assert one.fileno() == -1, "it stays open"
    other.close()


def test_silence_and_going_away():
    one, other = pair("pair")
    with pytest.raises(PeerTimeoutError, match="in time") as caught:
        shake(one, pins.identity(HELPER), pinned(MOVING), server=True, seconds=0.1)
    assert caught.value.culprit == MOVING
    other.close()
    one, other = pair("pair")
    other.close()
    with pytest.raises(PeerLostError, match="during the TLS handshake"):
        shake(one, pins.identity(HELPER), pinned(MOVING), server=True)


def test_who_dribbles_is_cut_off(monkeypatch):
    """A byte now and then does not extend the time, which the test lets pass."""
    one, other = pair("pair")
    now = 0
    dribble = iter(b"\x16\x03\x01\x40\x00\x01" + bytes(0x4000))

    class Clock:
        @staticmethod
        def monotonic():
            return now

    def check():
        nonlocal now
        now += 1
        assert now <= 20, "the time was extended"
        other.sendall(bytes([next(dribble)]))

    monkeypatch.setattr(tls, "time", Clock)
    with pytest.raises(PeerTimeoutError):
        tls.handshake(
            one,
            pins.identity(HELPER),
            {pinned(MOVING).fingerprint: pinned(MOVING)},
            purposes=(tls.LINK,),
            server=True,
            deadline=20,
            check=check,
        )
    assert now == 20


def test_nobody_in_particular():
    """A server that expects two parties does not blame one of them."""
    one, other = pair("pair")
    other.close()
    with pytest.raises(PeerLostError, match="whoever dialled this party") as caught:
        shake(one, pins.identity(HELPER), pinned(MOVING), pinned(STATIC), server=True)
    assert caught.value.culprit is None


def test_a_handshake_can_be_given_up():
    class Stop(Exception):
        pass

    def check():
        raise Stop

    one, other = pair("pair")
    with pytest.raises(Stop):
        tls.handshake(
            one,
            pins.identity(HELPER),
            {},
            purposes=(tls.LINK,),
            server=True,
            check=check,
        )
    assert one.fileno() == -1
    other.close()


# -- a line that is tampered with --------------------------------------------


@contextlib.contextmanager
def tampered(change):
    """Meet through somebody in the middle; both ends and an event.

    Once it is set, what the first end sends to the second is changed.
    """
    one, near = pair("pair")
    far, other = pair("pair")
    armed = threading.Event()

    def carry(source, sink):
        with contextlib.suppress(OSError):
            while raw := source.recv(1 << 16):
                if armed.is_set() and source is near:
                    raw = change(raw)
                sink.sendall(raw)

    lines = [
        threading.Thread(target=carry, args=ends) for ends in ((near, far), (far, near))
    ]
    for thread in lines:
        thread.start()
    ends = ()
    try:
        ends = pins.together(
            lambda: shake(one, pins.identity(MOVING), pinned(HELPER), server=False),
            lambda: shake(other, pins.identity(HELPER), pinned(MOVING), server=True),
        )
        yield ends, armed
    finally:
        close(*ends)
        for sock in (near, far):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in lines:
            thread.join(HANGS)
            assert not thread.is_alive()


@pytest.mark.parametrize("at", [0, 3, 7, -1])
def test_a_bit_that_was_changed(at):
    def flip(raw):
        raw = bytearray(raw)
        raw[at] ^= 1
        return bytes(raw)

    seconds = 0.2 if at == 3 else 300
    with tampered(flip) as ((one, other), armed):
        network = Network({MOVING: Link(other, MOVING)}, seconds, Ledger)
        armed.set()
        Network({HELPER: Link(one, HELPER)}, 300, Ledger).send(
            HELPER, "step", bytes(16)
        )
        with pytest.raises(PeerError) as caught:
            network.receive(MOVING, "step", bytearray(16))
    assert caught.value.culprit == MOVING
    if at == 3:  # a longer record never ends
        assert type(caught.value) is PeerTimeoutError
    else:
        assert "tampered with" in str(caught.value)


def test_a_record_that_was_repeated():
    with tampered(lambda raw: raw + raw) as ((one, other), armed):
        network = Network({MOVING: Link(other, MOVING)}, 300, Ledger)
        armed.set()
        Network({HELPER: Link(one, HELPER)}, 300, Ledger).send(
            HELPER, "step", bytes(16)
        )
        network.receive(MOVING, "step", bytearray(16))
        with pytest.raises(ProtocolError, match="tampered with"):
            network.receive(MOVING, "step", bytearray(16))


# -- a peer with a pinned certificate and a TLS of its own --------------------


class Writer:
    """Writes records of its own making after the handshake of a client.

    With the traffic secret that TLS logs for debugging, a test can send what no
    library would.
    """

    def __init__(self):
        self.sock, self.far = pair("loopback")
        context = context_of(
            pins.identity(MOVING).key, der(pins.identity(MOVING).certificate)
        )
        secrets = {}

        def log(connection, line):
            label, _, secret = line.decode().split()
            secrets[label] = bytes.fromhex(secret)

        context.set_keylog_callback(log)

        def client():
            connection = SSL.Connection(context, self.sock)
            connection.set_connect_state()
            connection.do_handshake()
            return connection

        self.connection, self.end = pins.together(
            client,
            lambda: shake(self.far, pins.identity(HELPER), pinned(MOVING), server=True),
        )
        assert self.connection.get_cipher_name() == "TLS_AES_256_GCM_SHA384"
        self.secret, self.number = secrets["CLIENT_TRAFFIC_SECRET_0"], 0

    def _derive(self, label, length):
        label = b"tls13 " + label
        info = length.to_bytes(2) + bytes([len(label)]) + label + b"\0"
        return HKDFExpand(SHA384(), length, info).derive(self.secret)

    def record(self, kind, content):
        """One encrypted record."""
        nonce = int.from_bytes(self._derive(b"iv", 12)) ^ self.number
        self.number += 1
        head = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2)
        cipher = AESGCM(self._derive(b"key", 32))
        sealed = cipher.encrypt(nonce.to_bytes(12), content + bytes([kind]), head)
        return head + sealed

    def key_update(self, answer=False):
        """A record that announces a new key, and the change to it."""
        raw = self.record(22, b"\x18\0\0\x01" + bytes([answer]))
        self.secret, self.number = self._derive(b"traffic upd", 48), 0
        return raw

    def close(self):
        close(self.sock, self.end)


@pytest.fixture
def writer():
    writer = Writer()
    yield writer
    writer.close()


def test_records_of_its_own_making(writer):
    """The writer speaks TLS well enough to be understood."""
    writer.sock.sendall(writer.record(23, b"hello") + writer.key_update())
    writer.sock.sendall(writer.record(23, b"again"))
    assert next_error(writer.end) == 5
    assert next_error(writer.end) == 5


@pytest.mark.parametrize("kind", ["key update", "empty"])
def test_records_without_content_are_silence(writer, kind):
    """A peer that sends them for ever is not heard, and does not hold the others."""
    network = Network({MOVING: Link(writer.end, MOVING)}, 0.2, Ledger)
    make = writer.key_update
    if kind == "empty":
        make = functools.partial(writer.record, 23, b"")
    over = threading.Event()
    ended_by_itself = []

    def flood():
        end = time.monotonic() + HANGS
        with contextlib.suppress(OSError):
            while not over.is_set():
                if time.monotonic() > end:
                    ended_by_itself.append(True)
                    return
                writer.sock.sendall(b"".join(make() for _ in range(20)))

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with pytest.raises(PeerError) as caught:
            network.receive(MOVING, "step", bytearray(16))
    finally:
        over.set()
        writer.sock.shutdown(socket.SHUT_RDWR)
        thread.join(HANGS)
        assert not thread.is_alive()
        network.close()
    assert caught.value.culprit == MOVING
    assert not ended_by_itself, "as long as it sent, it was heard"


def test_reading_returns_after_every_record(writer):
    """Else a peer faster than us would keep us reading, beyond every time-out."""
    raw = b"".join(writer.key_update() for _ in range(1000))
    writer.sock.sendall(raw)

    def unread():
        number = bytearray(4)
        fcntl.ioctl(writer.far.fileno(), termios.FIONREAD, number)
        return int.from_bytes(number, sys.byteorder)

    end = time.monotonic() + HANGS
    while unread() < len(raw):
        assert time.monotonic() < end, "it never arrives"
        time.sleep(0.001)
    with pytest.raises(BlockingIOError):
        writer.end.recv_into(memoryview(bytearray(10)))
    assert unread() > len(raw) // 2


@pytest.mark.parametrize(
    ("kind", "content"),
    [(22, b"\x01\0\0\x02hi"), (22, b"\x04\0\xff\xff"), (21, b"\x02\x50"), (99, b"x")],
    ids=["hello", "ticket", "alert", "unknown"],
)
def test_records_that_are_out_of_place(writer, kind, content):
    network = Network({MOVING: Link(writer.end, MOVING)}, 300, Ledger)
    writer.sock.sendall(writer.record(kind, content))
    with pytest.raises(PeerError) as caught:
        network.receive(MOVING, "step", bytearray(16))
    assert caught.value.culprit == MOVING
    network.close()
