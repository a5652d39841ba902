"""The parsers of bytes from outside, each as a function that judges one input.

A target returns whether it accepted the input, and raises if the parser did anything but accept
what encodes back to something equal, or refuse by its documented exceptions.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message as ProtoMessage
from grpc_health.v1 import health_pb2

from migrate.core import directory as rules
from migrate.core.actions import Point
from migrate.core.ids import session_born_ms, session_sender
from migrate.errors import HandlerFailed, PeerError, UsageError
from migrate.shell import classes, gateway, json_form, membership, wire
from migrate.shell.directories import open_directory
from migrate.shell.driver import FailPoints
from rpc import compression, frames, handshake
from rpc.errors import AuthFailed, FrameError, PeerRefused, RpcError
from rpc.grpc_channel import is_loopback, split_address
from rpc.unix_channel import UnixChannel
from rpc.v1 import api_pb2
from serializers import archive, plain, stream
from serializers.archive import BadArchive
from serializers.base import Snapshot, parse_head
from serializers.errors import LoadFailed
from tests.core.fakes import row
from tests.fuzz import scripts
from tests.fuzz.conversation import converse

KEY: Final = b"k" * 32
LANE: Final = 256
MESSAGE_MAX: Final = 4096


# ------------------------------------------------------------------------ frames


def _sealed(body: bytes) -> bytes:
    return blake2b(body, digest_size=frames.MAC_BYTES, key=KEY).digest() + body


def _pieces(data: bytes) -> list[bytes]:
    """Cut an input into parts, each with two bytes of length before it."""
    pieces = []
    at = 0
    while at + 2 <= len(data) and len(pieces) < 32:
        size = int.from_bytes(data[at : at + 2], "little")
        pieces.append(data[at + 2 : at + 2 + size])
        at += 2 + size
    return pieces


def _joined(pieces: list[bytes]) -> bytes:
    return b"".join(len(piece).to_bytes(2, "little") + piece for piece in pieces)


_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"


def frame_bodies(data: bytes) -> bool:
    """Frames of a peer that holds the key: their MACs are right, their bodies anything."""
    inbox = frames.Inbox(KEY, frame_bytes_max=4096, message_bytes_max=MESSAGE_MAX)
    received = []
    bodies = _pieces(data)
    for body in bodies:
        try:
            received += inbox.feed(_sealed(body))
        except FrameError:
            return False
    kept = sum(len(a.data) for a in inbox._assemblies if a is not None)
    # A chunk that is compressed becomes at most a frame.
    most = len(data) + 4096 * data.count(_ZSTD_MAGIC)
    assert kept + sum(len(r.data) for r in received) <= most, "more than was sent"
    assert all(isinstance(data, bytes | bytearray) for _, data in received)
    outbox = frames.Outbox(KEY, lane_bytes_max=LANE, message_bytes_max=MESSAGE_MAX)
    messages = [bytes(item.data) for item in received if item.kind == frames.DATA]
    for message in messages:
        outbox.push(message)
    other = frames.Inbox(KEY, message_bytes_max=MESSAGE_MAX)
    again = []
    while (parts := outbox.take()) is not None:
        again += other.feed(b"".join(parts))
    assert [bytes(item.data) for item in again] == messages
    return bool(received)


def _frame_seeds() -> list[bytes]:
    out = []
    for messages in (
        [(b"hello", False)],
        [(b"a" * 700, False), (b"b", False), (b"c" * 900, True)],
        [(b"", False), (b"x" * 250, True), (b"y" * 2000, True), (b"z" * 2000, False)],
    ):
        box = frames.Outbox(KEY, lane_bytes_max=LANE, message_bytes_max=MESSAGE_MAX)
        if messages[-1][1]:
            box.compress = lambda chunk: compression.zstd.compress(chunk, 1)
        for data, bulk in messages:
            box.push(data, bulk)
        box.push_urgent(b"urgent")
        box.push_shared(b"a table", False)
        box.push_control(frames.PING)
        box.push_control(frames.GOODBYE, b"\x01")
        bodies = []
        while (parts := box.take()) is not None:
            bodies.append(b"".join(parts)[frames.MAC_BYTES :])
        out.append(_joined(bodies))
    return out


def raw_frame(data: bytes) -> bool:
    """A frame of somebody without the key: refused, whatever it is."""
    try:
        frames.Inbox(KEY, frame_bytes_max=4096).feed(data)
    except FrameError:
        pass
    else:
        raise AssertionError("a frame of a stranger was taken")
    try:
        kind, payload = frames.open_plain(data)
    except FrameError:
        return False
    assert frames.plain(kind, payload) == data
    return True


async def _stream(data: bytes) -> bool:
    here, there = socket.socketpair()
    channel = UnixChannel(here, "unix:fuzz", 4096)
    got: list[bytes] = []
    chunks = _pieces(data)

    def take(frame: Any) -> bool:
        got.append(bytes(frame))
        return True

    try:
        for chunk in chunks:
            there.sendall(chunk[:8192])
            channel._readable()
            while len(channel._frames):
                take(channel._frames.popleft())
            waits = channel._partial
            assert waits is None or len(waits) <= 4096, "memory for a frame over the limit"
            if channel._error is not None or channel._finished_there:
                break
        if isinstance(channel._error, RpcError):
            assert isinstance(channel._error, FrameError), channel._error
    finally:
        channel.abort()
        there.close()
    whole = b"".join(len(frame).to_bytes(4, "little") + frame for frame in got)
    assert b"".join(chunk[:8192] for chunk in chunks).startswith(whole)
    return bool(got)


_loops: list[asyncio.AbstractEventLoop] = []


def unix_stream(data: bytes) -> bool:
    """What comes over a Unix-domain socket, cut anywhere, before there is any key."""
    if not _loops:
        _loops.append(asyncio.new_event_loop())
    return _loops[0].run_until_complete(_stream(data))


def close_loop() -> None:
    """Give back the loop that `unix_stream` uses."""
    while _loops:
        _loops.pop().close()


def _stream_seeds() -> list[bytes]:
    stream = b"".join(struct.pack("<I", n) + b"f" * n for n in (5, 1, 300, 4096, 7)) + bytes(4)
    return [
        _joined([stream]),
        _joined([stream[i : i + 7] for i in range(0, 210, 7)]),
        _joined([stream[:3], stream[3:20], stream[20:340], stream[340:]]),
    ]


# --------------------------------------------------------------------- handshake

ME: Final = handshake.PeerInfo("a@1", "a", "node", "127.0.0.1:7400", 4711, (1, 1), ("x", "y"))
_KINDS: Final = (frames.HELLO, frames.CHALLENGE, frames.REFUSAL, frames.PROOF)


def greeting(data: bytes) -> bool:
    """A handshake message: its kind in the first byte, then its payload."""
    if not data:
        return False
    kind, payload = _KINDS[data[0] % 4], data[1:]
    try:
        if kind == frames.PROOF:
            proof, ended = handshake.read_proof(payload)
            assert handshake.read_proof(handshake.proof(proof, ended)) == (proof, ended)
            return True
        frame = frames.plain(kind, payload)
    except (FrameError, ValueError):
        return False
    try:
        if kind == frames.HELLO:
            nonce, peer, info = handshake.read_hello(frame, "there")
            again = handshake.read_hello(handshake.hello(nonce, peer), "there")
            assert again == (nonce, peer, info)
        elif kind == frames.CHALLENGE:
            nonce, peer, info, proof = handshake.read_challenge(frame, "there")
            made = handshake.challenge(nonce, peer, proof)
            assert handshake.read_challenge(made, "there") == (nonce, peer, info, proof)
        else:
            assert isinstance(handshake.refused(payload, "there"), AuthFailed | PeerRefused)
            return True
    except (FrameError, AuthFailed, PeerRefused):
        return False
    assert handshake.PeerInfo.from_bytes(info.to_bytes()) == info
    return True


def _greeting_seeds() -> list[bytes]:
    me = ME.to_bytes()
    hello = frames.open_plain(handshake.hello(b"n" * 32, me))[1]
    challenge = frames.open_plain(handshake.challenge(b"n" * 32, me, b"p" * 32))[1]
    refusal = frames.open_plain(handshake.refusal("secret", "no", ME))[1]
    other = frames.open_plain(handshake.refusal("version", "no", ME))[1]
    proof = handshake.proof(b"p" * 32, b"l" * 16)
    return [b"\0" + hello, b"\1" + challenge, b"\2" + refusal, b"\2" + other, b"\3" + proof]


# ---------------------------------------------------------- messages, states, rows


def messages(data: bytes) -> bool:
    """Messages of one frame."""
    try:
        decoded = wire.decode_messages(data)
    except PeerError:
        return False
    again = wire.encode_messages(decoded)
    assert wire.encode_messages(wire.decode_messages(again)) == again
    return True


def state(data: bytes) -> bool:
    """A state stream as far as nothing is unpickled: head and record."""
    try:
        head, body = classes.split(data)
        assert classes.join(bytes(head), bytes(body)) == data
        record = wire.decode_state(head)
    except PeerError:
        return False
    again = wire.encode_state(record)
    assert wire.encode_state(wire.decode_state(again)) == again
    return True


def server_row(data: bytes) -> bool:
    """A server's row in the directory."""
    try:
        found = wire.decode_row(data)
    except PeerError:
        return False
    assert wire.decode_row(wire.encode_row(found)) == found
    wire.encode_row(rules.buried(found, "its node died"))  # the next epoch can be written
    return True


