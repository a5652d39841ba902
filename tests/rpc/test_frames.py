from __future__ import annotations

import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc import frames
from rpc.errors import FrameError, MessageTooLarge

KEY = b"k" * 32
LANE = 256


def outbox(**changes: int) -> frames.Outbox:
    return frames.Outbox(KEY, **{"lane_bytes_max": LANE, **changes})


def inbox(**changes: int) -> frames.Inbox:
    return frames.Inbox(KEY, **{"frame_bytes_max": frames.frame_bytes_max(LANE), **changes})


def all_frames(box: frames.Outbox) -> list[bytes]:
    taken = []
    while (parts := box.take()) is not None:
        taken.append(b"".join(parts))
    return taken


def sealed(records: bytes, sequence: int = 0, version: int = frames.VERSION) -> bytes:
    body = struct.pack("<BQ", version, sequence) + records
    return blake2b(body, digest_size=frames.MAC_BYTES, key=KEY).digest() + body


def record(kind: int, payload: bytes) -> bytes:
    return struct.pack("<BI", kind, len(payload)) + payload


def first(total: int, data: bytes, lane: int = 0, message_id: int = 1) -> bytes:
    return record(frames.CHUNK_FIRST, struct.pack("<BQQ", lane, message_id, total) + data)


def further(data: bytes, lane: int = 0, message_id: int = 1) -> bytes:
    return record(frames.CHUNK_NEXT, struct.pack("<BQ", lane, message_id) + data)


@given(data=st.binary(max_size=400))
def test_no_bytes_from_a_stranger_are_taken_for_a_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        inbox().feed(data)


@given(data=st.binary(max_size=400))
def test_no_bytes_from_a_stranger_do_worse_to_a_handshake_than_a_frame_error(data: bytes) -> None:
    with pytest.raises(FrameError):
        frames.open_plain(data)


@given(records=st.binary(max_size=300))
def test_no_records_of_a_hostile_peer_do_worse_than_a_frame_error(records: bytes) -> None:
    box = inbox(message_bytes_max=1000)
    try:
        items = box.feed(sealed(records))
    except FrameError:
        return
    assert sum(len(item.data) for item in items) <= len(records)


hostile_record = st.one_of(
    st.builds(
        first, st.integers(0, 2**64 - 1), st.binary(max_size=60), st.integers(0, 3), st.just(1)
    ),
    st.builds(further, st.binary(max_size=60), st.integers(0, 3), st.integers(0, 2)),
    st.builds(record, st.integers(0, 255), st.binary(max_size=20)),
)


@given(st.lists(st.lists(hostile_record, max_size=4), max_size=12))
def test_chunks_of_a_hostile_peer_never_pile_up_beyond_the_limit(
    conversation: list[list[bytes]],
) -> None:
    box = inbox(message_bytes_max=100)
    for sequence, records in enumerate(conversation):
        try:
            items = box.feed(sealed(b"".join(records), sequence))
        except FrameError:
            return
        assert all(len(item.data) <= 1024 for item in items)
        held = [half for half in box._assemblies if half is not None]
        assert all(len(half.data) <= 100 for half in held)


def test_an_announced_size_reserves_no_memory() -> None:
    box = inbox(message_bytes_max=2**40)

    box.feed(sealed(first(2**40, b"x")))

    assembly = box._assemblies[0]
    assert assembly is not None
    assert assembly.data.__sizeof__() < 200


