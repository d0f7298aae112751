"""`bench` is imported from the repository's root; rows are made up where pictures are tested."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.cases import FORWARD_BACKWARD, TRAINING_STEP
from bench.steps import CE
from bench.suites import suites
from bench.table import EAGER, OK, Row
from bstriplet_kernels.plan import eq8_flops

settings.register_profile(
    "bench", derandomize=True, deadline=None, max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("bench")

CALL_S, FLOP_S, BYTE_S = 2e-5, 1e-11, 1e-10


def make_row(suite, case, provider, group, seconds, **more):
    """A row that was never measured, with everything filled in."""
    values = {
        "suite": suite, "provider": provider, "group": group, "operation": case.operation,
        "mode": EAGER, "dtype": case.dtype, "n": case.n, "d": case.d, "c": case.c,
        "threads": case.threads, "balance": case.balance, "backbone": case.backbone,
        "status": OK, "device": "test machine", "commit": "0123456789", "versions": "python 3",
        "path": provider if group == "ours" else "", "p20_ms": 900 * seconds,
        "p50_ms": 1e3 * seconds, "p80_ms": 1100 * seconds, "repeats": 5,
        "peak_bytes": 4 * case.n * case.d, "resident_bytes": 5 * case.n * case.d,
        "flops": case.n * case.n * case.d, "bytes": 4 * case.n * case.d,
        "eq8_flops": eq8_flops(case.n, case.d, case.c),
        "gemm_flops_s": 1e11, "bandwidth_bytes_s": 1e10,
    }  # fmt: skip
    return Row(**{**values, **more})


@pytest.fixture
def made_up_rows():
    """Every suite: naive and two paths, `native` by exactly the model that calibration fits."""
    rows = []
    for name, suite in suites().items():
        for case in suite.cases:
            flops, moved = case.n * case.n * case.d, 4 * case.n * case.d
            native = CALL_S + FLOP_S * flops + BYTE_S * moved
            if case.operation == TRAINING_STEP:
                rows.append(make_row(name, case, CE, "baseline", 0.1))
                continue
            rows.append(make_row(name, case, "naive", "baseline", 8 * native))
            rows.append(make_row(name, case, "compiled naive", "compiled", 4 * native))
            rows.append(make_row(name, case, "native", "ours", native))
            rows.append(make_row(name, case, "gram", "ours", 1e-4 * case.n))
            best = min(native, 1e-4 * case.n)
            rows.append(make_row(name, case, "auto", "ours", best, path="native"))
            if case.operation == FORWARD_BACKWARD:
                rows.append(make_row(name, case, "empty function", "floor", best / 4))
                rows.append(make_row(name, case, "products of pairs", "floor", best / 2))
                rows.append(make_row(name, case, "products of moments", "floor", best / 2))
            rows.append(make_row(name, case, "pml triplet", "peer", 0, status="out of memory",
                                 p20_ms=None, p50_ms=None, p80_ms=None))  # fmt: skip
    return rows
