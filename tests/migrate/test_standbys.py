"""Hot standbys of nodes in one process: who stands by, and what callers see when one takes over.

An owner is made to look dead by taking its key from the directory, though it lives on: the hardest
case, since it goes on believing that it is the owner.
"""

from __future__ import annotations

import asyncio
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import pytest

import migrate
from migrate.core.placement import Candidate
from migrate.errors import Outcome
from migrate.ref import ref_object
from migrate.shell.standbys import StandbyStreams
from tests.migrate.clusters import QUICK, eventually, failure_of, linked, nodes, run, until
from tests.migrate.servers import Counter

pytestmark = pytest.mark.usefixtures("cluster_secret")

OPTIONS = QUICK.replace(promote_patience_s=0.05)


class Noted:
    """Keeps what it was told, and in its class which hooks ran where."""

    hooks: list[tuple[str, str]] = []  # noqa: RUF012 - shared by the test and the server

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, what: str) -> int:
        self.said.append(what)
        return len(self.said)

    def all(self) -> list[str]:
        return self.said

    async def on_promote(self) -> None:
        self.hooks.append(("on_promote", migrate.current().node))

    async def on_stop(self) -> None:
        self.hooks.append(("on_stop", migrate.current().node))


class Stubborn:
    """Cannot travel once it was locked."""

    def __init__(self) -> None:
        self.thing: Any = None

    def lock(self, on: bool) -> None:
        self.thing = (i for i in [1]) if on else None
        if on:
            next(self.thing)  # A generator that has begun.


class Unloadable:
    """Can be pickled, and not be loaded."""

    def __getstate__(self) -> int:
        return 1

    def __setstate__(self, state: int) -> None:
        raise RuntimeError("no state like this is known here")


class Caller:
    """Calls another server in the middle of its own run."""

    def __init__(self, other: Any) -> None:
        self.other = other
        self.calls = 0

    async def pass_on(self) -> int:
        self.calls += 1
        return int(await self.other.incr())


class Fickle:
    """Asks one or the other of two servers, differently each time it is run."""

    runs = 0  # of all copies: they are in one process here

    def __init__(self, first: Any, second: Any) -> None:
        self.others = [first, second]

    async def ask(self) -> int:
        asked = self.others[Fickle.runs % 2]
        Fickle.runs += 1
        return int(await asked.wait())

    def get(self) -> int:
        return 7


class Waits:
    """Answers when it is told to."""

    events: dict[str, asyncio.Event] = {}  # noqa: RUF012 - shared by the test and the server

    def __init__(self, key: str) -> None:
        self.key = key
        self.asked = 0

    async def wait(self) -> int:
        self.asked += 1
        self.events[f"{self.key} asked"].set()
        await self.events[f"{self.key} go on"].wait()
        return self.asked


def server_of(ref: Any) -> str:
    return ref_object(ref)._server_id


def owner_of(ref: Any, peers: list[migrate.Node]) -> migrate.Node:
    """The node whose copy of a server acts."""
    [owner] = [peer for peer in peers if server_of(ref) in peer._driver.core.hosted]
    return owner


async def look_dead(node: migrate.Node) -> None:
    """Let the others suspect a node."""
    await node._directory.txn([], [], [f"alive/{node.id}"])


def standbys(info: migrate.ServerInfo) -> tuple[str, ...]:
    return info.standbys


def test_replicate_returns_when_the_standbys_are_in_sync_and_info_tells_of_them() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, _, c):
            ref = await a.spawn(Counter)
            info = await c.replicate(ref, ["c", "b"])
            assert info == await a.info(ref)
            assert (info.node, info.standbys, info.mode) == ("a", ("b", "c"), "sync")
            assert info.epoch > 1
            assert [(f.node, f.state) for f in info.followers] == [
                ("b", "in sync"),
                ("c", "in sync"),
            ]
            assert [i.standbys for i in await c.servers()] == [("b", "c")]

            info = await a.replicate(ref, [])
            assert (info.standbys, info.mode, info.followers) == ((), None, ())
            assert await ref.incr() == 1

    run(body())


@migrate.server(reentrant=True)
class Nested:
    async def go(self, other: Any) -> int:
        return int(await other.back(migrate.current().ref))

    async def inner(self) -> int:
        return 1


class Back:
    async def back(self, nested: Any) -> int:
        return int(await nested.inner())


