"""Resources behave afterwards as the originals would have, and the originals still do."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextvars
import gzip
import io
import logging
import multiprocessing
import os
import pathlib
import queue
import socket
import struct
import sys
import tempfile
import threading
import types
import weakref
from typing import Any, cast

import pytest

import serializers
from serializers import LoadFailed, NotSerializable


def trip(obj: Any) -> Any:
    return serializers.loads(serializers.dumps(obj))


class Holder:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


# --- threads -------------------------------------------------------------------------------------


def test_a_lock_is_as_locked_as_it_was_and_the_original_too() -> None:
    free, held = threading.Lock(), threading.Lock()
    held.acquire()
    copied_free, copied_held = trip((free, held))

    assert not copied_free.locked() and copied_held.locked()
    assert not free.locked() and held.locked()
    copied_held.release()
    assert held.locked()


def test_a_free_rlock_comes_back_free_for_other_threads() -> None:
    lock = trip(threading.RLock())
    got = []
    thread = threading.Thread(target=lambda: got.append(lock.acquire(timeout=10)))
    thread.start()
    thread.join()

    assert got == [True]


def test_an_rlock_held_by_the_migrating_thread_is_held_as_often_by_the_loading_one() -> None:
    lock = threading.RLock()
    with lock, lock:
        copy = trip(lock)
    copy.release()
    copy.release()
    with pytest.raises(RuntimeError):
        copy.release()


def test_an_rlock_held_by_another_thread_is_refused() -> None:
    lock = threading.RLock()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    try:
        with pytest.raises(NotSerializable, match=r"Holder\.lock: _thread\.RLock: another thread"):
            serializers.dumps(Holder(lock=lock))
    finally:
        done.set()
        thread.join()


def test_a_condition_shares_its_lock_and_wakes_waiters() -> None:
    lock = threading.Lock()
    holder = trip(
        Holder(lock=lock, condition=threading.Condition(lock), other=threading.Condition())
    )
    with holder.condition:
        assert holder.lock.locked()
    woken = []

    def wait() -> None:
        with holder.other:
            woken.append(holder.other.wait_for(lambda: holder.condition is None, timeout=30))

    thread = threading.Thread(target=wait)
    thread.start()
    with holder.other:
        holder.condition = None
        holder.other.notify_all()
    thread.join()
    assert woken == [True]


def test_a_condition_in_which_a_thread_waits_is_refused() -> None:
    condition = threading.Condition()
    entered = threading.Event()
    stop: list[int] = []

    def wait() -> None:
        with condition:
            entered.set()
            condition.wait_for(lambda: stop, timeout=30)

    thread = threading.Thread(target=wait)
    thread.start()
    assert entered.wait(30)
    with condition:
        pass  # The lock is free again only once the thread waits.
    try:
        with pytest.raises(NotSerializable, match="1 threads wait"):
            serializers.dumps([condition])
    finally:
        with condition:
            stop.append(1)
            condition.notify_all()
        thread.join()


def test_semaphores_events_and_barriers_keep_their_state() -> None:
    semaphore, bounded, event = (
        threading.Semaphore(3),
        threading.BoundedSemaphore(1),
        threading.Event(),
    )
    semaphore.acquire()
    event.set()
    semaphore, bounded, event, cleared, barrier = trip(
        (semaphore, bounded, event, threading.Event(), threading.Barrier(2))
    )

    assert [semaphore.acquire(blocking=False) for _ in range(3)] == [True, True, False]
    with pytest.raises(ValueError):
        bounded.release()
    assert event.is_set() and not cleared.is_set() and barrier.parties == 2


def test_thread_locals_keep_the_values_of_this_thread() -> None:
    local = threading.local()
    local.value = [1]
    copy = trip(local)

    assert copy.value == [1] and copy.value is not local.value


def test_a_thread_not_started_can_be_started_afterwards() -> None:
    seen = queue.SimpleQueue[int]()
    thread, seen = trip((threading.Thread(target=seen.put, args=(7,), name="t", daemon=True), seen))
    assert (thread.name, thread.daemon, thread.is_alive()) == ("t", True, False)
    thread.start()
    thread.join()

    assert seen.get_nowait() == 7


def test_a_finished_thread_is_a_finished_thread() -> None:
    ran: list[int] = []
    thread = threading.Thread(target=ran.append, args=(1,))
    thread.start()
    thread.join()
    copy = trip(thread)

    assert not copy.is_alive() and copy.ident is not None and ran == [1]
    copy.join()
    with pytest.raises(RuntimeError):
        copy.start()


@pytest.mark.parametrize(
    "kind", [queue.Queue, queue.LifoQueue, queue.PriorityQueue, queue.SimpleQueue]
)
def test_queues_keep_items_and_order_and_the_original_keeps_its_own(kind: Any) -> None:
    source = kind()
    for number in (3, 1, 2):
        source.put(number)
    copy = trip(source)
    expected = [source.get() for _ in range(3)]

    assert [copy.get(timeout=10) for _ in range(3)] == expected and copy.empty()


# --- executors -----------------------------------------------------------------------------------


def test_an_idle_thread_pool_works_after_loading_even_right_after_its_last_result() -> None:
    with concurrent.futures.ThreadPoolExecutor(2, "worker") as pool:
        for _ in range(50):
            pool.submit(len, "x").result()
            with trip(pool) as copy:
                pass
        copy = trip(pool)
        with copy:
            assert copy.submit(len, "abc").result() == 3
            assert copy._max_workers == 2 and copy._thread_name_prefix == "worker"
        assert pool.submit(len, "ab").result() == 2
    with pytest.raises(RuntimeError):
        trip(pool).submit(len, "")


def test_a_thread_pool_with_work_is_refused_with_the_counts() -> None:
    started, release = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        release.wait(30)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        # The idle count of a pool drifts after an overload, so let there have been one.
        for future in [pool.submit(len, "") for _ in range(5)]:
            future.result()
        pool.submit(work)
        pool.submit(len, "")
        started.wait(30)
        try:
            with pytest.raises(NotSerializable, match="1 running, 1 queued"):
                serializers.dumps(Holder(pool=pool))
        finally:
            release.set()


def test_an_idle_process_pool_keeps_its_settings() -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context, max_tasks_per_child=5) as pool:
        with trip(pool) as copy:
            assert copy._max_workers == 2 and copy._max_tasks_per_child == 5
            assert copy._mp_context.get_start_method() == "spawn"


# --- asyncio -------------------------------------------------------------------------------------


def test_asyncio_primitives_keep_their_state_and_work_on_another_loop() -> None:
    async def make() -> Any:
        lock, event, semaphore = asyncio.Lock(), asyncio.Event(), asyncio.Semaphore(2)
        source: asyncio.Queue[int] = asyncio.Queue()
        # Waiting once binds them to this loop.
        waiter = asyncio.create_task(event.wait())
        getter = asyncio.create_task(source.get())
        await asyncio.wait([waiter], timeout=0)
        event.set()
        await source.put(0)
        await asyncio.gather(waiter, getter)
        await lock.acquire()
        await semaphore.acquire()
        for number in range(3):
            await source.put(number)
        state = serializers.dumps((lock, event, semaphore, source, asyncio.Condition(lock)))
        assert lock.locked() and source.qsize() == 3
        return serializers.loads(state)

    async def use(lock: Any, event: Any, semaphore: Any, source: Any, condition: Any) -> Any:
        assert lock.locked() and condition.locked()
        lock.release()
        async with condition:
            assert lock.locked()
        await event.wait()
        await semaphore.acquire()
        assert semaphore.locked()
        getters = [asyncio.create_task(source.get()) for _ in range(4)]
        await asyncio.wait(getters, timeout=0)
        await source.put(3)
        return await asyncio.gather(*getters)

    assert asyncio.run(use(*asyncio.run(make()))) == [0, 1, 2, 3]


def test_an_asyncio_lock_with_a_waiter_is_refused() -> None:
    async def run() -> None:
        lock = asyncio.Lock()
        await lock.acquire()
        waiter = asyncio.create_task(lock.acquire())
        await asyncio.wait([waiter], timeout=0)
        with pytest.raises(NotSerializable, match=r"Holder\.lock: asyncio\.locks\.Lock: 1 tasks"):
            serializers.dumps(Holder(lock=lock))
        lock.release()
        assert await waiter

    asyncio.run(run())


# --- files ---------------------------------------------------------------------------------------


def test_a_file_being_written_goes_on_where_it_was_and_is_not_truncated(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "out.txt"
    with open(path, "w", encoding="latin-1") as file:
        file.write("één")
        copy = trip(Holder(file=file)).file
        with copy:
            assert (copy.mode, copy.encoding, copy.name) == ("w", "latin-1", str(path))
            assert not copy.readable()
            copy.write("!")
        file.write("?")
        assert path.read_bytes() == "één!".encode("latin-1")
    assert path.read_bytes() == "één?".encode("latin-1")


@pytest.mark.parametrize(
    ("mode", "buffering"),
    [("r", -1), ("r+", -1), ("rb", -1), ("rb+", -1), ("rb", 0), ("rb+", 0)],
)
def test_a_file_being_read_goes_on_where_it_was(
    tmp_path: pathlib.Path, mode: str, buffering: int
) -> None:
    path = tmp_path / "in.txt"
    path.write_text("first\nsecond\nthird\n")
    with open(path, mode, buffering=buffering) as file:
        file.readline()
        with trip(file) as copy:
            assert type(copy) is type(file)
            assert copy.readlines() == file.readlines()
            assert copy.mode == file.mode


@pytest.mark.parametrize("mode", ["a", "ab", "x", "w+", "wb", "xb+"])
def test_every_mode_of_writing_is_kept_without_losing_content(
    tmp_path: pathlib.Path, mode: str
) -> None:
    path = tmp_path / "file"
    text: Any = b"abc" if "b" in mode else "abc"
    with open(path, mode) as file:
        file.write(text)
        with trip(file) as once, trip(once) as copy:
            copy.write(text)
    assert path.read_bytes() == b"abcabc"


def test_a_relative_name_is_found_after_the_folder_changed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pathlib.Path("name").write_text("text")
    with open("name") as file:
        os.chdir("/")
        with trip(file) as copy:
            assert copy.read() == "text"


def test_a_closed_file_is_closed_and_never_touched(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "closed"
    for mode in ("w", "wb"):
        with open(path, mode) as file:
            pass
        path.write_text("later")
        copy = trip(file)
        assert copy.closed and copy.name == str(path) and copy.mode == mode
        assert path.read_text() == "later"


def test_standard_streams_are_the_destinations_own() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        assert trip([stream])[0] is stream


def test_a_file_that_is_gone_at_the_destination_fails_the_load_by_name(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "gone"
    for mode in ("w", "a", "w+"):
        with open(path, mode) as file:
            data = serializers.dumps(file)
        path.unlink()
        with pytest.raises(LoadFailed, match=str(path)):
            serializers.loads(data)
        assert not path.exists()


def test_a_file_shorter_than_was_read_of_it_fails_the_load(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 100)
    with open(path, "rb") as file:
        file.read(50)
        data = serializers.dumps(file)
    path.write_bytes(b"")

    with pytest.raises(LoadFailed, match="has 0 bytes here"):
        serializers.loads(data)


def test_files_without_an_honest_way_are_refused(tmp_path: pathlib.Path) -> None:
    with gzip.open(tmp_path / "file.gz", "w") as written:
        with pytest.raises(NotSerializable, match="written"):
            serializers.dumps([written])
    read, write = os.pipe()
    os.close(write)
    with open(read) as pipe, pytest.raises(NotSerializable, match="list\\[0\\]"):
        serializers.dumps([pipe])
    one, two = socket.socketpair()
    with (
        one,
        two,
        one.makefile("rb") as socket_file,
        pytest.raises(NotSerializable, match="list\\[0\\]"),
    ):
        serializers.dumps([socket_file])


def test_a_file_too_large_to_travel_without_a_path_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr("serializers.files.CONTENT_BYTES_MAX", 10)
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 11)
        with pytest.raises(NotSerializable, match="11 bytes"):
            serializers.dumps([file])
    holder = tempfile.TemporaryDirectory()
    (pathlib.Path(holder.name) / "x").write_bytes(b"x" * 11)
    with pytest.raises(NotSerializable, match="more than 10"):
        serializers.dumps([holder])
    holder.cleanup()


def test_an_iterated_file_goes_on_where_it_stood_here_and_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_text("1\n2\n3\n")
    with open(path) as file:
        next(file)
        with trip(file) as copy:
            assert next(copy) == "2\n" == next(file) and list(copy) == ["3\n"] == list(file)


def test_a_text_file_keeps_how_it_treats_the_ends_of_lines(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    for newline in (None, "", "\n", "\r", "\r\n"):
        path.write_bytes(b"a\r\nb\rc\n")
        with open(path, newline=newline) as file, open(path, newline=newline) as twin:
            with trip(file) as copy:
                assert list(copy) == list(twin), newline
        with open(path, "w", newline=newline) as file, trip(file) as copy:
            copy.write("x\n")
            copy.flush()
            ends = {None: os.linesep, "": "\n"}.get(newline, newline)
            assert path.read_bytes() == b"x" + (ends or "").encode(), newline


def test_files_in_memory_keep_content_and_position() -> None:
    text, data = io.StringIO("abc"), io.BytesIO(b"abc")
    text.read(1)
    data.read(2)
    text, data = trip((text, data))

    assert (text.read(), data.read()) == ("bc", b"c")


# --- logging -------------------------------------------------------------------------------------


def test_loggers_are_those_of_the_process_by_name() -> None:
    logger = logging.getLogger("some.where")
    adapter = logging.LoggerAdapter(logger, {"a": 1})
    copies = trip([logger, logging.getLogger(), adapter])

    assert copies[0] is logger and copies[1] is logging.getLogger()
    assert copies[2].logger is logger and copies[2].extra == {"a": 1}


def test_a_logger_outside_the_hierarchy_is_carried_and_not_registered() -> None:
    logger = logging.Logger("never registered", logging.ERROR)
    logger.addHandler(logging.NullHandler())
    copy = trip(logger)

    assert copy is not logger and copy.level == logging.ERROR and len(copy.handlers) == 1
    copy.error("works")
    assert "never registered" not in logging.root.manager.loggerDict


# --- references and views ------------------------------------------------------------------------


def test_weak_references_follow_objects_of_the_same_stream() -> None:
    child = Holder()
    root = Holder(child=child, ref=weakref.ref(child), proxy=weakref.proxy(child))
    child.parent = weakref.ref(root)
    child.method = weakref.WeakMethod(root.child.__init__)
    copy = trip(root)

    assert copy.ref() is copy.child and copy.child.parent() is copy
    copy.child.mark = 1
    assert copy.proxy.mark == 1
    assert copy.child.method().__self__ is copy.child


def test_weak_references_to_nothing_else_are_dead_and_stay_so() -> None:
    lonely = Holder()
    dead, copy = weakref.ref(lonely), None
    data = serializers.dumps(dead)
    assert serializers.loads(data)() is None  # type: ignore[operator]
    del lonely
    copy = trip((dead, weakref.WeakSet()))
    assert copy[0]() is None and len(copy[1]) == 0


def test_weak_containers_hold_what_the_stream_holds() -> None:
    key = Holder()
    values: Any = weakref.WeakValueDictionary(a=key)
    keys: Any = weakref.WeakKeyDictionary({key: 1})
    key, values, keys, members = trip((key, values, keys, weakref.WeakSet([key])))

    assert values["a"] is key and keys[key] == 1 and key in members
    del key, members
    keys_left, values_left = len(keys), len(values)
    assert (keys_left, values_left) == (0, 0)


def test_memoryviews_look_into_the_same_memory_as_before() -> None:
    data = bytearray(range(20))
    views = [
        memoryview(data),
        memoryview(data)[4:8],
        memoryview(data)[::-2],
        memoryview(data).toreadonly(),
    ]
    shaped = memoryview(data).cast("B", (4, 5))
    data, views, shaped = trip((data, views, shaped))
    data[4] = 99

    assert [bytes(view) for view in views] == [
        bytes(data),
        bytes(data[4:8]),
        bytes(data[::-2]),
        bytes(data),
    ]
    assert views[1][0] == 99 and views[3].readonly and not views[0].readonly
    assert shaped.shape == (4, 5) and shaped[0, 4] == 99


def test_views_of_mappings_go_on_showing_them() -> None:
    mapping = {"a": 1}
    ordered = collections.OrderedDict(x=1)
    mapping, proxy, keys, items, ordered, order = trip(
        (
            mapping,
            types.MappingProxyType(mapping),
            mapping.keys(),
            mapping.items(),
            ordered,
            ordered.keys(),
        )
    )
    mapping["b"] = 2
    ordered["y"] = 1

    assert proxy["b"] == 2 and list(keys) == ["a", "b"] and ("b", 2) in items
    assert list(order) == ["x", "y"]
    assert trip(vars(Holder))["__init__"] is Holder.__init__


def test_bound_methods_stay_bound_to_the_object_in_the_stream() -> None:
    holder = Holder(items=[])
    holder.add = holder.items.append
    holder.again = holder.__init__
    copy = trip(holder)
    copy.add(1)
    copy.again(new=2)

    assert copy.items == [1] and copy.new == 2 and holder.items == []


class Factory:
    @classmethod
    def make(cls) -> Factory:
        return cls()


def test_class_methods_of_importable_classes_travel_by_name() -> None:
    data = serializers.dumps([Factory.make, Factory().make])
    first, second = serializers.loads(data)  # type: ignore[misc]

    assert first == Factory.make and second == Factory.make
    assert not serializers.base.parse_head(data).code_by_value


VARIABLE = contextvars.ContextVar("VARIABLE", default=1)


def test_context_variables_are_the_modules_own_or_rebuilt_with_their_default() -> None:
    local = contextvars.ContextVar("local", default=(5,))
    bare = contextvars.ContextVar[int]("bare")
    context = contextvars.copy_context()
    context.run(VARIABLE.set, 2)
    context.run(local.set, (6,))
    copy = trip([VARIABLE, local, bare, context])

    assert copy[0] is VARIABLE and copy[1].get() == (5,) and copy[1].name == "local"
    with pytest.raises(LookupError):
        copy[2].get()
    assert copy[3].run(VARIABLE.get) == 2 and copy[3].run(copy[1].get) == (6,)


# --- exceptions and the rest ---------------------------------------------------------------------


class Demanding(ValueError):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def test_exceptions_with_required_keywords_keep_fields_cause_and_notes() -> None:
    error = Demanding(code=3)
    error.__cause__ = KeyError("why")
    error.add_note("note")
    copy = trip(error)

    assert type(copy) is Demanding and copy.code == 3 and str(copy) == "code 3"
    assert repr(copy.__cause__) == "KeyError('why')" and copy.__notes__ == ["note"]


def test_exceptions_with_fields_in_c_keep_them() -> None:
    errors = [
        OSError(2, "no", "file"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"),
        SystemExit(3),
    ]
    copies = trip(errors)

    assert [str(copy) for copy in copies] == [str(error) for error in errors]
    assert (copies[0].filename, copies[2].code) == ("file", 3)


def test_compiled_structs_come_back() -> None:
    assert trip(struct.Struct("<IQ")).size == 12


# --- registering ---------------------------------------------------------------------------------


class Device:
    def __init__(self, number: int) -> None:
        self.number = number
        self.handle = (n for n in range(-1, number))
        next(self.handle)


class SpecialDevice(Device):
    pass


class OwnWay(Device):
    def __getstate__(self) -> dict[str, int]:
        return {"number": self.number}


def test_a_registered_type_and_its_subclasses_travel_by_their_function() -> None:
    with pytest.raises(NotSerializable, match=r"Device\.handle"):
        serializers.dumps(Device(3))
    serializers.register(Device, lambda device: (type(device), (device.number,)))
    try:
        copies = trip([Device(3), SpecialDevice(2), OwnWay(5)])
    finally:
        from serializers.resources import REDUCERS, on_register

        del REDUCERS[Device]
        for forget in on_register:
            forget()

    assert [list(copy.handle) for copy in copies[:2]] == [[0, 1, 2], [0, 1]]
    assert vars(copies[2]) == {"number": 5}


def test_a_registered_function_can_refuse_with_its_own_words() -> None:
    class Laser:
        pass

    def reduce(laser: Laser) -> Any:
        serializers.refuse(laser, "it is on", "turn it off")

    serializers.register(Laser, reduce)
    try:
        with pytest.raises(NotSerializable) as caught:
            serializers.dumps({"lasers": [Laser()]})
    finally:
        from serializers.resources import REDUCERS, on_register

        del REDUCERS[Laser]
        for forget in on_register:
            forget()
    assert str(caught.value).startswith("dict['lasers'][0]: ")
    assert str(caught.value).endswith("Laser: it is on; turn it off")


def test_a_loaded_traceback_holds_nothing_of_who_loaded_it() -> None:
    try:
        raise ValueError("x")
    except ValueError as exc:
        data = serializers.dumps(exc)

    step = cast(ValueError, serializers.loads(data)).__traceback__

    assert step is not None and step.tb_frame.f_code.co_name.startswith("test_a_loaded")
    while step is not None:
        assert step.tb_frame.f_back is None
        step = step.tb_next
