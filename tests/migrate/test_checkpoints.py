"""Checkpoint, restore and fork over several nodes in one loop."""

from __future__ import annotations

import asyncio
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import migrate
from migrate.core.delivery import Entry
from migrate.core.directory import Row
from migrate.core.events import SwapOutcome, SwapResult
from migrate.core.incarnation import Incarnation
from migrate.errors import CheckpointError, MigrateError, Outcome, RolledBack
from migrate.shell import checkpoint_verbs, checkpoints
from serializers import archive, dirty
from serializers.stream import StreamWriter
from tests.migrate.checkpoint_servers import PICKLING, Arrays, Bank, Gate, Large, Slow, Tick
from tests.migrate.clusters import QUICK, eventually, failure_of, nodes, run, until
from tests.migrate.servers import Counter, Unpicklable

pytestmark = pytest.mark.usefixtures("cluster_secret")


@pytest.fixture
def place(tmp_path: pathlib.Path) -> str:
    """Where a test's checkpoint goes."""
    folder = tmp_path / "backups"
    folder.mkdir()
    return f"file://{folder}/x.ckpt"


def at(node: migrate.Node, **more: Any) -> migrate.SpawnOptions:
    return migrate.SpawnOptions(on=node.name, **more)


def contents(place: str) -> bytes:
    return pathlib.Path(place.removeprefix("file://")).read_bytes()


def files(place: str) -> list[str]:
    return sorted(os.listdir(os.path.dirname(place.removeprefix("file://"))))


# -- taking


def test_of_a_copy_that_was_deposed_at_its_quiescent_point_none_is_taken(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            driver = a._driver
            quiesced = driver.quiesced

            def and_deposed(inc: Incarnation, entry: Entry) -> None:
                quiesced(inc, entry)
                driver.core.standbys.depose(inc, "another node has it", driver.now_ms())

            monkeypatch.setattr(driver, "quiesced", and_deposed)
            with pytest.raises(MigrateError, match="is not here any more"):
                await a._checkpoints.take_planned(ref._server_id, place, 1)
            assert files(place) == []

    run(body())


def test_a_checkpoint_is_taken_at_the_owner_whoever_asks_and_the_server_serves_on(
    place: str, tmp_path: pathlib.Path
) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, 5, options=at(b, name="hits"))
            await ref.incr()
            info = await a.checkpoint(ref, place)
            assert info == migrate.CheckpointInfo(
                url=place,
                server=ref._server_id,
                cls="tests.migrate.servers:Counter",
                version=1,
                epoch=1,
                bytes=len(contents(place)),
                digest=info.digest,
            )
            assert info.digest.startswith("sha256:")
            assert await ref.incr() == 7
            header, facts, _, _ = checkpoints.inspect(place)
            assert (facts.name, facts.node, facts.generation) == ("hits", "b", 0)
            assert f"sha256:{header.digest}" == info.digest
            assert facts.attributes["n"] > 0
            # A path, and a client that blocks, do as well.
            other = tmp_path / "other.ckpt"
            assert (await a.checkpoint(ref, other)).url == f"file://{other}"
            async with migrate.connect(a.address) as client:
                assert (await client.checkpoint(ref, place)).epoch == 1

    run(body())


def test_a_blocking_client_has_the_verbs_too(place: str) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):

            def use() -> tuple[int, int, int]:
                with migrate.connect_sync(a.address) as client:
                    ref = client.spawn(Counter, 1)
                    assert client.checkpoint(ref, place).version == 1
                    twin = client.fork(ref)
                    client.stop(ref)
                    back = client.restore(place)
                    return (
                        client.call(twin, Counter.incr, 1),
                        client.call(back, Counter.incr, 10),
                        len(client.servers()),
                    )

            assert await asyncio.to_thread(use) == (2, 11, 2)

    run(body())


