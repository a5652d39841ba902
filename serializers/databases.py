"""Reducers for sqlite3: databases in memory with their content, files by their path.

A connection inside a transaction is refused, because what is not committed lies in no file; so are
functions of the user's in it, which SQLite does not give back.
"""

from __future__ import annotations

import gc
import os
import re
import sqlite3
from typing import Any

from .base import lossy
from .errors import LoadFailed
from .layout import find_field, read_field
from .resources import REDUCERS, REOPEN, Reduced, refuse, refuses, type_name


def _find_detect_types() -> Any:
    samples = [(sqlite3.connect(":memory:", detect_types=types), types) for types in range(4)]
    try:
        return find_field(samples, 4)
    finally:
        # From Python 3.13 on a connection that is left to the collector is warned of.
        for connection, _ in samples:
            connection.close()


_DETECT_TYPES = _find_detect_types()
"""Where a connection keeps `detect_types`, which it does not tell."""

_PRAGMAS = (
    "busy_timeout",
    "foreign_keys",
    "recursive_triggers",
    "case_sensitive_like",
    "defer_foreign_keys",
    "ignore_check_constraints",
    "query_only",
    "secure_delete",
    "synchronous",
    "temp_store",
    "cache_size",
    "trusted_schema",
    "writable_schema",
)
"""Settings of a connection rather than of its file. Source: SQLite's list of pragmas."""


def _reduce_connection(connection: sqlite3.Connection) -> Reduced:
    _refuse_hooks(connection)
    try:
        databases = _plain_cursor(connection).execute("PRAGMA database_list").fetchall()
    except sqlite3.ProgrammingError as exc:
        if "closed" in str(exc):
            return _make_closed_connection, (type(connection),)
        refuse(
            connection, f"it cannot be read here ({exc})", "open it with check_same_thread=False"
        )
    if connection.in_transaction:
        refuse(
            connection,
            "a transaction is open in it, and what is not committed lies in no file",
            "commit or roll back before the state is captured",
        )
    _refuse_functions(connection)
    contents: list[tuple[str, str, bytes | None]] = []
    for row in databases:
        name, path = _text(row[1]), _text(row[2] or "")
        if name == "temp":
            if _count(connection, "temp.sqlite_master"):
                refuse(connection, "it has temporary tables", "keep them in a real table")
        elif os.path.isabs(path):
            # NB: one in memory that was deserialized is called "x".
            lossy(f"{path!r} is opened again: the same file must be there at the other end")
            contents.append((name, path, None))
        else:
            contents.append((name, "", _content_of(connection, name)))
    settings = {
        name: getattr(connection, name)
        for name in ("isolation_level", "row_factory", "text_factory", "autocommit")
        if hasattr(connection, name)
    }
    detect_types = 0 if _DETECT_TYPES is None else read_field(connection, _DETECT_TYPES, 4)
    pragmas = _pragmas_of(connection)
    attributes = getattr(connection, "__dict__", None)
    state = (settings, attributes)
    args = (type(connection), contents, detect_types, pragmas)
    return _make_connection, args, state, None, None, _fill_connection


def _plain_cursor(connection: sqlite3.Connection) -> sqlite3.Cursor:
    cursor = connection.cursor()
    cursor.row_factory = None
    return cursor


def _content_of(connection: sqlite3.Connection, name: str) -> bytes:
    if not _plain_cursor(connection).execute(f'PRAGMA "{name}".page_count').fetchone()[0]:
        return b""
    try:
        return connection.serialize(name=name)
    except sqlite3.OperationalError as exc:
        refuse(
            connection,
            f"rows of a query on it are left to be fetched ({exc})",
            "fetch them all before the state is captured",
        )


def _count(connection: sqlite3.Connection, table: str) -> int:
    found = _plain_cursor(connection).execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(found[0])


def _pragmas_of(connection: sqlite3.Connection) -> dict[str, Any]:
    cursor = _plain_cursor(connection)
    found = {}
    for name in _PRAGMAS:
        row = cursor.execute(f"PRAGMA {name}").fetchone()
        if row is not None:
            found[name] = row[0]
    return found


_FUNCTIONS = "SELECT DISTINCT name FROM pragma_function_list WHERE NOT builtin"
_COLLATIONS = "SELECT name FROM pragma_collation_list"


