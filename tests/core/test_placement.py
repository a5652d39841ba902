"""Choosing a node by its load."""

from __future__ import annotations

from migrate.core.placement import Candidate, least_loaded


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
