"""`python -m bench.readme [--check]`: what the CSV files say, as text.

The README's section, `bench/TARGETS.md` with the devices side by side, and each device's page.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import table, targets
from .cases import FORWARD, FORWARD_BACKWARD, TRAINING_STEP
from .machine import ROOT
from .measure import OUT_OF_MEMORY
from .providers import COMPILED, EMPTY, LIGER, MOMENT_PRODUCTS, PAIR_PRODUCTS, shown
from .steps import CE
from .table import EAGER, GRAPH, RESULTS, SWEEPS, Row, milliseconds, where
from .targets import Verdict

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
README = ROOT / "README.md"
TARGETS = ROOT / "bench" / "TARGETS.md"
_RULES = ROOT / "bench" / "README.md"
_PICTURES = {
    "time": "time against N: this package, the naive form, peers, and the products alone",
    "paper": "the paper's batches, N_b = 6 to 36",
    "memory": "peak extra memory against N",
    "roofline": "rate against intensity, under the machine's measured limits",
    "crossover": "the fastest path by N and D",
}
_LEGEND = {
    EMPTY: "a torch.autograd.Function that computes nothing and allocates the gradient",
    PAIR_PRODUCTS: "the matrix products of a form with an N x N matrix, timed alone",
    MOMENT_PRODUCTS: "the matrix products of second moments, timed alone",
    "naive": "Eqs. 1-4 as the paper prints them, in torch",
    "eager": "the same loss written well in torch, with masks of N x N",
    "compiled naive": "`torch.compile` of naive",
    "compiled eager": "`torch.compile` of eager",
    "pml contrastive": "pytorch-metric-learning's ContrastiveLoss",
    "pml SupCon": "pytorch-metric-learning's SupConLoss",
    "pml lifted": "pytorch-metric-learning's GeneralizedLiftedStructureLoss",
    "pml triplet": "pytorch-metric-learning's TripletMarginLoss",
    "tiled SupCon": "a supervised contrastive loss in panels of rows, written for this comparison",
    LIGER: "built here; Liger has no InfoNCE of its own",
    "reference": "this package in plain torch",
    "triton": "this package in Triton, over pairs of rows",
    "native": "this package in C++ and CUDA",
    "gram": "this package by second moments, in time linear in N",
    "auto": "the fastest of this package's forms, as it predicts; the default",
}
"""What the names in the tables mean, in the order of the tables."""
_NONE = "-"
_LONGEST_STATUS = 40
_SIZES = (
    (36, 1280, 3), (1024, 128, 3), (4096, 128, 3), (16384, 128, 10), (1 << 20, 128, 10)
)  # fmt: skip
"""(N, D, C) of the README's table, from the paper's batch to a million rows."""
_CONDITIONS = (
    "Medians, float32, forward and backward where nothing else is said; a row is written only "
    "after loss and gradient agreed with float64 ([rules]({rules}))."
)


def main(arguments: list[str] | None = None) -> int:
    """Write section, targets and pages, or with --check say whether they are up to date (1: no)."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if it differs")
    check = parser.parse_args(arguments).check
    try:
        texts = {README: replaced(README.read_text(encoding="utf-8"), section(RESULTS))}
    except ValueError as error:
        print(f"{README.name}: {error}", file=sys.stderr)
        return 1
    texts[TARGETS] = targets_page(RESULTS)
    texts |= {folder / "README.md": page(folder) for folder in table.devices(RESULTS)}
    stale = [path for path in texts if not path.exists() or path.read_text("utf-8") != texts[path]]
    for path in stale:
        if check:
            print(f"{path} differs from the results; run python -m bench.readme", file=sys.stderr)
        else:
            path.write_text(texts[path], encoding="utf-8")
    return int(check and bool(stale))


