"""Moves between nodes of one process: what is refused and why, and what travels along."""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
import random
import sys
import textwrap
import threading
import time
from typing import Any

import pytest

import migrate
from tests.migrate.clusters import QUICK, eventually, failure_of, linked, nodes, run, until
from tests.migrate.servers import Busy, Counter, Gate, Large, Ticker, Unpicklable, Where

pytestmark = pytest.mark.usefixtures("cluster_secret")


def check_refused(error: migrate.MoveError, kind: type[migrate.MoveError]) -> None:
    """The error of a move that left everything as it was."""
    assert type(error) is kind
    assert error.outcome is migrate.Outcome.NOT_DONE
    assert error.source == "a"
    assert error.server


# ---------------------------------------------------------------- refused, and served on


def test_s06_state_that_cannot_be_pickled_is_named_by_its_path_and_the_server_serves_on():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Unpicklable)
            await ref.incr()
            error = await failure_of(a.migrate(ref, to="b"))
            check_refused(error, migrate.NotPicklable)
            assert error.path == "Unpicklable.deep['frames'][1]"
            assert error.path in str(error)
            assert "generator" in str(error)
            assert len(error.problems) == 1 and error.problems[0].startswith(error.path)
            assert await ref.incr() == 2
            assert (await a.info(ref)).node == "a"
            await ref.mend()
            assert (await a.migrate(ref, to="b")).target == "b"
            assert await ref.incr() == 3

    run(body())


class ReducesBadly:
    def __init__(self) -> None:
        self.n = 0

    def incr(self) -> int:
        self.n += 1
        return self.n

    def __getstate__(self) -> Any:
        raise RuntimeError("not today")


def test_s06_state_whose_getstate_raises_stays_with_the_cause_told():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(ReducesBadly)
            error = await failure_of(a.migrate(ref, to="b"))
            check_refused(error, migrate.NotPicklable)
            assert "not today" in str(error)
            assert await ref.incr() == 1

    run(body())


class LoadsBadly:
    def __init__(self) -> None:
        self.n = 0
        self.stays = 0

    def incr(self) -> int:
        self.n += 1
        return self.n

    def stayed(self) -> int:
        return self.stays

    def on_depart(self) -> None:
        pass

    def on_stay(self) -> None:
        self.stays += 1

    def __setstate__(self, state: Any) -> None:
        raise ValueError("wrong shape")


def test_s07_state_that_cannot_be_loaded_at_the_target_goes_on_at_the_source():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(LoadsBadly)
            await ref.incr()
            error = await failure_of(a.migrate(ref, to="b"))
            check_refused(error, migrate.MoveRolledBack)
            assert "ValueError" in str(error) and "wrong shape" in str(error)
            assert error.target == "b"
            assert await ref.incr() == 2
            assert await ref.stayed() == 1
            assert (await a.info(ref)).node == "a"
            assert b._driver.core.hosted == {} and b._driver.core.copies == {}

    run(body())


def test_a_handler_that_outlasts_the_quiesce_rolls_the_move_back_and_is_not_disturbed():
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(quiesce_timeout_s=0.1)) as (a, _):
            Gate.events["long"] = asyncio.Event()
            ref = await a.spawn(Gate, "long")
            call = ref.pass_through()
            error = await failure_of(a.migrate(ref, to="b"))
            check_refused(error, migrate.MoveRolledBack)
            assert "quiesce" in str(error) and "0.1 s" in str(error)
            queued = ref.count()
            Gate.events["long"].set()
            assert await call == 1
            assert await queued == 1
            assert (await a.migrate(ref, to="b")).target == "b"

    run(body())


def test_a_server_tells_how_far_it_is_on_its_way():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            Gate.events["way"] = asyncio.Event()
            ref = await a.spawn(Gate, "way")
            assert (await a.info(ref)).moving is None
            passing = asyncio.ensure_future(ref.pass_through())
            await until(lambda: next(iter(a._driver.core.hosted.values())).running)
            moving = asyncio.ensure_future(a.migrate(ref, to="b"))
            await until(
                lambda: next(iter(a._driver.core.hosted.values())).phase.name == "QUIESCING"
            )
            progress = (await b.info(ref)).moving
            assert progress is not None
            assert (progress.target, progress.step) == ("b", "quiescing")
            assert (progress.rounds, progress.bytes_sent) == (0, 0) and progress.seconds > 0
            Gate.events["way"].set()
            await moving
            await passing
            info = await a.info(ref)
            assert (info.node, info.moving) == ("b", None)

    run(body())


