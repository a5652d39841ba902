"""Pre-copy in the move's machine: rounds of chunks ahead of the quiescent point."""

from __future__ import annotations

from typing import Any

import pytest

from migrate.core.actions import (
    CopyAhead,
    DecodeState,
    EncodeState,
    Finish,
    Quiesce,
    Result,
    Resume,
    TakeChunk,
    Tell,
)
from migrate.core.events import (
    Checked,
    Copied,
    DecodeFailed,
    Encoded,
    NodeDead,
    PeerUp,
    Quiesced,
    Taken,
    TimerFired,
)
from migrate.core.messages import (
    Abort,
    Chunk,
    ChunkTaken,
    Final,
    FinalFailed,
    Prepare,
    Prepared,
)
from migrate.core.move import SourceMove, SourcePhase, TargetMove, TargetPhase, answer_unknown
from tests.core.fakes import SERVER, TIMES, A, B, row

T = "t1"


def source_move(version: int = 1) -> SourceMove:
    made = SourceMove(
        node=A, target=B, row=row(epoch=7), rev=3, transfer=T, by_value=False, python="",
        times=TIMES,
    )  # fmt: skip
    made.start(0)
    return made


def target_move() -> TargetMove:
    prepare = Prepare(T, SERVER, 7, "Cls", 1, False, "")
    made = TargetMove(node=B, source=A, prepare=prepare, times=TIMES)
    made.start(0)
    made.handle(Checked(1), 0)
    assert made.phase is TargetPhase.RESERVED
    return made


def did(actions: list[Any], kind: type) -> list[Any]:
    return [action for action in actions if type(action) is kind]


def said(actions: list[Any]) -> list[Any]:
    return [action.message for action in actions if isinstance(action, Tell)]


def rounds(sizes: list[int], ms_per_round: int) -> SourceMove:
    """A source that sent rounds of these sizes, one chunk each, until it stopped by itself."""
    source = source_move()
    now = 0
    actions = source.handle(Prepared(T, 1, True), now)
    for number, size in enumerate(sizes):
        if not did(actions, CopyAhead):
            break
        now += ms_per_round
        sent = source.handle(Copied(b"x" * size, True), now)
        assert said(sent) == [Chunk(T, number, b"x" * size)]
        actions = source.handle(ChunkTaken(T, number), now)
    assert did(actions, Quiesce), "it has not stopped"
    return source


def test_a_target_that_takes_no_chunks_gets_everything_at_once() -> None:
    actions = source_move().handle(Prepared(T, 1), 0)
    assert did(actions, Quiesce) and not did(actions, CopyAhead)


def test_a_target_with_a_newer_class_gets_everything_at_once() -> None:
    actions = source_move().handle(Prepared(T, 2, True), 0)
    assert did(actions, Quiesce) and not did(actions, CopyAhead)


def test_a_state_of_which_nothing_goes_ahead_is_quiesced_without_a_message() -> None:
    source = source_move()
    source.handle(Prepared(T, 1, True), 0)
    actions = source.handle(Copied(b"", True), 1)
    assert did(actions, Quiesce) and not said(actions)
    assert did(source.handle(Quiesced(), 2), EncodeState) == [EncodeState(1, False)]
    assert said(source.handle(Encoded(b"s"), 3)) == [Final(T, SERVER, 7, b"s", 0)]


def test_chunks_leave_one_at_a_time_and_the_final_state_says_how_many_there_were() -> None:
    source = source_move()
    source.handle(Prepared(T, 1, True), 0)
    assert said(source.handle(Copied(b"one", False), 1)) == [Chunk(T, 0, b"one")]
    assert source.handle(Copied(b"early", False), 1) == []
    assert did(source.handle(ChunkTaken(T, 0), 2), CopyAhead)
    assert source.handle(ChunkTaken(T, 0), 2) == [], "a repeat"
    assert said(source.handle(Copied(b"two", True), 3)) == [Chunk(T, 1, b"two")]
    source.handle(ChunkTaken(T, 1), 3)
    source.handle(Copied(b"", True), 4)
    assert source.phase is SourcePhase.QUIESCING
    assert did(source.handle(Quiesced(), 5), EncodeState) == [EncodeState(1, True)]
    assert said(source.handle(Encoded(b"s"), 6)) == [Final(T, SERVER, 7, b"s", 2)]
    assert (source.rounds, source.copied_bytes) == (2, 6)


def test_rounds_go_on_while_they_shrink() -> None:
    source = rounds([1_000_000, 100_000, 10_000, 1_000, 100], ms_per_round=100)
    assert source.rounds == 4, "about 2,800 bytes in a millisecond, and 2 ms are not worth a round"


def test_rounds_end_when_a_writer_is_faster_than_the_wire() -> None:
    assert rounds([1_000_000, 990_000, 980_000], ms_per_round=100).rounds == 2


