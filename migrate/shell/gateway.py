"""The public gRPC service `livemigrate.v1.Api`: a node's verbs for any language.

It shares the port of the node's links. Every request carries the token of the file beside the
cluster secret, as `authorization: Bearer TOKEN`; it is looked at before anything of the request
is read. Only health checking goes without. Arguments and replies are JSON (see `json_form`), and
nothing that comes from here is ever unpickled.

What a method from outside may do is not decided here: requests are marked (`host.OUTSIDE`), and
the server's own class refuses what it does not open, wherever the server is by then. A cast is
also checked beforehand, because what becomes of it afterwards nobody hears.

A spawn with a `request_id` is done once by the node asked, however often it is repeated; the
last `SPAWNS_KEPT_MAX` are known. Another node does not know them: a client that turns to another
node gives its server a name, of which there is one in the cluster.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import itertools
import logging
import math
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer
from grpc_status import rpc_status

from migrate.core.ids import ServerId, node_name
from migrate.errors import (
    AuthError,
    CallTimeout,
    InternalError,
    MigrateError,
    Outcome,
    UsageError,
)
from migrate.options import LEAST_LOADED, NAME_CHARS_MAX, SpawnOptions
from migrate.ref import RefObject, class_info, ref_object
from migrate.reports import MoveReport, NodeInfo, ServerInfo
from migrate.server import spec_of
from migrate.shell import classes, json_form, status
from migrate.shell.host import OUTSIDE, NotOpen, check_open
from rpc import auth
from rpc.errors import RpcError
from rpc.grpc_channel import SERVICE_BYTES_MAX
from rpc.v1 import api_pb2, types_pb2

if TYPE_CHECKING:
    from migrate.node import Node
    from migrate.shell.pending import Pending

    # Generic for type checkers alone.
    Service = grpc.GenericRpcHandler[Any, Any]

log: Final = logging.getLogger("migrate")

SERVICE: Final = "livemigrate.v1.Api"
HEALTH: Final = "grpc.health.v1.Health"

REQUEST_BYTES_MAX: Final = SERVICE_BYTES_MAX
"""A larger request is refused unread."""

TIMEOUT_S_MAX: Final = 86_400.0
"""The longest time-out that a request can ask for: a day."""

REQUESTS_MAX: Final = 10_000
"""Requests of the public API that one node works on at a time; more are told to come again."""

REQUESTS_BYTES_MAX: Final = 256 << 20
"""Bytes of them all."""

WATCHERS_MAX: Final = 100
"""Health watches at a time; they need no token, so they are few."""

SPAWNS_KEPT_MAX: Final = 10_000
"""Spawns with a `request_id` that are remembered; the oldest finished one goes first."""

PAGE_SIZE: Final = 500
PAGE_SIZE_MAX: Final = 1_000
"""Servers in one answer of List: some 300 bytes each, so a page stays far below 4 MiB."""

ASK_S: Final = 10.0
"""How long a node may take to tell of its servers, as for the other verbs that ask them all."""

CLASSES_KEPT_MAX: Final = 10_000
"""Servers whose open methods are remembered for the check of casts."""

_NO_CLASS: Final = class_info("", ())


# ------------------------------------------------------------------------ health


class _Health:
    """grpc.health.v1: whether the node serves. With a bound on watches, unlike the stock one.

    Source: the gRPC health checking protocol, version 1.
    """

    def __init__(self) -> None:
        self._serving = False
        self._changed = asyncio.Event()
        self._watchers = 0

    def set(self, serving: bool) -> None:
        """Say whether the node serves, to watchers too."""
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _answer(self, service: str) -> Any:
        kinds = health_pb2.HealthCheckResponse
        if service not in ("", SERVICE):
            return health_pb2.HealthCheckResponse(status=kinds.SERVICE_UNKNOWN)
        return health_pb2.HealthCheckResponse(
            status=kinds.SERVING if self._serving else kinds.NOT_SERVING
        )

    async def _service(self, data: bytes, context: Any) -> str:
        try:
            return str(parse_request(health_pb2.HealthCheckRequest, data).service)
        except UsageError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
            raise

    async def check(self, data: bytes, context: Any) -> bytes:
        """The verb Check."""
        answer = self._answer(await self._service(data, context))
        if answer.status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no service of this name")
        return bytes(answer.SerializeToString())

    async def watch(self, data: bytes, context: Any) -> None:
        """The verb Watch: the state now, and each that differs from the one before."""
        service = await self._service(data, context)
        if self._watchers >= WATCHERS_MAX:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"there are {WATCHERS_MAX} health watches already; use Check",
            )
        self._watchers += 1
        try:
            last = None
            while True:
                changed = self._changed
                answer = self._answer(service)
                if answer != last:
                    last = answer
                    await context.write(answer.SerializeToString())
                await changed.wait()
        finally:
            self._watchers -= 1

    def handler(self) -> Service:
        """What a gRPC server needs to serve it."""
        return grpc.method_handlers_generic_handler(
            HEALTH,
            {
                "Check": grpc.unary_unary_rpc_method_handler(self.check),
                "Watch": grpc.unary_stream_rpc_method_handler(self.watch),
            },
        )


# ------------------------------------------------------------------------- token


class _Door(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """A service behind the token: who has none is refused before its request is read."""

    def __init__(self, inner: Service, token: bytes) -> None:
        self._inner = inner
        self._digest = hashlib.sha256(token).digest()
        # It reads a stream, that is, nothing unless it asks for it; a single request is one.
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    def service(self, details: Any) -> Any:
        """See `grpc.GenericRpcHandler`."""
        handler = self._inner.service(details)
        if handler is None or self._admits(details.invocation_metadata):
            return handler
        return self._refusal

    def _admits(self, metadata: Sequence[tuple[str, str | bytes]] | None) -> bool:
        values = [value for key, value in metadata or () if key == "authorization"]
        if len(values) != 1 or not isinstance(values[0], str):
            return False
        scheme, _, given = values[0].partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        # Digests are of one length, so the time tells nothing, not even the token's length.
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == "bearer"


async def _refuse(_requests: object, context: Any) -> None:
    error = AuthError(
        "the request has no valid token: send the content of the node's token file as metadata, "
        "`authorization: Bearer TOKEN`"
    )
    log.debug("a request from %s without a valid token was refused", context.peer())
    refusal = status.to_status(error, grpc.StatusCode.UNAUTHENTICATED)
    await context.abort_with_status(rpc_status.to_status(refusal))


class _BehindDoor:
    """Stands for the gRPC server towards generated code, and puts the door before it."""

    def __init__(self, server: grpc.aio.Server, token: bytes) -> None:
        self._server = server
        self._token = token

    def add_generic_rpc_handlers(self, handlers: Sequence[Service]) -> None:
        """As the server's own."""
        self._server.add_generic_rpc_handlers(
            tuple(_Door(handler, self._token) for handler in handlers)
        )

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Nothing: those would be found without passing the door."""


# ----------------------------------------------------------------------- gateway


class _Spawn:
    """A spawn that can be asked for again: its request's digest, and its task."""

    __slots__ = ("digest", "task")

    def __init__(self, digest: bytes, task: asyncio.Task[_Ended]) -> None:
        self.digest = digest
        self.task = task


