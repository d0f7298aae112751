"""Triton kernels compiled ahead of time for GPUs that are not here."""

import collections
import csv
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kept import kept

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def compiled_environment():
    """Outside Triton's interpreter, in which a kernel is no kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return environment | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def resources(request):
    """What bench/triton_resources.py prints; it fails on a spill or too much shared memory."""
    program = ROOT / "bench" / "triton_resources.py"

    def compile_all(folder):
        done = subprocess.run(
            [sys.executable, program, "--check"],
            env=compiled_environment(),
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        (folder / "resources.csv").write_text(done.stdout, "utf-8")

    table = ROOT / "bench/results/compile/triton_resources.csv"
    made_of = [Path(__file__), program, table, *sorted((ROOT / "bstriplet_kernels").rglob("*.py"))]
    made_of += [triton.__version__, torch.__version__, sys.version]
    folder = kept(request, "triton_resources", made_of, compile_all)
    with (folder / "resources.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_architecture_is_compiled_for(resources):
    kernels = collections.defaultdict(set)
    for row in resources:
        kernels[row["target"]].add(row["kernel"])
    assert set(kernels) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(kernels["sm_90"]) == 27
    assert kernels.pop("sm_90") == set().union(*kernels.values())
    assert min(map(len, kernels.values())) >= 8


def test_a_small_batch_waits_twice_in_each_of_ten_deep_steps(resources):
    steps = {
        row["dtype"]: (-(-1280 // int(row["block_d"])), row["step_barriers"])
        for row in resources
        if row["kernel"] == "loss_and_gradient"
        and (row["target"], row["layout"]) == ("sm_90", "aligned")
    }
    assert steps["fp16"] == steps["bf16"] == (10, "2")
    assert steps["fp32"][1] == ""  # a launch before sums products
    assert steps["fp64"] == (40, "2")


def specialisations():
    """Printed by a child: names of sizes that a kernel would be compiled anew for."""
    from triton.runtime.jit import JITFunction

    from bstriplet_kernels.paths.moments import class_sum_kernels, wide_kernels
    from bstriplet_kernels.paths.moments import kernels as moment_kernels
    from bstriplet_kernels.paths.triton import pair_kernels, small_kernels

    ragged = {"n", "m", "n_rows", "column_rows", "row_tiles", "column_tiles", "parts", "tiles"}
    ragged |= {
        "first",
        "own",
        "signed",
        "mean",
        "wants_gradient",
        "upstream_stride",
        "one_upstream",
    }
    of_moments = {"n", "run", "runs", "least", "classes", "steps", "upstream_stride"}
    for module, names, count in (
        (small_kernels, ragged, 2),
        (pair_kernels, ragged, 10),
        (moment_kernels, of_moments, 9),
        (wide_kernels, of_moments, 5),
        (class_sum_kernels, of_moments | {"m"}, 6),
    ):
        kernels = [
            kernel
            for name, kernel in vars(module).items()
            if isinstance(kernel, JITFunction)
            and not name.startswith("_")
            and kernel.fn.__module__ == module.__name__
        ]
        assert len(kernels) == count, kernels
        for kernel in kernels:
            for parameter in kernel.params:
                if parameter.name in names and not parameter.do_not_specialize:
                    print(kernel.__name__, parameter.name)


def test_a_ragged_batch_compiles_nothing():
    done = subprocess.run(
        [sys.executable, "-c", inspect.getsource(specialisations) + "\nspecialisations()"],
        env=compiled_environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
