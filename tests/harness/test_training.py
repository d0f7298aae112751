"""The training loop: reproducibility, the recipe's schedule and stop, and the evaluated model."""

import csv
import json
import math
import re
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bstriplet import mining
from bstriplet.config import BATCHES, TrainConfig
from bstriplet.data.dataset import ImageSet, Task, load_dataset, split_dataset
from bstriplet.errors import UserError
from bstriplet.loss_registry import BUILT_IN
from bstriplet.models.classifier import Classifier, Output
from bstriplet.training import loop
from bstriplet.training.batches import (
    Feed,
    RandomBatchSampler,
    make_sampler,
    make_validation_batches,
)
from bstriplet.training.evaluation import embed, load_trained
from bstriplet.training.learner import Learner, grey_level_statistics
from bstriplet.training.loop import check_models, train
from bstriplet.training.losses import LossTerms
from bstriplet.training.metrics import classification_metrics
from bstriplet.training.progress import Checkpoints, Progress, epochs_without_improvement
from bstriplet.training.run_folder import LAST_FILE, RunFolder, load_checkpoint
from bstriplet.training.step import TrainingStep
from bstriplet.training.tally import Tally
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_losses import triplet_loss
from pytorch_metric_learning.losses import GeneralizedLiftedStructureLoss
from torch.nn import functional

from bstriplet_kernels import BSTripletLoss

METRIC_LOSSES = {
    "ce+triplet": triplet_loss,
    "ce+ls": GeneralizedLiftedStructureLoss(),
    "ce+bst": BSTripletLoss(margin=0.8),
}


def make_task(config: TrainConfig) -> Task:
    return split_dataset(load_dataset(config.data, config.image_size), config)


def log_of(run: RunFolder, *, timed: bool = False) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return rows if timed else [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]  # fmt: skip


def keras_wait(losses: list[float], delta: float) -> int:
    """Keras' EarlyStopping, as in its documentation."""
    best, wait = math.inf, 0
    for loss in losses:
        wait += 1
        if best - loss > delta:
            best, wait = loss, 0
    return wait


@given(
    st.lists(st.integers(0, 20).map(lambda value: value / 8), max_size=30),
    st.sampled_from([0.0, 0.25, 1.0]),
)
@settings(derandomize=True)
def test_stalled_epochs_are_counted_as_keras_does(losses: list[float], delta: float) -> None:
    assert epochs_without_improvement(losses, delta) == keras_wait(losses, delta)


@given(n=st.integers(2, 200), batch_size=st.integers(2, 50), seed=st.integers(0, 99))
@settings(derandomize=True)
def test_random_batches_are_full_and_hold_every_image(n: int, batch_size: int, seed: int) -> None:
    sampler = RandomBatchSampler(n, batch_size, seed)
    sampler.set_epoch(3)
    batches = list(sampler)
    assert {len(batch) for batch in batches} == {min(n, batch_size)}
    assert all(len(set(batch)) == len(batch) for batch in batches)
    times = Counter(index for batch in batches for index in batch)
    assert sorted(times) == list(range(n))
    assert max(times.values()) <= 2
    assert len(batches) == len(sampler) == math.ceil(n / batch_size)
    assert list(sampler) == batches
    sampler.set_epoch(4)
    assert n < 10 or list(sampler) != batches


@given(n=st.integers(1, 200), batch_size=st.integers(2, 50), seed=st.integers(0, 99))
@settings(derandomize=True)
def test_validation_batches_hold_every_image_once(n: int, batch_size: int, seed: int) -> None:
    batches = make_validation_batches(TrainConfig(batch_size=batch_size, seed=seed), n)
    assert sorted(index for batch in batches for index in batch) == list(range(n))
    assert all(min(n, 2) <= len(batch) <= batch_size + 1 for batch in batches)
    assert all(len(batch) >= batch_size for batch in batches[:-1])


def test_mined_batches_hold_every_class(tiny: TrainConfig) -> None:
    config = replace(tiny, batches="mined", groups_per_class=1)
    task = make_task(config)
    for batch in make_sampler(config, task.train):
        assert set(task.train.labels[batch]) == set(range(10))


