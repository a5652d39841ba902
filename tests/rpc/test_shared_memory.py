"""Large messages in sealed memory: uncopied, private to each reader, and gone with the last one."""

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
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from rpc import shared_memory, unix_channel
from rpc.channel import DESCRIPTORS_MAX
from rpc.errors import FrameError
from rpc.frames import Gathered
from rpc.link import LinkOptions
from rpc.shared_memory import (
    INLINE_BYTES_MAX,
    KEPT_BYTES_MIN,
    KEPT_MAX,
    PARTS_MAX,
    SHARED_BYTES_MIN,
    Table,
    collect,
    lay_out,
    put,
    settled,
)
from tests.rpc.harness import PATIENCE_S, End, connected, run

pytestmark = pytest.mark.skipif(
    not shared_memory.AVAILABLE, reason="this system has no memory that can be sealed"
)

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 1 << 30
PAGE = mmap.PAGESIZE
MIB = 1 << 20


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def descriptors(kind: str = "") -> int:
    gc.collect()
    found = 0
    for name in os.listdir("/proc/self/fd"):
        # The one that lists them is gone by then.
        with contextlib.suppress(OSError):
            found += kind in os.readlink(f"/proc/self/fd/{name}")
    return found


def mapped() -> int:
    """Stretches of memory of this process that are in a memfd."""
    gc.collect()
    maps = pathlib.Path("/proc/self/maps").read_text()
    return sum("memfd:livemigrate" in line for line in maps.splitlines())


def named() -> set[str]:
    """Shared memory with a name, as Python's own or as ours would have; others have theirs."""
    ours = ("livemigrate", "psm_", "wnsm_")
    return {name for name in os.listdir("/dev/shm") if name.startswith(ours)}


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    # gRPC opens others when it likes.
    kind = "memfd" if "127.0.0.1" in request.node.name else ""
    before = descriptors(kind), mapped(), shared_memory.kept()
    names = named()
    yield
    assert (descriptors(kind), mapped(), shared_memory.kept()) == before
    assert named() <= names


def views(parts: Sequence[bytes | bytearray | memoryview]) -> list[memoryview]:
    return [memoryview(part).cast("B") for part in parts]


def laid_out(parts: Sequence[bytes | bytearray | memoryview]) -> Table:
    table = lay_out(views(parts), 7)
    assert table is not None
    return table


def received(table: Table) -> list[memoryview]:
    """What another process would get: its descriptors are other ones."""
    given = [os.dup(memory.descriptor) for memory in table.sealed]

    def take(token: int) -> list[int]:
        assert token == 7
        return given

    return collect(table.data, take, LIMIT)


def passed(*parts: bytes | bytearray | memoryview) -> list[memoryview]:
    return received(laid_out(parts))


# ------------------------------------------------------------------ what arrives

sizes = st.sampled_from([0, 1, 63, 64, 65, PAGE - 1, PAGE, INLINE_BYTES_MAX, 70_000, 2 * MIB + 5])


@settings(max_examples=50, deadline=None)
@given(st.lists(sizes, max_size=8))
@example([INLINE_BYTES_MAX])
@example([INLINE_BYTES_MAX + 1])
@example([])
def test_parts_of_all_sizes_arrive_as_they_were(lengths: list[int]) -> None:
    parts = [noise(size, seed) for seed, size in enumerate(lengths)]
    table = laid_out(parts)
    assert len(table.data) < INLINE_BYTES_MAX + 1000
    got = received(table)
    assert [bytes(part) for part in got] == parts
    assert not any(part.readonly for part in got)
    for large in (part for part in got if len(part) > INLINE_BYTES_MAX):
        assert shared_memory._address(large) % 64 == 0


def test_what_a_reader_writes_is_its_own() -> None:
    source = bytearray(noise(2 * MIB))
    table = laid_out([source])
    one, other = received(table)[0], received(table)[0]
    one[:5] = b"mine!"
    source[:5] = b"later"
    assert bytes(other[:5]) == noise(2 * MIB)[:5] == bytes(received(table)[0][:5])
    assert bytes(one[:5]) == b"mine!"