def test_s39_a_second_move_while_one_is_under_way_is_refused_and_the_first_goes_on():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, _):
            Gate.events["two"] = asyncio.Event()
            ref = await a.spawn(Gate, "two")
            call = ref.pass_through()
            first = asyncio.create_task(a.migrate(ref, to="b"))
            await until(lambda: bool(a._driver.core.leaving))
            error = await failure_of(b.migrate(ref, to="c"))
            check_refused(error, migrate.MoveError)
            assert "under way" in str(error)
            stopped = await failure_of(a.stop(ref))
            assert "moving" in str(stopped)
            Gate.events["two"].set()
            assert (await first).target == "b"
            assert await call == 1
            assert await ref.count() == 1

    run(body())


def test_a_move_to_where_it_is_says_so():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter)
            for node in (a, b):
                error = await failure_of(node.migrate(ref, to="a"))
                check_refused(error, migrate.TargetRefused)
                assert "already" in str(error)
            assert await ref.incr() == 1

    run(body())


def test_a_move_to_an_unknown_node_names_those_there_are():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Counter)
            error = await failure_of(a.migrate(ref, to="nowhere"), migrate.NodeNotFound)
            assert "nowhere" in str(error) and "a, b" in str(error)
            assert error.node == "nowhere"
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert await ref.incr() == 1

    run(body())


def test_a_move_to_a_node_that_has_left_is_refused():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            async with migrate.Node(name="b", directory=a._directory, options=QUICK) as b:
                gone = b.id
            error = await failure_of(a.migrate(ref, to="b"), migrate.NodeNotFound)
            assert error.node == "b"
            error = await failure_of(a._asks.ask(a.id, "move", ref._server_id, gone))
            assert isinstance(error, migrate.NodeNotFound)
            assert await ref.incr() == 1

    run(body())


def test_a_cordoned_target_refuses_and_takes_servers_again_afterwards():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter)
            await a.cordon("b")
            assert (await b.nodes())[1].cordoned
            error = await failure_of(a.migrate(ref, to="b"))
            check_refused(error, migrate.TargetRefused)
            assert error.target == "b" and "cordoned" in str(error)
            assert isinstance(
                await failure_of(a.spawn(Counter, options=migrate.SpawnOptions(on="b"))),
                migrate.TargetRefused,
            )
            assert await ref.incr() == 1
            await a.cordon("b", False)
            assert (await a.migrate(ref, to="b")).target == "b"

    run(body())


def test_a_target_that_is_closing_refuses_and_the_server_serves_on():
    async def body() -> None:
        async with nodes("a") as (a,):
            ref = await a.spawn(Counter)
            b = migrate.Node(name="b", directory=a._directory, options=QUICK)
            await b.start()
            Gate.events["closing"] = asyncio.Event()
            slow = await b.spawn(Gate, "closing")
            call = slow.pass_through()
            await until(lambda: any(i.running for i in b._driver.core.hosted.values()))
            closing = asyncio.create_task(b.close())
            await until(lambda: bool(b._driver.core.refuse_moves))
            error = await failure_of(a.migrate(ref, to="b"))
            check_refused(error, migrate.TargetRefused)
            assert "closing" in str(error)
            Gate.events["closing"].set()
            await closing
            assert await call == 1
            assert await ref.incr() == 1

    run(body())


def test_a_full_target_refuses():
    async def body() -> None:
        async with nodes("a", "b", b=QUICK.replace(servers_max=1)) as (a, b):
            await b.spawn(Counter)
            ref = await a.spawn(Counter)
            error = await failure_of(a.migrate(ref, to="b"))
            check_refused(error, migrate.TargetRefused)
            assert "limit of 1 servers" in str(error)
            assert await ref.incr() == 1

    run(body())


def test_a_state_over_the_targets_limit_is_refused_and_serves_on():
    async def body() -> None:
        small = QUICK.replace(state_bytes_max=1 << 20)
        async with nodes("a", "b", b=small) as (a, _):
            ref = await a.spawn(Large, 2 << 20)
            error = await failure_of(a.migrate(ref, to="b"), migrate.MoveError)
            assert error.outcome is migrate.Outcome.NOT_DONE
            assert "1048576" in str(error)
            assert await ref.incr() == 1

    run(body())


@migrate.server(movable=False)
class Pinned:
    def incr(self) -> int:
        return 1


