"""Rules of a server's row in the directory.

Theory of operation. A row says who owns a server, at which epoch, and how sure that is. It
changes only by compare-and-swap on its revision, and each change raises the epoch (but for
ACTIVE, which confirms the change before it). The transfer id is the nonce: whoever does not
know whether its swap took effect sends the same swap again, and if that is refused, reads:
its own transfer id in the row means success.

    ACTIVE(e, A) --commit--> COMMITTED(e+1, B, t) --confirm--> ACTIVE(e+1, B, t)
                                    |
                                    +--reclaim--> ACTIVE(e+2, A, t')
    ACTIVE(e, A, standbys) --configure--> ACTIVE(e+1, A, other standbys)
    any(e, A, standbys B...), A suspected --promote--> ACTIVE(e+1, B, standbys without B)
    any(e, X), X seen dead, no standby left --bury--> LOST(e+1, X)
    LOST(e, X) or no row --restore--> ACTIVE(e', Y), a new generation
    ACTIVE(e, A) --replace--> ACTIVE(e+1, A), a new generation

COMMITTED is the only state in which two swaps compete (the target's confirmation and the
source's reclaim); both compare the same revision, so one of them wins.

Generations. A server that comes back from a checkpoint has gone back in time, which begins a new
generation, named by the epoch at which it began; 0 is the first. So whoever knows a server at an
epoch below its generation knows it as it was before, and any other epoch is of this generation. A
row that is restored where there is none (the server was stopped) gets an epoch above every one it
ever had: each epoch was written by a transaction of its own, so none exceeds the directory's
revision.
"""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta, Struct, structs

from migrate.core.ids import NodeId, ServerId, TransferId

EPOCH_MAX = 1 << 62
"""No row that is read has an epoch as high, so that the next one can still be written."""


class RowState(enum.IntEnum):
    """How sure the owner in a row is."""

    ACTIVE = 0
    COMMITTED = 1
    LOST = 2


class Mode(enum.IntEnum):
    """When what a server lets out leaves: see `core/standby.py`."""

    SYNC = 0  # once every standby has acknowledged what it depends on
    ASYNC = 1  # at once


class Rollback(Struct, frozen=True, array_like=True):
    """The server went back in time: at epoch `generation` it became what it was at `then_s`.

    Times are seconds since 1970 UTC, as told to users; nothing is decided by them.
    """

    generation: int
    then_s: float
    now_s: float


ROLLBACKS_MAX = 16
"""Roll-backs that a row tells apart; of more, the two oldest are told as one."""


class Row(Struct, frozen=True, array_like=True):
    """One server's row.

    `methods` lets a ref be made for a class that cannot be imported. `previous` is the source
    of a COMMITTED row, which still holds a frozen copy: such a row is not buried while that
    node lives. `standbys` are the configuration: any of them has all that was ever let out, so each
    may take over (`mode` ASYNC: but for the last of it). `journal` is the one that has it too.
    """

    server: ServerId
    epoch: Annotated[int, Meta(ge=0, lt=EPOCH_MAX)]
    owner: NodeId
    state: RowState
    transfer: TransferId
    name: str
    cls: str
    version: int
    methods: tuple[str, ...] = ()
    generation: int = 0
    standbys: tuple[NodeId, ...] = ()
    cause: str = ""
    previous: NodeId = ""
    rollbacks: tuple[Rollback, ...] = ()
    mode: Mode = Mode.SYNC
    journal: str = ""


def committed(row: Row, target: NodeId, transfer: TransferId, version: int) -> Row:
    """The row after a move's commit: `target` owns, at the next epoch, and stands by no more.

    The journal stays named: it has all that was let out, until the target's own takes its place.
    """
    return structs.replace(
        row,
        epoch=row.epoch + 1,
        owner=target,
        state=RowState.COMMITTED,
        transfer=transfer,
        version=version,
        standbys=tuple(standby for standby in row.standbys if standby != target),
    )


def confirmed(row: Row) -> Row:
    """The row after the target's confirmation: no reclaim can win any more."""
    return structs.replace(row, state=RowState.ACTIVE)


def reclaimed(row: Row, source: NodeId, transfer: TransferId, version: int) -> Row:
    """The row after the source took the server back, or re-asserted its own ownership."""
    return structs.replace(
        row,
        epoch=row.epoch + 1,
        owner=source,
        state=RowState.ACTIVE,
        transfer=transfer,
        version=version,
    )


def configured(
    row: Row, standbys: tuple[NodeId, ...], mode: Mode, journal: str, transfer: TransferId
) -> Row:
    """The row after its owner changed who stands by."""
    return structs.replace(
        row,
        epoch=row.epoch + 1,
        standbys=standbys,
        mode=mode,
        journal=journal,
        state=RowState.ACTIVE,
        transfer=transfer,
    )


def reopened(row: Row, node: NodeId, transfer: TransferId, version: int) -> Row:
    """The row after a node has opened the journal that the row names.

    The journal stays the one that is named: the same file goes on, so that there is no moment at
    which the row names nobody who has the server.
    """
    return structs.replace(
        row,
        epoch=row.epoch + 1,
        owner=node,
        state=RowState.ACTIVE,
        transfer=transfer,
        version=version,
        standbys=tuple(standby for standby in row.standbys if standby != node),
        previous="",
    )


