"""The check for leaked tasks fails a test that leaks one; else it proves nothing."""

from __future__ import annotations

import pathlib

import pytest

pytest_plugins = ["pytester"]

CONFTEST = pathlib.Path(__file__).parents[1] / "conftest.py"

LEAKY = """
import asyncio, pytest

async def leave_a_task():
    global task
    task = asyncio.create_task(asyncio.Event().wait(), name="forgotten")
    await asyncio.sleep(0)

{mark}
def test_leaks():
    asyncio.run(leave_a_task())
"""


def run(pytester: pytest.Pytester, mark: str) -> pytest.RunResult:
    # The copy takes the folder above its own for the project.
    folder = pytester.mkdir("tests")
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "test_leaky.py").write_text(LEAKY.format(mark=mark))
    pytester.makepyprojecttoml(
        "[tool.pytest.ini_options]\nmarkers = ['leaks_tasks(reason): on purpose']\n"
    )
    return pytester.runpytest_subprocess("-p", "no:asyncio", "tests")


def test_a_test_that_leaks_a_task_fails(pytester: pytest.Pytester):
    result = run(pytester, mark="")

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*tasks were still running*", "*forgotten*"])


def test_a_test_marked_as_leaking_passes(pytester: pytest.Pytester):
    run(pytester, mark="@pytest.mark.leaks_tasks('shown')").assert_outcomes(passed=1)