def test_reentrant_servers_have_async_standbys_alone() -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            other = await a.spawn(Back)
            ref = await a.spawn(Nested)
            error = await failure_of(a.replicate(ref, ["b"]))
            assert isinstance(error, migrate.StandbyError) and "reentrant" in str(error)
            assert error.outcome is Outcome.NOT_DONE
            with_one = migrate.SpawnOptions(standbys=1)
            error = await failure_of(a.spawn(Nested, options=with_one))
            assert isinstance(error, migrate.UsageError) and "reentrant" in str(error)
            assert len(await a.servers()) == 2
            await a.replicate(ref, ["b"], mode="async")
            assert await ref.go(other) == 1

    run(body())


def test_standbys_are_changed_while_calls_run() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Counter)
            got: list[int] = []
            ended = False

            async def call(peer: migrate.Node) -> None:
                mine = peer._ref(await peer._read(server_of(ref)))
                while not ended:
                    got.append(await mine.incr())

            callers = [asyncio.create_task(call(peer)) for peer in (a, b, c)]
            for wish in (["b"], ["c"], ["b", "c"], 1, 2, [], ["b"], 0):
                info = await b.replicate(ref, wish)
                count = wish if isinstance(wish, int) else len(wish)
                assert len(info.standbys) == count
                before = len(got)
                await until(lambda seen=before: len(got) > seen + 10)  # type: ignore[misc]
            ended = True
            await asyncio.gather(*callers)
            assert sorted(got) == list(range(1, len(got) + 1))

    run(body())


def test_a_standby_takes_over_from_an_owner_that_looks_dead_and_nothing_is_lost_or_repeated() -> (
    None
):
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as all_nodes:
            a, b, c = all_nodes
            ref = await a.spawn(Counter)
            await a.replicate(ref, ["b"])
            got: list[int] = []
            ended = False

            async def call(peer: migrate.Node) -> None:
                mine = peer._ref(await peer._read(server_of(ref)))
                while not ended:
                    got.append(await mine.incr())

            callers = [asyncio.create_task(call(peer)) for peer in all_nodes]
            await until(lambda: len(got) > 20)
            await look_dead(a)
            await until(lambda: server_of(ref) in b._driver.core.hosted)
            await until(lambda: server_of(ref) not in a._driver.core.hosted)
            seen = len(got)
            await until(lambda: len(got) > seen + 20)
            ended = True
            await asyncio.gather(*callers)
            assert sorted(got) == list(range(1, len(got) + 1))
            assert (await c.info(ref)).node == "b"

    run(body())


def test_the_set_is_completed_again_after_a_failover_by_who_is_not_suspected() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Counter)
            await a.replicate(ref, ["b"])
            assert await ref.incr() == 1
            await look_dead(a)
            await eventually(lambda: has(c, ref, "b", ("c",)))
            # The node that was named owns it: another one stands in. It takes over in turn.
            await look_dead(b)
            await until(lambda: server_of(ref) in c._driver.core.hosted)
            assert await ref.incr() == 2

    run(body())


async def has(peer: Any, ref: Any, node: str, expected: tuple[str, ...]) -> bool:
    """Whether a server has this owner and these standbys."""
    info = await peer.info(ref)
    return (info.node, info.standbys) == (node, expected)


def test_a_standby_that_leaves_is_replaced_and_a_named_one_comes_back_into_the_set() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Counter)
            await a.replicate(ref, ["b"])
            await b.close()
            await eventually(lambda: has(a, ref, "a", ("c",)))
            async with migrate.Node(name="b", directory=a._directory, options=OPTIONS) as again:
                await linked(again, [a, c])
                await eventually(lambda: has(a, ref, "a", ("b",)))
                assert await ref.incr() == 1

    run(body())


def test_a_set_that_lacks_a_node_is_completed_when_one_joins() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, _, c):
            ref = await a.spawn(Counter)
            await a.replicate(ref, 2)
            await c.close()
            await eventually(lambda: has(a, ref, "a", ("b",)))
            async with migrate.Node(name="d", directory=a._directory, options=OPTIONS):
                await eventually(lambda: has(a, ref, "a", ("b", "d")))

    run(body())


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_server_that_is_replaced_by_a_checkpoint_has_its_standbys_and_their_mode_again(
    mode: Literal["sync", "async"], tmp_path: pathlib.Path
) -> None:
    async def body() -> None:
        place = (tmp_path / "hits.ckpt").as_uri()
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            wish = migrate.SpawnOptions(on="a", standbys=["b"], standby_mode=mode)
            ref: Any = await c.spawn(Counter, options=wish)
            assert await ref.incr() == 1
            await c.checkpoint(ref, place)
            assert await ref.incr() == 2
            await c.restore(place, replace=True)
            if mode == "sync":
                # Whoever is told that it was restored is told what b knows.
                assert (await c.info(ref)).standbys == ("b",)
                assert b._driver.core.standbys.backups[server_of(ref)].epoch >= 3
            await eventually(lambda: has(c, ref, "a", ("b",)))
            assert (await c.info(ref)).mode == mode
            await failure_of(ref.incr(), migrate.RolledBack)
            assert await ref.incr() == 2
            if mode == "sync":
                await look_dead(a)
                await until(lambda: owner_is_one_of(ref, b))
                assert await ref.incr() == 3

    run(body())


