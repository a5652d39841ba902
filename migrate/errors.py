"""Every error that livemigrate raises to its user, in one hierarchy.

Each error names the server, the node and the cause where they are known, and
always states its *outcome*: whether what was asked for has not happened, has
happened, or cannot be known. A caller repeats after `NOT_DONE`, goes on after
`DONE`, and looks before it repeats after `UNKNOWN`.

All of them keep every field through `pickle` and `copy`, because they travel
between nodes. That is why the constructors take the message alone by position
and every field by keyword, with a default: the pickle protocol of exceptions
calls the class with the positional arguments and then restores the attributes.
"""

from __future__ import annotations

import enum
from typing import Any, ClassVar

__all__ = [
    "AuthError",
    "CallCycle",
    "CallError",
    "CallTimeout",
    "CheckpointError",
    "Fenced",
    "HandlerFailed",
    "InternalError",
    "MailboxFull",
    "MigrateError",
    "MoveError",
    "MoveInDoubt",
    "MoveRolledBack",
    "NameTaken",
    "NodeNotFound",
    "NotPicklable",
    "Outcome",
    "PeerError",
    "ReplayDiverged",
    "ResultForgotten",
    "RolledBack",
    "ServerLost",
    "ServerNotFound",
    "StaleJournal",
    "StandbyError",
    "TargetRefused",
    "UsageError",
    "WorkerLost",
]


class Outcome(enum.Enum):
    """What became of the thing that was asked for."""

    NOT_DONE = "not done"
    """It did not happen and will not happen; repeating it is safe."""

    DONE = "done"
    """It happened once; the error is about what came after or what it answered."""

    UNKNOWN = "unknown"
    """It may have happened, may still happen, or neither; look before repeating."""


