"""Forwarding addresses: where late envelopes go after a server has left.

Theory of operation. A node that gave a server away keeps (node, epoch) for a while. An entry
is replaced only by one of a higher epoch, so following entries raises the epoch at each step
and cannot loop. An envelope is passed on at most HOPS_MAX times; after that the sender is
sent to the directory. Entries expire, and the table is bounded: the oldest goes first, which
costs a late sender one look at the directory and nothing else.
"""

from __future__ import annotations

from migrate.core.ids import NodeId, ServerId

HOPS_MAX = 2


class Forwarding:
    """Bounded map of server to (node, epoch) with expiry."""

    __slots__ = ("_entries", "_entries_max", "_expiry_ms")

    def __init__(self, expiry_ms: int, entries_max: int) -> None:
        self._entries: dict[ServerId, tuple[NodeId, int, int]] = {}
        self._expiry_ms = expiry_ms
        self._entries_max = entries_max

    def learn(self, server: ServerId, node: NodeId, epoch: int, now_ms: int) -> bool:
        """Keep (node, epoch) unless something at least as new is known; True if it was kept."""
        known = self._entries.get(server)
        if known is not None and known[1] >= epoch:
            return False
        self._entries.pop(server, None)
        self._entries[server] = (node, epoch, now_ms + self._expiry_ms)
        if len(self._entries) > self._entries_max:
            del self._entries[next(iter(self._entries))]
        return True

    def get(self, server: ServerId, now_ms: int) -> tuple[NodeId, int] | None:
        """Where the server went, or None if that is not known or has expired."""
        known = self._entries.get(server)
        if known is None:
            return None
        if known[2] <= now_ms:
            del self._entries[server]
            return None
        return known[0], known[1]

    def forget(self, server: ServerId) -> None:
        """Drop what is known: the server is here, or gone for good."""
        self._entries.pop(server, None)

    def forget_node(self, node: NodeId) -> None:
        """Drop every entry that points to a node seen dead."""
        for server in [s for s, entry in self._entries.items() if entry[0] == node]:
            del self._entries[server]

    def expire(self, now_ms: int) -> int:
        """Drop what has expired, and tell how many; entries stand in the order of their expiry."""
        before = len(self._entries)
        while self._entries:
            server = next(iter(self._entries))
            if self._entries[server][2] > now_ms:
                break
            del self._entries[server]
        return before - len(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
