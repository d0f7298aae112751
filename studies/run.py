"""The runs of plan.md: which are there, and training of those that are missing.

    python -m studies.run [PART ...] --blood FOLDER --chest FOLDER [--missing] [--workers 2]

Without ``--missing`` it counts the runs that each part has and lacks. A finished run is a row in
``runs.csv`` and one in ``predictions.csv``, so that another machine goes on where one stopped; a
run that was interrupted goes on from its checkpoint below ``--work``. A row of another
configuration is refused. Each worker is a process of its own; on a GPU eight of them share it.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bstriplet.config import STRONG, Scheme, TrainConfig, with_recipe
from bstriplet.data.dataset import ImageSet, Task
from bstriplet.errors import UserError
from bstriplet.storage import write_text
from bstriplet.study.compare import Experiment, Tasks, run_folder
from bstriplet.study.read_runs import read_comparison
from bstriplet.study.statistics import to_csv
from bstriplet.training.batches import RandomBatchSampler
from bstriplet.training.evaluation import embed, load_trained
from bstriplet.training.learner import Learner
from bstriplet.training.loop import train
from bstriplet.training.progress import Row
from bstriplet.training.run_folder import PREDICTIONS_FILE, RunFolder, locked_folder
from torch.nn.functional import cross_entropy

from bench.machine import commit, device_name, versions
from studies.what_runs_show import cosine_measures

RESULTS = Path(__file__).parent / "results" / "does_it_help"
WORK = Path("runs/does_it_help")
BLOOD, CHEST = "blood", "chest"

CE, CE_MINED = Scheme("ce", "random"), Scheme("ce", "mined")
BST, BST_MINED = Scheme("ce+bst", "random"), Scheme("ce+bst", "mined")
LINEAR = Scheme("ce+bst", "random", similarity="linear")
PRINTED = Scheme("ce+bst", "random", eq3="printed")


@dataclass(frozen=True)
class Part:
    """Runs that answer one question of the plan.

    images: ``BLOOD`` or ``CHEST``.
    repetitions: seeds 0, 1, ...; each is a training draw, initial weights and batches of its own.
    settings: what differs from the strong recipe.
    """

    images: str
    schemes: tuple[Scheme, ...]
    repetitions: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def experiment(self, data: Path) -> Experiment:
        """The part as an experiment on the images in ``data``."""
        settings = {"data": str(data), "image_size": 64, **self.settings}
        config = TrainConfig(**with_recipe(STRONG, settings))
        return Experiment(config, self.schemes, tuple(range(self.repetitions)))


# Epochs are chosen so that a run takes 800 steps on batches of 36, however few its images; with all
# images it takes 1,000, the recipe's 40 epochs.
_FORTY = {"train_per_class": 40, "epochs": 100}
PARTS: Mapping[str, Part] = {
    "primary": Part(BLOOD, (CE, BST, BST_MINED, CE_MINED), 15, _FORTY),
    "variants": Part(BLOOD, (LINEAR, PRINTED), 5, _FORTY),
    "chest": Part(CHEST, (CE, BST, BST_MINED), 5, {"train_per_class": 160, "epochs": 100}),
    "curve-10": Part(BLOOD, (CE, BST), 5, {"train_per_class": 10, "epochs": 400}),
    "curve-20": Part(BLOOD, (CE, BST), 5, {"train_per_class": 20, "epochs": 200}),
    "curve-80": Part(BLOOD, (CE, BST), 5, {"train_per_class": 80, "epochs": 53}),
    "curve-all": Part(BLOOD, (CE, BST), 5, {"epochs": 40}),
    "primary-128": Part(BLOOD, (CE, BST, BST_MINED, CE_MINED), 15, {**_FORTY, "image_size": 128}),
}

TABLES = ("runs", "predictions", "epochs", "labels")
RUN_KEY = ("part", "scheme", "seed")
MOST_CLASSES = 10  # a digit each
MEASURES = ("accuracy", "sensitivity", "specificity", "auc", "ece")
OBSERVED = ("train_ce", "train_metric", "validation_ce", "ce_norm", "metric_norm", "cosine")


class Job(NamedTuple):
    """A run of a part that is to be trained, in a folder of its own."""

    part: str
    images: str
    scheme: Scheme
    config: TrainConfig
    folder: Path
    commit: str

    @property
    def fingerprint(self) -> str:
        """A hash of the options that decide the result, images apart, where not the default."""
        usual, values = TrainConfig(data=self.config.data).to_dict(), self.config.to_dict()
        apart = ("data", "device")
        decisive = {name: v for name, v in values.items() if v != usual[name] and name not in apart}
        return blake2b(json.dumps(decisive).encode(), digest_size=4).hexdigest()

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells its rows from those of other runs."""
        return (self.part, str(self.scheme), str(self.config.seed))


