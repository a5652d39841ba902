"""What only links over gRPC meet: sockets, processes, other services."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc import frames
from rpc.errors import FrameError, LinkTimeout, ListenFailed, PeerRefused
from rpc.grpc_channel import METHOD, frame_head, frame_of, is_loopback, split_address
from rpc.links import LinkOptions, Links, Verdict, incoming_verdict
from rpc.v1 import link_pb2
from tests.rpc.harness import (
    PATIENCE_S,
    SECRET,
    End,
    HandMade,
    Recorder,
    connected,
    peer,
    run,
    transport,
)

ROOT = Path(__file__).parents[2]
QUICK = LinkOptions(redial_first_s=0.001, redial_max_s=0.01)
LOOPBACK = "127.0.0.1:0"


# ---- pure parts


@given(st.binary(max_size=20) | st.integers(0, 300_000).map(bytes))
def test_frames_are_put_on_the_wire_as_protobuf_would(data: bytes) -> None:
    message = link_pb2.Frame(data=data).SerializeToString()

    if data:  # Protobuf leaves an empty field out, which no frame is.
        assert frame_head(len(data)) + data == message
    assert bytes(frame_of(message)) == data


@given(st.binary(min_size=1, max_size=40))
def test_no_message_of_a_stranger_does_worse_than_a_frame_error(message: bytes) -> None:
    try:
        frame = frame_of(message)
    except FrameError:
        return
    assert link_pb2.Frame.FromString(message).data == bytes(frame)


@pytest.mark.parametrize("proving", [False, True])
def test_of_two_crossing_attempts_exactly_one_is_refused(proving: bool) -> None:
    verdicts = [
        incoming_verdict(
            me,
            other,
            present_link=None,
            present_dialled_here=False,
            proving=proving,
            ended_link=b"",
        )
        for me, other in (("a", "b"), ("b", "a"))
    ]
    # Without an attempt of its own that has sent a proof, a side accepts.
    expected = [Verdict.REFUSE, Verdict.ACCEPT] if proving else [Verdict.ACCEPT] * 2
    assert verdicts == expected


@pytest.mark.parametrize(
    ("dialled_here", "ended", "expected"),
    [
        (False, b"", Verdict.REPLACE),
        (True, b"", Verdict.REFUSE),
        (True, b"older", Verdict.REFUSE),
        (True, b"this", Verdict.REPLACE),
    ],
)
def test_a_link_gives_way_only_if_the_peer_must_know_that_it_is_dead(
    dialled_here: bool, ended: bytes, expected: Verdict
) -> None:
    for me, other in itertools.permutations("ab"):
        verdict = incoming_verdict(
            me,
            other,
            present_link=b"this",
            present_dialled_here=dialled_here,
            proving=False,
            ended_link=ended,
        )
        assert verdict is expected


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), ("a.b:65535", ("a.b", 65535))],
)
def test_addresses_split(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize(
    "address", ["", "host", ":80", "host:", "host:x", "host:65536", "::1:80", "h:-1", "h:٣"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not host:port"):
        split_address(address)


def test_loopback_is_told_from_the_rest() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example.org", ""]))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        Links(peer("a"), b"short", Recorder())


# ---- listening


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.1.2.3:0", "example.org:0"])
def test_listening_beyond_this_machine_is_refused_with_the_remedy(address: str) -> None:
    async def scenario() -> None:
        async with End("a") as a:
            with pytest.raises(ListenFailed, match=r"TLS.*127\.0\.0\.1") as caught:
                await a.links.listen(address)
            assert caught.value.address == address

    run(scenario())


def test_a_port_that_another_process_holds_is_refused_with_the_remedy() -> None:
    async def scenario() -> None:
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            holder.listen()
            address = f"127.0.0.1:{holder.getsockname()[1]}"
            async with End("a") as a:
                with pytest.raises(ListenFailed, match=r"in use.*port 0"):
                    await a.links.listen(address)

    run(scenario())


def test_other_services_share_the_port() -> None:
    async def scenario() -> None:
        async def shout(request: bytes, _context: object) -> bytes:
            return request.upper()

        def add(server: grpc.aio.Server) -> None:
            handler = grpc.unary_unary_rpc_method_handler(shout)
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler("test.Shout", {"Shout": handler}),)
            )

        async with End("b") as b, End("a") as a:
            where = await b.links.listen(LOOPBACK, [add])
            await a.links.connect(where, PATIENCE_S)
            async with grpc.aio.insecure_channel(where) as channel:
                assert await channel.unary_unary("/test.Shout/Shout")(b"hi") == b"HI"

    run(scenario())


# ---- strangers


def test_a_grpc_server_that_is_no_node_is_told_apart() -> None:
    async def scenario() -> None:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        port = server.add_insecure_port(LOOPBACK)
        await server.start()
        async with End("a") as a:
            with pytest.raises(PeerRefused, match="no livemigrate link") as caught:
                await a.links.connect(f"127.0.0.1:{port}", PATIENCE_S)
            assert caught.value.reason == "protocol"
        await server.stop(1)

    run(scenario())


def test_a_server_that_never_answers_does_not_hang_anybody() -> None:
    async def scenario() -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            async with End("a", options=LinkOptions(handshake_timeout_s=0.1)) as a:
                with pytest.raises(LinkTimeout):
                    await a.links.connect(f"127.0.0.1:{mute.getsockname()[1]}", 0.5)

    run(scenario())


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 1000, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff"],
)
def test_bytes_that_are_not_grpc_harm_nobody(garbage: bytes) -> None:
    async def scenario() -> None:
        async with End("b") as b, End("a") as a:
            where = await b.links.listen(LOOPBACK)
            await a.links.connect(where, PATIENCE_S)
            host, port = split_address(where)
            _reader, writer = await asyncio.open_connection(host, port)
            writer.write(garbage)
            await writer.drain()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            a.links.send("b", b"still here")
            await b.recorder.count("received")

    run(scenario())


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"\x0a\x05abc", id="length too large"),
        pytest.param(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", id="endless length"),
        pytest.param(b"\x12\x01x", id="another field"),
        pytest.param(b"\x0a\x01x\x0a\x01y", id="field twice"),
        pytest.param(bytes(frames.frame_bytes_max() + 100), id="oversized"),
    ],
)
def test_a_grpc_message_that_is_no_frame_is_refused(message: bytes) -> None:
    async def scenario() -> None:
        async with End("b") as b, End("a") as a:
            where = await b.links.listen(LOOPBACK)
            async with grpc.aio.insecure_channel(where) as channel:
                call = channel.stream_stream(METHOD)()
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call.write(message)
                    while await call.read() is not grpc.aio.EOF:
                        pass
            await a.links.connect(where, PATIENCE_S)
            assert [event[1] for event in b.recorder.all("up")] == ["a"]

    run(scenario())


def test_an_oversized_frame_on_a_link_ends_it_and_only_it() -> None:
    async def scenario() -> None:
        async with End("b") as b, End("a") as a:
            where = await b.links.listen(LOOPBACK)
            await a.links.connect(where, PATIENCE_S)
            hostile = HandMade(await transport(where).dial(where))
            await hostile.prove()
            with contextlib.suppress(Exception):
                await hostile.channel.write([bytes(frames.frame_bytes_max() + 1)])
            await b.recorder.count("down")
            assert b.links.is_up("a")
            await hostile.channel.close()

    run(scenario())


# ---- connections that break


class Proxy:
    """Passes bytes on until it is told to cut, counting or at once."""

    def __init__(self, target: str) -> None:
        self.target = split_address(target)
        self.address = ""
        # Bytes towards the target after which every connection is cut; None for never.
        self.cut_after: int | None = None
        self.connections = 0
        self.third_connection = asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await server.wait_closed()
            await asyncio.gather(*self._serving)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        self.connections += 1
        if self.connections == 3:
            self.third_connection.set()
        there_reader, there = await asyncio.open_connection(*self.target)
        self._writers |= {writer, there}
        await asyncio.gather(self._pass(reader, there, True), self._pass(there_reader, writer))
        self._writers -= {writer, there}

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool = False
    ) -> None:
        passed = 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if counted and self.cut_after is not None:
                    room = self.cut_after - passed
                    if len(data) >= room:
                        writer.write(data[:room])
                        await writer.drain()
                        self.cut()
                        break
                passed += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def test_a_connection_cut_in_mid_frame_is_made_anew_and_nothing_arrives_in_part() -> None:
    async def scenario() -> None:
        async with End("b") as b:
            where = await b.links.listen(LOOPBACK)
            async with Proxy(where).running() as proxy, End("a", options=QUICK) as a:
                proxy.cut_after = 3_000_000
                a.links.dial(proxy.address, "b")
                await a.recorder.count("up")
                whole = [bytes([number]) * 1_000_000 for number in range(8)]
                for data in whole:
                    assert a.links.send("b", data)
                await a.recorder.count("down")
                await b.recorder.count("down")
                arrived = b.recorder.data
                # What a connection still held when it was cut may be lost with it.
                assert len(arrived) <= 3
                assert arrived == whole[: len(arrived)]
                proxy.cut_after = None
                await a.recorder.count("up", 2)
                # The layer above repeats what was lost; here, all of the rest.
                for data in whole[len(arrived) :]:
                    assert a.links.send("b", data)
                await b.recorder.until(lambda: len(b.recorder.data) == 8)
                assert b.recorder.data == whole

    run(scenario())


@pytest.mark.parametrize("cut_after", [1, 30, 100, 250, 400, 600])
def test_a_connection_cut_in_the_handshake_is_made_anew(cut_after: int) -> None:
    async def scenario() -> None:
        async with End("b") as b:
            where = await b.links.listen(LOOPBACK)
            async with Proxy(where).running() as proxy, End("a", options=QUICK) as a:
                proxy.cut_after = cut_after
                a.links.dial(proxy.address, "b")
                await proxy.third_connection.wait()
                proxy.cut_after = None
                await a.recorder.until(lambda: a.links.is_up("b"))
                a.links.send("b", b"here")
                await b.recorder.until(lambda: b"here" in b.recorder.data)
                assert not a.recorder.all("dial_failed")

    run(scenario())


def test_both_sides_dialling_through_connections_that_break_settle_on_one_link() -> None:
    async def scenario() -> None:
        async with End("a", options=QUICK) as a, End("b", options=QUICK) as b:
            at_a = await a.links.listen(LOOPBACK)
            at_b = await b.links.listen(LOOPBACK)
            async with Proxy(at_a).running() as to_a, Proxy(at_b).running() as to_b:
                a.links.dial(to_b.address, "b")
                b.links.dial(to_a.address, "a")
                for _ in range(5):
                    await a.recorder.until(lambda: a.links.is_up("b"))
                    await b.recorder.until(lambda: b.links.is_up("a"))
                    ups = len(a.recorder.all("up"))
                    to_a.cut()
                    to_b.cut()
                    await a.recorder.count("up", ups + 1)
                mark = b"after all this"
                a.recorder.on_event = lambda event: event[0] == "up" and a.links.send("b", mark)
                a.links.send("b", mark)
                await b.recorder.until(lambda: mark in b.recorder.data)
                a.links.hang_up("b")

    run(scenario())


# ---- processes

PEER_PROGRAM = """
import asyncio, sys
from rpc.links import Links, PeerInfo

