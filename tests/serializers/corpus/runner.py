"""Carries cases through fresh processes and says what became of them."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from .cases import Case, all_cases
from .worker import write_modules

ROOT = pathlib.Path(__file__).parents[3]
TOOLS = ("pickle", "cloudpickle", "dill", "ours")
VARIANTS = ("importable", "main", "notebook", "local")
HOPS = (1, 2)

_START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1));"
    "import pathlib; from tests.serializers.corpus import worker;"
    "worker.main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one case in one variant over one number of hops.

    Attributes:
        status: `pass`; `refused` when dumped; `load`, refused when loaded; `wrong`, loaded and
            misbehaving; `harmed`, the original misbehaves after the dump; `crash`, also of a hang;
            `skip`.
        detail: The error.
        facts: Path, reason and remedy of a refusal, empty if the tool has none.
    """

    tool: str
    case: Case
    variant: str
    hops: int
    status: str
    detail: str = ""
    facts: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether the tool did what the case asks for."""
        if not self.case.refused:
            return self.status in ("pass", "skip")
        return self.status == "skip" or (self.status == "refused" and not self.blemish)

    @property
    def blemish(self) -> str:
        """What is missing in the refusal of a case that has to be refused."""
        path, case = self.facts.get("path", ""), self.case
        if not path.endswith(case.refused):
            return f"its path {path!r} does not end in {case.refused!r}"
        for key, wanted in (("reason", case.reason), ("remedy", case.remedy)):
            if wanted not in self.facts.get(key, ""):
                return f"its {key} {self.facts.get(key, '')!r} lacks {wanted!r}"
        return ""


class Stage:
    """Processes that do one step for many cases; a new one replaces each that dies."""

    def __init__(self, home: pathlib.Path, modules: pathlib.Path, seed: int) -> None:
        self._home = home
        self._modules = modules
        self._seed = seed
        self._process: subprocess.Popen[str] | None = None
        self._answers: Any = None
        home.mkdir()
        (home / "tmp").mkdir()

    def _start(self) -> None:
        read, write = os.pipe()
        environment = {
            **os.environ,
            "PYTHONHASHSEED": str(self._seed),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
            "TMPDIR": str(self._home / "tmp"),
            "OMP_NUM_THREADS": "1",
            "POLARS_MAX_THREADS": "1",
        }
        with open(self._home / "stderr", "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(ROOT), str(self._modules), str(write)],
                cwd=self._home,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(write,),
                text=True,
            )
        os.close(write)
        self._answers = os.fdopen(read, encoding="utf-8")

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self.close()
        return {"status": "crash", "detail": f"the process ended with {code}, or hung"}

    def close(self) -> int:
        """End the process, if there is one; return its exit code."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        assert process.stdin is not None
        try:
            process.stdin.close()
        except BrokenPipeError:
            pass
        self._answers.close()
        try:
            return process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def run(
    cases: Sequence[Case],
    tools: Iterable[str] = ("ours",),
    variants: Sequence[str] = VARIANTS,
    hops: Sequence[int] = HOPS,
) -> list[Outcome]:
    """Carry each case, in each variant, with each tool; outcomes in that order."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="corpus") as folder:
        for tool in tools:
            outcomes += _run_tool(cases, tool, variants, hops, pathlib.Path(folder) / tool)
    return outcomes


def _run_tool(
    cases: Sequence[Case],
    tool: str,
    variants: Sequence[str],
    hops: Sequence[int],
    folder: pathlib.Path,
) -> list[Outcome]:
    modules = folder / "modules"
    modules.mkdir(parents=True)
    stages = [
        Stage(folder / name, modules, seed)
        for seed, name in enumerate(("source", "target", "between", "end"), start=1)
    ]
    source, target, between, end = stages
    outcomes: list[Outcome] = []
    try:
        for variant in variants:
            for case in cases:
                absent = missing(case)
                if absent:
                    outcomes += [Outcome(tool, case, variant, n, "skip", absent) for n in hops]
                    continue
                outcomes += _carry(case, tool, variant, hops, folder, source, target, between, end)
    finally:
        for stage in stages:
            stage.close()
    return outcomes


def missing(case: Case) -> str:
    """Why a case cannot run here; empty if it can."""
    if sys.version_info[:2] < case.python:
        return f"Python {case.python[0]}.{case.python[1]} or later"
    absent = [name for name in case.needs if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _carry(
    case: Case,
    tool: str,
    variant: str,
    hops: Sequence[int],
    folder: pathlib.Path,
    source: Stage,
    target: Stage,
    between: Stage,
    end: Stage,
) -> list[Outcome]:
    builder, checker = case.parts()
    write_modules(folder / "modules", case.name, builder, checker)
    first, second = folder / "first", folder / "second"
    request = {
        "name": case.name,
        "tool": tool,
        "variant": variant,
        "builder": builder,
        "checker": checker,
        "harmless": case.harmless,
        "is_refusal": bool(case.refused),
    }

    def outcome(n: int, found: dict[str, Any]) -> Outcome:
        status = "pass" if found["status"] == "ok" else found["status"]
        return Outcome(tool, case, variant, n, status, found["detail"], found.get("facts", {}))

    built = source.ask({**request, "step": "build", "data": str(first)})
    if built["status"] != "ok":
        return [outcome(n, built) for n in hops]
    # Between two hops nothing is checked, since checks change what they look at.
    outcomes = []
    if 2 in hops:
        passed = between.ask({**request, "step": "hop", "data": str(first), "next": str(second)})
    if 1 in hops:
        outcomes.append(outcome(1, target.ask({**request, "step": "check", "data": str(first)})))
    if 2 in hops:
        if passed["status"] == "ok" and (case.harmless or 1 not in hops):
            passed = end.ask({**request, "step": "check", "data": str(second)})
        outcomes.append(outcome(2, passed))
    return outcomes


STATUSES = ("pass", "refused", "load", "wrong", "harmed", "crash", "skip")


def table(outcomes: Sequence[Outcome]) -> str:
    """The counts of each tool, over cases to be carried and over those to be refused."""
    lines = []
    for title, refusals in (("to be carried", False), ("to be refused", True)):
        chosen = [o for o in outcomes if bool(o.case.refused) == refusals]
        names = {o.case.name for o in chosen}
        if not names:
            continue
        lines += [f"{len(names)} cases {title}, by case, variant and number of hops", ""]
        head = (*STATUSES, "named" if refusals else "share")
        lines.append(f"{'tool':<12}" + "".join(f"{name:>9}" for name in head))
        for tool in dict.fromkeys(o.tool for o in chosen):
            mine = [o for o in chosen if o.tool == tool]
            counts = collections.Counter(o.status for o in mine)
            run = len(mine) - counts["skip"]
            good = sum(o.good and o.status != "skip" for o in mine)
            share = f"{100 * good / run:.1f} %" if run else "-"
            cells = "".join(f"{counts[status]:>9}" for status in STATUSES)
            lines.append(f"{tool:<12}{cells}{share:>9}")
        lines.append("")
    return "\n".join(lines)


def failures(outcomes: Sequence[Outcome]) -> str:
    """What each tool failed, one line for each case and status: where, and why the first time."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for o in outcomes:
        if not o.good:
            groups.setdefault((o.tool, o.case.name, o.status), []).append(o)
    lines = []
    for (tool, name, status), found in groups.items():
        first = found[0]
        where = " ".join(f"{o.variant}/{o.hops}" for o in found)
        if len(found) == len(VARIANTS) * len(HOPS):
            where = "all"
        blemish = f" ({first.blemish})" if first.case.refused and status == "refused" else ""
        lines.append(f"{tool:<12}{status:<9}{name} [{where}] {first.detail}{blemish}")
    return "\n".join(lines)


def select(pattern: str = "") -> list[Case]:
    """Cases whose subject or name contains `pattern`."""
    return [c for c in all_cases().values() if pattern in f"{c.subject}.{c.name}"]
