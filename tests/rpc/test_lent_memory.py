"""Memory that is written again after its last use: never before, whatever its readers do."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import mmap
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from rpc import frames, shared_memory
from rpc.errors import FrameError
from rpc.frames import Gathered
from rpc.link import Link, LinkOptions
from rpc.shared_memory import FEATURE, LENT_MAX, Loan, Sealed, collect, lay_out, put
from tests.rpc.harness import PATIENCE_S, End, run

pytestmark = pytest.mark.skipif(
    not shared_memory.AVAILABLE, reason="this system has no memory that can be sealed"
)

ROOT = pathlib.Path(__file__).parents[2]
MIB = 1 << 20
PAGE = mmap.PAGESIZE
GET_SEALS = 1034
WRITE, WRITE_ANEW = 0x8, 0x10


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def memfds() -> int:
    gc.collect()
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += "memfd:livemigrate" in os.readlink(f"/proc/self/fd/{name}")
    maps = pathlib.Path("/proc/self/maps").read_text()
    return found + sum("memfd:livemigrate" in line for line in maps.splitlines())


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = memfds()
    yield
    assert memfds() == before
    assert not shared_memory._loans and not shared_memory._lent
    assert shared_memory.idle_bytes() == 0 and not shared_memory._pool.is_open


@pytest.fixture
def lending() -> Iterator[None]:
    """As if a link were up."""
    shared_memory.begin_lending()
    yield
    gc.collect()
    shared_memory.end_lending()


def seals(memory: Sealed) -> int:
    return fcntl.fcntl(memory.descriptor, GET_SEALS)


def inode(memory: Sealed) -> int:
    return os.fstat(memory.descriptor).st_ino


def laid_out(data: bytes, token: int = 7, room: int | None = LENT_MAX) -> shared_memory.Table:
    table = lay_out([memoryview(data)], token, room)
    assert table is not None
    return table


def received(table: shared_memory.Table, tell: Callable[[int], None] | None) -> list[memoryview]:
    given = [os.dup(memory.descriptor) for memory in table.sealed]
    return collect(table.data, lambda _: given, 1 << 30, tell)


# ------------------------------------------------------------------ one piece of memory


@pytest.mark.usefixtures("lending")
def test_memory_is_written_again_when_its_last_user_is_gone() -> None:
    table = laid_out(noise(2 * MIB))
    first = inode(table.sealed[0])
    other = laid_out(noise(2 * MIB, 2))
    assert inode(other.sealed[0]) != first, "the first is still in use"
    del table
    third = laid_out(noise(2 * MIB - 5, 3))
    assert inode(third.sealed[0]) == first
    assert bytes(received(third, lambda _: None)[0]) == noise(2 * MIB - 5, 3)
    assert bytes(received(other, lambda _: None)[0]) == noise(2 * MIB, 2)


@pytest.mark.usefixtures("lending")
def test_what_is_much_too_large_or_too_small_is_not_used() -> None:
    one = inode(laid_out(noise(2 * MIB)).sealed[0])
    assert inode(laid_out(noise(2 * MIB + 1)).sealed[0]) != one
    assert inode(laid_out(noise(MIB - 64)).sealed[0]) != one
    assert inode(laid_out(noise(MIB)).sealed[0]) == one


@pytest.mark.usefixtures("lending")
def test_nobody_but_its_writer_can_write_to_it() -> None:
    table = laid_out(noise(2 * MIB))
    memory = table.sealed[0]
    assert memory.is_lent and seals(memory) & WRITE_ANEW and not seals(memory) & WRITE
    changes: list[Callable[[], object]] = [
        lambda: os.pwrite(memory.descriptor, b"x", 0),
        lambda: os.ftruncate(memory.descriptor, 5),
        lambda: os.ftruncate(memory.descriptor, 5 * MIB),
        lambda: mmap.mmap(memory.descriptor, 2 * MIB),
    ]
    for change in changes:
        with pytest.raises(OSError):
            change()
    memory.fix()
    assert seals(memory) & WRITE and not table.sealed[0].is_lent
    assert bytes(received(table, None)[0]) == noise(2 * MIB)


@pytest.mark.usefixtures("lending")
def test_a_use_ends_with_the_last_view_and_is_told_once() -> None:
    told: list[int] = []
    table = laid_out(noise(2 * MIB), token=5)
    part = received(table, told.append)[0][100:200]
    gc.collect()
    assert told == [] and bytes(part) == noise(2 * MIB)[100:200]
    del part
    assert told == [shared_memory.loan_number(5, 0) << 1]


@pytest.mark.usefixtures("lending")
def test_what_goes_on_to_another_is_said_to_be_kept() -> None:
    told: list[int] = []
    here = received(laid_out(noise(2 * MIB), token=5), told.append)[0]
    on = laid_out(here, token=9)  # type: ignore[arg-type]
    assert told == [shared_memory.loan_number(5, 0) << 1 | 1]
    del here, on
    assert len(told) == 1


@pytest.mark.usefixtures("lending")
def test_a_reader_that_never_says_so_gets_memory_that_is_sealed_for_good() -> None:
    told: list[int] = []
    assert seals(laid_out(noise(2 * MIB), room=None).sealed[0]) & WRITE
    view = put([noise(2 * MIB)], lends=True)
    assert view is not None
    (memory,) = laid_out(view, room=None).sealed  # type: ignore[arg-type]
    assert seals(memory) & WRITE
    # What is lent to this process does not go on to such a reader at all.
    here = received(laid_out(noise(2 * MIB)), told.append)[0]
    copy = laid_out(here, room=None).sealed[0]  # type: ignore[arg-type]
    assert seals(copy) & WRITE and told == []
    with pytest.raises(FrameError, match="not sealed"):
        received(laid_out(noise(2 * MIB)), None)


@pytest.mark.usefixtures("lending")
def test_no_more_is_lent_than_there_is_room_for() -> None:
    assert not laid_out(noise(2 * MIB), room=0).sealed[0].is_lent
    view = put([noise(2 * MIB)], lends=True)
    assert view is not None
    table = lay_out([view, memoryview(noise(MIB))], 7, 1)
    assert table is not None and [memory.is_lent for memory in table.sealed] == [False, False]
    assert view == noise(2 * MIB)


@pytest.mark.usefixtures("lending")
def test_one_end_of_use_is_not_enough_where_two_use_it() -> None:
    view = put([noise(2 * MIB)], lends=True)
    assert view is not None
    one = laid_out(view, token=1)  # type: ignore[arg-type]
    memory = inode(one.sealed[0])
    del one
    assert inode(laid_out(noise(2 * MIB, 2)).sealed[0]) != memory, "the view is left"
    two = laid_out(view, token=2)  # type: ignore[arg-type]
    del view
    third = put([noise(2 * MIB, 3)], lends=True)
    assert third is not None
    assert bytes(received(two, lambda _: None)[0]) == noise(2 * MIB)


@pytest.mark.usefixtures("lending")
def test_a_view_counts_as_a_use_also_where_no_more_mappings_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = shared_memory._write([noise(2 * MIB)], lends=True)
    monkeypatch.setattr(shared_memory, "KEPT_MAX", 0)
    view = shared_memory._map(memory, 0, 2 * MIB)
    del memory
    laid_out(noise(2 * MIB, 2))
    assert view == noise(2 * MIB)


def test_without_a_link_that_lends_nothing_is_kept() -> None:
    table = laid_out(noise(2 * MIB))
    assert not table.sealed[0].is_lent and seals(table.sealed[0]) & WRITE
    shared_memory.begin_lending()
    table = laid_out(noise(2 * MIB))
    shared_memory.end_lending()
    del table
    assert shared_memory.idle_bytes() == 0


@pytest.mark.usefixtures("lending")
def test_what_is_kept_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(shared_memory._pool, "_now", lambda: now[0])
    monkeypatch.setattr(shared_memory, "IDLE_BYTES_MAX", 8 * MIB)
    tables = [laid_out(noise(2 * MIB)) for _ in range(8)]
    before = memfds()
    del tables
    assert shared_memory.idle_bytes() == 8 * MIB
    assert memfds() == before - 2 * 4, "a descriptor and a mapping each"
    monkeypatch.setattr(shared_memory, "IDLE_MAX", 2)
    laid_out(noise(2 * MIB))
    assert shared_memory.idle_bytes() == 4 * MIB
    now[0] += shared_memory.IDLE_S / 2
    laid_out(noise(2 * MIB))
    now[0] += shared_memory.IDLE_S / 2
    shared_memory.trim()
    assert shared_memory.idle_bytes() == 2 * MIB, "the other one was used in the meantime"
    now[0] += shared_memory.IDLE_S / 2
    shared_memory.trim()
    assert shared_memory.idle_bytes() == 0


@pytest.mark.usefixtures("lending")
def test_a_kernel_that_does_not_know_the_seal_gets_memory_sealed_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    control = fcntl.fcntl

    def older(descriptor: int, command: int, argument: int = 0) -> int:
        if command == shared_memory._F_ADD_SEALS and argument & WRITE_ANEW:
            raise OSError(22, "Invalid argument")
        return control(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", older)
    table = laid_out(noise(2 * MIB))
    assert not table.sealed[0].is_lent and seals(table.sealed[0]) & WRITE
    assert bytes(received(table, None)[0]) == noise(2 * MIB)


@pytest.mark.usefixtures("lending")
def test_where_no_more_can_be_mapped_nothing_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoom:
        def mmap(self, *_arguments: Any) -> int | None:
            ctypes.set_errno(12)
            return shared_memory._MAP_FAILED

    told: list[int] = []
    lent = laid_out(noise(2 * MIB, 2))
    monkeypatch.setattr(shared_memory, "_libc", NoRoom())
    table = laid_out(noise(2 * MIB))
    assert not table.sealed[0].is_lent
    # What is read instead of mapped is through with the memory at once.
    assert bytes(received(lent, told.append)[0]) == noise(2 * MIB, 2)
    assert told == [shared_memory.loan_number(7, 0) << 1]


# ------------------------------------------------------------------ forks


@pytest.mark.usefixtures("lending")
def test_what_a_child_shares_is_never_written_again() -> None:
    told: list[int] = []
    view = put([noise(2 * MIB)], lends=True)
    assert view is not None
    lent = laid_out(noise(2 * MIB, 2), token=5)
    used = received(lent, told.append)[0]
    laid_out(noise(2 * MIB, 3))
    reads, writes = os.pipe()
    goes_on, go_on = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover - in the child
        ok = False
        try:
            os.read(goes_on, 1)
            ok = view == noise(2 * MIB) and used == noise(2 * MIB, 2)
            # Here too new memory can be had, for links of its own.
            new = put([noise(2 * MIB)], lends=True)
            ok = ok and new is not None and new == noise(2 * MIB)
        finally:
            os.write(writes, b"y" if ok else b"n")
            os._exit(0)
    assert told == [shared_memory.loan_number(5, 0) << 1 | 1]
    assert shared_memory.idle_bytes() == 0
    (memory,) = laid_out(view).sealed  # type: ignore[arg-type]
    assert not memory.is_lent and seals(memory) & WRITE
    assert not lent.sealed[0].is_lent
    del view, used, lent, memory
    for seed in range(4, 8):
        assert put([noise(2 * MIB, seed)], lends=True) is not None
    os.write(go_on, b"x")
    assert os.read(reads, 1) == b"y"
    os.waitpid(child, 0)
    for descriptor in (reads, writes, goes_on, go_on):
        os.close(descriptor)
    assert laid_out(noise(2 * MIB)).sealed[0].is_lent, "after that it goes on as before"


@pytest.mark.usefixtures("lending")
def test_what_comes_while_another_thread_forks_is_not_lent() -> None:
    told: list[int] = []
    shared_memory._pool.before_fork()
    try:
        assert not laid_out(noise(2 * MIB)).sealed[0].is_lent
        Loan(5, told.append)
        assert told == [5 << 1 | 1]
    finally:
        shared_memory._pool.after_fork()


# ------------------------------------------------------------------ over links


@contextlib.asynccontextmanager
async def ends(
    *names: str, options: LinkOptions | None = None, without: str = ""
) -> AsyncIterator[dict[str, End]]:
    """Ends, each with a link to each other one."""
    async with contextlib.AsyncExitStack() as stack:
        made: dict[str, End] = {}
        for name in names:
            features = () if name == without else (FEATURE,)
            end = End(name, options=options, features=features)
            where = await (await stack.enter_async_context(end)).links.listen("unix:")
            for before in made.values():
                await before.links.connect(where, PATIENCE_S)
                await end.recorder.until(
                    lambda end=end, before=before: before.links.me.id in end.links._up  # type: ignore[misc]
                )
            made[name] = end
        yield made
        for end in made.values():
            end.recorder.received = lambda *_: None  # type: ignore[method-assign]


def kept_by(end: End) -> list[Any]:
    """What it receives from now on, as it comes."""
    got: list[Any] = []
    end.recorder.received = lambda _peer, data: got.append(data)  # type: ignore[method-assign, assignment]
    return got


def link(end: End, to: str) -> Link:
    return end.links._up[to]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0)


def test_an_argument_goes_where_the_one_before_it_was() -> None:
    async def scenario() -> None:
        async with ends("a", "b") as made:
            a, b = made["a"], made["b"]
            got = kept_by(b)
            inodes = set()
            for seed in range(6):
                a.links.send("b", noise(2 * MIB, seed))
                (memory,) = link(a, "b")._lent.values()
                inodes.add(inode(memory))
                del memory
                await until(lambda: got)
                assert got.pop() == noise(2 * MIB, seed)
                await until(lambda: not link(a, "b")._lent)
            assert len(inodes) == 1 and shared_memory.idle_bytes() == 2 * MIB

    run(scenario())


@pytest.mark.parametrize("without", ["a", "b"])
def test_to_a_peer_that_knows_nothing_of_it_all_is_sealed_for_good(without: str) -> None:
    async def scenario() -> None:
        async with ends("a", "b", without=without) as made:
            a, b = made["a"], made["b"]
            for _ in range(3):
                sent = len(b.recorder.data)
                a.links.send("b", noise(2 * MIB))
                assert a.links.shares("b")
                lent = not without == "b"
                assert bool(link(a, "b")._lent) is (lent and link(a, "b")._lends)
                await b.recorder.count("received", sent + 1)
            assert b.recorder.data == [noise(2 * MIB)] * 3
            assert b.recorder.all("down") == []

    run(scenario())


def test_with_the_link_all_that_was_lent_is_given_away() -> None:
    async def scenario() -> None:
        async with ends("a", "b", "c") as made:
            a, b = made["a"], made["b"]
            got = kept_by(b)
            a.links.send("b", noise(2 * MIB))
            (memory,) = link(a, "b")._lent.values()
            await until(lambda: got)
            link(a, "b").drop("a test")
            assert not memory.is_lent
            await b.recorder.count("down")
            for seed in range(2, 6):
                a.links.send("c", noise(2 * MIB, seed))
            assert got.pop() == noise(2 * MIB)

    run(scenario())


def test_what_is_used_for_long_is_given_away_and_makes_room() -> None:
    async def scenario() -> None:
        async with ends("a", "b") as made:
            a, b = made["a"], made["b"]
            got = kept_by(b)
            many = LENT_MAX + 3
            for seed in range(many):
                a.links.send("b", noise(100_000, seed))
            await until(lambda: len(got) == many)
            lent = link(a, "b")._lent
            assert len(lent) == LENT_MAX
            link(a, "b")._tick()
            a.links.send("b", noise(MIB))
            await until(lambda: len(got) == many + 1)
            assert len(lent) == LENT_MAX, "no tick has passed since"
            link(a, "b")._tick()
            assert not lent
            a.links.send("b", noise(MIB))
            assert len(lent) == 1
            await until(lambda: len(got) == many + 2)
            assert [bytes(each) for each in got[:many]] == [noise(100_000, n) for n in range(many)]
            # All these ends of use are told, most of them of memory that nobody waits for.
            got.clear()
            await until(lambda: not lent)
            a.links.send("b", noise(MIB))
            await until(lambda: got)
            got.clear()
            for each in (a, b):
                for up in each.links._up.values():
                    assert up._timer is not None
                    up._timer.cancel()

    run(scenario())


def test_a_use_may_end_in_any_thread() -> None:
    async def scenario() -> None:
        async with ends("a", "b") as made:
            a, b = made["a"], made["b"]
            got = kept_by(b)
            for seed in range(20):
                a.links.send("b", noise(100_000, seed))
            await until(lambda: len(got) == 20)
            threads = [threading.Thread(target=got.pop) for _ in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            await until(lambda: not link(a, "b")._lent)

    run(scenario())


def test_numbers_that_are_nobodys_do_nothing_and_cut_off_ones_end_the_link() -> None:
    async def scenario() -> None:
        async with ends("a", "b") as made:
            a, b = made["a"], made["b"]
            got = kept_by(b)
            a.links.send("b", noise(MIB))
            await until(lambda: got)
            link(b, "a")._tell_returned([3, 1 << 40, (1 << 64) - 1])
            b.links.send("a", b"after it")
            await a.recorder.count("received")
            assert len(link(a, "b")._lent) == 1
            link(b, "a")._control(frames.RETURNED, b"1234567")
            await a.recorder.count("down")
            assert "cut off" in a.recorder.all("down")[0][2]
            got.clear()

    run(scenario())


def test_what_is_told_together_leaves_together_and_never_without_bound() -> None:
    box = frames.Outbox(b"k" * 32)
    for number in range(200):
        box.push_control(frames.RETURNED, number.to_bytes(8, "little"))
    frame = b"".join(box.take() or ())
    ((kind, data),) = frames.Inbox(b"k" * 32).feed(frame)
    assert kind == frames.RETURNED
    count = frames.RETURNED_BYTES_MAX // 8
    assert [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)] == list(
        range(200 - count, 200)
    )
    assert box.take() is None


CHILD = """
import asyncio, sys
from rpc.links import Links
from rpc import shared_memory
from tests.rpc.harness import SECRET, peer

