"""The command line: what it understands, what it prints, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import grpc
import psutil
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import CallTimeout, HandlerFailed, MigrateError, MoveRolledBack, UsageError
from migrate.node import Node
from migrate.shell.directories import DirectoryUnavailable, MemoryDirectory
from migrate.tools import cli, clusters, output
from migrate.tools.clusters import Place
from migrate.tools.errors import ClusterNotFound
from rpc.v1 import api_pb2, api_pb2_grpc

ROOT = pathlib.Path(__file__).parents[2]
WAIT_S = 60.0

SERVERS = """
import pathlib
import migrate

@migrate.server
class Counter:
    def __init__(self, n: int = 0, journal: str | None = None) -> None:
        if n < 0:
            raise ValueError("a counter begins at 0 or above")
        self.n = n
        self.journal = journal

    @migrate.call
    def incr(self, by: int = 1) -> int:
        self.n += by
        return self.n

    @migrate.call
    def fail(self, why: str) -> None:
        raise ValueError(why)

    @migrate.call
    def echo(self, *args, **kwargs):
        return args, kwargs

    @migrate.call
    def say(self, text: str) -> str:
        return text

    @migrate.call
    def shout(self, chars: int) -> int:
        print("x" * chars, flush=True)
        return chars

    @migrate.call
    async def hold(self, folder: str) -> None:
        # Tell that it runs, then run until it is let go.
        import asyncio
        pathlib.Path(folder, "held").touch()
        while not pathlib.Path(folder, "let-go").exists():
            await asyncio.sleep(0.01)

    def on_stop(self) -> None:
        if self.journal:
            pathlib.Path(self.journal).write_text(str(self.n))
"""


@pytest.fixture
def env(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which nothing of this user is found, for this process and others."""
    (tmp_path / "run").mkdir(mode=0o700)
    given = environment(tmp_path)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(clusters.CLUSTER_VARIABLE, raising=False)
    return {**os.environ, **given}


def environment(home: pathlib.Path) -> dict[str, str]:
    return {
        "XDG_RUNTIME_DIR": str(home / "run"),
        "LIVEMIGRATE_SECRET_FILE": str(home / "secret"),
        "PYTHONPATH": str(ROOT),
    }


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.cli, words, prog_name="migrate")


def outcome(result: Result) -> str:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return f"{result.exit_code}: {result.stdout}{result.stderr}"


# ------------------------------------------------------------------ without a cluster


def test_an_unknown_verb_is_refused_with_what_may_have_been_meant():
    result = run("drian", "n1")

    assert result.exit_code == output.USAGE
    assert "no verb 'drian'; did you mean drain" in result.stderr


def test_a_verb_like_no_other_is_refused_with_a_pointer_to_the_help():
    assert "see `migrate --help`" in run("xyzzy").stderr


def test_the_help_lists_the_verbs_and_the_exit_statuses():
    text = run("--help").stdout

    for verb in (
        *("demo", "up", "node", "certs", "status", "ls", "info", "call", "spawn"),
        *("mv", "cordon", "uncordon", "drain", "forget", "stop"),
        *("checkpoint", "restore", "fork", "inspect"),
    ):
        assert f"\n  {verb}  " in text
    assert "3    the outcome is unknown" in text


@pytest.mark.parametrize("verb", sorted(set(cli.cli.commands) - {"bench"}))
def test_every_verb_says_what_it_does_and_prints_json_on_request(verb: str):
    words = (verb, "init") if verb == "certs" else (verb,)
    text = run(*words, "--help").stdout

    assert len(text.splitlines()) > 3
    if verb != "node":
        assert "--json" in text


