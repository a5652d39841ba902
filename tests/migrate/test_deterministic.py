"""Standbys of deterministic servers: they run what their owner runs, and say if it differs."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import migrate
from migrate.ref import ref_object
from migrate.shell.inputs import slice_digest
from tests.migrate.clusters import QUICK, eventually, nodes, run, until
from tests.migrate.servers import Counter

pytestmark = pytest.mark.usefixtures("cluster_secret")

OPTIONS = QUICK.replace(promote_patience_s=0.05, digest_every_s=0.001)
WITHOUT_DIGESTS = OPTIONS.replace(digest_every_s=0.0)


@migrate.server(deterministic=True)
class Ledger:
    """Every result depends on all that came before."""

    runs: list[str] = []  # noqa: RUF012 - of all copies in this process

    def __init__(self, other: Any = None) -> None:
        self.entries: dict[int, list[int]] = {i: [i] for i in range(250)}
        self.padding = bytes(50_000)
        self.total = 0
        self.callers: list[str | None] = []
        self.other = other
        self.ticks = 0

    def add(self, what: int) -> int:
        self.total = self.total * 31 + what
        self.entries[what % 250].append(self.total % 97)
        self.callers.append(migrate.current().caller)
        self.runs.append(migrate.current().node)
        return self.total

    def refuse(self) -> None:
        self.total += 1
        raise ValueError(f"at {self.total}")

    def tell(self) -> int:
        self.other.incr.cast(1)
        return 1

    def all(self) -> tuple[int, dict[int, list[int]], list[str | None]]:
        return self.total, self.entries, self.callers


@migrate.server(deterministic=True)
class Forgetful:
    """Not what it is declared to be: one copy differs from another in what no result shows."""

    copies = 0

    def __init__(self) -> None:
        self.n = 0
        self.secret = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Forgetful.copies += 1
        self.secret = Forgetful.copies

    def incr(self) -> int:
        self.n += 1
        return self.n


@migrate.server(deterministic=True)
class Chatty:
    """Its results differ from copy to copy."""

    def __init__(self) -> None:
        self.n = 0

    def where(self) -> str:
        self.n += 1
        return str(id(self))

    def count(self) -> int:
        return self.n


def server_of(ref: Any) -> str:
    return ref_object(ref)._server_id


async def fail_over(owner: migrate.Node, to: migrate.Node, ref: Any) -> None:
    await owner._directory.txn([], [], [f"alive/{owner.id}"])
    await until(lambda: server_of(ref) in to._driver.core.hosted)


def test_a_standby_has_run_all_that_its_owner_ran_when_it_takes_over() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=OPTIONS) as (a, b, c):
            ref = await a.spawn(Ledger)
            await ref.add(1)
            await a.replicate(ref, ["b"])
            Ledger.runs.clear()
            for i in range(200):
                await ref.add(i)
            with pytest.raises(ValueError, match="at "):
                await ref.refuse()
            # Both copies took every message, and for both it was the owner's run of it.
            assert Ledger.runs == ["a"] * 400
            before = await ref.all()
            # It has the messages, and not the state.
            (kept,) = b._driver.streams._kept.values()
            assert kept.twin is not None and kept.reader is None and kept.snapshot is None
            await fail_over(a, b, ref)
            mine = c._ref(await c._read(server_of(ref)))
            assert await mine.all() == before
            assert await mine.add(7) == before[0] * 31 + 7

    run(body())


def test_what_a_handler_asks_of_others_is_asked_once() -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, _):
            counter = await a.spawn(Counter)
            ref = await a.spawn(Ledger, counter)
            await a.replicate(ref, ["b"])
            for _ in range(5):
                await ref.tell()

            async def all_came() -> bool:
                return await counter.incr(0) >= 5

            await eventually(all_came)
            assert await counter.incr(0) == 5

    run(body())


@pytest.mark.parametrize("cls", [Forgetful, Chatty])
def test_a_server_that_is_not_deterministic_is_found_out_and_goes_on_with_changes(
    cls: type, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with nodes("a", "b", options=OPTIONS) as (a, b):
            ref = await a.spawn(cls)
            await a.replicate(ref, ["b"])
            method = "incr" if cls is Forgetful else "where"
            said = "is not deterministic, though it is declared so"

            async def found_out() -> bool:
                await getattr(ref, method)()
                return any(said in record.getMessage() for record in caplog.records)

            await eventually(found_out)

            # The standby comes back by itself, and is told the state.
            async def is_back() -> bool:
                info = await a.info(ref)
                return info.standbys == ("b",) and bool(b._driver.core.standbys.backups)

            await eventually(is_back)
            await getattr(ref, method)()
            (kept,) = b._driver.streams._kept.values()
            assert kept.snapshot is not None

    with caplog.at_level(logging.ERROR, logger="migrate"):
        run(body())


def test_without_digests_only_results_are_compared() -> None:
    # The control of the test above: what no result shows is then not found out.
    async def body() -> None:
        async with nodes("a", "b", options=WITHOUT_DIGESTS) as (a, _):
            ref = await a.spawn(Forgetful)
            await a.replicate(ref, ["b"])
            for i in range(50):
                assert await ref.incr() == i + 1
            host: Any = a._driver.core.hosted[server_of(ref)].host
            assert host.inputs is not None and not host.diverged

    run(body())


def test_a_move_to_the_standby_ships_the_last_messages() -> None:
    async def body() -> None:
        async with nodes("a", "b", "c", options=WITHOUT_DIGESTS) as (a, _, c):
            ref = await a.spawn(Ledger)
            await a.replicate(ref, ["b"])
            for i in range(100):
                await ref.add(i)
            before = await ref.all()
            cold = await a.fork(ref, on="a")
            report = await a.migrate(cold, to="c")
            there = await a.migrate(ref, to="b")
            assert there.bytes_sent < report.bytes_sent / 2
            mine = c._ref(await c._read(server_of(ref)))
            assert await mine.all() == before

    run(body())


def test_a_move_to_a_standby_that_differs_is_refused_and_the_server_stays() -> None:
    async def body() -> None:
        async with nodes("a", "b", options=WITHOUT_DIGESTS) as (a, _):
            ref = await a.spawn(Forgetful)
            await a.replicate(ref, ["b"])
            await ref.incr()
            with pytest.raises(migrate.MoveError, match="came out differently"):
                await a.migrate(ref, to="b")
            assert await ref.incr() == 2
            assert (await a.info(ref)).node == "a"

    run(body())


@pytest.mark.parametrize("kind", ["async", "blocking"])
def test_handlers_that_wait_cannot_be_deterministic(kind: str) -> None:
    with pytest.raises(migrate.UsageError, match="declared deterministic"):
        if kind == "async":

            @migrate.server(deterministic=True)
            class One:
                async def wait(self) -> None: ...

        else:

            @migrate.server(deterministic=True)
            class Other:
                @migrate.blocking
                def work(self) -> None: ...


def test_slices_cover_all_of_a_state() -> None:
    ledger = Ledger()
    digests = {slice_digest(ledger, part) for part in range(4)}
    assert len(digests) == 4  # the rest, and three of the entries
    assert {slice_digest(ledger, part) for part in range(4, 12)} == digests
    for key in (0, 99, 100, 249):
        before = [slice_digest(ledger, part) for part in range(4)]
        ledger.entries[key].append(1)
        after = [slice_digest(ledger, part) for part in range(4)]
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
