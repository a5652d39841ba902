"""What classes can be made to do, and the state that their instances then have."""

from ..cases import case


@case
def dataclass_with_slots_frozen_and_keywords():
    from dataclasses import InitVar, dataclass, field, replace

    @dataclass(slots=True)
    class Item:
        name: str
        tags: list = field(default_factory=list)

    @dataclass(frozen=True, slots=True)
    class Key:
        a: int
        b: str = "x"

    @dataclass(kw_only=True)
    class Order:
        items: list
        scale: InitVar[int] = 2
        total: int = field(init=False, compare=False)

        def __post_init__(self, scale):
            self.total = len(self.items) * scale

    def build():
        order = Order(items=[Item("a")], scale=5)
        order.items[0].tags.append("t")
        order.key = Key(1)
        order.by_key = {order.key: order}
        return order

    def check(order):
        assert order.total == 5 and order.items[0].tags == ["t"]
        assert order.by_key[replace(order.key)] is order
        assert not hasattr(order.items[0], "__dict__")
        try:
            order.key.a = 2
        except AttributeError:
            pass
        else:
            raise AssertionError("no longer frozen")
        assert type(order)(items=[1, 2]).total == 4


@case
def dataclass_factories_and_inheritance():
    import dataclasses

    @dataclasses.dataclass(order=True)
    class Base:
        rank: int
        notes: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @dataclasses.dataclass(order=True)
    class Derived(Base):
        extra: str = dataclasses.field(default="d", metadata={"unit": "m"})

    def build():
        made = Derived(3)
        made.notes["k"] = 1
        return made

    def check(made):
        kind = type(made)
        assert made < kind(4) and made == kind(3)
        assert dataclasses.fields(made)[2].metadata["unit"] == "m"
        assert dataclasses.asdict(made) == {"rank": 3, "notes": {"k": 1}, "extra": "d"}
        assert kind(1).notes == {} and "notes" not in repr(made)


@case
def slots_without_a_dict():
    class Base:
        __slots__ = ("a",)

    class Small(Base):
        __slots__ = ("__private", "b", "unset")

        def __init__(self):
            self.a, self.b, self.__private = 1, [self], "p"

        def private(self):
            return self.__private

    def build():
        small = Small()
        small.b.append(2)
        return small

    def check(small):
        assert small.a == 1 and small.b[0] is small and small.private() == "p"
        assert not hasattr(small, "unset") and not hasattr(small, "__dict__")
        try:
            small.other = 1
        except AttributeError:
            pass
        else:
            raise AssertionError("it grew a dict")


@case
def slots_with_a_dict_beside_them():
    class Mixed:
        __slots__ = ("__dict__", "__weakref__", "fixed")

    def build():
        mixed = Mixed()
        mixed.fixed, mixed.free = 1, 2
        return mixed

    def check(mixed):
        import weakref

        assert (mixed.fixed, mixed.free) == (1, 2) and "fixed" not in vars(mixed)
        assert weakref.ref(mixed)() is mixed


@case
def properties_and_cached_property():
    from functools import cached_property

    class Circle:
        def __init__(self, r):
            self._r = r

        @property
        def r(self):
            return self._r

        @r.setter
        def r(self, value):
            self._r = value
            self.__dict__.pop("area", None)

        @cached_property
        def area(self):
            return 3 * self._r**2

    def build():
        circle = Circle(2)
        circle.area
        circle.__dict__["area"] = "kept"
        return circle

    def check(circle):
        assert circle.area == "kept"
        circle.r = 1
        assert circle.area == 3


@case
def descriptors_with_state_per_instance():
    class Positive:
        def __set_name__(self, owner, name):
            self.name = name

        def __get__(self, obj, kind=None):
            return self if obj is None else obj.__dict__[self.name]

        def __set__(self, obj, value):
            if value <= 0:
                raise ValueError(self.name)
            obj.__dict__[self.name] = value

    class Account:
        balance = Positive()

        def __init__(self):
            self.balance = 1

    def build():
        account = Account()
        account.balance = 5
        return account

    def check(account):
        assert account.balance == 5 and type(account).balance.name == "balance"
        try:
            account.balance = -1
        except ValueError as exc:
            assert exc.args == ("balance",)
        else:
            raise AssertionError("the descriptor is gone")


