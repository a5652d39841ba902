"""What holds for every test: machine speed does not matter, and no task is leaked."""

from __future__ import annotations

import asyncio
import asyncio.runners
import pathlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = (
    *(str(ROOT / name) + "/" for name in ("migrate", "rpc", "serializers", "tests")),
    # A task made of `queue.get()` or the like was made by one of us.
    str(pathlib.Path(asyncio.__file__).parent) + "/",
)

# No deadline: how long an example takes says how busy the machine is. The blob
# makes a failure that was found elsewhere reproducible here.
hypothesis.settings.register_profile(
    "livemigrate",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("livemigrate")


@pytest.fixture(autouse=True)
def no_leaked_tasks(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Fail a test whose loop ends while tasks of ours are still running.

    `asyncio.run` cancels such tasks silently, which hides that nobody awaits them.
    Tasks of libraries do not count. `@pytest.mark.leaks_tasks("why")` allows it.
    """
    leaked: list[str] = []
    original: Any = asyncio.runners._cancel_all_tasks  # type: ignore[attr-defined]

    def cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
        leaked.extend(repr(task) for task in asyncio.all_tasks(loop) if is_ours(task))
        original(loop)

    monkeypatch.setattr(asyncio.runners, "_cancel_all_tasks", cancel_all_tasks)
    yield
    if leaked and request.node.get_closest_marker("leaks_tasks") is None:
        pytest.fail("tasks were still running when the loop ended:\n" + "\n".join(leaked))


def is_ours(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and code.co_filename.startswith(OURS)
