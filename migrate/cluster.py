"""LocalCluster: node processes on this machine, with a directory of their own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from migrate.client import Client, connect
from migrate.errors import MigrateError, Outcome, UsageError
from migrate.options import NodeOptions
from migrate.shell.journal_places import try_out
from migrate.shell.stores import open_folder
from rpc.auth import SECRET_FILE_VARIABLE, default_secret_path

START_S: Final = 30.0
"""How long a node process may take to start; an import of heavy modules is part of it."""

STOP_S: Final = 20.0


class NodeProcess:
    """One node process of a `LocalCluster`.

    Attributes:
        name: The node's name.
        address: host:port of its links.
        pid: Its process id.
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process, address: str) -> None:
        self.name = name
        self.address = address
        self.pid = process.pid
        self._process = process

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.returncode is None

    def kill(self) -> None:
        """End it at once with SIGKILL, as a crash would."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def pause(self) -> None:
        """Stop it with SIGSTOP, as a long pause would."""
        self._process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let it go on with SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    async def wait(self) -> int:
        """Wait for its end; the exit status (negative: the signal)."""
        return await self._process.wait()

    async def stop(self) -> int:
        """End it in order (its servers stop); kill it if that takes too long."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)
                self._process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    return await self._process.wait()
            except TimeoutError:
                self.kill()
        return await self._process.wait()

    def __repr__(self) -> str:
        return f"<NodeProcess {self.name} pid={self.pid} {self.address}>"


class LocalCluster:
    """N node processes on this machine and a client of them; an async context manager.

    The nodes are `python -m migrate node` with this process's import path and working
    directory. Classes of the running script travel by value, so the script needs no main guard.

    Args:
        nodes: How many, named n1, n2, ...; or their names.
        directory: URL of their directory; None: a file in a temporary folder.
        options: Tunables of the client and of every node.
        env: Environment variables that the nodes get besides this process's own.
        data: Where the journals of durable servers are kept; a cluster that is started again with
            it brings them back. A path: a folder, for the directory too unless that is given. A
            URL, such as `s3://bucket/folder`: a store that the nodes share; a directory that is not
            given is then a file of this user's on this machine, one for each URL. None: none.

    Attributes:
        nodes: The processes, in the order of their names.
        client: A connected client.
        directory: URL of the directory.
        secret_file: The cluster secret: the user's own, so that further nodes and clients
            need not be told, or what `env` names.
    """

    def __init__(
        self,
        nodes: int | list[str] = 2,
        *,
        directory: str | None = None,
        options: NodeOptions | None = None,
        env: dict[str, str] | None = None,
        data: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(nodes, int):
            if nodes < 1:
                raise UsageError(f"a cluster needs at least one node, not {nodes}")
            names = [f"n{i + 1}" for i in range(nodes)]
        else:
            names = list(nodes)
        if not names or len(set(names)) != len(names):
            raise UsageError(f"the names of nodes must differ: {names}")
        self._names = names
        self._options = options
        self._env = dict(env or {})
        self._folder: Path | None = None
        self._data = Path(data).absolute() if data is not None else None
        self._store: str | None = None
        if isinstance(data, str) and "://" in data:
            if data.startswith("memory:"):
                raise UsageError(f"{data}: the processes of a cluster have no memory in common")
            open_folder(data)
            self._data, self._store = _own_folder(data) if directory is None else None, data
        if self._data is not None and directory is None:
            directory = f"sqlite:///{self._data / 'cluster.db'}"
        self._given = directory
        self.directory = directory or ""
        self.secret_file = Path()
        self.nodes: list[NodeProcess] = []
        self.client: Client

    async def __aenter__(self) -> Self:
        if self._store is not None:
            await try_out(*open_folder(self._store), self._store)
        folder = self._folder = Path(tempfile.mkdtemp(prefix="livemigrate-"))
        if self._data is not None:
            await asyncio.to_thread(self._data.mkdir, 0o700, parents=True, exist_ok=True)
        self.directory = self._given or f"sqlite:///{folder / 'cluster.db'}"
        given = self._env.get(SECRET_FILE_VARIABLE)
        self.secret_file = Path(given) if given else default_secret_path()
        try:
            started = await asyncio.gather(
                *(self._start(name) for name in self._names), return_exceptions=True
            )
            self.nodes = [node for node in started if isinstance(node, NodeProcess)]
            for node in started:
                if isinstance(node, BaseException):
                    raise node
            self.client = connect(
                self.nodes[0].address, options=self._options, secret_file=self.secret_file
            )
            await self.client.__aenter__()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.client.close()
        await self._end()

    async def _end(self) -> None:
        await asyncio.gather(*(node.stop() for node in self.nodes), return_exceptions=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def add_node(self, name: str, env: dict[str, str] | None = None) -> NodeProcess:
        """Start one more node process; also under the name of one that died.

        Raises:
            MigrateError: It did not start; the text holds what it said.
        """
        node = await self._start(name, env)
        self.nodes.append(node)
        return node

    def node(self, name: str) -> NodeProcess:
        """The youngest process of a node's name.

        Raises:
            UsageError: There is none.
        """
        for node in reversed(self.nodes):
            if node.name == name:
                return node
        raise UsageError(f"the cluster has no node {name!r}")

    async def _start(self, name: str, env: dict[str, str] | None = None) -> NodeProcess:
        environment = {
            **os.environ,
            **self._env,
            **(env or {}),
            SECRET_FILE_VARIABLE: str(self.secret_file),
            # The nodes import what this process can import, from the same places.
            "PYTHONPATH": _import_path(),
        }
        command = [
            *(sys.executable, "-m", "migrate", "node", "--name", name),
            *("--directory", self.directory, "--announce", "--with-parent"),
        ]
        if self._store is not None:
            command += ["--data", self._store]
        elif self._data is not None:
            command += ["--data", str(self._data / name)]
        if self._options is not None:
            command += ["--options", json.dumps(_changed(self._options))]
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(START_S):
                address = await _announced(process)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                raise MigrateError(
                    f"node {name} did not start within {START_S:g} s",
                    node=name,
                    outcome=Outcome.NOT_DONE,
                ) from error
            raise
        if not address:
            code = await process.wait()
            raise MigrateError(
                f"node {name} ended with status {code} before it was up; its messages are on "
                "stderr",
                node=name,
                outcome=Outcome.NOT_DONE,
            )
        return NodeProcess(name, process, address)


async def _announced(process: asyncio.subprocess.Process) -> str:
    """The address a node process prints once it is up; empty if it ended instead."""
    if process.stdout is None:
        return ""
    async for line in process.stdout:
        with contextlib.suppress(ValueError):
            announced: Any = json.loads(line)
            if isinstance(announced, dict) and "address" in announced:
                return str(announced["address"])
    return ""


def _own_folder(url: str) -> Path:
    """Where the directory of a cluster is kept whose journals are in a store."""
    # The XDG specification says that a relative value is to be ignored.
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"
    digest = hashlib.sha256(url.rstrip("/").encode()).hexdigest()
    return base / "livemigrate" / f"data-{digest[:16]}"


def _import_path() -> str:
    return os.pathsep.join(os.path.abspath(place) for place in sys.path)


def _changed(options: NodeOptions) -> dict[str, Any]:
    """The options that differ from the defaults."""
    default = NodeOptions()
    return {
        name: value
        for name in options.__dataclass_fields__
        if (value := getattr(options, name)) != getattr(default, name)
    }


__all__ = ["LocalCluster", "NodeProcess"]
