"""Journals with one mechanism taken away at a time. For the failing controls only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from msgspec import structs

from migrate.core import directory
from migrate.core.directory import Row
from migrate.core.ids import NodeId, TransferId
from migrate.core.incarnation import Incarnation
from migrate.core.standby import Backup, Claim, Leftover, Logged, Standbys
from migrate.shell.journal_format import BadJournal, Found, Kind
from tests.controls.standbys_off import node_with
from tests.sim.journals import JournalNode, Log


class NotSynced(JournalNode):
    """What waits for the journal leaves as soon as it is told what there is to write; a file is
    named by the row when it is safe.
    """

    def journal(self, inc: Incarnation, message: Logged) -> None:
        super().journal(inc, message)
        if message.stream == inc.row.journal:
            self.later(0, self._journaled, inc.id, message.stream, message.number, "")


class TailNotCut(JournalNode):
    """A journal that ends in the middle of a record is refused."""

    def found(self, data: bytes) -> Found:
        found = super().found(data)
        if found.torn_bytes:
            raise BadJournal("damaged", "its last record is not as it was written")
        return found


class CutTooFar(JournalNode):
    """With the torn tail goes the record before it."""

    def found(self, data: bytes) -> Found:
        found = super().found(data)
        if found.torn_bytes and len(found.records) > 1:
            return dataclasses.replace(found, records=found.records[:-1])
        return found


class NamedTooSoon(JournalNode):
    """A new file takes the place of the former one before its first cut is safe."""

    class log_class(Log):
        def append(
            self,
            kind: Kind,
            number: int,
            record: bytes,
            state: bytes,
            whole: bool,
            told: Callable[[str], None],
        ) -> None:
            super().append(kind, number, record, state, whole, told)
            if whole:
                self.disk.rename(self.name, self.file)
                self.disk.sync_names()


class _OpenedWithoutSwap(Standbys):
    def _swap(self, backup: Backup, claim: Claim) -> None:
        row = claim.row
        if not backup.journal or row is None:
            super()._swap(backup, claim)
            return
        row = directory.reopened(row, self.core.node, "opened", backup.version)
        self._live(backup, claim, row, claim.rev, backup.heard_ms)


class _StaleOpened(Standbys):
    def leftover(
        self, row: Row | None, journal: TransferId, writer: NodeId, *, first: bool
    ) -> Leftover:
        return Leftover.OPEN if row is not None and first else Leftover.USELESS

    def _claim_journal(self, backup: Backup, claim: Claim, row: Row | None, rev: int) -> None:
        if row is not None:
            row = structs.replace(row, journal=backup.stream)
        super()._claim_journal(backup, claim, row, rev)


class _NotNamed(Standbys):
    def take_on(self, inc: Incarnation, now_ms: int, opened: TransferId = "") -> None:
        super().take_on(inc, now_ms, opened)
        for follower in inc.replica.followers.values() if inc.replica is not None else ():
            follower.unnamed = False


class _NotCutAnew(Standbys):
    def take_on(self, inc: Incarnation, now_ms: int, opened: TransferId = "") -> None:
        super().take_on(inc, now_ms, opened)
        if inc.replica is not None and opened:
            follower = inc.replica.followers[opened]
            follower.configured = False
            self._acknowledged(inc, inc.replica, now_ms)


OpenedWithoutSwap = node_with(_OpenedWithoutSwap, JournalNode)
"""Who has read a journal goes on with its server without asking the directory."""

StaleOpened = node_with(_StaleOpened, JournalNode)
"""A journal is opened whether the row names it or not."""

NotNamed = node_with(_NotNamed, JournalNode)
"""A new owner lets things out when its journal has them, and the row names the former owner's."""

NotCutAnew = node_with(_NotCutAnew, JournalNode)
"""Who has opened a journal does not wait for a whole cut of its own."""


__all__ = [
    "CutTooFar",
    "NamedTooSoon",
    "NotCutAnew",
    "NotNamed",
    "NotSynced",
    "OpenedWithoutSwap",
    "StaleOpened",
    "TailNotCut",
]
