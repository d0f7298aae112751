"""`python -m bench.calibrate [FOLDER ...]`: the plan's constants, from measured rows.

The model of a path on a kind of device is seconds = call + flops / rate + bytes / bandwidth, with
the path's own counts. The three constants minimise the relative error over the rows of the folders
(default: all of bench/results, one folder a kind of device).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from . import table
from .cases import FORWARD_BACKWARD
from .machine import ROOT
from .providers import OURS
from .table import EAGER, Row

TARGET = ROOT / "bstriplet_kernels" / "calibration.py"
_SUITES = ("targets", "paper", "sweep", "classes", "crossover")
_FEWEST_ROWS = 6


class Constants(NamedTuple):
    """Seconds a call, a FLOP and a byte."""

    call: float
    flop: float
    byte: float


class Fit(NamedTuple):
    """Constants, the rows that they come from, and how far off they are (median, worst factor)."""

    constants: Constants
    rows: int
    median: float
    worst: float


def main(arguments: list[str] | None = None) -> int:
    """Fit, print how well, and write the module that the plan reads."""
    parser = argparse.ArgumentParser(prog="python -m bench.calibrate", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="default: all of bench/results")
    folders = parser.parse_args(arguments).folders or list(table.devices())
    fits: dict[str, tuple[Row, dict[str, Fit]]] = {}
    for folder in folders:
        kind = folder.name.split("-")[0]
        if kind in fits:
            parser.error(f"{folder} is a second device of kind {kind}; name the one to use")
        rows = usable(table.read_device(folder))
        if rows:
            fits[kind] = (rows[0], fit_paths(rows))
    if not fits:
        parser.error("no measured rows were found; run python -m bench.run first")
    for kind, (_, paths) in fits.items():
        for path, found in paths.items():
            print(
                f"{kind} {path}: {found.constants.call * 1e6:.1f} µs a call, "
                f"{_inverse(found.constants.flop) / 1e9:.1f} GFLOP/s, "
                f"{_inverse(found.constants.byte) / 1e9:.1f} GB/s; {found.rows} rows, "
                f"off by a factor of {found.median:.2f} (median), {found.worst:.2f} (worst)"
            )
    draft = TARGET.with_suffix(".part")
    draft.write_text(module(fits))
    draft.replace(TARGET)
    print(TARGET.relative_to(ROOT))
    return 0


def usable(rows: Iterable[Row]) -> list[Row]:
    """Rows of single paths of ours, float32, all threads, with counts."""
    rows = [row for row in rows if row.suite in _SUITES and row.group == OURS and row.is_measured]
    threads = max((row.threads for row in rows), default=0)
    return [
        row
        for row in rows
        if row.provider != "auto"
        and row.mode == EAGER
        and (row.operation, row.dtype, row.threads) == (FORWARD_BACKWARD, "float32", threads)
        and row.flops is not None
        and row.bytes is not None
    ]


def fit_paths(rows: Sequence[Row]) -> dict[str, Fit]:
    """A fit for every path with rows enough."""
    found = {}
    for path in dict.fromkeys(row.provider for row in rows):
        own = [row for row in rows if row.provider == path]
        if len(own) >= _FEWEST_ROWS:
            found[path] = fit(own)
    return found


def fit(rows: Sequence[Row]) -> Fit:
    """Non-negative constants with the least squared relative error."""
    seconds = np.array([row.ms * 1e-3 for row in rows])
    counts = np.array([(1.0, float(row.flops or 0), float(row.bytes or 0)) for row in rows])
    scale = counts.max(axis=0)
    solution, _ = nnls(counts / scale / seconds[:, None], np.ones(len(rows)))
    predicted = counts / scale @ solution
    factor = np.exp(np.abs(np.log(np.maximum(predicted, 1e-12) / seconds)))
    constants = Constants(*(solution / scale).tolist())
    return Fit(constants, len(rows), float(np.median(factor)), float(factor.max()))


def module(fits: dict[str, tuple[Row, dict[str, Fit]]]) -> str:
    """The text of `bstriplet_kernels.calibration`."""
    lines = [
        '"""Measured speed of each path by kind of device. Written by `python -m bench.calibrate`.',
        "",
        "Seconds of forward and backward in float32 are call + flop * FLOPs + byte * bytes.",
        '"""',
        "",
        "from typing import NamedTuple",
        "",
        "",
        "class Constants(NamedTuple):",
        '    """Seconds a call, a FLOP and a byte."""',
        "",
        "    call: float",
        "    flop: float",
        "    byte: float",
        "",
        "",
        "CONSTANTS: dict[str, dict[str, Constants]] = {",
    ]
    for kind, (row, paths) in fits.items():
        lines += [f'    "{kind}": {{  # {row.device}, {row.threads} threads, {row.commit}']
        for path, found in paths.items():
            numbers = ", ".join(f"{value:.3e}" for value in found.constants)
            lines.append(f'        "{path}": Constants({numbers}),')
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def _inverse(seconds: float) -> float:
    return 1 / seconds if seconds else float("inf")


if __name__ == "__main__":
    sys.exit(main())