def test_a_pinned_server_stays():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Pinned)
            error = await failure_of(a.migrate(ref, to="b"))
            check_refused(error, migrate.MoveError)
            assert "movable=False" in str(error)
            assert await ref.incr() == 1

    run(body())


def test_a_stopped_server_cannot_be_moved():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Counter)
            await a.stop(ref)
            for node in (a, b):
                await failure_of(node.migrate(ref, to="b"), migrate.ServerNotFound)

    run(body())


@pytest.mark.parametrize("not_a_ref", [None, "counter", Counter, Counter(), 3])
def test_a_move_of_something_that_is_no_ref_is_a_usage_error(not_a_ref: Any):
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            error = await failure_of(a.migrate(not_a_ref, to="b"), migrate.UsageError)
            assert "ref" in str(error)

    run(body())


# ---------------------------------------------------------------- other releases


@pytest.fixture
def releases(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Folders with the same module in version 1, in version 2, and one without it."""
    text = """
        import migrate

        @migrate.server(version={version})
        class Account:
            def __init__(self):
                {init}

            def deposit(self, cents):
                {deposit}
                return {balance}

            {more}
    """
    upgrade = "def upgrade(self, state, from_version):\n                {body}"
    good = 'return {"cents": state["euros"] * 100, "from": from_version}'
    bad = 'raise RuntimeError("unknown schema")'
    variants = {
        "v1": (1, "self.euros = 0", "self.euros += cents // 100", "self.euros", ""),
        "v2": (2, "self.cents = 0", "self.cents += cents", "self.cents", good),
        "v2bad": (2, "self.cents = 0", "self.cents += cents", "self.cents", bad),
    }
    folders = {"none": ""}
    for name, (version, init, deposit, balance, body) in variants.items():
        folder = tmp_path / name
        folder.mkdir()
        more = upgrade.format(body=body) if body else ""
        source = textwrap.dedent(
            text.format(version=version, init=init, deposit=deposit, balance=balance, more=more)
        )
        (folder / "rolling_release.py").write_text(source)
        folders[name] = str(folder)
    monkeypatch.delitem(sys.modules, "rolling_release", raising=False)
    return folders


async def moved_between(releases: dict[str, str], source: str, target: str) -> Any:
    """An account that was opened under one release and moved to the other: (outcome, next)."""

    def with_release(name: str) -> dict[str, str]:
        return {"PYTHONPATH": os.pathsep.join([releases[name], *sys.path])}

    async with migrate.LocalCluster(nodes=["by"]) as cluster:
        sys.path.insert(0, releases[source])
        try:
            import rolling_release  # type: ignore[import-not-found]

            await cluster.add_node("source")
            sys.path[0] = releases[target] or releases[source]
            if not releases[target]:
                del sys.path[0]
            await cluster.add_node("target")
            if not releases[target]:
                sys.path.insert(0, releases[source])
            account = await cluster.client.spawn(
                rolling_release.Account, options=migrate.SpawnOptions(on="source")
            )
            await account.deposit(300)
            outcome: Any
            try:
                outcome = await cluster.client.migrate(account, to="target")
            except migrate.MigrateError as error:
                outcome = error
            return outcome, await account.deposit(200), await cluster.client.info(account)
        finally:
            del sys.path[0]
            sys.modules.pop("rolling_release", None)


@pytest.mark.cluster
def test_s36_a_target_without_the_class_refuses_and_the_server_serves_on(
    releases: dict[str, str],
):
    error, balance, info = run(moved_between(releases, "v1", "none"))

    assert isinstance(error, migrate.TargetRefused)
    assert "rolling_release" in str(error) and "ModuleNotFoundError" in str(error)
    assert (balance, info.node, info.version) == (5, "source", 1)


@pytest.mark.cluster
def test_s36_a_target_with_an_older_version_refuses_and_the_server_serves_on(
    releases: dict[str, str],
):
    error, balance, info = run(moved_between(releases, "v2", "v1"))

    assert isinstance(error, migrate.TargetRefused)
    assert "version 1" in str(error) and "version 2" in str(error)
    assert (balance, info.node, info.version) == (500, "source", 2)


@pytest.mark.cluster
def test_a_target_with_a_newer_version_upgrades_the_state(releases: dict[str, str]):
    report, balance, info = run(moved_between(releases, "v1", "v2"))

    assert report.target == "target"
    assert (balance, info.node, info.version) == (500, "target", 2)


@pytest.mark.cluster
@pytest.mark.parametrize("target", ["v2", "v2bad", "v1"])
def test_a_standby_with_a_newer_version_upgrades_the_state_when_it_takes_over(
    releases: dict[str, str], target: str
):
    async def body() -> None:
        async with migrate.LocalCluster(nodes=["by"]) as cluster:
            client = cluster.client
            sys.path.insert(0, releases["v1"])
            try:
                import rolling_release

                await cluster.add_node("source")
                sys.path[0] = releases[target]
                await cluster.add_node("target")
                account = await client.spawn(
                    rolling_release.Account, options=migrate.SpawnOptions(on="source")
                )
                await account.deposit(300)
                replicating = client.replicate(account, ["target"])
                if target == "v2bad":
                    error = await failure_of(replicating, migrate.StandbyError)
                    assert "unknown schema" in str(error)
                    assert await account.deposit(200) == 5
                    return
                assert (await replicating).standbys == ("target",)
                await account.deposit(100)
                cluster.node("source").kill()
                balance = await account.deposit(200)
                info = await client.info(account)
                version = 2 if target == "v2" else 1
                assert (info.node, info.version) == ("target", version)
                assert balance == (600 if version == 2 else 6)
            finally:
                del sys.path[0]
                sys.modules.pop("rolling_release", None)

    run(body())


@pytest.mark.cluster
def test_an_upgrade_that_fails_leaves_the_server_at_the_older_version(releases: dict[str, str]):
    error, balance, info = run(moved_between(releases, "v1", "v2bad"))

    assert isinstance(error, migrate.MoveRolledBack)
    assert "unknown schema" in str(error)
    assert (balance, info.node, info.version) == (5, "source", 1)


@pytest.mark.cluster
def test_what_refers_to_the_server_itself_still_does_after_an_upgrade(
    releases: dict[str, str], tmp_path: pathlib.Path
):
    for name, text in (
        (
            "refers",
            """
            import migrate

            @migrate.server(version=1)
            class Account:
                def __init__(self):
                    self.euros = 0
                    self.callback = self.deposit

                def deposit(self, cents):
                    self.euros += cents // 100
                    return self.euros
            """,
        ),
        (
            "referred",
            """
            import migrate

            @migrate.server(version=2)
            class Account:
                def upgrade(self, state, from_version):
                    return {"cents": state["euros"] * 100, "callback": state["callback"]}

                def deposit(self, cents):
                    assert self.callback.__self__ is self
                    self.cents += cents
                    return self.cents
            """,
        ),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rolling_release.py").write_text(textwrap.dedent(text))
        releases[name] = str(folder)

    report, balance, _ = run(moved_between(releases, "refers", "referred"))

    assert (report.target, balance) == ("target", 500)


@pytest.mark.cluster
def test_a_class_that_was_moved_and_renamed_is_found_by_its_former_name(
    releases: dict[str, str], tmp_path: pathlib.Path
):
    folder = tmp_path / "renamed"
    folder.mkdir()
    (folder / "bank.py").write_text(
        textwrap.dedent(
            """
            import migrate

            @migrate.server(version=2, former_names=("rolling_release:Account",))
            class Vault:
                def upgrade(self, state, from_version):
                    return {"cents": state["euros"] * 100}

                def deposit(self, cents):
                    self.cents += cents
                    return self.cents
            """
        )
    )
    # What a node imports at its start, so that it knows the class by both names.
    (folder / "sitecustomize.py").write_text("import bank\n")
    releases["renamed"] = str(folder)

    report, balance, info = run(moved_between(releases, "v1", "renamed"))

    assert report.target == "target"
    assert (balance, info.node, info.version) == (500, "target", 2)


# ---------------------------------------------------------------- hooks


class Hooked:
    """Writes down which hooks ran where; fails or hangs in one of them."""

    def __init__(self, fails: str = "", hangs: str = "") -> None:
        self.fails = fails
        self.hangs = hangs
        self.log: list[str] = []

    async def _hook(self, name: str) -> None:
        self.log.append(f"{name}@{migrate.current().node}")
        if name == self.fails:
            raise RuntimeError(f"{name} failed")
        if name == self.hangs:
            await asyncio.Event().wait()

    async def on_start(self) -> None:
        await self._hook("on_start")

    async def on_depart(self) -> None:
        await self._hook("on_depart")

    async def on_stay(self) -> None:
        await self._hook("on_stay")

    async def on_arrive(self) -> None:
        await self._hook("on_arrive")

    async def on_stop(self) -> None:
        await self._hook("on_stop")
        stopped.append(list(self.log))

    def seen(self) -> list[str]:
        self.log.append("seen")
        return self.log


stopped: list[list[str]] = []


def test_hooks_run_in_order_and_where_they_belong():
    async def body() -> None:
        stopped.clear()
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Hooked)
            moving = a.migrate(ref, to="b")
            await moving
            assert await ref.seen() == ["on_start@a", "on_depart@a", "on_arrive@b", "seen"]
            await a.stop(ref)
        assert stopped == [["on_start@a", "on_depart@a", "on_arrive@b", "seen", "on_stop@b"]]

    run(body())


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_s12_a_departure_hook_that_fails_or_hangs_rolls_the_move_back(how: str):
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(hook_timeout_s=0.1)) as (a, _):
            ref = await a.spawn(Hooked, **{how: "on_depart"})
            error = await failure_of(a.migrate(ref, to="b"))
            check_refused(error, migrate.MoveRolledBack)
            assert "on_depart" in str(error)
            assert await ref.seen() == ["on_start@a", "on_depart@a", "on_stay@a", "seen"]

    run(body())


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_an_arrival_hook_that_fails_or_hangs_is_logged_and_the_server_serves(
    how: str, caplog: pytest.LogCaptureFixture
):
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(hook_timeout_s=0.1)) as (a, _):
            ref = await a.spawn(Hooked, **{how: "on_arrive"})
            with caplog.at_level(logging.ERROR, "migrate"):
                assert (await a.migrate(ref, to="b")).target == "b"
                assert (await ref.seen())[-2:] == ["on_arrive@b", "seen"]
            assert "on_arrive of server" in caplog.text

    run(body())


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_start_hook_that_fails_or_hangs_leaves_no_server(how: str):
    async def body() -> None:
        async with nodes("a", options=QUICK.replace(hook_timeout_s=0.1)) as (a,):
            kind = RuntimeError if how == "fails" else TimeoutError
            named = migrate.SpawnOptions(name="hooked")
            await failure_of(a.spawn(Hooked, **{how: "on_start"}, options=named), kind)
            assert await a.servers() == []
            await failure_of(a.whereis("hooked"), migrate.ServerNotFound)
            assert await (await a.spawn(Hooked, options=named)).seen()

    run(body())


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_stop_hook_that_fails_or_hangs_is_logged_and_the_server_is_stopped(
    how: str, caplog: pytest.LogCaptureFixture
):
    async def body() -> None:
        async with nodes("a", options=QUICK.replace(hook_timeout_s=0.1)) as (a,):
            ref = await a.spawn(Hooked, **{how: "on_stop"})
            with caplog.at_level(logging.ERROR, "migrate"):
                await a.stop(ref)
            assert "on_stop of server" in caplog.text
            await failure_of(ref.seen(), migrate.ServerNotFound)

    run(body())


class CallsInHooks:
    """Calls somebody else in every hook."""

    def __init__(self, other: Any) -> None:
        self.other = other

    async def on_start(self) -> None:
        await self.other.incr()

    async def on_depart(self) -> None:
        await self.other.incr()

    async def on_arrive(self) -> None:
        await self.other.incr()

    def ping(self) -> str:
        return "pong"


def test_s14_hooks_may_call_other_servers_that_move_at_the_same_time():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            counter = await a.spawn(Counter)
            one = await a.spawn(CallsInHooks, counter)
            two = await b.spawn(CallsInHooks, counter)
            for _ in range(3):
                await asyncio.gather(
                    a.migrate(one, to="b"), b.migrate(two, to="a"), a.migrate(counter, to="b")
                )
                await asyncio.gather(
                    a.migrate(one, to="a"), b.migrate(two, to="b"), a.migrate(counter, to="a")
                )
            assert [await one.ping(), await two.ping()] == ["pong", "pong"]
            assert await counter.get() == 2 + 2 * 2 * 6

    run(body())


# ---------------------------------------------------------------- what travels


def test_the_mailbox_travels_and_every_queued_call_is_answered_once():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            Gate.events["queue"] = asyncio.Event()
            ref = await a.spawn(Gate, "queue")
            from_b = ref._bound_to(b._driver)
            calls = [(ref if n % 2 else from_b).pass_through() for n in range(20)]
            await until(lambda: len(_inc(a, ref).mailbox) == 19)
            moving = asyncio.create_task(a.migrate(ref, to="b"))
            await until(lambda: bool(a._driver.core.leaving))
            Gate.events["queue"].set()
            report = await moving
            assert sorted(await asyncio.gather(*calls)) == list(range(1, 21))
            assert report.target == "b"
            assert await ref.count() == 20

    run(body())


def _inc(node: migrate.Node, ref: Any) -> Any:
    return node._driver.core.hosted[ref._server_id]


class Recorder:
    def __init__(self) -> None:
        self.items: list[int] = []

    def add(self, item: int) -> int:
        self.items.append(item)
        return item

    def all(self) -> list[int]:
        return self.items


def test_s01_casts_and_calls_of_one_sender_stay_in_order_over_many_moves():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, c):
            ref = await a.spawn(Recorder)
            senders = [ref._bound_to(node._driver) for node in (a, b, c)]
            sent = 0

            async def send(n: int) -> None:
                nonlocal sent
                mine = senders[n]
                for k in range(300):
                    item = n * 1000 + k
                    if k % 3:
                        await mine.add(item)
                    else:
                        await mine.add.cast(item)
                    sent += 1
                    if k % 10 == 0:
                        await asyncio.sleep(0)

            async def move() -> None:
                for k in range(12):
                    await a.migrate(ref, to="bca"[k % 3])

            async with asyncio.TaskGroup() as group:
                for n in range(3):
                    group.create_task(send(n))
                group.create_task(move())
            items = await ref.all()
            assert len(items) == sent == 900
            for n in range(3):
                mine = [item for item in items if item // 1000 == n]
                assert mine == [n * 1000 + k for k in range(300)]

    run(body())


def test_s16_ten_rapid_moves_leave_an_old_ref_at_most_a_few_hops_away():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, b, _):
            ref = await a.spawn(Counter)
            sleepy = ref._bound_to(b._driver)
            assert await sleepy.incr() == 1
            for k in range(10):
                await a.migrate(ref, to="bca"[k % 3])
            assert await sleepy.incr() == 2
            assert await ref.incr() == 3

    run(body())


class Slow:
    def __init__(self) -> None:
        self.ticks = 0

    @migrate.every(seconds=20.0)
    def tick(self) -> None:
        self.ticks += 1


def test_timers_keep_their_phase_across_moves():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Slow)
            timer = _inc(a, ref).timers["tick"]
            timer.due_ms -= 8_000  # as if eight seconds of the period had passed
            due_ms = timer.due_ms
            begun = time.monotonic()
            await a.migrate(ref, to="b")
            await b.migrate(ref, to="a")
            took_ms = int((time.monotonic() - begun) * 1000) + 1
            # The remaining time travels, so all it can lose is what the moves took.
            assert 0 <= _inc(a, ref).timers["tick"].due_ms - due_ms <= took_ms < 8_000

    run(body())


def test_timers_go_on_wherever_the_server_is():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Ticker)
            for n, to in enumerate("bab"):
                await a.migrate(ref, to=to)

                async def ticked(to: str = to, times: int = n // 2 + 1) -> bool:
                    return [node for _, node in await ref.seen()].count(to) >= times

                await eventually(ticked)

    run(body())


def test_pending_timers_do_not_fire_twice_in_a_server_that_moves_all_the_time():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Ticker)
            begun = time.monotonic()
            k = 0
            while time.monotonic() - begun < 1.2:
                k += 1
                await a.migrate(ref, to="ba"[(k + 1) % 2])
            ticks = await ref.seen()
            elapsed = time.monotonic() - begun
            assert k > 5
            assert 1 <= len(ticks) <= elapsed / 0.25 + 1

    run(body())


class Holder:
    """Holds refs in its state, and calls through them."""

    def __init__(self, *refs: Any) -> None:
        self.refs = list(refs)

    async def total(self) -> int:
        return sum([await ref.incr() for ref in self.refs])

    def give(self) -> Any:
        return self.refs[0]

    def take(self, ref: Any) -> int:
        self.refs.append(ref)
        return len(self.refs)

    async def of(self, ref: Any) -> bool:
        return bool(ref == self.refs[0])

    def me(self) -> Any:
        return migrate.current().ref


def test_refs_in_the_state_work_after_moves_of_either_side():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, _, c):
            one, two = await a.spawn(Counter), await c.spawn(Counter)
            holder = await a.spawn(Holder, one, two)
            assert await holder.total() == 2
            await a.migrate(holder, to="b")
            assert await holder.total() == 4
            await a.migrate(one, to="c")
            await a.migrate(two, to="b")
            assert await holder.total() == 6
            await a.migrate(holder, to="c")
            assert await holder.total() == 8
            assert await holder.give() == one
            assert await holder.of(one)
            assert await holder.take(two) == 3
            assert await holder.total() == 5 + 5 + 6
            assert await holder.me() == holder
            assert len({await holder.me(), holder}) == 1

    run(body())


class Chatty:
    """Calls a counter from a handler, several in flight, and stores what came."""

    def __init__(self, counter: Any) -> None:
        self.counter = counter
        self.got: list[int] = []

    async def talk(self, times: int) -> list[int]:
        self.got += await asyncio.gather(*(self.counter.incr() for _ in range(times)))
        return self.got

    async def tell(self, times: int) -> None:
        for _ in range(times):
            await self.counter.incr.cast()


def test_s32_a_server_that_calls_others_moves_in_between_and_loses_no_reply():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, _, c):
            counter = await c.spawn(Counter)
            chatty = await a.spawn(Chatty, counter)
            talks = [chatty.talk(5) for _ in range(40)]
            for k in range(9):
                await a.migrate(chatty, to="bca"[k % 3])
                await a.migrate(counter, to="abc"[k % 3]) if k % 3 != 2 else None
            assert len(await talks[-1]) == 200
            await asyncio.gather(*talks)
            assert await talks[-1] == list(range(1, 201))
            assert await counter.get() == 200

    run(body())


def test_casts_of_a_server_that_moves_right_after_are_delivered():
    async def body() -> None:
        async with nodes("a", "b", "c") as (a, _, c):
            counter = await c.spawn(Counter)
            chatty = await a.spawn(Chatty, counter)
            for k in range(6):
                call = chatty.tell(20)
                await a.migrate(chatty, to="bca"[k % 3])
                await call

            async def all_came() -> bool:
                return bool(await counter.get() == 120)

            await eventually(all_came)

    run(body())


class Spawner:
    """Starts a task in a handler: no quiescent point while it runs."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def start(self, key: str) -> None:
        asyncio.get_running_loop()
        self._task = None

        async def later() -> None:
            await Gate.events[key].wait()
            self.log.append(f"later@{migrate.current().node}")

        asyncio.create_task(later())  # noqa: RUF006 - the server keeps running; so does it

    def seen(self) -> list[str]:
        return self.log


def test_a_task_that_a_handler_started_ends_before_the_server_moves():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            Gate.events["later"] = asyncio.Event()
            ref = await a.spawn(Spawner)
            await ref.start("later")
            moving = asyncio.create_task(a.migrate(ref, to="b"))
            await until(lambda: bool(a._driver.core.leaving))
            for _ in range(20):
                await asyncio.sleep(0)
            assert not moving.done()
            Gate.events["later"].set()
            await moving
            assert await ref.seen() == ["later@a"]

    run(body())


class Blocks:
    def __init__(self) -> None:
        self.n = 0

    @migrate.blocking
    def wait(self, key: str) -> str:
        assert threads[key].wait(20)
        self.n += 1
        return f"{migrate.current().node} {threading.current_thread().name}"

    def count(self) -> int:
        return self.n


threads: dict[str, threading.Event] = {}


def test_a_blocking_handler_ends_before_the_server_moves_and_the_loop_goes_on():
    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            threads["block"] = threading.Event()
            ref = await a.spawn(Blocks)
            other = await a.spawn(Counter)
            call = ref.wait("block")
            moving = asyncio.create_task(a.migrate(ref, to="b"))
            assert [await other.incr() for _ in range(10)] == list(range(1, 11))
            assert not moving.done()
            threads["block"].set()
            assert "migrate-blocking" in await call
            assert (await call).startswith("a ")
            await moving
            assert await ref.count() == 1

    run(body())


def test_the_one_who_asked_may_go_away_and_the_move_goes_on():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            Gate.events["away"] = asyncio.Event()
            ref = await a.spawn(Gate, "away")
            call = ref.pass_through()
            moving = asyncio.create_task(a.migrate(ref, to="b"))
            await until(lambda: bool(a._driver.core.leaving))
            moving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await moving
            Gate.events["away"].set()
            assert await call == 1
            await until(lambda: ref._server_id in b._driver.core.hosted)
            assert await ref.count() == 1

    run(body())


def test_s11_a_server_that_is_never_idle_moves_all_the_same():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Busy)
            ended = asyncio.Event()

            async def keep_busy(mine: Any) -> int:
                n = 0
                while not ended.is_set():
                    await mine.work(0.001)
                    n += 1
                return n

            mine = [ref._bound_to(node._driver) for node in (a, b)] * 4
            tasks = [asyncio.create_task(keep_busy(m)) for m in mine]
            for k in range(6):
                report = await a.migrate(ref, to="ba"[k % 2])
                assert report.target == "ba"[k % 2]
            ended.set()
            assert min(await asyncio.gather(*tasks)) > 0

    run(body())


