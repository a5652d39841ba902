"""A core that is told anything: messages of peers that lie, in any order, with any numbers.

An input is a msgpack array of turns, so that one input is a whole conversation with a node that
hosts two servers, sends requests, gives servers away and takes some in. The directory is a plain
dictionary that swaps as it should: what may lie here are peers, and only peers.

What must hold: nothing raises; what the core says can be encoded; counters are those of what they
count; a request is answered at most once, and by its deadline if it has one; and when the turns are
over, every move ends.

A peer that has the cluster secret is believed about the moves that it leads itself: that it has
committed, that it has dropped its copy. It hands over a pickle, after all. What is tried here is
that it harms nobody else, and nothing but the server that it gives away.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import msgspec

from migrate.core.actions import (
    Action,
    CheckClass,
    CopyAhead,
    DecodeState,
    EncodeState,
    ReadRow,
    SwapRow,
    TakeChunk,
)
from migrate.core.delivery import Outgoing
from migrate.core.directory import Row
from migrate.core.events import (
    Checked,
    Copied,
    Decoded,
    DecodeFailed,
    Encoded,
    RowRead,
    SwapOutcome,
    SwapResult,
    Taken,
)
from migrate.core.incarnation import Incarnation, Phase
from migrate.core.messages import CALL, CAST, OK
from migrate.core.move import TargetPhase
from migrate.core.node import Core, CoreOptions
from migrate.errors import PeerError
from migrate.shell import wire
from tests.core.fakes import NOW, SERVER, TIMES, A, B, Port, row

OTHER: Final = "b"
"""The second server here; it sends requests of its own and is given away."""

TURN_MS_MAX: Final = 1_000_000
OPTIONS: Final = CoreOptions(
    window=3,
    records_max=6,
    late_max=5,
    sessions_max=4,
    session_expiry_ms=20_000,
    tombstone_ms=1_000,
    forwarding_expiry_ms=1_000,
    moves_in_max=3,
    move=TIMES,
)


class Shell(Port):
    """Performs what moves ask for; swaps and reads wait until a turn answers them."""

    def __init__(self) -> None:
        super().__init__()
        self.core: Core
        self.now = NOW
        self.rows: dict[str, tuple[Row, int]] = {}
        self.asked: deque[tuple[str, bool, SwapRow | ReadRow]] = deque()
        self.todo: deque[tuple[str, bool, Action]] = deque()
        self.tokens = 0
        self.ahead = False
        self.answered: set[int] = set()

    def resolve(self, token: object, status: int, payload: bytes | None, value: object) -> None:
        assert isinstance(token, int) and token not in self.answered, "answered twice"
        self.answered.add(token)

    def perform(self, transfer: str, incoming: bool, action: Action) -> None:
        match action:
            case SwapRow() | ReadRow():
                self.asked.append((transfer, incoming, action))
            case CheckClass() | CopyAhead() | TakeChunk() | DecodeState() | EncodeState():
                self.todo.append((transfer, incoming, action))
            case _:
                pass

    def work(self) -> None:
        """What a shell does in its next turn."""
        while self.todo or self.later:
            while self.later:
                self.core.pump(self.later.popleft(), self.now)
            if self.todo:
                transfer, incoming, action = self.todo.popleft()
                self.core.move_event(transfer, incoming, self._done(transfer, action), self.now)

    def _done(self, transfer: str, action: Action) -> Any:
        match action:
            case CheckClass():
                return Checked(1)
            case CopyAhead():
                self.ahead = not self.ahead
                return Copied(b"ahead" if self.ahead else b"", not self.ahead)
            case TakeChunk():
                return Taken()
            case EncodeState():
                inc = self.core.freeze(transfer, self.now)
                if inc is None:
                    return Checked(1)  # the move is over; nothing hears this
                return Encoded(wire.encode_state(self.core.export(inc, self.now)))
            case DecodeState():
                try:
                    record = wire.decode_state(action.state)
                except PeerError as error:
                    return DecodeFailed(str(error))
                try:
                    if self.core.install(transfer, record, object(), self.now) is None:
                        return DecodeFailed("the move is over")
                except PeerError as error:
                    return DecodeFailed(str(error))
                return Decoded()
        raise AssertionError(action)

    def answer(self, outcome: int) -> None:
        """Answer the oldest swap or read; `outcome` 2: not done; 3, 4: unknown (and done)."""
        if not self.asked:
            return
        transfer, incoming, action = self.asked.popleft()
        moves: Any = self.core.moves_in if incoming else self.core.moves_out
        move = moves.get(transfer)
        if move is None:
            return
        now_row, rev = self.rows.get(move.server, (None, 0))
        event: Any
        if isinstance(action, ReadRow):
            known = outcome != 3
            event = RowRead(known, now_row if known else None, rev if known else 0)
        elif outcome == 2:
            event = SwapResult(SwapOutcome.NOT_DONE, None, 0)
        else:
            won = rev == action.rev and outcome != 3
            if won:
                self.rows[move.server] = now_row, rev = action.row, rev + 1
            if outcome > 2:
                event = SwapResult(SwapOutcome.UNKNOWN, None, 0)
            elif won:
                event = SwapResult(SwapOutcome.DONE, action.row, rev)
            else:
                event = SwapResult(SwapOutcome.REFUSED, now_row, rev)
        self.core.move_event(transfer, incoming, event, self.now)


class Conversation:
    """One node and what is said to it."""

    def __init__(self) -> None:
        self.shell = Shell()
        self.core = self.shell.core = Core(A, self.shell, OPTIONS, NOW)
        for server in (SERVER, OTHER):
            own = row(server)
            self.shell.rows[server] = own, 1
            self.core.host(own, 1, 3, server == SERVER, object(), [("tick", 50)], NOW)
            self.core.started(server, NOW)
        # A server of another node, which may come here.
        self.shell.rows["far"] = row("far", owner=B), 1
        self.heard = 0
        self.due: list[int] = []  # requests of the node's own that have a deadline

    def say(self, turn: Any) -> None:
        """Play one turn; what is malformed is skipped, as the wire would have refused it."""
        shell, core = self.shell, self.core
        match turn:
            case ["say", str(node), list(messages)]:
                try:
                    decoded = wire.decode_messages(msgspec.msgpack.encode(messages))
                except (PeerError, msgspec.MsgspecError, OverflowError, ValueError):
                    return
                self.heard += len(decoded)
                core.receive(node, decoded, shell.now)
            case ["time", int(ms)]:
                shell.now += max(0, min(ms, TURN_MS_MAX))
                core.tick(shell.now)
            case ["busy", bool(busy)]:
                shell.busy = busy
            case ["end"] if shell.began:
                inc, entry = shell.began.pop()
                core.finish(inc, entry, OK, b"", None, shell.now)
            case ["ask", str(server), bool(cast), int(left_ms), list(chain)]:
                self._request(server, CAST if cast else CALL, left_ms, chain)
            case ["move", str(server), str(node)]:
                if server in core.hosted and server not in core.leaving and node != A:
                    shell.tokens += 1
                    core.move(server, node, f"out{shell.tokens}", False, "", shell.now)
            case ["row", int(outcome)]:
                shell.answer(outcome % 5)
            case ["found", str(server), bool(known)]:
                core.located(server, known, shell.rows.get(server, (None, 0))[0], shell.now)
            case ["dead", str(node)]:
                core.node_dead(node, shell.now)
            case ["up", str(node)]:
                core.peer_up(node, shell.now)
            case ["hook"]:
                for server in list(core.hosted):
                    core.started(server, shell.now)
            case ["stop", str(server)]:
                core.stop(server, shell.now)
            case ["removed", str(server)] if core.hosted.get(server) in shell.ended:
                shell.rows.pop(server, None)
                core.removed(server, shell.now)
            case _:
                return
        shell.work()
        self.check()

    def _request(self, server: str, kind: int, left_ms: int, chain: list[Any]) -> None:
        inc = self.core.hosted.get(OTHER)
        sender = self.core.own if inc is None or len(chain) == 1 else inc.sender
        deadline = self.shell.now + left_ms if 0 < left_ms < TURN_MS_MAX else 0
        self.shell.tokens += 1
        if deadline and sender is self.core.own:
            self.due.append(self.shell.tokens)
        runs = tuple(run for run in chain if isinstance(run, str))
        request = Outgoing(
            kind, "m", b"", None, runs, deadline, self.shell.tokens, runs[0] if runs else ""
        )
        if not self.core.request(sender, server, request, self.shell.now, wait=left_ms % 2 == 0):
            self.shell.answered.add(self.shell.tokens)  # no room: nothing was done

    def check(self) -> None:
        """What holds between any two events."""
        core = self.core
        for inc in [*core.hosted.values(), *core.copies.values()]:
            check_counts(inc)
        for inc in core.hosted.values():
            assert len(inc.late) <= OPTIONS.late_max
            assert inc.phase is not Phase.FROZEN or not inc.running
        for sending in core.sending.values():
            assert all(sending.low <= seq < sending.next_seq for seq in sending.outstanding)
        assert len(core.moves_in) <= OPTIONS.moves_in_max
        for _, message in self.shell.take():
            again = wire.decode_messages(wire.encode_messages([message]))
            assert wire.encode_messages(again) == wire.encode_messages([message])

    def _epoch(self, server: str) -> int:
        row, _ = self.shell.rows.get(server, (None, 0))
        return row.epoch if row is not None else 0

    def end(self) -> None:
        """Peers are silent from here on, the directory answers: every move must end."""
        core, shell = self.core, self.shell
        shell.busy = False
        for _ in range(60):
            for inc, entry in list(shell.began):
                core.finish(inc, entry, OK, b"", None, shell.now)
            shell.began.clear()
            for server in list(core.hosted):
                core.started(server, shell.now)
            while shell.asked:
                shell.answer(0)
                shell.work()
            if not core.moves_in and not core.moves_out:
                break
            shell.now += 200
            core.tick(shell.now)
            shell.work()
        self.check()
        assert not core.moves_out and not core.leaving, "a move away did not end"
        for move in list(core.moves_in.values()):
            # It was told of a commit that never was, and waits for the row to show it.
            assert move.phase is TargetPhase.LIVE, "a move here did not end"
            assert self._epoch(move.server) < move.prepare.epoch + 1
        assert not core.arriving and not core.copies
        for inc in core.hosted.values():
            wire.encode_state(core.export(inc, shell.now))
        # Every wait that had a deadline is over, and what is kept expires.
        shell.now += TURN_MS_MAX + 10 * OPTIONS.session_expiry_ms
        core.tick(shell.now)
        core.tick(shell.now + TURN_MS_MAX)  # what was withdrawn has a while longer
        shell.work()
        self.check()
        assert shell.answered.issuperset(self.due), "a request outlived its deadline"


def check_counts(inc: Incarnation) -> None:
    """Counters of a copy are those of what they count."""
    sessions = inc.sessions.values()
    assert inc.early == sum(len(s.early) for s in sessions), "early"
    assert inc.records == sum(len(s.records) for s in sessions), "records"
    assert inc.record_bytes == sum(len(r.payload) for s in sessions for r in s.records.values())
    for session in sessions:
        assert session.pending >= 0, "pending"
        assert all(seq > session.expected for seq in session.early), "early numbers"
        assert session.expected not in session.records, "recorded numbers"
        assert session.records.keys().isdisjoint(session.early), "recorded numbers"
        assert session.acked_below <= session.expected, "acked_below"


def converse(data: bytes) -> bool:
    """Play a script; whether any message of it was well-formed."""
    try:
        turns = msgspec.msgpack.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    if type(turns) is not list:
        return False
    talk = Conversation()
    for turn in turns[:60]:
        talk.say(turn)
    talk.end()
    return talk.heard > 0
