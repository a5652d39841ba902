"""Fixtures of the tests of nodes and moves."""

from __future__ import annotations

import pathlib

import pytest


@pytest.fixture
def cluster_secret(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A cluster secret of this test's own, so that the user's is neither used nor made."""
    path = tmp_path / "cluster.secret"
    monkeypatch.setenv("LIVEMIGRATE_SECRET_FILE", str(path))
    return path
