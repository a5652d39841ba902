"""The core with marks is at the steps of delivery it says, and does what the core does."""

from __future__ import annotations

import pytest

from migrate.core.actions import Point, Reach
from migrate.core.events import SwapResult
from migrate.core.marks import MarkedCore
from migrate.core.messages import CAST, OK, Activated, Moved, NotHere, Ready, Reply
from migrate.core.node import Core, CoreOptions
from tests.core.fakes import (
    CLIENT,
    DONE,
    NOW,
    SERVER,
    SESSION,
    TIMES,
    TRANSFER,
    A,
    B,
    C,
    Port,
    env,
    frozen_move,
    host,
    out,
    ready_target,
    row,
)


def marked(node: str = A) -> tuple[Core, Port]:
    port = Port()
    return MarkedCore(node, port, CoreOptions(move=TIMES), NOW), port


def reached(port: Port) -> list[Point]:
    """The points since the last time."""
    points = [action.point for action in port.did(Reach)]
    port.performed.clear()
    return points


def test_a_call_passes_its_steps_at_the_owner_in_order():
    at, port = marked()
    host(at)

    at.receive(CLIENT, [env(1)], NOW)

    assert reached(port) == [
        Point.REQUEST_RECEIVED,
        Point.REQUEST_ADMITTED,
        Point.HANDLER_BEGUN,
        Point.HANDLER_DONE,
        Point.REPLY_READY,
        Point.REPLY_SENT,
    ]
    assert [type(m) for m in (message for _, message in port.take())] == [Reply]


def test_nothing_is_recorded_when_the_handler_is_done_and_nothing_has_left_when_it_is():
    at, port = marked()
    inc = host(at)
    seen = {}

    def perform(transfer: str, incoming: bool, action: object) -> None:
        if isinstance(action, Reach):
            session = inc.sessions.get(SESSION)
            seen[action.point] = (session is not None and 1 in session.records, len(port.sent))

    port.perform = perform  # type: ignore[method-assign]

    at.receive(CLIENT, [env(1)], NOW)

    assert seen[Point.HANDLER_DONE] == (False, 0)
    assert seen[Point.REPLY_READY] == (True, 0)
    assert seen[Point.REPLY_SENT] == (True, 1)


def test_a_handler_that_goes_on_is_done_when_it_has_ended():
    at, port = marked()
    inc = host(at)
    port.busy = True
    at.receive(CLIENT, [env(1)], NOW)
    assert reached(port)[-1] is Point.HANDLER_BEGUN

    at.finish(inc, port.began[0][1], OK, b"x", None, NOW)

    assert reached(port) == [Point.HANDLER_DONE, Point.REPLY_READY, Point.REPLY_SENT]


def test_a_cast_is_acknowledged_at_points_of_its_own():
    at, port = marked()
    host(at)

    at.receive(CLIENT, [env(1, kind=CAST)], NOW)

    assert reached(port)[-2:] == [Point.RECEIPT_READY, Point.RECEIPT_SENT]


def test_repeats_and_acknowledgements_have_their_points():
    at, port = marked()
    host(at)
    at.receive(CLIENT, [env(1)], NOW)
    reached(port)

    at.receive(CLIENT, [env(1)], NOW)
    assert Point.REPEAT_RECEIVED in reached(port)
    at.receive(CLIENT, [env(2, acked_below=2)], NOW)
    assert Point.RECORDS_FREED in reached(port)


def test_a_call_passes_its_steps_at_the_sender_in_order():
    at, port = marked(CLIENT)
    at.request(at.own, SERVER, out(), NOW)
    at.located(SERVER, True, row(owner=A), NOW)
    session = next(iter(at.sending))
    assert reached(port) == [Point.ROW_LOOKED_UP, Point.REQUEST_SENT]

    at.tick(NOW + 1_001)
    assert reached(port) == [Point.REPEAT_DUE, Point.REQUEST_SENT]
    at.receive(A, [Moved(SERVER, B, 2), NotHere(SERVER, session, 1)], NOW)
    assert reached(port)[:2] == [Point.MOVED_RECEIVED, Point.NOT_HERE_RECEIVED]
    at.receive(A, [Reply(session, 1, OK, b"x")], NOW)
    assert reached(port) == [Point.REPLY_RECEIVED, Point.REPLY_TAKEN]
    at.tick(NOW + 3_000)
    assert reached(port)[-1] is Point.ACKED_SENT


def test_requests_of_a_server_that_leaves_are_held_forwarded_or_turned_away():
    at, port = marked()
    host(at)
    frozen_move(at, port)
    reached(port)

    at.receive(CLIENT, [env(1)], NOW)
    assert reached(port) == [Point.REQUEST_RECEIVED, Point.REQUEST_HELD]
    at.receive(B, [Ready(TRANSFER)], NOW)
    at.move_event(TRANSFER, False, SwapResult(DONE, None, 2), NOW)
    assert {Point.REQUEST_FORWARDED, Point.MOVED_SENT} <= set(reached(port))
    at.receive(B, [Activated(TRANSFER)], NOW)
    at.receive(CLIENT, [env(1, hops=2)], NOW)
    assert reached(port)[-1] is Point.NOT_HERE_SENT


def test_requests_that_arrive_before_their_server_knock():
    source, source_port = marked()
    host(source)
    frozen_move(source, source_port)
    at, port = marked(B)
    ready_target(at, source)
    reached(port)

    at.receive(C, [env(1)], NOW)

    assert reached(port) == [Point.REQUEST_RECEIVED, Point.REQUEST_KNOCKED]


@pytest.mark.parametrize("kind", [Core, MarkedCore])
def test_the_core_itself_has_no_points_on_the_way_of_a_message(kind: type[Core]):
    port = Port()
    at = kind(A, port, CoreOptions(move=TIMES), NOW)
    host(at)

    at.receive(CLIENT, [env(1), env(2, kind=CAST), env(1), env(3, acked_below=2)], NOW)

    assert bool(reached(port)) is (kind is MarkedCore)
    # What it does is the same.
    assert port.ran == ["m1", "m2", "m3"]
    assert len(port.of(Reply)) == 3