def node_row(data: bytes) -> bool:
    """A node's row in the directory."""
    try:
        found = membership.decode_node(data)
    except PeerError:
        return False
    again = membership.encode_node(found)
    assert membership.encode_node(membership.decode_node(again)) == again
    membership.seen_dead(found, one_machine=True)
    assert 0 < found.pid < 1 << 31, "no process's id"
    return True


def session_name(data: bytes) -> bool:
    """A session id, which says who sends and when it was opened."""
    text = data.decode("utf-8", "replace")
    assert session_born_ms(text) >= 0
    session_sender(text)
    return session_born_ms(text) > 0


def handler_error(data: bytes) -> bool:
    """A handler's exception, but for its pickle."""
    try:
        name, message, text, _ = wire._error.decode(data)
    except (wire.msgspec.DecodeError, UnicodeDecodeError):
        found = wire.unpack_error(data, _NO_RUNTIME, "s")
        assert isinstance(found, PeerError)
        return False
    bare = wire._encoder.encode((name, message, text, b""))
    found = wire.unpack_error(bare, _NO_RUNTIME, "s")
    assert isinstance(found, HandlerFailed) and found.exception_type == name
    return True


_NO_RUNTIME: Final[Any] = None


# ------------------------------------------------------------------------ snapshots


def snapshot(data: bytes) -> bool:
    """A serialized object up to the point before it is unpickled."""
    try:
        head = parse_head(data)
    except LoadFailed:
        head = None
    try:
        found = Snapshot.from_bytes(data)
    except LoadFailed:
        return False
    assert head is not None and head.size_bytes == len(found.head)
    try:
        head.check_loadable()
    except LoadFailed:
        pass
    # NB: the padding is not kept, so bytes in it may differ.
    again = Snapshot.from_bytes(found.to_bytes())
    parts = Snapshot.from_parts([bytes(part) for part in found.parts()])
    for other in (again, parts):
        assert [bytes(part) for part in other.parts()] == [bytes(p) for p in found.parts()]
    return True


