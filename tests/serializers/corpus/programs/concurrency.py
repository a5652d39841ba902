"""Threads, queues, asyncio and what waits in them."""

from ..cases import case


@case
def locks_locked_and_free():
    import threading

    class Guard:
        def __init__(self):
            self.free, self.held = threading.Lock(), threading.Lock()
            self.held.acquire()
            self.again = threading.RLock()
            self.same = self.free

    def build():
        return Guard()

    def check(guard):
        assert guard.held.locked() and not guard.free.locked() and guard.same is guard.free
        with guard.free, guard.again, guard.again:
            pass
        seen = []
        thread = threading.Thread(target=lambda: seen.append(guard.again.acquire(timeout=5)))
        thread.start()
        thread.join()
        assert seen == [True]


@case
def conditions_semaphores_events_barriers():
    import threading

    class Gate:
        def __init__(self):
            self.lock = threading.RLock()
            self.ready = threading.Condition(self.lock)
            self.other = threading.Condition(self.lock)
            self.slots = threading.BoundedSemaphore(2)
            self.event = threading.Event()
            self.barrier = threading.Barrier(2)

    def build():
        gate = Gate()
        gate.slots.acquire()
        gate.event.set()
        return gate

    def check(gate):
        assert gate.event.is_set() and gate.slots.acquire(blocking=False)
        assert not gate.slots.acquire(blocking=False)
        gate.slots.release()
        gate.slots.release()
        try:
            gate.slots.release()
        except ValueError:
            pass
        else:
            raise AssertionError("the bound is lost")
        order = []

        def wait():
            with gate.ready:
                gate.barrier.wait(5)
                order.append(gate.ready.wait(5))

        thread = threading.Thread(target=wait)
        thread.start()
        gate.barrier.wait(5)
        with gate.other:
            gate.ready.notify()
        thread.join()
        assert order == [True]
        gate.slots.acquire()


@case
def queues_with_items_and_unfinished_tasks():
    import queue

    class Work:
        def __init__(self):
            self.plain, self.last = queue.Queue(maxsize=3), queue.LifoQueue()
            self.first, self.simple = queue.PriorityQueue(), queue.SimpleQueue()

    def build():
        work = Work()
        for q in (work.plain, work.last, work.first, work.simple):
            q.put(2)
            q.put(1)
        work.plain.get()
        return work

    def check(work):
        assert work.plain.unfinished_tasks == 2 and work.plain.maxsize == 3
        assert work.plain.get(timeout=5) == 1 and work.last.get(timeout=5) == 1
        assert work.first.get(timeout=5) == 1 and work.simple.get(timeout=5) == 2
        work.plain.task_done()
        work.plain.task_done()
        work.plain.join()
        work.plain.put(3)


@case
def thread_local_values():
    import threading

    class Context:
        def __init__(self):
            self.local = threading.local()
            self.local.user = ["me"]

    def build():
        return Context()

    def check(context):
        assert context.local.user == ["me"]
        seen = []
        thread = threading.Thread(target=lambda: seen.append(hasattr(context.local, "user")))
        thread.start()
        thread.join()
        assert seen == [False]


@case
def subclass_of_thread_local():
    import threading

    class Local(threading.local):
        def __init__(self, start):
            self.n = start

        def up(self):
            self.n += 1
            return self.n

    def build():
        local = Local(5)
        local.up()
        return local

    def check(local):
        assert local.up() == 7
        seen = []
        thread = threading.Thread(target=lambda: seen.append(local.up()))
        thread.start()
        thread.join()
        assert seen == [6]


@case
def threads_not_started_and_over():
    import threading

    class Worker(threading.Thread):
        def __init__(self, items):
            super().__init__(name="worker", daemon=True)
            self.items, self.out = items, []

        def run(self):
            self.out.extend(item * 2 for item in self.items)

    def build():
        done = Worker([1])
        done.start()
        done.join()
        plain = threading.Thread(target=print, args=("x",), kwargs={"end": ""}, name="p")
        timer = threading.Timer(0.01, done.out.append, args=(5,))
        return [Worker([2, 3]), done, plain, timer]

    def check(threads):
        fresh, done, plain, timer = threads
        assert done.out == [2] and not done.is_alive() and plain.name == "p"
        assert fresh.daemon and fresh.name == "worker"
        fresh.start()
        fresh.join()
        assert fresh.out == [4, 6]
        timer.start()
        timer.join()
        assert done.out == [2, 5]


@case
def pools_of_threads():
    from concurrent.futures import ThreadPoolExecutor

    class Service:
        def __init__(self):
            self.pool = ThreadPoolExecutor(2, thread_name_prefix="svc")
            self.closed = ThreadPoolExecutor(1)
            self.closed.shutdown()
            self.results = []

        def run(self, n):
            self.results.append(self.pool.submit(pow, n, 2).result(timeout=10))

    def build():
        service = Service()
        service.run(2)
        return service

    def check(service):
        service.run(3)
        assert service.results == [4, 9] and service.pool._max_workers == 2
        try:
            service.closed.submit(print)
        except RuntimeError:
            pass
        else:
            raise AssertionError("it was shut down")


