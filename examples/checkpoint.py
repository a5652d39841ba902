"""A node is killed with kill -9; its server comes back from a checkpoint on another node."""

import asyncio
import os
import pathlib
import signal
import tempfile

import migrate


@migrate.server
class Ledger:
    """Keeps what was entered, in order."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    @migrate.call
    def enter(self, entry: str) -> int:
        self.entries.append(entry)
        return len(self.entries)

    @migrate.call
    def read(self) -> list[str]:
        return self.entries


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder, "ledger.ckpt")
        async with migrate.LocalCluster(nodes=2) as cluster:
            client = cluster.client
            options = migrate.SpawnOptions(name="ledger", on="n2")
            ref = await client.spawn(Ledger, options=options)
            await ref.enter("rent")
            info = await client.checkpoint(ref, place)
            print(f"{info.bytes} bytes at {info.url}")
            await ref.enter("coffee")  # after the checkpoint: it will be undone

            pid = next(node.pid for node in await client.nodes() if node.name == "n2")
            os.kill(pid, signal.SIGKILL)
            try:
                await ref.enter("tea")
            except migrate.ServerLost as lost:
                print(f"lost: {lost.cause}")

            await client.restore(place, on="n1")
            try:
                await ref.enter("tea")
            except migrate.RolledBack as told:
                # Told once, so that what it had acknowledged in between can be done again.
                print(f"the ledger is as it was at {told.then:.3f}")
                await ref.enter("coffee")
                await ref.enter("tea")
            again = await client.whereis("ledger")
            entries = await client.call(again, Ledger.read)
    assert entries == ["rent", "coffee", "tea"]


# Without a main guard: the nodes do not import this file, its classes travel by value.
asyncio.run(main())
