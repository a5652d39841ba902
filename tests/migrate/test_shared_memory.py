"""Large arguments, results and states in shared memory: nobody ever sees another one's writes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import pathlib
import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import migrate
from migrate.shell import wire
from rpc import shared_memory
from tests.migrate.clusters import QUICK, break_links, failure_of, nodes, run, until
from tests.migrate.servers import Gate

pytestmark = [
    pytest.mark.usefixtures("cluster_secret"),
    pytest.mark.skipif(not shared_memory.AVAILABLE, reason="this system has no shared memory"),
]

SIZE = 3 << 20
BY_ALL_CHANNELS = pytest.mark.parametrize("same_host", [True, False])


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = descriptors(), shared_memory.kept()
    yield
    assert (descriptors(), shared_memory.kept()) == before


def descriptors() -> int:
    """Of sealed memory: gRPC opens others when it likes."""
    gc.collect()
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += "memfd:livemigrate" in os.readlink(f"/proc/self/fd/{name}")
    return found


def is_shared(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, memoryview) and isinstance(array.obj, mmap.mmap)


class Keeper:
    """Keeps an array, and tells whether it lies in shared memory."""

    def __init__(self, size: int = SIZE) -> None:
        self.array = np.zeros(size, dtype=np.uint8)
        self.unlucky = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.unlucky:
            raise ValueError("unlucky")

    def keep(self, array: Any) -> bool:
        """Keep an argument, changed; whether it came in shared memory."""
        self.array = array["deep"][0] if isinstance(array, dict) else array
        self.array[0] += 1
        return is_shared(self.array)

    def give(self) -> Any:
        return self.array

    def write(self, at: int, value: int) -> None:
        self.array[at] = value

    def fill(self, value: int) -> None:
        self.array[:] = value

    def digest(self) -> bytes:
        return bytes(self.array.tobytes())

    def shared(self) -> bool:
        return is_shared(self.array)

    def curse(self, unlucky: bool) -> None:
        self.unlucky = unlucky

    def length(self, *values: Any) -> int:
        return sum(map(len, values))


def on(node: str) -> migrate.SpawnOptions:
    return migrate.SpawnOptions(on=node)


@BY_ALL_CHANNELS
@pytest.mark.parametrize("nested", [False, True])
def test_arguments_and_results_are_each_ones_own(same_host: bool, nested: bool):
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(same_host=same_host)) as (a, _):
            ref = await a.spawn(Keeper, options=on("b"))
            mine = np.full(SIZE, 5, dtype=np.uint8)
            sent = {"deep": [mine, "x"]} if nested else mine
            assert await ref.keep(sent) is same_host
            assert mine[0] == 5
            mine[1] = 77
            got = await ref.give()
            assert (got[0], got[1], got[2]) == (6, 5, 5) and is_shared(got) is same_host
            got[:] = 9
            again = await ref.give()
            assert (again[0], again[-1]) == (6, 5)
            # What arrived goes on to somebody else, with what was written here.
            other = await a.spawn(Keeper, options=on("b"))
            await other.keep(got)
            assert await other.digest() == bytes([10]) + bytes([9]) * (SIZE - 1)
            assert got[0] == 9

    run(body())


@BY_ALL_CHANNELS
def test_large_strings_of_bytes_arrive(same_host: bool):
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(same_host=same_host)) as (a, _):
            ref = await a.spawn(Keeper, options=on("b"))
            data = random.Random(1).randbytes(SIZE)
            assert await ref.length(data) == SIZE
            assert await ref.length(bytearray(data), data, np.zeros(3), "x" * 70_000) == (
                2 * SIZE + 3 + 70_000
            )

    run(body())


def test_a_payload_is_read_only_to_whoever_keeps_it_for_a_repeat():
    array = np.zeros(SIZE, dtype=np.uint8)
    payload: Any = wire.pack_args((array,), {})
    assert isinstance(payload, memoryview) and payload.readonly
    runtime: Any = None
    (one,), _ = wire.unpack(payload, runtime)
    one[:] = 1
    (other,), _ = wire.unpack(payload, runtime)
    assert not other.any()


def test_a_large_request_survives_links_that_break_and_a_move_of_its_mailbox():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, _):
            Gate.events["large"] = asyncio.Event()
            gate = await a.spawn(Gate, "large", options=on("b"))
            ref = await a.spawn(Keeper, options=on("b"))
            # Handed to a busy server, so that it waits in the mailbox and moves with it.
            busy = asyncio.ensure_future(gate.pass_through())
            array = np.full(SIZE, 4, dtype=np.uint8)
            calls = [asyncio.ensure_future(ref.keep(array + n)) for n in range(3)]
            break_links(a)
            assert len(await asyncio.gather(*calls)) == 3
            moving = asyncio.create_task(a.migrate(ref, to="c"))
            more = [asyncio.ensure_future(ref.keep(array + n)) for n in range(3)]
            break_links(b)
            await asyncio.gather(moving, *more)
            Gate.events["large"].set()
            await busy
            assert await ref.digest() == bytes([7]) + bytes([6]) * (SIZE - 1)

    run(body())


def test_a_state_moves_again_and_again_and_equals_one_that_stays():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, _, _):
            draw = random.Random(5)
            model = bytearray(SIZE)
            ref = await a.spawn(Keeper)
            for hop in range(8):
                for _ in range(draw.choice((0, 1, 30))):
                    at, value = draw.randrange(SIZE), draw.randrange(256)
                    model[at] = value
                    await ref.write(at, value)
                if hop == 5:
                    model[:] = bytes([hop]) * SIZE
                    await ref.fill(hop)
                await a.migrate(ref, to="bca"[hop % 3])
                assert await ref.shared()
                assert await ref.digest() == model
        gc.collect()

    run(body())


def test_a_second_move_copies_nothing(monkeypatch: pytest.MonkeyPatch):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Keeper)
            await a.migrate(ref, to="b")
            written: list[int] = []
            write = shared_memory._write

            def counted(pieces: Any) -> Any:
                written.append(sum(map(len, pieces)))
                return write(pieces)

            monkeypatch.setattr(shared_memory, "_write", counted)
            store = shared_memory.Store.write

            def stored(self: shared_memory.Store, data: Any) -> None:
                written.append(len(data))
                store(self, data)

            monkeypatch.setattr(shared_memory.Store, "write", stored)
            await a.migrate(ref, to="a")
            assert written == []
            await ref.write(SIZE // 2, 1)
            await a.migrate(ref, to="b")
            assert written == [], "a page travels with the message itself"
            await ref.fill(3)
            await a.migrate(ref, to="a")
            assert sum(written) >= SIZE, "the control: what was written is copied"

    run(body())


def test_after_a_roll_back_and_after_a_fork_no_memory_is_shared():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Keeper)
            await a.migrate(ref, to="b")
            await ref.curse(True)
            error = await failure_of(a.migrate(ref, to="a"))
            assert isinstance(error, migrate.MoveRolledBack) and "unlucky" in str(error)
            await ref.curse(False)
            await ref.write(3, 3)
            twin = await a.fork(ref, on="a")
            await ref.write(4, 4)
            await twin.write(5, 5)
            await a.migrate(ref, to="a")
            await a.migrate(twin, to="b")
            await ref.write(6, 6)
            assert (await ref.digest())[:8] == bytes([0, 0, 0, 3, 4, 0, 6, 0])
            assert (await twin.digest())[:8] == bytes([0, 0, 0, 3, 0, 5, 0, 0])

    run(body())


def test_a_link_that_comes_up_anew_shares_again():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            assert a._links is not None and a._links.shares(b.id)
            break_links(a)
            await until(lambda: a._links is not None and a._links.is_up(b.id))
            assert a._links.shares(b.id)
            ref = await a.spawn(Keeper, options=on("b"))
            assert await ref.keep(np.zeros(SIZE, dtype=np.uint8))

    run(body())


def test_a_copy_that_was_quiet_once_and_moved_away_is_let_go_without_the_collector(
    tmp_path: pathlib.Path,
):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Keeper)
            await a.checkpoint(ref, f"file://{tmp_path / 'keeper'}")
            copy = weakref.ref(a._driver.core.hosted[ref._server_id].host.obj)
            gc.disable()
            try:
                await a.migrate(ref, to="b")
                await until(lambda: copy() is None)
            finally:
                gc.enable()

    run(body())
