"""Going back in time: quiescent points kept, generations, and who is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.core import directory
from migrate.core.actions import EncodeState, Finish, Result
from migrate.core.delivery import NEVER, Entry
from migrate.core.directory import Rollback, Row, RowState
from migrate.core.ids import EPOCH_SHIFT, session_id
from migrate.core.incarnation import (
    Incarnation,
    Phase,
)
from migrate.core.messages import (
    CALL,
    CAST,
    OK,
    ROLLED_BACK,
    STOPPED,
    Acked,
    Activated,
    Envelope,
    Moved,
    Prepared,
    Receipt,
    Reply,
)
from migrate.core.node import Core
from migrate.core.records import CheckpointRecord
from tests.core.fakes import (
    CLIENT,
    NOW,
    SERVER,
    TRANSFER,
    A,
    B,
    C,
    Port,
    committed_move,
    core,
    env,
    frozen_move,
    host,
    out,
    ready_target,
    row,
)


def taken(at: Core, inc: Incarnation, now_ms: int = NOW) -> CheckpointRecord:
    """What a checkpoint holds, by way of bytes."""
    data = msgspec.msgpack.encode(at.checkpoint(inc, now_ms))
    return msgspec.msgpack.decode(data, type=CheckpointRecord)


def back(known: Row | None, owner: str = A, then_s: float = 100.0, **more: Any) -> Row:
    """The row of the server after it was restored."""
    return directory.restored(
        known=known,
        rev_max=more.pop("rev_max", 0),
        checkpoint=more.pop("checkpoint", row()),
        owner=owner,
        transfer="restored",
        name="",
        version=1,
        methods=(),
        then_s=then_s,
        now_s=more.pop("now_s", 200.0),
        cause="restored",
    )


def restored(
    at: Core, record: CheckpointRecord, new: Row | None = None, now_ms: int = NOW, **more: Any
) -> Incarnation:
    """A server that came back, and serves."""
    new = new or back(row(state=RowState.LOST, epoch=4))
    inc = at.restored(new, 9, 100, False, object(), record, now_ms, **more)
    at.started(new.server, now_ms)
    return inc


NOTHING = CheckpointRecord(0, [], [], [], {}, [])


def finish(at: Core, inc: Incarnation, entry: Entry, now_ms: int = NOW) -> None:
    """End the stay at a quiescent point."""
    at.finish(inc, entry, OK, None, None, now_ms)


# -- the rules of a row


@pytest.mark.parametrize(
    ("known", "rev_max", "checkpointed", "epoch"),
    [
        (row(state=RowState.LOST, epoch=7), 0, 3, 8),
        (row(epoch=7), 0, 3, 8),
        (None, 40, 3, 41),  # it was stopped: every epoch it had is at most the revision
        (None, 40, 60, 61),  # a checkpoint from another directory
        (row(state=RowState.LOST, epoch=7), 0, 90, 91),
    ],
)
def test_a_restored_row_begins_a_generation_above_every_epoch_there_was(
    known: Row | None, rev_max: int, checkpointed: int, epoch: int
) -> None:
    new = back(known, B, rev_max=rev_max, checkpoint=row(epoch=checkpointed))
    assert (new.epoch, new.generation, new.owner, new.state) == (epoch, epoch, B, RowState.ACTIVE)
    # What follows keeps it.
    moved = directory.committed(new, A, "t", 1)
    assert (moved.generation, moved.rollbacks) == (epoch, new.rollbacks)


def test_who_knew_the_server_earlier_is_told_of_the_furthest_time_since() -> None:
    first = back(row(epoch=4), then_s=50.0, now_s=100.0)  # generation 5
    second = back(first, then_s=90.0, now_s=200.0)  # generation 6
    assert directory.news_of(second, 4) == Rollback(6, 50.0, 200.0)
    assert directory.news_of(second, 5) == Rollback(6, 90.0, 200.0)
    third = back(second, then_s=40.0, now_s=300.0)  # further back than both
    assert [r.then_s for r in third.rollbacks] == [40.0]
    assert directory.news_of(third, 4) == directory.news_of(third, 6) == Rollback(7, 40.0, 300.0)


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=40))
def test_a_row_tells_at_least_as_far_back_as_was_gone_and_stays_small(times: list[float]) -> None:
    now: Row | None = row(epoch=1)
    known = [1]
    for then_s in times:
        now = back(now, then_s=then_s)
        known.append(now.epoch)
        assert len(now.rollbacks) <= directory.ROLLBACKS_MAX
    assert now is not None
    for index, epoch in enumerate(known[:-1]):
        news = directory.news_of(now, epoch)
        assert news.generation == now.generation
        assert news.then_s <= min(times[index:])
        if len(times) <= directory.ROLLBACKS_MAX:
            assert news.then_s == min(times[index:])


@given(st.binary(max_size=200))
def test_news_from_a_peer_that_lies_are_no_news(payload: bytes) -> None:
    news = directory.decode_news(payload)
    assert news.generation >= 0
    assert directory.decode_news(directory.encode_news(Rollback(3, 1.5, 2.5))) == Rollback(
        3, 1.5, 2.5
    )


# -- the sender


def called(at: Core, port: Port, token: str, now_ms: int = NOW, **more: Any) -> Envelope:
    """Make a request of the server at B, and take what leaves for it."""
    at.route_hint(SERVER, B, more.pop("epoch", 1))
    at.request(at.own, SERVER, out(token=token, **more), now_ms)
    (sent,) = [message for _, message in port.take() if isinstance(message, Envelope)]
    return sent


NEWS = directory.encode_news(Rollback(7, 100.0, 200.0))


def test_a_sender_is_told_once_and_goes_on_under_a_new_session() -> None:
    at, port = core()
    first = called(at, port, "before")
    assert first.generation == 1
    at.receive(B, [Reply(first.session, 1, OK, b"")], NOW)
    late = called(at, port, "told")
    assert (late.session, late.seq, late.generation) == (first.session, 2, 1)
    at.receive(B, [Reply(late.session, 2, ROLLED_BACK, NEWS)], NOW)
    assert port.resolved[-1] == ("told", ROLLED_BACK, NEWS)
    fresh = called(at, port, "after")
    assert fresh.session != first.session
    assert (fresh.seq, fresh.generation) == (1, 7)
    # A second answer of the same kind is about nobody.
    at.receive(B, [Reply(late.session, 2, ROLLED_BACK, NEWS)], NOW)
    assert len(port.resolved) == 2


def test_all_that_was_asked_before_the_news_gets_them_also_what_waited_for_its_number() -> None:
    at, port = core(window=2)
    at.route_hint(SERVER, B, 1)
    for token in "abc":
        at.request(at.own, SERVER, out(token=token), NOW)
    chained = out(token="d", chain=(f"{SERVER}/1",))
    at.request(at.own, SERVER, chained, NOW)
    session = port.of(Envelope)[0].session
    at.receive(B, [Reply(session, 1, ROLLED_BACK, NEWS)], NOW)
    assert sorted(str(token) for token, status, _ in port.resolved if status == ROLLED_BACK) == [
        "a",
        "b",
        "c",
        "d",
    ]
    assert at.sending == {}


def test_a_cast_gets_the_news_too() -> None:
    at, port = core()
    sent = called(at, port, "cast", kind=CAST)
    at.receive(B, [Reply(sent.session, 1, ROLLED_BACK, NEWS)], NOW)
    assert port.resolved == [("cast", ROLLED_BACK, NEWS)]


def test_a_sender_whose_session_is_over_still_gets_the_news() -> None:
    at, port = core(session_expiry_ms=10_000)
    first = called(at, port, "before")
    at.receive(B, [Reply(first.session, 1, OK, b"")], NOW)
    at.tick(NOW + 9_000)  # the idle session is closed, and the route forgotten
    at.tick(NOW + 18_000)
    assert at.sending == {} and at.routes == {}
    # It looks the server up again, and finds it in its new generation.
    port.take()
    again = called(at, port, "told", NOW + 18_000, epoch=9)
    assert (again.seq, again.generation) == (1, 1)


def test_one_who_never_met_the_server_is_told_nothing() -> None:
    at, port = core()
    at.request(at.own, SERVER, out(token="first"), NOW)
    assert port.looked == [SERVER]
    at.located(SERVER, True, row(epoch=9, owner=B, generation=7), NOW)
    (sent,) = port.of(Envelope)
    assert sent.generation == 9


def test_lost_and_back_again_is_told_at_the_next_call() -> None:
    at, port = core()
    sent = called(at, port, "lost")
    at.node_dead(B, NOW)
    at.located(SERVER, True, row(epoch=2, owner=B, state=RowState.LOST, cause="died"), NOW)
    assert sent.generation == 1 and at.sending == {}
    at.request(at.own, SERVER, out(token="told"), NOW)
    port.take()
    at.located(SERVER, True, row(epoch=3, owner=C, generation=3), NOW)
    (again,) = port.of(Envelope)
    assert again.generation == 1


def test_what_a_sender_knows_of_generations_moves_with_it() -> None:
    at, _ = core()
    inc = host(at)
    at.route_hint("other", B, 3)
    at.request(inc.sender, "other", out(), NOW)
    inc.sender.remember("third", 5)
    there, _ = core(B)
    copy = ready_target(there, at)
    assert copy.sender.met == {"third": 5}
    assert copy.sender.sessions["other"].generation == 3


def test_memory_of_generations_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrate.core.delivery.MET_MAX", 3)
    at, _ = core()
    for n in range(10):
        at.own.remember(f"s{n}", n)
    assert list(at.own.met) == ["s7", "s8", "s9"]


def test_a_local_sender_is_told_like_any_other() -> None:
    at, port = core()
    host(at)
    at.request(at.own, SERVER, out(token="before"), NOW)
    record = taken(at, at.hosted[SERVER])
    restored(at, record, back(at.hosted[SERVER].row))
    for token in ("told", "after"):
        at.request(at.own, SERVER, out(token=token), NOW)
    assert [(token, status) for token, status, _ in port.resolved] == [
        ("before", OK),
        ("told", ROLLED_BACK),
        ("after", OK),
    ]
    assert directory.decode_news(port.resolved[1][2]) == Rollback(2, 100.0, 200.0)


# -- what comes back


def test_casts_and_timers_come_back_and_calls_do_not() -> None:
    at, port = core()
    inc = host(at, timers=[("tick", 1000)])
    port.busy = True
    sent = [env(1), env(2, kind=CAST), env(3), env(4, kind=CAST)]
    at.receive(CLIENT, sent, NOW)
    record = taken(at, inc, NOW + 400)
    there, log = core(B)
    again = restored(there, record, now_ms=NOW + 9_000)
    assert log.ran == ["m2", "m4"]
    assert again.sessions == {}
    there.tick(NOW + 9_599)
    assert log.ran == ["m2", "m4"]
    there.tick(NOW + 9_600)
    assert log.ran == ["m2", "m4", "tick"]


def test_a_tick_that_waited_in_the_mailbox_comes_back_once() -> None:
    at, port = core()
    inc = host(at, timers=[("tick", 1000)])
    port.busy = True
    at.receive(CLIENT, [env(1)], NOW)
    at.tick(NOW + 2_500)
    record = taken(at, inc, NOW + 2_600)
    for fork in (False, True):
        there, log = core(B)
        restored(there, record, fork=fork, now_ms=NOW + 9_000)
        assert log.ran == ["tick"]
        there.tick(NOW + 9_400)
        assert log.ran == ["tick", "tick"]


def test_a_fork_has_neither_mailbox_nor_memory_nor_plans() -> None:
    at, port = core()
    inc = host(at, timers=[("tick", 1000)])
    inc.sender.remember("other", 3)
    assert at.plan(SERVER, "file:///x", 60_000, 2, NOW)
    port.busy = True
    at.receive(CLIENT, [env(1), env(2, kind=CAST)], NOW)
    twin = row(server="twin", owner=B)
    there, log = core(B)
    clone = restored(there, taken(at, inc), twin, fork=True)
    assert (list(clone.mailbox), clone.sender.met, clone.plans) == ([], {}, {})
    assert log.ran == [] and list(clone.timers) == ["tick"]


def test_requests_of_its_own_that_nobody_acknowledged_are_dropped_and_told() -> None:
    at, _ = core()
    inc = host(at)
    at.route_hint("other", B, 1)
    for kind in (CALL, CAST):
        at.request(inc.sender, "other", out("pay", kind), NOW)
    record = taken(at, inc)
    assert [(d.server, d.kind, d.method) for d in record.dropped] == [
        ("other", CALL, "pay"),
        ("other", CAST, "pay"),
    ]
    there, log = core(C)
    again = restored(there, record)
    assert again.sender.sessions == {} and log.of(Envelope) == []
    # It opens a new session with whoever it calls, of the generation that it has met.
    there.route_hint("other", B, 8)
    there.request(again.sender, "other", out(), NOW)
    (sent,) = log.of(Envelope)
    assert (sent.seq, sent.generation, sent.sender_epoch) == (1, 1, 5)


def test_a_replaced_server_tells_those_who_wait_and_closes_its_own_sessions() -> None:
    at, port = core()
    inc = host(at)
    at.route_hint("other", B, 1)
    at.request(inc.sender, "other", out(), NOW)
    assert at.quiesce(SERVER, "token", NOW)
    ((_, entry),) = port.quiet
    at.receive(CLIENT, [env(1), env(2, kind=CAST), env(3)], NOW)
    record = taken(at, inc)
    port.take()
    new = back(inc.row)
    at.restored(new, 9, 100, False, object(), record, NOW)
    finish(at, inc, entry)
    at.started(SERVER, NOW)
    # The cast was acknowledged after the checkpoint's state was taken: its sender is told when it
    # speaks next. It is in the record here only because the record was taken later.
    assert [(m.seq, m.status) for m in port.of(Reply)] == [(1, ROLLED_BACK), (3, ROLLED_BACK)]
    assert [(node, m.final) for node, m in port.sent if isinstance(m, Acked)] == [(B, True)]
    assert at.hosted[SERVER] is not inc and port.ran == ["m2"]
    port.take()
    at.receive(CLIENT, [env(4, acked_below=4, generation=1)], NOW)
    assert [m.status for m in port.of(Reply)] == [ROLLED_BACK]


def test_what_left_from_here_and_is_restored_here_is_not_dropped_with_the_move() -> None:
    at, port = core()
    host(at)
    committed_move(at, port)  # the target serves, is lost, and nothing of that is known here
    restored(at, NOTHING, back(row(state=RowState.LOST, epoch=3, owner=B)))
    assert [action.result for action in port.did(Finish)] == [Result.FENCED]
    at.receive(B, [Activated(TRANSFER)], NOW)
    at.tick(NOW + 5_000)
    at.receive(CLIENT, [env(1, generation=4)], NOW + 5_000)
    assert port.ran == ["m1"] and at.leaving == {}


def test_a_superseded_copy_hands_out_nothing_and_its_timers_are_still() -> None:
    at, port = core()
    inc = host(at, timers=[("tick", 1000)])
    assert at.quiesce(SERVER, None, NOW)
    ((_, entry),) = port.quiet
    restored(at, NOTHING, back(inc.row))
    finish(at, inc, entry)
    at.receive(CLIENT, [env(1, generation=2)], NOW)
    at.tick(NOW + 5_000)
    assert port.ran == ["m1"] and port.began[0][0] is not inc


def test_who_remembers_the_stopped_server_passes_on_to_where_it_is_back() -> None:
    at, port = core()
    host(at)
    at.stop(SERVER, NOW)
    at.removed(SERVER, NOW)
    at.receive(CLIENT, [env(1)], NOW)
    assert [m.status for m in port.of(Reply)] == [STOPPED]
    at.receive(C, [Moved(SERVER, C, 1)], NOW)  # older than the stop
    assert SERVER in at.tombstones
    at.receive(C, [Moved(SERVER, C, 9)], NOW)
    port.take()
    at.receive(CLIENT, [env(2, generation=1)], NOW)
    assert [node for node, m in port.sent if isinstance(m, Envelope)] == [C]


def test_restored_where_it_was_stopped_it_serves() -> None:
    at, port = core()
    inc = host(at)
    record = taken(at, inc)
    at.stop(SERVER, NOW)
    at.removed(SERVER, NOW)
    restored(at, record, back(None, rev_max=12))
    at.receive(CLIENT, [env(1, generation=13)], NOW)
    assert port.ran == ["m1"]


def test_who_was_told_that_it_is_stopped_asks_the_directory_the_next_time() -> None:
    at, port = core()
    sent = called(at, port, "stopped")
    at.receive(B, [Reply(sent.session, 1, STOPPED, b"")], NOW)
    at.request(at.own, SERVER, out(token="again"), NOW)
    assert port.looked == [SERVER]


def test_sessions_of_a_former_generation_of_the_sender_end() -> None:
    at, _ = core(session_expiry_ms=10_000)
    inc = host(at)
    old = session_id("s", NOW, (2 << EPOCH_SHIFT) + 1)
    new = session_id("s", NOW, (7 << EPOCH_SHIFT) + 1)
    at.receive(B, [env(1, session=old, reply_to=B), env(1, session=new, reply_to=B)], NOW)
    at.tick(NOW + 11_000)
    at.senders_gone({"s": 7}, NOW + 11_000)
    assert list(inc.sessions) == [new]
    at.senders_gone({"s": NEVER}, NOW + 11_000)
    assert inc.sessions == {}


def test_while_its_row_is_swapped_a_server_admits_and_sends_nothing() -> None:
    at, port = core()
    inc = host(at)
    at.route_hint("other", B, 1)
    at.request(inc.sender, "other", out(), NOW)
    assert at.quiesce(SERVER, None, NOW)
    ((_, entry),) = port.quiet
    phase = at.begin_replacing(inc, NOW)
    port.take()
    at.receive(CLIENT, [env(1), env(2, kind=CAST)], NOW)
    at.tick(NOW + 5_000)
    assert port.take() == [] and inc.sessions == {}
    # Not replaced after all: what came meanwhile is admitted, what was unanswered is repeated.
    at.end_replacing(inc, phase, NOW + 5_000)
    assert [m.server for m in port.of(Envelope)] == ["other"]
    finish(at, inc, entry, NOW + 5_000)
    assert port.ran == ["m1", "m2"]


def test_what_comes_while_the_row_is_swapped_hears_of_the_new_generation() -> None:
    at, port = core()
    inc = host(at)
    assert at.quiesce(SERVER, None, NOW)
    ((_, entry),) = port.quiet
    at.begin_replacing(inc, NOW)
    at.receive(CLIENT, [env(1, generation=1), env(2, kind=CAST, generation=1)], NOW)
    restored(at, NOTHING, back(inc.row))
    finish(at, inc, entry)
    assert [m.status for m in port.of(Reply)] == [ROLLED_BACK, ROLLED_BACK]
    assert port.ran == [] and port.of(Receipt) == []


def test_a_move_that_waits_gives_way_to_a_replacement() -> None:
    at, port = core()
    inc = host(at)
    assert at.quiesce(SERVER, None, NOW)
    ((_, entry),) = port.quiet
    at.move(SERVER, B, TRANSFER, False, "", NOW)
    at.receive(B, [Prepared(TRANSFER, 1)], NOW)
    phase = at.begin_replacing(inc, NOW)
    (ended,) = port.did(Finish)
    assert ended.result is Result.ROLLED_BACK and "replaced" in ended.reason
    at.started(SERVER, NOW)  # the shell's word after the roll-back
    assert inc.phase is Phase.FROZEN
    at.receive(CLIENT, [env(1)], NOW)
    at.end_replacing(inc, phase, NOW)
    finish(at, inc, entry)
    assert inc.phase is Phase.RUNNING and port.ran == ["m1"]


def test_news_that_nobody_waits_for_are_told_with_the_next_request() -> None:
    at, port = core()
    sent = called(at, port, "cancelled")
    (session,) = at.sending.values()
    at.cancel(session, session.outstanding[1], NOW)
    at.receive(B, [Reply(sent.session, 1, ROLLED_BACK, NEWS)], NOW)
    assert port.resolved == []
    again = called(at, port, "told")
    assert again.session != sent.session and again.generation == 1
    at.receive(B, [Reply(again.session, 1, ROLLED_BACK, NEWS)], NOW)
    assert port.resolved == [("told", ROLLED_BACK, NEWS)]
    assert called(at, port, "after").generation == 7


# -- quiescent points


def test_it_comes_between_two_messages_before_those_that_wait() -> None:
    at, port = core()
    inc = host(at)
    port.busy = True
    at.receive(CLIENT, [env(1), env(2)], NOW)
    assert at.quiesce(SERVER, "token", NOW)
    assert port.quiet == []
    at.finish(inc, port.began[0][1], OK, b"", None, NOW)
    ((_, entry),) = port.quiet
    assert entry.args == "token" and port.ran == ["m1"]
    # Admitted meanwhile, and acknowledged, but not handed out.
    at.receive(CLIENT, [env(3, kind=CAST)], NOW)
    assert port.of(Receipt)[-1].admitted_below == 4 and port.ran == ["m1"]
    port.busy = False
    finish(at, inc, entry)
    assert port.ran == ["m1", "m2", "m3"]


def test_a_quiet_server_is_at_one_at_once_and_ticks_wait() -> None:
    at, port = core()
    inc = host(at, timers=[("tick", 1000)])
    assert at.quiesce(SERVER, None, NOW)
    ((_, entry),) = port.quiet
    at.tick(NOW + 3_000)
    assert port.ran == []
    finish(at, inc, entry, NOW + 3_000)
    assert port.ran == ["tick"]


def test_tasks_that_handlers_started_are_waited_for() -> None:
    at, port = core()
    inc = host(at)
    at.background(inc, 1, NOW)
    assert at.quiesce(SERVER, None, NOW)
    at.receive(CLIENT, [env(1)], NOW)
    assert port.quiet == [] and port.ran == []
    at.background(inc, -1, NOW)
    ((_, entry),) = port.quiet
    assert port.ran == []
    finish(at, inc, entry)
    assert port.ran == ["m1"]


def test_a_server_that_starts_is_waited_for() -> None:
    at, port = core()
    at.host(row(), 1, 100, False, object(), [], NOW)
    assert at.quiesce(SERVER, None, NOW)
    assert port.quiet == []
    at.started(SERVER, NOW)
    assert len(port.quiet) == 1


@pytest.mark.parametrize("waits", [False, True])
def test_a_move_waits_for_it_and_follows_it(waits: bool) -> None:
    at, port = core()
    inc = host(at)
    port.busy = waits
    if waits:
        at.receive(CLIENT, [env(1)], NOW)
    assert at.quiesce(SERVER, None, NOW)
    at.move(SERVER, B, TRANSFER, False, "", NOW)
    at.receive(B, [Prepared(TRANSFER, 1)], NOW)
    if waits:
        at.finish(inc, port.began[0][1], OK, b"", None, NOW)
    ((_, entry),) = port.quiet
    assert port.did(EncodeState) == []
    finish(at, inc, entry)
    assert len(port.did(EncodeState)) == 1
    assert at.freeze(TRANSFER, NOW) is inc


def test_a_move_that_gives_up_waiting_lets_nothing_be_handed_out_meanwhile() -> None:
    at, port = core()
    inc = host(at)
    assert at.quiesce(SERVER, None, NOW)
    ((_, entry),) = port.quiet
    at.move(SERVER, B, TRANSFER, False, "", NOW)
    at.receive(B, [Prepared(TRANSFER, 1)], NOW)
    at.receive(CLIENT, [env(1)], NOW)
    at.tick(NOW + 101)
    assert [action.result for action in port.did(Finish)] == [Result.ROLLED_BACK]
    at.started(SERVER, NOW + 101)
    assert inc.phase is Phase.RUNNING and port.ran == []
    finish(at, inc, entry, NOW + 102)
    assert port.ran == ["m1"]


def test_a_stop_waits_for_it() -> None:
    at, port = core()
    inc = host(at)
    assert at.quiesce(SERVER, None, NOW)
    ((_, entry),) = port.quiet
    assert at.stop(SERVER, NOW)
    assert port.ended == []
    finish(at, inc, entry)
    assert port.ended == [inc]


def test_who_asks_while_it_leaves_or_is_not_here_is_told_no() -> None:
    at, port = core()
    assert not at.quiesce(SERVER, None, NOW)
    host(at)
    frozen_move(at, port)
    assert not at.quiesce(SERVER, None, NOW)
    there, _ = core(B)
    ready_target(there, at)
    assert not there.quiesce(SERVER, None, NOW)


def test_a_wish_can_be_taken_back_and_what_waited_goes_on() -> None:
    at, port = core()
    inc = host(at)
    at.background(inc, 1, NOW)
    token = object()
    assert at.quiesce(SERVER, token, NOW)
    at.receive(CLIENT, [env(1)], NOW)
    assert at.do_not_quiesce(SERVER, token)
    assert not at.do_not_quiesce(SERVER, token)
    at.pump(inc, NOW)
    assert port.ran == ["m1"]
    at.background(inc, -1, NOW)
    assert port.quiet == []


def test_a_server_that_ends_before_tells_who_waited() -> None:
    at, port = core()
    at.host(row(), 1, 100, False, object(), [], NOW)
    assert at.quiesce(SERVER, "token", NOW)
    at.removed(SERVER, NOW)
    assert port.never_quiet == ["token"] and port.quiet == []


# -- again and again


def test_a_plan_is_due_again_and_again_and_what_was_missed_is_one() -> None:
    at, port = core()
    host(at)
    assert at.plan(SERVER, "u", 1_000, 3, NOW)
    at.tick(NOW + 999)
    assert port.due == []
    at.tick(NOW + 3_500)
    assert port.due == ["u"]
    at.tick(NOW + 4_000)
    assert port.due == ["u", "u"]
    assert at.plan(SERVER, "u", 0, 3, NOW + 4_000)
    at.tick(NOW + 9_000)
    assert len(port.due) == 2
    assert not at.plan("nobody", "u", 1_000, 3, NOW)


def test_a_plan_moves_with_its_server_and_fires_only_where_it_is() -> None:
    at, port = core()
    host(at)
    at.plan(SERVER, "u", 450, 3, NOW)
    frozen_move(at, port, NOW + 400)
    at.tick(NOW + 480)
    assert port.due == []
    there, _ = core(B)
    copy = ready_target(there, at, NOW + 400)
    (plan,) = copy.plans.values()
    assert (plan.url, plan.every_ms, plan.keep, plan.due_ms) == ("u", 450, 3, NOW + 450)


def test_a_plan_comes_back_with_its_server() -> None:
    at, _ = core()
    inc = host(at)
    at.plan(SERVER, "u", 1_000, 3, NOW)
    record = taken(at, inc, NOW + 700)
    there, log = core(B)
    restored(there, record, now_ms=NOW + 5_000)
    there.tick(NOW + 5_299)
    assert log.due == []
    there.tick(NOW + 5_300)
    assert log.due == ["u"]
