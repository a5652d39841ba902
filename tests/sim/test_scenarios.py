"""Scenarios that broke other systems (SCENARIOS.md), as scripted worlds in virtual time."""

from __future__ import annotations

from typing import Any

import pytest

from migrate.core.actions import Resume, SwapRow
from migrate.core.directory import Row, RowState
from migrate.core.forwarding import HOPS_MAX
from migrate.core.messages import (
    CAST,
    CYCLE,
    FULL,
    LOST,
    OK,
    Abort,
    Activate,
    Activated,
    ActivateRefused,
    Dropped,
    Envelope,
    Final,
    Message,
    Moved,
    NotHere,
    Prepare,
    Prepared,
    Ready,
    Released,
    Reply,
)
from migrate.core.move import SourcePhase, TargetPhase
from tests.controls.switched_off import NoRepeats
from tests.core import fakes
from tests.sim.host import Op, SimNode
from tests.sim.script import Script

SEEDS = range(8)

SOURCE = [
    SourcePhase.PREPARING,
    SourcePhase.QUIESCING,
    SourcePhase.ENCODING,
    SourcePhase.SHIPPING,
    SourcePhase.COMMITTING,
    SourcePhase.COMMITTED,
    SourcePhase.RELEASING,
]
BEFORE_COMMIT = SOURCE[:4]

USUAL_US = 40_000
"""A move of the script's server takes less than this when nothing goes wrong."""

seeded = pytest.mark.parametrize("seed", SEEDS)


def waiting(seconds: float, what: str = "add", target: str = "") -> Op:
    """A handler that waits, and notes itself down after that (the time is made even)."""
    return Op("", what, int(seconds * 500_000) * 2, target, 0)


@seeded
def test_s02_what_arrives_while_the_state_is_pickled_is_handled_after_it_and_not_lost(
    seed: int,
) -> None:
    world = Script(seed)
    world.call()
    source = world.begin(1)
    world.reach(SourcePhase.ENCODING)
    asked = [world.ask(i % 2) for i in range(4)]
    world.reach(SourcePhase.SHIPPING)
    frozen: Any = source.core.hosted["s0"].host
    before = list(frozen.items)
    asked += [world.ask(i % 2) for i in range(4)]
    world.end(source)
    assert [world.answer(request) for request in asked] == [OK] * 8
    # The frozen copy has run nothing since; the new one everything, behind what it came with.
    assert frozen.items == before
    assert world.items()[: len(before)] == before
    assert sorted(r.place for r in asked) == list(range(2, 10))
    world.run()


@pytest.mark.parametrize("first", ["time-out", "ready"])
def test_s05_a_time_out_in_the_tick_of_the_answer_rolls_back_or_commits_and_never_both(
    first: str,
) -> None:
    at, port = fakes.core()
    fakes.host(at)
    fakes.frozen_move(at, port)
    due = fakes.NOW + fakes.TIMES.step_ms
    if first == "time-out":
        at.tick(due)
    at.receive(fakes.B, [Ready(fakes.TRANSFER)], due)
    at.tick(due)
    swaps, resumed = port.did(SwapRow), port.did(Resume)
    assert (len(swaps), len(resumed)) == ((0, 1) if first == "time-out" else (1, 0))
    at.receive(fakes.CLIENT, [fakes.env(1)], due)
    at.started(fakes.SERVER, due)
    assert port.ran == (["m1"] if first == "time-out" else [])


@seeded
@pytest.mark.parametrize("first", ["source", "target"])
def test_s05_of_two_sides_that_claim_a_server_in_the_same_tick_one_serves(
    seed: int, first: str
) -> None:
    world = Script(seed)
    world.call()
    deaf = (Activate, Activated, ActivateRefused, Dropped, Released, Abort)
    send, swap = world.network.send, world.directory.swap
    world.tamper(lambda a, b, m: isinstance(m, deaf))
    source, target = world.begin(1), world.node(1)
    held: list[tuple[SimNode, tuple[Any, ...]]] = []

    def hold(node: SimNode, server: str, *args: Any) -> None:
        if world.directory.rows[server][0].state is not RowState.COMMITTED:
            swap(node, server, *args)
            return
        held.append((node, (node, server, *args)))
        if {asker for asker, _ in held} == {source, target}:
            # Both ask for the row as it was after the commit, and in the same microsecond.
            world.directory.swap = swap  # type: ignore[method-assign]
            delay = world.directory._delay
            world.directory._delay = lambda move: 100  # type: ignore[method-assign]
            winner = source if first == "source" else target
            for _, call in sorted(held, key=lambda one: one[0] is not winner):
                swap(*call)
            world.directory._delay = delay  # type: ignore[method-assign]

    world.directory.swap = hold  # type: ignore[method-assign]
    asked = world.ask()
    world.end(source)
    world.network.send = send  # type: ignore[method-assign]
    row = world.directory.rows["s0"][0]
    expected = (source.id, 3) if first == "source" else (target.id, 2)
    assert (row.owner, row.epoch, row.state) == (*expected, RowState.ACTIVE)
    assert world.answer(asked) == OK and asked.place == 2
    world.wait_us(100_000)  # the loser hears of it
    assert [n.name for n in world.alive_nodes() if "s0" in n.core.hosted] == [world.owner().name]
    world.run()


