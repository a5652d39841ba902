"""What is kept in the formats of past releases: states, and messages of the wire.

A name here, once released, keeps its meaning: later releases add samples, and never change one.
Classes stay where they are too, since kept bytes refer to them by name.
"""

from __future__ import annotations

import asyncio
import collections
import datetime
import decimal
import enum
import functools
import logging
import pathlib
import queue
import random
import threading
import types
import weakref
from typing import Any

import numpy as np

import serializers
from migrate.core.directory import Rollback, Row, RowState
from migrate.core.messages import (
    Abort,
    Acked,
    Activate,
    Activated,
    ActivateRefused,
    Answer,
    Ask,
    Dropped,
    Envelope,
    Final,
    FinalFailed,
    Load,
    Moved,
    NotHere,
    Prepare,
    Prepared,
    PrepareRefused,
    Ready,
    Receipt,
    Released,
    ReleasedAt,
    Reply,
    WaitProbe,
)
from migrate.core.records import (
    CheckpointRecord,
    DroppedRecord,
    EntryRecord,
    OutgoingRecord,
    PlanRecord,
    SendRecord,
    SessionRecord,
    StateRecord,
    TimerRecord,
)
from migrate.shell import checkpoints, classes, wire
from serializers.stream import StreamWriter


class Colour(enum.Enum):
    RED = 1


