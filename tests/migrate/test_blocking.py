"""Blocking handlers: in threads, and in worker processes that may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

import migrate
from migrate.shell import host, workers
from tests.migrate.blocking_servers import Slotted, Sums, Table, Ticks
from tests.migrate.clusters import QUICK, eventually, failure_of, nodes, run, until
from tests.migrate.servers import Counter

pytestmark = pytest.mark.usefixtures("cluster_secret")

ROOT = pathlib.Path(__file__).parents[2]
HERE_AND_THERE = pytest.mark.parametrize("there", ["a", "b"])


def on(node: str) -> migrate.SpawnOptions:
    return migrate.SpawnOptions(on=node)


def pids_of(node: migrate.Node) -> list[int]:
    return node._driver.host.workers.pids()


class Waits:
    """A `Sums.waits` that runs until it is released."""

    def __init__(self, folder: pathlib.Path, name: str = "one") -> None:
        self.pid_file = folder / f"{name}.pid"
        self.fifo = folder / f"{name}.fifo"
        os.mkfifo(self.fifo)

    @property
    def args(self) -> tuple[str, str]:
        return str(self.pid_file), str(self.fifo)

    async def pid(self) -> int:
        await until(self.pid_file.exists)
        return int(self.pid_file.read_text())

    async def release(self, text: str) -> None:
        await asyncio.to_thread(self.fifo.write_text, text)


@pytest.fixture
def waits(tmp_path: pathlib.Path) -> Waits:
    return Waits(tmp_path)


# ------------------------------------------------------------------ what a method is there


@HERE_AND_THERE
def test_a_method_runs_in_a_worker_process_and_the_state_stays(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Sums, 3, options=on(there))
            pid, total = await ref.add(1, 2, start=4)
            assert (await ref.add())[0] == pid, "an idle worker is used again"
            assert total == 17
            assert pids_of(a if there == "a" else b) == [pid] != [os.getpid()]
            assert await ref.state() == (3, "of the object")
            assert await ref.echo({"deep": [1, b"2", {3}]}) == {"deep": [1, b"2", {3}]}
            assert await ref.echo(None) is None
            assert await ref.echo(ref) == ref
            assert await ref.interrupt_is_taken() == 1

    run(body())


def test_a_class_that_cannot_be_imported_travels_to_the_worker():
    class Local:
        def __init__(self) -> None:
            self.n = 1

        @migrate.blocking(process=True)
        def twice(self, n: int) -> tuple[int, int]:
            return os.getpid(), 2 * n

    assert Local().twice(4) == (os.getpid(), 8)

    async def body() -> None:
        async with nodes("a") as (a,):
            pid, twice = await (await a.spawn(Local)).twice(4)
            assert pid == pids_of(a)[0] and twice == 8

    run(body())


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("reads", "n"),
        ("reads_shadowed", "shade"),
        ("reads_all", "__dict__"),
        ("writes", "n"),
        ("deletes", "n"),
    ],
)
def test_state_is_refused_by_name_in_a_worker(method: str, name: str):
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Sums, 3)
            error = await failure_of(getattr(ref, method)(), migrate.UsageError)
            assert f"Sums.{name} is state of the server" in str(error)
            assert "as arguments" in str(error)
            assert await ref.state() == (3, "of the object")

    run(body())


def test_self_cannot_leave_a_worker():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Sums, 3)
            error = await failure_of(ref.returns_self(), migrate.UsageError)
            assert error.outcome is migrate.Outcome.DONE and "cannot travel" in str(error)

    run(body())


def test_slots_are_refused_and_a_builtin_base_has_no_stand_in():
    async def body() -> None:
        async with nodes("a") as (a,):
            slotted = await a.spawn(Slotted)
            assert await slotted.twice(4) == 8
            assert "Slotted.n is state" in str(
                await failure_of(slotted.reads(), migrate.UsageError)
            )
            error = await failure_of((await a.spawn(Table)).size(), migrate.UsageError)
            assert "Table cannot have a method" in str(error)

    run(body())


@HERE_AND_THERE
def test_what_a_worker_raises_arrives_as_itself(there: str):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Sums, options=on(there))
            error = await failure_of(ref.raises(KeyError("why")), KeyError)
            assert error.args == ("why",) and "raise error" in error.remote_traceback
            assert (await failure_of(ref.raises(SystemExit(3)), SystemExit)).code == 3
            error = await failure_of(ref.returns_thread(), migrate.UsageError)
            assert error.outcome is migrate.Outcome.DONE

    run(body())


def test_a_result_over_the_limit_is_refused():
    async def body() -> None:
        options = QUICK.replace(message_bytes_max=5000)
        async with nodes("a", options=options) as (a,):
            ref = await a.spawn(Sums)
            # A call on the same node is not bounded, and its result would be.
            error = await failure_of(ref.echo(b"x" * 6000), migrate.UsageError)
            assert error.outcome is migrate.Outcome.DONE and "message_bytes_max" in str(error)

    run(body())


def test_current_is_known_in_a_worker_and_calls_are_refused():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Sums)
            node, caller, request_id = await ref.describes()
            assert node == "a" and caller is not None and request_id is not None
            error = await failure_of(ref.calls(ref), migrate.UsageError)
            assert "can call no server" in str(error)

    run(body())


# ------------------------------------------------------------------ one after the other


@HERE_AND_THERE
def test_the_loop_goes_on_and_a_move_waits_for_a_worker(there: str, waits: Waits):
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Sums, 3, options=on(there))
            other = await a.spawn(Counter, options=on(there))
            call = asyncio.ensure_future(ref.waits(*waits.args))
            await waits.pid()
            moving = asyncio.create_task(a.migrate(ref, to="b" if there == "a" else "a"))
            second = asyncio.ensure_future(ref.state())
            assert [await other.incr() for _ in range(10)] == list(range(1, 11))
            assert not moving.done() and not second.done() and not call.done()
            await waits.release("now")
            assert await call == "now"
            await moving
            assert await second == (3, "of the object")
            assert (await ref.add(1))[0] in pids_of(b if there == "a" else a)

    run(body())


def test_jobs_beyond_the_bound_wait_in_line(tmp_path: pathlib.Path):
    async def body() -> None:
        async with nodes("a", options=QUICK.replace(blocking_processes_max=1)) as (a,):
            first, second = Waits(tmp_path, "1"), Waits(tmp_path, "2")
            calls = [
                asyncio.ensure_future((await a.spawn(Sums)).waits(*w.args)) for w in (first, second)
            ]
            pid = await first.pid()
            assert pids_of(a) == [pid] and not second.pid_file.exists()
            await first.release("1")
            assert await second.pid() == pid
            await second.release("2")
            assert await asyncio.gather(*calls) == ["1", "2"]

    run(body())


def test_a_caller_that_gives_up_ends_its_own_waiting_only(waits: Waits):
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Sums, 3)
            error = await failure_of(
                ref.waits.with_options(timeout=0.05)(*waits.args), migrate.CallTimeout
            )
            assert error.outcome is migrate.Outcome.UNKNOWN
            pid = await waits.pid()
            state = asyncio.ensure_future(ref.state())
            await asyncio.sleep(0)
            assert not state.done() and psutil.pid_exists(pid)
            await waits.release("x")
            assert await state == (3, "of the object")
            assert (await ref.add())[0] == pid

    run(body())


# ------------------------------------------------------------------ killed


@HERE_AND_THERE
def test_a_worker_that_is_killed_ends_the_call_with_the_outcome_unknown(there: str, waits: Waits):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Sums, 3, options=on(there))
            call = asyncio.ensure_future(ref.waits(*waits.args))
            pid = await waits.pid()
            os.kill(pid, signal.SIGKILL)
            error = await failure_of(call, migrate.WorkerLost)
            assert error.outcome is migrate.Outcome.UNKNOWN
            assert f"worker process {pid}" in str(error) and "SIGKILL" in str(error)
            assert await ref.state() == (3, "of the object")
            assert (await ref.add(1))[1] == 11
            error = await failure_of(ref.exits(7), migrate.WorkerLost)
            assert "exit status 7" in str(error)

    run(body())


def test_a_worker_that_is_killed_while_idle_is_replaced():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Sums)
            pid, _ = await ref.add()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
            assert (await ref.add())[0] != pid
            assert len(pids_of(a)) == 1

    run(body())


def test_a_worker_that_cannot_start_leaves_nothing_done(monkeypatch: pytest.MonkeyPatch):
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Sums, 3)
            monkeypatch.setattr(workers.sys, "executable", "/bin/false")
            error = await failure_of(ref.add(1), migrate.CallError)
            assert error.outcome is migrate.Outcome.NOT_DONE and "exit status 1" in str(error)
            monkeypatch.setattr(workers.sys, "executable", "/nowhere/python")
            error = await failure_of(ref.add(1), migrate.CallError)
            assert error.outcome is migrate.Outcome.NOT_DONE
            monkeypatch.undo()
            assert (await ref.add(1))[1] == 11

    run(body())


def test_a_node_that_closes_leaves_no_worker(waits: Waits):
    async def body() -> list[int]:
        async with nodes("a", options=QUICK.replace(quiesce_timeout_s=0.2)) as (a,):
            busy, idle = await a.spawn(Sums), await a.spawn(Sums)
            call = asyncio.ensure_future(busy.waits(*waits.args))
            pids = [await waits.pid(), (await idle.add())[0]]
            assert sorted(pids) == pids_of(a)
            stuck = asyncio.create_task(failure_of(call))
            await asyncio.sleep(0)
        await stuck
        return pids

    gone(run(body()))


def gone(pids: list[int]) -> None:
    """Wait until none of the processes is left."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


