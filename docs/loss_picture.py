"""Draw docs/loss.png: what the loss pulls together and what it pushes apart.

    python docs/loss_picture.py

Twelve embeddings of two classes in the plane, the negative gradient of their loss, and the same
embeddings after gradient steps on it. Everything drawn is computed by the package.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from bstriplet_kernels import bstriplet_loss

PICTURE = Path(__file__).with_name("loss.png")
COLOURS = ("#1f5fa8", "#b8430f")
INK, MUTED = "#1f2430", "#5c6370"
MARGIN, STEPS, RATE = 0.9, 200, 0.3
Floats = NDArray[np.float64]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit embeddings float64 [12, 2] of two classes that overlap, and labels [12]."""
    degrees = torch.tensor([4, 17, 29, 41, 52, 63, 35, 46, 57, 69, 82, 96], dtype=torch.float64)
    angles = degrees.deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1), torch.arange(12) // 6


def gradient(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return dL/df, float64 [N, D]."""
    leaf = embeddings.detach().requires_grad_()
    (found,) = torch.autograd.grad(bstriplet_loss(leaf, labels, margin=MARGIN), leaf)
    return found


def descend(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the embeddings after gradient steps, each back on the unit circle."""
    for _ in range(STEPS):
        embeddings = embeddings - RATE * len(labels) / 4 * gradient(embeddings, labels)
        embeddings = torch.nn.functional.normalize(embeddings)
    return embeddings


def draw_vectors(axes: Axes, embeddings: Floats, labels: Floats, pulls: Floats | None) -> None:
    """Draw embeddings as vectors, and where the loss pulls each of them."""
    arc = np.linspace(-0.1, np.pi / 2 + 0.2, 100)
    axes.plot(np.cos(arc), np.sin(arc), color="#d9dde3", linewidth=1, zorder=0)
    for vector, label in zip(embeddings, labels, strict=True):
        axes.plot([0, vector[0]], [0, vector[1]], color=COLOURS[int(label)], linewidth=1.2)
        axes.plot(*vector, "os"[int(label)], color=COLOURS[int(label)], markersize=5)
    if pulls is not None:
        for vector, pull, label in zip(embeddings, pulls, labels, strict=True):
            start = (1.06 + 0.1 * label) * vector  # a ring a class: arrows do not cross
            axes.annotate(
                "",
                xytext=start,
                xy=start + pull,
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": COLOURS[int(label)],
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
            )
    axes.set(xlim=(-0.25, 1.3), ylim=(-0.12, 1.32), aspect="equal")
    axes.axis("off")


def draw_similarities(axes: Axes, embeddings: Floats, row: int) -> None:
    """Draw the squared cosines of all pairs, and frame one row's positives and negatives."""
    squares = (embeddings @ embeddings.T) ** 2
    half = len(squares) // 2
    axes.imshow(squares, cmap="Greys", vmin=0, vmax=1)
    for number in range(len(squares)):
        axes.plot(number, number, "x", color=MUTED, markersize=3)
    for start, colour in ((0, COLOURS[0]), (half, COLOURS[1])):
        frame = matplotlib.patches.Rectangle(
            (start - 0.5, row - 0.5), half, 1, fill=False, edgecolor=colour, linewidth=2.2
        )
        axes.add_patch(frame)
    axes.set_xticks([half / 2 - 0.5, 1.5 * half - 0.5], ["positives", "negatives"], color=INK)
    axes.set_yticks([row], ["row i"], color=INK)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)


def picture() -> Figure:
    """Return the figure: before and after, as vectors and as similarities."""
    before, labels = batch()
    after = descend(before, labels)
    losses = [float(bstriplet_loss(x, labels, margin=MARGIN)) for x in (before, after)]
    pulls = -len(labels) * 0.17 * gradient(before, labels).numpy()
    figure = Figure(figsize=(10.4, 3.1), dpi=160, layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1.15, 1, 1.15, 1))
    for place, embeddings, arrows, loss in (
        (0, before, pulls, losses[0]),
        (2, after, None, losses[1]),
    ):
        vectors = embeddings.numpy()
        draw_vectors(axes[place], vectors, labels.numpy(), arrows)
        draw_similarities(axes[place + 1], vectors, row=3)
        when = "A batch, its negative gradient" if arrows is not None else "The same after descent"
        axes[place].set_title(when, fontsize=10.5, color=INK, loc="left")
        axes[place].text(1.3, 1.2, f"L = {loss:.2f}", fontsize=10.5, color=INK, ha="right")
        axes[place + 1].set_title("Squared cosines s²", fontsize=10.5, color=INK, loc="left")
    figure.supxlabel(
        r"$\ell_i=\max\left(0,\ m-\mathrm{mean}_{positives}\,s_{ij}^2"
        r"+\mathrm{mean}_{negatives}\,s_{ik}^2\right)$:"
        "   same class: pulled into one direction, other classes: pushed to a right angle",
        fontsize=10.5,
        color=INK,
    )
    return figure


if __name__ == "__main__":
    picture().savefig(PICTURE)
