"""The paper's tables and figures from the user's own runs; `TARGETS` lists the runs of each.

Runs lie in OUT/runs, one folder per scheme and seed. Targets with the same runs share them. A
finished run is not trained again; an interrupted one is continued.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bstriplet import paper
from bstriplet.config import Scheme, TrainConfig, describe_difference, field_types, flag
from bstriplet.data.layouts import PAPER_SETS
from bstriplet.data.names import letters
from bstriplet.errors import UserError, unknown_name
from bstriplet.report import figures
from bstriplet.report.figures import Picture
from bstriplet.storage import cannot_write, read_json, write_json, write_text
from bstriplet.study.compare import Experiment, prepare, train_missing
from bstriplet.study.paper_table import NOTE as TABLE_NOTE
from bstriplet.study.paper_table import Row, csv_text, markdown, table_rows
from bstriplet.study.read_runs import Comparison, Run, read_runs, refuse_doubles
from bstriplet.study.statistics import summarise_schemes, verdicts
from bstriplet.text import printable
from bstriplet.training.run_folder import REPRODUCE_FILE, check_free, check_new, locked_folder

SMALL = "mobilenetv3_small_100"
FEW_SEEDS = 5  # fewer seeds than this get a note
# Fields in which a run must agree with a target, besides its loss and its batches.
SETTLED = ("backbone", "batch_size", "epochs", "augment")
SETTLED_IF_MINED = ("groups_per_class", "group_share")
# Fields that may differ from the paper's without a note.
FREE = frozenset(("data", "device", "seed", "skip_broken"))


@dataclass(frozen=True)
class Target:
    """A table or figure of the paper: the runs that it needs, and how it is drawn from them.

    `schemes` set every field in which the paper departs from the recipe of section 3.1. `telling`
    names the fields, besides loss and batches, that tell the schemes apart. A target is the table
    of number `table`, or a picture that `draw` returns. `reference` is the scheme, as shown, that
    the others are tested against; None for cross entropy.
    """

    title: str
    data_set: str
    schemes: tuple[Scheme, ...]
    telling: tuple[str, ...] = ()
    table: int | None = None
    draw: Callable[[Comparison], Picture] | None = None
    reference: Scheme | None = None

    def shown(self, scheme: Scheme) -> Scheme:
        """The scheme with only the settings that tell it from the others."""
        return scheme.without(*(scheme.others.keys() - set(self.telling)))

    def given(self, options: Mapping[str, Any]) -> Target:
        """The target without its own settings of these options, which replace them."""
        schemes = dict.fromkeys(scheme.without(*options) for scheme in self.schemes)
        return replace(self, schemes=tuple(schemes))


@dataclass(frozen=True)
class Reproduction:
    """A target drawn from runs: the rows of its table or its picture, verdicts and notes."""

    name: str
    target: Target
    comparison: Comparison
    rows: tuple[Row, ...]
    picture: Picture | None
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """Title, table or picture, verdicts and notes, as Markdown."""
        parts = [f"## {self.target.title}"]
        if self.rows:
            parts += [markdown(self.rows), TABLE_NOTE]
        if self.picture:
            parts += [f"![{self.target.title}]({self.name}.png)", self.picture.caption]
        parts += ["\n".join(f"- {line}" for line in self.verdicts)] if self.verdicts else []
        parts += ["\n".join(f"- {line}" for line in self.notes)] if self.notes else []
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path) -> None:
        """Write NAME.md, and NAME.csv or the three files of the picture, each atomically."""
        write_text(folder / f"{self.name}.md", printable(self.markdown()))
        if self.rows:
            write_text(folder / f"{self.name}.csv", csv_text(self.rows))
        if self.picture:
            replace(self.picture, name=self.name).write(folder)


def _schemes(
    backbones: Sequence[str],
    losses: Sequence[str],
    every: Mapping[str, Any] | None = None,
    mined: Mapping[str, Any] | None = None,
) -> tuple[Scheme, ...]:
    """Each loss on each network: CE+BST on mined batches, the others on random ones.

    `every` are settings of all schemes, `mined` those of CE+BST alone.
    """
    return tuple(
        Scheme(
            loss,
            "mined" if loss == "ce+bst" else "random",
            backbone=backbone,
            **(every or {}),
            **((mined or {}) if loss == "ce+bst" else {}),
        )
        for backbone in backbones
        for loss in losses
    )


_NETWORKS, _LOSSES = tuple(paper.BACKBONES), tuple(paper.LOSSES)
_TWO = ("ce", "ce+bst")
_FOUR_SCHEMES = tuple(
    Scheme(loss, batches, backbone=SMALL) for loss in _TWO for batches in ("random", "mined")
)
# Section 3.5: three groups in each of two classes, six images from each.
_CHEST2 = _schemes(_NETWORKS, _LOSSES, mined={"groups_per_class": 3, "group_share": "equal"})
# The two small sets are augmented, with seven copies of each image.
_RASH = _schemes(_NETWORKS, _LOSSES, every={"augment": "copies"})
_OSTEOSARCOMA = _schemes((SMALL,), _LOSSES, every={"augment": "copies"})

TARGETS: dict[str, Target] = {
    "table3": Target(
        "Table 3. Accuracy of different training schemes for MobileNet-V3-Small on Chest-1",
        "chest1",
        _FOUR_SCHEMES,
        table=3,
    ),
    "table4": Target(
        "Table 4. Metrics for the compared networks on Chest-1",
        "chest1",
        _schemes(_NETWORKS, _LOSSES),
        ("backbone",),
        table=4,
    ),
    "table6": Target(
        "Table 6. Metrics for the compared networks on Chest-2",
        "chest2",
        _CHEST2,
        ("backbone",),
        table=6,
    ),
    "table8": Target(
        "Table 8. Metrics for the compared networks on the rash images",
        "rash",
        _RASH,
        ("backbone",),
        table=8,
    ),
    "table10": Target(
        "Table 10. Metrics for MobileNet-V3-Small on the osteosarcoma histology images",
        "osteosarcoma",
        _OSTEOSARCOMA,
        table=10,
    ),
    "figure5": Target(
        "Figure 5. Accuracy of MobileNet-V3-Small for different N_b on Chest-1",
        "chest1",
        tuple(
            Scheme("ce+bst", "mined", backbone=SMALL, batch_size=size) for size in range(6, 37, 6)
        ),
        ("batch_size",),
        draw=figures.batch_sizes,
        reference=Scheme("ce+bst", "mined", batch_size=TrainConfig.batch_size),
    ),
    "figure6": Target(
        "Figure 6. Embeddings of MobileNet-V3-Small after 10 epochs, CE and CE+BST, on Chest-1",
        "chest1",
        tuple(
            Scheme(loss, batches, backbone=SMALL, epochs=10)
            for loss, batches in (("ce", "random"), ("ce+bst", "mined"))
        ),
        draw=figures.embeddings,
    ),
    "figure7": Target(
        "Figure 7. Loss curves of different training schemes for MobileNet-V3-Small on Chest-1",
        "chest1",
        _FOUR_SCHEMES,
        draw=figures.loss_curves,
    ),
    "figure8": Target(
        "Figure 8. Loss curves of the compared networks on Chest-1",
        "chest1",
        _schemes(_NETWORKS, _TWO),
        ("backbone",),
        draw=figures.loss_curves,
    ),
    "figure9": Target(
        "Figure 9. Confusion matrices of the compared networks on Chest-1",
        "chest1",
        _schemes(_NETWORKS, _TWO),
        ("backbone",),
        draw=figures.confusion_matrices,
    ),
    "figure11": Target(
        "Figure 11. ROC curves of the compared networks on Chest-2",
        "chest2",
        _CHEST2,
        ("backbone",),
        draw=figures.roc_curves,
    ),
    "figure13": Target(
        "Figure 13. ROC curves of the compared networks on the rash images",
        "rash",
        _RASH,
        ("backbone",),
        draw=figures.roc_curves,
    ),
    "figure15": Target(
        "Figure 15. ROC curves of MobileNet-V3-Small on the osteosarcoma histology images",
        "osteosarcoma",
        _OSTEOSARCOMA,
        draw=figures.roc_curves,
    ),
}
ALL = "all"


def targets_named(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Target]:
    """The targets of these names ("all" for every target); `options` replace their settings.

    Raises:
        UserError: no target has that name.
    """
    for name in names:
        if name not in TARGETS and name != ALL:
            raise unknown_name("target", name, (*TARGETS, ALL))
    chosen = [name for name in TARGETS if name in names or ALL in names]
    return {name: TARGETS[name].given(options) for name in chosen}


def train_targets(
    targets: Mapping[str, Target],
    config: TrainConfig,
    n_seeds: int,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Train the runs of these targets that `out` does not have yet, on the data of `config`.

    Raises:
        UserError: another process writes to `out`, or it holds other files or runs of another
            configuration.
    """
    schemes = dict.fromkeys(
        _distinct(scheme, config) for target in targets.values() for scheme in target.schemes
    )
    experiment = Experiment(config, tuple(schemes), tuple(range(n_seeds)))
    check_free(out)
    if not os.path.exists(out / REPRODUCE_FILE):
        check_new(out, resume=True)
    elif difference := describe_difference(config, _read_config(out / REPRODUCE_FILE)):
        raise UserError(
            f"{out} was started with another configuration: {difference}; leave those options as "
            "they were, or choose another --out"
        )
    runs = prepare(experiment, say)
    classes = runs[0].task.classes
    for name in dict.fromkeys(target.data_set for target in targets.values()):
        if _columns(name, classes) is None:
            of_it = ", ".join(key for key, target in targets.items() if target.data_set == name)
            say(f"note: {of_it}: {_of_other_images(name, config.data, classes)}")
    with locked_folder(out):
        if not (out / REPRODUCE_FILE).exists():
            write_json(out / REPRODUCE_FILE, {"config": config.to_dict()})
        train_missing(runs, out, say)


