"""The verbs that a node and a client have in common, as type checkers see them.

A class that implements them takes the overloads of `spawn`, `spawn_lb` and
`call` from here by `@implements(Verbs.spawn)`. How `spawn` is typed:

PEP 612 allows no keyword between `*args: P.args` and `**kwargs: P.kwargs`, so
one signature cannot have the constructor's parameters and `options` too. There
are two overloads instead. With `options`, the constructor's arguments are given
by position and checked through a `TypeVarTuple`, defaults included; without,
`ParamSpec` checks positions and keywords. Both checkers report a wrong argument
under either. What neither accepts is `options` together with the constructor's
own arguments by keyword; it works at run time. (mypy doubts that any
implementation accepts an unpacked tuple of types, hence the `type: ignore[misc]`.)
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    TypeVar,
    TypeVarTuple,
    cast,
    overload,
)

from migrate.options import NodeChoice, SpawnOptions
from migrate.ref import Ref, RemoteMethod
from migrate.reports import CheckpointInfo, Event, MoveReport, NodeInfo, ServerInfo

__all__ = ["SyncVerbs", "Verbs", "implements"]

F = TypeVar("F")
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def implements(verb: F) -> Callable[[Callable[..., Any]], F]:
    """Give a method the types, and the documentation, of the verb that it implements.

    Args:
        verb: The verb, as `Verbs.spawn`.

    Returns:
        A decorator that returns the method itself; for type checkers it is the verb.
    """

    def decorate(method: Callable[..., Any]) -> F:
        method.__doc__ = verb.__doc__
        return cast(F, method)

    return decorate


# In the overloads `self` is Any, so that they fit whatever class implements them.


class Verbs(Protocol):
    """What can be done with servers from anywhere in the cluster.

    Every verb may raise `UsageError` for arguments that cannot be, `AuthError`,
    and `MigrateError` with the outcome *unknown* when the other side falls silent.
    """

    @overload
    async def spawn(
        self: Any, cls: Callable[[*Ts], T], /, *args: *Ts, options: SpawnOptions
    ) -> Ref[T]: ...
    @overload
    async def spawn(
        self: Any, cls: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Ref[T]: ...
    async def spawn(  # type: ignore[misc]
        self, cls: Any, /, *args: Any, options: Any = None, **kwargs: Any
    ) -> Any:
        """Make a server and return its ref once it can be called.

        Args:
            cls: Its class.
            *args: Arguments of the class's constructor.
            options: Name and place, see `SpawnOptions`.
            **kwargs: Arguments of the class's constructor.

        Raises:
            NameTaken: A server has the name; the error carries its ref.
            NodeNotFound: No node has the name given by `on`.
            TargetRefused: The node cannot import the class, or admits nothing.
            Exception: What the constructor or `on_start` raised; no server is left.
        """

    @overload
    async def spawn_lb(
        self: Any, cls: Callable[[*Ts], T], /, *args: *Ts, options: SpawnOptions
    ) -> Ref[T]: ...
    @overload
    async def spawn_lb(
        self: Any, cls: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Ref[T]: ...
    async def spawn_lb(  # type: ignore[misc]
        self, cls: Any, /, *args: Any, options: Any = None, **kwargs: Any
    ) -> Any:
        """Make a server on the least loaded node; otherwise as `spawn`."""

    @overload
    async def call(
        self: Any, ref: Ref[T], method: RemoteMethod[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...
    @overload
    async def call(
        self: Any,
        ref: Ref[T],
        method: Callable[Concatenate[T, P], Coroutine[Any, Any, R]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R: ...
    @overload
    async def call(
        self: Any,
        ref: Ref[T],
        method: Callable[Concatenate[T, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R: ...
    @overload
    async def call(self: Any, ref: Ref[Any], method: str, /, *args: Any, **kwargs: Any) -> Any: ...
    async def call(self, ref: Ref[Any], method: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of a server; typed also for methods without a decorator.

        Args:
            ref: The server.
            method: The method as found on the class, as `Counter.incr` or
                `Counter.incr.with_options(timeout=5.0)`, or its name.
            *args: Its arguments.
            **kwargs: Its arguments.

        Returns:
            The handler's result.

        Raises:
            CallError: It failed outside the handler; the outcome says how far it came.
            Exception: What the handler raised, with the remote traceback.
        """

    async def migrate(self, ref: Ref[Any], *, to: NodeChoice) -> MoveReport:
        """Move a server.

        Raises:
            MoveError: It was not moved, or that is not known; the outcome says which.
                Unless it is unknown, the source serves as before.
            NodeNotFound: No node has that name.
        """
        ...

    async def replicate(
        self,
        ref: Ref[Any],
        nodes: int | Sequence[str],
        *,
        mode: Literal["sync", "async"] = "sync",
    ) -> ServerInfo:
        """Keep hot standbys of a server, which take over if its owner dies; `[]` stops it.

        A standby is fed with the state after each message, while the server goes on serving.
        Who takes over runs `on_promote` before its first message. Then, and when a standby is
        lost, the set is completed again by itself: with the nodes that were named, or others
        while one of these is away or owns the server.

        Args:
            ref: The server.
            nodes: Names of the nodes; or how many, which are then chosen: on other hosts first,
                then the less loaded.
            mode: "sync": whatever leaves the server (a reply, also of a read; a call or cast of its
                own) leaves when every standby has what it depends on. So nothing that anybody
                has seen is lost, or done twice, when the owner is killed.
                "async": it leaves at once. When the owner is killed the server goes back to what
                its standby has: up to `async_lag_s` seconds or `async_lag_bytes` bytes of changes
                are lost though they were acknowledged, and each sender is told so by one
                `RolledBack`.

        Returns:
            What is known of the server, once all of them are in sync.

        Raises:
            StandbyError: One could not be made, and why; the former ones stay.
            NodeNotFound: No node has one of the names; the former ones stay.
        """
        ...

    async def checkpoint(
        self,
        ref: Ref[Any],
        url: str | os.PathLike[str],
        *,
        every: float | None = None,
        keep: int = 3,
        key: bytes | None = None,
    ) -> CheckpointInfo:
        """Write a server's state to a file or object store; it goes on serving.

        The state is that between two messages. While it is pickled no message is handled, but
        they are taken in, and the node's other servers are not held up. No hook runs: a class
        whose attributes cannot be pickled leaves them out in `__getstate__`. Of the mailbox the
        casts go along, since each was acknowledged; calls do not.

        Args:
            ref: The server.
            url: `file:///folder/name` or a `pathlib.Path` (on the owner's host), or
                `s3://bucket/name`. What is there is replaced only when the new one is whole.
            every: Seconds. The checkpoint is taken now and then again and again, wherever the
                server is, until it is stopped; each under a name of its own that begins with
                `url`. `restore(url)` takes the latest. 0 ends that for this url.
            keep: With `every`: how many are kept, the latest ones.
            key: What signs it, at least 16 bytes; None: a key of the cluster's.

        Returns:
            What was written, with its own url.

        Raises:
            CheckpointError: It could not be written; the server serves as before.
            NotPicklable: The state cannot be pickled; the server serves as before.
        """
        ...

    async def restore(
        self,
        url: str | os.PathLike[str],
        *,
        on: NodeChoice | None = None,
        name: str | None = None,
        replace: bool = False,
        fork: bool = False,
        key: bytes | None = None,
    ) -> Ref[Any]:
        """Bring a server back from a checkpoint; `on_arrive` runs before its first message.

        It keeps its id, so refs to it work again. It has gone back in time: each sender that
        knew it before, by a call or only by its ref, gets `RolledBack` once, with both times,
        and can then go on. Timers go on
        with the time that they had left; requests of its own that nobody had acknowledged are
        dropped, which the log and `monitor` tell.

        Args:
            url: Where the checkpoint is; see `checkpoint`.
            on: The node; None: the one asked, or with `replace` the one where it is.
            name: Its name; None: the one that it had. With `fork`, None: none.
            replace: Also while the original lives: it is replaced between two messages, without
                a hook. Otherwise that is refused. Its standbys, their mode and its journal stay
                what they were; what it was restored to is there too when this returns, or they are
                lost as after a failover. A server that was lost, or stopped, and a fork have no
                standbys before `replicate` is called, and a journal if their class says so.
            fork: As another server, with a new id: state and timers, but neither mailbox nor
                name. Nobody is told anything.
            key: What it is signed with, if one was given to `checkpoint`.

        Raises:
            CheckpointError: Nothing was restored; `flaw` tells the kind of reason.
            NameTaken: Another server has its name by now.
            NodeNotFound: No node has the name given by `on`.
            TargetRefused: The node admits nothing.
            UsageError: The class is durable, and the node has no folder for journals.
        """
        ...

    async def fork(self, ref: Ref[T], *, on: NodeChoice | None = None) -> Ref[T]:
        """Clone a server under a new identity: state and timers, no mailbox, no name.

        The original goes on serving. `on_arrive` of the clone runs before its first message.

        Args:
            ref: The server.
            on: The node of the clone; None: that of the original.

        Raises:
            CheckpointError: There is no clone.
            NodeNotFound: No node has the name given by `on`.
            NotPicklable: The state cannot be pickled.
            TargetRefused: The node admits nothing.
            UsageError: The class is durable, and the node has no folder for journals.
        """
        ...

    async def whereis(self, name: str) -> Ref[Any]:
        """Look a name up.

        Raises:
            ServerNotFound: No server has it.
        """
        ...

    async def info(self, ref: Ref[Any]) -> ServerInfo:
        """Tell what is known of a server.

        Raises:
            ServerNotFound: It was stopped, or never was.
        """
        ...

    async def servers(self) -> list[ServerInfo]:
        """Tell of every server of the cluster, sorted by id."""
        ...

    async def nodes(self) -> list[NodeInfo]:
        """Tell of every node of the cluster, sorted by name."""
        ...

    async def stop(self, ref: Ref[Any]) -> None:
        """Stop a server after the message that it handles; its name is free again.

        Raises:
            ServerNotFound: It was stopped already, or never was.
        """
        ...

    async def drain(self, node: str) -> list[MoveReport]:
        """Move every server off a node, which then admits nothing.

        Raises:
            MoveError: Some could not move; they serve where they were.
            NodeNotFound: No node has that name.
        """
        ...

    async def rebalance(self) -> list[MoveReport]:
        """Move servers where the measured gain beats the cost of the move."""
        ...

    def monitor(self, ref: Ref[Any]) -> AsyncIterator[Event]:
        """Yield what happens to a server, from now until it is stopped or lost."""
        ...


