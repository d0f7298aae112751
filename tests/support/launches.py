"""Launches, bytes and memory, counted, on fake CUDA tensors too: no GPU is needed."""

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NOT_LAUNCHED = (
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "promote_types",
)
ONLY_WRITE = (
    *("zeros", "ones", "new_zeros", "ones_like", "zeros_like"),
    *("arange", "scalar_tensor", "fill_", "zero_"),
)


class Launches(TorchDispatchMode):
    """One launch for each operator that is no view, the bytes it reads and writes, and products.

    Indexing reads what it takes and index_add_ what it adds to. An operator counts once, whether it
    is one kernel on a GPU or several.
    """

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        views = (
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if name in NOT_LAUNCHED or func.namespace == "prim" or any(views):
            return out
        written = size(out)
        if name in ("index", "index_select", "gather"):
            moved = 2 * written
        elif name in ("index_copy_", "index_add_"):
            moved = (2 if name == "index_copy_" else 3) * size(args[3])
        elif name in ONLY_WRITE:
            moved = written
        else:
            moved = written + size((args, {k: v for k, v in kwargs.items() if k != "out"}))
        self.launches += 1
        self.bytes += moved
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


class Peak(TorchDispatchMode):
    """Bytes of the storages that are alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0
        self.alive = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.alive:
                    self.alive.add(key)
                    self.held += size
                    self.most = max(self.most, self.held)
                    weakref.finalize(storage, self.forget, key, size)
        return out

    def forget(self, key, size):
        self.alive.discard(key)
        self.held -= size


class NotRun:
    """Kernels that are counted, not run."""

    def __init__(self):
        self.launches = 0

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **kwargs):
        self.launches += 1


def size(tree):
    """Bytes of all tensors; an expanded one is as large as what it is stored in."""
    return sum(
        min(t.numel() * t.itemsize, t.untyped_storage().nbytes())
        for t in tree_leaves(tree)
        if isinstance(t, Tensor)
    )


def on_fake_gpu(n, d, dtype):
    """Embeddings [N, D] and labels [N], to be made under FakeTensorMode."""
    return (
        torch.empty(n, d, dtype=dtype, device="cuda"),
        torch.empty(n, dtype=torch.int64, device="cuda"),
    )