def test_asking_for_help_does_not_load_grpc():
    code = "import sys, migrate.tools.cli; print('grpc' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S
    )

    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["node", "--options", "["], "Expecting value"),
        (["node", "--options", "[]"], "a JSON object is needed"),
        (["node", "--options", '{"windw": 1}'], "NodeOptions has no option windw"),
        (["node", "--options", '{"window": 0}'], "must be from 1 to 65536"),
        (["up", "-n", "0"], "0 is not in the range"),
        (["up", "--log-level", "loud"], "'loud' is not one of"),
        (["call", "hits", "incr", "--kw", "3"], "'3' is not NAME=VALUE"),
        (["call", "hits", "incr", "--kw", "a b=3"], "'a b=3' is not NAME=VALUE"),
        (["call", "hits", "incr", "--timeout", "0"], "0.0 is not in the range"),
        (["call", "hits"], "Missing argument 'METHOD'"),
        (["spawn", "things"], "'things' is not MODULE:CLASS"),
        (["spawn", "no_such_module:Counter"], "cannot be imported: ModuleNotFoundError"),
        (["spawn", "json:JSON"], "the module 'json' has no class 'JSON'"),
        (["spawn", "json:dumps"], "the module 'json' has no class 'dumps'"),
        (["spawn", "json:JSONDecoder", "--on", "a", "--near", "b"], "exclude each other"),
        (["spawn", "json:JSONDecoder", "--kw", "options=1"], "only be given by position"),
        (["mv", "hits"], "Missing argument 'SERVER...'"),
        (["replicate", "hits"], "name the nodes, or give --count"),
        (["replicate", "hits", "b", "--count", "1"], "name the nodes, or give --count"),
        (["replicate", "hits", "--count", "17"], "17 is not in the range 0<=x<=16"),
        (["replicate", "hits", "b", "--mode", "half"], "'half' is not one of 'sync', 'async'"),
    ],
)
def test_a_wrong_command_line_is_explained(env: dict[str, str], words: list[str], complaint: str):
    result = run(*words)

    assert result.exit_code == output.USAGE, outcome(result)
    assert complaint in " ".join(result.stderr.split())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(json_values),
    st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True), json_values),
)
def test_arguments_that_are_json_reach_the_call_as_their_values(
    values: list[Any], named: dict[str, Any]
):
    words = [json.dumps(value) for value in values]
    pairs = [f"{name}={json.dumps(value)}" for name, value in named.items()]

    assert cli._arguments(words, pairs) == (values, named)


@pytest.mark.parametrize("word", ["hello", "", "NaN", "-Infinity", "{", "1.2.3", "[" * 100_000])
def test_arguments_that_are_not_json_are_strings(word: str):
    assert cli._arguments([word], []) == ([word], {})


@given(st.from_regex(r"-\.?[0-9][a-z0-9.-]*", fullmatch=True))
def test_what_looks_like_a_negative_number_is_an_argument(word: str):
    seen: list[str] = []

    @click.command(cls=cli.TakesNumbers)
    @click.argument("words", nargs=-1)
    @click.option("--flag", is_flag=True)
    def command(words: tuple[str, ...], flag: bool) -> None:
        assert flag
        seen.extend(map(cli.TakesNumbers.plain, words))

    result = CliRunner().invoke(command, ["a", word, "--flag"])

    assert result.exit_code == 0, result.output
    assert seen == ["a", word]


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.binary()
        | st.just(object())
        | st.complex_numbers()
        | st.frozensets(st.integers() | st.text()),
        lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.integers(), inner),
        max_leaves=8,
    )
)
def test_every_reply_can_be_printed_as_json(value: Any):
    json.dumps(output.json_value(value), allow_nan=False)


def test_what_json_can_hold_is_printed_as_it_is():
    value = {"a": [1, 2.5, None, True, "x"], "b": {}}

    assert output.json_value(value) == value
    assert output.json_value(math.inf) == "inf"


@pytest.mark.parametrize(
    ("error", "code", "advice"),
    [
        (MoveRolledBack("m"), output.FAILED, "not done"),
        (CallTimeout("m"), output.UNKNOWN, "look before you repeat it"),
        (HandlerFailed("m"), output.RAISED, "it was carried out"),
        (ClusterNotFound("m"), output.UNREACHABLE, "not done"),
        (KeyError("m"), output.RAISED, "it was carried out"),
    ],
)
def test_an_error_ends_in_the_status_of_its_outcome_and_says_so(
    error: Exception, code: int, advice: str, capsys: pytest.CaptureFixture[str]
):
    assert output.fail(error, as_json=True) == code

    told = capsys.readouterr()
    assert advice in told.err
    assert "Traceback" not in told.err
    assert json.loads(told.out)["error"]["exit_status"] == code
    assert json.loads(told.out)["error"]["type"] == type(error).__name__


# ------------------------------------------------------------------ finding a cluster


def test_without_a_cluster_it_is_said_how_to_start_one(env: dict[str, str]):
    result = run("status", "--json")

    assert result.exit_code == output.UNREACHABLE
    assert "no cluster named 'default' runs here (none was started)" in result.stderr
    assert "Start one with `migrate up`" in result.stderr
    assert json.loads(result.stdout)["error"]["outcome"] == "not done"


