"""Journals in the core: one more follower, which a node can open when all others are gone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs

from migrate.core import directory
from migrate.core.actions import CheckClass, CopyAhead, DecodeState, SwapRow
from migrate.core.directory import Mode, Row, RowState
from migrate.core.events import Copied, Decoded, Encoded
from migrate.core.ids import NodeId
from migrate.core.messages import CAST, OK, Cut, Dropped, Follow, Note, Receipt, Step
from migrate.core.standby import JOURNAL, Changed, Leftover
from tests.core.fakes import SERVER, A, B, C, Port, core, env
from tests.core.test_standby import OTHER, World, asks, begin_move


class Disks(World):
    """A world with disks: what is logged is there, by the journal's id."""

    def __init__(self, *names: NodeId) -> None:
        super().__init__(*names)
        self.files: dict[str, list[Cut | Step | Note]] = {}
        self.broken: set[NodeId] = set()
        self.slow: set[NodeId] = set()
        self.fenced: set[str] = set()  # journals that another writer has kept from being written
        self.waiting: dict[str, list[Cut | Step | Note]] = {}  # until it is known whose they are

    def _asked(self, name: NodeId, at: Any, port: Port) -> bool:
        did = super()._asked(name, at, port)
        for stream in port.going_on:
            did = True
            self.fenced.discard(stream)
            port.journaled[:0] = self.waiting.pop(stream, [])
        port.going_on.clear()
        if name in self.slow:
            return did
        for message in list(port.journaled):
            did = True
            port.journaled.remove(message)
            if message.stream in self.fenced:
                self.waiting.setdefault(message.stream, []).append(message)
                if len(self.waiting[message.stream]) == 1:
                    at.standbys.journal_fenced(message.server, message.stream, self.now_ms)
                continue
            reason = "the disk is full" if name in self.broken else ""
            if not reason:
                if type(message) is Cut and message.whole:
                    self.files[message.stream] = []
                self.files[message.stream].append(copy.deepcopy(message))
            at.standbys.journaled(message.server, message.number, reason, self.now_ms)
        return did

    def durable(self, at: NodeId = A, *nodes: NodeId) -> None:
        assert self.cores[at].standbys.replicate(
            SERVER, nodes, Mode.SYNC, self.now_ms, journal=True
        )
        self.run()

    def later_world(self, *names: NodeId) -> Disks:
        """Other processes, after all of these were killed."""
        world = Disks(*names)
        world.rows, world.rev, world.now_ms = dict(self.rows), self.rev, self.now_ms
        world.files = copy.deepcopy(self.files)
        return world

    def open(self, at: NodeId, stream: str) -> str:
        follow = Follow(stream, SERVER, 1, "cls", 1, False, "")
        why = self.cores[at].standbys.reopen(follow, self.files[stream], 0.0, self.now_ms)
        self.run()
        return why

    def fence(self, at: NodeId, stream: str) -> Callable[[], str]:
        """Keep the owner from writing, and read; returns what opens the journal then."""
        seen = self.rows[SERVER]
        self.fenced.add(stream)
        files = copy.deepcopy(self.files[stream])
        follow = Follow(stream, SERVER, 1, "cls", 1, False, "")

        def opened() -> str:
            standbys = self.cores[at].standbys
            why = standbys.reopen(follow, files, 0.0, self.now_ms, seen)
            self.fenced.discard(stream)  # if it goes on there, it may be written there
            self.run()
            return why

        return opened


D, E = "d@4", "e@5"
ROW = Row(SERVER, 1, A, RowState.ACTIVE, "spawn", "", "cls", 1)


def test_replies_wait_for_the_journal_and_the_row_names_it() -> None:
    world = Disks(A)
    world.own(A)
    world.durable()
    stream = world.row().journal
    assert list(world.files) == [stream] and world.row().epoch == 2
    world.slow.add(A)
    world.send(A, env(1, "m"))
    assert not world.replies()
    world.later(10_000)  # a slow disk is waited for
    assert not world.replies() and world.row().journal == stream
    world.slow.clear()
    world.run()
    assert [reply.seq for reply in world.replies()] == [1]


