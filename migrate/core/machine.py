"""What all machines share: a guard for invariants, and a short story of what happened.

A machine takes an event and returns actions. It reads no clock and performs nothing. When an
invariant breaks, the story of its recent events travels with the error, so that a failure
seen once in production can be turned into a transcript.
"""

from __future__ import annotations

from collections import deque

from migrate.errors import InternalError

STORY_LENGTH = 64


class Story:
    """The last few events and actions of a machine, oldest first, as text made only on demand."""

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: deque[tuple[int, object]] = deque(maxlen=STORY_LENGTH)

    def note(self, now_ms: int, what: object) -> None:
        """Remember `what` (kept as it is, turned into text only when the story is told)."""
        self._lines.append((now_ms, what))

    def tell(self) -> str:
        """All that is remembered, one line each."""
        return "\n".join(f"{at} ms: {what}" for at, what in self._lines)


def check(condition: object, message: str, story: Story | None = None) -> None:
    """Raise InternalError unless `condition` holds; active in production too.

    Raises:
        InternalError: Carries `message` and the story; the machine must not be used further.
    """
    if not condition:
        raise InternalError(message + (f"\n{story.tell()}" if story is not None else ""))
