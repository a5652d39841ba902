"""What leaves for a peer, and in which order."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from migrate.core.messages import CALL, Abort, ChunkTaken, Envelope, Load, Message, Ready
from migrate.shell import wire
from migrate.shell.peers import Peers
from tests.migrate.clusters import run


class FakeLinks:
    """A link on which some bytes wait; tells what was sent, and how."""

    def __init__(self, waiting: int) -> None:
        self.waiting = waiting
        self.sent: list[tuple[str, list[str]]] = []

    def is_up(self, node: str) -> bool:
        return True

    def peer(self, node: str) -> None:
        return None

    def queued_bytes(self, node: str) -> int:
        return self.waiting

    def send(self, node: str, data: bytes, bulk: bool = False) -> bool:
        return self._keep("bulk" if bulk else "ordinary", data)

    def send_urgent(self, node: str, data: bytes) -> bool:
        return self._keep("urgent", data)

    def _keep(self, lane: str, data: bytes) -> bool:
        names = [type(message).__name__ for message in wire.decode_messages(data)]
        self.sent.append((lane, names))
        return True


def envelope(number: int, size: int = 10) -> Envelope:
    return Envelope("s-1", "c/1", number, 1, CALL, "m", bytes(size), 0, "c")


def sent(waiting: int, messages: list[Message]) -> list[tuple[str, list[str]]]:
    async def body() -> list[tuple[str, list[str]]]:
        links: Any = FakeLinks(waiting)
        peers = Peers(
            links, asyncio.get_running_loop(), contextvars.copy_context(), lambda node: None
        )
        for message in messages:
            peers.send("b", message)
        peers.flush()
        found: list[tuple[str, list[str]]] = links.sent
        return found

    return run(body())


CONTROL: list[Message] = [
    Abort("t"),
    Ready("t"),
    ChunkTaken("t", 1),
    Load(1, 0.5, 0.5, 3, False, False),
]


@pytest.mark.parametrize("control", CONTROL, ids=lambda message: type(message).__name__)
def test_control_overtakes_what_waits_for_the_link(control: Message):
    name = type(control).__name__
    found = sent(1_000_000, [envelope(1), envelope(2, 100_000), control, envelope(3)])
    assert found.index(("urgent", [name])) < found.index(("ordinary", ["Envelope", "Envelope"]))
    assert ("bulk", ["Envelope"]) in found


def test_control_goes_along_with_the_others_where_nothing_waits():
    assert sent(0, [envelope(1), Abort("t"), envelope(2)]) == [
        ("ordinary", ["Envelope", "Abort", "Envelope"])
    ]


def test_what_its_sender_flushes_asks_for_no_turn_of_the_loop_and_the_next_one_does_again():
    async def body() -> None:
        links: Any = FakeLinks(0)
        loop = asyncio.get_running_loop()
        turns: list[object] = []

        class Loop:
            def call_soon(self, do: Any, *args: Any, context: Any) -> None:
                turns.append(do)
                loop.call_soon(do, *args, context=context)

        counting: Any = Loop()
        peers = Peers(links, counting, contextvars.copy_context(), lambda node: None)
        peers.flush_comes()
        peers.send("b", envelope(1))
        peers.flush()
        assert links.sent == [("ordinary", ["Envelope"])] and not turns
        peers.send("b", envelope(2))
        await asyncio.sleep(0)
        assert len(links.sent) == 2 and turns

    run(body())