@seeded
def test_s08_a_target_that_holds_the_same_id_refuses_and_the_source_serves_on(seed: int) -> None:
    world = Script(seed)
    world.call()
    target = world.node(1)
    row = Row("s0", 1, target.id, RowState.ACTIVE, "another", "", "Log", 1)
    target.core.host(row, 1, 10, False, object(), [], target.now_ms())
    world.move(1)
    assert world.counts["move refused"] == 1
    del target.core.hosted["s0"]
    assert world.call().place == 2
    world.run()


@seeded
def test_s08_a_target_that_is_just_getting_the_same_id_refuses_a_second_package(seed: int) -> None:
    world = Script(seed, nodes=3)
    source = world.begin(1)
    world.reach(TargetPhase.RESERVED)
    target, other = world.node(1), world.node(2)
    answers: list[Message] = []
    world.tamper(lambda a, b, m: b == other.id and bool(answers.append(m) or True))
    target.deliver(other.id, Prepare("t2", "s0", 1, "Log", 1, False, ""))
    world.end(source)
    assert world.moved() == 1 and world.owner() is target
    assert [type(m).__name__ for m in answers] == ["PrepareRefused"]
    world.network.send = type(world.network).send.__get__(world.network)  # type: ignore[method-assign]
    assert world.call().place == 1
    world.run()


@seeded
def test_s09_the_new_copy_has_what_the_last_handler_of_the_old_one_wrote(seed: int) -> None:
    world = Script(seed)
    running = world.ask(0, op=waiting(0.02))
    world.advance(lambda: bool(world.owner().core.hosted["s0"].running))
    source = world.begin(1)
    world.reach(SourcePhase.QUIESCING)
    later = world.ask(1)
    world.end(source)
    assert world.answer(running) == OK and world.answer(later) == OK
    assert (running.place, later.place) == (1, 2)
    assert world.owner() is world.node(1)
    world.run()


@seeded
@pytest.mark.parametrize("reentrant", [False, True])
def test_s13_timers_and_calls_to_itself_do_not_keep_a_server_from_leaving(
    seed: int, reentrant: bool
) -> None:
    world = Script(seed, period_ms=1, reentrant=reentrant)
    asked = [world.ask(0, op=waiting(0.003, "relay", "s0")) for _ in range(6)]
    for i in range(4):
        took = world.move(1 + i % 2, f"t{i}")
        assert took < 3 * USUAL_US
    assert world.moved() == 4
    assert [world.answer(request) for request in asked] == [OK] * 6
    host: Any = world.owner().core.hosted["s0"].host
    ticks = host.ticks
    world.wait_us(20_000)
    assert host.ticks > ticks + 3
    inner = sum(1 for uid in world.items() if "~" in uid)
    assert inner == (6 if reentrant else 0)
    assert world.counts[f"status {CYCLE}"] == (0 if reentrant else 6)
    world.run()


@seeded
def test_s17_late_and_repeated_news_of_where_a_server_was_is_ignored(seed: int) -> None:
    world = Script(seed, nodes=4)
    world.call()
    news = []
    for i, target in enumerate((1, 2, 3)):
        world.move(target, f"t{i}")
        row = world.directory.rows["s0"][0]
        news.append(Moved("s0", row.owner, row.epoch))
        world.call()
    asked = world.ask()
    for old in [*news[:-1], news[0], *news, news[0]]:
        for place in (*world.alive_nodes(), *(c.node for c in world.clients)):
            place.deliver(world.node(0).id, old)
    assert world.answer(asked) == OK
    sent: list[tuple[str, Message]] = []
    world.tamper(lambda a, b, m: bool(sent.append((b, m))))
    assert world.call().place == 6
    envelopes = [(to, m.hops) for to, m in sent if isinstance(m, Envelope)]
    assert envelopes == [(world.owner().id, 0)]
    world.run()


@seeded
def test_s19_where_the_forwarding_limit_is_reached_the_sender_is_told_at_once(seed: int) -> None:
    world = Script(seed, nodes=6)
    world.call()
    for i in range(5):
        world.move(i + 1, f"t{i}")
    sent: list[Message] = []
    world.tamper(lambda a, b, m: bool(sent.append(m)))
    began = world.now_us
    assert world.call().place == 2
    assert max(m.hops for m in sent if isinstance(m, Envelope)) == HOPS_MAX
    assert [m for m in sent if isinstance(m, NotHere)] != []
    # Passed on twice, sent back, looked up, sent, answered; nothing waited for a time-out.
    assert world.now_us - began < 12_000
    world.run()


