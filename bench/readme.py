"""`python -m bench.readme [--check]`: the README's performance section, from the CSV files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import table, targets
from .cases import FORWARD, FORWARD_BACKWARD
from .figures import SWEEPS, milliseconds, step_shares
from .machine import ROOT
from .providers import COMPILED
from .table import EAGER, RESULTS, Row
from .targets import Verdict

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
README = ROOT / "README.md"
_PICTURES = (
    ("time", "time against N: this package, the naive form, peers, and the products alone"),
    ("memory", "peak extra memory against N"),
    ("roofline", "rate against intensity, under the machine's measured limits"),
    ("crossover", "the fastest path by N and D"),
    ("hinge", "time against the share of rows with h_i > 0"),
    ("training_step", "the loss's share of a training step"),
)
_MINUS = "-"


def main(arguments: list[str] | None = None) -> int:
    """Write the section, or with --check say whether it is up to date (1: it is not)."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it differs")
    check = parser.parse_args(arguments).check
    old = README.read_text()
    try:
        new = replaced(old, section(RESULTS))
    except ValueError as error:
        print(f"{README.name}: {error}", file=sys.stderr)
        return 1
    if check:
        if old != new:
            print(f"{README.name} differs from bench/results; run python -m bench.readme",
                  file=sys.stderr)  # fmt: skip
        return int(old != new)
    README.write_text(new)
    return 0


def replaced(text: str, new: str) -> str:
    """The text with what stands between the markers replaced. ValueError without both markers."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"it must have one line {START} and below it one line {END}")
    head, _, rest = text.partition(START)
    return f"{head}{START}\n{new}{END}{rest.partition(END)[2]}"


def section(results: Path) -> str:
    """Markdown for every device that was measured."""
    parts = [_device(folder) for folder in table.devices(results)]
    return "\n".join(parts) if parts else "Nothing was measured yet: `make bench`.\n"


def _device(folder: Path) -> str:
    rows = table.read_device(folder)
    commits = ", ".join(sorted({row.commit for row in rows}))
    threads = max(row.threads for row in rows)
    where = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.name
    lines = [
        f"Measured on {rows[0].device} ({threads} threads; {rows[0].versions}), commit {commits}; "
        f"files in [`{where}`]({where}), rules in [`bench/README.md`](bench/README.md). Medians, "
        "float32, forward and backward where nothing else is said; a row is written only after "
        "loss and gradient agreed with float64.",
        "",
    ]
    lines += _verdict_table(targets.verdicts(rows))
    lines += _paper_table(rows)
    lines += _sweep_table(rows)
    lines += _hinge_table(rows)
    lines += _step_lines(rows)
    for name, caption in _PICTURES:
        if (folder / f"{name}.png").exists():
            lines += [f"![{caption}]({where}/{name}.png)", ""]
    return "\n".join(lines)


def _verdict_table(verdicts: Sequence[Verdict]) -> list[str]:
    if not any(verdict.figure is not None for verdict in verdicts):
        return []
    cells = (
        (
            v.work,
            v.claim,
            f"{'<=' if v.is_ceiling else '>='} {v.bound:g}",
            _MINUS if v.figure is None else f"{v.figure:.3g}",
            {True: "yes", False: "**no**", None: "not measured"}[v.is_met],
        )
        for v in verdicts
    )
    return _table(("work", "figure", "target", "measured", "met"), cells)


def _paper_table(rows: Sequence[Row]) -> list[str]:
    """Every provider on the paper's batch."""
    at = [row for row in rows if (row.suite, row.n, row.mode) == ("paper", 36, EAGER)]
    at += [
        row
        for row in rows
        if (row.suite, row.group, row.mode) == ("targets", COMPILED, EAGER)
        and (row.n, row.d, row.c) == (36, at[0].d if at else 0, 3)
    ]
    if not at:
        return []
    found: dict[str, dict[str, Row]] = {}
    for row in at:
        found.setdefault(row.provider, {})[row.operation] = row
    cells = (
        (
            name,
            _time(of.get(FORWARD)),
            _time(of.get(FORWARD_BACKWARD)),
            _spread(of.get(FORWARD_BACKWARD)),
            _size(of.get(FORWARD_BACKWARD)),
        )
        for name, of in found.items()
    )
    title = f"The paper's batch, N_b = 36, D = {at[0].d:,}, C = {at[0].c}:"
    header = ("", "forward", "forward and backward", "20 to 80 %", "peak extra memory")
    return [title, "", *_table(header, cells)]