@pytest.mark.parametrize(
    "records",
    [
        pytest.param(first(101, b"x"), id="announces more than is allowed"),
        pytest.param(first(2, b"xyz"), id="more than announced"),
        pytest.param(first(0, b"x"), id="more than the nothing announced"),
        pytest.param(first(5, b"x") + first(5, b"y"), id="begins twice"),
        pytest.param(further(b"x"), id="never begun"),
        pytest.param(first(5, b"x") + further(b"y", message_id=2), id="another message's chunk"),
        pytest.param(first(5, b"x", lane=2), id="no such lane"),
        pytest.param(first(5, b""), id="empty chunk"),
        pytest.param(record(frames.DATA, bytes(101)), id="message over the limit"),
        pytest.param(record(frames.PING, b"x"), id="control word with a payload"),
        pytest.param(record(99, b""), id="unknown kind"),
        pytest.param(b"\x01", id="cut in a record's head"),
        pytest.param(struct.pack("<BI", frames.DATA, 7) + b"x", id="cut in a record"),
    ],
)
def test_a_sealed_frame_that_breaks_the_rules_is_refused(records: bytes) -> None:
    with pytest.raises(FrameError):
        inbox(message_bytes_max=100).feed(sealed(records))


def test_nothing_of_a_frame_is_delivered_if_its_end_is_wrong() -> None:
    with pytest.raises(FrameError):
        inbox().feed(sealed(record(frames.DATA, b"good") + b"\x01"))


@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_frame_with_any_bit_changed_is_refused(position: int, bit: int) -> None:
    box = outbox()
    box.push(b"pay 10")
    frame = bytearray(all_frames(box)[0])
    frame[position % len(frame)] ^= 1 << bit

    with pytest.raises(FrameError):
        inbox().feed(frame)


@given(size=st.integers(min_value=0))
def test_a_frame_cut_anywhere_is_refused(size: int) -> None:
    box = outbox()
    box.push(b"pay 10")
    frame = all_frames(box)[0]

    with pytest.raises(FrameError):
        inbox().feed(frame[: size % len(frame)])


def test_a_repeated_frame_is_refused() -> None:
    box, there = outbox(), inbox()
    box.push(b"pay 10")
    frame = all_frames(box)[0]
    there.feed(frame)

    with pytest.raises(FrameError, match="repeated"):
        there.feed(frame)


def test_a_frame_that_overtakes_another_is_refused() -> None:
    box = outbox()
    for _ in range(2):
        box.push(bytes(LANE - 20))
    frames_sent = all_frames(box)
    assert len(frames_sent) == 2

    with pytest.raises(FrameError, match="reordered"):
        inbox().feed(frames_sent[1])


def test_a_frame_of_another_connection_is_refused() -> None:
    box = outbox()
    box.push(b"pay 10")

    with pytest.raises(FrameError, match="MAC"):
        frames.Inbox(b"another key").feed(all_frames(box)[0])


def test_a_frame_over_the_limit_is_refused_before_its_mac_is_computed() -> None:
    with pytest.raises(FrameError, match="allowed are"):
        inbox(frame_bytes_max=100).feed(bytes(101))


def test_another_layout_version_is_refused_by_name() -> None:
    with pytest.raises(FrameError, match="version 9"):
        inbox().feed(sealed(b"", version=9))


def test_a_message_over_the_limit_is_not_queued() -> None:
    box = outbox(message_bytes_max=10)

    with pytest.raises(MessageTooLarge) as caught:
        box.push(bytes(11))

    assert (caught.value.size_bytes, caught.value.limit_bytes) == (11, 10)
    assert box.queued_bytes == 0
    assert not box


messages = st.lists(
    st.tuples(
        st.integers(0, 5 * LANE).map(lambda size: bytes(i % 251 for i in range(size))),
        st.booleans(),
    ),
    max_size=12,
)