def test_a_clone_and_a_server_that_was_lost_have_no_standbys_unless_asked_for(
    tmp_path: pathlib.Path,
) -> None:
    async def body() -> None:
        place = (tmp_path / "hits.ckpt").as_uri()
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            ref = await a.spawn(Counter, options=migrate.SpawnOptions(on="a", standbys=["b"]))
            await a.checkpoint(ref, place)
            for twin in (await a.fork(ref), await a.restore(place, fork=True)):
                assert (await a.info(twin)).standbys == ()
                assert not a._driver.core.hosted[server_of(twin)].wanted.names
            await a.stop(ref)
            back = await a.restore(place, on="a")
            assert (await a.info(back)).standbys == ()
            await a.replicate(back, ["b"])
            assert (await a.info(back)).standbys == ("b",)

    run(body())


def test_a_drained_node_keeps_no_standby_that_another_one_can_have() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, _, c):
            ref = await a.spawn(Counter)
            await a.replicate(ref, ["b"])
            await c.drain("b")
            await eventually(lambda: has(a, ref, "a", ("c",)))

    run(body())


def test_a_server_goes_to_its_standby_when_its_node_is_drained_or_closed() -> None:
    async def body() -> None:
        Noted.hooks.clear()
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Noted)
            await a.replicate(ref, ["b"])
            assert await ref.say("one") == 1
            await c.drain("a")
            await eventually(lambda: has(c, ref, "b", ("c",)))
            await b.close()
            mine = c._ref(await c._read(server_of(ref)))
            assert await mine.all() == ["one"]
            assert (await c.info(ref)).node == "c"
            assert Noted.hooks == []  # It was moved, and never stopped.

    run(body())


def test_a_server_is_migrated_to_its_standby_and_its_other_standbys_stay() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Counter)
            await a.replicate(ref, ["b", "c"])
            assert await ref.incr() == 1
            report = await c.migrate(ref, to="b")
            assert (report.source, report.target) == ("a", "b")
            assert await ref.incr() == 2
            # b was named, and owns it: a stands in.
            await eventually(lambda: has(b, ref, "b", ("a", "c")))
            await look_dead(b)
            await until(lambda: server_of(ref) not in b._driver.core.hosted)
            assert await ref.incr() == 3

    run(body())


def test_who_monitors_is_told_of_standbys_that_join_and_go_and_of_who_takes_over() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, _, c):
            ref = await a.spawn(Counter)
            told: list[tuple[str, str, str]] = []
            watching = asyncio.ensure_future(watch(c, ref, told))
            await watched(c)
            await a.replicate(ref, ["b", "c"])
            await until(lambda: len(told) == 2)
            assert sorted(told) == [
                ("standby_joined", "a", "b"),
                ("standby_joined", "a", "c"),
            ]
            await a.replicate(ref, ["b"])
            await until(lambda: len(told) == 3)
            assert told[2] == ("standby_lost", "a", "c")
            await look_dead(a)
            await until(lambda: len(told) >= 4)
            assert told[3] == ("promoted", "b", "node a is gone")
            watching.cancel()
            await asyncio.wait([watching])

    run(body())


async def watch(peer: migrate.Node, ref: Any, told: list[tuple[str, str, str]]) -> None:
    async for event in peer.monitor(ref):
        told.append((event.kind, event.node, event.cause))


async def watched(peer: migrate.Node) -> None:
    """Wait until a monitor of a node watches the row."""
    directory: Any = peer._directory

    def watches() -> bool:
        return any(
            getattr(task.get_coro(), "__name__", "") == "_row_changes"
            for task in asyncio.all_tasks()
        )

    await until(watches)
    await directory.list("server/")


