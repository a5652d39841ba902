"""Where checkpoints are kept: files, this process's memory, object stores; one interface.

A store knows names and bytes. `write` is all or nothing: under the name stands what was there
before until everything new is safe, then everything new; a power cut, a kill or a full disk at any
moment leaves one or the other. All methods block, and are called in threads.

Names of one place are told apart by URL: `file:///folder/name`, `memory://store/name`,
`s3://bucket/folder/name`. A URL may also be that of a folder, under which somebody keeps many
names (`open_folder`); then `file:///folder` is used as an object store would be.
"""

from __future__ import annotations

import abc
import contextlib
import datetime
import errno
import fcntl
import importlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

from migrate.errors import Outcome, UsageError

WRITE_BYTES: Final = 16 << 20
"""Bytes given to the system at a time, so that a kill need not wait for gigabytes."""

ABANDONED_S: Final = 60.0
"""A temporary file is removed when nobody holds it and it is older than this; a writer takes hold
of its own a moment after it has made it."""

_TEMPORARY: Final = ".part"
_RETRY: Final = datetime.timedelta(seconds=5)


class StoreError(Exception):
    """A store could not do it.

    Attributes:
        reason: Why, in words.
        outcome: NOT_DONE: what was there is there. UNKNOWN: the old or the new is there.
    """

    def __init__(self, reason: str, outcome: Outcome = Outcome.NOT_DONE) -> None:
        super().__init__(reason)
        self.reason = reason
        self.outcome = outcome


class Exists(StoreError):
    """There is something of that name already."""


class NotThere(StoreError):
    """There is nothing of that name."""