@dataclasses.dataclass(slots=True)
class _Ended:
    """How a piece of work ended; a value, so that a failure is nobody's unawaited exception."""

    value: Any = None
    error: BaseException | None = None


Verb = Callable[[Any, "_Until"], Coroutine[Any, Any, Message]]


class _Until:
    """When a request's time is over: the earlier of what it asks for and of gRPC's deadline."""

    def __init__(self, asked_s: float, default_s: float | None, left_s: float | None) -> None:
        if math.isnan(asked_s) or asked_s > TIMEOUT_S_MAX:
            raise UsageError(
                f"timeout_s={asked_s:g} is not a number of seconds up to {TIMEOUT_S_MAX:g}"
            )
        own_s = asked_s if asked_s > 0 else default_s
        limits = [s for s in (own_s, left_s) if s is not None]
        self._loop = asyncio.get_running_loop()
        self.limit_s = min(limits) if limits else None
        self._end_s = None if self.limit_s is None else self._loop.time() + self.limit_s

    def left_s(self) -> float | None:
        """Seconds that are left, above 0; None: no limit."""
        return None if self._end_s is None else max(0.001, self._end_s - self._loop.time())


class Gateway:
    """The public service of one node.

    Args:
        node: Whose verbs it serves.
        spawnable: Classes that may be spawned from outside, as such or as "module:Class".
        token_file: The file with the token; None: see `rpc.auth.default_token_path`.
        secret_file: The file with the cluster secret.

    Raises:
        UsageError: One of `spawnable` is no class, or cannot be imported.
    """

    def __init__(
        self,
        node: Node,
        spawnable: Sequence[str | type],
        token_file: str | os.PathLike[str] | None,
        secret_file: str | os.PathLike[str],
    ) -> None:
        self._node = node
        self._spawnable = spawnable_classes(spawnable)
        self.token_file: Final = token_file or auth.default_token_path(secret_file)
        self._token = b""
        self._open = False
        self._health = _Health()
        self._requests = 0
        self._requests_bytes = 0
        self._spawns: dict[str, _Spawn] = {}
        self._classes: dict[ServerId, tuple[str, tuple[str, ...]]] = {}
        self._n = itertools.count(1)
        self._verbs: Final[Mapping[str, tuple[type[Message], Verb]]] = {
            "Spawn": (api_pb2.SpawnRequest, self._spawn),
            "Call": (api_pb2.CallRequest, self._call),
            "Cast": (api_pb2.CastRequest, self._cast),
            "WhereIs": (api_pb2.WhereIsRequest, self._where_is),
            "List": (api_pb2.ListRequest, self._list),
            "Info": (api_pb2.InfoRequest, self._info),
            "Migrate": (api_pb2.MigrateRequest, self._migrate),
            "Replicate": (api_pb2.ReplicateRequest, self._replicate),
        }

    # ------------------------------------------------------------------ life

    def load_token(self) -> None:
        """Read the token, or make one; before the service is added.

        Raises:
            AuthError: The file cannot be used.
        """
        try:
            self._token = auth.load_or_create_token(self.token_file).encode()
        except RpcError as error:
            raise AuthError(str(error), cause=str(error)) from error

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the service, health checking and reflection to a gRPC server."""
        door = _BehindDoor(server, self._token)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(self._behavior(*verb))
            for name, verb in self._verbs.items()
        }
        door.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_generic_rpc_handlers((self._health.handler(),))
        names = (SERVICE, HEALTH, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), door)

    def open(self) -> None:
        """Take requests: the node has joined its cluster."""
        self._open = True
        self._health.set(True)

    def close(self) -> None:
        """Refuse new requests; those under way end with the node."""
        self._open = False
        self._health.set(False)

    # ------------------------------------------------------------------ every request

    def _behavior(
        self, kind: type[Message], verb: Verb
    ) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def serve(data: bytes, context: Any) -> bytes:
            self._requests += 1
            self._requests_bytes += len(data)
            try:
                reply = await self._serve(kind, verb, data, context)
            except MigrateError as error:
                failure = status.to_status(error)
            except Exception as error:
                log.exception("a request of the public API failed; please report this")
                failure = status.to_status(
                    InternalError(
                        f"a bug of livemigrate: {type(error).__name__}; the log of node "
                        f"{self._node.name} tells more",
                        node=self._node.name,
                    )
                )
            else:
                return reply
            finally:
                self._requests -= 1
                self._requests_bytes -= len(data)
            await context.abort_with_status(rpc_status.to_status(failure))
            raise InternalError("a request was answered after it was refused")

        return serve

    async def _serve(self, kind: type[Message], verb: Verb, data: bytes, context: Any) -> bytes:
        if not self._open:
            raise MigrateError(
                f"node {self._node.name} is starting or closing; ask another one, or later",
                node=self._node.name,
                outcome=Outcome.NOT_DONE,
            )
        if self._requests > REQUESTS_MAX or self._requests_bytes > REQUESTS_BYTES_MAX:
            raise MigrateError(
                f"node {self._node.name} works on {self._requests - 1} requests from outside "
                "already; try again later",
                node=self._node.name,
                outcome=Outcome.NOT_DONE,
            )
        request = parse_request(kind, data)
        default_s = self._node._options.call_timeout_s if verb in (self._call, self._cast) else None
        asked_s = getattr(request, "timeout_s", 0.0)
        until = _Until(asked_s, default_s, context.time_remaining())
        reply = await verb(request, until)
        return reply.SerializeToString()

    # ------------------------------------------------------------------ whom it is about

    async def _ref(self, server_id: str, server_name: str) -> RefObject:
        if bool(server_id) == bool(server_name):
            raise UsageError("give server_id or server_name, and only one of them")
        if server_name:
            return ref_object(await self._node.whereis(checked_text("server_name", server_name)))
        checked_text("server_id", server_id)
        core = self._node._driver.core
        if server_id in core.hosted or server_id in core.routes:
            return RefObject(server_id, _NO_CLASS, self._node._driver)
        # The directory is asked first, so that a made-up id leaves nothing behind here.
        return ref_object(self._node._ref(await self._node._read(server_id)))

    # ------------------------------------------------------------------ verbs

    async def _call(self, request: api_pb2.CallRequest, until: _Until) -> Message:
        ref, args, kwargs = await self._addressed(request)
        pending = self._node._driver.call(
            ref, OUTSIDE + request.method, args, kwargs, until.left_s() or math.inf
        )
        pending.method, pending.timeout_s = request.method, until.limit_s
        value = await self._settled(pending, ref)
        try:
            return api_pb2.CallResponse(reply_json=await json_form.reply(value))
        except json_form.NotJson as error:
            error.server = ref._server_id
            raise

    async def _cast(self, request: api_pb2.CastRequest, until: _Until) -> Message:
        ref, args, kwargs = await self._addressed(request)
        await self._check_open(ref, request.method)
        pending = self._node._driver.cast(
            ref, OUTSIDE + request.method, args, kwargs, until.left_s() or math.inf
        )
        pending.method, pending.timeout_s = request.method, until.limit_s
        await self._settled(pending, ref)
        return api_pb2.CastResponse()

    async def _addressed(
        self, request: api_pb2.CallRequest | api_pb2.CastRequest
    ) -> tuple[RefObject, tuple[Any, ...], dict[str, Any]]:
        method = request.method
        if not method.isidentifier() or len(method) > NAME_CHARS_MAX or method.startswith("_"):
            raise NotOpen(
                f"{method[:100]!r} is no name of a method that answers calls from outside"
            )
        args, kwargs = await json_form.arguments(request.args_json, request.kwargs_json)
        ref = await self._ref(request.server_id, request.server_name)
        return ref, args, kwargs

    async def _check_open(self, ref: RefObject, method: str) -> None:
        server = ref._server_id
        known = self._classes.get(server)
        if known is None or method not in known[1]:
            known = await self._node._at_owner(ref, "open_methods")
            self._classes[server] = known
            while len(self._classes) > CLASSES_KEPT_MAX:
                del self._classes[next(iter(self._classes))]
        cls_name, names = known
        check_open(cls_name, names, method, server)

    async def _settled(self, pending: Pending, ref: RefObject) -> Any:
        """The result of a request; what a handler raised becomes `HandlerFailed`."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        pending.add_done_callback(lambda _: _wake(done))
        try:
            await done
        except asyncio.CancelledError:
            # The client has hung up, or its deadline is over.
            pending.cancel()
            raise
        # NB: not awaited, because a handler may raise SystemExit, which would end the loop.
        error = pending.exception()
        if error is None:
            return pending.result()
        # What was raised somewhere is the handler's own, whatever its class; errors of the
        # delivery are made where they are set, and have never been raised.
        raised = error.__traceback__ is not None or hasattr(error, "remote_traceback")
        if isinstance(error, NotOpen) or (isinstance(error, MigrateError) and not raised):
            raise error
        raise status.handler_failure(error, server=ref._server_id, outcome=Outcome.DONE) from None

    async def _spawn(self, request: api_pb2.SpawnRequest, until: _Until) -> Message:
        cls = self._spawnable.get(request.cls)
        if cls is None:
            names = ", ".join(list(self._spawnable)[:20]) or "none"
            raise AuthError(
                f"node {self._node.name} was not told to spawn {request.cls[:200]!r} for callers "
                f"from outside; it may spawn: {names}. Start it with spawnable=, or --allow",
                node=self._node.name,
            )
        args, kwargs = await json_form.arguments(request.args_json, request.kwargs_json)
        if "options" in kwargs:
            raise UsageError("a constructor's parameter called options can be given by place only")
        if sum(map(bool, (request.on_node, request.least_loaded, request.near_server_id))) > 1:
            raise UsageError("give one of on_node, least_loaded and near_server_id, or none")
        near = await self._ref(request.near_server_id, "") if request.near_server_id else None
        options = SpawnOptions(
            name=request.name or None,
            on=LEAST_LOADED if request.least_loaded else request.on_node or None,
            near=cast(Any, near),
            standbys=_standbys("standby_nodes", request.standby_nodes, request.standbys),
            standby_mode=_mode(request.standby_mode),
            durable=request.durable,
        )

        async def spawn() -> RefObject:
            try:
                return ref_object(await self._node.spawn(cls, *args, options=options, **kwargs))
            except MigrateError:
                raise
            except Exception as error:
                raise status.handler_failure(
                    error, server=request.cls, outcome=Outcome.NOT_DONE
                ) from None

        if request.request_id:
            task = self._spawn_once(request, spawn)
        else:
            task = self._start(spawn(), "spawn")
        ref = await self._end(task, until, f"the spawn of {request.cls}")
        return api_pb2.SpawnResponse(server=_server_ref(ref))

    def _spawn_once(
        self, request: api_pb2.SpawnRequest, spawn: Callable[[], Coroutine[Any, Any, RefObject]]
    ) -> asyncio.Task[_Ended]:
        key = checked_text("request_id", request.request_id)
        asked = api_pb2.SpawnRequest()
        asked.CopyFrom(request)
        asked.timeout_s = 0
        digest = hashlib.sha256(asked.SerializeToString(deterministic=True)).digest()
        known = self._spawns.get(key)
        if known is not None and not _may_repeat(known.task):
            if known.digest != digest:
                raise UsageError(
                    f"request_id {key!r} was used for another spawn; make a new one for each"
                )
            return known.task
        if len(self._spawns) >= SPAWNS_KEPT_MAX:
            oldest = next((k for k, s in self._spawns.items() if s.task.done()), None)
            if oldest is None:
                raise MigrateError(
                    f"{SPAWNS_KEPT_MAX} spawns are under way; try again later",
                    node=self._node.name,
                    outcome=Outcome.NOT_DONE,
                )
            del self._spawns[oldest]
        self._spawns[key] = _Spawn(digest, self._start(spawn(), f"spawn {key}"))
        return self._spawns[key].task

    async def _migrate(self, request: api_pb2.MigrateRequest, until: _Until) -> Message:
        if not request.to_node:
            raise UsageError("to_node is missing: name the node that shall own the server")
        target = checked_text("to_node", request.to_node)
        ref = await self._ref(request.server_id, request.server_name)
        move = self._start(self._node.migrate(cast(Any, ref), to=target), "migrate")
        report: MoveReport = await self._end(move, until, f"the move of server {ref._server_id}")
        return api_pb2.MigrateResponse(
            report=types_pb2.MoveReport(
                server=ref._server_id,
                source=report.source,
                target=report.target,
                epoch=report.epoch,
                downtime_s=report.downtime_s,
                total_s=report.total_s,
                bytes_sent=report.bytes_sent,
                rounds=report.rounds,
            )
        )

    async def _replicate(self, request: api_pb2.ReplicateRequest, until: _Until) -> Message:
        nodes = _standbys("nodes", request.nodes, request.count)
        mode = _mode(request.mode)
        ref = await self._ref(request.server_id, request.server_name)
        work = self._start(self._node.replicate(cast(Any, ref), nodes, mode=mode), "replicate")
        what = f"the change of the standbys of server {ref._server_id}"
        info: ServerInfo = await self._end(work, until, what)
        return api_pb2.ReplicateResponse(server=_server_info(info))

    async def _where_is(self, request: api_pb2.WhereIsRequest, until: _Until) -> Message:
        if not request.name:
            raise UsageError("name is missing: give the name that a server was spawned under")
        ref = await self._ref("", request.name)
        return api_pb2.WhereIsResponse(server=_server_ref(ref))

    async def _info(self, request: api_pb2.InfoRequest, until: _Until) -> Message:
        ref = await self._ref(request.server_id, request.server_name)
        return api_pb2.InfoResponse(server=_server_info(await self._node.info(cast(Any, ref))))

    async def _list(self, request: api_pb2.ListRequest, until: _Until) -> Message:
        size = min(request.page_size or PAGE_SIZE, PAGE_SIZE_MAX)
        after = checked_text("page_token", request.page_token) if request.page_token else ""
        infos: list[ServerInfo]
        if request.node:
            target = await self._node._node_named(checked_text("node", request.node))
            infos = await self._node._asks.ask(target, "servers", timeout_s=ASK_S)
        else:
            infos = await self._node.servers()
        found: dict[str, ServerInfo] = {}
        for info in infos:
            if info.id <= after or (request.cls and info.cls != request.cls):
                continue
            # During a move two nodes may name a server; the higher epoch is right.
            if info.id not in found or found[info.id].epoch < info.epoch:
                found[info.id] = info
        ids = sorted(found)
        page = [_server_info(found[server]) for server in ids[:size]]
        nodes = []
        if not after:
            rows = {row.name: row.id for row in await self._node._node_rows()}
            nodes = [_node_info(n, rows.get(n.name, "")) for n in await self._node.nodes()]
        token = page[-1].id if len(ids) > size else ""
        return api_pb2.ListResponse(servers=page, nodes=nodes, next_page_token=token)

    # ------------------------------------------------------------------ work that is not cut off

    def _start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[_Ended]:
        """Run work that goes on when its caller hangs up: half a spawn would help nobody."""
        return self._node._driver.task(_ended(work), f"{name} from outside, {next(self._n)}")

    async def _end(self, task: asyncio.Task[_Ended], until: _Until, what: str) -> Any:
        await asyncio.wait((task,), timeout=until.left_s())
        if not task.done():
            raise CallTimeout(
                f"{what} has not ended within {until.limit_s:g} s; it goes on",
                timeout_s=until.limit_s,
                node=self._node.name,
            )
        if task.cancelled():
            raise MigrateError(f"{what} was cut off: node {self._node.name} closed")
        ended = task.result()
        if ended.error is not None:
            raise ended.error
        return ended.value


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


