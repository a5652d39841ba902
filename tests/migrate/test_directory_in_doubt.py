"""Spawning and stopping while the directory gives no answer, or one that came too late."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import structs

import migrate
from migrate.shell import wire
from migrate.shell.directories.base import Compare, DirectoryUnavailable, OutcomeUnknown, Put
from migrate.shell.driver import SERVER_KEY
from tests.migrate.clusters import QUICK, failure_of, nodes, run, until
from tests.migrate.servers import Counter

pytestmark = pytest.mark.usefixtures("cluster_secret")


def answer(node: Any, *kinds: str) -> list[str]:
    """Let the next transactions end so: "swallowed" (done, unknown), "away" (not done).

    Returns:
        Those that are still to come.
    """
    txn = node._directory.txn
    left = list(kinds)

    async def faulty(*args: Any, **kwargs: Any) -> Any:
        kind = left.pop(0) if left else "done"
        if kind == "away":
            raise DirectoryUnavailable("away")
        done = await txn(*args, **kwargs)
        if kind == "swallowed":
            raise OutcomeUnknown("no answer")
        return done

    node._directory.txn = faulty
    return left


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("migrate.node.RETRY_S", 0.001)
    yield


def test_a_spawn_in_doubt_is_not_called_undone_because_the_directory_went_away():
    async def body() -> None:
        async with nodes("a") as (a,):
            left = answer(a, "swallowed", "away", "away")
            ref = await a.spawn(Counter, options=migrate.SpawnOptions(name="hits"))
            assert left == []
            assert await ref.incr() == 1
            assert await (await a.whereis("hits")).incr() == 2

    run(body())


def test_a_spawn_that_was_surely_not_written_says_so():
    async def body() -> None:
        async with nodes("a") as (a,):
            answer(a, "away")
            error = await failure_of(a.spawn(Counter, options=migrate.SpawnOptions(name="hits")))
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert await a.servers() == []
            await a.spawn(Counter, options=migrate.SpawnOptions(name="hits"))

    run(body())


def test_a_stop_in_doubt_does_not_let_a_server_without_a_row_serve_on():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            left = answer(a, "swallowed")
            await a.stop(ref)
            assert left == []
            assert await a.servers() == []
            await failure_of(ref.incr(), migrate.ServerNotFound)

    run(body())


def test_a_stop_that_was_surely_not_written_lets_the_server_serve_on():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            answer(a, "away")
            error = await failure_of(a.stop(ref))
            assert error.outcome is migrate.Outcome.NOT_DONE and "serves on" in str(error)
            assert await ref.incr() == 1
            await a.stop(ref)

    run(body())


def test_a_stop_whose_removal_takes_too_long_is_reported_as_unknown_and_goes_on():
    async def body() -> None:
        async with nodes("a", options=QUICK.replace(quiesce_timeout_s=0.2)) as (a,):
            ref = await a.spawn(Counter)
            answered = asyncio.Event()
            txn: Any = a._directory.txn

            async def late(*args: Any, **kwargs: Any) -> Any:
                done = await txn(*args, **kwargs)
                await answered.wait()
                return done

            a._directory.txn = late  # type: ignore[method-assign]
            error = await failure_of(a.stop(ref))
            assert error.outcome is migrate.Outcome.UNKNOWN
            # Its row is gone already: it must not be told to serve.
            answered.set()
            await failure_of(ref.incr(), migrate.ServerNotFound)

    run(body())


def test_a_removal_that_comes_through_late_takes_no_row_that_was_written_since():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, options=migrate.SpawnOptions(name="hits"))
            key = SERVER_KEY + ref._server_id
            directory = b._directory
            txn, under_way = a._directory.txn, asyncio.Event()
            late: list[Any] = []

            async def slow(*args: Any, **kwargs: Any) -> Any:
                late.append((args, kwargs))
                under_way.set()
                raise OutcomeUnknown("no answer")

            a._directory.txn = slow  # type: ignore[method-assign]
            stopping = asyncio.ensure_future(a.stop(ref))
            await under_way.wait()
            # Its node is found dead meanwhile, and the server restored elsewhere.
            entry = await directory.get(key)
            assert entry is not None
            row = wire.decode_row(entry.value)
            restored = structs.replace(row, owner=b._id, epoch=row.epoch + 1)
            put = Put(key, wire.encode_row(restored))
            assert (await directory.txn([Compare(key, entry.rev)], [put], [])).ok
            args, kwargs = late[0]
            assert not (await txn(*args, **kwargs)).ok
            # It is another node's, so nothing more is tried, however often it looks.
            looks = 0
            get = a._directory.get

            async def counted(key: str) -> Any:
                nonlocal looks
                looks += 1
                return await get(key)

            a._directory.get = counted  # type: ignore[method-assign]
            await until(lambda: looks > 3)
            tried = len(late)
            await until(lambda: looks > 6)
            assert len(late) == tried
            # Nor is the name free.
            await failure_of(b.spawn(Counter, options=migrate.SpawnOptions(name="hits")))
            found = await directory.get(key)
            assert found is not None and wire.decode_row(found.value) == restored
            # Were it this node's after all, the removal would go on.
            a._directory.txn = txn  # type: ignore[method-assign]
            put = Put(key, wire.encode_row(row))
            assert (await directory.txn([Compare(key, found.rev)], [put], [])).ok
            await stopping
            assert await directory.get(key) is None
            await b.spawn(Counter, options=migrate.SpawnOptions(name="hits"))

    run(body())


class FailsToStart:
    def on_start(self) -> None:
        raise ValueError("no")

    def ping(self) -> None: ...


def test_a_spawn_whose_hook_fails_frees_its_name_even_if_the_directory_is_away_meanwhile():
    async def body() -> None:
        async with nodes("a") as (a,):
            left = answer(a, "done", "away", "swallowed")
            named = migrate.SpawnOptions(name="hits")
            await failure_of(a.spawn(FailsToStart, options=named), ValueError)
            assert await a.servers() == [] and left == []
            await a.spawn(Counter, options=named)

    run(body())
