"""Every check of an argument, once, at the public edge; every message names what is allowed."""

from __future__ import annotations

import difflib
import functools
import math
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ._torch import is_known_true
from .paths import PATHS
from .spec import SIMILARITIES, Similarity, Spec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NUMBER = (float, Real)  # float first: asking an abstract class takes microseconds
_SIGMA = {"corrected": 1.0, "printed": -1.0}
_REDUCTIONS = ("mean", "sum", "none")
_LARGEST = 1 << 29  # size in a shape; torch can then count the bytes of two sizes' product


class Options(NamedTuple):
    """The checked options of a loss: what to compute, by which path, for which batch."""

    spec: Spec
    impl: str
    group: ProcessGroup | None
    return_stats: bool

    @property
    def keywords(self) -> dict[str, Any]:
        """The options as keyword arguments of `bstriplet_loss`."""
        spec = self.spec
        return {
            "margin": spec.margin,
            "similarity": spec.similarity.name,
            "eq3": "corrected" if spec.sigma > 0 else "printed",
            "reduction": spec.reduction,
            "group": self.group,
            "impl": self.impl,
            "eps": spec.eps,
            "return_stats": self.return_stats,
        }


def make_options(
    margin: float,
    similarity: str,
    eq3: str,
    reduction: str,
    eps: float,
    impl: str,
    return_stats: bool,
    group: ProcessGroup | None = None,
) -> Options:
    """The options of `bstriplet_loss`, checked."""
    check_impl(impl)
    if group is not None:
        check_group(group)
        refuse_named_impl(impl, "group")
    if not isinstance(return_stats, bool):
        raise TypeError(f"return_stats must be True or False, got {_named(return_stats)}")
    return Options(make_spec(margin, similarity, eq3, reduction, eps), impl, group, return_stats)


remembered_options = functools.lru_cache(1024, typed=True)(make_options)
"""`make_options` with a cache, which saves 2 us: a tenth of a small batch's call.

`typed=True` keeps 1 and True apart.
"""


def available_impls() -> tuple[str, ...]:
    """The names that `impl` can take here, beside "auto"."""
    return tuple(name for name, path in PATHS.items() if path.missing() is None)


def check_group(group: ProcessGroup) -> None:
    """Raise unless this is a process group, or what `new_group` returns to a rank outside it."""
    from torch.distributed import GroupMember, ProcessGroup

    if not isinstance(group, ProcessGroup) and group is not GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            f"group must be a torch.distributed process group, got {_named(group)}; "
            "torch.distributed.group.WORLD is the default one"
        )


def check_weight(weight: float) -> float:
    """lambda of Eq. 7 as a float; raises unless it is a finite number >= 0."""
    if isinstance(weight, bool) or not isinstance(weight, _NUMBER):
        raise TypeError(f"weight must be a number >= 0, got {_named(weight)}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be a finite number >= 0, got {weight}")
    return float(weight)


def make_spec(margin: float, similarity: str, eq3: str, reduction: str, eps: float = 1e-12) -> Spec:
    """Check these options and return them as a `Spec`."""
    if isinstance(margin, bool) or not isinstance(margin, _NUMBER):
        raise TypeError(f"margin must be a number in [0, 1], got {_named(margin)}")
    phi = check_similarity(similarity)
    _check_word("eq3", eq3, tuple(_SIGMA))
    if isinstance(eps, bool) or not isinstance(eps, _NUMBER):
        raise TypeError(f"eps must be a positive finite number, got {_named(eps)}")
    spec = Spec(float(margin), _SIGMA[eq3], phi, reduction, float(eps))
    check_spec(spec)
    return spec


def check_similarity(similarity: str) -> Similarity:
    """The `Similarity` of that name; raises if there is none."""
    _check_word("similarity", similarity, tuple(SIMILARITIES))
    return SIMILARITIES[similarity]


def check_spec(spec: Spec) -> None:
    """Raise unless margin, sigma, reduction and eps are allowed."""
    if not 0 <= spec.margin <= 1:
        raise ValueError(f"margin must be in [0, 1], got {spec.margin}")
    if spec.sigma not in _SIGMA.values():
        raise ValueError(f"sigma must be 1 or -1, got {spec.sigma}")
    _check_word("reduction", spec.reduction, _REDUCTIONS)
    if not 0 < spec.eps < math.inf:
        raise ValueError(f"eps must be a positive finite number, got {spec.eps}")


