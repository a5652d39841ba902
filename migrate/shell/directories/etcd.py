"""The directory in etcd v3: for nodes of many hosts.

**What is where.** A key `k` is stored as `PREFIX/k`, with etcd's own lease, so one etcd serves
several clusters and other programs too. A revision here is etcd's minus one, because an empty
etcd begins at 1: then both count the transactions that changed something, and 0 means absent in
both. Transactions of others raise it as well, under any prefix; nothing here counts on the
opposite.

**Members.** Each has a channel of its own. All calls go to one member until that one fails, then
to the next; a call that is spread over members meets a bad one again and again. Every call asks
for a member that has a leader (`hasleader`) and has a deadline.

**What a failure means.** A read is repeated at other members as long as the patience lasts. A
transaction is sent once: an answer that does not come, or says that etcd does not know, is
`OutcomeUnknown`. It is sent again only where it surely was not done: etcd refused it before it
proposed it, or the connection was never made. So that an outage seldom finds a transaction on its
way, a member that failed or has not answered for a while is asked a read first; if that fails, the
transaction was not done.

**Watches** pull from a stream of their own and resume from the last event's revision + 1, never
from a header's: while a watch catches up, headers run ahead of the events. A stream is asked for
one revision more than is wanted, because etcd refuses revisions below the compacted one but
serves that one itself, without the deletions that belong to it. What is not wanted is dropped.

**Leases** have whole seconds, at the least what etcd grants (one to two); a restart of etcd begins
their time anew. The number is chosen here, so a repeat of a grant whose answer was lost is the
same lease.

NB: etcd keeps its log until somebody compacts it: run it with `--auto-compaction-mode=periodic
--auto-compaction-retention=1h`, and 3.4 with `--pre-vote` besides.

Source: the failures and the figures behind these rules were measured with etcd 3.4.23 on
loopback, and with three members in network namespaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import math
import re
import secrets
import urllib.parse
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import grpc
import grpc.aio

from migrate.shell.directories.base import (
    TXN_OPERATIONS_MAX,
    VALUE_BYTES_MAX,
    Change,
    Changes,
    Compacted,
    Compare,
    Directory,
    DirectoryError,
    DirectoryUnavailable,
    Entry,
    Fetched,
    LeaseGone,
    LogWatch,
    OutcomeUnknown,
    Put,
    Txn,
    check_key,
    check_lease,
    check_prefix,
    check_ttl,
    check_txn,
    prefix_end,
)
from rpc.backoff import exponential
from rpc.grpc_channel import calls_under_way, split_address
from rpc.v1 import etcd_pb2 as pb

CALL_TIMEOUT_S: Final = 1.0
"""How long one member may take for one call. A healthy one needs milliseconds; a follower whose
leader was lost is silent until the next one is elected, and another member may be quicker."""

PATIENCE_S: Final = 4.0
"""How long a verb tries. Source: measured, electing a new leader takes 1 to 4 s."""

FRESH_S: Final = 5.0
"""A member that has answered within this time is entrusted with a transaction unasked. A node
with a lease of 10 s renews it every 3.3 s, which counts as an answer."""

IN_FLIGHT_MAX: Final = 128
"""Calls at a time; the others wait in line. More would not be answered sooner, and their deadlines
would run out in etcd's own queue, where nobody can say what becomes of them."""

REQUESTS_MAX: Final = 10_000
"""Calls of one directory that may wait at once; more are refused."""

PREFIX_DEFAULT: Final = "livemigrate"

PREFIX_BYTES_MAX: Final = 64
"""It is part of every key, and transactions have a limit of bytes."""

_PORT: Final = 2379
_OFFSET: Final = 1
"""Revision of an etcd that never held anything."""

_PAGE_KEYS: Final = 512
"""Keys in one answer to a list; of the largest values that is 512 MiB."""

_MESSAGE_BYTES_MAX: Final = (max(_PAGE_KEYS, TXN_OPERATIONS_MAX) + 8) * (VALUE_BYTES_MAX + 4096)

_PAUSE_FIRST_S: Final = 0.02
_PAUSE_MAX_S: Final = 0.5
"""Waits after all members have failed one after the other."""

_LISTS_MAX: Final = 5
"""A list whose revision is compacted while it is read begins anew; not for ever."""

