"""Reducers for types of other packages, known by name: none of them is imported for that.

Clients are made again from their settings, without the connections that they hold: those are
opened when they are next needed. What is only in a connection, such as a transaction, is refused.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from .arrays import reduce_array, reduce_memmap
from .base import lossy
from .resources import Reduced, Reducer, refuse


def third_party_reducer(kind: type) -> Reducer | None:
    """The reducer for a type of another package, or for one of its bases; None if there is none."""
    for base in kind.__mro__:
        reducer = _REDUCERS.get((base.__module__, base.__qualname__))
        if reducer is not None:
            return reducer
    return None


# --- SQLAlchemy ----------------------------------------------------------------------------------


def _reduce_engine(engine: Any) -> Reduced:
    pool = engine.pool
    if pool.checkedout() if hasattr(pool, "checkedout") else 0:
        refuse(engine, "a connection of it is in use", "close sessions and connections before")
    lossy("it is made anew from its URL and settings, without its connections and listeners")
    options: dict[str, Any] = {
        "echo": engine.echo,
        "poolclass": type(pool),
        "pool_pre_ping": pool._pre_ping,
        "pool_recycle": pool._recycle,
        "execution_options": dict(engine.get_execution_options()),
        "connect_args": _connect_arguments(pool._creator),
    }
    if hasattr(pool, "_max_overflow"):
        options["pool_size"] = pool.size()
        options["max_overflow"] = pool._max_overflow
        options["pool_timeout"] = pool._timeout
    content = None
    if engine.dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
        raw = engine.raw_connection()
        try:
            if raw.driver_connection.in_transaction:
                refuse(
                    engine, "a transaction is open in its database in memory", "commit it before"
                )
            content = raw.driver_connection.serialize()
        finally:
            raw.close()
    url = engine.url.render_as_string(hide_password=False)
    return _make_engine, (url, options, content)


def _connect_arguments(creator: Any) -> dict[str, Any]:
    code = getattr(creator, "__code__", None)
    if code is None:
        return {}
    cells = zip(code.co_freevars, creator.__closure__ or (), strict=True)
    found: dict[str, Any] = {name: cell.cell_contents for name, cell in cells}
    return dict(found.get("cparams") or {})


def _make_engine(url: str, options: dict[str, Any], content: bytes | None) -> Any:
    made = importlib.import_module("sqlalchemy").create_engine(url, **options)
    if content:
        raw = made.raw_connection()
        try:
            raw.driver_connection.deserialize(content)
        finally:
            raw.close()
    return made


def _reduce_session(session: Any) -> Reduced:
    if session.new or session.dirty or session.deleted or session.in_transaction():
        refuse(
            session,
            "it has a transaction, or changes that are in no database yet",
            "commit or roll back, and close it, before the state is captured",
        )
    options = {
        "bind": session.bind,
        "autoflush": session.autoflush,
        "expire_on_commit": session.expire_on_commit,
        "info": dict(session.info),
    }
    return _make_session, (_session_class(type(session)), options)


def _session_class(kind: type) -> type:
    """The class itself, or its base if it is one that a session maker made."""
    made = kind.__module__ == "sqlalchemy.orm.session" and kind.__bases__[0].__name__ == "Session"
    return kind.__bases__[0] if made else kind


def _make_session(kind: Any, options: dict[str, Any]) -> Any:
    return kind(**options)


def _reduce_session_maker(maker: Any) -> Reduced:
    return _make_session_maker, (type(maker), dict(maker.kw))


def _make_session_maker(kind: Any, options: dict[str, Any]) -> Any:
    return kind(**options)


# --- clients of networks -------------------------------------------------------------------------


def _reduce_redis_pool(pool: Any) -> Reduced:
    lossy("it is made anew from its settings: connections are opened when they are needed")
    state = {"max_connections": pool.max_connections, "connection_kwargs": pool.connection_kwargs}
    return (
        _make_redis_pool,
        (type(pool), pool.connection_class),
        state,
        None,
        None,
        _fill_redis_pool,
    )


def _make_redis_pool(kind: Any, connection_class: Any) -> Any:
    return kind.__new__(kind)


def _fill_redis_pool(pool: Any, state: dict[str, Any]) -> None:
    type(pool).__init__(
        pool, max_connections=state["max_connections"], **state["connection_kwargs"]
    )


def _reduce_http_pool(pool: Any) -> Reduced:
    if pool._requests:
        refuse(pool, f"{len(pool._requests)} requests of it are under way", "let them end before")
    lossy("its connections are left behind, and opened when they are needed")
    state = {
        name: value
        for name, value in vars(pool).items()
        if name not in ("_connections", "_requests", "_optional_thread_lock")
    }
    return _make_http_pool, (type(pool),), state, None, None, _fill_http_pool


def _make_http_pool(kind: Any) -> Any:
    return kind()


def _fill_http_pool(pool: Any, state: dict[str, Any]) -> None:
    vars(pool).update(state)


# --- torch ---------------------------------------------------------------------------------------


def _reduce_tensor(tensor: Any) -> Reduced:
    """Carry a tensor as a view of its storage, so that tensors that share one go on doing so.

    torch's own way writes the whole storage for each tensor, into a stream within the stream, and
    leaves gradients behind. It is kept for what is not an ordinary tensor in this process's memory.
    """
    torch: Any = sys.modules["torch"]
    kind = type(tensor)
    if (
        kind not in (torch.Tensor, torch.nn.Parameter)
        or tensor.layout is not torch.strided
        or tensor.device.type != "cpu"
        or tensor.is_quantized
        or tensor.is_conj()
        or tensor.is_neg()
        or not tensor.is_leaf
        or tensor._backward_hooks
        or importlib.util.find_spec("numpy") is None
    ):
        return NotImplemented
    view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.requires_grad)
    arguments = (kind, tensor.untyped_storage(), tensor.dtype, *view)
    return _make_tensor, arguments, (dict(vars(tensor)), tensor.grad), None, None, _fill_tensor


def _make_tensor(
    kind: Any, storage: Any, dtype: Any, offset: int, shape: Any, stride: Any, gradient: bool
) -> Any:
    torch = importlib.import_module("torch")
    made = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
    if kind is torch.nn.Parameter:
        return kind(made, requires_grad=gradient)
    return made.requires_grad_(gradient) if gradient else made


def _fill_tensor(tensor: Any, state: tuple[dict[str, Any], Any]) -> None:
    attributes, gradient = state
    vars(tensor).update(attributes)
    if gradient is not None:
        tensor.grad = gradient


def _bytes_of(storage: Any) -> Any:
    torch: Any = sys.modules["torch"]
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _reduce_storage(storage: Any) -> Reduced:
    if storage.device.type != "cpu" or importlib.util.find_spec("numpy") is None:
        return NotImplemented
    return _make_storage, (_bytes_of(storage),)


def _make_storage(content: Any) -> Any:
    storage = importlib.import_module("torch").UntypedStorage(content.nbytes)
    # A copy, since torch cannot resize memory that is not its own.
    _bytes_of(storage)[:] = content
    return storage


_REDUCERS: dict[tuple[str, str], Reducer] = {
    ("sqlalchemy.engine.base", "Engine"): _reduce_engine,
    ("sqlalchemy.orm.session", "Session"): _reduce_session,
    ("sqlalchemy.orm.session", "sessionmaker"): _reduce_session_maker,
    ("redis.connection", "ConnectionPool"): _reduce_redis_pool,
    ("redis.asyncio.connection", "ConnectionPool"): _reduce_redis_pool,
    ("httpcore._sync.connection_pool", "ConnectionPool"): _reduce_http_pool,
    ("httpcore._async.connection_pool", "AsyncConnectionPool"): _reduce_http_pool,
    ("numpy", "memmap"): reduce_memmap,
    ("numpy", "ndarray"): reduce_array,
    ("torch", "Tensor"): _reduce_tensor,
    ("torch.storage", "UntypedStorage"): _reduce_storage,
}
