"""Channels between processes: one gRPC stream each.

The stream's messages are `livemigrate.v1.Frame`, one `bytes` field, which is
put on and taken off by hand here: the generated class would copy each frame
twice more.

grpc.aio offers two styles. `read` and `write` are used on both sides: a
coroutine that reads in a loop calls the receiver directly, and no task or
queue stands between the socket's thread and the handler of a message.

After a frame was sent the loop is kept awake for a moment, as gRPC's thread would have to wake it
for what comes back. That thread needs a processor meanwhile, so at each turn the loop offers its
own: without that, polling makes a call slower where there are two cores for two processes.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import grpc
import grpc.aio

from rpc.channel import Accept, Buffer, Channel, Listener, Transport
from rpc.errors import ChannelBroken, FrameError, ListenFailed, PeerRefused, Unreachable
from rpc.polling import Polling
from rpc.tls import ROLE_NAMES, Credentials

# The stubs in common use miss or mistake parts of grpc.aio, so what is used of
# it here is declared in this module's own words.
_aio: Final = cast(Any, grpc.aio)

METHOD: Final = "/livemigrate.v1.Link/Connect"
_SERVICE: Final = "livemigrate.v1.Link"

_TAG: Final = 0x0A  # Field 1, length-delimited.
_HEAD_BYTES_MAX: Final = 11

SERVICE_BYTES_MAX: Final = 4 * 1024 * 1024
"""Limit of a message of the other services on the port; gRPC's own default."""


def frame_head(size: int) -> bytes:
    """Encode what precedes a frame's bytes in a `livemigrate.v1.Frame`.

    Args:
        size: Bytes of the frame.

    Returns:
        Field tag and length.
    """
    if size < len(_HEADS):
        return _HEADS[size]
    return _encode_head(size)


def _encode_head(size: int) -> bytes:
    head = bytearray((_TAG,))
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head)


# Most frames are small, and each would pay a microsecond for its head.
_HEADS: Final = tuple(map(_encode_head, range(2048)))


def _message(parts: Sequence[Buffer]) -> bytes:
    size = len(parts[0]) + len(parts[1]) if len(parts) == 2 else sum(map(len, parts))
    return b"".join((frame_head(size), *parts))


def frame_of(message: bytes) -> memoryview:
    """Take a frame out of a serialized `livemigrate.v1.Frame`, uncopied.

    Args:
        message: What arrived; anything.

    Returns:
        The bytes of its only field; empty if the message is.

    Raises:
        FrameError: It is not exactly that field.
    """
    length = len(message)
    if 130 < length < 16387 and message[0] == _TAG and message[2] < 0x80 <= message[1]:
        # A length of two bytes, as most frames have.
        if message[1] - 0x80 + (message[2] << 7) == length - 3:
            return memoryview(message)[3:]
    if not message:
        return memoryview(b"")
    size = 0
    at = 1
    for at in range(1, min(len(message), _HEAD_BYTES_MAX)):
        size |= (message[at] & 0x7F) << (7 * (at - 1))
        if message[at] < 0x80:
            break
    else:
        raise FrameError("a gRPC message whose length field does not end")
    if message[0] != _TAG or at + 1 + size != len(message):
        raise FrameError("a gRPC message that is not one livemigrate.v1.Frame")
    return memoryview(message)[at + 1 :]


# Errors that grpc.aio raises from reads and writes on a stream that has ended.
# Which one depends on the instant; all mean the same here.
_ENDED: Final = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)


def _options(message_bytes_max: int, silence_max_s: float) -> list[tuple[str, Any]]:
    silence_ms = max(1000, int(silence_max_s * 1000))
    return [
        # Two processes must never share a port by chance.
        ("grpc.so_reuseport", 0),
        # A stream cannot be retried; the layer above repeats what was lost.
        ("grpc.enable_retries", 0),
        # Each connection is its own; a shared pool would hand a new link the
        # old one's back-off, or its dying socket.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.service_config_disable_resolution", 1),
        # Frames between nodes never go through the proxy meant for the web.
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", message_bytes_max),
        ("grpc.max_metadata_size", 16384),
        # The links ping by themselves when idle. These are for a connection
        # whose peer's host is gone while a frame is under way.
        ("grpc.keepalive_time_ms", silence_ms),
        ("grpc.keepalive_timeout_ms", silence_ms),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", silence_ms // 2),
    ]


_SETTLE_S: Final = 0.2
"""Bound of the wait for a cancelled call to be over; it takes some 100 us."""


def calls_under_way() -> list[asyncio.Task[Any]]:
    """Find the tasks in which grpc.aio waits for calls to be over.

    A call that is cancelled counts as done at once, while its operations in
    gRPC's core still complete. If the loop is closed before they have, they
    are delivered to the next loop of the process, which stumbles over them.
    There is no public way to wait for that; if the task's name changes in a
    later release, nothing is waited for.
    """
    return [
        task
        for task in asyncio.all_tasks()
        if getattr(task.get_coro(), "__qualname__", "").endswith("._handle_status_once_received")
    ]


