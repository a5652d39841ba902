"""What `migrate inspect` tells of a checkpoint; nothing here unpickles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from migrate.errors import CheckpointError
from migrate.shell import checkpoints
from migrate.tools import output
from rpc import auth
from rpc.errors import RpcError
from serializers import archive
from serializers.archive import BadArchive

BYTES_MAX = 1 << 40
"""A larger checkpoint is not read for `--verify`."""


def inspected(url: str, key: bytes | None, secret_file: str | None, verify: bool) -> dict[str, Any]:
    """All that can be told of a checkpoint.

    Args:
        url: Where it is.
        key: What it should be signed with; None: the cluster's own key.
        secret_file: The cluster secret; None: the user's. It is not made if it is not there.
        verify: Whether all of it is read and checked.

    Returns:
        Facts as JSON values; `flaw` and `reason` are None if nothing is wrong.

    Raises:
        CheckpointError: It has no header that can be read.
    """
    header, facts, found, start = checkpoints.inspect(url)
    signing = _signing_key(key, secret_file)
    flaw = reason = None
    if signing is None:
        flaw, reason = "wrong key", "there is no cluster secret here to check its signature with"
    else:
        try:
            archive.check_header(start, signing)
            if verify:
                checkpoints.load(found, signing, BYTES_MAX)
        except BadArchive as error:
            flaw, reason = error.flaw, error.reason
        except CheckpointError as error:
            flaw, reason = error.flaw, error.cause or error.message
    stored = sum(part.stored for part in header.parts)
    return {
        "url": found,
        **msgspec.to_builtins(facts),
        "written_by": header.written_by,
        "key_id": header.key_id,
        "bytes": header.size_bytes,
        "bytes_uncompressed": header.size_bytes - stored + sum(part.size for part in header.parts),
        "digest": f"sha256:{header.digest}",
        "parts": [
            {"name": p.name, "bytes": p.size, "stored": p.stored, "coding": p.coding}
            for p in header.parts
        ],
        "verified": "all" if verify and not flaw else "no" if flaw else "header",
        "flaw": flaw,
        "reason": reason,
    }


def _signing_key(key: bytes | None, secret_file: str | None) -> bytes | None:
    if key is not None:
        return checkpoints.signing_key(b"", key)
    path = Path(secret_file) if secret_file else auth.default_secret_path()
    if not path.exists():
        return None
    try:
        return checkpoints.signing_key(auth.load_or_create_secret(path), None)
    except RpcError:
        return None


def show(told: dict[str, Any]) -> None:
    """Print it for people."""
    python = told["written_by"].get("python")
    libraries = told["written_by"].get("libraries", {})
    output.facts(
        [
            ("url", told["url"]),
            ("server", told["server"]),
            ("name", told["name"]),
            ("class", f"{told['cls']} version {told['version']}"),
            ("class inside", told["by_value"]),
            ("taken", f"{told['taken']} on node {told['node']}"),
            ("epoch", told["epoch"]),
            ("generation", told["generation"]),
            ("casts waiting", told["casts"]),
            ("requests dropped", told["dropped"]),
            ("python", python),
            ("libraries", ", ".join(f"{name} {version}" for name, version in libraries.items())),
            ("bytes", f"{told['bytes']:,} ({told['bytes_uncompressed']:,} uncompressed)"),
            ("digest", told["digest"]),
            ("key", told["key_id"]),
            ("verified", told["reason"] or told["verified"]),
        ]
    )
    if told["attributes"]:
        rows = [(name, f"{size:,}") for name, size in told["attributes"].items()]
        output.table(["ATTRIBUTE", "BYTES"], rows)
