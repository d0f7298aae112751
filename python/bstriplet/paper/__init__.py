"""The paper's tables 1-10 as printed, and the contradictions between their numbers.

The CSV files beside this module hold the printed digits and nothing else: no number is corrected.
`inconsistencies` lists the numbers that contradict each other.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from itertools import product
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from bstriplet.loss_registry import BUILT_IN

BACKBONES = MappingProxyType(
    {
        "efficientnet_b1": "EfficientNet-B1",
        "mobilenetv3_small_100": "MobileNet-V3-Small",
        "shufflenet_v2": "ShuffleNet-V2",
        "peleenet": "PeleeNet",
    }
)
LOSSES = MappingProxyType({name: loss.label for name, loss in BUILT_IN.items() if loss.in_paper})
COLUMNS = MappingProxyType(
    {
        "sensitivity": "SEN (%)",
        "specificity": "SPE (%)",
        "accuracy": "ACC (%)",
        "auc": "AUC",
    }
)
TABLES = range(1, 11)
# Tables and figures that ``bstriplet reproduce`` draws.
REPRODUCIBLE = (
    *(f"table{number}" for number in (3, 4, 6, 8, 10)),
    *(f"figure{number}" for number in (5, 6, 7, 8, 9, 11, 13, 15)),
)
ROUNDING = 1e-9
# Name, table of counts, table of results.
_DATA_SETS = {
    "chest1": ("Chest-1", 2, 4),
    "chest2": ("Chest-2", 5, 6),
    "rash": ("rash images", 7, 8),
    "osteosarcoma": ("osteosarcoma histology", 9, 10),
}
DATA_SETS = tuple(_DATA_SETS)


@dataclass(frozen=True)
class DataSet:
    """One of the paper's image sets: its name, its class counts, and the tables about it.

    `counts["train"]["Normal"]` is the number of training images of a class, as printed.
    """

    name: str
    counts: Mapping[str, Mapping[str, int]]
    counts_table: int
    metrics_table: int

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names as the paper spells them, in its order."""
        return tuple(self.counts["test"])


