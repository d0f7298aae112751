"""Which path runs, and what it costs: Eq. 8, each path's own counts, predicted times.

The time of a path is predicted as call + flop * FLOPs + byte * bytes + launch * launches, with the
path's own counts and with constants measured on each kind of device (`calibration.py`);
`impl="auto"` takes the path of the least predicted time among those that can run. On a kind of
device that has not been measured it goes by a rule, `_by_rule`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._torch import PLAIN_TENSORS, dispatches_itself, fake_tensors
from .calibration import CONSTANTS
from .checks import (
    Options,
    check_batch,
    check_embeddings,
    check_spec,
    refuse_input,
)
from .cost import Cost, Work
from .paths import PATHS, gpu
from .spec import LINEAR, Spec

_MOMENTS_FROM = {"native": 1 << 14, "triton": 1 << 14, "reference": 1 << 12}
"""Where nothing is measured: the paths of pairs, the first that can run before the others, and how
many columns N must have at least for second moments to be taken instead."""
_MOMENTS_FROM_D, _MOMENTS_FROM_D_IN_HALF = 4, 16
"""How many times D it must be too: moments take 10-15 N D^2 multiply-adds, pairs 2-3 N^2 D. Triton
multiplies half-precision pairs as they are, several times as fast as moments in float32."""
_MOST_PAIRS = 1 << 28
"""N x M from which the reference is left to inputs that nothing else takes: its matrices, eight of
them, take 8 GiB here."""
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
            *([] if work.device == "cpu" else [f"launches      {cost.launches:,}"]),
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
    counted = PATHS[path].operations(work, class_sizes)
    extra_memory = PATHS[path].extra_memory(work, class_sizes)
    return Cost(counted.flops, counted.bytes, extra_memory, counted.launches)


REMEMBERED = 4096
"""How many forms of input are checked and planned once, and not again."""
_planned: dict[tuple[object, ...], tuple[Spec, str]] = {}


def checked_plan(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    options: Options,
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
            options,
            wants_gradient,
        )
        if ref_emb is not None or ref_labels is not None:
            key = (*key, _form(ref_emb), _form(ref_labels))
        planned = _planned.get(key)
        if planned is not None:
            return planned
    check_embeddings(embeddings, labels, ref_emb, ref_labels)
    check_batch(embeddings, ref_emb)
    check_spec(options.spec)
    spec = options.spec._replace(wants_gradient=wants_gradient, wants_rows=options.return_stats)
    if options.impl == "auto":
        planned = spec, choose(embeddings, ref_emb, spec)
    else:
        refuse_input(options.impl, embeddings, ref_emb, spec)
        planned = spec, options.impl
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
    return fastest(_takers(embeddings, ref_emb, spec), _work(embeddings, ref_emb, spec))


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
    sizes = counted.to(torch.int64).unique(return_counts=True)[1].tolist()
    work, takers = _work(embeddings, ref_emb, spec), _takers(embeddings, ref_emb, spec)
    return _explained(work, takers, sizes)


def explain_shape(
    shape: tuple[int, int],
    ref_rows: int | None,
    class_sizes: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    spec: Spec,
) -> Plan:
    """The same of tensors that need not exist, on a device that need not be here.

    Where it is not, all paths count that a machine with it can have.
    """
    is_here = device.type != "cuda" or torch.cuda.is_available()
    with contextlib.nullcontext() if is_here else gpu.imagined(), fake_tensors():
        embeddings = torch.empty(shape, dtype=dtype, device=device.type)
        ref_emb = None if ref_rows is None else embeddings.new_empty(ref_rows, shape[1])
        work, takers = _work(embeddings, ref_emb, spec), _takers(embeddings, ref_emb, spec)
        return _explained(work, takers, class_sizes)


def _explained(work: Work, takers: Sequence[str], sizes: Sequence[int]) -> Plan:
    path, predicted = fastest(takers, work), _predicted(takers, work, sizes)
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
    what = spec.reduction, spec.wants_gradient, device, spec.similarity.name
    return Work(n, m, d, dtype, *what)


def _takers(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> tuple[str, ...]:
    """The paths that can run and take this input, always the reference among them."""
    return tuple(
        name
        for name, path in PATHS.items()
        if (gpu.is_imagined() or path.missing() is None)
        and path.refuses(embeddings, ref_emb, spec) is None
    )


def fastest(takers: Sequence[str], work: Work) -> str:
    """Which of these paths is taken: by predicted time, where any of them has been measured.

    Of similarity="linear" it is the one that does not grow with N^2, whatever N is.
    """
    if work.similarity == LINEAR.name:
        return "gram"
    sizes = [max(1, work.columns // _ASSUMED_CLASSES)] * _ASSUMED_CLASSES
    seconds = _predicted(takers, work, sizes)
    if seconds:
        return min(seconds, key=lambda path: seconds[path])
    return _by_rule(takers, work)[0]


def _by_rule(takers: Sequence[str], work: Work) -> tuple[str, str]:
    """The path where nothing is measured, and why, in words.

    Up to 64 rows the native kernel, else Triton's, needs one launch. Above that Triton multiplies
    pairs on tensor cores in a few launches, where second moments take more of them, some hundred
    without Triton: these pay where N is large, and large against D. Where neither kernel runs the
    reference's N x M matrices cross memory thirty times, so that moments pay much sooner.
    """
    takers = _contenders(takers, work)
    pairs = next((path for path in _MOMENTS_FROM if path in takers), None)
    if pairs is None:
        return "gram", "too many pairs for N x M matrices"
    if "gram" not in takers:
        return pairs, "no second moments of this input"
    in_half = work.casts and pairs == "triton"
    of_d = _MOMENTS_FROM_D_IN_HALF if in_half else _MOMENTS_FROM_D
    first = max(_MOMENTS_FROM[pairs], of_d * work.d)
    if work.columns < first:
        return pairs, f"pairs below N = {first:,}"
    return "gram", f"second moments from N = {first:,} on"


def _contenders(takers: Sequence[str], work: Work) -> Sequence[str]:
    """Without the reference where its matrices are too large and another path is there."""
    if work.n * work.columns < _MOST_PAIRS or len(takers) == 1:
        return takers
    return [path for path in takers if path != "reference"]


def _reason(path: str, takers: Sequence[str], work: Work, predicted: dict[str, float]) -> str:
    if len(takers) == 1:
        return "the only path that takes this input here"
    if work.similarity == LINEAR.name:
        return "sums of classes take time linear in N"
    if not predicted:
        return f"by rule, {work.device} is not calibrated: {_by_rule(takers, work)[1]}"
    reason = "least predicted time"
    if predicted[path] > min(predicted.values()):
        reason += f" for {_ASSUMED_CLASSES} classes, which a choice by shapes alone assumes"
    return reason


def _predicted(takers: Sequence[str], work: Work, class_sizes: Sequence[int]) -> dict[str, float]:
    """Seconds of each contender that has been measured on this kind of device."""
    measured, seconds = CONSTANTS.get(work.device, {}), {}
    for path in _contenders(takers, work):
        counted = PATHS[path].operations(work, class_sizes)
        constants = measured.get(counted.schedule or path)
        if constants is not None:
            seconds[path] = constants.seconds(counted, work.dtype)
    return seconds