@case
def descriptor_with_weak_keys():
    import weakref

    class PerInstance:
        def __init__(self):
            self.values = weakref.WeakKeyDictionary()

        def __get__(self, obj, kind=None):
            return self if obj is None else self.values.get(obj, 0)

        def __set__(self, obj, value):
            self.values[obj] = value

    class Thing:
        def __init__(self):
            self.store = PerInstance()
            self.store.values[self] = 3

    def build():
        return Thing()

    def check(thing):
        assert thing.store.values[thing] == 3 and len(thing.store.values) == 1


@case
def metaclass_that_registers():
    class Meta(type):
        registry = {}

        def __new__(mcs, name, bases, namespace, label=None):
            cls = super().__new__(mcs, name, bases, namespace)
            cls.label = label or name.lower()
            mcs.registry[cls.label] = cls
            return cls

        def __call__(cls, *args):
            made = super().__call__(*args)
            made.via = "meta"
            return made

    class Shape(metaclass=Meta):
        pass

    class Square(Shape, label="sq"):
        def __init__(self, a):
            self.a = a

    def build():
        return Square(2)

    def check(square):
        kind = type(square)
        assert square.via == "meta" and kind.label == "sq" and kind(3).via == "meta"
        assert type(kind).registry["sq"] is kind
        assert type(kind).registry["shape"] is kind.__mro__[1]
        assert len(type(kind).registry) == 2


@case
def init_subclass_with_keywords():
    class Plugin:
        known = {}

        def __init_subclass__(cls, *, key, **rest):
            super().__init_subclass__(**rest)
            cls.key = key
            Plugin.known[key] = cls

    class Csv(Plugin, key="csv"):
        def __init__(self):
            self.rows = []

    def build():
        made = Csv()
        made.rows.append(1)
        return made

    def check(made):
        kind = type(made)
        assert kind.key == "csv" and kind.known["csv"] is kind and made.rows == [1]

        class Json(kind.__base__, key="json"):
            pass

        assert kind.known["json"] is Json
        del kind.known["json"]


@case
def class_registry_kept_elsewhere():
    class Plugin:
        def __init_subclass__(cls, *, key, **rest):
            super().__init_subclass__(**rest)
            cls.key = key

    class Csv(Plugin, key="csv"):
        pass

    def build():
        return Csv()

    def check(made):
        assert type(made).key == "csv" and type(made).__mro__[1].__name__ == "Plugin"


@case
def abstract_classes_and_virtual_subclasses():
    import abc

    class Shape(abc.ABC):
        @abc.abstractmethod
        def area(self): ...

        @classmethod
        def __subclasshook__(cls, other):
            return NotImplemented

    class Square(Shape):
        def __init__(self, a):
            self.a = a

        def area(self):
            return self.a**2

    class Foreign:
        def area(self):
            return 1

    Shape.register(Foreign)

    class Holder:
        def __init__(self):
            self.shapes = [Square(2), Foreign()]
            self.kind = Shape

    def build():
        return Holder()

    def check(holder):
        assert [shape.area() for shape in holder.shapes] == [4, 1]
        assert all(isinstance(shape, holder.kind) for shape in holder.shapes)
        try:
            holder.kind()
        except TypeError:
            pass
        else:
            raise AssertionError("no longer abstract")


@case
def protocols_and_generics():
    from typing import Generic, Protocol, TypeVar, runtime_checkable

    T = TypeVar("T")

    @runtime_checkable
    class Sized(Protocol):
        def size(self) -> int: ...

    class Box(Generic[T]):
        def __init__(self, item: T):
            self.item = item

        def size(self):
            return 1

    class IntBox(Box[int]):
        pass

    class Holder:
        def __init__(self):
            self.box = IntBox(5)
            self.alias = Box[int]
            self.made = Box[str]("a")
            self.protocol = Sized

    def build():
        return Holder()

    def check(holder):
        assert isinstance(holder.box, holder.protocol)
        assert holder.alias.__origin__ is type(holder.made)
        assert holder.made.__orig_class__.__args__ == (str,)
        assert type(holder.box).__orig_bases__[0].__origin__ is type(holder.made)
        assert type(holder.made)[int] == holder.alias


