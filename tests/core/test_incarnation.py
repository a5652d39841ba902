"""What travels with a server comes out as it went in."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from migrate.core.delivery import Outgoing, Route
from migrate.core.incarnation import (
    Incarnation,
    Phase,
    export,
    restore,
)
from migrate.core.messages import CALL, CAST, OK, Acked, Envelope
from migrate.core.records import StateRecord
from tests.core.fakes import CLIENT, NOW, SERVER, SESSION, Port, core, env, host, out, row


def through_bytes(inc: Incarnation, port: Port, now_ms: int = NOW) -> Incarnation:
    """The copy that arrives, by way of bytes."""
    data = msgspec.msgpack.encode(export(inc, port.pack, now_ms))
    record = msgspec.msgpack.decode(data, type=StateRecord)
    routes: dict[str, Route] = {}

    def route_of(server: str, node: str, epoch: int) -> Route:
        return routes.setdefault(server, Route(server))

    return restore(record, row(owner="b@1"), 1, object(), route_of, 1024, now_ms)


def test_a_copy_is_frozen_holds_back_and_sends_nothing() -> None:
    at, port = core()
    copy = through_bytes(host(at), port)
    assert copy.phase is Phase.FROZEN
    assert copy.holding and copy.sender.muted


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([CALL, CAST])), max_size=20),
    st.booleans(),
)
def test_numbers_records_mailbox_and_early_messages_survive(
    arrived: list[tuple[int, int]], busy: bool
) -> None:
    at, port = core()
    inc = host(at)
    port.busy = busy
    for seq, kind in arrived:
        at.receive(CLIENT, [env(seq, kind=kind, payload=bytes(seq))], NOW)
    copy = through_bytes(inc, port)
    assert [(e.seq, e.method, e.kind) for e in copy.mailbox] == [
        (e.seq, e.method, e.kind) for e in inc.mailbox
    ]
    assert (copy.records, copy.record_bytes, copy.early) == (
        inc.records,
        inc.record_bytes,
        inc.early,
    )
    assert (copy.mailbox_bytes, copy.early_bytes) == (inc.mailbox_bytes, inc.early_bytes)
    for sid, session in inc.sessions.items():
        twin = copy.sessions[sid]
        assert (twin.expected, twin.acked_below) == (session.expected, session.acked_below)
        assert list(twin.early) == list(session.early)
        assert {seq: r.payload for seq, r in twin.records.items()} == {
            seq: r.payload for seq, r in session.records.items()
        }
        waiting = [e for e in copy.mailbox if e.session is twin and e.kind == CALL]
        assert twin.pending == len(waiting)


def test_what_the_server_has_sent_and_not_heard_of_travels_with_its_numbers() -> None:
    at, port = core(window=2)
    inc = host(at)
    at.route_hint("other", "c@1", 1)
    for n in range(4):
        request = Outgoing(CAST, f"m{n}", None, n, (), 0, None, "")
        at.request(inc.sender, "other", request, NOW)
    assert len(port.of(Envelope)) == 2
    [session] = through_bytes(inc, port).sender.sessions.values()
    assert (session.next_seq, session.low) == (3, 1)
    assert [(o.seq, o.payload) for o in session.outstanding.values()] == [(1, b"0"), (2, b"1")]
    assert [(o.seq, o.payload) for o in session.waiting] == [(0, b"2"), (0, b"3")]


def test_a_cast_whose_session_has_ended_is_no_timer_after_the_move() -> None:
    at, port = core()
    inc = host(at)
    port.busy = True
    at.receive(CLIENT, [env(1), env(2, kind=CAST)], NOW)
    _, entry = port.began[0]
    inc.running.clear()
    del inc.sessions[SESSION]
    assert entry.seq == 1
    [cast] = through_bytes(inc, port).mailbox
    assert cast.session is not None and cast.session.id == SESSION


def test_a_session_that_its_sender_closed_stays_closed() -> None:
    at, port = core()
    inc = host(at)
    at.receive(CLIENT, [env(1), Acked(SESSION, SERVER, 2, True)], NOW)
    assert through_bytes(inc, port).sessions[SESSION].ended


def test_remaining_times_travel_not_instants() -> None:
    at, port = core()
    inc = host(at, timers=[("tick", 100)])
    port.busy = True
    at.receive(CLIENT, [env(1), env(2, timeout_ms=80)], NOW)
    data = export(inc, port.pack, NOW + 30)
    assert [e.left_ms for e in data.mailbox] == [50]
    assert [t.left_ms for t in data.timers] == [70]


def test_quiet_means_no_hook_no_handler_and_no_task() -> None:
    at, port = core()
    inc = at.host(row(), 1, 10, False, object(), [], NOW)
    assert not inc.quiet()
    at.started(SERVER, NOW)
    assert inc.quiet()
    at.background(inc, 1, NOW)
    assert not inc.quiet()
    at.background(inc, -1, NOW)
    port.busy = True
    at.request(at.own, SERVER, out(), NOW)
    assert not inc.quiet()
    inc_entry = port.began[0][1]
    at.finish(inc, inc_entry, OK, b"", None, NOW)
    assert inc.quiet()