async def _ended(work: Coroutine[Any, Any, Any]) -> _Ended:
    try:
        return _Ended(await work)
    except Exception as error:
        return _Ended(error=error)


def _may_repeat(task: asyncio.Task[_Ended]) -> bool:
    """Whether a spawn ended with nothing done, so that its repeat is a new one."""
    if not task.done():
        return False
    error = None if task.cancelled() else task.result().error
    return isinstance(error, MigrateError) and error.outcome is Outcome.NOT_DONE


# ------------------------------------------------------------------------- values


def spawnable_classes(given: Sequence[str | type]) -> dict[str, type]:
    """The classes that may be spawned from outside, by "module:Qualname".

    Raises:
        UsageError: One of them is no class, or cannot be imported.
    """
    if isinstance(given, str):
        raise UsageError(f"spawnable= takes a list of classes, as in ({given!r},)")
    found: dict[str, type] = {}
    for item in given:
        if isinstance(item, str):
            try:
                spec = classes.find(item)
            except Exception as error:
                raise UsageError(
                    f"spawnable: {item!r} cannot be imported: {type(error).__name__}: {error}",
                    cause=str(error),
                ) from error
            found[item] = spec.cls
        else:
            spec = spec_of(item)
        found[spec.cls_name] = spec.cls
    return found


