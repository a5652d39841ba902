"""Options of the simulator: which seeds are run."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("simulator")
    group.addoption("--seed", type=int, default=None, help="replay this one seed")
    group.addoption("--seeds", type=int, default=None, help="how many seeds (default 300)")
