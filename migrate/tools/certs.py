"""`migrate certs init`: a small private authority, and the certificates of a cluster.

Needs the package `cryptography` (extra `tls`); running nodes do not.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from migrate.errors import UsageError
from rpc.tls import ROLE_NAMES

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY_DAYS: Final = 3650
DAYS: Final = 825
"""How long the certificates of a cluster are good; the longest that all systems accept."""

EARLY: Final = datetime.timedelta(days=1)
"""They are good from before they were made, because the clocks of hosts differ."""


class Made(NamedTuple):
    """What was made.

    Attributes:
        folder: Where everything is.
        files: Names of the new files in it, sorted.
        until: When the first of the certificates ends, as a date of ISO 8601.
    """

    folder: str
    files: list[str]
    until: str


def init(folder: Path, hosts: Sequence[str], days: int, renew: bool) -> Made:
    """Make what is missing of an authority and of the certificates of a cluster.

    Args:
        folder: Made if it is missing, open to this user only.
        hosts: Names and addresses of the hosts: more names in the node's certificate, for those
            who look for them: etcd's members and clients in other languages.
        days: How long the certificates are good.
        renew: Make certificates and keys anew that are there already; the authority stays.

    Raises:
        UsageError: `cryptography` is not installed, the folder cannot be written, or certificates
            would have to be made by an authority whose key is elsewhere.
    """
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise UsageError(
            "certificates are made with the package cryptography, which is not installed: "
            "pip install 'livemigrate[tls]', or copy the certificates from where they were made",
            cause=str(error),
        ) from error
    files: dict[str, bytes] = {}
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        roles = [r for r in ROLE_NAMES if renew or not (folder / f"{r}.pem").exists()]
        authority = folder / "ca.pem"
        if not authority.exists():
            roles = list(ROLE_NAMES)
            ca, ca_key = _authority()
            files["ca.pem"], files["ca.key"] = _pem(ca, ca_key)
        elif roles:
            from cryptography import x509

            ca = x509.load_pem_x509_certificate(authority.read_bytes())
            ca_key = serialization.load_pem_private_key(  # type: ignore[assignment]
                (folder / "ca.key").read_bytes(), None
            )
        until = ""
        for role in roles:
            names = [ROLE_NAMES[role], *(hosts if role == "node" else ())]
            certificate, key = _issued(ca, ca_key, role, names, days)
            files[f"{role}.pem"], files[f"{role}.key"] = _pem(certificate, key)
            until = certificate.not_valid_after_utc.date().isoformat()
        for name, data in files.items():
            _write(folder / name, data)
    except FileNotFoundError as error:
        raise UsageError(
            f"{error.filename} is not here: certificates are made where the authority's key is, "
            "and copied from there",
            cause=str(error),
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the certificates in {folder} cannot be made: {error}", cause=str(error)
        ) from error
    return Made(str(folder), sorted(files), until)


def _write(path: Path, data: bytes) -> None:
    # Whole or not at all: a node may be reading it.
    candidate = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    candidate.replace(path)


def _pem(certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return (
        certificate.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def _authority() -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    # Told apart from the authorities of other clusters in messages about them.
    name = _name(f"livemigrate authority {secrets.token_hex(4)}")
    certificate = (
        _begun(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _issued(
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
    role: str,
    names: Sequence[str],
    days: int,
) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = ec.generate_private_key(ec.SECP256R1())
    # A node dials too.
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if role == "node":
        purposes.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    certificate = (
        _begun(_name(f"livemigrate {role}"), ca.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(it) for it in names]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    return certificate, key


def _begun(
    subject: x509.Name, issuer: x509.Name, key: object, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(common: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
