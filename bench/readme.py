"""`python -m bench.readme [--check]`: what the CSV files say, as text.

The README's performance section, which sets the devices side by side, and a page for each device.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import table, targets
from .cases import FORWARD, FORWARD_BACKWARD
from .figures import SWEEPS, milliseconds, step_shares
from .machine import ROOT
from .providers import COMPILED, MOMENT_PRODUCTS, PAIR_PRODUCTS
from .table import EAGER, GRAPH, RESULTS, Row
from .targets import Verdict

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
README = ROOT / "README.md"
_RULES = ROOT / "bench" / "README.md"
_PICTURES = {
    "time": "time against N: this package, the naive form, peers, and the products alone",
    "paper": "the paper's batches, N_b = 6 to 36",
    "memory": "peak extra memory against N",
    "roofline": "rate against intensity, under the machine's measured limits",
    "crossover": "the fastest path by N and D",
    "hinge": "time against the share of rows with h_i > 0",
    "training_step": "the loss's share of a training step",
}
_MINUS = "-"
_CONDITIONS = (
    "Medians, float32, forward and backward where nothing else is said; a row is written only "
    "after loss and gradient agreed with float64 ([rules]({rules}))."
)


def main(arguments: list[str] | None = None) -> int:
    """Write section and pages, or with --check say whether they are up to date (1: no)."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it differs")
    check = parser.parse_args(arguments).check
    try:
        texts = {README: replaced(README.read_text(encoding="utf-8"), section(RESULTS))}
    except ValueError as error:
        print(f"{README.name}: {error}", file=sys.stderr)
        return 1
    texts |= {folder / "README.md": page(folder) for folder in table.devices(RESULTS)}
    changed = [
        path
        for path in texts
        if not path.exists() or path.read_text(encoding="utf-8") != texts[path]
    ]
    for path in changed:
        if check:
            print(f"{path} differs from the results; run python -m bench.readme", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
    return int(check and bool(changed))


def replaced(text: str, new: str) -> str:
    """The text with what stands between the markers replaced. ValueError without both markers."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"it must have one line {START} and below it one line {END}")
    head, _, rest = text.partition(START)
    return f"{head}{START}\n{new}{END}{rest.partition(END)[2]}"


def section(results: Path) -> str:
    """Markdown: the targets and the paper's batch, a column for each device; one's picture."""
    devices = {folder: table.read_device(folder) for folder in table.devices(results)}
    if not devices:
        return "Nothing was measured yet: `make bench`.\n"
    conditions = _CONDITIONS.format(rules=_link(_RULES, README))
    lines = [f"{conditions} Each device has a page of tables and pictures.", ""]
    for folder, rows in devices.items():
        link = _link(folder / README.name, README)
        lines.append(f"- [{rows[0].device}]({link}): {_versions(rows)}{_incomplete(folder)}")
    lines.append("")
    for kind in ("cpu", "cuda"):
        of_kind = [rows for folder, rows in devices.items() if folder.name.startswith(kind)]
        lines += _verdict_table(of_kind)
        lines += _paper_table(of_kind)
    pictured = [folder for folder in devices if (folder / "time.png").exists()]
    if pictured:
        last = pictured[-1]
        caption = f"{devices[last][0].device}: {_PICTURES['time']}"
        lines += [f"![{caption}]({_link(last / 'time.png', README)})", ""]
    return "\n".join(lines)


def page(folder: Path) -> str:
    """Markdown: one device's tables and pictures; what has none is in the files beside it."""
    rows = table.read_device(folder)
    conditions = _CONDITIONS.format(rules=_link(_RULES, folder / README.name))
    files = ", ".join(f"[{path.stem}]({path.name})" for path in table.files(folder))
    about = f"{_versions(rows)}{_incomplete(folder)}. {conditions} All rows: {files}."
    lines = [f"# {rows[0].device}", "", about, ""]
    lines += _verdict_table([rows])
    lines += _provider_table(rows)
    lines += _sweep_table(rows)
    lines += _replay_table(rows)
    lines += _hinge_table(rows)
    lines += _step_lines(rows)
    for name, caption in _PICTURES.items():
        if (folder / f"{name}.png").exists():
            lines += [f"![{caption}]({name}.png)", ""]
    return "\n".join(lines)


def _link(to: Path, page: Path) -> str:
    return Path(os.path.relpath(to, page.parent)).as_posix()


def _versions(rows: Sequence[Row]) -> str:
    threads = max(row.threads for row in rows)
    versions = "; ".join(sorted({row.versions for row in rows}))
    commits = ", ".join(sorted({row.commit for row in rows}))
    return f"{threads} threads; {versions}; commit {commits}"


def _incomplete(folder: Path) -> str:
    """Of which suites only a part was measured."""
    names = table.incomplete(folder)
    return f"; **not complete: {', '.join(names)}**" if names else ""


def _verdict_table(devices: Sequence[Sequence[Row]]) -> list[str]:
    """The targets of one kind of device, and what each of these devices reached."""
    found = {rows[0].device: targets.verdicts(rows) for rows in devices}
    measured = {
        name: verdicts
        for name, verdicts in found.items()
        if any(v.figure is not None for v in verdicts)
    }
    if not measured:
        return []
    cells = (
        (
            of_all[0].work,
            of_all[0].claim,
            f"{'<=' if of_all[0].is_ceiling else '>='} {of_all[0].bound:g}",
            *map(_reached, of_all),
        )
        for of_all in zip(*measured.values(), strict=True)
    )
    return _table(("work", "figure", "target", *measured), cells)


def _reached(verdict: Verdict) -> str:
    if verdict.figure is None:
        return "not measured"
    return f"{verdict.figure:.3g}" if verdict.is_met else f"**{verdict.figure:.3g}: missed**"


def _paper_rows(rows: Sequence[Row]) -> list[Row]:
    """Every provider on the paper's batch; the compiled forms are of the targets' suite."""
    at = [row for row in rows if (row.suite, row.n, row.mode) == ("paper", 36, EAGER)]
    return at + [
        row
        for row in rows
        if (row.suite, row.group, row.mode) == ("targets", COMPILED, EAGER)
        and (row.n, row.d, row.c) == (36, at[0].d if at else 0, 3)
    ]


def _paper_title(row: Row) -> str:
    return f"The paper's batch, N_b = 36, D = {row.d:,}, C = {row.c}"


def _paper_table(devices: Sequence[Sequence[Row]]) -> list[str]:
    """Time of every provider on the paper's batch, a column for each device that ran it."""
    of_devices = [at for at in map(_paper_rows, devices) if at]
    if not of_devices:
        return []
    times = [
        {row.provider: row for row in at if row.operation == FORWARD_BACKWARD} for at in of_devices
    ]
    names = dict.fromkeys(name for found in times for name in found)
    cells = ((name, *(_time(found.get(name)) for found in times)) for name in names)
    header = ("", *(at[0].device for at in of_devices))
    return [f"{_paper_title(of_devices[0][0])}, forward and backward:", "", *_table(header, cells)]


def _provider_table(rows: Sequence[Row]) -> list[str]:
    """Every provider on the paper's batch: times, spread, memory."""
    at = _paper_rows(rows)
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
    header = ("", "forward", "forward and backward", "20 to 80 %", "peak extra memory")
    return [f"{_paper_title(at[0])}:", "", *_table(header, cells)]


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


def _replay_table(rows: Sequence[Row]) -> list[str]:
    """Ours and what stands beside it on a GPU, each as a loop calls it and in a CUDA graph."""
    at = [row for row in rows if row.suite == "targets" and row.group != COMPILED]
    if not any(row.mode == GRAPH for row in at):
        return []
    cells = []
    for n, d, c, dtype in dict.fromkeys((row.n, row.d, row.c, row.dtype) for row in at):
        here = {
            (row.provider, row.mode): row
            for row in at
            if (row.n, row.d, row.c, row.dtype) == (n, d, c, dtype)
        }
        auto = here.get(("auto", GRAPH))
        cells.append((
            f"{n:,} x {d:,}, C = {c:,}{'' if dtype == 'float32' else f', {dtype}'}",
            auto.path if auto else _MINUS, _time(auto), _time(here.get(("auto", EAGER))),
            _time(here.get(("naive", EAGER))), _time(here.get(("eager", GRAPH))),
            _time(here.get((PAIR_PRODUCTS, GRAPH))), _time(here.get((MOMENT_PRODUCTS, GRAPH))),
            _size(auto),
        ))  # fmt: skip
    header = (
        *("work", "path", "auto, graph replay", "auto, eager", "naive, eager"),
        *("eager torch, graph replay", "products of pairs alone", "products of moments alone"),
        "auto: peak extra memory",
    )
    return ["As a training loop calls it, and in a CUDA graph:", "", *_table(header, cells)]


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