class Store(abc.ABC):
    """Names and bytes; see the module."""

    @abc.abstractmethod
    def write(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """Put the pieces, one after the other, under a name; how many bytes that were.

        Raises:
            StoreError: The outcome tells whether the former contents may be gone.
        """

    @abc.abstractmethod
    def write_new(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """Put the pieces under a name that nothing has; of two who do so, one succeeds.

        Raises:
            Exists: Something has that name. Perhaps it came from this very call, if the store
                repeats what had no answer: whoever has to know compares the contents.
            StoreError: The outcome tells whether it may be there.
        """

    @abc.abstractmethod
    def read(self, name: str, bytes_max: int, first: int | None = None) -> bytearray:
        """Read what stands under a name.

        Args:
            name: The name.
            bytes_max: Nothing larger is read.
            first: Read so many bytes from the beginning, or all if there are fewer.

        Raises:
            NotThere: Nothing does.
            StoreError: It cannot be read, or is larger.
        """

    @abc.abstractmethod
    def names(self, prefix: str) -> list[str]:
        """All names that begin with a prefix, sorted; the folder is part of a name.

        Raises:
            StoreError: They cannot be listed.
        """

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Remove a name; nothing happens if it is not there.

        Raises:
            StoreError: It cannot be removed.
        """


# ---------------------------------------------------------------------- files


class Disk:
    """The system calls that a write is made of; tests give one that loses power."""

    def create(self, path: str) -> int:
        """Make a new file that only its user can read, and hold it; a descriptor."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):
            # A file system without locks is one on which what is abandoned stays.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle

    def write(self, handle: int, piece: memoryview) -> None:
        """Write all of a piece."""
        while piece.nbytes:
            piece = piece[os.write(handle, piece[:WRITE_BYTES]) :]

    def sync(self, handle: int) -> None:
        """Wait until what was written cannot be lost."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Close a file."""
        os.close(handle)

    def rename(self, path: str, to: str) -> None:
        """Give a file the name of another, which is replaced in one step."""
        os.rename(path, to)

    def link(self, path: str, to: str) -> None:
        """Give a file another name besides, which nothing has."""
        os.link(path, to)

    def sync_folder(self, folder: str) -> None:
        """Wait until the names in a folder cannot be lost."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        except OSError as error:
            # Some file systems have nothing to sync there.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)

    def remove(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)


class FileStore(Store):
    """Files of one folder, each replaced by renaming a new one over it.

    The new file is written beside the old one under a temporary name and synced before the
    rename, the folder after it. Source: the order that rename(2) and fsync(2) promise to survive
    a power cut, also on file systems that write names before data.

    A name with slashes is that of a file in a folder below, which comes with its first file and
    goes with its last.
    """

    def __init__(self, folder: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self.folder = os.fspath(folder)
        self._disk = disk or Disk()

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _make_below(self, name: str) -> None:
        """Make the folders that a name tells of, each safe in the one above it."""
        made = self.folder
        for part in name.split("/")[:-1]:
            above, made = made, os.path.join(made, part)
            try:
                os.mkdir(made, 0o700)
            except FileExistsError:
                continue
            except OSError as error:
                raise StoreError(_why(above, error, "made")) from error
            with contextlib.suppress(OSError):
                self._disk.sync_folder(above)

    def write(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """See `Store.write`."""
        return self._write(name, pieces, new=False)

    def write_new(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """See `Store.write_new`."""
        return self._write(name, pieces, new=True)

    def _write(
        self, name: str, pieces: Sequence[bytes | bytearray | memoryview], *, new: bool
    ) -> int:
        disk = self._disk
        if "/" in name:
            self._make_below(name)
        # A link stays one; what it leads to is replaced.
        path = self._path(name) if new else os.path.realpath(self._path(name))
        folder, last = os.path.split(path)
        if not new:
            with contextlib.suppress(OSError):
                _check_replaceable(os.stat(path))
        # A name has at most 255 bytes; a long one lends only its beginning to the temporary one.
        start = os.fsdecode(os.fsencode(last)[:150])
        temporary = os.path.join(folder, f".{start}.{secrets.token_hex(8)}{_TEMPORARY}")
        size = 0
        try:
            handle = disk.create(temporary)
        except OSError as error:
            raise StoreError(_why(folder, error, "made")) from error
        try:
            try:
                for piece in pieces:
                    view = memoryview(piece).cast("B")
                    disk.write(handle, view)
                    size += view.nbytes
                disk.sync(handle)
                # Held until it has its name: nobody takes it for abandoned.
                if new:
                    disk.link(temporary, path)
                    disk.remove(temporary)
                else:
                    disk.rename(temporary, path)
            finally:
                with contextlib.suppress(OSError):  # it is synced, or it failed already
                    disk.close(handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                disk.remove(temporary)
            if new and isinstance(error, FileExistsError):
                raise Exists("something has that name") from error
            raise StoreError(_why(folder, error, "written")) from error
        try:
            disk.sync_folder(folder)
        except OSError as error:
            raise StoreError(
                f"it is written, but whether it would survive a power cut is not known: {error}",
                Outcome.UNKNOWN,
            ) from error
        _remove_abandoned(folder, start)
        return size

    def read(self, name: str, bytes_max: int, first: int | None = None) -> bytearray:
        """See `Store.read`."""
        try:
            with open(self._path(name), "rb", opener=_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise StoreError("it is no regular file")
                size = status.st_size
                if size > bytes_max:
                    raise StoreError(f"it has {size} bytes; up to {bytes_max} are read")
                data = bytearray(size if first is None else min(first, size))
                view = memoryview(data)
                done = 0
                while done < len(data):
                    got = file.readinto(view[done : done + WRITE_BYTES])
                    if not got:
                        raise StoreError("it became shorter while it was read")
                    done += got
                return data
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotThere("there is no such file") from error
        except OSError as error:
            raise StoreError(f"the file cannot be read: {error.strerror or error}") from error

    def names(self, prefix: str) -> list[str]:
        """See `Store.names`."""
        below, slash, start = prefix.rpartition("/")
        try:
            found = os.listdir(os.path.join(self.folder, below))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreError(f"the folder cannot be read: {error.strerror or error}") from error
        return sorted(f"{below}{slash}{name}" for name in found if name.startswith(start))

    def remove(self, name: str) -> None:
        """See `Store.remove`."""
        try:
            self._disk.remove(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            raise StoreError(f"the file cannot be removed: {error.strerror or error}") from error
        below = name.rpartition("/")[0]
        with contextlib.suppress(OSError):
            # As long as it is empty, that is.
            while below:
                os.rmdir(self._path(below))
                below = below.rpartition("/")[0]


def _check_replaceable(status: os.stat_result) -> None:
    """Refuse to put a file where something else is: a device would be gone for everybody."""
    if stat.S_ISDIR(status.st_mode):
        raise StoreError("a folder has that name")
    if not stat.S_ISREG(status.st_mode):
        raise StoreError("what has that name is no regular file, and stays as it is")


def _why(folder: str, error: OSError, what: str) -> str:
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    if missing and not os.path.isdir(folder):
        return f"there is no folder {folder}; make it first"
    if isinstance(error, IsADirectoryError):
        return "a folder has that name"
    return f"the file cannot be {what}: {error.strerror or error}"


def _remove_abandoned(folder: str, start: str) -> None:
    """Remove temporary files whose writer was killed."""
    pattern = re.compile(rf"\.{re.escape(start)}\.[0-9a-f]{{16}}{re.escape(_TEMPORARY)}")
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) is None:
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime < ABANDONED_S:
                    continue
                handle = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    os.close(handle)


def _without_waiting(path: str, flags: int) -> int:
    # A named pipe in the place of a file would wait for a writer for ever.
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


# ---------------------------------------------------------------------- memory


class MemoryStore(Store):
    """Bytes in this process, for tests; gone with it."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def write(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """See `Store.write`."""
        data = b"".join(pieces)
        with self._lock:
            self._kept[name] = data
        return len(data)

    def write_new(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """See `Store.write_new`."""
        data = b"".join(pieces)
        with self._lock:
            if name in self._kept:
                raise Exists("something has that name")
            self._kept[name] = data
        return len(data)

    def read(self, name: str, bytes_max: int, first: int | None = None) -> bytearray:
        """See `Store.read`."""
        with self._lock:
            data = self._kept.get(name)
        if data is None:
            raise NotThere("this process has nothing of that name in memory")
        if len(data) > bytes_max:
            raise StoreError(f"it has {len(data)} bytes; up to {bytes_max} are read")
        return bytearray(data if first is None else data[:first])

    def names(self, prefix: str) -> list[str]:
        """See `Store.names`."""
        with self._lock:
            return sorted(name for name in self._kept if name.startswith(prefix))

    def remove(self, name: str) -> None:
        """See `Store.remove`."""
        with self._lock:
            self._kept.pop(name, None)


_memories: Final[dict[str, MemoryStore]] = {}


# ---------------------------------------------------------------------- objects


class ObjectStore(Store):
    """Anything that obstore speaks to; an object appears whole or not at all.

    Args:
        store: One of obstore's stores, such as `obstore.store.S3Store("bucket")`.
    """

    def __init__(self, store: Any) -> None:
        self._obstore = _obstore()
        self._store = store

    @contextlib.contextmanager
    def _errors(self, outcome: Outcome = Outcome.NOT_DONE) -> Iterator[None]:
        exceptions = self._obstore.exceptions
        refused = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        try:
            yield
        except FileNotFoundError as error:
            raise NotThere("there is no such object, or no such bucket") from error
        except refused as error:
            raise StoreError(f"the store refuses: {_first_line(error)}") from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            raise StoreError(f"the store cannot do it: {_first_line(error)}", outcome) from error

    def write(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """See `Store.write`."""
        return self._put(name, pieces)

    def write_new(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        """See `Store.write_new`."""
        # In one request: only that can be made to depend on what is there.
        return self._put(name, pieces, mode="create", use_multipart=False)

    def _put(self, name: str, pieces: Sequence[bytes | bytearray | memoryview], **how: Any) -> int:
        chunks = [chunk for piece in pieces for chunk in _chunks(piece)]
        # Whether it arrived is not known when only the answer was lost.
        with self._errors(Outcome.UNKNOWN):
            try:
                self._obstore.put(self._store, name, chunks, **how)
            except self._obstore.exceptions.AlreadyExistsError as error:
                raise Exists("something has that name") from error
            except FileNotFoundError as error:
                raise StoreError("there is no such bucket") from error
        return sum(len(chunk) for chunk in chunks)

    def read(self, name: str, bytes_max: int, first: int | None = None) -> bytearray:
        """See `Store.read`."""
        with self._errors():
            found = self._obstore.get(self._store, name)
            size = found.meta["size"]
            if size > bytes_max:
                raise StoreError(f"it has {size} bytes; up to {bytes_max} are read")
            data = bytearray()
            for chunk in found:
                data += memoryview(chunk)
                if first is not None and len(data) >= first:
                    del data[first:]
                    break
            return data

    def names(self, prefix: str) -> list[str]:
        """See `Store.names`."""
        folder = prefix.rpartition("/")[0]
        with self._errors():
            listed = self._obstore.list_with_delimiter(self._store, folder or None)
        return sorted(o["path"] for o in listed["objects"] if o["path"].startswith(prefix))

    def remove(self, name: str) -> None:
        """See `Store.remove`."""
        with contextlib.suppress(NotThere), self._errors():
            self._obstore.delete(self._store, name)


def _chunks(piece: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    view = memoryview(piece).cast("B")
    for start in range(0, view.nbytes, WRITE_BYTES):
        yield view[start : start + WRITE_BYTES]


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _obstore() -> Any:
    try:
        module = importlib.import_module("obstore")
        importlib.import_module("obstore.store")
        importlib.import_module("obstore.exceptions")
    except ImportError as error:
        raise UsageError(
            "s3:// needs the package obstore: pip install 'livemigrate[s3]', where the node runs",
            cause=str(error),
        ) from error
    return module


# ---------------------------------------------------------------------- by URL


def url_of(place: str | os.PathLike[str]) -> str:
    """A URL as it was given, or that of a path.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(place, os.PathLike):
        path = os.fspath(place)
        if not isinstance(path, str):
            raise UsageError(f"a path of text is needed, not {path!r}")
        return "file://" + quote(os.path.abspath(path))
    if not isinstance(place, str):
        raise UsageError(
            f"a URL such as file:///backups/hits.ckpt, or a pathlib.Path, is needed, not {place!r}"
        )
    _parsed(place)
    return place


def open_store(url: str) -> tuple[Store, str]:
    """The store that a URL is of, and the name in it.

    Raises:
        UsageError: No such kind, no name, or the package for it is missing.
    """
    scheme, place, name = _parsed(url)
    match scheme:
        case "file":
            return FileStore(place), name
        case "memory":
            return _memories.setdefault(place, MemoryStore()), name
        case _:
            return ObjectStore(_s3(place)), name


def open_folder(url: str) -> tuple[Store, str]:
    """The store that the URL of a folder is of, and what the names in it begin with.

    What is asked of an S3 bucket through it is not asked again for long: whoever keeps a folder
    goes on by himself when the store is back.

    Raises:
        UsageError: No such kind, no folder, or the package for it is missing.
    """
    scheme, place, name = _split(url)
    name = name.strip("/")
    if scheme == "file":
        if not name:
            raise UsageError(f"{url!r} names no folder: write file:///folder")
        return FileStore(f"/{name}"), ""
    if not place:
        raise UsageError(f"{url!r} names no store: write {scheme}://store/folder")
    prefix = f"{name}/" if name else ""
    if scheme == "memory":
        return _memories.setdefault(place, MemoryStore()), prefix
    return ObjectStore(_s3(place, retry_config={"max_retries": 2, "retry_timeout": _RETRY})), prefix


def try_out(store: Store, prefix: str) -> None:
    """See whether a store can be had, and does what fences are made of; leaves nothing there.

    Raises:
        StoreError: It cannot be written to, or puts an object where there is one already though it
            was told not to, as some that call themselves compatible do.
    """
    name = f"{prefix}try-{secrets.token_hex(16)}"
    if isinstance(store, FileStore):
        try:
            os.makedirs(store.folder, 0o700, exist_ok=True)
        except OSError as error:
            raise StoreError(f"the folder cannot be made: {error.strerror or error}") from error
    try:
        with contextlib.suppress(Exists):  # it repeats by itself, and the first had come through
            store.write_new(name, [b"1"])
        try:
            store.write_new(name, [b"2"])
        except Exists:
            return
        raise StoreError(
            "it puts an object where there is one already: it knows no conditional puts, without "
            "which two nodes could write to the same journal"
        )
    finally:
        with contextlib.suppress(StoreError):
            store.remove(name)


def _split(url: str) -> tuple[str, str, str]:
    """Scheme, host and unquoted path of a URL."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise UsageError(
            f"{url!r} is no URL: write file:///folder/name, s3://bucket/name or memory://store/name"
        )
    if scheme not in ("file", "memory", "s3"):
        raise UsageError(f"{url!r}: file, s3 and memory are known, not {scheme!r}")
    place, _, name = rest.partition("/")
    name = unquote(name)
    if "\0" in name:
        raise UsageError(f"{url!r} holds a NUL character")
    if scheme == "file" and place not in ("", "localhost"):
        raise UsageError(
            f"{url!r} names the host {place!r}; a file's URL has three slashes and an absolute "
            f"path, as file://{Path(rest).absolute()}"
        )
    return scheme, place, name


def _parsed(url: str) -> tuple[str, str, str]:
    scheme, place, name = _split(url)
    if scheme == "file":
        folder, _, last = f"/{name}".rpartition("/")
        if last in ("", ".", ".."):
            raise UsageError(f"{url!r} names a folder; add the name of a file")
        return scheme, folder or "/", last
    if not place or not name or name.endswith("/"):
        raise UsageError(f"{url!r} needs two parts: {scheme}://store/name")
    return scheme, place, name


def _s3(bucket: str, **options: Any) -> Any:
    """A bucket, found by the variables that every S3 tool reads (AWS_REGION, AWS_ENDPOINT_URL)."""
    obstore = _obstore()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint:
        options["config"] = {"endpoint": endpoint}
        if endpoint.startswith("http://"):
            options["client_options"] = {"allow_http": True}
    return obstore.store.S3Store(bucket, **options)


__all__ = [
    "Disk",
    "Exists",
    "FileStore",
    "MemoryStore",
    "NotThere",
    "ObjectStore",
    "Store",
    "StoreError",
    "open_folder",
    "open_store",
    "try_out",
    "url_of",
]
