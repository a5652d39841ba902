"""A server moves between two processes while callers keep calling; nothing is lost or repeated."""

import asyncio
import os

import migrate

CALLERS = 4
MOVES = 20


@migrate.server
class Tickets:
    """Gives out numbers, and remembers in which processes it has lived."""

    def __init__(self) -> None:
        self.last = 0
        self.processes: set[int] = set()

    @migrate.call
    def take(self) -> int:
        self.last += 1
        self.processes.add(os.getpid())
        return self.last

    @migrate.call
    def lived_in(self) -> set[int]:
        return self.processes


async def main() -> None:
    async with migrate.LocalCluster(nodes=2) as cluster:
        client = cluster.client
        ref = await client.spawn(Tickets, options=migrate.SpawnOptions(on="n1"))
        moving = True
        taken: list[int] = []

        async def caller() -> None:
            while moving:
                taken.append(await ref.take())

        callers = [asyncio.create_task(caller()) for _ in range(CALLERS)]
        downtimes_s = []
        for move in range(MOVES):
            report = await client.migrate(ref, to="n1" if move % 2 else "n2")
            downtimes_s.append(report.downtime_s)
        moving = False
        await asyncio.gather(*callers)

        processes = await ref.lived_in()
    longest_ms = max(downtimes_s) * 1000
    print(f"{len(taken)} tickets taken during {MOVES} moves; longest downtime {longest_ms:.1f} ms")
    assert sorted(taken) == list(range(1, len(taken) + 1))  # Each number once, none missing.
    assert processes == {node.pid for node in cluster.nodes}


# Without a main guard: the nodes do not import this file, its classes travel by value.
asyncio.run(main())
