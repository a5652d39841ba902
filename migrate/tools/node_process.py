"""A process that is nothing but a node: what `migrate node` runs until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final

from migrate.node import Node
from migrate.options import NodeOptions

EXIT_AT_ONCE: Final = 128
"""Added to the number of a signal that came twice; shells say it so."""


async def serve(
    *,
    name: str | None,
    listen: str,
    directory: str | None,
    options: NodeOptions,
    secret_file: str | None,
    spawnable: tuple[str, ...],
    token_file: str | None,
    tls: str | None,
    advertise: str | None,
    data: str | None,
    announce: bool,
    with_parent: bool,
) -> None:
    """Run a node until SIGTERM or SIGINT, or, `with_parent`, until stdin ends.

    Its servers are stopped in order then. A second signal ends the process at once, with
    status 128 and the signal's number.

    Args:
        name: See `Node`.
        listen: See `Node`.
        directory: See `Node`.
        options: See `Node`.
        secret_file: See `Node`.
        spawnable: See `Node`.
        token_file: See `Node`.
        tls: See `Node`.
        advertise: See `Node`.
        data: See `Node`.
        announce: Print one line of JSON with name, address and pid once the node is up, instead
            of a sentence; afterwards whatever the process prints goes to stderr, since nobody
            may be reading stdout any more.
        with_parent: End when stdin does, which is when the process that holds its other side
            is gone. SIGINT is left to that process: a terminal sends it to both.

    Raises:
        Fenced: The node was said to be dead.
        MigrateError: The node could not be opened; nothing is left of it.
    """
    ending = asyncio.Event()
    # A handler that prints must never fill a pipe that nobody reads.
    with _announcements(announce) as tell, _signals(ending, ignore_interrupt=with_parent):
        node = Node(
            name,
            listen,
            directory,
            options=options,
            secret_file=secret_file,
            spawnable=spawnable,
            token_file=token_file,
            tls=tls,
            advertise=advertise,
            data=data,
        )
        async with node:
            if with_parent:
                _watch_stdin(asyncio.get_running_loop(), ending)
            tell(node)
            closed = asyncio.ensure_future(node.wait_closed())
            told = asyncio.ensure_future(ending.wait())
            await asyncio.wait([closed, told], return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            if closed.done():
                closed.result()
            closed.cancel()


@contextlib.contextmanager
def _announcements(as_json: bool) -> Iterator[Any]:
    """Yield what tells that a node is up; from then on stdout is stderr if it was JSON."""
    if not as_json:
        yield _say
        return
    sys.stdout.flush()
    announcement = os.dup(1)
    os.dup2(2, 1)

    def tell(node: Node) -> None:
        nonlocal announcement
        text = json.dumps({"name": node.name, "address": node.address, "pid": os.getpid()})
        os.write(announcement, text.encode() + b"\n")
        os.close(announcement)
        announcement = -1

    try:
        yield tell
    finally:
        if announcement >= 0:
            os.close(announcement)


def _say(node: Node) -> None:
    print(f"node {node.name} is up at {node.address} (pid {os.getpid()}); Ctrl-C stops it")
    sys.stdout.flush()


@contextlib.contextmanager
def _signals(ending: asyncio.Event, ignore_interrupt: bool) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        if ending.is_set():
            os._exit(EXIT_AT_ONCE + number)
        ending.set()

    loop.add_signal_handler(signal.SIGTERM, end, signal.SIGTERM)
    if ignore_interrupt:
        loop.add_signal_handler(signal.SIGINT, lambda: None)
    else:
        loop.add_signal_handler(signal.SIGINT, end, signal.SIGINT)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_signal_handler(signal.SIGINT)


def _watch_stdin(loop: asyncio.AbstractEventLoop, ending: asyncio.Event) -> None:
    """Set `ending` once stdin has ended; what is written to it is ignored."""

    def watch() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass  # Closed: the same as its end.
        with contextlib.suppress(RuntimeError):
            # The loop may have ended by then, on a signal.
            loop.call_soon_threadsafe(ending.set)

    # A thread, because stdin may be a file or a terminal, which event loops cannot watch or
    # would leave non-blocking for others that share it.
    threading.Thread(target=watch, name="migrate-stdin", daemon=True).start()
