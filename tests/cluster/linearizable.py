"""A checker of histories: could they have been produced one operation at a time?

Theory of operation. A history is what clients saw of one server: operations, each with the call,
the instants between which it must have taken effect, and how it ended. It is *linearizable* if
the operations can be put in an order that respects those instants and in which a sequential model
of the server gives every result that was seen. The search is Wing and Gong's: take an operation
that nothing unfinished must precede, apply it to the model, go on if the result is the one seen,
else step back. As Lowe adds, a pair of (operations taken, state of the model) from which the
search has failed once is not searched again.

How an operation ended decides what it may have done:

* it returned: it took effect once, between the two instants;
* it was not done: it took no effect, so it is left out, and whatever effect it had all the same
  shows as something that no order explains;
* nobody knows: it took effect once at some time after its beginning, or never. It has no second
  instant, and may be left over when all the others are explained. It can be taken only once.

Operations of one *lane* (one sender's to one server) are moreover handled in the order in which
they were made, also while several are under way. The one that was made first comes first; one of
unknown outcome that was passed over can take effect no more.

An operation of unknown outcome is tried only when nothing else fits: most of them are needed by
nothing, and every one of them could otherwise be anywhere.

Source: Wing and Gong, "Testing and Verifying Concurrent Objects", JPDC 17 (1993); Lowe, "Testing
for Linearizability", Concurrency and Computation 29 (2017).
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol


class End(enum.Enum):
    """How an operation ended, as its client saw it."""

    RETURNED = "returned"
    UNKNOWN = "unknown"
    NOT_DONE = "not done"


class Unseen(enum.Enum):
    """What stands for a result."""

    UNSEEN = "unseen"


UNSEEN: Final = Unseen.UNSEEN
"""The result of an operation that was done, and whose result got lost on the way back."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a client.

    Attributes:
        lane: Whose call it was; the calls of one lane take effect in the order of the history.
        call: What was asked: ("write", 3).
        begun_ns: Before it was made.
        ended_ns: After it had ended; no instant counts for one of unknown outcome.
        end: How it ended.
        result: What it returned, if it returned.
    """

    lane: str
    call: tuple[Any, ...]
    begun_ns: int
    ended_ns: int
    end: End = End.RETURNED
    result: Any = None

    def __str__(self) -> str:
        said = f"-> {self.result!r}" if self.end is End.RETURNED else f"({self.end.value})"
        what = f"{self.call[0]}({', '.join(map(repr, self.call[1:]))})"
        return f"[{self.begun_ns}..{self.ended_ns}] {self.lane}: {what} {said}"


class Model(Protocol):
    """A server as a sequential program."""

    @property
    def initial(self) -> Hashable:
        """The state of a fresh one."""

    def apply(self, state: Any, call: tuple[Any, ...]) -> tuple[Hashable, Any]:
        """The state after a call, and its result; `state` is not changed."""


class Register:
    """read() -> value; write(value) -> None; cas(old, new) -> whether it was `old`."""

    initial = 0

    def apply(self, state: Any, call: tuple[Any, ...]) -> tuple[Hashable, Any]:
        """See `Model`."""
        match call:
            case ("read",):
                return state, state
            case ("write", value):
                return value, None
            case ("cas", old, new):
                return (new, True) if state == old else (state, False)
        raise ValueError(f"a register knows no {call!r}")


class Counter:
    """increment(nonce) -> the new value; read() -> value."""

    initial = 0

    def apply(self, state: Any, call: tuple[Any, ...]) -> tuple[Hashable, Any]:
        """See `Model`; the nonce tells increments apart for people and for `account`."""
        match call:
            case ("increment", _):
                return state + 1, state + 1
            case ("read",):
                return state, state
        raise ValueError(f"a counter knows no {call!r}")


class AppendList:
    """append(element) -> its place, from 1; read() -> all elements, in order."""

    initial = ()

    def apply(self, state: Any, call: tuple[Any, ...]) -> tuple[Hashable, Any]:
        """See `Model`."""
        match call:
            case ("append", element):
                return (*state, element), len(state) + 1
            case ("read",):
                return state, state
        raise ValueError(f"a list knows no {call!r}")


class GrowingSet:
    """add(element) -> None; read() -> all elements, as a frozenset."""

    initial: frozenset[Any] = frozenset()

    def apply(self, state: Any, call: tuple[Any, ...]) -> tuple[Hashable, Any]:
        """See `Model`."""
        match call:
            case ("add", element):
                return state | {element}, None
            case ("read",):
                return state, state
        raise ValueError(f"a set knows no {call!r}")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the search found.

    Attributes:
        ok: Whether an order was found.
        taken: How often an operation was taken.
        story: If there is none: how far the search came, and what nothing explains. Empty
            otherwise.
    """

    ok: bool
    taken: int
    story: str = ""

    def __bool__(self) -> bool:
        return self.ok


