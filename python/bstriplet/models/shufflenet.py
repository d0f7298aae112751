"""ShuffleNet-V2 (Ma et al., arXiv 1807.11164) as timm models, in five widths.

``shufflenet_v2`` is the network of the BSTriplet paper's Table 1, 4.02 M parameters with the batch
norms' statistics. arXiv 1807.11164 has no such width. It is 1.0x in a public Keras implementation,
where each branch of a unit has all channels of the stage instead of half of them. The stages are
then twice as wide (232, 464, 928); the last convolution keeps its 1,024 channels.

``shufflenet_v2_x0_5``, ``shufflenet_v2_x1_0``, ``shufflenet_v2_x1_5`` and ``shufflenet_v2_x2_0``
are those of arXiv 1807.11164, Table 5. With ``pretrained=True`` they load torchvision's ImageNet
weights.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs, register_model, register_notrace_function
from torch import Tensor, nn
from torchvision import models

from bstriplet.models.timm_base import (
    Feature,
    Trunk,
    build,
    default_cfg,
    drop_path,
    drop_path_rates,
)

STEM_CHANNELS = 24
UNITS = (4, 8, 4)


@dataclass(frozen=True)
class Width:
    """Output channels of the three stages and of the last convolution."""

    stages: tuple[int, int, int]
    final: int


TABLE_1 = Width((232, 464, 928), 1024)
X0_5 = Width((48, 96, 192), 1024)
X1_0 = Width((116, 232, 464), 1024)
X1_5 = Width((176, 352, 704), 1024)
X2_0 = Width((244, 488, 976), 2048)


@register_notrace_function  # torch.fx cannot follow the choice of layout
def interleave(left: Tensor, right: Tensor) -> Tensor:
    """Two maps [N, C, H, W] -> [N, 2C, H, W], channels alternately from left and right.

    Concatenation and channel shuffle of two groups in one copy, in the layout of ``right``.
    """
    if right.is_contiguous(memory_format=torch.channels_last):
        last = (left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1))
        return torch.stack(last, dim=-1).flatten(-2).permute(0, 3, 1, 2)
    return torch.stack((left, right), dim=2).flatten(1, 2)


class Unit(nn.Module):
    """Half of the channels pass unchanged, half through three convolutions; then they mix."""

    def __init__(self, channels: int, drop_path_rate: float) -> None:
        super().__init__()
        self.right = _right_branch(channels // 2, channels // 2, stride=1)
        self.right.extend(drop_path(drop_path_rate))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        left, right = x.chunk(2, dim=1)
        return interleave(left, self.right(right))


class DownUnit(nn.Module):
    """Both branches see all channels and halve height and width."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.left = nn.Sequential(
            _depthwise(in_channels, stride=2), ConvNormAct(in_channels, channels // 2)
        )
        self.right = _right_branch(in_channels, channels // 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, channels, ceil(H/2), ceil(W/2)]."""
        return interleave(self.left(x), self.right(x))


def trunk(width: Width, in_channels: int, drop_path_rate: float) -> Trunk:
    """Build all of ShuffleNet-V2 but its head."""
    stem = OrderedDict(
        conv=ConvNormAct(in_channels, STEM_CHANNELS, kernel_size=3, stride=2),
        pool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    inputs = (STEM_CHANNELS, *width.stages[:-1])
    rates = drop_path_rates(drop_path_rate, UNITS)
    stages = (
        nn.Sequential(DownUnit(before, channels), *(Unit(channels, rate) for rate in its_rates[1:]))
        for before, channels, its_rates in zip(inputs, width.stages, rates, strict=True)
    )
    stage_features = (
        Feature(f"stages.{i}", channels, 8 << i) for i, channels in enumerate(width.stages)
    )
    return Trunk(
        stem=nn.Sequential(stem),
        stages=nn.Sequential(*stages),
        final_conv=ConvNormAct(width.stages[-1], width.final),
        features=(Feature("stem", STEM_CHANNELS, 4), *stage_features),
    )


def from_torchvision(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the weights of torchvision's ShuffleNet-V2; return weights of ours as they are."""
    if "conv1.0.weight" not in weights:
        return weights
    # Layers stand in the same order in both.
    return dict(zip(model.state_dict(), weights.values(), strict=True))


def _right_branch(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        ConvNormAct(in_channels, channels),
        _depthwise(channels, stride),
        ConvNormAct(channels, channels),
    )


def _depthwise(channels: int, stride: int) -> ConvNormAct:
    return ConvNormAct(
        channels, channels, kernel_size=3, stride=stride, groups=channels, apply_act=False
    )


_cfg = partial(default_cfg, first_conv="stem.conv.conv")
default_cfgs = generate_default_cfgs(
    {
        "shufflenet_v2": _cfg(),
        "shufflenet_v2_x0_5.tv_in1k": _cfg(models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url),
        "shufflenet_v2_x1_0.tv_in1k": _cfg(models.ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1.url),
        "shufflenet_v2_x1_5.tv_in1k": _cfg(models.ShuffleNet_V2_X1_5_Weights.IMAGENET1K_V1.url),
        "shufflenet_v2_x2_0.tv_in1k": _cfg(models.ShuffleNet_V2_X2_0_Weights.IMAGENET1K_V1.url),
    }
)


def _shufflenet(variant: str, width: Width, pretrained: bool, **options: Any) -> nn.Module:
    return build(variant, partial(trunk, width), pretrained, from_torchvision, **options)


@register_model
def shufflenet_v2(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build the ShuffleNet-V2 of the BSTriplet paper's Table 1; options of `StagedNet`."""
    return _shufflenet("shufflenet_v2", TABLE_1, pretrained, **options)


@register_model
def shufflenet_v2_x0_5(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ShuffleNet-V2 0.5x; options of `StagedNet`."""
    return _shufflenet("shufflenet_v2_x0_5", X0_5, pretrained, **options)


@register_model
def shufflenet_v2_x1_0(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ShuffleNet-V2 1.0x; options of `StagedNet`."""
    return _shufflenet("shufflenet_v2_x1_0", X1_0, pretrained, **options)


@register_model
def shufflenet_v2_x1_5(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ShuffleNet-V2 1.5x; options of `StagedNet`."""
    return _shufflenet("shufflenet_v2_x1_5", X1_5, pretrained, **options)


@register_model
def shufflenet_v2_x2_0(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ShuffleNet-V2 2.0x; options of `StagedNet`."""
    return _shufflenet("shufflenet_v2_x2_0", X2_0, pretrained, **options)