def test_the_one_who_takes_over_runs_its_hook_before_the_first_message() -> None:
    async def body() -> None:
        Noted.hooks.clear()
        async with nodes("a", "b", options=OPTIONS) as (a, b):
            ref = await a.spawn(Noted)
            await a.replicate(ref, ["b"])
            assert await ref.say("one") == 1
            await look_dead(a)
            await until(lambda: server_of(ref) in b._driver.core.hosted)
            mine = b._ref(await b._read(server_of(ref)))
            assert await mine.say("two") == 2
            assert await mine.all() == ["one", "two"]
            assert Noted.hooks == [("on_promote", "b")]

    run(body())


def test_calls_that_a_replicated_server_makes_are_made_once() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            # NB: the ref is a's own; one that c made would call in the name of c.
            counter = await a.spawn(Counter, options=migrate.SpawnOptions(on="c"))
            ref = await a.spawn(Caller, counter)
            await a.replicate(ref, ["b"])
            got: list[int] = []
            ended = False

            async def call() -> None:
                mine = c._ref(await c._read(server_of(ref)))
                while not ended:
                    got.append(await mine.pass_on())

            calling = asyncio.create_task(call())
            await until(lambda: len(got) > 10)
            await look_dead(a)
            await until(lambda: server_of(ref) in b._driver.core.hosted)
            seen = len(got)
            await until(lambda: len(got) > seen + 10)
            ended = True
            await calling
            assert got == list(range(1, len(got) + 1))
            counts = c._ref(await c._read(server_of(counter)))
            assert await counts.get() == len(got)

    run(body())


def test_a_handler_that_asks_for_other_things_when_it_is_run_again_ends_in_an_error() -> None:
    async def body() -> None:
        Fickle.runs = 0
        Waits.events = {
            f"{key} {what}": asyncio.Event() for key in "xy" for what in ("asked", "go on")
        }
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            there = migrate.SpawnOptions(on="c")
            x, y = [await a.spawn(Waits, key, options=there) for key in "xy"]
            ref = await a.spawn(Fickle, x, y)
            await a.replicate(ref, ["b"])
            mine = c._ref(await c._read(server_of(ref)))
            asking = asyncio.ensure_future(mine.ask())
            await Waits.events["x asked"].wait()
            await look_dead(a)  # In the middle of its run.
            error = await failure_of(asking, migrate.ReplayDiverged)
            assert error.outcome is Outcome.UNKNOWN
            assert server_of(ref) in b._driver.core.hosted
            assert Fickle.runs == 2 and not Waits.events["y asked"].is_set()
            Waits.events["x go on"].set()
            assert await mine.get() == 7  # It serves on.

    run(body())


def test_the_same_question_asked_again_gets_the_same_answer() -> None:
    async def body() -> None:
        Waits.events = {f"x {what}": asyncio.Event() for what in ("asked", "go on")}
        Fickle.runs = 0
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            x = await a.spawn(Waits, "x", options=migrate.SpawnOptions(on="c"))
            ref = await a.spawn(Fickle, x, x)
            await a.replicate(ref, ["b"])
            mine = c._ref(await c._read(server_of(ref)))
            asking = asyncio.ensure_future(mine.ask())
            await Waits.events["x asked"].wait()
            await look_dead(a)
            await until(lambda: Fickle.runs == 2)
            assert server_of(ref) in b._driver.core.hosted
            Waits.events["x go on"].set()
            assert await asking == 1  # Asked twice, and once it was.

    run(body())


# ------------------------------------------------------------------ large states


class Table:
    """Records in a dict, and memory that is written in place."""

    def __init__(self, records: int, size: int) -> None:
        self.records = {f"key {n}": {"n": n, "text": f"record {n}"} for n in range(records)}
        self.memory = bytearray(size)

    def put(self, n: int, at: int) -> str:
        self.records[f"key {n}"] = {"n": n, "text": f"put at {at}"}
        if self.memory:
            self.memory[at % len(self.memory)] = n % 256
        return self.digest()

    def grow(self, size: int) -> str:
        self.memory += bytes(size)
        return self.digest()

    def digest(self) -> str:
        """Of what it is, computed anew."""
        data = hashlib.sha256(
            repr(sorted((k, v["n"], v["text"]) for k, v in self.records.items())).encode()
        )
        data.update(self.memory)
        return data.hexdigest()


