"""Due times: order, replacement, cancelling."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from migrate.core.timers import Timers


def test_keys_come_in_order_of_their_due_times_then_of_their_setting() -> None:
    timers = Timers()
    for key, due in (("c", 5), ("a", 3), ("b", 5)):
        timers.set(key, due)
    assert [timers.pop_due(10) for _ in range(4)] == ["a", "c", "b", None]


def test_nothing_is_due_before_its_time() -> None:
    timers = Timers()
    timers.set("a", 5)
    assert timers.pop_due(4) is None
    assert timers.next_ms() == 5


def test_a_key_set_again_is_due_once_at_the_new_time() -> None:
    timers = Timers()
    timers.set("a", 5)
    timers.set("a", 9)
    assert timers.pop_due(8) is None
    assert timers.pop_due(9) == "a"
    assert timers.pop_due(99) is None


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-1, 20)), max_size=200))
def test_it_agrees_with_a_plain_dictionary(steps: list[tuple[str, int]]) -> None:
    timers = Timers()
    known: dict[str, int] = {}
    for key, due in steps:
        if due < 0:
            timers.cancel(key)
            known.pop(key, None)
        else:
            timers.set(key, due)
            known[key] = due
        assert timers.next_ms() == min(known.values(), default=None)
        assert len(timers) == len(known)
    popped = []
    while (due_key := timers.pop_due(100)) is not None:
        popped.append(str(due_key))
    assert sorted(popped) == sorted(known)
    assert [known[key] for key in popped] == sorted(known.values())
