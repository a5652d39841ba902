"""The smallest server: a class, a call, a cast. Run it alone: it needs no cluster."""

import asyncio

import migrate


@migrate.server
class Counter:
    """Stays an ordinary class: `Counter().incr()` works in a unit test."""

    def __init__(self, start: int = 0) -> None:
        self.n = start

    @migrate.call
    def incr(self, by: int = 1) -> int:
        self.n += by
        return self.n

    @migrate.call
    def divide(self, by: int) -> float:
        return self.n / by


async def main() -> None:
    async with migrate.Node(name="a") as node:
        ref = await node.spawn(Counter, 10, options=migrate.SpawnOptions(name="hits"))

        first = await ref.incr(3)  # A call waits for the reply.
        await ref.incr.cast(4)  # A cast waits until the server's mailbox has it.
        same = await node.whereis("hits")  # Anybody finds it by its name.
        try:
            await same.divide(0)
        except ZeroDivisionError as error:  # A handler's exception arrives as itself.
            print(f"divide: {error}")
        last = await same.incr()

    print(f"13 expected: {first}; 18 expected: {last}")
    assert (first, last, Counter(1).incr()) == (13, 18, 2)


asyncio.run(main())
