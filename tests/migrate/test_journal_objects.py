"""Journals in object stores: segments, fences, and answers that are lost."""

from __future__ import annotations

import asyncio
import itertools
import os
import pathlib
import threading
from collections.abc import Callable, Container, Coroutine, Iterator, Sequence
from random import Random
from typing import Any

import pytest

from migrate.errors import Outcome
from migrate.shell import journal as journal_module
from migrate.shell import journal_objects as objects_module
from migrate.shell.journal import JournalFailed, Phase
from migrate.shell.journal_format import BadJournal, Facts, Found, Kind
from migrate.shell.journal_objects import (
    JournalFenced,
    ObjectJournal,
    ObjectLog,
    fence,
    load_objects,
    segments,
)
from migrate.shell.stores import Exists, MemoryStore, ObjectStore, Store, StoreError
from tests.migrate.journal_disks import KEY, Told, facts, logged

ALL = 1 << 40
PREFIX = "journals/"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits longer than it has to."""
    monkeypatch.setattr(objects_module, "GROUP_S", 0.0)
    monkeypatch.setattr(objects_module, "WAITS_S", (0.0, 0.0))


@pytest.fixture(params=["memory", "objects in memory", "objects in files"])
def store(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Store:
    """Each home in turn, empty."""
    if request.param == "memory":
        return MemoryStore()
    found = pytest.importorskip("obstore.store")
    if request.param == "objects in memory":
        return ObjectStore(found.MemoryStore())
    return ObjectStore(found.LocalStore(str(tmp_path)))


class Watched(ObjectLog):
    """Knows what runs in a thread."""

    last: asyncio.Future[Any]

    def run(self, function: Callable[..., Any], *args: object) -> asyncio.Future[Any]:
        self.last = super().run(function, *args)
        return self.last


def run(
    store: Store,
    body: Callable[[ObjectLog, Told], Coroutine[object, object, None]],
    gone: Container[str] = (),
) -> Told:
    """Run a test's body with a log that is closed after it."""
    told = Told()

    async def is_gone(node: str) -> bool:
        return node in gone

    async def main() -> None:
        log = Watched(store, PREFIX, KEY, asyncio.get_running_loop(), is_gone)
        await body(log, told)
        await log.close()

    asyncio.run(main())
    return told


async def begin(log: ObjectLog, told: Told, name: str = "j1", **options: object) -> ObjectJournal:
    """A journal whose first whole cut, number 1, is there."""
    told_facts = facts(journal=name)
    journal = log.create(told_facts, **options)  # type: ignore[arg-type]
    journal.epoch(b"row")
    journal.cut(1, b"r1", [b"who", b"le"], whole=True, done=told.of(1))
    await settled(journal)
    return journal


async def settled(journal: ObjectJournal) -> None:
    """Until nothing waits in it."""
    log = journal._log
    assert isinstance(log, Watched)
    while journal.error is None and (journal._waiting or journal._flight):
        if journal._flight:
            await asyncio.wait([log.last])
        await asyncio.sleep(0)
    await cleared(log)


async def cleared(log: ObjectLog) -> None:
    """Until nothing is being removed."""
    while log._clearing:
        await asyncio.wait(log._clearing)


def load(store: Store, name: str = "j1") -> Found:
    return load_objects(store, PREFIX, "srv/1", name, KEY, ALL)


def test_what_follows_the_last_whole_cut_comes_back_from_all_segments(store: Store) -> None:
    async def body(log: ObjectLog, told: Told) -> None:
        made = facts()
        journal = log.create(made)
        journal.epoch(b"row 3")
        journal.chunk([b"ahead"])
        assert journal._timer is None and not journal._flight
        assert segments(log.store, PREFIX, "srv/1") == []  # it waits for the whole of its base
        journal.cut(5, b"r5", [b"whole"], whole=True, done=told.of(5))
        await settled(journal)
        for number in (6, 7):
            journal.step(number, b"s%d" % number, told.of(number))
            await settled(journal)
        journal.epoch(b"row 4")
        journal.cut(8, b"r8", [b"de", b"lta"], whole=False, done=told.of(8))
        await settled(journal)
        assert segments(log.store, PREFIX, "srv/1") == [1, 2, 3, 4, 5]

    told = run(store, body)
    assert told.safe == {5, 6, 7, 8}
    found = load(store)
    assert logged(found) == [
        (Kind.CHUNK, 0, b"", b"ahead"),
        (Kind.CUT, 5, b"r5", b"whole"),
        (Kind.STEP, 6, b"s6", b""),
        (Kind.STEP, 7, b"s7", b""),
        (Kind.CUT, 8, b"r8", b"delta"),
    ]
    assert found.row == b"row 4" and found.closed


