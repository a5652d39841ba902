"""Moves that send a large state ahead while its server serves: between real nodes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import pathlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest

import migrate
from serializers import LoadFailed, dirty
from serializers.stream import StreamReader, StreamWriter
from tests.migrate.clusters import QUICK, failure_of, nodes, run, until

pytestmark = pytest.mark.usefixtures("cluster_secret")

OPTIONS = QUICK.replace(precopy_bytes_min=0, chunk_bytes=64 << 10, quiesce_timeout_s=2.0)
"""Small chunks, so that rounds have many, and calls come in between."""

Hook = Callable[[int], None]


class Stock:
    """Arrays, records, text: what goes ahead, and what does not."""

    events: dict[str, asyncio.Event] = {}  # noqa: RUF012 - shared by the test and the server
    inside = 0
    """Handlers that are running, of all such servers."""

    def __init__(self, kind: str = "mixed") -> None:
        self.n = 0
        self.array = np.zeros(131_072 if kind in ("arrays", "mixed") else 0)
        self.text = bytearray(300_000 if kind in ("arrays", "mixed") else 0)
        self.rows: dict[int, Any] = {}
        if kind in ("records", "mixed"):
            self.rows = {n: {"id": n, "tags": [n, "x"], "at": (n, 1.5)} for n in range(6000)}
        self.latest: Any = None
        self.extra: Any = None

    def write(self, seed: int) -> int:
        """Change something of each; the same in each process."""
        self.n += 1
        if len(self.array):
            self.array[seed * 7919 % len(self.array)] = seed
            self.text[seed * 104_729 % len(self.text)] = seed % 256
            if seed % 13 == 0:
                self.text.extend(b"grown" * 10)
            if seed % 29 == 0:
                # NB: the names, the attribute and the argument refer to it.
                self.array = np.concatenate((self.array[1:], [float(seed)]))
        if self.rows:
            row = self.rows[seed * 31 % 5000]
            row["id"] = float(seed) if seed % 2 else seed
            row["tags"] = [*row["tags"][-3:], seed]
            if seed % 5 == 0:
                # NB: no more than 1,000 of them, lest a move of ever more rows take ever longer.
                new = 10_000 + seed % 5000
                self.rows.pop(new, None)
                self.rows[new] = {"id": seed, "tags": [], "at": None}
            if seed % 7 == 0:
                self.rows.pop(5000 + seed % 1000, None)
            self.latest = row
        return self.n

    def rewrite(self) -> int:
        self.n += 1
        self.array += 1.0
        for n, row in self.rows.items():
            row["id"] = self.n + n
        return self.n

    def grow(self) -> int:
        """Fails if anybody exports the bytearray."""
        self.text.append(1)
        return len(self.text)

    def spoil(self) -> None:
        self.extra = (n for n in range(3) if n)
        next(self.extra)

    def mend(self) -> None:
        self.extra = None

    def count(self) -> int:
        return self.n

    def told(self) -> str:
        """A digest of all there is, and of which object is which."""
        whole = hashlib.blake2b(self.array.tobytes())
        whole.update(self.text)
        whole.update(repr((self.n, list(self.rows.items()))).encode())
        is_row = any(self.latest is row for row in self.rows.values())
        whole.update(repr((self.latest, is_row)).encode())
        return whole.hexdigest()

    async def wait(self, key: str) -> int:
        """Run until told to end, changing things on the way."""
        Stock.inside += 1
        try:
            self.rows[1]["id"] = "half"
            await self.events[key].wait()
            self.rows[1]["id"] = "whole"
            self.n += 1
            return self.n
        finally:
            Stock.inside -= 1

    @migrate.blocking
    def crunch(self, rounds: int) -> int:
        """Write from another thread, in a state that no one may see in between."""
        Stock.inside += 1
        try:
            for n in range(rounds):
                self.array[:] = n
            self.n += 1
            return self.n
        finally:
            Stock.inside -= 1


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = _descriptors()
    yield
    assert not dirty._pages.regions, "memory is still tracked"
    assert _descriptors() <= before + 8, "descriptors are left"


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Set `hook` to have it called, with its number, before each step of any round."""
    seen: dict[str, Any] = {"hook": None, "steps": 0}
    step = StreamWriter.step

    def stepped(self: StreamWriter, *args: Any) -> Any:
        seen["steps"] += 1
        if seen["hook"] is not None:
            seen["hook"](seen["steps"])
        return step(self, *args)

    monkeypatch.setattr(StreamWriter, "step", stepped)
    return seen


