"""Imports point one way, as the style guide draws them."""

from __future__ import annotations

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("migrate", "rpc", "serializers")

# The core decides; clocks, chance and I/O reach it as events.
NOT_IN_CORE = {
    "asyncio",
    "concurrent",
    "datetime",
    "grpc",
    "logging",
    "multiprocessing",
    "os",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "uuid",
}

# Plain values with slots, made faster than dataclasses are; it does no I/O.
ALLOWED_IN_CORE = {"msgspec"}

# Each layer may import what stands here, and itself.
LEAVES = {"migrate.errors", "migrate.options"}
USER_SURFACE = {"migrate.server", "migrate.ref", "migrate.reports", "migrate.verbs"}
LAYERS: dict[str, set[str]] = {
    "rpc": set(),
    "serializers": set(),
    "leaves": {"leaves"},
    "core": {"leaves"},
    "surface": {"core", "leaves"},
    "shell": {"surface", "core", "leaves", "rpc", "serializers"},
    "node": {"shell", "surface", "core", "leaves", "rpc", "serializers"},
    "top": {"node", "shell", "surface", "core", "leaves", "rpc", "serializers"},
}


def layer(module: str) -> str:
    if module.split(".")[0] in ("rpc", "serializers"):
        return module.split(".")[0]
    if module in LEAVES:
        return "leaves"
    if module in USER_SURFACE:
        return "surface"
    if module in ("migrate.node", "migrate.client", "migrate.peer"):
        return "node"
    part = module.split(".")[1] if "." in module else ""
    # What is left is `tools`, `cluster`, `__main__` and the package itself.
    return part if part in ("core", "shell") else "top"


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def is_type_checking(node: ast.If) -> bool:
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports(module: str, source: str, is_package: bool) -> set[str]:
    """Return the absolute names that a module imports, except for type checkers alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and is_type_checking(node):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                drop = node.level - 1 if is_package else node.level
                base = ".".join([*parts[: len(parts) - drop], *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES else base)
        waiting.extend(ast.iter_child_nodes(node))
    return found


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return imports(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")


def offences(module: str, names: set[str]) -> list[str]:
    here = layer(module)
    ours = sorted(name for name in names if name.split(".")[0] in PACKAGES)
    found = [
        f"{module} ({here}) imports {name} ({layer(name)})"
        for name in ours
        if layer(name) != here and layer(name) not in LAYERS[here]
    ]
    if here == "core":
        foreign = sorted(name for name in names if name.split(".")[0] in NOT_IN_CORE)
        found += [f"{module} imports {name}, which decides nothing" for name in foreign]
        found += [
            f"{module} imports {name}, which is neither ours nor the standard library's"
            for name in sorted(names)
            if name.split(".")[0] not in sys.stdlib_module_names | {*PACKAGES, *ALLOWED_IN_CORE}
        ]
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str):
    # The package's front door hands out names of every layer; that is its work.
    if module == "migrate":
        assert all(name.split(".")[0] not in ("rpc", "grpc") for name in imports_of(module))
        return
    assert offences(module, imports_of(module)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("migrate.core.move", "import asyncio"),
        ("migrate.core.move", "def later():\n    from time import monotonic"),
        ("migrate.core.move", "from migrate.shell import host"),
        ("migrate.core.move", "from ..shell import host"),
        ("migrate.core.move", "import numpy"),
        ("rpc.frames", "from migrate.errors import PeerError"),
        ("serializers.auto", "import rpc.frames"),
        ("migrate.shell.host", "from migrate.node import Node"),
        ("migrate.errors", "from migrate.ref import Ref"),
        ("migrate.server", "import migrate.shell.host"),
        ("migrate.node", "from migrate.cluster import LocalCluster"),
    ],
)
def test_an_import_that_points_back_is_found(module: str, source: str):
    assert offences(module, imports(module, source, is_package=False)) != []


def test_an_import_for_type_checkers_alone_is_allowed():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from migrate.ref import Ref"

    assert offences("migrate.options", imports("migrate.options", source, False)) == []


def test_declaring_servers_does_not_load_grpc():
    # A module with server classes is imported by tools and tests that never connect.
    import subprocess

    code = "import migrate, sys; print('grpc' in sys.modules, 'asyncio' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.stdout.split() == ["False", "False"], done.stderr
