"""What every store of checkpoints promises; and files, through power cuts and kills."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from migrate.errors import Outcome, UsageError
from migrate.shell import stores
from migrate.shell.stores import (
    Disk,
    Exists,
    FileStore,
    MemoryStore,
    NotThere,
    ObjectStore,
    Store,
    StoreError,
    open_folder,
    open_store,
    try_out,
    url_of,
)

ROOT = pathlib.Path(__file__).parents[2]
ALL = 1 << 40


@pytest.fixture(params=["files", "memory", "objects in memory", "objects in files"])
def store(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Store:
    """Each home in turn, empty."""
    if request.param == "files":
        return FileStore(tmp_path)
    if request.param == "memory":
        return MemoryStore()
    objects = pytest.importorskip("obstore.store")
    if request.param == "objects in memory":
        return ObjectStore(objects.MemoryStore())
    return ObjectStore(objects.LocalStore(str(tmp_path)))


# -- the contract


def test_what_was_written_is_read_whatever_pieces_it_came_in(store: Store) -> None:
    pieces = [b"abc", bytearray(b""), memoryview(b"defg")[1:], b"h"]
    assert store.write("x.ckpt", pieces) == 7
    assert store.read("x.ckpt", ALL) == b"abcefgh"
    assert type(store.read("x.ckpt", ALL)) is bytearray  # arrays are used where they are


def test_a_beginning_can_be_read_alone(store: Store) -> None:
    store.write("x", [b"0123456789"])
    assert store.read("x", ALL, 4) == b"0123"
    assert store.read("x", ALL, 400) == b"0123456789"
    assert store.read("x", ALL, 0) == b""


def test_something_large_is_the_same_when_it_comes_back(store: Store) -> None:
    data = os.urandom(1 << 20) * 40
    store.write("large", [data[:5], memoryview(data)[5:]])
    assert store.read("large", ALL) == data


def test_a_second_writing_replaces_the_first(store: Store) -> None:
    store.write("x", [b"a longer one than the second"])
    store.write("x", [b"new"])
    assert store.read("x", ALL) == b"new"


def test_what_is_there_is_not_written_anew(store: Store) -> None:
    assert store.write_new("x", [b"fi", b"rst"]) == 5
    with pytest.raises(Exists) as caught:
        store.write_new("x", [b"second"])
    assert caught.value.outcome is Outcome.NOT_DONE
    assert store.read("x", ALL) == b"first"
    store.remove("x")
    store.write_new("x", [b"third"])
    assert store.names("") == ["x"] and store.read("x", ALL) == b"third"


def test_of_many_who_write_a_new_name_at_once_one_succeeds(store: Store) -> None:
    begin = threading.Barrier(4, timeout=60)
    wins: list[int] = []

    def write(writer: int) -> None:
        for name in range(20):
            begin.wait()
            with contextlib.suppress(Exists):
                store.write_new(f"{name:02}", [b"%d" % writer, bytes(50_000)])
                wins.append(name)

    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(wins) == list(range(20))
    assert store.names("") == [f"{name:02}" for name in range(20)]


def test_what_is_not_there_says_so_and_can_be_removed_all_the_same(store: Store) -> None:
    with pytest.raises(NotThere):
        store.read("x", ALL)
    store.remove("x")
    store.write("x", [b"1"])
    store.remove("x")
    with pytest.raises(NotThere):
        store.read("x", ALL)


def test_what_is_too_large_is_not_read(store: Store) -> None:
    store.write("x", [b"12345"])
    with pytest.raises(StoreError, match="5 bytes"):
        store.read("x", 4)
    assert store.read("x", 5) == b"12345"


def test_names_are_listed_by_their_beginning_in_order(store: Store) -> None:
    for name in ("b.2", "b.1", "b", "c.1", "bb"):
        store.write(name, [b"1"])
    assert store.names("b.") == ["b.1", "b.2"]
    assert store.names("b") == ["b", "b.1", "b.2", "bb"]
    assert store.names("z") == []


def test_names_with_slashes_are_told_apart_by_their_folders(store: Store) -> None:
    for name in ("a/b/1", "a/b/2", "a/c/1", "a/b2", "b"):
        store.write_new(name, [name.encode()])
    assert store.names("a/b/") == ["a/b/1", "a/b/2"]
    assert store.names("a/c/") == ["a/c/1"]
    assert store.names("a/none/") == []
    assert store.names("b/") == []
    assert store.read("a/b/2", ALL) == b"a/b/2"
    with pytest.raises(Exists):
        store.write_new("a/b/1", [b"again"])
    with pytest.raises(NotThere):
        store.read("a/none/1", ALL)
    store.remove("a/none/1")
    for name in ("a/b/1", "a/b/2"):
        store.remove(name)
    assert store.names("a/b/") == []
    store.write_new("a/b/1", [b"anew"])
    assert store.read("a/b/1", ALL) == b"anew"


def test_what_is_tried_out_leaves_nothing(store: Store) -> None:
    try_out(store, "a/")
    assert store.names("a/") == []


def test_a_store_that_knows_no_conditional_puts_is_found_out() -> None:
    class Overwriting(MemoryStore):
        def write_new(self, name: str, pieces: Sequence[bytes | bytearray | memoryview]) -> int:
            return self.write(name, pieces)

    store = Overwriting()
    with pytest.raises(StoreError, match="no conditional puts"):
        try_out(store, "a/")
    assert store.names("a/") == []


def test_a_name_may_hold_spaces_and_letters_of_any_language(store: Store) -> None:
    store.write("Zähler 1 (alt).ckpt", [b"1"])
    assert store.read("Zähler 1 (alt).ckpt", ALL) == b"1"
    assert store.names("Zähler") == ["Zähler 1 (alt).ckpt"]


def test_of_two_who_write_at_once_one_is_there_whole(store: Store) -> None:
    contents = [bytes([65 + n]) * 2_000_000 for n in range(4)]
    begin = threading.Barrier(len(contents))

    def write(data: bytes) -> None:
        begin.wait()
        for _ in range(5):
            store.write("x", [data[:1000], data[1000:]])

    writers = [threading.Thread(target=write, args=(data,)) for data in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        try:
            assert store.read("x", ALL) in contents
        except NotThere:
            continue  # nobody has written yet
    for writer in writers:
        writer.join()
    assert store.read("x", ALL) in contents


# -- objects


def test_names_in_folders_of_a_bucket() -> None:
    objects = pytest.importorskip("obstore.store")
    store = ObjectStore(objects.MemoryStore())
    for name in ("a/b.1", "a/b.2", "a/c", "b.1"):
        store.write(name, [b"1"])
    assert store.names("a/b.") == ["a/b.1", "a/b.2"]


def test_a_store_that_cannot_be_reached_says_that_the_outcome_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects = pytest.importorskip("obstore.store")
    # A port that was free a moment ago and that nobody listens on.
    closed = objects.S3Store(
        "bucket",
        config={"endpoint": "http://127.0.0.1:9", "region": "x"},
        access_key_id="a",
        secret_access_key="b",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    with pytest.raises(StoreError) as caught:
        ObjectStore(closed).write("x", [b"1"])
    assert caught.value.outcome is Outcome.UNKNOWN
    assert "\n" not in caught.value.reason
    with pytest.raises(StoreError) as caught:
        ObjectStore(closed).read("x", ALL)
    assert caught.value.outcome is Outcome.NOT_DONE


def test_without_obstore_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"livemigrate\[s3\]"):
        open_store("s3://bucket/x")


# -- URLs


def test_urls_name_stores() -> None:
    store, name = open_store("file:///var/backups/my%20room.ckpt")
    assert isinstance(store, FileStore)
    assert (store.folder, name) == ("/var/backups", "my room.ckpt")
    assert open_store("file://localhost/x")[1] == "x"
    one, name = open_store("memory://tests/a/b")
    assert open_store("memory://tests/c")[0] is one and name == "a/b"
    assert open_store("memory://others/c")[0] is not one


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x.ckpt",
        "/var/x.ckpt",
        "file://x.ckpt",
        "file://other/x.ckpt",
        "file:///",
        "file:///folder/",
        "file:///folder/..",
        "file:///a%00b",
        "http://host/x",
        "s3://bucket",
        "s3://bucket/",
        "s3:///x",
        "memory://x",
    ],
)
def test_what_is_no_url_of_a_checkpoint_is_refused_with_what_is_wrong(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        url_of(url)
    assert url in caught.value.message


def test_urls_of_folders(tmp_path: pathlib.Path) -> None:
    store, prefix = open_folder("file:///var/journals%20here/")
    assert isinstance(store, FileStore)
    assert (store.folder, prefix) == ("/var/journals here", "")
    assert open_folder("memory://tests")[1] == ""
    assert open_folder("memory://tests/a/b/")[1] == "a/b/"
    pytest.importorskip("obstore")
    assert open_folder("s3://bucket")[1] == ""
    assert open_folder("s3://bucket/a/b")[1] == "a/b/"


@pytest.mark.parametrize(
    "url", ["x", "/var/x", "file://", "file:///", "file://host/x", "s3://", "s3:///a", "ftp://x/y"]
)
def test_what_is_no_url_of_a_folder_is_refused_with_what_is_wrong(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_folder(url)
    assert url in caught.value.message


def test_a_path_becomes_a_url(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store, name = open_store(url_of(pathlib.Path("a b#?%.ckpt")))
    assert isinstance(store, FileStore)
    assert (store.folder, name) == (str(tmp_path), "a b#?%.ckpt")
    with pytest.raises(UsageError):
        url_of(3)  # type: ignore[arg-type]


# -- files


def test_files_are_for_their_user_alone_and_nothing_else_is_left(tmp_path: pathlib.Path) -> None:
    FileStore(tmp_path).write("x", [b"1"])
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda folder: folder.rmdir(), "there is no folder"),
        (lambda folder: (folder / "x").mkdir(), "a folder has that name"),
        (lambda folder: (folder.rmdir(), folder.write_text("")), "there is no folder"),
    ],
)
def test_what_is_in_the_way_is_named(
    prepare: Callable[[pathlib.Path], object], text: str, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(StoreError, match=text) as caught:
        FileStore(folder).write("x", [b"1"])
    assert caught.value.outcome is Outcome.NOT_DONE
    left = os.listdir(folder) if folder.is_dir() else []
    assert left in ([], ["x"])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: socket_at(path)])
def test_what_is_no_file_is_not_replaced_by_one(
    make: Callable[[pathlib.Path], object], tmp_path: pathlib.Path
) -> None:
    # As root, a rename over a device would take it away from everybody on the machine.
    make(tmp_path / "x")
    before = (tmp_path / "x").lstat()
    with pytest.raises(StoreError, match="no regular file") as caught:
        FileStore(tmp_path).write("x", [b"1"])
    assert caught.value.outcome is Outcome.NOT_DONE
    assert (tmp_path / "x").lstat() == before and os.listdir(tmp_path) == ["x"]


def socket_at(path: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: pathlib.Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here" / "x").symlink_to(tmp_path / "there" / "y")
    store = FileStore(tmp_path / "here")
    for contents in (b"1", b"2"):  # once leading nowhere yet
        store.write("x", [contents])
        assert store.read("x", ALL) == contents
    assert (tmp_path / "here" / "x").is_symlink()
    assert os.listdir(tmp_path / "there") == ["y"]


def test_a_folder_that_cannot_be_written_to_is_an_error_that_leaves_nothing() -> None:
    # A file system that is read-only for everybody, also for root.
    with pytest.raises(StoreError) as caught:
        FileStore("/proc/self").write("x", [b"1"])
    assert caught.value.outcome is Outcome.NOT_DONE


def test_reading_what_is_no_file_does_not_wait(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="no regular file"):
        FileStore(tmp_path).read("pipe", ALL)
    with pytest.raises(StoreError):
        FileStore(tmp_path.parent).read(tmp_path.name, ALL)
    with pytest.raises(NotThere):
        FileStore(tmp_path / "pipe").read("x", ALL)


@pytest.mark.parametrize("failing", ["write", "sync", "rename"])
def test_a_full_disk_leaves_what_was_there(failing: str, tmp_path: pathlib.Path) -> None:
    class Full(Disk):
        pass

    def fail(self: Disk, *args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    FileStore(tmp_path).write("x", [b"old"])
    setattr(Full, failing, fail)
    with pytest.raises(StoreError, match="No space left") as caught:
        FileStore(tmp_path, Full()).write("x", [b"new"])
    assert caught.value.outcome is Outcome.NOT_DONE
    assert os.listdir(tmp_path) == ["x"]
    assert FileStore(tmp_path).read("x", ALL) == b"old"


def test_a_limit_of_the_system_on_file_sizes_leaves_what_was_there(tmp_path: pathlib.Path) -> None:
    FileStore(tmp_path).write("x", [b"old"])
    code = (
        "import resource, signal, sys\n"
        "from migrate.shell.stores import FileStore, StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: FileStore(sys.argv[1]).write('x', [b'n' * 1_000_000])\n"
        "except StoreError as error: print(error.reason)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large" in told.stdout
    assert os.listdir(tmp_path) == ["x"]
    assert FileStore(tmp_path).read("x", ALL) == b"old"


def test_a_folder_that_cannot_be_synced_makes_the_outcome_unknown(tmp_path: pathlib.Path) -> None:
    class Unsure(Disk):
        def sync_folder(self, folder: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StoreError) as caught:
        FileStore(tmp_path, Unsure()).write("x", [b"new"])
    assert caught.value.outcome is Outcome.UNKNOWN


def test_what_a_killed_writer_left_is_removed_and_what_is_being_written_is_not(
    tmp_path: pathlib.Path,
) -> None:
    old = time.time() - 3_600
    abandoned, held, other, young = (
        tmp_path / f".{name}.{n:016x}.part" for n, name in enumerate(("x", "x", "y", "x"))
    )
    for path in (abandoned, held, other, young):
        path.write_bytes(b"half")
        if path is not young:
            os.utime(path, (old, old))
    with open(held, "rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        FileStore(tmp_path).write("x", [b"1"])
    assert sorted(tmp_path.iterdir()) == sorted([held, other, young, tmp_path / "x"])


def test_the_longest_name_that_a_file_may_have_can_be_written(tmp_path: pathlib.Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        FileStore(tmp_path).write(name, [b"1"])
        assert FileStore(tmp_path).read(name, ALL) == b"1"
    with pytest.raises(StoreError, match="too long"):
        FileStore(tmp_path).write("x" * 256, [b"1"])


# -- power cuts (SCENARIOS 53)


class PowerCut(BaseException):
    """Nothing after this happens."""


@dataclass
class SimFile:
    """Contents as the system shows them, and as they are on the platters."""

    shown: bytes = b""
    kept: bytes = b""


@dataclass
class SimDisk(Disk):
    """A disk that loses at a power cut whatever was not synced.

    Data is safe after `sync`, names after `sync_folder`. A change of a name that was not synced
    may or may not have reached the platters, and data that was not synced is there, in part, or
    is zeros: the worst that file systems do.
    """

    cut_at: int = -1
    steps: int = 0
    names: dict[str, SimFile] = field(default_factory=dict)
    kept_names: dict[str, SimFile] = field(default_factory=dict)
    changes: list[tuple[str, str, SimFile | None]] = field(default_factory=list)
    open: dict[int, SimFile] = field(default_factory=dict)

    def _step(self) -> None:
        self.steps += 1
        if self.steps == self.cut_at:
            raise PowerCut

    def create(self, path: str) -> int:
        self._step()
        file = SimFile()
        self.names[path] = file
        self.changes.append(("set", path, file))
        handle = len(self.open) + 3
        self.open[handle] = file
        return handle

    def write(self, handle: int, piece: memoryview) -> None:
        for half in (piece[: len(piece) // 2], piece[len(piece) // 2 :]):
            self._step()
            self.open[handle].shown += bytes(half)

    def sync(self, handle: int) -> None:
        self._step()
        self.open[handle].kept = self.open[handle].shown
        self._step()

    def close(self, handle: int) -> None:
        del self.open[handle]

    def rename(self, path: str, to: str) -> None:
        self._step()
        file = self.names.pop(path)
        self.names[to] = file
        self.changes.append(("move", f"{path}\0{to}", file))
        self._step()

    def link(self, path: str, to: str) -> None:
        self._step()
        if to in self.names:
            raise FileExistsError(errno.EEXIST, "File exists")
        self.names[to] = self.names[path]
        self.changes.append(("set", to, self.names[path]))
        self._step()

    def sync_folder(self, folder: str) -> None:
        self._step()
        self.kept_names = dict(self.names)
        self.changes.clear()
        self._step()

    def remove(self, path: str) -> None:
        self._step()
        self.names.pop(path, None)
        self.changes.append(("remove", path, None))

    def after_the_cut(self) -> Iterator[dict[str, bytes]]:
        """Every state that the disk may be in: name to contents."""
        for happened in itertools.product([False, True], repeat=len(self.changes)):
            names = dict(self.kept_names)
            for yes, (what, path, file) in zip(happened, self.changes, strict=True):
                if not yes:
                    continue
                if what == "set" and file is not None:
                    names[path] = file
                elif what == "move" and file is not None:
                    source, to = path.split("\0")
                    names.pop(source, None)
                    names[to] = file
                else:
                    names.pop(path, None)
            for damage in (0, 1, 2, 3):
                yield {name: self._contents(file, damage) for name, file in names.items()}

    @staticmethod
    def _contents(file: SimFile, damage: int) -> bytes:
        if file.shown == file.kept:
            return file.kept
        half = len(file.shown) // 2
        return (
            file.kept,
            file.shown,
            file.shown[:half],
            bytes(len(file.shown)),
        )[damage]


OLD, NEW = b"the old checkpoint, whole", b"the new checkpoint, which is longer"


def written(disk: SimDisk, contents: bytes) -> None:
    FileStore("/sim", disk).write("x", [contents[:9], contents[9:]])


def disk_with_old() -> SimDisk:
    disk = SimDisk()
    written(disk, OLD)
    disk.steps = 0
    return disk


def cuts(steps: int) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Every state of the disk after a cut at each step of replacing OLD by NEW."""
    for cut_at in range(1, steps + 1):
        disk = disk_with_old()
        disk.cut_at = cut_at
        with pytest.raises(PowerCut):
            written(disk, NEW)
        for state in disk.after_the_cut():
            yield cut_at, state


