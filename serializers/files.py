"""Reducers for files and what is made of them: text over other streams, temporary and mapped files.

A file with a path is opened again by it. One without, temporary or deleted, travels with its
content, up to `CONTENT_BYTES_MAX`. The original keeps its position; what it buffers is written.
"""

from __future__ import annotations

import bz2
import gc
import gzip
import io
import lzma
import mmap
import os
import re
import stat
import sys
import tempfile
import weakref
import zipfile
from sys import getrefcount
from typing import Any

from .base import is_checking, lossy
from .errors import LoadFailed
from .layout import find_field, read_field
from .memory import address_of
from .resources import (
    REDUCERS,
    REOPEN,
    STANDARD_STREAMS,
    Reduced,
    new_instance,
    refuse,
    refuses,
    set_state,
    type_name,
)

CONTENT_BYTES_MAX = 256 * 1024 * 1024
"""Most bytes of temporary files that travel inside a state."""

# --- text and its settings -----------------------------------------------------------------------


def _newline_samples(*shown: int) -> int | None:
    return find_field(
        [
            (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline=newline), value)
            for newline, value in zip((None, "", "\n", "\r", "\r\n"), shown, strict=True)
        ],
        1,
    )


_READS_ANY = _newline_samples(1, 1, 0, 0, 0)
_TRANSLATES = _newline_samples(1, 0, 0, 0, 0)


def _newline_of(file: io.TextIOWrapper) -> str | None:
    """The `newline` that a text file was opened with; None, the default, if it cannot be told."""
    if _READS_ANY is None or _TRANSLATES is None:
        return None
    if read_field(file, _READS_ANY, 1):
        return None if read_field(file, _TRANSLATES, 1) else ""
    # What is written for a line's end shows which one it is; nothing reaches the file itself.
    held = _strings_of(file)
    return next((text for text in held if text in ("\n", "\r", "\r\n")), "\n")


def _strings_of(file: io.TextIOWrapper) -> list[str]:
    return [held for held in gc.get_referents(file) if type(held) is str]


def _style_of(file: Any) -> tuple[Any, ...]:
    newline = _newline_of(file)
    return file.encoding, file.errors, file.line_buffering, file.write_through, newline


def _text_over(buffer: Any, style: tuple[Any, ...]) -> io.TextIOWrapper:
    encoding, errors, line_buffering, write_through, newline = style
    return io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering, write_through)


def _text_position(file: Any, raw: Any) -> int:
    """The position of a text file that is being iterated over, which `tell` refuses to tell.

    What is left of it is read, and found again from the beginning of another file of that path.
    Afterwards the original stands where it stood.
    """
    if os.fstat(raw.fileno()).st_size > CONTENT_BYTES_MAX:
        refuse(
            file,
            "it is being iterated over, and too large for its position to be found",
            "read it by readline(), or capture it after the loop",
        )
    left = file.read()
    with open(f"/proc/self/fd/{raw.fileno()}", "rb") as other:
        text = _text_over(other, _style_of(file))
        whole = text.read()
        text.seek(0)
        text.read(len(whole) - len(left))
        position = text.tell()
        text.detach()
    file.seek(position)
    if not whole.endswith(left):
        refuse(file, "it is being written while it is iterated over", "capture it after the loop")
    return int(position)


# --- files of the system -------------------------------------------------------------------------


