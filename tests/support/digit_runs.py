"""Run folders with real contents, made in a moment: small networks of scikit-learn on its digits.

They stand in for training runs in tests that need only the files of a run. The network of each
scheme has its own width and step size, so that results differ.
"""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import numpy as np
from bstriplet.config import Scheme, TrainConfig
from bstriplet.training.metrics import classification_metrics
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.neural_network import MLPClassifier

WIDTHS = {"ce": 12, "ce+triplet": 16, "ce+ls": 20, "ce+bst": 24}
STEPS = {"random": 0.02, "mined": 0.015}


def write_comparison(
    folder: Path, schemes: list[str], seeds: list[int], classes: tuple[str, ...] = ("0", "1", "2")
) -> Path:
    """Write a compare folder with every run finished; return it."""
    folder.mkdir(parents=True)
    config = TrainConfig(backbone="mlp").to_dict()
    asked = {"schemes": schemes, "seeds": seeds, "config": config}
    (folder / "compare.json").write_text(json.dumps(asked))
    for text in schemes:
        scheme = Scheme.parse(text)
        for seed in seeds:
            write_run(folder / "runs" / scheme.slug / f"seed-{seed}", scheme, seed, classes)
    return folder


def write_run(
    folder: Path, scheme: Scheme, seed: int, classes: tuple[str, ...] = ("0", "1", "2")
) -> Path:
    """Write a finished run: the first len(classes) digits, 8 training images per class."""
    folder.mkdir(parents=True)
    digits = load_digits()
    kept = digits.target < len(classes)
    images, labels = digits.data[kept] / 16, digits.target[kept]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    train = np.concatenate([order[labels[order] == c][:8] for c in range(len(classes))])
    test = np.setdiff1d(order, train)
    validation, test = test[:40], test[40:]

    step = STEPS[scheme.batches]
    network = MLPClassifier((WIDTHS[scheme.loss],), learning_rate_init=step, random_state=seed)
    every_class, log = range(len(classes)), []
    for epoch in range(1, 9 + seed % 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            network.partial_fit(images[train], labels[train], classes=every_class)
        losses = {
            part: log_loss(
                labels[rows], network.predict_proba(images[rows]), labels=range(len(classes))
            )
            for part, rows in (("train", train), ("validation", validation))
        }
        log.append(
            {
                "epoch": epoch,
                "train_loss": losses["train"],
                "train_ce": losses["train"],
                "train_metric": None,
                "train_accuracy": network.score(images[train], labels[train]),
                "validation_loss": losses["validation"],
                "validation_ce": losses["validation"],
                "validation_metric": None,
                "validation_accuracy": network.score(images[validation], labels[validation]),
                "lr": step,
                "seconds": 0.01,
                "images_per_second": 2400.0,
            }
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))

    config = TrainConfig(**{"backbone": "mlp", **scheme}, seed=seed)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    environment = {
        "python": "3.11",
        "packages": {"torch": "2.14", "timm": "1.0"},
        "data": {
            "images": {
                part: {name: int(np.sum(labels[rows] == c)) for c, name in enumerate(classes)}
                for part, rows in (("train", train), ("validation", validation), ("test", test))
            },
            "notes": [],
        },
    }
    (folder / "environment.json").write_text(json.dumps(environment))

    probabilities = network.predict_proba(images[test])
    with (folder / "predictions.csv").open(
        "w", encoding="utf-8", errors="surrogateescape", newline=""
    ) as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "predicted", *(f"prob_{name}" for name in classes)])
        for index, row in zip(test, probabilities, strict=True):
            names = classes[labels[index]], classes[row.argmax()]
            writer.writerow([f"digit-{index}", *names, *row.tolist()])
    wrong = [row for row, index in enumerate(test) if probabilities[row].argmax() != labels[index]]
    pixels = (255 * images[test[wrong]]).astype(np.uint8).reshape(-1, 1, 8, 8)
    files = np.array([f"digit-{index}" for index in test[wrong]], dtype=str)
    np.savez(folder / "mistakes.npz", files=files, pixels=pixels)
    hidden = np.maximum(images[train] @ network.coefs_[0] + network.intercepts_[0], 0)
    np.savez(
        folder / "embeddings.npz",
        embeddings=hidden.astype(np.float32),
        labels=labels[train],
        classes=np.array(classes),
    )
    metrics = classification_metrics(labels[test], probabilities, classes)
    finished = {**metrics, "tested_epoch": len(log), "epochs": len(log)}
    (folder / "metrics.json").write_text(json.dumps(finished))
    return folder
