"""Rows that were never measured; a module of its own, for processes that import the tests."""

from bench.table import EAGER, OK, Row
from bstriplet_kernels.plan import eq8_flops

CALL_S, FLOP_S, BYTE_S = 2e-5, 1e-11, 1e-10


def make_row(suite, case, provider, group, seconds, **more):
    """A row that was never measured, with everything filled in."""
    values = {
        "suite": suite, "provider": provider, "group": group, "operation": case.operation,
        "mode": EAGER, "dtype": case.dtype, "n": case.n, "d": case.d, "c": case.c,
        "threads": case.threads, "balance": case.balance, "backbone": case.backbone,
        "status": OK, "device": "test machine", "commit": "0123456789", "versions": "python 3",
        "active": case.active, "active_share": case.active,
        "path": provider if group == "ours" else "", "p20_ms": 900 * seconds,
        "p50_ms": 1e3 * seconds, "p80_ms": 1100 * seconds, "repeats": 5,
        "peak_bytes": 4 * case.n * case.d, "resident_bytes": 5 * case.n * case.d,
        "flops": case.n * case.n * case.d, "bytes": 4 * case.n * case.d,
        "eq8_flops": eq8_flops(case.n, case.d, case.c),
        "gemm_flops_s": 1e11, "bandwidth_bytes_s": 1e10,
    }  # fmt: skip
    return Row(**{**values, **more})
