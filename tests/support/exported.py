"""A model whose loss goes through torch.export with it, and a step of its training."""

import copy
import io

import torch
from oracle import batch

from bstriplet_kernels import CrossEntropyBSTripletLoss


class Model(torch.nn.Module):
    """A backbone with the sum of two losses, of which one must not get lost."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Linear(6, 8)
        self.classifier = torch.nn.Linear(8, 3)
        self.criterion = CrossEntropyBSTripletLoss(**options)

    def forward(self, x, labels):
        embeddings = torch.relu(self.backbone(x))
        return self.criterion(self.classifier(embeddings), embeddings, labels)


def exported(model, strict=False, n=36):
    """The module of an exported copy: shared parameters would hide a gradient that is not there."""
    dynamic = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        copy.deepcopy(model),
        batch(n, 6, 3, 0, torch.float32),
        dynamic_shapes={"x": dynamic, "labels": dynamic},
        strict=strict,
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def train(model, x, labels):
    """The loss and the backbone's gradient."""
    model.zero_grad()
    loss = model(x, labels)
    loss.backward()
    return loss.detach(), model.get_parameter("backbone.weight").grad.clone()
