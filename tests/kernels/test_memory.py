"""`Cost.extra_memory` is what is allocated, by every schedule that runs without a GPU."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from allocations import Case
from kept import kept, version_of

from bstriplet_kernels.paths import native

SUPPORT = Path(__file__).parents[1] / "support"
FACTOR = 1.35  # a gradient of half precision that is not counted makes 1.5
CASES = [
    Case(36, 128, 3),
    Case(36, 1280, 3),
    Case(2, 1, 2),
    Case(7, 3, 3),
    Case(512, 64, 2),
    Case(512, 64, 8),
    Case(512, 64, 100),
    Case(512, 64, 512),
    Case(512, 64, 5, dominating=True),
    Case(1024, 512, 10),
    Case(256, 512, 4),
    Case(1000, 33, 7),
    Case(36, 1280, 3, dtype="bfloat16"),
    Case(512, 64, 8, dtype="float16"),
    Case(512, 64, 8, dtype="float64"),
    Case(2048, 16, 20, dtype="bfloat16", reduction="sum"),
    Case(64, 96, 64, reduction="none"),
    Case(512, 64, 8, dtype="float16", reduction="none"),
    Case(512, 64, 8, margin=0.0),
    Case(1024, 256, 4, margin=0.0, reduction="none"),
    Case(512, 64, 8, threads=2),
    Case(512, 64, 8, backward=False),
]
AGAINST_OTHERS = [
    Case(512, 64, 8, m=300),
    Case(36, 128, 8, m=2048),
    Case(1, 4, 2, m=5),
    Case(512, 64, 8, m=300, dtype="float16", reduction="none"),
    Case(1500, 16, 8, m=40, dtype="float64"),
    Case(1024, 256, 4, m=1024),
    Case(256, 64, 8, m=1024, dtype="bfloat16", ref_dtype="float32"),
    Case(512, 64, 8, m=300, dtype="float32", ref_dtype="float16"),
    Case(300, 64, 8, m=512, dtype="float32", ref_dtype="float64"),
    Case(512, 64, 8, m=300, backward=False),
]
LARGE = [
    Case(20_000, 128, 10),
    Case(20_000, 128, 3, dtype="bfloat16"),
    Case(20_000, 32, 2000),
    Case(65_536, 64, 64),
    Case(65_536, 2, 5),
    Case(20_000, 128, 10, dominating=True, margin=0.0),
    Case(20_000, 128, 150, reduction="none"),
    Case(20_000, 128, 150, dtype="bfloat16", margin=0.0),
    Case(20_000, 64, 10, threads=2),
]
LARGE_AGAINST_OTHERS = [Case(300, 64, 10, m=20_000), Case(20_000, 64, 10, m=300, reduction="none")]
INTERPRETED = [  # slow, so small: by one launch, then by tiles
    Case(36, 128, 3),
    Case(2, 1, 2),
    Case(7, 3, 3),
    Case(64, 96, 64),
    Case(36, 256, 3, backward=False),
    Case(36, 64, 3, dtype="bfloat16"),
    Case(20, 40, 3, dtype="float16"),
    Case(64, 32, 8, dtype="float64"),
    Case(64, 32, 2, margin=0.0),
    Case(36, 128, 3, reduction="none"),
    Case(36, 20, 3, reduction="none", dtype="float16"),
    Case(65, 16, 65),
    Case(100, 64, 8),
    Case(100, 64, 8, backward=False),
    Case(100, 48, 5, dominating=True),
    Case(130, 33, 5, dtype="float16"),
    Case(70, 32, 4, dtype="float64"),
    Case(200, 16, 10, reduction="none"),
    Case(60, 16, 3, m=100),
    Case(16, 24, 3, m=70, dtype="bfloat16"),
    Case(30, 64, 3, m=200, dtype="float32", ref_dtype="float16"),
    Case(200, 48, 3, m=30, dtype="float16", ref_dtype="bfloat16", backward=False),
    Case(60, 64, 3, m=60, dtype="float32", ref_dtype="float64"),
]
SCHEDULES = {
    "reference": CASES + AGAINST_OTHERS,
    "native": CASES + AGAINST_OTHERS,
    "on_cpu_native": CASES + LARGE,
    "on_cpu": CASES + AGAINST_OTHERS + LARGE + LARGE_AGAINST_OTHERS,
    "anywhere": CASES + LARGE[:3],
    "class_sums": CASES + AGAINST_OTHERS + LARGE,
    "triton": INTERPRETED,
}


@pytest.fixture(scope="module")
def allocator(request):
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs Linux and g++")
    source, flags = SUPPORT / "counting_allocator.cpp", ("-O2", "-fPIC", "-shared")

    def compile_allocator(folder):
        library = folder / "counting_allocator.so"
        subprocess.run(["g++", *flags, source, "-o", library, "-ldl"], check=True)

    made_of = [Path(__file__), *version_of("g++"), *flags, source]
    return kept(request, "allocator", made_of, compile_allocator) / "counting_allocator.so"


def missing(schedule):
    """What the schedule lacks here, else None."""
    if schedule == "triton":
        return None if importlib.util.find_spec("triton") else "needs Triton"
    return native.missing() if schedule.endswith("native") else None


@pytest.mark.parametrize("schedules", [[*SCHEDULES][:-1], ["triton"]], ids=["cpu", "triton"])
def test_extra_memory_is_what_is_allocated(schedules, allocator):
    """In one child for the schedules of a CPU, and one with Triton's interpreter."""
    chosen = {name: SCHEDULES[name] for name in schedules if missing(name) is None}
    if not chosen:
        pytest.skip(missing(schedules[0]))
    interpreted = str(int("triton" in chosen))
    ran = subprocess.run(
        [sys.executable, SUPPORT / "allocations.py"],
        input=json.dumps(chosen),
        env=os.environ | {"LD_PRELOAD": str(allocator), "TRITON_INTERPRET": interpreted},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout)
    wrong = [
        f"{explained:,} explained, {allocated:,} allocated: {schedule} of {case}"
        for schedule, cases in chosen.items()
        for case, (explained, allocated) in zip(cases, found[schedule], strict=True)
        if not allocated / FACTOR <= explained <= allocated * FACTOR
    ]
    assert not wrong, "\n" + "\n".join(wrong)
