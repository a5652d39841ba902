"""`migrate.check` says ahead of time what a move would refuse or lose."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import migrate
from tests.migrate.clusters import failure_of, nodes, run
from tests.migrate.servers import Unpicklable

pytestmark = pytest.mark.usefixtures("cluster_secret")


@migrate.server(movable=False)
class Pinned:
    pass


@migrate.server(version=3)
class Grown:
    link: socket.socket

    def __init__(self) -> None:
        self.lock = threading.Lock()


def begun() -> Iterator[str]:
    """A generator in the middle of its run; one that has not begun could travel."""
    generator = (n for n in "xy")
    next(generator)
    return generator


class Cannot:
    def __init__(self) -> None:
        self.parts: dict[str, Any] = {"a": begun(), "b": [begun()]}

    def checked(self) -> list[str]:
        return [problem.path for problem in migrate.check(self).problems]


def test_a_check_finds_what_a_move_refuses_all_of_it():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Cannot)
            told = await ref.checked()
            error = await failure_of(a.migrate(ref, to="b"))
            assert isinstance(error, migrate.NotPicklable)
            assert told == ["Cannot.parts['a']", "Cannot.parts['b'][0]"]
            assert [text.partition(": ")[0] for text in error.problems] == told
            assert error.path == told[0] and "1 more" in str(error)

    run(body())


def test_options_and_declarations_of_a_class_are_part_of_the_report():
    pinned = migrate.check(Pinned)
    assert not pinned.ok and "movable=False" in pinned.problems[0].reason
    assert not migrate.check(Pinned()).ok

    grown = migrate.check(Grown)
    assert grown.ok
    assert [finding.path for finding in grown.lossy] == ["Grown.link", "Grown"]
    assert "upgrade" in grown.lossy[1].reason


def test_checking_leaves_object_and_class_as_they_are():
    grown = Grown()
    before = dict(vars(grown)), set(vars(Grown))

    with grown.lock:
        report = migrate.check(grown)

    assert report.lossy[0].path == "Grown.lock"
    # pickle itself remembers the names of a class's slots.
    assert (dict(vars(grown)), set(vars(Grown)) - {"__slotnames__"}) == before
    assert not migrate.check(Unpicklable()).ok
