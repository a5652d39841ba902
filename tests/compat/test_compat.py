"""Bytes that earlier releases wrote go on loading, and mean what they meant."""

from __future__ import annotations

import base64
import json
import pathlib
import sys
import zlib
from typing import Any, cast

import numpy as np
import pytest

import serializers
from migrate.core.messages import Final
from migrate.ref import Runtime
from migrate.shell import checkpoints, classes, wire
from tests.compat import samples

HERE = pathlib.Path(__file__).parent
RELEASES = sorted(path.stem for path in HERE.glob("*.json"))
NO_RUNTIME = cast(Runtime, None)


def kept(release: str) -> tuple[str, dict[str, bytes]]:
    told = json.loads((HERE / f"{release}.json").read_text())
    return told["python"], {
        k: zlib.decompress(base64.b64decode(v)) for k, v in told["samples"].items()
    }


@pytest.fixture(params=RELEASES)
def bytes_of(request: pytest.FixtureRequest) -> dict[str, bytes]:
    return kept(request.param)[1]


def test_there_is_a_release_to_be_compatible_with() -> None:
    assert "0.1.0" in RELEASES


def test_states_load_as_what_they_were(bytes_of: dict[str, bytes]) -> None:
    names = [name.removeprefix("state ") for name in bytes_of if name.startswith("state ")]
    found = {
        name: serializers.loads(bytes_of[f"state {name}"])
        for name in names
        if name in samples.STATES
    }

    assert len(found) >= 4
    for name, state in found.items():
        assert state == samples.STATES[name], name
        assert repr(state) == repr(samples.STATES[name]), name
    assert samples.check_account(serializers.loads(bytes_of["account"]))
    slotted: Any = serializers.loads(bytes_of["slots"])
    assert (type(slotted), slotted.left, slotted.right) == (samples.Slotted, 1, (2,))


def test_arrays_load_with_their_views(bytes_of: dict[str, bytes]) -> None:
    whole, view, small = cast(Any, serializers.loads(bytes_of["arrays"]))

    assert np.array_equal(whole, samples.ARRAY) and whole.dtype == samples.ARRAY.dtype
    assert np.array_equal(view, samples.ARRAY[10:, ::2]) and not small.any()
    view[0, 0] = -1
    assert whole[10, 0] == -1


def test_parts_load(bytes_of: dict[str, bytes]) -> None:
    parts = [bytearray(data) for name, data in bytes_of.items() if name.startswith("part ")]
    array, text = cast(Any, serializers.decode(serializers.Snapshot.from_parts(parts)))

    assert np.array_equal(array, samples.ARRAY) and text == "text"


@pytest.mark.parametrize("release", RELEASES)
def test_code_loads_on_the_python_that_wrote_it_and_is_refused_by_others(release: str) -> None:
    python, found = kept(release)
    if python == f"{sys.version_info[0]}.{sys.version_info[1]}":
        assert cast(Any, serializers.loads(found["code by value"]))(1) == 2
    else:
        with pytest.raises(serializers.LoadFailed, match=python):
            serializers.loads(found["code by value"])


def test_messages_decode_one_by_one_and_together(bytes_of: dict[str, bytes]) -> None:
    kinds = {type(message).__name__: message for message in samples.MESSAGES}
    names = [name for name in bytes_of if name.startswith("message ")]

    assert len(names) >= 23
    for name in names:
        assert wire.decode_messages(bytes_of[name]) == [kinds[name.split()[2]]], name
    together = wire.decode_messages(bytes_of["messages"])
    assert together == [kinds[type(message).__name__] for message in together]
    assert len(together) == len(names)


def test_rows_and_records_decode(bytes_of: dict[str, bytes]) -> None:
    assert wire.decode_row(bytes_of["row"]) == samples.ROW
    assert wire.decode_state(bytes_of["record"]) == samples.RECORD


def test_states_of_servers_decode_in_either_form(bytes_of: dict[str, bytes]) -> None:
    (final,) = wire.decode_messages(bytearray(bytes_of["state after its message"]))
    assert isinstance(final, Final)
    for state in (bytes_of["record and object"], final.state):
        record, body = classes.split(state)
        assert wire.decode_state(record) == samples.RECORD
        assert samples.check_account(wire.unpack(body, NO_RUNTIME))


def test_a_checkpoint_is_verified_and_built(bytes_of: dict[str, bytes]) -> None:
    data = bytearray(bytes_of["checkpoint"])
    loaded = checkpoints.opened("kept", data, samples.CHECKPOINT_KEY)
    facts = loaded.facts
    assert (facts.server, facts.name, facts.epoch, facts.generation) == ("s", "hits", 9, 4)
    assert facts.rollbacks == [(4, 1.5, 2.5)] and (facts.casts, facts.dropped) == (1, 1)
    assert facts.attributes and loaded.record == samples.CHECKPOINT
    account, _ = checkpoints.build(loaded, NO_RUNTIME)
    assert samples.check_account(account)


@pytest.mark.parametrize("release", [*RELEASES, "present"])
def test_a_checkpoint_in_chunks_is_verified_and_built(release: str) -> None:
    made = samples.make() if release == "present" else kept(release)[1]
    if "checkpoint in chunks" not in made:
        assert release == "0.1.0"  # It had none.
        return
    data = bytearray(made["checkpoint in chunks"])
    assert data.startswith(b"livemigrate checkpoint 2 ")
    loaded = checkpoints.opened("kept", data, samples.CHECKPOINT_KEY)
    names = [part.name for part in loaded.header.parts]
    assert names == ["record", "chunk 0", "chunk 1", "chunk 2"]
    assert loaded.facts.attributes["rows"] > 10_000
    assert loaded.facts.attributes["numbers"] >= 400_000
    account: Any = checkpoints.build(loaded, NO_RUNTIME)[0]
    assert account.rows == {n: {"id": -n if n == 7 else n} for n in range(2000)}
    assert account.numbers.sum() == sum(range(50_000)) - 14
    del account.rows, account.numbers
    assert samples.check_account(account)


def test_a_state_for_an_upgrade_becomes_an_object(bytes_of: dict[str, bytes]) -> None:
    bare: Any = serializers.loads(bytes_of["older state"])
    made = classes.upgraded(bare.cls, bare.state, 1)

    assert (type(made), made.left, made.right) == (samples.Slotted, 1, 2)


def test_arguments_values_and_errors_are_unpacked(bytes_of: dict[str, bytes]) -> None:
    def unpack(name: str) -> Any:
        return wire.unpack(bytes_of[name], NO_RUNTIME)

    assert unpack("arguments, plain") == ((1, "a"), {"k": None})
    assert unpack("arguments") == (([1], {2}), {"k": samples.Colour.RED})
    assert unpack("value, plain") == b"v" and unpack("value") == {"v": [1]}
    error = wire.unpack_error(bytes_of["error"], NO_RUNTIME, "s")
    assert type(error) is LookupError and error.args == ("nothing there",)
    assert "LookupError: nothing there" in error.remote_traceback  # type: ignore[attr-defined]


def test_what_this_release_writes_passes_the_same_tests() -> None:
    """So a sample that cannot be read back is seen before it is kept."""
    made = samples.make()

    test_states_load_as_what_they_were(made)
    test_arrays_load_with_their_views(made)
    test_parts_load(made)
    test_messages_decode_one_by_one_and_together(made)
    test_rows_and_records_decode(made)
    test_states_of_servers_decode_in_either_form(made)
    test_a_state_for_an_upgrade_becomes_an_object(made)
    test_arguments_values_and_errors_are_unpacked(made)
    for release in RELEASES:
        assert kept(release)[1].keys() <= made.keys()
