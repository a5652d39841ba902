from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from rpc import errors

KINDS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, errors.RpcError)
]
FIELDS = {
    "address": "127.0.0.1:1",
    "peer_id": "n1",
    "path": "/a/file",
    "reason": "version",
    "timeout_s": 1.5,
    "size_bytes": 2,
    "limit_bytes": 1,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_every_error_survives_pickling_with_its_fields(kind: type, again: object) -> None:
    parameters = inspect.signature(kind).parameters
    fields = {name: value for name, value in FIELDS.items() if name in parameters}
    assert set(parameters) == {"message", *fields}
    error = kind("what failed; what to do", **fields)
    error.add_note("a note")

    twin = again(error)  # type: ignore[operator]

    assert type(twin) is kind
    assert str(twin) == "what failed; what to do"
    assert isinstance(twin, errors.RpcError)
    for name, value in fields.items():
        assert getattr(twin, name) == value
    assert twin.__notes__ == ["a note"]


def test_a_time_out_is_a_timeout_error() -> None:
    assert issubclass(errors.LinkTimeout, TimeoutError)
