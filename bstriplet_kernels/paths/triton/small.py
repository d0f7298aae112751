"""The loss and its gradient for at most 64 rows, in one launch, or two for exact float32.

Kernels are in `small_kernels`. The gradient is for an upstream of 1: the backward is one multiply.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ...cost import Cost, Work
from ...spec import Rows, Spec, accumulation_dtype
from .. import gpu
from .blocks import Blocks

SCHEDULE = "triton small"
"""The schedule, by its name in `CONSTANTS`."""
ROWS = 64
"""The most rows of a batch."""


def takes(n: int, m: int | None, reduction: str) -> bool:
    """Whether a batch of n rows against m columns (None: themselves) is for these kernels."""
    return m is None and reduction != "none" and n <= ROWS


def blocks_of(dtype: torch.dtype, hopper: bool) -> Blocks:
    """Blocks of `loss_and_gradient`, and of `batch_products`.

    Steps are as deep as registers allow. Hopper multiplies 64 rows from shared memory; other GPUs
    hold both operands of a step in registers. One size holds any batch, so that an epoch's last
    one compiles nothing, which would take 0.6 s. Blocks of 32 rows took 10 us for N = 24, these
    take 16 us for N = 36 (D = 1,280, float32, graph replay on an H200).
    """
    if dtype == torch.float64:
        return Blocks(ROWS, ROWS, 32, 32, 8, 2)
    if dtype == torch.float32:
        return Blocks(ROWS, ROWS, 64 if hopper else 32, 32, 8, 3)
    return Blocks(ROWS, ROWS, 128, 32, 8, 3)


def precision(dtype: torch.dtype) -> str:
    """The `input_precision` of float32 products, as torch's own settings allow.

    Half-precision embeddings are multiplied as they are; for them it holds for weights alone, which
    cost nothing to multiply exactly.
    """
    if dtype == torch.float64 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if dtype == torch.float32 and not gpu.products_are_exact() else "tf32x3"


def products_are_apart(dtype: torch.dtype) -> bool:
    """Whether products are formed in a separate launch, as exact float32 ones are."""
    return dtype == torch.float32 and precision(dtype) == "tf32x3"


@functools.cache
def kernels() -> ModuleType:
    """`small_kernels`, imported when its first kernel runs."""
    from . import small_kernels

    return small_kernels


def forward(embeddings: Tensor, labels: Tensor, spec: Spec) -> tuple[Tensor, Rows, Tensor]:
    """The loss, Eq. 3's means, and dL/df [N, D] for an upstream of 1, [0, D] if not wanted."""
    (n, d), dtype = embeddings.shape, accumulation_dtype(embeddings)
    loss = embeddings.new_empty((), dtype=dtype)
    rows = Rows(loss.new_empty(n), loss.new_empty(n))
    gradient = loss.new_empty(n if spec.wants_gradient else 0, d)
    blocks = blocks_of(embeddings.dtype, gpu.is_hopper(embeddings.device))
    summed = products_are_apart(embeddings.dtype)
    parts = -(-d // blocks.d) if summed else 0
    partial = loss.new_empty(parts, blocks.n, blocks.n)
    if summed:
        kernels().batch_products[(parts,)](
            embeddings, partial, n, d, *embeddings.stride(),
            BLOCK_N=blocks.n, BLOCK_D=blocks.d, num_warps=blocks.warps,
        )  # fmt: skip
    kernels().loss_and_gradient[(-(-d // blocks.v) if spec.wants_gradient else 1,)](
        embeddings, labels, partial, loss, *rows, gradient,
        n, d, parts, *embeddings.stride(), labels.stride(0),
        spec.margin, spec.eps * spec.eps, spec.sigma, int(spec.signed),
        int(spec.reduction == "mean"), int(spec.wants_gradient),
        PRECISION=precision(embeddings.dtype), SUMMED=summed,
        **blocks.options("BLOCK_N", "BLOCK_D", "BLOCK_V"),
    )  # fmt: skip
    return loss, rows, gradient


def cost(work: Work, hopper: bool) -> Cost:
    """Counted as launched, with blocks that suit any GPU; an exact product counts as four.

    hopper: whether memory is counted with Hopper's blocks.
    """
    blocks = blocks_of(work.dtype, False)
    slices = -(-work.d // blocks.v) if work.wants_gradient else 1
    steps, summed = -(-work.d // blocks.d), products_are_apart(work.dtype)
    pairs = 2 * blocks.n * blocks.n
    flops = pairs * steps * blocks.d * (4 if summed else slices)
    moved = work.embedding_bytes + 2 * work.gradient_bytes
    if work.wants_gradient:
        flops += slices * pairs * blocks.v
        moved += work.cast_bytes or work.gradient_bytes  # one launch multiplies and casts
    if summed:
        moved += 2 * _product_bytes(work, blocks)
    own = _product_bytes(work, blocks_of(work.dtype, hopper))
    memory = (2 * work.n + 1) * work.accumulated + work.gradient_bytes + max(own, work.cast_bytes)
    return Cost(flops, moved, 1 + summed + work.wants_gradient, memory, SCHEDULE)


def _product_bytes(work: Work, blocks: Blocks) -> int:
    """Bytes of the products of a batch, as `batch_products` writes them."""
    if not products_are_apart(work.dtype):
        return 0
    return -(-work.d // blocks.d) * blocks.n * blocks.n * 4
