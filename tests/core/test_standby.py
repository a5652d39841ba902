"""Standbys in the core: three cores and a directory, and a wire that a test can hold up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from typing import Any
from unittest.mock import ANY

import pytest
from msgspec import structs

from migrate.core import directory
from migrate.core.actions import CheckClass, DecodeState, EncodeState, Finish, Result, SwapRow
from migrate.core.delivery import Entry, Outgoing, ReceiveSession, Route, SendSession
from migrate.core.directory import Mode, Row, RowState
from migrate.core.events import (
    Checked,
    Copied,
    Decoded,
    Encoded,
    RowRead,
    SwapOutcome,
    SwapResult,
    Withdraw,
)
from migrate.core.ids import NodeId, session_id
from migrate.core.incarnation import (
    Changes,
    Image,
    Incarnation,
    Phase,
    Removal,
    _send_record,
    cut,
    cut_for_rollback,
    restore,
)
from migrate.core.messages import (
    CALL,
    CAST,
    CYCLE,
    DIVERGED,
    EMPTY,
    ERROR,
    EXPIRED,
    FULL,
    LOST,
    OK,
    ROLLED_BACK,
    WITHDRAWN,
    Chunk,
    Cut,
    Dropped,
    Envelope,
    Final,
    FinalFailed,
    Follow,
    Following,
    KeepRefused,
    Kept,
    Message,
    Moved,
    Note,
    Prepare,
    Prepared,
    Receipt,
    Reply,
    Unfollow,
    WaitProbe,
)
from migrate.core.node import Core
from migrate.core.records import CheckpointRecord, CutRecord, EntryRecord, StepRecord, Wanted
from migrate.core.standby import (
    Backup,
    Changed,
    FollowerPhase,
)
from tests.core.fakes import CLIENT, NOW, SERVER, A, B, C, Port, core, env, host

OTHER = "other"
NOTHING = CheckpointRecord(0, [], [], [], {}, [])


class World:
    """Cores that hear each other when told to; what goes to others is written down."""

    def __init__(self, *names: NodeId) -> None:
        self.now_ms = NOW
        self.cores: dict[NodeId, Core] = {}
        self.ports: dict[NodeId, Port] = {}
        for name in names:
            self.cores[name], self.ports[name] = core(name)
        self.rows: dict[str, tuple[Row, int]] = {}
        self.rev = 10
        self.out: list[tuple[NodeId, NodeId, Message]] = []  # to whoever is no core here
        self.silent: set[NodeId] = set()
        self.deaf: set[NodeId] = set()  # to the directory
        self.dropped: list[type[Message]] = []

    def own(self, at: NodeId, server: str = SERVER, **more: Any) -> Incarnation:
        inc = host(self.cores[at], server, **more)
        self.rows[server] = (inc.row, inc.rev)
        return inc

    def run(self) -> None:
        """Until nothing happens any more without time going on."""
        while self._once():
            pass

    def _once(self) -> bool:
        did = False
        for name, port in self.ports.items():
            if name in self.silent:
                continue
            at = self.cores[name]
            for node, message in port.take():
                did = True
                if type(message) in self.dropped:
                    continue
                if node in self.cores:
                    if node not in self.silent:
                        self.cores[node].receive(name, [message], self.now_ms)
                else:
                    self.out.append((name, node, message))
            did = self._asked(name, at, port) or did
            while port.later:
                did = True
                at.pump(port.later.popleft(), self.now_ms)
        return did

    def _asked(self, name: NodeId, at: Core, port: Port) -> bool:
        did = False
        for follow in _taken(port.asked):
            did = True
            at.standbys.follow_checked(follow.stream, 1, "", self.now_ms)
        for stream in _taken(port.copies):
            did = True
            at.standbys.copied_for(stream, Copied(b"", True), self.now_ms)
        for inc, _ in _taken(port.begun):
            did = True
            at.started(inc.id, self.now_ms)
        for backup in _taken(port.loads):
            did = True
            at.standbys.backup_loaded(backup, object(), "", self.now_ms)
        if name in self.deaf:
            return did
        for row, rev in _taken(port.swaps):
            did = True
            result = self._swap(row, rev)
            if row.owner == name and row.server not in at.standbys.backups:
                at.standbys.configured(row.server, row, result, self.now_ms)
            else:
                at.standbys.promoted(row.server, row, result, self.now_ms)
        for server in _taken(port.reads):
            did = True
            row_now, rev = self.rows.get(server, (None, 0))
            at.standbys.standby_row(server, RowRead(True, row_now, rev), self.now_ms)
        return did

    def _swap(self, row: Row, rev: int) -> SwapResult:
        known, at = self.rows[row.server]
        if at != rev:
            return SwapResult(SwapOutcome.REFUSED, known, at)
        self.rev += 1
        self.rows[row.server] = (row, self.rev)
        return SwapResult(SwapOutcome.DONE, row, self.rev)

    def later(self, ms: int) -> None:
        """Let time pass; everybody but the silent ones ticks."""
        for _ in range(max(1, ms // 50)):
            self.now_ms += 50
            for name, at in self.cores.items():
                if name not in self.silent:
                    at.tick(self.now_ms)
            self.run()

    def send(self, to: NodeId, *messages: Message) -> None:
        self.cores[to].receive(CLIENT, list(messages), self.now_ms)
        self.run()

    def replies(self, kind: type[Message] = Reply) -> list[Any]:
        """What clients got since the last time."""
        found = [m for _, _, m in self.out if type(m) is kind]
        self.out = [item for item in self.out if type(item[2]) is not kind]
        return found

    def row(self, server: str = SERVER) -> Row:
        return self.rows[server][0]

    def replicate(self, *nodes: NodeId, at: NodeId = A, mode: Mode = Mode.SYNC) -> None:
        assert self.cores[at].standbys.replicate(SERVER, nodes, mode, self.now_ms)
        self.run()

    def kill(self, node: NodeId) -> None:
        self.silent.add(node)
        for name, at in self.cores.items():
            if name != node and name not in self.silent:
                at.node_dead(node, self.now_ms)
        self.run()


def _taken(things: list[Any]) -> list[Any]:
    taken = list(things)
    things.clear()
    return taken


def test_a_standby_joins_and_then_replies_wait_for_it() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    assert world.row().standbys == (B,) and world.row().epoch == 2
    assert (B, Changed.JOINED) in world.ports[A].changed
    world.dropped = [Kept]
    world.send(A, env(1, "m"))
    assert not world.replies()
    world.dropped = []
    world.later(300)
    assert [reply.seq for reply in world.replies()] == [1]


def test_what_was_answered_before_the_owner_died_is_answered_again_and_not_run_again() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.send(A, env(1, "m"), env(2, "n"))
    assert [reply.payload for reply in world.replies()] == [b"m", b"n"]
    world.kill(A)
    assert world.row().owner == B and world.row().epoch == 3
    assert [moved.node for moved in world.replies(Moved)] == [B]
    world.send(B, env(1, "m"), env(2, "n"), env(3, "o"))
    assert [reply.payload for reply in world.replies()] == [b"m", b"n", b"o"]
    assert world.ports[B].ran == ["o"]


def test_what_no_standby_had_is_run_by_the_next_owner() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.dropped = [Cut]
    world.send(A, env(1, "m"))
    assert not world.replies()
    world.kill(A)
    world.dropped = []
    world.send(B, env(1, "m"))
    assert [reply.payload for reply in world.replies()] == [b"m"]
    assert world.ports[B].ran == ["m"]


def test_s48_an_owner_that_was_replaced_lets_nothing_out_not_even_a_read() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.send(A, env(1, "m"))
    world.replies()
    world.silent.add(A)
    world.cores[B].standbys.node_suspected(A, world.now_ms)
    world.run()
    assert world.row().owner == B
    world.send(B, env(2, "n"))
    assert [reply.seq for reply in world.replies()] == [2]
    # It wakes, and handles what was waiting for it.
    world.silent.clear()
    world.send(A, env(2, "n"))
    assert not world.replies()
    world.later(500)
    assert SERVER not in world.cores[A].hosted
    assert not world.replies()
    assert world.ports[A].deposed_ones


def test_an_owner_that_is_told_that_it_was_replaced_lets_nothing_out_that_runs_on() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.ports[A].busy = True
    world.send(A, env(1, "m"))
    world.silent.add(A)
    world.cores[B].standbys.node_suspected(A, world.now_ms)
    world.run()
    world.silent.clear()
    world.cores[A].receive(B, [Moved(SERVER, B, 3, failover=True)], world.now_ms)
    world.run()
    assert SERVER not in world.cores[A].hosted
    world.replies(Moved)
    # The handler is cancelled, and that ends it.
    world.cores[A].finish(*world.ports[A].began[-1], ERROR, b"cancelled", None, world.now_ms)
    world.run()
    assert world.out == []


def test_a_handler_that_may_wait_is_begun_when_a_new_owner_has_fed_its_standbys() -> None:
    """What it asked for would wait for the cut, and the cut for its end."""
    world = World(A, B, C)
    world.own(A)
    world.own(C, OTHER)
    world.replicate(B, C)
    world.ports[B].busy = True
    world.cores[B].route_hint(OTHER, C, 1)
    world.dropped = [Following]
    world.kill(A)
    assert world.row().owner == B
    world.send(B, env(1, "m"))
    assert world.ports[B].ran == []
    world.dropped = []
    world.later(300)
    assert world.ports[B].ran == ["m"]
    asks(world, B, "fetch", f"{SERVER}/1")
    world.later(300)
    assert world.ports[C].ran == ["fetch"]


def test_a_handler_that_may_wait_is_begun_when_the_standby_it_waited_for_is_lost() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    world.ports[B].busy = True
    world.dropped = [Following]
    world.kill(A)
    world.send(B, env(1, "m"))
    assert world.ports[B].ran == []
    world.kill(C)
    world.later(50)
    assert world.ports[B].ran == ["m"]


def test_a_standby_that_dies_is_taken_out_of_the_row_before_anything_leaves() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.deaf.add(A)
    world.kill(B)
    world.send(A, env(1, "m"))
    world.later(1_000)
    assert not world.replies()
    world.deaf.clear()
    world.later(500)
    assert [reply.seq for reply in world.replies()] == [1]
    assert world.row().standbys == () and world.row().epoch == 3
    assert (B, Changed.LOST) in world.ports[A].changed


def test_a_silent_standby_is_taken_out_after_the_patience() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.silent.add(B)
    world.send(A, env(1, "m"))
    world.later(1_000)
    assert not world.replies()
    world.later(2_000)
    assert [reply.seq for reply in world.replies()] == [1]
    assert world.row().standbys == ()


def test_casts_are_acknowledged_also_while_a_handler_runs_and_survive() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.ports[A].busy = True
    world.dropped = [Kept]
    world.send(A, env(1, "held up", CAST))
    world.send(A, env(2, "first", CAST), env(3, "a call"), env(4, "second", CAST))
    assert not world.replies(Receipt)
    world.dropped = []
    world.later(300)
    assert max(receipt.admitted_below for receipt in world.replies(Receipt)) == 5
    world.kill(A)
    # Nobody has seen what the first one did: it runs again, before the others of its sender.
    assert world.ports[B].ran == ["held up", "first"]
    world.send(B, env(3, "a call"))
    assert world.ports[B].ran == ["held up", "first", "a call", "second"]


def test_what_a_sender_has_settled_is_not_waited_for_by_the_next_owner() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.ports[A].busy = True
    world.send(A, env(1, "held up", CAST))
    began = world.ports[A].began[-1]
    world.send(A, env(2, "cast", CAST), env(3, "", EMPTY), env(4, "another", CAST))
    # All are settled at the sender, though no handler has ended yet.
    world.send(A, env(5, "a call", acked_below=5))
    world.cores[A].finish(*began, OK, b"", None, world.now_ms)
    world.run()
    world.kill(A)
    assert world.ports[B].ran == ["cast", "another"]
    world.send(B, env(5, "a call", acked_below=5))
    assert world.ports[B].ran == ["cast", "another", "a call"]


def test_an_answer_of_no_handler_leaves_while_one_runs() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.ports[A].busy = True
    world.send(A, env(1, "m"), env(2, "", EMPTY))
    assert [reply.seq for reply in world.replies()] == [2]
    world.kill(A)
    world.send(B, env(1, "m"), env(2, "", EMPTY), env(3, "n"))
    assert world.ports[B].ran == ["m", "n"]
    assert {reply.seq for reply in world.replies()} == {1, 2, 3}


def test_several_standbys_one_takes_over_and_the_other_follows_it() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    assert set(world.row().standbys) == {B, C}
    world.send(A, env(1, "m"))
    world.kill(A)
    owner = world.row().owner
    other = C if owner == B else B
    assert world.row().standbys == (other,)
    world.send(owner, env(1, "m"), env(2, "n"))
    assert {reply.seq for reply in world.replies()} == {1, 2}
    world.kill(owner)
    assert world.row().owner == other and world.row().standbys == ()
    world.send(other, env(2, "n"), env(3, "o"))
    assert [reply.payload for reply in world.replies()] == [b"n", b"o"]
    assert world.ports[other].ran == ["o"]


def test_a_standby_that_came_second_follows_the_first_without_leaving_the_row() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    world.send(A, env(1, "m"))
    world.deaf.add(C)
    at, port = world.cores[C], world.ports[C]
    world.silent.add(A)
    at.node_dead(A, world.now_ms)
    port.reads.clear()
    at.standbys.standby_row(SERVER, RowRead(True, *world.rows[SERVER]), world.now_ms)
    world.run()
    assert port.swaps  # It has asked, and the other one is quicker.
    world.cores[B].node_dead(A, world.now_ms)
    world.run()
    assert world.row().owner == B and world.row().standbys == (C,)
    epoch = world.row().epoch
    world.send(B, env(2, "n"))
    assert [reply.seq for reply in world.replies() if reply.seq == 2] == []
    world.deaf.clear()
    world.run()
    assert [reply.seq for reply in world.replies() if reply.seq == 2] == [2]
    assert (world.row().epoch, world.row().standbys) == (epoch, (C,))
    assert (C, Changed.LOST) not in world.ports[B].changed
    world.kill(B)
    assert world.row().owner == C
    world.send(C, env(2, "n"), env(3, "o"))
    assert world.ports[C].ran == ["o"]


def test_an_owner_that_was_replaced_cannot_feed_a_standby_of_the_next_one() -> None:
    # Seed 68 of the simulator: what it sent took the place of what the next owner had sent.
    world = World(A, B, C)
    world.own(A)
    world.replicate(B)
    world.send(A, env(1, "m"))
    world.silent.add(A)
    world.cores[B].standbys.node_suspected(A, world.now_ms)
    world.run()
    assert world.cores[B].standbys.replicate(SERVER, (C,), Mode.SYNC, world.now_ms)
    world.run()
    world.send(B, env(2, "n"))
    assert world.row().owner == B and world.row().standbys == (C,)
    world.silent.clear()
    world.deaf.add(A)
    world.ports[A].take()
    assert world.cores[A].standbys.replicate(SERVER, (B, C), Mode.SYNC, world.now_ms)
    world.later(1_000)
    world.silent.add(A)
    world.kill(B)
    assert world.row().owner == C
    world.send(C, env(2, "n"), env(3, "o"))
    assert world.ports[C].ran == ["o"]


def test_a_request_that_was_answered_out_of_turn_is_not_run_when_it_is_repeated() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.ports[A].busy = True
    world.send(A, env(1, "m"))
    # What comes back to the server along its own chain is refused at once.
    world.send(A, env(2, "n", chain=(f"{SERVER}/1",)))
    assert [(reply.seq, reply.status) for reply in world.replies()] == [(2, CYCLE)]
    world.kill(A)
    # Its sender has not got that, and asks again, the later one first.
    world.send(B, env(2, "n", chain=(f"{SERVER}/1",)))
    assert [(reply.seq, reply.status) for reply in world.replies()] == [(2, CYCLE)]
    world.send(B, env(1, "m"), env(3, "o"))
    assert world.ports[B].ran == ["m", "o"]


def asks(world: World, at: NodeId, what: str, run: str, to: str = OTHER, kind: int = CALL) -> Any:
    inc = world.cores[at].hosted[SERVER]
    out = Outgoing(kind, what, what.encode(), None, (), 0, what, run)
    world.cores[at].request(inc.sender, to, out, world.now_ms)
    world.run()
    return out


def test_a_request_in_the_middle_of_a_run_leaves_when_its_step_is_kept_and_is_repeated() -> None:
    world = World(A, B, C)
    world.own(A)
    world.own(C, OTHER)
    world.replicate(B)
    for name in (A, B):
        world.cores[name].route_hint(OTHER, C, 1)
        world.ports[name].busy = True
    world.send(A, env(1, "m"))
    world.dropped = [Kept]
    asks(world, A, "fetch", f"{SERVER}/1")
    assert world.ports[C].ran == []
    world.dropped = []
    world.later(300)
    assert world.ports[C].ran == ["fetch"]
    world.kill(A)
    # It is run first, although its caller has not asked again; its request is the same one.
    assert world.ports[B].ran == ["m"]
    asks(world, B, "fetch", f"{SERVER}/1")
    assert world.ports[C].ran == ["fetch"]
    assert ("fetch", OK, b"fetch") in world.ports[B].resolved
    world.cores[B].finish(*world.ports[B].began[-1], OK, b"done", None, world.now_ms)
    world.send(B, env(1, "m"))
    assert [reply.payload for reply in world.replies()][-1] == b"done"
    assert world.ports[B].ran == ["m"]


def test_a_run_that_does_not_repeat_its_requests_ends_diverged_and_uses_their_numbers() -> None:
    world = World(A, B, C)
    world.own(A)
    world.own(C, OTHER)
    world.replicate(B)
    for name in (A, B):
        world.cores[name].route_hint(OTHER, C, 1)
        world.ports[name].busy = True
    world.send(A, env(1, "m"))
    asks(world, A, "fetch", f"{SERVER}/1")
    world.kill(A)
    out = asks(world, B, "something else", f"{SERVER}/1")
    assert ("something else", DIVERGED, b"") in world.ports[B].resolved and out.seq == 0
    world.cores[B].finish(*world.ports[B].began[-1], OK, b"done", None, world.now_ms)
    world.run()
    world.send(B, env(1, "m"), env(2, "n"))
    assert [reply.status for reply in world.replies()][-1] == DIVERGED
    asks(world, B, "later", f"{SERVER}/2")
    assert world.ports[C].ran == ["fetch", "later"]


def test_a_request_that_never_got_a_number_comes_to_the_same_end_when_it_is_made_again() -> None:
    """Seed 199 of the journals' schedules: nobody knew of it, so that the next one seemed to be
    another than before.
    """
    world = World(A, B, C)
    world.own(A)
    world.own(C, OTHER)
    world.own(B, "third")
    world.replicate(B)
    for name in (A, B):
        world.cores[name].route_hint(OTHER, C, 1)
        world.cores[name].route_hint("third", B, 1)
        world.ports[name].busy = True
    world.silent.add(C)
    world.send(A, env(1, "m"))
    run = f"{SERVER}/1"
    asks(world, A, "one", run)
    inc = world.cores[A].hosted[SERVER]
    inc.sender.sessions[OTHER].window = 1
    two = Outgoing(CALL, "two", b"two", None, (), world.now_ms + 100, "two", run)
    world.cores[A].request(inc.sender, OTHER, two, world.now_ms)
    waits = asks(world, A, "waits", run)
    world.later(200)
    assert ("two", FULL, b"") in world.ports[A].resolved and two.seq == waits.seq == 0
    third = asks(world, A, "three", run, to="third")
    world.kill(A)
    asks(world, B, "one", run)
    asks(world, B, "two", run)
    assert ("two", FULL, b"") in world.ports[B].resolved
    # This one had neither come to an end nor got a number: now there is room.
    assert asks(world, B, "waits", run).seq == 2
    assert asks(world, B, "three", run, to="third").seq == third.seq == 1
    assert DIVERGED not in [status for _, status, _ in world.ports[B].resolved]


def test_a_request_made_anew_because_its_server_was_lost_is_known_to_the_next_failover() -> None:
    """Seed 3 of the journals' schedules: it had two records then, and one was left over."""
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    lost = structs.replace(world.row(), server=OTHER, state=RowState.LOST)
    run = f"{SERVER}/1"
    for at, survivor in ((A, B), (B, C), (C, "")):
        world.ports[at].busy = True
        if at is A:
            world.send(A, env(1, "m"))
        for what in ("one", "two"):
            asks(world, at, what, run)
            for _ in range(5):
                world.later(100)
                world.cores[at].located(OTHER, True, lost, world.now_ms)
                world.run()
            assert [item[1] for item in world.ports[at].resolved if item[0] == what] == [LOST]
        if survivor:
            world.ports[survivor].busy = True
            world.kill(at)
    world.cores[C].finish(*world.ports[C].began[-1], OK, b"done", None, world.now_ms)
    world.run()
    world.send(C, env(1, "m"))
    assert [reply.status for reply in world.replies()][-1] == OK


