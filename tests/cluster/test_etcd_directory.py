"""The etcd directory and its real servers: restarts, kills, stops, lost answers, slow answers.

What it does when all is well is held by tests/contract/test_directory.py.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import pytest

from migrate.core.directory import Row, RowState, committed
from migrate.core.events import SwapOutcome
from migrate.shell.directories import (
    Change,
    Changes,
    Compacted,
    Compare,
    Directory,
    DirectoryError,
    DirectoryUnavailable,
    EtcdDirectory,
    LeaseGone,
    OutcomeUnknown,
    Put,
    open_directory,
)
from migrate.shell.directories import etcd as etcd_home
from migrate.shell.driver import SERVER_KEY, DirectoryRows
from migrate.shell.wire import encode_row
from migrate.tools import certs
from rpc.v1 import etcd_pb2
from tests.cluster.etcd_servers import EtcdServer, etcd_cluster, etcd_server, needs_etcd
from tests.cluster.linearizable import End, Operation, Register, check
from tests.cluster.proxy import proxy_to

pytestmark = [pytest.mark.cluster, needs_etcd]

WAIT_S_MAX = 120.0
"""Bound of every wait in these tests: for a fault, not for an expectation."""

T = TypeVar("T")


def run(main: Callable[[], Awaitable[T]]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(WAIT_S_MAX):
            result = await main()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"
        return result

    return asyncio.run(bounded())


def patient(*addresses: str, timeout_s: float = WAIT_S_MAX) -> EtcdDirectory:
    """A directory for which a busy machine is no fault."""
    return EtcdDirectory(addresses, call_timeout_s=timeout_s, patience_s=WAIT_S_MAX)


async def put(directory: Directory, key: str, value: bytes = b"", lease: int | None = None) -> int:
    done = await directory.txn([], [Put(key, value, lease)], [])
    assert done.ok
    return done.rev


async def swap(directory: Directory, key: str, nonce: bytes) -> bool:
    """Compare-and-swap as the nodes do it; return whether its outcome had been unknown."""
    doubtful = False
    entry = await directory.get(key)
    rev = 0 if entry is None else entry.rev
    while True:
        try:
            done = await directory.txn([Compare(key, rev)], [Put(key, nonce)], [])
        except OutcomeUnknown:
            doubtful = True
            continue
        except DirectoryUnavailable:
            continue
        if not done.ok:
            there = done.entries[key]
            assert doubtful and there is not None and there.value == nonce
        return doubtful


async def comes(holds: Callable[[], bool]) -> None:
    """Wait until something of this process holds."""
    while True:
        if holds():
            return
        await asyncio.sleep(0.005)


async def take(directory: Directory, prefix: str, from_rev: int, until_rev: int) -> list[Changes]:
    """Watch to a revision; asks again whenever the directory does not serve for long."""
    seen: list[Changes] = []
    watch = directory.watch(prefix, from_rev)
    while not seen or seen[-1][0].rev < until_rev:
        try:
            seen.append(await anext(watch))
        except DirectoryUnavailable:
            continue
    return seen


async def compact(directory: EtcdDirectory, rev: int) -> None:
    """Drop the log up to a revision, as whoever runs etcd does."""
    method = etcd_home._Method("/etcdserverpb.KV/Compact", etcd_pb2.CompactionResponse)
    request = etcd_pb2.CompactionRequest(revision=rev + etcd_home._OFFSET, physical=True)
    await directory._ask(method, request, etcd_home._Once.AGAIN)


# ----------------------------------------------------------------- restarts and the watch


def test_killed_and_started_again_under_use_nothing_is_lost_and_no_outcome_is_made_up(
    tmp_path: Path,
) -> None:
    async def main(server: EtcdServer) -> None:
        async with patient(server.address) as directory, patient(server.address) as reader:
            ended = asyncio.Event()
            made = 0

            async def write() -> int:
                nonlocal made
                doubts = 0
                for number in itertools.count():
                    if ended.is_set():
                        return doubts
                    doubts += await swap(directory, "k", b"%d" % number)
                    made += 1
                raise AssertionError

            async def some_more(count: int) -> None:
                until = made + count
                await comes(lambda: made >= until)

            watching = asyncio.create_task(take(reader, "k", 1, 1 << 40))
            writing = asyncio.create_task(write())
            for _ in range(3):
                await some_more(100)
                server.kill()
                server.start()
            await some_more(100)
            ended.set()
            await writing
            entry = await directory.get("k")
            assert entry is not None and entry.value == b"%d" % (made - 1)
            # Each swap took effect once: the store has had as many revisions.
            assert entry.rev == made
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            values = [it.value for [it] in await take(directory, "k", 1, made)]
            assert values == [b"%d" % number for number in range(made)]

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


def test_a_watch_goes_on_over_restarts_with_every_revision_once(tmp_path: Path) -> None:
    async def main(server: EtcdServer) -> None:
        async with patient(server.address) as directory, patient(server.address) as reader:
            watching = asyncio.create_task(take(reader, "", 1, 200))
            for number in range(200):
                if number % 50 == 25:
                    server.kill()
                    server.start()
                await swap(directory, f"k{number}", b"")
            assert [changes[0].rev for changes in await watching] == list(range(1, 201))

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


@pytest.mark.slow
def test_a_watch_twenty_thousand_revisions_behind_loses_none_when_etcd_is_killed_in_the_middle(
    tmp_path: Path,
) -> None:
    behind = 20_000

    async def main(server: EtcdServer) -> None:
        async with patient(server.address) as directory, patient(server.address) as reader:
            for start in range(0, behind, 1000):
                await asyncio.gather(
                    *(put(directory, f"k{i % 100}") for i in range(start, start + 1000))
                )
            watch = reader.watch("", 1)
            seen = [await anext(watch)]
            killed_at = 0
            while seen[-1][0].rev < behind:
                if not killed_at and len(seen) >= behind // 4:
                    # NB: what etcd has already sent is read to its end; the rest is asked anew.
                    server.kill()
                    server.start()
                    killed_at = seen[-1][0].rev
                seen.append(await anext(watch))
            assert 0 < killed_at < behind
            assert [changes[0].rev for changes in seen] == list(range(1, behind + 1))

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


def test_a_row_is_watched_though_its_last_change_has_left_the_log(tmp_path: Path) -> None:
    row = Row("s1", 1, "a@1", RowState.ACTIVE, "spawned", "", "Counter", 1)
    neighbour = Row("s10", 1, "a@1", RowState.ACTIVE, "spawned", "", "Counter", 1)

    async def main(server: EtcdServer) -> None:
        async with patient(server.address) as directory:
            rows = DirectoryRows(directory)
            for number, known in enumerate((row, neighbour), 1):
                assert await put(directory, SERVER_KEY + known.server, encode_row(known)) == number
            await compact(directory, await put(directory, "later"))
            watch = rows.watch("s1")
            assert await anext(watch) == (row, 1)
            for known, rev in ((neighbour, 2), (row, 1)):
                done = await rows.swap(committed(known, "b@1", "t", 1), rev)
                assert done.outcome is SwapOutcome.DONE
            assert await anext(watch) == (committed(row, "b@1", "t", 1), done.rev)

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


def test_compacted_revisions_are_refused_also_the_newest_of_them(tmp_path: Path) -> None:
    async def main(server: EtcdServer) -> None:
        async with patient(server.address) as directory:
            for number in range(9):
                await put(directory, f"k{number}")
            # What etcd serves from a revision that was compacted lacks this very change.
            assert (await directory.txn([], [], ["k0"])).rev == 10
            await put(directory, "k9")
            await compact(directory, 10)
            for from_rev in (1, 5, 10):
                watch = directory.watch("", from_rev)
                for _ in range(2):
                    with pytest.raises(Compacted) as caught:
                        await anext(watch)
                    assert caught.value.rev == 10
            assert await anext(directory.watch("", 11)) == [Change("k9", b"", 11)]
            entries, rev = await directory.list("")
            assert ([it.key for it in entries], rev) == ([f"k{i}" for i in range(1, 10)], 11)

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


def test_a_list_that_is_compacted_between_two_pages_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_home, "_PAGE_KEYS", 10)

    async def main(server: EtcdServer) -> None:
        async with patient(server.address) as directory:
            for number in range(35):
                await put(directory, f"k{number:02}")
            ask, asked = directory._ask, 0

            async def compacting(method: Any, request: Any, once: Any) -> Any:
                nonlocal asked
                if method is etcd_home._RANGE:
                    asked += 1
                    if asked == 3:
                        rev = await put(directory, "late")
                        await compact(directory, rev)
                return await ask(method, request, once)

            directory._ask = compacting  # type: ignore[method-assign]
            entries, rev = await directory.list("k")
            assert [it.key for it in entries] == [f"k{number:02}" for number in range(35)]
            assert (rev, asked) == (36, 3 + 4)

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


# --------------------------------------------------------------------- outcomes of a swap


@pytest.mark.parametrize("way", ["answer", "request"])
def test_a_swap_whose_answer_does_not_come_is_told_as_unknown_and_resolved_by_its_nonce(
    tmp_path: Path, way: str
) -> None:
    async def main(server: EtcdServer) -> None:
        async with (
            proxy_to(server.address) as proxy,
            patient(server.address) as witness,
            patient(proxy.address) as directory,
        ):
            rev = await put(directory, "k", b"before")
            proxy.passes_answers = way == "request"
            proxy.passes_requests = way == "answer"
            swapping = asyncio.create_task(
                directory.txn([Compare("k", rev)], [Put("k", b"nonce")], [])
            )
            if way == "answer":
                await proxy.swallowed.wait()
            else:
                # Handed to gRPC, and dropped on the way.
                await asyncio.sleep(0.2)
            proxy.cut()
            with pytest.raises(OutcomeUnknown) as caught:
                await swapping
            assert caught.value.outcome == "unknown"
            entry = await witness.get("k")
            assert entry is not None
            assert entry.value == (b"nonce" if way == "answer" else b"before")
            # The same again, as its text says: at most one of the copies can win.
            proxy.passes_answers = proxy.passes_requests = True
            again = await directory.txn([Compare("k", rev)], [Put("k", b"nonce")], [])
            assert again.ok == (way == "request")
            entry = await directory.get("k")
            assert entry is not None and (entry.value, entry.rev) == (b"nonce", rev + 1)

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


def test_a_swap_is_not_done_when_etcd_is_gone_or_silent_before_it_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(server: EtcdServer) -> None:
        directory = EtcdDirectory([server.address], call_timeout_s=0.3, patience_s=0.5)
        async with directory:
            while True:
                try:
                    rev = await put(directory, "k", b"before")
                    break
                except OutcomeUnknown:
                    continue  # The machine is busy.

            async def refused() -> None:
                with pytest.raises(DirectoryUnavailable, match="nothing was done"):
                    await directory.txn([Compare("k", rev)], [Put("k", b"no")], [])

            server.kill()
            # While the connection seems to stand a request may have got through.
            await ended(directory._members[0])
            await refused()
            await refused()
            server.start()
            await come_back(directory)
            # It has not answered for a while, so it is asked whether it is there.
            server.pause()
            monkeypatch.setattr(etcd_home, "FRESH_S", 0.0)
            await refused()
            server.resume()
            await come_back(directory)
            entry = await directory.get("k")
            assert entry is not None and (entry.value, entry.rev) == (b"before", rev)

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


async def ended(member: Any) -> None:
    """Wait until the end of a member's process has come to its channel."""
    while (state := member.channel.get_state()) is grpc.ChannelConnectivity.READY:
        await member.channel.wait_for_state_change(state)


