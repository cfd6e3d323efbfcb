r"""A deal: what the helper has for one owner, in a file that is used once.

A helper that deals before the owners meet (`dealt`) writes a file for each of them.
It holds a secret of the helper and that owner, and all that the helper would have sent
it. The file is sealed: who carries it can neither read nor change it.

=========  ============================================================================
part       contents
=========  ============================================================================
preamble   magic; lengths of the other parts
header     JSON, to be read by all: number of the deal, for whom it is, hashes of the
           session file and of the software, a fresh X25519 key; signed by the helper
body       messages, as the helper would have sent them: name's checksum, length, bytes
trailer    JSON: the secret, where sections begin, what the helper dealt for
=========  ============================================================================

Body and trailer are encrypted with AES-256-GCM under a key that follows, by HKDF, from
the header and the Diffie-Hellman secret of the fresh key with the owner's
(`Identity.sealing`); the body in pieces of `PIECE` bytes, whose numbers are the nonces,
so that none can be left out, or stand elsewhere. The preamble is authenticated with the
trailer, which is encrypted last.

**Once.** Who uses a deal twice shows the other owner the differences of what it masked.
Before the first number of a deal is used (`Deal.use`), an owner's program leaves a mark
beside its key, and refuses a deal that has one; and it overwrites the trailer, without
which the file is good for nothing, wherever it goes from there.

**Unfinished.** What a helper that was killed has written is the beginning of a body,
without the preamble, the trailer, and the secret that would be in it. It is locked
while it is written, so that `remove_unfinished` knows one that nobody writes any more.
"""

from contextlib import suppress
from datetime import datetime, timezone
import fcntl
import hashlib
import json
import os
from pathlib import Path
import secrets
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dipy_ppir.mpc.errors import DealError
from dipy_ppir.mpc.frame import operation_code, parse_metadata
from dipy_ppir.mpc.identity import home, signed_by
from dipy_ppir.mpc.ledger import ROLES
from dipy_ppir.mpc.prg import derive_key
from dipy_ppir.mpc.record import is_hex

#: Folder, beside an owner's key, of the marks of deals that were used.
MARKS = "deals"
PIECE = 1 << 20
_TAG = 16
_MAGIC = b"PPIRDEAL"
_PREAMBLE = struct.Struct("<8sQQQ")
_MESSAGE = struct.Struct("<IQ")
#: Most bytes of a header and of a trailer.
_MOST_HEADER, _MOST_TRAILER = 1 << 16, 1 << 22
#: The nonce of the trailer, which no piece has.
_LAST = (1 << 96) - 1
_FRESH = "make a new deal with dipy_ppir_helper --deal"


def deal_path(folder, plan_path, owner):
    """Where the deal of an owner is: beside the session file, or in a folder.

    Parameters
    ----------
    folder : str or Path or None
    plan_path : str or Path
        the session file.
    owner : int

    Returns
    -------
    path : Path
    """
    plan_path = Path(plan_path)
    folder = plan_path.parent if folder is None else Path(folder)
    return folder / f"{plan_path.stem}.{ROLES[owner].split()[0]}.deal"


def _statement(header):
    return b"dipy_ppir deal: " + json.dumps(header, sort_keys=True).encode()


def _key(shared, header):
    digest = hashlib.sha256(_statement(header)).digest()
    return AESGCM(derive_key(shared, b"deal " + digest))


def _are_facts(facts):
    """Whether facts are as `DealingSession` writes them."""
    agreed, told = facts["agreed"], facts["told"]
    said = [said for each in agreed.values() for said in each]
    return all(isinstance(x, dict) for x in (*said, *told.values()))


