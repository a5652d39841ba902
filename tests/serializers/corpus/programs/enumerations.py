"""Enums of every make; members have to stay the members."""

from ..cases import case


@case
def enum_members_as_state_and_keys():
    import enum

    class State(enum.Enum):
        IDLE = "idle"
        BUSY = "busy"
        WAITING = "idle"

        @property
        def next(self):
            return State.BUSY if self is State.IDLE else State.IDLE

    class Machine:
        def __init__(self):
            self.state = State.IDLE
            self.count = {State.IDLE: 0, State.BUSY: 0}

        def step(self):
            self.state = self.state.next
            self.count[self.state] += 1

    def build():
        machine = Machine()
        machine.step()
        return machine

    def check(machine):
        kind = type(machine.state)
        assert machine.state is kind.BUSY and machine.count[kind.BUSY] == 1
        machine.step()
        assert machine.state is kind.IDLE is kind("idle") is kind.WAITING
        assert list(kind) == [kind.IDLE, kind.BUSY] and kind["WAITING"].name == "IDLE"


@case
def flags_and_int_flags():
    import enum

    class Access(enum.IntFlag):
        READ = 1
        WRITE = 2
        BOTH = READ | WRITE

    class Strict(enum.Flag, boundary=enum.CONFORM):
        A = enum.auto()
        B = enum.auto()

    class File:
        def __init__(self):
            self.access = Access.READ
            self.strict = Strict.A

    def build():
        file = File()
        file.access |= Access.WRITE
        file.strict = ~file.strict
        return file

    def check(file):
        kind, strict = type(file.access), type(file.strict)
        assert file.access == kind.BOTH and file.access & kind.READ
        assert file.access ^ kind.WRITE is kind.READ
        assert file.access == 3 and isinstance(file.access, int)
        assert file.strict is strict.B and strict.A not in file.strict
        assert strict(7) == strict.A | strict.B


@case
def enum_with_an_init_and_methods():
    import enum

    class Planet(enum.Enum):
        EARTH = (5.9, 6.3)
        MARS = (0.6, 3.3)

        def __init__(self, mass, radius):
            self.mass, self.radius = mass, radius
            self.visits = []

        @property
        def density(self):
            return self.mass / self.radius

    def build():
        return [Planet.EARTH, Planet.MARS]

    def check(planets):
        earth, mars = planets
        kind = type(earth)
        assert earth is kind.EARTH and earth.mass == 5.9 and mars.density == 0.6 / 3.3
        assert kind((0.6, 3.3)) is mars and len(kind) == 2 and earth.visits == []


@case
def enum_functional_nested_and_mixed():
    import enum

    class Job:
        class Kind(enum.Enum):
            SMALL = 1
            LARGE = 2

        class Name(str, enum.Enum):
            A = "a"

        Level = enum.IntEnum("Level", "LOW HIGH", module=__name__, qualname="Job.Level")

        def __init__(self):
            self.kind, self.name, self.level = self.Kind.LARGE, self.Name.A, self.Level.HIGH

    def build():
        return Job()

    def check(job):
        kind = type(job)
        assert job.kind is kind.Kind.LARGE and job.name is kind.Name.A
        assert job.name.upper() == "A" and job.name == "a"
        assert job.level is kind.Level.HIGH and job.level > 1 and kind.Level(1).name == "LOW"


@case
def str_enum_and_auto_values():
    import enum

    class Colour(enum.StrEnum):
        RED = enum.auto()
        DARK_BLUE = enum.auto()

    class Ordered(enum.Enum):
        def _generate_next_value_(name, start, count, last_values):
            return name.lower() + str(count)

        ONE = enum.auto()
        TWO = enum.auto()

        def __lt__(self, other):
            return self.value < other.value

    def build():
        return {"colour": Colour.RED, "order": [Ordered.TWO, Ordered.ONE]}

    def check(found):
        colour, order = found["colour"], found["order"]
        assert colour is type(colour).RED and f"{colour}" == "red"
        assert type(colour)("dark_blue") is type(colour).DARK_BLUE
        assert [o.value for o in sorted(order)] == ["one0", "two1"]


@case
def enum_with_missing_and_new():
    import enum

    class Code(enum.Enum):
        def __new__(cls, number, text):
            made = object.__new__(cls)
            made._value_ = number
            made.text = text
            return made

        OK = 200, "fine"
        GONE = 410, "gone"

        @classmethod
        def _missing_(cls, value):
            return cls.OK if value == "ok" else None

    def build():
        return Code.GONE

    def check(code):
        kind = type(code)
        assert code is kind(410) is kind.GONE and code.text == "gone"
        assert kind("ok") is kind.OK and [c.text for c in kind] == ["fine", "gone"]


@case
def enum_whose_members_are_functions():
    import enum
    from functools import partial

    class Operation(enum.Enum):
        ADD = enum.member(partial(lambda a, b: a + b))
        MUL = enum.member(partial(lambda a, b: a * b))

        def __call__(self, a, b):
            return self.value(a, b)

    def build():
        return [Operation.ADD, Operation.MUL]

    def check(found):
        add, mul = found
        assert add(2, 3) == 5 and mul(2, 3) == 6 and type(add).MUL is mul
