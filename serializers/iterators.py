"""Reducers for iterators and code that waits to be run: with their position, or not at all.

Most built-in iterators pickle themselves. What is added here: iterators of dicts go on showing the
dict, those of itertools travel without the warnings of Python 3.12 and 3.13, generators and
coroutines that have not begun or are over, and readers whose source can be had.
"""

from __future__ import annotations

import csv
import functools
import gc
import itertools
import json
import opcode
import re
import struct
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from .errors import LoadFailed
from .layout import find_field, read_field
from .resources import REDUCERS, Reduced, Reducer, position_of, refuse, refuses

# --- dicts ---------------------------------------------------------------------------------------


def _reduce_dict_iterator(kind: str, backwards: bool) -> Reducer:
    def reduce(iterator: Any) -> Reduced:
        mapping = next((r for r in gc.get_referents(iterator) if isinstance(r, dict)), None)
        if mapping is None:
            return iter, ((),)  # Used up, so it has let its dict go.
        left = iterator.__length_hint__()
        if not left and mapping:
            try:
                iterator.__reduce__()
            except RuntimeError as exc:
                refuse(iterator, f"it cannot go on: {exc}", "drop it")
        consumed = len(mapping) - left
        return _make_dict_iterator, (mapping, kind, backwards, consumed, len(mapping))

    return reduce


def _make_dict_iterator(
    mapping: Any, kind: str, backwards: bool, consumed: int, size: int
) -> Iterator[Any]:
    if len(mapping) != size:
        raise LoadFailed(
            "an iterator over a dict is one of the dict's own values",
            "keep the iterator elsewhere, or a list of the keys that are left",
        )
    view = getattr(mapping, kind)()
    iterator: Iterator[Any] = reversed(view) if backwards else iter(view)
    for _ in range(consumed):
        next(iterator)
    return iterator


# --- itertools -----------------------------------------------------------------------------------

_warnings_lock = threading.Lock()


