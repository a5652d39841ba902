"""What nodes and clients say to each other.

Every message is a small record that `shell/wire.py` turns into bytes, many at a time. The
first group is the per-message path; the second serves moves. None of them is trusted to be
sensible: the core answers or drops what does not fit, and never raises because of it.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from migrate.core.directory import EPOCH_MAX, Row
from migrate.core.ids import NodeId, ServerId, SessionId, TransferId
from migrate.core.records import CutRecord, SessionRecord, StepRecord

# Kinds of an envelope.
CALL = 0
CAST = 1
EMPTY = 2  # keeps a number whose request was withdrawn
PROBE = 3  # a repeat without its arguments, for a request known to be admitted

# Status of a reply. Everything but OK and ERROR is an answer of the core, not of a handler.
OK = 0
ERROR = 1  # the handler raised; the payload carries its exception
EXPIRED = 2  # its time was over before a handler took it: not done
WITHDRAWN = 3  # an EMPTY took the number: not done
FORGOTTEN = 4  # completed or never known here, the record is gone: unknown
CYCLE = 5  # the call would wait for itself; the payload is the chain
NOT_FOUND = 6  # no such server
LOST = 7  # its owner died; the payload is the cause
STOPPED = 8  # stopped before a handler took it: not done
ROLLED_BACK = 9  # the server is another generation; the payload has both times
TIMED_OUT = 10  # sender side: unknown
FULL = 11  # sender side: never given a number, or withdrawn: not done
REFUSED = 12  # the envelope breaks a limit or a rule: not done; the payload says which
CLOSED = 13  # sender side: the sender itself is being closed: unknown
DIVERGED = 14  # a failover could not repeat the handler's calls


class Envelope(Struct, array_like=True, tag=1, gc=False):
    """One request. `timeout_ms` is what remains (0: no limit); `acked_below` frees records."""

    server: ServerId
    session: SessionId
    seq: int
    acked_below: int
    kind: int
    method: str
    payload: bytes
    timeout_ms: int
    reply_to: NodeId
    epoch: int = 0
    sender_epoch: int = 0
    generation: int = 0
    hops: int = 0
    chain: tuple[str, ...] = ()
    trace: str = ""


class Reply(Struct, array_like=True, tag=2, gc=False):
    """The result of one request. `status` is one of the constants above."""

    session: SessionId
    seq: int
    status: int
    payload: bytes
    hops: int = 0


class Receipt(Struct, array_like=True, tag=3, gc=False):
    """Everything below `admitted_below` is in the mailbox or past it.

    `window` is how many numbers from `admitted_below` on the owner has room for;
    -1: the sender's own window is the only limit.
    """

    session: SessionId
    server: ServerId
    admitted_below: int
    window: int = -1
    hops: int = 0


class Acked(Struct, array_like=True, tag=4, gc=False):
    """An idle sender's word that results below `acked_below` are no longer awaited.

    `final` ends the session.
    """

    session: SessionId
    server: ServerId
    acked_below: int
    final: bool = False
    hops: int = 0


class Moved(Struct, array_like=True, tag=5, gc=False):
    """The server is at `node` since `epoch`; receivers keep only the highest epoch.

    `failover`: its former owner is gone, with what was sent to it.
    """

    server: ServerId
    node: NodeId
    epoch: int
    failover: bool = False


class NotHere(Struct, array_like=True, tag=6, gc=False):
    """The answering node neither owns the server nor knows who does (or will not say: hops).

    `seq` is the request that it did not pass on; 0: not said.
    """

    server: ServerId
    session: SessionId
    seq: int = 0


class WaitProbe(Struct, array_like=True, tag=7, gc=False):
    """Follows waits from handler to handler to find a knot (Chandy, Misra, Haas 1983).

    `path` holds run ids (`server/run`) from the initiator on; the last of them waits for
    request `seq` of `session` at `server`.
    """

    server: ServerId
    session: SessionId
    seq: int
    path: tuple[str, ...]
    hops: int = 0


class Prepare(Struct, array_like=True, tag=20, gc=False):
    """Source to target: may this server come?

    `stream`: what the target has of it as a standby.
    """

    transfer: TransferId
    server: ServerId
    epoch: Annotated[int, Meta(ge=0, lt=EPOCH_MAX)]
    cls: str
    version: int
    by_value: bool
    python: str
    name: str = ""
    mailbox: int = 0
    stream: TransferId = ""


class Prepared(Struct, array_like=True, tag=21, gc=False):
    """Target to source: yes, and this is my version of the class.

    `takes_chunks`: the state may be sent ahead in chunks. `follows`: it has what was told to it as
    a standby, so only what changed since has to be sent.
    """

    transfer: TransferId
    version: int
    takes_chunks: bool = False
    follows: bool = False


class PrepareRefused(Struct, array_like=True, tag=22, gc=False):
    """Target to source: no; `reason` is for the user."""

    transfer: TransferId
    reason: str


class Final(Struct, array_like=True, tag=23, gc=False):
    """Source to target: the state at the quiescent point, as one byte string.

    `chunks`: how many were sent ahead, so that this one is the last of a stream; 0: it is all.
    `stream`: it is the last of what a standby was told.
    """

    transfer: TransferId
    server: ServerId
    epoch: int
    state: bytes
    chunks: int = 0
    stream: TransferId = ""


class Ready(Struct, array_like=True, tag=24, gc=False):
    """Target to source: the copy is complete and alive in memory."""

    transfer: TransferId


class FinalFailed(Struct, array_like=True, tag=25, gc=False):
    """Target to source: the state could not be loaded; nothing of it is kept."""

    transfer: TransferId
    reason: str


class Chunk(Struct, array_like=True, tag=42, gc=False):
    """Source to target: the next piece of a state that is sent ahead while the server serves."""

    transfer: TransferId
    number: int
    state: bytes


class ChunkTaken(Struct, array_like=True, tag=43, gc=False):
    """Target to source: chunk `number` is installed; send the next one."""

    transfer: TransferId
    number: int


class Activate(Struct, array_like=True, tag=26, gc=False):
    """Source to target: the swap has taken effect (this is the row now), serve."""

    transfer: TransferId
    row: Row
    rev: int


class Activated(Struct, array_like=True, tag=27, gc=False):
    """Target to source: serving, holding back what would be seen."""

    transfer: TransferId


class ActivateRefused(Struct, array_like=True, tag=28, gc=False):
    """Target to source: no such copy here."""

    transfer: TransferId


class Dropped(Struct, array_like=True, tag=29, gc=False):
    """Source to target: the frozen copy is gone; release."""

    transfer: TransferId


class Released(Struct, array_like=True, tag=30, gc=False):
    """Target to source: released; the source measures its downtime with this."""

    transfer: TransferId


class Abort(Struct, array_like=True, tag=31, gc=False):
    """Source to target: the move is off (or was taken back); drop the copy."""

    transfer: TransferId


class ReleasedAt(Struct, array_like=True, tag=41, gc=False):
    """Target's shell to the source's: when the copy was released, for the report.

    `at_ns` is of the monotonic clock that `boot` names (`machine.clock_id`).
    """

    move: TransferId
    boot: str
    at_ns: int


class Load(Struct, array_like=True, tag=40, gc=False):
    """A node's load figures, told to every neighbour on the link."""

    servers: int
    cpu: float
    memory: float
    mailbox: int
    draining: bool
    cordoned: bool


