"""Triton kernels compiled ahead of time for GPUs that are not here."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def compiled_environment():
    """Outside Triton's interpreter, in which a kernel is no kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return environment | {"PYTHONPATH": str(ROOT)}


def test_no_configuration_spills_or_outgrows_shared_memory():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "triton_resources.py", "--check"],
        env=compiled_environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert done.stdout.count(f",{target},") >= 25


def specialisations():
    """Printed by a child: names of sizes that a kernel would be compiled anew for."""
    from triton.runtime.jit import JITFunction

    from bstriplet_kernels.paths import tiles

    kernels = [
        kernel
        for name, kernel in vars(tiles).items()
        if isinstance(kernel, JITFunction) and not name.startswith("_")
    ]
    assert len(kernels) == 7
    ragged = {"n", "m", "parts", "height", "own", "signed", "mean", "wants_gradient"}
    ragged |= {"upstream_stride", "row_stride"}
    for kernel in kernels:
        for parameter in kernel.params:
            if parameter.name in ragged and not parameter.do_not_specialize:
                print(kernel.__name__, parameter.name)


def test_a_ragged_batch_compiles_nothing():
    done = subprocess.run(
        [sys.executable, "-c", inspect.getsource(specialisations) + "\nspecialisations()"],
        env=compiled_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
