"""A large state follows its message: uncopied, aligned, and refused if it is malformed."""

from __future__ import annotations

import mmap
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import migrate
import serializers
from migrate.core.messages import Abort, Envelope, Final, Reply
from migrate.errors import PeerError
from migrate.shell import classes, wire
from rpc.frames import Gathered
from serializers.memory import Pages
from tests.migrate.clusters import QUICK, failure_of, nodes, run, until


def final(state: Any = b"") -> Final:
    return Final("transfer", "server", 3, state)


def gathered(obj: object, record: bytes = b"record") -> Gathered:
    return classes.gather(record, serializers.encode(obj).pieces())


@given(st.binary(max_size=300), st.integers(0, 3))
def test_a_state_behind_its_message_is_read_back_with_its_object_aligned(
    record: bytes, arrays: int
) -> None:
    obj = [np.arange(20_000 + n) for n in range(arrays)]
    data = bytearray(wire.encode_final(final(), gathered(obj, record)).joined())

    (message,) = wire.decode_messages(data)

    assert isinstance(message, Final)
    assert (message.transfer, message.server, message.epoch) == ("transfer", "server", 3)
    head, body = classes.split(message.state)
    assert bytes(head) == record
    whole = memoryview(data)
    assert (len(whole) - len(body)) % 64 == 0
    copy: Any = serializers.loads(body)
    assert all(np.array_equal(*pair) for pair in zip(obj, copy, strict=True))
    assert all(np.shares_memory(array, np.frombuffer(data, "u1")) for array in copy)


def test_the_form_of_earlier_messages_is_read_as_well() -> None:
    data = wire.encode_messages([Abort("t"), final(b"state")])

    assert wire.decode_messages(data) == [Abort("t"), final(b"state")]


@given(st.data())
def test_a_malformed_frame_with_a_state_is_refused(data: st.DataObject) -> None:
    frame = wire.encode_final(final(), gathered(bytes(5000))).joined()
    cut = frame[: data.draw(st.integers(1, 40))]
    with pytest.raises(PeerError):
        wire.decode_messages(cut)

    head = wire.encode_messages(data.draw(st.sampled_from([[], [Abort("t")], [final(), final()]])))
    with pytest.raises(PeerError):
        wire.decode_messages(b"\xc1\0\0\0" + len(head).to_bytes(4, "little") + head)
    with pytest.raises(PeerError):
        wire.decode_messages(b"\xc1" + data.draw(st.binary(max_size=30)))


# ---------------------------------------------------------------- arguments and results

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(codec=None), max_size=5),
    st.binary(max_size=5),
)


@given(st.lists(plain, max_size=4), st.dictionaries(st.text(max_size=3), plain, max_size=3))
def test_plain_values_arrive_as_they_were(args: list[Any], kwargs: dict[str, Any]):
    nobody: Any = None
    arrived = wire.unpack(wire.pack_args(tuple(args), kwargs), nobody)
    assert repr(arrived) == repr((tuple(args), kwargs))
    for value in (*args, *kwargs.values()):
        again = wire.unpack(wire.pack_value(value), nobody)
        assert repr(again) == repr(value) and type(again) is type(value)


@given(st.integers(0, 300), st.booleans(), st.booleans())
def test_a_payload_follows_its_message_and_is_used_where_it_arrived(
    size: int, is_reply: bool, in_parts: bool
):
    payload = bytes(range(256)) * 300 + bytes(size)
    message: Any = (
        Reply("c/1", 3, 0, payload, 1)
        if is_reply
        else Envelope("s", "c/1", 3, 1, 0, "m" * size, payload, 0, "c")
    )
    sent = wire.encode_with_payload(message)
    assert len(sent.parts[0]) % 64 == 0
    memory = bytearray(sent.joined())
    (found,) = wire.decode_messages(sent if in_parts else memory)
    assert found.payload == payload
    if not in_parts:
        assert found.payload.obj is memory
    found.payload = payload
    assert found == message


@given(st.binary(min_size=1, max_size=30))
def test_bytes_that_are_no_payload_raise_what_a_caller_expects(data: bytes):
    if data[0] in (0x80, 0x93):
        return  # A pickle, or a snapshot, which has a check of its own.
    nobody: Any = None
    try:
        wire.unpack(data, nobody)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass


# ---------------------------------------------------------------- in moves


class Holder:
    """A large array, changed by every call."""

    def __init__(self, mib: int = 4) -> None:
        self.array = np.zeros(mib << 17)
        self.calls = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.calls == 13:
            raise ValueError("unlucky")

    def add(self) -> float:
        self.calls += 1
        self.array += 1
        return float(self.array.sum()) / self.array.size

    def grow(self) -> int:
        # Refused by numpy while anything refers to the array's memory.
        self.array.resize(self.array.size + 1)
        return self.array.size

    def memory_it_arrived_in(self) -> str:
        owner = self.array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        assert isinstance(owner.base, memoryview)
        memory = owner.base.obj
        if isinstance(memory, mmap.mmap) and not isinstance(memory, Pages):
            return "shared"
        return type(memory).__name__


