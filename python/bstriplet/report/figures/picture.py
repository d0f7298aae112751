"""A figure as panels and numbers, and its drawing as PNG and SVG.

A `Picture` is drawn twice from one description: all panels together for figures/NAME.png and
.svg, and each panel by itself for the report. The report shows them side by side on a wide screen
and one below the other on a phone.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bstriplet.report.figures.style import DARK, STYLE
from bstriplet.storage import write_atomic, write_text
from bstriplet.study.statistics import to_csv


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its title and the function that draws into it."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Picture:
    """One figure of the report.

    `name` is its file name without ending, `size` the width and height of a panel in inches,
    `header` and `rows` the numbers that it shows.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    size: tuple[float, float]
    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def write(self, folder: Path) -> None:
        """Write NAME.png, NAME.svg and NAME.csv into an existing folder, each atomically."""
        write_atomic(folder / f"{self.name}.png", _render(self.panels, self.size, "png"))
        svg = _follow_colour_scheme(_render(self.panels, self.size, "svg").decode())
        write_text(folder / f"{self.name}.svg", svg)
        write_text(folder / f"{self.name}.csv", to_csv(self.header, self.rows))

    def panel_svgs(self) -> list[str]:
        """Each panel as an SVG document of its own that follows the reader's light or dark mode."""
        return [
            _follow_colour_scheme(_render((panel,), self.size, "svg").decode())
            for panel in self.panels
        ]


def _render(panels: Sequence[Panel], size: tuple[float, float], form: str) -> bytes:
    """Draw panels side by side, at most two in a row, as PNG or SVG."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A user's own settings may need programs that are not installed, such as LaTeX.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        # The PNG has a box for a missing glyph; the SVG and the CSV hold the name.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for index, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, index)
            axes.set_title(panel.title)
            panel.draw(axes)
        buffer = io.BytesIO()
        if form == "svg":
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        else:
            figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _follow_colour_scheme(svg: str) -> str:
    """Let an SVG take the colours of `DARK` where its reader prefers dark.

    Every colour becomes a CSS variable that falls back to the light colour, so that a program
    that knows no variables, or no dark mode, shows the light picture.
    """
    for light in DARK:
        svg = svg.replace(light, f"var(--c{light[1:]}, {light})")
    dark = " ".join(f"--c{light[1:]}: {colour};" for light, colour in DARK.items())
    style = (
        "<style>svg { color-scheme: light dark; } "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    )
    head, tag, rest = svg.partition("<svg ")
    attributes, end, body = rest.partition(">")
    return head + tag + attributes + end + style + body
