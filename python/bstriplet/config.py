"""One frozen dataclass that is configuration, command line and saved ``config.json`` in one."""

import argparse
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from bstriplet.errors import UserError, unknown_name
from bstriplet.loss_registry import BUILT_IN

DIGITS = "digits"
MEDMNIST = "medmnist:"
OTHER_LOSS = re.compile(r"ce\+[A-Z].*")  # a class of pytorch-metric-learning
BATCHES = ("random", "mined")
COPIES = "copies"
ONLINE = "symmetries+shifts"
AUGMENT_KINDS = ("symmetries", "flips", "shifts", "rotations", "scales", "brightness")
_KIND = f"(?:{'|'.join(AUGMENT_KINDS)})"
_KINDS = re.compile(rf"{_KIND}(\+{_KIND})*")
IMAGE_SIZE = 128
MAX_PIXELS = 178_956_970  # Pillow's default limit, beyond which it raises DecompressionBombError
DIGITS_IMAGE_SIZE = 32


def _option(
    group: str,
    default: Any,
    help: str,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    choices: tuple[str, ...] = (),
    or_like: re.Pattern[str] | None = None,
) -> Any:
    """Declare a field: its group in the help, its help text and its allowed values.

    A text value must be one of ``choices`` or match ``or_like``. With ``or_like``, ``help`` must
    describe both; otherwise the choices are added to it.
    """
    metadata = {
        "group": group,
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": choices,
        "or_like": or_like,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the result of a run; the defaults are section 3.1 of the paper.

    An instance is always valid: a value out of its range raises :class:`UserError`. ``data`` is
    made absolute and ``image_size`` is filled in, so that the saved file holds the values used.
    """

    data: str = _option(
        "data",
        DIGITS,
        "'digits', a folder (train/CLASS/*, or a set of the paper as it is downloaded), a .csv or "
        ".tsv of path,label,..., a MedMNIST .npz, or medmnist:NAME[:SIZE]",
    )
    image_size: int = _option(
        "data",
        0,
        f"images are resized to squares of this side, in pixels (default: {IMAGE_SIZE}; digits: "
        f"{DIGITS_IMAGE_SIZE})",
        minimum=8,
        maximum=2048,
    )
    train_per_class: int = _option(
        "data",
        0,
        "largest number of training images per class, validation included; 0: all",
        minimum=0,
    )
    test_fraction: float = _option(
        "data",
        0.2,
        "share of each class for the test part, where the data have none",
        minimum=0.01,
        maximum=0.5,
    )
    validation: str = _option(
        "data",
        "train",
        "source of validation images: held out of 'train', or a share of 'test' as in the paper "
        "(the test images are then no longer unseen)",
        choices=("train", "test"),
    )
    validation_fraction: float = _option(
        "data", 0.2, "share of each class for the validation part", minimum=0.01, maximum=0.5
    )
    split_by: str = _option(
        "data",
        "patient",
        "unit that a split keeps together: all images of a patient, where patients are known, or "
        "single images, as in the paper",
        choices=("patient", "image"),
    )
    folds: int = _option(
        "data",
        0,
        "cross-validation: number of folds of all images; 0: none",
        minimum=0,
    )
    fold: int = _option(
        "data",
        0,
        "fold that is the test part, from 1; 0: the seed chooses it, so that seeds 0 to K - 1 are "
        "one cross-validation of K folds and the next K seeds another",
        minimum=0,
    )
    skip_broken: bool = _option(
        "data", False, "leave out images that cannot be read instead of stopping"
    )
    max_pixels: int = _option(
        "data",
        MAX_PIXELS,
        "largest number of pixels of an image file (width x height); a larger file counts as "
        "broken. Reading takes 2 to 20 bytes of memory per pixel, 30 to 100 if a sample has more "
        "than 8 bits; 0: any",
        minimum=0,
    )
    backbone: str = _option(
        "model", "mobilenetv3_small_100", "any timm model with a linear classifier, by name"
    )
    embedding: str = _option(
        "model",
        "classifier",
        "embedding for the metric loss: the input of the classifier, or the mean of the last "
        "feature map over its pixels; they differ in a network with layers in between "
        "(MobileNet-V3)",
        choices=("classifier", "pooled"),
    )
    loss: str = _option(
        "loss",
        "ce",
        f"training loss: {', '.join(BUILT_IN)}, or ce+NAME with any loss of "
        "pytorch-metric-learning, such as ce+SupConLoss or 'ce+ContrastiveLoss(neg_margin=0.5)'",
        choices=tuple(BUILT_IN),
        or_like=OTHER_LOSS,
    )
    metric_weight: float = _option(
        "loss", 1.0, "weight of the metric loss (lambda of Eq. 7)", minimum=0
    )
    margin: float = _option(
        "loss", 0.9, "margin of the BSTriplet loss (m of Eq. 3)", minimum=0, maximum=1
    )
    similarity: str = _option(
        "loss",
        "square",
        "similarity of the BSTriplet loss, of a cosine s: s^2, s*|s|, or s itself",
        choices=("square", "signed_square", "linear"),
    )
    eq3: str = _option(
        "loss",
        "corrected",
        "sign of the negatives' mean in Eq. 3: corrected (plus), or as printed (minus)",
        choices=("corrected", "printed"),
    )
    class_weights: str = _option(
        "loss",
        "none",
        "weights of the classes in cross entropy; balanced: in inverse proportion to their sizes",
        choices=("none", "balanced"),
    )
    label_smoothing: float = _option(
        "loss", 0.0, "label smoothing of cross entropy", minimum=0, maximum=0.9
    )
    batches: str = _option(
        "batches",
        "random",
        "how batches are drawn: at random, or from K-means groups",
        choices=BATCHES,
    )
    groups_per_class: int = _option(
        "batches", 2, "K-means groups within each class (mined)", minimum=1
    )
    group_share: str = _option(
        "batches",
        "proportional",
        "images per batch from each group: in proportion to its size, or equally many (mined)",
        choices=("proportional", "equal"),
    )
    batch_size: int = _option("batches", 36, "images per batch", minimum=2)
    augment: str = _option(
        "batches",
        "none",
        f"none; {COPIES}: each training image also rotated, flipped and moved by 5 pixels, the "
        "seven copies of section 3.5; or changed at random, anew in each epoch, by kinds joined by "
        "+: symmetries (right angles and flips), flips (left to right), shifts (to 5 pixels), "
        "rotations (to 10 degrees), scales (to 1.1), brightness (to 1.2); online: "
        f"{ONLINE}; the strong recipe does not flip digits",
        choices=("none", COPIES, "online"),
        or_like=_KINDS,
    )
    epochs: int = _option("recipe", 400, "epochs at most", minimum=1)
    optimiser: str = _option(
        "recipe", "adam", "optimiser; sgd has momentum 0.9", choices=("adam", "adamw", "sgd")
    )
    weight_decay: float = _option(
        "recipe",
        0.0,
        "decay of weights, not of biases and normalisations; decoupled in adamw, else L2",
        minimum=0,
    )
    clip_grad: float = _option(
        "recipe",
        0.0,
        "largest norm of a step's gradient, which is scaled down to it; 0: any",
        minimum=0,
    )
    lr: float = _option("recipe", 1e-3, "initial learning rate", minimum=1e-12)
    schedule: str = _option(
        "recipe",
        "plateau",
        "plateau: the learning rate falls when the training loss stalls; cosine: it falls to "
        "--lr-floor over --epochs (--stop-patience still applies)",
        choices=("plateau", "cosine"),
    )
    warmup_epochs: int = _option(
        "recipe",
        0,
        "first epochs in which the learning rate rises (cosine); -1: an eighth of the epochs",
        minimum=-1,
    )
    lr_factor: float = _option(
        "recipe",
        0.3,
        "factor on the learning rate when the training loss stalls (plateau)",
        minimum=0.01,
        maximum=0.59,
    )
    lr_patience: int = _option(
        "recipe",
        20,
        "epochs without a better training loss before the learning rate falls (plateau)",
        minimum=1,
    )
    lr_floor: float = _option("recipe", 1e-8, "lowest learning rate", minimum=0)
    stop_patience: int = _option(
        "recipe",
        30,
        "epochs without a better validation loss before training stops; 0: it never does",
        minimum=0,
    )
    stop_delta: float = _option(
        "recipe", 1e-4, "smallest fall of the validation loss that counts as better", minimum=0
    )
    select: str = _option(
        "recipe",
        "last",
        "epoch whose model is tested: the last, or that of the best validation images by cross "
        "entropy (ce), by accuracy, or by the minimised loss, which has the metric term",
        choices=("last", "ce", "accuracy", "loss"),
    )
    ema: float = _option(
        "recipe",
        0.0,
        "decay per step of averaged weights, which are then validated and kept; 0: none",
        minimum=0,
        maximum=0.99999,
    )
    amp: bool = _option("recipe", False, "compute the network in bfloat16 where that is safe")
    seed: int = _option(
        "machine", 0, "seed of split, weights and batches", minimum=0, maximum=2**31 - 1
    )
    device: str = _option(
        "machine", "auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda")
    )
    channels_last: bool = _option(
        "machine", True, "keep channels last in memory: faster convolutions, the same results"
    )
    compile: bool = _option("machine", False, "compile the network with torch.compile")
    cuda_graph: str = _option(
        "machine",
        "auto",
        "replay a training step as one CUDA graph; auto: on a GPU, for losses that allow it",
        choices=("auto", "on", "off"),
    )

    def __post_init__(self) -> None:
        if self.image_size == 0:
            size = DIGITS_IMAGE_SIZE if self.data == DIGITS else IMAGE_SIZE
            object.__setattr__(self, "image_size", size)
        for name, kind in field_types().items():
            object.__setattr__(self, name, _checked(name, kind, getattr(self, name)))
        if self.folds == 1 or self.fold > self.folds:
            raise UserError(
                f"--folds {self.folds} --fold {self.fold}: give 2 folds or more, and one of them "
                "(from 1), or 0 for neither"
            )
        if self.data != DIGITS and not self.data.startswith(MEDMNIST):
            object.__setattr__(self, "data", str(Path(self.data).expanduser().absolute()))
        kinds = self.augment.split("+")
        if len(set(kinds)) < len(kinds):
            raise UserError(f"--augment: {self.augment} is not allowed; give each kind once")
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"--warmup-epochs: {self.warmup_epochs} is not allowed; it must be less than "
                f"--epochs, {self.epochs}"
            )

    @property
    def warm_up(self) -> int:
        """Number of epochs in which the learning rate rises."""
        return self.epochs // 8 if self.warmup_epochs < 0 else self.warmup_epochs

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, source: Path) -> "TrainConfig":
        """Return the configuration saved by :meth:`to_dict`: all fields, and no other.

        ``source`` is the file of ``values``, which an error names.
        """
        known = field_types()
        if not isinstance(values, dict):
            raise UserError(f"{source} holds no configuration; restore it")
        for name in values:
            if name not in known:
                raise unknown_name(f"{source}: configuration field", name, known)
        if missing := [name for name in known if name not in values]:
            raise UserError(
                f"{source} has no field {missing[0]}: it is damaged, or another version of "
                "bstriplet wrote it; restore it, or begin anew in another folder"
            )
        return cls(**values)


PAPER, STRONG = "paper", "strong"
_STRONG_KINDS = ("flips", "shifts", "rotations", "scales", "brightness")
_STRONG: Mapping[str, Any] = MappingProxyType(
    {
        "augment": "+".join(_STRONG_KINDS),
        "epochs": 40,
        "optimiser": "adamw",
        "weight_decay": 0.05,
        "clip_grad": 1.0,
        "lr": 4e-3,
        "schedule": "cosine",
        "warmup_epochs": -1,
        "stop_patience": 0,
        "select": "last",
    }
)
RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        PAPER: MappingProxyType({name: getattr(TrainConfig, name) for name in _STRONG}),
        STRONG: _STRONG,
    }
)
"""Fields that are set together, by name: section 3.1 of the paper, or what trains CE well."""


def with_recipe(recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe and those ``given``, which come first.

    Under the strong recipe digits are not flipped, which would make others of them.
    """
    if recipe not in RECIPES:
        raise unknown_name("--recipe", recipe, RECIPES)
    values = dict(RECIPES[recipe])
    if recipe == STRONG and given.get("data", DIGITS) == DIGITS:
        values["augment"] = "+".join(kind for kind in _STRONG_KINDS if kind != "flips")
    return values | dict(given)


class Scheme(Mapping[str, Any]):
    """The fields of :class:`TrainConfig` in which runs of an experiment differ, except the seed.

    An immutable mapping: the loss and the way to draw batches, as in Table 3, and any other field
    that is compared. Two schemes are equal if their fields are, in any order. A scheme is written
    ``LOSS:BATCHES[:FIELD=VALUE...]``, such as ``ce+bst:mined`` or ``ce:random:backbone=peleenet``.

    >>> Scheme("ce+bst", "mined", margin=0.5)["margin"]
    0.5
    """

    __slots__ = ("_fields",)

    def __init__(self, loss: str, batches: str, **others: Any) -> None:
        self._fields = {"loss": loss, "batches": batches, **others}

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Return the scheme written as ``text``."""
        loss, *rest = text.split(":")
        if not rest:
            raise UserError(f"scheme {text!r}: write LOSS:BATCHES, for example ce+bst:mined")
        others = [_parse_setting(text, part) for part in rest[1:]]
        names = ["loss", "batches", *(name for name, _ in others)]
        if len(set(names)) < len(names) or "seed" in names:
            raise UserError(f"scheme {text!r}: give each field once, and seeds with --seeds")
        try:
            config = TrainConfig(loss=loss, batches=rest[0], **dict(others))
        except UserError as error:
            raise UserError(f"scheme {text!r}: {error}") from error
        return cls(**{name: getattr(config, name) for name in names})

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __hash__(self) -> int:
        return hash(frozenset(self._fields.items()))

    def __str__(self) -> str:
        return ":".join(
            [self.loss, self.batches, *(_written(*item) for item in self.others.items())]
        )

    def __repr__(self) -> str:
        return f"Scheme({str(self)!r})"

    @property
    def loss(self) -> str:
        """The training loss."""
        return self._fields["loss"]

    @property
    def batches(self) -> str:
        """How batches are drawn."""
        return self._fields["batches"]

    @property
    def others(self) -> dict[str, Any]:
        """The fields besides loss and batches."""
        return {name: value for name, value in self.items() if name not in ("loss", "batches")}

    def without(self, *names: str) -> "Scheme":
        """The scheme without some of its other fields."""
        kept = {name: value for name, value in self.others.items() if name not in names}
        return Scheme(self.loss, self.batches, **kept)

    @property
    def slug(self) -> str:
        """The scheme as a folder name, for example ``ce-bst-mined``."""
        return re.sub(r"[^\w.]+", "-", str(self)).strip("-")


_BOOLEANS = {"true": True, "false": False}


def _parse_setting(scheme: str, text: str) -> tuple[str, Any]:
    """Return name and value of a field that a scheme sets, written as ``FIELD=VALUE``."""
    written, equals, value = text.partition("=")
    name, types = written.replace("-", "_"), field_types()
    if not equals:
        raise UserError(f"scheme {scheme!r}: {text!r} must be FIELD=VALUE")
    if name not in types:
        raise unknown_name(f"scheme {scheme!r}, field", written, map(_dashed, types))
    try:
        return name, (_BOOLEANS[value] if types[name] is bool else types[name](value))
    except (KeyError, ValueError) as error:
        kind = "true or false" if types[name] is bool else f"of type {types[name].__name__}"
        raise UserError(f"scheme {scheme!r}: {written} must be {kind}, not {value!r}") from error


def _written(name: str, value: Any) -> str:
    """Return a field as :func:`_parse_setting` reads it."""
    return f"{_dashed(name)}={str(value).lower() if isinstance(value, bool) else value}"


def field_types() -> dict[str, type]:
    """Return the type of each field of :class:`TrainConfig` by name, in order."""
    return get_type_hints(TrainConfig)


def fields_of(group: str) -> tuple[str, ...]:
    """Return the names of a group's fields; those of ``"data"`` and the seed decide the task."""
    return tuple(item.name for item in fields(TrainConfig) if item.metadata["group"] == group)


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + _dashed(name)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def add_options(
    parser: argparse.ArgumentParser,
    *,
    without: tuple[str, ...] = (),
    only: tuple[str, ...] | None = None,
) -> None:
    """Add a flag for each field of :class:`TrainConfig`, or for those in ``only``.

    Fields in ``without`` get no flag. A flag that is not typed leaves no attribute:
    :func:`given_options` returns the typed fields alone.
    """
    types = field_types()
    groups: dict[str, Any] = {}
    for item in fields(TrainConfig):
        if item.name in without or (only is not None and item.name not in only):
            continue
        title = item.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        text = item.metadata["help"].replace("%", "%%")
        if types[item.name] is bool:
            group.add_argument(
                flag(item.name),
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=text + (" (default: on)" if item.default else ""),
            )
            continue
        if item.metadata["choices"] and not item.metadata["or_like"]:
            text += f": {', '.join(item.metadata['choices'])}"
        if "default:" not in text:
            text += f" ({_defaults(item.name)})"
        group.add_argument(
            flag(item.name),
            type=types[item.name],
            metavar=types[item.name].__name__.upper(),
            default=argparse.SUPPRESS,
            help=text,
        )


def _defaults(name: str) -> str:
    """Return a field's default, or one for each recipe, for the help."""
    default = getattr(TrainConfig, name)
    of_recipes = {recipe: values.get(name, default) for recipe, values in RECIPES.items()}
    if len(set(of_recipes.values())) == 1:
        return f"default: {default}"
    return "default: " + ", ".join(f"{value} ({recipe})" for recipe, value in of_recipes.items())


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
    choices, or_like = metadata["choices"], metadata["or_like"]
    if choices and value not in choices and not (or_like and or_like.fullmatch(value)):
        raise unknown_name(flag(name), value, choices)
    if kind is float and not math.isfinite(value):
        raise UserError(f"{flag(name)}: {value} is not allowed; give a finite number")
    if kind in (int, float) and not metadata["minimum"] <= value <= metadata["maximum"]:
        upper = "" if math.isinf(metadata["maximum"]) else f" and at most {metadata['maximum']:g}"
        raise UserError(
            f"{flag(name)}: {value} is not allowed; it must be at least "
            f"{metadata['minimum']:g}{upper}"
        )
    return value
