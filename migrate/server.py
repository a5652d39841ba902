"""Servers: the decorators, and what is known of a class once they ran.

A class becomes a server without changing: `@server` only writes options into
it, and `@call`, `@blocking` and `@every` wrap a function in a `Handler`, a
descriptor that gives the plain bound method on an instance. On the class it
gives a `ClassMethod`: an object that names class and method for
`node.call(ref, Counter.incr, 3)` and refuses to be called, because a call on
the class reaches no server.

Type checkers see the same two faces of the descriptor; since `Ref[T]` is for
them `type[T]`, the class's face is a ref's face (see `migrate.ref`).

Everything else is read from the class when it is needed, by `spec_of`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import typing
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import (
    Any,
    Concatenate,
    Final,
    Generic,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    overload,
)

from migrate.errors import UsageError
from migrate.ref import (
    ClassInfo,
    Ref,
    RefObject,
    RemoteMethod,
    checked_timeout_s,
    class_info,
    current_runtime,
    refuse_call_on_class,
)

__all__ = [
    "FORMER_NAMES",
    "HOOKS",
    "AsyncHandler",
    "ClassMethod",
    "Current",
    "Handler",
    "MethodSpec",
    "PlainHandler",
    "ServerSpec",
    "TimerSpec",
    "blocking",
    "call",
    "current",
    "every",
    "options_of",
    "server",
    "spec_of",
]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")

HOOKS: Final = frozenset(
    {"on_arrive", "on_depart", "on_promote", "on_start", "on_stay", "on_stop", "upgrade"}
)
"""Methods that the node calls at turning points; they cannot be called remotely."""

MAILBOX_DEFAULT: Final = 10_000
"""Envelopes that a mailbox holds unless `@server(mailbox=...)` says otherwise."""

FORMER_NAMES: Final[dict[tuple[str, str], type]] = {}
"""Classes by the (module, qualified name) that `@server(former_names=...)` says they once had."""

_OPTIONS_ATTRIBUTE: Final = "__migrate_options__"
_SPEC_ATTRIBUTE: Final = "__migrate_spec__"


# ----------------------------------------------------------------- descriptors


class ClassMethod(RemoteMethod[P, R_co]):
    """A handler looked up on its class, as in `node.call(ref, Counter.incr, 3)`.

    Calling it raises `UsageError`, unless its first argument is an instance of
    the class, as in `Base.incr(self, 3)`: then it is the plain function.

    Attributes:
        __wrapped__: The plain function.
    """

    # A dict, unlike its parent: tools that document or wrap functions set and
    # read the names that functions have.
    __slots__ = ("__dict__",)

    __name__: str
    __qualname__: str
    __wrapped__: Callable[..., Any]
    _owner: type

    def __init__(
        self, owner: type, name: str, func: Callable[..., Any], timeout_s: float | None = None
    ) -> None:
        super().__init__(cast(RefObject, None), name, timeout_s, None)
        functools.update_wrapper(self, func)
        self.__name__ = name
        self._owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plain function if the first argument is an instance of the class.

        Raises:
            UsageError: It is not; nothing was sent.
        """
        if args and isinstance(args[0], self._owner):
            return self.__wrapped__(*args, **kwargs)
        refuse_call_on_class(self._owner.__name__, self._name)

    def cast(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, as there is no server to send to.

        Raises:
            UsageError: Always.
        """
        refuse_call_on_class(self._owner.__name__, self._name)

    def with_options(self, *, timeout: float | None) -> ClassMethod[P, R_co]:
        """Return the same method with options of its own, for `node.call`.

        Args:
            timeout: Seconds to wait for the reply; None waits for ever.

        Raises:
            UsageError: The time-out is not a positive number.
        """
        return ClassMethod(self._owner, self._name, self.__wrapped__, checked_timeout_s(timeout))

    def __repr__(self) -> str:
        # With the signature, because `help` shows this text for each method.
        signature = inspect.signature(self.__wrapped__)
        return f"<method {self._name}{signature} of server class {self._owner.__qualname__}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_class_method, (self._owner, self._name, self._timeout_s)

    def _key(self) -> tuple[Any, ...]:
        return self._owner, self._name, self._timeout_s


def _load_class_method(owner: type, name: str, timeout_s: float | None) -> ClassMethod[..., Any]:
    method: ClassMethod[..., Any] = getattr(owner, name)
    return method if timeout_s is None else method.with_options(timeout=timeout_s)


@dataclasses.dataclass(frozen=True, slots=True)
class _Marks:
    """What the decorators of one method say, gathered whatever their order."""

    is_call: bool = False
    is_blocking: bool = False
    every_s: float | None = None
    in_process: bool = False


class Handler(Generic[P, R_co]):
    """A decorated method in its class's namespace; a descriptor.

    On an instance it gives the bound plain method, on the class a `ClassMethod`.
    """

    __wrapped__: Callable[..., R_co]
    __name__: str

    def __init__(self, func: Callable[..., R_co], marks: _Marks) -> None:
        functools.update_wrapper(self, func)
        self._marks = marks

    def __call__(self, instance: Any, /, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call the plain function; needed only inside the class's own body."""
        return self.__wrapped__(instance, *args, **kwargs)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        func = self.__wrapped__
        if instance is not None:
            return func.__get__(instance, owner)
        return ClassMethod(owner, self.__name__, func)

    def __set_name__(self, owner: type, name: str) -> None:
        self.__name__ = name

    def __repr__(self) -> str:
        return f"<handler {getattr(self, '__qualname__', self.__name__)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        # Classes that travel by value carry their handlers in their namespace.
        return type(self), (self.__wrapped__, self._marks), {"__name__": self.__name__}


class PlainHandler(Handler[P, R_co]):
    """A handler declared with `def`."""

    @overload
    def __get__(self, instance: None, owner: Any = None) -> RemoteMethod[P, R_co]: ...
    @overload
    def __get__(self, instance: object, owner: Any = None) -> Callable[P, R_co]: ...
    def __get__(self, instance: object | None, owner: Any = None) -> Any:
        return super().__get__(instance, owner)


class AsyncHandler(Handler[P, Coroutine[Any, Any, R_co]]):
    """A handler declared with `async def`."""

    @overload
    def __get__(self, instance: None, owner: Any = None) -> RemoteMethod[P, R_co]: ...
    @overload
    def __get__(
        self, instance: object, owner: Any = None
    ) -> Callable[P, Coroutine[Any, Any, R_co]]: ...
    def __get__(self, instance: object | None, owner: Any = None) -> Any:
        return super().__get__(instance, owner)


class SuspendedFrameCannotMove(Protocol):
    """What type checkers see instead of a handler that is a generator.

    It cannot be called, so each use is reported; at run time the decorator has
    already refused it.
    """


# ------------------------------------------------------------------ decorators


# The overloads overlap on purpose, here and below: an iterator or a coroutine is
# also a plain result, and the first overload that fits is the one that is meant.


@overload
def call(  # type: ignore[overload-overlap]
    method: Callable[Concatenate[Any, P], AsyncIterator[Any]], /
) -> SuspendedFrameCannotMove: ...
@overload
def call(  # type: ignore[overload-overlap]
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /
) -> AsyncHandler[P, R]: ...
@overload
def call(method: Callable[Concatenate[Any, P], R], /) -> PlainHandler[P, R]: ...
def call(method: Any, /) -> Any:
    """Give a method full types on refs, and open it to calls from outside.

    Once any method of a class has it, only such methods answer the public gRPC
    API; nodes and clients of `connect` may call every public method. A method
    that overrides such a one is open as well.

    Args:
        method: A method of a server class, `def` or `async def`.

    Returns:
        A descriptor; instances behave as before.

    Raises:
        UsageError: It is a generator, a static or class method, private, a hook,
            or no function.
    """
    return _marked("call", method, is_call=True)


class _Blocking(Protocol):
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, method: Callable[Concatenate[Any, P], Coroutine[Any, Any, Any]], /
    ) -> SuspendedFrameCannotMove: ...
    @overload
    def __call__(self, method: Callable[Concatenate[Any, P], R], /) -> PlainHandler[P, R]: ...


