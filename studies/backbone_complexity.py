"""Parameters and FLOPs of the four backbones beside the paper's Table 1, differences explained.

    python -m studies.backbone_complexity           print the table and write its CSV
    python -m studies.backbone_complexity --check   print it, write nothing, fail if the CSV differs

Images are 128 x 128 x 1, classes three, batch norm as in inference. Parameters are counted as Keras
does: with the running mean and variance of every batch norm. `flops` counts 2 for each multiply-add
of convolutions and linear layers. Batch norm, bias and activation count nothing, because the paper
does not say how it counts them. `map_elements` are the numbers that the convolutions write.
`pointwise_to_match` is the number of operations for each of them that would make up the difference
to Table 1. A Keras network is written down as its list of layers, which gives exact counts.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

import bstriplet.models  # noqa: F401  (registers ShuffleNet-V2 and PeleeNet)
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

RESULT = Path(__file__).parent / "results" / "backbone_complexity.csv"
SIZE, CHANNELS, CLASSES = 128, 1, 3


@dataclass(frozen=True)
class Count:
    """Parameters as Keras counts them, FLOPs of the products, elements that convolutions write."""

    parameters: int
    flops: int
    map_elements: int


@dataclass(frozen=True)
class Printed:
    """A column of Table 1, in millions."""

    network: str
    parameters: float
    flops: float


EFFICIENTNET = Printed("EfficientNet-B1", 6.58, 395)
MOBILENET = Printed("MobileNet-V3-Small", 3.04, 43.7)
SHUFFLENET = Printed("ShuffleNet-V2", 4.02, 319)
PELEENET = Printed("PeleeNet", 2.11, 323)


@dataclass(frozen=True)
class Row:
    """One network that we build or count, beside its column of Table 1."""

    network: str
    variant: str
    embedding: int
    parameters: int
    table1_parameters_m: float
    parameters_difference: str
    flops: int
    table1_flops_m: float
    flops_difference: str
    map_elements: int
    pointwise_to_match: float
    explanation: str


@dataclass
class KerasLayers:
    """A Keras network as a list of convolutions with "same" padding, counted as they are added.

    A dense layer is a 1 x 1 convolution of a 1 x 1 map.
    """

    size: int
    channels: int
    layers: list[Count] = field(default_factory=list)

    def conv(
        self,
        filters: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        bias: bool = True,
        norm: bool = True,
    ) -> KerasLayers:
        """Append a convolution, with its batch norm."""
        return self._append(filters, kernel, stride, self.channels, bias, norm)

    def depthwise(self, kernel: int, stride: int) -> KerasLayers:
        """Append a depthwise convolution, with its batch norm."""
        return self._append(self.channels, kernel, stride, 1, True, True)

    def pool(self, size: int) -> KerasLayers:
        """Append a pooling to maps of this size."""
        self.size = size
        return self

    def branch(self, channels: int | None = None) -> KerasLayers:
        """Begin a branch at the present map, or at some of its channels."""
        return KerasLayers(self.size, channels or self.channels)

    def join(self, channels: int, *branches: KerasLayers) -> KerasLayers:
        """Append branches; the maps then have the last branch's size and these channels."""
        for branch in branches:
            self.layers += branch.layers
        self.size, self.channels = branches[-1].size, channels
        return self

    def total(self) -> Count:
        """Sum all layers."""
        return Count(*(sum(column) for column in zip(*map(astuple, self.layers), strict=True)))

    def _append(
        self, filters: int, kernel: int, stride: int, inputs: int, bias: bool, norm: bool
    ) -> KerasLayers:
        self.size, self.channels = math.ceil(self.size / stride), filters
        weights = kernel**2 * inputs * filters
        self.layers.append(
            Count(
                parameters=weights + filters * (bias + 4 * norm),
                flops=2 * weights * self.size**2,
                map_elements=filters * self.size**2,
            )
        )
        return self


def keras_mobilenet() -> Count:
    """Count MobileNet-V3-Small whose squeeze-and-excitation does not squeeze, 1,280 features."""
    blocks = (  # kernel, expanded, out, stride, squeeze-and-excitation
        (3, 16, 16, 2, True),
        (3, 72, 24, 2, False),
        (3, 88, 24, 1, False),
        (5, 96, 40, 2, True),
        (5, 240, 40, 1, True),
        (5, 240, 40, 1, True),
        (5, 120, 48, 1, True),
        (5, 144, 48, 1, True),
        (5, 288, 96, 2, True),
        (5, 576, 96, 1, True),
        (5, 576, 96, 1, True),
    )
    net = KerasLayers(SIZE, CHANNELS).conv(16, 3, stride=2)
    for kernel, expanded, out, stride, excited in blocks:
        net.conv(expanded).depthwise(kernel, stride)
        if excited:
            gate = KerasLayers(1, expanded).conv(expanded, norm=False).conv(expanded, norm=False)
            net.layers += gate.layers
        net.conv(out)
    return net.conv(576).pool(1).conv(1280, norm=False).conv(CLASSES, norm=False).total()


