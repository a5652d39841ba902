"""What every home of the directory promises."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from migrate.shell import driver
from migrate.shell.directories import (
    Change,
    Changes,
    Compacted,
    Compare,
    Directory,
    DirectoryError,
    DirectoryUnavailable,
    Entry,
    EtcdDirectory,
    LeaseGone,
    MemoryDirectory,
    OutcomeUnknown,
    Put,
    SqliteDirectory,
    Txn,
    open_directory,
)
from migrate.shell.directories import memory as memory_home
from migrate.shell.directories import sqlite as sqlite_home
from migrate.shell.directories.base import (
    KEY_BYTES_MAX,
    TXN_OPERATIONS_MAX,
    VALUE_BYTES_MAX,
    prefix_end,
)
from tests.cluster.etcd_servers import EtcdServer, needs_etcd

pytestmark = pytest.mark.filterwarnings("error")

WAIT_S_MAX = 60.0
"""Bound of every wait in these tests: for a fault, not for an expectation."""

T = TypeVar("T")


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a test's coroutine; fail if it hangs or leaves a task or a thread behind."""
    threads_before = set(threading.enumerate())

    async def bounded() -> T:
        async with asyncio.timeout(WAIT_S_MAX):
            result = await main()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"
        return result

    result = asyncio.run(bounded(), debug=False)
    # A helper thread of the writers' queue needs an instant to end after it was told to.
    for thread in set(threading.enumerate()) - threads_before:
        if "_poll_wrapper" in thread.name:
            continue  # gRPC's own: one for the process, as long as there are channels.
        thread.join(WAIT_S_MAX)
        assert not thread.is_alive(), f"a thread is left behind: {thread}"
    return result


class SkewedClock:
    """Moves the time by which leases end, without waiting."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for owner, name in ((memory_home._Store, "now_s"), (sqlite_home._Engine, "_now_s")):
            real: Callable[[Any], float] = getattr(owner, name)
            patch.setattr(owner, name, lambda it, real=real: real(it) + self.ahead_s)


_numbers = itertools.count()


@dataclass
class Home:
    """A store of its own, and any number of directories on it."""

    kind: str
    folder: Path
    store: str = field(default_factory=lambda: f"store-{next(_numbers)}")
    etcd: EtcdServer | None = None

    def open(self, **options: Any) -> Directory:
        if self.kind == "memory":
            return MemoryDirectory(self.store, **options)
        if self.kind == "sqlite":
            return SqliteDirectory(self.folder / f"{self.store}.db", **options)
        if self.etcd is None:
            # One of its own, because revisions are counted from 1.
            self.etcd = EtcdServer(self.folder)
            self.etcd.start()
            self.etcd.wait_listening()
        return EtcdDirectory(
            [self.etcd.address], self.store, call_timeout_s=WAIT_S_MAX, patience_s=WAIT_S_MAX
        )

    def shut(self) -> None:
        if self.etcd is not None:
            self.etcd.kill()


KINDS = ["memory", "sqlite", pytest.param("etcd", marks=needs_etcd)]


@pytest.fixture(params=KINDS)
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Home]:
    made = Home(request.param, tmp_path)
    yield made
    made.shut()


own_log = pytest.mark.parametrize("home", ["memory", "sqlite"], indirect=True)
"""For homes that compact their own log; etcd's is compacted by whoever runs it, as
tests/cluster/test_etcd_directory.py does."""

own_time = pytest.mark.parametrize("home", ["memory", "sqlite"], indirect=True)
"""For homes whose time can be moved; the other file waits for the time of etcd to pass."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SkewedClock]:
    skewed = SkewedClock()
    skewed.install(monkeypatch)
    yield skewed


async def put(directory: Directory, key: str, value: bytes = b"", lease: int | None = None) -> int:
    done = await directory.txn([], [Put(key, value, lease)], [])
    assert done.ok
    return done.rev


async def take(directory: Directory, prefix: str, from_rev: int, until_rev: int) -> list[Changes]:
    """Watch from one revision until another has been delivered."""
    seen: list[Changes] = []
    async for changes in directory.watch(prefix, from_rev):
        seen.append(changes)
        if changes[-1].rev >= until_rev:
            return seen
    raise AssertionError("the watch ended")


def revisions(seen: list[Changes]) -> list[int]:
    return [changes[0].rev for changes in seen]


# ------------------------------------------------------------------------------ refusals


