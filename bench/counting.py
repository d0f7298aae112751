"""What one call does: FLOPs and bytes of every operator it calls, and the memory it needs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_WRITE_ONLY = ("_like", "new_", "zeros", "ones", "full", "arange", "eye", "scalar_tensor")
_SELECTS = ("index_select", "index", "gather")  # read what comes out, not all they are given
_MOVES = (*_SELECTS, "index_copy_", "copy_", "clone", "cat", "_to_copy")


class Operations(TorchDispatchMode):
    """Counts while it is entered: products by torch's own formulas, others one FLOP an element.

    What only moves data has no FLOPs. Bytes are what each operator reads and writes where nothing
    is fused and nothing stays in a cache. What a compiled graph or a custom operator does inside is
    not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        if _is_view(func) or name in ("empty", "empty_like", "new_empty", "detach"):
            return out
        written = _tensors(out)
        inputs = (args, {key: value for key, value in kwargs.items() if key != "out"})
        read = [] if any(word in name for word in _WRITE_ONLY) else _tensors(inputs)
        if name in _SELECTS:
            read = written
        elif name == "index_copy_":
            read = written = [args[3]]
        self.bytes += sum(map(_bytes, written)) + sum(map(_bytes, read))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        elif read and name not in _MOVES:
            self.flops += max((t.numel() for t in (*written, *read)), default=0)
        return out


class Memory(NamedTuple):
    """Bytes beyond what was held before the call, results included.

    allocator: the most that torch's allocator held at once. resident: how far the process's
    resident set grew (Linux, CPU), BLAS' buffers and the C library's slack included; else None.
    """

    allocator: int
    resident: int | None


def peak_memory(call: Callable[[], Any], device: str) -> tuple[Any, Memory]:
    """The call's result and the memory that it needed."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, Memory(torch.cuda.max_memory_allocated() - before, None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        resident = _reset_resident_peak()  # here, as a process's first profiler brings 80 MB along
        result = call()
        grown = None if resident is None else max(0, _status("VmHWM") - resident)
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        most = max(most, held)
    return result, Memory(most, grown)


def _reset_resident_peak() -> int | None:
    """The resident set now, after giving free memory back and forgetting its earlier peak."""
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def unreturned_memory() -> int:
    """Bytes that the process has reserved and does not use; 0 where that is unknown.

    When a mapping is refused, the C library grows its heap instead, which never shrinks.
    """
    resident = _reset_resident_peak()
    return 0 if resident is None else _status("VmData") - resident


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {name}")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """An expanded tensor is read as often as it is stored."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
