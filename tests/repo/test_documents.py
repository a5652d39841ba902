"""What users read and copy works: the README's code and the examples."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(program: pathlib.Path, home: pathlib.Path) -> None:
    """Run a program as a user would, with files of its own and nothing of this user's."""
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=home,
        env={
            **os.environ,
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_RUNTIME_DIR": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "LIVEMIGRATE_SECRET_FILE": str(home / "livemigrate" / "secret"),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error::RuntimeWarning,error::ResourceWarning",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{program.name}:\n{done.stdout}\n{done.stderr}"
    assert "never awaited" not in done.stderr, done.stderr


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def ends_in_an_assert(source: str) -> bool:
    """Tell whether some function, or the module, has an assert as its last statement."""
    tree = ast.parse(source)
    bodies = [tree.body] + [
        node.body
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for body in bodies:
        last: ast.AST = body[-1]
        while isinstance(last, ast.With | ast.AsyncWith | ast.Try | ast.For | ast.AsyncFor):
            last = (getattr(last, "finalbody", None) or last.body)[-1]
        if isinstance(last, ast.Assert):
            return True
    return False


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def main():\n    x = 1\n    assert x\nmain()", True),
        ("async def main():\n    async with a:\n        assert x\nrun(main())", True),
        ("def main():\n    assert x\n    print(x)\nmain()", False),
        ("print('assert')", False),
    ],
)
def test_whether_an_example_ends_in_an_assert_is_seen(source: str, expected: bool):
    assert ends_in_an_assert(source) is expected


def test_blocks_of_python_are_found_among_others():
    text = "```python\na = 1\n```\n```sh\nls\n```\ntext\n```python\nb = 2\n```\n"

    assert python_blocks(text) == ["a = 1\n", "b = 2\n"]


def test_a_program_that_fails_is_noticed(tmp_path: pathlib.Path):
    program = tmp_path / "failing.py"
    program.write_text("assert 1 == 2, 'differs'")

    with pytest.raises(AssertionError, match="differs"):
        run(program, tmp_path)


# Defined only where there is something to run: an empty parameter set would skip.
if README.exists():

    def test_the_readme_has_code_to_run():
        assert python_blocks(README.read_text())

    @pytest.mark.cluster
    @pytest.mark.parametrize("number", range(len(python_blocks(README.read_text()))))
    def test_the_code_of_the_readme_runs(number: int, tmp_path: pathlib.Path):
        program = tmp_path / "readme.py"
        program.write_text(python_blocks(README.read_text())[number])

        run(program, tmp_path)


if EXAMPLES:

    @pytest.mark.cluster
    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
    def test_the_example_runs_alone_and_ends_in_an_assert(
        path: pathlib.Path, tmp_path: pathlib.Path
    ):
        assert ends_in_an_assert(path.read_text())

        run(path, tmp_path)
