"""Rows of nodes and servers that somebody else has written."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Coroutine, Iterable
from typing import Any

import msgspec
import pytest
from msgspec import structs

from migrate.core.directory import Row, RowState
from migrate.errors import PeerError
from migrate.shell import membership, wire
from migrate.shell.directories import DirectoryUnavailable, Entry, MemoryDirectory, Put
from migrate.shell.membership import NodeRow, describe
from tests.core.fakes import NOW, A, core, row

MALFORMED = (b"", b"\xff", b"\x97", msgspec.msgpack.encode(["x@1"] * 7))


class Watcher:
    """Writes down who came and who went."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.went: list[str] = []
        self.news: list[str] = []
        self.changed = asyncio.Event()

    def joined(self, row: NodeRow) -> None:
        self.came.append(row.id)

    def gone(self, row: NodeRow, cause: str) -> None:
        self.went.append(row.id)

    def suspected(self, node: str) -> None:
        self.news.append(f"suspected {node}")
        self.changed.set()

    def heard(self, node: str) -> None:
        self.news.append(f"heard {node}")
        self.changed.set()

    def burials(
        self, node: str, rows: Iterable[tuple[Row, int]]
    ) -> tuple[list[tuple[Row, int]], bool]:
        at, _ = core(A)
        at.node_dead(node, NOW)
        return at.burials(node, rows, 0)