@overload
def blocking(  # type: ignore[overload-overlap]
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, Any]], /
) -> SuspendedFrameCannotMove: ...
@overload
def blocking(method: Callable[Concatenate[Any, P], R], /) -> PlainHandler[P, R]: ...
@overload
def blocking(*, process: bool = False) -> _Blocking: ...
def blocking(method: Any = None, /, *, process: bool = False) -> Any:
    """Run a method in a worker thread or process, so that the node's loop goes on.

    The server still handles one message at a time, and a move or stop waits for the method as
    for every other. A caller that is cancelled or times out ends its own waiting only: the method
    runs to its end, and its result is dropped. When the node closes, or the server turns out to be
    owned elsewhere, a thread cannot be stopped and its result is dropped; a process is killed.

    In a process the method is a function of its arguments. The object stays in the node, so
    `self` there has the class's methods and constants, and refuses to read or change the object's
    attributes. Arguments and result are pickled. A worker that dies (`kill -9`, out of memory, a
    crash) ends the call in `WorkerLost`, whose outcome is unknown, and the server goes on.

    Args:
        method: A method declared with `def`; it may block.
        process: Run it in a worker process, which has a GIL of its own.

    Returns:
        A descriptor; called on an instance, the method runs where it is called.

    Raises:
        UsageError: As for `call`; or the method is `async def`, which must not block.
    """
    if not isinstance(process, bool):
        raise UsageError(f"@migrate.blocking(process=...) takes True or False, not {process!r}")
    if method is None:
        return functools.partial(_blocking, in_process=process)
    return _blocking(method, in_process=process)