def _read_config(path: Path) -> TrainConfig:
    """Return the configuration in reproduce.json."""
    values = read_json(path)
    return TrainConfig.from_dict(values.get("config") if isinstance(values, dict) else None, path)


def draw_targets(
    targets: Mapping[str, Target], config: TrainConfig | None, folders: Sequence[Path], out: Path
) -> list[Reproduction]:
    """Draw these targets from the finished runs of `folders`, and write them into `out`.

    Args:
        targets: by name.
        config: the fields that runs must have where a target sets none. None stands for the
            recipe's defaults and any number of epochs.
        folders: each holds runs/*/*: an earlier `out`, or a compare folder.
        out: receives NAME.md and NAME.csv of a table, NAME.png, .svg and .csv of a figure.

    Raises:
        UserError: a file is damaged, two runs have the same scheme and seed, or `out` cannot be
            written.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    if not runs:
        raise UserError(f"no run lies in {', '.join(map(str, folders))}; give a compare folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    drawn = [draw(name, target, config, runs, out) for name, target in targets.items()]
    for reproduction in drawn:
        reproduction.write(out)
    return drawn


def _distinct(scheme: Scheme, config: TrainConfig) -> Scheme:
    """The scheme without settings that equal the configuration's: each run then has one name."""
    unusual = {n: value for n, value in scheme.others.items() if getattr(config, n) != value}
    return Scheme(scheme.loss, scheme.batches, **dict(sorted(unusual.items())))


