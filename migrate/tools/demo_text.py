"""The text of the demo: which files, how they are tokenised, and the plain run to compare with.

As a program it does the work that holds the interpreter for long, in a process of its own:
`python -m migrate.tools.demo_text worker` tokenises the files that stdin names, and `... plain`
builds the whole index as a program without servers would.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

LEFT_OUT: Final = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
)
"""Folders, by name, whose files are not indexed; nor is what lies below them."""

Index = Mapping[str, Sequence[int]]
"""For each NAME token: number of a file, occurrences there, number of the next file, ..."""


def stdlib() -> Path:
    """The folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def files(root: Path, files_max: int | None = None) -> list[str]:
    """List the files to be indexed.

    Args:
        root: The folder.
        files_max: Take at most so many, evenly chosen; None: all.

    Returns:
        Paths relative to `root`, with slashes, sorted. Folders that are links are not entered.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        here = Path(folder).relative_to(root)
        found += [(here / name).as_posix() for name in names if name.endswith(".py")]
    found.sort()
    if files_max is not None and files_max < len(found):
        found = [found[i * len(found) // files_max] for i in range(files_max)]
    return found


def count_names(path: Path) -> dict[str, int] | None:
    """Count the NAME tokens of a file, as `tokenize` finds them.

    Returns:
        Occurrences by name; None if the file does not tokenise.

    Raises:
        OSError: It cannot be read.
    """
    names: Counter[str] = Counter()
    try:
        with open(path, "rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.NAME:
                    names[token.string] += 1
    except (tokenize.TokenError, SyntaxError, UnicodeError):
        return None
    return dict(names)


def shard_of(name: str, shards: int) -> int:
    """Which of `shards` parts of the index a name belongs to; the same in every process."""
    return zlib.crc32(name.encode()) % shards


def digest(index: Index) -> str:
    """SHA-256 of an index, whatever the order in which it was built."""
    sha = hashlib.sha256()
    for name in sorted(index):
        flat = index[name]
        entries = sorted(zip(flat[::2], flat[1::2], strict=True))
        sha.update(f"{name} {entries}\n".encode())
    return sha.hexdigest()


def occurrences(index: Index) -> dict[str, int]:
    """How often each name occurs in all files together."""
    return {name: sum(flat[1::2]) for name, flat in index.items()}


# ------------------------------------------------------------------ programs


def worker(root: Path, requests: Iterable[str]) -> None:
    """Print for each path, a JSON string on a line, the names with their counts, or null."""
    for request in requests:
        print(json.dumps(count_names(root / json.loads(request))), flush=True)


def plain(root: Path, paths: Iterable[str], shards: int) -> dict[str, Any]:
    """Index files one after the other, in one process, with nothing of livemigrate.

    Returns:
        `skipped`: paths that do not tokenise; `names`: occurrences by name; `digests`: one for
        each of `shards` parts of the index.
    """
    index: dict[str, list[int]] = {}
    skipped = []
    for number, path in enumerate(paths):
        names = count_names(root / path)
        if names is None:
            skipped.append(path)
            continue
        for name, count in names.items():
            index.setdefault(name, []).extend((number, count))
    parts: list[dict[str, list[int]]] = [{} for _ in range(shards)]
    for name, flat in index.items():
        parts[shard_of(name, shards)][name] = flat
    return {
        "skipped": skipped,
        "names": occurrences(index),
        "digests": [digest(part) for part in parts],
    }


def main(arguments: list[str]) -> None:
    """Run `worker`, or `plain FILES_MAX SHARDS`."""
    if hasattr(os, "nice"):
        # The nodes come first, so that what is measured are moves, not a lack of cores.
        os.nice(5)
    root = stdlib()
    if arguments == ["worker"]:
        worker(root, sys.stdin)
    elif len(arguments) == 3 and arguments[0] == "plain":
        files_max = int(arguments[1]) or None
        print(json.dumps(plain(root, files(root, files_max), int(arguments[2]))))
    else:
        raise SystemExit("usage: worker | plain FILES_MAX SHARDS (0: all files)")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BrokenPipeError, KeyboardInterrupt):
        # Who asked is gone, or is being interrupted as well and will say so. Nothing is left
        # for the interpreter to flush into a broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