class DealWriter:
    """Writes the deal of one owner, which is whole when it is finished.

    Parameters
    ----------
    path : str or Path
    header : dict
        JSON-able, alike for both owners: ``deal``, ``session_file``, ``software``.
    owner : int
    sealing : str
        that owner's `Identity.sealing`.
    identity : Identity
        of the helper, which signs.

    Attributes
    ----------
    size : int
        bytes written so far.
    """

    def __init__(self, path, header, owner, sealing, identity):
        self.path = Path(path)
        self.sections = {}
        self.seed = secrets.token_bytes(32)
        fresh = X25519PrivateKey.generate()
        header = {
            **header,
            "role": ROLES[owner],
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "fresh": fresh.public_key().public_bytes_raw().hex(),
        }
        try:
            shared = fresh.exchange(X25519PublicKey.from_public_bytes(_raw(sealing)))
        except ValueError:
            raise DealError(
                f"the sealing key of the {ROLES[owner]} in the session file is none; "
                "put there what dipy_ppir_keygen --show prints at that owner"
            ) from None
        self._cipher = _key(shared, header)
        signed = {**header, **identity.sign(_statement(header))}
        self._header = json.dumps(signed).encode()
        self._piece, self._count, self.length = bytearray(), 0, 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._stream = open(os.open(self.path, flags, 0o600), "wb")
        os.fchmod(self._stream.fileno(), 0o600)
        with suppress(OSError):  # a disk that knows no locks
            _lock(self._stream)
        self._stream.write(bytes(_PREAMBLE.size) + self._header)

    @property
    def size(self):
        """Bytes of the file so far, all but the trailer."""
        return _PREAMBLE.size + len(self._header) + self.length + _TAG * self._count

    def begin(self, name):
        """Begin a section."""
        if name in self.sections:
            raise ValueError(f"the section {name!r} was dealt already")
        self.sections[name] = self.length

    def send(self, name, data):
        """Append a message, a contiguous array."""
        view = memoryview(data).cast("B")
        self._append(_MESSAGE.pack(operation_code(name), len(view)))
        self._append(view)

    def _append(self, view):
        self.length += len(view)
        while len(view):
            room = PIECE - len(self._piece)
            self._piece += view[:room]
            view = view[room:]
            if len(self._piece) == PIECE:
                self._flush()

    def _flush(self):
        nonce = self._count.to_bytes(12)
        self._stream.write(self._cipher.encrypt(nonce, bytes(self._piece), None))
        self._piece.clear()
        self._count += 1

    def finish(self, facts):
        """Write the rest.

        Parameters
        ----------
        facts : dict
            JSON-able, for the trailer.
        """
        if self._piece:
            self._flush()
        trailer = {**facts, "seed": self.seed.hex(), "sections": self.sections}
        trailer = json.dumps(trailer).encode()
        lengths = len(self._header), self.length, len(trailer)
        preamble = _PREAMBLE.pack(_MAGIC, *lengths)
        nonce = _LAST.to_bytes(12)
        self._stream.write(self._cipher.encrypt(nonce, trailer, preamble))
        self._stream.seek(0)
        self._stream.write(preamble)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def discard(self):
        """Remove what was written."""
        self._stream.close()
        self.path.unlink(missing_ok=True)


def remove_unfinished(paths):
    """Remove deals that nobody writes any more, and nobody finished.

    Parameters
    ----------
    paths : iterable of Path

    Returns
    -------
    removed : list of Path
        Others are being written, or are on a disk that knows no locks.
    """
    removed = []
    for path in paths:
        with suppress(OSError), open(path, "r+b") as stream:
            _lock(stream)
            path.unlink()
            removed.append(path)
    return removed


def _lock(stream):
    """Lock a file until it is closed; an OSError if somebody else has done so."""
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _raw(sealing):
    return bytes.fromhex(sealing)


