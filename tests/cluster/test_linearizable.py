"""The checker of histories rejects bad ones, accepts tricky ones, agrees with brute force."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.linearizable import (
    UNSEEN,
    AppendList,
    Counter,
    End,
    GrowingSet,
    Model,
    Operation,
    Register,
    Undecided,
    account,
    check,
)

UNKNOWN, NOT_DONE = End.UNKNOWN, End.NOT_DONE
MODELS: dict[str, Model] = {
    "register": Register(),
    "counter": Counter(),
    "list": AppendList(),
    "set": GrowingSet(),
}


def op(lane: str, begun: int, ended: int, *call: Any, to: Any = None, end: End = End.RETURNED):
    return Operation(lane, call, begun, ended, end, to)


# Each with the reason why no order explains it.
BAD: dict[str, tuple[str, list[Operation]]] = {
    "stale read: the write had returned": (
        "register",
        [op("a", 0, 1, "write", 1), op("b", 2, 3, "read", to=0)],
    ),
    "read of a value nobody wrote": ("register", [op("a", 0, 1, "read", to=7)]),
    "two reads go back in time": (
        "register",
        [
            op("a", 0, 9, "write", 1),
            op("b", 1, 2, "read", to=1),
            op("c", 3, 4, "read", to=0),
        ],
    ),
    "two compare-and-swaps both won": (
        "register",
        [op("a", 0, 9, "cas", 0, 1, to=True), op("b", 0, 9, "cas", 0, 2, to=True)],
    ),
    "a compare-and-swap lost against nothing": (
        "register",
        [op("a", 0, 1, "cas", 0, 1, to=False)],
    ),
    "lost write: overwritten by nobody": (
        "register",
        [
            op("a", 0, 1, "write", 1),
            op("b", 2, 3, "write", 2),
            op("a", 4, 5, "read", to=1),
        ],
    ),
    "effect of a write that was called not done": (
        "register",
        [op("a", 0, 1, "write", 1, end=NOT_DONE), op("b", 2, 3, "read", to=1)],
    ),
    "effect of a write before it was made": (
        "register",
        [op("b", 0, 1, "read", to=1), op("a", 2, 3, "write", 1, end=UNKNOWN)],
    ),
    "a write of unknown outcome came, went and came again": (
        "register",
        [
            op("a", 0, 1, "write", 1, end=UNKNOWN),
            op("b", 2, 3, "read", to=1),
            op("b", 4, 5, "write", 2),
            op("b", 6, 7, "read", to=2),
            op("b", 8, 9, "read", to=1),
        ],
    ),
    "a write was overtaken by a later one of its own lane": (
        "register",
        [
            op("a", 0, 9, "write", 1),
            op("a", 0, 9, "write", 2),
            op("b", 10, 11, "read", to=1),
        ],
    ),
    "a call of unknown outcome took effect after the next one of its lane": (
        "register",
        [
            op("a", 0, 1, "write", 1, end=UNKNOWN),
            op("a", 2, 3, "write", 2),
            op("b", 4, 5, "read", to=2),
            op("b", 6, 7, "read", to=1),
        ],
    ),
    "lost update: an increment is missing": (
        "counter",
        [op("a", 0, 1, "increment", "a1", to=1), op("b", 2, 3, "read", to=0)],
    ),
    "lost update: two increments to the same value": (
        "counter",
        [op("a", 0, 9, "increment", "a1", to=1), op("b", 0, 9, "increment", "b1", to=1)],
    ),
    "duplicate: one increment counted twice": (
        "counter",
        [op("a", 0, 1, "increment", "a1", to=1), op("b", 2, 3, "read", to=2)],
    ),
    "duplicate: an increment of unknown outcome counted twice": (
        "counter",
        [op("a", 0, 1, "increment", "a1", end=UNKNOWN), op("b", 2, 3, "read", to=2)],
    ),
    "the second increment of a lane came first": (
        "counter",
        [op("a", 0, 9, "increment", "a1", to=2), op("a", 0, 9, "increment", "a2", to=1)],
    ),
    "an increment called not done counted": (
        "counter",
        [
            op("a", 0, 1, "increment", "a1", end=NOT_DONE),
            op("a", 2, 3, "increment", "a2", to=2),
        ],
    ),
    "the counter fell back": (
        "counter",
        [
            op("a", 0, 1, "increment", "a1", to=1),
            op("a", 2, 3, "increment", "a2", to=2),
            op("a", 4, 5, "increment", "a3", to=2),
        ],
    ),
    "lost append": (
        "list",
        [op("a", 0, 1, "append", "x", to=1), op("b", 2, 3, "read", to=())],
    ),
    "duplicate append": (
        "list",
        [op("a", 0, 1, "append", "x", to=1), op("b", 2, 3, "read", to=("x", "x"))],
    ),
    "reordered: two reads disagree on the order": (
        "list",
        [
            op("a", 0, 9, "append", "x", end=UNKNOWN),
            op("b", 0, 9, "append", "y", end=UNKNOWN),
            op("c", 10, 11, "read", to=("x", "y")),
            op("c", 12, 13, "read", to=("y", "x")),
        ],
    ),
    "reordered: appends against real time": (
        "list",
        [
            op("a", 0, 1, "append", "x", to=1),
            op("b", 2, 3, "append", "y", to=2),
            op("c", 4, 5, "read", to=("y", "x")),
        ],
    ),
    "an append appeared between two that were neighbours": (
        "list",
        [
            op("a", 0, 1, "append", "x", to=1),
            op("b", 2, 3, "append", "y", end=UNKNOWN),
            op("a", 4, 5, "append", "z", to=2),
            op("c", 6, 7, "read", to=("x", "y", "z")),
        ],
    ),
    "lost element": (
        "set",
        [op("a", 0, 1, "add", "x"), op("b", 2, 3, "read", to=frozenset())],
    ),
    "resurrected element: seen, gone, seen": (
        "set",
        [
            op("a", 0, 1, "add", "x", end=UNKNOWN),
            op("b", 2, 3, "read", to=frozenset("x")),
            op("b", 4, 5, "read", to=frozenset()),
        ],
    ),
    "element whose add was called not done": (
        "set",
        [op("a", 0, 1, "add", "x", end=NOT_DONE), op("b", 2, 3, "read", to=frozenset("x"))],
    ),
}

GOOD: dict[str, tuple[str, list[Operation]]] = {
    "nothing happened": ("register", []),
    "only things of unknown outcome": (
        "register",
        [op("a", 0, 1, "write", 1, end=UNKNOWN), op("b", 0, 1, "cas", 5, 6, end=UNKNOWN)],
    ),
    "a read during a write may see either": (
        "register",
        [
            op("a", 0, 9, "write", 1),
            op("b", 1, 2, "read", to=0),
            op("c", 3, 4, "read", to=1),
        ],
    ),
    "a write of unknown outcome takes effect long after it was given up": (
        "register",
        [
            op("a", 0, 1, "write", 1, end=UNKNOWN),
            op("b", 2, 3, "read", to=0),
            op("b", 4, 5, "read", to=1),
        ],
    ),
    "a write of unknown outcome never takes effect": (
        "register",
        [op("a", 0, 1, "write", 1, end=UNKNOWN), op("b", 2, 3, "read", to=0)],
    ),
    "the effect needed comes from the second of two lanes": (
        "register",
        [
            op("a", 0, 1, "write", 1, end=UNKNOWN),
            op("b", 0, 1, "write", 2, end=UNKNOWN),
            op("c", 2, 3, "cas", 2, 3, to=True),
            op("c", 4, 5, "read", to=1),
        ],
    ),
    "a chain of compare-and-swaps that returned the other way round": (
        "register",
        [
            op("a", 0, 9, "cas", 2, 3, to=True),
            op("b", 0, 8, "cas", 1, 2, to=True),
            op("c", 0, 7, "cas", 0, 1, to=True),
        ],
    ),
    "a failed compare-and-swap between two writes": (
        "register",
        [
            op("a", 0, 9, "write", 1),
            op("b", 0, 9, "cas", 0, 5, to=False),
            op("c", 0, 9, "write", 0),
            op("d", 10, 11, "read", to=0),
        ],
    ),
    "begun at the instant of a return": (
        "register",
        [op("a", 0, 5, "write", 1), op("b", 5, 6, "read", to=0)],
    ),
    "done, its result unseen": (
        "counter",
        [op("a", 0, 1, "increment", "a1", to=UNSEEN), op("b", 2, 3, "read", to=1)],
    ),
    "increments of unknown outcome: one of two took effect": (
        "counter",
        [
            op("a", 0, 1, "increment", "a1", end=UNKNOWN),
            op("b", 0, 1, "increment", "b1", end=UNKNOWN),
            op("c", 2, 3, "increment", "c1", to=2),
        ],
    ),
    "many under way in one lane, answered in another order": (
        "counter",
        [op("a", 0, 9 - n, "increment", f"a{n}", to=n + 1) for n in range(5)],
    ),
    "a call that was not done leaves no gap": (
        "counter",
        [
            op("a", 0, 1, "increment", "a1", end=NOT_DONE),
            op("a", 2, 3, "increment", "a2", to=1),
        ],
    ),
    "appends of unknown outcome before later ones of other lanes": (
        "list",
        [
            op("a", 0, 1, "append", "x", end=UNKNOWN),
            op("b", 2, 9, "append", "y", to=2),
            op("c", 10, 11, "read", to=("x", "y")),
        ],
    ),
    "adds commute": (
        "set",
        [
            *(op(f"c{n}", 0, 9, "add", n) for n in range(9)),
            op("r", 10, 11, "read", to=frozenset(range(9))),
        ],
    ),
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_history_is_rejected(why: str):
    model, history = BAD[why]

    verdict = check(MODELS[model], history)

    assert not verdict
    assert "cannot" in verdict.story
    assert not brute_force(MODELS[model], history)


@pytest.mark.parametrize("why", GOOD)
def test_a_good_history_is_accepted(why: str):
    model, history = GOOD[why]

    assert check(MODELS[model], history)
    assert len(history) > 6 or brute_force(MODELS[model], history)


def test_the_order_of_a_lane_counts_only_where_it_was_promised():
    _, history = BAD["a write was overtaken by a later one of its own lane"]

    assert check(Register(), history, in_order=False)


def test_the_story_names_what_nothing_explains():
    history = [op("a", 0, 1, "write", 1), op("b", 2, 3, "read", to=0)]

    assert check(Register(), history).story == (
        "1 of 2 results can be explained, up to the state 1; what comes next cannot:\n"
        "  [2..3] b: read() -> 0"
    )


def test_a_search_that_takes_too_long_says_so_and_accepts_nothing():
    history = [op(f"c{n}", 0, 9, "write", n) for n in range(12)] + [op("r", 10, 11, "read", to=99)]

    with pytest.raises(Undecided):
        check(Register(), history, steps_max=1_000)


# Beside a checker that tries every order.


def brute_force(model: Model, history: list[Operation], in_order: bool = True) -> bool:
    """Whether some order of all that returned and some of the unknown explains the results."""
    returned = [n for n, o in enumerate(history) if o.end is End.RETURNED]
    unknown = [n for n, o in enumerate(history) if o.end is End.UNKNOWN]
    for size in range(len(unknown) + 1):
        for some in itertools.combinations(unknown, size):
            for order in itertools.permutations([*returned, *some]):
                if explains(model, history, order, in_order):
                    return True
    return False


def explains(
    model: Model, history: list[Operation], order: tuple[int, ...], in_order: bool
) -> bool:
    for i, n in enumerate(order):
        for m in order[i + 1 :]:
            first, second = history[n], history[m]
            if second.end is End.RETURNED and second.ended_ns < first.begun_ns:
                return False
            if in_order and first.lane == second.lane and m < n:
                return False
    state: Any = model.initial
    for n in order:
        state, result = model.apply(state, history[n].call)
        seen = history[n].result
        if history[n].end is End.RETURNED and seen is not UNSEEN and result != seen:
            return False
    return True


def calls(rng: random.Random, model: str) -> Iterator[tuple[Any, ...]]:
    for n in itertools.count():
        match model, rng.randrange(3):
            case "register", 0:
                yield ("write", rng.randrange(3))
            case "register", 1:
                yield ("cas", rng.randrange(3), rng.randrange(3))
            case "counter", 0 | 1:
                yield ("increment", n)
            case "list", 0 | 1:
                yield ("append", n)
            case "set", 0 | 1:
                yield ("add", n)
            case _:
                yield ("read",)


def small_history(rng: random.Random, name: str) -> list[Operation]:
    """A history as a server could have given, in half of the cases with a mistake in it."""
    model = MODELS[name]
    drawn = calls(rng, name)
    count = rng.randint(1, 6)
    lanes = [f"c{rng.randrange(3)}" for _ in range(count)]
    begun = sorted(rng.randrange(12) for _ in range(count))
    ended = [b + rng.randrange(8) for b in begun]
    ends = rng.choices([End.RETURNED, UNKNOWN, NOT_DONE], [6, 3, 1], k=count)
    made = [next(drawn) for _ in range(count)]
    # Executed at some instant of each one's own; late, or never, if its outcome is unknown.
    at = []
    for n in range(count):
        late = rng.choice([0, 0, 9])
        at.append(rng.uniform(begun[n], ended[n] + (late if ends[n] is UNKNOWN else 0)))
    results: dict[int, Any] = {}
    state: Any = model.initial
    for n in sorted(range(count), key=lambda n: at[n]):
        if ends[n] is NOT_DONE or (ends[n] is UNKNOWN and rng.random() < 0.4):
            continue
        state, results[n] = model.apply(state, made[n])
        if rng.random() < 0.05:
            state, _ = model.apply(state, made[n])  # done twice
    if rng.random() < 0.3:
        n = rng.randrange(count)
        results[n] = rng.choice([None, True, False, 0, 1, 2, (), (0,), (1, 0), frozenset()])
    return [
        Operation(lanes[n], made[n], begun[n], ended[n], ends[n], results.get(n))
        for n in range(count)
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("in_order", [True, False])
def test_it_agrees_with_brute_force_on_random_histories(name: str, in_order: bool):
    rng = random.Random(f"{name} {in_order}")
    found = {True: 0, False: 0}
    for _ in range(1_500):
        history = small_history(rng, name)

        verdict = check(MODELS[name], history, in_order=in_order)

        assert verdict.ok == brute_force(MODELS[name], history, in_order), "\n".join(
            map(str, history)
        )
        found[verdict.ok] += 1
    # Both kinds have to be there, or nothing was compared.
    assert min(found.values()) > 150, found


def long_history(rng: random.Random, name: str, count: int, overlap: int) -> list[Operation]:
    """A history of a server that made no mistake, with about so many calls under way."""
    model = MODELS[name]
    drawn = calls(rng, name)
    state: Any = model.initial
    history = []
    for n in range(count):
        call = next(drawn)
        end = UNKNOWN if rng.random() < 0.02 else End.RETURNED
        result = None
        if end is End.RETURNED or rng.random() < 0.5:
            state, result = model.apply(state, call)
        at = 100 * n
        history.append(
            Operation(
                f"c{rng.randrange(8)}",
                call,
                at - rng.randrange(100 * overlap),
                at + rng.randrange(100 * overlap),
                end,
                result,
            )
        )
    return history


@pytest.mark.parametrize("name", MODELS)
def test_thousands_of_operations_take_few_steps_each(name: str):
    history = long_history(random.Random(name), name, 3_000, overlap=9)

    begun = time.process_time()
    verdict = check(MODELS[name], history)

    assert verdict
    assert verdict.taken < 20 * len(history)
    print(f"{name}: {verdict.taken} steps in {time.process_time() - begun:.2f} s")


@pytest.mark.parametrize("name", MODELS)
def test_one_wrong_result_near_the_end_of_many_is_found(name: str):
    history = long_history(random.Random(name), name, 300, overlap=3)
    reads = [n for n, o in enumerate(history) if o.call == ("read",) and o.end is End.RETURNED]
    right = history[reads[-3]]
    wrong = history[reads[-3]] = dataclasses.replace(right, result="wrong")

    verdict = check(MODELS[name], history)

    assert not verdict
    assert str(wrong) in verdict.story
    print(f"{name}: {verdict.taken} steps")


# The account of unique elements.


@pytest.mark.parametrize(
    ("final", "complaint"),
    [
        (["a1", "a2", "b1"], None),
        (["b1", "a1", "a2"], None),
        (["a1", "a2", "b1", "b2"], None),
        (["a1", "b1"], "acknowledged and lost"),
        (["a1", "a2", "b1", "a2"], "done twice: a2"),
        (["a2", "a1", "b1"], "done before an earlier one"),
        (["a1", "a2", "b1", "a3"], "called not done, and done"),
        (["a1", "a2", "b1", "z"], "never asked for"),
    ],
)
def test_the_account_finds_what_is_lost_repeated_or_reordered(
    final: list[str], complaint: str | None
):
    history = [
        op("a", 0, 1, "append", "a1", to=1),
        op("a", 2, 3, "append", "a2", to=2),
        op("a", 4, 5, "append", "a3", end=NOT_DONE),
        op("b", 0, 1, "append", "b1", to=3),
        op("b", 2, 3, "append", "b2", end=UNKNOWN),
        op("b", 4, 5, "read", to=()),
    ]

    found = account(history, final)

    assert (found == []) if complaint is None else (complaint in found[0])
