"""Durable servers whose journals are in a store: nodes that are killed, or paused, and go on."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal

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