def keras_shufflenet() -> Count:
    """Count ShuffleNet-V2 1.0x whose branches have all channels of the stage, with biases."""
    net = KerasLayers(SIZE, CHANNELS).conv(24, 3, stride=2, bias=False, norm=False).pool(SIZE // 4)
    for channels, units in ((116, 4), (232, 8), (464, 4)):
        left = net.branch().depthwise(3, 2).conv(channels)
        right = net.branch().conv(channels).depthwise(3, 2).conv(channels)
        net.join(2 * channels, left, right)
        for _ in range(1, units):
            right = net.branch(channels).conv(channels).depthwise(3, 1).conv(channels)
            net.join(2 * channels, right)
    return net.conv(1024, norm=False).pool(1).conv(CLASSES, norm=False).total()


def count(model: nn.Module) -> Count:
    """Count a timm model."""
    elements = 0

    def add(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    statistics = (b.numel() for name, b in model.named_buffers() if name.endswith(("mean", "var")))
    parameters = sum(p.numel() for p in model.parameters()) + sum(statistics)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, CHANNELS, SIZE, SIZE))
    return Count(parameters, counter.get_total_flops(), elements)


def rows() -> Iterator[Row]:
    """Count every network."""
    yield _timm(
        EFFICIENTNET,
        "efficientnet_b1",
        "the same network: the parameters agree in every printed digit; the missing FLOPs can be "
        "those of batch norm, swish and the gates of squeeze-and-excitation",
    )
    yield _timm(
        MOBILENET,
        "mobilenetv3_small_100",
        "the network of arXiv 1905.02244, with squeeze-and-excitation at a quarter of the width "
        "and 1,024 features; not the paper's, see the next row",
    )
    yield _row(
        MOBILENET,
        "Keras: excitation without squeeze",
        1280,
        keras_mobilenet(),
        "the paper's, by its parameters: its embedding has 1,280 features (text to Figure 6), and "
        "both dense layers of squeeze-and-excitation have the full width, as in a public Keras "
        "implementation; the missing FLOPs can be those of bias, batch norm and hard-swish",
    )
    yield _timm(
        SHUFFLENET,
        "shufflenet_v2",
        "the paper's widths in the layers of arXiv 1807.11164: no bias in front of a batch norm, "
        "and a batch norm after the first and the last convolution too; see the next row",
    )
    yield _row(
        SHUFFLENET,
        "Keras: branches of full width",
        1024,
        keras_shufflenet(),
        "the paper's, by its parameters: 1.0x in which each branch has all channels of the stage "
        "(116, 232, 464) and not half of them, as in a public Keras implementation; the missing "
        "FLOPs can be those of bias, batch norm and ReLU",
    )
    for width in ("0.5", "1.0", "1.5", "2.0"):
        yield _timm(
            SHUFFLENET,
            f"shufflenet_v2_x{width.replace('.', '_')}",
            f"{width}x of arXiv 1807.11164; not the paper's",
        )
    yield _timm(
        PELEENET,
        "peleenet",
        "the same network: the parameters agree in every printed digit; Table 1's FLOPs are fewer "
        "than those of the products alone, by 1 %: not explained, for the other three are more",
    )


def table(counted: list[Row]) -> str:
    """Return the rows as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(column.name for column in fields(Row))
    writer.writerows(astuple(row) for row in counted)
    return text.getvalue()


def main(arguments: list[str]) -> int:
    """Count, print, and write or compare; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the CSV, write nothing")
    check = parser.parse_args(arguments).check
    counted = list(rows())
    for row in counted:
        print(
            f"{row.network:18} {row.variant:34} "
            f"{row.parameters / 1e6:6.3f} M of {row.table1_parameters_m:<5g} "
            f"{row.flops / 1e6:6.1f} MFLOPs of {row.table1_flops_m:<5g} {row.explanation}"
        )
    if not check:
        RESULT.write_text(table(counted))
        print(f"written: {RESULT}")
        return 0
    if not RESULT.exists() or RESULT.read_text() != table(counted):
        print(f"{RESULT} is out of date: run this again without --check", file=sys.stderr)
        return 1
    return 0


def _timm(printed: Printed, name: str, explanation: str) -> Row:
    model = timm.create_model(name, num_classes=CLASSES, in_chans=CHANNELS)
    return _row(printed, name, model.head_hidden_size, count(model), explanation)


def _row(printed: Printed, variant: str, embedding: int, found: Count, explanation: str) -> Row:
    return Row(
        network=printed.network,
        variant=variant,
        embedding=embedding,
        parameters=found.parameters,
        table1_parameters_m=printed.parameters,
        parameters_difference=f"{found.parameters / (1e6 * printed.parameters) - 1:+.1%}",
        flops=found.flops,
        table1_flops_m=printed.flops,
        flops_difference=f"{found.flops / (1e6 * printed.flops) - 1:+.1%}",
        map_elements=found.map_elements,
        pointwise_to_match=round((1e6 * printed.flops - found.flops) / found.map_elements, 1),
        explanation=explanation,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