def test_the_memory_lives_as_long_as_any_part_of_it() -> None:
    table = laid_out([noise(2 * MIB), noise(3 * MIB, 2)])
    part = received(table)[1][5:]
    del table
    assert mapped() == 1
    assert part == noise(3 * MIB, 2)[5:]
    del part
    assert mapped() == 0


# ------------------------------------------------------------------ the second hop


def test_what_lives_there_goes_on_uncopied() -> None:
    first = passed(noise(50_000), noise(8 * MIB))[1]
    table = laid_out([b"a new head", first, b"a new end"])
    assert len(table.sealed) == 1, "nothing but the old memory is referred to"
    head, second, end = received(table)
    assert (bytes(head), bytes(end)) == (b"a new head", b"a new end")
    assert second == first
    second[0] ^= 1
    assert second[1:] == first[1:] and second[0] != first[0]


def test_of_what_was_written_meanwhile_only_the_pages_go_along() -> None:
    model = bytearray(noise(8 * MIB))
    here = passed(b"x" * 100, model)[1]
    for hop in range(5):
        for at in (0, 1, PAGE * 3 - 2, 5 * MIB + hop * 2 * PAGE, len(model) - 1):
            here[at] = model[at] = (here[at] + 1) % 256
        # Crosses the border of two pages.
        here[7 * PAGE - 3 : 7 * PAGE + 3] = model[7 * PAGE - 3 : 7 * PAGE + 3] = bytes([hop] * 6)
        table = laid_out([b"h", here])
        fresh = sum(memory.size for memory in table.sealed) - len(model)
        assert 0 < fresh < 64 * PAGE + 200
        there = received(table)[1]
        assert there == model
        here = there


def test_writes_after_the_message_was_laid_out_stay_here() -> None:
    here = passed(noise(4 * MIB))[0]
    here[100] = 1
    table = laid_out([here])
    here[100] = here[3 * MIB] = 2
    there = received(table)[0]
    assert there[100] == 1 and there[3 * MIB] == noise(4 * MIB)[3 * MIB]


def test_a_part_of_which_much_was_written_is_copied_and_lets_go_of_the_old_memory() -> None:
    here = passed(noise(4 * MIB))[0]
    for at in range(0, 2 * MIB, PAGE):
        here[at] ^= 1
    table = laid_out([here])
    assert [memory.size for memory in table.sealed] == [4 * MIB]
    there = received(table)[0]
    assert there == here
    wanted = bytes(here)
    del here, table
    assert mapped() == 1 and there == wanted


def test_a_piece_of_an_array_goes_alone_and_two_that_overlap_become_two() -> None:
    here = passed(noise(100), noise(4 * MIB))[1]
    here[2 * MIB] ^= 255
    one, other = here[PAGE + 7 : 3 * MIB + 9], here[MIB + 1 :]
    got = passed(one, other)
    assert got[0] == one and got[1] == other
    got[0][MIB] = got[0][MIB] ^ 1
    assert got[1] == other, "they share no memory"