def _blocking(method: Any, /, *, in_process: bool) -> Handler[..., Any]:
    if inspect.iscoroutinefunction(_plain(method)):
        raise UsageError(
            f"@migrate.blocking needs a method declared with def; {_name_of(method)} is async def, "
            "which runs on the loop. Drop `async`, or await asyncio.to_thread(...) inside it"
        )
    return _marked("blocking", method, is_blocking=True, in_process=in_process)


class _Every(Protocol):
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, method: Callable[Concatenate[Any, P], AsyncIterator[Any]], /
    ) -> SuspendedFrameCannotMove: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /
    ) -> AsyncHandler[P, R]: ...
    @overload
    def __call__(self, method: Callable[Concatenate[Any, P], R], /) -> PlainHandler[P, R]: ...


def every(*unnamed: Any, seconds: float | None = None) -> _Every:
    """Let the node call a method again and again; the phase survives a move.

    Ticks are messages: they wait while a handler runs or a move quiesces, and
    those missed meanwhile are merged into one.

    Args:
        *unnamed: Nothing; a bare `@every` is refused with a clear error.
        seconds: The period, above 0, at most a year.

    Returns:
        A decorator for a method that can be called without arguments; its name
        may have a leading underscore.

    Raises:
        UsageError: The period is missing or out of bounds; on decorating, as for
            `call`, or if the method has required parameters.
    """
    if unnamed or seconds is None:
        raise UsageError("name the period, as in @migrate.every(seconds=1.0)")
    period_s = _checked_period_s(seconds)

    def decorate(method: Any, /) -> Any:
        required = _required_parameters(_plain(method))
        if required:
            raise UsageError(
                f"@migrate.every calls {_name_of(method)} without arguments, but it requires "
                f"{', '.join(required)}: give them defaults"
            )
        return _marked("every", method, every_s=period_s)

    return cast(_Every, decorate)


_EVERY_SECONDS_MAX: Final = 366 * 86_400


def _checked_period_s(seconds: object) -> float:
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not 0 < seconds <= _EVERY_SECONDS_MAX
    ):
        raise UsageError(
            f"@migrate.every(seconds={seconds!r}) needs a number of seconds above 0 and at most "
            f"{_EVERY_SECONDS_MAX} (a year)"
        )
    return float(seconds)


