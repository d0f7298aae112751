"""The graphed step: batches that are replayed or eager, each trained on exactly once.

A stand-in for CUDA records a step as a function and its tensors; a replay calls the function again.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bstriplet.config import TrainConfig
from bstriplet.data.dataset import load_dataset, split_dataset
from bstriplet.errors import UserError
from bstriplet.training.batches import Feed
from bstriplet.training.cuda_graph import WARM_UP, GraphedStep, Step
from bstriplet.training.learner import Learner
from bstriplet.training.seeds import seed_everything
from bstriplet.training.step import TrainingStep, uses_cuda_graph
from bstriplet.training.tally import Tally

CPU = torch.device("cpu")


class Recorder:
    """A stand-in for ``cuda_graph.Cuda``."""

    def __init__(self) -> None:
        self.eager: list[int] = []
        self.captures = 0

    def run(self, step: Step, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.eager.append(len(labels))
        step(images, labels)

    def capture(self, step: Step, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
        self.captures += 1
        return lambda: step(images, labels)


@pytest.mark.parametrize(
    ("loss", "allowed"),
    [("ce", True), ("ce+bst", True), ("ce+triplet", False), ("ce+SupConLoss", False)],
)
def test_on_a_gpu_losses_that_never_wait_are_captured(
    tiny: TrainConfig, loss: str, allowed: bool
) -> None:
    def learner(choice: str, scaled: bool = False) -> Any:
        config = replace(tiny, loss=loss, cuda_graph=choice)
        scaler = SimpleNamespace(is_enabled=lambda: scaled)
        return SimpleNamespace(config=config, device=torch.device("cuda"), scaler=scaler)

    assert uses_cuda_graph(learner("auto")) is allowed
    assert uses_cuda_graph(learner("on"))
    assert not uses_cuda_graph(learner("off"))
    assert not uses_cuda_graph(learner("auto", scaled=True))
    with pytest.raises(UserError, match="--cuda-graph on: not with --amp"):
        uses_cuda_graph(learner("on", scaled=True))


def test_replayed_and_eager_steps_train_as_eager_ones_alone(tiny: TrainConfig) -> None:
    config = replace(tiny, batch_size=9, loss="ce+bst", ema=0.9, clip_grad=0.1)
    task = split_dataset(load_dataset(config.data, config.image_size), config)
    states, losses, recorder = [], [], Recorder()
    for graphed in (False, True):
        seed_everything(0)
        learner, tally = Learner(config, task, CPU), Tally(config, task, CPU)
        step: Step = TrainingStep(learner, tally)
        if graphed:
            step = GraphedStep(step, learner.optimiser, config.batch_size, recorder)
        learner.model.train()
        for epoch in range(4):
            if epoch == 2:
                for group in learner.optimiser.param_groups:
                    group["lr"] = 1e-4
            for batch in Feed(config, task.train, CPU).epoch(epoch):
                step(batch.images, batch.labels)
            step(batch.images[:4], batch.labels[:4])  # of another size: always eager
        states.append(learner.state_dict())
        losses.append((tally.loss, tally.n_images))
    assert losses[0] == losses[1]
    for part in ("model", "ema"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    assert recorder.eager.count(9) == WARM_UP
    assert recorder.eager.count(4) == 4
    assert recorder.captures == 2  # the second for the other learning rate


def test_a_step_that_cannot_be_captured_says_so(tiny: TrainConfig) -> None:
    class Failing(Recorder):
        def capture(self, *arguments: object) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    weight = torch.nn.Parameter(torch.zeros(1))
    step = GraphedStep(lambda *batch: None, torch.optim.SGD([weight]), 2, Failing())
    batch = torch.zeros(2), torch.zeros(2)
    for _ in range(WARM_UP):
        step(*batch)
    with pytest.raises(UserError, match=r"--cuda-graph: .*stream is capturing.* use off"):
        step(*batch)