def test_what_was_acknowledged_is_there_after_everybody_was_killed_and_not_run_again() -> None:
    world = Disks(A)
    world.own(A)
    world.durable()
    world.send(A, env(1, "m"), env(2, "n"))
    assert [reply.seq for reply in world.replies()] == [1, 2]
    stream = world.row().journal

    world = world.later_world(D)
    assert world.open(D, stream) == ""
    assert world.row().owner == D and world.row().journal == stream and world.row().epoch == 3
    world.send(D, env(1, "m"), env(2, "n"), env(3, "o"))
    assert [reply.payload for reply in world.replies()] == [b"m", b"n", b"o"]
    assert world.ports[D].ran == ["o"]
    # And again, from the file that goes on under the same id.
    world = world.later_world(E)
    assert world.open(E, stream) == ""
    world.send(E, env(3, "o"), env(4, "p"))
    assert [reply.payload for reply in world.replies()] == [b"o", b"p"]
    assert world.ports[E].ran == ["p"]


def test_who_opens_a_journal_lets_nothing_out_before_it_has_a_whole_cut_of_its_own() -> None:
    world = Disks(A)
    world.own(A)
    world.durable()
    stream = world.row().journal
    world = world.later_world(D)
    world.slow.add(D)
    world.open(D, stream)
    world.send(D, env(1, "m"))
    assert world.ports[D].ran == ["m"] and not world.replies()
    # Killed now, nothing of that was ever seen.
    again = world.later_world(E)
    again.open(E, stream)
    again.send(E, env(1, "m"))
    assert [reply.seq for reply in again.replies()] == [1]
    world.slow.clear()
    world.run()
    assert [reply.seq for reply in world.replies()] == [1]


def test_a_journal_that_the_row_does_not_name_is_not_opened() -> None:
    world = Disks(A)
    world.own(A)
    world.durable()
    stream = world.row().journal
    world.files["another"] = world.files[stream]
    world = world.later_world(D)
    world.open(D, "another")
    assert world.row().owner == A
    assert (JOURNAL, Changed.UNFIT) in world.ports[D].changed
    assert SERVER not in world.cores[D].standbys.backups


def test_of_two_who_open_it_one_has_it_and_the_other_does_not_try_again() -> None:
    world = Disks(A)
    world.own(A)
    world.durable()
    stream = world.row().journal
    world = world.later_world(D, E)
    for node in (D, E):
        follow = Follow(stream, SERVER, 1, "cls", 1, False, "")
        files = copy.deepcopy(world.files[stream])
        assert world.cores[node].standbys.reopen(follow, files, 0.0, world.now_ms) == ""
    world.run()
    world.later(1_000)
    owners = [node for node in (D, E) if SERVER in world.cores[node].hosted]
    assert owners == [world.row().owner] and world.row().epoch == 3
    (other,) = {D, E} - set(owners)
    assert (JOURNAL, Changed.UNFIT) in world.ports[other].changed


def test_who_holds_a_journal_is_told_when_its_server_has_come_here_otherwise() -> None:
    world = Disks(A)
    world.own(A)
    world.durable()
    stream = world.row().journal
    world = world.later_world(D)
    world.deaf.add(D)
    assert world.open(D, stream) == ""
    world.cores[D].standbys.forget_server(SERVER)
    assert (JOURNAL, Changed.UNFIT) in world.ports[D].changed


def test_an_owner_whose_journal_was_fenced_lets_nothing_out_before_its_own_swap() -> None:
    world = Disks(A)
    world.own(A)
    world.durable()
    stream = world.row().journal
    world.fenced.add(stream)
    world.deaf.add(A)
    world.send(A, env(1, "m"))
    world.later(1_000)
    assert not world.replies() and world.row().epoch == 2
    world.deaf.clear()
    world.later(1_000)
    assert [reply.seq for reply in world.replies()] == [1]
    assert world.row().journal == stream and world.row().epoch == 3
    again = world.later_world(E)
    assert again.open(E, stream) == ""
    again.send(E, env(1, "m"), env(2, "n"))
    assert [reply.seq for reply in again.replies()] == [1, 2] and again.ports[E].ran == ["n"]


