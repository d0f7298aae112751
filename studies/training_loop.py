"""Images a second of the harness's training loop and of a plain loop in the style of timm's.

    python -m studies.training_loop [--backbone NAME ...] [--image-size 64 128] [--rounds 5]

Both train the same network with CE + BST and Adam on batches of 36 images. The harness computes the
same bits each time, as `bstriplet train` does. The plain loop takes decoded tensors from a
DataLoader, converts them to float and reads the loss in every step. The loops take turns in one
process, an epoch of `steps` batches each; the first turn is a warm-up.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import quantiles

import numpy as np
import timm
import torch
from bstriplet.config import TrainConfig
from bstriplet.data.dataset import Task, load_dataset, split_dataset
from bstriplet.storage import write_atomic
from bstriplet.study.statistics import to_csv
from bstriplet.training import cuda_graph
from bstriplet.training.batches import Feed
from bstriplet.training.evaluation import choose_device
from bstriplet.training.learner import Learner
from bstriplet.training.loop import train_epoch
from bstriplet.training.seeds import reproducible, seed_everything
from bstriplet.training.step import TrainingStep, uses_cuda_graph
from bstriplet.training.tally import Tally
from torch.utils.data import DataLoader, TensorDataset

from bench.machine import commit, device_name, device_slug, versions
from bstriplet_kernels import CrossEntropyBSTripletLoss

RESULTS = Path(__file__).parent / "results" / "training_loop"
FIELDS = (
    *("loop", "backbone", "batch_size", "image_size", "images", "p20_images_s", "p50_images_s"),
    *("p80_images_s", "rounds", "threads", "device", "commit", "versions"),
)
Epoch = Callable[[], None]


def harness(config: TrainConfig, task: Task, device: torch.device) -> Epoch:
    """An epoch of ``bstriplet train``, without validation."""
    seed_everything(0)
    learner, tally = Learner(config, task, device), Tally(config, task, device)
    feed = Feed(config, task.train, device)
    step: cuda_graph.Step = TrainingStep(learner, tally)
    if uses_cuda_graph(learner):
        step = cuda_graph.GraphedStep(step, learner.optimiser, config.batch_size)

    def epoch() -> None:
        with reproducible(device):
            train_epoch(feed.epoch(0), step, learner, tally)
            if tally.first_bad is not None:
                raise SystemExit("the loss is not finite: nothing was timed")

    return epoch


def plain(config: TrainConfig, task: Task, device: torch.device) -> Epoch:
    """An epoch of a hand-written loop around timm and a DataLoader."""
    seed_everything(0)
    images, labels = task.train.batch(range(len(task.train)))
    loader = DataLoader(
        TensorDataset(images, labels),
        batch_size=config.batch_size,
        shuffle=True,
        pin_memory=device.type == "cuda",
    )
    model = timm.create_model(
        config.backbone, num_classes=len(task.classes), in_chans=task.channels
    ).to(device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    criterion = CrossEntropyBSTripletLoss(weight=config.metric_weight, margin=config.margin)
    optimiser = torch.optim.Adam(model.parameters(), lr=config.lr)

    def epoch() -> None:
        model.train()
        meter = 0.0
        for batch, target in loader:
            batch, target = batch.to(device, non_blocking=True), target.to(device)
            pixels = batch.float().div_(255).to(memory_format=layout)
            embeddings = model.forward_head(model.forward_features(pixels), pre_logits=True)
            loss = criterion(model.get_classifier()(embeddings), embeddings, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            meter += loss.item() * len(target)
        assert np.isfinite(meter)

    return epoch


def some_images(config: TrainConfig, steps: int) -> Task:
    """Digits, with as many training images as ``steps`` full batches need."""
    task = split_dataset(load_dataset(config.data, config.image_size), config)
    return replace(task, train=task.train.take(np.arange(steps * config.batch_size)))


def images_per_second(
    config: TrainConfig, device: torch.device, steps: int, rounds: int
) -> dict[str, list[float]]:
    """The rates of each loop by name, one a round."""
    task = some_images(config, steps)
    loops = {
        "harness": harness(config, task, device),
        "plain": plain(replace(config, channels_last=False), task, device),
        "plain, channels last": plain(config, task, device),
    }
    if device.type == "cuda":
        eager = replace(config, cuda_graph="off")
        loops["harness, no CUDA graph"] = harness(eager, task, device)
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds + 1):
        for name, epoch in loops.items():
            start = time.perf_counter()
            epoch()
            if turn:
                rates[name].append(len(task.train) / (time.perf_counter() - start))
    return rates


def rows_of(
    config: TrainConfig, device: torch.device, rates: dict[str, list[float]], images: int
) -> list[dict[str, object]]:
    """Print and return a row for each loop."""
    shared = {
        "backbone": config.backbone,
        "batch_size": config.batch_size,
        "image_size": config.image_size,
        "images": images,
        "threads": torch.get_num_threads(),
        "device": device_name(device.type),
        "commit": commit("python", "studies"),
        "versions": versions(),
    }
    rows: list[dict[str, object]] = []
    for name, found in rates.items():
        p20, _, _, p80 = quantiles(found, n=5, method="inclusive")
        middle = float(np.median(found))
        size = config.image_size
        print(
            f"{config.backbone} {size} {name:<24} {middle:7.1f} images/s ({p20:.1f} to {p80:.1f})"
        )
        rates_of = {"p20_images_s": p20, "p50_images_s": middle, "p80_images_s": p80}
        numbers = {key: f"{rate:.1f}" for key, rate in rates_of.items()}
        rows.append({"loop": name, "rounds": len(found), **shared, **numbers})
    return rows


def main() -> None:
    """Measure each backbone; write the file anew after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", nargs="+", default=["mobilenetv3_small_100"])
    parser.add_argument("--image-size", nargs="+", type=int, default=[128])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    options = parser.parse_args()
    device, rows = choose_device("auto"), list[dict[str, object]]()
    path = options.results / f"{device_slug(device.type)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    for backbone, size in product(options.backbone, options.image_size):
        config = TrainConfig(backbone=backbone, image_size=size, loss="ce+bst")
        rates = images_per_second(config, device, options.steps, options.rounds)
        rows += rows_of(config, device, rates, options.steps * config.batch_size)
        table = to_csv(FIELDS, [[row[name] for name in FIELDS] for row in rows])
        write_atomic(path, table.encode())
    print(path)


if __name__ == "__main__":
    main()