_SETTLE_S: Final = 0.2
"""Bound of the wait at the end for each cancelled call to be over; it takes some 100 us."""

_OPTIONS: Final[list[tuple[str, Any]]] = [
    # A transaction is sent once, and nobody but this module decides otherwise.
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
    # etcd hangs up on who pings more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

# The stubs in common use miss or mistake parts of grpc.aio.
_aio: Final = cast(Any, grpc.aio)

# What grpc.aio raises from reads and writes on a stream that has ended; which one depends on the
# instant.
_ENDED: Final = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)

_log: Final = logging.getLogger(__name__)


class _Method(NamedTuple):
    """One of etcd's methods; `streaming` ones are used for one request and one answer."""

    path: str
    answer: Any
    streaming: bool = False


_RANGE: Final = _Method("/etcdserverpb.KV/Range", pb.RangeResponse)
_TXN: Final = _Method("/etcdserverpb.KV/Txn", pb.TxnResponse)
_GRANT: Final = _Method("/etcdserverpb.Lease/LeaseGrant", pb.LeaseGrantResponse)
_REVOKE: Final = _Method("/etcdserverpb.Lease/LeaseRevoke", pb.LeaseRevokeResponse)
_KEEPALIVE: Final = _Method("/etcdserverpb.Lease/LeaseKeepAlive", pb.LeaseKeepAliveResponse, True)
_TIME_TO_LIVE: Final = _Method("/etcdserverpb.Lease/LeaseTimeToLive", pb.LeaseTimeToLiveResponse)
_LOGIN: Final = _Method("/etcdserverpb.Auth/Authenticate", pb.AuthenticateResponse)
_WATCH: Final = "/etcdserverpb.Watch/Watch"


class _Once(enum.Enum):
    """What a repeat of a request does."""

    READ = "it changes nothing"
    AGAIN = "it changes what the first one has changed, to the same"
    ONCE = "it may do something else than the first one"


class _Verdict(enum.Enum):
    """What a failed call says."""

    NOT_DONE = "surely not done; another member may do it"
    LOGIN = "not done: the token is not known (any more)"
    UNKNOWN = "nobody knows; another member may be better"
    REFUSED = "not done, and it would not be elsewhere"


class _Refused(Exception):
    """etcd answered that it will not; the caller knows what that means for its verb."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        self.details = details


class _NotDone(Exception):
    """No member took the request."""


class _Unknown(Exception):
    """Some member may have done it, or may do it yet."""


def _verdict(code: grpc.StatusCode, details: str) -> _Verdict:
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            # Said before the request is proposed; gRPC's own words: before it was sent.
            surely = ("etcdserver: no leader", "failed to connect to all addresses")
            return _Verdict.NOT_DONE if details.startswith(surely) else _Verdict.UNKNOWN
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            # NB: of a database that is full etcd says so after it has applied the transaction.
            surely_not = details.startswith("etcdserver: too many requests")
            return _Verdict.NOT_DONE if surely_not else _Verdict.UNKNOWN
        case grpc.StatusCode.UNAUTHENTICATED:
            return _Verdict.LOGIN
        case grpc.StatusCode.INVALID_ARGUMENT if "auth store is old" in details:
            return _Verdict.LOGIN
        case (
            grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.FAILED_PRECONDITION
            | grpc.StatusCode.NOT_FOUND
            | grpc.StatusCode.OUT_OF_RANGE
            | grpc.StatusCode.PERMISSION_DENIED
            | grpc.StatusCode.UNIMPLEMENTED
            | grpc.StatusCode.ALREADY_EXISTS
        ):
            return _Verdict.REFUSED
        case _:
            return _Verdict.UNKNOWN


def _why(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__


@dataclass(frozen=True, slots=True)
class EtcdLogin:
    """How to connect, and as whom.

    Attributes:
        user: "" for none.
        password: Of the user.
        ca_file: Certificates of the authorities that vouch for etcd's members; "" for the system's.
        cert_file: This side's certificate, or "".
        key_file: The key that goes with it, or "".
        tls: Whether to use TLS.
    """

    user: str = ""
    password: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    tls: bool = False

    def credentials(self) -> grpc.ChannelCredentials | None:
        """What a channel needs; None without TLS.

        Raises:
            OSError: A file cannot be read.
        """
        if not self.tls:
            return None
        ca, cert, key = (
            Path(name).read_bytes() if name else None
            for name in (self.ca_file, self.cert_file, self.key_file)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


class _Member:
    """One member of the etcd cluster, and the channel to it."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None) -> None:
        self.address = address
        self.answered_s = -math.inf
        self.asking = asyncio.Lock()
        if credentials is None:
            self.channel = _aio.insecure_channel(address, options=_OPTIONS)
        else:
            self.channel = _aio.secure_channel(address, credentials, options=_OPTIONS)
        self._methods: dict[_Method, Any] = {}
        self.watch: Any = self.channel.stream_stream(
            _WATCH,
            request_serializer=pb.WatchRequest.SerializeToString,
            response_deserializer=pb.WatchResponse.FromString,
        )

    def connected(self) -> bool:
        return bool(self.channel.get_state() is grpc.ChannelConnectivity.READY)

    async def send(self, method: _Method, request: Any, metadata: Any, timeout_s: float) -> Any:
        """One request, one answer; raises AioRpcError."""
        call = self._methods.get(method)
        if call is None:
            kind = self.channel.stream_stream if method.streaming else self.channel.unary_unary
            call = self._methods[method] = kind(
                method.path,
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=method.answer.FromString,
            )
        asked_s = asyncio.get_running_loop().time()
        if not method.streaming:
            answer = await call(request, metadata=metadata, timeout=timeout_s)
        else:
            stream = call(metadata=metadata, timeout=timeout_s)
            try:
                await stream.write(request)
                await stream.done_writing()
                answer = await stream.read()
                if answer is _aio.EOF:
                    raise _Unknown("the stream ended without an answer")
                # To its end, so that nothing of it is left when the loop ends.
                while await stream.read() is not _aio.EOF:
                    pass
            except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
                raise _Unknown(_why(error)) from error
            finally:
                stream.cancel()
        self.answered_s = asked_s
        return answer


