"""A worker process: runs one method after the other for the node that started it.

The server's object stays in the node. `self` is a stand-in here: an instance of a subclass that
has the class's own methods and constants, and refuses whatever belongs to the object's state, so
that no method reads a stale value or loses what it writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import socket
import sys
from collections.abc import Iterable
from typing import Any, Final, NoReturn

import msgspec

import serializers
from migrate.core.messages import ERROR, OK
from migrate.errors import UsageError
from migrate.ref import current_runtime
from migrate.shell import wire
from migrate.shell.workers import Request, Result, receive, send

_PR_SET_PDEATHSIG: Final = 1
_CLASSES_MAX: Final = 64
"""Classes whose stand-in is kept."""


class _Scope:
    """The runtime of a method that runs here: it tells what is current, and calls nobody."""

    def __init__(self, described: bytes) -> None:
        self._described = described

    def current(self) -> Any:
        """What `migrate.current()` tells."""
        return serializers.loads(self._described)

    def call(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        raise UsageError(
            "a method that is @migrate.blocking(process=True) runs outside of the node and can "
            "call no server: return what is needed, and let an `async def` handler make the call"
        )

    cast = call


def stand_in(cls: type) -> type:
    """A subclass whose instances have methods and constants of `cls`, but no state.

    Raises:
        UsageError: The class cannot have such instances.
    """

    def refuse(name: str) -> NoReturn:
        raise UsageError(
            f"{cls.__qualname__}.{name} is state of the server, which stays in its node; this "
            "method is @migrate.blocking(process=True) and runs in a worker process: give it what "
            "it needs as arguments, and let it return what is to be kept"
        )

    def read(self: Any, name: str) -> Any:
        held = object.__getattribute__(self, "_migrate_state")
        if name in held or name == "__dict__":
            refuse(name)
        return super(made, self).__getattribute__(name)

    def missing(self: Any, name: str) -> Any:
        # Also a slot: the object here has none of them filled.
        if name.startswith("__"):
            raise AttributeError(name)
        refuse(name)

    def change(self: Any, name: str, *value: Any) -> None:
        refuse(name)

    def travel(self: Any, protocol: Any) -> NoReturn:
        refuse("__self__")

    namespace = {
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__slots__": ("_migrate_state",),
        "__getattribute__": read,
        "__getattr__": missing,
        "__setattr__": change,
        "__delattr__": change,
        "__reduce_ex__": travel,
    }
    try:
        made: Any = type(cls)(cls.__name__, (cls,), namespace)
        object.__new__(made)
    except Exception as error:
        raise UsageError(
            f"{cls.__qualname__} cannot have a method that is @migrate.blocking(process=True), "
            f"since nothing can stand for its objects in a worker process: {error}; let the "
            "method call a function of a module with a ProcessPoolExecutor"
        ) from error
    return made  # type: ignore[no-any-return]


def made_for(kind: type, state: Iterable[str]) -> Any:
    """An instance of a stand-in for an object that has the named attributes."""
    made: Any = object.__new__(kind)
    object.__setattr__(made, "_migrate_state", frozenset(state))
    return made


@functools.lru_cache(_CLASSES_MAX)
def _kind(pickled: bytes) -> type:
    cls = serializers.loads(pickled)
    if not isinstance(cls, type):
        raise UsageError(f"{cls!r} is no class")
    return stand_in(cls)


def _run(request: Request) -> tuple[int, object]:
    scope: Any = _Scope(request.current)
    token = current_runtime.set(scope)
    try:
        args, kwargs = wire.unpack(request.payload, scope) or ((), {})
        method = getattr(made_for(_kind(request.cls), request.state), request.method)
        return OK, method(*args, **kwargs)
    except (Exception, SystemExit) as error:
        return ERROR, error
    finally:
        current_runtime.reset(token)


def main(descriptor: int, parent: int) -> None:
    """Serve the node at the other end of a socket until it is gone.

    Args:
        descriptor: This side's end.
        parent: Process id of the node.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit()  # It ended before it could be watched.
    # Ctrl-C in a terminal reaches the node too, which decides. NB: not SIG_IGN, which programs
    # that a method starts would inherit.
    signal.signal(signal.SIGINT, lambda *_: None)
    with socket.socket(fileno=descriptor) as sock, contextlib.suppress(ConnectionError):
        send(sock, b"")
        while (data := receive(sock)) is not None:
            request = msgspec.msgpack.decode(data, type=Request)
            status, value = _run(request)
            answer = wire.pack_result(status, value, request.result_bytes_max)
            send(sock, msgspec.msgpack.encode(Result(*answer)))
