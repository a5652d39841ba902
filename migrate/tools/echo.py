"""Answers raw gRPC and a bare Unix socket: the other end of what the machine allows."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from types import TracebackType
from typing import Any, Final

import grpc
import grpc.aio

ECHO: Final = "/bench.Echo/Unary"


class Echo:
    """A process that answers; use it with `async with`.

    Attributes:
        address: "host:port" of its gRPC server, which sends back what it gets.
        socket_name: Abstract name of its Unix socket, which sends back a byte.
        pid: Its process id.
    """

    address: str
    socket_name: str
    pid: int

    async def __aenter__(self) -> Echo:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "migrate.tools.echo"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self.pid = self._process.pid
        told = (await self._process.stdout.readline()).decode().split()
        if len(told) != 2:
            self._process.kill()
            raise OSError("the process that answers could not be started; what it said is above")
        self.address, self.socket_name = told
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()


def _answer(sock: socket.socket) -> None:
    buffer = bytearray(64 << 20)
    view = memoryview(buffer)
    with sock:
        while head := sock.recv(8, socket.MSG_WAITALL):
            left = int.from_bytes(head, "little")
            while left:
                left -= sock.recv_into(view[: min(left, len(buffer))])
            sock.sendall(b"k")


def _accept(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_answer, args=(sock,), daemon=True).start()


async def _serve() -> None:
    """Answer until standard input ends."""

    async def echo(request: bytes, context: Any) -> bytes:
        # A large one is answered by its size, as the others are.
        return request if len(request) <= 4096 else b"k"

    service, method = ECHO.strip("/").split("/")
    handler = grpc.method_handlers_generic_handler(
        service, {method: grpc.unary_unary_rpc_method_handler(echo)}
    )
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    name = f"livemigrate-bench/{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen()
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    print(f"127.0.0.1:{port} {name}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_serve())
