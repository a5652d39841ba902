"""Durable servers whose journals are in a store: nodes that are killed, or paused, and go on."""

from __future__ import annotations

import asyncio
import os
import pathlib
import random
import signal
import time

import pytest

import migrate
from migrate.errors import Outcome
from tests.cluster.durable_servers import Ledger
from tests.cluster.test_durable import OPTIONS, cluster, killed, until

pytestmark = pytest.mark.cluster

QUICK = migrate.NodeOptions(call_timeout_s=20.0, lease_s=0.5, promote_patience_s=0.2)


def objects(folder: pathlib.Path) -> list[pathlib.Path]:
    # (What a killed node was just about to give its name is swept up with the next of that name.)
    return sorted(it for it in (folder / "store").rglob("*") if it.name.isdecimal())


def url_in(folder: pathlib.Path) -> str:
    return f"file://{folder / 'store'}"


def client_of(made: migrate.LocalCluster, name: str) -> migrate.Client:
    """One whose first node is not the one that is to be killed."""
    return migrate.connect(made.node(name).address, options=OPTIONS, secret_file=made.secret_file)


def test_all_come_back_once_after_everything_was_killed_at_whatever_node(
    tmp_path: pathlib.Path,
) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 3, url=url_in(tmp_path)) as made:
            refs = [
                await made.client.spawn(
                    Ledger, options=migrate.SpawnOptions(name=f"book {n}", on=f"n{n % 3 + 1}")
                )
                for n in range(9)
            ]
            for n, ref in enumerate(refs):
                for line in range(n + 1):
                    await ref.add(line)
                await asyncio.gather(*(ref.add.cast(line) for line in range(100, 105)))
            await killed(made)
        # Fewer nodes than there were, and more: what was written is nobody's own.
        for nodes in (2, 3):
            async with cluster(tmp_path, nodes, url=url_in(tmp_path)) as made:
                for n, ref in enumerate(refs):
                    again = await made.client.whereis(f"book {n}")
                    assert again == ref
                    lines = await again.all()
                    assert lines[: n + 1] == list(range(n + 1))
                    assert sorted(lines[n + 1 :]) == list(range(100, 105))
                    before = await again.ticked()
                    await until(again.ticked, lambda ticks, before=before: ticks > before)
                    assert (await made.client.info(again)).durable
                found = await made.client.servers()
                assert sorted(info.name for info in found) == [f"book {n}" for n in range(9)]
                await killed(made)

    asyncio.run(main())


def test_a_server_whose_node_was_killed_goes_on_at_another_one_that_shares_the_store(
    tmp_path: pathlib.Path,
) -> None:
    async def main() -> None:
        async with cluster(tmp_path, url=url_in(tmp_path)) as made:
            ref = await made.client.spawn(
                Ledger, options=migrate.SpawnOptions(name="book", on="n1")
            )
            for line in range(10):
                await ref.add(line)
            async with client_of(made, "n2") as client:
                mine = await client.whereis("book")
                assert mine is not None
                pending = [asyncio.ensure_future(mine.add(line)) for line in range(10, 30)]
                await asyncio.sleep(0)
                made.node("n1").kill()
                # Each is answered, once, by whoever has the server.
                await asyncio.gather(*pending)
                lines = await mine.all()
                assert lines[:10] == list(range(10)) and sorted(lines) == list(range(30))
                info = await client.info(mine)
                assert info.node == "n2" and info.durable
                # And back, at a node that has come meanwhile.
                await made.add_node("n1")
                made.node("n2").kill()
                async with client_of(made, "n1") as other:
                    again = await other.whereis("book")
                    assert again is not None and await again.add(30) == 31
                    assert (await other.info(again)).node == "n1"
                    await other.stop(again)
                    await until(lambda: objects(tmp_path), lambda left: not left)

    asyncio.run(main())


def test_a_standby_takes_over_before_a_journal_is_opened(tmp_path: pathlib.Path) -> None:
    async def main() -> None:
        async with cluster(tmp_path, 3, url=url_in(tmp_path)) as made:
            options = migrate.SpawnOptions(name="book", on="n1", standbys=["n3"], durable=True)
            ref = await made.client.spawn(Ledger, options=options)
            assert await ref.add(1) == 1
            async with client_of(made, "n2") as client:
                mine = await client.whereis("book")
                assert mine is not None
                made.node("n1").kill()
                assert await mine.add(2) == 2
                info = await client.info(mine)
                assert info.node == "n3" and info.durable
            await killed(made)
        async with cluster(tmp_path, 1, url=url_in(tmp_path)) as made:
            again = await made.client.whereis("book")
            assert again is not None and await again.all() == [1, 2]

    asyncio.run(main())


