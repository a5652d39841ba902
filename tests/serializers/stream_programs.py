"""Random programs for the state stream: an object, changes of all kinds, rounds between them.

One program builds a server's object out of large containers, buffers and all sorts of other things,
opens a stream of it, and interleaves steps of rounds with changes. At the end, what the reader has
must be what `loads(dumps(obj))` is: by the package's own digest, and by `described`, which knows
nothing of the package and looks below all hooks that a class may define.
"""

from __future__ import annotations

import array
import collections
import contextlib
import datetime
import decimal
import fractions
import gc
import math
import pathlib
import random
import struct
import sys
import types
import uuid
import weakref
import zoneinfo
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import serializers
from rpc import shared_memory
from serializers import dirty, fingerprints, parts, stream
from serializers.stream import StreamReader, StreamWriter
from tests.serializers import stream_classes as classes

LIMIT_BYTES = 1 << 28


class Lie(AssertionError):
    """The reader's object is not the writer's."""


# -- what an object is


def described(root: Any) -> list[Any]:
    """All that can be told of an object, by numbers for what can be one and the same."""
    numbers: dict[int, int] = {}
    kept: list[Any] = []
    told: list[Any] = []
    pending: list[Any] = [root]
    while pending:
        obj = pending.pop()
        kind = type(obj)
        if kind is float:
            told.append(("float", struct.pack("<d", obj)))
            continue
        if kind in (int, str, bool, bytes, complex, type(None), range, slice):
            told.append((kind.__name__, repr(obj) if kind is complex else obj))
            continue
        if isinstance(obj, type | types.FunctionType | types.ModuleType):
            told.append(("named", getattr(obj, "__qualname__", repr(obj))))
            continue
        if kind in _VALUES or isinstance(obj, classes.enum.Enum):
            zone = getattr(obj, "tzinfo", None)
            shown = obj if zone is None else obj.replace(tzinfo=None)
            told.append((kind.__qualname__, repr(shown)))
            if zone is not None:
                pending.append(zone)
            continue
        if kind is tuple:
            told.append(("tuple", len(obj)))
            pending += reversed(obj)
            continue
        if kind is frozenset:
            told.append(("frozenset", sorted(map(repr, obj))))
            continue
        if id(obj) in numbers:
            told.append(("again", numbers[id(obj)]))
            continue
        numbers[id(obj)] = len(numbers)
        kept.append(obj)
        told.append(kind.__qualname__)
        if isinstance(obj, np.ndarray):
            owner = obj
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            told.append((obj.dtype.str, obj.shape, obj.strides if obj.size else ()))
            told.append((bool(obj.flags.writeable), bool(obj.flags.f_contiguous)))
            if obj.dtype.hasobject:
                pending += reversed(obj.ravel().tolist())
            else:
                told.append(obj.tobytes())
                if owner is not obj:
                    pending.append(owner)
        elif kind is bytearray:
            told.append(bytes(obj))
        elif kind is array.array:
            told.append((obj.typecode, obj.tobytes()))
        elif kind is memoryview:
            told.append((obj.format, obj.shape, obj.readonly, obj.tobytes()))
        elif isinstance(obj, set):
            told.append(sorted(map(repr, obj)))
        elif isinstance(obj, types.MethodType):
            told.append(obj.__func__.__qualname__)
            pending.append(obj.__self__)
        elif kind is weakref.ref:
            pending.append(obj())
        else:
            _tell_of_instance(obj, told, pending)
    return told


_VALUES = {
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    zoneinfo.ZoneInfo,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    pathlib.PurePosixPath,
    pathlib.PosixPath,
}


def _tell_of_instance(obj: Any, told: list[Any], pending: list[Any]) -> None:
    later: list[Any] = []
    if isinstance(obj, dict):
        ordered = isinstance(obj, collections.OrderedDict)
        items = list(collections.OrderedDict.items(obj) if ordered else dict.items(obj))
        told.append(("items", len(items)))
        for key, value in items:
            later += (key, value)
        if isinstance(obj, collections.defaultdict):
            later.append(obj.default_factory)
    elif isinstance(obj, list | tuple):
        told.append(("items", len(obj)))
        later += obj
    elif isinstance(obj, collections.deque):
        told.append(("items", len(obj), obj.maxlen))
        later += obj
    elif isinstance(obj, str | int):
        told.append(str.__str__(obj) if isinstance(obj, str) else int(obj))
    attributes = getattr(type(obj), "__dictoffset__", 0) and object.__getattribute__(
        obj, "__dict__"
    )
    if attributes:
        told.append(("attributes", type(attributes).__qualname__, len(attributes)))
        for key, value in dict.items(attributes):
            later += (key, value)
    for base in type(obj).__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            with contextlib.suppress(AttributeError):
                later += (name, object.__getattribute__(obj, name))
    pending += reversed(later)


# -- programs


