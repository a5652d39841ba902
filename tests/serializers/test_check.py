"""What will be refused, and what is lost, is said ahead of time and changes nothing."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import pathlib
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Generator
from typing import Any

import pytest

import serializers
from serializers import CheckReport, Finding


class Service:
    connection: socket.socket | None
    workers: list[threading.Thread]
    steps: Generator[int, None, None]
    name: str = "x"

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}


def begun() -> Any:
    generator = (n for n in range(2))
    next(generator)
    return generator


def reasons(report: CheckReport) -> dict[str, str]:
    return {finding.path: finding.reason for finding in report.lossy}


def test_a_state_that_travels_whole_has_nothing_to_report() -> None:
    service = Service()
    service.state["a"] = [1, {2}, threading.Lock()]

    report = serializers.check(service)

    assert report.ok and report.complete and report.subject == "Service"
    assert (report.problems, report.lossy, report.by_value) == ((), (), ())
    assert report.objects >= 5


def test_all_problems_are_told_with_path_type_reason_and_remedy() -> None:
    service = Service()
    one, two = socket.socketpair()
    with one, two:
        service.state.update(a=one, b=begun())
        report = serializers.check(service)

        assert not report.ok
        paths = [problem.path for problem in report.problems]
        assert paths == ["Service.state['a']", "Service.state['b']"]
        assert all(p.type_name and p.reason and p.remedy for p in report.problems)
        with pytest.raises(serializers.NotSerializable) as caught:
            serializers.dumps(service)
        assert caught.value.problems == report.problems
        one.send(b"x")
        assert two.recv(1) == b"x"


def test_what_travels_with_a_loss_is_told_by_path(tmp_path: pathlib.Path) -> None:
    service = Service()
    locked = threading.Lock()
    with (
        locked,
        open(tmp_path / "log", "w") as file,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        file.write("not flushed")
        service.state = {
            "lock": locked,
            "local": threading.local(),
            "logger": logging.getLogger("some.name"),
            "file": file,
            "pool": pool,
            "ref": weakref.ref(service),
        }
        report = serializers.check(service)
        # Nothing was written: looking is not capturing.
        assert (tmp_path / "log").read_text() == ""

    assert report.ok
    found = reasons(report)
    for key, word in [
        ("lock", "locked"),
        ("local", "thread"),
        ("logger", "handlers"),
        ("file", "path"),
        ("pool", "anew"),
        ("ref", "dead"),
    ]:
        assert word in found[f"Service.state['{key}']"], key


def test_a_reducer_of_the_users_can_say_what_is_lost() -> None:
    class Handle:
        pass

    def reduce(handle: Handle) -> Any:
        serializers.lossy("its window is closed")
        return str, ("handle",)

    serializers.register(Handle, reduce)

    assert reasons(serializers.check([Handle()])) == {"list[0]": "its window is closed"}
    assert serializers.loads(serializers.dumps([Handle()])) == ["handle"]
    assert not serializers.is_checking()


def test_notes_of_other_threads_are_not_mixed_in() -> None:
    class Slow:
        def __reduce__(self) -> Any:
            done = threading.Event()

            def other() -> None:
                serializers.lossy("from elsewhere")
                done.set()

            threading.Thread(target=other).start()
            done.wait(30)
            return str, ()

    assert serializers.check([Slow()]).lossy == ()


def test_code_by_value_is_listed() -> None:
    class Local:
        pass

    report = serializers.check({"make": Local, "f": lambda: Local})

    assert any(name.endswith("Local") for name in report.by_value)
    assert any(name.endswith("<lambda>") for name in report.by_value)


def test_a_class_is_checked_by_what_it_declares() -> None:
    report = serializers.check(Service)

    assert report.ok
    assert reasons(report).keys() == {"Service.connection", "Service.workers", "Service.steps"}


def test_a_class_by_value_is_checked_with_what_its_methods_need() -> None:
    generator = begun()

    class Local:
        def method(self) -> Any:
            return generator

    report = serializers.check(Local)

    assert [p.path.endswith(".__closure__['generator']") for p in report.problems] == [True]


def test_checking_a_deep_state_overflows_nothing() -> None:
    top: Any = begun()
    for _ in range(100_000):
        top = [top]

    report = serializers.check(top)

    assert len(report.problems) == 1 and len(report.problems[0].path) < 500


def test_the_text_of_a_report_tells_everything() -> None:
    report = CheckReport(
        subject="A",
        problems=(Finding("A.x", "generator", "why", "what"),),
        lossy=(Finding("A.y", "lock", "locked"),),
        by_value=("m.f",),
        objects=7,
        complete=False,
    )

    text = str(report)
    assert "CANNOT" in text and "A.x: generator: why; what" in text and "A.y: lock: locked" in text
    assert "m.f" in text and "7 objects" in text and "not looked at" in text


# --- command line --------------------------------------------------------------------------------

SAMPLE = """
import threading
class Holder: pass
class Bare:
    worker: threading.Thread
good = Holder(); good.items = [1, 2]
bad = Holder(); bad.a = (n for n in range(3)); bad.b = [(n for n in range(3))]
next(bad.a); next(bad.b[0])
raise_ = None
"""


def explain(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "sample_state.py").write_text(SAMPLE)
    return subprocess.run(
        [sys.executable, "-m", "serializers.explain", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_says_it_by_its_exit_status_and_its_text(tmp_path: pathlib.Path) -> None:
    done = explain(tmp_path, "sample_state:good")
    assert (done.returncode, done.stderr) == (0, "") and "can travel" in done.stdout
    done = explain(tmp_path, "sample_state:bad")
    assert (done.returncode, done.stderr) == (1, "")
    assert "Holder.a" in done.stdout and "Holder.b[0]" in done.stdout
    done = explain(tmp_path, "sample_state:Bare")
    assert done.returncode == 0 and "Bare.worker" in done.stdout


def test_the_command_speaks_json(tmp_path: pathlib.Path) -> None:
    done = explain(tmp_path, "sample_state:bad", "--json")
    told = json.loads(done.stdout)

    assert done.returncode == 1 and told["ok"] is False and told["complete"] is True
    assert [problem["path"] for problem in told["problems"]] == ["Holder.a", "Holder.b[0]"]
    assert {"path", "type_name", "reason", "remedy"} == told["problems"][0].keys()


@pytest.mark.parametrize(
    "arguments", [(), ("sample_state",), ("sample_state:absent",), ("no_such:x",), ("a:b", "c:d")]
)
def test_a_wrong_command_line_is_told_apart(
    tmp_path: pathlib.Path, arguments: tuple[str, ...]
) -> None:
    done = explain(tmp_path, *arguments)

    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
