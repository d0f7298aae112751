"""Exact, fast batch-similarity triplet loss for PyTorch (Huang et al., Sensors 2021, 21, 764)."""

from .checks import available_impls
from .functional import BSTripletStats, bstriplet_loss, explain
from .loss import BSTripletLoss, CrossEntropyBSTripletLoss

__version__ = "0.1.0"
__all__ = [
    "BSTripletLoss",
    "BSTripletStats",
    "CrossEntropyBSTripletLoss",
    "available_impls",
    "bstriplet_loss",
    "explain",
]