def test_rounds_are_bounded_however_they_shrink() -> None:
    sizes = [int(1e9 * 0.69**number) for number in range(20)]
    source = source_move()
    source._times = TIMES
    assert TIMES.rounds_max == 8
    now, actions = 0, source.handle(Prepared(T, 1, True), 0)
    for number, size in enumerate(sizes):
        if not did(actions, CopyAhead):
            break
        now += 100_000
        # Sizes alone matter here, so the bytes need not be made.
        source.handle(Copied(_Sized(size), True), now)
        actions = source.handle(ChunkTaken(T, number), now)
    assert source.rounds == 8 and source.phase is SourcePhase.QUIESCING


class _Sized(bytes):
    size = 0

    def __new__(cls, size: int) -> _Sized:
        made = super().__new__(cls, b"x")
        made.size = size
        return made

    def __len__(self) -> int:
        return self.size


def test_a_copy_that_fails_is_followed_by_a_plain_move() -> None:
    source = source_move()
    source.handle(Prepared(T, 1, True), 0)
    source.handle(Copied(b"one", False), 1)
    source.handle(ChunkTaken(T, 0), 2)
    assert did(source.handle(Copied(b"", True, failed=True), 3), Quiesce)
    assert did(source.handle(Quiesced(), 4), EncodeState) == [EncodeState(1, False)]
    assert said(source.handle(Encoded(b"all"), 5)) == [Final(T, SERVER, 7, b"all", 0)]


def test_a_chunk_is_repeated_when_the_link_comes_back_and_taken_once() -> None:
    source, target = source_move(), target_move()
    source.handle(Prepared(T, 1, True), 0)
    source.handle(Copied(b"one", False), 1)
    (again,) = said(source.handle(PeerUp(B), 2))
    assert again == Chunk(T, 0, b"one")
    assert did(target.handle(again, 2), TakeChunk) == [TakeChunk(0, b"one")]
    assert target.handle(again, 2) == [], "it is being installed"
    assert said(target.handle(Taken(), 3)) == [ChunkTaken(T, 0)]
    assert said(target.handle(again, 4)) == [ChunkTaken(T, 0)]
    assert said(target.handle(PeerUp(A), 5)) == [ChunkTaken(T, 0)]
    assert target.handle(Chunk(T, 5, b"far ahead"), 6) == []


@pytest.mark.parametrize("chunks", [2, 1])
def test_a_final_state_without_all_of_its_chunks_is_refused(chunks: int) -> None:
    target = target_move()
    target.handle(Chunk(T, 0, b"one"), 0)
    if chunks == 2:
        target.handle(Taken(), 0)
    actions = target.handle(Final(T, SERVER, 7, b"s", chunks), 1)
    (failed,) = said(actions)
    assert isinstance(failed, FinalFailed) and "chunks" in failed.reason
    assert not did(actions, DecodeState) and target.phase is TargetPhase.ENDED


def test_a_final_state_that_is_all_needs_no_chunks() -> None:
    target = target_move()
    target.handle(Chunk(T, 0, b"one"), 0)
    target.handle(Taken(), 0)
    actions = target.handle(Final(T, SERVER, 7, b"s"), 1)
    assert did(actions, DecodeState) == [DecodeState(b"s", 8, False)]


def test_a_chunk_that_cannot_be_installed_ends_the_move_and_the_server_never_stopped() -> None:
    source, target = source_move(), target_move()
    source.handle(Prepared(T, 1, True), 0)
    (chunk,) = said(source.handle(Copied(b"one", False), 1))
    target.handle(chunk, 2)
    (failed,) = said(target.handle(DecodeFailed("too large"), 3))
    actions = source.handle(failed, 4)
    assert not did(actions, Resume)
    (finish,) = did(actions, Finish)
    assert finish.result is Result.ROLLED_BACK and "too large" in finish.reason


def test_losing_the_target_between_chunks_leaves_the_server_serving() -> None:
    source = source_move()
    source.handle(Prepared(T, 1, True), 0)
    source.handle(Copied(b"one", False), 1)
    actions = source.handle(NodeDead(B), 2)
    assert said(actions) == [Abort(T)] and not did(actions, Resume)
    assert source.handle(ChunkTaken(T, 0), 3) == [] and source.handle(Copied(b"x", True), 3) == []


def test_a_chunk_without_answer_ends_the_move_in_time() -> None:
    source = source_move()
    source.handle(Prepared(T, 1, True), 0)
    source.handle(Copied(b"one", False), 1)
    source.handle(TimerFired(), TIMES.step_ms)
    assert source.phase is SourcePhase.COPYING
    (finish,) = did(source.handle(TimerFired(), TIMES.step_ms + 1), Finish)
    assert "did not answer" in finish.reason


def test_chunks_keep_a_reservation_alive() -> None:
    target = target_move()
    now = 0
    for number in range(5):
        now += TIMES.reserve_ms - 1
        target.handle(Chunk(T, number, b"c"), now)
        target.handle(Taken(), now)
        target.handle(TimerFired(), now)
        assert target.phase is TargetPhase.RESERVED
    target.handle(TimerFired(), now + TIMES.reserve_ms)
    assert target.phase is TargetPhase.ENDED


def test_strangers_are_told_that_the_move_is_not_known() -> None:
    assert isinstance(answer_unknown(Chunk(T, 0, b"")), FinalFailed)
    assert answer_unknown(ChunkTaken(T, 0)) == Abort(T)
