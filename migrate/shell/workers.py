"""Runs `@migrate.blocking(process=True)` methods in worker processes of the node.

A worker is an interpreter of its own, started by exec and never a fork of the node, whose threads
and locks a fork would tear apart. The state stays in the node: class, arguments and result travel
over a socket pair, and an idle worker takes the next job of whichever server.

Each running job has a thread that waits for its worker. The kernel ends a worker when the thread
that started it ends, so neither an orderly exit of the node nor its `kill -9` leaves one behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import msgspec

import serializers
from migrate.errors import CallError, Outcome, WorkerLost
from migrate.shell import wire
from serializers.errors import SerializerError

_SIZE: Final = struct.Struct("<Q")
_REAP_S: Final = 10.0
"""Wait for a killed process to be gone; the kernel needs microseconds."""


class Request(msgspec.Struct, array_like=True):
    """What a worker is told: which method of which class, and with what."""

    cls: bytes
    method: str
    state: list[str]
    """Names of the attributes that the server's object has, and the worker has not."""
    payload: bytes
    current: bytes
    result_bytes_max: int


class Result(msgspec.Struct, array_like=True):
    """What a worker answers: OK or ERROR, and the packed value or exception."""

    status: int
    payload: bytes


def send(sock: socket.socket, message: bytes) -> None:
    """Write one message, its size before it."""
    sock.sendall(_SIZE.pack(len(message)))
    sock.sendall(message)


def receive(sock: socket.socket) -> bytearray | None:
    """Read one message; None once the other side is gone."""
    head = _read(sock, _SIZE.size)
    return None if head is None else _read(sock, _SIZE.unpack(head)[0])


def _read(sock: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    at = 0
    while at < size:
        count = sock.recv_into(view[at:])
        if not count:
            return None
        at += count
    return data


@dataclass(slots=True)
class Job:
    """One run of a method.

    Attributes:
        cls: The server's class.
        method: Its name.
        state: Names of the attributes of the server's object.
        payload: The packed arguments, or None if only `args` is given.
        args: The live ones.
        current: What `migrate.current()` tells there.
        server: Id of the server, for messages to people.
        result_bytes_max: Larger results are refused.
    """

    cls: type
    method: str
    state: list[str]
    payload: bytes | None
    args: Any
    current: Any
    server: str
    result_bytes_max: int
    worker: _Worker | None = None
    given_up: bool = False

    def request(self) -> bytes:
        """The message for the worker.

        Raises:
            UsageError: An argument cannot travel; nothing was run.
        """
        try:
            payload = self.payload
            if payload is None:
                payload = wire.pack_args(*self.args)
            cls = serializers.dumps(self.cls)
        except SerializerError as error:
            what = f"an argument of {self.method!r}"
            raise wire.unpackable(what, error, Outcome.NOT_DONE) from error
        current = serializers.dumps(self.current)
        return msgspec.msgpack.encode(
            Request(cls, self.method, self.state, payload, current, self.result_bytes_max)
        )


class _Worker:
    """One process, and this side of its socket."""

    def __init__(self) -> None:
        """Start it; returns once it can take a job.

        Raises:
            OSError: There is no room for another process.
            EOFError: It ended before it was ready.
        """
        self.sock, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from migrate.shell.worker_process import main; "
            f"main({theirs.fileno()}, {os.getpid()})"
        )
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
        except BaseException:
            self.sock.close()
            raise
        try:
            if receive(self.sock) is None:
                raise EOFError(f"it ended at once, {self.how_ended()}")
        except BaseException:
            self.end()
            raise

    def how_ended(self) -> str:
        """How the process ended, for people; it has, or is about to."""
        try:
            status = self.process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return "for no known reason"
        if status >= 0:
            return f"with exit status {status}"
        with contextlib.suppress(ValueError):
            return f"killed by signal {-status} ({signal.Signals(-status).name})"
        return f"killed by signal {-status}"

    def end(self) -> None:
        """Kill the process and leave nothing of it."""
        self.process.kill()
        self.process.wait()
        self.sock.close()


class Workers:
    """The worker processes of one node; they are started when needed, and kept."""

    def __init__(self, processes_max: int) -> None:
        """Prepare; no process is started yet.

        Args:
            processes_max: More jobs wait in line.
        """
        self._threads = ThreadPoolExecutor(processes_max, thread_name_prefix="migrate-worker")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._closed = False

    def pids(self) -> list[int]:
        """Process ids of the workers that run, sorted."""
        with self._lock:
            return sorted(worker.process.pid for worker in self._alive)

    async def run(self, job: Job) -> Result:
        """Run a job in a worker.

        A job that is cancelled while it waits in line is not run. One that is cancelled while it
        runs has its worker killed.

        Raises:
            UsageError: An argument cannot travel; nothing was run.
            WorkerLost: The worker ended before it had answered.
            CallError: No worker could be started; nothing was run.
        """
        future = self._threads.submit(self._serve, job)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            self._give_up(job)
            raise

    def _give_up(self, job: Job) -> None:
        with self._lock:
            job.given_up = True
            if job.worker is not None:
                job.worker.process.kill()

    def _serve(self, job: Job) -> Result:
        request = job.request()
        try:
            worker = self._take()
        except (OSError, EOFError) as error:
            raise CallError(
                f"{job.method!r} was not run, because no worker process could be started: {error}",
                server=job.server,
                cause=str(error),
                outcome=Outcome.NOT_DONE,
            ) from error
        with self._lock:
            if self._closed or job.given_up:
                self._idle.append(worker)
                raise CancelledError
            job.worker = worker
        answer: bytearray | None = None
        try:
            with contextlib.suppress(ConnectionError):
                send(worker.sock, request)
                answer = receive(worker.sock)
        finally:
            with self._lock:
                # From here on a kill would meet the next job's run.
                job.worker = None
                whole = answer is not None and not job.given_up
                if whole:
                    self._idle.append(worker)
                else:
                    self._alive.discard(worker)
            if not whole:
                how = worker.how_ended() if answer is None else "given up"
                worker.end()
        if answer is None:
            raise WorkerLost(
                f"{job.method!r} ran in worker process {worker.process.pid}, which ended before it "
                f"had answered, {how}; what it did outside may be done. The server's own state is "
                "as it was, and the next call gets another worker",
                server=job.server,
                cause=how,
            )
        return msgspec.msgpack.decode(answer, type=Result)

    def _take(self) -> _Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                # It was killed while it had nothing to do.
                self._alive.discard(worker)
                worker.end()
        worker = _Worker()
        with self._lock:
            self._alive.add(worker)
        return worker

    async def close(self) -> None:
        """Kill all workers, and wait until they are gone; what they ran is given up."""
        with self._lock:
            self._closed = True
            for worker in self._alive:
                worker.process.kill()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        for worker in [*self._alive]:
            self._alive.discard(worker)
            worker.end()
