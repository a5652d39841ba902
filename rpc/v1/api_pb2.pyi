from rpc.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SpawnRequest(_message.Message):
    __slots__ = ("cls", "args_json", "kwargs_json", "name", "on_node", "least_loaded", "near_server_id", "request_id", "timeout_s", "standby_nodes", "standbys", "standby_mode", "durable")
    CLS_FIELD_NUMBER: _ClassVar[int]
    ARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    KWARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ON_NODE_FIELD_NUMBER: _ClassVar[int]
    LEAST_LOADED_FIELD_NUMBER: _ClassVar[int]
    NEAR_SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    STANDBY_NODES_FIELD_NUMBER: _ClassVar[int]
    STANDBYS_FIELD_NUMBER: _ClassVar[int]
    STANDBY_MODE_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    cls: str
    args_json: str
    kwargs_json: str
    name: str
    on_node: str
    least_loaded: bool
    near_server_id: str
    request_id: str
    timeout_s: float
    standby_nodes: _containers.RepeatedScalarFieldContainer[str]
    standbys: int
    standby_mode: _types_pb2.StandbyMode
    durable: bool
    def __init__(self, cls: _Optional[str] = ..., args_json: _Optional[str] = ..., kwargs_json: _Optional[str] = ..., name: _Optional[str] = ..., on_node: _Optional[str] = ..., least_loaded: bool = ..., near_server_id: _Optional[str] = ..., request_id: _Optional[str] = ..., timeout_s: _Optional[float] = ..., standby_nodes: _Optional[_Iterable[str]] = ..., standbys: _Optional[int] = ..., standby_mode: _Optional[_Union[_types_pb2.StandbyMode, str]] = ..., durable: bool = ...) -> None: ...

class SpawnResponse(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: _types_pb2.ServerRef
    def __init__(self, server: _Optional[_Union[_types_pb2.ServerRef, _Mapping]] = ...) -> None: ...

class CallRequest(_message.Message):
    __slots__ = ("server_id", "server_name", "method", "args_json", "kwargs_json", "timeout_s")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_NAME_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    KWARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    server_name: str
    method: str
    args_json: str
    kwargs_json: str
    timeout_s: float
    def __init__(self, server_id: _Optional[str] = ..., server_name: _Optional[str] = ..., method: _Optional[str] = ..., args_json: _Optional[str] = ..., kwargs_json: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class CallResponse(_message.Message):
    __slots__ = ("reply_json",)
    REPLY_JSON_FIELD_NUMBER: _ClassVar[int]
    reply_json: str
    def __init__(self, reply_json: _Optional[str] = ...) -> None: ...

class CastRequest(_message.Message):
    __slots__ = ("server_id", "server_name", "method", "args_json", "kwargs_json", "timeout_s")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_NAME_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    KWARGS_JSON_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    server_name: str
    method: str
    args_json: str
    kwargs_json: str
    timeout_s: float
    def __init__(self, server_id: _Optional[str] = ..., server_name: _Optional[str] = ..., method: _Optional[str] = ..., args_json: _Optional[str] = ..., kwargs_json: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class CastResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WhereIsRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class WhereIsResponse(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: _types_pb2.ServerRef
    def __init__(self, server: _Optional[_Union[_types_pb2.ServerRef, _Mapping]] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("node", "cls", "page_size", "page_token")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CLS_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    node: str
    cls: str
    page_size: int
    page_token: str
    def __init__(self, node: _Optional[str] = ..., cls: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("servers", "nodes", "next_page_token")
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    servers: _containers.RepeatedCompositeFieldContainer[_types_pb2.ServerInfo]
    nodes: _containers.RepeatedCompositeFieldContainer[_types_pb2.NodeInfo]
    next_page_token: str
    def __init__(self, servers: _Optional[_Iterable[_Union[_types_pb2.ServerInfo, _Mapping]]] = ..., nodes: _Optional[_Iterable[_Union[_types_pb2.NodeInfo, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ("server_id", "server_name")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_NAME_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    server_name: str
    def __init__(self, server_id: _Optional[str] = ..., server_name: _Optional[str] = ...) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: _types_pb2.ServerInfo
    def __init__(self, server: _Optional[_Union[_types_pb2.ServerInfo, _Mapping]] = ...) -> None: ...

class MigrateRequest(_message.Message):
    __slots__ = ("server_id", "server_name", "to_node", "timeout_s")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_NAME_FIELD_NUMBER: _ClassVar[int]
    TO_NODE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    server_name: str
    to_node: str
    timeout_s: float
    def __init__(self, server_id: _Optional[str] = ..., server_name: _Optional[str] = ..., to_node: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class MigrateResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: _types_pb2.MoveReport
    def __init__(self, report: _Optional[_Union[_types_pb2.MoveReport, _Mapping]] = ...) -> None: ...

class ReplicateRequest(_message.Message):
    __slots__ = ("server_id", "server_name", "nodes", "count", "mode", "timeout_s")
    SERVER_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_NAME_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    server_id: str
    server_name: str
    nodes: _containers.RepeatedScalarFieldContainer[str]
    count: int
    mode: _types_pb2.StandbyMode
    timeout_s: float
    def __init__(self, server_id: _Optional[str] = ..., server_name: _Optional[str] = ..., nodes: _Optional[_Iterable[str]] = ..., count: _Optional[int] = ..., mode: _Optional[_Union[_types_pb2.StandbyMode, str]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class ReplicateResponse(_message.Message):
    __slots__ = ("server",)
    SERVER_FIELD_NUMBER: _ClassVar[int]
    server: _types_pb2.ServerInfo
    def __init__(self, server: _Optional[_Union[_types_pb2.ServerInfo, _Mapping]] = ...) -> None: ...
