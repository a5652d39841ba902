"""Channels between processes of one host: a Unix-domain stream socket each.

Addresses are `unix:NAME`. The name lives in Linux's abstract namespace, which
belongs to one network namespace of one kernel: whoever can connect shares the
loopback device with the listener, nothing is left behind by a process that was
killed, and a container with a network of its own finds nothing there. The name
holds the user's number, and both ends ask the kernel whose process the other
one is, so a name that another user took first is of no use to them.

A frame is its length, four bytes little-endian, and its bytes. A length of
zero says that the sender has finished; a connection that ends without it broke.

The sockets are watched by the loop itself. A transport of asyncio's would add
two calls to each frame in either direction.

Descriptors of shared memory go over a socket of their own, so that frames need
no look for them: with its first frame the dialling end passes one end of a
pair, which an older release's acceptor drops. A descriptor is sent before the
frame that names it, so it is there when that frame is read.

After a frame was sent the socket is polled for a moment, and the core that would have gone to sleep
need not be woken: with a call to another process that is most of its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from rpc.channel import DESCRIPTORS_MAX, Accept, Buffer, Channel, Listener, Transport
from rpc.errors import ChannelBroken, FrameError, ListenFailed, RpcError, Unreachable
from rpc.polling import Polling

SCHEME: Final = "unix:"

AVAILABLE: Final = sys.platform == "linux"
"""Whether this system has abstract names and tells who is at the other end."""

_NAME_BYTES_MAX: Final = 107
_HEAD: Final = struct.Struct("<I")
_FINISHED: Final = _HEAD.pack(0)
_CREDENTIALS: Final = struct.Struct("3i")

_READ_BYTES: Final = 64 * 1024
"""Taken from the socket at once; small frames come many at a time."""

_FRAMES_MAX: Final = 4
"""Frames kept for a reader that does not come; then the socket is left to fill."""

_PARTS_MAX: Final = 64
"""More parts are joined; the kernel takes 1,024 at most."""

_WAITING_MAX: Final = 1024
"""Tokens whose descriptors may have come before the frames that name them."""

_TOKEN: Final = struct.Struct("<Q")
_DESCRIPTOR_BYTES: Final = struct.calcsize("i")
_BACKLOG: Final = 128
_ACCEPT_AGAIN_S: Final = 0.5
"""Wait before connections are taken again when there were no descriptors left."""


def _name(address: str) -> bytes:
    return b"\0" + f"livemigrate/{os.geteuid()}/{address.removeprefix(SCHEME)}".encode()


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Tell process id and user id of the other end."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """What came with some bytes besides them."""
    return [
        number
        for level, kind, data in ancillary
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
        for (number,) in struct.iter_unpack("i", data[: len(data) // 4 * 4])
    ]


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class UnixChannel(Channel):
    """One end of a connection."""

    kind = "unix"

    def __init__(
        self,
        sock: socket.socket,
        address: str,
        frame_bytes_max: int,
        dialled_here: bool | None = None,
    ) -> None:
        """Take over a connected socket; a loop runs.

        Args:
            sock: Closed by the channel.
            address: The other end, for messages to people.
            frame_bytes_max: A longer frame breaks the connection.
            dialled_here: Whether this end passes the socket for descriptors, or
                gets it; None: there is none.
        """
        self.address = address
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._frame_bytes_max = frame_bytes_max
        self._frames: deque[memoryview] = deque()
        # Bytes of a length or of a frame that is not yet complete.
        self._rest = b""
        self._partial: memoryview | None = None
        self._filled = 0
        self._finished_there = False
        self._finished_here = False
        # Why there is nothing more to read or write; set once.
        self._error: RpcError | None = None
        self._closed = False
        self._watching = False
        self._handle: Callable[[Buffer], bool] | None = None
        self._reader: asyncio.Future[bool] | None = None
        self._writer: asyncio.Future[None] | None = None
        # For descriptors: ours, and the other end's until the first frame takes it along.
        self._side: socket.socket | None = None
        self._side_there: socket.socket | None = None
        self._taken: dict[int, list[int]] = {}
        if dialled_here:
            with contextlib.suppress(OSError):
                self._side, self._side_there = socket.socketpair(
                    socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
                )
        self._read_first = dialled_here is False
        self._polling = Polling(self._loop)
        sock.setblocking(False)
        self._watch()

    # ---- in

    def _watch(self) -> None:
        if not self._watching and not self._closed and self._error is None:
            self._watching = True
            readable = self._first_readable if self._read_first else self._readable
            self._loop.add_reader(self._sock, readable)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            self._loop.remove_reader(self._sock)

    def _first_readable(self) -> None:
        """Read what comes first, and with it the socket for descriptors."""
        size = socket.CMSG_SPACE(_DESCRIPTOR_BYTES)
        try:
            data, ancillary, _, _ = self._sock.recvmsg(_READ_BYTES, size, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(self._broken(error.strerror or type(error).__name__))
            return
        for descriptor in _descriptors(ancillary):
            self._keep_side(descriptor)
        self._read_first = False
        self._unwatch()
        self._watch()
        self._got(data)

    def _keep_side(self, descriptor: int) -> None:
        try:
            side = socket.socket(fileno=descriptor)
        except OSError:  # It is no socket.
            os.close(descriptor)
            return
        if self._side is None and side.family == socket.AF_UNIX:
            side.setblocking(False)
            self._side = side
        else:
            side.close()

    def _readable(self) -> None:
        try:
            if self._partial is not None:
                self._fill(self._partial)
                return
            data = self._sock.recv(_READ_BYTES)
            self._polling.came()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._break(self._broken(error.strerror or type(error).__name__))
            return
        self._got(data)

    def _poll(self) -> None:
        polling = self._polling
        if not self._watching or self._read_first or self._partial is not None:
            polling.stop()
        if polling.lost():
            return
        try:
            data = self._sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            if polling.goes_on():
                self._loop.call_soon(self._poll)
            return
        except OSError as error:
            polling.stop()
            self._break(self._broken(error.strerror or type(error).__name__))
            return
        polling.came()
        self._got(data)

    def _got(self, data: bytes) -> None:
        if not data:
            self._break(self._broken("the other end is gone"))
            return
        if self._rest:
            data, self._rest = self._rest + data, b""
        self._cut(data)

    def _cut(self, data: bytes) -> None:
        view = memoryview(data)
        size = len(data)
        at = 0
        while size - at >= 4:
            (length,) = _HEAD.unpack_from(data, at)
            at += 4
            if at + length > size or not length:
                if not length:
                    self._finish_there(at == size)
                elif length > self._frame_bytes_max:
                    self._break(
                        FrameError(f"{self.address} sent a frame of {length} bytes, over the limit")
                    )
                else:
                    self._filled = size - at
                    self._partial = memoryview(bytearray(length))
                    self._partial[: self._filled] = view[at:]
                return
            self._deliver(view[at : at + length])
            at += length
            if self._error is not None:
                return
        if at < size:
            self._rest = data[at:]

    def _fill(self, partial: memoryview) -> None:
        count = self._sock.recv_into(partial[self._filled :])
        if not count:
            self._break(self._broken("the other end is gone, in the middle of a frame"))
            return
        self._filled += count
        if self._filled == len(partial):
            self._partial = None
            self._deliver(partial)

    def _deliver(self, frame: memoryview) -> None:
        if self._handle is not None:
            try:
                if self._handle(frame):
                    return
            except BaseException as error:
                self._settle(error)
                if not isinstance(error, Exception):
                    raise
            else:
                self._settle(None)
            return
        self._frames.append(frame)
        self._settle(None)
        if len(self._frames) >= _FRAMES_MAX:
            self._unwatch()

    def _settle(self, error: BaseException | None) -> None:
        """Wake whoever waits in `read` or `receive`."""
        self._handle = None
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            if error is None:
                reader.set_result(True)
            else:
                reader.set_exception(error)

    def _finish_there(self, clean: bool) -> None:
        self._finished_there = True
        self._unwatch()
        if not clean:
            self._break(FrameError(f"{self.address} sent more after it had finished"))
        else:
            self._settle(None)

    def _broken(self, why: object) -> ChannelBroken:
        return ChannelBroken(f"the connection to {self.address} ended: {why}", address=self.address)

    def _break(self, error: RpcError) -> None:
        if self._error is None:
            self._error = error
        self._unwatch()
        self._settle(None)
        self._wake_writer()

    async def read(self) -> memoryview | None:
        """See `Channel.read`."""
        while True:
            if self._frames:
                frame = self._frames.popleft()
                if not self._finished_there:
                    self._watch()
                return frame
            if self._error is not None:
                raise self._error
            if self._finished_there:
                return None
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None

    async def receive(self, handle: Callable[[Buffer], bool]) -> bool:
        """See `Channel.receive`; frames come straight from the loop's reader."""
        while self._frames:
            if not handle(self._frames.popleft()):
                return True
        if self._error is None and not self._finished_there:
            self._handle = handle
            self._reader = reader = self._loop.create_future()
            self._watch()
            try:
                await reader
            finally:
                self._handle = self._reader = None
        if self._error is not None:
            raise self._error
        return not self._finished_there

    # ---- out

    async def write(self, parts: Sequence[Buffer]) -> None:
        """See `Channel.write`."""
        if self._error is not None or self._finished_here:
            raise self._error or self._broken("finished here")
        size = 0
        for part in parts:
            size += len(part)
        if len(parts) > _PARTS_MAX:
            parts = [b"".join(parts)]
        await self._send([_HEAD.pack(size), *parts], size + 4)

    async def _send(self, parts: list[Buffer], left: int) -> None:
        while True:
            try:
                if self._side_there is None:
                    count = self._sock.sendmsg(parts)
                else:
                    count = self._send_first(self._side_there, parts)
            except (BlockingIOError, InterruptedError):
                count = 0
            except OSError as error:
                # What the other end sent before it ended can still be read.
                raise self._broken(error.strerror or type(error).__name__) from error
            left -= count
            if not left:
                if self._handle is not None and self._polling.begin():
                    self._loop.call_soon(self._poll)
                return
            while count >= len(parts[0]):
                count -= len(parts.pop(0))
            if count:
                parts[0] = memoryview(parts[0])[count:]
            # NB: what waits is copied. Parts may be views of memory that changes meanwhile, and
            # the MAC in the first part is that of the present bytes.
            parts = [b"".join(parts)]
            await self._writable()

    def _send_first(self, side: socket.socket, parts: list[Buffer]) -> int:
        """Send what comes first, and with it the other end of the socket for descriptors."""
        data = struct.pack("i", side.fileno())
        count = self._sock.sendmsg(parts, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, data)])
        side.close()
        self._side_there = None
        return count

    # ---- descriptors

    @property
    def shares(self) -> bool:
        """See `Channel.shares`."""
        return self._side is not None and self._side_there is None

    def give(self, token: int, descriptors: Sequence[int]) -> bool:
        """See `Channel.give`."""
        if self._side is None:
            return False
        rights = struct.pack(f"{len(descriptors)}i", *descriptors)
        try:
            self._side.sendmsg(
                [_TOKEN.pack(token)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            )
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno not in (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM):
                # The other end has none of it.
                self._side.close()
                self._side = None
            return False
        return True

    def take(self, token: int) -> list[int]:
        """See `Channel.take`."""
        size = socket.CMSG_SPACE(DESCRIPTORS_MAX * _DESCRIPTOR_BYTES)
        while token not in self._taken and self._side is not None:
            try:
                data, ancillary, _, _ = self._side.recvmsg(
                    _TOKEN.size + 1, size, socket.MSG_CMSG_CLOEXEC
                )
            except OSError:
                break
            found = _descriptors(ancillary)
            number = _TOKEN.unpack(data)[0] if len(data) == _TOKEN.size else None
            if number is None or number in self._taken or len(self._taken) >= _WAITING_MAX:
                _close_all(found)
                break
            self._taken[number] = found
        if token in self._taken:
            return self._taken.pop(token)
        return super().take(token)

    async def _writable(self) -> None:
        self._writer = self._loop.create_future()
        self._loop.add_writer(self._sock, self._wake_writer)
        try:
            await self._writer
        finally:
            self._writer = None
            if not self._closed:
                self._loop.remove_writer(self._sock)
        if self._error is not None:
            raise self._error

    def _wake_writer(self) -> None:
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    async def finish(self) -> None:
        """See `Channel.finish`."""
        if self._finished_here or self._error is not None:
            return
        self._finished_here = True
        try:
            await self._send([_FINISHED], len(_FINISHED))
        except RpcError:
            return  # There is nobody left to tell.

    def abort(self) -> None:
        """See `Channel.abort`."""
        if self._closed:
            return
        self._frames.clear()
        self._break(self._broken("ended here"))
        if self._writer is not None:
            self._loop.remove_writer(self._sock)
        self._closed = True
        self._sock.close()
        for side in (self._side, self._side_there):
            if side is not None:
                side.close()
        self._side = self._side_there = None
        for descriptors in self._taken.values():
            _close_all(descriptors)
        self._taken.clear()

    async def close(self) -> None:
        """See `Channel.close`; what was written before stays readable there."""
        self.abort()


class _UnixListener(Listener):
    def __init__(
        self, address: str, sock: socket.socket, accept: Accept, frame_bytes_max: int
    ) -> None:
        self.address = address
        self._sock = sock
        self._accept = accept
        self._frame_bytes_max = frame_bytes_max
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._again: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock, self._readable)

    def _readable(self) -> None:
        # As many as a turn of the loop may bring; more wait in the backlog.
        for _ in range(_BACKLOG):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                # The listener would be readable in every turn until one is free.
                self._loop.remove_reader(self._sock)
                self._again = self._loop.call_later(_ACCEPT_AGAIN_S, self._watch_again)
                return
            self._take(sock)

    def _watch_again(self) -> None:
        self._again = None
        self._loop.add_reader(self._sock, self._readable)

    def _take(self, sock: socket.socket) -> None:
        pid, uid = _peer(sock)
        if uid != os.geteuid():
            sock.close()
            return
        address = f"{SCHEME}process {pid}"
        channel = UnixChannel(sock, address, self._frame_bytes_max, dialled_here=False)
        task = self._loop.create_task(self._serve(channel))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, channel: UnixChannel) -> None:
        try:
            await self._accept(channel)
            await channel.finish()
        finally:
            await channel.close()

    async def close(self, grace_s: float) -> None:
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        tasks = set(self._tasks)
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=grace_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