def test_small_memory_and_too_much_of_it_is_not_kept_for_a_second_hop() -> None:
    small = passed(noise(KEPT_BYTES_MIN // 2))[0]
    assert shared_memory.kept() == 0
    assert passed(small)[0] == small
    before = descriptors()
    many = [passed(noise(KEPT_BYTES_MIN, n))[0] for n in range(KEPT_MAX + 3)]
    assert descriptors() - before == KEPT_MAX == shared_memory.kept()
    assert put([noise(KEPT_BYTES_MIN)]) is None
    assert passed(many[-1])[0] == noise(KEPT_BYTES_MIN, KEPT_MAX + 2)
    kept = [passed(noise(KEPT_BYTES_MIN, n))[0] for n in range(DESCRIPTORS_MAX)]
    assert [bytes(part) for part in passed(*many[: DESCRIPTORS_MAX + 5])] == [
        bytes(part) for part in many[: DESCRIPTORS_MAX + 5]
    ]
    del many, kept, small


def test_without_the_kernels_word_on_pages_all_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    here = passed(noise(2 * MIB))[0]
    here[5] ^= 1
    monkeypatch.setattr(shared_memory, "written", lambda address, length: None)
    table = laid_out([here])
    assert len(table.sealed) == 1 and received(table)[0] == here


def test_where_no_more_can_be_mapped_the_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRoom:
        def mmap(self, *arguments: Any) -> int | None:
            ctypes.set_errno(12)
            return shared_memory._MAP_FAILED

    monkeypatch.setattr(shared_memory, "_libc", NoRoom())
    got = passed(noise(100_001), noise(70_000, 2))
    assert [bytes(part) for part in got] == [noise(100_001), noise(70_000, 2)]
    got[0][0] ^= 1
    assert mapped() == 0


# ------------------------------------------------------------------ put and settled


def test_what_was_put_is_read_only_here_and_goes_uncopied() -> None:
    view = put([b"ab", noise(2 * MIB)])
    assert view is not None and view.readonly and view == b"ab" + noise(2 * MIB)
    table = laid_out([b"head", view])
    assert [memory.size for memory in table.sealed] == [2 * MIB + 2]
    assert received(table)[1] == view
    assert put([b"small"]) is None


def test_a_settled_message_has_the_same_parts_and_none_that_can_change() -> None:
    there = passed(noise(2 * MIB, 3))[0]
    source = bytearray(noise(2 * MIB))
    parts = [b"", b"head", memoryview(source), there, b"end"]
    message = settled(Gathered(parts))
    wanted = [bytes(part) for part in parts]
    source[:] = bytes(len(source))
    assert [bytes(part) for part in message.parts] == wanted
    table = lay_out(message.parts, 7)
    assert table is not None and len(table.sealed) == 2
    assert [bytes(part) for part in received(table)] == wanted


# ------------------------------------------------------------------ peers that lie


def memfd(size: int, seals: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, 1033, seals)
    return descriptor


@pytest.mark.parametrize("seals", [0, 0x2, 0x8, 0x4])
def test_memory_that_can_still_change_is_refused(seals: int) -> None:
    """A peer that cut it short would end this process by SIGBUS."""
    table = laid_out([noise(2 * MIB)])
    with pytest.raises(FrameError, match="not sealed"):
        collect(table.data, lambda _: [memfd(2 * MIB, seals)], LIMIT)


def test_memory_of_another_size_and_other_files_are_refused(tmp_path: pathlib.Path) -> None:
    table = laid_out([noise(2 * MIB)])
    for wrong in (PAGE, 2 * MIB - PAGE, 4 * MIB):
        with pytest.raises(FrameError, match="another size"):
            collect(table.data, lambda _, w=wrong: [memfd(w, 0xF)], LIMIT)  # type: ignore[misc]
    file = tmp_path / "file"
    file.write_bytes(bytes(2 * MIB))
    with pytest.raises(FrameError, match="not sealed"):
        collect(table.data, lambda _: [os.open(file, os.O_RDONLY)], LIMIT)
    with pytest.raises(FrameError, match="other entries"):
        collect(table.data, lambda _: [memfd(2 * MIB, 0xF) for _ in range(2)], LIMIT)
    with pytest.raises(FrameError, match="limit"):
        collect(table.data, lambda _: [os.dup(table.sealed[0].descriptor)], 2 * MIB - 1)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_table_does_worse_than_a_frame_error(data: st.DataObject) -> None:
    here = passed(noise(2 * MIB))[0]
    here[5] ^= 1
    table = laid_out([b"head", here, noise(30_000)])
    changed = bytearray(table.data)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(len(changed) - 1, 200)))
        changed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(changed))))
    given = [os.dup(memory.descriptor) for memory in table.sealed]
    taken = False

    def take(_token: int) -> list[int]:
        nonlocal taken
        taken = True
        return given

    with contextlib.suppress(FrameError):
        for part in collect(changed[:cut], take, LIMIT):
            assert len(bytes(part)) == len(part)
    if not taken:
        for descriptor in given:
            os.close(descriptor)


def test_parts_that_overlap_in_what_they_share_are_refused() -> None:
    table = laid_out([noise(100_000), noise(100_000, 2)])
    rows = 28 + 8  # After the head and the size of the one descriptor.
    changed = bytearray(table.data)
    struct.pack_into("<Q", changed, rows + shared_memory._PART.size + 4, 64)
    with pytest.raises(FrameError, match="overlap"):
        collect(changed, lambda _: [os.dup(table.sealed[0].descriptor)], LIMIT)