def test_a_fence_that_is_seen_while_a_swap_is_under_way_takes_another_one() -> None:
    """The first may have been asked for, and compared, before whoever fences has read the row."""
    world = Disks(A, B)
    world.own(A)
    world.durable()
    stream = world.row().journal
    world.deaf.add(A)
    assert world.cores[A].standbys.replicate(SERVER, (B,), Mode.SYNC, world.now_ms, journal=True)
    world.run()
    world.send(A, env(1, "m"))
    assert world.cores[A].hosted[SERVER].replica.swap is not None  # type: ignore[union-attr]
    world.cores[A].standbys.journal_fenced(SERVER, stream, world.now_ms)
    swaps, going_on = world.ports[A].swaps, world.ports[A].going_on
    (first,) = swaps
    swaps.clear()
    world.cores[A].standbys.configured(SERVER, first[0], world._swap(*first), world.now_ms)
    assert not going_on and len(swaps) == 1
    world.deaf.clear()
    epoch = world.row().epoch
    (second,) = swaps
    swaps.clear()
    world.cores[A].standbys.configured(SERVER, second[0], world._swap(*second), world.now_ms)
    assert going_on == [stream] and world.row().epoch == epoch + 1


@pytest.mark.parametrize("first", ["request", "cast"])
def test_a_handler_in_mid_run_does_not_wait_for_ever_for_a_journal_that_was_fenced(
    first: str,
) -> None:
    """Seed 3 of the journals' schedules: another journal was begun; what the handler asked for
    waited for a whole cut of that, and the cut for the handler's end.
    """
    world = Disks(A, C)
    world.own(A)
    world.own(C, OTHER)
    world.cores[A].route_hint(OTHER, C, 1)
    world.durable()
    world.ports[A].busy = True
    world.send(A, env(1, "m"))
    stream = world.row().journal
    world.fenced.add(stream)
    if first == "cast":
        world.send(A, env(2, "n", CAST))
        assert len(world.replies(Receipt)) == 1
        world.fenced.add(stream)
    epoch = world.row().epoch
    asks(world, A, "fetch", f"{SERVER}/1")
    world.run()
    assert world.ports[C].ran == ["fetch"]
    assert world.row().journal == stream and world.row().epoch == epoch + 1
    world.ports[A].busy = False
    world.cores[A].finish(*world.ports[A].began[-1], OK, b"done", None, world.now_ms)
    world.run()
    assert [reply.payload for reply in world.replies() if reply.seq == 1] == [b"done"]


def test_of_an_owner_that_was_fenced_and_an_opener_that_is_first_the_owner_is_deposed() -> None:
    world = Disks(A, D)
    world.own(A)
    world.durable()
    first = world.row().journal
    world.send(A, env(1, "m"))
    world.replies()
    opened = world.fence(D, first)
    assert opened() == "" and world.row().owner == D
    world.fenced.add(first)
    world.send(A, env(2, "n"))
    world.later(1_000)
    assert not world.replies() and world.ports[A].deposed_ones
    assert SERVER not in world.cores[A].hosted and SERVER in world.cores[D].hosted
    world.fenced.clear()
    world.send(D, env(1, "m"), env(2, "n"))
    assert [reply.seq for reply in world.replies()] == [1, 2]
    assert world.ports[D].ran == ["n"] and world.row().owner == D


def test_of_an_owner_that_was_fenced_and_an_opener_that_is_late_the_owner_goes_on() -> None:
    world = Disks(A, D)
    world.own(A)
    world.durable()
    first = world.row().journal
    opened = world.fence(D, first)
    world.send(A, env(1, "m"))
    assert [reply.seq for reply in world.replies()] == [1]
    assert opened() == ""
    world.later(1_000)
    assert (JOURNAL, Changed.UNFIT) in world.ports[D].changed
    assert SERVER not in world.cores[D].hosted and world.row().owner == A
    world.send(A, env(2, "n"))
    assert [reply.seq for reply in world.replies()] == [2]


def test_a_journal_is_not_opened_upon_a_row_that_is_newer_than_its_fence() -> None:
    """Whoever made it may have let out what was not read here."""
    world = Disks(A, D)
    world.own(A)
    world.durable()
    first = world.row().journal
    opened = world.fence(D, first)
    world.fenced.clear()
    # The same journal and owner: a standby has come and gone.
    rows = world.rows[SERVER]
    world.rev += 1
    world.rows[SERVER] = (rows[0], world.rev)
    assert opened() == ""
    assert world.row().owner == A and SERVER not in world.cores[D].hosted
    assert (JOURNAL, Changed.UNFIT) in world.ports[D].changed