def _snapshot_seeds() -> list[bytes]:
    import serializers

    buffers = serializers.dumps([bytearray(b"b" * 70_0), {"k": bytearray(b"c" * 900)}])
    return [serializers.dumps({"a": [1, 2]}), buffers, serializers.dumps(lambda: 1)]


# --------------------------------------------------------------------- public API


# ------------------------------------------------------------------ state streams


def _stream_root() -> Any:
    return {
        "rows": {n: {"id": n, "tags": [n, "x"]} for n in range(40)},
        "names": [f"name {n}" for n in range(40)],
        "text": np.zeros(5000, "u1"),
        "n": 1,
    }


_known_pickles: dict[bytes, bool] = {}


@contextlib.contextmanager
def _small_and_known(*, learn: bool) -> Iterator[None]:
    """Small thresholds; and pickles are taken only as they were written.

    What a pickle that somebody made does is whatever they want, so that is not judged here.
    """
    load = plain.load

    def load_known(body: Any, buffers: Any, resolve: Any = None) -> Any:
        if learn:
            _known_pickles[bytes(body)] = True
        elif bytes(body) not in _known_pickles:
            raise LoadFailed("damaged: another pickle")
        return load(body, buffers, resolve)

    changes = [
        (stream, "CUT_ITEMS_MIN", 20),
        (stream, "REGION_BYTES_MIN", 4096),
        (stream, "COPY_BYTES", 30_000),
        (plain, "load", load_known),
    ]
    before = [getattr(module, name) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)


