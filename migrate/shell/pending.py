"""The awaitable that a call returns.

A future, so that nothing but one object is made for a call; and a coroutine to whoever asks, so
that `asyncio.create_task(ref.incr())` and task groups take it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from migrate.core.delivery import Outgoing, SendSession
    from migrate.shell.driver import Driver


class Pending(asyncio.Future[Any]):
    """The result to come of one request. Cancelling it tells the sending side."""

    __slots__ = ("_steps", "driver", "method", "out", "server", "session", "timeout_s")

    _steps: Generator[Any, None, Any] | None
    driver: Driver
    out: Outgoing | None
    session: SendSession | None
    server: str
    method: str
    timeout_s: float | None

    def cancel(self, msg: Any | None = None) -> bool:
        """See `asyncio.Future.cancel`; the request's number stays used."""
        if not super().cancel(msg):
            return False
        if self.session is not None and self.out is not None:
            self.driver.cancelled(self.session, self.out)
        return True

    # What makes it a coroutine (PEP 492): it can be stepped.

    def send(self, value: Any) -> Any:
        """One step, as of a coroutine."""
        try:
            steps = self._steps
        except AttributeError:
            steps = self._steps = self.__await__()
        assert steps is not None
        return steps.send(value)

    def throw(self, *error: Any) -> Any:
        """Raise in the waiting side, as into a coroutine."""
        try:
            steps = self._steps
        except AttributeError:
            steps = self._steps = self.__await__()
        assert steps is not None
        return steps.throw(*error)

    def close(self) -> None:
        """Nothing to release: the request goes on, its result is dropped."""
