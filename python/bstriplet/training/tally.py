"""What the batches of an epoch add up to."""

import torch
from torch import Tensor

from bstriplet.config import TrainConfig
from bstriplet.data.dataset import Task
from bstriplet.training.losses import LossTerms


class Tally:
    """Means over the images of an epoch, and its first batch whose loss is not finite.

    The sums stay on the device and are updated in place: adding a batch never waits for a GPU and
    can be part of a CUDA graph. Reading a mean waits for the GPU.
    """

    def __init__(self, config: TrainConfig, task: Task, device: torch.device) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._batches = torch.zeros((), dtype=torch.int64, device=device)
        self._first_bad = torch.full_like(self._batches, -1)
        self._has_metric = config.loss != "ce"
        # A batch of validation images may have one more.
        self.bad_logits = torch.zeros(config.batch_size + 1, len(task.classes), device=device)

    def reset(self) -> None:
        """Begin an epoch."""
        self._sums.zero_()
        self._batches.zero_()
        self._first_bad.fill_(-1)

    def add(self, loss: LossTerms, logits: Tensor, labels: Tensor) -> None:
        """Add the mean losses of a batch, weighted by its size, and its right answers."""
        logits, n_images = logits.detach(), len(labels)
        losses = [loss.total, loss.ce, loss.total if loss.metric is None else loss.metric]
        means = torch.stack([value.detach().double() for value in losses])
        self._sums[:3] += means * n_images
        self._sums[3] += (logits.argmax(dim=1) == labels).sum()
        self._sums[4] += n_images
        bad = ~means[0].isfinite() & (self._first_bad < 0)
        self._first_bad.copy_(torch.where(bad, self._batches, self._first_bad))
        kept = self.bad_logits[:n_images]
        kept.copy_(torch.where(bad, logits, kept))
        self._batches += 1

    @property
    def first_bad(self) -> int | None:
        """The number, from 0, of the first batch whose loss is NaN or infinite."""
        number = int(self._first_bad)
        return None if number < 0 else number

    @property
    def n_images(self) -> int:
        """Number of images added."""
        return int(self._sums[4])

    def _mean(self, position: int) -> float:
        return self._sums[position].item() / self.n_images

    @property
    def loss(self) -> float:
        """Mean of the minimised loss."""
        return self._mean(0)

    @property
    def ce(self) -> float:
        """Mean cross entropy."""
        return self._mean(1)

    @property
    def metric(self) -> float | None:
        """Mean metric loss, not weighted by lambda; None for cross entropy alone."""
        return self._mean(2) if self._has_metric else None

    @property
    def accuracy(self) -> float:
        """Share of images classified right."""
        return self._mean(3)