@seeded
@pytest.mark.parametrize("forwarding", [True, False])
def test_s20_a_cast_to_a_server_that_has_moved_is_delivered(seed: int, forwarding: bool) -> None:
    world = Script(seed)
    world.call()
    world.move(1)
    if not forwarding:
        world.node(0).core.forwarding.forget("s0")
    cast = world.ask(0, kind=CAST)
    assert world.answer(cast) == OK
    assert world.call(1).status == OK
    assert cast.uid in world.items()
    world.run()


@seeded
def test_s20_a_cast_to_a_server_that_died_with_its_node_is_reported(seed: int) -> None:
    world = Script(seed)
    world.call()
    world.move(1)
    world.owner().die()
    cast = world.ask(0, kind=CAST)
    assert world.answer(cast) == LOST
    world.run()


@seeded
def test_s21_a_full_mailbox_refuses_by_name_and_drops_nothing(seed: int) -> None:
    world = Script(seed, mailbox=2)
    slow = [world.ask(0, op=waiting(0.1)) for _ in range(3)]
    world.wait_us(20_000)
    hasty = [world.ask(1, timeout_ms=30) for _ in range(4)]
    patient = [world.ask(1) for _ in range(4)]
    for request in (*slow, *hasty, *patient):
        world.answer(request)
    assert FULL in {request.status for request in hasty}
    assert [r.status for r in (*slow, *patient)] == [OK] * 7
    done = [r.uid for r in hasty if r.status == OK]
    assert [uid for uid in world.items() if uid in {r.uid for r in hasty}] == done
    world.run()


@seeded
def test_s21_what_finds_no_room_in_the_buffer_of_a_move_is_sent_again(seed: int) -> None:
    world = Script(seed, late_max=1)
    world.call(0)
    world.call(1)
    source = world.begin(1)
    world.reach(SourcePhase.SHIPPING)
    asked = [world.ask(i % 2) for i in range(10)]
    world.end(source)
    assert [world.answer(request) for request in asked] == [OK] * 10
    world.run()


@seeded
@pytest.mark.parametrize("kind", [Prepare, Prepared, Ready, Activate, Activated, Dropped, Released])
def test_s22_a_control_message_that_is_lost_delays_a_move_by_one_repeat(
    seed: int, kind: type[Message]
) -> None:
    world = Script(seed)
    lost = world.lose_first(kind)
    took = world.move(1)
    assert len(lost) == 1 and world.moved() == 1
    times = world.node(0).options().move
    assert took < USUAL_US + 1_000 * (times.confirm_ms if kind is Ready else times.repeat_ms)
    assert world.call().place == 1
    world.run()


@seeded
@pytest.mark.parametrize("kind", [Prepare, Final, Ready, Activate, Dropped])
def test_s22_a_control_message_that_is_lost_with_its_link_is_repeated_when_it_is_back(
    seed: int, kind: type[Message]
) -> None:
    world = Script(seed)
    lost = world.lose_first(kind, break_link=True)
    took = world.move(1)
    assert len(lost) == 1 and world.moved() == 1
    # The link needs up to 20 ms; a Ready is repeated by its own timer, too.
    assert took < USUAL_US + 25_000
    world.run()


@seeded
@pytest.mark.parametrize("phase", SOURCE)
def test_s23_the_death_of_a_third_node_does_not_concern_a_move(
    seed: int, phase: SourcePhase
) -> None:
    world = Script(seed)
    running = world.ask(0, op=waiting(0.01))
    world.advance(lambda: bool(world.owner().core.hosted["s0"].running))
    source = world.begin(1)
    began = world.now_us
    world.reach(phase)
    world.node(2).die()
    world.end(source)
    assert world.moved() == 1 and world.now_us - began < USUAL_US + 10_000
    assert world.answer(running) == OK
    assert world.call().place == 2
    world.run()


@seeded
@pytest.mark.parametrize("how", ["slow", "stopped"])
def test_s24_a_slow_third_node_does_not_concern_a_move(seed: int, how: str) -> None:
    world = Script(seed, servers=3)
    third = world.node(2)
    if how == "slow":
        world.network.slow[third.name] = 1_000
    else:
        third.pause()
    elsewhere = [world.ask(0, "s2") for _ in range(3)]
    assert world.move(1) < USUAL_US
    assert world.moved() == 1
    began = world.now_us
    assert world.call(1).place == 1
    assert world.call(1, "s1").place == 1
    assert world.now_us - began < USUAL_US
    world.network.slow.clear()
    third.wake()
    assert [world.answer(request) for request in elsewhere] == [OK] * 3
    world.run()