def replaced(text: str, new: str) -> str:
    """The text with what stands between the markers replaced. ValueError without both markers."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"it must have one line {START} and below it one line {END}")
    head, _, rest = text.partition(START)
    return f"{head}{START}\n{new}{END}{rest.partition(END)[2]}"


def section(results: Path) -> str:
    """Markdown of the README: five sizes, a picture, and the loss's share of a training step.

    The first device fills the table; every GPU adds its times.
    """
    devices = {folder: table.read_device(folder) for folder in table.devices(results)}
    if not devices:
        return "Nothing was measured yet: `make bench`.\n"
    (folder, rows), *others = devices.items()
    gpus = [of_gpu for other, of_gpu in others if other.name.startswith("cuda")]
    columns = [
        ("this package", rows, "auto", _time),
        ("naive", rows, "naive", _time),
        ("`torch.compile`", rows, "compiled naive", _time),
        ("memory", rows, "auto", _size),
        ("memory, naive", rows, "naive", _size),
    ]
    for of_gpu in gpus:
        name = _short(of_gpu)
        columns += [(name, of_gpu, "auto", _time), (f"{name}, naive", of_gpu, "naive", _time)]
    header = ("N, D, C", *(what for what, *_ in columns))
    cells = (
        (", ".join(f"{number:,}" for number in size), *(_at(size, *rest) for _, *rest in columns))
        for size in _SIZES
    )
    lines = [
        f"The loss forward and backward in float32, as a training loop calls it, on "
        f"{rows[0].device}{_on_gpus(gpus)}. *Naive* is Eqs. 1-4 in plain torch, `torch.compile` is "
        f"of that. Times are medians; a time is "
        f"written only after the loss and its gradient agreed with float64 "
        f"([how it is measured]({_link(_RULES, README)}), "
        f"[all devices and targets]({_link(TARGETS, README)})).",
        "",
        *_table(header, cells),
        "N is the batch, D the embedding's length, C the number of classes. *Memory* is the peak "
        "that a call needs beyond its inputs, results included. `-` was not measured.",
        "",
    ]
    lines += _shares(devices.values())
    if (folder / "time.png").exists():
        caption = f"{rows[0].device}: {_PICTURES['time']}"
        lines += [f"![{caption}]({_link(folder / 'time.png', README)})", ""]
    return "\n".join(lines)


def targets_page(results: Path) -> str:
    """Markdown of TARGETS.md: the devices, and what each reached of the targets of its kind."""
    devices = {folder: table.read_device(folder) for folder in table.devices(results)}
    conditions = _CONDITIONS.format(rules=_link(_RULES, TARGETS))
    lines = ["# Targets", "", f"{conditions} `python -m bench.readme` writes this file.", ""]
    for folder, rows in devices.items():
        link = _link(folder / README.name, TARGETS)
        lines.append(f"- [{rows[0].device}]({link}): {_versions(rows)}{_incomplete(folder)}")
    lines.append("")
    for kind in ("cpu", "cuda"):
        lines += _verdict_table(
            [rows for folder, rows in devices.items() if folder.name.startswith(kind)]
        )
    return "\n".join([*lines, *_legend((EMPTY, PAIR_PRODUCTS, MOMENT_PRODUCTS, "naive", "auto"))])


def page(folder: Path) -> str:
    """Markdown of one device's page: its tables and pictures, with links to the files."""
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
    lines += _step_table(rows)
    for name, caption in _PICTURES.items():
        if (folder / f"{name}.png").exists():
            lines += [f"![{caption}]({name}.png)", ""]
    return "\n".join(lines)


def _on_gpus(gpus: Sequence[Sequence[Row]]) -> str:
    return f", and in the last columns on {' and '.join(map(_short, gpus))}" if gpus else ""


def _link(to: Path, page: Path) -> str:
    return Path(os.path.relpath(to, page.parent)).as_posix()


def _short(rows: Sequence[Row]) -> str:
    """The device's name up to the first bracket."""
    return rows[0].device.partition(" (")[0]


def _versions(rows: Sequence[Row]) -> str:
    threads = max(row.threads for row in rows)
    versions = "; ".join(sorted({row.versions for row in rows}))
    commits = ", ".join(sorted({row.commit for row in rows}))
    return f"{threads} threads; {versions}; commit {commits}"


def _incomplete(folder: Path) -> str:
    """The suites that were measured in part."""
    names = table.incomplete(folder)
    return f"; **not complete: {', '.join(names)}**" if names else ""