def _reduce_file(file: Any) -> Reduced:
    for name in STANDARD_STREAMS:
        if file is getattr(sys, name, None):
            return getattr, (sys, name)
    text = isinstance(file, io.TextIOWrapper)
    try:
        raw = file.buffer if text else file
        raw = getattr(raw, "raw", raw)
    except ValueError:
        refuse(file, "its buffer was detached", REOPEN)
    if type(raw) is not io.FileIO:
        return _reduce_stream(file, text, raw)
    mode = file.mode if text else raw.mode
    if not text and raw.mode == "rb+" and getattr(file, "mode", "").startswith("w"):
        mode = file.mode
    style = _style_of(file) if text else None
    buffered = not isinstance(file, io.FileIO)
    if file.closed:
        return _make_closed_file, (mode, raw.name, style, buffered)
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        refuse(file, "it is a pipe, a terminal or a device, not a regular file", REOPEN)
    position = _position_of(file, text, raw)
    if file.writable() and not is_checking():
        file.flush()
    if text and getrefcount(file.buffer) > _ALONE:
        return _make_text_file, (file.buffer, style, position, mode)
    if buffered and not text and getrefcount(file.raw) > _ALONE + 1:  # One is `raw`.
        return _make_buffered_stream, (type(file), file.raw, position)
    if not status.st_nlink:
        content = _content_of(file, raw.fileno())
        return _make_unlinked_file, (content, mode, position, style, buffered)
    lossy("it is opened again by its path: the same file must be there at the other end")
    return _make_file, (_path_of(file, raw), mode, position, style, buffered)


_probe = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
_ALONE = getrefcount(_probe.buffer)
"""References that a file's buffer shows if its file alone holds it. With more, something else does,
and is to go on reading from the same place."""


def _make_text_file(inner: Any, style: Any, position: int, mode: str) -> Any:
    file = _make_text_stream(inner, style, position)
    file.mode = mode
    return file


def _position_of(file: Any, text: bool, raw: Any) -> int:
    try:
        # NB: telling a text file's position writes what it buffers.
        return 0 if is_checking() and file.writable() else int(file.tell())
    except OSError as exc:
        if text and file.seekable():
            return 0 if is_checking() else _text_position(file, raw)
        refuse(file, f"it has no position ({exc.strerror or exc})", REOPEN)


