"""What each trainer draws under the lines of docs/trainers.md: three epochs on every process.

Run by torchrun, with the name of a function, it writes what that returns into RANK.json.
"""

import json
import os
import re
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bstriplet.sampler import GroupBatchSampler
from torch import nn
from torch.utils.data import DataLoader, Dataset

EPOCHS = 3
GROUPS = [0] * 40 + [1] * 60 + [2] * 7
Batches = list[list[int]]


class Numbers(Dataset[dict[str, torch.Tensor]]):
    """Samples that are their own positions, with a label."""

    sampler: GroupBatchSampler

    def __len__(self) -> int:
        return len(GROUPS)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        return {"position": torch.tensor(position), "labels": torch.tensor(GROUPS[position])}


class Net(nn.Module):
    """A network that keeps the positions it was given in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 3)
        self.drawn: Batches = []

    def forward(
        self, position: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the loss and logits, as transformers' models do."""
        self.drawn.append(position.tolist())
        logits = self.linear(position[:, None].float() / len(GROUPS))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def make_sampler(**options: Any) -> GroupBatchSampler:
    """Return the sampler of all tests: every sample once an epoch, the last batches smaller."""
    return GroupBatchSampler(GROUPS, 10, min_per_group=0, **options)


def documented_lines(about: str) -> str:
    """Return the lines of docs/trainers.md below the comment that names ``about``."""
    page = (Path(__file__).parents[2] / "docs/trainers.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n([^`]*)```", page)
    for part in re.split(r"^(?=# )", block, flags=re.MULTILINE):
        if part.startswith("# ") and about in part.splitlines()[0]:
            return part
    raise LookupError(f"docs/trainers.md has no lines on {about}")


def in_epochs(drawn: Batches, per_epoch: int) -> list[Batches]:
    """Return batches epoch by epoch."""
    return [drawn[start : start + per_epoch] for start in range(0, len(drawn), per_epoch)]


def loop() -> list[Batches]:
    """A loop of one's own over a loader that is made before the process group."""
    names: dict[str, Any] = {"sampler": make_sampler(), "data": Numbers(), "DataLoader": DataLoader}
    exec(documented_lines("loop of your own"), names)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    return [[batch["position"].tolist() for batch in names["loader"]] for _ in range(EPOCHS)]


def ignite() -> list[Batches]:
    """ignite's DeterministicEngine."""
    from ignite.engine import DeterministicEngine

    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    names: dict[str, Any] = {"sampler": make_sampler(), "data": Numbers(), "DataLoader": DataLoader}
    exec(documented_lines("ignite"), names)
    drawn: Batches = []
    engine = DeterministicEngine(lambda _, batch: drawn.append(batch["position"].tolist()))
    engine.run(names["loader"], max_epochs=EPOCHS)
    return in_epochs(drawn, len(names["sampler"]))