@contextlib.asynccontextmanager
async def writing(ref: Any) -> AsyncIterator[list[int]]:
    """A caller that writes all the time; the list has the seeds of what it wrote."""
    wrote: list[int] = []
    ended = False

    async def go_on() -> None:
        while not ended:
            wrote.append(len(wrote))
            assert await ref.write(wrote[-1]) == len(wrote)

    task = asyncio.create_task(go_on())
    try:
        yield wrote
    finally:
        ended = True
        await task


def replayed(kind: str, wrote: list[int]) -> Stock:
    twin = Stock(kind)
    for seed in wrote:
        twin.write(seed)
    return twin


@pytest.mark.parametrize("same_host", [True, False], ids=["shared memory", "grpc"])
@pytest.mark.parametrize("kind", ["arrays", "records", "mixed"])
def test_every_value_is_kept_over_many_moves_while_a_caller_writes(
    kind: str, same_host: bool
) -> None:
    async def body() -> None:
        options = OPTIONS.replace(same_host=same_host)
        async with nodes("a", "b", options=options) as (a, b):
            ref = await a.spawn(Stock, kind)
            reports = []
            async with writing(ref) as wrote:
                for n in range(6):
                    reports.append(await a.migrate(ref, to="ba"[n % 2]))
                    before = len(wrote)
                    await until(lambda before=before: len(wrote) > before + 3)
            assert await ref.told() == replayed(kind, wrote).told()
            assert [report.rounds > 1 for report in reports] == [True] * 6
            assert await ref.grow() > 0
            for node in (a, b):
                assert not node._driver.precopy._writers
                assert not node._driver.precopy._readers

    run(body())


def test_s43_a_writer_that_is_faster_than_the_wire_does_not_hold_a_move_up() -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            ref = await a.spawn(Stock)
            ended = False
            count = 0

            async def go_on() -> None:
                nonlocal count
                while not ended:
                    count += 1
                    assert await ref.rewrite() == count

            task = asyncio.create_task(go_on())
            reports = [await a.migrate(ref, to="ba"[n % 2]) for n in range(3)]
            ended = True
            await task
            assert all(1 < report.rounds <= 12 for report in reports)
            twin = Stock()
            for _ in range(count):
                twin.rewrite()
            assert await ref.told() == twin.told()

    run(body())


# -- rounds only look at quiescent points


def test_rounds_wait_while_a_handler_runs(at_step: dict[str, Any]) -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            ref = await a.spawn(Stock)
            Stock.events["w"] = asyncio.Event()
            calls: list[Any] = []
            seen: list[int] = []

            def hook(step: int) -> None:
                seen.append(Stock.inside)
                if step == 3:
                    calls.append(ref.wait("w"))
                    calls.append(ref.crunch(200))
                if step == 4:
                    calls.append(ref.crunch(200))
                if step > 4:
                    Stock.events["w"].set()

            at_step["hook"] = hook
            moving = asyncio.create_task(a.migrate(ref, to="b"))
            await until(lambda: len(calls) > 1)
            await until(lambda: Stock.inside > 0 or moving.done())
            # Steps go on between two handlers, not within one.
            steps = at_step["steps"]
            for _ in range(50):
                await asyncio.sleep(0)
            assert at_step["steps"] == steps
            Stock.events["w"].set()
            report = await moving
            assert report.rounds > 1
            assert set(seen) == {0}
            replies = [await call for call in calls]
            assert replies == list(range(1, len(calls) + 1))
            assert await ref.count() == len(calls)

    run(body())


# -- moves that fail on the way


