"""Directories: who owns what, at which epoch, behind one interface.

| URL | home |
|---|---|
| `memory://` | this object alone: tests, a node of one's own |
| `memory://NAME` | shared by name within the process, while open |
| `sqlite:///run/cluster.db` | a file relative to the working directory; all nodes of one host |
| `sqlite:////var/lib/cluster.db` | the same with an absolute path; a plain path does as well |
| `etcd://h1:2379,h2:2379/prefix` | an etcd v3 cluster; nodes of many hosts. See `etcd` |
"""

from __future__ import annotations

import os

from migrate.shell.directories.base import (
    Change,
    Changes,
    Compacted,
    Compare,
    Directory,
    DirectoryError,
    DirectoryUnavailable,
    Entry,
    LeaseGone,
    OutcomeUnknown,
    Put,
    Txn,
)
from migrate.shell.directories.etcd import EtcdDirectory
from migrate.shell.directories.memory import MemoryDirectory
from migrate.shell.directories.sqlite import SqliteDirectory

__all__ = [
    "Change",
    "Changes",
    "Compacted",
    "Compare",
    "Directory",
    "DirectoryError",
    "DirectoryUnavailable",
    "Entry",
    "EtcdDirectory",
    "LeaseGone",
    "MemoryDirectory",
    "OutcomeUnknown",
    "Put",
    "SqliteDirectory",
    "Txn",
    "open_directory",
]

_KNOWN = (
    "memory://, memory://NAME, sqlite:///relative/path.db, sqlite:////absolute/path.db, "
    "etcd://HOST:PORT,.../PREFIX"
)


def open_directory(url: str | os.PathLike[str] | Directory | None = None) -> Directory:
    """Make the directory that `url` names. It still has to be started; nothing is touched yet.

    Args:
        url: A URL as in this module's table, a path of an SQLite file, None for a private
            directory in memory, or a directory, which is returned as it is. A relative path
            is resolved here, against the working directory.

    Raises:
        ValueError: The scheme is unknown, or the URL lacks its path or is malformed.
    """
    if url is None:
        return MemoryDirectory()
    if isinstance(url, Directory):
        return url
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text or text == ":memory:":
            raise ValueError(f"{text!r} names no directory; known are a path and {_KNOWN}")
        return SqliteDirectory(text)
    match scheme:
        case "memory":
            return MemoryDirectory(rest)
        case "sqlite":
            if not rest.startswith("/") or rest == "/":
                raise ValueError(
                    f"{text!r} has no path: write sqlite:///relative/path.db or "
                    "sqlite:////absolute/path.db"
                )
            return SqliteDirectory(rest[1:])
        case "etcd":
            try:
                return EtcdDirectory.from_url(text)
            except (OSError, ValueError) as error:
                # NB: not the URL itself, which may hold a password.
                raise ValueError(f"the URL of an etcd directory is wrong: {error}") from error
        case _:
            raise ValueError(f"{text!r} has an unknown scheme; known are a path and {_KNOWN}")