def parse_request(kind: type[Message], data: bytes) -> Any:
    """A request from its bytes.

    Raises:
        UsageError: It is too large, or not of its kind.
    """
    if len(data) > REQUEST_BYTES_MAX:
        raise UsageError(
            f"the request has {len(data)} bytes; at most {REQUEST_BYTES_MAX} are taken"
        )
    request = kind()
    try:
        request.ParseFromString(data)
    except DecodeError as error:
        raise UsageError(f"the request is not a {kind.DESCRIPTOR.full_name}") from error
    return request


def checked_text(field: str, value: str) -> str:
    """An id or a name from outside, bounded and printable.

    Raises:
        UsageError: It is empty, too long, or has characters that cannot be printed.
    """
    if not 1 <= len(value) <= NAME_CHARS_MAX:
        raise UsageError(f"{field} takes 1 to {NAME_CHARS_MAX} characters, not {len(value)}")
    if not value.isprintable():
        raise UsageError(f"{field} has characters that cannot be printed: {value!r}")
    return value


def _standbys(field: str, names: Sequence[str], count: int) -> int | list[str]:
    """Who is to stand by, as the verbs take it.

    Raises:
        UsageError: There are names and a count, or a name cannot be.
    """
    if names and count:
        raise UsageError(f"give {field} or how many, not both")
    return count or [checked_text(field, name) for name in names]


