"""A counter moves hundreds of times while callers never let up: nothing is lost or done twice."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest

import migrate
from migrate.core.incarnation import Incarnation
from migrate.core.messages import CALL, Envelope
from migrate.core.node import Core
from tests.cluster.fire import Fire, under_fire
from tests.migrate.clusters import QUICK, break_links, nodes, run
from tests.migrate.servers import Counter

pytestmark = pytest.mark.usefixtures("cluster_secret")

CALLERS = 8


async def fire_at_processes(moves: int) -> Fire:
    """Half of the moves between two processes, half around three."""
    async with (
        migrate.LocalCluster(nodes=["a", "b"]) as cluster,
        contextlib.AsyncExitStack() as stack,
    ):
        client = cluster.client
        ref = await client.spawn(Counter, options=migrate.SpawnOptions(on="a"))
        refs = []
        for n in range(CALLERS):
            caller = migrate.connect(
                cluster.nodes[n % 2].address, secret_file=cluster.secret_file, name=f"caller{n}"
            )
            await stack.enter_async_context(caller)
            refs.append(await _same(caller, ref))
        done = 0
        third = itertools.cycle(["c", "a", "b"])

        async def move() -> migrate.MoveReport:
            nonlocal done
            if done == moves // 2:
                await cluster.add_node("c")
            if done < moves // 2:
                to = "b" if done % 2 == 0 else "a"
            else:
                to = next(third)
                if to == (await client.info(ref)).node:
                    to = next(third)
            done += 1
            report: migrate.MoveReport = await client.migrate(ref, to=to)
            assert report.target == to
            return report

        fire = await under_fire(refs, move, moves=moves)
    assert [r.epoch for r in fire.reports] == list(range(2, moves + 2))
    return fire


async def _same(caller: Any, ref: Any) -> Any:
    """The ref as that caller would have got it."""
    return ref._bound_to(caller._driver)


@pytest.mark.cluster
def test_s47_calls_from_eight_clients_all_return_once_and_in_order_over_many_moves(
    campaign: bool, capsys: pytest.CaptureFixture[str]
):
    moves = 500 if campaign else 100
    fire = run(fire_at_processes(moves), bound_s=600.0)

    with capsys.disabled():
        print(f"\n{fire.figures()}")
    assert fire.violations() == []
    assert fire.failed_calls == 0
    assert len(fire.reports) == moves
    assert min(len(c.values) for c in fire.calls) > moves // 10, "callers were starved"


# The same inside one process, where a test can take a mechanism away.

CONTROL = QUICK.replace(call_timeout_s=4.0)


async def fire_in_process(moves: int, *, cut: bool = False, callers: int = CALLERS) -> Fire:
    async with (
        nodes("a", "b", "c", options=CONTROL) as (a, b, c),
        contextlib.AsyncExitStack() as stack,
    ):
        ref = await a.spawn(Counter)
        clients = [
            await stack.enter_async_context(migrate.connect(node.address, options=CONTROL))
            for node in itertools.islice(itertools.cycle((a, b, c)), callers)
        ]
        to = itertools.cycle(["b", "c", "a"])

        async def move() -> migrate.MoveReport:
            return await a.migrate(ref, to=next(to))

        def disturb(n: int) -> None:
            if cut:
                assert break_links(clients[n % callers]) > 0

        refs = [await _same(client, ref) for client in clients]
        return await under_fire(
            refs, move, moves=moves, in_flight=8, call_between=True, disturb=disturb
        )


def test_all_calls_return_once_and_in_order_inside_one_process():
    fire = run(fire_in_process(moves=30))

    assert fire.violations() == []
    assert len(fire.reports) == 30


def test_connections_that_break_in_the_middle_of_calls_lose_and_repeat_nothing():
    fire = run(fire_in_process(moves=20, cut=True))

    assert fire.violations() == []
    assert len(fire.reports) == 20


def test_control_without_forwarding_and_repeats_calls_are_lost(monkeypatch: pytest.MonkeyPatch):
    def drop(self: Core, env: Envelope, node: str, epoch: int) -> None:
        """A late envelope vanishes."""

    monkeypatch.setattr(Core, "_forward", drop)
    monkeypatch.setattr(Core, "_repeat", lambda self, session, now_ms: None)

    fire = run(fire_in_process(moves=30))

    assert fire.failed_calls > 0
    assert any("failed: CallTimeout" in violation for violation in fire.violations())


def test_control_without_completion_records_a_broken_connection_executes_calls_twice(
    monkeypatch: pytest.MonkeyPatch,
):
    arrive = Core._arrive

    def without_records(self: Core, inc: Incarnation, env: Envelope, now_ms: int) -> None:
        """A repeat of a call is taken for a new one."""
        session = inc.sessions.get(env.session)
        if session is not None and env.seq < session.expected and env.kind == CALL:
            session.pending += 1
            inc.mailbox.append(self._entry(session, env, now_ms))
            self._pump(inc, now_ms)
            return
        arrive(self, inc, env, now_ms)

    monkeypatch.setattr(Core, "_arrive", without_records)

    fire = run(fire_in_process(moves=20, cut=True))

    assert fire.final is not None and fire.final > fire.count + fire.failed_calls
    assert any("were executed" in violation for violation in fire.violations())