def chunks(data: bytes) -> bool:
    """Chunks of a peer that holds the key, the last one at the end."""
    if not _known_pickles:
        _chunk_seeds()
        _delta_seeds()
    pieces = _pieces(data)
    reader = stream.StreamReader(1 << 18)
    with _small_and_known(learn=False):
        try:
            for piece in pieces[:-1]:
                reader.take([piece])
                assert 0 <= reader.taken_bytes <= 1 << 18
            made = reader.last(pieces[-1:])
        except LoadFailed:
            return False
    assert type(made) is dict and list(made) == list(_stream_root())
    return True


def _chunk_seeds() -> list[bytes]:
    seeds = []
    with _small_and_known(learn=True):
        for changes in (0, 1, 2):
            root = _stream_root()
            writer = stream.StreamWriter(root, "hash")
            sent = [b"".join(writer.look())]
            for n in range(changes + 1):
                ended = False
                while not ended:
                    pieces, ended = writer.step(0.0, 1)
                    sent.append(b"".join(pieces))
                root["rows"][n]["id"] = "new"
                root["text"][n] = 1
                root["names"].insert(n * 3, "inserted")
            sent.append(b"".join(writer.last()))
            writer.close()
            sent = [b"".join(sent[:-1]), sent[-1]] if changes else [p for p in sent if p]
            reader = stream.StreamReader(1 << 18)
            for piece in sent[:-1]:
                reader.take([piece])
            reader.last(sent[-1:])
            assert len(sent) <= 32
            assert max(map(len, sent)) < 1 << 16
            seeds.append(_joined(sent))
    return seeds


def deltas(data: bytes) -> bool:
    """Deltas of a peer that holds the key; what was kept can be built whatever came after it."""
    if not _known_pickles:
        _chunk_seeds()
        _delta_seeds()
    reader = stream.StreamReader(1 << 18)
    with _small_and_known(learn=False):
        whole = True
        try:
            for piece in _pieces(data):
                reader.keep([piece])
                assert 0 <= reader.taken_bytes <= 1 << 18
        except LoadFailed:
            whole = False
        if not reader.is_whole:
            return False
        try:
            made = reader.build()
        except LoadFailed:
            return False  # Those that came do not follow one another.
    assert type(made) is dict and list(made) == list(_stream_root())
    return whole


def _delta_seeds() -> list[bytes]:
    seeds = []
    with _small_and_known(learn=True):
        for changes in (1, 4):
            root = _stream_root()
            writer = stream.StreamWriter(root, "hash")
            reader = stream.StreamReader(1 << 18)
            sent = []
            for n in range(changes):
                sent.append(b"".join(writer.delta()))
                reader.keep(sent[-1:])
                root["rows"][n]["id"] = "new"
                root["text"][n] = 1
                if n == 1:
                    root["names"].insert(n * 3, "inserted")
                    root["text"] = np.zeros(6000, "u1")
            writer.close()
            reader.build()
            seeds.append(_joined(sent))
    return seeds


