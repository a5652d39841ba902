"""Classes by name, their versions, and the bytes of a captured server."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Any, Final

from migrate.errors import PeerError, UsageError
from migrate.ref import Runtime, loading_runtime
from migrate.server import FORMER_NAMES, ServerSpec, spec_of
from rpc.frames import Gathered
from serializers import attributes, former_names
from serializers.base import Snapshot
from serializers.by_value import is_importable

# Loads look there for what is not found under the name that was written.
former_names.append(FORMER_NAMES)

_specs: dict[str, ServerSpec] = {}
_HEAD_BYTES: Final = 8


def travels_by_value(cls: type) -> bool:
    """Whether other processes cannot import the class, so that it is shipped with the state."""
    return not is_importable(cls)


def known(name: str) -> ServerSpec | None:
    """The spec of a class that was found before, or whose module is imported; else None."""
    spec = _specs.get(name)
    if spec is not None:
        return spec
    module, _, qualname = name.partition(":")
    if module in sys.modules or (module, qualname) in FORMER_NAMES:
        try:
            return find(name)
        except (UsageError, ImportError):
            return None
    return None


def find(name: str) -> ServerSpec:
    """Import a class by "module:Qualname", the present one or a declared former one.

    Raises:
        UsageError: The name is malformed, or what it names is no class.
        Exception: Whatever importing the module raises.
    """
    module_name, _, qualname = name.partition(":")
    if not module_name or not qualname:
        raise UsageError(f"{name!r} names no class; write module:Class")
    try:
        obj: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            try:
                obj = getattr(obj, part)
            except AttributeError as error:
                raise UsageError(f"module {module_name!r} has no class {qualname!r}") from error
    except (ImportError, UsageError):
        # Asked last, since importing the module may have been what declares it.
        former = FORMER_NAMES.get((module_name, qualname))
        if former is None:
            raise
        obj = former
    spec = spec_of(obj)
    _specs[name] = spec
    return spec


def slug(name: str) -> str:
    """The beginning of the ids of a class's servers, for people to tell them apart."""
    text = "".join(c for c in name.lower() if c.isascii() and c.isalnum())
    return text[:32] or "server"


@dataclasses.dataclass(slots=True)
class Apart:
    """A server's object and its state apart, on the way to a node that has a newer version.

    `data` is what `serializers.attributes` made, so that what refers to the object still does.
    """

    data: bytes


@dataclasses.dataclass(slots=True)
class Bare:
    """The same as 0.1.0 wrote it: class and bare state. Read, never written."""

    cls: type
    state: Any


def upgraded(cls: Any, state: Any, from_version: int) -> Any:
    """An object of a newer class from the bare state of an older one; see `install_older`."""
    obj = cls.__new__(cls)
    install_older(obj, state, from_version)
    return obj


def put_together(apart: Apart, from_version: int, runtime: Runtime) -> Any:
    """The object that was taken apart, upgraded; refs in it are bound to `runtime`.

    Raises:
        LoadFailed: It cannot be built here.
        Exception: What the class's `upgrade` raises.
    """
    token = loading_runtime.set(runtime)
    try:
        return attributes.decode(
            Snapshot.from_bytes(apart.data),
            lambda obj, state: install_older(obj, state, from_version),
        )
    finally:
        loading_runtime.reset(token)


def install_older(obj: Any, state: Any, from_version: int) -> None:
    """Give an object of a newer class the state of an older one.

    Uses the class's `upgrade(state, from_version)` hook, which returns the new state; a class
    without it takes the old state as it is.
    """
    upgrade = getattr(obj, "upgrade", None)
    if upgrade is not None:
        # An object without attributes has no state, which is no concern of the hook's.
        state = upgrade({} if state is None else state, from_version)
    attributes.set_state(obj, state)


def join(record: bytes, body: bytes) -> bytes:
    """One byte string of a server's record and its object."""
    return b"".join((len(record).to_bytes(_HEAD_BYTES, "big"), record, body))


def gather(record: bytes, pieces: Sequence[bytes | memoryview]) -> Gathered:
    """As `join`, for an object in pieces, none of which is copied."""
    return Gathered([len(record).to_bytes(_HEAD_BYTES, "big"), record, *pieces])


def split(state: bytes | memoryview | Gathered) -> tuple[memoryview, memoryview | Snapshot]:
    """The two parts that `join` joined, or `gather` gathered; the object in parts in that case.

    Raises:
        PeerError: It is something else.
        LoadFailed: It is something else.
    """
    if isinstance(state, Gathered):
        # Size, record, head, body, then each buffer after its padding.
        if len(state.parts) < 4:
            raise PeerError("the state stream is cut off")
        return state.parts[1], Snapshot.from_parts([*state.parts[2:4], *state.parts[5::2]])
    return _split(memoryview(state))


def split_last(state: bytes | memoryview | Gathered) -> tuple[memoryview, list[memoryview]]:
    """As `split`, of a state whose object is the last chunk of a stream, in any parts.

    Raises:
        PeerError: It is something else.
    """
    if not isinstance(state, Gathered):
        record, chunk = _split(memoryview(state))
        return record, [chunk]
    if len(state.parts) < 2:
        raise PeerError("the state stream is cut off")
    return state.parts[1], state.parts[2:]


def _split(view: memoryview) -> tuple[memoryview, memoryview]:
    size = int.from_bytes(view[:_HEAD_BYTES], "big")
    if len(view) < _HEAD_BYTES + size:
        raise PeerError("the state stream is cut off")
    return view[_HEAD_BYTES : _HEAD_BYTES + size], view[_HEAD_BYTES + size :]
