"""The public API as type checkers see it: the same under mypy and under pyright."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "typing"
FILES = ("classes.py", "mistakes.py", "surface.py", "verbs_of_a_class.py")
CHECKERS = ("mypy", "pyright")


class Findings(NamedTuple):
    """What a checker said: line -> texts, for each file."""

    errors: dict[str, dict[int, list[str]]]
    revealed: dict[str, dict[int, str]]


@functools.cache
def findings(checker: str) -> Findings:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed; the dependency group `lint` has it")
    return mypy_findings() if checker == "mypy" else pyright_findings()


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "dumb"},
    )
    assert done.returncode in (0, 1), f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def mypy_findings() -> Findings:
    found = Findings({name: {} for name in FILES}, {name: {} for name in FILES})
    # Modules that others import are silent here; `mypy` alone checks the packages.
    output = run(
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--explicit-package-bases",
        "--no-error-summary",
        "--no-pretty",
        *(f"tests/typing/{name}" for name in FILES),
    )
    for text in output.splitlines():
        match = re.match(r"tests/typing/(\w+\.py):(\d+): (error|note): (.*)", text)
        assert match, f"mypy says something of another file: {text}"
        name, line, kind, message = match[1], int(match[2]), match[3], match[4]
        revealed = re.match(r'Revealed type is "(.*)"', message)
        if revealed:
            found.revealed[name][line] = revealed[1]
        elif kind == "error":
            found.errors[name].setdefault(line, []).append(message)
    return found


def pyright_findings() -> Findings:
    found = Findings({name: {} for name in FILES}, {name: {} for name in FILES})
    output = run("pyright", "--outputjson", "--pythonpath", sys.executable)
    for item in json.loads(output)["generalDiagnostics"]:
        path = pathlib.Path(item["file"])
        assert path.parent == FOLDER, item
        line = item["range"]["start"]["line"] + 1
        revealed = re.match(r'Type of ".*" is "(.*)"', item["message"], re.DOTALL)
        if revealed:
            found.revealed[path.name][line] = revealed[1]
        elif item["severity"] in ("error", "warning"):
            found.errors[path.name].setdefault(line, []).append(item["message"])
    return found


def marked(name: str, mark: str) -> dict[int, str]:
    lines = (FOLDER / name).read_text().splitlines()
    pattern = re.compile(rf"# {mark}: (.*)$")
    matches = ((number, pattern.search(line)) for number, line in enumerate(lines, 1))
    return {number: match[1] for number, match in matches if match}


def short(type_text: str) -> str:
    """Drop module names, and the quoting in which the checkers differ."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", type_text).replace('"', "'").replace("?", "")


def test_every_file_for_the_checkers_is_checked():
    assert {path.name for path in FOLDER.glob("*.py")} == set(FILES)


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("name", FILES)
def test_every_seeded_mistake_is_reported_and_nothing_else(checker: str, name: str):
    seeded = marked(name, "error")
    reported = findings(checker).errors[name]

    missed = {line: why for line, why in seeded.items() if line not in reported}
    invented = {line: texts for line, texts in reported.items() if line not in seeded}

    assert missed == {}, f"{checker} does not see these mistakes"
    assert invented == {}, f"{checker} reports what is right"
    assert (len(seeded) > 30) == (name == "mistakes.py")


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("name", FILES)
def test_revealed_types_are_the_written_ones(checker: str, name: str):
    written = marked(name, "revealed")
    said = findings(checker).revealed[name]

    assert {line: short(text) for line, text in said.items()} == written
    assert (len(written) > 40) == (name == "surface.py")


def test_an_implementation_of_a_verb_is_the_method_itself_with_the_verbs_documentation():
    from migrate.verbs import Verbs, implements

    async def spawn(self: object) -> None: ...

    assert implements(Verbs.spawn)(spawn) is spawn
    assert spawn.__doc__ == Verbs.spawn.__doc__
    assert spawn.__doc__ is not None