def test_more_parts_than_a_table_takes_go_otherwise() -> None:
    assert lay_out(views([b"x"] * (PARTS_MAX + 1)), 7) is None


# ------------------------------------------------------------------ over links


def test_a_large_message_goes_by_shared_memory_in_its_parts() -> None:
    async def scenario() -> None:
        async with connected("unix:") as (a, b):
            got: list[Any] = []
            b.links.handler.received = lambda peer, data: got.append(data)  # type: ignore[method-assign]
            assert a.links.shares("b") and b.links.shares("a")
            parts = [b"head", noise(3 * MIB), b"", noise(80_000)]
            a.links.send("b", Gathered(parts))
            a.links.send("b", noise(SHARED_BYTES_MIN), bulk=True)
            a.links.send("b", b"small")
            while len(got) < 3:  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0)
            assert [bytes(part) for part in got[0].parts] == parts
            assert mapped() >= 1
            whole = next(data for data in got[1:] if len(data) == SHARED_BYTES_MIN)
            assert whole == noise(SHARED_BYTES_MIN) and b"small" in got
            got.clear()

    run(scenario())


@pytest.mark.parametrize("address", ["memory:", "127.0.0.1:0"])
def test_other_channels_share_no_memory(address: str) -> None:
    async def scenario() -> None:
        async with connected(address) as (a, b):
            assert not a.links.shares("b")
            a.links.send("b", Gathered([b"head", noise(MIB)]))
            await b.recorder.count("received")
            assert b.recorder.data == [b"head" + noise(MIB)] and mapped() == 0

    run(scenario())


def test_a_link_may_be_told_not_to() -> None:
    async def scenario() -> None:
        async with connected("unix:", LinkOptions(share_memory=False)) as (a, b):
            assert not a.links.shares("b")
            a.links.send("b", noise(MIB))
            await b.recorder.count("received")
            assert mapped() == 0

    run(scenario())


def test_an_acceptor_that_knows_nothing_of_it_gets_all_inline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It reads the first frame as any other one, and the kernel drops what came with it.
    monkeypatch.setattr(
        unix_channel.UnixChannel, "_first_readable", unix_channel.UnixChannel._readable
    )

    async def scenario() -> None:
        async with connected("unix:") as (a, b):
            a.links.send("b", noise(MIB))
            b.links.send("a", noise(MIB))
            await b.recorder.count("received")
            await a.recorder.count("received")
            assert not a.links.shares("b") and not b.links.shares("a")
            assert b.recorder.data == a.recorder.data == [noise(MIB)]

    run(scenario())


def test_a_message_for_which_there_is_no_room_goes_inline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with connected("unix:") as (a, b):
            with monkeypatch.context() as patch:
                patch.setattr(os, "memfd_create", lambda *_: (_ for _ in ()).throw(OSError(24, "")))
                a.links.send("b", noise(MIB))
            with monkeypatch.context() as patch:
                patch.setattr(unix_channel.UnixChannel, "give", lambda *_: False)
                a.links.send("b", noise(MIB, 2))
            await b.recorder.count("received", 2)
            assert b.recorder.data == [noise(MIB), noise(MIB, 2)]
            assert a.recorder.all("down") == []

    run(scenario())


def test_a_reader_that_takes_nothing_is_sent_a_bounded_amount() -> None:
    async def scenario() -> None:
        async with connected("unix:", LinkOptions(queue_bytes_max=10 * MIB)) as (a, b):
            sent = 0
            while a.links.send("b", noise(2 * MIB)):
                sent += 1
            assert 5 <= sent <= 6 and 0 <= a.links.queued_bytes("b") - 2 * MIB * sent < 4096
            await b.recorder.count("received", sent)
            while a.links.queued_bytes("b"):  # noqa: ASYNC110 - no event tells
                await asyncio.sleep(0)
            assert a.links.send("b", noise(2 * MIB))

    run(scenario())


def test_descriptors_that_never_came_end_the_link() -> None:
    async def scenario() -> None:
        async with connected("unix:") as (a, b):
            link = next(iter(a.links._up.values()))
            link._channel.give = lambda *_: True  # type: ignore[method-assign]
            a.links.send("b", noise(MIB))
            await b.recorder.count("down")
            assert "descriptors" in b.recorder.all("down")[0][2] and b.recorder.data == []

    run(scenario())


