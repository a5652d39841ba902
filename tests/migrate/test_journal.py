"""The journal's file: what is told to be durable is there, and nothing else is taken for it."""

from __future__ import annotations

import asyncio
import errno
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from migrate.errors import Outcome
from migrate.shell import journal as journal_module
from migrate.shell import journal_format as fmt
from migrate.shell.journal import (
    Journal,
    JournalFailed,
    JournalLog,
    LogDisk,
    Phase,
    find,
    load,
    set_aside,
    sweep,
)
from migrate.shell.journal_format import BadJournal, Kind, read
from tests.fuzz.mutate import damaged
from tests.migrate.journal_disks import (
    FOLDER,
    KEY,
    ByHand,
    Failing,
    Logged,
    PowerCut,
    SimDisk,
    Told,
    facts,
    logged,
)

ROOT = pathlib.Path(__file__).parents[2]
ALL = 1 << 40
PATH = f"{FOLDER}/srv%2F1~j1.journal"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal is full soon, and has little room."""
    monkeypatch.setattr(journal_module, "LOG_BYTES_MIN", 600)
    monkeypatch.setattr(journal_module, "ROOM_BYTES_MIN", 300)
    monkeypatch.setattr(journal_module, "ROOM_BYTES_MAX", 700)


class Clock:
    """Stands still but for what it is told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        """As `time.perf_counter`."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that journals look at."""
    clock = Clock()
    monkeypatch.setattr(journal_module, "time", clock)
    return clock


def begun(hand: ByHand, told: Told, **options: object) -> Journal:
    """A journal with a whole cut, number 1."""
    journal = hand.log.create(facts(), **options)  # type: ignore[arg-type]
    journal.epoch(b"row 3")
    journal.cut(1, b"r1", [b"whole", b"1"], whole=True, done=told.of(1))
    return journal


# -- what is written is read


def test_what_follows_the_last_whole_cut_comes_back_in_order(tmp_path: pathlib.Path) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = hand.log.create(facts(name="hits", by_value=True))
    journal.epoch(b"row 3")
    journal.chunk([b"ahead", memoryview(b"xyz")[1:]])
    journal.chunk([])
    journal.cut(7, b"r7", [b"whole"], whole=True, done=told.of(7))
    journal.step(8, b"s8", told.of(8))
    journal.cut(9, bytearray(b"r9"), [b"de", b"", bytearray(b"lta")], whole=False, done=told.of(9))
    journal.epoch(b"row 4")
    hand.settle()

    assert told.safe == {7, 8, 9}
    (path,) = find(tmp_path)
    journal.close()
    hand.settle()
    found = load(path, KEY, ALL)
    assert found.facts == facts(name="hits", by_value=True)
    assert logged(found) == [
        (Kind.CHUNK, 0, b"", b"aheadyz"),
        (Kind.CHUNK, 1, b"", b""),
        (Kind.CUT, 7, b"r7", b"whole"),
        (Kind.STEP, 8, b"s8", b""),
        (Kind.CUT, 9, b"r9", b"delta"),
    ]
    assert (found.row, found.closed, found.torn_bytes) == (b"row 4", True, 0)


def test_a_later_whole_cut_makes_what_is_before_it_superfluous(tmp_path: pathlib.Path) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = hand.log.create(facts())
    journal.chunk([b"ahead"])
    journal.cut(1, b"", [b"1"], whole=True)
    journal.step(2, b"s")
    journal.cut(3, b"", [b"3"], whole=True, done=told.of(3))
    journal.step(4, b"t", told.of(4))
    hand.settle()
    journal.close()
    hand.settle()

    found = load(journal.path, KEY, ALL)
    assert logged(found) == [(Kind.CUT, 3, b"", b"3"), (Kind.STEP, 4, b"t", b"")]