def test_mined_groups_never_have_all_images_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "_CHUNK_VALUES", 1 << 16)
    monkeypatch.setattr(mining, "PCA_SAMPLES", 128)
    shape = (12_000, 1, 24, 24)
    pixels = np.random.default_rng(9).integers(0, 100, shape, dtype=np.uint8)
    pixels[::3, :, :12] += 100
    np.save(tmp_path / "pixels.npy", pixels)
    del pixels
    rows = np.arange(0, 12_000, 2)
    mapped = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    images = ImageSet(mapped, rows, np.arange(6000) % 2, ("",) * 6000)
    config = TrainConfig(data=str(tmp_path), batches="mined")
    make_sampler(config, images.take(np.arange(100)))  # what the libraries keep for good
    tracemalloc.start()
    sampler = make_sampler(config, images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(rows) * mapped[0].nbytes  # 3.5 MB
    for batch in sampler:  # 12 of 36 are bright, half of them of each class
        bright = rows[batch] % 3 == 0
        counts = [int(np.sum(bright & (images.labels[batch] == label))) for label in (0, 1)]
        assert all(count in (5, 6, 7) for count in counts)


def test_more_groups_than_places_is_a_clear_error(tiny: TrainConfig) -> None:
    config = replace(tiny, batches="mined", groups_per_class=3, batch_size=12)
    with pytest.raises(UserError, match=r"--batch-size 12 with --groups-per-class 3.*groups"):
        make_sampler(config, make_task(config).train)


def test_statistics_are_those_of_the_pixels(tiny: TrainConfig) -> None:
    images = make_task(tiny).train
    mean, std = grey_level_statistics(images)
    pixels = images.pixels[images.rows].astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_100", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_embedding_is_what_feeds_the_classifier(backbone: str, channels: int) -> None:
    torch.manual_seed(0)
    size = 160 if backbone == "test_vit" else 64
    model = Classifier(backbone, num_classes=3, channels=channels).eval()
    images = torch.randint(0, 256, (2, channels, size, size), dtype=torch.uint8)
    output = model(images)
    torch.testing.assert_close(output.logits, model.backbone(images.float()))
    head = model.backbone.get_classifier()
    assert output.embeddings.shape == (2, head.in_features)
    torch.testing.assert_close(output.embeddings @ head.weight.T + head.bias, output.logits)


@pytest.mark.parametrize("backbone", ["mobilenetv3_small_100", "shufflenet_v2"])
def test_the_pooled_embedding_is_the_mean_of_the_last_feature_map(backbone: str) -> None:
    torch.manual_seed(0)
    model = Classifier(backbone, num_classes=3, channels=1, embedding="pooled").eval()
    images = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    output = model(images)
    features = model.backbone.forward_features(images.float())
    assert output.embeddings.shape == (2, model.embedding_size)
    torch.testing.assert_close(output.embeddings, features.mean((2, 3)))
    torch.testing.assert_close(output.logits, model.backbone(images.float()))


def test_a_pooled_embedding_needs_a_feature_map_which_is_seen_before_any_run(
    tiny: TrainConfig,
) -> None:
    config = replace(tiny, backbone="test_vit", image_size=160)
    check_models(config)
    with pytest.raises(UserError, match="--embedding pooled: the features of test_vit are no map"):
        check_models(replace(config, embedding="pooled"))
    check_models(replace(tiny, embedding="pooled"))


def test_the_metric_loss_is_of_the_embedding_that_is_asked_for(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    found = {}
    for embedding in ("classifier", "pooled"):
        config = replace(
            tiny, backbone="mobilenetv3_small_050", loss="ce+bst", embedding=embedding, epochs=1
        )
        run = RunFolder(tmp_path / embedding)
        train(config, make_task(config), run)
        with np.load(run.path / "embeddings.npz") as stored:
            found[embedding] = stored["embeddings"].shape[1]
        assert load_trained(run).model.embedding_size == found[embedding]
    model = Classifier("mobilenetv3_small_050", 2, 1).backbone
    assert found == {"classifier": model.head_hidden_size, "pooled": model.num_features}
    assert found["classifier"] != found["pooled"]


def test_an_unknown_backbone_gets_the_nearest_suggested() -> None:
    with pytest.raises(UserError, match="did you mean 'mobilenetv3_small_100'"):
        Classifier("mobilenet_v3_small_100", 2, 1)


def test_the_same_run_twice_is_the_same_to_the_bit(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, loss="ce+bst", batches="mined")
    task = make_task(config)
    runs = [RunFolder(tmp_path / name) for name in "ab"]
    metrics = [train(config, task, run) for run in runs]
    assert metrics[0] == metrics[1]
    assert log_of(runs[0]) == log_of(runs[1])
    for name in ("predictions.csv", "metrics.json", "config.json", "embeddings.npz", "model.pt"):
        contents = [(run.path / name).read_bytes() for run in runs]
        assert contents[0] == contents[1], name


def test_schemes_start_from_the_same_weights_and_split(tiny: TrainConfig, tmp_path: Path) -> None:
    """With a learning rate near 0, the trained weights are nearly the initial ones."""
    weights, data = [], []
    for loss in BUILT_IN:
        for batches in BATCHES:
            config = replace(tiny, loss=loss, batches=batches, epochs=1, lr=1e-12, lr_floor=0.0)
            run = RunFolder(tmp_path / f"{loss}{batches}")
            train(config, make_task(config), run)
            state = load_checkpoint(run.path / LAST_FILE)["learner"]["model"]
            weights.append([v for k, v in state.items() if k.endswith(("weight", "bias"))])
            data.append(json.loads((run.path / "environment.json").read_text())["data"])
    for other in weights[1:]:
        for mine, theirs in zip(weights[0], other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    assert all(other == data[0] for other in data)


def test_seeds_start_from_different_weights(tiny: TrainConfig, tmp_path: Path) -> None:
    states = []
    for seed in range(2):
        config = replace(tiny, epochs=1, lr=1e-12, seed=seed)
        train(config, make_task(config), RunFolder(tmp_path / str(seed)))
        states.append(load_checkpoint(tmp_path / str(seed) / LAST_FILE)["learner"]["model"])
    name = next(name for name in states[0] if name.endswith("weight") and states[0][name].ndim == 4)
    assert not torch.equal(states[0][name], states[1][name])


def test_schedule_and_stop_follow_the_recipe(tiny: TrainConfig, tmp_path: Path) -> None:
    """Keras' callbacks give the logged learning rates and the last epoch from the same losses."""
    config = replace(
        tiny,
        epochs=120,
        lr=0.1,
        lr_patience=2,
        lr_floor=4e-3,
        stop_patience=12,
        stop_delta=0.01,
        select="loss",
    )
    run = RunFolder(tmp_path / "run")
    metrics = train(config, make_task(config), run)
    log = log_of(run)
    best, wait, lr = math.inf, 0, config.lr
    for row in log:
        assert row["lr"] == pytest.approx(lr)
        wait += 1
        if row["train_loss"] < best:
            best, wait = row["train_loss"], 0
        if wait >= config.lr_patience:
            lr, wait = max(lr * config.lr_factor, config.lr_floor), 0
    assert log[-1]["lr"] < config.lr, "the rate never fell: nothing was tested"
    losses = [row["validation_loss"] for row in log]
    waits = [keras_wait(losses[: n + 1], config.stop_delta) for n in range(len(log))]
    assert waits[-1] == config.stop_patience or len(log) == config.epochs
    assert max(waits[:-1]) < config.stop_patience
    assert len(log) < config.epochs, "the run never stopped early: nothing was tested"
    assert metrics["epochs"] == len(log)
    assert metrics["tested_epoch"] == losses.index(min(losses)) + 1


@pytest.mark.parametrize("select", ["last", "ce", "accuracy", "loss"])
@pytest.mark.parametrize("loss", BUILT_IN)
def test_the_tested_model_is_that_of_the_selected_epoch(
    tiny: TrainConfig, tmp_path: Path, loss: str, select: str
) -> None:
    config = replace(tiny, loss=loss, epochs=6, metric_weight=0.7, margin=0.8, select=select)
    task = make_task(config)
    run = RunFolder(tmp_path / "run")
    metrics = train(config, task, run)
    trained = load_trained(run)
    output, labels = embed(trained.model, task.validation, trained.device)
    assert len(labels) <= config.batch_size  # one batch: its loss is that of the set
    ce = whole = functional.cross_entropy(output.logits, labels)
    if loss != "ce":
        whole = ce + 0.7 * METRIC_LOSSES[loss](output.embeddings, labels)
    log = log_of(run)
    tested = log[metrics["tested_epoch"] - 1]
    expected = {
        "last": log[-1]["epoch"],
        "ce": min(log, key=lambda row: row["validation_ce"])["epoch"],
        "accuracy": max(log, key=lambda row: row["validation_accuracy"])["epoch"],
        "loss": min(log, key=lambda row: row["validation_loss"])["epoch"],
    }
    assert tested["epoch"] == expected[select]
    assert tested["validation_ce"] == pytest.approx(ce.item(), rel=1e-5)
    assert tested["validation_loss"] == pytest.approx(whole.item(), rel=1e-5)
    right = (output.logits.argmax(dim=1) == labels).double().mean().item()
    assert tested["validation_accuracy"] == pytest.approx(right)
    for row in log:
        metric = 0.0 if row["train_metric"] is None else row["train_metric"]
        assert (row["train_metric"] is None) == (loss == "ce")
        assert row["train_loss"] == pytest.approx(row["train_ce"] + 0.7 * metric, rel=1e-6)


def test_results_agree_with_each_other(tiny: TrainConfig, tmp_path: Path) -> None:
    task = make_task(tiny)
    run = RunFolder(tmp_path / "run")
    metrics = train(tiny, task, run)
    with (run.path / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == list(task.test.files)
    scores = np.array([[float(row[f"prob_{name}"]) for name in task.classes] for row in rows])
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-12)
    assert [row["label"] for row in rows] == [task.classes[i] for i in task.test.labels]
    assert [row["predicted"] for row in rows] == [task.classes[i] for i in scores.argmax(axis=1)]
    stored = json.loads((run.path / "metrics.json").read_text())
    assert stored == metrics
    assert classification_metrics(task.test.labels, scores, task.classes).items() <= stored.items()
    with np.load(run.path / "embeddings.npz") as saved:
        assert saved["embeddings"].dtype == np.float32
        assert saved["embeddings"].shape[0] == len(task.train)
        np.testing.assert_array_equal(saved["labels"], task.train.labels)
        assert tuple(saved["classes"]) == task.classes


def test_it_learns(tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, loss="ce+bst", batches="mined", train_per_class=20, epochs=15, lr=3e-3)
    metrics = train(config, make_task(config), RunFolder(tmp_path / "run"))
    assert metrics["accuracy"] > 0.6  # chance is 0.1


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_its_batch(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny, lr=1e30, epochs=20, batch_size=12, augment="online")
    task, run = make_task(config), RunFolder(tmp_path / "run")
    file = run.path / "bad_batch.pt"
    with pytest.raises(
        UserError, match=rf"train_loss became (nan|inf) in epoch \d+ .*{file}.*--lr"
    ):
        train(config, task, run)
    assert not run.finished
    saved = torch.load(file, weights_only=True)
    assert (saved["part"], saved["images"].dtype) == ("train", torch.uint8)
    batches = list(Feed(config, task.train, torch.device("cpu")).epoch(saved["epoch"]))
    batch = batches[saved["batch"]]
    assert saved["positions"] == batch.positions
    assert saved["files"] == [task.train.files[position] for position in batch.positions]
    assert torch.equal(saved["images"], batch.images)
    assert torch.equal(saved["labels"], batch.labels)
    loss = functional.cross_entropy(saved["logits"], saved["labels"])
    assert not loss.isfinite()


def test_a_validation_loss_that_is_not_finite_stops_the_run(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(model: Classifier, images: ImageSet, device: torch.device) -> tuple[Output, Any]:
        output, labels = embed(model, images, device)
        return Output(output.logits.log(), output.embeddings), labels

    monkeypatch.setattr(loop, "embed", spoilt)
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="validation_loss became nan in epoch 1 "):
        train(tiny, make_task(tiny), run)
    assert torch.load(run.path / "bad_batch.pt", weights_only=True)["part"] == "validation"


def test_weights_that_are_not_finite_are_not_kept(tiny: TrainConfig, tmp_path: Path) -> None:
    task, device = make_task(tiny), torch.device("cpu")
    learner = Learner(tiny, task, device)
    name, weights = next(iter(learner.model.named_parameters()))
    weights.data.view(-1)[0] = math.nan
    reached = Progress(tiny)
    reached.add({"epoch": 1}, learner.evaluated)
    checkpoints = Checkpoints(RunFolder(tmp_path), learner, task.classes)
    with pytest.raises(UserError, match=f"{re.escape(name)} are not finite in epoch 1 .* --amp"):
        checkpoints.save_model(reached)
    assert not (tmp_path / "model.pt").exists()


def test_only_the_first_bad_batch_counts(tiny: TrainConfig) -> None:
    task = make_task(tiny)
    tally = Tally(tiny, task, torch.device("cpu"))
    finite = LossTerms(torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.5))
    bad = LossTerms(torch.tensor(math.inf), torch.tensor(0.5), torch.tensor(math.inf))
    for _ in range(2):
        tally.reset()
        for number, loss in enumerate([finite, finite, bad, finite, bad]):
            tally.add(loss, torch.full((3, 10), float(number)), torch.zeros(3, dtype=torch.int64))
        assert tally.first_bad == 2
        assert (tally.bad_logits[:3] == 2).all()
    tally.reset()
    assert tally.first_bad is None


@pytest.mark.parametrize("options", [{"compile": True}, {"channels_last": False}])
def test_how_it_runs_changes_little(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    """A compiler that only traces replaces torch's; the test is about the call."""
    traced = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", traced)
    config = replace(tiny, epochs=1, loss="ce+bst", batch_size=40)
    rows = []
    for name, changes in (("usual", {}), ("other", options)):
        run = RunFolder(tmp_path / name)
        train(replace(config, **changes), make_task(config), run)
        rows.append(log_of(run)[0])
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


def test_a_cuda_graph_needs_a_gpu(tiny: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cuda-graph on: there is no GPU"):
        train(replace(tiny, cuda_graph="on"), make_task(tiny), RunFolder(tmp_path / "run"))
    assert not RunFolder(tmp_path / "run").started


@pytest.mark.parametrize("amp", [False, True])
def test_new_tensors_are_filled_only_where_an_operator_may_leave_them_unwritten(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: bool
) -> None:
    config, seen = replace(tiny, epochs=1, amp=amp), []
    step = TrainingStep.__call__

    def spied(self: TrainingStep, images: torch.Tensor, labels: torch.Tensor) -> None:
        settings: Any = torch.utils.deterministic
        seen.append(settings.fill_uninitialized_memory)
        assert torch.are_deterministic_algorithms_enabled()
        step(self, images, labels)

    monkeypatch.setattr(TrainingStep, "__call__", spied)
    train(config, make_task(config), RunFolder(tmp_path / "run"))
    assert set(seen) == {amp}


@pytest.mark.parametrize(
    ("select", "epoch"), [("last", 5), ("ce", 2), ("accuracy", 3), ("loss", 4)]
)
def test_each_selection_has_its_own_criterion(tiny: TrainConfig, select: str, epoch: int) -> None:
    """Cross entropy, accuracy and loss are best in different epochs; the first of equals counts."""
    rows = [(3.0, 0.5, 4.0), (1.0, 0.5, 3.0), (2.0, 0.9, 3.5), (2.0, 0.9, 1.0), (1.0, 0.6, 2.0)]
    progress, model = Progress(replace(tiny, select=select)), torch.nn.Linear(1, 1)
    for number, (ce, accuracy, loss) in enumerate(rows, start=1):
        torch.nn.init.constant_(model.weight, number)
        measured = {"validation_ce": ce, "validation_accuracy": accuracy, "validation_loss": loss}
        progress.add({"epoch": number, **measured}, model)
    assert progress.tested_epoch == epoch
    assert progress.tested_weights["weight"].item() == epoch
