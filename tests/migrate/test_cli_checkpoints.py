"""The verbs of checkpoints on the command line."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import Result

from migrate.tools import clusters, output
from tests.migrate.test_cli import SERVERS, environment, process, run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """The folder of a user who runs a cluster of two nodes."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "run").mkdir(mode=0o700)
    (folder / "things.py").write_text(SERVERS)
    env = {**os.environ, **environment(folder)}
    with process("up", "-n", "2", "--json", env=env, cwd=folder) as up:
        json.loads(up.stdout.readline())
        yield folder


Run = Callable[..., Result]


@pytest.fixture
def migrate(home: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line as that user."""
    for name, value in environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(clusters.CLUSTER_VARIABLE, raising=False)
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    return run


def told(done: Result, code: int = output.OK) -> Any:
    """What a verb printed as JSON, if it ended as it should."""
    assert done.exit_code == code, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()][-1]


pytestmark = pytest.mark.cluster


def test_a_server_is_checkpointed_inspected_restored_and_cloned(
    migrate: Run, home: pathlib.Path
) -> None:
    spawned = told(
        migrate("spawn", "things:Counter", "5", "--name", "hits", "--on", "n1", "--json")
    )
    written = told(migrate("checkpoint", "hits", "hits.ckpt", "--json"))
    assert written["url"] == f"file://{home}/hits.ckpt"
    assert written["server"] == spawned["id"]

    shown = told(migrate("inspect", "hits.ckpt", "--verify", "--json"))
    assert (shown["server"], shown["name"], shown["cls"]) == (
        spawned["id"],
        "hits",
        "things:Counter",
    )
    assert (shown["verified"], shown["flaw"], shown["digest"]) == ("all", None, written["digest"])
    assert set(shown["attributes"]) >= {"n", "journal"}
    text = migrate("inspect", "hits.ckpt").stdout
    assert "things:Counter version 1" in text and "ATTRIBUTE" in text

    assert told(migrate("call", "hits", "incr", "--json"))["result"] == 6
    alive = migrate("restore", "hits.ckpt", "--json")
    error = told(alive, output.FAILED)["error"]
    assert (error["type"], error["flaw"], error["outcome"]) == (
        "CheckpointError",
        "alive",
        "not done",
    )
    assert "use replace=True" in alive.stderr

    replaced = told(migrate("restore", "hits.ckpt", "--replace", "--json"))
    assert (replaced["id"], replaced["node"]) == (spawned["id"], "n1")
    assert told(migrate("call", "hits", "incr", "--json"))["result"] == 6
    twin = told(migrate("fork", "hits", "--on", "n2", "--json"))
    assert twin["node"] == "n2" and twin["id"] != spawned["id"]
    assert migrate("fork", "hits").stdout.startswith("counter-")
    copy = told(migrate("restore", "hits.ckpt", "--fork", "--name", "copy", "--json"))
    assert copy["name"] == "copy"

    assert migrate("stop", "hits").exit_code == output.OK
    assert migrate("restore", "hits.ckpt", "--on", "n2").stdout.strip() == spawned["id"]
    assert told(migrate("call", "hits", "incr", "--json"))["result"] == 6


def test_again_and_again_until_told_otherwise(migrate: Run, home: pathlib.Path) -> None:
    server = told(migrate("spawn", "things:Counter", "--json"))["id"]
    url = f"file://{home}/often.ckpt"
    first = told(migrate("checkpoint", server, url, "--every", "0.1", "--keep", "2", "--json"))
    assert first["url"].startswith(url + ".")
    migrate("checkpoint", server, url, "--every", "0")
    left = list(home.glob("often.ckpt.*Z-e*"))
    assert 1 <= len(left) <= 3
    assert told(migrate("inspect", "often.ckpt", "--json"))["server"] == server


def test_a_key_of_its_own(migrate: Run, home: pathlib.Path) -> None:
    (home / "key").write_text("a key of more than sixteen bytes\n")
    (home / "short").write_text("short")
    server = told(migrate("spawn", "things:Counter", "--json"))["id"]
    assert migrate("checkpoint", server, "own.ckpt", "--key-file", "key").exit_code == output.OK
    shown = told(migrate("inspect", "own.ckpt", "--json"), output.FAILED)
    assert shown["flaw"] == "wrong key" and shown["verified"] == "no"
    assert told(migrate("inspect", "own.ckpt", "--key-file", "key", "--json"))["flaw"] is None
    for words in (["--key-file", "short"], ["--key-file", "missing"]):
        assert migrate("inspect", "own.ckpt", *words).exit_code == output.USAGE
    assert told(migrate("restore", "own.ckpt", "--fork", "--key-file", "key", "--json"))["id"]


def test_what_is_no_checkpoint_is_told_without_a_cluster(
    migrate: Run, home: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (home / "bad.ckpt").write_bytes(b"\x80\x05K\x01.")
    error = told(migrate("inspect", "bad.ckpt", "--json"), output.FAILED)["error"]
    assert error["flaw"] == "foreign" and error["url"] == f"file://{home}/bad.ckpt"
    assert (
        told(migrate("inspect", "no.ckpt", "--json"), output.FAILED)["error"]["flaw"] == "missing"
    )
    assert migrate("inspect", "ftp://x/y").exit_code == output.USAGE
    assert migrate("restore", "x", "--replace", "--fork").exit_code == output.USAGE


def test_a_changed_file_is_seen_only_by_who_reads_all_of_it(
    migrate: Run, home: pathlib.Path
) -> None:
    server = told(migrate("spawn", "things:Counter", "--json"))["id"]
    migrate("checkpoint", server, "changed.ckpt")
    path = home / "changed.ckpt"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert told(migrate("inspect", "changed.ckpt", "--json"))["verified"] == "header"
    shown = told(migrate("inspect", "changed.ckpt", "--verify", "--json"), output.FAILED)
    assert shown["flaw"] == "damaged"
    assert migrate("restore", "changed.ckpt", "--fork").exit_code == output.FAILED