def test_an_address_where_nobody_listens_is_named(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(clusters, "CONNECT_S", 0.2)

    result = run("ls", "--cluster", "127.0.0.1:1")

    assert result.exit_code == output.UNREACHABLE
    assert "no node could be reached at 127.0.0.1:1" in result.stderr


@pytest.mark.parametrize("name", ["../x", ".x", "a/b", "", "x" * 65, "a b"])
def test_a_cluster_cannot_have_a_name_that_leads_out_of_the_folder(env: dict[str, str], name: str):
    place = Place(name, ("127.0.0.1:1",))

    with pytest.raises(UsageError, match="cannot name a cluster"), clusters.published(place):
        raise AssertionError("it was published")


def test_a_published_cluster_is_found_by_its_name_and_by_the_variable(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    place = Place("a", ("127.0.0.1:1", "127.0.0.1:2"), "/s", "sqlite:////d", os.getpid())

    with clusters.published(place):
        assert clusters.find("a") == place
        monkeypatch.setenv(clusters.CLUSTER_VARIABLE, "a")
        assert clusters.find(None) == place
        with pytest.raises(ClusterNotFound, match="up are: a"):
            clusters.find("b")
    with pytest.raises(ClusterNotFound, match="none was started"):
        clusters.find("a")


def test_a_name_in_use_is_refused_and_its_owner_stays_published(env: dict[str, str]):
    place = Place("a", ("127.0.0.1:1",), "/s", "", os.getpid())

    with clusters.published(place):
        with pytest.raises(UsageError, match="is up already"), clusters.published(place):
            raise AssertionError("it was published twice")
        assert clusters.find("a") == place


def test_what_a_dead_process_left_behind_is_not_found_and_is_replaced(env: dict[str, str]):
    leave = (
        "import os; from migrate.tools import clusters as c\n"
        "with c.published(c.Place('a', ('127.0.0.1:1',), '/s', '', os.getpid())): os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", leave], env=env, timeout=WAIT_S, check=True)
    assert (clusters.runtime_folder() / "a.json").exists()

    with pytest.raises(ClusterNotFound, match="is gone"):
        clusters.find("a")

    place = Place("a", ("127.0.0.1:2",), "/s", "", os.getpid())
    with clusters.published(place):
        assert clusters.find("a") == place


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": "a", "addresses": 3}', "\xff"])
def test_a_damaged_file_is_named(env: dict[str, str], text: str):
    path = clusters.runtime_folder() / "a.json"
    path.write_bytes(text.encode("latin-1"))

    with pytest.raises(UsageError, match=r"a\.json is damaged"):
        clusters.find("a")
    assert run("ls", "--cluster", "a").exit_code == output.FAILED


def test_a_folder_that_others_can_enter_is_refused(env: dict[str, str]):
    folder = clusters.runtime_folder()
    folder.chmod(0o755)

    with pytest.raises(UsageError, match="mode 700"):
        clusters.runtime_folder()


def test_a_folder_that_is_a_link_is_refused(env: dict[str, str], tmp_path: pathlib.Path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "run" / "livemigrate").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UsageError, match="must be a folder"):
        clusters.runtime_folder()


def test_without_a_runtime_folder_of_the_system_one_is_made_for_this_user_alone(
    env: dict[str, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(clusters.tempfile, "gettempdir", lambda: str(tmp_path))

    folder = clusters.runtime_folder()

    assert folder == tmp_path / f"livemigrate-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


# ------------------------------------------------------------------ the verbs, on a cluster


# As from a terminal: the background job of a shell would ignore SIGINT.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from migrate.tools.cli import main; main()"
)


@contextlib.contextmanager
def process(*words: str, env: dict[str, str], cwd: pathlib.Path, **more: Any) -> Iterator[Any]:
    """Run a `migrate` of its own; at the end it is stopped, and what is left of it killed."""
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )
    try:
        yield started
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(10)
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(started.pid).children(recursive=True):
                child.kill()
        started.kill()
        started.communicate()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[pathlib.Path, Any]]:
    """A folder with server classes, and what `migrate up` in it has printed."""
    home = tmp_path_factory.mktemp("cluster")
    (home / "run").mkdir(mode=0o700)
    (home / "things.py").write_text(SERVERS)
    env = {**os.environ, **environment(home)}
    with process("up", "-n", "2", "--json", env=env, cwd=home) as up:
        yield home, json.loads(up.stdout.readline())


