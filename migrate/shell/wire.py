"""Messages, rows and values as bytes; nowhere else.

Messages between authenticated peers are msgpack arrays, many in one frame. A large state is not
put into one: it follows the array of its message as it is, so that it need not be joined here, nor
cut out there. Such a frame begins with a byte that no msgpack has. Arguments, results
and exceptions inside them are opaque to everybody but the two ends, and their first byte tells
what they are: plain values are msgpack (arguments: an array of two, 0x92), or bare pickles
(protocol 5, 0x80) if they are integers of more than 64 bits or strings that UTF-8 cannot hold;
everything else is what `serializers` makes (0x93).
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import struct
import sys
import traceback
from collections.abc import Iterable
from typing import Any, Final, cast

import msgspec
from msgspec import structs

import serializers
from migrate.core.directory import Row
from migrate.core.messages import ERROR, OK, Chunk, Cut, Envelope, Message, Reply
from migrate.core.messages import Final as FinalMessage
from migrate.core.records import StateRecord
from migrate.errors import HandlerFailed, Outcome, PeerError, UsageError
from migrate.ref import Runtime, loading_runtime
from rpc import compression, pacing, shared_memory
from rpc.frames import Gathered
from serializers import Snapshot
from serializers.base import MAGIC
from serializers.errors import SerializerError

_encoder: Final = msgspec.msgpack.Encoder()
# A plain value is no map, no array of three and no array of two, which are the bytes of the others.
_plain_arguments: Final = msgspec.msgpack.Decoder(tuple[tuple[Any, ...], dict[str, Any]])
_plain_value: Final = msgspec.msgpack.Decoder()
_ARGUMENTS: Final = 0x92
PLAIN_ARGUMENTS: Final = bytes([_ARGUMENTS])
"""What arguments begin with that are plain values, and so are the same bytes each time."""
_PICKLE: Final = 0x80
_SNAPSHOT: Final = MAGIC[0]
_messages: Final = msgspec.msgpack.Decoder(list[Message])
_row: Final = msgspec.msgpack.Decoder(Row)
_state: Final = msgspec.msgpack.Decoder(StateRecord)
_error: Final = msgspec.msgpack.Decoder(tuple[str, str, str, bytes])

PLAIN: Final = frozenset({int, str, float, bool, bytes, type(None)})
"""Immutable types whose values are passed on a node as they are and pickled bare."""

TRACEBACK_CHARS_MAX: Final = 20_000

encode_messages = _encoder.encode
encode_row = _encoder.encode
encode_state = _encoder.encode


def decode_messages(data: bytes | bytearray | memoryview | Gathered) -> list[Message]:
    """Messages of one frame, in order.

    Raises:
        PeerError: The bytes are not messages of this release.
    """
    if isinstance(data, Gathered):
        return _decode_parts(data)
    if len(data) and data[0] == _MARK:
        return _decode_final(data)
    try:
        return _messages.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError(f"a frame holds no messages of this release: {error}") from error


_AFTER: Final = struct.Struct("<BBxxI")
"""What precedes a message whose state or payload follows it: the mark, bytes of padding, size of
the array."""
_MARK: Final = 0xC1
"""Never used in msgpack. Source: its specification."""
STATE_AFTER: Final = "state-after-message"
PAYLOAD_AFTER: Final = "payload-after-message"
"""Features of peers that read such frames."""
_ALIGNMENT_BYTES: Final = 64

PYTHON: Final = f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}"
PYTHON_IS: Final = "python="
FEATURES: Final = (
    *(STATE_AFTER, PAYLOAD_AFTER),
    *(compression.FEATURE, shared_memory.FEATURE, pacing.FEATURE),
    PYTHON_IS + PYTHON,
)
"""What this release says of itself to its peers."""


def encode_final(message: FinalMessage | Chunk | Cut, state: Gathered) -> Gathered:
    """The bytes of a message whose state is in parts; nothing of it is copied.

    The server's object begins at a multiple of 64 bytes, so that its arrays can be used in place.
    """
    head = _encoder.encode([structs.replace(message, state=b"")])
    before_object = _AFTER.size + len(head)
    if isinstance(message, FinalMessage):
        before_object += len(state.parts[0]) + len(state.parts[1])
    return state.after(_before(head, before_object))


def encode_with_payload(message: Envelope | Reply) -> Gathered:
    """The bytes of a request or reply whose payload follows it, uncopied."""
    head = _encoder.encode([structs.replace(message, payload=b"")])
    return Gathered([_before(head, _AFTER.size + len(head)), message.payload])


def _before(head: bytes, size: int) -> bytes:
    padding = -size % _ALIGNMENT_BYTES
    return _AFTER.pack(_MARK, padding, len(head)) + head + bytes(padding)


def _decode_final(data: bytes | bytearray | memoryview) -> list[Message]:
    view = memoryview(data)
    if len(view) < _AFTER.size:
        raise PeerError("a frame with a state is cut off")
    _, padding, size = _AFTER.unpack_from(view)
    at = _AFTER.size + size + padding
    if at > len(view):
        raise PeerError("a frame with a state is cut off")
    messages = decode_messages(view[_AFTER.size : _AFTER.size + size])
    if len(messages) != 1:
        raise PeerError("a frame has a state, and no message for it")
    # A view of what was received, so that what it holds is not copied either.
    _attach(messages[0], view[at:])
    return messages


def _attach(message: Message, after: memoryview) -> None:
    if isinstance(message, FinalMessage | Chunk | Cut):
        message.state = cast(bytes, after)
    elif isinstance(message, Envelope | Reply):
        message.payload = cast(bytes, after)
    else:
        raise PeerError("a frame has a state, and no message for it")


def _decode_parts(data: Gathered) -> list[Message]:
    head, *rest = data.parts
    messages = decode_messages(head)
    message = messages[0] if len(messages) == 1 else None
    if isinstance(message, FinalMessage | Chunk | Cut):
        message.state = cast(bytes, Gathered(rest))
    elif message is not None and len(rest) == 1:
        _attach(message, rest[0])
    else:
        raise PeerError("a frame has parts, and no message for them")
    return messages


def decode_row(data: bytes) -> Row:
    """A server's row.

    Raises:
        PeerError: The directory holds something else under a server's key.
    """
    try:
        return _row.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise PeerError(f"the directory holds a malformed row: {error}") from error


def decode_id(data: bytes) -> str:
    """The id that stands under a name.

    Raises:
        PeerError: The directory holds something else under a name's key.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PeerError(f"the directory holds a malformed id: {error}") from error


