"""Durable servers whose journals are in a store that nodes share, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import migrate
from migrate.errors import Outcome
from migrate.shell import journal as journal_module
from migrate.shell import journal_objects as objects_module
from migrate.shell import stores
from migrate.shell.journal_format import read_header
from migrate.shell.journal_objects import ObjectJournal
from migrate.shell.stores import Exists, MemoryStore, StoreError
from tests.migrate.test_durable import DURABLE, Words, until

Pieces = Sequence[bytes | bytearray | memoryview]


class Watched(MemoryStore):
    """One that a test can make slow, deaf or forgetful; as other stores, it works in threads."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.lost: Iterator[str] = iter(())
        self.refused = 0
        self.before: Callable[[str], None] = lambda _: None

    def write_new(self, name: str, pieces: Pieces) -> int:
        self.before(name)
        what = "lost request" if self.away else next(self.lost, "")
        if what == "lost request":
            self.refused += 1
            raise StoreError("nobody answers", Outcome.UNKNOWN)
        size = super().write_new(name, pieces)
        if what == "lost answer":
            self.refused += 1
            raise StoreError("nobody answers", Outcome.UNKNOWN)
        return size

    def journals(self) -> list[str]:
        return [name for name in self._kept if name.startswith("prefix/servers/")]

    def fences(self) -> list[str]:
        """But for the first of all, which stops nobody."""
        kept = {name: self._kept[name] for name in self.journals()}
        return [name for name, data in kept.items() if read_header(data)[0].stops]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits longer than it has to."""
    monkeypatch.setattr(objects_module, "GROUP_S", 0.0)
    monkeypatch.setattr(objects_module, "WAITS_S", (0.0,))
    monkeypatch.setattr(objects_module, "AGAIN_FIRST_S", 0.01)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Watched:
    made = Watched()
    monkeypatch.setitem(stores._memories, "durable", made)
    return made


def node(name: str, folder: pathlib.Path, **more: Any) -> migrate.Node:
    more.setdefault("data", "memory://durable/prefix")
    return migrate.Node(name, directory=f"sqlite:///{folder / 'cluster.db'}", **more)


def thinks_gone(opener: migrate.Node, owner: migrate.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a node take another one, which lives, for gone, and look for what it owned."""
    member = opener._membership
    real = member.is_silent

    async def is_silent(node: str) -> bool:
        return node == owner._id or await real(node)

    monkeypatch.setattr(member, "is_silent", is_silent)
    opener._look_for_journals()


def owners(*nodes: migrate.Node) -> list[str]:
    return [it.name for it in nodes if it._driver.core.hosted]


# -- the ordinary life of a journal


def test_a_server_comes_back_at_whatever_node_opens_first(
    tmp_path: pathlib.Path, store: Watched
) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a:
            ref = await a.spawn(Words, options=DURABLE)
            assert (await a.info(ref)).durable
            for n in range(20):
                assert await ref.add(str(n)) == n + 1
        for n, name in enumerate(("b", "a", "c")):
            async with node(name, tmp_path) as here:
                again = await here.whereis("words")
                assert again is not None and again == ref and await again.count() == 20 + n
                assert (await here.info(again)).node == name and (await here.info(again)).durable
                await again.add("more")
        async with node("a", tmp_path) as here:
            again = await here.whereis("words")
            assert again is not None
            await here.stop(again)
            await until(store.journals, lambda left: not left)

    asyncio.run(main())


