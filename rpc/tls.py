"""Mutual TLS: certificates of a cluster's own authority, in one folder.

The folder holds `ca.pem`, and for each role a certificate and a key: `node.pem` and `node.key`,
`client.pem` and `client.key`. Every certificate names its role as one more DNS name
(`node.livemigrate`, `client.livemigrate`). A dialler checks that name instead of the host's, so
that addresses may change; and an acceptor takes nobody for a node whose certificate is a client's.
Whoever has no certificate of the authority gets no further than TLS.

`migrate certs init` makes such a folder; certificates of another authority serve as well if they
carry these names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import grpc

from rpc import auth
from rpc.errors import SecretFileError

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


@dataclass(frozen=True, slots=True)
class Tls:
    """One side's certificate and key, and the authority it trusts; all PEM."""

    ca: bytes
    cert: bytes
    key: bytes

    def server_credentials(self) -> grpc.ServerCredentials:
        """For listening; takes only diallers with a certificate of the authority."""
        return grpc.ssl_server_credentials(
            [(self.key, self.cert)], root_certificates=self.ca, require_client_auth=True
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For dialling a node; the name to expect is the role's."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)


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
    base = Path(folder)
    if role == "client" and not (base / "client.pem").exists():
        role = "node"
    return Tls(
        _read(base / "ca.pem"),
        _read(base / f"{role}.pem"),
        auth.read_key(base / f"{role}.key"),
    )


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
