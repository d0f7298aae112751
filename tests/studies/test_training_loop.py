"""The table of training loops in studies/README.md is the committed files'."""

import csv
from pathlib import Path

from studies.training_loop import RESULTS

README = Path(__file__).resolve().parents[2] / "studies" / "README.md"


def test_the_readmes_table_is_that_of_the_files():
    lines = README.read_text().splitlines()
    head = next(line for line in lines if line.startswith("| device | backbone | pixels |"))
    loops = head.strip("| ").split(" | ")[3:]
    expected = []
    for path in sorted(RESULTS.glob("*.csv")):
        rates = {}
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = row["device"], row["backbone"], row["image_size"]
                of_backbone = rates.setdefault(key, {})
                of_backbone[row["loop"]] = f"{float(row['p50_images_s']):,.0f}"
        for key, found in rates.items():
            cells = [*key, *(found.pop(loop, "-") for loop in loops)]
            expected.append("| " + " | ".join(cells) + " |")
            assert not found
    start = lines.index(head) + 2
    assert lines[start : start + len(expected) + 1] == [*expected, ""]
