"""Server classes: what is refused, what stays ordinary, what a node reads of them."""

from __future__ import annotations

import abc
import asyncio
import copy
import dataclasses
import doctest
import functools
import gc
import inspect
import math
import pickle
import pydoc
import sys
import types
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Generic, TypeVar

import cloudpickle
import pytest

import migrate
from migrate.errors import UsageError
from migrate.ref import Ref, RemoteMethod, current_runtime
from migrate.server import HOOKS, Current, spec_of

T = TypeVar("T")


@migrate.server
class Counter:
    """Counts."""

    def __init__(self, start: int = 0) -> None:
        self.n = start

    @migrate.call
    def incr(self, by: int = 1) -> int:
        """Add and return.

        >>> Counter(1).incr(2)
        3
        """
        self.n += by
        return self.n

    @migrate.call
    async def peek(self) -> int:
        return self.n

    def undecorated(self) -> str:
        return "plain"

    @migrate.blocking
    def crunch(self, path: str) -> int:
        return len(path)

    @migrate.every(seconds=2)
    def tick(self) -> None:
        self.n += 100


class Plain:
    """Not decorated at all."""

    attribute = 3
    shorten = str.upper

    def one(self) -> int:
        return 1

    async def two(self) -> int:
        return 2

    def _private(self) -> None: ...

    def generate(self) -> Iterator[int]:
        yield 1

    def on_start(self) -> None: ...

    @property
    def three(self) -> int:
        return 3

    @staticmethod
    def four() -> int:
        return 4

    @classmethod
    def five(cls) -> int:
        return 5

    class Nested: ...


# ------------------------------------------------------------ refused uses


def test_calling_a_method_on_the_class_is_refused_with_what_to_write():
    for refused in (lambda: Counter.incr(3), lambda: Counter.incr(), lambda: Counter.incr.cast(3)):
        with pytest.raises(UsageError) as caught:
            refused()
        assert "Counter.incr was called on the class" in str(caught.value)
        assert "await node.call(ref, Counter.incr, ...)" in str(caught.value)


def async_generator_handler():
    @migrate.call
    async def follow(self) -> AsyncIterator[int]:
        yield 1


def generator_handler():
    @migrate.call
    def follow(self) -> Iterator[int]:
        yield 1


def generator_timer():
    @migrate.every(seconds=1)
    def follow(self) -> Iterator[int]:
        yield 1


def undecorated_generator_in_a_declared_class():
    @migrate.server
    class Feed:
        def follow(self) -> Iterator[int]:
            yield 1


@pytest.mark.parametrize(
    "declare",
    [
        async_generator_handler,
        generator_handler,
        generator_timer,
        undecorated_generator_in_a_declared_class,
    ],
)
def test_a_generator_is_refused_as_its_frame_cannot_move(declare):
    with pytest.raises(UsageError, match=r"follow is a generator.*frame.*Return a list"):
        declare()


def test_a_static_or_class_method_is_refused():
    with pytest.raises(UsageError, match="cannot decorate a staticmethod"):
        migrate.call(staticmethod(lambda: 1))
    with pytest.raises(UsageError, match="cannot decorate a classmethod"):
        migrate.every(seconds=1)(classmethod(lambda cls: 1))
    with pytest.raises(UsageError, match="staticmethod hides a migrate decorator"):

        @migrate.server
        class Below:
            @staticmethod
            @migrate.call
            def incr(self):
                return 1


def test_a_property_over_a_handler_is_refused():
    with pytest.raises(UsageError, match="property hides a migrate decorator"):

        @migrate.server
        class Below:
            @property
            @migrate.call
            def incr(self):
                return 1