@case
def class_attributes_changed_at_run_time():
    class Session:
        count = 0
        limits = {"max": 1}

        def __init__(self):
            type(self).count += 1
            self.number = self.count

    class Holder:
        def __init__(self):
            # What importable classes are changed to stays at home: it is no state of the object.
            self.kind = type("Session", (Session,), {"count": 0, "limits": {"max": 1}})
            self.one, self.two = self.kind(), self.kind()
            self.kind.limits["max"] = 9

    def build():
        return Holder()

    def check(holder):
        assert holder.kind.count == 2 and holder.kind.limits == {"max": 9}
        assert type(holder.one) is type(holder.two) is holder.kind
        assert holder.kind().number == 3 and holder.one.count == 3
        holder.kind.count = 2


@case
def methods_patched_on_an_instance_and_a_class():
    class Service:
        def answer(self):
            return "original"

    def build():
        service = Service()
        service.answer = lambda: "patched " + str(service.n)
        service.n = 1
        other = type("Other", (Service,), {})
        other.answer = lambda self: "class " + str(self.n)
        service.other = other()
        service.other.n = 2
        return service

    def check(service):
        service.n = 3
        assert service.answer() == "patched 3"
        assert service.other.answer() == "class 2"
        assert type(service).answer(service) == "original"


@case
def classes_made_by_type_and_by_functions():
    class Factory:
        def __init__(self):
            self.kinds = {}

        def kind(self, name):
            if name not in self.kinds:
                self.kinds[name] = type(
                    name, (), {"__init__": lambda self, v: setattr(self, "v", v), "name": name}
                )
            return self.kinds[name]

    def build():
        factory = Factory()
        factory.one = factory.kind("One")(1)
        factory.two = factory.kind("Two")(2)
        factory.more = factory.kind("One")(3)
        return factory

    def check(factory):
        assert factory.kind("One") is type(factory.one) is type(factory.more)
        assert factory.kind("Two")(5).v == 5 and factory.two.name == "Two"
        assert type(factory.one) is not type(factory.two)


@case
def nested_classes():
    class Outer:
        class Inner:
            class Deep:
                def __init__(self):
                    self.x = 1

            def __init__(self):
                self.deep = self.Deep()

        def __init__(self):
            self.inner = self.Inner()

    def build():
        return Outer()

    def check(outer):
        kind = type(outer)
        assert type(outer.inner) is kind.Inner
        assert type(outer.inner.deep) is kind.Inner.Deep
        assert kind.Inner.Deep.__qualname__.endswith("Outer.Inner.Deep")


@case
def super_in_diamonds():
    class Base:
        def __init__(self):
            self.calls = ["base"]

        def go(self):
            return ["base"]

    class Left(Base):
        def go(self):
            return ["left", *super().go()]

    class Right(Base):
        def go(self):
            return ["right", *super().go()]

    class Bottom(Left, Right):
        def __init__(self):
            super().__init__()
            self.bound = super().go

        def go(self):
            return ["bottom", *super().go()]

    def build():
        return Bottom()

    def check(bottom):
        assert bottom.go() == ["bottom", "left", "right", "base"]
        assert bottom.bound() == ["left", "right", "base"]
        assert [c.__name__ for c in type(bottom).__mro__][:4] == ["Bottom", "Left", "Right", "Base"]


@case
def getattr_proxy_that_recurses():
    class Proxy:
        def __init__(self, target):
            self._target = target

        def __getattr__(self, name):
            return getattr(self._target, name)

    def build():
        return Proxy([1, 2])

    def check(proxy):
        proxy.append(3)
        assert proxy._target == [1, 2, 3] and proxy.count(3) == 1