class Finished(NamedTuple):
    """What a run adds to the files of the study."""

    run: Row
    predicted: Row
    epochs: list[Row]
    labels: Row


class Tables:
    """The CSV files of the study, each written whole or not at all.

    - ``runs.csv``: a row a run, with its measures, its machine, its commit and versions.
    - ``predictions.csv``: the predicted class of each test image, by number, a digit each.
    - ``epochs.csv``: ten epochs a run, with the norms of both gradients.
    - ``labels.csv``: the classes of each set of images, as JSON, and those of its test images.

    A run is finished once it is in ``runs.csv``, which is written last.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = {name: read_rows(folder / f"{name}.csv") for name in TABLES}
        self.finished = {
            tuple(row[name] for name in RUN_KEY): row["configuration"] for row in self.rows["runs"]
        }

    def add(self, found: Finished) -> None:
        """Add the rows of a run; those that a stopped attempt left are replaced."""
        key = tuple(str(found.run[name]) for name in RUN_KEY)
        for row in self.rows["labels"]:
            if row["images"] == found.labels["images"] and row != found.labels:
                raise UserError(
                    f"{row['images']} has other test images or classes than the runs in "
                    f"{self.folder}: give the images that they had, or another --results"
                )
        self._replace("predictions", RUN_KEY, key, [found.predicted])
        self._replace("epochs", RUN_KEY, key, found.epochs)
        self._replace("labels", ("images",), (found.labels["images"],), [found.labels])
        self._replace("runs", RUN_KEY, key, [found.run])
        self.finished[key] = found.run["configuration"]

    def _replace(
        self, name: str, columns: Sequence[str], key: tuple[str, ...], rows: Sequence[Row]
    ) -> None:
        kept = [row for row in self.rows[name] if tuple(row[c] for c in columns) != key]
        new = [{column: _cell(value) for column, value in row.items()} for row in rows]
        self.rows[name] = kept + new
        header = list(self.rows[name][0])
        table = to_csv(header, [[row[column] for column in header] for row in self.rows[name]])
        write_text(self.folder / f"{name}.csv", table)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column; none without the file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    return "" if value is None else str(value)


def jobs_of(name: str, data: Path, work: Path, code: str = "") -> list[Job]:
    """The runs of a part; ``code`` is the commit at which they are trained."""
    images = PARTS[name].images
    return [
        Job(name, images, scheme, config, run_folder(work / name, scheme, config.seed), code)
        for scheme, config in PARTS[name].experiment(data).runs()
    ]


class GradientShare:
    """The norms of the gradients of both loss terms, at ten epochs from the first to the last.

    The gradient is that of the mean over the first four batches of the training images, as they
    are, in training mode, with respect to all weights that both terms reach; for CE alone, to all
    weights. The metric term has its weight (lambda).
    """

    def __init__(self, images: ImageSet, config: TrainConfig) -> None:
        self.images = images
        self.batches = list(RandomBatchSampler(len(images), config.batch_size, config.seed))[:4]
        self.epochs = {round(epoch) for epoch in np.linspace(1, config.epochs, 10)}

    def __call__(self, learner: Learner, epoch: int) -> Row:
        """The norms, and the cosine of the two gradients; empty in other epochs."""
        if epoch not in self.epochs:
            return {}
        model = copy.deepcopy(learner.model).train()
        weights = list(model.parameters())
        ce_sum = metric_sum = torch.zeros((), device=learner.device)
        for positions in self.batches:
            pixels, labels = (part.to(learner.device) for part in self.images.batch(positions))
            loss = learner.criterion(model(pixels), labels)
            ce_sum = ce_sum + loss.ce
            if loss.metric is not None:
                metric_sum = metric_sum + learner.config.metric_weight * loss.metric
        ce = torch.autograd.grad(ce_sum, weights, retain_graph=True)
        if not metric_sum.requires_grad:
            return {"ce_norm": _norm(ce) / len(self.batches), "metric_norm": None, "cosine": None}
        metric = torch.autograd.grad(metric_sum, weights, allow_unused=True)
        pairs = [(a, b) for a, b in zip(ce, metric, strict=True) if b is not None]
        ce_norm, metric_norm = _norm([a for a, _ in pairs]), _norm([b for _, b in pairs])
        product = sum(float((a * b).sum()) for a, b in pairs)
        return {
            "ce_norm": ce_norm / len(self.batches),
            "metric_norm": metric_norm / len(self.batches),
            "cosine": product / (ce_norm * metric_norm) if metric_norm else None,
        }


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def finish(job: Job, threads: int) -> Finished:
    """Train a run to its end and return its rows."""
    torch.set_num_threads(threads)
    config, run = job.config, RunFolder(job.folder)
    task = Tasks().of(config)
    if len(task.classes) > MOST_CLASSES:
        raise UserError(f"{config.data} has {len(task.classes)} classes; at most {MOST_CLASSES}")
    metrics = train(config, task, run, GradientShare(task.train, config))
    log = read_comparison(job.folder).runs[0].log
    key = dict(zip(RUN_KEY, job.key, strict=True))
    row = {
        **key,
        "configuration": job.fingerprint,
        "image_size": config.image_size,
        "train_images": len(task.train),
        "epochs": metrics["epochs"],
        **{name: metrics[name] for name in MEASURES},
        **measured(run, task),
        "seconds": sum(line["seconds"] for line in log),
        "threads": threads,
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "commit": job.commit,
        "versions": versions(),
    }
    observed = [line for line in log if "ce_norm" in line]
    return Finished(
        row,
        key | {"predicted": predicted_classes(run, task)},
        [key | {name: line[name] for name in ("epoch", *OBSERVED)} for line in observed],
        {
            "images": job.images,
            "classes": json.dumps(task.classes),
            "labels": "".join(map(str, task.test.labels)),
        },
    )


def measured(run: RunFolder, task: Task) -> Row:
    """Cross entropy on each part, and cosines of training and test images, of the tested model."""
    trained = load_trained(run)
    found: Row = {}
    for name, images in task.parts.items():
        output, labels = embed(trained.model, images, trained.device)
        found[f"{name}_ce"] = float(cross_entropy(output.logits, labels))
        if name != "validation":
            cosines = cosine_measures(output.embeddings.float().cpu().numpy(), images.labels)
            found |= {f"{name}_{measure}": value for measure, value in cosines.items()}
    return found


def predicted_classes(run: RunFolder, task: Task) -> str:
    """The number of the predicted class of each test image, a digit each."""
    with (run.path / PREDICTIONS_FILE).open(newline="") as stream:
        names = [row["predicted"] for row in csv.DictReader(stream)]
    return "".join(str(task.classes.index(name)) for name in names)


def train_missing(jobs: Sequence[Job], tables: Tables, workers: int, threads: int) -> None:
    """Train runs, ``workers`` at a time, and add each to the tables when it is finished.

    After an error no further run begins; those that have begun go on to their end.
    """
    context, failed = multiprocessing.get_context("spawn"), None
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:
        running = {pool.submit(finish, job, threads): job for job in jobs}
        pending = set(running)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda one: one.exception() is not None):
                try:
                    found = future.result()
                    tables.add(found)
                except Exception as error:  # the runs that have begun are not lost
                    failed = failed or error
                    pending = {other for other in pending if not other.cancel()}
                    continue
                print(
                    f"{' '.join(running[future].key)}: test accuracy "
                    f"{found.run['accuracy']:.2%}, {found.run['seconds']:.0f} s; "
                    f"{len(pending)} to go",
                    flush=True,
                )
    if failed:
        raise failed


def _end_with(parent: int) -> None:
    """End this worker once its parent has ended, however it did: its folder is then free."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> None:
    """Count the runs of each part; train those that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}")
    parser.add_argument("--blood", type=Path, help="folder of the blood cells")
    parser.add_argument("--chest", type=Path, help="folder of the chest X-rays")
    parser.add_argument("--missing", action="store_true", help="train the runs that are missing")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--work", type=Path, default=WORK, help=f"run folders (default: {WORK})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}; parts are {', '.join(PARTS)}")
    folders = {BLOOD: options.blood, CHEST: options.chest}
    code = commit()  # as this process read it: later commits do not change it
    jobs = [
        job
        for name in options.parts or PARTS
        for job in jobs_of(name, folders[PARTS[name].images] or Path(), options.work, code)
    ]
    try:
        if not options.missing:
            count(jobs, Tables(options.results))
            return
        with locked_folder(options.work), locked_folder(options.results):
            tables = Tables(options.results)
            missing = count(jobs, tables)
            for images in {job.images for job in missing}:
                if folders[images] is None:
                    parser.error(f"--{images} FOLDER: the missing runs need its images")
            train_missing(missing, tables, options.workers, options.threads)
    except UserError as error:
        parser.exit(2, f"{error}\n")


def count(jobs: Sequence[Job], tables: Tables) -> list[Job]:
    """Print how many runs of each part are there; return those that are missing."""
    for job in jobs:
        found = tables.finished.get(job.key, job.fingerprint)
        if found != job.fingerprint:
            raise UserError(
                f"{' '.join(job.key)} in {tables.folder} was trained in another configuration "
                f"({found}; now {job.fingerprint}): move its rows away, or undo the change"
            )
    missing = [job for job in jobs if job.key not in tables.finished]
    for name in dict.fromkeys(job.part for job in jobs):
        wanted, lacking = (sum(job.part == name for job in some) for some in (jobs, missing))
        print(f"{name}: {wanted - lacking} of {wanted} runs are there", flush=True)
    return missing


if __name__ == "__main__":
    main()