async def come_back(directory: Directory) -> None:
    while True:
        try:
            await directory.get("k")
        except DirectoryUnavailable:
            continue
        return


def test_a_slow_server_is_waited_for_up_to_the_deadline_and_then_told_honestly(
    tmp_path: Path,
) -> None:
    async def main(server: EtcdServer) -> None:
        quick = EtcdDirectory(["h:1"])  # Only for its defaults.
        assert (quick._call_timeout_s, quick._patience_s) == (1.0, 4.0)
        async with proxy_to(server.address) as proxy, patient(server.address) as witness:
            async with patient(proxy.address) as directory:
                proxy.delay_s = 0.3
                began_s = time.monotonic()
                rev = await put(directory, "k", b"slow")
                assert time.monotonic() - began_s >= 0.6
                assert await directory.txn([Compare("k", rev)], [Put("k", b"x")], []) is not None
                lease = await directory.lease(60)
                assert await directory.keepalive(lease)
            impatient = EtcdDirectory([proxy.address], call_timeout_s=1.0, patience_s=1.0)
            proxy.delay_s = 0.0
            async with impatient:
                while True:
                    try:
                        rev = await put(impatient, "k", b"before")
                        break
                    except OutcomeUnknown:
                        continue
                proxy.delay_s = 5.0
                with pytest.raises(OutcomeUnknown):
                    await impatient.txn([Compare("k", rev)], [Put("k", b"late")], [])
                with pytest.raises(DirectoryUnavailable):
                    await impatient.get("k")
                with pytest.raises(DirectoryUnavailable):
                    await impatient.lease(10)
                # Now it is under suspicion, so a read goes before the next swap, and fails.
                with pytest.raises(DirectoryUnavailable):
                    await impatient.txn([Compare("k", rev)], [Put("k", b"never")], [])
                entry = await witness.get("k")
                assert entry is not None and entry.value in (b"before", b"late")

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


