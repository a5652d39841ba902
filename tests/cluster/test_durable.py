"""Durable servers: every process of a cluster is killed, again and again."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import inspect
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

import migrate
from migrate.errors import Outcome
from tests.cluster.durable_servers import Ledger, Teller

pytestmark = pytest.mark.cluster

ROOT = pathlib.Path(__file__).parents[2]
OPTIONS = migrate.NodeOptions(call_timeout_s=60.0)
CALLERS = 8


@contextlib.asynccontextmanager
async def cluster(
    folder: pathlib.Path,
    nodes: int = 2,
    *,
    url: str | None = None,
    options: migrate.NodeOptions = OPTIONS,
) -> AsyncIterator[migrate.LocalCluster]:
    """One whose servers are kept in a folder, or a store, and are not stopped in the end."""
    made = migrate.LocalCluster(
        nodes,
        data=url or folder,
        directory=f"sqlite:///{folder / 'cluster.db'}" if url else None,
        options=options,
        env={"LIVEMIGRATE_SECRET_FILE": str(folder / "secret")},
    )
    async with made:
        yield made


async def killed(made: migrate.LocalCluster) -> None:
    """Kill every process, all at once."""
    for node in made.nodes:
        node.kill()
    await asyncio.gather(*(node.wait() for node in made.nodes))


async def until(look: Callable[[], Any], good: Callable[[Any], bool]) -> None:
    """Look again and again, until what is seen is good."""
    async with asyncio.timeout(30):
        while True:
            seen = look()
            if good(await seen if inspect.isawaitable(seen) else seen):
                return
            await asyncio.sleep(0.01)


def journals(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("n*/*.journal"))


def test_a_durable_server_comes_back_with_its_mailbox_and_timers(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as made:
            ref = await made.client.spawn(Ledger, options=migrate.SpawnOptions(name="book"))
            assert (await made.client.info(ref)).durable
            for line in range(20):
                assert await ref.add(line) == line + 1
            await asyncio.gather(*(ref.add.cast(line) for line in range(20, 40)))
            before = await ref.ticked()
            await killed(made)
        async with cluster(tmp_path) as made:
            again = await made.client.whereis("book")
            assert again is not None and again == ref
            assert await again.all() == list(range(40))
            assert await again.ticked() >= before
            now = await again.ticked()
            await until(lambda: again.ticked(), lambda ticks: ticks > now)
            assert (await made.client.info(again)).durable
            await made.client.stop(again)
            await until(lambda: journals(tmp_path), lambda left: not left)

    asyncio.run(main())


def test_a_cluster_that_is_stopped_in_order_keeps_its_durable_servers(
    tmp_path: pathlib.Path,
) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as made:
            ref = await made.client.spawn(Ledger, options=migrate.SpawnOptions(name="book"))
            await ref.add(1)
        async with cluster(tmp_path) as made:
            again = await made.client.whereis("book")
            assert again is not None and await again.all() == [1]

    asyncio.run(main())


def test_the_journal_that_a_move_leaves_behind_is_of_no_use(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        kept = tmp_path / "kept"
        async with cluster(tmp_path) as made:
            ref = await made.client.spawn(
                Ledger, options=migrate.SpawnOptions(name="book", on="n1")
            )
            await ref.add(1)
            (old,) = journals(tmp_path)
            kept.write_bytes(old.read_bytes())
            await made.client.migrate(ref, to="n2")
            await ref.add(2)
            await until(
                lambda: journals(tmp_path), lambda left: [p.parent.name for p in left] == ["n2"]
            )
            await killed(made)
        # As if it had not been removed, or came from a backup.
        old.write_bytes(kept.read_bytes())
        async with cluster(tmp_path) as made:
            again = await made.client.whereis("book")
            assert again is not None and await again.all() == [1, 2]
            assert (await made.client.info(again)).node == "n2"
        assert not old.exists()
        assert old.with_name(old.name + ".stale").exists()

    asyncio.run(main())


def test_a_standby_that_took_over_has_a_journal_of_its_own(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path) as made:
            options = migrate.SpawnOptions(name="book", on="n1", standbys=["n2"], durable=True)
            ref = await made.client.spawn(Ledger, options=options)
            info = await made.client.info(ref)
            assert info.durable and info.standbys == ("n2",)
            assert await ref.add(1) == 1
            made.node("n1").kill()
            async with migrate.connect(
                made.node("n2").address, options=OPTIONS, secret_file=made.secret_file
            ) as client:
                again = await client.whereis("book")
                assert again is not None and await again.add(2) == 2
                info = await client.info(again)
                assert info.durable and info.node == "n2"
            await killed(made)
        async with cluster(tmp_path) as made:
            again = await made.client.whereis("book")
            assert again is not None and await again.all() == [1, 2]

    asyncio.run(main())


def test_a_node_without_a_folder_refuses_durable_servers() -> None:
    async def main() -> None:
        async with migrate.Node() as node:
            with pytest.raises(migrate.UsageError, match="no folder") as caught:
                await node.spawn(Ledger)
            assert caught.value.outcome is Outcome.NOT_DONE

    asyncio.run(main())


@pytest.mark.parametrize("kept", ["in a folder", "in a store"])
def test_migrate_up_with_data_brings_them_back_after_everything_was_killed(
    tmp_path: pathlib.Path, kept: str
) -> None:
    data = f"file://{tmp_path / 'data'}" if kept == "in a store" else str(tmp_path / "data")
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_RUNTIME_DIR": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path),
        "LIVEMIGRATE_SECRET_FILE": str(tmp_path / "secret"),
    }

    def started() -> tuple[subprocess.Popen[str], list[int]]:
        up = subprocess.Popen(
            [sys.executable, "-m", "migrate", "up", "-n", "2", "--data", data, "--json"],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
        )
        assert up.stdout is not None
        told = json.loads(up.stdout.readline())
        return up, [up.pid, *(node["pid"] for node in told["nodes"])]

    def verb(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "migrate", *words],
            capture_output=True,
            text=True,
            env=env,
            cwd=ROOT,
            check=True,
        )
        return done.stdout

    up, pids = started()
    with up:
        verb("spawn", "collections:Counter", "--name", "words", "--durable")
        verb("call", "words", "update", '["a", "b", "a"]')
        # The nodes first: they end in order when their parent is gone.
        for pid in reversed(pids):
            os.kill(pid, signal.SIGKILL)
    up, pids = started()
    with up:
        try:
            told = verb("call", "words", "most_common", "1", "--json")
            assert [["a", 2]] in json.loads(told).values()
            assert json.loads(verb("info", "words", "--json"))["durable"]
        finally:
            up.send_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["in a folder", "in a store"])
def test_whenever_all_processes_are_killed_nothing_acknowledged_is_lost_or_repeated(
    tmp_path: pathlib.Path, kept: str
) -> None:
    """Callers note lines, each its own, and know which were acknowledged; moves go on meanwhile."""
    url = f"file://{tmp_path / 'store'}" if kept == "in a store" else None
    kills = int(os.environ.get("DURABLE_KILLS", "6"))
    rng = random.Random(11)
    acknowledged: set[int] = set()
    asked: set[int] = set()
    numbers = iter(range(10**9))

    async def caller(to: migrate.Ref[Ledger], through: migrate.Ref[Teller]) -> None:
        while True:
            line = next(numbers)
            asked.add(line)
            if line % 4:
                await to.add(line)
            else:
                await through.tell(line)
            acknowledged.add(line)

    async def mover(made: migrate.LocalCluster, ref: migrate.Ref[Ledger]) -> None:
        for target in ("n2", "n1") * 1000:
            with contextlib.suppress(migrate.MoveError, migrate.UsageError):
                await made.client.migrate(ref, to=target)
            await asyncio.sleep(0.1)

    def check(lines: list[int]) -> None:
        counts = collections.Counter(lines)
        assert not [line for line, count in counts.items() if count > 1], "repeated"
        assert acknowledged <= counts.keys(), sorted(acknowledged - counts.keys())
        assert counts.keys() <= asked

    async def main() -> None:
        for life in range(kills):
            async with cluster(tmp_path, url=url) as made:
                client = made.client
                if life == 0:
                    book = await client.spawn(Ledger, options=migrate.SpawnOptions(name="book"))
                    await client.spawn(Teller, book, options=migrate.SpawnOptions(name="teller"))
                ledger = await client.whereis("book")
                teller = await client.whereis("teller")
                assert ledger is not None and teller is not None, life
                check(await ledger.all())
                before = len(acknowledged)
                tasks = [asyncio.create_task(caller(ledger, teller)) for _ in range(CALLERS)]
                if life % 2:
                    tasks.append(asyncio.create_task(mover(made, ledger)))
                wanted = rng.randrange(1, 400)
                async with asyncio.timeout(600):
                    while len(acknowledged) - before < wanted:
                        await asyncio.sleep(0)
                        for task in tasks:
                            if task.done():
                                task.result()
                await killed(made)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        async with cluster(tmp_path, url=url) as made:
            ledger = await made.client.whereis("book")
            assert ledger is not None
            check(await ledger.all())

    asyncio.run(main())
    assert len(acknowledged) > kills
