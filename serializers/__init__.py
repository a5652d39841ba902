"""Live objects to bytes and back, also those that pickle refuses; knows no network, no server.

`dumps` and `loads` use one self-contained byte string; `encode` and `decode` a `Snapshot`, whose
large buffers are shipped without being copied.
"""

from .auto import AutoSerializer, check, decode, digest, dumps, encode, loads
from .base import Serializer, Snapshot, is_checking, lossy
from .by_value import register_by_value, unregister_by_value
from .errors import CheckReport, Finding, LoadFailed, NotSerializable, SerializerError
from .plain import PlainSerializer, former_names
from .resources import refuse, register

__livemigrate__ = True
"""Tells this package from another one of the same name on the path."""

__all__ = [
    "AutoSerializer",
    "CheckReport",
    "Finding",
    "LoadFailed",
    "NotSerializable",
    "PlainSerializer",
    "Serializer",
    "SerializerError",
    "Snapshot",
    "check",
    "decode",
    "digest",
    "dumps",
    "encode",
    "former_names",
    "is_checking",
    "loads",
    "lossy",
    "refuse",
    "register",
    "register_by_value",
    "unregister_by_value",
]