BAD_TRANSACTIONS: dict[str, tuple[Any, Any, Any, Any]] = {
    "empty key": ([], [Put("", b"")], [], []),
    "key too long": ([], [Put("k" * (KEY_BYTES_MAX + 1), b"")], [], []),
    "key with NUL": ([], [], ["a\0b"], []),
    "key with a lone surrogate": ([], [Put("\ud800", b"")], [], []),
    "key not a str": ([], [Put(b"k", b"")], [], []),  # type: ignore[arg-type]
    "value not bytes": ([], [Put("k", bytearray(1))], [], []),  # type: ignore[arg-type]
    "value too long": ([], [Put("k", b"x" * (VALUE_BYTES_MAX + 1))], [], []),
    "too many bytes": ([], [Put(k, b"x" * VALUE_BYTES_MAX) for k in "ab"], [], []),
    "too many operations": ([], [], [f"k{i}" for i in range(TXN_OPERATIONS_MAX + 1)], []),
    "negative revision": ([Compare("k", -1)], [Put("k", b"")], [], []),
    "key put twice": ([], [Put("k", b"1"), Put("k", b"2")], [], []),
    "key put and deleted": ([], [Put("k", b"1")], ["k"], []),
    "lease out of range": ([], [Put("k", b"1", 1 << 63)], [], []),
    "read of an empty key": ([], [], [], [""]),
}


@pytest.mark.parametrize("case", BAD_TRANSACTIONS)
def test_a_transaction_outside_the_bounds_is_refused_and_changes_nothing(
    home: Home, case: str
) -> None:
    async def main() -> None:
        async with home.open() as directory:
            with pytest.raises((ValueError, TypeError)):
                await directory.txn(*BAD_TRANSACTIONS[case])
            assert await directory.list("") == ([], 0)

    run(main)


