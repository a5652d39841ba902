"""Servers whose blocking methods run in worker processes; importable there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import migrate


class Sums:
    """Has state, constants and helpers, and methods that run without the state."""

    LIMIT = 10
    shade = "of the class"

    def __init__(self, n: int = 0) -> None:
        self.n = n
        self.shade = "of the object"

    @migrate.call
    def state(self) -> tuple[int, str]:
        return self.n, self.shade

    @migrate.call
    @migrate.blocking(process=True)
    def add(self, *numbers: int, start: int = 0) -> tuple[int, int]:
        return os.getpid(), self.helper(sum(numbers, start)) + self.LIMIT

    def helper(self, n: int) -> int:
        return n

    @migrate.blocking(process=True)
    def reads(self) -> int:
        return self.n

    @migrate.blocking(process=True)
    def reads_shadowed(self) -> str:
        return self.shade

    @migrate.blocking(process=True)
    def reads_all(self) -> Any:
        return vars(self)

    @migrate.blocking(process=True)
    def writes(self) -> None:
        self.n = 5

    @migrate.blocking(process=True)
    def deletes(self) -> None:
        del self.n

    @migrate.blocking(process=True)
    def returns_self(self) -> Any:
        return self

    @migrate.blocking(process=True)
    def echo(self, value: Any) -> Any:
        return value

    @migrate.blocking(process=True)
    def raises(self, error: BaseException) -> None:
        raise error

    @migrate.blocking(process=True)
    def returns_thread(self) -> Any:
        return threading.current_thread()

    @migrate.blocking(process=True)
    def describes(self) -> tuple[str, str | None, str | None]:
        current = migrate.current()
        return current.node, current.caller, current.request_id

    @migrate.blocking(process=True)
    def calls(self, ref: Any) -> Any:
        return ref.state()

    @migrate.blocking(process=True)
    def waits(self, pid_file: str, fifo: str) -> str:
        """Say who runs it, then wait until somebody writes to a FIFO."""
        with open(pid_file + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(pid_file + ".new", pid_file)
        with open(fifo) as file:
            return file.read()

    @migrate.blocking(process=True)
    def exits(self, status: int) -> None:
        os._exit(status)

    @migrate.blocking(process=True)
    def interrupt_is_taken(self) -> int:
        """Ctrl-C's signal does nothing here, and its default to programs started here."""
        os.kill(os.getpid(), signal.SIGINT)
        code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return int(done.stdout.strip() == "False")


class Slotted:
    """Keeps its state in slots."""

    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 1

    @migrate.blocking(process=True)
    def reads(self) -> int:
        return self.n

    @migrate.blocking(process=True)
    def twice(self, n: int) -> int:
        return 2 * n


class Table(dict):  # type: ignore[type-arg]
    """Its state is the dict that it is."""

    @migrate.blocking(process=True)
    def size(self) -> int:
        return len(self)


class Ticks:
    """A timer that blocks, under a private name."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @migrate.blocking
    @migrate.every(seconds=0.02)
    def _tick(self) -> None:
        self.seen.append(threading.current_thread().name)

    def names(self) -> list[str]:
        return self.seen
