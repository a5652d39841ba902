"""Classes and functions that travel by value, within a process and between real ones."""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import pathlib
import pickle
import struct
import subprocess
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import serializers
from serializers import LoadFailed, NotSerializable

ROOT = pathlib.Path(serializers.__file__).parent.parent

# A process that, for each message, runs code in its __main__ if that is what came, and sends back
# what the code leaves in `out`; objects are sent and received by value.
PEER = """
import struct, sys
import serializers

def exchange():
    while head := sys.stdin.buffer.read(4):
        code, obj = serializers.loads(sys.stdin.buffer.read(struct.unpack("<I", head)[0]))
        globals()["obj"] = obj
        exec(code, globals())
        data = serializers.dumps(globals().get("out"))
        sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
        sys.stdout.buffer.flush()

exchange()
"""


class Peer:
    """One process; bytes that its `__main__` made are passed on without being loaded here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PEER],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, code: str, data: bytes | None = None) -> Any:
        """Run `code` in its `__main__`, with `data` loaded there into `obj`; return its `out`."""
        code = textwrap.dedent(code)
        if data is not None:
            code = "obj = serializers.loads(obj)\n" + code
        request = serializers.dumps((code, data))
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(struct.pack("<I", len(request)) + request)
        self._process.stdin.flush()
        (size,) = struct.unpack("<I", self._process.stdout.read(4))
        return serializers.loads(self._process.stdout.read(size))

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(timeout=30) == 0


@pytest.fixture
def peers() -> Iterator[Callable[[], Peer]]:
    made: list[Peer] = []

    def make() -> Peer:
        made.append(Peer())
        return made[-1]

    yield make
    for peer in made:
        peer.close()


DEFINE_COUNTER = """
    LIMIT = 10
    class Counter:
        step = 1
        def __init__(self): self.n = 0
        def incr(self):
            self.n = min(self.n + self.step, LIMIT)
            return self.n
    c = Counter()
    c.incr()
    out = serializers.dumps(c)
