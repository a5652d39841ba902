"""Standbys in the shell: the object's part of what an owner sends, and of what a standby keeps.

The core decides (`core/standby.py`); here cuts of the object are made and kept, and rows swapped.

A small object is captured as a snapshot for each cut, once for all standbys, on the loop: that is
on the way of each call, so there is no task and no thread in it. A large one goes by a stream of
its own for each standby (`serializers.stream`): ahead of the first cut in rounds, while the server
serves, then in deltas. Which of the two a cut is shows by its first byte.

A standby keeps a snapshot as the bytes that it came in, and a stream in a reader; neither is an
object that acts. The object is built when it is to take over.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import serializers
from migrate.core.delivery import Entry
from migrate.core.directory import Row
from migrate.core.events import Copied, RowRead, SwapOutcome, SwapResult
from migrate.core.ids import ServerId, TransferId
from migrate.core.incarnation import Incarnation
from migrate.core.messages import Cut, Follow, Moved, Note, Step
from migrate.core.standby import Backup, CaptureFailed
from migrate.errors import MigrateError
from migrate.ref import RefObject
from migrate.server import spec_of
from migrate.shell import classes, wire
from migrate.shell.directories.base import DirectoryError
from migrate.shell.host import NEVER_WAITS, PLAIN_DEF, Hosted
from migrate.shell.inputs import FIRST_BYTE, InputLog, LastInputs, Twin
from migrate.shell.peers import BULK_BYTES
from migrate.shell.precopy import (
    STEP_S,
    Over,
    bound,
    merged,
    new_writer,
    next_chunk,
    parts_of,
    when_quiet,
)
from rpc.frames import Gathered
from serializers import attributes
from serializers.base import MAGIC
from serializers.errors import LoadFailed
from serializers.stream import Piece, StreamReader, StreamWriter, is_small

if TYPE_CHECKING:
    from migrate.shell.driver import Driver
    from migrate.shell.journals import NodeJournals

T = TypeVar("T")

log: Final = logging.getLogger("migrate")

SMALL_STATE_BYTES: Final = 64 << 10
"""Smaller parts are kept, and smaller objects loaded, on the loop: well under a millisecond."""

_UNCHANGED: Final = 0xD1
"""The last part of a move that has nothing to bring."""

_SNAPSHOT: Final = MAGIC[0]
"""The first byte of a snapshot; no stream begins with it."""


@dataclass(slots=True)
class Kept:
    """What a standby has of one stream.

    Attributes:
        follow: What the owner said of the server.
        snapshot: The object, if it came as a snapshot.
        reader: The object, if it came as a stream.
        twin: The object, alive, if its class is deterministic. Until the next cut shows whether
            its owner goes on with messages, there is the snapshot or reader as well.
    """

    follow: Follow
    snapshot: bytes | Gathered | None = None
    reader: StreamReader | None = None
    twin: Twin | None = None


class StandbyStreams:
    """Both sides of all streams from and to one node; see `Port` for its methods."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._writers: dict[TransferId, StreamWriter] = {}
        self._tasks: dict[TransferId, asyncio.Task[Any]] = {}
        # The last snapshot, for the other standbys of the same cut.
        self._cut_of: Incarnation | None = None
        self._cut_number = 0
        self._cut = b""
        self._kept: dict[TransferId, Kept] = {}
        self.journals: NodeJournals | None = None  # of a node that was given a folder for them

    @property
    def limit_bytes(self) -> int:
        """Most bytes of one state."""
        return self._driver.options.state_bytes_max

    # ------------------------------------------------------------------ owner

    def capture(self, inc: Incarnation, stream: TransferId, number: int) -> bytes:
        """See `Port.capture`."""
        writer = self._writers.get(stream)
        log_of = self._log_of(inc)
        if log_of is not None and log_of.follows(stream):
            host_of: Hosted = inc.host  # type: ignore[assignment]
            return log_of.take(inc, host_of.obj, stream, number)
        try:
            if writer is not None:
                delta = _in_parts(writer.delta())
                if log_of is not None:
                    # From here on it runs what is run here.
                    log_of.begin(stream)
                    self._close(stream)
                return delta
            if self._cut_of is inc and self._cut_number == number:
                if log_of is not None:
                    log_of.begin(stream)
                return self._cut
            host: Hosted = inc.host  # type: ignore[assignment]
            data = serializers.dumps(host.obj)
            if log_of is not None:
                log_of.begin(stream)
        except Exception as error:
            # What others of this cut got is not sent, and the next attempt has the same number.
            self._cut_of = None
            raise CaptureFailed(f"{wire.exception_name(error)}: {error}") from error
        size = host.state_bytes = len(data)
        if size > self._driver.options.precopy_bytes_min and log_of is None:
            # It has grown: from the next cut on only what changes is sent.
            self._writers[stream] = self._writer(inc, stream)
        self._cut_of, self._cut_number = inc, number
        # The core passes on what stands for the bytes, and asks for nothing but their number.
        self._cut = data if size <= BULK_BYTES else cast(bytes, Gathered([data]))
        return self._cut

    def _log_of(self, inc: Incarnation) -> InputLog | None:
        """Of a deterministic server: what its standbys are told instead of changes."""
        host: Hosted = inc.host  # type: ignore[assignment]
        if not host.spec.deterministic or host.diverged:
            return None
        if host.inputs is None:
            host.inputs = InputLog(self._driver.options.digest_every_s)
        return host.inputs

    def diverged(self, server: ServerId, cause: str) -> None:
        """A server is not deterministic after all: from now on its standbys are told changes."""
        inc = self._driver.core.hosted.get(server)
        if inc is None:
            return
        host: Hosted = inc.host  # type: ignore[assignment]
        host.diverged, host.inputs = True, None
        log.error(
            "server %s of class %s is not deterministic, though it is declared so: %s; from now on "
            "its standbys are told what changes of its state",
            server,
            host.spec.cls_name,
            cause,
        )

    def hook_ran(self, inc: Incarnation) -> None:
        """A hook may have changed the state: standbys are told it anew."""
        host: Hosted = inc.host  # type: ignore[assignment]
        host.inputs = None

    @staticmethod
    def digest(payload: bytes) -> int:
        """See `Port.digest`."""
        # What is pickled need not come out the same a second time: sets have no order.
        return zlib.crc32(payload) + 1 if payload[:1] == wire.PLAIN_ARGUMENTS else 0

    @staticmethod
    def code_of(inc: Incarnation) -> tuple[bool, str]:
        """See `Port.code_of`."""
        host: Hosted = inc.host  # type: ignore[assignment]
        return host.by_value, wire.PYTHON

    @staticmethod
    def wall_s() -> float:
        """See `Port.wall_s`."""
        return time.time()

    def journal(self, inc: Incarnation, message: Cut | Step | Note) -> None:
        """See `Port.journal`."""
        if self.journals is not None:
            self.journals.append(inc, message)
            return
        self._driver._soon(
            lambda: self._driver.core.standbys.journaled(
                inc.id, message.number, "this node keeps no journals", self._driver.now_ms()
            )
        )

    def journal_goes_on(self, stream: TransferId) -> None:
        """See `Port.journal_goes_on`."""
        if self.journals is not None:
            self.journals.go_on(stream)

    def _writer(self, inc: Incarnation, stream: TransferId) -> StreamWriter:
        host: Hosted = inc.host  # type: ignore[assignment]
        assert inc.replica is not None
        node = inc.replica.followers[stream].node
        return new_writer(self._driver, host, node)

    def may_wait(self, inc: Incarnation, entry: Entry) -> bool:
        """See `Port.may_wait`."""
        host: Hosted = inc.host  # type: ignore[assignment]
        method = entry.method
        try:
            kind, _ = host.handlers.get(method) or host.handler(method)
        except Exception:
            return False  # It will fail at once.
        return kind not in (PLAIN_DEF, NEVER_WAITS)

    def copy_for(self, inc: Incarnation, stream: TransferId) -> None:
        """See `Port.copy_for`."""
        driver = self._driver
        host: Hosted = inc.host  # type: ignore[assignment]
        least = driver.options.precopy_bytes_min
        known = 0 <= host.state_bytes < least or least > driver.options.state_bytes_max
        if stream not in self._writers and (known or is_small(host.obj)):
            driver._soon(lambda: self._copied(stream, Copied(b"", True)))
            return
        self._tasks[stream] = driver.task(self._copy(inc, stream), f"copy of {inc.id}")

    async def _copy(self, inc: Incarnation, stream: TransferId) -> None:
        try:
            event = await self._next_chunk(inc, stream)
        except Over:
            return
        except Exception:
            # The cut will say what is wrong with the state, if anything is.
            log.warning("the state of %s cannot be sent ahead", inc.id, exc_info=True)
            self._close(stream)
            event = Copied(b"", True, failed=True)
        self._copied(stream, event)

    def _copied(self, stream: TransferId, event: Copied) -> None:
        self._driver.core.standbys.copied_for(stream, event, self._driver.now_ms())
        self._driver.flush()

    async def _next_chunk(self, inc: Incarnation, stream: TransferId) -> Copied:
        driver = self._driver
        pieces: list[Piece] = []
        writer = self._writers.get(stream)

        def quietly(work: Callable[[], T]) -> Awaitable[T]:
            return when_quiet(driver, inc, work, goes_on=lambda: stream in self._writers)

        if writer is None:
            writer = self._writers[stream] = self._writer(inc, stream)
            pieces += await quietly(writer.look)
            if not writer.is_worth_it:
                self._close(stream)
                return Copied(b"", True)
        chunk_bytes = driver.options.chunk_bytes
        return await next_chunk(
            quietly, lambda: self._step(stream, chunk_bytes), chunk_bytes, pieces
        )

    def _step(self, stream: TransferId, chunk_bytes: int) -> tuple[list[Piece], bool]:
        writer = self._writers.get(stream)
        if writer is None:
            raise Over
        return writer.step(STEP_S, chunk_bytes)

    # -- moves to a standby

    def has_stream(self, stream: TransferId) -> bool:
        """See `Port.has_stream`."""
        return stream in self._writers or self._followed(stream) is not None

    def _followed(self, stream: TransferId) -> tuple[InputLog, Incarnation, Hosted] | None:
        core = self._driver.core
        inc = core.hosted.get(core.standbys.streams.get(stream, ""))
        if inc is None:
            return None
        host: Hosted = inc.host  # type: ignore[assignment]
        log_of = host.inputs
        return (log_of, inc, host) if log_of is not None and log_of.follows(stream) else None

    def adopt_stream(self, transfer: TransferId, stream: TransferId, incoming: bool) -> None:
        """See `Port.adopt_stream`."""
        precopy = self._driver.precopy
        if not incoming:
            followed = self._followed(stream)
            writer = self._writers.pop(stream, None)
            if followed is not None:
                precopy.go_on_writing(transfer, cast(StreamWriter, LastInputs(*followed, stream)))
            elif writer is not None and self._is_as_cut(stream):
                writer.close()
                precopy.go_on_writing(transfer, cast(StreamWriter, _Nothing()))
            elif writer is not None:
                precopy.go_on_writing(transfer, writer)
            return
        kept = self._kept.get(stream)
        if kept is not None and kept.twin is not None:
            precopy.go_on_reading(transfer, cast(StreamReader, kept.twin))
        elif kept is not None:
            precopy.go_on_reading(transfer, cast(StreamReader, _Last(self, kept)))

    def _is_as_cut(self, stream: TransferId) -> bool:
        """Whether nothing can have changed a server since the cut that its move has waited for."""
        core = self._driver.core
        inc = core.hosted.get(core.standbys.streams.get(stream, ""))
        host: Any = inc.host if inc is not None else None
        return host is not None and "on_depart" not in host.spec.hooks

    def begin_anew(self, stream: TransferId) -> None:
        """A stream's next cut is whole; what was told by it so far is not needed."""
        self._close(stream)
        followed = self._followed(stream)
        if followed is not None:
            followed[0].end(stream)

    def end_stream(self, stream: TransferId) -> None:
        """See `Port.end_stream`."""
        if self.journals is not None:
            self.journals.end(stream)
        task = self._tasks.pop(stream, None)
        if task is not None:
            task.cancel()
        self._close(stream)
        followed = self._followed(stream)
        if followed is not None:
            followed[0].end(stream)
        self._kept.pop(stream, None)
        # Its bytes may be large, and the server may be gone.
        self._cut_of, self._cut = None, b""

    def _close(self, stream: TransferId) -> None:
        writer = self._writers.pop(stream, None)
        if writer is not None:
            writer.close()

    # ------------------------------------------------------------------ standby

    def check_follow(self, follow: Follow) -> None:
        """See `Port.check_follow`."""
        driver = self._driver
        if follow.by_value:
            refusal = ""
            if follow.python != wire.PYTHON:
                refusal = (
                    f"the class travels by value from {follow.python}, and this node runs "
                    f"{wire.PYTHON}; put the class into a module that both can import"
                )
            driver._soon(lambda: self._checked(follow, follow.version, refusal))
            return
        spec = classes.known(follow.cls)
        if spec is not None:
            version = spec.version
            driver._soon(lambda: self._checked(follow, version, ""))
            return
        driver.task(self._import_class(follow), f"import of {follow.cls}")

    async def _import_class(self, follow: Follow) -> None:
        try:
            spec = await asyncio.to_thread(classes.find, follow.cls)
        except Exception as error:
            reason = (
                f"class {follow.cls} cannot be had there: {wire.exception_name(error)}: {error}"
            )
            self._checked(follow, 0, reason)
            return
        self._checked(follow, spec.version, "")

    def _checked(self, follow: Follow, version: int, refusal: str) -> None:
        driver = self._driver
        limit = driver.options.servers_max
        if not refusal and len(driver.core.hosted) + len(self._kept) >= limit:
            refusal = f"it holds its limit of {limit} servers"
        if not refusal:
            self._kept[follow.stream] = Kept(follow)
        driver.core.standbys.follow_checked(follow.stream, version, refusal, driver.now_ms())
        driver.flush()

    def keep_chunk(self, stream: TransferId, number: int, state: bytes | Gathered) -> None:
        """See `Port.keep_chunk`."""
        kept = self._kept.get(stream)
        if kept is None:
            return
        if kept.reader is None:
            kept.reader = StreamReader(self._driver.options.state_bytes_max)
        self._driver.task(self._take(stream, kept.reader, state), f"chunk {number} of {stream}")

    async def _take(
        self, stream: TransferId, reader: StreamReader, state: bytes | Gathered
    ) -> None:
        reason = ""
        try:
            await asyncio.to_thread(reader.take, parts_of(state))
        except Exception as error:
            reason = f"{wire.exception_name(error)}: {error}"
        kept = self._kept.get(stream)
        if kept is not None and kept.reader is reader:
            self._driver.core.standbys.chunk_kept(stream, reason, self._driver.now_ms())
            self._driver.flush()

    def keep_delta(
        self, stream: TransferId, number: int, first: bool, state: bytes | Gathered
    ) -> bool | str | None:
        """See `Port.keep_delta`."""
        kept = self._kept.get(stream)
        if kept is None:
            return "nothing of it is kept here"
        if _first_byte(state) == FIRST_BYTE:
            if kept.twin is None:
                return "messages came without a state to run them on"
            kept.snapshot = kept.reader = None
            return kept.twin.run(_joined(state)) or True
        if first and len(state) >= SMALL_STATE_BYTES:
            self._driver.task(self._keep_first(stream, number, kept, state), f"cut of {stream}")
            return None
        reason = self._keep(kept, first, state)
        if not reason:
            return True
        if not first:
            return reason
        self._driver._soon(lambda: self._kept_first(stream, number, reason))
        return None

    async def _keep_first(
        self, stream: TransferId, number: int, kept: Kept, state: bytes | Gathered
    ) -> None:
        reason = await asyncio.to_thread(self._keep, kept, True, state)
        if self._kept.get(stream) is kept:
            self._kept_first(stream, number, reason)

    def _kept_first(self, stream: TransferId, number: int, reason: str) -> None:
        self._driver.core.standbys.delta_kept(stream, number, reason, self._driver.now_ms())
        self._driver.flush()

    def _keep(self, kept: Kept, first: bool, state: bytes | Gathered) -> str:
        """Install a cut; why that failed, or "". May run in a thread."""
        try:
            if _first_byte(state) == _SNAPSHOT:
                # What cannot be loaded here is no standby; better now than when it is needed. And
                # one that is told messages is about to be told more.
                told = kept.twin is not None and kept.snapshot is None and kept.reader is None
                kept.twin = (
                    self._twin(kept, self._loaded_from(kept, state)) if first or told else None
                )
                kept.snapshot, kept.reader = state, None
                return ""
            reader = kept.reader
            if reader is None:
                reader = kept.reader = StreamReader(self._driver.options.state_bytes_max)
            reader.keep(parts_of(state))
            kept.snapshot = None
            kept.twin = self._twin(kept, self._rehearsed(kept, reader)) if first else None
        except Exception as error:
            log.debug("a cut of %s cannot be kept", kept.follow.server, exc_info=error)
            return f"{wire.exception_name(error)}: {error}"
        return ""

    async def keep_journal(self, follow: Follow, states: list[bytes]) -> str:
        """Install the cuts of a journal, for `load_backup`; why that failed, or ""."""
        kept = Kept(follow)

        def keep() -> str:
            for number, state in enumerate(states):
                if state[0] == FIRST_BYTE:
                    if kept.twin is None:
                        return "messages came without a state to run them on"
                    reason = kept.twin.run(state)
                else:
                    reason = self._keep(kept, number == 0, state)
                if reason:
                    return reason
            return ""

        try:
            if not follow.by_value:
                await asyncio.to_thread(classes.find, follow.cls)
            reason = await asyncio.to_thread(keep)
        except Exception as error:
            return f"{wire.exception_name(error)}: {error}"
        if not reason:
            self._kept[follow.stream] = kept
        return reason

    def _twin(self, kept: Kept, obj: Any) -> Twin | None:
        """What was loaded, if it is of a deterministic class and may run what its owner runs."""
        spec = spec_of(type(obj))
        if not spec.deterministic or spec.version != kept.follow.version:
            return None
        driver = self._driver
        host = Hosted(obj, spec, RefObject(kept.follow.server, spec.class_info, driver), driver)
        host.by_value = kept.follow.by_value
        return Twin(host)

    def _rehearsed(self, kept: Kept, reader: StreamReader) -> Any:
        return self._as_here(kept, bound(self._driver, reader.rehearse))

    def _as_here(self, kept: Kept, obj: Any) -> Any:
        """What was loaded, upgraded if this node has a newer version of its class.

        Raises:
            Exception: Whatever the class's `upgrade` raises.
        """
        from_version = kept.follow.version
        if spec_of(type(obj)).version == from_version:
            return obj
        apart = classes.Apart(attributes.encode(obj)[0].to_bytes())
        return classes.put_together(apart, from_version, self._driver)

    def _loaded_from(self, kept: Kept, state: bytes | Gathered) -> Any:
        data: Any = state
        if isinstance(state, Gathered):
            data = state.parts[0] if len(state.parts) == 1 else state.joined()
        if isinstance(data, memoryview) and not data.readonly:
            # An object in it would use its memory in place, and change what is kept.
            data = bytes(data)
        return self._as_here(kept, bound(self._driver, lambda: serializers.loads(data)))

    def load_backup(self, backup: Backup) -> None:
        """See `Port.load_backup`."""
        driver = self._driver
        kept = self._kept.get(backup.stream)
        if kept is None:
            driver._soon(lambda: self._loaded(backup, None, "nothing of it is kept here"))
            return
        if kept.twin is not None:
            twin = kept.twin
            driver._soon(lambda: self._loaded(backup, twin.host.obj, ""))
            return
        snapshot = kept.snapshot
        if snapshot is not None and len(snapshot) < SMALL_STATE_BYTES:
            driver._soon(lambda: self._loaded(backup, *self._build(kept)))
        else:
            driver.task(self._load_slowly(backup, kept), f"load of {backup.server}")

    async def _load_slowly(self, backup: Backup, kept: Kept) -> None:
        self._loaded(backup, *await asyncio.to_thread(self._build, kept))

    def _build(self, kept: Kept) -> tuple[Any, str]:
        """The object, and why there is none or "". May run in a thread."""
        try:
            if kept.snapshot is not None:
                return self._loaded_from(kept, kept.snapshot), ""
            if kept.reader is None:
                return None, "nothing of it is kept here"
            return self._as_here(kept, bound(self._driver, kept.reader.build)), ""
        except Exception as error:
            log.warning("the standby of %s cannot be loaded", kept.follow.server, exc_info=error)
            return None, f"{wire.exception_name(error)}: {error}"

    def _loaded(self, backup: Backup, obj: Any, reason: str) -> None:
        driver = self._driver
        host = None
        if not reason:
            spec = spec_of(type(obj))
            ref = RefObject(backup.server, spec.class_info, driver)
            host = Hosted(obj, spec, ref, driver)
            host.by_value = backup.follow.by_value
        driver.core.standbys.backup_loaded(backup, host, reason, driver.now_ms())
        driver.flush()

    # ------------------------------------------------------------------ rows

    def configure(self, server: ServerId, row: Row, rev: int) -> None:
        """See `Port.configure`."""
        told = self._driver.core.standbys.configured
        self._driver._task_now(self._swap(server, row, rev, told), f"standbys of {server}")

    def promote(self, server: ServerId, row: Row, rev: int) -> None:
        """See `Port.promote`."""
        told = self._driver.core.standbys.promoted
        self._driver._task_now(self._swap(server, row, rev, told), f"promotion of {server}")

    async def _swap(self, server: ServerId, row: Row, rev: int, told: Any) -> None:
        driver = self._driver
        try:
            result = await driver.rows.swap(row, rev)
        except Exception as error:  # the core waits for exactly one result
            log.exception("swap of %s failed", server)
            result = SwapResult(SwapOutcome.UNKNOWN, None, 0, str(error))
        driver._soon(lambda: told(server, row, result, driver.now_ms()))

    def read_standby_row(self, server: ServerId) -> None:
        """See `Port.read_standby_row`."""
        self._driver._task_now(self._read_row(server), f"row of {server}")

    async def _read_row(self, server: ServerId) -> None:
        driver = self._driver
        read = RowRead(False, None, 0)
        try:
            read = RowRead(True, *await driver.rows.read(server))
        except (DirectoryError, MigrateError) as error:
            log.debug("reading the row of %s failed: %s", server, error)
        driver._soon(lambda: driver.core.standbys.standby_row(server, read, driver.now_ms()))

    # ------------------------------------------------------------------ a new owner, and a former

    def begin(self, inc: Incarnation, hook: str) -> None:
        """See `Port.begin`."""
        driver = self._driver
        moved = Moved(inc.id, driver.node, inc.row.epoch, failover=True)
        for peer in {peer.id for peer in driver.peers.links.peers()}:
            # Whoever waits for the former owner, which may be silent, looks here from now on.
            driver.send(peer, moved)
        driver.begin_serving(inc, hook)

    def deposed(self, inc: Incarnation, cause: str) -> None:
        """See `Port.deposed`."""
        host: Hosted = inc.host  # type: ignore[assignment]
        log.warning("node %s is no longer the owner of %s: %s", self._driver.node, inc.id, cause)
        self._driver.host.cancel(host)


