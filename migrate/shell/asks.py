"""Verbs asked of another node: one Ask, one Answer, repeated until answered, done once.

An ask is sent again when a link comes back and every few seconds, under the same id; the node
that serves it keeps the answers for a while, so that a repeat is answered and not done again.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

import serializers
from migrate.core.ids import NodeId, node_name
from migrate.core.messages import Answer, Ask, Message
from migrate.errors import (
    CallTimeout,
    InternalError,
    MigrateError,
    NodeNotFound,
    Outcome,
    PeerError,
    ServerLost,
)
from migrate.ref import Runtime
from migrate.shell import wire

log: Final = logging.getLogger("migrate")

READS: Final = frozenset({"row", "named", "least_loaded", "nodes", "row_changes"})
"""Verbs that any node can answer and that change nothing."""

CHANGES: Final = frozenset(
    {"adopt", "checkpoint", "fork", "move", "replace", "restore", "spawn", "stop"}
)
"""Verbs that may have been carried out by a node that died before it answered."""

REPEAT_S: Final = 2.0
"""Wait before an ask is sent again; links are reliable while they are up."""

FIRST_S: Final = 0.5
"""After this long without an answer it is asked whether the node is there at all."""

ANSWERS_MAX: Final = 10_000
"""Answers kept for repeats, oldest dropped first."""


class Asks:
    """Both sides of asks, for one node or client."""

    def __init__(
        self,
        me: NodeId,
        runtime: Runtime,
        send: Callable[[NodeId, Message], None],
        serve: Callable[[NodeId, str, tuple[Any, ...]], Coroutine[Any, Any, Any]],
        known: Callable[[NodeId], bool],
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
    ) -> None:
        self._known = known
        self._me = me
        self._runtime = runtime
        self._send = send
        self._serve = serve
        self._loop = loop
        self._context = context
        self._n = itertools.count(1)
        self._asked: dict[str, tuple[NodeId, Ask, asyncio.Future[Any]]] = {}
        self._serving: dict[str, asyncio.Task[None]] = {}
        self._own: set[asyncio.Task[Any]] = set()
        self._answers: dict[str, Answer] = {}

    async def ask(self, node: NodeId, verb: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Ask a node and wait for its answer.

        Raises:
            CallTimeout: No answer within `timeout_s`; unknown whether it was done.
            NodeNotFound: The node is gone and never had the ask, or left before it answered.
            MigrateError: Whatever the node answered.
        """
        if node == self._me:
            # As if it had been asked by another node: it goes on when whoever asked is gone,
            # and in the node's own context, not in that of a handler.
            work = self._serve(node, verb, args)
            task = asyncio.Task(work, loop=self._loop, context=self._context.copy())
            self._own.add(task)
            task.add_done_callback(self._own.discard, context=self._context)
            return await asyncio.shield(task)
        ask = Ask(f"{self._me}/{next(self._n)}", verb, serializers.dumps(args))
        future: asyncio.Future[Any] = self._loop.create_future()
        self._asked[ask.id] = (node, ask, future)
        self._send(node, ask)
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                wait_s = FIRST_S
                while True:
                    done, _ = await asyncio.wait([future], timeout=wait_s)
                    if done:
                        return future.result()
                    if not self._known(node):
                        # It was gone before the ask was made, so its death is no news.
                        self.dead(node)
                        continue
                    wait_s = REPEAT_S
                    self._send(node, ask)
        except TimeoutError as error:
            if not limit.expired():
                raise  # It is what the node answered.
            if future.done():
                return future.result()  # It came at the very last.
            raise CallTimeout(
                f"node {node_name(node)} did not answer {verb!r} in {timeout_s} s",
                node=node_name(node),
                timeout_s=timeout_s,
            ) from error
        finally:
            del self._asked[ask.id]

    async def ask_once(
        self, node: NodeId, verb: str, *args: Any, timeout_s: float | None = None
    ) -> Any:
        """As `ask`, but a broken link ends it with NodeNotFound, so that another can be asked."""
        if verb not in READS:
            raise InternalError(f"{verb!r} is no verb that only reads")
        return await self.ask(node, verb, *args, timeout_s=timeout_s)

    def link_down(self, node: NodeId) -> None:
        """The link broke: what only reads is asked elsewhere."""
        for to, ask, future in list(self._asked.values()):
            if to == node and ask.verb in READS and not future.done():
                future.set_exception(
                    NodeNotFound(f"the link with {node_name(node)} broke", node=node_name(node))
                )

    def up(self, node: NodeId) -> None:
        """A link came up (again): what was asked over the former one may be lost."""
        for to, ask, future in list(self._asked.values()):
            if to == node and not future.done():
                self._send(node, ask)

    def dead(self, node: NodeId) -> None:
        """The node will never answer."""
        for to, ask, future in list(self._asked.values()):
            if to == node and not future.done():
                error: MigrateError
                if ask.verb in CHANGES:
                    error = ServerLost(
                        f"node {node_name(node)} died before it answered {ask.verb!r}",
                        node=node_name(node),
                        cause=f"node {node_name(node)} died",
                        outcome=Outcome.UNKNOWN,
                    )
                else:
                    error = NodeNotFound(f"node {node_name(node)} died", node=node_name(node))
                future.set_exception(error)

    def take(self, node: NodeId, message: Message) -> bool:
        """Take a message if it is an ask or an answer; True if it was."""
        if isinstance(message, Answer):
            self._on_answer(node, message)
        elif isinstance(message, Ask):
            self._on_ask(node, message)
        else:
            return False
        return True

    def _on_answer(self, node: NodeId, answer: Answer) -> None:
        asked = self._asked.get(answer.id)
        if asked is None or asked[0] != node or asked[2].done():
            return
        try:
            value = wire.unpack(answer.payload, self._runtime)
        except Exception as error:
            asked[2].set_exception(error)
            return
        if answer.ok:
            asked[2].set_result(value)
        elif isinstance(value, Exception) and not isinstance(value, StopIteration):
            asked[2].set_exception(value)
        else:
            asked[2].set_exception(
                PeerError(
                    f"node {node_name(node)} answered {asked[1].verb!r} with an error that is none",
                    node=node_name(node),
                )
            )

    def _on_ask(self, node: NodeId, ask: Ask) -> None:
        known = self._answers.get(ask.id)
        if known is not None:
            self._send(node, known)
        elif ask.id not in self._serving:
            task = asyncio.Task(self._answer(node, ask), loop=self._loop, context=self._context)
            self._serving[ask.id] = task

    async def _answer(self, node: NodeId, ask: Ask) -> None:
        try:
            try:
                args = wire.unpack(ask.payload, self._runtime)
                answer = Answer(
                    ask.id, True, serializers.dumps(await self._serve(node, ask.verb, args))
                )
            except Exception as error:
                if not isinstance(error, MigrateError):
                    log.debug("ask %s failed", ask.verb, exc_info=error)
                answer = Answer(ask.id, False, _pack_failure(error))
            self._answers[ask.id] = answer
            while len(self._answers) > ANSWERS_MAX:
                del self._answers[next(iter(self._answers))]
            self._send(node, answer)
        finally:
            del self._serving[ask.id]

    async def close(self) -> None:
        """Stop serving; whoever waits for an answer is cancelled by its own task."""
        tasks: list[asyncio.Task[Any]] = [*self._serving.values(), *self._own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _pack_failure(error: Exception) -> bytes:
    try:
        return serializers.dumps(error)
    except Exception:
        text = f"{wire.exception_name(error)}: {error}"
        return serializers.dumps(MigrateError(text, cause=text))
