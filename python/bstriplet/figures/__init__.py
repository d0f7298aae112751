"""The figures of a report: a function each, from runs to a `Picture` and its numbers."""

from bstriplet.figures.accuracy import accuracies
from bstriplet.figures.batch_size import batch_sizes
from bstriplet.figures.calibration import calibration
from bstriplet.figures.confusion import confusion_matrices
from bstriplet.figures.grid import sweep
from bstriplet.figures.loss import loss_curves
from bstriplet.figures.mistakes import misclassified
from bstriplet.figures.picture import Panel, Picture
from bstriplet.figures.projection import embeddings, principal_plane
from bstriplet.figures.rates import RATES, roc, roc_curves
from bstriplet.figures.style import DARK, looks
from bstriplet.results import Comparison

__all__ = [
    "DARK",
    "RATES",
    "Panel",
    "Picture",
    "accuracies",
    "batch_sizes",
    "calibration",
    "confusion_matrices",
    "embeddings",
    "looks",
    "loss_curves",
    "misclassified",
    "pictures",
    "principal_plane",
    "roc",
    "roc_curves",
    "sweep",
]


def pictures(comparison: Comparison) -> list[Picture]:
    """All pictures that the runs so far allow, in the order of the report."""
    drawn = [
        accuracies(comparison),
        sweep(comparison),
        loss_curves(comparison),
        embeddings(comparison),
        confusion_matrices(comparison),
        roc_curves(comparison),
        calibration(comparison),
        misclassified(comparison),
    ]
    return [picture for picture in drawn if picture.panels]