@case
def futures_that_are_done():
    from concurrent.futures import Future

    class Cache:
        def __init__(self):
            self.done, self.failed, self.pending = Future(), Future(), Future()
            self.done.set_result([1])
            self.failed.set_exception(KeyError("k"))
            self.seen = []
            self.pending.add_done_callback(lambda future: self.seen.append(future.result()))

    def build():
        return Cache()

    def check(cache):
        assert cache.done.result(1) == [1] and type(cache.failed.exception(1)) is KeyError
        cache.pending.set_result(4)
        assert cache.seen == [4] and cache.pending.done()


@case
def asyncio_primitives():
    import asyncio

    class Room:
        def __init__(self):
            self.lock, self.event = asyncio.Lock(), asyncio.Event()
            self.slots = asyncio.Semaphore(2)
            self.queue, self.ranked = asyncio.Queue(maxsize=2), asyncio.PriorityQueue()
            self.changed = asyncio.Condition(self.lock)

    def build():
        room = Room()

        async def use():
            async with room.lock:
                room.event.set()
            await room.slots.acquire()
            for q in (room.queue, room.ranked):
                await q.put(2)
                await q.put(1)
            room.queue.get_nowait()
            blocked = asyncio.ensure_future(room.queue.put(9))
            await asyncio.sleep(0)
            await blocked

        asyncio.run(use())
        return room

    def check(room):
        async def use():
            assert room.event.is_set() and not room.slots.locked()
            await room.slots.acquire()
            assert room.slots.locked() and room.queue.full()
            assert [room.queue.get_nowait(), room.queue.get_nowait()] == [1, 9]
            assert await room.ranked.get() == 1
            assert room.changed._lock is room.lock

            async def notify():
                async with room.lock:
                    room.changed.notify_all()

            async with room.changed:
                task = asyncio.ensure_future(notify())
                await asyncio.wait_for(room.changed.wait(), 5)
            await task

        asyncio.run(use())


@case
def asyncio_futures_and_tasks_that_are_done():
    import asyncio

    class Requests:
        def __init__(self):
            self.log = []

        async def start(self):
            loop = asyncio.get_running_loop()
            self.done, self.failed = loop.create_future(), loop.create_future()
            self.waiting = loop.create_future()
            self.done.set_result({"a": 1})
            self.failed.set_exception(LookupError("gone"))
            self.failed.exception()
            self.waiting.add_done_callback(self.note)
            self.task = loop.create_task(self.work(), name="work")
            await self.task

        def note(self, future):
            self.log.append(future.result())

        async def work(self):
            return "worked"

    def build():
        requests = Requests()
        asyncio.run(requests.start())
        return requests

    def check(requests):
        async def use():
            assert await requests.done == {"a": 1} and await requests.task == "worked"
            assert requests.task.get_name() == "work"
            try:
                await requests.failed
            except LookupError as exc:
                assert exc.args == ("gone",)
            else:
                raise AssertionError("the error is lost")

        asyncio.run(use())


@case
def asyncio_future_that_is_pending():
    import asyncio

    class Slot:
        def __init__(self):
            self.log = []

        async def start(self):
            self.answer = asyncio.get_running_loop().create_future()
            self.answer.add_done_callback(lambda future: self.log.append(future.result()))

    def build():
        slot = Slot()
        asyncio.run(slot.start())
        return slot

    def check(slot):
        if slot.answer.get_loop().is_closed():
            return  # The original's own loop has ended.

        async def use():
            assert not slot.answer.done()
            asyncio.get_running_loop().call_soon(slot.answer.set_result, 7)
            assert await asyncio.wait_for(slot.answer, 5) == 7
            await asyncio.sleep(0)
            assert slot.log == [7]

        asyncio.run(use())


@case
def coroutines_not_begun_and_over():
    import asyncio

    class Plan:
        def __init__(self):
            self.log = []

        async def step(self, name, *, twice=False):
            self.log.append(name)
            return name * (2 if twice else 1)

    def build():
        plan = Plan()
        plan.next = plan.step("b", twice=True)
        plan.over = plan.step("a")
        asyncio.run(plan.over_now()) if hasattr(plan, "over_now") else None
        try:
            plan.over.send(None)
        except StopIteration:
            pass
        return plan

    def check(plan):
        assert asyncio.run(plan.next) == "bb" and plan.log == ["a", "b"]
        try:
            plan.over.send(None)
        except RuntimeError:
            pass
        else:
            raise AssertionError("it ran twice")


@case
def context_variables_and_contexts():
    import contextvars

    class Tracer:
        def __init__(self):
            self.current = contextvars.ContextVar("current", default="none")
            self.context = contextvars.copy_context()
            self.context.run(self.current.set, "span")

    def build():
        return Tracer()

    def check(tracer):
        assert tracer.current.get() == "none"
        assert tracer.context.run(tracer.current.get) == "span"
        assert tracer.context[tracer.current] == "span"
        tracer.context.run(tracer.current.set, "span")