def test_what_was_asked_of_a_server_before_it_went_back_is_never_asked_anew() -> None:
    """Seed 20517 of the journals' schedules: of two requests the first was told that the server
    went back, and the second was made of what is there now, where it was done already.
    """
    world = World(A, B, C)
    world.own(A)
    other = world.own(C, OTHER)
    world.replicate(B)
    for name in (A, B):
        world.cores[name].route_hint(OTHER, C, 1)
        world.ports[name].busy = True
    world.send(A, env(1, "m"))
    run = f"{SERVER}/1"
    asks(world, A, "one", run)
    asks(world, A, "two", run)
    assert world.ports[C].ran == ["one", "two"]
    other.row = structs.replace(other.row, epoch=2, generation=2)
    other.sessions.clear()
    world.kill(A)
    for what in ("one", "two"):
        asks(world, B, what, run)
        assert [item[1] for item in world.ports[B].resolved if item[0] == what] == [ROLLED_BACK]
    # What it had not asked before the failover it asks of what is there now.
    asks(world, B, "three", run)
    assert world.ports[C].ran == ["one", "two", "three"]


def test_what_a_failover_may_ask_for_again_is_not_acknowledged_to_receivers() -> None:
    world = World(A, B, C)
    world.own(A)
    other = world.own(C, OTHER)
    world.replicate(B)
    world.cores[A].route_hint(OTHER, C, 1)
    world.ports[A].busy = True
    world.send(A, env(1, "m"))
    began = world.ports[A].began[-1]
    asks(world, A, "one", f"{SERVER}/1")
    asks(world, A, "two", f"{SERVER}/1")
    (session,) = other.sessions.values()
    assert sorted(session.records) == [1, 2] and session.acked_below == 1
    world.cores[A].finish(*began, OK, b"", None, world.now_ms)
    world.later(1_000)
    assert not session.records


