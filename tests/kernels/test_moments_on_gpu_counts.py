"""FLOPs and bytes of moments on a GPU, as costs predict them and as the interpreter counts them.

See `test_triton_counts`.
"""

import pytest
import torch
from counted import counted_kernels
from oracle import batch
from triton_device import interpreted

from bstriplet_kernels.paths import gpu
from bstriplet_kernels.paths.moments import class_sums_on_gpu, on_gpu
from bstriplet_kernels.spec import LINEAR, Spec, work_of

pytestmark = interpreted
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("joint", [False, True])
def test_class_sums(monkeypatch, joint):
    """Bytes; sums of classes have no products on tensor cores."""
    monkeypatch.setattr(gpu, "processors", lambda device: 3)
    monkeypatch.setattr(gpu, "USUAL_PROCESSORS", 3)
    x, labels = batch(900, 64, 3, 0, FLOAT)
    ref, ref_labels = (-x.flip(0), labels.flip(0)) if joint else (None, None)
    spec = Spec(similarity=LINEAR, wants_gradient=True)
    with counted_kernels() as counts:
        loss, _, kept = class_sums_on_gpu.forward(x, ref, labels, ref_labels, spec)
        class_sums_on_gpu.backward(torch.ones_like(loss), x, ref, kept, spec)
    cost = class_sums_on_gpu.cost(work_of(x, ref, spec), labels.bincount().tolist())
    assert counts.read + counts.written == pytest.approx(cost.bytes, rel=0.1)


def counted(monkeypatch, sizes, d, spec, dtype, joint=False):
    """(the counts, the cost) of classes of these sizes, all rows active.

    joint: against as many columns of the same classes. Three processors of a Hopper: their runs
    hold whole blocks of 128 rows, as those of large batches nearly do.
    """
    monkeypatch.setattr(gpu, "kind", lambda device: "hopper")
    monkeypatch.setattr(gpu, "processors", lambda device: 3)
    monkeypatch.setattr(gpu, "USUAL_PROCESSORS", 3)
    x, _ = batch(sum(sizes), d, 3, 0, dtype)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    ref, ref_labels = (-x.flip(0), labels.flip(0)) if joint else (None, None)
    with counted_kernels() as counts:
        loss, _, kept = on_gpu.forward(x, ref, labels, ref_labels, spec)
        if spec.wants_gradient:
            on_gpu.backward(torch.ones_like(loss), x, ref, kept, spec)
    return counts, on_gpu.cost(work_of(x, ref, spec)._replace(device="cuda"), sizes)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (Spec(wants_gradient=True), FLOAT),
        (Spec(wants_gradient=True), HALF),
        (Spec(wants_gradient=False), FLOAT),
        (Spec(wants_gradient=True, reduction="none"), FLOAT),
    ],
)
def test_large_classes(monkeypatch, spec, dtype):
    d = 64
    sizes = [on_gpu.smallest_moment(d)] * 2
    counts, cost = counted(monkeypatch, sizes, d, spec, dtype)
    assert counts.flops == pytest.approx(cost.flops, rel=0.1)
    if dtype == FLOAT:  # of others the caller casts the gradient
        assert counts.read + counts.written == pytest.approx(cost.bytes, rel=0.1)


@pytest.mark.parametrize("dtype", [FLOAT, torch.float64])
def test_other_columns(monkeypatch, dtype):
    d = 64
    sizes = [on_gpu.smallest_moment(d)] * 2
    counts, cost = counted(monkeypatch, sizes, d, Spec(wants_gradient=True), dtype, joint=True)
    assert counts.flops == pytest.approx(cost.flops, rel=0.1)
    assert counts.read + counts.written == pytest.approx(cost.bytes, rel=0.1)


@pytest.mark.parametrize("small", [[37, 91, 50, 100, 106], [3, 30, 9, 17, 24] * 12])
def test_small_classes_among_large_ones(monkeypatch, small):
    """The band's blocks do not begin where classes do."""
    d = 64
    sizes = [on_gpu.smallest_moment(d), *small]
    counts, cost = counted(monkeypatch, sizes, d, Spec(wants_gradient=True), FLOAT)
    assert counts.kernels["band_gradient"].flops > 0
    assert counts.flops == pytest.approx(cost.flops, rel=0.1)