def test_s35_a_large_state_moves_while_others_are_served():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Large, 96 << 20)
            other = await b.spawn(Counter)
            from_a = other._bound_to(a._driver)
            moving = asyncio.create_task(a.migrate(ref, to="b"))
            served = 0
            while not moving.done():
                served = await from_a.incr()
                await asyncio.sleep(0.005)
            report = await moving
            assert report.bytes_sent > 96 << 20
            assert served > 3
            assert await ref.size() == 96 << 20
            assert await ref.incr() == 1

    run(body())


def test_many_servers_move_at_once():
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(moves_max=8)) as (a, b):
            refs = [await a.spawn(Counter, n) for n in range(50)]
            reports = await asyncio.gather(*(a.migrate(ref, to="b") for ref in refs))
            assert {r.target for r in reports} == {"b"}
            assert [await ref.get() for ref in refs] == list(range(50))
            assert len(b._driver.core.hosted) == 50
            assert a._driver.core.hosted == {} and a._driver.core.moves_out == {}

    run(body())


def test_the_report_tells_what_happened():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Where)
            assert await ref.node() == "a"
            report = await b.migrate(ref, to="b")
            assert (report.source, report.target, report.epoch) == ("a", "b", 2)
            assert report.rounds == 1
            assert 0 < report.downtime_s <= report.total_s < 30
            assert report.bytes_sent > 0
            assert await ref.node() == "b"
            info = await a.info(ref)
            assert (info.node, info.epoch, info.cls) == ("b", 2, "tests.migrate.servers:Where")

    run(body())


