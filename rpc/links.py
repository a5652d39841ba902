"""Links between peers: opens, authenticates, keeps, replaces and ends them.

There is at most one link between two peers, whoever dialled. The layer above
hands over messages and gets messages; a link that breaks loses what was under
way and says so by `link_down`, and the layer above repeats what matters.

Both sides may dial at the same time. A side that has sent its proof and then
receives the other's proof compares ids: the link dialled by the lower id
comes up, the other is refused before it carries anything. `incoming_verdict`
holds the rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import grpc.aio

from rpc import auth, frames, handshake, memory_channel, unix_channel
from rpc.backoff import exponential, jittered
from rpc.channel import Channel, Listener, Transport
from rpc.errors import (
    AuthFailed,
    ChannelBroken,
    FrameError,
    LinksClosed,
    LinkTimeout,
    ListenFailed,
    PeerClosed,
    PeerRefused,
    RpcError,
    Unreachable,
)
from rpc.grpc_channel import GrpcTransport, split_address
from rpc.handshake import PeerInfo
from rpc.link import CLOSING, HANG_UP, Link, LinkCost, LinkHandler, LinkOptions, drain
from rpc.memory_channel import MemoryTransport
from rpc.tls import ROLE_NAMES, Credentials
from rpc.unix_channel import UnixTransport

__all__ = [
    "LinkCost",
    "LinkHandler",
    "LinkOptions",
    "Links",
    "PeerInfo",
    "Verdict",
    "ask",
    "incoming_verdict",
]


class Verdict(enum.Enum):
    """What to do with a proven incoming connection."""

    ACCEPT = "accept"
    REPLACE = "replace"
    """Accept; the present link with that peer is dead and does not know it."""
    REFUSE = "refuse"
    """The two have a link, or the other attempt will become one."""


def incoming_verdict(
    my_id: str,
    peer_id: str,
    *,
    present_link: bytes | None,
    present_dialled_here: bool,
    proving: bool,
    ended_link: bytes,
) -> Verdict:
    """Decide on an incoming connection whose dialler has proved itself.

    A dialler sends its proof only while it has no link with this side and no
    other attempt that has sent one. So, if this side has a link: one that the
    peer dialled is over at the peer, or it would not try again; one dialled
    here may simply not have reached the peer yet, unless the peer says that it
    saw this very link end.

    Args:
        my_id: This side's id.
        peer_id: The dialler's.
        present_link: Id of the link with that peer that is up here, if any.
        present_dialled_here: Whether this side dialled it.
        proving: Whether an attempt of this side's has sent its proof to that
            peer and waits for the answer.
        ended_link: Id of the last link that the dialler saw end; b"" if none.

    Returns:
        The verdict. Of two attempts that cross, exactly one side refuses.
    """
    if present_link is not None:
        if not present_dialled_here or present_link == ended_link:
            return Verdict.REPLACE
        return Verdict.REFUSE
    if proving and my_id < peer_id:
        return Verdict.REFUSE
    return Verdict.ACCEPT


_STOP_GRACE_S: Final = 0.5
"""For connections that are not links: half a handshake, or another service's requests."""


_DEFAULTS: Final = LinkOptions()


class _Dial:
    """One address that is kept dialled."""

    __slots__ = (
        "address",
        "expected_id",
        "kept",
        "last_error",
        "link",
        "peer_id",
        "stopped",
        "task",
        "waiters",
    )

    def __init__(self, address: str, expected_id: str | None) -> None:
        self.address = address
        self.expected_id = expected_id
        # Who was there last, or is expected there.
        self.peer_id = expected_id
        # Whether it outlives those who wait in `connect`.
        self.kept = False
        self.last_error: RpcError | None = None
        self.link: Link | None = None
        self.stopped = False
        self.task: asyncio.Task[None] | None = None
        self.waiters: list[asyncio.Future[PeerInfo]] = []

    def succeed(self, peer: PeerInfo) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(peer)

    def fail(self, error: RpcError) -> bool:
        """Tell who waits; returns whether anybody did."""
        waiters, self.waiters = self.waiters, []
        told = False
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)
                told = True
        return told