def test_a_move_takes_the_standbys_along() -> None:
    world = World(A, B, C)
    inc = world.own(A)
    world.replicate(B)
    world.send(A, env(1, "m"))
    # As a move's commit leaves it: C owns, B is named still, and has what A had.
    row = directory.confirmed(directory.committed(inc.row, C, "t", 1))
    record = world.cores[A].export(inc, world.now_ms)
    world.rows[SERVER] = (row, 99)
    world.silent.add(A)
    moved = world.cores[C]
    copy = restore(record, row, 99, object(), moved.route_hint, 10, world.now_ms)
    moved.take_over(copy, world.now_ms)
    moved.started(SERVER, world.now_ms)
    world.dropped = [Kept]
    world.run()
    world.send(C, env(2, "n"))
    assert not [reply for reply in world.replies() if reply.seq == 2]
    world.dropped = []
    world.later(500)
    assert [reply.seq for reply in world.replies()] == [2]
    world.kill(C)
    assert world.row().owner == B
    world.send(B, env(2, "n"), env(3, "o"))
    assert world.ports[B].ran == ["o"]


def test_a_standby_that_took_over_acknowledges_nothing_that_another_one_may_ask_for_again() -> None:
    """Seed 7627 of the standbys' schedules: of two standbys one had the answer to a request, and
    took over; the other had not, and took over next. The request was carried out twice.
    """
    world = World(A, B, C, "d")
    world.own(A)
    other = world.own("d", OTHER)
    world.replicate(B, C)
    for name in (A, B, C):
        world.cores[name].route_hint(OTHER, "d", 1)
        world.ports[name].busy = True
    world.send(A, env(1, "m"))
    began = world.ports[A].began[-1]
    asks(world, A, "one", f"{SERVER}/1")
    receive = world.cores[C].receive

    def without_cuts(sender: NodeId, messages: list[Message], now_ms: int) -> list[Message]:
        return receive(sender, [it for it in messages if type(it) is not Cut], now_ms)

    world.cores[C].receive = without_cuts  # type: ignore[method-assign]
    world.cores[A].finish(*began, OK, b"", None, world.now_ms)
    world.run()
    world.silent.add(A)
    world.cores[B].node_dead(A, world.now_ms)  # C does not know it yet, and keeps what it has.
    world.run()
    assert world.row().owner == B and world.row().standbys == (C,)
    (sending,) = world.cores[B].hosted[SERVER].sender.sessions.values()
    assert sending.low == 2 and not sending.outstanding
    asks(world, B, "more", "")
    world.later(500)
    (session,) = other.sessions.values()
    assert 1 in session.records and session.acked_below == 1
    # All of it may be forgotten as soon as C has a cut of the present owner's.
    world.cores[C].receive = receive  # type: ignore[method-assign]
    world.later(1_500)
    assert 1 not in session.records and session.acked_below >= 2


def begin_move(world: World, to: NodeId) -> None:
    """As far as the target's copy, with the real messages."""
    world.cores[A].move(SERVER, to, "t", False, "", world.now_ms)
    world.run()
    at, port = world.cores[to], world.ports[to]
    if port.did(CheckClass):
        at.move_event("t", True, Checked(1), world.now_ms)
        world.run()


def ship(world: World, to: NodeId) -> None:
    inc = world.cores[A].freeze("t", world.now_ms)
    assert inc is not None
    record = world.cores[A].export(inc, world.now_ms)
    world.cores[A].move_event("t", False, Encoded(b"last"), world.now_ms)
    world.run()
    (decode,) = world.ports[to].did(DecodeState)
    assert decode.ahead and decode.stream
    assert world.cores[to].install("t", record, object(), world.now_ms) is not None
    world.cores[to].move_event("t", True, Decoded(), world.now_ms)


def test_a_move_to_a_standby_ships_only_the_last_of_its_stream() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.send(A, env(1, "m"))
    begin_move(world, B)
    assert world.ports[A].did(EncodeState) == [EncodeState(1, True, ANY)]
    ship(world, B)
    world.run()
    ((transfer, stream, _),) = world.ports[B].adopted
    assert world.ports[A].adopted == [(transfer, stream, False)]
    (swap,) = world.ports[A].did(SwapRow)
    assert swap.row.owner == B and swap.row.standbys == ()
    result = world._swap(swap.row, swap.rev)
    world.cores[A].move_event("t", False, result, world.now_ms)
    world.run()
    assert SERVER in world.cores[B].hosted and SERVER not in world.cores[B].standbys.backups


def test_what_a_move_left_at_a_standby_takes_over_if_the_owner_dies_before_the_commit() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.send(A, env(1, "m"))
    begin_move(world, B)
    ship(world, B)
    world.kill(A)
    assert world.row().owner == B and SERVER in world.cores[B].hosted
    assert not world.cores[B].moves_in
    world.send(B, env(1, "m"), env(2, "n"))
    assert world.ports[B].ran == ["n"]


def test_a_move_to_a_standby_that_is_given_up_costs_the_standby_and_not_the_server() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    begin_move(world, B)
    ship(world, B)
    why = Withdraw("somebody changed their mind")
    world.cores[A].withdraw_move("t", why, world.now_ms)
    world.deaf.add(A)
    world.run()
    world.cores[A].started(SERVER, world.now_ms)
    world.send(A, env(1, "m"))
    world.later(500)
    assert not world.replies()  # B has not got it
    # If A died now, B would go on with what the move left there.
    assert world.cores[B].standbys.backups[SERVER].copy is not None
    world.deaf.clear()
    world.later(500)
    assert [reply.seq for reply in world.replies()] == [1]
    assert world.row().standbys == ()


def test_a_handler_that_may_wait_is_not_begun_before_a_moved_server_has_fed_its_standbys() -> None:
    world = World(A, B, C)
    world.own(A)
    world.own(C, OTHER)
    world.replicate(B, C)
    begin_move(world, B)
    ship(world, B)
    world.run()
    (swap,) = world.ports[A].did(SwapRow)
    result = world._swap(swap.row, swap.rev)
    world.ports[B].busy = True
    world.cores[B].route_hint(OTHER, C, 1)
    world.dropped = [Dropped]  # so that it is live, and not released
    world.cores[A].move_event("t", False, result, world.now_ms)
    world.run()
    world.cores[B].started(SERVER, world.now_ms)
    world.send(B, env(1, "m"))
    assert world.ports[B].ran == []
    world.dropped = []
    world.cores[B].receive(A, [Dropped("t")], world.now_ms)
    world.run()
    assert world.ports[B].ran == ["m"]
    asks(world, B, "fetch", f"{SERVER}/1")
    world.later(300)
    assert world.ports[C].ran == ["fetch"]


def test_an_asynchronous_standby_that_takes_over_begins_a_new_generation() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B, mode=Mode.ASYNC)
    world.later(100)
    assert world.row().mode is Mode.ASYNC and world.row().standbys == (B,)
    world.dropped = [Kept]
    world.send(A, env(1, "m"))
    assert [reply.seq for reply in world.replies()] == [1]  # waits for nobody
    world.dropped = []
    world.kill(A)
    row = world.row()
    assert row.owner == B and row.generation == row.epoch and row.rollbacks


def test_asynchronous_standbys_lag_within_bounds() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B, mode=Mode.ASYNC)
    world.later(100)
    world.dropped = [Kept]
    world.send(A, env(1, "m"))
    world.later(1_500)
    world.replies()
    world.send(A, env(2, "n"))
    assert not world.replies()
    world.dropped = []
    world.later(500)
    assert [reply.seq for reply in world.replies()] == [2]


def cuts_at(world: World, node: NodeId) -> list[int]:
    """The numbers of the cuts that a node gets from now on."""
    numbers: list[int] = []
    receive = world.cores[node].receive

    def recorded(sender: NodeId, messages: list[Message], now_ms: int) -> list[Message]:
        numbers.extend(message.number for message in messages if type(message) is Cut)
        return receive(sender, messages, now_ms)

    world.cores[node].receive = recorded  # type: ignore[method-assign]
    return numbers


def test_an_asynchronous_server_makes_one_cut_of_what_changes_in_a_while() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B, mode=Mode.ASYNC)
    world.later(100)
    cuts = cuts_at(world, B)
    for seq in range(1, 6):
        world.send(A, env(seq, "m"))
    assert not cuts and [reply.seq for reply in world.replies()] == [1, 2, 3, 4, 5]
    world.later(50)
    assert len(cuts) == 1
    # Nor is there another as soon as this one is acknowledged.
    world.dropped = [Kept]
    world.send(A, env(6, "m"))
    world.later(50)
    assert len(cuts) == 2
    world.send(A, env(7, "m"))
    world.dropped = []
    backup = world.cores[B].standbys.backups[SERVER]
    kept = Kept(backup.stream, backup.epoch, backup.number)
    world.cores[A].receive(B, [kept], world.now_ms)
    world.run()
    assert len(cuts) == 2
    world.later(50)
    assert len(cuts) == 3


def test_an_asynchronous_server_whose_handlers_always_wait_is_cut_between_two_of_them() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B, mode=Mode.ASYNC)
    world.later(100)
    cuts = cuts_at(world, B)
    busy(world)
    world.send(A, *(env(seq, "m") for seq in range(1, 30)))
    for _ in range(20):
        (run,) = inc.running
        world.later(50)  # The time of the cut comes while the handler waits.
        assert inc.running
        world.cores[A].finish(inc, inc.running[run], OK, b"", None, world.now_ms)
        world.run()
    assert len(cuts) == 20 and inc.mailbox and not inc.gated


def test_a_state_that_cannot_travel_leaves_its_server_alone_and_says_so() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.ports[A].uncapturable = "a socket"
    world.send(A, env(1, "m"))
    assert [reply.seq for reply in world.replies()] == [1]
    assert world.row().standbys == () and world.row().epoch == 3
    assert ("", Changed.UNCAPTURED) in world.ports[A].changed


def test_a_standby_that_cannot_load_what_it_has_says_so_and_the_server_is_lost() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    at, port = world.cores[B], world.ports[B]
    at.node_dead(A, world.now_ms)
    at.standbys.standby_row(SERVER, RowRead(True, *world.rows[SERVER]), world.now_ms)
    port.reads.clear()
    assert not at.may_bury(world.row())
    (backup,) = _taken(port.loads)
    at.standbys.backup_loaded(backup, None, "a module is missing", world.now_ms)
    world.run()
    assert world.row().standbys == () and world.row().owner == A
    assert at.may_bury(world.row())
    assert (B, Changed.UNFIT) in port.changed


def test_nobody_takes_over_who_is_not_in_the_row() -> None:
    world = World(A, B)
    world.own(A)
    world.dropped = [Kept]
    world.replicate(B)
    assert world.row().standbys == ()
    assert SERVER in world.cores[B].standbys.backups
    world.kill(A)
    assert world.row().owner == A
    assert SERVER not in world.cores[B].standbys.backups


def test_replicas_end_when_nobody_is_wanted() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B)
    world.replicate()
    assert world.row().standbys == () and inc.replica is None and not inc.gated
    assert not world.cores[B].standbys.backups
    world.send(A, env(1, "m"))
    assert [reply.seq for reply in world.replies()] == [1]


def test_a_change_of_mode_lets_all_standbys_join_again() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.replicate(B, mode=Mode.ASYNC)
    world.later(500)
    assert world.row().mode is Mode.ASYNC and world.row().standbys == (B,)
    world.replicate(B)
    world.later(500)
    assert world.row().mode is Mode.SYNC and world.row().standbys == (B,)
    assert world.cores[A].hosted[SERVER].gated


def test_lost_cuts_come_again_in_order() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.dropped = [Cut]
    world.send(A, env(1, "m"))
    world.dropped = []
    world.send(A, env(2, "n"))
    assert not world.replies()
    world.later(300)
    assert [reply.seq for reply in world.replies()] == [1, 2]


