"""One training step: eager, or replayed as a CUDA graph."""

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from bstriplet.errors import UserError
from bstriplet.loss_registry import BUILT_IN
from bstriplet.models.classifier import Output
from bstriplet.training import cuda_graph
from bstriplet.training.learner import Learner
from bstriplet.training.tally import Tally


class TrainingStep:
    """One update of the weights, from images uint8 [B, C, H, W] and labels int64 [B]."""

    def __init__(self, learner: Learner, tally: Tally) -> None:
        self.learner = learner
        self.tally = tally
        compiled = learner.config.compile
        self.model = torch.compile(learner.model, dynamic=False) if compiled else learner.model

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        learner = self.learner
        with torch.autocast(images.device.type, learner.amp_dtype, enabled=learner.config.amp):
            output = self.model(images)
        output = Output(*(part.float() for part in output))
        loss = learner.criterion(output, labels)
        learner.optimiser.zero_grad()
        learner.scaler.scale(loss.total).backward()
        if learner.config.clip_grad:
            learner.scaler.unscale_(learner.optimiser)
            clip_grad_norm_(learner.trained, learner.config.clip_grad)
        learner.scaler.step(learner.optimiser)
        learner.scaler.update()
        if learner.ema:
            learner.ema.update(learner.model)
        self.tally.add(loss, output.logits, labels)


def make_step(learner: Learner, tally: Tally) -> cuda_graph.Step:
    """Return the training step of a configuration: eager, or replayed as a CUDA graph."""
    step = TrainingStep(learner, tally)
    if not uses_cuda_graph(learner):
        return step
    return cuda_graph.GraphedStep(step, learner.optimiser, learner.config.batch_size)


def uses_cuda_graph(learner: Learner) -> bool:
    """Whether the training step is replayed as a CUDA graph."""
    config, scaled = learner.config, learner.scaler.is_enabled()
    on_gpu = learner.device.type == "cuda"
    if config.cuda_graph == "on" and not on_gpu:
        raise UserError("--cuda-graph on: there is no GPU here; use auto or off")
    if config.cuda_graph == "on" and scaled:
        raise UserError("--cuda-graph on: not with --amp on a GPU without bfloat16; use off")
    # Other libraries' losses may synchronise, which a CUDA graph forbids.
    built_in = BUILT_IN.get(config.loss)
    allowed = built_in is not None and built_in.capturable and not scaled
    return config.cuda_graph == "on" or (config.cuda_graph == "auto" and on_gpu and allowed)