def draw(
    name: str, target: Target, config: TrainConfig | None, runs: Sequence[Run], out: Path
) -> Reproduction:
    """Draw one target from those of `runs` that have its schemes; see :func:`draw_targets`."""
    chosen = []
    for scheme in target.schemes:
        wanted = _wanted(scheme, config)
        of_scheme = [run for run in runs if _has(run, wanted)]
        of_scheme.sort(key=lambda run: run.seed)
        chosen += [replace(run, scheme=target.shown(scheme)) for run in of_scheme]
    refuse_doubles(chosen)
    _refuse_other_classes(name, [run for run in chosen if run.finished])
    schemes = tuple(dict.fromkeys(target.shown(scheme) for scheme in target.schemes))
    seeds = tuple(sorted({run.seed for run in chosen}))
    reference = target.reference if target.reference in schemes else None
    comparison = Comparison(out, schemes, seeds, tuple(chosen), reference=reference)
    rows: tuple[Row, ...] = ()
    said: tuple[str, ...] = ()
    if target.table:
        backbones = {
            target.shown(scheme): _wanted(scheme, config)["backbone"] for scheme in target.schemes
        }
        rows = tuple(table_rows(comparison, target.table, backbones))
    if (target.table or reference) and comparison.finished:
        said = tuple(verdicts(comparison, summarise_schemes(comparison)))
    picture = target.draw(comparison) if target.draw and comparison.finished else None
    return Reproduction(
        name, target, comparison, rows, picture, said, tuple(_notes(target, comparison))
    )


def _refuse_other_classes(name: str, runs: Sequence[Run]) -> None:
    """Raise if the runs of one table or figure do not have the same classes."""
    for run in runs:
        if run.classes != runs[0].classes:
            raise UserError(
                f"{name}: {runs[0].folder} has the classes {', '.join(runs[0].classes)}, "
                f"{run.folder} {', '.join(run.classes)}; give runs on the same data"
            )


