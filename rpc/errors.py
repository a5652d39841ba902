"""What can go wrong on the wire: RpcError and its children.

Every error says in its text what failed, why, and what to do; its fields say
the same to programs. All survive pickling with their fields and notes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _rebuild(kind: type[RpcError], message: str, state: dict[str, Any]) -> RpcError:
    error = kind.__new__(kind, message)
    # An OSError, which a time-out is, sets these in its __init__ only.
    error.args = (message,)
    error.__dict__.update(state)
    return error


class RpcError(Exception):
    """Root of everything that `rpc` raises by intent.

    Attributes:
        message: The whole text.
        address: host:port concerned, or "" if none is.
        peer_id: Incarnation id of the peer concerned, or "" if it is unknown.
    """

    def __init__(self, message: str, *, address: str = "", peer_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.address = address
        self.peer_id = peer_id

    def __reduce__(self) -> tuple[Callable[..., RpcError], tuple[Any, ...]]:
        return _rebuild, (type(self), self.message, dict(self.__dict__))


class AuthFailed(RpcError):
    """The two sides do not hold the same cluster secret; no link came up."""


class SecretFileError(RpcError):
    """The file with the cluster secret cannot be used; nothing was changed.

    Attributes:
        path: The file.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class PeerRefused(RpcError):
    """The peer was reached and one side does not want this link.

    Attributes:
        reason: "version", "incarnation", "duplicate", "limit", "closing",
            "malformed" or "protocol" (something else listens there).
    """

    def __init__(self, message: str, *, reason: str, address: str = "", peer_id: str = "") -> None:
        super().__init__(message, address=address, peer_id=peer_id)
        self.reason = reason


class PeerClosed(RpcError):
    """The peer ended the link in an orderly way and will not come back."""


class FrameError(RpcError):
    """A frame that is not what the peer of this link may send.

    Whatever the frame held was not delivered; the link it came by is closed.
    """


class ChannelBroken(RpcError):
    """The connection ended before its orderly end; what was under way is lost."""


class Unreachable(RpcError):
    """Nothing answered at the address; a later try may succeed."""


class LinkTimeout(RpcError, TimeoutError):
    """No link came up in time.

    Attributes:
        timeout_s: The time allowed, in seconds.
    """

    def __init__(
        self, message: str, *, timeout_s: float, address: str = "", peer_id: str = ""
    ) -> None:
        super().__init__(message, address=address, peer_id=peer_id)
        self.timeout_s = timeout_s


class ListenFailed(RpcError):
    """The address cannot be listened on; nothing is listening."""


class MessageTooLarge(RpcError):
    """The message is over `message_bytes_max`; it was not queued.

    Attributes:
        size_bytes: Its size.
        limit_bytes: The limit.
    """

    def __init__(
        self, message: str, *, size_bytes: int, limit_bytes: int, peer_id: str = ""
    ) -> None:
        super().__init__(message, peer_id=peer_id)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class LinksClosed(RpcError):
    """The `Links` was closed; make a new one."""