class SyncVerbs(Protocol):
    """The three verbs whose types depend on the server's class, as the blocking twin has them.

    The other verbs of the twin take what those of `Verbs` take, and return the result
    itself. A ref's own methods block too when the ref is bound to the twin, which its
    type cannot say: `client.call(ref, Counter.incr, 3)` is typed, `ref.incr(3)` is not.
    """

    @overload
    def spawn(
        self: Any, cls: Callable[[*Ts], T], /, *args: *Ts, options: SpawnOptions
    ) -> Ref[T]: ...
    @overload
    def spawn(self: Any, cls: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Ref[T]: ...
    def spawn(  # type: ignore[misc]
        self, cls: Any, /, *args: Any, options: Any = None, **kwargs: Any
    ) -> Any:
        """See `Verbs.spawn`."""

    @overload
    def spawn_lb(
        self: Any, cls: Callable[[*Ts], T], /, *args: *Ts, options: SpawnOptions
    ) -> Ref[T]: ...
    @overload
    def spawn_lb(
        self: Any, cls: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Ref[T]: ...
    def spawn_lb(  # type: ignore[misc]
        self, cls: Any, /, *args: Any, options: Any = None, **kwargs: Any
    ) -> Any:
        """See `Verbs.spawn_lb`."""

    @overload
    def call(
        self: Any, ref: Ref[T], method: RemoteMethod[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...
    @overload
    def call(
        self: Any,
        ref: Ref[T],
        method: Callable[Concatenate[T, P], Coroutine[Any, Any, R]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R: ...
    @overload
    def call(
        self: Any,
        ref: Ref[T],
        method: Callable[Concatenate[T, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R: ...
    @overload
    def call(self: Any, ref: Ref[Any], method: str, /, *args: Any, **kwargs: Any) -> Any: ...
    def call(self, ref: Ref[Any], method: Any, /, *args: Any, **kwargs: Any) -> Any:
        """See `Verbs.call`."""
