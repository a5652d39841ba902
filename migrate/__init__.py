"""livemigrate: stateful server objects that move live between node processes.

Everything a user needs is here; what lies deeper may change. A class becomes a
server with `@server`; a `Node` hosts its objects; a `Ref` calls them wherever
they run, before, during and after `migrate` moves them.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0"
__livemigrate__ = True
"""Tells this package from another one of the same name on the path."""


def _refuse_shadows() -> None:
    """Refuse to work with another project's package in the place of one of ours.

    The import packages have short names, which other distributions use too. Two
    things can go wrong: such a package comes first on the path, or it was installed
    over ours. Either would fail much later and without a word of the reason.

    Raises:
        ImportError: Names the file that is in the way, and what to do.
    """
    home = os.path.dirname(os.path.abspath(__file__))
    if __name__ != "migrate":
        raise ImportError(
            f"livemigrate was imported as {__name__!r}, which would load it twice: put "
            f"{os.path.dirname(home)} on the path and `import migrate`"
        )
    # Ours is loaded, but a process that it starts looks along the path again.
    found = importlib.machinery.PathFinder.find_spec("migrate", sys.path)
    if found is not None and not _is_in(found, home):
        raise ImportError(_shadowed("migrate", found, home))
    for name in ("rpc", "serializers"):
        ours = os.path.join(os.path.dirname(home), name)
        loaded = sys.modules.get(name)
        try:
            spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
        except ValueError as error:
            raise ImportError(
                f"a module {name!r} without a specification is loaded; livemigrate needs its "
                f"own package from {ours}"
            ) from error
        if spec is None:
            raise ImportError(
                f"the package {name!r} of livemigrate was not found at {ours}: the installation "
                "is incomplete; install livemigrate again"
            )
        if not _is_in(spec, ours) or not _is_marked(spec, name):
            raise ImportError(_shadowed(name, spec, ours))


def _is_in(spec: importlib.machinery.ModuleSpec, folder: str) -> bool:
    # Without an origin it is a namespace package: folders without an __init__.py.
    return spec.origin is not None and os.path.realpath(
        os.path.dirname(spec.origin)
    ) == os.path.realpath(folder)


def _is_marked(spec: importlib.machinery.ModuleSpec, name: str) -> bool:
    # Read, not run: code of another project has no business here.
    get_source = getattr(spec.loader, "get_source", None)
    source = None if get_source is None else get_source(name)
    if source is None:
        return True  # Installed without sources; the place is all there is to compare.
    return "__livemigrate__" in source


def _shadowed(name: str, spec: importlib.machinery.ModuleSpec, ours: str) -> str:
    places = spec.origin or ", ".join(spec.submodule_search_locations or ())
    if os.path.dirname(places) == ours:
        return (
            f"{places} is not livemigrate's: another distribution was installed over its package "
            f"{name!r}. Uninstall that one, then install livemigrate again"
        )
    return (
        f"{places} shadows livemigrate's package {name!r}, which is at {ours}: rename or "
        "uninstall it, or put livemigrate's folder before it on the path"
    )


_refuse_shadows()

# After the check, so that nothing foreign is imported first.
from migrate.errors import (  # noqa: E402
    AuthError,
    CallCycle,
    CallError,
    CallTimeout,
    CheckpointError,
    Fenced,
    HandlerFailed,
    InternalError,
    MailboxFull,
    MigrateError,
    MoveError,
    MoveInDoubt,
    MoveRolledBack,
    NameTaken,
    NodeNotFound,
    NotPicklable,
    Outcome,
    PeerError,
    ReplayDiverged,
    ResultForgotten,
    RolledBack,
    ServerLost,
    ServerNotFound,
    StaleJournal,
    StandbyError,
    TargetRefused,
    UsageError,
    WorkerLost,
)
from migrate.options import LEAST_LOADED, NodeOptions, SpawnOptions  # noqa: E402
from migrate.ref import Ref  # noqa: E402
from migrate.reports import (  # noqa: E402
    CheckpointInfo,
    Event,
    LinkInfo,
    MoveProgress,
    MoveReport,
    NodeInfo,
    ServerInfo,
    StandbyInfo,
)
from migrate.server import Current, blocking, call, current, every, server  # noqa: E402

if TYPE_CHECKING:
    from migrate.checks import CheckReport, check
    from migrate.client import connect, connect_sync
    from migrate.cluster import LocalCluster
    from migrate.node import Node

__all__ = [
    "LEAST_LOADED",
    "AuthError",
    "CallCycle",
    "CallError",
    "CallTimeout",
    "CheckReport",
    "CheckpointError",
    "CheckpointInfo",
    "Current",
    "Event",
    "Fenced",
    "HandlerFailed",
    "InternalError",
    "LinkInfo",
    "LocalCluster",
    "MailboxFull",
    "MigrateError",
    "MoveError",
    "MoveInDoubt",
    "MoveProgress",
    "MoveReport",
    "MoveRolledBack",
    "NameTaken",
    "Node",
    "NodeInfo",
    "NodeNotFound",
    "NodeOptions",
    "NotPicklable",
    "Outcome",
    "PeerError",
    "Ref",
    "ReplayDiverged",
    "ResultForgotten",
    "RolledBack",
    "ServerInfo",
    "ServerLost",
    "ServerNotFound",
    "SpawnOptions",
    "StaleJournal",
    "StandbyError",
    "StandbyInfo",
    "TargetRefused",
    "UsageError",
    "WorkerLost",
    "blocking",
    "call",
    "check",
    "connect",
    "connect_sync",
    "current",
    "every",
    "server",
]

# Loaded at first use: they pull in gRPC or the serializers, which takes longer
# than everything else together, and a module that only declares servers does not need it.
_LAZY: Final = {
    "CheckReport": "migrate.checks",
    "LocalCluster": "migrate.cluster",
    "Node": "migrate.node",
    "check": "migrate.checks",
    "connect": "migrate.client",
    "connect_sync": "migrate.client",
}


def __getattr__(name: str) -> Any:
    home = _LAZY.get(name)
    if home is None:
        raise AttributeError(f"module 'migrate' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
