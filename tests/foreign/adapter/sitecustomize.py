"""Puts `serializers` behind cloudpickle's functions, in this process and those that it starts.

Without LIVEMIGRATE_BEHIND_CLOUDPICKLE it only lends the installed cloudpickle the names of 2.2.1
that its tests import, so that they can be run against it for comparison.

Python imports this at its start if its folder is on the path. Cloudpickle's tests load with plain
`pickle.loads` as often as with its own, so what is dumped here is a pickle that calls our `loads`.
"""

from __future__ import annotations

import os
import pickle
import sys
import types
from typing import Any

import cloudpickle
from cloudpickle import cloudpickle as machinery

compat = types.ModuleType("cloudpickle.compat")
compat.pickle = pickle  # type: ignore[attr-defined]
compat.Pickler = pickle.Pickler  # type: ignore[attr-defined]
sys.modules.setdefault("cloudpickle.compat", compat)
cloudpickle.compat = compat


def _set_cell(cell: types.CellType, value: object) -> None:
    cell.cell_contents = value


for _name, _value in (("cell_set", _set_cell), ("_make_empty_cell", types.CellType)):
    if not hasattr(machinery, _name):
        setattr(machinery, _name, _value)

if os.environ.get("LIVEMIGRATE_BEHIND_CLOUDPICKLE"):
    import serializers

    class _Ours:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def __reduce__(self) -> Any:
            return loads_as_cloudpickle_does, (self.data,)

    def loads_as_cloudpickle_does(data: bytes) -> object:
        """Raise what was met, not the error that says where."""
        try:
            return serializers.loads(data)
        except serializers.LoadFailed as error:
            raise error.__cause__ or error from error

    def dumps(obj: object, protocol: int | None = None, buffer_callback: object = None) -> bytes:
        try:
            data = serializers.dumps(obj)
        except serializers.NotSerializable as error:
            # The tests want what was met; of recursion cloudpickle makes an error of pickle's.
            cause = error.__cause__
            if cause is None or isinstance(cause, serializers.NotSerializable | RecursionError):
                cause = pickle.PicklingError(f"Could not pickle object: {error}")
            raise cause from error
        return pickle.dumps(_Ours(data), protocol)

    def dump(
        obj: object, file: Any, protocol: int | None = None, buffer_callback: object = None
    ) -> None:
        file.write(dumps(obj, protocol))

    class CloudPickler:
        def __init__(
            self, file: Any, protocol: int | None = None, buffer_callback: object = None
        ) -> None:
            self.file, self.protocol = file, protocol

        def dump(self, obj: object) -> None:
            dump(obj, self.file, self.protocol)

    for module in (cloudpickle, machinery):
        for ours in (dumps, dump, CloudPickler):
            setattr(module, ours.__name__, ours)
        module.Pickler = CloudPickler
