"""timm's model interface, for networks of a stem, stages, a final convolution and a head.

ShuffleNet-V2 and PeleeNet share this module; they differ in their stems and stages alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, ConvNormAct, DropPath
from timm.models import build_model_with_cfg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Feature:
    """A feature map: its module, its channels, and the input's size divided by the map's size."""

    module: str
    channels: int
    reduction: int


@dataclass(frozen=True)
class Trunk:
    """All of a network but its head, as modules that run one after the other.

    stages: each a ``nn.Sequential``. final_conv: its output channels are the embedding's
    dimension. features: the last maps at 1/4, 1/8, 1/16 and 1/32 of the input's size, from
    ``"stem"`` or ``"stages.i"``.
    """

    stem: nn.Module
    stages: nn.Sequential
    final_conv: ConvNormAct
    features: tuple[Feature, ...]


class StagedNet(nn.Module):
    """A timm model around a trunk; images float [N, in_chans, H, W] of any H and W.

    Args:
        cfg: builds the trunk for a number of input channels and a ``drop_path_rate``.
        num_classes: number of logits; 0 for no classifier, the model then returns the embedding.
        in_chans: channels of the images.
        global_pool: timm's name of the pooling; ``""`` for none.
        drop_rate: dropout of the embedding, in front of the classifier.
        drop_path_rate: stochastic depth, in training: the share of images for which the last unit
            adds no features; it rises linearly from 0 in the first unit. Units that halve the map
            always add theirs.
        bn_momentum: the share of a batch in the running statistics of every batch norm.
        bn_eps: added to the variance in every batch norm.
        device: device of the weights; torch's default device if None.
        dtype: dtype of the weights; float32 if None.
    """

    def __init__(
        self,
        cfg: Callable[[int, float], Trunk],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={drop_path_rate}: give a rate from 0 to below 1")
        if not 0 <= bn_momentum <= 1:
            raise ValueError(f"bn_momentum={bn_momentum}: give a share from 0 to 1")
        if not 0 < bn_eps < math.inf:
            raise ValueError(f"bn_eps={bn_eps}: give a positive number")
        device = torch.device(device or torch.get_default_device())
        with device:
            trunk = cfg(in_chans, drop_path_rate)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = [
            {"module": map.module, "num_chs": map.channels, "reduction": map.reduction}
            for map in trunk.features
        ]
        self.stem = trunk.stem
        self.stages = trunk.stages
        self.final_conv: nn.Module = trunk.final_conv
        self.num_features = trunk.final_conv.out_channels
        with device:
            self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.head_hidden_size = self._pooled_size()
        self.apply(_initialise)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum, module.eps = bn_momentum, bn_eps
        self.to(dtype=dtype)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters' names into layers; coarse: a stage is one layer."""
        stages = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(stages, None), (r"^final_conv", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward: less memory, the same gradient, more time.

        The recomputation also updates batch-norm's running statistics a second time.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the layer from embedding to logits; an identity where ``num_classes`` is 0."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling too if ``global_pool`` is given."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self._pooled_size()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] -> feature map [N, num_features, ceil(H/32), ceil(W/32)]."""
        x = self.stem(x)
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = _checkpointed(stage, x)
            else:
                x = stage(x)
        return self.final_conv(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map -> logits [N, num_classes], or the pooled embedding if ``pre_logits``."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] -> logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Images -> the feature map of ``forward_features``, and maps of ``feature_info``.

        Args:
            x: images [N, in_chans, H, W].
            indices: positions of the maps, or the number of last maps; None for all maps.
            norm: has no effect, because the maps have no norm of their own; timm passes it.
            stop_early: stop after the last map of ``indices``, and return it as the feature map.
            output_fmt: ``"NCHW"``, the only layout supported.
            intermediates_only: return the maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' is possible here")
        taken = _positions(indices, len(self.feature_info))
        wanted = {self.feature_info[i]["module"] for i in taken}
        last = self.feature_info[max(taken)]["module"]
        maps = []
        for name, part in self._parts():
            spares_memory = self.grad_checkpointing and part is not self.stem
            x = _checkpointed(part, x) if spares_memory else part(x)
            if name in wanted:
                maps.append(x)
            if stop_early and name == last:
                break
        else:
            if not intermediates_only:
                x = self.final_conv(x)
        return maps if intermediates_only else (x, maps)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the modules that the maps of ``indices`` do not need; return their positions.

        The stages after the last map are removed. Final convolution and head are removed too with
        ``prune_head``, or if a stage was. ``prune_norm`` has no effect.
        """
        taken = _positions(indices, len(self.feature_info))
        last = self.feature_info[max(taken)]
        kept = [name for name, _ in self._parts()].index(last["module"])
        incomplete = kept < len(self.stages)
        self.stages = self.stages[:kept]
        if prune_head or incomplete:
            self.final_conv = nn.Identity()
            self.num_features = last["num_chs"]
            self.head = ClassifierHead(self.num_features, 0, "", self.drop_rate)
            self.head.train(self.training)
            self.num_classes = 0
            self.head_hidden_size = self._pooled_size()
        return taken

    def _pooled_size(self) -> int:
        # Poolings that concatenate two statistics double the embedding.
        return self.num_features * self.head.global_pool.feat_mult()

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        yield "stem", self.stem
        for position, stage in enumerate(self.stages):
            yield f"stages.{position}", stage


def build(
    variant: str,
    cfg: Callable[[int, float], Trunk],
    pretrained: bool,
    weights_filter: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a registered model as timm does, with feature extraction and pretrained weights.

    Args:
        variant: the registered name.
        cfg: builds the trunk for a number of input channels and a ``drop_path_rate``.
        pretrained: load the weights that the variant's configuration points to.
        weights_filter: (state dict of those weights, model) -> state dict of the model.
        options: those of :class:`StagedNet` and of ``timm.create_model``.
    """
    return build_model_with_cfg(
        StagedNet,
        variant,
        pretrained,
        model_cfg=cfg,
        feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 2, 3)},
        pretrained_filter_fn=weights_filter,
        **options,
    )


def default_cfg(url: str = "", *, first_conv: str) -> dict[str, Any]:
    """Return timm's configuration of a model's weights at ``url``, trained on ImageNet."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head.fc",
    }


def drop_path_rates(last: float, units: Sequence[int]) -> list[list[float]]:
    """Return the rates of each stage's units, from 0 in the first unit linearly to ``last``."""
    rates = torch.linspace(0, last, sum(units), dtype=torch.float64, device="cpu")
    return [of_stage.tolist() for of_stage in rates.split(list(units))]


def drop_path(rate: float) -> list[nn.Module]:
    """Return the modules that end a branch whose features are dropped at ``rate``; none at 0."""
    return [DropPath(rate)] if rate else []


def _checkpointed(stage: nn.Module, x: Tensor) -> Tensor:
    for unit in stage.children():
        x = checkpoint(unit, x, use_reentrant=False)
    return x


def _positions(indices: int | Sequence[int] | None, count: int) -> list[int]:
    if indices is None:
        indices = count
    chosen = range(-indices, 0) if isinstance(indices, int) else indices
    if not chosen or any(not -count <= position < count for position in chosen):
        raise ValueError(
            f"indices={indices}: there are {count} feature maps; give the number of last maps, or "
            f"positions from {-count} to {count - 1}"
        )
    return [position % count for position in chosen]


def _initialise(module: nn.Module) -> None:
    # Fan-in: a depthwise filter sees one channel, and fan-out would count them all.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