@case
def setattr_and_getattribute_overridden():
    class Guarded:
        def __init__(self):
            object.__setattr__(self, "data", {})
            object.__setattr__(self, "log", [])

        def __setattr__(self, name, value):
            self.log.append(name)
            self.data[name] = value

        def __getattribute__(self, name):
            if name in ("data", "log") or name.startswith("__"):
                return object.__getattribute__(self, name)
            return self.data[name]

    def build():
        guarded = Guarded()
        guarded.x = 1
        return guarded

    def check(guarded):
        assert guarded.log == ["x"] and guarded.x == 1
        guarded.y = 2
        assert guarded.log == ["x", "y"] and guarded.y == 2


@case
def frozen_by_hand():
    class Frozen:
        __slots__ = ("a", "b")

        def __init__(self, a, b):
            object.__setattr__(self, "a", a)
            object.__setattr__(self, "b", b)

        def __setattr__(self, name, value):
            raise AttributeError("frozen")

        def __eq__(self, other):
            return type(other) is type(self) and (self.a, self.b) == (other.a, other.b)

        def __hash__(self):
            return hash((self.a, self.b))

    def build():
        frozen = Frozen("x", 2)
        return {frozen: [frozen]}

    def check(table):
        (frozen,) = table
        assert table[type(frozen)("x", 2)][0] is frozen
        try:
            frozen.a = 1
        except AttributeError:
            pass
        else:
            raise AssertionError("thawed")


@case
def custom_reduce_getnewargs_and_state():
    table = {}

    class Interned:
        def __new__(cls, name):
            return table.setdefault(name, super().__new__(cls))

        def __init__(self, name):
            self.name = name

        def __reduce_ex__(self, protocol):
            return type(self), (self.name,)

    class Complex:
        def __new__(cls, *, real, imaginary):
            made = super().__new__(cls)
            made.both = (real, imaginary)
            return made

        def __getnewargs_ex__(self):
            return (), {"real": self.both[0], "imaginary": self.both[1]}

    class Lean:
        def __init__(self):
            self.kept, self.dropped = 1, 2

        def __getstate__(self):
            return {"kept": self.kept}

        def __setstate__(self, state):
            self.__dict__.update(state, dropped="again")

    def build():
        a = Interned("a")
        return [a, a, Complex(real=1, imaginary=2), Lean()]

    def check(found):
        a, same, complex, lean = found
        assert a is same and type(a)("a") is a
        assert complex.both == (1, 2)
        assert lean.kept == 1 and lean.dropped in ("again", 2)


@case
def constructor_with_keyword_only_arguments():
    class Strict:
        def __new__(cls, *, size):
            made = super().__new__(cls)
            made.size = size
            return made

        def __init__(self, *, size):
            self.made_with = size

    def build():
        return Strict(size=4)

    def check(strict):
        assert strict.size == strict.made_with == 4


@case
def singleton_by_new():
    class Registry:
        _instance = None

        def __new__(cls):
            if cls._instance is None:
                cls._instance = super().__new__(cls)
                cls._instance.items = []
            return cls._instance

    def build():
        registry = Registry()
        registry.items.append(1)
        return [registry, Registry()]

    def check(pair):
        assert pair[0] is pair[1] and pair[0].items == [1]


@case
def total_ordering_and_operators():
    import functools

    @functools.total_ordering
    class Version:
        def __init__(self, *parts):
            self.parts = parts

        def __eq__(self, other):
            return self.parts == other.parts

        def __lt__(self, other):
            return self.parts < other.parts

        def __add__(self, other):
            return type(self)(*self.parts, *other.parts)

        def __call__(self):
            return ".".join(map(str, self.parts))

        def __bool__(self):
            return False

        def __len__(self):
            return len(self.parts)

    def build():
        return sorted([Version(2), Version(1, 5), Version(1)])

    def check(versions):
        assert [v() for v in versions] == ["1", "1.5", "2"]
        assert versions[0] <= versions[1] and (versions[0] + versions[2])() == "1.2"
        assert not versions[0] and len(versions[1]) == 2


