"""FLOPs and bytes of impl="triton", as its cost predicts them and as the interpreter counts them.

FLOPs are the same number. Of bytes each launch counts an element once, which is what it must move
if a cache serves the rest; a cost leaves out the few numbers of a row that do not grow with D.
"""

from typing import NamedTuple

import pytest
import torch
from counted import counted_kernels
from oracle import batch
from triton_device import interpreted

from bstriplet_kernels.paths import PATHS, gpu
from bstriplet_kernels.paths.triton import blocks, pairs, pairs_cost
from bstriplet_kernels.spec import Spec, work_of

pytestmark = interpreted
TRITON = PATHS["triton"]
FLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(autouse=True)
def _forget_forms():
    """They are remembered by device, and here the device is another one in each test."""
    blocks.form_of.cache_clear()
    yield
    blocks.form_of.cache_clear()


class Case(NamedTuple):
    """n rows of d numbers, against m others where that is not None."""

    n: int
    d: int
    m: int | None = None
    dtype: torch.dtype = FLOAT
    ref_dtype: torch.dtype | None = None
    reduction: str = "mean"
    wants_gradient: bool = True


def counted(monkeypatch, case):
    """(the counts, the cost); what torch does for the kernels and for the caller is counted too."""
    monkeypatch.setattr(gpu, "processors", lambda device: gpu.USUAL_PROCESSORS)
    x, labels = batch(case.n, case.d, 4, 0, case.dtype)
    ref, ref_labels = None, None
    if case.m is not None:
        ref, ref_labels = batch(case.m, case.d, 4, 1, case.ref_dtype or case.dtype)
    spec = Spec(reduction=case.reduction, wants_gradient=case.wants_gradient)
    given, multiply = (x, ref, labels, ref_labels), pairs._multiply
    with counted_kernels() as counts:

        def product(a, b, out):
            count = counts.kernels["torch.mm"]
            count.flops += 2 * a.numel() * b.shape[1]
            count.read += a.nbytes + b.nbytes
            count.written += out.nbytes
            count.stored += out.nbytes
            multiply(a, b, out)

        monkeypatch.setattr(pairs, "_multiply", product)
        loss, rows, kept = TRITON.forward(*given, spec)
        gradients = kept.tensors
        if case.wants_gradient and not kept.is_gradient:
            gradients = TRITON.backward(torch.ones_like(loss), *given, rows, kept.tensors, spec)
    work = work_of(x, ref, spec)._replace(device="cuda")
    if case.wants_gradient:  # the caller multiplies by the upstream, and casts
        for gradient, side in zip(gradients, (x, ref), strict=False):
            if gradient is not None and (kept.is_gradient or gradient.dtype != side.dtype):
                counts.kernels["torch.mul or to"].read += gradient.nbytes
                counts.kernels["torch.mul or to"].written += side.nbytes
                counts.kernels["torch.mul or to"].stored += side.nbytes
    return counts, TRITON.cost(work, [work.columns])


def assert_as_predicted(counts, cost):
    assert counts.flops == cost.flops
    assert counts.read + counts.written == pytest.approx(cost.bytes, rel=0.1)
    assert counts.stored == counts.written  # nothing is written twice


@pytest.mark.parametrize(
    "case",
    [
        Case(36, 256),
        Case(20, 256),
        Case(64, 128, wants_gradient=False),
        Case(36, 256, dtype=HALF),
        Case(20, 100, dtype=DOUBLE),
    ],
)
def test_small_batches(monkeypatch, case):
    """With the blocks that suit any GPU, which the cost counts."""
    counts, cost = counted(monkeypatch, case)
    assert cost.schedule == "triton small"
    if case.dtype == FLOAT and case.wants_gradient:  # L2 serves the second reading of embeddings
        cost = cost._replace(bytes=cost.bytes + 4 * case.n * case.d)
    assert_as_predicted(counts, cost)


@pytest.mark.parametrize("panels", [False, True], ids=["tiles", "panels"])
@pytest.mark.parametrize(
    "case",
    [
        Case(128, 128),
        Case(70, 192),
        Case(36, 64, reduction="none"),
        Case(130, 100, dtype=HALF),
        Case(70, 64, dtype=DOUBLE),
        Case(100, 64, 130),
        Case(30, 64, 200, dtype=HALF),
        Case(130, 64, 70, dtype=HALF, ref_dtype=FLOAT),
        Case(130, 64, wants_gradient=False),
    ],
)
def test_pairs(monkeypatch, case, panels):
    monkeypatch.setattr(gpu, "is_hopper", lambda device: True)
    monkeypatch.setattr(pairs_cost, "by_panels", lambda *shape: panels)
    counts, cost = counted(monkeypatch, case)
    assert cost.schedule == ("triton panels" if panels else "triton tiles")
    assert_as_predicted(counts, cost)


@pytest.mark.parametrize("panels", [False, True], ids=["tiles", "panels"])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_larger_blocks(monkeypatch, dtype, panels):
    """Those of half of S for more rows than are quickly interpreted."""
    monkeypatch.setattr(blocks, "_FEW_ROWS", 64)
    monkeypatch.setattr(blocks, "_MANY_ROWS", 256)
    test_pairs(monkeypatch, Case(200, 64, dtype=dtype), panels)


@pytest.mark.parametrize("case", [Case(150, 64), Case(150, 64, 130), Case(150, 64, 130, HALF)])
def test_several_panels(monkeypatch, case):
    monkeypatch.setattr(gpu, "is_hopper", lambda device: True)
    monkeypatch.setattr(pairs_cost, "by_panels", lambda *shape: True)
    monkeypatch.setattr(blocks, "PANEL_BYTES", 1)
    assert_as_predicted(*counted(monkeypatch, case))


def test_masked_elements_do_not_count():
    """Two programs of 16 numbers, of which 20 are inside and the first is read by both."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(source, target, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(source + i, mask=i < n, other=0.0) + tl.load(source)
        square = x[:, None] * x[None, :]
        tl.store(target + i, tl.sum(tl.dot(square, square), axis=1), mask=i < n)

    x, y = torch.ones(20), torch.empty(20)
    with counted_kernels() as counts:
        kernel[(2,)](x, y, 20, BLOCK=16)
    assert counts.kernels["kernel"] == counts.kernels["kernel"].__class__(
        launches=1, flops=2 * 2 * 16**3, loaded=88, stored=80, read=80, written=80
    )
