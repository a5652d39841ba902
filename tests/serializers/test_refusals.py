"""What cannot honestly travel is refused with a path, a reason and a remedy."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import pickle
import socket
import sqlite3
import subprocess
import sys
import threading
import types
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import serializers
from serializers import NotSerializable


class Box:
    def __init__(self, content: Any = None) -> None:
        self.content = content


class Slotted:
    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


class Stateful(Box):
    def __getstate__(self) -> Any:
        return {"chosen": self.content}


class Arguments(Box):
    def __reduce__(self) -> Any:
        return Arguments, (0, [self.content])


@dataclasses.dataclass
class Item:
    content: Any


def stuck() -> Any:
    generator = (n for n in range(3))
    next(generator)
    return generator


def refusal(obj: Any) -> NotSerializable:
    with pytest.raises(NotSerializable) as caught:
        serializers.dumps(obj)
    with pytest.raises(NotSerializable) as again:
        serializers.encode(obj)
    assert str(again.value) == str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert caught.value.reason and caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda x: x, "generator"),
        (lambda x: Box(x), "Box.content"),
        (lambda x: Item(x), "Item.content"),
        (lambda x: Slotted(x), "Slotted.content"),
        (lambda x: Box({"db": Box(x)}), "Box.content['db'].content"),
        (lambda x: Box([0, (1, x)]), "Box.content[1][1]"),
        (lambda x: {3: {None: x}}, "dict[3][None]"),
        (lambda x: {("a", 1): x}, "dict[('a', 1)]"),
        (lambda x: {Box(): x}, "dict[<Box>]"),
        (lambda x: {Box(x): 1}, "dict<key <Box>>.content"),
        (lambda x: [{Box(x)}], "list[0]{<Box>}.content"),
        (lambda x: Stateful(x), "Stateful.content"),
        (lambda x: Arguments(x), "Arguments.__reduce__()[1][1][0]"),
        (lambda x: Box(Box(x).__init__), "Box.content.__self__.content"),  # type: ignore[misc]
        (lambda x: lambda: x, None),
        (lambda x: {"k" * 500: x}, None),
    ],
)
def test_the_path_leads_from_the_root_to_the_culprit(make: Any, path: str | None) -> None:
    error = refusal(make(stuck()))

    if path is not None:
        if path == "Stateful.content":
            # Its state names it otherwise than its attributes do.
            assert error.path in ("Stateful.content", "Stateful.chosen")
        else:
            assert error.path == path
    assert error.type_name == "generator"
    assert len(error.path) < 200


def test_the_message_has_path_type_reason_and_remedy_in_this_order() -> None:
    class Counter:
        pass

    counter: Any = Counter()
    counter.cache = {"db": Box()}
    connection = sqlite3.connect(":memory:")
    connection.create_function("twice", 1, lambda value: 2 * value)
    counter.cache["db"].content = connection
    error = refusal(counter)
    assert error.path.endswith("Counter.cache['db'].content")
    assert str(error) == (f"{error.path}: sqlite3.Connection: {error.reason}; {error.remedy}")
    assert connection.execute("SELECT 1").fetchone() == (1,)
    connection.close()


def test_a_connected_socket_is_refused_naming_its_peer_and_stays_connected() -> None:
    one, two = socket.socketpair()
    with one, two:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname()) as client:
                assert str(server.getsockname()[1]) in refusal(Box(client)).reason
            assert str(server.getsockname()[1]) in refusal(Box(server)).reason
        assert refusal(Box(one)).path == "Box.content"
        one.send(b"x")
        assert two.recv(1) == b"x"


def test_a_running_thread_is_refused_by_name_and_goes_on() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, args=(30,), name="worker-7")
    thread.start()
    try:
        error = refusal(Box(thread))
        assert "worker-7" in error.reason and thread.is_alive()
    finally:
        done.set()
        thread.join()


def test_a_subprocess_is_refused_with_its_pid() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert str(process.pid) in refusal(Box(process)).reason
    finally:
        process.communicate(b"\n", timeout=30)
    copy: Any = serializers.loads(serializers.dumps(Box(process)))
    assert copy.content.poll() == 0 and copy.content.pid == process.pid
    assert copy.content.stdout.closed


def test_suspended_code_is_refused_with_where_it_stands_and_goes_on() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        yield 2

    async def stream() -> AsyncIterator[int]:
        yield 1

    @types.coroutine
    def pause() -> Iterator[None]:
        yield

    async def coroutine() -> None:
        await pause()

    generator = numbers()
    next(generator)
    error = refusal(Box(generator))
    assert "numbers" in error.reason and __file__ in error.reason and "line" in error.reason
    assert next(generator) == 2
    suspended = coroutine()
    suspended.send(None)
    assert "coroutine" in refusal(Box(suspended)).reason
    suspended.close()
    begun = stream()
    with pytest.raises(StopIteration):
        begun.__anext__().send(None)
    assert "stream" in refusal(Box(begun)).reason


def test_tasks_futures_and_loops_are_refused() -> None:
    async def run() -> None:
        async def wait_for_it() -> None:
            await event.wait()

        async def wait_for(other: asyncio.Future[Any]) -> None:
            await other

        event = asyncio.Event()
        task = asyncio.create_task(wait_for_it(), name="my task")
        future = asyncio.get_running_loop().create_future()
        awaiting = asyncio.ensure_future(asyncio.shield(future))
        waiter = asyncio.create_task(wait_for(awaiting))
        await asyncio.wait([task], timeout=0)

        assert "my task" in refusal(Box(task)).reason
        assert "wait_for_it" in refusal(Box(task)).reason
        assert "pending" in refusal(Box(awaiting)).reason
        assert "loop" in refusal(Box(asyncio.get_running_loop())).reason
        event.set()
        await task
        future.set_result(None)
        await waiter

    asyncio.run(run())


def test_types_without_any_way_are_refused_by_path() -> None:
    error = refusal(Box({"digest": hashlib.sha256(b"begun")}))

    assert error.path == "Box.content['digest']" and "HASH" in error.type_name


def test_an_error_of_getstate_is_repeated_with_its_path() -> None:
    class Moody:
        def __getstate__(self) -> Any:
            raise RuntimeError("not now")

    error = refusal(Box([Moody()]))

    assert error.path == "Box.content[0]" and error.reason == "RuntimeError: not now"


def test_a_culprit_behind_a_long_but_passable_chain_is_found() -> None:
    chain: Any = stuck()
    for _ in range(60):
        chain = Box(chain)

    assert "steps" in refusal(chain).path and refusal(chain).type_name == "generator"


def test_a_refused_object_can_be_dumped_once_the_culprit_is_gone() -> None:
    box = Box({"a": stuck(), "b": [1, 2]})
    refusal(box)
    del box.content["a"]

    copy: Any = serializers.loads(serializers.dumps(box))
    assert copy.content == {"b": [1, 2]}


def test_explaining_a_refusal_uses_up_no_iterator() -> None:
    iterator = iter([1, 2, 3])
    next(iterator)
    refusal([iterator, stuck()])

    assert list(iterator) == [2, 3]


def test_all_obstacles_are_named_and_the_first_one_leads() -> None:
    box = Box({"a": stuck(), "b": [1, stuck()], "c": Box(threading.Event())})
    box.content["c"].more = stuck()

    error = refusal(box)

    assert error.path == "Box.content['a']"
    assert [other.path for other in error.others] == [
        "Box.content['b'][1]",
        "Box.content['c'].more",
    ]
    assert [problem.type_name for problem in error.problems] == ["generator"] * 3
    assert str(error).endswith("(and 2 more: Box.content['b'][1], Box.content['c'].more)")
    copy = pickle.loads(pickle.dumps(error))
    assert copy.others == error.others and copy.problems == error.problems


def test_one_obstacle_met_twice_is_one_problem() -> None:
    generator = stuck()

    assert refusal([generator, {"again": generator}]).others == ()


def test_a_report_of_many_obstacles_stays_short() -> None:
    error = refusal([stuck() for _ in range(5000)])

    assert len(error.problems) == 100 and len(str(error)) < 500


def test_an_iterator_in_a_reduction_that_fails_is_an_obstacle_at_its_object() -> None:
    class Half:
        def __reduce__(self) -> Any:
            def items() -> Iterator[int]:
                yield 1
                raise RuntimeError("no more")

            return list, (), None, items()

    error = refusal({"half": Half(), "other": stuck()})

    assert error.path == "dict['half']" and error.reason == "RuntimeError: no more"
    assert error.type_name.endswith("Half") and error.others[0].path == "dict['other']"


def test_an_object_that_cannot_even_be_asked_for_its_class_travels_by_its_type() -> None:
    class Endless:
        def __getattribute__(self, name: str) -> Any:
            return getattr(self, name)

    loaded: Any = serializers.loads(serializers.dumps([Endless()]))

    assert type(loaded[0]).__name__ == "Endless"
    with pytest.raises(RecursionError):
        loaded[0].anything  # noqa: B018 - The asking is what is tested.


def test_an_object_that_cannot_even_be_asked_for_its_class_is_explained() -> None:
    class Endless:
        def __getattribute__(self, name: str) -> Any:
            return getattr(self, name)

    endless = Endless()
    object.__setattr__(endless, "content", stuck())

    error = refusal([endless])

    assert error.path.startswith("list[0]") and "content" in error.path
    assert error.type_name == "generator"
    assert "Endless" in refusal(endless).path