def decode_state(data: bytes | memoryview) -> StateRecord:
    """What travels with a server besides its object.

    Raises:
        PeerError: The bytes are something else.
    """
    try:
        return _state.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError(f"the state stream is malformed: {error}") from error


_SIZED: Final = frozenset({str, bytes})
"""Of `PLAIN`, what may be large."""


def _is_small_and_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all arguments are immutable values of the plainest kind, and none is large."""
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind not in PLAIN or (kind in _SIZED and len(value) >= SHARED_BYTES_MIN):
            return False
    return True


def pack_value(value: object) -> bytes:
    """A value as bytes; None is empty.

    Raises:
        SerializerError: Something in it cannot travel.
    """
    if value is None:
        return b""
    kind = type(value)
    if kind in PLAIN and (kind not in _SIZED or len(value) < SHARED_BYTES_MIN):  # type: ignore[arg-type]
        try:
            return _encoder.encode(value)
        except (OverflowError, UnicodeEncodeError):
            return pickle.dumps(value, 5)
    if _looks_large((value,)):
        return _pack_large(value)
    return serializers.dumps(value)


def pack_args(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Arguments as bytes.

    Raises:
        SerializerError: Something in them cannot travel.
    """
    if _is_small_and_plain(args, kwargs):
        try:
            payload = _encoder.encode((args, kwargs))
        except (OverflowError, UnicodeEncodeError):
            payload = pickle.dumps((args, kwargs), 5)
        return payload if len(payload) < SHARED_BYTES_MIN else _pack_large((args, kwargs))
    if _looks_large(args) or (kwargs and _looks_large(kwargs.values())):
        return _pack_large((args, kwargs))
    return serializers.dumps((args, kwargs))


SHARED_BYTES_MIN: Final = shared_memory.KEPT_BYTES_MIN
"""Payloads from this size on are written into shared memory as they are packed."""
_LOOKED_AT_MAX: Final = 100


def _looks_large(values: Iterable[Any], deeper: int = 2) -> bool:
    """Whether some value, or one in a container, says itself that it is large: a guess, no more."""
    for value in itertools.islice(values, _LOOKED_AT_MAX):
        kind = type(value)
        size: object = 0
        if kind is bytes or kind is bytearray or kind is str:
            size = len(value)
        elif kind is list or kind is tuple or kind is dict:
            inner = value.values() if kind is dict else value
            if deeper and _looks_large(inner, deeper - 1):
                return True
        elif hasattr(kind, "nbytes"):
            # An array's; whatever else has it may raise what it likes.
            with contextlib.suppress(Exception):
                size = value.nbytes
        if type(size) is int and size >= SHARED_BYTES_MIN:
            return True
    return False