@case
def named_tuples_typed_and_functional():
    from collections import namedtuple
    from typing import NamedTuple

    class Row(NamedTuple):
        id: int
        name: str = "none"

        @property
        def upper(self):
            return self.name.upper()

    Point = namedtuple("Point", "x y", defaults=[0])

    class Wide(Point):
        def area(self):
            return self.x * self.y

    class Holder:
        def __init__(self):
            self.local = namedtuple("Local", ["a", "b"])
            self.rows = [Row(1), Row(2, "b"), Point(3), Wide(2, 3), self.local(7, 8)]

    def build():
        return Holder()

    def check(holder):
        one, two, point, wide, local = holder.rows
        assert one.name == "none" and two.upper == "B" and two._replace(id=9).id == 9
        assert point == (3, 0) and wide.area() == 6 and wide._asdict() == {"x": 2, "y": 3}
        assert type(local) is holder.local and local.b == 8
        assert type(one)(5)._fields == ("id", "name")


@case
def typed_dict_and_new_type():
    from typing import NewType, TypedDict, get_type_hints

    class Movie(TypedDict, total=False):
        name: str
        year: int

    UserId = NewType("UserId", int)

    class Holder:
        def __init__(self):
            self.kind = Movie
            self.movie = Movie(name="x")
            self.make_id = UserId

    def build():
        return Holder()

    def check(holder):
        assert holder.movie == {"name": "x"} and holder.kind(year=1) == {"year": 1}
        assert holder.kind.__total__ is False
        assert get_type_hints(holder.kind) == {"name": str, "year": int}
        assert holder.make_id(5) == 5 and holder.make_id.__supertype__ is int


@case
def context_managers_and_callables():
    class Counter:
        def __init__(self):
            self.depth = 0
            self.most = 0

        def __enter__(self):
            self.depth += 1
            self.most = max(self.most, self.depth)
            return self

        def __exit__(self, *exc):
            self.depth -= 1

        def __call__(self, function):
            def inner(*args):
                with self:
                    return function(*args)

            return inner

    def build():
        counter = Counter()
        counter.twice = counter(lambda x: x * 2)
        counter.twice(1)
        return counter

    def check(counter):
        assert counter.most == 1
        with counter:
            assert counter.twice(4) == 8
        assert counter.most == 2 and counter.depth == 0


@case
def class_level_lock_and_instances():
    import threading

    class Account:
        lock = threading.Lock()
        total = 0

        def __init__(self):
            self.own = threading.RLock()
            self.amount = 0

        def add(self, n):
            with self.lock, self.own:
                self.amount += n
            return self.amount

    def build():
        account = Account()
        account.add(2)
        return account

    def check(account):
        assert account.add(3) == 5
        with account.own:
            assert account.add(1) == 6


@case
def static_class_and_partial_methods():
    from functools import partialmethod, singledispatchmethod

    class Tool:
        made = 0

        def __init__(self):
            self.seen = []

        @staticmethod
        def double(x):
            return 2 * x

        @classmethod
        def make(cls):
            return cls()

        def put(self, kind, value):
            self.seen.append((kind, value))

        put_one = partialmethod(put, "one")

        @singledispatchmethod
        def show(self, value):
            return "object"

        @show.register
        def _(self, value: int):
            return "int"

        @show.register
        def _(self, value: list):
            return "list"

    def build():
        tool = Tool()
        tool.put_one(1)
        tool.make_more = tool.make
        tool.doubler = tool.double
        tool.show(1)
        return tool

    def check(tool):
        tool.put_one(2)
        assert tool.seen == [("one", 1), ("one", 2)]
        assert type(tool.make_more()) is type(tool) and tool.doubler(4) == 8
        assert [tool.show(v) for v in (1, [], "s")] == ["int", "list", "object"]


@case
def instances_of_one_class_before_and_after_it_was_replaced():
    class Old:
        def answer(self):
            return "old"

    def build():
        first = Old()

        class New(type(first)):
            def answer(self):
                return "new after " + super().answer()

        return [first, New()]

    def check(found):
        assert [x.answer() for x in found] == ["old", "new after old"]