def test_a_piece_larger_than_one_call_writes_is_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "WRITE_BYTES", 1000)
    monkeypatch.setattr(journal_module, "PIECES_MAX", 3)
    took = []
    real = os.pwritev

    def some(handle: int, pieces: list[memoryview], offset: int) -> int:
        # The system may take less than it was given.
        whole = b"".join(pieces)
        took.append(len(pieces))
        return real(handle, [whole[: max(1, len(whole) * 2 // 3)]], offset)

    monkeypatch.setattr(os, "pwritev", some)
    monkeypatch.setattr(journal_module, "ROOM_BYTES_MIN", 10)
    monkeypatch.setattr(journal_module, "ROOM_BYTES_MAX", 10)
    state = [os.urandom(n) for n in (5000, 0, 1, 2, 3, 999, 1000, 1001, 7)]
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = hand.log.create(facts())
    journal.cut(1, b"", state, whole=True, done=told.of(1))
    hand.settle()
    journal.close()
    hand.settle()

    assert max(took) <= 3 and told.safe == {1}
    assert logged(load(journal.path, KEY, ALL)) == [(Kind.CUT, 1, b"", b"".join(state))]


def test_many_appends_of_many_servers_take_one_sync_each_file(tmp_path: pathlib.Path) -> None:
    syncs = []

    class Counting(LogDisk):
        def sync_data(self, handle: int) -> None:
            syncs.append(handle)
            super().sync_data(handle)

    hand, told = ByHand(tmp_path, Counting()), Told()
    journals = [hand.log.create(facts(server=f"srv/{n}")) for n in range(3)]
    for journal in journals:
        journal.cut(1, b"", [], whole=True)
    hand.settle()
    syncs.clear()
    for number in range(2, 52):
        for n, journal in enumerate(journals):
            journal.step(number, b"s", told.of(1000 * n + number))
    hand.settle()

    assert len(told.safe) == 150
    assert len(syncs) == 3 and len(set(syncs)) == 3


def test_nothing_is_durable_before_the_first_whole_cut_has_its_name(
    tmp_path: pathlib.Path,
) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = begun(hand, told)
    journal.step(2, b"s2", told.of(2))
    hand.bases.run()
    hand.tell()
    assert told.safe == set() and find(tmp_path) == []
    hand.settle()
    assert told.safe == {1, 2} and find(tmp_path) == [journal.path]


def test_appends_stay_in_order_when_the_thread_changes(tmp_path: pathlib.Path) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = begun(hand, told)
    hand.bases.run()
    hand.tell()  # the name is asked for
    journal.step(2, b"s2", told.of(2))
    journal.step(3, b"s3", told.of(3))
    hand.bases.run(1)  # it has its name
    hand.tell()
    journal.step(4, b"s4", told.of(4))
    # The thread of first parts has 2 and 3 still: 4 waits for it.
    assert not hand.commits.run()
    journal.close(told.of(5))
    hand.settle()
    assert told.safe == {1, 2, 3, 4, 5}
    found = load(journal.path, KEY, ALL)
    assert [record.number for record in found.records] == [1, 2, 3, 4] and found.closed


def test_what_cannot_follow_is_refused_and_changes_nothing(tmp_path: pathlib.Path) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = hand.log.create(facts())
    with pytest.raises(ValueError, match="whole"):
        journal.cut(1, b"", [], whole=False)
    with pytest.raises(ValueError, match="whole"):
        journal.step(1, b"")
    journal.cut(1, b"", [], whole=True, done=told.of(1))
    for number in (0, 1, 3, 1 << 62):
        with pytest.raises(ValueError, match="cannot follow"):
            journal.step(number, b"")
    with pytest.raises(ValueError, match="ahead"):
        journal.chunk([b"1"])
    journal.step(2, b"s", told.of(2))
    hand.settle()
    assert told.safe == {1, 2}
    journal.close(told.of(3))
    with pytest.raises(JournalFailed, match="closed") as caught:
        journal.step(3, b"")
    assert caught.value.outcome is Outcome.NOT_DONE
    hand.settle()
    assert 3 in told.safe
    journal.close(told.of(4))  # nothing happens, and it is told so
    assert 4 in told.safe


def test_what_waits_is_bounded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "BACKLOG_BYTES_MAX", 1000)
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = hand.log.create(facts())
    journal.cut(1, b"", [bytes(5000)], whole=True, done=told.of(1))  # nothing waits: it is taken
    with pytest.raises(JournalFailed, match="wait") as caught:
        journal.step(2, b"")
    assert caught.value.outcome is Outcome.NOT_DONE
    hand.settle()
    journal.step(2, b"", told.of(2))
    hand.settle()
    assert told.safe == {1, 2} and journal.backlog_bytes == 0


def test_one_that_is_closed_before_its_first_whole_cut_leaves_nothing(
    tmp_path: pathlib.Path,
) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = hand.log.create(facts())
    journal.chunk([b"1"], told.of(2))
    hand.settle()
    assert len(os.listdir(tmp_path)) == 1
    journal.close(told.of(1))
    hand.settle()
    assert told.safe == {1} and os.listdir(tmp_path) == []
    assert "before its first cut" in told.failed[2].reason


def test_one_that_is_closed_while_it_gets_its_name_is_closed_then(tmp_path: pathlib.Path) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = begun(hand, told)
    journal.close(told.of(2))
    hand.settle()
    assert told.safe == {1, 2}
    assert load(journal.path, KEY, ALL).closed


def test_one_that_is_closed_while_another_takes_its_place_is_told_so(
    tmp_path: pathlib.Path,
) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = begun(hand, told)
    hand.settle()
    new = hand.log.create(facts(), replaces=journal)
    new.cut(2, b"", [], whole=True, done=told.of(2))
    hand.bases.run()
    hand.tell()
    journal.close(told.of(3))
    new.close(told.of(4))
    hand.settle()
    assert told.safe == {1, 2, 3, 4}
    assert load(new.path, KEY, ALL).records[0].number == 2


# -- compaction


def test_a_journal_that_has_grown_is_replaced_in_one_step(
    tmp_path: pathlib.Path, small: None
) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    full: list[Journal] = []
    journal = begun(hand, told, on_full=full.append)
    hand.settle()
    number = 1
    while not full:
        number += 1
        journal.step(number, bytes(50), told.of(number))
        hand.settle()
    assert full == [journal] and journal.log_bytes > 600
    before = os.path.getsize(journal.path)

    new = hand.log.create(facts(epoch=4), replaces=journal)
    for n in range(number + 1, number + 4):
        journal.cut(n, b"", [b"old"], whole=False, done=told.of(n))
        new.cut(n, b"", [b"new"], whole=n == number + 1, done=told.of(n))
    hand.settle()

    assert told.safe == set(range(1, number + 4))
    assert journal.phase is Phase.CLOSED and os.path.getsize(new.path) < before
    assert os.listdir(tmp_path) == [os.path.basename(new.path)]
    new.step(number + 4, b"s", told.of(number + 4))
    new.close()
    hand.settle()
    found = load(new.path, KEY, ALL)
    assert found.facts.epoch == 4
    assert [bytes(record.state) for record in found.records] == [b"new"] * 3 + [b""]


def test_the_former_journal_says_nothing_between_the_first_cut_of_the_new_one_and_its_name(
    tmp_path: pathlib.Path,
) -> None:
    # Or else what it says would be safe in a file that is not found any more.
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = begun(hand, told)
    hand.settle()
    new = hand.log.create(facts(), replaces=journal)
    new.cut(2, b"", [], whole=True)
    journal.step(2, b"", told.of(2))
    hand.commits.run()
    hand.tell()
    assert told.safe == {1, 2}  # the former one counts as long as no name is being given
    hand.bases.run()
    hand.tell()
    journal.step(3, b"", told.of(3))
    new.step(3, b"")
    hand.commits.run()
    hand.tell()
    assert told.safe == {1, 2}
    hand.settle()
    assert told.safe == {1, 2}  # what the new one says of 3 was asked of nobody here


@pytest.mark.parametrize("failing", ["write_at", "sync_data", "sync", "rename"])
def test_a_replacement_that_fails_leaves_the_former_one_as_it_was(
    failing: str, tmp_path: pathlib.Path
) -> None:
    disk = Failing(failing, 10**9, errno.ENOSPC)
    hand, told, of_new = ByHand(tmp_path, disk), Told(), Told()
    journal = begun(hand, told)
    hand.settle()
    disk.at = disk.calls + 1
    new = hand.log.create(facts(), replaces=journal)
    new.cut(2, b"", [b"new"], whole=True, done=of_new.of(2))
    hand.bases.run()
    hand.tell()
    journal.cut(2, b"", [b"old"], whole=False, done=told.of(2))
    hand.settle()

    assert 2 in of_new.failed and "No space left" in str(of_new.failed[2])
    assert new.phase is Phase.FAILED
    assert told.safe == {1, 2} and journal.phase is Phase.OPEN
    assert os.listdir(tmp_path) == [os.path.basename(journal.path)]
    # And another one may replace it.
    again = hand.log.create(facts(), replaces=journal)
    again.cut(3, b"", [b"new"], whole=True, done=told.of(3))
    journal.step(3, b"")
    again.close()
    hand.settle()
    assert 3 in told.safe
    assert logged(load(again.path, KEY, ALL)) == [(Kind.CUT, 3, b"", b"new")]


def test_if_nobody_knows_which_file_has_the_name_neither_is_good_any_more(
    tmp_path: pathlib.Path,
) -> None:
    disk = Failing("sync_folder", 10**9)
    hand, told = ByHand(tmp_path, disk), Told()
    journal = begun(hand, told)
    hand.settle()
    disk.at = disk.calls + 1
    new = hand.log.create(facts(), replaces=journal)
    new.cut(2, b"", [b"new"], whole=True, done=told.of(2))
    hand.bases.run()
    hand.tell()
    journal.step(2, b"", told.of(20))
    hand.settle()
    for one in (journal, new):
        assert one.phase is Phase.FAILED
        with pytest.raises(JournalFailed):
            one.step(3, b"")
    assert told.safe == {1} and set(told.failed) == {2, 20}
    assert told.failed[2].outcome is Outcome.UNKNOWN


def test_a_full_journal_asks_again_only_after_as_much_again(
    tmp_path: pathlib.Path, small: None
) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    full: list[int] = []
    journal = begun(hand, told, on_full=lambda j: full.append(j.log_bytes))
    for number in range(2, 60):
        journal.step(number, b"")
        hand.settle()
    assert len(full) >= 2
    assert full[0] > 600 and full[1] - full[0] > 600


# -- what fails


@pytest.mark.parametrize("failing", ["write_at", "sync_data"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_failed_write_or_sync_poisons_the_journal_for_good(
    failing: str, code: int, tmp_path: pathlib.Path
) -> None:
    disk = Failing(failing, 10**9, code)
    hand, told = ByHand(tmp_path, disk), Told()
    journal = begun(hand, told)
    other = hand.log.create(facts(server="srv/2"))
    other.cut(1, b"", [], whole=True, done=told.of(101))
    hand.settle()
    disk.at = disk.calls + 1
    journal.step(2, b"s2", told.of(2))
    journal.step(3, b"s3", told.of(3))
    hand.settle()
    with pytest.raises(JournalFailed, match=os.strerror(code)) as caught:
        journal.step(4, b"s4")
    assert caught.value.outcome is Outcome.UNKNOWN
    other.step(2, b"", told.of(102))
    hand.settle()

    assert told.safe == {1, 101, 102}
    assert set(told.failed) == {2, 3}
    assert disk.after == []  # its handle was never written nor synced again
    assert journal.phase is Phase.FAILED and other.phase is Phase.OPEN
    assert load(journal.path, KEY, ALL).records[0].number == 1


def test_appends_that_were_queued_behind_the_one_that_failed_are_told_too(
    tmp_path: pathlib.Path,
) -> None:
    disk = Failing("sync_data", 10**9)
    hand, told = ByHand(tmp_path, disk), Told()
    journal = begun(hand, told)
    hand.settle()
    disk.at = disk.calls + 1
    for number in (2, 3, 4):
        journal.step(number, b"", told.of(number))
    hand.commits.run(1)
    hand.commits.run()
    hand.tell()
    assert told.safe == {1} and set(told.failed) == {2, 3, 4}
    assert disk.after == []


def test_memory_that_was_released_too_early_fails_the_append_and_nobody_else(
    tmp_path: pathlib.Path,
) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = begun(hand, told)
    other = hand.log.create(facts(server="srv/2"))
    other.cut(1, b"", [], whole=True, done=told.of(101))
    hand.settle()
    piece = memoryview(b"gone")
    journal.cut(2, b"", [piece], whole=False, done=told.of(2))
    piece.release()
    other.step(2, b"", told.of(102))
    hand.settle()
    assert told.safe == {1, 101, 102} and "released" in told.failed[2].reason


def test_a_folder_that_cannot_be_is_told(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="directory"):
        ByHand(tmp_path / "file" / "folder", LogDisk())


# -- files


def test_files_are_for_their_user_alone(tmp_path: pathlib.Path) -> None:
    hand, told = ByHand(tmp_path / "a" / "b", LogDisk()), Told()
    journal = begun(hand, told)
    hand.settle()
    assert os.stat(journal.path).st_mode & 0o777 == 0o600
    assert os.stat(hand.log.folder).st_mode & 0o777 == 0o700


def test_a_journal_that_somebody_writes_to_is_not_read(tmp_path: pathlib.Path) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = begun(hand, told)
    hand.settle()
    with pytest.raises(BadJournal, match="writes to it") as caught:
        load(journal.path, KEY, ALL)
    assert caught.value.flaw == "in use"
    journal.close()
    hand.settle()
    assert load(journal.path, KEY, ALL).closed


@pytest.mark.parametrize(
    ("make", "flaw"),
    [
        (lambda path: None, "missing"),
        (os.mkfifo, "foreign"),
        (os.mkdir, "foreign"),
        (lambda path: path.write_bytes(b""), "foreign"),
        (lambda path: path.write_bytes(b"livemigrate journ"), "truncated"),
        (lambda path: path.write_bytes(b"livemigrate journal 1 header=0"), "truncated"),
        (lambda path: path.write_bytes(b"livemigrate journal 2 header"), "newer"),
        (lambda path: path.write_bytes(b"livemigrate journal x" + bytes(200)), "damaged"),
        (lambda path: path.write_bytes(bytes(2000)), "store"),
    ],
)
def test_what_is_no_journal_says_what_it_is(
    make: Callable[[pathlib.Path], object], flaw: str, tmp_path: pathlib.Path
) -> None:
    make(tmp_path / "x")
    with pytest.raises(BadJournal) as caught:
        load(tmp_path / "x", KEY, 1000)  # type: ignore[arg-type]
    assert caught.value.flaw == flaw


def test_what_is_of_no_use_is_set_aside_and_what_was_left_half_done_removed(
    tmp_path: pathlib.Path,
) -> None:
    hand, told = ByHand(tmp_path, LogDisk()), Told()
    journal = begun(hand, told)
    writing = hand.log.create(facts(server="srv/2"))
    writing.chunk([b"half"])
    hand.settle()
    (tmp_path / f".old.journal.{'0' * 16}.part").write_bytes(b"half")
    (tmp_path / "other.part").write_bytes(b"")
    sweep(tmp_path)
    left = {name for name in os.listdir(tmp_path) if name.endswith(".part")}
    assert len(left) == 2 and "other.part" in left  # one that is being written stays
    to = set_aside(journal.path)
    assert find(tmp_path) == [] and os.path.exists(to)
    assert find(tmp_path / "nowhere") == []


# -- the loop commits


class Slow(LogDisk):
    """A disk whose syncs take as long as they are told to, by a clock that stands still."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.sync_s = 0.0
        self.syncs = 0

    def sync_data(self, handle: int) -> None:
        self.syncs += 1
        self.clock.now_s += self.sync_s
        super().sync_data(handle)


def open_one(folder: pathlib.Path, disk: LogDisk, **changes: object) -> tuple[ByHand, Journal]:
    """A log whose loop commits, and a journal with a whole cut, number 1."""
    hand = ByHand(folder, disk, holds=True)
    journal = hand.log.create(facts(**changes))
    journal.cut(1, b"", [], whole=True)
    hand.settle()
    assert journal.phase is Phase.OPEN
    return hand, journal


def test_what_is_alone_in_a_turn_is_committed_by_the_loop(
    tmp_path: pathlib.Path, clock: Clock
) -> None:
    disk, told = Slow(clock), Told()
    hand, journal = open_one(tmp_path, disk)
    before = disk.syncs
    for number in range(2, 40):
        journal.step(number, b"step", told.of(number))
        assert number not in told.safe
        hand.turn()
        assert number in told.safe and disk.syncs == before + number - 1
    assert not hand.commits.works and not hand.posted
    journal.close()
    hand.settle()
    assert [r.number for r in load(journal.path, KEY, ALL).records] == list(range(1, 40))


def test_what_is_not_alone_in_a_turn_goes_to_the_threads_in_order(
    tmp_path: pathlib.Path, clock: Clock
) -> None:
    disk, told = Slow(clock), Told()
    hand, journal = open_one(tmp_path, disk)
    other = hand.log.create(facts(server="srv/2"))
    other.cut(1, b"", [], whole=True)
    hand.settle()
    before = disk.syncs
    for number in (2, 3, 4):
        journal.step(number, b"", told.of(number))
    hand.turn()
    assert disk.syncs == before and [w.number for w in hand.commits.works] == [2, 3, 4]
    # And what comes for another file while a thread has one.
    other.step(2, b"", told.of(102))
    hand.turn()
    assert disk.syncs == before
    # Nor does the end of a journal pass what is before it.
    hand.settle()
    assert told.safe == {2, 3, 4, 102}
    journal.step(5, b"", told.of(5))
    journal.close(told.of(6))
    hand.turn()
    assert [w.kind for w in hand.commits.works] == [Kind.STEP, Kind.END]
    hand.settle()
    found = load(journal.path, KEY, ALL)
    assert found.closed and found.records[-1].number == 5


@pytest.mark.parametrize("why", ["new disk", "large", "no room", "held"])
def test_the_loop_waits_for_no_disk_that_may_take_long(
    why: str, tmp_path: pathlib.Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "ROOM_BYTES_MIN", 200_000)
    disk, told = Slow(clock), Told()
    hand, journal = open_one(tmp_path, disk)
    size = 10
    if why == "new disk":
        hand.commits._quick = journal_module.HOLD_AFTER - 1
    elif why == "large":
        size = journal_module.JOINED_BYTES_MAX
    elif why == "no room":
        size = 150_000
        monkeypatch.setattr(journal_module, "JOINED_BYTES_MAX", 160_000)
        journal.step(2, bytes(size), told.of(2))
        hand.turn()
    else:
        disk.sync_s = 0.0005
        journal.step(2, b"", told.of(2))
        hand.turn()
        clock.now_s += 0.0002  # what others had of it is less than half of that
    number = (journal.number or 0) + 1
    assert len(told.safe) == number - 2
    journal.step(number, bytes(size), told.of(number))
    hand.turn()
    assert number not in told.safe and len(hand.commits.works) == 1
    hand.settle()
    assert number in told.safe
    if why == "held":
        clock.now_s += 0.0001
        journal.step(number + 1, b"", told.of(number + 1))
        hand.turn()
        assert number + 1 in told.safe


def test_after_a_sync_that_took_long_the_loop_waits_for_none_before_many_were_quick(
    tmp_path: pathlib.Path, clock: Clock
) -> None:
    disk, told = Slow(clock), Told()
    hand, journal = open_one(tmp_path, disk)
    disk.sync_s = 0.0505
    journal.step(2, b"", told.of(2))
    hand.turn()
    assert told.safe == {2} and hand.commits._quick == -50
    disk.sync_s = 0.0
    clock.now_s += 1
    by_threads = 0
    for number in range(3, 103):
        journal.step(number, b"", told.of(number))
        hand.turn()
        if hand.commits.works:
            by_threads += 1
            hand.commits._commit(journal._file, [])  # as a thread that was quick
            hand.settle()
    assert told.safe == set(range(2, 103))
    assert by_threads == 50 + journal_module.HOLD_AFTER


@pytest.mark.parametrize("failing", ["write_at", "sync_data"])
def test_a_commit_of_the_loop_that_fails_poisons_the_journal(
    failing: str, tmp_path: pathlib.Path, clock: Clock
) -> None:
    disk, told = Failing(failing, 10**9), Told()
    hand, journal = open_one(tmp_path, disk)
    disk.at = disk.calls + 1
    journal.step(2, b"s2", told.of(2))
    hand.turn()
    assert not told.safe and set(told.failed) == {2} and disk.failed and disk.after == []
    assert journal.phase is Phase.FAILED
    with pytest.raises(JournalFailed, match=os.strerror(errno.EIO)):
        journal.step(3, b"s3")


# -- power cuts


def script(
    disk: SimDisk,
    logged: dict[int, Logged],
    told: Told,
    flavour: bytes = b"S",
    holds: bool = False,
) -> None:
    """A journal's life: chunks, cuts, steps, groups of all sizes, two replacements, the end.

    Args:
        disk: Where.
        logged: What is appended, by number; of a number that was replaced, its later form too.
        told: What was told to be safe.
        flavour: A letter that all contents have; their sizes are always the same.
        holds: The loop commits what is alone in its turn.
    """
    hand = ByHand(FOLDER, disk, holds=holds)
    rng = Random(7)
    journal = hand.log.create(facts())
    journal.chunk([b"chunk-0"])
    number = 1

    def cut(where: list[Journal], whole: Journal | None) -> None:
        for one in where:
            state = b"%s%d" % (flavour, number) * rng.randrange(1, 9)
            journal_record = b"record %s %d" % (flavour, number)
            logged[number] = (Kind.CUT, number, journal_record, b"")
            one.cut(
                number,
                journal_record,
                [b"W" if one is whole else b"d", state],
                whole=one is whole,
                done=told.of(number),
            )

    cut([journal], journal)
    where = [journal]
    for turn in range(24):
        number += 1
        if turn in (9, 17):
            hand.settle()
            where = [one for one in where if one.phase is Phase.OPEN]
            new = hand.log.create(facts(epoch=turn), replaces=where[0])
            new.epoch(b"row")
            where = [where[0], new]
            cut(where, new)
        elif turn % 3:
            record = b"step %s %d " % (flavour, number) * rng.randrange(1, 5)
            logged[number] = (Kind.STEP, number, record, b"")
            for one in where:
                one.step(number, record, told.of(number))
        else:
            cut(where, None)
        if rng.random() < 0.8:
            hand.turn()
        if rng.random() < 0.6:
            hand.commits.run(rng.choice((1, None)))
            if rng.random() < 0.7:
                hand.tell()
        if rng.random() < 0.5:
            hand.bases.run(rng.choice((1, None)))
            hand.tell()
        if where[0].phase is Phase.CLOSED:
            where = where[1:]
    hand.settle()
    for one in where:
        one.close(told.of(999))
    hand.settle()


def is_prefix(found: fmt.Found, logged_: dict[int, Logged]) -> bool:
    """Whether what was found is what was appended, from a whole cut on, without a gap."""
    numbers = [record.number for record in found.records]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return False
    for record in found.records:
        kind, number, text, _ = logged_[record.number]
        if (record.kind, record.number, bytes(record.record)) != (kind, number, text):
            return False
        if kind is Kind.CUT:
            state = bytes(record.state)
            if state[:1] != (b"W" if record is found.records[0] else b"d"):
                return False
            if state[1:].replace(b"S%d" % number, b""):
                return False
    if found.records[0].number == 1:
        return [bytes(c.state) for c in found.chunks] == [b"chunk-0"]
    return not found.chunks


def flaws_after_cuts(
    every: bool = False, cuts: range | None = None, holds: bool = False
) -> list[str]:
    """What is wrong after a power cut at each step of the script; and a count of what was seen."""
    whole = SimDisk()
    script(whole, {}, Told(), holds=holds)
    older = SimDisk()
    script(older, {}, Told(), b"G", holds)
    ghost = max((bytes(file.shown) for file in older.files), key=len)
    flaws = []
    states = 0
    for cut_at in cuts or range(1, whole.steps + 2):
        disk, appended, told = SimDisk(cut_at=cut_at), {}, Told()
        try:
            script(disk, appended, told, holds=holds)
        except PowerCut:
            pass
        else:
            assert cut_at > whole.steps
        safe = max((n for n in told.safe if n != 999), default=0)
        assert not told.failed
        for state in disk.after_the_cut(PATH, Random(cut_at), ghost, every):
            states += 1
            if state is None:
                if safe:
                    flaws.append(f"cut {cut_at}: {safe} was safe, and there is nothing")
                continue
            try:
                found = read(state, KEY)
            except BadJournal as error:
                flaws.append(f"cut {cut_at}: {error}")
                continue
            if not is_prefix(found, appended):
                flaws.append(f"cut {cut_at}: not what was appended")
            elif found.records[-1].number < safe:
                flaws.append(f"cut {cut_at}: {safe} was safe, {found.records[-1].number} is there")
    assert states > 40 * len(cuts or range(whole.steps)) / 2
    return flaws


@pytest.mark.parametrize("holds", [False, True])
def test_s53_after_a_power_cut_at_any_step_all_that_was_safe_is_there_and_nothing_wrong(
    holds: bool, small: None, clock: Clock
) -> None:
    assert flaws_after_cuts(holds=holds) == []


@pytest.mark.parametrize("holds", [False, True])
def test_everything_is_told_in_the_end(
    holds: bool, small: None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_loop = []
    real = journal_module._Committer._commit

    def commit(self: journal_module._Committer, file: object, group: list[object]) -> float:
        by_loop.extend(group)
        return real(self, file, group)  # type: ignore[arg-type]

    monkeypatch.setattr(journal_module._Committer, "_commit", commit)
    appended: dict[int, Logged] = {}
    told = Told()
    script(SimDisk(), appended, told, holds=holds)
    assert told.safe == {*appended, 999} and not told.failed
    assert len(by_loop) >= 5 if holds else not by_loop


def test_what_the_first_cut_of_a_replacement_covers_is_told_though_the_former_one_was_slower(
    tmp_path: pathlib.Path,
) -> None:
    disk = Failing("sync_data", 10**9)
    hand, told = ByHand(tmp_path, disk), Told()
    journal = begun(hand, told)
    hand.settle()
    journal.step(2, b"", told.of(2))
    new = hand.log.create(facts(), replaces=journal)
    new.cut(3, b"", [b"new"], whole=True, done=told.of(3))
    journal.cut(3, b"", [], whole=False, done=told.of(30))
    while hand.bases.run():
        hand.tell()
    assert told.safe == {1, 3}
    disk.at = disk.calls + 1
    hand.settle()  # that the former one fails now matters to nobody
    assert disk.failed and told.safe == {1, 2, 3} and not told.failed


@pytest.mark.parametrize("holds", [False, True])
def test_a_group_that_is_torn_at_any_byte_leaves_what_was_before_it(
    holds: bool, small: None, clock: Clock
) -> None:
    whole = SimDisk()
    script(whole, {}, Told(), holds=holds)
    assert flaws_after_cuts(every=True, cuts=range(1, whole.steps, 7), holds=holds) == []


@pytest.mark.parametrize("holds", [False, True])
def test_without_syncs_of_data_a_power_cut_would_be_noticed(
    holds: bool, small: None, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimDisk, "sync_data", lambda self, handle: self._step())
    assert any("was safe" in flaw for flaw in flaws_after_cuts(holds=holds))


@pytest.mark.parametrize("without", ["sync_folder", "sync"])
def test_without_the_syncs_around_the_name_a_power_cut_would_be_noticed(
    without: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimDisk, without, lambda self, what: self._step())
    if without == "sync":
        # Data syncs do the same here; on a real disk this one has the size besides.
        monkeypatch.setattr(SimDisk, "sync_data", lambda self, handle: self._step())
    assert flaws_after_cuts()


def test_a_former_journal_that_goes_on_telling_would_be_noticed(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Journal, "_suspended", property(lambda self: False, lambda self, on: None), raising=False
    )
    assert any("was safe" in flaw for flaw in flaws_after_cuts())


def test_without_chain_and_own_key_the_records_of_an_older_file_would_be_taken(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weak(keyed: fmt.blake2b, offset: int, fields: bytes, pieces: object) -> bytes:
        # A checksum of the record alone, as good as any against chance.
        blank = bytes(fields)[:-16]
        return real(keyed, 0, blank, pieces)  # type: ignore[arg-type]

    real = fmt._tag
    same = fmt.blake2b(key=b"k" * 32, digest_size=fmt.TAG_BYTES)
    monkeypatch.setattr(fmt, "_tag", weak)
    monkeypatch.setattr(fmt, "_keys", lambda key, mac: (same, b"markmark"))

    class Unchained(fmt._Reader):
        def _head(self, at: int) -> tuple[object, ...] | None:
            found = super()._head(at)
            return found and (*found[:7], self._tag, *found[8:])

    monkeypatch.setattr(fmt, "_Reader", Unchained)
    flaws = flaws_after_cuts()
    assert any("not what was appended" in flaw for flaw in flaws), flaws


# -- damage


def sealed(groups: list[int]) -> tuple[bytes, list[Logged], list[int]]:
    """A journal of so many records in each group: bytes, records, where each group ends."""
    hand, told = ByHand(FOLDER, disk := SimDisk()), Told()
    journal = begun(hand, told)
    hand.settle()
    rng = Random(sum(groups))
    records: list[Logged] = [(Kind.CUT, 1, b"r1", b"whole1")]
    ends = [journal._file._encoder.offset]
    for size in groups:
        for _ in range(size):
            number = len(records) + 1
            text = rng.randbytes(rng.randrange(60))
            if rng.random() < 0.5:
                journal.step(number, text)
                records.append((Kind.STEP, number, text, b""))
            else:
                journal.cut(number, text, [text[::-1]], whole=False)
                records.append((Kind.CUT, number, text, text[::-1]))
        hand.settle()
        ends.append(journal._file._encoder.offset)
    data = bytes(disk.names[PATH].shown)
    assert logged(read(data, KEY)) == records
    return data, records, ends


def test_every_bit_that_flips_before_the_last_sync_is_refused(small: None) -> None:
    data, records, ends = sealed([1, 3, 2, 4])
    safe = 1 + 1 + 3 + 2
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        if at < ends[-2]:
            with pytest.raises(BadJournal) as caught:
                read(changed, KEY)
            assert caught.value.flaw in ("damaged", "foreign", "newer", "truncated", "wrong key")
        else:
            # Nobody could tell this from a power cut; and everything before it is there.
            found = logged(read(changed, KEY))
            assert records[: len(found)] == found and len(found) >= safe


def test_in_a_journal_that_was_closed_not_even_the_last_record_can_flip(small: None) -> None:
    hand, told = ByHand(FOLDER, disk := SimDisk()), Told()
    journal = begun(hand, told)
    hand.settle()
    journal.step(2, b"last", told.of(2))
    hand.settle()
    end = journal._file._encoder.offset
    journal.close()
    hand.settle()
    data = bytes(disk.names[PATH].shown)
    for at in range(end):
        changed = bytearray(data)
        changed[at] ^= 4
        with pytest.raises(BadJournal):
            read(changed, KEY)


def test_without_a_witness_damage_would_be_cut_off_silently(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, records, ends = sealed([1, 3, 2, 4])
    monkeypatch.setattr(fmt, "WITNESS_TIMES", 10**9)
    monkeypatch.setattr(fmt._Reader, "torn", lambda self: 0)
    changed = bytearray(data)
    changed[ends[1] + 80] ^= 1
    assert len(logged(read(changed, KEY))) < len(records)


def test_ten_thousand_damaged_journals_give_a_clear_error_or_a_prefix(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.loads", never)
    monkeypatch.setattr("pickle.Unpickler", never)
    made = [sealed(groups) for groups in ([], [1], [5, 1], [2, 2, 2, 2], [9, 1, 4])]
    others = [data for data, _, _ in made]
    rng = Random(1)
    seen = {"refused": 0, "prefix": 0, "whole": 0}
    for n in range(10_000):
        data, records, _ = made[n % len(made)]
        changed = damaged(data, others, rng)
        try:
            found = read(changed, KEY)
        except BadJournal as error:
            assert error.reason and error.flaw
            seen["refused"] += 1
            continue
        assert found.facts == facts()
        assert found.row in (b"", b"row 3")
        got = logged(found)
        # Bytes of another of these are another journal, whole or a prefix of that.
        assert any(got == r[: len(got)] for _, r, _ in made)
        seen["whole" if len(got) == len(records) else "prefix"] += 1
    assert all(count > 100 for count in seen.values()), seen


def test_another_key_is_named(small: None) -> None:
    data, _, _ = sealed([1])
    with pytest.raises(BadJournal, match="another cluster") as caught:
        read(data, b"x" * 32)
    assert caught.value.flaw == "wrong key"


def test_the_search_for_a_witness_is_bounded() -> None:
    # Marks everywhere, each the head of a record that would have to be hashed.
    data, _, ends = sealed([1, 1])
    reader = fmt._Reader(data, KEY, b"")
    size = 200_000
    head = fmt._FIELDS.pack(reader._mark, 2, 0, size // 2, 0, 1, ends[-1] + 1, bytes(16))
    tail = (head + bytes(16)) * (size // len(head))
    with pytest.raises(BadJournal, match="changed it"):
        read(data[: ends[-1]] + tail, KEY)


# -- threads, processes


@pytest.mark.parametrize("holds", [False, True])
def test_with_real_threads_everything_is_told_and_there(
    holds: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "LOG_BYTES_MIN", 50_000)
    monkeypatch.setattr(journal_module, "HOLD_AFTER", 1)
    monkeypatch.setattr(journal_module, "HOLD_S", 60.0)
    servers = 5
    told = [Told() for _ in range(servers)]
    threads = set()

    class Watched(LogDisk):
        def sync_data(self, handle: int) -> None:
            threads.add(threading.get_ident())
            super().sync_data(handle)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        soon = loop.call_soon if holds else None
        log = JournalLog(tmp_path, KEY, loop.call_soon_threadsafe, Watched(), soon=soon)
        where: list[list[Journal]] = []
        wanted = set()
        news = asyncio.Event()

        def of(n: int, number: int) -> Callable[[JournalFailed | None], None]:
            tell = told[n].of(number)

            def done(error: JournalFailed | None) -> None:
                tell(error)
                news.set()

            return done

        def start(n: int, replaces: Journal | None = None) -> Journal:
            return log.create(
                facts(server=f"srv/{n}"), replaces=replaces, on_full=lambda _: wanted.add(n)
            )

        for n in range(servers):
            where.append([start(n)])
            where[n][0].cut(1, b"", [b"W"], whole=True, done=told[n].of(1))
        replaced = 0
        for number in range(2, 700):
            while number - min(len(t.safe) for t in told) > 64:
                news.clear()
                await news.wait()
            for n in range(servers):
                where[n] = [j for j in where[n] if j.phase is not Phase.CLOSED]
                new = None
                if n in wanted and len(where[n]) == 1 and where[n][0].phase is Phase.OPEN:
                    wanted.discard(n)
                    replaced += 1
                    new = start(n, where[n][0])
                    where[n].append(new)
                for j in where[n]:
                    j.cut(number, bytes(300), [], whole=j is new, done=of(n, number))
                if number % 64 == 0:
                    # Now and then one is alone.
                    while told[n].safe != set(range(1, number + 1)):
                        news.clear()
                        await news.wait()
        await log.close()
        assert replaced >= servers

    asyncio.run(main())
    assert (threading.get_ident() in threads) is holds and len(threads) > 2
    for n in range(servers):
        assert told[n].safe == set(range(1, 700)) and not told[n].failed
    paths = find(tmp_path)
    assert len(paths) == servers
    for path in paths:
        found = load(path, KEY, ALL)
        assert found.records[-1].number == 699 and found.closed
        assert os.path.getsize(path) < 3 * 50_000 + journal_module.ROOM_BYTES_MAX


def test_a_sync_that_hangs_holds_up_no_other_file_and_takes_all_that_comes_meanwhile_next_time(
    tmp_path: pathlib.Path,
) -> None:
    go_on = threading.Event()

    class Hanging(LogDisk):
        def __init__(self) -> None:
            self.hangs = -1
            self.syncs: Counter[int] = Counter()
            self.began = asyncio.Event()

        def create(self, path: str) -> int:
            handle = super().create(path)
            if self.hangs < 0:
                self.hangs = handle
            return handle

        def sync_data(self, handle: int) -> None:
            self.syncs[handle] += 1
            if handle == self.hangs and self.syncs[handle] == 2:
                loop.call_soon_threadsafe(self.began.set)
                assert go_on.wait(30)
            super().sync_data(handle)

    disk = Hanging()

    async def main() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        log = JournalLog(tmp_path, KEY, loop.call_soon_threadsafe, disk)

        async def told(start: Callable[[Callable[[object], None]], None]) -> object:
            future: asyncio.Future[object] = loop.create_future()
            start(future.set_result)
            return await future

        async def begun(server: str) -> Journal:
            made = log.create(facts(server=server))
            assert await told(lambda d: made.cut(1, b"", [], whole=True, done=d)) is None
            return made

        held, other = await begun("held"), await begun("other")
        held_up = [loop.create_future()]
        held.step(2, b"", held_up[0].set_result)
        await disk.began.wait()
        for number in range(3, 40):
            held_up.append(loop.create_future())
            held.step(number, b"", held_up[-1].set_result)
        for number in range(2, 40):
            assert await told(lambda d, n=number: other.step(n, b"", d)) is None
        assert not any(future.done() for future in held_up)
        go_on.set()
        assert set(await asyncio.gather(*held_up)) == {None}
        assert disk.syncs[disk.hangs] == 3
        await log.close()

    loop: asyncio.AbstractEventLoop
    try:
        asyncio.run(asyncio.wait_for(main(), 60))
    finally:
        go_on.set()
    for path in find(tmp_path):
        assert load(path, KEY, ALL).records[-1].number == 39


WRITER = """
import asyncio, os, random, sys
from migrate.shell import journal as module
from migrate.shell.journal import JournalLog, Phase
from migrate.shell.journal_format import Facts

module.LOG_BYTES_MIN = 30_000
module.HOLD_AFTER, module.HOLD_S = 1, 60.0
folder, seed = sys.argv[1], int(sys.argv[2])
window = 16 if seed % 2 else 1  # the loop commits what comes one by one

async def main():
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    log = JournalLog(folder, b"k" * 32, loop.call_soon_threadsafe, soon=loop.call_soon)
    facts = Facts(journal="j1", server="srv/1", cls="c", version=1, epoch=1)
    full = []
    where = [log.create(facts, on_full=full.append)]
    flying, room, number = 0, asyncio.Event(), 0
    def done(error, n):
        nonlocal flying
        assert error is None
        os.write(1, b"%d\\n" % n)
        flying -= 1
        room.set()
    whole = where[0]
    counted = set()
    while True:
        number += 1
        where = [j for j in where if j.phase is not Phase.CLOSED]
        if full and len(where) == 1 and where[0].phase is Phase.OPEN:
            full.clear()
            whole = log.create(facts, replaces=where[0], on_full=full.append)
            where.append(whole)
        told = []
        def once(error, n=number, told=told):
            if not told:
                told.append(n)
                done(error, n)
        flying += 1
        for j in where:
            j.cut(number, b"%d" % number, [b"x" * rng.randrange(2000)], whole=j is whole, done=once)
        whole = None
        while flying >= window:
            room.clear()
            await room.wait()

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_a_writer_that_is_killed_at_any_moment_leaves_all_that_it_told(
    tmp_path: pathlib.Path,
) -> None:
    rng = Random(3)
    replaced = 0
    for seed in range(25):
        folder = tmp_path / str(seed)
        folder.mkdir()
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        ) as writer:
            assert writer.stdout is not None
            lines = 0
            for _ in range(rng.randrange(1, 400)):
                lines = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split(b"\n")[:-1]
            told = max([lines, *map(int, rest)])
        (path,) = find(folder)
        found = load(path, KEY, ALL)
        numbers = [record.number for record in found.records]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert all(bytes(r.record) == b"%d" % r.number for r in found.records)
        assert numbers[-1] >= told, (seed, numbers[-1], told)
        replaced += numbers[0] > 1
        sweep(folder)
        assert os.listdir(folder) == [os.path.basename(path)]
    assert replaced > 5