def test_a_server_that_has_moved_away_leaves_no_objects_behind(
    tmp_path: pathlib.Path, store: Watched
) -> None:
    async def main() -> None:
        async with (
            node("a", tmp_path) as a,
            node("b", tmp_path) as b,
            node("c", tmp_path, data=tmp_path / "folder") as c,
        ):
            ref = await a.spawn(Words, options=DURABLE)
            for to in (b, a, b, c, a, c):
                await ref.add(to.name)
                await a.migrate(ref, to=to.name)
                await ref.add(to.name)
                # What is left is that of the owner: its fence, which stops whoever it came from for
                # as long as that one has not ended its own, and what it has written.
                row, _ = await a._driver.rows.read(ref._server_id)
                assert row is not None
                written = to._driver.streams.journals._written[row.journal]  # type: ignore[union-attr]
                if not isinstance(written, ObjectJournal):
                    await until(store.journals, lambda left: not left)
                    continue
                await until(
                    lambda first=written.first: store.journals(),
                    lambda left, first=written.first: all(
                        int(it.rpartition("/")[2]) >= first for it in left
                    ),
                )
            assert await ref.count() == 12
            files = list((tmp_path / "folder").iterdir())
            assert len(files) == 1
            await a.stop(ref)
            await until(lambda: list((tmp_path / "folder").iterdir()), lambda left: not left)
            assert not store.journals()

    asyncio.run(main())


def test_a_journal_that_has_grown_begins_anew_while_calls_go_on(
    tmp_path: pathlib.Path, store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "LOG_BYTES_MIN", 20_000)

    async def main() -> None:
        async with node("a", tmp_path) as a:
            ref = await a.spawn(Words, options=DURABLE)
            for n in range(400):
                assert await ref.add(f"word {n}") == n + 1
            # Each call is an object, and each a snapshot of all words.
            await until(store.journals, lambda left: len(left) < 60)
            assert sum(len(store._kept[name]) for name in store.journals()) < 400_000
        async with node("a", tmp_path) as a:
            again = await a.whereis("words")
            assert again is not None and await again.count() == 400

    asyncio.run(main())


# -- more than one who would have it


@pytest.mark.parametrize("at", ["fenced", "read"])
def test_of_two_nodes_that_open_a_journal_at_once_one_has_the_server(
    tmp_path: pathlib.Path,
    store: Watched,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at: str,
) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a:
            ref = await a.spawn(Words, options=DURABLE)
            for n in range(5):
                await ref.add(str(n))
        kept = set(store.journals())
        barrier = threading.Barrier(2, timeout=60)
        name = "fence" if at == "fenced" else "load_objects"
        real = getattr(sys.modules["migrate.shell.journal_places"], name)

        def together(*args: Any) -> Any:
            done = real(*args)
            # Both have put their fence, or have read, before one of them goes on.
            barrier.wait()
            return done

        with monkeypatch.context() as patch:
            patch.setattr(f"migrate.shell.journal_places.{name}", together)
            b, c = node("b", tmp_path), node("c", tmp_path)
            await asyncio.gather(b.start(), c.start())
        assert barrier.n_waiting == 0
        async with b, c:
            (owner,) = owners(b, c)
            assert caplog.text.count("does not come back from its journal") == 1
            again = await b.whereis("words")
            assert again is not None and await again.count() == 5
            assert await again.add("more") == 6
            assert owners(b, c) == [owner]
            for other in (b, c):
                assert (await other.info(again)).node == owner
        assert kept & set(store.journals()) == set()  # what was before is not needed any more
        async with node("d", tmp_path) as d:
            again = await d.whereis("words")
            assert again is not None and await again.count() == 6

    # NB: `async with` starts a node; these two are started before.
    monkeypatch.setattr(migrate.Node, "__aenter__", _as_it_is)
    asyncio.run(main())


async def _as_it_is(self: migrate.Node) -> migrate.Node:
    if self._state == "new":
        await self.start()
    return self


async def looked(at: migrate.Node) -> None:
    """Until a node has looked for journals that it may open, and has opened them."""
    journals = at._driver.streams.journals
    assert journals is not None
    real = journals._open_found
    done = asyncio.Event()

    async def open_found() -> bool:
        again = await real()
        done.set()
        return again

    journals._open_found = open_found  # type: ignore[method-assign]
    journals.look()
    await asyncio.wait_for(done.wait(), 30)
    journals._open_found = real  # type: ignore[method-assign]


