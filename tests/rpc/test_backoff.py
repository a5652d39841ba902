from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.backoff import exponential, jittered


@pytest.mark.parametrize(("first_s", "max_s", "factor"), [(0, 1, 2), (2, 1, 2), (1, 2, 0.5)])
def test_unfit_arguments_are_refused_at_the_call(
    first_s: float, max_s: float, factor: float
) -> None:
    with pytest.raises(ValueError, match="must be"):
        exponential(first_s, max_s, factor)


def test_waits_double_up_to_the_bound() -> None:
    assert list(islice(exponential(0.5, 3.0), 5)) == [0.5, 1.0, 2.0, 3.0, 3.0]


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1))
def test_jitter_leaves_at_least_half_and_at_most_the_whole(draws: list[float]) -> None:
    source = iter(draws)
    waits = jittered(iter([2.0] * len(draws)), lambda: next(source))

    assert all(1.0 <= wait_s <= 2.0 for wait_s in waits)
