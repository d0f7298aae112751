"""`python -m bench.calibrate [FOLDER ...]`: the plan's constants, from measured rows.

The model is seconds = call + flops / rate + bytes / bandwidth + launch * launches, with a path's
own counts. The constants minimise the relative error over the eager rows of the folders (default:
all of bench/results, one folder a kind of device). bench/README.md says which rows and why.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from bstriplet_kernels.calibration import CONSTANTS
from bstriplet_kernels.cost import Constants

from . import table
from .cases import FORWARD_BACKWARD
from .machine import ROOT
from .providers import FORM, OURS, SCHEDULE
from .table import EAGER, Row, where

TARGET = ROOT / "bstriplet_kernels" / "calibration.py"
_SUITES = ("targets", "paper", "sweep", "classes", "crossover", "linear")
_FEWEST_ROWS = 6
_HALF = ("bfloat16", "float16")


class Fit(NamedTuple):
    """Constants, the number of rows behind them, and their error as a factor (median, worst)."""

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
    for kind in CONSTANTS:
        if kind not in fits:
            parser.error(f"the constants of {kind} would be lost; name a folder of that kind too")
    for kind, (_, paths) in fits.items():
        for path, found in paths.items():
            print(
                f"{kind} {path}: {_speeds(found.constants)}; {found.rows} rows, "
                f"off by a factor of {found.median:.2f} (median), {found.worst:.2f} (worst)"
            )
    draft = TARGET.with_suffix(".part")
    draft.write_text(module(fits))
    draft.replace(TARGET)
    print(TARGET.relative_to(ROOT))
    return 0


def usable(rows: Iterable[Row]) -> list[Row]:
    """Rows of single paths of ours, eager, all threads, with counts; half precision on a GPU."""
    rows = [
        row
        for row in where(rows, mode=EAGER, operation=FORWARD_BACKWARD, is_measured=True)
        if row.suite in _SUITES and row.group in (OURS, SCHEDULE, FORM) and row.provider != "auto"
    ]
    threads = max((row.threads for row in rows), default=0)
    return [
        row
        for row in where(rows, threads=threads)
        if (row.dtype == "float32" or (row.launches and row.dtype in _HALF))
        and row.flops is not None
        and row.bytes is not None
    ]


def fit_paths(rows: Sequence[Row]) -> dict[str, Fit]:
    """A fit for every path or schedule with enough rows."""
    found = {}
    for path in dict.fromkeys(row.path for row in rows):
        own = [row for row in rows if row.path == path and row.dtype not in _HALF]
        half = [row for row in rows if row.path == path and row.dtype in _HALF]
        if 0 < len(half) < _FEWEST_ROWS:
            print(f"{path}: {len(half)} rows in half precision, too few: predicted as float32")
        if len(own) >= _FEWEST_ROWS:
            found[path] = fit(own + half if len(half) >= _FEWEST_ROWS else own)
        else:
            print(f"{path}: {len(own)} rows in float32, too few: assumed to be slow there")
    return found


def fit(rows: Sequence[Row]) -> Fit:
    """Non-negative constants with the least squared relative error.

    Where all rows have equally many launches, these are part of the call.
    """
    seconds = np.array([row.ms * 1e-3 for row in rows])
    is_half = np.array([row.dtype in _HALF for row in rows])
    flops = np.array([float(row.flops or 0) for row in rows])
    launches = np.array([float(row.launches or 0) for row in rows])
    counts = {
        "call": np.ones(len(rows)),
        "flop": np.where(is_half, 0.0, flops),
        "byte": np.array([float(row.bytes or 0) for row in rows]),
    }
    if len(set(launches)) > 1:
        counts["launch"] = launches
    if is_half.any():
        counts["half"] = np.where(is_half, flops, 0.0)
    columns = np.stack(list(counts.values()), axis=1)
    scale = columns.max(axis=0)
    solution, _ = nnls(columns / scale / seconds[:, None], np.ones(len(rows)))
    predicted = columns / scale @ solution
    factor = np.exp(np.abs(np.log(np.maximum(predicted, 1e-12) / seconds)))
    constants = Constants(**dict(zip(counts, (solution / scale).tolist(), strict=True)))
    return Fit(constants, len(rows), float(np.median(factor)), float(factor.max()))


def module(fits: dict[str, tuple[Row, dict[str, Fit]]]) -> str:
    """The text of `bstriplet_kernels.calibration`."""
    lines = [
        '"""Measured speed of each path by kind of device. Written by `python -m bench.calibrate`.',
        "",
        "Of forward and backward, eager, in float32 and, on a GPU, in half precision.",
        '"""',
        "",
        "from .cost import Constants",
        "",
        "CONSTANTS: dict[str, dict[str, Constants]] = {",
    ]
    for kind, (row, paths) in fits.items():
        lines += [f'    "{kind}": {{  # {row.device}, {row.threads} threads, {row.commit}']
        for path, found in paths.items():
            lines.append(f'        "{path}": Constants({_numbers(found.constants)}),')
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def _numbers(constants: Constants) -> str:
    """Arguments of `Constants`; those that only a GPU has by name."""
    call, flop, byte, launch, half = constants
    numbers = [f"{value:.3e}" for value in (call, flop, byte)]
    numbers += [f"launch={launch:.3e}"] if launch else []
    numbers += [] if half is None else [f"half={half:.3e}"]
    return ", ".join(numbers)


def _speeds(constants: Constants) -> str:
    """The constants as rates; those that only a GPU has where there are some."""
    call, flop, byte, launch, half = constants
    gflops, half_gflops, gbytes = (1e-9 / each if each else math.inf for each in (flop, half, byte))
    parts = [f"{call * 1e6:.1f} µs a call", f"{gflops:.1f} GFLOP/s"]
    parts += [] if half is None else [f"{half_gflops:.1f} in half precision"]
    parts += [f"{launch * 1e6:.1f} µs a launch"] if launch else []
    return ", ".join([*parts, f"{gbytes:.1f} GB/s"])


if __name__ == "__main__":
    sys.exit(main())