def ended_process() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_malformed_row_keeps_nobody_from_the_others_and_no_server_from_its_burial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "LAST_WORD_MS", 10)

    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []

        def run(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
            tasks.append(asyncio.create_task(work))
            return tasks[-1]

        dead = structs.replace(describe("d@1", "d", "127.0.0.1:2"), pid=ended_process())
        async with MemoryDirectory() as directory:
            await directory.txn(
                [],
                [
                    *(Put(f"node/bad{n}", data) for n, data in enumerate(MALFORMED)),
                    *(Put(f"server/bad{n}", data) for n, data in enumerate(MALFORMED)),
                    Put("server/s", wire.encode_row(row("s", owner="d@1"))),
                    Put("name/named", b"\xff"),
                    Put("node/d@1", membership.encode_node(dead)),
                ],
                [],
            )
            watcher = Watcher()
            me = membership.Membership(
                directory, describe("a@1", "a", "127.0.0.1:1"), watcher, 10.0, run
            )
            await me.join()
            [burial] = [task for task in tasks if task.get_coro().__name__ == "_bury"]  # type: ignore[union-attr]
            await burial
            entry = await directory.get("server/s")
            assert entry is not None and wire.decode_row(entry.value).state is RowState.LOST
            assert watcher.went == ["d@1"]
            # The same when they are heard of one by one.
            await directory.txn([], [Put("node/worse", b"\x97")], [])
            other = structs.replace(describe("o@1", "o", "127.0.0.1:3"), host="elsewhere")
            await directory.txn([], [Put("node/o@1", membership.encode_node(other))], [])
            while "o@1" not in watcher.came:
                await me.changed.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_what_a_dead_node_had_asked_for_and_comes_through_late_is_buried_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row that it wrote for a server of its own: seed 5062 of the standbys' schedules."""
    monkeypatch.setattr(membership, "LAST_WORD_MS", 500)

    async def main() -> None:
        tasks: list[asyncio.Task[Any]] = []

        def run(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
            tasks.append(asyncio.create_task(work))
            return tasks[-1]

        dead = structs.replace(describe("d@1", "d", "127.0.0.1:2"), pid=ended_process())
        async with MemoryDirectory() as directory:
            await directory.txn([], [Put("node/d@1", membership.encode_node(dead))], [])
            me = membership.Membership(
                directory, describe("a@1", "a", "127.0.0.1:1"), Watcher(), 10.0, run
            )
            await me.join()
            [burial] = [task for task in tasks if task.get_coro().__name__ == "_bury"]  # type: ignore[union-attr]
            while await directory.get("node/d@1") is not None:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0.005)
            await directory.txn([], [Put("server/s", wire.encode_row(row("s", owner="d@1")))], [])
            await burial
            entry = await directory.get("server/s")
            assert entry is not None and wire.decode_row(entry.value).state is RowState.LOST
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


def test_a_name_whose_node_cannot_be_read_is_not_taken_over() -> None:
    async def main() -> None:
        async with MemoryDirectory() as directory:
            await directory.txn([], [Put("nodename/a", b"x@1"), Put("node/x@1", b"\xff")], [])
            me = membership.Membership(
                directory, describe("a@1", "a", "127.0.0.1:1"), Watcher(), 10.0, _none
            )
            with pytest.raises(PeerError, match="malformed"):
                await me.join()

    asyncio.run(main())


def _none(work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    raise AssertionError(f"nothing was to be begun, but {name} was")


class Silenced:
    """A membership of node a, which watches node b by the keys that a test writes."""

    def __init__(self, directory: MemoryDirectory, patience_s: float = 0.02) -> None:
        self.directory = directory
        self.watcher = Watcher()
        self.patience_s = patience_s
        self.tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Silenced:
        other = describe("b@1", "b", "127.0.0.1:2")
        await self.directory.txn([], [Put("node/b@1", membership.encode_node(other))], [])
        me = membership.Membership(
            self.directory,
            describe("a@1", "a", "127.0.0.1:1"),
            self.watcher,
            10.0,
            self._run,
            patience_s=self.patience_s,
        )
        await me.join()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    async def renew(self) -> None:
        await self.directory.txn([], [Put("alive/b@1", b"")], [])

    async def run_out(self) -> None:
        await self.directory.txn([], [], ["alive/b@1"])

    async def told(self, *news: str) -> None:
        async with asyncio.timeout(20.0):
            while self.watcher.news != list(news):
                self.watcher.changed.clear()
                await self.watcher.changed.wait()

    def waits(self) -> list[asyncio.Task[Any]]:
        """What is patient with the other node."""
        return [t for t in self.tasks if t.get_name() == "silence of b@1" and not t.done()]


def test_a_node_is_suspected_when_its_lease_has_run_out_and_heard_when_it_has_another() -> None:
    async def main() -> None:
        async with MemoryDirectory() as directory, Silenced(directory) as at:
            await at.told("suspected b@1")  # It never had one.
            await at.renew()
            await at.told("suspected b@1", "heard b@1")
            await at.run_out()
            await at.told("suspected b@1", "heard b@1", "suspected b@1")
            assert at.watcher.went == []  # Nobody has seen it die.

    asyncio.run(main())


def test_a_node_that_takes_another_lease_in_time_is_not_suspected() -> None:
    async def main() -> None:
        async with MemoryDirectory() as directory, Silenced(directory, 3600.0) as at:
            await at.renew()
            await at.run_out()
            while not at.waits():  # noqa: ASYNC110 - until the watch has told of it
                await asyncio.sleep(0)
            [waiting] = at.waits()
            await at.renew()
            async with asyncio.timeout(20.0):
                await asyncio.wait([waiting])
            assert waiting.cancelled()
            assert at.watcher.news == []

    asyncio.run(main())


def test_nobody_is_suspected_while_the_directory_is_away() -> None:
    async def main() -> None:
        class Away(MemoryDirectory):
            asked = 0

            async def get(self, key: str) -> Any:
                if key == "alive/b@1" and self.asked < 2:
                    self.asked += 1
                    assert at.watcher.news == []
                    raise DirectoryUnavailable("away")
                return await super().get(key)

        async with Away() as directory:
            at = Silenced(directory)
            async with at:
                await at.told("suspected b@1")
                assert directory.asked == 2

    asyncio.run(main())


def test_a_node_that_is_back_before_the_directory_was_read_is_not_suspected() -> None:
    """The watch may be late: what counts is a reading."""

    async def main() -> None:
        class Late(MemoryDirectory):
            async def get(self, key: str) -> Any:
                if key == "alive/b@1":
                    read.set()
                    return Entry(key, b"", 1)
                return await super().get(key)

        read = asyncio.Event()
        async with Late() as directory, Silenced(directory) as at:
            [waiting] = [task for task in at.tasks if task.get_name() == "silence of b@1"]
            await asyncio.wait([waiting])
            assert read.is_set()
            assert at.watcher.news == []

    asyncio.run(main())
