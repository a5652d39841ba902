"""The demo: what it counts is true, and it notices when something is lost."""

from __future__ import annotations

import asyncio
import collections
import importlib
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import sysconfig
import tokenize
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import MigrateError
from migrate.reports import MoveReport
from migrate.tools import cli, demo, demo_show, demo_text
from migrate.tools.demo_servers import Account

ROOT = pathlib.Path(__file__).parents[2]
WAIT_S = 120.0


# ------------------------------------------------------------------ accounts


@given(
    sent=st.dictionaries(st.sampled_from("abc"), st.integers(0, 8)),
    seed=st.integers(),
    data=st.data(),
)
def test_an_account_tells_exactly_what_was_lost_repeated_and_reordered(
    sent: dict[str, int], seed: int, data: st.DataObject
):
    requests = [(sender, n) for sender, last in sent.items() for n in range(1, last + 1)]
    times = {r: data.draw(st.sampled_from((0, 1, 1, 1, 2)), label=str(r)) for r in requests}
    arriving = [r for r in requests for _ in range(times[r])]
    random.Random(seed).shuffle(arriving)
    account = Account()
    late = 0
    for position, (sender, number) in enumerate(arriving):
        before = [n for s, n in arriving[:position] if s == sender]
        late += number not in before and any(n > number for n in before)
        account.note(sender, number)

    assert account.lost(sent) == sum(not count for count in times.values())
    assert account.duplicated == sum(max(0, count - 1) for count in times.values())
    assert account.out_of_order == late


def test_an_account_of_requests_in_order_is_clean():
    account = Account()
    for number in range(1, 100):
        account.note("a", number)

    assert (account.lost({"a": 99}), account.duplicated, account.out_of_order) == (0, 0, 0)


# ------------------------------------------------------------------ the text


def write(root: pathlib.Path, path: str, text: bytes = b"") -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(text)


def test_test_folders_and_installed_packages_are_left_out_at_every_depth(tmp_path: pathlib.Path):
    for path in (
        *("b.py", "a/c.py", "a.py", "testing/d.py", "a/test.py", "readme.txt"),
        *("test/x.py", "a/tests/x.py", "idlelib/idle_test/x.py", "a/tests/deep/x.py"),
        *("site-packages/x.py", "dist-packages/y/x.py", "a/__pycache__/x.py"),
    ):
        write(tmp_path, path)

    assert demo_text.files(tmp_path) == ["a.py", "a/c.py", "a/test.py", "b.py", "testing/d.py"]


@given(total=st.integers(1, 200), wanted=st.integers(1, 250))
def test_fewer_files_are_chosen_evenly_and_each_once(total: int, wanted: int):
    names = [f"{i:03}.py" for i in range(total)]

    class Walked:
        @staticmethod
        def walk(root: pathlib.Path) -> Any:
            return [(str(root), [], list(reversed(names)))]

    original = demo_text.os
    try:
        demo_text.os = Walked  # type: ignore[assignment]
        chosen = demo_text.files(pathlib.Path("x"), wanted)
    finally:
        demo_text.os = original

    assert len(chosen) == len(set(chosen)) == min(total, wanted)
    assert chosen == sorted(chosen)
    gaps = [b - a for a, b in itertools.pairwise(map(names.index, chosen))]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_names_are_counted_as_tokenize_finds_them(tmp_path: pathlib.Path):
    write(tmp_path, "a.py", "def é(x):  # def\n    return x + x, 'x'\n".encode())

    assert demo_text.count_names(tmp_path / "a.py") == {"def": 1, "é": 1, "x": 3, "return": 1}


@pytest.mark.parametrize(
    "text",
    [b"(", b"'''", b"\xff\xfe", b"# coding: nonsense\n", b"  a\n b\n"],
)
def test_a_file_that_does_not_tokenise_has_no_names(tmp_path: pathlib.Path, text: bytes):
    write(tmp_path, "a.py", b"good = 1\n" + text if text.startswith(b"(") else text)

    assert demo_text.count_names(tmp_path / "a.py") is None


