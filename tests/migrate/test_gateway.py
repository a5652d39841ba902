"""The public gRPC service, driven with nothing but grpcio and the compiled proto."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import decimal
import enum
import itertools
import json
import math
import os
import pathlib
import pickle
import secrets
import subprocess
import sys
import textwrap
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

import migrate
from migrate import errors
from migrate.errors import MigrateError, Outcome
from migrate.shell import gateway, host, json_form, status
from rpc import auth
from rpc.v1 import api_pb2, api_pb2_grpc, types_pb2

Code = grpc.StatusCode
T = TypeVar("T")

ROOT = pathlib.Path(__file__).parents[2]
BOUND_S = 60.0


# ----------------------------------------------------------------------- servers


class Counter:
    def __init__(self, start: int = 0) -> None:
        if start < 0:
            raise ValueError(f"start={start} is below zero")
        self.n = start

    def incr(self, by: int = 1) -> int:
        self.n += by
        return self.n

    def value(self) -> int:
        return self.n

    def echo(self, *args: Any, **kwargs: Any) -> Any:
        return [args, kwargs]

    def fail(self, text: str) -> None:
        raise LookupError(text)

    def leave(self) -> None:
        raise SystemExit(3)

    def full(self) -> None:
        raise errors.MailboxFull("another server's mailbox has no room")

    def me(self) -> Any:
        return migrate.current().ref

    def _hidden(self) -> None:
        self.n = -1

    def on_stop(self) -> None:
        pass

    @migrate.every(seconds=3600)
    def tick(self) -> None:
        self.n = -1


class Chosen:
    """Opens two methods; the others are for the cluster's own callers."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    @migrate.call
    def opened(self) -> list[str]:
        return self.ran

    @migrate.call
    async def also(self) -> str:
        return "also"

    def inner(self) -> str:
        self.ran.append("inner")
        return "inner"


class Gate:
    """Its handlers wait for events of the test, which runs in the same process."""

    entered: asyncio.Event
    go_on: asyncio.Event

    def __init__(self) -> None:
        self.log: list[str] = []

    async def block(self) -> str:
        self.entered.set()
        await self.go_on.wait()
        return "done"

    def note(self, text: str) -> None:
        self.log.append(text)

    def noted(self) -> list[str]:
        return self.log

    async def on_stop(self) -> None:
        if "hold" in self.log:
            self.entered.set()
            await self.go_on.wait()


class Slow:
    """Its `on_start` waits for an event of the test."""

    entered: asyncio.Event
    go_on: asyncio.Event
    made = 0

    def __init__(self) -> None:
        type(self).made += 1

    async def on_start(self) -> None:
        self.entered.set()
        await self.go_on.wait()


class Takes:
    def __init__(self, options: int) -> None:
        self.options = options


class Values:
    """Returns what the test has put into it."""

    value: Any = None

    def get(self) -> Any:
        return type(self).value


def name_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


ALL = (Counter, Chosen, Gate, Slow, Takes, Values)


# ----------------------------------------------------------------------- helpers


class Refused(Exception):
    """A call of the public API that failed, with what its trailers say."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(f"{error.code()}: {error.details()}")
        self.code = error.code()
        self.message = error.details() or ""
        found = dict(error.trailing_metadata() or ())
        self.raw: bytes = found.get("grpc-status-details-bin", b"")
        self.detail = types_pb2.ErrorDetail()
        if self.raw:
            rich = status_pb2.Status.FromString(self.raw)
            assert rich.code == self.code.value[0]
            assert rich.details[0].Unpack(self.detail)

    @property
    def outcome(self) -> int:
        return self.detail.outcome


class Outside:
    """A client in another language, as far as that can be had here."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        self.channel = channel
        self.api = api_pb2_grpc.ApiStub(channel)
        self.metadata = (("authorization", f"Bearer {token}"),)

    async def ask(self, verb: str, request: Any, **options: Any) -> Any:
        options.setdefault("metadata", self.metadata)
        try:
            return await getattr(self.api, verb)(request, **options)
        except grpc.aio.AioRpcError as error:
            raise Refused(error) from None

    async def spawn(self, cls: type, *args: Any, **fields: Any) -> str:
        request = api_pb2.SpawnRequest(cls=name_of(cls), args_json=json.dumps(args), **fields)
        return (await self.ask("Spawn", request)).server.id

    async def call(self, server: str, method: str, *args: Any, **fields: Any) -> Any:
        options = {key: fields.pop(key) for key in ("timeout",) if key in fields}
        fields.setdefault("args_json", json.dumps(args))
        request = api_pb2.CallRequest(server_id=server, method=method, **fields)
        return json.loads((await self.ask("Call", request, **options)).reply_json)

    async def cast(self, server: str, method: str, *args: Any, **fields: Any) -> None:
        fields.setdefault("args_json", json.dumps(args))
        request = api_pb2.CastRequest(server_id=server, method=method, **fields)
        await self.ask("Cast", request)

    async def move(self, server: str, to: str) -> Any:
        request = api_pb2.MigrateRequest(server_id=server, to_node=to)
        return (await self.ask("Migrate", request)).report


@dataclasses.dataclass
class Cluster:
    a: migrate.Node
    b: migrate.Node
    outside: Outside
    """A client of node a."""
    other: Outside
    """A client of node b."""
    token: str


@contextlib.asynccontextmanager
async def cluster(tmp_path: pathlib.Path, **options: Any) -> AsyncIterator[Cluster]:
    directory = f"memory://{secrets.token_hex(4)}"
    secret = tmp_path / "cluster.secret"
    async with contextlib.AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                migrate.Node(
                    name=name,
                    directory=directory,
                    secret_file=secret,
                    spawnable=ALL,
                    options=migrate.NodeOptions(**options),
                    data=tmp_path / "journals" if name == "a" else None,
                )
            )
            for name in ("a", "b")
        ]
        token = (tmp_path / "cluster.token").read_text().strip()
        clients = [
            Outside(await stack.enter_async_context(grpc.aio.insecure_channel(n.address)), token)
            for n in nodes
        ]
        yield Cluster(*nodes, *clients, token)


def run(work: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(BOUND_S):
            return await work

    return asyncio.run(bounded())


async def refused(work: Awaitable[Any]) -> Refused:
    try:
        value = await work
    except Refused as error:
        return error
    raise AssertionError(f"it was to be refused and returned {value!r}")


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what gives no event of its own; the test's bound ends it if it never holds."""
    while not holds():  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.001)


def fresh_events(cls: type[Gate] | type[Slow]) -> None:
    cls.entered = asyncio.Event()
    cls.go_on = asyncio.Event()


REQUESTS = {
    "Spawn": api_pb2.SpawnRequest(cls=name_of(Counter)),
    "Call": api_pb2.CallRequest(server_name="hits", method="incr"),
    "Cast": api_pb2.CastRequest(server_name="hits", method="incr"),
    "WhereIs": api_pb2.WhereIsRequest(name="hits"),
    "List": api_pb2.ListRequest(),
    "Info": api_pb2.InfoRequest(server_name="hits"),
    "Migrate": api_pb2.MigrateRequest(server_name="hits", to_node="b"),
    "Replicate": api_pb2.ReplicateRequest(server_name="hits", nodes=["b"]),
}


# --------------------------------------------------------------------- the token