@dataclass(frozen=True)
class Table:
    """A printed table: `header`, and `rows` of text cells, the first of which names the row."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@cache
def table(number: int) -> Table:
    """Table `number` (1-10) of the paper.

    Raises:
        ValueError: the paper has no such table.
    """
    if number not in TABLES:
        raise ValueError(f"number={number} is no table of the paper; it has tables 1 to 10")
    return _read(f"table{number}.csv")


@cache
def batch_size_accuracies() -> dict[int, Decimal]:
    """The two points of Fig. 5 that the text of section 3.2 gives as numbers: {N_b: ACC in %}."""
    return {int(size): Decimal(accuracy) for size, accuracy in _read("figure5.csv").rows}


@cache
def data_set(name: str) -> DataSet:
    """One image set with its printed counts: "chest1", "chest2", "rash" or "osteosarcoma".

    Raises:
        ValueError: the paper has no such set.
    """
    if name not in DATA_SETS:
        raise ValueError(f"name={name!r} is no data set of the paper; choose one of {DATA_SETS}")
    title, counts_table, metrics_table = _DATA_SETS[name]
    printed = table(counts_table)
    parts = {"Training": "train", "Testing": "test"}
    counts = {
        parts[part]: dict(zip(printed.header[1:-1], map(int, cells[:-1]), strict=True))
        for part, *cells in printed.rows
        if part in parts
    }
    return DataSet(title, counts, counts_table, metrics_table)


def printed_metrics(number: int, backbone: str, loss: str, batches: str = "") -> dict[str, Decimal]:
    """The numbers of table 3, 4, 6, 8 or 10 for a backbone and a loss.

    Args:
        number: of the table.
        backbone: a key of `BACKBONES`.
        loss: a key of `LOSSES`.
        batches: "random" or "mined"; only Table 3 tells them apart.

    Returns:
        Printed numbers by name of the metric, in per cent except for `auc`; empty if the table has
        no such row.
    """
    if number == 3:
        return _table3(backbone, loss, batches)
    for model, name, *cells in table(number).rows:
        if (model, name) == (BACKBONES.get(backbone), LOSSES.get(loss)):
            return dict(zip(COLUMNS, map(Decimal, cells), strict=True))
    return {}


def inconsistencies() -> list[str]:
    """The contradictions between printed numbers, one sentence each.

    They come from these checks, in this order:

    - Tables 2, 5, 7 and 9 have the right sums.
    - Tables 3 and 4 agree.
    - Accuracies and, for two classes, sensitivities and specificities are quotients of the printed
      counts, and some confusion matrix has all printed numbers of a row at once.
    - The means in the text (means.csv) are those of the tables.
    """
    return [*_wrong_sums(), *_table3_against_4(), *_impossible_rows(), *_wrong_means()]


def _read(name: str) -> Table:
    text = (files(__package__) / name).read_text(encoding="utf-8")
    header, *rows = csv.reader(text.splitlines())
    return Table(tuple(header), tuple(tuple(row) for row in rows))


def _table3(backbone: str, loss: str, batches: str) -> dict[str, Decimal]:
    if backbone != "mobilenetv3_small_100":
        return {}
    printed = table(3)
    name = f"{LOSSES.get(loss)} ({ {'random': 'RS', 'mined': 'DM'}.get(batches) })"
    found = dict(zip(printed.header[1:], printed.rows[0][1:], strict=True))
    return {"accuracy": Decimal(found[name])} if name in found else {}


def _wrong_sums() -> Iterator[str]:
    for number in sorted(counts_table for _, counts_table, _ in _DATA_SETS.values()):
        printed = table(number)
        parts = [part for part, *_ in printed.rows]
        counts = np.array([[int(cell) for cell in cells] for _, *cells in printed.rows])
        for part, found, total in zip(
            parts, counts[:, :-1].sum(axis=1), counts[:, -1], strict=True
        ):
            if found != total:
                yield f"Table {number}, {part}: classes sum to {found}, not {total}"
        for name, found, total in zip(
            printed.header[1:], counts[:-1].sum(axis=0), counts[-1], strict=True
        ):
            if found != total:
                yield f"Table {number}, {name}: parts sum to {found}, not {total}"


def _table3_against_4() -> Iterator[str]:
    for loss, batches in (("ce", "random"), ("ce+bst", "mined")):
        one = printed_metrics(3, "mobilenetv3_small_100", loss, batches)["accuracy"]
        other = printed_metrics(4, "mobilenetv3_small_100", loss)["accuracy"]
        if one != other:
            yield f"{LOSSES[loss]}: accuracy {one} in Table 3, {other} in Table 4"


def _impossible_rows() -> Iterator[str]:
    for name in DATA_SETS:
        found = data_set(name)
        sizes = list(found.counts["test"].values())
        for backbone, loss in product(BACKBONES, LOSSES):
            printed = printed_metrics(found.metrics_table, backbone, loss)
            reason = printed and _impossible(printed, sizes)
            if reason:
                yield (
                    f"Table {found.metrics_table}, {BACKBONES[backbone]}, {LOSSES[loss]}: {reason}"
                )


def _wrong_means() -> Iterator[str]:
    for number, metric, over, less, text in _read("means.csv").rows:
        mean = _column_mean(int(number), metric, over)
        mean -= _column_mean(int(number), metric, less) if less else 0
        unit = Decimal(1).scaleb(int(Decimal(text).as_tuple().exponent))
        if abs(mean - Decimal(text)) > unit / 2:
            what = f"mean {metric} of {over}" + (f" less that of {less}" if less else "")
            yield f"Table {number}: {what} is {mean.quantize(unit)}, {text} in the text"


def _column_mean(number: int, metric: str, name: str) -> Decimal:
    """The mean of a column over the rows of a model or of a loss."""
    printed = table(number)
    column = printed.header.index(metric)
    cells = [Decimal(row[column]) for row in printed.rows if name in row[:2]]
    return sum(cells, Decimal()) / len(cells)


def _impossible(printed: Mapping[str, Decimal], sizes: Sequence[int]) -> str:
    """Why no classifier can have the printed numbers on classes of these sizes, or ""."""
    right = _numerators(printed["accuracy"], sum(sizes))
    if not right.size:
        return f"ACC {printed['accuracy']} is no share of {sum(sizes)} images"
    if len(sizes) == 2:
        return _impossible_pair(printed, sizes, right)
    if any(_some_matrix(printed, np.array(sizes), count) for count in right):
        return ""
    return (
        f"no confusion matrix has SEN {printed['sensitivity']}, SPE {printed['specificity']} "
        f"and ACC {printed['accuracy']} at once"
    )


def _impossible_pair(
    printed: Mapping[str, Decimal], sizes: Sequence[int], right: NDArray[np.int64]
) -> str:
    negatives, positives = sizes
    hits = _numerators(printed["sensitivity"], positives)
    rejections = _numerators(printed["specificity"], negatives)
    if not hits.size:
        return f"SEN {printed['sensitivity']} is no share of {positives} images"
    if not rejections.size:
        return f"SPE {printed['specificity']} is no share of {negatives} images"
    if np.isin(np.add.outer(hits, rejections), right).any():
        return ""
    return (
        f"SEN and SPE make {hits[0] + rejections[0]} right answers of {sum(sizes)}, "
        f"ACC {printed['accuracy']} makes {right[0]}"
    )


def _some_matrix(printed: Mapping[str, Decimal], sizes: NDArray[np.int64], right: int) -> bool:
    """Whether some 3 x 3 confusion matrix with `right` on its diagonal has the printed means.

    Off the diagonal, the sum of a row is the misses of a class, and the sum of a column its false
    alarms. Non-negative counts with these sums exist if, for each class, misses and false alarms
    together are not more than all errors.
    """
    errors = int(sizes.sum()) - right
    everything = np.indices((errors + 1, errors + 1)).reshape(2, -1)
    triples = np.vstack([everything, errors - everything.sum(axis=0)]).T
    triples = triples[triples[:, 2] >= 0]
    means = 100 * (1 - (triples / sizes).mean(axis=1))
    misses = triples[(triples <= sizes).all(axis=1) & _printed_as(printed["sensitivity"], means)]
    means = 100 * (1 - (triples / (sizes.sum() - sizes)).mean(axis=1))
    alarms = triples[_printed_as(printed["specificity"], means)]
    return bool(((misses[:, None] + alarms[None]) <= errors).all(axis=2).any())


def _numerators(printed: Decimal, whole: int) -> NDArray[np.int64]:
    """The counts whose share of `whole` rounds to the printed number."""
    counts = np.arange(whole + 1)
    return counts[_printed_as(printed, 100 * counts / whole)]


def _printed_as(printed: Decimal, percent: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each number rounds to the printed one, which has two digits."""
    return np.abs(percent - float(printed)) <= 0.005 + ROUNDING
