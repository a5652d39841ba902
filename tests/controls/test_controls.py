"""Failing controls: with a mechanism switched off, the simulator must fail.

A checker that cannot fail proves nothing. Each test takes one mechanism of the core away, runs
the seeds of the campaign, and wants a violation within 1,000 of them; it prints which checker
saw it and how many seeds that took (`pytest -rP tests/controls`).
"""

from __future__ import annotations

import pytest

from migrate.core.node import Core
from tests.controls import switched_off as off
from tests.sim.directory import Directory
from tests.sim.faults import Plan
from tests.sim.host import SimNode
from tests.sim.world import Violation, World

SEEDS_MAX = 1_000


def caught(
    name: str,
    core: type[Core] = Core,
    directory: type[Directory] = Directory,
    plan: Plan | None = None,
) -> str:
    """The checker that sees the mechanism's absence first; "" if none does in 1,000 seeds."""
    node: type[SimNode] = off.node_with(core)
    for seed in range(SEEDS_MAX):
        try:
            World(seed, node_class=node, directory_class=directory, plan=plan).run()
        except Violation as violation:
            print(f"{name}: caught by [{violation.checker}] after {seed + 1} seeds")
            return violation.checker
    return ""


def calm() -> Plan:
    """Moves under load, and no fault at all."""
    return Plan(nodes=4, servers=6, requests=400, moves=60, async_share=0.3)


def test_without_completion_records_a_repeat_has_no_answer() -> None:
    assert caught("completion records", off.NoRecords) == "statuses"


def test_a_target_that_releases_too_early_contradicts_a_source_that_takes_back() -> None:
    checker = caught("holding back", off.NothingHeldBack)
    assert checker in {"one history", "one owner", "nothing lost", "epochs rise"}


def test_a_directory_that_just_writes_lets_two_owners_in() -> None:
    checker = caught("compare-and-swap", directory=off.PlainWrite)
    assert checker in {"epochs rise", "one owner", "lost", "one history", "source serves"}


def test_a_source_that_drops_its_copy_at_the_commit_loses_the_server() -> None:
    checker = caught("frozen copy", off.CopyDroppedAtCommit)
    assert checker in {"liveness", "lost", "source serves", "nothing lost"}


def test_a_mailbox_that_does_not_travel_loses_requests() -> None:
    assert caught("mailbox", off.MailboxStays) in {"liveness", "nothing lost", "counters"}


def test_without_numbers_the_order_is_that_of_the_network() -> None:
    assert caught("order", off.NoOrder) in {"order", "liveness"}


def test_without_forwarding_requests_vanish() -> None:
    assert caught("forwarding", off.NoForwarding, plan=calm()) == "liveness"


def test_with_forwarding_no_request_of_a_calm_schedule_waits_for_a_repeat() -> None:
    node = off.node_with(off.NoRepeats)
    # Nothing is lost in calm schedules, so nothing may depend on a repeat: what a forwarder
    # could not pass on, or what came in the middle of a move, goes on at once (scenario 42).
    for seed in range(40):
        World(seed, node_class=node, plan=calm()).run()


def test_a_target_that_believes_stale_rows_throws_the_only_copy_away() -> None:
    checker = caught("epoch of a row", off.StaleRowsBelieved)
    assert checker in {"liveness", "one owner", "source serves"}


def test_without_the_hop_rule_envelopes_travel_too_far() -> None:
    assert caught("hops", off.NoHopRule) == "hops"


def test_without_their_bound_completion_records_pile_up() -> None:
    assert caught("bound on records", off.RecordsUnbounded) == "bounded"


@pytest.mark.parametrize("seed", range(3))
def test_the_same_harness_with_everything_on_is_clean(seed: int) -> None:
    World(seed, node_class=off.node_with(Core)).run()
