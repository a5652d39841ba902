"""Ref: a location-transparent handle through which a server is called.

For type checkers `Ref[T]` is an alias of `type[T]`. The descriptors that
`@migrate.call` leaves in a class show the remote, awaitable signature when they
are looked up on the class and the plain one when they are looked up on an
instance; so a ref, typed as the class, has exactly the remote signatures, and
no plugin is needed. At run time `Ref` is a small class of its own.

A ref has no public names besides the methods of its server: whatever else is
to be known about a server, a verb of the node tells.
"""

from __future__ import annotations

import difflib
import math
import threading
import types
import weakref
from collections.abc import Coroutine, Mapping
from contextvars import ContextVar
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    Generic,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
)

from migrate.errors import UsageError

__all__ = [
    "ClassInfo",
    "Ref",
    "RefObject",
    "RemoteMethod",
    "Runtime",
    "class_info",
    "current_runtime",
    "loading_runtime",
    "open_runtime",
    "ref_object",
    "runtime_closed",
    "runtime_opened",
]

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")


class Runtime(Protocol):
    """What a ref needs of the node or client that it is bound to."""

    def call(
        self,
        ref: RefObject,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> Any:
        """Send a request and return an awaitable of its reply.

        The request takes its place in the order of this sender's requests when
        this method is called, not when the result is first awaited. The blocking
        twin returns the reply itself.

        Args:
            ref: The server.
            method: Name of one of its methods.
            args: Positional arguments.
            kwargs: Keyword arguments; the caller does not keep the dict.
            timeout_s: Seconds to wait for the reply; `math.inf`: for ever; None:
                the runtime's default.
        """

    def cast(
        self,
        ref: RefObject,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> Any:
        """Send a cast; the awaitable ends once the mailbox has it, with None.

        Arguments and order are those of `call`.
        """


# --------------------------------------------------------------- bound to whom

loading_runtime: ContextVar[Runtime | None] = ContextVar("loading_runtime", default=None)
"""Set while a runtime unpickles: the refs in that pickle are bound to it."""

current_runtime: ContextVar[Runtime | None] = ContextVar("current_runtime", default=None)
"""Set while a handler or hook runs: a runtime that sends in the name of its server,
and whose `current()` answers `migrate.current()`."""

_open_runtimes: dict[int, Runtime] = {}
_open_runtimes_lock: Final = threading.Lock()


def runtime_opened(runtime: Runtime) -> None:
    """Note that a runtime of this process is open; repeating it changes nothing."""
    with _open_runtimes_lock:
        _open_runtimes[id(runtime)] = runtime


def runtime_closed(runtime: Runtime) -> None:
    """Note that a runtime is closed; repeating it changes nothing."""
    with _open_runtimes_lock:
        _open_runtimes.pop(id(runtime), None)


def open_runtime() -> Runtime:
    """Return the runtime that an unbound ref is to use.

    That is the handler's own inside a handler, else the only open one of the
    process.

    Raises:
        UsageError: None is open, or several are and nothing tells which is meant.
    """
    runtime = current_runtime.get()
    if runtime is not None:
        return runtime
    with _open_runtimes_lock:
        candidates = list(_open_runtimes.values())
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UsageError(
            "the ref belongs to no open node or client: open one first, as in "
            "`async with migrate.connect(address) as client:`, then use the ref again"
        )
    raise UsageError(
        f"the ref was unpickled outside a handler and {len(candidates)} nodes or clients are "
        "open, so it is not known which to call through: use `await node.call(ref, "
        "Class.method, ...)` with the one that is meant"
    )


# ------------------------------------------------------------------- the class


class ClassInfo:
    """What a ref knows of its server's class: enough to refuse misspelled methods.

    Make it with `class_info`, which returns the same object for the same facts.

    Attributes:
        cls_name: "module:Qualname".
        methods: Names of the methods that can be called, sorted.
    """

    __slots__ = ("__weakref__", "cls_name", "methods", "names")

    def __init__(self, cls_name: str, methods: tuple[str, ...]) -> None:
        self.cls_name: Final = cls_name
        self.methods: Final = methods
        self.names: Final = frozenset(methods)

    def __repr__(self) -> str:
        return f"ClassInfo({self.cls_name!r}, {self.methods!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return class_info, (self.cls_name, self.methods)

    @property
    def short_name(self) -> str:
        """The class's name without its module, for people to read."""
        return self.cls_name.rpartition(":")[2]


# Weak, so that what a peer sends cannot fill it: entries go with their last ref.
_class_infos: weakref.WeakValueDictionary[tuple[str, tuple[str, ...]], ClassInfo] = (
    weakref.WeakValueDictionary()
)


def class_info(cls_name: str, methods: tuple[str, ...]) -> ClassInfo:
    """Return the one `ClassInfo` of these facts.

    Args:
        cls_name: "module:Qualname".
        methods: Names of the methods that can be called, in any order.
    """
    key = (cls_name, tuple(sorted(methods)))
    info = _class_infos.get(key)
    if info is None:
        # Two threads may both come here; equal infos are as good as one.
        info = _class_infos[key] = ClassInfo(*key)
    return info


# ------------------------------------------------------------------ the method


class RemoteMethod(Generic[P, R_co]):
    """One method of one server, to be called from anywhere: `ref.incr`.

    Calling it sends a request; awaiting the result gives the reply or raises
    what the handler raised.
    """

    __slots__ = ("_call", "_name", "_ref", "_timeout_s")

    # The first three are what `__call__` reads; `_call` is the runtime's method,
    # looked up once.
    _call: Any
    _ref: RefObject
    _name: str
    _timeout_s: float | None

    def __init__(self, ref: RefObject, name: str, timeout_s: float | None, call: Any) -> None:
        self._ref = ref
        self._name = name
        self._timeout_s = timeout_s
        self._call = call

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]:
        """Call the method; await the result for the reply.

        Raises:
            MigrateError: The call failed; the outcome says whether it was done.
            Exception: Whatever the handler raised, with the remote traceback.
        """
        return self._call(  # type: ignore[no-any-return]
            self._ref, self._name, args, kwargs, self._timeout_s
        )

    def cast(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, None]:
        """Send without waiting for a reply; the await ends once the mailbox has it.

        Raises:
            MigrateError: It is not in the mailbox (`MailboxFull`), or that cannot
                be known; the outcome says which.
        """
        ref = self._ref
        runtime = ref._runtime
        if runtime is None:
            runtime = open_runtime()
        return runtime.cast(  # type: ignore[no-any-return]
            ref, self._name, args, kwargs, self._timeout_s
        )

    def with_options(self, *, timeout: float | None) -> RemoteMethod[P, R_co]:
        """Return the same method with options of its own.

        Args:
            timeout: Seconds to wait for the reply; None waits for ever.

        Raises:
            UsageError: The time-out is not a positive number.
        """
        return RemoteMethod(self._ref, self._name, checked_timeout_s(timeout), self._call)

    def __repr__(self) -> str:
        wait = "" if self._timeout_s is None else f" timeout={self._timeout_s} s"
        return f"<RemoteMethod {self._name}{wait} of {self._ref!r}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RemoteMethod):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return self._ref, self._name, self._timeout_s

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_remote_method, (self._ref, self._name, self._timeout_s)


def checked_timeout_s(timeout: object) -> float:
    """Return a time-out in seconds as runtimes take it: positive, `inf` for None.

    Raises:
        UsageError: It is not a positive number.
    """
    if timeout is None:
        return math.inf
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise UsageError(f"timeout={timeout!r} must be a number of seconds above 0, or None")
    return float(timeout)


def _call_unbound(
    ref: RefObject,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    timeout_s: float | None,
) -> Any:
    return open_runtime().call(ref, name, args, kwargs, timeout_s)


# --------------------------------------------------------------------- the ref

_set: Final = object.__setattr__


class RefObject:
    """A handle to a server, wherever it runs; what `Ref` is at run time.

    Refs are equal, and hash alike, when they mean the same server. They pickle,
    also into other processes, where they are bound to the runtime that unpickles
    them. `copy` and `deepcopy` return the ref itself.

    Args:
        server_id: The server's id; never reused.
        info: Facts of its class.
        runtime: The node or client to call through; None: found at each use, see
            `open_runtime`.
        node_hint: Id or name of the node last known to own the server; only ever a
            place to ask first.
        epoch_hint: The epoch of that knowledge; 0 when there is none.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "_epoch_hint",
        "_info",
        "_node_hint",
        "_runtime",
        "_server_id",
    )

    _server_id: str
    _info: ClassInfo
    _runtime: Runtime | None
    _node_hint: str | None
    _epoch_hint: int

    def __init__(
        self,
        server_id: str,
        info: ClassInfo,
        runtime: Runtime | None = None,
        node_hint: str | None = None,
        epoch_hint: int = 0,
    ) -> None:
        # Past our own `__setattr__`, which would triple the time: a state with
        # many refs makes one of each when it is unpickled.
        _set(self, "_server_id", server_id)
        _set(self, "_info", info)
        _set(self, "_runtime", runtime)
        _set(self, "_node_hint", node_hint)
        _set(self, "_epoch_hint", epoch_hint)

    if not TYPE_CHECKING:
        # Checkers must not see this: a misspelled attribute is to be reported.
        def __getattr__(self, name: str) -> RemoteMethod[..., Any]:
            # Reached once for each method; afterwards the instance dict answers.
            if name[:1] == "_" or name not in self._info.names:
                raise AttributeError(_no_such_method(self._info, name), name=name, obj=self)
            method = self._method(name)
            self.__dict__[name] = method
            return method

    def _method(self, name: str, timeout_s: float | None = None) -> RemoteMethod[..., Any]:
        # Not limited to the names known here: the server's class may be newer.
        runtime = self._runtime
        call = _call_unbound if runtime is None else runtime.call
        return RemoteMethod(self, name, timeout_s, call)

    def _bound_to(self, runtime: Runtime) -> RefObject:
        """Return this ref, or an equal one, that calls through `runtime`."""
        if self._runtime is runtime:
            return self
        return RefObject(self._server_id, self._info, runtime, self._node_hint, self._epoch_hint)

    def __setattr__(self, name: str, value: object) -> None:
        if name[:1] != "_":
            raise AttributeError(
                f"a ref holds nothing: {name!r} would be an attribute of the ref, not of the "
                "server; let a method of the server set it",
                name=name,
                obj=self,
            )
        _set(self, name, value)

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *self._info.methods]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RefObject):
            return NotImplemented
        return self._server_id == other._server_id

    def __hash__(self) -> int:
        return hash(self._server_id)

    def __repr__(self) -> str:
        place = "" if self._node_hint is None else f" at {self._node_hint}"
        return f"<Ref {self._info.short_name} {self._server_id}{place}>"

    def __reduce__(self) -> tuple[Any, ...]:
        info = self._info
        return _load_ref, (
            self._server_id,
            info.cls_name,
            info.methods,
            self._node_hint,
            self._epoch_hint,
        )

    def __copy__(self) -> RefObject:
        return self

    def __deepcopy__(self, memo: Mapping[int, Any]) -> RefObject:
        return self

    def __class_getitem__(cls, item: Any) -> types.GenericAlias:
        return types.GenericAlias(cls, item)


# People see, and pickles name, the class as `migrate.ref.Ref`.
RefObject.__name__ = RefObject.__qualname__ = "Ref"

if TYPE_CHECKING:
    Ref: TypeAlias = type[T]
else:
    Ref = RefObject


def ref_object(ref: object) -> RefObject:
    """Return a ref as the object that it is at run time.

    Args:
        ref: What a user gave a verb as its ref.

    Raises:
        UsageError: It is none; the message says what to give instead.
    """
    if isinstance(ref, RefObject):
        return ref
    if isinstance(ref, type):
        raise UsageError(
            f"a ref is needed, not the class {ref.__name__}: spawn it first, as in "
            f"`ref = await node.spawn({ref.__name__})`"
        )
    if isinstance(ref, str):
        raise UsageError(
            f"a ref is needed, not the string {ref[:80]!r}: look the name up first, as in "
            "`ref = await node.whereis(name)`"
        )
    raise UsageError(
        f"a ref is needed, not an object of {type(ref).__name__}: `node.spawn` and "
        "`node.whereis` return refs"
    )


def _load_ref(
    server_id: str,
    cls_name: str,
    methods: tuple[str, ...],
    node_hint: str | None,
    epoch_hint: int,
) -> RefObject:
    info = class_info(cls_name, methods)
    return RefObject(server_id, info, loading_runtime.get(), node_hint, epoch_hint)


def _load_remote_method(
    ref: RefObject, name: str, timeout_s: float | None
) -> RemoteMethod[..., Any]:
    return ref._method(name, timeout_s)


def _no_such_method(info: ClassInfo, name: str) -> str:
    text = f"{info.short_name} has no method {name!r} that can be called remotely"
    close = difflib.get_close_matches(name, info.methods, n=1)
    text += f"; did you mean {close[0]!r}?" if close else "."
    listed = ", ".join(info.methods[:30]) or "none"
    more = ", ..." if len(info.methods) > 30 else ""
    return (
        f"{text} It has: {listed}{more}. (Attributes, properties, generators, static methods "
        "and names with a leading underscore stay inside the server.)"
    )


def refuse_call_on_class(cls_name: str, name: str) -> NoReturn:
    """Raise the `UsageError` for a method that was called on the class itself."""
    raise UsageError(
        f"{cls_name}.{name} was called on the class; there is no server to call. Use a ref, as "
        f"in `ref = await node.spawn({cls_name}); await ref.{name}(...)`, or `await "
        f"node.call(ref, {cls_name}.{name}, ...)`; in a unit test make an object first, as in "
        f"`{cls_name}().{name}(...)`"
    )
