"""Valid conversations with a node, for `conversation.py` to be changed."""

from __future__ import annotations

from typing import Any

import msgspec

from migrate.core import directory
from migrate.core.messages import (
    CALL,
    CAST,
    EMPTY,
    OK,
    Abort,
    Acked,
    Activate,
    Activated,
    ActivateRefused,
    Answer,
    Ask,
    Chunk,
    ChunkTaken,
    ClockTold,
    Dropped,
    Envelope,
    Final,
    FinalFailed,
    Load,
    Message,
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
    EntryRecord,
    OutgoingRecord,
    SendRecord,
    SessionRecord,
    StateRecord,
    TimerRecord,
)
from migrate.shell import wire
from tests.core.fakes import CLIENT, NOW, SERVER, SESSION, A, B, C, env, row

CAST_SESSION = f"{C}|{NOW}|1"


def full_state() -> StateRecord:
    """A server's record in which every kind of part occurs."""
    entry = EntryRecord(SESSION, 2, CALL, "m2", b"x", (f"{SERVER}/1",), -1, "")
    return StateRecord(
        limit=3,
        reentrant=True,
        run_no=7,
        mailbox=[entry, EntryRecord("", 0, CAST, "tick", b"", (), -1, "")],
        sessions=[
            SessionRecord(
                SESSION,
                CLIENT,
                3,
                1,
                10,
                0,
                {1: (OK, b"done")},
                [EntryRecord(SESSION, 4, CALL, "m4", b"", (), 50, "")],
            ),
            SessionRecord(CAST_SESSION, C, 2, 2, 10, 1, {}, [], True),
        ],
        sending=[
            SendRecord(
                f"far|{NOW}|1",
                SERVER,
                3,
                A,
                1,
                [
                    OutgoingRecord(1, CALL, "m", b"", (), 40),
                    OutgoingRecord(2, CAST, "m", b"", (), -1),
                    OutgoingRecord(0, CALL, "m", b"", (), -1),
                ],
            ),
            SendRecord(f"far|{NOW}|2", SERVER, 2, A, 1, [OutgoingRecord(1, CALL, "n", b"", (), 9)]),
        ],
        timers=[TimerRecord("tick", 50, 20, True), TimerRecord("tock", 70, 0, False)],
    )


def every_message() -> list[Message]:
    """One of each."""
    committed = directory.committed(row("far", owner=B), A, "t1", 1)
    return [
        env(1, chain=(f"{SERVER}/1",), trace="t", timeout_ms=30),
        env(2, kind=CAST, session=CAST_SESSION, hops=1),
        Envelope(SERVER, SESSION, 3, 2, EMPTY, "call", b"", 0, CLIENT),
        Reply(SESSION, 1, OK, b"v"),
        Receipt(SESSION, SERVER, 2, 1),
        Acked(SESSION, SERVER, 2, True),
        Moved("nowhere", C, 3),
        NotHere("nowhere", SESSION, 1),
        WaitProbe(SERVER, SESSION, 1, (f"{SERVER}/1", "b/1")),
        Prepare("t1", "far", 1, "m:Cls", 1, False, "3.11", "name", 2),
        Prepared("out1", 1),
        Prepared("out1", 1, True),
        Chunk("t1", 0, b"ahead"),
        ChunkTaken("out1", 0),
        PrepareRefused("out1", "full"),
        Final("t1", "far", 1, wire.encode_state(full_state())),
        Ready("out1"),
        FinalFailed("out1", "no"),
        Activate("t1", committed, 2),
        Activated("out1"),
        ActivateRefused("out1"),
        Dropped("t1"),
        Released("out1"),
        Abort("t1"),
        ReleasedAt("out1", "boot", 12),
        Load(3, 0.5, 0.25, 9, False, True),
        ClockTold(123_456),
        Ask("c@1/1", "info", b"\x80"),
        Answer("a@1/1", True, b""),
    ]


def raw(*messages: Message) -> list[Any]:
    """Messages as plain lists."""
    plain: list[Any] = msgspec.msgpack.decode(wire.encode_messages(list(messages)))
    return plain