class _Nothing:
    """What a move to a standby takes for a writer: the standby has all."""

    def last(self) -> list[Piece]:
        return [bytes([_UNCHANGED])]

    def close(self) -> None:
        """There is nothing to release."""


class _Last:
    """What a move to a standby takes for a reader."""

    def __init__(self, streams: StandbyStreams, kept: Kept) -> None:
        self._streams = streams
        self._kept = kept
        reader = kept.reader
        self.taken_bytes = reader.taken_bytes if reader is not None else len(kept.snapshot or b"")

    def last(self, chunk: Sequence[memoryview]) -> object:
        """The object.

        Raises:
            LoadFailed: It is damaged, or something that it needs is missing here.
        """
        kept = self._kept
        if sum(map(len, chunk)) != 1 or chunk[-1][0] != _UNCHANGED:
            # One that had only snapshots so far begins with the last part.
            limit = self._streams.limit_bytes
            return (kept.reader or StreamReader(limit)).last(chunk)
        if kept.snapshot is not None:
            return self._streams._loaded_from(kept, kept.snapshot)
        if kept.reader is None:
            raise LoadFailed("nothing of it is kept here")
        return kept.reader.build()


def _joined(state: bytes | Gathered) -> bytes | memoryview:
    return state.joined() if isinstance(state, Gathered) else state


def _first_byte(state: bytes | Gathered) -> int:
    return state.parts[0][0] if isinstance(state, Gathered) else state[0]


def _in_parts(pieces: list[Piece]) -> bytes:
    if sum(map(len, pieces)) <= BULK_BYTES:
        return b"".join(pieces)
    return cast(bytes, Gathered(merged(pieces)))
