"""The training losses: each against its equation written out; losses of the library by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bstriplet.config import TrainConfig
from bstriplet.data.dataset import load_dataset, split_dataset
from bstriplet.errors import UserError
from bstriplet.models.classifier import Output
from bstriplet.training.loop import train
from bstriplet.training.losses import TrainingLoss, check_loss
from bstriplet.training.run_folder import LAST_FILE, RunFolder, load_checkpoint
from metric_losses import lifted_structure_loss, triplet_loss
from torch import Tensor
from torch.nn import functional

from bstriplet_kernels.reference import naive_loss

COUNTS = (30, 10, 20)


def batch(seed: int = 0) -> tuple[Output, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, embeddings = torch.randn(9, 3, generator=generator), torch.randn(9, 5)
    return Output(logits, embeddings), torch.arange(9) % 3


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("ce+triplet", triplet_loss),
        ("ce+ls", lifted_structure_loss),
        ("ce+bst", lambda embeddings, labels: naive_loss(embeddings, labels, 0.7)),
    ],
)
def test_the_paper_s_losses_are_their_equations(loss: str, expected: object) -> None:
    output, labels = batch()
    criterion = TrainingLoss(TrainConfig(loss=loss, metric_weight=0.3, margin=0.7), COUNTS, 5)
    terms = criterion(output, labels)
    ce = functional.cross_entropy(output.logits, labels)
    torch.testing.assert_close(terms.ce, ce)
    assert callable(expected)
    torch.testing.assert_close(terms.metric, expected(output.embeddings, labels))
    torch.testing.assert_close(terms.total, ce + 0.3 * terms.metric)


@pytest.mark.parametrize("similarity", ["square", "signed_square", "linear"])
@pytest.mark.parametrize("eq3", ["corrected", "printed"])
def test_similarity_and_sign_reach_the_loss(similarity: str, eq3: str) -> None:
    output, labels = batch()
    config = TrainConfig(loss="ce+bst", margin=0.7, similarity=similarity, eq3=eq3)
    found = TrainingLoss(config, COUNTS, 5)(output, labels).metric
    s = functional.normalize(output.embeddings.double())
    s = s @ s.T
    phi = {"square": s**2, "signed_square": s * s.abs(), "linear": s}[similarity]
    same = (labels[:, None] == labels).double()
    positives, negatives = same - torch.eye(len(labels)), 1 - same
    means = [(phi * chosen).sum(dim=1) / chosen.sum(dim=1) for chosen in (positives, negatives)]
    sign = 1 if eq3 == "corrected" else -1
    expected = (0.7 - means[0] + sign * means[1]).clamp(min=0).mean()
    assert found is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cross_entropy_with_class_weights_and_smoothing() -> None:
    output, labels = batch()
    config = TrainConfig(class_weights="balanced", label_smoothing=0.1)
    terms = TrainingLoss(config, COUNTS, 5)(output, labels)
    weight = torch.tensor([60 / (3 * n) for n in COUNTS])
    log_p = output.logits.log_softmax(dim=1)
    target = 0.9 * functional.one_hot(labels, 3) + 0.1 / 3
    torch.testing.assert_close(terms.ce, -(target * weight * log_p).sum() / weight[labels].sum())
    assert terms.metric is None
    assert terms.total is terms.ce


@pytest.mark.parametrize(
    "name",
    ["ContrastiveLoss", "ContrastiveLoss(neg_margin=0.5)", "SupConLoss", "MultiSimilarityLoss",
     "ArcFaceLoss", "CosFaceLoss", "SubCenterArcFaceLoss(sub_centers=2)", "SoftTripleLoss",
     "ProxyAnchorLoss", "P2SGradLoss", "RankedListLoss(margin=0.4, Tn=1)",
     "MarginLoss(learn_beta=True)", "DynamicSoftMarginLoss"],
)  # fmt: skip
def test_a_loss_of_pytorch_metric_learning_by_name(name: str) -> None:
    loss = f"ce+{name}"
    check_loss(loss)
    output, labels = batch()
    torch.manual_seed(0)
    terms = TrainingLoss(TrainConfig(loss=loss), COUNTS, 5)(output, labels)
    assert terms.metric is not None
    assert terms.metric.isfinite()


def test_keywords_reach_the_loss() -> None:
    config = TrainConfig(loss="ce+ContrastiveLoss(neg_margin=0.25, pos_margin=0.1)")
    metric = TrainingLoss(config, COUNTS, 5).metric
    assert (metric.neg_margin, metric.pos_margin) == (0.25, 0.1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ContrastLoss", "did you mean 'ContrastiveLoss'"),
        ("ContrastiveLoss(negative=1)", "negative"),
        ("ContrastiveLoss(0.5)", "key=value"),
        ("ContrastiveLoss(neg_margin=x)", "key=value"),
        ("ContrastiveLoss(", "key=value"),
        ("RankedListLoss", "'margin' and 'Tn'"),
        ("VICRegLoss", "embeddings and labels"),
    ],
)
def test_a_loss_that_cannot_be_used_says_why(name: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        check_loss(TrainConfig(loss=f"ce+{name}").loss)
    assert words in str(raised.value)
    assert "--loss" in str(raised.value)


def test_the_parameters_of_a_loss_are_trained_and_continued(
    tiny: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny, loss="ce+ArcFaceLoss", epochs=2)
    task = split_dataset(load_dataset(config.data, config.image_size), config)
    train(config, task, RunFolder(tmp_path / "two"))
    two = load_checkpoint(tmp_path / "two" / LAST_FILE)
    frozen = replace(config, lr=1e-12, epochs=1)
    train(frozen, task, RunFolder(tmp_path / "start"))
    start = load_checkpoint(tmp_path / "start" / LAST_FILE)["learner"]["criterion"]
    assert not torch.equal(two["learner"]["criterion"]["metric.W"], start["metric.W"])