class Program:
    """One random program; its seed tells all of it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.serial = 0
        self.zone = zoneinfo.ZoneInfo.no_cache("UTC")
        self.odd_zone = classes.OddZone(5)
        longest = self.random.choice((40, 900, 900, 900, 900, 2000))
        self.strings = ["s" * self.random.choice((3, 40, longest)) + str(n) for n in range(5)]
        kinds = (classes.Server, classes.Server, classes.ServerWithState, classes.PrunedServer)
        self.root: Any = self.random.choice(kinds)()
        self.exotic = self.random.random() < 0.4
        for n in range(self.random.randint(1, 3)):
            setattr(self.root, f"held{n}", self.container())
        for n in range(self.random.randint(0, 3)):
            setattr(self.root, f"buffer{n}", self.buffer())
        self.root.other = {"n": 1, "names": ["x", "y"]}
        self.log: list[str] = []

    # values

    def number(self) -> int:
        self.serial += 1
        return self.serial

    def atom(self) -> Any:
        pick = self.random.choice
        return pick(
            (
                lambda: self.number(),
                lambda: self.number() / 7,
                lambda: f"text {self.number()}",
                lambda: pick((0, 1, True, False, 1.0, 0.0, -0.0, math.nan, float("nan"), None)),
                lambda: pick((2**70, -(2**1000), "", "a", b"", b"xyz", 1j, "long" * 200)),
                lambda: pick(self.strings),
                lambda: datetime.datetime(2020, 1, 1, fold=self.random.randint(0, 1)),
                lambda: datetime.datetime(
                    2020,
                    1,
                    1,
                    tzinfo=pick((datetime.UTC, zoneinfo.ZoneInfo("UTC"), *self.zones())),
                ),
                lambda: pick((classes.Colour.RED, classes.Colour.BLUE, classes.Flags.A)),
                lambda: decimal.Decimal(self.number()) / 3,
                lambda: uuid.UUID(int=self.number()),
                lambda: pathlib.PurePosixPath("a", str(self.number())),
                lambda: fractions.Fraction(self.number(), 7),
                lambda: (self.number(), "t", (1.5, self.number())),
                lambda: frozenset((1, self.number())),
                lambda: range(self.number()),
            )
        )()

    def zones(self) -> Sequence[datetime.tzinfo]:
        return (self.zone, self.odd_zone) if self.exotic else ()

    def record(self, depth: int = 0) -> Any:
        pick = self.random.choice
        inner: Callable[[], Any] = (
            self.atom if depth > 1 or self.random.random() < 0.8 else lambda: self.record(depth + 1)
        )
        usual: tuple[Callable[[], Any], ...] = (
            lambda: {"id": self.number(), "v": inner(), "w": [inner(), inner()]},
            lambda: [inner(), inner()],
            lambda: (inner(), [inner()]),
            lambda: classes.Plain(a=inner(), b=inner()),
            lambda: classes.Data(inner(), [inner()]),
            lambda: {self.number(), "m"},
            self.atom,
        )
        odd: tuple[Callable[[], Any], ...] = (
            lambda: classes.Frozen(inner(), inner()),
            lambda: classes.Slotted(inner(), inner()),
            lambda: classes.Proxy(a=inner()),
            lambda: classes.Reduced(a=inner()),
            lambda: classes.Stateful(a=inner()),
            lambda: classes.Finalized(a=inner()),
            lambda: classes.OfMeta(a=inner()),
            lambda: classes.Made(a=inner()),
            lambda: classes.Sulky(a=inner()),
            lambda: classes.Pair(inner(), [inner()]),
            lambda: classes.Text("t"),
            lambda: classes.Number(5),
            lambda: classes.Table(a=inner()),
            lambda: classes.Row([inner()]),
            lambda: collections.OrderedDict(b=inner(), a=1),
            lambda: collections.defaultdict(list, a=[inner()]),
            lambda: collections.Counter("aab"),
            lambda: collections.deque([inner()], 3),
            lambda: bytearray(b"r" * 5),
            lambda: np.arange(3),
            lambda: self.root,
            lambda: pick(self.containers()) if self.containers() else None,
            lambda: self.by_value()(a=inner()),
            lambda: pick(self.found()),
        )
        if depth == 0 and hasattr(self, "usual"):
            kind = self.usual if self.random.random() < 0.9 else pick(usual)
        else:
            kind = pick(usual)
        if self.exotic and self.random.random() < 0.02:
            kind = pick(odd)
        return kind()

    def by_value(self) -> type:
        kind = type("Local", (classes.Plain,), {"__module__": "__main__"})
        return kind

    def key(self) -> Any:
        pick = self.random.choice
        return pick(
            (
                lambda: self.number(),
                lambda: f"k{self.number()}",
                lambda: (self.number(), "k"),
                lambda: float("nan"),
                lambda: pick((1, True, 1.0, 0, False, 0.0, -0.0)),
                lambda: frozenset((self.number(),)),
                lambda: float(self.number()),
            )
        )()

    def container(self) -> Any:
        count = self.random.choice((10, 30, 150, 300, 300, 600))
        pick = self.random.choice
        if self.random.random() < 0.85:
            # Records of one kind, as they mostly are.
            shapes: tuple[Callable[[], Any], ...] = (
                lambda: {"id": self.number(), "v": self.atom(), "w": [1, 2]},
                lambda: classes.Plain(a=self.atom(), b=[self.number()]),
                lambda: classes.Data(self.number(), {"x": self.atom()}),
                lambda: [self.number(), (self.number(), [self.atom()])],
                self.atom,
            )
            self.usual = pick(shapes)
        made: Any
        if self.random.random() < 0.6:
            easy = self.random.random() < 0.5
            made = {}
            for _ in range(count):
                made[self.number() if easy else self.key()] = self.record()
        else:
            made = [self.record() for _ in range(count)]
        return made

    def buffer(self) -> Any:
        size = self.random.choice((0, 100, 5_000, 20_000, 70_000, 150_000))
        fill = self.random.randbytes(64)
        data = (fill * (size // 64 + 1))[:size]
        floats = np.frombuffer(bytearray(data[: size // 8 * 8]), dtype="f8")

        def view_of_base() -> Any:
            base = floats.copy()
            return [base, base[len(base) // 3 :], base[: len(base) // 2]]

        def read_only() -> Any:
            made = np.frombuffer(data, dtype="u1").copy()
            made.flags.writeable = False
            return made

        return self.random.choice(
            (
                lambda: bytearray(data),
                lambda: data,
                lambda: floats.copy(),
                lambda: np.asfortranarray(floats.copy()[: len(floats) // 10 * 10].reshape(10, -1)),
                read_only,
                view_of_base,
                lambda: array.array("d", floats.tolist()),
                lambda: np.array([1, "x", None], dtype=object),
                lambda: [bytearray(data), bytearray(data)],
            )
        )()

    # what is there

    def containers(self) -> list[Any]:
        values = list(vars(self.root).values())
        return [value for value in values if type(value) in (dict, list) and len(value) >= 5]

    def found(self) -> list[Any]:
        """Some record of some container, and something in it."""
        made: list[Any] = [None]
        for container in self.containers():
            record = self.some(container)
            made.append(record)
            if type(record) is dict:
                made += record.values()
            elif type(record) is list:
                made += record
            elif isinstance(record, classes.Plain | classes.Data):
                made += (vars(record), *vars(record).values())
        return made

    def some(self, container: Any) -> Any:
        return container[self.place(container)]

    def place(self, container: Any) -> Any:
        if type(container) is list:
            return self.random.randrange(len(container))
        return self.random.choice(list(container))

    # changes

    def change(self) -> None:
        containers = self.containers()
        names = [name for name in dir(self) if name.startswith("do_")]
        name = self.random.choice(names)
        self.log.append(name)
        container = self.random.choice(containers) if containers else {}
        if not container:
            return
        with contextlib.suppress(
            *(AttributeError, TypeError, KeyError, IndexError, ValueError, BufferError),
            StopIteration,
        ):
            getattr(self, name)(container)

    def do_replace(self, held: Any) -> None:
        for _ in range(self.random.choice((1, 1, 1, 5, 30))):
            held[self.place(held)] = self.record()

    def do_replace_by_equal(self, held: Any) -> None:
        at = self.place(held)
        value = held[at]
        if type(value) in (int, float, bool):
            held[at] = -value if value == 0 else self.random.choice((int, float))(value)
            if value in (0, 1):
                held[at] = self.random.choice((bool, int, float))(value)
        elif type(value) is dict:
            key = next(iter(value))
            value[key] = float(value[key])
        elif type(value) is list:
            value[0] = float(value[0])

    def do_reuse_address(self, held: Any) -> None:
        """Free what a record holds and allocate its like at once, for the same address."""
        at = self.place(held)
        value = held[at]
        odd = self.random.choice((1, True, 1.0, "1"))
        if type(value) is dict:
            name, old = next((k, v) for k, v in value.items() if type(v) in (list, dict))
            kind = type(old)
            before = id(old)
            value[name] = None
            del old
            made: list[Any] = []
            for _ in range(50):
                new: Any = [odd, 2] if kind is list else {"x": odd}
                made.append(new)
                if id(new) == before:
                    break
            value[name] = made[-1]
        elif type(value) is list and type(value[-1]) is tuple:
            value[-1] = None
            value[-1] = (self.number(), [odd])
        else:
            before, size = id(value), len(getattr(value, "__dict__", ()))
            held[at] = None
            del value
            made = [self.record() for _ in range(20)]
            held[at] = next((new for new in made if id(new) == before), made[size % 20])

    def do_churn(self, held: Any) -> None:
        """Free and make many small things."""
        places = list(range(len(held))) if type(held) is list else list(held)
        for at in self.random.sample(places, min(10, len(places))):
            value = held[at]
            if type(value) is dict and "v" in value:
                value["v"] = None
                value["v"] = self.random.choice((self.number() + 10**9, self.number() / 3, "nn"))
            elif isinstance(value, classes.Plain):
                value.a = None
                value.a = (self.number(), self.number())
            elif type(value) is list:
                value[0] = (self.number(),)

    def do_delete(self, held: Any) -> None:
        for _ in range(self.random.choice((1, 3, 20))):
            if len(held) > 5:
                del held[self.place(held)]

    def do_insert(self, held: Any) -> None:
        for _ in range(self.random.choice((1, 3, 40))):
            if type(held) is list:
                held.insert(self.random.randrange(len(held) + 1), self.record())
            else:
                held[self.key()] = self.record()

    def do_insert_again(self, held: Any) -> None:
        if type(held) is dict:
            key = self.place(held)
            value = held.pop(key)
            if isinstance(key, int | float) and self.random.random() < 0.5:
                key = self.random.choice((float(key), key))
            held[key] = value
        else:
            held.append(held.pop(self.place(held)))

    def do_reverse(self, held: Any) -> None:
        if type(held) is list:
            held.reverse()
        else:
            items = list(held.items())[::-1]
            held.clear()
            held.update(items)

    def do_rotate(self, held: Any) -> None:
        if type(held) is list:
            held.append(held.pop(0))
        else:
            key = next(iter(held))
            held[key] = held.pop(key)

    def do_swap(self, held: Any) -> None:
        one, two = self.place(held), self.place(held)
        held[one], held[two] = held[two], held[one]

    def do_swap_insides(self, held: Any) -> None:
        one, two = self.some(held), self.some(held)
        if type(one) is dict and type(two) is dict:
            one["w"], two["w"] = two["w"], one["w"]
        elif isinstance(one, classes.Plain):
            one.b, two.b = two.b, one.b

    def do_clear(self, held: Any) -> None:
        if self.random.random() < 0.2:
            held.clear()

    def do_shrink(self, held: Any) -> None:
        if self.random.random() < 0.3:
            while len(held) > 8:
                del held[next(iter(held)) if type(held) is dict else -1]

    def do_grow(self, held: Any) -> None:
        if len(held) < 400:
            for _ in range(60):
                if type(held) is dict:
                    held[self.number()] = self.record()
                else:
                    held.append(self.record())

    def do_replace_container(self, held: Any) -> None:
        for name, value in vars(self.root).items():
            if value is held:
                self.root.__dict__[name] = None
                del held, value
                self.root.__dict__[name] = self.container()
                return

    def do_drop_container(self, held: Any) -> None:
        for name, value in list(vars(self.root).items()):
            if value is held and self.random.random() < 0.4:
                del self.root.__dict__[name]

    def do_add_container(self, held: Any) -> None:
        if len(vars(self.root)) < 12:
            setattr(self.root, f"more{self.number()}", self.container())

    def do_copy_container(self, held: Any) -> None:
        """The same records in two containers."""
        if len(vars(self.root)) < 12 and self.random.random() < 0.3:
            setattr(self.root, f"copy{self.number()}", held.copy())

    def do_alias_container(self, held: Any) -> None:
        self.root.alias = held

    def do_nest_container(self, held: Any) -> None:
        """A container within a record of another one."""
        if self.random.random() < 0.3:
            self.set_inside(self.some(self.random.choice(self.containers())), held)

    def set_inside(self, record: Any, value: Any) -> None:
        if type(record) is dict:
            record["in"] = value
        elif type(record) is list:
            record.append(value)
        elif isinstance(record, classes.Plain | classes.Data):
            record.b = value

    def do_share_inside(self, held: Any) -> None:
        if self.random.random() < 0.3:
            self.set_inside(self.some(held), self.random.choice(self.found()))

    def do_refer_from_rest(self, held: Any) -> None:
        record = self.some(held)
        self.root.other["current"] = record
        if isinstance(record, classes.Plain):
            how = self.random.randrange(4)
            if how == 0:
                self.root.other["method"] = record.method
            elif how == 1:
                self.root.other["weak"] = weakref.ref(record)
            elif how == 2:
                self.root.other["closure"] = _closure_over(record)
            else:
                self.root.other["vars"] = record.__dict__

    def do_refer_inside_from_rest(self, held: Any) -> None:
        if self.random.random() < 0.4:
            self.root.other["inside"] = self.random.choice(self.found())

    def do_forget_rest(self, held: Any) -> None:
        self.root.other = {"n": self.number()}

    def do_attributes(self, held: Any) -> None:
        record = self.some(held)
        if type(record) is classes.Plain:
            how = self.random.randrange(5)
            if how == 0:
                record.__class__ = classes.Other
            elif how == 1:
                record.__dict__ = dict(reversed(record.__dict__.items()))
            elif how == 2:
                record.__dict__ = classes.Table(record.__dict__)
            elif how == 3:
                record.more = self.atom()
            else:
                del record.a
        elif type(record) is classes.Frozen:
            object.__setattr__(record, "a", self.atom())
        elif type(record) is dict:
            record["more"] = self.atom()
        elif type(record) is set:
            record.add(self.number())

    def do_share_attributes(self, held: Any) -> None:
        one, two = self.some(held), self.some(held)
        if self.random.random() < 0.2 and isinstance(one, classes.Plain):
            one.__dict__ = two.__dict__

    def do_cycle(self, held: Any) -> None:
        if self.random.random() < 0.1:
            value = self.random.choice((self.root, held, self.some(held)))
            self.set_inside(self.some(held), value)

    def do_odd_record(self, held: Any) -> None:
        if self.exotic:
            held[self.place(held)] = self.record()

    def do_meddle(self, held: Any) -> None:
        # NB: what two of them change in turn is never the same at two looks.
        if self.random.random() < 0.3 and type(self.root) is not classes.PrunedServer:
            self.root.meddler = classes.Meddling(victim=held)

    def do_sulk(self, held: Any) -> None:
        self.root.sulky = classes.Sulky(sulks=self.random.random() < 0.5)

    def do_deep(self, held: Any) -> None:
        if self.random.random() < 0.02:
            deep: Any = None
            for _ in range(20_000):
                deep = [deep]
            self.root.deep = deep

    def do_zone(self, held: Any) -> None:
        self.odd_zone.minutes += 1

    def do_patch_class(self, held: Any) -> None:
        if self.exotic and self.random.random() < 0.2:
            if "__getstate__" in vars(classes.Data):
                del classes.Data.__getstate__  # type: ignore[attr-defined]
            else:
                classes.Data.__getstate__ = _patched_state  # type: ignore[attr-defined]

    def do_write(self, held: Any) -> None:
        for value in list(vars(self.root).values()):
            each = value if type(value) is list and len(value) < 5 else [value]
            for buffer in each:
                size = len(buffer) if isinstance(buffer, bytearray | array.array) else 0
                if isinstance(buffer, np.ndarray) and buffer.size:
                    if buffer.flags.writeable and not buffer.dtype.hasobject:
                        buffer.flat[self.random.randrange(buffer.size)] = self.number() % 200
                elif size:
                    buffer[self.random.randrange(size)] = self.number() % 200

    def do_resize(self, held: Any) -> None:
        for value in list(vars(self.root).values()):
            if isinstance(value, bytearray):
                value.extend(bytes(self.random.choice((1, 5_000))))
                del value[: self.random.choice((0, 1, 1_000))]
            elif isinstance(value, array.array):
                value.extend([1.0] * 10)
            elif isinstance(value, np.ndarray) and value.base is None and value.ndim == 1:
                # NB: the list, the attribute, the name and the argument; a view would be left with
                # memory that was freed.
                if sys.getrefcount(value) <= 4 and value.size:
                    value.resize(value.size + self.random.choice((-1, 1, 900)), refcheck=False)

    def do_replace_buffer(self, held: Any) -> None:
        for name in list(vars(self.root)):
            if name.startswith("buffer") and self.random.random() < 0.5:
                self.root.__dict__[name] = None
                self.root.__dict__[name] = self.buffer()

    def do_view(self, held: Any) -> None:
        for value in list(vars(self.root).values()):
            if isinstance(value, np.ndarray) and value.ndim == 1 and value.size > 20:
                start = self.random.randrange(value.size // 2)
                self.root.views = [value[start:], value[start + 2 : start + 9], value]

    def do_swap_buffers(self, held: Any) -> None:
        names = [name for name in vars(self.root) if name.startswith("buffer")]
        if len(names) > 1:
            here = self.root.__dict__
            here[names[0]], here[names[1]] = here[names[1]], here[names[0]]

    def do_nothing(self, held: Any) -> None:
        pass


class FlatProgram(Program):
    """A program with records that hold immutable values alone, so that their versions are asked."""

    def __init__(self, seed: int) -> None:
        self.instances: list[Any] = []
        super().__init__(seed)

    def container(self) -> Any:
        pick = self.random.choice
        shapes: tuple[Callable[[], Any], ...] = (
            lambda: {"id": self.number(), "v": self.atom(), "w": 0},
            lambda: {"id": self.number(), "v": self.atom(), "w": 0},
            lambda: {self.number(): self.atom() for _ in range(self.random.randrange(4))},
            lambda: classes.Plain(a=self.atom(), b=self.number()),
            lambda: classes.Data(self.number(), self.atom()),
            lambda: [{"id": self.number(), "v": self.atom()}, classes.Plain(a=self.number())],
        )
        self.usual = pick(shapes)
        count = pick((30, 150, 300, 600))
        if self.random.random() < 0.2:
            return [self.record() for _ in range(count)]
        return {self.number(): self.record() for _ in range(count)}

    def leaf(self, held: Any) -> dict[Any, Any]:
        """A dict that holds immutable values, or did."""
        record = self.some(held)
        if type(record) is list and record:
            record = self.random.choice(record)
        if isinstance(record, classes.enum.Enum):
            return {}  # What a member has is every program's.
        return record if type(record) is dict else vars(record)

    def do_leaf(self, held: Any) -> None:
        for _ in range(self.random.choice((1, 1, 1, 8, 40))):
            self._change_leaf(self.leaf(held))

    def _change_leaf(self, leaf: dict[Any, Any]) -> None:
        pick = self.random.choice
        if not leaf:
            leaf["new"] = self.atom()
        key = pick(list(leaf))
        value = leaf[key]
        changes: tuple[Callable[[], object], ...] = (
            lambda: leaf.update({key: self.atom()}),
            lambda: leaf.update({key: pick((1, True, 1.0, 0, False, 0.0, -0.0, math.nan))}),
            lambda: leaf.update({key: [self.number()]}),
            lambda: leaf.update({key: classes.Text("t")}),
            lambda: (leaf.update({key: None}), leaf.update({key: value})),
            lambda: leaf.update({key: leaf.pop(key)}),
            lambda: leaf.update({f"{key}'": leaf.pop(key)}),
            lambda: leaf.setdefault(self.key(), self.atom()),
            lambda: leaf.popitem(),
            lambda: leaf.__delitem__(key),
            lambda: _fill_again(leaf),
            lambda: _fill_again(leaf, leaf.pop(key)),
            lambda: leaf.clear(),
        )
        # Those that make it no leaf any more are rare, else there soon are none.
        pick(changes[:2] * 6 + changes[4:12] * 4 + changes)()

    def do_equal_copy(self, held: Any) -> None:
        at = self.place(held)
        record = held[at]
        if type(record) is dict:
            held[at] = dict(record)
        else:
            record.__dict__ = dict(vars(record))

    def do_same_place(self, held: Any) -> None:
        """Take out the last one and put it in again: the same, but for what was done meanwhile."""
        if type(held) is dict:
            key, record = held.popitem()
            if self.random.random() < 0.5:
                self.do_leaf(held)
            held[key] = record

    def do_vars(self, held: Any) -> None:
        """Make a record of what an instance has for its attributes."""
        instance = classes.Plain(a=self.number(), b=self.atom())
        held[self.place(held)] = vars(instance)
        self.instances.append(instance)

    def do_vars_again(self, held: Any) -> None:
        if self.instances:
            instance = self.random.choice(self.instances)
            for _ in range(20):
                instance.a = self.number()
            instance.b = self.atom()


def _fill_again(held: dict[Any, Any], _: Any = None) -> None:
    items = list(held.items())
    held.clear()
    held.update(items)


def _patched_state(self: Any) -> dict[str, Any]:
    return {**self.__dict__, "patched": 1}


def _closure_over(value: Any) -> Callable[[], Any]:
    return lambda: value


# -- running them


@contextlib.contextmanager
def small_thresholds() -> Iterator[None]:
    """Cut and track small things, so that programs are small and reach all there is."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (parts, stream):
            patch.setattr(module, "CUT_ITEMS_MIN", 24)
        patch.setattr(parts, "PART_ITEMS_FIRST", 8)
        patch.setattr(parts, "PART_BYTES", 600)
        patch.setattr(fingerprints, "_LOOK_SHARE", 2)
        patch.setattr(stream, "REGION_BYTES_MIN", 8_192)
        patch.setattr(stream, "SHARED_BYTES_MIN", 16_384)
        patch.setattr(stream, "COPY_BYTES", 20_000)
        # Parts are tiny here, of which each takes about 20 bytes and has a number of 4.
        patch.setattr(stream, "DEARER_BYTES_MAX", 3_000)
        yield