class _Attempt:
    """An outgoing handshake that has sent its proof."""

    __slots__ = ("abandoned", "channel")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.abandoned = False


class Links:
    """All links of one process with its peers.

    Belongs to one event loop. The order promised: messages that one peer sends
    over one link arrive in order within the bulk ones and within the others.
    """

    def __init__(
        self,
        me: PeerInfo,
        secret: bytes,
        handler: LinkHandler,
        options: LinkOptions = _DEFAULTS,
        *,
        tls: Credentials | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            me: This side. A node's empty address is filled in by `listen`.
            secret: The cluster secret, at least 32 bytes.
            handler: Told of everything that happens.
            options: Limits and times.
            tls: For all connections over TCP; None: none of them leaves this machine.
            draw: Random numbers in [0, 1) for the jitter of redialling.

        Raises:
            ValueError: The secret is too short.
        """
        if len(secret) < auth.SECRET_BYTES:
            raise ValueError(
                f"the cluster secret has {len(secret)} bytes, at least {auth.SECRET_BYTES} are "
                "needed; use rpc.auth.load_or_create_secret"
            )
        self.me = me
        """This side, as peers see it."""
        self.options = options
        """Limits and times."""
        self.handler = handler
        """Told of everything that happens."""
        self._secret = secret
        self._tls = tls
        self._draw = draw
        self._up: dict[str, Link] = {}
        # Links that have not ended; more than those up, as ends take a while.
        self._alive: set[Link] = set()
        self._ended: dict[str, bytes] = {}
        self._proving: dict[str, _Attempt] = {}
        self._dials: dict[tuple[str, str | None], _Dial] = {}
        self._listeners: list[Listener] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = 0
        self._closing = False

    # ---- the verbs

    async def listen(
        self,
        address: str,
        services: Sequence[Callable[[grpc.aio.Server], None]] = (),
        advertise: str = "",
    ) -> str:
        """Take links at an address.

        Args:
            address: host:port, without TLS on loopback; port 0 for any; or
                `memory:NAME`, or `unix:NAME`. On host:port also the other
                processes of this host and user find this side, by the channel
                they share.
            services: Each is called with the gRPC server before it starts, to
                add a service of its own to the port.
            advertise: host:port under which others reach this address; port 0
                stands for the one that was chosen. "": as it is.

        Returns:
            What others dial: the advertised address or else the one listened on,
            with the port that was chosen.

        Raises:
            ListenFailed: The port is in use, or the address leads beyond this
                machine (which needs TLS); nothing listens.
            LinksClosed: `close` was called.
        """
        self._check_open()
        transport = self._transport(address, services)
        listener = await transport.listen(address, self._accept)
        if self._closing:
            await listener.close(0)
            self._check_open()
        self._listeners.append(listener)
        shown = listener.address
        if advertise.endswith(":0"):
            advertise = advertise[:-1] + shown.rpartition(":")[2]
        host, _, port = shown.rpartition(":")
        local = f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else ""
        for name in dict.fromkeys(map(self._same_host, filter(None, (shown, local, advertise)))):
            # Whoever finds no such name dials the port. It is seen from this network namespace
            # only, where the address leads here too, unless it is another host's in truth: then
            # the incarnation that is found here is not the expected one.
            if name is not None:
                with contextlib.suppress(ListenFailed):
                    self._listeners.append(await self._transport(name).listen(name, self._accept))
        if self.me.kind == "node" and not self.me.address:
            self.me = replace(self.me, address=advertise or shown)
        return advertise or shown

    def dial(self, address: str, expected_id: str | None = None) -> None:
        """Keep a link to an address, until `hang_up` or `close`.

        Dials now and, with growing waits, whenever there is no link with the
        peer. Dialling stops with `dial_failed` if another incarnation than the
        expected one is there, it has another secret or no version in common,
        or the expected one has said goodbye. Repeating a dial changes nothing.

        Args:
            address: host:port, `memory:NAME` or `unix:NAME`. A host:port of
                this host is dialled by a faster channel if it has one.
            expected_id: The incarnation meant; None for whichever is there.

        Raises:
            LinksClosed: `close` was called.
        """
        self._check_open()
        self._start_dial(address, expected_id).kept = True

    async def connect(self, address: str, timeout_s: float) -> PeerInfo:
        """Dial, and wait until the link is up. It is then kept like a dialled one.

        Args:
            address: host:port, or `memory:NAME`.
            timeout_s: Seconds to try.

        Returns:
            Who is there.

        Raises:
            LinkTimeout: No link came up in time; the cause is the last failure.
            AuthFailed: The other side has another cluster secret.
            PeerRefused: One side does not want the link.
            LinksClosed: `close` was called.

        After an error the address is not dialled any more, unless `dial` asked
        for it.
        """
        self._check_open()
        dial = self._start_dial(address, None)
        present = self._link_of(dial)
        if present is not None:
            return present.peer
        waiter: asyncio.Future[PeerInfo] = asyncio.get_running_loop().create_future()
        dial.waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                peer = await waiter
            dial.kept = True
            return peer
        except TimeoutError as error:
            last = dial.last_error
            raise LinkTimeout(
                f"no link with {address} within {timeout_s:g} s; "
                + (f"last: {last}" if last else "it did not answer"),
                timeout_s=timeout_s,
                address=address,
            ) from (last or error)
        finally:
            if waiter in dial.waiters:
                dial.waiters.remove(waiter)
            if not dial.kept and not dial.waiters:
                self._stop_dial(dial)

    def send(self, peer_id: str, data: frames.Data | frames.Gathered, bulk: bool = False) -> bool:
        """Send one message; never waits.

        Args:
            peer_id: The peer's id.
            data: The message. If it is mutable and larger than 64 KiB it must
                not change until it has left (`queued_bytes`).
            bulk: Whether it may wait behind others; right for large ones. An
                ordinary message delays the ordinary ones behind it.

        Returns:
            Whether it was taken: False if no link is up or `queue_bytes_max`
            waits. A message that was taken is lost if the link goes down.

        Raises:
            MessageTooLarge: It is over `message_bytes_max`.
        """
        link = self._up.get(peer_id)
        if link is None:
            return False
        return link.send(data, bulk)

    def send_urgent(self, peer_id: str, data: bytes) -> bool:
        """Send a small message that overtakes all others that wait, also on a full queue.

        Returns:
            Whether it was taken: False if no link is up.
        """
        link = self._up.get(peer_id)
        return link is not None and link.send_urgent(data)

    def push(self) -> None:
        """Hand to the channels what waits, also from within `received`, whose answers otherwise
        leave together when it has returned. For a process that is about to stop or to end.
        """
        for link in list(self._up.values()):
            link.push()

    def queued_bytes(self, peer_id: str) -> int:
        """Tell how many bytes wait to be sent to a peer; 0 without a link."""
        link = self._up.get(peer_id)
        return 0 if link is None else link.queued_bytes

    def channel_kind(self, peer_id: str) -> str | None:
        """Tell by which kind of channel a peer is reached: "grpc", "unix" or "memory"."""
        link = self._up.get(peer_id)
        return None if link is None else link.channel_kind

    def cost(self, peer_id: str) -> LinkCost | None:
        """Tell what the link with a peer costs; None without a link."""
        link = self._up.get(peer_id)
        return None if link is None else link.cost

    def shares(self, peer_id: str) -> bool:
        """Tell whether large messages reach a peer by shared memory."""
        link = self._up.get(peer_id)
        return link is not None and link.shares

    def peer(self, peer_id: str) -> PeerInfo | None:
        """Tell what a peer said of itself; None without a link."""
        link = self._up.get(peer_id)
        return None if link is None else link.peer

    def is_up(self, peer_id: str) -> bool:
        """Tell whether a link with the peer is up."""
        return peer_id in self._up

    def peers(self) -> list[PeerInfo]:
        """List the peers with which a link is up, in the order they came up."""
        return [link.peer for link in self._up.values()]

    def hang_up(self, peer_id: str) -> None:
        """End the link with a peer and dial it no more.

        The handler gets `link_down` at once; what is queued is still sent, in
        the background. Does nothing for an unknown peer.
        """
        for dial in list(self._dials.values()):
            if dial.peer_id == peer_id:
                self._stop_dial(dial)
        link = self._up.get(peer_id)
        if link is not None:
            # Finishing comes first: a link that is down without it just ends.
            link.finish(HANG_UP)
            link.go_down("hung up here")
            self._spawn(link.end(HANG_UP))

    async def close(self) -> None:
        """End everything in order: send what is queued, say goodbye, stop listening.

        Takes at most a few times `close_timeout_s`. Each link that is up gets
        its `link_down`. Afterwards `send` returns False and the other verbs
        raise `LinksClosed`. The second time it only waits for the first.
        """
        self._closing = True
        for dial in list(self._dials.values()):
            self._stop_dial(dial)
        ends = [asyncio.ensure_future(link.end(CLOSING)) for link in self._alive]
        if ends:
            await asyncio.gather(*ends)
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            # Without this grace gRPC logs the end of each idle connection as an error.
            await listener.close(_STOP_GRACE_S)
        if self._tasks:
            # They were cancelled above, and a second time would cut their cleaning up.
            await asyncio.wait(list(self._tasks), timeout=self.options.close_timeout_s)
        for task in list(self._tasks):
            task.cancel()
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    # ---- what links tell

    def went_down(self, link: Link, cause: str) -> None:
        """Take a link off the list and tell the handler; called by the link, once."""
        if self._up.get(link.peer.id) is link:
            del self._up[link.peer.id]
            # Re-inserting keeps the order of ending, and the oldest give way.
            self._ended.pop(link.peer.id, None)
            self._ended[link.peer.id] = link.link_id
            if len(self._ended) > self.options.links_max:
                del self._ended[next(iter(self._ended))]
        self._tell(self.handler.link_down, link.peer, cause)

    def report(self, error: BaseException, where: str) -> None:
        """Hand an error that is nobody's to the loop's exception handler."""
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"livemigrate: {where} of a link failed", "exception": error}
        )

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            self.report(error, getattr(function, "__name__", "handler"))

    # ---- opening

    def _check_open(self) -> None:
        if self._closing:
            raise LinksClosed("these links are closed; make a new Links")

    def _transport(
        self, address: str, services: Sequence[Callable[[grpc.aio.Server], None]] = ()
    ) -> Transport:
        if address.startswith(memory_channel.SCHEME):
            return MemoryTransport()
        if address.startswith(unix_channel.SCHEME):
            return UnixTransport(frame_bytes_max=self._frame_bytes_max)
        return GrpcTransport(
            frame_bytes_max=self._frame_bytes_max,
            silence_max_s=self.options.silence_max_s,
            services=services,
            tls=self._tls,
        )

    def _same_host(self, address: str) -> str | None:
        """Tell under which name processes of this host find who listens at host:port."""
        if not (self.options.same_host and unix_channel.AVAILABLE):
            return None
        try:
            host, port = split_address(address)
        except ValueError:
            return None
        return f"{unix_channel.SCHEME}{'127.0.0.1' if host == 'localhost' else host}:{port}"

    async def _channel_to(self, address: str) -> Channel:
        """Begin a connection by the fastest channel that leads there."""
        if (same_host := self._same_host(address)) is not None:
            with contextlib.suppress(Unreachable):
                return await self._transport(same_host).dial(same_host)
        return await self._transport(address).dial(address)

    @property
    def _frame_bytes_max(self) -> int:
        return max(frames.frame_bytes_max(self.options.lane_bytes_max), frames.HANDSHAKE_BYTES_MAX)

    def _boxes(
        self, transcript: auth.Transcript, dialled_here: bool
    ) -> tuple[frames.Outbox, frames.Inbox, bytes]:
        keys = auth.link_keys(self._secret, transcript)
        ours, theirs = keys.from_dialler, keys.from_acceptor
        if not dialled_here:
            ours, theirs = theirs, ours
        options = self.options
        outbox = frames.Outbox(
            ours,
            lane_bytes_max=options.lane_bytes_max,
            message_bytes_max=options.message_bytes_max,
        )
        inbox = frames.Inbox(
            theirs,
            frame_bytes_max=self._frame_bytes_max,
            message_bytes_max=options.message_bytes_max,
        )
        return outbox, inbox, keys.link_id

    def _bring_up(self, link: Link) -> None:
        self._up[link.peer.id] = link
        self._alive.add(link)
        link.ended.add_done_callback(lambda _ended: self._alive.discard(link))
        link.start()
        for dial in self._dials.values():
            if dial.peer_id == link.peer.id:
                dial.succeed(link.peer)
        self._tell(self.handler.link_up, link.peer)

    async def _refuse(self, channel: Channel, error: RpcError) -> None:
        """Tell the other side why there will be no link, if it can still be told."""
        if isinstance(error, AuthFailed):
            reason = "secret"
        elif isinstance(error, PeerRefused):
            reason = error.reason
            if reason not in handshake.REASONS:
                return  # Not one to be told: what listens there is no node, or a newer one.
        elif isinstance(error, FrameError):
            reason = "malformed"
        else:
            return
        # It is gone already: there is nobody to tell.
        with contextlib.suppress(RpcError, TimeoutError):
            async with asyncio.timeout(self.options.handshake_timeout_s):
                await channel.write([handshake.refusal(reason, str(error), self.me)])

    # ---- the accepting side

    async def _accept(self, channel: Channel) -> None:
        address = channel.address
        try:
            if self._closing:
                raise PeerRefused(
                    f"{self.me.name or self.me.id} is closing; dial another node",
                    reason="closing",
                    address=address,
                )
            if (
                self._accepting >= self.options.handshakes_max
                or len(self._alive) >= self.options.links_max
            ):
                raise PeerRefused(
                    f"{self.me.name or self.me.id} has no room for another link; try later, or "
                    "raise handshakes_max or links_max",
                    reason="limit",
                    address=address,
                )
            self._accepting += 1
            try:
                async with asyncio.timeout(self.options.handshake_timeout_s):
                    peer, boxes, ended_link = await self._prove_in(channel)
            except TimeoutError as error:
                raise LinkTimeout(
                    f"{address} did not complete its handshake within "
                    f"{self.options.handshake_timeout_s:g} s",
                    timeout_s=self.options.handshake_timeout_s,
                    address=address,
                ) from error
            finally:
                self._accepting -= 1
            # From here to the link's being up nothing is awaited, so what is
            # decided on stays true.
            link = self._admit(channel, peer, boxes, ended_link)
        except RpcError as error:
            await self._refuse(channel, error)
            expected = isinstance(error, PeerRefused) and error.reason == "duplicate"
            if not expected and not isinstance(error, ChannelBroken):
                self._tell(self.handler.accept_failed, address, error)
            return
        await link.run()

    async def _prove_in(
        self, channel: Channel
    ) -> tuple[PeerInfo, tuple[frames.Outbox, frames.Inbox, bytes], bytes]:
        address = channel.address
        frame = await _some(channel)
        their_nonce, their_info, peer = handshake.read_hello(frame, address)
        handshake.check_versions(self.me, peer, address)
        names = channel.certified
        if names is not None and peer.kind == "node" and ROLE_NAMES["node"] not in names:
            raise PeerRefused(
                f"{address} calls itself a node, but its certificate is not a node's; give nodes "
                "certificates of their own",
                reason="certificate",
                address=address,
                peer_id=peer.id,
            )
        if peer.id == self.me.id:
            raise PeerRefused(
                f"{address} dials with this side's own id: a node has no link with itself; "
                "dial the address of another one",
                reason="incarnation",
                address=address,
                peer_id=peer.id,
            )
        nonce, info = auth.new_nonce(), self.me.to_bytes()
        transcript = auth.Transcript(their_nonce, nonce, their_info, info)
        ours = auth.acceptor_proof(self._secret, transcript)
        await channel.write([handshake.challenge(nonce, info, ours)])
        frame = await _some(channel)
        if frames.is_plain(frame):
            kind, payload = frames.open_plain(frame)
            if kind == frames.REFUSAL:
                raise handshake.refused(payload, address)
            raise FrameError(f"a handshake message of kind {kind} where a proof was due")
        boxes = self._boxes(transcript, dialled_here=False)
        try:
            items = boxes[1].feed(frame)
        except FrameError as error:
            raise self._auth_failed(address, peer.id) from error
        if len(items) != 1 or items[0].kind != frames.PROOF:
            raise FrameError("something else where a proof was due")
        proof, ended_link = handshake.read_proof(bytes(items[0].data))
        if not auth.proves(proof, auth.dialler_proof(self._secret, transcript)):
            raise self._auth_failed(address, peer.id)
        return peer, boxes, ended_link

    def _auth_failed(self, address: str, peer_id: str) -> AuthFailed:
        return AuthFailed(
            f"{address} does not hold this cluster's secret; {handshake.SECRET_REMEDY}",
            address=address,
            peer_id=peer_id,
        )

    def _admit(
        self,
        channel: Channel,
        peer: PeerInfo,
        boxes: tuple[frames.Outbox, frames.Inbox, bytes],
        ended_link: bytes,
    ) -> Link:
        if self._closing:
            raise PeerRefused(
                f"{self.me.name or self.me.id} is closing; dial another node",
                reason="closing",
                address=channel.address,
                peer_id=peer.id,
            )
        present = self._up.get(peer.id)
        attempt = self._proving.get(peer.id)
        verdict = incoming_verdict(
            self.me.id,
            peer.id,
            present_link=None if present is None else present.link_id,
            present_dialled_here=present is not None and present.dialled_here,
            proving=attempt is not None,
            ended_link=ended_link,
        )
        if verdict is Verdict.REFUSE:
            raise PeerRefused(
                f"{self.me.name or self.me.id} has, or is opening, another link with this peer",
                reason="duplicate",
                address=channel.address,
                peer_id=peer.id,
            )
        if present is not None:
            present.drop("replaced by a new connection from the same peer")
        if attempt is not None:
            attempt.abandoned = True
            attempt.channel.abort()
        outbox, inbox, link_id = boxes
        link = Link(self, peer, channel, link_id, outbox, inbox, dialled_here=False)
        # The first record of the first frame, so it precedes whatever
        # `link_up` makes the handler send.
        outbox.push_control(frames.WELCOME)
        self._bring_up(link)
        return link

    # ---- the dialling side

    def _start_dial(self, address: str, expected_id: str | None) -> _Dial:
        dial = self._dials.get((address, expected_id))
        if dial is None:
            dial = self._dials[address, expected_id] = _Dial(address, expected_id)
            dial.task = self._spawn(self._keep(dial))
        return dial

    def _stop_dial(self, dial: _Dial) -> None:
        dial.stopped = True
        if self._dials.get((dial.address, dial.expected_id)) is dial:
            del self._dials[dial.address, dial.expected_id]
        dial.fail(LinksClosed(f"dialling {dial.address} was ended here", address=dial.address))
        # A dial whose link is up runs its reader, and goes with the link.
        if dial.link is None and dial.task is not None:
            dial.task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.report(error, "keeping")

    def _link_of(self, dial: _Dial) -> Link | None:
        return None if dial.peer_id is None else self._up.get(dial.peer_id)

    def _waits(self) -> Iterator[float]:
        options = self.options
        return jittered(exponential(options.redial_first_s, options.redial_max_s), self._draw)

    async def _keep(self, dial: _Dial) -> None:
        try:
            await self._keep_dialling(dial)
        except Exception as bug:
            # Nobody awaits this task, so whoever waits for the link is told here.
            self.report(bug, "dialling")
            error = RpcError(
                f"dialling {dial.address} failed by an error in livemigrate itself: {bug!r}; "
                "please report it",
                address=dial.address,
            )
            error.__cause__ = bug
            self._give_up(dial, error)

    async def _keep_dialling(self, dial: _Dial) -> None:
        loop = asyncio.get_running_loop()
        waits = self._waits()
        while not dial.stopped:
            began_s = loop.time()
            error: RpcError | None = None
            link = self._link_of(dial)
            try:
                if link is not None:
                    # The peer has dialled this side, or another address led to it.
                    dial.succeed(link.peer)
                    await asyncio.wait([link.ended])
                else:
                    link = await self._dial_once(dial)
            except RpcError as failure:
                error = failure
            else:
                if link.goodbye and (dial.expected_id is not None or link.goodbye == HANG_UP):
                    error = PeerClosed(
                        f"{link.peer.name or link.peer.id} at {dial.address} ended the link and "
                        "will not take another one; dial the node that replaces it",
                        address=dial.address,
                        peer_id=link.peer.id,
                    )
            if error is not None and not dial.stopped:
                dial.last_error = error
                if _is_final(error):
                    self._give_up(dial, error)
                    return
            # A link that held for long has paid for a quick first try; one that
            # breaks at once, again and again, has not.
            if loop.time() - began_s > self.options.redial_max_s:
                waits = self._waits()
            if not dial.stopped:
                await asyncio.sleep(next(waits))

    def _give_up(self, dial: _Dial, error: RpcError) -> None:
        kept = dial.kept
        told = dial.fail(error)
        self._stop_dial(dial)
        if kept or not told:
            self._tell(self.handler.dial_failed, dial.address, dial.expected_id, error)

    async def _dial_once(self, dial: _Dial) -> Link:
        """Make one connection, and if it becomes a link, stay with it to its end."""
        options = self.options
        channel = await self._channel_to(dial.address)
        attempt = _Attempt(channel)
        peer_id = ""
        try:
            try:
                async with asyncio.timeout(options.handshake_timeout_s):
                    peer, boxes = await self._prove_out(channel, dial)
                    peer_id = peer.id
                    # Nothing was awaited since `_prove_out` saw that this is
                    # the only attempt that has sent a proof to this peer.
                    self._proving[peer_id] = attempt
                    items = await self._welcome(channel, boxes)
            except TimeoutError as error:
                raise LinkTimeout(
                    f"{dial.address} did not complete its handshake within "
                    f"{options.handshake_timeout_s:g} s; it hangs, or is no node",
                    timeout_s=options.handshake_timeout_s,
                    address=dial.address,
                ) from error
            except RpcError as error:
                if attempt.abandoned:
                    raise self._duplicate(dial, peer_id) from error
                await self._refuse(channel, error)
                await drain(channel, options.close_timeout_s)
                raise
            finally:
                if self._proving.get(peer_id) is attempt:
                    del self._proving[peer_id]
            if attempt.abandoned or peer_id in self._up:
                raise self._duplicate(dial, peer_id)
            outbox, inbox, link_id = boxes
            link = Link(self, peer, channel, link_id, outbox, inbox, dialled_here=True)
            dial.link = link
            dial.last_error = None
            self._bring_up(link)
            await link.run(items)
            return link
        finally:
            dial.link = None
            await channel.close()

    async def _prove_out(
        self, channel: Channel, dial: _Dial
    ) -> tuple[PeerInfo, tuple[frames.Outbox, frames.Inbox, bytes]]:
        address = dial.address
        nonce, info = auth.new_nonce(), self.me.to_bytes()
        frame = await ask(channel, [handshake.hello(nonce, info)])
        their_nonce, their_info, peer, proof = handshake.read_challenge(frame, address)
        handshake.check_versions(self.me, peer, address)
        transcript = auth.Transcript(nonce, their_nonce, info, their_info)
        if not auth.proves(proof, auth.acceptor_proof(self._secret, transcript)):
            raise self._auth_failed(address, peer.id)
        if peer.id == self.me.id or (dial.expected_id is not None and peer.id != dial.expected_id):
            raise PeerRefused(
                f"{peer.name or peer.id} (incarnation {peer.id}) is at {address}, but "
                f"{dial.expected_id or 'another one than this side itself'} was expected; ask for "
                "the present address of the one you mean",
                reason="incarnation",
                address=address,
                peer_id=peer.id,
            )
        dial.peer_id = peer.id
        if peer.id in self._up or peer.id in self._proving:
            raise self._duplicate(dial, peer.id)
        outbox, inbox, link_id = self._boxes(transcript, dialled_here=True)
        ours = auth.dialler_proof(self._secret, transcript)
        outbox.push_control(frames.PROOF, handshake.proof(ours, self._ended.get(peer.id, b"")))
        return peer, (outbox, inbox, link_id)

    async def _welcome(
        self, channel: Channel, boxes: tuple[frames.Outbox, frames.Inbox, bytes]
    ) -> list[frames.Received]:
        outbox, inbox, _link_id = boxes
        parts = outbox.take()
        if parts is None:
            raise AssertionError("a proof was queued just before")
        frame = await ask(channel, parts)
        if frames.is_plain(frame):
            kind, payload = frames.open_plain(frame)
            if kind == frames.REFUSAL:
                raise handshake.refused(payload, channel.address)
            raise FrameError(f"a handshake message of kind {kind} where a welcome was due")
        items = inbox.feed(frame)
        if not items or items[0].kind != frames.WELCOME:
            raise FrameError("something else where a welcome was due")
        return items[1:]

    def _duplicate(self, dial: _Dial, peer_id: str) -> PeerRefused:
        return PeerRefused(
            f"this side has, or is opening, another link with the peer at {dial.address}",
            reason="duplicate",
            address=dial.address,
            peer_id=peer_id,
        )


async def _some(channel: Channel) -> bytes | memoryview:
    frame = await channel.read()
    if frame is None:
        raise ChannelBroken(
            f"{channel.address} ended the connection during the handshake", address=channel.address
        )
    return frame


async def ask(channel: Channel, parts: Sequence[bytes | memoryview]) -> bytes | memoryview:
    """Send one frame and receive one.

    The read is begun before the write: a side that refuses at once ends the
    connection, and gRPC then fails the write and forgets what had arrived
    unless somebody was already waiting for it.

    Raises:
        RpcError: As the read says, since it knows why a write failed.
    """
    reading = asyncio.ensure_future(_some(channel))
    # Looked at in any case, also if a cancelling keeps it from being awaited.
    reading.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        # Let the read begin.
        await asyncio.sleep(0)
        with contextlib.suppress(RpcError):
            await channel.write(parts)
        return await reading
    finally:
        if not reading.done():
            reading.cancel()
            await asyncio.wait([reading])


def _is_final(error: RpcError) -> bool:
    """Tell whether dialling again cannot help."""
    if isinstance(error, PeerRefused):
        return error.reason in ("version", "incarnation", "malformed", "protocol", "certificate")
    return isinstance(error, AuthFailed | PeerClosed)