@case
def scheduler_with_events():
    import sched

    class Clock:
        def __init__(self):
            self.now, self.log = 0, []
            self.scheduler = sched.scheduler(self.time, self.sleep)

        def time(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

        def at(self, when, name):
            self.scheduler.enter(when, 1, self.log.append, (name,))

    def build():
        clock = Clock()
        clock.at(5, "late")
        clock.at(1, "soon")
        clock.at(1, "soon too")
        return clock

    def check(clock):
        clock.at(3, "between")
        clock.scheduler.run()
        assert clock.log == ["soon", "soon too", "between", "late"] and clock.now == 5


@case
def event_loop_at_rest():
    import asyncio

    class Driver:
        def __init__(self):
            self.loop = asyncio.new_event_loop()
            self.same = self.loop

        def run(self, n):
            async def work():
                await asyncio.sleep(0)
                return n + 1

            return self.loop.run_until_complete(work())

    def build():
        driver = Driver()
        driver.run(1)
        return driver

    def check(driver):
        assert driver.run(2) == 3 and driver.same is driver.loop


@case
def producer_and_consumer_with_a_condition():
    import threading
    from collections import deque

    class Channel:
        def __init__(self, size):
            self.items = deque()
            self.size = size
            self.mutex = threading.Lock()
            self.not_empty = threading.Condition(self.mutex)
            self.not_full = threading.Condition(self.mutex)

        def put(self, item):
            with self.not_full:
                while len(self.items) >= self.size:
                    self.not_full.wait(5)
                self.items.append(item)
                self.not_empty.notify()

        def get(self):
            with self.not_empty:
                while not self.items:
                    self.not_empty.wait(5)
                item = self.items.popleft()
                self.not_full.notify()
                return item

    def build():
        channel = Channel(1)
        channel.put("a")
        return channel

    def check(channel):
        thread = threading.Thread(target=channel.put, args=("b",))
        thread.start()
        assert [channel.get(), channel.get()] == ["a", "b"]
        thread.join()
        channel.put("a")


@case
def pool_with_attributes():
    import concurrent.futures

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, n, tag):
            super().__init__(n, tag)
            self.tag, self.count = tag, 0

        def submit(self, fn, *a, **k):
            self.count += 1
            return super().submit(fn, *a, **k)

    def build():
        p = Pool(2, "t")
        p.submit(pow, 2, 2).result()
        return p

    def check(p):
        assert p.tag == "t" and p.count >= 1
        assert p.submit(pow, 2, 3).result(5) == 8


@case
def process_not_started():
    import multiprocessing

    class P:
        def __init__(self):
            self.proc = multiprocessing.Process(target=print, args=(1,), name="p", daemon=True)

    def build():
        return P()

    def check(p):
        assert p.proc.name == "p" and p.proc.daemon


@case
def asyncio_lock_that_is_held():
    import asyncio

    class S:
        def __init__(self):
            self.lock = asyncio.Lock()
            self.q = asyncio.LifoQueue(2)
            asyncio.run(self.take())

        async def take(self):
            await self.lock.acquire()
            await self.q.put(1)
            await self.q.put(2)

    def build():
        return S()

    def check(s):
        import asyncio

        async def main():
            assert s.lock.locked() and s.q.full()
            s.lock.release()
            async with s.lock:
                assert await s.q.get() == 2
                await s.q.put(2)
            await s.lock.acquire()

        asyncio.run(main())


@case
def locks_in_slots_in_a_defaultdict_in_a_closure():
    import collections
    import dataclasses
    import threading

    @dataclasses.dataclass(slots=True)
    class Cell:
        lock: object = dataclasses.field(default_factory=threading.RLock)
        hits: int = 0

    def make():
        table = collections.defaultdict(Cell)
        guard = threading.Lock()

        def hit(key):
            with guard, table[key].lock:
                table[key].hits += 1
                return table[key].hits

        return hit, table, guard

    def build():
        hit, table, guard = make()
        hit("a")
        hit("a")
        hit("b")
        return {"hit": hit, "table": table, "guard": guard}

    def check(s):
        assert s["hit"]("a") == 3 and s["table"]["a"].hits == 3
        assert s["hit"]("new") == 1 and "new" in s["table"]
        assert s["guard"].acquire(blocking=False)
        s["guard"].release()
        assert not hasattr(s["table"]["a"], "__dict__")
        assert s["table"].default_factory is type(s["table"]["a"])


@case
def stream_reader_with_lines_left():
    import asyncio

    class S:
        def __init__(self):
            async def main():
                r = asyncio.StreamReader(limit=100)
                r.feed_data(b"line1\nline2\n")
                await r.readline()
                return r

            self.r = asyncio.run(main())

    def build():
        return S()

    def check(s):
        import asyncio

        async def main():
            assert await s.r.readline() == b"line2\n"

        asyncio.run(main())
