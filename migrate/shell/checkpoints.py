"""Checkpoints: a server at a quiescent point as an archive, and back.

Three steps each way, so that each is done where it belongs. Taking: `capture` while the server
stands still (it copies what it has to), `seal` when it serves again, `save`. Giving back: `load`
reads and verifies, `build` unpickles; nothing is unpickled before all of it is verified. All of
them but the first line of a capture run in threads.

The facts in the header are what `Facts` lists; the first part is "record" (mailbox, timers and the
like: `CheckpointRecord`). Of a small state the others are "head", "body" and the buffers "buffer
0", ... (the user's object, as `serializers.attributes` makes it). A large one is not captured in
one go: it is written ahead while its server serves, as for a standby, so the other parts are "chunk
0", ... of a state stream (see `serializers.stream`), of which the last is a delta. Such a file has
format 2, so that releases which do not know of it say so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hmac
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from migrate.core.directory import Rollback, Row, RowState
from migrate.core.records import (
    CheckpointRecord,
    TimerRecord,
)
from migrate.errors import CheckpointError, MigrateError, NotPicklable, UsageError
from migrate.ref import Runtime, loading_runtime
from migrate.reports import CheckpointInfo
from migrate.server import ServerSpec, spec_of
from migrate.shell import classes, stores, wire
from serializers import archive, attributes
from serializers.archive import BadArchive, Header
from serializers.base import Snapshot
from serializers.errors import LoadFailed, NotSerializable
from serializers.stream import Piece, StreamReader, StreamWriter

HEADER_ROOM_BYTES: Final = 64 << 20
"""What a checkpoint may have besides the state itself."""

COPY_BYTES: Final = 1 << 20
"""How much is copied before others may run: well under a millisecond's worth."""

ATTRIBUTES_TOLD_MAX: Final = 200
"""Attributes whose sizes the header tells, the largest first; the rest is one sum."""

_record: Final = msgspec.msgpack.Decoder(CheckpointRecord)


