"""Where clusters can be found: `up` writes it down, every other verb reads it.

A cluster that `migrate up` runs has a small file in a folder of this user's own, so that the
other verbs find it without arguments. `--cluster HOST:PORT` needs no file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import psutil

from migrate.client import Client, connect
from migrate.errors import MigrateError, UsageError
from migrate.options import NodeOptions
from migrate.tools.errors import ClusterNotFound

CLUSTER_VARIABLE: Final = "LIVEMIGRATE_CLUSTER"
"""Environment variable that says which cluster is meant."""

DEFAULT_NAME: Final = "default"
FILE_BYTES_MAX: Final = 1 << 20
NAME_CHARS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
CONNECT_S: Final = 5.0

STARTED_SLACK_S: Final = 2.0
"""Two readings of when a process started differ by less: the system's clock is adjusted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a cluster can be reached.

    Attributes:
        name: Its name, or its address if it was given by address.
        addresses: host:port of nodes, to be tried in this order.
        secret_file: The cluster secret; None: the user's own.
        directory: URL of its directory; empty if it is not known.
        pid: The process that runs it; 0 if it is not known.
    """

    name: str
    addresses: tuple[str, ...]
    secret_file: str | None = None
    directory: str = ""
    pid: int = 0


def runtime_folder() -> Path:
    """The folder with the files of this user's running clusters, made if it is missing.

    It is `livemigrate` in XDG_RUNTIME_DIR, or `livemigrate-UID` in the folder for temporary
    files.

    Raises:
        UsageError: It belongs to somebody else, or others may enter it: what is read
            there says which secret is shown to whom.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(base) and os.path.isdir(base):
        folder = Path(base) / "livemigrate"
    else:
        folder = Path(tempfile.gettempdir()) / f"livemigrate-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        # Not followed: a link in a folder where everybody may write can be anybody's.
        status = os.lstat(folder)
    except OSError as error:
        raise UsageError(
            f"the folder {folder} for running clusters cannot be made: {error}; set "
            "XDG_RUNTIME_DIR to a folder of your own",
            cause=str(error),
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UsageError(
            f"{folder} must be a folder that only user {os.getuid()} can enter (mode 700): remove "
            "it, or set XDG_RUNTIME_DIR to a folder of your own"
        )
    return folder


def _file(name: str) -> Path:
    if not 1 <= len(name) <= 64 or not NAME_CHARS.issuperset(name) or name.startswith("."):
        raise UsageError(
            f"{name!r} cannot name a cluster: 1 to 64 letters, digits and the signs - _ . are "
            "allowed, and no . in front"
        )
    return runtime_folder() / f"{name}.json"


def _process_started(pid: int) -> float:
    """When a process started, in seconds since 1970; 0 if there is none."""
    try:
        return psutil.Process(pid).create_time()
    except (psutil.Error, ValueError):
        return 0.0


def _read(path: Path) -> tuple[Place, bool] | None:
    """The cluster that a file tells of, and whether it still runs; None without a file.

    Raises:
        UsageError: The file is damaged.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(FILE_BYTES_MAX)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}", cause=str(error)) from error
    try:
        told = json.loads(text)
        place = Place(
            name=str(told["name"]),
            addresses=tuple(str(address) for address in told["addresses"]),
            secret_file=str(told["secret_file"]),
            directory=str(told["directory"]),
            pid=int(told["pid"]),
        )
        started = float(told["started"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is damaged ({error!r}): remove it, and start its cluster again",
            cause=repr(error),
        ) from error
    now = _process_started(place.pid)
    return place, bool(now) and abs(now - started) <= STARTED_SLACK_S


def check_free(name: str) -> None:
    """Refuse the name of a cluster that runs.

    Raises:
        UsageError: It runs; the message says where.
    """
    found = _read(_file(name))
    if found is not None and found[1]:
        raise UsageError(
            f"a cluster named {name!r} is up already (pid {found[0].pid}, "
            f"{found[0].addresses[0]}): use it, or start another one with --name"
        )


@contextlib.contextmanager
def published(place: Place) -> Iterator[None]:
    """Let the other verbs find a cluster while the context lasts.

    Raises:
        UsageError: A cluster of that name runs.
    """
    path = _file(place.name)
    pid = os.getpid()
    text = json.dumps(
        {
            "name": place.name,
            "addresses": place.addresses,
            "secret_file": place.secret_file,
            "directory": place.directory,
            "pid": pid,
            "started": _process_started(pid),
        }
    )
    candidate = path.with_name(f".{path.name}.{pid}.{secrets.token_hex(4)}")
    handle = os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        while True:
            try:
                # A link appears whole or not at all, and of two takers one loses.
                os.link(candidate, path)
                break
            except FileExistsError:
                check_free(place.name)
                path.unlink(missing_ok=True)
    finally:
        candidate.unlink()
    try:
        yield
    finally:
        # Nobody took the name meanwhile: this process runs.
        path.unlink(missing_ok=True)


def find(cluster: str | None) -> Place:
    """Tell where a cluster is.

    Args:
        cluster: host:port of one of its nodes, or the name it was started under; None: what
            LIVEMIGRATE_CLUSTER says, else "default".

    Raises:
        ClusterNotFound: None of that name runs here.
        UsageError: It is neither a name nor an address, or its file is damaged.
    """
    wanted = cluster or os.environ.get(CLUSTER_VARIABLE) or DEFAULT_NAME
    if ":" in wanted:
        return Place(wanted, (wanted,))
    path = _file(wanted)
    found = _read(path)
    if found is None or not found[1]:
        why = "none was started" if found is None else f"its process {found[0].pid} is gone"
        others = sorted(p.stem for p in path.parent.glob("*.json") if p != path and _runs(p))
        up = f"; up are: {', '.join(others)}" if others else ""
        raise ClusterNotFound(
            f"no cluster named {wanted!r} runs here ({why}){up}. Start one with `migrate up`, or "
            f"say which is meant with --cluster HOST:PORT or {CLUSTER_VARIABLE}",
            cluster=wanted,
        )
    return found[0]


def _runs(path: Path) -> bool:
    try:
        found = _read(path)
    except UsageError:
        return False
    return found is not None and found[1]


@contextlib.asynccontextmanager
async def client_of(
    place: Place, secret_file: str | None = None, options: NodeOptions | None = None
) -> AsyncIterator[Client]:
    """Connect to a cluster by the first of its nodes that answers.

    Args:
        place: Where it is.
        secret_file: The cluster secret; None: the one that `place` names, else the user's own.
        options: Tunables of the client.

    Raises:
        ClusterNotFound: None of its nodes answered.
        AuthError: The secret is another one, or cannot be read.
    """
    causes = []
    for address in place.addresses:
        client = connect(
            address,
            secret_file=secret_file or place.secret_file,
            options=options,
            timeout_s=CONNECT_S,
        )
        try:
            await client.__aenter__()
        except MigrateError as error:
            if type(error) is not MigrateError:
                raise
            causes.append(error.message)
            continue
        try:
            yield client
        finally:
            await client.close()
        return
    raise ClusterNotFound(
        f"{'; '.join(causes) or f'{place.name} has no nodes'}. `migrate up` starts a cluster",
        cluster=place.name,
    )
