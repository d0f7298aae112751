"""What Triton's kernels do, counted while the interpreter runs them: no GPU is needed."""

import contextlib
from collections import defaultdict
from dataclasses import dataclass, field
from unittest import mock

import numpy as np


@dataclass
class Count:
    """Of all launches of a kernel, masked elements left out.

    flops: 2 M N K of each product of an M x K and a K x N block. loaded, stored: bytes of all loads
    and stores, whether or not a cache would serve them. read, written: bytes of those that no
    earlier one of the same launch touched, the least that must cross memory.
    """

    launches: int = 0
    flops: int = 0
    loaded: int = 0
    stored: int = 0
    read: int = 0
    written: int = 0


@dataclass
class Counts:
    """A `Count` for each kernel by its name, and their sums."""

    kernels: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))

    def __getattr__(self, name):
        return sum(getattr(count, name) for count in self.kernels.values())


@contextlib.contextmanager
def counted_kernels():
    """The `Counts` of what runs while entered."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    plain_launch, plain_dot = executor.__call__, builder.create_dot
    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store
    counts = Counts()
    running, touched = [], {}

    def launch(self, *args, **kwargs):
        running[:] = [counts.kernels[self.fn.__name__]]
        running[0].launches += 1
        touched.update(read={}, written={})
        plain_launch(self, *args, **kwargs)
        for name, found in touched.items():
            bytes_ = sum(size * len(np.unique(np.concatenate(at))) for size, at in found.items())
            setattr(running[0], name, getattr(running[0], name) + bytes_)

    def dot(self, a, b, *rest):
        running[0].flops += 2 * a.data.size * b.data.shape[-1]
        return plain_dot(self, a, b, *rest)

    def touch(name, pointers, mask):
        """Bytes of the elements that the mask lets through; keep their addresses."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at, inside = np.broadcast_arrays(pointers.data, mask.data)
        at = at[inside.astype(bool)]
        touched[name].setdefault(size, []).append(at)
        return at.size * size

    def load(self, pointers, mask, *rest):
        running[0].loaded += touch("read", pointers, mask)
        return plain_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        running[0].stored += touch("written", pointers, mask)
        return plain_store(self, pointers, value, mask, *rest)

    members = {"create_dot": dot, "create_masked_load": load, "create_masked_store": store}
    with (
        mock.patch.object(executor, "__call__", launch),
        mock.patch.multiple(builder, **members),
    ):
        yield counts