def sent(pieces: Sequence[Any], chance: random.Random) -> list[Any]:
    """The bytes as they may come in: cut anywhere, some of them in writable memory."""
    data = b"".join(pieces)
    if chance.random() < 0.3:
        return [memoryview(bytearray(piece)) for piece in pieces]
    if chance.random() < 0.5:
        return [memoryview(bytearray(data))]
    cut = chance.randrange(len(data) + 1)
    return [data[:cut], memoryview(bytearray(data[cut:]))]


def run(
    seed: int, engine: Any, memory: bool, kind: type[Program] = Program
) -> collections.Counter[str]:
    """Run the program of a seed.

    Returns:
        What happened in it: how often which way was taken.

    Raises:
        Lie: What the reader has is not what it should be.
    """
    program = kind(seed)
    chance = program.random
    root = program.root
    count: collections.Counter[str] = collections.Counter()
    writer = StreamWriter(root, engine, memory=shared_memory if memory else None)
    reader = StreamReader(LIMIT_BYTES)
    try:
        reader.take(sent(writer.look(), chance))
        for _ in range(chance.randint(0, 4)):
            ended = False
            steps = 0
            while not ended:
                seconds, size = chance.choice(((0.0, 1), (0.0, 1 << 20), (1.0, 1 << 30)))
                pieces, ended = writer.step(seconds, size)
                reader.take(sent(pieces, chance))
                del pieces
                steps += 1
                if chance.random() < 0.3:
                    program.change()
                if steps > 20 and chance.random() < 0.2:
                    break
            for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
                program.change()
        if "sulky" in vars(root):
            root.sulky.sulks = False
        if "meddler" in vars(root) or type(root) is classes.PrunedServer:
            # Let it change what it will, so that it is the same when asked again.
            for _ in range(3):
                serializers.dumps(root)
        count["cuts before"] = len(writer._cuts)
        count["regions"] = len(writer._regions)
        last = writer.last()
        count["cuts"] = len(writer._cuts)
        count["rounds"] = writer.rounds
        given = sent(last, chance)
        size = sum(map(len, last))
        del last
        got: Any = reader.last(given)
        snapshot = serializers.dumps(root)
        want: Any = serializers.loads(snapshot)
        expected = described(want)
        _compare(expected, described(got))
        if serializers.digest(got) != serializers.digest(want):
            raise Lie("another digest")
        if size > len(snapshot) * 1.01 + stream.DEARER_BYTES_MAX + 64 * len(writer._regions):
            raise Lie(f"the last chunk takes {size} bytes, a snapshot {len(snapshot)}")
        _check_original(root)
        del given
        _scribble(root)
        _compare(expected, described(got))
        _check_apart(got)
    finally:
        writer.close()
        if "__getstate__" in vars(classes.Data):
            del classes.Data.__getstate__  # type: ignore[attr-defined]
    return count


