"""A port that writes down what a core does, and short ways to make what the tests need."""

from __future__ import annotations

import zlib
from collections import deque
from typing import Any

from migrate.core.actions import Action
from migrate.core.delivery import Entry, Outgoing
from migrate.core.directory import Row, RowState
from migrate.core.events import Checked, Decoded, Encoded, SwapOutcome, SwapResult
from migrate.core.incarnation import Incarnation, Plan
from migrate.core.messages import (
    CALL,
    OK,
    Activated,
    Cut,
    Envelope,
    Final,
    Follow,
    Message,
    Note,
    Prepare,
    Prepared,
    Ready,
    Step,
)
from migrate.core.move import MoveTimes
from migrate.core.node import Core, CoreOptions
from migrate.core.standby import Backup, CaptureFailed, Changed

A, B, C = "a@1", "b@1", "c@1"
CLIENT = "client@1"
SERVER = "srv"
NOW = 1_000_000
TIMES = MoveTimes(
    repeat_ms=10, step_ms=100, quiesce_ms=100, reclaim_ms=100, confirm_ms=20, reserve_ms=500
)


class Port:
    """Records; handlers answer at once with their method's name unless `busy`."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.resolved: list[tuple[object, int, Any]] = []
        self.ran: list[str] = []
        self.began: list[tuple[Incarnation, Entry]] = []
        self.performed: list[Action] = []
        self.looked: list[str] = []
        self.senders: list[str] = []
        self.later: deque[Incarnation] = deque()
        self.ended: list[Incarnation] = []
        self.quiet: list[tuple[Incarnation, Entry]] = []
        self.never_quiet: list[object] = []
        self.due: list[str] = []
        self.busy = False
        self.uncapturable = ""
        self.keeps: bool | str | None = True
        self.copies: list[str] = []
        self.adopted: list[tuple[str, str, bool]] = []
        self.streams_ended: list[str] = []
        self.asked: list[Follow] = []
        self.chunks: list[tuple[str, int, bytes]] = []
        self.objects: dict[str, bytes] = {}
        self.journaled: list[Cut | Step | Note] = []
        self.swaps: list[tuple[Row, int]] = []
        self.loads: list[Backup] = []
        self.reads: list[str] = []
        self.begun: list[tuple[Incarnation, str]] = []
        self.deposed_ones: list[Incarnation] = []
        self.changed: list[tuple[str, Changed]] = []
        self.going_on: list[str] = []

    def send(self, node: str, message: Message) -> None:
        self.sent.append((node, message))

    def run(self, inc: Incarnation, entry: Entry) -> tuple[int, bytes | None, object] | None:
        self.ran.append(entry.method)
        self.began.append((inc, entry))
        return None if self.busy else (OK, entry.method.encode(), None)

    def resolve(self, token: object, status: int, payload: bytes | None, value: object) -> None:
        self.resolved.append((token, status, payload if payload is not None else value))

    def pack(self, args: object) -> bytes:
        return repr(args).encode()

    def size(self, inc: Incarnation, args: object) -> int:
        return len(self.pack(args))

    def pack_result(self, status: int, value: object) -> tuple[int, bytes]:
        return status, repr(value).encode()

    def look_up(self, server: str) -> None:
        self.looked.append(server)

    def look_up_senders(self, servers: list[str]) -> None:
        self.senders.extend(servers)

    def wake_at(self, due_ms: int) -> None:
        pass

    def pump_later(self, inc: Incarnation) -> None:
        self.later.append(inc)

    def perform(self, transfer: str, incoming: bool, action: Action) -> None:
        self.performed.append(action)

    def stopped(self, inc: Incarnation) -> None:
        self.ended.append(inc)

    def quiesced(self, inc: Incarnation, entry: Entry) -> None:
        self.quiet.append((inc, entry))

    def not_quiesced(self, token: object) -> None:
        self.never_quiet.append(token)

    def checkpoint_due(self, inc: Incarnation, plan: Plan) -> None:
        self.due.append(plan.url)

    # -- standbys

    def capture(self, inc: Incarnation, stream: str, number: int) -> bytes:
        if self.uncapturable:
            raise CaptureFailed(self.uncapturable)
        return f"object at {number}".encode()

    def may_wait(self, inc: Incarnation, entry: Entry) -> bool:
        return self.busy

    def code_of(self, inc: Incarnation) -> tuple[bool, str]:
        return False, ""

    def digest(self, payload: bytes) -> int:
        return zlib.crc32(payload)

    def copy_for(self, inc: Incarnation, stream: str) -> None:
        self.copies.append(stream)

    def end_stream(self, stream: str) -> None:
        self.streams_ended.append(stream)

    def has_stream(self, stream: str) -> bool:
        return True

    def adopt_stream(self, transfer: str, stream: str, incoming: bool) -> None:
        self.adopted.append((transfer, stream, incoming))

    def check_follow(self, follow: Follow) -> None:
        self.asked.append(follow)

    def keep_chunk(self, stream: str, number: int, state: bytes) -> None:
        self.chunks.append((stream, number, state))

    def keep_delta(self, stream: str, number: int, first: bool, state: bytes) -> bool | str | None:
        self.objects[stream] = state
        return self.keeps

    def journal_goes_on(self, stream: str) -> None:
        self.going_on.append(stream)

    def journal(self, inc: Incarnation, message: Cut | Step | Note) -> None:
        self.journaled.append(message)

    def configure(self, server: str, row: Row, rev: int) -> None:
        self.swaps.append((row, rev))

    def load_backup(self, backup: Backup) -> None:
        self.loads.append(backup)

    def promote(self, server: str, row: Row, rev: int) -> None:
        self.swaps.append((row, rev))

    def read_standby_row(self, server: str) -> None:
        self.reads.append(server)

    def wall_s(self) -> float:
        return 1e9

    def begin(self, inc: Incarnation, hook: str) -> None:
        self.begun.append((inc, hook))

    def deposed(self, inc: Incarnation, cause: str) -> None:
        self.deposed_ones.append(inc)

    def standbys_changed(self, server: str, node: str, what: Changed, cause: str) -> None:
        self.changed.append((node, what))

    # -- for assertions

    def take(self) -> list[tuple[str, Message]]:
        """What was sent since the last time."""
        sent, self.sent = self.sent, []
        return sent

    def of(self, kind: type[Message]) -> list[Any]:
        """The messages of one kind that were sent, in order."""
        return [message for _, message in self.sent if type(message) is kind]

    def did(self, kind: type[Action]) -> list[Any]:
        """The actions of one kind that were asked for, in order."""
        return [action for action in self.performed if type(action) is kind]


def core(node: str = A, **options: Any) -> tuple[Core, Port]:
    """A core and its port."""
    port = Port()
    options.setdefault("move", TIMES)
    return Core(node, port, CoreOptions(**options), NOW), port


def row(server: str = SERVER, epoch: int = 1, owner: str = A, **more: Any) -> Row:
    """An ACTIVE row, unless told otherwise."""
    state = more.pop("state", RowState.ACTIVE)
    transfer = more.pop("transfer", "spawned")
    return Row(server, epoch, owner, state, transfer, "", "Cls", 1, **more)


def host(
    at: Core,
    server: str = SERVER,
    *,
    limit: int = 100,
    reentrant: bool = False,
    timers: list[tuple[str, int]] | None = None,
    now_ms: int = NOW,
) -> Incarnation:
    """A served server."""
    own = row(server, owner=at.node)
    inc = at.host(own, 1, limit, reentrant, object(), timers or [], now_ms)
    at.started(server, now_ms)
    return inc


SESSION = f"{CLIENT}|{NOW}|1"


def env(seq: int, method: str = "", kind: int = CALL, **more: Any) -> Envelope:
    """An envelope of the client's one session."""
    more.setdefault("acked_below", 1)
    return Envelope(
        more.pop("server", SERVER),
        more.pop("session", SESSION),
        seq,
        more.pop("acked_below"),
        kind,
        method or f"m{seq}",
        more.pop("payload", b""),
        more.pop("timeout_ms", 0),
        more.pop("reply_to", CLIENT),
        **more,
    )


