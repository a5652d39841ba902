"""Machines that are told anything in any order, against simple models of what should be."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from msgspec import structs

from migrate.core import directory
from migrate.core.actions import (
    Action,
    CheckClass,
    CopyAhead,
    DecodeState,
    DropCopy,
    EncodeState,
    Finish,
    GoLive,
    Quiesce,
    ReadRow,
    Release,
    Result,
    Resume,
    SetTimer,
    SwapRow,
    TakeChunk,
    Tell,
)
from migrate.core.delivery import Outgoing
from migrate.core.directory import Row, RowState
from migrate.core.events import (
    Checked,
    Copied,
    Decoded,
    DecodeFailed,
    Encoded,
    EncodeFailed,
    NodeDead,
    PeerUp,
    Quiesced,
    RowRead,
    SwapOutcome,
    SwapResult,
    Taken,
    TimerFired,
)
from migrate.core.forwarding import Forwarding
from migrate.core.messages import CALL, CAST, OK, Prepare
from migrate.core.move import SourceMove, TargetMove, answer_unknown
from migrate.core.timers import Timers
from tests.core.fakes import CLIENT, NOW, SERVER, TIMES, A, B, C, Port, core, host, row

PICK = st.integers(0, 1 << 16)
STEPS = st.sampled_from([0, 1, 9, 10, 25, 60, 110, 600])


# ---------------------------------------------------------------------- delivery


class Answers(Port):
    """A port that knows who was answered, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[object, tuple[int, Any]] = {}

    def resolve(self, token: object, status: int, payload: bytes | None, value: object) -> None:
        assert token not in self.answers, f"{token} was answered twice"
        self.answers[token] = (status, payload)


