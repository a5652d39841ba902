"""Growth of the public API is a decision: it is written down twice."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import pathlib
import pickle
import re
import tomllib

import pytest

import migrate

ROOT = pathlib.Path(__file__).parents[2]

PUBLIC = """
LEAST_LOADED LocalCluster Node NodeOptions Ref SpawnOptions
blocking call check connect connect_sync current every server
CheckReport CheckpointInfo Current Event LinkInfo MoveProgress MoveReport NodeInfo ServerInfo
StandbyInfo
AuthError CallCycle CallError CallTimeout CheckpointError Fenced HandlerFailed InternalError
MailboxFull MigrateError MoveError MoveInDoubt MoveRolledBack NameTaken NodeNotFound NotPicklable
Outcome PeerError ReplayDiverged ResultForgotten RolledBack ServerLost ServerNotFound StaleJournal
StandbyError
TargetRefused UsageError WorkerLost
""".split()


def test_the_public_names_are_the_written_ones():
    assert sorted(migrate.__all__) == sorted(PUBLIC)
    assert len(set(migrate.__all__)) == len(migrate.__all__)


def test_every_public_name_can_be_listed_and_an_unknown_one_is_refused():
    assert set(PUBLIC) <= set(dir(migrate))
    with pytest.raises(AttributeError, match="no attribute 'Nodes'"):
        migrate.Nodes  # noqa: B018


def is_there(name: str) -> bool:
    home = migrate._LAZY.get(name)
    return home is None or importlib.util.find_spec(home) is not None


@pytest.mark.parametrize("name", [name for name in PUBLIC if is_there(name)])
def test_every_public_name_is_there_and_documented(name: str):
    value = getattr(migrate, name)

    assert value is not None
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), f"{name} has no docstring"


def test_least_loaded_pickles_as_itself():
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(migrate.LEAST_LOADED, protocol)) is migrate.LEAST_LOADED


def test_the_version_is_that_of_the_distribution_and_has_a_changelog_entry():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["name"] == "livemigrate"
    assert re.fullmatch(r"\d+\.\d+\.\d+", migrate.__version__)
    assert f"\n## {migrate.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    try:
        installed = importlib.metadata.version("livemigrate")
    except importlib.metadata.PackageNotFoundError:
        return  # Run from a working tree alone; there is nothing to compare.
    assert installed == migrate.__version__
