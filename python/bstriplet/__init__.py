"""Mining, sampling, data, training and reports around the batch-similarity triplet loss.

Importing this package is cheap: ``GroupBatchSampler`` and ``mine_groups`` import torch and
scikit-learn when they are first used. They never import timm or matplotlib.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bstriplet.mining import mine_groups
    from bstriplet.sampler import GroupBatchSampler

_MODULE_OF = {"GroupBatchSampler": "bstriplet.sampler", "mine_groups": "bstriplet.mining"}

__all__ = ["GroupBatchSampler", "mine_groups"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
