"""Pre-copy in the shell: a state sent ahead in chunks while its server serves.

The core decides when a round is worth it; here the rounds are made, from `serializers.stream`, and
taken. A step of a round runs on the loop at a quiescent point and takes about STEP_S, so that the
server, and all others of the node, get their turn between two steps.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from migrate.core.actions import TakeChunk
from migrate.core.events import Copied, DecodeFailed, Taken
from migrate.core.ids import NodeId, TransferId
from migrate.core.incarnation import Incarnation, Phase
from migrate.ref import loading_runtime
from migrate.shell import wire
from migrate.shell.peers import BULK_BYTES
from rpc import shared_memory
from rpc.frames import Gathered
from serializers.stream import Piece, StreamReader, StreamWriter, is_small

if TYPE_CHECKING:
    from migrate.shell.driver import Driver
    from migrate.shell.host import Hosted

log: Final = logging.getLogger("migrate")

STEP_S: Final = 0.002
"""How long a step of a round holds the loop, as long as a run of plain handlers may (`TURN_S`)."""

T = TypeVar("T")


class Over(Exception):
    """What the chunks were for has ended meanwhile."""


async def when_quiet(
    driver: Driver,
    inc: Incarnation,
    work: Callable[[], T],
    *,
    goes_on: Callable[[], bool],
    moving: TransferId = "",
) -> T:
    """Do something at a quiescent point of a server, between two messages.

    Args:
        driver: Of its node.
        inc: The server.
        work: What to do.
        goes_on: Whether it is still to be done.
        moving: The move that it is for, if it is for one.

    Raises:
        Over: It is not to be done, or cannot be: the server is not here any more.
    """
    core = driver.core
    if not goes_on():
        raise Over
    if inc.phase is Phase.RUNNING and inc.quiet():
        return work()
    waiting = driver.loop.create_future()
    if not core.quiesce(inc.id, waiting, driver.now_ms(), moving=moving):
        raise Over
    driver.flush()
    try:
        found = await waiting
    except asyncio.CancelledError:
        if waiting.cancelled():
            core.do_not_quiesce(inc.id, waiting)
            driver.go_on_handing_out(inc.id)
        elif waiting.result() is not None:
            driver.go_on(*waiting.result())
        raise
    if found is None:
        raise Over
    try:
        return work()
    finally:
        driver.go_on(*found)


async def next_chunk(
    quietly: Callable[[Callable[[], Any]], Awaitable[Any]],
    step: Callable[[], tuple[list[Piece], bool]],
    chunk_bytes: int,
    pieces: list[Piece],
) -> Copied:
    """Make a chunk of a round, in steps at quiescent points.

    Args:
        quietly: Does something at such a point.
        step: Makes some more; the pieces, and whether the round has ended.
        chunk_bytes: About how much to make.
        pieces: What the chunk has already.
    """
    ended = False
    size = 0
    while not ended and size < chunk_bytes:
        more, ended = await quietly(step)
        pieces += more
        size += sum(map(len, more))
        await asyncio.sleep(0)
    if size <= BULK_BYTES:
        return Copied(b"".join(pieces), ended)
    return Copied(cast(bytes, Gathered(merged(pieces))), ended)


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """The same bytes with the small pieces joined, so that there are few."""
    made: list[Piece] = []
    small: list[Piece] = []
    for piece in pieces:
        if len(piece) < BULK_BYTES:
            small.append(piece)
            continue
        if small:
            made.append(b"".join(small))
            small = []
        made.append(piece)
    if small:
        made.append(b"".join(small))
    return made


def new_writer(driver: Driver, host: Hosted, target: NodeId) -> StreamWriter:
    """A stream of a server's object for a node; what they can share is sent in shared memory."""
    shares = driver.peers.links.shares(target)
    return StreamWriter(host.obj, memory=shared_memory if shares else None)


def bound(driver: Driver, read: Callable[[], T]) -> T:
    """Read something, with the refs in it bound to this node."""
    token = loading_runtime.set(driver)
    try:
        return read()
    finally:
        loading_runtime.reset(token)


def parts_of(state: bytes | Gathered) -> Sequence[memoryview]:
    """A state in the parts that it came in."""
    return state.parts if isinstance(state, Gathered) else [memoryview(state)]


