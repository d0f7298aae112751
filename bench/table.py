"""Rows of results, and the CSV files that hold them."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .machine import ROOT

RESULTS = ROOT / "bench" / "results"
OK = "ok"
_PARTIAL = ".partial.csv"
EAGER, GRAPH = "eager", "graph replay"
SWEEPS = ("sweep", "million")
"""The suites over N."""


@dataclass(frozen=True)
class Row:
    """One provider on one case. None where it was not measured; `status` says why.

    path: of our providers, what ran, and the schedule where there are several. mode: "eager", or
    "graph replay" of a CUDA graph.
    active_share: of rows with h_i > 0. p20_ms, p50_ms, p80_ms: of one call, over `repeats` samples.
    peak_bytes, resident_bytes: see `counting.Memory`. flops, bytes: counted for this provider;
    launches: of our providers on a GPU, as the plan counts them. eq8_flops: Eq. 8's figure for the
    forward. gemm_flops_s, bandwidth_bytes_s: the machine's best, measured in this run; gemm_share,
    bandwidth_share: of it, what the provider's own count used.
    loss_error, gradient_error: relative, against float64.
    """

    suite: str
    provider: str
    group: str
    operation: str
    mode: str
    dtype: str
    n: int
    d: int
    c: int
    threads: int
    balance: str
    backbone: str
    status: str
    device: str
    commit: str
    versions: str
    path: str = ""
    active: float | None = None
    active_share: float | None = None
    margin: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    repeats: int = 0
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    flops: int | None = None
    bytes: int | None = None
    launches: int | None = None
    eq8_flops: int | None = None
    gemm_flops_s: float | None = None
    bandwidth_bytes_s: float | None = None
    gemm_share: float | None = None
    bandwidth_share: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether there is a time."""
        return self.status == OK and self.p50_ms is not None

    @property
    def ms(self) -> float:
        """The median, of a measured row."""
        assert self.p50_ms is not None
        return self.p50_ms


def where(rows: Iterable[Row], **values: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(getattr(row, k) == v for k, v in values.items())]


def milliseconds(ms: float) -> str:
    """The time with three digits, in the unit that suits."""
    for unit, scale in (("s", 1e3), ("ms", 1.0)):
        if ms >= scale:
            return f"{ms / scale:.3g} {unit}"
    return f"{ms * 1e3:.3g} µs"


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace a file by these rows, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    try:
        with draft.open("w", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(field.name for field in fields(Row))
            for row in rows:
                writer.writerow(_text(getattr(row, field.name)) for field in fields(Row))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def read(path: Path) -> list[Row]:
    """The rows of one file. ValueError where its columns are not those of `Row`."""
    with path.open(newline="") as stream:
        lines = csv.DictReader(stream)
        if lines.fieldnames != [field.name for field in fields(Row)]:
            raise ValueError(f"{path} is not a result of this version of bench; measure again")
        return [Row(**{f.name: _value(str(f.type), line[f.name]) for f in fields(Row)})
                for line in lines]  # fmt: skip


def partial(path: Path) -> Path:
    """Where the rows of a suite are until its last case is measured: SUITE.partial.csv."""
    return path.with_name(path.stem + _PARTIAL)


def files(folder: Path) -> list[Path]:
    """A file for each suite of a device: the complete one, else the partial one."""
    found = sorted(folder.glob("*.csv"))
    superseded = {partial(path) for path in found}
    return [path for path in found if path not in superseded]


def incomplete(folder: Path) -> list[str]:
    """The suites of a device that were measured in part."""
    names = (path.name for path in files(folder))
    return [name.removesuffix(_PARTIAL) for name in names if name.endswith(_PARTIAL)]


def read_device(folder: Path) -> list[Row]:
    """All rows of a device's folder; warns where a suite is incomplete.

    Raises:
        ValueError: the folder holds rows of two devices.
    """
    rows = [row for path in files(folder) for row in read(path)]
    devices = {row.device for row in rows}
    if len(devices) > 1:
        raise ValueError(f"{folder} mixes devices: {', '.join(sorted(devices))}")
    if names := incomplete(folder):
        warnings.warn(f"{folder}: not complete: {', '.join(names)}", stacklevel=2)
    return rows


def devices(results: Path = RESULTS) -> Iterator[Path]:
    """The folders of devices that have results."""
    kinds = (f"{kind}-*/" for kind in ("cpu", "cuda"))
    folders = (folder for kind in kinds for folder in sorted(results.glob(kind)))
    return (folder for folder in folders if any(folder.glob("*.csv")))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if text == "":
        return None
    return float(text) if kind.startswith("float") else int(text)
