"""Choosing nodes by their load, and by what fails together."""

from __future__ import annotations

from migrate.core.placement import Candidate, least_loaded, standbys


def node(
    name: str,
    *,
    cpu: float = 0.0,
    mailbox: int = 0,
    servers: int = 0,
    admits: bool = True,
    placed: int = 0,
) -> Candidate:
    return Candidate(name, cpu, 0.0, mailbox, servers, admits, placed)


def test_no_node_that_admits_servers_is_no_choice():
    assert least_loaded([]) is None
    assert least_loaded([node("a", admits=False)]) is None


def test_the_less_busy_node_is_chosen_whatever_it_hosts():
    assert least_loaded([node("a", cpu=0.9), node("b", cpu=0.1, servers=100)]) == "b"


def test_a_node_where_messages_wait_is_left_alone():
    assert least_loaded([node("a", mailbox=2_000), node("b", cpu=0.5)]) == "b"


def test_equal_load_goes_to_the_node_with_fewer_servers_then_to_the_first_name():
    assert least_loaded([node("a", servers=2), node("b", servers=1)]) == "b"
    assert least_loaded([node("b"), node("a")]) == "a"


def test_a_node_that_admits_nothing_is_passed_over_though_it_is_idle():
    assert least_loaded([node("a", admits=False), node("b", cpu=1.5)]) == "b"


def test_a_burst_between_two_samples_is_spread_over_nodes_that_differ_a_little():
    placed = {"a": 0, "b": 0}
    for _ in range(40):
        chosen = least_loaded(
            [node("a", cpu=0.4, placed=placed["a"]), node("b", cpu=0.0, placed=placed["b"])]
        )
        assert chosen is not None
        placed[chosen] += 1
    assert min(placed.values()) >= 10


def test_standbys_are_on_other_hosts_first_and_there_on_the_less_loaded() -> None:
    there = [node("a"), node("b", cpu=0.9), node("c", cpu=0.5), node("d")]
    assert standbys(there, count=3, near={"a", "d"}) == ["c", "b", "a"]


def test_standbys_that_were_named_come_before_all_others() -> None:
    there = [node("a"), node("b", cpu=0.9)]
    assert standbys(there, count=1, named=["b"], present=["a"], near={"b"}) == ["b"]


def test_a_choice_that_somebody_asks_for_prefers_another_host_to_who_stands_by() -> None:
    there = [node("a"), node("b", cpu=0.9)]
    assert standbys(there, count=1, present=["a"], near={"a"}) == ["b"]
    assert standbys(there, count=1, present=["a"], near={"a"}, settled=True) == ["a"]


def test_of_nodes_that_are_as_far_away_those_that_stand_by_stay() -> None:
    there = [node("a"), node("b", cpu=0.9)]
    assert standbys(there, count=1, present=["b"]) == ["b"]


def test_a_node_that_admits_nothing_gets_no_standby_and_keeps_the_one_it_has() -> None:
    assert standbys([node("a", admits=False)], count=1, named=["a"]) == []
    assert standbys([node("a", admits=False)], count=1, present=["a"]) == ["a"]


def test_a_node_that_is_emptied_keeps_its_standby_until_another_one_has_it() -> None:
    drained = node("a", admits=False)
    here = {"present": ["a"], "leaving": ["a"], "named": ["a"], "settled": True}
    assert standbys([drained], count=1, **here) == ["a"]
    assert standbys([drained, node("b", cpu=3.0)], count=1, **here) == ["b"]


def test_fewer_nodes_than_wanted_are_all_that_there_are() -> None:
    assert standbys([node("a")], count=3) == ["a"]
    assert standbys([node("a")], count=0) == []
