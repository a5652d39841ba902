"""Histories of real runs hold what is promised; with a mechanism switched off they do not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import migrate
from migrate.core.actions import Point
from migrate.ref import RefObject
from tests.cluster import workloads
from tests.cluster.histories import (
    Made,
    Plan,
    Report,
    Run,
    Subject,
    arm,
    came_to,
    ended_or_stopped,
    epochs,
    options_of,
    recorded,
    wrong_end,
    wrong_with,
)
from tests.cluster.linearizable import End
from tests.migrate.clusters import run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster_secret")]


def go(plan: Plan) -> Report:
    return run(recorded(plan), bound_s=300.0)


@pytest.mark.parametrize("kind", ["unix", "grpc"])
def test_histories_are_linearizable_and_nothing_is_lost_repeated_or_reordered(
    kind: str, capsys: pytest.CaptureFixture[str]
):
    plan = Plan(
        7,
        seconds=5.0,
        same_host=kind == "unix",
        lease_s=1.0,
        faults=("kill", "stop", "cut", "cut frame"),
    )

    report = go(plan)

    with capsys.disabled():
        print(f"\n{report.line()}")
    assert report.violations == [], "\n".join(report.history())
    for what in ("operations", "moves", "kills", "pauses", "cuts"):
        assert report.counts[what], f"no {what}"


# Failing controls.


@pytest.mark.parametrize(
    ("switched_off", "faults", "account"),
    [
        # What sleeps in a node is repeated meanwhile, and what was cut is sent again.
        ("records", ("stop", "cut", "cut frame"), {"done twice"}),
        # What is large, or goes another way, comes later; a cast overtaken for good is lost.
        ("order", ("stop", "cut"), {"done before an earlier one", "acknowledged and lost"}),
    ],
)
def test_control_without_completion_records_or_order_histories_are_bad(
    switched_off: str, faults: tuple[str, ...], account: set[str]
):
    found = ""
    for seed in range(3):
        plan = Plan(seed, seconds=3.0, clients=4, faults=faults, switched_off=switched_off)
        found += "\n".join(go(plan).violations)
        if "not linearizable" in found and any(text in found for text in account):
            return
    pytest.fail(f"three runs without {switched_off} were not found bad: {found}")


@pytest.mark.parametrize("switched_off", ["", "held"])
def test_control_a_target_that_lets_replies_out_at_once_loses_what_it_acknowledged(
    switched_off: str,
):
    """Its word that it lives is lost, and it dies when it has answered one call.

    The source sleeps from the commit on, and so does the target when it has become live, until
    the connection between them is cut.
    """
    plan = Plan(3, switched_off=switched_off)
    options = options_of(plan)

    async def body() -> list[str]:
        async with migrate.LocalCluster(
            ["by", "source", "target"], options=options, env={"LIVEMIGRATE_FAILPOINTS": ""}
        ) as cluster:
            client: Any = cluster.client
            scene = Run(plan, cluster)
            for name in scene.alive:
                await scene.switch_off(name)
            on_source = migrate.SpawnOptions(on="source")
            ref = await client.spawn(workloads.Counter, options=on_source)
            subject = Subject("counter", ref, False)
            await scene.make(client, "c", subject, ("increment", "c#1"))
            source, target = cluster.node("source"), cluster.node("target")
            # One that has heard where the server is going.
            by = cluster.node("by").address
            async with migrate.connect(
                by, options=options, secret_file=cluster.secret_file
            ) as late:
                there = await late._node_named("target")
                await arm(client, "source", f"{Point.ACTIVATE_SENT.value}=stop")
                points = f"{Point.ACTIVATED.value}=stop,{Point.REPLY_SENT.value}=kill"
                await arm(client, "target", points)
                moving = asyncio.create_task(client.migrate(ref, to="target"))
                for node in (source, target):
                    assert await came_to(lambda n=node: ended_or_stopped(n) == "stopped", 20.0)
                scene.cut(target)
                target.wake()
                told = Subject(
                    "counter", RefObject(ref._server_id, ref._info, None, there, 2), False
                )
                told.made = subject.made
                answered = scene.make(late, "late", told, ("increment", "late#1"))
                await target.wait()
                source.wake()
                await asyncio.wait([answered, moving])
                moving.exception()
                if switched_off:
                    assert subject.made[-1].origin[0] == "target"
                await scene.make(client, "c", subject, ("increment", "c#2"))
                await asyncio.wait([asyncio.ensure_future(scene.take_final(subject))])
            assert all(made.end is not None for made in subject.made)
            return list(wrong_with(subject, kills=1))

    found = run(body())

    if switched_off:
        assert any("not linearizable" in text for text in found), found
        assert any("acknowledged and lost" in text for text in found), found
    else:
        assert found == []


# The judgement of what the checker of orders does not see.


def made(begun: int, ended: int, end: End | None = End.RETURNED, **more: Any) -> Made:
    call = Made("c", ("read",), begun, more.pop("hurried", False), more.pop("relay", None))
    call.ended_ns, call.end = ended, end
    for name, value in more.items():
        setattr(call, name, value)
    return call


def subject(*calls: Made, lost_ns: int = 0) -> Subject:
    return Subject("register", None, False, list(calls), lost_ns)


def test_two_nodes_that_answer_for_one_epoch_are_found():
    both = [made(0, 1, origin=("a", 3)), made(2, 3, origin=("b", 3))]

    assert "a answered" in next(epochs(subject(*both))) or "b and a" in next(epochs(subject(*both)))
    both[1].origin = ("b", 4)
    assert list(epochs(subject(*both))) == []


def test_an_epoch_that_comes_after_a_later_one_is_found():
    first, second = made(0, 1, origin=("a", 4)), made(2, 3, origin=("b", 3))

    assert "epoch 3 after 4" in next(epochs(subject(first, second)))
    second.begun_ns = 1  # under way at the same time
    assert list(epochs(subject(first, second))) == []


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (made(0, 1), None),
        (made(0, 0, None), "never ended"),
        (made(0, 1, End.UNKNOWN, error=migrate.CallTimeout("late")), "without a reason"),
        (made(0, 1, End.UNKNOWN, error=migrate.CallTimeout("late"), hurried=True), None),
        (made(0, 1, End.UNKNOWN, error=ValueError("bug")), "ended in ValueError"),
        (made(0, 60_000_000_000), "took 60.0 s"),
    ],
)
def test_calls_that_end_as_they_must_not_are_found(call: Made, complaint: str | None):
    found = list(wrong_end(call, subject(call)))

    assert (found == []) if complaint is None else (complaint in found[0])


def test_a_server_that_answers_after_it_was_lost_is_found():
    call = made(10, 11)

    assert "after it was lost" in next(wrong_end(call, subject(call, lost_ns=5)))
    assert list(wrong_end(call, subject(call, lost_ns=20))) == []
