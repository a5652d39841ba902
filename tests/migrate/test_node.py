"""Nodes: spawning, names, membership, draining, stopping, closing, and strangers at the port."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import pathlib
import secrets
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

import migrate
from migrate.core.ids import node_name
from migrate.server import spec_of
from migrate.shell.host import _never_waits
from tests.migrate.clusters import (
    QUICK,
    break_links,
    eventually,
    failure_of,
    linked,
    nodes,
    run,
    until,
)
from tests.migrate.servers import Counter, Gate, Where

pytestmark = pytest.mark.usefixtures("cluster_secret")


# ---------------------------------------------------------------- spawning and names


class Fails:
    def __init__(self, why: str) -> None:
        raise ValueError(why)


def test_a_constructor_that_fails_leaves_no_server_and_arrives_as_itself():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            for place in ("a", "b"):
                options = migrate.SpawnOptions(name="failed", on=place)
                error = await failure_of(a.spawn(Fails, "because", options=options), ValueError)
                assert error.args == ("because",)
            assert await a.servers() == []
            await failure_of(a.whereis("failed"), migrate.ServerNotFound)

    run(body())


@pytest.mark.parametrize("what", [3, "Counter", None, Counter(), len])
def test_spawning_what_is_no_class_of_the_users_is_a_usage_error(what: Any):
    async def body() -> None:
        async with nodes("a") as (a,):
            with pytest.raises((migrate.UsageError, TypeError)):
                await a.spawn(what)
            assert await a.servers() == []

    run(body())


def test_spawn_places_by_name_by_a_neighbour_and_here_by_default():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, _):
            assert await (await b.spawn(Where)).node() == "b"
            far = await a.spawn(Where, options=migrate.SpawnOptions(on="c"))
            assert await far.node() == "c"
            near = await a.spawn(Where, options=migrate.SpawnOptions(near=far))
            assert await near.node() == "c"
            await a.migrate(far, to="b")
            near = await a.spawn(Where, options=migrate.SpawnOptions(near=far))
            assert await near.node() == "b"
            error = await failure_of(
                a.spawn(Where, options=migrate.SpawnOptions(on="nowhere")), migrate.NodeNotFound
            )
            assert "a, b, c" in str(error)

    run(body())


def test_spawn_on_the_least_loaded_spreads():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, _, _c):

            async def all_heard() -> bool:
                return all(a._meter.candidate(n) is not None for n in a._membership.nodes)

            await eventually(all_heard)
            places = [await (await a.spawn_lb(Where)).node() for _ in range(30)]
            assert set(places) == {"a", "b", "c"}
            await a.cordon("b")

            async def known() -> bool:
                found = [a._meter.candidate(n) for n in a._membership.nodes]
                return sum(1 for c in found if c is not None and c.admits) == 2

            await eventually(known)
            places = [await (await a.spawn_lb(Where)).node() for _ in range(10)]
            assert "b" not in places

    run(body())


def test_a_taken_name_is_refused_with_the_ref_of_the_one_who_has_it():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            named = migrate.SpawnOptions(name="hits")
            ref = await a.spawn(Counter, 5, options=named)
            error = await failure_of(b.spawn(Counter, options=named), migrate.NameTaken)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert error.ref == ref
            assert await error.ref.incr() == 6
            assert len(await a.servers()) == 1
            await a.stop(ref)
            again = await b.spawn(Counter, options=named)
            assert again != ref and await again.incr() == 1

    run(body())


def test_of_many_spawns_of_one_name_one_wins_and_all_others_get_its_ref():
    async def body() -> None:
        async with nodes("a", "b", "c") as cluster:
            named = migrate.SpawnOptions(name="one")
            results = await asyncio.gather(
                *(node.spawn(Counter, options=named) for node in cluster * 4),
                return_exceptions=True,
            )
            lost = [r for r in results if isinstance(r, migrate.NameTaken)]
            won = [r for r in results if not isinstance(r, BaseException)]
            assert (len(won), len(lost)) == (1, 11)
            assert {e.ref for e in lost} == {won[0]}
            assert len(await cluster[0].servers()) == 1

    run(body())


def test_an_ask_that_comes_twice_is_done_once_and_answered_twice(
    monkeypatch: pytest.MonkeyPatch,
):
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            send = a._asks._send

            def twice(node: str, message: Any) -> None:
                send(node, message)
                send(node, message)

            monkeypatch.setattr(a._asks, "_send", twice)
            ref = await a.spawn(Counter, 7, options=migrate.SpawnOptions(on="b"))
            break_links(a)
            assert await ref.incr() == 8
            assert len(b._driver.core.hosted) == 1

    run(body())


def test_whereis_info_and_the_lists_tell_what_is():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, options=migrate.SpawnOptions(name="hits", on="b"))
            assert await a.whereis("hits") == ref == await b.whereis("hits")
            for node in (a, b):
                info = await node.info(ref)
                assert (info.name, info.node, info.epoch, info.mailbox) == ("hits", "b", 1, 0)
                assert info.cls == "tests.migrate.servers:Counter"
                assert [i.id for i in await node.servers()] == [info.id]
                found = await node.nodes()
                assert [n.name for n in found] == ["a", "b"]
                assert [n.servers for n in found] == [0, 1]
                assert [n.address for n in found] == [a.address, b.address]
            await failure_of(a.whereis("misses"), migrate.ServerNotFound)

    run(body())


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "ümlaut", "a/b", "a@b", "a\n"])
def test_a_name_that_no_node_can_have_is_refused(name: str):
    with pytest.raises(migrate.UsageError):
        migrate.Node(name=name)


# ---------------------------------------------------------------- membership


def test_two_nodes_of_one_name_are_refused_and_the_first_goes_on():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            second = migrate.Node(name="a", directory=a._directory, options=QUICK)
            error = await failure_of(second.start(), migrate.UsageError)
            assert "'a'" in str(error) and a.address in str(error)
            assert await ref.incr() == 1
            assert [n.name for n in await a.nodes()] == ["a"]

    run(body())


def test_a_name_is_free_again_when_its_node_has_left():
    async def body() -> None:
        async with nodes("b") as (b,):
            ids = set()
            for _ in range(3):
                async with migrate.Node(name="a", directory=b._directory, options=QUICK) as a:
                    ids.add(a.id)
                    await linked(a, [b])
                    ref = await a.spawn(Counter)
                    assert await ref._bound_to(b._driver).incr() == 1
            assert len(ids) == 3

    run(body())


def test_nodes_of_a_named_memory_directory_find_each_other_and_others_do_not():
    async def body() -> None:
        url = f"memory://{secrets.token_hex(4)}"
        async with nodes("a", "b", directory=url) as (a, _), nodes("c") as (c,):
            assert [n.name for n in await a.nodes()] == ["a", "b"]
            assert [n.name for n in await c.nodes()] == ["c"]

    run(body())


def test_nodes_of_one_database_file_find_each_other(tmp_path: pathlib.Path):
    async def body() -> None:
        url = f"sqlite:///{tmp_path / 'cluster.db'}"
        async with nodes("a", "b", directory=url) as (a, b):
            ref = await a.spawn(Counter)
            assert (await b.migrate(ref, to="b")).target == "b"
            assert await ref.incr() == 1

    run(body())


def test_a_directory_that_cannot_be_is_a_usage_error():
    for url in ("nonsense://x", "sqlite://", 5):
        with pytest.raises((migrate.UsageError, TypeError)):
            migrate.Node(name="a", directory=url)  # type: ignore[arg-type]


def test_a_node_is_used_once_and_not_before_it_is_open():
    async def body() -> None:
        node = migrate.Node(name="a")
        with pytest.raises(migrate.UsageError, match="not open"):
            await node.spawn(Counter)
        async with node:
            pass
        with pytest.raises(migrate.UsageError, match="closed"):
            await node.spawn(Counter)
        with pytest.raises(migrate.UsageError, match="twice"):
            await node.start()
        await node.close()

    run(body())


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_listening_beyond_loopback_without_tls_is_refused(listen: str):
    async def body() -> None:
        error = await failure_of(migrate.Node(name="a", listen=listen).start(), migrate.UsageError)
        assert "TLS" in str(error) or "loopback" in str(error)

    run(body())


def test_an_address_in_use_is_a_usage_error():
    async def body() -> None:
        async with nodes("a") as (a,):
            other = migrate.Node(name="b", listen=a.address, directory=a._directory)
            error = await failure_of(other.start(), migrate.UsageError)
            assert a.address in str(error)

    run(body())


def test_a_node_that_has_left_is_not_waited_for():
    async def body() -> None:
        async with nodes("a") as (a,):
            async with migrate.Node(name="b", directory=a._directory, options=QUICK) as b:
                await linked(b, [a])
            for verb in ("node", "cordon"):
                error = await failure_of(
                    asyncio.wait_for(a._asks.ask(b.id, verb), 15), migrate.NodeNotFound
                )
                assert error.node == "b"

    run(body())


# ---------------------------------------------------------------- strangers


def test_a_node_with_another_secret_is_refused_by_both_sides(tmp_path: pathlib.Path):
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            stranger = migrate.connect(a.address, secret_file=tmp_path / "other.secret")
            error = await failure_of(stranger.__aenter__(), migrate.AuthError)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert "secret" in str(error)
            assert await ref.incr() == 1

    run(body())


def test_a_secret_that_others_can_read_is_refused(tmp_path: pathlib.Path):
    async def body() -> None:
        path = tmp_path / "open.secret"
        path.write_bytes(secrets.token_bytes(64))
        path.chmod(0o644)
        error = await failure_of(
            migrate.Node(name="a", secret_file=path).start(), migrate.AuthError
        )
        assert str(path) in str(error)

    run(body())


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        secrets.token_bytes(10_000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">I", 0xFFFFFFFF) * 100,
        b"",
    ],
    ids=["http1", "tls", "noise", "http2", "nothing"],
)
def test_garbage_at_the_port_disturbs_nobody(garbage: bytes):
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter)
            mine = ref._bound_to(b._driver)
            host, _, port = a.address.rpartition(":")
            for n in range(5):
                _, writer = await asyncio.open_connection(host, int(port))
                with contextlib.suppress(OSError):
                    writer.write(garbage)
                    await writer.drain()
                assert await mine.incr() == n + 1
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    run(body())


def test_frames_that_are_no_messages_end_the_link_and_not_the_node(
    caplog: pytest.LogCaptureFixture,
):
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter)
            mine = ref._bound_to(b._driver)
            assert await mine.incr() == 1
            with caplog.at_level(logging.ERROR, "migrate"):
                assert b._links is not None
                b._links.send(a.id, b"\xc1 no messagepack")
                await until(lambda: "hangs up" in caplog.text)
            other = await a.spawn(Counter)
            assert await other.incr() == 1

    run(body())


# ---------------------------------------------------------------- draining


def test_draining_moves_everything_and_the_node_then_admits_nothing():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, _):
            refs = [await a.spawn(Counter, n) for n in range(20)]
            calls = [ref.incr() for ref in refs]
            reports = await b.drain("a")
            assert len(reports) == 20
            assert {r.source for r in reports} == {"a"}
            assert {r.target for r in reports} == {"b", "c"}
            assert await asyncio.gather(*calls) == [n + 1 for n in range(20)]
            assert [await ref.incr() for ref in refs] == [n + 2 for n in range(20)]
            drained = next(n for n in await b.nodes() if n.name == "a")
            assert (drained.servers, drained.draining, drained.cordoned) == (0, True, True)
            await failure_of(b.migrate(refs[0], to="a"), migrate.TargetRefused)
            await failure_of(a.spawn(Counter), migrate.TargetRefused)
            await b.cordon("a", False)
            assert (await b.migrate(refs[0], to="a")).target == "a"

    run(body())


def test_s37_draining_the_last_node_is_an_error_at_once_and_moves_nothing():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            error = await failure_of(a.drain("a"), migrate.MoveError)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert "no other node" in str(error)
            assert await ref.incr() == 1
            assert not (await a.nodes())[0].draining

    run(body())


def test_s38_two_nodes_that_drain_together_send_everything_to_the_third():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, c):
            refs = [await node.spawn(Counter, n) for node in (a, b) for n in range(10)]
            results = await asyncio.gather(c.drain("a"), c.drain("b"), return_exceptions=True)
            assert [r for r in results if isinstance(r, BaseException)] == []
            assert {(await c.info(ref)).node for ref in refs} == {"c"}
            assert [await ref.get() for ref in refs] == [*range(10), *range(10)]

    run(body())


@migrate.server(movable=False)
class Pinned:
    def incr(self) -> int:
        return 1


def test_a_drain_that_cannot_move_everything_says_what_stays_and_why():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            pinned = await a.spawn(Pinned)
            counter = await a.spawn(Counter)
            error = await failure_of(b.drain("a"), migrate.MoveError)
            assert "1 servers" in str(error) and "movable=False" in str(error)
            assert (await b.info(counter)).node == "b"
            assert await pinned.incr() == 1

    run(body())


class Pair:
    """Calls its partner and is called by it, again and again, without cycles."""

    def __init__(self) -> None:
        self.other: Any = None
        self.n = 0

    def know(self, other: Any) -> None:
        self.other = other

    async def both(self) -> int:
        self.n += 1
        await self.other.one()
        return self.n

    def one(self) -> int:
        self.n += 1
        return self.n


def test_s10_a_drain_while_a_long_request_runs_never_has_a_second_copy_of_its_server():
    async def body() -> None:
        # The limit stands for ten minutes: the request outlasts it.
        options = QUICK.replace(quiesce_timeout_s=0.2)
        async with nodes("a", "b", options=options) as (a, b):
            Gate.events["drain"] = asyncio.Event()
            ref = await a.spawn(Gate, "drain")
            running = asyncio.ensure_future(ref.pass_through())
            await until(lambda: next(iter(a._driver.core.hosted.values())).running)
            error = await failure_of(b.drain("a"), migrate.MoveError)
            assert ref._server_id in str(error) and "quiesce" in str(error)
            assert not running.done()
            assert b._driver.core.hosted == {} and b._driver.core.copies == {}
            waiting = ref.count()
            Gate.events["drain"].set()
            assert await running == 1
            assert await waiting == 1, "it ran once, where it was"
            assert [report.target for report in await b.drain("a")] == ["b"]
            assert await ref.count() == 1

    run(body())


def test_s52_draining_a_group_whose_members_call_each_other_ends():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            one, two = await a.spawn(Pair), await a.spawn(Pair)
            third = await a.spawn(Pair)
            await one.know(two)
            await two.know(third)
            ended = asyncio.Event()

            async def keep(ref: Any) -> int:
                n = 0
                while not ended.is_set():
                    await ref.both()
                    n += 1
                return n

            tasks = [asyncio.create_task(keep(r._bound_to(b._driver))) for r in (one, two)]
            reports = await b.drain("a")
            assert len(reports) == 3
            ended.set()
            assert min(await asyncio.gather(*tasks)) > 0

    run(body())


# ---------------------------------------------------------------- stopping and closing


def test_a_stop_waits_for_the_message_being_handled():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            Gate.events["stop"] = asyncio.Event()
            ref = await a.spawn(Gate, "stop", options=migrate.SpawnOptions(name="gate"))
            call = ref.pass_through()
            stops = [asyncio.create_task(n.stop(ref)) for n in (a, b, b)]
            await asyncio.wait(stops, timeout=0.1)
            assert not any(s.done() for s in stops)
            Gate.events["stop"].set()
            assert await call == 1
            await asyncio.gather(*stops)
            await failure_of(a.stop(ref), migrate.ServerNotFound)
            await failure_of(a.info(ref), migrate.ServerNotFound)
            await failure_of(b.whereis("gate"), migrate.ServerNotFound)

    run(body())


def test_a_server_that_does_not_become_quiet_is_not_stopped_and_serves():
    async def body() -> None:
        async with nodes("a", options=QUICK.replace(quiesce_timeout_s=0.1)) as (a,):
            Gate.events["busy"] = asyncio.Event()
            ref = await a.spawn(Gate, "busy")
            call = ref.pass_through()
            error = await failure_of(a.stop(ref))
            assert error.outcome is migrate.Outcome.NOT_DONE
            Gate.events["busy"].set()
            assert await call == 1
            assert await ref.count() == 1
            await a.stop(ref)

    run(body())


def test_closing_a_node_stops_its_servers_and_tells_whoever_waits():
    async def body() -> None:
        async with nodes("b", options=QUICK.replace(quiesce_timeout_s=0.2)) as (b,):
            options = QUICK.replace(quiesce_timeout_s=0.2)
            a = migrate.Node(name="a", directory=b._directory, options=options)
            await a.start()
            await linked(a, [b])
            Gate.events["never"] = asyncio.Event()
            hung = await a.spawn(Gate, "never", options=migrate.SpawnOptions(name="hung"))
            calm = await a.spawn(Counter, options=migrate.SpawnOptions(name="calm"))
            far = hung._bound_to(b._driver).pass_through()
            near = hung.pass_through()
            await until(lambda: a._driver.core.hosted[hung._server_id].mailbox)
            await a.close()
            error = await failure_of(near, migrate.CallError)
            assert error.outcome is not migrate.Outcome.DONE
            error = await failure_of(far, migrate.CallError)
            assert isinstance(error, migrate.ServerLost | migrate.ServerNotFound)
            for name in ("hung", "calm"):

                async def free(name: str = name) -> bool:
                    try:
                        await b.whereis(name)
                    except migrate.ServerNotFound:
                        return True
                    return False

                await eventually(free)
            await failure_of(
                calm._bound_to(b._driver).incr(), (migrate.ServerNotFound, migrate.ServerLost)
            )

    run(body())


def test_a_client_of_a_server_that_another_node_closes_under_hears_of_it_soon():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            async with migrate.Node(name="c", directory=a._directory, options=QUICK) as c:
                await linked(c, [a, b])
                ref = await c.spawn(Counter)
                mine = ref._bound_to(a._driver)
                assert await mine.incr() == 1
            error = await failure_of(
                asyncio.wait_for(mine.incr(), 10), (migrate.ServerNotFound, migrate.ServerLost)
            )
            assert node_name(c.id) == "c"
            assert error.server == ref._server_id

    run(body())


# ---------------------------------------------------------------- monitors


def test_a_monitor_tells_of_moves_and_of_the_stop_and_then_ends():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter)
            events: list[migrate.Event] = []
            begun = asyncio.Event()

            async def watch() -> None:
                iterator = b.monitor(ref)
                first = asyncio.ensure_future(anext(iterator))
                begun.set()
                events.append(await first)
                async for event in iterator:
                    events.append(event)

            task = asyncio.create_task(watch())
            await begun.wait()
            await until(lambda: bool(events) or b._directory is not None)
            # The first move may come before the watch has begun; it is from now on.
            while not events:
                await a.migrate(ref, to="b" if (await a.info(ref)).node == "a" else "a")
            moves = len(events)
            await a.migrate(ref, to="b" if (await a.info(ref)).node == "a" else "a")
            await a.stop(ref)
            await task
            assert [e.kind for e in events[moves:]][-1] == "stopped"
            kinds = [e.kind for e in events]
            assert kinds.count("moved") >= 2 and kinds.count("stopped") == 1
            epochs = [e.epoch for e in events if e.kind == "moved"]
            assert epochs == sorted(set(epochs))
            assert {e.server for e in events} == {ref._server_id}

    run(body())


def test_a_monitor_of_a_server_that_is_not_there_says_so():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            await a.stop(ref)
            with pytest.raises(migrate.ServerNotFound):
                await anext(a.monitor(ref))

    run(body())


@pytest.mark.parametrize("verb", ["rebalance"])
def test_a_verb_of_a_later_release_says_so(verb: str):
    async def body() -> None:
        async with nodes("a") as (a,):
            error = await failure_of(getattr(a, verb)(), migrate.UsageError)
            assert verb in str(error)

    run(body())


def test_work_that_took_its_first_step_elsewhere_sees_results_errors_and_cancelling():
    from migrate.shell.driver import _go_on

    async def body() -> None:
        loop = asyncio.get_running_loop()
        saw: list[Any] = []

        async def work(first: asyncio.Future[int], second: asyncio.Future[int]) -> None:
            for future in (first, second):
                try:
                    saw.append(await future)
                except (ValueError, asyncio.CancelledError) as error:
                    saw.append(type(error))
            await asyncio.sleep(0)
            saw.append("end")

        for ways in itertools.product(("result", "error", "cancel"), repeat=2):
            futures = [loop.create_future(), loop.create_future()]
            coroutine = work(*futures)
            task = asyncio.create_task(_go_on(coroutine, coroutine.send(None)))
            await asyncio.sleep(0)
            for way, future in zip(ways, futures, strict=True):
                if way == "result":
                    future.set_result(7)
                elif way == "error":
                    future.set_exception(ValueError())
                else:
                    task.cancel()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            await task
            kinds = {"result": 7, "error": ValueError, "cancel": asyncio.CancelledError}
            assert saw == [kinds[ways[0]], kinds[ways[1]], "end"]
            saw.clear()

    run(body())


@migrate.server
class Quick:
    """Coroutines, of which only some can wait."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def value(self) -> int:
        return 7

    async def fails(self) -> int:
        raise ValueError("no")

    async def begins(self) -> str:
        async def background() -> None:
            await asyncio.sleep(0)
            self.log.append("background")

        asyncio.create_task(background())  # noqa: RUF006 - the node keeps and counts it
        self.log.append("begun")
        return migrate.current().node

    async def waits(self) -> str:
        await asyncio.sleep(0)
        return "waited"

    async def iterates(self) -> int:
        async def numbers() -> AsyncIterator[int]:
            for n in range(3):
                await asyncio.sleep(0)
                yield n

        return sum([n async for n in numbers()])

    async def guards(self) -> str:
        async with contextlib.AsyncExitStack():
            return "guarded"

    async def seen(self) -> list[str]:
        return self.log

    async def asks(self, one: Any, other: Any) -> None:
        self.asked = [one.value(), other.fails(), one.value()]

    async def answers(self) -> list[Any]:
        return await asyncio.gather(*self.asked, return_exceptions=True)