@pytest.mark.parametrize(("records", "size"), [(3000, 0), (0, 2 << 20), (3000, 2 << 20)])
def test_a_large_state_is_followed_change_by_change_and_taken_over_as_it_was(
    records: int, size: int
) -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Table, records, size)
            await a.replicate(ref, ["b", "c"])
            digest = ""
            for n in range(60):
                digest = await ref.put(n * 50, n * 4099)
            await look_dead(a)
            await until(lambda: owner_is_one_of(ref, b, c))
            mine = c._ref(await c._read(server_of(ref)))
            assert await mine.digest() == digest
            for n in range(20):
                digest = await mine.put(n * 7, n * 911)
            assert await mine.digest() == digest

    run(body())


def owner_is_one_of(ref: Any, *peers: migrate.Node) -> bool:
    return any(server_of(ref) in peer._driver.core.hosted for peer in peers)


def test_a_move_to_a_standby_ships_only_what_changed_last() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Table, 3000, 2 << 20)
            await a.replicate(ref, ["b", "c"])
            digest = await ref.put(1, 1)
            report = await a.migrate(ref, to="b")
            assert report.bytes_sent < 64 << 10  # Of more than 2 MiB.
            assert await ref.digest() == digest
            # The next one too, and back to a node that never stood by: all of it.
            await eventually(lambda: has(c, ref, "b", ("a", "c")))
            digest = await ref.put(2, 2)
            report = await b.migrate(ref, to="c")
            assert report.bytes_sent < 64 << 10
            assert await ref.digest() == digest

    run(body())


def test_a_state_that_grows_goes_on_as_a_stream_of_changes() -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, b):
            ref = await a.spawn(Table, 10, 100)
            await a.replicate(ref, ["b"])
            streams = a._driver.streams
            assert not streams._writers  # Whole in each cut.
            await ref.grow(3 << 20)
            for n in range(5):
                digest = await ref.put(n, n * 4099)
            assert len(streams._writers) == 1
            await look_dead(a)
            await until(lambda: owner_is_one_of(ref, b))
            assert await b._ref(await b._read(server_of(ref))).digest() == digest

    run(body())


def test_a_change_of_a_large_state_costs_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    capture = StandbyStreams.capture

    def measured(self: StandbyStreams, *args: Any) -> bytes:
        state = capture(self, *args)
        sizes.append(len(state))
        return state

    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            ref = await a.spawn(Table, 3000, 4 << 20)
            await a.replicate(ref, ["b"])
            sizes.clear()
            for n in range(20):
                await ref.put(n, n * 4099)
            assert len(sizes) >= 20
            assert max(sizes) < 64 << 10  # Of more than 4 MiB.

    monkeypatch.setattr(StandbyStreams, "capture", measured)
    run(body())


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("wish", "kind", "why"),
    [
        (["b", "nowhere"], migrate.NodeNotFound, "nowhere"),
        (["b", "a"], migrate.StandbyError, "node a owns it"),
        (["c"], migrate.StandbyError, "node c is cordoned or draining"),
        (3, migrate.StandbyError, "3 were asked for, and besides its owner 1 nodes"),
    ],
)
def test_a_standby_that_cannot_be_is_named_and_the_former_ones_stay(
    wish: Any, kind: type[migrate.MigrateError], why: str
) -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            await b.cordon("c")
            await until(lambda: not admits(a, c))
            ref = await a.spawn(Counter)
            before = await a.replicate(ref, ["b"])
            error = await failure_of(b.replicate(ref, wish), kind)
            assert why in str(error)
            assert error.outcome is Outcome.NOT_DONE
            after = await a.info(ref)
            assert (after.standbys, after.epoch) == (before.standbys, before.epoch)
            assert await ref.incr() == 1

    run(body())


def admits(peer: migrate.Node, other: migrate.Node) -> bool:
    candidate: Candidate | None = peer._meter.candidate(other.id)
    return candidate is None or candidate.admits


def test_a_node_that_refuses_is_named_with_its_reason_and_the_former_ones_stay() -> None:
    async def body() -> None:
        full = OPTIONS.replace(servers_max=1)
        async with nodes("a", "b", "c", options=OPTIONS, c=full) as (a, _, c):
            await c.spawn(Counter)
            ref = await a.spawn(Counter)
            await a.replicate(ref, ["b"])
            error = await failure_of(a.replicate(ref, ["c"]), migrate.StandbyError)
            assert "node c does not stand by: it holds its limit of 1 servers" in str(error)
            assert (error.node, error.outcome) == ("c", Outcome.NOT_DONE)
            assert (await a.info(ref)).standbys == ("b",)

    run(body())


