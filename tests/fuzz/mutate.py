"""Changed copies of valid inputs, from a seed: bytes that are damaged, and msgpack that is not.

Damaged bytes try the outermost layer of a parser and seldom get past it. So inputs that are msgpack
are also taken apart, changed in one value (also inside of byte strings that hold msgpack
themselves) and put together again: every layer sees well-formed input with absurd content.
"""

from __future__ import annotations

import copy
import random
from typing import Any, Final

import msgspec

SIZE_MAX: Final = 1 << 16
"""Inputs are cut to this; parsers that need more to fail have a length field that says so."""

INTEGERS: Final = (
    0, 1, 2, 3, 7, 8, 31, 100, 127, 128, 255, 256, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -1, -2, -128,
    -(1 << 31), -(1 << 63),
)  # fmt: skip
"""Where widths and signs end."""

TEXTS: Final = (
    "",
    "@",
    "|",
    "x|1|1",
    "a|\u00b2|1",
    "srv/\u00b2",
    "srv/1",
    "\ud7ff",
    "\x00",
    "a" * 300,
)
WIDTHS: Final = (1, 2, 4, 8)


def damaged(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """`data` with one to four changes that know nothing of its form."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(8):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[min(at, len(out) - 1)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
            case 2:
                width = rng.choice(WIDTHS)
                number = rng.choice(INTEGERS) & ((1 << 8 * width) - 1)
                out[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 3:
                out[at:at] = rng.randbytes(rng.choice((1, 1, 2, 8)))
            case 4:
                del out[at : at + rng.choice((1, 1, 2, 4, 16))]
            case 5:
                del out[at:]
            case 6:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                out[at:] = other[start:]
            case _:
                end = at + rng.choice((1, 4, 16, 64))
                out[at:at] = out[at:end] * rng.choice((1, 1, 2, 8))
    return bytes(out[:SIZE_MAX])


def _value(old: Any, pool: list[Any], rng: random.Random) -> Any:
    """Another value in the place of `old`; most often one of its own kind."""
    if type(old) is bytes and rng.random() < 0.5:
        inner = restructured(old, pool, rng)
        if inner is not None:
            return inner
    if rng.random() < 0.15:
        return rng.choice((None, True, 0.5, float("nan"), [], {}, b"\x80", "", 0, [[[[[]]]]]))
    if type(old) is int and rng.random() < 0.5:
        return old + rng.choice((-2, -1, 1, 2))
    if type(old) is int:
        return rng.choice(INTEGERS)
    if type(old) is str and rng.random() < 0.3:
        return rng.choice(TEXTS)
    if type(old) is bytes:
        return damaged(old, [old], rng)
    same = [value for value in pool if type(value) is type(old)]
    # A copy: it may be the very container that it is put into.
    return copy.deepcopy(rng.choice(same or pool))


def _places(tree: Any, found: list[tuple[Any, Any]], pool: list[Any]) -> None:
    """Every (container, key) in a tree, and every value."""
    items = enumerate(tree) if type(tree) is list else tree.items() if type(tree) is dict else ()
    for key, value in list(items):
        found.append((tree, key))
        pool.append(value)
        _places(value, found, pool)


def restructured(data: bytes, pool: list[Any], rng: random.Random) -> bytes | None:
    """`data` as msgpack with one to three values changed; None if it is no array or map.

    Args:
        data: Hopefully msgpack.
        pool: Values of other inputs, to be mixed in; gets those of this one.
        rng: Where chance comes from.
    """
    try:
        tree = msgspec.msgpack.decode(data, strict=False)
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError):
        return None
    if type(tree) not in (list, dict):
        return None
    for _ in range(rng.choice((1, 1, 2, 3))):
        found: list[tuple[Any, Any]] = []
        own: list[Any] = []
        _places(tree, found, own)
        if not found:
            break
        holder, key = rng.choice(found)
        try:
            old = holder[key]
        except (KeyError, IndexError):
            continue
        whole = rng.random() < 0.3
        if whole and type(holder) is list:
            match rng.randrange(3):
                case 0:
                    del holder[key]
                case 1:
                    holder.insert(key, old)
                case _:
                    other = rng.randrange(len(holder))
                    holder[key], holder[other] = holder[other], holder[key]
        else:
            holder[key] = _value(old, [*own, *pool], rng)
    try:
        return msgspec.msgpack.encode(tree)[:SIZE_MAX]
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, TypeError):
        return None


class Mutator:
    """Makes inputs out of a target's seeds; the same seed gives the same inputs."""

    def __init__(self, seeds: list[bytes], seed: int) -> None:
        self.corpus = list(seeds)
        self._rng = random.Random(seed)
        self._pool: list[Any] = []
        for data in seeds:
            try:
                _places([msgspec.msgpack.decode(data)], [], self._pool)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                continue

    def next(self) -> bytes:
        """One more input."""
        return self.changed(self._rng.choice(self.corpus))

    def changed(self, data: bytes) -> bytes:
        """A changed copy of `data`."""
        rng = self._rng
        if rng.random() < 0.7:
            made = restructured(data, self._pool, rng)
            if made is not None:
                return made
        return damaged(data, self.corpus, rng)
