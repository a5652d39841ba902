"""Capture beside plain pickle: `python -m tests.bench.bench_capture [--json] [--rounds N]`.

Ours and pickle's (protocol 5) alternate; each figure is the median of the rounds, each ratio the
median of the rounds' ratios, so that what else runs on the machine falls on both. Arrays are
compared with a copy of their memory, small states by the difference in microseconds. Exit status 1
if a bound is not kept: 1.1 times pickle for containers and dataclasses, 1.05 times a copy for
200 MiB of numpy, 15 us more for a server of 1 KiB.
"""

from __future__ import annotations

import gc
import json
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import serializers
from tests.bench.capture_classes import Fill, Order, Server


def small_dicts() -> Any:
    return [{"a": n, "b": str(n), "c": None} for n in range(100_000)]


def orders() -> Any:
    return [Order(n, f"order {n}", n / 7, True) for n in range(100_000)]


def fills() -> Any:
    return [Fill(n, f"order {n}", n / 7, True) for n in range(100_000)]


def frame() -> Any:
    import pandas  # type: ignore[import-untyped]

    return pandas.DataFrame({f"c{n}": np.arange(1_000_000) + n for n in range(8)})


def clocked(work: Callable[[], Any], repeats: int) -> float:
    # What this process took of the processor, so that others on the machine count less.
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def paired(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, repeats: int = 1
) -> tuple[float, float, float]:
    """Medians of ours and theirs in seconds, and of their ratios."""
    pairs = []
    ours(), theirs()
    for number in range(rounds):
        gc.collect()
        if number % 2:
            mine = clocked(ours, repeats)
            other = clocked(theirs, repeats)
        else:
            other = clocked(theirs, repeats)
            mine = clocked(ours, repeats)
        pairs.append((mine, other, mine / other))
    return tuple(statistics.median(column) for column in zip(*pairs, strict=True))  # type: ignore[return-value]


def main(arguments: list[str]) -> int:
    rounds = int(arguments[arguments.index("--rounds") + 1]) if "--rounds" in arguments else 15
    rows: list[dict[str, Any]] = []

    def add(name: str, measured: tuple[float, float, float], bound: str, kept: bool | None) -> None:
        ours, theirs, ratio = measured
        row = {
            "case": name,
            "ours_ms": round(ours * 1000, 4),
            "beside_ms": round(theirs * 1000, 4),
            "ratio": round(ratio, 3),
            "bound": bound,
            "kept": kept,
        }
        rows.append(row)
        if "--json" not in arguments:
            told = {True: "kept", False: "NOT KEPT", None: ""}[kept]
            print(
                f"{name:34} {row['ours_ms']:12.4f} ms {row['beside_ms']:12.4f} ms "
                f"{ratio:7.3f}  {bound:16} {told}",
                flush=True,
            )

    cases: list[tuple[str, Callable[[], Any], float | None]] = [
        ("dict of 1e6 ints", lambda: dict.fromkeys(range(1_000_000), 1), 1.1),
        ("1e5 small dicts", small_dicts, 1.1),
        ("1e5 dataclasses", orders, 1.1),
        ("1e5 frozen dataclasses", fills, 1.1),
        ("data frame of 64 MB", frame, None),
    ]
    for name, make, limit in cases:
        try:
            obj = make()
        except ImportError:
            continue
        data, plain = serializers.dumps(obj), pickle.dumps(obj, 5)
        for verb, ours, theirs in (
            ("dumps", lambda o=obj: serializers.dumps(o), lambda o=obj: pickle.dumps(o, 5)),
            ("loads", lambda d=data: serializers.loads(d), lambda d=plain: pickle.loads(d)),
        ):
            measured = paired(ours, theirs, rounds)
            kept = None if limit is None else measured[2] <= limit
            add(f"{verb} {name}", measured, f"{limit} x pickle" if limit else "", kept)
        del obj, data, plain

    array = np.arange(25 * 1024 * 1024, dtype="f8")
    array += 1
    memory = memoryview(array).cast("B")
    measured = paired(lambda: serializers.dumps(array), lambda: bytes(memory), rounds)
    add("dumps 200 MiB of numpy", measured, "1.05 x a copy", measured[2] <= 1.05)
    data = serializers.dumps(array)
    measured = paired(lambda: serializers.loads(data), lambda: bytearray(memory), rounds)
    add("loads 200 MiB of numpy", measured, "1.05 x a copy", measured[2] <= 1.05)
    measured = paired(lambda: serializers.encode(array), lambda: bytes(memory), rounds)
    add("encode 200 MiB (parts)", measured, "1.05 x a copy", measured[2] <= 1.05)
    parts = [bytearray(part) for part in serializers.encode(array).parts()]
    snapshot = serializers.Snapshot.from_parts(parts)
    measured = paired(lambda: serializers.decode(snapshot), lambda: bytearray(memory), rounds)
    add("decode 200 MiB (received parts)", measured, "1.05 x a copy", measured[2] <= 1.05)

    server = Server()
    data, plain = serializers.dumps(server), pickle.dumps(server, 5)
    for verb, ours, theirs in (
        ("dumps", lambda: serializers.dumps(server), lambda: pickle.dumps(server, 5)),
        ("loads", lambda: serializers.loads(data), lambda: pickle.loads(plain)),
    ):
        measured = paired(ours, theirs, rounds, 2000)
        extra_us = (measured[0] - measured[1]) * 1e6
        name = f"{verb} a server of {len(plain)} bytes"
        add(name, measured, f"{extra_us:+.1f} us of +15", extra_us <= 15)

    if "--json" in arguments:
        print(
            json.dumps({"rounds": rounds, "python": sys.version.split()[0], "rows": rows}, indent=1)
        )
    return 0 if all(row["kept"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
