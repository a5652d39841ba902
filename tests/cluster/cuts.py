"""Cuts real connections between processes from outside, also in the middle of a frame.

`pidfd_getfd` gives this process a descriptor for a socket of another one; `shutdown` on it ends
the connection for both sides, as a network or a kernel would, and whoever uses it learns it from
the kernel alone. What was in the socket's buffer can still be read by the receiver, so that a
frame of which only a part fitted ends in the middle.

It takes Linux 5.6 and the right to trace the processes: they are children of this one, and of
the same user. A container without that right needs `--cap-add SYS_PTRACE`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_PIDFD_GETFD: Final = 438
_UNIX_NAME: Final = b"\0livemigrate/"
_libc: Final[Any] = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Connection:
    """One end of a link's connection.

    Attributes:
        kind: "unix" or "grpc".
        peer: Process id of the other end where the kernel tells it, else 0.
        unread_bytes: What has arrived at this end and waits for its reader.
        unsent_bytes: What has been written here and not been taken by the other end.
    """

    kind: str
    peer: int
    unread_bytes: int
    unsent_bytes: int


@contextlib.contextmanager
def _borrowed(pid: int, fd: int) -> Iterator[socket.socket | None]:
    """A descriptor of our own for another process's socket; None if it is gone, or no socket."""
    pidfd = os.pidfd_open(pid)
    try:
        got = _libc.syscall(_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if got < 0:
        number = ctypes.get_errno()
        if number == 1:  # EPERM
            raise PermissionError(number, "this process may not take sockets of its children")
        yield None
        return
    try:
        sock = socket.socket(fileno=got)
    except OSError:
        os.close(got)
        yield None
        return
    with sock:
        yield sock


def _waiting(sock: socket.socket, request: int) -> int:
    (count,) = struct.unpack("i", fcntl.ioctl(sock, request, b"\0" * 4))
    return int(count)


def _connection(sock: socket.socket, ports: frozenset[int]) -> Connection | None:
    """What the socket is, if it carries a link between nodes and clients."""
    if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return None
    try:
        ours, theirs = sock.getsockname(), sock.getpeername()
    except OSError:
        return None  # It has ended meanwhile.
    peer = 0
    if sock.family == socket.AF_UNIX:
        names = [name for name in (ours, theirs) if isinstance(name, bytes)]
        if not any(name.startswith(_UNIX_NAME) for name in names):
            return None
        peer, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        kind = "unix"
    elif sock.family in (socket.AF_INET, socket.AF_INET6):
        if ours[1] not in ports and theirs[1] not in ports:
            return None
        kind = "grpc"
    else:
        return None
    return Connection(
        kind, peer, _waiting(sock, termios.FIONREAD), _waiting(sock, termios.TIOCOUTQ)
    )


def connections(pid: int, ports: frozenset[int], *, cut: bool = False) -> list[Connection]:
    """Look at the connections of links that a process has, and cut them if told to.

    Args:
        pid: A child of this process.
        ports: Those that nodes listen on.
        cut: Whether each is shut down, in both directions.

    Raises:
        PermissionError: This process may not do that.
        ProcessLookupError: There is no such process.
    """
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                continue
            with _borrowed(pid, int(name)) as sock:
                connection = _connection(sock, ports) if sock is not None else None
                if sock is None or connection is None:
                    continue
                if cut:
                    with contextlib.suppress(OSError):  # It has ended meanwhile.
                        sock.shutdown(socket.SHUT_RDWR)
                found.append(connection)
    return found