class _Stream:
    """An open stream of one watch. Whoever drops it ends it."""

    def __init__(self, member: _Member, call: Any, next_rev: int, url: str) -> None:
        self.member = member
        self.next_rev = next_rev
        self._call = call
        self._url = url
        # Revisions that have arrived; of the last one there may be more to come.
        self._revisions: list[list[Change]] = []

    def __del__(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        self._call.cancel()

    async def opened(self) -> None:
        """Wait until etcd says that it watches."""
        while not (await self._read()).created:
            pass

    async def fetch(self, cut: Callable[[bytes], str]) -> Fetched:
        """Wait for the next revisions, or for word that there were none for a while."""
        while True:
            response = await self._read()
            if not response.events and not response.created and not response.fragment:
                # The one answer whose header says how far this watch has come.
                self.next_rev = max(self.next_rev, response.header.revision - _OFFSET + 1)
                return Fetched([], self.next_rev)
            revisions = self._revisions
            for event in response.events:
                rev = event.kv.mod_revision - _OFFSET
                if rev < self.next_rev:
                    continue
                value = None if event.type == 1 else event.kv.value
                change = Change(cut(event.kv.key), value, rev)
                if revisions and revisions[-1][0].rev == rev:
                    revisions[-1].append(change)
                else:
                    revisions.append([change])
            complete = len(revisions) - (1 if response.fragment else 0)
            if complete > 0:
                self._revisions = revisions[complete:]
                self.next_rev = revisions[complete - 1][0].rev + 1
                return Fetched(revisions[:complete], self.next_rev)

    async def _read(self) -> pb.WatchResponse:
        try:
            response = await self._call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # A call that was cancelled raises this in whoever reads from it.
            raise _Unknown("the watch was ended here") from None
        except _ENDED as error:
            raise _Unknown(_why(error)) from error
        if response is _aio.EOF:
            raise _Unknown("etcd ended the watch")
        if response.canceled:
            if response.compact_revision:
                raise Compacted(response.compact_revision - _OFFSET, url=self._url)
            code = grpc.StatusCode.PERMISSION_DENIED
            if "auth token" in response.cancel_reason:
                code = grpc.StatusCode.UNAUTHENTICATED
            raise _Refused(code, response.cancel_reason or "no reason given")
        return cast(pb.WatchResponse, response)


class EtcdDirectory(Directory):
    """A directory in an etcd cluster; see the module's text."""

    one_machine = False

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: str = PREFIX_DEFAULT,
        *,
        login: EtcdLogin | None = None,
        call_timeout_s: float = CALL_TIMEOUT_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Make a directory; nothing is connected before `start`.

        Args:
            endpoints: host:port of the members, at least one. Not all have to be listed.
            prefix: What all keys of this cluster begin with; letters, digits and `-_./`.
            login: How to connect, and as whom; None: without TLS or password.
            call_timeout_s: Deadline of one call to one member.
            patience_s: How long a verb tries at all members together.

        Raises:
            ValueError: An argument is out of its bounds.
        """
        if not endpoints:
            raise ValueError("an etcd directory needs the address of a member at the least")
        for address in endpoints:
            split_address(address)
        if not re.fullmatch(r"[A-Za-z0-9._/-]+", prefix) or len(prefix) > PREFIX_BYTES_MAX:
            raise ValueError(
                f"{prefix!r} cannot be the prefix of keys: 1 to {PREFIX_BYTES_MAX} letters, digits "
                "and the signs - _ . / are allowed"
            )
        for what, value in (("timeout", call_timeout_s), ("patience", patience_s)):
            if not (math.isfinite(value) and 0 < value <= 3600):
                raise ValueError(f"{what}={value} must be seconds above 0 and up to an hour")
        self._endpoints = tuple(endpoints)
        self._prefix = prefix
        self._root = prefix.encode() + b"/"
        self._login = login or EtcdLogin()
        self._call_timeout_s = call_timeout_s
        self._patience_s = patience_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._members: list[_Member] = []
        self._member = 0
        self._token = ""
        self._turns = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._waiting = 0
        self._calls = 0
        self._idle = asyncio.Event()
        self._streams: weakref.WeakSet[_Stream] = weakref.WeakSet()

    @classmethod
    def from_url(cls, url: str) -> EtcdDirectory:
        """Make the directory that a URL names.

        Args:
            url: `etcd://[USER[:PASSWORD]@]HOST[:PORT][,...][/PREFIX][?OPTION=VALUE&...]`. Options:
                `tls=FOLDER` (certificates as `migrate certs init` makes them), or `ca`, `cert` and
                `key` (files), or `tls=true` (the system's authorities); `password_file`,
                `timeout` and `patience` (seconds).

        Raises:
            ValueError: The URL is not of this form.
            OSError: The file with the password cannot be read.
        """
        parts = urllib.parse.urlsplit(url)
        user_part, _, host_part = parts.netloc.rpartition("@")
        user, _, password = user_part.partition(":")
        given = urllib.parse.parse_qs(
            parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)
        )
        known = {"ca", "cert", "key", "tls", "password_file", "timeout", "patience"}
        if unknown := sorted(set(given) - known):
            raise ValueError(
                f"an etcd directory has no option {', '.join(unknown)}; known are "
                f"{', '.join(sorted(known))}"
            )
        options = {name: values[-1] for name, values in given.items()}
        if name := options.get("password_file"):
            password = urllib.parse.quote(Path(name).read_text(encoding="utf-8").strip())
        endpoints = []
        for address in filter(None, host_part.split(",")):
            # An IPv6 host stands in brackets, so a colon after the last one begins a port.
            has_port = ":" in address.rpartition("]")[2]
            endpoints.append(address if has_port else f"{address}:{_PORT}")
        ca, cert, key = (options.get(it, "") for it in ("ca", "cert", "key"))
        if bool(cert) != bool(key):
            raise ValueError("an etcd directory's cert= and key= come together")
        tls = options.get("tls", "")
        if tls and tls != "true":
            if ca or cert:
                raise ValueError("an etcd directory takes tls=FOLDER, or ca=, cert= and key=")
            folder = Path(tls).expanduser()
            role = "node" if (folder / "node.pem").exists() else "client"
            ca, cert, key = (str(folder / it) for it in ("ca.pem", f"{role}.pem", f"{role}.key"))
        login = EtcdLogin(
            urllib.parse.unquote(user),
            urllib.parse.unquote(password),
            ca,
            cert,
            key,
            bool(tls or ca or cert),
        )
        return cls(
            endpoints,
            parts.path.strip("/") or PREFIX_DEFAULT,
            login=login,
            call_timeout_s=float(options.get("timeout", CALL_TIMEOUT_S)),
            patience_s=float(options.get("patience", PATIENCE_S)),
        )

    @property
    def url(self) -> str:
        """Without the password and the options, since it is shown in messages."""
        user = f"{urllib.parse.quote(self._login.user)}@" if self._login.user else ""
        return f"etcd://{user}{','.join(self._endpoints)}/{self._prefix}"

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        if self._closed:
            raise DirectoryError(f"{self.url} was closed; open a new one", url=self.url)
        if self._loop is not None:
            self._check_loop(self._loop)
            return
        try:
            credentials = self._login.credentials()
        except OSError as error:
            raise DirectoryError(f"{self.url}: {error}; nothing was done", url=self.url) from error
        self._loop = asyncio.get_running_loop()
        self._members = [_Member(address, credentials) for address in self._endpoints]
        try:
            if self._login.user:
                await self._log_in("")
            await self._read(self._presence())
        except BaseException:
            await self._hang_up()
            self._loop = None
            raise

    async def close(self) -> None:
        self._closed = True
        if self._loop is None:
            return
        while self._calls:
            self._idle.clear()
            await self._idle.wait()
        await self._hang_up()
        self._loop = None

    async def _hang_up(self) -> None:
        members, self._members = self._members, []
        ending = calls_under_way()
        for stream in list(self._streams):
            stream.cancel()
        for member in members:
            await member.channel.close()
        # Others of this loop may have calls too, so the wait ends when no more of them end.
        while ending:
            done, left = await asyncio.wait(
                ending, timeout=_SETTLE_S, return_when=asyncio.FIRST_COMPLETED
            )
            ending = list(left) if done else []

    # ------------------------------------------------------------------ verbs

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        answer = await self._read(pb.RangeRequest(key=self._stored(key)))
        return self._entry(answer.kvs[0]) if answer.kvs else None

    async def _pages(self, key: bytes, end: bytes) -> tuple[list[Entry], int]:
        entries: list[Entry] = []
        revision = 0
        while True:
            request = pb.RangeRequest(key=key, range_end=end, limit=_PAGE_KEYS, revision=revision)
            answer = await self._read(request)
            # All pages are of the instant of the first one.
            revision = revision or answer.header.revision
            entries.extend(map(self._entry, answer.kvs))
            if not answer.more:
                return entries, revision - _OFFSET
            key = answer.kvs[-1].key + b"\0"

    async def list(self, prefix: str) -> tuple[list[Entry], int]:
        check_prefix(prefix)
        key, end = self._span(prefix)
        for _ in range(_LISTS_MAX):
            with contextlib.suppress(Compacted):
                return await self._pages(key, end)
        raise DirectoryUnavailable(
            f"{self.url} was compacted {_LISTS_MAX} times while it was listed; compact it less "
            "often",
            url=self.url,
        )

    async def txn(
        self,
        compares: Sequence[Compare],
        puts: Sequence[Put],
        deletes: Sequence[str],
        reads: Sequence[str] = (),
        *,
        durable: bool = True,
    ) -> Txn:
        check_txn(compares, puts, deletes, reads)
        refused_reads = [*(it.key for it in compares), *reads]
        request = pb.TxnRequest(
            compare=[
                pb.Compare(target=2, key=self._stored(it.key), mod_revision=it.rev + _OFFSET)
                if it.rev
                else pb.Compare(target=2, key=self._stored(it.key), mod_revision=0)
                for it in compares
            ],
            success=[
                *(
                    pb.RequestOp(
                        request_put=pb.PutRequest(
                            key=self._stored(it.key), value=it.value, lease=it.lease or 0
                        )
                    )
                    for it in puts
                ),
                *(
                    pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=self._stored(it)))
                    for it in deletes
                ),
                *map(self._read_operation, reads),
            ],
            failure=[*map(self._read_operation, refused_reads)],
        )
        try:
            answer = await self._ask(_TXN, request, _Once.ONCE if puts or deletes else _Once.READ)
        except _Refused as error:
            leases = [it.lease for it in puts if it.lease is not None]
            if error.code is grpc.StatusCode.NOT_FOUND and leases:
                raise LeaseGone(await self._gone_of(leases), url=self.url) from error
            raise self._refusal(error) from error
        asked, first = (reads, len(puts) + len(deletes)) if answer.succeeded else (refused_reads, 0)
        entries: dict[str, Entry | None] = {}
        for key, response in zip(asked, answer.responses[first:], strict=True):
            kvs = response.response_range.kvs
            entries[key] = self._entry(kvs[0]) if kvs else None
        return Txn(answer.succeeded, answer.header.revision - _OFFSET, entries)

    def _read_operation(self, key: str) -> pb.RequestOp:
        return pb.RequestOp(request_range=pb.RangeRequest(key=self._stored(key)))

    async def _gone_of(self, leases: Sequence[int]) -> int:
        """Which of the leases is gone; the first one if that cannot be told."""
        if len(set(leases)) > 1:
            with contextlib.suppress(DirectoryError, _Refused):
                for lease in leases:
                    request = pb.LeaseTimeToLiveRequest(id=lease)
                    # NB: 0 is a lease with less than a second to live.
                    if (await self._ask(_TIME_TO_LIVE, request, _Once.READ)).ttl_s < 0:
                        return lease
        return leases[0]

    def watch(self, prefix: str, from_rev: int) -> AsyncIterator[Changes]:
        check_prefix(prefix)
        key, end = self._span(prefix)
        # Where the last fetch left off, if it was not cancelled.
        kept: list[_Stream] = []

        async def fetch(next_rev: int) -> Fetched:
            stream = kept.pop() if kept else None
            if stream is not None and stream.next_rev != next_rev:
                stream = None
            trouble = _Trouble(self)
            while True:
                self._check_open()
                try:
                    if stream is None:
                        stream = await self._open(key, end, next_rev)
                    trouble.over()
                    fetched = await stream.fetch(self._shown)
                except _Unknown as error:
                    if stream is not None:
                        self._leave(stream.member)
                    stream = None
                    self._check_open()
                    if not await trouble.again():
                        raise self._unavailable(str(error)) from error
                except _Refused as error:
                    stream = None
                    if error.code is not grpc.StatusCode.UNAUTHENTICATED:
                        raise self._refusal(error) from error
                    await self._log_in(self._token)
                    if not await trouble.again():
                        raise self._unavailable(str(error)) from error
                else:
                    kept.append(stream)
                    return fetched

        return LogWatch(fetch, from_rev)

    async def _open(self, key: bytes, end: bytes, next_rev: int) -> _Stream:
        member = self._members[self._member]
        call = member.watch(metadata=self._metadata())
        stream = _Stream(member, call, next_rev, self.url)
        self._streams.add(stream)
        # One more than is wanted; see the module's text.
        create = pb.WatchCreateRequest(
            key=key,
            range_end=end,
            start_revision=next_rev + _OFFSET - 1,
            progress_notify=True,
            fragment=True,
        )
        try:
            async with asyncio.timeout(self._call_timeout_s):
                await call.write(pb.WatchRequest(create_request=create))
                await stream.opened()
        except (*_ENDED, TimeoutError, _Unknown) as error:
            self._leave(member)
            raise _Unknown(f"{member.address}: {_why(error)}") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise _Unknown("the watch was ended here") from None
        return stream

    async def lease(self, ttl_s: float) -> int:
        check_ttl(ttl_s)
        number = secrets.randbelow((1 << 63) - 1) + 1
        request = pb.LeaseGrantRequest(ttl_s=math.ceil(ttl_s), id=number)
        try:
            await self._ask(_GRANT, request, _Once.AGAIN)
        except OutcomeUnknown as error:
            # It may be there; but nobody has its number, no key hangs on it, and it runs out.
            raise self._unavailable(str(error)) from error
        except _Refused as error:
            if "lease already exists" not in error.details:
                raise self._refusal(error) from error
        return number

    async def keepalive(self, lease: int) -> bool:
        check_lease(lease)
        try:
            answer = await self._ask(_KEEPALIVE, pb.LeaseKeepAliveRequest(id=lease), _Once.AGAIN)
        except OutcomeUnknown as error:
            # It may live longer than its holder counts on, which every holder expects.
            raise self._unavailable(str(error)) from error
        except _Refused as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return False
            raise self._refusal(error) from error
        return bool(answer.ttl_s > 0)

    async def revoke(self, lease: int) -> None:
        check_lease(lease)
        try:
            await self._ask(_REVOKE, pb.LeaseRevokeRequest(id=lease), _Once.AGAIN)
        except _Refused as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise self._refusal(error) from error

    # ------------------------------------------------------------------ keys

    def _stored(self, key: str) -> bytes:
        return self._root + key.encode()

    def _shown(self, stored: bytes) -> str:
        # Only a stranger writes what is not UTF-8; nothing of ours has such a key.
        return stored[len(self._root) :].decode(errors="surrogateescape")

    def _span(self, prefix: str) -> tuple[bytes, bytes]:
        full = f"{self._prefix}/{prefix}"
        # Never None: the slash has a successor.
        return full.encode(), (prefix_end(full) or "\0").encode()

    def _entry(self, kv: pb.KeyValue) -> Entry:
        return Entry(self._shown(kv.key), kv.value, kv.mod_revision - _OFFSET, kv.lease or None)

    # ------------------------------------------------------------------ calls

    def _presence(self) -> pb.RangeRequest:
        """A read that every member with a leader answers, whatever is stored."""
        return pb.RangeRequest(key=self._root, count_only=True)

    async def _read(self, request: pb.RangeRequest) -> Any:
        try:
            return await self._ask(_RANGE, request, _Once.READ)
        except _Refused as error:
            if error.code is grpc.StatusCode.OUT_OF_RANGE:
                raise Compacted(max(request.revision - _OFFSET, 0), url=self.url) from error
            raise self._refusal(error) from error

    async def _ask(self, method: _Method, request: Any, once: _Once) -> Any:
        """Send a request until it is answered, or the patience ends.

        Raises:
            _Refused: etcd answered that it will not.
            DirectoryUnavailable: Surely not done.
            OutcomeUnknown: It may be done, or may be yet; never for what only reads.
        """
        loop = self._check_open()
        if self._waiting >= REQUESTS_MAX:
            raise self._unavailable(f"{self._waiting} requests wait already")
        # NB: a coroutine may be begun before it has a task, which time-outs and gRPC ask for.
        await asyncio.sleep(0)
        trouble = _Trouble(self)
        self._waiting += 1
        try:
            async with asyncio.timeout_at(loop.time() + self._patience_s):
                await self._turns.acquire()
        except TimeoutError as error:
            raise self._unavailable("too many requests were under way") from error
        finally:
            self._waiting -= 1
        self._calls += 1
        doubtful = False
        try:
            while True:
                self._check_open()
                try:
                    return await self._ask_once(method, request, once)
                except _NotDone as error:
                    failure: Exception = error
                except _Unknown as error:
                    failure = error
                    doubtful = once is not _Once.READ
                if (once is _Once.ONCE and doubtful) or not await trouble.again():
                    if doubtful:
                        raise OutcomeUnknown(
                            f"{self.url} did not answer ({failure}), so this may or may not have "
                            "taken effect, and may yet; send it again, or read",
                            url=self.url,
                        ) from failure
                    raise self._unavailable(str(failure)) from failure
        finally:
            self._calls -= 1
            self._turns.release()
            if not self._calls:
                self._idle.set()

    async def _ask_once(self, method: _Method, request: Any, once: _Once) -> Any:
        """Send a request to the present member; _NotDone, _Unknown or _Refused if it fails."""
        member = self._members[self._member]
        token = self._token
        try:
            if once is _Once.ONCE:
                await self._probe(member)
            return await member.send(method, request, self._metadata(), self._call_timeout_s)
        except _Unknown:
            self._leave(member)
            raise
        except grpc.aio.AioRpcError as error:
            details = error.details() or ""
            match _verdict(error.code(), details):
                case _Verdict.REFUSED:
                    raise _Refused(error.code(), details) from error
                case _Verdict.LOGIN:
                    await self._log_in(token)
                    raise _NotDone(_why(error)) from error
                case _Verdict.NOT_DONE:
                    self._leave(member)
                    raise _NotDone(f"{member.address}: {_why(error)}") from error
                case _:
                    self._leave(member)
                    raise _Unknown(f"{member.address}: {_why(error)}") from error

    async def _probe(self, member: _Member) -> None:
        """See that a member answers before it is entrusted with a transaction."""
        loop = asyncio.get_running_loop()

        def fresh() -> bool:
            return loop.time() - member.answered_s < FRESH_S and member.connected()

        if fresh():
            return
        async with member.asking:
            if fresh():
                return
            try:
                await member.send(_RANGE, self._presence(), self._metadata(), self._call_timeout_s)
            except grpc.aio.AioRpcError as error:
                if _verdict(error.code(), error.details() or "") is not _Verdict.UNKNOWN:
                    raise
                self._leave(member)
                raise _NotDone(f"{member.address}: {_why(error)}") from error

    def _leave(self, member: _Member) -> None:
        """Go to the next member, with all watches, unless somebody has left this one already."""
        member.answered_s = -math.inf
        if self._members and self._members[self._member] is member:
            self._member = (self._member + 1) % len(self._members)
            for stream in list(self._streams):
                if stream.member is member:
                    stream.cancel()

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        leader = ("hasleader", "true")
        return (leader, ("token", self._token)) if self._token else (leader,)

    async def _log_in(self, token: str) -> None:
        """Get a new token, unless somebody has got one since `token` was used.

        Raises:
            DirectoryError: etcd does not know the user, or the password is wrong.
            DirectoryUnavailable: No member answers.
        """
        if self._token != token or not self._login.user:
            if not self._login.user:
                raise DirectoryError(
                    f"{self.url} asks for a user and a password: write "
                    "etcd://USER@HOST:PORT/PREFIX?password_file=FILE",
                    url=self.url,
                )
            return
        request = pb.AuthenticateRequest(name=self._login.user, password=self._login.password)
        trouble = _Trouble(self)
        while True:
            member = self._members[self._member]
            try:
                answer = await member.send(
                    _LOGIN, request, (("hasleader", "true"),), self._call_timeout_s
                )
            except grpc.aio.AioRpcError as error:
                details = error.details() or ""
                if "authentication is not enabled" in details:
                    return
                if _verdict(error.code(), details) is _Verdict.REFUSED:
                    raise DirectoryError(
                        f"{self.url} does not let this user in: {details}", url=self.url
                    ) from error
                self._leave(member)
                if not await trouble.again():
                    raise self._unavailable(_why(error)) from error
            else:
                self._token = answer.token
                return

    # ------------------------------------------------------------------ errors

    def _check_open(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._closed:
            state = "is closed" if self._closed else "has not been started"
            raise DirectoryUnavailable(f"{self.url} {state}; nothing was done", url=self.url)
        self._check_loop(self._loop)
        return self._loop

    def _check_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop is not asyncio.get_running_loop():
            raise DirectoryError(
                f"{self.url} was opened in another event loop; open one for each loop",
                url=self.url,
            )

    def _unavailable(self, why: str) -> DirectoryUnavailable:
        return DirectoryUnavailable(
            f"{self.url} does not serve now ({why}); nothing was done; retry later", url=self.url
        )

    def _refusal(self, error: _Refused) -> DirectoryError:
        hint = ""
        if error.code is grpc.StatusCode.UNIMPLEMENTED:
            hint = "; is this the client port of an etcd v3?"
        return DirectoryError(f"{self.url} refused this: {error}{hint}", url=self.url)


class _Trouble:
    """Counts the failures of one verb, and says for how long it tries again."""

    __slots__ = ("_directory", "_failures", "_until_s", "_waits")

    def __init__(self, directory: EtcdDirectory) -> None:
        self._directory = directory
        self.over()

    def over(self) -> None:
        """All is well again."""
        self._failures = 0
        self._until_s = math.inf
        self._waits = exponential(_PAUSE_FIRST_S, _PAUSE_MAX_S)

    async def again(self) -> bool:
        """Whether to try once more; pauses after each round over all members."""
        now_s = asyncio.get_running_loop().time()
        if not self._failures:
            self._until_s = now_s + self._directory._patience_s
        self._failures += 1
        if self._failures % len(self._directory._endpoints) == 0:
            await asyncio.sleep(next(self._waits))
        return now_s < self._until_s and not self._directory._closed