class Account:
    """A server's state with what servers are made of."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.guard = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.names: dict[str, Any] = {"a": [1, 2], "b": {3}}
        self.again = self.names["a"]
        self.itself = self
        self.log = logging.getLogger("compat")
        self.waiting: queue.Queue[int] = queue.Queue(5)
        self.waiting.put(7)
        self.event = asyncio.Event()
        self.event.set()
        self.weak = weakref.ref(self)
        self.call = functools.partial(int, "11", base=2)
        self.method = self.told
        self.random = random.Random(5)
        self.local = threading.local()
        self.local.value = 9

    def told(self) -> str:
        return "told"


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self) -> None:
        self.left, self.right = 1, (2,)


def check_account(account: Any) -> bool:
    """Whether a loaded account behaves as the one that was kept did."""
    with account.changed:
        locked = account.lock.locked()
    account.names["a"].append(3)
    return bool(
        locked
        and account.guard.acquire(blocking=False)
        and account.again == [1, 2, 3]
        and account.itself is account
        and account.log is logging.getLogger("compat")
        and account.waiting.get_nowait() == 7
        and account.waiting.maxsize == 5
        and account.event.is_set()
        and account.weak() is account
        and account.call() == 3
        and account.method() == "told"
        and account.method.__self__ is account
        and account.random.random() == random.Random(5).random()
        and account.local.value == 9
    )


ARRAY = np.arange(10_000, dtype="i4").reshape(100, 100)

STATES: dict[str, Any] = {
    "atoms": [None, True, -1, 10**40, 1.5, "é", b"\0", 2j, ...],
    "containers": {"k": [(1,), {2}, frozenset({3}), collections.deque([4], 9)], (5, "t"): {}},
    "standard values": [
        datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC),
        decimal.Decimal("1.10"),
        pathlib.PurePosixPath("a/b"),
        types.SimpleNamespace(x=1),
        Colour.RED,
        collections.OrderedDict(a=1),
        collections.Counter("aab"),
        range(3),
    ],
    "large byte strings": [b"x" * 70_000, bytearray(b"y" * 70_000)],
}
"""Compared with `==`; those that need more have a check of their own in the test."""

MESSAGES: list[Any] = [
    Envelope(
        server="s",
        session="session",
        seq=3,
        acked_below=2,
        kind=0,
        method="incr",
        payload=b"\x80\x05N.",
        timeout_ms=1000,
        reply_to="a@1",
        epoch=4,
        sender_epoch=5,
        generation=6,
        hops=1,
        chain=("s/1",),
        trace="t",
    ),
    Reply(session="session", seq=3, status=0, payload=b"\x80\x05K\x03.", hops=1),
    Receipt(session="session", server="s", admitted_below=4, window=100, hops=1),
    Acked(session="session", server="s", acked_below=4, final=True),
    Moved(server="s", node="b@2", epoch=7),
    NotHere(server="s", session="session", seq=3),
    WaitProbe(server="s", session="session", seq=3, path=("s/1", "t/2")),
    Prepare(
        transfer="move",
        server="s",
        epoch=4,
        cls="module:Class",
        version=2,
        by_value=False,
        python="cpython-3.11",
        name="name",
        mailbox=10,
    ),
    Prepared(transfer="move", version=2),
    PrepareRefused(transfer="move", reason="reason"),
    Final(transfer="move", server="s", epoch=4, state=b"state"),
    Ready(transfer="move"),
    FinalFailed(transfer="move", reason="reason"),
    Activated(transfer="move"),
    ActivateRefused(transfer="move"),
    Dropped(transfer="move"),
    Released(transfer="move"),
    Abort(transfer="move"),
    ReleasedAt(move="move", boot="boot", at_ns=12345),
    Load(servers=3, cpu=0.5, memory=0.25, mailbox=10, draining=False, cordoned=True),
    Ask(id="id", verb="verb", payload=b"payload"),
    Answer(id="id", ok=True, payload=b"payload"),
]

ROW = Row(
    server="s",
    epoch=4,
    owner="a@1",
    state=RowState.ACTIVE,
    transfer="move",
    name="name",
    cls="module:Class",
    version=2,
    methods=("incr",),
    generation=1,
    standbys=("b@2",),
    cause="cause",
    previous="b@2",
)
MESSAGES.append(Activate(transfer="move", row=ROW, rev=9))

RECORD = StateRecord(
    limit=100,
    reentrant=True,
    run_no=5,
    mailbox=[
        EntryRecord(
            session="session",
            seq=4,
            kind=0,
            method="incr",
            payload=b"",
            chain=("s/1",),
            left_ms=500,
            trace="t",
        )
    ],
    sessions=[
        SessionRecord(
            id="session",
            reply_to="a@1",
            expected=5,
            acked_below=3,
            silent_ms=20,
            sender_epoch=1,
            records={3: (0, b"r")},
            early=[
                EntryRecord(
                    session="session",
                    seq=6,
                    kind=1,
                    method="incr",
                    payload=b"",
                    chain=(),
                    left_ms=-1,
                    trace="",
                )
            ],
            ended=False,
        )
    ],
    sending=[
        SendRecord(
            id="own",
            server="t",
            next_seq=2,
            node="b@2",
            epoch=3,
            outgoing=[OutgoingRecord(seq=1, kind=0, method="m", payload=b"", chain=(), left_ms=-1)],
        )
    ],
    timers=[TimerRecord(method="tick", period_ms=1000, left_ms=250, queued=False)],
)


CHECKPOINT_KEY = b"the key of the checkpoint that is kept"
CHECKPOINT = CheckpointRecord(
    run_no=7,
    mailbox=[EntryRecord("c@1|5|1", 3, 1, "m", b"\x80\x05N.", (), -1, "")],
    timers=[],
    plans=[PlanRecord("file:///x", 60_000, 3, 5_000)],
    met={"other": 2},
    dropped=[DroppedRecord("other", 1, "tell")],
)


def _captured() -> checkpoints.Captured:
    return checkpoints.capture(Account(), _facts(), CHECKPOINT)


def _captured_ahead() -> checkpoints.Captured:
    """As of a large state: in rounds, and what changed after them."""
    account: Any = Account()
    account.rows = {n: {"id": n} for n in range(2000)}
    account.numbers = np.arange(50_000)
    writer = StreamWriter(account, "hash", apart=True)
    ahead = [writer.look(), writer.step(60.0, 1 << 30)[0]]
    account.rows[7]["id"] = -7
    account.numbers[7] = -7
    try:
        return checkpoints.capture_rest(writer, ahead, _facts(), CHECKPOINT)
    finally:
        writer.close()


def _facts() -> checkpoints.Facts:
    row = Row(
        "s",
        9,
        "b@2",
        RowState.ACTIVE,
        "t",
        "hits",
        f"{__name__}:Account",
        1,
        generation=4,
        rollbacks=(Rollback(4, 1.5, 2.5),),
    )
    return checkpoints.facts_of(row, "b", False, CHECKPOINT)


def make() -> dict[str, bytes]:
    """Every sample in the present format, by name."""
    made = {f"state {name}": serializers.dumps(state) for name, state in STATES.items()}
    made["account"] = serializers.dumps(Account())
    made["slots"] = serializers.dumps(Slotted())
    made["arrays"] = serializers.dumps([ARRAY, ARRAY[10:, ::2], np.zeros(3)])
    made["code by value"] = serializers.dumps(lambda n: n + 1)
    made["older state"] = serializers.dumps(classes.Bare(Slotted, (None, {"left": 1, "right": 2})))
    for index, part in enumerate(serializers.encode([ARRAY, "text"]).parts()):
        made[f"part {index}"] = bytes(part)
    for number, message in enumerate(MESSAGES):
        made[f"message {number} {type(message).__name__}"] = wire.encode_messages([message])
    made["messages"] = wire.encode_messages(MESSAGES)
    pieces = serializers.encode(Account()).pieces()
    large = classes.gather(wire.encode_state(RECORD), pieces)
    made["state after its message"] = wire.encode_final(Final("move", "s", 4, b""), large).joined()
    made["row"] = wire.encode_row(ROW)
    made["record"] = wire.encode_state(RECORD)
    made["record and object"] = classes.join(made["record"], made["account"])
    made["arguments, plain"] = wire.pack_args((1, "a"), {"k": None})
    made["arguments"] = wire.pack_args(([1], {2}), {"k": Colour.RED})
    made["value, plain"] = wire.pack_value(b"v")
    made["value"] = wire.pack_value({"v": [1]})
    made["checkpoint"] = b"".join(checkpoints.seal(_captured(), CHECKPOINT_KEY))
    made["checkpoint in chunks"] = b"".join(checkpoints.seal(_captured_ahead(), CHECKPOINT_KEY))
    try:
        raise LookupError("nothing there")
    except LookupError as error:
        made["error"] = wire.pack_error(error)
    return made
