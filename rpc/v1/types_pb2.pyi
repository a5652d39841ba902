from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_NOT_DONE: _ClassVar[Outcome]
    OUTCOME_DONE: _ClassVar[Outcome]
    OUTCOME_UNKNOWN: _ClassVar[Outcome]

class StandbyMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STANDBY_MODE_UNSPECIFIED: _ClassVar[StandbyMode]
    STANDBY_MODE_SYNC: _ClassVar[StandbyMode]
    STANDBY_MODE_ASYNC: _ClassVar[StandbyMode]
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_NOT_DONE: Outcome
OUTCOME_DONE: Outcome
OUTCOME_UNKNOWN: Outcome
STANDBY_MODE_UNSPECIFIED: StandbyMode
STANDBY_MODE_SYNC: StandbyMode
STANDBY_MODE_ASYNC: StandbyMode

class ErrorDetail(_message.Message):
    __slots__ = ("type", "message", "outcome", "server", "node", "cause", "remote_traceback")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SERVER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    REMOTE_TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    type: str
    message: str
    outcome: Outcome
    server: str
    node: str
    cause: str
    remote_traceback: str
    def __init__(self, type: _Optional[str] = ..., message: _Optional[str] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., server: _Optional[str] = ..., node: _Optional[str] = ..., cause: _Optional[str] = ..., remote_traceback: _Optional[str] = ...) -> None: ...

class ServerRef(_message.Message):
    __slots__ = ("id", "cls", "node", "epoch")
    ID_FIELD_NUMBER: _ClassVar[int]
    CLS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    id: str
    cls: str
    node: str
    epoch: int
    def __init__(self, id: _Optional[str] = ..., cls: _Optional[str] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("id", "name", "cls", "node", "epoch", "version", "mailbox", "standbys", "mode", "durable")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAILBOX_FIELD_NUMBER: _ClassVar[int]
    STANDBYS_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    id: str
    name: str
    cls: str
    node: str
    epoch: int
    version: int
    mailbox: int
    standbys: _containers.RepeatedScalarFieldContainer[str]
    mode: StandbyMode
    durable: bool
    def __init__(self, id: _Optional[str] = ..., name: _Optional[str] = ..., cls: _Optional[str] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., version: _Optional[int] = ..., mailbox: _Optional[int] = ..., standbys: _Optional[_Iterable[str]] = ..., mode: _Optional[_Union[StandbyMode, str]] = ..., durable: bool = ...) -> None: ...

class NodeInfo(_message.Message):
    __slots__ = ("name", "id", "address", "pid", "host", "servers", "load", "cordoned", "draining")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CORDONED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    name: str
    id: str
    address: str
    pid: int
    host: str
    servers: int
    load: float
    cordoned: bool
    draining: bool
    def __init__(self, name: _Optional[str] = ..., id: _Optional[str] = ..., address: _Optional[str] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., servers: _Optional[int] = ..., load: _Optional[float] = ..., cordoned: bool = ..., draining: bool = ...) -> None: ...

class MoveReport(_message.Message):
    __slots__ = ("server", "source", "target", "epoch", "downtime_s", "total_s", "bytes_sent", "rounds")
    SERVER_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DOWNTIME_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    server: str
    source: str
    target: str
    epoch: int
    downtime_s: float
    total_s: float
    bytes_sent: int
    rounds: int
    def __init__(self, server: _Optional[str] = ..., source: _Optional[str] = ..., target: _Optional[str] = ..., epoch: _Optional[int] = ..., downtime_s: _Optional[float] = ..., total_s: _Optional[float] = ..., bytes_sent: _Optional[int] = ..., rounds: _Optional[int] = ...) -> None: ...