def _content_of(file: Any, descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > CONTENT_BYTES_MAX:
        refuse(
            file,
            f"it has {size} bytes and no path; at most {CONTENT_BYTES_MAX} travel in a state",
            "keep it in a file with a path that the other end has as well",
        )
    if is_checking():
        return b""
    return os.pread(descriptor, size, 0)


def _path_of(file: Any, raw: io.FileIO) -> str:
    """Absolute path of an open file, whatever the current folder was when it was opened."""
    link = f"/proc/self/fd/{raw.fileno()}"
    if os.path.islink(link):
        return os.readlink(link)
    if not isinstance(raw.name, str | bytes):
        refuse(file, "it was opened by descriptor, so its path is unknown", REOPEN)
    return os.path.abspath(os.fsdecode(raw.name))


def _open_untouched(path: str, flags: int) -> int:
    # Neither created nor emptied, whatever its mode says: it is as the original left it.
    return os.open(path, flags & ~(os.O_TRUNC | os.O_CREAT | os.O_EXCL))


def _binary(mode: str) -> str:
    return mode if "b" in mode else f"{mode}b"


def _open_as(path: str, mode: str, style: Any, buffered: bool, opener: Any) -> Any:
    if style is None:
        mode = _binary(mode)
        return open(path, mode, buffering=-1 if buffered else 0, opener=opener)
    # Earlier streams say nothing of what ends a line.
    encoding, errors, line_buffering, write_through, newline = (*style, None)[:5]
    mode = mode.replace("b", "")
    file: Any = open(path, mode, encoding=encoding, errors=errors, newline=newline, opener=opener)
    if line_buffering or write_through:
        file.reconfigure(line_buffering=line_buffering, write_through=write_through)
    return file


def _make_file(path: str, mode: str, position: int, style: Any, buffered: bool) -> Any:
    try:
        file = _open_as(path, mode, style, buffered, _open_untouched)
    except OSError as exc:
        raise LoadFailed(
            f"cannot reopen file {path!r} (mode {mode!r}): {exc.strerror}",
            "make the file available here under the same path",
        ) from exc
    size = os.fstat(file.fileno()).st_size
    # NB: a text position is opaque, but its low 64 bits are the byte position.
    if position & (2**64 - 1) > size and "r" in mode and "+" not in mode:
        file.close()
        raise LoadFailed(
            f"file {path!r} has {size} bytes here, fewer than were read of it",
            "make the same file available here",
        )
    file.seek(position)
    return file


def _make_unlinked_file(
    content: bytes, mode: str, position: int, style: Any, buffered: bool
) -> Any:
    with tempfile.TemporaryFile(buffering=0) as whole:
        whole.write(content)
        # Through this link it can be opened once more, with the flags of its mode.
        file = _open_as(f"/proc/self/fd/{whole.fileno()}", mode, style, buffered, _open_untouched)
    file.seek(position)
    return file


def _make_closed_file(mode: str, name: Any, style: Any, buffered: bool) -> Any:
    # Never opened itself: it may be gone, and need not be touched to be closed.
    file = _open_as(os.devnull, mode.replace("x", "w"), style, buffered, None)
    raw = file.buffer if style is not None else file
    raw = getattr(raw, "raw", raw)
    raw.name = name
    if style is not None:
        file.mode = mode
    file.close()
    return file


# --- streams over other streams ------------------------------------------------------------------


def _reduce_stream(file: Any, text: bool, raw: Any) -> Reduced:
    """Carry a wrapper of something else that travels by itself, such as bytes in memory."""
    inner = file.buffer if text else file.raw
    if file.closed:
        refuse(file, f"it is closed, and wraps a {type_name(type(raw))}", "drop it")
    if is_checking():
        position = 0
    else:
        try:
            position = file.tell()
        except OSError as exc:
            refuse(file, f"it has no position ({exc.strerror or exc})", REOPEN)
        if file.writable():
            file.flush()
    if text:
        return _make_text_stream, (inner, _style_of(file), position)
    return _make_buffered_stream, (type(file), inner, position)


def _make_text_stream(inner: Any, style: Any, position: int) -> Any:
    file = _text_over(inner, style)
    file.seek(position)
    return file


def _make_buffered_stream(kind: Any, inner: Any, position: int) -> Any:
    file = kind(inner)
    file.seek(position)
    return file


def _reduce_memory_stream(stream: Any) -> Reduced:
    if not stream.closed:
        return NotImplemented
    return _make_closed_stream, (type(stream),), getattr(stream, "__dict__", None) or None


def _make_closed_stream(kind: Any) -> Any:
    stream = kind.__new__(kind)
    base = io.StringIO if issubclass(kind, io.StringIO) else io.BytesIO
    base.__init__(stream)
    base.close(stream)
    return stream


_WRITES = "it is being written: whoever closes one of two copies ends the file for both"
_WRITES_REMEDY = "close it in on_depart, and open it to append in on_arrive"


def _reduce_gzip(file: gzip.GzipFile) -> Reduced:
    own: Any = file
    if file.closed:
        return _make_closed_archive, (type(file), file.name)
    if file.mode != gzip.READ:
        refuse(file, _WRITES, _WRITES_REMEDY)
    return _make_gzip, (own.fileobj, file.name, file.tell(), own.myfileobj is not None)


def _make_gzip(inner: Any, name: str, position: int, owned: bool) -> Any:
    inner.seek(0)
    file: Any = gzip.GzipFile(name, "rb", fileobj=inner)
    if owned:
        file.myfileobj = inner
    file.seek(position)
    return file


def _make_closed_archive(kind: Any, name: str) -> Any:
    file = kind(io.BytesIO(), "rb") if kind is not gzip.GzipFile else _empty_gzip(name)
    file.close()
    return file


def _empty_gzip(name: str) -> gzip.GzipFile:
    return gzip.GzipFile(name, "rb", fileobj=io.BytesIO())


def _reduce_compressed(file: Any) -> Reduced:
    if file.closed:
        return _make_closed_archive, (type(file), "")
    if not file.readable():
        refuse(file, _WRITES, _WRITES_REMEDY)
    return _make_compressed, (type(file), file._fp, file.tell(), file._closefp)


def _make_compressed(kind: Any, inner: Any, position: int, owned: bool) -> Any:
    inner.seek(0)
    file = kind(inner, "rb")
    file._closefp = owned
    file.seek(position)
    return file


def _reduce_zip(archive: zipfile.ZipFile) -> Reduced:
    if archive.mode != "r" and archive.fp is not None:
        refuse(archive, _WRITES, _WRITES_REMEDY)
    return new_instance, (type(archive),), dict(vars(archive)), None, None, set_state


# --- temporary files and folders -----------------------------------------------------------------


def _reduce_named_temporary(wrapper: Any) -> Reduced:
    inner, closer = wrapper.file, wrapper._closer
    deletes = bool(closer.delete) and not closer.close_called
    if not deletes:
        state = {"file": inner, "name": wrapper.name, "delete": False}
        return _make_wrapper, (type(wrapper),), state, None, None, _fill_wrapper
    text = isinstance(inner, io.TextIOWrapper)
    raw: Any = inner.buffer if text else inner
    raw = getattr(raw, "raw", raw)
    position = _position_of(inner, text, raw)
    if inner.writable() and not is_checking():
        inner.flush()
    lossy("it arrives under another name if its own one is taken there")
    content = _content_of(wrapper, raw.fileno())
    style = _style_of(inner) if text else None
    mode = inner.mode if text else raw.mode
    buffered = not isinstance(inner, io.FileIO)
    args = (type(wrapper), os.path.abspath(wrapper.name), content, mode, position, style, buffered)
    return _make_named_temporary, args


def _make_wrapper(kind: Any) -> Any:
    return kind.__new__(kind)


def _fill_wrapper(wrapper: Any, state: dict[str, Any]) -> None:
    tempfile._TemporaryFileWrapper.__init__(wrapper, state["file"], state["name"], state["delete"])


def _make_named_temporary(
    kind: Any, path: str, content: bytes, mode: str, position: int, style: Any, buffered: bool
) -> Any:
    descriptor, path = _create_anew(path)
    with os.fdopen(descriptor, "wb") as whole:
        whole.write(content)
    file = _open_as(path, mode, style, buffered, _open_untouched)
    file.seek(position)
    return kind(file, path, True)


def _create_anew(path: str) -> tuple[int, str]:
    """Create a file under its old name if that is free here, else under a new one like it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), path
    except OSError:
        name = os.path.basename(path)
        return tempfile.mkstemp(os.path.splitext(name)[1], name[:3])


def _reduce_temporary_folder(folder: Any) -> Reduced:
    state = {name: value for name, value in vars(folder).items() if name != "_finalizer"}
    alive = folder._finalizer.alive and os.path.isdir(folder.name)
    content = _tree_of(folder) if alive and not is_checking() else None
    lossy("it arrives under another name if its own one is taken there")
    return _make_temporary_folder, (type(folder), state, content)


def _tree_of(folder: Any) -> list[tuple[str, int, Any]]:
    """(relative path, mode, content) of all below a folder: bytes, a link's target, None."""
    top = folder.name
    found: list[tuple[str, int, Any]] = []
    size = 0
    for place, folders, files in os.walk(top):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            status = os.lstat(path)
            content: Any = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                size += status.st_size
                if size > CONTENT_BYTES_MAX:
                    refuse(
                        folder,
                        f"it holds more than {CONTENT_BYTES_MAX} bytes",
                        "keep them in a folder with a path that the other end has as well",
                    )
                with open(path, "rb") as file:
                    content = file.read()
            elif not stat.S_ISDIR(status.st_mode):
                refuse(folder, f"it holds {name!r}, which is no file", "keep it elsewhere")
            found.append((os.path.relpath(path, top), stat.S_IMODE(status.st_mode), content))
    return found


def _make_temporary_folder(
    kind: Any, state: dict[str, Any], content: list[tuple[str, int, Any]] | None
) -> Any:
    folder = kind.__new__(kind)
    vars(folder).update(state)
    if content is not None:
        try:
            os.mkdir(folder.name, 0o700)
        except OSError:
            folder.name = tempfile.mkdtemp(prefix=os.path.basename(folder.name)[:3])
        for relative, mode, data in content:
            path = os.path.join(folder.name, relative)
            if data is None:
                os.mkdir(path)
            elif isinstance(data, str):
                os.symlink(data, path)
                continue
            else:
                with open(path, "wb") as file:
                    file.write(data)
            os.chmod(path, mode | stat.S_IRWXU if data is None else mode)
    folder._finalizer = weakref.finalize(
        folder,
        kind._cleanup,
        folder.name,
        warn_message=f"Implicitly cleaning up {folder!r}",
        ignore_errors=folder._ignore_cleanup_errors,
        **({"delete": state["_delete"]} if "_delete" in state else {}),
    )
    if content is None:
        folder._finalizer.detach()
    return folder


def _reduce_spooled(file: Any) -> Reduced:
    return new_instance, (type(file),), dict(vars(file)), None, None, set_state


# --- mapped memory -------------------------------------------------------------------------------

_MAP = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) \S+ \d+ *(.*)")


