"""What a handler knows about itself: `migrate.current()`.

A `Scope` stands for one run of a handler or hook. While it runs, the scope is the runtime that
refs are used through, so that requests leave in the name of the server, under its own session.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct

from migrate.core.ids import node_name, session_sender
from migrate.ref import current_runtime
from migrate.server import Current

if TYPE_CHECKING:
    from migrate.core.delivery import Entry
    from migrate.core.incarnation import Incarnation
    from migrate.ref import Ref, RefObject
    from migrate.shell.driver import Driver
    from migrate.shell.host import Hosted


class Scope(Struct, eq=False):
    """One run of a handler (`entry`) or of a hook (`entry` None)."""

    driver: Driver
    host: Hosted
    inc: Incarnation
    entry: Entry | None

    def run_id(self) -> str:
        """Names this run in chains of calls; empty for a hook."""
        return f"{self.inc.id}/{self.entry.run}" if self.entry is not None else ""

    def chain(self) -> tuple[str, ...]:
        """The runs that wait for what this run asks of others, outermost first."""
        if self.entry is None:
            return ()
        return (*self.entry.chain, f"{self.inc.id}/{self.entry.run}")

    def current(self) -> Current:
        """What `migrate.current()` tells."""
        entry = self.entry
        session = entry.session if entry is not None else None
        return Current(
            ref=cast("Ref[Any]", self.host.ref),
            node=node_name(self.driver.node),
            epoch=self.inc.row.epoch,
            caller=session_sender(session.id) if session is not None else None,
            request_id=f"{session.id}#{entry.seq}" if session is not None and entry else None,
        )

    def call(
        self,
        ref: RefObject,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> Any:
        """See `migrate.ref.Runtime`."""
        return self.driver.call(ref, method, args, kwargs, timeout_s)

    def cast(
        self,
        ref: RefObject,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        timeout_s: float | None,
    ) -> Any:
        """See `migrate.ref.Runtime`."""
        return self.driver.cast(ref, method, args, kwargs, timeout_s)


def current_scope() -> Scope | None:
    """The scope of the running handler or hook, or None outside of one."""
    scope = current_runtime.get()
    return scope if type(scope) is Scope else None