@pytest.fixture
def verb(
    cluster: tuple[pathlib.Path, Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Run a verb with --json on the cluster, which has no servers before and after the test."""
    home, _ = cluster
    for name, value in environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(clusters.CLUSTER_VARIABLE, raising=False)
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))

    def verb(*words: str, code: int = 0) -> Any:
        result = run(*words, "--json")
        assert result.exit_code == code, outcome(result)
        if code:
            assert result.stderr.startswith("migrate: "), result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()][-1]

    yield verb
    for node in ("n1", "n2"):
        verb("uncordon", node)
    if servers := [info["id"] for info in verb("ls")]:
        verb("stop", *servers)


pytestmark = pytest.mark.cluster


def test_up_tells_its_nodes_and_status_finds_them(
    verb: Callable[..., Any], cluster: tuple[pathlib.Path, Any]
):
    _, told = cluster

    status = verb("status")

    assert status["cluster"] == told["cluster"] == "default"
    assert [(n["name"], n["address"], n["pid"]) for n in status["nodes"]] == [
        (n["name"], n["address"], n["pid"]) for n in told["nodes"]
    ]
    assert status["silent"] == []
    assert verb("status", "--cluster", told["nodes"][1]["address"])["servers"] == 0


def test_spawn_call_move_and_stop_a_server_by_its_name(verb: Callable[..., Any]):
    spawned = verb("spawn", "things:Counter", "5", "--name", "hits", "--on", "n1")
    assert spawned["node"] == "n1"
    assert verb("call", "hits", "incr", "-3")["result"] == 2
    assert verb("call", "hits", "incr", "--kw", "by=4")["result"] == 6
    assert verb("call", "hits", "incr", "--cast") == {
        "server": "hits",
        "method": "incr",
        "cast": True,
        "result": None,
    }

    (move,) = verb("mv", "hits", "n2")

    assert (move["source"], move["target"], move["epoch"]) == ("n1", "n2", 2)
    assert verb("info", "hits")["node"] == "n2"
    assert verb("call", "hits", "incr")["result"] == 8
    assert [(i["name"], i["id"]) for i in verb("ls")] == [("hits", spawned["id"])]
    assert verb("stop", "hits") == {"stopped": [spawned["id"]]}
    assert verb("ls") == []


def test_a_server_is_found_by_its_id_and_by_the_beginning_of_it(verb: Callable[..., Any]):
    first = verb("spawn", "things:Counter")["id"]
    assert verb("call", first, "incr")["result"] == 1
    assert verb("call", "counter", "incr")["result"] == 2
    verb("spawn", "things:Counter")

    error = verb("call", "counter", "incr", code=output.FAILED)["error"]

    assert "the ids of 2 servers begin with 'counter'" in error["message"]


def test_spawn_follows_near_and_without_a_wish_goes_where_there_is_less_to_do(
    verb: Callable[..., Any],
):
    verb("spawn", "things:Counter", "--name", "a", "--on", "n2")

    assert verb("spawn", "things:Counter", "--near", "a")["node"] == "n2"
    assert verb("spawn", "things:Counter", "--on", "n1")["node"] == "n1"
    verb("cordon", "n2")
    assert verb("spawn", "things:Counter")["node"] == "n1"


def test_what_a_constructor_raises_leaves_no_server_and_says_that_nothing_was_done(
    verb: Callable[..., Any],
):
    error = verb("spawn", "things:Counter", "-1", code=output.FAILED)["error"]

    assert error["type"] == "ValueError"
    assert error["outcome"] == "not done"
    assert verb("ls") == []


def test_a_taken_name_is_refused(verb: Callable[..., Any]):
    verb("spawn", "things:Counter", "--name", "hits")

    error = verb("spawn", "things:Counter", "--name", "hits", code=output.FAILED)["error"]

    assert error["type"] == "NameTaken"


def test_what_a_handler_raises_is_told_with_its_traceback_and_that_it_ran(
    verb: Callable[..., Any],
):
    verb("spawn", "things:Counter", "--name", "hits")

    error = verb("call", "hits", "fail", "so it is", code=output.RAISED)["error"]

    assert (error["type"], error["message"]) == ("ValueError", "so it is")
    told = run("call", "hits", "fail", "so it is").stderr
    assert "it raised ValueError: so it is" in told
    assert "in fail" in told


def test_a_call_without_an_answer_in_time_ends_in_unknown(
    verb: Callable[..., Any], tmp_path: pathlib.Path
):
    verb("spawn", "things:Counter", "--name", "slow")

    words = ["call", "slow", "hold", str(tmp_path), "--timeout", "0.2"]
    error = verb(*words, code=output.UNKNOWN)["error"]

    assert error["type"] == "CallTimeout"
    (tmp_path / "let-go").touch()
    assert verb("call", "slow", "incr")["result"] == 1


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        (["call", "hitz", "incr"], "ServerNotFound", "did you mean hits?"),
        (["call", "zzz", "incr"], "ServerNotFound", "`migrate ls` lists the servers"),
        (["call", "hits", "icnr"], "UsageError", "did you mean 'incr'?"),
        (["call", "hits", "_x"], "UsageError", "has no method '_x'"),
        (["info", "hitz"], "ServerNotFound", "did you mean hits?"),
        (["stop", "hitz"], "ServerNotFound", "did you mean hits?"),
        (["mv", "hits", "n3"], "NodeNotFound", "known are: n1, n2"),
        (["mv", "hits", "n1"], "TargetRefused", "is on node n1 already"),
        (["cordon", "n3"], "NodeNotFound", "known are: n1, n2"),
        (["drain", "n3"], "NodeNotFound", "known are: n1, n2"),
        (["ls", "--node", "n3"], "NodeNotFound", "known are: n1, n2"),
        (["spawn", "things:Counter", "--on", "n3"], "NodeNotFound", "known are: n1, n2"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_happens(
    verb: Callable[..., Any], words: list[str], kind: str, text: str
):
    verb("spawn", "things:Counter", "--name", "hits", "--on", "n1")

    error = verb(*words, code=output.FAILED)["error"]

    assert error["type"] == kind
    assert text in error["message"]
    assert verb("call", "hits", "incr")["result"] == 1


def test_of_several_moves_those_that_can_be_made_are_made(verb: Callable[..., Any]):
    for name in ("a", "b"):
        verb("spawn", "things:Counter", "--name", name, "--on", "n1")

    result = run("mv", "a", "nobody", "b", "n2", "--json")

    assert result.exit_code == output.FAILED
    moves, error = map(json.loads, result.stdout.splitlines())
    assert [(m["server"], m["target"]) for m in moves] == [("a", "n2"), ("b", "n2")]
    assert error["error"]["type"] == "ServerNotFound"


def test_drain_empties_a_node_and_uncordon_opens_it_again(verb: Callable[..., Any]):
    for _ in range(3):
        verb("spawn", "things:Counter", "--on", "n1")

    drained = verb("drain", "n1")

    assert [(m["source"], m["target"]) for m in drained["moves"]] == [("n1", "n2")] * 3
    assert "drained" in run("status").stdout
    assert verb("spawn", "things:Counter", "--on", "n1", code=output.FAILED)["error"]["type"] == (
        "TargetRefused"
    )
    assert verb("uncordon", "n1") == {"node": "n1", "cordoned": False}
    assert verb("spawn", "things:Counter", "--on", "n1")["node"] == "n1"


def test_a_server_gets_standbys_and_info_tells_of_them(verb: Callable[..., Any]):
    verb("spawn", "things:Counter", "--name", "hits", "--on", "n1", "--standbys", "1")
    told = verb("info", "hits")
    assert (told["standbys"], told["mode"]) == (["n2"], "sync")
    assert told["followers"] == [{"node": "n2", "state": "in sync", "lag": 0}]
    text = run("info", "hits").stdout
    assert "standbys   n2\n" in text and "followers  n2 in sync\n" in text

    told = verb("replicate", "hits", "n2", "--mode", "async")
    assert (told["standbys"], told["mode"]) == (["n2"], "async")
    assert run("replicate", "hits", "n2").stdout == "hits on n1, sync standbys: n2\n"
    assert verb("replicate", "hits", "n1", code=output.FAILED)["error"]["type"] == "StandbyError"
    assert run("replicate", "hits", "--count", "0").stdout == "hits on n1, without standbys\n"
    assert verb("info", "hits")["standbys"] == []


def test_people_get_tables_and_the_bare_reply(verb: Callable[..., Any]):
    server = run("spawn", "things:Counter", "--name", "hits", "--on", "n1").stdout.strip()

    assert run("ls").stdout.splitlines()[1].split()[:4] == ["hits", server, "things:Counter", "n1"]
    assert run("status").stdout.splitlines()[0].split()[0] == "NODE"
    text = run("status", "-v").stdout
    links = text[text.index("ROUND TRIP") :].splitlines()[1:]
    assert {line.split()[0] for line in links} == {"n1", "n2"} and "unix" in links[0]
    assert run("call", "hits", "incr").stdout == "1\n"
    assert run("call", "hits", "say", "hello you").stdout == "hello you\n"
    assert run("call", "hits", "echo", "1", '"1"', "x", "--kw", "a=null").stdout == (
        '[[1, "1", "x"], {"a": null}]\n'
    )
    assert run("call", "hits", "incr", "--cast").stdout == ""
    assert "n1 -> n2" in run("mv", "hits", "n2").stdout
    assert re.search(r"epoch +2\n", run("info", "hits").stdout)
    assert run("cordon", "n1").stdout == "node n1 takes in no servers\n"
    assert run("uncordon", "n1").stdout == "node n1 takes in servers\n"
    assert run("drain", "n2").stdout == "node n2 is empty: 1 server was moved\n"
    assert run("stop", "hits").stdout == f"stopped {server}\n"


# ------------------------------------------------------------------ processes


def wait_until_gone(pids: list[int]) -> None:
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(processes, timeout=WAIT_S)
    assert alive == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_up_stops_its_nodes_and_their_servers_when_told_to(
    env: dict[str, str], tmp_path: pathlib.Path, number: signal.Signals
):
    (tmp_path / "things.py").write_text(SERVERS)
    journal = tmp_path / "journal"
    # A terminal sends SIGINT to the whole group, so that nodes get it as well.
    with process("up", "-n", "2", "--json", env=env, cwd=tmp_path, process_group=0) as up:
        told = json.loads(up.stdout.readline())
        done = subprocess.run(
            [sys.executable, "-m", "migrate", "spawn", "things:Counter", "7", str(journal)],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert done.returncode == 0, done.stderr

        os.killpg(up.pid, number) if number == signal.SIGINT else up.send_signal(number)
        _, errors = up.communicate(timeout=WAIT_S)

        assert up.returncode == 0, errors
        assert errors == ""
    assert journal.read_text() == "7"
    wait_until_gone([node["pid"] for node in told["nodes"]])
    assert list((tmp_path / "run" / "livemigrate").iterdir()) == []


def test_up_tells_of_a_node_that_died_and_ends_when_none_is_left(
    env: dict[str, str], tmp_path: pathlib.Path
):
    with process("up", "-n", "2", "--json", env=env, cwd=tmp_path) as up:
        first, second = json.loads(up.stdout.readline())["nodes"]

        os.kill(first["pid"], signal.SIGKILL)
        assert f"node n1 (pid {first['pid']}) ended by signal 9" in up.stderr.readline()
        assert up.poll() is None
        os.kill(second["pid"], signal.SIGKILL)
        out, errors = up.communicate(timeout=WAIT_S)

    assert up.returncode == output.FAILED
    assert "every node of the cluster died" in errors
    assert "Traceback" not in errors
    assert json.loads(out)["error"]["type"] == "MigrateError"


def test_the_nodes_of_up_end_when_it_is_killed(env: dict[str, str], tmp_path: pathlib.Path):
    # It cannot clean up after itself.
    env = {**env, "TMPDIR": str(tmp_path)}
    with process("up", "-n", "2", "--json", env=env, cwd=tmp_path) as up:
        pids = [node["pid"] for node in json.loads(up.stdout.readline())["nodes"]]

        up.kill()
        up.wait()

        wait_until_gone(pids)


def test_a_second_up_of_the_same_name_is_refused_and_one_of_another_name_is_not(
    env: dict[str, str], tmp_path: pathlib.Path
):
    with process("up", "-n", "1", "--json", env=env, cwd=tmp_path) as up:
        up.stdout.readline()

        assert "is up already" in outcome(run("up", "-n", "1"))

        with process("up", "-n", "1", "--name", "two", "--json", env=env, cwd=tmp_path) as other:
            assert json.loads(other.stdout.readline())["cluster"] == "two"


def test_a_node_announces_itself_in_one_line_and_ends_with_its_stdin(
    env: dict[str, str], tmp_path: pathlib.Path
):
    words = ["node", "--name", "a", "--announce", "--with-parent"]
    with process(*words, env=env, cwd=tmp_path, stdin=subprocess.PIPE) as node:
        told = json.loads(node.stdout.readline())
        assert told == {"name": "a", "address": told["address"], "pid": node.pid}
        assert told["address"].startswith("127.0.0.1:")

        out, errors = node.communicate(timeout=WAIT_S)

    assert (node.returncode, out, errors) == (0, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_of_its_own_stops_in_order_when_told_to(
    env: dict[str, str], tmp_path: pathlib.Path, number: signal.Signals
):
    with process("node", "--name", "a", env=env, cwd=tmp_path) as node:
        assert node.stdout.readline().startswith("node a is up at 127.0.0.1:")

        node.send_signal(number)
        _, errors = node.communicate(timeout=WAIT_S)

    assert (node.returncode, errors) == (0, "")


def test_a_node_with_a_parent_leaves_interrupts_to_it(env: dict[str, str], tmp_path: pathlib.Path):
    words = ["node", "--announce", "--with-parent"]
    with process(*words, env=env, cwd=tmp_path, stdin=subprocess.PIPE) as node:
        address = json.loads(node.stdout.readline())["address"]
        node.send_signal(signal.SIGINT)

        # Answered after the signal has been delivered.
        assert run("status", "--cluster", address).exit_code == 0
        assert node.poll() is None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--listen", "0.0.0.0:0"], "there is no TLS; make certificates"),
        (["--listen", "nonsense"], "nonsense"),
        (["--name", "a b"], "cannot name a node"),
        (["--directory", "ftp://x"], "unknown scheme"),
        (["--directory", "sqlite:///a-file/c.db"], "the directory cannot be opened"),
    ],
)
def test_a_node_that_cannot_start_says_why_without_a_traceback(
    env: dict[str, str], tmp_path: pathlib.Path, words: list[str], complaint: str
):
    (tmp_path / "a-file").touch()
    with process("node", *words, env=env, cwd=tmp_path) as node:
        out, errors = node.communicate(timeout=WAIT_S)

    assert node.returncode == output.FAILED, errors
    assert complaint in errors
    assert "Traceback" not in errors
    assert out == ""


def test_a_directory_that_fails_while_a_node_joins_ends_in_an_error_of_ours(env: dict[str, str]):
    class Failing(MemoryDirectory):
        async def lease(self, ttl_s: float) -> int:
            raise DirectoryUnavailable("it went away")

    async def join() -> None:
        async with Node(directory=Failing()):
            raise AssertionError("it joined")

    with pytest.raises(MigrateError, match="does not answer: it went away") as raised:
        asyncio.run(join())
    assert output.fail(raised.value, as_json=False) == output.FAILED


def test_two_nodes_cannot_have_one_name(env: dict[str, str], tmp_path: pathlib.Path):
    words = ["node", "--name", "a", "--directory", f"sqlite:///{tmp_path / 'c.db'}"]
    with process(*words, env=env, cwd=tmp_path) as first:
        first.stdout.readline()
        with process(*words, env=env, cwd=tmp_path) as second:
            _, errors = second.communicate(timeout=WAIT_S)

    assert second.returncode == output.FAILED
    assert "a node named 'a' is alive" in errors
    assert "Traceback" not in errors


SCRIPT = """
import asyncio, os, sys
import migrate

@migrate.server
class Counter:
    def __init__(self, n):
        self.n = n
    @migrate.call
    def incr(self, by: int = 1) -> int:
        self.n += by
        return self.n
    @migrate.call
    def shout(self, chars: int) -> int:
        print("x" * chars)
        return chars

async def main():
    async with migrate.LocalCluster(nodes=2) as cluster:
        print(*(node.pid for node in cluster.nodes), flush=True)
        client = cluster.client
        ref = await client.spawn(Counter, 1, options=migrate.SpawnOptions(on="n1"))
        assert await ref.incr() == 2
        assert (await client.migrate(ref, to="n2")).target == "n2"
        assert await ref.incr() == 3
        {then}

asyncio.run(main())
"""


def script(then: str) -> str:
    return SCRIPT.replace("{then}", then)


@pytest.mark.parametrize("way", ["file", "-c", "stdin"])
def test_classes_of_a_script_without_a_main_guard_reach_the_nodes(
    env: dict[str, str], tmp_path: pathlib.Path, way: str
):
    text = script("print('done')")
    (tmp_path / "program.py").write_text(text)
    words = {"file": ["program.py"], "-c": ["-c", text], "stdin": ["-"]}[way]

    done = subprocess.run(
        [sys.executable, *words],
        env=env,
        cwd=tmp_path,
        input=text if way == "stdin" else None,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
    wait_until_gone([int(pid) for pid in done.stdout.splitlines()[0].split()])


def test_a_handler_that_prints_a_lot_does_not_block_its_node(
    env: dict[str, str], tmp_path: pathlib.Path
):
    # More than the pipe and the reader's buffer hold together; nobody reads that pipe.
    text = script("assert await ref.shout(4_000_000) == 4_000_000; print('done')")

    done = subprocess.run(
        [sys.executable, "-c", text],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n")
    assert done.stderr.count("x") >= 4_000_000


def test_the_nodes_of_a_script_end_when_it_is_killed(env: dict[str, str], tmp_path: pathlib.Path):
    text = script("os.kill(os.getpid(), 9)")
    # It cannot clean up after itself.
    env = {**env, "TMPDIR": str(tmp_path)}

    done = subprocess.run(
        [sys.executable, "-c", text], env=env, cwd=tmp_path, capture_output=True, timeout=WAIT_S
    )

    assert done.returncode == -signal.SIGKILL
    wait_until_gone([int(pid) for pid in done.stdout.split()])


def test_importing_everything_starts_neither_threads_nor_processes(tmp_path: pathlib.Path):
    text = textwrap.dedent("""
        import threading, psutil, migrate
        for name in migrate.__all__:
            getattr(migrate, name)
        import migrate.tools.cli, migrate.tools.up, migrate.tools.demo, migrate.tools.node_process
        print(threading.active_count(), len(psutil.Process().children()))
    """)

    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S
    )

    assert done.stdout == "1 0\n", done.stderr


def test_the_module_runs_like_the_console_script(env: dict[str, str]):
    done = subprocess.run(
        [sys.executable, "-m", "migrate", "--version"],
        env=env,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("livemigrate, version ")


def test_a_verb_that_is_interrupted_says_so_and_leaves_no_traceback(
    cluster: tuple[pathlib.Path, Any], verb: Callable[..., Any], tmp_path: pathlib.Path
):
    home, _ = cluster
    verb("spawn", "things:Counter", "--name", "slow")
    words = ["call", "slow", "hold", str(tmp_path), "--timeout", "600"]
    with process(*words, env={**os.environ, **environment(home)}, cwd=home) as asking:
        deadline = time.monotonic() + WAIT_S
        while not (tmp_path / "held").exists():
            assert time.monotonic() < deadline
        asking.send_signal(signal.SIGINT)
        _, errors = asking.communicate(timeout=WAIT_S)

    (tmp_path / "let-go").touch()
    verb("stop", "slow")  # before the folder is gone that its handler looks at
    assert asking.returncode == output.INTERRUPTED
    assert errors == "interrupted\n"


def test_an_error_of_ours_never_reaches_people_as_a_traceback(env: dict[str, str]):
    result = run("up", "--name", "../x", "-n", "1")

    assert result.exit_code == output.FAILED
    assert isinstance(result.exception, SystemExit)
    assert issubclass(UsageError, MigrateError)
    assert "cannot name a cluster" in result.stderr


@pytest.mark.parametrize("who", ["node", "up"])
def test_allowed_classes_can_be_spawned_from_outside_with_the_token_and_no_others(
    env: dict[str, str], tmp_path: pathlib.Path, who: str
):
    (tmp_path / "things.py").write_text(SERVERS)
    token = tmp_path / "token"
    allow = ["--allow", "things:Counter", "--allow", "json:JSONEncoder"]
    words = {
        "node": ["node", "--announce", *allow, "--token-file", str(token)],
        "up": ["up", "-n", "1", "--json", *allow],
    }[who]
    env = {**env, "LIVEMIGRATE_TOKEN_FILE": str(token)} if who == "up" else env
    with process(*words, env=env, cwd=tmp_path) as node:
        told = json.loads(node.stdout.readline())
        address = told["address"] if who == "node" else told["nodes"][0]["address"]
        metadata = (("authorization", f"Bearer {token.read_text().strip()}"),)
        with grpc.insecure_channel(address) as channel:
            stub = api_pb2_grpc.ApiStub(channel)

            def spawn(cls: str, **more: Any) -> Any:
                return stub.Spawn(api_pb2.SpawnRequest(cls=cls), timeout=WAIT_S, **more)

            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                spawn("things:Counter")
            with pytest.raises(grpc.RpcError, match="json:JSONDecoder"):
                spawn("json:JSONDecoder", metadata=metadata)
            spawn("things:Counter", metadata=metadata)
        listed = run("ls", "--cluster", address, "--json")

    assert [info["cls"] for info in json.loads(listed.stdout)] == ["things:Counter"]


# ------------------------------------------------------------------ the README


def test_the_readme_names_every_verb_and_every_exit_status():
    text = (ROOT / "README.md").read_text("utf-8")

    assert [verb for verb in cli.cli.commands if f"`{verb}" not in text] == []
    for code in ("0 done", "1 failed", "2 the", "3 the outcome is", "4 no", "5 carried", "130 "):
        assert code in text


def test_every_file_and_folder_of_the_readmes_map_exists():
    text = (ROOT / "README.md").read_text("utf-8")
    (tree,) = re.findall(r"## Map\n\n```\n(.*?)```", text, re.DOTALL)
    folders: list[str] = []
    paths = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"\s*(\S+(?: \S+)*)", line)
        assert names is not None
        # The description begins after two spaces or more.
        for name in re.split(r"\s{2,}", names[1])[0].split():
            folders[depth:] = [name]
            paths.append("".join(folders[:depth]) + name)

    assert len(paths) > 25
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readmes_test_command_is_what_the_check_script_runs():
    text = (ROOT / "README.md").read_text("utf-8")
    script = (ROOT / ".ci" / "run").read_text("utf-8")

    for command in ("--editable . --group dev", "-m pytest"):
        assert command in text
        assert f"python -m pip install --quiet {command}" in script or f"python {command}" in script
