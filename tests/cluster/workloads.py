"""Servers whose histories are checked; node processes import them from here.

Every method answers with its result, and with the node and the epoch it ran at: whatever a
former owner has answered shows by these. `pad` and `ballast` only make requests and states large.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import migrate
from migrate.core.actions import GoLive
from migrate.core.incarnation import Incarnation
from migrate.core.messages import CALL, Cut, Envelope, Kept, Message, Note, Step
from migrate.core.move import TargetMove, TargetPhase
from migrate.core.node import Core
from migrate.core.standby import Backup, Standbys


def told(result: Any) -> tuple[Any, str, int]:
    """A result, and where and when in the server's life it was made."""
    current = migrate.current()
    return result, current.node, current.epoch


class Register:
    """See `linearizable.Register`."""

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.value = 0
        self.ballast = bytes(ballast_bytes)

    def read(self, pad: bytes = b"") -> Any:
        return told(self.value)

    def write(self, value: int, pad: bytes = b"") -> Any:
        self.value = value
        return told(None)

    def cas(self, old: int, new: int, pad: bytes = b"") -> Any:
        if self.value != old:
            return told(False)
        self.value = new
        return told(True)


class Counter:
    """See `linearizable.Counter`."""

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.value = 0
        self.nonces: list[str] = []
        self.ballast = bytes(ballast_bytes)

    def increment(self, nonce: str, pad: bytes = b"") -> Any:
        self.value += 1
        self.nonces.append(nonce)
        return told(self.value)

    async def increment_slowly(self, nonce: str) -> Any:
        """So slowly that its sender repeats it."""
        await asyncio.sleep(0.6)
        return self.increment(nonce)

    def read(self, pad: bytes = b"") -> Any:
        return told(self.value)

    def taken(self) -> Any:
        return told(self.nonces)


class AppendList:
    """See `linearizable.AppendList`."""

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.elements: list[str] = []
        self.ballast = bytes(ballast_bytes)

    def append(self, element: str, pad: bytes = b"") -> Any:
        self.elements.append(element)
        return told(len(self.elements))

    def read(self, pad: bytes = b"") -> Any:
        return told(tuple(self.elements))

    def taken(self) -> Any:
        return told(self.elements)


class GrowingSet:
    """See `linearizable.GrowingSet`; keeps a list, in which an element could be twice."""

    def __init__(self, ballast_bytes: int = 0) -> None:
        self.elements: list[str] = []
        self.ballast = bytes(ballast_bytes)

    async def add(self, element: str, pad: bytes = b"") -> Any:
        self.elements.append(element)
        return told(None)

    async def read(self, pad: bytes = b"") -> Any:
        return told(frozenset(self.elements))

    def taken(self) -> Any:
        return told(self.elements)


class Relay:
    """Asks others in its own name: a sender that moves."""

    async def ask(self, ref: Any, method: str, *args: Any, pad: bytes = b"") -> Any:
        return await getattr(ref, method)(*args)

    async def tell(self, ref: Any, method: str, *args: Any, pad: bytes = b"") -> None:
        await getattr(ref, method).cast(*args)