def test_another_decorator_over_ours_is_refused_as_it_would_hide_it():
    def logged(func):
        @functools.wraps(func)
        def wrapper(*args):
            return func(*args)

        return wrapper

    with pytest.raises(UsageError, match=r"Wrapped\.incr.*put @migrate\.call.*above"):

        @migrate.server
        class Wrapped:
            @logged
            @migrate.call
            def incr(self):
                return 1

    @migrate.server
    class Right:
        @migrate.call
        @logged
        def incr(self):
            return 1

    assert Right().incr() == 1
    assert spec_of(Right).methods["incr"].is_public


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf, True, "1", 10**9])
def test_a_period_that_is_no_positive_number_is_refused(seconds):
    with pytest.raises(UsageError, match="number of seconds above 0"):
        migrate.every(seconds=seconds)


def test_a_timer_without_its_period_is_refused():
    with pytest.raises(UsageError, match=r"@migrate\.every\(seconds=1\.0\)"):

        @migrate.every
        def tick(self):
            return None

    with pytest.raises(UsageError, match="name the period"):
        migrate.every()
    with pytest.raises(UsageError, match="name the period"):
        migrate.every(1.0)


def test_a_timer_that_needs_arguments_is_refused_by_their_names():
    with pytest.raises(UsageError, match="requires amount, unit"):

        @migrate.every(seconds=1)
        def tick(self, amount, *rest, unit, times=1, **more):
            return None


def test_a_blocking_coroutine_function_is_refused():
    with pytest.raises(UsageError, match="async def"):

        @migrate.blocking
        async def crunch(self):
            return 1


def test_server_on_something_else_than_a_class_is_refused():
    for thing in (lambda: 1, Counter(), 3, "Counter"):
        with pytest.raises(UsageError, match="decorates a class"):
            migrate.server(thing)
    with pytest.raises(UsageError, match="decorates a class"):
        migrate.server(version=2)(lambda: 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"versoin": 2}, "no option versoin; did you mean version?"),
        ({"zzz": 2}, "It has: version, mailbox, reentrant, movable"),
        ({"deterministic": 1}, "True or False"),
        ({"durable": "yes"}, "True or False"),
        ({"version": 0}, "from 1 to"),
        ({"version": "2"}, "from 1 to"),
        ({"version": True}, "from 1 to"),
        ({"mailbox": 0}, "from 1 to"),
        ({"mailbox": 2**31}, "from 1 to"),
        ({"reentrant": 1}, "True or False"),
        ({"movable": "no"}, "True or False"),
        ({"former_names": "shop:Old"}, "a tuple of"),
        ({"former_names": ["shop:Old"]}, "a tuple of"),
        ({"former_names": ("shop.Old",)}, "a tuple of"),
        ({"former_names": ("shop:",)}, "a tuple of"),
        ({"former_names": (3,)}, "a tuple of"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError) as caught:
        migrate.server(**options)
    assert message in str(caught.value)


def test_options_beside_the_class_are_refused():
    with pytest.raises(UsageError, match="bare, or with options"):
        migrate.server(Plain, version=2)


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_a_decorated_hook_is_refused(hook):
    namespace = {}
    exec(f"def {hook}(self, *args): pass", namespace)
    with pytest.raises(UsageError, match="is a hook"):
        migrate.call(namespace[hook])


def test_a_private_method_is_refused_unless_it_is_a_timer():
    with pytest.raises(UsageError, match="leading underscore"):

        @migrate.call
        def _incr(self):
            return 1

    @migrate.server
    class Ticking:
        @migrate.every(seconds=1)
        def _tick(self):
            return None

    spec = spec_of(Ticking)
    assert "_tick" not in spec.methods
    assert [timer.name for timer in spec.timers] == ["_tick"]


def test_a_handler_given_a_private_name_afterwards_is_refused():
    @migrate.call
    def incr(self):
        return 1

    with pytest.raises(UsageError, match="leading underscore"):
        migrate.server(type("Renamed", (), {"_incr": incr}))


@pytest.mark.parametrize("thing", [3, len, functools.partial(print), Counter])
def test_what_is_no_method_is_refused(thing):
    with pytest.raises(UsageError, match="decorates a method"):
        migrate.call(thing)


