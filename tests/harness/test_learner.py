"""The recipe's options: optimiser, schedules, mixed precision, averaged weights."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bstriplet.config import TrainConfig
from bstriplet.data.dataset import Task, load_dataset, split_dataset
from bstriplet.training.evaluation import embed, load_trained
from bstriplet.training.learner import Learner, cosine_factor
from bstriplet.training.loop import train
from bstriplet.training.run_folder import LAST_FILE, RunFolder, load_checkpoint
from bstriplet.training.step import TrainingStep
from bstriplet.training.tally import Tally
from torch.optim import SGD, Adam, AdamW

CPU = torch.device("cpu")


def make_task(config: TrainConfig) -> Task:
    return split_dataset(load_dataset(config.data, config.image_size), config)


@pytest.mark.parametrize(("name", "kind"), [("adam", Adam), ("adamw", AdamW), ("sgd", SGD)])
def test_optimisers_decay_filters_and_matrices_only(
    tiny: TrainConfig, name: str, kind: type
) -> None:
    config = replace(tiny, optimiser=name, weight_decay=0.1, loss="ce+ArcFaceLoss")
    learner = Learner(config, make_task(config), CPU)
    assert type(learner.optimiser) is kind
    decay = {
        id(p): group["weight_decay"]
        for group in learner.optimiser.param_groups
        for p in group["params"]
    }
    parameters = [*learner.model.parameters(), *learner.criterion.parameters()]
    assert len(decay) == len(parameters)
    assert [decay[id(p)] for p in parameters] == [0.1 * (p.ndim > 1) for p in parameters]


def test_the_cosine_schedule_rises_and_falls(tiny: TrainConfig) -> None:
    config = replace(tiny, schedule="cosine", warmup_epochs=3, epochs=13, lr=1.0, lr_floor=0.1)
    rates = [cosine_factor(config, epoch) for epoch in range(14)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[8] == pytest.approx(0.55)
    assert rates[13] == pytest.approx(0.1)
    assert all(one > other for one, other in pairwise(rates[3:]))
    learner = Learner(config, make_task(config), CPU)
    seen = []
    for _ in range(13):
        seen.append(learner.optimiser.param_groups[0]["lr"])
        learner.optimiser.step()
        learner.schedule(math.nan)
    assert seen == pytest.approx(rates[:13])


def test_a_long_gradient_is_scaled_down_and_a_short_one_is_not(tiny: TrainConfig) -> None:
    """One step of SGD is the gradient times the rate; weights of the loss count, too."""
    steps = {}
    for limit in (0.0, 0.01, 1e9):
        torch.manual_seed(0)
        config = replace(tiny, optimiser="sgd", lr=0.5, clip_grad=limit, loss="ce+ArcFaceLoss")
        task = make_task(config)
        learner = Learner(config, task, CPU)
        before = [p.detach().clone() for p in learner.trained]
        TrainingStep(learner, Tally(config, task, CPU))(*task.train.batch(range(24)))
        change = [old - p.detach() for old, p in zip(before, learner.trained, strict=True)]
        steps[limit] = torch.cat([part.flatten() for part in change]) / config.lr
    assert steps[0].norm() > 0.1
    assert steps[0.01].norm().item() == pytest.approx(0.01, rel=1e-3)
    cosine = torch.cosine_similarity(steps[0], steps[0.01], dim=0)
    assert cosine.item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(steps[1e9], steps[0])


def test_averaged_weights_are_validated_and_kept(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, ema=0.5, epochs=2)
    task, run = make_task(config), RunFolder(tmp_path / "run")
    train(config, task, run)
    state = load_checkpoint(run.path / LAST_FILE)
    trained = load_trained(run)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, state["learner"]["ema"][name])
    assert not torch.equal(
        state["learner"]["ema"]["backbone.classifier.weight"],
        state["learner"]["model"]["backbone.classifier.weight"],
    )
    output, labels = embed(trained.model, task.validation, CPU)
    loss = torch.nn.functional.cross_entropy(output.logits, labels).item()
    assert loss == pytest.approx(state["history"][-1]["validation_loss"], rel=1e-5)


def test_averaging_follows_its_equation(tiny: TrainConfig) -> None:
    config = replace(tiny, ema=0.75)
    task = make_task(config)
    learner = Learner(config, task, CPU)
    average = learner.model.backbone.classifier.weight.detach().clone()
    step = TrainingStep(learner, Tally(config, task, CPU))
    for _ in range(3):
        step(*task.train.batch(range(24)))
        average = 0.75 * average + 0.25 * learner.model.backbone.classifier.weight.detach()
    torch.testing.assert_close(learner.evaluated.backbone.classifier.weight.detach(), average)


def test_mixed_precision_computes_the_network_in_bfloat16_and_the_loss_in_float32(
    tiny: TrainConfig,
) -> None:
    config = replace(tiny, amp=True, loss="ce+bst")
    task = make_task(config)
    learner = Learner(config, task, CPU)
    seen = {}
    convolution = next(m for m in learner.model.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda m, i, out: seen.update(network=out.dtype))
    learner.criterion.register_forward_hook(
        lambda m, inputs, out: seen.update(logits=inputs[0].logits.dtype, loss=out.total.dtype)
    )
    TrainingStep(learner, Tally(config, task, CPU))(*task.train.batch(range(24)))
    assert seen == {"network": torch.bfloat16, "logits": torch.float32, "loss": torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in
               learner.model.parameters())  # fmt: skip
