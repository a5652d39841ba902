"""A checkpoint made without a node, for tests of what reads one."""

from __future__ import annotations

import msgspec

from migrate.core.directory import Row, RowState
from migrate.core.records import CheckpointRecord
from migrate.shell import checkpoints
from serializers.stream import StreamWriter


class Holder:
    """The server's class; it holds whatever a test gives it."""

    def __init__(self, held: object) -> None:
        self.held = held
        self.text = "something to compress " * 100

    def get(self) -> object:
        return self.held


def checkpoint_of(held: object, key: bytes, *, ahead: bool = False) -> bytes:
    """The bytes of a checkpoint of a `Holder`, signed with `key` itself.

    Args:
        held: What it holds.
        key: The key.
        ahead: In chunks, as of a large state that was written ahead.
    """
    cls = f"{Holder.__module__}:{Holder.__qualname__}"
    row = Row("holder-1", 3, "n@1", RowState.ACTIVE, "t", "held", cls, 1)
    record = CheckpointRecord(0, [], [], [], {}, [])
    facts = checkpoints.facts_of(row, "n", False, record)
    if ahead:
        writer = StreamWriter(Holder(held), "hash", apart=True)
        chunks = [writer.look(), writer.step(60.0, 1 << 30)[0]]
        assert writer.is_worth_it
        captured = checkpoints.capture_rest(writer, chunks, facts, record)
        writer.close()
    else:
        captured = checkpoints.capture(Holder(held), facts, record)
    assert msgspec.to_builtins(facts)["attributes"]["text"] > 2000
    return b"".join(checkpoints.seal(captured, key))