def _verdict_table(devices: Sequence[Sequence[Row]]) -> list[str]:
    """The targets of one kind of device, and what each of these devices reached."""
    found = {rows[0].device: targets.verdicts(rows) for rows in devices}
    found = {name: of for name, of in found.items() if any(v.figure is not None for v in of)}
    cells = [
        (
            of_all[0].work,
            of_all[0].claim,
            f"{'<=' if of_all[0].is_ceiling else '>='} {of_all[0].bound:g}",
            *map(_reached, of_all),
        )
        for of_all in zip(*found.values(), strict=True)
    ]
    return _table(("work", "figure", "target", *found), cells) if found else []


def _reached(verdict: Verdict) -> str:
    if verdict.figure is None:
        return "not measured"
    return f"{verdict.figure:.3g}" if verdict.is_met else f"**{verdict.figure:.3g}: missed**"


def _provider_table(rows: Sequence[Row]) -> list[str]:
    """Every provider on the paper's batch; the compiled forms are of the suite `targets`."""
    at = where(rows, suite="paper", n=36, mode=EAGER)
    if not at:
        return []
    size = {"n": 36, "d": at[0].d, "c": 3}
    at += where(rows, suite="targets", group=COMPILED, mode=EAGER, **size)
    forward, both = (
        {row.provider: row for row in where(at, operation=operation)}
        for operation in (FORWARD, FORWARD_BACKWARD)
    )
    names = list(dict.fromkeys(row.provider for row in at))
    cells = (
        (shown(n), _time(forward.get(n)), *(show(both.get(n)) for show in (_time, _spread, _size)))
        for n in names
    )
    header = ("", "forward", "forward and backward", "20 to 80 %", "peak extra memory")
    title = f"The paper's batch, N_b = 36, D = {at[0].d:,}, C = 3:"
    return [title, "", *_table(header, cells), *_legend(names)]


def _sweep_table(rows: Sequence[Row]) -> list[str]:
    """Ours, the naive form and the fastest peer by N."""
    at = [row for suite in SWEEPS for row in where(rows, suite=suite, mode=EAGER,
          operation=FORWARD_BACKWARD)]  # fmt: skip
    lines = []
    for d in sorted({row.d for row in at}):
        cells = []
        for n in sorted({row.n for row in where(at, d=d)}):
            here = {row.provider: row for row in where(at, n=n, d=d)}
            auto = here.get("auto")
            peers = [row for row in here.values() if row.group == "peer" and row.is_measured]
            best = min(peers, key=lambda row: row.ms) if peers else None
            cells.append((
                f"{n:,}", _time(auto), auto.path if auto else _NONE, _time(here.get("naive")),
                _time(here.get("eager")),
                f"{_time(best)} ({shown(best.provider)})" if best else _NONE, _size(auto),
            ))  # fmt: skip
        header = ("N", "auto", "path", "naive", "eager", "fastest peer", "auto: peak extra memory")
        lines += [f"D = {d:,}, ten classes:", "", *_table(header, cells)]
    return lines


