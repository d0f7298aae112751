"""One frozen dataclass that is configuration, command line and saved ``config.json`` in one."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from bstriplet.errors import UserError, unknown_name

DIGITS = "digits"
LOSSES = ("ce", "ce+bst")
BATCHES = ("random", "mined")
IMAGE_SIZE = 128
DIGITS_IMAGE_SIZE = 32


def _option(
    default: Any,
    help: str,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a field with its help text and the values that it may take."""
    return field(
        default=default,
        metadata={"help": help, "minimum": minimum, "maximum": maximum, "choices": choices},
    )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run; the defaults are section 3.1 of the paper.

    An instance is always valid: a value out of its range raises :class:`UserError`. ``data`` is
    made absolute and ``image_size`` is filled in, so that the saved file says what was used.
    """

    data: str = _option(DIGITS, "'digits' or a folder train/CLASS/*, test/CLASS/*")
    image_size: int = _option(
        0,
        f"pixels a side that images are resized to (default: {IMAGE_SIZE}; digits: "
        f"{DIGITS_IMAGE_SIZE})",
        minimum=8,
    )
    train_per_class: int = _option(
        0, "at most so many training images a class, validation included; 0: all", minimum=0
    )
    test_fraction: float = _option(
        0.2,
        "share of each class that tests where there is no test folder",
        minimum=0.01,
        maximum=0.5,
    )
    validation: str = _option(
        "train",
        "where validation images come from: held out of 'train', or a part of 'test' as in the "
        "paper (the test set is then no longer unseen)",
        choices=("train", "test"),
    )
    validation_fraction: float = _option(
        0.2, "share of each class that validates", minimum=0.01, maximum=0.5
    )
    skip_broken: bool = _option(False, "leave out images that cannot be read instead of stopping")
    backbone: str = _option("mobilenetv3_small_100", "any classification model of timm, by name")
    loss: str = _option("ce", "training loss", choices=LOSSES)
    bst_weight: float = _option(1.0, "weight of the BSTriplet loss (lambda of Eq. 7)", minimum=0)
    margin: float = _option(0.9, "margin of the BSTriplet loss (m of Eq. 3)", minimum=0, maximum=1)
    batches: str = _option(
        "random", "how batches are drawn: at random, or from K-means groups", choices=BATCHES
    )
    groups_per_class: int = _option(2, "K-means groups within each class (mined)", minimum=1)
    group_share: str = _option(
        "proportional",
        "images a batch takes from each group: in proportion to its size, or equally many (mined)",
        choices=("proportional", "equal"),
    )
    batch_size: int = _option(36, "images a batch", minimum=2)
    epochs: int = _option(400, "epochs at most", minimum=1)
    lr: float = _option(1e-3, "initial learning rate of Adam", minimum=1e-12)
    lr_factor: float = _option(
        0.3, "factor on the learning rate when the training loss stalls", minimum=0.01, maximum=0.59
    )
    lr_patience: int = _option(
        20, "epochs without a better training loss before the rate falls", minimum=1
    )
    lr_floor: float = _option(1e-8, "lowest learning rate", minimum=0)
    stop_patience: int = _option(
        30, "stop after so many epochs without a better validation loss", minimum=1
    )
    stop_delta: float = _option(1e-4, "smallest fall of validation loss that is better", minimum=0)
    seed: int = _option(0, "seed of split, weights and batches", minimum=0, maximum=2**31 - 1)
    device: str = _option(
        "auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda")
    )

    def __post_init__(self) -> None:
        if self.image_size == 0:
            size = DIGITS_IMAGE_SIZE if self.data == DIGITS else IMAGE_SIZE
            object.__setattr__(self, "image_size", size)
        for name, kind in field_types().items():
            object.__setattr__(self, name, _checked(name, kind, getattr(self, name)))
        if self.data != DIGITS:
            object.__setattr__(self, "data", str(Path(self.data).expanduser().absolute()))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Return the configuration saved by :meth:`to_dict`; an unknown field is an error."""
        known = field_types()
        for name in values:
            if name not in known:
                raise unknown_name("configuration field", name, known)
        return cls(**values)


@dataclass(frozen=True)
class Scheme:
    """One scheme of Table 3: a loss and a way to draw batches, written ``LOSS:BATCHES``."""

    loss: str
    batches: str

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Return the scheme written as ``text``, for example ``ce+bst:mined``."""
        loss, colon, batches = text.partition(":")
        if not colon:
            raise UserError(f"scheme {text!r}: write LOSS:BATCHES, for example ce+bst:mined")
        for what, name, known in (("loss", loss, LOSSES), ("batches", batches, BATCHES)):
            if name not in known:
                raise unknown_name(f"scheme {text!r}, {what}", name, known)
        return cls(loss, batches)

    def __str__(self) -> str:
        return f"{self.loss}:{self.batches}"

    @property
    def slug(self) -> str:
        """The scheme as a folder name, for example ``ce-bst-mined``."""
        return f"{self.loss}-{self.batches}".replace("+", "-")


def field_types() -> dict[str, type]:
    """Return the type of each field of :class:`TrainConfig` by name, in order."""
    return get_type_hints(TrainConfig)


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = ()) -> None:
    """Add a flag for each field of :class:`TrainConfig`, except those named in ``without``.

    A flag that is not given leaves no attribute: :func:`given_options` returns only what was typed.
    """
    types = field_types()
    for item in fields(TrainConfig):
        if item.name in without:
            continue
        text = item.metadata["help"].replace("%", "%%")
        if types[item.name] is bool:
            parser.add_argument(
                flag(item.name), action="store_true", default=argparse.SUPPRESS, help=text
            )
            continue
        if item.metadata["choices"]:
            text += f": {', '.join(item.metadata['choices'])}"
        if "default:" not in text:
            text += f" (default: {item.default})"
        parser.add_argument(
            flag(item.name),
            type=types[item.name],
            metavar=types[item.name].__name__.upper(),
            default=argparse.SUPPRESS,
            help=text,
        )


def given_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of :class:`TrainConfig` that were given on the command line."""
    return {name: getattr(namespace, name) for name in field_types() if hasattr(namespace, name)}


def describe_difference(ours: TrainConfig, theirs: TrainConfig) -> str:
    """Return ``"epochs (3 here, 5 there), ..."`` for the fields that differ, or ``""``."""
    return ", ".join(
        f"{name} ({getattr(ours, name)!r} here, {getattr(theirs, name)!r} there)"
        for name in field_types()
        if getattr(ours, name) != getattr(theirs, name)
    )


def _checked(name: str, kind: type, value: Any) -> Any:
    """Return ``value`` as ``kind``, or raise an error that names the field and what is allowed."""
    metadata = TrainConfig.__dataclass_fields__[name].metadata
    if kind is float and type(value) is int:
        value = float(value)
    given = type(value)
    if given is not kind:
        raise UserError(f"{flag(name)}: {value!r} is not of type {kind.__name__}")
    if metadata["choices"] and value not in metadata["choices"]:
        raise unknown_name(flag(name), value, metadata["choices"])
    if kind is float and not math.isfinite(value):
        raise UserError(f"{flag(name)}: {value} is not allowed; give a finite number")
    if kind in (int, float) and not metadata["minimum"] <= value <= metadata["maximum"]:
        upper = "" if math.isinf(metadata["maximum"]) else f" and at most {metadata['maximum']:g}"
        raise UserError(
            f"{flag(name)}: {value} is not allowed; it must be at least "
            f"{metadata['minimum']:g}{upper}"
        )
    return value
