"""GroupBatchSampler in the trainers of other libraries: each epoch another, each sample once."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import passes
import pytest
import torch
from passes import EPOCHS, GROUPS, Batches, make_sampler

LIBRARIES = {
    "loop": "torch",
    "ignite": "ignite",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "transformers": "transformers",
}
needs = {
    library: pytest.mark.skipif(not find_spec(library), reason=f"{library} is not installed")
    for library in (*LIBRARIES.values(), "torchdata", "pytorch_metric_learning")
}
trainers = [pytest.param(name, marks=needs[library]) for name, library in LIBRARIES.items()]


def expected(num_replicas: int = 1, rank: int = 0) -> list[Batches]:
    """Return the batches of each epoch on one replica."""
    epochs = []
    for epoch in range(EPOCHS):
        sampler = make_sampler(num_replicas=num_replicas, rank=rank)
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    return epochs


def in_two_processes(name: str, folder: Path) -> list[Any]:
    """Return what a function of ``passes`` returns on each of two processes."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", passes.__file__]
    subprocess.run(
        [sys.executable, "-m", *command, name],
        check=True,
        timeout=300,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("trainer", trainers)
def test_in_one_process_every_epoch_is_the_next(
    trainer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert getattr(passes, trainer)() == expected()


@pytest.mark.parametrize("trainer", trainers)
def test_two_processes_share_every_epoch(trainer: str, tmp_path: Path) -> None:
    drawn = in_two_processes(trainer, tmp_path)
    assert drawn == [expected(2, 0), expected(2, 1)]
    for one, other in zip(*drawn, strict=True):
        assert sorted(chain(*one, *other)) == list(range(len(GROUPS)))


@needs["accelerate"]
def test_accelerate_is_told_that_the_batches_are_shared_out(tmp_path: Path) -> None:
    for told in in_two_processes("accelerate_without_unsharded", tmp_path):
        assert ["batch_sampler=sampler.unsharded()" in message for message in told] == [True, True]


@needs["accelerate"]
def test_accelerate_resumes_within_an_epoch(tmp_path: Path) -> None:
    drawn = in_two_processes("accelerate_resumed", tmp_path)
    assert drawn == [list(chain(*expected(2, rank))) for rank in range(2)]


@needs["accelerate"]
@needs["torchdata"]
@pytest.mark.parametrize("workers", [0, 1])  # one has read two batches ahead of the third
@pytest.mark.parametrize("saved_in", [0, 1])
@pytest.mark.parametrize("stateful", [False, True])
def test_accelerate_resumes_in_one_process(stateful: bool, saved_in: int, workers: int) -> None:
    drawn = passes.accelerate_resumed(stateful, workers, saved_in)
    assert drawn == list(chain(*expected()))


@needs["transformers"]
def test_hugging_face_resumes_within_an_epoch(tmp_path: Path) -> None:
    for whole, resumed in in_two_processes("transformers_resumed", tmp_path):
        assert resumed == whole


@needs["lightning"]
@pytest.mark.parametrize("in_hook", [False, True])
def test_an_epoch_that_lightning_cuts_short_is_over(in_hook: bool) -> None:
    drawn = passes.lightning(in_hook, limit_train_batches=4)
    assert drawn == [epoch[:4] for epoch in expected()]


def lightning_saved(folder: Path, **options: Any) -> tuple[Path, list[Batches]]:
    """Train with a checkpoint after the fourth step of the second epoch; return it and all."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    step = len(make_sampler()) + 4
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=step, save_top_k=-1)
    drawn = passes.lightning(callbacks=[saving], enable_checkpointing=True, **options)
    return folder / f"step={step}.ckpt", drawn


@needs["lightning"]
@needs["torchdata"]
@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_resumes_within_an_epoch(workers: int, tmp_path: Path) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    options = {"loader": StatefulDataLoader, "workers": workers}
    checkpoint, drawn = lightning_saved(tmp_path, **options)
    assert drawn == expected()
    resumed = passes.lightning(checkpoint=checkpoint, **options)
    assert resumed == [drawn[1][4:], drawn[2]]


@needs["lightning"]
def test_lightning_naming_an_epoch_too_late_is_warned_of(tmp_path: Path) -> None:
    checkpoint, _ = lightning_saved(tmp_path, workers=1)
    with pytest.warns(UserWarning, match=r"set_epoch\(1\) came when batches of epoch 0"):
        passes.lightning(checkpoint=checkpoint, workers=1)


@needs["lightning"]
@pytest.mark.parametrize("in_hook", [False, True])
def test_lightnings_sampler_is_refused_with_what_to_do(in_hook: bool) -> None:
    options = {"use_distributed_sampler": True, "strategy": "ddp"}
    try:
        with pytest.raises(TypeError, match="use_distributed_sampler=False"):
            passes.lightning(in_hook, **options)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@needs["pytorch_metric_learning"]
def test_metric_learning_trains_on_the_batches() -> None:
    # It takes whole batches only: of 107 samples it leaves the last, smaller batch out.
    assert passes.metric_learning() == [epoch[:10] for epoch in expected()]


def a_loader(workers: int, persistent: bool = False) -> Any:
    """Return torchdata's resumable loader of the sampler's batches."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(
        range(len(GROUPS)),
        batch_sampler=make_sampler(),
        num_workers=workers,
        persistent_workers=persistent,
        collate_fn=list,
    )


@needs["torchdata"]
@pytest.mark.parametrize("workers", [0, 1, 6])  # six read ahead beyond the epoch's end
@pytest.mark.parametrize("saved_at", ["middle", "last batch", "end"])
@pytest.mark.parametrize("again", [False, True])
def test_a_stateful_loader_resumes(workers: int, saved_at: str, again: bool) -> None:
    """again: what was resumed is saved, before it is read, and resumed once more."""
    epochs = expected()
    loader, state = a_loader(workers), None
    stop = {"middle": 4, "last batch": 11, "end": 12}[saved_at]
    for number, batch in enumerate(loader, start=1):
        assert batch == epochs[0][number - 1]
        if number == stop:
            state = loader.state_dict()
    state = state or loader.state_dict()
    for _ in range(1 + again):
        loader = a_loader(workers)
        loader.load_state_dict(state)
        state = loader.state_dict()
    if saved_at == "middle":
        assert list(loader) == epochs[0][4:]
    assert [list(loader) for _ in range(2)] == epochs[1:]


@needs["torchdata"]
def test_a_stateful_loader_of_indices_resumes_in_the_epoch_that_is_named() -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def make_loader() -> Any:
        sampler = make_sampler()
        sampler.set_epoch(1)
        indices = sampler.as_index_sampler()
        return StatefulDataLoader(range(len(GROUPS)), 10, sampler=indices, collate_fn=list)

    loader = make_loader()
    drawn = iter(loader)
    epochs = expected()
    assert [next(drawn) for _ in range(4)] == epochs[1][:4]
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert [list(resumed) for _ in range(2)] == [epochs[1][4:], epochs[2]]


@needs["torchdata"]
def test_a_stateful_loader_does_not_batch_batches_once_more() -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(torch.arange(len(GROUPS)), sampler=make_sampler(), batch_size=3)
    with pytest.raises(ValueError, match="pass it as batch_sampler="):
        next(iter(loader))


@needs["torchdata"]
def test_a_stateful_loader_that_is_cut_short_goes_on() -> None:
    loader = a_loader(2, persistent=True)
    for epoch in expected():
        for batch, wanted in zip(loader, epoch[:3], strict=False):
            assert batch == wanted
