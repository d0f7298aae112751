"""Which path runs, and what it costs: Eq. 8, each path's own counts, predicted times.

The time of a path is predicted as call + flop * FLOPs + byte * bytes with constants measured on
each kind of device (`calibration.py`); `impl="auto"` takes the path of the least predicted time
among those that can run. On a kind of device that has not been measured it goes by a rule: pairs up
to N = 3 D, second moments beyond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._torch import PLAIN_TENSORS, dispatches_itself
from .calibration import CONSTANTS
from .checks import (
    REMEMBERED,
    Target,
    check_batch,
    check_embeddings,
    check_spec,
    refuse_input,
)
from .cost import Cost, Work
from .paths import PATHS, fused, gram, native, plain
from .spec import Spec

_MOMENTS_FROM = 3
"""Where nothing is measured: second moments from N = 3 D on (about 6 N D^2 against 2-3 N^2 D)."""
_ASSUMED_CLASSES = 3
"""`choose` does not ask the device how many classes there are; the paper has two or three."""


@dataclass(frozen=True)
class Plan:
    """What `impl="auto"` does with an input, and why; `print` it.

    path: the name that `impl` takes. cost: that path's own counts. eq8_flops: the paper's figure
    for the forward alone. predicted: seconds by path, where the device has been measured.
    """

    path: str
    reason: str
    work: Work
    n_classes: int
    cost: Cost
    eq8_flops: int
    predicted: dict[str, float]

    def __str__(self) -> str:
        work, cost = self.work, self.cost
        against = "" if work.m is None else f", M = {work.m:,}"
        lines = [
            f"N = {work.n:,}{against}, D = {work.d:,}, {self.n_classes:,} classes, "
            f"{str(work.dtype).removeprefix('torch.')}"
            f"{', forward and backward' if work.wants_gradient else ', forward'}",
            f"path          {self.path}: {self.reason}",
            f"FLOPs         {cost.flops:.3e}",
            f"bytes moved   {cost.bytes:.3e}",
            f"extra memory  {cost.extra_memory:.3e} bytes, "
            f"{cost.extra_memory / max(1, work.embedding_bytes):.2f} x the embeddings",
            f"Eq. 8         {self.eq8_flops:.3e} FLOPs, forward alone",
        ]
        lines += [
            f"predicted     {path}: {1e3 * seconds:.3f} ms"
            for path, seconds in sorted(self.predicted.items(), key=lambda item: item[1])
        ]
        return "\n".join(lines)


def eq8_flops(n: int, d: int, c: int) -> int:
    """Eq. 8 as printed: the FLOPs of the loss for N_b = n, l = d and c classes.

    Its l^2 + l - 1 operations for one entry of S are 2 l - 1; `path_cost("reference", ...)` counts
    what is done.
    """
    return (d * d + c * c + d + c + 3) * n * n + (2 * d + 5) * n


def path_cost(path: str, work: Work, class_sizes: Sequence[int]) -> Cost:
    """What the path of that name counts for this work; class_sizes: members among the columns."""
    return Cost(*_OPERATIONS[path](work, class_sizes), _MEMORY[path](work, class_sizes))


_planned: dict[tuple[object, ...], tuple[Spec, str]] = {}


def checked_plan(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    target: Target,
    wants_gradient: bool,
) -> tuple[Spec, str]:
    """Check the inputs; return the spec to run and the path's name. Raises as `bstriplet_loss`.

    Remembered by all that decides it, so that in a training loop check and choice are a look-up.
    """
    key: tuple[object, ...] | None = None
    if type(embeddings) in PLAIN_TENSORS and type(labels) in PLAIN_TENSORS:
        key = (  # on the CPU it holds True: to make and compare a torch.device is slow
            embeddings.shape,
            embeddings.dtype,
            embeddings.layout,
            embeddings.is_cpu or embeddings.device,
            labels.shape,
            labels.dtype,
            labels.layout,
            labels.is_cpu or labels.device,
            target,
            wants_gradient,
        )
        if ref_emb is not None or ref_labels is not None:
            key = (*key, _form(ref_emb), _form(ref_labels))
        planned = _planned.get(key)
        if planned is not None:
            return planned
    check_embeddings(embeddings, labels, ref_emb, ref_labels)
    check_batch(embeddings, ref_emb)
    check_spec(target.spec)
    spec = target.spec._replace(wants_gradient=wants_gradient, wants_rows=target.return_stats)
    if target.impl == "auto":
        planned = spec, choose(embeddings, ref_emb, spec)
    else:
        refuse_input(target.impl, embeddings, ref_emb, spec)
        planned = spec, target.impl
    if key is not None:
        if len(_planned) >= REMEMBERED:
            _planned.clear()
        _planned[key] = planned
    return planned


def _form(given: Tensor | None) -> object:
    """What checks and plans see of a tensor; of anything else, its type."""
    if isinstance(given, Tensor):
        return given.shape, given.dtype, given.layout, given.device
    return type(given)


def choose(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str:
    """The path of `impl="auto"`, by shapes, dtypes and kind of device; it never waits for one."""
    return _fastest(_takers(embeddings, ref_emb, spec), _work(embeddings, ref_emb, spec))


def explain_plan(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    spec: Spec,
) -> Plan:
    """`choose` with its reasons; reads the labels, so it waits for the device."""
    counted = labels if ref_labels is None else ref_labels
    if counted.is_meta or dispatches_itself(counted):
        raise ValueError("explain counts classes, and these labels have no values: pass plain ones")
    work = _work(embeddings, ref_emb, spec)
    sizes = counted.to(torch.int64).unique(return_counts=True)[1].tolist()
    takers, path = _takers(embeddings, ref_emb, spec), choose(embeddings, ref_emb, spec)
    predicted = _predicted(takers, work, sizes)
    return Plan(
        path=path,
        reason=_reason(path, takers, work, predicted),
        work=work,
        n_classes=len(sizes),
        cost=path_cost(path, work, sizes),
        eq8_flops=eq8_flops(work.n, work.d, len(sizes)),
        predicted=predicted,
    )


def _work(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> Work:
    n, d = embeddings.shape
    m = None if ref_emb is None else ref_emb.shape[0]
    dtype, device = embeddings.dtype, embeddings.device.type
    if ref_emb is not None:
        dtype = torch.promote_types(dtype, ref_emb.dtype)
    return Work(n, m, d, dtype, spec.reduction, spec.wants_gradient, device)


def _takers(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> tuple[str, ...]:
    """The paths that can run here and take this input. The reference always does."""
    return tuple(
        name
        for name, path in PATHS.items()
        if path.missing() is None and path.refuses(embeddings, ref_emb, spec) is None
    )


def _fastest(takers: tuple[str, ...], work: Work) -> str:
    sizes = [max(1, work.columns // _ASSUMED_CLASSES)] * _ASSUMED_CLASSES
    seconds = _predicted(takers, work, sizes)
    if seconds:
        return min(seconds, key=lambda path: seconds[path])
    by_rule = ("gram", "triton", "native", "reference")
    if work.columns <= _MOMENTS_FROM * work.d:
        by_rule = ("triton", "native", "reference", "gram")
    return next(path for path in by_rule if path in takers)


def _reason(path: str, takers: tuple[str, ...], work: Work, predicted: dict[str, float]) -> str:
    if len(takers) == 1:
        return "the only path that takes this input here"
    if predicted:
        reason = "least predicted time"
        if predicted[path] > min(predicted.values()):
            reason += f" for {_ASSUMED_CLASSES} classes, which a choice by shapes alone assumes"
        return reason
    side = "up to" if work.columns <= _MOMENTS_FROM * work.d else "beyond"
    return f"by rule, {work.device} is not calibrated: N {side} {_MOMENTS_FROM} D"


def _predicted(takers: tuple[str, ...], work: Work, class_sizes: Sequence[int]) -> dict[str, float]:
    """Seconds of each of these paths that has been measured on this kind of device."""
    seconds = {}
    for path, constants in CONSTANTS.get(work.device, {}).items():
        if path in takers:
            flops, bytes_ = _OPERATIONS[path](work, class_sizes)
            seconds[path] = constants.call + constants.flop * flops + constants.byte * bytes_
    return seconds


def _products(work: Work) -> int:
    """Products of all pairs over D: S, and for a gradient its weights times each side."""
    if not work.wants_gradient:
        return 1
    return 2 if work.m is None else 3


def _reference(work: Work, class_sizes: Sequence[int]) -> tuple[int, int]:
    """Dense matrices in plain torch; the backward computes S anew."""
    pairs = work.n * work.columns
    products, sweeps = _products(work) + work.wants_gradient, 30 if work.wants_gradient else 12
    side = work.vectors * work.d * work.accumulated
    return (
        products * 2 * pairs * work.d + sweeps * pairs,
        sweeps * pairs * work.accumulated + (3 if work.wants_gradient else 1) * side,
    )


def _native(work: Work, class_sizes: Sequence[int]) -> tuple[int, int]:
    """S once, and once its weights times each side; a sweep over S for each."""
    pairs, products = work.n * work.columns, _products(work)
    gradient = work.vectors * work.d * work.accumulated if work.wants_gradient else 0
    return (
        products * (2 * work.d + 7) * pairs,
        products * work.embedding_bytes + gradient + products * pairs * work.accumulated,
    )


def _gram(work: Work, class_sizes: Sequence[int]) -> tuple[int, int]:
    """See `paths.gram`; the columns' classes are those that have moments."""
    n, d = max(work.n, work.columns), work.d
    by_native = work.m is None and native.missing() is None
    flops = gram.flops(n, d, class_sizes, work.reduction != "none", by_native)
    return flops, gram.traffic(n, d, work.dtype.itemsize)


def _triton(work: Work, class_sizes: Sequence[int]) -> tuple[int, int]:
    """See `paths.fused`."""
    counted = fused.cost(work.n, work.m, work.d, work.dtype, work.reduction, work.wants_gradient)
    return counted.flops, counted.bytes


_OPERATIONS: dict[str, Callable[[Work, Sequence[int]], tuple[int, int]]] = {
    "reference": _reference,
    "native": _native,
    "gram": _gram,
    "triton": _triton,
}
"""FLOPs and bytes, by which a path is chosen: memory is counted only where it is asked for."""
_MEMORY: dict[str, Callable[[Work, Sequence[int]], int]] = {
    "reference": plain.extra_memory,
    "native": native.extra_memory,
    "gram": gram.extra_memory,
    "triton": fused.extra_memory,
}