class Undecided(Exception):
    """The search took more steps than it was given."""


STEPS_MAX: Final = 2_000_000
"""Some ten seconds; histories of real runs take a few steps for each operation."""


def check(
    model: Model,
    history: Iterable[Operation],
    *,
    in_order: bool = True,
    steps_max: int = STEPS_MAX,
) -> Verdict:
    """Look for an order that explains what was seen of one server.

    Args:
        model: The server.
        history: The operations; those of a lane in the order in which they were made.
        in_order: Whether the calls of a lane take effect in that order.
        steps_max: Operations that may be taken before the search is given up.

    Raises:
        Undecided: `steps_max` was reached.
    """
    return _Search(model, history, in_order).run(steps_max)


class _Search:
    """One search. Operations are numbered; a set of them is an int, a bit each.

    Calls and returns of the operations that returned form a doubly linked list in the order of
    their instants: place 2n is the call of number n and 2n + 1 its return. An operation is taken
    by taking its two places out; whatever stands before the first return can be next.
    """

    def __init__(self, model: Model, history: Iterable[Operation], in_order: bool) -> None:
        self.model = model
        done = [op for op in history if op.end is not End.NOT_DONE]
        self.ops = done
        self.unknown = sorted(
            (n for n, op in enumerate(done) if op.end is End.UNKNOWN),
            key=lambda n: done[n].begun_ns,
        )
        # In one lane: who must have been taken before, and who must not.
        self.before = [0] * len(done)
        self.after = [0] * len(done)
        if in_order:
            self._order_lanes(done)
        # A call that was made at the very instant of a return may have been made before it.
        events = sorted(
            (instant, is_return, 2 * n + is_return)
            for n, op in enumerate(done)
            if op.end is End.RETURNED
            for instant, is_return in ((op.begun_ns, 0), (op.ended_ns, 1))
        )
        self.head = 2 * len(done)
        order = [self.head, *(place for _, _, place in events), self.head]
        self.next = [0] * (self.head + 1)
        self.previous = [0] * (self.head + 1)
        for a, b in itertools.pairwise(order):
            self.next[a], self.previous[b] = b, a
        self.left = len(events) // 2

    def _order_lanes(self, done: Sequence[Operation]) -> None:
        lanes: dict[str, list[int]] = {}
        for n, op in enumerate(done):
            lanes.setdefault(op.lane, []).append(n)
        for lane in lanes.values():
            last = 0  # the nearest earlier one that returned; those before it are implied
            for n in lane:
                self.before[n] = last
                if done[n].end is End.RETURNED:
                    last = 1 << n
            later = 0
            for n in reversed(lane):
                self.after[n] = later
                later |= 1 << n

    def run(self, steps_max: int) -> Verdict:
        ops, before, after, apply = self.ops, self.before, self.after, self.model.apply
        after_one, before_one, unknown, head = self.next, self.previous, self.unknown, self.head
        state: Any = self.model.initial
        taken = 0
        steps = 0
        seen = {(taken, state)}
        stack: list[tuple[int, Any]] = []
        best, furthest = 0, (taken, state)
        limit = 0  # the first return of an operation that is not taken: where all must stop
        at = after_one[head]
        while self.left:
            # `at` is the place of a call to try, or of a return, or (beyond head) that of the
            # operation of unknown outcome number `at - head - 1`.
            if at < head and at & 1:
                limit = ops[at >> 1].ended_ns
                at = head + 1
            if at < head:
                n = at >> 1
            else:
                spare = at - head - 1
                if spare >= len(unknown) or ops[unknown[spare]].begun_ns > limit:
                    # Nothing fits here: undo what was taken last, and try what comes after it.
                    if not stack:
                        return Verdict(False, steps, self._story(*furthest))
                    at, state = stack.pop()
                    if at < head:
                        n = at >> 1
                        self._put_back(2 * n + 1)
                        self._put_back(at)
                        self.left += 1
                        at = after_one[at]
                    else:
                        # NB: `limit` is what it was when this one was tried.
                        n = unknown[at - head - 1]
                        at += 1
                    taken ^= 1 << n
                    continue
                n = unknown[spare]
            op = ops[n]
            bit = 1 << n
            if not taken & (bit | after[n]) and before[n] & taken == before[n]:
                new, result = apply(state, op.call)
                returned = op.end is End.RETURNED
                # One of unknown outcome that changes nothing is needed by nobody.
                fits = result == op.result or op.result is UNSEEN if returned else new != state
                if fits and (taken | bit, new) not in seen:
                    steps += 1
                    if steps > steps_max:
                        raise Undecided(f"not decided after {steps_max} steps")
                    seen.add((taken | bit, new))
                    stack.append((at, state))
                    taken |= bit
                    state = new
                    if returned:
                        before_one[after_one[at]] = before_one[at]
                        after_one[before_one[at]] = after_one[at]
                        before_one[after_one[at + 1]] = before_one[at + 1]
                        after_one[before_one[at + 1]] = after_one[at + 1]
                        self.left -= 1
                        if len(stack) > best:
                            best, furthest = len(stack), (taken, state)
                    at = after_one[head]
                    continue
            at = after_one[at] if at < head else at + 1
        return Verdict(True, steps)

    def _put_back(self, place: int) -> None:
        self.next[self.previous[place]] = place
        self.previous[self.next[place]] = place

    def _story(self, taken: int, state: Any) -> str:
        left = [
            op for n, op in enumerate(self.ops) if op.end is End.RETURNED and not taken >> n & 1
        ]
        limit = min(op.ended_ns for op in left)
        unexplained = [op for op in left if op.begun_ns <= limit]
        spare = [self.ops[n] for n in self.unknown if not taken >> n & 1]
        explained = sum(op.end is End.RETURNED for op in self.ops) - len(left)
        lines = [
            f"{explained} of {explained + len(left)} results can be explained, up to the state "
            f"{_short(state)}; what comes next cannot:",
            *(f"  {_short(op)}" for op in unexplained),
        ]
        if spare:
            lines.append(f"({len(spare)} of unknown outcome did not help, as {_short(spare[0])})")
        return "\n".join(lines)


