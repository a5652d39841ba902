"""Classes of many kinds, importable, for records and servers of state streams."""

from __future__ import annotations

import dataclasses
import datetime
import enum
from typing import Any, NamedTuple


class Plain:
    """Nothing but attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def method(self) -> Any:
        return self


class Other(Plain):
    """As `Plain`, for assigning `__class__`."""


class Server(Plain):
    """A root."""


class ServerWithState(Plain):
    """A root that says what it is."""

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("secret", None)
        return state


class PrunedServer(Plain):
    """A root that changes its containers when it is pickled, always in the same way."""

    def __getstate__(self) -> dict[str, Any]:
        for value in list(self.__dict__.values()):
            if type(value) is dict:
                value["last saved"] = [1]
            elif type(value) is list and value:
                value[0] = "first"
        return dict(self.__dict__)


@dataclasses.dataclass
class Data:
    a: Any = None
    b: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any = None
    b: Any = None


@dataclasses.dataclass(slots=True)
class Slotted:
    a: Any = None
    b: Any = None


@dataclasses.dataclass(slots=True)
class Numbered:
    number: int
    tags: list[int]


@dataclasses.dataclass(slots=True)
class Tagged(Numbered):
    name: str = ""


class TaggedMore(Numbered):
    """Has a dict beside its slots."""


class Shadowed(Slotted):
    """Pickle reads the property in place of the slot."""

    __slots__ = ()
    read = 0

    @property
    def a(self) -> Any:
        Shadowed.read += 1
        return Shadowed.read

    @a.setter
    def a(self, value: Any) -> None:
        pass


class Hidden:
    """A slot whose name Python changes."""

    __slots__ = ("__a",)

    def __init__(self, a: Any) -> None:
        self.__a = a


class Proxy(Plain):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return None


class Reduced(Plain):
    def __reduce__(self) -> Any:
        return Plain, (), {**self.__dict__, "reduced": True}


class Stateful(Plain):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "captured": True}


class Finalized(Plain):
    def __del__(self) -> None:
        pass


class Made(Plain):
    made = 0

    def __new__(cls, **attributes: Any) -> Made:
        Made.made += 1
        return super().__new__(cls)


class Meta(type):
    pass


class OfMeta(Plain, metaclass=Meta):
    pass


class Sulky(Plain):
    """Cannot be pickled while it sulks."""

    def __reduce__(self) -> Any:
        if self.__dict__.get("sulks"):
            raise RuntimeError("not now")
        return Sulky, (), self.__dict__


class Meddling(Plain):
    """Changes something else while it is pickled, if it is told to."""

    def __getstate__(self) -> dict[str, Any]:
        victim = self.__dict__.get("victim")
        if type(victim) is dict and victim:
            victim[next(iter(victim))] = "meddled"
            victim.pop("to go", None)
        elif type(victim) is list and victim:
            victim[-1] = "meddled"
        return self.__dict__


class Pair(NamedTuple):
    a: Any
    b: Any


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Text(str):
    pass


class Number(int):
    pass


class Table(dict[Any, Any]):
    pass


class Row(list[Any]):
    pass


class OddZone(datetime.tzinfo):
    """A zone that can change."""

    def __init__(self, minutes: int = 0) -> None:
        self.minutes = minutes

    def utcoffset(self, when: datetime.datetime | None) -> datetime.timedelta:
        return datetime.timedelta(minutes=self.minutes)

    def dst(self, when: datetime.datetime | None) -> datetime.timedelta:
        return datetime.timedelta(0)

    def tzname(self, when: datetime.datetime | None) -> str:
        return "odd"

    def __reduce__(self) -> Any:
        return OddZone, (self.minutes,)
