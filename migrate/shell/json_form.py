"""JSON of the public API: arguments in, replies out.

Where JSON leaves a choice:

* Requests: numbers keep their kind (`1` an int, `1.0` a float); NaN, infinities,
  lone surrogates and numbers that no float holds are malformed; of equal keys the last counts.
* Replies: tuples, lists and sets become arrays, dataclasses objects, a ref `{"ref": id}`, an
  enum its value, bytes standard base64 (as in the JSON form of protobuf), dates, times, UUIDs
  and decimals text. Keys are text or whole numbers. Everything else, NaN and infinities among
  it, is an error that names the path, as `result['prices'][2]`: the call itself was done.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import datetime
import decimal
import enum
import math
import uuid
from typing import Any, Final

import msgspec

from migrate.errors import Outcome, UsageError
from migrate.ref import RefObject

REPLY_JSON_BYTES_MAX: Final = 4 * 1024 * 1024 - 4096
"""A longer reply is an error: gRPC clients refuse messages over 4 MiB unless told otherwise, and
then learn neither the reply nor the outcome."""

JSON_DEPTH_MAX: Final = 100
"""Nesting of arguments and replies. Parsers in common use take at least as much, and pickling
nested values needs several stack frames for each level."""

JSON_ON_LOOP_CHARS_MAX: Final = 64 << 10
"""Longer arguments are parsed in a thread; these take under a millisecond."""

JSON_ON_LOOP_VALUES_MAX: Final = 2_000
"""Replies of more values are written in a thread; these take about a millisecond."""


class NotJson(UsageError):
    """A handler's result has no JSON form; `cause` is the path to what has none."""


class _ManyValues(Exception):
    """More values than are to be written on the loop."""


# --------------------------------------------------------------------- arguments


