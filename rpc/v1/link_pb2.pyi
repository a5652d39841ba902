from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LinkRefusalReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LINK_REFUSAL_REASON_UNSPECIFIED: _ClassVar[LinkRefusalReason]
    LINK_REFUSAL_REASON_SECRET: _ClassVar[LinkRefusalReason]
    LINK_REFUSAL_REASON_VERSION: _ClassVar[LinkRefusalReason]
    LINK_REFUSAL_REASON_INCARNATION: _ClassVar[LinkRefusalReason]
    LINK_REFUSAL_REASON_DUPLICATE: _ClassVar[LinkRefusalReason]
    LINK_REFUSAL_REASON_LIMIT: _ClassVar[LinkRefusalReason]
    LINK_REFUSAL_REASON_CLOSING: _ClassVar[LinkRefusalReason]
    LINK_REFUSAL_REASON_MALFORMED: _ClassVar[LinkRefusalReason]
    LINK_REFUSAL_REASON_CERTIFICATE: _ClassVar[LinkRefusalReason]
LINK_REFUSAL_REASON_UNSPECIFIED: LinkRefusalReason
LINK_REFUSAL_REASON_SECRET: LinkRefusalReason
LINK_REFUSAL_REASON_VERSION: LinkRefusalReason
LINK_REFUSAL_REASON_INCARNATION: LinkRefusalReason
LINK_REFUSAL_REASON_DUPLICATE: LinkRefusalReason
LINK_REFUSAL_REASON_LIMIT: LinkRefusalReason
LINK_REFUSAL_REASON_CLOSING: LinkRefusalReason
LINK_REFUSAL_REASON_MALFORMED: LinkRefusalReason
LINK_REFUSAL_REASON_CERTIFICATE: LinkRefusalReason

class Frame(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class LinkPeer(_message.Message):
    __slots__ = ("id", "name", "kind", "address", "pid", "protocol_min", "protocol_max", "features")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MIN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_MAX_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    kind: str
    address: str
    pid: int
    protocol_min: int
    protocol_max: int
    features: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., kind: _Optional[str] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., protocol_min: _Optional[int] = ..., protocol_max: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ...) -> None: ...

class LinkHello(_message.Message):
    __slots__ = ("nonce", "peer")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    peer: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., peer: _Optional[bytes] = ...) -> None: ...

class LinkChallenge(_message.Message):
    __slots__ = ("nonce", "peer", "proof")
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    peer: bytes
    proof: bytes
    def __init__(self, nonce: _Optional[bytes] = ..., peer: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class LinkProof(_message.Message):
    __slots__ = ("proof", "ended_link")
    PROOF_FIELD_NUMBER: _ClassVar[int]
    ENDED_LINK_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    ended_link: bytes
    def __init__(self, proof: _Optional[bytes] = ..., ended_link: _Optional[bytes] = ...) -> None: ...

class LinkWelcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LinkRefusal(_message.Message):
    __slots__ = ("reason", "message", "peer_id")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    reason: LinkRefusalReason
    message: str
    peer_id: str
    def __init__(self, reason: _Optional[_Union[LinkRefusalReason, str]] = ..., message: _Optional[str] = ..., peer_id: _Optional[str] = ...) -> None: ...
