"""Damaged streams do no harm, and what is not damaged comes back: the suite's share of it."""

from __future__ import annotations

import collections

import pytest

import serializers
from tests.fuzz import streams


def test_no_damaged_stream_does_more_than_be_refused() -> None:
    told: list[str] = []

    assert streams.mutations(3_000, 1, reseal=False, show=told.append), told


def test_all_values_come_back() -> None:
    told: list[str] = []

    assert streams.round_trips(300, 1, told.append)
    assert told[0].startswith("300 round trips")


def test_a_stream_that_was_changed_and_is_accepted_is_a_finding() -> None:
    known = streams.seeds()
    count = collections.Counter(streams.judge(data, known) for data in known)
    assert count == {"only data changed": len(known)}

    other = serializers.dumps(["another state"])
    with pytest.raises(AssertionError, match="accepted"):
        streams.judge(other, known)
    assert streams.resealed(other) == other


def test_the_same_number_and_seed_make_the_same_input() -> None:
    known = streams.seeds()

    def some(seed: int) -> list[bytes]:
        return [streams.changed(run, seed, known, reseal=False) for run in range(50)]

    assert some(3) == some(3) != some(4)