def parse_arguments(args_json: str, kwargs_json: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a request.

    Args:
        args_json: A JSON array; empty means none.
        kwargs_json: A JSON object; empty means none.

    Raises:
        UsageError: Malformed, of another kind, or nested deeper than `JSON_DEPTH_MAX`.
    """
    args = _parse("args_json", args_json) if args_json else []
    kwargs = _parse("kwargs_json", kwargs_json) if kwargs_json else {}
    if type(args) is not list:
        raise UsageError(f'args_json takes a JSON array, as in [3, "a"], not {_kind(args)}')
    if type(kwargs) is not dict:
        raise UsageError(f'kwargs_json takes a JSON object, as in {{"by": 3}}, not {_kind(kwargs)}')
    return tuple(args), kwargs


def _parse(field: str, text: str) -> Any:
    try:
        value = msgspec.json.decode(text)
    except RecursionError as error:
        raise _too_deep(field) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise UsageError(f"{field} is not JSON: {error}", cause=str(error)) from error
    level: list[Any] = [value] if type(value) in (list, dict) else []
    for _ in range(JSON_DEPTH_MAX):
        if not level:
            return value
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is list or type(child) is dict
        ]
    if level:
        raise _too_deep(field)
    return value


def _too_deep(field: str) -> UsageError:
    return UsageError(f"{field} is nested deeper than {JSON_DEPTH_MAX} levels")


def _kind(value: object) -> str:
    return {dict: "an object", list: "an array", str: "a text", type(None): "null"}.get(
        type(value), "a number or truth value"
    )


# ----------------------------------------------------------------------- replies


def reply_json(value: object, values_max: float = math.inf) -> str:
    """A handler's result as JSON; see the module's text for what becomes of what.

    Args:
        value: Anything; not changed.
        values_max: Values of the result after which to give up.

    Raises:
        NotJson: Something in it has no JSON form, it is nested too deep (or in a circle), or
            the text would be longer than `REPLY_JSON_BYTES_MAX`. The outcome is DONE.
        _ManyValues: It has more than `values_max` values.
    """
    writer = _Writer(values_max)
    try:
        data = msgspec.json.encode(writer.plain(value, None, 0))
    except (NotJson, _ManyValues):
        raise
    except Exception as error:
        # Code of the user's runs here: properties, `__iter__`, `__str__`.
        raise NotJson(
            f"the handler ran, but its result cannot be told outside: {type(error).__name__}: "
            f"{error}",
            cause=type(error).__name__,
            outcome=Outcome.DONE,
        ) from error
    if len(data) > REPLY_JSON_BYTES_MAX:
        raise writer.too_long()
    return data.decode()


class _Writer:
    """Turns a result into what `msgspec.json` writes without any choice of its own."""

    def __init__(self, values_max: float) -> None:
        self._values_left = values_max
        self._size = 0

    def check_size(self, more: int) -> None:
        """Count bytes that are certain to be in the text; shared parts count every time."""
        self._size += more
        if self._size > REPLY_JSON_BYTES_MAX:
            raise self.too_long()

    def too_long(self) -> NotJson:
        """The error for a result that would be too long as JSON."""
        return self._error(
            None, f"it would take more than {REPLY_JSON_BYTES_MAX} bytes; return it in parts"
        )

    def plain(self, value: Any, path: tuple[Any, Any] | None, depth: int) -> Any:
        """A value made of dicts with text keys, lists, str, int, finite float, bool and None."""
        self._values_left -= 1
        if self._values_left < 0:
            raise _ManyValues
        kind = type(value)
        if value is None or kind is bool:
            self.check_size(4)
            return value
        if isinstance(value, enum.Enum):
            value = value.value
        if isinstance(value, str):
            return self._text(value, path)
        if isinstance(value, int):
            return self._whole(int(value), path)
        if isinstance(value, float):
            if not math.isfinite(value):
                raise self._error(path, f"it is {value!r}, and JSON has no such number")
            self.check_size(3)
            return float(value)
        if depth >= JSON_DEPTH_MAX:
            raise self._error(
                path, f"it is nested deeper than {JSON_DEPTH_MAX} levels, or contains itself"
            )
        return self._composed(value, path, depth + 1)

    def _composed(self, value: Any, path: tuple[Any, Any] | None, depth: int) -> Any:
        if isinstance(value, dict):
            return self._object(value, path, depth)
        if isinstance(value, list | tuple | set | frozenset):
            self.check_size(2 + len(value))
            return [self.plain(part, (path, i), depth) for i, part in enumerate(value)]
        if isinstance(value, RefObject):
            return {"ref": self._text(value._server_id, path)}
        if isinstance(value, bytes | bytearray | memoryview):
            data = bytes(value)
            self.check_size(len(data) * 4 // 3)
            return base64.b64encode(data).decode("ascii")
        if isinstance(value, datetime.datetime | datetime.date | datetime.time):
            return self._text(value.isoformat(), path)
        if isinstance(value, uuid.UUID | decimal.Decimal):
            return self._text(str(value), path)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {
                field.name: self.plain(
                    getattr(value, field.name), (path, _Field(field.name)), depth
                )
                for field in dataclasses.fields(value)
            }
        raise self._error(
            path,
            f"it is an object of {type(value).__module__}.{type(value).__qualname__}, which has no "
            "JSON form; return plain values or a dataclass",
        )

    def _object(self, value: dict[Any, Any], path: tuple[Any, Any] | None, depth: int) -> Any:
        self.check_size(2 + 2 * len(value))
        found: dict[str, Any] = {}
        for key, part in value.items():
            if isinstance(key, enum.Enum):
                key = key.value
            if isinstance(key, str):
                name = self._text(key, (path, key))
            elif isinstance(key, int) and not isinstance(key, bool):
                name = str(self._whole(int(key), (path, key)))
            else:
                raise self._error(
                    path, f"the key {key!r} is neither a text nor a whole number; use one of them"
                )
            if name in found:
                raise self._error(path, f"two of its keys are both {name!r} as JSON")
            found[name] = self.plain(part, (path, key), depth)
        return found

    def _text(self, value: str, path: tuple[Any, Any] | None) -> str:
        if value.isascii():
            self.check_size(2 + len(value))
        else:
            try:
                self.check_size(2 + len(value.encode()))
            except UnicodeEncodeError as error:
                raise self._error(
                    path, "it is a text with a lone surrogate, which UTF-8 does not have"
                ) from error
        return str.__str__(value)

    def _whole(self, value: int, path: tuple[Any, Any] | None) -> int:
        # 4,000 digits; Python itself refuses to write more than 4,300 (CVE-2020-10735).
        if value.bit_length() > 13_000:
            raise self._error(path, f"it is a number of {value.bit_length()} bits; return a text")
        self.check_size(1 + value.bit_length() // 4)
        return value

    def _error(self, path: tuple[Any, Any] | None, why: str) -> NotJson:
        parts: list[str] = []
        while path is not None:
            path, key = path
            parts.append(f".{key}" if type(key) is _Field else f"[{key!r:.80}]")
        where = "result" + "".join(reversed(parts))
        return NotJson(
            f"the handler ran, but {where} cannot be told outside: {why}",
            cause=where,
            outcome=Outcome.DONE,
        )


class _Field(str):
    """The name of a dataclass's field in a path."""


# ---------------------------------------------------------------- on a busy loop


async def reply(value: object) -> str:
    """As `reply_json`, without holding the loop for long."""
    try:
        return reply_json(value, JSON_ON_LOOP_VALUES_MAX)
    except _ManyValues:
        # The value is a private copy, so a thread may read it.
        return await asyncio.to_thread(reply_json, value)


async def arguments(args_json: str, kwargs_json: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As `parse_arguments`, without holding the loop for long."""
    if len(args_json) + len(kwargs_json) <= JSON_ON_LOOP_CHARS_MAX:
        return parse_arguments(args_json, kwargs_json)
    return await asyncio.to_thread(parse_arguments, args_json, kwargs_json)
