"""Large containers in parts: which of them are written again, and when a container is not cut."""

from __future__ import annotations

import pickle
import random
from typing import Any

import pytest

from serializers import parts
from serializers.fingerprints import NotPlain
from serializers.parts import Change, Cut, Instant, Part, Shared, places
from tests.serializers import stream_classes as classes


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_ITEMS_FIRST", 16)
    monkeypatch.setattr(parts, "PART_BYTES", 600)
    monkeypatch.setattr(parts, "HOT_SHARE", 0)


def rows(count: int = 400) -> dict[int, Any]:
    return {n + 1000: {"id": n, "w": [n]} for n in range(count)}


class Copy:
    """A writer of one container, and what its reader has."""

    def __init__(self, container: Any) -> None:
        self.owners: dict[int, Part] = {}
        self.container = container
        self.cut = Cut(0, container, self.owners)
        self.parts: dict[int, Any] = {}

    def take(self, change: Change) -> int:
        number = change.part.number
        if change.items is not None:
            self.parts[number] = pickle.loads(pickle.dumps(change.items))
            return len(change.items)
        held = self.parts[number]
        keys = list(held) if type(held) is dict else range(len(held))
        for position, value in pickle.loads(pickle.dumps(change.records)).items():
            held[keys[position]] = value
        return len(change.records)

    def round(self) -> int:
        """Take a round; how many records it wrote."""
        return sum(self.take(change) for change in self.cut.round() if change is not None)

    def end(self) -> int:
        """Take the last changes, and see that all is there, in order; how many it wrote."""
        found = Instant([self.cut], self.owners)
        assert found.still_holds()
        written = sum(map(self.take, found.changes[self.cut]))
        built: Any = type(self.container)()
        for part in self.cut.parts:
            (built.update if type(built) is dict else built.extend)(self.parts[part.number])
        assert repr(built) == repr(self.container)
        return written


def test_a_record_that_changed_is_written_alone() -> None:
    held = rows()
    copy = Copy(held)
    assert copy.round() == 400
    assert copy.round() == 0
    held[1100]["w"].append(1)
    held[1200] = {"id": 0}
    assert copy.round() == 2
    held[1300]["id"] = True
    assert copy.end() == 1


@pytest.mark.parametrize("seed", range(40))
def test_parts_are_found_again_wherever_they_went(seed: int) -> None:
    chance = random.Random(seed)
    held: Any = rows() if seed % 2 else list(rows().values())
    copy = Copy(held)
    copy.round()
    written = changed = 0
    for _ in range(3):
        for _ in range(3):
            where = chance.randrange(len(held))
            if type(held) is list:
                if chance.random() < 0.5:
                    held.insert(where, {"new": chance.random()})
                else:
                    del held[where]
            elif chance.random() < 0.5:
                held[chance.random()] = {"new": 1}
            else:
                del held[list(held)[where]]
            changed += 1
        written += copy.round()
    copy.end()

    # Each can make one part be written again, and what grew at the end comes with its like.
    assert written <= changed * 80


def test_a_dict_in_another_order_is_a_change() -> None:
    held = rows(40)
    copy = Copy(held)
    copy.round()
    held[1003] = held.pop(1003)
    copy.end()
    copy = Copy(held)
    copy.round()
    key = next(iter(held))
    held[float(key)] = held.pop(key)
    copy.end()


def test_a_key_that_became_an_equal_one_of_another_type_is_a_change() -> None:
    held: dict[Any, Any] = {n: [n] for n in range(400)}
    copy = Copy(held)
    copy.round()
    items = [(float(key) if key == 7 else key, value) for key, value in held.items()]
    held.clear()
    held.update(items)
    copy.end()
    assert type(list(copy.container)[7]) is float


def test_a_key_at_the_address_of_a_former_one_is_a_change() -> None:
    """Keys that are tuples are not held, so that another one can come to lie there."""
    tried = 0
    for n in range(50):
        held: dict[Any, Any] = {(key, key + 0.5): [key] for key in range(200)}
        copy = Copy(held)
        copy.round()
        key, value = held.popitem()
        before = id(key)
        del key
        fresh = (n + 1000, n + 1000.5)
        held[fresh] = value
        tried += id(fresh) == before
        copy.end()
    assert tried > 5


def test_the_container_may_change_between_any_two_steps() -> None:
    for seed in range(60):
        chance = random.Random(seed)
        held = rows(200)
        copy = Copy(held)
        for change in copy.cut.round():
            if change is not None:
                copy.take(change)
            if chance.random() < 0.3:
                key = chance.choice(list(held))
                how = chance.randrange(4)
                if how == 0:
                    held[key] = held.pop(key)
                elif how == 1:
                    del held[key]
                elif how == 2:
                    held[key]["w"] = [chance.random()]
                else:
                    held[chance.random()] = {"new": 1}
        copy.round()
        copy.end()


def test_a_list_that_moves_from_one_record_to_another_is_not_shared() -> None:
    held = rows()
    copy = Copy(held)
    copy.round()
    held[1000]["w"], held[1399]["w"] = held[1399]["w"], held[1000]["w"]
    copy.round()
    assert copy.end() <= 400
    copy = Copy(held)
    copy.round()
    held[1000]["w"], held[1399]["w"] = held[1399]["w"], held[1000]["w"]
    assert copy.end() == 2