def test_descriptors_whose_frames_never_come_are_closed_with_the_link() -> None:
    async def scenario() -> None:
        async with connected("unix:") as (a, b):
            channel = next(iter(a.links._up.values()))._channel
            sealed = shared_memory._write([b"x"])
            for token in range(100, 105):
                assert channel.give(token, [sealed.descriptor, sealed.descriptor])
            a.links.send("b", noise(MIB))
            await b.recorder.count("received")
            a.links.send("b", noise(MIB))
            await b.recorder.count("received", 2)

    run(scenario())


def test_a_socket_for_descriptors_that_is_none_is_refused() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        channel = unix_channel.UnixChannel(ours, "unix:test", 1000, dialled_here=False)
        read, write = os.pipe()
        rights = struct.pack("i", read)
        theirs.sendmsg([b"\x01\0\0\0a"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        os.close(read)
        assert await channel.read() == b"a"
        assert not channel.shares
        with pytest.raises(BrokenPipeError):
            os.write(write, b"nobody has its other end")
        os.close(write)
        await channel.close()
        theirs.close()

    run(scenario())


CHILD = """
import asyncio, sys
from rpc.links import Links, PeerInfo
from tests.rpc.harness import SECRET

class Child:
    kept = []
    def link_up(self, peer): pass
    def link_down(self, peer, cause): pass
    def dial_failed(self, *a): raise SystemExit(str(a))
    def accept_failed(self, *a): raise SystemExit(str(a))
    def received(self, peer_id, data):
        self.kept.append(data)
        data[0] ^= 255
        links.send(peer_id, data)

async def main():
    global links
    links = Links(PeerInfo("child", "child", "node", "", 1), SECRET, Child())
    await links.connect(sys.argv[1], 20)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.cluster
def test_memory_outlives_the_process_that_wrote_it_and_the_one_that_read_it() -> None:
    async def scenario() -> None:
        async with End("a", same_host=True) as a:
            got: list[memoryview] = []
            news = asyncio.Event()

            def take(_peer: str, data: memoryview) -> None:
                got.append(data)
                news.set()

            a.recorder.received = take  # type: ignore[assignment, method-assign]
            where = await a.links.listen("127.0.0.1:0")
            for turn in range(2):
                child = subprocess.Popen([sys.executable, "-c", CHILD, where], cwd=ROOT)  # noqa: ASYNC220
                try:
                    await a.recorder.count("up", turn + 1)
                    sent = noise(4 * MIB, turn)
                    news.clear()
                    assert a.links.shares("child")
                    a.links.send("child", sent)
                    await asyncio.wait_for(news.wait(), PATIENCE_S)
                finally:
                    os.kill(child.pid, signal.SIGKILL)
                    child.wait()
                await a.recorder.count("down", turn + 1)
                # Written there, sealed there, and its page written by the child goes along.
                assert got[turn][0] == sent[0] ^ 255 and got[turn][1:] == sent[1:]
                got[turn][5] ^= 1
            assert mapped() >= 2
            got.clear()

    run(scenario())


@pytest.mark.parametrize("seed", range(20))
def test_both_ways_to_find_what_was_written_agree(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice((5_000, 70_000, 3 << 20))
    view = shared_memory.put([bytes(2 << 20), bytes(size)])
    if view is None:
        pytest.skip("no sealed memory here")
    place = shared_memory._Found().where(view)
    assert place is not None
    skip = chance.randrange(9_000)
    mine = shared_memory._map(place.sealed, skip, size)
    wrote = sorted(chance.randrange(size) for _ in range(chance.choice((0, 1, 40))))
    for at in wrote:
        mine[at] = 1
    sum(mine[::4096])  # What is only read is not written.
    address = shared_memory._address(mine)
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        found = shared_memory._looked_up(descriptor, address, size)
        assert shared_memory.written(address, size) == found
        try:
            assert shared_memory._scanned(descriptor, address, size) == found
        except OSError:
            pytest.skip("this kernel has no PAGEMAP_SCAN")
    finally:
        os.close(descriptor)
    assert found is not None
    for at in wrote:
        assert any(begin <= at < begin + length for begin, length in found)
    assert bool(wrote) == bool(found)
