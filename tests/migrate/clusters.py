"""Several nodes in one process and one loop, and what tests do with them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import migrate

T = TypeVar("T")

QUICK = migrate.NodeOptions(
    call_timeout_s=60.0,
    repeat_first_s=0.2,
    repeat_max_s=1.0,
    quiesce_timeout_s=10.0,
    move_step_timeout_s=5.0,
    hook_timeout_s=5.0,
)
"""Waits that are shorter than the defaults, and long enough for a machine that is busy."""

BOUND_S = 300.0
"""A test that takes longer hangs."""


def run(work: Coroutine[Any, Any, T], bound_s: float = BOUND_S) -> T:
    """Run a test's coroutine to its end, for at most `bound_s` seconds."""

    async def bounded() -> T:
        async with asyncio.timeout(bound_s):
            return await work

    return asyncio.run(bounded())


@contextlib.asynccontextmanager
async def nodes(
    *names: str,
    directory: str | None = None,
    options: migrate.NodeOptions = QUICK,
    **more: migrate.NodeOptions,
) -> AsyncIterator[list[migrate.Node]]:
    """Open nodes of these names on one directory, linked with each other.

    Args:
        *names: Their names.
        directory: URL of the directory; None: one in memory, of this cluster alone.
        options: Tunables of all of them.
        **more: Tunables of the node of that name instead.
    """
    directory = directory or f"memory://{secrets.token_hex(4)}"
    async with contextlib.AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(
                migrate.Node(name=name, directory=directory, options=more.get(name, options))
            )
            for name in names
        ]
        for node in opened:
            await linked(node, opened)
        yield opened


async def linked(node: migrate.Node, others: list[migrate.Node]) -> None:
    """Wait until a node has links with all the others."""
    wanted = {other.id for other in others if other is not node}
    await until(lambda: node._links is not None and all(map(node._links.is_up, wanted)))


async def until(holds: Callable[[], bool], bound_s: float = 60.0) -> None:
    """Wait until something holds that gives no event of its own.

    Raises:
        TimeoutError: It did not come to hold.
    """
    async with asyncio.timeout(bound_s):
        while not holds():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


async def eventually(holds: Callable[[], Awaitable[bool]], bound_s: float = 60.0) -> None:
    """Ask until the answer is yes, where nobody tells.

    Raises:
        TimeoutError: It never was.
    """
    async with asyncio.timeout(bound_s):
        while not await holds():  # noqa: ASYNC110 - the answer is on another node
            await asyncio.sleep(0.01)


def break_links(peer: Any) -> int:
    """Cut every connection of a node or client in the middle, as a network would; how many."""
    links = list(peer._links._up.values())
    for link in links:
        link.drop("cut by the test")
    return len(links)


async def failure_of(work: Any, kind: type[BaseException] = migrate.MigrateError) -> Any:
    """The error that something awaited ends in; fails the test if it ends otherwise."""
    try:
        value = await work
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected, and it returned {value!r}")