@pytest.mark.parametrize(("same_host", "memory"), [(True, "shared"), (False, "Pages")])
@pytest.mark.usefixtures("cluster_secret")
def test_an_array_arrives_in_the_memory_that_the_link_received_it_in(same_host: bool, memory: str):
    async def body() -> None:
        async with nodes("a", "b", options=QUICK.replace(same_host=same_host)) as (a, _):
            ref = await a.spawn(Holder)
            assert await ref.add() == 1.0
            report = await a.migrate(ref, to="b")
            assert report.bytes_sent > 4 << 20
            assert await ref.memory_it_arrived_in() == memory
            assert await ref.add() == 2.0
            await a.migrate(ref, to="a")
            assert await ref.add() == 3.0

    run(body())


@pytest.mark.usefixtures("cluster_secret")
def test_after_a_roll_back_the_server_has_its_memory_for_itself():
    async def body() -> None:
        async with nodes("a", "b") as (a, b):
            ref = await a.spawn(Holder)
            for _ in range(13):
                await ref.add()
            error = await failure_of(a.migrate(ref, to="b"))
            assert isinstance(error, migrate.MoveRolledBack) and "unlucky" in str(error)
            assert await ref.grow() == (4 << 17) + 1
            assert await ref.add() > 13
            assert (await a.migrate(ref, to="b")).target == "b"
            assert b._links is not None and b._links.is_up(a.id)

    run(body())


IN_ONE_PIECE = QUICK.replace(move_step_timeout_s=0.3, precopy_bytes_min=1 << 60)


@pytest.mark.usefixtures("cluster_secret")
def test_a_state_in_parts_that_is_still_queued_at_a_roll_back_does_not_hold_its_memory():
    async def body() -> None:
        options = IN_ONE_PIECE.replace(same_host=False)
        async with nodes("a", "b", options=options) as (a, b):
            ref = await a.spawn(Holder, 64)
            await ref.add()
            # The target reads nothing for a while, so that most of the state stays queued.
            link = a._links._up[b.id]
            outbox = link._outbox
            take, outbox_class = outbox.take, type(outbox)
            held: list[bool] = []

            def stuck(box: Any) -> Any:
                if box is outbox and box._bulk.queue and not held:
                    return None
                return take() if box is outbox else original(box)

            original = outbox_class.take
            outbox_class.take = stuck
            try:
                error = await failure_of(a.migrate(ref, to="b"))
                assert isinstance(error, migrate.MoveRolledBack)
                assert a._links.queued_bytes(b.id) > 60 << 20
                assert await ref.grow() == (64 << 17) + 1
                assert await ref.add() > 1
            finally:
                held.append(True)
                outbox_class.take = original
                link._pump()
            await until(lambda: a._links.queued_bytes(b.id) == 0)
            assert a._links.is_up(b.id)
            assert await ref.add() > 2

    run(body())


@pytest.mark.usefixtures("cluster_secret")
def test_a_peer_that_does_not_know_the_form_gets_the_state_in_its_message(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(wire, "FEATURES", ())
    monkeypatch.setattr(wire, "encode_final", None)

    async def body() -> None:
        async with nodes("a", "b") as (a, _):
            ref = await a.spawn(Holder)
            await ref.add()
            await a.migrate(ref, to="b")
            assert await ref.add() == 2.0

    run(body())


class Plans:
    """An importable class whose state may hold code."""

    def __init__(self, plan: Any = None) -> None:
        self.plan = plan
        self.departures = 0

    def on_depart(self) -> None:
        self.departures += 1

    def take(self) -> None:
        self.plan = lambda: 3

    def told(self) -> int:
        return self.departures


@pytest.mark.usefixtures("cluster_secret")
def test_code_in_the_state_is_refused_for_another_python_before_anything_stops(
    monkeypatch: pytest.MonkeyPatch,
):
    async def body() -> None:
        shared = "memory://two-pythons"
        async with nodes("a", directory=shared) as (a,):
            other = f"{sys.implementation.name}-3.99"
            monkeypatch.setattr(wire, "FEATURES", (wire.STATE_AFTER, wire.PYTHON_IS + other))
            async with migrate.Node(name="b", directory=shared, options=QUICK) as b:
                await until(lambda: a._links is not None and a._links.is_up(b.id))
                ref = await a.spawn(Plans)
                await ref.take()
                error = await failure_of(a.migrate(ref, to="b"))
                assert type(error) is migrate.TargetRefused
                assert error.outcome is migrate.Outcome.NOT_DONE
                assert other in str(error) and wire.PYTHON in str(error)
                assert await ref.told() == 0
                plain = await a.spawn(Plans, [1, 2])
                assert (await a.migrate(plain, to="b")).target == "b"

    run(body())


def test_features_name_what_this_release_is() -> None:
    assert wire.STATE_AFTER in wire.FEATURES
    version = ".".join(map(str, sys.version_info[:2]))
    assert any(feature.endswith(f"-{version}") for feature in wire.FEATURES)
