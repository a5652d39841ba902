"""Nodes while their etcd is slow, without a leader, restarted, compacted or gone: what goes on,
what waits, what fails, and that nothing has changed hands when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

import migrate
from migrate.errors import Outcome
from migrate.shell import membership
from migrate.shell.directories import DirectoryUnavailable, EtcdDirectory
from tests.cluster.etcd_servers import EtcdServer, etcd_cluster, etcd_server, needs_etcd
from tests.cluster.proxy import proxy_to
from tests.cluster.test_etcd_directory import compact, patient
from tests.migrate.clusters import QUICK, linked, run, until
from tests.migrate.servers import Counter

pytestmark = [pytest.mark.cluster, needs_etcd]

T = TypeVar("T")

LEASE_S = 1.0
OPTIONS = QUICK.replace(lease_s=LEASE_S)


def etcd(*addresses: str) -> EtcdDirectory:
    """With less patience than by default, so that a test need not wait for as long."""
    return EtcdDirectory(addresses, call_timeout_s=1.0, patience_s=2.0)


class Calling:
    """Calls a server all the time; every number must come once, in order."""

    def __init__(self, node: migrate.Node, ref: Any) -> None:
        self.made = 0
        self._node = node
        self._ref = ref
        self._ended = False
        self._task = asyncio.create_task(self._call())

    async def _call(self) -> None:
        while not self._ended:
            assert await self._node.call(self._ref, Counter.incr, 1) == self.made + 1
            self.made += 1
            await asyncio.sleep(0.001)

    async def some_more(self, count: int = 50) -> None:
        until = self.made + count
        while self.made < until and not self._task.done():  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.005)
        if self._task.done():
            await self._task

    async def drop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def end(self) -> int:
        self._ended = True
        await self._task
        return self.made


@contextlib.asynccontextmanager
async def three_nodes(*addresses: str) -> AsyncIterator[tuple[list[migrate.Node], Any, Calling]]:
    """Nodes a, b and c; a server at a that is called from b and from c."""
    async with patient(*addresses):
        pass  # However long etcd takes to be there.
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for name in "abc":
            directory = await stack.enter_async_context(etcd(*addresses))
            node = migrate.Node(name, directory=directory, options=OPTIONS)
            nodes.append(await stack.enter_async_context(node))
        for node in nodes:
            await linked(node, nodes)
            await knows(node, nodes)
        ref = await nodes[0].spawn(Counter, options=migrate.SpawnOptions(name="hits"))
        calling = Calling(nodes[1], ref)
        try:
            await calling.some_more()
            yield nodes, ref, calling
            made = await calling.end()
        finally:
            await calling.drop()
        assert await nodes[2].call(ref, Counter.get) == made


async def knows(node: migrate.Node, others: list[migrate.Node]) -> None:
    """Wait until a node has read the rows of all the others; links may be up before that, since
    whoever comes later calls.
    """
    await until(lambda: all(it.id in node._membership.nodes for it in others))


async def once_it_is_back(verb: Callable[[], Awaitable[T]]) -> T:
    """What a verb returns once the directory serves; before that it must fail cleanly."""
    while True:
        try:
            return await verb()
        except DirectoryUnavailable:
            pass
        except migrate.MigrateError as error:
            assert error.outcome is Outcome.NOT_DONE and "does not serve now" in str(error)


async def nothing_moved(nodes: list[migrate.Node], ref: Any, calling: Calling) -> None:
    """The owner and the nodes are those of before, and a move is possible again."""
    before = await once_it_is_back(lambda: nodes[1].info(ref))
    assert (before.node, before.epoch) == ("a", 1)
    for node in nodes:
        assert sorted(row.name for row in node._membership.nodes.values()) == ["a", "b", "c"]
    await calling.some_more()
    report = await once_it_is_back(lambda: nodes[2].migrate(ref, to="b"))
    assert report.epoch == 2
    await calling.some_more()
    # The nodes are alive by their leases again, too.
    for node in nodes:
        async with asyncio.timeout(60):
            alive = membership.ALIVE_KEY + node.id
            while await once_it_is_back(lambda n=node, k=alive: n._directory.get(k)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def moves_and_spawns_fail_cleanly(nodes: list[migrate.Node], ref: Any) -> None:
    for node in nodes[:2]:
        with pytest.raises(migrate.MigrateError, match="does not serve now") as caught:
            await node.migrate(ref, to="b")
        assert caught.value.outcome is Outcome.NOT_DONE
    # Also where whoever asks can still read the directory, and the owner cannot.
    with pytest.raises(migrate.MoveError, match="stays on node a") as caught:
        await nodes[0]._move_from_here(ref._server_id, nodes[1].id)
    assert caught.value.outcome is Outcome.NOT_DONE
    with pytest.raises(migrate.MigrateError):
        await nodes[1].spawn(Counter)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stopped", "killed", "cut", "slow"])
def test_s49_while_etcd_is_away_for_ten_leases_calls_go_on_and_nothing_changes_hands(
    tmp_path: Path, fault: str
) -> None:
    async def main(server: EtcdServer) -> None:
        async with (
            proxy_to(server.address) as proxy,
            three_nodes(proxy.address) as (nodes, ref, calling),
        ):
            match fault:
                case "stopped":
                    server.pause()
                case "killed":
                    server.kill()
                case "cut":
                    proxy.passes_answers = proxy.passes_requests = False
                    proxy.cut()
                case "slow":
                    proxy.delay_s = 3.0
            loop = asyncio.get_running_loop()
            away_until_s = loop.time() + 10 * LEASE_S
            while loop.time() < away_until_s:
                await moves_and_spawns_fail_cleanly(nodes, ref)
                await calling.some_more()
            match fault:
                case "stopped":
                    server.resume()
                case "killed":
                    server.start()
                case "cut":
                    proxy.passes_answers = proxy.passes_requests = True
                    proxy.cut()
                case "slow":
                    proxy.delay_s = 0.0
            await nothing_moved(nodes, ref, calling)

    with etcd_server(tmp_path) as server:
        run(main(server))


def test_a_log_that_is_compacted_while_etcd_is_away_is_listed_again(tmp_path: Path) -> None:
    async def main(server: EtcdServer) -> None:
        async with (
            proxy_to(server.address) as proxy,
            three_nodes(proxy.address) as (nodes, ref, calling),
            etcd(server.address) as witness,
        ):
            proxy.passes_answers = proxy.passes_requests = False
            proxy.cut()
            # One more joins and is heard of by nobody, and the log forgets it.
            async with migrate.Node("d", directory=etcd(server.address), options=OPTIONS) as late:
                _, rev = await witness.list("")
                await compact(witness, rev)
                await calling.some_more()
                proxy.passes_answers = proxy.passes_requests = True
                proxy.cut()
                for node in nodes:
                    await linked(node, [node, late])
                    await knows(node, [node, late])
            await linked(nodes[0], nodes)
            async with asyncio.timeout(60):
                while any(late.id in node._membership.nodes for node in nodes):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await nothing_moved(nodes, ref, calling)

    with etcd_server(tmp_path) as server:
        run(main(server))


@pytest.mark.slow
def test_without_a_leader_calls_go_on_and_moves_wait_for_the_next_one(tmp_path: Path) -> None:
    async def main(servers: list[EtcdServer]) -> None:
        async with three_nodes(*(it.address for it in servers)) as (nodes, ref, calling):
            # Two of three stopped: whoever is left has no leader.
            servers[0].pause()
            servers[1].pause()
            await moves_and_spawns_fail_cleanly(nodes, ref)
            await calling.some_more()
            servers[0].resume()
            await nothing_moved(nodes, ref, calling)
            servers[1].resume()

    with etcd_cluster(tmp_path) as servers:
        run(main(servers))


def test_the_view_of_the_nodes_is_compared_with_a_fresh_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "RELIST_S", 0.1)

    async def main(server: EtcdServer) -> None:
        async with (
            three_nodes(server.address) as (nodes, ref, calling),
            etcd(server.address) as directory,
        ):
            # As if the watch had lost an event.
            lost = nodes[0]._membership.nodes.pop(nodes[1].id)
            async with asyncio.timeout(60):
                while nodes[0]._membership.nodes.get(lost.id) != lost:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert (await directory.list("node/"))[0]
            assert ref is not None and calling.made

    with etcd_server(tmp_path) as server:
        run(main(server))