def test_what_is_appended_while_a_segment_is_on_its_way_goes_together(store: Store) -> None:
    async def body(log: ObjectLog, told: Told) -> None:
        journal = await begin(log, told)
        before = len(segments(log.store, PREFIX, "srv/1"))
        for number in range(2, 500):
            journal.step(number, b"s", told.of(number))
        await settled(journal)
        assert len(segments(log.store, PREFIX, "srv/1")) <= before + 2

    assert run(store, body).safe == set(range(1, 500))
    assert len(load(store).records) == 499


def test_a_segment_waits_for_its_time_but_not_when_it_is_large(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(log: ObjectLog, told: Told) -> None:
        journal = await begin(log, told)
        monkeypatch.setattr(objects_module, "GROUP_S", 3600.0)
        monkeypatch.setattr(objects_module, "GROUP_BYTES", 1000)
        journal.step(2, b"s", told.of(2))
        assert journal._flight is None and journal._timer is not None
        journal.step(3, bytes(2000), told.of(3))
        assert journal._flight is not None and len(journal._flight.group) == 2
        await settled(journal)

    assert run(store, body).safe == {1, 2, 3}


def test_a_whole_cut_begins_a_base_and_what_is_before_it_is_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "LOG_BYTES_MIN", 1000)
    full: list[ObjectJournal] = []

    async def body(log: ObjectLog, told: Told) -> None:
        journal = await begin(log, told, on_full=full.append)
        number = 1
        while not full:
            number += 1
            journal.step(number, bytes(100), told.of(number))
            await settled(journal)
        journal.prune()
        many = len(segments(log.store, PREFIX, "srv/1"))
        journal.step(number + 1, b"with others", told.of(number + 1))
        journal.cut(number + 2, b"", [b"new base"], whole=True, done=told.of(number + 2))
        journal.step(number + 3, b"after", told.of(number + 3))
        await settled(journal)
        assert full == [journal] and many > 5
        assert told.safe == set(range(1, number + 4))

    run(store, body)
    assert [bytes(r.record) for r in load(store).records] == [b"", b"after"]
    assert len(segments(store, PREFIX, "srv/1")) <= 3


def test_too_many_segments_make_a_journal_full(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects_module, "SEGMENTS_MAX", 4)
    full: list[ObjectJournal] = []

    async def body(log: ObjectLog, told: Told) -> None:
        journal = await begin(log, told, on_full=full.append)
        for number in range(2, 12):
            journal.step(number, b"", told.of(number))
            await settled(journal)
        assert full == [journal]

    run(store, body)


# -- fences


def test_a_former_writer_is_fenced_and_what_it_wrote_before_is_complete(store: Store) -> None:
    async def body(log: ObjectLog, told: Told) -> None:
        former = await begin(log, told)
        former.step(2, b"s2", told.of(2))
        await settled(former)
        second = facts(journal="j2", epoch=4)
        fence(log.store, PREFIX, second, KEY)
        former.step(3, b"s3", told.of(3))
        await settled(former)
        assert isinstance(told.failed[3], JournalFenced)
        assert told.failed[3].outcome is Outcome.NOT_DONE
        assert [r.number for r in load(log.store).records] == [1, 2]
        with pytest.raises(BadJournal) as caught:
            load(log.store, "j2")
        assert caught.value.flaw == "missing"
        # Until the row names the new one, both are there.
        journal = log.create(second)
        journal.cut(2, b"", [b"again"], whole=True, done=told.of(20))
        await settled(journal)
        assert [r.number for r in load(log.store).records] == [1, 2]
        assert logged(load(log.store, "j2")) == [(Kind.CUT, 2, b"", b"again")]
        journal.prune()
        await cleared(log)

    told = run(store, body)
    assert told.safe == {1, 2, 20}
    with pytest.raises(BadJournal) as caught:
        load(store, "j1")
    assert caught.value.flaw == "missing"
    assert [bytes(r.state) for r in load(store, "j2").records] == [b"again"]