@pytest.mark.parametrize("when", [SwapOutcome.UNKNOWN, SwapOutcome.NOT_DONE])
def test_a_promotion_in_doubt_is_asked_for_again_and_nothing_is_served_meanwhile(
    when: SwapOutcome,
) -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.deaf.add(B)
    world.kill(A)
    at, port = world.cores[B], world.ports[B]
    port.reads.clear()
    at.standbys.standby_row(SERVER, RowRead(True, *world.rows[SERVER]), world.now_ms)
    world.run()
    ((row, rev),) = _taken(port.swaps)
    if when is SwapOutcome.UNKNOWN:
        world._swap(row, rev)
    at.standbys.promoted(SERVER, row, SwapResult(when, None, 0), world.now_ms)
    assert SERVER not in at.hosted
    world.deaf.clear()
    world.later(600)
    assert SERVER in at.hosted and world.row() == row


def test_the_owner_wins_against_a_standby_that_only_suspected_it() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B)
    at, port = world.cores[B], world.ports[B]
    world.deaf.add(B)
    at.standbys.node_suspected(A, world.now_ms)
    port.reads.clear()
    before = world.rows[SERVER]
    world.replicate(B, C)
    assert set(world.row().standbys) == {B, C}
    # It had read the row before that.
    at.standbys.standby_row(SERVER, RowRead(True, *before), world.now_ms)
    at.standbys.node_heard(A, world.now_ms)
    world.deaf.clear()
    world.later(4_000)
    assert world.row().owner == A
    world.send(A, env(1, "m"))
    world.later(500)
    assert [reply.seq for reply in world.replies()] == [1]


def test_messages_of_no_stream_here_are_refused() -> None:
    world = World(B)
    cut_of = Cut("stream", SERVER, 1, 1, False, None, b"")  # type: ignore[arg-type]
    world.cores[B].receive(A, [cut_of], world.now_ms)
    (node, refused), *_ = world.ports[B].take()
    assert node == A and isinstance(refused, KeepRefused) and refused.epoch == 0


# -- what the simulator found


def test_a_new_owner_asks_its_standbys_again_if_the_first_time_is_lost() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    world.dropped = [Follow]
    world.kill(A)
    world.dropped = []
    world.later(500)
    owner = world.row().owner
    assert world.row().standbys == (C if owner == B else B,)
    world.send(owner, env(1, "m"))
    assert [reply.seq for reply in world.replies()] == [1]


def test_a_standby_that_has_lost_its_copy_takes_itself_out_of_the_row_of_a_dead_owner() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.cores[B].standbys.backups.clear()
    world.kill(A)
    rows = list(world.rows.values())
    world.cores[B].burials(A, rows, world.now_ms)
    world.run()
    assert world.row().owner == A and world.row().standbys == ()
    assert world.cores[B].may_bury(world.row())
    assert not world.cores[B].standbys.backups


def test_a_standby_that_was_not_told_that_it_is_none_finds_out() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.dropped = [Unfollow]
    world.replicate()
    world.dropped = []
    assert SERVER in world.cores[B].standbys.backups
    world.later(60_000)
    assert not world.cores[B].standbys.backups
    assert SERVER in world.ports[B].streams_ended[-1]


def test_a_backup_of_a_server_that_is_gone_is_dropped_and_one_in_the_row_is_kept() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.later(200_000)
    assert world.cores[B].standbys.backups and world.row().standbys == (B,)
    world.cores[A].stop(SERVER, world.now_ms)
    world.dropped = [Unfollow]
    del world.rows[SERVER]
    world.cores[A].removal_ended(SERVER, SwapOutcome.DONE, world.now_ms)
    world.later(200_000)
    assert not world.cores[B].standbys.backups


def test_an_idle_standby_that_has_lost_its_copy_is_found_out() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B)
    world.cores[B].standbys.backups.clear()
    world.later(60_000)
    assert (B, Changed.LOST) in world.ports[A].changed
    assert world.row().standbys == ()


def test_an_owner_that_nobody_calls_is_told_of_its_successor_until_it_hears_it() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.silent.add(A)
    world.cores[B].standbys.node_suspected(A, world.now_ms)
    world.run()
    assert world.row().owner == B
    world.later(1_000)
    world.silent.clear()
    assert SERVER in world.cores[A].hosted
    world.later(10_000)
    assert SERVER not in world.cores[A].hosted
    assert not world.cores[B].standbys.ousted


def test_who_cannot_load_what_it_has_leaves_the_row_of_a_living_owner_alone() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    at, port = world.cores[B], world.ports[B]
    at.standbys.node_suspected(A, world.now_ms)
    port.reads.clear()
    at.standbys.standby_row(SERVER, RowRead(True, *world.rows[SERVER]), world.now_ms)
    (backup,) = _taken(port.loads)
    at.standbys.backup_loaded(backup, None, "a module is missing", world.now_ms)
    assert not port.swaps
    world.run()
    assert world.row().owner == A and world.row().standbys == ()
    assert SERVER in world.cores[A].hosted
    world.send(A, env(1, "m"))
    assert [reply.seq for reply in world.replies()] == [1]


def test_a_standby_that_is_waited_for_gets_its_whole_cut_however_many_cuts_are_on_the_way() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    world.kill(A)
    # One of the two took over. Another one is to stand by, too, and is quicker than the first.
    owner = world.row().owner
    at = world.cores[owner]
    inc = at.hosted[SERVER]
    replica = inc.replica
    assert replica is not None
    replica.cuts.extend([90, 91])
    (follower,) = replica.followers.values()
    follower.phase = FollowerPhase.DUE
    at.standbys.cut_soon(inc, world.now_ms)
    world.run()
    at.flush(world.now_ms)
    assert follower.phase is FollowerPhase.FED


def test_a_standby_takes_over_although_a_move_was_not_confirmed_yet() -> None:
    world = World(A, B, C)
    inc = world.own(A)
    world.replicate(B)
    world.rows[SERVER] = (
        structs.replace(directory.committed(inc.row, C, "t", 1), previous=A),
        99,
    )
    at = world.cores[B]
    for name in (A, B):
        world.cores[name].node_dead(C, world.now_ms)
    world.silent.add(C)
    at.burials(C, list(world.rows.values()), world.now_ms)
    world.run()
    assert world.row().owner == B


def test_what_an_asynchronous_server_held_back_leaves_when_its_standbys_have_caught_up() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B, mode=Mode.ASYNC)
    world.later(100)
    replica = inc.replica
    assert replica is not None
    inc.gated = True
    replica.unnoted.append((CLIENT, Reply("session", 1, OK, b"")))
    world.cores[A].standbys._catch_up(inc, replica, world.now_ms)
    world.run()
    assert len(world.replies()) == 1 and not replica.held


def test_moves_that_waited_for_standbys_keep_to_the_limit_of_moves() -> None:
    world = World(A, B)
    at = world.cores[A]
    inc = world.own(A)
    world.own(A, OTHER)
    world.replicate(B)
    most = at.options.moves_max
    at.options = dataclasses.replace(at.options, moves_max=1)
    world.deaf.add(A)
    world.replicate()
    at.move(SERVER, B, "t1", False, "", world.now_ms)
    at.move(OTHER, B, "t2", False, "", world.now_ms)
    assert SERVER in at.delayed and list(at.moves_out) == ["t2"] and most > 1
    world.dropped = [Prepare]
    world.deaf.clear()
    world.run()
    assert inc.row.standbys == ()
    assert list(at.moves_out) == ["t2"] and not at.delayed


def test_an_asynchronous_standby_begins_with_the_first_cut_and_no_later_one() -> None:
    world = World(A, B)
    world.own(A)
    world.dropped = [Cut]
    world.replicate(B, mode=Mode.ASYNC)
    world.later(50)
    world.dropped = []
    world.send(A, env(1, "m"))
    world.later(50)
    # The second cut has come, and says only what changed of the object since the first.
    assert not world.cores[B].standbys.backups
    world.later(600)
    assert world.cores[B].standbys.backups and world.row().standbys == (B,)


def busy(world: World) -> None:
    """From now on handlers may wait, and do."""
    for port in world.ports.values():
        port.busy = True


def test_a_handler_that_may_wait_is_not_begun_before_the_standbys_have_their_whole_cut() -> None:
    # Else what it asks for waits for that cut, and that cut for its end.
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    busy(world)
    world.dropped = [Following]
    world.kill(A)
    owner = world.row().owner
    world.send(owner, env(1, "m"))
    assert not world.ports[owner].began
    world.dropped = []
    world.later(500)
    assert world.ports[owner].ran == ["m"]


def test_a_handler_that_may_wait_is_not_begun_while_a_task_of_another_is_running() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B)
    at = world.cores[A]
    at.background(inc, 1, world.now_ms)
    world.send(A, env(1, "m"))
    busy(world)
    world.send(A, env(2, "n"))
    assert world.ports[A].ran == ["m"] and not world.replies()
    at.background(inc, -1, world.now_ms)
    world.run()
    assert world.ports[A].ran == ["m", "n"]
    assert [reply.seq for reply in world.replies()] == [1]


def test_what_a_move_brings_begins_when_the_standbys_are_fed() -> None:
    world = World(A, B, C)
    inc = world.own(A)
    world.replicate(B)
    row = directory.committed(inc.row, C, "t", 1)
    record = world.cores[A].export(inc, world.now_ms)
    at = world.cores[C]
    copy = restore(record, row, 99, object(), at.route_hint, 10, world.now_ms)
    at._settle_in(copy)  # live, and not released
    copy.row, copy.rev = row, 99
    at.started(SERVER, world.now_ms)
    busy(world)
    world.send(C, env(1, "m"))
    assert copy.holding and not world.ports[C].began


def test_a_cast_that_was_acknowledged_is_not_given_up_for_room() -> None:
    world = World(A, B)
    world.own(A, limit=2)
    world.replicate(B)
    busy(world)
    world.send(A, env(1, "a call"), env(2, "a cast", CAST))
    world.send(A, env(3, "another", CAST))
    assert max(receipt.admitted_below for receipt in world.replies(Receipt)) == 4
    world.kill(A)
    inc = world.cores[B].hosted[SERVER]
    (session,) = inc.sessions.values()
    assert sorted(session.early) == [2, 3] and inc.limit == 2
    world.ports[B].busy = False
    world.send(B, env(1, "a call"))
    assert world.ports[B].ran == ["a call", "a cast", "another"]


def test_an_acknowledged_cast_that_came_early_goes_on_to_the_next_standby_and_move() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    busy(world)
    world.send(A, env(1, "a call"), env(2, "a cast", CAST))
    world.kill(A)
    owner = world.row().owner
    other = B if owner == C else C
    world.later(300)
    record = world.cores[owner].export(world.cores[owner].hosted[SERVER], world.now_ms)
    assert [item.kept for item in record.sessions[0].early] == [True]
    world.kill(owner)
    world.ports[other].busy = False
    world.send(other, env(1, "a call"))
    assert world.ports[other].ran == ["a call", "a cast"]


def test_requests_that_are_to_be_made_again_go_on_to_the_next_standby_and_move() -> None:
    world = World(A, B, C)
    world.own(A)
    world.own(A, OTHER)
    world.replicate(B, C)
    busy(world)
    world.send(A, env(1, "m"))
    asks(world, A, "fetch", f"{SERVER}/1")
    world.dropped = [Following]
    world.kill(A)
    owner = world.row().owner
    other = B if owner == C else C
    inc = world.cores[owner].hosted[SERVER]
    record = world.cores[owner].export(inc, world.now_ms)
    assert [step.method for step in record.replays] == ["fetch"]
    copy = restore(record, inc.row, 99, object(), world.cores[A].route_hint, 10, world.now_ms)
    assert copy.sender.replays == inc.sender.replays
    # The next standby is fed before the handler has made its request again.
    world.dropped = []
    world.later(300)
    world.kill(owner)
    replays = world.cores[other].hosted[SERVER].sender.replays
    assert replays is not None
    assert [step.method for steps in replays.values() for step in steps] == ["fetch"]


