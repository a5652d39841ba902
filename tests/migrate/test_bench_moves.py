"""`migrate bench moves` runs, and its figures fit what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.tools import bench_moves
from migrate.tools.bench_moves import Cost

pytestmark = pytest.mark.cluster


def test_moves_are_measured_with_and_without_precopy_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "moves.svg"
    command = ["--json", "--moves", "2", "--mib", "1", "--rate", "0.01", "--plot", str(picture)]
    done = subprocess.run(
        [sys.executable, "-m", "migrate", "bench", "moves", *command],
        env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    costs = [Cost(**cost) for cost in json.loads(done.stdout)["moves"]]
    assert [(cost.kind, cost.precopy) for cost in costs] == [
        (kind, precopy) for kind in bench_moves.KINDS for precopy in (True, False)
    ]
    for cost in costs:
        assert cost.moves == 2 and 0 < cost.downtime_s <= cost.downtime_max_s <= cost.total_s * 2
        assert cost.size_bytes > 700_000 and cost.sent_bytes > 700_000
        assert cost.precopy or cost.rounds == 1
    ahead = {cost.kind: cost.rounds for cost in costs if cost.precopy}
    assert ahead["records"] > 1
    assert picture.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("wrong", [["--moves", "0"], ["--mib", "-1"], ["--kind", "files"]])
def test_bad_input_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_moves.main(wrong)
    assert ended.value.code == 2
    assert "usage: migrate bench moves" in capsys.readouterr().err
