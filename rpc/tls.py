"""Mutual TLS: certificates of a cluster's own authority, in one folder.

The folder holds `ca.pem`, and for each role a certificate and a key: `node.pem` and `node.key`,
`client.pem` and `client.key`. Every certificate names its role as one more DNS name
(`node.livemigrate`, `client.livemigrate`). A dialler checks that name instead of the host's, so
that addresses may change; and an acceptor takes nobody for a node whose certificate is a client's.
Whoever has no certificate of the authority gets no further than TLS.

`migrate certs init` makes such a folder; certificates of another authority serve as well if they
carry these names.

Certificates expire, so the files are read again when they have changed: every handshake after that
uses the new ones. Connections that stand keep what they were made with.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import grpc

from rpc import auth
from rpc.errors import SecretFileError

log: Final = logging.getLogger("migrate.rpc")

FOLDER_VARIABLE: Final = "LIVEMIGRATE_TLS_DIR"
"""Environment variable that names the folder."""

FILE_BYTES_MAX: Final = 1 << 20
"""A larger file holds no certificates."""

Role = Literal["node", "client"]

ROLE_NAMES: Final[dict[Role, str]] = {
    "node": "node.livemigrate",
    "client": "client.livemigrate",
}
"""The DNS name that a certificate of each role carries."""


class Credentials(Protocol):
    """What a transport needs of certificates."""

    def server_credentials(self) -> grpc.ServerCredentials:
        """For listening; takes only diallers with a certificate of the authority."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For dialling a node; the name to expect is the role's."""


@dataclass(frozen=True, slots=True)
class Tls:
    """One side's certificate and key, and the authority it trusts; all PEM."""

    ca: bytes
    cert: bytes
    key: bytes

    def server_credentials(self) -> grpc.ServerCredentials:
        """See `Credentials`."""
        return grpc.ssl_server_credentials(
            [(self.key, self.cert)], root_certificates=self.ca, require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """See `Credentials`."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)


class TlsFolder:
    """The certificates of one role as they are in their folder now.

    New files are taken when they are whole: an authority, and a certificate with its own key. Until
    then, as while one of them is replaced, the former ones go on serving, and the log says so once.

    Args:
        folder: See the module's text.
        role: As `load_tls` takes it.

    Raises:
        SecretFileError: As `load_tls` raises it; only here, not later.
    """

    def __init__(self, folder: str | os.PathLike[str], role: Role) -> None:
        self._folder = Path(folder)
        self._role: Role = role
        self._lock = threading.Lock()  # handshakes are on gRPC's threads
        self._seen = self._stamp()
        self._tls = load_tls(folder, role)

    def current(self) -> Tls:
        """The newest whole certificates; reads nothing while the files are as they were."""
        with self._lock:
            seen = self._stamp()
            if seen != self._seen:
                self._seen = seen
                try:
                    fresh = load_tls(self._folder, self._role)
                    self._check_pair()
                except (SecretFileError, OSError) as error:  # ssl.SSLError is an OSError
                    log.error(
                        "the certificates in %s changed and cannot be used; the former ones go on "
                        "serving until the files are whole: %s",
                        self._folder,
                        error,
                    )
                else:
                    if self._stamp() != seen:
                        self._seen = ()  # They changed meanwhile: looked at again next time.
                    elif fresh != self._tls:
                        self._tls = fresh
                        log.info("the certificates in %s are taken over", self._folder)
            return self._tls

    def server_credentials(self) -> grpc.ServerCredentials:
        """See `Credentials`."""
        told = self.current()

        def configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(tls.key, tls.cert)], tls.ca)

        def newest() -> grpc.ServerCertificateConfiguration | None:
            nonlocal told
            tls = self.current()
            if tls is told:
                return None  # as they were
            told = tls
            return configuration(tls)

        return grpc.dynamic_ssl_server_credentials(
            configuration(told),
            newest,  # type: ignore[arg-type]  # the stubs do not know of None
            require_client_authentication=True,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """See `Credentials`."""
        return self.current().channel_credentials()

    def _stamp(self) -> tuple[object, ...]:
        """What tells whether a file was replaced or written."""
        stamp: list[object] = []
        for path in _paths(self._folder, self._role):
            try:
                status = path.stat()
            except OSError:
                stamp.append(None)
            else:
                stamp.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(stamp)

    def _check_pair(self) -> None:
        ca, cert, key = _paths(self._folder, self._role)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_verify_locations(ca)
        context.load_cert_chain(cert, key)


def default_tls_folder(secret_path: str | os.PathLike[str]) -> Path:
    """Tell where the certificates of a cluster are kept.

    Args:
        secret_path: The file with the cluster secret.

    Returns:
        The path in LIVEMIGRATE_TLS_DIR, if that is set and not empty; else the folder `tls` beside
        the secret. It need not exist.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path(secret_path).with_name("tls")


def load_tls(folder: str | os.PathLike[str], role: Role) -> Tls:
    """Read the certificates of one role.

    Args:
        folder: See the module's text.
        role: A client without a certificate of its own uses the node's, if that is there.

    Raises:
        SecretFileError: A file is missing, cannot be read, or a key is open to other users.
    """
    ca, cert, key = _paths(Path(folder), role)
    return Tls(_read(ca), _read(cert), auth.read_key(key))


def _paths(folder: Path, role: Role) -> tuple[Path, Path, Path]:
    """The files with the authority, the certificate and its key."""
    if role == "client" and not (folder / "client.pem").exists():
        role = "node"
    return folder / "ca.pem", folder / f"{role}.pem", folder / f"{role}.key"


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise SecretFileError(
            f"cannot read the certificate {path}: {error}; make the folder with "
            f"'migrate certs init', copy it here, or name another one in {FOLDER_VARIABLE}",
            path=str(path),
        ) from error
    if not data.lstrip().startswith(b"-----BEGIN") or len(data) > FILE_BYTES_MAX:
        raise SecretFileError(f"{path} holds no certificate in PEM form", path=str(path))
    return data