def test_whoever_is_no_etcd_is_refused_by_name(tmp_path: Path) -> None:
    async def main() -> None:
        import grpc.aio

        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with pytest.raises(DirectoryError, match="client port of an etcd v3"):
            await EtcdDirectory([f"127.0.0.1:{port}"]).start()
        await server.stop(None)
        directory = EtcdDirectory([f"127.0.0.1:{port}"], patience_s=0.2)
        for _ in range(2):  # It can be tried again.
            with pytest.raises(DirectoryUnavailable, match="does not serve now"):
                await directory.start()

    run(main)


# --------------------------------------------------------------------------------- leases


def test_a_lease_is_kept_alive_or_runs_out_and_says_so(tmp_path: Path) -> None:
    async def main(server: EtcdServer) -> None:
        async with patient(server.address) as directory:
            kept, left = await directory.lease(1), await directory.lease(1)
            await put(directory, "kept", b"", kept)
            await put(directory, "left", b"", left)
            watch = directory.watch("", 3)
            waiting = asyncio.ensure_future(anext(watch))
            while not waiting.done():
                assert await directory.keepalive(kept)
                await asyncio.sleep(0.1)
            assert await waiting == [Change("left", None, 3)]
            assert not await directory.keepalive(left)
            for puts in ([Put("n", b"", left)], [Put("n", b"", kept), Put("m", b"", left)]):
                with pytest.raises(LeaseGone) as caught:
                    await directory.txn([], [Put("other", b""), *puts], [])
                assert caught.value.lease == left
            entries, rev = await directory.list("")
            assert ([it.key for it in entries], rev) == (["kept"], 3)

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


