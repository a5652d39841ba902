"""Versions of dicts: each change is seen by them, and what is not looked into has not changed."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from serializers import fingerprints, parts, versions
from serializers.fingerprints import Fingerprint
from serializers.parts import Cut, Instant, Part
from serializers.versions import patched, picked, version_of, versions_of
from tests.serializers import stream_classes as classes
from tests.serializers.test_parts import Copy

known = pytest.mark.skipif(not versions.are_known, reason="this Python gives dicts no versions")


def test_this_python_gives_dicts_versions_if_it_is_one_of_those_that_do() -> None:
    is_one = sys.implementation.name == "cpython" and (3, 11) <= sys.version_info < (3, 14)
    assert versions.are_known is is_one


CHANGES: dict[str, Callable[[dict[Any, Any]], object]] = {
    "another value": lambda held: held.__setitem__("a", 10**6),
    "an equal value of another type": lambda held: held.__setitem__("a", True),
    "a new key": lambda held: held.__setitem__("new", None),
    "a key less": lambda held: held.__delitem__("b"),
    "the last key again": lambda held: held.__setitem__("c", held.pop("c")),
    "the first key again": lambda held: held.__setitem__("a", held.pop("a")),
    "popitem": lambda held: held.popitem(),
    "setdefault": lambda held: held.setdefault("new", 1),
    "update": lambda held: held.update(a=7),
    "update from pairs": lambda held: held.update([("a", 7)]),
    "update of the empty": lambda held: (held.clear(), held.update({"a": 1})),
    "clear": lambda held: held.clear(),
    "or": lambda held: held.__ior__({"a": 7}),
    "init": lambda held: held.__init__(a=7),  # type: ignore[misc]
    "growth": lambda held: held.update(dict.fromkeys(range(1000))),
    "as a namespace": lambda held: exec("a = 7", {}, held),
    "as global names": lambda held: exec("a = 7", held),
    "by an instance": lambda held: setattr(_with_dict(held), "a", 7),
    "away by an instance": lambda held: delattr(_with_dict(held), "a"),
}


def _with_dict(held: dict[Any, Any]) -> Any:
    made = classes.Plain()
    made.__dict__ = held
    return made


def _instance() -> classes.Plain:
    return classes.Plain(a=1, b=0.5, c="c")


@known
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", ["a dict", "attributes", "attributes set one by one"])
def test_each_change_of_a_dict_is_seen_by_its_version(change: str, make: str) -> None:
    held: Any = {"a": 1, "b": 0.5, "c": "c"}
    owner: Any = _instance()
    if make == "attributes":
        held = vars(owner)
    elif make == "attributes set one by one":
        owner = classes.Data(1)
        owner.c = "c"
        held = vars(owner)
    other = {"other": 1}
    made = versions_of((held, other))
    if made is None:
        assert version_of(held) == 0
        return  # It does not tell, and says so.
    assert made.look() == made.seen

    CHANGES[change](held)

    now = made.look()
    assert now[:8] != made.seen[:8]
    assert now[8:] == made.seen[8:]


@known
def test_attributes_that_change_are_seen_or_their_versions_are_not_given() -> None:
    """Also once the interpreter has made a short cut of it."""
    owners = [_instance() for _ in range(2)]
    made = versions_of(tuple(map(vars, owners)))
    if made is None:
        assert sys.version_info >= (3, 13)
        return
    for n in range(1000):
        owners[0].a = n  # type: ignore[attr-defined]
        now = made.look()
        assert now[:8] != made.seen[:8]
        assert now[8:] == made.seen[8:]
        made.seen = now


@known
def test_what_changes_nothing_is_no_other_version() -> None:
    held: dict[Any, Any] = {"a": 1, "b": 0.5}
    before = version_of(held)
    held["a"] = held["a"]
    held.update(held)
    assert held.get("none") is None and held == dict(held) and list(held.items())
    assert version_of(held) == before != 0


@known
def test_no_two_dicts_have_one_version() -> None:
    made = [{"a": 1} for _ in range(100)]
    found = {version_of(held) for held in (*made, *map(dict, made), *[{**held} for held in made])}
    assert len(found) == 300


@known
def test_what_is_no_dict_has_no_version() -> None:
    for other in ([], (), classes.Table(a=1), None, 10**30):
        assert version_of(other) == 0
    assert versions_of(({},)) is None  # One alone: it is compared soon enough.


def test_some_words_of_a_row_are_replaced() -> None:
    row = bytes(range(40))
    assert patched(row, [], b"") == row
    assert patched(row, [1, 4], b"x" * 8 + b"y" * 8) == row[:8] + b"x" * 8 + row[16:32] + b"y" * 8
    assert picked(row, [4, 0]) == row[32:] + row[:8]


# -- fingerprints of what has versions


def _content(record: Any) -> Any:
    """What it is made of, immutable values by identity, which are kept alive by whoever asks."""
    kind = type(record)
    if kind is dict:
        return kind, tuple((id(key), _content(value)) for key, value in record.items())
    if kind is list:
        return kind, tuple(map(_content, record))
    if isinstance(record, classes.Plain):
        return kind, _content(vars(record))
    return kind, id(record)


def _leaf(n: int) -> Any:
    return {"id": n + 1000, "score": n / 7, "open": True, "n": 0}


def _small(n: int) -> Any:
    return {n + 1000: 1}


def _attributes(n: int) -> Any:
    return classes.Plain(a=n + 1000, b=n / 7)


def _beside(n: int) -> Any:
    return [n + 1000, _leaf(n), [_attributes(n)]]


def _vars(n: int) -> Any:
    return vars(_attributes(n))


SHAPES: tuple[Callable[[int], Any], ...] = (_leaf, _small, _attributes, _beside, _vars, float)

ODD: tuple[Any, ...] = (0, False, 0.0, -0.0, 1, True, 1.0, math.nan, float("nan"), "1", "", b"")


class Chance(random.Random):
    """Changes records at random."""

    kept: list[Any]

    def leaf_of(self, record: Any) -> dict[Any, Any] | None:
        if type(record) is list and record:
            return self.leaf_of(self.choice(record))
        if isinstance(record, classes.Plain):
            return vars(record)
        return record if type(record) is dict else None

    def change(self, record: Any) -> None:
        held = self.leaf_of(record)
        if not held:
            return
        key = self.choice(list(held))
        value = held[key]
        # Nothing is freed, so that an address tells of a value.
        self.kept += (*held, *held.values())
        what = self.randrange(12)
        if what == 0:
            held[key] = self.choice(ODD)
        elif what == 1:
            held[key] = str(value) if type(value) is str else type(value)(value)
        elif what == 2:
            held[key] = held.pop(key)
        elif what == 3:
            del held[key]
            held[f"{key}'"] = value
        elif what == 4:
            held[key] = None
            held[key] = value
        elif what == 5:
            items = list(held.items())
            held.clear()
            held.update(items[:: self.choice((1, -1))])
        elif what == 6:
            held.popitem()
        elif what == 7:
            held["more"] = self.choice(ODD)
        elif what == 8:
            held[key] = classes.Text(value) if type(value) is str else [value]
        elif what == 9:
            held.update(zip(held, [*list(held.values())[1:], value], strict=True))
        elif what == 10 and isinstance(record, classes.Plain):
            record.__dict__ = dict(record.__dict__)
        else:
            held[key] = self.random()


@pytest.mark.parametrize("share", [1, 16, 10**9])
@pytest.mark.parametrize("asked", [True, False])
def test_every_change_is_found_whether_versions_are_asked_or_not(
    monkeypatch: pytest.MonkeyPatch, share: int, asked: bool
) -> None:
    """By a comparison with what the records were, as a whole and as records that were held."""
    monkeypatch.setattr(fingerprints, "_LOOK_SHARE", share)
    if not asked:
        monkeypatch.setattr(fingerprints, "versions_of", lambda _: None)
    found_some = applied = 0
    for seed in range(150):
        chance = Chance(seed)
        chance.kept = []
        shapes = chance.sample(SHAPES, chance.choice((1, 1, 2, 3)))
        row: list[Any] = [chance.choice(shapes)(n) for n in range(chance.choice((3, 40, 90)))]
        made = Fingerprint(tuple(row))
        written = list(map(_content, row))
        for _ in range(5):
            touched = set(chance.sample(range(len(row)), chance.choice((0, 1, 2, len(row)))))
            for number in touched:
                for _ in range(chance.choice((1, 1, 3))):
                    chance.change(row[number])
            now = list(map(_content, row))
            differ = {n for n, content in enumerate(now) if content != written[n]}
            differ -= made.left_out
            for changes in (made.compare(tuple(row)), made.compare_held(Row(row))):
                found = set(changes.records)
                assert differ <= found, (seed, differ - found)
                # An attribute's dict that was replaced by its like is no difference to be seen.
                unlike = {n for n in found - differ if type(row[n]) is not classes.Plain}
                assert not unlike or any(shape is _beside for shape in shapes), (seed, unlike)
            found_some += bool(differ)
            # Whatever was told is taken for written, or is told again.
            what = chance.randrange(3)
            try:
                if what == 0 and changes.apply():
                    written = now
                    applied += bool(changes.records)
                elif what == 1:
                    made.left_out.update(changes.records)
            except fingerprints.NotPlain:
                break
    assert found_some > 100
    assert applied > 20


class Row:
    """Records that are held."""

    def __init__(self, records: list[Any]) -> None:
        self._records = records

    def value(self, number: int) -> Any:
        return self._records[number]

    def values(self) -> tuple[Any, ...]:
        return tuple(self._records)


@known
def test_a_dict_that_takes_the_place_of_one_that_is_gone_is_looked_into() -> None:
    """Its version is no other one's, even if all else is the same."""
    reused = 0
    for n in range(200):
        row: list[Any] = [{"a": n + 1000, "b": True} for n in range(20)]
        made = Fingerprint(tuple(row))
        before = id(row[7])
        row[7] = None
        made_since: list[Any] = []
        while len(made_since) < 50 and (not made_since or id(made_since[-1]) != before):
            made_since.append({"a": n + 5000, "b": 1})
        row[7] = made_since[-1]
        reused += id(row[7]) == before
        assert made.changed(tuple(row)) == [7]
    assert reused > 100