class Late:
    """Thinks for a while, and then does something elsewhere."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    async def work(self, ref: Any, nonce: str, seconds: float) -> Any:
        self.begun.append(nonce)
        await asyncio.sleep(seconds)
        counted, _, _ = await ref.increment(nonce)
        return told(counted)


class Bulk:
    """A large state, of small records and of memory."""

    def __init__(self, records: int, size: int) -> None:
        self.records = {n: {"n": n, "text": f"record {n}"} for n in range(records)}
        self.memory = bytearray(size)
        self.taken = 0

    def put(self, n: int) -> Any:
        self.taken += 1
        self.records[n % max(1, len(self.records))] = {"n": self.taken, "text": f"put {n}"}
        if self.memory:
            self.memory[n * 4099 % len(self.memory)] = self.taken % 256
        return told(self.taken)

    def total(self) -> Any:
        return told(self.taken)


class SwitchedOff:
    """Takes a mechanism away from the node that it is spawned on. For the failing controls only."""

    def __init__(self, what: str) -> None:
        {
            "records": _no_records,
            "order": _no_order,
            "held": _nothing_held,
            "gate": _no_gate,
            "fence": _no_fence,
        }[what]()


def _no_records() -> None:
    """A repeat of a call is taken for a new one."""
    arrive = Core._arrive

    def without(self: Core, inc: Incarnation, env: Envelope, now_ms: int) -> None:
        session = inc.sessions.get(env.session)
        if session is not None and env.seq < session.expected and env.kind == CALL:
            session.pending += 1
            inc.mailbox.append(self._entry(session, env, now_ms))
            self._pump(inc, now_ms)
            return
        arrive(self, inc, env, now_ms)

    Core._arrive = without  # type: ignore[method-assign]


def _no_order() -> None:
    """A request that has come too early is admitted as it comes, the one it overtook later."""
    arrive = Core._arrive
    overtaken: dict[str, set[int]] = {}

    def without(self: Core, inc: Incarnation, env: Envelope, now_ms: int) -> None:
        session = inc.sessions.get(env.session)
        missing = overtaken.setdefault(env.session, set())
        if session is not None and env.kind == CALL and env.seq > session.expected:
            missing.update(range(session.expected, env.seq))
            session.expected = env.seq
        elif session is not None and env.kind == CALL and env.seq in missing:
            missing.discard(env.seq)
            session.pending += 1
            inc.mailbox.append(self._entry(session, env, now_ms))
            self._pump(inc, now_ms)
            return
        arrive(self, inc, env, now_ms)

    Core._arrive = without  # type: ignore[method-assign]


def _nothing_held() -> None:
    """The target lets out what it did as soon as it is live, and sees no need to confirm that."""
    go_live, set_timer = Core._go_live, Core.set_timer

    def without(self: Core, target: TargetMove, action: GoLive, now_ms: int) -> None:
        go_live(self, target, action, now_ms)
        inc = self.hosted[target.server]
        inc.holding = False
        inc.sender.muted = False
        held, inc.held = inc.held, []
        for node, message in held:
            self.send(node, message)
        self._send_outstanding(inc, now_ms)

    def unconfirmed(self: Core, key: tuple[str, ...], due_ms: int) -> None:
        target = self.moves_in.get(key[1]) if key[0] == "in" else None
        if target is None or target.phase is not TargetPhase.LIVE:
            set_timer(self, key, due_ms)

    Core._go_live = without  # type: ignore[method-assign]
    Core.set_timer = unconfirmed  # type: ignore[method-assign]


def is_late(late_ms: int = 0) -> bool:
    """Whether an owner without its gate tells its standbys nothing now, for so long already.

    By the clock that all processes of the machine share.
    """
    now_ms = time.monotonic_ns() // 1_000_000
    return bool((now_ms // 64) % 2) and now_ms % 64 >= late_ms


def _no_gate() -> None:
    """An owner lets out what no standby has yet, and half of the time tells them later."""
    cut = Standbys.cut

    def without(self: Standbys, inc: Incarnation, node: str, message: Message) -> None:
        self.core.send(node, message)

    def later(self: Standbys, inc: Incarnation, now_ms: int) -> bool:
        replica = inc.replica
        if replica is not None and not replica.unfed() and is_late():
            return False
        return cut(self, inc, now_ms)

    Standbys.hold = without  # type: ignore[method-assign]
    Standbys.cut = later  # type: ignore[method-assign]


def _no_fence() -> None:
    """A standby that has taken over goes on acknowledging what its former owner sends."""
    admit = Standbys._admit

    def without(
        self: Standbys, message: Cut | Step | Note, node: str, now_ms: int
    ) -> Backup | None:
        backup = self.backups.get(message.server)
        if (
            backup is not None and backup.stream == message.stream
        ) or message.stream in self.coming:
            return admit(self, message, node, now_ms)
        self.core.send(node, Kept(message.stream, message.epoch, message.number))
        return None

    Standbys._admit = without  # type: ignore[method-assign]