def test_what_was_begun_before_a_failover_is_carried_out_though_its_time_is_over() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    busy(world)
    world.send(A, env(1, "m", timeout_ms=1_000))
    asks(world, A, "fetch", f"{SERVER}/1")
    world.dropped = [Following]
    world.kill(A)
    # It is not begun before its standby is fed, or is given up.
    owner = world.row().owner
    assert not world.ports[owner].ran
    world.later(4_000)
    assert world.ports[owner].ran == ["m"]


def test_a_wait_for_an_answer_that_is_held_back_is_no_knot() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.dropped = [Kept]
    world.send(A, env(1, "m"))
    busy(world)
    world.send(A, env(2, "n"))
    asks(world, A, "fetch", f"{SERVER}/2")
    at = world.cores[A]
    (session,) = at.hosted[SERVER].sessions
    at.route_hint(OTHER, C, 1)
    at.receive(C, [WaitProbe(SERVER, session, 1, (f"{OTHER}/1",))], world.now_ms)
    world.run()
    assert not world.replies(WaitProbe)


def test_what_is_said_again_costs_the_log_nothing() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B)
    world.send(A, env(1, "m"))
    busy(world)
    world.send(A, env(2, "n"))
    replica = inc.replica
    assert replica is not None
    number = replica.number
    world.replies()
    world.send(A, env(1, "m"), env(2, "n"), env(1, "m"))
    assert replica.number == number
    assert [reply.seq for reply in world.replies()] == [1, 1]
    assert world.replies(Receipt)


def test_an_answer_that_waits_for_its_cut_is_held_once() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B)
    at = world.cores[A]
    at.background(inc, 1, world.now_ms)  # so there is no cut
    world.send(A, env(1, "m"), env(1, "m"), env(1, "m"))
    assert inc.replica is not None and len(inc.replica.uncut) == 1


def test_a_plain_handler_that_asks_for_something_is_followed_by_a_cut() -> None:
    world = World(A, B)
    inc = world.own(A)
    at, port = world.cores[A], world.ports[A]
    run = port.run

    def asking(inc: Incarnation, entry: Any) -> Any:
        out = Outgoing(CAST, "told", b"", None, (), 0, None, f"{SERVER}/{entry.run}")
        at.request(inc.sender, OTHER, out, world.now_ms)
        return run(inc, entry)

    port.run = asking  # type: ignore[method-assign]
    at.background(inc, 1, world.now_ms)
    world.replicate(B)
    at.background(inc, -1, world.now_ms)
    at.standbys.due.clear()
    world.dropped = [Kept]
    world.send(A, env(1, "m"))
    assert inc.replica is not None and not inc.replica.due


def test_a_node_that_a_move_named_owner_and_that_has_nothing_leaves_it_to_a_standby() -> None:
    world = World(A, B, C)
    inc = world.own(A)
    world.replicate(B)
    committed = structs.replace(directory.committed(inc.row, C, "t", 1), previous=A)
    world.rows[SERVER] = (committed, 99)
    world.silent.add(A)
    for name in (B, C):
        world.cores[name].node_dead(A, world.now_ms)
    assert not world.cores[C].may_bury(committed)
    world.cores[B].burials(A, list(world.rows.values()), world.now_ms)
    world.run()
    assert world.row().owner == C  # which may have got it, and be about to say so
    _, again = world.cores[C].burials(A, list(world.rows.values()), world.now_ms)
    world.run()
    assert again and world.row().owner == A and world.row().state is RowState.ACTIVE
    world.cores[B].burials(A, list(world.rows.values()), world.now_ms)
    world.run()
    assert world.row().owner == B


def test_a_move_that_counts_on_a_standby_fails_if_it_is_none_any_more() -> None:
    at, port = core(B)
    prepare = Prepare("t", SERVER, 2, "Cls", 1, False, "", stream="srv/a@1/1/1")
    backup = Backup(Follow("srv/a@1/1/1", SERVER, 2, "Cls", 1, False, ""), A, NOW)
    at.standbys.backups[SERVER] = backup
    backup.valid = True
    at.receive(A, [prepare], NOW)
    at.move_event("t", True, Checked(1), NOW)
    del at.standbys.backups[SERVER]
    port.take()
    at.receive(A, [Final("t", SERVER, 2, b"state", 0, "srv/a@1/1/1")], NOW)
    assert [type(message) for _, message in port.take()] == [FinalFailed]
    assert not port.did(DecodeState)


def test_a_server_leaves_when_its_standbys_have_all_that_they_were_sent() -> None:
    world = World(A, B, C)
    inc = world.own(A, timers=[("tick", 100)])
    world.replicate(B)
    at = world.cores[A]
    world.dropped = [Kept]
    world.later(150)  # it has ticked, which nobody waits for
    assert inc.replica is not None and inc.replica.gating()[0].unacked
    at.move(SERVER, C, "t", False, "", world.now_ms)
    at.receive(C, [Prepared("t", 1)], world.now_ms)
    assert not world.ports[A].did(EncodeState)
    world.dropped = []
    at.peer_up(B, world.now_ms)
    world.run()
    assert world.ports[A].did(EncodeState)


def test_nothing_leaves_before_the_standbys_know_which_generation_it_is_meant_for() -> None:
    world = World(A, B, C)
    world.own(A)
    world.own(C, OTHER)
    world.replicate(B)
    at = world.cores[A]
    busy(world)
    world.send(A, env(1, "m"))
    asks(world, A, "fetch", f"{SERVER}/1")  # nobody knows yet where that is
    assert not world.ports[C].ran
    world.dropped = [Kept]
    row = structs.replace(world.rows[OTHER][0], epoch=7)
    at.located(OTHER, True, row, world.now_ms)
    world.run()
    assert not world.ports[C].ran
    steps = world.cores[B].standbys.backups[SERVER].image.steps
    assert [step.generation for step in steps] == [0, 7]
    record, replays = world.cores[B].standbys.backups[SERVER].image.state(SERVER, world.now_ms)
    assert [record.sending[0].generation, len(replays)] == [7, 1]
    assert [len(steps) for steps in replays.values()] == [1]
    world.dropped = []
    world.later(300)
    assert world.ports[C].ran == ["fetch"]


def test_a_server_here_hears_a_sender_that_was_replaced_no_more() -> None:
    at, port = core(A)
    inc = host(at)
    other = host(at, OTHER)
    out = Outgoing(CALL, "first", b"", None, (), 0, "token", "")
    session = at.request(other.sender, SERVER, out, NOW)
    assert session is not None
    inc.sessions[session.id].sender_epoch = 5  # its successor was heard
    out = Outgoing(CALL, "second", b"", None, (), 0, "token", "")
    at.request(other.sender, SERVER, out, NOW)
    assert port.ran == ["first"] and inc.sessions[session.id].sender_epoch == 5


def test_a_request_does_not_wait_for_a_number_of_former_standbys() -> None:
    world = World(A, B, C)
    inc = world.own(A)
    world.own(C, OTHER)
    world.cores[A].route_hint(OTHER, C, 1)
    world.replicate(B)
    for seq in range(1, 6):
        world.send(A, env(seq))
    busy(world)
    world.send(A, env(6, "m"))
    world.dropped = [Envelope]
    out = asks(world, A, "fetch", f"{SERVER}/6")
    world.replicate()
    assert inc.replica is None
    world.dropped = []
    world.cores[A].finish(*world.ports[A].began[-1], OK, b"", None, world.now_ms)
    world.replicate(B)
    assert inc.replica is not None and inc.gated and out.leaves <= inc.replica.acked
    world.later(2_000)
    assert world.ports[C].ran == ["fetch"]


def test_a_first_cut_counts_what_went_ahead_of_it() -> None:
    world = World(A, B)
    world.own(A)
    at = world.cores[B]
    at.receive(A, [Follow("srv/a@1/1/1", SERVER, 1, "Cls", 1, False, "")], world.now_ms)
    at.standbys.follow_checked("srv/a@1/1/1", 1, "", world.now_ms)
    record = cut(world.cores[A].hosted[SERVER], None, world.ports[A].pack, world.now_ms)
    world.ports[B].take()
    first = Cut("srv/a@1/1/1", SERVER, 1, 1, True, record, b"", 2)
    at.receive(A, [first], world.now_ms)
    assert not at.standbys.backups
    assert [type(message) for _, message in world.ports[B].take()] == [KeepRefused]


def test_casts_behind_a_call_are_in_what_an_asynchronous_standby_goes_on_with() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B, mode=Mode.ASYNC)
    world.later(100)
    busy(world)
    # A message of another session is being handled, so that these wait; then there is a cut.
    at = world.cores[A]
    at.background(inc, 1, world.now_ms)
    inc.phase = Phase.STARTING
    world.send(A, env(1, "x", CAST), env(2, "a call"), env(3, "y", CAST))
    at.background(inc, -1, world.now_ms)
    at.standbys.cut_soon(inc, world.now_ms)
    world.later(100)
    world.kill(A)
    world.ports[B].busy = False
    world.cores[B].finish(*world.ports[B].began[0], OK, b"", None, world.now_ms)
    world.run()
    assert world.ports[B].ran == ["x", "y"]


def test_an_acknowledged_cast_is_carried_out_when_its_sender_is_gone_with_what_came_before() -> (
    None
):
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    busy(world)
    world.send(A, env(1, "a call"), env(2, "a cast", CAST), env(3, "another", CAST))
    world.kill(A)
    # Nobody repeats the call any more.
    world.ports[B].busy = False
    world.later(100)
    assert world.ports[B].ran == []
    at = world.cores[B]
    inc = at.hosted[SERVER]
    (session,) = inc.sessions.values()
    session.heard_ms -= 2 * at.options.session_expiry_ms
    at._sweep(world.now_ms)
    world.run()
    assert world.ports[B].ran == ["a cast", "another"] and inc.early == 0


def test_a_standby_that_no_row_names_is_let_go_although_it_was_about_to_be_named() -> None:
    world = World(A, B)
    inc = world.own(A)
    # The confirmation of a move came through late, so that the first swap is refused.
    row = inc.row
    world.rows[SERVER] = (row, 50)
    world.dropped = [Kept]
    world.replicate(B)
    replica = inc.replica
    assert replica is not None
    (follower,) = replica.followers.values()
    follower.configured = True
    replica.swap, replica.swap_rev = directory.configured(row, (B,), Mode.SYNC, "", "t"), 1
    replica.asked = True
    world.ports[A].swaps.clear()
    world.cores[A].standbys.configured(
        SERVER, replica.swap, SwapResult(SwapOutcome.REFUSED, row, 50), world.now_ms
    )
    world.silent.add(B)
    world.cores[A].node_dead(B, world.now_ms)
    world.dropped = []
    world.run()
    assert not replica.followers and world.row().standbys == ()


def test_an_asynchronous_server_that_is_frozen_lets_nothing_out() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B, mode=Mode.ASYNC)
    world.later(100)
    replica = inc.replica
    assert replica is not None
    inc.gated = True
    replica.unnoted.append((CLIENT, Reply("session", 1, OK, b"")))
    inc.phase = Phase.FROZEN
    world.cores[A].standbys._catch_up(inc, replica, world.now_ms)
    world.run()
    assert not world.replies()