@pytest.mark.parametrize("asked", [True, False])
def test_a_value_that_came_later_stays_alive_so_that_its_address_stays_its_own(
    monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    if not asked:
        monkeypatch.setattr(fingerprints, "versions_of", lambda _: None)
    row = tuple(map(_leaf, range(50)))
    made = Fingerprint(row)
    for n in range(20):
        row[7]["score"] = n + 0.25
        changes = made.compare(row)
        assert changes.records == [7] and changes.apply()
        del changes  # It has the value too.
        before = id(row[7]["score"])
        row[7]["score"] = None
        others = [n + m / 1000 for m in range(300, 600)]
        row[7]["score"] = next((other for other in others if id(other) == before), others[0])
        assert made.changed(row) == [7]


@known
def test_no_version_is_looked_for_where_a_dict_does_not_lie_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There may be no memory at all."""
    row: list[Any] = list(map(_leaf, range(50)))
    made = Fingerprint(tuple(row))
    row[7] = dict(row[7])
    row[8] = None
    row[9]["n"] = 1

    def look(_: Any) -> bytes:
        raise AssertionError("a look at what is gone")

    monkeypatch.setattr(versions.Versions, "look", look)
    assert made.changed(tuple(row)) == [7, 8, 9]


@known
def test_dicts_that_are_as_they_were_are_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    rows_of = fingerprints._rows
    monkeypatch.setattr(
        fingerprints, "_rows", lambda kind, held: rows.append(len(held)) or rows_of(kind, held)
    )
    row = tuple(map(_leaf, range(100)))
    made = Fingerprint(row)
    assert rows == [100]
    row[3]["n"] = 1
    for changes in (made.compare(row), made.compare_held(Row(list(row)))):
        assert changes.records == [3]
    assert changes.apply() and made.changed(row) == []
    row[4]["n"] = 1
    row[4]["n"] = 0
    assert made.changed(row) == []
    assert rows == [100]


# -- containers that have versions


def rows_of(count: int) -> dict[Any, Any]:
    return {n + 1000: _leaf(n) for n in range(count)}


@known
def test_records_of_a_dict_that_is_as_it_was_are_not_taken_out() -> None:
    held = rows_of(1000)
    owners: dict[int, Part] = {}
    cut = Cut(0, held, owners)
    assert all(cut.round())
    held[1500]["n"] = 5
    taken: list[str] = []

    class Watched(dict[Any, Any]):
        def values(self) -> Any:
            taken.append("values")
            return super().values()

    found = Instant([cut], owners)
    assert [list(change.records.values()) for change in found.changes[cut]] == [[held[1500]]]
    assert all(part.version == cut.version == version_of(held) for part in cut.parts)
    # The same once it is no such dict.
    cut.container = Watched(held)
    found = Instant([cut], owners)
    assert [list(change.records.values()) for change in found.changes[cut]] == [[held[1500]]]
    assert taken


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_to_a_container_between_two_parts_is_found(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_ITEMS_FIRST", 16)
    monkeypatch.setattr(parts, "PART_BYTES", 600)
    monkeypatch.setattr(parts, "HOT_SHARE", 0)
    monkeypatch.setattr(parts, "RIVALS_MAX", 10**6)
    chance = Chance(seed)
    chance.kept = []
    held = rows_of(200)
    copy = Copy(held)
    for _ in range(4):
        for change in copy.cut.round():
            if change is not None:
                copy.take(change)
            if chance.random() < 0.2:
                _change_container(chance, held)
    if chance.random() < 0.5:
        # It may be given up in between.
        for _, change in zip(range(chance.randrange(20)), copy.cut.round(), strict=False):
            if change is not None:
                copy.take(change)
            _change_container(chance, held)
    copy.end()


def _change_container(chance: Chance, held: dict[Any, Any]) -> None:
    key = chance.choice(list(held))
    what = chance.randrange(8)
    if what == 0:
        del held[key]
    elif what == 1:
        held[chance.random()] = _leaf(chance.randrange(10**6))
    elif what == 2:
        held[key] = held.pop(key)
    elif what == 3:
        held[key] = dict(held[key])
    elif what == 4:
        # Of the same size, and with the same last item.
        last, record = held.popitem()
        held.pop(key, None)
        held[chance.random()] = _leaf(chance.randrange(10**6))
        held[last] = record
    elif what == 5:
        other = chance.choice(list(held))
        held[key], held[other] = held[other], held[key]
    else:
        held[key]["n"] = chance.choice(ODD)
