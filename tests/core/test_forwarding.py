"""Forwarding addresses: bounded, expiring, pointing to higher epochs only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from migrate.core.forwarding import Forwarding


def test_only_a_higher_epoch_replaces_an_entry_s16() -> None:
    table = Forwarding(1_000, 10)
    assert table.learn("s", "b@1", 3, 0)
    assert not table.learn("s", "c@1", 3, 0)
    assert not table.learn("s", "c@1", 2, 0)
    assert table.get("s", 0) == ("b@1", 3)
    assert table.learn("s", "c@1", 4, 0)
    assert table.get("s", 0) == ("c@1", 4)


def test_an_entry_expires() -> None:
    table = Forwarding(1_000, 10)
    table.learn("s", "b@1", 3, 0)
    assert table.get("s", 999) == ("b@1", 3)
    assert table.get("s", 1_000) is None
    assert len(table) == 0


def test_entries_to_a_dead_node_are_dropped() -> None:
    table = Forwarding(1_000, 10)
    table.learn("s", "b@1", 3, 0)
    table.learn("t", "c@1", 3, 0)
    table.forget_node("b@1")
    assert (table.get("s", 0), table.get("t", 0)) == (None, ("c@1", 3))


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from("abc"), st.integers(1, 9), st.integers(0, 50)),
        max_size=60,
    )
)
def test_the_table_is_bounded_and_its_epochs_only_rise(
    learned: list[tuple[int, str, int, int]],
) -> None:
    table = Forwarding(100, 4)
    now = 0
    for server, node, epoch, step in learned:
        now += step
        before = table.get(str(server), now)
        table.learn(str(server), node, epoch, now)
        after = table.get(str(server), now)
        assert after is not None
        assert before is None or after[1] >= before[1]
        assert len(table) <= 4
        table.expire(now)
    table.expire(now + 100)
    assert len(table) == 0