class Delivery(RuleBasedStateMachine):
    """A sender, an owner, and a network that loses, repeats and reorders."""

    LIMIT = 2
    WINDOW = 4
    BYTES = 64 << 20
    SIZES = (0,)

    def __init__(self) -> None:
        super().__init__()
        options: dict[str, Any] = {
            **{"window": self.WINDOW, "repeat_first_ms": 20, "ack_idle_ms": 5},
            "mailbox_bytes_max": self.BYTES,
        }
        self.client, _ = core(CLIENT, **options)
        self.owner, _ = core(A, **options)
        self.theirs = self.client.port = Answers()
        self.ours = self.owner.port = Answers()
        self.inc = host(self.owner, limit=self.LIMIT)
        self.client.route_hint(SERVER, A, 1)
        self.now = NOW
        self.made: list[tuple[int, int]] = []  # (token, kind) in the order of making them
        self.refused: set[int] = set()
        self.dropped: set[int] = set()
        self.open: dict[int, tuple[Any, Outgoing]] = {}
        self.net: list[tuple[str, Any]] = []

    def work(self) -> None:
        """What each shell does in its next turn."""
        for at, port in ((self.client, self.theirs), (self.owner, self.ours)):
            while port.later:
                at.pump(port.later.popleft(), self.now)
        self.net += self.theirs.take() + self.ours.take()
        # What is never more than the windows, the mailbox and their answers.
        del self.net[:-200]

    @rule(kind=st.sampled_from([CALL, CAST]), wait=st.booleans(), left=st.sampled_from([0, 15]))
    def ask(self, kind: int, wait: bool, left: int) -> None:
        token = len(self.made) + 1
        deadline = self.now + left if left else 0
        payload = bytes(self.SIZES[token % len(self.SIZES)])
        out = Outgoing(kind, str(token), payload, None, (), deadline, token, "")
        session = self.client.request(self.client.own, SERVER, out, self.now, wait=wait)
        self.made.append((token, kind))
        if session is None:
            assert not wait
            self.refused.add(token)
        else:
            self.open[token] = session, out
        self.work()

    @rule(kind=st.sampled_from([CALL, CAST]), count=st.integers(2, 6))
    def burst(self, kind: int, count: int) -> None:
        """More than there is room for, while a handler runs."""
        self.ours.busy = True
        for _ in range(count):
            self.ask(kind, True, 0)
        self.deliver_in_order(count)

    @precondition(lambda self: self.open)
    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        token = sorted(self.open)[pick % len(self.open)]
        session, out = self.open.pop(token)
        if token not in self.theirs.answers:
            self.dropped.add(token)
            self.client.cancel(session, out, self.now)
        self.work()

    @precondition(lambda self: self.net)
    @rule(pick=PICK, keep=st.booleans(), lose=st.booleans())
    def deliver(self, pick: int, keep: bool, lose: bool) -> None:
        at = pick % len(self.net)
        node, message = self.net[at] if keep else self.net.pop(at)
        if not lose:
            # The receiver may change what it got; a repeat is a copy of what was sent.
            self._arrive(node, structs.replace(message))

    @rule(count=st.integers(1, 8))
    def deliver_in_order(self, count: int) -> None:
        for _ in range(min(count, len(self.net))):
            node, message = self.net.pop(0)
            self._arrive(node, message)

    def _arrive(self, node: str, message: Any) -> None:
        if node == A:
            self.owner.receive(CLIENT, [message], self.now)
        else:
            self.client.receive(A, [message], self.now)
        self.work()

    @rule(busy=st.booleans())
    def slow_down(self, busy: bool) -> None:
        self.ours.busy = busy

    @precondition(lambda self: self.inc.running)
    @rule()
    def finish(self) -> None:
        [entry] = self.inc.running.values()
        self.owner.finish(self.inc, entry, OK, entry.method.encode(), None, self.now)
        self.work()

    @rule(step=STEPS)
    def wait_for(self, step: int) -> None:
        self.now += step
        self.client.tick(self.now)
        self.owner.tick(self.now)
        self.work()

    @rule()
    def reconnect(self) -> None:
        self.net.clear()
        self.client.peer_up(A, self.now)
        self.owner.peer_up(CLIENT, self.now)
        self.work()

    @invariant()
    def nothing_runs_twice_or_out_of_order(self) -> None:
        ran = [int(method) for method in self.ours.ran]
        assert ran == sorted(set(ran))
        assert not self.refused.intersection(ran)

    @invariant()
    def answers_are_right(self) -> None:
        kinds = dict(self.made)
        for token, (status, payload) in self.theirs.answers.items():
            assert token not in self.dropped
            if status == OK and kinds[token] == CALL:
                assert payload == str(token).encode() and str(token) in self.ours.ran
        done = {t for t, (status, _) in self.theirs.answers.items() if status == OK}
        assert not done & self.refused

    @invariant()
    def everything_is_bounded(self) -> None:
        assert len(self.inc.mailbox) + self.inc.early <= self.LIMIT
        assert self.inc.early == sum(len(s.early) for s in self.inc.sessions.values())
        early = [entry.size for s in self.inc.sessions.values() for entry in s.early.values()]
        sizes = [entry.size for entry in self.inc.mailbox] + early
        assert (self.inc.mailbox_bytes + self.inc.early_bytes, self.inc.early_bytes) == (
            sum(sizes),
            sum(early),
        )
        assert sum(sizes) - max(sizes, default=0) < self.BYTES
        assert self.inc.records == sum(len(s.records) for s in self.inc.sessions.values())
        for session in self.client.sending.values():
            assert session.next_seq - session.low <= self.WINDOW
            assert len(session.outstanding) <= self.WINDOW

    def teardown(self) -> None:
        """The network is as it should be from here on: everybody gets an answer."""
        for _ in range(400):
            self.ours.busy = False
            while self.inc.running:
                self.finish()
            while self.net:
                self.deliver_in_order(8)
            waits = [t for t in self.open if t not in self.theirs.answers]
            if not waits and all(s.idle() for s in self.client.sending.values()):
                break
            self.wait_for(20)
        self.answers_are_right()
        self.nothing_runs_twice_or_out_of_order()
        for token, kind in self.made:
            if token in self.refused or token in self.dropped:
                continue
            assert token in self.theirs.answers, f"{token} was never answered"
            if self.theirs.answers[token][0] == OK:
                assert str(token) in self.ours.ran, f"{token} ({kind}) was acknowledged, not run"
        # An idle sender has acknowledged everything: nothing is kept for it.
        for _ in range(3):
            self.wait_for(31_000)  # its last word may be lost with a link; it is said again
            while self.net:
                self.deliver_in_order(8)
        assert self.inc.records == 0 and self.inc.record_bytes == 0


