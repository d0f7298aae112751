"""Embeddings on their first two principal components, as in Fig. 6."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.style import CLASS_COLOURS, CLASS_MARKERS, LEGEND_CLASSES, short_name
from bstriplet.study.read_runs import Comparison, Run, scheme_label


def embeddings(comparison: Comparison) -> Picture:
    """Embeddings on their first two principal components, as in Fig. 6: one panel per scheme."""
    panels, rows = [], []
    for run in _first_runs(comparison):
        found = run.embeddings
        if min(found.vectors.shape) < 2:
            continue
        plane, shares = principal_plane(found.vectors)
        panels.append(_embedding_panel(run, plane, shares))
        rows += [
            (scheme_label(run.scheme), run.seed, found.classes[label], float(x), float(y))
            for label, (x, y) in zip(found.labels, plane, strict=True)
        ]
    return Picture(
        name="embeddings",
        title="Embeddings",
        caption=(
            "Embeddings of the training images of one seed, as in the paper's Fig. 6. They are "
            "L2-normalised, as in the cosine similarity, and projected on the first two principal "
            "components of each scheme. Axes of different panels are different directions."
        ),
        panels=tuple(panels),
        size=(4.2, 4.4),
        header=("scheme", "seed", "class", "component_1", "component_2"),
        rows=tuple(rows),
    )


def principal_plane(vectors: NDArray[np.floating]) -> tuple[NDArray[np.float64], list[float]]:
    """L2-normalise embeddings and project them on their first two principal components.

    Args:
        vectors: [N, D] finite floats, N and D at least 2. A zero row stays zero.

    Returns:
        The projection [N, 2], and the share of the variance along each of its two axes (0 where
        all embeddings coincide).
    """
    raw = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(raw, axis=1, keepdims=True)
    unit = np.divide(raw, norms, out=np.zeros_like(raw), where=norms > 0)
    with np.errstate(invalid="ignore"):  # 0 / 0 for a network that maps all images to one point
        pca = PCA(n_components=2, random_state=0).fit(unit)
    return pca.transform(unit), np.nan_to_num(pca.explained_variance_ratio_).tolist()


def _first_runs(comparison: Comparison) -> list[Run]:
    """One finished run per scheme: of the first seed that all have finished, else its first."""
    by_scheme = [comparison.finished_of(scheme) for scheme in comparison.schemes]
    by_scheme = [runs for runs in by_scheme if runs]
    finished = [{run.seed for run in runs} for runs in by_scheme]
    shared = [seed for seed in comparison.seeds if all(seed in seeds for seeds in finished)]
    return [
        next((run for run in runs if shared and run.seed == shared[0]), runs[0])
        for runs in by_scheme
    ]


def _embedding_panel(run: Run, plane: NDArray[np.float64], shares: Sequence[float]) -> Panel:
    classes, labels = run.embeddings.classes, run.embeddings.labels
    marker_size = float(np.clip(90 / np.sqrt(len(labels)), 2.5, 6))

    def draw(axes: Axes) -> None:
        for index, name in enumerate(classes):
            axes.plot(
                *plane[labels == index].T,
                CLASS_MARKERS[index % len(CLASS_MARKERS)],
                color=CLASS_COLOURS[index % len(CLASS_COLOURS)],
                markersize=marker_size,
                markeredgewidth=0,
                alpha=0.85,
                label=short_name(name),
                rasterized=True,  # as vectors, thousands of points weigh megabytes
            )
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel(f"component 1 ({shares[0]:.0%} of variance)")
        axes.set_ylabel(f"component 2 ({shares[1]:.0%} of variance)")
        if len(classes) <= LEGEND_CLASSES:
            axes.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.14),
                ncols=5 if max(map(len, classes)) < 6 else 2,
                markerscale=6 / marker_size,
                handletextpad=0.2,
                columnspacing=1.0,
            )

    return Panel(f"{scheme_label(run.scheme)}, seed {run.seed}", draw)