def promoted(
    row: Row,
    node: NodeId,
    transfer: TransferId,
    version: int,
    then_s: float,
    now_s: float,
) -> Row:
    """The row after a standby has taken over from an owner that is dead, or suspected.

    Args:
        row: As it was read.
        node: The standby.
        transfer: Nonce of this change.
        version: State version of the class at `node`.
        then_s: Of a standby in mode ASYNC, when the last of what it has was made; what its owner
            let out after that is gone, so a new generation begins. In seconds since 1970.
        now_s: Now, in seconds since 1970.
    """
    epoch = row.epoch + 1
    after = structs.replace(
        row,
        epoch=epoch,
        owner=node,
        state=RowState.ACTIVE,
        transfer=transfer,
        version=version,
        standbys=tuple(standby for standby in row.standbys if standby != node),
        previous="",
    )
    if row.mode is not Mode.ASYNC:
        return after
    kept = _kept(row.rollbacks, Rollback(epoch, then_s, now_s))
    # Its journal may be ahead of what the server has gone back to.
    return structs.replace(after, generation=epoch, rollbacks=kept, journal="")


def given_back(row: Row, transfer: TransferId) -> Row:
    """The row of a move whose target has nothing of the server, and whose source is dead."""
    return structs.replace(
        row,
        epoch=row.epoch + 1,
        owner=row.previous,
        previous="",
        state=RowState.ACTIVE,
        transfer=transfer,
    )


def without_standby(row: Row, standby: NodeId, transfer: TransferId) -> Row:
    """The row of a dead owner after a standby said that it cannot take over."""
    left = tuple(node for node in row.standbys if node != standby)
    return structs.replace(row, epoch=row.epoch + 1, standbys=left, transfer=transfer)


def _kept(earlier: tuple[Rollback, ...], last: Rollback) -> tuple[Rollback, ...]:
    # What goes further back than an earlier one says all that one said.
    kept = [rollback for rollback in earlier if rollback.then_s < last.then_s]
    kept.append(last)
    if len(kept) > ROLLBACKS_MAX:
        first, second = kept[:2]
        kept[:2] = [Rollback(second.generation, first.then_s, second.now_s)]
    return tuple(kept)


def buried(row: Row, cause: str) -> Row:
    """The row of a server whose owner was seen dead with nothing to take over; nameless."""
    return structs.replace(row, epoch=row.epoch + 1, state=RowState.LOST, cause=cause, name="")


def restored(
    *,
    known: Row | None,
    rev_max: int,
    checkpoint: Row,
    owner: NodeId,
    transfer: TransferId,
    name: str,
    version: int,
    methods: tuple[str, ...],
    then_s: float,
    now_s: float,
    cause: str,
) -> Row:
    """The row of a server that comes back from a checkpoint: a new generation.

    Args:
        known: Its row as it is, LOST or its owner's own; None if there is none (any more).
        rev_max: The directory's revision, not below that of `known`.
        checkpoint: What the checkpoint says of it: id, class, epoch, earlier roll-backs.
        owner: Who will own it.
        transfer: Nonce of this change.
        name: Its name from now on; empty: none.
        version: State version of the class at `owner`.
        methods: Methods of the class at `owner`.
        then_s: When the checkpoint was taken, in seconds since 1970.
        now_s: Now, in seconds since 1970.
        cause: For people.
    """
    # NB: the checkpoint's epoch counts too: it may come from another directory.
    before = known.epoch if known is not None else rev_max
    epoch = max(before, checkpoint.epoch) + 1
    earlier = known.rollbacks if known is not None else checkpoint.rollbacks
    return Row(
        server=checkpoint.server,
        epoch=epoch,
        owner=owner,
        state=RowState.ACTIVE,
        transfer=transfer,
        name=name,
        cls=checkpoint.cls,
        version=version,
        methods=methods,
        generation=epoch,
        cause=cause,
        rollbacks=_kept(earlier, Rollback(epoch, then_s, now_s)),
    )


def news_of(row: Row, generation: int) -> Rollback:
    """What a sender is told that knows the server as it was at epoch `generation`.

    Returns:
        Today's generation, the time that the state fell back to since, and the last roll-back's.
    """
    since = [rollback for rollback in row.rollbacks if rollback.generation > generation]
    if not since:
        return Rollback(row.generation, 0.0, 0.0)
    # Their times rise: the first of them is the furthest back.
    return Rollback(row.generation, since[0].then_s, since[-1].now_s)


def encode_news(news: Rollback) -> bytes:
    """The payload of a ROLLED_BACK reply."""
    return f"{news.generation} {news.then_s!r} {news.now_s!r}".encode()


def decode_news(payload: bytes) -> Rollback:
    """What a ROLLED_BACK reply says; zeros where a peer's bytes say nothing sensible."""
    try:
        generation, then_s, now_s = payload[:100].decode("ascii").split(" ")
        return Rollback(max(0, int(generation)), float(then_s), float(now_s))
    except ValueError:
        return Rollback(0, 0.0, 0.0)
