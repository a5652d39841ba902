"""The byte string and its parts: bounds, versions, buffers."""

from __future__ import annotations

import gc
import importlib
import pathlib
import pickle
import struct
import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import serializers
from serializers import LoadFailed, NotSerializable, Snapshot, base


def test_garbage_is_refused_by_its_missing_magic() -> None:
    for data in (b"", b"x", b"not ours" * 10, pickle.dumps([1])):
        with pytest.raises(LoadFailed, match="magic"):
            serializers.loads(data)


@pytest.mark.parametrize("obj", [((3,), {}), [np.arange(5000.0)], {"blob": bytes(100_000)}])
def test_every_truncation_is_refused(obj: object) -> None:
    data = serializers.dumps(obj)
    lengths = {*range(0, min(len(data), 200)), len(data) // 2, len(data) - 1}

    for length in lengths:
        with pytest.raises(LoadFailed):
            serializers.loads(data[:length])


def test_bytes_behind_the_end_are_refused() -> None:
    with pytest.raises(LoadFailed, match="announces"):
        serializers.loads(serializers.dumps([1]) + b"x")


def test_a_newer_format_is_refused_by_its_number() -> None:
    data = bytearray(serializers.dumps([1]))
    data[4] = base.FORMAT_VERSION + 1

    with pytest.raises(LoadFailed, match=f"format {base.FORMAT_VERSION + 1}.*upgrade"):
        serializers.loads(data)


def test_code_of_another_python_is_refused_before_unpickling_naming_both_versions() -> None:
    data = bytearray(serializers.dumps(lambda: 1))
    data[8] += 1
    # Were it unpickled, this body would fail in another way.
    data[base.HEAD_SIZE_BYTES :] = b"\xff" * (len(data) - base.HEAD_SIZE_BYTES)
    major, minor = sys.version_info[:2]

    with pytest.raises(LoadFailed, match=rf"{major}\.{minor + 1}.* {major}\.{minor}"):
        serializers.loads(bytes(data))


def resealed(data: bytes | bytearray) -> bytes:
    """A string without buffers, with the check that its bytes want."""
    at = base.HEAD_SIZE_BYTES
    check = base.hash_of(data[at:], base.hash_of(data[: at - 8]))
    return b"".join((data[: at - 8], check.to_bytes(8, "little"), data[at:]))


def test_data_without_code_loads_from_another_python_minor() -> None:
    data = bytearray(serializers.dumps({"a": [1]}))
    data[8] += 1

    assert serializers.loads(resealed(data)) == {"a": [1]}


@given(st.data())
def test_no_change_of_head_or_body_reaches_the_unpickler(data: st.DataObject) -> None:
    obj = data.draw(st.sampled_from([Sample(), [1, 2], {"a": bytes(70_000)}, np.arange(5000)]))
    snapshot = serializers.encode(obj)
    whole = bytearray(snapshot.to_bytes())
    end = len(snapshot.head) + len(snapshot.body)
    at = data.draw(st.integers(0, end - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))

    with pytest.raises(LoadFailed):
        serializers.loads(bytes(whole))
    with pytest.raises(LoadFailed):
        serializers.loads(whole)
    parts = [bytes(whole[: len(snapshot.head)]), bytes(whole[len(snapshot.head) : end])]
    with pytest.raises(LoadFailed):
        serializers.decode(Snapshot.from_parts([*parts, *snapshot.buffers]))


def test_a_count_of_buffers_beyond_the_bound_is_refused_without_reading_them() -> None:
    head = struct.pack("<4sBBBBB3xIQ", base.MAGIC, 1, 0, 1, 3, 11, base.BUFFERS_MAX + 1, 1)
    head += bytes(8)

    with pytest.raises(LoadFailed, match="at most"):
        serializers.loads(head + b".")


def test_a_buffer_of_unknown_kind_is_refused() -> None:
    data = bytearray(serializers.dumps(np.arange(5000)))
    data[base.HEAD_SIZE_BYTES + 8] = 200

    with pytest.raises(LoadFailed, match="unknown kind"):
        serializers.loads(data)


@given(st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_hostile_heads_raise_nothing_but_load_failed(tail: bytes, size: int) -> None:
    head = base.PLAIN_PREFIX + size.to_bytes(8, "little")

    with pytest.raises(LoadFailed):
        serializers.loads(head + b"\xff" + tail)


def test_parts_that_do_not_fit_the_head_are_refused() -> None:
    parts = serializers.encode([np.arange(5000), 1]).parts()

    with pytest.raises(LoadFailed, match="buffers"):
        Snapshot.from_parts(parts[:-1])
    with pytest.raises(LoadFailed, match="buffer 0 has"):
        Snapshot.from_parts([*parts[:2], parts[2][:-1]])
    with pytest.raises(LoadFailed, match="at least 2"):
        Snapshot.from_parts(parts[:1])


def test_a_missing_class_is_named_with_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    data = serializers.dumps([Sample(), serializers.LoadFailed])
    monkeypatch.delattr(sys.modules[__name__], "Sample")

    with pytest.raises(LoadFailed, match=f"'{__name__}' has no attribute 'Sample'") as caught:
        serializers.loads(data)

    assert (caught.value.module, caught.value.name) == (__name__, "Sample")


def test_a_missing_module_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    (tmp_path / "soon_gone.py").write_text("class Gone: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import soon_gone  # type: ignore[import-not-found]

    data = serializers.dumps(soon_gone.Gone())
    monkeypatch.delitem(sys.modules, "soon_gone")
    (tmp_path / "soon_gone.py").unlink()
    importlib.invalidate_caches()

    with pytest.raises(LoadFailed, match="no module named 'soon_gone'") as caught:
        serializers.loads(data)
    assert caught.value.module == "soon_gone"


def test_an_error_of_setstate_is_reported_with_its_cause() -> None:
    data = serializers.dumps(Picky())

    with pytest.raises(LoadFailed, match="ValueError: not today") as caught:
        serializers.loads(data)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "error",
    [NotSerializable("A.b", "socket.socket", "why", "what"), LoadFailed("why", "what", "m", "n")],
)
def test_errors_survive_pickling_with_their_fields(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))

    assert (type(copy), vars(copy), str(copy)) == (type(error), vars(error), str(error))


def test_buffers_start_at_multiples_of_64_bytes() -> None:
    arrays = [np.arange(5000 + n, dtype="u1") for n in range(5)]
    data = serializers.dumps(arrays)

    for array in arrays:
        assert data.index(array.tobytes()) % base.ALIGNMENT_BYTES == 0


def test_encode_copies_no_array_and_decode_copies_none_from_writable_memory() -> None:
    array = np.arange(100_000)
    snapshot = serializers.encode({"a": array})
    assert np.shares_memory(np.frombuffer(snapshot.buffers[0], "u1"), array)

    received = [bytearray(part) for part in snapshot.parts()]
    copy = serializers.decode(Snapshot.from_parts(received))["a"]  # type: ignore[index]

    assert np.shares_memory(copy, np.frombuffer(received[2], "u1"))
    assert copy.flags.writeable and (copy == array).all()


def test_decoding_in_the_same_process_never_shares_memory_with_the_original() -> None:
    array = np.arange(100_000)
    frozen = array[:]
    frozen.flags.writeable = False

    for source in (array, frozen):
        copy = serializers.decode(serializers.encode(source))
        assert not np.shares_memory(copy, array)
        assert copy.flags.writeable == source.flags.writeable  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("writeable", [True, False])
def test_arrays_keep_whether_they_are_writable(make: type, writeable: bool) -> None:
    for array in (np.arange(100), np.arange(100_000)):
        array.flags.writeable = writeable
        copy = serializers.loads(make(serializers.dumps(array)))
        assert copy.flags.writeable == writeable  # type: ignore[attr-defined]
        assert (copy == array).all()


def test_views_of_one_array_stay_views_of_one_array_over_two_generations() -> None:
    whole = np.arange(12.0).reshape(3, 4)
    pair = [whole[:, 1], whole[::-1], whole]

    for _ in range(2):
        pair = serializers.loads(serializers.dumps(pair))  # type: ignore[assignment]
        pair[0][0] = 99.0
        assert pair[1][2, 1] == 99.0 and pair[2][0, 1] == 99.0


@given(
    st.lists(
        st.one_of(
            st.integers(0, 200_000).map(bytes),
            st.integers(0, 200_000).map(bytearray),
            st.integers(0, 70_000).map(lambda n: "é" * n),
            st.integers(0, 50_000).map(lambda n: np.arange(n, dtype="u2")),
            st.lists(st.integers(), max_size=300),
        ),
        max_size=7,
    )
)
def test_large_byte_strings_leave_the_body_and_come_back_in_place(items: list[object]) -> None:
    snapshot = serializers.encode([items, items])
    copy, again = serializers.decode(snapshot)  # type: ignore[misc]

    assert copy is again
    for old, new in zip(items, copy, strict=True):
        assert type(old) is type(new)
        assert np.array_equal(old, new) if isinstance(old, np.ndarray) else old == new
    large = [i for i in items if isinstance(i, bytes | bytearray) and len(i) >= 65536]
    # All but a few kB of each of them is outside of the body.
    assert len(snapshot.buffers) >= len(large)
    assert serializers.loads(snapshot.to_bytes()) is not None


def test_bytes_that_look_like_the_header_of_a_large_string_are_left_alone() -> None:
    large = b"y" * 70_000
    announced = b"B" + len(large).to_bytes(4, "little")
    obj = [announced, large, "x" * 70_000, announced * 20_000, large[:-1], bytearray(announced)]

    assert serializers.loads(serializers.dumps(obj)) == obj


def test_a_bytearray_can_still_be_resized_while_its_snapshot_lives() -> None:
    array = bytearray(100_000)
    snapshot = serializers.encode(array)

    array += b"more"

    assert serializers.decode(snapshot) == bytes(100_000)


def test_size_bytes_is_the_sum_of_the_parts() -> None:
    snapshot = serializers.encode([np.arange(5000), b"x" * 70_000])

    assert snapshot.size_bytes == sum(memoryview(p).nbytes for p in snapshot.parts())


def test_the_collector_is_back_on_after_large_loads_and_after_failed_ones() -> None:
    assert gc.isenabled()
    data = serializers.dumps([[i] for i in range(50_000)])
    assert len(data) > 65536
    serializers.loads(data)
    assert gc.isenabled()
    with pytest.raises(LoadFailed):
        serializers.loads(resealed(data[:-1] + b"\xff"))
    assert gc.isenabled()


class Waits:
    """Loading it waits until another thread is loading too."""

    meeting: Any = None

    def __init__(self) -> None:
        self.filling = [[n] for n in range(30_000)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        Waits.meeting.wait(30)
        assert not gc.isenabled()


def test_the_collector_stays_off_until_the_last_of_several_threads_has_loaded() -> None:
    data = serializers.dumps(Waits())
    Waits.meeting = threading.Barrier(3)
    failed: list[BaseException] = []

    def load(stream: bytes) -> None:
        try:
            serializers.loads(stream)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=load, args=(data,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    # One that fails in the midst of the others turns nothing on.
    with pytest.raises(LoadFailed):
        serializers.loads(resealed(serializers.dumps([[n] for n in range(30_000)])[:-1] + b"\xff"))
    Waits.meeting.wait(30)
    for thread in threads:
        thread.join()
    assert not failed and gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        serializers.loads(serializers.dumps([[i] for i in range(50_000)]))
        assert not gc.isenabled()
    finally:
        gc.enable()


class Sample:
    pass


class Picky:
    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}

    def __setstate__(self, state: dict[str, int]) -> None:
        raise ValueError("not today")