def _short(value: object, chars_max: int = 400) -> str:
    text = str(value)
    return text if len(text) <= chars_max else f"{text[:chars_max]}... ({len(text)} characters)"


def account(history: Iterable[Operation], final: Sequence[Any]) -> list[str]:
    """Hold what clients were told of unique elements against all that the server has at the end.

    Nothing that was acknowledged is lost, nothing is there twice, nothing is there that was
    called not done or was never asked for, and what one lane has put in stands in its order.

    Args:
        history: Of one server; an operation that puts something in is `(verb, element)`.
        final: What the server says it took in, in its order.

    Returns:
        What contradicts it; empty if nothing does.
    """
    found = []
    place = {element: n for n, element in enumerate(final)}
    if len(place) != len(final):
        twice = sorted(str(e) for e in place if list(final).count(e) > 1)
        found.append(f"done twice: {', '.join(twice[:5])}")
    asked = set()
    last: dict[str, int] = {}
    for op in history:
        if len(op.call) != 2:
            continue
        element = op.call[1]
        asked.add(element)
        at = place.get(element)
        if at is None:
            if op.end is End.RETURNED:
                found.append(f"acknowledged and lost: {op}")
        elif op.end is End.NOT_DONE:
            found.append(f"called not done, and done: {op}")
        elif at < last.get(op.lane, -1):
            found.append(f"done before an earlier one of its lane: {op}")
        else:
            last[op.lane] = at
    found += [f"never asked for, and there: {e}" for e in place if e not in asked]
    return found
