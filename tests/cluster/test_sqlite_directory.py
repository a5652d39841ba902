# ruff: noqa: ASYNC240
# Files are looked at between two steps, when nobody waits for the loop.
"""The SQLite directory under real processes: races, kills, stops, full disks, strange files.

The child processes run this very file; what they do is in `CHILDREN`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from migrate.shell.directories import (
    Change,
    Changes,
    Compare,
    DirectoryError,
    DirectoryUnavailable,
    Entry,
    OutcomeUnknown,
    Put,
    SqliteDirectory,
)
from migrate.shell.directories import sqlite as sqlite_home
from migrate.shell.directories.hints import hints_folder

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("error")]

ROOT = Path(__file__).resolve().parents[2]

WAIT_S_MAX = 60.0
"""Bound of every wait in these tests: for a fault, not for an expectation."""

T = TypeVar("T")


def run(main: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(WAIT_S_MAX):
            result = await main()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"
        return result

    return asyncio.run(bounded())


async def put(directory: SqliteDirectory, key: str, value: bytes = b"") -> int:
    done = await directory.txn([], [Put(key, value)], [])
    assert done.ok
    return done.rev


async def raise_epoch(directory: SqliteDirectory, key: str) -> int:
    """Raise the number under a key by one, however often it takes; return the revision."""
    while True:
        entry = await directory.get(key)
        rev, epoch = (0, 0) if entry is None else (entry.rev, int(entry.value))
        done = await directory.txn([Compare(key, rev)], [Put(key, b"%d" % (epoch + 1))], [])
        if done.ok:
            return done.rev


async def take(directory: SqliteDirectory, from_rev: int, until_rev: int) -> list[Changes]:
    seen: list[Changes] = []
    async for changes in directory.watch("", from_rev):
        seen.append(changes)
        if changes[-1].rev >= until_rev:
            return seen
    raise AssertionError("the watch ended")


# ----------------------------------------------------------------------- child processes


def say(text: object) -> None:
    print(text, flush=True)


async def child_cas(path: str, times: str) -> None:
    """Raise two epochs alternately, as soon as told to."""
    async with SqliteDirectory(path, patience_s=WAIT_S_MAX) as directory:
        say("ready")
        sys.stdin.readline()
        for number in range(int(times)):
            await raise_epoch(directory, "ab"[number % 2])
        say("done")


async def child_pairs(path: str) -> None:
    """Write the same number under two keys, for ever, and say each that was acknowledged."""
    async with SqliteDirectory(path) as directory:
        for number in range(1, 1 << 30):
            value = b"%d" % number
            done = await directory.txn([], [Put("x", value), Put("y", value)], [])
            say(f"{number} {done.rev}")


async def child_wedge(path: str, where: str, how: str) -> None:
    """Stop or kill itself, or fork and go to sleep, at a chosen point of a transaction."""
    directory = SqliteDirectory(path)
    await directory.start()
    await put(directory, "acknowledged")
    say("acknowledged")

    def wedge() -> None:
        if how == "fork":
            if os.fork() == 0:
                say(f"forked {os.getpid()}")
                signal.pause()
            # The parent goes nowhere either: it is killed inside the transaction.
            threading.Event().wait()
        # To this very thread: a stop that another thread receives lets this one run on a little.
        signal.pthread_kill(
            threading.get_ident(), signal.SIGKILL if how == "kill" else signal.SIGSTOP
        )

    real_transact, real_commit = sqlite_home._Engine._transact, sqlite_home._Engine._commit

    def transact(engine: Any, group: Any) -> Any:
        if where == "before":
            wedge()
        answer = real_transact(engine, group)
        if where == "after":
            wedge()
        return answer

    def commit(engine: Any) -> None:
        if where == "inside":
            wedge()
        real_commit(engine)

    sqlite_home._Engine._transact = transact  # type: ignore[method-assign, assignment]
    sqlite_home._Engine._commit = commit  # type: ignore[method-assign, assignment]
    await directory.txn([], [Put("half/1", b"x" * 50_000), Put("half/2", b"")], [])
    say("went on")
    sys.stdin.readline()
    await directory.close()


async def child_small_files(path: str, limit_bytes: str) -> None:
    """Write with a limit on the size of files: not even the WAL can grow beyond it."""
    async with SqliteDirectory(path) as directory:
        await put(directory, "before")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), resource.RLIM_INFINITY))
        try:
            await directory.txn([], [Put("big/1", b"x" * 900_000), Put("big/2", b"")], [])
        except DirectoryError as error:
            say(f"{type(error).__name__} {error.outcome}")
        else:
            say("done")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        say([entry.key for entry in (await directory.list(""))[0]])
        # The same transaction again settles it.
        done = await directory.txn(
            [Compare("big/1", 0)], [Put("big/1", b"x" * 900_000), Put("big/2", b"")], []
        )
        say(f"{done.ok} {done.rev}")


async def child_start(path: str) -> None:
    say("ready")
    sys.stdin.readline()
    async with SqliteDirectory(path) as directory:
        say(await raise_epoch(directory, "a"))


async def child_foreign_lock(path: str) -> None:
    """Do what an sqlite3 shell does that was left open in a transaction."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    say("locked")
    sys.stdin.readline()
    connection.execute("ROLLBACK")
    connection.close()