def _mode(mode: types_pb2.StandbyMode) -> Literal["sync", "async"]:
    if mode not in (
        types_pb2.STANDBY_MODE_UNSPECIFIED,
        types_pb2.STANDBY_MODE_SYNC,
        types_pb2.STANDBY_MODE_ASYNC,
    ):
        raise UsageError(f"no standby mode has the number {mode}")
    return "async" if mode == types_pb2.STANDBY_MODE_ASYNC else "sync"


def _server_ref(ref: RefObject) -> types_pb2.ServerRef:
    return types_pb2.ServerRef(
        id=ref._server_id,
        cls=ref._info.cls_name,
        node=node_name(ref._node_hint or ""),
        epoch=ref._epoch_hint,
    )


def _server_info(info: ServerInfo) -> types_pb2.ServerInfo:
    modes = {
        "sync": types_pb2.STANDBY_MODE_SYNC,
        "async": types_pb2.STANDBY_MODE_ASYNC,
        None: types_pb2.STANDBY_MODE_UNSPECIFIED,
    }
    return types_pb2.ServerInfo(
        id=info.id,
        name=info.name or "",
        cls=info.cls,
        node=info.node,
        epoch=info.epoch,
        version=info.version,
        mailbox=info.mailbox,
        standbys=info.standbys,
        mode=modes[info.mode],
        durable=info.durable,
    )


def _node_info(info: NodeInfo, id: str) -> types_pb2.NodeInfo:
    return types_pb2.NodeInfo(
        name=info.name,
        id=id,
        address=info.address,
        pid=info.pid,
        host=info.host,
        servers=info.servers,
        load=info.load,
        cordoned=info.cordoned,
        draining=info.draining,
    )
