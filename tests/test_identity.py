"""Keys, certificates and fingerprints of parties."""

import datetime
import os
import shutil
import stat
import subprocess

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import example, given
from hypothesis import strategies as st
import pytest

from dipy_ppir.mpc.errors import IdentityError
from dipy_ppir.mpc.identity import (
    CERTIFICATE_FILE,
    HOME_VARIABLE,
    KEY_FILE,
    Identity,
    certificate_name,
    create_identity,
    fingerprint,
    home,
    parse_fingerprint,
    validity_problem,
)

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


@pytest.fixture
def saved(tmp_path):
    """The folder of a new identity."""
    return create_identity("North Hospital").save(tmp_path / "keys")


def test_what_is_written_is_read(tmp_path):
    made = create_identity("  Sankt-Änne Krankenhaus ")
    folder = made.save(tmp_path / "new" / "folder")
    read = Identity.load(folder)
    assert read.key.private_bytes_raw() == made.key.private_bytes_raw()
    assert read.certificate == made.certificate
    assert read.name == "Sankt-Änne Krankenhaus"
    assert read.fingerprint == made.fingerprint


def test_the_certificate_is_of_the_kind_that_is_promised():
    certificate = create_identity("A").certificate
    assert isinstance(create_identity("A").key, Ed25519PrivateKey)
    certificate.public_key().verify(
        certificate.signature, certificate.tbs_certificate_bytes
    )
    assert certificate.issuer == certificate.subject
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert not basic.value.ca, "it must not be able to vouch for others"
    assert validity_problem(certificate) is None
    assert create_identity("A").fingerprint != create_identity("A").fingerprint


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_key_is_written_for_its_owner_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        folder = create_identity("A").save(tmp_path / "keys")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(p.name for p in folder.iterdir()) == [CERTIFICATE_FILE, KEY_FILE]


def test_a_key_that_was_there_before_leaves_no_mode_behind(saved):
    (saved / KEY_FILE).chmod(0o644)
    create_identity("B").save(saved, force=True)
    assert stat.S_IMODE((saved / KEY_FILE).stat().st_mode) == 0o600
    assert Identity.load(saved).name == "B"


def test_what_is_replaced_is_kept(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    create_identity("B").save(saved, force=True)
    for name, content in before.items():
        old = saved / f"{name}.old"
        assert old.read_bytes() == content != (saved / name).read_bytes()
        old.replace(saved / name)
    assert Identity.load(saved).name != "B"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o610, 0o601, 0o777])
def test_a_key_that_others_can_read_is_refused(saved, mode):
    (saved / KEY_FILE).chmod(mode)
    with pytest.raises(IdentityError, match=f"read by others.*{mode:04o}.*chmod 600"):
        Identity.load(saved)
    (saved / KEY_FILE).chmod(0o400)
    Identity.load(saved)


def test_a_key_is_not_replaced_unasked(saved):
    before = Identity.load(saved).fingerprint
    with pytest.raises(IdentityError, match="already.*--force"):
        create_identity("B").save(saved)
    assert Identity.load(saved).fingerprint == before


def _write(key, folder, encryption=None):
    (folder / KEY_FILE).write_bytes(
        key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()
        )
    )


SPOILT = {
    "no folder": (shutil.rmtree, "no key.pem in"),
    "no key": (lambda f: (f / KEY_FILE).unlink(), "no key.pem in"),
    "no certificate": (lambda f: (f / CERTIFICATE_FILE).unlink(), "no certificate.pem"),
    "empty key": (lambda f: (f / KEY_FILE).write_bytes(b""), "are not a key"),
    "empty certificate": (
        lambda f: (f / CERTIFICATE_FILE).write_bytes(b""),
        "are not a key and a certificate",
    ),
    "binary": (lambda f: (f / KEY_FILE).write_bytes(bytes(range(256))), "are not a"),
    "exchanged": (
        lambda f: (f / CERTIFICATE_FILE).write_bytes((f / KEY_FILE).read_bytes()),
        "are not a key",
    ),
    "another key": (
        lambda f: _write(Ed25519PrivateKey.generate(), f),
        "belongs to another key",
    ),
    "another kind of key": (
        lambda f: _write(generate_private_key(SECP256R1()), f),
        "not an Ed25519 key",
    ),
    "with a password": (
        lambda f: _write(
            Ed25519PrivateKey.generate(), f, BestAvailableEncryption(b"x")
        ),
        "are not a key",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_used_is_named(saved, name):
    spoil, text = SPOILT[name]
    spoil(saved)
    with pytest.raises(IdentityError, match=text) as caught:
        Identity.load(saved)
    assert "dipy_ppir_keygen" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "text"),
    [(NOW - 10 * DAY, "expired on .*--force"), (NOW + 2 * DAY, "not valid before")],
)
def test_own_certificate_out_of_time(tmp_path, start, text):
    folder = create_identity("A", days=5, now=start).save(tmp_path)
    with pytest.raises(IdentityError, match=text):
        Identity.load(folder)