def test_a_method_without_self_is_refused():
    with pytest.raises(UsageError, match="add self"):

        @migrate.call
        def incr():
            return 1


@pytest.mark.parametrize("thing", [Counter(), "Counter", 3, len])
def test_only_classes_have_a_spec(thing):
    with pytest.raises(UsageError, match="a class is needed"):
        spec_of(thing)


def test_current_is_refused_outside_a_handler():
    with pytest.raises(UsageError, match="outside a handler"):
        migrate.current()


# ------------------------------------------------------- stays an ordinary class


def test_an_instance_is_used_as_if_nothing_was_decorated():
    counter = Counter(5)

    assert counter.incr(2) == counter.incr(by=0) == 7
    assert asyncio.run(counter.peek()) == 7
    assert counter.crunch("abc") == 3
    counter.tick()
    assert vars(counter) == {"n": 107}


def test_the_decorator_returns_the_class_itself():
    class Own: ...

    assert migrate.server(Own) is Own
    assert migrate.server(version=3)(Own) is Own
    assert Counter.__name__ == "Counter"
    assert Counter.__doc__ == "Counts."


def test_bound_methods_are_those_of_the_plain_function():
    counter = Counter()

    assert isinstance(counter.incr, types.MethodType)
    assert counter.incr.__self__ is counter
    assert counter.incr == counter.incr
    assert str(inspect.signature(counter.incr)) == "(by: 'int' = 1) -> 'int'"
    assert inspect.iscoroutinefunction(counter.peek)


def test_overriding_and_super_work_as_in_any_class():
    class Doubling(Counter):
        @migrate.call
        def incr(self, by: int = 1) -> int:
            return super().incr(by) * 2

    class Explicit(Counter):
        def incr(self, by: int = 1) -> int:
            return Counter.incr(self, by) + 1000

    class Async(Counter):
        @migrate.call
        async def peek(self) -> int:
            return await super().peek() + 1

    assert Doubling(1).incr(2) == 6
    assert Explicit(1).incr(2) == 1003
    assert asyncio.run(Async(1).peek()) == 2
    assert Counter.incr(Doubling(1), 2) == 3


def test_abstract_handlers_keep_a_class_abstract():
    class Base(abc.ABC):
        @migrate.call
        @abc.abstractmethod
        def one(self) -> int: ...

        @abc.abstractmethod
        @migrate.call
        def two(self) -> int: ...

    assert Base.__abstractmethods__ == {"one", "two"}
    with pytest.raises(TypeError, match="abstract"):
        Base()


def test_dataclasses_slots_and_generics_can_be_servers():
    @migrate.server
    @dataclasses.dataclass(slots=True)
    class Point:
        x: int = 0

        @migrate.call
        def move(self, by: int) -> int:
            self.x += by
            return self.x

    class Box(Generic[T]):
        @migrate.call
        def size(self) -> int:
            return 1

    # This decorator makes a new class out of the namespace of an old one.
    outer = dataclasses.dataclass(slots=True)(migrate.server(version=4)(type("Old", (), {})))

    assert Point(1).move(2) == 3
    assert spec_of(Point).cls is Point
    assert spec_of(Box[int]) is spec_of(Box)
    assert spec_of(outer).cls is outer
    assert spec_of(outer).version == 4


def test_instances_classes_and_bound_methods_pickle_as_usual():
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):

        def travel(thing, protocol=protocol):
            return pickle.loads(pickle.dumps(thing, protocol))

        assert travel(Counter) is Counter
        assert travel(Counter(3)).n == 3
        assert travel(Counter(3).incr)(4) == 7
        assert travel(Counter.incr) == Counter.incr
        patient = Counter.incr.with_options(timeout=3)
        assert travel(patient) == patient != Counter.incr
    assert copy.deepcopy(Counter(3)).incr(1) == 4


