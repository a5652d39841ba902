"""Bells: what was put before a ring is seen after it, whoever rings and whenever."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import select
import threading
from collections import deque

import pytest

from migrate.shell.bell import Bell, Posts


def test_a_ring_is_kept_until_it_is_heard() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    bell.wait()
    bell.close()


def test_rings_that_nobody_hears_never_block() -> None:
    bell = Bell()
    for _ in range(200_000):  # more than a pipe holds
        bell.ring()
    bell.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_ring_while_another_one_is_being_heard_silences_none_after_it(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bell = Bell()
    real = os.read

    def read(handle: int, size: int) -> bytes:
        if when == "before":
            bell.ring()
        data = real(handle, size)
        if when == "after":
            bell.ring()
        return data

    bell.ring()
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", read)
        bell.wait()
    bell.ring()
    assert select.select([bell._heard], [], [], 0)[0]
    bell.close()


def test_a_thread_misses_nothing_of_what_many_threads_put() -> None:
    bell = Bell()
    todo: deque[tuple[int, int]] = deque()
    seen: list[tuple[int, int]] = []
    each, many = 3_000, 4

    def hear() -> None:
        while len(seen) < each * many:
            bell.wait()
            while todo:
                seen.append(todo.popleft())

    def put(who: int) -> None:
        for n in range(each):
            todo.append((who, n))
            bell.ring()

    threads = [threading.Thread(target=hear)]
    threads += [threading.Thread(target=put, args=[who]) for who in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bell.close()

    for who in range(many):
        assert [n for other, n in seen if other == who] == list(range(each))


def test_a_loop_does_what_is_wanted_in_the_context_that_was_given() -> None:
    of_whom = contextvars.ContextVar("of_whom", default="nobody")

    async def main() -> str:
        bell = Bell()
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        context = contextvars.copy_context()
        context.run(of_whom.set, "the node")
        bell.hang(asyncio.get_running_loop(), context, lambda: done.set_result(of_whom.get()))
        thread = threading.Thread(target=bell.ring)
        thread.start()
        found = await done
        thread.join()
        bell.close()
        return found

    assert asyncio.run(main()) == "the node"


def test_one_that_was_closed_leaves_no_descriptor_and_nothing_at_the_loop() -> None:
    async def main() -> None:
        before = os.listdir("/proc/self/fd")
        loop = asyncio.get_running_loop()
        bell = Bell()
        heard = bell._heard
        bell.hang(loop, contextvars.copy_context(), lambda: None)
        bell.close()
        assert not loop.remove_reader(heard)
        assert os.listdir("/proc/self/fd") == before

    asyncio.run(main())


def test_posted_functions_run_in_order_and_one_that_fails_takes_no_other_along() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        failures: list[object] = []
        loop.set_exception_handler(lambda loop, told: failures.append(told["exception"]))
        posts = Posts(loop, contextvars.copy_context())
        ran: list[int] = []
        over: asyncio.Future[None] = loop.create_future()

        def step(number: int) -> None:
            ran.append(number)
            if number == 2:
                raise ValueError(number)
            if number == 5:
                over.set_result(None)

        def post() -> None:
            for number in range(1, 6):
                posts.post(functools.partial(step, number))

        await asyncio.to_thread(post)
        await asyncio.wait_for(over, 30)
        assert ran == [1, 2, 3, 4, 5]
        assert [type(failure) for failure in failures] == [ValueError]
        posts.post(lambda: ran.append(6))
        posts.close()
        assert ran[-1] == 6

    asyncio.run(main())