def test_it_waits_for_the_running_handler_and_what_comes_meanwhile_is_taken_in(
    place: str,
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            gate = Slow.gates["wait"] = asyncio.Event()
            ref = await a.spawn(Slow, "wait")
            running = asyncio.ensure_future(ref.wait())
            await asyncio.sleep(0)
            taking = asyncio.ensure_future(a.checkpoint(ref, place))
            await until(lambda: a._driver.core.hosted[ref._server_id].mailbox)
            await ref.incr.cast()  # acknowledged while it waits
            assert not taking.done()
            gate.set()
            await taking
            assert await running == 1
            assert await ref.incr() == 3
            _, facts, _, _ = checkpoints.inspect(place)
            assert facts.casts == 1
            await a.stop(ref)
            back = await a.restore(place)
            assert (await failure_of(back.incr(), RolledBack)).then == facts.taken_s
            # The call that had run, the cast that had been acknowledged, and this one.
            assert await back.incr() == 3

    run(body())


def test_a_task_that_a_handler_started_is_waited_for(place: str) -> None:
    async def body() -> None:
        options = QUICK.replace(quiesce_timeout_s=0.2)
        async with nodes("a", options=options) as (a,):
            gate = Slow.gates["task"] = asyncio.Event()
            ref = await a.spawn(Slow, "task")
            await ref.background()
            error = await failure_of(a.checkpoint(ref, place), CheckpointError)
            assert (error.flaw, error.outcome) == ("busy", Outcome.NOT_DONE)
            assert files(place) == []
            assert await ref.incr() == 1  # what waited behind it goes on
            gate.set()
            assert (await a.checkpoint(ref, place)).epoch == 1

    run(body())


def test_while_a_large_state_is_pickled_the_loop_and_other_servers_go_on(place: str) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            gate = PICKLING["large"] = Gate()
            try:
                ref = await a.spawn(Slow, "large")
                other = await a.spawn(Counter)
                taking = asyncio.ensure_future(a.checkpoint(ref, place))
                await until(gate.begun.is_set)
                assert await other.incr() == 1
                late = asyncio.ensure_future(ref.incr())
                await ref.incr.cast()
                assert await other.incr() == 2 and not late.done()
            finally:
                gate.go_on.set()
                del PICKLING["large"]
            await taking
            assert await late == 1
            # Neither was handled before the state was taken.
            twin = await a.restore(place, fork=True)
            assert await twin.incr() == 1

    run(body())


def test_writing_is_done_when_the_server_serves_again(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            gate = Gate()
            real = checkpoints.save

            def slow(*args: Any) -> Any:
                gate.begun.set()
                gate.go_on.wait()
                return real(*args)

            monkeypatch.setattr(checkpoints, "save", slow)
            taking = asyncio.ensure_future(a.checkpoint(ref, place))
            await until(gate.begun.is_set)
            assert await ref.incr() == 1
            gate.go_on.set()
            await taking
            monkeypatch.undo()
            assert await (await a.restore(place, fork=True)).get() == 0

    run(body())


def test_arrays_that_change_after_it_are_in_it_as_they_were(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Arrays, 100_000)
            before = await ref.sums()
            gate = Gate()
            real = checkpoints.seal

            def slow(*args: Any) -> Any:
                gate.begun.set()
                gate.go_on.wait()
                return real(*args)

            monkeypatch.setattr(checkpoints, "seal", slow)
            taking = asyncio.ensure_future(a.checkpoint(ref, place))
            await until(gate.begun.is_set)
            await ref.incr()
            gate.go_on.set()
            await taking
            monkeypatch.undo()
            twin = await a.restore(place, fork=True)
            assert await twin.sums() == before
            assert await twin.incr() == 1  # its arrays can be written to
            assert (await ref.sums())[0] == 1

    run(body())


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Large states are written in many steps; set `hook` to have it called before each."""
    seen: dict[str, Any] = {"hook": None, "steps": 0, "seconds": []}
    step = StreamWriter.step

    def stepped(self: StreamWriter, seconds: float, size_bytes: int) -> Any:
        seen["steps"] += 1
        seen["seconds"].append(seconds)
        if seen["hook"] is not None:
            seen["hook"](seen["steps"])
        return step(self, 0.0, 1)

    monkeypatch.setattr(StreamWriter, "step", stepped)
    yield seen
    assert not dirty._pages.regions


@pytest.mark.parametrize("verb", ["checkpoint", "fork", "fork elsewhere"])
def test_a_large_state_is_written_ahead_while_its_server_serves(
    place: str, verb: str, at_step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    capture_rest = checkpoints.capture_rest

    def captured(writer: Any, *args: Any) -> Any:
        counts.append(writer._obj.n)
        made = capture_rest(writer, *args)
        counts.append(writer._obj.n)
        return made

    monkeypatch.setattr(checkpoints, "capture_rest", captured)

    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Large, options=at(a))
            ended = False

            async def write() -> None:
                while not ended:
                    await ref.write()

            async with asyncio.TaskGroup() as group:
                group.create_task(write())
                if verb == "checkpoint":
                    await b.checkpoint(ref, place)
                    twin = await b.restore(place, fork=True)
                    header, facts, _, _ = checkpoints.inspect(place)
                    assert {part.name[:5] for part in header.parts} == {"recor", "chunk"}
                    assert (
                        facts.attributes["data"] > 1_500_000 and facts.attributes["rows"] > 50_000
                    )
                else:
                    twin = await b.fork(ref, on="a" if verb == "fork" else "b")
                ended = True
            assert at_step["steps"] > 10
            # Calls were handled between the steps, and none while the last piece was written.
            assert counts[0] > 3 and counts[0] == counts[1]
            assert await twin.is_whole() and await ref.is_whole()
            assert await twin.write() == counts[0] + 1

    run(body())


def test_a_large_state_with_something_that_cannot_travel_is_named_and_served_on(
    place: str, at_step: dict[str, Any]
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Large)
            host: Any = a._driver.core.hosted[ref._server_id].host

            def spoil(step: int) -> None:
                host.obj.other = sys._getframe()  # It was fine when it was looked at.

            at_step["hook"] = spoil
            error = await failure_of(a.checkpoint(ref, place), migrate.NotPicklable)
            assert error.path == "Large.other"
            assert files(place) == []
            assert await ref.write() == 1
            host.obj.other = None
            at_step["hook"] = None
            await a.checkpoint(ref, place)
            assert await (await a.restore(place, fork=True)).is_whole()

    run(body())


def test_a_server_whose_handlers_take_long_is_written_in_larger_steps(
    place: str, at_step: dict[str, Any]
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Large)
            calls: list[asyncio.Future[None]] = []

            def call(step: int) -> None:
                if step == 2:
                    calls.append(asyncio.ensure_future(ref.linger()))

            at_step["hook"] = call
            await a.checkpoint(ref, place)
            await calls[0]
            seconds = at_step["seconds"]
            assert min(seconds) == checkpoint_verbs.STEP_S
            assert max(seconds) == checkpoint_verbs.LONG_STEP_S
            assert await (await a.restore(place, fork=True)).is_whole()

    run(body())


def test_a_server_that_is_stopped_while_its_state_is_written_ahead_is_not_there(
    place: str, at_step: dict[str, Any]
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Large)
            stopping: list[asyncio.Task[None]] = []

            def stop(step: int) -> None:
                if step == 3:
                    stopping.append(asyncio.ensure_future(a.stop(ref)))

            at_step["hook"] = stop
            await failure_of(a.checkpoint(ref, place), migrate.ServerNotFound)
            await stopping[0]
            assert files(place) == []

    run(body())


def test_what_cannot_be_pickled_is_named_and_the_server_serves_on(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Unpicklable, options=at(b))
            for failing in (a.checkpoint(ref, place), a.fork(ref, on="a")):
                error = await failure_of(failing, migrate.NotPicklable)
                assert error.path == "Unpicklable.deep['frames'][1]"
                assert (error.outcome, error.node) == (Outcome.NOT_DONE, "b")
            assert files(place) == []
            assert await ref.incr() == 1
            await ref.mend()
            assert (await a.checkpoint(ref, place)).server == ref._server_id

    run(body())


def test_no_hook_runs_for_a_checkpoint_and_on_arrive_for_what_comes_of_it(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Bank)
            await a.checkpoint(ref, place)
            assert await ref.told() == ["start"]
            twin = await a.fork(ref, on="b")
            assert await twin.told() == ["start", "arrive"]
            assert await twin.is_one()
            await a.restore(place, replace=True)
            await failure_of(ref.told(), RolledBack)
            assert await ref.told() == ["start", "arrive"]
            await a.stop(ref)
            back = await a.restore(place)
            await failure_of(back.told(), RolledBack)
            assert await back.told() == ["start", "arrive"]

    run(body())


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("x.ckpt", "no URL"),
        ("http://host/x", "not 'http'"),
        ("file://relative/x", "three slashes"),
        ("file:///", "names a folder"),
        (3, "a URL such as"),
    ],
)
def test_what_is_no_url_is_refused_by_every_verb(url: Any, text: str) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            for failing in (a.checkpoint(ref, url), a.restore(url)):
                error = await failure_of(failing, migrate.UsageError)
                assert text in error.message

    run(body())


@pytest.mark.parametrize(
    "options",
    [
        {"every": -1},
        {"every": 0.001},
        {"every": float("nan")},
        {"every": True},
        {"every": 1, "keep": 0},
        {"every": 1, "keep": 1.5},
        {"every": 1, "key": b"k" * 32},
        {"key": b"short"},
        {"key": "k" * 32},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], place: str) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            await failure_of(a.checkpoint(ref, place, **options), migrate.UsageError)
            assert files(place) == []

    run(body())


def test_where_it_cannot_be_written_says_why_and_the_server_serves_on(
    tmp_path: pathlib.Path,
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            for path, text in (
                (tmp_path / "missing" / "x", "there is no folder"),
                (tmp_path, "a folder has that name"),
                (pathlib.Path("/proc/self/x"), "cannot be made"),
            ):
                error = await failure_of(a.checkpoint(ref, path), CheckpointError)
                assert text in error.message and str(path) in error.message
                assert (error.flaw, error.outcome) == ("store", Outcome.NOT_DONE)
                assert error.url == f"file://{path}"
            assert await ref.incr() == 1

    run(body())


# -- again and again


def test_it_is_taken_again_and_again_and_so_many_are_kept(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, options=at(a))
            info = await b.checkpoint(ref, place, every=0.1, keep=2)
            assert info.url.startswith(place + ".") and info.url.endswith("-e1")
            await ref.incr()
            await until(lambda: len(files(place)) == 2 and info.url[-30:] not in str(files(place)))
            await a.migrate(ref, to="b")
            # It goes on at the new owner.
            await until(lambda: all(name.endswith("-e2") for name in files(place)))
            await ref.incr()
            seen = files(place)
            await until(lambda: not set(files(place)) & set(seen))
            await b.checkpoint(ref, place, every=0)
            await a.stop(ref)
            assert len(files(place)) <= 3
            # The latest, by the name that was given.
            back = await a.restore(place)
            await failure_of(back.get(), RolledBack)
            assert await back.get() == 2

    run(body())


def test_it_goes_on_after_the_server_came_back_but_not_for_a_clone(place: str) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            await a.checkpoint(ref, place, every=30, keep=1)
            (plan,) = a._driver.core.hosted[ref._server_id].plans.values()
            twin = await a.fork(ref)
            assert a._driver.core.hosted[twin._server_id].plans == {}
            await a.checkpoint(ref, place, every=20, keep=1)
            other = place.replace("x.ckpt", "once.ckpt")
            await a.checkpoint(ref, other)
            await a.stop(ref)
            await a.restore(other)
            (again,) = a._driver.core.hosted[ref._server_id].plans.values()
            assert (again.url, again.every_ms, again.keep) == (plan.url, 20_000, 1)

    run(body())


def test_a_failure_of_one_is_logged_and_the_next_is_taken(
    place: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            await a.checkpoint(ref, place, every=0.1, keep=1)
            folder = tmp_path / "backups"
            folder.rename(tmp_path / "gone")
            await until(lambda: "there is no folder" in caplog.text)
            folder.mkdir()
            await until(lambda: len(files(place)) == 1)
            assert await ref.incr() == 1

    run(body())


# -- restoring


def test_lost_and_restored_it_tells_each_caller_once(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            async with migrate.connect(a.address) as client:
                ref = await client.spawn(Counter, 10, options=at(b, name="hits"))
                assert await ref.incr() == 11
                mine = await a.whereis("hits")
                assert await mine.incr() == 12
                before = time.time()
                info = await client.checkpoint(ref, place)
                assert await ref.incr() == 13
                await b.close()
                with pytest.raises(migrate.ServerNotFound):
                    await client.info(ref)
                back = await client.restore(place, on="a")
                assert back == ref
                for caller in (ref, mine):
                    error = await failure_of(caller.incr(), RolledBack)
                    assert before <= error.then <= error.now <= time.time()
                    assert error.server == ref._server_id
                assert sorted([await ref.incr(), await mine.incr()]) == [13, 14]
                told = await client.info(ref)
                assert (told.name, told.node) == ("hits", "a") and told.epoch > info.epoch
                # Who never called it is told nothing.
                async with migrate.connect(a.address) as other:
                    assert await (await other.whereis("hits")).incr() == 15

    run(body())


def test_next_to_the_living_original_it_is_refused(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, options=at(b, name="hits"))
            await a.checkpoint(ref, place)
            await ref.incr()
            error = await failure_of(a.restore(place), CheckpointError)
            assert (error.flaw, error.node, error.outcome) == ("alive", "b", Outcome.NOT_DONE)
            assert "replace=True" in error.message and "fork=True" in error.message
            assert await ref.incr() == 2
            for options in ({"replace": True, "fork": True}, {"replace": True, "name": "x"}):
                await failure_of(a.restore(place, **options), migrate.UsageError)  # type: ignore[arg-type]

    run(body())


def test_as_a_replacement_it_goes_back_where_it_is_and_can_move(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, _):
            ref = await a.spawn(Counter, options=at(b, name="hits"))
            await a.checkpoint(ref, place)
            assert await ref.incr() == 1
            events: list[migrate.Event] = []

            async def watch() -> None:
                async for event in a.monitor(ref):
                    events.append(event)

            watching = asyncio.create_task(watch())
            await asyncio.sleep(0.05)
            await a.restore(place, replace=True)
            assert (await a.info(ref)).node == "b"
            assert (await failure_of(ref.incr(), RolledBack)).outcome is Outcome.UNKNOWN
            assert await ref.incr() == 1
            await a.restore(place, replace=True, on="c")
            told = await a.info(ref)
            assert (told.node, told.name) == ("c", "hits")
            await failure_of(ref.incr(), RolledBack)
            assert await ref.incr() == 1
            await until(lambda: [e.kind for e in events] == ["restored", "restored", "moved"])
            assert "restored from a checkpoint of 20" in events[0].cause
            watching.cancel()

    run(body())


def test_callers_that_wait_while_it_is_replaced_are_told(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            gate = Slow.gates["replaced"] = asyncio.Event()
            ref = await a.spawn(Slow, "replaced", options=at(b))
            await a.checkpoint(ref, place)
            running = asyncio.ensure_future(ref.wait())
            waiting = [asyncio.ensure_future(ref.incr()) for _ in range(3)]
            core = b._driver.core
            await until(lambda: len(core.hosted[ref._server_id].mailbox) == 3)
            replacing = asyncio.ensure_future(a.restore(place, replace=True))
            await until(lambda: len(core.hosted[ref._server_id].mailbox) == 4)
            gate.set()
            await replacing
            assert await running == 1  # it was over before
            for call in waiting:
                await failure_of(call, RolledBack)
            assert await ref.incr() == 1

    run(body())


def test_a_replacement_that_cannot_be_leaves_the_original_serving(place: str) -> None:
    async def body() -> None:
        options = QUICK.replace(quiesce_timeout_s=0.2)
        async with nodes("a", "b", options=options) as (a, b):
            gate = Slow.gates["stays"] = asyncio.Event()
            ref = await a.spawn(Slow, "stays", options=at(b))
            await a.checkpoint(ref, place)
            running = asyncio.ensure_future(ref.wait())
            await until(lambda: bool(b._driver.core.hosted[ref._server_id].running))
            error = await failure_of(a.restore(place, replace=True), CheckpointError)
            assert error.flaw == "busy"
            gate.set()
            assert await running == 1 and await ref.incr() == 2

    run(body())


def test_stopped_it_can_be_restored_also_where_it_was_stopped(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, options=at(b, name="hits"))
            await ref.incr()
            await a.migrate(ref, to="a")
            await a.checkpoint(ref, place)
            for node in (b, a):
                await ref.incr()
                await a.stop(ref)
                await failure_of(ref.incr(), migrate.ServerNotFound)
                await a.restore(place, on=node.name)
                await failure_of(ref.incr(), RolledBack)
                assert await ref.incr() == 2
            assert (await a.info(ref)).name == "hits"

    run(body())


def test_who_did_not_notice_that_it_was_stopped_is_told_of_the_roll_back_alone(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, c):
            ref = await c.spawn(Counter, options=at(b))
            assert await ref.incr() == 1
            await a.checkpoint(ref, place)
            await a.stop(ref)
            await a.restore(place, on="a")
            # b still remembers the stop; it was told where the server is now.
            await until(lambda: ref._server_id not in b._driver.core.tombstones)
            await failure_of(ref.incr(), RolledBack)
            assert await ref.incr() == 2

    run(body())


def test_under_a_new_identity_it_is_another_server(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, 3, options=at(b, name="hits"))
            await a.checkpoint(ref, place)
            assert await ref.incr() == 4
            twin = await a.restore(place, fork=True)
            named = await a.restore(place, fork=True, name="other", on="b")
            assert len({ref, twin, named}) == 3
            assert await twin.incr() == 4 and await named.incr() == 4 and await ref.incr() == 5
            assert (await a.info(twin)).name is None
            assert await a.whereis("other") == named
            taken = await failure_of(a.restore(place, fork=True, name="other"), migrate.NameTaken)
            assert taken.ref == named
            assert len(await a.servers()) == 3

    run(body())


def test_the_name_that_somebody_else_has_by_now_is_not_taken_away(place: str) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter, options=at(a, name="hits"))
            await a.checkpoint(ref, place)
            await a.stop(ref)
            other = await a.spawn(Counter, options=at(a, name="hits"))
            error = await failure_of(a.restore(place), migrate.NameTaken)
            assert error.ref == other
            await failure_of(a.info(ref), migrate.ServerNotFound)
            back = await a.restore(place, name="old hits")
            assert await a.whereis("old hits") == back == ref

    run(body())


def test_of_two_restores_at_once_one_wins_and_the_other_says_so(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, c):
            ref = await a.spawn(Counter, 7, options=at(b, name="hits"))
            await a.checkpoint(ref, place)
            await a.stop(ref)
            results = await asyncio.gather(
                *(node.restore(place, on=node.name) for node in (a, b, c)), return_exceptions=True
            )
            failures = [r for r in results if isinstance(r, BaseException)]
            assert len(failures) == 2
            for error in failures:
                assert isinstance(error, CheckpointError | migrate.NameTaken), error
                assert error.outcome is Outcome.NOT_DONE
            assert len(await a.servers()) == 1
            assert await (await a.whereis("hits")).incr() == 8

    run(body())


def test_two_replacements_at_once_both_happen_one_after_the_other(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, options=at(b))
            await a.checkpoint(ref, place)
            await ref.incr()
            await asyncio.gather(a.restore(place, replace=True), b.restore(place, replace=True))
            assert (await a.info(ref)).epoch == 3
            await failure_of(ref.incr(), RolledBack)
            assert await ref.incr() == 1

    run(body())


def test_a_swap_for_its_standbys_that_comes_first_does_not_keep_it_from_being_replaced(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Counter, options=at(a))
            await a.checkpoint(ref, place)
            await ref.incr()
            rows = a._driver.rows
            swap = rows.swap
            asked, replacing, configured, replaced = (asyncio.Event() for _ in range(4))
            stood: list[tuple[int, int, tuple[str, ...]]] = []

            async def in_this_order(row: Row, rev: int) -> SwapResult:
                if row.generation:
                    replacing.set()
                    await configured.wait()
                    result = await swap(row, rev)
                    if result.outcome is SwapOutcome.DONE:
                        stood.append((row.epoch, row.generation, row.standbys))
                    return result
                asked.set()
                await replacing.wait()
                result = await swap(row, rev)
                configured.set()
                # Its word comes to the one that has taken the server's place.
                await replaced.wait()
                return result

            monkeypatch.setattr(rows, "swap", in_this_order)
            replicating = asyncio.create_task(a.replicate(ref, ["b"]))
            await asked.wait()
            await a.restore(place, replace=True)
            # NB: the replacement may have been given its own standby meanwhile.
            assert stood[0] == (3, 3, ())
            replaced.set()

            async def stands_by() -> bool:
                return (await a.info(ref)).standbys == ("b",)

            await eventually(stands_by)
            await asyncio.gather(replicating, return_exceptions=True)
            row, _ = await rows.read(ref._server_id)
            assert row is not None and (row.epoch, row.generation) == (4, 3)
            await failure_of(ref.incr(), RolledBack)
            assert await ref.incr() == 1

    run(body())


def test_timers_go_on_with_what_they_had_left(place: str) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Tick)
            await eventually(lambda: at_least(ref, 2))
            await a.checkpoint(ref, place)
            await a.stop(ref)
            back = await a.restore(place)
            await failure_of(back.seen(), RolledBack)
            await eventually(lambda: at_least(back, 4))
            twin = await a.fork(back)
            await eventually(lambda: at_least(twin, 6))

    async def at_least(ref: Any, ticks: int) -> bool:
        return bool(await ref.seen() >= ticks)

    run(body())


# -- who else is concerned


def test_a_server_that_calls_is_told_in_its_handler_and_others_are_not(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            bank = await a.spawn(Bank, options=at(b))
            caller = await a.spawn(Bank, bank, options=at(a))
            quiet = await a.spawn(Bank, bank, options=at(b))
            assert await caller.relay("1") == 1
            await a.checkpoint(bank, place)
            assert await caller.relay("2") == 2
            await a.restore(place, replace=True)
            error = await failure_of(caller.relay("3"), RolledBack)
            assert error.server == bank._server_id
            assert await caller.relay("4") == 2
            await a.migrate(caller, to="b")
            assert await caller.relay("5") == 3
            # It never spoke to the bank, and finds it where its node knows it to be.
            assert await quiet.relay("6") == 4

    run(body())


def test_what_it_told_others_before_is_not_repeated_under_the_old_numbers(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            bank = await a.spawn(Bank, options=at(a))
            caller = await a.spawn(Bank, bank, options=migrate.SpawnOptions(on="b"))
            for what in "12":
                await caller.relay(what)
            await a.checkpoint(caller, place)
            await caller.relay("3")
            await a.restore(place, replace=True)
            await failure_of(caller.relay("lost"), RolledBack)
            # A new session, so the bank takes it for what it is: another request.
            assert await caller.relay("4") == 4
            assert await bank.read() == ["1", "2", "3", "4"]
            assert await caller.read() == ["1", "2", "4"]

    run(body())


def test_requests_that_were_dropped_are_told(place: str, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            gate = Slow.gates["full"] = asyncio.Event()
            other = await a.spawn(Slow, "full", options=at(b))
            teller = await a.spawn(Teller, other, options=at(a))
            # Called without waiting for the reply: it is not acknowledged when the handler ends.
            await teller.begin()
            await a.checkpoint(teller, place)
            gate.set()
            _, facts, _, _ = checkpoints.inspect(place)
            assert facts.dropped == 1
            await a.restore(place, replace=True)
            said = "dropped were 1 requests that it had made and nobody had acknowledged: 'wait' of"
            assert said in caplog.text

    run(body())


class Teller:
    """Calls without waiting for the reply."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def begin(self) -> None:
        call: Any = self.other.wait()
        pending.append(call)


pending: list[Any] = []


# -- with moves, drains and stops


def test_during_a_move_it_is_taken_before_or_at_the_new_place(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Arrays, 300_000, options=at(a))
            for turn in range(6):
                to = (b, a)[turn % 2].name
                verbs: list[Any] = [
                    lambda: a.checkpoint(ref, place),
                    lambda to=to: b.migrate(ref, to=to),
                ]
                if turn % 3 == 0:
                    verbs.reverse()
                results = await asyncio.gather(*(verb() for verb in verbs))
                kinds = {type(result) for result in results}
                assert kinds == {migrate.CheckpointInfo, migrate.MoveReport}
                twin = await a.restore(place, fork=True)
                assert (await twin.sums())[0] == turn
                await a.stop(twin)
                assert await ref.incr() == turn + 1

    run(body())


def test_a_move_asked_for_during_a_checkpoint_waits_for_it(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            gate = PICKLING["moving"] = Gate()
            try:
                ref = await a.spawn(Slow, "moving")
                taking = asyncio.ensure_future(a.checkpoint(ref, place))
                await until(gate.begun.is_set)
                moving = asyncio.ensure_future(a.migrate(ref, to="b"))
                stopping_core = a._driver.core
                await until(lambda: ref._server_id in stopping_core.leaving)
                late = asyncio.ensure_future(ref.incr())
                await asyncio.sleep(0.05)
                assert not moving.done() and not late.done()
            finally:
                gate.go_on.set()
                del PICKLING["moving"]
            assert (await taking).epoch == 1
            assert (await moving).target == "b"
            assert await late == 1

    run(body())


def test_a_stop_asked_for_during_a_checkpoint_waits_for_it(place: str) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            gate = PICKLING["stopping"] = Gate()
            try:
                ref = await a.spawn(Slow, "stopping")
                taking = asyncio.ensure_future(a.checkpoint(ref, place))
                await until(gate.begun.is_set)
                stopping = asyncio.ensure_future(a.stop(ref))
                await asyncio.sleep(0.02)
                assert not stopping.done()
            finally:
                gate.go_on.set()
                del PICKLING["stopping"]
            await taking
            await stopping
            back = await a.restore(place)
            assert await back.incr() == 1

    run(body())


def test_a_node_that_drains_takes_in_nothing_also_from_a_checkpoint(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Counter, options=at(a))
            await a.checkpoint(ref, place)
            await a.stop(ref)
            await a.drain("b")
            for options in ({}, {"fork": True}):
                error = await failure_of(
                    a.restore(place, on="b", **options),
                    migrate.TargetRefused,  # type: ignore[arg-type]
                )
                assert "draining" in str(error)
            assert await (await a.restore(place, on="a")).incr() == 1

    run(body())


def test_a_drain_that_begins_while_it_is_loaded_is_noticed(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, options=at(a))
            await a.checkpoint(ref, place)
            await a.stop(ref)
            gate = Gate()
            real = checkpoints.build

            def slow(*args: Any) -> Any:
                gate.begun.set()
                gate.go_on.wait()
                return real(*args)

            monkeypatch.setattr(checkpoints, "build", slow)
            restoring = asyncio.ensure_future(a.restore(place, on="b"))
            await until(gate.begun.is_set)
            await a.drain("b")
            gate.go_on.set()
            await failure_of(restoring, migrate.TargetRefused)
            assert b._driver.core.hosted == {}

    run(body())


# -- forks


def test_a_fork_has_the_state_and_neither_name_nor_mailbox(place: str) -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            gate = Slow.gates["fork"] = asyncio.Event()
            ref = await a.spawn(Slow, "fork", options=at(b, name="slow"))
            running = asyncio.ensure_future(ref.wait())
            await until(lambda: bool(b._driver.core.hosted[ref._server_id].running))
            await ref.incr.cast()
            forking = asyncio.ensure_future(a.fork(ref, on="a"))
            await until(lambda: len(b._driver.core.hosted[ref._server_id].mailbox) == 2)
            gate.set()
            twin = await forking
            assert await running == 1
            told = await a.info(twin)
            assert (told.name, told.node, told.epoch) == (None, "a", 1)
            assert await twin.incr() == 2  # the cast was the original's
            assert await ref.incr() == 3
            same = await a.fork(ref)
            assert (await a.info(same)).node == "b"

    run(body())


# -- what is wrong with a checkpoint


def test_each_flaw_is_an_error_of_its_own_and_nothing_is_restored(
    place: str, tmp_path: pathlib.Path
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter, options=at(a, name="hits"))
            await a.checkpoint(ref, place)
            whole = contents(place)
            with_key = place + ".key"
            await a.checkpoint(ref, with_key, key=b"k" * 16)
            await a.stop(ref)
            bad = tmp_path / "bad.ckpt"
            changed = bytearray(whole)
            changed[-10] ^= 1
            for data, flaw in (
                (None, "missing"),
                (bytes(changed), "damaged"),
                (whole[:-1], "truncated"),
                (b"PK\x03\x04", "foreign"),
                (whole.replace(b"checkpoint 1 ", b"checkpoint 9 ", 1), "newer"),
                (contents(with_key), "wrong key"),
            ):
                if data is not None:
                    bad.write_bytes(data)
                for fork in (False, True):
                    error = await failure_of(a.restore(bad, fork=fork), CheckpointError)
                    assert (error.flaw, error.outcome) == (flaw, Outcome.NOT_DONE), flaw
                    assert error.url == f"file://{bad}" and str(bad) in error.message
            assert await a.servers() == []
            back = await a.restore(with_key, key=b"k" * 16)
            assert await back.get() == 0

    run(body())


def rewritten(place: str, to: pathlib.Path, secret: pathlib.Path, **facts: Any) -> None:
    """The same checkpoint with other facts, signed as it should be."""
    key = checkpoints.signing_key(secret.read_bytes(), None)
    data = contents(place)
    header, parts = archive.open_archive(data, key)
    to.write_bytes(b"".join(archive.seal(parts, {**header.facts, **facts}, key)))


def test_a_class_that_is_gone_or_older_is_told_before_anything_is_unpickled(
    place: str, tmp_path: pathlib.Path, cluster_secret: pathlib.Path
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            await a.checkpoint(ref, place)
            await a.stop(ref)
            other = tmp_path / "other.ckpt"
            for facts, flaw, text in (
                ({"cls": "tests.gone:Counter"}, "no class", "No module named 'tests.gone'"),
                ({"cls": "tests.migrate.servers:Gone"}, "no class", "no class 'Gone'"),
                ({"cls": "nonsense"}, "no class", "names no class"),
                ({"version": 2}, "older class", "version 1 here, older than"),
                ({"epoch": "x"}, "damaged", "lacks what one of a server has"),
            ):
                rewritten(place, other, cluster_secret, **facts)
                error = await failure_of(a.restore(other), CheckpointError)
                assert error.flaw == flaw and text in error.message
                assert error.outcome is Outcome.NOT_DONE
            assert await a.servers() == []

    run(body())


V1 = """
import migrate
@migrate.server(version=1)
class Room:
    def __init__(self): self.names = ["a"]; self.me = self; self.greet = self.hello
    def hello(self): return self.names
    @migrate.every(seconds=50)
    def old_tick(self): pass
"""
V2 = """
import migrate
@migrate.server(version=2)
class Room:
    def hello(self): return self.names
    def upgrade(self, state, from_version):
        assert from_version == 1
        return {**state, "names": [n.upper() for n in state["names"]], "since": from_version}
    def told(self): return self.since, self.me is self, self.greet.__self__ is self
    @migrate.every(seconds=60)
    def new_tick(self): pass
"""
V3 = V2.replace("version=2", "version=3").replace("return {**state", "raise KeyError('no') or {**s")


@pytest.mark.parametrize("large", [False, True])
def test_an_older_state_is_upgraded_and_what_refers_to_the_server_still_does(
    place: str, large: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib
    import sys

    from migrate.shell import classes

    module = tmp_path / "rooms_of_a_test.py"
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(text: str) -> Any:
        module.write_text(text)
        sys.modules.pop("rooms_of_a_test", None)
        importlib.invalidate_caches()
        classes._specs.pop("rooms_of_a_test:Room", None)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return importlib.import_module("rooms_of_a_test").Room

    async def body() -> None:
        async with nodes("a") as (a,):
            rows = "self.rows = {n: [n] for n in range(3000)}; self.names"
            ref = await a.spawn(load(V1.replace("self.names", rows, 1) if large else V1))
            await a.checkpoint(ref, place)
            assert contents(place).startswith(b"livemigrate checkpoint %d " % (2 if large else 1))
            await a.stop(ref)
            load(V3.replace("from_version == 1", "False"))
            error = await failure_of(a.restore(place), CheckpointError)
            assert error.flaw == "not loadable" and "AssertionError" in error.message
            load(V2)
            back = await a.restore(place)
            assert await back.hello() == ["A"]
            assert await back.told() == (1, True, True)
            rows = getattr(a._driver.core.hosted[back._server_id].host.obj, "rows", None)  # type: ignore[attr-defined]
            assert rows == ({n: [n] for n in range(3000)} if large else None)
            assert (await a.info(back)).version == 2
            inc = a._driver.core.hosted[back._server_id]
            assert [(t.method, t.period_ms) for t in inc.timers.values()] == [("new_tick", 60_000)]
            # And back: the checkpoint of the newer one is not for the older class.
            await a.checkpoint(back, place)
            await a.stop(back)
            load(V1)
            assert (await failure_of(a.restore(place), CheckpointError)).flaw == "older class"

    try:
        run(body())
    finally:
        sys.modules.pop("rooms_of_a_test", None)
        classes._specs.pop("rooms_of_a_test:Room", None)


def test_a_class_that_cannot_be_imported_is_in_the_checkpoint(place: str) -> None:
    class Local:
        def __init__(self) -> None:
            self.n = 4

        def get(self) -> int:
            return self.n

    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Local)
            await a.checkpoint(ref, place)
            _, facts, _, _ = checkpoints.inspect(place)
            assert facts.by_value
            await a.stop(ref)
            back = await a.restore(place, on="b")
            assert await back.get() == 4
            twin = await a.fork(back, on="a")
            assert await twin.get() == 4

    run(body())


def test_a_server_of_another_cluster_keeps_its_id_and_its_generations(
    place: str, cluster_secret: pathlib.Path
) -> None:
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter, options=at(a, name="hits"))
            await a.checkpoint(ref, place)
            for _ in range(3):
                await a.restore(place, replace=True)
            await a.checkpoint(ref, place)
        async with nodes("b") as (b,):
            back = await b.restore(place)
            told = await b.info(back)
            assert back == ref and told.name == "hits" and told.epoch > 4
            assert await back.incr() == 1

    run(body())


def test_a_checkpoint_in_memory_is_of_its_process() -> None:
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter, 2, options=at(a))
            await a.checkpoint(ref, "memory://these-tests/hits")
            twin = await b.restore("memory://these-tests/hits", fork=True, on="b")
            assert await twin.incr() == 3
            missing = await failure_of(b.restore("memory://these-tests/no"), CheckpointError)
            assert missing.flaw == "missing"

    run(body())


def test_a_busy_server_without_a_directory_is_not_replaced_and_serves(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            await a.checkpoint(ref, place)
            await ref.incr()
            rows = a._driver.rows
            real = rows.swap
            answers = [SwapResult(SwapOutcome.NOT_DONE, None, 0, "away")]

            async def swap(row: Any, rev: int) -> SwapResult:
                answer = answers.pop(0)
                if answer.outcome is SwapOutcome.UNKNOWN:
                    # It took effect, and nobody heard of it.
                    await real(row, rev)
                return answer if answer.outcome is not SwapOutcome.DONE else await real(row, rev)

            monkeypatch.setattr(rows, "swap", swap)
            error = await failure_of(a.restore(place, replace=True))
            assert error.outcome is Outcome.NOT_DONE
            assert await ref.incr() == 2
            answers += [
                SwapResult(SwapOutcome.UNKNOWN, None, 0, "?"),
                SwapResult(SwapOutcome.NOT_DONE, None, 0, "away"),
                SwapResult(SwapOutcome.DONE, None, 0),
            ]
            await a.restore(place, replace=True)
            await failure_of(ref.incr(), RolledBack)
            assert await ref.incr() == 1
            assert (await a.info(ref)).epoch == 2

    run(body())
