"""The losses that the paper compares with, written out pair by pair and triplet by triplet."""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional


def triplet_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Eq. 1 for each triplet in turn."""
    s = functional.cosine_similarity(embeddings[:, None], embeddings[None], dim=2)
    triplets = itertools.permutations(range(len(labels)), 3)
    losses = [
        (1 - s[a, p] + s[a, n]).relu()
        for a, p, n in triplets
        if labels[a] == labels[p] and labels[a] != labels[n]
    ]
    return torch.stack(losses).mean()


def lifted_structure_loss(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The generalised form, anchor by anchor."""
    unit = functional.normalize(embeddings)
    losses = []
    for i in range(len(labels)):
        d = [math.dist(unit[i].tolist(), other.tolist()) for other in unit]
        own = sum(math.exp(d[j]) for j in range(len(d)) if labels[j] == labels[i] and j != i)
        other = sum(math.exp(1 - d[j]) for j in range(len(d)) if labels[j] != labels[i])
        losses.append(max(0, math.log(own) + math.log(other)))
    return torch.tensor(sum(losses) / len(losses))
