"""Real etcd servers for tests: started on free ports of loopback, in temporary folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

BINARY = shutil.which("etcd")

needs_etcd = pytest.mark.skipif(
    BINARY is None, reason="there is no etcd here: install Debian's etcd-server"
)

START_S_MAX = 60.0
"""Bound of a start: for a fault, not for an expectation."""


class Reserved:
    """Ports of loopback that nobody else gets until they are released."""

    def __init__(self, count: int, host: str = "127.0.0.1") -> None:
        self.sockets = [socket.socket() for _ in range(count)]
        for it in self.sockets:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            it.bind((host, 0))
        self.numbers = [it.getsockname()[1] for it in self.sockets]

    def release(self) -> list[int]:
        for it in self.sockets:
            it.close()
        return self.numbers


class EtcdServer:
    """One member. It keeps its ports and its data over restarts."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str = "one",
        host: str = "127.0.0.1",
        ports: tuple[int, int] | None = None,
        cluster: str = "",
        heartbeat_ms: int = 10,
        extra: Sequence[str] = (),
        within: Sequence[str] = (),
    ) -> None:
        """Prepare; `start` starts it.

        Args:
            folder: For its data and its log.
            name: Of the member.
            host: The address it listens on.
            ports: For clients and for its peers; None: free ones of this host.
            cluster: What etcd calls the initial cluster; "": a cluster of its own.
            heartbeat_ms: Of the leader; an election takes ten to twenty times as long.
            extra: More options.
            within: A command that the server is run by, as `ip netns exec NAME`.
        """
        self.folder = folder
        self.name = name
        self.host = host
        self.client_port, self.peer_port = ports or tuple(Reserved(2).release())
        self.tls = "--cert-file" in extra
        self._arguments = [
            *within,
            # It ends with the tests also when they are killed.
            *(("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()),
            BINARY or "etcd",
            *("--name", name),
            *("--data-dir", str(folder / f"{name}.etcd")),
            *("--listen-client-urls", self.client_url),
            *("--advertise-client-urls", self.client_url),
            *("--listen-peer-urls", self.peer_url),
            *("--initial-advertise-peer-urls", self.peer_url),
            *("--initial-cluster", cluster or f"{name}={self.peer_url}"),
            *("--heartbeat-interval", str(heartbeat_ms)),
            *("--election-timeout", str(10 * heartbeat_ms)),
            *("--log-level", "error"),
            "--pre-vote",
            *extra,
        ]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.client_port}"

    @property
    def client_url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}"

    @property
    def peer_url(self) -> str:
        return f"http://{self.host}:{self.peer_port}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        """Start it, or start it again; it need not answer yet."""
        assert self.process is None
        # Settings of whoever runs the tests are not those of the test's server.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                # A Ctrl-C of the terminal is for the tests, which then end their servers.
                start_new_session=True,
            )

    def wait_listening(self) -> None:
        """Wait until clients can connect, which is when it has joined its cluster."""
        until_s = time.monotonic() + START_S_MAX
        while True:
            assert self.process is not None and self.process.poll() is None, self.log.read_text()
            with (
                contextlib.suppress(OSError),
                socket.create_connection((self.host, self.client_port), timeout=1.0),
            ):
                return
            assert time.monotonic() < until_s, self.log.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@contextlib.contextmanager
def etcd_server(
    folder: Path, *, heartbeat_ms: int = 10, extra: Sequence[str] = ()
) -> Iterator[EtcdServer]:
    """A cluster of one member, which accepts connections."""
    server = EtcdServer(folder, heartbeat_ms=heartbeat_ms, extra=extra)
    server.start()
    try:
        server.wait_listening()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def etcd_cluster(
    folder: Path, members: int = 3, *, heartbeat_ms: int = 50
) -> Iterator[list[EtcdServer]]:
    """A cluster of several members on loopback."""
    numbers = Reserved(2 * members).release()
    ports = list(zip(numbers[::2], numbers[1::2], strict=True))
    cluster = ",".join(f"m{i}=http://127.0.0.1:{peer}" for i, (_, peer) in enumerate(ports))
    servers = [
        EtcdServer(folder, name=f"m{i}", ports=pair, cluster=cluster, heartbeat_ms=heartbeat_ms)
        for i, pair in enumerate(ports)
    ]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_listening()
        yield servers
    finally:
        for server in servers:
            server.kill()
