"""Clients: connect and its blocking twin, with every verb, and without their first node."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pytest

import migrate
from migrate.client import SyncClient
from migrate.shell.directories import DirectoryUnavailable
from migrate.shell.membership import Membership
from tests.migrate.clusters import QUICK, break_links, eventually, failure_of, nodes, run, until
from tests.migrate.servers import Busy, Counter, Gate, Where

pytestmark = pytest.mark.usefixtures("cluster_secret")

T = TypeVar("T")


@contextlib.asynccontextmanager
async def client_of(node: migrate.Node) -> AsyncIterator[Any]:
    async with migrate.connect(node.address, options=QUICK) as client:
        yield client


def test_a_client_has_every_verb_of_a_node():
    async def body() -> None:
        async with nodes("a", "b") as (a, _), client_of(a) as client:
            named = migrate.SpawnOptions(name="hits", on="b")
            ref = await client.spawn(Counter, 1, options=named)
            assert await ref.incr() == 2
            assert await client.call(ref, Counter.incr, 3) == 5
            await ref.incr.cast(5)
            assert await ref.get() == 10
            assert await client.whereis("hits") == ref
            error = await failure_of(client.spawn(Counter, options=named), migrate.NameTaken)
            assert await error.ref.incr() == 11
            report = await client.migrate(ref, to="a")
            assert (report.source, report.target) == ("b", "a")
            assert (await client.info(ref)).node == "a"
            assert [i.id for i in await client.servers()] == [ref._server_id]
            assert [n.name for n in await client.nodes()] == ["a", "b"]
            assert await (await client.spawn(Where)).node() == "a"
            assert await (await client.spawn_lb(Where)).node() in "ab"
            near = migrate.SpawnOptions(near=ref)
            assert await (await client.spawn(Where, options=near)).node() == "a"
            assert {r.target for r in await client.drain("a")} == {"b"}
            await client.cordon("a", False)
            await client.stop(ref)
            await failure_of(ref.incr(), migrate.ServerNotFound)
            await failure_of(client.migrate(ref, to="b"), migrate.ServerNotFound)

    run(body())


def test_a_client_finds_a_node_that_its_own_node_has_not_heard_of_yet(
    monkeypatch: pytest.MonkeyPatch,
):
    async def never(self: Membership) -> None:
        await asyncio.Event().wait()

    async def body() -> None:
        with monkeypatch.context() as deaf:
            deaf.setattr(Membership, "_follow", never)
            async with nodes("a", directory="memory://deaf") as (a,), client_of(a) as client:
                async with migrate.Node(name="b", directory="memory://deaf", options=QUICK):
                    assert list(a._membership.nodes) == [a.id]
                    ref = await client.spawn(Counter, options=migrate.SpawnOptions(on="b"))
                    assert await ref.incr() == 1

    run(body())


def test_a_node_is_not_gone_because_another_has_not_heard_of_it_yet(
    monkeypatch: pytest.MonkeyPatch,
):
    """The client would never again send anything to it."""

    async def away() -> None:
        raise DirectoryUnavailable("not now", url="")

    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, c), client_of(a) as client:
            ref = await client.spawn(Counter, 1, options=migrate.SpawnOptions(on="c"))
            # What `b` would tell if word of `c` had not come to it.
            behind = b._membership
            with monkeypatch.context() as patched:
                patched.setattr(behind, "_list", away)
                patched.setattr(behind, "rev", behind.rev - 1)
                patched.delitem(behind.nodes, c.id)
                patched.setattr(client, "_entry", b.id)
                await client._learn_nodes(None)
                assert c.id in client._nodes and c.id not in client._driver.core.dead
                assert await ref.incr() == 2
                # One that follows waits until `b` has heard.
                following = asyncio.create_task(client._learn_nodes((a.id, b.id)))
                behind.changed.set()
                behind.changed = asyncio.Event()
                await asyncio.wait([following], timeout=0.05)
                assert not following.done()
            behind._notify()
            await following
            assert c.id in client._nodes and await ref.incr() == 3

    run(body())


def test_a_node_whose_view_is_behind_asks_the_directory():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            rev = b._membership.rev
            await b.spawn(Counter)  # so that the directory's revision goes on
            _, now = await b._membership.directory.list("nodes/")
            assert now > rev
            told, rows = await b._nodes_after((), now)
            assert told >= now and {row[0] for row in rows} == {a.id, b.id}

    run(body())


def test_errors_of_verbs_and_handlers_reach_a_client_as_themselves():
    async def body() -> None:
        async with nodes("a", "b") as (a, _), client_of(a) as client:
            ref = await client.spawn(Counter)
            error = await failure_of(client.migrate(ref, to="x"), migrate.NodeNotFound)
            assert "a, b" in str(error)
            assert isinstance(await failure_of(client.migrate(ref, to="a")), migrate.TargetRefused)
            with pytest.raises(TypeError):
                await ref.incr("not a number")
            with pytest.raises(migrate.ServerNotFound):
                await client.whereis("nobody")
            assert await ref.incr() == 1

    run(body())


def test_a_monitor_of_a_client_sees_moves_and_the_stop():
    async def body() -> None:
        async with nodes("a", "b") as (a, _), client_of(a) as client:
            ref = await client.spawn(Counter)
            kinds: list[str] = []

            async def watch() -> None:
                async for event in client.monitor(ref):
                    kinds.append(event.kind)

            task = asyncio.create_task(watch())
            while not kinds:
                await client.migrate(ref, to="b" if (await client.info(ref)).node == "a" else "a")
            await client.stop(ref)
            await asyncio.wait_for(task, 20)
            assert set(kinds) == {"moved", "stopped"} and kinds[-1] == "stopped"

    run(body())


def test_a_client_goes_on_when_the_node_it_entered_by_leaves():
    async def body() -> None:
        async with nodes("b") as (b,):
            a = migrate.Node(name="a", directory=b._directory, options=QUICK)
            await a.start()
            async with client_of(a) as client:
                on_b = migrate.SpawnOptions(name="stays", on="b")
                ref = await client.spawn(Counter, options=on_b)
                assert await ref.incr() == 1
                await a.close()
                assert await ref.incr() == 2
                assert await client.whereis("stays") == ref

                async def only_b() -> bool:
                    return [n.name for n in await client.nodes()] == ["b"]

                await eventually(only_b)
                assert await (await client.spawn(Where)).node() == "b"

    run(body())


def test_a_client_learns_of_nodes_that_join_later():
    async def body() -> None:
        async with nodes("a") as (a,), client_of(a) as client:
            async with migrate.Node(name="late", directory=a._directory, options=QUICK):
                ref = await client.spawn(Counter, options=migrate.SpawnOptions(on="late"))
                assert await ref.incr() == 1
                await client.migrate(ref, to="a")
            assert await ref.incr() == 2

    run(body())


def test_a_client_whose_links_break_loses_and_repeats_nothing():
    async def body() -> None:
        async with nodes("a", "b") as (a, _), client_of(a) as client:
            ref = await client.spawn(Counter, options=migrate.SpawnOptions(on="b"))
            calls = []
            for _ in range(6):
                await until(lambda: len(client._links.peers()) == 2)
                calls += [ref.incr() for _ in range(20)]
                await asyncio.sleep(0)
                assert break_links(client) == 2
                await calls[-1]
            assert await asyncio.gather(*calls) == list(range(1, 121))

    run(body())


def test_a_verb_under_way_when_the_link_breaks_is_done_once():
    async def body() -> None:
        async with nodes("a", "b") as (a, _), client_of(a) as client:
            Gate.events["verb"] = asyncio.Event()
            ref = await client.spawn(Gate, "verb")
            call = ref.pass_through()
            moving = asyncio.create_task(client.migrate(ref, to="b"))
            await until(lambda: bool(a._driver.core.leaving))
            break_links(client)
            Gate.events["verb"].set()
            report = await moving
            assert (report.target, report.epoch) == ("b", 2)
            assert await call == 1
            assert await ref.count() == 1

    run(body())


def test_closing_a_client_tells_whoever_waits_and_leaves_the_servers():
    async def body() -> None:
        async with nodes("a") as (a,):
            Gate.events["closed"] = asyncio.Event()
            async with client_of(a) as client:
                ref = await client.spawn(Gate, "closed")
                call = ref.pass_through()
                await until(lambda: bool(a._driver.core.hosted[ref._server_id].running))
            error = await failure_of(call, migrate.CallError)
            assert error.outcome is migrate.Outcome.UNKNOWN and error.cause == "closed"
            with pytest.raises(migrate.UsageError, match="closed"):
                await client.servers()
            error = await failure_of(ref._bound_to(client._driver).count(), migrate.CallError)
            assert error.outcome is migrate.Outcome.NOT_DONE
            Gate.events["closed"].set()
            assert await ref._bound_to(a._driver).count() == 1

    run(body())


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "nonsense", "127.0.0.1:", "", "127.0.0.1:99999"]
)
def test_an_address_where_nothing_listens_is_an_error_that_names_it(address: str):
    async def body() -> None:
        client = migrate.connect(address, timeout_s=1.0)
        error = await failure_of(client.__aenter__())
        assert error.outcome is migrate.Outcome.NOT_DONE
        assert repr(address)[1:-1] in str(error)

    run(body())


def test_a_client_is_used_once_and_not_before_it_is_open():
    async def body() -> None:
        async with nodes("a") as (a,):
            client = migrate.connect(a.address)
            with pytest.raises(migrate.UsageError, match="not open"):
                await client.servers()
            async with client:
                pass
            await client.close()
            with pytest.raises(migrate.UsageError, match="twice"):
                await client.__aenter__()

    run(body())


def test_clients_cannot_be_asked_for_anything():
    async def body() -> None:
        async with nodes("a") as (a,), client_of(a) as client:
            error = await failure_of(a._asks.ask(client.id, "servers"), migrate.UsageError)
            assert "client" in str(error)

    run(body())


# ---------------------------------------------------------------- the blocking twin


def blocking(work: Callable[[SyncClient, migrate.Node], T]) -> T:
    """Run something that blocks against two nodes, in a thread of its own."""

    async def body() -> T:
        async with nodes("a", "b") as (a, _):

            def in_thread() -> T:
                with migrate.connect_sync(a.address, options=QUICK) as client:
                    return work(client, a)

            return await asyncio.to_thread(in_thread)

    return run(body())


def test_the_blocking_client_has_every_verb_and_its_refs_block():
    def work(client: SyncClient, a: migrate.Node) -> None:
        ref = client.spawn(Counter, 1, options=migrate.SpawnOptions(name="hits", on="b"))
        assert ref.incr() == 2
        assert ref.incr(3) == 5
        assert client.call(ref, Counter.incr, 1) == 6
        assert client.call(ref, "incr", 1) == 7
        assert ref.incr.cast() is None
        assert ref.get() == 8
        assert ref.incr.with_options(timeout=5)(2) == 10
        found = client.whereis("hits")
        assert found == ref and found.incr() == 11
        with pytest.raises(migrate.NameTaken) as taken:
            client.spawn(Counter, options=migrate.SpawnOptions(name="hits"))
        assert taken.value.ref.incr() == 12
        assert client.migrate(ref, to="a").target == "a"
        assert client.info(ref).node == "a"
        assert [n.name for n in client.nodes()] == ["a", "b"]
        assert [s.id for s in client.servers()] == [ref._server_id]
        assert client.spawn_lb(Counter).incr() == 1
        near = client.spawn(Where, options=migrate.SpawnOptions(near=ref))
        assert near.node() == "a"
        assert len(client.drain("a")) >= 2
        client.cordon("a", False)
        client.stop(ref)
        with pytest.raises(migrate.ServerNotFound):
            ref.incr()
        with pytest.raises(AttributeError):
            client.nonsense()

    blocking(work)


def test_refs_inside_of_results_block_too():
    def work(client: SyncClient, a: migrate.Node) -> None:
        counter = client.spawn(Counter)
        holder = client.spawn(Keeps, counter)
        assert holder.get().incr() == 1
        assert holder.get_all()["list"][0].incr() == 2

    blocking(work)


class Keeps:
    def __init__(self, ref: Any) -> None:
        self.ref = ref

    def get(self) -> Any:
        return self.ref

    def get_all(self) -> dict[str, Any]:
        return {"list": [self.ref]}


def test_the_blocking_client_serves_several_threads():
    def work(client: SyncClient, a: migrate.Node) -> None:
        ref = client.spawn(Counter)
        got: list[int] = []
        lock = threading.Lock()

        def calls() -> None:
            for _ in range(50):
                value = ref.incr()
                with lock:
                    got.append(value)

        threads = [threading.Thread(target=calls) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == list(range(1, 201))

    blocking(work)


def test_errors_and_time_outs_reach_the_blocking_caller():
    def work(client: SyncClient, a: migrate.Node) -> None:
        ref = client.spawn(Busy)
        with pytest.raises(migrate.CallTimeout):
            ref.work.with_options(timeout=0.05)(0.5)
        with pytest.raises(TypeError):
            ref.work()
        with pytest.raises(migrate.NodeNotFound):
            client.migrate(ref, to="x")

    blocking(work)


def test_a_blocking_monitor_ends_with_the_server():
    def work(client: SyncClient, a: migrate.Node) -> None:
        ref = client.spawn(Counter)
        kinds: list[str] = []
        moved = threading.Event()

        def watch() -> None:
            for event in client.monitor(ref):
                kinds.append(event.kind)
                moved.set()

        thread = threading.Thread(target=watch)
        thread.start()
        while not moved.is_set():
            client.migrate(ref, to="b" if client.info(ref).node == "a" else "a")
        client.stop(ref)
        thread.join(20)
        assert not thread.is_alive()
        assert kinds[-1] == "stopped" and set(kinds) == {"moved", "stopped"}

    blocking(work)


def test_a_closed_blocking_client_says_so():
    async def body() -> None:
        async with nodes("a") as (a,):

            def in_thread() -> None:
                with migrate.connect_sync(a.address) as client:
                    ref = client.spawn(Counter)
                    assert ref.incr() == 1
                client.close()
                with pytest.raises(migrate.UsageError):
                    client.servers()
                with pytest.raises(migrate.UsageError):
                    ref.incr()
                with pytest.raises(migrate.UsageError):
                    client.__enter__()

            await asyncio.to_thread(in_thread)

    run(body())


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_a_blocking_client_of_nothing_leaves_no_thread(in_a_loop: bool):
    before = set(threading.enumerate())

    def connect() -> None:
        with pytest.raises(migrate.MigrateError):
            migrate.connect_sync("127.0.0.1:1", timeout_s=0.5).__enter__()

    async def notebook() -> None:
        connect()

    if in_a_loop:
        asyncio.run(notebook())
    else:
        connect()
    assert [t for t in threading.enumerate() if t not in before and t.name == "migrate"] == []