def lightning(
    in_hook: bool = False,
    loader: type[DataLoader[Any]] = DataLoader,
    workers: int = 0,
    checkpoint: Path | None = None,
    **options: Any,
) -> list[Batches]:
    """Lightning's Trainer, with DDP where there are two processes.

    in_hook: the module makes the loader itself, which lets Lightning record how.
    """
    import lightning as L

    def make_loader() -> DataLoader[Any]:
        return loader(Numbers(), batch_sampler=make_sampler(), num_workers=workers)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.epochs: list[Batches] = []

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.net(**batch)["loss"]

        def on_train_epoch_end(self) -> None:
            self.epochs.append(self.net.drawn)
            self.net.drawn = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class WithLoader(Module):
        def train_dataloader(self) -> DataLoader[Any]:
            return make_loader()

    def made(**readme: Any) -> Any:
        standard = {
            "accelerator": "cpu",
            "devices": int(os.environ.get("WORLD_SIZE", 1)),
            "strategy": "ddp" if "RANK" in os.environ else "auto",
            "max_epochs": EPOCHS,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return L.Trainer(**(standard | readme | options))

    names: dict[str, Any] = {"Trainer": made}
    exec(documented_lines("Lightning"), names)
    module = WithLoader() if in_hook else Module()
    names["trainer"].fit(module, None if in_hook else make_loader(), ckpt_path=checkpoint)
    return module.epochs


def accelerate() -> list[Batches]:
    """accelerate's prepare."""
    from accelerate import Accelerator

    names: dict[str, Any] = {
        "sampler": make_sampler(),
        "accelerator": Accelerator(cpu=True),
        "data": Numbers(),
        "DataLoader": DataLoader,
    }
    exec(documented_lines("accelerate"), names)
    return [[batch["position"].tolist() for batch in names["loader"]] for _ in range(EPOCHS)]


def accelerate_without_unsharded() -> list[str]:
    """What accelerate's prepare is told that is given the sampler itself, by either dealer."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    told = []
    for dispatch in (False, True):
        how = DataLoaderConfiguration(dispatch_batches=dispatch)
        accelerator = Accelerator(cpu=True, dataloader_config=how)
        loader = accelerator.prepare(DataLoader(Numbers(), batch_sampler=make_sampler()))
        try:
            next(iter(loader))
        except ValueError as error:
            told.append(str(error))
    return told


def accelerate_resumed(stateful: bool = False, workers: int = 0, saved_in: int = 1) -> Batches:
    """Draw three batches of an epoch, then with new objects the rest of it and the following."""
    from accelerate import Accelerator, skip_first_batches
    from accelerate.utils import DataLoaderConfiguration

    how = DataLoaderConfiguration(use_stateful_dataloader=stateful)
    accelerator = Accelerator(cpu=True, dataloader_config=how)

    def make_loader() -> Any:
        batches = make_sampler().unsharded()
        return accelerator.prepare(
            DataLoader(Numbers(), batch_sampler=batches, num_workers=workers)
        )

    drawn, loader, state = [], make_loader(), {}
    for epoch in range(saved_in + 1):
        for number, batch in enumerate(loader, start=1):
            drawn.append(batch["position"].tolist())
            if (epoch, number) == (saved_in, 3):
                state = deepcopy(loader.state_dict()) if stateful else {}
                break
    loader = make_loader()
    if stateful:
        loader.load_state_dict(state)
    for epoch in range(saved_in, EPOCHS):
        loader.set_epoch(epoch)
        rest = loader if stateful or epoch > saved_in else skip_first_batches(loader, 3)
        drawn += [batch["position"].tolist() for batch in rest]
    return drawn


def transformers() -> list[Batches]:
    """Hugging Face's Trainer."""
    drawn = _hugging_face(save_strategy="no")
    return in_epochs(drawn, len(drawn) // EPOCHS)


def transformers_resumed() -> list[Batches]:
    """What Hugging Face's Trainer draws after the fourth step of the second epoch, and resumed."""
    from transformers import TrainerCallback

    class SetEpoch(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            others["train_dataloader"].dataset.sampler.set_epoch(int(state.epoch))

    step = len(make_sampler()) + 4
    drawn = _hugging_face(save_steps=step)
    resumed = _hugging_face(f"checkpoint-{step}", [SetEpoch()], save_strategy="no")
    return [drawn[step:], resumed]


def _hugging_face(
    checkpoint: str | None = None, callbacks: list[Any] | None = None, **options: Any
) -> Batches:
    from transformers import Trainer, TrainingArguments

    data, net = Numbers(), Net()
    data.sampler = make_sampler()
    names: dict[str, Any] = {
        "sampler": data.sampler,
        "DataLoader": DataLoader,
        "Trainer": Trainer,
    }
    exec(documented_lines("Hugging Face"), names)
    arguments = TrainingArguments(
        ".",
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = names["GroupTrainer"](
        model=net, args=arguments, train_dataset=data, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return net.drawn


def metric_learning() -> list[Batches]:
    """pytorch-metric-learning's MetricLossOnly; in one process, as that library has it."""
    from pytorch_metric_learning.losses import ContrastiveLoss
    from pytorch_metric_learning.trainers import MetricLossOnly

    drawn: Batches = []

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 3)

        def forward(self, position: torch.Tensor) -> torch.Tensor:
            drawn.append(position.tolist())
            return self.linear(position[:, None].float())

    trunk = Trunk()
    made = partial(
        MetricLossOnly,
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.01)},
        batch_size=10,
        loss_funcs={"metric_loss": ContrastiveLoss()},
        dataset=Numbers(),
        data_and_label_getter=lambda batch: (batch["position"], batch["labels"]),
        dataloader_num_workers=0,
    )
    names: dict[str, Any] = {"sampler": make_sampler(), "MetricLossOnly": made}
    exec(documented_lines("pytorch-metric-learning"), names)
    names["trainer"].train(num_epochs=EPOCHS)
    return in_epochs(drawn, len(drawn) // EPOCHS)


if __name__ == "__main__":
    Path(f"{os.environ['RANK']}.json").write_text(json.dumps(globals()[sys.argv[1]]()))
    # A thread of the process group that drops a tensor while Python ends aborts the process:
    # https://github.com/pytorch/pytorch/issues/190489
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
