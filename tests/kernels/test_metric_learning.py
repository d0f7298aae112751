"""The loss standing where a pytorch-metric-learning loss stands."""

import pytest
import torch
from oracle import batch

from bstriplet_kernels import BSTripletLoss, bstriplet_loss

pml = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import losses, miners  # noqa: E402


@pytest.mark.parametrize("miner", [miners.MultiSimilarityMiner(), miners.TripletMarginMiner()])
def test_with_miners(miner):
    x, labels = batch(20, 6, 3, 0, torch.float32)
    x.requires_grad_()
    loss = BSTripletLoss()(x, labels, miner(x, labels))
    loss.backward()
    assert 0 < loss < 2
    assert x.grad.norm() > 0


def test_in_multiple_losses():
    x, labels = batch(20, 6, 3, 0, torch.float32)
    both = losses.MultipleLosses([BSTripletLoss(), losses.ContrastiveLoss()], weights=[2, 1])
    expected = 2 * bstriplet_loss(x, labels) + losses.ContrastiveLoss()(x, labels)
    torch.testing.assert_close(both(x, labels), expected)


class AdmittingMemory(losses.CrossBatchMemory):
    """CrossBatchMemory admits class names on a list; a subclass is the way to lengthen it."""

    @staticmethod
    def supported_losses():
        return [*losses.CrossBatchMemory.supported_losses(), "BSTripletLoss"]


@pytest.mark.parametrize("miner", [None, miners.MultiSimilarityMiner()])
def test_in_cross_batch_memory(miner):
    memory = AdmittingMemory(BSTripletLoss(), embedding_size=6, memory_size=32, miner=miner)
    for step in range(4):
        x, labels = batch(12, 6, 3, step, torch.float32)
        x.requires_grad_()
        loss = memory(x, labels)
        loss.backward()
        assert loss.isfinite()
        assert x.grad.norm() > 0
