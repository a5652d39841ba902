"""States for the digest, built the same way in any process; run as a script it prints digests.

`python digest_states.py make FILE` dumps them all and prints their digests; `load FILE` prints
those of what it loads; `build` those of its own. A script's classes are of `__main__`, so they
travel by value.
"""

from __future__ import annotations

import asyncio
import collections
import datetime
import decimal
import enum
import importlib
import json
import logging
import queue
import random
import re
import sys
import threading
import typing
import weakref
import xml
from typing import Any

import numpy as np

import serializers


class Node:
    kinds: typing.ClassVar[dict[str, int]] = {"a": 1}

    def __init__(self, value: Any = None, next: Any = None) -> None:
        self.value = value
        self.next = next

    def told(self) -> Any:
        return helper(self.value)


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self, left: Any, right: Any) -> None:
        self.left, self.right = left, right


class Colour(enum.Enum):
    RED = 1
    GREEN = frozenset(["g", "h", "i"])


class Letters(set[str]):
    pass


def helper(value: Any) -> Any:
    return (value, {"one", "two", "three"} & {value})


def uses_a_module_that_may_be_there() -> Any:
    return xml.dom  # type: ignore[attr-defined]


def closures() -> Any:
    shared = {"n": 0}

    def up() -> None:
        shared["n"] += 1

    def get() -> int:
        return shared["n"]

    return up, get


def ring(length: int) -> Any:
    first = last = Node(0)
    for number in range(1, length):
        last.next = Node(number)
        last = last.next
    last.next = first
    return first


def states() -> dict[str, Any]:
    words = {"alpha", "beta", "gamma", "delta", "epsilon", *map(str, range(50))}
    shared = [1, 2]
    array = np.arange(20_000).reshape(200, 100)
    node = Node({"k"})
    locked = threading.Lock()
    locked.acquire()
    waiting: queue.Queue[Any] = queue.Queue()
    waiting.put({"x", "y"})
    return {
        "atoms": [None, True, 1, 1.5, -0.0, "text", b"bytes", 3j, ..., 10**60],
        "values": [datetime.datetime(2026, 1, 2), decimal.Decimal("1.10"), re.compile("a+")],
        "sets": [words, frozenset(words), {frozenset(words), frozenset({"a", "b"})}],
        "sets of objects": {Node("a", words), Node("b"), (1, "c"), Colour.RED},
        "subclass of set": Letters(words),
        "counter": collections.Counter(sorted(words)),
        "aliases": [shared, shared, (shared, (shared,)), {"again": shared}],
        "ring": ring(50),
        "slots": Slotted(shared, [shared]),
        "arrays": [array, array[10:, ::2], array.T, np.zeros(0), np.array([1.0, np.nan])],
        "structured": np.zeros(3, dtype=[("a", "i4"), ("b", "f8")]),
        "array of objects": np.array([{"a"}, None, shared], dtype=object),
        "buffers": [bytearray(b"abc" * 40_000), b"large" * 30_000],
        "enum": [Colour.RED, Colour.GREEN, Colour],
        "functions": [helper, closures(), lambda x: {x, "y", "z"} - {"w"}, node.told],
        "imports": uses_a_module_that_may_be_there,
        "classes": [Node, Slotted],
        "objects": [node, Node(words, node)],
        "locks": [locked, threading.RLock(), threading.Condition(), threading.Event()],
        "queues": [waiting, collections.deque(sorted(words), maxlen=90)],
        "asyncio": [asyncio.Lock(), asyncio.Event()],
        "loggers": [logging.getLogger("some.name"), logging.getLogger()],
        "weak": [node, weakref.ref(node), weakref.WeakSet([node, Colour.RED])],
        "random": random.Random(7),
        "standard streams": [sys.stdout],
    }


def digests(found: dict[str, Any]) -> dict[str, str]:
    return {name: serializers.digest(state) for name, state in found.items()}


def main(command: str, path: str = "") -> None:
    if command == "load":
        with open(path, "rb") as file:
            found: Any = serializers.loads(file.read())
    else:
        found = states()
    if command == "build":
        importlib.import_module("xml.dom")
    if command == "make":
        before = digests(found)
        with open(path, "wb") as file:
            file.write(serializers.dumps(found))
        # Neither the dump nor the digest has changed what it looked at.
        assert digests(found) == before
    print(json.dumps(digests(found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
