"""The state stream: what a reader has at its end is what a snapshot would have brought."""

from __future__ import annotations

import array
import collections
import copyreg
import datetime
import gc
import os
import pickle
import random
import subprocess
import sys
import time
import weakref
import zoneinfo
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import serializers
from rpc import shared_memory
from serializers import LoadFailed, auto, dirty, parts, resources, stream
from serializers.base import BufferKind, pack_head
from serializers.stream import _OP, StreamReader, StreamWriter
from tests.serializers import stream_classes as classes
from tests.serializers import stream_programs
from tests.serializers.stream_programs import FlatProgram, described

LIMIT_BYTES = 1 << 30
COUNT = 2000


@pytest.fixture(autouse=True)
def no_tracking_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not dirty._pages.regions


class Stream:
    """A writer and its reader, and what went between them."""

    def __init__(self, root: Any, engine: Any = "auto") -> None:
        self.root = root
        self.writer = StreamWriter(root, engine)
        self.reader = StreamReader(LIMIT_BYTES)
        self.chunks: list[bytes] = []
        self.give(self.writer.look())

    def give(self, pieces: Sequence[Any]) -> None:
        self.chunks.append(b"".join(pieces))
        self.reader.take([self.chunks[-1]])

    def round(self, between: Callable[[], None] = lambda: None) -> Stream:
        """Write a round, in as many steps as there are; call `between` after each."""
        ended = False
        while not ended:
            pieces, ended = self.writer.step(0.0, 1)
            self.give(pieces)
            between()
        return self

    def end(self) -> Any:
        """The reader's object, after having compared it with what a snapshot brings."""
        self.last = b"".join(self.writer.last())
        snapshot = serializers.dumps(self.root)
        self.writer.close()
        got: Any = self.reader.last([memoryview(bytearray(self.last))])
        want: Any = serializers.loads(snapshot)
        assert described(got) == described(want)
        assert serializers.digest(got) == serializers.digest(want)
        assert len(self.last) <= len(snapshot) * 1.01 + 1024
        self.snapshot_bytes = len(snapshot)
        return got


def server(**held: Any) -> classes.Server:
    return classes.Server(**held)


def rows(count: int = COUNT) -> dict[int, Any]:
    return {n: {"id": n, "w": [n, "x"]} for n in range(count)}


# -- by chance


ONCE_WRONG = (200_332,)
"""Seeds that found something."""
ONCE_WRONG_FOLLOWED = (500_238, 601_556)
ONCE_WRONG_FLAT = (600_509, 602_540)


ENGINES = pytest.mark.parametrize(("engine", "memory"), [("pages", False), ("hash", True)])


@ENGINES
def test_random_programs_with_streams_that_go_on(engine: Any, memory: bool) -> None:
    """Up to three at a time, some of which are promoted or lost on the way."""
    if engine == "pages" and (refusal := dirty.pages_refusal()):
        pytest.skip(f"the kernel tracks no pages here: {refusal}")
    count: collections.Counter[str] = collections.Counter()
    with stream_programs.small_thresholds():
        for seed in (*ONCE_WRONG_FOLLOWED, *range(25)):
            count.update(stream_programs.run_followed(seed, engine, memory))
        for seed in (*ONCE_WRONG_FLAT, *range(15)):
            count.update(stream_programs.run_followed(seed, engine, memory, FlatProgram))
    assert count["cuts"] > 5
    assert count["promotions"] > 5


@ENGINES
def test_random_programs_bring_what_a_snapshot_would(engine: Any, memory: bool) -> None:
    """Some of the campaign's; see `stream_campaign` for more."""
    if engine == "pages" and (refusal := dirty.pages_refusal()):
        pytest.skip(f"the kernel tracks no pages here: {refusal}")
    cuts = flat = 0
    with stream_programs.small_thresholds():
        for seed in (*ONCE_WRONG, *range(25)):
            cuts += stream_programs.run(seed, engine, memory)["cuts"]
        for seed in range(25):
            flat += stream_programs.run(seed, engine, memory, FlatProgram)["cuts"]
    assert min(cuts, flat) > 5  # Else all of them were pickled whole.


# -- what goes ahead, and what is left for the last chunk


def test_what_rounds_brought_is_collected_before_the_last_chunk_comes() -> None:
    root = server(rows={n: {"id": n, "name": f"item {n}"} for n in range(40_000)})
    made = Stream(root).round()
    assert made.reader.taken_bytes > stream.COLLECTED_BYTES_MIN
    parts_there = {id(part) for cut in made.reader._cuts.values() for part in cut.parts.values()}
    young = {id(obj) for age in (0, 1) for obj in gc.get_objects(generation=age)}
    assert parts_there and not parts_there & young

    made.end()


