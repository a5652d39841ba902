"""Right uses of the public API; each revealed type is compared; never run."""

import asyncio
import pathlib
from typing import Literal, reveal_type

import migrate
from tests.typing.classes import Box, Counter, Room


async def refs(node: migrate.Node, ref: migrate.Ref[Counter], room: migrate.Ref[Room]) -> None:
    reveal_type(ref)  # revealed: type[Counter]
    pending = reveal_type(ref.incr(3))  # revealed: Coroutine[Any, Any, int]
    task = asyncio.create_task(pending)
    reveal_type(await task)  # revealed: int
    reveal_type(await ref.incr(3))  # revealed: int
    reveal_type(await ref.incr())  # revealed: int
    reveal_type(await ref.incr(by=3))  # revealed: int
    reveal_type(await ref.peek(scale=2.0))  # revealed: float
    reveal_type(await ref.crunch("p"))  # revealed: int
    reveal_type(await ref.crunch_for_all("p"))  # revealed: int
    reveal_type(await ref.tick())  # revealed: None
    reveal_type(await ref.tick_async())  # revealed: int
    reveal_type(await ref.incr.cast(3))  # revealed: None
    reveal_type(await ref.incr.with_options(timeout=5.0)(3))  # revealed: int
    reveal_type(await ref.incr.with_options(timeout=None)(3))  # revealed: int
    reveal_type(await ref.peek.with_options(timeout=5.0).cast(scale=3))  # revealed: None
    reveal_type(await room.incr(3))  # revealed: int
    reveal_type(await room.peek())  # revealed: float
    reveal_type(await room.join(ref))  # revealed: list[type[Counter]]
    # A ref to a child class is a ref to its parent.
    parent: migrate.Ref[Counter] = room
    reveal_type(await parent.incr(3))  # revealed: int


async def instances() -> None:
    counter = Counter(3)
    reveal_type(counter)  # revealed: Counter
    reveal_type(counter.incr(3))  # revealed: int
    reveal_type(await counter.peek(scale=2.0))  # revealed: float
    reveal_type(counter.crunch("p"))  # revealed: int
    reveal_type(counter.tick())  # revealed: None
    reveal_type(Room("me", 3).incr())  # revealed: int


async def spawning(node: migrate.Node, near: migrate.Ref[Counter]) -> None:
    options = migrate.SpawnOptions(name="hits", on="b")
    reveal_type(await node.spawn(Counter))  # revealed: type[Counter]
    reveal_type(await node.spawn(Counter, 10))  # revealed: type[Counter]
    reveal_type(await node.spawn(Counter, start=10))  # revealed: type[Counter]
    reveal_type(await node.spawn(Counter, options=options))  # revealed: type[Counter]
    reveal_type(await node.spawn(Counter, 10, options=options))  # revealed: type[Counter]
    reveal_type(await node.spawn(Room, "me", 3))  # revealed: type[Room]
    reveal_type(await node.spawn(Room, "me", 3, open=False))  # revealed: type[Room]
    reveal_type(await node.spawn(Room, "me", 3, options=options))  # revealed: type[Room]
    reveal_type(await node.spawn(Box[str], "x"))  # revealed: type[Box[str]]
    reveal_type(await node.spawn_lb(Counter, 10))  # revealed: type[Counter]
    reveal_type(await node.spawn_lb(Room, "me", 3, open=False))  # revealed: type[Room]
    await node.spawn(Counter, options=migrate.SpawnOptions(near=near))
    await node.spawn(Counter, options=migrate.SpawnOptions(on=migrate.LEAST_LOADED))


async def calling(node: migrate.Node, ref: migrate.Ref[Counter], room: migrate.Ref[Room]) -> None:
    reveal_type(await node.call(ref, Counter.incr, 3))  # revealed: int
    reveal_type(await node.call(ref, Counter.incr, by=3))  # revealed: int
    reveal_type(await node.call(ref, Counter.peek, scale=1.5))  # revealed: float
    reveal_type(await node.call(ref, Counter.undecorated, "x"))  # revealed: bytes
    reveal_type(await node.call(ref, Counter.undecorated_async, text="x"))  # revealed: bytes
    reveal_type(await node.call(room, Counter.undecorated, "x"))  # revealed: bytes
    reveal_type(await node.call(ref, Counter.incr.with_options(timeout=1.0), 3))  # revealed: int
    reveal_type(await node.call(ref, "incr", 3))  # revealed: Any


async def verbs(node: migrate.Node, ref: migrate.Ref[Counter], path: pathlib.Path) -> None:
    checked = migrate.check(Counter(3))
    reveal_type(checked)  # revealed: CheckReport
    reveal_type(migrate.check(Counter).problems[0].path)  # revealed: str
    report = await node.migrate(ref, to="b")
    reveal_type(report)  # revealed: MoveReport
    reveal_type(report.downtime_s)  # revealed: float
    reveal_type(report.bytes_sent)  # revealed: int
    await node.migrate(ref, to=migrate.LEAST_LOADED)
    reveal_type(await node.replicate(ref, ["b", "c"], mode="async"))  # revealed: ServerInfo
    reveal_type(await node.replicate(ref, 2))  # revealed: ServerInfo
    await node.spawn(Counter, options=migrate.SpawnOptions(standbys=2, standby_mode="async"))
    await node.spawn(Counter, options=migrate.SpawnOptions(standbys=["b"]))
    reveal_type(await node.checkpoint(ref, "file:///x.ckpt"))  # revealed: CheckpointInfo
    reveal_type(await node.checkpoint(ref, path, every=60.0, keep=5))  # revealed: CheckpointInfo
    reveal_type(await node.checkpoint(ref, path, key=b"x" * 32))  # revealed: CheckpointInfo
    reveal_type(await node.fork(ref, on="b"))  # revealed: type[Counter]
    reveal_type(await node.fork(ref, on=migrate.LEAST_LOADED))  # revealed: type[Counter]
    # Nothing says which class a name or a checkpoint is of; the user does.
    found: migrate.Ref[Counter] = await node.whereis("hits")
    restored: migrate.Ref[Counter] = await node.restore("file:///x.ckpt")
    again: migrate.Ref[Counter] = await node.restore(path, on="b", replace=True)
    twin: migrate.Ref[Counter] = await node.restore(path, fork=True, name="x", key=b"x" * 32)
    reveal_type(await found.incr(3))  # revealed: int
    reveal_type(await restored.incr(3))  # revealed: int
    reveal_type(await node.info(ref))  # revealed: ServerInfo
    reveal_type(await node.servers())  # revealed: list[ServerInfo]
    reveal_type(await node.nodes())  # revealed: list[NodeInfo]
    reveal_type(await node.drain("b"))  # revealed: list[MoveReport]
    reveal_type(await node.stop(ref))  # revealed: None
    async for event in node.monitor(ref):
        reveal_type(event.node)  # revealed: str
        kind: Literal[
            "copying",
            "moved",
            "promoted",
            "restored",
            "standby_joined",
            "standby_lost",
            "stopped",
            "lost",
        ] = event.kind
        print(kind)
    try:
        await ref.incr()
    except migrate.RolledBack as told:
        reveal_type(told.then)  # revealed: float | None
    except migrate.CheckpointError as failed:
        reveal_type(failed.flaw)  # revealed: str | None
    except migrate.NotPicklable as error:
        reveal_type(error.path)  # revealed: str
        reveal_type(error.outcome)  # revealed: Outcome
