"""What a fingerprint takes for plain, and that it sees each change of what it took down."""

from __future__ import annotations

import collections
import copyreg
import datetime
import decimal
import enum
import pathlib
import random
import uuid
import weakref
import zoneinfo
from collections.abc import Callable
from typing import Any

import pytest

from serializers import fingerprints, register
from serializers.fingerprints import Fingerprint, NotPlain, look_again
from serializers.resources import REDUCERS, on_register
from serializers.stream import StreamReader, StreamWriter
from tests.serializers import stream_classes as classes


def records(make: Callable[[int], Any], count: int = 40) -> tuple[Any, ...]:
    return tuple(make(n) for n in range(count))


def _plain(n: int) -> Any:
    return classes.Plain(a=n + 1000, b=[n, {"x": (n, [n / 7])}], c={n, "s"})


def _dict(n: int) -> Any:
    return {"id": n + 1000, "w": [n + 1000, {"x": str(n)}], "t": (n, [n])}


def _slotted(n: int) -> Any:
    return classes.Tagged(n + 1000, [n, (n, {"s": classes.Slotted(a=n, b=[n])})], str(n))


MIXED: tuple[Callable[[int], Any], ...] = (
    _plain,
    _dict,
    _slotted,
    lambda n: [n, _dict(n)],
    float,
)


def changes_of(record: Any) -> list[Callable[[], None]]:
    """Changes, each to be made to a fresh record, at all depths."""
    if type(record) is classes.Plain:
        return [
            lambda: setattr(record, "a", float(record.a)),
            lambda: setattr(record, "a", True),
            lambda: delattr(record, "a"),
            lambda: setattr(record, "d", None),
            lambda: setattr(record, "__class__", classes.Other),
            lambda: setattr(record, "__dict__", dict(record.__dict__)),
            lambda: setattr(record, "__dict__", classes.Table(record.__dict__)),
            lambda: record.b.append(1),
            lambda: record.b.reverse(),
            lambda: record.b[1]["x"][1].append(1),
            lambda: record.b[1]["x"][1].clear(),
            lambda: record.b[1].update(x=(0, [0])),
            lambda: record.c.add("new"),
            lambda: record.c.clear(),
        ]
    if type(record) is dict:
        return [
            lambda: record.update(id=float(record["id"])),
            lambda: record.update(id=record.pop("id")),
            lambda: record.update(new=None),
            lambda: record.clear(),
            lambda: record["w"].insert(0, record["w"].pop()),
            lambda: record["w"][1].update(x=b"x"),
            lambda: record["w"][1].pop("x"),
            lambda: record["t"][1].append(2),
            lambda: record["t"][1].__setitem__(0, float(record["t"][1][0])),
        ]
    return []


@pytest.mark.parametrize("kind", [_plain, _dict])
def test_every_change_is_seen_in_the_record_that_has_it_and_in_no_other(
    kind: Callable[[int], Any],
) -> None:
    for number in range(len(changes_of(kind(0)))):
        row = records(kind)
        made = Fingerprint(row)
        assert made.changed(row) == []

        changes_of(row[7])[number]()
        changes_of(row[23])[number]()

        assert made.changed(row) == [7, 23], number


@pytest.mark.parametrize("seed", range(30))
def test_many_changes_at_once_are_all_seen(seed: int) -> None:
    chance = random.Random(seed)
    kinds = [chance.choice(MIXED) for _ in range(60)]
    row = tuple(kind(n) for n, kind in enumerate(kinds))
    made = Fingerprint(row)
    changed: set[int] = set()
    now = list(row)
    for number in chance.sample(range(60), chance.randint(0, 30)):
        if chance.random() < 0.4:
            now[number] = chance.choice(MIXED)(number + 5)
        else:
            changes = changes_of(now[number])
            if not changes:
                continue
            for change in chance.sample(changes, chance.choice((1, 1, 2))):
                try:
                    change()
                except (KeyError, IndexError, AttributeError, TypeError):
                    continue
        changed.add(number)

    assert set(made.changed(tuple(now))) == changed


def test_an_equal_value_of_another_type_or_sign_is_a_change() -> None:
    pairs: list[tuple[Any, Any]] = [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (0, False),
        (2**70, float(2**70)),
        (decimal.Decimal("1"), decimal.Decimal("1.0")),
        (datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 1, fold=1)),
        (None, ...),
        ("a", b"a"),
        (frozenset((1,)), frozenset((True,))),
        ((1, 2), (1.0, 2)),
    ]
    row = tuple([before] for before, _ in pairs)
    made = Fingerprint(row)
    for number, (_, after) in enumerate(pairs):
        row[number][0] = after

    assert made.changed(row) == list(range(len(pairs)))


