"""The checkpoint file: every byte is accounted for before anything is used."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serializers import archive
from serializers.archive import BadArchive

KEY = b"k" * 32
FACTS = {"cls": "rooms:Room", "server": "room-1", "name": "Zimmer für alle", "epoch": 3}
PARTS: list[tuple[str, bytes]] = [
    ("record", b"abc"),
    ("body", b"spam and eggs " * 500),
    ("noise", random.Random(1).randbytes(5_000)),
    ("empty", b""),
    ("zeros", bytes(100_000)),
]


def sealed(parts: Any = None, facts: Any = None, key: bytes = KEY) -> bytes:
    return b"".join(archive.seal(PARTS if parts is None else parts, facts or FACTS, key))


def flaw_of(data: bytes | bytearray, key: bytes = KEY) -> str:
    with pytest.raises(BadArchive) as caught:
        archive.open_archive(data, key)
    assert str(caught.value) == caught.value.reason != ""
    return caught.value.flaw


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=9), st.binary(max_size=300)), max_size=8),
    st.dictionaries(st.sampled_from(["a", "b", "ü"]), st.text() | st.integers() | st.none()),
)
def test_what_was_sealed_comes_out(parts: list[tuple[str, bytes]], facts: dict[str, Any]) -> None:
    data = sealed(parts, facts)
    header, out = archive.open_archive(data, KEY)
    assert [(name, bytes(view)) for name, view in out] == parts
    assert header.facts == facts or not facts
    assert header.size_bytes == len(data)


def test_the_header_is_text_that_the_first_kilobyte_shows() -> None:
    text = sealed()[:1000].decode("utf-8", "replace")
    line, _, rest = text.partition("\n")
    assert line.startswith("livemigrate checkpoint 1 header=0000")
    for shown in ('"cls": "rooms:Room"', '"epoch": 3', "Zimmer für alle", "cpython", '"key_id"'):
        assert shown in rest
    size = int(line.split("header=")[1][:8])
    start = len(line) + 1
    told = json.loads(sealed()[start : start + size])
    assert [part[0] for part in told["parts"]] == [name for name, _ in PARTS]


def test_the_header_can_be_read_and_checked_without_the_parts() -> None:
    data = sealed()
    start = data[: archive.LINE_BYTES]
    head = data[: archive.header_bytes(start)]
    header = archive.check_header(head, KEY)
    assert header == archive.open_archive(data, KEY)[0]
    assert header.digest == hashlib.sha256(head).hexdigest()
    assert header.key_id == archive.key_id(KEY) and KEY.hex() not in head.decode()


def test_what_shrinks_is_compressed_and_what_does_not_is_left_as_it_is() -> None:
    header, _ = archive.open_archive(sealed(), KEY)
    coding = {part.name: part.coding for part in header.parts}
    assert coding == {
        "record": "raw",
        "body": "zstd",
        "noise": "raw",
        "empty": "raw",
        "zeros": "zstd",
    }
    floats = memoryview(np.random.default_rng(1).random(50_000)).cast("B")
    pieces = archive.seal([("floats", floats)], FACTS, KEY)
    # Not even copied.
    assert any(getattr(piece, "obj", None) is floats.obj for piece in pieces)


def test_parts_begin_where_arrays_may_be_used_in_place() -> None:
    data = bytearray(sealed([("a", b"x" * 7), ("b", os.urandom(99)), ("c", os.urandom(64))]))
    _, parts = archive.open_archive(data, KEY)
    whole = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    for _, view in parts:
        at = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
        assert (at - whole) % archive.ALIGNMENT_BYTES == 0


# -- flaws, each its own


def test_another_key_is_told_from_a_change() -> None:
    assert flaw_of(sealed(), b"z" * 32) == "wrong key"
    data = sealed().replace(b"rooms:Room", b"rooms:Doom")
    assert flaw_of(data) == "damaged"


def test_every_truncation_is_told() -> None:
    data = sealed()
    for size in (*range(1, 300), *range(300, len(data), 97), len(data) - 1):
        assert flaw_of(data[:size]) in ("truncated", "damaged"), size
    assert flaw_of(data[:20]) == flaw_of(data[:-1]) == flaw_of(data[:500]) == "truncated"


def test_what_follows_the_end_is_told() -> None:
    assert flaw_of(sealed() + b"\0") == "damaged"


def test_a_newer_format_is_told_also_of_a_header_that_nobody_here_could_read() -> None:
    data = sealed().replace(b"checkpoint 1 ", b"checkpoint 3 ", 1)
    assert flaw_of(data) == "newer"
    assert flaw_of(b"livemigrate checkpoint 17 whatever comes then\n") == "newer"


@pytest.mark.parametrize("data", [b"", b"\x80\x05K\x01.", b"PK\x03\x04" * 50, b"{}\n" * 100])
def test_what_is_no_checkpoint_is_told(data: bytes) -> None:
    assert flaw_of(data) == "foreign"


def test_each_changed_bit_is_noticed() -> None:
    data = sealed([("a", b"123"), ("b", b"4567")])
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            flaw_of(changed)


def test_parts_that_were_swapped_with_their_digests_are_noticed() -> None:
    one, two = sealed([("a", b"x" * 64)]), sealed([("a", b"y" * 64)])
    assert flaw_of(one[:-64] + two[-64:]) == "damaged"


HEADERS = [
    b"[]",
    b"{}",
    b'{"parts": 3, "written_by": {}, "key_id": "", "parts_bytes": 0}',
    b'{"parts": [[1]], "written_by": {}, "key_id": "", "parts_bytes": 0}',
    b'{"parts": [["a", -1, 0, "raw", ""]], "written_by": {}, "key_id": "", "parts_bytes": 0}',
    b'{"parts": [], "written_by": {}, "key_id": "", "parts_bytes": -5}',
    b'{"parts": [], "written_by": {}, "key_id": "", "parts_bytes": 1e999}',
    b"[" * 200_000,
    b"\xff\xfe",
    b"NaN",
]


@pytest.mark.parametrize("text", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_no_release_writes_is_an_error_and_nothing_else(text: bytes) -> None:
    text += b" " * 7
    line = b"livemigrate checkpoint 1 header=%08d mac=%s\n" % (len(text), b"0" * 64)
    assert flaw_of(line + text) == "damaged"


def test_a_header_that_asks_for_a_gigabyte_is_refused_before_it_is_read() -> None:
    line = b"livemigrate checkpoint 1 header=99999999 mac=%s\n" % (b"0" * 64)
    assert flaw_of(line) == "damaged"


# -- ten thousand files that are not as they were written


class Tripwire:
    """Tells when it is unpickled."""

    fired = 0

    def __reduce__(self) -> Any:
        return _fire, ()


def _fire() -> None:
    Tripwire.fired += 1


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One thing changed: a bit, a byte, a cut, a hole, an insertion, a swap, a piece of zeros."""
    out = bytearray(data)
    at = rng.randrange(len(out))
    match rng.randrange(7):
        case 0:
            out[at] ^= 1 << rng.randrange(8)
        case 1:
            out[at] = rng.randrange(256)
        case 2:
            del out[at:]
        case 3:
            del out[at : at + rng.randrange(1, 200)]
        case 4:
            out[at:at] = rng.randbytes(rng.randrange(1, 20))
        case 5:
            to = rng.randrange(len(out))
            out[at], out[to] = out[to], out[at]
        case 6:
            out[at : at + 64] = bytes(len(out[at : at + 64]))
    return bytes(out)


