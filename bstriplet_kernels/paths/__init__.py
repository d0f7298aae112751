"""One module for each way of computing the loss; here, their common shape and their names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..spec import Rows, Spec

State = tuple[Tensor, ...]


class Path(NamedTuple):
    """One way of computing the loss, as two functions of tensors and numbers.

    forward(embeddings [N, D], ref_emb [M, D] or None, labels [N] int64, ref_labels [M] int64 or
    None, spec) -> (loss, rows, state): the reduced loss, Eq. 3's two means for each row, and the
    tensors that `backward` wants kept.
    backward(grad_loss, embeddings, ref_emb, labels, ref_labels, rows, state, spec) ->
    (gradient of the embeddings, gradient of ref_emb or None), in their dtypes.
    """

    forward: Callable[..., tuple[Tensor, Rows, State]]
    backward: Callable[..., tuple[Tensor, Tensor | None]]


_MODULES = {"reference": "plain"}
"""impl name -> the module of this folder that holds its `PATH`, imported when first used."""


def names() -> tuple[str, ...]:
    """Every name that `impl` can take beside "auto", whether or not it can run here."""
    return tuple(_MODULES)


def get(name: str) -> Path:
    """The path of that name; ImportError where what it is built on is missing."""
    return importlib.import_module(f"{__name__}.{_MODULES[name]}").PATH


__all__ = ["Path", "Rows", "Spec", "State", "get", "names"]