class Precopy:
    """The chunks of all moves from and to one node."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._writers: dict[TransferId, StreamWriter] = {}
        self._tasks: dict[TransferId, asyncio.Task[Any]] = {}
        self._readers: dict[TransferId, StreamReader] = {}

    # -- source

    def copy(self, transfer: TransferId) -> None:
        """Make the next chunk; the core is told."""
        driver = self._driver
        source = driver.core.moves_out.get(transfer)
        inc = driver.core.hosted.get(source.server) if source is not None else None
        if inc is None:
            return
        host: Hosted = inc.host  # type: ignore[assignment]
        least = driver.options.precopy_bytes_min
        known = 0 <= host.state_bytes < least or least > driver.options.state_bytes_max
        if transfer not in self._writers and (known or is_small(host.obj)):
            driver.move_event(transfer, False, Copied(b"", True))
            return
        self._tasks[transfer] = driver.task(self._copy(transfer, inc), f"pre-copy of {inc.id}")

    async def _copy(self, transfer: TransferId, inc: Incarnation) -> None:
        try:
            event = await self._next_chunk(transfer, inc)
        except Over:
            return
        except Exception:
            # The final capture will say what is wrong with the state, if anything is.
            log.warning("the state of %s cannot be sent ahead of its move", inc.id, exc_info=True)
            self._close(transfer)
            event = Copied(b"", True, failed=True)
        self._driver.move_event(transfer, False, event)

    async def _next_chunk(self, transfer: TransferId, inc: Incarnation) -> Copied:
        driver = self._driver
        pieces: list[Piece] = []
        writer = self._writers.get(transfer)

        def quietly(work: Callable[[], T]) -> Awaitable[T]:
            goes_on = driver.core.moves_out.__contains__
            return when_quiet(driver, inc, work, goes_on=lambda: goes_on(transfer), moving=transfer)

        if writer is None:
            host: Hosted = inc.host  # type: ignore[assignment]
            writer = self._writers[transfer] = new_writer(
                driver, host, driver.core.moves_out[transfer].target
            )
            pieces += await quietly(writer.look)
            if not writer.is_worth_it:
                self._close(transfer)
                return Copied(b"", True)
        made = await next_chunk(
            quietly, lambda: self._step(transfer), driver.options.chunk_bytes, pieces
        )
        if made.round_ended:
            round_bytes = writer.round_bytes
            log.info("pre-copy of %s: round %d sent %d bytes", inc.id, writer.rounds, round_bytes)
            driver.round_ended(transfer, round_bytes)
        return made

    def _step(self, transfer: TransferId) -> tuple[list[Piece], bool]:
        writer = self._writers.get(transfer)
        if writer is None:
            raise Over
        return writer.step(STEP_S, self._driver.options.chunk_bytes)

    def last(self, transfer: TransferId) -> list[Piece]:
        """What the chunks do not have, of a frozen server; may run in a thread.

        Raises:
            NotSerializable: Something cannot travel; names the path to it.
        """
        return self._writers[transfer].last()

    # -- target

    def take(self, transfer: TransferId, chunk: TakeChunk) -> None:
        """Install a chunk; the core is told."""
        if chunk.number == 0:
            limit = self._driver.options.state_bytes_max
            self._readers[transfer] = StreamReader(limit)
        self._driver.task(self._take(transfer, chunk), f"chunk {chunk.number} of {transfer}")

    async def _take(self, transfer: TransferId, chunk: TakeChunk) -> None:
        reader = self._readers.get(transfer)
        if reader is None:
            return
        event: Taken | DecodeFailed = Taken()
        try:
            await asyncio.to_thread(self._bound, reader.take, parts_of(chunk.state))
        except Exception as error:
            log.debug("chunk %d of %s failed", chunk.number, transfer, exc_info=error)
            event = DecodeFailed(f"{wire.exception_name(error)}: {error}")
        # Else the move is over, or has begun anew by a Prepare that came late.
        if self._readers.get(transfer) is reader:
            self._driver.move_event(transfer, True, event)

    def load(self, transfer: TransferId, chunk: Sequence[memoryview]) -> tuple[Any, int]:
        """The object, from the last chunk of its stream, and the bytes that it took in all.

        Raises:
            LoadFailed: It is damaged, or something that it needs is missing here.
        """
        reader = self._readers[transfer]
        obj = self._bound(reader.last, chunk)
        return obj, reader.taken_bytes + sum(map(len, chunk))

    def _bound(self, read: Callable[[Any], T], data: Any) -> T:
        return bound(self._driver, lambda: read(data))

    # -- moves to a standby

    def go_on_writing(self, transfer: TransferId, writer: StreamWriter) -> None:
        """The target has as a standby what a stream has brought there so far."""
        self._writers[transfer] = writer

    def go_on_reading(self, transfer: TransferId, reader: StreamReader) -> None:
        """The same, at the target."""
        self._readers[transfer] = reader

    # -- ends

    def ended(self, transfer: TransferId, incoming: bool) -> None:
        """The move is over, or goes on without what was sent ahead."""
        if incoming:
            self._readers.pop(transfer, None)
            return
        task = self._tasks.pop(transfer, None)
        if task is not None:
            task.cancel()
        self._close(transfer)

    def _close(self, transfer: TransferId) -> None:
        writer = self._writers.pop(transfer, None)
        if writer is not None:
            writer.close()
