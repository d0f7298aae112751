"""The machine that a row was measured on, and what it can do at best.

`python -m bench.machine [cpu|cuda]` prints it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "triton", "numpy", "pytorch-metric-learning", "liger-kernel", "timm")
_LONG_PRODUCT_S = 0.1
_MEASURED_PATHS = (
    *("bench", "bstriplet_kernels", "csrc", "python", "studies"),
    *(":(exclude)bench/results", ":(exclude)studies/results"),
)


class Limits(NamedTuple):
    """The best measured rates: of products in a dtype, FLOP/s, and of streaming memory, bytes/s."""

    gemm: float
    bandwidth: float


def device_name(device: str) -> str:
    """The device's usual name; for a processor also the vector instructions that torch uses.

    These tell generations apart, which a virtual machine may all call "AMD EPYC".
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}), {_cores()} cores"


def device_slug(device: str) -> str:
    """The folder of this device's results."""
    return f"{device}-" + re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def plain_name(processor: str) -> str:
    """A processor's usual name: "Intel Xeon" for "Intel(R) Xeon(R) CPU @ 2.70GHz"."""
    noise = r"\((R|TM)\)|\b(\d+-Core )?(CPU|Processor)\b|@.*"
    return " ".join(re.sub(noise, "", processor).split())


def versions() -> str:
    """Python and the packages that were timed, "name version" with "; " between."""
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def commit(*more: str) -> str:
    """The commit that was measured; "+" where what is measured differs from it.

    more: paths that are measured besides the loss.

    BENCH_COMMIT names it where there is no repository. RuntimeError where nothing does: a time
    is worth nothing without its code.
    """
    named = os.environ.get("BENCH_COMMIT")
    if named:
        return named
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", *_MEASURED_PATHS, *more
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"{ROOT} is no git repository: set BENCH_COMMIT to the commit of these files"
        ) from error
    return head + ("+" if changed else "")


@functools.cache
def limits(device: str, dtype: torch.dtype, threads: int) -> Limits:
    """Measure the best of a few square products, and a sum of two arrays."""
    torch.set_num_threads(threads)
    gemm = 0.0
    for size in (256, 512, 1024, 2048) if device == "cpu" else (4096, 8192):
        a = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        seconds = _median_seconds(lambda a=a, o=out: torch.mm(a, a, out=o))
        gemm = max(gemm, 2 * size**3 / seconds)
        if seconds > _LONG_PRODUCT_S:  # a precision without vector instructions
            break
    a, b = (torch.randn(1 << (24 if device == "cpu" else 27), device=device) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _median_seconds(lambda: torch.add(a, b, out=out))
    return Limits(gemm, 3 * a.nbytes / seconds)


def second_level_cache(device: str) -> int:
    """Bytes of a GPU's L2."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def main(device: str) -> None:
    """Print device, commit, versions and the device's best rates."""
    print(f"{device_name(device)}; commit {commit()}; {versions()}")
    source = torch.randn(1 << (28 if device == "cuda" else 24), device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source))
    print(f"copy: {2 * source.nbytes / seconds / 1e12:.3f} TB/s read and written", flush=True)
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
        ("float64", torch.float64, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        limits.cache_clear()
        rate = limits(device, dtype, torch.get_num_threads()).gemm
        print(f"products in {name}: {rate / 1e12:.4g} TFLOP/s", flush=True)


def _median_seconds(call: object) -> float:
    assert callable(call)
    samples = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[1:])


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ("git", "-C", str(ROOT), *arguments), check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return plain_name(names[0]) if names else platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
