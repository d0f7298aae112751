"""`python -m bench.figures`: the pictures of every device, from its CSV files alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from bstriplet.report.figures.style import INK, MUTED, PAPER, STYLE
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from . import table
from .cases import FORWARD_BACKWARD
from .providers import (
    EMPTY,
    LIGER,
    MOMENT_PRODUCTS,
    OURS,
    PAIR_PRODUCTS,
    ROW_MOVES,
    SCHEDULE,
    shown,
)  # fmt: skip
from .table import EAGER, GRAPH, SWEEPS, Row, milliseconds, where

Draw = Callable[[Sequence[Row]], Figure]
Guide = tuple[str, dict[int, float]]
"""A line to compare with: its label, and its value at each N."""
_COLOURS = {
    "auto": "#b8430f", "native": "#ea9a55", "gram": "#d6658f", "triton": "#8c2f39",
    "reference": "#a6761d", "naive": "#1f5fa8", "eager": "#6aa5d8", "compiled naive": "#14705a",
    "compiled eager": "#5fb39a", "pml contrastive": "#6b3fa0", "pml SupCon": "#9a77c7",
    "pml lifted": "#b9a3d8", "pml triplet": "#d8b4e2", "tiled SupCon": "#5c6370",
    LIGER: "#3d4350", EMPTY: "#9aa0a8", PAIR_PRODUCTS: "#4a4f57",
    MOMENT_PRODUCTS: "#4a4f57", ROW_MOVES: "#4a4f57",
}  # fmt: skip
_DASHED = {EMPTY: ":", PAIR_PRODUCTS: "--", MOMENT_PRODUCTS: "-.", ROW_MOVES: (0, (1, 3))}
_FEWEST_TICKS = 3
_BAD_CHOICE = 1.2
_FLOORS = (EMPTY, PAIR_PRODUCTS, MOMENT_PRODUCTS, ROW_MOVES)
_PATHS = ("reference", "native", "gram", "triton")


def main() -> int:
    """Draw the pictures of every device."""
    for folder in table.devices():
        for path in draw_all(folder):
            print(path)
    return 0


def draw_all(folder: Path) -> list[Path]:
    """Draw the pictures of one device whose suites were measured; return their paths."""
    rows = [row for row in table.read_device(folder) if row.is_measured]
    incomplete = table.incomplete(folder)
    drawn = []
    with matplotlib.rc_context({**STYLE, "text.parse_math": True}):  # powers of ten
        for name, suites, draw in _PICTURES:
            chosen = [row for row in rows if row.suite in suites]
            if not chosen:
                continue
            figure = draw(chosen)
            partly = [suite for suite in suites if suite in incomplete]
            title = chosen[0].device + (f", {' and '.join(partly)} not complete" if partly else "")
            figure.suptitle(title, x=0.99, ha="right", color=MUTED, fontsize=8.5)
            path = folder / f"{name}.png"
            figure.savefig(path)
            drawn.append(path)
    return drawn


def paper(rows: Sequence[Row]) -> Figure:
    """Time against N_b = 6 ... 36 for forward and for forward and backward."""
    operations = sorted({row.operation for row in rows})
    figure, panels = _panels(len(operations))
    for axes, operation in zip(panels, operations, strict=True):
        chosen = where(_best_mode(rows), operation=operation)
        chosen = [row for row in chosen if row.provider not in (MOMENT_PRODUCTS, ROW_MOVES)]
        axes.set(title=f"{operation}, D = {chosen[0].d:,}, float32", xlabel="batch size N_b")
        axes.set_yscale("log")
        _lines(axes, chosen, lambda row: row.ms)
        axes.set_xticks(sorted({row.n for row in chosen}))
        _time_ticks(axes)
    _legend(figure, panels)
    return figure


def time(rows: Sequence[Row]) -> Figure:
    """Time against N on log axes for each D, with the slope that Eq. 8 predicts."""

    def eq8(chosen: Sequence[Row]) -> Guide:
        naive = [row for row in where(chosen, provider="naive") if row.eq8_flops]
        last = max(naive, key=lambda row: row.n, default=None)
        counts = {row.n: row.eq8_flops for row in chosen} if last else {}
        return "slope of Eq. 8", {n: last.ms * f / last.eq8_flops for n, f in counts.items()}

    return _against_n(rows, lambda row: row.ms, eq8, _time_ticks)


def memory(rows: Sequence[Row]) -> Figure:
    """Peak extra memory against N for each D, and the embeddings' own size."""
    return _against_n(
        [row for row in rows if row.provider not in _FLOORS],
        lambda row: row.peak_bytes / 2**20 if row.peak_bytes else None,
        lambda chosen: ("the embeddings", {row.n: 4 * row.n * row.d / 2**20 for row in chosen}),
        lambda axes: axes.set_ylabel("peak extra memory, MiB"),
    )


