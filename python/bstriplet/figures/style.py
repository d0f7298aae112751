"""Colours, type and line widths of every figure, on a light page and on a dark one."""

from __future__ import annotations

from typing import Any

from bstriplet.config import Scheme

INK, MUTED, GRID, PAPER = "#1f2430", "#5c6370", "#d9dde3", "#ffffff"
# A hue a loss, a tone a way to draw batches: (random, mined). Blue against orange, and pale
# against strong, stay apart in all common colour blindness and in grey print.
SCHEME_COLOURS = {
    "ce": ("#6aa5d8", "#1f5fa8"),
    "ce+bst": ("#ea9a55", "#b8430f"),
    "ce+triplet": ("#b08bd0", "#6b3fa0"),
    "ce+ls": ("#5fb39a", "#14705a"),
}
OTHER_COLOURS = ("#9aa0a8", "#4a4f57")
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
    "#9aa0a8": "#7b828c",
    "#4a4f57": "#c3c9d1",
}
# Okabe and Ito's colours, and three more of middle lightness: seen on white and on black.
CLASS_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00",
    "#56b4e9", "#8c6bb1", "#8a8f98", "#a6761d", "#66a61e",
)  # fmt: skip
CLASS_MARKERS = "o^sDvP<X>"
STYLE: dict[Any, Any] = {
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
LEGEND_CLASSES = 20
LABELLED_CLASSES = 25


def scheme_colour(scheme: Scheme) -> str:
    """The colour of a scheme in every picture; `DARK` has its counterpart on a dark page."""
    return SCHEME_COLOURS.get(scheme.loss, OTHER_COLOURS)[scheme.batches == "mined"]


def short_name(name: str) -> str:
    """A class name that fits a tick or a legend; legends leave out what begins with "_"."""
    short = name if len(name) <= 18 else f"{name[:17]}…"
    return f" {short}" if short.startswith("_") else short
