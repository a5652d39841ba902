"""`migrate bench`: every kind of hop gets its figures, which are written, compared and drawn."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import pytest

import migrate
from migrate.tools import bench, hops, plots
from migrate.tools.hops import HopFigure
from tests.migrate.clusters import nodes, run

pytestmark = pytest.mark.usefixtures("cluster_secret")

KINDS = [
    *("same node", "same host", "gRPC loopback"),
    *("raw grpc.aio unary", "bare Unix socket", "memory copy"),
]


def figure(hop: str, size: int, p50_us: float) -> HopFigure:
    return HopFigure(hop, size, p50_us, 2 * p50_us, 3 * p50_us, 1e6 / p50_us, 1.0, None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hops, "SIZES", (64, 100_000))
    monkeypatch.setattr(hops, "ROUNDS", 1)


@pytest.mark.cluster
@pytest.mark.usefixtures("small")
def test_every_kind_of_hop_is_measured_and_compared(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "one.json"
    assert bench.main(["--only", "hops", "--scale", "0.01", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text()) and told["figures"] == []
    assert [(h["hop"], h["size"]) for h in told["hops"]] == [
        (kind, size) for size in (64, 100_000) for kind in KINDS
    ]
    for hop in told["hops"]:
        assert 0 < hop["p50_us"] <= hop["p99_us"] <= hop["p999_us"] and hop["mb_per_s"] > 0
        alone = hop["hop"] in ("bare Unix socket", "memory copy")
        assert (hop["per_s"] is None) == (hop["cpu_us"] is None) == alone
    # Halved, so that the next run shows twice as much.
    for hop in told["hops"]:
        hop["p50_us"] /= 1000
    out.write_text(json.dumps(told))
    assert bench.main(["--only", "hops", "--scale", "0.01", "--compare", str(out)]) == 0
    text = capsys.readouterr().out
    assert "p50 to before" in text and "gRPC loopback" in text and "97 KiB" in text


@pytest.mark.cluster
def test_a_peer_is_measured_by_its_address(small: None, cluster_secret: object):
    async def body() -> list[HopFigure]:
        async with nodes("far") as (far,):
            found = await hops.run(0.01, far.address, None, lambda _: None)
            assert await far.servers() == [], "nothing is left there"
            return found

    names = {one.hop for one in run(body())}
    assert len(names) == len(KINDS) + 1 and any(name.startswith("peer 127.") for name in names)


def test_figures_are_shown_beside_an_earlier_run(capsys: pytest.CaptureFixture[str]):
    console = bench._wide()
    bench.show([bench.Figure("moves", 30.0, "/s")], {"moves": 20.0}, console)
    bench.show_hops([figure("x", 64, 5.0), figure("y", 64, 5.0)], {("x", 64): 10.0}, console)
    text = capsys.readouterr().out
    assert "1.50" in text and "0.50" in text


@pytest.mark.parametrize("text", ["", "[]", '{"figures": []}', '{"figures": [{}], "hops": []}'])
def test_a_file_that_is_no_earlier_run_is_refused(tmp_path: pathlib.Path, text: str):
    (tmp_path / "x").write_text(text)
    with pytest.raises(migrate.UsageError, match="holds no earlier run"):
        bench.main(["--compare", str(tmp_path / "x")])
    with pytest.raises(migrate.UsageError, match="holds no earlier run"):
        bench.main(["--compare", str(tmp_path / "not there")])


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_hops_are_drawn(tmp_path: pathlib.Path, ending: str):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    path = tmp_path / f"hops{ending}"
    plots.draw([figure(hop, size, size / 10) for hop in "ab" for size in (64, 4096)], str(path))
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if ending == ".png" else b"<?xml") and len(data) > 5000


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    with pytest.raises(migrate.UsageError, match=r"\.svg or \.png"):
        bench.main(["--plot", str(tmp_path / "hops.pdf")])
    importing: Callable[[str], object] = plots.importlib.import_module

    def without(name: str) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return importing(name)

    monkeypatch.setattr(plots.importlib, "import_module", without)
    with pytest.raises(migrate.UsageError, match=r"livemigrate\[plot\]"):
        bench.main(["--plot", str(tmp_path / "hops.svg")])