class ClockTold(Struct, array_like=True, tag=44, gc=False):
    """What the shared clock says at the sender; the first message of a node on each link."""

    clock_ms: int


class Ask(Struct, array_like=True, tag=50, gc=False):
    """A verb asked of another node, under an id that makes its repeat harmless."""

    id: str
    verb: str
    payload: bytes


class Answer(Struct, array_like=True, tag=51, gc=False):
    """The answer to an Ask; `ok` False: the payload is a pickled exception."""

    id: str
    ok: bool
    payload: bytes


class Follow(Struct, array_like=True, tag=60, gc=False):
    """Owner to standby: keep a copy of this server, by the stream of this name."""

    stream: TransferId
    server: ServerId
    epoch: Annotated[int, Meta(ge=0, lt=EPOCH_MAX)]
    cls: str
    version: int
    by_value: bool
    python: str
    name: str = ""


class Following(Struct, array_like=True, tag=61, gc=False):
    """Standby to owner: it can be had here; send."""

    stream: TransferId


class FollowRefused(Struct, array_like=True, tag=62, gc=False):
    """Standby to owner: no; `reason` is for the user."""

    stream: TransferId
    reason: str


class Cut(Struct, array_like=True, tag=63, gc=False):
    """Owner to standby: the state at a quiescent point, whole or what changed since the last one.

    The object is in `state`, opaque here. `number` counts cuts, steps and notes together. `chunks`:
    how many went ahead of the first one.
    """

    stream: TransferId
    server: ServerId
    epoch: Annotated[int, Meta(ge=0, lt=EPOCH_MAX)]
    number: int
    whole: bool
    record: CutRecord
    state: bytes
    chunks: int = 0


class Step(Struct, array_like=True, tag=64, gc=False):
    """Owner to standby: a handler is about to make this request, in the middle of its run."""

    stream: TransferId
    server: ServerId
    epoch: Annotated[int, Meta(ge=0, lt=EPOCH_MAX)]
    number: int
    step: StepRecord


class Note(Struct, array_like=True, tag=68, gc=False):
    """Owner to standby: what was admitted, or answered without a handler, while one is running.

    Of each session: results and casts that are new. One that is unknown begins with number 1.
    """

    stream: TransferId
    server: ServerId
    epoch: Annotated[int, Meta(ge=0, lt=EPOCH_MAX)]
    number: int
    sessions: list[SessionRecord]


class Kept(Struct, array_like=True, tag=65, gc=False):
    """Standby to owner: it has all cuts and steps up to `number`."""

    stream: TransferId
    epoch: int
    number: int


class KeepRefused(Struct, array_like=True, tag=66, gc=False):
    """Standby to owner: it takes nothing below `epoch`; 0: it has nothing of this stream (now)."""

    stream: TransferId
    epoch: int
    reason: str


class Unfollow(Struct, array_like=True, tag=67, gc=False):
    """Owner to standby: it stands by no more."""

    stream: TransferId
    server: ServerId


StandbyMessage: TypeAlias = (
    Follow | Following | FollowRefused | Cut | Step | Note | Kept | KeepRefused | Unfollow
)
MoveMessage: TypeAlias = (
    Prepare
    | Prepared
    | PrepareRefused
    | Chunk
    | ChunkTaken
    | Final
    | Ready
    | FinalFailed
    | Activate
    | Activated
    | ActivateRefused
    | Dropped
    | Released
    | Abort
)
Message: TypeAlias = (
    Envelope
    | Reply
    | Receipt
    | Acked
    | Moved
    | NotHere
    | WaitProbe
    | MoveMessage
    | StandbyMessage
    | ReleasedAt
    | Load
    | ClockTold
    | Ask
    | Answer
)
