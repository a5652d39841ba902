"""The cluster secret: where it is kept, and how two sides prove to hold it; the API token.

The first node of a cluster makes a secret in a file that only its user can
read; the user's other nodes find it there. It never crosses the wire. Each
side sends a fresh nonce and proves the secret with an HMAC over its role, both
nonces and both descriptions; from the same values both derive one key per
direction for the MACs of the frames, so a frame recorded on one connection is
worthless on any other, in the other direction too.

Source: challenge and response in the manner of ISO/IEC 9798-4 mutual
authentication; HMAC is RFC 2104, SHA-256 is FIPS 180-4.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import NamedTuple

from rpc.errors import SecretFileError

SECRET_BYTES = 32
"""Size of a secret that we make."""

SECRET_BYTES_MAX = 4096
"""A larger file is not a secret."""

NONCE_BYTES = 32
"""Size of each side's nonce."""

SECRET_FILE_VARIABLE = "LIVEMIGRATE_SECRET_FILE"
"""Environment variable that names the file with the secret."""

TOKEN_BYTES_MIN = 32
"""A shorter token is refused: 32 hexadecimal digits are 128 bits."""

TOKEN_FILE_VARIABLE = "LIVEMIGRATE_TOKEN_FILE"
"""Environment variable that names the file with the token of the public API."""


class _Kept(NamedTuple):
    """What is kept in a file that only its user can read, and how errors speak of it."""

    what: str
    variable: str
    bytes_min: int


_SECRET = _Kept("cluster secret", SECRET_FILE_VARIABLE, SECRET_BYTES)
_TOKEN = _Kept("API token", TOKEN_FILE_VARIABLE, TOKEN_BYTES_MIN)
_KEY = _Kept("TLS key", "LIVEMIGRATE_TLS_DIR", 64)


def default_secret_path() -> Path:
    """Tell where this user's cluster secret is kept.

    Returns:
        The path in LIVEMIGRATE_SECRET_FILE, if that is set and not empty; else
        `livemigrate/cluster.secret` in the user's configuration folder
        (XDG_CONFIG_HOME, or `.config` in the home folder). It need not exist.
    """
    named = os.environ.get(SECRET_FILE_VARIABLE)
    if named:
        return Path(named)
    # The XDG specification says that a relative value is to be ignored.
    config = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(config) if os.path.isabs(config) else Path.home() / ".config"
    return base / "livemigrate" / "cluster.secret"


def load_or_create_secret(path: str | os.PathLike[str]) -> bytes:
    """Read the cluster secret, making one if there is none.

    Nodes that start at the same time agree: each writes its own candidate in
    full, and one of them gets the name.

    Args:
        path: The file. Missing folders are made, open to this user only.

    Returns:
        The secret, 32 to 4096 bytes.

    Raises:
        SecretFileError: The file can be read or written by others, belongs to
            another user, is not a regular file, has a wrong size, or cannot be
            made or read. An existing file is never changed.
    """
    return _load_or_create(Path(path), _SECRET, secrets.token_bytes(SECRET_BYTES))


def default_token_path(secret_path: str | os.PathLike[str]) -> Path:
    """Tell where the token of a cluster's public API is kept.

    Args:
        secret_path: The file with the cluster secret.

    Returns:
        The path in LIVEMIGRATE_TOKEN_FILE, if that is set and not empty; else a file beside
        the secret, named like it with the ending `.token`. It need not exist.
    """
    named = os.environ.get(TOKEN_FILE_VARIABLE)
    if named:
        return Path(named)
    secret = Path(secret_path)
    if secret.suffix == ".token":
        return secret.with_name(secret.name + ".token")
    return secret.with_suffix(".token")


def load_or_create_token(path: str | os.PathLike[str]) -> str:
    """Read the token of the public API, making one if there is none.

    The token is not derived from the cluster secret, and whoever has it cannot join the
    cluster. Nodes that start at the same time agree, as about the secret.

    Args:
        path: The file. Missing folders are made, open to this user only.

    Returns:
        32 to 4096 visible ASCII characters; white space around them in the file is dropped.

    Raises:
        SecretFileError: As for the secret; or the file holds anything but one word of visible
            ASCII characters. An existing file is never changed.
    """
    target = Path(path)
    made = secrets.token_urlsafe(SECRET_BYTES).encode() + b"\n"
    token = _load_or_create(target, _TOKEN, made).strip()
    if len(token) < TOKEN_BYTES_MIN or not all(0x21 <= byte <= 0x7E for byte in token):
        raise SecretFileError(
            f"the API token {target} is not one word of at least {TOKEN_BYTES_MIN} visible ASCII "
            "characters; remove the file and let a node make it anew",
            path=str(target),
        )
    return token.decode("ascii")


def read_key(path: str | os.PathLike[str]) -> bytes:
    """Read the key of a certificate.

    Raises:
        SecretFileError: As for the secret; or there is no such file.
    """
    try:
        return _read(Path(path), _KEY)
    except FileNotFoundError as error:
        raise SecretFileError(
            f"cannot read the TLS key {path}: {error}; copy it from where 'migrate certs init' "
            "was run",
            path=str(path),
        ) from error


