"""Errors of the serializers: what failed, where, why, and what to do about it.

All of them survive pickling, because they travel from the node that failed to the one that asked.
"""

from __future__ import annotations

from dataclasses import dataclass


class SerializerError(Exception):
    """Root of everything that `serializers` raises on purpose."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a state that cannot travel, or not as it is.

    Attributes:
        path: Where it is, from the root down: `Counter.cache['db'].conn`.
        type_name: Qualified name of its type.
        reason: Why it cannot travel, or what is lost.
        remedy: What the author of the class can do; may be empty.
    """

    path: str
    type_name: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{where}{self.type_name}: {self.reason}{remedy}"


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Whether an object or a class can travel, and what is lost on the way.

    Attributes:
        subject: What was looked at: the first step of all paths.
        problems: What cannot travel, in the pickler's order; up to some hundred.
        lossy: What travels, but arrives otherwise than it was; up to some hundred.
        by_value: Classes and functions whose code goes along, so that it needs the same Python
            minor version at the other end.
        objects: How many objects were looked at.
        complete: Whether that is all of them.
    """

    subject: str
    problems: tuple[Finding, ...]
    lossy: tuple[Finding, ...]
    by_value: tuple[str, ...]
    objects: int
    complete: bool

    @property
    def ok(self) -> bool:
        """Whether nothing was found that cannot travel."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.subject}: {'can' if self.ok else 'CANNOT'} travel"]
        lines += [f"  cannot travel  {problem}" for problem in self.problems]
        lines += [f"  loses          {finding}" for finding in self.lossy]
        lines += [f"  goes by value  {name}" for name in self.by_value]
        rest = "" if self.complete else "; the rest was not looked at"
        lines.append(f"  {self.objects} objects looked at{rest}")
        return "\n".join(lines)


_PATHS_SHOWN_MAX = 3


class NotSerializable(SerializerError):
    """An object, or something that it refers to, cannot honestly travel.

    The object itself is as it was before the attempt, and usable.

    Attributes:
        path: Where the first obstacle is, from the root down: `Counter.cache['db'].conn`. Empty
            only while a reducer is refusing; `encode` and `dumps` fill it in.
        type_name: Qualified name of the obstacle's type.
        reason: Why it cannot travel.
        remedy: What the author of the class can do.
        others: The other obstacles, in the order in which they were met, up to some hundred.
    """

    def __init__(
        self,
        path: str,
        type_name: str,
        reason: str,
        remedy: str,
        others: tuple[Finding, ...] = (),
    ) -> None:
        super().__init__(path, type_name, reason, remedy, others)
        self.path = path
        self.type_name = type_name
        self.reason = reason
        self.remedy = remedy
        self.others = others

    @property
    def problems(self) -> tuple[Finding, ...]:
        """All obstacles, the first one included."""
        return Finding(self.path, self.type_name, self.reason, self.remedy), *self.others

    def __str__(self) -> str:
        first = str(self.problems[0])
        if not self.others:
            return first
        shown = ", ".join(other.path for other in self.others[:_PATHS_SHOWN_MAX])
        more = ", ..." if len(self.others) > _PATHS_SHOWN_MAX else ""
        return f"{first} (and {len(self.others)} more: {shown}{more})"


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


class TrackingUnavailable(SerializerError):
    """Which bytes of buffers are written cannot be found out here in the way asked for.

    Attributes:
        engine: What was asked for.
        reason: What the system lacks or refuses.
    """

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(engine, reason)
        self.engine = engine
        self.reason = reason

    def __str__(self) -> str:
        return f"the {self.engine} engine is not available: {self.reason}"
