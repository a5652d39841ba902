"""Inputs that once did harm, by what they did. Each must be refused, or taken, without any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
from msgspec import structs

from migrate.core import directory
from migrate.core.messages import CALL, OK, Activate, Dropped, Prepare, Reply
from migrate.core.messages import Final as FinalMessage
from migrate.core.records import (
    EntryRecord,
    StateRecord,
)
from migrate.shell import membership, wire
from tests.core.fakes import CLIENT, NOW, SERVER, A, B, C, env, row
from tests.fuzz.scripts import full_state, raw

NESTING: Final = 200_000


def script(*turns: list[Any]) -> bytes:
    """A conversation."""
    return msgspec.msgpack.encode(turns)


def arrival(change: Callable[[StateRecord], None], *more: list[Any]) -> bytes:
    """A conversation in which a server comes here whose state was changed, and serves."""
    state = full_state()
    change(state)
    committed = directory.committed(row("far", owner=B), A, "t1", 1)
    return script(
        ["say", B, raw(Prepare("t1", "far", 1, "m:Cls", 1, False, "3.11"))],
        ["say", B, raw(FinalMessage("t1", "far", 1, wire.encode_state(state)))],
        ["say", B, raw(Activate("t1", committed, 2), Dropped("t1"))],
        ["hook"],
        *(more or (["time", 200],)),
    )


def _timer(period_ms: int) -> Callable[[StateRecord], None]:
    def change(state: StateRecord) -> None:
        for timer in state.timers:
            timer.period_ms, timer.queued = period_ms, False

    return change


def _early_twice(state: StateRecord) -> None:
    state.sessions[0].early *= 2


def _session_twice(state: StateRecord) -> None:
    state.sessions.append(state.sessions[0])


def _result_of_the_future(state: StateRecord) -> None:
    state.sessions[0].records[9] = (OK, b"")


def _call_of_no_session(state: StateRecord) -> None:
    state.mailbox.append(EntryRecord(f"x@1|{NOW}|1", 1, CALL, "m", b"", (), -1, ""))


def _waits_twice(state: StateRecord) -> None:
    state.mailbox.append(state.mailbox[0])


def _numbers_without_end(state: StateRecord) -> None:
    state.sending[0].next_seq = 1 << 61


def _session_of_this_node(state: StateRecord) -> None:
    state.sending[0].id = f"{A}|{NOW}|1"


def _runs_without_end(state: StateRecord) -> None:
    state.run_no = (1 << 64) - 1


def _other_server() -> bytes:
    committed = directory.committed(row("else", owner=B), A, "t1", 1)
    return script(
        ["say", B, raw(Prepare("t1", "far", 1, "m:Cls", 1, False, "3.11"))],
        ["say", B, raw(FinalMessage("t1", "far", 1, wire.encode_state(full_state())))],
        ["say", B, raw(Activate("t1", committed, 2), Dropped("t1"))],
        ["hook"],
        ["move", "far", C],
    )


def _last_epoch() -> bytes:
    """A row whose next epoch does not fit into 64 bits."""
    fields = msgspec.msgpack.decode(wire.encode_row(row()))
    fields[1] = (1 << 64) - 1
    return msgspec.msgpack.encode(fields)


def _node(pid: int) -> bytes:
    described = membership.describe("a@1", "a", "127.0.0.1:7400")
    return membership.encode_node(structs.replace(described, pid=pid))


def _settled_by_a_stranger() -> bytes:
    """A reply to a request that the full mailbox here has refused, while the one before runs."""
    return script(
        ["busy", True],
        ["ask", SERVER, False, 0, ["x/1"]],
        ["say", CLIENT, raw(env(1), env(2), env(3))],
        ["ask", SERVER, False, 0, ["x/1"]],
        ["say", B, raw(Reply(f"{A}|{NOW}|1", 2, OK, b""))],
        ["end"],
    )


def _place_taken() -> bytes:
    """A server comes that claims the session in which a request of this node waits."""
    turns = msgspec.msgpack.decode(arrival(_session_of_this_node))
    return script(["ask", "nowhere", False, 50, ["x/1"]], *turns)


CRASHERS: Final[dict[str, tuple[str, bytes]]] = {
    "a session's time in superscript: ValueError": ("session-id", "a|\u00b2|1".encode()),
    "an envelope of such a session": (
        "conversation",
        script(["say", CLIENT, raw(env(1, session="x|\u00b2|1"))]),
    ),
    "a chain with a run in superscript": (
        "conversation",
        script(["busy", True], ["say", CLIENT, raw(env(1), env(2, chain=(f"{SERVER}/\u00b2",)))]),
    ),
    "a timer of no period: ZeroDivisionError": ("conversation", arrival(_timer(0))),
    "a timer that goes back: due for ever": ("conversation", arrival(_timer(-5))),
    "an early request that is there twice: counted twice": ("conversation", arrival(_early_twice)),
    "a session that is there twice": ("conversation", arrival(_session_twice)),
    "a result of a request that has not come": ("conversation", arrival(_result_of_the_future)),
    "a call of a session that is not there": ("conversation", arrival(_call_of_no_session)),
    "a request that waits twice: two results": ("conversation", arrival(_waits_twice)),
    "2**61 requests under way: counted through": (
        "conversation",
        arrival(_numbers_without_end, ["say", B, [[2, f"far|{NOW}|1", 1, OK, b""]]]),
    ),
    "a session that takes the place of this node's own": (
        "conversation",
        _place_taken(),
    ),
    "a run number at the end of 64 bits: the next state cannot be written": (
        "conversation",
        arrival(_runs_without_end, ["say", CLIENT, raw(env(3, server="far"))]),
    ),
    "an Activate with another server's row": ("conversation", _other_server()),
    "results settled that were never admitted": ("conversation", _settled_by_a_stranger()),
    "a row at the last epoch: no swap of it can be written": ("server-row", _last_epoch()),
    "a row that is nested deep: RecursionError": (
        "server-row",
        b"\x9e" + wire.encode_row(row())[1:] + b"\x91" * NESTING,
    ),
    "a node without a process: ValueError": ("node-row", _node(-1)),
    "a node whose process cannot be: OverflowError": ("node-row", _node(1 << 40)),
    "a host in two pairs of brackets: another host when written again": (
        "address",
        b"[[x]]:2",
    ),
    "a fail point for a group of processes": ("fail-points", b"ready=kill:0"),
    "a fail point for no process": ("fail-points", b"ready=kill:99999999999"),
    "a fail point with 5,000 digits": ("fail-points", b"ready=kill:" + b"1" * 5_000),
}
