"""A training step as one CUDA graph: one launch instead of hundreds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bstriplet.errors import UserError, one_line

Step = Callable[[Tensor, Tensor], None]

# Eager steps before the capture. In them, libraries choose algorithms and the optimiser creates its
# state.
WARM_UP = 3


class Cuda:
    """The calls of torch.cuda that :class:`GraphedStep` makes."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def run(self, step: Step, images: Tensor, labels: Tensor) -> None:
        """Run a step eagerly, on the stream on which it will be captured."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            step(images, labels)
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, step: Step, images: Tensor, labels: Tensor) -> Callable[[], None]:
        """Record a step without running it; return a function that runs it on these tensors."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            step(images, labels)
        return graph.replay


class GraphedStep:
    """``step(images, labels)``, replayed for batches of ``batch_size`` and eager for all others.

    The step must keep its state in tensors that it updates in place, and must not wait for the
    device. The first ``WARM_UP`` batches are trained on eagerly; capturing runs nothing, so each
    batch is trained on once. A graph holds the learning rate as a constant: each change of the
    learning rate needs a new capture.
    """

    def __init__(
        self, step: Step, optimiser: Optimizer, batch_size: int, cuda: Any | None = None
    ) -> None:
        self.step = step
        self.optimiser = optimiser
        self.batch_size = batch_size
        self.cuda = cuda or Cuda()
        self.warm_up = WARM_UP
        self.rates: list[float] = []
        self.replay: Callable[[], None] | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        if len(labels) != self.batch_size or self.warm_up:
            self.warm_up -= len(labels) == self.batch_size
            self.cuda.run(self.step, images, labels)
            return
        rates = [group["lr"] for group in self.optimiser.param_groups]
        if self.replay is None or rates != self.rates:
            self.replay = None  # frees the memory of the graph before
            self.rates, self.images, self.labels = rates, images.clone(), labels.clone()
            try:
                self.replay = self.cuda.capture(self.step, self.images, self.labels)
            except RuntimeError as error:
                raise UserError(
                    f"--cuda-graph: the step cannot be captured ({one_line(error)}); use off"
                ) from error
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.replay()