indexes = st.dictionaries(
    st.text("abc", min_size=1),
    st.dictionaries(st.integers(0, 9), st.integers(1, 9), min_size=1),
    max_size=5,
)


def flat(index: dict[str, dict[int, int]]) -> dict[str, list[int]]:
    return {name: [n for pair in files.items() for n in pair] for name, files in index.items()}


@given(indexes, st.randoms())
def test_a_digest_does_not_depend_on_the_order_of_building(
    index: dict[str, dict[int, int]], order: random.Random
):
    names = list(index)
    order.shuffle(names)
    shuffled = {}
    for name in names:
        files = list(index[name].items())
        order.shuffle(files)
        shuffled[name] = dict(files)

    assert demo_text.digest(flat(shuffled)) == demo_text.digest(flat(index))


@given(indexes, indexes)
def test_indexes_that_differ_have_different_digests(
    one: dict[str, dict[int, int]], other: dict[str, dict[int, int]]
):
    same = demo_text.digest(flat(one)) == demo_text.digest(flat(other))

    assert same == (one == other)


def test_a_request_that_was_handled_twice_changes_the_digest():
    assert demo_text.digest({"a": [1, 5, 1, 5]}) != demo_text.digest({"a": [1, 5]})


def test_a_name_belongs_to_the_same_part_in_every_process():
    assert [demo_text.shard_of(name, 14) for name in ("self", "def", "é")] == [5, 1, 4]


# ------------------------------------------------------------------ the verdict


def judged(change: Callable[[dict[str, Any]], None] = lambda facts: None) -> demo.Verdict:
    """The verdict on a run of two shards and two files, after a change of what was found."""
    plan = demo.Plan(nodes=2, shards=2, callers=1, files_max=None, seconds=1)
    parts: list[dict[str, list[int]]] = [{"a": [0, 2]}, {"b": [0, 1]}]
    accounts = {name: Account() for name in ("shard-01", "shard-02", "ledger", "catalogue")}
    accounts["shard-01"].note("caller-1", 1)
    accounts["shard-02"].note("caller-1", 1)
    accounts["catalogue"].note("caller-1", 1)
    accounts["catalogue"].note("caller-1", 2)
    for shard in ("shard-01", "shard-02"):
        accounts["ledger"].note(shard, 1)
        accounts["ledger"].note(shard, 2)
    done = demo.Run(calls=4, casts=0, files=2, moving_s=2.0)
    done.sent |= {
        "shard-01": collections.Counter({"caller-1": 1}),
        "shard-02": collections.Counter({"caller-1": 1}),
        "catalogue": collections.Counter({"caller-1": 2}),
    }
    done.reports = [MoveReport("n1", "n2", 2, ms / 1000, 2 * ms / 1000, 9, 1) for ms in (4, 2)]
    facts: dict[str, Any] = {
        "done": done,
        "paths": ["x.py", "y.py"],
        "collected": {
            f"shard-0{i + 1}": {
                "account": accounts[f"shard-0{i + 1}"],
                "reported": 2,
                "digest": demo_text.digest(part),
                "names": demo_text.occurrences(part),
            }
            for i, part in enumerate(parts)
        },
        "compared": {
            "skipped": ["y.py"],
            "names": {"a": 2, "b": 1},
            "digests": [demo_text.digest(part) for part in parts],
        },
    }
    facts["collected"]["ledger"] = {
        "account": accounts["ledger"],
        "taken_in": {"shard-01": 2, "shard-02": 1},
    }
    facts["collected"]["catalogue"] = {
        "account": accounts["catalogue"],
        "names_in": {"x.py": 3, "y.py": None},
    }
    change(facts)
    return demo._judge(plan, facts["paths"], done, facts["collected"], facts["compared"])