@case
def mixins_over_builtins_and_slots():
    class Named:
        __slots__ = ()

        def describe(self):
            return f"{type(self).__name__}({len(self)})"

    class Items(Named, list):
        __slots__ = ("owner",)

    def build():
        items = Items([1, 2])
        items.owner = {"items": items}
        return items

    def check(items):
        assert items.describe() == "Items(2)" and items.owner["items"] is items
        assert not hasattr(items, "__dict__")


@case
def doc_annotations_and_dynamic_attributes_of_a_class():
    class Model:
        """A model."""

        x: int = 1
        y: "list[str]"

        def run(self, n: int = 3) -> str:
            """Run it."""
            return "x" * n

    def build():
        Model.extra = [Model]
        model = Model()
        model.kind = type("Copy", (Model,), {"__doc__": "A copy.", "z": 5})
        return model

    def check(model):
        kind = type(model)
        assert kind.__doc__ == "A model." and kind.run.__doc__ == "Run it."
        assert kind.__annotations__["x"] in (int, "int")
        assert model.run() == "xxx" and kind.run.__annotations__["return"] in (str, "str")
        assert model.kind.__doc__ == "A copy." and model.kind().z == 5
        assert issubclass(model.kind, kind)


@case
def instances_that_share_their_attributes():
    class Borg:
        _shared = {}

        def __init__(self):
            self.__dict__ = self._shared

    class Other(Borg):
        pass

    def build():
        borg = Borg()
        borg.name = "one"
        return [borg, Borg(), Other()]

    def check(borgs):
        one, two, other = borgs
        assert one.name == two.name == other.name == "one"
        two.name = "two"
        assert one.name == "two" == type(one)().name == other.name
        one.name = "one"


@case
def singleton_by_metaclass():
    class Single(type):
        def __call__(cls, *args):
            if "instance" not in cls.__dict__:
                cls.instance = super().__call__(*args)
            return cls.instance

    class Config(metaclass=Single):
        def __init__(self):
            self.values = {}

    def build():
        config = Config()
        config.values["a"] = 1
        return [config, Config()]

    def check(pair):
        assert pair[0] is pair[1] and pair[0].values == {"a": 1}


@case
def containers_that_check_what_is_put_in():
    from collections import OrderedDict, defaultdict, deque

    class Bounded(list):
        def __init__(self, limit):
            super().__init__()
            self.limit = limit

        def append(self, item):
            if len(self) >= self.limit:
                raise OverflowError
            super().append(item)

        def extend(self, items):
            for item in items:
                self.append(item)

    class Typed(dict):
        def __init__(self, kind):
            self.kind = kind

        def __setitem__(self, key, value):
            super().__setitem__(key, self.kind(value))

    class Lru(OrderedDict):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            while len(self) > self.size:
                self.popitem(last=False)

    class Groups(defaultdict):
        def __init__(self, name):
            super().__init__(list)
            self.name = name

    class Window(deque):
        def __init__(self, size):
            super().__init__(maxlen=size)
            self.total = 0

        def append(self, item):
            self.total += item
            super().append(item)

    def build():
        bounded, typed, lru, groups, window = Bounded(2), Typed(int), Lru(2), Groups("g"), Window(2)
        bounded.append(1)
        typed["a"] = "5"
        lru["x"], lru["y"] = 1, 2
        groups["k"].append(groups)
        window.append(3)
        return [bounded, typed, lru, groups, window]

    def check(found):
        bounded, typed, lru, groups, window = found
        bounded.append(2)
        assert bounded == [1, 2] and typed == {"a": 5} and typed.kind is int
        lru["z"] = 3
        assert list(lru) == ["y", "z"]
        assert groups.name == "g" and groups["k"][0] is groups and groups["new"] == []
        window.append(1)
        window.append(1)
        assert list(window) == [1, 1] and window.total == 5 and window.maxlen == 2
        bounded.pop()
        del lru["z"], groups["new"]
        lru.move_to_end("y", last=False)
        lru["x"] = 1
        lru.move_to_end("x", last=False)
        window.clear()
        window.total = 0
        window.append(3)


