"""The README's code runs as it stands, and its numbers are those of committed files."""

import csv
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
from bstriplet.study.statistics import paired_test
from ranks import on_ranks
from torch import nn
from torch.utils.data import TensorDataset

from bstriplet_kernels import bstriplet_loss

ROOT = Path(__file__).parents[1]


def block(word):
    """The block of Python code that has this word."""
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (found,) = (code for code in blocks if word in code)
    return found


def test_the_first_lines_run():
    names = {}
    exec(block("torch.nn.Linear"), names)
    assert names["embeddings"].grad.norm() > 0
    assert names["classifier"].weight.grad.norm() > 0


def test_the_lines_for_pytorch_metric_learning_run():
    names = {}
    exec(block("bstriplet_kernels.metric_learning"), names)
    assert names["embeddings"].grad.norm() > 0


class Network(nn.Module):
    """Images [N, 4] -> logits [N, 2], embeddings [N, 3]; keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        embeddings = self.body(images)
        return self.head(embeddings), embeddings


def train_as_the_readme_does(rank, world):
    """An epoch of 24 images; then both ranks have the same weights, and shared the images."""
    torch.manual_seed(0)
    images, labels = torch.randn(24, 4), torch.arange(24) % 2
    images[:12] += 10  # two groups of six in each class: no share has to be lifted
    network = Network()
    names = {
        "images": images,
        "labels": labels,
        "data": TensorDataset(images, labels),
        "network": network,
        "optimiser": torch.optim.SGD(network.parameters(), lr=0.1),
    }
    exec(block("DistributedDataParallel").replace("batch_size=36", "batch_size=6"), names)
    weights = torch.cat([p.detach().flatten() for p in network.parameters()])
    of_all = [torch.empty_like(weights) for _ in range(world)]
    torch.distributed.all_gather(of_all, weights)
    assert torch.equal(*of_all)
    assert len(network.seen) == 2
    seen = [torch.empty(12, 4) for _ in range(world)]
    torch.distributed.all_gather(seen, torch.cat(network.seen))
    once = torch.cat(seen)
    assert torch.equal(once.unique(dim=0), images.unique(dim=0))
    # The last step's loss is that of both ranks' rows.
    own = names["embeddings"].detach(), names["targets"]
    rows, targets = torch.empty(2, 6, 3), torch.empty(2, 6, dtype=torch.int64)
    torch.distributed.all_gather(list(rows), own[0])
    torch.distributed.all_gather(list(targets), own[1])
    whole = bstriplet_loss(rows.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(names["criterion"].bstriplet(*own), whole)


def test_the_lines_for_several_processes_train_as_one():
    on_ranks(train_as_the_readme_does)


def rows_of(name):
    """The rows of a file of studies/results."""
    with (ROOT / "studies/results" / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def words():
    """The README with each space, and each end of a line, as one space."""
    return " ".join((ROOT / "README.md").read_text("utf-8").split())


def test_the_demo_s_numbers_are_those_of_its_files():
    text, rows = words(), rows_of("demo/summary_by_scheme.csv")
    assert len(rows) == 2
    difference, low, high = (100 * float(rows[1][name]) for name in ("difference", "low", "high"))
    assert f"{difference:+.2f} points, 95 % confidence interval {low:+.2f} to {high:+.2f}" in text
    assert f"p = {float(rows[1]['p']):.3f}. " in text
    linear = [float(row["accuracy"]) for row in rows_of("demo/linear.csv")]
    assert f"A linear model on the same pixels reaches {100 * sum(linear) / 5:.2f} %." in text
    for row in rows:
        cells = [row["scheme"], row["runs"]]
        for name, scale, digits in (
            ("accuracy", 100, 2), ("sensitivity", 100, 2), ("specificity", 100, 2), ("auc", 1, 4),
        ):  # fmt: skip
            mean, sd = (scale * float(row[f"{name}_{part}"]) for part in ("mean", "sd"))
            cells.append(f"{mean:.{digits}f} ± {sd:.{digits}f}")
        assert f"| {' | '.join(cells)} |" in text


def test_what_is_said_of_chest_x_rays_is_what_the_runs_show():
    of_scheme = defaultdict(list)
    for row in rows_of("table3/runs.csv"):
        of_scheme[row["scheme"]].append(row)
    assert {len(rows) for rows in of_scheme.values()} == {10}

    def mean_square(scheme, pairs):
        return mean(float(row[f"mean_square_{pairs}"]) for row in of_scheme[scheme])

    (before, after), (apart, further) = (
        [round(mean_square(scheme, pairs), 2) for scheme in ("ce:random", "ce+bst:random")]
        for pairs in ("within", "between")
    )
    assert f"rises from {before} to {after} within classes" in words()
    assert f"falls from {apart} to {further} between them" in words()


def test_what_is_said_of_four_networks_is_what_the_runs_show():
    ours, theirs = (
        {
            (row["backbone"], int(row["seed"])): float(row["accuracy"])
            for row in rows_of("table6/runs.csv")
            if row["scheme"].startswith(scheme)
        }
        for scheme in ("ce+bst:", "ce:")
    )
    test = paired_test(ours, theirs)
    assert test.difference is not None
    assert test.p is not None
    text = words()
    assert f"{100 * test.difference:.1f} points ahead of CE](studies/results/table6" in text
    assert f"({test.n} pairs, p = {test.p:.3f} before adjustment for three losses, " in text
    assert f", {3 * test.p:.3f} after)" in text