def test_the_verdict_on_a_clean_run():
    verdict = judged()

    assert verdict.ok
    assert verdict.summary == {
        "nodes": 2,
        "servers": 4,
        "files": 2,
        "calls": 6,
        "casts": 2,
        "moves": 2,
        "moves_per_s": 1.0,
        "failed_calls": 0,
        "failed_moves": 0,
        "lost": 0,
        "duplicated": 0,
        "out_of_order": 0,
        "identical": True,
        "downtime_ms": {"p50": 2.0, "p99": 4.0, "max": 4.0},
        "move_ms": {"p50": 4.0, "p99": 8.0},
        "seconds": 2.0,
    }
    assert verdict.listing == {
        "files": ["x.py", "y.py"],
        "skipped": ["y.py"],
        "names": {"a": 2, "b": 1},
    }


def set_in(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(facts: dict[str, Any]) -> None:
        inner = facts
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


def note(server: str, sender: str, number: int) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts["collected"][server]["account"].note(sender, number)


def sent(server: str, number: int) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts["done"].sent[server].update({"caller-1": number})


def run_field(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda facts: setattr(facts["done"], name, 1)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        (sent("shard-01", 1), "lost", 1),
        (sent("catalogue", 3), "lost", 3),
        (set_in("collected", "shard-02", "reported", value=5), "lost", 3),
        (note("shard-02", "caller-1", 1), "duplicated", 1),
        (note("ledger", "shard-01", 2), "duplicated", 1),
        (run_field("failed_calls"), "failed_calls", 1),
        (run_field("failed_moves"), "failed_moves", 1),
        (set_in("collected", "shard-01", "digest", value="0" * 64), "identical", False),
        (set_in("collected", "shard-01", "names", value={"a": 3}), "identical", False),
        (set_in("collected", "shard-01", "names", value={}), "identical", False),
        (set_in("collected", "ledger", "taken_in", "shard-01", value=3), "identical", False),
        (set_in("collected", "catalogue", "names_in", "x.py", value=4), "identical", False),
        (set_in("collected", "catalogue", "names_in", value={"x.py": 3}), "identical", False),
        (set_in("compared", "skipped", value=[]), "identical", False),
        (set_in("compared", "names", "b", value=2), "identical", False),
    ],
)
def test_whatever_differs_shows_and_is_a_failure(
    change: Callable[[dict[str, Any]], None], field: str, value: object
):
    verdict = judged(change)

    assert verdict.summary[field] == value
    assert not verdict.ok


def test_a_request_that_came_late_is_a_failure():
    def change(facts: dict[str, Any]) -> None:
        account = facts["collected"]["shard-01"]["account"]
        account.note("caller-1", 3)
        account.note("caller-1", 2)
        facts["done"].sent["shard-01"]["caller-1"] = 3

    verdict = judged(change)

    assert (verdict.summary["out_of_order"], verdict.summary["lost"]) == (1, 0)
    assert not verdict.ok


@given(st.lists(st.floats(0, 10), min_size=1), st.integers(1, 100))
def test_a_percentile_is_a_measured_value_with_enough_of_them_at_or_below(
    values: list[float], percent: int
):
    found = demo._percentile_ms(sorted(values), percent)
    rounded = [round(value * 1000, 3) for value in values]

    assert found in rounded
    assert sum(value <= found for value in rounded) * 100 >= percent * len(values)


def test_people_see_both_digests_and_every_figure(capsys: pytest.CaptureFixture[str]):
    demo._print(judged(set_in("collected", "shard-01", "digest", value="0" * 64)))

    text = capsys.readouterr().out
    assert "shard-01           0000000000000000" in text
    assert text.count("DIFFERENT") == 1
    assert "identical     NO" in text
    assert "2 in 2.0 s (1.0 a second); 0 failed" in text


def test_a_line_about_a_move_fits_into_80_columns():
    report = MoveReport("n10", "n11", 1000, 0.1234, 0.2, 100_000, 1)

    line = demo_show.move_line(9999, 123.4, "catalogue", report)

    assert len(line) <= 80
    assert "n10 -> n11" in line and "123.4 ms" in line


# ------------------------------------------------------------------ the whole

pytestmark = pytest.mark.cluster