def moved(world: Disks, to: NodeId) -> None:
    """A move to a node that has nothing of the server."""
    begin_move(world, to)
    source, target = world.cores[A], world.cores[to]
    assert world.ports[A].did(CopyAhead)
    source.move_event("t", False, Copied(b"", True), world.now_ms)
    world.run()
    inc = source.freeze("t", world.now_ms)
    assert inc is not None
    record = source.export(inc, world.now_ms)
    source.move_event("t", False, Encoded(b"last"), world.now_ms)
    world.run()
    assert world.ports[to].did(DecodeState)
    assert target.install("t", record, object(), world.now_ms) is not None
    target.move_event("t", True, Decoded(), world.now_ms)
    world.run()
    (swap,) = world.ports[A].did(SwapRow)
    source.move_event("t", False, world._swap(swap.row, swap.rev), world.now_ms)
    world.run()
    target.started(SERVER, world.now_ms)
    world.run()


def test_a_move_waits_until_the_row_names_the_journal_of_the_present_owner() -> None:
    """It would wait for what is held back until then, and the row would wait for its end."""
    world = Disks(A, B)
    world.own(A)
    world.durable()
    world.slow.add(B)
    moved(world, B)
    world.send(B, env(1, "m"))
    back = world.cores[B]
    back.move(SERVER, A, "back", False, "", world.now_ms)
    world.run()
    assert back.leaving == {SERVER: "back"} and not back.moves_out
    assert not world.ports[A].did(CheckClass)
    world.slow.clear()
    world.run()
    assert [reply.seq for reply in world.replies()] == [1]
    assert "/b@" in world.row().journal and world.ports[A].did(CheckClass)


def test_a_move_is_given_up_when_the_row_has_to_show_whose_the_journal_is() -> None:
    world = Disks(A, B)
    world.own(A)
    world.durable()
    first = world.row().journal
    begin_move(world, B)
    assert list(world.cores[A].moves_out) == ["t"]
    assert world.ports[A].did(CopyAhead)
    world.fenced.add(first)
    world.send(A, env(1, "m"))
    assert [reply.seq for reply in world.replies()] == [1]
    assert world.row().journal == first and SERVER not in world.cores[A].leaving


def test_a_move_leaves_the_journal_in_the_row_until_another_takes_its_place() -> None:
    world = Disks(A, B)
    world.own(A)
    world.durable()
    world.send(A, env(1, "m"))
    world.replies()
    stream = world.row().journal
    world.slow.add(B)
    moved(world, B)
    world.send(B, env(1, "m"), env(2, "n"))
    assert world.row().owner == B and world.row().journal == stream
    assert world.ports[B].ran == ["n"] and not world.replies()
    # Killed now, the journal of the former owner has all that was ever seen.
    again = world.later_world(D)
    assert again.open(D, stream) == ""
    again.send(D, env(1, "m"), env(2, "n"))
    assert [reply.seq for reply in again.replies()] == [1, 2] and again.ports[D].ran == ["n"]
    # If not, the new one takes its place, and only then anything gets out.
    world.deaf.add(B)
    world.slow.clear()
    world.run()
    assert len(world.files) == 2 and not world.replies()
    world.deaf.clear()
    world.later(500)
    assert world.row().journal not in (stream, "")
    assert [reply.seq for reply in world.replies()] == [1, 2]


def test_a_handler_that_may_wait_is_not_begun_before_a_new_owner_has_begun_its_journal() -> None:
    """Seed 14 of the journals' schedules: what it asked for waited for the cut, which waited for
    its end; and the row never named another journal than that of the source.
    """
    world = Disks(A, B)
    world.own(A)
    world.durable()
    world.ports[B].busy = True
    world.dropped = [Dropped]
    moved(world, B)
    assert world.cores[B].hosted[SERVER].holding
    world.send(B, env(1, "m"))
    assert world.ports[B].ran == []
    world.dropped = []
    world.later(1_000)
    assert world.ports[B].ran == ["m"] and world.row().journal.startswith(f"{SERVER}/{B}/")


def test_a_failover_leaves_the_journal_in_the_row_until_another_takes_its_place() -> None:
    world = Disks(A, B)
    world.own(A)
    world.durable(A, B)
    world.send(A, env(1, "m"))
    world.replies()
    stream = world.row().journal
    assert world.row().standbys == (B,) and stream
    world.slow.add(B)
    world.kill(A)
    world.send(B, env(1, "m"), env(2, "n"))
    assert world.row().owner == B and world.row().journal == stream
    assert not world.replies()
    world.slow.clear()
    world.later(100)
    assert world.row().journal not in (stream, "")
    assert [reply.seq for reply in world.replies()] == [1, 2]