def _sweep_table(rows: Sequence[Row]) -> list[str]:
    """Ours, the naive form and the fastest peer by N."""
    at = [row for row in rows if row.suite in SWEEPS and row.mode == EAGER
          and row.operation == FORWARD_BACKWARD]  # fmt: skip
    lines = []
    for d in sorted({row.d for row in at}):
        cells = []
        for n in sorted({row.n for row in at if row.d == d}):
            here = {row.provider: row for row in at if (row.n, row.d) == (n, d)}
            auto = here.get("auto")
            peers = [row for row in here.values() if row.group == "peer" and row.is_measured]
            best = min(peers, key=lambda row: row.ms) if peers else None
            cells.append((
                f"{n:,}", _time(auto), auto.path if auto else _MINUS, _time(here.get("naive")),
                _time(here.get("eager")),
                f"{_time(best)} ({best.provider})" if best else _MINUS, _size(auto),
            ))  # fmt: skip
        header = ("N", "auto", "path", "naive", "eager", "fastest peer", "auto: peak extra memory")
        lines += [f"D = {d:,}, ten classes:", "", *_table(header, cells)]
    return lines


def _hinge_table(rows: Sequence[Row]) -> list[str]:
    """Time by the share of active rows, as a multiple of the time where all are active."""
    at = [row for row in rows if row.suite == "hinge" and row.is_measured and row.mode == EAGER
          and row.operation == FORWARD_BACKWARD]  # fmt: skip
    if not at:
        return []
    shares = sorted({row.active for row in at if row.active is not None})
    cells = []
    for n, d in sorted({(row.n, row.d) for row in at}):
        for name in dict.fromkeys(row.provider for row in at):
            ms = {row.active: row.ms for row in at if (row.n, row.d, row.provider) == (n, d, name)}
            if 1.0 in ms:
                cells.append((
                    f"{n:,} x {d:,}", name, milliseconds(ms[1.0]),
                    *(f"{ms[share] / ms[1.0]:.2f}" if share in ms else _MINUS
                      for share in shares if share < 1),
                ))  # fmt: skip
    title = "Late in training, when few rows have h_i > 0: time over that with all rows active."
    header = ("N x D", "path", "all active", *(f"{share:.1%}" for share in shares if share < 1))
    return [title, "", *_table(header, cells)]


def _step_lines(rows: Sequence[Row]) -> list[str]:
    """The loss's share of a training step."""
    shares = step_shares(rows)
    cells = ((name, f"{ours:.2%}", f"{naive:.2%}") for name, ours, naive in shares)
    header = ("share of a training step, N_b = 36", "this package", "naive form")
    return _table(header, cells) if shares else []


def _table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _time(row: Row | None) -> str:
    """Three digits, or why there are none."""
    if row is None:
        return _MINUS
    return milliseconds(row.ms) if row.is_measured else row.status


def _spread(row: Row | None) -> str:
    if row is None or row.p20_ms is None or row.p80_ms is None:
        return _MINUS
    return f"{milliseconds(row.p20_ms)} to {milliseconds(row.p80_ms)}"


def _size(row: Row | None) -> str:
    if row is None or row.peak_bytes is None:
        return _MINUS
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if row.peak_bytes >= scale:
            return f"{row.peak_bytes / scale:.3g} {unit}"
    return f"{row.peak_bytes / 2**10:.3g} KiB"


if __name__ == "__main__":
    sys.exit(main())