@given(messages, st.lists(st.booleans(), max_size=40))
def test_messages_arrive_whole_once_and_in_order_within_their_lane(
    sent: list[tuple[bytes, bool]], takes: list[bool]
) -> None:
    box, there = outbox(), inbox()
    arrived: list[bytes] = []

    def move() -> bool:
        parts = box.take()
        if parts is not None:
            frame = b"".join(parts)
            assert len(frame) <= frames.frame_bytes_max(LANE)
            arrived.extend(bytes(item.data[1:]) for item in there.feed(frame))
        return parts is not None

    for number, (data, bulk) in enumerate(sent):
        box.push(b"." + bytes([bulk, number]) + data, bulk)
        if number < len(takes) and takes[number]:
            move()
    while move():
        pass

    for lane in (False, True):
        expected = [bytes([b, n]) + data for n, (data, b) in enumerate(sent) if b is lane]
        assert [item for item in arrived if item[0] == lane] == expected
    assert len(arrived) == len(sent)
    assert box.queued_bytes == 0


def test_everything_that_waits_leaves_in_one_frame() -> None:
    box, there = outbox(lane_bytes_max=10_000), inbox()
    for number in range(100):
        box.push(bytes([number]))

    sent = all_frames(box)

    assert len(sent) == 1
    assert [item.data for item in there.feed(sent[0])] == [bytes([n]) for n in range(100)]


def test_bulk_delays_an_ordinary_message_by_no_more_than_the_frame_under_way() -> None:
    box, there = outbox(), inbox()
    box.push(bytes(100 * LANE), bulk=True)
    for number in range(20):
        parts = box.take()  # This frame is under way when the message is sent.
        assert parts is not None
        there.feed(b"".join(parts))
        box.push(bytes([number]))
        parts = box.take()
        assert parts is not None
        assert [item.data for item in there.feed(b"".join(parts))] == [bytes([number])]