def test_calls_cancelled_and_timed_out_at_random_while_the_server_moves_stall_nobody():
    async def body() -> None:
        draw = random.Random(7)
        async with nodes("a", "b", "c") as (a, b, c):
            ref = await a.spawn(Counter)
            ended = asyncio.Event()

            async def storm(mine: Any) -> tuple[list[int], int]:
                got: list[int] = []
                given_up = 0
                while not ended.is_set():
                    calls = [mine.incr.with_options(timeout=20)() for _ in range(10)]
                    hasty = mine.incr.with_options(timeout=0.001)()
                    for call in draw.sample(calls, 4):
                        if draw.random() < 0.5:
                            await asyncio.sleep(0)
                        given_up += call.cancel()
                    results = await asyncio.gather(*calls, hasty, return_exceptions=True)
                    got += [r for r in results if isinstance(r, int)]
                    given_up += isinstance(results[-1], migrate.MigrateError)
                    others = [r for r in results if not isinstance(r, int)]
                    assert all(
                        isinstance(r, asyncio.CancelledError | migrate.CallTimeout) for r in others
                    ), others
                return got, given_up

            tasks = [asyncio.create_task(storm(ref._bound_to(n._driver))) for n in (a, b, c)]
            for k in range(30):
                await a.migrate(ref, to="bca"[k % 3])
                await ref.get()
            ended.set()
            seen = await asyncio.gather(*tasks)
            values = [value for got, _ in seen for value in got]
            assert len(set(values)) == len(values)
            for got, _ in seen:
                assert got == sorted(got)
            # What was given up has happened or not; everything else exactly once.
            final = await ref.get()
            assert len(values) <= final <= len(values) + sum(n for _, n in seen)

    run(body())


def test_a_node_closed_in_the_middle_of_moves_to_and_from_it_loses_no_server_of_the_others():
    async def body() -> None:
        async with nodes("a", "c") as (a, c):
            b = migrate.Node(name="b", directory=a._directory, options=QUICK)
            await b.start()
            await linked(b, [a, c])
            refs = [await a.spawn(Counter, n) for n in range(20)]
            moves = [asyncio.create_task(a.migrate(ref, to="b")) for ref in refs]
            await until(lambda: any(move.done() for move in moves))
            closing = asyncio.create_task(b.drain("b"))
            results = await asyncio.gather(*moves, return_exceptions=True)
            await closing
            # Some arrived and were drained off again, the others were refused and stayed.
            assert all(
                isinstance(r, migrate.MoveReport | migrate.TargetRefused | migrate.MoveRolledBack)
                for r in results
            ), results
            assert b._driver.core.hosted == {}
            await b.close()
            assert [await ref.incr() for ref in refs] == [n + 1 for n in range(20)]

    run(body())