def roofline(rows: Sequence[Row]) -> Figure:
    """Rate against intensity, both by each provider's own count, under the machine's limits."""
    figure, (axes,) = _panels(1, (8.6, 5.2))
    chosen = [
        row
        for row in where(_best_mode(rows), operation=FORWARD_BACKWARD)
        if row.flops and row.bytes and row.provider not in (EMPTY, ROW_MOVES)
    ]
    intensities = []
    for provider in _providers(chosen):
        own = where(chosen, provider=provider)
        x = [row.flops / row.bytes for row in own]
        intensities += x
        axes.scatter(
            x, [row.flops / row.ms / 1e6 for row in own],
            s=10 + 9 * np.log10([row.n for row in own]) ** 1.5,
            color=_COLOURS.get(provider, MUTED), marker="D" if provider in _FLOORS else "o",
            label=shown(provider), alpha=0.85, edgecolors=PAPER, linewidths=0.6,
            zorder=4 if provider == "auto" else 3,
        )  # fmt: skip
    gemm = np.median([row.gemm_flops_s for row in chosen if row.gemm_flops_s]) / 1e9
    stream = np.median([row.bandwidth_bytes_s for row in chosen if row.bandwidth_bytes_s]) / 1e9
    ridge = gemm / stream
    low, high = min(*intensities, ridge / 4) / 2, max(*intensities, ridge * 4) * 2
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(gemm, stream * x), color=INK, linewidth=1.4, zorder=2)
    axes.set(
        xscale="log", yscale="log", xlim=(low, high), xlabel="counted FLOPs a counted byte",
        ylabel="GFLOP/s", title="counted rate against counted intensity; larger dots are larger N",
    )  # fmt: skip
    for text, at, offset, side in (
        (f"{gemm:,.0f} GFLOP/s: measured product", (high, gemm), (-4, 6), "right"),
        (f"{stream:,.0f} GB/s: measured sum", (low, stream * low), (8, -4), "left"),
    ):
        axes.annotate(
            text, at, offset, textcoords="offset points", ha=side, color=INK, fontsize=8.5
        )
    _legend(figure, [axes])
    return figure