def test_a_stream_of_ordinary_messages_does_not_starve_bulk() -> None:
    box, there = outbox(), inbox()
    box.push(bytes(10 * LANE), bulk=True)
    frames_taken = 0
    while True:
        for _ in range(4):
            box.push(bytes(LANE // 2))
        parts = box.take()
        assert parts is not None
        frames_taken += 1
        if any(len(item.data) == 10 * LANE for item in there.feed(b"".join(parts))):
            break

    assert frames_taken <= 12


def test_goodbye_leaves_after_all_that_was_queued() -> None:
    box, there = outbox(), inbox()
    box.push(bytes(3 * LANE))
    box.push(bytes(2 * LANE), bulk=True)
    box.push_control(frames.GOODBYE, b"\x01")

    kinds = [item.kind for frame in all_frames(box) for item in there.feed(frame)]

    assert kinds[-1] == frames.GOODBYE
    assert sorted(kinds) == [frames.DATA, frames.DATA, frames.GOODBYE]


def test_changing_a_small_buffer_after_sending_changes_nothing() -> None:
    box, there = outbox(), inbox()
    data = bytearray(b"before")
    box.push(data)
    data[:] = b"after!"

    assert there.feed(all_frames(box)[0])[0].data == b"before"


def test_a_view_of_wider_items_is_sent_by_its_bytes() -> None:
    box, there = outbox(), inbox()
    box.push(memoryview(struct.pack("<2Q", 1, 2)).cast("Q"))

    assert there.feed(all_frames(box)[0])[0].data == struct.pack("<2Q", 1, 2)


def test_a_handshake_frame_round_trips() -> None:
    assert frames.open_plain(frames.plain(frames.HELLO, b"hi")) == (frames.HELLO, b"hi")


@pytest.mark.parametrize(
    ("kind", "payload"), [(frames.DATA, b"x"), (frames.HELLO, bytes(frames.HANDSHAKE_BYTES_MAX))]
)
def test_only_small_handshake_messages_go_without_a_mac(kind: int, payload: bytes) -> None:
    with pytest.raises(ValueError, match="no handshake frame"):
        frames.plain(kind, payload)


def test_unfit_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="lane_bytes_max"):
        frames.Outbox(KEY, lane_bytes_max=63)
    with pytest.raises(ValueError, match="a key has"):
        frames.Outbox(b"")


@given(
    sizes=st.lists(st.integers(0, 70_000), max_size=6),
    others=st.lists(st.integers(0, 600), max_size=4),
)
def test_a_message_in_parts_arrives_as_if_it_had_been_joined(
    sizes: list[int], others: list[int]
) -> None:
    parts = [bytes([65 + index]) * size for index, size in enumerate(sizes)]
    box, reader = outbox(lane_bytes_max=4096), inbox(frame_bytes_max=frames.frame_bytes_max(4096))
    box.push(frames.Gathered(parts), bulk=True)
    for size in others:
        box.push(b"o" * size)
    assert box.queued_bytes == sum(sizes) + sum(others)

    received = [bytes(item.data) for frame in all_frames(box) for item in reader.feed(frame)]

    assert sorted(received) == sorted([b"".join(parts), *(b"o" * size for size in others)])
    assert box.queued_bytes == 0


def test_a_message_in_parts_is_not_copied_on_its_way_into_frames() -> None:
    memory = bytearray(b"x" * 300_000)
    message = frames.Gathered([memory]).after(b"head")
    box = frames.Outbox(KEY)
    box.push(message, bulk=True)

    taken = box.take()

    assert taken is not None and bytes(taken[-1][:5]) == b"xxxxx"
    memory[:5] = b"yyyyy"
    assert bytes(taken[-1][:5]) == b"yyyyy"


def test_memory_is_let_go_of_and_what_has_not_left_stays_as_it_was() -> None:
    memory = bytearray(b"x" * 300_000)
    message = frames.Gathered([b"head", memory])
    box, reader = frames.Outbox(KEY), frames.Inbox(KEY)
    box.push(message.after(b">"), bulk=True)
    frame = b"".join(box.take() or [])

    message.settle()
    memory += b"it can be resized again"
    memory[:] = b"y" * len(memory)

    received = [*reader.feed(frame)]
    for later in all_frames(box):
        received += reader.feed(later)
    assert [bytes(item.data) for item in received] == [b">head" + b"x" * 300_000]


def test_a_message_in_parts_over_the_limit_is_not_queued() -> None:
    box = outbox(message_bytes_max=100)

    with pytest.raises(MessageTooLarge):
        box.push(frames.Gathered([bytes(60), bytes(60)]))
    assert not box


@given(
    st.lists(st.integers(0, 300), max_size=30),
    st.lists(st.tuples(st.integers(0, 700), st.booleans()), max_size=8),
)
def test_what_is_urgent_overtakes_what_waits_and_no_frame_grows_too_large(
    urgent: list[int], others: list[tuple[int, bool]]
) -> None:
    box, got = outbox(), inbox()
    for size, bulk in others:
        box.push(b"o" * size, bulk)
    for number, size in enumerate(urgent):
        box.push_urgent(bytes([number]) * size)
    assert box or not (urgent or others)
    assert box.queued_bytes == sum(urgent) + sum(size for size, _ in others)
    found: list[bytes] = []
    for frame in all_frames(box):
        assert len(frame) <= frames.frame_bytes_max(LANE)
        found += [bytes(item.data) for item in got.feed(frame)]
    small = [bytes([n]) * size for n, size in enumerate(urgent) if size <= LANE // 2]
    large = [bytes([n]) * size for n, size in enumerate(urgent) if size > LANE // 2]
    assert sorted(found) == sorted([*small, *large, *(b"o" * size for size, _ in others)])
    if not others:
        assert [data for data in found if data in small] == small
    assert box.queued_bytes == 0 and not box


def test_an_urgent_message_leaves_in_the_next_frame_whatever_waits() -> None:
    box, got = outbox(), inbox()
    for number in range(50):
        box.push(bytes([number]) * 200)
        box.push(b"bulk" * 1000, bulk=True)
    box.take()
    box.push_urgent(b"now")
    parts = box.take()
    assert parts is not None
    got._sequence = 1
    got._assemblies[1] = frames._Assembly(1, 4000)
    assert bytes(got.feed(b"".join(parts))[0].data) == b"now"
