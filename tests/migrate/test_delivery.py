"""Calls and casts between nodes: results, errors, time-outs, back-pressure, cycles and knots."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest

import migrate
from migrate.core.incarnation import Phase
from tests.migrate.clusters import QUICK, break_links, eventually, failure_of, nodes, run, until
from tests.migrate.servers import Busy, Counter, Gate, Held

pytestmark = pytest.mark.usefixtures("cluster_secret")

# Every test that takes `there` runs with the server on the caller's own node and on another one.
HERE_AND_THERE = pytest.mark.parametrize("there", ["a", "b"])


def on(node: str) -> migrate.SpawnOptions:
    return migrate.SpawnOptions(on=node)


# ---------------------------------------------------------------- results and errors


class Zoo:
    """Handlers of every kind, decorated and not."""

    @migrate.call
    def plain(self, a: int, *rest: int, key: str = "k") -> tuple[Any, ...]:
        return a, rest, key

    @migrate.call
    async def slow(self, a: int) -> int:
        await asyncio.sleep(0)
        return a + 1

    @migrate.blocking
    def thread(self) -> str:
        return threading.current_thread().name

    @migrate.blocking
    def thread_fails(self) -> None:
        raise KeyError("in a thread")

    def undecorated(self, value: Any = None) -> Any:
        return value

    def _hidden(self) -> None:
        raise AssertionError("must not be called")

    def raises(self, message: str) -> None:
        raise ValueError(message, 42)

    async def raises_later(self, message: str) -> None:
        await asyncio.sleep(0)
        raise LookupError(message)

    def raises_local(self) -> None:
        class LocalError(Exception):
            pass

        raise LocalError("of this function alone")

    def raises_unpicklable(self) -> None:
        raise Unpicklable(threading.Lock())

    def raises_stop(self) -> None:
        raise StopIteration("odd")

    def raises_cancelled(self) -> None:
        raise asyncio.CancelledError

    def exits(self) -> None:
        raise SystemExit(3)

    def returns_generator(self) -> Any:
        return begun_generator()

    def mutate(self, items: list[int]) -> list[int]:
        items.append(1)
        return items

    def current(self) -> migrate.Current:
        return migrate.current()


def begun_generator() -> Iterator[int]:
    """One that cannot travel: its frame is suspended."""
    numbers = (i for i in range(3))
    next(numbers)
    return numbers


class Unpicklable(Exception):
    def __init__(self, lock: Any) -> None:
        super().__init__("holds a thread")
        self.thread = threading.current_thread()
        self.generator = (i for i in range(3))


@HERE_AND_THERE
def test_every_kind_of_handler_answers(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            assert await zoo.plain(1, 2, 3, key="x") == (1, (2, 3), "x")
            assert await zoo.slow(1) == 2
            assert "migrate-blocking" in await zoo.thread()
            assert await zoo.undecorated({"deep": [1, {2}]}) == {"deep": [1, {2}]}
            assert await a.call(zoo, Zoo.plain, 1) == (1, (), "k")
            assert await a.call(zoo, Zoo.undecorated, 5) == 5
            assert await a.call(zoo, "undecorated", 6) == 6

    run(body())


@HERE_AND_THERE
def test_an_exception_arrives_as_itself_with_the_remote_traceback(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            error = await failure_of(zoo.raises("why"), ValueError)
            assert error.args == ("why", 42)
            assert "raises" in _remote(error)
            error = await failure_of(zoo.raises_later("later"), LookupError)
            assert type(error) is LookupError
            assert "raises_later" in _remote(error)
            error = await failure_of(zoo.thread_fails(), KeyError)
            assert error.args == ("in a thread",)

    run(body())


def _remote(error: BaseException) -> str:
    """Where it happened, as text that names the handler: its own traceback or the remote one."""
    import traceback

    return "".join(traceback.format_exception(error)) + "".join(getattr(error, "__notes__", ()))


def test_an_exception_that_cannot_travel_arrives_as_handler_failed():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on("b"))
            error = await failure_of(zoo.raises_unpicklable(), migrate.HandlerFailed)
            assert error.outcome is migrate.Outcome.DONE
            assert error.exception_type.endswith("test_delivery.Unpicklable")
            assert "raises_unpicklable" in error.remote_traceback
            assert "holds a thread" in str(error)
            assert error.server == zoo._server_id

    run(body())


@HERE_AND_THERE
def test_odd_exceptions_of_a_handler_end_the_call_and_nothing_else(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            await failure_of(zoo.raises_stop(), RuntimeError)
            await failure_of(zoo.raises_cancelled(), migrate.CallError)
            await failure_of(zoo.exits(), (SystemExit, migrate.MigrateError))
            assert await zoo.undecorated(1) == 1

    run(body())


@HERE_AND_THERE
def test_a_result_that_cannot_travel_is_an_error_that_says_it_was_done(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            error = await failure_of(zoo.returns_generator(), migrate.UsageError)
            assert error.outcome is migrate.Outcome.DONE
            assert "generator" in str(error)

    run(body())


@HERE_AND_THERE
def test_an_argument_that_cannot_travel_is_refused_before_anything_is_sent(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            error = await failure_of(zoo.undecorated(begun_generator()), migrate.UsageError)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert "undecorated" in str(error)

    run(body())


@HERE_AND_THERE
def test_arguments_and_results_are_copies_wherever_the_server_is(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            items = [0]
            got = await zoo.mutate(items)
            assert (items, got) == ([0], [0, 1])
            got.append(2)
            assert await zoo.mutate(items) == [0, 1]

    run(body())


@pytest.mark.parametrize("there", ["a", "b"])
def test_what_is_too_large_is_refused_alone(there: str):
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(message_bytes_max=1 << 16)) as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            counter = await a.spawn(Counter, options=on(there))
            large = zoo.undecorated(bytes(1 << 17))
            small = [counter.incr() for _ in range(20)]
            if there == "b":
                error = await failure_of(large, migrate.UsageError)
                assert error.outcome is migrate.Outcome.NOT_DONE
                assert "message_bytes_max" in str(error)
            else:
                await large  # It does not travel.
            assert await asyncio.gather(*small) == list(range(1, 21))

    run(body())


class Makes:
    def __init__(self) -> None:
        self.n = 0

    def make(self, size: int) -> bytes:
        self.n += 1
        return bytes(size)

    def made(self) -> int:
        return self.n


def test_a_result_that_is_too_large_says_that_the_handler_ran():
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(message_bytes_max=1 << 16)) as (a, _):
            makes = await a.spawn(Makes, options=on("b"))
            error = await failure_of(makes.make(1 << 17), migrate.UsageError)
            assert error.outcome is migrate.Outcome.DONE
            assert "message_bytes_max" in str(error)
            assert await makes.made() == 1

    run(body())


@HERE_AND_THERE
@pytest.mark.parametrize("name", ["_hidden", "__init__", "nowhere", "__class__", "__reduce__"])
def test_a_method_that_cannot_be_called_is_refused(there: str, name: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            with pytest.raises((AttributeError, migrate.UsageError)):
                await a.call(zoo, name)
            assert await zoo.undecorated(1) == 1

    run(body())


@HERE_AND_THERE
def test_wrong_arguments_are_a_type_error_of_the_handler(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            with pytest.raises(TypeError):
                await zoo.slow()
            with pytest.raises(TypeError):
                await zoo.slow(1, 2)
            assert await zoo.slow(1) == 2

    run(body())


@HERE_AND_THERE
def test_a_handler_knows_where_it_runs_and_for_whom(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            one, two = await zoo.current(), await zoo.current()
            assert one.ref == zoo
            assert (one.node, one.epoch) == (there, 1)
            assert one.caller == a.id
            assert one.request_id and one.request_id != two.request_id
            await a.migrate(zoo, to="b" if there == "a" else "a")
            assert (await zoo.current()).epoch == 2

    run(body())


def test_current_outside_of_a_handler_is_a_usage_error():
    with pytest.raises(migrate.UsageError):
        migrate.current()


class Boss:
    def __init__(self, worker: Any) -> None:
        self.worker = worker

    async def who_asks(self) -> str | None:
        caller: str | None = (await self.worker.current()).caller
        return caller


def test_the_caller_of_a_server_is_a_server():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on("b"))
            boss = await a.spawn(Boss, zoo)
            assert await boss.who_asks() == boss._server_id

    run(body())


# ---------------------------------------------------------------- asyncio's ways to await


@HERE_AND_THERE
def test_calls_work_with_everything_that_asyncio_has(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Counter, options=on(there))
            assert await asyncio.create_task(ref.incr()) == 1
            assert await asyncio.gather(ref.incr(), ref.incr()) == [2, 3]
            assert await asyncio.wait_for(ref.incr(), 10) == 4
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ref.incr()) for _ in range(3)]
            assert [t.result() for t in tasks] == [5, 6, 7]
            assert await asyncio.shield(ref.incr()) == 8
            assert await asyncio.ensure_future(ref.incr()) == 9
            call = ref.incr()
            assert (await call, await call) == (10, 10)
            done, _ = await asyncio.wait([asyncio.create_task(ref.incr())])
            assert done.pop().result() == 11
            assert [await c for c in asyncio.as_completed([ref.incr()])] == [12]

    run(body())


@HERE_AND_THERE
def test_a_call_that_nobody_awaits_is_made_all_the_same(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Counter, options=on(there))
            for _ in range(10):
                ref.incr()
            assert await ref.incr() == 11

    run(body())


@HERE_AND_THERE
def test_a_cancelled_call_leaves_no_gap(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Counter, options=on(there))
            for n in range(30):
                call = asyncio.ensure_future(ref.incr())
                if n % 2:
                    await asyncio.sleep(0)
                if call.cancel():  # Not if it was answered already, on the caller's stack.
                    with pytest.raises(asyncio.CancelledError):
                        await call
            assert 1 <= await ref.incr() <= 31
            assert await ref.incr() > 1

    run(body())


@HERE_AND_THERE
def test_cancelling_a_call_of_a_running_handler_drops_its_result_only(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            Gate.events["cancel"] = asyncio.Event()
            ref = await a.spawn(Gate, "cancel", options=on(there))
            call = asyncio.ensure_future(ref.pass_through())
            await asyncio.sleep(0.02)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            Gate.events["cancel"].set()
            assert await ref.count() == 1

    run(body())


# ---------------------------------------------------------------- time-outs


@HERE_AND_THERE
def test_a_call_that_takes_too_long_ends_with_an_unknown_outcome(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            key = f"late{there}"
            Gate.events[key] = asyncio.Event()
            ref = await a.spawn(Gate, key, options=on(there))
            error = await failure_of(
                ref.pass_through.with_options(timeout=0.05)(), migrate.CallTimeout
            )
            assert isinstance(error, TimeoutError)
            assert (error.outcome, error.timeout_s) == (migrate.Outcome.UNKNOWN, 0.05)
            assert error.server == ref._server_id
            Gate.events[key].set()
            assert await ref.count() == 1

    run(body())


@HERE_AND_THERE
def test_a_call_that_expires_in_the_mailbox_is_not_run(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            key = f"expires{there}"
            Gate.events[key] = asyncio.Event()
            ref = await a.spawn(Gate, key, options=on(there))
            first = ref.pass_through()
            second = ref.pass_through.with_options(timeout=0.05)()
            await failure_of(second, migrate.CallTimeout)
            Gate.events[key].set()
            assert await first == 1
            assert await ref.count() == 1

    run(body())


def test_the_nodes_own_time_out_is_the_default_and_none_means_for_ever():
    async def body() -> None:
        async with nodes("a", options=QUICK.replace(call_timeout_s=0.05)) as (a,):
            Gate.events["default"] = asyncio.Event()
            ref = await a.spawn(Gate, "default")
            error = await failure_of(ref.pass_through(), migrate.CallTimeout)
            assert error.timeout_s == 0.05
            waiting = asyncio.create_task(ref.count.with_options(timeout=None)())
            await asyncio.wait([waiting], timeout=0.15)
            assert not waiting.done()
            Gate.events["default"].set()
            assert await waiting == 1

    run(body())


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", True])
def test_a_time_out_that_cannot_be_is_a_usage_error(timeout: Any):
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            with pytest.raises(migrate.UsageError):
                ref.incr.with_options(timeout=timeout)

    run(body())


# ---------------------------------------------------------------- back-pressure


@migrate.server(mailbox=4)
class Small:
    def __init__(self, key: str) -> None:
        self.key = key
        self.n = 0

    async def wait(self) -> int:
        await Gate.events[self.key].wait()
        self.n += 1
        return self.n

    def note(self) -> None:
        self.n += 1

    def count(self) -> int:
        return self.n


@HERE_AND_THERE
def test_a_full_mailbox_makes_callers_wait_and_loses_nothing(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            key = f"full{there}"
            Gate.events[key] = asyncio.Event()
            ref = await a.spawn(Small, key, options=on(there))
            first = ref.wait()
            casts = [asyncio.create_task(ref.note.cast()) for _ in range(40)]
            await asyncio.wait(casts, timeout=0.1)
            node = a if there == "a" else b
            inc = node._driver.core.hosted[ref._server_id]
            assert len(inc.mailbox) + inc.early <= 4
            assert not all(c.done() for c in casts)
            Gate.events[key].set()
            await first
            await asyncio.gather(*casts)
            assert await ref.count() == 41

    run(body())


@HERE_AND_THERE
def test_a_call_for_which_there_is_never_room_ends_in_mailbox_full_and_was_not_done(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            key = f"never{there}"
            Gate.events[key] = asyncio.Event()
            ref = await a.spawn(Small, key, options=on(there))
            first = ref.wait()
            casts = [asyncio.create_task(ref.note.cast()) for _ in range(4)]
            await asyncio.gather(*casts)
            error = await failure_of(
                ref.count.with_options(timeout=0.2)(), (migrate.MailboxFull, migrate.CallTimeout)
            )
            assert error.outcome is migrate.Outcome.NOT_DONE
            Gate.events[key].set()
            await first
            assert await ref.count() == 5

    run(body())


MIB = 1 << 20


@migrate.server
class Taker:
    """Takes values and keeps none."""

    @migrate.call
    def take(self, value: Any) -> int:
        return len(value)


class Wrapped:
    """A value that is pickled wherever its server is."""

    def __init__(self, size: int) -> None:
        self.data = os.urandom(size)

    def __len__(self) -> int:
        return len(self.data)


def array(size: int) -> Any:
    return np.zeros(size, np.uint8)


@HERE_AND_THERE
@pytest.mark.parametrize("make", [bytes, bytearray, array, Wrapped])
def test_what_waits_in_a_mailbox_is_bounded_in_bytes_for_all_its_callers(there: str, make: Any):
    limit = 4 * MIB

    async def body() -> None:
        options = QUICK.replace(mailbox_bytes_max=limit)
        async with nodes("a", "b", "c", options=options) as opened:
            key = f"bytes{there}"
            Gate.events[key] = asyncio.Event()
            gate = await opened[2].spawn(Gate, key)
            ref = await opened[0].spawn(Held, gate, options=on(there))
            owner = opened[0] if there == "a" else opened[1]
            inc = owner._driver.core.hosted[ref._server_id]
            refs = [ref._bound_to(node._driver) for node in opened]
            casts = [
                asyncio.create_task(refs[n % 3].take.cast(make(MIB + n // 3))) for n in range(60)
            ]
            await until(lambda: inc.mailbox_bytes >= limit)
            # What was refused comes again meanwhile, and no more gets in.
            for _ in range(20):
                await owner.info(ref)
                assert limit <= inc.mailbox_bytes + inc.early_bytes <= limit + 2 * MIB
            assert sum(cast.done() for cast in casts) < 10
            Gate.events[key].set()
            await asyncio.gather(*casts)
            sizes = await ref.taken()
            assert sorted(sizes) == sorted(MIB + n // 3 for n in range(60))

    run(body())


@pytest.mark.parametrize("make", [bytes, array, lambda size: "x" * size])
def test_who_keeps_the_future_of_a_call_does_not_keep_what_it_sent(make: Any):
    def sent() -> list[memoryview]:
        gc.collect()
        views = [o for o in gc.get_objects() if type(o) is memoryview]
        return [view for view in views if 2 * MIB <= view.nbytes < 3 * MIB]

    async def body() -> None:
        async with nodes("a", "b") as opened:
            ref = await opened[0].spawn(Taker, options=on("b"))
            value = make(2 * MIB)
            calls = [ref.take(value) for _ in range(3)]
            assert sent()
            assert await asyncio.gather(*calls) == [2 * MIB] * 3
            await until(lambda: not sent())
            assert all(call.done() for call in calls)

    run(body())


def test_the_memory_of_a_node_stays_small_while_a_slow_server_gets_large_arguments():
    async def body() -> None:
        options = migrate.NodeOptions(mailbox_bytes_max=8 * MIB)
        async with (
            migrate.LocalCluster(["far"], options=options) as cluster,
            migrate.Node("a", directory=cluster.directory) as a,
            migrate.Node("b", directory=cluster.directory) as b,
        ):
            Gate.events["memory"] = asyncio.Event()
            gate = await a.spawn(Gate, "memory")
            ref = await a.spawn(Held, gate, options=on("far"))
            process = psutil.Process(cluster.nodes[0].pid)
            before = process.memory_info().rss
            refs = [ref._bound_to(node._driver) for node in (a, b)]
            data = bytes(MIB)
            casts = [asyncio.create_task(refs[n % 2].take.cast(data)) for n in range(200)]

            async def full() -> bool:
                return (await a.info(ref)).mailbox >= 8

            await eventually(full)
            grown = 0
            for _ in range(50):
                assert (await a.info(ref)).mailbox <= 9
                grown = max(grown, process.memory_info().rss - before)
            # Without the bound all 200 of them.
            assert grown < 100 * MIB
            Gate.events["memory"].set()
            await asyncio.gather(*casts)
            assert await ref.taken() == [MIB] * 200

    run(body())


class Flood:
    """Casts to somebody until there is no room."""

    def __init__(self, other: Any) -> None:
        self.other = other

    async def flood(self, times: int) -> tuple[int, str]:
        sent = 0
        for _ in range(times):
            try:
                await self.other.note.cast()
            except migrate.MailboxFull as error:
                return sent, str(error.outcome)
            sent += 1
        return sent, ""


@HERE_AND_THERE
def test_a_handler_that_casts_into_a_full_mailbox_gets_an_error_and_does_not_wait(there: str):
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(window=8)) as (a, _):
            key = f"flood{there}"
            Gate.events[key] = asyncio.Event()
            small = await a.spawn(Small, key, options=on(there))
            first = small.wait()
            flood = await a.spawn(Flood, small)
            call = flood.flood.with_options(timeout=15)(50)
            sent, outcome = await asyncio.wait_for(call, 15)
            assert "NOT_DONE" in outcome or "not done" in outcome
            Gate.events[key].set()
            await first

            async def all_came() -> bool:
                return bool(await small.count() >= 1 + sent)

            await eventually(all_came)

    run(body())


@HERE_AND_THERE
def test_a_cast_returns_when_the_mailbox_has_it_and_its_failure_is_logged(
    there: str, caplog: pytest.LogCaptureFixture
):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on(there))
            with caplog.at_level(logging.ERROR, "migrate"):
                assert await zoo.raises.cast("unheard") is None
                assert await zoo.undecorated(1) == 1
            assert "raises" in caplog.text and "unheard" in caplog.text

    run(body())


# ---------------------------------------------------------------- cycles and knots


class Node:
    """Calls whom it knows."""

    def __init__(self) -> None:
        self.other: Any = None
        self.n = 0

    def know(self, other: Any) -> None:
        self.other = other

    async def around(self) -> str:
        result: str = await self.other.back()
        return result

    async def back(self) -> str:
        return f"back {await self.other.leaf()}"

    def leaf(self) -> str:
        self.n += 1
        return f"leaf {self.n}"

    async def hold_then_call(self, key: str) -> str:
        """Waits until both sides are in it, so that the knot is certain."""
        await Gate.events[key].wait()
        result: str = await self.other.leaf()
        return result


@migrate.server(reentrant=True)
class Reentrant(Node):
    pass


@pytest.mark.parametrize("places", ["aa", "ab", "bb"])
def test_s15_a_cycle_of_calls_is_refused_at_once_and_names_its_chain(places: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            one = await a.spawn(Node, options=on(places[0]))
            two = await a.spawn(Node, options=on(places[1]))
            await one.know(two)
            await two.know(one)
            error = await failure_of(one.around(), migrate.CallCycle)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert error.chain == (one._server_id, two._server_id, one._server_id)
            assert "reentrant" in str(error)
            assert await one.leaf() == "leaf 1"

    run(body())


def test_a_server_that_calls_itself_is_refused():
    async def body() -> None:
        async with nodes("a") as (a,):
            one = await a.spawn(Node)
            await one.know(one)
            error = await failure_of(one.back(), migrate.CallCycle)
            assert error.chain == (one._server_id, one._server_id)
            assert await one.leaf() == "leaf 1"

    run(body())


@pytest.mark.parametrize("places", ["aa", "ab", "bb"])
def test_a_reentrant_class_serves_the_call_that_comes_back(places: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            one = await a.spawn(Reentrant, options=on(places[0]))
            two = await a.spawn(Node, options=on(places[1]))
            await one.know(two)
            await two.know(one)
            assert await one.around() == "back leaf 1"

    run(body())


@pytest.mark.parametrize("reentrant", [False, True])
def test_s15_a_cycle_while_the_server_in_the_middle_moves(reentrant: bool):
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, _, c):
            one = await a.spawn(Reentrant if reentrant else Node)
            two = await a.spawn(Node, options=on("b"))
            await one.know(two)
            await two.know(one)
            for k in range(4):
                call = one.around()
                moving = asyncio.ensure_future(c.migrate(two, to="cb"[k % 2]))
                if reentrant:
                    assert (await call).startswith("back leaf")
                else:
                    await failure_of(call, migrate.CallCycle)
                await moving
            assert (await one.leaf()).startswith("leaf")

    run(body())


def test_a_reentrant_call_is_let_in_while_the_server_quiesces():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            Gate.events["quiesce"] = asyncio.Event()
            one = await a.spawn(Reentrant)
            two = await a.spawn(Waits, "quiesce")
            await one.know(two)
            await two.know(one)
            call = one.around()
            moving = asyncio.ensure_future(a.migrate(one, to="b"))
            await until(lambda: bool(a._driver.core.leaving))
            Gate.events["quiesce"].set()
            assert await call == "waited leaf 1"
            assert (await moving).target == "b"

    run(body())


class Waits(Node):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    async def back(self) -> str:
        await Gate.events[self.key].wait()
        return f"waited {await self.other.leaf()}"


@pytest.mark.parametrize("places", ["aa", "ab", "bc"])
def test_a_knot_that_no_chain_shows_is_found_by_probes(places: str):
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, _, _c):
            key = f"knot{places}"
            Gate.events[key] = asyncio.Event()
            one = await a.spawn(Node, options=on(places[0]))
            two = await a.spawn(Node, options=on(places[1]))
            await one.know(two)
            await two.know(one)
            calls = [one.hold_then_call(key), two.hold_then_call(key)]
            await asyncio.sleep(0.02)
            Gate.events[key].set()
            results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 15)
            cycles = [r for r in results if isinstance(r, migrate.CallCycle)]
            # One of the two gives way, and the other goes on.
            assert len(cycles) == 1, results
            assert {one._server_id, two._server_id} <= set(cycles[0].chain)
            assert [r for r in results if r not in cycles] == ["leaf 1"]

    run(body())


def test_a_long_wait_that_is_no_knot_is_left_alone():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            Gate.events["nohurry"] = asyncio.Event()
            gate = await a.spawn(Gate, "nohurry", options=on("b"))
            asks = await a.spawn(Asks, gate)
            tasks = [asyncio.create_task(asks.ask()) for _ in range(3)]
            await asyncio.wait(tasks, timeout=0.4)
            Gate.events["nohurry"].set()
            assert sorted(await asyncio.gather(*tasks)) == [1, 2, 3]

    run(body())


class Asks:
    def __init__(self, gate: Any) -> None:
        self.gate = gate

    async def ask(self) -> int:
        n: int = await self.gate.pass_through()
        return n


# ---------------------------------------------------------------- refs


def test_refs_are_equal_hashable_and_survive_pickling_and_copying():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, options=migrate.SpawnOptions(name="hits"))
            other = await a.spawn(Counter)
            same = await b.whereis("hits")
            assert same == ref and hash(same) == hash(ref)
            assert ref != other and len({ref, same, other}) == 2
            for twin in (pickle.loads(pickle.dumps(ref)), copy.copy(ref), copy.deepcopy(ref)):
                assert twin == ref
            assert await copy.deepcopy(ref).incr() == 1
            assert "Counter" in repr(ref)

    run(body())


def test_refs_travel_in_arguments_and_results_and_keep_working():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            zoo = await a.spawn(Zoo, options=on("b"))
            counter = await a.spawn(Counter)
            back = await zoo.undecorated([counter, {"k": counter}])
            assert back[0] == counter == back[1]["k"]
            assert await back[0].incr() == 1
            # A bound method of a ref is a value too.
            method = await zoo.undecorated(counter.incr)
            assert await method(2) == 3

    run(body())


def test_a_ref_of_a_stopped_server_says_so_soon():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter)
            from_b = ref._bound_to(b._driver)
            await from_b.incr()
            await b.stop(ref)
            for mine in (ref, from_b):
                error = await failure_of(mine.incr(), migrate.ServerNotFound)
                assert error.outcome is migrate.Outcome.NOT_DONE
            assert isinstance(error, LookupError)

    run(body())


def test_calls_that_wait_in_the_mailbox_when_a_server_is_stopped_are_told_it_was_not_done():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            Gate.events["stopping"] = asyncio.Event()
            ref = await a.spawn(Gate, "stopping")
            mine = ref._bound_to(b._driver)
            running, queued, far = ref.pass_through(), ref.pass_through(), mine.pass_through()
            inc = a._driver.core.hosted[ref._server_id]
            await until(lambda: len(inc.mailbox) == 2)
            stopping = asyncio.ensure_future(a.stop(ref))
            await until(lambda: inc.phase is Phase.STOPPING)
            Gate.events["stopping"].set()
            assert await running == 1
            await stopping
            for call in (queued, far):
                error = await failure_of(call, migrate.ServerNotFound)
                assert error.outcome is migrate.Outcome.NOT_DONE

    run(body())


class Threaded:
    def __init__(self, ref: Any) -> None:
        self.ref = ref

    @migrate.blocking
    def call_from_thread(self) -> Any:
        return self.ref.incr()


@HERE_AND_THERE
def test_a_ref_used_in_another_thread_is_refused_and_nothing_is_sent(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Counter, options=on(there))
            threaded = await a.spawn(Threaded, ref, options=on("a"))
            error = await failure_of(threaded.call_from_thread(), migrate.UsageError)
            assert error.outcome is migrate.Outcome.NOT_DONE and "thread" in str(error)
            with pytest.raises(migrate.UsageError, match="thread"):
                await asyncio.to_thread(ref.incr)
            assert await ref.incr() == 1

    run(body())


# ---------------------------------------------------------------- broken links


def test_calls_go_on_over_links_that_break_again_and_again():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, options=on("b"))
            calls = []
            for _ in range(8):
                calls += [ref.incr() for _ in range(10)]
                await asyncio.sleep(0)
                break_links(a)
                calls += [ref.incr() for _ in range(10)]
                await calls[-1]
            assert await asyncio.gather(*calls) == list(range(1, 161))
            assert b._driver.core.hosted[ref._server_id].records <= 160

    run(body())


def test_s41_a_handler_that_runs_while_its_link_breaks_runs_once():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            Gate.events["broken"] = asyncio.Event()
            ref = await a.spawn(Gate, "broken", options=on("b"))
            call = ref.pass_through()
            inc = b._driver.core.hosted[ref._server_id]
            await until(lambda: bool(inc.running))
            for _ in range(3):
                break_links(a)
                await until(lambda: a._links is not None and a._links.is_up(b.id))
            Gate.events["broken"].set()
            assert await call == 1
            assert await ref.count() == 1

    run(body())


def test_s50_completion_records_are_bounded_by_what_is_outstanding():
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(ack_idle_s=0.05)) as (a, b):
            ref = await a.spawn(Counter, options=on("b"))
            inc = b._driver.core.hosted[ref._server_id]
            most = 0
            for _ in range(50):
                await asyncio.gather(*(ref.incr() for _ in range(20)))
                most = max(most, inc.records)
            assert most <= 40
            await until(lambda: inc.records == 0)

    run(body())


def test_a_slow_handler_of_one_server_does_not_hold_up_another():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            Gate.events["slow"] = asyncio.Event()
            gate = await a.spawn(Gate, "slow", options=on("b"))
            quick = await a.spawn(Busy, options=on("b"))
            waiting = gate.pass_through()
            for _ in range(20):
                assert await quick.quick() == "quick"
            assert not waiting.done()
            Gate.events["slow"].set()
            assert await waiting == 1

    run(body())