def _refuse_functions(connection: sqlite3.Connection) -> None:
    fresh = sqlite3.connect(":memory:")
    try:
        for what, query in (("function", _FUNCTIONS), ("collation", _COLLATIONS)):
            cursor = _plain_cursor(connection)
            known = {row[0] for row in fresh.execute(query)}
            own = sorted({_text(row[0]) for row in cursor.execute(query)} - known)
            if own:
                refuse(
                    connection,
                    f"the {what} {own[0]!r} was made for it, and SQLite does not give it back",
                    REOPEN,
                )
    finally:
        fresh.close()


def _refuse_hooks(connection: sqlite3.Connection) -> None:
    hooks = [
        held
        for held in gc.get_referents(connection)
        if callable(held) and held not in (connection.row_factory, connection.text_factory)
    ]
    hooks = [hook for hook in hooks if type_name(type(hook)) not in _OWN]
    if hooks:
        refuse(connection, f"it calls {hooks[0]!r}, and does not say on what occasion", REOPEN)


_OWN = ("type", "functools._lru_cache_wrapper")
"""Types of what every connection calls: itself, and its cache of statements."""


def _text(value: Any) -> str:
    # A text factory may have made something else of it.
    return value.decode() if isinstance(value, bytes) else str(value)


def _make_connection(
    kind: Any, contents: list[tuple[str, str, bytes | None]], detect_types: int, pragmas: Any
) -> Any:
    main = contents[0]
    try:
        # Handlers may run in another thread than the one that loads.
        connection = kind.__new__(kind)
        sqlite3.Connection.__init__(
            connection,
            f"{_as_uri(main[1])}?mode=rw" if main[1] else ":memory:",
            detect_types=detect_types,
            check_same_thread=False,
            uri=bool(main[1]),
        )
        for name, path, content in contents:
            if name != "main":
                connection.execute(f'ATTACH ? AS "{name}"', (path or ":memory:",))
            if content:
                connection.deserialize(content, name=name)
        for name, value in pragmas.items():
            connection.execute(f"PRAGMA {name}={value}")
    except sqlite3.Error as exc:
        raise LoadFailed(
            f"cannot open database {main[1] or 'in memory'!r} again: {exc}",
            "make the same file available here under the same path",
        ) from exc
    return connection


def _as_uri(path: str) -> str:
    return "file:" + re.sub(r"[?#%]", lambda match: f"%{ord(match[0]):02x}", path)


def _fill_connection(connection: Any, state: tuple[dict[str, Any], dict[str, Any] | None]) -> None:
    settings, attributes = state
    for name, value in settings.items():
        setattr(connection, name, value)
    if attributes:
        connection.__dict__.update(attributes)


def _make_closed_connection(kind: Any) -> Any:
    connection = kind.__new__(kind)
    sqlite3.Connection.__init__(connection, ":memory:")
    connection.close()
    return connection


def _reduce_cursor(cursor: sqlite3.Cursor) -> Reduced:
    if any(type_name(type(held)) == "sqlite3.Statement" for held in gc.get_referents(cursor)):
        refuse(
            cursor,
            "rows of its query are left to be fetched",
            "fetch them all, or keep the query and the number of rows that were read",
        )
    connection = cursor.connection
    if cursor.lastrowid is not None or cursor.rowcount != -1:
        lossy("its lastrowid and rowcount are those of a cursor that ran nothing")
    settings = {"row_factory": cursor.row_factory, "arraysize": cursor.arraysize}
    return _make_cursor, (type(cursor), connection), settings, None, None, _fill_cursor


def _make_cursor(kind: Any, connection: Any) -> Any:
    cursor = kind.__new__(kind)
    sqlite3.Cursor.__init__(cursor, connection)
    return cursor


def _fill_cursor(cursor: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(cursor, name, value)


def _reduce_row(row: sqlite3.Row) -> Reduced:
    return _make_row, (type(row), row.keys(), tuple(row))


def _make_row(kind: Any, names: list[str], values: tuple[Any, ...]) -> Any:
    connection = sqlite3.connect(":memory:")
    try:
        columns = ", ".join('NULL AS "' + name.replace('"', '""') + '"' for name in names)
        return kind(connection.execute(f"SELECT {columns}"), values)
    finally:
        connection.close()


REDUCERS.update(
    {
        sqlite3.Connection: _reduce_connection,
        sqlite3.Cursor: _reduce_cursor,
        sqlite3.Row: _reduce_row,
        sqlite3.Blob: refuses("it is open in the middle of a row", REOPEN),
    }
)
