"""The training losses by name: cross entropy, alone or with a metric loss beside it (Eq. 7)."""

import ast
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bstriplet.config import TrainConfig
from bstriplet.errors import UserError, one_line, unknown_name
from bstriplet.loss_registry import BUILT_IN
from bstriplet.models.classifier import Output


class LossTerms(NamedTuple):
    """Scalar losses of one batch: the minimised total, cross entropy and the metric loss.

    ``metric`` is not weighted by lambda; it is None for cross entropy alone.
    """

    total: Tensor
    ce: Tensor
    metric: Tensor | None


class TrainingLoss(nn.Module):
    """The loss that a configuration names: CE, or CE + lambda times a metric loss (Eq. 7).

    ``criterion(output, labels)`` with labels int64 [N] returns :class:`LossTerms`.

    Args:
        config: its fields of the group "loss".
        class_counts: training images of each class.
        embedding_size: D, for losses with parameters of their own, such as ArcFace.
    """

    def __init__(
        self, config: TrainConfig, class_counts: Sequence[int], embedding_size: int
    ) -> None:
        super().__init__()
        weight = None
        if config.class_weights == "balanced":
            counts = torch.tensor(class_counts, dtype=torch.float32)
            weight = counts.mean() / counts
        self.cross_entropy = nn.CrossEntropyLoss(weight, label_smoothing=config.label_smoothing)
        self.metric_weight = config.metric_weight
        self.metric = _metric_loss(config, len(class_counts), embedding_size)

    def forward(self, output: Output, labels: Tensor) -> LossTerms:
        ce = self.cross_entropy(output.logits, labels)
        if self.metric is None:
            return LossTerms(total=ce, ce=ce, metric=None)
        metric = self.metric(output.embeddings, labels)
        return LossTerms(total=ce + self.metric_weight * metric, ce=ce, metric=metric)


def check_loss(loss: str) -> None:
    """Raise unless ``loss`` works; a library's loss is tried on random embeddings."""
    if loss in BUILT_IN:
        return
    embeddings = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    criterion = _library_loss(loss, num_classes=2, embedding_size=8)
    try:
        criterion(embeddings, torch.arange(16) % 2).backward()
    except Exception as error:  # a library's loss may raise anything if labels are not enough
        raise UserError(
            f"--loss {loss}: it does not work from embeddings and labels ({one_line(error)}); "
            "choose another"
        ) from error


def _metric_loss(config: TrainConfig, num_classes: int, embedding_size: int) -> Any:
    """Return the metric loss; None for cross entropy alone."""
    if built_in := BUILT_IN.get(config.loss):
        return built_in.metric and built_in.metric(config)
    return _library_loss(config.loss, num_classes, embedding_size)


def _library_loss(loss: str, num_classes: int, embedding_size: int) -> Any:
    """Return a loss of pytorch-metric-learning, ``ce+Name`` or ``ce+Name(key=value, ...)``.

    It receives the sizes that its constructor requires. Other options are those given in the name,
    else the library's defaults.
    """
    from pytorch_metric_learning import losses

    library = vars(losses)
    try:
        call = ast.parse(loss.removeprefix("ce+"), mode="eval").body
        if isinstance(call, ast.Call) and call.args:
            raise ValueError("a value without a name")
        name = ast.unparse(call.func if isinstance(call, ast.Call) else call)
        keywords = call.keywords if isinstance(call, ast.Call) else []
        options = {str(item.arg): ast.literal_eval(item.value) for item in keywords}
    except (SyntaxError, ValueError) as error:
        raise UserError(
            f"--loss {loss}: write ce+NAME or 'ce+NAME(key=value)' with numbers as values"
        ) from error
    names = [key for key in library if key.endswith("Loss")]
    if name not in names:
        raise unknown_name(
            "--loss", name, names, advice="Names are the losses of pytorch-metric-learning"
        )
    kind = library[name]
    # Some classes pass *args on to a base class, which names the required parameters.
    signatures = (inspect.signature(ancestor.__init__).parameters for ancestor in kind.__mro__)
    parameters = next(found for found in signatures if "args" not in found)
    required = {name for name, item in parameters.items() if item.default is item.empty}
    sizes = {
        "num_classes": num_classes,
        "embedding_size": embedding_size,
        "descriptors_dim": embedding_size,
    }
    try:
        return kind(**{key: sizes[key] for key in required & set(sizes)} | options)
    except Exception as error:  # the constructor may raise anything for wrong options
        raise UserError(f"--loss {loss}: {one_line(error)}") from error
