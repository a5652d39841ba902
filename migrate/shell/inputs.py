"""Standbys of deterministic servers: they are told the requests, and run them too.

A server declared `@migrate.server(deterministic=True)` has plain handlers that depend on nothing
but its state and their arguments. So a standby that began with a whole copy stays equal to it by
running the same messages in the same order, and a large graph of small records has a hot standby
at the price of its messages.

What a cut of such a server holds is the list of messages that were run since the last one. Of each
goes along a check of its result, where that is a plain value. From time to time a digest of a slice
of the state goes too: of a hundred items of a large container, or of all that is small; the next
time it is the next slice. (A digest of the whole would stop a server of 50 MiB for twenty seconds.)
A standby for which either comes out differently says so and gives up its copy; the owner goes on
with deltas of the state, for good.

Requests that a handler makes when it is run at a standby go nowhere: its owner has made them.
"""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import msgspec

import serializers
from migrate.core.delivery import Entry
from migrate.core.ids import TransferId, node_name, session_sender
from migrate.core.incarnation import Incarnation
from migrate.ref import current_runtime
from migrate.server import Current
from migrate.shell import wire
from serializers.errors import LoadFailed, NotSerializable

if TYPE_CHECKING:
    from migrate.ref import RefObject
    from migrate.shell.driver import Driver
    from migrate.shell.host import Hosted

FIRST_BYTE: Final = 0xD0
"""Of a cut that is a list of messages; no snapshot and no stream begins with it."""

SLICE_ITEMS: Final = 100
"""Items of a container in one digest: about two milliseconds for small records."""

WHOLE_BYTES_MAX: Final = 64 << 10
"""Up to this size a move to a standby compares digests of the whole."""

DIVERGED: Final = "its state came out differently"
"""How the cause begins when a standby has found that its server is not deterministic."""

_encoder: Final = msgspec.msgpack.Encoder()


class Input(msgspec.Struct, array_like=True):
    """One message that was run. `check` tells results apart; 0: it cannot."""

    method: str
    payload: bytes
    caller: str
    request_id: str
    check: int


class Inputs(msgspec.Struct, array_like=True):
    """What a cut holds. `part` 0: no digest; else which slice, counted from 1; -1: the whole."""

    node: str
    epoch: int
    inputs: list[Input]
    part: int
    digest: str


_decoder: Final = msgspec.msgpack.Decoder(Inputs)


def check_of(status_ok: bool, value: object) -> int:
    """What tells one result from others, the same in every process; 0 if nothing does."""
    if not status_ok:
        return zlib.crc32(type(value).__qualname__.encode()) + 1
    return zlib.crc32(repr(value).encode()) + 1 if type(value) in wire.PLAIN else 0


class InputLog:
    """The messages that were run by an owner and that some standby has not been told."""

    def __init__(self, digest_every_s: float) -> None:
        self._inputs: list[Input] = []
        self._first = 0  # number of the first one kept
        self._told: dict[TransferId, int] = {}
        self._every_s = digest_every_s
        self._next_s = monotonic() + digest_every_s
        self._part = 0
        self._cut = 0
        self._digest = (0, "")

    def add(self, entry: Entry, args: Any, ok: bool, value: object) -> None:
        """A handler has run."""
        if not self._told:
            return
        session = entry.session
        payload = entry.payload
        if payload is None:
            payload = wire.pack_args(*args)
        self._inputs.append(
            Input(
                entry.method,
                bytes(payload),
                session_sender(session.id) if session is not None else "",
                f"{session.id}#{entry.seq}" if session is not None else "",
                check_of(ok, value),
            )
        )

    def follows(self, stream: TransferId) -> bool:
        """Whether a standby is told what is run."""
        return stream in self._told

    def begin(self, stream: TransferId) -> None:
        """A standby has the state as it is now."""
        self._told[stream] = self._first + len(self._inputs)

    def end(self, stream: TransferId) -> None:
        """It follows no more, or has to be told the state anew."""
        if self._told.pop(stream, None) is not None:
            self._trim()

    def take(self, inc: Incarnation, obj: object, stream: TransferId, number: int) -> bytes:
        """What a standby has not been told, as the object's part of cut `number`."""
        told = self._told[stream]
        inputs = self._inputs[told - self._first :]
        self._told[stream] = self._first + len(self._inputs)
        if number != self._cut:
            self._cut, self._digest = number, (0, "")
            if self._every_s and monotonic() >= self._next_s:
                self._next_s = monotonic() + self._every_s
                self._part += 1
                self._digest = self._part, slice_digest(obj, self._part)
        data = self._encoded(inc, inputs, *self._digest)
        self._trim()
        return data

    def last(self, inc: Incarnation, host: Hosted, stream: TransferId) -> bytes:
        """The same for a standby that the server is about to move to."""
        inputs = self._inputs[self._told[stream] - self._first :]
        part, obj = self._part + 1, host.obj
        if 0 <= host.state_bytes <= WHOLE_BYTES_MAX:
            return self._encoded(inc, inputs, -1, whole_digest(obj))
        return self._encoded(inc, inputs, part, slice_digest(obj, part))

    @staticmethod
    def _encoded(inc: Incarnation, inputs: list[Input], part: int, digest: str) -> bytes:
        node = node_name(inc.row.owner)
        cut = Inputs(node, inc.row.epoch, inputs, part if digest else 0, digest)
        return bytes([FIRST_BYTE]) + _encoder.encode(cut)

    def _trim(self) -> None:
        least = min(self._told.values(), default=self._first + len(self._inputs))
        del self._inputs[: least - self._first]
        self._first = least