class Follower:
    """A stream of a program's object that goes on, and what its reader should have.

    Attributes:
        deltas: How many were written.
    """

    def __init__(self, program: Program, engine: Any, memory: bool) -> None:
        self.program = program
        self.deltas = 0
        self.writer = StreamWriter(program.root, engine, shared_memory if memory else None)
        self.reader = StreamReader(LIMIT_BYTES)
        self._on_its_way: list[tuple[list[Any], list[Any]]] = []
        self._expected: list[Any] | None = None  # of what the reader has
        if program.random.random() < 0.5:
            self._take(self.writer.look())

    def _take(self, pieces: Sequence[Any]) -> None:
        self.reader.take(sent(pieces, self.program.random))

    def round(self) -> None:
        """Steps of a round, with changes between them; perhaps not all."""
        chance = self.program.random
        for _ in range(chance.choice((1, 3, 40))):
            seconds, size = chance.choice(((0.0, 1), (0.0, 1 << 20), (1.0, 1 << 30)))
            pieces, ended = self.writer.step(seconds, size)
            self._take(pieces)
            if chance.random() < 0.3:
                self.program.change()
            if ended:
                break

    def delta(self) -> None:
        """Write a delta, which is on its way from then on."""
        program = self.program
        settle(program.root)
        sulky = vars(program.root).get("sulky")
        if sulky is not None and sulky.sulks:
            try:
                self.writer.delta()
            except serializers.NotSerializable:
                sulky.sulks = False
            else:
                raise Lie("what cannot travel has")
        pieces = self.writer.delta()
        self.deltas += 1
        snapshot = serializers.dumps(program.root)
        self._check_size(pieces, len(snapshot))
        self._on_its_way.append((described(serializers.loads(snapshot)), pieces))

    def _check_size(self, pieces: list[Any], snapshot_bytes: int) -> None:
        size = sum(map(len, pieces))
        few = stream.DEARER_BYTES_MAX + 96 * len(self.writer._regions)
        if size > snapshot_bytes * 1.01 + few:
            raise Lie(f"a delta takes {size} bytes, a snapshot {snapshot_bytes}")

    def arrive(self) -> None:
        """The reader gets what is on its way."""
        chance = self.program.random
        for expected, pieces in self._on_its_way:
            self.reader.keep(sent(pieces, chance))
            self._expected = expected
            if chance.random() < 0.3:
                _compare(expected, described(self.reader.rehearse()))
        self._on_its_way.clear()

    @property
    def is_whole(self) -> bool:
        return self._expected is not None

    def promote(self) -> Any:
        """The reader's object, as of what has arrived."""
        assert self._expected is not None
        got: Any = self.reader.build()
        _compare(self._expected, described(got))
        _check_apart(got)
        return got

    def switch_over(self) -> Any:
        """The reader's object as the program's is now."""
        self.arrive()
        settle(self.program.root)
        last = self.writer.last()
        snapshot = serializers.dumps(self.program.root)
        self._check_size(last, len(snapshot))
        given = sent(last, self.program.random)
        del last
        got: Any = self.reader.last(given)
        self._expected = described(serializers.loads(snapshot))
        _compare(self._expected, described(got))
        return got


