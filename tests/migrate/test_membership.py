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
from migrate.shell.directories import MemoryDirectory, Put
from migrate.shell.membership import NodeRow, describe
from tests.core.fakes import NOW, A, core, row

MALFORMED = (b"", b"\xff", b"\x97", msgspec.msgpack.encode(["x@1"] * 7))


class Watcher:
    """Writes down who came and who went."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.went: list[str] = []

    def joined(self, row: NodeRow) -> None:
        self.came.append(row.id)

    def gone(self, row: NodeRow, cause: str) -> None:
        self.went.append(row.id)

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


def test_a_malformed_row_keeps_nobody_from_the_others_and_no_server_from_its_burial() -> None:
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