async def check_unharmed(a: migrate.Node, ref: Any, to: str = "b") -> None:
    """The server serves at the source, its buffers are free, and the next move works."""
    assert not a._driver.core.moves_out and not a._driver.core.leaving
    assert not a._driver.precopy._writers
    before = await ref.grow()
    assert await ref.grow() == before + 1
    assert (await a.info(ref)).node == "a"
    assert (await a.migrate(ref, to=to)).rounds > 1
    assert await ref.grow() == before + 2


@pytest.mark.parametrize("which", [0, 1, 5])
def test_a_chunk_that_cannot_be_installed_rolls_the_move_back(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    take = StreamReader.take

    def refusing(self: StreamReader, chunk: Any) -> None:
        taken.append(1)
        if len(taken) == which + 1:
            raise LoadFailed("not this one")
        take(self, chunk)

    monkeypatch.setattr(StreamReader, "take", refusing)

    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, b):
            ref = await a.spawn(Stock)
            async with writing(ref) as wrote:
                error = await failure_of(a.migrate(ref, to="b"), migrate.MoveRolledBack)
            assert "not this one" in str(error)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert await ref.told() == replayed("mixed", wrote).told()
            await until(lambda: not b._driver.core.moves_in)
            assert not b._driver.precopy._readers
            await check_unharmed(a, ref)

    run(body())


def test_a_last_chunk_that_cannot_be_loaded_rolls_the_move_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusing(self: StreamReader, chunk: Any) -> None:
        raise LoadFailed("not the last one")

    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            ref = await a.spawn(Stock)
            with monkeypatch.context() as patch:
                patch.setattr(StreamReader, "last", refusing)
                async with writing(ref) as wrote:
                    error = await failure_of(a.migrate(ref, to="b"), migrate.MoveRolledBack)
            assert "not the last one" in str(error)
            assert await ref.told() == replayed("mixed", wrote).told()
            await check_unharmed(a, ref)

    run(body())


def test_a_state_that_outgrows_its_target_rolls_the_move_back() -> None:
    async def body() -> None:
        small = OPTIONS.replace(state_bytes_max=1 << 20)
        async with nodes("a", "b", "c", options=OPTIONS, b=small) as (a, *_):
            ref = await a.spawn(Stock)
            error = await failure_of(a.migrate(ref, to="b"), migrate.MoveError)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert "1048576" in str(error)
            await check_unharmed(a, ref, to="c")

    run(body())


def test_a_state_that_cannot_travel_any_more_is_named_and_stays(at_step: dict[str, Any]) -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            ref = await a.spawn(Stock)
            spoiling: list[Any] = []

            def hook(step: int) -> None:
                if step == 3:
                    spoiling.append(asyncio.ensure_future(ref.spoil()))

            at_step["hook"] = hook
            error = await failure_of(a.migrate(ref, to="b"), migrate.NotPicklable)
            assert error.path == "Stock.extra"
            await spoiling[0]
            await ref.mend()
            await check_unharmed(a, ref)

    run(body())


def test_a_target_that_does_not_answer_rolls_the_move_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()
    take = StreamReader.take

    def hanging(self: StreamReader, chunk: Any) -> None:
        assert go_on.wait(60.0)
        take(self, chunk)

    monkeypatch.setattr(StreamReader, "take", hanging)

    async def body() -> None:
        options = OPTIONS.replace(move_step_timeout_s=0.5)
        async with nodes("a", "b", options=options) as (a, b):
            ref = await a.spawn(Stock)
            async with writing(ref) as wrote:
                error = await failure_of(a.migrate(ref, to="b"), migrate.MoveRolledBack)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert await ref.told() == replayed("mixed", wrote).told()
            go_on.set()
            await until(lambda: not b._driver.core.moves_in)
            await check_unharmed(a, ref)

    run(body())


def test_a_handler_that_runs_for_ever_rolls_the_move_back(at_step: dict[str, Any]) -> None:
    async def body() -> None:
        options = OPTIONS.replace(quiesce_timeout_s=0.3)
        async with nodes("a", "b", options=options) as (a, _):
            ref = await a.spawn(Stock)
            Stock.events["ever"] = asyncio.Event()
            calls: list[Any] = []

            def hook(step: int) -> None:
                if step == 3:
                    calls.append(ref.wait("ever"))

            at_step["hook"] = hook
            error = await failure_of(a.migrate(ref, to="b"), migrate.MoveRolledBack)
            assert error.outcome is migrate.Outcome.NOT_DONE
            at_step["hook"] = None
            Stock.events["ever"].set()
            assert await calls[0] == 1
            await check_unharmed(a, ref)

    run(body())