def test_arguments_of_the_other_verbs_are_checked(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            for ttl_s in (0.0, -1.0, float("nan"), float("inf"), 1e9):
                with pytest.raises(ValueError, match="lives above 0"):
                    await directory.lease(ttl_s)
            for lease in (0, -1, 1 << 63):
                with pytest.raises(ValueError, match="number of a lease"):
                    await directory.keepalive(lease)
                with pytest.raises(ValueError, match="number of a lease"):
                    await directory.revoke(lease)
            for rev in (0, -1, 1 << 43):
                with pytest.raises(ValueError, match="revisions run from 1"):
                    directory.watch("", rev)
            with pytest.raises(TypeError):
                await directory.get(b"k")  # type: ignore[arg-type]
            with pytest.raises(ValueError, match="NUL"):
                await directory.list("\0")

    run(main)


def test_every_verb_of_a_directory_that_is_not_open_says_that_nothing_was_done(home: Home) -> None:
    async def every_verb_refuses(directory: Directory, why: str) -> None:
        verbs: list[Callable[[], Awaitable[object]]] = [
            lambda: directory.get("k"),
            lambda: directory.list(""),
            lambda: directory.txn([], [Put("k", b"")], []),
            lambda: directory.lease(1.0),
            lambda: directory.keepalive(1),
            lambda: directory.revoke(1),
            lambda: anext(directory.watch("", 1)),
        ]
        for verb in verbs:
            with pytest.raises(DirectoryUnavailable, match=why) as caught:
                await verb()
            assert caught.value.outcome == "not done"

    async def main() -> None:
        directory = home.open()
        await every_verb_refuses(directory, "has not been started")
        await directory.start()
        await directory.start()
        await directory.close()
        await directory.close()
        await every_verb_refuses(directory, "is closed")
        with pytest.raises(DirectoryError, match="was closed"):
            await directory.start()

    run(main)


def test_closing_ends_waiting_watches_with_an_error(home: Home) -> None:
    async def main() -> None:
        async with home.open() as other:
            directory = home.open()
            await directory.start()
            watches = [asyncio.create_task(_next(directory.watch("", 1))) for _ in range(3)]
            await directory.get("k")
            await directory.close()
            for watch in watches:
                with pytest.raises(DirectoryUnavailable):
                    await watch
            assert await put(other, "k") == 1

    async def _next(watch: Any) -> Changes:
        found: Changes = await anext(watch)
        return found

    run(main)


def test_closing_finishes_the_writes_that_were_asked_before(home: Home) -> None:
    async def main() -> None:
        async with home.open() as other:
            directory = home.open()
            await directory.start()
            tasks = [asyncio.create_task(put(directory, f"k{i}")) for i in range(1200)]
            await asyncio.sleep(0)
            await directory.close()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            done = [it for it in outcomes if isinstance(it, int)]
            refused = [it for it in outcomes if isinstance(it, DirectoryUnavailable)]
            assert len(done) + len(refused) == len(tasks)
            # What was refused is not there, what was done is, and nothing else.
            entries, rev = await other.list("")
            assert rev == len(done) == len(entries)
            assert sorted(entry.rev for entry in entries) == sorted(done)

    run(main)


def test_use_from_another_event_loop_is_refused(home: Home) -> None:
    directory = home.open()
    with asyncio.Runner() as first:
        first.run(directory.start())
        failures: list[BaseException] = []

        def elsewhere() -> None:
            verbs: list[Callable[[], Coroutine[Any, Any, object]]] = [
                lambda: directory.get("k"),
                directory.start,
            ]
            for verb in verbs:
                try:
                    asyncio.run(verb())
                except BaseException as error:
                    failures.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        first.run(directory.close())
    assert [type(failure) for failure in failures] == [DirectoryError, DirectoryError]
    assert all("event loop" in str(failure) for failure in failures)


# -------------------------------------------------------------------------- transactions


def test_an_absent_key_reads_as_none(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            assert await directory.get("k") is None
            assert await directory.list("") == ([], 0)

    run(main)


def test_a_refused_compare_changes_nothing_and_returns_what_is_there(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            assert await put(directory, "a", b"1") == 1
            assert await put(directory, "b", b"2") == 2
            refused = await directory.txn(
                [Compare("a", 1), Compare("b", 1), Compare("c", 0)],
                [Put("a", b"no"), Put("new", b"no")],
                ["b"],
                ["d", "a"],
            )
            a, b = Entry("a", b"1", 1), Entry("b", b"2", 2)
            assert refused == Txn(False, 2, {"a": a, "b": b, "c": None, "d": None})
            assert await directory.list("") == ([a, b], 2)

    run(main)


def test_revision_zero_compares_with_absence(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            assert (await directory.txn([Compare("k", 0)], [Put("k", b"1")], [])).ok
            assert not (await directory.txn([Compare("k", 0)], [Put("k", b"2")], [])).ok
            assert (await directory.txn([Compare("k", 1)], [], ["k"])).ok
            assert not (await directory.txn([Compare("k", 1)], [Put("k", b"3")], [])).ok
            assert await directory.txn([Compare("k", 0)], [Put("k", b"4")], []) == Txn(True, 3, {})

    run(main)


def test_one_transaction_is_one_revision(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            await put(directory, "old", b"0")
            done = await directory.txn([], [Put("a", b"1"), Put("b", b"2")], ["old", "absent"])
            assert done.rev == 2
            assert await directory.list("") == ([Entry("a", b"1", 2), Entry("b", b"2", 2)], 2)
            assert await anext(directory.watch("", 2)) == [
                Change("a", b"1", 2),
                Change("b", b"2", 2),
                Change("old", None, 2),
            ]

    run(main)


def test_a_transaction_that_changes_nothing_leaves_the_revision(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            await put(directory, "k", b"1")
            entry = Entry("k", b"1", 1)
            assert await directory.txn([], [], []) == Txn(True, 1, {})
            assert await directory.txn([], [], ["absent"]) == Txn(True, 1, {})
            assert await directory.txn([Compare("k", 1)], [], [], ["k", "x"]) == Txn(
                True, 1, {"k": entry, "x": None}
            )
            assert await directory.txn([Compare("k", 9)], [], []) == Txn(False, 1, {"k": entry})

    run(main)


def test_reads_of_a_transaction_see_its_own_changes(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            await directory.txn([], [Put("a", b"1"), Put("b", b"1"), Put("c", b"1")], [])
            done = await directory.txn([Compare("a", 1)], [Put("a", b"2")], ["b"], ["a", "b", "c"])
            assert done == Txn(
                True, 2, {"a": Entry("a", b"2", 2), "b": None, "c": Entry("c", b"1", 1)}
            )

    run(main)


def test_a_list_is_sorted_and_has_exactly_the_keys_under_the_prefix(home: Home) -> None:
    keys = ["a", "a/", "a/1", "a/\U0010ffff", "a0", "aé", "b", "a/\ue000", "a/\ud7ff", "\U0010ffff"]

    async def main() -> None:
        async with home.open() as directory:
            await directory.txn([], [Put(key, b"") for key in keys], [])
            for prefix in ["", "a", "a/", "a/\U0010ffff", "\U0010ffff", "a/\ud7ff", "c", "é"]:
                entries, rev = await directory.list(prefix)
                expected = sorted(key for key in keys if key.startswith(prefix))
                assert [entry.key for entry in entries] == expected
                assert rev == 1

    run(main)


def test_values_come_back_unchanged_up_to_the_limit(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            for value in (b"", b"\0", bytes(range(256)), b"x" * VALUE_BYTES_MAX):
                await put(directory, "k", value)
                entry = await directory.get("k")
                assert entry is not None and entry.value == value

    run(main)


def test_of_racing_writers_one_wins_each_revision(home: Home) -> None:
    writers, raises_each, keys = 6, 15, ["r/a", "r/b"]

    async def raise_epoch(directory: Directory, key: str) -> int:
        """Raise the number under a key by one; return how often it was refused."""
        for refused in itertools.count():
            entry = await directory.get(key)
            rev, epoch = (0, 0) if entry is None else (entry.rev, int(entry.value))
            if (await directory.txn([Compare(key, rev)], [Put(key, b"%d" % (epoch + 1))], [])).ok:
                return refused
        raise AssertionError

    async def writer(directory: Directory, number: int) -> int:
        return sum(
            [await raise_epoch(directory, keys[(number + i) % 2]) for i in range(raises_each)]
        )

    async def main() -> None:
        async with home.open() as one, home.open() as other:
            refused = await asyncio.gather(
                *(writer((one, other)[number % 2], number) for number in range(writers))
            )
            entries, rev = await one.list("r/")
            assert sum(int(entry.value) for entry in entries) == writers * raises_each == rev
            # Without a refusal the race did not happen, and this would prove nothing.
            assert sum(refused) > 0
            seen = await take(other, "", 1, rev)
            assert revisions(seen) == list(range(1, rev + 1))
            for key in keys:
                values = [int(it.value or b"") for [it] in seen if it.key == key]
                assert values == list(range(1, len(values) + 1))

    run(main)


def test_a_burst_of_transactions_is_decided_one_by_one(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            await put(directory, "taken")
            dead = await directory.lease(60)
            await directory.revoke(dead)

            async def one(number: int) -> str:
                if number % 10 == 3:
                    claim = [Put(f"k{number}", b""), Put("taken", b"")]
                    return str((await directory.txn([Compare("taken", 0)], claim, [])).ok)
                if number % 10 == 7:
                    try:
                        await put(directory, f"k{number}", b"", dead)
                    except LeaseGone as error:
                        return f"lease {error.lease == dead}"
                return str(await put(directory, f"k{number}"))

            answers = await asyncio.gather(*(one(number) for number in range(200)))
            assert answers[3::10] == ["False"] * 20
            assert answers[7::10] == ["lease True"] * 20
            done = sorted(int(answer) for answer in answers if answer.isdigit())
            assert done == list(range(2, 162))
            entries, rev = await directory.list("k")
            assert rev == 161
            assert {entry.key: entry.rev for entry in entries} == {
                f"k{number}": int(answer)
                for number, answer in enumerate(answers)
                if answer.isdigit()
            }

    run(main)


def test_a_transaction_may_be_begun_before_it_has_a_task(home: Home) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with home.open() as directory:
            begun: asyncio.Future[Any] = loop.create_future()
            swapping = directory.txn([Compare("k", 0)], [Put("k", b"1")], [])

            def begin() -> None:
                assert asyncio.current_task() is None
                begun.set_result(swapping.send(None))

            loop.call_soon(begin)
            await driver._go_on(swapping, await begun)  # type: ignore[arg-type]
            assert await directory.get("k") == Entry("k", b"1", 1)

    run(main)


def test_a_cancelled_transaction_is_done_entirely_or_not_at_all(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            for turn in range(20):
                task = asyncio.create_task(
                    directory.txn([], [Put(f"{turn}/a", b""), Put(f"{turn}/b", b"")], [])
                )
                for _ in range(turn % 4):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await put(directory, "after")
            keys = {entry.key for entry in (await directory.list(""))[0]}
            for turn in range(20):
                assert (f"{turn}/a" in keys) == (f"{turn}/b" in keys)

    run(main)


# ------------------------------------------------------------------------------- watches


def test_a_watch_delivers_every_revision_once_and_in_order_while_others_write(home: Home) -> None:
    async def main() -> None:
        async with home.open() as reader, home.open() as one, home.open() as other:
            last = 300
            watching = [
                asyncio.create_task(take(directory, "", 1, last)) for directory in (reader, one)
            ]

            async def write(directory: Directory, half: int) -> None:
                for number in range(last // 2):
                    await put(directory, f"{half}/{number}", b"%d" % number)

            await asyncio.gather(write(one, 0), write(other, 1))
            for seen in await asyncio.gather(*watching):
                assert revisions(seen) == list(range(1, last + 1))
                for half in (0, 1):
                    mine = [it.value for [it] in seen if it.key.startswith(f"{half}/")]
                    assert mine == [b"%d" % number for number in range(last // 2)]

    run(main)


def test_a_watch_sees_only_its_prefix(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            await put(directory, "b/1")
            await directory.txn([], [Put("a/1", b"x"), Put("b/2", b"y"), Put("b0", b"z")], [])
            await put(directory, "c")
            await directory.txn([], [], ["b/1"])
            assert await take(directory, "b/", 1, 4) == [
                [Change("b/1", b"", 1)],
                [Change("b/2", b"y", 2)],
                [Change("b/1", None, 4)],
            ]

    run(main)


def test_a_watch_resumes_after_the_last_revision_it_delivered(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            for number in range(50):
                await put(directory, f"k/{number % 7}", b"%d" % number)
            seen: list[Changes] = []
            next_rev = 1
            while next_rev <= 50:
                watch = directory.watch("k/", next_rev)
                for _ in range(7):
                    if next_rev <= 50:
                        seen.append(await anext(watch))
                        next_rev = seen[-1][-1].rev + 1
            assert revisions(seen) == list(range(1, 51))

    run(main)


def test_a_watch_may_begin_in_the_future(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            task = asyncio.create_task(take(directory, "", 5, 5))
            for number in range(5):
                assert not task.done()
                await put(directory, f"k{number}")
            assert await task == [[Change("k4", b"", 5)]]

    run(main)


def test_cancelling_a_wait_loses_nothing(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory, home.open() as writer:
            watch = directory.watch("", 1)
            seen: list[Changes] = []
            cancelled = 0

            async def write() -> None:
                for number in range(200):
                    await put(writer, f"k{number}")

            writing = asyncio.create_task(write())
            for turn in itertools.count():
                if seen and seen[-1][-1].rev == 200:
                    break
                waiting = asyncio.ensure_future(anext(watch))
                for _ in range(turn % 5):
                    await asyncio.sleep(0)
                if turn % 3:
                    waiting.cancel()
                try:
                    seen.append(await waiting)
                except asyncio.CancelledError:
                    cancelled += 1
            await writing
            assert revisions(seen) == list(range(1, 201))
            assert cancelled > 0

    run(main)


def test_tasks_that_share_a_watch_get_each_revision_once_between_them(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            watch = directory.watch("", 1)
            seen: list[Changes] = []

            async def follow() -> None:
                while len(seen) < 100:
                    seen.append(await anext(watch))

            async with asyncio.TaskGroup() as tasks:
                followers = [tasks.create_task(follow()) for _ in range(3)]
                while not all(it.done() for it in followers):
                    # More than is waited for, so that none of them is left waiting.
                    await put(directory, "k")
            assert sorted(revisions(seen)) == list(range(1, len(seen) + 1))

    run(main)


def test_a_watch_catches_up_on_twenty_thousand_revisions(home: Home) -> None:
    behind = 20_000

    async def main() -> None:
        async with home.open() as directory, home.open() as writer:
            for start in range(0, behind, 1000):
                await asyncio.gather(
                    *(put(writer, f"k{i % 100}", b"%d" % i) for i in range(start, start + 1000))
                )
            watching = asyncio.create_task(take(directory, "", 1, behind + 50))
            for number in range(50):
                await put(writer, f"late{number}")
            seen = await watching
            assert revisions(seen) == list(range(1, behind + 51))
            assert sorted(int(it.value or b"") for [it] in seen[:behind]) == list(range(behind))

    run(main)


@own_log
def test_a_compacted_revision_is_refused_and_the_rest_can_be_watched(home: Home) -> None:
    async def main() -> None:
        async with home.open(log_revisions_max=300) as directory:
            for start in range(0, 3000, 500):
                await asyncio.gather(*(put(directory, f"k{i}") for i in range(start, start + 500)))
            watch = directory.watch("", 1)
            for _ in range(2):
                with pytest.raises(Compacted) as caught:
                    await anext(watch)
            gone_rev = caught.value.rev
            # The limit may be exceeded for a while, but not by more than is documented.
            assert 3000 - 300 - 1000 <= gone_rev <= 3000 - 300
            with pytest.raises(Compacted):
                await anext(directory.watch("", gone_rev))
            seen = await take(directory, "", gone_rev + 1, 3000)
            assert revisions(seen) == list(range(gone_rev + 1, 3001))
            entries, rev = await directory.list("")
            assert (len(entries), rev) == (3000, 3000)
            task = asyncio.create_task(take(directory, "", rev + 1, rev + 1))
            await put(directory, "k0", b"new")
            assert await task == [[Change("k0", b"new", 3001)]]

    run(main)


@own_log
def test_the_log_is_bounded_in_bytes_but_always_has_the_last_revision(home: Home) -> None:
    async def main() -> None:
        async with home.open(log_bytes_max=10_000) as directory:
            for start in range(0, 1024, 256):
                await asyncio.gather(
                    *(put(directory, f"k{i}", b"x" * 1000) for i in range(start, start + 256))
                )
            with pytest.raises(Compacted) as caught:
                await anext(directory.watch("", 1))
            assert 1024 - 600 <= caught.value.rev < 1024
            [change] = await anext(directory.watch("", 1024))
            assert change.rev == 1024

    run(main)


@own_log
def test_compaction_never_leaves_a_part_of_a_revision(home: Home) -> None:
    async def main() -> None:
        for log_bytes_max in range(3000, 3060, 7):
            home.store = f"store-{next(_numbers)}"
            async with home.open(log_bytes_max=log_bytes_max) as directory:
                puts = [Put(key, b"x" * 20) for key in ("a", "b", "c")]
                await asyncio.gather(*(directory.txn([], puts, []) for _ in range(256)))
                with pytest.raises(Compacted) as caught:
                    await anext(directory.watch("", 1))
                seen = await take(directory, "", caught.value.rev + 1, 256)
                assert revisions(seen) == list(range(caught.value.rev + 1, 257))
                assert all(len(changes) == 3 for changes in seen)

    run(main)


@own_log
def test_the_smallest_log_still_serves_those_who_keep_up(home: Home) -> None:
    async def main() -> None:
        async with home.open(log_revisions_max=1) as directory:
            watch = directory.watch("a/", 1)
            for number in range(600):
                await directory.txn([], [Put("a/k", b"%d" % number), Put("b", b"")], [])
                assert await anext(watch) == [Change("a/k", b"%d" % number, number + 1)]

    run(main)


@own_log
def test_a_quiet_watch_that_is_cancelled_now_and_then_does_not_fall_out_of_the_log(
    home: Home,
) -> None:
    async def main() -> None:
        async with home.open(log_revisions_max=400) as directory:
            watch = directory.watch("quiet/", 1)
            for start in range(0, 4000, 50):
                waiting = asyncio.ensure_future(anext(watch))
                await asyncio.gather(*(put(directory, f"k{i}") for i in range(start, start + 50)))
                waiting.cancel()
                assert isinstance(
                    (await asyncio.gather(waiting, return_exceptions=True))[0],
                    asyncio.CancelledError,
                )
            rev = await put(directory, "quiet/1", b"heard")
            assert await anext(watch) == [Change("quiet/1", b"heard", rev)]

    run(main)


# -------------------------------------------------------------------------------- leases


def test_keys_of_a_lease_vanish_when_it_runs_out_as_a_revision_that_watchers_see(
    home: Home,
) -> None:
    ttl_s = 0.25

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with home.open() as directory, home.open() as watcher:
            before_s = loop.time()
            lease = await directory.lease(ttl_s)
            await directory.txn([], [Put("n/1", b"", lease), Put("n/2", b"", lease)], [])
            await put(directory, "n/3")
            watch = watcher.watch("n/", 1)
            await anext(watch)
            await anext(watch)
            # Nobody asks for anything: the directory ends the lease by itself.
            assert await anext(watch) == [Change("n/1", None, 3), Change("n/2", None, 3)]
            assert loop.time() - before_s >= ttl_s
            assert [entry.key for entry in (await directory.list(""))[0]] == ["n/3"]
            assert not await directory.keepalive(lease)
            assert (await directory.list(""))[1] == 3

    run(main)


@own_time
def test_a_lease_lives_as_long_as_it_is_kept_alive(home: Home, clock: SkewedClock) -> None:
    async def main() -> None:
        async with home.open() as directory:
            lease = await directory.lease(1000)
            await put(directory, "n", b"", lease)
            for _ in range(5):
                clock.ahead_s += 900
                assert await directory.keepalive(lease)
                assert await directory.get("n") == Entry("n", b"", 1, lease)
            clock.ahead_s += 1001
            assert not await directory.keepalive(lease)
            assert await directory.get("n") is None
            with pytest.raises(LeaseGone) as caught:
                await directory.txn([], [Put("other", b""), Put("n", b"", lease)], [])
            assert caught.value.lease == lease
            assert await directory.list("") == ([], 2)

    run(main)


@own_time
def test_whoever_writes_ends_the_leases_that_have_run_out_first(
    home: Home, clock: SkewedClock
) -> None:
    async def main() -> None:
        async with home.open() as directory:
            lease = await directory.lease(1000)
            await put(directory, "n", b"", lease)
            clock.ahead_s = 2000
            done = await directory.txn([Compare("n", 0)], [Put("n", b"successor")], [])
            assert done == Txn(True, 3, {})
            assert await take(directory, "", 2, 3) == [
                [Change("n", None, 2)],
                [Change("n", b"successor", 3)],
            ]

    run(main)


def test_revoking_a_lease_deletes_its_keys_at_once(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            lease, other = await directory.lease(600), await directory.lease(600)
            puts = [Put("a", b"", lease), Put("b", b"", lease), Put("c", b"", other)]
            await directory.txn([], puts, [])
            await directory.revoke(lease)
            await directory.revoke(lease)
            await directory.revoke(9999)
            assert await directory.list("") == ([Entry("c", b"", 1, other)], 2)
            assert not await directory.keepalive(lease)
            assert await directory.keepalive(other)

    run(main)


def test_a_key_belongs_to_the_lease_it_was_last_put_with(home: Home) -> None:
    async def main() -> None:
        async with home.open() as directory:
            first, second = await directory.lease(600), await directory.lease(600)
            await directory.txn([], [Put(key, b"", first) for key in "abcd"], [])
            await directory.txn([], [Put("a", b"1"), Put("b", b"1", second)], ["c"])
            await put(directory, "c", b"2")
            await directory.revoke(first)
            assert [entry.key for entry in (await directory.list(""))[0]] == ["a", "b", "c"]
            await directory.revoke(second)
            assert [entry.key for entry in (await directory.list(""))[0]] == ["a", "c"]

    run(main)


def test_the_number_of_a_lease_is_never_used_again(home: Home) -> None:
    async def main() -> None:
        seen: set[int] = set()
        async with home.open():
            for _ in range(20):
                async with home.open() as directory:
                    lease = await directory.lease(600)
                    assert lease not in seen
                    seen.add(lease)
                    await directory.revoke(lease)

    run(main)


@own_time
def test_a_lease_without_keys_ends_without_a_revision(home: Home, clock: SkewedClock) -> None:
    async def main() -> None:
        async with home.open() as directory:
            lease = await directory.lease(10)
            clock.ahead_s = 11
            assert not await directory.keepalive(lease)
            assert await directory.list("") == ([], 0)

    run(main)


# ------------------------------------------------------------------------ against a model


class AgainstAModel(RuleBasedStateMachine):
    """Any sequence of verbs does what it does to a dict; the log replays to the same dict."""

    kind = ""

    keys = st.sampled_from(["a", "a/1", "a/2", "b", "é", "\U0010ffff"])
    values = st.binary(max_size=4)
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.clock = SkewedClock()
        self.clock.install(self.patch)
        self.runner = asyncio.Runner()
        self.model: dict[str, Entry] = {}
        self.deadlines_s: dict[int, float] = {}
        self.leases_known: dict[int, float] = {}
        self.rev = 0
        self.log: list[Changes] = []
        self.home = Home(self.kind, Path(self.folder.name))

    @initialize()
    def open(self) -> None:
        self.directories = [self.home.open(), self.home.open()]
        for directory in self.directories:
            self.run(directory.start())

    def run(self, verb: Any) -> Any:
        return self.runner.run(asyncio.wait_for(verb, WAIT_S_MAX))

    def teardown(self) -> None:
        for directory in getattr(self, "directories", []):
            if self.rev:
                assert self.run(take(directory, "", 1, self.rev)) == self.log
        for directory in getattr(self, "directories", []):
            self.run(directory.close())
        self.runner.close()
        self.home.shut()
        self.patch.undo()
        self.folder.cleanup()

    def commit(self, puts: list[Put], deletes: list[str]) -> None:
        deletes = [key for key in deletes if key in self.model]
        if not puts and not deletes:
            return
        self.rev += 1
        changes = [Change(it.key, it.value, self.rev) for it in puts]
        changes += [Change(key, None, self.rev) for key in deletes]
        for it in puts:
            self.model[it.key] = Entry(it.key, it.value, self.rev, it.lease)
        for key in deletes:
            del self.model[key]
        self.log.append(changes)

    def end(self, lease: int) -> None:
        del self.deadlines_s[lease]
        self.commit([], sorted(key for key, it in self.model.items() if it.lease == lease))

    @rule(
        which=st.integers(0, 1),
        compared=st.dictionaries(keys, st.booleans(), max_size=2),
        put_keys=st.dictionaries(keys, values, max_size=3),
        deletes=st.sets(keys, max_size=2),
        reads=st.sets(keys, max_size=3),
        lease=st.none() | leases,
    )
    def txn(
        self,
        which: int,
        compared: dict[str, bool],
        put_keys: dict[str, bytes],
        deletes: set[str],
        reads: set[str],
        lease: int | None,
    ) -> None:
        def rev_of(key: str) -> int:
            return self.model[key].rev if key in self.model else 0

        puts = [Put(key, value, lease) for key, value in put_keys.items()]
        gone = sorted(deletes - put_keys.keys())
        compares = [Compare(key, rev_of(key) + (not right)) for key, right in compared.items()]
        verb = self.directories[which].txn(compares, puts, gone, sorted(reads))
        if not all(compared.values()):
            expected = {key: self.model.get(key) for key in compared.keys() | reads}
            assert self.run(verb) == Txn(False, self.rev, expected)
        elif puts and lease is not None and lease not in self.deadlines_s:
            with pytest.raises(LeaseGone):
                self.run(verb)
        else:
            self.commit(puts, gone)
            expected = {key: self.model.get(key) for key in reads}
            assert self.run(verb) == Txn(True, self.rev, expected)

    @rule(target=leases, which=st.integers(0, 1), ttl_s=st.sampled_from([1000.0, 5000.0]))
    def grant(self, which: int, ttl_s: float) -> int:
        lease: int = self.run(self.directories[which].lease(ttl_s))
        assert lease not in self.leases_known
        self.leases_known[lease] = ttl_s
        self.deadlines_s[lease] = self.clock.ahead_s + ttl_s
        return lease

    @rule(which=st.integers(0, 1), lease=leases)
    def keepalive(self, which: int, lease: int) -> None:
        kept = self.run(self.directories[which].keepalive(lease))
        assert kept == (lease in self.deadlines_s)
        if kept:
            self.deadlines_s[lease] = self.clock.ahead_s + self.leases_known[lease]

    @rule(which=st.integers(0, 1), lease=leases)
    def revoke(self, which: int, lease: int) -> None:
        self.run(self.directories[which].revoke(lease))
        if lease in self.deadlines_s:
            self.end(lease)

    @precondition(lambda self: self.kind != "etcd")
    @rule(which=st.integers(0, 1), by_s=st.sampled_from([100.0, 950.0, 6000.0]))
    def time_passes(self, which: int, by_s: float) -> None:
        self.clock.ahead_s += by_s
        # The first look ends what is due. Leases due at one look end in the order granted.
        self.run(self.directories[which].revoke(1 << 40))
        for lease in sorted(it for it, at in self.deadlines_s.items() if at <= self.clock.ahead_s):
            self.end(lease)

    @rule(which=st.integers(0, 1), key=keys)
    def get(self, which: int, key: str) -> None:
        assert self.run(self.directories[which].get(key)) == self.model.get(key)

    @rule(which=st.integers(0, 1), from_rev=st.integers(1, 30), prefix=keys | st.just(""))
    def watch(self, which: int, from_rev: int, prefix: str) -> None:
        expected = [
            found
            for changes in self.log[from_rev - 1 :]
            if (found := [it for it in changes if it.key.startswith(prefix)])
        ]
        if expected:
            until_rev = expected[-1][0].rev
            seen = self.run(take(self.directories[which], prefix, from_rev, until_rev))
            assert seen == expected

    @invariant()
    def the_list_is_the_model(self) -> None:
        for directory in getattr(self, "directories", []):
            expected = ([self.model[key] for key in sorted(self.model)], self.rev)
            assert self.run(directory.list("")) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_verbs_agrees_with_a_model(kind: str) -> None:
    machine = type(f"AgainstAModel_{kind}", (AgainstAModel,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@given(st.text(max_size=3), st.text(max_size=3))
def test_a_string_lies_below_the_end_of_a_prefix_exactly_if_it_begins_with_it(
    prefix: str, text: str
) -> None:
    end = prefix_end(prefix)
    inside = prefix <= text and (end is None or text < end)
    assert inside == text.startswith(prefix)
    assert prefix_end("\ud7ff") == "\ue000"
    assert prefix_end("a\U0010ffff") == "b"
    assert prefix_end("\U0010ffff") is None


# ------------------------------------------------------------------- errors, URLs, names


@pytest.mark.parametrize(
    "error",
    [
        DirectoryError("what", url="u"),
        DirectoryUnavailable("what", url="u", holder_pid=7),
        OutcomeUnknown("what", url="u"),
        LeaseGone(5, url="u"),
        Compacted(9, url="u"),
    ],
)
def test_errors_survive_pickling(error: DirectoryError) -> None:
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)
    assert twin.outcome == ("unknown" if isinstance(error, OutcomeUnknown) else "not done")


def test_a_url_names_its_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path.resolve()
    assert isinstance(open_directory(None), MemoryDirectory)
    assert open_directory("memory://").url == "memory://"
    assert open_directory("memory://x").url == "memory://x"
    for url in (f"sqlite:///{here}/c.db", str(here / "c.db"), here / "c.db", "sqlite:///c.db"):
        directory = open_directory(url)
        assert isinstance(directory, SqliteDirectory)
        assert directory.url == f"sqlite:///{here}/c.db"
        assert open_directory(directory) is directory
        assert open_directory(directory.url).url == directory.url
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://x", "unknown scheme.*memory://.*sqlite:///"),
        ("etcd://", "address of a member"),
        ("etcd://h:port", "host:port"),
        ("etcd://h/a%20b", "prefix of keys"),
        ("etcd://h?colour=red", "no option colour; known are ca, cert"),
        ("etcd://h?cert=c", "come together"),
        ("etcd://h?tls=/folder&ca=c", "takes tls=FOLDER, or"),
        ("etcd://h?timeout=0", "timeout=0.0 must be seconds"),
        ("etcd://u:secret@h?password_file=/none/such", "etcd directory is wrong: .*/none/such"),
        ("sqlite://", "no path"),
        ("sqlite:///", "no path"),
        ("sqlite://cluster.db", "no path"),
        (":memory:", "memory://"),
        ("", "names no directory"),
    ],
)
def test_a_url_that_names_no_home_is_refused_with_those_that_do(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        open_directory(url)


def test_a_named_directory_in_memory_lives_while_it_is_open(tmp_path: Path) -> None:
    async def main() -> None:
        async with MemoryDirectory("shared") as one, MemoryDirectory() as private:
            await put(one, "k")
            async with MemoryDirectory("shared") as other, MemoryDirectory() as another:
                assert await other.get("k") is not None
                assert await private.get("k") is None
                await put(private, "p")
                assert await another.get("p") is None
        async with MemoryDirectory("shared") as fresh:
            assert await fresh.list("") == ([], 0)

    run(main)


def test_a_named_directory_in_memory_serves_one_event_loop() -> None:
    first, second = MemoryDirectory("one-loop"), MemoryDirectory("one-loop")
    with asyncio.Runner() as runner:
        runner.run(first.start())
        with asyncio.Runner() as other, pytest.raises(DirectoryError, match="event loop"):
            other.run(second.start())
        runner.run(first.close())


def test_an_sqlite_directory_outlives_its_processes(tmp_path: Path) -> None:
    async def write() -> None:
        async with SqliteDirectory(tmp_path / "new" / "c.db") as directory:
            await put(directory, "k", b"kept")

    async def read() -> None:
        async with SqliteDirectory(tmp_path / "new" / "c.db") as directory:
            assert await directory.list("") == ([Entry("k", b"kept", 1)], 1)
            assert await put(directory, "k", b"more") == 2

    run(write)
    run(read)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new" / "c.db").stat().st_mode & 0o777 == 0o600