# -------------------------------------------------------------------------- moves

TRANSFER = "t"
START = row(epoch=7)


class Move(RuleBasedStateMachine):
    """Both sides of one move, a network, a directory; one node may die."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.row, self.rev = START, 3
        self.source = SourceMove(
            node=A, target=B, row=START, rev=3, transfer=TRANSFER, by_value=False, python="",
            times=TIMES,
        )  # fmt: skip
        self.target: TargetMove | None = None
        self.net: list[tuple[str, Any]] = []
        self.asked: list[tuple[str, SwapRow | ReadRow]] = []
        self.todo: deque[tuple[str, Any]] = deque()
        self.due: dict[str, int] = {}
        self.copies = {A: "serving", B: ""}
        self.dead = ""
        self.released = False
        self.results: list[Result] = []
        self.fails = ""
        self.ahead = 0
        self.sent_ahead = 0
        self.taken: list[int] = []
        self.perform(A, self.source.start(0))

    def perform(self, node: str, actions: list[Action]) -> None:
        copies = self.copies
        for action in actions:
            match action:
                case Tell(node=to, message=message):
                    self.net.append((to, message))
                case SetTimer(delay_ms=delay):
                    self.due[node] = self.now + delay
                case CheckClass():
                    self.todo.append((node, Checked(0 if self.fails == "check" else 1)))
                case Quiesce():
                    self.todo.append((node, Quiesced()))
                case CopyAhead():
                    assert copies[A] == "serving"
                    self.todo.append((node, self.copy_ahead()))
                case TakeChunk(number=number):
                    self.taken.append(number)
                    done = DecodeFailed("no") if self.fails == "take" else Taken()
                    self.todo.append((node, done))
                case EncodeState(ahead=ahead):
                    assert ahead == bool(self.sent_ahead) or self.fails == "copy"
                    copies[A] = "frozen"
                    failed = EncodeFailed("no", "x.y")
                    self.todo.append((node, failed if self.fails == "encode" else Encoded(b"s")))
                case DecodeState(ahead=ahead):
                    if ahead:
                        assert self.taken == list(range(self.sent_ahead)), "chunks lost or repeated"
                    failed_too = DecodeFailed("no")
                    self.todo.append((node, failed_too if self.fails == "decode" else Decoded()))
                    copies[B] = "ready"
                case SwapRow() | ReadRow():
                    self.asked.append((node, action))
                case Resume():
                    assert not self.released, "taken back after it was released"
                    assert copies[A] in ("frozen", "serving") and action.row == self.row
                    copies[A] = "serving"
                case GoLive():
                    assert copies[B] == "ready"
                    copies[B] = "live"
                case Release():
                    assert copies[B] == "live"
                    copies[B] = "serving"
                    self.released = True
                case DropCopy():
                    assert not (node == B and copies[B] == "serving")
                    copies[node] = ""
                case Finish(result=result) if node == A:
                    self.results.append(result)
                case _:
                    pass
        while self.todo:
            at, event = self.todo.popleft()
            self.tell(at, event)

    def copy_ahead(self) -> Copied:
        """Each round has two chunks, each smaller than the one before."""
        if self.fails == "copy" and self.sent_ahead:
            return Copied(b"", True, failed=True)
        size = self.ahead >> self.sent_ahead
        if size:
            self.sent_ahead += 1
        return Copied(b"c" * size, self.sent_ahead % 2 == 0 or not size)

    def tell(self, node: str, event: Any) -> None:
        if node == self.dead:
            return
        if node == A:
            self.perform(A, self.source.handle(event, self.now))
        elif self.target is not None:
            self.perform(B, self.target.handle(event, self.now))
            self.forget_target()

    def forget_target(self) -> None:
        if self.target is not None and self.target.phase.name == "ENDED":
            self.target = None
            self.due.pop(B, None)

    def arrive(self, node: str, message: Any) -> None:
        if node == self.dead:
            return
        known = self.results == [] if node == A else self.target is not None
        if node == B and not known and isinstance(message, Prepare) and not self.copies[B]:
            self.target = TargetMove(node=B, source=A, prepare=message, times=TIMES)
            self.taken = []
            self.perform(B, self.target.start(self.now))
            self.forget_target()
        elif known:
            self.tell(node, message)
        else:
            answer = answer_unknown(message) if not isinstance(message, Prepare) else None
            if answer is not None:
                self.net.append((B if node == A else A, answer))

    # -- what happens

    @initialize(
        fails=st.sampled_from(["", "", "", "", "", "check", "copy", "take", "encode", "decode"]),
        ahead=st.sampled_from([0, 0, 1, 1 << 5, 1 << 20]),
        quiet=st.integers(0, 30),
    )
    def choose(self, fails: str, ahead: int, quiet: int) -> None:
        """How far it comes before anything odd happens."""
        self.fails = fails
        self.ahead = ahead
        for _ in range(quiet):
            if self.net:
                self.arrive(*self.net.pop(0))
            elif self.asked:
                self.answer("known")

    @precondition(lambda self: self.net)
    @rule(pick=PICK, keep=st.booleans())
    def deliver(self, pick: int, keep: bool) -> None:
        at = pick % len(self.net)
        self.arrive(*(self.net[at] if keep else self.net.pop(at)))
        del self.net[:-50]

    @precondition(lambda self: self.net)
    @rule()
    def deliver_next(self) -> None:
        self.arrive(*self.net.pop(0))

    @precondition(lambda self: self.net)
    @rule(pick=PICK)
    def lose(self, pick: int) -> None:
        self.net.pop(pick % len(self.net))

    @precondition(lambda self: self.asked)
    @rule(outcome=st.sampled_from(["known", "lost before", "lost after", "lost after", "not done"]))
    def answer(self, outcome: str) -> None:
        node, action = self.asked.pop(0)
        event: SwapResult | RowRead
        if isinstance(action, ReadRow):
            known = outcome == "known"
            event = RowRead(known, self.row if known else None, self.rev if known else 0)
        elif outcome == "not done":
            event = SwapResult(SwapOutcome.NOT_DONE, None, 0)
        else:
            won = action.rev == self.rev and outcome != "lost before"
            if won:
                assert action.row.epoch >= self.row.epoch
                self.row, self.rev = action.row, self.rev + 1
            if outcome != "known":
                event = SwapResult(SwapOutcome.UNKNOWN, None, 0)
            else:
                done = SwapOutcome.DONE if won else SwapOutcome.REFUSED
                event = SwapResult(done, self.row, self.rev)
        self.tell(node, event)

    @rule(step=STEPS)
    def wait_for(self, step: int) -> None:
        self.now += step
        for node in [n for n, due in self.due.items() if due <= self.now]:
            del self.due[node]
            self.tell(node, TimerFired())

    @rule()
    def reconnect(self) -> None:
        self.net.clear()
        self.tell(A, PeerUp(B))
        self.tell(B, PeerUp(A))

    @precondition(lambda self: not self.dead)
    @rule(node=st.sampled_from([A, B]))
    def kill(self, node: str) -> None:
        self.dead = node
        self.copies[node] = ""
        if node == B:
            self.target = None
        self.due.pop(node, None)
        self.net = [(to, message) for to, message in self.net if to != node]
        self.asked = [(by, action) for by, action in self.asked if by != node]
        self.tell(A if node == B else B, NodeDead(node))

    @invariant()
    def one_owner(self) -> None:
        serving = [node for node, copy in self.copies.items() if copy == "serving"]
        assert len(serving) <= 1
        for node in serving:
            # NB: the epoch too, as long as nobody has moved on.
            assert self.row.owner == node

    @invariant()
    def somebody_has_it(self) -> None:
        assert self.dead or self.copies[A] or self.copies[B] in ("live", "serving")

    @invariant()
    def it_ends_once(self) -> None:
        assert len(self.results) <= 1

    def teardown(self) -> None:
        """Everything arrives from here on: the move ends, and one copy serves."""
        for _ in range(300):
            while self.net:
                self.deliver_next()
            while self.asked:
                self.answer("known")
            over = self.target is None and (self.results or self.dead == A)
            if over and not self.net:
                break
            self.wait_for(10)
            self.one_owner()
        assert self.target is None, f"the target waits: {self.target.story.tell()}"
        if self.dead != A:
            assert self.results, f"the source waits: {self.source.story.tell()}"
            if self.results == [Result.MOVED]:
                # A target that was live and then died is a death like any other.
                assert self.released or self.dead == B
                assert self.copies[A] == ""
            else:
                assert self.copies[A] == "serving" and not self.released
        if not self.dead:
            assert sorted(self.copies.values()) == ["", "serving"]


# ------------------------------------------------------- rows, forwarding, timers


class Rows(RuleBasedStateMachine):
    """Anybody swaps the row by what it knew of it at some time."""

    seen = Bundle("seen")

    def __init__(self) -> None:
        super().__init__()
        self.row, self.rev = row(), 1
        self.n = 0
        self.history = [self.row]

    @rule(target=seen)
    def read(self) -> tuple[Row, int]:
        return self.row, self.rev

    @rule(
        known=seen,
        change=st.sampled_from(["commit", "confirm", "reclaim", "bury"]),
        node=st.sampled_from([A, B, C]),
    )
    def swap(self, known: tuple[Row, int], change: str, node: str) -> None:
        old, rev = known
        self.n += 1
        if old.state is RowState.LOST:
            return
        match change:
            case "commit":
                new = directory.committed(old, node, f"t{self.n}", 1)
            case "confirm" if old.state is RowState.COMMITTED:
                new = directory.confirmed(old)
            case "reclaim" if old.state is RowState.COMMITTED:
                new = directory.reclaimed(old, node, f"t{self.n}/back", 1)
            case "bury":
                new = directory.buried(old, "died")
            case _:
                return
        if rev == self.rev:
            assert new.epoch == old.epoch + (change != "confirm")
            self.row, self.rev = new, rev + 1
            self.history.append(new)

    @invariant()
    def epochs_only_rise_and_name_one_owner(self) -> None:
        epochs = [known.epoch for known in self.history]
        assert epochs == sorted(epochs)
        owners: dict[int, str] = {}
        for known in self.history:
            assert owners.setdefault(known.epoch, known.owner) == known.owner
            assert known.server == SERVER and (known.state is not RowState.LOST or not known.name)

    @invariant()
    def committed_is_left_once(self) -> None:
        for before, after in zip(self.history, self.history[1:], strict=False):
            if after.state is RowState.ACTIVE and after.epoch == before.epoch:
                assert before.state is RowState.COMMITTED and after.transfer == before.transfer
            assert before.state is not RowState.LOST


class ForwardingTable(RuleBasedStateMachine):
    """The table against a plain list."""

    MAX = 3
    EXPIRY = 100

    def __init__(self) -> None:
        super().__init__()
        self.table = Forwarding(self.EXPIRY, self.MAX)
        self.model: dict[str, tuple[str, int, int]] = {}
        self.now = 0

    def known(self, server: str) -> tuple[str, int] | None:
        entry = self.model.get(server)
        if entry is None or entry[2] <= self.now:
            return None
        return entry[0], entry[1]

    @rule(server=st.sampled_from("stuvw"), node=st.sampled_from([A, B]), epoch=st.integers(0, 6))
    def learn(self, server: str, node: str, epoch: int) -> None:
        before = self.model.get(server)
        kept = self.table.learn(server, node, epoch, self.now)
        # NB: an entry that has expired and is still there counts: it is of a lower epoch.
        assert kept == (before is None or before[1] < epoch)
        if kept:
            self.model.pop(server, None)
            self.model[server] = node, epoch, self.now + self.EXPIRY
            if len(self.model) > self.MAX:
                del self.model[next(iter(self.model))]

    @rule(server=st.sampled_from("stuvw"))
    def get(self, server: str) -> None:
        assert self.table.get(server, self.now) == self.known(server)
        if self.known(server) is None:
            self.model.pop(server, None)

    @rule(server=st.sampled_from("stuvw"))
    def forget(self, server: str) -> None:
        self.table.forget(server)
        self.model.pop(server, None)

    @rule(node=st.sampled_from([A, B]))
    def forget_node(self, node: str) -> None:
        self.table.forget_node(node)
        self.model = {s: entry for s, entry in self.model.items() if entry[0] != node}

    @rule(step=st.integers(0, 120))
    def wait_for(self, step: int) -> None:
        self.now += step

    @rule(step=st.integers(0, 60))
    def expire(self, step: int) -> None:
        self.now += step
        gone = [s for s, entry in self.model.items() if entry[2] <= self.now]
        assert self.table.expire(self.now) == len(gone)
        for server in gone:
            del self.model[server]

    @invariant()
    def bounded(self) -> None:
        assert len(self.table) == len(self.model) <= self.MAX


class TimerSet(RuleBasedStateMachine):
    """Due times against a plain dictionary; equal times come in the order they were set."""

    def __init__(self) -> None:
        super().__init__()
        self.timers = Timers()
        self.model: dict[str, tuple[int, int]] = {}
        self.n = 0

    @rule(key=st.sampled_from("abcdef"), due=st.integers(0, 8))
    def set(self, key: str, due: int) -> None:
        self.n += 1
        self.timers.set(key, due)
        self.model[key] = due, self.n

    @rule(key=st.sampled_from("abcdef"), times=st.integers(1, 80))
    def set_often(self, key: str, times: int) -> None:
        for due in range(times):
            self.set(key, due % 9)

    @rule(key=st.sampled_from("abcdef"))
    def cancel(self, key: str) -> None:
        self.timers.cancel(key)
        self.model.pop(key, None)

    @rule(now=st.integers(0, 8))
    def pop(self, now: int) -> None:
        due = [key for key, (at, _) in self.model.items() if at <= now]
        first = min(due, key=lambda key: self.model[key], default=None)
        assert self.timers.pop_due(now) == first
        if first is not None:
            del self.model[first]

    @invariant()
    def agrees(self) -> None:
        assert len(self.timers) == len(self.model)
        assert self.timers.next_ms() == min((due for due, _ in self.model.values()), default=None)
        for key in "abcdef":
            assert self.timers.due_ms(key) == self.model.get(key, (None,))[0]
        # What was replaced does not pile up.
        assert len(self.timers._heap) <= max(64, 4 * len(self.model)) + 1


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)


class DeliveryOfBytes(Delivery):
    """The same, where bytes are what there is no room for."""

    LIMIT = 100
    BYTES = 10
    SIZES = (1, 6, 30, 0)


TestDelivery = Delivery.TestCase
TestDeliveryOfBytes = DeliveryOfBytes.TestCase
TestMove = Move.TestCase
TestRows = Rows.TestCase
TestForwardingTable = ForwardingTable.TestCase
TestTimerSet = TimerSet.TestCase
TestDelivery.settings = SETTINGS
TestDeliveryOfBytes.settings = SETTINGS
TestMove.settings = settings(SETTINGS, max_examples=200)
TestRows.settings = SETTINGS
TestForwardingTable.settings = SETTINGS
TestTimerSet.settings = SETTINGS
