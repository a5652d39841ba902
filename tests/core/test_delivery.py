"""Sessions: numbers, order, repeats, records, windows; every sentence of DESIGN section 5."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.core.clock import SharedClock
from migrate.core.delivery import NEVER, Route, Sender, SendSession, may_open
from migrate.core.ids import session_id
from migrate.core.messages import (
    CALL,
    CAST,
    EMPTY,
    EXPIRED,
    FORGOTTEN,
    FULL,
    OK,
    PROBE,
    REFUSED,
    ROLLED_BACK,
    TIMED_OUT,
    WITHDRAWN,
    Acked,
    Envelope,
    FinalFailed,
    Moved,
    NotHere,
    Receipt,
    Reply,
)
from tests.core.fakes import (
    CLIENT,
    NOW,
    SERVER,
    SESSION,
    TRANSFER,
    A,
    B,
    C,
    Port,
    core,
    env,
    frozen_move,
    host,
    out,
    row,
)


def replies(port: Port) -> list[tuple[int, int]]:
    """(number, status) of every reply, in order."""
    return [(reply.seq, reply.status) for reply in port.of(Reply)]


# -- the receiving side


def test_a_gap_is_waited_for_and_what_came_early_follows_in_order() -> None:
    at, port = core()
    host(at)
    for seq in (1, 4, 3):
        at.receive(CLIENT, [env(seq)], NOW)
    assert port.ran == ["m1"]
    at.receive(CLIENT, [env(2)], NOW)
    assert port.ran == ["m1", "m2", "m3", "m4"]


def test_a_repeat_of_a_completed_call_is_answered_from_its_record() -> None:
    at, port = core()
    host(at)
    at.receive(CLIENT, [env(1), env(1), env(1)], NOW)
    assert port.ran == ["m1"]
    assert replies(port) == [(1, OK)] * 3
    assert {reply.payload for reply in port.of(Reply)} == {b"m1"}


def test_a_repeat_of_a_running_call_attaches_to_it() -> None:
    at, port = core()
    inc = host(at)
    port.busy = True
    at.receive(CLIENT, [env(1), env(1)], NOW)
    assert port.ran == ["m1"]
    assert replies(port) == []
    _, entry = port.began[0]
    at.finish(inc, entry, OK, b"late", None, NOW)
    assert replies(port) == [(1, OK)]


def test_a_repeat_of_a_forgotten_call_is_an_explicit_error() -> None:
    at, port = core()
    host(at)
    at.receive(CLIENT, [env(1), env(2, acked_below=2), env(1)], NOW)
    assert port.ran == ["m1", "m2"]
    assert replies(port)[-1] == (1, FORGOTTEN)


def test_records_are_freed_by_what_the_sender_acknowledges() -> None:
    at, _port = core()
    inc = host(at)
    at.receive(CLIENT, [env(seq) for seq in range(1, 6)], NOW)
    assert inc.records == 5
    at.receive(CLIENT, [env(6, acked_below=5)], NOW)
    assert inc.records == 2
    at.receive(CLIENT, [Acked(SESSION, SERVER, 7)], NOW)
    assert (inc.records, inc.record_bytes) == (0, 0)


def test_records_are_bounded_by_what_is_outstanding_over_many_calls_s50() -> None:
    at, _port = core()
    inc = host(at)
    most = 0
    for seq in range(1, 2_000):
        at.receive(CLIENT, [env(seq, acked_below=max(1, seq - 4))], NOW)
        most = max(most, inc.records)
    assert most <= 5


def test_a_full_set_of_records_refuses_and_says_so() -> None:
    at, port = core(records_max=2)
    host(at)
    at.receive(CLIENT, [env(1), env(2), env(3)], NOW)
    assert port.ran == ["m1", "m2"]
    assert port.of(Receipt)[-1] == Receipt(SESSION, SERVER, 3, 0)
    at.receive(CLIENT, [env(3, acked_below=3)], NOW)
    assert port.ran == ["m1", "m2", "m3"]


def test_a_closed_session_is_not_opened_again_by_a_late_copy_of_its_first_request() -> None:
    at, port = core()
    host(at)
    at.receive(CLIENT, [env(1), Acked(SESSION, SERVER, 2, True), env(1)], NOW)
    assert port.ran == ["m1"]
    assert replies(port)[-1] == (1, FORGOTTEN)


def test_a_closed_session_is_forgotten_when_its_id_is_too_old_to_open_one() -> None:
    at, port = core(session_expiry_ms=10_000)
    inc = host(at)
    at.receive(CLIENT, [env(1), Acked(SESSION, SERVER, 2, True)], NOW)
    at.tick(NOW + 2_000)
    assert SESSION in inc.sessions
    at.tick(NOW + 7_000)
    assert SESSION not in inc.sessions
    at.receive(CLIENT, [env(1)], NOW + 7_000)
    assert port.ran == ["m1"]
    assert replies(port)[-1] == (1, FORGOTTEN)


def test_a_late_number_of_an_unknown_session_is_forgotten_not_executed() -> None:
    at, port = core()
    host(at)
    at.receive(CLIENT, [env(7, acked_below=5)], NOW)
    assert port.ran == []
    assert replies(port) == [(7, FORGOTTEN)]


def test_an_envelope_for_a_former_generation_is_told_that_the_server_went_back() -> None:
    at, port = core()
    inc = host(at)
    inc.row = row(epoch=9, generation=5)
    for generation in (1, 4):
        at.receive(CLIENT, [env(1, generation=generation)], NOW)
    assert replies(port) == [(1, ROLLED_BACK)] * 2
    assert port.ran == [] and inc.sessions == {}
    # An epoch of this generation is as good as any other.
    at.receive(CLIENT, [env(1, generation=5), env(2, generation=9)], NOW)
    assert port.ran == ["m1", "m2"]


def test_an_envelope_of_an_older_epoch_of_its_sender_is_dropped() -> None:
    at, port = core()
    host(at)
    at.receive(B, [env(1, sender_epoch=4, reply_to=B)], NOW)
    port.take()
    at.receive(A, [env(2, sender_epoch=3, reply_to=C)], NOW)
    assert port.ran == ["m1"]
    assert port.take() == []


def test_a_call_that_expires_in_the_mailbox_is_recorded_as_not_done() -> None:
    at, port = core()
    inc = host(at)
    port.busy = True
    at.receive(CLIENT, [env(1), env(2, timeout_ms=50)], NOW)
    _, entry = port.began[0]
    at.finish(inc, entry, OK, b"", None, NOW + 100)
    assert port.ran == ["m1"]
    assert replies(port) == [(1, OK), (2, EXPIRED)]
    at.receive(CLIENT, [env(2)], NOW + 100)
    assert replies(port)[-1] == (2, EXPIRED)


def test_an_acknowledged_cast_is_carried_out_whatever_its_time_out_s20() -> None:
    at, port = core()
    inc = host(at)
    port.busy = True
    at.receive(CLIENT, [env(1), env(2, kind=CAST, timeout_ms=50)], NOW)
    assert port.of(Receipt)[-1].admitted_below == 3
    _, entry = port.began[0]
    at.finish(inc, entry, OK, b"", None, NOW + 100)
    assert port.ran == ["m1", "m2"]


def test_a_withdrawn_number_is_used_up_and_stalls_nobody() -> None:
    at, port = core()
    host(at)
    at.receive(CLIENT, [env(1, kind=EMPTY, method="call"), env(2)], NOW)
    assert port.ran == ["m2"]
    assert replies(port) == [(1, WITHDRAWN), (2, OK)]


def test_a_kind_that_nobody_knows_is_answered() -> None:
    at, port = core()
    host(at)
    at.receive(CLIENT, [env(1, kind=77), env(2)], NOW)
    assert replies(port) == [(1, REFUSED), (2, OK)]


def test_early_messages_that_fill_the_mailbox_give_way_to_the_one_they_wait_for() -> None:
    at, port = core()
    inc = host(at, limit=3)
    at.receive(CLIENT, [env(2), env(3), env(4)], NOW)
    assert inc.early == 3
    at.receive(CLIENT, [env(1)], NOW)
    assert port.ran == ["m1", "m2", "m3"]
    at.receive(CLIENT, [env(4)], NOW)
    assert port.ran[-1] == "m4"
    assert inc.early == 0


def test_a_full_mailbox_refuses_and_grants_when_it_has_room_s21() -> None:
    at, port = core()
    inc = host(at, limit=2)
    port.busy = True
    at.receive(CLIENT, [env(seq) for seq in range(1, 5)], NOW)
    assert len(inc.mailbox) == 2
    assert port.of(Receipt)[-1] == Receipt(SESSION, SERVER, 4, 0)
    port.take()
    port.busy = False
    _, entry = port.began[0]
    at.finish(inc, entry, OK, b"", None, NOW)
    assert port.ran == ["m1", "m2", "m3"]
    assert port.of(Receipt)[-1] == Receipt(SESSION, SERVER, 4, -1)


TEN = b"0123456789"


def test_a_mailbox_is_full_by_the_bytes_that_wait_in_it_and_grants_when_it_has_room() -> None:
    at, port = core(mailbox_bytes_max=25)
    inc = host(at)
    port.busy = True
    at.receive(CLIENT, [env(seq, payload=TEN) for seq in range(1, 7)], NOW)
    # The first is being handled; the bound is passed by one message at the most.
    assert (len(inc.mailbox), inc.mailbox_bytes) == (3, 30)
    assert port.of(Receipt) == [Receipt(SESSION, SERVER, 5, 0)]
    port.take()
    for _ in range(2):
        [running] = inc.running.values()
        at.finish(inc, running, OK, b"", None, NOW)
    # Room for 15 bytes is room for one more of what was refused.
    assert inc.mailbox_bytes == 10
    assert port.of(Receipt) == [Receipt(SESSION, SERVER, 5, 1)]


def test_a_message_larger_than_the_bound_is_taken_into_an_empty_mailbox_and_alone() -> None:
    at, port = core(mailbox_bytes_max=5)
    inc = host(at)
    port.busy = True
    at.receive(CLIENT, [env(1), env(2, payload=TEN), env(3), env(4, payload=TEN)], NOW)
    assert [entry.seq for entry in inc.mailbox] == [2]
    while inc.running:
        [running] = inc.running.values()
        at.finish(inc, running, OK, b"", None, NOW)
        at.receive(CLIENT, [env(3), env(4, payload=TEN)], NOW)
    assert port.ran == ["m1", "m2", "m3", "m4"]
    assert (inc.mailbox_bytes, inc.early_bytes) == (0, 0)


def test_a_sender_that_was_refused_for_bytes_is_granted_what_fits_until_a_sweep() -> None:
    at, port = core(mailbox_bytes_max=40)
    inc = host(at)
    port.busy = True
    at.receive(CLIENT, [env(seq, payload=TEN) for seq in range(1, 9)], NOW)
    while inc.running:
        [running] = inc.running.values()
        at.finish(inc, running, OK, b"", None, NOW)
    # The mailbox is empty; without a limit 1,024 would come for the four that there is room for.
    assert port.of(Receipt)[-1] == Receipt(SESSION, SERVER, 6, 4)
    port.take()
    port.busy = False
    at.receive(CLIENT, [env(6, kind=CAST), env(7, kind=CAST)], NOW)
    assert [receipt.window for receipt in port.of(Receipt)] == [4, 4, 4]
    port.take()
    at.tick(NOW + at.options.session_expiry_ms // 10)
    assert port.of(Receipt) == [Receipt(SESSION, SERVER, 8, -1)]
    assert not inc.starved


def test_early_messages_that_take_the_bytes_give_way_to_the_one_they_wait_for() -> None:
    at, port = core(mailbox_bytes_max=25)
    inc = host(at)
    at.receive(CLIENT, [env(seq, payload=TEN) for seq in (2, 3, 4, 5)], NOW)
    assert (inc.early, inc.early_bytes) == (3, 30)
    at.receive(CLIENT, [env(1, payload=TEN)], NOW)
    assert port.ran == ["m1", "m2", "m3"]
    assert (inc.early, inc.early_bytes, inc.mailbox_bytes) == (0, 0, 0)


def test_what_comes_during_a_freeze_is_bounded_in_bytes_with_what_stands_there() -> None:
    at, port = core(mailbox_bytes_max=35)
    inc = host(at)
    frozen_move(at, port)
    at.receive(CLIENT, [env(seq, payload=TEN) for seq in range(1, 9)], NOW)
    assert [envelope.seq for envelope in inc.late] == [1, 2, 3, 4]
    at.receive(B, [FinalFailed(TRANSFER, "there is no room")], NOW)
    at.started(SERVER, NOW)
    assert port.ran == ["m1", "m2", "m3", "m4"]
    at.receive(CLIENT, [env(5, payload=TEN)], NOW)
    assert port.ran[-1] == "m5" and not inc.late and inc.late.size == 0


def test_live_arguments_count_once_they_have_to_wait() -> None:
    at, port = core(mailbox_bytes_max=25)
    inc = host(at)
    port.busy = True
    for _ in range(5):
        request = out()
        request.payload, request.args = None, "ten bytes"
        at.request(at.own, SERVER, request, NOW)
    size = len(port.pack("ten bytes"))
    assert (len(inc.mailbox), inc.mailbox_bytes) == (3, 3 * size)


# -- the sending side


def sent(port: Port) -> list[tuple[str, int, int]]:
    """(node, number, kind) of every envelope."""
    return [(node, m.seq, m.kind) for node, m in port.sent if isinstance(m, Envelope)]


def test_a_request_asks_the_directory_once_and_goes_to_the_owner() -> None:
    at, port = core(CLIENT)
    for _ in range(3):
        at.request(at.own, SERVER, out(), NOW)
    assert port.looked == [SERVER]
    at.located(SERVER, True, row(owner=B), NOW)
    assert sent(port) == [(B, 1, CALL), (B, 2, CALL), (B, 3, CALL)]


def test_what_is_unanswered_is_repeated_and_what_is_answered_is_not() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(), NOW)
    at.request(at.own, SERVER, out(), NOW)
    assert session is not None
    at.receive(B, [Reply(session.id, 1, OK, b"")], NOW)
    port.take()
    at.tick(NOW + 1_000)
    assert sent(port) == [(B, 2, CALL)]


def test_what_was_granted_is_sent_once_however_often_it_is_granted() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(), NOW)
    assert session is not None
    for _ in range(5):
        at.request(at.own, SERVER, out(), NOW)
    port.take()
    at.receive(B, [Receipt(session.id, SERVER, 1, 0)], NOW)
    at.receive(B, [Receipt(session.id, SERVER, 1, 3)] * 3, NOW)
    assert [seq for _, seq, _ in sent(port)] == [1, 2, 3]
    port.take()
    at.receive(B, [Receipt(session.id, SERVER, 2, 3)], NOW)
    assert [seq for _, seq, _ in sent(port)] == [4]


def test_an_admitted_call_is_repeated_without_its_arguments() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(), NOW)
    assert session is not None
    at.receive(B, [Receipt(session.id, SERVER, 2)], NOW)
    port.take()
    at.tick(NOW + 1_000)
    assert sent(port) == [(B, 1, PROBE)]


@pytest.mark.parametrize("comes", ["before", "late"])
def test_what_a_former_owner_granted_does_not_hold_a_sender_back(comes: str) -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(), NOW)
    assert session is not None
    refusal = Receipt(session.id, SERVER, 1, 0)
    messages = [refusal, Moved(SERVER, C, 2)]
    at.receive(B, messages if comes == "before" else messages[::-1], NOW)
    at.tick(NOW + 1_100)  # The request goes again, to C.
    assert sent(port)[-1] == (C, 1, CALL)
    at.receive(C, [Reply(session.id, 1, OK, b"")], NOW + 1_200)
    for _ in range(4):
        at.request(at.own, SERVER, out(), NOW + 1_300)
    at.receive(C, [Reply(session.id, 2, OK, b"")], NOW + 1_400)
    assert (len(session.outstanding), len(session.waiting)) == (3, 0)


def test_a_cast_is_settled_by_the_receipt() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(kind=CAST), NOW)
    assert session is not None and port.resolved == []
    at.receive(B, [Receipt(session.id, SERVER, 2)], NOW)
    assert port.resolved == [("token", OK, None)]


def test_a_request_beyond_the_window_waits_without_a_number() -> None:
    at, port = core(CLIENT, window=2)
    at.route_hint(SERVER, B, 1)
    for _ in range(4):
        session = at.request(at.own, SERVER, out(), NOW)
    assert session is not None
    assert sent(port) == [(B, 1, CALL), (B, 2, CALL)]
    assert at.request(at.own, SERVER, out(), NOW, wait=False) is None
    port.take()
    at.receive(B, [Reply(session.id, 1, OK, b"")], NOW)
    assert sent(port) == [(B, 3, CALL)]


def test_a_request_that_never_got_a_number_ends_as_not_done() -> None:
    at, port = core(CLIENT, window=1)
    at.route_hint(SERVER, B, 1)
    at.request(at.own, SERVER, out(token="first"), NOW)
    at.request(at.own, SERVER, out(token="second", deadline_ms=NOW + 50), NOW)
    at.tick(NOW + 50)
    assert port.resolved == [("second", FULL, b"")]


def test_a_request_that_was_sent_ends_as_unknown_at_its_deadline() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    at.request(at.own, SERVER, out(deadline_ms=NOW + 50), NOW)
    at.tick(NOW + 50)
    assert [(token, status) for token, status, _ in port.resolved] == [("token", TIMED_OUT)]


def test_a_refused_request_that_expires_goes_as_an_empty_one_and_is_not_done() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(deadline_ms=NOW + 50), NOW)
    assert session is not None
    at.receive(B, [Receipt(session.id, SERVER, 1, 0)], NOW)
    port.take()
    at.tick(NOW + 50)
    assert sent(port) == [(B, 1, EMPTY)]
    at.receive(B, [Reply(session.id, 1, WITHDRAWN, b"")], NOW + 60)
    assert port.resolved == [("token", FULL, b"")]


def test_a_lost_grant_stalls_nobody_who_has_nothing_outstanding() -> None:
    at, port = core(CLIENT, window=4)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(kind=CAST), NOW)
    assert session is not None
    at.receive(B, [Receipt(session.id, SERVER, 2, 0)], NOW)
    assert session.grant == 2
    at.request(at.own, SERVER, out(kind=CAST), NOW)
    assert sent(port)[-1] == (B, 2, CAST)


def test_refused_numbers_are_sent_again_when_they_are_granted() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    for _ in range(3):
        session = at.request(at.own, SERVER, out(), NOW)
    assert session is not None
    at.receive(B, [Receipt(session.id, SERVER, 2, 0)], NOW)
    port.take()
    at.receive(B, [Receipt(session.id, SERVER, 2, -1)], NOW)
    assert sent(port) == [(B, 2, CALL), (B, 3, CALL)]


def test_an_idle_sender_acknowledges_its_last_result_soon() -> None:
    at, port = core(CLIENT, ack_idle_ms=500)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(), NOW)
    assert session is not None
    at.receive(B, [Reply(session.id, 1, OK, b"")], NOW)
    at.tick(NOW + 500)
    assert port.of(Acked) == [Acked(session.id, SERVER, 2)]


def test_an_idle_sender_says_it_again_because_it_may_have_been_lost() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(), NOW)
    assert session is not None
    at.receive(B, [Reply(session.id, 1, OK, b"")], NOW)
    at.tick(NOW + 500)
    port.take()
    at.tick(NOW + 30_000)
    at.tick(NOW + 30_500)
    assert Acked(session.id, SERVER, 2) in port.of(Acked)


def test_a_session_idle_for_long_is_closed_by_the_sweep_and_a_new_one_is_used() -> None:
    at, port = core(CLIENT, session_expiry_ms=10_000)
    at.route_hint(SERVER, B, 1)
    first = at.request(at.own, SERVER, out(), NOW)
    assert first is not None
    at.receive(B, [Reply(first.id, 1, OK, b"")], NOW)
    at.tick(NOW + 4_000)
    assert Acked(first.id, SERVER, 2, True) in port.of(Acked)
    second = at.request(at.own, SERVER, out(), NOW + 4_000)
    assert second is not None and second.id != first.id


def test_a_forgotten_session_takes_what_was_never_sent_to_a_new_one() -> None:
    at, port = core(CLIENT, window=1)
    at.route_hint(SERVER, B, 1)
    first = at.request(at.own, SERVER, out(token="sent"), NOW)
    at.request(at.own, SERVER, out(token="waiting"), NOW)
    assert first is not None
    at.receive(B, [Reply(first.id, 1, FORGOTTEN, b"")], NOW)
    assert [(token, status) for token, status, _ in port.resolved] == [("sent", FORGOTTEN)]
    last = port.of(Envelope)[-1]
    assert (last.seq, last.session != first.id) == (1, True)


def test_a_cancelled_request_that_was_sent_keeps_its_number() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    request = out()
    session = at.request(at.own, SERVER, request, NOW)
    assert session is not None
    request.token = None
    at.cancel(session, request, NOW)
    at.receive(B, [Reply(session.id, 1, OK, b"")], NOW)
    assert port.resolved == []
    at.request(at.own, SERVER, out(), NOW)
    assert sent(port)[-1] == (B, 2, CALL)


def test_a_request_that_a_second_forwarder_refused_goes_on_at_once_s19() -> None:
    at, port = core(CLIENT)
    at.route_hint(SERVER, B, 1)
    session = at.request(at.own, SERVER, out(), NOW)
    assert session is not None
    at.route_hint(SERVER, C, 2)
    port.take()
    at.receive("d@1", [NotHere(SERVER, session.id, 1)], NOW)
    assert sent(port) == [(C, 1, CALL)]


def test_sessions_of_one_server_opened_in_one_millisecond_by_two_nodes_differ() -> None:
    ids = []
    for node, epoch in ((A, 1), (B, 2)):
        at, _ = core(node)
        ids.append(at.open_session(Sender(SERVER, epoch), "other", NOW).id)
    assert ids[0] != ids[1]


# -- on one node, without bytes


def test_a_local_call_is_answered_with_live_values_and_keeps_no_record() -> None:
    at, port = core()
    inc = host(at)
    at.request(at.own, SERVER, out("hello"), NOW)
    assert port.resolved == [("token", OK, b"hello")]
    assert inc.records == 0
    assert port.sent == []


def test_thousands_of_local_requests_beyond_the_window_need_no_stack() -> None:
    at, port = core(window=4)
    inc = host(at, limit=10_000)
    port.busy = True
    for n in range(3_000):
        at.request(at.own, SERVER, out(f"m{n}"), NOW)
    port.busy = False
    _, entry = port.began[0]
    at.finish(inc, entry, OK, b"", None, NOW)
    while port.later:
        at.pump(port.later.popleft(), NOW)
    assert port.ran == [f"m{n}" for n in range(3_000)]
    assert len(port.resolved) == 3_000


def test_a_result_for_a_frozen_sender_on_the_same_node_keeps_its_record() -> None:
    at, port = core()
    inc = host(at)
    sender = host(at, "sender").sender
    port.busy = True
    session = at.request(sender, SERVER, out(token=None), NOW)
    assert session is not None
    sender.muted = True
    _, entry = port.began[0]
    at.finish(inc, entry, OK, b"kept", None, NOW)
    assert inc.sessions[session.id].records[1].payload == b"kept"


def test_a_refused_local_request_is_sent_again() -> None:
    at, port = core()
    inc = host(at, limit=1)
    port.busy = True
    for name in ("a", "b", "c"):
        sender = Sender(name)
        at.request(sender, SERVER, out(name), NOW)
    assert len(inc.mailbox) == 1
    # The grant is lost here, as it is with a copy that is dropped.
    inc.starved.clear()
    port.busy = False
    _, entry = port.began[0]
    at.finish(inc, entry, OK, b"", None, NOW)
    at.tick(NOW + 1_000)
    assert port.ran == ["a", "b", "c"]


# -- small parts


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_only_young_ids_open_sessions(age_ms: int, expiry_ms: int) -> None:
    opened = may_open(session_id("x", NOW * 2 - age_ms, 1), SharedClock(), NOW * 2, expiry_ms)
    assert opened == (age_ms < expiry_ms // 2)


@pytest.mark.parametrize("sid", ["", "x", "x|y|1", "a|b", "x|" + "9" * 30 + "|1"])
def test_malformed_session_ids_open_nothing(sid: str) -> None:
    assert not may_open(sid, SharedClock(), NOW, 1_000)


@given(st.lists(st.integers(1, 12), max_size=30), st.integers(1, 12))
def test_low_is_the_lowest_number_not_settled(settled: list[int], count: int) -> None:
    session = SendSession("s", SERVER, Sender(CLIENT), Route(SERVER), 100, NOW)
    for _ in range(count):
        session.number(out())
    for seq in settled:
        session.settle(seq)
        assert session.low == min(session.outstanding, default=session.next_seq)


@given(st.lists(st.tuples(st.integers(-2, 9), st.integers(-1, 5)), max_size=12))
def test_no_receipt_stops_a_sender_with_nothing_outstanding(
    receipts: list[tuple[int, int]],
) -> None:
    session = SendSession("s", SERVER, Sender(CLIENT), Route(SERVER), 4, NOW)
    assert session.grant == NEVER
    for below, window in receipts:
        session.receipt(below, window)
        if session.idle():
            assert session.has_room()
            session.number(out(kind=CAST))
        session.receipt(session.next_seq, 0)
