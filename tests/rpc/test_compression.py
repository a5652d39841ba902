"""Chunks are compressed where the link is slower than that, and only there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpc import compression, frames
from rpc.compression import Compressor, unpack
from rpc.errors import FrameError
from rpc.frames import Gathered
from rpc.link import LinkOptions
from tests.rpc.harness import End, run
from tests.rpc.test_frames import LANE, all_frames, inbox, outbox, record, sealed

TEXT = b"".join(b"%d is the square of %d; " % (n * n, n) for n in range(20_000))
NOISE = random.Random(1).randbytes(1 << 18)


def clock(seconds: float) -> Callable[[], float]:
    """One that finds that every piece of work takes so long."""
    now = 0.0

    def tell() -> float:
        nonlocal now
        now += seconds
        return now

    return tell


def test_nothing_is_compressed_before_the_links_rate_is_known_nor_on_a_fast_link() -> None:
    compressor = Compressor(clock(0.001))
    assert compressor(TEXT[:200_000]) is None
    compressor.link_rate = 10e9
    assert compressor(TEXT[:200_000]) is None
    compressor.link_rate = 10e6
    packed = compressor(TEXT[:200_000])
    assert packed is not None and unpack(packed, 200_000) == TEXT[:200_000]
    assert compressor(TEXT[:100]) is None, "an end of a message"


def test_a_slow_compression_gives_way_to_the_link() -> None:
    # 200,000 bytes in 10 ms are 20 MB/s, of which the text leaves some 12 worth it.
    compressor = Compressor(clock(0.010))
    compressor.link_rate = 50e6
    taken = [compressor(TEXT[:200_000]) is not None for _ in range(60)]
    assert taken[0] and not taken[-1]
    compressor.link_rate = 1e6
    assert compressor(TEXT[:200_000]) is not None


def test_what_does_not_shrink_is_left_alone_for_a_while() -> None:
    compressor = Compressor(clock(0.0001))
    compressor.link_rate = 1e6
    assert compressor(NOISE) is None
    later = [compressor(TEXT[:200_000]) is not None for _ in range(compression._SKIP + 1)]
    assert later == [False] * compression._SKIP + [True]


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_frame_error(data: bytes) -> None:
    try:
        assert len(unpack(data, 1000)) <= 1000
    except FrameError:
        pass


def test_more_than_a_frames_worth_is_refused() -> None:
    packed = compression.zstd.compress(bytes(10_000_000), 1)
    with pytest.raises(FrameError, match="larger than a frame"):
        unpack(packed, 1000)
    with pytest.raises(FrameError, match="cut off"):
        unpack(packed[:-3], 100_000_000)
    with pytest.raises(FrameError, match="cut off"):
        unpack(packed + b"x", 100_000_000)


# ------------------------------------------------------------------ in frames


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3000), st.booleans(), st.booleans()), max_size=6),
    st.integers(0, 7),
)
def test_messages_some_chunks_of_which_are_compressed_arrive_as_they_were(
    messages: list[tuple[int, bool, bool]], which: int
) -> None:
    box, calls = outbox(), 0

    def compress(chunk: frames.Data) -> bytes | None:
        nonlocal calls
        calls += 1
        return compression.zstd.compress(chunk, 1) if calls % 8 > which else None

    box.compress = compress
    sent: dict[bool, list[bytes]] = {False: [], True: []}
    for size, bulk, gathered in messages:
        data = TEXT[:size]
        sent[bulk].append(data)
        box.push(Gathered([data[:7], data[7:]]) if gathered else data, bulk)
    got = inbox()
    found = []
    for frame in all_frames(box):
        assert len(frame) <= frames.frame_bytes_max(LANE) + 100
        found += [bytes(item.data) for item in got.feed(frame)]
    assert sorted(found) == sorted(sent[False] + sent[True])
    assert box.queued_bytes == 0


def test_a_chunk_that_is_damaged_is_refused() -> None:
    head = b"\0" + (1).to_bytes(8, "little") + (300).to_bytes(8, "little")
    for payload in (b"garbage", compression.zstd.compress(bytes(100_000), 1)):
        with pytest.raises(FrameError):
            inbox().feed(sealed(record(frames.CHUNK_FIRST_ZSTD, head + payload)))
    with pytest.raises(FrameError, match="announced"):
        packed = compression.zstd.compress(bytes(301), 1)
        inbox().feed(sealed(record(frames.CHUNK_FIRST_ZSTD, head + packed)))


# ------------------------------------------------------------------ on links


async def carried(options: LinkOptions, features: tuple[str, ...], address: str) -> int:
    """Bytes in which 4 MiB of text arrive over a link that seems to carry 1 MB/s."""
    data = (TEXT * 16)[: 4 << 20]
    async with (
        End("b", options=options, features=features) as b,
        End("a", options=options, features=features) as a,
    ):
        await a.links.connect(await b.links.listen(address), 30)
        await b.recorder.count("up")
        link = a.links._up["b"]
        # What it measures itself depends on the machine.
        link._compressor.link_rate = 1e6
        a.links.send("b", data, bulk=True)
        while not b.recorder.data:
            link._compressor.link_rate = 1e6
            await asyncio.sleep(0)
        assert b.recorder.data == [data]
        return b.links._up["a"]._inbox.fed_bytes


def test_bulk_is_compressed_on_a_slow_link_to_another_host_that_reads_it() -> None:
    packed = run(carried(LinkOptions(), (compression.FEATURE,), "127.0.0.1:0"))
    assert packed < 2.5e6


@pytest.mark.parametrize(
    ("options", "features", "address"),
    [
        (LinkOptions(), (), "127.0.0.1:0"),
        (LinkOptions(compress=False), (compression.FEATURE,), "127.0.0.1:0"),
        (LinkOptions(share_memory=False), (compression.FEATURE,), "unix:"),
    ],
)
def test_nothing_is_compressed_otherwise(
    options: LinkOptions, features: tuple[str, ...], address: str
) -> None:
    plain = run(carried(options, features, address))
    assert plain > 4 << 20


def test_a_link_learns_its_rate_from_what_had_to_wait() -> None:
    async def scenario() -> None:
        async with End("b") as b, End("a") as a:
            await a.links.connect(await b.links.listen("127.0.0.1:0"), 30)
            a.links.send("b", bytes(8 << 20), bulk=True)
            await b.recorder.count("received")
            cost = a.links.cost("b")
            assert cost is not None and cost.bytes_per_s is not None
            assert a.links._up["b"]._compressor.link_rate == cost.bytes_per_s

    run(scenario())