def test_a_class_that_travels_by_value_keeps_its_handlers():
    def declare():
        @migrate.server(version=7)
        class Local(Counter):
            @migrate.call
            def incr(self, by: int = 1) -> int:
                return super().incr(by) + 1

            @migrate.every(seconds=3)
            async def tick(self) -> None:
                self.n = 0

        return Local

    cls = declare()
    spec_of(cls)
    data = cloudpickle.dumps(cls)
    # As in another process: the tracker that gives the same class back is emptied.
    tracker = cloudpickle.cloudpickle
    for track in (tracker._DYNAMIC_CLASS_TRACKER_BY_CLASS, tracker._DYNAMIC_CLASS_TRACKER_BY_ID):
        track.clear()

    arrived = pickle.loads(data)

    assert arrived is not cls
    assert arrived(1).incr(2) == 4
    assert spec_of(arrived).cls is arrived
    assert spec_of(arrived).version == 7
    assert [timer.seconds for timer in spec_of(arrived).timers] == [3.0]
    assert spec_of(arrived).methods["incr"].is_public


def test_help_doctest_and_inspect_see_the_methods():
    assert str(inspect.signature(Counter.incr)) == "(self, by: 'int' = 1) -> 'int'"
    assert Counter.incr.__name__ == "incr"
    assert Counter.incr.__qualname__ == "Counter.incr"
    assert Counter.incr.__module__ == __name__
    assert Counter.incr.__wrapped__(Counter(1), 2) == 3
    assert inspect.unwrap(Counter.incr) is Counter.incr.__wrapped__
    assert "Add and return." in pydoc.render_doc(Counter, renderer=pydoc.plaintext)
    assert "incr(self, by: 'int' = 1)" in pydoc.render_doc(Counter, renderer=pydoc.plaintext)
    found = doctest.DocTestFinder(exclude_empty=True).find(
        Counter, "Counter", module=sys.modules[__name__], globs={"Counter": Counter}
    )
    assert [test.name for test in found if test.examples] == ["Counter.incr"]
    assert doctest.DocTestRunner().run(found[-1]).failed == 0


def test_partial_methods_and_wrappers_of_handlers_work():
    class Shortcuts(Counter):
        ten = functools.partialmethod(Counter.__dict__["incr"], 10)

    @functools.wraps(Counter.incr)
    def wrapper(): ...

    assert Shortcuts(1).ten() == 11
    assert wrapper.__name__ == "incr"


def test_a_method_of_the_class_names_itself_and_takes_options():
    method = Counter.incr.with_options(timeout=5)

    assert isinstance(Counter.incr, RemoteMethod)
    assert method.__name__ == "incr"
    assert method != Counter.incr == Counter.incr
    assert hash(Counter.incr) == hash(Counter.incr)
    assert repr(Counter.incr) == (
        "<method incr(self, by: 'int' = 1) -> 'int' of server class Counter>"
    )
    with pytest.raises(UsageError, match="above 0"):
        Counter.incr.with_options(timeout=0)


# --------------------------------------------------------------------- the spec


def test_the_spec_of_a_decorated_class():
    spec = spec_of(Counter)

    assert (spec.cls, spec.cls_name) == (Counter, f"{__name__}:Counter")
    assert (spec.version, spec.mailbox, spec.reentrant, spec.movable) == (1, 10_000, False, True)
    assert {name: method.is_public for name, method in spec.methods.items()} == {
        "crunch": False,
        "incr": True,
        "peek": True,
        "tick": False,
        "undecorated": False,
    }
    assert [name for name, method in spec.methods.items() if method.is_async] == ["peek"]
    assert [name for name, method in spec.methods.items() if method.is_blocking] == ["crunch"]
    assert spec.methods["incr"].func(Counter(1), 2) == 3
    assert [(timer.name, timer.seconds) for timer in spec.timers] == [("tick", 2.0)]
    assert spec.timers[0].method is spec.methods["tick"]
    assert spec.hooks == frozenset()
    assert spec.class_info.methods == ("crunch", "incr", "peek", "tick", "undecorated")


