"""`migrate up`: a cluster on this machine until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Final

import click

from migrate.cluster import LocalCluster, NodeProcess
from migrate.errors import MigrateError, Outcome
from migrate.options import NodeOptions
from migrate.tools import clusters
from migrate.tools.clusters import Place
from migrate.tools.output import emit_json

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run(
    *,
    name: str,
    nodes: int,
    directory: str | None,
    data: str | None,
    options: NodeOptions | None,
    secret_file: str,
    spawnable: tuple[str, ...],
    log_level: str,
    as_json: bool,
) -> None:
    """Run node processes until a signal comes, then stop them.

    Args:
        name: The other verbs find the cluster by it.
        nodes: How many.
        directory: URL of their directory; None: one that goes with the cluster, or is in `data`.
        data: Folder, or URL of a store, for the journals of durable servers; None: none.
        options: Tunables of every node; None: the defaults.
        secret_file: Path of the cluster secret, absolute; made if it is not there.
        spawnable: Classes, as "module:Class", that the public gRPC API of a node may spawn.
        log_level: What the nodes log to stderr.
        as_json: Print one JSON object once the cluster is up, instead of text.

    Raises:
        UsageError: A cluster of that name is up.
        MigrateError: A node did not start, or all of them died. No node is left.
    """
    clusters.check_free(name)
    cluster = LocalCluster(
        nodes,
        directory=directory,
        data=data,
        options=options,
        env={
            "LIVEMIGRATE_SECRET_FILE": secret_file,
            "LIVEMIGRATE_ALLOW": " ".join(spawnable),
            "LIVEMIGRATE_LOG_LEVEL": log_level,
        },
    )
    with _until_signalled(cluster):
        async with cluster, asyncio.TaskGroup() as group:
            place = Place(
                name,
                tuple(node.address for node in cluster.nodes),
                secret_file,
                cluster.directory,
                os.getpid(),
            )
            with clusters.published(place):
                _say(place, cluster, as_json)
                watches = [group.create_task(_watch(node)) for node in cluster.nodes]
                await asyncio.wait(watches)
        raise MigrateError(
            "every node of the cluster died; what they said is on stderr",
            outcome=Outcome.NOT_DONE,
        )


@contextlib.contextmanager
def _until_signalled(cluster: LocalCluster) -> Iterator[None]:
    """Leave the block at the first signal that asks for it; kill the nodes at the second."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    stopping = False

    def stop(number: int, cancel: Callable[[], object]) -> None:
        nonlocal stopping
        if stopping:
            for node in cluster.nodes:
                node.kill()
            os._exit(128 + number)
        stopping = True
        cancel()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop, number, task.cancel)
    try:
        yield
    except asyncio.CancelledError:
        if not stopping:
            raise
        task.uncancel()
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


async def _watch(node: NodeProcess) -> None:
    code = await node.wait()
    how = f"by signal {-code}" if code < 0 else f"with status {code}"
    click.echo(
        f"node {node.name} (pid {node.pid}) ended {how}; its servers are lost",
        err=True,
    )


def _say(place: Place, cluster: LocalCluster, as_json: bool) -> None:
    if as_json:
        nodes = [{"name": n.name, "address": n.address, "pid": n.pid} for n in cluster.nodes]
        emit_json({"cluster": place.name, "nodes": nodes, "directory": place.directory})
        return
    option = "" if place.name == clusters.DEFAULT_NAME else f" --cluster {place.name}"
    count = "1 node is" if len(cluster.nodes) == 1 else f"{len(cluster.nodes)} nodes are"
    lines = [
        f"{count} up:",
        *(f"  {node.name}  {node.address}  pid {node.pid}" for node in cluster.nodes),
        "",
        "In another terminal:",
        f"  migrate status{option}",
        f"  migrate spawn{option} MODULE:CLASS --name NAME    a class of your own",
        f"  migrate call{option} NAME METHOD [ARGS...]",
        f"  migrate mv{option} NAME {cluster.nodes[-1].name}",
        "In Python:",
        f'  async with migrate.connect("{place.addresses[0]}") as client: ...',
        "",
        "Ctrl-C stops the nodes and their servers.",
    ]
    click.echo("\n".join(lines))