def check_impl(impl: str) -> None:
    """Raise unless `impl` is "auto" or a path that can run here."""
    _check_word("impl", impl, ("auto", *PATHS))
    if impl == "auto":
        return
    missing = PATHS[impl].missing()
    if missing is not None:
        raise RuntimeError(
            f"impl={impl!r} cannot run here: {missing}. "
            f"Available: {', '.join(('auto', *available_impls()))}"
        )


def refuse_input(impl: str, embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> None:
    """Raise if the path of that name cannot run here, or does not take this input."""
    check_impl(impl)
    reason = PATHS[impl].refuses(embeddings, ref_emb, spec)
    if reason is not None:
        raise ValueError(f'impl={impl!r} does not take this input: {reason}; use impl="auto"')


def refuse_named_impl(impl: str, given: str) -> None:
    """Raise if a path is named together with an argument that no path serves."""
    if impl != "auto":
        raise ValueError(
            f"impl={impl!r} cannot be combined with {given}: that loss is computed in plain torch; "
            'use impl="auto"'
        )


def refuse_distributed(name: str, tensor: Tensor) -> None:
    """Raise if a tensor is a DTensor, whose parts lie on the ranks."""
    if type(tensor).__name__ == "DTensor":  # by name: importing the class takes half a second
        raise TypeError(
            f"{name} is a DTensor, whose parts lie on the ranks: pass full_tensor() of "
            "embeddings and labels, or to_local() of both with group=, which also gives the loss "
            "of the whole batch"
        )


def check_embeddings(
    embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None
) -> None:
    """Raise unless shapes, dtypes and devices fit together; `labels` None: no labels are used."""
    _check_matrix("embeddings", embeddings)
    if labels is not None:
        _check_labels("labels", labels, "embeddings", embeddings)
        if (ref_emb is None) != (ref_labels is None):
            given, absent = ("ref_emb", "ref_labels")[:: 1 if ref_labels is None else -1]
            raise ValueError(f"{given} was given without {absent}; give both or neither")
    if ref_emb is None:
        return
    _check_matrix("ref_emb", ref_emb)
    if ref_emb.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"ref_emb must have as many columns as embeddings, {embeddings.shape[1]}, "
            f"got shape {tuple(ref_emb.shape)}"
        )
    if ref_emb.device != embeddings.device:
        raise ValueError(
            f"ref_emb is on {ref_emb.device} and embeddings on {embeddings.device}; "
            "move one to the other's device"
        )
    if ref_labels is not None:
        _check_labels("ref_labels", ref_labels, "ref_emb", ref_emb)


def check_shape(
    shape: Any, classes: Any, ref_shape: Any, ref_labels: Any, dtype: Any, device: Any
) -> tuple[tuple[int, int], int | None, list[int], torch.dtype, torch.device]:
    """Check a shape for `explain`; return (N, D), M, the sizes of classes, dtype and device."""
    if ref_labels is not None:
        raise TypeError("ref_labels was given with a shape; give the sizes of classes as labels")
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype!r}")
    device = "cpu" if device is None else device
    kind = device.type if isinstance(device, torch.device) else str(device).partition(":")[0]
    _check_word("device", kind, ("cpu", "cuda"))
    rows = torch.empty(_sizes("embeddings", shape), dtype=dtype, device="meta")
    columns = None
    if ref_shape is not None:
        columns = torch.empty(_sizes("ref_emb", ref_shape), dtype=dtype, device="meta")
    check_embeddings(rows, None, columns, None)
    check_batch(rows, columns)
    (n, d), m = rows.shape, None if columns is None else len(columns)
    counts = _class_sizes(classes, n if m is None else m)
    return (n, d), m, counts, dtype, torch.device(kind)