async def child_leased(path: str) -> None:
    """Hold a key under a lease, and keep it alive until killed."""
    async with SqliteDirectory(path) as directory:
        lease = await directory.lease(1.0)
        await directory.txn([], [Put("node/1", b"", lease)], [])
        say("leased")
        while True:
            await directory.keepalive(lease)
            await asyncio.sleep(0.1)


CHILDREN: dict[str, Callable[..., Awaitable[None]]] = {
    "cas": child_cas,
    "pairs": child_pairs,
    "wedge": child_wedge,
    "small_files": child_small_files,
    "start": child_start,
    "foreign_lock": child_foreign_lock,
    "leased": child_leased,
}


class Child:
    """One child process; its lines are read with a bound on the time."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self._extra: list[int] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    async def line(self) -> str:
        """Return the next line, "" at the end of the output."""
        assert self.process.stdout is not None
        return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    async def stopped(self) -> None:
        """Wait until the process has been stopped by a signal, or has ended."""
        how = os.WSTOPPED | os.WEXITED | os.WNOWAIT
        found = await asyncio.to_thread(os.waitid, os.P_PID, self.pid, how)
        assert found is not None and found.si_code == os.CLD_STOPPED

    async def ended(self) -> int:
        return await asyncio.to_thread(self.process.wait, WAIT_S_MAX)

    def also_kill(self, pid: int) -> None:
        self._extra.append(pid)

    def kill(self) -> None:
        for pid in self._extra:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            # What was written to a child that is gone cannot be flushed.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


Spawn = Callable[..., Child]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    children: list[Child] = []

    def start(*arguments: object) -> Child:
        children.append(Child(*map(str, arguments)))
        return children[-1]

    yield start
    for child in children:
        child.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cluster.db"


def check_file(path: Path) -> None:
    """The database is sound: SQLite's own check, and the log agrees with the entries."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        replayed: dict[str, tuple[bytes, int]] = {}
        revs = []
        for row, key, value in connection.execute("SELECT id, key, value FROM log ORDER BY id"):
            revs.append(row >> sqlite_home._SEQ_BITS)
            if value is None:
                del replayed[key]
            else:
                replayed[key] = (value, revs[-1])
        rows = connection.execute("SELECT key, value, rev FROM entry").fetchall()
        assert {key: (value, rev) for key, value, rev in rows} == replayed
        assert sorted(set(revs)) == list(range(1, (revs[-1] if revs else 0) + 1))