def own(home: pathlib.Path) -> dict[str, str]:
    (home / "run").mkdir(mode=0o700, exist_ok=True)
    return {
        **os.environ,
        "XDG_RUNTIME_DIR": str(home / "run"),
        "LIVEMIGRATE_SECRET_FILE": str(home / "secret"),
        "PYTHONPATH": str(ROOT),
    }


def names_in(path: pathlib.Path) -> dict[str, int] | None:
    """As anybody would count them who knows nothing of the demo."""
    found: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.NAME:
                    found[token.string] = found.get(token.string, 0) + 1
    except (SyntaxError, tokenize.TokenError):
        return None
    return found


def test_the_demo_counts_what_anybody_counts_and_moves_every_server(tmp_path: pathlib.Path):
    out = tmp_path / "out.json"
    words = ["--files", "15", "--shards", "3", "--nodes", "3", "--json", "--out", str(out)]

    done = subprocess.run(
        [sys.executable, "-m", "migrate", "demo", *words],
        env=own(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )

    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["nodes"], summary["servers"], summary["files"]) == (3, 5, 15)
    assert summary["identical"] is True
    assert summary["calls"] > 15 and summary["casts"] > 15
    assert summary["lost"] == summary["duplicated"] == summary["out_of_order"] == 0
    assert summary["failed_calls"] == 0
    assert summary["downtime_ms"]["p50"] <= summary["downtime_ms"]["max"]
    moved = {line.split()[4] for line in done.stderr.splitlines() if " s move " in line}
    assert moved == {"shard-01", "shard-02", "shard-03", "ledger", "catalogue"}
    assert summary["moves"] == sum(" s move " in line for line in done.stderr.splitlines())

    listing = json.loads(out.read_text("utf-8"))
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    recounted: collections.Counter[str] = collections.Counter()
    skipped = []
    for path in listing["files"]:
        names = names_in(root / path)
        if names is None:
            skipped.append(path)
        recounted.update(names or {})
    assert len(set(listing["files"])) == 15
    assert listing["skipped"] == skipped
    assert listing["names"] == recounted


def test_the_demo_whose_nodes_are_killed_ends_with_the_same_index(tmp_path: pathlib.Path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "migrate", "demo", "--kill"),
            *("--files", "60", "--shards", "3", "--json"),
        ],
        env=own(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )

    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["nodes"] >= 3 and summary["files"] == 60
    assert summary["kills"] >= 3
    assert summary["kills"] == sum(line.startswith("kill ") for line in done.stderr.splitlines())
    assert summary["identical"] is True
    assert summary["lost"] == summary["duplicated"] == summary["out_of_order"] == 0
    assert summary["failed_calls"] == summary["failed_moves"] == 0


def test_all_files_are_those_of_the_standard_library_without_its_tests():
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

    expected = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not out & set(path.relative_to(root).parts[:-1])
    }

    assert set(demo_text.files(demo_text.stdlib())) == expected
    assert "asyncio/tasks.py" in expected


FAULTY = '''
import migrate
from migrate.tools.demo_servers import Shard

def times(number: int) -> int:
    """How often a shard handles a request."""
    raise NotImplementedError

@migrate.server
class FaultyShard(Shard):
    @migrate.call
    async def add(self, sender, number, file, names):
        for _ in range({times}):
            await super().add(sender, number, file, names)
        return number
'''


def run_with_faulty_shards(
    times: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> demo.Verdict:
    """Run the demo with shards that handle a request `times` (an expression) times."""
    name = f"faulty_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FAULTY.replace("{times}", times))
    # The nodes import from where this process does.
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo, "Shard", importlib.import_module(name).FaultyShard)
    plan = demo.Plan(nodes=2, shards=2, callers=2, files_max=4, seconds=5)
    return asyncio.run(demo.run(plan, demo_show.Quiet()))


