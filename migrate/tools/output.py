"""What the verbs print: tables for people, JSON for programs, and what went wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import IO, Any, Final

import click

from migrate.errors import MigrateError, Outcome
from migrate.tools.errors import ClusterNotFound

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNKNOWN: Final = 3
UNREACHABLE: Final = 4
RAISED: Final = 5
INTERRUPTED: Final = 130

EXIT_CODES: Final = """\
Exit status:

\b
  0    done
  1    failed; nothing was done, or what was done was undone
  2    the command line is wrong
  3    the outcome is unknown: look before you repeat it
  4    no cluster could be found or reached
  5    the request was carried out, and ended in an error (a handler raised)
  130  interrupted"""

_ADVICE: Final = {
    Outcome.NOT_DONE: "not done; once its cause is gone it can be repeated",
    Outcome.DONE: "it was carried out; do not repeat it as if it were not",
    Outcome.UNKNOWN: "outcome unknown: it may have happened, or may still happen; look before "
    "you repeat it",
}


def json_value(value: Any) -> Any:
    """A value as JSON can hold it; what it cannot hold becomes its `repr`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: json_value(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k if isinstance(k, str) else repr(k): json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((json_value(item) for item in value), key=repr)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        # JSON has no words for these.
        return value if value - value == 0 else repr(value)
    return repr(value)


def emit_json(value: Any) -> None:
    """Print one JSON object on one line to stdout."""
    click.echo(json.dumps(json_value(value), ensure_ascii=False))


def fail(error: BaseException, as_json: bool, code: int | None = None) -> int:
    """Say on stderr what went wrong, what became of the request, and what to do.

    Args:
        error: A `MigrateError`, or what a handler raised.
        as_json: Also print `{"error": ...}` to stdout.
        code: The exit status, if it is not the one that follows from the error.

    Returns:
        The exit status.
    """
    told: dict[str, Any]
    if isinstance(error, MigrateError):
        text = error.message
        advice = f"({type(error).__name__}: {_ADVICE[error.outcome]})"
        told = {"message": error.message, "outcome": error.outcome.value}
        known = ("server", "node", "cause", "path", "url", "flaw")
        told |= {k: getattr(error, k) for k in known if getattr(error, k, None)}
        if code is None:
            code = {Outcome.NOT_DONE: FAILED, Outcome.DONE: RAISED, Outcome.UNKNOWN: UNKNOWN}[
                error.outcome
            ]
            code = UNREACHABLE if isinstance(error, ClusterNotFound) else code
    else:
        text = f"it raised {type(error).__name__}: {error}"
        outcome = Outcome.NOT_DONE if code == FAILED else Outcome.DONE
        advice = f"({_ADVICE[outcome]})"
        told = {"message": str(error), "outcome": outcome.value}
        code = RAISED if code is None else code
    click.echo(f"migrate: {text}\n  {advice}", err=True)
    trace = getattr(error, "remote_traceback", "")
    if trace and not isinstance(error, MigrateError):
        click.echo(f"Remote traceback:\n{trace.rstrip()}", err=True)
    if as_json:
        emit_json({"error": {"type": type(error).__name__, **told, "exit_status": code}})
    return code


def is_watched(stream: IO[str] | None = None) -> bool:
    """Whether a person looks at a stream (stdout by default)."""
    stream = sys.stdout if stream is None else stream
    return stream.isatty()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under their columns: with rules and colours to a terminal, else aligned."""
    cells = [[_cell(value) for value in row] for row in rows]
    if is_watched():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=None, header_style="bold", pad_edge=False)
        for position, column in enumerate(columns):
            numbers = bool(rows) and all(isinstance(row[position], int | float) for row in rows)
            drawn.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in cells:
            drawn.add_row(*(Text(cell) for cell in row))
        Console().print(drawn)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}"
    return str(value)


def facts(pairs: Sequence[tuple[str, Any]]) -> None:
    """Print names and values, one pair on a line."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        click.echo(f"{name.ljust(width)}  {_cell(value)}")
