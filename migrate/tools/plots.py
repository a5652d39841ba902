"""Draws what `migrate bench` measured: each kind of hop by size, and downtimes of moves."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from migrate.errors import UsageError
from migrate.tools.hops import HopFigure, size_text

if TYPE_CHECKING:
    from migrate.tools.bench_moves import Cost


@contextlib.contextmanager
def _saved(path: str, width: float, height: float) -> Iterator[Any]:
    """A figure that is written to a file in the end.

    Raises:
        UsageError: The file's ending is neither .svg nor .png, or matplotlib is missing.
    """
    if pathlib.Path(path).suffix not in (".svg", ".png"):
        raise UsageError(f"a plot goes to a file that ends in .svg or .png, not {path!r}")
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UsageError(
            "plots need matplotlib: pip install 'livemigrate[plot]'", cause=str(error)
        ) from error
    with matplotlib.rc_context({"svg.hashsalt": "livemigrate"}):
        figure = figure_module.Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def draw_moves(costs: Sequence[Cost], path: str) -> None:
    """Write a plot of downtimes by size, a panel for each kind of state.

    Args:
        costs: Of any number of moves.
        path: A file that ends in .svg or .png.

    Raises:
        UsageError: The ending is another one, or matplotlib is missing.
    """
    kinds = list(dict.fromkeys(cost.kind for cost in costs)) or [""]
    rates = list(dict.fromkeys(cost.rate for cost in costs))
    with _saved(path, 4.5 * len(kinds), 4.5) as figure:
        panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for panel, kind in zip(panels, kinds, strict=True):
            for precopy in (False, True):
                for number, rate in enumerate(rates):
                    line = sorted(
                        (cost.size_bytes, cost.downtime_s * 1e3)
                        for cost in costs
                        if (cost.kind, cost.rate, cost.precopy) == (kind, rate, precopy)
                    )
                    panel.plot(
                        [size for size, _ in line],
                        [downtime for _, downtime in line],
                        color=f"C{number}",
                        linestyle="-" if precopy else ":",
                        marker="o" if precopy else "x",
                        label=f"{rate:.0%} written/s, {'pre-copy' if precopy else 'one piece'}",
                    )
            panel.set(xscale="log", yscale="log", title=kind, xlabel="state, bytes")
            panel.grid(alpha=0.3)
        panels[0].set(ylabel="downtime, milliseconds (median)")
        if costs:
            panels[-1].legend(fontsize="small")


def draw(figures: Sequence[HopFigure], path: str) -> None:
    """Write a plot.

    Args:
        figures: Of any number of hops.
        path: A file that ends in .svg or .png.

    Raises:
        UsageError: The ending is another one, or matplotlib is missing.
    """
    with _saved(path, 11, 5) as figure:
        latency, throughput = figure.subplots(1, 2)
        for hop in dict.fromkeys(one.hop for one in figures):
            own = [one for one in figures if one.hop == hop]
            sizes = [one.size for one in own]
            (line,) = latency.plot(sizes, [one.p50_us for one in own], marker="o", label=hop)
            latency.plot(sizes, [one.p99_us for one in own], linestyle=":", color=line.get_color())
            throughput.plot(sizes, [one.mb_per_s for one in own], marker="o", label=hop)
        latency.set(title="answered after, p50 (dotted: p99)", ylabel="microseconds")
        throughput.set(title="throughput", ylabel="MB/s")
        ticks = sorted({one.size for one in figures})
        for axes in (latency, throughput):
            axes.set(xscale="log", yscale="log", xlabel="size of a message")
            axes.set_xticks(ticks, [size_text(size) for size in ticks], minor=False)
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
        latency.legend()