def test_the_collector_looks_at_nothing_else_while_a_chunk_is_taken() -> None:
    root = server(rows={n: {"id": n, "name": f"item {n}"} for n in range(40_000)})
    made = Stream(root).round()
    made.end()
    reader = StreamReader(LIMIT_BYTES)
    seen: list[int] = []

    def look(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(look)
    try:
        reader.take([b"".join(made.chunks)])
    finally:
        gc.callbacks.remove(look)
    # It may have been due before and after.
    assert seen.count(1) > 2 and len(seen) <= seen.count(1) + 2, seen


def test_a_large_string_of_bytes_is_built_where_it_was_written() -> None:
    data = os.urandom(3 << 20)
    made = Stream(server(data=data, more=[data, memoryview(data)])).round()
    data_of_it = made.round().reader._regions
    (region,) = [it for it in data_of_it.values() if len(it) == len(data)]
    assert type(region) is bytes
    built = made.end()
    assert built.data is region and built.data == data and hash(built.data) == hash(data)


def test_an_array_that_came_in_chunks_is_one_of_its_own_when_it_goes_on() -> None:
    array_of_it = np.arange(1 << 20, dtype="i8")
    moved = Stream(server(data=array_of_it)).round().end()
    assert moved.data.flags.writeable
    moved.data[0] = 7
    found = [kind for _, kind in stream._buffers_of(auto.AutoSerializer().encode(moved))]
    assert found == [BufferKind.WRITABLE]
    again = Stream(moved).round().end()
    assert again.data[0] == 7 and (again.data[1:] == array_of_it[1:]).all()


def test_the_last_chunk_has_only_what_changed() -> None:
    root = server(rows=rows(), array=np.arange(200_000))
    made = Stream(root).round()
    root.rows[77]["id"] = "new"
    root.array[5] = 6
    made.round()
    root.rows[78]["w"].append("more")

    got = made.end()

    assert len(made.last) < made.snapshot_bytes / 50
    assert got.rows[78]["w"][-1] == "more"


def test_a_second_round_takes_only_what_changed_since_the_first() -> None:
    root = server(rows=rows(), array=np.arange(200_000))
    made = Stream(root).round()
    first = sum(map(len, made.chunks))
    root.rows[77]["id"] = "new"
    root.array[5] = 6
    before = len(made.chunks)
    made.round()

    assert sum(map(len, made.chunks[before:])) < first / 50
    made.end()


@pytest.mark.parametrize("kind", [dict, list])
def test_a_round_ends_however_fast_its_container_grows(kind: type) -> None:
    held: Any = rows(2000) if kind is dict else list(rows(2000).values())
    root = server(rows=held)
    steps = 0

    def grow() -> None:
        nonlocal steps
        steps += 1
        assert steps < 100, "the round goes on for ever"
        for _ in range(2500):
            n = len(held)
            record = {"id": n, "w": [n, "x"]}
            if kind is dict:
                held[n] = record
            else:
                held.append(record)

    made = Stream(root).round(grow)
    assert len(made.end().rows) == 2000 + 2500 * steps


# -- streams that go on


class Followed:
    """A writer and the reader of a standby, and the deltas between them."""

    def __init__(self, root: Any, engine: Any = "auto") -> None:
        self.root = root
        self.writer = StreamWriter(root, engine)
        self.reader = StreamReader(LIMIT_BYTES)
        self.sizes: list[int] = []

    def delta(self) -> Followed:
        chunk = b"".join(self.writer.delta())
        self.sizes.append(len(chunk))
        self.reader.keep([chunk])
        return self

    def built(self, *, rehearsed: bool = False) -> Any:
        """The reader's object, after having compared it with what a snapshot brings."""
        if not rehearsed:
            self.writer.close()
        got: Any = self.reader.rehearse() if rehearsed else self.reader.build()
        want: Any = serializers.loads(serializers.dumps(self.root))
        assert described(got) == described(want)
        return got


def test_a_delta_has_only_what_changed_since_the_one_before() -> None:
    root = server(rows=rows(), array=np.arange(200_000), n=0)
    made = Followed(root).delta()
    for n in range(3):
        root.rows[n * 100]["id"] = "new"
        root.array[n * 20_000] = 7
        root.n = n
        made.delta()
    made.delta()

    assert all(size < made.sizes[0] / 100 for size in made.sizes[1:])
    assert made.sizes[-1] < 10_000  # The pages at the ends of an array have other things in them.
    made.built()


def test_a_delta_of_a_small_object_is_a_snapshot_and_nothing_else_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = server(n=1, names=["x"], table={"a": b"b"})
    made = Followed(root)
    for name in ("_survey", "_gather", "_commit"):
        monkeypatch.delattr(StreamWriter, name)
    for n in range(3):
        root.n = n
        snapshot = serializers.encode(root)
        assert made.writer.delta()[1:] == [snapshot.head, snapshot.body]
        made.delta()

    assert not dirty._pages.regions
    made.built()


def _named_early_by_the_rest() -> Any:
    words = tuple([f"word {n}" for n in range(250)])
    return server(words=words, rows={n: [words[n % 250]] for n in range(6_000)})


def _named_late_by_the_rest() -> Any:
    few: list[Any] = [f"word {n}" for n in range(300)]
    few += [classes.Plain(a=n) for n in range(700)]
    return server(rows={n: classes.Plain(a=n) for n in range(COUNT)}, few=few)


def _a_tuple_in_both() -> Any:
    shared = tuple(range(100_000, 102_000))
    return server(rows=rows() | {0: [shared]}, shared=shared)


def _records_in_another_order() -> Any:
    held = rows()
    return server(rows=held, queue=collections.deque(reversed(held.values())))


def _a_container_named_often() -> Any:
    held = rows()
    return server(rows=held, often=[[held] * 30 for _ in range(300)])


def _many_named_late_by_the_rest() -> Any:
    few: list[Any] = [f"word {n}" for n in range(300)]
    few += [classes.Plain(a=n) for n in range(4000)]
    return server(rows={n: classes.Plain(a=n) for n in range(1100)}, few=tuple(few))


def _records_named_often() -> Any:
    held = {n: [n] for n in range(1100)}
    return server(rows=held, often=[collections.deque(held.values()) for _ in range(5)])


@pytest.mark.parametrize(
    "made_by",
    [
        _many_named_late_by_the_rest,
        _records_named_often,
        _named_early_by_the_rest,
        _named_late_by_the_rest,
        _a_tuple_in_both,
        _records_in_another_order,
        _a_container_named_often,
    ],
)
def test_nothing_takes_more_than_a_snapshot_and_1_percent(made_by: Callable[[], Any]) -> None:
    """Changes and rest are pickles apart, which cannot name what the other one has."""
    root = made_by()
    followed = Followed(root)
    for _ in range(3):
        followed.delta()
        assert followed.sizes[-1] <= len(serializers.dumps(root)) * 1.01 + 1024
        for key in list(root.rows)[::2]:
            root.rows[key] = [key]
    followed.delta().built()
    Stream(made_by()).end()
    Stream(made_by()).round().end()


def test_no_snapshot_is_made_that_could_not_be_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"word {n}" for n in range(300)]
    few = [classes.Plain(a=n, b=words[n % 300]) for n in range(600)]
    held = {n: {"id": n, "name": f"item {n}", "n": 0.5, "of": n // 7} for n in range(2500)}
    root = server(words=words, few=few, rows=held, text="just " * 30)
    stream_of = Stream(root).round()
    followed = Followed(server(rows=held, text="jjj " * 300))
    monkeypatch.setattr(StreamWriter, "_encode", lambda self: pytest.fail("a snapshot is made"))
    followed.delta()
    for n in range(0, 2500, 25):
        held[n]["n"] += 1.0
    followed.delta()
    for n in range(0, 2500, 25):
        held[n] = {"id": -n}
    followed.delta()

    assert sum(map(len, stream_of.writer.last())) < 30_000
    stream_of.writer.close()
    followed.built()


class _MeddlesLater:
    """Changes a container when it is pickled, but not the first time."""

    asked = 0
    victim: Any = None

    def __getstate__(self) -> dict[str, Any]:
        self.asked += 1
        if self.asked == 2:
            self.victim[5] = "meddled"
        return {"text": "nothing that a record has" * 1000}


@pytest.mark.parametrize("goes_on", [True, False])
def test_what_a_snapshot_changes_that_is_made_to_compare_is_not_missed(goes_on: bool) -> None:
    meddler = _MeddlesLater()
    root = server(meddler=meddler, rows=rows())  # In a snapshot it comes first.
    meddler.victim = root.rows
    made = Followed(root)
    if goes_on:
        made.writer._survey()
        got: Any = made.delta().reader.build()
    else:
        ended = False
        while not ended:
            pieces, ended = made.writer.step(0.0, 1)
            made.reader.take([b"".join(pieces)])
        for n in range(0, COUNT, 5):
            root.rows[n] = f"{n:0500d}"
        got = made.reader.last([b"".join(made.writer.last())])
    made.writer.close()

    assert meddler.asked == 2
    assert got.rows[5] == "meddled"


def test_a_delta_is_not_touched_by_what_the_object_becomes() -> None:
    root = server(
        rows=rows(),
        array=np.arange(100_000),
        little=np.arange(1000),
        text=bytearray(100_000),
        large=bytearray(500_000),
    )
    made = Followed(root)
    want = described(serializers.loads(serializers.dumps(root)))
    chunk = made.writer.delta()
    for held in (root.array, root.little, root.text, root.large):
        held[:] = held[:1] * len(held) if isinstance(held, bytearray) else 9
        if isinstance(held, bytearray):
            held.append(1)
    root.rows[5]["id"] = "changed"
    made.reader.keep(chunk)

    assert described(made.reader.build()) == want
    made.writer.close()


def test_what_grows_large_later_is_found() -> None:
    root = server(rows={}, array=np.arange(10), text=bytearray(10), n=0)
    made = Followed(root).delta()
    root.rows.update(rows(5000))
    root.array = np.arange(200_000)
    root.text += bytes(500_000)
    made.delta().delta().delta()
    root.rows[7]["id"] = 0
    root.array[7] = 0
    root.text[7] = 1
    made.delta()

    assert made.sizes[-1] < 20_000
    made.built()


def test_what_is_gone_is_let_go_on_both_sides() -> None:
    root = server(rows=rows(), array=np.arange(200_000), other=np.arange(100_000))
    made = Followed(root).delta()
    held = made.reader.taken_bytes
    container = weakref.ref(root.array)
    del root.array, root.rows
    assert container() is None
    made.delta()

    assert made.reader.taken_bytes < held / 2
    assert len(made.writer._regions) == 1
    assert not made.writer._cuts
    assert not made.reader._cuts
    made.built()


def test_what_changes_its_size_or_place_is_followed() -> None:
    root = server(array=np.zeros(100_000), text=bytearray(500_000), typed=array.array("d"))
    made = Followed(root).delta()
    for n in range(1, 6):
        root.array.resize(100_000 + n * 30_000, refcheck=False)
        root.array[-n] = n
        root.text.extend(b"x" * 300_000)
        root.typed.extend([float(n)] * 20_000)
        if n == 3:
            root.array, root.more = np.ones(50_000), root.array
        made.delta()
        made.built(rehearsed=True)
    made.built()


@pytest.mark.parametrize("kinds", [("base", "part"), ("part", "base"), ("part", "late")])
def test_memory_that_two_buffers_share_is_written_once(kinds: tuple[str, str]) -> None:
    base = np.arange(200_000)
    part = base[50_000:100_000]
    part.flags.writeable = False
    root = server(held=[part if kind == "part" else base for kind in kinds if kind != "late"])
    made = Followed(root).delta()
    if "late" in kinds:
        root.held.append(base)
        made.delta()
    for n in range(3):
        base[60_000 + n] = -1
        base[n] = -2
        made.delta()

    assert len(made.writer._regions) == 1
    assert max(made.sizes[-3:]) < 20_000
    made.built()


def test_memory_of_which_little_is_left_is_tracked_anew() -> None:
    memory = np.arange(1_000_000)
    begin = memory.ctypes.data
    writer = StreamWriter(server(), "hash")

    def kinds(*spans: tuple[int, int]) -> list[int]:
        places = [(begin + start, begin + end, BufferKind.WRITABLE) for start, end in spans]
        return [piece[0] for piece in writer._announce(places) if len(piece) == _OP.size]

    assert kinds((0, 8_000_000)) == [stream._REGION]
    assert kinds((0, 3_000_000), (5_000_000, 8_000_000)) == []
    assert kinds((100, 3_000_000), (5_000_000, 5_900_000)) == [stream._FREE] + 2 * [stream._REGION]
    assert kinds((100, 3_000_000)) == [stream._FREE]
    assert kinds((50, 3_000_000)) == [stream._FREE, stream._REGION]
    # Most of it is left, but something else reaches into it.
    outgrown = (50, 2_000_000), (2_900_000, 3_500_000)
    assert kinds(*outgrown) == [stream._FREE, stream._REGION, stream._REGION]
    writer.close()


@pytest.mark.parametrize("engines", [("pages", "pages"), ("hash", "pages"), ("auto", "hash")])
def test_two_standbys_follow_one_object_and_one_of_them_ends(engines: tuple[Any, Any]) -> None:
    if "pages" in engines and (refusal := dirty.pages_refusal()):
        pytest.skip(f"the kernel tracks no pages here: {refusal}")
    root = server(rows=rows(), array=np.arange(500_000), text=bytearray(600_000))
    first, second = (Followed(root, engine) for engine in engines)

    def change(n: int) -> None:
        root.rows[n]["id"] = -n
        root.array[n * 1000 :: 50_000] = -n
        root.text[n] = 1

    for n in range(1, 6):
        change(n)
        first.delta()
        if n % 2:
            second.delta()
    move = Stream(root)
    change(6)
    move.round()
    change(7)
    move.end()
    change(8)
    second.delta().built()  # Ends its writer.
    change(9)
    first.delta()
    # What the others released, the first one still tracks.
    assert first.sizes[-1] < first.sizes[0] / 5
    change(10)
    first.delta().built()


def test_a_switch_over_takes_only_what_changed_since_the_last_delta() -> None:
    root = server(rows=rows(), array=np.arange(200_000))
    made = Followed(root).delta().delta()
    root.rows[5]["id"] = root.array[5] = 77
    last = b"".join(made.writer.last())
    made.writer.close()

    assert len(last) < made.sizes[0] / 50
    got: Any = made.reader.last([last])
    assert described(got) == described(serializers.loads(serializers.dumps(root)))


def test_deltas_after_rounds() -> None:
    root = server(rows=rows(), array=np.arange(200_000))
    made = Followed(root)
    made.reader.take(made.writer.look())
    made.reader.take(made.writer.step(0.0, 1)[0])  # The round has not ended.
    root.rows[5]["id"] = root.array[5] = 77
    made.delta()
    root.rows[6]["id"] = root.array[6] = 78
    made.delta()

    with pytest.raises(ValueError, match="rounds"):
        made.writer.step(0.0, 1)
    made.built()
    with pytest.raises(ValueError, match="closed"):
        made.writer.delta()
    with pytest.raises(ValueError, match="closed"):
        made.writer.last()


@pytest.mark.parametrize("engine", ["auto", "hash"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_round_that_is_given_up_takes_nothing_for_sent(engine: Any, ends: bool) -> None:
    """What is written to shared memory is sent only when all of it is there."""
    root = server(array=np.arange(500_000))
    for steps in range(6):
        writer = StreamWriter(root, engine, memory=shared_memory)
        reader = StreamReader(LIMIT_BYTES)
        reader.take(writer.look())
        for _ in range(steps):
            reader.take(writer.step(0.0, 1)[0])
        if ends:
            got: Any = reader.last(writer.last())
        else:
            reader.keep(writer.delta())
            got = reader.build()
        writer.close()
        assert (got.array == root.array).all()
    assert steps > root.array.nbytes // stream.COPY_BYTES


def test_what_cannot_travel_at_one_delta_is_in_the_next() -> None:
    root = server(rows=rows(), array=np.arange(100_000), sulky=classes.Sulky())
    made = Followed(root).delta()
    root.rows[3]["w"] = ["new"]
    root.array[3] = 0
    root.sulky.sulks = True
    with pytest.raises(serializers.NotSerializable, match="sulky"):
        made.writer.delta()
    root.sulky.sulks = False
    root.rows[4]["w"] = ["new"]
    made.delta()

    assert made.sizes[-1] < made.sizes[0] / 50
    made.built()


def test_records_change_in_all_ways_for_long() -> None:
    """Some grow, some have other things in them, some go, and all is found each time."""
    chance = random.Random(7)
    root = server(rows=rows(4000), held=[classes.Data(n, [n]) for n in range(3000)])
    made = Followed(root).delta()
    for n in range(60):
        for _ in range(20):
            record = root.rows[chance.choice(list(root.rows))]
            how = chance.randrange(6)
            if how == 0:
                record["w"] = [n, {"deep": [n]}]
            elif how == 1:
                record["w"].append(n)
            elif how == 2:
                record[n] = n
            elif how == 3:
                record["id"] = n
            elif how == 4:
                root.held[chance.randrange(3000)].b = {"x": [n]}
            else:
                root.held[chance.randrange(3000)] = classes.Data([n], n)
        if n % 10 == 9:
            del root.rows[chance.choice(list(root.rows))]
            root.held.insert(chance.randrange(100), classes.Data(n, n))
        made.delta()
        if n % 4 == 0:
            made.built(rehearsed=True)

    assert len(made.writer._cuts) == 2
    assert sorted(made.sizes)[30] < made.sizes[0] / 50
    made.delta()
    assert made.sizes[-1] < 1000
    made.built()


def test_a_container_that_grows_bit_by_bit_has_few_parts_and_small_deltas() -> None:
    root = server(rows=rows(3000), log=list(range(3000)))
    made = Followed(root).delta()
    for n in range(1000):
        root.rows[f"more {n}"] = {"id": n}
        root.log.append(n)
        made.delta()

    assert sum(len(cut.parts) for cut in made.writer._cuts.values()) < 80
    assert max(made.sizes[1:]) < made.sizes[0] / 3
    assert sum(made.sizes[1:]) / 1000 < 600
    made.built()


def test_containers_used_as_queues_have_small_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    # However many there are: one part is searched for in vain, and then all others are near.
    monkeypatch.setattr(parts, "SEARCH_BYTES_MAX", 0)
    root = server(rows=rows(8000), log=[{"id": n} for n in range(8000)])
    made = Followed(root).delta()
    for n in range(200):
        root.rows[f"new {n}"] = {"id": n}
        del root.rows[next(iter(root.rows))]
        root.log.append({"id": n})
        root.log.pop(0)
        made.delta()

    assert len(made.writer._cuts) == 2
    assert sum(made.sizes[1:]) / 200 < made.sizes[0] / 5
    made.built()


def test_a_container_that_is_put_in_another_order_is_not_looked_through_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched = 0
    find = parts._find

    def counted(row: bytes, anchors: bytes, start: int) -> int:
        nonlocal searched
        searched += 1
        return find(row, anchors, start)

    monkeypatch.setattr(parts, "_find", counted)
    monkeypatch.setattr(parts, "SEARCH_BYTES_MAX", 0)
    root = server(log=[[n] for n in range(60_000)], rows={n: [n] for n in range(60_000)})
    made = Followed(root).delta()
    random.Random(1).shuffle(root.log)
    root.rows = dict(sorted(root.rows.items(), key=lambda item: -item[0]))
    container = root.rows
    made.delta()
    for key in sorted(container):
        container[key] = container.pop(key)
    made.delta()

    assert 1 < searched < 40  # There are 59 parts in each, which are sought in vain three times.
    made.built()


def test_a_container_is_not_cut_where_that_makes_the_rest_more_dear() -> None:
    root = server(rows=rows(), many=[list(range(30)) for _ in range(900)])
    made = Followed(root).delta()
    assert not made.writer._cuts
    root.many = []
    made.delta()
    for _ in range(2 * stream.TRIAL_DELTAS_MIN):
        made.delta()

    assert len(made.writer._cuts) == 1
    made.built()


def test_a_container_that_changed_throughout_for_a_while_is_cut_again() -> None:
    root = server(rows=rows())
    made = Followed(root).delta()
    for n in range(2):
        for record in root.rows.values():
            record["id"] = n
        made.delta()
        assert made.writer._cuts
        made.delta()
    for n in range(10):
        for record in root.rows.values():
            record["id"] = n
        made.delta()
    assert not made.writer._cuts
    for n in range(2 * stream.TRIAL_DELTAS_MIN):
        root.rows[n]["id"] = n
        made.delta()

    assert len(made.writer._cuts) == 1
    assert made.sizes[-1] < 1000
    made.built()


def test_a_container_that_changes_throughout_all_the_time_is_hardly_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = server(rows=rows(1100))
    made = Followed(root)
    trials = 0

    class Counted(stream.Cut):
        def __init__(self, *args: Any) -> None:
            nonlocal trials
            trials += 1
            super().__init__(*args)

    monkeypatch.setattr(stream, "Cut", Counted)
    for n in range(300):
        for record in root.rows.values():
            record["id"] = n
        made.delta()

    assert 3 <= trials <= 8
    made.built()


def test_what_only_a_record_of_a_container_refers_to_does_not_keep_the_container() -> None:
    held = {n: classes.Plain(a=n) for n in range(COUNT)}
    root = server(rows=held, one=held[5])
    made = Followed(root).delta()
    seen = weakref.ref(held[6])
    root.rows = None
    del held
    made.delta()
    gc.collect()

    assert seen() is None
    made.built()


def test_numbers_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "NUMBERS_MAX", 40)
    monkeypatch.setattr(stream, "PARTS_MAX", 20)
    root = server(rows={n: n for n in range(1500)}, kept=np.arange(50_000))
    made = Followed(root)
    spare = np.zeros(50_000)
    for n in range(150):
        root.array, spare = np.arange(50_000) + n, getattr(root, "array", spare)
        root.rows.pop(n)
        root.rows[f"more {n}"] = n
        made.delta()

    assert made.writer._next_region > 40
    assert all(cut.next_part < 45 for cut in made.writer._cuts.values())
    assert all(entry.number < 40 for entry in made.writer._regions)
    made.built()


def test_what_a_reader_holds_is_counted_for_long() -> None:
    root = server(rows=rows(), array=np.arange(100_000), n=0)
    made = Followed(root).delta()
    before = made.reader.taken_bytes
    for n in range(200):
        for place in range(n, COUNT, 20):
            root.rows[place]["id"] = n
            root.rows[place]["w"] = [n, "y"]
        root.array = np.arange(100_000)
        root.n = "x" * (n % 7) * 1000
        made.delta()
    root.n = 0
    made.delta()

    assert abs(made.reader.taken_bytes - before) < before / 20
    made.built()


def test_a_rehearsal_has_nothing_in_common_with_what_is_built() -> None:
    root = server(
        rows=rows(),
        array=np.arange(100_000),
        text=bytearray(500_000),
        little=np.arange(2000),
        bytes=b"b" * 500_000,
    )
    made = Followed(root).delta()
    for _ in range(2):
        got = made.built(rehearsed=True)
        got.array.fill(0)
        got.text[:] = b"x" * len(got.text)
        got.little.fill(0)
        for record in got.rows.values():
            record["w"].append("scribbled")
            record["id"] = None
        got.rows.clear()
        root.rows[5]["id"] = 1
        made.delta()
    made.built()


def test_a_rehearsal_of_a_snapshot_in_writable_memory_has_a_copy() -> None:
    root = server(arrays=[np.arange(200_000) for _ in range(3)])
    reader = StreamReader(LIMIT_BYTES)
    writer = StreamWriter(root, "hash")
    monkey = stream.REGIONS_MAX
    stream.REGIONS_MAX = 1  # type: ignore[misc]
    try:
        reader.keep([bytearray(piece) for piece in writer.delta()])
    finally:
        stream.REGIONS_MAX = monkey  # type: ignore[misc]
    writer.close()
    got: Any = reader.rehearse()
    for held in got.arrays:
        held.fill(7)

    built: Any = reader.build()
    assert all((held == np.arange(200_000)).all() for held in built.arrays)


def test_an_object_is_built_once() -> None:
    made = Followed(server(rows=rows(), n=1))
    with pytest.raises(LoadFailed, match="no delta"):
        made.reader.build()
    with pytest.raises(LoadFailed, match="no delta"):
        made.reader.rehearse()
    made.delta()
    assert made.reader.is_whole
    chunk = made.writer.delta()
    made.built()

    assert not made.reader.is_whole
    for use in (made.reader.keep, made.reader.take, made.reader.last):
        with pytest.raises(LoadFailed, match="built"):
            use(chunk)
    with pytest.raises(LoadFailed, match="built"):
        made.reader.build()


# -- identity


def test_a_container_that_a_record_has_as_well_stays_one() -> None:
    root = server(rows=rows(), numbers={n: n for n in range(COUNT)})
    made = Stream(root).round()
    root.rows[5]["numbers"] = root.numbers
    made.round()

    got = made.end()

    assert got.rows[5]["numbers"] is got.numbers


def test_a_container_that_comes_into_a_record_at_the_end_stays_one() -> None:
    root = server(rows=list(rows().values()), numbers=list(range(COUNT)))
    made = Stream(root).round()
    root.rows[5]["numbers"] = root.numbers

    got = made.end()

    assert got.rows[5]["numbers"] is got.numbers


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "share",
    [
        lambda root: root.other.append(root.rows[3]["w"]),
        lambda root: root.rows[4].update(w=root.rows[900]["w"]),
        lambda root: root.others[7].update(w=root.rows[900]["w"]),
        lambda root: root.others.update({7: root.rows[900]}),
        lambda root: root.rows[9].update(root=root),
        lambda root: root.rows[9].update(rows=root.rows),
        lambda root: root.rows[9].update(me=root.rows[9]),
        lambda root: root.rows.update({9: root.rows[10]}),
        lambda root: root.other.append(root.rows),
        lambda root: setattr(root, "more", root.rows),
        lambda root: root.other.append({"deep": (root.rows[5], [root.rows[6]])}),
    ],
)
def test_what_is_shared_stays_shared(share: Callable[[Any], None], late: bool) -> None:
    root = server(rows=rows(), others=rows(), other=[])
    if not late:
        share(root)
    made = Stream(root).round()
    if late:
        made.round()
        share(root)
    made.end()


def test_records_are_named_by_methods_closures_and_weak_references() -> None:
    held = {n: classes.Plain(a=n, b=[n]) for n in range(COUNT)}
    root = server(rows=held, other=[])
    made = Stream(root).round()
    for n in range(5):
        root.other += (held[n].method, weakref.ref(held[n + 10]), _closure(held[n + 20]))

    got = made.end()

    assert got.other[0].__self__ is got.rows[0]
    assert got.other[1]() is got.rows[10]
    assert got.other[2]() is got.rows[20]
    assert len(made.last) < made.snapshot_bytes / 5


def _closure(value: Any) -> Callable[[], Any]:
    return lambda: value


def test_many_references_to_records_are_found_at_once() -> None:
    """Not by a walk through the container for each, which took seconds while a server waits."""
    root = server(rows=rows(20_000))
    root.index = [[root.rows[n * 4] for n in range(i, i + 20)] for i in range(0, 4000, 20)]
    made = Stream(root).round()
    began = time.process_time()
    made.writer.last()
    quick = time.process_time() - began
    began = time.process_time()
    serializers.dumps(root)
    whole = time.process_time() - began
    made.writer.close()

    assert quick < 10 * whole  # It was some hundred times.


def test_zones_beside_the_cache_stay_one() -> None:
    zone = zoneinfo.ZoneInfo.no_cache("UTC")
    when = datetime.datetime(2020, 1, 1, tzinfo=zone)
    got = Stream(server(rows={n: [when, n] for n in range(COUNT)})).round().end()

    assert got.rows[0][0].tzinfo is got.rows[COUNT - 1][0].tzinfo


# -- bytes


def test_strings_that_many_records_share_are_written_once() -> None:
    texts = [f"{n}" + "d" * 1000 for n in range(100)]
    root = server(rows={n: [texts[n % 100], texts[n * 7 % 100]] for n in range(20_000)})
    made = Stream(root).round()
    for n in range(0, 20_000, 5):
        root.rows[n][0] = texts[3]

    made.end()

    assert len(made.last) < made.snapshot_bytes


@pytest.mark.parametrize("size", [40, 1000])
def test_strings_that_changes_share_with_the_rest_do_not_make_it_larger_than_a_snapshot(
    size: int,
) -> None:
    texts = [f"{n:06d}" + "d" * size for n in range(1000)]
    root = server(texts=tuple(texts), rows={n: [None, texts[n % 1000]] for n in range(COUNT)})
    made = Stream(root).round()
    for n in range(0, COUNT, 5):
        root.rows[n][0] = texts[n * 7 % 1000]
    made.end()


# -- classes that change meanwhile


def _state(self: Any) -> dict[str, Any]:
    return {"patched": self.__dict__.get("a")}


def _reduced(obj: Any) -> Any:
    return classes.Other, (), {"registered": obj.__dict__.get("a")}


@pytest.mark.parametrize("patch", ["__getstate__", "__reduce__", "copyreg", "register"])
@pytest.mark.parametrize("in_rounds", [False, True])
def test_a_class_that_is_patched_between_rounds(
    patch: str, in_rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = server(rows={n: classes.Data(n) for n in range(COUNT)})
    made = Stream(root).round()
    try:
        if patch == "copyreg":
            copyreg.pickle(classes.Data, _reduced)
        elif patch == "register":
            serializers.register(classes.Data, _reduced)
        else:
            value = _state if patch == "__getstate__" else _reduced
            monkeypatch.setattr(classes.Data, patch, value, raising=False)
        root.rows[5].b = 1
        if in_rounds:
            made.round()
        got = made.end()
    finally:
        copyreg.dispatch_table.pop(classes.Data, None)
        resources.REDUCERS.pop(classes.Data, None)
        auto.forget_decisions()

    assert vars(got.rows[0]).keys() & {"patched", "registered"}


# -- code that runs while the rest is pickled


def test_what_a_getstate_changes_in_a_container_is_not_missed() -> None:
    root = server(meddler=None, rows=rows(), numbers=list(range(COUNT)))
    root.meddler = classes.Meddling()
    made = Stream(root).round()
    root.meddler.victim = root.rows  # Pickled before `rows`, so what it does is in the snapshot.

    got = made.end()

    assert got.rows[0] == "meddled"


def test_code_that_a_capture_runs_is_told_from_pythons_and_ours() -> None:
    quiet = [classes.Plain, classes.Data, dict, type, np.ndarray, weakref.ref, datetime.datetime]
    ours = [type(serializers.AutoSerializer()), type(_closure)]
    assert [kind for kind in (*quiet, *ours) if auto.runs_code(kind)] == []
    loud = [classes.Stateful, classes.Reduced, classes.Proxy, classes.OddZone, classes.Table]
    assert [kind for kind in loud if not auto.runs_code(kind)] == []
    serializers.register(classes.Data, _reduced)
    try:
        assert auto.runs_code(classes.Data)
    finally:
        del resources.REDUCERS[classes.Data]
        auto.forget_decisions()


def test_what_changes_with_every_pickle_travels_as_a_snapshot() -> None:
    root = classes.PrunedServer(rows=rows())
    got = Stream(root).round().end()

    assert got.rows["last saved"] == [1]


def test_a_trial_that_was_given_up_makes_nothing_look_shared() -> None:
    """What a pickler has met is in its memo, and counts as held by somebody else."""
    held = {n: classes.Data(n, [n]) for n in range(COUNT)}
    root = classes.PrunedServer(rows=rows(), few=list(held.values())[:900])
    made = Stream(root).round()
    made.end()

    assert len(made.last) < made.snapshot_bytes + 500


def test_an_object_that_cannot_travel_at_first_does_in_the_end() -> None:
    root = server(rows=rows(), sulky=classes.Sulky(sulks=True), array=np.arange(100_000))
    made = Stream(root).round()
    root.sulky.sulks = False
    made.end()


def test_an_object_that_cannot_travel_in_the_end_says_so_and_can_later() -> None:
    root = server(rows=rows(), sulky=classes.Sulky(), array=np.arange(100_000))
    made = Stream(root).round()
    root.sulky.sulks = True
    with pytest.raises(serializers.NotSerializable, match="sulky"):
        made.writer.last()
    root.sulky.sulks = False
    made.end()


# -- depth


def test_what_nests_deep_travels_next_to_a_container_in_parts() -> None:
    deep: Any = None
    for _ in range(100_000):
        deep = [deep]
    root = server(rows=rows(), array=np.arange(100_000))
    made = Stream(root).round()
    root.deep = deep
    last = b"".join(made.writer.last())
    made.writer.close()
    got: Any = made.reader.last([last])
    depth = 0
    walk = got.deep
    while walk is not None:
        walk = walk[0]
        depth += 1

    assert depth == 100_000
    assert got.rows == root.rows


DEEP = """
import sys, serializers
from serializers.stream import StreamReader, StreamWriter
sys.setrecursionlimit(10**6)
deep = None
for _ in range(200_000):
    deep = [deep]
root = {"deep": deep, "rows": {n: [n] for n in range(2000)}}
writer, reader = StreamWriter(root), StreamReader(1 << 30)
reader.take([b"".join(writer.look())])
reader.take([b"".join(writer.step(1.0, 1 << 30)[0])])
got = reader.last([b"".join(writer.last())])
assert got["rows"] == root["rows"]
"""


def test_a_high_recursion_limit_does_not_let_it_overflow_the_stack() -> None:
    subprocess.run([sys.executable, "-c", DEEP], check=True)


# -- the original


def test_the_original_is_as_usable_as_before() -> None:
    root = server(
        rows=rows(),
        text=bytearray(500_000),
        array=np.zeros(100_000),
        typed=array.array("d", [0.0] * 100_000),
    )
    made = Stream(root)

    def resize() -> None:
        root.text.extend(b"x" * 100_000)
        root.array.resize(root.array.size + 1000)
        root.typed.extend([1.0] * 1000)

    resize()
    made.round(resize)
    made.writer.last()
    resize()
    made.end()
    resize()


@pytest.mark.parametrize("how", ["dumps", "last"])
def test_an_error_that_somebody_keeps_holds_no_memory_of_the_original(how: str) -> None:
    root = server(text=bytearray(300_000), array=np.zeros(50_000), bad=(n for n in range(3) if n))
    next(root.bad)
    writer = StreamWriter(root)
    writer.look()
    with pytest.raises(serializers.NotSerializable) as kept:
        serializers.dumps(root) if how == "dumps" else writer.last()

    root.text.append(1)
    root.array.resize(60_000)
    assert "bad" in str(kept.value)
    writer.close()


def test_bytearrays_can_be_resized_while_somebody_has_the_last_chunk() -> None:
    """It may be on its way still when the move is over already."""
    root = server(large=bytearray(500_000), small=bytearray(100_000))
    made = Stream(root).round()
    root.large[7] = 1
    last = made.writer.last()
    made.writer.close()

    root.large.append(1)
    root.small.append(1)
    assert last


def test_what_a_handler_dropped_is_not_held() -> None:
    root = server(
        plain={n: classes.Plain(a=n) for n in range(COUNT)},
        odd={n: classes.Stateful(a=n) for n in range(COUNT)},
    )
    made = Stream(root).round()
    gone = [weakref.ref(root.plain[0]), weakref.ref(root.odd[0]), weakref.ref(root.plain[1])]
    del root.plain[1]
    gc.disable()
    try:
        assert gone[2]() is None
        root.plain = None
        root.odd = None
        assert gone[1]() is None
        made.round()
        assert gone[0]() is None
    finally:
        gc.enable()
    made.end()


def test_closing_releases_everything_at_any_time() -> None:
    root = server(rows={n: classes.Plain(a=n) for n in range(COUNT)}, array=np.zeros(10**6))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for steps in range(6):
        made = Stream(root)
        for _ in range(steps):
            made.writer.step(0.0, 1)
        made.writer.close()
        made.writer.close()
        seen = weakref.ref(root.rows.pop(steps))
        assert seen() is None
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


# -- the reader's object


def test_buffers_come_out_writable_apart_and_resizable() -> None:
    frozen = np.zeros(100_000)
    frozen.flags.writeable = False
    base = np.arange(100_000)
    root = server(
        one=bytearray(b"a" * 500_000),
        two=bytearray(b"a" * 500_000),
        bytes=b"b" * 500_000,
        frozen=frozen,
        views=[base, base[10:], base[:50_000]],
        fortran=np.asfortranarray(np.arange(100_000).reshape(100, -1)),
        empty=np.zeros(0),
    )
    made = Stream(root).round()
    root.one[3] = 7
    base[20] = -1
    root.fortran[5, 5] = -2
    got = made.end()

    got.one.append(1)
    got.two[0] = 9
    assert got.one[0] == ord("a")
    assert not got.frozen.flags.writeable
    got.views[0][20] = 5
    assert got.views[1][10] == 5
    assert root.views[0][20] == -1


def test_memory_that_two_buffers_share_is_shared_or_not_as_by_a_snapshot() -> None:
    data = bytearray(800_000)
    one, two = np.frombuffer(data, "f8"), np.frombuffer(data, "u1")
    typed = array.array("d", [0.0] * 50_000)
    root = server(
        one=one, two=two, three=memoryview(data)[8:600_000], typed=typed, view=memoryview(typed)
    )
    made = Stream(root).round()
    one[3] = 1.0
    got = made.end()
    want: Any = serializers.loads(serializers.dumps(root))
    names = list(vars(root))
    for first in names:
        for second in names:
            shares = [
                np.shares_memory(np.asarray(vars(o)[first]), np.asarray(vars(o)[second]))
                for o in (got, want)
            ]
            assert shares[0] == shares[1], (first, second)


def test_buffers_of_one_region_that_were_apart_come_out_apart() -> None:
    size = 10_000
    body = pickle.dumps(
        [pickle.PickleBuffer(bytearray(size)), pickle.PickleBuffer(bytearray(size - 5))],
        5,
        buffer_callback=lambda _: None,
    )
    head = pack_head(
        code_by_value=False,
        body=body,
        buffer_sizes_bytes=[size, size - 5],
        kinds=bytes((BufferKind.WRITABLE, BufferKind.WRITABLE)),
    )
    reader = StreamReader(LIMIT_BYTES)
    reader.take([chunk(stream._REGION, 1, size, b"\x01"), chunk(stream._BYTES, 1, 0, bytes(size))])
    refers = [
        chunk(stream._REFER, 1, offset, (size - offset).to_bytes(8, "little")) for offset in (0, 5)
    ]
    rest = _OP.pack(stream._REST, 2, len(head), len(head) + len(body)) + head + body
    one, two = reader.last([rest, *refers])  # type: ignore[misc]
    memoryview(one)[7] = 1

    assert memoryview(two)[2] == 0


# -- damaged chunks


def chunk(kind: int, number: int = 0, extra: int = 0, data: bytes = b"") -> bytes:
    return _OP.pack(kind, number, extra, len(data)) + data


def pickled(value: Any) -> bytes:
    return pickle.dumps(value, 5)


PART = chunk(stream._PART, 0, 0, pickled({1: 2, 3: 4}))
LIST = chunk(stream._PART, 0, 1, pickled([1, 2]))
DAMAGED: dict[str, list[bytes]] = {
    "no such operation": [chunk(99)],
    "size beyond the chunk": [_OP.pack(stream._PART, 0, 0, 1 << 60)],
    "half an operation": [b"\x01\x02"],
    "bytes of no region": [chunk(stream._BYTES, 1, 0, b"x")],
    "bytes beyond": [chunk(stream._REGION, 1, 4, b"\x01"), chunk(stream._BYTES, 1, 3, b"xx")],
    "offset that overflows": [
        chunk(stream._REGION, 1, 4, b"\x01"),
        chunk(stream._BYTES, 1, (1 << 64) - 1, b"xx"),
    ],
    "huge region": [chunk(stream._REGION, 1, 1 << 62, b"\x01")],
    "larger than the limit": [chunk(stream._REGION, 1, LIMIT_BYTES + 1, b"\x01")],
    "region twice": [chunk(stream._REGION, 1, 4, b"\x01")] * 2,
    "region without a kind": [chunk(stream._REGION, 1, 4)],
    "part that is no pickle": [chunk(stream._PART, 0, 0, b"junk")],
    "part that is a number": [chunk(stream._PART, 0, 0, pickled(1))],
    "records of no part": [chunk(stream._RECORDS, 0, 0, pickled({0: 1}))],
    "records that are a list": [PART, chunk(stream._RECORDS, 0, 0, pickled([1]))],
    "record beyond": [PART, chunk(stream._RECORDS, 0, 0, pickled({2: 1}))],
    "record beyond a list": [LIST, chunk(stream._RECORDS, 0, 1, pickled({2: 1}))],
    "record at a word": [PART, chunk(stream._RECORDS, 0, 0, pickled({"x": 1}))],
    "record at a word of a list": [LIST, chunk(stream._RECORDS, 0, 1, pickled({"x": 1}))],
    "part twice in the order": [PART, chunk(stream._LAYOUT, 0, 0, bytes(8))],
    "order of half a number": [PART, chunk(stream._LAYOUT, 0, 0, bytes(3))],
    "order of another kind": [PART, chunk(stream._LAYOUT, 0, 7, bytes(4))],
    "list as a dict": [
        LIST,
        chunk(stream._LAYOUT, 0, 0, (1).to_bytes(4, "little")),
        chunk(stream._ROUND),
    ],
    "changes that are a number": [chunk(stream._CHANGES, 0, 0, pickled(1))],
    "changes of half": [chunk(stream._CHANGES, 0, 0, pickled([(0, 1)]))],
    "changes of words": [chunk(stream._CHANGES, 0, 0, pickled([("a", "b", None, {0: 1})]))],
    "changes of lists": [chunk(stream._CHANGES, 0, 0, pickled([([], [], {}, {})]))],
    "rest in a round": [chunk(stream._REST, 0, 0, b"")],
    "inline in a round": [chunk(stream._INLINE, 0, 0, b"")],
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_chunk_is_refused(case: str) -> None:
    reader = StreamReader(LIMIT_BYTES)
    with pytest.raises(LoadFailed):
        reader.take(DAMAGED[case])


def ending(value: Any = None) -> bytes:
    body = pickled(value)
    head = pack_head(code_by_value=False, body=body, buffer_sizes_bytes=[], kinds=b"")
    return _OP.pack(stream._REST, 0, len(head), len(head) + len(body)) + head + body


def referring(size: int) -> bytes:
    """The rest of an object that is one string of bytes, whose REFER follows."""
    body = b"\x80\x05\x97."
    kinds = bytes([BufferKind.BYTES])
    head = pack_head(code_by_value=False, body=body, buffer_sizes_bytes=[size], kinds=kinds)
    return _OP.pack(stream._REST, 1, len(head), len(head) + len(body)) + head + body


def changes(*listed: Any) -> bytes:
    return chunk(stream._CHANGES, data=pickled(([], list(listed))))


def order(*numbers: int, kind: int = 0, cut: int = 0) -> bytes:
    data = b"".join([number.to_bytes(4, "little") for number in numbers])
    return chunk(stream._LAYOUT, cut, kind, data)


KEPT = [
    chunk(stream._REGION, 1, 4, b"\x01"),
    changes((0, 0, {1: [1], 2: [2]}, {})),
    order(0),
    ending(),
]
DAMAGED_DELTAS: dict[str, list[bytes]] = {
    "no rest": [order(0)],
    "half an operation": [ending(), b"\x01\x02"],
    "rest twice": [ending(), ending()],
    "an operation after the rest": [ending(), order(0)],
    "a part of a round": [PART, ending()],
    "records of a round": [chunk(stream._RECORDS, 0, 0, pickled({0: 1})), ending()],
    "end of a round": [chunk(stream._ROUND), ending()],
    "no such operation": [chunk(99), ending()],
    "bytes beyond": [chunk(stream._BYTES, 1, 3, b"xx"), ending()],
    "bytes of no region": [chunk(stream._BYTES, 2, 0, b"x"), ending()],
    "bytes of a freed one": [
        chunk(stream._FREE, 1),
        chunk(stream._BYTES, 1, 0, b"x"),
        ending(),
    ],
    "region twice": [chunk(stream._REGION, 1, 4, b"\x01"), ending()],
    "huge region": [chunk(stream._REGION, 2, 1 << 62, b"\x01"), ending()],
    "changes that are junk": [chunk(stream._CHANGES, 0, 0, b"junk"), ending()],
    "changes that are a number": [chunk(stream._CHANGES, 0, 0, pickled(1)), ending()],
    "changes without samples": [
        chunk(stream._CHANGES, 0, 0, pickled([(0, 0, None, {0: 1})])),
        ending(),
    ],
    "changes of half": [changes((0, 1)), ending()],
    "changes of words": [changes(("a", "b", None, {0: 1})), ending()],
    "changes of lists": [changes(([], [], {}, {})), ending()],
    "a part that is a number": [changes((0, 0, 7, {})), ending()],
    "records of no part": [changes((0, 9, None, {0: 1})), ending()],
    "records of no container": [changes((9, 0, None, {0: 1})), ending()],
    "record beyond": [changes((0, 0, None, {2: 1})), ending()],
    "record before": [changes((0, 0, None, {-1: 1})), ending()],
    "record at a word": [changes((0, 0, None, {"x": 1})), ending()],
    "records that are a list": [changes((0, 0, None, [1])), ending()],
    "order with a part that is not there": [order(0, 5), ending()],
    "order of a container that is not there": [order(0, cut=5), ending()],
    "order of another kind": [order(0, kind=1), ending()],
    "order of no kind": [order(0, kind=7), ending()],
    "order of half a number": [chunk(stream._LAYOUT, 0, 0, bytes(3)), ending()],
    "part twice in the order": [order(0, 0), ending()],
    "body that is another one": [ending()[:-3] + b"xyz"],
    "buffer that is missing": [chunk(stream._REST, 1, 40, ending()[21:])],
    "buffer of no region": [
        ending().replace(_OP.pack(stream._REST, 0, 32, 4 + 32), b"", 1),
    ],
}


@pytest.mark.parametrize("case", DAMAGED_DELTAS)
def test_a_damaged_delta_changes_nothing_and_ends_the_stream(case: str) -> None:
    reader = StreamReader(LIMIT_BYTES)
    reader.keep(KEPT)
    reader.keep([chunk(stream._BYTES, 1, 0, b"good"), changes((0, 0, None, {0: [3]})), ending()])
    before = reader.taken_bytes
    # What comes before the damage must not have been applied.
    good = [chunk(stream._BYTES, 1, 0, b"evil"), changes((0, 0, None, {1: [4]}))]
    with pytest.raises(LoadFailed):
        reader.keep([*good, *DAMAGED_DELTAS[case]])
    with pytest.raises(LoadFailed, match="no use any more"):
        reader.keep(KEPT)
    with pytest.raises(LoadFailed, match="no use any more"):
        reader.last(KEPT)

    assert bytes(reader._regions[1]) == b"good"
    assert reader._cuts[0].parts == {0: {1: [3], 2: [2]}}
    assert reader.taken_bytes == before
    assert reader.build() is None


def test_what_was_rehearsed_keeps_its_bytes_though_the_stream_goes_on() -> None:
    """Memory of strings may come to hold others, and its reader writes into the same memory."""
    reader = StreamReader(LIMIT_BYTES)
    size = 8192
    announce = chunk(stream._REGION, 1, size, bytes([BufferKind.BYTES]))
    refer = chunk(stream._REFER, 1, 0, size.to_bytes(8, "little"))
    rest = referring(size)
    for value in (b"a", b"b", b"c"):
        begin = [announce] if value == b"a" else []
        reader.keep([*begin, chunk(stream._BYTES, 1, 0, value * size), rest, refer])
        if value == b"b":
            rehearsed = reader.rehearse()
            assert rehearsed == b"b" * size
    assert rehearsed == b"b" * size
    assert reader.build() == b"c" * size


def test_a_delta_larger_than_the_limit_is_refused() -> None:
    for brought in (
        chunk(stream._REGION, 1, 90_000, b"\x01"),
        changes((0, 0, {n: f"{n:90}" for n in range(1000)}, {})),
    ):
        reader = StreamReader(100_000)
        reader.keep([brought, ending()])
        with pytest.raises(LoadFailed, match="state_bytes_max"):
            reader.keep([ending("x" * 20_000)])
        assert reader.build() is None
        reader = StreamReader(80_000)
        with pytest.raises(LoadFailed, match="state_bytes_max"):
            reader.keep([brought, ending()])


def test_what_is_large_takes_the_room_of_what_it_replaces() -> None:
    reader = StreamReader(150_000)
    for n in range(5):
        reader.keep(
            [
                chunk(stream._FREE, n),
                chunk(stream._REGION, n + 1, 60_000, b"\x01"),
                changes((0, n, {k: f"{k:40}" for k in range(1000)}, {})),
                order(n),
                ending("x" * 10_000),
            ]
        )
    assert reader.taken_bytes < 130_000


def test_too_many_containers_and_regions_are_refused() -> None:
    reader = StreamReader(LIMIT_BYTES)
    with pytest.raises(LoadFailed, match="containers"):
        reader.take([chunk(stream._PART, n, 0, pickled([])) for n in range(stream.CUTS_MAX + 1)])
    reader = StreamReader(LIMIT_BYTES)
    with pytest.raises(LoadFailed, match="region"):
        reader.take([chunk(stream._REGION, n, 1, b"\1") for n in range(stream.REGIONS_MAX + 1)])


def test_what_comes_in_is_bounded() -> None:
    reader = StreamReader(100_000)
    reader.take([chunk(stream._REGION, 1, 50_000, b"\x01")])
    with pytest.raises(LoadFailed, match="state_bytes_max"):
        reader.take([chunk(stream._PART, 0, n, pickled([b"x" * 1000])) for n in range(100)])


def test_a_last_chunk_that_needs_a_part_which_never_came_is_refused() -> None:
    """A lost chunk must not end in a container that lacks some of its records."""
    root = server(rows=rows(10_000))
    writer = StreamWriter(root, "hash")
    writer.look()
    chunks: list[bytes] = []
    ended = False
    while not ended:
        pieces, ended = writer.step(0.0, 1)
        chunks.append(b"".join(pieces))
    last = b"".join(writer.last())
    writer.close()
    written = [n for n, data in enumerate(chunks) if data[:1] == bytes((stream._PART,))]
    assert len(written) > 1
    for lost in (written[0], written[-1], None):
        reader = StreamReader(LIMIT_BYTES)
        reader.take([data for n, data in enumerate(chunks) if n != lost])
        if lost is None:
            got: Any = reader.last([last])
            assert got.rows == root.rows
        else:
            with pytest.raises(LoadFailed):
                reader.last([last])
    with pytest.raises(LoadFailed):
        StreamReader(LIMIT_BYTES).last([last])


def test_chunks_may_be_cut_anywhere() -> None:
    root = server(rows=rows(1100), array=np.arange(50_000))
    made = Stream(root, "hash").round()
    root.array[3] = 1
    last = b"".join(made.writer.last())
    for size in (1, 7, 1000):
        reader = StreamReader(LIMIT_BYTES)
        for data in made.chunks:
            step = max(size, len(data) // 500, 1)
            reader.take([data[at : at + step] for at in range(0, len(data), step)])
        got: Any = reader.last([last[at : at + size] for at in range(0, len(last), size)])
        assert described(got) == described(serializers.loads(serializers.dumps(root)))
    made.writer.close()


@pytest.mark.parametrize("seed", range(8))
def test_mutated_streams_are_refused_or_load(seed: int) -> None:
    """Nothing but LoadFailed, whatever is cut, repeated, exchanged or changed."""
    chance = random.Random(seed)
    root = server(rows=rows(1500), numbers=list(range(1500)), array=np.arange(40_000))
    made = Stream(root, "hash").round()
    root.rows[3]["id"] = 0
    made.round()
    root.rows[4]["id"] = 0
    root.array[7] = 0
    last = b"".join(made.writer.last())
    made.writer.close()
    known = [data for data in made.chunks if data]
    refused = 0
    for _ in range(60):
        sent = list(known)
        end = last
        how = chance.randrange(5)
        if how == 0:
            sent.pop(chance.randrange(len(sent)))
        elif how == 1:
            chance.shuffle(sent)
        elif how == 2:
            sent.insert(0, chance.choice(sent))
        else:
            at = chance.randrange(len(sent) + 1)
            data = bytearray(end if at == len(sent) else sent[at])
            for _ in range(chance.choice((1, 1, 3))):
                if how == 3:
                    data[chance.randrange(min(len(data), 200))] = chance.randrange(256)
                else:
                    del data[chance.randrange(len(data)) :]
                    data += bytes(1)
            if at == len(sent):
                end = bytes(data)
            else:
                sent[at] = bytes(data)
        reader = StreamReader(1 << 24)
        try:
            for data in sent:
                reader.take([data])
            reader.last([end])
        except LoadFailed:
            refused += 1
    assert refused > 10


# -- the thresholds


def test_a_server_with_too_much_to_look_at_is_left_to_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "WALK_OBJECTS_MAX", 100)
    made = Stream(server(rows=rows(), many=[[n] for n in range(200)]))
    assert not made.writer.is_worth_it
    made.end()


def test_a_container_that_changes_all_the_time_is_pickled_whole() -> None:
    root = server(rows=rows())
    made = Stream(root).round()
    for _ in range(2):
        for record in root.rows.values():
            record["id"] = object.__sizeof__(record["w"]) + len(made.chunks)
        made.round()
    last = made.writer.last()
    assert not made.writer._cuts
    assert sum(map(len, last)) > len(serializers.dumps(root))
    made.end()
