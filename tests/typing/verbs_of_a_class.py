"""A class that takes the types of its verbs from `Verbs`, as nodes and clients do; never run."""

from collections.abc import Callable
from typing import Any, reveal_type

import migrate
from migrate.verbs import SyncVerbs, Verbs, implements
from tests.typing.classes import Counter


class Peer:
    @implements(Verbs.spawn)
    async def spawn(
        self, cls: Callable[..., Any], /, *args: Any, options: Any = None, **kwargs: Any
    ) -> Any:
        return cls

    @implements(Verbs.call)
    def call(self, ref: Any, method: Any, /, *args: Any, **kwargs: Any) -> Any:
        return ref


class Child(Peer):
    pass


async def use(node: Child, ref: migrate.Ref[Counter]) -> None:
    options = migrate.SpawnOptions()
    reveal_type(await node.spawn(Counter, 10))  # revealed: type[Counter]
    reveal_type(await node.spawn(Counter, 10, options=options))  # revealed: type[Counter]
    reveal_type(await node.call(ref, Counter.incr, 3))  # revealed: int
    reveal_type(await node.call(ref, Counter.undecorated, "x"))  # revealed: bytes
    await node.spawn(Counter, "10")  # error: a str for an int
    await node.spawn(Counter, "10", options=options)  # error: a str for an int
    await node.call(ref, Counter.incr, "3")  # error: a str for an int


def use_blocking(client: SyncVerbs, ref: migrate.Ref[Counter]) -> None:
    options = migrate.SpawnOptions()
    reveal_type(client.spawn(Counter, 10))  # revealed: type[Counter]
    reveal_type(client.spawn(Counter, 10, options=options))  # revealed: type[Counter]
    reveal_type(client.spawn_lb(Counter, start=10))  # revealed: type[Counter]
    reveal_type(client.call(ref, Counter.incr, 3))  # revealed: int
    reveal_type(client.call(ref, Counter.undecorated_async, "x"))  # revealed: bytes
    client.spawn(Counter, "10")  # error: a str for an int
    client.call(ref, Counter.incr, "3")  # error: a str for an int