def test_a_disk_that_fails_costs_the_journal_by_a_swap_and_not_the_server() -> None:
    world = Disks(A)
    world.own(A)
    world.durable()
    world.broken.add(A)
    world.deaf.add(A)
    world.send(A, env(1, "m"))
    world.later(500)
    assert not world.replies()
    world.deaf.clear()
    world.later(500)
    assert [reply.seq for reply in world.replies()] == [1]
    assert world.row().journal == "" and (JOURNAL, Changed.LOST) in world.ports[A].changed


def test_a_new_owner_without_a_disk_goes_on_alone_when_the_row_says_so() -> None:
    world = Disks(A, B)
    world.own(A)
    world.durable()
    world.broken.add(B)
    moved(world, B)
    world.send(B, env(1, "m"))
    world.later(500)
    assert world.row().journal == "" and [reply.seq for reply in world.replies()] == [1]


def test_a_journal_that_has_grown_gets_a_whole_cut() -> None:
    world = Disks(A)
    world.own(A)
    world.durable()
    stream = world.row().journal
    for seq in range(1, 6):
        world.send(A, env(seq, "m", acked_below=seq))
    many = len(world.files[stream])
    world.cores[A].standbys.journal_anew(SERVER, world.now_ms)
    world.run()
    assert len(world.files[stream]) == 1 < many
    world.send(A, env(6, "n", acked_below=6))
    assert [reply.seq for reply in world.replies()] == [1, 2, 3, 4, 5, 6]
    world = world.later_world(D)
    world.open(D, stream)
    world.send(D, env(6, "n", acked_below=6))
    assert world.ports[D].ran == [] and [reply.seq for reply in world.replies()] == [6]


def test_a_journal_that_a_move_has_left_is_opened_again_if_the_new_owner_dies_too_early() -> None:
    """Seed 23 of the journals' schedules: its writer lived on, and nobody had the server."""
    world = Disks(A, B)
    world.own(A)
    world.durable()
    stream = world.row().journal
    world.slow.add(B)
    moved(world, B)
    standbys = world.cores[A].standbys
    assert world.row().owner == B and world.row().journal == stream
    assert standbys.leftover(world.row(), stream, A, first=False) is Leftover.WAIT
    world.kill(B)
    assert standbys.leftover(world.row(), stream, A, first=False) is Leftover.OPEN
    assert world.open(A, stream) == ""
    assert world.row().owner == A and SERVER in world.cores[A].hosted


@pytest.mark.parametrize(
    ("changes", "writer", "left"),
    [
        ({"journal": "j"}, "a@0", Leftover.OPEN),
        ({"journal": ""}, "a@0", Leftover.USELESS),
        ({"journal": "j2"}, "a@0", Leftover.USELESS),
        # The writer's last swap may yet come through (seed 344), unless it is this node.
        ({"journal": "", "owner": "a@0"}, "a@0", Leftover.WAIT),
        ({"journal": "j2", "owner": "a@0"}, "a@0", Leftover.WAIT),
        ({"journal": "", "owner": A}, A, Leftover.USELESS),
        ({"journal": "j", "state": RowState.LOST}, "a@0", Leftover.USELESS),
        (None, "a@0", Leftover.USELESS),
    ],
)
def test_what_becomes_of_a_journal_that_is_found(
    changes: dict[str, Any] | None, writer: NodeId, left: Leftover
) -> None:
    at, _ = core(A)
    row = structs.replace(ROW, **{"owner": B, **changes}) if changes is not None else None
    assert at.standbys.leftover(row, "j", writer, first=True) is left


def test_a_move_that_both_ends_have_given_up_leaves_the_server_to_the_journal() -> None:
    """The commit came through when the source was dead and the copy at the target was dropped."""
    world = Disks(A, B)
    row = structs.replace(ROW, journal="j", previous=A)
    row = directory.committed(row, B, "t", 1)
    world.rows[SERVER] = (row, world.rev)
    world.kill(A)
    doomed, again = world.cores[B].burials(A, world.rows.values(), world.now_ms)
    assert doomed == [] and again
    world.run()
    # It is as if the move had not been: whoever has the file of A's opens it.
    assert world.row().owner == A and world.row().journal == "j"
    assert world.row().state is RowState.ACTIVE
