"""Options and fixtures of the tests with real processes."""

from __future__ import annotations

import pathlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--campaign",
        action="store_true",
        help="the tests of moves under load in full length (name tests/cluster to have it)",
    )


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> bool:
    """Whether the full length was asked for; False where the option is not known."""
    return bool(request.config.getoption("--campaign", default=False))


@pytest.fixture
def cluster_secret(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A cluster secret of this test's own, so that the user's is neither used nor made."""
    path = tmp_path / "cluster.secret"
    monkeypatch.setenv("LIVEMIGRATE_SECRET_FILE", str(path))
    return path