def settle(root: Any) -> None:
    """Let what changes the object when it is captured do so, until it is the same again."""
    if "meddler" in vars(root) or type(root) is classes.PrunedServer:
        for _ in range(3):
            with contextlib.suppress(serializers.NotSerializable):
                serializers.dumps(root)


def run_followed(
    seed: int, engine: Any, memory: bool, kind: type[Program] = Program
) -> collections.Counter[str]:
    """Run the program of a seed with streams that go on, up to three of them at a time.

    Returns:
        What happened in it.

    Raises:
        Lie: What a reader has is not what it should be.
    """
    program = kind(seed)
    chance = program.random
    root = program.root
    other = "hash" if engine == "pages" else "pages"
    if dirty.pages_refusal():
        other = engine
    count: collections.Counter[str] = collections.Counter()
    followers = [Follower(program, engine, memory)]
    ended: list[tuple[Any, list[Any]]] = []
    try:
        for _ in range(chance.randint(2, 12)):
            for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
                program.change()
            if len(followers) < 3 and chance.random() < 0.3:
                engine_too = chance.choice((engine, engine, other))
                shares = memory and chance.random() < 0.5
                followers.append(Follower(program, engine_too, shares))
            for follower in list(followers):
                _turn(follower, followers, count)
        if "sulky" in vars(root):
            root.sulky.sulks = False
        for follower in followers:
            if chance.random() < 0.5:
                got = follower.switch_over()
            else:
                follower.delta()
                program.change()
                if "sulky" in vars(root):
                    root.sulky.sulks = False
                follower.arrive()
                got = follower.promote()
            count["cuts"] += len(follower.writer._cuts)
            count["regions"] += len(follower.writer._regions)
            count["deltas"] += follower.deltas
            ended.append((got, described(got)))
        _check_original(root)
        _scribble(root)
        for got, expected in ended:
            _compare(expected, described(got))
            _check_apart(got)
    finally:
        for follower in followers:
            follower.writer.close()
        if "__getstate__" in vars(classes.Data):
            del classes.Data.__getstate__  # type: ignore[attr-defined]
    return count