"""


def test_a_class_of_main_comes_home_as_itself_with_its_attributes_untouched(
    peers: Callable[[], Peer],
) -> None:
    home, away = peers(), peers()
    data = home.run(DEFINE_COUNTER)
    back = away.run("obj.incr(); out = serializers.dumps(obj)", data)
    home.run("Counter.step = 5; Counter.added = 'at home'; out = None")

    result = home.run(
        """
        out = (type(obj) is Counter, isinstance(obj, Counter), obj.n, Counter.step, Counter.added,
               obj.incr())
        """,
        back,
    )

    assert result == (True, True, 2, 5, "at home", 7)


def test_two_streams_bring_one_class_and_the_second_does_not_reset_it(
    peers: Callable[[], Peer],
) -> None:
    home, away = peers(), peers()
    first = home.run(DEFINE_COUNTER)
    away.run("kept = obj; type(obj).step = 3; out = None", first)
    second = home.run("Counter.step = 100; out = serializers.dumps(c)")

    assert away.run("out = (type(obj) is type(kept), type(obj).step)", second) == (True, 3)


def test_a_class_of_main_passes_through_a_node_to_a_third_process(
    peers: Callable[[], Peer],
) -> None:
    one, two, three = peers(), peers(), peers()
    data = one.run(DEFINE_COUNTER)
    data = two.run("out = serializers.dumps(obj)", data)
    data = three.run("obj.incr(); out = serializers.dumps([obj, type(obj)])", data)

    assert one.run("out = (obj[1] is Counter, obj[0].n)", data) == (True, 2)


def test_a_class_of_main_is_never_silently_saved_by_reference(peers: Callable[[], Peer]) -> None:
    home = peers()
    home.run(DEFINE_COUNTER)
    shapes = ("c", "Counter", "[c]", "{Counter: 1}", "(c.incr,)", "Counter.incr", "exchange")
    for shape in shapes:
        data = home.run(f"out = serializers.dumps({shape})")
        # Here __main__ is the test runner's, which has none of these names.
        assert serializers.loads(data) is not None


def test_a_class_of_main_survives_its_home_and_another_main_of_the_same_names(
    peers: Callable[[], Peer],
) -> None:
    home, away = peers(), peers()
    data = home.run(DEFINE_COUNTER)
    away.run("LIMIT = 0\nclass Counter: pass\nout = None")

    assert away.run("out = (obj.incr(), isinstance(obj, Counter))", data) == (2, False)


def test_the_plain_serializer_refuses_classes_of_main(peers: Callable[[], Peer]) -> None:
    home = peers()
    home.run(DEFINE_COUNTER)
    message = home.run(
        """
        try:
            serializers.PlainSerializer().encode([c])
        except serializers.NotSerializable as exc:
            out = str(exc)
        """
    )

    assert "__main__.Counter" in message and "auto" in message


def test_modules_registered_by_value_arrive_where_they_cannot_be_imported(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, peers: Callable[[], Peer]
) -> None:
    (tmp_path / "private_module.py").write_text(
        "BASE = 40\ndef helper(x): return BASE + x\n"
        "class Thing:\n    def __init__(self): self.x = 2\n"
        "    def go(self): return helper(self.x)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import private_module  # type: ignore[import-not-found]

    away = peers()
    thing = private_module.Thing()
    serializers.register_by_value(private_module)
    try:
        data = serializers.dumps(thing)
    finally:
        serializers.unregister_by_value(private_module)

    assert away.run("out = obj.go()", data) == 42
    # No longer registered, it goes by name, and the other process has nothing of that name.
    by_name = serializers.dumps(thing)
    message = away.run(
        """
        try:
            out = serializers.loads(DATA)
        except serializers.LoadFailed as exc:
            out = str(exc)
        """.replace("DATA", repr(by_name))
    )
    assert "no module named 'private_module'" in message


def test_only_imported_modules_can_be_registered() -> None:
    with pytest.raises(TypeError):
        serializers.register_by_value("name")  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        serializers.register_by_value(types.ModuleType("never_imported"))


def trip(obj: Any) -> Any:
    return serializers.loads(serializers.dumps(obj))


def foreign(make: Callable[[], Any]) -> Any:
    """Load what `make` makes as another process would: without the tracked class."""
    from cloudpickle import cloudpickle as machinery

    made = make()
    data = serializers.dumps(made)
    machinery._DYNAMIC_CLASS_TRACKER_BY_ID.clear()
    return serializers.loads(data)


def test_two_closures_go_on_sharing_their_variable() -> None:
    def make() -> tuple[Callable[[], int], Callable[[], int]]:
        n = 0

        def incr() -> int:
            nonlocal n
            n += 1
            return n

        return incr, lambda: n

    incr, read = trip(make())
    incr()
    incr()

    assert read() == 2


def test_a_recursive_closure_and_one_with_an_empty_cell_come_back() -> None:
    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    def late() -> Any:
        return not_yet

    copy, copied_late = trip((factorial, late))
    assert copy(5) == 120
    with pytest.raises(NameError):
        copied_late()
    not_yet = 1
    assert late() == 1


def test_functions_keep_all_that_belongs_to_them() -> None:
    def function(a: int, *, b: list[int] = [1]) -> int:  # noqa: B006
        "what it is"
        return a + b[0]

    function.note = ["n"]  # type: ignore[attr-defined]
    copy = trip(function)

    assert copy(1) == 2 and copy.__doc__ == "what it is" and copy.note == ["n"]
    assert copy.__qualname__ == function.__qualname__
    assert copy.__annotations__ == function.__annotations__


def test_functions_of_one_module_share_one_namespace_in_a_stream() -> None:
    source = types.ModuleType("made_up")
    exec("n = 0\ndef incr():\n    global n\n    n += 1\ndef read():\n    return n", vars(source))
    incr, read = trip((source.incr, source.read))
    incr()

    assert read() == 1 and source.n == 0


MODULE_WITH_STATE = """
limit = 3
seen = []

