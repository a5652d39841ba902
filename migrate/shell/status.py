"""Our errors as rich gRPC statuses, and back: one table.

A status carries a code, a short message and, in its details, one `ErrorDetail` with the
error's class, its outcome and what else is known (google.rpc.Status, as other languages'
libraries read it). Two rules hold for every error and stand above the table:

* A code that clients and proxies repeat by themselves (UNAVAILABLE, RESOURCE_EXHAUSTED,
  ABORTED) is given only with the outcome *not done*. Otherwise a repeat could run a request
  twice, which the client never asked for.
* What was done and yet ends in an error (a handler raised, a result that is not JSON) is
  UNKNOWN, gRPC's own code for what application code raises.

All of it travels in HTTP/2 trailers, for which gRPC clients take 8 KiB unless they are told
otherwise; so texts are cut, the traceback in its middle.
Source: GRPC_ARG_MAX_METADATA_SIZE in the documentation of gRPC core.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import grpc
from google.rpc import status_pb2

from migrate import errors
from migrate.errors import HandlerFailed, MigrateError, Outcome
from migrate.shell import wire
from rpc.v1 import types_pb2

log: Final = logging.getLogger("migrate")

Code: Final = grpc.StatusCode

CODES: Final[Mapping[type[MigrateError], grpc.StatusCode]] = {
    errors.MigrateError: Code.UNAVAILABLE,
    errors.UsageError: Code.INVALID_ARGUMENT,
    errors.NameTaken: Code.ALREADY_EXISTS,
    errors.NodeNotFound: Code.NOT_FOUND,
    errors.CallError: Code.UNAVAILABLE,
    errors.CallTimeout: Code.DEADLINE_EXCEEDED,
    errors.CallCycle: Code.FAILED_PRECONDITION,
    errors.MailboxFull: Code.RESOURCE_EXHAUSTED,
    errors.ResultForgotten: Code.DATA_LOSS,
    errors.ReplayDiverged: Code.INTERNAL,
    errors.ServerNotFound: Code.NOT_FOUND,
    errors.ServerLost: Code.DATA_LOSS,
    errors.RolledBack: Code.DATA_LOSS,
    errors.WorkerLost: Code.UNKNOWN,
    errors.HandlerFailed: Code.UNKNOWN,
    errors.MoveError: Code.FAILED_PRECONDITION,
    errors.NotPicklable: Code.FAILED_PRECONDITION,
    errors.TargetRefused: Code.FAILED_PRECONDITION,
    errors.MoveRolledBack: Code.ABORTED,
    errors.MoveInDoubt: Code.UNKNOWN,
    errors.StaleJournal: Code.FAILED_PRECONDITION,
    errors.StandbyError: Code.FAILED_PRECONDITION,
    errors.CheckpointError: Code.FAILED_PRECONDITION,
    errors.Fenced: Code.ABORTED,
    errors.AuthError: Code.PERMISSION_DENIED,
    errors.PeerError: Code.INTERNAL,
    errors.InternalError: Code.INTERNAL,
}
"""The code of each error; a class that is not here has that of its nearest parent."""

REPEATED: Final = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.ABORTED})
"""Codes that retry policies in common use repeat without asking."""

_WITHOUT_DETAIL: Final[Mapping[grpc.StatusCode, type[MigrateError]]] = {
    Code.DEADLINE_EXCEEDED: errors.CallTimeout,
    Code.UNAUTHENTICATED: errors.AuthError,
    Code.PERMISSION_DENIED: errors.AuthError,
    Code.UNIMPLEMENTED: errors.UsageError,
    Code.INVALID_ARGUMENT: errors.UsageError,
}
"""What a bare code means, as gRPC itself gives it; the outcome is the class's own."""

_OUTCOMES: Final = {
    Outcome.NOT_DONE: types_pb2.OUTCOME_NOT_DONE,
    Outcome.DONE: types_pb2.OUTCOME_DONE,
    Outcome.UNKNOWN: types_pb2.OUTCOME_UNKNOWN,
}
_OUTCOMES_BACK: Final = {number: outcome for outcome, number in _OUTCOMES.items()}

_PREFIX: Final = "migrate."

# Bytes of UTF-8. The short message travels twice, once percent-encoded (three bytes for each
# that is not ASCII); the detail travels in base64: 1,536 + 4/3 * 4,500 stays below 8 KiB.
_SHORT_BYTES_MAX: Final = 512
_MESSAGE_BYTES_MAX: Final = 1_024
_FIELD_BYTES_MAX: Final = 256
_STATUS_BYTES_MAX: Final = 4_500


def code_of(error: MigrateError) -> grpc.StatusCode:
    """The gRPC code of an error, by its class and outcome; see the module's two rules."""
    code = next(CODES[cls] for cls in type(error).__mro__ if cls in CODES)
    if error.outcome is Outcome.DONE or (
        code in REPEATED and error.outcome is not Outcome.NOT_DONE
    ):
        return Code.UNKNOWN
    return code