def test_results_that_a_closed_session_left_behind_are_freed_though_its_node_died() -> None:
    world = World(A, B)
    world.own(B, OTHER)
    inc = world.own(A)
    at = world.cores[A]
    sid = session_id(OTHER, NOW, 1)
    # Its owner had closed it, which was not heard, and died; OTHER goes on at B.
    world.send(A, env(1, "m", session=sid, reply_to=C))
    at.node_dead(C, world.now_ms)
    at.route_hint(OTHER, B, 1)
    at.open_session(inc.sender, OTHER, world.now_ms)
    session = inc.sessions[sid]
    assert list(session.records) == [1]
    session.heard_ms -= 2 * at.options.session_expiry_ms
    at._sweep(world.now_ms)
    world.run()
    assert session.ended and not session.records


def test_a_move_that_waits_for_a_swap_ends_with_its_server() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B)
    world.deaf.add(A)
    world.replicate()
    at = world.cores[A]
    assert at.stop(SERVER, world.now_ms)
    at.move(SERVER, B, "t", False, "", world.now_ms)
    assert SERVER in at.delayed
    inc.removal = Removal.ASKED
    at.removal_ended(SERVER, SwapOutcome.DONE, world.now_ms)
    assert not at.delayed and SERVER not in at.leaving
    assert world.ports[A].did(Finish)


def test_a_move_does_not_wait_for_a_swap_for_ever() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.deaf.add(A)  # as a directory, or the disk of a journal, that hangs
    world.replicate()
    at = world.cores[A]
    at.move(SERVER, B, "t", False, "", world.now_ms)
    at.tick(world.now_ms + at.options.move.quiesce_ms - 1)
    assert SERVER in at.delayed
    at.tick(world.now_ms + at.options.move.quiesce_ms)
    assert not at.delayed and SERVER not in at.leaving
    (finish,) = world.ports[A].did(Finish)
    assert finish.result is Result.ROLLED_BACK and "too long" in finish.reason


def test_what_was_asked_for_while_a_standby_was_joining_is_known_to_it_when_it_has_joined() -> None:
    world = World(A, B, C)
    world.own(A)
    world.own(C, OTHER)
    for name in (A, B):
        world.cores[name].route_hint(OTHER, C, 1)
    world.dropped = [Kept]
    world.replicate(B)  # it has the whole, and is not waited for yet
    inc = world.cores[A].hosted[SERVER]
    assert not inc.gated
    out = Outgoing(CALL, "first", b"", None, (), 0, "first", "")
    world.cores[A].request(inc.sender, OTHER, out, world.now_ms)
    world.run()
    assert world.ports[C].ran == ["first"]
    world.dropped = []
    world.later(500)
    assert world.row().standbys == (B,)
    (sending,) = world.cores[B].standbys.backups[SERVER].image.sending.values()
    assert sending.next_seq == 2
    world.kill(A)
    out = Outgoing(CALL, "second", b"", None, (), 0, "second", "")
    inc = world.cores[B].hosted[SERVER]
    world.cores[B].request(inc.sender, OTHER, out, world.now_ms)
    world.run()
    assert world.ports[C].ran == ["first", "second"]


def test_a_standby_that_is_about_to_take_over_is_not_fed_anew_meanwhile() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    at, port = world.cores[B], world.ports[B]
    world.silent.add(A)
    world.cores[C].standbys.node_suspected(A, world.now_ms)
    port.keeps = None  # what is kept first is loaded for a trial, which takes a while
    world.run()
    assert world.row().owner == C
    ((stream, coming),) = at.standbys.coming.items()
    assert coming.keeping is not None
    # It takes C for gone too, and asks for the swap, before that trial has ended.
    world.deaf.add(B)
    at.standbys.suspected[C] = None
    at.standbys.consider(SERVER, world.now_ms)
    port.reads.clear()
    at.standbys.standby_row(SERVER, RowRead(True, *world.rows[SERVER]), world.now_ms)
    world.run()
    ((row, rev),) = _taken(port.swaps)
    at.standbys.delta_kept(stream, coming.keeping.number, "", world.now_ms)
    at.standbys.promoted(SERVER, row, world._swap(row, rev), world.now_ms)
    assert SERVER in at.hosted


def test_a_request_that_was_withdrawn_before_a_failover_ends_as_not_done_after_it() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B)
    for name in (A, B):
        world.cores[name].route_hint(OTHER, C, 1)
    busy(world)
    world.send(A, env(1, "m"))
    asks(world, A, "fetch", f"{SERVER}/1")
    world.kill(A)
    out = asks(world, B, "fetch", f"{SERVER}/1")
    (session,) = world.cores[B].hosted[SERVER].sender.sessions.values()
    world.cores[B].receive(C, [Reply(session.id, out.seq, WITHDRAWN, b"")], world.now_ms)
    assert ("fetch", EXPIRED, b"") in world.ports[B].resolved


def test_an_asynchronous_server_does_not_wait_for_a_standby_that_waits_for_its_whole_cut() -> None:
    world = World(A, B, C)
    inc = world.own(A)
    world.replicate(B, C, mode=Mode.ASYNC)
    world.later(200)
    replica = inc.replica
    assert replica is not None and set(inc.row.standbys) == {B, C}
    next(iter(replica.followers.values())).phase = FollowerPhase.DUE
    inc.gated = True  # they lag too far behind
    at = world.cores[A]
    at.background(inc, 1, world.now_ms)  # so there is no cut
    world.send(A, env(1, "m"))
    world.later(300)
    assert [reply.seq for reply in world.replies()] == [1]


def test_a_gated_server_hears_from_senders_here_what_they_do_not_await_any_more() -> None:
    world = World(A, B)
    inc = world.own(A)
    other = world.own(A, OTHER)
    world.replicate(B)
    at = world.cores[A]
    out = Outgoing(CALL, "m", b"", None, (), 0, "token", "")
    at.request(other.sender, SERVER, out, world.now_ms)
    world.run()
    (session,) = inc.sessions.values()
    assert list(session.records) == [1]
    world.later(1_000)
    assert not session.records
    (sending,) = other.sender.sessions.values()
    at._close_session(sending)
    world.run()
    at.flush(world.now_ms)
    assert session.ended


def test_a_cast_that_follows_a_call_in_one_frame_is_in_the_log_before_it_is_acknowledged() -> None:
    world = World(A, B, C)
    inc = world.own(A)
    world.replicate(B, C)
    busy(world)
    replica = inc.replica
    assert replica is not None
    waited = next(it for it in replica.followers.values() if it.node == C)
    waited.phase = FollowerPhase.ASKED  # so that no handler begins that may wait
    world.dropped = [Follow]
    world.send(A, env(2, "a cast", CAST))
    # There is a cut for the handler of the call that comes now; then the cast's turn is there.
    replica.due = True
    world.send(A, env(1, "a call"))
    assert not world.ports[A].began
    (session,) = world.cores[B].standbys.backups[SERVER].image.sessions.values()
    assert [item.seq for item in session.early] == [2]


def test_a_server_that_has_answered_out_of_turn_before_a_failover_may_move() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    busy(world)
    world.send(A, env(1, "m"), env(2, "", EMPTY))  # the second is answered while the first runs
    world.kill(A)
    at = world.cores[B]
    inc = at.hosted[SERVER]
    (session,) = inc.sessions.values()
    assert session.expected == 1 and list(session.records) == [2]
    record = at.export(inc, world.now_ms)
    copy = restore(record, inc.row, 99, object(), world.cores[A].route_hint, 10, world.now_ms)
    assert list(copy.sessions[session.id].records) == [2]


def test_what_no_handler_has_taken_is_told_before_what_the_next_one_asks_for() -> None:
    """Seed 3023 of the journals' schedules: an owner died between the two, and the request that its
    handler was in came after one of which nothing was known; so nobody could take over.
    """
    world = World(A, B, C)
    world.own(A)
    world.own(C, OTHER)
    world.replicate(B)
    for name in (A, B):
        world.cores[name].route_hint(OTHER, C, 1)
    world.send(A, env(1, "m"))
    world.ports[A].busy = world.ports[B].busy = True
    port = world.ports[A]
    begin = port.run

    def asking(inc: Incarnation, entry: Entry) -> Any:
        begun = begin(inc, entry)
        out = Outgoing(CALL, "op", b"op", None, (), 0, "op", f"{SERVER}/2")
        world.cores[A].request(inc.sender, OTHER, out, world.now_ms)
        return begun

    port.run = asking  # type: ignore[method-assign]
    world.dropped = [Note]
    world.send(A, env(3, "n"), env(2, "", EMPTY))
    world.kill(A)
    assert world.row().owner == B
    world.send(B, env(2, "", EMPTY), env(3, "n"))
    assert [entry.method for _, entry in world.ports[B].began] == ["n"]


def test_what_waited_for_a_standby_that_is_not_wanted_any_more_leaves() -> None:
    world = World(A, B, C)
    inc = world.own(A)
    world.deaf.add(A)  # so that it is waited for, and not in the row
    world.replicate(B)
    world.ports[A].swaps.clear()
    replica = inc.replica
    assert replica is not None and inc.gated
    (follower,) = replica.followers.values()
    follower.configured, replica.swap, replica.asked = False, None, False
    world.dropped = [Cut, Kept]
    world.send(A, env(1, "m"))
    assert not world.replies()
    world.dropped = [Follow]
    world.replicate(C)
    assert [reply.seq for reply in world.replies()] == [1]


def test_what_an_ended_handler_had_asked_for_and_is_told_again_is_asked_for_by_its_next_run() -> (
    None
):
    """Seed 178 of the journals' schedules: a session was bound to a generation when the handler had
    ended, and a task of it still ran, so that there was no cut. The request was told again, as of
    no handler: the next owner sent its number as an empty one, and then the cast under it was lost.
    """
    image = Image()
    image.take(CutRecord(8, False, 1, [], [], [], [], {}, replaces=True), True, NOW)
    entry = EntryRecord("client|1|1", 3, CALL, "m", b"", (), -1, "")
    nobody = EntryRecord("", 0, 0, "", b"", (), -1, "")
    session = f"{SERVER}|1|2"
    image.steps = [
        StepRecord(made_by, session, OTHER, 1, CAST, "op", 7, False, generation, node, 0)
        for made_by, generation, node in ((entry, 0, ""), (nobody, 4, B))
    ]
    record, replays = image.state(SERVER, NOW)
    (sending,) = record.sending
    assert sending.outgoing == [] and sending.generation == 4
    (steps,) = replays.values()
    assert [(step.seq, step.generation) for step in steps] == [(1, 4)]


@pytest.mark.parametrize("by_step", [False, True])
def test_after_a_failover_ordinary_requests_go_on_in_their_session_and_in_no_chain_s(
    by_step: bool,
) -> None:
    """Seed 24202 of the journals' schedules: the session of a re-entrant call was known from an
    earlier cut than the ordinary one to the same server, and was taken for it: a cast in it passed
    one that was still in the mailbox.
    """
    world = World(A, B)
    world.own(A)
    sender = world.cores[A].hosted[SERVER].sender
    chained = SendSession(f"{SERVER}|1|1", OTHER, sender, Route(OTHER), 10, NOW)
    chained.chained = True
    chained.next_seq = 3
    ordinary = SendSession(f"{SERVER}|1|2", OTHER, sender, Route(OTHER), 10, NOW)
    ordinary.next_seq = 2
    image = Image()
    image.take(CutRecord(8, False, 1, [], [], [], [], {}, replaces=True), True, NOW)
    if by_step:
        entry = EntryRecord("", 0, CAST, "m", b"", (), -1, "")  # a timer's
        image.steps = [
            StepRecord(entry, it.id, OTHER, 1, CALL, "op", 7, it.chained, 1, B, 0)
            for it in (chained, ordinary)
        ]
    else:
        for it in (chained, ordinary):
            sending = [_send_record(it, lambda _: b"", NOW)]
            image.take(CutRecord(8, False, 1, [], sending, [], [], {}), False, NOW)
    record, _ = image.state(SERVER, NOW)
    row = world.cores[A].hosted[SERVER].row
    copy = restore(record, row, 99, object(), world.cores[B].route_hint, 10, NOW)
    assert {to: it.id for to, it in copy.sender.sessions.items()} == {OTHER: ordinary.id}
    assert [it.chained for it in copy.sender.chained.values()] == [True]
    assert list(copy.sender.chained) == [chained.id]