def _sizes(name: str, given: Any) -> tuple[int, ...]:
    are_two = isinstance(given, tuple | list) and len(given) == 2
    if are_two and all(type(size) is int and 0 <= size <= _LARGEST for size in given):
        return tuple(given)
    raise TypeError(f"{name} must be a torch.Tensor or a shape of two sizes, got {_named(given)}")


def _class_sizes(classes: Any, columns: int) -> list[int]:
    """The sizes of classes as given, or those of a given number of classes of even size."""
    if type(classes) is int:
        if not 1 <= classes <= columns:
            raise ValueError(
                f"labels must be a number of classes from 1 to {columns}, got {classes}"
            )
        return [columns // classes + (k < columns % classes) for k in range(classes)]
    if not isinstance(classes, tuple | list) or any(type(c) is not int for c in classes):
        raise TypeError(
            "labels must be the number of classes of a shape or the size of each, got "
            f"{_named(classes)}"
        )
    if sum(classes) != columns or min(classes, default=0) < 1:
        raise ValueError(
            f"labels must be sizes of classes, each at least 1, that add up to {columns}, got "
            f"{list(classes)[:9]} that add up to {sum(classes)}"
        )
    return list(classes)


def check_indices(indices_tuple: tuple[Tensor, ...]) -> None:
    """Raise unless the tuple holds three or four one-dimensional integer index tensors."""
    if not isinstance(indices_tuple, tuple | list) or len(indices_tuple) not in (3, 4):
        got = (
            f"{len(indices_tuple)} entries"
            if isinstance(indices_tuple, tuple | list)
            else type(indices_tuple).__name__
        )
        raise ValueError(
            "indices_tuple must be triplets (anchors, positives, negatives) or pairs "
            f"(anchors, positives, anchors, negatives), got {got}"
        )
    for i, index in enumerate(indices_tuple):
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
            kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"indices_tuple[{i}] must be an int64 or int32 tensor, got {kind}")
    partners = (0, 0, 0) if len(indices_tuple) == 3 else (0, 0, 2, 2)
    for i, partner in enumerate(partners):
        own, other = (tuple(indices_tuple[k].shape) for k in (i, partner))
        if own != other or len(own) != 1:
            raise ValueError(
                "the index tensors of a pair must be one-dimensional and of one length, got "
                f"shape {own} of indices_tuple[{i}] and {other} of indices_tuple[{partner}]"
            )


def _check_matrix(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    refuse_distributed(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}")
    if value.dim() != 2 or value.shape[1] == 0:
        raise ValueError(
            f"{name} must have shape [N, D] with D >= 1, got shape {tuple(value.shape)}"
        )


def _check_labels(name: str, labels: Tensor, of: str, matrix: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(labels).__name__}")
    refuse_distributed(name, labels)
    if labels.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {labels.layout}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise TypeError(f"{name} must be of an integer dtype or bool, got {labels.dtype}")
    if labels.dim() != 1 or is_known_true(labels.shape[0] != matrix.shape[0]):
        raise ValueError(
            f"{name} must have shape [{matrix.shape[0]}], one label for each row of {of}, "
            f"got shape {tuple(labels.shape)}"
        )
    if labels.device != matrix.device:
        raise ValueError(
            f"{name} is on {labels.device} and {of} on {matrix.device}; "
            "move one to the other's device"
        )


def check_batch(embeddings: Tensor, ref_emb: Tensor | None) -> None:
    """Raise if there are fewer than 2 rows, or with ref_emb than 1 on either side."""
    if ref_emb is not None:
        for name, side in (("embeddings", embeddings), ("ref_emb", ref_emb)):
            if is_known_true(side.shape[0] < 1):
                raise ValueError(f"{name} has no rows; at least 1 is needed")
        return
    n = embeddings.shape[0]
    if is_known_true(n < 2):
        raise ValueError(
            f"embeddings has {n} row{'' if n == 1 else 's'}, and a row is compared with the others "
            "of its batch: at least 2 are needed. Where the last batch of an epoch is the cause, "
            "pass drop_last=True to the DataLoader"
        )


def _check_word(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if isinstance(value, str) and value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")


def _named(value: object) -> str:
    """A value of a wrong type and that type, for a message."""
    return f"{value!r} of type {type(value).__name__}"
