"""Errors of the serializers: what failed, where, why, and what to do about it.

All of them survive pickling, because they travel from the node that failed to the one that asked.
"""

from __future__ import annotations


class SerializerError(Exception):
    """Root of everything that `serializers` raises on purpose."""


class NotSerializable(SerializerError):
    """An object, or something that it refers to, cannot honestly travel.

    The object itself is as it was before the attempt, and usable.

    Attributes:
        path: Where the obstacle is, from the root down: `Counter.cache['db'].conn`. Empty only
            while a reducer is refusing; `encode` and `dumps` fill it in.
        type_name: Qualified name of the obstacle's type.
        reason: Why it cannot travel.
        remedy: What the author of the class can do.
    """

    def __init__(self, path: str, type_name: str, reason: str, remedy: str) -> None:
        super().__init__(path, type_name, reason, remedy)
        self.path = path
        self.type_name = type_name
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{where}{self.type_name}: {self.reason}{remedy}"


class LoadFailed(SerializerError):
    """Bytes could not be turned back into objects; no object was returned.

    Attributes:
        reason: What is wrong.
        remedy: What to do; may be empty.
        module: The module that is missing or lacks `name`; empty if that is not the cause.
        name: The class or function that is missing; empty if unknown or not the cause.
    """

    def __init__(self, reason: str, remedy: str = "", module: str = "", name: str = "") -> None:
        super().__init__(reason, remedy, module, name)
        self.reason = reason
        self.remedy = remedy
        self.module = module
        self.name = name

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason
