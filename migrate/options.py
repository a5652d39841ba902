"""Every tunable and limit, with its unit and its reason.

Names end in their unit: `_s` seconds as float, `_ms` milliseconds as int,
`_bytes` bytes as int; a name without a unit is a count.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from migrate.errors import UsageError

if TYPE_CHECKING:
    from migrate.ref import Ref

__all__ = ["LEAST_LOADED", "NodeOptions", "Placement", "SpawnOptions"]


class Placement(enum.Enum):
    """How to choose a node when no name is given; members pickle as themselves."""

    LEAST_LOADED = "least_loaded"

    def __repr__(self) -> str:
        return f"migrate.{self.name}"


LEAST_LOADED: Final = Placement.LEAST_LOADED
"""The node with the lowest fresh load figures: `SpawnOptions(on=LEAST_LOADED)`."""

# A target as verbs take it: a node's name, or the choice left to the placement.
NodeChoice: TypeAlias = str | Literal[Placement.LEAST_LOADED]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpawnOptions:
    """How and where to spawn a server.

    Attributes:
        name: Name to register in the directory; None: the server has only its id.
        on: Name of the node to spawn on, or `LEAST_LOADED`; None: the node asked.
        near: Ref of a server whose node is to be chosen; excludes `on`.
        standbys: Hot standbys: how many, or the names of their nodes; see `replicate`. The
            spawn returns when they are in sync, or fails.
        standby_mode: How they follow, see `replicate`.
        durable: Keep a journal, where the node keeps them (`Node(data=...)`); so does
            `@server(durable=True)`. The spawn returns when it is there, or fails. No verb changes
            it later: `restore(..., replace=True)` keeps what the server had; a fork, and a server
            that is restored after it was lost or stopped, has a journal if its class says
            `@server(durable=True)`, whatever these options said when it was spawned.

    Raises:
        UsageError: Both `on` and `near` are given, or a name is empty, too long
            or not a string; `standbys` or `standby_mode` is something else.
    """

    name: str | None = None
    on: NodeChoice | None = None
    near: Ref[Any] | None = None
    standbys: int | Sequence[str] = ()
    standby_mode: Literal["sync", "async"] = "sync"
    durable: bool = False

    def __post_init__(self) -> None:
        if self.on is not None and self.near is not None:
            raise UsageError(
                "SpawnOptions takes either on= or near=, not both: near= already means "
                "the node of that server"
            )
        _check_name("name", self.name)
        if not isinstance(self.on, Placement):
            _check_name("on", self.on)
        checked_standbys(self.standbys, self.standby_mode)
        if self.durable is True and self.standbys and self.standby_mode == "async":
            raise UsageError(
                "a durable server cannot have async standbys: one of them would take it back "
                "behind its journal; use sync ones"
            )
        if not isinstance(self.durable, bool):
            raise UsageError(f"SpawnOptions(durable=...) takes True or False, not {self.durable!r}")


# Names travel in every lookup and are keys of the directory, so they are bounded.
NAME_CHARS_MAX: Final = 255


def _check_name(field: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise UsageError(f"SpawnOptions({field}=...) takes a string, not {type(value).__name__}")
    if not 1 <= len(value) <= NAME_CHARS_MAX:
        raise UsageError(
            f"SpawnOptions({field}=...) takes 1 to {NAME_CHARS_MAX} characters, not {len(value)}"
        )
    if not value.isprintable():
        raise UsageError(f"SpawnOptions({field}={value!r}) has characters that cannot be printed")


STANDBYS_MAX: Final = 16
"""Each costs the owner a copy of every change, and every reply waits for the slowest."""


def checked_standbys(given: object, mode: object) -> tuple[tuple[str, ...], int]:
    """A wish for standbys as verbs take it.

    Returns:
        Names of nodes, or none; how many on any nodes, or 0.

    Raises:
        UsageError: It is something else.
    """
    if mode not in ("sync", "async"):
        raise UsageError(f'the mode of standbys is "sync" or "async", not {mode!r}')
    if isinstance(given, int) and not isinstance(given, bool):
        if not 0 <= given <= STANDBYS_MAX:
            raise UsageError(f"0 to {STANDBYS_MAX} standbys can be asked for, not {given}")
        return (), given
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise UsageError(
            f"standbys are given as a list of nodes' names, or as how many; not as {given!r}"
        )
    names = tuple(given)
    for name in names:
        if not isinstance(name, str):
            raise UsageError(f"a node's name is a string, not {name!r}")
    if len(set(names)) != len(names):
        raise UsageError(f"a node can stand by only once: {', '.join(names)}")
    if len(names) > STANDBYS_MAX:
        raise UsageError(f"0 to {STANDBYS_MAX} standbys can be asked for, not {len(names)}")
    return names, 0


def _option(default: float, low: float, high: float = math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"low": low, "high": high})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """Tunables and limits of one node; the defaults serve most programs.

    Two nodes of a cluster may differ in all of them: nothing here is agreed
    on, every limit is enforced by the node that has it.

    Raises:
        UsageError: A value is not of the field's kind, or lies outside its bounds;
            the message names the field and the bounds.
    """

    # Calls.

    call_timeout_s: float | None = _option(30.0, 0.001)
    """How long a call without a time-out of its own waits; None: for ever.
    Longer than a quiesce, so that a call outlasts the move of a busy server."""

    window: int = _option(1024, 1, 65536)
    """Requests of one session to one server that may be unacknowledged; the next
    one waits. Bounds what a sender keeps for repeating and a receiver holds early."""

    repeat_first_s: float = _option(1.0, 0.01)
    """Wait before an unacknowledged request is repeated for the first time. Well
    above a round trip, because links are reliable and only a break loses frames."""

    repeat_max_s: float = _option(5.0, 0.01)
    """Longest wait between repeats; they back off up to it. Bounds how long a
    healed partition goes unnoticed."""

    ack_idle_s: float = _option(0.5, 0.01)
    """An idle sender acknowledges its last result after this time, so that what
    receivers keep is bounded by what is outstanding (DESIGN promises a second)."""

    hops_max: int = _option(2, 1, 16)
    """Forwardings after which an envelope's sender asks the directory instead."""

    deadlock_probe_ms: int = _option(100, 1)
    """A handler that waits this long for another server sends a probe along its
    waits. Source: Chandy, Misra, Haas 1983; shorter only costs messages."""

    hold_warn_ms: int = _option(100, 1)
    """A handler that holds the node's loop this long without awaiting is named in
    a warning: everything else on the node stood still."""

    # What a receiver remembers.

    session_expiry_s: float = _option(300.0, 1.0)
    """A client's session ends this long after its last sign of life, and its
    completion records with it."""

    sessions_max: int = _option(10_000, 1)
    """Sessions that one server remembers; a new one beyond it is refused."""

    records_max: int = _option(100_000, 1)
    """Completion records that one server keeps over all sessions; beyond it new
    requests are held back until acknowledgements come in."""

    record_bytes_max: int = _option(64 << 20, 1 << 10)
    """Bytes of recorded results that one server keeps; the same rule."""

    mailbox_bytes_max: int = _option(64 << 20, 1 << 10)
    """Bytes that the arguments in one server's mailbox may take, beside the number of its messages
    (`@server(mailbox=...)`). A message is taken while there are fewer, so none is too large and
    the bound is passed by one at the most; those beyond are held back at their senders. What comes
    with a move or after a failover is taken whole."""

    tombstone_s: float = _option(300.0, 1.0)
    """A stopped server's completion records answer late repeats this long."""

    forwarding_expiry_s: float = _option(300.0, 1.0)
    """A forwarding address lives this long; then the answer is to ask the directory."""

    forwarding_max: int = _option(100_000, 1)
    """Forwarding addresses kept at one node; the oldest goes first."""

    # Moves.

    quiesce_timeout_s: float = _option(30.0, 0.001)
    """How long a move waits for the running handler before it is rolled back."""

    move_step_timeout_s: float = _option(10.0, 0.01)
    """Bound of every other step of a move: prepare, transfer of one chunk, ready."""

    moves_max: int = _option(64, 1, 65536)
    """Outgoing moves of one node at a time; the others wait. Bounds memory and
    keeps a drain from starving the calls."""

    precopy_bytes_min: int = _option(256 << 10, 0)
    """States known to be smaller are sent in one piece, at the quiescent point, which takes
    milliseconds; of larger ones what can go ahead does. A huge value turns pre-copy off."""

    chunk_bytes: int = _option(4 << 20, 64 << 10, 256 << 20)
    """About what one chunk of a state that is sent ahead takes. Each waits for the
    one before to be installed, so that no more than one is in memory at a time."""

    state_bytes_max: int = _option(64 << 30, 1 << 20)
    """Largest state that a target reserves room for; a larger one is refused."""

    hook_timeout_s: float = _option(10.0, 0.001)
    """Bound of one hook (`on_start`, `on_depart`, ...); one that takes longer is cancelled and
    counts as failed, so that a hook that hangs cannot hold a move or a drain for ever."""

    # Running handlers.

    blocking_threads_max: int = _option(32, 1, 4096)
    """Worker threads of one node for `@migrate.blocking` handlers; more wait in line."""

    blocking_processes_max: int = _option(os.cpu_count() or 1, 1, 4096)
    """Worker processes of one node for `@migrate.blocking(process=True)` handlers; more wait in
    line. One for each core, since what needs a process of its own keeps one busy."""

    # Membership.

    lease_s: float = _option(10.0, 0.5)
    """A node is suspected when its lease was not renewed for this long. Give it at
    least 5 where the directory is replicated: electing its new leader takes 1 to 4 s.
    Source: the project's measurements of etcd with an isolated leader."""

    # Standbys.

    promote_patience_s: float = _option(1.0, 0.0)
    """How long a node whose lease has run out must stay silent, while the directory answers,
    before a standby asks for what it owned: time for a node that was cut off from the directory
    to take a new lease. A process whose death is seen is not waited for."""

    standby_patience_s: float = _option(2.0, 0.05)
    """A standby that is silent for this long, though changes wait for its acknowledgement, is
    taken out of the set: how long a standby that hangs can hold back the replies."""

    async_lag_s: float = _option(1.0, 0.001)
    """An owner with async standbys lets out no more while the oldest change that one of them
    has not acknowledged is older than this: what a failover can lose at most, in time."""

    async_lag_bytes: int = _option(16 << 20, 1024)
    """The same in bytes of changes that are under way to one of them."""

    digest_every_s: float = _option(1.0, 0.0)
    """How often a deterministic server and its standbys compare the digest of a slice of their
    states, which costs each about two milliseconds; 0: only before a move to a standby."""

    # Admission.

    servers_max: int = _option(1_000_000, 1)
    """Servers that one node hosts; a spawn or move beyond it is refused."""

    message_bytes_max: int = _option(256 << 20, 1024)
    """Largest arguments or result of one call, encoded."""

    # Channels.

    same_host: bool = True
    """Whether links to processes of this host and user go over a Unix-domain socket
    where both sides want it; otherwise over gRPC, as between hosts."""

    share_memory: bool = True
    """Whether large messages on such a socket go by shared memory, without being
    copied through it; said of what this node sends."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_number(field, getattr(self, field.name))
        if self.repeat_first_s > self.repeat_max_s:
            raise UsageError(
                f"NodeOptions: repeat_first_s={self.repeat_first_s} must not exceed "
                f"repeat_max_s={self.repeat_max_s}"
            )

    def replace(self, **changes: Any) -> NodeOptions:
        """Return a copy with some fields changed, checked as a new one is.

        Raises:
            UsageError: A field does not exist, or a value is out of its bounds.
        """
        unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(self)})
        if unknown:
            raise UsageError(f"NodeOptions has no option {', '.join(unknown)}")
        return dataclasses.replace(self, **changes)


def _check_number(field: dataclasses.Field[Any], value: object) -> None:
    # Annotations are strings here (PEP 563); "| None" is the only optional form used.
    declared = str(field.type)
    if value is None and declared.endswith("| None"):
        return
    if declared == "bool":
        if not isinstance(value, bool):
            raise UsageError(f"NodeOptions({field.name}=...) takes True or False, not {value!r}")
        return
    bounds: Mapping[str, float] = field.metadata
    low, high = bounds["low"], bounds["high"]
    kinds = (int,) if declared.startswith("int") else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "an int" if kinds == (int,) else "a number"
        raise UsageError(f"NodeOptions({field.name}=...) takes {kind}, not {value!r}")
    if not low <= value <= high or value != value:
        limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise UsageError(f"NodeOptions({field.name}={value!r}) must be {limit}")
