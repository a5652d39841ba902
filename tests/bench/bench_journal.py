"""A durable append beside a bare one: 4 KiB, written and synced, alternating; medians.

python -m tests.bench.bench_journal
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from migrate.shell.journal import Journal, JournalLog
from migrate.shell.journal_format import Facts

APPENDS = 200
ROUNDS = 9
PAYLOAD = os.urandom(4096)


def facts(journal: str) -> Facts:
    """A server's."""
    return Facts(journal=journal, server="bench", cls="bench:Bench", version=1, epoch=1)


async def wait(start: Callable[[Callable[[object], None]], None]) -> object:
    """What an append says."""
    future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    start(future.set_result)
    return await future


async def journal(log: JournalLog, name: str) -> Journal:
    """One that has its name."""
    made = log.create(facts(name))
    assert await wait(lambda d: made.cut(1, b"", [bytes(100)], whole=True, done=d)) is None
    return made


def bare(folder: Path, zeros: bool) -> float:
    """Microseconds, the median."""
    handle = os.open(folder / "bare", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    if zeros:
        os.pwrite(handle, bytes(4096 * APPENDS), 0)
    os.fsync(handle)
    times = []
    for number in range(APPENDS):
        begin = time.perf_counter()
        os.pwrite(handle, PAYLOAD, 4096 * number)
        os.fdatasync(handle)
        times.append(time.perf_counter() - begin)
    os.close(handle)
    return statistics.median(times) * 1e6


async def one(log: JournalLog, name: str) -> float:
    """The same for appends to a journal, one at a time."""
    made = await journal(log, name)
    times = []
    for number in range(2, APPENDS + 2):
        begin = time.perf_counter()
        await wait(lambda d, n=number: made.cut(n, PAYLOAD, (), whole=False, done=d))
        times.append(time.perf_counter() - begin)
    made.close()
    return statistics.median(times) * 1e6


async def many(log: JournalLog, name: str, journals: int, flying: int) -> float:
    """Appends a second with so many in flight, spread over so many journals."""
    made = [await journal(log, f"{name}-{n}") for n in range(journals)]
    done = 0
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def again(which: Journal) -> None:
        nonlocal done
        done += 1
        if done == 10 * APPENDS:
            over.set_result(None)
        elif done < 10 * APPENDS:
            append(which)

    def append(which: Journal) -> None:
        assert which.number is not None
        which.cut(which.number + 1, PAYLOAD, (), whole=False, done=lambda _: again(which))

    begin = time.perf_counter()
    for n in range(flying):
        append(made[n % journals])
    await over
    took = time.perf_counter() - begin
    for which in made:
        which.close()
    return 10 * APPENDS / took


async def main() -> None:
    """Print a table."""
    names = ("bare", "bare, zeros before", "journal", "32 on 1", "32 on 4", "32 on 32")
    found: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_FOLDER")) as text:
        folder = Path(text)
        loop = asyncio.get_running_loop()
        log = JournalLog(folder, b"k" * 32, loop.call_soon_threadsafe, soon=loop.call_soon)
        for number in range(ROUNDS):
            found["bare"].append(bare(folder, False))
            found["journal"].append(await one(log, f"one-{number}"))
            found["bare, zeros before"].append(bare(folder, True))
            for journals in (1, 4, 32):
                rate = await many(log, f"many-{number}-{journals}", journals, 32)
                found[f"32 on {journals}"].append(rate)
        await log.close()
    for name, values in found.items():
        unit = "appends/s" if "on" in name.split() else "us"
        print(f"{name:20} {statistics.median(values):9,.0f} {unit}  of {ROUNDS} rounds")
    ratio = statistics.median(found["journal"]) / statistics.median(found["bare"])
    print(f"journal / bare = {ratio:.2f}")


if __name__ == "__main__":
    asyncio.run(main())