class UnixTransport(Transport):
    """Listens and dials on this host, among processes of one user."""

    def __init__(self, *, frame_bytes_max: int) -> None:
        """Set the largest frame in either direction, in bytes."""
        self._frame_bytes_max = frame_bytes_max

    def _socket(self, address: str, error: Callable[..., RpcError]) -> tuple[socket.socket, Any]:
        name = _name(address)
        if not AVAILABLE or len(name) > _NAME_BYTES_MAX:
            raise error(f"{address} cannot be an abstract socket's name here", address=address)
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK), name

    async def listen(self, address: str, accept: Accept) -> Listener:
        """See `Transport.listen`. `unix:` alone chooses a free name."""
        if address == SCHEME:
            address = f"{SCHEME}{os.getpid()}-{os.urandom(6).hex()}"
        sock, name = self._socket(address, ListenFailed)
        try:
            sock.bind(name)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise ListenFailed(
                f"cannot listen at {address}: {error.strerror}; choose another name",
                address=address,
            ) from error
        return _UnixListener(address, sock, accept, self._frame_bytes_max)

    async def dial(self, address: str) -> Channel:
        """See `Transport.dial`; that nobody answers shows at once.

        Raises:
            Unreachable: Also if another user's process listens there, or the
                listener has more connections waiting than it takes.
        """
        sock, name = self._socket(address, Unreachable)
        try:
            sock.connect(name)
            _, uid = _peer(sock)
        except OSError as error:
            sock.close()
            raise Unreachable(
                f"nothing answers at {address}: {error.strerror}", address=address
            ) from error
        if uid != os.geteuid():
            sock.close()
            raise Unreachable(f"{address} was taken by user {uid}", address=address)
        return UnixChannel(sock, address, self._frame_bytes_max, dialled_here=True)