@pytest.mark.parametrize("step", [1, 4])
def test_a_server_that_is_stopped_meanwhile_ends_the_move(
    step: int, at_step: dict[str, Any]
) -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, b):
            ref = await a.spawn(Stock)
            stopping: list[Any] = []

            def hook(number: int) -> None:
                if number == step:
                    stopping.append(asyncio.ensure_future(_settled(a.stop(ref))))

            at_step["hook"] = hook
            moved = await _settled(a.migrate(ref, to="b"))
            stopped = await stopping[0]
            # One of the two wins; the other one says so.
            assert isinstance(moved, migrate.MoveReport | migrate.MigrateError)
            if isinstance(stopped, Exception):
                assert isinstance(stopped, migrate.MigrateError)
                assert isinstance(moved, migrate.MoveReport)
                await a.stop(ref)
            await until(lambda: not b._driver.core.moves_in and not a._driver.core.moves_out)
            assert not a._driver.precopy._writers and not b._driver.precopy._readers

    run(body())


async def _settled(work: Any) -> Any:
    try:
        return await work
    except migrate.MigrateError as error:
        return error


def test_a_checkpoint_a_fork_and_a_second_move_while_rounds_go_on(
    at_step: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, b):
            ref = await a.spawn(Stock)
            url = f"file://{tmp_path}/stock.ckpt"
            others: list[Any] = []

            def hook(step: int) -> None:
                if step == 3:
                    others.append(asyncio.ensure_future(_settled(a.checkpoint(ref, url))))
                    others.append(asyncio.ensure_future(_settled(a.fork(ref, on="b"))))
                    others.append(asyncio.ensure_future(_settled(b.migrate(ref, to="b"))))

            at_step["hook"] = hook
            async with writing(ref) as wrote:
                report = await a.migrate(ref, to="b")
                at_step["hook"] = None
                saved, twin, second = [await other for other in others]
            assert report.target == "b"
            assert isinstance(second, migrate.MigrateError)
            assert await ref.told() == replayed("mixed", wrote).told()
            assert isinstance(saved, migrate.CheckpointInfo), saved
            # Both are of one instant, between two writes.
            restored = await b.restore(url, fork=True)
            count = await restored.count()
            assert await restored.told() == replayed("mixed", wrote[:count]).told()
            assert not isinstance(twin, Exception), twin
            count = await twin.count()
            assert await twin.told() == replayed("mixed", wrote[:count]).told()

    run(body())


class Field:
    """One large array."""

    def __init__(self, size: int) -> None:
        self.cells = np.zeros(size, dtype=np.uint8)

    def add(self, at: int) -> int:
        self.cells[at] += 1
        return int(self.cells[at])