def test_validity_at_its_ends():
    certificate = create_identity("A", days=5, now=NOW).certificate
    minute = datetime.timedelta(minutes=1)
    assert validity_problem(certificate, NOW - 4 * minute) is None
    assert "clock" in validity_problem(certificate, NOW - 6 * minute)
    assert validity_problem(certificate, NOW + 5 * DAY - minute) is None
    assert "expired" in validity_problem(certificate, NOW + 5 * DAY + minute)


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/x"])
def test_a_folder_that_cannot_be_written(folder):
    with pytest.raises(IdentityError, match="cannot write to .*--identity"):
        create_identity("A").save(folder)


def test_where_the_key_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(HOME_VARIABLE, raising=False)
    assert home() == tmp_path / ".dipy_ppir"
    monkeypatch.setenv(HOME_VARIABLE, "")
    assert home() == tmp_path / ".dipy_ppir"
    monkeypatch.setenv(HOME_VARIABLE, "~/elsewhere")
    assert home() == tmp_path / "elsewhere"
    assert home("~/third") == tmp_path / "third"


@pytest.mark.parametrize(
    "name", ["", "  ", "x" * 65, "ä" * 33, "two\nlines", "\x1b[31m", "\ud800", "a\0b"]
)
def test_names_that_cannot_be_used(name):
    with pytest.raises(IdentityError, match="1 to 64 printable"):
        create_identity(name)


@pytest.mark.parametrize("name", ["x" * 64, "ä" * 32, "東京大学", "O'Neill & Söhne, ="])
def test_names_that_can_be_used(name):
    assert create_identity(name).name == name


@pytest.mark.parametrize("days", [0, -1, 3651])
def test_days_that_cannot_be_used(days):
    with pytest.raises(IdentityError, match="1 to 3650"):
        create_identity("A", days=days)


@given(st.text(max_size=80))
@example("x" * 64)
def test_any_name_works_or_is_refused(name):
    try:
        assert create_identity(name).name == name.strip()
    except IdentityError:
        pass


def test_a_stranger_may_write_any_name(recwarn):
    """It is shown to people: short, and without control characters."""
    key = Ed25519PrivateKey.generate()
    nasty = "evil\x1b[2J\nroot# " + "x" * 100
    attribute = x509.NameAttribute(x509.NameOID.COMMON_NAME, nasty, _validate=False)
    name = x509.Name([attribute])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .sign(key, None)
    )
    shown = certificate_name(certificate)
    assert shown.isprintable()
    assert len(shown) == 64
    assert shown.startswith("evil?[2J?root# xxx")


def test_fingerprints_are_those_of_openssl(saved):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl command")
    command = [openssl, "x509", "-noout", "-fingerprint", "-sha256", "-in"]
    said = subprocess.run(
        [*command, saved / CERTIFICATE_FILE], capture_output=True, text=True, check=True
    ).stdout
    ours = Identity.load(saved).fingerprint
    assert said.strip().endswith(ours)
    assert parse_fingerprint(said) == ours


@pytest.mark.parametrize(
    "form",
    [
        str,
        str.lower,
        lambda f: f.replace(":", ""),
        lambda f: f.replace(":", " "),
        lambda f: f.replace(":", "-"),
        lambda f: f" SHA256:{f}\n",
        lambda f: f"sha-256={f}",
        lambda f: f"SHA256 Fingerprint={f}",
    ],
)
def test_fingerprints_as_people_type_them(form):
    pin = fingerprint(create_identity("A").certificate)
    assert parse_fingerprint(form(pin)) == pin


@pytest.mark.parametrize(
    "text",
    ["", "AA:BB", "g" * 64, "a" * 63, "a" * 65, "a" * 128, "٣" * 64, "0x" + "a" * 62],
)
def test_what_is_no_fingerprint(text):
    assert parse_fingerprint(text) is None


@given(st.text(max_size=200))
def test_any_text_is_a_fingerprint_or_not(text):
    assert parse_fingerprint(text) is None or len(parse_fingerprint(text)) == 95