def _wanted(scheme: Scheme, config: TrainConfig | None) -> dict[str, Any]:
    """The fields that a run of the scheme must have, by name."""
    names = [*SETTLED, *(SETTLED_IF_MINED if scheme.batches == "mined" else ())]
    if config is None:
        names.remove("epochs")
    usual = config or TrainConfig()
    return {name: getattr(usual, name) for name in names} | dict(scheme)


def _has(run: Run, wanted: Mapping[str, Any]) -> bool:
    """Whether a run has these fields."""
    return all(run.config[name] == value for name, value in wanted.items())


def _notes(target: Target, comparison: Comparison) -> list[str]:
    """Reservations that a reader who compares these runs with the paper should know."""
    notes = [*comparison.gaps()] if comparison.seeds else [_no_run(target)]
    if not comparison.finished:
        return notes
    notes += data_notes(target.data_set, comparison)
    departures = _departures(target, comparison)
    if departures:
        notes.append(f"Not as in the paper: {', '.join(departures)}.")
    if any(run.config["validation"] == "train" for run in comparison.runs):
        notes.append(
            "Validation images are held out of the training images; the paper took them from the "
            "test images."
        )
    if target.table:
        fewest = min(len(comparison.finished_of(scheme)) for scheme in comparison.schemes)
        if fewest < FEW_SEEDS:
            notes.append(
                f"The least number of finished seeds of a scheme is {fewest}: too few to tell "
                "small differences apart."
            )
        notes += [
            f"The paper contradicts itself. {sentence}."
            for sentence in paper.inconsistencies()
            if sentence.startswith(f"Table {target.table}:")
        ]
    return notes


def _no_run(target: Target) -> str:
    """A sentence for a target of which no run is there."""
    wanted = _wanted(target.schemes[0], None)
    settings = " ".join(f"{flag(name)} {value}" for name, value in wanted.items())
    return (
        f"No run has been made for it yet: none has, for its first scheme, {settings} "
        "(the recipe of the paper: bstriplet compare --recipe paper)."
    )


def data_notes(name: str, comparison: Comparison) -> list[str]:
    """Notes on the differences between the images of these runs and the paper's counts."""
    expected = paper.data_set(name)
    found = comparison.finished[0].environment.get("data", {}).get("images", {})
    if not found:
        return []
    data, labels = comparison.finished[0].config["data"], tuple(found["test"])
    columns = _columns(name, labels)
    if columns is None:
        return [_of_other_images(name, data, labels)]
    held_out = found.get("validation", {})
    if comparison.finished[0].config["validation"] == "test":
        held_out = {}  # the validation images are among the test images
    notes = []
    for part, counts in expected.counts.items():
        more = held_out if part == "train" else {}
        differing = [
            f"{label} {n} instead of {counts[column]}"
            for label, column in columns.items()
            if (n := found[part][label] + more.get(label, 0)) != counts[column]
        ]
        if differing:
            notes.append(
                f"Images to {part}, against Table {expected.counts_table}: {', '.join(differing)}."
            )
    return notes


def _columns(name: str, labels: Sequence[str]) -> dict[str, str] | None:
    """The column of the paper's table for each class, or None where these are other classes."""
    wanted = {letters(column): column for column in paper.data_set(name).classes}
    plain = {label: letters(PAPER_SETS[name].column(label)) for label in labels}
    if sorted(plain.values()) != sorted(wanted):
        return None
    return {label: wanted[column] for label, column in plain.items()}


def _of_other_images(name: str, data: str, labels: Sequence[str]) -> str:
    expected = paper.data_set(name)
    return (
        f"The paper's numbers are of {expected.name} ({', '.join(expected.classes)}); these runs "
        f"are of {Path(data).name} ({', '.join(labels)}), so do not compare the two."
    )


def _departures(target: Target, comparison: Comparison) -> list[str]:
    """Options of these runs that differ from the defaults and that no scheme sets."""
    varied = {name for scheme in target.schemes for name in scheme}
    departures = []
    for name in field_types():
        if name in FREE | varied:
            continue
        default = TrainConfig.__dataclass_fields__[name].default
        default = TrainConfig(data=".").image_size if name == "image_size" else default
        values = {run.config[name]: None for run in comparison.runs}
        if list(values) != [default]:
            departures.append(f"{flag(name)} {' or '.join(map(str, values))}")
    return departures