@seeded
@pytest.mark.parametrize("phase", SOURCE)
def test_s30_a_directory_that_fails_in_the_middle_of_a_move_stops_no_server(
    seed: int, phase: SourcePhase
) -> None:
    world = Script(seed, servers=3)
    for server in world.servers:
        world.call(0, server)
    running = world.ask(1, op=waiting(0.01))
    world.advance(lambda: bool(world.owner().core.hosted["s0"].running))
    source = world.begin(1)
    world.reach(phase)
    world.directory.away = True
    for server in ("s1", "s2"):
        began = world.now_us
        assert world.call(0, server).status == OK
        assert world.now_us - began < 10_000
    if phase in BEFORE_COMMIT:
        # The swap surely did not take effect: the server serves where it was, also now.
        world.end(source)
        assert world.counts["move rolled_back"] == 1
        assert world.call().place == 3 and world.owner() is source
    else:
        world.wait_us(100_000)
    world.directory.away = False
    world.end(source)
    assert world.answer(running) == OK
    assert world.call().status == OK
    assert sorted(world.directory.rows) == ["s0", "s1", "s2"]
    assert {row.state for row, _ in world.directory.rows.values()} != {RowState.LOST}
    world.run()


@seeded
def test_s30_a_commit_whose_answer_was_lost_with_the_directory_is_heard_of_from_the_target(
    seed: int,
) -> None:
    world = Script(seed, watches=True, watch_ms=0)
    world.call()
    target = world.node(1)

    def swap(node: SimNode, *swap: Any) -> None:
        # It takes effect; but only the target reaches the directory, and no answer comes.
        world.directory.cut[node.name] = None
        world.at(5_000, world.directory._apply, *swap[:3])

    world.directory.swap = swap  # type: ignore[method-assign]
    source = world.begin(1)
    world.end(source)
    assert world.moved() == 1 and world.owner() is target
    assert world.counts["reached commit_seen"] == 1
    assert world.call().place == 2
    world.directory.cut.clear()
    world.run()


@seeded
def test_s33_what_was_handled_before_a_move_is_answered_but_not_done_after_it(seed: int) -> None:
    world = Script(seed)
    world.call()
    lost = world.lose_first(Reply)
    asked = world.ask()
    world.advance(lambda: bool(lost))
    world.move(1)
    assert world.answer(asked) == OK
    assert asked.place == 2
    assert world.items().count(asked.uid) == 1
    assert world.call().place == 3
    world.run()


@seeded
@pytest.mark.parametrize(
    "phase", [TargetPhase.RESERVED, TargetPhase.DECODING, TargetPhase.READY, TargetPhase.LIVE]
)
def test_s34_a_target_answers_nothing_before_its_state_is_complete(
    seed: int, phase: TargetPhase
) -> None:
    world = Script(seed)
    for _ in range(5):
        world.call()
    source = world.begin(1)
    world.reach(phase)
    # This client believes the target to be the owner already.
    target = world.node(1)
    world.clients[1].node.core.route_hint("s0", target.id, 2)
    early = world.ask(1)
    world.end(source)
    assert world.answer(early) == OK
    assert early.place == 6
    world.run()


@seeded
def test_s42_what_was_buffered_during_a_move_leaves_with_the_commit(seed: int) -> None:
    # Nobody repeats anything here, so nothing may wait for a repeat or a poll.
    world = Script(seed, core=NoRepeats)
    world.call()
    source = world.begin(1)
    world.reach(SourcePhase.SHIPPING)
    asked = [world.ask() for _ in range(3)]
    world.reach(SourcePhase.COMMITTED)
    committed = world.now_us
    assert [world.answer(request) for request in asked] == [OK] * 3
    assert world.now_us - committed < 12_000
    world.end(source)
    world.run()


@seeded
def test_s49_while_the_directory_is_away_calls_go_on_and_moves_fail_cleanly(seed: int) -> None:
    world = Script(seed, servers=3)
    for server in world.servers:
        world.call(0, server)
    world.directory.away = True
    until = world.now_us + 10_000_000
    n = 0
    while world.now_us < until:
        began = world.now_us
        assert world.call(0, world.servers[n % 3]).status == OK
        assert world.now_us - began < 10_000
        world.wait_us(50_000)
        n += 1
        if n % 40 == 0:
            world.move(1 + n % 2, f"away{n}")
    assert n > 150
    assert world.counts["move rolled_back"] > 3 and world.moved() == 0
    world.directory.away = False
    world.move(1, "back")
    assert world.moved() == 1
    world.run()


def test_scripted_worlds_are_checked_like_all_others() -> None:
    world = Script(0)
    world.call()
    host: Any = world.owner().core.hosted["s0"].host
    host.items.append("c0.1#1")
    with pytest.raises(AssertionError, match=r"\[at most once\]"):
        world.run()