def test_an_address_that_is_used_again_does_not_pass_for_what_was_there() -> None:
    """Each is freed and made again at once; none of the values is a constant."""
    makes: tuple[Callable[[int], Any], ...] = (
        lambda n: [n],
        lambda n: n + 0.5,
        lambda n: n + 10**6,
        lambda n: (n, [n]),
        lambda n: f"s{n}",
        lambda n: {"x": n},
        lambda n: decimal.Decimal(n) / 7,
        lambda n: (n + 0.25,),
    )
    reused = 0
    for at, make in enumerate(makes):
        for wrap in (lambda value: [value], lambda value: [value, None, [1]]):
            for seed in range(0, 2000, 40):
                row = tuple(wrap(make(seed + n)) for n in range(20))
                made = Fingerprint(row)
                for number in range(0, 20, 3):
                    before = id(row[number][0])
                    row[number][0] = None
                    row[number][0] = make(seed + number + 5000)
                    reused += id(row[number][0]) == before
                assert made.changed(row) == list(range(0, 20, 3)), at
    assert reused > 100  # Of the containers; else nothing was tried.


def test_attributes_in_a_dict_of_another_type_at_the_same_address_are_a_change() -> None:
    row = tuple(classes.Plain(a=n) for n in range(3))
    made = Fingerprint(row)
    row[1].__dict__ = classes.Table(row[1].__dict__)
    # As if it had come to lie where the former one was.
    made._nodes[0].dicts = fingerprints.addresses(tuple(vars(record) for record in row))

    assert made.changed(row) == [1]


def test_immutable_values_stay_alive_as_long_as_their_fingerprint_and_mutable_ones_do_not() -> None:
    record = classes.Plain(a=1)
    seen = weakref.ref(record)
    row: Any = [classes.Plain(a=2), record]
    made = Fingerprint(tuple(row))
    del record
    row.clear()

    assert seen() is None
    assert made.count == 2


NOT_PLAIN: dict[str, Callable[[], Any]] = {
    "shadowed slot": lambda: _shadowed(),
    "getattr": lambda: classes.Proxy(a=1),
    "reduce": lambda: classes.Reduced(a=1),
    "getstate": lambda: classes.Stateful(a=1),
    "del": lambda: classes.Finalized(a=1),
    "new": lambda: classes.Made(a=1),
    "metaclass": lambda: classes.OfMeta(a=1),
    "named tuple": lambda: classes.Pair(1, 2),
    "str": lambda: classes.Text("x"),
    "int": lambda: classes.Number(1),
    "dict": lambda: classes.Table(),
    "list": lambda: classes.Row(),
    "ordered": lambda: collections.OrderedDict(a=1),
    "default": lambda: collections.defaultdict(list),
    "deque": lambda: collections.deque([1]),
    "bytearray": lambda: bytearray(3),
    "function": lambda: lambda: None,
    "class": lambda: classes.Plain,
    "method": lambda: classes.Plain().method,
    "exception": lambda: ValueError(1),
    "odd zone": lambda: datetime.datetime(2020, 1, 1, tzinfo=classes.OddZone()),
    "zone beside the cache": lambda: datetime.time(1, tzinfo=zoneinfo.ZoneInfo.no_cache("UTC")),
    "long string": lambda: "x" * 2000,
    "large integer": lambda: 1 << 2000,
    "by value": lambda: type("Local", (), {"__module__": "__main__"})(),
    "replaced __dict__": lambda: _with_table(),
}


def _shadowed() -> Any:
    made = classes.Shadowed(1, 2)
    vars(classes.Slotted)["a"].__set__(made, 1)
    return made


def _with_table() -> Any:
    made = classes.Plain()
    made.__dict__ = classes.Table(a=1)
    return made


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_more_than_its_references_is_not_plain(kind: str) -> None:
    look_again()
    for wrap in (lambda v: v, lambda v: [v], lambda v: {"k": (v,)}, lambda v: classes.Plain(a=v)):
        with pytest.raises(NotPlain):
            Fingerprint((wrap(NOT_PLAIN[kind]()),))


def test_what_is_shared_within_records_is_not_plain() -> None:
    one: list[Any] = [1]
    plain = classes.Plain(a=1)
    other = classes.Plain()
    other.__dict__ = plain.__dict__
    cycle: list[Any] = []
    cycle.append(cycle)
    for row in (([one], [one]), (one, one), (plain, other), ([one, one],), (cycle,), ((one, one),)):
        with pytest.raises(NotPlain):
            Fingerprint(row)


class Odd(enum.Enum):
    A = [1]  # noqa: RUF012 - Meant to be odd: pickle finds no member by a value like this.


class Nowhere(enum.Enum):
    A = 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        return str, ("anything",)


def test_a_slot_with_a_private_name_is_plain() -> None:
    row = (classes.Hidden(1), classes.Hidden(2))
    made = Fingerprint(row)
    row[1].__init__(True)  # type: ignore[misc]

    assert made.changed(row) == [1]