# ----------------------------------------------------------------------- kills and stops


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_a_process_killed_in_a_transaction_leaves_no_lock_and_nothing_half_done(
    path: Path, spawn: Spawn, where: str
) -> None:
    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            child = spawn("wedge", path, where, "kill")
            assert await child.line() == "acknowledged"
            assert await child.ended() == -signal.SIGKILL
            rev = await put(directory, "next")
            keys = {entry.key for entry in (await directory.list(""))[0]}
            if where == "after":
                # It was committed, though nobody was told.
                assert keys == {"acknowledged", "half/1", "half/2", "next"}
                assert rev == 3
            else:
                assert keys == {"acknowledged", "next"}
                assert rev == 2
            seen = await take(directory, 1, rev)
            assert [changes[0].rev for changes in seen] == list(range(1, rev + 1))

    run(main)
    check_file(path)


def test_acknowledged_transactions_survive_kills_at_any_instant(path: Path, spawn: Spawn) -> None:
    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            for acknowledged_before_kill in (1, 2, 7, 30, 61):
                _, rev_before = await directory.list("")
                child = spawn("pairs", path)
                for _ in range(acknowledged_before_kill):
                    line = await child.line()
                child.process.kill()
                assert await child.ended() == -signal.SIGKILL
                while rest := await child.line():
                    line = rest
                number, rev = map(int, line.split())
                entries, rev_now = await directory.list("")
                assert {entry.key for entry in entries} >= {"x", "y"}
                x, y = entries[-2], entries[-1]
                # Both or none, what was acknowledged and at most the one after it.
                assert x.value == y.value and x.rev == y.rev == rev_now
                assert int(x.value) - number == rev_now - rev
                assert rev_now - rev in (0, 1)
                assert rev == rev_before + number
                await put(directory, "between")

    run(main)
    check_file(path)


@pytest.mark.parametrize("end", ["continue", "kill"])
@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_behind_a_stopped_holder_writers_are_refused_with_its_name_and_readers_go_on(
    path: Path, spawn: Spawn, where: str, end: str
) -> None:
    async def main() -> None:
        async with (
            SqliteDirectory(path, patience_s=0.3) as one,
            SqliteDirectory(path, patience_s=0.3) as other,
        ):
            child = spawn("wedge", path, where, "stop")
            assert await child.line() == "acknowledged"
            await child.stopped()
            writes = [
                asyncio.create_task(directory.txn([], [Put(f"k{i}", b"")], []))
                for i, directory in enumerate((one, one, other))
            ]
            # Readers are served while the writers wait, and after they gave up.
            while not all(write.done() for write in writes):
                assert await one.get("acknowledged") == Entry("acknowledged", b"", 1)
            for write in writes:
                with pytest.raises(DirectoryUnavailable) as caught:
                    await write
                assert caught.value.holder_pid == child.pid
                assert f"process {child.pid}, which is stopped" in str(caught.value)
            with pytest.raises(DirectoryUnavailable):
                await one.lease(10)
            committed = where == "after"
            entries, rev = await other.list("")
            assert (len(entries), rev) == ((3, 2) if committed else (1, 1))
            assert len(await take(other, 1, rev)) == rev

            if end == "kill":
                child.process.kill()
                await child.ended()
            else:
                os.kill(child.pid, signal.SIGCONT)
                assert await child.line() == "went on"
            # The places of those who gave up must not hold up anybody.
            for directory in (other, one, other):
                rev = await raise_epoch(directory, "k")
            half_done = end == "continue" or committed
            keys = [entry.key for entry in (await one.list(""))[0]]
            assert keys == ["acknowledged", *["half/1", "half/2"] * half_done, "k"]
            assert rev == 4 + half_done
            child.process.kill()

    run(main)
    check_file(path)