def test_a_coroutine_without_an_await_needs_no_task_and_is_a_handler_like_any_other():
    never = {n for n in spec_of(Quick).methods if _never_waits(getattr(Quick(), n))}
    assert never == {"value", "fails", "begins", "seen", "asks"}

    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Quick)
            for node in ("a", "b"):
                assert await ref.value() == 7
                with pytest.raises(ValueError, match="no"):
                    await ref.fails()
                assert await ref.begins() == node
                assert await ref.waits() == "waited"
                assert await ref.iterates() == 3
                assert await ref.guards() == "guarded"
                # Its task counts: the server moves when that has ended.
                await ref.begins()
                await a.migrate(ref, to="b" if node == "a" else "a")
                assert (await ref.seen())[-2:] == ["begun", "background"]

    run(body())


def test_handlers_that_never_wait_ask_others_and_fail_as_they_like():
    async def body() -> None:
        async with nodes("a") as (a,):
            one, other, asking = [await a.spawn(Quick) for _ in range(3)]
            for _ in range(3):
                await asking.asks(one, other)
                first, failure, last = await asking.answers()
                assert (first, str(failure), last) == (7, "no", 7)
                assert await one.value() == 7

    run(body())


def test_what_a_frame_brings_up_is_done_in_its_turn_and_a_failure_costs_the_others_no_more():
    async def body() -> None:
        async with nodes("a") as (a,):
            driver, done = a._driver, []

            def fails() -> None:
                raise ValueError("one of them")

            def receive(node: str, messages: list[Any], now_ms: int) -> list[Any]:
                driver._soon(lambda: done.append("first"))
                if node == "good":
                    driver._soon(lambda: driver._soon(lambda: done.append("third")))
                driver._soon(lambda: done.append("second"))
                if node == "fails":
                    driver._soon(fails)
                    driver._soon(lambda: done.append("last"))
                if node == "no good":
                    raise KeyError(node)
                return []

            real, driver.core.receive = driver.core.receive, receive  # type: ignore[method-assign]
            try:
                driver.received("good", [])
                assert done == ["first", "second", "third"]
                done.clear()
                await until(lambda: not driver._todo_scheduled)
                with pytest.raises(ValueError, match="one of them"):
                    driver.received("fails", [])
                assert done == ["first", "second"]
                await until(lambda: done == ["first", "second", "last"])
                done.clear()
                with pytest.raises(KeyError, match="no good"):
                    driver.received("no good", [])
                await until(lambda: done == ["first", "second"])
            finally:
                driver.core.receive = real  # type: ignore[method-assign]

    run(body())
