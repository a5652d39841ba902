"""States by the hundred thousand: `python -m tests.fuzz.streams WHAT [--runs N] [--seed S]`.

WHAT is one of

    mutations     damaged streams to `serializers.loads`, in a child process with bounded memory:
                  each is refused with LoadFailed, or only data in its buffers was changed
    resealed      the same with the head's check made right again, as malice would: what the
                  interpreter makes of it is counted, and nothing is promised
    round-trips   values of all kinds, out and back

The suite runs some thousand of each. Exit status 1 if a promise was broken; the seed and the number
of the input are told.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import serializers
from serializers.base import HEAD_SIZE_BYTES, hash_of, parse_head
from tests.fuzz.mutate import damaged
from tests.serializers.test_round_trips import Record, Slotted

MEMORY_BYTES = 2 << 30
"""Address space of the child: an unbounded allocation ends in MemoryError, not in the machine."""
HANG_S = 30
BATCH = 200


def seeds() -> list[bytes]:
    """Streams with every opcode that we write, and every kind of buffer."""
    shared: list[Any] = [1]
    shared.append(shared)
    array = np.arange(3000)
    lock = threading.Lock()
    states: list[Any] = [
        None,
        {"a": [1, 2.5, "é", b"x"], "b": (True, None, 2**70)},
        [Record(1, "r", {1, 2}), Slotted(frozenset("ab"), collections.deque([1], 3))],
        shared,
        [array, array[5:], bytearray(b"y" * 70_000), b"z" * 70_000],
        [lock, threading.Condition(lock), collections.OrderedDict(a=1), range(3), 1j],
        lambda value: (value, shared),
        {n: str(n) for n in range(300)},
        "x" * 1000,
    ]
    return [serializers.dumps(state) for state in states]


def resealed(data: bytes) -> bytes:
    """`data` with the check that its head and body want, as far as they can be told apart."""
    try:
        head = parse_head(data)
    except serializers.LoadFailed:
        return data
    start = head.size_bytes
    check = hash_of(data[start : start + head.body_size_bytes], head.begun)
    at = HEAD_SIZE_BYTES - 8
    return data[:at] + check.to_bytes(8, "little") + data[at + 8 :]


def changed(run: int, seed: int, known: list[bytes], *, reseal: bool) -> bytes:
    """The input of a number: the same each time."""
    chance = random.Random(f"{seed}/{run}")
    data = damaged(chance.choice(known), known, chance)
    return resealed(data) if reseal else data


def judge(data: bytes, known: list[bytes]) -> str:
    """Load one input and say what came of it.

    Raises:
        AssertionError: It was accepted, though its head or its body were changed.
    """
    try:
        serializers.loads(data)
    except serializers.LoadFailed:
        return "refused"
    except MemoryError:
        return "out of memory"
    except Exception as error:
        return f"raised {type(error).__name__}"
    head = parse_head(data)
    end = head.size_bytes + head.body_size_bytes
    assert any(data[:end] == other[:end] for other in known), "changed, and accepted"
    return "only data changed"


def child(first: int, last: int, seed: int, reseal: bool) -> None:
    """Judge the inputs from `first` to `last`; tell how far it came, batch by batch."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    known = seeds()
    # What is executed may print; the parent reads nothing but ours.
    told, sys.stdout = sys.stdout, sys.stderr
    count: collections.Counter[str] = collections.Counter()
    for run in range(first, last):
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            count[judge(changed(run, seed, known, reseal=reseal), known)] += 1
        except AssertionError as error:
            if not reseal:
                print(json.dumps({"run": run, "error": str(error)}), file=told, flush=True)
                raise SystemExit(1) from error
            count["accepted"] += 1
        if reseal or (run + 1 - first) % BATCH == 0 or run + 1 == last:
            print(json.dumps({"done": run + 1, "count": count}), file=told, flush=True)
            count.clear()


def mutations(runs: int, seed: int, *, reseal: bool, show: Callable[[str], None]) -> bool:
    """Judge `runs` inputs in child processes; return whether no promise was broken."""
    total: collections.Counter[str] = collections.Counter()
    done = 0
    kept = True
    began = time.monotonic()
    while done < runs:
        arguments = ["--child", str(done), str(runs), str(seed), str(int(reseal))]
        with subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.streams", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                if "error" in told:
                    show(f"input {told['run']} of seed {seed}: {told['error']}")
                    return False
                done = told["done"]
                total.update(told["count"])
        if done < runs:
            end = f"killed by signal {-process.returncode}" if process.returncode < 0 else "hung"
            if not reseal:
                show(f"an input from {done} of seed {seed} on: the interpreter {end}")
                kept = False
            total[f"the interpreter {end}"] += 1
            done += 1 if reseal else BATCH
    if not reseal:
        wrong = [name for name in total if name not in ("refused", "only data changed")]
        kept = kept and not wrong and total["refused"] > 0 and total["only data changed"] > 0
    show(f"{runs} inputs of seed {seed} in {time.monotonic() - began:.0f} s: {dict(total)}")
    return kept


def round_trips(runs: int, seed: int, show: Callable[[str], None]) -> bool:
    """Send `runs` values out and back; raises what fails."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    from tests.serializers.test_round_trips import values

    seen = 0

    @seeded(seed)
    @settings(
        max_examples=runs,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(values)
    def one(value: Any) -> None:
        nonlocal seen
        seen += 1
        copy = serializers.loads(serializers.dumps(value))
        assert copy == value and type(copy) is type(value)
        assert serializers.digest(copy) == serializers.digest(value)

    began = time.monotonic()
    one()
    show(f"{seen} round trips of seed {seed} in {time.monotonic() - began:.0f} s")
    return True


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        first, last, seed, reseal = map(int, arguments[1:])
        child(first, last, seed, bool(reseal))
        return 0
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.streams", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("mutations", "resealed", "round-trips"))
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    if asked.what == "round-trips":
        kept = round_trips(asked.runs, asked.seed, print)
    else:
        reseal = asked.what == "resealed"
        kept = mutations(asked.runs, asked.seed, reseal=reseal, show=print)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