@pytest.mark.parametrize("ahead", [False, True])
def test_ten_thousand_mutated_files_give_ten_thousand_errors_and_unpickle_nothing(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from migrate.errors import CheckpointError
    from migrate.shell import checkpoints
    from tests.serializers.checkpoint_of import checkpoint_of

    monkeypatch.setattr(Tripwire, "fired", 0)
    held = {"rows": {n: n for n in range(1500)}, "wire": Tripwire()} if ahead else Tripwire()
    data = checkpoint_of(held, KEY, ahead=ahead)
    loaded: list[object] = []
    for name in ("loads", "load", "Unpickler"):
        real = getattr(pickle, name)
        monkeypatch.setattr(
            pickle, name, lambda *a, real=real, **k: (loaded.append(a), real(*a, **k))[1]
        )
    rng = random.Random(53)
    flaws: dict[str, int] = {}
    count = 0
    while count < 10_000:
        changed = mutated(data, rng)
        if changed == data:
            continue
        count += 1
        with pytest.raises(CheckpointError) as caught:
            checkpoints.build(checkpoints.opened("u", bytearray(changed), KEY), None)  # type: ignore[arg-type]
        error = caught.value
        assert error.flaw is not None and "nothing was restored" in error.message
        flaws[error.flaw] = flaws.get(error.flaw, 0) + 1
    assert loaded == [] and Tripwire.fired == 0
    assert {"damaged", "truncated", "foreign"} <= set(flaws)
    assert set(flaws) <= {"damaged", "truncated", "foreign", "newer", "wrong key"}
    # The wire does trip when the file is whole.
    checkpoints.build(checkpoints.opened("u", bytearray(data), KEY), None)  # type: ignore[arg-type]
    assert loaded and Tripwire.fired == 1