def _reduce_mmap(mapped: mmap.mmap) -> Reduced:
    try:
        size, position = len(mapped), mapped.tell()
    except ValueError:
        refuse(mapped, "it is closed", "drop it")
    found = _mapping_at(address_of(mapped))
    if found is None:
        refuse(mapped, "what it maps cannot be told here", REOPEN)
    offset, rights, path = found
    writable = not memoryview(mapped).readonly
    if not path.startswith("/") or path.startswith("/dev/zero") or path.endswith(" (deleted)"):
        if not writable:
            refuse(mapped, "it is read-only memory without a file", "keep a copy of the bytes")
        return _make_anonymous_map, (mapped[:], position)
    private = rights[3] == "p"
    if writable and not private and not is_checking():
        mapped.flush()
    lossy("its file is mapped again by its path: the same one must be there at the other end")
    access = mmap.ACCESS_COPY if private and writable else mmap.ACCESS_WRITE
    if not writable:
        access = mmap.ACCESS_READ
    content = mapped[:] if access == mmap.ACCESS_COPY else None
    return _make_map, (path, size, access, offset, position, content)


def _mapping_at(address: int) -> tuple[int, str, str] | None:
    """Offset in its file, rights, and path of what is mapped at an address."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                match = _MAP.match(line.rstrip("\n"))
                if match and int(match[1], 16) <= address < int(match[2], 16):
                    return int(match[4], 16) + address - int(match[1], 16), match[3], match[5]
    except OSError:
        return None
    return None


def _make_anonymous_map(content: bytes, position: int) -> mmap.mmap:
    mapped = mmap.mmap(-1, len(content))
    mapped[:] = content
    mapped.seek(position)
    return mapped


def _make_map(
    path: str, size: int, access: int, offset: int, position: int, content: bytes | None
) -> mmap.mmap:
    flags = os.O_RDWR if access == mmap.ACCESS_WRITE else os.O_RDONLY
    try:
        descriptor = os.open(path, flags)
        try:
            mapped = mmap.mmap(descriptor, size, access=access, offset=offset)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as exc:
        raise LoadFailed(
            f"cannot map file {path!r} again: {exc}",
            "make the same file available here under the same path",
        ) from exc
    if content is not None:
        mapped[:] = content
    mapped.seek(position)
    return mapped


def _register_all() -> None:
    for kind in (
        io.TextIOWrapper,
        io.BufferedReader,
        io.BufferedWriter,
        io.BufferedRandom,
        io.FileIO,
    ):
        REDUCERS[kind] = _reduce_file
    others: dict[type, Any] = {
        io.BytesIO: _reduce_memory_stream,
        io.StringIO: _reduce_memory_stream,
        gzip.GzipFile: _reduce_gzip,
        bz2.BZ2File: _reduce_compressed,
        lzma.LZMAFile: _reduce_compressed,
        zipfile.ZipFile: _reduce_zip,
        zipfile.ZipExtFile: refuses("it is in the middle of a member", REOPEN),
        tempfile._TemporaryFileWrapper: _reduce_named_temporary,
        tempfile.TemporaryDirectory: _reduce_temporary_folder,
        tempfile.SpooledTemporaryFile: _reduce_spooled,
        mmap.mmap: _reduce_mmap,
    }
    REDUCERS.update(others)


_register_all()