class Quiet:
    def link_up(self, peer): print("up", flush=True)
    def link_down(self, peer, cause): print("down", cause, flush=True)
    def received(self, peer_id, data): links.send(peer_id, data)
    def dial_failed(self, address, expected_id, error): print(error, flush=True)
    def accept_failed(self, address, error): print(error, flush=True)

async def main():
    global links
    links = Links(PeerInfo("child", "child", "node", "", 1), sys.argv[1].encode(), Quiet())
    print(await links.listen("127.0.0.1:0"), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, SECRET.decode(), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.asynccontextmanager
async def child() -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    process = start(PEER_PROGRAM)
    try:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        yield process, line.strip()
    finally:
        process.kill()
        process.communicate()


def test_the_killing_of_a_peers_process_is_noticed_before_any_silence_limit() -> None:
    async def scenario() -> None:
        # These limits are far above the test's patience.
        options = LinkOptions(ping_interval_s=1000.0, silence_max_s=100_000.0)
        async with child() as (process, where), End("a", options=options) as a:
            await a.links.connect(where, PATIENCE_S)
            a.links.send("child", b"hello")
            await a.recorder.count("received")
            process.kill()
            ((_, who, cause),) = await a.recorder.count("down")
            assert who == "child" and cause
            assert not a.links.send("child", b"x")

    run(scenario())


def test_a_process_that_dies_without_closing_is_noticed_by_the_accepting_side() -> None:
    async def scenario() -> None:
        async with End("b") as b:
            where = await b.links.listen(LOOPBACK)
            program = PEER_PROGRAM.replace(
                'print(await links.listen("127.0.0.1:0"), flush=True)',
                "await links.connect(sys.argv[2], 60)",
            )
            process = start(program, where)
            try:
                await b.recorder.count("up")
                process.kill()
                await b.recorder.count("down")
            finally:
                process.kill()
                process.communicate()

    run(scenario())


def test_a_proxy_for_the_web_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")

    async def scenario() -> Any:
        async with End("b") as b, End("a") as a:
            return await a.links.connect(await b.links.listen(LOOPBACK), PATIENCE_S)

    assert run(scenario()).id == "b"


@pytest.mark.parametrize("pushed", [False, True])
def test_what_is_pushed_has_left_before_the_handler_returns(pushed: bool) -> None:
    queued = []

    async def main() -> None:
        async with connected("unix:") as (a, b):

            def answer(event: tuple[object, ...]) -> None:
                if event[0] == "received" and b.links.send("a", b"answer"):
                    if pushed:
                        b.links.push()
                    queued.append(b.links.queued_bytes("a"))

            b.recorder.on_event = answer
            a.links.send("b", b"question")
            await a.recorder.count("received")
            # The link goes on as before.
            a.links.send("b", b"question")
            await a.recorder.count("received", 2)
        assert a.recorder.data == [b"answer"] * 2

    run(main())
    assert all(size == 0 for size in queued) is pushed