def test_the_demo_notices_a_request_that_is_lost(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    verdict = run_with_faulty_shards("0 if number == 3 else 1", tmp_path, monkeypatch)

    assert verdict.summary["lost"] == 4  # One of each of two callers at each of two shards.
    assert verdict.summary["identical"] is False
    assert not verdict.ok


def test_the_demo_notices_a_request_that_is_handled_twice(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    verdict = run_with_faulty_shards("2 if number == 3 else 1", tmp_path, monkeypatch)

    assert verdict.summary["duplicated"] == 4
    assert verdict.summary["identical"] is False
    assert not verdict.ok


def test_the_demo_counts_calls_that_fail(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    # Odd numbers are calls; what a cast's handler raises reaches only the log.
    verdict = run_with_faulty_shards("1 // (number != 3)", tmp_path, monkeypatch)

    assert verdict.summary["failed_calls"] == 4
    assert any("division" in error or "modulo" in error for error in verdict.errors)
    assert not verdict.ok


def test_an_interrupted_demo_ends_at_once_and_leaves_no_process(tmp_path: pathlib.Path):
    # As from a terminal: the background job of a shell would ignore the signal.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from migrate.tools.cli import main; main()"
    )
    demoing = subprocess.Popen(
        [sys.executable, "-c", program, "demo", "--json"],
        env=own(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert demoing.stderr is not None
        while " s move " not in (line := demoing.stderr.readline()):
            assert line, demoing.wait()
        children = psutil.Process(demoing.pid).children(recursive=True)
        assert len(children) >= 4

        demoing.send_signal(signal.SIGINT)
        out, errors = demoing.communicate(timeout=WAIT_S)
    finally:
        demoing.kill()
        demoing.communicate()

    assert demoing.returncode == 130
    assert out == ""
    assert "Traceback" not in errors and "never retrieved" not in errors
    assert errors.endswith("interrupted\n")
    _, alive = psutil.wait_procs(children, timeout=WAIT_S)
    assert alive == []


def test_a_demo_whose_reader_is_gone_ends_without_a_traceback(tmp_path: pathlib.Path):
    with subprocess.Popen(
        [sys.executable, "-m", "migrate", "demo"],
        env=own(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demoing:
        try:
            assert demoing.stdout is not None and demoing.stderr is not None
            assert "servers on nodes" in demoing.stdout.readline()
            children = psutil.Process(demoing.pid).children(recursive=True)

            demoing.stdout.close()

            assert demoing.wait(WAIT_S) == 1
            assert demoing.stderr.read() == ""
            _, alive = psutil.wait_procs(children, timeout=WAIT_S)
            assert alive == []
        finally:
            demoing.kill()


def test_a_file_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: pathlib.Path):
    result = CliRunner().invoke(cli.cli, ["demo", "--out", str(tmp_path / "no" / "out.json")])

    assert result.exit_code == 2
    assert "it cannot be written" in result.stderr


def test_a_node_that_dies_during_the_demo_is_named_and_ends_it(tmp_path: pathlib.Path):
    with subprocess.Popen(
        [sys.executable, "-m", "migrate", "demo", "--json"],
        env=own(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as demoing:
        try:
            assert demoing.stderr is not None
            while " s move " not in (line := demoing.stderr.readline()):
                assert line, demoing.wait()
            (victim,) = (
                child
                for child in psutil.Process(demoing.pid).children()
                if child.cmdline()[-20:].count("n2")
            )

            victim.kill()
            out, errors = demoing.communicate(timeout=WAIT_S)
        finally:
            demoing.kill()

    assert demoing.returncode in (1, 3)
    assert "node n2 died" in json.loads(out)["error"]["message"]
    assert "Traceback" not in errors


@pytest.mark.parametrize("what", ["worker", "plain"])
def test_a_helper_of_the_demo_that_dies_ends_it_with_its_name(
    what: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "broken.py").write_text("raise SystemExit(7)")
    original = demo._program

    def broken(*arguments: str) -> Any:
        return original("no", "such", "program") if arguments[0] == what else original(*arguments)

    monkeypatch.setattr(demo, "_program", broken)
    plan = demo.Plan(nodes=2, shards=2, callers=2, files_max=4, seconds=5)

    texts = {"worker": "the process that tokenised", "plain": "the plain run ended with status 1"}
    with pytest.raises(MigrateError, match=texts[what]):
        asyncio.run(demo.run(plan, demo_show.Quiet()))
