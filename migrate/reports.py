"""What the verbs return: frozen values that say what is, or what was done.

Durations are seconds as float, sizes bytes as int. Fields are only ever added,
at the end and with a default.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

__all__ = [
    "CheckpointInfo",
    "Event",
    "EventKind",
    "LinkInfo",
    "MoveProgress",
    "MoveReport",
    "NodeInfo",
    "ServerInfo",
    "StandbyInfo",
]

EventKind: TypeAlias = Literal[
    "copying",
    "moved",
    "promoted",
    "restored",
    "standby_joined",
    "standby_lost",
    "stopped",
    "lost",
]


@dataclasses.dataclass(frozen=True, slots=True)
class LinkInfo:
    """One link of a node, and what it costs by its real traffic so far.

    Attributes:
        peer: Name of the node or client at the other end.
        kind: "unix" between processes of one host and user, "grpc" otherwise, "memory" in tests.
        rtt_s: Moving average of a round trip, in seconds; None before the first.
        bytes_per_s: Moving average of the rate while more waited than could leave; None while
            nothing ever had to wait.
        bytes_sent: Bytes of messages that left.
        bytes_received: Bytes of messages that came.
    """

    peer: str
    kind: str
    rtt_s: float | None
    bytes_per_s: float | None
    bytes_sent: int
    bytes_received: int


@dataclasses.dataclass(frozen=True, slots=True)
class NodeInfo:
    """One node of the cluster.

    Attributes:
        name: Its name.
        address: "host:port" of its links.
        pid: Process id on its host.
        host: Name of its host.
        servers: How many servers it owns.
        load: 0.0 for idle, 1.0 for a loop that is always busy; may exceed 1.
        cordoned: It admits neither spawns nor moves.
        draining: It is being emptied; implies `cordoned`.
        links: Its links with other nodes and clients, and what they cost.
    """

    name: str
    address: str
    pid: int
    host: str
    servers: int
    load: float
    cordoned: bool
    draining: bool
    links: tuple[LinkInfo, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class ServerInfo:
    """One server.

    Attributes:
        id: Its id; never reused.
        name: Its name in the directory, or None.
        cls: "module:Qualname" of its class.
        node: Name of its owner.
        epoch: Its epoch.
        version: Version of its state.
        mailbox: How many envelopes are not yet handled.
        standbys: Names of the nodes that may take over; each has all that was ever let out
            (mode "sync"), or all but the last of it ("async").
        mode: How they follow; None without standbys.
        durable: Whether a journal is kept.
        moving: The move that is under way; None if there is none.
        followers: Each of them, and those that are about to join, with how far it is.
    """

    id: str
    name: str | None
    cls: str
    node: str
    epoch: int
    version: int
    mailbox: int
    standbys: tuple[str, ...] = ()
    mode: Literal["sync", "async"] | None = None
    durable: bool = False
    moving: MoveProgress | None = None
    followers: tuple[StandbyInfo, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class StandbyInfo:
    """A node that follows a server.

    Attributes:
        node: Its name.
        state: "joining" while it has not all; "in sync"; "resyncing" when the server has a new
            owner, which lets nothing out before it has all again; "leaving".
        lag: How many changes it has not acknowledged yet.
    """

    node: str
    state: Literal["joining", "in sync", "resyncing", "leaving"]
    lag: int


@dataclasses.dataclass(frozen=True, slots=True)
class MoveProgress:
    """A move that is under way.

    Attributes:
        target: Name of the node that the server goes to.
        step: "waiting" for its turn, "preparing", "copying" its state ahead while it serves,
            "quiescing", then "moving": from there on it does not serve until it has moved.
        rounds: Rounds of pre-copy that have ended.
        bytes_sent: Bytes of state that have been sent ahead.
        seconds: Since the move began.
    """

    target: str
    step: Literal["waiting", "preparing", "copying", "quiescing", "moving"]
    rounds: int
    bytes_sent: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class MoveReport:
    """One move that committed.

    Attributes:
        source: Name of the node it left.
        target: Name of the node that owns it now.
        epoch: Its epoch after the move.
        downtime_s: Seconds from quiesced at the source until live at the target.
        total_s: Seconds from the request until the source had forwarded everything.
        bytes_sent: Bytes of state that crossed, all rounds together.
        rounds: Snapshots and deltas sent; 1 for plain stop-and-copy, 0 if the
            server was at the target already.
    """

    source: str
    target: str
    epoch: int
    downtime_s: float
    total_s: float
    bytes_sent: int
    rounds: int


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint.

    Attributes:
        url: Where it is.
        server: Id of the server.
        cls: "module:Qualname" of its class.
        version: Version of its state.
        epoch: Its epoch when the state was taken.
        bytes: Size of the checkpoint.
        digest: Digest of its content, as "algorithm:hex".
    """

    url: str
    server: str
    cls: str
    version: int
    epoch: int
    bytes: int
    digest: str


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a monitored server.

    Attributes:
        kind: "copying": a round of a move's pre-copy has ended; `cause` says how much
            went where. "moved": another node owns it. "promoted": a standby took over.
            "standby_joined" and "standby_lost": another node may take over now, or one may not
            any more; `cause` names it.
            "restored": it came back from a checkpoint. "stopped" and "lost": there
            will be no other event.
        server: Id of the server.
        node: Name of the owner after it; of the last one if stopped or lost.
        epoch: The epoch after it.
        cause: Why, in words; empty where the kind says it all.
    """

    kind: EventKind
    server: str
    node: str
    epoch: int
    cause: str = ""