def test_an_owner_that_was_paused_answers_nothing_after_its_journal_was_opened(
    tmp_path: pathlib.Path,
) -> None:
    """What waited in its sockets while it was paused is handled when it goes on, reads too."""

    async def main() -> None:
        async with cluster(tmp_path, url=url_in(tmp_path), options=QUICK) as made:
            paused, other = made.node("n1"), made.node("n2")
            ref = await made.client.spawn(
                Ledger, options=migrate.SpawnOptions(name="book", on="n1")
            )
            await ref.add(1)
            async with client_of(made, "n2") as client:
                mine = await client.whereis("book")
                assert mine is not None and await mine.add(2) == 2
                os.kill(paused.pid, signal.SIGSTOP)
                late = [asyncio.ensure_future(ref.add(line)) for line in (10, 11, 12)]
                read = asyncio.ensure_future(ref.all())

                async def owner() -> str:
                    return (await client.info(mine)).node

                await until(owner, lambda node: node == "n2")
                late.append(asyncio.ensure_future(mine.add(13)))
                await late[-1]
                os.kill(paused.pid, signal.SIGCONT)
                lengths = await asyncio.gather(*late)
                lines = await mine.all()
                # Each was done once, and each answer is that of this one history.
                assert lines[:2] == [1, 2] and sorted(lines[2:]) == [10, 11, 12, 13]
                assert [lines[length - 1] for length in lengths] == [10, 11, 12, 13]
                seen = await read
                assert seen == lines[: len(seen)] and len(seen) >= 2
                assert await owner() == "n2" and other.alive and paused.alive
                found = [info.node for info in await client.servers()]
                assert found == ["n2"]
            await killed(made)
        async with cluster(tmp_path, url=url_in(tmp_path)) as made:
            again = await made.client.whereis("book")
            assert again is not None and await again.all() == lines

    asyncio.run(main())


def test_a_store_that_cannot_be_had_is_said_before_any_node_is_started(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "store").write_text("no folder")

    async def main() -> None:
        with pytest.raises(migrate.MigrateError, match="cannot be kept in file://") as caught:
            async with cluster(tmp_path, url=url_in(tmp_path)):
                pass
        assert caught.value.outcome is Outcome.NOT_DONE

    asyncio.run(main())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "paused"])
def test_however_often_an_owner_is_gone_nothing_acknowledged_is_lost_or_repeated(
    tmp_path: pathlib.Path, how: str
) -> None:
    """Two nodes look for its journal at the same time; of those that were paused the former owner
    does not know what has become of it.
    """
    times = int(os.environ.get("DURABLE_KILLS", "6"))
    rng = random.Random(7)
    numbers = iter(range(10**9))
    asked: set[int] = set()
    # What was answered: the line, how many there were then, and when it was asked and answered.
    answers: list[tuple[int, int, float, float]] = []

    async def caller(book: migrate.Ref[Ledger]) -> None:
        while True:
            line = next(numbers)
            asked.add(line)
            began = time.monotonic()
            length = await book.add(line)
            answers.append((line, length, began, time.monotonic()))

    def check(lines: list[int]) -> None:
        assert len(set(lines)) == len(lines), "repeated"
        assert {line for line, *_ in answers} <= set(lines) <= asked
        for line, length, _, _ in answers:
            assert lines[length - 1] == line
        # What was answered before another one was asked stands before it.
        ended = sorted(answers, key=lambda it: it[3])
        begun = sorted(answers, key=lambda it: it[2])
        most, at = 0, 0
        for _, length, began, _ in begun:
            while at < len(ended) and ended[at][3] < began:
                most = max(most, ended[at][1])
                at += 1
            assert length > most

    async def main() -> None:
        # (A process that dies is seen at once, whatever the leases are.)
        options = QUICK if how == "paused" else OPTIONS
        async with cluster(tmp_path, 4, url=url_in(tmp_path), options=options) as made:
            client = made.client
            await client.cordon("n1")  # which this client is told by, and lives
            book = await client.spawn(Ledger, options=migrate.SpawnOptions(name="book", on="n2"))
            tasks = [asyncio.create_task(caller(book)) for _ in range(8)]
            taken = 0

            async def more(than: int) -> None:
                async with asyncio.timeout(60):
                    while len(answers) < than:
                        await asyncio.sleep(0.001)
                        for task in tasks:
                            if task.done():
                                task.result()

            for _ in range(times):
                await more(len(answers) + rng.randrange(1, 200))
                owner = (await client.info(book)).node
                gone = made.node(owner)
                if how == "killed":
                    gone.kill()
                else:
                    os.kill(gone.pid, signal.SIGSTOP)
                # What comes from now on may be answers that were under way; then it is another's.
                # One that was stopped while it wrote to the directory keeps everybody waiting.
                try:
                    async with asyncio.timeout(None if how == "killed" else 5):
                        await until(
                            lambda: _owner(client, book),
                            lambda now, owner=owner: now not in ("", owner),
                        )
                        taken += 1
                except TimeoutError:
                    if how == "killed":
                        raise
                    os.kill(gone.pid, signal.SIGCONT)
                await more(len(answers) + 20)
                if how == "killed":
                    await made.add_node(owner)
                else:
                    os.kill(gone.pid, signal.SIGCONT)
            await more(len(answers) + 50)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            check(await book.all())
            assert taken
            await killed(made)
        async with cluster(tmp_path, 1, url=url_in(tmp_path)) as made:
            again = await made.client.whereis("book")
            assert again is not None
            check(await again.all())

    asyncio.run(main())
    assert len(answers) > 20 * times


async def _owner(client: migrate.Client, ref: migrate.Ref[Ledger]) -> str:
    """Where a server is, as far as anybody can say."""
    try:
        async with asyncio.timeout(2):
            return (await client.info(ref)).node
    except (TimeoutError, migrate.MigrateError):
        return ""
