"""Names of things, as plain strings and integers so that they are cheap to ship and to hash."""

from __future__ import annotations

from typing import TypeAlias

NodeId: TypeAlias = str
"""`name@incarnation`: never reused, also not by a node restarted under the same name."""

ServerId: TypeAlias = str
"""Random; never reused."""

SenderId: TypeAlias = str
"""A server's id, or the node id of a client or of a node that calls on its own account."""

SessionId: TypeAlias = str
"""`sender|born_ms|n`: one sender's numbering towards one server."""

TransferId: TypeAlias = str
Epoch: TypeAlias = int

EPOCH_SHIFT = 32
"""In a session id's last number the sender's epoch stands above these bits."""


def node_name(node: NodeId) -> str:
    """The name a user knows a node by: what stands before the `@`."""
    return node.partition("@")[0]


def session_id(sender: SenderId, born_ms: int, n: int) -> SessionId:
    """Make a session id that tells who sends and when it was opened.

    Args:
        sender: May contain any character; it is taken back from the front.
        born_ms: Milliseconds of the clock that all nodes of a cluster share (`SharedClock`).
        n: Distinguishes sessions one sender opens in the same millisecond.
    """
    return f"{sender}|{born_ms}|{n}"


def session_sender(session: SessionId) -> SenderId:
    """The sender a session id was made for; the whole id if it is malformed."""
    return session.rsplit("|", 2)[0]


def session_born_ms(session: SessionId) -> int:
    """When a session was opened; 0 (thus: too old for anything) if the id is malformed."""
    return _number(session, 1)


def session_epoch(session: SessionId) -> Epoch:
    """The sender's own epoch when it opened the session; 0 if the id is malformed."""
    return _number(session, 2) >> EPOCH_SHIFT


def _number(session: SessionId, position: int) -> int:
    parts = session.rsplit("|", 2)
    return number(parts[position]) or 0 if len(parts) == 3 else 0


def number(text: str) -> int | None:
    """A whole number of at most 19 ASCII digits, or None if the text is anything else."""
    # NB: isdigit is also true of superscripts, which int refuses.
    return int(text) if len(text) < 20 and text.isascii() and text.isdigit() else None
