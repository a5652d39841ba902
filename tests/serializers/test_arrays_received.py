"""Arrays in the memory of a message that arrived are arrays of their own."""

from __future__ import annotations

import numpy as np

import serializers


class Memory(bytearray):
    """As the one in which links put messages together."""

    __slots__ = ()
    __received__ = True


def test_an_array_leaves_without_the_message_that_it_came_in():
    sent = [np.arange(1000, dtype=np.uint8), np.zeros(500_000, dtype=np.uint8)]
    first, second = serializers.loads(Memory(serializers.dumps(sent)))  # type: ignore[misc]
    assert len(serializers.dumps(first)) < 3000
    assert 500_000 < len(serializers.dumps(second)) < 503_000
    copy = serializers.loads(serializers.dumps([first, first[10:20]]))
    copy[0][10] = 77  # type: ignore[index]
    assert copy[1][0] == 77, "views of one array are still views"  # type: ignore[index]


def test_the_control_an_array_over_a_bytearray_of_the_programs_takes_it_along():
    memory = bytearray(500_000)
    array = np.frombuffer(memory, dtype=np.uint8)[:1000]
    array_there, memory_there = serializers.loads(serializers.dumps([array, memory]))  # type: ignore[misc]
    memory_there[3] = 9
    assert array_there[3] == 9
