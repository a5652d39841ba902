"""The two sides of one move, as transcripts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.core import directory
from migrate.core.actions import (
    CheckClass,
    DecodeState,
    DropCopy,
    EncodeState,
    Finish,
    GoLive,
    Quiesce,
    Reach,
    ReadRow,
    Release,
    Result,
    Resume,
    SetTimer,
    StartForwarding,
    SwapRow,
    Tell,
    WatchRow,
)
from migrate.core.directory import Row, RowState
from migrate.core.events import (
    Checked,
    Decoded,
    DecodeFailed,
    Encoded,
    EncodeFailed,
    NodeDead,
    PeerUp,
    Quiesced,
    RowRead,
    RowSeen,
    SwapOutcome,
    SwapResult,
    TimerFired,
    Withdraw,
)
from migrate.core.messages import (
    Abort,
    Activate,
    Activated,
    ActivateRefused,
    Dropped,
    Final,
    FinalFailed,
    Prepare,
    Prepared,
    PrepareRefused,
    Ready,
    Released,
)
from migrate.core.move import SourceMove, SourcePhase, TargetMove, TargetPhase, answer_unknown
from tests.core.fakes import SERVER, TIMES, A, B, row

T = "t1"
UNKNOWN = SwapResult(SwapOutcome.UNKNOWN, None, 0)
NOT_DONE = SwapResult(SwapOutcome.NOT_DONE, None, 0, "unreachable")


def source_move(phase: SourcePhase = SourcePhase.PREPARING, epoch: int = 7) -> SourceMove:
    """A source in `phase`, led there by the messages of a good move."""
    source = SourceMove(
        node=A,
        target=B,
        row=row(epoch=epoch),
        rev=3,
        transfer=T,
        by_value=False,
        python="",
        times=TIMES,
    )
    source.start(0)
    committed = SwapResult(SwapOutcome.DONE, None, 4)
    if phase is SourcePhase.COPYING:
        source.handle(Prepared(T, 1, True), 0)
        return source
    for event in (Prepared(T, 1), Quiesced(), Encoded(b"s"), Ready(T), committed, Activated(T)):
        if source.phase is phase:
            break
        source.handle(event, 0)
    if phase is SourcePhase.RECLAIMING:
        source = source_move(SourcePhase.COMMITTED, epoch)
        source.handle(ActivateRefused(T), 0)
    assert source.phase is phase
    return source


def committed_row(epoch: int = 7, **more: Any) -> Row:
    return row(epoch=epoch + 1, owner=B, state=RowState.COMMITTED, transfer=T, previous=A, **more)


def target_move(phase: TargetPhase = TargetPhase.CHECKING) -> TargetMove:
    target = TargetMove(
        node=B, source=A, prepare=Prepare(T, SERVER, 7, "Cls", 1, False, ""), times=TIMES
    )
    target.start(0)
    for event in (
        Checked(1),
        Final(T, SERVER, 7, b"s"),
        Decoded(),
        Activate(T, committed_row(), 4),
    ):
        if target.phase is phase:
            break
        target.handle(event, 0)
    assert target.phase is phase
    return target


def kinds(actions: list[Any]) -> list[type]:
    return [type(action) for action in actions]


def only(actions: list[Any], kind: type) -> Any:
    found = [action for action in actions if type(action) is kind]
    assert len(found) == 1, actions
    return found[0]


def said(actions: list[Any]) -> list[Any]:
    return [action.message for action in actions if isinstance(action, Tell)]


# -- failure before the commit: the source serves


@pytest.mark.parametrize("phase", [p for p in SourcePhase if p < SourcePhase.COMMITTING])
def test_losing_the_target_before_the_commit_leaves_the_server_at_the_source(
    phase: SourcePhase,
) -> None:
    actions = source_move(phase).handle(NodeDead(B), 0)
    assert only(actions, Finish).result is Result.ROLLED_BACK
    resumed = [a for a in actions if isinstance(a, Resume)]
    assert resumed == ([Resume(row(epoch=7), 3)] if phase >= SourcePhase.QUIESCING else [])
    assert said(actions) == [Abort(T)]


def test_a_refused_move_never_stops_the_server() -> None:
    actions = source_move().handle(PrepareRefused(T, "draining"), 0)
    assert actions == [Finish(Result.REFUSED, "draining")]


def test_a_state_that_cannot_be_pickled_resumes_the_server_and_says_which_attribute() -> None:
    failed = EncodeFailed("Cls.conn: a socket", "Cls.conn")
    actions = source_move(SourcePhase.ENCODING).handle(failed, 0)
    assert only(actions, Resume).row == row(epoch=7)
    assert only(actions, Finish) == Finish(Result.NOT_PICKLABLE, "Cls.conn: a socket")


def test_a_state_that_cannot_be_unpickled_resumes_the_server() -> None:
    actions = source_move(SourcePhase.SHIPPING).handle(FinalFailed(T, "no module"), 0)
    assert kinds(actions) == [Tell, Resume, Finish]
    assert "no module" in only(actions, Finish).reason


@pytest.mark.parametrize(
    "phase", [SourcePhase.PREPARING, SourcePhase.COPYING, SourcePhase.QUIESCING]
)
def test_a_step_that_takes_too_long_rolls_back(phase: SourcePhase) -> None:
    actions = source_move(phase).handle(TimerFired(), 10_000)
    assert only(actions, Finish).result is Result.ROLLED_BACK


def test_a_handler_that_runs_on_is_named_as_the_reason() -> None:
    actions = source_move(SourcePhase.QUIESCING).handle(TimerFired(), 10_000)
    assert "handler" in only(actions, Finish).reason


def test_a_directory_that_cannot_be_reached_rolls_the_first_swap_back() -> None:
    actions = source_move(SourcePhase.COMMITTING).handle(NOT_DONE, 0)
    assert kinds(actions) == [Tell, Resume, Finish]


# -- the commit, in doubt


def test_an_unknown_swap_is_asked_again_and_serves_nothing_meanwhile() -> None:
    source = source_move(SourcePhase.COMMITTING)
    assert kinds(source.handle(UNKNOWN, 0)) == [SetTimer]
    again = source.handle(TimerFired(), 0)
    assert only(again, SwapRow) == SwapRow(committed_row(), 3)


def test_not_done_after_unknown_is_no_reason_to_roll_back() -> None:
    source = source_move(SourcePhase.COMMITTING)
    source.handle(UNKNOWN, 0)
    source.handle(TimerFired(), 0)
    assert kinds(source.handle(NOT_DONE, 0)) == [SetTimer]
    assert source.phase is SourcePhase.COMMITTING


def test_a_slow_directory_is_not_asked_a_second_time_before_it_has_answered() -> None:
    source = source_move(SourcePhase.COMMITTING)
    assert kinds(source.handle(TimerFired(), 10_000)) == [SetTimer]
    # So a swap that surely was not done is the only one, and rolling back is safe.
    assert Resume in kinds(source.handle(NOT_DONE, 10_000))


def test_a_refusal_with_the_wanted_row_means_that_an_earlier_copy_won() -> None:
    source = source_move(SourcePhase.COMMITTING)
    actions = source.handle(SwapResult(SwapOutcome.REFUSED, committed_row(), 4), 0)
    assert source.phase is SourcePhase.COMMITTED
    assert only(actions, StartForwarding) == StartForwarding(B, 8)


def test_a_target_that_confirmed_already_makes_the_source_drop_its_copy() -> None:
    source = source_move(SourcePhase.COMMITTING)
    confirmed = directory.confirmed(committed_row())
    actions = source.handle(SwapResult(SwapOutcome.REFUSED, confirmed, 5), 0)
    assert StartForwarding in kinds(actions) and DropCopy in kinds(actions)
    assert said(actions) == [Dropped(T)]


def test_a_target_that_confirmed_and_was_buried_is_nowhere_to_forward_to() -> None:
    source = source_move(SourcePhase.COMMITTING)
    buried = directory.buried(directory.confirmed(committed_row()), "died")
    actions = source.handle(SwapResult(SwapOutcome.REFUSED, buried, 6), 0)
    assert StartForwarding not in kinds(actions)
    assert only(actions, Finish).result is Result.FENCED


def test_our_own_late_confirmation_is_no_fence() -> None:
    source = source_move(SourcePhase.COMMITTING)
    mine = row(epoch=7, transfer="earlier")
    actions = source.handle(SwapResult(SwapOutcome.REFUSED, mine, 9), 0)
    assert only(actions, SwapRow).rev == 9
    assert DropCopy not in kinds(actions)


def test_a_newer_epoch_of_somebody_else_fences_the_source() -> None:
    source = source_move(SourcePhase.COMMITTING)
    other = row(epoch=9, owner="d@1")
    actions = source.handle(SwapResult(SwapOutcome.REFUSED, other, 9), 0)
    assert only(actions, Finish).result is Result.FENCED
    assert DropCopy in kinds(actions)


# -- the commit, heard of from the target


@pytest.mark.parametrize("answers", [[], [UNKNOWN]], ids=["not answered", "in doubt"])
def test_a_target_that_lives_proves_the_commit_before_the_directory_has_answered(
    answers: list[SwapResult],
) -> None:
    source = source_move(SourcePhase.COMMITTING)
    for answer in answers:
        source.handle(answer, 0)
    actions = source.handle(Activated(T), 1)
    assert kinds(actions)[1:4] == [StartForwarding, DropCopy, Reach]
    assert only(actions, StartForwarding) == StartForwarding(B, 8)
    assert said(actions) == [Dropped(T)]
    # It said so, and says it again; no answer to what is still asked changes that.
    for late in (SwapResult(SwapOutcome.DONE, committed_row(), 4), UNKNOWN, NOT_DONE):
        assert source.handle(late, 2) == []
    assert said(source.handle(TimerFired(), 3)) == [Dropped(T)]
    assert source.handle(ActivateRefused(T), 4) == []
    assert source.handle(Released(T), 5) == [Finish(Result.MOVED)]


def test_what_a_dead_target_said_before_does_not_keep_the_source_from_taking_the_server_back() -> (
    None
):
    source = source_move(SourcePhase.COMMITTING)
    source.handle(NodeDead(B), 0)
    assert source.handle(Activated(T), 1) == []
    actions = source.handle(SwapResult(SwapOutcome.DONE, committed_row(), 4), 2)
    assert only(actions, SwapRow).row.owner == A
    assert source.phase is SourcePhase.RECLAIMING


@pytest.mark.parametrize("phase", [p for p in SourcePhase if p < SourcePhase.COMMITTING])
def test_before_the_commit_was_asked_for_nobody_can_be_alive(phase: SourcePhase) -> None:
    source = source_move(phase)
    assert source.handle(Activated(T), 1) == []
    assert source.phase is phase


# -- after the commit


def test_a_silent_target_is_reclaimed_at_the_epoch_after_the_commit() -> None:
    source = source_move(SourcePhase.COMMITTED)
    actions = source.handle(TimerFired(), 10_000)
    swap = only(actions, SwapRow)
    assert (swap.row.owner, swap.row.epoch, swap.row.state, swap.rev) == (A, 9, RowState.ACTIVE, 4)
    done = source.handle(SwapResult(SwapOutcome.DONE, swap.row, 5), 10_001)
    assert only(done, Resume) == Resume(swap.row, 5)


def test_a_refused_reclaim_means_that_the_target_serves() -> None:
    source = source_move(SourcePhase.COMMITTED)
    source.handle(ActivateRefused(T), 0)
    confirmed = directory.confirmed(committed_row())
    actions = source.handle(SwapResult(SwapOutcome.REFUSED, confirmed, 5), 0)
    assert DropCopy in kinds(actions) and Resume not in kinds(actions)


def test_an_unknown_reclaim_is_asked_again() -> None:
    source = source_move(SourcePhase.COMMITTED)
    swap = only(source.handle(ActivateRefused(T), 0), SwapRow)
    assert kinds(source.handle(UNKNOWN, 0)) == [SetTimer]
    assert only(source.handle(TimerFired(), 0), SwapRow) == swap


def test_the_frozen_copy_is_dropped_only_when_the_target_lives() -> None:
    source = source_move(SourcePhase.COMMITTED)
    for event in (PeerUp(B), TimerFired(), Ready(T), Prepared(T, 1)):
        assert DropCopy not in kinds(source.handle(event, 1))
    actions = source.handle(Activated(T), 1)
    assert DropCopy in kinds(actions)
    assert said(actions) == [Dropped(T)]


def test_a_whole_move_as_its_source_sees_it() -> None:
    source = SourceMove(
        node=A, target=B, row=row(epoch=7), rev=3, transfer=T, by_value=False, python="",
        times=TIMES,
    )  # fmt: skip
    assert Prepare in [type(m) for m in said(source.start(0))]
    assert Quiesce in kinds(source.handle(Prepared(T, 1), 1))
    assert only(source.handle(Quiesced(), 2), EncodeState) == EncodeState(1)
    assert said(source.handle(Encoded(b"s"), 3)) == [Final(T, SERVER, 7, b"s")]
    assert only(source.handle(Ready(T), 4), SwapRow) == SwapRow(committed_row(), 3)
    done = source.handle(SwapResult(SwapOutcome.DONE, committed_row(), 4), 5)
    assert said(done) == [Activate(T, committed_row(), 4)]
    assert said(source.handle(Activated(T), 6)) == [Dropped(T)]
    assert source.handle(Released(T), 7) == [Finish(Result.MOVED)]
    assert source.handle(Activated(T), 8) == []


# -- the target


def test_an_older_class_is_refused_before_the_source_stops() -> None:
    target = TargetMove(
        node=B, source=A, prepare=Prepare(T, SERVER, 7, "Cls", 2, False, ""), times=TIMES
    )
    assert only(target.start(0), CheckClass).cls == "Cls"
    actions = target.handle(Checked(1), 0)
    assert "older" in said(actions)[0].reason
    assert target.phase is TargetPhase.ENDED


def test_a_copy_that_cannot_be_decoded_is_dropped_and_reported() -> None:
    actions = target_move(TargetPhase.DECODING).handle(DecodeFailed("no module"), 0)
    assert kinds(actions) == [DropCopy, Tell, Finish]
    assert said(actions) == [FinalFailed(T, "no module")]


def test_a_live_target_releases_when_the_source_has_dropped_its_copy() -> None:
    target = target_move(TargetPhase.LIVE)
    assert Release not in kinds(target.handle(TimerFired(), 0))
    actions = target.handle(Dropped(T), 1)
    assert only(actions, Release) == Release(0)
    assert said(actions) == [Released(T)]


def test_a_target_whose_source_is_silent_confirms_in_the_directory_before_it_releases() -> None:
    target = target_move(TargetPhase.LIVE)
    assert only(target.handle(TimerFired(), 10_000), ReadRow) == ReadRow()
    asked = target.handle(RowRead(True, committed_row(), 4), 10_001)
    assert only(asked, SwapRow) == SwapRow(directory.confirmed(committed_row()), 4)
    assert Release not in kinds(asked)
    actions = target.handle(SwapResult(SwapOutcome.DONE, None, 5), 10_002)
    assert only(actions, Release) == Release(5)


def test_a_target_that_lost_to_a_reclaim_drops_its_copy() -> None:
    target = target_move(TargetPhase.LIVE)
    back = row(epoch=9, transfer=T + "/back")
    actions = target.handle(SwapResult(SwapOutcome.REFUSED, back, 6), 0)
    assert kinds(actions) == [DropCopy, Finish]


def test_a_row_read_before_the_commit_says_nothing_to_a_live_target() -> None:
    target = target_move(TargetPhase.LIVE)
    assert kinds(target.handle(RowRead(True, row(epoch=7), 3), 0)) == [SetTimer]
    assert target.phase is TargetPhase.LIVE


def test_a_ready_target_goes_live_by_the_row_alone() -> None:
    target = target_move(TargetPhase.READY)
    actions = target.handle(RowRead(True, committed_row(), 4), 0)
    assert only(actions, GoLive) == GoLive(committed_row(), 4)


def test_a_target_watches_the_row_from_before_the_server_stands_still() -> None:
    target = target_move(TargetPhase.CHECKING)
    assert kinds(target.handle(Checked(1), 0)) == [Tell, WatchRow, SetTimer]
    target.handle(Final(T, SERVER, 7, b"s"), 0)
    assert WatchRow not in kinds(target.handle(Decoded(), 0))
    # What it sees may be lost like anything else, so it reads the row, too.
    assert kinds(target.handle(TimerFired(), TIMES.confirm_ms)) == [Tell, ReadRow, SetTimer]


def test_a_target_that_sees_the_commit_lives_before_it_is_told_and_says_so() -> None:
    target = target_move(TargetPhase.READY)
    actions = target.handle(RowSeen(committed_row(), 4), 0)
    assert only(actions, GoLive) == GoLive(committed_row(), 4)
    assert said(actions) == [Activated(T)]
    assert Release not in kinds(actions)
    # Told of it after all, in either order.
    assert said(target.handle(Activate(T, committed_row(), 4), 1)) == [Activated(T)]
    released = target.handle(Dropped(T), 2)
    assert kinds(released) == [Release, Tell, Reach, Finish]


@pytest.mark.parametrize(
    "seen",
    [
        row(epoch=7),
        row(epoch=8, owner=B, state=RowState.COMMITTED, transfer="another", previous=A),
        row(epoch=9, transfer=T + "/back"),
        directory.buried(row(epoch=7), "died"),
    ],
    ids=["not yet", "another move", "taken back", "lost"],
)
def test_a_row_that_is_seen_decides_nothing_but_that_a_commit_took_effect(seen: Row) -> None:
    target = target_move(TargetPhase.READY)
    assert target.handle(RowSeen(seen, 5), 0) == []
    assert target.phase is TargetPhase.READY


@pytest.mark.parametrize(
    "phase", [p for p in TargetPhase if p not in (TargetPhase.READY, TargetPhase.ENDED)]
)
def test_a_commit_that_is_seen_late_or_early_is_no_news(phase: TargetPhase) -> None:
    target = target_move(phase)
    assert target.handle(RowSeen(committed_row(), 4), 0) == []
    assert target.phase is phase


def test_a_ready_target_waits_while_the_row_still_names_the_source() -> None:
    target = target_move(TargetPhase.READY)
    assert kinds(target.handle(NodeDead(A), 0)) == [ReadRow]
    assert kinds(target.handle(RowRead(True, row(epoch=7), 3), 0)) == [SetTimer]


def test_an_abort_before_it_lives_ends_the_target() -> None:
    assert kinds(target_move(TargetPhase.READY).handle(Abort(T), 0)) == [DropCopy, Finish]


def test_an_abort_of_a_live_target_is_checked_with_the_row() -> None:
    assert target_move(TargetPhase.LIVE).handle(Abort(T), 0) == [ReadRow()]


def test_an_activate_that_contradicts_itself_is_dropped() -> None:
    target = target_move(TargetPhase.READY)
    assert target.handle(Activate(T, row(epoch=8, owner="d@1"), 4), 0) == []


def test_a_whole_move_as_its_target_sees_it() -> None:
    target = target_move()
    assert said(target.handle(Checked(1), 0)) == [Prepared(T, 1, True)]
    assert only(target.handle(Final(T, SERVER, 7, b"s"), 1), DecodeState) == DecodeState(b"s", 8)
    assert said(target.handle(Decoded(), 2)) == [Ready(T)]
    assert said(target.handle(Activate(T, committed_row(), 4), 3)) == [Activated(T)]
    released = target.handle(Dropped(T), 4)
    assert said(released) == [Released(T)]
    assert only(released, Finish) == Finish(Result.MOVED)
    assert target.handle(TimerFired(), 5_000) == []


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (Final(T, SERVER, 7, b""), FinalFailed),
        (Activate(T, committed_row(), 4), ActivateRefused),
        (Dropped(T), Released),
        (Prepared(T, 1), Abort),
        (Ready(T), type(None)),
        (Activated(T), type(None)),
    ],
)
def test_an_unknown_transfer_is_answered_so_that_the_other_side_can_end(
    message: Any, answer: type
) -> None:
    assert type(answer_unknown(message)) is answer


# -- any sequence of events

ROWS = st.sampled_from(
    [
        None,
        row(epoch=7),
        committed_row(),
        directory.confirmed(committed_row()),
        row(epoch=9, transfer=T + "/back"),
        directory.buried(committed_row(), "died"),
    ]
)
ANSWERS = st.builds(SwapResult, st.sampled_from(SwapOutcome), ROWS, st.integers(1, 9))
SOURCE_EVENTS = st.one_of(
    st.sampled_from(
        [
            Prepared(T, 1),
            PrepareRefused(T, "no"),
            Quiesced(),
            Encoded(b"s"),
            EncodeFailed("no"),
            Ready(T),
            FinalFailed(T, "no"),
            Activated(T),
            ActivateRefused(T),
            Released(T),
            PeerUp(B),
            NodeDead(B),
            TimerFired(),
            Withdraw("closing"),
        ]
    ),
    ANSWERS,
)
TARGET_EVENTS = st.one_of(
    st.sampled_from(
        [
            Checked(1),
            Checked(0),
            Checked(1, "no"),
            Prepare(T, SERVER, 7, "Cls", 1, False, ""),
            Final(T, SERVER, 7, b"s"),
            Decoded(),
            DecodeFailed("no"),
            Activate(T, committed_row(), 4),
            Dropped(T),
            Abort(T),
            PeerUp(A),
            NodeDead(A),
            TimerFired(),
            Withdraw("closing"),
        ]
    ),
    ANSWERS,
    st.builds(RowRead, st.booleans(), ROWS, st.integers(1, 9)),
    st.builds(RowSeen, ROWS.filter(lambda seen: seen is not None), st.integers(1, 9)),
)
STEPS = st.integers(0, 60)


@given(st.lists(st.tuples(SOURCE_EVENTS, STEPS), max_size=40), st.sampled_from(SourcePhase))
def test_a_source_takes_any_events_and_ends_at_most_once(
    events: list[tuple[Any, int]], phase: SourcePhase
) -> None:
    source = source_move(phase) if phase is not SourcePhase.ENDED else source_move()
    now = 0
    actions: list[Any] = []
    asking = source.phase in (SourcePhase.COMMITTING, SourcePhase.RECLAIMING)
    if source.phase is SourcePhase.RELEASING:
        actions.append(DropCopy())
    for event, step in events:
        now += step
        if isinstance(event, SwapResult) and not asking:
            continue  # every swap has exactly one result
        before = source.phase
        more = source.handle(event, now)
        swaps = [a for a in more if isinstance(a, SwapRow)]
        if isinstance(event, SwapResult):
            asking = False
        assert not (asking and swaps), "a second swap before the first was answered"
        asking = asking or bool(swaps)
        assert before is not SourcePhase.ENDED or more == []
        actions += more
    assert kinds(actions).count(Finish) <= 1
    # The copy is taken up again or given up, never both, never twice.
    assert kinds(actions).count(Resume) + kinds(actions).count(DropCopy) <= 1


@given(st.lists(st.tuples(TARGET_EVENTS, STEPS), max_size=40), st.sampled_from(TargetPhase))
def test_a_target_takes_any_events_and_releases_or_drops(
    events: list[tuple[Any, int]], phase: TargetPhase
) -> None:
    target = target_move(phase) if phase is not TargetPhase.ENDED else target_move()
    now = 0
    actions: list[Any] = []
    for event, step in events:
        now += step
        before = target.phase
        more = target.handle(event, now)
        assert before is not TargetPhase.ENDED or [a for a in more if type(a) is not SetTimer] == []
        actions += more
    assert kinds(actions).count(Finish) <= 1
    assert kinds(actions).count(GoLive) <= 1
    assert kinds(actions).count(Release) + kinds(actions).count(DropCopy) <= 1