def _replay_table(rows: Sequence[Row]) -> list[str]:
    """Ours, baselines and floors on a GPU, as a training loop calls them and in a CUDA graph."""
    at = [row for row in where(rows, suite="targets") if row.group != COMPILED]
    if not where(at, mode=GRAPH):
        return []
    columns = (
        ("auto", GRAPH), ("auto", EAGER), ("naive", EAGER), ("eager", GRAPH),
        (PAIR_PRODUCTS, GRAPH), (MOMENT_PRODUCTS, GRAPH),
    )  # fmt: skip
    cells = []
    for n, d, c, dtype in dict.fromkeys((row.n, row.d, row.c, row.dtype) for row in at):
        here = where(at, n=n, d=d, c=c, dtype=dtype)
        found = {(row.provider, row.mode): row for row in here}
        auto = found.get(columns[0])
        cells.append((
            f"{n:,} x {d:,}, C = {c:,}{'' if dtype == 'float32' else f', {dtype}'}",
            auto.path if auto else _NONE, *(_time(found.get(column)) for column in columns),
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
    at = where(rows, suite="hinge", mode=EAGER, operation=FORWARD_BACKWARD, is_measured=True)
    if not at:
        return []
    *shares, _ = sorted({row.active for row in at if row.active is not None})
    cells = []
    for n, d in sorted({(row.n, row.d) for row in at}):
        for name in dict.fromkeys(row.provider for row in at):
            ms = {row.active: row.ms for row in where(at, n=n, d=d, provider=name)}
            if 1.0 in ms:
                ratios = (f"{ms[s] / ms[1.0]:.2f}" if s in ms else _NONE for s in shares)
                cells.append((f"{n:,} x {d:,}", name, milliseconds(ms[1.0]), *ratios))
    title = "Late in training, when few rows have h_i > 0: time over that with all rows active."
    header = ("N x D", "path", "all active", *(f"{share:.1%}" for share in shares))
    return [title, "", *_table(header, cells)]


def _step_table(rows: Sequence[Row]) -> list[str]:
    """The loss's share of a training step."""
    shares = step_shares(rows)
    cells = ((name, f"{ours:.2%}", f"{naive:.2%}") for name, ours, naive in shares)
    header = ("share of a training step, N_b = 36", "this package", "naive form")
    return _table(header, cells) if shares else []


def _shares(devices: Iterable[Sequence[Row]]) -> list[str]:
    """A sentence on the loss's share of a training step, on each device where it was measured."""
    found = {rows[0].device: shares for rows in devices if (shares := step_shares(rows))}
    if not found:
        return []
    ranges, most_naive = [], 0.0
    for device, shares in found.items():
        (least, low, _), *_, (most, high, _) = sorted(shares, key=lambda share: share[1])
        ranges.append(
            f"{100 * low:.2f} % (`{least}`) to {100 * high:.2f} % (`{most}`) on the {device}"
        )
        most_naive = max(most_naive, *(naive for *_, naive in shares))
    return [
        f"The loss's share of a training step on 36 images is {', and '.join(ranges)}; "
        f"the naive form's is up to {100 * most_naive:.2f} %.",
        "",
    ]


def step_shares(rows: Iterable[Row]) -> list[tuple[str, float, float]]:
    """(backbone, our loss / step, naive loss / step), each loss timed alone on the same D.

    Timed alone, because the difference of two steps is smaller than either's scatter.
    """
    rows = where(rows, suite="training_step", mode=EAGER, is_measured=True)
    shares = []
    for step in where(rows, operation=TRAINING_STEP, provider=CE):
        alone = {row.provider: row.ms for row in where(rows, backbone="", d=step.d)}
        if {"auto", "naive"} <= alone.keys():
            ours, naive = (alone[name] / (step.ms + alone[name]) for name in ("auto", "naive"))
            shares.append((step.backbone, ours, naive))
    return shares


def _legend(names: Iterable[str]) -> list[str]:
    """A line for each name that needs an explanation."""
    known = [name for name in _LEGEND if name in set(names)]
    return [*(f"- {shown(name)}: {_LEGEND[name]}" for name in known), ""]


def _table(header: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _at(
    size: tuple[int, int, int],
    rows: Sequence[Row],
    provider: str,
    show: Callable[[Row | None], str],
) -> str:
    """A cell of the README's table: a figure, or why there is none."""
    n, d, c = size
    at = where(rows, provider=provider, mode=EAGER, operation=FORWARD_BACKWARD, n=n, d=d, c=c)
    at = [row for row in at if row.suite in targets.SUITES and row.dtype == "float32"]
    if measured := where(at, is_measured=True):
        return show(measured[0])
    return "does not fit" if any(OUT_OF_MEMORY in row.status for row in at) else _NONE


def _time(row: Row | None) -> str:
    """The time in three digits, or why there is none."""
    if row is None:
        return _NONE
    if row.is_measured:
        return milliseconds(row.ms)
    is_long = len(row.status) > _LONGEST_STATUS  # the message of an exception, which the file has
    return row.status.partition(":")[0] if is_long else row.status


def _spread(row: Row | None) -> str:
    if row is None or row.p20_ms is None or row.p80_ms is None:
        return _NONE
    return f"{milliseconds(row.p20_ms)} to {milliseconds(row.p80_ms)}"


def _size(row: Row | None) -> str:
    if row is None or row.peak_bytes is None:
        return _NONE
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if row.peak_bytes >= scale:
            return f"{row.peak_bytes / scale:.3g} {unit}"
    return f"{row.peak_bytes / 2**10:.3g} KiB"


if __name__ == "__main__":
    sys.exit(main())