def _pack_large(value: object) -> bytes:
    """As `serializers.dumps`; written straight into shared memory if that can be had.

    Then it is a read-only view of that memory, which is bytes to all who handle it.
    """
    pieces = serializers.encode(value).pieces()
    view = shared_memory.put(pieces, lends=True)
    return b"".join(pieces) if view is None else cast(bytes, view)


def pack_result(status: int, value: object, bytes_max: int) -> tuple[int, bytes]:
    """A handler's status and result as bytes; one that cannot travel becomes the error of that."""
    if status == OK:
        try:
            payload = pack_value(value)
            if len(payload) <= bytes_max:
                return OK, payload
            size = f"it takes {len(payload)} bytes, and message_bytes_max is {bytes_max}"
            value = _unpackable_result(ValueError(size))
        except (SerializerError, Exception) as error:
            value = _unpackable_result(error)
    assert isinstance(value, BaseException)
    return ERROR, pack_error(value)


def _unpackable_result(error: BaseException) -> UsageError:
    return UsageError(
        f"the handler ran, but its result cannot travel: {error}",
        cause=str(error),
        outcome=Outcome.DONE,
    )


def unpack(payload: bytes | memoryview, runtime: Runtime) -> Any:
    """The value that `pack_value` or `pack_args` packed; refs in it are bound to `runtime`.

    Raises:
        SerializerError: It cannot be built here.
        Exception: Whatever a class of the user's raises while it is rebuilt.
    """
    if not payload:
        return None
    first = payload[0]
    if first == _ARGUMENTS:
        return _plain_arguments.decode(payload)
    if first == _PICKLE:
        return pickle.loads(payload)
    if first != _SNAPSHOT:
        return _plain_value.decode(payload)
    token = loading_runtime.set(runtime)
    try:
        return serializers.loads(payload)
    finally:
        loading_runtime.reset(token)


def unpack_state(state: memoryview | Snapshot, runtime: Runtime) -> Any:
    """As `unpack`, of a server's object that may have come in parts."""
    if not isinstance(state, Snapshot):
        return unpack(state, runtime)
    token = loading_runtime.set(runtime)
    try:
        return serializers.decode(state)
    finally:
        loading_runtime.reset(token)


def exception_name(error: BaseException) -> str:
    """`module.Qualname` of an exception's class; builtins without their module."""
    cls = type(error)
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def traceback_text(error: BaseException) -> str:
    """The traceback as Python prints it, without the frames of the node itself."""
    text = "".join(traceback.format_exception(error))
    if len(text) > TRACEBACK_CHARS_MAX:
        half = TRACEBACK_CHARS_MAX // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
    return text


def pack_error(error: BaseException) -> bytes:
    """An exception as bytes; one that cannot be pickled travels as its name and text."""
    try:
        pickled = serializers.dumps(error)
    except (SerializerError, Exception):
        pickled = b""
    try:
        message = str(error)
    except Exception:
        message = "(its text cannot be had)"
    return _encoder.encode((exception_name(error), message, traceback_text(error), pickled))


def unpack_error(payload: bytes, runtime: Runtime, server: str) -> BaseException:
    """The exception of a handler, as itself where it can be built here.

    Returns:
        The exception, with the remote traceback as `remote_traceback` and as a note; or
        `HandlerFailed` with the same facts.
    """
    try:
        name, message, text, pickled = _error.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return PeerError(f"a peer sent a malformed exception: {error}", server=server)
    why = "it cannot be pickled"
    if pickled:
        try:
            rebuilt = unpack(pickled, runtime)
        except Exception as failure:
            why = f"it cannot be rebuilt here: {failure}"
        else:
            if isinstance(rebuilt, BaseException):
                attach_traceback(rebuilt, text)
                return rebuilt
            why = "what arrived is no exception"
    return HandlerFailed(
        f"the handler raised {name}: {message} ({why})",
        server=server,
        cause=name,
        exception_type=name,
        remote_traceback=text,
        outcome=Outcome.DONE,
    )


def attach_traceback(error: BaseException, text: str) -> None:
    """Hang a remote traceback on an exception: a note, and the attribute `remote_traceback`."""
    try:
        error.remote_traceback = text  # type: ignore[attr-defined]
    except AttributeError:
        pass  # a class with slots; the note is enough
    error.add_note(f"Remote traceback:\n{text.rstrip()}")


def unpackable(what: str, error: SerializerError, outcome: Outcome) -> UsageError:
    """The error a caller gets for arguments or a result that cannot travel."""
    return UsageError(f"{what} cannot travel: {error}", cause=str(error), outcome=outcome)