@pytest.mark.parametrize("ends", ["before", "after"])
def test_casts_that_outlive_their_session_are_kept_and_do_not_bring_it_back(ends: str) -> None:
    """Seed 24330 of the journals' schedules: a server that was replaced by a checkpoint handled a
    cast of its former generation, and the next owner took its session for one that goes on: what
    its sender, who was bound to the former generation, asked again waited there for ever. And the
    casts that no handler had taken were in no cut.
    """
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B)
    client = "client|1|1"
    live = ReceiveSession(client, CLIENT, NOW)
    live.expected = 7
    entries = [Entry(live, seq, CAST, "m", b"", None, (), 0) for seq in (3, 5, 6)]
    if ends == "before":
        # As `restore` makes them.
        for entry in entries:
            entry.session = ReceiveSession(client, "", NOW)
    else:
        inc.sessions[client] = live
    for entry in entries:
        inc.put(entry)
    replica = inc.replica
    assert replica is not None
    replica.changes = changes = Changes()
    image = Image()

    def take(whole: bool) -> tuple[list[int], list[str]]:
        image.take(cut(inc, None if whole else changes, lambda _: b"", NOW), whole, NOW)
        changes.__init__()  # type: ignore[misc]
        record, _ = image.state(SERVER, NOW)
        copy = restore(record, inc.row, 99, object(), world.cores[B].route_hint, 10, NOW)
        assert all(it.session is not None and it.session.id == client for it in copy.mailbox)
        return [it.seq for it in copy.mailbox], list(copy.sessions)

    if ends == "before":
        assert take(True) == ([3, 5, 6], [])
    else:
        # Number 4 was a call, which its sender repeats.
        assert take(True) == ([3], [client])
        world.cores[A]._end_session(inc, live)
    assert take(False) == ([3, 5, 6], [])
    for left in ([5, 6], [6], []):
        entry = inc.mailbox.popleft()
        world.cores[A]._begin_replicated(inc, entry, NOW)
        assert take(False) == (left, [])
    assert image.sessions == {}


def test_a_request_that_waits_for_a_number_is_the_same_one_after_two_failovers() -> None:
    """Seed 27237 of the journals' schedules: a handler's request waited for a number, was made
    again after a failover, and waited again when the next one came. It was there twice then, and
    the handler's second request was not the one that it was said to have made before.
    """
    entry = EntryRecord("client|1|1", 3, CALL, "m", b"", (), -1, "")

    def waits(digest: int, generation: int = 0) -> StepRecord:
        session = f"{SERVER}|1|2"
        return StepRecord(entry, session, OTHER, 0, CALL, "op", digest, False, generation, B, 0)

    left = [waits(7), waits(7), waits(8)]
    image = Image()
    image.take(CutRecord(8, False, 1, [], [], [], [], {}, replaces=True, steps=left), True, NOW)
    for again in (waits(7, 3), waits(7), waits(8)):
        image.steps.append(again)
        _, replays = image.state(SERVER, NOW)
        (steps,) = replays.values()
        assert [step.digest for step in steps] == [7, 7, 8]
    assert steps[0].generation == 3
    # What comes then is new, however like the others it is; and so is a number that one gets.
    image.steps.append(waits(7))
    numbered = waits(7)
    numbered.seq = 1
    image.steps.append(numbered)
    _, replays = image.state(SERVER, NOW)
    (steps,) = replays.values()
    assert [(step.digest, step.seq) for step in steps] == [(7, 0), (7, 0), (8, 0), (7, 0), (7, 1)]


def test_what_goes_ahead_is_not_taken_before_it_is_known_that_the_class_is_here() -> None:
    """Seed 25105 of the standbys' schedules: the owner knew of a former time that it was followed,
    which had come to nothing; its request, come late, had begun a new one. A piece that came while
    the class was looked for was kept for ever when there was none; and where the shell takes none
    so early, the stream waited for it until its owner gave up.
    """
    world = World(A, B)
    at, port = world.cores[B], world.ports[B]
    stream = f"{SERVER}/{A}/1/1"
    chunk = Chunk(stream, 0, b"the first")
    at.receive(A, [Follow(stream, SERVER, 1, "cls", 1, False, "")], NOW)
    at.receive(A, [chunk], NOW)
    assert not port.chunks
    at.standbys.follow_checked(stream, 1, "", NOW)
    at.receive(A, [chunk], NOW)
    assert port.chunks == [(stream, 0, b"the first")]


def test_what_goes_into_a_new_generation_has_casts_and_no_sessions() -> None:
    world = World(A)
    inc = world.own(A)
    session = inc.sessions["client|1|1"] = ReceiveSession("client|1|1", CLIENT, NOW)
    session.expected = 6
    for seq in (3, 5):
        inc.put(Entry(session, seq, CAST, "m", b"", None, (), 0))
    image = Image()
    image.take(cut_for_rollback(inc, lambda _: b"", NOW), True, NOW)
    record, _ = image.state(SERVER, NOW)
    assert record.sessions == [] and [it.seq for it in record.mailbox] == [3, 5]


def test_a_fence_is_forgotten_when_nobody_can_run_into_it_any_more() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    standbys = world.cores[B].standbys
    world.kill(A)
    assert world.row().owner == B and standbys.fences == {} and standbys.ousted == {}


def test_a_fence_stays_until_the_former_owner_knows_that_it_is_none() -> None:
    """It may have asked this node to follow it anew, as an owner after a failover does, and would
    let out what this node acknowledges.
    """
    world = World(A, B, C)
    world.own(A)
    world.replicate(B)
    standbys = world.cores[B].standbys
    world.silent.add(A)
    standbys.node_suspected(A, world.now_ms)
    world.run()
    assert world.row().owner == B and standbys.fences == {SERVER: 3}
    # The server ends here, and the fence does not.
    world.cores[B].stop(SERVER, world.now_ms)
    world.cores[B].removal_ended(SERVER, SwapOutcome.DONE, world.now_ms)
    follow = Follow("late", SERVER, 2, "cls", 1, False, "")
    world.cores[B].receive(A, [follow], world.now_ms)
    assert KeepRefused("late", 3, ANY) in [m for _, m in world.ports[B].sent]
    world.ports[B].sent.clear()
    world.silent.clear()
    world.later(1_000)
    assert SERVER not in world.cores[A].hosted
    assert standbys.fences == {} and standbys.ousted == {}


def test_an_attempt_that_comes_to_nothing_leaves_no_fence_and_the_standby_goes_on() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B)
    standbys = world.cores[B].standbys
    standbys.node_suspected(A, world.now_ms)
    # The row was read, and the owner turns out to be well before anything was asked for.
    world.cores[B].standbys.standby_row(SERVER, RowRead(True, *world.rows[SERVER]), world.now_ms)
    assert standbys.fences == {SERVER: 3}
    world.deaf.add(B)
    world.run()
    world.replicate(B, C)
    assert world.row().epoch == 3
    world.deaf.clear()
    standbys.node_heard(A, world.now_ms)
    world.later(1_000)
    assert world.row().owner == A and standbys.fences == {}
    world.send(A, env(1, "m"))
    assert [reply.seq for reply in world.replies()] == [1]


def test_who_is_seen_dead_is_not_followed() -> None:
    world = World(A, B)
    world.own(A)
    world.kill(A)
    world.cores[B].receive(A, [Follow("late", SERVER, 1, "cls", 1, False, "")], world.now_ms)
    assert world.cores[B].standbys.coming == {}


def test_what_waits_for_kept_messages_takes_the_room_of_those_that_come_again() -> None:
    """Seed 29 of the journals' schedules: both were held, and the mailbox was beyond its limit."""
    at, port = core(A)
    inc = host(at, limit=2)
    port.busy = True
    at.receive(CLIENT, [env(1, session=session_id(CLIENT, NOW, 1))], NOW)  # it runs
    mine, other = session_id(CLIENT, NOW, 2), session_id(CLIENT, NOW, 3)
    at.receive(CLIENT, [env(3, session=mine, kind=CAST), env(2, session=other)], NOW)
    inc.sessions[mine].early[3].kept = True
    at.receive(CLIENT, [env(1, session=mine), env(2, session=mine)], NOW)
    assert [entry.seq for entry in inc.mailbox] == [1, 2, 3] and inc.early == 0


def test_a_stream_that_is_over_does_not_begin_again_by_what_comes_late() -> None:
    """The row may still name a standby that has lost its copy: with the first cut, told once more
    by a link that was slow, it would take over as the server was long ago.
    """
    world = World(A, B)
    world.own(A)
    told: list[Message] = []
    receive = world.cores[B].receive

    def listening(node: NodeId, messages: list[Message], now_ms: int) -> list[Message]:
        told.extend(it for it in deepcopy(messages) if isinstance(it, Follow | Cut))
        return receive(node, messages, now_ms)

    world.cores[B].receive = listening  # type: ignore[method-assign]
    world.replicate(B)
    late, told[:] = told[:2], []
    assert [type(it) for it in late] == [Follow, Cut]
    world.send(A, env(1, "m"))
    assert [reply.seq for reply in world.replies()] == [1]
    # B cannot keep the next one, and A cannot change the row before it dies.
    world.deaf.add(A)
    world.ports[B].keeps = "no room"
    world.send(A, env(2, "n"))
    assert SERVER not in world.cores[B].standbys.backups and world.row().standbys == (B,)
    world.ports[B].keeps = True
    for message in late:
        receive(A, [message], world.now_ms)
        world.run()
    world.kill(A)
    world.later(1_000)
    assert world.row().owner != B


def test_an_owner_that_was_replaced_while_it_was_to_go_back_in_time_does_not_go_on() -> None:
    world = World(A, B)
    inc = world.own(A, timers=[("tick", 100)])
    world.replicate(B)
    at, port = world.cores[A], world.ports[A]
    # A swap of its own is under way, and its word comes when the server stands still.
    world.deaf.add(A)
    world.replicate()
    phase = at.begin_replacing(inc, world.now_ms)
    ((asked, _),) = port.swaps
    refused = SwapResult(SwapOutcome.REFUSED, structs.replace(world.row(), owner=B), 99)
    at.standbys.configured(SERVER, asked, refused, NOW)
    assert port.deposed_ones == [inc] and SERVER not in at.hosted
    at.end_replacing(inc, phase, world.now_ms)
    assert inc.phase is Phase.FROZEN and at.timers.due_ms(("tick", SERVER, "tick")) is None


@pytest.mark.parametrize("outcome", [SwapOutcome.DONE, SwapOutcome.REFUSED])
def test_a_late_word_of_a_swap_is_not_taken_for_that_of_one_that_was_asked_for_since(
    outcome: SwapOutcome,
) -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B)
    at, port = world.cores[A], world.ports[A]
    world.deaf.add(A)
    world.replicate()
    ((first, _),) = _taken(port.swaps)
    # B takes over, and then dies; A has the server again before the answer comes.
    world.silent.add(A)
    world.cores[B].standbys.node_suspected(A, world.now_ms)
    world.run()
    while_away, rev = world.rows[SERVER]
    assert while_away.owner == B
    at.standbys.standby_row(SERVER, RowRead(True, while_away, rev), world.now_ms)
    world.silent.clear()
    world.deaf.clear()
    world.replicate(A, C, at=B)
    world.deaf.add(C)
    world.kill(B)
    inc = at.hosted[SERVER]
    epoch = world.row().epoch
    assert inc.row == world.row() and inc.row.standbys == (C,)
    world.deaf.add(A)
    world.replicate()
    ((second, _),) = port.swaps
    row = first if outcome is SwapOutcome.DONE else while_away
    at.standbys.configured(SERVER, first, SwapResult(outcome, row, 99), world.now_ms)
    assert at.hosted.get(SERVER) is inc and inc.row.standbys == (C,)
    world.deaf.clear()
    world.run()
    assert world.row() == second and inc.row == second and second.epoch == epoch + 1