class Child:
    kept = []
    def link_up(self, peer): pass
    def link_down(self, peer, cause): pass
    def dial_failed(self, *a): raise SystemExit(str(a))
    def accept_failed(self, *a): raise SystemExit(str(a))
    def received(self, peer_id, data):
        if len(data) > 1000:
            self.kept.append((data, bytes(data)))
            if len(self.kept) % 3 == 0:
                del self.kept[0]
        else:
            same = all(bytes(data) == copy for data, copy in self.kept)
            links.send(peer_id, b"%d %d" % (same, len(self.kept)))

async def main():
    global links
    links = Links(peer("child", features=(shared_memory.FEATURE,)), SECRET, Child())
    await links.connect(sys.argv[1], 20)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.cluster
def test_a_reader_that_is_stopped_and_goes_on_or_is_killed_keeps_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lent_at_end: list[Sealed] = []
    go_down = Link.go_down

    def looked_at(self: Link, cause: str) -> None:
        lent_at_end.extend(self._lent.values())
        go_down(self, cause)

    monkeypatch.setattr(Link, "go_down", looked_at)

    async def scenario() -> None:
        async with End("a", same_host=True, features=(FEATURE,)) as a:
            where = await a.links.listen("127.0.0.1:0")
            for turn in range(2):
                child = subprocess.Popen([sys.executable, "-c", CHILD, where], cwd=ROOT)  # noqa: ASYNC220
                try:
                    await a.recorder.count("up", turn + 1)
                    for seed in range(10):
                        a.links.send("child", noise(MIB, seed))
                    a.links.send("child", b"?")
                    answers = await a.recorder.count("received", 2 * turn + 1)
                    assert answers[-1][2].startswith(b"1 ")
                    os.kill(child.pid, signal.SIGSTOP)
                    lent = list(link(a, "child")._lent.values())
                    assert lent and all(memory.is_lent for memory in lent)
                    for seed in range(10, 20):
                        a.links.send("child", noise(MIB, seed))
                    os.kill(child.pid, signal.SIGCONT)
                    a.links.send("child", b"?")
                    answers = await a.recorder.count("received", 2 * turn + 2)
                    assert answers[-1][2].startswith(b"1 ")
                finally:
                    os.kill(child.pid, signal.SIGKILL)
                    child.wait()
                await a.recorder.count("down", turn + 1)
                assert lent_at_end and not any(memory.is_lent for memory in lent_at_end)
                lent_at_end.clear()
                del lent

    run(scenario())