def _quietly(function: Callable[..., Any], *args: Any) -> Any:
    """Call what Python 3.12 and 3.13 deprecate, and 3.14 lacks."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return function(*args)


def _reduce_itertool(iterator: Any) -> Reduced:
    native = getattr(type(iterator), "__reduce__", object.__reduce__)
    if native is object.__reduce__:
        return _reduce_by_referents(iterator)
    reduced = _quietly(native, iterator)
    kind, args, state = (*reduced, None)[:3]
    if kind is not type(iterator):
        return kind, args  # What is left of it, as another iterator.
    return _make_itertool, (kind, args, state)


def _make_itertool(kind: Any, args: tuple[Any, ...], state: Any) -> Any:
    iterator = kind(*args)
    if state is None:
        return iterator
    if hasattr(iterator, "__setstate__"):
        _quietly(iterator.__setstate__, state)
        return iterator
    resume = _RESUME.get(kind)
    if resume is None:
        raise LoadFailed(
            f"this Python cannot put an itertools.{kind.__name__} where it was",
            "load it on Python 3.13 or earlier",
        )
    return resume(args, state)


def _resume_cycle(args: Any, state: Any) -> Any:
    saved, first_pass_over = state
    if first_pass_over:
        rest = list(args[0])
        turned = itertools.cycle(itertools.chain(rest, saved[: len(saved) - len(rest)]))
        return turned if rest else itertools.cycle(saved)
    iterator = itertools.cycle(itertools.chain(saved, args[0]))
    for _ in saved:
        next(iterator)
    return iterator


def _resume_chain(args: Any, state: Any) -> Any:
    source, *active = state
    return itertools.chain.from_iterable(itertools.chain(active, source))


def _resume_islice(args: Any, count: int) -> Any:
    iterator, first, stop, step = args
    return itertools.islice(
        iterator, first - count, None if stop is None else max(stop - count, 0), step
    )


_RESUME: dict[Any, Callable[[Any, Any], Any]] = {
    itertools.cycle: _resume_cycle,
    itertools.chain: _resume_chain,
    itertools.islice: _resume_islice,
    itertools.takewhile: lambda args, stopped: (
        itertools.takewhile(args[0], ()) if stopped else itertools.takewhile(*args)
    ),
    itertools.dropwhile: lambda args, started: (
        itertools.dropwhile(_never, args[1]) if started else itertools.dropwhile(*args)
    ),
    itertools.accumulate: lambda args, total: _skip(
        itertools.accumulate(args[0], args[1], initial=total), 1
    ),
    itertools.zip_longest: lambda args, fill: itertools.zip_longest(*args, fillvalue=fill),
}


def _never(value: object) -> bool:
    return False


def _skip(iterator: Any, count: int) -> Any:
    for _ in range(count):
        next(iterator)
    return iterator


_COUNTED = re.compile(r"count\((-?\d+)\)")


def _held_by(iterator: Any) -> list[Any]:
    """What an iterator refers to, but its type, which it does from Python 3.12 on."""
    held = gc.get_referents(iterator)
    return held[1:] if held and held[0] is type(iterator) else held


def _reduce_by_referents(iterator: Any) -> Reduced:
    """For a Python whose itertools do not pickle: by what they refer to, where that is all."""
    kind = type(iterator)
    held = _held_by(iterator)
    if kind is itertools.count:
        counted = _COUNTED.fullmatch(repr(iterator))
        if counted:
            return itertools.count, (int(counted[1]),)
        if len(held) == 2:
            return itertools.count, tuple(held)
    elif kind is itertools.repeat:
        try:
            return itertools.repeat, (held[0], iterator.__length_hint__())
        except TypeError:
            return itertools.repeat, (held[0],)
    elif kind is itertools.pairwise:
        return _reduce_pairwise(held)
    elif kind is itertools.chain:
        if len(held) < 2:
            return itertools.chain.from_iterable, (held[0] if held else (),)
        # The iterable in hand, and the source of more of them.
        active, source = held if _ACTIVE_FIRST else reversed(held)
        return _make_itertool, (itertools.chain, (), (source, active))
    elif kind is itertools.cycle and len(held) == 2:
        source, saved = held
        return _make_itertool, (itertools.cycle, (source,), (list(saved), False))
    elif kind is itertools.cycle and len(held) == 1:
        # In a later pass. A whole turn leaves it where it was, and shows what comes.
        return itertools.cycle, ([next(iterator) for _ in held[0]],)
    elif kind is itertools.compress and len(held) == 2:
        return kind, tuple(held)  # Two iterators, whose positions are all.
    elif kind in (itertools.starmap, itertools.filterfalse) and len(held) == 2:
        return kind, _function_and_source(kind, held)
    elif kind is _batched and _BATCH_SIZE is not None and len(held) == 1:
        strict = _BATCH_STRICT is not None and bool(read_field(iterator, _BATCH_STRICT, 1))
        return _make_batched, (held[0], read_field(iterator, _BATCH_SIZE, _WORD), strict)
    elif kind is itertools.islice and not held:
        return iter, ((),)  # Used up, so it has let its source go.
    elif kind is itertools.islice and None not in _SLICE and len(held) == 1:
        first, stop, step, count = (read_field(iterator, at, _WORD) for at in _SLICE if at)
        if stop == _NO_STOP:
            return itertools.islice, (held[0], first - count, None, step)
        return itertools.islice, (held[0], max(first - count, 0), max(stop - count, 0), step)
    elif kind in _FLAGS and _FLAGS[kind] is not None and len(held) == 2:
        over = bool(read_field(iterator, _FLAGS[kind] or 0, _WORD))
        return _make_itertool, (kind, _function_and_source(kind, held), over)
    refuse(
        iterator,
        f"an itertools.{kind.__name__} does not say where it is on this Python",
        "keep what it iterates over and the position in it",
    )


def _function_and_source(kind: Any, held: list[Any]) -> tuple[Any, ...]:
    function_first = _held_by(kind(bool, ()))[0] is bool
    return tuple(held if function_first else reversed(held))


def _make_batched(source: Any, size: int, strict: bool) -> Any:
    return _batched(source, size, strict=strict) if strict else _batched(source, size)


_WORD = struct.calcsize("n")
_batched: Any = getattr(itertools, "batched", None)
"""From Python 3.12 on; from 3.13 on it can be strict."""
_BATCH_SIZE: int | None = None
_BATCH_STRICT: int | None = None
if sys.version_info >= (3, 12):
    _BATCH_SIZE = find_field([(_batched((), 3), 3), (_batched((), 70), 70)], _WORD)
if sys.version_info >= (3, 13):
    _BATCH_STRICT = find_field([(_batched((), 3), 0), (_batched((), 3, strict=True), 1)], 1)
    if _BATCH_STRICT is None:
        _BATCH_SIZE = None
_NO_STOP = 256**_WORD - 1


def _ended() -> Any:
    iterator = itertools.takewhile(bool, [0])
    next(iterator, None)
    return iterator


def _started(kind: Any, *args: Any, steps: int = 1) -> Any:
    return _skip(kind(*args), steps)


_SLICE = tuple(
    find_field(
        [
            (itertools.islice(range(99), 3, 50, 2), fresh),
            (_started(itertools.islice, range(99), 5, 60, 7), begun),
        ],
        _WORD,
    )
    for fresh, begun in ((3, 12), (50, 60), (2, 7), (0, 6))
)
"""Where an islice keeps the index of its next item, its end, its step, and how many it took."""
_FLAGS: dict[Any, int | None] = {
    itertools.takewhile: find_field(
        [(_started(itertools.takewhile, bool, [1, 0]), 0), (_ended(), 1)], _WORD
    ),
    itertools.dropwhile: find_field(
        [(itertools.dropwhile(bool, [0]), 0), (_started(itertools.dropwhile, bool, [0]), 1)], _WORD
    ),
}
"""Where these keep whether their condition has changed."""
_ACTIVE_FIRST = type(_held_by(_started(itertools.chain, [1, 2]))[0]) is type(iter([]))
_PAIRWISE_OWN = len(_held_by(itertools.pairwise((1,)))) - 1


def _reduce_pairwise(held: list[Any]) -> Reduced:
    count = len(held) - _PAIRWISE_OWN
    if count < 1:
        return itertools.pairwise, ((),)
    if count == 1:
        return itertools.pairwise, (held[0],)
    return _make_pairwise, (held[0], held[1])


def _make_pairwise(iterator: Any, previous: Any) -> Any:
    return itertools.pairwise(itertools.chain((previous,), iterator))


_tee_iterator: Any = type(itertools.tee(())[0])
_ITERTOOLS: tuple[Any, ...] = (
    *(
        value
        for name, value in vars(itertools).items()
        if isinstance(value, type) and name != "pairwise"
    ),
    itertools.pairwise,
    _tee_iterator,
    type(next(itertools.groupby("a"))[1]),
)


# --- generators and coroutines -------------------------------------------------------------------

_FLAG_VARARGS = 4
_FLAG_VARKEYWORDS = 8
_REMEDY = "keep what it iterates over and the position in it, or write it as a class with state"


def _reduce_suspendable(prefix: str) -> Reducer:
    def reduce(obj: Any) -> Reduced:
        frame = getattr(obj, f"{prefix}_frame")
        if frame is None:
            kind = "async generator" if prefix == "ag" else type(obj).__name__
            return _make_finished, (kind, obj.__name__, obj.__qualname__)
        if getattr(obj, f"{prefix}_running") or not _is_new(obj, prefix, frame):
            refuse(
                obj,
                f"execution is suspended{position_of(obj)}, and a frame cannot travel",
                _REMEDY,
            )
        code = getattr(obj, f"{prefix}_code")
        function = next(
            (
                r
                for r in gc.get_referents(obj)
                if isinstance(r, types.FunctionType) and r.__code__ is code
            ),
            None,
        )
        if function is None:
            refuse(obj, f"what it was made from{position_of(obj)} cannot be told", _REMEDY)
        args, named = _arguments_of(code, frame.f_locals)
        return _make_suspendable, (function, args, named, obj.__name__, obj.__qualname__)

    return reduce


def _is_new(obj: Any, prefix: str, frame: types.FrameType) -> bool:
    suspended = getattr(obj, f"{prefix}_suspended", None)
    if suspended is not None:
        return not suspended
    # Python 3.11 does not tell for asynchronous generators; there, one that is new stands at the
    # instruction that made it.
    code: types.CodeType = getattr(obj, f"{prefix}_code")
    return code.co_code[frame.f_lasti] == opcode.opmap["RETURN_GENERATOR"]


def _arguments_of(code: types.CodeType, values: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    names = code.co_varnames
    count = code.co_argcount
    keywords = names[count : count + code.co_kwonlyargcount]
    at = count + code.co_kwonlyargcount
    args = tuple(values[name] for name in names[:count])
    named = {name: values[name] for name in keywords}
    if code.co_flags & _FLAG_VARARGS:
        args += tuple(values[names[at]])
        at += 1
    if code.co_flags & _FLAG_VARKEYWORDS:
        named.update(values[names[at]])
    return args, named


def _make_suspendable(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    named: dict[str, Any],
    name: str,
    qualname: str,
) -> Any:
    made = function(*args, **named)
    made.__name__, made.__qualname__ = name, qualname
    return made


def _make_finished(kind: str, name: str, qualname: str) -> Any:
    made: Any
    if kind == "coroutine":
        made = _nothing_awaited()
        made.close()
    elif kind == "async generator":
        made = _nothing_given()
        try:
            made.__anext__().send(None)
        except StopAsyncIteration:
            pass
    else:
        made = _nothing_yielded()
        next(made, None)
    made.__name__, made.__qualname__ = name, qualname
    return made


def _nothing_yielded() -> Iterator[None]:
    yield from ()


async def _nothing_awaited() -> None: ...


async def _nothing_given() -> Any:
    nothing: tuple[object, ...] = ()
    for item in nothing:
        yield item


# --- readers, writers and scanners of text -------------------------------------------------------

_Dialect: Any = type(csv.reader(()).dialect)
_DIALECT = (
    "delimiter",
    "doublequote",
    "escapechar",
    "lineterminator",
    "quotechar",
    "quoting",
    "skipinitialspace",
    "strict",
)


def _reduce_dialect(dialect: Any) -> Reduced:
    return _make_dialect, ({name: getattr(dialect, name) for name in _DIALECT},)


def _make_dialect(options: dict[str, Any]) -> Any:
    return csv.reader((), **options).dialect


def _reduce_csv_reader(reader: Any) -> Reduced:
    # Between two rows it holds nothing but its source and the number of lines.
    source = next(
        (r for r in gc.get_referents(reader) if hasattr(type(r), "__next__")),
        None,
    )
    if source is None:
        refuse(reader, "its source cannot be told", "keep the rows, or the file and its position")
    if isinstance(source, _Lines):
        source = source.source
    return _make_csv_reader, (source, reader.dialect, reader.line_num)


class _Lines:
    """Lines of a source, after as many empty ones as were read elsewhere: readers count them."""

    def __init__(self, source: Any, count: int) -> None:
        self.source = source
        self._before = count

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> Any:
        if self._before:
            self._before -= 1
            return ""
        return next(self.source)


def _make_csv_reader(source: Any, dialect: Any, line_num: int) -> Any:
    lines = _Lines(source, line_num)
    reader = csv.reader(lines, dialect)
    for _ in range(line_num):
        next(reader)
    return reader


def _reduce_csv_writer(writer: Any) -> Reduced:
    write = next(
        (r for r in gc.get_referents(writer) if callable(r) and not isinstance(r, type)), None
    )
    if write is None:
        refuse(writer, "what it writes to cannot be told", "keep the file, and make it again")
    return _make_csv_writer, (write, writer.dialect)


def _make_csv_writer(write: Callable[[str], Any], dialect: Any) -> Any:
    return csv.writer(types.SimpleNamespace(write=write), dialect)


def _reduce_match(match: re.Match[Any]) -> Reduced:
    return _make_match, (match.re, match.string, match.pos, match.endpos, match.regs)


def _make_match(pattern: re.Pattern[Any], text: Any, first: int, last: int, regs: Any) -> Any:
    made = _match_again(pattern, text, first, last, regs)
    if made is None:
        raise LoadFailed("a match of a regular expression is found no more in its text")
    return made


def _match_again(pattern: Any, text: Any, first: int, last: int, regs: Any) -> Any:
    for find in (pattern.match, pattern.fullmatch, pattern.search):
        made = find(text, first, last)
        if made is not None and made.regs == regs:
            return made
    scanner = pattern.scanner(text, first, last)
    while (made := scanner.search()) is not None:
        if made.regs == regs:
            return made
    return None


def _reduce_lexicon_scanner(scanner: Any) -> Reduced:
    state = {name: value for name, value in vars(scanner).items() if name != "scanner"}
    return _make_lexicon_scanner, (type(scanner), scanner.lexicon, scanner.scanner.flags), state


def _make_lexicon_scanner(cls: Any, lexicon: Any, flags: int) -> Any:
    made = cls.__new__(cls)
    re.Scanner.__init__(made, lexicon, flags)  # type: ignore[attr-defined]
    return made


def _reduce_struct_iterator(iterator: Any) -> Reduced:
    # It refers to the compiled format and to what it unpacks; the rest follows from what is left.
    held = gc.get_referents(iterator)
    form = next((r for r in held if isinstance(r, struct.Struct)), None)
    source = next((r for r in held if not isinstance(r, struct.Struct | type)), None)
    if form is None or source is None:
        return iter, ((),)
    consumed = memoryview(source).nbytes // form.size - iterator.__length_hint__()
    return _make_struct_iterator, (form, source, consumed)


def _make_struct_iterator(form: struct.Struct, source: Any, consumed: int) -> Any:
    return _skip(form.iter_unpack(source), consumed)


def _bytes_left(count: int) -> Any:
    return _skip(iter(memoryview(b"0123456789")), count)


_MemoryIterator: Any = type(_bytes_left(0))
_MEMORY_INDEX = find_field([(_bytes_left(n), n) for n in range(5)], _WORD)
"""Where an iterator over a memoryview keeps its position, which it does not tell."""


def _reduce_memory_iterator(iterator: Any) -> Reduced:
    view = next((r for r in gc.get_referents(iterator) if isinstance(r, memoryview)), None)
    if view is None:
        return iter, ((),)
    if _MEMORY_INDEX is None:
        refuse(iterator, "it does not say where it is", "keep the view and the position in it")
    return _make_memory_iterator, (view, read_field(iterator, _MEMORY_INDEX, _WORD))


def _make_memory_iterator(view: memoryview, position: int) -> Any:
    return _skip(iter(view), position)


_KeyWrapper: Any = type(functools.cmp_to_key(lambda a, b: 0))


def _reduce_key_wrapper(key: Any) -> Reduced:
    compare, *wrapped = (r for r in gc.get_referents(key) if r is not _KeyWrapper)
    return _make_key_wrapper, (compare, tuple(wrapped))


def _make_key_wrapper(compare: Any, wrapped: tuple[Any, ...]) -> Any:
    made: Any = functools.cmp_to_key(compare)
    return made(*wrapped) if wrapped else made


_JsonScanner: Any = json.scanner.c_make_scanner  # type: ignore[attr-defined]
_JSON = ("strict", "object_hook", "object_pairs_hook", "parse_float", "parse_int", "parse_constant")


def _reduce_json_scanner(scanner: Any) -> Reduced:
    return _make_json_scanner, ({name: getattr(scanner, name) for name in _JSON},)


def _make_json_scanner(options: dict[str, Any]) -> Any:
    return _JsonScanner(types.SimpleNamespace(**options))


def _register_all() -> None:
    empty: dict[Any, Any] = {}
    reader: Any = type(csv.reader(()))
    writer: Any = type(csv.writer(types.SimpleNamespace(write=print)))
    for kind in ("keys", "values", "items"):
        view = getattr(empty, kind)()
        REDUCERS[type(iter(view))] = _reduce_dict_iterator(kind, backwards=False)
        REDUCERS[type(reversed(view))] = _reduce_dict_iterator(kind, backwards=True)
    for iterator in _ITERTOOLS:
        REDUCERS[iterator] = _reduce_itertool
    REDUCERS.update(
        {
            types.GeneratorType: _reduce_suspendable("gi"),
            types.CoroutineType: _reduce_suspendable("cr"),
            types.AsyncGeneratorType: _reduce_suspendable("ag"),
            reader: _reduce_csv_reader,
            writer: _reduce_csv_writer,
            _Dialect: _reduce_dialect,
            re.Match: _reduce_match,
            re.Scanner: _reduce_lexicon_scanner,  # type: ignore[attr-defined]
            type(re.compile("").scanner("")): refuses(  # type: ignore[attr-defined]
                "a scanner does not say where it is",
                "keep the pattern, the text and the position in it",
            ),
            type(struct.iter_unpack("b", b"")): _reduce_struct_iterator,
            _KeyWrapper: _reduce_key_wrapper,
            _MemoryIterator: _reduce_memory_iterator,
        }
    )
    if isinstance(_JsonScanner, type):
        REDUCERS[_JsonScanner] = _reduce_json_scanner


_register_all()