def test_a_directory_can_be_closed_while_it_waits_behind_a_stopped_holder(
    path: Path, spawn: Spawn
) -> None:
    async def main() -> None:
        directory = SqliteDirectory(path, patience_s=WAIT_S_MAX)
        await directory.start()
        child = spawn("wedge", path, "inside", "stop")
        assert await child.line() == "acknowledged"
        await child.stopped()
        write = asyncio.create_task(put(directory, "k"))
        await directory.get("k")
        await directory.close()
        with pytest.raises(DirectoryUnavailable, match="closed"):
            await write
        # Another one can be opened behind the same holder, and read.
        async with SqliteDirectory(path, patience_s=0.1) as second:
            assert await second.get("k") is None
        child.process.kill()
        await child.ended()
        # The abandoned place in the queue is given up when its turn comes.
        async with SqliteDirectory(path) as third:
            assert await put(third, "k") == 2

    run(main)
    for thread in threading.enumerate():
        if thread.name.startswith("directory-"):
            thread.join(WAIT_S_MAX)
            assert not thread.is_alive()


def test_closing_does_the_writes_that_were_asked_before(path: Path) -> None:
    async def main() -> None:
        # A patience that no slow disk exhausts: what is shown is that nothing is left out.
        directory = SqliteDirectory(path, patience_s=60)
        await directory.start()
        # More than fit in one transaction.
        tasks = [asyncio.create_task(put(directory, f"k{i}")) for i in range(1300)]
        await asyncio.sleep(0)
        await directory.close()
        assert sorted(await asyncio.gather(*tasks)) == list(range(1, 1301))

    run(main)


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(
    path: Path, spawn: Spawn
) -> None:
    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            child = spawn("wedge", path, "inside", "fork")
            assert await child.line() == "acknowledged"
            forked, pid = (await child.line()).split()
            assert forked == "forked"
            child.also_kill(int(pid))
            child.process.kill()
            await child.ended()
            assert await put(directory, "k") == 2
            # Only if it still lives has this shown anything.
            os.kill(int(pid), 0)

    run(main)


def test_a_directory_opened_before_a_fork_is_refused_after_it(path: Path) -> None:
    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            pid = os.getpid()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "getpid", lambda: pid + 1)
                with pytest.raises(DirectoryUnavailable, match="forked"):
                    await directory.get("k")
            assert await directory.get("k") is None

    run(main)


def test_a_new_file_that_another_node_is_still_creating_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        path.touch()
        # As one that creates has it, for longer than SQLite itself waits for a lock.
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        locked = threading.Semaphore(0)
        engine = sqlite_home._Engine
        sql = engine._sql

        def told(self: Any, *statement: Any) -> Any:
            try:
                return sql(self, *statement)
            except sqlite3.OperationalError:
                locked.release()
                raise

        monkeypatch.setattr(engine, "_sql", told)
        async with asyncio.TaskGroup() as group:
            directory = SqliteDirectory(path, patience_s=WAIT_S_MAX)
            opening = group.create_task(directory.start())
            for _ in range(2):
                assert await asyncio.to_thread(locked.acquire, timeout=WAIT_S_MAX)
            assert not opening.done()
            other.execute("ROLLBACK")
            other.close()
        await put(directory, "k")
        await directory.close()

    run(main)


def test_a_program_outside_the_queue_that_locks_the_database_is_reported(
    path: Path, spawn: Spawn
) -> None:
    async def main() -> None:
        async with SqliteDirectory(path, patience_s=0.3) as directory:
            child = spawn("foreign_lock", path)
            assert await child.line() == "locked"
            write = asyncio.create_task(put(directory, "k"))
            while not write.done():
                assert await directory.get("k") is None
            with pytest.raises(DirectoryUnavailable, match="no node has locked"):
                await write
            patient = SqliteDirectory(path, patience_s=WAIT_S_MAX)
            await patient.start()
            write = asyncio.create_task(put(patient, "k"))
            await patient.get("k")
            child.go()
            assert await write == 1
            await patient.close()

    run(main)


# ------------------------------------------------------------------------ full disks


