"""Which path runs, and what it costs: Eq. 8, each path's own counts, predicted times.

The time of a path is predicted as call + flop * FLOPs + byte * bytes + launch * launches, with the
path's own counts and with constants measured on each kind of device (`calibration.py`). Among the
paths that can run and do not take too much memory, `impl="auto"` takes that of the least predicted
time. A schedule that has not been measured on a kind of device is assumed to be slow there.
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
from .cost import Constants, Cost, Work
from .paths import PATHS, gpu
from .spec import Spec, work_of

_ASSUMED = {"cpu": Constants(1e-3, 2e-11, 5e-11), "other": Constants(2e-3, 1e-13, 1e-12, 2e-5)}
"""For a schedule that was not measured: 1 ms a call, 50 GFLOP/s, 20 GB/s on a CPU; elsewhere 2 ms,
10 TFLOP/s, 1 TB/s and 20 us a launch."""
_MUCH_MEMORY, _MUCH_OF_EMBEDDINGS = 1 << 33, 8
"""Extra memory in bytes, and as a multiple of the embeddings. A path above both is not taken,
however fast, unless none takes less."""
_ASSUMED_CLASSES = 3
"""`choose` does not ask the device how many classes there are; the paper has two or three."""


@dataclass(frozen=True)
class Plan:
    """What `impl="auto"` does with an input, and why; `print` it.

    path: the name that `impl` takes. n_classes: those of the columns. cost: that path's own counts.
    eq8_flops: the paper's figure for the forward alone. predicted: seconds of each path that does
    not take too much memory, at an assumed speed where none was measured.
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

    It counts l^2 + l - 1 operations for one entry of S, which takes 2 l - 1; the cost of the path
    "reference" has the true count.
    """
    return (d * d + c * c + d + c + 3) * n * n + (2 * d + 5) * n


REMEMBERED = 4096
"""How many forms of input `checked_plan` remembers."""
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

    The result is remembered by options and forms of input: in a training loop it is a look-up.
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
    """What checks and plans read of a tensor; for anything else, its type."""
    if isinstance(given, Tensor):
        return given.shape, given.dtype, given.layout, given.device
    return type(given)


def choose(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> str:
    """The path of `impl="auto"`, by shapes, dtypes and kind of device; never waits for a GPU."""
    return fastest(_takers(embeddings, ref_emb, spec), work_of(embeddings, ref_emb, spec))


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
    work, takers = work_of(embeddings, ref_emb, spec), _takers(embeddings, ref_emb, spec)
    return _explained(work, takers, sizes)


def explain_shape(
    shape: tuple[int, int],
    ref_rows: int | None,
    class_sizes: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    spec: Spec,
) -> Plan:
    """`explain_plan` for shapes: neither the tensors nor the device need exist.

    Where there is no GPU, every path counts as installed for one.
    """
    is_here = device.type != "cuda" or torch.cuda.is_available()
    with contextlib.nullcontext() if is_here else gpu.imagined(), fake_tensors():
        embeddings = torch.empty(shape, dtype=dtype, device=device.type)
        ref_emb = None if ref_rows is None else embeddings.new_empty(ref_rows, shape[1])
        work, takers = work_of(embeddings, ref_emb, spec), _takers(embeddings, ref_emb, spec)
        return _explained(work, takers, class_sizes)


def _explained(work: Work, takers: Sequence[str], sizes: Sequence[int]) -> Plan:
    path, costs = fastest(takers, work), _contenders(takers, work, sizes)
    predicted = {name: _seconds(name, cost, work) for name, cost in costs.items()}
    cost = costs.get(path) or PATHS[path].cost(work, sizes)
    reason = "least predicted time"
    if len(takers) == 1:
        reason = "the only path that takes this input here"
    elif path not in predicted or predicted[path] > min(predicted.values()):
        reason += f" for {_ASSUMED_CLASSES} classes, which a choice by shapes alone assumes"
    assumed = [
        counted.schedule or name
        for name, counted in {**costs, path: cost}.items()
        if _measured(name, counted, work) is None
    ]
    if len(takers) > 1 and assumed:
        reason += f"; the speed of {', '.join(assumed)} is assumed, not measured on {work.device}"
    eq8 = eq8_flops(work.n, work.d, len(sizes))
    return Plan(path, reason, work, len(sizes), cost, eq8, predicted)


def _takers(embeddings: Tensor, ref_emb: Tensor | None, spec: Spec) -> tuple[str, ...]:
    """The paths that can run and take this input, always the reference among them."""
    return tuple(
        name
        for name, path in PATHS.items()
        if (gpu.is_imagined() or path.missing() is None)
        and path.refuses(embeddings, ref_emb, spec) is None
    )


def fastest(takers: Sequence[str], work: Work) -> str:
    """The path of the least predicted time, for `_ASSUMED_CLASSES` classes of even size."""
    sizes = [max(1, work.columns // _ASSUMED_CLASSES)] * _ASSUMED_CLASSES
    costs = _contenders(takers, work, sizes)
    return min(costs, key=lambda name: _seconds(name, costs[name], work))


def _contenders(takers: Sequence[str], work: Work, class_sizes: Sequence[int]) -> dict[str, Cost]:
    """The costs of these paths, without the paths that take too much memory."""
    costs = {name: PATHS[name].cost(work, class_sizes) for name in takers}
    much = max(_MUCH_MEMORY, _MUCH_OF_EMBEDDINGS * work.embedding_bytes)
    least = min(cost.extra_memory for cost in costs.values())
    return {name: cost for name, cost in costs.items() if cost.extra_memory <= max(much, least)}


def _measured(path: str, cost: Cost, work: Work) -> Constants | None:
    """The measured speed of a path's schedule on this kind of device, or None."""
    return CONSTANTS.get(work.device, {}).get(cost.schedule or path)


def _seconds(path: str, cost: Cost, work: Work) -> float:
    assumed = _ASSUMED["cpu" if work.device == "cpu" else "other"]
    return (_measured(path, cost, work) or assumed).seconds(cost, work.dtype)