class MigrateError(Exception):
    """Root of every error of livemigrate.

    Args:
        message: What failed, why, and what to do, in one or two sentences.
        server: Id or name of the server concerned.
        node: Name of the node concerned.
        cause: The reason in short, as the failing part gave it.
        outcome: What became of the request; None takes `default_outcome`.

    Attributes:
        default_outcome: Outcome of this kind of error unless one is given.
    """

    default_outcome: ClassVar[Outcome] = Outcome.UNKNOWN
    _fields_not_in_text: ClassVar[frozenset[str]] = frozenset({"message"})

    def __init__(
        self,
        message: str,
        *,
        server: str | None = None,
        node: str | None = None,
        cause: str | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.server = server
        self.node = node
        self.cause = cause
        self.outcome = self.default_outcome if outcome is None else outcome

    def __str__(self) -> str:
        """The message, then every field that is known, the outcome last."""
        known = [
            f"{name}={value}"
            for name, value in vars(self).items()
            if name != "outcome"
            and not name.startswith("_")
            and name not in self._fields_not_in_text
            and value is not None
            and value != ()
            and value != ""
        ]
        return f"{self.message}; {', '.join([*known, f'outcome={self.outcome.value}'])}"


class UsageError(MigrateError):
    """The calling code asked for something that cannot be; fix the code."""

    default_outcome = Outcome.NOT_DONE


class NameTaken(UsageError):
    """Another server has the name.

    Args:
        message: See `MigrateError`.
        ref: Ref of the server that has the name; None if it is not known.
        **fields: See `MigrateError`.
    """

    def __init__(self, message: str, *, ref: Any = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.ref = ref


class NodeNotFound(UsageError, LookupError):
    """No node of that name is alive in the cluster."""


class CallError(MigrateError):
    """A call or a cast failed outside the handler's own code."""


class CallTimeout(CallError, TimeoutError):
    """No reply came in time; the handler may have run or may still run.

    Args:
        message: See `MigrateError`.
        timeout_s: How long the caller waited, in seconds.
        **fields: See `MigrateError`.
    """

    def __init__(self, message: str, *, timeout_s: float | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.timeout_s = timeout_s


class CallCycle(CallError):
    """The call waits for itself along its chain of callers; it was refused at once.

    Args:
        message: See `MigrateError`.
        chain: Ids of the servers that wait for each other, in the order of
            their calls; the one that closes the cycle is last.
        **fields: See `MigrateError`.
    """

    default_outcome = Outcome.NOT_DONE

    def __init__(self, message: str, *, chain: tuple[str, ...] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.chain = tuple(chain)


class MailboxFull(CallError):
    """The server's mailbox has no room; nothing was sent, repeating is safe.

    Args:
        message: See `MigrateError`.
        limit: How many envelopes the mailbox holds.
        **fields: See `MigrateError`.
    """

    default_outcome = Outcome.NOT_DONE

    def __init__(self, message: str, *, limit: int | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.limit = limit


class ResultForgotten(CallError):
    """The request's completion record has expired, so its result cannot be told."""


class ReplayDiverged(CallError):
    """After a failover the handler made other calls than before, so it was stopped."""


class ServerNotFound(CallError, LookupError):
    """No such server: it was stopped, or never was."""

    default_outcome = Outcome.NOT_DONE


class ServerLost(CallError):
    """The server's owner died with no standby and no journal to take over."""


class WorkerLost(CallError):
    """The worker process of a `blocking(process=True)` method ended before it had answered.

    The server goes on, with its state as it was; what the method did outside may be done.
    """


class RolledBack(CallError):
    """The server went back in time: to a checkpoint, or to a standby that lagged.

    Each sender is told once; what it did after `then` may be undone.

    Args:
        message: See `MigrateError`.
        then: The instant that the state belongs to, in seconds since 1970 UTC.
        now: The instant at which it came back, in seconds since 1970 UTC.
        **fields: See `MigrateError`.
    """

    def __init__(
        self,
        message: str,
        *,
        then: float | None = None,
        now: float | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.then = then
        self.now = now


class HandlerFailed(CallError):
    """The handler raised an exception that cannot be rebuilt here.

    An exception that can be imported reaches the caller as itself instead.

    Args:
        message: See `MigrateError`.
        exception_type: "module.Qualname" of the handler's exception.
        remote_traceback: Its traceback as text, as formatted at the owner.
        **fields: See `MigrateError`.
    """

    default_outcome = Outcome.DONE
    _fields_not_in_text = frozenset({"message", "remote_traceback"})

    def __init__(
        self,
        message: str,
        *,
        exception_type: str = "",
        remote_traceback: str = "",
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.exception_type = exception_type
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        """As `MigrateError`, followed by the remote traceback on lines of its own."""
        if not self.remote_traceback:
            return super().__str__()
        return f"{super().__str__()}\n\nRemote traceback:\n{self.remote_traceback.rstrip()}"


class MoveError(MigrateError):
    """A move failed; the subclass and the outcome say who serves.

    Args:
        message: See `MigrateError`.
        source: Name of the node that the server was to leave.
        target: Name of the node that it was to reach.
        **fields: See `MigrateError`.
    """

    def __init__(
        self,
        message: str,
        *,
        source: str | None = None,
        target: str | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.source = source
        self.target = target


class NotPicklable(MoveError):
    """Something in the server's state cannot travel; the source goes on serving.

    Args:
        message: See `MigrateError`.
        path: Attribute path from the server down, as `Counter.cache['db'].conn`, of the first
            obstacle.
        problems: All obstacles, the first one included: path, type, reason and remedy of each.
        **fields: See `MoveError`.
    """

    default_outcome = Outcome.NOT_DONE
    _fields_not_in_text = frozenset({"message", "problems"})

    def __init__(
        self, message: str, *, path: str = "", problems: tuple[str, ...] = (), **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.path = path
        self.problems = tuple(problems)


class TargetRefused(MoveError):
    """The target cannot take the server: class, version, capacity or draining."""

    default_outcome = Outcome.NOT_DONE


class MoveRolledBack(MoveError):
    """The move failed before its commit; the source serves, mailbox intact."""

    default_outcome = Outcome.NOT_DONE


class MoveInDoubt(MoveError):
    """Whether the move committed is not known yet; the directory will tell.

    Args:
        message: See `MigrateError`.
        transfer_id: Id of the move, as the directory's row names it.
        **fields: See `MoveError`.
    """

    def __init__(self, message: str, *, transfer_id: str | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.transfer_id = transfer_id


class StandbyError(MigrateError):
    """A standby could not be made, kept or promoted."""


class StaleJournal(StandbyError):
    """A journal is not the one that the server's row names, so it is of no use any more.

    Args:
        message: See `MigrateError`.
        path: Where the file is now.
        **fields: See `MigrateError`.
    """

    default_outcome = Outcome.NOT_DONE

    def __init__(self, message: str, *, path: str | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.path = path


class CheckpointError(MigrateError):
    """A checkpoint could not be written, verified or restored.

    Args:
        message: See `MigrateError`.
        url: Where the checkpoint is, or was to be.
        flaw: What kind of failure it is. Of the checkpoint: "missing", "foreign" (no
            checkpoint), "newer" (a format of a later release), "truncated", "damaged",
            "wrong key", "too large". Of what is here: "no class", "older class", "not loadable".
            Of the server: "alive" (the original is), "busy", "taken" (restored by somebody
            else). Of the place: "store".
        **fields: See `MigrateError`.
    """

    default_outcome = Outcome.NOT_DONE

    def __init__(
        self, message: str, *, url: str | None = None, flaw: str | None = None, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.url = url
        self.flaw = flaw


class Fenced(MigrateError):
    """A newer epoch exists: this incarnation must stop, and its effects are refused.

    Args:
        message: See `MigrateError`.
        epoch: Epoch of the incarnation that has to stop.
        newest_epoch: Highest epoch seen.
        **fields: See `MigrateError`.
    """

    default_outcome = Outcome.NOT_DONE

    def __init__(
        self,
        message: str,
        *,
        epoch: int | None = None,
        newest_epoch: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.epoch = epoch
        self.newest_epoch = newest_epoch


class AuthError(MigrateError):
    """Who asked could not prove who it is, or may not do this."""

    default_outcome = Outcome.NOT_DONE


class PeerError(MigrateError):
    """A peer broke the protocol: another release, a bug there, or an attack."""


class InternalError(MigrateError):
    """A bug of livemigrate; please report it with the story.

    Args:
        message: See `MigrateError`.
        story: The machine's most recent events and phases, oldest first.
        **fields: See `MigrateError`.
    """

    _fields_not_in_text = frozenset({"message", "story"})

    def __init__(self, message: str, *, story: tuple[str, ...] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.story = tuple(story)

    def __str__(self) -> str:
        """As `MigrateError`, followed by the story, one line for each event."""
        if not self.story:
            return super().__str__()
        return "\n  ".join([f"{super().__str__()}\nStory, oldest first:", *self.story])