def _names(context: Any) -> frozenset[str] | None:
    """The names in the certificate that the other end has shown; None without TLS."""
    if b"ssl" not in context.get("transport_security_type", ()):
        return None
    return frozenset(
        name.decode(errors="replace") for name in context.get("x509_subject_alternative_name", ())
    )


class _GrpcChannel(Channel):
    """What both ends have in common."""

    kind = "grpc"

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._polling = Polling(self._loop)
        # A turn of polling is still to come, if only to find that it is over.
        self._poll_due = False

    def _begin_to_poll(self) -> None:
        if self._polling.begin() and not self._poll_due:
            self._poll_due = True
            self._loop.call_soon(self._poll)

    def _poll(self) -> None:
        # The loop itself looks for what has come, once in each of its turns.
        if self._polling.lost() or not self._polling.goes_on():
            self._poll_due = False
        else:
            self._loop.call_soon(self._poll)


class _AcceptedChannel(_GrpcChannel):
    """The accepting end; lives inside the handler of one RPC."""

    def __init__(self, context: Any) -> None:
        super().__init__()
        self.address = str(context.peer())
        self.certified = _names(context.auth_context())
        self._context = context
        self._handler = asyncio.current_task()
        self._aborted = False
        self.returned = False

    def _broken(self, why: object) -> ChannelBroken:
        return ChannelBroken(
            f"the connection from {self.address} ended: {why}", address=self.address
        )

    async def write(self, parts: Sequence[Buffer]) -> None:
        if self._aborted or self.returned:
            raise self._broken("ended here")
        try:
            self._begin_to_poll()
            await self._context.write(_message(parts))
        except _ENDED as error:
            raise self._broken(error) from error

    async def read(self) -> memoryview | None:
        if self._aborted:
            raise self._broken("ended here")
        try:
            message = await self._context.read()
        except _ENDED as error:
            raise self._broken(error) from error
        except asyncio.CancelledError:
            # Both the peer's going away and our own `abort` cancel the handler.
            if self._is_aborted() and self._handler is not None:
                self._handler.uncancel()
                raise self._broken("ended here") from None
            raise
        self._polling.came()
        if message is _aio.EOF:
            return None
        return frame_of(message)

    def _is_aborted(self) -> bool:
        # A call, since a type checker would take the value from before the read.
        return self._aborted

    async def finish(self) -> None:
        """The handler's return finishes the stream; see `_serve`."""

    def abort(self) -> None:
        if not self._aborted and not self.returned:
            self._aborted = True
            # The only way to end a read that waits in the handler.
            if self._handler is not None:
                self._handler.cancel()

    async def close(self) -> None:
        self.abort()


class _DialledChannel(_GrpcChannel):
    """The dialling end; owns its gRPC channel."""

    def __init__(
        self,
        address: str,
        channel: Any,
        call: Any,
    ) -> None:
        super().__init__()
        self.address = address
        self._channel = channel
        self._call = call
        self._aborted = False
        self._heard = False
        # Whether gRPC's core has said that the call is over.
        self._over = False

    def _error(self, error: BaseException | None) -> ChannelBroken | Unreachable | PeerRefused:
        if not self._heard and isinstance(error, grpc.aio.AioRpcError):
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return PeerRefused(
                    f"the gRPC server at {self.address} has no livemigrate link; dial the address "
                    "that a node listens on",
                    reason="protocol",
                    address=self.address,
                )
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return Unreachable(
                    f"nothing answers at {self.address}: {error.details()}; see that a node is "
                    "running and listens there",
                    address=self.address,
                )
        why = "ended here"
        if isinstance(error, grpc.aio.AioRpcError):
            why = f"{error.code().name}: {error.details()}"
        elif error is not None and not self._aborted:
            why = str(error) or type(error).__name__
        return ChannelBroken(f"the connection to {self.address} ended: {why}", address=self.address)

    async def write(self, parts: Sequence[Buffer]) -> None:
        try:
            self._begin_to_poll()
            await self._call.write(_message(parts))
        except _ENDED as error:
            raise self._error(error) from error
        except asyncio.CancelledError as error:
            self._reraise_unless_ended(error)
            raise self._error(None) from None

    async def read(self) -> memoryview | None:
        try:
            message = await self._call.read()
        except _ENDED as error:
            raise self._error(error) from error
        except asyncio.CancelledError as error:
            self._reraise_unless_ended(error)
            raise self._error(None) from None
        self._polling.came()
        if message is _aio.EOF:
            self._over = True
            return None
        self._heard = True
        return frame_of(message)

    def _reraise_unless_ended(self, error: asyncio.CancelledError) -> None:
        # A cancelled call raises CancelledError in whoever uses it; only a
        # request to cancel the task itself may pass on as one.
        task = asyncio.current_task()
        if not self._call.done() or (task is not None and task.cancelling()):
            raise error

    async def finish(self) -> None:
        try:
            await self._call.done_writing()
        except _ENDED:
            return  # There is nobody left to tell.
        except asyncio.CancelledError as error:
            self._reraise_unless_ended(error)

    def abort(self) -> None:
        self._aborted = True
        self._call.cancel()

    async def close(self) -> None:
        pending = [] if self._over else calls_under_way()
        self.abort()
        await self._channel.close()
        if pending:
            await asyncio.wait(pending, timeout=_SETTLE_S, return_when=asyncio.FIRST_COMPLETED)


