"""Channel interface: ordered frames between two ends, with back-pressure.

A channel carries frames and looks into none. Each end has at most one `write`
and one `read` under way. It knows nothing of peers, secrets or reconnection;
`rpc.links` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar, Final, TypeAlias

from rpc.errors import FrameError

Buffer: TypeAlias = bytes | bytearray | memoryview

DESCRIPTORS_MAX: Final = 64
"""Descriptors that are sent at once; the kernel takes 253."""


class Channel(ABC):
    """One end of a connection.

    Attributes:
        address: The other end, for messages to people.
        kind: "grpc", "unix" or "memory".
    """

    address: str
    kind: ClassVar[str]

    certified: frozenset[str] | None = None
    """The names in the certificate of the other end, at the accepting end of a channel with TLS."""

    @abstractmethod
    async def write(self, parts: Sequence[Buffer]) -> None:
        """Send one frame.

        Args:
            parts: The frame's bytes, one part after the other; at least one byte.
                They are taken as they are at the call: whatever waits is copied.

        Returns:
            Once the channel has room for another frame; the other end may not
            have read this one.

        Raises:
            ChannelBroken: The connection has ended.
        """

    @abstractmethod
    async def read(self) -> bytes | memoryview | None:
        """Receive one frame.

        Returns:
            The next frame, or None once the other end has finished.

        Raises:
            ChannelBroken: The connection has ended otherwise.
            FrameError: Something arrived that is no frame.
        """

    async def receive(self, handle: Callable[[Buffer], bool]) -> bool:
        """Receive frame after frame.

        Args:
            handle: Called with each frame; whether it wants another one.

        Returns:
            True once `handle` wants no more, False once the other end has finished.

        Raises:
            ChannelBroken, FrameError: As from `read`.
            Exception: Whatever `handle` raises.
        """
        while (frame := await self.read()) is not None:
            if not handle(frame):
                return True
        return False

    @property
    def shares(self) -> bool:
        """Whether descriptors of shared memory can be sent to the other end."""
        return False

    def give(self, token: int, descriptors: Sequence[int]) -> bool:
        """Send descriptors, ahead of the frame that names their token; they stay open here.

        Args:
            token: A number that no others of this end have.
            descriptors: 1 to `DESCRIPTORS_MAX`.

        Returns:
            Whether they left; if not, there is no room, or nobody to take them.
        """
        return False

    def take(self, token: int) -> list[int]:
        """Take the descriptors that came under a token, in order; the caller closes them.

        Raises:
            FrameError: None came.
        """
        raise FrameError(f"{self.address} sent no descriptors under the token {token}")

    @abstractmethod
    async def finish(self) -> None:
        """Send no more. The other end reads what was written, then None.

        Does nothing on a connection that has ended.
        """

    @abstractmethod
    def abort(self) -> None:
        """End the connection at once, in both directions.

        Waiting reads and writes of both ends raise `ChannelBroken`, here soon
        and there when the news arrives. Does nothing the second time.
        """

    @abstractmethod
    async def close(self) -> None:
        """Abort if need be, and release what the channel holds."""


Accept: TypeAlias = Callable[[Channel], Awaitable[None]]
"""Called with each connection that comes in; the channel ends when it returns."""


class Listener(ABC):
    """Takes connections at an address until it is closed.

    Attributes:
        address: Where it listens, with the port that was chosen.
    """

    address: str

    @abstractmethod
    async def close(self, grace_s: float) -> None:
        """Take no more connections; end those that are left after `grace_s` seconds."""


class Transport(ABC):
    """A kind of channel: how to listen and how to dial."""

    @abstractmethod
    async def listen(self, address: str, accept: Accept) -> Listener:
        """Take connections at an address.

        Args:
            address: In the transport's own notation.
            accept: Runs once for each connection.

        Returns:
            The listener, already listening.

        Raises:
            ListenFailed: The address is not free, or not fit to listen on.
        """

    @abstractmethod
    async def dial(self, address: str) -> Channel:
        """Begin a connection.

        Returns:
            A channel. That nobody answers may show only when it is used.

        Raises:
            Unreachable: Nobody listens there.
        """
