"""The work of a path and its cost; each path counts its own cost beside its code."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Work(NamedTuple):
    """What is to be computed: n rows of d numbers against m columns (None: against themselves).

    dtype: the embeddings', of two that differ the one that both are promoted to. device: the type
    of the embeddings' device. Some paths choose their schedule by it and by the similarity.
    side_dtypes: of the rows and of the columns where they differ, else empty.
    """

    n: int
    m: int | None
    d: int
    dtype: torch.dtype
    reduction: str = "mean"
    wants_gradient: bool = True
    device: str = "cpu"
    similarity: str = "square"
    side_dtypes: tuple[torch.dtype, ...] = ()

    @property
    def columns(self) -> int:
        """How many columns each row is compared with, itself included."""
        return self.n if self.m is None else self.m

    @property
    def vectors(self) -> int:
        """Number of embeddings on both sides."""
        return self.n + (self.m or 0)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the embeddings in `dtype`, both sides."""
        return self.vectors * self.d * self.dtype.itemsize

    @property
    def accumulated(self) -> int:
        """Bytes of a number in the accumulation dtype."""
        return max(4, self.dtype.itemsize)

    @property
    def casts(self) -> bool:
        """Whether the gradient is computed in another dtype than `dtype`.

        What is counted by it takes two sides that differ for two of the wider dtype.
        """
        return self.dtype.itemsize < 4

    @property
    def narrow_sides(self) -> tuple[int, ...]:
        """Vectors of each side whose own dtype is narrower than the accumulation dtype."""
        return tuple(size for size, dtype in self._sides if dtype.itemsize < self.accumulated)

    @property
    def _sides(self) -> tuple[tuple[int, torch.dtype], ...]:
        """Vectors and dtype of each side."""
        sizes = (self.n,) if self.m is None else (self.n, self.m)
        return tuple(zip(sizes, self.side_dtypes or (self.dtype,) * 2, strict=False))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of both sides, as a path returns them; 0 where none is wanted."""
        return self.vectors * self.d * self.accumulated if self.wants_gradient else 0

    @property
    def cast_bytes(self) -> int:
        """Bytes of the gradients once more, where they are cast to their side's own dtype."""
        if not self.wants_gradient:
            return 0
        return sum(
            size * self.d * dtype.itemsize
            for size, dtype in self._sides
            if dtype.itemsize < self.accumulated
        )


class Cost(NamedTuple):
    """What a schedule of a path does, forward and, where a gradient is wanted, backward.

    flops: those of its products and sweeps. bytes: those that must cross memory. launches: kernels
    launched on a GPU; 0 on the CPU. extra_memory: peak bytes beyond the inputs. It includes the
    gradient and the buffers of the C++ operators, not those inside BLAS. schedule: the name under
    which its speed is measured; "" for the path's own name.
    """

    flops: int
    bytes: int
    launches: int
    extra_memory: int
    schedule: str = ""


class Constants(NamedTuple):
    """Measured speed of a schedule: seconds a call, a FLOP, a byte and a launch.

    half: seconds a FLOP for half-precision embeddings; None where `flop` holds for them too.
    """

    call: float
    flop: float
    byte: float
    launch: float = 0.0
    half: float | None = None

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """The predicted seconds of a schedule of this cost, on embeddings of this dtype."""
        flop = self.half if self.half is not None and dtype.itemsize < 4 else self.flop
        return self.call + flop * cost.flops + self.byte * cost.bytes + self.launch * cost.launches


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple
