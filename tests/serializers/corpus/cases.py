"""The registry of cases, and how the source of one is taken apart."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import textwrap
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
        name: Of its function; unique.
        subject: Of the module that it is in.
        source: The body of its function, dedented.
        needs: Packages without which it is skipped.
        refused: If not empty: it must be refused, and the error's path ends in this.
        reason: What the refusal's message has to mention.
        remedy: What the refusal's advice has to mention.
        python: Oldest (major, minor) that it works on.
        harmless: Whether `check` may run on the original too, before the copy is checked: not if
            it changes something that both share, such as a file.
    """

    name: str
    subject: str
    source: str
    needs: tuple[str, ...] = ()
    refused: str = ""
    reason: str = ""
    remedy: str = ""
    python: tuple[int, int] = (3, 11)
    harmless: bool = True

    def parts(self) -> tuple[str, str]:
        """Source of what builds the object, and of what checks it; both with the imports."""
        tree = ast.parse(self.source)
        lines = self.source.splitlines(keepends=True)
        builder: list[str] = []
        checker: list[str] = []
        for node in tree.body:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            text = "".join(lines[first - 1 : node.end_lineno])
            if isinstance(node, ast.Import | ast.ImportFrom):
                builder.append(text)
                checker.append(text)
            elif isinstance(node, ast.FunctionDef) and node.name == "check":
                checker.append(text)
            else:
                builder.append(text)
        return "".join(builder), "".join(checker)


_registry: dict[str, Case] = {}


def case(
    function: Callable[[], Any] | None = None,
    *,
    needs: str = "",
    refused: str = "",
    reason: str = "",
    remedy: str = "",
    python: tuple[int, int] = (3, 11),
    harmless: bool = True,
) -> Any:
    """Register a function's body as a case; see `Case`. `needs` is separated by spaces."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        name = function.__name__
        if name in _registry:
            raise ValueError(f"there are two cases named {name}")
        whole = textwrap.dedent(inspect.getsource(function))
        definition = ast.parse(whole).body[0]
        assert isinstance(definition, ast.FunctionDef)
        lines = whole.splitlines(keepends=True)[definition.body[0].lineno - 1 :]
        first = definition.body[0]
        if getattr(first, "decorator_list", None):
            at = first.decorator_list[0].lineno  # type: ignore[attr-defined]
            lines = whole.splitlines(keepends=True)[at - 1 :]
        _registry[name] = Case(
            name=name,
            subject=function.__module__.rpartition(".")[2],
            source=textwrap.dedent("".join(lines)),
            needs=tuple(needs.split()),
            refused=refused,
            reason=reason,
            remedy=remedy,
            python=python,
            harmless=harmless,
        )
        return function

    return add if function is None else add(function)


def all_cases() -> dict[str, Case]:
    """Every case, by name, in the order of writing."""
    here = pathlib.Path(__file__).parent
    for found in pkgutil.iter_modules([str(here / "programs")]):
        importlib.import_module(f"{__package__}.programs.{found.name}")
    return dict(_registry)