def test_what_two_records_share_is_told_at_the_end_whenever_it_came_to_be() -> None:
    held = rows()
    copy = Copy(held)
    copy.round()
    held[1399]["w"] = held[1000]["w"]
    with pytest.raises(Shared):
        Instant([copy.cut], copy.owners)

    held = rows()
    held[1399]["w"] = held[1000]["w"]
    copy = Copy(held)
    with pytest.raises(NotPlain):
        for _ in range(20):
            copy.round()


def test_two_containers_that_share_a_record_are_told() -> None:
    owners: dict[int, Part] = {}
    one, two = rows(), rows()
    first, second = Cut(0, one, owners), Cut(1, two, owners)
    for cut in (first, second):
        list(cut.round())
    Instant([first, second], owners)
    two[1003] = one[1004]
    with pytest.raises(Shared):
        Instant([first, second], owners)


def test_a_container_within_a_record_of_another_one_is_told() -> None:
    owners: dict[int, Part] = {}
    one, numbers = rows(), {n: n for n in range(100)}
    one[1003]["numbers"] = numbers
    first, second = Cut(0, one, owners), Cut(1, numbers, owners)
    for cut in (first, second):
        list(cut.round())
    with pytest.raises(Shared) as told:
        Instant([first, second], owners)
    assert told.value.cut is first


def test_what_changed_after_the_last_look_is_noticed() -> None:
    changes: list[Any] = [
        lambda held: held[1000].update(id="x"),
        lambda held: held[1399]["w"].append(1),
        lambda held: held.pop(1000),
        lambda held: held.update(new=1),
        lambda held: held.update({1000: held.pop(1000)}),
        lambda held: held[1007].update(id="again"),
    ]
    for change in changes:
        held = rows()
        copy = Copy(held)
        copy.round()
        held[1007]["id"] = "changed already"
        found = Instant([copy.cut], copy.owners)
        assert found.still_holds()
        change(held)
        assert not found.still_holds()


def test_records_are_where_they_are_said_to_be() -> None:
    for held in (rows(), list(rows().values())):
        copy = Copy(held)
        copy.round()
        found = places(copy.cut)
        assert len(found) == 400
        at = {part.number: part for part in copy.cut.parts}
        values = list(held.values()) if type(held) is dict else held
        start = 0
        for part in copy.cut.parts:
            for position in range(part.count):
                assert found[id(values[start + position])] == (part.number, position)
            start += part.count
        assert set(at) == {number for number, _ in found.values()}


def test_a_container_of_other_records_is_not_cut_or_not_any_more() -> None:
    with pytest.raises(NotPlain):
        Cut(0, [classes.Stateful(a=n) for n in range(100)], {})
    held = rows()
    copy = Copy(held)
    copy.round()
    held[1300]["w"] = classes.Stateful(a=1)
    with pytest.raises(Shared):
        Instant([copy.cut], copy.owners)
    with pytest.raises(NotPlain):
        copy.round()


def test_a_container_most_of_which_changes_is_not_cut_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "HOT_SHARE", 4)
    held = rows()
    copy = Copy(held)
    copy.round()
    for record in held.values():
        record["id"] += 1
    with pytest.raises(Shared):
        Instant([copy.cut], copy.owners)
    with pytest.raises(NotPlain):
        copy.round()


def _records_of_all_shapes() -> list[Any]:
    shared = tuple(range(50))
    return [
        rows(),
        [{"id": n, "w": n % 2 == 0} for n in range(400)],
        {n: [None] for n in range(400)},
        {n: [shared, (n, None)] for n in range(400)},
        {n: classes.Slotted(n, {True}) for n in range(400)},
        {n: (classes.Plain(a=n, b=(shared,)), shared) for n in range(400)},
        list(range(400)),
        [None] * 400,
        [{}] + [{None: None} for _ in range(399)],
    ]


@pytest.mark.parametrize("shape", range(len(_records_of_all_shapes())))
def test_what_did_not_change_takes_at_least_what_it_is_said_to(shape: int) -> None:
    held: Any = _records_of_all_shapes()[shape]
    places: list[Any] = list(held) if type(held) is dict else list(range(len(held)))
    spare: Any = _records_of_all_shapes()[shape]
    written: list[list[Any]] = [[], places[7:9], places[30:300:9], places[50:90], places]
    copy = Copy(held)
    copy.round()
    for changed in written:
        for at in changed:
            if shape in (0, 1):
                held[at]["w"] = -1
            elif type(spare[at]) is tuple:
                held[at] = (*spare[at], 1)
            else:
                held[at] = [1, 2]
        found = Instant([copy.cut], copy.owners, goes_on=True)
        whole = {c.part for c in found.changes[copy.cut] if c.items is not None}
        same: Any = []
        for part, items in copy.cut.all_items():
            if part in whole:
                continue
            gone = {n for c in found.changes[copy.cut] if c.part is part for n in c.records}
            keys = items.keys()
            for n, value in enumerate(items.values()):
                if n not in gone:
                    same.append(value if keys is None else (keys[n], value))
        took = len(pickle.dumps(dict(same) if type(held) is dict else same, 4))
        roughly = found.unchanged_bytes_min([copy.cut], closely=False)
        closely = found.unchanged_bytes_min([copy.cut], closely=True)
        assert min(len(same), took) <= roughly <= closely <= took
        if shape == 0 and same:
            assert closely >= took / 3
        found.commit(copy.cut)


def test_a_container_that_is_let_go_of_claims_nothing() -> None:
    copy = Copy(rows())
    copy.round()
    assert copy.owners
    copy.cut.release()
    assert not copy.owners
    assert copy.cut.container == {}