class _Server(Protocol):
    def __call__(self, cls: type[T], /) -> type[T]: ...


@overload
def server(cls: type[T], /) -> type[T]: ...
@overload
def server(
    *,
    version: int = 1,
    mailbox: int = MAILBOX_DEFAULT,
    reentrant: bool = False,
    movable: bool = True,
    former_names: tuple[str, ...] = (),
    shared_references: bool = False,
    deterministic: bool = False,
    durable: bool = False,
) -> _Server: ...
def server(cls: Any = None, /, **options: Any) -> Any:
    """Declare a class to be a server; it stays an ordinary class.

    Args:
        cls: The class, when the decorator is used bare.
        **options: `version` (int, 1): version of the state; a class with a higher
            one gets the older state through its `upgrade` hook. `mailbox` (int,
            10,000): envelopes that the mailbox holds. `reentrant` (bool, False):
            calls that come back along their own chain are admitted instead of
            refused with `CallCycle`. `movable` (bool, True): False pins the
            server to the node that spawned it. `former_names` (tuple of "module:Class",
            empty): names that the class had before it was moved or renamed; servers and
            states written under them are found as this class wherever the former name
            leads to nothing. The module that declares them must be imported there.
            `shared_references` (bool, False): calls from the same node hand over arguments
            and results as they are, uncopied, while those from elsewhere are copied on
            their way; for servers and callers that change neither. `deterministic` (bool,
            False): its handlers, all of them plain `def`, depend on nothing but the state
            and their arguments (no clock, no randomness, no order of sets), so a standby
            can run them too, instead of being told what they changed; what it finds out to
            differ is told loudly, and from then on it is told changes. `durable` (bool,
            False): a journal is kept where its node keeps journals (`Node(data=...)`): replies
            wait until what they depend on is there, and it comes back after every process
            was killed.

    Returns:
        The class itself, or a decorator for it.

    Raises:
        UsageError: It is no class, an option is unknown or out of bounds, or one of
            its methods cannot be a handler.
    """
    if cls is None:
        return functools.partial(_declare, options=_Options.checked(options))
    if options:
        raise UsageError("use @migrate.server bare, or with options alone")
    return _declare(cls, options=_Options())


def _declare(cls: Any, *, options: _Options) -> Any:
    if not isinstance(cls, type):
        raise UsageError(
            f"@migrate.server decorates a class, not {cls!r}: a server has state and methods; "
            "make the function a method of a class"
        )
    _read_class(cls, options, is_declared=True)
    for name in options.former_names:
        module, _, qualname = name.partition(":")
        FORMER_NAMES[module, qualname] = cls
    setattr(cls, _OPTIONS_ATTRIBUTE, options)
    return cls


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    """Options of `@server`, written into the class and inherited by its children."""

    version: int = 1
    mailbox: int = MAILBOX_DEFAULT
    reentrant: bool = False
    movable: bool = True
    former_names: tuple[str, ...] = ()
    shared_references: bool = False
    deterministic: bool = False
    durable: bool = False

    @classmethod
    def checked(cls, options: Mapping[str, Any]) -> _Options:
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in options.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else "."
                raise UsageError(
                    f"@migrate.server has no option {name}{hint} It has: {', '.join(known)}"
                )
            if name == "former_names":
                _check_former_names(value)
                continue
            is_flag = isinstance(known[name], bool)
            if is_flag and not isinstance(value, bool):
                raise UsageError(f"@migrate.server({name}=...) takes True or False, not {value!r}")
            if not is_flag and (type(value) is not int or not 1 <= value <= _OPTION_INT_MAX):
                raise UsageError(
                    f"@migrate.server({name}=...) takes an int from 1 to {_OPTION_INT_MAX}, "
                    f"not {value!r}"
                )
        return cls(**options)