def out(method: str = "m", kind: int = CALL, *, token: object = "token", **more: Any) -> Outgoing:
    """A request of a sender."""
    return Outgoing(
        kind,
        method,
        b"",
        None,
        more.get("chain", ()),
        more.get("deadline_ms", 0),
        token,
        more.get("run", ""),
    )


DONE = SwapOutcome.DONE
TRANSFER = "t1"


def frozen_move(at: Core, port: Port, now_ms: int = NOW) -> None:
    """Carry a move of SERVER from this core to B as far as the freeze, state sent."""
    at.move(SERVER, B, TRANSFER, False, "", now_ms)
    at.receive(B, [Prepared(TRANSFER, 1)], now_ms)
    assert at.freeze(TRANSFER, now_ms) is not None
    at.move_event(TRANSFER, False, Encoded(b"state"), now_ms)


def committed_move(at: Core, port: Port, now_ms: int = NOW) -> None:
    """Further: the swap is done, the target is asked to serve."""
    frozen_move(at, port, now_ms)
    at.receive(B, [Ready(TRANSFER)], now_ms)
    at.move_event(TRANSFER, False, SwapResult(DONE, None, 2), now_ms)


def moved_away(at: Core, port: Port, now_ms: int = NOW) -> None:
    """To the end: nothing of the server is left but where it went."""
    committed_move(at, port, now_ms)
    at.receive(B, [Activated(TRANSFER)], now_ms)


def ready_target(at: Core, source: Core, now_ms: int = NOW) -> Incarnation:
    """Carry an incoming move of SERVER from A as far as READY; `source` gives its state."""
    record = source.export(source.hosted[SERVER], now_ms)
    at.receive(A, [Prepare(TRANSFER, SERVER, 1, "Cls", 1, False, "")], now_ms)
    at.move_event(TRANSFER, True, Checked(1), now_ms)
    at.receive(A, [Final(TRANSFER, SERVER, 1, b"state")], now_ms)
    inc = at.install(TRANSFER, record, object(), now_ms)
    assert inc is not None
    at.move_event(TRANSFER, True, Decoded(), now_ms)
    return inc