def test_a_lease_without_keys_ends_without_a_revision(tmp_path: Path) -> None:
    async def main(server: EtcdServer) -> None:
        async with patient(server.address) as directory:
            lease = await directory.lease(1)
            # Asking would prolong it.
            method, request = etcd_home._TIME_TO_LIVE, etcd_pb2.LeaseTimeToLiveRequest(id=lease)
            while (await directory._ask(method, request, etcd_home._Once.READ)).ttl_s >= 0:
                pass
            assert not await directory.keepalive(lease)
            assert await directory.list("") == ([], 0)

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


def test_a_grant_whose_answer_was_lost_is_one_lease(tmp_path: Path) -> None:
    async def main(server: EtcdServer) -> None:
        async with (
            proxy_to(server.address) as proxy,
            patient(server.address, proxy.address) as directory,
        ):
            directory._member = 1
            proxy.passes_answers = False
            granting = asyncio.create_task(directory.lease(60))
            await proxy.swallowed.wait()
            proxy.cut()
            assert await directory.keepalive(await granting)

    with etcd_server(tmp_path) as server:
        run(lambda: main(server))


# ------------------------------------------------------------------- passwords, certificates


def administer(server: EtcdServer, verb: str, **fields: Any) -> None:
    """Do what only whoever runs etcd does, by its JSON interface."""
    request = urllib.request.Request(f"{server.client_url}/v3/{verb}", json.dumps(fields).encode())
    until_s = time.monotonic() + WAIT_S_MAX
    while True:
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S_MAX) as answer:
                answer.read()
            return
        except urllib.error.HTTPError as error:
            # It listens before it has elected itself.
            with error:
                assert error.code == 503 and time.monotonic() < until_s, error.read()
            time.sleep(0.05)