def _load_or_create(target: Path, kept: _Kept, content: bytes) -> bytes:
    try:
        return _read(target, kept)
    except FileNotFoundError:
        pass
    try:
        _create(target, content)
    except OSError as error:
        raise SecretFileError(
            f"cannot make a {kept.what} in {target}: {error}; make the folder writable, or "
            f"name another file in {kept.variable}",
            path=str(target),
        ) from error
    try:
        return _read(target, kept)
    except FileNotFoundError as error:
        raise SecretFileError(
            f"the {kept.what} {target} vanished just after it was made; see what removes it",
            path=str(target),
        ) from error


def _create(target: Path, content: bytes) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    candidate = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(8)}"
    handle = os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            # A hard link appears whole or not at all, and unlike a rename it
            # never takes the name from whoever was first.
            os.link(candidate, target)
        except FileExistsError:
            return
    finally:
        candidate.unlink()


def _read(target: Path, kept: _Kept) -> bytes:
    try:
        with open(target, "rb") as file:
            # The open file is examined, not the name, which may be replaced meanwhile.
            status = os.fstat(file.fileno())
            _check(target, kept, status)
            secret = file.read(SECRET_BYTES_MAX + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SecretFileError(
            f"cannot read the {kept.what} {target}: {error}; run as the user who owns it, or "
            f"name another file in {kept.variable}",
            path=str(target),
        ) from error
    if not kept.bytes_min <= len(secret) <= SECRET_BYTES_MAX:
        raise SecretFileError(
            f"the {kept.what} {target} has {len(secret)} bytes instead of {kept.bytes_min} to "
            f"{SECRET_BYTES_MAX}; remove the file on all nodes and let it be made anew",
            path=str(target),
        )
    return secret


def _check(target: Path, kept: _Kept, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SecretFileError(
            f"the {kept.what} {target} is not a regular file; name a file in {kept.variable}",
            path=str(target),
        )
    if not hasattr(os, "getuid"):
        return  # Without POSIX owners and modes there is nothing to compare.
    if status.st_uid != os.getuid():
        raise SecretFileError(
            f"the {kept.what} {target} belongs to user {status.st_uid}, but this process runs "
            f"as user {os.getuid()}; run as its owner, or copy it to a file of your own (mode 600) "
            f"and name that in {kept.variable}",
            path=str(target),
        )
    if status.st_mode & 0o077:
        raise SecretFileError(
            f"the {kept.what} {target} is open to other users (mode "
            f"{stat.S_IMODE(status.st_mode):o}); run 'chmod 600 {target}', and if others may have "
            "read it, remove it on all nodes and let it be made anew",
            path=str(target),
        )


class Transcript(NamedTuple):
    """What both sides said in the open; proofs and keys cover all of it.

    Attributes:
        dialler_nonce: Fresh random bytes of the dialling side.
        acceptor_nonce: Fresh random bytes of the accepting side.
        dialler: The dialling side's description, as it crossed the wire.
        acceptor: The accepting side's description, as it crossed the wire.
    """

    dialler_nonce: bytes
    acceptor_nonce: bytes
    dialler: bytes
    acceptor: bytes


class LinkKeys(NamedTuple):
    """Keys of one connection.

    Attributes:
        from_dialler: MAC key of frames sent by the dialling side, 32 bytes.
        from_acceptor: MAC key of frames sent by the accepting side, 32 bytes.
        link_id: Names the connection, 16 bytes; not secret.
    """

    from_dialler: bytes
    from_acceptor: bytes
    link_id: bytes


def new_nonce() -> bytes:
    """Make a nonce: 32 fresh random bytes."""
    return secrets.token_bytes(NONCE_BYTES)


def _digest(secret: bytes, label: bytes, transcript: Transcript) -> bytes:
    mac = hmac.new(secret, digestmod=hashlib.sha256)
    for field in (label, *transcript):
        # Lengths keep two different lists of fields from reading alike.
        mac.update(len(field).to_bytes(4, "big"))
        mac.update(field)
    return mac.digest()


def dialler_proof(secret: bytes, transcript: Transcript) -> bytes:
    """Prove the secret as the dialling side: 32 bytes."""
    return _digest(secret, b"livemigrate dialler proof 1", transcript)


def acceptor_proof(secret: bytes, transcript: Transcript) -> bytes:
    """Prove the secret as the accepting side: 32 bytes."""
    return _digest(secret, b"livemigrate acceptor proof 1", transcript)


def proves(proof: bytes, expected: bytes) -> bool:
    """Compare a received proof with the right one, in constant time."""
    return hmac.compare_digest(proof, expected)


def link_keys(secret: bytes, transcript: Transcript) -> LinkKeys:
    """Derive the keys of one connection.

    Args:
        secret: The cluster secret.
        transcript: What both sides said; the same on both.

    Returns:
        The keys; both sides derive the same ones, no other connection does.
    """
    return LinkKeys(
        _digest(secret, b"livemigrate frames from dialler 1", transcript),
        _digest(secret, b"livemigrate frames from acceptor 1", transcript),
        _digest(secret, b"livemigrate link id 1", transcript)[:16],
    )
