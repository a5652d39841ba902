"""What `migrate demo` shows while it runs: each move as it happens, and how far it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, Protocol

from migrate.reports import MoveReport


class Show(Protocol):
    """Is told what happens."""

    def begun(self, files: int, nodes: Sequence[str], servers: Sequence[str]) -> None:
        """The servers are there; feeding begins."""

    def moved(self, server: str, report: MoveReport) -> None:
        """A server has moved."""

    def killed(self, node: str, kills: int) -> None:
        """A node process was killed; so many were so far."""

    def progress(self, files: int, calls: int, casts: int) -> None:
        """So many files are done, with so many requests."""

    def comparing(self) -> None:
        """All is sent; the comparison begins."""


class Quiet:
    """Shows nothing."""

    def begun(self, files: int, nodes: Sequence[str], servers: Sequence[str]) -> None:
        """See `Show`."""

    def moved(self, server: str, report: MoveReport) -> None:
        """See `Show`."""

    def killed(self, node: str, kills: int) -> None:
        """See `Show`."""

    def progress(self, files: int, calls: int, casts: int) -> None:
        """See `Show`."""

    def comparing(self) -> None:
        """See `Show`."""


class Lines:
    """Writes a line for each move, and one for each twentieth of the files."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._moves = 0
        self._files = 0
        self._step = 1
        self._started = time.monotonic()

    def begun(self, files: int, nodes: Sequence[str], servers: Sequence[str]) -> None:
        """See `Show`."""
        self._started = time.monotonic()
        self._files = files
        self._step = max(1, files // 20)
        self.write(f"{len(servers)} servers on nodes {', '.join(nodes)}; {files} files to index")

    def moved(self, server: str, report: MoveReport) -> None:
        """See `Show`."""
        self._moves += 1
        self.write(move_line(self._moves, time.monotonic() - self._started, server, report))

    def killed(self, node: str, kills: int) -> None:
        """See `Show`."""
        self.write(f"kill {kills}: node {node}")

    def progress(self, files: int, calls: int, casts: int) -> None:
        """See `Show`."""
        if files % self._step == 0 or files == self._files:
            self.write(
                f"{files} of {self._files} files, {calls:,} calls, {casts:,} casts, "
                f"{self._moves:,} moves"
            )

    def comparing(self) -> None:
        """See `Show`."""
        self.write("comparing with the plain run")

    def write(self, line: str) -> None:
        """Print a line at once."""
        print(line, file=self._stream, flush=True)


class Watched(Lines):
    """The same on a terminal: the moves scroll by above a bar that tells how far it is."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = Console(file=stream, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} files"),
            TextColumn("{task.fields[requests]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task: Any = None

    def begun(self, files: int, nodes: Sequence[str], servers: Sequence[str]) -> None:
        """See `Show`."""
        self._task = self._bar.add_task("indexing", total=files, requests="")
        self._bar.start()
        super().begun(files, nodes, servers)

    def progress(self, files: int, calls: int, casts: int) -> None:
        """See `Show`."""
        requests = f"{calls:,} calls, {casts:,} casts, {self._moves:,} moves"
        self._bar.update(self._task, completed=files, requests=requests)

    def comparing(self) -> None:
        """See `Show`."""
        self._bar.update(self._task, description="comparing")

    def write(self, line: str) -> None:
        """See `Lines`."""
        self._console.print(line, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.stop()


def move_line(number: int, at_s: float, server: str, report: MoveReport) -> str:
    """One move in words."""
    # Fits into 80 columns.
    return (
        f"{at_s:6.2f} s move {number:4} {server:9} {report.source} -> {report.target} "
        f"epoch {report.epoch:3} {report.bytes_sent / 1024:6.1f} KiB "
        f"down {report.downtime_s * 1000:5.1f} ms"
    )


@contextlib.contextmanager
def shown_on(stream: IO[str], quiet: bool) -> Iterator[Show]:
    """Yield what shows progress on a stream, as fits the stream."""
    if quiet:
        yield Quiet()
    elif stream.isatty():
        watched = Watched(stream)
        try:
            yield watched
        finally:
            watched.close()
    else:
        yield Lines(stream)