class _GrpcListener(Listener):
    def __init__(self, address: str, server: grpc.aio.Server) -> None:
        self.address = address
        self._server = server

    async def close(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port`.

    Args:
        address: An IPv6 host stands in brackets.

    Returns:
        The host without brackets, and the port, 0 to 65535.

    Raises:
        ValueError: It is not of that form.
    """
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if "[" in host or "]" in host:
        host = ""
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port, as in 127.0.0.1:7400 or [::1]:7400")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Tell whether a host, by name or number, is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # Another name: where it leads is not for us to guess.


class GrpcTransport(Transport):
    """Listens and dials on TCP: with mutual TLS, or else on loopback only."""

    def __init__(
        self,
        *,
        frame_bytes_max: int,
        silence_max_s: float,
        services: Sequence[Callable[[grpc.aio.Server], None]] = (),
        tls: Credentials | None = None,
    ) -> None:
        """Set what all its connections have in common.

        Args:
            frame_bytes_max: Largest frame in either direction.
            silence_max_s: Seconds after which a silent connection is given up.
            services: Each adds its service to the listening server.
            tls: For both directions; None: no TLS, and nothing beyond loopback.
        """
        self._message_bytes_max = frame_bytes_max + _HEAD_BYTES_MAX
        self._silence_max_s = silence_max_s
        self._services = tuple(services)
        self._tls = tls

    async def listen(self, address: str, accept: Accept) -> Listener:
        """See `Transport.listen`; port 0 chooses a free one."""
        try:
            host, port = split_address(address)
        except ValueError as error:
            raise ListenFailed(f"cannot listen: {error}", address=address) from error
        if self._tls is None and not is_loopback(host):
            raise ListenFailed(
                f"refusing to listen on {address}: it can be reached from other machines and "
                "there is no TLS; make certificates with 'migrate certs init' and copy them to "
                "every host, or listen on 127.0.0.1",
                address=address,
            )
        limit = max(self._message_bytes_max, SERVICE_BYTES_MAX if self._services else 0)
        server = grpc.aio.server(options=_options(limit, self._silence_max_s))

        async def connect(_requests: object, context: Any) -> None:
            channel = _AcceptedChannel(context)
            try:
                await accept(channel)
            finally:
                channel.returned = True

        handlers = {"Connect": grpc.stream_stream_rpc_method_handler(connect)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        for add in self._services:
            add(server)
        try:
            where = f"[{host}]:{port}" if ":" in host else address
            if self._tls is None:
                bound = server.add_insecure_port(where)
            else:
                bound = server.add_secure_port(where, self._tls.server_credentials())
        except (RuntimeError, ValueError) as error:
            bound = 0
            cause: BaseException | None = error
        else:
            cause = None
        if bound == 0:
            await server.stop(None)
            raise ListenFailed(
                f"cannot listen on {address}: the port is in use, or the address is not this "
                "machine's; choose another one, or port 0 for any that is free"
                + ("" if self._tls is None else " (or the certificates are none)"),
                address=address,
            ) from cause
        await server.start()
        shown = f"[{host}]" if ":" in host else host
        return _GrpcListener(f"{shown}:{bound}", server)

    async def dial(self, address: str) -> Channel:
        """See `Transport.dial`."""
        try:
            host, _ = split_address(address)
        except ValueError as error:
            raise Unreachable(f"cannot dial: {error}", address=address) from error
        options = _options(self._message_bytes_max, self._silence_max_s)
        if self._tls is not None:
            # Nodes are told by their role: what their address is called is no part of it.
            options.append(("grpc.ssl_target_name_override", ROLE_NAMES["node"]))
            channel = _aio.secure_channel(address, self._tls.channel_credentials(), options=options)
        elif is_loopback(host):
            channel = _aio.insecure_channel(address, options=options)
        else:
            raise Unreachable(
                f"refusing to dial {address} without TLS: it is on another machine; copy the "
                "certificates of its cluster here (see 'migrate certs --help')",
                address=address,
            )
        call = channel.stream_stream(METHOD)()
        return _DialledChannel(address, channel, call)