def conversations() -> list[bytes]:
    """Scripts that come far: requests, a move away, a move here, a knot, a death."""
    committed = directory.committed(row("far", owner=B), A, "t1", 1)
    come = [
        ["say", B, raw(Prepare("t1", "far", 1, "m:Cls", 1, False, "3.11"))],
        ["say", B, raw(Final("t1", "far", 1, wire.encode_state(full_state())))],
    ]
    go = [
        ["move", "b", B],
        ["say", B, raw(Prepared("out1", 1))],
        ["say", B, raw(Ready("out1"))],
    ]
    calls = raw(env(1), env(2), env(4), env(1), env(3, kind=CAST))
    scripts: list[list[Any]] = [
        [["say", CLIENT, calls], ["time", 40],
         ["say", CLIENT, raw(Acked(SESSION, SERVER, 4, True))]],
        [["busy", True], ["say", CLIENT, calls], ["end"], ["time", 90], ["end"], ["end"]],
        [["ask", SERVER, False, 40, []], ["ask", "far", False, 60, []], ["found", "far", True],
         ["say", B, raw(Receipt(f"{A}|{NOW}|2", "far", 1, 0))], ["time", 70], ["time", 2_000]],
        [["busy", True], ["ask", SERVER, False, 0, ["b/1"]], ["ask", "far", True, 30, ["b/1", "x"]],
         ["found", "far", True], ["time", 150],
         ["say", B, raw(WaitProbe(SERVER, f"b|{NOW}|1", 1, ("b/1", "far/1")))], ["end"]],
        [*go, ["row", 0], ["say", B, raw(Activated("out1"))], ["say", B, raw(Released("out1"))],
         ["say", CLIENT, raw(env(1, server="b"))]],
        [*go, ["row", 4], ["time", 20], ["row", 0], ["time", 200], ["row", 0]],
        [*go, ["row", 3], ["dead", B], ["time", 20], ["row", 0]],
        [["move", "b", B], ["say", B, raw(PrepareRefused("out1", "no"))]],
        # Both ways a chunk ahead, one of them repeated, one of another number.
        [["move", "b", B], ["say", B, raw(Prepared("out1", 1, True))],
         ["say", B, raw(ChunkTaken("out1", 0), ChunkTaken("out1", 0), ChunkTaken("out1", 7))],
         ["say", B, raw(Ready("out1"))], ["row", 0], ["say", B, raw(Activated("out1"))]],
        [["move", "b", B], ["say", B, raw(Prepared("out1", 1, True))], ["time", 300], ["row", 0]],
        [come[0], ["say", B, raw(Chunk("t1", 0, b"x"), Chunk("t1", 0, b"x"), Chunk("t1", 5, b""))],
         ["say", B, raw(Chunk("t1", 1, b"y"))],
         ["say", B, raw(Final("t1", "far", 1, wire.encode_state(full_state()), 2))],
         ["say", B, raw(Chunk("t1", 2, b"late"))],
         ["say", B, raw(Activate("t1", committed, 2), Dropped("t1"))], ["hook"]],
        [come[0], ["say", B, raw(Chunk("t1", 0, b"x"))],
         ["say", B, raw(Final("t1", "far", 1, wire.encode_state(full_state()), 9))],
         ["say", B, raw(Abort("t1"))]],
        [*come, ["say", CLIENT, raw(env(3, server="far"))],
         ["say", B, raw(Activate("t1", committed, 2))], ["hook"], ["time", 10],
         ["say", B, raw(Dropped("t1"))], ["time", 100], ["ask", "far", False, 0, []]],
        [*come, ["say", B, raw(Activate("t1", committed, 2), Dropped("t1"))], ["hook"],
         ["move", "far", C], ["say", C, raw(Prepared("out1", 1))],
         ["say", C, raw(Ready("out1"))], ["row", 1], ["time", 1_000]],
        [*come, ["dead", B], ["row", 0], ["time", 700], ["row", 0]],
        [*come, ["say", B, raw(Abort("t1"))],
         ["say", B, raw(Prepare("t2", "far", 2, "", 1, False, ""))]],
        [["say", B, raw(Moved("far", C, 3), NotHere("far", SESSION, 1))],
         ["ask", "far", True, 0, []],
         ["up", C], ["dead", C], ["found", "far", True], ["time", 5_000]],
        [["stop", SERVER], ["removed", SERVER], ["say", CLIENT, raw(env(1))], ["time", 90_000]],
        [["say", node, raw(message)] for message in every_message() for node in (B, C)][:60],
    ]  # fmt: skip
    return [msgspec.msgpack.encode(script) for script in scripts]
