from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from migrate.core.clock import JUMP_MS, JUMPS_MAX, SharedClock

HOUR_MS = 3_600_000

steps = st.lists(
    st.tuples(st.integers(0, HOUR_MS), st.integers(-HOUR_MS, 24 * HOUR_MS)), max_size=JUMPS_MAX
)


def test_a_node_follows_the_clock_that_is_furthest_ahead() -> None:
    clock = SharedClock()
    assert clock.now(1000) == 1000
    assert not clock.hear(900, 1000)
    assert not clock.hear(1000 + JUMP_MS - 1, 1000)
    assert clock.now(1000) == 1000 + JUMP_MS - 1
    assert clock.hear(9 * HOUR_MS, 1000)
    assert clock.now(2000) == 9 * HOUR_MS + 1000
    assert not clock.hear(9 * HOUR_MS, 2000)


def test_a_session_from_before_a_jump_is_as_old_as_it_was() -> None:
    clock = SharedClock()
    born = clock.now(5000)
    clock.hear(24 * HOUR_MS, 6000)
    assert clock.age(born, 6000) == 1000
    assert clock.age(born, 7000) == 2000
    # One of a node that jumps a little later than this one.
    assert clock.age(6500, 7000) == 500
    assert clock.age(clock.now(7000), 7500) == 500
    # From a node whose clock is ahead still.
    assert clock.age(clock.now(7000) + 300, 7000) == -300


def test_a_client_follows_also_a_clock_that_is_behind() -> None:
    clock = SharedClock()
    clock.follow(500, 90_000)
    assert clock.now(90_100) == 600


@given(steps)
def test_the_shared_time_never_goes_back_and_ages_are_true_over_any_jumps(
    told: list[tuple[int, int]],
) -> None:
    clock = SharedClock()
    now_ms, before_ms = HOUR_MS, HOUR_MS
    born: list[tuple[int, int]] = []
    for wait_ms, more_ms in told:
        now_ms += wait_ms
        born.append((clock.now(now_ms), now_ms))
        if not 0 < more_ms < JUMP_MS:
            assert clock.hear(clock.now(now_ms) + more_ms, now_ms) == (more_ms > 0)
        assert clock.now(now_ms) >= before_ms
        before_ms = clock.now(now_ms)
        for stamp, at_ms in born:
            assert clock.age(stamp, now_ms) == now_ms - at_ms


def test_of_too_many_jumps_ids_from_before_the_oldest_are_too_old() -> None:
    clock = SharedClock()
    born = clock.now(1000)
    for number in range(JUMPS_MAX + 1):
        clock.hear(clock.now(2000 + number) + HOUR_MS, 2000 + number)
    assert clock.age(born, 3000) == 2000 + HOUR_MS
