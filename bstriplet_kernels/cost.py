"""What a path is to compute and what that costs; each path counts itself beside its code."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Work(NamedTuple):
    """What is to be computed: n rows of d numbers against m columns (None: against themselves).

    device: the type of the embeddings' device. It and the similarity decide the schedule of some
    paths.
    """

    n: int
    m: int | None
    d: int
    dtype: torch.dtype
    reduction: str = "mean"
    wants_gradient: bool = True
    device: str = "cpu"
    similarity: str = "square"

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
        """Bytes of the embeddings, both sides."""
        return self.vectors * self.d * self.dtype.itemsize

    @property
    def accumulated(self) -> int:
        """Bytes of a number in the accumulation dtype."""
        return max(4, self.dtype.itemsize)

    @property
    def casts(self) -> bool:
        """Whether the gradient is computed in another dtype than the embeddings have."""
        return self.dtype.itemsize < 4

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of both sides, as a path returns them; 0 where none is wanted."""
        return self.vectors * self.d * self.accumulated if self.wants_gradient else 0

    @property
    def cast_bytes(self) -> int:
        """Bytes of the gradients once more, where they are cast to the embeddings' dtype."""
        return self.embedding_bytes if self.wants_gradient and self.casts else 0


class Cost(NamedTuple):
    """What a schedule of a path does, forward and, where a gradient is wanted, backward.

    flops: of its products and sweeps, as it computes them. bytes: that must cross memory.
    launches: kernels that a GPU is told to run; 0 on the CPU. extra_memory: peak bytes beyond the
    inputs. It includes the gradient and the buffers of the C++ operators, not those inside BLAS.
    schedule: which one it is, where a path has several on one device whose speeds are measured
    apart.
    """

    flops: int
    bytes: int
    launches: int
    extra_memory: int
    schedule: str = ""


class Constants(NamedTuple):
    """Measured speed of a schedule: seconds a call, a FLOP, a byte and a launch.

    half: seconds a FLOP of a product of half-precision numbers, where that was measured apart.
    """

    call: float
    flop: float
    byte: float
    launch: float = 0.0
    half: float | None = None

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """The predicted time of what costs so much, on embeddings of this dtype."""
        flop = self.half if self.half is not None and dtype.itemsize < 4 else self.flop
        return self.call + flop * cost.flops + self.byte * cost.bytes + self.launch * cost.launches


def round_up(n: int, multiple: int) -> int:
    """The least multiple of a number that is not below n."""
    return -(-n // multiple) * multiple