def steps_of_a_write() -> int:
    disk = disk_with_old()
    written(disk, NEW)
    assert disk.kept_names["/sim/x"].kept == NEW
    return disk.steps


def test_after_a_power_cut_a_new_name_is_there_whole_or_not_at_all() -> None:
    def write(cut_at: int) -> SimDisk:
        disk = SimDisk(cut_at=cut_at)
        with contextlib.suppress(PowerCut):
            FileStore("/sim", disk).write_new("x", [NEW[:9], NEW[9:]])
        return disk

    steps = write(-1).steps
    seen = set()
    for cut_at in range(1, steps + 1):
        seen |= {state.get("/sim/x") for state in write(cut_at).after_the_cut()}
    assert seen == {None, NEW}
    assert all(state["/sim/x"] == NEW for state in write(-1).after_the_cut())


def test_s53_after_a_power_cut_at_any_step_the_old_or_the_new_is_there_whole() -> None:
    steps = steps_of_a_write()
    assert steps >= 10
    seen = {OLD: 0, NEW: 0}
    for cut_at, state in cuts(steps):
        contents = state.get("/sim/x")
        assert contents in (OLD, NEW), (cut_at, state)
        seen[contents] += 1
    assert all(seen.values())
    # And once the write has returned, it is the new one whatever happens.
    disk = disk_with_old()
    written(disk, NEW)
    assert all(state["/sim/x"] == NEW for state in disk.after_the_cut())