def test_every_public_method_of_an_undecorated_class_can_be_called():
    spec = spec_of(Plain)

    assert {name: method.is_public for name, method in spec.methods.items()} == {
        "one": True,
        "two": True,
    }
    assert spec.hooks == {"on_start"}
    assert spec.timers == ()


def test_options_are_kept_and_inherited():
    @migrate.server(version=2, mailbox=5, reentrant=True, movable=False)
    class Parent: ...

    class Child(Parent): ...

    @migrate.server(version=3)
    class Other(Parent): ...

    for cls, expected in ((Parent, (2, 5, True, False)), (Child, (2, 5, True, False))):
        spec = spec_of(cls)
        assert (spec.version, spec.mailbox, spec.reentrant, spec.movable) == expected
    assert spec_of(Other).version == 3
    assert spec_of(Other).mailbox == 10_000


def test_an_override_answers_and_ticks_as_the_overridden_method_did():
    class Child(Counter):
        def incr(self, by: int = 1) -> int:
            return 0

        def tick(self) -> None: ...

        async def crunch(self, path: str) -> int:
            return 0

    spec = spec_of(Child)

    assert spec.methods["incr"].is_public
    assert spec.methods["incr"].func is Child.incr
    assert [(timer.name, timer.method.func) for timer in spec.timers] == [("tick", Child.tick)]
    assert not spec.methods["crunch"].is_blocking


def test_a_name_set_to_none_takes_the_method_away():
    class Child(Counter):
        incr = None
        tick = None

    assert "incr" not in spec_of(Child).methods
    assert spec_of(Child).timers == ()


def test_the_order_of_our_decorators_does_not_matter():
    class Both:
        @migrate.call
        @migrate.blocking
        def one(self) -> int:
            return 1

        @migrate.blocking()
        @migrate.call
        def two(self) -> int:
            return 2

        @migrate.every(seconds=1)
        @migrate.call
        @migrate.blocking(process=False)
        def three(self) -> int:
            return 3

    spec = spec_of(Both)

    assert [(m.name, m.is_public, m.is_blocking) for m in spec.methods.values()] == [
        ("one", True, True),
        ("three", True, True),
        ("two", True, True),
    ]
    assert [timer.name for timer in spec.timers] == ["three"]
    assert Both().one() + Both().two() + Both().three() == 6


def test_mixins_give_their_handlers_in_the_order_of_python():
    class Left:
        @migrate.call
        def who(self) -> str:
            return "left"

    class Right:
        @migrate.call
        def who(self) -> str:
            return "right"

        @migrate.call
        def only(self) -> str:
            return "right"

    class Both(Left, Right): ...

    spec = spec_of(Both)

    assert spec.methods["who"].func(Both()) == "left"
    assert spec.methods["only"].func(Both()) == "right"


def test_the_spec_is_read_once_and_goes_with_its_class():
    def declare():
        class Local:
            def one(self) -> int:
                return 1

        return Local

    cls = declare()
    assert spec_of(cls) is spec_of(cls)
    child = type("Child", (cls,), {})
    assert spec_of(child) is not spec_of(cls)

    gone = weakref.ref(cls)
    del cls, child
    gc.collect()

    assert gone() is None


def test_built_in_classes_have_a_spec_too():
    assert spec_of(dict).methods == {}
    assert spec_of(dict).cls_name == "builtins:dict"


def test_all_hooks_are_found_in_parents_too():
    parent = type("Parent", (), {name: lambda self, *args: None for name in HOOKS})
    child = type("Child", (parent,), {})

    assert spec_of(child).hooks == HOOKS
    assert spec_of(child).methods == {}


def test_current_gives_what_the_running_scope_tells():
    mine = Current(ref=Ref("s1", spec_of(Counter).class_info), node="a", epoch=3, caller="s2")

    class Running:
        def current(self):
            return mine

    token = current_runtime.set(Running())
    try:
        assert migrate.current() is mine
        assert migrate.current().epoch == 3
    finally:
        current_runtime.reset(token)