def make(word):
    def light(x):
        return x < limit

    def heavy(x):
        seen.append(x)
        return word, list(seen)

    return light, heavy
"""


def test_functions_of_an_importable_module_use_its_own_globals_there(
    peers: Callable[[], Peer], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "with_state.py").write_text(MODULE_WITH_STATE)
    home, away, lacking = peers(), peers(), peers()
    find = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import with_state; out = None"
    home.run(find)
    light, heavy = (
        home.run(f"out = serializers.dumps(with_state.make('w')[{index}])") for index in (0, 1)
    )
    away.run(find + "; with_state.limit = 10; with_state.seen.append(0)")

    assert away.run("out = obj(5)", light) is True
    assert away.run("out = obj(1), with_state.seen", heavy) == (("w", [0, 1]), [0, 1])
    # Where the module cannot be had, what is plain has come along, and what is not is missed.
    assert lacking.run("out = obj(5), obj(2)", light) == (False, True)
    missed = lacking.run(
        """
        try: serializers.loads(data)
        except serializers.LoadFailed as exc: out = exc.module, str(exc)
        """.replace("data", repr(heavy))
    )
    assert missed[0] == "with_state" and "'seen'" in missed[1]


def test_slots_and_qualified_names_of_classes_stay() -> None:
    def make() -> Any:
        class Point:
            __slots__ = ("x", "y")

            class Inner:
                pass

        return Point

    copy = foreign(make)
    point = copy()
    point.x = 1

    assert not hasattr(point, "__dict__")
    assert copy.__qualname__.endswith("make.<locals>.Point")
    assert copy.Inner.__qualname__.endswith("Point.Inner")


def test_methods_with_super_properties_and_abstract_classes_work_after_loading() -> None:
    def make() -> Any:
        class Base(abc.ABC):
            @abc.abstractmethod
            def go(self) -> str: ...

            @property
            def twice(self) -> str:
                return self.go() * 2

            @classmethod
            def name(cls) -> str:
                return cls.__name__

            @staticmethod
            def three() -> int:
                return 3

        class Child(Base):
            def go(self) -> str:
                return "x"

            def __init__(self) -> None:
                super().__init__()
                self.ready = functools.partial(self.go)

        Base.register(dict)
        return Base, Child()

    base, child = foreign(make)

    assert (child.twice, child.name(), child.three(), child.ready()) == ("xx", "Child", 3, "x")
    assert issubclass(dict, base)
    with pytest.raises(TypeError, match="abstract"):
        base()


def test_dataclasses_defined_in_functions_work_after_loading() -> None:
    def make() -> Any:
        @dataclasses.dataclass(frozen=True, slots=True)
        class Pair:
            left: int
            right: list[int] = dataclasses.field(default_factory=list)

        return Pair(1)

    pair = foreign(make)

    assert dataclasses.replace(pair, left=2).left == 2
    assert dataclasses.asdict(pair) == {"left": 1, "right": []}
    assert [field.name for field in dataclasses.fields(pair)] == ["left", "right"]


def test_enums_with_an_init_keep_what_it_set() -> None:
    def make() -> Any:
        class Planet(enum.Enum):
            EARTH = (5.976e24, 6.37814e6)
            TERRA = (5.976e24, 6.37814e6)
            MARS = (6.421e23, 3.3972e6)

            def __init__(self, mass: float, radius: float) -> None:
                self.mass, self.radius = mass, radius

            def density(self) -> float:
                return self.mass / self.radius

            @classmethod
            def _missing_(cls, value: object) -> Any:
                return cls.EARTH

        return [Planet, Planet.MARS]

    planet, mars = foreign(make)

    assert mars is planet.MARS and mars.mass == 6.421e23 and mars.density() > 1
    assert planet.TERRA is planet.EARTH and planet("?") is planet.EARTH
    assert [p.name for p in planet] == ["EARTH", "MARS"]


def test_flags_and_mixed_enums_come_back() -> None:
    def make() -> Any:
        class Access(enum.IntFlag):
            READ = 1
            WRITE = 2
            BOTH = 3

        class Word(enum.StrEnum):
            HELLO = "hello"

        return Access, Access.READ, Word.HELLO

    access, read, hello = foreign(make)

    assert read is access.READ and (read | access.WRITE) is access.BOTH and read == 1
    assert hello == "hello" and type(hello)(str(hello)) is hello


def test_types_made_by_typing_in_functions_come_back() -> None:
    def make() -> Any:
        class Named(typing.NamedTuple):
            a: int

        class Options(typing.TypedDict, total=False):
            size: int

        parameters = typing.ParamSpec("parameters")
        return Named(1), typing.NewType("key", int), Options, parameters

    named, key, options, parameters = foreign(make)

    assert named == (1,) and named.a == 1 and named._replace(a=2).a == 2
    assert key(3) == 3 and key.__supertype__ is int
    assert options(size=1) == {"size": 1} and options.__optional_keys__ == {"size"}
    assert parameters.__name__ == "parameters" and trip(parameters) is parameters


def test_a_failed_load_of_a_class_does_not_leave_it_half_made() -> None:
    class Target:
        attribute = 5

    def boom() -> Any:
        raise ValueError("no")

    class Bomb:
        def __reduce__(self) -> Any:
            return boom, ()

    from cloudpickle import cloudpickle as machinery

    failing = serializers.dumps([Bomb(), Target])
    working = serializers.dumps(Target)
    machinery._DYNAMIC_CLASS_TRACKER_BY_ID.clear()

    with pytest.raises(LoadFailed):
        serializers.loads(failing)
    assert serializers.loads(working).attribute == 5  # type: ignore[attr-defined]


def test_cached_functions_of_functions_keep_their_parameters() -> None:
    @functools.lru_cache(maxsize=7, typed=True)
    def double(n: int) -> int:
        return n * 2

    copy = trip(double)

    assert copy(4) == 8 and copy.cache_parameters() == {"maxsize": 7, "typed": True}


def test_modules_travel_by_name_and_made_up_ones_by_value() -> None:
    made_up = types.ModuleType("made_up")
    made_up.x = [1]  # type: ignore[attr-defined]
    json, copy = trip((pickle, made_up))

    assert json is pickle and copy.x == [1] and copy is not made_up


def test_what_an_unpicklable_closure_holds_is_named() -> None:
    suspended = (n for n in range(3))
    next(suspended)

    def function() -> Any:
        return suspended

    with pytest.raises(NotSerializable) as caught:
        serializers.dumps({"callback": function})

    assert caught.value.path == "dict['callback'].__closure__['suspended']"
    assert next(suspended) == 1


PROGRAM = """
total = 0
busy = (n for n in [1, 2])
def add(n):
    global total
    total += n
    return total
"""


def test_functions_and_who_holds_their_namespace_see_the_same_variables() -> None:
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(PROGRAM, namespace)

    copy: Any = serializers.loads(serializers.dumps({"held": namespace, "add": namespace["add"]}))

    copy["held"]["total"] = 5
    assert copy["add"](1) == 6 == copy["held"]["total"] and namespace["total"] == 0
    assert copy["held"]["add"] is copy["add"]


def test_what_is_in_the_way_of_a_namespace_is_left_unless_the_state_holds_it() -> None:
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(PROGRAM, namespace)
    next(namespace["busy"])
    holder = [namespace]

    assert serializers.loads(serializers.dumps(namespace["add"]))(1) == 1  # type: ignore[operator]
    with pytest.raises(serializers.NotSerializable, match="busy"):
        serializers.dumps([namespace, namespace["add"]])
    assert holder