def test_an_owner_that_lives_is_left_alone(tmp_path: pathlib.Path, store: Watched) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a:
            ref = await a.spawn(Words, options=DURABLE)
            await ref.add("one")
            async with node("b", tmp_path) as b:
                await looked(b)
                assert not store.fences() and owners(a, b) == ["a"]
            assert await ref.add("two") == 2

    asyncio.run(main())


def test_what_has_a_standby_is_left_to_it(
    tmp_path: pathlib.Path, store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a, node("b", tmp_path) as b, node("c", tmp_path) as c:
            ref = await a.spawn(Words, options=DURABLE)
            await a.replicate(ref, ["c"])
            await ref.add("one")
            thinks_gone(b, a, monkeypatch)
            await looked(b)
            assert not store.fences() and owners(a, b, c) == ["a"]
            # Until that is gone too.
            thinks_gone(b, c, monkeypatch)
            await until(lambda: owners(a, b, c), lambda found: "b" in found)
            await until(lambda: owners(a, b, c), lambda found: found == ["b"])
            again = await b.whereis("words")
            assert again is not None and await again.add("two") == 2

    asyncio.run(main())


def test_an_owner_that_lives_and_was_taken_for_gone_is_deposed_and_nothing_is_lost(
    tmp_path: pathlib.Path, store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a, node("b", tmp_path) as b:
            ref = await a.spawn(Words, options=DURABLE)
            done = 0

            async def caller(n: int) -> None:
                nonlocal done
                for k in range(60):
                    await ref.add(f"{n} {k}")
                    done += 1
                    if done == 80:
                        thinks_gone(b, a, monkeypatch)

            await asyncio.gather(*(caller(n) for n in range(4)))
            await until(lambda: owners(a, b), lambda found: found == ["b"])
            words = (await _state(b)).words
            assert sorted(words) == sorted(f"{n} {k}" for n in range(4) for k in range(60))
        async with node("c", tmp_path) as c:
            again = await c.whereis("words")
            assert again is not None and await again.count() == 240

    asyncio.run(main())


async def _state(of: migrate.Node) -> Words:
    (inc,) = of._driver.core.hosted.values()
    host: Any = inc.host
    return host.obj  # type: ignore[no-any-return]


def test_an_owner_that_was_fenced_goes_on_if_the_opener_does_not(
    tmp_path: pathlib.Path, store: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is let out between the fence and the swap that makes the opener's fail."""

    async def main() -> None:
        async with node("a", tmp_path) as a, node("b", tmp_path) as b:
            ref = await a.spawn(Words, options=DURABLE)
            await ref.add("before")
            row, _ = await a._driver.rows.read(ref._server_id)
            go_on, fenced = threading.Event(), threading.Event()
            real = sys.modules["migrate.shell.journal_places"].fence  # type: ignore[attr-defined]

            def slowly(*args: Any) -> Any:
                done = real(*args)
                fenced.set()
                assert go_on.wait(60)
                return done

            patch = pytest.MonkeyPatch()
            patch.setattr("migrate.shell.journal_places.fence", slowly)
            thinks_gone(b, a, patch)
            await asyncio.to_thread(fenced.wait, 60)
            assert await ref.add("after") == 2
            after, _ = await a._driver.rows.read(ref._server_id)
            assert row is not None and after is not None
            assert after.owner == row.owner and after.journal == row.journal
            assert after.epoch == row.epoch + 1
            # By now the opener is late, and has not read what was let out since its fence.
            patch.undo()
            go_on.set()
            await until(lambda: caplog.text, lambda text: "does not come back" in text)
            assert await ref.add("more") == 3
            assert owners(a, b) == ["a"]
        async with node("c", tmp_path) as c:
            again = await c.whereis("words")
            assert again is not None and await again.count() == 3

    asyncio.run(main())


# -- stores that fail


def test_while_a_store_is_away_nothing_is_acknowledged_and_nothing_is_lost_when_it_is_back(
    tmp_path: pathlib.Path, store: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a:
            ref = await a.spawn(Words, options=DURABLE)
            await ref.add("before")
            store.away = True
            calls = [asyncio.ensure_future(ref.add(str(n))) for n in range(50)]
            cast = asyncio.ensure_future(ref.add.cast("cast"))
            read = asyncio.ensure_future(ref.count())
            await until(lambda: store.refused, lambda refused: refused > 3)
            await until(lambda: caplog.text, lambda text: "cannot be written" in text)
            row, _ = await a._driver.rows.read(ref._server_id)
            assert row is not None and row.journal
            assert not any(it.done() for it in (*calls, cast, read))
            store.away = False
            assert sorted(await asyncio.gather(*calls)) == list(range(2, 52))
            await cast
            assert await read == 52
            assert (await a.info(ref)).durable
        async with node("b", tmp_path) as b:
            again = await b.whereis("words")
            assert again is not None and await again.count() == 52

    asyncio.run(main())


def test_calls_that_a_store_keeps_waiting_time_out_and_may_have_run(
    tmp_path: pathlib.Path, store: Watched
) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a:
            ref = await a.spawn(Words, options=DURABLE)
            store.away = True
            with pytest.raises(migrate.CallTimeout) as caught:
                await ref.add.with_options(timeout=0.2)("one")
            assert caught.value.outcome is Outcome.UNKNOWN
            store.away = False
            assert await ref.count() == 1

    asyncio.run(main())


def test_puts_whose_answers_are_lost_are_neither_lost_nor_done_twice(
    tmp_path: pathlib.Path, store: Watched
) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a:
            ref = await a.spawn(Words, options=DURABLE)
            store.lost = iter(["lost answer", "lost request", "lost answer", ""] * 30)
            for n in range(30):
                assert await ref.add(str(n)) == n + 1
            assert store.refused > 20
        # Also of the fence and the first base of whoever opens it.
        store.lost = iter(["", "", *["lost answer", "lost request", "lost answer"] * 5])
        async with node("b", tmp_path) as b:
            again = await b.whereis("words")
            assert again is not None and await again.count() == 30
            assert await again.add("more") == 31
            store.lost = iter(())
        async with node("b", tmp_path) as b:
            again = await b.whereis("words")
            assert again is not None and await again.count() == 31

    asyncio.run(main())


def test_a_store_that_is_away_when_a_server_is_to_be_opened_is_waited_for(
    tmp_path: pathlib.Path, store: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a:
            ref = await a.spawn(Words, options=DURABLE)
            await ref.add("before")

        def away(name: str) -> None:
            store.away = "/servers/" in name  # not when it is tried out

        store.before = away
        async with node("b", tmp_path) as b:
            assert "cannot be fenced" in caplog.text and not owners(b)
            store.before = lambda _: None
            store.away = False
            await until(lambda: owners(b), lambda found: found == ["b"])
            again = await b.whereis("words")
            assert again is not None and await again.count() == 1

    asyncio.run(main())


@pytest.mark.parametrize("how", ["changed", "cut off", "missing", "another key"])
def test_a_segment_that_is_not_as_it_was_written_is_refused_and_nothing_is_removed(
    tmp_path: pathlib.Path, store: Watched, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    async def main() -> None:
        async with node("a", tmp_path) as a:
            ref = await a.spawn(Words, options=DURABLE)
            for n in range(4):
                await ref.add(str(n))
        names = sorted(store.journals())
        hurt = names[-3]
        data = store._kept[hurt]
        match how:
            case "changed":
                store._kept[hurt] = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
            case "cut off":
                store._kept[hurt] = data[:-9]
            case "missing":
                del store._kept[hurt]
        left = {name: store._kept[name] for name in store.journals()}
        secret = tmp_path / "other" if how == "another key" else None
        if secret is not None:
            (secret).write_text("0" * 64)
            secret.chmod(0o600)
        async with node("b", tmp_path, secret_file=secret) as b:
            assert "cannot be opened" in caplog.text and not owners(b)
            assert b._driver.streams.journals is not None
            fenced = store.journals()
            b._look_for_journals()
            await until(lambda: b._driver.streams.journals._look.is_set(), lambda told: not told)  # type: ignore[union-attr]
            assert store.journals() == fenced  # it is not tried again as things are
        assert left.items() <= store._kept.items()
        store._kept[hurt] = data
        async with node("a", tmp_path) as a:
            again = await a.whereis("words")
            assert again is not None and await again.count() == 4

    asyncio.run(main())


def test_what_is_kept_in_another_place_is_left_to_it(
    tmp_path: pathlib.Path, store: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with node("a", tmp_path, data=tmp_path / "folder") as a:
            ref = await a.spawn(Words, options=DURABLE)
            await ref.add("one")
        async with node("b", tmp_path) as b:
            assert not owners(b) and not store.journals()
            async with node("a", tmp_path, data=tmp_path / "folder") as a:
                again = await b.whereis("words")
                assert again is not None and await again.count() == 1

    with caplog.at_level(logging.ERROR, "migrate"):
        asyncio.run(main())
    assert not [it for it in caplog.records if it.levelno >= logging.ERROR]


def test_a_node_that_is_cordoned_opens_nothing_until_it_admits_servers_again(
    tmp_path: pathlib.Path, store: Watched
) -> None:
    async def main() -> None:
        async with node("b", tmp_path) as b:
            await b.cordon("b")
            async with node("a", tmp_path) as a:
                ref = await a.spawn(Words, options=DURABLE)
                await ref.add("one")
            await until(lambda: list(b._membership.nodes), lambda left: len(left) == 1)
            assert not owners(b)
            await b.cordon("b", on=False)
            await until(lambda: owners(b), lambda found: found == ["b"])
            again = await b.whereis("words")
            assert again is not None and await again.count() == 1

    asyncio.run(main())


# -- what cannot be used is said before anything starts


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "s3:///x", "file://", "file://host/x"])
def test_a_url_that_is_none_of_a_store_is_refused_at_once(url: str) -> None:
    for make in (migrate.Node, migrate.LocalCluster):
        with pytest.raises(migrate.UsageError) as caught:
            make(data=url)
        assert url in caught.value.message


def test_nodes_in_several_processes_have_no_memory_in_common() -> None:
    with pytest.raises(migrate.UsageError, match="memory"):
        migrate.LocalCluster(data="memory://x")


def test_without_the_extra_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for make in (migrate.Node, migrate.LocalCluster):
        with pytest.raises(migrate.UsageError, match=r"livemigrate\[s3\]"):
            make(data="s3://bucket/x")


@pytest.mark.parametrize("how", ["away", "overwrites", "unreachable"])
def test_a_store_that_cannot_be_used_keeps_a_node_from_starting(
    tmp_path: pathlib.Path, store: Watched, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    data = "memory://durable/prefix"
    match how:
        case "away":
            store.away = True
        case "overwrites":
            monkeypatch.setattr(Watched, "write_new", MemoryStore.write)
        case "unreachable":
            pytest.importorskip("obstore")
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
            data = "s3://bucket/x"

    async def main() -> None:
        here = node("a", tmp_path, data=data)
        with pytest.raises(migrate.MigrateError, match="cannot be kept in") as caught:
            await here.start()
        assert data in caught.value.message and caught.value.outcome is Outcome.NOT_DONE
        assert not (tmp_path / "cluster.db").exists()

    asyncio.run(main())
    with contextlib.suppress(Exists):
        assert not store.journals()