def test_a_put_that_comes_after_everything_before_the_base_was_removed_finds_its_number_taken(
    store: Store,
) -> None:
    """A former owner was paused in front of its put, and is still alive."""

    async def body(log: ObjectLog, told: Told) -> None:
        former = await begin(log, told)
        second = facts(journal="j2", epoch=4, node="n2@2")
        number = fence(log.store, PREFIX, second, KEY)
        journal = log.create(second, segment=number)
        for cut in range(1, 4):
            journal.cut(cut, b"", [b"again"], whole=True, done=told.of(20 + cut))
            await settled(journal)
        former.step(2, b"s2", told.of(2))
        await settled(former)
        assert isinstance(told.failed[2], JournalFenced)
        # The fence is not needed any more when the node that it stops is gone.
        assert segments(log.store, PREFIX, "srv/1") == [3, 6]
        gone.add(former.facts.node)
        journal.prune()
        await cleared(log)
        assert segments(log.store, PREFIX, "srv/1") == [6]

    gone: set[str] = set()
    run(store, body, gone)


def test_who_was_fenced_and_has_ended_removes_what_it_was_fenced_by(store: Store) -> None:
    async def body(log: ObjectLog, told: Told) -> None:
        former = await begin(log, told)
        second = facts(journal="j2", epoch=4, node="n2@2")
        journal = log.create(second)
        journal.cut(1, b"", [b"again"], whole=True, done=told.of(20))
        await settled(journal)
        former.step(2, b"s2", told.of(2))
        await settled(former)
        # The row names the first, for all that is known: what it wrote is not touched by the other.
        await journal.remove(is_named=False)
        assert segments(log.store, PREFIX, "srv/1") == [1, 2, 3]
        await former.remove(is_named=True)
        assert segments(log.store, PREFIX, "srv/1") == [1, 2]
        await former.remove(is_named=False)
        assert segments(log.store, PREFIX, "srv/1") == [1]

    run(store, body)