def test_members_of_enumerations_are_plain_if_their_value_tells_them() -> None:
    row = ([classes.Colour.RED], [classes.Colour.BLUE], [classes.Flags.A | classes.Flags.B])
    made = Fingerprint(row)
    row[0][0] = classes.Colour.BLUE
    assert made.changed(row) == [0]

    for member in (Odd.A, Nowhere.A):
        with pytest.raises(NotPlain):
            Fingerprint(([member],))


def test_all_usual_immutable_values_are_plain() -> None:
    zone = zoneinfo.ZoneInfo("UTC")
    values: list[Any] = [
        *(1, 1.5, 1j, True, "s", b"b", None, ..., NotImplemented, range(3)),
        *(datetime.date(2020, 1, 1), datetime.timedelta(1), datetime.UTC),
        datetime.datetime(2020, 1, 1, tzinfo=zone),
        datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        *(decimal.Decimal("1.5"), uuid.UUID(int=1), pathlib.PurePosixPath("a")),
    ]

    row = tuple([value] for value in values)

    assert Fingerprint(row).changed(row) == []


def test_a_class_that_is_patched_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    Fingerprint((classes.Data(1),))
    before = look_again()
    assert look_again() == before

    monkeypatch.setattr(classes.Data, "__getstate__", lambda self: {}, raising=False)

    assert look_again() > before
    with pytest.raises(NotPlain):
        Fingerprint((classes.Data(1),))


def test_a_registration_with_copyreg_is_noticed() -> None:
    look_again()
    Fingerprint((classes.Data(1), [uuid.UUID(int=1)]))
    for kind in (classes.Data, uuid.UUID):
        before = look_again()
        copyreg.pickle(kind, lambda _: (int, (1,)))  # type: ignore[arg-type]
        try:
            assert look_again() > before
            with pytest.raises(NotPlain):
                Fingerprint(([classes.Data(1), uuid.UUID(int=1)],))
        finally:
            del copyreg.dispatch_table[kind]
    look_again()
    Fingerprint((classes.Data(1), [uuid.UUID(int=1)]))


def test_a_registered_reducer_is_noticed() -> None:
    Fingerprint(([decimal.Decimal(1)],))
    before = look_again()
    register(decimal.Decimal, lambda _: (int, (1,)))
    try:
        assert look_again() > before
        with pytest.raises(NotPlain):
            Fingerprint(([decimal.Decimal(1)],))
    finally:
        del REDUCERS[decimal.Decimal]
        for forget in on_register:
            forget()
        look_again()


def test_addresses_are_those_that_id_gives() -> None:
    row = (1, "two", None, object())
    assert fingerprints.addresses(row) == fingerprints._ask_addresses(row)
    assert fingerprints.are_at(row, fingerprints._ask_addresses(row))
    assert not fingerprints.are_at(row[:3], fingerprints._ask_addresses(row))
    assert not fingerprints.are_at((2, *row[1:]), fingerprints._ask_addresses(row))


# ---------------------------------------------------------------- slots


@pytest.mark.parametrize(
    ("change", "is_shallow"),
    [
        (lambda record: setattr(record, "number", 10**6), True),
        (lambda record: setattr(record, "name", "another"), True),
        (lambda record: setattr(record, "number", float(record.number)), True),
        (lambda record: record.tags.append(3), False),
        (lambda record: setattr(record, "tags", [record.number]), False),
        (lambda record: delattr(record, "name"), False),
        (lambda record: setattr(record, "name", ["a list"]), False),
    ],
)
def test_a_change_in_a_slot_is_seen(change: Any, is_shallow: bool) -> None:
    records = tuple(classes.Tagged(number, [number], f"name {number}") for number in range(500))
    fingerprint = Fingerprint(records)
    assert fingerprint.changed(records) == []
    change(records[77])
    changes = fingerprint.compare(records)
    assert (changes.records, changes.is_shallow) == ([77], is_shallow)
    if is_shallow:
        assert changes.apply()
        assert fingerprint.changed(records) == []


def test_slots_beside_a_dict_and_slots_without_a_value_are_not_plain() -> None:
    with pytest.raises(NotPlain):
        Fingerprint((classes.TaggedMore(1, []),))
    unset = classes.Tagged(1, [])
    del unset.name
    with pytest.raises(NotPlain):
        Fingerprint((unset,))


def test_records_with_slots_go_ahead_and_arrive() -> None:
    root = classes.Server()
    root.records = {number: classes.Tagged(number, [number], str(number)) for number in range(3000)}
    writer = StreamWriter(root)
    reader = StreamReader(1 << 30)
    reader.take(writer.look())
    ended = False
    while not ended:
        pieces, ended = writer.step(1.0, 1 << 30)
        reader.take(pieces)
    root.records[5].tags.append(1)
    root.records[6].name = "six"
    last = writer.last()
    assert sum(map(len, last)) < 2000
    got: Any = reader.last(last)
    assert got.records == root.records
    writer.close()