def test_a_late_word_of_another_swap_does_not_make_a_standby_the_owner() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.deaf.add(B)
    world.kill(A)
    at, port = world.cores[B], world.ports[B]
    port.reads.clear()
    row, rev = world.rows[SERVER]
    at.standbys.standby_row(SERVER, RowRead(True, row, rev), world.now_ms)
    world.run()
    other = directory.given_back(structs.replace(row, previous=A), f"{B}/1/back")
    at.standbys.promoted(SERVER, other, SwapResult(SwapOutcome.DONE, other, 99), world.now_ms)
    assert SERVER not in at.hosted
    world.deaf.clear()
    world.run()
    assert SERVER in at.hosted and world.row().owner == B


def test_an_object_that_is_loaded_late_is_not_that_of_a_newer_copy() -> None:
    world = World(A, B)
    inc = world.own(A)
    world.replicate(B)
    at, port = world.cores[B], world.ports[B]

    def claims() -> Backup:
        at.standbys.node_suspected(A, world.now_ms)
        port.reads.clear()
        at.standbys.standby_row(SERVER, RowRead(True, *world.rows[SERVER]), world.now_ms)
        (backup,) = _taken(port.loads)
        return backup  # type: ignore[no-any-return]

    early = claims()
    # Its place is taken while it is being loaded.
    at.standbys.forget_server(SERVER)
    at.standbys.node_heard(A, world.now_ms)
    world.cores[A].standbys.node_dead(B, world.now_ms)
    world.run()
    world.replicate(B)
    assert inc.row.standbys == (B,)
    late = claims()
    world.deaf.add(B)
    at.standbys.backup_loaded(early, "what it was", "", world.now_ms)
    assert late.claim is not None and late.claim.host is None and not port.swaps
    at.standbys.backup_loaded(late, "what it is", "", world.now_ms)
    world.deaf.clear()
    world.run()
    assert at.hosted[SERVER].host == "what it is"


def test_a_standby_whose_promotion_may_come_through_yet_keeps_what_it_has() -> None:
    """Seed 10457 of the standbys' schedules: its owner was heard again, and the row was read for
    another reason. It let go of its copy, and then the row named it.
    """
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.send(A, env(1, "m"))
    at, port = world.cores[B], world.ports[B]
    world.deaf.add(B)
    before = world.rows[SERVER]
    at.standbys.node_suspected(A, world.now_ms)
    at.standbys.standby_row(SERVER, RowRead(True, *before), world.now_ms)
    world.run()
    ((row, rev),) = _taken(port.swaps)
    unknown = SwapResult(SwapOutcome.UNKNOWN, None, 0, "no answer")
    at.standbys.promoted(SERVER, row, unknown, world.now_ms)
    at.standbys.node_heard(A, world.now_ms)
    at.standbys.standby_row(SERVER, RowRead(True, *before), world.now_ms)
    world.run()
    assert SERVER in at.standbys.backups
    # It came through, and the answer to the same one, asked again, says so.
    late = world._swap(row, rev)
    assert late.outcome is SwapOutcome.DONE
    world.deaf.clear()
    world.later(200)
    assert SERVER in at.hosted and world.row().owner == B
    world.send(B, env(1, "m"))
    assert world.ports[B].ran == []


@pytest.mark.parametrize("claims", [False, True])
def test_a_row_that_was_read_before_a_copy_was_sent_does_not_cost_it(claims: bool) -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(C)
    early = RowRead(True, *world.rows[SERVER])
    world.kill(A)
    assert world.row().owner == C
    world.replicate(B, at=C)
    assert world.row().standbys == (B,)
    at, port = world.cores[B], world.ports[B]
    if claims:
        world.deaf.add(B)
        world.kill(C)
        port.reads.clear()
    at.standbys.standby_row(SERVER, early, world.now_ms)
    world.run()
    assert at.standbys.backups[SERVER].valid
    world.deaf.clear()
    world.kill(C)
    world.later(600)
    assert SERVER in at.hosted and world.row().owner == B


def replaced(
    world: World, at: NodeId = A, swapped: Callable[[SwapResult], None] = lambda _: None
) -> Incarnation:
    """The server goes back in time where it is; the swap is done, and the hook is over.

    Args:
        world: Where.
        at: Its owner.
        swapped: What happens when the row is written, and the owner has not heard of it yet.
    """
    core_at = world.cores[at]
    inc = core_at.hosted[SERVER]
    inc.wanted = Wanted(2, (), Mode.SYNC)
    core_at.begin_replacing(inc, world.now_ms)
    row = directory.restored(
        known=world.row(),
        rev_max=0,
        checkpoint=structs.replace(inc.row, epoch=1),
        owner=at,
        transfer="back",
        name="",
        version=1,
        methods=(),
        then_s=1.0,
        now_s=2.0,
        cause="restored",
    )
    result = world._swap(row, world.rows[SERVER][1])
    assert result.outcome is SwapOutcome.DONE
    swapped(result)
    again = core_at.restored(row, result.rev, 100, False, object(), NOTHING, world.now_ms)
    core_at.started(SERVER, world.now_ms)
    return again


def test_a_server_that_goes_back_in_time_where_it_is_has_its_standbys_again() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    inc = replaced(world)
    assert inc.wanted == Wanted(2, (), Mode.SYNC)
    assert world.row().standbys == ()
    # What it lets out waits for all of them, although the row names nobody yet.
    world.dropped = [Kept]
    world.send(A, env(1, "m", generation=4))
    assert not world.replies() and world.row().standbys == ()
    world.dropped = []
    world.later(300)
    assert set(world.row().standbys) == {B, C} and world.row().mode is Mode.SYNC
    assert [reply.payload for reply in world.replies()] == [b"m"]
    world.kill(A)
    assert world.row().owner in (B, C)
    world.send(world.row().owner, env(1, "m", generation=4))
    assert [reply.payload for reply in world.replies()] == [b"m"]


def test_a_server_that_goes_back_while_its_row_is_to_name_a_standby_has_that_one_again() -> None:
    """Seed 7293 of the standbys' schedules: its own two swaps met, and it answered alone."""
    world = World(A, B)
    world.own(A)
    at, port = world.cores[A], world.ports[A]
    world.replicate(B)
    replaced(world)
    world.deaf.add(A)
    world.run()
    world.later(100)
    ((asked, _),) = _taken(port.swaps)
    assert asked.standbys == (B,)

    def is_refused(back: SwapResult) -> None:
        refused = SwapResult(SwapOutcome.REFUSED, back.row, back.rev)
        at.standbys.configured(SERVER, asked, refused, world.now_ms)

    inc = replaced(world, swapped=is_refused)
    assert port.deposed_ones == [] and inc.wanted == Wanted(2, (), Mode.SYNC)
    world.deaf.clear()
    world.dropped = [Kept]
    world.send(A, env(1, "m", generation=inc.row.generation))
    assert not world.replies()
    world.dropped = []
    world.later(300)
    assert world.row().standbys == (B,)
    assert [reply.payload for reply in world.replies()] == [b"m"]


def test_a_server_that_goes_back_twice_waits_for_those_that_the_first_time_waits_for() -> None:
    """Seed 1054 of the standbys' schedules: the row named nobody when it went back again."""
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.dropped = [Following]
    replaced(world)
    inc = replaced(world)
    world.send(A, env(1, "m", generation=inc.row.generation))
    assert not world.replies() and world.row().standbys == ()
    world.dropped = []
    world.later(300)
    assert [reply.payload for reply in world.replies()] == [b"m"]
    assert world.row().standbys == (B,)


def test_nobody_takes_over_with_what_was_before_a_server_went_back_in_time() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.send(A, env(1, "m"))
    world.replies()
    # The word that B is none any more, and that it is one again, is lost.
    world.dropped = [Unfollow, Follow]
    replaced(world)
    assert world.cores[B].standbys.backups[SERVER].valid
    world.send(A, env(1, "n", generation=3))
    world.silent.add(A)
    world.cores[B].standbys.node_suspected(A, world.now_ms)
    world.run()
    assert world.row().owner == A and world.row().generation == 3
    assert SERVER not in world.cores[B].standbys.backups and SERVER not in world.cores[B].hosted
    world.kill(A)
    assert world.cores[B].may_bury(world.row()) and not world.replies()


def test_a_standby_that_had_begun_to_take_over_does_not_from_a_server_that_went_back() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    # It has read the row, is fenced, and its swap is under way.
    world.deaf.add(B)
    world.cores[B].standbys.node_suspected(A, world.now_ms)
    world.run()
    world.cores[B].standbys.standby_row(SERVER, RowRead(True, *world.rows[SERVER]), world.now_ms)
    world.run()
    assert [row.owner for row, _ in world.ports[B].swaps] == [B]
    replaced(world)
    world.send(A, env(1, "m", generation=3))
    world.deaf.clear()
    world.later(500)
    assert world.row().owner == A and world.row().generation == 3
    world.cores[B].standbys.node_heard(A, world.now_ms)
    world.later(3_000)
    assert [reply.payload for reply in world.replies()] == [b"m"]
    assert SERVER in world.cores[A].hosted and SERVER not in world.cores[B].hosted


@pytest.mark.parametrize("dies", [False, True])
def test_a_server_that_went_back_goes_on_without_the_standby_that_does_not_come_back(
    dies: bool,
) -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B, C)
    world.silent.add(C)
    if dies:
        world.cores[A].node_dead(C, world.now_ms)
        world.run()
    inc = replaced(world)
    world.send(A, env(1, "m", generation=inc.row.generation))
    if not dies:
        world.later(1_000)
        assert not world.replies() and world.row().standbys == (B,)
        world.later(3_000)
    assert [reply.payload for reply in world.replies()] == [b"m"]
    assert world.row().standbys == (B,)
    assert (C, Changed.LOST) in world.ports[A].changed


def test_a_server_that_went_back_alone_is_served_alone() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B)
    world.kill(B)
    inc = replaced(world)
    world.send(A, env(1, "m", generation=inc.row.generation))
    assert [reply.payload for reply in world.replies()] == [b"m"]
    assert inc.replica is None and not inc.gated


def test_async_standbys_of_a_server_that_went_back_hold_nothing_up() -> None:
    world = World(A, B)
    world.own(A)
    world.replicate(B, mode=Mode.ASYNC)
    world.dropped = [Follow]
    inc = replaced(world)
    world.send(A, env(1, "m", generation=inc.row.generation))
    assert [reply.payload for reply in world.replies()] == [b"m"]
    assert inc.wanted.count == 2


def test_a_move_of_a_server_that_went_back_waits_for_its_standbys() -> None:
    world = World(A, B, C)
    world.own(A)
    world.replicate(B)
    world.dropped = [Following]
    replaced(world)
    world.cores[A].move(SERVER, C, "t1", False, "", world.now_ms)
    world.run()
    assert not world.ports[C].did(CheckClass)
    world.dropped = []
    world.cores[A].peer_up(B, world.now_ms)  # what was sent is sent again
    world.run()
    assert world.row().standbys == (B,) and world.ports[C].did(CheckClass)