def test_a_user_logs_in_and_again_when_the_token_is_forgotten(tmp_path: Path) -> None:
    password_file = tmp_path / "password"
    password_file.write_text("s3:cret@/%\n")

    async def main(server: EtcdServer) -> None:
        at = server.address
        for url, why in (
            (f"etcd://{at}/demo", "user name is empty"),
            (f"etcd://lm:wrong@{at}/demo", "does not let this user in"),
            (f"etcd://nobody:x@{at}/demo", "does not let this user in"),
        ):
            with pytest.raises(DirectoryError, match=why) as caught:
                await open_directory(url).start()
            assert not isinstance(caught.value, DirectoryUnavailable)
            assert "wrong" not in str(caught.value)
        options = f"password_file={password_file}&timeout=20&patience={WAIT_S_MAX}"
        directory = open_directory(f"etcd://lm@{at}/demo?{options}")
        assert directory.url == f"etcd://lm@{at}/demo"
        async with directory:
            watch = directory.watch("", 1)
            assert await put(directory, "k", b"1") >= 1
            assert [it.value for it in await anext(watch)] == [b"1"]
            first = directory._token  # type: ignore[attr-defined]
            # Tokens live in memory. (But a login is in the log: one that is not yet in the store
            # when the server dies is done again, with the same token.)
            for n in itertools.count(2):
                server.kill()
                server.start()
                await swap(directory, "k", b"%d" % n)
                assert [it.value for it in await anext(watch)] == [b"%d" % n]
                if directory._token != first:  # type: ignore[attr-defined]
                    break
            assert directory._token  # type: ignore[attr-defined]
            lease = await directory.lease(60)
            assert await directory.keepalive(lease)
            await directory.revoke(lease)
        # Its role ends at the prefix, whatever it asks for.
        async with open_directory(f"etcd://lm@{at}/demo?{options}") as there:
            there._root = b"other/"  # type: ignore[attr-defined]
            with pytest.raises(DirectoryError, match="PERMISSION_DENIED"):
                await there.get("k")

    with etcd_server(tmp_path) as server:
        administer(server, "auth/user/add", name="root", password="root")
        administer(server, "auth/user/grant", user="root", role="root")
        administer(server, "auth/user/add", name="lm", password="s3:cret@/%")
        administer(server, "auth/role/add", name="demo")
        permission = {
            "permType": "READWRITE",
            "key": base64.b64encode(b"demo/").decode(),
            "range_end": base64.b64encode(b"demo0").decode(),
        }
        administer(server, "auth/role/grant", name="demo", perm=permission)
        administer(server, "auth/user/grant", user="lm", role="demo")
        administer(server, "auth/enable")
        run(lambda: main(server))


def test_with_certificates_whoever_has_none_can_neither_read_nor_write(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="certificates are made with cryptography")
    for name in ("ours", "other"):
        certs.init(tmp_path / name, ["127.0.0.1"], 30, renew=False)
    ours, other = tmp_path / "ours", tmp_path / "other"

    async def main(server: EtcdServer) -> None:
        at = server.address
        async with open_directory(f"etcd://{at}/demo?tls={ours}&timeout=20") as directory:
            await put(directory, "k", b"1")
        client = f"ca={ours}/ca.pem&cert={ours}/client.pem&key={ours}/client.key"
        async with open_directory(f"etcd://{at}/demo?{client}&timeout=20") as directory:
            assert await directory.get("k") is not None
        for stranger in (
            "patience=0.5",
            f"tls={other}&patience=0.5",
            f"ca={ours}/ca.pem&patience=0.5",
            f"ca={ours}/ca.pem&cert={other}/node.pem&key={other}/node.key&patience=0.5",
        ):
            with pytest.raises(DirectoryUnavailable):
                await open_directory(f"etcd://{at}/demo?{stranger}").start()
        with pytest.raises(DirectoryError, match="No such file"):
            await open_directory(f"etcd://{at}/demo?tls={tmp_path}/none").start()

    extra = [
        *("--cert-file", f"{ours}/node.pem", "--key-file", f"{ours}/node.key"),
        *("--client-cert-auth", "--trusted-ca-file", f"{ours}/ca.pem"),
    ]
    with etcd_server(tmp_path, extra=extra) as server:
        run(lambda: main(server))