@contextlib.contextmanager
def node_process(folder: pathlib.Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A node in a process of its own, and its address."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "migrate", "node", "--announce", "--name", "other"),
            *("--directory", f"sqlite:///{folder / 'directory.db'}"),
        ],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["address"]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_node_that_is_ended_leaves_no_worker(
    tmp_path: pathlib.Path, waits: Waits, number: signal.Signals
):
    with node_process(tmp_path) as (process, address):

        async def body() -> list[int]:
            async with migrate.connect(address) as client:
                busy, idle = await client.spawn(Sums), await client.spawn(Sums)
                call = asyncio.ensure_future(busy.waits(*waits.args))
                pids = [await waits.pid(), (await idle.add())[0]]
                assert all(map(psutil.pid_exists, pids))
                process.send_signal(number)
                if number == signal.SIGTERM:
                    # An orderly end waits for it, as for every handler.
                    await waits.release("now")
                call.cancel()
                return pids

        pids = run(body())
        if number == signal.SIGTERM:
            assert process.wait(60) == 0
        gone(pids)


# ------------------------------------------------------------------ threads, and the loop held


def test_a_timer_of_a_private_name_that_blocks_runs_in_a_thread():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Ticks)

            async def ticked() -> bool:
                return bool(await ref.names())

            await eventually(ticked)
            assert all("migrate-blocking" in name for name in await ref.names())

    run(body())


def test_a_handler_that_holds_the_loop_is_named_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    clock = [1000.0]
    monkeypatch.setattr(host, "monotonic", lambda: clock[0])

    class Holds:
        def hold(self, seconds: float) -> None:
            clock[0] += seconds

        def also(self) -> None:
            clock[0] += 0.2

    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Holds)
            with caplog.at_level(logging.WARNING, "migrate"):
                await ref.hold(0.09)
                assert not caplog.messages
                for _ in range(3):
                    await ref.hold(0.15)
                assert len(caplog.messages) == 1
                assert "Holds.hold held the loop of node a for 150 ms;" in caplog.messages[0]
                await ref.also()
                assert "Holds.also" in caplog.messages[1]
                clock[0] += host.WARN_AGAIN_S
                await ref.hold(0.15)
                assert "for 150 ms, and 2 times more since" in caplog.messages[2]

    run(body())