def _turn(follower: Follower, followers: list[Follower], count: collections.Counter[str]) -> None:
    chance = follower.program.random
    if chance.random() < 0.7:
        follower.arrive()
    what = chance.random()
    if not follower.deltas and what < 0.4:
        follower.round()
    elif what < 0.85:
        follower.delta()
    elif len(followers) > 1:
        # It is lost, or takes over while the others go on.
        if follower.is_whole and what < 0.95:
            follower.promote()
            count["promotions"] += 1
        follower.writer.close()
        followers.remove(follower)


def _compare(expected: list[Any], found: list[Any]) -> None:
    if found != expected:
        at = next(
            (n for n, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]),
            min(len(expected), len(found)),
        )
        around = slice(max(0, at - 12), at + 3)
        raise Lie(f"at {at}: {found[around]!r:.2000}\n in place of {expected[around]!r:.2000}")


def _check_original(root: Any) -> None:
    """Nothing is exported any more, so bytearrays can be resized."""
    for value in list(vars(root).values()):
        for buffer in value if type(value) is list and len(value) < 5 else [value]:
            if isinstance(buffer, bytearray):
                buffer.append(1)
                buffer.pop()


def _buffers(root: Any) -> list[Any]:
    found: dict[int, Any] = {}
    for value in vars(root).values():
        for buffer in value if type(value) is list and len(value) < 5 else [value]:
            if isinstance(buffer, bytearray | np.ndarray | array.array):
                found[id(buffer)] = buffer
    return list(found.values())


