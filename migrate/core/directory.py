"""Rules of a server's row in the directory.

Theory of operation. A row says who owns a server, at which epoch, and how sure that is. It
changes only by compare-and-swap on its revision, and each change raises the epoch (but for
ACTIVE, which confirms the change before it). The transfer id is the nonce: whoever does not
know whether its swap took effect sends the same swap again, and if that is refused, reads:
its own transfer id in the row means success.

    ACTIVE(e, A) --commit--> COMMITTED(e+1, B, t) --confirm--> ACTIVE(e+1, B, t)
                                    |
                                    +--reclaim--> ACTIVE(e+2, A, t')
    any(e, X), X seen dead --bury--> LOST(e+1, X)

COMMITTED is the only state in which two swaps compete (the target's confirmation and the
source's reclaim); both compare the same revision, so one of them wins.
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


class Row(Struct, frozen=True, array_like=True):
    """One server's row.

    `methods` lets a ref be made for a class that cannot be imported. `previous` is the source
    of a COMMITTED row, which still holds a frozen copy: such a row is not buried while that
    node lives.
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


def committed(row: Row, target: NodeId, transfer: TransferId, version: int) -> Row:
    """The row after a move's commit: `target` owns, at the next epoch."""
    return structs.replace(
        row,
        epoch=row.epoch + 1,
        owner=target,
        state=RowState.COMMITTED,
        transfer=transfer,
        version=version,
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


def buried(row: Row, cause: str) -> Row:
    """The row of a server whose owner was seen dead with nothing to take over; nameless."""
    return structs.replace(row, epoch=row.epoch + 1, state=RowState.LOST, cause=cause, name="")
