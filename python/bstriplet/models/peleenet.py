"""PeleeNet (Wang, Li, Ling, arXiv 1804.06882) as a timm model.

Pooling halves a map of odd size with rounding up, like the strided convolutions beside it and like
the arXiv paper's detector (its maps are 19 and 10 wide). So any image size works.
"""

from typing import Any

import torch
from timm.layers import ConvNormAct
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from bstriplet.models.timm_base import (
    Feature,
    Trunk,
    build,
    default_cfg,
    drop_path,
    drop_path_rates,
)

STEM_CHANNELS = 32
GROWTH = 32
LAYERS = (3, 4, 8, 6)
BOTTLENECKS = (1, 2, 4, 4)  # width of a layer's bottleneck over that of a branch


class Stem(nn.Module):
    """Two halvings; the second by a convolution and by a maximum, side by side."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_channels, channels, kernel_size=3, stride=2)
        self.branch = nn.Sequential(
            ConvNormAct(channels, channels // 2),
            ConvNormAct(channels // 2, channels, kernel_size=3, stride=2),
        )
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True)
        self.merge = ConvNormAct(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, channels, ceil(H/4), ceil(W/4)]."""
        x = self.conv(x)
        return self.merge(torch.cat((self.branch(x), self.pool(x)), dim=1))


class DenseLayer(nn.Module):
    """Appends a branch that sees 3 x 3 pixels and one that sees 5 x 5, each half of the growth."""

    def __init__(self, in_channels: int, bottleneck: int, drop_path_rate: float) -> None:
        super().__init__()
        channels = GROWTH // 2
        self.near = nn.Sequential(
            ConvNormAct(in_channels, bottleneck * channels),
            ConvNormAct(bottleneck * channels, channels, kernel_size=3),
            *drop_path(drop_path_rate),
        )
        self.far = nn.Sequential(
            ConvNormAct(in_channels, bottleneck * channels),
            ConvNormAct(bottleneck * channels, channels, kernel_size=3),
            ConvNormAct(channels, channels, kernel_size=3),
            *drop_path(drop_path_rate),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + GROWTH, H, W]."""
        return torch.cat((x, self.near(x), self.far(x)), dim=1)


class Transition(nn.Sequential):
    """[N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)], without compression."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            ConvNormAct(channels, channels),
            nn.AvgPool2d(kernel_size=2, stride=2, ceil_mode=True),
        )


def trunk(in_channels: int, drop_path_rate: float) -> Trunk:
    """Build all of PeleeNet but its head; a transition is its stage's first module."""
    stem = Stem(in_channels, STEM_CHANNELS)
    stages, features, channels = nn.Sequential(), [], STEM_CHANNELS
    rates = drop_path_rates(drop_path_rate, LAYERS)
    for i, (its_rates, bottleneck) in enumerate(zip(rates, BOTTLENECKS, strict=True)):
        stage = nn.Sequential(*([Transition(channels)] if i else []))
        for rate in its_rates:
            stage.append(DenseLayer(channels, bottleneck, rate))
            channels += GROWTH
        stages.append(stage)
        features.append(Feature(f"stages.{i}", channels, 4 << i))
    return Trunk(stem, stages, ConvNormAct(channels, channels), tuple(features))


default_cfgs = generate_default_cfgs({"peleenet": default_cfg(first_conv="stem.conv.conv")})


@register_model
def peleenet(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build PeleeNet; options of `StagedNet`. There are no pretrained weights."""
    return build("peleenet", trunk, pretrained, **options)