def _scribble(root: Any) -> None:
    """Write all over the original: nothing of it may be in what was read."""
    for buffer in _buffers(root):
        if isinstance(buffer, bytearray) and buffer:
            buffer[:] = bytes(len(buffer))
        elif isinstance(buffer, np.ndarray) and buffer.flags.writeable and buffer.size:
            if not buffer.dtype.hasobject:
                buffer.fill(77)
    for value in list(vars(root).values()):
        if type(value) is dict:
            for record in list(value.values()):
                if type(record) is dict:
                    record.clear()


def _check_apart(root: Any) -> None:
    """Buffers that are apart share no memory; bytearrays can be resized."""
    buffers = _buffers(root)
    gc.collect(0)
    for buffer in buffers:
        if isinstance(buffer, bytearray):
            buffer.append(1)
            buffer.pop()
    for one in buffers:
        if not (isinstance(one, np.ndarray) and one.size and one.flags.writeable):
            continue
        if one.dtype.hasobject or one.base is None or isinstance(one.base, np.ndarray):
            continue
        for two in buffers:
            if two is one or not isinstance(two, np.ndarray) or not two.size:
                continue
            if isinstance(two.base, np.ndarray) or two.dtype.hasobject:
                continue
            if np.shares_memory(one, two):
                raise Lie("two arrays share memory")
