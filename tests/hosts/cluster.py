"""A cluster on several hosts: three etcd members, nodes, and recorded runs with faults of both.

What is judged and how, is `tests.cluster.histories`; here are other processes and other faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import psutil

import migrate
from migrate.cluster import NodeProcess, _announced, _changed, _import_path
from migrate.tools import certs
from tests.cluster.etcd_servers import EtcdServer
from tests.cluster.histories import Plan, Report, Run, judge, options_of
from tests.hosts.network import GOOD, Host, Network, Wire, network

HOSTS: Final = ("h1", "h2", "h3")

PLACES: Final = {"n1": 0, "n2": 0, "n3": 1, "n4": 1, "n5": 2}
"""Which node is on which host."""

CLOCKS_AHEAD_S: Final = (0, 90_000, 7)
"""Hosts were booted at different times."""

FAULTS: Final = (
    "kill",
    "stop",
    "cut",
    "cut one way",
    "isolate",
    "delay",
    "loss",
    "kill etcd",
    "stop etcd",
    "cut etcd",
)

START_S: Final = 60.0


class HostProcess(NodeProcess):
    """A node on another host: the process is a child of what entered that host."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, address: str) -> None:
        super().__init__(name, process, address)
        (child,) = psutil.Process(process.pid).children()
        self._entered = process.pid
        self.pid = child.pid

    def _tell(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill(self) -> None:
        self._tell(self.pid, signal.SIGKILL)
        # It stops together with what it has run, and would not see its end.
        self._tell(self._entered, signal.SIGCONT)

    def pause(self) -> None:
        self._tell(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        self._tell(self.pid, signal.SIGCONT)
        self._tell(self._entered, signal.SIGCONT)

    async def stop(self) -> int:
        if self.alive:
            self.wake()
            self._tell(self.pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(START_S):
                    return await self._process.wait()
            except TimeoutError:
                self.kill()
        return await self._process.wait()


class HostsCluster:
    """What `LocalCluster` is, on several hosts."""

    def __init__(
        self,
        net: Network,
        folder: Path,
        options: migrate.NodeOptions,
        members: list[EtcdServer],
        places: dict[str, int],
    ) -> None:
        self.net = net
        self.members = members
        self.places = places
        self.nodes: list[NodeProcess] = []
        self.client: Any = None
        self.secret_file = folder / "cluster.secret"
        addresses = ",".join(it.address for it in members)
        self.directory = f"etcd://{addresses}/hosts?tls={folder / 'tls'}"
        self._options = options

    def host_of(self, node: str) -> Host:
        return self.net.hosts[self.places[node]]

    async def add_node(self, name: str, env: dict[str, str] | None = None) -> NodeProcess:
        host = self.host_of(name)
        process = await asyncio.create_subprocess_exec(
            *host.within,
            *(sys.executable, "-m", "migrate", "node", "--name", name),
            *("--listen", f"{host.address}:0", "--directory", self.directory),
            *("--announce", "--with-parent", "--log-level", "error"),
            *("--options", json.dumps(_changed(self._options))),
            env={
                **os.environ,
                **(env or {}),
                "LIVEMIGRATE_SECRET_FILE": str(self.secret_file),
                "PYTHONPATH": _import_path(),
            },
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(START_S):
            address = await _announced(process)
        assert address, f"node {name} ended with status {await process.wait()}"
        node = HostProcess(name, process, address)
        self.nodes.append(node)
        return node


@contextlib.asynccontextmanager
async def hosts_cluster(
    options: migrate.NodeOptions,
    places: dict[str, int] | None = None,
    hosts: Sequence[str] = HOSTS,
    etcd_on: Sequence[int] = (0, 1, 2),
    clocks_ahead_s: Sequence[int] = (),
) -> AsyncIterator[HostsCluster]:
    """Hosts, an etcd member on each of some of them, and nodes; a client of them here."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="livemigrate-")))
        net = stack.enter_context(network(hosts, clocks_ahead_s))
        addresses = [it.address for it in net.hosts]
        certs.init(folder / "tls", addresses, 30, renew=False)
        tls = folder / "tls"
        peers = ",".join(f"m{n}=http://{addresses[n]}:2380" for n in etcd_on)
        members = [
            EtcdServer(
                folder,
                name=f"m{n}",
                host=addresses[n],
                ports=(2379, 2380),
                cluster=peers,
                heartbeat_ms=100,
                extra=[
                    *("--cert-file", f"{tls}/node.pem", "--key-file", f"{tls}/node.key"),
                    *("--client-cert-auth", "--trusted-ca-file", f"{tls}/ca.pem"),
                ],
                within=net.hosts[n].on_wire,
            )
            for n in etcd_on
        ]
        for member in members:
            stack.callback(member.kill)
            member.start()
        for member in members:
            await asyncio.to_thread(member.wait_listening)
        cluster = HostsCluster(net, folder, options, members, places or PLACES)

        async def stop_all() -> None:
            await asyncio.gather(*(node.stop() for node in cluster.nodes))

        stack.push_async_callback(stop_all)
        await asyncio.gather(*map(cluster.add_node, cluster.places))
        cluster.nodes.sort(key=lambda node: node.name)
        cluster.client = await stack.enter_async_context(
            migrate.connect(
                cluster.nodes[0].address, options=options, secret_file=cluster.secret_file
            )
        )
        yield cluster


class HostsRun(Run):
    """A run whose faults are those of a network and of etcd, too."""

    def __init__(self, plan: Plan, cluster: HostsCluster) -> None:
        super().__init__(plan, cluster)  # type: ignore[arg-type]
        self.hosts = cluster

    async def fault(self, kind: str, rng: random.Random) -> None:
        """One fault and its repair."""
        net = self.hosts.net
        everybody = [*net.hosts, net.here]
        one, other = rng.sample(net.hosts, 2)
        rest = [host for host in everybody if host is not one]
        lasts_s = rng.choice([0.3, 1.0, 2.0])
        victim = rng.choice(list(self.alive.values()))
        member = rng.choice(self.hosts.members)
        match kind:
            case "kill":
                victim.kill()
                await asyncio.sleep(lasts_s / 4)
                await self.buried(victim)
            case "stop":
                await self.pause(victim, rng)
            case "cut":
                net.both_ways([one], [other], Wire(cut=True))
                await asyncio.sleep(lasts_s)
            case "cut one way":
                net.wire([one], [rng.choice(rest)], Wire(cut=True))
                await asyncio.sleep(lasts_s)
            case "isolate":
                net.both_ways([one], rest, Wire(cut=True))
                await asyncio.sleep(lasts_s)
            case "delay":
                slow = Wire(delay_s=rng.choice([0.01, 0.05]), jitter_s=rng.choice([0, 0.01]))
                net.both_ways(everybody, everybody, slow)
                await asyncio.sleep(lasts_s)
            case "loss":
                net.both_ways([one], rest, Wire(loss=rng.choice([0.05, 0.2])))
                await asyncio.sleep(lasts_s)
            case "kill etcd":
                member.kill()
                await asyncio.sleep(lasts_s)
                member.start()
            case "stop etcd":
                member.pause()
                await asyncio.sleep(lasts_s)
                member.resume()
            case "cut etcd":
                # From its own nodes' host to the other members, which are elsewhere.
                net.both_ways([one], net.hosts, Wire(cut=True))
                await asyncio.sleep(lasts_s)
        net.heal()
        self.counts[f"fault: {kind}"] += 1


def plan_of(seed: int, seconds: float, **fixed: Any) -> Plan:
    """The plan of a seed."""
    plan = Plan(
        seed,
        seconds=seconds,
        points=False,
        lease_s=2.0,
        nodes=len(PLACES),
        clients=4,
        movers=2,
        subjects=8,
        calls_max=100,
        faults=FAULTS,
    )
    return dataclasses.replace(plan, **fixed)


async def recorded_on_hosts(plan: Plan) -> Report:
    """Carry out a run and judge it."""
    begun = time.monotonic()
    async with hosts_cluster(options_of(plan), clocks_ahead_s=CLOCKS_AHEAD_S) as cluster:
        run = HostsRun(plan, cluster)
        await run.go()
    took_s = time.monotonic() - begun
    begun = time.process_time()
    violations, bad = judge(run)
    return Report(plan, run.counts, violations, took_s, time.process_time() - begun, bad)


__all__ = ["GOOD", "HostsCluster", "HostsRun", "hosts_cluster", "plan_of", "recorded_on_hosts"]
