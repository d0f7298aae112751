"""`bench` is imported from the repository's root; rows are made up where pictures are tested."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from made_up import BYTE_S, CALL_S, FLOP_S, make_row

from bench.cases import FORWARD_BACKWARD, TRAINING_STEP
from bench.steps import CE
from bench.suites import suites

settings.register_profile(
    "bench", derandomize=True, deadline=None, max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("bench")


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
            rows.append(make_row(name, case, "auto, half the rows", "growth", best / 3))
            if case.operation == FORWARD_BACKWARD:
                rows.append(make_row(name, case, "empty function", "floor", best / 4))
                rows.append(make_row(name, case, "products of pairs", "floor", best / 2))
                rows.append(make_row(name, case, "products of moments", "floor", best / 2))
                rows.append(make_row(name, case, "moves of rows", "floor", best / 8))
            rows.append(make_row(name, case, "pml triplet", "peer", 0, status="out of memory",
                                 p20_ms=None, p50_ms=None, p80_ms=None))  # fmt: skip
    return rows