def json_arguments(data: bytes) -> bool:
    """Arguments from outside: an array and an object, a zero byte between them."""
    text = data.decode("utf-8", "replace")
    args_json, _, kwargs_json = text.partition("\0")
    try:
        args, kwargs = json_form.parse_arguments(args_json, kwargs_json)
    except UsageError:
        return False
    # What comes in goes out, but for whole numbers too long to be written as text.
    try:
        args_again, kwargs_again = json_form.reply_json(args), json_form.reply_json(kwargs)
    except json_form.NotJson:
        return True
    assert json_form.parse_arguments(args_again, kwargs_again) == (args, kwargs)
    return True


_REQUESTS: Final[list[type[ProtoMessage]]] = [
    api_pb2.SpawnRequest,
    api_pb2.CallRequest,
    api_pb2.CastRequest,
    api_pb2.WhereIsRequest,
    api_pb2.ListRequest,
    api_pb2.InfoRequest,
    api_pb2.MigrateRequest,
    health_pb2.HealthCheckRequest,
]


async def _limit(asked_s: float) -> None:
    until = gateway._Until(asked_s, 30.0, None)
    left = until.left_s()
    assert left is not None and left > 0 and math.isfinite(left)


def request(data: bytes) -> bool:
    """A request of the public API: its kind in the first byte."""
    if not data:
        return False
    kind = _REQUESTS[data[0] % len(_REQUESTS)]
    try:
        found = gateway.parse_request(kind, data[1:])
        again = gateway.parse_request(kind, found.SerializeToString())
        assert again.SerializeToString() == found.SerializeToString()
        for field, value in found.ListFields():
            if type(value) is str:
                assert gateway.checked_text(field.name, value) == value
        if hasattr(found, "timeout_s"):
            if not _loops:
                _loops.append(asyncio.new_event_loop())
            _loops[0].run_until_complete(_limit(found.timeout_s))
    except UsageError:
        return False
    return True


def _request_seeds() -> list[bytes]:
    made: list[ProtoMessage] = [
        api_pb2.SpawnRequest(cls="m:C", args_json="[1]", name="n", request_id="r", timeout_s=2.5),
        api_pb2.CallRequest(server_id="s", method="incr", args_json="[3]", timeout_s=1.0),
        api_pb2.CastRequest(server_name="s", method="incr", kwargs_json='{"by":3}'),
        api_pb2.WhereIsRequest(name="n"),
        api_pb2.ListRequest(node="a", page_size=7, page_token="t"),
        api_pb2.InfoRequest(server_id="s"),
        api_pb2.MigrateRequest(server_id="s", to_node="b", timeout_s=3.0),
        health_pb2.HealthCheckRequest(service="s"),
    ]
    return [bytes([_REQUESTS.index(type(m))]) + m.SerializeToString() for m in made]


# -------------------------------------------------------------- texts of operators