@case
def values_kept_by_descriptors_in_weak_tables():
    import weakref

    class Typed:
        def __init__(self, kind, default=None):
            self.kind, self.default = kind, default
            self.values = weakref.WeakKeyDictionary()

        def __set_name__(self, owner, name):
            self.name = name

        def __get__(self, obj, owner=None):
            if obj is None:
                return self
            return self.values.get(obj, self.default)

        def __set__(self, obj, value):
            if not isinstance(value, self.kind):
                raise TypeError(self.name)
            self.values[obj] = value

    class Point:
        x = Typed(int, 0)
        y = Typed(int, 0)

    def build():
        p = Point()
        p.x = 5
        q = Point()
        q.y = 7
        return [p, q]

    def check(s):
        p, q = s
        assert (p.x, p.y, q.x, q.y) == (5, 0, 0, 7)
        p.y = 3
        assert q.y == 7
        try:
            p.x = "no"
        except TypeError as e:
            assert str(e) == "x"
        else:
            raise AssertionError


@case
def proxy_that_claims_its_targets_class():
    class Proxy:
        def __init__(self, target):
            object.__setattr__(self, "_t", target)

        def __getattr__(self, name):
            return getattr(object.__getattribute__(self, "_t"), name)

        def __setattr__(self, name, value):
            setattr(object.__getattribute__(self, "_t"), name, value)

        @property
        def __class__(self):
            return type(object.__getattribute__(self, "_t"))

    class Real:
        def __init__(self):
            self.v = 1

        def up(self):
            self.v += 1
            return self.v

    def build():
        r = Real()
        return {"p": Proxy(r), "r": r}

    def check(s):
        p, r = s["p"], s["r"]
        assert type(p) is not type(r) and isinstance(p, type(r))
        assert p.up() == 2 and r.v == 2
        p.v = 10
        assert r.v == 10


@case
def one_instance_for_each_key():
    import weakref

    class Node:
        cache = weakref.WeakValueDictionary()

        def __new__(cls, key):
            found = cls.cache.get(key)
            if found is None:
                found = super().__new__(cls)
                found.key = key
                cls.cache[key] = found
            return found

        def __getnewargs__(self):
            return (self.key,)

    def build():
        return {"a": Node("a"), "again": Node("a"), "b": Node("b")}

    def check(s):
        assert s["a"] is s["again"] and s["a"] is not s["b"]
        assert type(s["a"])("a") is s["a"]
        assert type(s["b"])("b") is s["b"]


@case
def attributes_in_a_dict_of_ones_own():
    class Obs(dict):
        def __setitem__(self, k, v):
            self.log = getattr(self, "log", [])
            self.log.append(k)
            super().__setitem__(k, v)

    class Model:
        def __init__(self):
            self.__dict__ = Obs()
            self.__dict__["a"] = 1
            self.b = 2

    def build():
        return Model()

    def check(m):
        assert m.a == 1 and m.b == 2
        assert type(m.__dict__).__name__ == "Obs" and m.__dict__.log == ["a"]


@case
def two_objects_with_the_same_attributes():
    class A:
        pass

    def build():
        a, b = A(), A()
        b.__dict__ = a.__dict__
        a.x = 1
        return [a, b]

    def check(s):
        a, b = s
        assert b.x == 1
        a.y = 5
        assert b.y == 5
        del a.y


@case
def closure_over_an_objects_attributes():
    class Reactive:
        def __init__(self):
            d = vars(self)
            self.get = lambda k: d.get(k)
            self.v = 1

    def build():
        return Reactive()

    def check(r):
        r.v = 2
        assert r.get("v") == 2
        r.v = 1


@case
def objects_that_hold_their_own_attributes():
    class P:
        def __init__(self, t):
            self.__dict__["t"] = t
            self.__dict__["cache"] = self.__dict__

        def __getattr__(self, n):
            return getattr(self.__dict__["t"], n)

    class M:
        __slots__ = ("a", "__dict__")

        def __init__(self):
            self.a = self.__dict__

    def build():
        m = M()
        m.x = 1
        return [P("text"), m]

    def check(s):
        p, m = s
        p.cache["new"] = 5
        assert p.new == 5 and p.upper() == "TEXT"
        m.a["y"] = 2
        assert m.y == 2
        del p.cache["new"], m.a["y"]


