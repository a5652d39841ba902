"""The rules of a row."""

from __future__ import annotations

from migrate.core import directory
from migrate.core.directory import RowState
from migrate.core.ids import node_name, session_born_ms, session_id, session_sender
from tests.core.fakes import A, B, row


def test_each_change_of_owner_raises_the_epoch_and_a_confirmation_does_not() -> None:
    start = row(epoch=4)
    committed = directory.committed(start, B, "t", 2)
    assert (committed.epoch, committed.owner, committed.state) == (5, B, RowState.COMMITTED)
    confirmed = directory.confirmed(committed)
    assert (confirmed.epoch, confirmed.owner, confirmed.state) == (5, B, RowState.ACTIVE)
    back = directory.reclaimed(committed, A, "t/back", 1)
    assert (back.epoch, back.owner, back.state) == (6, A, RowState.ACTIVE)


def test_a_buried_row_frees_its_name_and_keeps_its_cause() -> None:
    buried = directory.buried(row(epoch=4), "its node died")
    assert (buried.epoch, buried.state, buried.name) == (5, RowState.LOST, "")
    assert buried.cause == "its node died"


def test_ids_give_back_what_they_were_made_of() -> None:
    sid = session_id("a|strange|sender", 123, 7)
    assert session_sender(sid) == "a|strange|sender"
    assert session_born_ms(sid) == 123
    assert node_name("n@5") == "n"