# ------------------------------------------------------------------ all of it together


class Chaos:
    """Ends that send, keep, write, send on and lose large messages, and know what each must be."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.held: dict[str, list[tuple[memoryview, bytearray]]] = {}
        self.views: list[tuple[memoryview, bytes]] = []
        self.made: dict[str, End] = {}
        self.wrong: list[str] = []
        self.reused = 0

    def receives(self, name: str) -> Callable[[str, Any], None]:
        def received(_peer: str, data: Any) -> None:
            parts = data.parts if isinstance(data, Gathered) else [memoryview(data)]
            for part in parts:
                # Every part says itself what it must be.
                size, seed = len(part), int.from_bytes(part[:8], "little")
                if bytes(part) != self.content(size, seed):
                    self.wrong.append(f"{name} received something else")
                if self.chance.random() < 0.5:
                    self.held[name].append((part, bytearray(part)))

        return received

    @staticmethod
    def content(size: int, seed: int) -> bytes:
        return seed.to_bytes(8, "little") + bytes([seed % 251]) * (size - 8)

    def new(self) -> bytes:
        size = self.chance.choice((70_000, 100_000, 100_000, 1 << 20, (1 << 20) + 5_000))
        return self.content(size, self.chance.getrandbits(48))

    def check(self) -> None:
        for name, held in self.held.items():
            for part, wanted in held:
                if part != wanted:
                    self.wrong.append(f"{name} holds something else")
        for view, content in self.views:
            if view != content:
                self.wrong.append("what was packed has changed")

    def step(self) -> None:
        chance = self.chance
        name = chance.choice(list(self.made))
        end = self.made[name]
        held = self.held[name]
        what = chance.random()
        to = chance.choice([other for other in self.made if other != name])
        if what < 0.45:
            end.links.send(to, Gathered([self.new() for _ in range(chance.choice((1, 1, 2)))]))
        elif what < 0.60:
            new = self.new()
            view = put([new], lends=True)
            if view is not None:
                self.views.append((view, new))
        elif what < 0.70 and self.views:
            # As a request that is sent again, maybe to another node.
            end.links.send(to, Gathered([chance.choice(self.views)[0]]))
        elif what < 0.75 and self.views:
            self.views.pop(chance.randrange(len(self.views)))
        elif what < 0.80 and held:
            part, wanted = chance.choice(held)
            if bytes(wanted) == self.content(len(part), int.from_bytes(part[:8], "little")):
                end.links.send(to, Gathered([part]))
        elif what < 0.85 and held:
            part, wanted = chance.choice(held)
            at = chance.randrange(8, len(part))
            part[at] = wanted[at] = chance.randrange(256)
        elif what < 0.98 and held:
            held.pop(chance.randrange(len(held)))
        elif chance.random() < 0.3 and to in end.links._up:
            link(end, to).drop("a test")

    async def go(self, steps: int) -> None:
        options = LinkOptions(redial_first_s=0.001)
        async with ends("a", "b", "c", options=options) as made:
            self.made = made
            for name, end in made.items():
                self.held[name] = []
                end.recorder.received = self.receives(name)  # type: ignore[method-assign, assignment]
            take = shared_memory._pool.take

            def counted(size: int) -> Any:
                found = take(size)
                self.reused += found is not None
                return found

            shared_memory._pool.take = counted  # type: ignore[method-assign]
            try:
                for number in range(steps):
                    self.step()
                    if self.chance.random() < 0.5:
                        for _ in range(self.chance.choice((1, 3, 10))):
                            await asyncio.sleep(0)
                    if number % 20 == 0:
                        self.check()
                        await until(lambda: all(len(end.links._up) == 2 for end in made.values()))
                self.check()
            finally:
                del shared_memory._pool.take
                self.held.clear()
                self.views.clear()


SEEDS = 8
STEPS = 400


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_somebody_has_never_changes(seed: int) -> None:
    chaos = Chaos(seed)
    run(chaos.go(STEPS))
    assert chaos.wrong == []
    assert chaos.reused > 10


def told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers say that they have ceased to use memory as soon as they have it."""
    begin = Loan.__init__

    def at_once(self: Loan, number: int, tell: Callable[[int], None]) -> None:
        begin(self, number, tell)
        self.__del__()

    monkeypatch.setattr(Loan, "__init__", at_once)