def handler_failure(error: BaseException, *, server: str, outcome: Outcome) -> HandlerFailed:
    """What a handler or a constructor raised, as it is told outside.

    Args:
        error: As it reached this node; a remote traceback that hangs on it is used.
        server: Id of the server; for a constructor, the name of the class.
        outcome: DONE for a handler; NOT_DONE for a constructor, as no server is left.

    Returns:
        An error with the exception's class, text and traceback, all of them text.
    """
    if isinstance(error, HandlerFailed):
        return error
    try:
        text = str(error.args[0]) if isinstance(error, MigrateError) else str(error)
    except Exception:
        # A class of the user's may fail even at this; the name has to do.
        text = "(its text cannot be had)"
    traceback = getattr(error, "remote_traceback", None)
    if not isinstance(traceback, str):
        traceback = wire.traceback_text(error)
    name = wire.exception_name(error)
    return HandlerFailed(
        text, server=server, exception_type=name, remote_traceback=traceback, outcome=outcome
    )


def to_status(error: MigrateError, code: grpc.StatusCode | None = None) -> status_pb2.Status:
    """An error as a google.rpc.Status, small enough for trailers.

    Args:
        error: What went wrong.
        code: Another code than the table's.

    Returns:
        Code, message, and one `ErrorDetail` in the details. Too long texts are cut.
    """
    code = code or code_of(error)
    traceback = ""
    if isinstance(error, HandlerFailed):
        name, traceback = error.exception_type or type(error).__name__, error.remote_traceback
        short = f"{name}: {error.message}"
    else:
        public = next(cls for cls in type(error).__mro__ if cls in CODES)
        name, short = _PREFIX + public.__name__, error.message
    detail = types_pb2.ErrorDetail(
        type=cut(name, _FIELD_BYTES_MAX),
        message=cut(error.message, _MESSAGE_BYTES_MAX),
        outcome=_OUTCOMES[error.outcome],
        server=cut(error.server or "", _FIELD_BYTES_MAX),
        node=cut(error.node or "", _FIELD_BYTES_MAX),
        cause=cut(error.cause or "", _FIELD_BYTES_MAX),
    )
    status = status_pb2.Status(code=_number(code), message=cut(short, _SHORT_BYTES_MAX))
    status.details.add().Pack(detail)
    if traceback:
        # What is left is the traceback's; the 16 bytes are for the longer lengths before it.
        detail.remote_traceback = cut(traceback, _STATUS_BYTES_MAX - status.ByteSize() - 16)
        status.details[0].Pack(detail)
    return status


def from_status(code: grpc.StatusCode, message: str, details: bytes | None) -> MigrateError:
    """The error that a client of the public API was sent; the way back of `to_status`.

    Args:
        code: The call's code.
        message: The call's message.
        details: The trailer `grpc-status-details-bin`, if there was one.

    Returns:
        The error, with class, outcome and fields; `HandlerFailed` for what a handler raised.
        Without a detail of ours, what the code alone tells: nothing is known of the outcome
        unless the code says so. Never raises because of what came.
    """
    detail = types_pb2.ErrorDetail()
    try:
        status = status_pb2.Status.FromString(details or b"")
        if not any(part.Unpack(detail) for part in status.details):
            raise ValueError("no detail of ours")
    except Exception as why:
        log.debug("a status without a detail of ours: %s", why)
        kind = _WITHOUT_DETAIL.get(code, MigrateError)
        return kind(message or code.name, cause=code.name)
    fields: dict[str, Any] = {
        "server": detail.server or None,
        "node": detail.node or None,
        "cause": detail.cause or None,
        "outcome": _OUTCOMES_BACK.get(detail.outcome, Outcome.UNKNOWN),
    }
    module, _, name = detail.type.rpartition(".")
    found = getattr(errors, name, None) if module + "." == _PREFIX else None
    if isinstance(found, type) and issubclass(found, MigrateError):
        return found(detail.message, **fields)
    return HandlerFailed(
        detail.message,
        exception_type=detail.type,
        remote_traceback=detail.remote_traceback,
        **fields,
    )


def cut(text: str, bytes_max: int) -> str:
    """A text that takes at most so many bytes as UTF-8, without its middle if it is longer.

    Characters that UTF-8 does not have (lone surrogates) are written as escapes, since a
    protobuf string cannot hold them.
    """
    data = text.encode("utf-8", "backslashreplace")
    if len(data) > bytes_max:
        mark = b" [...] "
        # The end of a text mostly says more: the last frame, the exception, the remedy.
        head = max(0, (bytes_max - len(mark)) // 3)
        tail = max(0, bytes_max - len(mark) - head)
        data = data[:head] + mark + data[len(data) - tail :]
        data = data.decode("utf-8", "ignore").encode()[:bytes_max]
    return data.decode("utf-8", "ignore")


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number