def _synced(path, flags):
    """Open a file or folder, and wait until that is written."""
    descriptor = os.open(path, flags, 0o600)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Deal:
    """An owner's deal, opened and checked.

    Parameters
    ----------
    path : str or Path
    owner : int
        who this party is.
    plan : SessionFile
    software : dict
        versions and source of this party's programs, which the helper's must be.
    identity : Identity
        of this party.
    folder : str or Path, optional
        of this party's key; marks are beside it.

    Attributes
    ----------
    number : str
        public, the same in the deals of both owners.
    facts : dict
        of `DealWriter.finish`.
    size : int
        bytes of the file.

    Raises
    ------
    DealError
        if this is not a deal, or not whole; of another session, software, owner or
        helper; or one that was used. Naming the cause and what to do.
    """

    def __init__(self, path, owner, plan, software, identity, folder=None):
        self.path, self._piece, self._number = Path(path), b"", None
        self._position, self._begun, self._used = 0, set(), False
        try:
            # To be written as well: who uses it must be able to use it up.
            self._stream = open(self.path, "r+b")
        except OSError as exc:
            raise DealError(
                f"cannot read the helper's deal {self.path}, or not mark it as used: "
                f"{exc.strerror}; put the file that the helper made for this owner "
                "beside the session file, where this account may write"
            ) from None
        try:
            self.size = os.fstat(self._stream.fileno()).st_size
            header = self._read_preamble()
            self._check(header, owner, plan, software)
            self._mark = home(folder) / MARKS / self.number
            if self._mark.exists():
                self._refuse_used()
            self._open(header, identity)
            for piece in range(-(-self.length // PIECE)):
                self._load(piece)
        except BaseException:
            self.close()
            raise

    # -- before the owners meet --------------------------------------------

    def _read_preamble(self):
        self._preamble = self._stream.read(_PREAMBLE.size)
        magic = self._preamble[:8]
        if len(self._preamble) < _PREAMBLE.size or magic != _MAGIC:
            raise DealError(
                f"{self.path} is no deal of a helper, or was not written to its end; "
                "copy it again from where it was made"
            )
        _, header, self.length, trailer = _PREAMBLE.unpack(self._preamble)
        pieces = -(-self.length // PIECE)
        whole = _PREAMBLE.size + header + self.length + trailer + _TAG * (pieces + 1)
        if header > _MOST_HEADER or trailer > _MOST_TRAILER or whole != self.size:
            raise DealError(
                f"the deal {self.path} has {self.size:,} bytes and should have "
                f"{whole:,}; copy it again from where it was made"
            )
        self._start = _PREAMBLE.size + header
        self._trailer = trailer + _TAG
        try:
            found = parse_metadata(self._stream.read(header))
            if not isinstance(found, dict) or not is_hex(found.get("deal"), 32):
                raise ValueError
        except (ValueError, RecursionError):
            raise self._damaged() from None
        return found

    def _damaged(self):
        return DealError(
            f"the deal {self.path} is damaged, or was changed; copy it again from "
            "where it was made"
        )

    def _check(self, header, owner, plan, software):
        signed = {k: header.pop(k, None) for k in ("signature", "certificate")}
        helper = plan.parties[max(plan.parties)]
        if not signed_by(helper.fingerprint, _statement(header), signed):
            raise DealError(
                f"{self.path} was not made by {helper.title}, or was changed; get the "
                "deal from there, and check that its key is the one in the session file"
            )
        if header.get("session_file") != plan.digest:
            raise DealError(
                f"{self.path} was made for another session file than this one; "
                f"{_FRESH} and this session file"
            )
        if header.get("role") != ROLES[owner]:
            raise DealError(
                f"{self.path} is the deal of the {header.get('role')!s:.30}, and this "
                f"party is the {ROLES[owner]}; put its own deal there"
            )
        theirs = header.get("software")
        theirs = theirs if isinstance(theirs, dict) else {}
        for name, here in software.items():
            if theirs.get(name) != here:
                raise DealError(
                    f"the helper made {self.path} with another {name} "
                    f"({theirs.get(name)!s:.80}) than is installed here ({here:.80}); "
                    f"install the same everywhere, and {_FRESH}"
                )
        self.number = header["deal"]

    def _open(self, header, identity):
        self._stream.seek(-self._trailer, os.SEEK_END)
        if not any(self._stream.read(self._trailer)):
            self._refuse_used()
        try:
            fresh = X25519PublicKey.from_public_bytes(bytes.fromhex(header["fresh"]))
            self._cipher = _key(identity.sealing_key.exchange(fresh), header)
            self._stream.seek(-self._trailer, os.SEEK_END)
            sealed = self._stream.read(self._trailer)
            plain = self._cipher.decrypt(_LAST.to_bytes(12), sealed, self._preamble)
        except InvalidTag:
            raise DealError(
                f"{self.path} is sealed for another key than this party's, or damaged; "
                "check that the sealing key in the session file is what "
                "dipy_ppir_keygen --show prints, and copy the file again"
            ) from None
        except (KeyError, TypeError, ValueError):
            raise self._damaged() from None
        # Written by the helper, whose signature and key it has: parsed all the same.
        try:
            facts = parse_metadata(plain)
            self.seed = bytes.fromhex(facts.pop("seed"))
            self.sections = facts.pop("sections")
            whole = all(
                type(at) is int and 0 <= at <= self.length
                for at in self.sections.values()
            )
            if len(self.seed) != 32 or not whole or not _are_facts(facts):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise self._damaged() from None
        self.facts = facts

    # -- used once ---------------------------------------------------------

    def _refuse_used(self):
        raise DealError(
            f"the deal {self.path} was used already, and would show the other owner "
            f"what it hides if it were used again; {_FRESH}"
        )

    def use(self):
        """Mark this deal as used and overwrite its trailer, before a number is used.

        Raises
        ------
        DealError
            if it is used already, or the mark cannot be left.
        """
        if self._used:
            return
        try:
            self._mark.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            _synced(self._mark, flags)
            for folder in (self._mark.parent, self._mark.parent.parent):
                _synced(folder, os.O_RDONLY)
        except FileExistsError:
            self._refuse_used()
        except OSError as exc:
            raise DealError(
                f"cannot mark the deal as used in {self._mark.parent}: {exc.strerror}; "
                "free some space, or let this account write there"
            ) from None
        try:
            # The file that is being read, whatever has its name by now.
            end = self.size - self._trailer
            os.pwrite(self._stream.fileno(), bytes(self._trailer), end)
            os.fsync(self._stream.fileno())
        except OSError as exc:
            raise DealError(
                f"cannot mark the deal {self.path} as used: {exc.strerror}; it is used "
                f"up: {_FRESH}, and put it where this account may write"
            ) from None
        self._used = True

    # -- reading -----------------------------------------------------------

    def begin(self, name):
        """Go to the beginning of a section."""
        if name not in self.sections or name in self._begun:
            raise DealError(
                f"the deal {self.path} has nothing for {name!r}, or it was used: the "
                "helper dealt for another registration, or this one went on where it "
                f"should not; {_FRESH}"
            )
        self._begun.add(name)
        self._position = self.sections[name]

    def receive(self, name, out):
        """Read the next message, which must be for this step and of this length.

        Parameters
        ----------
        name : str
        out : contiguous array
        """
        self.use()
        view = memoryview(out).cast("B")
        head = bytearray(_MESSAGE.size)
        self._read(memoryview(head))
        if _MESSAGE.unpack(head) != (operation_code(name), len(view)):
            raise DealError(
                f"the deal {self.path} was made for another computation: what comes "
                f"next in it is not for {name!r}; {_FRESH}"
            )
        self._read(view)

    def _read(self, view):
        if self._position + len(view) > self.length:
            raise DealError(
                f"the deal {self.path} ends before the computation does: it was made "
                f"for another; {_FRESH}"
            )
        while len(view):
            number, offset = divmod(self._position, PIECE)
            if number != self._number:
                self._load(number)
            part = self._piece[offset : offset + len(view)]
            view[: len(part)] = part
            view = view[len(part) :]
            self._position += len(part)

    def _load(self, number):
        size = min(PIECE, self.length - number * PIECE) + _TAG
        try:
            self._stream.seek(self._start + number * (PIECE + _TAG))
            sealed = self._stream.read(size)
            self._piece = self._cipher.decrypt(number.to_bytes(12), sealed, None)
        except (OSError, InvalidTag):
            raise self._damaged() from None
        self._number = number

    def close(self):
        """Close the file."""
        self._stream.close()
