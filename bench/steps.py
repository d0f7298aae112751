"""A whole training step of a backbone, with and without the loss."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bstriplet_kernels import bstriplet_loss
from bstriplet_kernels.reference import naive_loss

from .cases import Case, Problem
from .providers import BASELINE, OURS, Provider, Step

IMAGE_SIZE = 128
CE, CE_AUTO, CE_NAIVE = "CE", "CE + BST", "CE + naive BST"
_MARGIN = 0.9


def providers() -> dict[str, Provider]:
    """Cross entropy alone; with our loss; with the paper-literal form (Eq. 7, lambda = 1)."""
    missing = None if importlib.util.find_spec("timm") else "timm"
    every: tuple[tuple[str, str, Callable[..., Any] | None], ...] = (
        (CE, BASELINE, None),
        (CE_AUTO, OURS, partial(bstriplet_loss, margin=_MARGIN)),
        (CE_NAIVE, BASELINE, partial(naive_loss, margin=_MARGIN)),
    )
    return {
        name: Provider(name, group, partial(_step, loss), "nothing", missing)
        for name, group, loss in every
    }


def make_problem(case: Case) -> Problem:
    """N grey images [N, 1, 128, 128] of noise, float32, and their labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.n, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = torch.arange(case.n) % case.c
    return Problem(case, images.to(case.device), labels.to(case.device), _MARGIN)


def _backbone(name: str, classes: int) -> Any:
    import timm

    if importlib.util.find_spec("bstriplet") is not None:
        importlib.import_module("bstriplet.models.classifier")  # registers those that timm lacks
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=classes, in_chans=1)


def _step(loss: Callable[..., Any] | None, problem: Problem) -> Step:
    """Forward, loss, backward and Adam's step."""
    case = problem.case
    model = _backbone(case.backbone, case.c).to(case.device).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    cross_entropy = nn.CrossEntropyLoss()
    if model.head_hidden_size != case.d:
        raise ValueError(f"{case.backbone} has D = {model.head_hidden_size}, not {case.d}")

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        features = model.forward_features(images)
        embeddings = model.forward_head(features, pre_logits=True)
        total = cross_entropy(model.get_classifier()(embeddings), labels)
        if loss is not None:
            total = total + loss(embeddings, labels)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        return total.detach(), None

    return step