def fail_points(data: bytes) -> bool:
    """Fail points, from the environment or by a verb."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        points = FailPoints(text)
    except UsageError:
        return False
    names = {number: name for name, number in FailPoints.SIGNALS.items()}
    again = ",".join(f"{p}={names[n]}:{pid}" for p, (n, pid) in points.actions.items())
    assert FailPoints(again).actions == points.actions
    assert all(0 < pid < 1 << 31 for _, pid in points.actions.values()), "no process's id"
    return bool(points.actions)


def address(data: bytes) -> bool:
    """host:port, and the URL of a directory."""
    text = data.decode("utf-8", "replace")
    try:
        open_directory(text)
    except ValueError:
        pass
    try:
        host, port = split_address(text)
    except ValueError:
        return False
    assert 0 <= port <= 65535
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    assert split_address(shown) == (host, port)
    is_loopback(host)
    return True


# ------------------------------------------------------------------- checkpoints


def checkpoint_file(data: bytes) -> bool:
    """`serializers.archive`: the header by itself, then all of it; nothing is unpickled."""
    try:
        header = archive.read_header(data)
        archive.header_bytes(data)
    except BadArchive:
        header = None
    try:
        verified, parts = archive.open_archive(data, KEY)
    except BadArchive:
        return False
    assert header == verified and verified.size_bytes == len(data)
    again = b"".join(archive.seal(parts, verified.facts, KEY))
    assert archive.open_archive(again, KEY)[1] == parts
    return True


def _checkpoint_seeds() -> list[bytes]:
    facts = {"cls": "m:C", "server": "s", "epoch": 3, "attributes": {"n": 12}}
    parts = [("record", b"r" * 9), ("body", b"text " * 400), ("buffer 0", bytes(range(256)))]
    return [b"".join(archive.seal(some, facts, KEY)) for some in (parts, [], parts[:1])]


# ------------------------------------------------------------------------- targets


@dataclass(frozen=True, slots=True)
class Target:
    """A parser under test.

    Attributes:
        judge: Takes any bytes; returns whether they were accepted; raises on a bug.
        seeds: Valid inputs, each accepted.
        runs: How many changed inputs the suite tries: a few seconds' worth.
    """

    judge: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]
    runs: int = 10_000


def _state_seeds() -> list[bytes]:
    record = wire.encode_state(scripts.full_state())
    return [classes.join(record, b""), classes.join(record, b"body")]


def _row_seeds() -> list[bytes]:
    more = row(methods=("a", "b"), standbys=("c@1",), cause="died", previous="b@1")
    return [wire.encode_row(row()), wire.encode_row(more)]


TARGETS: Final[dict[str, Target]] = {
    "frames": Target(frame_bodies, _frame_seeds),
    "raw-frames": Target(
        raw_frame,
        lambda: [handshake.hello(b"n" * 32, ME.to_bytes()), handshake.refusal("limit", "no", ME)],
    ),
    "unix-stream": Target(unix_stream, _stream_seeds, 3_000),
    "handshake": Target(greeting, _greeting_seeds),
    "messages": Target(
        messages,
        lambda: (
            [wire.encode_messages([m]) for m in scripts.every_message()]
            + [wire.encode_messages(scripts.every_message())]
        ),
    ),
    "state": Target(state, _state_seeds),
    "server-row": Target(server_row, _row_seeds),
    "node-row": Target(
        node_row,
        lambda: [membership.encode_node(membership.describe("a@1", "a", "127.0.0.1:7400"))],
        3_000,
    ),
    "session-id": Target(session_name, lambda: [b"a@1|1000000|1", b"srv|99|7", b"a|b|c|5|6"]),
    "handler-error": Target(
        handler_error, lambda: [wire._encoder.encode(("ValueError", "no", "Traceback", b"\x80"))]
    ),
    "snapshot": Target(snapshot, _snapshot_seeds),
    "checkpoint": Target(checkpoint_file, _checkpoint_seeds),
    "chunks": Target(chunks, _chunk_seeds, 3_000),
    "deltas": Target(deltas, _delta_seeds, 3_000),
    "json": Target(
        json_arguments,
        lambda: [b'[1,2.5,"a",null,true,{"k":[]}]\0{"by":3}', b"[]\0", b'[[[{"a":"\\u00e9"}]]]'],
    ),
    "request": Target(request, _request_seeds),
    "fail-points": Target(
        fail_points,
        lambda: [
            b"ready=kill",
            b"swap_done=stop:4711,final_sent=kill:12",
            ",".join(f"{p.value}=stop" for p in Point).encode(),
        ],
    ),
    "address": Target(
        address, lambda: [b"127.0.0.1:7400", b"[::1]:0", b"localhost:65535", b"host.example:1"]
    ),
    "conversation": Target(converse, scripts.conversations, 1_500),
}
