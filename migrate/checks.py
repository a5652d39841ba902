"""Whether a server can travel, said ahead of time."""

from __future__ import annotations

import dataclasses
from typing import Any

import serializers
from migrate.server import options_of
from serializers import CheckReport, Finding

__all__ = ["CheckReport", "check"]


def check(obj_or_class: Any) -> CheckReport:
    """Tell whether a server's object, or objects of a class, can be moved, and what is lost.

    An object is gone through as a move would do it, but nothing is changed, written or unpickled:
    each thing that cannot travel is named with its path from the server down, its type, the reason
    and the remedy, and so is what arrives otherwise than it was (a locked lock, values of other
    threads, handlers of loggers, emptied caches, files that are opened again by their path). Of a
    class, its options and what its annotations declare are looked at, and what its methods need if
    its code has to travel with it.

    Call it where nothing changes the object meanwhile, as in a handler on `self`.

    Args:
        obj_or_class: The object, or the class.

    Returns:
        A report; `report.ok` is False if anything was found that cannot travel.
    """
    report = serializers.check(obj_or_class)
    cls = obj_or_class if isinstance(obj_or_class, type) else type(obj_or_class)
    options = options_of(cls)
    problems, lossy = list(report.problems), list(report.lossy)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if not options.movable:
        problems.insert(
            0,
            Finding(
                report.subject,
                name,
                "it is declared @migrate.server(movable=False), so it stays where it was spawned",
                "declare it movable",
            ),
        )
    if options.version > 1 and not callable(getattr(cls, "upgrade", None)):
        lossy.append(
            Finding(
                report.subject,
                name,
                f"it has version {options.version} and no `upgrade`, so the state of an older one "
                "is taken as it is",
                "define upgrade(self, state, from_version)",
            )
        )
    return dataclasses.replace(report, problems=tuple(problems), lossy=tuple(lossy))
