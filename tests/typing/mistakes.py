"""Wrong uses; each marked line must be reported, and no other; never run."""

import migrate
from tests.typing.classes import Counter, Feed, Room


async def refs(ref: migrate.Ref[Counter], feed: migrate.Ref[Feed]) -> None:
    await ref.incr("3")  # error: a str for an int
    await ref.incr(1, 2)  # error: too many arguments
    await ref.incr(step=1)  # error: no such parameter
    await ref.peek(2.0)  # error: keyword only
    await ref.crunch()  # error: an argument is missing
    await ref.increment(3)  # error: no such method
    text: str = await ref.incr(3)  # error: the result is an int
    number: int = ref.incr(3)  # error: not awaited
    await ref.incr.cast("3")  # error: a str for an int
    await ref.incr.with_options(timeout="5")(3)  # error: a time-out is a number
    await ref.incr.with_options(5.0)(3)  # error: options are named
    await ref.incr.with_options(timeout=5.0)("3")  # error: a str for an int
    await ref.undecorated("x")  # error: without @migrate.call, use node.call
    number = await ref.incr.cast(3)  # error: a cast has no result
    room: migrate.Ref[Room] = ref  # error: a parent's ref is not a child's
    feed.follow()  # error: a suspended frame cannot move


def narrowing(thing: object) -> bool:
    # It works at run time; for checkers Ref[T] is an alias, which cannot be asked.
    return isinstance(thing, migrate.Ref)  # error: an alias is no class


def instances(counter: Counter) -> None:
    text: str = counter.incr(3)  # error: an int here too
    counter.incr("3")  # error: a str for an int
    counter.incr.cast(3)  # error: an object is not a ref


async def spawning(node: migrate.Node) -> None:
    options = migrate.SpawnOptions(name="hits")
    await node.spawn(Counter, "10")  # error: a str for an int
    await node.spawn(Counter, 1, 2)  # error: too many arguments
    await node.spawn(Counter, begin=1)  # error: no such parameter
    await node.spawn(Room, "me")  # error: an argument is missing
    await node.spawn(Counter, "10", options=options)  # error: a str for an int
    await node.spawn(Counter, 1, 2, options=options)  # error: too many arguments
    await node.spawn(Room, "me", options=options)  # error: an argument is missing
    await node.spawn(Counter, 10, options="hits")  # error: options are SpawnOptions
    await node.spawn_lb(Counter, "10")  # error: a str for an int
    await node.spawn(3)  # error: no class
    room: migrate.Ref[Room] = await node.spawn(Counter)  # error: a ref of another class
    migrate.SpawnOptions(nme="hits")  # error: no such option
    migrate.SpawnOptions(on=3)  # error: a node has a name


async def calling(node: migrate.Node, ref: migrate.Ref[Counter]) -> None:
    await node.call(ref, Counter.incr, "3")  # error: a str for an int
    await node.call(ref, Counter.undecorated, 3)  # error: an int for a str
    await node.call(ref, Counter.undecorated_async)  # error: an argument is missing
    await node.call(ref, Room.undecorated_later, 3)  # error: no such method
    text: str = await node.call(ref, Counter.incr, 3)  # error: the result is an int


async def verbs(node: migrate.Node, ref: migrate.Ref[Counter]) -> None:
    await node.migrate(ref, "b")  # error: the target is named
    await node.migrate("hits", to="b")  # error: a name is not a ref
    await node.replicate(ref, ["b"], mode="half")  # error: no such mode
    await node.checkpoint("hits", "file:///x")  # error: a name is not a ref
    await node.checkpoint(ref, "file:///x", 60.0)  # error: options are named
    await node.checkpoint(ref, "file:///x", every="1 min")  # error: seconds are a number
    await node.restore("file:///x", "b")  # error: the node is named
    await node.restore("file:///x", replaces=True)  # error: no such option
    room: migrate.Ref[Room] = await node.fork(ref)  # error: a clone is of the same class
    report = await node.migrate(ref, to="b")
    report.epoch = 3  # error: reports are frozen
    print(report.downtime)  # error: units come last


@migrate.server(versoin=2)  # error: no such option
class Misspelled:
    pass


@migrate.server(former_names="old.rooms:Hall")  # error: a tuple of names
class Renamed:
    pass


class Decorated:
    @migrate.every(second=1)  # error: no such option
    def tick(self) -> None: ...

    @migrate.call(timeout=3)  # error: takes no options
    def incr(self) -> None: ...