def sent_on_and_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that sent memory on say only when they themselves have ceased to use it."""
    monkeypatch.setattr(Loan, "keep", lambda self: None)


def never_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody will be told of any more is written again."""
    monkeypatch.setattr(Sealed, "fix", lambda self: None)


def not_held_while_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer asks only itself whether memory is still used."""
    share = Link._share

    def forgetful(self: Link, *args: Any) -> bool:
        shared = share(self, *args)
        self._lent.clear()
        return shared

    monkeypatch.setattr(Link, "_share", forgetful)


def views_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's own views of memory do not count as a use."""
    put_there = shared_memory.put

    def uncounted(pieces: Any, lends: bool = False) -> memoryview | None:
        view = put_there(pieces, lends)
        if view is not None and lends:
            mapping: Any = view.obj
            memory = mapping.sealed
            mapping.sealed = Sealed(os.dup(memory.descriptor), memory.size)
        return view

    monkeypatch.setattr(shared_memory, "put", uncounted)
    monkeypatch.setattr("tests.rpc.test_lent_memory.put", uncounted)


@pytest.mark.parametrize(
    "mechanism",
    [told_at_once, sent_on_and_returned, never_fixed, not_held_while_lent, views_not_counted],
)
def test_the_chaos_finds_what_each_mechanism_prevents(
    mechanism: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mechanism(monkeypatch)
    for seed in range(SEEDS):
        chaos = Chaos(seed)
        run(chaos.go(STEPS))
        gc.collect()
        if chaos.wrong:
            return
    pytest.fail(f"nothing went wrong without it: {mechanism.__doc__}")
