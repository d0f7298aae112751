"""Colours, type and line widths of every figure, on a light page and on a dark one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.font_manager import fontManager

from bstriplet.config import Scheme
from bstriplet.loss_registry import BUILT_IN
from bstriplet.text import printable

INK, MUTED, GRID, PAPER = "#1f2430", "#5c6370", "#d9dde3", "#ffffff"
# One hue per loss, with a tone for each way to draw batches: (random, mined). Blue and orange, and
# pale and strong, differ in all common forms of colour blindness and in grey print. The losses of
# the registry have the first hues, in its order. The rest are for other losses, and for further
# settings of a loss.
_HUES = (
    ("#6aa5d8", "#1f5fa8"),
    ("#b08bd0", "#6b3fa0"),
    ("#5fb39a", "#14705a"),
    ("#ea9a55", "#b8430f"),
    ("#dd86b4", "#a3265f"),
    ("#b9b04a", "#6b6500"),
    ("#c09a7a", "#744a26"),
    ("#58b7c6", "#0b6a7a"),
    ("#9aa0a8", "#4a4f57"),
)
LOSS_HUES = dict(zip(BUILT_IN, _HUES, strict=False))
MORE_HUES = _HUES[len(BUILT_IN) :]
# (random, mined); the second and third pair are for schemes beyond the last hue.
LINES: tuple[tuple[Any, Any], ...] = (
    ("--", "-"),
    (":", "-."),
    ((0, (1, 3)), (0, (8, 1.5, 1, 1.5, 1, 1.5))),
)
DARK = {
    INK: "#e8eaee",
    MUTED: "#a3abb8",
    GRID: "#343a46",
    PAPER: "#14171c",
    "#6aa5d8": "#4f8abf",
    "#1f5fa8": "#8fc6f7",
    "#ea9a55": "#c07a3a",
    "#b8430f": "#ffb27a",
    "#b08bd0": "#8d68b0",
    "#6b3fa0": "#d0b0f2",
    "#5fb39a": "#3f9079",
    "#14705a": "#8fdcc4",
    "#dd86b4": "#b55a89",
    "#a3265f": "#f5a3c7",
    "#b9b04a": "#8f8833",
    "#6b6500": "#dcd57a",
    "#58b7c6": "#3d8e9b",
    "#0b6a7a": "#86d7e3",
    "#c09a7a": "#97704f",
    "#744a26": "#e0bd9c",
    "#9aa0a8": "#7b828c",
    "#4a4f57": "#c3c9d1",
}
# Okabe and Ito's colours, and three more of middle lightness: seen on white and on black.
CLASS_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
    "#56b4e9", "#8c6bb1", "#8a8f98", "#a6761d", "#66a61e",
)  # fmt: skip
CLASS_MARKERS = "o^sDvP<X>"
# Fonts for characters that the first one lacks, if installed: classes have names in any script.
_FONTS = (
    "DejaVu Sans",
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei"),
    *("PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS"),
)
_INSTALLED = {font.name for font in fontManager.ttflist}
STYLE: dict[Any, Any] = {
    "font.family": [name for name in _FONTS if name in _INSTALLED],
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$5 bill"
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.facecolor": PAPER,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.facecolor": PAPER,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "bstriplet",
}
LEGEND_LINE = 0.2
LEGEND_CLASSES = 20
LABELLED_CLASSES = 25


@dataclass(frozen=True)
class Look:
    """How a scheme is drawn: its colour, the strong tone of its hue, and its line."""

    colour: str
    strong: str
    line: Any


def looks(schemes: Sequence[Scheme]) -> dict[Scheme, Look]:
    """The look of each scheme of a comparison in all its pictures.

    No two schemes of one network look alike, up to 24 settings of one loss. Schemes of different
    networks may: where curves would overlap, each network has a panel of its own.
    """
    settings_of: dict[tuple[str, str], list[Any]] = defaultdict(list)
    hue_of = {(loss, 0): (hue, LINES[0]) for loss, hue in LOSS_HUES.items()}
    spare = [(hue, line) for line in LINES for hue in MORE_HUES]
    spare += [(hue, line) for line in LINES[1:] for hue in LOSS_HUES.values()]
    found = {}
    for scheme in schemes:
        seen, settings = settings_of[scheme.loss, scheme.batches], scheme.without("backbone")
        if settings not in seen:
            seen.append(settings)
        key = scheme.loss, seen.index(settings)
        if key not in hue_of:
            hue_of[key] = spare.pop(0) if len(spare) > 1 else spare[0]
        hue, line = hue_of[key]
        mined = scheme.batches == "mined"
        found[scheme] = Look(hue[mined], hue[True], line[mined])
    return found


def legend_below(axes: Axes) -> None:
    """Put the legend below the axes, where it covers no curve; an entry takes `LEGEND_LINE`."""
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.16), borderaxespad=0)


def short_name(name: str) -> str:
    """A class name that fits a tick or a legend; legends would leave out a name like "_a"."""
    name = printable(name)
    short = name if len(name) <= 18 else f"{name[:17]}…"
    return f" {short}" if short.startswith("_") else short