@case
def dict_whose_items_are_its_attributes():
    import collections

    class AttrDict(dict):
        def __init__(self, *a, **k):
            super().__init__(*a, **k)
            self.__dict__ = self

    class ODict(collections.OrderedDict):
        def __init__(self, *a):
            super().__init__(*a)
            self.__dict__ = self

    def build():
        a = AttrDict(x=1)
        a.y = [a]
        return [a, AttrDict(n=a)]

    def check(s):
        a, b = s
        a.z = 3
        assert a["z"] == 3 and a["y"][0] is a
        a["q"] = 4
        assert a.q == 4 and b.n is a
        del a["q"], a["z"]


@case
def class_that_knows_its_instances():
    import weakref

    class Listener:
        everyone = weakref.WeakSet()

        def __init__(self, n):
            self.n = n
            self.everyone.add(self)

        @classmethod
        def total(cls):
            return sum(one.n for one in cls.everyone)

    def build():
        return [Listener(1), Listener(2)]

    def check(s):
        assert type(s[0]).total() >= 3 and s[0] in type(s[0]).everyone


@case
def slots_that_a_metaclass_makes():
    class Meta(type):
        def __new__(m, n, b, ns):
            fields = [k for k, v in ns.items() if isinstance(v, Field)]
            ns["_fields"] = fields
            ns["__slots__"] = tuple("_" + f for f in fields)
            return super().__new__(m, n, b, ns)

    class Field:
        def __init__(self, default):
            self.default = default

        def __set_name__(self, o, n):
            self.n = "_" + n

        def __get__(self, o, t=None):
            return self if o is None else getattr(o, self.n, self.default)

        def __set__(self, o, v):
            setattr(o, self.n, v)

    class Rec(metaclass=Meta):
        a = Field(1)
        b = Field([])

    def build():
        r = Rec()
        r.b = [r]
        return r

    def check(r):
        assert (
            r.a == 1
            and r.b[0] is r
            and type(r)._fields == ["a", "b"]
            and not hasattr(r, "__dict__")
        )


@case
def objects_that_answer_no_question():
    class V:
        def __init__(self, x):
            self.x = x

        def __eq__(self, o):
            raise RuntimeError("no compare")

        __hash__ = object.__hash__

        def __bool__(self):
            raise RuntimeError("no bool")

        def __len__(self):
            raise RuntimeError("no len")

        def __iter__(self):
            raise RuntimeError("no iter")

        def __repr__(self):
            raise RuntimeError("no repr")

    def build():
        v = V(1)
        return {"v": v, "l": [v, v], "k": {v: 1}}

    def check(d):
        assert d["v"].x == 1 and d["l"][0] is d["v"] and next(iter(d["k"])) is d["v"]


@case
def plugins_that_register_by_key():
    import types

    class Plugin:
        hooks = types.MappingProxyType({"a": 1})
        registry = {}

        def __init_subclass__(cls, /, key, **kw):
            super().__init_subclass__(**kw)
            Plugin.registry[key] = cls

    class P1(Plugin, key="one"):
        pass

    class P2(P1, key="two"):
        pass

    def build():
        return {"p": P2(), "R": Plugin}

    def check(d):
        R = d["R"]
        assert (
            R.registry["two"] is type(d["p"])
            and set(R.registry) == {"one", "two"}
            and R.hooks["a"] == 1
        )


@case
def class_that_finds_its_instances():
    import weakref

    class Model:
        _all = weakref.WeakValueDictionary()

        def __init__(self, pk):
            self.pk = pk
            Model._all[pk] = self

        @classmethod
        def get(cls, pk):
            return cls._all.get(pk)

    def build():
        return [Model(1), Model(2)]

    def check(s):
        assert type(s[0]).get(1) is s[0] and type(s[0]).get(2) is s[1]
