"""A party's long-lived key, its certificate, and their fingerprint.

A party is known by one Ed25519 key and a certificate that it signs itself. No
authority vouches for anybody: the sites tell each other the fingerprints of their
certificates by telephone or mail and write them into the session file, and nothing
else is ever trusted.
"""

import base64
from collections.abc import Mapping
import datetime
import hashlib
import os
from os import PathLike
from pathlib import Path
import re
import stat
from typing import Any, Self
import warnings

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from dipy_ppir.mpc.errors import IdentityError
from dipy_ppir.mpc.prg import derive_key

#: Environment variable that names the folder of the key, and where it is otherwise.
HOME_VARIABLE, DEFAULT_HOME = "DIPY_PPIR_HOME", "~/.dipy_ppir"
KEY_FILE, CERTIFICATE_FILE = "key.pem", "certificate.pem"
#: Days that a certificate is valid.
VALIDITY_DAYS = 730
_CLOCK_SLACK = datetime.timedelta(minutes=5)


class Identity:
    """The key and the certificate of this party.

    Parameters
    ----------
    key : Ed25519PrivateKey
    certificate : cryptography.x509.Certificate
        self-signed, of that key.
    """

    def __init__(self, key: Ed25519PrivateKey, certificate: x509.Certificate) -> None:
        self.key = key
        self.certificate = certificate

    @property
    def name(self) -> str:
        """The name in the certificate."""
        return certificate_name(self.certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, as `fingerprint` writes it."""
        return fingerprint(self.certificate)

    @property
    def sealing_key(self) -> X25519PrivateKey:
        """The key to which files for this party are sealed; follows from its own."""
        own = self.key.private_bytes_raw()
        return X25519PrivateKey.from_private_bytes(derive_key(own, b"sealing"))

    @property
    def sealing(self) -> str:
        """Its public part, 64 hexadecimal digits, for session files; see `dealfile`."""
        return self.sealing_key.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> dict[str, str]:
        """Sign bytes.

        Returns
        -------
        signed : dict
            with ``signature`` and ``certificate``, as text; see `signed_by`.
        """
        certificate = self.certificate.public_bytes(Encoding.DER)
        return {
            "signature": self.key.sign(message).hex(),
            "certificate": base64.b64encode(certificate).decode(),
        }

    @classmethod
    def load(cls, folder: str | PathLike[str] | None = None) -> Self:
        """Read this party's key and certificate.

        Parameters
        ----------
        folder : str or Path, optional
            by default the environment variable ``DIPY_PPIR_HOME``, or
            ``~/.dipy_ppir``.

        Raises
        ------
        IdentityError
            if there is none, if others may read the key, or if the certificate is
            not valid now.
        """
        folder = home(folder)
        remedy = "make one with dipy_ppir_keygen, or name its folder with --identity"
        key_file, certificate_file = folder / KEY_FILE, folder / CERTIFICATE_FILE
        try:
            for file in (key_file, certificate_file):
                if not file.is_file():
                    raise IdentityError(f"no {file.name} in {folder}; {remedy}")
            with open(key_file, "rb") as stream:
                mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
                if mode & 0o077:
                    raise IdentityError(
                        f"the private key {key_file} can be read by others (mode "
                        f"{mode:04o}): run chmod 600 on it, and make a new one with "
                        "dipy_ppir_keygen if somebody may have copied it"
                    )
                pem = stream.read()
            key = load_pem_private_key(pem, None)
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
            same = key.public_key() == certificate.public_key()
            problem = validity_problem(certificate)
        except IdentityError:
            raise
        except OSError as exc:
            raise IdentityError(
                f"cannot read {exc.filename}: {exc.strerror}; check its permissions"
            ) from None
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
            raise IdentityError(
                f"the files {KEY_FILE} and {CERTIFICATE_FILE} in {folder} are not a "
                f"key and a certificate as dipy_ppir_keygen writes them; {remedy}"
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(f"the key {key_file} is not an Ed25519 key; {remedy}")
        if not same:
            raise IdentityError(
                f"the certificate {certificate_file} belongs to another key than "
                f"{key_file}; {remedy}"
            )
        if problem:
            raise IdentityError(
                f"the certificate {certificate_file} {problem}; run dipy_ppir_keygen "
                "--force and tell the other parties the new fingerprint"
            )
        return cls(key, certificate)

    def save(
        self, folder: str | PathLike[str] | None = None, *, force: bool = False
    ) -> Path:
        """Write key and certificate; the key so that only its owner can read it.

        What they replace is kept under names that end in ``.old``.

        Returns
        -------
        folder : Path

        Raises
        ------
        IdentityError
            if there is a key already and not `force`, or nothing can be written.
        """
        folder = home(folder)
        key_file, certificate_file = folder / KEY_FILE, folder / CERTIFICATE_FILE
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            if key_file.exists() and not force:
                raise IdentityError(
                    f"there is a key in {folder} already, and other sites may have "
                    "pinned it; add --force to replace it, or choose another --identity"
                )
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for file in (key_file, certificate_file):
                if file.exists():
                    os.replace(file, file.with_name(file.name + ".old"))
            _write_private(key_file, pem)
            certificate_file.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        except OSError as exc:
            raise IdentityError(
                f"cannot write to {folder}: {exc.strerror}; choose another --identity"
            ) from None
        return folder


def create_identity(
    name: str, *, days: int = VALIDITY_DAYS, now: datetime.datetime | None = None
) -> Identity:
    """A new key with a certificate that it signs itself.

    Parameters
    ----------
    name : str
        whose it is, for people: printable, 1 to 64 bytes in UTF-8.
    days : int, optional
        how long the certificate is valid.
    now : datetime.datetime, optional
        from when.

    Returns
    -------
    identity : Identity

    Raises
    ------
    IdentityError
        if the name or the number of days cannot be used.
    """
    name = name.strip()
    # A certificate holds 64 bytes. Half of a surrogate pair is not printable.
    if not name or not name.isprintable() or len(name.encode()) > 64:
        raise IdentityError(
            "the name of a party must be 1 to 64 printable characters (fewer if they "
            'are not ASCII), for example "St. Anne Hospital"'
        )
    if not 1 <= days <= 3650:
        raise IdentityError(
            f"a certificate cannot be valid for {days} days; give 1 to 3650"
        )
    key = Ed25519PrivateKey.generate()
    now = datetime.datetime.now(datetime.timezone.utc) if now is None else now
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, None)
    )
    return Identity(key, certificate)


def home(folder: str | PathLike[str] | None = None) -> Path:
    """The folder of this party's key."""
    if folder is None:
        folder = os.environ.get(HOME_VARIABLE) or DEFAULT_HOME
    return Path(folder).expanduser()


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate (DER), as ``openssl x509 -fingerprint`` writes it."""
    return _fingerprint(certificate.public_bytes(Encoding.DER))


def _fingerprint(der: bytes) -> str:
    digest = hashlib.sha256(der).hexdigest().upper()
    return ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


def is_sealing_key(digits: str) -> bool:
    """Whether hexadecimal digits are a key to which a deal can be sealed."""
    try:
        key = X25519PublicKey.from_public_bytes(bytes.fromhex(digits))
        X25519PrivateKey.generate().exchange(key)
    except ValueError:
        return False
    return True


def signed_by(pin: str, message: bytes, signed: Mapping[str, Any]) -> bool:
    """Whether the party with a pinned certificate signed a message.

    Parameters
    ----------
    pin : str
        fingerprint of its certificate.
    message : bytes
    signed : dict
        as `Identity.sign` made it, or anything that a stranger wrote.

    Returns
    -------
    signed : bool
    """
    try:
        der = base64.b64decode(signed["certificate"], validate=True)
        if _fingerprint(der) != pin:
            return False
        key = x509.load_der_x509_certificate(der).public_key()
        if not isinstance(key, Ed25519PublicKey):
            return False
        key.verify(bytes.fromhex(signed["signature"]), message)
    except (KeyError, TypeError, ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def parse_fingerprint(text):
    """The usual form of a fingerprint that somebody typed; None if it is none."""
    digits = re.sub(r"^sha-?256( fingerprint)?[:=]|[:\s-]", "", text.strip().lower())
    if not re.fullmatch("[0-9a-f]{64}", digits):
        return None
    digits = digits.upper()
    return ":".join(digits[i : i + 2] for i in range(0, len(digits), 2))


def certificate_name(certificate: x509.Certificate) -> str:
    """The common name in a certificate, fit to be shown."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:  # a stranger may write anything there
        names = []
    text = str(names[0].value) if names else "nobody"
    return "".join(c if c.isprintable() else "?" for c in text[:64])


def validity_problem(certificate, now=None):
    """Why a certificate is not valid now, in words; None if it is."""
    now = datetime.datetime.now(datetime.timezone.utc) if now is None else now
    if now > certificate.not_valid_after_utc:
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
    if now < certificate.not_valid_before_utc:
        return (
            f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} "
            "UTC (is a clock wrong?)"
        )
    return None


def _write_private(path, data):
    # Under its final name only when it is whole, and never readable by others.
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as stream:
        stream.write(data)
    os.replace(temporary, path)