@pytest.mark.parametrize("without", ["sync", "sync_folder"])
def test_without_either_sync_a_power_cut_would_be_noticed(
    without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = steps_of_a_write() - 2
    monkeypatch.setattr(SimDisk, without, lambda self, of: None)
    lost = []
    for cut_at in range(1, steps + 2):
        disk = SimDisk()
        # The old one was written by somebody who syncs.
        file = SimFile(OLD, OLD)
        disk.names["/sim/x"] = disk.kept_names["/sim/x"] = file
        disk.cut_at = cut_at
        returned = False
        try:
            written(disk, NEW)
            returned = True
        except PowerCut:
            pass
        for state in disk.after_the_cut():
            contents = state.get("/sim/x")
            if contents not in (OLD, NEW) or (returned and contents != NEW):
                lost.append((cut_at, contents))
    assert lost


def test_writing_over_the_old_one_would_be_noticed() -> None:
    class InPlace(SimDisk):
        def create(self, path: str) -> int:
            handle = super().create(path)
            file = self.open[handle]
            self.names["/sim/x"] = file
            self.changes.append(("set", "/sim/x", file))
            return handle

    disk = InPlace()
    file = SimFile(OLD, OLD)
    disk.names["/sim/x"] = disk.kept_names["/sim/x"] = file
    disk.cut_at = 4
    with pytest.raises(PowerCut):
        written(disk, NEW)
    assert any(state.get("/sim/x") not in (OLD, NEW) for state in disk.after_the_cut())


KILLED = """
import os, signal, sys
from migrate.shell.stores import Disk, FileStore

at, steps = int(sys.argv[2]), 0

class Deadly(Disk):
    pass

def deadly(name):
    real = getattr(Disk, name)
    def method(self, *args):
        global steps
        for before in (True, False):
            if not before:
                out = real(self, *args)
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return out
    return method

for name in ("create", "write", "sync", "rename", "sync_folder", "close"):
    setattr(Deadly, name, deadly(name))
FileStore(sys.argv[1], Deadly()).write("x", [b"n" * 50_000, b"n" * 50_000])
print(steps)
"""


def test_a_writer_that_is_killed_at_any_step_leaves_the_old_or_the_new(
    tmp_path: pathlib.Path,
) -> None:
    new = b"n" * 100_000

    def killed_at(step: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), str(step)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    steps = int(killed_at(0).stdout)
    assert steps >= 12
    seen = set()
    for step in range(1, steps + 1):
        FileStore(tmp_path).write("x", [OLD])
        assert killed_at(step).returncode == -signal.SIGKILL
        contents = bytes(FileStore(tmp_path).read("x", ALL))
        assert contents in (OLD, new)
        seen.add(contents)
    assert seen == {OLD, new}
    # What was left behind goes with the next write, once it is old enough.
    left = [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    assert left
    for path in left:
        os.utime(path, (0, 0))
    FileStore(tmp_path).write("x", [OLD])
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_steps_of_a_disk_are_all_cut() -> None:
    # A new system call would need its place in the simulated disk.
    ours = {name for name in vars(Disk) if not name.startswith("_")}
    assert ours <= set(vars(SimDisk)), ours - set(vars(SimDisk))
    assert stores.ABANDONED_S > 0