# ------------------------------------------------------------------------- several members


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_a_member_that_is_killed_or_stopped_is_left_for_another_and_histories_are_linearizable(
    tmp_path: Path, fault: str
) -> None:
    lanes = 4

    async def main(servers: list[EtcdServer]) -> None:
        addresses = [it.address for it in servers]
        history: list[Operation] = []
        ended = asyncio.Event()
        directories = [
            EtcdDirectory(addresses[lane % 3 :] + addresses[: lane % 3]) for lane in range(lanes)
        ]
        for directory in directories:
            await directory.start()
        reader = patient(*addresses, timeout_s=2.0)
        await reader.start()
        watching = asyncio.create_task(take(reader, "r", 1, 1 << 40))
        made = [0] * lanes

        async def client(lane: int) -> None:
            directory: Directory = directories[lane]
            known: tuple[int, Any] = (0, Register.initial)
            for number in itertools.count():
                if ended.is_set():
                    return
                begun = time.monotonic_ns()
                call: tuple[Any, ...] = ("read",)
                end, result = End.RETURNED, cast(Any, None)
                try:
                    if number % 3:
                        entry = await directory.get("r")
                        if entry is not None:
                            known = (entry.rev, entry.value)
                        result = known[1]
                    else:
                        mine = b"%d/%d" % (lane, number)
                        call = ("cas", known[1], mine)
                        done = await directory.txn([Compare("r", known[0])], [Put("r", mine)], [])
                        result = done.ok
                        if done.ok:
                            known = (done.rev, mine)
                    made[lane] += 1
                except OutcomeUnknown:
                    end = End.UNKNOWN
                except DirectoryUnavailable:
                    end = End.NOT_DONE
                history.append(
                    Operation(f"{lane}/{number}", call, begun, time.monotonic_ns(), end, result)
                )

        clients = [asyncio.create_task(client(lane)) for lane in range(lanes)]

        async def some_more(count: int) -> None:
            """Wait until each client has made as many, whichever member it began with."""
            until = [it + count for it in made]

            def reached() -> bool:
                return all(have >= want for have, want in zip(made, until, strict=True))

            await comes(lambda: reached() or any(it.done() for it in clients))
            assert reached()

        await some_more(50)
        for server in servers:
            # Each of them once, so that the leader is among them.
            if fault == "kill":
                server.kill()
                await some_more(75)
                server.start()
            else:
                server.pause()
                await some_more(75)
                server.resume()
            await some_more(50)
        ended.set()
        await asyncio.gather(*clients)
        entries, rev = await reader.list("r")
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        # A revision is one swap, whatever was said of it.
        seen = await take(reader, "r", 1, rev)
        assert [changes[0].rev for changes in seen] == list(range(1, rev + 1))
        assert seen[-1] == [Change("r", entries[0].value, rev)]
        told = sum(it.call[0] == "cas" and it.result is True for it in history)
        unknown = sum(it.end is End.UNKNOWN for it in history)
        assert told <= rev <= told + unknown
        verdict = check(Register(), history, in_order=False)
        assert verdict, verdict.story
        for it in (*directories, reader):
            await it.close()

    with etcd_cluster(tmp_path) as servers:
        run(lambda: main(servers))


def test_watches_follow_to_the_member_that_serves(tmp_path: Path) -> None:
    async def main(servers: list[EtcdServer]) -> None:
        async with patient(*(it.address for it in servers), timeout_s=2.0) as directory:
            seen: asyncio.Queue[Changes] = asyncio.Queue()

            async def follow() -> None:
                watch = directory.watch("", 1)
                while True:
                    seen.put_nowait(await anext(watch))

            following = asyncio.create_task(follow())
            await swap(directory, "a", b"1")
            assert [it.key for it in await seen.get()] == ["a"]
            first = servers[directory._member]
            first.pause()
            # The watch hangs at the member that was stopped until a call finds out.
            await swap(directory, "b", b"2")
            assert [it.key for it in await seen.get()] == ["b"]
            first.resume()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    with etcd_cluster(tmp_path) as servers:
        run(lambda: main(servers))