def _check_former_names(value: object) -> None:
    names = value if isinstance(value, tuple) else ()
    for name in names:
        parts = name.split(":") if isinstance(name, str) else []
        if len(parts) != 2 or not all(
            piece.isidentifier() for part in parts for piece in part.split(".")
        ):
            names = ()
            break
    if not names and value != ():
        raise UsageError(
            '@migrate.server(former_names=...) takes a tuple of "module:Class", as in '
            f'("shop.old:Basket",), not {value!r}'
        )


# Both options travel as 32-bit numbers.
_OPTION_INT_MAX: Final = 2**31 - 1


# ------------------------------------------------------------------- the facts


@dataclasses.dataclass(frozen=True, slots=True)
class MethodSpec:
    """One method that the node can run.

    Attributes:
        name: Its name.
        func: The plain function; call it as `func(instance, *args, **kwargs)`.
        is_async: Declared `async def`. Another one may still return an awaitable,
            which is to be awaited as well.
        is_blocking: To be run in a worker thread, or process.
        in_process: In a worker process, without the object.
        is_public: Answers calls from outside.
    """

    name: str
    func: Callable[..., Any]
    is_async: bool
    is_blocking: bool
    in_process: bool
    is_public: bool


@dataclasses.dataclass(frozen=True, slots=True)
class TimerSpec:
    """One `@every` of a class.

    Attributes:
        name: Name of the method.
        seconds: The period.
        method: The method; it is in `ServerSpec.methods` too if its name is public.
    """

    name: str
    seconds: float
    method: MethodSpec


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ServerSpec:
    """What a node knows of a class whose objects it hosts.

    Attributes:
        cls: The class.
        cls_name: "module:Qualname".
        version: Version of its state.
        mailbox: Envelopes that the mailbox holds.
        reentrant: Whether calls that come back along their own chain are admitted.
        movable: Whether it may leave its node.
        shared_references: Whether calls on one node pass what they pass uncopied.
        deterministic: Whether its standbys run what it runs.
        durable: Whether it has a journal.
        methods: Every method that can be called remotely, by name.
        timers: Its timers, by name in order.
        hooks: Which of `HOOKS` it defines.
    """

    cls: type
    cls_name: str
    version: int
    mailbox: int
    reentrant: bool
    movable: bool
    shared_references: bool
    deterministic: bool
    durable: bool
    methods: Mapping[str, MethodSpec]
    timers: tuple[TimerSpec, ...]
    hooks: frozenset[str]

    @property
    def class_info(self) -> ClassInfo:
        """What refs to its objects carry."""
        return class_info(self.cls_name, tuple(self.methods))


class _SpecCell:
    """Keeps a class's spec in the class; travels empty when the class does."""

    __slots__ = ("spec",)

    __cached_facts__ = True
    """Tells `serializers.digest` that it is no part of a class's state."""

    def __init__(self, spec: ServerSpec | None = None) -> None:
        self.spec = spec

    def __reduce__(self) -> tuple[Any, ...]:
        return _SpecCell, ()


def options_of(cls: type) -> _Options:
    """The options that `@server` gave a class or its nearest parent, or the defaults."""
    options: _Options = getattr(cls, _OPTIONS_ATTRIBUTE, _Options())
    return options


def spec_of(cls: Any) -> ServerSpec:
    """Return what is known of a class; read once, then kept in the class.

    Works for undecorated classes too: every public method can be called. Do not
    change a class after its first use as a server.

    Args:
        cls: A class, or a parametrised generic one, as `Box[int]`.

    Raises:
        UsageError: It is no class, or one of its decorated methods cannot be a
            handler.
    """
    origin = typing.get_origin(cls)
    if origin is not None:
        cls = origin
    if not isinstance(cls, type):
        raise UsageError(
            f"a class is needed to make a server, not {cls!r}: give the class itself, and its "
            "constructor's arguments after it"
        )
    cell = cls.__dict__.get(_SPEC_ATTRIBUTE)
    # The class is compared because some decorators copy a namespace to a new class.
    if type(cell) is _SpecCell and cell.spec is not None and cell.spec.cls is cls:
        return cell.spec
    spec = _read_class(cls, options_of(cls), is_declared=False)
    try:
        setattr(cls, _SPEC_ATTRIBUTE, _SpecCell(spec))
    except (AttributeError, TypeError):
        # Built-in classes take no attributes; theirs is read each time.
        return spec
    return spec


