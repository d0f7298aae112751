"""The figures of a report: one function per figure turns runs into a `Picture`."""

from bstriplet.report.figures.accuracy import accuracies
from bstriplet.report.figures.batch_size import batch_sizes
from bstriplet.report.figures.calibration import calibration
from bstriplet.report.figures.confusion import confusion_matrices
from bstriplet.report.figures.embeddings import embeddings, principal_plane
from bstriplet.report.figures.loss import loss_curves
from bstriplet.report.figures.mistakes import misclassified
from bstriplet.report.figures.picture import Panel, Picture
from bstriplet.report.figures.roc import RATES, roc, roc_curves
from bstriplet.report.figures.style import DARK, looks
from bstriplet.report.figures.sweep_grid import sweep
from bstriplet.study.read_runs import Comparison

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
