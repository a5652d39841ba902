"""Classes of the benchmark of capture, in a module that can be imported."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Order:
    number: int
    name: str
    price: float
    open: bool


@dataclasses.dataclass(frozen=True)
class Fill:
    number: int
    name: str
    price: float
    open: bool


class Server:
    """A state of about 1 KiB."""

    def __init__(self) -> None:
        self.counts = {f"key-{n}": n for n in range(40)}
        self.names = [f"name-{n}" for n in range(30)]
        self.total = 3
