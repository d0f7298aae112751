"""All that learns in a run: model, loss, optimiser, schedule, mixed precision, averaged weights."""

import math
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from bstriplet.config import TrainConfig
from bstriplet.data.dataset import ImageSet, Task
from bstriplet.models.classifier import Classifier, placed
from bstriplet.training.losses import TrainingLoss

MOMENTUM = 0.9


class Learner:
    """All that learns in a run, made from its configuration; its state dict continues the run."""

    def __init__(self, config: TrainConfig, task: Task, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.model = Classifier(
            config.backbone,
            len(task.classes),
            task.channels,
            embedding=config.embedding,
            channels_last=config.channels_last,
        )
        placed(self.model, device)
        self.model.standardise_with(*grey_level_statistics(task.train))
        class_counts = np.bincount(task.train.labels, minlength=len(task.classes)).tolist()
        criterion = TrainingLoss(config, class_counts, self.model.embedding_size)
        self.criterion = criterion.to(device)
        self.optimiser = make_optimiser(config, [self.model, self.criterion], device)
        self.scheduler = make_scheduler(config, self.optimiser)
        self.amp_dtype = amp_dtype(config, device)
        # Only float16 has so small a range that gradients must be scaled.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.ema = ModelEmaV3(self.model, decay=config.ema) if config.ema else None

    @property
    def evaluated(self) -> Classifier:
        """The model that is validated and kept; with ``ema``, the one of averaged weights."""
        return self.ema.module if self.ema else self.model

    @property
    def trained(self) -> list[nn.Parameter]:
        """All parameters that the optimiser updates."""
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def schedule(self, training_loss: float) -> None:
        """Set the learning rate of the next epoch."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(training_loss)
        else:
            self.scheduler.step()

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "criterion": self.criterion,
            "optimiser": self.optimiser,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
        }
        return parts | ({"ema": self.ema.module} if self.ema else {})

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each part by name."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of each part."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])


def make_optimiser(
    config: TrainConfig, modules: list[nn.Module], device: torch.device
) -> Optimizer:
    """Return the optimiser of all parameters; only matrices and filters decay."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimiser == "sgd":
        return SGD(groups, lr=config.lr, momentum=MOMENTUM, fused=True)
    kind = {"adam": Adam, "adamw": AdamW}[config.optimiser]
    return kind(groups, lr=config.lr, fused=True, capturable=device.type == "cuda")


def make_scheduler(config: TrainConfig, optimiser: Optimizer) -> ReduceLROnPlateau | LambdaLR:
    """Return the schedule of the learning rate, which takes one step per epoch."""
    if config.schedule == "cosine":
        return LambdaLR(optimiser, lambda epoch: cosine_factor(config, epoch))
    return ReduceLROnPlateau(
        optimiser,
        factor=config.lr_factor,
        patience=config.lr_patience - 1,  # torch acts one epoch after its patience is used up
        threshold=0,
        min_lr=config.lr_floor,
        eps=0,
    )


def cosine_factor(config: TrainConfig, epoch: int) -> float:
    """Return the learning rate of ``epoch``, counted from 0, divided by ``lr``.

    The learning rate rises in equal steps in the warm-up epochs. It then falls along half a cosine
    from ``lr`` to ``lr_floor``; the epoch after the last one would have ``lr_floor``.
    """
    warm_up, floor = config.warm_up, config.lr_floor / config.lr
    if epoch < warm_up:
        return (epoch + 1) / (warm_up + 1)
    done = (epoch - warm_up) / (config.epochs - warm_up)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(done, 1))) / 2


def amp_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the dtype that the network computes in.

    float32 without ``amp``; bfloat16 with it, or float16 on a GPU that has no bfloat16.
    """
    if not config.amp:
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def grey_level_statistics(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of each channel, float32 [C], over all pixels.

    Both are exact: they are computed from counts of the 256 levels. The standard deviation of a
    constant channel is given as 1.
    """
    channels = images.pixels.shape[1]
    counts = np.zeros((channels, 256))
    for start in range(0, len(images), 1024):
        pixels = images.pixels[images.rows[start : start + 1024]]
        for channel in range(channels):
            counts[channel] += np.bincount(pixels[:, channel].ravel(), minlength=256)
    share = counts / counts.sum(axis=1, keepdims=True)
    levels = np.arange(256)
    mean = share @ levels
    std = np.sqrt(np.sum(share * (levels - mean[:, None]) ** 2, axis=1))
    std[std == 0] = 1
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
