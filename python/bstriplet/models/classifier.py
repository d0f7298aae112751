"""A classification model of timm that returns its embedding with the logits."""

from functools import cache, partial
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from bstriplet.errors import UserError, one_line, unknown_name


class Output(NamedTuple):
    """logits [N, classes], and embeddings [N, D] for the metric loss."""

    logits: Tensor
    embeddings: Tensor


def check_backbone(name: str, image_size: int | None = None) -> None:
    """Raise if timm has no model called ``name``; the error suggests the nearest name.

    With ``image_size``, raise also if a run cannot use the model: the name asks for pretrained
    weights, the model fails on images of this size, or its logits are not linear in an embedding.
    """
    if not timm.is_model(name):
        raise unknown_name(
            "--backbone",
            name,
            timm.list_models(),
            advice="Names are those of timm.list_models()",
        )
    if not image_size:
        return
    architecture, dot, weights = name.partition(".")
    if dot:
        raise UserError(
            f"--backbone: {name} asks for pretrained weights ({weights!r}), but a run starts from "
            f"random ones; give {architecture}"
        )
    cfg = timm.get_pretrained_cfg(name)
    if cfg and cfg.fixed_input_size and cfg.input_size[-1] != image_size:
        side = cfg.input_size[-1]
        raise UserError(
            f"--backbone: {name} takes images of {side} x {side} pixels only, not of {image_size}; "
            f"give --image-size {side}, or choose another"
        )
    _check_logits(name, image_size)


@cache
def _check_logits(backbone: str, image_size: int) -> None:
    """Raise unless a :class:`Classifier` gives the model's own logits, training or evaluating."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = Classifier(backbone, num_classes=2, channels=3)
        model.backbone.get_classifier().reset_parameters()  # some models start with zeros
        model.standardise_with(torch.full((3,), 128.0), torch.full((3,), 64.0))
        images = torch.randint(0, 256, (2, 3, image_size, image_size), dtype=torch.uint8)
        state = torch.get_rng_state()  # restored, so that both passes drop the same features
        for training in (True, False):
            model.train(training)
            try:
                torch.set_rng_state(state)
                logits = model(images).logits
                torch.set_rng_state(state)
                own = model.backbone(model.standardised(images))
            except Exception as error:
                raise UserError(
                    f"--backbone: {backbone} fails on images of {image_size} x {image_size} "
                    f"pixels ({one_line(error)}); give another --image-size, or choose another"
                ) from error
            if not torch.allclose(logits, own, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise UserError(
                    f"--backbone: the logits of {backbone} are not its linear classifier's output "
                    "for one embedding; choose another"
                )


def check_embedding(backbone: str, embedding: str, image_size: int) -> None:
    """Raise unless the model has the embedding; computes only the shapes of a forward pass."""
    with torch.random.fork_rng(devices=[]):
        model = Classifier(backbone, num_classes=2, channels=1, embedding=embedding).to("meta")
    model(torch.zeros(2, 1, image_size, image_size, dtype=torch.uint8, device="meta"))


class Classifier(nn.Module):
    """A timm model on uint8 images, which it standardises with the training set's statistics.

    The statistics are buffers: a state dict is all that is needed to classify new images.

    Args:
        backbone: name of a timm model.
        num_classes: number of logits.
        channels: of the images, 1 or 3.
        embedding: "classifier", the input of the linear classifier, or "pooled", the mean of the
            last feature map over its pixels.
        channels_last: whether images and filters have their channels last in memory.
    """

    backbone: Any  # timm's methods are not part of nn.Module
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        channels: int,
        *,
        embedding: str = "classifier",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        if embedding not in ("classifier", "pooled"):
            raise unknown_name("--embedding", embedding, ("classifier", "pooled"))
        self.backbone = timm.create_model(backbone, num_classes=num_classes, in_chans=channels)
        if not isinstance(self.backbone.get_classifier(), nn.Linear):
            raise UserError(
                f"--backbone: {backbone} has no linear classifier of one embedding; choose another"
            )
        self.embedding = embedding
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))
        # Convolutions of light CNNs run up to twice as fast on a CPU with channels last in memory.
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        for parameter in self.parameters():
            if parameter.ndim == 4:  # nn.Module.to fails at the filters of 3D convolutions
                parameter.data = parameter.data.to(memory_format=self.layout)

    def standardise_with(self, mean: Tensor, std: Tensor) -> None:
        """Set the mean and standard deviation of each channel, float [C], in grey levels."""
        self.mean.copy_(mean.view(-1, 1, 1))
        self.std.copy_(std.view(-1, 1, 1))

    @property
    def embedding_size(self) -> int:
        """D of the embeddings."""
        if self.embedding == "pooled":
            return self.backbone.num_features
        return self.backbone.get_classifier().in_features

    def standardised(self, images: Tensor) -> Tensor:
        """images uint8 [N, C, H, W] -> input of the backbone, float32 [N, C, H, W]."""
        channels = len(self.mean)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images must be uint8 [N, {channels}, H, W], grey levels from 0 to 255; these are "
                f"{images.dtype} {list(images.shape)}"
            )
        return (images.to(torch.float32, memory_format=self.layout) - self.mean) / self.std

    def forward(self, images: Tensor) -> Output:
        """images uint8 [N, C, H, W] -> :class:`Output`, float32."""
        features = self.backbone.forward_features(self.standardised(images))
        before_logits = self.backbone.forward_head(features, pre_logits=True)
        logits = self.backbone.get_classifier()(before_logits)
        pooled = self.embedding == "pooled"
        return Output(logits, self._mean_over_pixels(features) if pooled else before_logits)

    def _mean_over_pixels(self, features: Tensor) -> Tensor:
        if features.ndim != 4 or features.shape[1] != self.embedding_size:
            name = self.backbone.pretrained_cfg["architecture"]
            raise UserError(
                f"--embedding pooled: the features of {name} are no map [N, D, H, W]; use "
                "classifier"
            )
        return features.mean(dim=(2, 3))


def placed(model: Classifier, device: torch.device) -> Classifier:
    """Return the model on a device, with its convolutions as that device computes them best."""
    if device.type == "cpu":
        pad_depthwise(model)
    return model.to(device)


# Depthwise filters of at least this side are those that `pad_depthwise` is for.
_WIDE = 5


def pad_depthwise(model: nn.Module) -> None:
    """Let wide depthwise convolutions pad their input first: the same numbers, faster on a CPU.

    oneDNN takes its reference kernel for the gradient of a filter that reaches past its map on both
    sides, as the 5 x 5 filters of MobileNet-V3 do on maps of 4 x 4 and 2 x 2: at 64 x 64 pixels
    that is half of a training step.
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.groups == module.in_channels > 1
            and min(module.kernel_size) >= _WIDE
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and any(module.padding)
        ):
            down, right = module.padding
            module.padding = (0, 0)
            module.register_forward_pre_hook(partial(_padded, (right, right, down, down)))


def _padded(sides: tuple[int, ...], module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
    return pad(arguments[0], sides)