def _read_class(cls: type, options: _Options, *, is_declared: bool) -> ServerSpec:
    found: dict[str, _Found] = {}
    for name in dict.fromkeys(name for base in cls.__mro__ for name in vars(base)):
        entry = _Found.in_class(cls, name)
        if entry is not None:
            found[name] = entry
    for name, entry in found.items():
        if entry.marks != _Marks():
            _check_name(name, entry.marks, f"{cls.__qualname__}.{name}")
        elif (
            is_declared
            and name in vars(cls)
            and not name.startswith("_")
            and name not in HOOKS
            and _is_generator(entry.func)
        ):
            _refuse_generator(f"{cls.__qualname__}.{name}")
    has_calls = any(entry.marks.is_call for entry in found.values())
    methods: dict[str, MethodSpec] = {}
    timers: list[TimerSpec] = []
    for name in sorted(found):
        entry = found[name]
        if name in HOOKS or _is_generator(entry.func):
            continue
        method = MethodSpec(
            name=name,
            func=entry.func,
            is_async=inspect.iscoroutinefunction(entry.func),
            is_blocking=entry.marks.is_blocking,
            in_process=entry.marks.in_process,
            is_public=not name.startswith("_") and (entry.marks.is_call or not has_calls),
        )
        if options.deterministic and (method.is_async or method.is_blocking):
            kind = "`async def`" if method.is_async else "`@migrate.blocking`"
            raise UsageError(
                f"{cls.__qualname__}.{name} is {kind}, and {cls.__qualname__} is declared "
                "deterministic: what a handler does while it waits depends on others; make it a "
                "plain `def`, or leave the option out"
            )
        if not name.startswith("_"):
            methods[name] = method
        if entry.marks.every_s is not None:
            timers.append(TimerSpec(name, entry.marks.every_s, method))
    return ServerSpec(
        cls=cls,
        cls_name=f"{cls.__module__}:{cls.__qualname__}",
        version=options.version,
        mailbox=options.mailbox,
        reentrant=options.reentrant,
        movable=options.movable,
        shared_references=options.shared_references,
        deterministic=options.deterministic,
        durable=options.durable,
        methods=methods,
        timers=tuple(timers),
        hooks=frozenset(HOOKS & found.keys()),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """A function in a class, with the marks that hold for it."""

    func: Callable[..., Any]
    marks: _Marks

    @classmethod
    def in_class(cls, owner: type, name: str) -> _Found | None:
        """Find what a name means in a class; None if it is not a method.

        Raises:
            UsageError: Another decorator hides one of ours.
        """
        entries = [vars(base)[name] for base in owner.__mro__ if name in vars(base)]
        first = entries[0]
        if isinstance(first, Handler):
            func, own = first.__wrapped__, first._marks
        elif inspect.isfunction(first):
            func, own = first, _Marks()
        else:
            hidden = getattr(first, "__func__", None) or getattr(first, "fget", None)
            if isinstance(hidden, Handler):
                _refuse_hidden(f"{owner.__qualname__}.{name}", type(first).__name__)
            return None
        if own == _Marks() and _wraps_handler(first):
            _refuse_hidden(f"{owner.__qualname__}.{name}", "another decorator")
        # An override answers where the overridden one did, and ticks as it did; in
        # which thread it runs is a fact of its own code.
        inherited = [entry._marks for entry in entries[1:] if isinstance(entry, Handler)]
        every_s = own.every_s
        if every_s is None:
            every_s = next((m.every_s for m in inherited if m.every_s is not None), None)
        is_call = own.is_call or any(marks.is_call for marks in inherited)
        return cls(func, _Marks(is_call, own.is_blocking, every_s, own.in_process))


# -------------------------------------------------------------------- checking


def _marked(decorator: str, method: Any, **mark: Any) -> Handler[..., Any]:
    """Wrap a function, or add a mark to the handler that it already is."""
    func = _plain(method)
    if isinstance(method, staticmethod | classmethod):
        raise UsageError(
            f"@migrate.{decorator} cannot decorate a {type(method).__name__}: a handler belongs "
            "to one server's object; make it an ordinary method, or leave it undecorated"
        )
    if isinstance(method, type):
        raise UsageError(
            f"@migrate.{decorator} decorates a method, not the class {method.__name__}: "
            "classes take @migrate.server"
        )
    if not inspect.isfunction(func):
        raise UsageError(f"@migrate.{decorator} decorates a method of a class, not {method!r}")
    name = _name_of(method)
    if _is_generator(func):
        _refuse_generator(name)
    if not _takes_self(func):
        raise UsageError(
            f"@migrate.{decorator} decorates a method, but {name} takes no parameter for the "
            "object: add self"
        )
    marks = method._marks if isinstance(method, Handler) else _Marks()
    marks = dataclasses.replace(marks, **mark)
    _check_name(func.__name__, marks, name)
    if inspect.iscoroutinefunction(func):
        return AsyncHandler(func, marks)
    return PlainHandler(func, marks)


def _check_name(name: str, marks: _Marks, where: str) -> None:
    if name in HOOKS:
        raise UsageError(
            f"{where} is a hook: the node calls it at its own time, and it cannot be called "
            "remotely. Take the decorator away, or choose another name"
        )
    if name.startswith("_") and marks.every_s is None and name != "<lambda>":
        raise UsageError(
            f"{where} has a leading underscore, so nothing can call it remotely: take the "
            "decorator or the underscore away"
        )


def _refuse_generator(name: str) -> NoReturn:
    raise UsageError(
        f"{name} is a generator and cannot be a handler: its suspended frame would have to move "
        "with the server, and frames cannot be pickled. Return a list, or keep a position in the "
        "object and return the next part on each call; if it is only used inside the server, "
        "give it a leading underscore"
    )


def _refuse_hidden(where: str, by: str) -> NoReturn:
    raise UsageError(
        f"{where}: {by} hides a migrate decorator below it; put @migrate.call, @migrate.blocking "
        "and @migrate.every above all others"
    )


def _wraps_handler(func: Any) -> bool:
    # Bounded, as `__wrapped__` could be made to point in a circle.
    for _ in range(64):
        func = getattr(func, "__wrapped__", None)
        if func is None:
            return False
        if isinstance(func, Handler):
            return True
    return False


def _plain(method: Any) -> Any:
    return method.__wrapped__ if isinstance(method, Handler) else method


def _name_of(method: Any) -> str:
    return str(getattr(method, "__qualname__", None) or repr(method))


def _is_generator(func: Any) -> bool:
    return inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func)