def whole_digest(obj: object) -> str:
    """A digest of a state; empty if it cannot be digested."""
    try:
        return serializers.digest(obj)
    except NotSerializable:
        return ""


def slice_digest(obj: object, part: int) -> str:
    """A digest of one slice of a state: of `SLICE_ITEMS` items of a container, or of the rest.

    Args:
        obj: The state, an object with attributes.
        part: Which, from 1 on; beyond the last it begins anew.

    Returns:
        The digest, with the number of slices in it; empty if it cannot be made.
    """
    attributes: dict[str, Any] = getattr(obj, "__dict__", {})
    rest: dict[str, Any] = {}
    slices: list[tuple[str, int]] = []
    for name, value in attributes.items():
        if type(value) in (dict, list, tuple) and len(value) > SLICE_ITEMS:
            slices += [(name, at) for at in range(0, len(value), SLICE_ITEMS)]
        else:
            rest[name] = value
    which = part % (len(slices) + 1)
    chosen: Any = rest
    if which:
        name, at = slices[which - 1]
        value = attributes[name]
        items = value.items() if type(value) is dict else value
        chosen = list(itertools.islice(items, at, at + SLICE_ITEMS))
    digest = whole_digest(chosen)
    return f"{len(slices)} {digest}" if digest else ""


class Shadow:
    """The runtime of a handler that is run at a standby: what it asks of others goes nowhere."""

    def __init__(self, driver: Driver, ref: RefObject) -> None:
        self.driver = driver
        self._ref: Any = ref
        self.told: Inputs | None = None
        self.input: Input | None = None

    def current(self) -> Current:
        """What `migrate.current()` told at the owner."""
        told, input = self.told, self.input
        assert told is not None and input is not None
        return Current(
            ref=self._ref,
            node=told.node,
            epoch=told.epoch,
            caller=input.caller or None,
            request_id=input.request_id or None,
        )

    def call(self, *_args: object) -> asyncio.Future[Any]:
        """Nobody is asked, and nothing comes back."""
        return self.driver.loop.create_future()

    cast = call


class Twin:
    """The live copy of a deterministic server at a standby."""

    def __init__(self, host: Hosted) -> None:
        self.host = host
        self.taken_bytes = max(0, host.state_bytes)
        self._shadow = Shadow(host.driver, host.ref)

    def run(self, data: bytes | memoryview) -> str:
        """Run what an owner has run.

        Args:
            data: From `InputLog`.

        Returns:
            Why the copies are not equal any more; empty if nothing shows that they are not.
        """
        shadow = self._shadow
        shadow.told = told = _decoder.decode(memoryview(data)[1:])
        token = current_runtime.set(shadow)
        try:
            for input in told.inputs:
                shadow.input = input
                check = self._run(input)
                if check != input.check:
                    return f"{DIVERGED}: the result of {input.method} is another one"
        finally:
            current_runtime.reset(token)
        obj = self.host.obj
        if told.part:
            mine = whole_digest(obj) if told.part < 0 else slice_digest(obj, told.part)
            if mine != told.digest:
                return f"{DIVERGED}: a digest of it is another one"
        return ""

    def _run(self, input: Input) -> int:
        host = self.host
        try:
            _, function = host.handlers.get(input.method) or host.handler(input.method)
            args: Any = ((), {})
            if input.payload:
                args = wire.unpack(input.payload, host.driver)
            return check_of(True, function(*args[0], **args[1]))
        except Exception as error:
            return check_of(False, error)

    # -- what a move takes for a reader of its stream

    def last(self, chunk: Sequence[bytes | memoryview]) -> object:
        """The object, for a move to here.

        Raises:
            LoadFailed: The copies are not equal.
        """
        wrong = self.run(b"".join(chunk))
        if wrong:
            raise LoadFailed(wrong)
        return self.host.obj


class LastInputs:
    """What a move takes for the writer of a standby's stream."""

    def __init__(self, log: InputLog, inc: Incarnation, host: Hosted, stream: TransferId) -> None:
        self._log = log
        self._inc = inc
        self._host = host
        self._stream = stream

    def last(self) -> list[bytes]:
        """What the standby has not been told."""
        return [self._log.last(self._inc, self._host, self._stream)]

    def close(self) -> None:
        """The move is over."""
        self._log.end(self._stream)
