"""What Triton compiles for a training run, counted without compiling."""

import os
import subprocess
import sys

import pytest

from bench.machine import ROOT

pytest.importorskip("triton")


def test_a_ragged_last_batch_wants_no_kernel_of_its_own():
    """And the committed table has what is wanted now. In a child, outside Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.first_use", "--check"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