def test_s44_what_is_left_for_the_quiescent_point_does_not_grow_with_the_state(
    at_step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    last = StreamWriter.last

    def counted(self: StreamWriter) -> Any:
        pieces = last(self)
        left.append(sum(map(len, pieces)))
        return pieces

    monkeypatch.setattr(StreamWriter, "last", counted)

    async def body(size: int) -> None:
        async with nodes("a", "b", options=OPTIONS.replace(same_host=False)) as (a, _):
            ref = await a.spawn(Field, size)
            field: Field = next(iter(a._driver.core.hosted.values())).host.obj
            places = iter(range(0, size, 65_536 + 4096))

            def write(step: int) -> None:
                # The same writes, in as many steps, however many more the larger state takes.
                if step <= 40:
                    field.cells[next(places)] += 1

            at_step["steps"] = 0
            at_step["hook"] = write
            report = await a.migrate(ref, to="b")
            at_step["hook"] = None
            assert report.rounds > 1 and report.bytes_sent > size
            assert await ref.add(1) == 1

    for size in (4 << 20, 8 << 20):
        run(body(size))
    # A page more or less is a write that came before or after the last look.
    small, large = left
    assert max(small, large) < 64 << 10, left


def test_a_monitor_is_told_of_each_round_and_then_of_the_move() -> None:
    async def body() -> None:
        options = OPTIONS.replace(same_host=False)
        async with nodes("a", "b", options=options) as (a, b):
            ref = await a.spawn(Field, 2 << 20)
            events: list[migrate.Event] = []

            async def watch() -> None:
                async for event in b.monitor(ref):
                    events.append(event)
                    if [event.kind for event in events].count("moved") == 2:
                        break

            watching = asyncio.create_task(watch())
            await until(lambda: bool(a._driver._round_waiters))
            first = await a.migrate(ref, to="b")
            await until(lambda: bool(b._driver._round_waiters))
            second = await a.migrate(ref, to="a")
            await watching
            assert not [task for task in asyncio.all_tasks() if "rounds" in repr(task)]
        for report in (first, second):
            told = [event for event in events if event.cause.endswith(f"to {report.target}")]
            moved = [event.node for event in events if event.kind == "moved"]
            assert moved == ["b", "a"]
            # The last round may be told by the move itself.
            assert report.rounds - 2 <= len(told) <= report.rounds - 1
            assert told[0].kind == "copying" and told[0].cause.startswith("round 1 sent 2")
            assert told[0].node == report.source

    run(body())


@pytest.mark.cluster
def test_s45_a_move_does_not_need_a_second_copy_of_the_state_at_its_source() -> None:
    size = 192 << 20
    extra_max = 48 << 20  # two chunks of 4 MiB, on their way through the channel's buffers

    async def peak_of(move: Any, pid: int) -> int:
        process = psutil.Process(pid)
        before = most = process.memory_info().rss
        moving = asyncio.ensure_future(move)
        while not (await asyncio.wait([moving], timeout=0.002))[0]:
            most = max(most, process.memory_info().rss)
        await moving
        return most - before

    async def body(options: migrate.NodeOptions) -> int:
        async with migrate.LocalCluster(nodes=2, options=options) as cluster:
            client = cluster.client
            ref = await client.spawn(Field, size, options=migrate.SpawnOptions(on="n1"))
            await ref.add(1)
            # Its pages are there from here on.
            await client.migrate(ref, to="n2")
            await client.migrate(ref, to="n1")
            pid = cluster.node("n1").pid
            return await peak_of(client.migrate(ref, to="n2"), pid)

    grpc = QUICK.replace(same_host=False)
    assert run(body(grpc)) < extra_max


@pytest.mark.parametrize("step", [1, 5])
def test_a_server_replaced_by_its_checkpoint_while_rounds_go_on_is_not_what_was_sent_ahead(
    step: int, at_step: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, b):
            ref = await a.spawn(Stock)
            for seed in range(3):
                await ref.write(seed)
            url = f"file://{tmp_path}/stock.ckpt"
            await a.checkpoint(ref, url)
            at_step["steps"] = 0  # A checkpoint is written in steps as well.
            for seed in range(3, 8):
                await ref.write(seed)
            restoring: list[Any] = []

            def hook(number: int) -> None:
                if number == step:
                    work = _settled(b.restore(url, replace=True, on="a"))
                    restoring.append(asyncio.ensure_future(work))

            at_step["hook"] = hook
            moved = await _settled(a.migrate(ref, to="b"))
            at_step["hook"] = None
            restored = await restoring[0]
            await until(lambda: not b._driver.core.moves_in and not a._driver.core.moves_out)
            with contextlib.suppress(migrate.RolledBack):
                await ref.count()
            count = await ref.count()
            assert count == (8 if isinstance(restored, Exception) else 3), (moved, restored)
            assert await ref.told() == replayed("mixed", list(range(count))).told()
            where = (await a.info(ref)).node
            assert (await a.migrate(ref, to="ab"[where == "a"])).rounds > 1
            assert await ref.told() == replayed("mixed", list(range(count))).told()

    run(body())