def _takes_self(func: Any) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(func).parameters.values()]
    return bool(kinds) and kinds[0] in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )


def _required_parameters(func: Any) -> list[str]:
    if not inspect.isfunction(func):
        return []
    parameters = list(inspect.signature(func).parameters.values())[1:]
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]


# --------------------------------------------------------------- in a handler


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Current:
    """What a handler or hook can know of itself and of the message it handles.

    Attributes:
        ref: The server's own ref.
        node: Name of the node it runs on.
        epoch: Its epoch; higher after every change of owner or standbys.
        caller: Id of the server that sent the message, or the name of the client;
            None in hooks and timers.
        request_id: The same for every execution of one request, also after a
            failover, and different for every other request; None in hooks. Give
            it to outside systems to make an effect there idempotent.
    """

    ref: Ref[Any]
    node: str
    epoch: int
    caller: str | None = None
    request_id: str | None = None


def current() -> Current:
    """Return the server's own ref, node, epoch, caller and request id.

    Raises:
        UsageError: The code does not run in a handler or hook.
    """
    scope = current_runtime.get()
    describe = getattr(scope, "current", None)
    if describe is None:
        raise UsageError(
            "migrate.current() was called outside a handler: only code that a server runs for a "
            "message has a current server"
        )
    found: Current = describe()
    return found