def test_the_requests_of_these_tests_are_every_verb_of_the_service():
    service = api_pb2.DESCRIPTOR.services_by_name["Api"]

    assert sorted(REQUESTS) == sorted(method.name for method in service.methods)


def test_without_the_token_no_verb_does_anything(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            hits = await c.outside.spawn(Counter, name="hits")
            wrong: list[tuple[tuple[str, Any], ...]] = [
                (),
                (("authorization", "Bearer " + "x" * len(c.token)),),
                (("authorization", "Bearer"),),
                (("authorization", c.token),),
                (("authorization", f"Basic {c.token}"),),
                (("authorization", f"Bearer {c.token[:-1]}"),),
                (("authorization", f"Bearer {c.token}x"),),
                (("authorization-bin", f"Bearer {c.token}".encode()),),
                # Two of them are nobody's in particular.
                (
                    ("authorization", f"Bearer {c.token}"),
                    ("authorization", "Bearer something-else"),
                ),
            ]
            for metadata in wrong:
                for verb, request in REQUESTS.items():
                    error = await refused(c.outside.ask(verb, request, metadata=metadata))
                    assert error.code is Code.UNAUTHENTICATED, (metadata, verb)
                    assert error.detail.type == "migrate.AuthError"
                    assert error.outcome == types_pb2.OUTCOME_NOT_DONE
            listed = await c.outside.ask("List", api_pb2.ListRequest())
            assert [(s.id, s.node) for s in listed.servers] == [(hits, "a")]
            assert await c.outside.call(hits, "value") == 0

    run(main())


def test_the_right_token_is_taken_whatever_the_case_of_the_scheme(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for scheme in ("Bearer", "bearer", "BEARER"):
                metadata = (("authorization", f"{scheme} {c.token}"),)
                await c.outside.ask("List", api_pb2.ListRequest(), metadata=metadata)

    run(main())


def test_a_large_request_without_the_token_is_refused_unread(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            request = api_pb2.CallRequest(server_id="x", args_json=" " * 3_000_000)
            error = await refused(c.outside.ask("Call", request, metadata=()))
            assert error.code is Code.UNAUTHENTICATED

    run(main())


def test_the_token_is_in_a_file_of_its_own_that_only_its_user_can_read(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            path = tmp_path / "cluster.token"
            assert path.stat().st_mode & 0o777 == 0o600
            assert c.token.encode() not in (tmp_path / "cluster.secret").read_bytes()
            assert c.a._gateway.token_file == c.b._gateway.token_file == path

    run(main())


def test_a_token_file_that_others_can_read_keeps_the_node_from_starting(tmp_path: pathlib.Path):
    path = tmp_path / "api.token"
    path.write_text("t" * 43)
    path.chmod(0o644)

    async def main() -> None:
        async with migrate.Node(secret_file=tmp_path / "s", token_file=path):
            raise AssertionError("it started")

    with pytest.raises(migrate.AuthError, match="chmod 600") as caught:
        run(main())
    assert caught.value.outcome is Outcome.NOT_DONE


@pytest.mark.parametrize(
    "content", ["", "short", "t" * 31, "two words" * 8, "é" * 40, "a\n" * 40, "t" * 5000]
)
def test_a_file_that_holds_no_token_is_refused_and_left_alone(tmp_path: pathlib.Path, content: str):
    path = tmp_path / "api.token"
    path.write_text(content, encoding="utf-8")
    path.chmod(0o600)

    with pytest.raises(auth.SecretFileError, match="API token"):
        auth.load_or_create_token(path)

    assert path.read_text(encoding="utf-8") == content


def test_a_token_of_the_users_own_is_taken_without_the_white_space_around_it(
    tmp_path: pathlib.Path,
):
    path = tmp_path / "api.token"
    path.write_text("0123456789abcdef" * 2 + "\r\n")
    path.chmod(0o600)

    assert auth.load_or_create_token(path) == "0123456789abcdef" * 2


def test_the_token_file_is_beside_the_secret_unless_the_environment_names_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LIVEMIGRATE_TOKEN_FILE", raising=False)
    assert auth.default_token_path("/x/cluster.secret") == pathlib.Path("/x/cluster.token")
    # Never the secret itself.
    assert auth.default_token_path("/x/my.token") == pathlib.Path("/x/my.token.token")

    monkeypatch.setenv("LIVEMIGRATE_TOKEN_FILE", str(tmp_path / "t"))
    assert auth.default_token_path("/x/cluster.secret") == tmp_path / "t"


# ---------------------------------------------------------- health and reflection


def test_health_is_told_without_a_token(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            health = health_pb2_grpc.HealthStub(c.outside.channel)
            for service in ("", "livemigrate.v1.Api"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health.Check(health_pb2.HealthCheckRequest(service="livemigrate.v1.Link"))
            assert caught.value.code() is Code.NOT_FOUND

    run(main())


def test_malformed_health_requests_are_refused(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            check = c.outside.channel.unary_unary("/grpc.health.v1.Health/Check")
            watch = c.outside.channel.unary_stream("/grpc.health.v1.Health/Watch")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await check(b"\xff\xff\xff")
            assert caught.value.code() is Code.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch(b"\xff\xff\xff").read()
            assert caught.value.code() is Code.INVALID_ARGUMENT

    run(main())


def test_watchers_hear_when_the_node_closes_and_outside_requests_are_refused_then(
    tmp_path: pathlib.Path,
):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            fresh_events(Gate)
            gate = await c.outside.spawn(Gate)
            await c.outside.call(gate, "note", "hold")
            health = health_pb2_grpc.HealthStub(c.outside.channel)
            watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
            for watch in watches:
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

            closing = asyncio.create_task(c.a.close())
            for watch in watches:
                heard = await watch.read()
                assert heard.status == health_pb2.HealthCheckResponse.NOT_SERVING
            await Gate.entered.wait()
            error = await refused(c.outside.ask("List", api_pb2.ListRequest()))
            assert error.code is Code.UNAVAILABLE
            assert error.outcome == types_pb2.OUTCOME_NOT_DONE
            Gate.go_on.set()
            await closing

    run(main())


def test_health_watches_are_bounded_and_make_room_when_they_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gateway, "WATCHERS_MAX", 2)

    async def main() -> None:
        async with cluster(tmp_path) as c:
            health = health_pb2_grpc.HealthStub(c.outside.channel)
            watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
            for watch in watches:
                await watch.read()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health.Watch(health_pb2.HealthCheckRequest()).read()
            assert caught.value.code() is Code.RESOURCE_EXHAUSTED

            watches.pop().cancel()
            await until(lambda: c.a._gateway._health._watchers < 2)
            await health.Watch(health_pb2.HealthCheckRequest()).read()

    run(main())


def test_reflection_names_the_service_to_who_has_the_token(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            stub = reflection_pb2_grpc.ServerReflectionStub(c.outside.channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.ServerReflectionInfo(iter([request])):
                    pass
            assert caught.value.code() is Code.UNAUTHENTICATED

            answers = [
                answer
                async for answer in stub.ServerReflectionInfo(
                    iter([request]), metadata=c.outside.metadata
                )
            ]
            services = {service.name for service in answers[0].list_services_response.service}
            assert "livemigrate.v1.Api" in services
            assert "livemigrate.v1.Link" not in services

    run(main())


# -------------------------------------------------------------------------- spawn


def test_a_class_that_the_node_was_not_told_of_is_neither_imported_nor_spawned(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "untold.py").write_text("raise SystemError('it was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    async def main() -> None:
        async with cluster(tmp_path) as c:
            for cls in ("untold:Thing", "subprocess:Popen", "builtins:list", "", ":", "Counter"):
                error = await refused(c.outside.ask("Spawn", api_pb2.SpawnRequest(cls=cls)))
                assert error.code is Code.PERMISSION_DENIED
                assert error.outcome == types_pb2.OUTCOME_NOT_DONE
            assert "untold" not in sys.modules
            assert not (await c.outside.ask("List", api_pb2.ListRequest())).servers

    run(main())


@pytest.mark.parametrize(
    "spawnable",
    ["collections:Counter", ["no.such.module:Thing"], ["collections:NoSuch"], ["nonsense"], [3]],
)
def test_what_cannot_be_spawned_is_refused_when_the_node_is_made(spawnable: Any):
    with pytest.raises(migrate.UsageError):
        migrate.Node(spawnable=spawnable)


def test_classes_can_be_told_by_name(tmp_path: pathlib.Path):
    async def main() -> None:
        node = migrate.Node(secret_file=tmp_path / "s.secret", spawnable=["collections:Counter"])
        async with node, grpc.aio.insecure_channel(node.address) as channel:
            client = Outside(channel, (tmp_path / "s.token").read_text().strip())
            request = api_pb2.SpawnRequest(cls="collections:Counter", args_json='["hello"]')
            server = (await client.ask("Spawn", request)).server
            assert server.cls == "collections:Counter"
            assert await client.call(server.id, "most_common", 1) == [["l", 2]]

    run(main())


def test_a_spawn_says_where_and_under_which_name(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            request = api_pb2.SpawnRequest(
                cls=name_of(Counter), kwargs_json='{"start": 7}', name="hits", on_node="b"
            )
            server = (await c.outside.ask("Spawn", request)).server
            assert (server.cls, server.node, server.epoch) == (name_of(Counter), "b", 1)
            assert await c.outside.call(server.id, "value") == 7
            found = (await c.other.ask("WhereIs", api_pb2.WhereIsRequest(name="hits"))).server
            assert found == server

            near = await c.outside.spawn(Counter, near_server_id=server.id)
            info = await c.outside.ask("Info", api_pb2.InfoRequest(server_id=near))
            assert info.server.node == "b"
            await c.outside.spawn(Counter, least_loaded=True)
            here = await c.outside.spawn(Counter)
            info = await c.outside.ask("Info", api_pb2.InfoRequest(server_id=here))
            assert info.server.node == "a"

    run(main())


def test_a_spawn_that_cannot_be_is_refused_by_its_own_code(tmp_path: pathlib.Path):
    cls = name_of(Counter)
    cases = {
        Code.INVALID_ARGUMENT: [
            api_pb2.SpawnRequest(cls=cls, on_node="a", least_loaded=True),
            api_pb2.SpawnRequest(cls=cls, on_node="a", near_server_id="x"),
            api_pb2.SpawnRequest(cls=cls, name="x" * 256),
            api_pb2.SpawnRequest(cls=cls, name="a\nb"),
            api_pb2.SpawnRequest(cls=cls, request_id="x" * 256),
            api_pb2.SpawnRequest(cls=cls, args_json="{}"),
            api_pb2.SpawnRequest(cls=cls, timeout_s=math.nan),
            api_pb2.SpawnRequest(cls=cls, timeout_s=math.inf),
            api_pb2.SpawnRequest(cls=name_of(Takes), kwargs_json='{"options": 1}'),
        ],
        Code.NOT_FOUND: [
            api_pb2.SpawnRequest(cls=cls, on_node="nowhere"),
            api_pb2.SpawnRequest(cls=cls, near_server_id="nothing"),
        ],
        Code.ALREADY_EXISTS: [api_pb2.SpawnRequest(cls=cls, name="hits")],
        # What a constructor raises is no code that a client would repeat.
        Code.UNKNOWN: [
            api_pb2.SpawnRequest(cls=cls, args_json="[-1]"),
            api_pb2.SpawnRequest(cls=cls, args_json="[-1]", on_node="b"),
            api_pb2.SpawnRequest(cls=cls, args_json="[1, 2, 3]"),
        ],
    }

    async def main() -> None:
        async with cluster(tmp_path) as c:
            hits = await c.outside.spawn(Counter, name="hits")
            for code, requests in cases.items():
                for request in requests:
                    error = await refused(c.outside.ask("Spawn", request))
                    assert error.code is code, (request, str(error))
                    assert error.outcome == types_pb2.OUTCOME_NOT_DONE
            listed = await c.outside.ask("List", api_pb2.ListRequest())
            assert [server.id for server in listed.servers] == [hits]

    run(main())


def test_what_a_constructor_raised_is_told_with_its_type(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                error = await refused(c.outside.spawn(Counter, -1, on_node=node))
                assert error.detail.type == "ValueError"
                assert error.detail.message == "start=-1 is below zero"

    run(main())


def test_a_spawn_that_is_repeated_gives_the_same_server(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            same = await asyncio.gather(
                *(c.outside.spawn(Counter, 1, request_id="r1", on_node="b") for _ in range(20))
            )
            assert len(set(same)) == 1
            assert await c.outside.spawn(Counter, 1, request_id="r2", on_node="b") not in same
            error = await refused(c.outside.spawn(Counter, 2, request_id="r1", on_node="b"))
            assert error.code is Code.INVALID_ARGUMENT
            assert len((await c.outside.ask("List", api_pb2.ListRequest())).servers) == 2

    run(main())


def test_a_spawn_that_failed_with_nothing_done_can_be_repeated(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            hits = await c.outside.spawn(Counter, name="hits")
            error = await refused(c.outside.spawn(Counter, name="hits", request_id="r"))
            assert error.code is Code.ALREADY_EXISTS
            await c.a.stop(await c.a.whereis("hits"))
            assert await c.outside.spawn(Counter, name="hits", request_id="r") != hits

    run(main())


def test_a_spawn_goes_on_when_its_caller_has_no_more_time(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            fresh_events(Slow)
            Slow.made = 0
            asked = api_pb2.SpawnRequest(cls=name_of(Slow), request_id="r", timeout_s=0.05)
            error = await refused(c.outside.ask("Spawn", asked))
            assert error.code is Code.DEADLINE_EXCEEDED
            assert error.outcome == types_pb2.OUTCOME_UNKNOWN

            # Likewise when the client hangs up.
            asked.timeout_s = 0
            await Slow.entered.wait()
            hung_up = asyncio.create_task(c.outside.ask("Spawn", asked))
            await until(lambda: c.a._gateway._requests > 0)
            hung_up.cancel()
            await asyncio.wait([hung_up])
            await until(lambda: c.a._gateway._requests == 0)

            Slow.go_on.set()
            server = (await c.outside.ask("Spawn", asked)).server
            assert Slow.made == 1
            info = await c.outside.ask("Info", api_pb2.InfoRequest(server_id=server.id))
            assert info.server.id == server.id

    run(main())


def test_remembered_spawns_are_bounded(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gateway, "SPAWNS_KEPT_MAX", 2)

    async def main() -> None:
        async with cluster(tmp_path) as c:
            first = await c.outside.spawn(Counter, request_id="r1")
            second = await c.outside.spawn(Counter, request_id="r2")
            await c.outside.spawn(Counter, request_id="r3")
            assert await c.outside.spawn(Counter, request_id="r2") == second
            assert await c.outside.spawn(Counter, request_id="r1") != first
            assert len(c.a._gateway._spawns) == 2

            # Those under way are never forgotten.
            fresh_events(Slow)
            waiting = [
                asyncio.create_task(c.outside.spawn(Slow, request_id=f"s{i}")) for i in range(2)
            ]
            spawns = c.a._gateway._spawns
            await until(lambda: sum(not s.task.done() for s in spawns.values()) == 2)
            error = await refused(c.outside.spawn(Counter, request_id="r4"))
            assert error.code is Code.UNAVAILABLE
            Slow.go_on.set()
            await asyncio.gather(*waiting)

    run(main())


# --------------------------------------------------------------------------- call


def test_arguments_and_replies_are_json(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                server = await c.outside.spawn(Counter, on_node=node)
                sent = [None, True, 3, 2**80, 1.5, "é\u2028\x00", [], {}, {"a": [1, {"b": None}]}]
                request = api_pb2.CallRequest(
                    server_id=server,
                    method="echo",
                    args_json=json.dumps(sent),
                    kwargs_json='{"by": 3, "an odd key": 4}',
                )
                reply = json.loads((await c.outside.ask("Call", request)).reply_json)
                assert reply == [sent, {"by": 3, "an odd key": 4}]
                assert await c.outside.call(server, "me") == {"ref": server}

    run(main())


def test_a_server_is_called_by_id_or_by_name_from_any_node(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Counter, name="hits", on_node="b")
            by_name = api_pb2.CallRequest(server_name="hits", method="incr")
            for client in (c.outside, c.other):
                await client.ask("Call", by_name)
                await client.call(server, "incr")
            assert await c.outside.call(server, "value") == 4

            for request in (
                api_pb2.CallRequest(method="incr"),
                api_pb2.CallRequest(server_id=server, server_name="hits", method="incr"),
                api_pb2.CallRequest(server_name="x" * 256, method="incr"),
                api_pb2.CallRequest(server_id="x" * 256, method="incr"),
                api_pb2.CallRequest(server_id="a\nb", method="incr"),
            ):
                error = await refused(c.outside.ask("Call", request))
                assert error.code is Code.INVALID_ARGUMENT
            assert await c.outside.call(server, "value") == 4

    run(main())


def test_a_server_that_is_not_there_is_not_found_and_leaves_nothing_behind(
    tmp_path: pathlib.Path,
):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for request in (
                api_pb2.CallRequest(server_id="counter-0000", method="incr"),
                api_pb2.CallRequest(server_name="nobody", method="incr"),
            ):
                error = await refused(c.outside.ask("Call", request))
                assert error.code is Code.NOT_FOUND
                assert error.detail.type == "migrate.ServerNotFound"
                assert error.outcome == types_pb2.OUTCOME_NOT_DONE
            assert not c.a._driver.core.routes

    run(main())


NOT_FROM_OUTSIDE = [
    "_hidden",
    "__init__",
    "__reduce__",
    "on_stop",
    "tick",
    "nothing",
    "",
    "a b",
    "x" * 300,
    "n",
]


def test_private_names_hooks_and_timers_do_not_answer_from_outside(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                server = await c.outside.spawn(Counter, on_node=node)
                for method in NOT_FROM_OUTSIDE:
                    for verb in (c.outside.call, c.outside.cast):
                        error = await refused(verb(server, method))
                        assert error.code is Code.PERMISSION_DENIED, method
                        assert error.detail.type == "migrate.AuthError"
                        assert error.outcome == types_pb2.OUTCOME_NOT_DONE
                assert await c.outside.call(server, "value") == 0

    run(main())


def test_once_a_class_opens_methods_only_those_answer_from_outside(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                server = await c.outside.spawn(Chosen, on_node=node, name=f"chosen-{node}")
                for verb in (c.outside.call, c.outside.cast):
                    error = await refused(verb(server, "inner"))
                    assert error.code is Code.PERMISSION_DENIED
                    assert "also, opened" in error.message
                assert await c.outside.call(server, "also") == "also"
                assert await c.outside.call(server, "opened") == []
                await c.outside.cast(server, "opened")
                # The cluster's own callers may.
                assert await c.a.call(await c.a.whereis(f"chosen-{node}"), "inner") == "inner"

    run(main())


def test_the_servers_own_class_refuses_whatever_the_gateway_believes(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
    # A cast that passed the gateway's check, and then found the server moved to a class that
    # opens less, must not run: the mark in the request is what decides.
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                server = await c.outside.spawn(Chosen, on_node=node)
                believed = (name_of(Chosen), ("also", "inner", "opened"))
                c.a._gateway._classes[server] = believed
                await c.outside.cast(server, "inner")
                assert await c.outside.call(server, "opened") == []

                ref = c.a._ref(await c.a._read(server))
                with pytest.raises(host.NotOpen):
                    await c.a.call(ref, host.OUTSIDE + "inner")
                with pytest.raises(host.NotOpen):
                    await c.a.call(ref, host.OUTSIDE + host.OUTSIDE + "also")
                # The control: without the mark it runs.
                assert await c.a.call(ref, "inner") == "inner"
                assert await c.outside.call(server, "opened") == ["inner"]

    run(main())


BAD_JSON = [
    "nonsense", "[", "[1]]", "[1,]", "['a']", "[NaN]", "[Infinity]", "[-Infinity]", "[1e999]",
    '["\\ud800"]', '["\x00"]', "[01]", "{}", '"text"', "3", "null", "[" * 5000,
    "[" * 101 + "]" * 101, "[" + '{"a":' * 120 + "1" + "}" * 120 + "]", "[" + "9" * 5000 + "]",
]  # fmt: skip


def test_what_is_not_a_json_array_is_refused_and_nothing_runs(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Counter)
            for text in BAD_JSON:
                for verb in (c.outside.call, c.outside.cast):
                    error = await refused(verb(server, "echo", args_json=text))
                    assert error.code is Code.INVALID_ARGUMENT, text[:40]
                    assert "args_json" in error.message
                    assert error.outcome == types_pb2.OUTCOME_NOT_DONE
            for text in ["[]", "3", "nonsense", '{"a": NaN}', "{1: 2}"]:
                error = await refused(c.outside.call(server, "echo", kwargs_json=text))
                assert error.code is Code.INVALID_ARGUMENT
                assert "kwargs_json" in error.message

    run(main())


def test_nesting_up_to_the_limit_passes(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            deep = "[" * 98 + "]" * 98
            for node in ("a", "b"):
                server = await c.outside.spawn(Counter, on_node=node)
                request = api_pb2.CallRequest(server_id=server, method="echo", args_json=deep)
                reply = (await c.outside.ask("Call", request)).reply_json
                assert json.loads(reply) == [json.loads(deep), {}]

    run(main())


def test_a_request_over_the_limit_is_refused(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Counter)
            text = json.dumps(["x" * (5 << 20)])
            error = await refused(c.outside.call(server, "echo", args_json=text))
            # By gRPC itself, before anything of ours has seen it.
            assert error.code is Code.RESOURCE_EXHAUSTED
            assert await c.outside.call(server, "value") == 0
            with pytest.raises(migrate.UsageError, match="at most"):
                gateway.parse_request(api_pb2.CallRequest, b" " * (gateway.REQUEST_BYTES_MAX + 1))

    run(main())


def test_a_large_request_below_the_limit_passes(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Counter, on_node="b")
            sent = [list(range(100_000)), "é" * 100_000]
            assert await c.outside.call(server, "echo", *sent) == [sent, {}]

    run(main())


def test_bytes_that_are_no_request_are_refused(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for verb in REQUESTS:
                raw = c.outside.channel.unary_unary(f"/livemigrate.v1.Api/{verb}")
                for data in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x01\xff", b"\x00" * 40):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await raw(data, metadata=c.outside.metadata)
                    assert caught.value.code() is Code.INVALID_ARGUMENT
            unknown = c.outside.channel.unary_unary("/livemigrate.v1.Api/Stop")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unknown(b"", metadata=c.outside.metadata)
            assert caught.value.code() is Code.UNIMPLEMENTED

    run(main())


def test_what_a_handler_raised_is_told_with_type_text_and_traceback(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                server = await c.outside.spawn(Counter, on_node=node)
                error = await refused(c.outside.call(server, "fail", "no such thing"))
                assert error.code is Code.UNKNOWN
                assert error.detail.type == "LookupError"
                assert error.detail.message == "no such thing"
                assert error.detail.server == server
                assert error.outcome == types_pb2.OUTCOME_DONE
                assert "raise LookupError(text)" in error.detail.remote_traceback

                # Wrong arguments are the handler's too.
                error = await refused(c.outside.call(server, "incr", 1, 2, 3))
                assert (error.code, error.detail.type) == (Code.UNKNOWN, "TypeError")

    run(main())


def test_long_texts_of_errors_are_cut_to_what_trailers_hold(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                server = await c.outside.spawn(Counter, on_node=node)
                for text in ("x" * 100_000, "é" * 50_000, "\U0001f600" * 30_000, "\x00\n" * 9_000):
                    error = await refused(c.outside.call(server, "fail", text))
                    assert error.code is Code.UNKNOWN
                    assert error.detail.type == "LookupError"
                    assert error.detail.message[:20] == text[:20]
                    assert len(error.raw) <= 4_500

    run(main())


def test_a_retriable_error_that_a_handler_raised_is_not_retriable_outside(
    tmp_path: pathlib.Path,
):
    # Its MailboxFull says of another request that it was not done; this one ran.
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                server = await c.outside.spawn(Counter, on_node=node)
                error = await refused(c.outside.call(server, "full"))
                assert error.code is Code.UNKNOWN
                assert error.outcome == types_pb2.OUTCOME_DONE
                assert error.detail.type == "migrate.errors.MailboxFull"

    run(main())


def test_a_handler_that_exits_does_not_end_the_node(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                server = await c.outside.spawn(Counter, on_node=node)
                error = await refused(c.outside.call(server, "leave"))
                assert error.detail.type == "SystemExit"
                assert await c.outside.call(server, "incr") == 1

    run(main())


class Colour(enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    TWO = 2


@dataclasses.dataclass
class Point:
    x: float
    tags: tuple[str, ...] = ()


def test_values_that_json_does_not_have_become_what_the_text_says():
    key = uuid.UUID(int=5)
    value = {
        "tuple": (1, (2,)),
        "set": {3},
        "frozenset": frozenset("a"),
        "point": Point(1.5, ("a", "b")),
        "enums": [Colour.RED, Number.TWO],
        "bytes": b"\xff\x00",
        "bytearray": bytearray(b"abc"),
        "day": datetime.date(2026, 1, 2),
        "moment": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        "uuid": key,
        "decimal": decimal.Decimal("1.10"),
        7: "seven",
        Colour.RED: 1,
    }

    assert json.loads(json_form.reply_json(value)) == {
        "tuple": [1, [2]],
        "set": [3],
        "frozenset": ["a"],
        "point": {"x": 1.5, "tags": ["a", "b"]},
        "enums": ["red", 2],
        "bytes": "/wA=",
        "bytearray": "YWJj",
        "day": "2026-01-02",
        "moment": "2026-01-02T03:04:05+00:00",
        "uuid": str(key),
        "decimal": "1.10",
        "7": "seven",
        "red": 1,
    }


def circle() -> Any:
    value: list[Any] = []
    value.append({"again": value})
    return value


def doubled() -> Any:
    # A hundred small lists that would take 2 ** 99 values to write.
    value: Any = [0]
    for _ in range(99):
        value = [value, value]
    return value


class Raises:
    @property
    def __dataclass_fields__(self) -> Any:
        raise RuntimeError("a broken property")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), "result"),
        ([1, {"a": [object()]}], "result[1]['a'][0]"),
        (Point(math.nan), "result.x"),
        ({"x": math.inf}, "result['x']"),
        ([-math.inf], "result[0]"),
        ({"x": "\ud800"}, "result['x']"),
        ({"\ud800": 1}, "result['\\ud800']"),
        ({(1, 2): 3}, "result"),
        ({None: 3}, "result"),
        ({True: 3}, "result"),
        ({1: 2, "1": 3}, "result"),
        (1 << 20_000, "result"),
        (Point, "result"),
        ({"f": print}, "result['f']"),
        (1j, "result"),
        ("x" * (5 << 20), "result"),
        (["x" * 1000] * 5000, "result"),
        ("\x01" * (1 << 20), "result"),
        (doubled(), "result"),
    ],
    ids=itertools.count(),
)
def test_a_result_without_json_form_is_an_error_that_names_the_path(value: Any, path: str):
    with pytest.raises(json_form.NotJson) as caught:
        json_form.reply_json(value)

    assert caught.value.cause == path
    assert caught.value.outcome is Outcome.DONE
    assert status.code_of(caught.value) is Code.UNKNOWN


def test_a_result_that_contains_itself_is_an_error():
    with pytest.raises(json_form.NotJson, match="contains itself"):
        json_form.reply_json(circle())


def test_a_result_whose_own_code_fails_is_an_error():
    with pytest.raises(json_form.NotJson, match="a broken property"):
        json_form.reply_json([Raises()])


def test_a_result_that_is_not_json_is_told_as_done(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            try:
                for node in ("a", "b"):
                    server = await c.outside.spawn(Values, on_node=node)
                    Values.value = {"rows": [1, complex(1, 2)]}
                    error = await refused(c.outside.call(server, "get"))
                    assert error.code is Code.UNKNOWN
                    assert error.detail.type == "migrate.UsageError"
                    assert error.detail.cause == "result['rows'][1]"
                    assert error.detail.server == server
                    assert error.outcome == types_pb2.OUTCOME_DONE
                    # Many values are written in a thread; the error is the same.
                    Values.value = [*range(50_000), complex(1, 2)]
                    error = await refused(c.outside.call(server, "get"))
                    assert error.detail.cause == "result[50000]"
                    Values.value = list(range(50_000))
                    assert await c.outside.call(server, "get") == Values.value
            finally:
                Values.value = None

    run(main())


def test_a_call_ends_with_its_time_and_says_that_nobody_knows(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            fresh_events(Gate)
            for node in ("a", "b"):
                server = await c.outside.spawn(Gate, on_node=node)
                error = await refused(c.outside.call(server, "block", timeout_s=0.05))
                assert error.code is Code.DEADLINE_EXCEEDED
                assert error.detail.type == "migrate.CallTimeout"
                assert error.outcome == types_pb2.OUTCOME_UNKNOWN
                # What waited behind it when its time was over is never run.
                error = await refused(c.outside.call(server, "note", "late", timeout_s=0.05))
                assert error.code is Code.DEADLINE_EXCEEDED
                Gate.go_on.set()
                assert await c.outside.call(server, "noted") == []
                fresh_events(Gate)

    run(main())


def test_the_deadline_of_grpc_is_the_calls_own(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path, call_timeout_s=None) as c:
            fresh_events(Gate)
            server = await c.outside.spawn(Gate, on_node="b")
            blocked = asyncio.create_task(c.outside.call(server, "block"))
            await Gate.entered.wait()
            error = await refused(c.outside.call(server, "note", "late", timeout=0.05))
            assert error.code is Code.DEADLINE_EXCEEDED
            Gate.go_on.set()
            assert await blocked == "done"
            assert await c.outside.call(server, "noted") == []

    run(main())


def test_a_client_that_hangs_up_withdraws_its_call(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                fresh_events(Gate)
                server = await c.outside.spawn(Gate, on_node=node)
                blocked = asyncio.create_task(c.outside.call(server, "block"))
                await Gate.entered.wait()
                gone = asyncio.create_task(c.outside.call(server, "note", "withdrawn"))
                await until(lambda: c.a._gateway._requests == 2)
                gone.cancel()
                await asyncio.wait([gone])
                await until(lambda: c.a._gateway._requests == 1)
                Gate.go_on.set()
                assert await blocked == "done"
                # An envelope that has left is executed and its result dropped (DESIGN 6).
                assert await c.outside.call(server, "noted") in ([], ["withdrawn"])
                assert c.a._gateway._requests_bytes == 0

    run(main())


@pytest.mark.parametrize("timeout_s", [math.nan, math.inf, 1e9])
def test_a_timeout_that_is_none_is_refused(tmp_path: pathlib.Path, timeout_s: float):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Counter)
            error = await refused(c.outside.call(server, "incr", timeout_s=timeout_s))
            assert error.code is Code.INVALID_ARGUMENT
            assert await c.outside.call(server, "incr", timeout_s=-math.inf) == 1

    run(main())


def test_a_cast_returns_once_the_mailbox_has_it(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            for node in ("a", "b"):
                fresh_events(Gate)
                server = await c.outside.spawn(Gate, on_node=node)
                blocked = asyncio.create_task(c.outside.call(server, "block"))
                await Gate.entered.wait()
                for i in range(3):
                    await c.outside.cast(server, "note", str(i))
                assert not blocked.done()
                Gate.go_on.set()
                assert await blocked == "done"
                assert await c.outside.call(server, "noted") == ["0", "1", "2"]

    run(main())


def test_requests_are_bounded_in_number_and_in_bytes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            fresh_events(Gate)
            server = await c.outside.spawn(Gate)
            monkeypatch.setattr(gateway, "REQUESTS_MAX", 1)
            blocked = asyncio.create_task(c.outside.call(server, "block"))
            await Gate.entered.wait()
            error = await refused(c.outside.call(server, "note", "too many"))
            assert error.code is Code.UNAVAILABLE
            assert error.outcome == types_pb2.OUTCOME_NOT_DONE
            monkeypatch.setattr(gateway, "REQUESTS_MAX", 10)
            monkeypatch.setattr(gateway, "REQUESTS_BYTES_MAX", 1000)
            error = await refused(c.outside.call(server, "note", "x" * 1000))
            assert error.code is Code.UNAVAILABLE
            Gate.go_on.set()
            assert await blocked == "done"
            assert await c.outside.call(server, "noted") == []

    run(main())


def test_a_bug_of_ours_tells_nothing_but_where_to_look(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def main() -> None:
        async with cluster(tmp_path) as c:

            async def broken() -> None:
                raise ZeroDivisionError("a secret of the node")

            monkeypatch.setattr(c.a, "servers", broken)
            error = await refused(c.outside.ask("List", api_pb2.ListRequest()))
            assert error.code is Code.INTERNAL
            assert error.detail.type == "migrate.InternalError"
            assert b"a secret of the node" not in error.raw

    run(main())
    assert "a secret of the node" in caplog.text


# ------------------------------------------------------------------ moves and views


def test_calls_from_outside_go_on_while_their_server_moves(tmp_path: pathlib.Path):
    callers, calls_each, moves = 4, 40, 12

    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Counter)
            seen: list[list[int]] = [[] for _ in range(callers)]
            moving = asyncio.Event()

            async def caller(mine: list[int], client: Outside) -> None:
                while len(mine) < calls_each or not moving.is_set():
                    mine.append(await client.call(server, "incr"))

            async def mover() -> None:
                for i in range(moves):
                    report = await c.outside.move(server, "ba"[i % 2])
                    assert (report.source, report.target) == ("ab"[i % 2], "ba"[i % 2])
                    assert report.epoch == i + 2
                moving.set()

            await asyncio.gather(
                mover(), *(caller(seen[i], (c.outside, c.other)[i % 2]) for i in range(callers))
            )
            values = sorted(value for mine in seen for value in mine)
            assert values == list(range(1, len(values) + 1))
            assert all(mine == sorted(mine) for mine in seen)

    run(main())


def test_a_move_reports_what_it_did(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Counter, name="hits")
            request = api_pb2.MigrateRequest(server_name="hits", to_node="b", timeout_s=30)
            report = (await c.outside.ask("Migrate", request)).report
            assert (report.server, report.source, report.target) == (server, "a", "b")
            assert report.epoch == 2
            assert 0 < report.downtime_s <= report.total_s
            assert report.bytes_sent > 0
            assert report.rounds == 1

            cases = [
                (api_pb2.MigrateRequest(server_id=server, to_node="b"), Code.FAILED_PRECONDITION),
                (api_pb2.MigrateRequest(server_id=server, to_node="z"), Code.NOT_FOUND),
                (api_pb2.MigrateRequest(server_id=server), Code.INVALID_ARGUMENT),
                (api_pb2.MigrateRequest(to_node="a"), Code.INVALID_ARGUMENT),
                (api_pb2.MigrateRequest(server_id="nothing", to_node="a"), Code.NOT_FOUND),
            ]
            for request, code in cases:
                error = await refused(c.outside.ask("Migrate", request))
                assert error.code is code
                assert error.outcome == types_pb2.OUTCOME_NOT_DONE
            info = await c.outside.ask("Info", api_pb2.InfoRequest(server_id=server))
            assert info.server.node == "b"

    run(main())


def test_a_durable_server_is_asked_for_from_outside(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Counter, name="hits", durable=True)
            info = (await c.outside.ask("Info", api_pb2.InfoRequest(server_id=server))).server
            assert info.durable
            assert len(list((tmp_path / "journals").iterdir())) == 1
            plain = await c.outside.spawn(Counter)
            info = (await c.outside.ask("Info", api_pb2.InfoRequest(server_id=plain))).server
            assert not info.durable
            cases: list[tuple[dict[str, Any], Code]] = [
                ({"on_node": "b"}, Code.INVALID_ARGUMENT),  # no place for journals there
                (
                    {"standbys": 1, "standby_mode": types_pb2.STANDBY_MODE_ASYNC},
                    Code.INVALID_ARGUMENT,
                ),
            ]
            for fields, code in cases:
                error = await refused(c.outside.spawn(Counter, durable=True, **fields))
                assert error.code is code, fields
                assert error.outcome == types_pb2.OUTCOME_NOT_DONE

    run(main())


def test_standbys_are_asked_for_and_ended_from_outside(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Counter, name="hits")

            async def replicate(**fields: Any) -> types_pb2.ServerInfo:
                request = api_pb2.ReplicateRequest(server_name="hits", timeout_s=30, **fields)
                info: types_pb2.ServerInfo = (await c.outside.ask("Replicate", request)).server
                assert info.id == server
                return info

            info = await replicate(nodes=["b"])
            assert (list(info.standbys), info.mode) == (["b"], types_pb2.STANDBY_MODE_SYNC)
            info = await replicate(count=1, mode=types_pb2.STANDBY_MODE_ASYNC)
            assert (list(info.standbys), info.mode) == (["b"], types_pb2.STANDBY_MODE_ASYNC)
            cases: list[tuple[dict[str, Any], Code]] = [
                ({"nodes": ["a"]}, Code.FAILED_PRECONDITION),
                ({"nodes": ["z"]}, Code.NOT_FOUND),
                ({"nodes": ["b"], "count": 1}, Code.INVALID_ARGUMENT),
                ({"count": 3}, Code.FAILED_PRECONDITION),
                ({"count": 99}, Code.INVALID_ARGUMENT),
                ({"nodes": ["b"], "mode": 7}, Code.INVALID_ARGUMENT),
            ]
            for fields, code in cases:
                error = await refused(replicate(**fields))
                assert error.code is code, fields
                assert error.outcome == types_pb2.OUTCOME_NOT_DONE
            info = await replicate()
            assert (list(info.standbys), info.mode) == ([], types_pb2.STANDBY_MODE_UNSPECIFIED)

            spawned = await c.outside.spawn(Counter, name="more", standbys=1)
            info = (await c.outside.ask("Info", api_pb2.InfoRequest(server_id=spawned))).server
            assert list(info.standbys) == ["b"]

    run(main())


def test_a_move_of_a_busy_server_outlives_its_callers_time(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            fresh_events(Gate)
            server = await c.outside.spawn(Gate)
            blocked = asyncio.create_task(c.outside.call(server, "block"))
            await Gate.entered.wait()
            request = api_pb2.MigrateRequest(server_id=server, to_node="b", timeout_s=0.05)
            error = await refused(c.outside.ask("Migrate", request))
            assert error.code is Code.DEADLINE_EXCEEDED
            assert error.outcome == types_pb2.OUTCOME_UNKNOWN
            Gate.go_on.set()
            assert await blocked == "done"
            info = api_pb2.InfoRequest(server_id=server)
            await until(lambda: server in c.b._driver.core.hosted)
            assert (await c.outside.ask("Info", info)).server.node == "b"

    run(main())


def test_servers_and_nodes_are_listed_in_pages(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            ids = {await c.outside.spawn(Counter, on_node="ab"[i % 2]) for i in range(5)}
            chosen = await c.outside.spawn(Chosen, name="one", on_node="b")

            found, token, pages = [], "", 0
            while pages == 0 or token:
                request = api_pb2.ListRequest(page_size=2, page_token=token)
                page = await c.other.ask("List", request)
                assert len(page.servers) <= 2
                # The nodes come once.
                names = [(n.name, n.id, n.address, n.pid) for n in page.nodes]
                expected = [(n.name, n.id, n.address, os.getpid()) for n in (c.a, c.b)]
                assert names == (expected if pages == 0 else [])
                found += [server.id for server in page.servers]
                token, pages = page.next_page_token, pages + 1
            assert found == sorted({*ids, chosen})
            assert pages == 3

            async def listed(**fields: Any) -> list[str]:
                answer = await c.outside.ask("List", api_pb2.ListRequest(**fields))
                return [server.id for server in answer.servers]

            assert len(await listed(node="a")) == 3
            assert len(await listed(node="b")) == 3
            assert await listed(cls=name_of(Chosen)) == [chosen]
            assert await listed(cls=name_of(Chosen), node="a") == []
            error = await refused(listed(node="z"))
            assert error.code is Code.NOT_FOUND
            error = await refused(listed(page_token="x" * 300))
            assert error.code is Code.INVALID_ARGUMENT
            assert await listed(page_token="~") == []
            assert len(await listed(page_size=4_000_000_000)) == 6

    run(main())


def test_one_server_is_described(tmp_path: pathlib.Path):
    async def main() -> None:
        async with cluster(tmp_path) as c:
            server = await c.outside.spawn(Chosen, name="one", on_node="b")
            expected = types_pb2.ServerInfo(
                id=server, name="one", cls=name_of(Chosen), node="b", epoch=1, version=1
            )
            for request in (
                api_pb2.InfoRequest(server_id=server),
                api_pb2.InfoRequest(server_name="one"),
            ):
                assert (await c.outside.ask("Info", request)).server == expected
            for verb, request, code in (
                ("Info", api_pb2.InfoRequest(), Code.INVALID_ARGUMENT),
                ("Info", api_pb2.InfoRequest(server_id="nothing"), Code.NOT_FOUND),
                ("WhereIs", api_pb2.WhereIsRequest(), Code.INVALID_ARGUMENT),
                ("WhereIs", api_pb2.WhereIsRequest(name="nobody"), Code.NOT_FOUND),
            ):
                assert (await refused(c.outside.ask(verb, request))).code is code

    run(main())


CLIENT = """
import sys
import grpc
from rpc.v1 import api_pb2, api_pb2_grpc

address, token_file, cls = sys.argv[1:]
assert not {"migrate", "serializers", "cloudpickle", "msgspec"} & sys.modules.keys()
token = (("authorization", "Bearer " + open(token_file).read().strip()),)
with grpc.insecure_channel(address) as channel:
    api = api_pb2_grpc.ApiStub(channel)
    spawn = api_pb2.SpawnRequest(cls=cls, args_json="[40]", name="hits")
    server = api.Spawn(spawn, metadata=token).server
    api.Cast(api_pb2.CastRequest(server_id=server.id, method="incr"), metadata=token)
    api.Migrate(api_pb2.MigrateRequest(server_id=server.id, to_node="b"), metadata=token)
    call = api_pb2.CallRequest(server_name="hits", method="incr", kwargs_json='{"by": 1}')
    assert api.Call(call, metadata=token).reply_json == "42"
    assert api.WhereIs(api_pb2.WhereIsRequest(name="hits"), metadata=token).server.node == "b"
    assert api.Info(api_pb2.InfoRequest(server_name="hits"), metadata=token).server.epoch == 2
    assert len(api.List(api_pb2.ListRequest(), metadata=token).servers) == 1
    try:
        api.List(api_pb2.ListRequest())
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    print("all verbs")
"""


def test_a_process_with_nothing_but_grpcio_and_the_compiled_proto_can_do_everything(
    tmp_path: pathlib.Path,
):
    protoc = pytest.importorskip("grpc_tools.protoc")
    alien = tmp_path / "alien"
    alien.mkdir()
    protos = sorted((ROOT / "proto" / "rpc" / "v1").glob("*.proto"))
    arguments = [f"-I{ROOT / 'proto'}", f"--python_out={alien}", f"--grpc_python_out={alien}"]
    assert protoc.main(["protoc", *arguments, *map(str, protos)]) == 0
    (alien / "client.py").write_text(textwrap.dedent(CLIENT))

    async def main() -> None:
        async with cluster(tmp_path) as c:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "client.py",
                c.a.address,
                str(tmp_path / "cluster.token"),
                name_of(Counter),
                cwd=alien,
                env={**os.environ, "PYTHONPATH": str(alien)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            out, err = await process.communicate()
            assert (out.decode().strip(), process.returncode) == ("all verbs", 0), err.decode()

    run(main())


# ---------------------------------------------------------------- statuses, parsers


EVERY_ERROR = [
    getattr(errors, name)
    for name in errors.__all__
    if isinstance(getattr(errors, name), type) and issubclass(getattr(errors, name), MigrateError)
]


def test_every_error_has_a_row_in_the_table():
    assert set(status.CODES) == set(EVERY_ERROR)


@pytest.mark.parametrize("kind", EVERY_ERROR)
@pytest.mark.parametrize("outcome", list(Outcome))
def test_an_error_goes_out_and_comes_back(kind: type[MigrateError], outcome: Outcome):
    error = kind("it failed", server="s-1", node="n", cause="why", outcome=outcome)
    if isinstance(error, migrate.HandlerFailed):
        error.exception_type = "shop.NoStock"
    code = status.code_of(error)

    back = status.from_status(code, "it failed", status.to_status(error).SerializeToString())

    assert type(back) is kind
    assert (back.message, back.server, back.node, back.cause) == ("it failed", "s-1", "n", "why")
    assert back.outcome is outcome
    if code in status.REPEATED:
        assert outcome is Outcome.NOT_DONE


def test_codes_that_clients_repeat_are_those_of_grpcs_guide():
    # The codes are chosen so that a client's retry policy can do no harm.
    assert status.code_of(errors.MailboxFull("x")) is Code.RESOURCE_EXHAUSTED
    assert status.code_of(errors.MailboxFull("x", outcome=Outcome.UNKNOWN)) is Code.UNKNOWN
    assert status.code_of(errors.MoveRolledBack("x")) is Code.ABORTED
    assert status.code_of(errors.CallError("x")) is Code.UNKNOWN
    assert status.code_of(errors.CallError("x", outcome=Outcome.NOT_DONE)) is Code.UNAVAILABLE
    assert status.code_of(errors.CallTimeout("x")) is Code.DEADLINE_EXCEEDED


def test_a_child_of_ours_is_told_by_the_name_of_its_public_parent():
    assert pickle.loads(pickle.dumps(host.NotOpen("x"))).message == "x"
    detail = types_pb2.ErrorDetail()
    assert status.to_status(host.NotOpen("x")).details[0].Unpack(detail)
    assert detail.type == "migrate.AuthError"


@given(st.text(), st.integers(min_value=16, max_value=100))
def test_a_cut_text_fits_and_a_short_one_is_whole(text: str, bytes_max: int):
    cut = status.cut(text, bytes_max)

    assert len(cut.encode()) <= bytes_max
    if len(text.encode("utf-8", "backslashreplace")) <= bytes_max:
        assert cut == text.encode("utf-8", "backslashreplace").decode()


texts = st.text(st.characters(), max_size=300).flatmap(
    lambda text: st.sampled_from([text, text * 50])
)


@given(message=texts, name=texts, traceback=texts, node=texts, cause=texts)
def test_a_status_fits_into_trailers_whatever_the_texts(
    message: str, name: str, traceback: str, node: str, cause: str
):
    error = errors.HandlerFailed(
        message, exception_type=name, remote_traceback=traceback * 20, node=node, cause=cause
    )

    rich = status.to_status(error)

    assert rich.ByteSize() <= 4_500
    assert len(rich.message.encode()) <= 512


@given(st.sampled_from(list(Code)), st.text(), st.binary())
def test_hostile_details_are_an_error_like_any_other(code: Code, message: str, details: bytes):
    assert isinstance(status.from_status(code, message, details), MigrateError)


@given(st.text(), st.text())
def test_a_detail_that_names_something_else_is_no_class_of_ours(name: str, message: str):
    for kind in (f"migrate.{name}", "migrate.Outcome", "migrate.Any", "migrate.enum", name):
        detail = types_pb2.ErrorDetail(message="m")
        try:
            detail.type = kind
        except (ValueError, UnicodeEncodeError):
            continue
        rich = status_pb2.Status(code=2)
        rich.details.add().Pack(detail)
        back = status.from_status(Code.UNKNOWN, message, rich.SerializeToString())
        assert isinstance(back, MigrateError)


def test_a_bare_code_tells_what_it_can():
    assert type(status.from_status(Code.DEADLINE_EXCEEDED, "", None)) is migrate.CallTimeout
    assert type(status.from_status(Code.UNAUTHENTICATED, "", None)) is migrate.AuthError
    lost = status.from_status(Code.UNAVAILABLE, "connection reset", None)
    assert (type(lost), lost.outcome) == (MigrateError, Outcome.UNKNOWN)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=5)
    | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@given(st.lists(json_values, max_size=5))
def test_json_values_pass_unchanged_in_both_directions(values: list[Any]):
    args, kwargs = json_form.parse_arguments(json.dumps(values), json.dumps({"k": values}))
    assert args == tuple(values)
    assert kwargs == {"k": values}
    assert list(map(type, args)) == list(map(type, values))

    assert json.loads(json_form.reply_json(values)) == values


@given(st.text(max_size=200), st.text(max_size=200))
def test_hostile_arguments_are_parsed_or_refused(args_json: str, kwargs_json: str):
    try:
        args, kwargs = json_form.parse_arguments(args_json, kwargs_json)
    except migrate.UsageError:
        return
    assert type(args) is tuple
    assert all(type(key) is str for key in kwargs)


@given(st.text(alphabet='[]{}",:0123456789.eE+-\\utrfalsn ', max_size=300))
def test_nearly_json_is_parsed_as_the_standard_library_does_or_refused(text: str):
    try:
        args, _ = json_form.parse_arguments(text, "")
    except migrate.UsageError:
        return
    assert text == "" or list(args) == json.loads(text)


@given(st.sampled_from(sorted(REQUESTS)), st.binary(max_size=200))
def test_hostile_bytes_are_a_request_or_refused(verb: str, data: bytes):
    kind = type(REQUESTS[verb])
    try:
        request = gateway.parse_request(kind, data)
    except migrate.UsageError:
        return
    assert type(request) is kind


@given(st.recursive(st.none() | st.binary() | st.floats() | st.text() | st.integers()
                    | st.just(object()),
                    lambda inner: st.lists(inner) | st.tuples(inner, inner)
                    | st.dictionaries(st.text() | st.integers() | st.booleans() | st.none(), inner)
                    | st.builds(Point, inner, st.just(())),
                    max_leaves=30))  # fmt: skip
def test_any_result_is_json_or_an_error_that_says_it_was_done(value: Any):
    try:
        text = json_form.reply_json(value)
    except json_form.NotJson as error:
        assert error.outcome is Outcome.DONE
        assert (error.cause or "").startswith("result")
        return
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
