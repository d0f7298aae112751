"""The paper's tables as data: every digit that follows from other digits of the paper."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from bstriplet import paper

COUNTS_TABLES = (2, 5, 7, 9)
METRICS_TABLES = (4, 6, 8, 10)


@pytest.fixture
def misprint(monkeypatch):
    """Change one cell of one table."""

    def change(number: int, row: int, column: int, cell: str) -> None:
        printed = paper.table(number)
        rows = [list(cells) for cells in printed.rows]
        assert rows[row][column] != cell
        rows[row][column] = cell
        changed = replace(printed, rows=tuple(map(tuple, rows)))
        tables = {n: paper.table(n) for n in paper.TABLES} | {number: changed}
        monkeypatch.setattr(paper, "table", tables.__getitem__)
        paper.data_set.cache_clear()

    yield change
    paper.data_set.cache_clear()


def test_all_ten_tables_are_there_and_rectangular():
    for number in paper.TABLES:
        printed = paper.table(number)
        assert printed.rows
        assert {len(row) for row in printed.rows} == {len(printed.header)}
    with pytest.raises(ValueError, match="tables 1 to 10"):
        paper.table(11)


@pytest.mark.parametrize("number", COUNTS_TABLES)
def test_class_counts_add_up(number):
    printed = paper.table(number)
    assert [part for part, *_ in printed.rows] == ["Training", "Testing", "Total"]
    train, test, total = np.array([row[1:] for row in printed.rows], dtype=int)
    assert (train + test == total).all()
    for counts in (train, test, total):
        assert counts[:-1].sum() == counts[-1]


@pytest.mark.parametrize("number", METRICS_TABLES)
def test_a_metrics_table_has_four_losses_a_backbone_and_shares_in_range(number):
    printed = paper.table(number)
    models = list(dict.fromkeys(row[0] for row in printed.rows))
    losses = list(paper.LOSSES.values())
    assert [row[:2] for row in printed.rows] == [(m, loss) for m in models for loss in losses]
    assert models == list(paper.BACKBONES.values()) or (number, len(models)) == (10, 1)
    for *_, sensitivity, specificity, accuracy, auc in printed.rows:
        assert all(50 < Decimal(cell) < 100 for cell in (sensitivity, specificity, accuracy))
        assert 0.5 < Decimal(auc) < 1


def test_two_class_accuracies_follow_from_sensitivity_and_specificity():
    for name in ("chest2", "rash"):
        found = paper.data_set(name)
        negatives, positives = found.counts["test"].values()
        for backbone in paper.BACKBONES:
            for loss in paper.LOSSES:
                row = {
                    metric: float(value)
                    for metric, value in paper.printed_metrics(
                        found.metrics_table, backbone, loss
                    ).items()
                }
                right = row["sensitivity"] * positives + row["specificity"] * negatives
                assert right / (positives + negatives) == pytest.approx(row["accuracy"], abs=0.01)


def test_mobilenet_has_one_accuracy_in_tables_3_4_and_figure_5():
    small = "mobilenetv3_small_100"
    for loss, batches, accuracy in (("ce", "random", "92.70"), ("ce+bst", "mined", "94.95")):
        assert paper.printed_metrics(3, small, loss, batches) == {"accuracy": Decimal(accuracy)}
        assert paper.printed_metrics(4, small, loss)["accuracy"] == Decimal(accuracy)
    assert paper.batch_size_accuracies() == {6: Decimal("93.31"), 36: Decimal("94.95")}
    assert paper.printed_metrics(3, "peleenet", "ce", "random") == {}
    assert paper.printed_metrics(10, "peleenet", "ce") == {}


def test_counts_are_by_part_and_class():
    assert paper.data_set("chest1").counts == {
        "train": {"Normal": 1266, "Pneumonia": 3418, "Covid-19": 920},
        "test": {"Normal": 317, "Pneumonia": 855, "Covid-19": 116},
    }
    assert [paper.data_set(name).counts_table for name in paper.DATA_SETS] == list(COUNTS_TABLES)
    with pytest.raises(ValueError, match="chest3"):
        paper.data_set("chest3")


def test_only_means_in_the_text_contradict_the_tables():
    found = paper.inconsistencies()
    assert len(found) == 5
    assert all("in the text" in sentence for sentence in found)
    assert "Table 8: mean SEN (%) of CE+BST less that of CE is 7.64, 9.03 in the text" in found


@pytest.mark.parametrize(
    ("number", "row", "column", "cell", "words"),
    [
        (2, 0, 1, "1267", "Table 2, Training: classes sum to 5605, not 5604"),
        (9, 1, 3, "68", "Table 9, Viable Tumor: parts sum to 344, not 345"),
        (3, 0, 1, "92.71", "CE: accuracy 92.71 in Table 3, 92.70 in Table 4"),
        (6, 5, 2, "93.80", "SEN 93.80 is no share of 390 images"),
        (6, 5, 3, "81.30", "SPE 81.30 is no share of 234 images"),
        (8, 0, 4, "73.50", "ACC 73.50 is no share of 87 images"),
        (8, 0, 2, "69.44", "SEN and SPE make 65 right answers of 87, ACC 73.56 makes 64"),
        (4, 3, 2, "84.69", "no confusion matrix has SEN 84.69, SPE 96.53 and ACC 94.72 at once"),
        (10, 1, 3, "95.15", "no confusion matrix has SEN 88.17, SPE 95.15 and ACC 87.77 at once"),
    ],
)
def test_a_misprint_is_named(misprint, number, row, column, cell, words):
    misprint(number, row, column, cell)
    assert any(words in sentence for sentence in paper.inconsistencies())