@pytest.mark.parametrize("make", [Stubborn, Unloadable])
def test_a_state_that_cannot_travel_is_said_and_the_server_serves(make: Callable[[], Any]) -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            ref: Any = await a.spawn(make)
            if make is Stubborn:
                await ref.lock(True)
            error = await failure_of(a.replicate(ref, ["b"]), migrate.StandbyError)
            expected = "generator" if make is Stubborn else "no state like this is known here"
            assert expected in str(error)
            info = await a.info(ref)
            assert (info.standbys, info.followers) == ((), ())
            if make is Stubborn:
                await ref.lock(False)
                assert (await a.replicate(ref, ["b"])).standbys == ("b",)

    run(body())


def test_a_state_that_cannot_travel_any_more_leaves_the_server_alone_and_serving() -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            ref: Any = await a.spawn(Stubborn)
            await a.replicate(ref, ["b"])
            await ref.lock(True)
            await eventually(lambda: has(a, ref, "a", ()))
            await ref.lock(False)
            assert (await a.replicate(ref, ["b"])).standbys == ("b",)

    run(body())


def test_a_wish_that_cannot_be_is_an_error_of_the_caller() -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            ref = await a.spawn(Counter)
            for wish in ("b", ["b", "b"], [1], -1, 17, None, True):
                await failure_of(a.replicate(ref, wish), migrate.UsageError)  # type: ignore[arg-type]
            await failure_of(a.replicate(ref, ["b"], mode="quick"), migrate.UsageError)  # type: ignore[arg-type]

    run(body())


# ------------------------------------------------------------------ spawning, modes


def test_a_server_is_spawned_with_standbys() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, _):
            options = migrate.SpawnOptions(standbys=2, standby_mode="async")
            info = await a.info(await a.spawn(Counter, options=options))
            assert (info.standbys, info.mode) == (("b", "c"), "async")
            options = migrate.SpawnOptions(name="hits", on="a", standbys=["b"])
            info = await a.info(await b.spawn(Counter, 5, options=options))
            assert (info.node, info.standbys, info.mode) == ("a", ("b",), "sync")

    run(body())


def test_the_wish_for_standbys_is_at_the_standby_before_anything_else_is() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Counter, options=migrate.SpawnOptions(standbys=["b"]))
            await look_dead(a)  # No message was handled yet.
            await eventually(lambda: has(c, ref, "b", ("c",)))
            assert b._driver.core.hosted[server_of(ref)].wanted.names == ("b",)

    run(body())


def test_a_spawn_whose_standbys_cannot_be_leaves_no_server() -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            options = migrate.SpawnOptions(name="hits", standbys=2)
            error = await failure_of(a.spawn(Counter, options=options), migrate.StandbyError)
            assert "2 were asked for" in str(error)
            assert await a.servers() == []
            await a.spawn(Counter, options=migrate.SpawnOptions(name="hits", standbys=1))

    run(body())


def test_the_mode_is_changed_both_ways_while_calls_run() -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, b):
            ref = await a.spawn(Counter)
            got: list[int] = []
            ended = False

            async def call() -> None:
                mine = b._ref(await b._read(server_of(ref)))
                while not ended:
                    got.append(await mine.incr())

            calling = asyncio.create_task(call())
            for mode in ("sync", "async", "sync"):
                info = await a.replicate(ref, ["b"], mode=mode)  # type: ignore[arg-type]
                assert (info.standbys, info.mode) == (("b",), mode)
                seen = len(got)
                await until(lambda before=seen: len(got) > before + 10)  # type: ignore[misc]
            ended = True
            await calling
            assert got == list(range(1, len(got) + 1))

    run(body())


def test_an_async_standby_that_takes_over_tells_each_caller_once_that_time_went_back() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Counter)
            await a.replicate(ref, ["b"], mode="async")
            mine = c._ref(await c._read(server_of(ref)))
            for n in range(1, 6):
                assert await mine.incr() == n
            await look_dead(a)
            await until(lambda: server_of(ref) in b._driver.core.hosted)
            # NB: until it knows, the former owner answers: nothing holds its replies back.
            await until(lambda: server_of(ref) not in a._driver.core.hosted)
            error = await failure_of(mine.incr(), migrate.RolledBack)
            assert error.then is not None and error.then <= error.now
            value = await mine.incr()
            assert 1 <= value <= 6  # As much as b had.
            assert await mine.incr() == value + 1

    run(body())