def test_a_full_database_refuses_what_does_not_fit_and_does_the_rest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_connect = sqlite_home._Engine._connect

    def connect(engine: Any, deadline_s: float) -> None:
        real_connect(engine, deadline_s)
        engine._sql("PRAGMA max_page_count=60")

    monkeypatch.setattr(sqlite_home._Engine, "_connect", connect)

    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            # One burst, so that the large ones share a transaction with the small ones.
            sizes = [10, 400_000, 10, 400_000, 10]
            outcomes = await asyncio.gather(
                *(
                    directory.txn([], [Put(f"{i}/a", b"x" * size), Put(f"{i}/b", b"")], [])
                    for i, size in enumerate(sizes)
                ),
                return_exceptions=True,
            )
            for size, outcome in zip(sizes, outcomes, strict=True):
                assert isinstance(outcome, DirectoryUnavailable) == (size > 1000)
            assert "full" in str(outcomes[1])
            entries, rev = await directory.list("")
            assert [entry.key for entry in entries] == [f"{i}/{k}" for i in (0, 2, 4) for k in "ab"]
            assert rev == 3

    run(main)
    check_file(path)


def test_a_full_disk_refuses_writes_keeps_what_is_there_and_serves_again_with_room(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")

    async def main() -> None:
        ballast = disk / "ballast"
        async with SqliteDirectory(disk / "c.db") as directory:
            await put(directory, "kept")
            ballast.write_bytes(b"x" * 300_000)
            written = 1
            refused: DirectoryUnavailable | None = None
            while refused is None:
                assert written < 100
                try:
                    await directory.txn(
                        [], [Put(f"{written}/a", b"x" * 20_000), Put(f"{written}/b", b"")], []
                    )
                    written += 1
                except DirectoryUnavailable as error:
                    refused = error
            assert "full" in str(refused)
            for _ in range(3):
                with pytest.raises(DirectoryUnavailable):
                    await put(directory, "more", b"x" * 100_000)
            entries, rev = await directory.list("")
            assert (len(entries), rev) == (2 * written - 1, written)
            ballast.unlink()
            assert await put(directory, "room") == written + 1

    try:
        run(main)
        check_file(disk / "c.db")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fails_in_a_commit_makes_the_outcome_unknown_until_it_is_settled(
    path: Path, spawn: Spawn
) -> None:
    async def main() -> None:
        child = spawn("small_files", path, 200_000)
        assert await child.line() == "OutcomeUnknown unknown"
        assert await child.line() == "['before']"
        assert await child.line() == "True 2"
        assert await child.ended() == 0

    run(main)
    check_file(path)


# ---------------------------------------------------------------------- strange files


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    garbage = b"not a database, surely\n" * 1000
    path.write_bytes(garbage)

    async def main() -> None:
        directory = SqliteDirectory(path)
        for _ in range(2):
            with pytest.raises(DirectoryError, match=r"cluster\.db is not a directory's") as e:
                await directory.start()
            assert not isinstance(e.value, DirectoryUnavailable)
        await directory.close()

    run(main)
    assert path.read_bytes() == garbage


def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE accounts(id)")
    before = path.read_bytes()

    async def main() -> None:
        with pytest.raises(DirectoryError, match="another program"):
            await SqliteDirectory(path).start()

    run(main)
    assert path.read_bytes() == before


def test_a_newer_format_is_refused(path: Path) -> None:
    async def main() -> None:
        async with SqliteDirectory(path):
            pass
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version=2")
        with pytest.raises(DirectoryError, match="has format 2, this release knows 1"):
            await SqliteDirectory(path).start()

    run(main)


def test_a_damaged_database_refuses_instead_of_serving_nonsense(path: Path) -> None:
    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            await put(directory, "k", b"x" * 20_000)
        damaged = bytearray(path.read_bytes())
        damaged[4096:] = b"\xee" * (len(damaged) - 4096)
        path.write_bytes(damaged)
        directory = SqliteDirectory(path)
        with pytest.raises(DirectoryError):
            async with directory:
                await directory.get("k")

    run(main)


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_that_was_replaced_or_removed_in_use_is_noticed(path: Path, replace: bool) -> None:
    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            await put(directory, "k")
            watch = asyncio.ensure_future(anext(directory.watch("", 2)))
            await directory.get("k")
            path.rename(path.with_suffix(".old"))
            if replace:
                path.touch()
            for verb in (lambda: directory.get("k"), lambda: put(directory, "k")):
                with pytest.raises(DirectoryUnavailable, match=r"was replaced|is gone"):
                    await verb()
            with pytest.raises(DirectoryUnavailable, match=r"was replaced|is gone"):
                await watch

    run(main)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def main() -> None:
        with pytest.raises(DirectoryUnavailable, match="cannot be opened"):
            await SqliteDirectory(tmp_path / "file" / "sub" / "c.db").start()

    run(main)


def test_a_failure_of_the_thread_reaches_those_who_wait_and_all_who_come(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        directory = SqliteDirectory(path)
        await directory.start()
        watch = asyncio.ensure_future(anext(directory.watch("", 1)))
        await directory.get("k")

        def fail(*_: object) -> None:
            raise ZeroDivisionError("a fault of ours")

        monkeypatch.setattr(sqlite_home._Engine, "_record", fail)
        with pytest.raises(OutcomeUnknown, match="a fault of ours"):
            await put(directory, "k")
        with pytest.raises(DirectoryUnavailable, match="a fault of ours"):
            await watch
        with pytest.raises(DirectoryUnavailable, match="a fault of ours"):
            await directory.get("k")
        await directory.close()
        monkeypatch.undo()
        async with SqliteDirectory(path) as fresh:
            assert await put(fresh, "k") == 1

    run(main)
    assert "a fault of ours" in caplog.text


# ------------------------------------------------------------------ several processes


def test_processes_that_race_for_two_epochs_lose_no_update_and_watchers_see_all(
    path: Path, spawn: Spawn
) -> None:
    writers, times = 3, 60

    async def main() -> None:
        async with (
            SqliteDirectory(path) as hinted,
            SqliteDirectory(path, hints=False) as polling,
        ):
            children = [spawn("cas", path, times) for _ in range(writers)]
            for child in children:
                assert await child.line() == "ready"
            last = writers * times
            watching = [
                asyncio.create_task(take(directory, 1, last)) for directory in (hinted, polling)
            ]
            for child in children:
                child.go()
            for child in children:
                assert await child.line() == "done"
            entries, rev = await hinted.list("")
            assert sum(int(entry.value) for entry in entries) == last == rev
            for seen in await asyncio.gather(*watching):
                assert [changes[0].rev for changes in seen] == list(range(1, last + 1))
                for key in "ab":
                    values = [int(it.value or b"") for [it] in seen if it.key == key]
                    assert values == list(range(1, len(values) + 1))

    run(main)
    check_file(path)


def test_processes_that_open_a_new_directory_at_once_all_succeed(path: Path, spawn: Spawn) -> None:
    async def main() -> None:
        children = [spawn("start", path) for _ in range(4)]
        for child in children:
            assert await child.line() == "ready"
        for child in children:
            child.go()
        revs = sorted([int(await child.line()) for child in children])
        assert revs == [1, 2, 3, 4]

    run(main)
    check_file(path)


def test_without_hints_the_poll_finds_every_change(path: Path, spawn: Spawn) -> None:
    async def main() -> None:
        async with SqliteDirectory(path, hints=False) as directory:
            watch = directory.watch("", 1)
            waiting = asyncio.ensure_future(anext(watch))
            child = spawn("pairs", path)
            seen = [await waiting]
            while len(seen) < 50:
                seen.append(await anext(watch))
            assert [changes[0].rev for changes in seen] == list(range(1, 51))
            child.kill()

    run(main)


def test_a_hint_wakes_a_watcher_of_another_directory_long_before_it_polls(path: Path) -> None:
    async def main() -> None:
        hours_s = 7200.0
        async with (
            SqliteDirectory(path, poll_s=hours_s) as watcher,
            SqliteDirectory(path, poll_s=hours_s) as writer,
        ):
            watch = watcher.watch("", 1)
            for number in range(20):
                waiting = asyncio.ensure_future(anext(watch))
                await watcher.get("k")
                await put(writer, "k", b"%d" % number)
                assert await waiting == [Change("k", b"%d" % number, number + 1)]

    run(main)


def test_sockets_of_killed_processes_are_removed(path: Path, spawn: Spawn) -> None:
    folder = Path(hints_folder(str(path)))

    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            child = spawn("wedge", path, "after", "kill")
            await child.ended()
            assert len(list(folder.iterdir())) == 2
            await put(directory, "k")
            # Hints leave after the answer; the next answer comes after the hints.
            await directory.get("k")
            assert len(list(folder.iterdir())) == 1

    run(main)
    assert not folder.exists()


def test_a_path_too_long_for_sockets_uses_a_short_folder(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / "cluster.db"
    folder = Path(hints_folder(str(deep)))
    assert len(str(folder)) < 60
    assert not folder.exists()

    async def main() -> None:
        async with (
            SqliteDirectory(deep, poll_s=7200.0) as watcher,
            SqliteDirectory(deep, poll_s=7200.0) as writer,
        ):
            assert len(list(folder.iterdir())) == 2
            assert folder.stat().st_mode & 0o777 == 0o700
            waiting = asyncio.ensure_future(anext(watcher.watch("", 1)))
            await watcher.get("k")
            await put(writer, "k")
            assert await waiting == [Change("k", b"", 1)]

    run(main)
    assert not folder.exists()


def test_a_folder_for_hints_that_others_can_write_is_not_used(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(hints_folder(str(path)))
    folder.mkdir()
    folder.chmod(0o777)

    async def main() -> None:
        async with (
            SqliteDirectory(path) as watcher,
            SqliteDirectory(path) as writer,
        ):
            waiting = asyncio.ensure_future(anext(watcher.watch("", 1)))
            await watcher.get("k")
            await put(writer, "k")
            assert await waiting == [Change("k", b"", 1)]

    run(main)
    assert "no socket for hints" in caplog.text
    assert list(folder.iterdir()) == []


def test_hints_of_any_content_and_number_do_no_harm(path: Path) -> None:
    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            [name] = Path(hints_folder(str(path))).iterdir()
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as flood:
                flood.setblocking(False)
                for turn in range(200):
                    with contextlib.suppress(BlockingIOError):
                        for _ in range(100):
                            flood.sendto(b"\xff" * (turn * 10), str(name))
                    await put(directory, "k")
            assert (await directory.list(""))[1] == 200

    run(main)


# ------------------------------------------------------------------------------ time


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_a_step_of_the_wall_clock_changes_no_lease(
    path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    async def main() -> None:
        async with SqliteDirectory(path) as directory:
            lasting = await directory.lease(600)
            brief = await directory.lease(0.2)
            await directory.txn([], [Put("l", b"", lasting), Put("b", b"", brief)], [])
            real = time.time
            monkeypatch.setattr(time, "time", lambda: real() + step_s)
            # A second one opened after the step agrees with the first.
            async with SqliteDirectory(path) as late:
                assert await anext(late.watch("b", 2)) == [Change("b", None, 2)]
                assert await late.keepalive(lasting)
                assert await directory.keepalive(lasting)
                assert await late.get("l") == Entry("l", b"", 1, lasting)

    run(main)


def test_a_lease_of_a_killed_process_is_ended_by_the_others(path: Path, spawn: Spawn) -> None:
    async def main() -> None:
        async with SqliteDirectory(path) as survivor:
            child = spawn("leased", path)
            assert await child.line() == "leased"
            child.process.kill()
            await child.ended()
            seen = await take(survivor, 1, 2)
            assert seen == [[Change("node/1", b"", 1)], [Change("node/1", None, 2)]]

    run(main)


if __name__ == "__main__":
    asyncio.run(CHILDREN[sys.argv[1]](*sys.argv[2:]))  # type: ignore[arg-type]