def test_who_opens_while_what_it_has_seen_is_removed_fences_behind_the_base(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number is free again when it puts its fence, and would stop nobody."""
    real = objects_module.header_of

    async def body(log: ObjectLog, told: Told) -> None:
        journal = await begin(log, told)
        journal.prune()
        await cleared(log)
        loop = asyncio.get_running_loop()

        async def go_on() -> None:
            for number in (2, 3):
                journal.cut(number, b"", [b"again"], whole=True, done=told.of(number))
                await settled(journal)

        def slowly(*args: Any) -> Facts:
            # After it has looked for the last number, and before it puts a fence behind it.
            monkeypatch.setattr(objects_module, "header_of", real)
            found = real(*args)
            asyncio.run_coroutine_threadsafe(go_on(), loop).result()
            return found

        monkeypatch.setattr(objects_module, "header_of", slowly)
        second = facts(journal="j2", epoch=4)
        await asyncio.to_thread(fence, log.store, PREFIX, second, KEY)
        journal.step(4, b"s4", told.of(4))
        await settled(journal)
        assert isinstance(told.failed[4], JournalFenced)

    assert run(store, body).safe == {1, 2, 3}


def test_of_two_who_begin_at_once_the_later_fence_counts(store: Store) -> None:
    fence(store, PREFIX, facts(journal="j1"), KEY)
    numbers: dict[str, int] = {}
    begin_at_once = threading.Barrier(2, timeout=60)

    def opening(name: str) -> None:
        begin_at_once.wait()
        numbers[name] = fence(store, PREFIX, facts(journal=name), KEY)

    threads = [threading.Thread(target=opening, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = sorted(numbers, key=numbers.__getitem__)
    assert numbers[second] == numbers[first] + 1

    async def body(log: ObjectLog, told: Told) -> None:
        journals = {
            name: log.create(facts(journal=name), segment=numbers[name]) for name in (first, second)
        }
        for n, journal in enumerate(journals.values()):
            journal.cut(1, b"", [], whole=True, done=told.of(n))
            await settled(journal)

    told = run(store, body)
    assert told.safe == {1} and isinstance(told.failed[0], JournalFenced)


def test_at_any_moment_of_a_fence_nothing_that_was_told_is_missing_in_what_is_read(
    store: Store,
) -> None:
    # Many owners, each fenced by the next one while it writes.
    told: dict[str, Told] = {}
    rng = Random(5)

    async def body(log: ObjectLog, _: Told) -> None:
        former: tuple[str, ObjectJournal] | None = None
        tasks = set()
        for generation in range(12):
            name = f"j{generation}"
            told[name] = Told()
            made = facts(journal=name)
            number = await asyncio.to_thread(fence, log.store, PREFIX, made, KEY)
            if former is not None:
                found = await asyncio.to_thread(load, log.store, former[0])
                safe = max(told[former[0]].safe)
                assert found.records[-1].number >= safe

            journal = log.create(made, segment=number)
            journal.cut(1, b"", [b"1"], whole=True, done=told[name].of(1))
            await settled(journal)
            former = (name, journal)

            async def write(journal: ObjectJournal = journal, name: str = name) -> None:
                number = 1
                while journal.error is None:
                    number += 1
                    journal.step(number, b"s", told[name].of(number))
                    await asyncio.sleep(0)
                assert isinstance(journal.error, JournalFenced)

            task = asyncio.create_task(write())
            if generation < 11:
                tasks.add(task)
            else:
                task.cancel()
            await asyncio.sleep(rng.random() / 50)
        await asyncio.gather(*tasks)

    run(store, body)


def test_without_conditional_puts_a_former_writer_would_not_be_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Overwriting(MemoryStore):
        def write_new(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
            return self.write(name, pieces)

    store = Overwriting()

    async def body(log: ObjectLog, told: Told) -> None:
        former = await begin(log, told)
        fence(log.store, PREFIX, facts(journal="j2"), KEY)
        former.step(2, b"", told.of(2))
        await settled(former)

    assert 2 in run(store, body).safe


# -- answers that are lost, stores that fail


class Losing(MemoryStore):
    """Does or does not what it is asked, and then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.script: Iterator[str] = iter(())

    def write_new(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
        match next(self.script, ""):
            case "lost answer":
                super().write_new(name, pieces)
                raise StoreError("the answer was lost", Outcome.UNKNOWN)
            case "lost request":
                raise StoreError("the request was lost", Outcome.UNKNOWN)
            case "repeated":
                super().write_new(name, pieces)
                raise Exists("the store repeats by itself")
        return super().write_new(name, pieces)


@pytest.mark.parametrize(
    "script",
    [
        ["lost answer"],
        ["lost request"],
        ["lost request", "lost answer"],
        ["lost answer", "lost answer"],
        ["repeated"],
    ],
)
def test_an_answer_that_is_lost_is_found_out(script: list[str]) -> None:
    store = Losing()

    async def body(log: ObjectLog, told: Told) -> None:
        journal = await begin(log, told)
        store.script = iter(script)
        journal.step(2, b"s2", told.of(2))
        await settled(journal)
        journal.step(3, b"s3", told.of(3))
        await settled(journal)

    assert run(store, body).safe == {1, 2, 3}
    assert [r.number for r in load(store).records] == [1, 2, 3]


def test_what_is_appended_while_a_store_is_away_waits_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(objects_module, "AGAIN_FIRST_S", 0.001)
    store = Losing()

    async def body(log: ObjectLog, told: Told) -> None:
        journal = await begin(log, told)
        store.script = itertools.repeat("lost request")
        for number in (2, 3):
            journal.step(number, b"s%d" % number, told.of(number))
        assert isinstance(log, Watched)
        while journal._again is None:
            await asyncio.wait([log.last])
            await asyncio.sleep(0)
        assert "cannot be written" in caplog.text
        journal.step(4, b"s4", told.of(4))
        assert told.safe == {1} and not told.failed and journal.phase is Phase.OPEN
        # It comes back in the middle of an answer.
        store.script = iter(["lost answer"])
        await settled(journal)

    told = run(store, body)
    assert told.safe == {1, 2, 3, 4} and "is written again" in caplog.text
    assert [r.number for r in load(store).records] == [1, 2, 3, 4]


def test_a_node_that_closes_does_not_wait_for_a_store_that_stays_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objects_module, "CLOSE_S", 0.01)
    store = Losing()

    async def body(log: ObjectLog, told: Told) -> None:
        journal = await begin(log, told)
        store.script = itertools.repeat("lost request")
        journal.step(2, b"", told.of(2))

    told = run(store, body)
    assert told.safe == {1} and set(told.failed) == {2}
    assert told.failed[2].outcome is Outcome.UNKNOWN


def test_one_that_is_closed_before_its_first_cut_says_so() -> None:
    async def body(log: ObjectLog, told: Told) -> None:
        journal = log.create(facts())
        journal.chunk([b"1"], told.of(1))
        journal.close(told.of(2))
        with pytest.raises(JournalFailed):
            journal.cut(1, b"", [], whole=True)

    told = run(MemoryStore(), body)
    assert set(told.failed) == {1} and told.safe == {2}


# -- damage


def test_every_byte_that_changes_is_refused_and_so_is_a_missing_segment() -> None:
    store = MemoryStore()

    async def body(log: ObjectLog, told: Told) -> None:
        journal = await begin(log, told)
        for number in (2, 3):
            journal.step(number, b"s%d" % number, told.of(number))
            await settled(journal)

    run(store, body)
    numbers = segments(store, PREFIX, "srv/1")
    whole = logged(load(store))
    for number in numbers[1:]:
        name = objects_module._name(PREFIX, "srv/1", number)
        data = bytes(store.read(name, ALL))
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= 1 << at % 8
            store.write(name, [changed])
            with pytest.raises(BadJournal):
                load(store)
        for cut in (1, 80, len(data) - 1):
            store.write(name, [data[:cut]])
            with pytest.raises(BadJournal):
                load(store)
        store.write(name, [data])
        if number != numbers[-1]:
            store.remove(name)
            with pytest.raises(BadJournal):
                load(store)
            store.write(name, [data])
    # Two that changed places, though each is as it was written.
    first, second = (objects_module._name(PREFIX, "srv/1", n) for n in numbers[2:4])
    a, b = bytes(store.read(first, ALL)), bytes(store.read(second, ALL))
    store.write(first, [b])
    store.write(second, [a])
    with pytest.raises(BadJournal, match="says that it is"):
        load(store)
    store.write(first, [a])
    store.write(second, [b])
    assert logged(load(store)) == whole
    with pytest.raises(BadJournal) as caught:
        load_objects(store, PREFIX, "srv/1", "j1", b"x" * 32, ALL)
    assert caught.value.flaw == "wrong key"
    with pytest.raises(BadJournal) as caught:
        load_objects(store, PREFIX, "srv/1", "j1", KEY, 600)
    assert caught.value.flaw == "store"


def test_a_large_base_is_the_same_when_it_comes_back(store: Store) -> None:
    data = os.urandom(1 << 20) * 20

    async def body(log: ObjectLog, told: Told) -> None:
        made = Facts(journal="j1", server="srv/1", cls="c", version=1, epoch=1)
        journal = log.create(made)
        journal.cut(1, b"", [data[:7], memoryview(data)[7:]], whole=True, done=told.of(1))
        await settled(journal)

    assert run(store, body).safe == {1}
    assert load(store).records[0].state == data
