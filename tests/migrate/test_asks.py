"""Asks: whatever comes when, whoever asked gets an answer or a typed error."""

from __future__ import annotations

import asyncio
import contextvars
import time
from typing import Any

import pytest

import migrate
import serializers
from migrate.core.messages import Answer, Ask, Message
from migrate.shell.asks import Asks
from tests.migrate.clusters import failure_of, run

LIMIT_S = 0.01


def asks(sent: list[Message]) -> Asks:
    runtime: Any = None
    return Asks(
        "me@1",
        runtime,
        lambda node, message: sent.append(message),
        lambda node, verb, args: asyncio.sleep(0),
        lambda node: True,
        asyncio.get_running_loop(),
        contextvars.copy_context(),
    )


def test_an_ask_that_nobody_answers_ends_in_call_timeout():
    async def body() -> None:
        error = await failure_of(asks([]).ask("a@1", "row", timeout_s=LIMIT_S))
        assert type(error) is migrate.CallTimeout
        assert (error.node, error.timeout_s) == ("a", LIMIT_S)

    run(body())


@pytest.mark.parametrize("ok", [True, False])
def test_an_answer_that_comes_in_the_turn_in_which_the_time_is_over_counts(ok: bool):
    async def body() -> None:
        sent: list[Message] = []
        asker = asks(sent)
        asked = asyncio.create_task(asker.ask("a@1", "row", timeout_s=LIMIT_S))
        await asyncio.sleep(0)  # Its first step sends.
        (ask,) = sent
        assert isinstance(ask, Ask)
        value: Any = 7 if ok else migrate.CallTimeout("the node's own")
        asker.take("a@1", Answer(ask.id, ok, serializers.dumps(value)))
        # The loop is held until the time is over, so it sees both in one turn.
        time.sleep(2 * LIMIT_S)  # noqa: ASYNC251
        if ok:
            assert await asked == 7
        else:
            assert "the node's own" in str(await failure_of(asked))

    run(body())


async def asked_of_a(*answers: tuple[str, bool, object]) -> Any:
    """What an ask of node a ends in when these (sender, ok, value) come in answer to it."""
    sent: list[Message] = []
    asker = asks(sent)
    asked = asyncio.create_task(asker.ask("a@1", "row", timeout_s=60))
    await asyncio.sleep(0)  # Its first step sends.
    (ask,) = sent
    assert isinstance(ask, Ask)
    for node, ok, value in answers:
        assert asker.take(node, Answer(ask.id, ok, serializers.dumps(value)))
    return await asked


def test_an_answer_of_a_node_that_was_not_asked_counts_for_nothing():
    assert run(asked_of_a(("c@1", True, "forged"), ("a@1", True, "true"))) == "true"


@pytest.mark.parametrize(
    "value",
    ["no exception", None, StopIteration("x"), KeyboardInterrupt(), asyncio.CancelledError()],
)
def test_an_error_that_is_none_ends_the_ask(value: object):
    async def body() -> None:
        error = await failure_of(asked_of_a(("a@1", False, value)))
        assert type(error) is migrate.PeerError

    run(body())
