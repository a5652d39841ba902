"""Durable servers of a node in this process: disks that fail, journals that grow, closing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import inspect
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

import pytest

import migrate
from migrate.core.standby import Standing
from migrate.shell import journal as journal_module
from migrate.shell import journal_places as places_module
from migrate.shell import wire
from tests.migrate.journal_disks import Failing


@migrate.server
class Words:
    """Keeps words; its state grows."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def add(self, word: str) -> int:
        """Keep one; how many there are."""
        self.words.append(word)
        return len(self.words)

    def clear(self) -> None:
        """Forget all."""
        self.words.clear()

    async def count(self) -> int:
        """How many there are."""
        return len(self.words)


DURABLE = migrate.SpawnOptions(name="words", durable=True)


async def until(look: Callable[[], Any], good: Callable[[Any], bool]) -> None:
    """Look again and again, until what is seen is good."""
    async with asyncio.timeout(30):
        while True:
            seen = look()
            if good(await seen if inspect.isawaitable(seen) else seen):
                return
            await asyncio.sleep(0.01)


def node(folder: pathlib.Path) -> migrate.Node:
    return migrate.Node("n", directory=f"sqlite:///{folder / 'cluster.db'}", data=folder / "data")


@contextlib.contextmanager
def written(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """A file as it is while a process writes to it."""
    with open(path, "rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        yield writer


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((folder / "data").iterdir())


def test_a_disk_that_fails_costs_the_journal_and_a_new_one_is_begun(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            journals = here._driver.streams.journals
            assert journals is not None
            (first,) = files(tmp_path)
            disk = journals.place.log.disk = Failing("sync_data", 1, errno.ENOSPC)
            # The file that is open keeps the disk that it was made on.
            for written in journals._written.values():
                written._file._disk = disk
            assert await ref.add("a") == 1
            assert disk.failed and "No space left" in caplog.text
            await until(lambda: here.info(ref), lambda info: info.durable)
            assert await ref.add("b") == 2
            await until(lambda: files(tmp_path), lambda left: len(left) == 1)
            assert files(tmp_path) != [first]
        async with node(tmp_path) as here:
            again = await here.whereis("words")
            assert again is not None and await again.count() == 2

    with caplog.at_level(logging.ERROR, "migrate"):
        asyncio.run(main())


def test_calls_that_come_one_by_one_are_committed_by_the_loop_and_there_afterwards(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "HOLD_AFTER", 0)
    monkeypatch.setattr(journal_module, "HOLD_S", 60.0)
    syncs = []
    real = journal_module.LogDisk.sync_data

    def sync_data(self: journal_module.LogDisk, handle: int) -> None:
        syncs.append(threading.get_ident())
        real(self, handle)

    monkeypatch.setattr(journal_module.LogDisk, "sync_data", sync_data)

    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            for n in range(50):
                before = len(syncs)
                assert await ref.add("a") == n + 1
                assert len(syncs) > before
            # Together they are a group's, and in order.
            assert sorted(await asyncio.gather(*(ref.add("b") for _ in range(50)))) == [
                *range(51, 101)
            ]
        async with node(tmp_path) as here:
            again = await here.whereis("words")
            assert again is not None and await again.count() == 100

    asyncio.run(main())
    assert threading.get_ident() in syncs and len(set(syncs)) > 1


def test_a_journal_that_has_grown_begins_anew_while_calls_go_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "LOG_BYTES_MIN", 20_000)

    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            for n in range(400):
                assert await ref.add(f"word {n}") == n + 1
            (path,) = files(tmp_path)
            # Each cut is a snapshot of all words, so the log would have several times this.
            assert path.stat().st_size < 400_000
        async with node(tmp_path) as here:
            again = await here.whereis("words")
            assert again is not None and await again.count() == 400

    asyncio.run(main())


def test_a_large_state_is_logged_by_what_changes_and_comes_back(
    tmp_path: pathlib.Path,
) -> None:
    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            await ref.add("x" * 3_000_000)
            for n in range(30):
                await ref.add(f"word {n}")
        async with node(tmp_path) as here:
            again = await here.whereis("words")
            assert again is not None and await again.count() == 31
            assert await again.add("more") == 32
        async with node(tmp_path) as here:
            again = await here.whereis("words")
            assert again is not None and await again.count() == 32

    asyncio.run(main())


def test_a_class_that_cannot_be_had_leaves_the_journal_where_it_is(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            await ref.add("a")
        kept = files(tmp_path)
        with monkeypatch.context() as patch:
            patch.delattr(f"{__name__}.Words")
            async with node(tmp_path) as here:
                assert "cannot be opened" in caplog.text
        assert files(tmp_path) == kept
        async with node(tmp_path) as here:
            again = await here.whereis("words")
            assert again is not None and await again.count() == 1

    with caplog.at_level(logging.ERROR, "migrate"):
        asyncio.run(main())


def test_a_journal_whose_writer_has_not_quite_ended_is_waited_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            await ref.add("a")
        (path,) = files(tmp_path)
        looked = []
        real = places_module.FolderPlace._load

        with written(path) as writer:

            def load(self: Any, stack: Any, of: str) -> Any:
                looked.append(of)
                if len(looked) == 3:
                    fcntl.flock(writer, fcntl.LOCK_UN)
                return real(self, stack, of)

            monkeypatch.setattr(places_module.FolderPlace, "_load", load)
            async with node(tmp_path) as here:
                again = await here.whereis("words")
                assert again is not None and await again.count() == 1
        assert len(looked) == 3

        # One that goes on writing is another matter.
        monkeypatch.setattr(places_module, "IN_USE_S", 0.2)
        (path,) = files(tmp_path)
        with written(path) as writer:
            async with node(tmp_path) as here:
                assert "a process writes to it" in caplog.text
        assert files(tmp_path) == [path]

    asyncio.run(main())


def test_a_damaged_journal_is_refused_and_stays(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            await ref.add("a")
        (path,) = files(tmp_path)
        data = bytearray(path.read_bytes())
        data[1500] ^= 1
        path.write_bytes(data)
        async with node(tmp_path):
            assert "cannot be opened" in caplog.text
        assert files(tmp_path) == [path] and path.read_bytes() == data

    with caplog.at_level(logging.ERROR, "migrate"):
        asyncio.run(main())


def test_what_an_ended_journal_tells_late_does_not_cost_the_present_one(
    tmp_path: pathlib.Path,
) -> None:
    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            (inc,) = here._driver.core.hosted.values()
            named = inc.row.journal
            journals = here._driver.streams.journals
            assert journals is not None
            late = journal_module.JournalFailed("its disk is full")
            journals._done(inc.id, "another", 1, late)
            assert await ref.add("a") == 1 and inc.row.journal == named != ""
            ((_, standing, _),) = here._driver.core.standbys.standbys_of(inc.id)
            assert standing is Standing.IN_SYNC

    asyncio.run(main())


def test_a_journal_that_a_move_has_left_goes_on_when_the_new_owner_dies_too_early(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer lives on, and the row names it until the new owner has one of its own."""

    async def main() -> None:
        directory = f"sqlite:///{tmp_path / 'cluster.db'}"
        other = migrate.Node("m", directory=directory, data=tmp_path / "other")
        async with node(tmp_path) as here, other:
            ref = await here.spawn(Words, options=DURABLE)
            assert await ref.add("a") == 1
            journals = other._driver.streams.journals
            assert journals is not None
            # Its disk is so slow that nothing of it is ever safe.
            monkeypatch.setattr(journals, "append", lambda inc, message: None)
            await here.migrate(ref, to="m")
            assert (await here.info(ref)).node == "m"
            driver = here._driver
            driver.core.node_dead(other._id, driver.now_ms())
            driver.flush()
            await until(lambda: here.info(ref), lambda info: info.node == "n")
            assert await ref.add("b") == 2

    asyncio.run(main())


def test_a_durable_server_that_is_replaced_by_a_checkpoint_is_durable_again(
    tmp_path: pathlib.Path,
) -> None:
    async def main() -> None:
        place = (tmp_path / "words.ckpt").as_uri()
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            assert await ref.add("a") == 1
            await here.checkpoint(ref, place)
            await asyncio.gather(*(ref.add(word) for word in "bcd"))
            before = here._driver.core.hosted[ref._server_id].row.journal
            await here.restore(place, replace=True)
            # Whoever is told that it was restored is told what is in its journal.
            row = here._driver.core.hosted[ref._server_id].row
            assert row.journal not in ("", before)
            with pytest.raises(migrate.RolledBack):
                await ref.add("e")
            assert await ref.add("e") == 2
            await until(lambda: files(tmp_path), lambda found: len(found) == 1)
        async with node(tmp_path) as here:
            again: Any = await here.whereis("words")
            assert await again.count() == 2

    asyncio.run(main())


@migrate.server(durable=True)
class Ledger(Words):
    """Words that are durable by their class."""


@pytest.mark.parametrize("how", ["restored", "restored as another", "forked"])
def test_a_durable_class_has_a_journal_however_its_server_comes_to_be(
    tmp_path: pathlib.Path, how: str
) -> None:
    place = (tmp_path / "words.ckpt").as_uri()

    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Ledger)
            assert await ref.add("a") == 1
            await here.checkpoint(ref, place)
            if how == "restored":
                await here.stop(ref)
            if how == "forked":
                made: Any = await here.fork(ref)
            else:
                made = await here.restore(place, fork=how != "restored")
            row = here._driver.core.hosted[made._server_id].row
            assert row.journal and (await here.info(made)).durable
            if how == "restored":
                with pytest.raises(migrate.RolledBack):
                    await made.add("b")
            assert await made.add("b") == 2
            server = made._server_id
        async with node(tmp_path) as here:
            await until(lambda: here._driver.core.hosted, lambda hosted: server in hosted)
            again = here._ref(await here._read(server))
            assert await again.count() == 2

    asyncio.run(main())


def test_a_node_without_a_folder_for_journals_restores_no_durable_class(
    tmp_path: pathlib.Path,
) -> None:
    place = (tmp_path / "words.ckpt").as_uri()
    cluster = f"sqlite:///{tmp_path / 'cluster.db'}"

    async def main() -> None:
        async with node(tmp_path) as here, migrate.Node("bare", directory=cluster) as bare:
            ref = await here.spawn(Ledger)
            await here.checkpoint(ref, place)
            await here.stop(ref)
            for fork in (False, True):
                with pytest.raises(migrate.UsageError, match=r"no folder for\s+journals.*data"):
                    await bare.restore(place, fork=fork)
            assert await bare.servers() == []
            assert (await bare.info(await bare.restore(place, on="n"))).durable

    asyncio.run(main())


def test_async_standbys_of_a_durable_server_are_refused(tmp_path: pathlib.Path) -> None:
    """It would go back in time, behind what its journal has."""
    with pytest.raises(migrate.UsageError, match="async"):
        migrate.SpawnOptions(durable=True, standbys=1, standby_mode="async")

    async def main() -> None:
        async with node(tmp_path) as here:
            ref = await here.spawn(Words, options=DURABLE)
            with pytest.raises(migrate.StandbyError, match="behind its journal") as caught:
                await here.replicate(ref, ["n2"], mode="async")
            assert caught.value.outcome is migrate.Outcome.NOT_DONE
            assert await ref.add("a") == 1 and (await here.info(ref)).durable

    asyncio.run(main())


def test_a_swap_that_names_a_journal_survives_a_power_cut(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is there after it; a row that does not name it would make it worthless."""
    named: list[tuple[bool, bool]] = []

    async def main() -> None:
        async with node(tmp_path) as here:
            real = here._directory.txn

            async def txn(compares: Any, puts: Any, deletes: Any, **how: Any) -> Any:
                for put in puts:
                    if put.key.startswith("server/"):
                        row = wire.decode_row(put.value)
                        named.append((bool(row.journal), how.get("durable", True)))
                return await real(compares, puts, deletes, **how)

            monkeypatch.setattr(here._directory, "txn", txn)
            await here.spawn(Words, options=DURABLE)

    asyncio.run(main())
    assert (True, True) in named and (True, False) not in named


def test_a_wish_that_is_no_wish_is_refused() -> None:
    with pytest.raises(migrate.UsageError, match="True or False"):
        migrate.SpawnOptions(durable=1)  # type: ignore[arg-type]