def crossover(rows: Sequence[Row]) -> Figure:
    """The fastest path on the (N, D) grid; a frame in another colour where `auto` took another."""
    points: dict[tuple[int, int], list[Row]] = {}
    for row in where(rows, mode=EAGER, dtype="float32"):
        if row.group in (OURS, SCHEDULE):
            points.setdefault((row.n, row.d), []).append(row)
    ns, ds = (sorted(set(values)) for values in zip(*points, strict=True))
    figure, (axes,) = _panels(1, (0.72 * len(ns) + 1.2, 0.62 * len(ds) + 1.6))
    for (n, d), at in points.items():
        single = [row for row in at if row.provider != "auto"]
        if not single:
            continue
        best = min(single, key=lambda row: row.ms)
        x, y = ns.index(n), ds.index(d)
        axes.add_patch(_tile(x, y, 0.46, facecolor=_COLOURS[_path(best)]))
        for auto in where(at, provider="auto"):
            if _path(auto) not in ("", _path(best)):
                colour = _COLOURS[_path(auto)]
                axes.add_patch(_tile(x, y, 0.42, fill=False, edgecolor=colour, linewidth=4))
            ratio = auto.ms / best.ms
            weight = "bold" if ratio > _BAD_CHOICE else "normal"
            axes.text(
                x, y, f"{ratio:.2f}", ha="center", va="center", size=9, color=INK, weight=weight
            )
    axes.set_xticks(range(len(ns)), [f"{n:,}" for n in ns])
    axes.set_yticks(range(len(ds)), [f"{d:,}" for d in ds])
    axes.set(
        xlim=(-0.5, len(ns) - 0.5), ylim=(-0.5, len(ds) - 0.5), xlabel="N", ylabel="D",
        title="fastest path (fill), auto's if another (frame), time of auto / fastest",
    )  # fmt: skip
    axes.tick_params(length=0)
    axes.grid(visible=False)
    present = {_path(row) for at in points.values() for row in at}
    handles = [
        Line2D([], [], marker="s", linestyle="", markersize=9, color=_COLOURS[p], label=p)
        for p in _PATHS
        if p in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _path(row: Row) -> str:
    """The path that ran, without its schedule."""
    return row.path.partition(" ")[0]


def _tile(x: float, y: float, half: float, **style: Any) -> Rectangle:
    """A square around a point of the grid."""
    return Rectangle((x - half, y - half), 2 * half, 2 * half, **style)


_PICTURES: tuple[tuple[str, tuple[str, ...], Draw], ...] = (
    ("paper", ("paper",), paper),
    ("time", SWEEPS, time),
    ("memory", SWEEPS, memory),
    ("roofline", SWEEPS, roofline),
    ("crossover", ("crossover",), crossover),
)


def _against_n(
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    guide: Callable[[Sequence[Row]], Guide],
    finish: Callable[[Axes], object],
) -> Figure:
    """A panel for each D: the providers' lines, and a dotted one for comparison."""
    rows = where(_best_mode(rows), operation=FORWARD_BACKWARD)
    dimensions = sorted({row.d for row in rows})
    figure, panels = _panels(len(dimensions))
    for axes, d in zip(panels, dimensions, strict=True):
        chosen = where(rows, d=d)
        axes.set(xscale="log", yscale="log", xlabel="N")
        _lines(axes, chosen, value)
        low, high = axes.get_ylim()
        label, points = guide(chosen)
        if points:
            x, y = zip(*sorted(points.items()), strict=True)
            axes.plot(x, y, ":", color=INK, linewidth=1.2, label=label)
        axes.set_ylim(low / 2, high * 4)
        axes.set_title(f"D = {d:,}, C = {chosen[0].c}, forward and backward")
        finish(axes)
    _legend(figure, panels)
    return figure


def _best_mode(rows: Sequence[Row]) -> list[Row]:
    """Rows of graph replay where there are some: they compare the GPU and not Python."""
    has_graph = any(row.mode == GRAPH for row in rows)
    return [row for row in rows if row.mode == (GRAPH if has_graph else EAGER)]


def _lines(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float | None]) -> None:
    for provider in _providers(rows):
        points = [(row.n, value(row)) for row in where(rows, provider=provider)]
        points = sorted((n, v) for n, v in points if v is not None)
        if points:
            axes.plot(
                *zip(*points, strict=True),
                linestyle=_DASHED.get(provider, "-"),
                marker="" if provider in _DASHED else "o",
                markersize=3.5,
                color=_COLOURS.get(provider, MUTED),
                linewidth=2.6 if provider == "auto" else 1.4,
                zorder=3 if provider == "auto" else 2,
                label=shown(provider),
            )


def _providers(rows: Sequence[Row]) -> list[str]:
    """Their providers in the order of the palette."""
    present = {row.provider for row in rows}
    return [*(name for name in _COLOURS if name in present), *sorted(present - set(_COLOURS))]


def _panels(n: int, size: tuple[float, float] = (4.6, 4.4)) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(size[0] * n, size[1]), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, n, i + 1) for i in range(n)]


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, each name once."""
    found: dict[str, Artist] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    columns = max(2, int(figure.get_figwidth() / 1.9))
    figure.legend(found.values(), found, loc="outside lower center", ncols=columns)


def _time_ticks(axes: Axes) -> None:
    """Ticks at powers of ten; where these are few, also at 2 and 5 times them."""
    low, high = axes.get_ylim()
    powers = [10.0**k for k in range(-4, 7)]
    ticks = [t for t in powers if low <= t <= high]
    if len(ticks) < _FEWEST_TICKS:
        ticks = [t for t in (f * p for p in powers for f in (1, 2, 5)) if low <= t <= high]
    axes.set_yticks(ticks, [milliseconds(t) for t in ticks])
    axes.minorticks_off()
    axes.set_ylabel("time of a call")


if __name__ == "__main__":
    sys.exit(main())
