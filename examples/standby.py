"""The owner of a server is killed in the middle of its load; its standby goes on where it was."""

import asyncio
import os

import migrate

CALLERS = 4
KILLS = 3
CALLS = 200
"""By each caller, at least, between one kill and the next."""


@migrate.server
class Tickets:
    """Gives out numbers, and remembers in which processes it has lived."""

    def __init__(self) -> None:
        self.last = 0
        self.processes = [os.getpid()]

    @migrate.call
    def take(self) -> int:
        self.last += 1
        return self.last

    @migrate.call
    def lived_in(self) -> list[int]:
        return self.processes

    def on_promote(self) -> None:
        self.processes.append(os.getpid())


async def main() -> None:
    async with migrate.LocalCluster(nodes=3) as cluster:
        client = cluster.client
        # Whatever leaves it is at its standby before; a third node stands by when one is lost.
        options = migrate.SpawnOptions(on="n1", standbys=["n2"])
        ref = await client.spawn(Tickets, options=options)
        working = True
        taken: list[list[int]] = [[] for _ in range(CALLERS)]

        async def caller(mine: list[int]) -> None:
            while working:
                mine.append(await ref.take())

        callers = [asyncio.create_task(caller(mine)) for mine in taken]
        killed = []
        for _ in range(KILLS):
            before = [len(mine) for mine in taken]
            info = await client.info(ref)
            # Until there has been load, and the set of standbys is complete again.
            while (
                not all(len(mine) >= n + CALLS for mine, n in zip(taken, before, strict=True))
                or not info.standbys
            ):
                await asyncio.sleep(0.01)
                info = await client.info(ref)
            owner = cluster.node(info.node)
            owner.kill()  # SIGKILL: nothing of it can be said or saved.
            await owner.wait()
            killed.append(owner.pid)
            await cluster.add_node(owner.name)
        working = False
        await asyncio.gather(*callers)
        lived_in = await ref.lived_in()

    print(f"{KILLS} owners were killed; every ticket was given out once, to all {CALLERS} callers")
    assert lived_in[:KILLS] == killed and len(lived_in) == KILLS + 1
    numbers = sorted(number for mine in taken for number in mine)
    assert numbers == list(range(1, len(numbers) + 1))  # Each number once, none missing.


# Without a main guard: the nodes do not import this file, its classes travel by value.
asyncio.run(main())