class Facts(msgspec.Struct, kw_only=True):
    """What a checkpoint's header tells of the server, readable without this project.

    Attributes:
        cls: "module:Qualname" of its class.
        version: Version of its state.
        by_value: The class itself is in the file; only the same minor Python reads it.
        server: Its id.
        name: Its name; empty: none.
        node: Name of the node that took it.
        epoch: Its epoch then.
        generation: The epoch at which it last went back in time; 0: never.
        rollbacks: Each time it went back that still matters.
        taken: When it was taken, for people.
        taken_s: The same in seconds since 1970 UTC.
        casts: Casts that waited in its mailbox, and are in the file.
        dropped: Its own requests that nobody had acknowledged; they are not in the file.
        attributes: Bytes that each attribute takes, uncompressed.
    """

    cls: str
    version: int
    by_value: bool
    server: str
    name: str
    node: str
    epoch: int
    generation: int
    rollbacks: list[tuple[int, float, float]]
    taken: str
    taken_s: float
    casts: int
    dropped: int
    attributes: dict[str, int]

    def row(self, cls: str) -> Row:
        """The row that the server had then, as far as restoring it needs it.

        Args:
            cls: What its class is called here: it may have been renamed.
        """
        rollbacks = tuple(Rollback(*rollback) for rollback in self.rollbacks)
        return Row(
            self.server,
            self.epoch,
            "",
            RowState.LOST,
            "",
            self.name,
            cls,
            self.version,
            generation=self.generation,
            rollbacks=rollbacks,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Captured:
    """A server's state that no longer shares anything with the live object.

    Attributes:
        facts: For the header.
        record: What is not the object.
        state: The object, as a snapshot or as the chunks of a stream, each in pieces.
    """

    facts: Facts
    record: CheckpointRecord
    state: Snapshot | Sequence[Sequence[Piece]]

    @property
    def state_bytes(self) -> int:
        """What the object takes."""
        if isinstance(self.state, Snapshot):
            return self.state.size_bytes
        return sum(len(piece) for chunk in self.state for piece in chunk)


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint of which every byte is verified, and none unpickled."""

    url: str
    facts: Facts
    header: Header
    record: CheckpointRecord
    state: Snapshot | Sequence[memoryview]

    @property
    def state_bytes(self) -> int:
        """What the object takes."""
        if isinstance(self.state, Snapshot):
            return self.state.size_bytes
        return sum(map(len, self.state))


def signing_key(secret: bytes, given: object) -> bytes:
    """The key that signs checkpoints: of the cluster, or made from one that was given.

    Raises:
        UsageError: The given one is too short, or no bytes.
    """
    if given is None:
        return hmac.digest(secret, b"livemigrate checkpoint key 1", "sha256")
    if not isinstance(given, bytes) or len(given) < archive.KEY_BYTES_MIN:
        raise UsageError(f"key= takes at least {archive.KEY_BYTES_MIN} bytes")
    return hmac.digest(given, b"livemigrate checkpoint key given 1", "sha256")


# ------------------------------------------------------------------ taking


def facts_of(row: Row, node: str, by_value: bool, record: CheckpointRecord) -> Facts:
    """What is known before the object is captured: call it at the quiescent point."""
    now_s = time.time()
    return Facts(
        cls=row.cls,
        version=row.version,
        by_value=by_value,
        server=row.server,
        name=row.name,
        node=node,
        epoch=row.epoch,
        generation=row.generation,
        rollbacks=[(r.generation, r.then_s, r.now_s) for r in row.rollbacks],
        taken=datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds"),
        taken_s=now_s,
        casts=sum(1 for entry in record.mailbox if entry.session),
        dropped=len(record.dropped),
        attributes={},
    )


def capture(obj: object, facts: Facts, record: CheckpointRecord) -> Captured:
    """Pickle a server that stands still, and copy the memory that the pickle refers to.

    Raises:
        NotPicklable: Something cannot travel; names the path to it. The server is as before.
    """
    with _told_of(facts):
        snapshot, sizes = attributes.encode(obj)
    copies = tuple(_copied(buffer) for buffer in snapshot.buffers)
    _tell_sizes(facts, sizes)
    return Captured(facts, record, Snapshot(snapshot.head, snapshot.body, copies))


def capture_rest(
    writer: StreamWriter, ahead: Sequence[Sequence[Piece]], facts: Facts, record: CheckpointRecord
) -> Captured:
    """Write what changed of a server that stands still since what was written ahead.

    Raises:
        NotPicklable: Something cannot travel; names the path to it. The server is as before.
    """
    with _told_of(facts):
        rest = writer.delta()
    _tell_sizes(facts, writer.sizes)
    return Captured(facts, record, [*ahead, rest])


@contextlib.contextmanager
def _told_of(facts: Facts) -> Iterator[None]:
    """Say of which server it is that something cannot travel."""
    try:
        yield
    except NotSerializable as error:
        raise NotPicklable(
            f"the state of server {facts.server} cannot be captured: {error}; it goes on serving "
            f"at {facts.node}",
            path=error.path,
            server=facts.server,
            node=facts.node,
            source=facts.node,
            cause=error.reason,
        ) from error


def _tell_sizes(facts: Facts, sizes: dict[str, int]) -> None:
    told = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    facts.attributes = dict(told[:ATTRIBUTES_TOLD_MAX])
    rest = sum(size for _, size in told[ATTRIBUTES_TOLD_MAX:])
    if rest:
        others = facts.attributes.get(attributes.OTHERS, 0)
        facts.attributes[attributes.OTHERS] = others + rest


def _copied(buffer: memoryview) -> memoryview:
    copy = bytearray(buffer.nbytes)
    for start in range(0, buffer.nbytes, COPY_BYTES):
        # Piece by piece: the interpreter's lock is held while each of them is copied.
        copy[start : start + COPY_BYTES] = buffer[start : start + COPY_BYTES]
    return memoryview(copy).toreadonly()


def seal(captured: Captured, key: bytes) -> list[archive.Buffer]:
    """The bytes of a checkpoint, signed."""
    parts: list[tuple[str, archive.Buffer]] = [("record", wire.encode_state(captured.record))]
    format_version = 1
    if isinstance(captured.state, Snapshot):
        head, body, *buffers = captured.state.parts()
        parts += (("head", head), ("body", body))
        parts += [(f"buffer {i}", buffer) for i, buffer in enumerate(buffers)]
    else:
        parts += [(f"chunk {i}", b"".join(chunk)) for i, chunk in enumerate(captured.state)]
        format_version = 2
    told = msgspec.to_builtins(captured.facts)
    return archive.seal(parts, told, key, format_version=format_version)


def save(url: str, captured: Captured, key: bytes, keep: int | None) -> CheckpointInfo:
    """Write a checkpoint to its place.

    Args:
        url: Where.
        captured: What.
        key: What signs it.
        keep: None: just there, replacing what is there. Else under a name of its own that
            begins so; afterwards so many of these names are left, the latest ones.

    Raises:
        CheckpointError: It could not be written; the outcome says what is there now.
        UsageError: The URL cannot be.
    """
    facts = captured.facts
    store, name = stores.open_store(url)
    pieces = seal(captured, key)
    ending = ""
    if keep is not None:
        # Names sort by time; the epoch tells two owners apart whose clocks differ.
        stamp = facts.taken.replace("-", "").replace(":", "").replace("+0000", "Z")
        ending = f".{stamp}-e{facts.epoch}"
    try:
        size = store.write(name + ending, pieces)
    except stores.StoreError as error:
        raise CheckpointError(
            f"the checkpoint of server {facts.server} cannot be written to {url}: {error.reason}; "
            "the server goes on serving",
            url=url,
            flaw="store",
            server=facts.server,
            node=facts.node,
            cause=error.reason,
            outcome=error.outcome,
        ) from error
    if keep is not None:
        for old in _versions(store, name)[:-keep]:
            if old != name + ending:
                store.remove(old)
    header = archive.read_header(pieces[0])
    return CheckpointInfo(
        url=url + ending,
        server=facts.server,
        cls=facts.cls,
        version=facts.version,
        epoch=facts.epoch,
        bytes=size,
        digest=f"sha256:{header.digest}",
    )


def _versions(store: stores.Store, name: str) -> list[str]:
    """What checkpoints taken again and again are called, the oldest first."""
    return [other for other in store.names(name + ".") if _is_stamp(other[len(name) + 1 :])]


def _is_stamp(text: str) -> bool:
    stamp, separator, epoch = text.rpartition("-e")
    return separator != "" and epoch.isdigit() and len(stamp) == 20 and stamp[8] == "T"


# ------------------------------------------------------------------ giving back


def find(url: str) -> tuple[stores.Store, str, str]:
    """Store, name and URL of a checkpoint: the latest, if they are taken again and again.

    Raises:
        UsageError: The URL cannot be.
    """
    store, name = stores.open_store(url)
    try:
        store.read(name, 1 << 62, 0)
    except stores.NotThere:
        try:
            versions = _versions(store, name)
        except stores.StoreError:
            versions = []
        if versions:
            return store, versions[-1], url + versions[-1][len(name) :]
    except stores.StoreError:
        pass  # whoever reads it finds out
    return store, name, url


def _read(
    store: stores.Store, name: str, url: str, bytes_max: int, first: int | None = None
) -> bytearray:
    try:
        return store.read(name, bytes_max, first)
    except stores.NotThere as error:
        raise CheckpointError(
            f"there is no checkpoint at {url}: {error.reason}", url=url, flaw="missing"
        ) from error
    except stores.StoreError as error:
        raise CheckpointError(
            f"the checkpoint {url} cannot be read: {error.reason}",
            url=url,
            flaw="store",
            cause=error.reason,
        ) from error


def _bad(url: str, error: BadArchive) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {url} cannot be used: {error.reason}; nothing was restored",
        url=url,
        flaw=error.flaw,
        cause=error.reason,
    )


def _facts(url: str, header: Header) -> Facts:
    try:
        return msgspec.convert(header.facts, Facts)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"the checkpoint {url} cannot be used: its header lacks what one of a server has: "
            f"{error}",
            url=url,
            flaw="damaged",
        ) from error


def inspect(url: str) -> tuple[Header, Facts, str, bytes]:
    """Read the header alone; nothing is verified, nothing unpickled.

    Returns:
        Header, facts, URL of the file that was read, and its bytes up to the parts.

    Raises:
        CheckpointError: There is no header that can be read.
        UsageError: The URL cannot be.
    """
    store, name, url = find(url)
    try:
        start = _read(store, name, url, 1 << 62, archive.LINE_BYTES)
        start = _read(store, name, url, 1 << 62, archive.header_bytes(start))
        header = archive.read_header(start)
    except BadArchive as error:
        raise _bad(url, error) from error
    return header, _facts(url, header), url, bytes(start)


def load(url: str, key: bytes, state_bytes_max: int) -> Loaded:
    """Read a checkpoint and verify every byte of it.

    Raises:
        CheckpointError: It cannot be used.
        UsageError: The URL cannot be.
    """
    store, name, url = find(url)
    return opened(url, _read(store, name, url, state_bytes_max + HEADER_ROOM_BYTES), key)


def opened(url: str, data: bytearray, key: bytes) -> Loaded:
    """Verify every byte of a checkpoint, and take it apart.

    Raises:
        CheckpointError: It cannot be used.
    """
    try:
        header, parts = archive.open_archive(data, key)
    except BadArchive as error:
        raise _bad(url, error) from error
    facts = _facts(url, header)
    try:
        named = dict(parts)
        record = _record.decode(named["record"])
        state: Snapshot | list[memoryview]
        if "chunk 0" in named:
            state = [named[f"chunk {i}"] for i in range(len(parts) - 1)]
        else:
            buffers = [named[f"buffer {i}"] for i in range(len(parts) - 3)]
            state = Snapshot.from_parts([named["head"], named["body"], *buffers])
    except (KeyError, LoadFailed, msgspec.DecodeError) as error:
        raise CheckpointError(
            f"the checkpoint {url} cannot be used: its parts are not those of a server: {error}",
            url=url,
            flaw="damaged",
        ) from error
    return Loaded(url, facts, header, record, state)


def build(loaded: Loaded, runtime: Runtime) -> tuple[Any, ServerSpec]:
    """Import the class and unpickle the object, upgraded if the class here is newer.

    The record's timers become those of the class here.

    Raises:
        CheckpointError: The class cannot be had, is older, or the state cannot be loaded.
    """
    facts, url = loaded.facts, loaded.url

    def refused(flaw: str, why: str, error: BaseException | None = None) -> CheckpointError:
        failure = CheckpointError(
            f"the checkpoint {url} cannot be restored here: {why}",
            url=url,
            flaw=flaw,
            server=facts.server,
            cause=why,
        )
        failure.__cause__ = error
        return failure

    if not facts.by_value:
        try:
            spec = classes.find(facts.cls)
        except Exception as error:
            text = error.message if isinstance(error, MigrateError) else str(error)
            why = f"class {facts.cls} cannot be had: {wire.exception_name(error)}: {text}"
            raise refused("no class", why, error) from error
        if spec.version < facts.version:
            raise refused(
                "older class",
                f"{facts.cls} has version {spec.version} here, older than the checkpoint's "
                f"version {facts.version}; update this node first",
            )
        here = spec.version
    else:
        here = facts.version

    installed = False

    def install(obj: Any, state: Any) -> None:
        nonlocal installed
        installed = True
        if here == facts.version:
            attributes.set_state(obj, state)
        else:
            classes.install_older(obj, state, facts.version)

    token = loading_runtime.set(runtime)
    try:
        obj = _object(loaded, install)
        spec = spec_of(type(obj))
    except Exception as error:
        why = f"its state cannot be loaded: {wire.exception_name(error)}: {error}"
        raise refused("not loadable", why, error) from error
    finally:
        loading_runtime.reset(token)
    if here != facts.version and not installed and "upgrade" in spec.hooks:
        why = (
            f"{facts.cls} says itself how it is pickled, so its `upgrade` cannot be given the "
            f"state of version {facts.version}"
        )
        raise refused("not loadable", why)
    _fit_timers(loaded.record, spec)
    return obj, spec


def _object(loaded: Loaded, install: attributes.Install) -> Any:
    """Unpickle the object of a checkpoint."""
    if isinstance(loaded.state, Snapshot):
        return attributes.decode(loaded.state, install)
    # What it may take was seen to when the file was read.
    reader = StreamReader(2 * loaded.state_bytes)
    *ahead, rest = loaded.state
    for chunk in ahead:
        reader.take([chunk])
    reader.keep([rest])
    return reader.build(functools.partial(attributes.load, install=install))


def _fit_timers(record: CheckpointRecord, spec: ServerSpec) -> None:
    """Timers that the class has no more go; those it has got since begin."""
    periods = {timer.name: max(1, int(timer.seconds * 1000)) for timer in spec.timers}
    kept = {timer.method: timer for timer in record.timers if timer.method in periods}
    record.timers = [
        kept.get(name) or TimerRecord(name, period, period, False)
        for name, period in periods.items()
    ]
    for timer in record.timers:
        timer.period_ms = periods[timer.method]
        timer.left_ms = min(timer.left_ms, timer.period_ms)
    record.mailbox = [e for e in record.mailbox if e.session or e.method in kept]


def cause_of(loaded: Loaded) -> str:
    """What a monitor, and the log, is told of a server that came back from a checkpoint."""
    dropped = loaded.record.dropped
    text = f"restored from a checkpoint of {loaded.facts.taken}"
    if dropped:
        whom = sorted({f"{d.method!r} of {d.server}" for d in dropped})
        listed = ", ".join(whom[:5]) + (", ..." if len(whom) > 5 else "")
        text += f"; {len(dropped)} requests that it had made and nobody had acknowledged: {listed}"
        text = text.replace("; ", "; dropped were ", 1)
    return text


__all__ = [
    "Captured",
    "Facts",
    "Loaded",
    "build",
    "capture",
    "capture_rest",
    "cause_of",
    "facts_of",
    "find",
    "inspect",
    "load",
    "opened",
    "save",
    "seal",
    "signing_key",
]
